r"""PPO on a freeway of Aw-Rascle-Zhang traffic, simulated on CPU or CUDA by one set of kernels.

On a laptop: 500 m of road, stop-and-go damped by the flux at the outlet, a minute and a half on one
core, episode_return on the published wave -88 to -90 (constant flux -382, backstepping -262, tuned
PI -108):

    python cleanrl_crypto/ppo_arz_gpu.py --timeout 90

Control at both ends, and finite volumes in place of the published scheme:

    python cleanrl_crypto/ppo_arz_gpu.py --control both --timeout 240
    python cleanrl_crypto/ppo_arz_gpu.py --scheme muscl --timeout 180

GPU, Kaggle: lanes and agent stay on the device; nothing crosses to the host but what is logged.

    python cleanrl_crypto/ppo_arz_gpu.py --scheme muscl --num-envs 16384 \
        --total-timesteps 100000000 --run-dir /kaggle/working/run --compile --cudagraphs \
        --timeout 3600

Several processes: each simulates its share of the lanes, gradients are averaged, rank 0 writes.

    torchrun --nproc-per-node 2 cleanrl_crypto/ppo_arz_gpu.py --timeout 180

Resume after whatever ended the run (the same command starts and continues it), or evaluate a
checkpoint:

    python cleanrl_crypto/ppo_arz_gpu.py --run-dir runs/road --resume auto
    python cleanrl_crypto/ppo_arz_gpu.py --eval-only --checkpoint runs/road/checkpoints/best.pt

Use the agent in another program, from its checkpoint alone:

    from cleanrl_crypto.ppo_arz_gpu import load_policy
    policy = load_policy("runs/road/checkpoints/best.pt")
    action = policy(obs)  # (B, 102): rho/rho* - 1, then v/v* - 1, at 51 points -> (B, 1) in [-1, 1]

Signals on a network of roads are another experiment: ppo_arz_signals.py. Every flag: --help. Every
metric, and what to do when it is off: docs/ppo_arz_gpu.md
"""

import math
import sys
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    from common.run import (
        CheckFailed,
        Run,
        RunArgs,
        answer_help,
        check,
        exit_with,
        experiment,
        load_run,
        refuse,
    )
except ModuleNotFoundError as e:
    if e.name != "common":
        raise
    root = Path(__file__).resolve().parents[1]
    sys.exit(f"{Path(__file__).name} needs the folder common/: copy it to {root}")
answer_help(__name__, __file__)

import gymnasium as gym
import numba as nb
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from numba import cuda

from common.lanes import SimulatedLanes, register

# literals of the kernels: a float32 times these stays float32 (Python's 0.5 would widen it)
ZERO, HALF, ONE, TWO = map(np.float32, (0.0, 0.5, 1.0, 2.0))
BLOCK = 64  # lanes a CPU task simulates together: their state stays in the cache
SCHEMA = 4  # of the checkpoint (3 was the script of three experiments)
EVAL_SEED = 2**31  # of the evaluation waves: a training seed is below it

# the road (Yu and Krstic's benchmark)
LENGTH = 500.0  # m
DX = 10.0  # m
NODES = 51
V_MAX = 40.0  # m/s
RHO_MAX = 0.16  # veh/m, jam density
RELAX = 60.0  # s, tau
SAMPLE = 0.25  # s between the states whose norms are the reward; the published scheme's time step
RHO_STAR = 0.12  # veh/m, the published steady state
RHO_FLOOR = 1e-4  # veh/m
FULL = np.float32(0.98)  # of the jam density: beyond it only Godunov's flux enters
SWING = 0.2  # an action of 1 is a flux of (1 + SWING) q*
WAVE = (RHO_STAR, 0.1, 0.0)  # rho*, amplitude, phase of the published initial wave
TRAIN_WAVES = (0.11, 0.13), (0.05, 0.15), (0.0, 2 * math.pi)  # ranges of the same
BROKEN = -1e3  # reward of a decision after which a state is not finite

# order of the finite volumes, or Richtmyer's scheme: a tuple's length is part of its type, None
# too, so that each is compiled on its own
FIRST = (0,)
SECOND = (0, 0)
PUBLISHED = None
SCHEMES = {"richtmyer": PUBLISHED, "godunov": FIRST, "muscl": SECOND}
CFL = {"godunov": 0.9, "muscl": 0.45, "richtmyer": math.nan}  # the last has no choice
# usual scale (m/s) and exponent
PRESSURES = {"gap": (V_MAX, 1.0), "power": (V_MAX, 2.0), "singular": (2.0, 0.5)}
FLUX, OPEN, RING = range(3)  # a road's end: prescribed, free, joined to the other
CONTROLS = "outlet", "inlet", "both"


# -------------------------------------------------------------------------------------- arguments
@dataclass
class Args(RunArgs):
    # experiment
    exp_name: str = Path(__file__).stem
    """name of this experiment"""

    # environment
    scenario: str = "freeway"
    """freeway (networks of roads and signals: ppo_arz_signals.py)"""
    num_envs: int = 1024
    """lanes, over all processes"""
    control: str = "outlet"
    """the end whose flux is the action: outlet, inlet or both (then outlet first)"""
    scheme: str = "richtmyer"
    """richtmyer (the published scheme), godunov or muscl (finite volumes of first and second
    order)"""
    decision_interval: float = 1.0
    """seconds between decisions, a multiple of 0.25"""
    episode_seconds: float = 240.0
    """seconds after which an episode is truncated"""
    pressure: str = "gap"
    """gap (V(0) - V(rho), the published law); with finite volumes also power, or singular (at the
    jam density; stiff: many small steps)"""
    pressure_scale: float | None = None
    """m/s, of the laws power (at the jam density; default 40) and singular (at half of it;
    default 2)"""
    pressure_exponent: float | None = None
    """of the laws power (default 2) and singular (default 0.5)"""
    sim_timeout: float | None = None
    """seconds for one simulation call (one decision of all lanes): after a longer one the run
    stops, saved; a call that does not return is ended by --timeout's watchdog alone"""

    # algorithm
    total_timesteps: int = 16_000_000
    """environment transitions (the sum over lanes)"""
    num_steps: int = 32
    """decisions of every lane in one rollout"""
    learning_rate: float = 1e-3
    """of Adam"""
    anneal_lr: bool = True
    """linearly to 0 at --total-timesteps, or at the transitions that --timeout will allow"""
    gamma: float = 0.95
    """discount a decision"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 8
    """minibatches an epoch"""
    update_epochs: int = 4
    """epochs over a rollout"""
    clip_coef: float = 0.2
    """clipping of the probability ratio"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """gradient clipping"""
    target_kl: float | None = None
    """stop the epochs of a rollout once a minibatch's approximate KL divergence exceeds this"""
    hidden: int = 64
    """width of the two SiLU layers of actor and critic"""
    log_std_init: float = -1.5
    """initial log standard deviation of the action"""

    # runtime
    eval_interval: int = 1_000_000
    """transitions between evaluations on the validation waves, which choose the best agent"""
    compile: bool = False
    """torch.compile the networks of a minibatch"""
    cudagraphs: bool = False
    """with --compile on a GPU: capture them in CUDA graphs"""

    def __post_init__(self):
        super().__post_init__()
        script = "python cleanrl_crypto/ppo_arz_signals.py"
        refuse(
            (
                self.scenario != "freeway",
                f"--scenario {self.scenario}: networks have a script of their own: "
                f"{script} --scenario {self.scenario}",
            )
        )
        check(
            self,
            {
                "control": CONTROLS,
                "scheme": tuple(SCHEMES),
                "pressure": tuple(PRESSURES),
            },
            {
                (0, 0.9999): "gamma",
                (0, 1): "gae_lambda learning_rate",
                (0.01, 10): "clip_coef",
                (0, 100): "ent_coef vf_coef",
                (1e-6, 1e9): "max_grad_norm target_kl sim_timeout",
                (-20, 5): "log_std_init",
                (0, 10**12): "total_timesteps",
                (1, 10**12): "eval_interval",
                (1, 2**20): "num_envs num_steps",
                (1, 2**16): "num_minibatches update_epochs hidden",
                (0.1, 1000): "pressure_scale",
                (0.1, 10): "pressure_exponent",
                (0.25, 3600): "decision_interval",
                (0.25, 86400): "episode_seconds",
            },
        )
        interval, episode = self.decision_interval, self.episode_seconds
        rows = self.num_envs * self.num_steps
        gap = self.pressure == "gap"
        refuse(
            (
                interval % SAMPLE,
                f"--decision-interval {interval}: must be a multiple of {SAMPLE} s",
            ),
            (
                episode % interval,
                f"--episode-seconds {episode} must be a multiple of --decision-interval {interval}",
            ),
            (
                rows % self.num_minibatches,
                f"--num-envs {self.num_envs} times --num-steps {self.num_steps} is not a multiple "
                f"of --num-minibatches {self.num_minibatches}",
            ),
            (
                self.scheme == "richtmyer" and not gap,
                f"--pressure {self.pressure} needs --scheme godunov or muscl",
            ),
            (
                gap and (self.pressure_scale or self.pressure_exponent),
                "--pressure-scale and --pressure-exponent need --pressure power or singular",
            ),
            (self.cudagraphs and not self.compile, "--cudagraphs needs --compile"),
        )


# ------------------------------------------------------------------------------------- named rows
class Lane(NamedTuple):
    """What a lane knows of its episode; a row (W,) each."""

    rho_star: float  # steady state, veh/m
    v_star: float  # m/s
    q_star: float  # veh/s
    q_in: float  # fluxes that the action asks for
    q_out: float
    last_out: float  # actions of the decision before
    last_in: float
    moves: float  # 1, or 0 in the published loop's last step, which updates nothing
    waiting: float  # vehicles outside the inlet


class Totals(NamedTuple):
    """Sums of an episode; a row (W,) each."""

    episode_return: float
    delay: float  # s
    distance: float  # m, driven
    presence: float  # s
    switches: float
    entered: float  # vehicles
    left: float
    added: float  # by the floor and the clamp, net
    clamped: float  # the same without signs
    max_cfl: float
    at_start: float  # vehicles on the road
    waiting: float  # outside the inlet, at the end
    at_end: float  # the last two: of an episode that ended
    decisions: float
    steps: float  # of the solver


AT = Lane(*range(len(Lane._fields)))  # in kernels: lane[AT.q_in, j]
SUM = Totals(*range(len(Totals._fields)))  # totals[SUM.entered, j]


# ---------------------------------------------------------------------------------------- kernels
jit = partial(nb.njit, cache=True, error_model="numpy")


def fast(function):
    """njit; as it is under NUMBA_ENABLE_CUDASIM, where kernels are Python. A division by zero
    gives inf."""
    return function if nb.config.ENABLE_CUDASIM else jit(function)


@jit
def scramble_nb(x):
    """The finaliser of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@jit
def uniform_nb(seed, lane, episode, draw):
    """Counter-based uniform in [0, 1): two rounds of splitmix64 over (seed, lane, episode,
    draw)."""
    seeds = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15)
    episodes = np.uint64(episode) * np.uint64(0xD1342543DE82EF95)
    x = scramble_nb(seeds + np.uint64(lane))
    x = scramble_nb(x + episodes + np.uint64(draw))
    return np.float64(x >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@fast
def between_nb(ends, share):
    return ends[0] + share * (ends[1] - ends[0])


@fast
def greenshields_nb(rho, v_max, rho_max):
    """Equilibrium speed V(rho) = v_max (1 - rho / rho_max)."""
    return v_max * (ONE - rho / rho_max)


# the published scheme: rho and y = rho (v - V) at nodes
@fast
def published_flux_nb(rho, y, v_max, rho_max):
    """Fluxes of (rho, y): y + rho V and y v. Returns (f, g)."""
    big_v = greenshields_nb(rho, v_max, rho_max)
    return y + rho * big_v, y * (y / rho + big_v)


@fast
def end_nb(rho, q, v_max, rho_max):
    """y of an end node that lets q vehicles a second pass, at most at v_max."""
    flux = q if q < rho * v_max else rho * v_max
    return flux - rho * greenshields_nb(rho, v_max, rho_max)


@fast
def half_step(rho, y, half_rho, half_y, speed, a, b, v_max, rho_max):
    """Half nodes (M - 1, W) after half a step of the nodes (M, W); a, b (W,): dt / (2 dx), dt /
    (2 tau).

    speed (W,): the largest |v|, |v - rho p'| of each lane, p = V(0) - V.
    """
    for i in range(rho.shape[0] - 1):
        for j in range(rho.shape[1]):
            f0, g0 = published_flux_nb(rho[i, j], y[i, j], v_max, rho_max)
            f1, g1 = published_flux_nb(rho[i + 1, j], y[i + 1, j], v_max, rho_max)
            mean_rho = HALF * (rho[i, j] + rho[i + 1, j])
            half_rho[i, j] = mean_rho - a[j] * (f1 - f0)
            mean_y = HALF * (y[i, j] + y[i + 1, j])
            half_y[i, j] = mean_y * (ONE - b[j]) - a[j] * (g1 - g0)
            v = f1 / rho[i + 1, j]
            back = v_max * rho[i + 1, j] / rho_max - v
            v = v if v > -v else -v
            v = v if v > back else back
            speed[j] = v if v > speed[j] else speed[j]


@fast
def whole_step(rho, y, half_rho, half_y, ledger, a, b, road):
    """Inner nodes after the whole step, clamped to the physical range; ledger (2, W): density
    that the clamp added, net and without signs."""
    v_max = road[1]
    rho_max = road[2]
    floor = road[4]
    added = ledger[0]
    clamped = ledger[1]
    for i in range(1, rho.shape[0] - 1):
        for j in range(rho.shape[1]):
            f0, g0 = published_flux_nb(
                half_rho[i - 1, j], half_y[i - 1, j], v_max, rho_max
            )
            f1, g1 = published_flux_nb(half_rho[i, j], half_y[i, j], v_max, rho_max)
            raw = rho[i, j] - TWO * a[j] * (f1 - f0)
            raw_y = (
                y[i, j]
                - TWO * a[j] * (g1 - g0)
                - b[j] * (half_y[i - 1, j] + half_y[i, j])
            )
            new = raw if raw > floor else floor
            new = new if new < rho_max else rho_max
            low = -new * greenshields_nb(new, v_max, rho_max)  # v = 0
            high = new * v_max + low  # v = v_max
            new_y = raw_y if raw_y > low else low
            rho[i, j] = new
            y[i, j] = new_y if new_y < high else high
            added[j] += new - raw
            clamped[j] += new - raw if new > raw else raw - new


@fast
def richtmyer(u, work, lane, totals, road, dt):
    """One published two-step step of dt seconds times lane.moves (1 or 0), of one block, in place.

    u (2, M, W): rho, y at the nodes; work (6, M + 8, W) scratch. Before the step both end nodes
    take their neighbour's density and the prescribed flux. Values that leave the physical range
    (a bad policy drives this scheme to NaN within seconds) are clamped, and the clamped mass goes
    to the ledger of the inner nodes.
    """
    dx, v_max, rho_max, tau, _, _ = road
    rho = u[0]
    y = u[1]
    half_rho = work[0]
    half_y = work[1]
    last = u.shape[1] - 1
    speed = work[2, 0]
    ledger = work[2, 1:3]
    a = work[2, 3]
    b = work[2, 4]
    for j in range(rho.shape[1]):
        speed[j] = ZERO
        ledger[0, j] = ZERO
        ledger[1, j] = ZERO
        a[j] = HALF * dt / dx * lane[AT.moves, j]
        b[j] = HALF * dt / tau * lane[AT.moves, j]
        if lane[AT.moves, j] > ZERO:
            rho[0, j] = rho[1, j]
            rho[last, j] = rho[last - 1, j]
            y[0, j] = end_nb(rho[0, j], lane[AT.q_in, j], v_max, rho_max)
            y[last, j] = end_nb(rho[last, j], lane[AT.q_out, j], v_max, rho_max)
    half_step(rho, y, half_rho, half_y, speed, a, b, v_max, rho_max)
    whole_step(rho, y, half_rho, half_y, ledger, a, b, road)
    for j in range(rho.shape[1]):
        into, _ = published_flux_nb(half_rho[0, j], half_y[0, j], v_max, rho_max)
        out, _ = published_flux_nb(
            half_rho[last - 1, j], half_y[last - 1, j], v_max, rho_max
        )
        courant = speed[j] * dt / dx
        totals[SUM.entered, j] += into * dt * lane[AT.moves, j]
        totals[SUM.left, j] += out * dt * lane[AT.moves, j]
        totals[SUM.added, j] += ledger[0, j] * dx
        totals[SUM.clamped, j] += ledger[1, j] * dx
        totals[SUM.steps, j] += lane[AT.moves, j]
        if courant > totals[SUM.max_cfl, j]:
            totals[SUM.max_cfl, j] = courant


# finite volumes: rho and z = rho w of cells, w = v + p(rho)
def pressure_of(
    kind: str,
    scale: float | None = None,
    exponent: float | None = None,
    real=np.float32,
) -> tuple:
    """Law of the pressure: (c, gamma, rho_max), for power one zero longer, for singular two: its
    type.

    gap is V(0) - V(rho); power has `scale` m/s at rho_max, singular at rho_max / 2.
    """
    usual_scale, usual_exponent = PRESSURES[kind]
    scale = scale or usual_scale
    exponent = exponent or usual_exponent
    zeros = list(PRESSURES).index(kind) * (real(0),)
    return real(scale / RHO_MAX**exponent), real(exponent), real(RHO_MAX), *zeros


@fast
def pressure_nb(rho, pressure):
    """p(rho), m/s: c rho (gap), c rho^gamma (power), c (1/rho - 1/rho_max)^-gamma (singular at
    the jam)."""
    c = pressure[0]
    gamma = pressure[1]
    rho_max = pressure[2]
    if len(pressure) == 3:
        return c * rho
    if len(pressure) == 4:
        return c * rho**gamma
    if rho < rho_max:
        return c * (rho * rho_max / (rho_max - rho)) ** gamma
    return c * ONE * np.float32(1e9)


@fast
def density_nb(p, pressure):
    """The density of pressure p >= 0, the inverse of pressure_nb."""
    c = pressure[0]
    gamma = pressure[1]
    rho_max = pressure[2]
    if len(pressure) == 3:
        return p * (ONE / c)  # the quotient leaves the loops over lanes, p / c would not
    q = (p / c) ** (ONE / gamma)
    return q if len(pressure) == 4 else q * rho_max / (q + rho_max)


@fast
def stiffness_nb(rho, pressure):
    """rho p'(rho), m/s: lambda_1 = v - rho p', lambda_2 = v."""
    gamma = pressure[1]
    rho_max = pressure[2]
    p = pressure_nb(rho, pressure)
    if len(pressure) == 3:
        return p
    return gamma * p if len(pressure) == 4 else gamma * p * rho_max / (rho_max - rho)


@fast
def critical_nb(w, pressure):
    """The density at which the flux rho (w - p(rho)) of vehicles of one w is largest: w = p + rho
    p'."""
    c = pressure[0]
    gamma = pressure[1]
    rho_max = pressure[2]
    if len(pressure) == 3:
        return w * (HALF / c)
    q = (w / (gamma + ONE) / c) ** (ONE / gamma)
    if len(pressure) == 4:
        return q
    # q = 1 / (1/rho - 1/rho_max) solves p(q) (1 + gamma (1 + q / rho_max)) = w: convex, so Newton
    # comes from above
    for _ in range(12):
        p = c * q**gamma
        value = p * (ONE + gamma + gamma * q / rho_max) - w
        q -= value * q / (gamma * (value + w) + p * gamma * q / rho_max)
    return q * rho_max / (q + rho_max)


@fast
def flux_nb(rho_l, v_l, rho_r, v_r, pressure):
    """Exact Godunov flux: the smaller of the left state's demand and the right state's supply, at
    the left one's w.

    Returns (rho flux, rho w flux). The supply leaves the middle state (w_L, v_R), no denser than
    a jam; an empty road supplies all.
    """
    w = v_l + pressure_nb(rho_l, pressure)
    w = w if w > ZERO else ZERO
    best = critical_nb(w, pressure)
    most = best * (w - pressure_nb(best, pressure))
    demand = rho_l * v_l if rho_l <= best else most
    behind = v_r if v_r > ZERO else ZERO
    behind = behind if behind < w else w
    behind = behind if rho_r > ZERO else w
    middle = density_nb(w - behind, pressure)
    middle = middle if middle < pressure[2] else pressure[2]
    supply = middle * behind if middle >= best else most
    f = demand if demand < supply else supply
    return f, f * w


@fast
def minmod_nb(a, b):
    small = a if abs(a) < abs(b) else b
    return small if a * b > ZERO else ZERO


@fast
def face_nb(rho0, v0, rho1, v1, rho2, v2, rho3, v3, order, pressure):
    """Flux between cells 1 and 2 of four: first order, or minmod slopes of rho and v (second
    order)."""
    if len(order) == 2:
        rho_l = rho1 + HALF * minmod_nb(rho1 - rho0, rho2 - rho1)
        v_l = v1 + HALF * minmod_nb(v1 - v0, v2 - v1)
        rho_r = rho2 - HALF * minmod_nb(rho2 - rho1, rho3 - rho2)
        v_r = v2 - HALF * minmod_nb(v2 - v1, v3 - v2)
        return flux_nb(rho_l, v_l, rho_r, v_r, pressure)
    return flux_nb(rho1, v1, rho2, v2, pressure)


@fast
def relax_nb(rho, z, keep, v_max, pressure):
    """z after a relaxation of v to Greenshields' V(rho), exact at fixed rho: v - V shrinks to
    `keep` of itself."""
    speed = greenshields_nb(rho, v_max, pressure[2])
    rest = rho * (speed + pressure_nb(rho, pressure))
    return z + (rest - z) * (ONE - keep)


@fast
def ghosts(r, v, left):
    """Two cells beyond either end of r, v (M + 4, W): of the other end on a ring, else the last
    one again."""
    m = r.shape[0] - 4
    for i in range(2):
        first, last = (m + i, 2 + i) if left == RING else (2, m + 1)
        for j in range(r.shape[1]):  # whole rows would need an allocator, which CUDA has not
            r[i, j] = r[first, j]
            r[m + 2 + i, j] = r[last, j]
            v[i, j] = v[first, j]
            v[m + 2 + i, j] = v[last, j]


@fast
def primitives(rho, z, r, v, left, pressure):
    """r, v (M + 4, W): density and speed of the cells rho, z (M, W), two ghost cells at
    either end."""
    for i in range(rho.shape[0]):
        for j in range(rho.shape[1]):
            r[i + 2, j] = rho[i, j]
            v[i + 2, j] = z[i, j] / rho[i, j] - pressure_nb(rho[i, j], pressure)
    ghosts(r, v, left)


@fast
def relax_primitives(rho, z, keep, r, v, left, v_max, pressure):
    """relax() and primitives() in one pass over the memory."""
    for i in range(rho.shape[0]):
        for j in range(rho.shape[1]):
            new = relax_nb(rho[i, j], z[i, j], keep[j], v_max, pressure)
            z[i, j] = new
            r[i + 2, j] = rho[i, j]
            v[i + 2, j] = new / rho[i, j] - pressure_nb(rho[i, j], pressure)
    ghosts(r, v, left)


@fast
def faces(r, v, f, g, order, pressure):
    """f, g (M + 1, W): Godunov flux of rho and z at the faces of the cells r, v (M + 4, W)."""
    for i in range(f.shape[0]):
        for j in range(r.shape[1]):
            f[i, j], g[i, j] = face_nb(
                r[i, j],
                v[i, j],
                r[i + 1, j],
                v[i + 1, j],
                r[i + 2, j],
                v[i + 2, j],
                r[i + 3, j],
                v[i + 3, j],
                order,
                pressure,
            )


@fast
def inlet(r, v, f, g, a, lane, dx, v_max, pressure):
    """Face 0 lets the prescribed flux pass, and what waits outside; what the first cell cannot
    take waits."""
    rho_max = pressure[2]
    for j in range(r.shape[1]):
        q = lane[AT.q_in, j]
        rho = r[2, j]
        p = pressure_nb(r[2, j], pressure)
        if lane[AT.waiting, j] > ZERO and a[j] > ZERO:
            q += lane[AT.waiting, j] / (a[j] * dx)
        # what enters has the first cell's density, and so the speed that gives the flux
        speed = q / rho if q < rho * v_max else v_max
        f[0, j] = q
        g[0, j] = q * (speed + p)
        after = rho + a[j] * (q - f[1, j])
        after_z = rho * (v[2, j] + p) + a[j] * (g[0, j] - g[1, j])
        backwards = after_z < after * pressure_nb(after, pressure)  # v < 0
        if after > FULL * rho_max or backwards:
            w = greenshields_nb(rho, v_max, rho_max) + p
            best = critical_nb(w, pressure)
            queue = w - pressure_nb(best, pressure)  # its speed
            into, _ = flux_nb(best, queue, rho, v[2, j], pressure)
            f[0, j] = into if into < q else q
            g[0, j] = f[0, j] * w


@fast
def outlet(r, v, f, g, lane, pressure):
    """The last face lets the prescribed flux pass, or what the last cell gives to an empty road."""
    m = f.shape[0] - 1
    for j in range(r.shape[1]):
        most, _ = flux_nb(r[m + 1, j], v[m + 1, j], ZERO, ZERO, pressure)
        q = lane[AT.q_out, j]
        f[m, j] = q if q < most else most
        w = v[m + 1, j] + pressure_nb(r[m + 1, j], pressure)
        g[m, j] = f[m, j] * w


@fast
def update_nb(rho, z, f0, g0, f1, g1, a, floor, w_floor):
    """One conservative update of one cell; a = dt / dx. Returns rho, z, and the density that the
    floor added."""
    rho = rho - a * (f1 - f0)
    z = z - a * (g1 - g0)
    low = rho < floor
    added = floor - rho if low else ZERO
    z = floor * w_floor if low else z
    return rho + added, z, added


@fast
def update(rho, z, f, g, a, new_rho, new_z, added, floor, w_floor):
    """new_rho, new_z (M, W): rho, z updated by the fluxes f, g (M + 1, W).

    a (W,): dt / dx; added (W,) collects the density that the floor adds.
    """
    for i in range(rho.shape[0]):
        for j in range(rho.shape[1]):
            new_rho[i, j], new_z[i, j], more = update_nb(
                rho[i, j],
                z[i, j],
                f[i, j],
                g[i, j],
                f[i + 1, j],
                g[i + 1, j],
                a[j],
                floor,
                w_floor,
            )
            added[j] += more


@fast
def go_half_way(x, end):
    """x (M, W) to the mean of x and end: the second stage of SSPRK2."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            x[i, j] += HALF * (end[i, j] - x[i, j])


@fast
def relax(rho, z, keep, v_max, pressure):
    for i in range(rho.shape[0]):
        for j in range(rho.shape[1]):
            z[i, j] = relax_nb(rho[i, j], z[i, j], keep[j], v_max, pressure)


@fast
def fastest_wave(rho, z, speed, pressure):
    """speed (W,): the largest |v|, |v - rho p'| of each lane."""
    for j in range(speed.size):
        speed[j] = ZERO
    for i in range(rho.shape[0]):
        for j in range(rho.shape[1]):
            v = z[i, j] / rho[i, j] - pressure_nb(rho[i, j], pressure)
            back = stiffness_nb(rho[i, j], pressure) - v
            v = v if v > -v else -v
            v = v if v > back else back
            speed[j] = v if v > speed[j] else speed[j]


@fast
def advance(u, work, lane, totals, road, seconds, order, left, right, pressure):
    """All lanes of one block of roads over `seconds` by finite volumes, in place.

    u (2, M, W): rho and z of the cells; work (6, M + 8, W) scratch; every lane takes steps of its
    own: at most cfl dx / max(|v|, |v - rho p'|), as equal as they come. Strang splitting: half a
    relaxation, transport (Euler, or SSPRK2 where order is SECOND), half a relaxation.
    """
    dx, v_max, _, tau, floor, cfl = road
    m = u.shape[1]
    width = u.shape[2]
    rho = u[0]
    z = u[1]
    half_rho = work[4, :m]
    half_z = work[5, :m]
    r = work[0, : m + 4]
    v = work[1, : m + 4]
    f = work[2, : m + 1]
    g = work[3, : m + 1]
    rows = work[4, m:]
    into = rows[0]
    out = rows[1]
    added = rows[2]
    refused = rows[3]
    a = rows[4]
    keep = rows[5]
    speed = rows[6]
    rest = rows[7]
    weight = dx * HALF if len(order) == 2 else dx
    more = True
    for j in range(width):
        rest[j] = seconds
    while more:
        more = False
        fastest_wave(rho, z, speed, pressure)
        for j in range(width):
            n = math.ceil(rest[j] * speed[j] / (cfl * dx))
            n = n if ONE < n and speed[j] < np.float32(1e4) else ONE
            step = rest[j] / n
            rest[j] = rest[j] - step if n > ONE else ZERO
            more = more or rest[j] > ZERO
            a[j] = step / dx
            keep[j] = math.exp(-HALF * step / tau)
            courant = a[j] * speed[j]
            if courant > totals[SUM.max_cfl, j]:
                totals[SUM.max_cfl, j] = courant
            totals[SUM.steps, j] += ONE if step > ZERO else ZERO
            into[j] = ZERO
            out[j] = ZERO
            added[j] = ZERO
            refused[j] = ZERO
        for stage in range(len(order)):
            if stage == 0:
                relax_primitives(rho, z, keep, r, v, left, v_max, pressure)
            else:
                primitives(half_rho, half_z, r, v, left, pressure)
            faces(r, v, f, g, order, pressure)
            if right == FLUX:
                outlet(r, v, f, g, lane, pressure)
            if left == FLUX:
                inlet(r, v, f, g, a, lane, dx, v_max, pressure)
            if len(order) == 1:
                update(rho, z, f, g, a, rho, z, added, floor, v_max)
            elif stage == 0:
                update(rho, z, f, g, a, half_rho, half_z, added, floor, v_max)
            else:
                # r and v are free; an update in place would not be vectorised
                update(half_rho, half_z, f, g, a, r[:m], v[:m], added, floor, v_max)
                go_half_way(rho, r[:m])
                go_half_way(z, v[:m])
            for j in range(width):
                into[j] += a[j] * f[0, j]
                out[j] += a[j] * f[m, j]
                refused[j] += a[j] * (lane[AT.q_in, j] - f[0, j])
        relax(rho, z, keep, v_max, pressure)
        for j in range(width):
            totals[SUM.entered, j] += weight * into[j]
            totals[SUM.left, j] += weight * out[j]
            totals[SUM.added, j] += weight * added[j]
            totals[SUM.clamped, j] += weight * added[j]
            if left == FLUX:
                lane[AT.waiting, j] += weight * refused[j]


# an episode
@fast
def speed_nb(rho, z, order, v_max, pressure):
    if order is None:
        return z / rho + greenshields_nb(rho, v_max, pressure[2])
    return z / rho - pressure_nb(rho, pressure)


@fast
def nodes(u, work, v_max, order, pressure):
    """rho and v at the NODES points, into work[0] and work[1]: of the published scheme's nodes, or
    means of the two cells beside a point."""
    rho = u[0]
    z = u[1]
    r = work[0]
    v = work[1]
    last = u.shape[1] - 1
    for i in range(NODES):
        west = i
        east = i
        if order is not None:
            west = i - 1 if i > 0 else 0
            east = i if i < last else last
        for j in range(rho.shape[1]):
            r[i, j] = HALF * (rho[west, j] + rho[east, j])
            v_west = speed_nb(rho[west, j], z[west, j], order, v_max, pressure)
            v_east = speed_nb(rho[east, j], z[east, j], order, v_max, pressure)
            v[i, j] = HALF * (v_west + v_east)


@fast
def norms(work, lane, weight):
    """One sample of the NODES points work[0], work[1] into the first rows (W,) of work[2] to
    work[5]: squared relative errors of rho and of v, and by the trapezoid rule rho and rho v."""
    r = work[0]
    v = work[1]
    square_rho = work[2, 0]
    square_v = work[3, 0]
    mass = work[4, 0]
    flow = work[5, 0]
    for j in range(r.shape[1]):
        square_rho[j] = ZERO
        square_v[j] = ZERO
        mass[j] = ZERO
        flow[j] = ZERO
    for i in range(NODES):
        share = weight * HALF if i == 0 or i == NODES - 1 else weight
        for j in range(r.shape[1]):
            a = r[i, j] / lane[AT.rho_star, j] - ONE
            b = v[i, j] / lane[AT.v_star, j] - ONE
            square_rho[j] += a * a
            square_v[j] += b * b
            mass[j] += share * r[i, j]
            flow[j] += share * r[i, j] * v[i, j]


@fast
def observe(work, lane, obs):
    for j in range(obs.shape[0]):
        for i in range(NODES):
            obs[j, i] = work[0, i, j] / lane[AT.rho_star, j] - ONE
            obs[j, NODES + i] = work[1, i, j] / lane[AT.v_star, j] - ONE


@fast
def stored(u, order, dx, j):
    """Vehicles on lane j's road: of its cells, or of its inner nodes, which are what the
    published scheme conserves."""
    margin = 1 if order is None else 0
    vehicles = 0.0
    for i in range(margin, u.shape[1] - margin):
        vehicles += u[0, i, j] * dx
    return vehicles


@fast
def start_lane(state, road, order, pressure, seed, lane0, j):
    """First state of lane j's episode: rho* (1 + amplitude sin(3 pi x / L + phase)) with flux q*
    everywhere.

    waves (3, W): rho*, amplitude, phase of a lane whose wave is fixed; where rho* is 0 all three
    are drawn.
    """
    u, _, lane, totals, clock, waves = state
    dx = road[0]
    v_max = road[1]
    rho_max = road[2]
    rho_star = waves[0, j]
    amplitude = waves[1, j]
    phase = waves[2, j]
    if rho_star == 0.0:
        number = lane0 + j
        episode = clock[1, j]
        rho_star = between_nb(TRAIN_WAVES[0], uniform_nb(seed, number, episode, 0))
        amplitude = between_nb(TRAIN_WAVES[1], uniform_nb(seed, number, episode, 1))
        phase = between_nb(TRAIN_WAVES[2], uniform_nb(seed, number, episode, 2))
    v_star = v_max * (1.0 - rho_star / rho_max)
    q_star = rho_star * v_star
    for k in range(lane.shape[0]):
        lane[k, j] = ZERO
    lane[AT.rho_star, j] = rho_star
    lane[AT.v_star, j] = v_star
    lane[AT.q_star, j] = q_star
    first = 0.0 if order is None else 0.5
    for i in range(u.shape[1]):
        angle = 3.0 * math.pi * (i + first) * dx / LENGTH + phase
        rho = rho_star * (1.0 + amplitude * math.sin(angle))
        u[0, i, j] = rho
        if order is None:
            u[1, i, j] = q_star - rho * v_max * (1.0 - rho / rho_max)
        else:
            u[1, i, j] = q_star + rho * pressure_nb(u[0, i, j], pressure)
    for k in range(totals.shape[0]):
        totals[k, j] = 0.0
    totals[SUM.at_start, j] = stored(u, order, dx, j)
    clock[0, j] = 0


@fast
def act(action, lane, totals, control, swing):
    """The fluxes that actions (W, A) in [-1, 1] ask for: of the outlet, of the inlet, or of
    both."""
    for j in range(action.shape[0]):
        out, into = ZERO, ZERO
        if control != 1:
            out = action[j, 0]
        if control != 0:
            into = action[j, control - 1]
        out = -ONE if out < -ONE else ONE if out > ONE else out
        into = -ONE if into < -ONE else ONE if into > ONE else into
        lane[AT.q_in, j] = lane[AT.q_star, j] * (ONE + swing * into)
        lane[AT.q_out, j] = lane[AT.q_star, j] * (ONE + swing * out)
        change = abs(out - lane[AT.last_out, j]) + abs(into - lane[AT.last_in, j])
        totals[SUM.switches, j] += HALF * change
        lane[AT.last_out, j] = out
        lane[AT.last_in, j] = into


@fast
def decide(state, result, rules, order, action, seed, lane0):
    """One decision of all lanes of one block, autoreset included.

    state: u, work, lane, totals, clock (2, W): decisions and episodes so far, waves; result: obs,
    final_obs (W, 2 NODES), finals: totals of the episode that ended, reward (W,): mean over the
    samples of minus (norm of v/v* - 1 plus norm of rho/rho* - 1), Euclidean over the points,
    terminated, truncated (W,); action (W, A).
    """
    u, work, lane, totals, clock, _ = state
    obs, final_obs, finals, reward, terminated, truncated = result
    road, pressure, swing, seconds, control, length, samples = rules
    dx = road[0]
    v_max = road[1]
    ended = False
    square_rho = work[2, 0]
    square_v = work[3, 0]
    mass = work[4, 0]
    flow = work[5, 0]
    act(action, lane, totals, control, swing)
    for j in range(reward.size):
        reward[j] = 0.0
        terminated[j] = False
    for s in range(samples):
        if order is not None:
            advance(u, work, lane, totals, road, seconds, order, FLUX, FLUX, pressure)
        else:
            for j in range(reward.size):
                last = clock[0, j] * samples + s + 1 >= length * samples
                lane[AT.moves, j] = ZERO if last else ONE
            richtmyer(u, work, lane, totals, road, seconds)
        nodes(u, work, v_max, order, pressure)
        norms(work, lane, dx)
        for j in range(reward.size):
            r = -(math.sqrt(square_v[j]) + math.sqrt(square_rho[j]))
            broken = not r > -1e6  # NaN too
            r = BROKEN if broken else r
            terminated[j] = terminated[j] or broken
            reward[j] += r / samples
            totals[SUM.episode_return, j] += r
            totals[SUM.delay, j] += seconds * (mass[j] - flow[j] / v_max)
            totals[SUM.distance, j] += seconds * flow[j]
            totals[SUM.presence, j] += seconds * mass[j]
            totals[SUM.waiting, j] = lane[AT.waiting, j]
    for j in range(reward.size):
        clock[0, j] += 1
        truncated[j] = not terminated[j] and clock[0, j] >= length
        ended = ended or terminated[j] or truncated[j]
    if ended:
        observe(work, lane, final_obs)
        for j in range(reward.size):
            if terminated[j] or truncated[j]:
                for k in range(totals.shape[0]):
                    finals[k, j] = totals[k, j]
                finals[SUM.at_end, j] = stored(u, order, dx, j)
                finals[SUM.decisions, j] = clock[0, j]
                clock[1, j] += 1
                start_lane(state, road, order, pressure, seed, lane0, j)
        nodes(u, work, v_max, order, pressure)
    observe(work, lane, obs)


@fast
def start(state, obs, road, order, pressure, seed, lane0):
    """First states and observations of one block."""
    for j in range(obs.shape[0]):
        start_lane(state, road, order, pressure, seed, lane0, j)
    nodes(state[0], state[1], road[1], order, pressure)
    observe(state[1], state[2], obs)


# drivers: arrays with a block axis in front; on a GPU there is one block, a thread sees one lane
@nb.njit(parallel=True, cache=True, error_model="numpy")
def decide_cpu(state, result, rules, order, action, seed, lane0):
    u, work, lane, totals, clock, waves = state
    obs, final_obs, finals, reward, terminated, truncated = result
    # prange takes no tuple in a tuple
    road, pressure, swing, seconds, control, length, samples = rules
    for b in nb.prange(u.shape[0]):
        block = u[b], work[b], lane[b], totals[b], clock[b], waves[b]
        out = obs[b], final_obs[b], finals[b], reward[b], terminated[b], truncated[b]
        same = road, pressure, swing, seconds, control, length, samples
        decide(block, out, same, order, action[b], seed, lane0 + b * u.shape[3])


@nb.njit(cache=True, error_model="numpy")
def start_cpu(state, obs, road, order, pressure, seed, lane0):
    u, work, lane, totals, clock, waves = state
    for b in range(u.shape[0]):
        block = u[b], work[b], lane[b], totals[b], clock[b], waves[b]
        start(block, obs[b], road, order, pressure, seed, lane0 + b * u.shape[3])


@fast
def one_lane(state, j):
    """Lane j of a state with a block axis in front, as a block of one."""
    u, work, lane, totals, clock, waves = state
    k = j + 1
    return (
        u[0, :, :, j:k],
        work[0, :, :, j:k],
        lane[0, :, j:k],
        totals[0, :, j:k],
        clock[0, :, j:k],
        waves[0, :, j:k],
    )


@cache
def cuda_kernels() -> tuple:
    """(kernel of decide_cpu's arguments, kernel of start_cpu's), built once a process."""

    @cuda.jit
    def decide_cuda(state, result, rules, order, action, seed, lane0):
        obs, final_obs, finals, reward, terminated, truncated = result
        j = cuda.grid(1)
        k = j + 1
        if j < reward.shape[1]:
            out = (
                obs[0, j:k],
                final_obs[0, j:k],
                finals[0, :, j:k],
                reward[0, j:k],
                terminated[0, j:k],
                truncated[0, j:k],
            )
            block = one_lane(state, j)
            decide(block, out, rules, order, action[0, j:k], seed, lane0 + j)

    @cuda.jit
    def start_cuda(state, obs, road, order, pressure, seed, lane0):
        j = cuda.grid(1)
        if j < obs.shape[1]:
            lane = one_lane(state, j)
            start(lane, obs[0, j : j + 1], road, order, pressure, seed, lane0 + j)

    return decide_cuda, start_cuda


# ------------------------------------------------------------------------------------ environment
class FreewayVectorEnv(SimulatedLanes):
    """Lanes of the freeway. Same-step autoreset; truncation at `length` decisions.

    Observation (102,) float32: rho/rho* - 1, then v/v* - 1, at 51 points. Action (1,) or (2,) in
    [-1, 1]: flux (1 + .2 a) q* at the outlet or the inlet, or at both. Reward: see decide().
    cases="eval": lanes 0..49 are validation waves, the last 50 held-out ones, lane 50 is the
    published wave.
    """

    SAVED = "u", "lane", "totals", "finals", "clock", "waves"
    # as the kernels take them
    STATE = "u", "work", "lane", "totals", "clock", "waves"
    RESULT = "obs", "final", "finals", "reward", "terminated", "truncated"
    WORST = "mass_error", "max_cfl"
    obs_scale = 10.0
    traced = 50

    def __init__(
        self,
        num_envs: int = 1,
        control: str = "outlet",
        scheme: str = "richtmyer",
        decision_interval: float = 1.0,
        episode_seconds: float = 240.0,
        precision: str = "float32",
        pressure: str = "gap",
        pressure_scale: float | None = None,
        pressure_exponent: float | None = None,
        seed: int = 1,
        backend: str = "cpu",
        lane0: int = 0,
        cases: str | None = None,
    ):
        if scheme == "richtmyer" and pressure != "gap":
            raise ValueError(f"scheme richtmyer has the pressure gap, not {pressure}")
        num_envs = 101 if cases == "eval" else num_envs
        self.lane0 = lane0
        self.order = SCHEMES[scheme]
        self.control = CONTROLS.index(control)
        self.decision_interval = decision_interval
        self.samples = round(decision_interval / SAMPLE)
        self.length = round(episode_seconds / decision_interval)
        self.actions = 2 if control == "both" else 1
        observation = gym.spaces.Box(-np.inf, np.inf, (2 * NODES,), np.float32)
        action = gym.spaces.Box(-1.0, 1.0, (self.actions,), np.float32)
        super().__init__(num_envs, observation, action, backend, seed)
        real = np.dtype(precision).type
        road = DX, V_MAX, RHO_MAX, RELAX, RHO_FLOOR, CFL[scheme]
        self.road = tuple(real(x) for x in road)
        self.pressure = pressure_of(pressure, pressure_scale, pressure_exponent, real)
        self.rules = (
            self.road,
            self.pressure,
            real(SWING),
            real(SAMPLE),
            self.control,
            self.length,
            self.samples,
        )
        cells = NODES if scheme == "richtmyer" else NODES - 1
        width = num_envs if backend == "cuda" else min(BLOCK, num_envs)
        blocks = -(-num_envs // width)
        for name, shape, kind in (
            ("u", (2, cells, width), real),
            ("work", (6, NODES + 8, width), real),
            ("lane", (len(Lane._fields), width), real),
            ("waves", (3, width), np.float64),
            ("totals", (len(Totals._fields), width), np.float64),
            ("clock", (2, width), np.int64),
            ("finals", (len(Totals._fields), width), np.float64),
            ("action", (width, self.actions), real),
            ("obs", (width, 2 * NODES), np.float32),
            ("final", (width, 2 * NODES), np.float32),
            ("reward", (width,), np.float64),
            ("terminated", (width,), np.bool_),
            ("truncated", (width,), np.bool_),
        ):
            self.take(name, (blocks, *shape), kind)
        self.state = tuple(self.arrays[name] for name in self.STATE)
        self.result = tuple(self.arrays[name] for name in self.RESULT)
        self.splits = {}
        if cases == "eval":
            self.splits = {
                "validation": slice(0, 50),
                "published": slice(50, 51),
                "heldout": slice(51, 101),
            }
            waves = torch.zeros(3, num_envs, dtype=torch.float64)
            waves[:, self.traced] = torch.tensor(WAVE, dtype=torch.float64)
            self.spread("waves", waves)

    def rows(self, name: str) -> torch.Tensor:
        """(blocks, ..., width) of the kernels -> (..., num_envs)."""
        x = getattr(self, name).movedim(0, -2)
        x = x.reshape(*x.shape[:-2], -1)
        return x[..., : self.num_envs]

    def spread(self, name: str, values: torch.Tensor):
        """The way back; lanes that fill the last block up repeat the last one."""
        x = getattr(self, name)
        blocks, width = len(x), x.shape[-1]
        lanes = torch.arange(blocks * width, device=values.device)
        lanes = lanes.clamp(max=self.num_envs - 1)
        values = values[..., lanes]
        values = values.reshape(*values.shape[:-1], blocks, width)
        x.copy_(values.movedim(-2, 0))

    def per_lane(self, name: str) -> torch.Tensor:
        """(blocks, width, ...) -> (num_envs, ...), the same memory."""
        return getattr(self, name).flatten(0, 1)[: self.num_envs]

    def reset_lanes(self, first: bool, options: dict):
        """options {"waves": (3, N)}: rho*, amplitude, phase of the lanes from now on; rho* 0:
        drawn each episode. {"stagger": True}: first episodes of every length, so that every
        rollout holds every part of an episode; with all lanes in step PPO chases the part of the
        episode that it sees, and forgets the others.
        """
        if "waves" in options:
            waves = torch.as_tensor(options["waves"], dtype=torch.float64)
            self.spread("waves", waves)
        self.clock[:, 1] = 0 if first else self.clock[:, 1] + 1
        self.finals.zero_()
        obs = self.arrays["obs"]
        self.launch(1, self.state, obs, self.road, self.order, self.pressure)
        if options.get("stagger"):
            lanes = range(self.lane0, self.lane0 + self.num_envs)
            clock = self.rows("clock")
            shares = [uniform_nb(self.seed, i, 0, 3) for i in lanes]
            clock[0] = torch.tensor([int(share * self.length) for share in shares])
            self.spread("clock", clock)

    def launch(self, kernel: int, *arguments):
        """Kernel 0 (decide) or 1 (start) on all blocks."""
        function = (decide_cpu, start_cpu)[kernel]
        if self.backend == "cuda":
            function = cuda_kernels()[kernel][(self.num_envs + 127) // 128, 128]
        self.simulate(function, len(self.u), *arguments, self.seed, self.lane0)

    def step_lanes(self, action: torch.Tensor):
        self.per_lane("action").copy_(action)
        taken = self.arrays["action"]
        self.launch(0, self.state, self.result, self.rules, self.order, taken)
        names = "reward", "terminated", "truncated"
        return tuple(self.per_lane(name) for name in names)

    def observe(self):
        return self.per_lane("obs")

    def last_observations(self):
        return self.per_lane("final")

    def stats(self, name: str = "totals") -> dict[str, torch.Tensor]:
        """mass_error of ended episodes only."""
        t = Totals(*self.rows(name))
        missing = t.at_end + t.left - t.at_start - t.entered - t.added
        return {
            "episode_return": t.episode_return,
            "delay_veh_s": t.delay,
            "throughput_veh": t.left,
            "mean_speed": t.distance / t.presence,
            "switches": t.switches,
            "mass_error": missing.abs() / t.at_start,
            "max_cfl": t.max_cfl,
            "floor_veh": t.clamped,
            "queue_veh": t.waiting,
            "episode_length": t.decisions,
        }

    def seconds_of_inflow(self) -> float:
        """What entered since the start of the episode, in seconds of the flux that the actions
        asked for."""
        totals = Totals(*self.rows("totals"))
        lane = Lane(*self.rows("lane"))
        return float((totals.entered / lane.q_in).mean())

    def gauges(self) -> dict[str, torch.Tensor]:
        """Density and speed at the 51 points of every lane, (N, 51)."""
        star = self.rows("lane")[:2, :, None]  # rho* and v*
        relative = self.observe().reshape(-1, 2, NODES).movedim(1, 0)
        rho, v = star * (1 + relative)
        return {"density, veh/m": rho, "speed, m/s": v}

    def trace(self) -> dict[str, float]:
        """The traced lane's densities and speeds now."""
        row = {}
        for name, x in zip(("rho", "v"), self.gauges().values()):
            row |= {f"{name}_{i}": value for i, value in enumerate(x[self.traced].tolist())}
        return row

    def state_dict(self) -> dict:
        """Lanes are saved one by one, not in the blocks of a kernel: for any device."""
        obs = self.observe().cpu().clone()
        return super().state_dict() | {"obs": obs}

    def load_state_dict(self, state: dict):
        super().load_state_dict(state)
        self.observe().copy_(state["obs"])


# gymnasium.make_vec("cleanrl_crypto/Freeway-v0", num_envs=8, scheme="muscl")
register("cleanrl_crypto/Freeway-v0", FreewayVectorEnv)


# --------------------------------------------------------------------------------------- networks
def layer(inputs: int, outputs: int, gain: float = 2**0.5) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


def mlp(inputs: int, hidden: int, outputs: int, gain: float) -> nn.Sequential:
    return nn.Sequential(
        layer(inputs, hidden),
        nn.SiLU(),
        layer(hidden, hidden),
        nn.SiLU(),
        layer(hidden, outputs, gain),
    )


class Agent(nn.Module):
    """Actor and critic. Observations are multiplied by obs_scale and clipped at 10."""

    def __init__(
        self,
        observations: int,
        actions: int,
        hidden: int,
        log_std_init: float,
        obs_scale: float,
    ):
        super().__init__()
        self.obs_scale = obs_scale
        self.actor = mlp(observations, hidden, actions, 0.01)
        self.critic = mlp(observations, hidden, 1, 1.0)
        self.log_std = nn.Parameter(torch.full((actions,), float(log_std_init)))

    def normalise(self, obs):  # (B, observations)
        return (obs * self.obs_scale).clamp(-10, 10)

    def value(self, x):  # of normalised observations (B, observations) -> (B,)
        return self.critic(x)[:, 0]

    def act(self, x, noise=None):
        """Greedy action (B, A) of normalised observations, or a sample: noise (B, A) is standard
        normal."""
        mean = self.actor(x)
        return mean if noise is None else mean + self.log_std.exp() * noise

    def log_prob_entropy(self, x, action):
        """Of actions (B, A) in normalised observations: (B,), (B,)."""
        entropy = gaussian_entropy(self.log_std).expand(len(x))
        return gaussian_log_prob(self.actor(x), self.log_std, action), entropy

    def forward(self, obs, action):
        """What a minibatch's losses need: log-probability, entropy and value, each (B,)."""
        x = self.normalise(obs)
        return *self.log_prob_entropy(x, action), self.value(x)


# -------------------------------------------------------------------------------------- algorithm
def gaussian_log_prob(mean, log_std, action):
    """Diagonal Gaussian: mean, action (B, A), log_std (A,) -> (B,). The environment clips, the
    density does not."""
    z = (action - mean) * (-log_std).exp()
    log_density = -0.5 * z * z - log_std - 0.5 * math.log(2 * math.pi)
    return log_density.sum(-1)


def gaussian_entropy(log_std):
    entropy = log_std + 0.5 + 0.5 * math.log(2 * math.pi)
    return entropy.sum(-1)


def gae(reward, value, next_value, terminated, ended, gamma: float, lam: float):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16). All (T, N), the flags bool.

    next_value: of the state that really followed, which for a truncated episode is the final one,
    not the reset one: a time limit bootstraps. terminated: no future, whatever next_value is (a
    broken lane's is NaN); ended: terminated or truncated. Returns advantages, returns.
    """
    zero = torch.zeros_like(reward[0])
    advantage = torch.empty_like(reward)
    running = zero
    for t in reversed(range(len(reward))):
        future = torch.where(terminated[t], zero, next_value[t])
        delta = reward[t] + gamma * future - value[t]
        running = delta + gamma * lam * torch.where(ended[t], zero, running)
        advantage[t] = running
    return advantage, advantage + value


def clipped_surrogate(ratio, advantage, clip: float):
    """PPO's policy loss of every row (Schulman et al. 2017, eq. 7), with its sign for descent.
    All (B,)."""
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return torch.max(-advantage * ratio, -advantage * clipped)


def reduce_sum(tensor):
    """Summed over the processes of torchrun, in place; one process: as it is."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def normalised(advantage, size: int):
    """Advantages of a minibatch of `size` rows, of which every process of torchrun holds a
    share."""
    mean = reduce_sum(advantage.sum()) / size
    advantage = advantage - mean
    square = reduce_sum((advantage**2).sum())
    deviation = (square / (size - 1)).sqrt()
    return advantage / (deviation + 1e-8)


class Schedule:
    """The learning rate: linearly to 0 at --total-timesteps, or at what --timeout will allow at
    this pace."""

    def __init__(self, run: Run):
        self.run = run
        self.rollouts = 0
        self.end = run.args.total_timesteps
        self.latest = run.args.learning_rate

    def learning_rate(self, loop) -> float:
        args = self.run.args
        now = time.monotonic()
        self.rollouts += 1
        if self.rollouts == 2:  # the first ones compile and warm up
            self.began = now
            self.first_step = loop.global_step
            self.run.charts(loop)
        if args.timeout and self.rollouts > 2 and self.rollouts % 8 == 0:
            pace = (loop.global_step - self.first_step) / (now - self.began)
            left = self.run.guard.remaining() - self.run.reserve()
            end = loop.global_step + pace * max(left, 0.0)
            # every process has its own clock, the learning rate is one
            end = end if self.run.rank == 0 else 0.0
            end = reduce_sum(torch.tensor(end, device=self.run.device))
            self.end = min(args.total_timesteps, int(end))
        share = 0.0
        if args.anneal_lr:
            share = loop.global_step / max(self.end, 1)
        self.latest = args.learning_rate * max(0.0, 1 - share)
        return self.latest


# ------------------------------------------------------------------------- controllers to compare
class Constant:
    """Flux q* at the controlled ends: the road that nobody controls."""

    def __init__(self, envs):
        self.action = torch.zeros(envs.num_envs, envs.actions, device=envs.torch_device)

    def __call__(self, obs):
        return self.action


class LinearController:
    """PI controller of the outlet's density error (the inlet's where that is the only action), P
    of the inlet's.

    Gains are numbers or (N,) tensors.
    """

    def __init__(self, envs, kp, ki=0.0, k_in=0.0):
        self.envs = envs
        self.gains = kp, ki, k_in
        self.total = torch.zeros(
            envs.num_envs, dtype=torch.float64, device=envs.torch_device
        )

    def __call__(self, obs):
        kp, ki, k_in = self.gains
        outlet = obs[:, NODES - 1].double()
        inlet = obs[:, 0].double()
        error = inlet if self.envs.control == 1 else outlet  # the only end there is
        free = kp * error + ki * self.total
        # anti-windup: the integral rests while the error would push a saturated action further
        grows = (free.abs() < 1) | (free * error < 0)
        grown = torch.where(grows, error * self.envs.decision_interval, 0.0)
        self.total = self.total + grown
        first = (kp * error + ki * self.total).clamp(-1, 1)
        second = (k_in * inlet).clamp(-1, 1)
        return torch.stack([first, second][: self.envs.actions], 1)


class Backstepping:
    """Yu and Krstic (2019): full-state feedback for the flux at the outlet, kernels of the
    linearised system."""

    def __init__(self, envs):
        x = torch.arange(NODES, device=envs.torch_device, dtype=torch.float64) * DX
        lane = Lane(*envs.rows("lane").double()[..., None])  # (N, 1)
        rho_star, v_star = lane.rho_star, lane.v_star
        slope = V_MAX * rho_star / RHO_MAX  # p*
        behind = v_star - slope  # lambda_2
        kernel = torch.exp(-x / (RELAX * v_star)) / (slope * RELAX)
        growth = torch.exp(x / (RELAX * v_star))
        share = behind / v_star
        self.c_v = -kernel + share * kernel * growth
        self.c_q = (1 - share) * kernel * growth
        self.lane = lane
        self.x = x
        self.actions = envs.actions

    def __call__(self, obs):
        rho_star, v_star, q_star, *_ = self.lane
        rho = rho_star * (1 + obs[:, :NODES])
        v = v_star * (1 + obs[:, NODES:])
        by_speed = torch.trapezoid(self.c_v * (v - v_star), self.x)
        change = rho_star[:, 0] * by_speed
        change += torch.trapezoid(self.c_q * (rho * v - q_star), self.x)
        action = torch.zeros(
            len(obs), self.actions, dtype=torch.float64, device=obs.device
        )
        share = change / (SWING * q_star[:, 0])
        action[:, 0] = share.clamp(-1, 1)
        return action


class GainSearch:
    """Grid search of a LinearController's gains on 16 training waves, all lanes of `envs` at
    once, for at most `seconds`."""

    def __init__(self, envs, seconds: float):
        self.envs = envs
        self.complete = True
        self.deadline = time.monotonic() + seconds
        self.n = min(16, envs.num_envs)
        self.seats = max(1, envs.num_envs // self.n)  # gains tried at once
        draw = np.random.default_rng(envs.seed).random((3, self.n))
        low, high = np.array(TRAIN_WAVES).T[..., None]
        waves = low + draw * (high - low)
        waves = np.tile(waves, envs.num_envs // self.n + 1)
        self.waves = waves[:, : envs.num_envs]

    def best(self, grid: list[tuple]) -> tuple:
        """grid of (kp, ki, k_in) -> its row of the highest return; the rows before the time
        was up."""
        envs = self.envs
        scores = []
        rows = torch.tensor(grid, dtype=torch.float64)
        for first in range(0, len(grid), self.seats):
            if scores and time.monotonic() > self.deadline:
                self.complete = False
                break
            lanes = torch.arange(envs.num_envs) // self.n
            of_lane = (first + lanes).clamp(max=len(grid) - 1)
            envs.reset(options={"waves": self.waves})
            gains = rows[of_lane].T.to(envs.torch_device)
            act = LinearController(envs, *gains)
            for _ in range(envs.length):
                envs.step_lanes(act(envs.observe()))
            returns = envs.stats("finals")["episode_return"]
            returns = returns[: self.seats * self.n].reshape(-1, self.n)
            scores += returns.mean(1).tolist()
        return grid[int(np.argmax(scores[: len(grid)]))]

    def gains(self) -> dict[str, tuple]:
        """Of the P and of the PI controller."""
        both = self.envs.actions == 2
        inlet = np.arange(-24, 25, 8.0) if both else [0.0]
        outlet = np.arange(-14, 15, 2.0)
        kp, _, k_in = self.best([(p, 0.0, e) for p in outlet for e in inlet])
        around = np.arange(-1.5, 2, 0.5)
        inlet = 4 * around if both else [0.0]
        p = self.best([(kp + p, 0.0, k_in + e) for p in around for e in inlet])
        kp, _, k_in = p
        integral = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05]
        integral = [*(-i for i in integral), 0.0, *integral]
        shares = 0.7, 0.8, 0.9, 1.0, 1.1
        pi = self.best([(kp * share, i, k_in) for share in shares for i in integral])
        random = np.zeros((3, self.envs.num_envs))
        self.envs.reset(options={"waves": random})
        return {"p": tuple(map(float, p)), "pi": tuple(map(float, pi))}


def make_controllers(envs, seconds: float) -> dict:
    """name -> make(envs) -> act(obs); tuned on training waves with envs, the training
    environment."""
    search = GainSearch(envs, seconds)
    gains = search.gains()
    cut = "" if search.complete else " (cut short: no more time for it)"
    makers = {"constant": Constant}
    for name, values in gains.items():
        print(f"baseline {name}, tuned on training waves: kp, ki, k_in {values}{cut}")
        kp, ki, k_in = values
        makers[name] = partial(LinearController, kp=kp, ki=ki, k_in=k_in)
    if envs.control != 1:
        makers["backstepping"] = Backstepping
    return makers


# ------------------------------------------------------------------------ evaluation, diagnostics
class Greedy:
    """act(obs): the agent's deterministic policy; `states` keeps what it saw, for diagnose()."""

    def __init__(self, agent: Agent):
        self.agent, self.states = agent, []

    @torch.no_grad()
    def __call__(self, obs):
        device = self.agent.log_std.device
        obs = torch.as_tensor(obs, dtype=torch.float32, device=device)
        self.states.append(obs.clone())
        return self.agent.act(self.agent.normalise(obs)).clamp(-1, 1)


def check_env(envs):
    """Real checks of the training environment, which is used and then handed on. Raises
    CheckFailed."""
    still = torch.zeros(envs.num_envs, envs.actions, device=envs.torch_device)
    envs.reset(seed=1)
    first = envs.observe().clone()
    state = envs.state_dict()
    envs.step_lanes(still + 0.5)
    other = envs.observe().clone()
    envs.load_state_dict(state)
    envs.step_lanes(still)
    now = envs.observe()
    gap = float((now - other).abs().max())
    moved = float((now - first).abs().max())
    inflow = envs.seconds_of_inflow()
    interval = envs.decision_interval
    rewards = []
    early = 0
    densest = 0.0
    slowest = V_MAX
    for _ in range(envs.length - 1):
        reward, terminated, truncated = envs.step_lanes(still)
        rewards += reward.tolist()
        star = Lane(*envs.rows("lane")[..., None])
        obs = envs.observe()
        rho = star.rho_star * (1 + obs[:, :NODES])
        v = star.v_star * (1 + obs[:, NODES:])
        densest = max(densest, float(rho.max()))
        slowest = min(slowest, float(v.min()))
        early += int((terminated | truncated).sum())
    ended = int(truncated.sum())
    decisions = envs.length
    values = len(np.unique(np.round(rewards, 9)))
    limit = 0.5 if envs.order == SECOND else 1.0
    stats = envs.stats("finals")
    error = float(stats["mass_error"].max())
    courant = float(stats["max_cfl"].max())
    steps = float(Totals(*envs.rows("finals")).steps.max())
    # sums round at every step
    rounding = torch.finfo(envs.u.dtype).eps
    bound = 100 * rounding * max(1.0, math.sqrt(steps / 1000))
    for good, expected, found in (
        (gap > 1e-6, "two actions to give two states", f"observations {gap} apart"),
        (
            moved > 1e-6,
            "a constant action to change the observation",
            f"a change of {moved}",
        ),
        (
            abs(inflow - interval) < 0.2 * interval,
            f"{interval} s of inflow in a decision of --decision-interval",
            f"{inflow:.3f} s",
        ),
        (
            early == ended,
            f"no episode to end before decision {decisions}",
            f"{early - ended} that did",
        ),
        (
            ended == envs.num_envs,
            f"truncation of every episode at decision {decisions}",
            f"{ended} of {envs.num_envs}",
        ),
        (
            values > decisions // 2,
            "rewards of many values",
            f"{values} in {decisions} decisions",
        ),
        (
            error <= bound,
            f"vehicles to be conserved to {bound}",
            f"a relative error of {error:.2e}",
        ),
        (
            courant <= limit * (1 + 1e-6),
            f"Courant numbers up to {limit}",
            f"{courant:.3f}",
        ),
        (
            densest <= RHO_MAX * 1.001,
            f"densities up to {RHO_MAX} veh/m",
            f"{densest:.4f}",
        ),
        (slowest >= -1e-3, "speeds from 0 m/s", f"{slowest:.3f}"),
        (float(stats["throughput_veh"].min()) > 0, "vehicles to leave", "none"),
    ):
        if not good:
            raise CheckFailed(f"sanity: expected {expected}, found {found}")


@torch.no_grad()
def evaluate(make, envs, seconds: float = math.inf, trace: bool = False) -> tuple:
    """One episode of every lane of an evaluation environment, under make(envs) -> act(obs) ->
    actions.

    Returns {split: {statistic: mean over its lanes}}, the rows of the traced lane, and whether
    the time was up first: then the statistics are those of the episodes so far.
    """
    began = time.monotonic()
    rows = []
    cut = False
    envs.reset(seed=EVAL_SEED)
    act = make(envs)
    for k in range(envs.length):
        action = act(envs.observe())
        row = {"time_s": k * envs.decision_interval} | envs.trace() if trace else {}
        reward, *_ = envs.step_lanes(action)
        if trace:
            numbers = enumerate(action[envs.traced].tolist())
            row |= {f"action_{i}": a for i, a in numbers}
            rows.append(row | {"reward": float(reward[envs.traced])})
        cut = time.monotonic() - began > seconds and k + 1 < envs.length
        if cut:
            break
    stats = envs.latest()
    result = {}
    if cut:  # what is counted at an episode's end alone
        stats["mass_error"].fill_(math.nan)
        stats["episode_length"].fill_(k + 1)
    for split, lanes in envs.splits.items():
        std = stats["episode_return"][lanes].std(correction=0)
        result[split] = envs.summary(stats, lanes) | {"std": float(std)}
    return result, rows, cut


@torch.no_grad()
def diagnose(agent: Agent, obs) -> dict[str, float]:
    """What the policy does on states obs (B, observations): state_dependence, saturation,
    entropy, ..."""
    x = agent.normalise(obs)
    action = agent.act(x).double()
    return {
        "state_dependence": float(action.clamp(-1, 1).std(0).mean()),
        "action_mean": float(action.mean()),
        "entropy": float(gaussian_entropy(agent.log_std)),
        "v_mean": float(agent.value(x).double().mean()),
        "saturation": float((action.abs() > 1).double().mean()),
        "log_std_mean": float(agent.log_std.mean()),
    }


def verdict(
    audit: dict, result: dict, baselines: dict, updates: int, partial: bool = False
) -> tuple[str, list[str]]:
    """untrained, undecided, collapsed, constant_is_right, undertrained or healthy, and why.

    result, baselines: of the split that chooses; partial: time cut one of them short.
    """
    if updates == 0:
        return "untrained", ["no gradient update was made"]
    score = result["episode_return"]
    dependence = audit["state_dependence"]
    numbers = f"return {score:.2f}, state_dependence {dependence:.3f}"
    if not baselines:
        return "undecided", [f"{numbers}: no baseline to judge it by"]
    if partial:
        why = "time cut an evaluation short: episodes of unequal length are not compared"
        return "undecided", [why, numbers]
    returns = {name: metrics["episode_return"] for name, metrics in baselines.items()}
    name, best = max(returns.items(), key=lambda item: item[1])
    constant = returns["constant"]
    margin = 0.01 * abs(constant)
    beside = f"the best baseline, {name}, returns {best:.2f}, constant {constant:.2f}"
    if not dependence >= 0.01:
        word = "constant_is_right" if best <= constant + margin else "collapsed"
        return word, [f"one action in every state: {numbers}", beside]
    if not score > constant + margin:
        return "collapsed", [f"no better than doing nothing: {numbers}", beside]
    if best > score:
        why = f"the tuned controller {name} beats the agent: {numbers}"
        return "undertrained", [why, beside]
    return "healthy", [f"the action answers to the state: {numbers}", beside]


def load_policy(checkpoint: str | Path, device: str = "cpu"):
    """policy(obs) -> actions from a checkpoint file alone: the deterministic policy that
    evaluation reports.

    obs (B, observations) NumPy, the environment's own -> (B, A) float32 in [-1, 1]. Raises
    CheckpointError.
    """
    state = load_run(checkpoint, Path(__file__), SCHEMA, device)
    agent = Agent(**state["config"]).to(device).eval().requires_grad_(False)
    agent.load_state_dict(state["agent"])
    return lambda obs: Greedy(agent)(obs).cpu().numpy()


# ------------------------------------------------------------------------------------------- main
COLUMNS = (
    "episode_return",
    "std",
    "delay_veh_s",
    "throughput_veh",
    "mean_speed",
    "switches",
)
LOSSES = "policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "grad_norm"


@dataclass
class Loop:
    """What the loop counts; saved with the run."""

    global_step: int = 0
    updates: int = 0
    iteration: int = 0
    evaluated: int = -1  # global_step of the last evaluation


def make_envs(
    args: Args,
    backend: str,
    num_envs: int = 1,
    lane0: int = 0,
    cases: str | None = None,
):
    """The training environment, or with cases="eval" the evaluation one."""
    envs = FreewayVectorEnv(
        num_envs,
        args.control,
        args.scheme,
        args.decision_interval,
        args.episode_seconds,
        pressure=args.pressure,
        pressure_scale=args.pressure_scale,
        pressure_exponent=args.pressure_exponent,
        seed=args.seed,
        backend=backend,
        lane0=lane0,
        cases=cases,
    )
    envs.timed = args.sim_timeout is not None
    return envs


def describe(args: Args) -> dict:
    """What the run is about, for its checkpoints: the road and what an evaluation draws."""
    road = {
        "length_m": LENGTH,
        "v_max": V_MAX,
        "rho_max": RHO_MAX,
        "relax_s": RELAX,
        "swing": SWING,
        "wave": WAVE,
        "train_waves": TRAIN_WAVES,
        "eval_seed": EVAL_SEED,
    }
    return {
        "spec": "freeway",
        "road": road,
        "control": args.control,
        "scheme": args.scheme,
    }


def agent_config(run: Run, envs) -> dict:
    """Plain values that rebuild the agent from a checkpoint alone. Raises UsageError if the
    checkpoint's differ."""
    args = run.args
    config = {
        "observations": envs.single_observation_space.shape[0],
        "hidden": args.hidden,
        "actions": envs.single_action_space.shape[0],
        "log_std_init": args.log_std_init,
        "obs_scale": envs.obs_scale,
    }
    run.check_config(config)
    return config


def check_road(run: Run, envs):
    """Compile, then check the training environment."""
    envs.reset(seed=run.args.seed)
    still = torch.zeros(envs.num_envs, envs.actions)
    envs.step_lanes(still)
    began = time.monotonic()
    envs.step_lanes(still)
    envs.longest_call = 0.0  # that was the compiler's
    seconds = (time.monotonic() - began) * envs.length
    if seconds > run.eval_limit(0.2):
        print(f"sanity: no time for its checks, which take {seconds:.0f} s")
        return
    check_env(envs)
    print(f"sanity: the environment passed its checks in {time.monotonic() - began:.1f} s")


def judge_baselines(run: Run, envs, eval_envs) -> tuple[dict, dict, bool]:
    """Controllers tuned within a tenth of the time, and their results: {name: make}, {name:
    result}, cut short."""
    run.phase("baselines")
    envs.reset(seed=run.args.seed)
    makers = make_controllers(envs, run.eval_limit(0.1))
    results = {}
    short = False
    for name, make in makers.items():
        results[name], _, cut = evaluate(make, eval_envs, run.eval_limit(0.05))
        short |= cut
    return makers, results, short


def validate(run: Run, loop: Loop, agent: Agent, eval_envs) -> dict[str, float]:
    """Evaluate, keep the best agent on the validation waves; returns what to log."""
    policy = Greedy(agent)
    result, _, cut = evaluate(lambda envs: policy, eval_envs, run.eval_limit(0.5))
    states = torch.cat(policy.states)
    every = max(1, len(states) // 4096)
    audit = diagnose(agent, states[::every])
    record = {"value/v_mean": audit.pop("v_mean")}
    record |= {f"policy/{k}": v for k, v in audit.items()}
    for split, metrics in result.items():
        record |= {f"eval/{split}/{k}": v for k, v in metrics.items()}
    loop.evaluated = loop.global_step
    score = next(iter(result.values()))["episode_return"]
    if cut:
        print("cut short by --eval-timeout: not compared with other evaluations")
    else:
        run.keep_best(score, loop)
    return record


def final_results(
    run: Run, loop: Loop, agent: Agent, eval_envs, makers, baselines, short
):
    """The best agent's results beside the baselines', its diagnostics; writes the traces."""
    policy = Greedy(agent)
    limit = run.eval_limit(0.4)
    result, rows, cut = evaluate(lambda envs: policy, eval_envs, limit, trace=True)
    traces = {"freeway": rows}
    if "constant" in makers:  # the road that nobody controls, for the picture
        limit = run.eval_limit(0.4)
        _, rows, _ = evaluate(Constant, eval_envs, limit, trace=True)
        traces["freeway_constant"] = rows
    write_traces(run, traces)
    results = {}
    for split, metrics in result.items():
        others = {name: baseline[split] for name, baseline in baselines.items()}
        results[split] = {
            "agent": metrics,
            "baselines": others,
            "partial": cut or short,
        }
    audit = diagnose(agent, torch.cat(policy.states))
    chosen = next(iter(results.values()))
    metrics, rivals = chosen["agent"], chosen["baselines"]
    judged = verdict(audit, metrics, rivals, loop.updates, cut or short)
    audit["verdict"], audit["reasons"] = judged
    return results, audit


def write_traces(run: Run, traces: dict[str, list[dict]]):
    import pandas as pd

    (run.dir / "traces").mkdir(exist_ok=True)
    for name, rows in traces.items():
        pd.DataFrame(rows).to_parquet(run.dir / "traces" / f"{name}.parquet")


@experiment
def main(argv: list[str] | None = None, envs=None, eval_envs=None) -> dict:
    """Train (or --eval-only), evaluate, report; returns what summary.json holds. Tests hand
    environments over."""
    run = Run(Args, argv, SCHEMA, evaluations=3.0)
    args, device, steps = run.args, run.device, run.args.num_steps
    uneven = f"--num-envs {args.num_envs}: not a multiple of {run.world} processes"
    refuse((args.num_envs % run.world, uneven))
    lanes = args.num_envs // run.world
    lane0 = run.rank * lanes
    on_road = envs is None
    envs = run.closing(envs or make_envs(args, run.backend, lanes, lane0))
    eval_envs = run.closing(eval_envs or make_envs(args, run.backend, cases="eval"))
    config = agent_config(run, envs)
    run.open("freeway", describe(args) if on_road else {"spec": type(envs).__name__})
    makers, baselines, short = {}, {}, False
    if on_road:
        check_road(run, envs)
    if on_road and run.rank == 0:
        makers, baselines, short = judge_baselines(run, envs, eval_envs)
    run.phase("setup")
    agent = Agent(**config).to(device)
    weights, lr = list(agent.parameters()), args.learning_rate
    optimizer = torch.optim.Adam(weights, lr, eps=1e-5, fused=True)
    schedule = Schedule(run)
    draws = torch.Generator(device).manual_seed(args.seed)
    mode = "reduce-overhead" if args.cudagraphs else None
    forward = torch.compile(agent, mode=mode) if args.compile else agent
    width = config["actions"]
    size = steps * args.num_envs // args.num_minibatches
    obs = torch.zeros(steps + 1, lanes, config["observations"], device=device)
    last_obs = torch.zeros_like(obs[1:])  # of the episodes that end in a step
    actions = torch.zeros(steps, lanes, width, device=device)
    log_probs, rewards = torch.zeros(2, steps, lanes, device=device)
    terminations, ends = torch.zeros(2, steps, lanes, dtype=torch.bool, device=device)
    envs.reset(seed=args.seed, options={"stagger": True})
    policy = dict(agent=agent)
    parts = dict(optimizer=optimizer, envs=envs, draws=draws)
    loop = run.restore(Loop(), config, policy, **parts)
    total = 0 if args.eval_only else args.total_timesteps

    while loop.global_step < total and not run.out_of_time():
        # ALGO LOGIC: action
        run.phase("rollout")
        shape = steps, args.num_envs, width
        noise = torch.randn(shape, generator=draws, device=device)
        noise = noise[:, lane0 : lane0 + lanes]  # the same for a lane in any process
        for t in range(steps):
            with torch.no_grad():
                obs[t] = envs.observe()
                x = agent.normalise(obs[t])
                actions[t] = agent.act(x, noise[t])
                log_probs[t], _ = agent.log_prob_entropy(x, actions[t])
            rewards[t], terminations[t], truncated = envs.step_lanes(actions[t])
            ends[t] = truncated.to(device) | terminations[t]
            last_obs[t] = envs.last_observations()
        obs[steps] = envs.observe()
        loop.global_step += steps * args.num_envs
        loop.iteration += 1
        if args.sim_timeout and envs.longest_call > args.sim_timeout:
            print(f"--sim-timeout: a simulation call took {envs.longest_call:.2f} s")
            run.guard.expired = True

        # ALGO LOGIC: training
        run.phase("learn")
        with torch.no_grad():  # a time limit bootstraps from the state that it cut off
            values = agent.value(agent.normalise(obs.flatten(0, 1)))
            values = values.reshape(steps + 1, lanes)
            next_values = values[1:].clone()
            next_values[ends] = agent.value(agent.normalise(last_obs[ends]))
            advantages, returns = gae(
                rewards,
                values[:-1],
                next_values,
                terminations,
                ends,
                args.gamma,
                args.gae_lambda,
            )
            missed = returns - values[:-1]
            explained = 1 - missed.var() / returns.var()
        optimizer.param_groups[0]["lr"] = schedule.learning_rate(loop)
        rows = obs[:-1], actions, log_probs, advantages, returns
        rows = [column.flatten(0, 1) for column in rows]  # (steps x lanes, ...)
        losses, stopped = [], False
        for _ in range(args.update_epochs):
            order = torch.randperm(steps * args.num_envs, generator=draws, device=device)
            for index in order.split(size):
                if run.world > 1:  # every process takes its lanes' share of it
                    t = index // args.num_envs
                    lane = index % args.num_envs - lane0
                    index = (t * lanes + lane)[(lane >= 0) & (lane < lanes)]
                batch = (column[index] for column in rows)
                x, action, old_log_prob, advantage, target = batch
                if args.cudagraphs:
                    torch.compiler.cudagraph_mark_step_begin()
                log_prob, entropy, value = (y.clone() for y in forward(x, action))
                log_ratio = log_prob - old_log_prob
                ratio = log_ratio.exp()
                advantage = normalised(advantage, size)

                surrogate = clipped_surrogate(ratio, advantage, args.clip_coef)
                policy_loss = surrogate.sum() / size
                value_loss = 0.5 * ((value - target) ** 2).sum() / size
                entropy = entropy.sum() / size
                loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss

                optimizer.zero_grad()
                loss.backward()
                for p in weights:
                    if p.grad is not None:
                        reduce_sum(p.grad)
                grad_norm = nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
                optimizer.step()
                loop.updates += 1
                with torch.no_grad():
                    kl = (ratio - 1 - log_ratio).sum() / size  # Schulman's k3
                    beyond = (ratio - 1).abs() > args.clip_coef
                    clipped = beyond.sum() / size
                    stats = policy_loss, value_loss, entropy, kl, clipped
                    stats = reduce_sum(torch.stack(stats))
                    losses.append(torch.cat([stats, grad_norm[None]]))
                stopped = bool(args.target_kl) and float(stats[3]) > args.target_kl
                if stopped:
                    break
            if stopped:
                break

        # evaluate, log, keep the best: here alone something crosses to the host
        if run.every(args.eval_interval, loop.global_step):
            means = torch.stack(losses).mean(0).tolist()
            record = {f"losses/{name}": mean for name, mean in zip(LOSSES, means)}
            if not all(map(math.isfinite, means)):
                why = f"the loss is not finite after {loop.updates} updates: lower --learning-rate"
                raise CheckFailed(why)
            record["losses/explained_variance"] = explained
            record["charts/learning_rate"] = schedule.latest
            run.phase("eval")
            if run.rank == 0:
                record |= run.charts(loop, loop.updates * size)
                record |= envs.episode_record()
                run.log(record | validate(run, loop, agent, eval_envs), loop)
        run.checkpoint(loop)

    run.phase("eval")
    if run.rank == 0 and not args.eval_only and loop.evaluated < loop.global_step:
        record = run.charts(loop)
        run.log(record | validate(run, loop, agent, eval_envs), loop)
    run.use_best(loop)
    if run.rank:
        return {"exit_code": run.guard.exit_code}
    others = makers, baselines, short
    results, audit = final_results(run, loop, agent, eval_envs, *others)
    longest = max(envs.longest_call, eval_envs.longest_call)
    more = {
        "selected_by": next(iter(results)),
        "samples_per_transition": loop.updates * size / max(loop.global_step, 1),
        "device": {"longest_simulation_call_s": longest},
    }
    return run.finish(loop, results, audit, COLUMNS, **more)


if __name__ == "__main__":
    exit_with(main)
