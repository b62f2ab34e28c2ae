r"""PPO that controls Aw-Rascle-Zhang traffic, simulated on CPU or CUDA by one set of kernels.

On a laptop: 500 m of freeway, stop-and-go damped by the flux at the outlet, a minute and a half on one core,
episode_return on the published wave -88 to -90 (constant flux -382, backstepping -262, tuned PI -108):

    python cleanrl_crypto/ppo_arz_gpu.py --timeout 90

Five signalised junctions, two and a half minutes or twenty, 7 to 9 % less delay than the best tuned controller; or your
own network (a CSV of segments, a JSON of signals and demand beside it):

    python cleanrl_crypto/ppo_arz_gpu.py --scenario corridor --timeout 150

Control at both ends, and finite volumes in place of the published scheme:

    python cleanrl_crypto/ppo_arz_gpu.py --control both --timeout 240
    python cleanrl_crypto/ppo_arz_gpu.py --scheme muscl --timeout 180

GPU, Kaggle: a GPU is used where a probe shows that it works, by the kernels (finite volumes) too.

    python cleanrl_crypto/ppo_arz_gpu.py --scheme muscl --num-envs 16384 --total-timesteps 100000000 \
        --run-dir /kaggle/working/run --compile --cudagraphs --timeout 3600

Several processes: each simulates its share of the lanes, gradients are averaged, rank 0 writes.

    torchrun --nproc-per-node 2 cleanrl_crypto/ppo_arz_gpu.py --timeout 180

Resume after whatever ended the run (the same command starts and continues it), or evaluate a checkpoint:

    python cleanrl_crypto/ppo_arz_gpu.py --run-dir runs/road --resume auto
    python cleanrl_crypto/ppo_arz_gpu.py --eval-only --checkpoint runs/road/checkpoints/best.pt

Use the agent in another program, from its checkpoint alone:

    from cleanrl_crypto.ppo_arz_gpu import load_policy
    policy = load_policy("runs/road/checkpoints/best.pt")
    action = policy(obs)  # (B, 102): rho/rho* - 1, then v/v* - 1, at 51 points -> (B, 1) in [-1, 1]

The same agent on any Gymnasium environment, as a check of the algorithm:

    python cleanrl_crypto/ppo_arz_gpu.py --env-id CartPole-v1 --num-envs 8 --num-steps 128 --num-minibatches 4 \
        --total-timesteps 200000 --learning-rate 1e-3 --gamma 0.99 --eval-interval 20000

Every flag: --help. Every metric, and what to do when it is off: docs/ppo_arz_gpu.md
"""
import hashlib
import json
import math
import os
import random
import shlex
import sys
import time
import types
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gymnasium as gym
import numba as nb
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn as nn
from gymnasium.vector import AutoresetMode
from numba import cuda
from torch.utils.tensorboard import SummaryWriter

try:
    from common.cli import UsageError, check, flag, parse_args
    from common.gpu_pool import pool, probe_cuda
    from common.networks import CELL, CELL_LENGTH, JAM, V_C, Network, NetworkError, find_network
    from common.timeout_guard import (
        CheckpointError,
        TimeoutGuard,
        find_last,
        load_checkpoint,
        rotate,
        save_atomic,
        write_json_atomic,
    )
except ModuleNotFoundError as e:
    if e.name != "common":
        raise
    sys.exit(f"{Path(__file__).name} needs the folder common/: copy it to {Path(__file__).resolve().parents[1]}")

# literals of the kernels: a float32 times these stays float32, a float64 stays float64 (Python's 0.5 would widen)
ZERO, HALF, ONE, TWO = np.float32(0.0), np.float32(0.5), np.float32(1.0), np.float32(2.0)
BLOCK = 64  # lanes a CPU task simulates together: SIMD width times a few, and the state of a block stays in the cache
SCHEMA = 3  # of the checkpoint (1 had tanh layers, 2 not the step of the last evaluation)
RESERVE = 6.0  # s of --timeout kept for the table and the report; the last evaluations come on top
EVAL_SEED = 2**31  # of the evaluation cases: no training seed shares their counters

# freeway (Yu and Krstic's benchmark)
LENGTH = 500.0  # m
DX = 10.0  # m
NODES = 51
V_MAX = 40.0  # m/s
RHO_MAX = 0.16  # veh/m
RELAX = 60.0  # s, tau
SAMPLE = 0.25  # s between the states whose norms are the reward; the published scheme's time step
RHO_STAR = 0.12  # veh/m, the published steady state
EVAL_LANES = 125  # of a network: 25 to choose by, then 50 of other seeds at demand x1.0 and 50 at x1.3
SWING = 0.2  # an action of 1 is a flux of (1 + SWING) q*
WAVE = (RHO_STAR, 0.1, 0.0)  # rho*, amplitude, phase of the published initial wave
TRAIN_WAVES = ((0.11, 0.13), (0.05, 0.15), (0.0, 2 * math.pi))  # ranges of the same three
RHO_FLOOR = 1e-4  # veh/m
# a tuple's length is part of its type, None too: each of these is compiled on its own, without the others' branches
LINEAR, POWER, SINGULAR = (0,), (0, 0), (0, 0, 0)  # laws of the pressure
FIRST, SECOND, PUBLISHED = (0,), (0, 0), None  # schemes: order of the finite volumes, or Richtmyer's on nodes
CFL = {"godunov": 0.9, "muscl": 0.45, "richtmyer": math.nan}  # Courant numbers; the published step is fixed
FLUX, OPEN, RING, DEMAND = range(4)  # kinds of a road's end: prescribed flux, free, joined to the other, queue outside


# ------------------------------------------------------------------------------------------------- arguments
@dataclass
class Args:
    # experiment
    exp_name: str = Path(__file__).stem
    """name of this experiment"""
    seed: int = 1
    """seed of everything"""
    torch_deterministic: bool = True
    """deterministic torch kernels (on a GPU: cuDNN's)"""
    cuda: bool = True
    """use the GPU if a probe shows that it works"""
    track: bool = False
    """log to Weights and Biases too"""
    wandb_project_name: str = "cleanrl_crypto"
    """wandb project"""
    wandb_entity: str | None = None
    """wandb team or user"""
    wandb_mode: str = "online"
    """online, offline or disabled"""
    run_dir: str | None = None
    """folder of this run (default: runs/{env}__{exp_name}__{seed}__{unix time})"""
    resume: str | None = None
    """a checkpoint to continue from, or `auto`: the one in --run-dir if there is one"""
    checkpoint_interval: float = 60.0
    """**seconds** between checkpoints (last.pt and a rotated copy of the agent)"""
    keep_checkpoints: int = 3
    """rotated checkpoints kept beside last.pt and best.pt"""
    eval_only: bool = False
    """evaluate --checkpoint on --scenario and stop"""
    checkpoint: str | None = None
    """checkpoint for --eval-only"""

    # environment
    scenario: str = "freeway"
    """freeway, corridor, townN (N x N junctions), or a CSV of segments with a JSON of signals beside it"""
    env_id: str | None = None
    """a Gymnasium environment in place of the scenario, as a check of the algorithm (CartPole-v1, Pendulum-v1)"""
    num_envs: int | None = None
    """lanes, over all processes (None: 1024 on the freeway, 128 on a network)"""
    control: str = "outlet"
    """freeway: the end whose flux is the action: outlet, inlet or both (then outlet first)"""
    scheme: str | None = None
    """godunov or muscl (finite volumes of first and second order); on the freeway also richtmyer, the published scheme
    (None: richtmyer on the freeway, godunov on a network)"""
    decision_interval: float | None = None
    """**seconds** between decisions (None: 1 on the freeway, where it is a multiple of 0.25, 5 on a network)"""
    episode_seconds: float | None = None
    """**seconds** after which an episode is truncated (None: 240 on the freeway, 450 on a network)"""
    pressure: str | None = None
    """gap (V(0) - V(rho), the published law), power, singular (at the jam density; stiff: many small steps), on a
    network ancestor (K of 5 and 10 m/s) (None: gap, on a network power)"""
    pressure_scale: float = 40.0
    """**m/s**, freeway: of the laws power (at the jam density) and singular (at half of it)"""
    pressure_exponent: float = 2.0
    """freeway: of the laws power and singular"""
    cfl: float | None = None
    """Courant number of a finite-volume step (None: 0.9 for godunov, 0.45 for muscl)"""
    cell_length: float = CELL_LENGTH
    """**m**, networks: of a cell, as near as a segment's length allows"""
    precision: str = "float32"
    """of the simulator: float32 or float64"""
    sanity: bool = True
    """check the training environment before training (under 3 s)"""

    # algorithm
    total_timesteps: int = 16_000_000
    """environment transitions (the sum over lanes)"""
    num_steps: int = 32
    """decisions of every lane in one rollout"""
    learning_rate: float = 1e-3
    """Adam"""
    anneal_lr: bool = True
    """linearly to 0 at --total-timesteps, or at the transitions that --timeout will allow"""
    gamma: float | None = None
    """discount a decision (None: 0.95 on the freeway, 0.97 on a network)"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 8
    """minibatches an epoch"""
    update_epochs: int = 4
    """epochs over a rollout"""
    norm_adv: bool = True
    """normalise the advantages of a minibatch"""
    clip_coef: float = 0.2
    """clipping of the probability ratio"""
    clip_vloss: bool = False
    """clip the value's change too"""
    ent_coef: float | None = None
    """weight of the entropy bonus (None: 0 on the freeway, 0.01 on a network)"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """gradient clipping"""
    target_kl: float | None = None
    """stop the epochs of a rollout once a minibatch's approximate KL divergence exceeds this"""
    hidden: int = 64
    """width of the two SiLU layers of actor and critic"""
    log_std_init: float = -1.5
    """initial log standard deviation of a continuous action"""
    norm_obs: bool = False
    """normalise observations by running statistics (else: the scenario's fixed scale); saved with the agent"""
    norm_reward: bool = False
    """divide rewards by the running standard deviation of the discounted return; saved with the agent (a network's
    always are: its rewards are vehicle seconds)"""

    # evaluation and runtime
    eval_interval: int | None = None
    """transitions between evaluations on the validation cases (None: 1 000 000 on the freeway, 200 000 on a network)"""
    timeout: float | None = None
    """**seconds** since this process started after which it has exited, None = no limit"""
    eval_timeout: float | None = None
    """**seconds** for one evaluation: it stops where it is and says so"""
    sim_timeout: float | None = None
    """**seconds** for one simulation call (one decision of all lanes); the run stops, saved, after a longer one"""
    backend: str = "auto"
    """simulator kernels: auto, cpu or cuda"""
    torch_threads: int | None = None
    """torch and numba threads (None: all cores)"""
    compile: bool = False
    """torch.compile the loss"""
    cudagraphs: bool = False
    """with --compile on a GPU: capture the loss in CUDA graphs"""
    report: bool = True
    """write report.html at the end"""

    def __post_init__(self):
        road = self.scenario == "freeway" or self.env_id is not None
        for name, values in DEFAULTS.items():
            if getattr(self, name) is None:
                setattr(self, name, values[not road])
        self.norm_reward |= not road
        check(self, CHOICES, RANGES)
        interval, episode, rows = self.decision_interval, self.episode_seconds, self.num_envs * self.num_steps
        fields = self.__dataclass_fields__
        names = SCENARIO_ONLY if self.env_id else NETWORK_ONLY if road else FREEWAY_ONLY
        of = "the scenarios" if self.env_id else "networks" if road else "the freeway"
        usual = {name: DEFAULTS[name][0] if name in DEFAULTS else fields[name].default for name in names}
        changed = [flag(name) for name, value in usual.items() if getattr(self, name) != value]
        all_red = 4.0
        for wrong, why in (
            (self.env_id and self.scenario != "freeway", f"--env-id {self.env_id} and --scenario exclude each other"),
            (changed, f"{', '.join(changed)}: of {of} alone"),
            (road and self.pressure == "ancestor", "--pressure ancestor: of networks alone"),
            (not road and self.scheme == "richtmyer", "--scheme richtmyer: of the freeway alone"),
            (not road and interval < all_red and all_red % interval,
             f"--decision-interval {interval}: on a network at least the {all_red} s of all-red, or a part of them"),
            (road and interval % SAMPLE, f"--decision-interval {interval}: must be a multiple of {SAMPLE} s"),
            (road and self.scheme == "richtmyer" and self.pressure != "gap",
             f"--pressure {self.pressure} needs --scheme godunov or muscl: the published scheme has its own"),
            (road and self.scheme == "richtmyer" and self.backend == "cuda",
             "--backend cuda needs --scheme godunov or muscl"),
            (self.scheme == "richtmyer" and self.cfl, f"--cfl {self.cfl} needs --scheme godunov or muscl"),
            (self.scheme == "muscl" and (self.cfl or 0) > 0.5, f"--cfl {self.cfl}: at most 0.5 with --scheme muscl"),
            (episode % interval, f"--episode-seconds {episode} must be a multiple of --decision-interval {interval}"),
            (rows % self.num_minibatches,
             f"--num-envs {self.num_envs} times --num-steps {self.num_steps} is not a multiple of "
             f"--num-minibatches {self.num_minibatches}"),
            (self.eval_only != (self.checkpoint is not None), "--eval-only and --checkpoint PATH go together"),
            (self.cudagraphs and not self.compile, "--cudagraphs needs --compile"),
            (self.resume == "auto" and self.run_dir is None,
             "--resume auto needs --run-dir, the folder of the run to continue"),
        ):
            if wrong:
                raise ValueError(why)


DEFAULTS = {  # of flags left at None: on the freeway (and with --env-id), on a network
    "num_envs": (1024, 128), "decision_interval": (1.0, 5.0), "episode_seconds": (240.0, 450.0), "gamma": (0.95, 0.97),
    "ent_coef": (0.0, 0.01), "eval_interval": (1_000_000, 200_000), "pressure": ("gap", "power"),
    "scheme": ("richtmyer", "godunov"),
}
FREEWAY_ONLY = "control", "pressure_scale", "pressure_exponent"
NETWORK_ONLY = ("cell_length",)
SCENARIO_ONLY = (
    *FREEWAY_ONLY, *NETWORK_ONLY, "scheme", "pressure", "cfl", "decision_interval", "episode_seconds", "precision")
CHOICES = {
    "wandb_mode": ("online", "offline", "disabled"), "backend": ("auto", "cpu", "cuda"),
    "control": ("outlet", "inlet", "both"), "scheme": ("richtmyer", "godunov", "muscl"),
    "precision": ("float32", "float64"), "pressure": ("gap", "power", "singular", "ancestor"),
}
RANGES = {name: (low, high) for low, high, names in (  # of numeric flags, both ends allowed
    (0, 2**32 - 1, "seed"), (0, 0.9999, "gamma"), (0, 1, "gae_lambda learning_rate"), (0.01, 10, "clip_coef"),
    (0, 100, "ent_coef vf_coef"), (1e-6, 1e9, "max_grad_norm target_kl"), (-20, 5, "log_std_init"),
    (0, 1e9, "checkpoint_interval"), (0, 10**6, "keep_checkpoints"), (0, 10**12, "total_timesteps"),
    (1, 2**20, "num_envs num_steps"), (1, 2**16, "num_minibatches update_epochs hidden"), (1, 10**12, "eval_interval"),
    (0.05, 1, "cfl"), (0.1, 1000, "pressure_scale"), (1, 1000, "cell_length"),
    (0.1, 10, "pressure_exponent"), (0.25, 3600, "decision_interval"), (0.25, 86400, "episode_seconds"),
    (1, 4096, "torch_threads"),
    (1, 1e9, "timeout"), (0.1, 1e9, "eval_timeout"), (1e-6, 1e9, "sim_timeout"),
) for name in names.split()}
# flags that shape the agent or the data: a resumed run must agree on them
SHAPING = (
    "seed", "scenario", "env_id", "num_envs", "control", "scheme", "decision_interval", "episode_seconds", "precision",
    "pressure", "pressure_scale", "pressure_exponent", "cfl", "cell_length",
    "num_steps", "gamma", "gae_lambda", "num_minibatches", "hidden", "norm_obs", "norm_reward",
)


# --------------------------------------------------------------------------------------------------- kernels
jit = partial(nb.njit, cache=True, error_model="numpy")


def fast(function):
    """njit; left as it is under NUMBA_ENABLE_CUDASIM, where CUDA kernels are Python. A division by zero gives inf."""
    return function if nb.config.ENABLE_CUDASIM else jit(function)


@jit
def uniform_nb(seed, lane, episode, draw):
    """Counter-based uniform in [0, 1): two rounds of splitmix64 over (seed, lane, episode, draw)."""
    x = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(lane)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = (x ^ (x >> np.uint64(31))) + np.uint64(episode) * np.uint64(0xD1342543DE82EF95) + np.uint64(draw)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return np.float64(x >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@fast
def between_nb(ends, share):
    return ends[0] + share * (ends[1] - ends[0])


@fast
def greenshields_nb(rho, v_max, rho_max):
    """Equilibrium speed V(rho) = v_max (1 - rho / rho_max)."""
    return v_max * (ONE - rho / rho_max)


@fast
def published_flux_nb(rho, y, v_max, rho_max):
    """Fluxes of (rho, y), y = rho (v - V): y + rho V and y v. Returns (f, g)."""
    big_v = greenshields_nb(rho, v_max, rho_max)
    return y + rho * big_v, y * (y / rho + big_v)


@fast
def end_nb(rho, q, v_max, rho_max):
    """y of an end node that lets q vehicles a second pass, at most at v_max."""
    flux = q if q < rho * v_max else rho * v_max
    return flux - rho * greenshields_nb(rho, v_max, rho_max)


@fast
def half_step(rho, y, half_rho, half_y, speed, a, b, v_max, rho_max):
    """Half nodes (M - 1, W) after half a step of the nodes (M, W); a, b (W,): dt / (2 dx), dt / (2 tau).

    speed (W,): the largest |v|, |v - rho p'| of each lane, p = V(0) - V.
    """
    for i in range(rho.shape[0] - 1):
        for j in range(rho.shape[1]):
            f0, g0 = published_flux_nb(rho[i, j], y[i, j], v_max, rho_max)
            f1, g1 = published_flux_nb(rho[i + 1, j], y[i + 1, j], v_max, rho_max)
            half_rho[i, j] = HALF * (rho[i, j] + rho[i + 1, j]) - a[j] * (f1 - f0)
            half_y[i, j] = HALF * (y[i, j] + y[i + 1, j]) * (ONE - b[j]) - a[j] * (g1 - g0)
            v = f1 / rho[i + 1, j]
            back = v_max * rho[i + 1, j] / rho_max - v
            v = v if v > -v else -v
            v = v if v > back else back
            speed[j] = v if v > speed[j] else speed[j]


@fast
def whole_step(rho, y, half_rho, half_y, added, repaired, a, b, floor, v_max, rho_max):
    """Inner nodes after the whole step, clamped to the physical range; what the clamp did is added up."""
    for i in range(1, rho.shape[0] - 1):
        for j in range(rho.shape[1]):
            f0, g0 = published_flux_nb(half_rho[i - 1, j], half_y[i - 1, j], v_max, rho_max)
            f1, g1 = published_flux_nb(half_rho[i, j], half_y[i, j], v_max, rho_max)
            raw = rho[i, j] - TWO * a[j] * (f1 - f0)
            raw_y = y[i, j] - TWO * a[j] * (g1 - g0) - b[j] * (half_y[i - 1, j] + half_y[i, j])
            kept = raw if raw > floor else floor
            kept = kept if kept < rho_max else rho_max
            low = -kept * greenshields_nb(kept, v_max, rho_max)  # v = 0
            high = kept * v_max + low  # v = v_max
            kept_y = raw_y if raw_y > low else low
            kept_y = kept_y if kept_y < high else high
            rho[i, j], y[i, j] = kept, kept_y
            added[j] += kept - raw
            repaired[j] += (ONE if kept != raw else ZERO) + (ONE if kept_y != raw_y else ZERO)


@fast
def richtmyer(u, work, lane, totals, par):
    """One step of the published two-step scheme, of SAMPLE seconds times lane[7] (1 or 0), one block, in place.

    u (2, M, W): rho, y at the nodes; work (6, M + 8, W) scratch; lane, totals, par: see the environment. Before the
    step both end nodes take their neighbour's density and the prescribed flux. Values that leave the physical range
    (a bad policy drives this scheme to NaN within seconds) are clamped, and the clamped mass goes to the ledger of
    the inner nodes.
    """
    dx, v_max, rho_max, tau, floor, dt = par[0], par[1], par[2], par[3], par[4], par[5]
    rho, y, half_rho, half_y, last = u[0], u[1], work[0], work[1], u.shape[1] - 1
    speed, added, repaired, a, b = work[2, 0], work[2, 1], work[2, 2], work[2, 3], work[2, 4]
    for j in range(rho.shape[1]):
        speed[j], added[j], repaired[j] = ZERO, ZERO, ZERO
        a[j], b[j] = HALF * dt / dx * lane[7, j], HALF * dt / tau * lane[7, j]
        if lane[7, j] > ZERO:
            rho[0, j], rho[last, j] = rho[1, j], rho[last - 1, j]
            y[0, j] = end_nb(rho[0, j], lane[3, j], v_max, rho_max)
            y[last, j] = end_nb(rho[last, j], lane[4, j], v_max, rho_max)
    half_step(rho, y, half_rho, half_y, speed, a, b, v_max, rho_max)
    whole_step(rho, y, half_rho, half_y, added, repaired, a, b, floor, v_max, rho_max)
    for j in range(rho.shape[1]):
        into, _ = published_flux_nb(half_rho[0, j], half_y[0, j], v_max, rho_max)
        out, _ = published_flux_nb(half_rho[last - 1, j], half_y[last - 1, j], v_max, rho_max)
        totals[5, j] += into * dt * lane[7, j]
        totals[6, j] += out * dt * lane[7, j]
        totals[7, j] += added[j] * dx
        totals[10, j] += repaired[j]
        totals[12, j] += lane[7, j]
        totals[8, j] = speed[j] * dt / dx if speed[j] * dt / dx > totals[8, j] else totals[8, j]


@fast
def pressure_nb(rho, law, c, gamma, rho_max):
    """p(rho), m/s: c rho (LINEAR), c rho^gamma (POWER), c (1/rho - 1/rho_max)^-gamma (SINGULAR at the jam)."""
    if len(law) == 1:
        return c * rho
    if len(law) == 2:
        return c * rho**gamma
    return c * (rho * rho_max / (rho_max - rho)) ** gamma if rho < rho_max else c * ONE * np.float32(1e9)


@fast
def density_nb(p, law, c, gamma, rho_max):
    """The density of pressure p >= 0, the inverse of pressure_nb."""
    if len(law) == 1:
        return p * (ONE / c)  # that quotient leaves the loops over lanes, p / c would not
    q = (p / c) ** (ONE / gamma)
    return q if len(law) == 2 else q * rho_max / (q + rho_max)


@fast
def stiffness_nb(rho, law, c, gamma, rho_max):
    """rho p'(rho), m/s: lambda_1 = v - rho p', lambda_2 = v."""
    p = pressure_nb(rho, law, c, gamma, rho_max)
    if len(law) == 1:
        return p
    return gamma * p if len(law) == 2 else gamma * p * rho_max / (rho_max - rho)


@fast
def critical_nb(w, law, c, gamma, rho_max):
    """The density at which the flux rho (w - p(rho)) of vehicles of one w is largest: w = p + rho p'."""
    if len(law) == 1:
        return w * (HALF / c)
    rho = density_nb(w / (gamma + ONE), POWER, c, gamma, rho_max)
    if len(law) == 3:
        q = rho  # q = 1 / (1/rho - 1/rho_max) solves p(q) (1 + gamma (1 + q / rho_max)) = w: convex, Newton from above
        for _ in range(12):
            p = c * q**gamma
            value = p * (ONE + gamma + gamma * q / rho_max) - w
            q -= value * q / (gamma * (value + w) + p * gamma * q / rho_max)
        rho = q * rho_max / (q + rho_max)
    return rho


@fast
def flux_nb(rho_l, v_l, rho_r, v_r, law, c, gamma, rho_max):
    """Exact Godunov flux: the smaller of the left state's demand and the right state's supply, at the left one's w.

    Returns (rho flux, rho w flux). The supply is what leaves the middle state (w_L, v_R); an empty road supplies all.
    """
    w = v_l + pressure_nb(rho_l, law, c, gamma, rho_max)
    w = w if w > ZERO else ZERO
    best = critical_nb(w, law, c, gamma, rho_max)
    most = best * (w - pressure_nb(best, law, c, gamma, rho_max))
    demand = rho_l * v_l if rho_l <= best else most
    behind = v_r if v_r > ZERO else ZERO
    behind = behind if behind < w else w
    behind = behind if rho_r > ZERO else w
    middle = density_nb(w - behind, law, c, gamma, rho_max)
    supply = middle * behind if middle >= best else most
    f = demand if demand < supply else supply
    return f, f * w


@fast
def minmod_nb(a, b):
    small = a if abs(a) < abs(b) else b
    return small if a * b > ZERO else ZERO


@fast
def face_nb(rho0, v0, rho1, v1, rho2, v2, rho3, v3, order, law, c, gamma, rho_max):
    """Flux between cells 1 and 2 of four: first order, or minmod slopes of rho and v (order 2)."""
    if len(order) == 2:
        rho_l = rho1 + HALF * minmod_nb(rho1 - rho0, rho2 - rho1)
        v_l = v1 + HALF * minmod_nb(v1 - v0, v2 - v1)
        rho_r = rho2 - HALF * minmod_nb(rho2 - rho1, rho3 - rho2)
        v_r = v2 - HALF * minmod_nb(v2 - v1, v3 - v2)
        return flux_nb(rho_l, v_l, rho_r, v_r, law, c, gamma, rho_max)
    return flux_nb(rho1, v1, rho2, v2, law, c, gamma, rho_max)


@fast
def relax_nb(rho, z, keep, law, c, gamma, rho_max, v_max):
    """rho w after a relaxation of v to Greenshields' V(rho), exact at fixed rho: v - V shrinks to `keep` of itself."""
    rest = rho * (greenshields_nb(rho, v_max, rho_max) + pressure_nb(rho, law, c, gamma, rho_max))
    return z + (rest - z) * (ONE - keep)


@fast
def ghosts(r, v, left, right):
    """Two cells beyond either end of r, v (M + 4, W): of the other end on a ring, else the last one again."""
    m = r.shape[0] - 4
    for i in range(2):
        first, last = (m + i, 2 + i) if left == RING else (2, m + 1)
        for j in range(r.shape[1]):  # whole rows would need an allocator, which CUDA has not
            r[i, j], r[m + 2 + i, j] = r[first, j], r[last, j]
            v[i, j], v[m + 2 + i, j] = v[first, j], v[last, j]


@fast
def primitives(rho, z, r, v, left, right, law, c, gamma, rho_max):
    """r, v (M + 4, W): density and speed of the cells rho, z (M, W), two ghost cells at either end."""
    for i in range(rho.shape[0]):
        for j in range(rho.shape[1]):
            r[i + 2, j] = rho[i, j]
            v[i + 2, j] = z[i, j] / rho[i, j] - pressure_nb(rho[i, j], law, c, gamma, rho_max)
    ghosts(r, v, left, right)


@fast
def relax_primitives(rho, z, keep, r, v, left, right, law, c, gamma, rho_max, v_max):
    """relax() and primitives() in one pass over the memory."""
    for i in range(rho.shape[0]):
        for j in range(rho.shape[1]):
            new = relax_nb(rho[i, j], z[i, j], keep[j], law, c, gamma, rho_max, v_max)
            z[i, j] = new
            r[i + 2, j] = rho[i, j]
            v[i + 2, j] = new / rho[i, j] - pressure_nb(rho[i, j], law, c, gamma, rho_max)
    ghosts(r, v, left, right)


@fast
def faces(r, v, f, g, order, law, c, gamma, rho_max):
    """f, g (M + 1, W): Godunov flux of rho and rho w at the faces of the cells r, v (M + 4, W)."""
    for i in range(f.shape[0]):
        for j in range(r.shape[1]):
            f[i, j], g[i, j] = face_nb(r[i, j], v[i, j], r[i + 1, j], v[i + 1, j], r[i + 2, j], v[i + 2, j],
                                       r[i + 3, j], v[i + 3, j], order, law, c, gamma, rho_max)


@fast
def ends(r, v, f, g, lane, left, right, law, c, gamma, rho_max, v_max):
    """Flux at a road's ends that are neither OPEN nor RING, by their kind (FLUX, DEMAND)."""
    m = f.shape[0] - 1
    for j in range(r.shape[1]):
        if left == FLUX:  # what enters has the first cell's density, and so the speed that gives the flux
            fast_as = lane[3, j] / r[2, j]
            fast_as = fast_as if fast_as < v_max else v_max
            f[0, j] = lane[3, j]
            g[0, j] = lane[3, j] * (fast_as + pressure_nb(r[2, j], law, c, gamma, rho_max))
        if left == DEMAND:  # what waits enters with w = lane[7] as far as the first cell lets it
            most = critical_nb(lane[7, j], law, c, gamma, rho_max)
            fast_as = lane[7, j] - pressure_nb(most, law, c, gamma, rho_max)
            into, _ = flux_nb(most, fast_as, r[2, j], v[2, j], law, c, gamma, rho_max)
            f[0, j] = into if into < lane[3, j] else lane[3, j]
            g[0, j] = f[0, j] * lane[7, j]
        if right == FLUX:  # a cell gives at most what it holds at v_max
            f[m, j] = lane[4, j] if lane[4, j] < r[m + 1, j] * v_max else r[m + 1, j] * v_max
            g[m, j] = f[m, j] * (v[m + 1, j] + pressure_nb(r[m + 1, j], law, c, gamma, rho_max))


@fast
def update_nb(rho, z, f0, g0, f1, g1, a, floor, w_floor):
    """One conservative update of one cell; a = dt / dx. Returns rho, rho w, and the density that the floor added."""
    rho, z = rho - a * (f1 - f0), z - a * (g1 - g0)
    added = floor - rho if rho < floor else ZERO
    return rho + added, floor * w_floor if rho < floor else z, added


@fast
def update(rho, z, f, g, a, rho_new, z_new, added, floor, w_floor):
    """rho_new, z_new (M, W): rho, z updated by the fluxes f, g (M + 1, W).

    a (W,): dt / dx; added (W,) collects the density that the floor adds.
    """
    for i in range(rho.shape[0]):
        for j in range(rho.shape[1]):
            rho_new[i, j], z_new[i, j], more = update_nb(rho[i, j], z[i, j], f[i, j], g[i, j], f[i + 1, j], g[i + 1, j],
                                                         a[j], floor, w_floor)
            added[j] += more


@fast
def update_mean(rho, z, f, g, a, rho_new, z_new, added, floor, w_floor):
    """rho_new, z_new = the mean of themselves and of update()'s: the second stage of SSPRK2."""
    for i in range(rho.shape[0]):
        for j in range(rho.shape[1]):
            new, new_z, more = update_nb(rho[i, j], z[i, j], f[i, j], g[i, j], f[i + 1, j], g[i + 1, j], a[j], floor,
                                         w_floor)
            added[j] += more
            rho_new[i, j] += HALF * (new - rho_new[i, j])
            z_new[i, j] += HALF * (new_z - z_new[i, j])


@fast
def relax(rho, z, keep, law, c, gamma, rho_max, v_max):
    for i in range(rho.shape[0]):
        for j in range(rho.shape[1]):
            z[i, j] = relax_nb(rho[i, j], z[i, j], keep[j], law, c, gamma, rho_max, v_max)


@fast
def fastest_wave(rho, z, speed, law, c, gamma, rho_max):
    """speed (W,): the largest |v|, |v - rho p'| of each lane."""
    for j in range(speed.size):
        speed[j] = ZERO
    for i in range(rho.shape[0]):
        for j in range(rho.shape[1]):
            v = z[i, j] / rho[i, j] - pressure_nb(rho[i, j], law, c, gamma, rho_max)
            back = stiffness_nb(rho[i, j], law, c, gamma, rho_max) - v
            v = v if v > -v else -v
            v = v if v > back else back
            speed[j] = v if v > speed[j] else speed[j]


@fast
def advance(u, work, lane, totals, par, seconds, order, left, right, law):
    """All lanes of one block of roads over `seconds` by finite volumes, in place.

    u (2, M, W): rho and rho w of the cells; work (6, M + 8, W) scratch; every lane takes steps of its own: at most
    cfl dx / max(|v|, |v - rho p'|), as equal as they come. Strang splitting: half a relaxation, transport (Euler, or
    SSPRK2 where order is SECOND), half a relaxation. totals[8] keeps the largest Courant number.
    """
    dx, v_max, rho_max, tau, floor, c, gamma, cfl = par[0], par[1], par[2], par[3], par[4], par[7], par[8], par[9]
    m, width = u.shape[1], u.shape[2]
    rho, z, half_rho, half_z = u[0], u[1], work[4, :m], work[5, :m]
    r, v, f, g = work[0, : m + 4], work[1, : m + 4], work[2, : m + 1], work[3, : m + 1]
    lanes = work[4, m:]
    into, out, added, a, keep, speed, rest = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5], lanes[6]
    weight, more = dx * HALF if len(order) == 2 else dx, True
    for j in range(width):
        rest[j] = seconds
    while more:
        more = False
        fastest_wave(rho, z, speed, law, c, gamma, rho_max)
        for j in range(width):
            n = math.ceil(rest[j] * speed[j] / (cfl * dx))
            n = n if ONE < n and speed[j] < np.float32(1e4) else ONE
            step = rest[j] / n
            rest[j] = rest[j] - step if n > ONE else ZERO
            more = more or rest[j] > ZERO
            a[j] = step / dx
            keep[j] = math.exp(-HALF * step / tau)
            totals[8, j] = a[j] * speed[j] if a[j] * speed[j] > totals[8, j] else totals[8, j]
            totals[12, j] += ONE if step > ZERO else ZERO
            into[j], out[j], added[j] = ZERO, ZERO, ZERO
        for stage in range(len(order)):
            if stage == 0:
                relax_primitives(rho, z, keep, r, v, left, right, law, c, gamma, rho_max, v_max)
            else:
                primitives(half_rho, half_z, r, v, left, right, law, c, gamma, rho_max)
            faces(r, v, f, g, order, law, c, gamma, rho_max)
            ends(r, v, f, g, lane, left, right, law, c, gamma, rho_max, v_max)
            if len(order) == 1:
                update(rho, z, f, g, a, rho, z, added, floor, v_max)
            elif stage == 0:
                update(rho, z, f, g, a, half_rho, half_z, added, floor, v_max)
            else:
                update_mean(half_rho, half_z, f, g, a, rho, z, added, floor, v_max)
            for j in range(width):
                into[j] += a[j] * f[0, j]
                out[j] += a[j] * f[m, j]
        relax(rho, z, keep, law, c, gamma, rho_max, v_max)
        for j in range(width):
            totals[5, j] += weight * into[j]
            totals[6, j] += weight * out[j]
            totals[7, j] += weight * added[j]


@nb.njit(parallel=True, cache=True, error_model="numpy")
def advance_cpu(u, work, lane, totals, par, seconds, order, left, right, law):
    """advance() for all blocks: the same arrays with a block axis in front."""
    for b in nb.prange(u.shape[0]):
        advance(u[b], work[b], lane[b], totals[b], par, seconds, order, left, right, law)


@fast
def nodes(u, work, par, order, law):
    """rho and v at the NODES points, into work[0] and work[1]: means of the two cells beside a point."""
    v_max, rho_max, c, gamma = par[1], par[2], par[7], par[8]
    rho, z, r, v, last = u[0], u[1], work[0], work[1], u.shape[1] - 1
    for i in range(NODES):
        if order is None:
            for j in range(rho.shape[1]):
                r[i, j] = rho[i, j]
                v[i, j] = z[i, j] / rho[i, j] + greenshields_nb(rho[i, j], v_max, rho_max)
        else:
            west, east = i - 1 if i > 0 else 0, i if i < last else last
            for j in range(rho.shape[1]):
                r[i, j] = HALF * (rho[west, j] + rho[east, j])
                v_w = z[west, j] / rho[west, j] - pressure_nb(rho[west, j], law, c, gamma, rho_max)
                v_e = z[east, j] / rho[east, j] - pressure_nb(rho[east, j], law, c, gamma, rho_max)
                v[i, j] = HALF * (v_w + v_e)


@fast
def norms(r, v, lane, square_rho, square_v, mass, flow, weight):
    """Adds one sample of the NODES points up: squared relative errors (W,), and by the trapezoid rule rho and rho v."""
    for i in range(NODES):
        share = weight * HALF if i == 0 or i == NODES - 1 else weight
        for j in range(r.shape[1]):
            a, b = r[i, j] / lane[0, j] - ONE, v[i, j] / lane[1, j] - ONE
            square_rho[j] += a * a
            square_v[j] += b * b
            mass[j] += share * r[i, j]
            flow[j] += share * r[i, j] * v[i, j]


@fast
def observe(work, lane, obs):
    for j in range(obs.shape[0]):
        for i in range(NODES):
            obs[j, i] = work[0, i, j] / lane[0, j] - ONE
            obs[j, NODES + i] = work[1, i, j] / lane[1, j] - ONE


@fast
def stored(u, order, dx, j):
    """Vehicles on lane j's road: of its cells, or of its inner nodes, which are what the published scheme conserves."""
    ends_, mass = 1 if order is None else 0, 0.0
    for i in range(ends_, u.shape[1] - ends_):
        mass += u[0, i, j] * dx
    return mass


@fast
def start_road(u, lane, totals, ints, waves, par, order, law, seed, lane0, j):
    """First state of lane j's episode: the wave rho* (1 + amplitude sin(3 pi x / L + phase)) with flux q* everywhere.

    waves (3, W): rho*, amplitude, phase of a lane whose wave is fixed; where rho* is 0 all three are drawn.
    """
    dx, v_max, rho_max = par[0], par[1], par[2]
    rho_star, amplitude, phase = waves[0, j], waves[1, j], waves[2, j]
    if rho_star == 0.0:
        rho_star = between_nb(TRAIN_WAVES[0], uniform_nb(seed, lane0 + j, ints[1, j], 0))
        amplitude = between_nb(TRAIN_WAVES[1], uniform_nb(seed, lane0 + j, ints[1, j], 1))
        phase = between_nb(TRAIN_WAVES[2], uniform_nb(seed, lane0 + j, ints[1, j], 2))
    v_star = v_max * (1.0 - rho_star / rho_max)
    lane[0, j], lane[1, j], lane[2, j] = rho_star, v_star, rho_star * v_star
    lane[5, j], lane[6, j] = ZERO, ZERO
    first = 0.0 if order is None else 0.5
    for i in range(u.shape[1]):
        rho = rho_star * (1.0 + amplitude * math.sin(3.0 * math.pi * (i + first) * dx / LENGTH + phase))
        u[0, i, j] = rho
        if order is None:
            u[1, i, j] = rho_star * v_star - rho * v_max * (1.0 - rho / rho_max)
        else:
            u[1, i, j] = rho_star * v_star + rho * pressure_nb(u[0, i, j], law, par[7], par[8], rho_max)
    for k in range(totals.shape[0]):
        totals[k, j] = 0.0
    totals[9, j] = stored(u, order, dx, j)
    ints[0, j] = 0


@fast
def decide(u, work, lane, totals, finals, ints, waves, par, order, law, control, action, obs, final_obs, reward, flags,
           seed, lane0, length, samples):
    """One decision of all lanes of one block, autoreset included.

    action (2, W) in [-1, 1]: of the outlet and the inlet, or in row 0 alone; obs, final_obs (W, 2 NODES); reward (W,):
    mean over the samples of minus (norm of v/v* - 1 plus norm of rho/rho* - 1), Euclidean over the points; flags
    (2, W): terminated, truncated; finals: totals of the episode that ended.
    """
    dx, v_max, seconds, width, ended = par[0], par[1], par[5], reward.size, False
    for j in range(width):
        out, into = ZERO, ZERO
        if control != 1:
            out = action[0, j]
        if control != 0:
            into = action[control - 1, j]
        out = -ONE if out < -ONE else ONE if out > ONE else out
        into = -ONE if into < -ONE else ONE if into > ONE else into
        lane[3, j] = lane[2, j] * (ONE + par[6] * into)
        lane[4, j] = lane[2, j] * (ONE + par[6] * out)
        totals[4, j] += HALF * (abs(out - lane[5, j]) + abs(into - lane[6, j]))
        lane[5, j], lane[6, j] = out, into
        reward[j] = 0.0
    square_rho, square_v, mass, flow = work[2, 0], work[3, 0], work[4, 0], work[5, 0]
    for s in range(samples):
        if order is not None:
            advance(u, work, lane, totals, par, seconds, order, FLUX, FLUX, law)
        else:
            for j in range(width):  # the published loop's last step updates nothing
                lane[7, j] = ONE if ints[0, j] * samples + s + 1 < length * samples else ZERO
            richtmyer(u, work, lane, totals, par)
        nodes(u, work, par, order, law)
        for j in range(width):
            square_rho[j], square_v[j], mass[j], flow[j] = ZERO, ZERO, ZERO, ZERO
        norms(work[0], work[1], lane, square_rho, square_v, mass, flow, dx)
        for j in range(width):
            r = -(math.sqrt(square_v[j]) + math.sqrt(square_rho[j]))
            reward[j] += r / samples
            totals[0, j] += r
            totals[1, j] += seconds * (mass[j] - flow[j] / v_max)
            totals[2, j] += seconds * flow[j]
            totals[3, j] += seconds * mass[j]
    for j in range(width):
        ints[0, j] += 1
        broken = not reward[j] > -1e6  # NaN too
        flags[0, j] = broken
        flags[1, j] = not broken and ints[0, j] >= length
        ended = ended or flags[0, j] or flags[1, j]
        if broken:
            reward[j] = -1e3
    if ended:
        observe(work, lane, final_obs)
        for j in range(width):
            if flags[0, j] or flags[1, j]:
                for k in range(totals.shape[0]):
                    finals[k, j] = totals[k, j]
                finals[11, j], finals[12, j] = stored(u, order, dx, j), ints[0, j]
                ints[1, j] += 1
                start_road(u, lane, totals, ints, waves, par, order, law, seed, lane0, j)
        nodes(u, work, par, order, law)
    observe(work, lane, obs)


@nb.njit(parallel=True, cache=True, error_model="numpy")
def decide_cpu(u, work, lane, totals, finals, ints, waves, par, order, law, control, action, obs, final_obs, reward,
               flags, seed, lane0, length, samples):
    """decide() for all blocks: the same arrays with a block axis in front."""
    for b in nb.prange(u.shape[0]):
        decide(u[b], work[b], lane[b], totals[b], finals[b], ints[b], waves[b], par, order, law, control, action[b],
               obs[b], final_obs[b], reward[b], flags[b], seed, lane0 + b * u.shape[3], length, samples)


@nb.njit(cache=True, error_model="numpy")
def start_cpu(u, work, lane, totals, ints, waves, par, order, law, obs, seed, lane0):
    """First states and observations of all blocks."""
    for b in range(u.shape[0]):
        for j in range(u.shape[3]):
            start_road(u[b], lane[b], totals[b], ints[b], waves[b], par, order, law, seed, lane0 + b * u.shape[3], j)
        nodes(u[b], work[b], par, order, law)
        observe(work[b], lane[b], obs[b])


def build_cuda():
    """The same functions on the GPU, one thread a lane: (kernel of decide_cpu's arguments, kernel of start_cpu's)."""
    @cuda.jit
    def decide_cuda(u, work, lane, totals, finals, ints, waves, par, order, law, control, action, obs, final_obs,
                    reward, flags, seed, lane0, length, samples):
        j = cuda.grid(1)
        if j < u.shape[3]:
            k = j + 1
            decide(u[0, :, :, j:k], work[0, :, :, j:k], lane[0, :, j:k], totals[0, :, j:k], finals[0, :, j:k],
                   ints[0, :, j:k], waves[0, :, j:k], par, order, law, control, action[0, :, j:k], obs[0, j:k],
                   final_obs[0, j:k], reward[0, j:k], flags[0, :, j:k], seed, lane0 + j, length, samples)

    @cuda.jit
    def start_cuda(u, work, lane, totals, ints, waves, par, order, law, obs, seed, lane0):
        j = cuda.grid(1)
        if j < u.shape[3]:
            k = j + 1
            start_road(u[0, :, :, j:k], lane[0, :, j:k], totals[0, :, j:k], ints[0, :, j:k], waves[0, :, j:k], par,
                       order, law, seed, lane0 + j, 0)
            nodes(u[0, :, :, j:k], work[0, :, :, j:k], par, order, law)
            observe(work[0, :, :, j:k], lane[0, :, j:k], obs[0, j:k])

    return decide_cuda, start_cuda


# ------------------------------------------------------------------------------------------------ environment
STATS = (
    "episode_return", "delay_veh_s", "throughput_veh", "mean_speed", "switches", "mass_error", "max_cfl", "floor_veh")


def in_blocks(kernel, blocks: int, *args):
    """kernel(*args) on at most `blocks` threads: one without a block would do nothing but be waited for."""
    threads = nb.get_num_threads()
    nb.set_num_threads(min(threads, blocks))
    try:
        kernel(*args)
    finally:
        nb.set_num_threads(threads)


WORST = "mass_error", "max_cfl"  # the largest of the lanes is shown, of the others the mean


class Lanes(gym.vector.VectorEnv):
    """What both scenarios share: arrays on CPU or CUDA that go back to the pool, and Gymnasium's info."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}

    def host(self, array) -> np.ndarray:
        """A state array (a copy of it on CUDA)."""
        return array.copy_to_host() if self.backend == "cuda" else array

    def write(self, array, values):
        if self.backend == "cuda":
            array.copy_to_device(np.ascontiguousarray(values, array.dtype))
        else:
            array[...] = values

    def info(self, done, final_obs) -> dict:
        """Of a step that ended the episodes of lanes done (N,), with final_obs (N, ...)."""
        if not done.any():
            return {}
        stats, final = self.final_stats, np.full(self.num_envs, None, object)
        for lane in np.flatnonzero(done):
            final[lane] = final_obs[lane].copy()
        episode = {k: np.where(done, v, 0.0) for k, v in stats.items()}
        episode |= {"r": episode["episode_return"], "l": np.where(done, stats["episode_length"], 0)}
        return {"final_obs": final, "_final_obs": done,
                "final_info": {"episode": episode, "_episode": done}, "_final_info": done}

    def close_extras(self, **kwargs):
        self.lease.close()


class FreewayVectorEnv(Lanes):
    """Lanes of the freeway. Same-step autoreset; truncation at `length` decisions.

    Observation (102,) float32: rho/rho* - 1, then v/v* - 1, at 51 points. Action (1,) or (2,) in [-1, 1]: flux
    (1 + .2 a) q* at the outlet or the inlet, or at both. Reward: see decide(). cases="eval": lanes 0..49 are
    validation waves, the last 50 held-out ones, lane 50 is the published wave.
    """

    builds, agents, obs_scale, tuned = 0, 1, 10.0, "tuned on training waves"

    def __init__(
        self, num_envs: int = 1, control: str = "outlet", scheme: str = "richtmyer", decision_interval: float = 1.0,
        episode_seconds: float = 240.0, precision: str = "float32", pressure: str = "gap",
        pressure_scale: float = V_MAX, pressure_exponent: float = 2.0, cfl: float | None = None, seed: int = 1,
        backend: str = "cpu", lane0: int = 0, cases: str | None = None,
    ):
        FreewayVectorEnv.builds += 1
        num_envs = 101 if cases == "eval" else num_envs
        self.num_envs, self.seed, self.backend, self.lane0 = num_envs, seed, backend, lane0
        self.decision_interval, self.samples = decision_interval, round(decision_interval / SAMPLE)
        self.length = round(episode_seconds / decision_interval)
        self.control = CHOICES["control"].index(control)
        self.order = {"richtmyer": PUBLISHED, "godunov": FIRST, "muscl": SECOND}[scheme]
        gamma, self.law = pressure_exponent, {"gap": LINEAR, "power": POWER, "singular": SINGULAR}[pressure]
        if scheme == "richtmyer" and (pressure, backend) != ("gap", "cpu"):
            raise ValueError(f"scheme richtmyer runs with pressure gap on the cpu only, not {pressure} on {backend}")
        # c of pressure_nb: gap is V(0) - V(rho); the others are `pressure_scale` m/s at rho_max, or at rho_max / 2
        c = V_MAX / RHO_MAX if pressure == "gap" else pressure_scale / RHO_MAX**gamma
        self.actions = 2 if control == "both" else 1
        box = gym.spaces.Box
        self.single_observation_space = box(-np.inf, np.inf, (2 * NODES,), np.float32)
        self.single_action_space = box(-1.0, 1.0, (self.actions,), np.float32)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.row_action, self.row_obs = self.single_action_space, 2 * NODES
        cells = NODES if scheme == "richtmyer" else NODES - 1
        width = num_envs if backend == "cuda" else min(BLOCK, num_envs)
        blocks, real = -(-num_envs // width), np.dtype(precision)
        self.lease = pool.lease()
        take = partial(self.lease.acquire, device=backend)
        self.u, self.work = take((blocks, 2, cells, width), real), take((blocks, 6, NODES + 8, width), real)
        # lane: rho*, v*, q*, flux in, flux out, last actions, w of what enters; totals, finals: see stats()
        self.lane, self.waves = take((blocks, 8, width), real), take((blocks, 3, width), np.float64)
        self.totals, self.finals = take((blocks, 13, width), np.float64), take((blocks, 13, width), np.float64)
        self.ints, self.action = take((blocks, 2, width), np.int64), take((blocks, 2, width), real)
        self.obs, self.final = (take((blocks, width, 2 * NODES), np.float32) for _ in range(2))
        self.reward, self.flags = take((blocks, width), np.float64), take((blocks, 2, width), np.bool_)
        self.par = take((10,), real)
        cfl = cfl or CFL[scheme]
        self.write(self.par, np.array([DX, V_MAX, RHO_MAX, RELAX, RHO_FLOOR, SAMPLE, SWING, c, gamma, cfl], real))
        self.decide, self.start = decide_cpu, start_cpu
        if backend == "cuda":
            grid = (num_envs + 127) // 128, 128
            self.decide, self.start = (kernel[grid] for kernel in build_cuda())
        self.splits, self.was_reset, self.sim_seconds = {}, False, 0.0
        self.traced, self.baselines = 50, freeway_baselines
        if cases == "eval":
            self.splits = {"validation": slice(0, 50), "published": slice(50, 51), "heldout": slice(51, 101)}
            waves = np.zeros((3, num_envs))
            waves[:, 50] = WAVE
            self.spread(self.waves, waves)

    def lanes(self, array) -> np.ndarray:
        """(blocks, ..., width) -> (..., num_envs), a copy."""
        array = array if isinstance(array, np.ndarray) else self.host(array)
        return np.moveaxis(array, 0, -2).reshape(*array.shape[1:-1], -1)[..., : self.num_envs].copy()

    def spread(self, array, values):
        """The way back; lanes that fill the last block up repeat the last one."""
        blocks, *_, width = array.shape
        values = np.concatenate([values, np.repeat(values[..., -1:], blocks * width - self.num_envs, -1)], -1)
        values = np.moveaxis(values.reshape(*values.shape[:-1], blocks, width), -2, 0)
        self.write(array, values.astype(array.dtype))

    def rows(self, array) -> np.ndarray:
        """(blocks, width, D) -> (num_envs, D)."""
        array = self.host(array)
        return array.reshape(-1, array.shape[-1])[: self.num_envs]

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """All lanes to their first (seed given) or next episode; builds nothing.

        options {"waves": (3, N)}: rho*, amplitude, phase of the lanes from now on; rho* 0: drawn anew each episode.
        {"stagger": True}: first episodes of every length, so that every rollout holds every part of an episode; with
        all lanes in step PPO chases the part of the episode that it sees, and forgets the others.
        """
        if options and "waves" in options:
            self.spread(self.waves, np.asarray(options["waves"], np.float64))
        ints = self.host(self.ints)
        if seed is not None:
            self.seed = int(seed)
        ints[:, 1] = 0 if seed is not None or not self.was_reset else ints[:, 1] + 1
        self.write(self.ints, ints)
        self.was_reset = True
        self.start(self.u, self.work, self.lane, self.totals, self.ints, self.waves, self.par, self.order, self.law,
                   self.obs, self.seed, self.lane0)
        if options and options.get("stagger"):
            clocks = [[int(uniform_nb(self.seed, self.lane0 + i, 0, 3) * self.length) for i in range(self.num_envs)]]
            ints = self.host(self.ints)
            self.spread(self.ints, np.concatenate([clocks, self.lanes(ints)[1:]]))
        return self.rows(self.obs).copy(), {}

    def step_lanes(self, actions):
        """actions (N, A) -> obs (N, 102) float32, reward (N,) float64, terminated, truncated (N,) bool: overwritten by
        the next call."""
        began = time.perf_counter()
        both = np.zeros((2, self.num_envs))
        both[: self.actions] = np.asarray(actions).T
        self.spread(self.action, both)
        in_blocks(self.decide, len(self.u), self.u, self.work, self.lane, self.totals, self.finals, self.ints,
                  self.waves, self.par, self.order, self.law, self.control, self.action, self.obs, self.final,
                  self.reward, self.flags, self.seed, self.lane0, self.length, self.samples)
        flags, reward = self.lanes(self.flags), self.host(self.reward).reshape(-1)[: self.num_envs]
        self.sim_seconds = max(self.sim_seconds, time.perf_counter() - began)
        return self.rows(self.obs), reward, flags[0], flags[1]

    @property
    def final_obs(self):
        return self.rows(self.final)

    def stats(self, totals) -> dict:
        """Rows of totals: return, delay, distance, presence, swings, in, out, added by the floor, largest Courant
        number, vehicles at the start, repaired cells, -, solver steps; of finals the last two: vehicles at the end,
        decisions."""
        t = self.lanes(totals)
        error = np.abs(t[11] + t[6] - t[9] - t[5] - t[7]) / np.maximum(t[9], 1e-30)
        return dict(zip(STATS, (t[0], t[1], t[6], t[2] / np.maximum(t[3], 1e-30), t[4], error, t[8], t[7])))

    def seconds_of_inflow(self) -> float:
        """What entered since the start of the episode, in seconds of the flux that the actions asked for."""
        return float((self.lanes(self.totals)[5] / self.lanes(self.lane)[3]).mean())

    @property
    def final_stats(self) -> dict:
        return self.stats(self.finals) | {"episode_length": self.lanes(self.finals)[12]}

    def running_stats(self) -> dict:
        return self.stats(self.totals)

    def trace(self) -> dict:
        """The traced lane's densities and speeds now."""
        obs, lane = self.rows(self.obs)[self.traced], self.lanes(self.lane)[:, self.traced]
        points = [f"{k}_{i}" for k in ("rho", "v") for i in range(NODES)]
        return dict(zip(points, np.repeat(lane[:2], NODES) * (1 + obs)))

    def step(self, actions):
        actions = np.asarray(actions, np.float64).reshape(self.num_envs, self.actions)
        if not np.isfinite(actions).all():
            lane = int(np.flatnonzero(~np.isfinite(actions).all(1))[0])
            raise ValueError(f"action of lane {lane} is not finite")
        obs, reward, terminated, truncated = (x.copy() for x in self.step_lanes(actions))
        return obs, reward, terminated, truncated, self.info(terminated | truncated, self.final_obs)

    def get_state(self) -> dict:
        names = ("u", "lane", "totals", "ints", "waves", "obs")
        return {k: torch.from_numpy(self.host(getattr(self, k)).copy()) for k in names} | {"seed": self.seed}

    def set_state(self, state: dict) -> np.ndarray:
        for name in ("u", "lane", "totals", "ints", "waves", "obs"):
            self.write(getattr(self, name), state[name].numpy())
        self.seed, self.was_reset = state["seed"], True
        return self.rows(self.obs).copy()


def make_vec(num_envs: int = 1, **kwargs) -> FreewayVectorEnv:
    """gymnasium.make_vec("cleanrl_crypto/Freeway-v0", num_envs=8, control="both", scheme="muscl", ...)."""
    return FreewayVectorEnv(num_envs, **kwargs)


class FreewayEnv(gym.Env):
    """One lane as an ordinary environment: gymnasium.make("cleanrl_crypto/Freeway-v0", control="both", ...)."""

    metadata = {"render_modes": []}

    def __init__(self, render_mode: None = None, **kwargs):
        self.render_mode = render_mode
        self.lane = FreewayVectorEnv(1, **kwargs)
        self.observation_space, self.action_space = self.lane.single_observation_space, self.lane.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        return self.lane.reset(seed=seed, options=options)[0][0], {}

    def step(self, action):
        obs, reward, terminated, truncated, info = self.lane.step(np.asarray(action)[None])
        obs = info["final_obs"][0] if "final_obs" in info else obs[0]
        return obs, float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}

    def close(self):
        self.lane.close()


if "cleanrl_crypto/Freeway-v0" not in gym.registry:  # __main__ and an import of it may be two modules
    gym.register("cleanrl_crypto/Freeway-v0", entry_point=FreewayEnv, vector_entry_point=make_vec)


def linear_law(env, kp, ki=0.0, k_in=0.0):
    """PI law on the outlet's density error (the inlet's where that is the only action), P law on the inlet's: gains are
    numbers or (N,) arrays. -> act(obs)."""
    total = np.zeros(env.num_envs)

    def act(obs):
        nonlocal total
        outlet, inlet = obs[:, NODES - 1].astype(np.float64), obs[:, 0].astype(np.float64)
        outlet = inlet if env.control == 1 else outlet  # the only end there is
        free = kp * outlet + ki * total
        # anti-windup: the integral rests while the action is saturated and the error would push it further
        grows = (np.abs(free) < 1) | (free * outlet < 0)
        total = total + np.where(grows, outlet * env.decision_interval, 0.0)
        first = np.clip(kp * outlet + ki * total, -1, 1)
        return np.stack([first, np.clip(k_in * inlet, -1, 1)][: env.actions], 1)

    return act


def backstepping_law(env):
    """Yu and Krstic (2019): full-state feedback for the flux at the outlet, the kernels of the linearised system."""
    x = np.arange(NODES) * DX
    rho_star, v_star, q_star = env.lanes(env.lane)[:3].astype(np.float64)[..., None]  # (N, 1)
    slope, behind = V_MAX * rho_star / RHO_MAX, v_star - V_MAX * rho_star / RHO_MAX  # p*, lambda_2
    kernel, grow = np.exp(-x / (RELAX * v_star)) / (slope * RELAX), np.exp(x / (RELAX * v_star))
    c_v, c_q = -kernel + behind / v_star * kernel * grow, (1 - behind / v_star) * kernel * grow

    def act(obs):
        rho, v = rho_star * (1 + obs[:, :NODES]), v_star * (1 + obs[:, NODES:])
        change = rho_star[:, 0] * np.trapezoid(c_v * (v - v_star), x) + np.trapezoid(c_q * (rho * v - q_star), x)
        action = np.zeros((env.num_envs, env.actions))
        action[:, 0] = np.clip(change / (SWING * q_star[:, 0]), -1, 1)
        return action

    return act


def tune_laws(env: FreewayVectorEnv) -> dict:
    """Gains of the P and PI laws that do best on 16 training waves, by grid search on env's lanes. {name: gains}."""
    n = min(16, env.num_envs)
    seats = max(1, env.num_envs // n)  # gains tried at once
    draw = np.random.default_rng(env.seed).random((3, n))
    low, high = np.array(TRAIN_WAVES).T[..., None]
    waves = np.tile(low + draw * (high - low), env.num_envs // n + 1)[:, : env.num_envs]

    def best(grid: np.ndarray) -> tuple:
        """grid (K, 3) of kp, ki, k_in -> its row of the highest return."""
        score = []
        for first in range(0, len(grid), seats):
            chosen = np.minimum(first + np.arange(env.num_envs) // n, len(grid) - 1)
            obs, _ = env.reset(options={"waves": waves})
            act = linear_law(env, *grid[chosen].T)
            for _ in range(env.length):
                obs, *_ = env.step_lanes(act(obs))
            score += list(env.final_stats["episode_return"][: seats * n].reshape(-1, n).mean(1))
        return tuple(grid[int(np.argmax(score[: len(grid)]))].tolist())

    both = env.actions == 2
    inlet = np.arange(-24, 25, 8.0) if both else [0.0]
    kp, _, k_in = best(np.array([(p, 0.0, e) for p in np.arange(-14, 15, 2.0) for e in inlet]))
    around = np.arange(-1.5, 2, 0.5)
    kp, _, k_in = best(np.array([(kp + p, 0.0, k_in + e) for p in around for e in (4 * around if both else [0.0])]))
    integral = np.array([0.001, 0.002, 0.005, 0.01, 0.02, 0.05])
    gains = [(kp * f, i, k_in) for f in (0.7, 0.8, 0.9, 1.0, 1.1) for i in (*-integral, 0.0, *integral)]
    pi = best(np.array(gains))
    env.reset(options={"waves": np.zeros((3, env.num_envs))})
    return {"p": (kp, 0.0, k_in), "pi": pi}


def freeway_baselines(env: FreewayVectorEnv) -> tuple[dict, dict]:
    """name -> make(env) -> act(obs), and the gains; tuned on training waves with env, the training environment."""
    gains = tune_laws(env)
    laws = {"constant": lambda env: lambda obs: np.zeros((env.num_envs, env.actions)),
            "p": lambda env: linear_law(env, *gains["p"]), "pi": lambda env: linear_law(env, *gains["pi"])}
    if env.control != 1:
        laws["backstepping"] = backstepping_law
    return laws, gains


# ------------------------------------------------------------------------------------------ networks: constants
TAU = (1.0, 1.5)  # s, relaxation
ALPHA = 0.6  # of a motorcycle's pressure: what a car counts
CREEP = 5 / 3.6  # m/s, motorcycles between standing cars
# p = K x (a + c x), x the weighted density over jam density: gap is V(0) - V for the Greenshields law
# singular is K x / (1 - x), and beyond x = TANGENT its tangent, so that a wave's speed has a bound
PRESSURES = {"power": (0.0, 1.0), "gap": (1.0, 0.0), "ancestor": (0.0, 1.0), "singular": (0.0, 0.0)}
TANGENT = 0.9
NET_BLOCK = 128  # most lanes that a CPU task simulates together
TRAIN_LEVELS = (1.0, 1.3)  # range of the demand level of a training episode
KNOT, BIN = 300.0, 60.0  # s between knots of the slow demand, and length of a bin of the fast one
DEMAND_SLOW, DEMAND_FAST = (0.4, 1.6), 0.5  # range of the knots' factor, half width of the bins'
START_FILL = 0.1  # largest share of jam density a segment starts with
FLOW, TIME, DIST = range(3)  # rows of Lanes' sums


# -------------------------------------------------------------------------------------------- networks: kernels
# Arithmetic is in the dtype of the state: a literal would make float32 float64, so that constants come in `law`.
def network_law(pressure: str, dtype, cfl: float) -> tuple:
    """The kernels' constants in the dtype of the state; the last one's length is the kind of pressure."""
    (a, c), f = PRESSURES[pressure], np.dtype(dtype).type
    thin = 1e-12 if f is np.float64 else 1e-5  # below it rounding makes w = (rho w) / rho meaningless
    values = 0, 1, 1e-30, thin, a, a / 2, c, 2 * c, 3 * c, ALPHA, CREEP, 10, 0.5, TANGENT, cfl
    return (*map(f, values), SINGULAR if pressure == "singular" else POWER)


@jit
def class_pressure_nb(x, k, law):
    """p (m/s) at x = (own density + cross * other density) / jam density."""
    zero, one, tiny, thin, a, half_a, c, c2, c3, alpha, creep, ten, half, tangent, cfl, kind = law
    if len(kind) == 3:
        u = one - tangent
        return k * x / (one - x) if x < tangent else k * (tangent / u + (x - tangent) / (u * u))
    return k * x * (a + c * x)


@jit
def class_slope_nb(x, k, law):
    """dp/dx, m/s."""
    zero, one, tiny, thin, a, half_a, c, c2, c3, alpha, creep, ten, half, tangent, cfl, kind = law
    if len(kind) == 3:
        u = one - (x if x < tangent else tangent)
        return k / (u * u)
    return k * (a + c2 * x)


@jit
def class_filling_nb(q, law):
    """x of pressure q K, q >= 0: the inverse of class_pressure_nb."""
    zero, one, tiny, thin, a, half_a, c, c2, c3, alpha, creep, ten, half, tangent, cfl, kind = law
    if len(kind) == 3:
        u = one - tangent
        x = q / (one + q)
        return x if x < tangent else tangent + (q - tangent / u) * u * u
    return q / (half_a + math.sqrt(half_a * half_a + c * q) + tiny)


@jit
def capacity_nb(w, b, k, law):
    """Own density over jam density at which rho (w - p) is largest, b the other class's share."""
    zero, one, tiny, thin, a, half_a, c, c2, c3, alpha, creep, ten, half, tangent, cfl, kind = law
    if len(kind) == 3:  # (1 + w / K) (1 - x)^2 = 1 - b
        free, u = one - (b if b < one else one), one - tangent
        x = one - math.sqrt(free / (one + w / k))
        y = x - b if x < tangent and b < tangent else half * ((w / k - tangent / u) * u * u + tangent - b)
        return y if y > zero else zero
    n = w / k - b * (a + c * b)
    n = n if n > zero else zero
    h = a + c2 * b
    return n / (h + math.sqrt(h * h + c3 * n) + tiny)


@jit
def class_demand_nb(y, b, v, w, k, law):
    """What a class can send over an interface, veh/s over jam density: min rule of DOMAIN, the other class frozen.

    y: own density / jam density; b: cross * other density / jam density; v, w, k in m/s.
    """
    y_c = capacity_nb(w, b, k, law)
    return y * v if y <= y_c else y_c * (w - class_pressure_nb(y_c + b, k, law))


@jit
def class_supply_nb(w, b, v, k, law):
    """What a class that arrives with w can enter where its vehicles drive v and the other class fills b."""
    y_c = capacity_nb(w, b, k, law)
    q = (w - v) / k
    y = class_filling_nb(q if q > law[0] else law[0], law) - b  # p(y + b) = w - v
    y = y if y > y_c else y_c
    return y * (w - class_pressure_nb(y + b, k, law))


@jit
def class_relax_nb(w, p, goal, gain, law):
    """Exact relaxation of v = w - p to `goal`, gain = 1 - exp(-dt / tau) -> (v, change of w).

    Overfilled (v < 0) where the goal is to stand, w stays: else those behind would drive off faster than Vmax later.
    With gain 0 nothing changes by a bit, so that a lane may wait for others of its block.
    """
    v = w - p
    change = (goal - v) * gain if (v >= law[0]) | (goal > law[0]) else law[0]
    v = v + change
    return (v if v > law[0] else law[0]), change


@jit
def goals_nb(y_m, y_c, v_m, v_c, law):
    """Equilibrium speeds (m/s). Motorcycles creep only where they have room: else a red light would pack them."""
    zero, one, alpha, creep, ten = law[0], law[1], law[9], law[10], law[11]
    g = one - y_m - y_c
    g = g if g > zero else zero
    room = (one - y_m - alpha * y_c) * ten
    room = room if room < one else one
    room = room if room > zero else zero
    return creep * room + (v_m - creep) * g, v_c * g


@jit
def cell_nb(r_m, r_c, q_m, q_c, gain_m, gain_c, inv_j, v_m, v_c, k_m, k_c, law):
    """Relax one cell: densities (veh/m) and rho w (veh/s) -> speeds, w, changes of w (m/s), bound of |lambda|."""
    thin, alpha = law[3], law[9]
    y_m, y_c = r_m * inv_j, r_c * inv_j
    x_m, x_c = y_m + alpha * y_c, y_m + y_c
    w_m = q_m / r_m if y_m > thin else v_m
    w_c = q_c / r_c if y_c > thin else v_c
    goal_m, goal_c = goals_nb(y_m, y_c, v_m, v_c, law)
    p_m, p_c = class_pressure_nb(x_m, k_m, law), class_pressure_nb(x_c, k_c, law)
    now_m, d_m = class_relax_nb(w_m, p_m, goal_m, gain_m, law)
    now_c, d_c = class_relax_nb(w_c, p_c, goal_c, gain_c, law)
    # trace of the 2 x 2 block rho_k dp_k/drho_j: above its larger eigenvalue, for both are >= 0
    back = y_m * class_slope_nb(x_m, k_m, law) + y_c * class_slope_nb(x_c, k_c, law)
    fast = now_m if now_m > now_c else now_c
    fast = fast if fast > goal_m else goal_m
    fast = fast if fast > goal_c else goal_c
    fast = fast if fast > back else back
    return now_m, now_c, w_m + d_m, w_c + d_c, d_m, d_c, fast


@jit
def interface_nb(r, other_l, other_r, v_l, w_l, v_r, inv_j, jam, k, law):
    """Godunov flux of one class (veh/s) between two states of a segment; other_*: cross * the other's density."""
    b_l, b_r = other_l * inv_j, other_r * inv_j
    demand = class_demand_nb(r * inv_j, b_l, v_l, w_l, k, law)
    supply = class_supply_nb(w_l, b_r, v_r, k, law)
    return (demand if demand < supply else supply) * jam


@jit
def upto_nb(before, here, after, law):
    """Value at the face between `here` and `after`: minmod's slope."""
    one, other = here - before, after - here
    small = one if abs(one) < abs(other) else other
    return here + law[12] * (small if one * other > law[0] else law[0])


@jit
def demand_factor_nb(seed, lane, episode, entry, second, low, high, jitter):
    """Demand over its mean: slow knots joined by lines, times a fast factor a bin; counter-based."""
    knot = int(second // KNOT)
    share = second / KNOT - knot
    first = uniform_nb(seed, lane, episode, 1 + entry * 8192 + knot)
    last = uniform_nb(seed, lane, episode, 2 + entry * 8192 + knot)
    fast = uniform_nb(seed, lane, episode, 4096 + entry * 8192 + int(second // BIN))
    return (low + (high - low) * (first + (last - first) * share)) * (1.0 + jitter * (2.0 * fast - 1.0))


@jit
def class_flux_nb(lanes, c, s, k, own, other, v, w, flow, mom, net, order, law):
    """Flux of class k (veh/s) between cells c and c + 1 of segment s -> flow (L,); of order 2 that of rho w -> mom too.

    Order 2 has minmod slopes of densities and speed, none in the first and the last cell of a segment.
    """
    first, par, n = net[0], net[7], c + 1
    inv_j, jam, stiff, cross = par[s, 0], par[s, 7], par[s, 5 + k], (law[9] if k == 0 else law[1])
    if len(order) == 1:
        for ln in range(lanes):
            flow[ln] = interface_nb(own[c, ln], cross * other[c, ln], cross * other[n, ln], v[c, ln], w[c, ln],
                                    v[n, ln], inv_j, jam, stiff, law)
    else:
        before, after = (c - 1 if c > first[s] else c), (n + 1 if n + 1 < first[s + 1] else n)
        for ln in range(lanes):
            r = upto_nb(own[before, ln], own[c, ln], own[n, ln], law)
            b_l = cross * upto_nb(other[before, ln], other[c, ln], other[n, ln], law)
            b_r = cross * upto_nb(other[after, ln], other[n, ln], other[c, ln], law)
            v_l = upto_nb(v[before, ln], v[c, ln], v[n, ln], law)
            v_r = upto_nb(v[after, ln], v[n, ln], v[c, ln], law)
            at_face = class_pressure_nb((r + b_l) * inv_j, stiff, law)
            inside = class_pressure_nb((own[c, ln] + cross * other[c, ln]) * inv_j, stiff, law)
            w_l = w[c, ln] + (v_l - v[c, ln]) + (at_face - inside)
            flow[ln] = interface_nb(r, b_l, b_r, v_l, w_l, v_r, inv_j, jam, stiff, law)
            mom[ln] = flow[ln] * w_l


@jit
def transport_nb(lanes, c, own, mom, w, new, new_mom, dt, inv_dx, flow_l, mom_l, flow_r, mom_r, lost, keep, order, law):
    """Cell c of one class after its fluxes, in place, or of order 2 into new, new_mom, `keep` of what they were.

    The right fluxes become the next cell's left ones; of first order their momentum is flow_r w.
    """
    zero, part = law[0], law[1] - keep
    for ln in range(lanes):
        h, out = dt[ln] * inv_dx, flow_r[ln] * w[c, ln] if len(order) == 1 else mom_r[ln]
        z = mom[c, ln] + h * (mom_l[ln] - out)
        r = own[c, ln] + h * (flow_l[ln] - flow_r[ln])
        low = r if r < zero else zero
        lost[ln] -= low
        if len(order) == 1:
            own[c, ln] = r - low
            mom[c, ln] = z
        else:
            new[c, ln] = keep * new[c, ln] + part * (r - low)
            new_mom[c, ln] = keep * new_mom[c, ln] + part * z
        flow_l[ln] = flow_r[ln]
        mom_l[ln] = out


@jit
def settle_nb(lanes, c, r_m, r_c, q_m, q_c, gain_m, gain_c, speed, s, par, law):
    """Relax cell c in place and raise `speed` (1/s) to its wave speed over dx."""
    inv_j, inv_dx, top_m, top_c, k_m, k_c = par[s, 0], par[s, 2], par[s, 3], par[s, 4], par[s, 5], par[s, 6]
    for ln in range(lanes):
        a, b = r_m[c, ln], r_c[c, ln]
        _, _, _, _, d_m, d_c, fast = cell_nb(
            a, b, q_m[c, ln], q_c[c, ln], gain_m[ln], gain_c[ln], inv_j, top_m, top_c, k_m, k_c, law)
        q_m[c, ln] += a * d_m
        q_c[c, ln] += b * d_c
        fast = fast * inv_dx
        speed[ln] = fast if fast > speed[ln] else speed[ln]


@jit
def junctions_nb(lanes, k, weight, own, other, v, w, want, share, in_flow, in_mom, s0, s1, dt, gate, queue, rate,
                 delay, time_, arrived, departed, lost, net, law):
    """Fluxes of class k over the ends of all segments: want (S, L) out, in_flow and in_mom (S, L) in.

    A stop line sends its demand, or nothing at red; an outgoing segment takes the share of it that its supply allows,
    at the flow-weighted mean of the incoming w; the smallest share of those it turns into holds for all (FIFO).
    weight: this stage's part of the time step, of which delay, time_ and the ledger are sums.
    """
    first, mov_in, mov_out, in_ptr, by_out, out_ptr, entry, par, beta = net
    zero, one, tiny, cross = law[0], law[1], law[2], (law[9] if k == 0 else law[1])
    for s in range(first.size - 1):
        c, inv_j, stiff, jam = first[s + 1] - 1, par[s, 0], par[s, 5 + k], par[s, 7]
        for ln in range(lanes):
            want[s, ln] = gate[s, ln] * jam * class_demand_nb(
                own[c, ln] * inv_j, cross * other[c, ln] * inv_j, v[c, ln], w[c, ln], stiff, law)
    for s in range(first.size - 1):
        c, e, inv_j, stiff, jam, top = first[s], entry[s], par[s, 0], par[s, 5 + k], par[s, 7], par[s, 3 + k]
        if e >= 0:
            for ln in range(lanes):
                step = dt[ln] if dt[ln] > zero else one
                s0[ln] = one * (queue[k, e, ln] / step + rate[k, e, ln])
            for ln in range(lanes):
                flow = jam * class_supply_nb(top, cross * other[c, ln] * inv_j, v[c, ln], stiff, law)
                flow = s0[ln] if s0[ln] < flow else flow
                in_flow[s, ln] = flow
                in_mom[s, ln] = flow * top
            for ln in range(lanes):
                came = dt[ln] * rate[k, e, ln]
                after = queue[k, e, ln] + came - dt[ln] * in_flow[s, ln]
                low = after if after < 0.0 else 0.0  # rounding
                queue[k, e, ln] = after - low
                lost[k, ln] -= weight * low
                arrived[k, ln] += weight * came
                delay[s, ln] += weight * dt[ln] * (after - low)
                time_[s, ln] += weight * dt[ln] * (after - low)
            continue
        for ln in range(lanes):
            s0[ln] = zero
            s1[ln] = zero
        for j in range(out_ptr[s], out_ptr[s + 1]):
            i, part = mov_in[by_out[j]], beta[k, by_out[j]]
            last = first[i + 1] - 1
            for ln in range(lanes):
                flow = part * want[i, ln]
                s0[ln] += flow
                s1[ln] += flow * w[last, ln]
        for ln in range(lanes):
            mean = s1[ln] / (s0[ln] + tiny)
            mean = mean if mean < top else top
            supply = jam * class_supply_nb(mean, cross * other[c, ln] * inv_j, v[c, ln], stiff, law)
            share[s, ln] = supply / (s0[ln] + tiny) if supply < s0[ln] else one
    for s in range(first.size - 1):
        for ln in range(lanes):
            s0[ln] = one
        for m in range(in_ptr[s], in_ptr[s + 1]):
            for ln in range(lanes):
                s0[ln] = share[mov_out[m], ln] if share[mov_out[m], ln] < s0[ln] else s0[ln]
        for ln in range(lanes):
            want[s, ln] = want[s, ln] * s0[ln]
        if in_ptr[s] == in_ptr[s + 1]:  # an exit
            for ln in range(lanes):
                departed[k, ln] += weight * dt[ln] * want[s, ln]
    for s in range(first.size - 1):
        if entry[s] < 0:
            top = par[s, 3 + k]
            for ln in range(lanes):
                in_flow[s, ln] = zero
                in_mom[s, ln] = zero
            for j in range(out_ptr[s], out_ptr[s + 1]):
                i, part = mov_in[by_out[j]], beta[k, by_out[j]]
                last = first[i + 1] - 1
                for ln in range(lanes):
                    flow = part * want[i, ln]
                    in_flow[s, ln] += flow
                    in_mom[s, ln] += flow * (w[last, ln] if w[last, ln] < top else top)  # no faster than its limit


@jit
def stage_nb(lanes, stage, cells, new, speeds, ends, work, queue, rate, sums, ledger, net, order, law):
    """One stage of a time step: new = cells after dt of transport; the last stage relaxes too.

    The first stage relaxes `cells` before (dt/2). FIRST has one stage, in place. SSPRK2's second stage leaves the mean
    of what `new` was, the state at the start, and of its own result, of queues too.
    """
    r_m, r_c, q_m, q_c = cells
    n_m, n_c, z_m, z_c = new if len(order) == 2 else cells
    v_m, v_c, w_m, w_c = speeds
    gate, out_m, out_c, share, in_m, in_c, mom_m, mom_c = ends
    dt, left, speed, gain_m, gain_c, f_m, f_c, g_m, g_c, s0, s1, s2, s3, lost_m, lost_c, none = work
    delay, time_, distance = sums
    arrived, departed, lost = ledger
    first, par, zero = net[0], net[7], law[0]
    weight, last = 1.0 / len(order), stage == len(order) - 1
    mean, start = len(order) == 2 and last, len(order) == 1 or stage == 0
    keep, relax_m, relax_c = law[12] if mean else zero, gain_m if start else none, gain_c if start else none
    for ln in range(lanes):
        none[ln] = zero
    for s in range(first.size - 1):
        inv_j, top_m, top_c, k_m, k_c = par[s, 0], par[s, 3], par[s, 4], par[s, 5], par[s, 6]
        for ln in range(lanes):
            s0[ln] = zero
            s1[ln] = zero
            s2[ln] = zero
        for c in range(first[s], first[s + 1]):
            for ln in range(lanes):
                a, b = r_m[c, ln], r_c[c, ln]
                now_m, now_c, big_m, big_c, d_m, d_c, _ = cell_nb(
                    a, b, q_m[c, ln], q_c[c, ln], relax_m[ln], relax_c[ln], inv_j, top_m, top_c, k_m, k_c, law)
                v_m[c, ln] = now_m
                v_c[c, ln] = now_c
                w_m[c, ln] = big_m
                w_c[c, ln] = big_c
                q_m[c, ln] += a * d_m
                q_c[c, ln] += b * d_c
            for ln in range(lanes):
                s0[ln] += r_m[c, ln] + r_c[c, ln]
                s1[ln] += r_m[c, ln] * v_m[c, ln]
                s2[ln] += r_c[c, ln] * v_c[c, ln]
        for ln in range(lanes):
            step = weight * dt[ln] * par[s, 1]
            delay[s, ln] += step * (s0[ln] - s1[ln] / top_m - s2[ln] / top_c)
            time_[s, ln] += step * s0[ln]
            distance[s, ln] += step * (s1[ln] + s2[ln])
    for k in range(2):
        own, other, v, w = (r_m, r_c, v_m, w_m) if k == 0 else (r_c, r_m, v_c, w_c)
        out, flow, mom = (out_m, in_m, mom_m) if k == 0 else (out_c, in_c, mom_c)
        if len(order) == 2 and stage == 0:
            for e in range(queue.shape[1]):
                for ln in range(lanes):
                    rate[2 + k, e, ln] = queue[k, e, ln]
        junctions_nb(lanes, k, weight, own, other, v, w, out, share, flow, mom, s0, s1, dt, gate, queue, rate, delay,
                     time_, arrived, departed, lost, net, law)
        if mean:
            for e in range(queue.shape[1]):
                for ln in range(lanes):
                    queue[k, e, ln] = rate[2 + k, e, ln] + 0.5 * (queue[k, e, ln] - rate[2 + k, e, ln])
    for s in range(first.size - 1):
        inv_dx, end = par[s, 2], first[s + 1] - 1
        for ln in range(lanes):
            f_m[ln] = in_m[s, ln]
            f_c[ln] = in_c[s, ln]
            g_m[ln] = mom_m[s, ln]
            g_c[ln] = mom_c[s, ln]
            lost_m[ln] = zero
            lost_c[ln] = zero
        for c in range(first[s], first[s + 1]):
            if c < end:
                class_flux_nb(lanes, c, s, 0, r_m, r_c, v_m, w_m, s0, s2, net, order, law)
                class_flux_nb(lanes, c, s, 1, r_c, r_m, v_c, w_c, s1, s3, net, order, law)
            else:
                for ln in range(lanes):
                    s0[ln] = out_m[s, ln]
                    s1[ln] = out_c[s, ln]
                    if len(order) == 2:
                        s2[ln] = out_m[s, ln] * w_m[c, ln]
                        s3[ln] = out_c[s, ln] * w_c[c, ln]
            transport_nb(lanes, c, r_m, q_m, w_m, n_m, z_m, dt, inv_dx, f_m, g_m, s0, s2, lost_m, keep, order, law)
            transport_nb(lanes, c, r_c, q_c, w_c, n_c, z_c, dt, inv_dx, f_c, g_c, s1, s3, lost_c, keep, order, law)
            if last:
                settle_nb(lanes, c, n_m, n_c, z_m, z_c, gain_m, gain_c, speed, s, par, law)
        for ln in range(lanes):
            lost[0, ln] += weight * lost_m[ln] * par[s, 1]
            lost[1, ln] += weight * lost_c[ln] * par[s, 1]


@jit
def advance_nb(lanes, duration, cells, half, speeds, ends, work, queue, rate, sums, ledger, stat, net, order, law):
    """Advance the lanes of these arrays by `duration` (s), every lane with time steps of its own.

    Real: cells = r_m, r_c (veh/m), q_m, q_c (rho w, veh/s), half: the same after a stage (order 2), speeds: scratch
    v_m, v_c, w_m, w_c, each (cells, L); ends = gate (0 at a red stop line, else 1) and scratch, each (segments, L);
    work: scratch, each (L,). float64: queue (2, entries, N) veh waiting outside, rate (4, entries, N) veh/s and
    scratch; sums = delay (veh s), time (veh s), distance (veh m), each (segments, N), entries with their queue; ledger
    = arrived, departed, lost (rounding), each (2, N) veh; stat = largest Courant number, steps, each (N,). Strang:
    relax dt/2, transport dt (Euler, or SSPRK2 where order is SECOND), relax dt/2.
    """
    r_m, r_c, q_m, q_c = cells
    dt, left, speed, gain_m, gain_c = work[:5]
    max_cfl, steps = stat
    first, par = net[0], net[7]
    zero, one, cfl = law[0], law[1], law[14]
    for ln in range(lanes):
        left[ln] = one * duration
        speed[ln] = zero
        gain_m[ln] = zero
        gain_c[ln] = zero
    for s in range(first.size - 1):
        for c in range(first[s], first[s + 1]):
            settle_nb(lanes, c, r_m, r_c, q_m, q_c, gain_m, gain_c, speed, s, par, law)
    while True:
        busy = False
        for ln in range(lanes):
            n = math.ceil(left[ln] * speed[ln] / cfl)
            n = n if n > 1 else 1
            dt[ln] = left[ln] / n
            left[ln] = left[ln] - dt[ln] if n > 1 else zero
            if dt[ln] > zero:
                busy = True
                steps[ln] += 1.0
                courant = dt[ln] * speed[ln]
                max_cfl[ln] = courant if courant > max_cfl[ln] else max_cfl[ln]
            gain_m[ln] = 1.0 - math.exp(-0.5 * dt[ln] / TAU[0])
            gain_c[ln] = 1.0 - math.exp(-0.5 * dt[ln] / TAU[1])
            speed[ln] = zero
        if not busy:
            break
        stage_nb(lanes, 0, cells, half, speeds, ends, work, queue, rate, sums, ledger, net, order, law)
        if len(order) == 2:
            stage_nb(lanes, 1, half, cells, speeds, ends, work, queue, rate, sums, ledger, net, order, law)


@jit
def signals_nb(lanes, action, phase, age, switches, n_phases, all_red, min_green):
    """Take the phase decisions of these lanes: action (junctions, L) int64, the phase asked for.

    A request counts once the phase has been green for min_green seconds. age (s) runs from the switch.
    """
    for g in range(n_phases.size):
        for ln in range(lanes):
            asked = action[g, ln]
            if asked != phase[g, ln] and 0 <= asked < n_phases[g] and age[g, ln] >= all_red + min_green:
                phase[g, ln] = asked
                age[g, ln] = 0.0
                switches[ln] += 1.0


@jit
def gates_nb(lanes, gate, phase, age, signal, green, all_red, law):
    """gate (segments, L): 0 where a signal shows red or all-red, else 1. green (segments,): bit p is phase p."""
    for s in range(signal.size):
        for ln in range(lanes):
            g = signal[s]
            is_open = g < 0 or (age[g, ln] >= all_red and (green[s] >> phase[g, ln]) & 1 == 1)
            gate[s, ln] = law[1] if is_open else law[0]


@jit
def zones_nb(lanes, r_m, r_c, q_m, q_c, still, zones, zone_of, weight, net, law):
    """zones (6, segments, L) <- mean filling (share of jam density) in three zones, near first, then mean standing."""
    first, par, one = net[0], net[7], law[1]
    for s in range(first.size - 1):
        inv_j, top_m, top_c, k_m, k_c = par[s, 0], par[s, 3], par[s, 4], par[s, 5], par[s, 6]
        for z in range(6):
            for ln in range(lanes):
                zones[z, s, ln] = law[0]
        for c in range(first[s], first[s + 1]):
            z, share = zone_of[c], weight[c] * inv_j
            for ln in range(lanes):
                a, b = r_m[c, ln], r_c[c, ln]
                now_m, now_c, _, _, _, _, _ = cell_nb(
                    a, b, q_m[c, ln], q_c[c, ln], law[0], law[0], inv_j, top_m, top_c, k_m, k_c, law)
                zones[z, s, ln] += share * (a + b)
                still[ln] = share * (a * (one - now_m / top_m) + b * (one - now_c / top_c))
            for ln in range(lanes):
                zones[3 + z, s, ln] += still[ln]


@jit
def decide_nb(lanes, action, cells, half, speeds, ends, work, rate, state, sums, ledger, stat, zones, episode, rules,
              seed, data, net, order, law):
    """One decision interval of these lanes: signals, demand, traffic, what is observed. Arrays: NetworkVectorEnv."""
    phase, age, queue, clock, levels = state
    n_phases, signal, green, base, zone_of, weight = data
    interval, all_red, min_green, low, high, jitter = rules
    delay, time_, distance = sums
    for ln in range(lanes):
        for s in range(signal.size):
            delay[s, ln] = 0.0
            time_[s, ln] = 0.0
            distance[s, ln] = 0.0
        lane, number, second = clock[2, ln], clock[1, ln], clock[0, ln] * interval
        level = levels[0, ln] + (levels[1, ln] - levels[0, ln]) * uniform_nb(seed, lane, number, 0)
        for e in range(base.shape[1]):
            factor = level * demand_factor_nb(seed, lane, number, e, second, low, high, jitter)
            rate[0, e, ln] = base[0, e] * factor
            rate[1, e, ln] = base[1, e] * factor
    signals_nb(lanes, action, phase, age, episode[3], n_phases, all_red, min_green)
    part = all_red if all_red < interval else interval
    for _ in range(2):
        if part > 0.0:
            gates_nb(lanes, ends[0], phase, age, signal, green, all_red, law)
            advance_nb(lanes, part, cells, half, speeds, ends, work, queue, rate, sums, ledger, stat, net, order, law)
            for g in range(n_phases.size):
                for ln in range(lanes):
                    age[g, ln] += part
        part = interval - part
    zones_nb(lanes, cells[0], cells[1], cells[2], cells[3], work[9], zones, zone_of, weight, net, law)
    for ln in range(lanes):
        clock[0, ln] += 1
        for s in range(signal.size):
            episode[0, ln] += delay[s, ln]
            episode[1, ln] += time_[s, ln]
            episode[2, ln] += distance[s, ln]


@jit
def blank_nb(rows, n, like):
    return np.zeros((rows, n), like.dtype)


@jit
def four_nb(rows, n, like):
    return blank_nb(rows, n, like), blank_nb(rows, n, like), blank_nb(rows, n, like), blank_nb(rows, n, like)


@jit
def load_nb(array, a, b):
    """Columns a to b of array (rows, N), an array of their own."""
    part = np.empty((array.shape[0], b - a), array.dtype)
    for i in range(array.shape[0]):
        for j in range(b - a):
            part[i, j] = array[i, a + j]
    return part


@jit
def store_nb(array, a, part):
    """load_nb's way back."""
    for i in range(part.shape[0]):
        for j in range(part.shape[1]):
            array[i, a + j] = part[i, j]


@jit
def decide_block_nb(a, b, action, u, state, sums, ledger, stat, zones, episode, rules, seed, data, net, order, law):
    """Lanes a to b: their state into arrays of their own, one decision, and back."""
    phase, age, queue, clock, levels = state
    n, like, cells, segments = b - a, u[0], u.shape[1], sums.shape[1]
    # apart from each other: what is a row of one array, the compiler does not vectorise for fear of overlap
    now = load_nb(u[0], a, b), load_nb(u[1], a, b), load_nb(u[2], a, b), load_nb(u[3], a, b)
    half, speeds = four_nb(cells if len(order) == 2 else 0, n, like), four_nb(cells, n, like)
    ends = four_nb(segments, n, like) + four_nb(segments, n, like)
    w, x, y, z = four_nb(4, n, like)
    work = (w[0], w[1], w[2], w[3], x[0], x[1], x[2], x[3], y[0], y[1], y[2], y[3], z[0], z[1], z[2], z[3])
    q, rate = np.empty((2, queue.shape[1], n)), np.empty((4, queue.shape[1], n))
    here = load_nb(phase, a, b), load_nb(age, a, b), q, load_nb(clock, a, b), load_nb(levels, a, b)
    total = load_nb(sums[0], a, b), load_nb(sums[1], a, b), load_nb(sums[2], a, b)
    book = load_nb(ledger[0], a, b), load_nb(ledger[1], a, b), load_nb(ledger[2], a, b)
    seen, part, ep = np.empty((6, segments, n), like.dtype), load_nb(stat, a, b), load_nb(episode, a, b)
    for k in range(2):
        for e in range(queue.shape[1]):
            for j in range(n):
                q[k, e, j] = queue[k, e, a + j]
    decide_nb(n, load_nb(action, a, b), now, half, speeds, ends, work, rate, here, total, book, (part[0], part[1]),
              seen, ep, rules, seed, data, net, order, law)
    for k in range(4):
        store_nb(u[k], a, now[k])
    for k in range(3):
        store_nb(sums[k], a, total[k])
        store_nb(ledger[k], a, book[k])
    for k in range(2):
        store_nb(queue[k], a, q[k])
    for k in range(6):
        store_nb(zones[k], a, seen[k])
    store_nb(phase, a, here[0])
    store_nb(age, a, here[1])
    store_nb(clock, a, here[3])
    store_nb(stat, a, part)
    store_nb(episode, a, ep)


@nb.njit(parallel=True, cache=True, error_model="numpy")
def decide_network_cpu(block, action, u, state, sums, ledger, stat, zones, episode, rules, seed, data, net, order,
                       numbers, kind):
    """All lanes, in blocks that a core's cache holds, lanes innermost. Arrays as in NetworkVectorEnv."""
    lanes = u.shape[2]
    for i in nb.prange((lanes + block - 1) // block):
        decide_block_nb(i * block, min((i + 1) * block, lanes), action, u, state, sums, ledger, stat, zones, episode,
                        rules, seed, data, net, order, numbers + (kind,))


def cuda_decide():
    """decide_network_cpu on the GPU, one thread a lane; scratch: 8 x (cells, N), 8 x (segments, N), 16 x (N,), rates.

    What takes arrays is compiled again for the device, from the same code; scalar functions are called as they are.
    """
    names = {}
    for f in (
            class_flux_nb, transport_nb, settle_nb, junctions_nb, stage_nb, advance_nb, signals_nb, gates_nb, zones_nb,
            decide_nb):
        f = getattr(f, "py_func", f)  # NUMBA_DISABLE_JIT=1 leaves the function itself
        names[f.__name__] = cuda.jit(device=True)(types.FunctionType(f.__code__, globals() | names))
    one = names["decide_nb"]

    @cuda.jit
    def decide_cuda(
            action, u, x, y, z, rate, state, sums, ledger, stat, zones, episode, rules, seed, data, net, order,
            numbers, kind):
        ln = cuda.grid(1)
        if ln < u.shape[2]:
            m = ln + 1
            cells = (u[0, :, ln:m], u[1, :, ln:m], u[2, :, ln:m], u[3, :, ln:m])
            speeds = (x[0, :, ln:m], x[1, :, ln:m], x[2, :, ln:m], x[3, :, ln:m])
            half = (x[4, :, ln:m], x[5, :, ln:m], x[6, :, ln:m], x[7, :, ln:m])
            ends = (y[0, :, ln:m], y[1, :, ln:m], y[2, :, ln:m], y[3, :, ln:m], y[4, :, ln:m], y[5, :, ln:m],
                    y[6, :, ln:m], y[7, :, ln:m])
            work = (z[0, ln:m], z[1, ln:m], z[2, ln:m], z[3, ln:m], z[4, ln:m], z[5, ln:m], z[6, ln:m], z[7, ln:m],
                    z[8, ln:m], z[9, ln:m], z[10, ln:m], z[11, ln:m], z[12, ln:m], z[13, ln:m], z[14, ln:m],
                    z[15, ln:m])
            phase, age, queue, clock, levels = state
            here = (phase[:, ln:m], age[:, ln:m], queue[:, :, ln:m], clock[:, ln:m], levels[:, ln:m])
            one(1, action[:, ln:m], cells, half, speeds, ends, work, rate[:, :, ln:m], here,
                (sums[0, :, ln:m], sums[1, :, ln:m], sums[2, :, ln:m]),
                (ledger[0, :, ln:m], ledger[1, :, ln:m], ledger[2, :, ln:m]), (stat[0, ln:m], stat[1, ln:m]),
                zones[:, :, ln:m], episode[:, ln:m], rules, seed, data, net, order, numbers + (kind,))

    return decide_cuda


@jit
def start_nb(lanes, u, state, ledger, episode, rules, seed, net, fill, stagger):
    """Begin the next episode of these lanes: random filling below `fill`, the first phase, nobody outside."""
    phase, age, queue, clock, levels = state
    first, par = net[0], net[7]
    for ln in lanes:
        clock[0, ln] = stagger[ln]
        phase[:, ln] = 0
        age[:, ln] = rules[1] + rules[2]
        queue[:, :, ln] = 0.0
        ledger[:, :, ln] = 0.0
        episode[:, ln] = 0.0
        for s in range(first.size - 1):
            y = fill * uniform_nb(seed, clock[2, ln], clock[1, ln], (1 << 40) + s)
            share = uniform_nb(seed, clock[2, ln], clock[1, ln], (1 << 41) + s)  # of motorcycles
            for c in range(first[s], first[s + 1]):
                r_m, r_c = y * share * par[s, 7], y * (1.0 - share) * par[s, 7]
                u[0, c, ln], u[1, c, ln] = r_m, r_c
                u[2, c, ln], u[3, c, ln] = r_m * par[s, 3], r_c * par[s, 4]
                ledger[3, 0, ln] += u[0, c, ln] * par[s, 1]
                ledger[3, 1, ln] += u[1, c, ln] * par[s, 1]


@nb.njit(parallel=True, cache=True, error_model="numpy")
def observe_cpu(obs, lanes, zones, queue, phase, age, clear, approach, exits, entry, signal, green, n_phases, mov_in,
                by_out, out_ptr, beta, names):
    """obs (N, junctions, D) float32 of these lanes: what one junction sees. Layout: NetworkVectorEnv."""
    for n in nb.prange(lanes.size):
        ln = lanes[n]
        for g in range(approach.shape[0]):
            d = 0
            for k in range(approach.shape[1]):
                s = approach[g, k]
                if s >= 0:
                    for z in range(6):
                        obs[ln, g, d + z] = zones[z, s, ln]
                    if entry[s] >= 0:
                        obs[ln, g, d + 6] = 0.1 * (queue[0, entry[s], ln] + queue[1, entry[s], ln])
                    obs[ln, g, d + 7] = (green[s] >> phase[g, ln]) & 1
                    for j in range(out_ptr[s], out_ptr[s + 1]):  # who may be on the way here
                        i = mov_in[by_out[j]]
                        if signal[i] >= 0 and (green[i] >> phase[signal[i], ln]) & 1 == 1:
                            obs[ln, g, d + 8] += beta[1, by_out[j]] * zones[0, i, ln]
                        else:
                            obs[ln, g, d + 9] += beta[1, by_out[j]] * zones[0, i, ln]
                d += 10
            for k in range(exits.shape[1]):
                if exits[g, k] >= 0:
                    for z in range(3):
                        obs[ln, g, d + z] = zones[z, exits[g, k], ln]
                d += 3
            obs[ln, g, d + phase[g, ln]] = 1.0
            d += n_phases
            obs[ln, g, d] = min(age[g, ln] / 60.0, 2.0)
            obs[ln, g, d + 1] = age[g, ln] >= clear
            if names:
                obs[ln, g, d + 2 + g] = 1.0


@jit
def pay_nb(pay, delay, reward):
    """reward (N, junctions) -= pay (junctions, S) @ delay (S, N), summed in one order whatever N is (BLAS does not)."""
    for g in range(pay.shape[0]):
        for s in range(pay.shape[1]):
            if pay[g, s] != 0.0:
                for ln in range(delay.shape[1]):
                    reward[ln, g] -= pay[g, s] * delay[s, ln]


# ------------------------------------------------------------------------------------- networks: environment
class NetworkVectorEnv(Lanes):
    """Lanes of signalised traffic; the junctions of a lane are agents that share one network. Same-step autoreset.

    Observation (agents, D) float32 a lane. For up to A approaches: filling of its last 50 m, of the next 100 and of the
    rest, what stands there, vehicles waiting outside / 10, is it green, filling that may come through an open and
    through a closed stop line; up to A exits: filling of the three zones; then the phase (one-hot), its age / 60 s,
    whether a request counts now and, up to 16 junctions, which junction it is (one-hot). Action: the phase of every
    junction, asked for each `interval` seconds. Reward: minus the delay (veh s) of the interval, by junction: of the
    segments that end there, and of exits that begin there; `team` of it shared evenly. Its sum is the lane's.
    """

    builds = 0

    def __init__(
        self, num_envs: int = 1, network: Network | str = "corridor", interval: float = 15.0, seconds: float = 450.0,
        level: tuple[float, float] = (1.0, 1.0), slow: tuple[float, float] = DEMAND_SLOW, jitter: float = DEMAND_FAST,
        fill: float = START_FILL, all_red: float = 4.0, min_green: float = 6.0, team: float = 0.0,
        seed: int = 1, dtype: str = "float32", backend: str = "cpu", lane0: int = 0, cases: str | None = None,
        pressure: str = "power", scheme: str = "godunov", cfl: float | None = None, dx: float = CELL_LENGTH,
        block: int | None = None,
    ):
        NetworkVectorEnv.builds += 1
        net = self.network = find_network(network, pressure, dx)
        steps = seconds / interval
        if not interval > 0 or steps != round(steps) or (all_red > interval and all_red % interval):
            raise ValueError(f"interval {interval} s must divide the episode's {seconds} s and, if it is shorter, the "
                             f"all-red time of {all_red} s")
        if not len(net.n_phases):
            raise NetworkError(f"{net.name}: no signal to control")
        self.num_envs, self.interval, self.length = num_envs, interval, int(steps)
        self.block = block or min(NET_BLOCK, -(-num_envs // nb.get_num_threads()))
        self.backend, self.seed, self.was_reset, self.sim_seconds = backend, seed, False, 0.0
        self.dtype, self.team, self.fill = np.dtype(dtype), team, fill
        self.agents, n_seg, entries = len(net.n_phases), len(net.ends), net.base.shape[1]
        self.rules = (float(interval), float(all_red), float(min_green), *map(float, slow), float(jitter))
        self.order = {"godunov": FIRST, "muscl": SECOND}[scheme]
        self.law = network_law(pressure, self.dtype, cfl or CFL[scheme])
        static = (net.first, *net.moves, net.entry, net.par.astype(self.dtype), net.beta.astype(self.dtype))
        self.data = (net.n_phases, net.signal, net.green, net.base, net.zone_of, net.weight.astype(self.dtype))
        self.host_data, self.host_net, self.net = self.data, static, static
        self.lease = pool.lease()
        take = partial(self.lease.acquire, device=backend)
        real, n = self.dtype, num_envs
        self.u = take((4, net.first[-1], n), real)
        self.phase, self.age = take((self.agents, n), np.int64), take((self.agents, n), float)
        self.clock = take((3, n), np.int64)
        self.queue, self.levels = take((2, entries, n), float), take((2, n), float)
        self.zones = take((6, n_seg, n), real)
        self.sums, self.ledger = take((3, n_seg, n), float), take((4, 2, n), float)
        self.stat, self.episode = take((2, n), float), take((4, n), float)
        self.action = take((self.agents, n), np.int64)
        self.state = (self.phase, self.age, self.queue, self.clock, self.levels)
        if backend == "cuda":
            cells = net.first[-1]
            self.scratch = tuple(take(shape, kind) for shape, kind in (
                ((8, cells, n), real), ((8, n_seg, n), real), ((16, n), real), ((4, entries, n), float)))
            self.data, self.net = to_device(self.data), to_device(self.net)
            self.kernel = cuda_decide()[(n + 63) // 64, 64]
        self.stagger = np.zeros(n, np.int64)
        self.lane_id, self.splits = np.arange(lane0, lane0 + n), {}
        low_high = np.repeat(np.array(level, float)[:, None], n, 1)
        if cases == "eval":
            low_high, self.lane_id, self.splits = self.eval_cases(n)
        elif cases is not None:
            raise ValueError(f"cases {cases!r}: must be eval or None")
        self.write(self.levels, low_high)
        self.layout()

    @staticmethod
    def eval_cases(n: int):
        """A fifth of the lanes to choose by, then two fifths of other seeds at each of 1.0 and 1.3 times the demand."""
        k = n // 5
        if n < 5 or n % 5:
            raise ValueError(f"num_envs {n}: evaluation lanes come in fifths (1 selects, 2 demand x1.0, 2 demand x1.3)")
        unseen = (1 << 20) + np.arange(2 * k)
        level = np.r_[np.where(np.arange(k) % 2, 1.3, 1.0), np.ones(2 * k), np.full(2 * k, 1.3)]
        lane_id = (1 << 32) + np.r_[np.arange(k), unseen, unseen]
        splits = {"eval": slice(0, k), "x1.0": slice(k, 3 * k), "x1.3": slice(3 * k, n)}
        return np.stack((level, level)), lane_id, splits

    def layout(self):
        """Which segments a junction sees and pays for; spaces."""
        net, g_all = self.network, self.agents
        approach = [[s for s in range(len(net.ends)) if net.signal[s] == g] for g in range(g_all)]
        exits = [[s for s, (a, _) in enumerate(net.ends) if a == node] for node in net.nodes]
        width = max(map(len, approach + exits))

        def padded(rows):
            return np.array([row + [-1] * (width - len(row)) for row in rows], np.int64)

        self.approach, self.exits = padded(approach), padded(exits)
        self.pay = np.zeros((g_all, len(net.ends)))
        for s, (a, _) in enumerate(net.ends):
            owner = net.signal[s] if net.signal[s] >= 0 else net.nodes.index(a) if a in net.nodes else -1
            self.pay[:, s] = (np.arange(g_all) == owner) if owner >= 0 else 1 / g_all
        self.pay = (1 - self.team) * self.pay + self.team / g_all
        self.names, phases = g_all <= 16, int(net.n_phases.max())
        self.held = 13 * width  # column where the phase begins
        self.row_obs = self.held + phases + 2 + g_all * self.names
        self.row_action = gym.spaces.MultiDiscrete([phases])
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (g_all, self.row_obs), np.float32)
        self.single_action_space = gym.spaces.MultiDiscrete(net.n_phases)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, self.num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, self.num_envs)
        self.obs = np.zeros((self.num_envs, g_all, self.row_obs), np.float32)
        self.last_obs = np.zeros_like(self.obs)
        self.obs_scale, self.everyone = 1.0, np.arange(self.num_envs)
        self.final_stats = {}

    def start(self, lanes):
        """The next episode of these lanes (the first where the clock's episode is set so)."""
        parts = (self.u, *self.state, self.ledger, self.episode)
        host = [self.host(x) for x in parts]
        start_nb(lanes, host[0], tuple(host[1:6]), host[6], host[7], self.rules, self.seed, self.host_net,
                 self.fill, self.stagger)
        stat = self.host(self.stat)
        stat[0, lanes] = 0.0  # the largest Courant number is an episode's, the steps are counted on
        if self.backend == "cuda":
            for array, values in zip((*parts, self.stat), (*host, stat)):
                self.write(array, values)

    def observe(self, lanes) -> np.ndarray:
        net = self.network
        self.obs[lanes] = 0.0
        mov_in, _, _, by_out, out_ptr = net.moves
        in_blocks(observe_cpu, -(-len(lanes) // self.block), self.obs, lanes, self.host(self.zones),
                  self.host(self.queue), self.host(self.phase), self.host(self.age), self.rules[1] + self.rules[2],
                  self.approach, self.exits, net.entry, net.signal, net.green, int(net.n_phases.max()), mov_in, by_out,
                  out_ptr, net.beta, self.names)
        return self.obs

    def look(self, lanes):
        """Zones of lanes that have just begun."""
        u, zones = self.host(self.u), self.host(self.zones)
        part = np.empty((6, zones.shape[1], len(lanes)), self.dtype)
        zones_nb(len(lanes), *(np.ascontiguousarray(x[:, lanes]) for x in u), np.empty(len(lanes), self.dtype), part,
                 self.network.zone_of, self.host_data[5], self.host_net, self.law)
        zones[:, :, lanes] = part
        self.write(self.zones, zones)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """All lanes to their first (seed given) or next episode -> obs (N, agents, D); builds nothing.

        options {"stagger": True}: first episodes of every length, so that every rollout holds every part of an episode.
        """
        clock = self.host(self.clock)
        if seed is not None:
            self.seed = int(seed)
        clock[1] = 0 if seed is not None or not self.was_reset else clock[1] + 1
        clock[2] = self.lane_id
        late = bool(options and options.get("stagger"))  # golden ratio: even, whatever share of the lanes is here
        self.stagger = (self.lane_id * 0.6180339887498949 % 1 * self.length * late).astype(np.int64)
        self.write(self.clock, clock)
        self.was_reset = True
        self.start(self.everyone)
        self.look(self.everyone)
        return self.observe(self.everyone).copy(), {}

    def stats(self) -> dict:
        """Of every lane's episode up to now: (N,) float64 each."""
        episode, ledger, par = self.host(self.episode), self.host(self.ledger), self.network.par
        u, first = self.host(self.u), self.network.first
        dx = np.repeat(par[:, CELL], np.diff(first))
        stored = np.einsum("kcn,c->kn", u[:2].astype(float), dx) + self.host(self.queue).sum(1)
        came = ledger[3] + ledger[0]
        error = np.abs(stored + ledger[1] - came - ledger[2]).sum(0) / np.maximum(came.sum(0), 1e-9)
        return {"episode_return": -episode[0], "delay_veh_s": episode[0].copy(), "throughput_veh": ledger[1].sum(0),
                "mean_speed": episode[2] / np.maximum(episode[1], 1e-9), "switches": episode[3].copy(),
                "mass_error": error, "max_cfl": self.host(self.stat)[0].copy(),
                "episode_length": self.host(self.clock)[0].astype(float)}

    running_stats = stats

    def seconds_of_inflow(self) -> float:
        """What entered since the start of the episode, in seconds of the demand that its first decision draws."""
        low, high, seed = *self.host(self.levels), self.seed
        clock, base, entries = self.host(self.clock), self.network.base.sum(0), range(self.network.base.shape[1])
        level = [a + (b - a) * uniform_nb(seed, *lane, 0) for a, b, lane in zip(low, high, zip(clock[2], clock[1]))]
        rate = [x * sum(base[e] * demand_factor_nb(seed, lane, number, e, 0.0, *self.rules[3:]) for e in entries)
                for x, lane, number in zip(level, clock[2], clock[1])]
        entered = self.host(self.ledger)[0].sum(0) - self.host(self.queue).sum((0, 1))
        return float((entered / np.maximum(rate, 1e-9)).mean())

    def step_lanes(self, actions):
        """One interval. actions (rows,) or (rows, 1) int64, rows = lane * agents + agent.

        -> obs (rows, D) float32, reward (rows,) float64, terminated, truncated (rows,) bool; all are overwritten by the
        next call. final_obs (rows, D) and final_stats hold the ends of the episodes of truncated lanes.
        """
        begin = time.perf_counter()
        actions = np.asarray(actions, np.int64).reshape(self.num_envs, self.agents)
        self.write(self.action, actions.T)
        if self.backend == "cuda":
            self.kernel(self.action, self.u, *self.scratch, self.state, self.sums, self.ledger, self.stat, self.zones,
                        self.episode, self.rules, self.seed, self.data, self.net, self.order, self.law[:-1],
                        self.law[-1])
        else:
            in_blocks(decide_network_cpu, -(-self.num_envs // self.block), self.block, self.action, self.u, self.state,
                      self.sums, self.ledger, self.stat, self.zones, self.episode, self.rules, self.seed, self.data,
                      self.net, self.order, self.law[:-1], self.law[-1])
        delay = self.host(self.sums)[0]
        if not np.isfinite(delay).all():
            s, lane = np.argwhere(~np.isfinite(delay))[0]
            raise FloatingPointError(
                f"lane {lane}, segment {' > '.join(self.network.ends[s])}: delay is {delay[s, lane]}")
        reward = np.zeros((self.num_envs, self.agents))
        pay_nb(self.pay, delay, reward)
        reward = reward.reshape(-1)
        self.observe(self.everyone)
        clock = self.host(self.clock)
        done = clock[0] >= self.length
        self.done = done
        if done.any():
            lanes = np.flatnonzero(done)
            self.last_obs[lanes] = self.obs[lanes]
            self.final_stats = self.stats()
            clock[1, lanes] += 1
            self.stagger[lanes] = 0
            self.write(self.clock, clock)
            self.start(lanes)
            self.look(lanes)
            self.observe(lanes)
        truncated = np.repeat(done, self.agents)
        self.sim_seconds = max(self.sim_seconds, time.perf_counter() - begin)
        return self.obs.reshape(-1, self.row_obs), reward, np.zeros_like(truncated), truncated

    @property
    def final_obs(self) -> np.ndarray:
        return self.last_obs.reshape(-1, self.row_obs)

    def step(self, actions):
        """Gymnasium's step: actions (N, agents) -> obs (N, agents, D), reward (N,) of all junctions together."""
        actions = np.asarray(actions)
        shape, phases = (self.num_envs, self.agents), self.network.n_phases
        if actions.shape != shape or (actions < 0).any() or (actions >= phases).any():
            raise ValueError(f"actions must be {shape} phases below {phases}")
        obs, reward, terminated, truncated = self.step_lanes(actions)
        done = self.done.copy()
        info = self.info(done, self.last_obs)
        return self.obs.copy(), reward.reshape(self.num_envs, -1).sum(1), np.zeros_like(done), done, info

    def get_state(self) -> dict:
        names = ("u", "phase", "age", "queue", "clock", "levels", "zones", "ledger", "episode", "stat")
        state = {name: torch.from_numpy(self.host(getattr(self, name)).copy()) for name in names}
        return state | {"stagger": torch.from_numpy(self.stagger.copy()), "seed": self.seed}

    def set_state(self, state: dict):
        for name, values in state.items():
            if name not in ("stagger", "seed"):
                self.write(getattr(self, name), values.numpy())
        self.stagger, self.seed, self.was_reset = state["stagger"].numpy().copy(), state["seed"], True
        self.observe(self.everyone)

    def trace(self) -> dict:
        """What a picture of lane 0 needs: phase of each junction, vehicles inside and outside."""
        inside = (self.counts()[:, 0]).sum()
        return {f"phase_{node}": p for node, p in zip(self.network.nodes, self.host(self.phase)[:, 0])} | {
            "inside_veh": inside, "outside_veh": self.host(self.queue)[:, :, 0].sum()}

    def counts(self, standing: bool = False) -> np.ndarray:
        """Vehicles (or of those, what stands) on each segment, (segments, N)."""
        zones = self.host(self.zones)[3:] if standing else self.host(self.zones)[:3]
        return np.einsum("zsn,zs->sn", zones, self.network.zone_length * self.network.par[:, JAM])

    def baselines(self, train_env=None) -> dict:
        """name -> make(env) -> act(obs): the controllers of the literature, with constants tuned on training seeds."""
        return {name: partial(by_level, name) for name in CONTROLLERS}


def to_device(data):
    return tuple(cuda.to_device(x) for x in data)


# --------------------------------------------------------------------------------------- networks: baselines
def fixed_cycle(env: NetworkVectorEnv, cycle: float, share: float, speed: float):
    """Phase 0 for `share` of a cycle (s), a green wave of `speed` (m/s, 0: all together) along the junctions' order."""
    net = env.network
    reach = np.zeros(env.agents)
    for g in range(1, env.agents):
        pair = (net.nodes[g - 1], net.nodes[g])
        reach[g] = reach[g - 1] + (net.lengths[net.ends.index(pair)] if pair in net.ends else 0.0)
    offset = reach / speed if speed else 0.0 * reach
    share = np.broadcast_to(np.asarray(share, float), env.agents)[:, None]
    others = net.n_phases[:, None] - 1

    def act(obs):
        at = (env.host(env.clock)[0] * env.interval - offset[:, None]) % cycle / cycle
        later = 1 + np.floor((at - share) / (1 - share) * others).astype(np.int64)
        return np.where(at < share - 1e-9, 0, np.minimum(later, others)).T.reshape(-1, 1)

    return act


def webster_plan(flows, saturation: float, lost: float) -> tuple[float, np.ndarray]:
    """Webster (1958): critical flow ratios y_i = flows / saturation (phases,), lost time (s) -> cycle, greens (s).

    C0 = (1.5 L + 5) / (1 - Y), g_i = y_i / Y (C0 - L). ValueError where Y >= 1: no cycle serves that.
    """
    y = np.asarray(flows, float) / saturation
    if y.sum() >= 1:
        raise ValueError(f"flow ratios {y.round(3).tolist()} add up to {y.sum():.3f}: no cycle serves 1 or more")
    cycle = (1.5 * lost + 5.0) / (1.0 - y.sum())
    return cycle, y / y.sum() * (cycle - lost)


def mean_flows(net: Network) -> np.ndarray:
    """Mean flow (veh/s) of every segment when nothing queues for ever: entries' demand passed on by turning shares."""
    total = np.zeros((2, len(net.ends)))
    total[:, net.entry >= 0] = net.base[:, net.entry[net.entry >= 0]]
    source, (mov_in, mov_out) = total.copy(), net.moves[:2]
    for _ in range(10 * len(net.ends)):
        after = source.copy()
        for k in range(2):
            np.add.at(after[k], mov_out, net.beta[k] * total[k, mov_in])
        if np.abs(after - total).max() < 1e-12:
            break
        total = after
    return total.sum(0)


def webster(env: NetworkVectorEnv, level: float, saturation: float, speed: float):
    """Webster's plan for `level` times the mean demand; one cycle for all, the busiest junction's.

    saturation: flow of a green over jam density times limit."""
    net, flows, plans = env.network, mean_flows(env.network) * level, []
    for g in range(env.agents):
        mine = np.flatnonzero(net.signal == g)
        ratio = flows[mine] / (saturation * net.par[mine, JAM] * net.par[mine, V_C])
        critical = [ratio[(net.green[mine] >> p) & 1 == 1].max() for p in range(net.n_phases[g])]
        critical = np.array(critical) * min(1.0, 0.9 / sum(critical))  # beyond it the formula's cycle has no end
        plans.append(webster_plan(critical, 1.0, env.rules[1] * net.n_phases[g]))
    cycle = max(c for c, _ in plans)
    return fixed_cycle(env, cycle, np.array([green[0] / green.sum() for _, green in plans]), speed)


def pressures(env: NetworkVectorEnv, standing: bool) -> np.ndarray:
    """Varaiya's pressure of every phase, (agents, phases, N): saturation x (upstream - share-weighted downstream)."""
    net, (mov_in, mov_out) = env.network, env.network.moves[:2]
    x = env.counts(standing) + 0.0
    for s in np.flatnonzero(net.entry >= 0):
        x[s] += env.host(env.queue)[:, net.entry[s]].sum(0)
    gap = x.copy()
    np.add.at(gap, mov_in, -(net.beta[1][:, None] * x[mov_out]))
    gap *= (net.par[:, JAM] * net.par[:, V_C])[:, None]
    phases = int(net.n_phases.max())
    result = np.full((env.agents, phases, env.num_envs), -np.inf)
    for g in range(env.agents):
        for p in range(net.n_phases[g]):
            result[g, p] = gap[(net.signal == g) & ((net.green >> p) & 1 == 1)].sum(0)
    return result


def max_pressure(env: NetworkVectorEnv, period: float, standing: bool, margin: float):
    """Every `period` s the phase of the largest pressure; the one that is green keeps it up to `margin` (vehicles)."""
    unit = np.median(env.network.par[:, JAM] * env.network.par[:, V_C])

    def act(obs):
        phase = env.host(env.phase)
        value = pressures(env, standing)
        held = np.take_along_axis(value, phase[:, None], 1)
        np.put_along_axis(value, phase[:, None], held + margin * unit, 1)
        ask = env.host(env.clock)[0] * env.interval % period < env.interval  # the first decision of each period
        return np.where(ask, value.argmax(1), phase).T.reshape(-1, 1)

    return act


def actuated(env: NetworkVectorEnv, gap: float, longest: float):
    """Green goes on while the last 50 m of an approach it serves are filled above `gap`, up to `longest` s."""
    net = env.network
    phases = net.n_phases[:, None]

    def act(obs):
        phase, age = env.host(env.phase), env.host(env.age)
        near_line = env.host(env.zones)[0]
        serves = np.zeros((env.agents, int(phases.max()), env.num_envs))
        for g in range(env.agents):
            for p in range(net.n_phases[g]):
                serves[g, p] = near_line[(net.signal == g) & ((net.green >> p) & 1 == 1)].max(0)
        mine = np.take_along_axis(serves, phase[:, None], 1)[:, 0]
        np.put_along_axis(serves, phase[:, None], 0.0, 1)
        others = serves.max(1)
        leave = (others > 0.02) & ((mine < gap) | (age >= longest + env.rules[1]))
        following = (phase + 1) % phases
        return np.where(leave, following, phase).T.reshape(-1, 1)

    return act


CONTROLLERS = {"fixed_cycle": fixed_cycle, "webster": webster, "actuated": actuated, "max_pressure": max_pressure}
# for each demand level, by scripts/tune_arz.py: 64 training lanes of the corridor, 450 s, decisions every 5 s
TUNED = {
    1.0: {
        "fixed_cycle": {"cycle": 40, "share": 0.55, "speed": 12.0},
        "webster": {"level": 1.3, "saturation": 0.3, "speed": 12.0},
        "actuated": {"gap": 0.175, "longest": 25.0},
        "max_pressure": {"period": 15, "standing": True, "margin": 1.0},
    },
    1.3: {
        "fixed_cycle": {"cycle": 45, "share": 0.6, "speed": 14.0},
        "webster": {"level": 1.3, "saturation": 0.275, "speed": 10.0},
        "actuated": {"gap": 0.225, "longest": 30.0},
        "max_pressure": {"period": 20, "standing": True, "margin": 2.0},
    },
}


def by_level(name: str, env: NetworkVectorEnv):
    """The controller `name`; every lane takes the constants that were tuned for the demand level nearest to its own."""
    level = env.host(env.levels).mean(0)
    nearest = np.abs(level[:, None] - np.array(list(TUNED))).argmin(1)
    acts = [CONTROLLERS[name](env, **constants[name]) for constants in TUNED.values()]

    def act(obs):
        asked = np.stack([a(obs).reshape(env.num_envs, env.agents) for a in acts])
        return asked[nearest, np.arange(env.num_envs)].reshape(-1, 1)

    return act


class Junctions(NetworkVectorEnv):
    """NetworkVectorEnv with one row a junction, as the trainer sees all scenarios."""

    traced, tuned = 0, "tuned for the corridor and decisions every 5 s (scripts/tune_arz.py)"

    @property
    def decision_interval(self) -> float:
        return self.interval

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        return obs.reshape(-1, self.row_obs), info

    def set_state(self, state: dict) -> np.ndarray:
        super().set_state(state)
        return self.obs.reshape(-1, self.row_obs).copy()

    def baselines(self, env) -> tuple[dict, dict]:
        """name -> make(env) -> act(obs), and their constants, tuned on training seeds."""
        constants = {f"{name} x{level}": values for level, row in TUNED.items() for name, values in row.items()}
        return super().baselines(env), constants


if "cleanrl_crypto/Network-v0" not in gym.registry:  # gymnasium.make_vec(..., num_envs=8, network="town3", ...)
    gym.register("cleanrl_crypto/Network-v0", vector_entry_point=NetworkVectorEnv)


class GymLanes:
    """A Gymnasium environment behind the scenarios' interface, to check the algorithm on tasks of known difficulty.

    Its state is Gymnasium's own and is not saved: a resumed run starts new episodes.
    """

    builds, agents, obs_scale, sim_seconds, tuned = 0, 1, 1.0, 0.0, ""

    def __init__(self, env_id: str, num_envs: int, seed: int, cases: str | None = None):
        GymLanes.builds += 1
        self.num_envs = 20 if cases == "eval" else num_envs
        try:
            self.env = gym.make_vec(env_id, self.num_envs, vectorization_mode="sync",
                                    vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP})
        except gym.error.Error as e:
            raise UsageError(f"--env-id {env_id}: {str(e).splitlines()[0]}") from e
        space, box = self.env.single_action_space, self.env.single_observation_space
        if len(box.shape or ()) != 1 or not isinstance(space, (gym.spaces.Discrete, gym.spaces.Box)):
            raise UsageError(f"--env-id {env_id}: observations must be a flat Box, actions a Box or Discrete")
        self.discrete = isinstance(space, gym.spaces.Discrete)
        self.row_action = gym.spaces.MultiDiscrete([space.n]) if self.discrete else space
        self.row_obs, self.length = box.shape[0], self.env.spec.max_episode_steps or 1000
        self.splits, self.traced, self.decision_interval = {"validation": slice(0, self.num_envs)}, 0, 1.0
        self.seed, self.sums, self.steps = seed, np.zeros(self.num_envs), np.zeros(self.num_envs)
        self.final_stats, self.final_obs = {}, np.zeros((self.num_envs, self.row_obs), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self.obs, _ = self.env.reset(seed=self.seed if seed is None else seed % 2**31)
        self.sums[:], self.steps[:] = 0, 0
        return self.obs.astype(np.float32), {}

    def step_lanes(self, actions):
        if self.discrete:
            actions = np.asarray(actions)[:, 0]
        else:
            low, high = self.row_action.low, self.row_action.high
            actions = (low + (np.clip(actions, -1, 1) + 1) / 2 * (high - low)).astype(np.float32)
        self.obs, reward, terminated, truncated, info = self.env.step(actions)
        self.sums += reward
        self.steps += 1
        done = terminated | truncated
        if done.any():
            for i in np.flatnonzero(done):
                self.final_obs[i] = info["final_obs"][i]
            self.final_stats = self.running_stats()
            self.sums, self.steps = np.where(done, 0.0, self.sums), np.where(done, 0, self.steps)
        return self.obs.astype(np.float32), np.asarray(reward, np.float64), terminated, truncated

    def running_stats(self) -> dict:
        return {"episode_return": self.sums.copy(), "episode_length": self.steps.copy()}

    def baselines(self, env):
        return {}, {}

    def trace(self) -> dict:
        return {}

    def get_state(self) -> dict:
        return {}

    def set_state(self, state: dict) -> np.ndarray:
        return self.reset()[0]

    def close(self):
        self.env.close()


# --------------------------------------------------------------------------------------------------- networks
def layer(inputs: int, outputs: int, gain: float = math.sqrt(2)) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


def mlp(inputs: int, hidden: int, outputs: int, gain: float) -> nn.Sequential:
    return nn.Sequential(
        layer(inputs, hidden), nn.SiLU(), layer(hidden, hidden), nn.SiLU(), layer(hidden, outputs, gain))


class Agent(nn.Module):
    """Actor, critic and normalisers. config: observations, actions (0: discrete), choices (sizes of the factors of a
    discrete action), hidden, log_std_init, obs_scale; on a network held, the observation's column where the phase that
    is on begins: one-hot, its age, whether a request for another one counts now."""

    def __init__(self, config: dict):
        super().__init__()
        self.choices, self.held = list(config["choices"]), config.get("held")
        self.actor = mlp(config["observations"], config["hidden"], config["actions"] or sum(self.choices), 0.01)
        self.critic = mlp(config["observations"], config["hidden"], 1, 1.0)
        self.log_std = nn.Parameter(torch.full((config["actions"],), float(config["log_std_init"])))
        wide = torch.float64  # sums over 1e8 transitions
        self.register_buffer("obs_shift", torch.zeros(config["observations"]))
        self.register_buffer("obs_gain", torch.full((config["observations"],), float(config["obs_scale"])))
        self.register_buffer("obs_stats", torch.zeros(3, config["observations"], dtype=wide))  # count, mean, M2
        self.register_buffer("return_stats", torch.zeros(3, 1, dtype=wide))

    def normalise(self, obs):  # (B, observations)
        return ((obs - self.obs_shift) * self.obs_gain).clamp(-10, 10)

    def value(self, x):  # of normalised observations (B, observations) -> (B,)
        return self.critic(x)[:, 0]

    def head(self, x):
        """The actor's output; where no request counts, logits of the phase that is on, whatever the weights: a decision
        that decides nothing would only add noise to the gradient and to the entropy."""
        head = self.actor(x)
        if self.held is None:
            return head
        seen = slice(self.held, self.held + sum(self.choices) + 2)
        seen = x[:, seen] / self.obs_gain[seen] + self.obs_shift[seen]
        return torch.where(seen[:, -1:] > 0.5, head, 20.0 * seen[:, :-2])

    def act(self, x, noise=None):
        """Greedy action of normalised observations, or a sample: noise (B, A) standard normal, or uniform in (0, 1)
        for every choice (Gumbel's trick). -> (B, A) float32 or int64."""
        head = self.head(x)
        if not self.choices:
            return head if noise is None else head + self.log_std.exp() * noise
        logits = head if noise is None else head - (-noise.log()).log()
        return torch.stack([part.argmax(-1) for part in logits.split(self.choices, -1)], -1)

    def log_prob_entropy(self, x, action):
        """Summed over the factors: (B,), (B,)."""
        head = self.head(x)
        if not self.choices:
            return gaussian_log_prob(head, self.log_std, action), gaussian_entropy(self.log_std).expand(len(x))
        return categorical_log_prob_entropy(head, self.choices, action)

    def update_obs(self):
        """Shift and gain of the observations from their statistics."""
        count, mean, m2 = self.obs_stats
        self.obs_shift.copy_(mean)
        self.obs_gain.copy_((m2 / count.clamp(min=1) + 1e-8).rsqrt())

    @property
    def reward_scale(self) -> float:
        count, _, m2 = self.return_stats[:, 0].tolist()
        return 1.0 if count < 2 else 1.0 / math.sqrt(m2 / count + 1e-8)


# -------------------------------------------------------------------------------------------------- algorithm
def gaussian_log_prob(mean, log_std, action):
    """Diagonal Gaussian: mean, action (B, A), log_std (A,) -> (B,). The environment clips, the density does not."""
    z = (action - mean) * (-log_std).exp()
    return (-0.5 * z * z - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_entropy(log_std):
    return (log_std + 0.5 + 0.5 * math.log(2 * math.pi)).sum(-1)


def categorical_log_prob_entropy(logits, choices: list[int], action):
    """Independent categoricals: logits (B, sum(choices)), action (B, factors) int64 -> (B,), (B,)."""
    log_p = [part.log_softmax(-1) for part in logits.split(choices, -1)]
    chosen = [p.gather(-1, action[:, [k]])[:, 0] for k, p in enumerate(log_p)]
    return sum(chosen), sum(-(p.exp() * p).sum(-1) for p in log_p)


def gae(reward, value, next_value, terminated, ended, gamma: float, lam: float):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16). All (T, N).

    next_value: of the state that really followed, which for a truncated episode is the final one, not the reset one:
    a time limit bootstraps. terminated: no future; ended: terminated or truncated. Returns advantages, returns.
    """
    delta = reward + gamma * next_value * (1 - terminated) - value
    advantage, running = torch.empty_like(delta), torch.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        running = delta[t] + gamma * lam * (1 - ended[t]) * running
        advantage[t] = running
    return advantage, advantage + value


def ppo_loss(log_prob, old_log_prob, advantage, value, old_value, returns, entropy, clip: float, clip_vloss: bool,
             ent_coef: float, vf_coef: float, weight=None):
    """Clipped surrogate (Schulman et al. 2017, eq. 7), value and entropy terms of one minibatch, all (B,).

    weight: None = mean over B; else the sum is divided by it (several processes share a minibatch).
    Returns loss and (policy loss, value loss, entropy, approximate KL (Schulman's k3), clipped share), detached.
    """
    mean = torch.mean if weight is None else lambda x: x.sum() / weight
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    policy = mean(torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)))
    error = (value - returns) ** 2
    if clip_vloss:
        error = torch.max(error, (old_value + (value - old_value).clamp(-clip, clip) - returns) ** 2)
    critic, bonus = 0.5 * mean(error), mean(entropy)
    with torch.no_grad():
        kl, clipped = mean(ratio - 1 - log_ratio), mean(((ratio - 1).abs() > clip).float())
        stats = torch.stack([policy, critic, bonus, kl, clipped])
    return policy - ent_coef * bonus + vf_coef * critic, stats


def merge_stats(stats, count, mean, m2):
    """Running count, mean and sum of squared deviations (3, D) joined with those of new rows, in place (Chan 1979)."""
    total = stats[0] + count
    delta = mean - stats[1]
    stats[2] += m2 + delta * delta * stats[0] * count / total.clamp(min=1)
    stats[1] += delta * count / total.clamp(min=1)
    stats[0] = total


def reduce_sum(tensor):
    """Summed over the processes of torchrun, in place; one process: as it is."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


# -------------------------------------------------------------------------------------- evaluation, diagnostics
class SanityError(RuntimeError):
    """One line: what was expected of the environment and what was seen."""


def check_env(env, precision: str, limit: float):
    """Real checks of the training environment, which is used and then handed on. Raises SanityError.

    limit: of the Courant number.
    """
    def check(good, expected: str, seen):
        if not good:
            raise SanityError(f"sanity: expected {expected}, saw {seen}")

    rows, width = env.num_envs * env.agents, (env.row_action.shape or (1,))[0]
    discrete = isinstance(env.row_action, gym.spaces.MultiDiscrete)
    kind, high = (np.int64, 1) if discrete else (np.float64, 0.5)
    still, other = np.zeros((rows, width), kind), np.full((rows, width), high, kind)
    first, _ = env.reset(seed=1)
    first, state = first.copy(), env.get_state()
    a = env.step_lanes(other)[0].copy()
    env.set_state(state)
    b = env.step_lanes(still)[0].copy()
    gap = np.abs(a - b).max()
    check(gap > 1e-6, "two actions to give two states", f"observations {gap} apart")
    moved = np.abs(b - first).max()
    check(moved > 1e-6, "a constant action to change the observation", f"a change of {moved}")
    seen = env.seconds_of_inflow()
    check(abs(seen - env.decision_interval) < 0.2 * env.decision_interval,
          f"{env.decision_interval} s of inflow to enter in a decision of --decision-interval", f"{seen:.3f} s")
    rewards, early = [], 0
    for _ in range(env.length - 1):
        _, reward, terminated, truncated = env.step_lanes(still)
        rewards.append(reward.copy())
        early += int((terminated | truncated).sum())
    early -= int((terminated | truncated).sum())
    check(early == 0, f"no episode to end before decision {env.length}", f"{early} that did")
    check(truncated.all(), f"every episode to be truncated at decision {env.length}", f"{truncated.sum()} of {rows}")
    values = len(np.unique(np.round(np.concatenate(rewards), 9)))
    check(values > env.length // 2, "rewards to take many values", f"{values} in {env.length} decisions")
    stats, bound = env.final_stats, 1e-10 if precision == "float64" else 1e-5
    error, courant = float(stats["mass_error"].max()), float(stats["max_cfl"].max())
    check(error <= bound, f"vehicles to be conserved to {bound}", f"a relative error of {error:.2e}")
    check(courant <= limit * (1 + 1e-6), f"Courant numbers up to {limit}", f"{courant:.3f}")
    check(float(stats["throughput_veh"].min()) > 0, "vehicles to leave", "none")


def evaluate(make_act, env, seconds: float | None = None, trace: bool = False) -> tuple[dict, dict, bool]:
    """One episode of every lane of an evaluation environment.

    make_act(env) -> act(obs) -> actions. Returns {split: {statistic: mean over its lanes}}, the columns of the traced
    lane, and whether the time was up first: then the statistics are those of the episodes so far.
    """
    began = time.monotonic()
    obs, _ = env.reset(seed=EVAL_SEED)
    act, columns, stats, partial_ = make_act(env), {}, {}, False
    seen = np.zeros(env.num_envs, bool)
    for k in range(env.length):
        action = act(obs)
        if trace:
            row = {"time_s": k * env.decision_interval} | env.trace()
            row |= {f"action_{j}": a for j, a in enumerate(np.asarray(action)[env.traced * env.agents])}
        obs, reward, terminated, truncated = env.step_lanes(action)
        if trace:
            for key, value in (row | {"reward": reward[env.traced * env.agents]}).items():
                columns.setdefault(key, []).append(float(value))
        new = (terminated | truncated).reshape(env.num_envs, -1)[:, 0] & ~seen
        if new.any():
            for key, value in env.final_stats.items():
                stats.setdefault(key, np.zeros(env.num_envs))[new] = value[new]
            seen |= new
        if seconds is not None and time.monotonic() - began > seconds and not seen.all():
            partial_ = True
            break
    if not seen.all():
        for key, value in env.running_stats().items():
            stats.setdefault(key, np.zeros(env.num_envs))[~seen] = value[~seen]
    result = {split: {k: float(v[lanes].max() if k in WORST else v[lanes].mean()) for k, v in stats.items()}
              for split, lanes in env.splits.items()}
    for split, lanes in env.splits.items():
        result[split]["std"] = float(stats["episode_return"][lanes].std())
    return result, {k: np.array(v) for k, v in columns.items()}, partial_


def greedy(agent: Agent, device="cpu", states: list | None = None):
    """act(obs) of the agent's deterministic policy; `states` collects what it saw."""
    @torch.no_grad()
    def act(obs):
        if states is not None:
            states.append(np.array(obs, np.float32))
        action = agent.act(agent.normalise(torch.as_tensor(np.asarray(obs, np.float32), device=device)))
        return (action if agent.choices else action.clamp(-1, 1)).cpu().numpy()

    return act


def diagnose(agent: Agent, obs) -> dict:
    """What the policy does on states obs (B, observations): state_dependence, saturation, entropy, ..."""
    with torch.no_grad():
        x = agent.normalise(obs)
        action, value = agent.act(x).double(), agent.value(x)
        _, entropy = agent.log_prob_entropy(x, agent.act(x))
    discrete = bool(agent.choices)
    return {
        "state_dependence": float((action if discrete else action.clamp(-1, 1)).std(0).mean()),
        "action_mean": float(action.mean()), "entropy": float(entropy.mean()), "v_mean": float(value.mean()),
        "saturation": 0.0 if discrete else float((action.abs() > 1).double().mean()),
        "log_std_mean": 0.0 if discrete else float(agent.log_std.detach().mean())}


def verdict(audit: dict, result: dict, baselines: dict, updates: int) -> tuple[str, list[str]]:
    """healthy, collapsed, constant_is_right or untrained, and why. result, baselines: of the selecting split."""
    if updates == 0:
        return "untrained", ["no gradient update was made"]
    mine = result["episode_return"]
    constant = baselines.get("constant", result)["episode_return"]
    name, best = max(((k, v["episode_return"]) for k, v in baselines.items()), key=lambda kv: kv[1], default=("", None))
    seen = f"state_dependence {audit['state_dependence']:.3f}, return {mine:.2f}"
    beside = f"the best baseline, {name}, returns {best:.2f}" if name else "no baseline beside it"
    if audit["state_dependence"] >= 0.01:
        return "healthy", [f"the action answers to the state: {seen}", beside]
    if best is None or best > constant + 0.01 * abs(constant):
        return "collapsed", [f"one action whatever the state: {seen}", beside]
    return "constant_is_right", [f"one action whatever the state: {seen}", beside]


def load_agent(path, device="cpu") -> dict:
    """A checkpoint of this script. Raises CheckpointError (one line)."""
    state = load_checkpoint(path, device)
    if state.get("schema") != SCHEMA or not {"config", "agent", "algorithm"} <= set(state):
        found = f"schema {state.get('schema')}, expected {SCHEMA}; it holds {', '.join(sorted(map(str, state))[:6])}"
        raise CheckpointError(f"{path}: not a checkpoint of {Path(__file__).name} ({found})")
    return state


def load_policy(checkpoint: str | Path, device: str = "cpu"):
    """policy(obs) -> actions from a checkpoint file alone: the deterministic policy that evaluation reports.

    obs (B, observations) NumPy, the environment's own -> (B, A) float32 in [-1, 1], or (B, factors) int64.
    Raises CheckpointError (one line).
    """
    state = load_agent(checkpoint, device)
    agent = Agent(state["config"]).to(device).eval().requires_grad_(False)
    agent.load_state_dict(state["agent"])
    return greedy(agent, device)


# ------------------------------------------------------------------------------------------------------- main
def open_run(args: Args) -> tuple[Path, Path | str | None, dict | None]:
    """Run directory, checkpoint to start from and its content; refuses what does not fit the flags."""
    name = args.env_id or Path(args.scenario).stem
    run_dir = Path(args.run_dir or f"runs/{name}__{args.exp_name}__{args.seed}__{int(time.time())}")
    source = args.checkpoint or (find_last(run_dir) if args.resume == "auto" else args.resume)
    if not args.resume and (run_dir / "metrics.jsonl").exists():
        raise UsageError(f"--run-dir {run_dir} holds a run already: --resume auto continues it")
    if not source:
        return run_dir, None, None
    state = load_agent(source)
    there, here = state["args"], asdict(args)
    wrong = [f"{flag(k)} {there.get(k)} there, {here[k]} here" for k in SHAPING if there.get(k) != here[k]]
    if args.resume:
        if "optimizer" not in state:
            raise CheckpointError(f"{source}: holds the agent alone (for evaluation); resume from last.pt")
        if wrong:
            raise UsageError(f"{source} was made with other flags: {'; '.join(wrong)}")
        if state["data"] != data_of(args):
            raise UsageError(f"{source} was made with other content of {args.scenario} or of the JSON beside it")
    elif there["control"] != args.control:
        raise UsageError(f"{source} acts on --control {there['control']}, not on {args.control}")
    elif wrong:
        print(f"{source} was trained with other flags: {'; '.join(wrong)}")
    return run_dir, source, state


def data_of(args: Args) -> dict:
    """What the run is about; of a network's two files the sha256 too."""
    spec = args.env_id or args.scenario
    if not spec.endswith(".csv"):
        return {"spec": spec}
    both = Path(spec).read_bytes() + Path(spec).with_suffix(".json").read_bytes()
    return {"spec": spec, "sha256": hashlib.sha256(both).hexdigest()}


def choose_device(args: Args) -> tuple[torch.device, str]:
    """Device of torch and backend of the simulator, from the flags and what works."""
    torch_works, numba_works = probe_cuda() if args.cuda or args.backend == "cuda" else (False, False)
    local = int(os.environ.get("LOCAL_RANK", 0)) % max(torch.cuda.device_count(), 1)
    device = torch.device("cuda", local) if args.cuda and torch_works else torch.device("cpu")
    if args.backend == "cuda" and not numba_works:
        raise UsageError("--backend cuda: no CUDA device on which a numba kernel runs")
    if args.cudagraphs and device.type != "cuda":
        raise UsageError("--cudagraphs: no CUDA device")
    backend = args.backend
    if backend == "auto":
        published = args.scenario == "freeway" and args.scheme == "richtmyer"
        backend = "cuda" if numba_works and device.type == "cuda" and not published else "cpu"
    return device, backend


def agent_config(args: Args, env) -> dict:
    """Plain values that rebuild the agent from a checkpoint alone."""
    space = env.row_action
    discrete = isinstance(space, gym.spaces.MultiDiscrete)
    held = {"held": env.held} if hasattr(env, "held") else {}
    return held | {"observations": env.row_obs, "actions": 0 if discrete else int(space.shape[0]),
            "choices": [int(n) for n in space.nvec] if discrete else [], "hidden": args.hidden,
            "log_std_init": args.log_std_init, "obs_scale": 1.0 if args.norm_obs else env.obs_scale}


def cpu_state(module: nn.Module) -> dict:
    return {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}


def make_env(args: Args, backend: str, num_envs: int, lane0: int = 0, cases: str | None = None):
    """The training environment, or with cases="eval" the evaluation one."""
    if args.env_id:
        return GymLanes(args.env_id, num_envs, args.seed + lane0, cases)
    if args.scenario != "freeway":
        lanes = EVAL_LANES if cases else num_envs
        return Junctions(lanes, args.scenario, args.decision_interval, args.episode_seconds, seed=args.seed,
                         level=TRAIN_LEVELS, dtype=args.precision, backend=backend, lane0=lane0, cases=cases,
                         pressure=args.pressure, scheme=args.scheme, cfl=args.cfl, dx=args.cell_length)
    return FreewayVectorEnv(num_envs, args.control, args.scheme, args.decision_interval, args.episode_seconds,
                            args.precision, args.pressure, args.pressure_scale, args.pressure_exponent, args.cfl,
                            args.seed, backend, lane0, cases)


def main(argv: list[str] | None = None) -> dict:
    """Train (or --eval-only), evaluate, report; returns what summary.json holds."""
    args = parse_args(Args, argv)
    guard = TimeoutGuard(args.timeout, from_process_start=None if argv is None else False)
    try:
        return run(args, guard)
    finally:
        guard.close()


def run(args: Args, guard: TimeoutGuard) -> dict:
    with guard.phase("setup"):
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if args.num_envs % world:
            raise UsageError(f"--num-envs {args.num_envs}: must be a multiple of the {world} processes")
        if args.scenario != "freeway" and not args.env_id:
            find_network(args.scenario, args.pressure, args.cell_length)  # refused before anything is written
        run_dir, source, state = open_run(args)
        data = data_of(args)
        threads = args.torch_threads or max(1, (os.cpu_count() or 1) // world)
        torch.set_num_threads(threads)
        nb.set_num_threads(min(threads, nb.config.NUMBA_NUM_THREADS))
        device, backend = choose_device(args)
        if world > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        random.seed(args.seed)
        np.random.seed(args.seed)  # noqa: NPY002 (other libraries draw from it)
        torch.manual_seed(args.seed)
        torch.use_deterministic_algorithms(args.torch_deterministic and device.type == "cpu")
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid: a pass over every new tensor
        torch.backends.cudnn.deterministic = args.torch_deterministic

        # logging: metrics.jsonl is the record of truth, TensorBoard and wandb mirror it
        step0 = state["global_step"] if args.resume and state else 0
        jsonl = writer = None
        lines = 0
        if rank == 0:
            if args.track:
                try:
                    import wandb
                except ImportError as e:
                    raise UsageError(f"--track: {e}; pip install wandb") from e
            try:
                (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise UsageError(f"--run-dir {run_dir}: {e.strerror}") from e
            write_json_atomic(asdict(args), run_dir / "args.json")
            path, kept = run_dir / "metrics.jsonl", []
            if step0 and path.exists():  # cut back to the checkpoint
                kept = [line for line in path.read_text().splitlines(True) if line.endswith("\n")][: state["log_lines"]]
            path.write_text("".join(kept))
            jsonl, lines = open(path, "a"), len(kept)
            writer = SummaryWriter(str(run_dir), purge_step=step0 or None)
            if not step0:
                table = "\n".join(f"|{k}|{v}|" for k, v in asdict(args).items())
                writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
            if args.track:
                wandb.init(
                    project=args.wandb_project_name, entity=args.wandb_entity, mode=args.wandb_mode, dir=str(run_dir),
                    config=asdict(args), name=run_dir.name, id=run_dir.name.replace("/", "_"), resume="allow")

    def log(record: dict, step: int):
        nonlocal lines
        record = {k: v if math.isfinite(v) else None for k, v in record.items()}
        jsonl.write(json.dumps({"global_step": step, "wall": round(guard.elapsed(), 3)} | record) + "\n")
        jsonl.flush()
        lines += 1
        for key, value in record.items():
            if value is not None:
                writer.add_scalar(key, value, step)
        if args.track:
            wandb.log(record, step=step)

    # environments and baselines
    with guard.phase("setup"):
        lanes, kinds = args.num_envs // world, (FreewayVectorEnv, NetworkVectorEnv, GymLanes)
        builds = sum(kind.builds for kind in kinds)
        env = make_env(args, backend, lanes, rank * lanes)
        eval_env = make_env(args, backend, 1, cases="eval") if rank == 0 else None
        env.reset(seed=args.seed)
        width = (env.row_action.shape or (1,))[0]
        env.step_lanes(np.zeros((lanes * env.agents, width), env.row_action.dtype))  # compiles
        if args.sanity and not args.env_id:
            began = time.monotonic()
            check_env(env, args.precision, 0.5 if args.scheme == "muscl" else 1.0)
            print(f"sanity: the environment passed its checks in {time.monotonic() - began:.1f} s")
    with guard.phase("baselines"):
        baselines, laws, is_partial = {}, {}, False
        if rank == 0:
            env.reset(seed=args.seed)
            laws, gains = env.baselines(env)
            for name, values in gains.items():
                print(f"baseline {name}, {env.tuned}: {values}")
            for name, make in laws.items():
                baselines[name], _, cut = evaluate(make, eval_env, args.eval_timeout)
                is_partial |= cut

    # agent
    with guard.phase("setup"):
        config = agent_config(args, env)
        if state and state["config"] != config:
            there = state["config"]
            wrong = [f"{k} {there.get(k)} there, {v} here" for k, v in config.items() if there.get(k) != v]
            raise UsageError(f"{source} does not fit --scenario {args.scenario}: {'; '.join(wrong)}")
        agent = Agent(config).to(device)
        optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
        if world > 1:
            for tensor in agent.state_dict().values():
                dist.broadcast(tensor, 0)
        draws = torch.Generator(device).manual_seed(args.seed)
        rows, steps, agents = lanes * env.agents, args.num_steps, env.agents
        width = len(config["choices"]) or config["actions"]
        obs_all = torch.empty((steps + 1, rows, env.row_obs), device=device)
        kind = torch.int64 if config["choices"] else torch.float32
        actions = torch.empty((steps, rows, width), device=device, dtype=kind)
        rewards, log_probs, next_values, terminations, ends = (
            torch.zeros((steps, rows), device=device) for _ in range(5))
        global_step = updates = iteration = 0
        best = {"score": -math.inf, "step": 0, "agent": None, "updates": 0}
        averages, timing, eval_seconds, horizon = {}, {"steps": 0, "seconds": 0.0}, 0.0, args.total_timesteps
        running_return = torch.zeros(rows, dtype=torch.float64, device=device)
        obs, _ = env.reset(seed=args.seed, options={"stagger": True})
        env.sim_seconds = 0.0  # the first calls compiled
        if state:
            agent.load_state_dict(state["agent"])
            best |= {"agent": cpu_state(agent), "step": state["global_step"]}
        if step0:
            agent.load_state_dict(state["learner"])
            optimizer.load_state_dict(state["optimizer"])
            if not args.anneal_lr:  # the flag may differ from that of the run that is continued
                optimizer.param_groups[0]["lr"] = args.learning_rate
            obs = env.set_state(state["env"])
            draws.set_state(state["rng"])
            running_return = state["running_return"].to(device)
            global_step, updates, iteration = (state[k] for k in ("global_step", "updates", "iteration"))
            best, averages = state["best"], state["averages"]
            print(f"resumed {source} at {global_step} transitions, {updates} updates")

        def loss_of(x, action, old_log_prob, advantage, old_value, returns, weight):
            x = agent.normalise(x)
            log_prob, entropy = agent.log_prob_entropy(x, action)
            return ppo_loss(log_prob, old_log_prob, advantage, agent.value(x), old_value, returns, entropy,
                            args.clip_coef, args.clip_vloss, args.ent_coef, args.vf_coef, weight)

        if args.compile:
            loss_of = torch.compile(loss_of, mode="reduce-overhead" if args.cudagraphs else None)

    def save(name: str, whole: bool = False, log_lines: int = 0):
        """The agent alone, or everything that a resumed run needs; log_lines: of metrics.jsonl that it will keep."""
        state = {
            "schema": SCHEMA, "algorithm": "ppo", "data": data, "config": config, "args": asdict(args),
            "agent": cpu_state(agent), "global_step": global_step, "updates": updates}
        if whole:
            state |= {
                "learner": cpu_state(agent), "optimizer": optimizer.state_dict(), "env": env.get_state(),
                "rng": draws.get_state(), "running_return": running_return.cpu(), "best": best, "averages": averages,
                "iteration": iteration, "evaluated": evaluated, "log_lines": log_lines}
        with guard.phase("io"):
            save_atomic(state, run_dir / "checkpoints" / name)

    def evaluate_and_choose():
        """Evaluate on the validation cases, log, keep the best agent."""
        nonlocal eval_seconds
        began, states = time.monotonic(), []
        result, _, cut = evaluate(lambda _: greedy(agent, device, states), eval_env, args.eval_timeout)
        states = np.concatenate(states)
        seen = diagnose(agent, torch.from_numpy(states[:: max(1, len(states) // 4096)]).to(device))
        record = {f"eval/{split}/{k}": v for split, r in result.items() for k, v in r.items()}
        record |= {f"policy/{k}": v for k, v in seen.items() if k != "v_mean"} | {"value/v_mean": seen["v_mean"]}
        log(record, global_step)
        value = next(iter(result.values()))["episode_return"]
        if cut:
            print("cut short by --eval-timeout: not compared with other evaluations")
        elif updates and value > best["score"]:
            best.update(score=value, step=global_step, updates=updates, agent=cpu_state(agent))
            save("best.pt")
        eval_seconds = time.monotonic() - began
        print(f"{guard.elapsed():6.0f} s  {global_step:>9} transitions  {updates:>6} updates  "
              + "  ".join(f"{split} {r['episode_return']:.2f}" for split, r in result.items())
              + f"  state_dependence {seen['state_dependence']:.2f}", flush=True)

    # the loop
    saved = marked = time.monotonic()
    evaluated, step_marked = state["evaluated"] if step0 else global_step, global_step
    while not args.eval_only and global_step < args.total_timesteps:
        if args.sim_timeout is not None and env.sim_seconds > args.sim_timeout:
            print(f"one simulation call took {env.sim_seconds:.2f} s, --sim-timeout is {args.sim_timeout}: stopping")
            guard.expired = True
        stop = torch.tensor(float(guard.should_stop(RESERVE + 3.0 * eval_seconds)), device=device)
        if reduce_sum(stop):
            break
        with guard.phase("rollout"):
            shape = (steps, args.num_envs * agents, sum(config["choices"]) or width)
            make_noise = torch.rand if config["choices"] else torch.randn
            noise = make_noise(shape, generator=draws, device=device)[:, rank * rows : (rank + 1) * rows]
            ends.zero_()
            finals = []
            for t in range(steps):
                obs_all[t] = torch.from_numpy(obs)
                with torch.no_grad():
                    x = agent.normalise(obs_all[t])
                    actions[t] = agent.act(x, noise[t])
                    log_probs[t], _ = agent.log_prob_entropy(x, actions[t])
                obs, reward, terminated, truncated = env.step_lanes(actions[t].cpu().numpy())
                rewards[t] = torch.from_numpy(reward)
                ended = terminated | truncated
                if ended.any():
                    terminations[t], ends[t] = torch.from_numpy(terminated), torch.from_numpy(ended)
                    finals.append((t, torch.from_numpy(env.final_obs[ended]).to(device), torch.from_numpy(ended)))
                    done = ended.reshape(lanes, -1)[:, 0]
                    stats = {k: float(v[done].max() if k in WORST else v[done].mean())
                             for k, v in env.final_stats.items()}
                    averages["charts/episodic_return"] = stats.pop("episode_return")
                    averages["charts/episodic_length"] = stats.pop("episode_length")
                    averages |= {f"env/{k}": v for k, v in stats.items()}
            obs_all[steps] = torch.from_numpy(obs)
            global_step += steps * args.num_envs
            iteration += 1
            if args.norm_reward:
                for t in range(steps):
                    running_return = running_return * args.gamma + rewards[t]
                    moments = torch.stack([torch.full_like(running_return, 1), running_return, running_return**2])
                    count, total, square = reduce_sum(moments.sum(1, keepdim=True))
                    merge_stats(agent.return_stats, count, total / count, square - total**2 / count)
                    running_return = running_return * (1 - ends[t])
                rewards *= agent.reward_scale

        with guard.phase("learn"):
            with torch.no_grad():
                values = agent.value(agent.normalise(obs_all.reshape(-1, env.row_obs))).reshape(steps + 1, rows)
                next_values.copy_(values[1:])
                for t, final, ended in finals:
                    next_values[t, ended] = agent.value(agent.normalise(final))
                advantages, returns = gae(
                    rewards, values[:-1], next_values, terminations, ends, args.gamma, args.gae_lambda)
                variance = returns.var()
                explained = float(1 - (returns - values[:-1]).var() / variance) if variance > 0 else math.nan
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = args.learning_rate * max(0.0, 1 - global_step / max(horizon, 1))
            flat = [obs_all[:-1].reshape(-1, env.row_obs), actions.reshape(-1, width), log_probs.reshape(-1),
                    advantages.reshape(-1), values[:-1].reshape(-1), returns.reshape(-1)]
            size = steps * args.num_envs * agents // args.num_minibatches
            grad_norm, collected, stopped = 0.0, [], False
            for _ in range(args.update_epochs):
                order = torch.randperm(size * args.num_minibatches, generator=draws, device=device)
                for index in order.split(size):
                    if world > 1:  # every process takes its lanes' share of the same minibatch
                        t, row = index // (rows * world), index % (rows * world) - rank * rows
                        index = (t * rows + row)[(row >= 0) & (row < rows)]
                    x, action, old_log_prob, advantage, old_value, target = (column[index] for column in flat)
                    if args.norm_adv:
                        mean = reduce_sum(advantage.sum()) / size
                        square = reduce_sum(((advantage - mean) ** 2).sum())
                        advantage = (advantage - mean) / ((square / (size - 1)).sqrt() + 1e-8)
                    loss, stats = loss_of(x, action, old_log_prob, advantage, old_value, target, size)
                    optimizer.zero_grad()
                    loss.backward()
                    if world > 1:
                        for p in agent.parameters():
                            dist.all_reduce(p.grad)
                        stats = reduce_sum(stats.clone())
                    grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                    optimizer.step()
                    updates += 1
                    collected.append(stats)
                    stopped = args.target_kl is not None and float(stats[3]) > args.target_kl
                    if stopped:
                        break
                if stopped:
                    break
            policy_loss, value_loss, entropy, kl, clipped = torch.stack(collected).mean(0).tolist()
            if not math.isfinite(policy_loss + value_loss):
                raise FloatingPointError(f"the loss is not finite after {updates} updates: lower --learning-rate")
            averages |= {
                "losses/policy_loss": policy_loss, "losses/value_loss": value_loss, "losses/entropy": entropy,
                "losses/approx_kl": kl, "losses/clipfrac": clipped, "losses/grad_norm": float(grad_norm),
                "losses/explained_variance": explained, "charts/learning_rate": optimizer.param_groups[0]["lr"]}
            if args.norm_obs:
                flat_obs = flat[0].double()
                count = torch.full_like(flat_obs[0], float(len(flat_obs)))
                count, total, square = reduce_sum(torch.stack([count, flat_obs.sum(0), (flat_obs**2).sum(0)]))
                merge_stats(agent.obs_stats, count, total / count, square - total**2 / count)
                agent.update_obs()

        if iteration == 2:  # the first ones compile and warm up
            marked, step_marked = time.monotonic(), global_step
        if iteration > 2:
            timing["steps"], timing["seconds"] = global_step - step_marked, time.monotonic() - marked
            if math.isfinite(guard.remaining()) and iteration % 8 == 0:
                left = max(guard.remaining() - RESERVE - 3.0 * eval_seconds, 0.0)
                rate = timing["steps"] / timing["seconds"]
                horizon = min(args.total_timesteps, int(global_step + rate * left))
                if world > 1:  # every process has its own clock, the learning rate is one
                    horizon = int(reduce_sum(torch.tensor(float(horizon) * (rank == 0), device=device)))
        if rank == 0 and global_step - evaluated >= args.eval_interval:
            evaluated = global_step
            charts = {"SPS": timing["steps"] / max(timing["seconds"], 1e-9), "updates": updates,
                      "replay_ratio": updates / global_step}
            log(averages | {f"charts/{k}": v for k, v in charts.items()}
                | {f"time/{k}": v for k, v in guard.phases().items()}, global_step)
            with guard.phase("eval"):
                evaluate_and_choose()
        if rank == 0 and time.monotonic() - saved > args.checkpoint_interval:
            save("last.pt", whole=True, log_lines=lines)
            if args.keep_checkpoints:
                save(f"step_{global_step}.pt")
                rotate(run_dir / "checkpoints", args.keep_checkpoints)
            saved = time.monotonic()

    if rank:
        return {"exit_code": guard.exit_code}
    # the best agent on the validation cases is what is reported
    with guard.phase("eval"):
        if not args.eval_only:
            before = lines
            evaluate_and_choose()
            save("last.pt", whole=True, log_lines=before)  # resumed, it evaluates again
            if best["agent"]:
                agent.load_state_dict(best["agent"])
            if not (run_dir / "checkpoints" / "best.pt").exists():
                save("best.pt")
        states = []
        result, columns, cut = evaluate(
            lambda _: greedy(agent, device, states), eval_env, args.eval_timeout, trace=True)
        is_partial |= cut
        (run_dir / "traces").mkdir(exist_ok=True)
        stem = Path(args.env_id or args.scenario).stem
        pd.DataFrame(columns).to_parquet(run_dir / "traces" / f"{stem}.parquet")
        if "constant" in laws:  # the road that nobody controls, for the picture
            _, columns, _ = evaluate(laws["constant"], eval_env, args.eval_timeout, trace=True)
            pd.DataFrame(columns).to_parquet(run_dir / "traces" / f"{stem}_constant.parquet")
        results = {split: {"agent": mine, "baselines": {k: b[split] for k, b in baselines.items()},
                           "partial": is_partial} for split, mine in result.items()}
        audit = diagnose(agent, torch.from_numpy(np.concatenate(states)).to(device))
        select = next(iter(results))
        audit["replay_ratio"] = updates / max(global_step, 1)
        made = state["updates"] if args.eval_only else updates
        mine, others = results[select]["agent"], results[select]["baselines"]
        audit["verdict"], audit["reasons"] = verdict(audit, mine, others, made)
        log({f"eval/{split}/{k}": v for split, r in result.items() for k, v in r.items()}, global_step)
    sim_seconds = max(env.sim_seconds, eval_env.sim_seconds)
    env.close()
    eval_env.close()
    writer.close()
    jsonl.close()
    if args.track:
        wandb.finish()

    summary = {
        "status": guard.status, "command": shlex.join(sys.argv), "global_step": global_step, "updates": updates,
        "replay_ratio": audit["replay_ratio"],
        "samples_per_transition": updates * (rows * world * steps // args.num_minibatches) / max(global_step, 1),
        "best_step": best["step"], "best_updates": best["updates"], "selected_by": select,
        "env_builds": sum(kind.builds for kind in kinds) - builds, "buffer_allocations": pool.stats()["allocations"],
        "sps": timing["steps"] / timing["seconds"] if timing["seconds"] else None, "eval": results, "audit": audit,
        "versions": {m.__name__: m.__version__ for m in (torch, np, nb, gym)} | {"python": sys.version.split()[0]},
        "device": {"torch": str(device), "backend": backend, "precision": args.precision, "threads": threads,
                   "cpu_count": os.cpu_count(), "processes": world, "longest_simulation_call_s": sim_seconds},
        "data": data}

    def write_summary():
        summary.update(wall_seconds=guard.elapsed(), phases=guard.phases())
        write_json_atomic(summary, run_dir / "summary.json")

    write_summary()  # the report reads it
    if args.report and guard.remaining() < 4:
        print(f"no time for report.html: python scripts/report.py {run_dir}")
    elif args.report:
        with guard.phase("report"):
            from scripts import report

            try:
                report.main([str(run_dir)])
            except (SystemExit, OSError) as e:  # the run is safe: its files make the report again
                print(f"report.html was not written ({e}); again: python scripts/report.py {run_dir}", file=sys.stderr)
    print_table(summary)
    print(f"{audit['verdict']}: {'; '.join(audit['reasons'])}")
    print(f"{run_dir}: summary.json" + (", report.html" if (run_dir / "report.html").exists() else ""))
    write_summary()
    return summary | {"run_dir": str(run_dir), "exit_code": guard.exit_code}


def print_table(summary: dict):
    """Agent beside baselines, split by split."""
    from rich.console import Console
    from rich.table import Table

    done = f"{summary['status']} after {summary['global_step']} transitions, {summary['updates']} updates"
    table = Table(title=f"{summary['data']['spec']}: {done}")
    first = next(iter(summary["eval"].values()))["agent"]
    keys = [k for k in ("episode_return", "std", *STATS[1:5]) if k in first]
    for name in ("split", "who", *keys):
        table.add_column(name, justify="left" if name in ("split", "who") else "right")
    for split, result in summary["eval"].items():
        rows = {"agent": result["agent"]} | result["baselines"]
        for name, metrics in rows.items():
            cells = [f"{metrics[k]:.3f}" if k in metrics else "" for k in keys]
            table.add_row(split if name == "agent" else "", name, *cells, end_section=name == list(rows)[-1])
    Console(width=130).print(table)


if __name__ == "__main__":
    try:
        code = main()["exit_code"]
    except (UsageError, CheckpointError, FloatingPointError, SanityError, NetworkError) as e:
        print(f"error: {e}", file=sys.stderr)
        code = 2 if isinstance(e, (UsageError, CheckpointError, NetworkError)) else 1
    except OSError as e:  # a full disk under a log, a folder that went away
        print(f"error: {e.filename or 'writing the run directory'}: {e.strerror}", file=sys.stderr)
        code = 2
    sys.exit(code)
