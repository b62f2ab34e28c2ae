r"""Trades one market greedily on a grid of 21 exposures, by quantile critics over a frozen encoder.

FiLM (feature-wise modulation) gets the market's hidden state. TQC's truncation and its actor stand
under flags: --policy actor. Funding of perpetual futures: --funding FILE.

On a laptop: embedded market, 3 to 5 minutes on 2 cores, test score .82 to .96 of the optimum:

    python cleanrl_crypto/tqc_film_batch.py --timeout 300

Real bars (scripts/download_data.py gets them); the first of several files is traded:

    python cleanrl_crypto/tqc_film_batch.py --data data/BTCUSDT_1h.parquet --timeout 1800
    python cleanrl_crypto/tqc_film_batch.py --data data/BTCUSDT_1h.parquet,data/ETHUSDT_1h.parquet \
        --split 2023-01-01/2024-01-01

GPU, Kaggle: a GPU is used where a probe shows that it works, for the environment too.

    python cleanrl_crypto/tqc_film_batch.py --data /kaggle/input/bars/BTCUSDT_1h.parquet \
        --run-dir /kaggle/working/run --compile --cudagraphs --timeout 28800

Resume after whatever ended the run, or evaluate a checkpoint on what it was trained on:

    python cleanrl_crypto/tqc_film_batch.py --run-dir runs/btc --data data/BTCUSDT_1h.parquet \
        --resume auto
    python cleanrl_crypto/tqc_film_batch.py --eval-only --checkpoint runs/btc/checkpoints/best.pt

Use the agent in another program, from its checkpoint alone:

    from cleanrl_crypto.tqc_film_batch import load_policy
    policy = load_policy("runs/btc/checkpoints/best.pt")
    action = policy(obs)  # of the environment: market (B, 64, columns), position, w_cost (B, 1)

Every flag: --help. Every metric, and what to do when it is off: docs/tqc_film_batch.md
"""

import functools
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    from common.run import (
        CheckFailed,
        Run,
        RunArgs,
        answer_help,
        check,
        differences,
        exit_with,
        experiment,
        load_run,
        refuse,
    )
except ModuleNotFoundError as e:
    if e.name != "common":
        raise
    home = Path(__file__).resolve().parents[1]
    sys.exit(f"{Path(__file__).name} needs the folder common/: copy it to {home}")

answer_help(__name__, __file__)

import gymnasium as gym
import numba as nb
import numpy as np
import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F
from numba import cuda

from common import markets
from common.data import (
    Bars,
    iso,
    load_bars,
    load_funding,
    print_facts,
    split_rows,
    utc_times,
)
from common.features import CLIP, FeatureModel, Products, fit_features
from common.lanes import Lanes, register, shared
from common.scoring import (
    BP,
    STILL,
    Series,
    best_constant,
    edges,
    fit_linear,
    path_metrics,
    random_path,
    sparse_linear,
    usual_limit,
    verdict,
)
from common.timeout_guard import CheckpointError, load_checkpoint, save_atomic

SCHEMA = 4  # of the checkpoint
FEW_UPDATES = 100  # an agent of fewer is not judged
MODES = ("rebalance", "drift")
POLICIES = ("critic_grid", "actor")
PRECISIONS = ("auto", "bf16", "fp32")
NETWORK_FLAGS = """window d_model recency fusion_width hidden dropout n_critics n_quantiles
    log_std_init reward_scaling gamma"""
TABLE = """score mean_expected_bps mean_reward_bps sharpe max_drawdown turnover exposure trades"""

# market
HMM_COLUMNS = 5  # 4 filtered state posteriors and their entropy
HORIZON = 1  # bars between a decision and the end of its reward
RUIN = 1e-6  # floor of a bar's growth and of what a fee leaves
LOST = 3e-6  # growth that ends the episode: above RUIN, a fee may hit the floor in a rising bar
LEVELS = np.linspace(-1, 1, 21)  # exposures of the greedy policy and of the best constant

# encoder: the shape that the scores in docs/results.md were measured with
HEADS = 4
LAYERS = 2
MASKED = 0.3  # share of a window's bars that pre-training hides
MAE_BATCH = 64  # windows a pre-training step
MAE_LEARNING_RATE = 3e-3  # peak of the one-cycle schedule
BLOCK = 32  # rows encoded at once: one size, so that a row's bits do not depend on the others

# shares of the time that is left; learning needs the rest
FIT_SHARE = 0.15  # the HMM of a long history
PRETRAIN_SHARE = 0.12  # 150 steps take 25 s on one core
CACHE_SHARE = 0.3  # rows that are not encoded by then are left out, the oldest first

# optimisation
BUFFER = 2_000_000  # transitions in the replay: 32 MB, 30 times what a default run makes
SCHEDULE = 65_536  # transitions over which learning rates fall, unless --total-timesteps says
LAST_RATE = 0.02  # share of the learning rates that is left at the end of the schedule
WARMUP = 20  # updates over which Adam's second moments settle and the rates grow from 0
MAX_GRAD_NORM = 10.0  # a hundred times a usual gradient: only accidents are clipped
MEAN_LIMIT = 5.0  # of the actor before its tanh, soft: a hard one lets no gradient back
ACTOR_STEPS = 2  # an update: the best critic often comes after 70, too soon for one step each
REWARD_CLIP = 10.0  # standard deviations of the full position's reward; what is beyond is logged


# ---------------------------------------------------------------------------------------- arguments
@dataclass
class Args(RunArgs):
    # experiment
    exp_name: str = Path(__file__).stem
    """name of this experiment"""

    # data
    data: str = "synthetic:regime"
    """synthetic:{regime,signal,square,square_regime,noise,drift}[?bars=N&seed=K&...] or files of
    bars, comma-separated, the first traded"""
    split: str = "0.70/0.15/0.15"
    """train/eval/test as fractions of the rows, or the first days of eval and test:
    2023-01-01/2024-01-01"""
    fill_limit: int = 24
    """bars for which another asset's last bar may stand in for a missing one"""
    window: int = 64
    """bars in an observation"""
    screen: bool = True
    """technical columns without evidence on train rows are 0"""
    forecast: bool = True
    """give the agent a lasso's forecast of the next return from the last bar's columns"""
    hmm: bool = True
    """give the agent the five HMM columns (else they are zeros)"""

    # environment
    num_envs: int = 1024
    """lanes"""
    episode_length: int = 128
    """bars after which an episode is truncated"""
    fee_bps: float = 4.0
    """bp of equity per unit of |change of exposure|, to the exchange"""
    slippage_bps: float = 1.0
    """bp of equity per unit of |change of exposure|, to the market"""
    funding_bps: float = 0.0
    """bp a bar that a full long position pays and a full short one receives; negative: the other
    way round"""
    funding: str | None = None
    """csv or parquet file of funding payments as exchanges give them (fundingTime, fundingRate),
    added to --funding-bps"""
    position_mode: str = "rebalance"
    """rebalance: exposure stays at the target between decisions; drift: it moves with the price"""
    turnover_penalty_bps: float = 5.0
    """bp per unit of |change| that the reward loses beyond the costs at w_cost = 1"""
    w_cost_curriculum: int = 0
    """transitions over which the largest w_cost grows from 0 to 1"""
    eval_w_cost: float = 0.0
    """w_cost shown to the agent in evaluations, in [0, 1]"""

    # encoder
    encoder: str | None = None
    """encoder.pt of another run, instead of pre-training"""
    d_model: int = 256
    """channels of the encoder"""
    mae_steps: int = 150
    """masked pre-training steps on train rows (fewer, aloud, when --timeout is short)"""

    # algorithm
    total_timesteps: int | None = None
    """environment transitions, the sum over lanes (default: 65536; with --timeout: until time or
    patience is over)"""
    learning_starts: int = 2_048
    """transitions with uniform random actions before the first update"""
    batch_size: int = 256
    """rows drawn for an update"""
    segment: int = 8
    """consecutive bars drawn together: they share the market forward of row and next row"""
    counterfactuals: int = 3
    """uniform random exposures trained on each drawn row beside the stored one (the market is
    exogenous)"""
    updates_per_step: int = 10
    """gradient updates a vector step"""
    gamma: float = 0.95
    """discount a bar"""
    average: float = 0.99
    """decay an update of the averaged weights that evaluation and checkpoints use (0: the last
    weights)"""
    tau: float = 0.05
    """speed of the target heads' moving average"""
    policy: str = "critic_grid"
    """who acts: critic_grid (greedy on a grid of exposures, and so are its targets) or actor
    (gSDE, TQC's targets)"""
    n_critics: int = 2
    """quantile critics"""
    n_quantiles: int = 25
    """quantiles a critic"""
    top_quantiles_to_drop_per_net: int = 0
    """truncation of the target; it punishes risk, not only overestimation:
    docs/tqc_film_batch.md"""
    fusion_width: int = 512
    """width of the fusion layer"""
    hidden: int = 256
    """width of the two hidden layers of every head"""
    learning_rate: float = 3e-3
    """of the heads (AdamW)"""
    learning_rate_fusion: float | None = None
    """of the fusion layer's 16384 market columns (default: 3e-5 beside a linear forecast, 3e-4
    where there is none)"""
    learning_rate_film: float = 1e-2
    """of FiLM"""
    weight_decay: float = 1e-2
    """AdamW, on the fusion layer's market columns"""
    dropout: float = 0.1
    """of embedding channels, while training"""
    recency: float = 1.5
    """bars in which the fixed gain on the embedding decays by e, going back from the last bar"""
    reward_scaling: bool = True
    """divide rewards by the running standard deviation of the full position's reward (saved with
    the agent)"""
    sde_sample_freq: int = 64
    """vector steps for which a lane keeps its gSDE noise matrix"""
    log_std_init: float = -3.0
    """of the gSDE weights"""
    ent_coef: str = "auto_0.5"
    """entropy coefficient of the actor: a number, auto, or auto_0.5 = learned from 0.5 on"""
    ent_coef_lr: float = 0.3
    """learning rate of log alpha: at 3e-4 the initial 0.5 is still .37 after 1000 updates"""
    ent_coef_min: float = 0.0
    """floor of the entropy coefficient"""
    target_entropy: float = -3.0
    """of the squashed Gaussian (its maximum is .684)"""

    # evaluation
    eval_interval: int = 4_096
    """transitions between evaluations on the eval split"""
    patience: int = 16
    """evaluations without a better one after which training stops (0: never): with fewer than the
    schedule has, an agent that begins to learn late is given up"""

    # runtime
    precision: str = "auto"
    """auto (bf16 where the hardware has it), bf16 or fp32"""
    compile: bool = False
    """torch.compile networks and loss"""
    cudagraphs: bool = False
    """with --compile on a GPU: capture them in CUDA graphs"""

    def __post_init__(self):
        super().__post_init__()
        choices = {"position_mode": MODES, "policy": POLICIES, "precision": PRECISIONS}
        ranges = {
            (0, 1): "eval_w_cost learning_rate learning_rate_fusion learning_rate_film tau",
            (0, 0.9999): "gamma average dropout",
            (0, 1000): "fee_bps slippage_bps turnover_penalty_bps ent_coef_lr weight_decay",
            (0, 10**12): """total_timesteps learning_starts w_cost_curriculum fill_limit mae_steps
                patience counterfactuals updates_per_step top_quantiles_to_drop_per_net""",
            (1, BLOCK - 1): "segment",
            (1, 10**12): """n_critics n_quantiles d_model fusion_width hidden num_envs batch_size
                episode_length sde_sample_freq eval_interval""",
            (2, 4096): "window",
            (1e-3, 1e9): "recency",
            (-20, 5): "log_std_init",
            (-100, 0.68): "target_entropy",
            (-1000, 1000): "funding_bps",
        }
        check(self, choices, ranges)
        drop = self.top_quantiles_to_drop_per_net
        alpha = initial_alpha(self.ent_coef)
        refuse(
            (
                self.batch_size % self.segment,
                f"--batch-size {self.batch_size} must be a multiple of --segment {self.segment}",
            ),
            (
                self.d_model % HEADS,
                f"--d-model {self.d_model} must be a multiple of {HEADS} attention heads",
            ),
            (
                drop >= self.n_quantiles,
                f"--top-quantiles-to-drop-per-net {drop} leaves none of --n-quantiles {self.n_quantiles}",
            ),
            (self.cudagraphs and not self.compile, "--cudagraphs needs --compile"),
            (
                not 0 <= self.ent_coef_min <= alpha,
                f"--ent-coef-min {self.ent_coef_min}: must be 0 to the initial coefficient {alpha}",
            ),
        )

    @property
    def costs(self):
        """Costs as kernels take them."""
        return (self.fee_bps + self.slippage_bps) * BP, self.position_mode == "drift"


def initial_alpha(text):
    """`auto`, `auto_0.5` or a number, read as Stable-Baselines3 does -> initial coefficient."""
    try:
        value = 1.0 if text == "auto" else float(text.removeprefix("auto_"))
    except ValueError:
        value = -1.0
    good = 0 < value < math.inf or (value == 0 and "auto" not in text)
    why = "must be a number >= 0, auto, or auto_VALUE with VALUE > 0"
    refuse((not good, f"--ent-coef {text}: {why}"))
    return value


# ------------------------------------------------------------------------------------------ kernels
# Tuples that kernels take:
#   costs: cost (fraction of equity per unit of |change|), drift (whether the exposure moves with
#   the price)
#   rules: start, stop (decision rows), length (bars an episode), w_max, penalty (per unit of
#   |change| at w_cost 1), seed
#   lanes: state, last (the state before the reset of lanes whose episode ever ended), reward (N,),
#   flags (2, N: terminated, truncated)
# rows of state (8, N) float64
ROW, CLOCK, EPISODE, POSITION, W_COST, EQUITY, RETURN, TURNOVER = range(8)


@nb.njit(cache=True)
def mix_nb(x):
    """splitmix64's finaliser, uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@nb.njit(cache=True)
def uniform_nb(seed, lane, episode, draw):
    """Counter-based uniform in [0, 1) of (seed, lane, episode, draw)."""
    x = mix_nb(np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(lane))
    x = mix_nb(x + np.uint64(episode) * np.uint64(0xD1342543DE82EF95) + np.uint64(draw))
    return np.float64(x >> np.uint64(11)) / 2.0**53


@nb.njit(cache=True)
def fee_nb(position, target, costs):
    """Fee as a share of equity. Drifting: on what is really traded to hold `target` of what the
    fee leaves."""
    cost, drift = costs
    change = target - position
    fee = cost * abs(change)
    if drift:
        fee /= 1.0 + cost * target * (1.0 if change > 0.0 else -1.0)
    return fee


@nb.njit(cache=True)
def trade_nb(position, target, ret, funding, costs):
    """One decision and the bar it earns: ONE lane, all scalars, float64.

    position, target: exposure before and after the trade, share of equity; of the next bar ret:
    simple return, funding: fraction that a full long pays.
    equity *= (1 - fee) (1 + target ret - funding target).
    Returns (growth of equity, exposure at the next decision).
    """
    _, drift = costs
    growth = 1.0 + target * ret - funding * target
    growth = growth if growth > RUIN else RUIN  # Numba's CUDA target does not know max()
    left = 1.0 - fee_nb(position, target, costs)
    left = left if left > RUIN else RUIN
    return left * growth, target * (1.0 + ret) / growth if drift else target


@nb.njit(cache=True)
def begin_nb(i, rules, state):
    """Lane i to the first row of episode state[EPISODE, i]; its w_cost is 0 or w_max in 20 %
    each, else uniform."""
    start, stop, _, w_max, _, seed = rules
    episode = np.int64(state[EPISODE, i])
    for k in range(state.shape[0]):
        state[k, i] = 0.0
    part = uniform_nb(seed, i, episode, 0)
    u = uniform_nb(seed, i, episode, 1)
    state[ROW, i] = start + np.int64(part * (stop - start))
    state[EPISODE, i] = episode
    state[W_COST, i] = w_max * (0.0 if u < 0.2 else 1.0 if u > 0.8 else (u - 0.2) / 0.6)
    state[EQUITY, i] = 1.0


def lane_py(i, action, ret, funding, costs, rules, lanes):
    """Step lane i in place; compiled for the CPU and, unchanged, as a CUDA device function."""
    state, last, reward, flags = lanes
    _, stop, length, _, penalty, _ = rules
    row = np.int64(state[ROW, i])
    position = state[POSITION, i]
    target = -1.0 if action[i] < -1.0 else 1.0 if action[i] > 1.0 else action[i]
    change = abs(target - position)
    growth, after = trade_nb(position, target, ret[row], funding[row], costs)
    reward[i] = math.log(growth) - state[W_COST, i] * penalty * change
    state[ROW, i] += 1
    state[CLOCK, i] += 1
    state[POSITION, i] = after
    state[EQUITY, i] *= growth
    state[RETURN, i] += reward[i]
    state[TURNOVER, i] += change
    lost = growth <= LOST
    over = state[CLOCK, i] >= length or row + 1 >= stop
    flags[0, i] = lost
    flags[1, i] = over and not lost
    if lost or over:
        for k in range(state.shape[0]):
            last[k, i] = state[k, i]
        state[EPISODE, i] += 1
        begin_nb(i, rules, state)


lane_nb = nb.njit(lane_py)


@nb.njit(parallel=True, cache=True)
def step_cpu(action, ret, funding, costs, rules, lanes):
    """Step all lanes."""
    for i in nb.prange(action.size):
        lane_nb(i, action, ret, funding, costs, rules, lanes)


lane_cuda = cuda.jit(device=True)(lane_py)


@cuda.jit
def step_cuda(action, ret, funding, costs, rules, lanes):
    """The same lane on the GPU, one thread a lane."""
    i = cuda.grid(1)
    if i < action.size:
        lane_cuda(i, action, ret, funding, costs, rules, lanes)


@nb.njit(cache=True)
def walk_nb(target, ret, funding, expected, costs):
    """Trade the exposures `target` (n,) along returns `ret` (n,), flat before the first.

    Returns (reward, expected reward, |change|, target) (n,): log growth net of costs; and target
    (expected - funding) - fee, the known conditional mean of the simple return instead of the
    realised one.
    """
    n = target.size
    reward = np.empty(n)
    mean = np.empty(n)
    change = np.empty(n)
    position = 0.0
    for t in range(n):
        change[t] = abs(target[t] - position)
        paid = fee_nb(position, target[t], costs)
        mean[t] = target[t] * (expected[t] - funding[t]) - paid
        growth, position = trade_nb(position, target[t], ret[t], funding[t], costs)
        reward[t] = math.log(growth)
    return reward, mean, change, target.copy()


@nb.njit(cache=True)
def greedy_walk_nb(value, grid, scale, penalty, ret, funding, costs):
    """Greedy exposures (n,) of an afterstate critic: value (n, A) of holding grid[j], before the
    cost of getting there.

    argmax_j value[t, j] + scale (log(1 - fee) - penalty |grid[j] - position|); a tie keeps the
    nearest position.
    """
    n, m = value.shape
    target = np.empty(n)
    position = 0.0
    for t in range(n):
        best = 0
        best_q = -np.inf
        best_change = 0.0
        for j in range(m):
            change = abs(grid[j] - position)
            left = max(1.0 - fee_nb(position, grid[j], costs), RUIN)
            q = value[t, j] + scale * (math.log(left) - penalty * change)
            if q > best_q or (q == best_q and change < best_change):
                best = j
                best_q = q
                best_change = change
        target[t] = grid[best]
        _, position = trade_nb(position, grid[best], ret[t], funding[t], costs)
    return target


# -------------------------------------------------------------------------------------- environment
@dataclass(eq=False)  # hashed by identity
class Market:
    """What lanes walk over: one static table. Decision rows are bar rows; row t earns bar t + 1."""

    bars: Bars
    features: FeatureModel
    table: np.ndarray  # (T, n_tech + 5) float32: technical columns, then the HMM's
    ret: np.ndarray  # (T,) float64 simple return of the next bar, 0 in the last row
    funding: np.ndarray  # (T,) float64 fraction that a full long pays in the next bar
    expected: np.ndarray  # (T,) float64 known conditional mean of ret, NaN on real bars
    rows: dict  # split -> (start, stop), half-open decision rows
    window: int
    costs: tuple
    funding_sha256: str | None = None  # of --funding
    forecast: np.ndarray = None  # (T,) float32 the lasso's, out of fold on train rows

    def identity(self):
        """What a checkpoint must agree with."""
        return {
            "spec": self.bars.spec,
            "sha256": self.bars.sha256,
            "names": self.bars.names,
            "funding_sha256": self.funding_sha256,
            "bars": len(self.ret),
            "rows": self.rows,
            "columns": self.features.columns,
        }

    @property
    def judged_by(self):
        """What best.pt is chosen by: the known conditional mean, or the realised one."""
        return "mean_expected_bps" if self.bars.truth else "mean_reward_bps"

    @property
    def n_tech(self):
        return self.table.shape[1] - HMM_COLUMNS

    def walk(self, target, start, stop):
        """walk_nb along rows [start, stop)."""
        rows = slice(start, stop)
        returns = self.ret[rows], self.funding[rows], self.expected[rows]
        return walk_nb(target, *returns, self.costs)

    @property
    def series(self):
        """The market as scoring sees it."""
        x = Products(self.table, self.n_tech)
        known = self.bars.truth is not None
        return Series(x, self.ret, self.rows, self.walk, known)

    @functools.cached_property
    def rival(self):
        """Exposures (T,) of the cheap rival."""
        return sparse_linear([self.series])[0]


def load_market(args, features=None, seconds=math.inf):
    """Bars -> splits -> columns, fitted on train rows, for `seconds` at most, unless `features`
    are given. Raises DataError (one line)."""
    bars = load_bars(args.data, args.fill_limit)
    purge = args.window + HORIZON
    train_stop = split_rows(bars.timestamp, args.split, purge)["train"][1]
    fit = features is None
    if fit:
        features = fit_features(bars, train_stop, args.seed, seconds, args.screen)
    table = features.transform(bars)
    first = features.warmup + args.window - 1
    rows = split_rows(bars.timestamp, args.split, purge, first)
    if not args.hmm:
        table[:, -HMM_COLUMNS:] = 0.0
    # the last row has no next bar and is never a decision row
    ret = np.nan_to_num(bars.next_return)
    funding = np.full(len(ret), args.funding_bps * BP)
    expected = bars.truth.expected if bars.truth else np.full(len(ret), np.nan)
    market = Market(
        bars, features, table, ret, funding, expected, rows, args.window, args.costs
    )
    if args.funding:
        paid, market.funding_sha256 = load_funding(args.funding, bars)
        funding[:-1] += paid[1:]
    market.forecast = np.zeros(len(ret))
    if args.forecast and (fit or features.linear):
        linear, out_of_fold = fit_linear(market.series)
        if fit:
            features.linear = linear
        market.forecast = features.forecast(table)
        # an agent that learned from forecasts within the fit would trust them too much
        if features.linear == linear:
            train = slice(*rows["train"])
            market.forecast[train] = out_of_fold.clip(-CLIP, CLIP)
    return market


class MarketVectorEnv(Lanes):
    """Lanes that trade one market; truncation at `episode_length` or at the end of the rows.

    Observation: market (window, columns) float32, the bars up to the decision; position (1,), the
    exposure held; w_cost (1,). Action (1,) in [-1, 1]: target exposure. Reward: log growth of
    equity net of costs, minus w_cost * penalty * |change|.
    """

    SAVED = ("state", "last")

    def __init__(self, market, rows, args, backend="cpu"):
        lanes = args.num_envs
        self.market = market
        self.costs = args.costs
        self.penalty = args.turnover_penalty_bps * BP
        self.length = args.episode_length
        self.w_max = float(not args.w_cost_curriculum)
        self.start, self.stop = rows
        if not market.window <= self.start + 1 <= self.stop < len(market.ret):
            first = market.window - 1
            raise ValueError(
                f"rows {rows}: need {first} <= start < stop < {len(market.ret)}"
            )
        box = gym.spaces.Box
        observation = gym.spaces.Dict(
            market=box(-np.inf, np.inf, (market.window, market.table.shape[1])),
            position=box(-np.inf, np.inf, (1,)),
            w_cost=box(0.0, 1.0, (1,)),
        )
        action = box(-1.0, 1.0, (1,))
        super().__init__(lanes, observation, action, backend, args.seed)
        self.take("state", (8, lanes), np.float64)
        self.position, _, self.equity = self.state[POSITION:RETURN]
        self.take("last", (8, lanes), np.float64)
        self.take("reward", (lanes,), np.float64)
        self.take("flags", (2, lanes), np.bool_)
        self.lanes = tuple(self.arrays.values())
        self.take("action", (lanes,), np.float64)
        self.kernel = step_cpu
        self.bars = market.ret, market.funding
        if backend == "cuda":
            self.kernel = step_cuda[(lanes + 127) // 128, 128]
            self.bars = tuple(cuda.to_device(x) for x in self.bars)
        self.table = torch.as_tensor(market.table, device=self.torch_device)
        self.offsets = torch.arange(1 - market.window, 1, device=self.torch_device)

    @property
    def rules(self):
        return self.start, self.stop, self.length, self.w_max, self.penalty, self.seed

    def reset_lanes(self, first, options):
        state = self.state.cpu().numpy()  # on a CPU the same memory
        state[EPISODE] = 0 if first else state[EPISODE] + 1
        rules = self.rules
        for i in range(self.num_envs):
            begin_nb(i, rules, state)
        self.state.copy_(torch.from_numpy(state))

    def step_lanes(self, action):
        """action (N,) or (N, 1) -> reward (N,) float64, terminated, truncated (N,): overwritten
        by the next call."""
        self.action.copy_(action.reshape(-1))
        self.kernel(self.arrays["action"], *self.bars, self.costs, self.rules, self.lanes)
        return self.reward, *self.flags

    def observe(self):
        return self.window_of(self.state)

    def observe_final(self, lanes):
        return self.window_of(self.last[:, lanes])

    def window_of(self, state):
        rows = state[ROW].long()[:, None] + self.offsets
        return {
            "market": self.table[rows],  # (N, window, columns)
            "position": state[POSITION][:, None].float(),
            "w_cost": state[W_COST][:, None].float(),
        }

    def episode(self):
        return {
            "r": self.last[RETURN],
            "l": self.last[CLOCK].long(),
            "equity": self.last[EQUITY],
            "turnover": self.last[TURNOVER],
        }

    def charts(self):
        """Means over the lanes' last ended episodes; NaN while none has ended."""
        last = self.last[:, self.state[EPISODE] > 0]
        return {
            "charts/episodic_return": last[RETURN].mean(),
            "charts/episodic_length": last[CLOCK].mean(),
        }


def make_vec(num_envs=1, split_name="train", backend="cpu", **flags):
    """gymnasium.make_vec("cleanrl_crypto/Market-v0", num_envs=8, split_name="train", data=...,
    fee_bps=4, ...): any flag of the script."""
    args = Args(num_envs=num_envs, **flags)
    market = shared(load_market, args, "num_envs")
    return MarketVectorEnv(market, market.rows[split_name], args, backend)


register("cleanrl_crypto/Market-v0", make_vec)


# ----------------------------------------------------------------------------------------- networks
class CryptoMAE(nn.Module):
    """Masked autoencoder over a window of technical columns (He et al. 2022, on bars instead of
    patches).

    context(x) is what the agent sees: the encoding, standardised channel by channel on train rows
    and weighed by a fixed gain that decays into the past. mean, std and gain are buffers: frozen
    with the rest.
    """

    def __init__(self, columns, window, d_model, recency):
        super().__init__()
        self.embed = nn.Linear(columns, d_model)
        block = functools.partial(
            nn.TransformerEncoderLayer,
            d_model,
            HEADS,
            4 * d_model,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.Sequential(*(block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(d_model)
        self.decode = nn.Linear(d_model, columns)
        self.mask_token = nn.Parameter(torch.zeros(d_model))
        bar = torch.arange(window)[:, None]  # (T, 1)
        age = window - 1 - bar
        at = bar / 10_000 ** (torch.arange(0, d_model, 2) / d_model)
        waves = torch.stack([at.sin(), at.cos()], -1).flatten(1)
        self.register_buffer("positions", waves[:, :d_model])  # (T, d)
        self.register_buffer("mean", torch.zeros(d_model))
        self.register_buffer("std", torch.ones(d_model))
        self.register_buffer("gain", torch.exp(-age / recency))

    def encode(self, embedded):  # (B, T, d) -> (B, T, d)
        return self.norm(self.blocks(embedded + self.positions))

    def loss(self, x, mask):
        """Mean squared error of the reconstruction at the masked steps (B, T)."""
        embedded = self.embed(x)
        token = self.mask_token.to(embedded.dtype)
        z = self.encode(torch.where(mask[..., None], token, embedded))
        return F.mse_loss(self.decode(z)[mask].float(), x[mask])

    @torch.no_grad()
    def context(self, x):  # (B, T, columns) -> (B, T, d)
        z = self.encode(self.embed(x)).float()
        return (z - self.mean) / self.std * self.gain


class FoundationFeatureExtractor(nn.Module):
    """The market columns of the fusion layer: FiLM(context; hmm) -> flatten 16384 -> fusion_width,
    before the norm.

    The layer over [market 16384, position, w_cost] is split by columns: this part is computed once
    per row, the two scalar columns (class Fusion) for every position tried on it.
    """

    def __init__(self, window, d_model, width, dropout):
        super().__init__()
        self.film = nn.Linear(HMM_COLUMNS, 2 * d_model)
        self.market = nn.Linear(window * d_model, width)
        self.dropout = dropout
        for p in self.film.parameters():
            nn.init.zeros_(p)  # identity at initialisation (Perez et al. 2018)

    # (B, T, d), (B, 5), (B, 1) -> (B, width + 1) float32: the linear forecast stands last
    def forward(self, z, hmm, forecast):
        gamma, beta = self.film(hmm).to(z.dtype)[:, None].chunk(2, -1)  # (B, 1, d) each
        # whole channels, so that no neighbouring bar gives them away
        scale = F.dropout(1 + gamma, self.dropout, self.training)
        x = torch.addcmul(beta, z, scale).flatten(1)  # one pass over the large tensor
        return torch.cat([self.market(x).float(), forecast], 1)


class Fusion(nn.Module):
    """The position, w_cost and forecast columns of the fusion layer, LayerNorm, LeakyReLU."""

    def __init__(self, width):
        super().__init__()
        self.scalars = nn.Linear(3, width, bias=False)
        self.norm = nn.LayerNorm(width)
        # a step of position must be as visible as a step of the market
        nn.init.normal_(self.scalars.weight, std=0.5)

    # (B, width + 1), (B, K), (B, 1) -> (B, K, width)
    def forward(self, market, position, w_cost):
        p, w, f = self.scalars.weight.unbind(1)
        x = market[:, None, :-1] + market[:, None, -1:] * f
        x = x + position[..., None] * p + w_cost[..., None] * w
        return F.leaky_relu(self.norm(x))


def mlp(width, hidden, out):
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, out),
    )


class Critic(nn.Module):
    """Quantiles of G(row, exposure after the trade, w_cost); Q(row, position, a, w) = G(row, a, w)
    + cost of the trade.

    A proportional cost separates exactly, so the slope of Q in the cost of the trade is 1 by
    construction. What a position earns is linear in it: `slope` times the forecast.
    """

    def __init__(self, width, hidden, n_critics, n_quantiles):
        super().__init__()
        self.fusion = Fusion(width)
        self.nets = nn.ModuleList(mlp(width, hidden, n_quantiles) for _ in range(n_critics))
        self.slope = nn.Parameter(torch.zeros(()))

    # (B, width), (B, K), (B, 1) -> (B, K, critics, quantiles)
    def forward(self, market, after, w_cost):
        x = self.fusion(market, after, w_cost)
        linear = self.slope * after * market[:, -1:]
        quantiles = torch.stack([net(x) for net in self.nets], 2).float()
        return quantiles + linear[..., None, None]


class Actor(nn.Module):
    """Squashed Gaussian with gSDE noise (Raffin et al. 2021), on the critic's encoding of the
    market."""

    def __init__(self, width, hidden, log_std_init):
        super().__init__()
        self.fusion = Fusion(width)
        self.latent = mlp(width, hidden, hidden)[:-1]
        self.mu = nn.Linear(hidden, 1)
        self.log_std = nn.Parameter(torch.full((hidden,), log_std_init))

    # (B, width), (B, K), (B, 1) -> mean (B, K), latent (B, K, hidden)
    def forward(self, market, position, w_cost):
        latent = self.latent(self.fusion(market, position, w_cost)).float()
        mean = self.mu(latent)[..., 0].float()
        return MEAN_LIMIT * (mean / MEAN_LIMIT).tanh(), latent


class Agent(nn.Module):
    """Everything that learns, and the statistics it needs: one state_dict. config: plain values
    that rebuild it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.costs = config["costs"]
        width = config["fusion_width"]
        hidden = config["hidden"]
        critic = width, hidden, config["n_critics"], config["n_quantiles"]
        self.extractor = FoundationFeatureExtractor(
            config["window"], config["d_model"], width, config["dropout"]
        )
        self.critic = Critic(*critic)
        self.target = Critic(*critic).requires_grad_(False)
        self.target.load_state_dict(self.critic.state_dict())
        self.actor = Actor(width, hidden, config["log_std_init"])
        log_alpha = math.log(max(config["alpha"], 1e-30))
        self.log_alpha = nn.Parameter(torch.tensor(log_alpha))
        self.register_buffer("grid", torch.tensor(LEVELS).float())
        # sums of 1, reward and reward^2
        self.register_buffer("reward_sums", torch.zeros(3, dtype=torch.float64))

    @property
    def alpha(self):
        return self.log_alpha.detach().exp()

    def trade_reward(self, position, after, w_cost):
        """log(1 - fee) - w_cost penalty |change| of going from position to after (<= 0), not yet
        scaled; broadcasts. Same formula as fee_nb."""
        cost, drift = self.costs
        change = after - position
        fee = cost * change.abs()
        if drift:
            fee = fee / (1 + cost * after * torch.where(change > 0, 1.0, -1.0))
        penalty = self.config["penalty"] * w_cost
        return torch.log1p(-fee.clamp_max(1 - RUIN)) - penalty * change.abs()

    def watch_rewards(self, rewards):
        """Statistics of the full position's rewards, which no policy can shrink."""
        self.reward_sums += torch.stack([rewards**0, rewards, rewards**2]).sum(1)

    @property
    def reward_scale(self):
        """1 / standard deviation of the full position's reward, () float32."""
        count, first, second = self.reward_sums
        variance = second / count - (first / count) ** 2
        known = self.config["reward_scaling"] & (count > 1) & (variance > 0)
        return torch.where(known, variance.rsqrt(), 1.0).float()


# ---------------------------------------------------------------------------------------- algorithm
def quantile_huber_loss(current, target):
    """Quantile Huber loss, kappa 1 (Dabney et al. 2018, eq. 10), mean over everything; no gradient
    to the target.

    current (B, C, N): quantiles of each critic at (i + .5)/N; target (B, M): atoms every critic is
    compared with.
    """
    n = current.shape[-1]
    tau = (torch.arange(n, device=current.device, dtype=current.dtype) + 0.5) / n
    ours = current[..., None].expand(*current.shape, target.shape[1])  # (B, C, N, M)
    theirs = target.detach()[:, None, None].expand_as(ours)
    weight = (tau[:, None] - (theirs < ours).float()).abs()
    return (weight * F.huber_loss(ours, theirs, reduction="none")).mean()


def tqc_target(next_quantiles, reward, done, gamma, alpha, next_log_prob, drop):
    """r + gamma (1 - done) (Z' - alpha log pi'): next_quantiles (B, C, N), the rest (B,) -> (B, M).

    Z' are the critics' atoms, pooled and sorted, without the `drop` highest a critic (Kuznetsov et
    al. 2020).
    """
    _, critics, n = next_quantiles.shape
    atoms = next_quantiles.flatten(1)
    if drop:
        atoms = atoms.sort().values[:, : critics * (n - drop)]
    soft = atoms - (alpha * next_log_prob)[:, None]
    return reward[:, None] + gamma * (1 - done)[:, None] * soft


def squashed_log_prob(mean, std, u):
    """log density of tanh(u), u ~ N(mean, std), from the pre-tanh sample (no atanh of a clamp)."""
    z = (u - mean) / std
    normal = -0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi)
    return normal - 2 * (math.log(2) - u - F.softplus(-2 * u))


def gsde_std(latent, log_std):
    """Std (B, K) of latent (B, K, H) @ E, E ~ N(0, exp(log_std)^2) entry by entry."""
    return (latent**2 @ (2 * log_std).exp() + 1e-6).sqrt()


def sample_action(actor, market, position, w_cost, noise=None):
    """gSDE sample for an update at positions (B, K), its noise drawn anew for each. Returns action,
    log_prob, std, (B, K) each."""
    mean, latent = actor(market, position, w_cost)
    std = gsde_std(latent, actor.log_std)
    u = mean + std * (torch.randn_like(std) if noise is None else noise)
    return u.tanh(), squashed_log_prob(mean, std, u), std


def hold(exposure, ret, funding, drift):
    """A bar at `exposure`, before the cost of getting there: growth of equity, exposure at the next
    decision; broadcasts. Same formula as trade_nb."""
    growth = (1 + exposure * ret - funding * exposure).clamp_min(RUIN)
    return growth, exposure * (1 + ret) / growth if drift else exposure


def greedy_next(agent, market, held, w_cost, scale):
    """The best grid exposure at the next row, the trade to it paid: market (B, width), exposures
    held there (B, K), w_cost (B, 1) -> quantiles (B K, C, N), log_prob (B K,), which is 0."""
    grid = agent.grid.expand(len(market), -1)
    values = agent.target(market, grid, w_cost)  # (B, A, C, N)
    paid = agent.trade_reward(held[..., None], agent.grid, w_cost[..., None])
    moves = scale * paid  # (B, K, A)
    q = values.mean((2, 3))[:, None] + moves
    best = q.argmax(2, keepdim=True)  # (B, K, 1)
    pick = best[..., None].expand(-1, -1, *values.shape[2:])
    quantiles = values.gather(1, pick) + moves.gather(2, best)[..., None]
    return quantiles.flatten(0, 1), torch.zeros_like(held).flatten()


def sampled_next(agent, market, held, w_cost, scale, noise=None):
    """TQC's: the actor's sample at the next row, the trade to it paid; shapes as in greedy_next."""
    action, log_prob, _ = sample_action(agent.actor, market, held, w_cost, noise)
    paid = scale * agent.trade_reward(held, action, w_cost)  # (B, K)
    quantiles = agent.target(market, action, w_cost) + paid[..., None, None]
    return quantiles.flatten(0, 1), log_prob.flatten()


@torch.no_grad()
def move(averages, weights, share):
    """averages += share (weights - averages); outside no_grad the averages would keep a graph
    that grows."""
    torch._foreach_lerp_(list(averages.parameters()), list(weights.parameters()), share)


def learning_rate_share(loop, args):
    """Warm-up over updates, then a cosine over transitions down to LAST_RATE, which stays."""
    progress = min(1.0, loop.global_step / (args.total_timesteps or SCHEDULE))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, loop.updates / WARMUP) * (LAST_RATE + (1 - LAST_RATE) * cosine)


# --------------------------------------------------------------------------------- contexts, replay
class Contexts:
    """The market on the training device: its table, its returns, and the encoder's output for every
    row.

    __call__(rows (B,)) -> (z (B, T, d), hmm (B, 5), forecast (B, 1)). If they fit into memory, rows
    are encoded once, by fill(), before the first decision; if not, anew for every batch.
    """

    def __init__(self, encoder, market, device, dtype=torch.float32, keep=True):
        self.encoder = encoder
        self.market = market
        self.device = device
        self.dtype = dtype
        self.precision = "bf16" if dtype == torch.bfloat16 else "fp32"
        self.tensor = functools.partial(torch.as_tensor, device=device)
        self.table = self.tensor(market.table)
        self.ret = self.tensor(market.ret).float()
        self.funding = self.tensor(market.funding).float()
        self.forecast = self.tensor(market.forecast).float()[:, None]
        # a bad tick must not shrink all other rewards
        limit = usual_limit(market.ret[slice(*market.rows["train"])])
        usual = np.clip(market.ret, max(-limit, RUIN - 1), limit)
        # (T,) float64, of a full long position
        self.full_reward = self.tensor(np.log1p(usual))
        self.offsets = torch.arange(1 - market.window, 1, device=device)
        shape = len(market.table), *encoder.positions.shape  # (bars, T, d)
        self.cache = torch.empty(shape, dtype=dtype, device=device) if keep else None
        self.rows = market.rows  # of every split, those that were encoded

    def autocast(self):
        bf16 = self.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def windows(self, rows):
        """Technical columns of the bars up to each row: (B,) -> (B, T, n_tech)."""
        return self.table[rows[:, None] + self.offsets, : self.market.n_tech]

    def train_windows(self, n):
        rows = torch.randint(*self.market.rows["train"], (n,), device=self.device)
        return self.windows(rows)

    @torch.no_grad()
    def encode(self, rows):
        with self.autocast():
            return self.encoder.context(self.windows(rows)).to(self.dtype)

    def fill(self, splits, seconds, stop):
        """Encode the rows of every split and the one after it, the last first and all splits at
        one pace, until `seconds` are over or stop(); at least a block each. Returns split ->
        [first encoded row, stop]."""
        if self.cache is None:
            return splits
        until = time.monotonic() + seconds
        blocks = []
        for name, (first, last) in splits.items():
            # counted back from the row after the split
            starts = range(last + 1 - BLOCK, first - BLOCK, -BLOCK)
            blocks += [(k / len(starts), name, start) for k, start in enumerate(starts)]
        rows = dict.fromkeys(splits)
        for part, name, start in sorted(blocks):
            if part > 0 and (time.monotonic() > until or stop()):
                break
            first, last = splits[name]
            first = max(start, first)
            at = torch.arange(start, start + BLOCK, device=self.device).clamp_min(first)
            self.cache[at] = self.encode(at)
            rows[name] = [first, last]
        return rows

    def __call__(self, rows):
        z = self.encode(rows) if self.cache is None else self.cache[rows]
        return z, self.table[rows, self.market.n_tech :], self.forecast[rows]


class Replay:
    """Ring of transitions as row indices and lane scalars on the device: 16 bytes each, never
    windows.

    The next observation is row + 1 with the exposure that `action` leaves, the reward is recomputed
    from the row: a changed reward scale never meets stale rewards, and where a lane's episode ended
    its row simply goes on.
    """

    def __init__(self, size, lanes, device):
        self.size = size
        self.lanes = lanes
        self.total = 0
        self.device = device
        self.row = torch.zeros(size, dtype=torch.int32, device=device)
        self.floats = torch.zeros(3, size, device=device)  # position, action, w_cost
        self.lane = torch.arange(lanes, device=device)

    def __len__(self):
        return min(self.total, self.size)

    def add(self, state, action):
        """The lanes' state before they took `action` (N,)."""
        at = (self.total + self.lane) % self.size
        self.row[at] = state[ROW].int()
        floats = torch.stack([state[POSITION], action, state[W_COST]])
        self.floats[:, at] = floats.float()
        self.total += self.lanes

    def sample(self, n, segment, counterfactuals, stop):
        """n / segment = G stretches of S = segment consecutive rows of a lane: B = n samples.

        stop: first row that is not a decision row. Returns rows (G, S + 1) int64, the row after the
        last too; exposures before the stored trades (B, 1); exposures to train (B, K), the stored
        ones first, uniform random ones beside them; w_cost (B, 1).
        """
        steps = torch.arange(segment + 1, device=self.device)
        start = torch.randint(len(self), (n // segment, 1), device=self.device)
        at = (start + steps[:-1] * self.lanes) % len(self)  # (G, S)
        before, action, w_cost = self.floats[:, at.flatten(), None]  # (B, 1) each
        rows = self.row[start].long().clamp_max(stop - segment) + steps
        other = 2 * torch.rand(n, counterfactuals, device=self.device) - 1
        return rows, before, torch.cat([action, other], 1), w_cost

    def state_dict(self):
        n = len(self)
        return {
            "total": self.total,
            "row": self.row[:n].cpu().clone(),
            "floats": self.floats[:, :n].cpu().clone(),
        }

    def load_state_dict(self, state):
        n = len(state["row"])
        self.total = state["total"]
        self.row[:n] = state["row"]
        self.floats[:, :n] = state["floats"]


@torch.no_grad()
def explore(agent, contexts, state, matrix, redraw):
    """The actor's exposures (N,) in a rollout. matrix (N, hidden): every lane's gSDE noise, kept
    for some steps."""
    market = latents_of(agent, contexts, state[ROW].long())
    position, w_cost = state[[POSITION, W_COST], :, None].float()
    with contexts.autocast():
        mean, latent = agent.actor(market, position, w_cost)
    if redraw:
        matrix.copy_(torch.randn_like(matrix) * agent.actor.log_std.exp())
    noise = (latent[:, 0] * matrix).sum(1)
    return (mean[:, 0] + noise).tanh().float()


def encode_stretches(extractor, contexts, rows):
    """Stretches of rows (G, S + 1) -> the market (G S, width) with its gradient, and that of
    every next row without."""
    market = extractor(*contexts(rows[:, :-1].flatten()))
    with torch.no_grad():
        last = extractor(*contexts(rows[:, -1]))[:, None]
        following = market.view(len(last), -1, last.shape[-1])[:, 1:]
        return market, torch.cat([following, last], 1).flatten(0, 1)


# -------------------------------------------------------------------------- evaluation, diagnostics
@torch.no_grad()
def latents_of(agent, contexts, rows, until=math.inf):
    """The market part of the fusion layer for rows (n,) -> (n, width); stops at a whole block
    past `until`."""
    agent.eval()
    blocks = []
    for block in rows.split(512):
        with contexts.autocast():
            blocks.append(agent.extractor(*contexts(block)))
        if time.monotonic() > until:
            break
    return torch.cat(blocks)


@torch.no_grad()
def afterstate_values(agent, latents, w_cost, after=None):
    """Mean atom of G: (n, width), (n, 1), exposures (n, A), else the grid -> (n, A), scaled."""
    if after is None:
        after = agent.grid.expand(len(latents), -1)
    blocks = zip(latents.split(512), after.split(512), w_cost.split(512))
    return torch.cat([agent.critic(*block).mean((2, 3)) for block in blocks])


def action_values(agent, latents, position, w_cost, after=None):
    """Q of trading from position (n, 1) to exposures (n, A), else the grid, at w_cost (n, 1) ->
    (n, A), scaled reward."""
    values = afterstate_values(agent, latents, w_cost, after)
    after = agent.grid if after is None else after
    return values + agent.reward_scale * agent.trade_reward(position, after, w_cost)


@torch.no_grad()
def act(agent, latents, position, w_cost):
    """Deterministic exposure (n,) at (n, width), (n, 1), (n, 1)."""
    if agent.config["policy"] == "actor":
        return agent.actor(latents, position, w_cost)[0][:, 0].tanh()
    return agent.grid[action_values(agent, latents, position, w_cost).argmax(1)]


@torch.no_grad()
def target_path(agent, latents, values, market, start, w_cost, policy):
    """Deterministic exposures (n,) float64 along rows from `start` on, flat before the first.
    values: the grid's afterstate_values()."""
    span = slice(start, start + len(latents))
    ret = market.ret[span]
    funding = market.funding[span]
    if policy == "critic_grid":
        value = values.double().cpu().numpy()
        grid = agent.grid.double().cpu().numpy()
        scale = float(agent.reward_scale)
        penalty = agent.config["penalty"] * float(w_cost[0])
        return greedy_walk_nb(value, grid, scale, penalty, ret, funding, agent.costs)
    target = np.empty(len(ret))
    position = 0.0
    for t in range(len(ret)):
        held = torch.full((1, 1), position, device=latents.device)
        mean, _ = agent.actor(latents[t : t + 1], held, w_cost[t : t + 1])
        target[t] = mean.tanh()
        _, position = trade_nb(position, target[t], ret[t], funding[t], agent.costs)
    return target


@functools.lru_cache(8)
def fixed_paths(market, start, stop):
    """Exposures (n,) on rows [start, stop) of those beside the agent who do not depend on it."""
    n = stop - start
    paths = {
        "flat": np.zeros(n),
        "buy_and_hold": np.ones(n),
        "best_constant": np.full(n, best_constant(market.series, LEVELS)),
        "sparse_linear": market.rival[start:stop],
    }
    truth = market.bars.truth
    if truth:
        funding = market.funding[start:stop].mean()  # of a file the optimum knows no more
        cost, _ = market.costs
        paths["optimum"] = markets.optimum_path(truth, cost, start, stop, funding=funding)
    return paths


def evaluate(agent, contexts, split, args, seconds=math.inf, policies=POLICIES):
    """Deterministic walk over a split's rows, flat before the first, and the baselines on the same
    bars.

    Returns {policy: metrics, "agent": the acting policy's, "baselines", "rows", "partial"}, the
    columns of a trace, and everyone's exposures.
    """
    market = contexts.market
    acting = agent.config["policy"]
    bars = market.bars
    truth = bars.truth
    until = time.monotonic() + 0.4 * seconds  # what follows takes longer than the latents
    start, last = contexts.rows[split]
    latents = latents_of(agent, contexts, torch.arange(start, last, device=contexts.device), until)
    stop = start + len(latents)
    w_cost = torch.full_like(latents[:, :1], args.eval_w_cost)
    values = afterstate_values(agent, latents, w_cost)
    paths = {}
    for policy in policies:
        if policy == acting or time.monotonic() < until:
            paths[policy] = target_path(agent, latents, values, market, start, w_cost, policy)
    walked = list(paths)
    turnover = market.walk(paths[acting], start, stop)[2].mean()
    paths |= fixed_paths(market, start, stop)
    paths["random_same_turnover"] = random_path(stop - start, turnover, args.seed)

    span = slice(start, stop)
    columns = {
        "timestamp": utc_times(bars.timestamp)[span],
        "close": bars.close[span],
        "next_return": market.ret[span],
        "funding": market.funding[span],
    }
    if truth:
        columns["expected"] = market.expected[span]
        columns["signal"] = truth.signal[span]
        columns["regime"] = truth.regime[span]
    everyone = {}
    for name, target in paths.items():
        earned = market.walk(target, start, stop)
        everyone[name], equity = path_metrics(*earned, bars.bars_per_year)
        who = "" if name == acting else f"_{name}"
        columns |= {f"position{who}": target, f"equity{who}": equity}
    columns["q_spread"] = np.ptp(values.cpu().numpy(), 1)

    rows = [start, stop]
    whole = rows == list(market.rows[split]) and len(walked) == len(policies)
    out = {"rows": rows, "partial": not whole, "baselines": everyone}
    out["overestimation"] = overestimation(
        agent, market, start, latents, w_cost, paths[acting]
    )
    out |= {name: everyone.pop(name) for name in walked}
    out["agent"] = out[acting]
    if truth:
        best = everyone["optimum"]["mean_expected_bps"]
        for name in walked:
            expected = out[name]["mean_expected_bps"]
            out[name]["score"] = expected / best if best >= 0.05 else None
    return out, columns, paths | {"agent": paths[acting]}


@torch.no_grad()
def diagnose(agent, contexts, n=256):
    """What the deterministic policy depends on, on n rows of the eval split (the same at
    every call), by metric."""
    rng = np.random.default_rng(0)
    rows = rng.choice(np.arange(*contexts.rows["eval"]), n)
    rows = contexts.tensor(np.sort(rows))
    mix = contexts.tensor(rng.permutation(n))
    position = contexts.tensor(rng.uniform(-1, 1, (n, 1))).float()
    w_cost = contexts.tensor(rng.random((n, 1))).float()
    z, hmm, forecast = contexts(rows)
    agent.eval()
    with contexts.autocast():
        latents = agent.extractor(z, hmm, forecast)
        other_tech = agent.extractor(z[mix], hmm, forecast[mix])
        other_hmm = agent.extractor(z, hmm[mix], forecast)
    there = latents, position, w_cost

    greedy = act(agent, *there)
    flat = torch.zeros_like(position)  # the market alone varies
    fixed = torch.stack([act(agent, latents, flat + p, flat) for p in (-1.0, 0.0, 1.0)])
    shuffled = {
        "technical": act(agent, other_tech, position, w_cost),
        "hmm": act(agent, other_hmm, position, w_cost),
        "position": act(agent, latents, position[mix], w_cost),
        "w_cost": act(agent, latents, position, w_cost[mix]),
    }

    generator = torch.Generator(contexts.device.type).manual_seed(0)
    noise = torch.randn(n, 1, generator=generator, device=contexts.device)
    sampled, log_prob, std = sample_action(agent.actor, *there, noise)
    q = action_values(agent, *there)  # (n, A)
    both = torch.stack([greedy, sampled[:, 0]], 1)
    q_greedy, q_sampled = action_values(agent, *there, both).T
    quantiles = agent.critic(latents, greedy[:, None], w_cost)  # (n, 1, C, N)
    full_reward = agent.reward_scale * contexts.full_reward[rows].abs()
    entropy = -log_prob.mean()
    alpha = agent.alpha
    record = {
        "policy/state_dependence": fixed.std(1).mean(),
        "policy/action_mean": greedy.mean(),
        "policy/saturation": (greedy.abs() > 0.98).float().mean(),
        "policy/greedy_gap": (q_greedy - q_sampled).mean(),
        "policy/entropy": entropy,
        "policy/alpha": alpha,
        "policy/sigma": std.mean(),
        "policy/entropy_rms": alpha * agent.config["gamma"] * log_prob.square().mean().sqrt(),
        "policy/log_std_mean": agent.actor.log_std.mean(),
        "value/q_mean": q.mean(),
        "value/q_action_spread": (q.amax(1) - q.amin(1)).mean(),
        "value/quantile_spread": (quantiles.amax(3) - quantiles.amin(3)).mean(),
        "value/alpha_entropy": alpha * entropy.abs(),
        "env/clipped_rewards": (full_reward > REWARD_CLIP).float().mean(),
    }
    for name, other in shuffled.items():
        record[f"policy/attribution_{name}"] = (other - greedy).abs().mean()
    return {name: float(x) for name, x in record.items()}


def w_cost_sweep(agent, contexts, args):
    """What the acting policy earns and trades on the eval split at w_cost 0 to 1."""
    market = contexts.market
    span = contexts.rows["eval"]
    latents = latents_of(agent, contexts, torch.arange(*span, device=contexts.device))
    sweep = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        w_cost = torch.full_like(latents[:, :1], share)
        values = afterstate_values(agent, latents, w_cost)
        path = target_path(agent, latents, values, market, span[0], w_cost, args.policy)
        metrics, _ = path_metrics(*market.walk(path, *span), market.bars.bars_per_year)
        sweep.append({"w_cost": share, **metrics})
    return sweep


def alarms(record, samples_per_transition):
    """What comes before a collapse. record: diagnose()'s."""
    spread_of_noise = 2 * record["policy/alpha"]
    return {
        "alarm/q_spread_over_alpha": record["value/q_action_spread"] < spread_of_noise,
        "alarm/entropy_over_reward": record["policy/entropy_rms"] > 1.0,
        "alarm/samples_per_transition": samples_per_transition < 2,
        "alarm/sigma": record["policy/sigma"] > 0.9,
        "alarm/clipped_rewards": record["env/clipped_rewards"] > 0.05,
    }


def overestimation(agent, market, start, latents, w_cost, target):
    """Mean of (predicted - realised) discounted value along the exposures `target` (n,) from row
    `start` on, scaled reward.

    Of what follows the trade: the cost of the trade itself is not predicted.
    """
    n = len(target)
    span = slice(start, start + n)
    after = torch.as_tensor(target[:, None], device=latents.device).float()
    value = afterstate_values(agent, latents, w_cost, after)[:, 0].cpu().numpy()
    reward, *_ = market.walk(target, start, start + n)
    earned = target * (market.ret[span] - market.funding[span])
    realised = np.log(np.maximum(1 + earned, RUIN))
    gamma = agent.config["gamma"]
    tail = 0.0
    for t in reversed(range(n)):
        realised[t] += gamma * tail
        tail = reward[t] + gamma * tail
    # the last ones see too little of their future
    known = max(n - int(5 / (1 - gamma)), 1)
    return float((value - float(agent.reward_scale) * realised)[:known].mean())


def load_policy(checkpoint, device="cpu"):
    """policy(obs) -> actions (B, 1) float32 from a checkpoint file alone: the policy that
    evaluation reports.

    obs: the environment's own batch, NumPy: market (B, window, columns), position (B, 1), w_cost
    (B, 1). Raises CheckpointError (one line).
    """
    state = load_run(checkpoint, Path(__file__), SCHEMA, device)
    config = state["config"]
    encoder = build_encoder(config).to(device).eval()
    encoder.load_state_dict(state["encoder"])
    agent = Agent(config).to(device).eval()
    agent.load_state_dict(state["agent"])
    features = FeatureModel.from_state_dict(state["features"])
    tensor = functools.partial(torch.as_tensor, dtype=torch.float32, device=device)

    @torch.no_grad()
    def policy(obs):
        market = tensor(obs["market"])
        tech, hmm = market.split([config["columns"], HMM_COLUMNS], -1)
        forecast = tensor(features.forecast(obs["market"][:, -1]))[:, None]
        latents = agent.extractor(encoder.context(tech), hmm[:, -1], forecast)
        position = tensor(obs["position"])
        action = act(agent, latents, position, tensor(obs["w_cost"]))
        return action[:, None].cpu().numpy()

    return policy


# ------------------------------------------------------------------------- encoder: load, pre-train
def build_encoder(config):
    return CryptoMAE(*(config[k] for k in ("columns", "window", "d_model", "recency")))


def check_dimensions(path, found, expected):
    """Every dimension of the encoder that disagrees with the flags stands in one error line."""
    names = ("columns", "window", "d_model", "n_heads", "n_layers")
    wrong = [name for name in names if found.get(name) != expected[name]]
    if wrong:
        why = differences(found, expected, wrong)
        raise CheckpointError(f"{path} does not fit the flags and data: {why}")


def load_encoder(path, config, market):
    """Weights of another run's encoder.pt, with this run's recency gain; config["trained_until"]
    is taken over. It must read the same columns, and have been trained on none of the bars that
    this run is judged on."""
    if path is None:
        return None
    state = load_checkpoint(path)
    if set(state) != {"config", "encoder", "columns"}:
        raise CheckpointError(f"--encoder {path}: is no encoder.pt")
    check_dimensions(path, state["config"], config)
    there = state["columns"]
    here = market.features.columns
    other = [f"{a} there, {b} here" for a, b in zip(there, here) if a != b]
    until = state["config"]["trained_until"]
    judged = iso(market.bars.timestamp[market.rows["eval"][0]])
    way_out = "give a later --split, or pre-train without --encoder"
    seen = f"bars until {until}, this run's eval rows begin at {judged}: {way_out}"
    refuse(
        (other, f"--encoder {path} was trained on other columns: {'; '.join(other[:3])}"),
        (until >= judged, f"--encoder {path} was trained on {seen}"),
    )
    config["trained_until"] = until
    own_gain = build_encoder(config).gain  # a flag of this run, not a finding of that one
    return state["encoder"] | {"gain": own_gain}


def pretrain(contexts, run, loop):
    """Masked reconstruction on windows that end in train rows, then the context's statistics."""
    encoder = contexts.encoder
    steps = run.args.mae_steps
    optimizer = torch.optim.AdamW(encoder.parameters(), weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, MAE_LEARNING_RATE, total_steps=steps + 1
    )
    until = time.monotonic() + PRETRAIN_SHARE * run.guard.remaining()
    while loop.mae_steps < steps and not run.out_of_time():
        if time.monotonic() > until:
            print(
                f"pre-training: only {loop.mae_steps} of {steps} steps, learning needs time too"
            )
            break
        x = contexts.train_windows(MAE_BATCH)
        mask = torch.rand(x.shape[:2], device=x.device) < MASKED
        with contexts.autocast():
            loss = encoder.loss(x, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if loop.mae_steps % 25 == 0:
            run.log({"losses/mae": loss.detach()}, loop, loop.mae_steps)
        loop.mae_steps += 1
    with torch.no_grad(), contexts.autocast():
        parts = contexts.train_windows(1024).split(128)
        z = torch.cat([encoder.encode(encoder.embed(part)) for part in parts])
    z = z.float().flatten(0, 1)
    encoder.mean.copy_(z.mean(0))
    encoder.std.copy_(z.std(0) + 1e-6)


# ---------------------------------------------------------------------------------- set-up of a run
@dataclass
class Loop:
    """Plain counters of the loop; a resumed run gets them back."""

    global_step: int = 0  # transitions
    updates: int = 0
    explored: int = 0  # vector steps in which the actor acted
    evaluated: int = 0  # updates at the last evaluation
    stale: int = 0  # evaluations since the best one
    recent: list = field(
        default_factory=list
    )  # the last three evaluations of trained agents
    rows: dict = field(default_factory=dict)  # split -> rows that were encoded
    mae_steps: int = 0


def open_market(run):
    """Bars and columns, said aloud; a checkpoint keeps its own fits."""
    features = FeatureModel.from_state_dict(run.state["features"]) if run.state else None
    market = load_market(run.args, features, FIT_SHARE * run.guard.remaining())
    print(
        f"{run.args.data}: {len(market.ret)} bars, {market.n_tech} columns + {HMM_COLUMNS} "
        "of the HMM"
    )
    for split, (start, stop) in market.rows.items():
        print(f"{split}: {stop - start} bars from {iso(market.bars.timestamp[start])}")
    print_facts(market.bars)
    if market.bars.truth and run.args.funding:
        print("the optimum counts the mean of --funding, not its changes")
    print(market.features.describe_screen())
    return market


def agent_config(run, market):
    """Plain values that rebuild encoder and agent from a checkpoint alone."""
    a = run.args
    network = {name: getattr(a, name) for name in NETWORK_FLAGS.split()} | {
        "columns": market.n_tech,
        "n_heads": HEADS,
        "n_layers": LAYERS,
        "alpha": initial_alpha(a.ent_coef),
        "trained_until": market.features.train_dates[1],
    }
    costs = {"costs": a.costs, "penalty": a.turnover_penalty_bps * BP, "policy": a.policy}
    if run.state:  # as it is, at the costs and by the policy that are asked for
        check_dimensions(run.source, run.state["config"], network)
        network = run.state["config"]
    return network | costs


def open_contexts(run, market, config):
    """The market on the device, its embedding in the precision that the hardware has, kept if it
    fits into memory."""
    import psutil

    args = run.args
    device = run.device
    bf16 = {"auto": has_bf16(device), "bf16": True, "fp32": False}[args.precision]
    dtype = torch.bfloat16 if bf16 else torch.float32
    need = len(market.table) * args.window * args.d_model * dtype.itemsize
    free = psutil.virtual_memory().available
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
    keep = need < 0.5 * free
    print(
        f"embedding cache: {need / 2**20:.0f} MiB of {free / 2**20:.0f}{'' if keep else ', off'}"
    )
    return Contexts(build_encoder(config).to(device), market, device, dtype, keep)


def has_bf16(device):
    """bf16 matrix instructions; without them bf16 is emulated and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # private names: absent means float32
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in probes)


def freeze_contexts(contexts, weights, config, run, loop):
    """Encoder from `weights` (the checkpoint's or --encoder's) or pre-trained, then frozen; every
    row's context computed once."""
    encoder = contexts.encoder
    market = contexts.market
    run.phase("pretrain")
    if weights:
        encoder.load_state_dict(weights)
    else:
        pretrain(contexts, run, loop)
    encoder.eval().requires_grad_(False)
    weights = {k: v.cpu() for k, v in encoder.state_dict().items()}
    columns = market.features.columns
    save_atomic(dict(config=config, encoder=weights, columns=columns), run.dir / "encoder.pt")

    run.phase("cache")
    splits = market.rows
    seconds = CACHE_SHARE * run.guard.remaining()
    if run.resumed:  # replay and lanes stand on the rows of the first start
        splits = run.state["loop"]["rows"]
        seconds = math.inf
    contexts.rows = loop.rows = contexts.fill(splits, seconds, run.out_of_time)
    for split, (first, stop) in loop.rows.items():
        whole = np.ptp(market.rows[split])
        if stop - first < whole:
            print(f"{split}: only the last {stop - first} of {whole} bars (time)")


def make_agents(config, device):
    """What learns, and the average of its weights, which is evaluated and saved."""
    agent = Agent(config).to(device)
    averaged = Agent(config).to(device).requires_grad_(False)
    averaged.load_state_dict(agent.state_dict())
    return agent, averaged


def make_optimizers(agent, args, forecast):
    """By name. "rate" times learning_rate_share() is what the first two step by."""
    market = agent.extractor.market
    rate = args.learning_rate_fusion
    if rate is None:
        # beside a forecast the layer overfits at 3e-4; without one it has all to learn
        rate = 3e-5 if forecast.any() else 3e-4
    fusion = {"params": [market.weight], "rate": rate}
    groups = [
        {**fusion, "weight_decay": args.weight_decay},
        {"params": agent.extractor.film.parameters(), "rate": args.learning_rate_film},
        {"params": [market.bias, *agent.critic.parameters()], "rate": args.learning_rate},
    ]
    actor = [{"params": agent.actor.parameters(), "rate": args.learning_rate}]
    adamw = functools.partial(torch.optim.AdamW, weight_decay=0.0, fused=True)
    alpha = torch.optim.Adam([agent.log_alpha], lr=args.ent_coef_lr, fused=True)
    return {
        "q_optimizer": adamw(groups),
        "actor_optimizer": adamw(actor),
        "alpha_optimizer": alpha,
    }


def compile_parts(agent, args):
    """Networks in place; returns the critic's loss."""
    if not args.compile:
        return quantile_huber_loss
    how = {"mode": "reduce-overhead" if args.cudagraphs else None, "dynamic": False}
    for part in (agent.extractor, agent.critic, agent.target, agent.actor):
        part.compile(**how)
    return torch.compile(quantile_huber_loss, **how)


def go_on(run, loop):
    """Whether to train on; time given is time used."""
    args = run.args
    limit = args.total_timesteps
    if limit is None:
        limit = math.inf if args.timeout else SCHEDULE
    more = loop.global_step < limit and loop.stale < (args.patience or math.inf)
    return more and not args.eval_only and not run.out_of_time()


def judge(agent, contexts, run, loop):
    """Evaluate on the eval split, log, keep the best agent, and count evaluations without a
    better one."""
    market = contexts.market
    result, *_ = evaluate(
        agent, contexts, "eval", run.args, run.eval_limit(), [run.args.policy]
    )
    metrics = result["agent"]
    record = diagnose(agent, contexts)
    record |= alarms(record, run.args.batch_size * loop.updates / max(loop.global_step, 1))
    score = metrics[market.judged_by]
    rival = result["baselines"]["sparse_linear"][market.judged_by]
    still = record["policy/state_dependence"] < STILL and loop.updates >= FEW_UPDATES
    record["alarm/collapsed"] = still and rival > max(0.0, score)
    record |= {f"eval/eval/{name}": x for name, x in metrics.items()}
    run.log(record, loop)

    if loop.updates:
        whole = result["rows"] == contexts.rows["eval"]
        if whole:
            loop.recent = [*loop.recent, score][-3:]
        if whole and not market.bars.truth:  # one realised mean is noise
            score = sum(loop.recent) / len(loop.recent)
        loop.stale = 0 if whole and run.keep_best(score, loop) else loop.stale + 1
        loop.evaluated = loop.updates


def look_first(averaged, contexts, run, loop):
    """An evaluation before the loop, also so that it is known how long one takes."""
    run.phase("eval")
    if run.resumed:
        evaluate(averaged, contexts, "eval", run.args, run.eval_limit())
    elif not run.args.eval_only:
        judge(averaged, contexts, run, loop)


def look_last(averaged, contexts, run, loop):
    """Say why training ended and, unless a signal ended it, evaluate what it ended with: that
    may be the best."""
    if run.args.eval_only:
        return
    why = run.guard.status  # finished, timeout or interrupted
    if loop.stale >= (run.args.patience or math.inf):
        why = f"no better agent in {loop.stale} evaluations (--patience)"
    print(f"training ends at {loop.global_step} transitions: {why}")
    if run.guard.signal is None and loop.updates > loop.evaluated:
        run.phase("eval")
        judge(averaged, contexts, run, loop)


def evaluate_splits(agent, contexts, run):
    """The agent beside the baselines on every split, and traces/{split}.parquet; by split: results
    and everyone's exposures."""
    results = dict.fromkeys(contexts.rows)
    paths = {}
    folder = run.dir / "traces"
    folder.mkdir(exist_ok=True)
    for split in ("test", "eval", "train"):  # what counts comes first, while there is time
        policies = POLICIES if split != "train" else [run.args.policy]
        results[split], columns, paths[split] = evaluate(
            agent, contexts, split, run.args, run.eval_limit(0.3), policies
        )
        if results[split]["partial"]:
            print(f"{split}: evaluated on {len(columns['close'])} bars only (time)")
        pd.DataFrame(columns).to_parquet(folder / f"{split}.parquet")
    return results, paths


def audit_of(agent, contexts, run, loop, results, paths):
    """diagnose(), overestimation, edges over the best constant and the verdict; logs what the loop
    did not. paths: everyone's exposures by split."""
    result = results["eval"]
    record = {"value/overestimation": result["overestimation"]}
    audit = diagnose(agent, contexts) | record
    audit = {name.split("/")[1]: x for name, x in audit.items()}
    market = contexts.market
    series = market.series
    series.rows = series.rows | {"eval": result["rows"]}
    eval_paths = {name: [path] for name, path in paths["eval"].items()}
    audit |= edges([series], eval_paths, LEVELS, market.bars.bars_per_year)
    improving = not loop.stale and run.guard.status != "finished"
    audit["verdict"], audit["reasons"] = verdict(
        audit, result["agent"], loop.updates, FEW_UPDATES, np.ptp(result["rows"]), improving
    )
    audit["w_cost_sweep"] = w_cost_sweep(agent, contexts, run.args)
    for split in ("train", "test"):
        record |= {f"eval/{split}/{name}": x for name, x in results[split]["agent"].items()}
    run.log(record, loop)
    return audit


# --------------------------------------------------------------------------------------------- main
@experiment
def main(argv=None):
    """Train (or --eval-only), evaluate, report; returns what summary.json holds."""
    run = Run(Args, argv, SCHEMA, evaluations=9)
    loop = Loop()
    args = run.args
    device = run.device
    refuse((args.cudagraphs and device.type != "cuda", "--cudagraphs: no CUDA device"))
    market = open_market(run)
    config = agent_config(run, market)
    weights = (
        run.state["encoder"] if run.state else load_encoder(args.encoder, config, market)
    )
    run.open("+".join(market.bars.names).replace(":", "-"), market.identity())
    contexts = open_contexts(run, market, config)
    freeze_contexts(contexts, weights, config, run, loop)

    run.phase("setup")
    agent, averaged = make_agents(config, device)
    optimizers = make_optimizers(agent, args, market.forecast)
    q_optimizer, actor_optimizer, alpha_optimizer = optimizers.values()
    q_parameters = [*agent.extractor.parameters(), *agent.critic.parameters()]
    actor_parameters = list(agent.actor.parameters())
    rb = Replay(BUFFER, args.num_envs, device)
    noise = nn.Module()
    noise.register_buffer("matrix", torch.zeros(args.num_envs, args.hidden, device=device))
    envs = run.closing(MarketVectorEnv(market, contexts.rows["train"], args, run.backend))
    envs.reset(seed=args.seed)
    policy = dict(encoder=contexts.encoder, agent=averaged, features=market.features)
    parts = dict(learner=agent, envs=envs, rb=rb, noise=noise, **optimizers)
    loop = run.restore(loop, config, policy, **parts)
    critic_loss = compile_parts(agent, args)
    cost, drift = args.costs
    look_ahead = greedy_next if args.policy == "critic_grid" else sampled_next
    look_first(averaged, contexts, run, loop)

    while go_on(run, loop):
        # ALGO LOGIC: action
        run.phase("rollout")
        state = envs.state.clone()
        if args.w_cost_curriculum:
            envs.w_max = min(1.0, loop.global_step / args.w_cost_curriculum)
        if loop.global_step < args.learning_starts:
            action = 2 * torch.rand(args.num_envs, device=device) - 1
        else:
            redraw = loop.explored % args.sde_sample_freq == 0
            action = explore(agent, contexts, state, noise.matrix, redraw)
            loop.explored += 1
        envs.step_lanes(action)
        rb.add(state, action)
        agent.watch_rewards(contexts.full_reward[state[ROW].long()])
        loop.global_step += args.num_envs

        # ALGO LOGIC: training
        if loop.global_step >= args.learning_starts and args.updates_per_step:
            run.phase("learn")
            agent.train()
            scale = agent.reward_scale
            for _ in range(args.updates_per_step):
                loop.updates += 1
                share = learning_rate_share(loop, args)
                for group in q_optimizer.param_groups + actor_optimizer.param_groups:
                    group["lr"] = group["rate"] * share
                if args.cudagraphs:
                    torch.compiler.cudagraph_mark_step_begin()
                rows, before, after, w_cost = rb.sample(
                    args.batch_size, args.segment, args.counterfactuals, envs.stop
                )
                row = rows[:, :-1].flatten()
                ret = contexts.ret[row, None]  # (B, 1)
                funding = contexts.funding[row, None]

                # critic: quantiles of holding each exposure; the cost of getting there is exact
                with contexts.autocast():
                    latents, next_latents = encode_stretches(
                        agent.extractor, contexts, rows
                    )
                    with torch.no_grad():
                        growth, held = hold(after, ret, funding, drift)  # (B, K)
                        reward = (scale * growth.log()).clamp(-REWARD_CLIP, REWARD_CLIP)
                        done = (growth <= LOST).float()
                        next_quantiles, next_log_prob = look_ahead(
                            agent, next_latents, held, w_cost, scale
                        )
                        target = tqc_target(
                            next_quantiles,
                            reward.flatten(),
                            done.flatten(),
                            args.gamma,
                            agent.alpha,
                            next_log_prob,
                            args.top_quantiles_to_drop_per_net,
                        )
                    # (B, K, C, N)
                    quantiles = agent.critic(latents, after, w_cost)
                    qf_loss = critic_loss(quantiles.flatten(0, 1), target)
                q_optimizer.zero_grad()
                qf_loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(q_parameters, MAX_GRAD_NORM)
                q_optimizer.step()

                # actor: it collects transitions, and is scored beside the greedy policy
                latents = latents.detach()
                before = torch.cat([before, after], 1)  # (B, K + 1) exposures to trade from
                for _ in range(ACTOR_STEPS):
                    with contexts.autocast():
                        pi, log_prob, _ = sample_action(agent.actor, latents, before, w_cost)
                        paid = scale * agent.trade_reward(before, pi, w_cost)
                        q = agent.critic(latents, pi, w_cost).mean((2, 3)) + paid
                        actor_loss = (agent.alpha * log_prob - q).mean()
                    actor_optimizer.zero_grad()
                    actor_loss.backward(inputs=actor_parameters)  # not the critic's
                    actor_optimizer.step()

                # entropy coefficient
                if args.ent_coef.startswith("auto"):
                    surprise = (log_prob + args.target_entropy).detach()
                    alpha_loss = -(agent.log_alpha * surprise).mean()
                    alpha_optimizer.zero_grad()
                    alpha_loss.backward()
                    alpha_optimizer.step()
                    agent.log_alpha.data.clamp_(min=math.log(max(args.ent_coef_min, 1e-30)))
                move(agent.target, agent.critic, args.tau)
            # an average that began with the first update: the random start has no share in it
            decayed = 1 - args.average**args.updates_per_step
            move(averaged, agent, decayed / (1 - args.average**loop.updates))
            averaged.reward_sums.copy_(agent.reward_sums)

        # evaluate, log, keep the best
        if loop.updates and run.every(args.eval_interval, loop.global_step):
            if not qf_loss.isfinite():
                raise CheckFailed(
                    f"critic not finite after {loop.updates} updates: lower --learning-rate or "
                    "--learning-rate-fusion"
                )
            run.phase("eval")
            change = (action - state[POSITION]).abs().mean()
            record = {
                **envs.charts(),
                **run.charts(loop, loop.updates * args.batch_size),
                "losses/qf_loss": qf_loss.detach(),
                "losses/actor_loss": actor_loss.detach(),
                "losses/grad_norm": grad_norm,
                "losses/target_mean": target.mean(),
                "env/reward_std": reward.std(),
                "env/turnover": change,
                "env/costs": change * cost / BP,
                "env/exposure": action.mean(),
                "charts/learning_rate": args.learning_rate * share,
            }
            run.log(record, loop)
            judge(averaged, contexts, run, loop)
        run.checkpoint(loop)

    look_last(averaged, contexts, run, loop)
    run.use_best(loop)
    run.phase("eval")
    results, paths = evaluate_splits(averaged, contexts, run)
    audit = audit_of(averaged, contexts, run, loop, results, paths)
    return run.finish(
        loop,
        results,
        audit,
        TABLE.split(),
        selected_by=market.judged_by,
        mae_steps=loop.mae_steps,
        samples_per_transition=loop.updates * args.batch_size / max(loop.global_step, 1),
        device={"precision": contexts.precision},
        data={
            "gaps": market.bars.gaps,
            "facts": market.bars.facts,
            "screen": market.features.screen,
        },
    )


if __name__ == "__main__":
    exit_with(main)
