r"""PPO that sets the signals of a road network: two-class Aw-Rascle-Zhang traffic on CPU or CUDA.

Five signalised junctions on an arterial; a few minutes, 8 to 12 % less delay than the best tuned
controller:

    python cleanrl_crypto/ppo_arz_signals.py --timeout 150

A grid of N x N junctions, or your own network (a CSV of segments, a JSON of signals and demand):

    python cleanrl_crypto/ppo_arz_signals.py --scenario town3 --num-envs 64 --timeout 1200
    python cleanrl_crypto/ppo_arz_signals.py --scenario roads.csv --timeout 600

A map of SUMO (CityFlow, OpenStreetMap) with its demand:

    python cleanrl_crypto/ppo_arz_signals.py --network MAP.net.xml --demand MAP.rou.xml --timeout 600

GPU, Kaggle: a GPU is used where a probe shows that it works.

    python cleanrl_crypto/ppo_arz_signals.py --num-envs 4096 --run-dir /kaggle/working/run --timeout 3600

Several processes: each simulates its share of the lanes, gradients are averaged, rank 0 evaluates
and writes.

    torchrun --nproc-per-node 2 cleanrl_crypto/ppo_arz_signals.py --timeout 300

Resume after whatever ended the run (the same command starts and continues it), or evaluate a checkpoint:

    python cleanrl_crypto/ppo_arz_signals.py --run-dir runs/corridor --resume auto
    python cleanrl_crypto/ppo_arz_signals.py --eval-only --checkpoint runs/corridor/checkpoints/best.pt

Use the agent in another program, from its checkpoint alone:

    from cleanrl_crypto.ppo_arz_signals import load_policy
    policy = load_policy("runs/corridor/checkpoints/best.pt")
    action = policy(obs)  # (lanes, junctions, numbers) -> (lanes, junctions), phases asked for

Every flag: --help. Every metric, and what to do when it is off: docs/ppo_arz_signals.md
"""

import math
import sys
import time
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Numba's cache finds the records below by their module, also where this file is the program
MODULE = "cleanrl_crypto.ppo_arz_signals"
sys.modules.setdefault(MODULE, sys.modules[__name__])

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
    sys.exit(f"{Path(__file__).name} needs the folder common/: copy it to {ROOT}")
answer_help(__name__, __file__)

import gymnasium as gym
import numba as nb
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from numba import cuda

from common.lanes import SimulatedLanes, register, write_trace
from common.networks import CELL_LENGTH, QUEUE_WAVE, Network, NetworkError, find_network

SCHEMA = 6  # of the checkpoint
EVAL_SEED = 2**31  # of the evaluation cases: no training seed shares their counters
EVAL_LANES = 125  # 25 to choose by, 50 of other seeds at demand x1.0 and 50 at x1.3
MAP_LANES = 25  # the same of a map, whose episodes are long
SPREADS = 0.1, 0.2  # of saturation flows and turning shares on a map
# demand over its mean: range of a training episode, the two of evaluation
LEVELS = 1.0, 1.3
BLOCK = 128  # most lanes that a CPU task simulates together
CFL = 0.9  # Courant number of a time step
TAU = (1.0, 1.5)  # s, relaxation of motorcycles and cars
KNOT = 300.0  # s between knots of the slow demand
BIN = 60.0  # s, of the fast one
VARIATION = (0.4, 1.6, 0.5)  # least and largest factor of a knot, half width of a bin's
START_FILL = 0.1  # largest share of jam density a segment starts with
TUNING_SHARE = 0.1  # of the time that is left, for the baselines' constants
# literals of the kernels: a float32 times these stays float32 (Python's 0.5 would widen it)
ZERO, ONE, TEN = map(np.float32, (0.0, 1.0, 10.0))
TINY = np.float32(1e-30)
INF = np.float32(np.inf)
SOON = 1e-6  # s: ages are sums
THIN = np.float32(1e-5)  # of the jam density: below it w = (rho w) / rho is rounding
WAVE = np.float32(QUEUE_WAVE)
ALPHA = np.float32(0.6)  # of a motorcycle's pressure: what a car counts
CREEP = np.float32(5 / 3.6)  # m/s, motorcycles between standing cars


# ---------------------------------------------------------------------------------------- arguments
@dataclass
class Args(RunArgs):
    # experiment
    exp_name: str = Path(__file__).stem
    """name of this experiment"""

    # environment
    scenario: str = "corridor"
    """corridor, townN (N x N junctions), or a CSV of segments with a JSON of signals and demand
    beside it"""
    network: str | None = None
    """instead of a scenario a map of another program: .net.xml or .sumocfg of SUMO, roadnet.json of
    CityFlow, an edge table of OpenStreetMap"""
    demand: tuple[str, ...] = ()
    """with --network: files of its routes, trips or flows"""
    levels: tuple[float, float] = LEVELS
    """mean demand of a training episode over the network's: least and largest, which are also the
    two of evaluation"""
    variation: tuple[float, float, float] = VARIATION
    """demand within an episode: least and largest of the factors that change every five minutes,
    half width of those of a minute"""
    saturation_spread: float | None = None
    """half width of an episode's random factors of saturation flows; None: 0, with --network .1"""
    turn_spread: float | None = None
    """half width of those of turning shares; None: 0, with --network .2"""
    num_envs: int = 128
    """lanes (independent copies of the network), over all processes"""
    decision_interval: float = 5.0
    """seconds between decisions"""
    episode_seconds: float | None = None
    """seconds after which an episode is truncated; None: 450, with --network all of its demand"""
    cell_length: float = 25.0
    """metres of a cell, as near as a segment's length allows"""
    sim_timeout: float | None = None
    """seconds for one simulation call (one decision of all lanes): after a longer one the run
    stops, saved; a call that does not return is ended by --timeout's watchdog alone"""

    # algorithm
    total_timesteps: int = 16_000_000
    """environment transitions (decisions of a lane, summed over lanes; its junctions decide
    together)"""
    num_steps: int = 32
    """decisions of every lane in one rollout"""
    learning_rate: float = 1e-3
    """Adam"""
    anneal_lr: bool = True
    """linearly to 0 at --total-timesteps, or at the transitions that --timeout will allow"""
    gamma: float = 0.97
    """discount a decision"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 8
    """minibatches an epoch"""
    update_epochs: int = 4
    """epochs over a rollout"""
    clip_coef: float = 0.2
    """clipping of the probability ratio"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """gradient clipping"""
    target_kl: float | None = None
    """stop the epochs of a rollout once a minibatch's approximate KL divergence exceeds this"""
    hidden: int = 64
    """width of the two SiLU layers of actor and critic"""

    # runtime
    eval_interval: int = 200_000
    """transitions between evaluations on the validation cases, which choose the best agent"""
    compile: bool = False
    """torch.compile the networks of a minibatch"""

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            {},
            {
                (0, 0.9999): "gamma",
                (0, 1): "gae_lambda learning_rate",
                (0.01, 10): "clip_coef",
                (0, 100): "ent_coef vf_coef",
                (1e-6, 1e9): "max_grad_norm target_kl sim_timeout",
                (0, 10**12): "total_timesteps",
                (1, 2**20): "num_envs num_steps",
                (1, 2**16): "num_minibatches update_epochs hidden",
                (1, 10**12): "eval_interval",
                (1, 200): "cell_length",
                (0.25, 3600): "decision_interval",
                (0.25, 86400): "episode_seconds",
                (0, 0.9): "saturation_spread turn_spread",
            },
        )
        low, high = self.levels
        least, most, jitter = self.variation
        rows = self.num_envs * self.num_steps
        refuse(
            (
                (self.episode_seconds or 0) % self.decision_interval,
                f"--episode-seconds {self.episode_seconds} must be a multiple of "
                f"--decision-interval {self.decision_interval}",
            ),
            (
                rows % self.num_minibatches,
                f"--num-envs {self.num_envs} times --num-steps {self.num_steps} is not a "
                f"multiple of --num-minibatches {self.num_minibatches}",
            ),
            (self.demand and not self.network, "--demand needs --network"),
            (
                self.network and self.scenario != "corridor",
                f"--network {self.network} and --scenario {self.scenario}: give one of them",
            ),
            (not 0 < low < high < 100, f"--levels {low} {high}: must be above 0 and rise"),
            (
                not (0 <= least <= most <= 100 and 0 <= jitter <= 1),
                f"--variation {least} {most} {jitter}: must be 0 <= LEAST <= MOST <= 100 and the "
                "last one from 0 to 1",
            ),
        )


# ------------------------------------------------------------------------------------------ records
# What the kernels pass on, by name. N lanes innermost; k: 0 motorcycles, 1 cars.
class Roads(NamedTuple):
    """The network, read-only.

    S segments, G signals, E entries, at most A approaches or exits of a junction.
    """

    __module__ = MODULE
    first: np.ndarray  # (S + 1,) first cell of each segment
    dx: np.ndarray  # (S,) m
    inv_dx: np.ndarray
    jam: np.ndarray  # (S,) veh/m
    inv_jam: np.ndarray
    room: np.ndarray  # (3, S) vehicles in a zone at jam density
    limit: np.ndarray  # (2, S) m/s
    target_ptr: np.ndarray  # (S + 1,) a segment's part of targets
    targets: np.ndarray  # (M,) segments that it leads into
    source_ptr: np.ndarray  # (S + 1,) a segment's part of sources and share
    sources: np.ndarray  # (M,) segments that lead into it
    share: np.ndarray  # (M,) of a source's vehicles
    place: np.ndarray  # (M,) where the share of each of targets stands in share
    leave: np.ndarray  # (S,) share of a segment's vehicles that end there
    saturation: np.ndarray  # (S,) veh/s over its end, or inf
    limited: np.ndarray  # segments whose end has a saturation flow, or gives way
    yield_ptr: np.ndarray  # (S + 1,) a segment's part of yield_to
    yield_to: np.ndarray  # segments that have priority
    gap: np.ndarray  # (S,) s
    follow: np.ndarray  # (S,) veh/s into an endless gap
    entry: np.ndarray  # (S,) its number or -1
    demand: np.ndarray  # (decisions, 2, E) mean, veh/s; one row where it never changes
    signal: np.ndarray  # (S,) at its end, or -1
    green: np.ndarray  # (S,) bit p: green in phase p
    minor: np.ndarray  # (S,) bit p: gives way in phase p
    n_phases: np.ndarray  # (G,)
    closes: np.ndarray  # (G,) s after a switch, float64 as the next two
    opens: np.ndarray  # (G,)
    free: np.ndarray  # (G,) from then on a request counts
    pieces: np.ndarray  # s of an interval in which no signal changes what it shows
    zone_of: np.ndarray  # (cells,)
    zone_share: np.ndarray  # (cells,)
    approach: np.ndarray  # (G, A) segments or -1
    exits: np.ndarray  # (G, A)
    owner: np.ndarray  # (S, 2) the signals that pay for its delay; the first -1: all


class Cells(NamedTuple):
    """(cells, N) of motorcycles and cars, in the precision of the simulator.

    Apart from each other: a loop that writes two parts of one array is not vectorised.
    """

    __module__ = MODULE
    rho_m: np.ndarray  # veh/m
    rho_c: np.ndarray
    mom_m: np.ndarray  # rho w, veh/s
    mom_c: np.ndarray
    v_m: np.ndarray  # m/s, scratch
    v_c: np.ndarray
    w_m: np.ndarray  # m/s, scratch
    w_c: np.ndarray


class Scratch(NamedTuple):
    __module__ = MODULE
    gate: np.ndarray  # (S, N) 0 at a red stop line, else 1
    follow: np.ndarray  # (S, N) veh/s into an endless gap; inf: has priority
    saturation: np.ndarray  # (S, N) veh/s, of the episode
    admit: np.ndarray  # (S, N) share of what wants over a segment's end that both allow
    share: np.ndarray  # (M, N) of the episode
    leave: np.ndarray  # (S, N)
    fits: np.ndarray  # (2, S, N) share of what wants in that fits in
    out: np.ndarray  # (2, S, N) veh/s over a segment's end
    into: np.ndarray  # (2, S, N) veh/s over its start
    into_mom: np.ndarray  # (2, S, N)
    face: np.ndarray  # (2, N) veh/s over a cell's right face
    left: np.ndarray  # (2, N) over its left face
    left_mom: np.ndarray  # (2, N)
    lost: np.ndarray  # (2, N)
    gain: np.ndarray  # (2, N) of half a relaxation
    total: np.ndarray  # (4, N) sums over a segment
    dt: np.ndarray  # (N,) s
    rest: np.ndarray  # (N,) s
    speed: np.ndarray  # (N,) 1/s, fastest wave over dx
    rate: np.ndarray  # (2, E, N) float64, veh/s


class Street(NamedTuple):
    """State beside the cells, and what is seen of them. float64 but where noted."""

    __module__ = MODULE
    phase: np.ndarray  # (G, N) int64
    before: np.ndarray  # (G, N) int64, the phase before the switch
    age: np.ndarray  # (G, N) s since the switch
    queue: np.ndarray  # (2, E, N) veh outside
    delay: np.ndarray  # (S, N) veh s of the interval
    # filling of near, middle, far, then what stands of it; precision of the simulator
    zones: np.ndarray  # (6, S, N)
    level: np.ndarray  # (2, N) range of the demand level
    lane_id: np.ndarray  # (N,) int64, in the random numbers
    episode_id: np.ndarray  # (N,) int64, in the random numbers
    decision: np.ndarray  # (N,) int64, within the episode
    broken: np.ndarray  # (N,) int64, 1 + the segment that is not finite, or 0


class Result(NamedTuple):
    __module__ = MODULE
    obs: np.ndarray  # (N, G, D) float32
    final_obs: np.ndarray  # (N, G, D)
    local_reward: np.ndarray  # (N, G) float64
    flags: np.ndarray  # (2, N) bool: terminated, truncated
    totals: np.ndarray  # (ROWS, N) float64 of the present episode
    finals: np.ndarray  # (ROWS, N) of the last one that ended


class Rules(NamedTuple):
    __module__ = MODULE
    seed: int
    length: int  # decisions of an episode
    interval: float  # s
    wide: int  # 1: observations hold sources without a signal, and phases
    low: float  # range of the slow demand factor
    high: float
    jitter: float  # half width of the fast one
    fill: float
    saturation: float  # half width of an episode's factors of saturation flows
    turns: float  # and of shares


# shapes of the arrays above (C cells, M moves, D numbers, R rows of totals), names, type or the simulator's
ARRAYS = (
    ("CN", "rho_m rho_c mom_m mom_c v_m v_c w_m w_c", None),
    ("N", "dt rest speed", None),
    ("2N", "face left left_mom lost gain", None),
    ("4N", "total", None),
    ("SN", "gate follow saturation admit leave", None),
    ("MN", "share", None),
    ("2SN", "fits out into into_mom", None),
    ("6SN", "zones", None),
    ("2EN", "rate queue", np.float64),
    ("2N", "level", np.float64),
    ("GN", "age", np.float64),
    ("SN", "delay", np.float64),
    ("NG", "local_reward", np.float64),
    ("RN", "totals finals", np.float64),
    ("N", "lane_id episode_id decision broken", np.int64),
    ("GN", "phase before", np.int64),
    ("NG", "action", np.int64),
    ("NGD", "obs final_obs", np.float32),
    ("2N", "flags", np.bool_),
)
# rows of totals; the last ones have a row for each class
DELAY, TIME, DISTANCE, SWITCHES, MAX_CFL, STEPS, DECISIONS = range(7)
STARTED, ARRIVED, DEPARTED, LOST, STORED = range(7, 17, 2)
ROWS = 17


# ------------------------------------------------------------------------------------------ kernels
jit = partial(nb.njit, cache=True, error_model="numpy")


def fast(function):
    """njit, with inf for a division by zero.

    Left as it is under NUMBA_ENABLE_CUDASIM, where CUDA kernels are Python.
    """
    return function if nb.config.ENABLE_CUDASIM else jit(function)


def point(function):
    """fast, and always inlined.

    A loop over lanes that calls is not vectorised, and handing records on costs time.
    """
    return function if nb.config.ENABLE_CUDASIM else jit(function, forceinline=True)


@jit
def mix_nb(x):
    """The finaliser of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@jit
def uniform_nb(seed, lane, episode, draw):
    """Counter-based uniform in [0, 1), a hash of (seed, lane, episode, draw)."""
    seeds = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15)
    episodes = np.uint64(episode) * np.uint64(0xD1342543DE82EF95)
    x = mix_nb(seeds + np.uint64(lane))
    x = mix_nb(x + episodes + np.uint64(draw))
    return np.float64(x >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@point
def pressure_nb(x, k):
    """p (m/s) at x = (own density + cross * other density) / jam density.

    0 in free flow; in a queue what leaves its speed: k - p = wave (1 / x - 1).
    """
    p = k + WAVE - WAVE / (x + TINY)
    return p if p > ZERO else ZERO


@point
def slope_nb(x, k):
    """dp/dx, m/s."""
    return WAVE / (x * x) if x * (k + WAVE) > WAVE else ZERO


@point
def filling_nb(p, k):
    """The largest x whose pressure is at most p."""
    p = p if p > ZERO else ZERO
    return WAVE / (k + WAVE - p)


# A class's flux in units of x: its own vehicles and, weighted, those of the other class that drive
# among them. The mix of the cell that sends holds for all of it: first in, first out.
@point
def demand_nb(x, v, w, k):
    """What a cell can send of x, over jam density; v, w, k in m/s."""
    free = filling_nb(ZERO, k)
    return x * v if x <= free else free * w


@point
def supply_nb(w, v, k):
    """What a cell whose vehicles drive v can take of x, of those that arrive with w.

    Never less than nothing: in a cell that has all but emptied w is rounding, of either sign.
    """
    speed = v if v < w else w
    return filling_nb(w - v, k) * (speed if speed > ZERO else ZERO)


@point
def relax_nb(w, p, goal, gain):
    """Exact relaxation of v = w - p to `goal`, gain = 1 - exp(-dt / tau) -> (v, change of w).

    Overfilled (v < 0) where the goal is to stand, w stays: else those behind would drive off faster
    than the limit later. With gain 0 nothing changes by a bit, so that a lane may wait for others
    of its block.
    """
    v = w - p
    change = (goal - v) * gain if (v >= ZERO) | (goal > ZERO) else ZERO
    v = v + change
    return (v if v > ZERO else ZERO), change


@point
def goals_nb(y_m, y_c, v_m, v_c):
    """Equilibrium speeds, m/s.

    Motorcycles creep only where they have room: else a red light would pack them.
    """
    x = y_m + y_c
    share = ONE - pressure_nb(x, v_m) / v_m
    share = share if share > ZERO else ZERO
    goal_c = v_c - pressure_nb(x, v_c)
    goal_c = goal_c if goal_c > ZERO else ZERO
    room = (ONE - y_m - ALPHA * y_c) * TEN
    room = room if room < ONE else ONE
    room = room if room > ZERO else ZERO
    return CREEP * room + (v_m - CREEP) * share, goal_c


@point
def cell_nb(r_m, r_c, q_m, q_c, gain_m, gain_c, inv_jam, k_m, k_c):
    """Relax one cell: densities (veh/m) and rho w (veh/s).

    -> speeds, w, changes of w (m/s), a bound of |lambda|.
    """
    y_m = r_m * inv_jam
    y_c = r_c * inv_jam
    x_m = y_m + ALPHA * y_c
    x_c = y_m + y_c
    w_m = q_m / r_m if y_m > THIN else k_m
    w_c = q_c / r_c if y_c > THIN else k_c
    goal_m, goal_c = goals_nb(y_m, y_c, k_m, k_c)
    v_m, d_m = relax_nb(w_m, pressure_nb(x_m, k_m), goal_m, gain_m)
    v_c, d_c = relax_nb(w_c, pressure_nb(x_c, k_c), goal_c, gain_c)
    # lambda: v, and v less at most the trace of the 2 x 2 block rho_k dp_k/drho_j
    slowest = v_m if v_m < v_c else v_c
    fastest = y_m * slope_nb(x_m, k_m) + y_c * slope_nb(x_c, k_c) - slowest
    # a queue that is let go drives at the limit
    fastest = k_m if k_m > fastest else fastest
    fastest = k_c if k_c > fastest else fastest
    fastest = v_m if v_m > fastest else fastest
    fastest = v_c if v_c > fastest else fastest
    return v_m, v_c, w_m + d_m, w_c + d_c, d_m, d_c, fastest


@point
def interface_nb(r, other, v_l, w_l, v_r, inv_jam, jam, k):
    """Godunov flux of one class (veh/s) between two states of a segment.

    r: its density to the left, other: cross * the other class's there.
    """
    both = r + other
    demand = demand_nb(both * inv_jam, v_l, w_l, k)
    supply = supply_nb(w_l, v_r, k)
    return (demand if demand < supply else supply) * jam * r / (both + TINY)


@fast
def demand_factor_nb(seed, lane, episode, entry, second, rules):
    """Demand over its mean: slow knots joined by lines, times a fast factor a bin."""
    knot = int(second // KNOT)
    share = second / KNOT - knot
    first = entry * 8192  # of the entry's draws
    before = uniform_nb(seed, lane, episode, first + knot + 1)
    after = uniform_nb(seed, lane, episode, first + knot + 2)
    quick = uniform_nb(seed, lane, episode, first + 4096 + int(second // BIN))
    between = before + (after - before) * share
    slow = rules.low + (rules.high - rules.low) * between
    return slow * (1.0 + rules.jitter * (2.0 * quick - 1.0))


@fast
def class_of_nb(cells, k):
    """Density of class k, the other's density, rho w, speed, w; what one of the others counts."""
    if k == 0:
        return cells.rho_m, cells.rho_c, cells.mom_m, cells.v_m, cells.w_m, ALPHA
    return cells.rho_c, cells.rho_m, cells.mom_c, cells.v_c, cells.w_c, ONE


# lo, hi: the lanes of a task, unsigned: an index that could be negative is not vectorised
@point
def face_nb(lo, hi, c, s, k, roads, cells, face):
    """face[k] <- flux of class k (veh/s) between cells c and c + 1 of segment s."""
    own, other, _, v, w, cross = class_of_nb(cells, k)
    n = c + 1
    inv_jam = roads.inv_jam[s]
    jam = roads.jam[s]
    limit = roads.limit[k, s]
    for ln in range(lo, hi):
        face[k, ln] = interface_nb(
            own[c, ln],
            cross * other[c, ln],
            v[c, ln],
            w[c, ln],
            v[n, ln],
            inv_jam,
            jam,
            limit,
        )


@point
def transport_nb(lo, hi, c, k, inv_dx, cells, scratch):
    """Cell c of class k after its fluxes, in place.

    The right ones become the next cell's left ones.
    """
    own, _, mom, _, w, _ = class_of_nb(cells, k)
    face = scratch.face
    left = scratch.left
    left_mom = scratch.left_mom
    lost = scratch.lost
    dt = scratch.dt
    for ln in range(lo, hi):
        h = dt[ln] * inv_dx
        out_mom = face[k, ln] * w[c, ln]
        z = mom[c, ln] + h * (left_mom[k, ln] - out_mom)
        r = own[c, ln] + h * (left[k, ln] - face[k, ln])
        low = r if r < ZERO else ZERO
        lost[k, ln] -= low
        own[c, ln] = r - low
        mom[c, ln] = z
        scratch.total[k, ln] += face[k, ln]
        left[k, ln] = face[k, ln]
        left_mom[k, ln] = out_mom


@point
def settle_nb(lo, hi, c, s, roads, cells, gain, speed):
    """Relax cell c in place and raise `speed` (1/s) to its wave speed over dx."""
    rho_m, rho_c = cells.rho_m, cells.rho_c
    mom_m, mom_c = cells.mom_m, cells.mom_c
    inv_jam = roads.inv_jam[s]
    inv_dx = roads.inv_dx[s]
    k_m = roads.limit[0, s]
    k_c = roads.limit[1, s]
    for ln in range(lo, hi):
        r_m = rho_m[c, ln]
        r_c = rho_c[c, ln]
        _, _, _, _, d_m, d_c, fastest = cell_nb(
            r_m,
            r_c,
            mom_m[c, ln],
            mom_c[c, ln],
            gain[0, ln],
            gain[1, ln],
            inv_jam,
            k_m,
            k_c,
        )
        mom_m[c, ln] += r_m * d_m
        mom_c[c, ln] += r_c * d_c
        fastest *= inv_dx
        speed[ln] = fastest if fastest > speed[ln] else speed[ln]


@point
def relax_cell_nb(lo, hi, c, inv_jam, k_m, k_c, cells, gain):
    """Relax cell c in place, and its speeds and w for the fluxes."""
    rho_m, rho_c, mom_m, mom_c, v_m, v_c, w_m, w_c = cells
    for ln in range(lo, hi):
        r_m = rho_m[c, ln]
        r_c = rho_c[c, ln]
        now_m, now_c, big_m, big_c, d_m, d_c, _ = cell_nb(
            r_m,
            r_c,
            mom_m[c, ln],
            mom_c[c, ln],
            gain[0, ln],
            gain[1, ln],
            inv_jam,
            k_m,
            k_c,
        )
        v_m[c, ln] = now_m
        v_c[c, ln] = now_c
        w_m[c, ln] = big_m
        w_c[c, ln] = big_c
        mom_m[c, ln] += r_m * d_m
        mom_c[c, ln] += r_c * d_c


@point
def relax_segment_nb(lo, hi, s, roads, cells, scratch, street, totals):
    """relax_cell_nb for the cells of segment s; adds the time of the step that begins."""
    rho_m, rho_c = cells.rho_m, cells.rho_c
    total = scratch.total
    k_m = roads.limit[0, s]
    k_c = roads.limit[1, s]
    for ln in range(lo, hi):
        total[0, ln] = ZERO
    for c in range(roads.first[s], roads.first[s + 1]):
        relax_cell_nb(lo, hi, c, roads.inv_jam[s], k_m, k_c, cells, scratch.gain)
        for ln in range(lo, hi):
            total[0, ln] += rho_m[c, ln] + rho_c[c, ln]
    for ln in range(lo, hi):
        time = 1.0 * scratch.dt[ln] * roads.dx[s] * total[0, ln]
        street.delay[s, ln] += time
        totals[TIME, ln] += time


@point
def share_nb(want, other, supply):
    """The share of what wants in that fits in; other: cross * what the other class wants."""
    both = want + other
    return supply / (both + TINY) if supply < both else ONE


@point
def wait_nb(lo, hi, s, roads, scratch, street):
    """scratch.into[:, s] <- what wants in over an entry: who waits outside, and who arrives."""
    e = roads.entry[s]
    queue = street.queue
    rate = scratch.rate
    dt = scratch.dt
    for k in range(2):
        for ln in range(lo, hi):
            step = dt[ln] if dt[ln] > ZERO else ONE
            scratch.into[k, s, ln] = queue[k, e, ln] / step + rate[k, e, ln]


@point
def enter_nb(lo, hi, s, roads, scratch, street, totals):
    """What fits in over an entry enters, the others wait."""
    e = roads.entry[s]
    queue = street.queue
    rate = scratch.rate
    dt = scratch.dt
    for k in range(2):
        for ln in range(lo, hi):
            scratch.into[k, s, ln] *= scratch.fits[k, s, ln]
        for ln in range(lo, hi):
            came = dt[ln] * rate[k, e, ln]
            after = queue[k, e, ln] + came - dt[ln] * scratch.into[k, s, ln]
            low = after if after < 0.0 else 0.0  # rounding
            queue[k, e, ln] = after - low
            totals[LOST + k, ln] -= low
            totals[ARRIVED + k, ln] += came
            waits = dt[ln] * (after - low)
            street.delay[s, ln] += waits
            totals[TIME, ln] += waits


@point
def want_nb(lo, hi, s, roads, cells, scratch):
    """scratch.fits[:, s] <- the share of what wants to enter segment s that its supply allows.

    Supply is that of the flow-weighted mean of the incoming w.
    """
    c = roads.first[s]
    total = scratch.total
    begin = roads.source_ptr[s]
    end = roads.source_ptr[s + 1]
    is_entry = roads.entry[s] >= 0
    for k in range(2):
        _, _, _, _, w, _ = class_of_nb(cells, k)
        limit = roads.limit[k, s]
        for ln in range(lo, hi):
            total[k, ln] = ZERO
            total[2 + k, ln] = ZERO
        if is_entry:
            for ln in range(lo, hi):
                total[k, ln] += scratch.into[k, s, ln]
                total[2 + k, ln] += scratch.into[k, s, ln] * limit
        for j in range(begin, end):
            i = roads.sources[j]
            last = roads.first[i + 1] - 1
            for ln in range(lo, hi):
                flow = scratch.share[j, ln] * scratch.out[k, i, ln]
                total[k, ln] += flow
                total[2 + k, ln] += flow * w[last, ln]
    for k in range(2):
        _, _, _, v, _, cross = class_of_nb(cells, k)
        limit = roads.limit[k, s]
        bound = limit if begin < end else ZERO  # who comes from outside has w = limit
        for ln in range(lo, hi):
            want = total[k, ln]
            mean = total[2 + k, ln] / (want + TINY)
            mean = mean if mean < bound else limit
            supply = roads.jam[s] * supply_nb(mean, v[c, ln], limit)
            fits = share_nb(want, cross * total[1 - k, ln], supply)
            scratch.fits[k, s, ln] = fits


@point
def pass_nb(lo, hi, s, k, roads, cells, scratch):
    """What enters segment s over an entry and from its sources, no faster than its limit."""
    _, _, _, _, w, _ = class_of_nb(cells, k)
    limit = roads.limit[k, s]
    if roads.entry[s] < 0:
        for ln in range(lo, hi):
            scratch.into[k, s, ln] = ZERO
    for ln in range(lo, hi):
        scratch.into_mom[k, s, ln] = scratch.into[k, s, ln] * limit
    for j in range(roads.source_ptr[s], roads.source_ptr[s + 1]):
        i = roads.sources[j]
        last = roads.first[i + 1] - 1
        for ln in range(lo, hi):
            flow = scratch.share[j, ln] * scratch.out[k, i, ln]
            fastest = w[last, ln] if w[last, ln] < limit else limit
            scratch.into[k, s, ln] += flow
            scratch.into_mom[k, s, ln] += flow * fastest


@point
def send_nb(lo, hi, s, k, roads, cells, scratch):
    """What class k wants to send over the end of segment s: its demand, or nothing at red."""
    own, other, _, v, w, cross = class_of_nb(cells, k)
    c = roads.first[s + 1] - 1
    limit = roads.limit[k, s]
    for ln in range(lo, hi):
        both = own[c, ln] + cross * other[c, ln]
        demand = demand_nb(both * roads.inv_jam[s], v[c, ln], w[c, ln], limit)
        part = scratch.gate[s, ln] * own[c, ln] / (both + TINY)
        scratch.out[k, s, ln] = part * roads.jam[s] * demand


@point
def admit_nb(lo, hi, s, roads, scratch):
    """scratch.admit[s] <- the share of what wants over the end of segment s that may.

    At most the saturation flow and, where it gives way, what the gaps between those who have
    priority let through: Siegloch's (1973) f exp(-gap q) for their flow q.
    """
    out, total = scratch.out, scratch.total
    for ln in range(lo, hi):
        total[0, ln] = ZERO
    for j in range(roads.yield_ptr[s], roads.yield_ptr[s + 1]):
        i = roads.yield_to[j]
        for ln in range(lo, hi):
            total[0, ln] += out[0, i, ln] + out[1, i, ln]
    for ln in range(lo, hi):
        most = scratch.follow[s, ln] * math.exp(-roads.gap[s] * total[0, ln])
        most = most if most < scratch.saturation[s, ln] else scratch.saturation[s, ln]
        scratch.admit[s, ln] = share_nb(out[0, s, ln], out[1, s, ln], most)


@fast
def junctions_nb(lo, hi, roads, cells, scratch, street, totals):
    """Fluxes over the ends and starts of all segments.

    The smallest share that the segments allow into which a stop line's traffic turns holds for all
    of it (first in, first out).
    """
    n = roads.first.size - 1
    out = scratch.out
    total = scratch.total
    for s in range(n):
        for k in range(2):
            send_nb(lo, hi, s, k, roads, cells, scratch)
    for i in range(roads.limited.size):  # none changes what the others want before all are done
        admit_nb(lo, hi, roads.limited[i], roads, scratch)
    for i in range(roads.limited.size):
        s = roads.limited[i]
        for k in range(2):
            for ln in range(lo, hi):
                out[k, s, ln] *= scratch.admit[s, ln]
    for s in range(n):
        if roads.entry[s] >= 0:
            wait_nb(lo, hi, s, roads, scratch, street)
        want_nb(lo, hi, s, roads, cells, scratch)
        if roads.entry[s] >= 0:
            enter_nb(lo, hi, s, roads, scratch, street, totals)
    for s in range(n):
        for k in range(2):
            for ln in range(lo, hi):
                total[0, ln] = ONE
            for m in range(roads.target_ptr[s], roads.target_ptr[s + 1]):
                to = roads.targets[m]
                for ln in range(lo, hi):
                    fits = scratch.fits[k, to, ln]
                    total[0, ln] = fits if fits < total[0, ln] else total[0, ln]
            for ln in range(lo, hi):
                out[k, s, ln] *= total[0, ln]
            if roads.leave[s] > ZERO:  # an exit, or trips that end here
                for ln in range(lo, hi):
                    left = scratch.leave[s, ln] * out[k, s, ln]
                    totals[DEPARTED + k, ln] += scratch.dt[ln] * left
    for s in range(n):
        for k in range(2):
            pass_nb(lo, hi, s, k, roads, cells, scratch)


@point
def drive_nb(lo, hi, s, roads, cells, scratch, street, totals):
    """Transport along segment s and half a relaxation of its cells.

    Delay: time less distance over limit. The distance is that of the fluxes: before a red light a
    cell that is half full stands, whatever the speed of its mean density.
    """
    face = scratch.face
    left = scratch.left
    left_mom = scratch.left_mom
    lost = scratch.lost
    total = scratch.total
    end = roads.first[s + 1] - 1
    for k in range(2):
        for ln in range(lo, hi):
            left[k, ln] = scratch.into[k, s, ln]
            left_mom[k, ln] = scratch.into_mom[k, s, ln]
            lost[k, ln] = ZERO
            total[k, ln] = ZERO
    for c in range(roads.first[s], end + 1):
        if c < end:
            face_nb(lo, hi, c, s, 0, roads, cells, face)
            face_nb(lo, hi, c, s, 1, roads, cells, face)
        else:
            for ln in range(lo, hi):
                face[0, ln] = scratch.out[0, s, ln]
                face[1, ln] = scratch.out[1, s, ln]
        transport_nb(lo, hi, c, 0, roads.inv_dx[s], cells, scratch)
        transport_nb(lo, hi, c, 1, roads.inv_dx[s], cells, scratch)
        settle_nb(lo, hi, c, s, roads, cells, scratch.gain, scratch.speed)
    for k in range(2):
        for ln in range(lo, hi):
            totals[LOST + k, ln] += lost[k, ln] * roads.dx[s]
            distance = 1.0 * scratch.dt[ln] * roads.dx[s] * total[k, ln]
            totals[DISTANCE, ln] += distance
            street.delay[s, ln] -= distance / roads.limit[k, s]


@fast
def set_steps_nb(lo, hi, scratch, totals):
    """The next time step of every lane, as equal as they come.

    -> whether any lane still has time to go.
    """
    dt = scratch.dt
    rest = scratch.rest
    speed = scratch.speed
    busy = False
    for ln in range(lo, hi):
        n = math.ceil(rest[ln] * speed[ln] / np.float32(CFL))
        n = n if n > 1 else 1
        dt[ln] = rest[ln] / n
        rest[ln] = rest[ln] - dt[ln] if n > 1 else ZERO
        if dt[ln] > ZERO:
            busy = True
            totals[STEPS, ln] += 1.0
            courant = dt[ln] * speed[ln]
            if courant > totals[MAX_CFL, ln]:
                totals[MAX_CFL, ln] = courant
        for k in range(2):
            scratch.gain[k, ln] = 1.0 - math.exp(-0.5 * dt[ln] / TAU[k])
        speed[ln] = ZERO
    return busy


@fast
def advance_nb(lo, hi, seconds, roads, cells, scratch, street, totals):
    """Advance these lanes by `seconds`, every lane with time steps of its own.

    Strang: relax dt/2, transport dt (Euler), relax dt/2; the last relaxation also finds the next
    step's speed.
    """
    n = roads.first.size - 1
    for ln in range(lo, hi):
        scratch.rest[ln] = seconds
        scratch.speed[ln] = ZERO
        scratch.gain[0, ln] = ZERO
        scratch.gain[1, ln] = ZERO
    for s in range(n):
        for c in range(roads.first[s], roads.first[s + 1]):
            settle_nb(lo, hi, c, s, roads, cells, scratch.gain, scratch.speed)
    while set_steps_nb(lo, hi, scratch, totals):
        for s in range(n):
            relax_segment_nb(lo, hi, s, roads, cells, scratch, street, totals)
        junctions_nb(lo, hi, roads, cells, scratch, street, totals)
        for s in range(n):
            drive_nb(lo, hi, s, roads, cells, scratch, street, totals)


@fast
def switch_nb(lo, hi, action, roads, street, totals):
    """Take the decisions: action (N, G) int64, the phase asked for.

    A request counts after the minimum green.
    """
    for g in range(roads.n_phases.size):
        for ln in range(lo, hi):
            asked = action[ln, g]
            free = street.age[g, ln] + SOON >= roads.free[g]
            if free and asked != street.phase[g, ln] and 0 <= asked < roads.n_phases[g]:
                street.before[g, ln] = street.phase[g, ln]
                street.phase[g, ln] = asked
                street.age[g, ln] = 0.0
                totals[SWITCHES, ln] += 1.0


@fast
def gates_nb(lo, hi, roads, scratch, street):
    """Of signals: gate <- 1 where a stop line is open, else 0; follow <- inf where a minor green
    has priority.

    A green that ends is open through amber; one that goes on in the next phase stays open.
    """
    for s in range(roads.signal.size):
        g = roads.signal[s]
        if g >= 0:
            green = roads.green[s]
            minor = roads.minor[s]
            closes = roads.closes[g]
            opens = roads.opens[g]
            for ln in range(lo, hi):
                age = street.age[g, ln] + SOON
                phase = street.phase[g, ln]
                shown = phase if age >= opens else street.before[g, ln]
                stays = (green >> phase) | (age < closes)
                scratch.gate[s, ln] = (green >> shown) & stays & 1
                if minor != 0:
                    gives_way = (minor >> shown) & 1 == 1
                    scratch.follow[s, ln] = roads.follow[s] if gives_way else INF


@fast
def zones_nb(lo, hi, roads, cells, total, street, totals):
    """street.zones <- mean filling of three zones (share of jam density), near first.

    The next three rows: what stands of it. totals[STORED] <- vehicles inside and outside.
    """
    zones = street.zones
    for k in range(2):
        for ln in range(lo, hi):
            totals[STORED + k, ln] = 0.0
        for e in range(roads.demand.shape[2]):
            for ln in range(lo, hi):
                totals[STORED + k, ln] += street.queue[k, e, ln]
    for s in range(roads.first.size - 1):
        inv_jam = roads.inv_jam[s]
        dx = roads.dx[s]
        k_m = roads.limit[0, s]
        k_c = roads.limit[1, s]
        for z in range(6):
            for ln in range(lo, hi):
                zones[z, s, ln] = ZERO
        for c in range(roads.first[s], roads.first[s + 1]):
            z = roads.zone_of[c]
            share = roads.zone_share[c] * inv_jam
            for ln in range(lo, hi):
                r_m = cells.rho_m[c, ln]
                r_c = cells.rho_c[c, ln]
                v_m, v_c, _, _, _, _, _ = cell_nb(
                    r_m,
                    r_c,
                    cells.mom_m[c, ln],
                    cells.mom_c[c, ln],
                    ZERO,
                    ZERO,
                    inv_jam,
                    k_m,
                    k_c,
                )
                zones[z, s, ln] += share * (r_m + r_c)
                total[0, ln] = share * (
                    r_m * (ONE - v_m / k_m) + r_c * (ONE - v_c / k_c)
                )
                totals[STORED, ln] += 1.0 * r_m * dx
                totals[STORED + 1, ln] += 1.0 * r_c * dx
            for ln in range(lo, hi):
                zones[3 + z, s, ln] += total[0, ln]


@fast
def vehicles_nb(ln, s, first, roads, street):
    """Vehicles on segment s by rows `first`, `first` + 1, `first` + 2 of the zones: all, or (3)
    what stands of them."""
    total = ZERO
    for z in range(3):
        total += roads.room[z, s] * street.zones[first + z, s, ln]
    return total


@fast
def load_nb(ln, s, first, roads, street):
    """Vehicles that the end of segment s is to serve: vehicles_nb of it and, up to the signals
    behind it, of its sources."""
    total = vehicles_nb(ln, s, first, roads, street)
    for j in range(roads.source_ptr[s], roads.source_ptr[s + 1]):
        i = roads.sources[j]
        if roads.signal[i] < 0:
            total += roads.share[j] * vehicles_nb(ln, i, first, roads, street)
    return total


@fast
def see_approach_nb(lo, hi, g, s, d, most, obs, roads, street, rules):
    """obs[lo:hi, g, d:] <- what junction g sees of its approach s.

    Of a wide observation also the last columns: of each phase, of `most`, what stands, then what
    comes.
    """
    zones = street.zones
    queue = street.queue
    e = roads.entry[s]
    by_phase = obs.shape[2] - 2 * most
    for ln in range(lo, hi):
        for z in range(6):
            obs[ln, g, d + z] = zones[z, s, ln]
        if e >= 0:
            obs[ln, g, d + 6] = 0.1 * (queue[0, e, ln] + queue[1, e, ln])
        obs[ln, g, d + 7] = (roads.green[s] >> street.phase[g, ln]) & 1
        # who may be on the way here
        for j in range(roads.source_ptr[s], roads.source_ptr[s + 1]):
            i = roads.sources[j]
            share = roads.share[j]
            far = roads.signal[i]
            is_open = far >= 0 and (roads.green[i] >> street.phase[far, ln]) & 1
            obs[ln, g, d + (8 if is_open else 9)] += share * zones[0, i, ln]
            if rules.wide and far < 0:
                for z in range(6):
                    obs[ln, g, d + 10 + z] += share * zones[z, i, ln]
        if rules.wide:
            stands = load_nb(ln, s, 3, roads, street) + 10 * obs[ln, g, d + 6]
            comes = load_nb(ln, s, 0, roads, street)
            for p in range(roads.n_phases[g]):
                if (roads.green[s] >> p) & 1:
                    obs[ln, g, by_phase + p] += 0.1 * stands
                    obs[ln, g, by_phase + most + p] += 0.1 * comes


@fast
def observe_nb(lo, hi, obs, roads, street, rules):
    """obs (N, G, D): what each junction sees. Layout: NetworkVectorEnv."""
    width = obs.shape[2]
    most = 0
    for n in roads.n_phases:
        most = n if n > most else most
    end = width - 2 * most if rules.wide else width
    for g in range(roads.n_phases.size):
        for ln in range(lo, hi):
            for d in range(width):
                obs[ln, g, d] = ZERO
        d = 0
        for a in range(roads.approach.shape[1]):
            s = roads.approach[g, a]
            if s >= 0:
                see_approach_nb(lo, hi, g, s, d, most, obs, roads, street, rules)
            d += 16 if rules.wide else 10
        for a in range(roads.exits.shape[1]):
            s = roads.exits[g, a]
            if s >= 0:
                for ln in range(lo, hi):
                    for z in range(3):
                        obs[ln, g, d + z] = street.zones[z, s, ln]
            d += 3
        after = d + most  # the phase
        for ln in range(lo, hi):
            age = street.age[g, ln]
            minutes = age / 60.0
            obs[ln, g, d + street.phase[g, ln]] = ONE
            obs[ln, g, after] = minutes if minutes < 2.0 else 2.0
            obs[ln, g, after + 1] = ONE if age + SOON >= roads.free[g] else ZERO
            if end > after + 2:
                obs[ln, g, after + 2 + g] = ONE


@fast
def pay_nb(lo, hi, roads, street, result):
    """local_reward <- minus the delay of the interval, by junction.

    Adds it to the totals; marks lanes with a number that is not finite.
    """
    junctions = roads.n_phases.size
    for ln in range(lo, hi):
        for g in range(junctions):
            result.local_reward[ln, g] = 0.0
    for s in range(len(roads.owner)):
        for ln in range(lo, hi):
            delay = street.delay[s, ln]
            if not -1e30 < delay < 1e30:
                delay = 0.0
                if street.broken[ln] == 0:
                    street.broken[ln] = 1 + s
            result.totals[DELAY, ln] += delay
            for g in roads.owner[s]:
                if g >= 0:
                    result.local_reward[ln, g] -= delay
            if roads.owner[s, 0] < 0:
                for g in range(junctions):
                    result.local_reward[ln, g] -= delay / junctions


@fast
def start_nb(ln, roads, cells, street, totals, rules):
    """Lane ln begins its next episode: random filling, the first phase, nobody outside."""
    lane = street.lane_id[ln]
    episode = street.episode_id[ln]
    street.decision[ln] = 0
    for row in range(ROWS):
        totals[row, ln] = 0.0
    for g in range(roads.n_phases.size):
        street.phase[g, ln] = 0
        street.before[g, ln] = 0
        street.age[g, ln] = roads.free[g]
    for e in range(roads.demand.shape[2]):
        street.queue[0, e, ln] = 0.0
        street.queue[1, e, ln] = 0.0
    for s in range(roads.first.size - 1):
        y = rules.fill * uniform_nb(rules.seed, lane, episode, (1 << 40) + s)
        bikes = uniform_nb(rules.seed, lane, episode, (1 << 41) + s)
        for c in range(roads.first[s], roads.first[s + 1]):
            rho_m = y * bikes * roads.jam[s]
            rho_c = y * (1.0 - bikes) * roads.jam[s]
            cells.rho_m[c, ln] = rho_m
            cells.rho_c[c, ln] = rho_c
            cells.mom_m[c, ln] = rho_m * roads.limit[0, s]
            cells.mom_c[c, ln] = rho_c * roads.limit[1, s]
            totals[STARTED, ln] += cells.rho_m[c, ln] * roads.dx[s]
            totals[STARTED + 1, ln] += cells.rho_c[c, ln] * roads.dx[s]


@fast
def draw_demand_nb(lo, hi, roads, scratch, street, rules):
    for ln in range(lo, hi):
        lane = street.lane_id[ln]
        episode = street.episode_id[ln]
        second = street.decision[ln] * rules.interval
        level = street.level[0, ln]
        share = uniform_nb(rules.seed, lane, episode, 0)
        level += (street.level[1, ln] - level) * share
        row = street.decision[ln]
        row = row if row < roads.demand.shape[0] else 0
        for e in range(roads.demand.shape[2]):
            factor = demand_factor_nb(rules.seed, lane, episode, e, second, rules)
            factor *= level
            scratch.rate[0, e, ln] = roads.demand[row, 0, e] * factor
            scratch.rate[1, e, ln] = roads.demand[row, 1, e] * factor


@fast
def spread_nb(half, ln, draw, street, rules):
    """A factor of lane ln's episode, from 1 - half to 1 + half."""
    lane = street.lane_id[ln]
    episode = street.episode_id[ln]
    uniform = uniform_nb(rules.seed, lane, episode, draw)
    return 1.0 + half * (2.0 * uniform - 1.0)


@fast
def draw_roads_nb(lo, hi, roads, scratch, street, rules):
    """Saturation flows and turning shares of the lanes' episodes."""
    for s in range(roads.signal.size):
        for ln in range(lo, hi):
            factor = spread_nb(rules.saturation, ln, (1 << 42) + s, street, rules)
            scratch.saturation[s, ln] = roads.saturation[s] * factor
            total = roads.leave[s]
            for m in range(roads.target_ptr[s], roads.target_ptr[s + 1]):
                j = roads.place[m]
                factor = spread_nb(rules.turns, ln, (1 << 43) + j, street, rules)
                scratch.share[j, ln] = roads.share[j] * factor
                total += scratch.share[j, ln]
            scratch.leave[s, ln] = roads.leave[s] / total
            for m in range(roads.target_ptr[s], roads.target_ptr[s + 1]):
                scratch.share[roads.place[m], ln] /= total


@fast
def end_nb(lo, hi, roads, cells, scratch, street, result, rules):
    """Lanes whose episode is over keep its last observation and totals, and begin the next."""
    for ln in range(lo, hi):
        street.decision[ln] += 1
        result.totals[DECISIONS, ln] += 1.0
        terminated = street.broken[ln] > 0
        over = street.decision[ln] >= rules.length
        result.flags[0, ln] = terminated
        result.flags[1, ln] = over and not terminated
        if over or terminated:
            for row in range(ROWS):
                result.finals[row, ln] = result.totals[row, ln]
            for g in range(result.obs.shape[1]):
                for d in range(result.obs.shape[2]):
                    result.final_obs[ln, g, d] = result.obs[ln, g, d]
            street.episode_id[ln] += 1
            start_nb(ln, roads, cells, street, result.totals, rules)
            behind = np.uint64(ln) + np.uint64(1)
            zones_nb(ln, behind, roads, cells, scratch.total, street, result.totals)
            observe_nb(ln, behind, result.obs, roads, street, rules)


@fast
def decide_nb(lo, hi, action, roads, cells, scratch, street, result, rules):
    """One decision: signals, demand, traffic, reward, observation, autoreset."""
    totals = result.totals
    for s in range(roads.signal.size):
        for ln in range(lo, hi):
            street.delay[s, ln] = 0.0
    draw_demand_nb(lo, hi, roads, scratch, street, rules)
    if rules.saturation > 0.0 or rules.turns > 0.0:
        draw_roads_nb(lo, hi, roads, scratch, street, rules)
    switch_nb(lo, hi, action, roads, street, totals)
    for i in range(roads.pieces.size):
        piece = roads.pieces[i]
        gates_nb(lo, hi, roads, scratch, street)
        advance_nb(lo, hi, piece, roads, cells, scratch, street, totals)
        for g in range(roads.n_phases.size):
            for ln in range(lo, hi):
                street.age[g, ln] += piece
    pay_nb(lo, hi, roads, street, result)
    zones_nb(lo, hi, roads, cells, scratch.total, street, totals)
    observe_nb(lo, hi, result.obs, roads, street, rules)
    end_nb(lo, hi, roads, cells, scratch, street, result, rules)


@fast
def begin_nb(lo, hi, stagger, roads, cells, scratch, street, result, rules):
    """First observations of the episodes that street.episode names; stagger 1: of every length."""
    for ln in range(lo, hi):
        start_nb(ln, roads, cells, street, result.totals, rules)
        # golden ratio: even, whatever share of the lanes is here
        part = street.lane_id[ln] * 0.6180339887498949 % 1.0
        street.decision[ln] = int(part * rules.length * stagger)
        street.broken[ln] = 0
    zones_nb(lo, hi, roads, cells, scratch.total, street, result.totals)
    observe_nb(lo, hi, result.obs, roads, street, rules)


@fast
def show_nb(lo, hi, _, roads, cells, scratch, street, result, rules):
    """result.obs <- what street.zones, queue, phase and age look like."""
    observe_nb(lo, hi, result.obs, roads, street, rules)


@nb.njit(parallel=True, cache=True, error_model="numpy")
def decide_cpu(block, action, roads, cells, scratch, street, result, rules):
    """All lanes, in blocks that a core's cache holds."""
    n = street.lane_id.size
    for i in nb.prange((n + block - 1) // block):
        lo = np.uint64(i * block)
        hi = np.uint64(min((i + 1) * block, n))
        decide_nb(lo, hi, action, roads, cells, scratch, street, result, rules)


@nb.njit(cache=True, error_model="numpy")
def begin_cpu(block, stagger, roads, cells, scratch, street, result, rules):
    lo = np.uint64(0)
    hi = np.uint64(street.lane_id.size)
    begin_nb(lo, hi, stagger, roads, cells, scratch, street, result, rules)


@nb.njit(cache=True, error_model="numpy")
def show_cpu(block, argument, roads, cells, scratch, street, result, rules):
    lo = np.uint64(0)
    hi = np.uint64(street.lane_id.size)
    show_nb(lo, hi, argument, roads, cells, scratch, street, result, rules)


@cache
def on_gpu(function):
    """A kernel of decide_cpu's and begin_cpu's arguments, one thread a lane."""

    def kernel(block, argument, roads, cells, scratch, street, result, rules):
        ln = cuda.grid(1)
        if ln < street.lane_id.size:
            lo = np.uint64(ln)
            hi = np.uint64(ln + 1)
            function(lo, hi, argument, roads, cells, scratch, street, result, rules)

    return cuda.jit(kernel)


# -------------------------------------------------------------------------------------- environment
def part_starts(segments: np.ndarray, n: int) -> np.ndarray:
    """(n + 1,) where the part of each of n segments begins in moves that are sorted by segment."""
    counts = np.bincount(segments, minlength=n)
    return np.r_[0, np.cumsum(counts)].astype(np.int64)


def roads_of(net: Network, interval: float, length: int, saturation, dtype) -> Roads:
    """What the kernels read of a network; saturation: one for every segment."""
    n = len(net.ends)
    order = np.argsort(net.move_to, kind="stable")
    approach, exits = net.around()
    values = vars(net) | {
        "inv_dx": 1 / net.dx,
        "inv_jam": 1 / net.jam,
        "room": net.zone_length * net.jam,
        "share": net.share[order],
        "saturation": saturation,
        "target_ptr": part_starts(net.move_from, n),
        "targets": net.move_to,
        "source_ptr": part_starts(net.move_to, n),
        "sources": net.move_from[order],
        "place": np.argsort(order),
        "limited": np.flatnonzero(np.isfinite(saturation) | np.isfinite(net.follow)),
        "demand": net.demand_table(interval, length),
        "closes": net.amber,
        "opens": net.change + net.start_up,
        "free": net.change + net.min_green,
        "pieces": net.pieces(interval),
        "approach": approach,
        "exits": exits,
        "owner": net.owners(),
    }
    real = "dx inv_dx jam inv_jam room limit share leave saturation gap follow zone_share"
    for name in real.split():
        values[name] = np.ascontiguousarray(values[name], dtype)
    return Roads(*(values[name] for name in Roads._fields))


class NetworkVectorEnv(SimulatedLanes):
    """Lanes of signalised traffic; the junctions of a lane are agents that share one network.

    Observation (junctions, D) float32 a lane. For up to A approaches: filling of its last 50 m, of
    the next 100 and of the rest, what stands there, vehicles waiting outside / 10, is it green,
    filling that may come through an open and through a closed stop line; up to A exits: filling of
    the three zones; then the phase (one-hot), its age / 60 s, whether a request counts now and, up
    to 16 junctions, which junction it is (one-hot). Where a junction has more than two phases, or
    segments without a signal lead to one: of an approach also what fills those by zone, what stands
    of it; at the end for every phase the vehicles / 10 that stand before the stop lines that it
    serves, and all of them; and up to 64 junctions are told apart. Action: the phase of every
    junction, asked for each `interval` seconds. Reward: minus the delay (veh s) of the interval;
    local_reward is that of each junction: of the segments that lead to it, and of exits behind it;
    where signals stand less than 60 m apart, what stands before the first counts for both.
    level, variation: range of an episode's mean demand, and of its factors within; saturation,
    turns: half widths of an episode's factors of saturation flows and turning shares.
    """

    # all that a resumed run needs
    SAVED = tuple(
        "rho_m rho_c mom_m mom_c phase before age queue zones level lane_id episode_id decision "
        "broken totals finals obs".split()
    )
    WORST = "mass_error", "max_cfl"
    traced = 0

    def __init__(
        self,
        num_envs: int = 1,
        network: Network | str = "corridor",
        interval: float = 5.0,
        seconds: float = 450.0,
        level: tuple[float, float] = (1.0, 1.0),
        dx: float = CELL_LENGTH,
        dtype: str = "float32",
        seed: int = 1,
        backend: str = "cpu",
        lane0: int = 0,
        cases: str | None = None,
        variation: tuple[float, float, float] = VARIATION,
        fill: float = START_FILL,
        block: int | None = None,
        saturation: float = 0.0,
        turns: float = 0.0,
    ):
        net = self.network = find_network(network, dx)
        check_network(net, interval, seconds)
        self.decision_interval = interval
        self.length = round(seconds / interval)
        self.agents = len(net.nodes)
        phases = int(net.n_phases.max())
        real = np.dtype(dtype)
        # an episode's saturation flow is its factor's, not the diagram's
        flows = net.capacity if saturation else net.saturation
        self.roads = roads_of(net, interval, self.length, flows, real)
        has_signal = net.signal >= 0
        through = ~has_signal[net.move_from] & has_signal[net.move_to]
        wide = phases > 2 or bool(through.any())
        # column where the phase begins
        self.phase_at = (19 if wide else 13) * self.roads.approach.shape[1]
        self.row_obs = self.phase_at + phases + 2
        if self.agents <= (64 if wide else 16):
            self.row_obs += self.agents
        self.row_obs += 2 * phases * wide
        shape = self.agents, self.row_obs
        observation = gym.spaces.Box(-np.inf, np.inf, shape, np.float32)
        action = gym.spaces.MultiDiscrete(net.n_phases)
        super().__init__(num_envs, observation, action, backend, seed)
        self.take_all(real)
        self.settings = interval, int(wide), *variation, fill, saturation, turns
        self.block = block or min(BLOCK, -(-num_envs // nb.get_num_threads()))
        self.kernels = decide_cpu, begin_cpu, show_cpu
        self.gate.fill_(1.0)  # of what has no signal; what episodes draw stands here if none does
        for name in ("share", "leave", "saturation", "follow"):
            values = self.on_device(getattr(self.roads, name))[:, None]
            getattr(self, name)[: len(values)] = values
        if backend == "cuda":
            self.roads = Roads(*map(cuda.to_device, self.roads))
            grid = (num_envs + 63) // 64, 64
            self.kernels = tuple(on_gpu(f)[grid] for f in (decide_nb, begin_nb, show_nb))
        self.splits = {}
        self.n_phases = self.on_device(net.n_phases)
        lane_id = lane0 + np.arange(num_envs)
        levels = np.repeat(np.array(level, float)[:, None], num_envs, 1)
        if cases == "eval":
            lane_id, levels, self.splits = eval_cases(num_envs, level)
        self.assign(lane_id, levels)

    def on_device(self, array) -> torch.Tensor:
        return torch.tensor(np.asarray(array), device=self.torch_device)

    def take_all(self, real):
        """State and scratch of the kernels, from the pool."""
        net = self.network
        sizes = {
            "N": self.num_envs,
            "C": int(net.first[-1]),
            "S": len(net.ends),
            "G": self.agents,
            "E": net.base.shape[2],
            "M": len(net.share) or 1,
            "D": self.row_obs,
            "R": ROWS,
        }
        for shape, names, kind in ARRAYS:
            shape = tuple(sizes.get(axis) or int(axis) for axis in shape)
            for name in names.split():
                self.take(name, shape, kind or real)
        self.records = [
            kind(*(self.arrays[name] for name in kind._fields))
            for kind in (Cells, Scratch, Street, Result)
        ]

    def assign(self, lane_id, levels):
        """Numbers of the lanes in the random numbers (N,), their ranges of the level (2, N)."""
        self.lane_id.copy_(torch.as_tensor(lane_id))
        self.level.copy_(torch.as_tensor(levels))

    def launch(self, kernel, argument):
        """kernel on all lanes, in blocks."""
        rules = Rules(self.seed, self.length, *self.settings)
        blocks = -(-self.num_envs // self.block)
        records = self.roads, *self.records, rules
        self.simulate(kernel, blocks, self.block, argument, *records)

    def reset_lanes(self, first: bool, options: dict):
        """options {"stagger": True}: first episodes of every length.

        So every rollout holds every part of one.
        """
        self.finals.zero_()
        if first:
            self.episode_id.zero_()
        else:
            self.episode_id += 1
        self.launch(self.kernels[1], int(options.get("stagger", False)))

    def step_lanes(self, action):
        """action (N, junctions) int64 -> reward (N,), terminated, truncated.

        local_reward (N, junctions) and obs are new too.
        """
        self.action.copy_(action)
        self.launch(self.kernels[0], self.arrays["action"])
        delay = self.delay.nan_to_num(0.0, 0.0, 0.0).sum(0)  # a broken lane has no number
        return -delay, *self.flags

    def observe(self):
        return self.obs

    def look(self):
        """The observation of what a caller has written into the lanes.

        zones (6, S, N): share of jam density in the near, middle and far zone of a segment, and of
        that what stands (a vehicle counts 1 - v / limit); queue (2, E, N): vehicles outside; phase
        (G, N); age (G, N): s since the switch.
        """
        self.launch(self.kernels[2], 0)
        return self.obs

    def last_observations(self):
        """(N, junctions, D): of lanes whose episode ended in this step, its last one."""
        return self.final_obs

    def stats(self, name: str = "totals") -> dict[str, torch.Tensor]:
        """Of the running episodes, or ("finals") of every lane's last one."""
        totals = getattr(self, name)
        started, arrived, departed, lost, stored = (
            totals[row : row + 2] for row in range(STARTED, ROWS, 2)
        )
        came = started + arrived
        error = (stored + departed - came - lost).abs().sum(0)
        return {
            "episode_return": -totals[DELAY],
            "delay_veh_s": totals[DELAY],
            "throughput_veh": departed.sum(0),
            "mean_speed": totals[DISTANCE] / totals[TIME].clamp(min=1e-9),
            "switches": totals[SWITCHES],
            "mass_error": error / came.sum(0).clamp(min=1e-9),
            "max_cfl": totals[MAX_CFL],
            "episode_length": totals[DECISIONS],
        }

    def check_state(self):
        """Raises CheckFailed where a number was not finite; reads from the device."""
        broken = self.broken.cpu()
        if broken.any():
            lane = int(broken.argmax())
            ends = self.network.ends[int(broken[lane]) - 1]
            where = f"lane {lane}, segment {' > '.join(ends)}"
            raise CheckFailed(f"{where}: the delay is not finite")

    def counts(self, standing: bool = False) -> torch.Tensor:
        """Vehicles (or of those, what stands) on each segment, (S, N)."""
        zones = self.zones[3:] if standing else self.zones[:3]
        room = self.on_device(self.network.zone_length * self.network.jam)
        return (zones * room[..., None]).sum(0)

    def trace(self) -> dict:
        """What a picture of lane 0 needs: phase of each junction, vehicles inside and outside."""
        phases = zip(self.network.nodes, self.phase[:, 0].tolist())
        row = {f"phase_{node}": phase for node, phase in phases}
        outside = self.queue[:, :, 0].sum()
        row["inside_veh"] = float(self.totals[STORED:, 0].sum() - outside)
        row["outside_veh"] = float(outside)
        return row | self.fillings()


def check_network(net: Network, interval: float, seconds: float):
    """Raises NetworkError where nothing can be controlled or times do not fit."""
    steps = seconds / interval
    for wrong, why in (
        (
            not interval > 0 or steps != round(steps),
            f"interval {interval} s must divide the episode's {seconds} s",
        ),
        (not len(net.nodes), f"{net.name}: no signal to control"),
        (
            not net.base.any(),
            f"{net.name}: demand is 0 everywhere: no vehicle ever arrives",
        ),
        (
            net.change_at[-1] >= seconds,
            f"{net.name}: demand changes at minute {net.change_at[-1] / 60:g}, after the end of an "
            f"episode: raise --episode-seconds {seconds:g}",
        ),
    ):
        if wrong:
            raise NetworkError(why)


def eval_cases(n: int, levels: tuple) -> tuple:
    """A fifth of the lanes to choose by, two fifths of other seeds at each demand level."""
    k = n // 5
    if n < 5 or n % 5:
        raise ValueError(
            f"num_envs {n}: evaluation lanes come in fifths (1 selects, 2 for each level)"
        )
    low, high = levels
    unseen = (1 << 20) + np.arange(2 * k)
    lane_id = (1 << 32) + np.r_[np.arange(k), unseen, unseen]
    in_turn = np.where(np.arange(k) % 2, high, low)
    level = np.r_[in_turn, np.repeat(levels, 2 * k)]
    splits = {
        "eval": slice(0, k),
        f"x{low}": slice(k, 3 * k),
        f"x{high}": slice(3 * k, n),
    }
    return lane_id, np.stack((level, level)), splits


def make_vec(num_envs: int = 1, **kwargs) -> NetworkVectorEnv:
    """gymnasium.make_vec("cleanrl_crypto/Network-v0", num_envs=8, network="town3", ...)."""
    return NetworkVectorEnv(num_envs, **kwargs)


register("cleanrl_crypto/Network-v0", make_vec)


# ---------------------------------------------------------------------------------------- baselines
# A controller is make(env, **constants) -> act(obs) -> (N, junctions); constants are tensors (N,):
# every lane its own.
def greens_of(net: Network) -> np.ndarray:
    """(G, phases, S) bool: the segments that each phase serves."""
    phases = np.arange(net.n_phases.max())[:, None]
    junctions = np.arange(len(net.nodes))[:, None]
    is_green = net.green >> phases & 1 == 1
    ends_there = net.signal == junctions
    return ends_there[:, None] & is_green


def flow_ratios(env) -> np.ndarray:
    """Critical flow of every phase over capacity in the mean demand of an episode, (G, phases).

    What is green in several phases counts in one of them, as far as the others leave it short.
    """
    net = env.network
    demand = net.demand_table(env.decision_interval * env.length, 1)[0]
    ratio = net.mean_flows(demand) / net.capacity
    table = greens_of(net)
    critical = np.zeros(table.shape[:2])
    for s in np.argsort(table.sum((0, 1)), kind="stable"):
        for y, greens in zip(critical, table[:, :, s]):
            if greens.any():
                p = np.flatnonzero(greens)[y[greens].argmax()]
                others = y[greens].sum() - y[p]
                y[p] = max(y[p], ratio[s] - others)
    return critical


def webster_plan(flows, saturation: float, lost: float) -> tuple[float, np.ndarray]:
    """Webster (1958): cycle and greens (s).

    Critical flow ratios y_i = flows / saturation (phases,), lost time L (s):
    C0 = (1.5 L + 5) / (1 - Y), g_i = y_i / Y (C0 - L); no flow: equal greens.
    ValueError where Y >= 1.
    """
    y = np.asarray(flows, float) / saturation
    total = y.sum()
    if total >= 1:
        raise ValueError(
            f"flow ratios {y.round(3).tolist()} add up to {total:.3f}: no cycle serves 1 or more"
        )
    cycle = (1.5 * lost + 5.0) / (1.0 - total)
    share = np.full(len(y), 1 / len(y))
    if total > 0:
        share = y / total
    return cycle, share * (cycle - lost)


def serve_in_turn(env, slots: np.ndarray, speed):
    """Phases in turn for slots (G, phases, N) seconds, one cycle for all.

    Each lasts at least all-red and minimum green; a junction with a shorter cycle gets the rest in
    proportion. A green wave of `speed` (m/s, 0: all together) runs along the junctions' order.
    """
    net = env.network
    interval = env.decision_interval
    least = np.ceil((net.change + net.min_green) / interval) * interval
    exists = (np.arange(slots.shape[1]) < net.n_phases[:, None])[..., None]
    slots = np.maximum(slots, least[:, None, None]) * exists
    own = slots.sum(1, keepdims=True)
    cycle = own.max(0, keepdims=True)
    slots = slots * (cycle / own)
    speed = speed.cpu().numpy()
    reach = net.reach()[:, None]
    offset = np.where(speed > 0, reach / np.maximum(speed, 1e-9), 0.0)
    return in_turn(env, slots, cycle[:, 0], offset)


def in_turn(env, slots, cycle, offset):
    """Phases for slots (G, phases, N or 1) s, again every `cycle` s; the first begins at
    `offset`."""
    offset, cycle, ends = map(env.on_device, (offset, cycle, slots.cumsum(1)))
    last = env.n_phases - 1

    def act(obs):
        at = (env.decision * env.decision_interval - offset) % cycle  # (G, N)
        phase = (ends <= at[:, None] + 1e-6).sum(1)
        return torch.minimum(phase, last[:, None]).T

    return act


def own_program(env):
    """The map's own program, its switches at the decisions nearest to them."""
    net = env.network
    slots = net.durations + net.change[:, None]
    slots = np.where(net.durations > 0, slots, 0.0)[..., None]
    # a slot begins with the switch, the program's first green after amber and all-red
    offset = net.offset - net.change - env.decision_interval / 2
    return in_turn(env, slots, slots.sum(1), offset[:, None])


def fixed_cycle(env, cycle, skew, speed):
    """A cycle of `cycle` s, greens in proportion to the critical flows to the power `skew`."""
    net = env.network
    ratio = flow_ratios(env)
    exists = np.arange(ratio.shape[1]) < net.n_phases[:, None]
    ratio = np.maximum(ratio, 0.05 * ratio.max(1, keepdims=True) + 1e-9)
    weight = (ratio * exists)[..., None] ** skew.cpu().numpy()
    weight = weight * exists[..., None]
    share = weight / weight.sum(1, keepdims=True)
    return serve_in_turn(env, share * cycle.cpu().numpy(), speed)


def webster(env, saturation, speed):
    """Webster's plan for the mean demand.

    saturation: flow of a green over capacity.
    """
    net = env.network
    ratio = flow_ratios(env)
    slots = np.zeros((*ratio.shape, env.num_envs))
    flows, which = np.unique(saturation.cpu().numpy(), return_inverse=True)
    for k, g in product(range(len(flows)), range(env.agents)):
        y = ratio[g, : net.n_phases[g]] / flows[k]
        # beyond .9 the formula's cycle has no end
        y = y * min(1.0, 0.9 / max(y.sum(), 1e-9))
        _, greens = webster_plan(y, 1.0, net.change[g] * len(y))
        slots[g, : len(y), which == k] = greens + net.change[g]
    return serve_in_turn(env, slots, speed)


def served_segments(env) -> torch.Tensor:
    """(G, phases, approaches) segments that a phase serves, the first again to fill the row.

    -1: there is no such phase.
    """
    table = greens_of(env.network)
    rows = [np.flatnonzero(row) for row in table.reshape(-1, table.shape[2])]
    width = max(map(len, rows))
    segments = np.full((len(rows), width), -1)
    for line, row in zip(segments, rows):
        if len(row):
            line[:] = row[0]
            line[: len(row)] = row
    return env.on_device(segments.reshape(*table.shape[:2], width))


def actuated(env, gap, longest):
    """Green goes on while an approach it serves is filled above `gap`, up to `longest` s.

    Filled: its last 50 m. Then the next phase that has traffic.
    """
    segments = served_segments(env)
    phases = env.n_phases[:, None]
    empty = segments[..., :1] < 0
    change = env.on_device(env.network.change)[:, None]

    def act(obs):
        filling = env.zones[0][segments.clamp(min=0)].amax(2)  # (G, phases, N)
        filling = filling.masked_fill(empty, 0.0)
        own = filling.gather(1, env.phase[:, None])[:, 0]
        following = env.phase
        for ahead in range(filling.shape[1] - 1, 0, -1):
            candidate = (env.phase + ahead) % phases
            traffic = filling.gather(1, candidate[:, None])[:, 0]
            waits = (traffic > 0.02) & (candidate != env.phase)
            following = torch.where(waits, candidate, following)
        leave = (own < gap) | (env.age >= longest + change)
        return torch.where(leave, following, env.phase).T

    return act


def phase_pressures(env, standing, downstream: bool = True):
    """Varaiya's pressure of every phase: pressures() -> (G, phases, N).

    saturation x (upstream - share-weighted downstream), of vehicles that stand or (standing 0) all;
    without `downstream` just the vehicles upstream. Upstream reaches to the signals behind.
    """
    net = env.network
    table = greens_of(net)
    at_entry = net.entry >= 0
    entries = env.on_device(np.flatnonzero(at_entry))
    queues = env.on_device(net.entry[at_entry])
    move_from = env.on_device(net.move_from)
    move_to = env.on_device(net.move_to)
    share = env.on_device(-net.share)[:, None]
    saturation = env.on_device(net.capacity)[:, None]
    serves = env.on_device(table * 1.0)
    no_phase = env.on_device(~table.any(2))[..., None]
    through = env.on_device(np.flatnonzero(net.signal[net.move_from] < 0))

    def pressures():
        # (S, N) vehicles
        x = torch.where(standing > 0, env.counts(True), env.counts())
        x[entries] += env.queue.sum(0)[queues]
        before = -share[through] * x[move_from[through]]
        gap = x.index_add(0, move_to[through], before)
        if downstream:
            gap = gap.index_add(0, move_from, x[move_to] * share) * saturation
        return (serves @ gap).masked_fill(no_phase, -math.inf)

    return pressures


def serve_highest(env, pressures, period, margin):
    """Every `period` s the phase of the highest pressure; the one that is green has a `margin`."""

    def act(obs):
        value = pressures()
        present = value.gather(1, env.phase[:, None]) + margin
        value = value.scatter(1, env.phase[:, None], present)
        # the first decision of each period
        ask = env.decision * env.decision_interval % period < env.decision_interval
        return torch.where(ask, value.argmax(1), env.phase).T

    return act


def max_pressure(env, period, standing, margin):
    """The phase of the largest pressure; margin: vehicles."""
    unit = float(np.median(env.network.capacity))
    return serve_highest(env, phase_pressures(env, standing), period, margin * unit)


def greedy_wave(env, period, margin):
    """The phase with most approaching and standing vehicles."""
    pressures = phase_pressures(env, torch.zeros_like(margin), downstream=False)
    return serve_highest(env, pressures, period, margin)


def always_switch(env):
    """Every request is for the next phase: the shortest cycle that the signals allow."""
    phases = env.n_phases[:, None]
    return lambda obs: ((env.phase + 1) % phases).T


CONTROLLERS = {
    make.__name__: make
    for make in (
        fixed_cycle,
        webster,
        actuated,
        max_pressure,
        greedy_wave,
        own_program,
        always_switch,
    )
}
# where the search begins, and what it tries of each constant: s, powers, m/s, filling, vehicles
START = {
    "actuated": {"gap": 0.175, "longest": 25.0},
    "max_pressure": {"period": 15.0, "standing": 1.0, "margin": 1.0},
    "greedy_wave": {"period": 10.0, "margin": 1.0},
    "webster": {"saturation": 0.9, "speed": 12.0},
    "fixed_cycle": {"cycle": 40.0, "skew": 0.5, "speed": 12.0},
    "own_program": {},
    "always_switch": {},
}
GRIDS = {
    "gap": (0.05, 0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25, 0.3),
    "longest": (10.0, 15.0, 20.0, 25.0, 30.0, 40.0, 60.0),
    "standing": (0.0, 1.0),
    "margin": (0.0, 0.5, 1.0, 2.0, 4.0),
    "saturation": (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.6),
    "speed": (0.0, 8.0, 10.0, 12.0, 14.0, 17.0),
    "cycle": (20.0, 30.0, 35.0, 40.0, 45.0, 50.0, 60.0, 75.0, 90.0, 120.0),
    "skew": (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
}
TUNING_LANES = 16  # training lanes that judge one set of constants


def delays(
    env, name: str, rows: list[dict], levels: list[float], deadline: float
) -> np.ndarray | None:
    """Mean delay of every row of constants at its demand level, on training lanes 0, 1, ...

    None: out of time.
    """
    n = min(TUNING_LANES, env.num_envs)
    seats = max(1, env.num_envs // n)  # rows tried at once
    lanes = np.arange(env.num_envs)
    means = []
    for first in range(0, len(rows), seats):
        at = np.minimum(first + lanes // n, len(rows) - 1)
        level = np.array(levels)[at]
        env.assign(lanes % n, np.stack((level, level)))
        env.reset_lanes(True, {})
        act = controller(env, name, [rows[i] for i in at])
        for _ in range(env.length):
            env.step_lanes(act(env.observe()))
            if time.monotonic() > deadline:
                return None
        delay = env.stats("finals")["delay_veh_s"].cpu().numpy()
        stop = min(first + seats, len(rows))
        means += [delay[at == i].mean() for i in range(first, stop)]
    return np.array(means)


def tune(env, seconds: float = math.inf, levels: tuple = LEVELS) -> tuple[dict, int]:
    """Constants of every controller for each demand level -> {name: {level: constants}}, sweeps.

    Coordinate search on training lanes of this network: two sweeps over the constants, or as many
    as `seconds` allow.
    """
    deadline = time.monotonic() + seconds
    best = {
        name: {level: dict(start) for level in levels} for name, start in START.items()
    }
    if not env.network.durations.any(1).all():
        best.pop("own_program")
    for sweep in range(2):
        for name, by_level in best.items():
            for key in START[name]:
                periods = [env.decision_interval * k for k in range(1, 7)]
                values = periods if key == "period" else GRIDS[key]
                rows = [by_level[level] | {key: x} for level in levels for x in values]
                delay = delays(env, name, rows, np.repeat(levels, len(values)), deadline)
                if delay is None:
                    return best, sweep
                for level, of_values in zip(levels, np.split(delay, len(levels))):
                    by_level[level][key] = values[of_values.argmin()]
    return best, 2


def controller(env, name: str, rows: list[dict]):
    """The controller `name` with the constants of rows, one row a lane."""
    constants = {}
    for key in rows[0]:
        constants[key] = env.on_device([row[key] for row in rows])
    return CONTROLLERS[name](env, **constants)


def tuned_controller(env, name: str, by_level: dict):
    """Every lane takes the constants of the demand level nearest to its own."""
    rows = []
    for own in env.level.mean(0).tolist():
        nearest = min(by_level, key=lambda level: abs(level - own))
        rows.append(by_level[nearest])
    return controller(env, name, rows)


# ----------------------------------------------------------------------------------------- networks
def layer(inputs: int, outputs: int, gain: float = math.sqrt(2)) -> nn.Linear:
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
    """Actor and critic that all junctions share. Observations are clipped at 10.

    phase_at: column of the observation where the phase begins: one-hot, its age, whether a request
    counts now.
    """

    def __init__(self, observations: int, phases: int, hidden: int, phase_at: int):
        super().__init__()
        self.phases, self.phase_at = phases, phase_at
        self.actor = mlp(observations, hidden, phases, 0.01)
        self.critic = mlp(observations, hidden, 1, 1.0)

    def normalise(self, obs):  # (B, observations)
        return obs.clamp(-10, 10)

    def value(self, x):  # of normalised observations (B, observations) -> (B,)
        return self.critic(x)[:, 0]

    def logits(self, x):
        """The actor's output; where no request counts, that of the phase that is on.

        Whatever the weights: a decision that decides nothing would only add noise to the gradient
        and to the entropy.
        """
        phase = x[:, self.phase_at : self.phase_at + self.phases]
        free = x[:, self.phase_at + self.phases + 1, None] > 0.5
        return torch.where(free, self.actor(x), 20.0 * phase)

    def act(self, x, noise=None):
        """Greedy phase (B,) of normalised observations, or a sample.

        noise (B, phases): uniform in (0, 1).
        """
        logits = self.logits(x)
        if noise is not None:
            logits = logits - (-noise.log()).log()  # Gumbel's trick
        return logits.argmax(-1)

    def log_prob_entropy(self, x, action):
        """Of phases (B,) in normalised observations: (B,), (B,)."""
        return categorical_log_prob_entropy(self.logits(x), action)

    def forward(self, obs, action):
        """What a minibatch's losses need: log-probability, entropy and value, each (B,)."""
        x = self.normalise(obs)
        return *self.log_prob_entropy(x, action), self.value(x)


# ---------------------------------------------------------------------------------------- algorithm
def categorical_log_prob_entropy(logits, action):
    """logits (B, phases), action (B,) int64 -> (B,), (B,)."""
    log_p = logits.log_softmax(-1)
    log_prob = log_p.gather(-1, action[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_prob, entropy


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
    square = reduce_sum(((advantage - mean) ** 2).sum())
    return (advantage - mean) / ((square / (size - 1)).sqrt() + 1e-8)


class RewardScale:
    """Divides rewards, which are vehicle seconds, by the running std of the discounted return."""

    per_rank = True  # every process follows the returns of its own lanes

    def __init__(self, rows: int, gamma: float, device):
        self.gamma = gamma
        self.running = torch.zeros(rows, dtype=torch.float64, device=device)
        # of all returns so far: how many, their sum, the sum of their squares
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def __call__(self, rewards, ends):  # (T, rows)
        for reward, ended in zip(rewards, ends):
            self.running = self.running * self.gamma + reward
            powers = self.running ** torch.arange(3, device=ends.device)[:, None]
            self.sums = self.sums + reduce_sum(powers.sum(1))
            self.running = self.running.masked_fill(ended, 0.0)
        count, total, squares = self.sums
        variance = squares / count - (total / count) ** 2
        return rewards * (variance + 1e-8).rsqrt().float()

    def state_dict(self) -> dict:
        return {"running": self.running.cpu(), "sums": self.sums.cpu()}

    def load_state_dict(self, state: dict):
        device = self.running.device
        self.running = state["running"].to(device)
        self.sums = state["sums"].to(device)


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
        share = loop.global_step / max(self.end, 1) if args.anneal_lr else 0.0
        self.latest = args.learning_rate * max(0.0, 1 - share)
        return self.latest


# -------------------------------------------------------------------------- evaluation, diagnostics
class Greedy:
    """act(obs): the agent's deterministic policy.

    `states` keeps some of what it saw, for diagnose().
    """

    def __init__(self, agent: Agent):
        self.agent, self.states = agent, []

    @torch.no_grad()
    def __call__(self, obs):  # (..., observations) -> (...)
        device = self.agent.critic[0].weight.device
        obs = torch.as_tensor(obs, dtype=torch.float32, device=device)
        rows = obs.flatten(0, -2)
        step = max(1, len(rows) // 64)
        self.states.append(rows[::step].clone())
        action = self.agent.act(self.agent.normalise(rows))
        return action.reshape(obs.shape[:-1])


def check_env(envs):
    """Real checks of the training environment, which is used and then handed on.

    Raises CheckFailed.
    """
    still = torch.zeros_like(envs.action)
    decisions = min(envs.length, 12)
    envs.reset(seed=1)
    first = envs.observe().clone()
    state = envs.state_dict()
    envs.step_lanes(still + 1)
    other = envs.observe().clone()
    envs.load_state_dict(state)
    envs.step_lanes(still)
    now = envs.observe()
    gap = float((now - other).abs().max())
    moved = float((now - first).abs().max())
    arrived = float(envs.totals[ARRIVED : ARRIVED + 2].sum())
    due = float(envs.rate.sum()) * envs.decision_interval
    # to the end of the episode, without all of the way there
    envs.decision.fill_(envs.length - decisions)
    rewards = []
    early = 0
    for _ in range(decisions):
        reward, terminated, truncated = envs.step_lanes(still)
        rewards += reward.tolist()
        early += int((terminated | truncated).sum())
    envs.check_state()
    ended = int(truncated.sum())
    values = len(np.unique(np.round(rewards, 9)))
    stats = envs.stats("finals")
    steps = float(envs.finals[STEPS].max())
    error = float(stats["mass_error"].max())
    courant = float(stats["max_cfl"].max())
    eps = torch.finfo(envs.rho_c.dtype).eps
    bound = 100 * eps * max(1.0, math.sqrt(steps / 1000))  # sums round at every step
    for good, expected, found in (
        (gap > 1e-6, "two actions to give two states", f"observations {gap} apart"),
        (
            moved > 1e-6,
            "a constant action to change the observation",
            f"a change of {moved}",
        ),
        (
            abs(arrived - due) <= 1e-3 * due,
            f"{due:.3f} vehicles to arrive in a decision of --decision-interval",
            f"{arrived:.3f}",
        ),
        (
            early == ended,
            f"no episode to end before decision {envs.length}",
            f"{early - ended} that did",
        ),
        (
            ended == envs.num_envs,
            f"truncation of every episode at decision {envs.length}",
            f"{ended} of {envs.num_envs}",
        ),
        (
            values > decisions // 2,
            "rewards of many values",
            f"{values} in {decisions} decisions",
        ),
        (
            error <= bound,
            f"vehicles to be conserved to {bound:.1e}",
            f"a relative error of {error:.1e}",
        ),
        (courant <= CFL * (1 + 1e-6), f"Courant numbers up to {CFL}", f"{courant:.3f}"),
        (
            float(stats["throughput_veh"].min()) > 0,
            "vehicles to leave over some exit",
            "none",
        ),
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
            row |= {f"action_{i}": a for i, a in enumerate(action[envs.traced].tolist())}
            rows.append(row | {"reward": float(reward[envs.traced])})
        cut = time.monotonic() - began > seconds and k + 1 < envs.length
        if cut:
            break
    envs.check_state()
    stats = envs.latest()
    result = {}
    for split, lanes in envs.splits.items():
        std = stats["episode_return"][lanes].std(correction=0)
        result[split] = envs.summary(stats, lanes) | {"std": float(std)}
    return result, rows, cut


@torch.no_grad()
def diagnose(agent: Agent, obs) -> dict[str, float]:
    """What the policy does on states obs (B, observations): state_dependence, entropy, ..."""
    x = agent.normalise(obs)
    action = agent.act(x)
    _, entropy = agent.log_prob_entropy(x, action)
    action = action.double()
    return {
        "state_dependence": float(action.std()),
        "action_mean": float(action.mean()),
        "entropy": float(entropy.double().mean()),
        "v_mean": float(agent.value(x).double().mean()),
    }


def verdict(
    audit: dict, result: dict, baselines: dict, updates: int, partial: bool = False
) -> tuple[str, list[str]]:
    """untrained, undecided, collapsed, constant_is_right, undertrained or healthy, and why.

    result, baselines: of the split that chooses; partial: time cut one of them short.
    """
    if updates == 0:
        return "untrained", ["no gradient update was made"]
    delay = result["delay_veh_s"]
    dependence = audit["state_dependence"]
    numbers = f"delay {delay:.0f} veh s, state_dependence {dependence:.3f}"
    if not baselines:
        return "undecided", [f"{numbers}: no baseline to judge it by"]
    if partial:
        why = "time cut an evaluation short: episodes of unequal length are not compared"
        return "undecided", [why, numbers]
    name = min(baselines, key=lambda name: baselines[name]["delay_veh_s"])
    best = baselines[name]["delay_veh_s"]
    percent = 100 * (1 - delay / best)
    side = "lower" if percent >= 0 else "higher"
    rival = f"the best tuned controller, {name}, has {best:.0f}"
    beside = f"{rival}: the agent's is {abs(percent):.1f} % {side}"
    if not dependence >= 0.01:
        word = "constant_is_right" if percent >= -1 else "collapsed"
        return word, [f"one phase in every state: {numbers}", beside]
    if percent < 0:
        why = f"the tuned controller {name} beats the agent: {numbers}"
        return "undertrained", [why, beside]
    return "healthy", [f"the action answers to the state: {numbers}", beside]


def load_policy(checkpoint: str | Path, device: str = "cpu"):
    """policy(obs) -> actions: the deterministic policy of a checkpoint, from its file alone.

    obs (..., junctions, D) NumPy, the environment's own -> (..., junctions) int64, phases.
    Raises CheckpointError.
    """
    state = load_run(checkpoint, Path(__file__), SCHEMA, device)
    agent = Agent(**state["config"]).to(device).eval().requires_grad_(False)
    agent.load_state_dict(state["agent"])
    return lambda obs: Greedy(agent)(obs).cpu().numpy()


# --------------------------------------------------------------------------------------------- main
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
    net: Network,
    backend: str,
    num_envs: int | None = None,
    lane0: int = 0,
    cases: str | None = None,
):
    """The training environment, or with cases="eval" the evaluation one."""
    seconds = net.horizon(args.decision_interval) if args.network else 450.0
    saturation, turns = SPREADS if args.network else (0.0, 0.0)
    if args.saturation_spread is not None:
        saturation = args.saturation_spread
    if args.turn_spread is not None:
        turns = args.turn_spread
    envs = NetworkVectorEnv(
        num_envs or (MAP_LANES if args.network else EVAL_LANES),
        net,
        args.decision_interval,
        args.episode_seconds or seconds,
        args.levels,
        args.cell_length,
        seed=args.seed,
        backend=backend,
        lane0=lane0,
        cases=cases,
        variation=args.variation,
        saturation=saturation,
        turns=turns,
    )
    envs.timed = args.sim_timeout is not None
    return envs


def describe(run: Run, envs) -> dict:
    """What the run is about: the network, and what an evaluation draws."""
    return {
        "spec": run.args.network or run.args.scenario,
        "sha256": envs.network.sha256(),
        "eval_seed": EVAL_SEED,
    }


def agent_config(run: Run, envs) -> dict:
    """Plain values that rebuild the agent from a checkpoint alone.

    Raises UsageError if the checkpoint's differ.
    """
    config = {
        "observations": envs.row_obs,
        "phases": int(envs.network.n_phases.max()),
        "hidden": run.args.hidden,
        "phase_at": envs.phase_at,
    }
    run.check_config(config)
    return config


def check_network_env(run: Run, envs):
    """Compile, then check the training environment."""
    for note in envs.network.notes:
        print(f"note: {note}")
    envs.reset(seed=run.args.seed)
    envs.step_lanes(torch.zeros_like(envs.action))
    envs.longest_call = 0.0  # that was the compiler's
    began = time.monotonic()
    envs.step_lanes(torch.zeros_like(envs.action))
    seconds = (time.monotonic() - began) * 15
    if seconds > run.eval_limit(0.2):
        print(f"sanity: no time for its checks, which take {seconds:.0f} s")
        return
    check_env(envs)
    print(
        f"sanity: the environment passed its checks in {time.monotonic() - began:.1f} s"
    )


def judge_baselines(run: Run, envs, eval_envs) -> tuple[dict, bool]:
    """Results of the controllers; whether one was cut short.

    They are tuned on training lanes within a share of the time.
    """
    run.phase("baselines")
    lanes = envs.lane_id.clone()
    levels = envs.level.clone()
    tuned, sweeps = tune(envs, run.eval_limit(TUNING_SHARE), run.args.levels)
    envs.assign(lanes, levels)
    print(
        f"baselines: constants tuned on {min(TUNING_LANES, envs.num_envs)} training lanes, "
        f"{sweeps} of 2 sweeps"
        + ("" if sweeps == 2 else f" in {100 * TUNING_SHARE:g} % of the time")
    )
    results = {}
    short = False
    for name, by_level in tuned.items():
        texts = []
        for level, constants in by_level.items():
            numbers = ", ".join(f"{k} {v:g}" for k, v in constants.items())
            texts.append(f"x{level}: {numbers}")
        text = "; ".join(texts) if START[name] else "nothing to tune"
        print(f"baseline {name}: {text}")
        make = partial(tuned_controller, name=name, by_level=by_level)
        watched = name == "fixed_cycle"
        results[name], rows, cut = evaluate(make, eval_envs, run.eval_limit(0.05), trace=watched)
        write_trace(run.dir, f"{eval_envs.network.name}_{name}", rows)
        short |= cut
    return results, short


def validate(run: Run, loop: Loop, agent: Agent, eval_envs) -> dict[str, float]:
    """Evaluate, keep the best agent on the validation cases; returns what to log."""
    policy = Greedy(agent)
    result, _, cut = evaluate(lambda envs: policy, eval_envs, run.eval_limit(0.5))
    states = torch.cat(policy.states)
    audit = diagnose(agent, states[:: max(1, len(states) // 4096)])
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


def final_results(run: Run, loop: Loop, agent: Agent, eval_envs, baselines, short):
    """The best agent's results beside the baselines', its diagnostics; writes a trace."""
    policy = Greedy(agent)
    result, rows, cut = evaluate(lambda envs: policy, eval_envs, run.eval_limit(0.8), trace=True)
    write_trace(run.dir, eval_envs.network.name, rows)
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
    audit["verdict"], audit["reasons"] = verdict(
        audit, chosen["agent"], chosen["baselines"], loop.updates, cut or short
    )
    return results, audit


@experiment
def main(argv: list[str] | None = None, envs=None, eval_envs=None) -> dict:
    """Train (or --eval-only), evaluate, report; returns what summary.json holds. Tests hand
    environments over."""
    run = Run(Args, argv, SCHEMA, evaluations=3.0)
    args, device, steps = run.args, run.device, run.args.num_steps
    uneven = f"--num-envs {args.num_envs}: not a multiple of {run.world} processes"
    refuse((args.num_envs % run.world, uneven))
    lanes = args.num_envs // run.world
    net = find_network(args.network or args.scenario, args.cell_length, args.demand)
    make = partial(make_envs, args, net, run.backend)
    envs = run.closing(envs or make(num_envs=lanes, lane0=run.rank * lanes))
    eval_envs = run.closing(eval_envs or make(cases="eval"))
    config = agent_config(run, envs)
    run.open(envs.network.name, describe(run, envs))
    check_network_env(run, envs)
    baselines = {}
    short = False
    if run.rank == 0:
        baselines, short = judge_baselines(run, envs, eval_envs)
    run.phase("setup")
    agent = Agent(**config).to(device)
    weights, lr = list(agent.parameters()), args.learning_rate
    optimizer = torch.optim.Adam(weights, lr, eps=1e-5, fused=True)
    schedule = Schedule(run)
    draws = torch.Generator(device).manual_seed(args.seed)
    forward = torch.compile(agent) if args.compile else agent
    # a row is a junction of a lane: all share the weights, and decide at the same time
    rows = lanes * envs.agents
    all_rows = args.num_envs * envs.agents
    row0 = run.rank * rows
    size = steps * all_rows // args.num_minibatches
    scale = RewardScale(rows, args.gamma, device)
    obs = torch.zeros(steps + 1, rows, config["observations"], device=device)
    last_obs = torch.zeros_like(obs[1:])  # of the episodes that end in a step
    actions = torch.zeros(steps, rows, dtype=torch.int64, device=device)
    log_probs, rewards = torch.zeros(2, steps, rows, device=device)
    terminations, ends = torch.zeros(2, steps, rows, dtype=torch.bool, device=device)
    envs.reset(seed=args.seed, options={"stagger": True})
    policy = dict(agent=agent)
    parts = dict(optimizer=optimizer, envs=envs, scale=scale, draws=draws)
    loop = run.restore(Loop(), config, policy, **parts)
    total = 0 if args.eval_only else args.total_timesteps

    while loop.global_step < total and not run.out_of_time():
        # ALGO LOGIC: action
        run.phase("rollout")
        shape = steps, all_rows, config["phases"]
        noise = torch.rand(shape, generator=draws, device=device)
        noise = noise[:, row0 : row0 + rows]  # the same for a lane in any process
        for t in range(steps):
            with torch.no_grad():
                obs[t] = envs.observe().flatten(0, 1)
                x = agent.normalise(obs[t])
                actions[t] = agent.act(x, noise[t])
                log_probs[t], _ = agent.log_prob_entropy(x, actions[t])
            phases = actions[t].reshape(lanes, envs.agents)
            _, terminated, truncated = envs.step_lanes(phases)
            rewards[t] = envs.local_reward.flatten()  # of every junction
            terminations[t] = terminated.repeat_interleave(envs.agents)
            ends[t] = (terminated | truncated).repeat_interleave(envs.agents)
            last_obs[t] = envs.last_observations().flatten(0, 1)
        obs[steps] = envs.observe().flatten(0, 1)
        loop.global_step += steps * args.num_envs
        loop.iteration += 1
        if args.sim_timeout and envs.longest_call > args.sim_timeout:
            print(f"--sim-timeout: a simulation call took {envs.longest_call:.2f} s")
            run.guard.expired = True

        # ALGO LOGIC: training
        run.phase("learn")
        with torch.no_grad():  # a time limit bootstraps from the state that it cut off
            scaled = scale(rewards, ends)
            values = agent.value(agent.normalise(obs.flatten(0, 1)))
            values = values.reshape(steps + 1, rows)
            next_values = values[1:].clone()
            next_values[ends] = agent.value(agent.normalise(last_obs[ends]))
            advantages, returns = gae(
                scaled,
                values[:-1],
                next_values,
                terminations,
                ends,
                args.gamma,
                args.gae_lambda,
            )
            explained = 1 - (returns - values[:-1]).var() / returns.var()
        optimizer.param_groups[0]["lr"] = schedule.learning_rate(loop)
        columns = obs[:-1], actions, log_probs, advantages, returns
        columns = [column.flatten(0, 1) for column in columns]  # (steps x rows, ...)
        losses, stopped = [], False
        for _ in range(args.update_epochs):
            order = torch.randperm(steps * all_rows, generator=draws, device=device)
            for index in order.split(size):
                if run.world > 1:  # every process takes its rows' share of it
                    t = index // all_rows
                    row = index % all_rows - row0
                    index = (t * rows + row)[(row >= 0) & (row < rows)]
                batch = (column[index] for column in columns)
                x, action, old_log_prob, advantage, target = batch
                log_prob, entropy, value = forward(x, action)
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
                    reduce_sum(p.grad)
                grad_norm = nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
                optimizer.step()
                loop.updates += 1
                with torch.no_grad():
                    kl = (ratio - 1 - log_ratio).sum() / size  # Schulman's k3
                    clipped = ((ratio - 1).abs() > args.clip_coef).sum() / size
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
            envs.check_state()
            if run.rank == 0:
                record |= run.charts(loop, loop.updates * size) | envs.episode_record()
                run.log(record | validate(run, loop, agent, eval_envs), loop)
        run.checkpoint(loop)

    run.phase("eval")
    if run.rank == 0 and not args.eval_only and loop.evaluated < loop.global_step:
        run.log(run.charts(loop) | validate(run, loop, agent, eval_envs), loop)
    run.use_best(loop)
    if run.rank:
        return {"exit_code": run.guard.exit_code}
    results, audit = final_results(run, loop, agent, eval_envs, baselines, short)
    longest = max(envs.longest_call, eval_envs.longest_call)
    more = {
        "selected_by": next(iter(results)),
        "shapes": envs.shapes(),
        "samples_per_transition": loop.updates * size / max(loop.global_step, 1),
        "device": {"longest_simulation_call_s": longest},
    }
    return run.finish(loop, results, audit, COLUMNS, **more)


if __name__ == "__main__":
    exit_with(main)
