r"""Trades one market with quantile critics over a frozen transformer encoder and an HMM context (FiLM).

By default the agent is greedy on a grid of 21 exposures. TQC's truncation and its actor stand under their flags.

On a laptop: embedded market, about 3 minutes on 2 cores, test score .7 to .85 of the optimum:

    python cleanrl_crypto/tqc_film_batch.py --timeout 300

Real bars (scripts/download_data.py gets them); of several files the first is traded, the others are inputs:

    python cleanrl_crypto/tqc_film_batch.py --data data/BTCUSDT_1h.parquet --timeout 1800
    python cleanrl_crypto/tqc_film_batch.py --data data/BTCUSDT_1h.parquet,data/ETHUSDT_1h.parquet \
        --split 2023-01-01/2024-01-01

GPU, Kaggle: a GPU is used where a probe shows that it works, for the environment too.

    python cleanrl_crypto/tqc_film_batch.py --data /kaggle/input/bars/BTCUSDT_1h.parquet \
        --run-dir /kaggle/working/run --compile --cudagraphs --timeout 28800

Resume after whatever ended the run (the same command starts and continues it), or evaluate a checkpoint:

    python cleanrl_crypto/tqc_film_batch.py --run-dir runs/btc --data data/BTCUSDT_1h.parquet --resume auto
    python cleanrl_crypto/tqc_film_batch.py --eval-only --checkpoint runs/btc/checkpoints/best.pt

Use the agent in another program, from its checkpoint alone:

    from cleanrl_crypto.tqc_film_batch import load_policy
    policy = load_policy("runs/btc/checkpoints/best.pt")
    action = policy(obs)  # market (B, 64, columns), position (B, 1), w_cost (B, 1) -> exposure (B, 1)

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
    from common.run import CheckFailed, Run, RunArgs, UsageError
    from common.run import answer_help, check, exit_with, experiment, load_run, refuse
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
from common.data import Bars, iso, load_bars, print_facts, split_rows, utc_times
from common.features import FeatureModel, fit_features
from common.gpu_pool import pool
from common.lanes import Lanes, register
from common.scoring import BP, Series, best_constant, path_metrics, random_path, ridge_edge, verdict
from common.timeout_guard import CheckpointError, load_checkpoint, save_atomic

SCHEMA = 2  # of the checkpoint
SPLITS = ("train", "eval", "test")
TABLE = ("score", "mean_expected_bps", "mean_reward_bps", "sharpe", "max_drawdown", "turnover", "exposure", "trades")

# market
HMM_COLUMNS = 5  # 4 filtered state posteriors and their entropy
HORIZON = 1  # bars between a decision and the end of its reward
RUIN = 1e-6  # floor of a bar's growth and of what a fee leaves
LOST = 3e-6  # growth at which the episode terminates: above RUIN, a fee may hit the floor in a rising bar
LEVELS = np.linspace(-1, 1, 21)  # exposures among which the best constant is found
GRID = 10  # exposures on each side of flat among which the greedy policy chooses

FIT_SHARE = 0.15  # of the time left, for the HMM of a long history

# encoder: the shape that the scores in docs/results.md were measured with
HEADS, LAYERS = 4, 2
MASKED = 0.3  # share of a window's bars that pre-training hides; .15 left too easy an interpolation
MAE_BATCH = 64  # windows a pre-training step
MAE_LEARNING_RATE = 3e-3  # peak of the one-cycle schedule
PRETRAIN_SHARE = 0.12  # of the time left: 150 steps take 25 s on one core, learning needs the rest
CACHE_SHARE = 0.3  # of the time left: rows that are not encoded by then are left out, the oldest first
BLOCK = 32  # rows encoded at once: of one size, so that a row's bits do not depend on its neighbours

# optimisation
BUFFER = 2_000_000  # transitions in the replay: 40 MB, 30 times what a default run makes
SCHEDULE = 65_536  # transitions over which learning rates fall, where --total-timesteps gives no other
LAST_RATE = 0.02  # share of the learning rates that is left at the end of the schedule
WARMUP = 20  # updates over which Adam's second moments settle and the rates grow from 0
MAX_GRAD_NORM = 10.0  # ten times a usual gradient: only accidents are clipped
REWARD_CLIP = 10.0  # standard deviations of the full position's reward; the share beyond it is logged


# ------------------------------------------------------------------------------------------------- arguments
@dataclass
class Args(RunArgs):
    # experiment
    exp_name: str = Path(__file__).stem
    """name of this experiment"""

    # data
    data: str = "synthetic:regime"
    """synthetic:{regime,signal,noise,drift}[?bars=N&seed=K&...] or files of bars, comma-separated, the first traded"""
    split: str = "0.70/0.15/0.15"
    """train/eval/test as fractions of the rows, or the first days of eval and test: 2023-01-01/2024-01-01"""
    fill_limit: int = 24
    """bars for which another asset's last bar may stand in for a missing one"""
    window: int = 64
    """bars in an observation"""
    hmm: bool = True
    """give the agent the five HMM columns (else they are zeros)"""
    film: bool = True
    """let the HMM columns modulate the encoding through FiLM (else they join the fusion layer's input)"""

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
    """bp a bar that a full long position pays and a full short one receives; negative: the other way round"""
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
    """environment transitions, the sum over lanes (default: 65536; with --timeout: until time or patience is over)"""
    learning_starts: int = 2_048
    """transitions with uniform random actions before the first update"""
    batch_size: int = 256
    """rows drawn for an update"""
    segment: int = 8
    """consecutive bars drawn together: they share the market forward of row and next row"""
    counterfactuals: int = 3
    """uniform random exposures trained on each drawn row beside the stored one (the market is exogenous)"""
    updates_per_step: int = 10
    """gradient updates a vector step"""
    gamma: float = 0.95
    """discount a bar"""
    average: float = 0.99
    """decay an update of the averaged weights that evaluation and checkpoints use (0: the last weights)"""
    tau: float = 0.05
    """speed of the target heads' moving average"""
    policy: str = "critic_grid"
    """who acts: critic_grid (greedy on a grid of exposures, and so are its targets) or actor (gSDE, TQC's targets)"""
    n_critics: int = 2
    """quantile critics"""
    n_quantiles: int = 25
    """quantiles a critic"""
    top_quantiles_to_drop_per_net: int = 0
    """truncation of the target; it punishes risk, not only overestimation: docs/tqc_film_batch.md"""
    fusion_width: int = 512
    """width of the fusion layer"""
    hidden: int = 256
    """width of the two hidden layers of every head"""
    learning_rate: float = 3e-3
    """of the heads (AdamW)"""
    learning_rate_fusion: float = 3e-4
    """of the fusion layer's 16384 market columns"""
    learning_rate_film: float = 1e-2
    """of FiLM"""
    weight_decay: float = 1e-2
    """AdamW, on the fusion layer's market columns"""
    dropout: float = 0.1
    """of embedding channels, while training"""
    recency: float = 1.5
    """bars in which the fixed gain on the embedding decays by e, going back from the last bar"""
    reward_scaling: bool = True
    """divide rewards by the running standard deviation of the full position's reward (saved with the agent)"""
    sde_sample_freq: int = 64
    """vector steps for which a lane keeps its gSDE noise matrix"""
    log_std_init: float = -3.0
    """of the gSDE weights"""
    ent_coef: str = "auto_0.5"
    """entropy coefficient of the actor: a number, auto, or auto_0.5 = learned from 0.5 on"""
    ent_coef_lr: float = 3e-2
    """learning rate of log alpha: at 3e-4 the initial 0.5 is still .37 after 1000 updates"""
    ent_coef_min: float = 0.0
    """floor of the entropy coefficient"""
    target_entropy: float = -1.0
    """of the squashed Gaussian (its maximum is .684)"""

    # evaluation
    eval_interval: int = 4_096
    """transitions between evaluations on the eval split"""
    patience: int = 8
    """evaluations without a better one after which training stops (0: never)"""

    # runtime
    precision: str = "auto"
    """auto (bf16 where the hardware has it), bf16 or fp32"""
    compile: bool = False
    """torch.compile networks and loss"""
    cudagraphs: bool = False
    """with --compile on a GPU: capture them in CUDA graphs"""

    def __post_init__(self):
        super().__post_init__()
        check(self, {
            "position_mode": ("rebalance", "drift"), "policy": ("critic_grid", "actor"),
            "precision": ("auto", "bf16", "fp32")}, {
            (0, 1): "eval_w_cost learning_rate learning_rate_fusion learning_rate_film",
            (0, 0.9999): "gamma", (0, 0.99999): "average", (0, 0.99): "dropout", (1e-6, 1): "tau",
            (1e-3, 1e9): "recency", (0, 10): "ent_coef_lr weight_decay", (-20, 5): "log_std_init",
            (-100, 0.68): "target_entropy", (0, 255): "counterfactuals", (0, 1024): "updates_per_step",
            (0, 1000): "fee_bps slippage_bps turnover_penalty_bps", (-1000, 1000): "funding_bps",
            (0, 10**6): "fill_limit patience ent_coef_min", (0, 10**7): "mae_steps",
            (0, 10**12): "total_timesteps learning_starts w_cost_curriculum", (1, 64): "n_critics",
            (1, 1024): "n_quantiles", (2, 4096): "window", (1, 2**16): "d_model fusion_width hidden",
            (1, 2**20): "num_envs batch_size segment", (1, 2**31): "episode_length sde_sample_freq",
            (1, 10**12): "eval_interval"})
        drop, quantiles = self.top_quantiles_to_drop_per_net, self.n_quantiles
        _, alpha = parse_ent_coef(self.ent_coef)
        refuse(
            (self.batch_size % self.segment,
             f"--batch-size {self.batch_size} must be a multiple of --segment {self.segment}"),
            (self.d_model % HEADS, f"--d-model {self.d_model} must be a multiple of {HEADS} attention heads"),
            (not 0 <= drop < quantiles,
             f"--top-quantiles-to-drop-per-net {drop} leaves none of --n-quantiles {quantiles}"),
            (self.cudagraphs and not self.compile, "--cudagraphs needs --compile"),
            (self.ent_coef_min > alpha,
             f"--ent-coef-min {self.ent_coef_min} is above the initial coefficient {alpha}"))


def parse_ent_coef(text: str) -> tuple[bool, float]:
    """`auto`, `auto_0.5` or a number -> (is it learned, initial value), as Stable-Baselines3 reads it."""
    learned = text == "auto" or text.startswith("auto_")
    try:
        value = 1.0 if text == "auto" else float(text.removeprefix("auto_"))
    except ValueError:
        value = -1.0
    good = 0 < value < math.inf or (value == 0 and not learned)
    why = "must be a number >= 0, auto, or auto_VALUE with VALUE > 0"
    refuse((not good, f"--ent-coef {text}: {why}"))
    return learned, value


# --------------------------------------------------------------------------------------------------- kernels
# Tuples that kernels take:
#   costs: cost (fraction of equity per unit of |change|), funding (fraction a bar that a full long pays), drift
#   rules: start, stop (decision rows), length (bars an episode), w_max, penalty (per unit of |change| at w_cost 1), seed
ROW, CLOCK, EPISODE = range(3)  # rows of ints (3, lanes) int64
POSITION, W_COST, EQUITY, RETURN, TURNOVER = range(5)  # rows of floats (5, lanes) float64


@nb.njit(cache=True)
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


@nb.njit(cache=True)
def fee_nb(position, target, costs):
    """Fee as a share of equity. Drifting: on what is really traded to hold `target` of what the fee leaves."""
    cost, _, drift = costs
    change = target - position
    fee = cost * abs(change)
    if drift:
        fee /= 1.0 + cost * target * (1.0 if change > 0.0 else -1.0)
    return fee


@nb.njit(cache=True)
def trade_nb(position, target, ret, costs):
    """One decision and the bar it earns: ONE lane, all scalars, float64.

    position, target: exposure before and after the trade, share of equity; ret: simple return of the next bar.
    equity *= (1 - fee) (1 + target ret - funding target). Returns (growth of equity, exposure at the next decision).
    """
    _, funding, drift = costs
    growth = 1.0 + target * ret - funding * target
    growth = growth if growth > RUIN else RUIN  # Numba's CUDA target does not know max()
    left = 1.0 - fee_nb(position, target, costs)
    left = left if left > RUIN else RUIN
    return left * growth, target * (1.0 + ret) / growth if drift else target


@nb.njit(cache=True)
def begin_nb(i, rules, ints, floats):
    """Lane i to the first row of episode ints[EPISODE, i]; its w_cost is 0 or w_max in 20 % each, else uniform."""
    start, stop, _, w_max, _, seed = rules
    episode = ints[EPISODE, i]
    u = uniform_nb(seed, i, episode, 1)
    ints[ROW, i] = start + np.int64(uniform_nb(seed, i, episode, 0) * (stop - start))
    ints[CLOCK, i] = 0
    floats[POSITION, i] = 0.0
    floats[W_COST, i] = w_max * (0.0 if u < 0.2 else 1.0 if u > 0.8 else (u - 0.2) / 0.6)
    floats[EQUITY, i] = 1.0
    floats[RETURN, i] = 0.0
    floats[TURNOVER, i] = 0.0


@nb.njit(cache=True)
def begin_all_nb(rules, ints, floats):
    for i in range(ints.shape[1]):
        begin_nb(i, rules, ints, floats)


def lane_py(i, action, ret, costs, rules, ints, floats, reward, flags, final_ints, final_floats):
    """Step lane i in place; compiled for the CPU and, unchanged, as a CUDA device function.

    flags (2, N): terminated, truncated; final_*: the lane's state before the reset, whenever one of them is set.
    """
    _, stop, length, _, penalty, _ = rules
    row, position = ints[ROW, i], floats[POSITION, i]
    target = -1.0 if action[i] < -1.0 else 1.0 if action[i] > 1.0 else action[i]
    change = abs(target - position)
    growth, after = trade_nb(position, target, ret[row], costs)
    reward[i] = math.log(growth) - floats[W_COST, i] * penalty * change
    ints[ROW, i] = row + 1
    ints[CLOCK, i] += 1
    floats[POSITION, i] = after
    floats[EQUITY, i] *= growth
    floats[RETURN, i] += reward[i]
    floats[TURNOVER, i] += change
    flags[0, i] = growth <= LOST
    flags[1, i] = not flags[0, i] and (ints[CLOCK, i] >= length or row + 1 >= stop)
    if flags[0, i] or flags[1, i]:
        for k in range(3):
            final_ints[k, i] = ints[k, i]
        for k in range(5):
            final_floats[k, i] = floats[k, i]
        ints[EPISODE, i] += 1
        begin_nb(i, rules, ints, floats)


lane_nb = nb.njit(lane_py)


@nb.njit(parallel=True, cache=True)
def step_cpu(action, ret, costs, rules, ints, floats, reward, flags, final_ints, final_floats):
    """Step all lanes: the arguments of lane_py without the lane."""
    for i in nb.prange(action.size):
        lane_nb(i, action, ret, costs, rules, ints, floats, reward, flags, final_ints, final_floats)


@functools.cache  # one compilation a process
def cuda_step():
    """The same lane on the GPU: a kernel with step_cpu's arguments, one thread a lane."""
    lane = cuda.jit(device=True)(lane_py)

    @cuda.jit
    def step_cuda(action, ret, costs, rules, ints, floats, reward, flags, final_ints, final_floats):
        i = cuda.grid(1)
        if i < action.size:
            lane(i, action, ret, costs, rules, ints, floats, reward, flags, final_ints, final_floats)

    return step_cuda


@nb.njit(cache=True)
def walk_nb(target, ret, expected, costs):
    """Trade the exposures `target` (n,) along returns `ret` (n,), flat before the first.

    Returns (reward, expected reward, |change|, target) (n,): log growth net of costs; and target (expected - funding) -
    fee, the known conditional mean of the simple return instead of the realised one.
    """
    n = target.size
    reward, mean, change = np.empty(n), np.empty(n), np.empty(n)
    position = 0.0
    for t in range(n):
        change[t] = abs(target[t] - position)
        mean[t] = target[t] * (expected[t] - costs[1]) - fee_nb(position, target[t], costs)
        growth, position = trade_nb(position, target[t], ret[t], costs)
        reward[t] = math.log(growth)
    return reward, mean, change, target.copy()


@nb.njit(cache=True)
def greedy_walk_nb(value, grid, scale, penalty, ret, costs):
    """Greedy exposures (n,) of an afterstate critic: value (n, A) of holding grid[j], before the cost of getting there.

    argmax_j value[t, j] + scale (log(1 - fee) - penalty |grid[j] - position|); a tie keeps the nearest position.
    """
    n, m = value.shape
    target = np.empty(n)
    position = 0.0
    for t in range(n):
        best, best_q, best_change = 0, -np.inf, 0.0
        for j in range(m):
            change = abs(grid[j] - position)
            left = max(1.0 - fee_nb(position, grid[j], costs), RUIN)
            q = value[t, j] + scale * (math.log(left) - penalty * change)
            if q > best_q or (q == best_q and change < best_change):
                best, best_q, best_change = j, q, change
        target[t] = grid[best]
        _, position = trade_nb(position, grid[best], ret[t], costs)
    return target


# ------------------------------------------------------------------------------------------------ environment
@dataclass(eq=False)  # hashed by identity
class Market:
    """What lanes walk over: one static table. Decision rows are bar rows; row t earns bar t + 1."""

    bars: Bars
    features: FeatureModel
    table: np.ndarray  # (T, n_tech + 5) float32: technical columns, then the HMM's
    ret: np.ndarray  # (T,) float64 simple return of the next bar, 0 in the last row
    expected: np.ndarray  # (T,) float64 its known conditional mean, NaN on real bars
    rows: dict  # split -> (start, stop), half-open decision rows
    window: int

    @property
    def n_tech(self) -> int:
        return self.table.shape[1] - HMM_COLUMNS

    def describe(self) -> dict:
        """What a checkpoint must agree with, as plain values."""
        return {"spec": self.bars.spec, "names": list(self.bars.names), "sha256": self.bars.sha256,
                "bars": len(self.ret), "rows": {k: list(v) for k, v in self.rows.items()},
                "columns": list(self.features.columns)}

    def time(self, row: int) -> str:
        return iso(self.bars.timestamp[row])


def load_market(
    data: str, split: str = "0.70/0.15/0.15", window: int = 64, fill_limit: int = 24, seed: int = 1,
    hmm: bool = True, features: FeatureModel | None = None, seconds: float = math.inf,
) -> Market:
    """Bars -> splits -> columns, fitted on train rows, for `seconds` at most, unless `features` are given. Raises
    DataError (one line)."""
    bars = load_bars(data, fill_limit)
    purge = window + HORIZON
    train_stop = split_rows(bars.timestamp, split, purge)["train"][1]
    features = features or fit_features(bars, train_stop, seed, seconds)
    table = features.transform(bars)
    rows = split_rows(bars.timestamp, split, purge, first=features.warmup + window - 1)
    if not hmm:
        table[:, -HMM_COLUMNS:] = 0.0
    ret = np.nan_to_num(bars.next_return)  # the last row has no next bar and is never a decision row
    expected = bars.truth.expected if bars.truth else np.full(len(ret), np.nan)
    return Market(bars, features, table, ret, expected, rows, window)


class MarketVectorEnv(Lanes):
    """Lanes that trade one market; truncation at `episode_length` or at the end of the rows.

    Observation: market (window, columns) float32, the bars up to the decision; position (1,), the exposure held;
    w_cost (1,). Action (1,) in [-1, 1]: target exposure. Reward: log growth of equity net of costs, minus w_cost *
    penalty * |change|.
    """

    SAVED = ("ints", "floats", "final_ints", "final_floats")

    def __init__(
        self, market: Market, rows: tuple[int, int], num_envs: int = 1, episode_length: int = 128,
        fee_bps: float = 4.0, slippage_bps: float = 1.0, funding_bps: float = 0.0, position_mode: str = "rebalance",
        turnover_penalty_bps: float = 5.0, seed: int = 1, backend: str = "cpu",
    ):
        start, stop, last = int(rows[0]), int(rows[1]), len(market.ret)
        if position_mode not in ("rebalance", "drift") or backend not in ("cpu", "cuda"):
            raise ValueError(f"position_mode {position_mode!r} must be rebalance or drift, backend {backend!r} cpu or cuda")
        if not market.window - 1 <= start < stop < last:
            raise ValueError(f"rows {rows}: need {market.window - 1} <= start < stop < {last}")
        box = gym.spaces.Box
        observation = gym.spaces.Dict({
            "market": box(-np.inf, np.inf, (market.window, market.table.shape[1]), np.float32),
            "position": box(-np.inf, np.inf, (1,), np.float32),
            "w_cost": box(0.0, 1.0, (1,), np.float32)})
        super().__init__(num_envs, observation, box(-1.0, 1.0, (1,), np.float32), backend, seed)
        self.market, self.start, self.stop, self.length = market, start, stop, int(episode_length)
        self.costs = (fee_bps + slippage_bps) * BP, funding_bps * BP, position_mode == "drift"
        self.penalty, self.w_max = turnover_penalty_bps * BP, 1.0
        for name, rows_of in (("ints", 3), ("final_ints", 3)):
            self.take(name, (rows_of, num_envs), np.int64)
        for name, rows_of in (("floats", 5), ("final_floats", 5)):
            self.take(name, (rows_of, num_envs), np.float64)
        self.take("action", (num_envs,), np.float64)
        self.take("reward", (num_envs,), np.float64)
        self.take("flags", (2, num_envs), np.bool_)
        self.kernel, self.ret = step_cpu, market.ret
        if backend == "cuda":
            self.kernel = cuda_step()[(num_envs + 127) // 128, 128]
            self.ret = pool.static(("ret", market.bars.sha256), lambda: cuda.to_device(market.ret))
        self.table = torch.as_tensor(market.table, device=self.torch_device)
        self.offsets = torch.arange(1 - market.window, 1, device=self.torch_device)

    @property
    def rules(self) -> tuple:
        return self.start, self.stop, self.length, self.w_max, self.penalty, self.seed

    def reset_lanes(self, first: bool, options: dict):
        ints, floats = self.ints.cpu().numpy(), self.floats.cpu().numpy()  # on a CPU the lanes' own memory
        ints[EPISODE] = 0 if first else ints[EPISODE] + 1
        begin_all_nb(self.rules, ints, floats)
        self.ints.copy_(torch.from_numpy(ints))
        self.floats.copy_(torch.from_numpy(floats))

    def step_lanes(self, action: torch.Tensor):
        """action (N,) or (N, 1) -> reward (N,) float64, terminated, truncated (N,) bool: overwritten by the next call."""
        self.action.copy_(action.reshape(-1))
        a = self.arrays
        self.kernel(a["action"], self.ret, self.costs, self.rules, a["ints"], a["floats"], a["reward"], a["flags"],
                    a["final_ints"], a["final_floats"])
        return self.reward, self.flags[0], self.flags[1]

    def observe(self) -> dict:
        return self.window_of(self.ints, self.floats)

    def observe_final(self, lanes: torch.Tensor) -> dict:
        return self.window_of(self.final_ints[:, lanes], self.final_floats[:, lanes])

    def window_of(self, ints, floats) -> dict:
        market = self.table[ints[ROW][:, None] + self.offsets]  # (N, window, columns)
        return {"market": market, "position": floats[POSITION][:, None].float(),
                "w_cost": floats[W_COST][:, None].float()}

    def episode(self) -> dict:
        last = self.final_floats
        return {"r": last[RETURN], "l": self.final_ints[CLOCK], "equity": last[EQUITY], "turnover": last[TURNOVER]}

    def charts(self) -> dict:
        """Means over the lanes' last ended episodes; NaN while none has ended."""
        ended = self.ints[EPISODE] > 0
        return {"charts/episodic_return": self.final_floats[RETURN][ended].mean(),
                "charts/episodic_length": self.final_ints[CLOCK][ended].double().mean()}


def make_vec(num_envs: int = 1, data: str = "synthetic:regime", split_name: str = "train", **kwargs) -> MarketVectorEnv:
    """gymnasium.make_vec("cleanrl_crypto/Market-v0", num_envs=8, data=..., split_name="train", fee_bps=4, ...)."""
    loading = {k: kwargs.pop(k) for k in ("split", "window", "fill_limit", "hmm") if k in kwargs}
    market = load_market(data, **loading)
    return MarketVectorEnv(market, market.rows[split_name], num_envs, **kwargs)


register("cleanrl_crypto/Market-v0", make_vec)


# --------------------------------------------------------------------------------------------------- networks
class Block(nn.Module):
    """Pre-LN transformer layer."""

    def __init__(self, d_model: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.ff = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

    def forward(self, x):  # (B, T, d)
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))
        return x + self.ff(self.norm2(x))


class CryptoMAE(nn.Module):
    """Masked autoencoder over a window of technical columns (He et al. 2022, on bars instead of patches).

    context(x) is what the agent sees: the encoding, standardised channel by channel on train rows and weighed by a
    fixed gain that decays into the past. mean, std and gain are buffers: frozen with the rest.
    """

    def __init__(self, columns: int, window: int, d_model: int, recency: float):
        super().__init__()
        self.embed = nn.Linear(columns, d_model)
        self.blocks = nn.ModuleList(Block(d_model) for _ in range(LAYERS))
        self.norm, self.decode = nn.LayerNorm(d_model), nn.Linear(d_model, columns)
        self.mask_token = nn.Parameter(torch.zeros(d_model))
        at = torch.arange(window)[:, None] / 10_000 ** (torch.arange(0, d_model, 2) / d_model)
        self.register_buffer("positions", torch.stack([at.sin(), at.cos()], -1).flatten(1)[:, :d_model])  # (T, d)
        self.register_buffer("mean", torch.zeros(d_model))
        self.register_buffer("std", torch.ones(d_model))
        self.register_buffer("gain", torch.exp((torch.arange(window) - (window - 1)) / recency)[:, None])  # (T, 1)

    def encode(self, x, mask=None):  # (B, T, columns), (B, T) bool -> (B, T, d)
        x = self.embed(x)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = x + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def loss(self, x, mask):
        """Mean squared error of the reconstruction at the masked steps."""
        return F.mse_loss(self.decode(self.encode(x, mask))[mask].float(), x[mask])

    @torch.no_grad()
    def context(self, x):  # (B, T, columns) -> (B, T, d)
        return (self.encode(x).float() - self.mean) / self.std * self.gain


class FoundationFeatureExtractor(nn.Module):
    """The market columns of the fusion layer: FiLM(context; hmm) -> flatten 16384 -> fusion_width, before the norm.

    The layer over [market 16384, position, w_cost] is split by columns: this part is computed once per row, the two
    scalar columns (class Fusion) for every position tried on it.
    """

    def __init__(self, window: int, d_model: int, width: int, dropout: float, film: bool):
        super().__init__()
        self.film = nn.Linear(HMM_COLUMNS, 2 * d_model) if film else None
        self.market = nn.Linear(window * d_model + (0 if film else HMM_COLUMNS), width)
        self.dropout = dropout
        if film:  # identity at initialisation (Perez et al. 2018)
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)

    def forward(self, z, hmm):  # (B, T, d), (B, 5) -> (B, width) float32
        scale, beta = z.new_ones(z.shape[0], 1, z.shape[2]), z.new_zeros(())
        if self.film is not None:
            gamma, beta = self.film(hmm).to(z.dtype)[:, None].chunk(2, -1)  # (B, 1, d) each
            scale = scale + gamma
        if self.training and self.dropout:  # whole channels, so that no neighbouring bar gives them away
            keep = torch.rand(scale.shape, device=z.device) >= self.dropout
            scale = scale * (keep / (1 - self.dropout)).to(z.dtype)
        x = torch.addcmul(beta, z, scale).flatten(1)  # one pass over the large tensor
        if self.film is None:
            x = torch.cat([x, hmm.to(z.dtype)], 1)
        return self.market(x).float()


class Fusion(nn.Module):
    """The position and w_cost columns of the fusion layer, LayerNorm, LeakyReLU."""

    def __init__(self, width: int):
        super().__init__()
        self.scalars = nn.Linear(2, width, bias=False)
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.scalars.weight, std=0.5)  # a step of position must be as visible as a step of the market

    def forward(self, market, position, w_cost):  # (B, width), (B, K), (B, 1) -> (B, K, width)
        p, w = self.scalars.weight.unbind(1)
        return F.leaky_relu(self.norm(market[:, None] + position[..., None] * p + w_cost[..., None] * w))


def mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    layers = nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, out)
    return nn.Sequential(*layers)


class Critic(nn.Module):
    """Quantiles of G(row, exposure after the trade, w_cost); Q(row, position, a, w) = G(row, a, w) + cost of the trade.

    A proportional cost separates exactly, so the slope of Q in the cost of the trade is 1 by construction.
    """

    def __init__(self, width: int, hidden: int, n_critics: int, n_quantiles: int):
        super().__init__()
        self.fusion = Fusion(width)
        self.nets = nn.ModuleList(mlp(width, hidden, n_quantiles) for _ in range(n_critics))

    def forward(self, market, after, w_cost):  # (B, width), (B, K), (B, 1) -> (B, K, critics, quantiles)
        x = self.fusion(market, after, w_cost)
        return torch.stack([net(x) for net in self.nets], 2).float()


class Actor(nn.Module):
    """Squashed Gaussian with gSDE noise (Raffin et al. 2021), on the critic's encoding of the market."""

    def __init__(self, width: int, hidden: int, log_std_init: float):
        super().__init__()
        self.fusion = Fusion(width)
        self.latent = mlp(width, hidden, hidden)[:-1]
        self.mu = nn.Linear(hidden, 1)
        self.log_std = nn.Parameter(torch.full((hidden,), log_std_init))

    def forward(self, market, position, w_cost):  # (B, width), (B, 1), (B, 1) -> mean (B,), latent (B, hidden)
        latent = self.latent(self.fusion(market, position, w_cost)[:, 0]).float()
        return F.hardtanh(self.mu(latent)[:, 0].float(), -2.0, 2.0), latent


class Agent(nn.Module):
    """Everything that learns, and the statistics it needs: one state_dict. config: plain values that rebuild it."""

    def __init__(self, config: dict):
        super().__init__()
        c = self.config = config
        width, hidden, critics = c["fusion_width"], c["hidden"], (c["n_critics"], c["n_quantiles"])
        self.costs = c["cost"], c["funding"], c["drift"]
        self.extractor = FoundationFeatureExtractor(c["window"], c["d_model"], width, c["dropout"], c["film"])
        self.critic = Critic(width, hidden, *critics)
        self.target = Critic(width, hidden, *critics).requires_grad_(False)
        self.target.load_state_dict(self.critic.state_dict())
        self.actor = Actor(width, hidden, c["log_std_init"])
        self.log_alpha = nn.Parameter(torch.tensor(math.log(max(c["alpha"], 1e-30))))
        self.register_buffer("grid", torch.arange(-GRID, GRID + 1) / GRID)
        self.register_buffer("reward_stats", torch.zeros(3, dtype=torch.float64))  # count, mean, sum of squares

    @property
    def alpha(self) -> torch.Tensor:
        return self.log_alpha.detach().exp()

    @torch.no_grad()
    def watch_rewards(self, rewards: torch.Tensor):
        """Welford's update with a batch (Chan et al. 1983) of full-position rewards, which no policy can shrink."""
        count, mean, m2 = self.reward_stats
        n, new = len(rewards), rewards.mean()
        total = count + n
        m2 = m2 + ((rewards - new) ** 2).sum() + (new - mean) ** 2 * count * n / total
        self.reward_stats.copy_(torch.stack([total, mean + (new - mean) * n / total, m2]))

    @property
    def reward_scale(self) -> torch.Tensor:
        """1 / standard deviation of the full position's reward, () float32."""
        count, _, m2 = self.reward_stats
        known = (count > 1) & (m2 > 0) & self.config["reward_scaling"]
        return torch.where(known, (count / m2).sqrt(), 1.0).float()


# -------------------------------------------------------------------------------------------------- algorithm
def quantile_huber_loss(current, target):
    """Quantile Huber loss, kappa 1 (Dabney et al. 2018, eq. 10), mean over everything; no gradient to the target.

    current (B, C, N): quantiles of each critic at (i + .5)/N; target (B, M): atoms every critic is compared with.
    """
    n = current.shape[-1]
    tau = (torch.arange(n, device=current.device, dtype=current.dtype) + 0.5) / n
    ours, theirs = torch.broadcast_tensors(current[..., None], target.detach()[:, None, None])  # (B, C, N, M)
    weight = (tau[:, None] - (theirs < ours).to(current.dtype)).abs()
    return (weight * F.huber_loss(ours, theirs, reduction="none")).mean()


def truncate(quantiles, drop: int):
    """Pool the critics' atoms (B, C, N), sort, drop `drop` a critic from the top (Kuznetsov et al. 2020): (B, M)."""
    b, c, n = quantiles.shape
    pooled = quantiles.reshape(b, c * n)
    return pooled.sort(dim=1).values[:, : c * (n - drop)] if drop else pooled


def tqc_target(next_quantiles, reward, done, gamma: float, alpha, next_log_prob, drop: int):
    """r + gamma (1 - done) (Z' - alpha log pi'): next_quantiles (B, C, N), the rest (B,) -> (B, M)."""
    kept = truncate(next_quantiles, drop) - (alpha * next_log_prob)[:, None]
    return reward[:, None] + gamma * (1 - done)[:, None] * kept


def squashed_log_prob(mean, std, u):
    """log density of tanh(u), u ~ N(mean, std), from the pre-tanh sample (no atanh of a clamp)."""
    normal = -0.5 * ((u - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    return normal - 2 * (math.log(2) - u - F.softplus(-2 * u))


def gsde_std(latent, log_std):
    """Std (B,) of latent (B, H) @ E, E ~ N(0, exp(log_std)^2) entry by entry."""
    return (latent**2 @ (2 * log_std).exp() + 1e-6).sqrt()


def sample_action(actor: Actor, market, position, w_cost, noise=None):
    """gSDE sample for an update, its noise drawn anew for every row. Returns action (B,), log_prob (B,), std (B,)."""
    mean, latent = actor(market, position, w_cost)
    std = gsde_std(latent, actor.log_std)
    u = mean + std * (torch.randn_like(std) if noise is None else noise)
    return u.tanh(), squashed_log_prob(mean, std, u), std


def bar_growth(exposure, ret, funding: float):
    """Growth of equity in a bar at `exposure`, before the cost of getting there; broadcasts."""
    return (1 + exposure * ret - funding * exposure).clamp_min(RUIN)


def next_position(exposure, ret, costs: tuple):
    """Exposure at the next decision; broadcasts."""
    _, funding, drift = costs
    return exposure * (1 + ret) / bar_growth(exposure, ret, funding) if drift else exposure


def trade_reward(position, after, costs: tuple, penalty):
    """log(1 - fee) - penalty |change| of going from position to after (<= 0); broadcasts. Same formula as fee_nb."""
    cost, _, drift = costs
    change = after - position
    fee = cost * change.abs()
    if drift:
        fee = fee / (1 + cost * after * torch.where(change > 0, 1.0, -1.0))
    return torch.log1p(-fee.clamp_max(1 - RUIN)) - penalty * change.abs()


def greedy_next(agent: Agent, market, held, w_cost, scale, noise=None):
    """The best grid exposure at the next row, the trade to it paid: market (B, width), exposures held there (B, K),
    w_cost (B, 1) -> quantiles (B K, C, N), log_prob (B K,), which is 0."""
    values = agent.target(market, agent.grid.expand(len(market), -1), w_cost)  # (B, A, C, N)
    penalty = agent.config["penalty"] * w_cost[..., None]
    moves = scale * trade_reward(held[..., None], agent.grid, agent.costs, penalty)  # (B, K, A)
    best = (values.mean((2, 3))[:, None] + moves).argmax(2, keepdim=True)  # (B, K, 1)
    pick = best[..., None].expand(-1, -1, *values.shape[2:])
    quantiles = values.gather(1, pick) + moves.gather(2, best)[..., None]
    return quantiles.flatten(0, 1), torch.zeros_like(held).flatten()


def sampled_next(agent: Agent, market, held, w_cost, scale, noise=None):
    """TQC's: the actor's sample at the next row, the trade to it paid; shapes as in greedy_next."""
    k = held.shape[1]
    market, w_cost, held = market.repeat_interleave(k, 0), w_cost.repeat_interleave(k, 0), held.reshape(-1, 1)
    action, log_prob, _ = sample_action(agent.actor, market, held, w_cost, noise)
    penalty = agent.config["penalty"] * w_cost
    paid = scale * trade_reward(held, action[:, None], agent.costs, penalty)  # (B K, 1)
    return agent.target(market, action[:, None], w_cost)[:, 0] + paid[..., None], log_prob


@torch.no_grad()
def move(averages: nn.Module, weights: nn.Module, share: float):
    """averages += share (weights - averages); outside no_grad the averages would keep a graph that grows."""
    torch._foreach_lerp_(list(averages.parameters()), list(weights.parameters()), share)


def learning_rate_share(loop: "Loop", args: Args) -> float:
    """Warm-up over updates, then a cosine over transitions down to LAST_RATE, which stays."""
    progress = min(1.0, loop.global_step / (args.total_timesteps or SCHEDULE))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, loop.updates / WARMUP) * (LAST_RATE + (1 - LAST_RATE) * cosine)


# ------------------------------------------------------------------------------------------ contexts, replay
class Contexts:
    """The market on the training device: its table, its returns, and the encoder's output for every row.

    __call__(rows (B,)) -> (z (B, T, d), hmm (B, 5)). If they fit into memory, rows are encoded once, by fill(), before
    the first decision; if not, anew for every batch.
    """

    def __init__(self, encoder: CryptoMAE, market: Market, device: torch.device, dtype=torch.float32, keep: bool = True):
        self.encoder, self.market, self.device, self.dtype = encoder, market, device, dtype
        self.table = torch.from_numpy(market.table).to(device)
        self.ret = torch.from_numpy(market.ret.astype(np.float32)).to(device)
        full = np.log1p(np.maximum(market.ret, RUIN - 1))
        self.full_reward = torch.from_numpy(full).to(device)  # (T,) float64, of a full long position
        self.offsets = torch.arange(1 - market.window, 1, device=device)
        shape = len(market.table), *encoder.positions.shape  # (bars, T, d)
        self.cache = torch.empty(shape, dtype=dtype, device=device) if keep else None
        self.rows = market.rows  # of every split, those that were encoded

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def windows(self, rows: torch.Tensor) -> torch.Tensor:
        """Technical columns of the bars up to each row: (B,) -> (B, T, n_tech)."""
        return self.table[rows[:, None] + self.offsets, : self.market.n_tech]

    @torch.no_grad()
    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            return self.encoder.context(self.windows(rows)).to(self.dtype)

    def fill(self, splits: dict, seconds: float, stop) -> dict:
        """Encode the rows of every split and the one after it, the last first and all splits at one pace, until
        `seconds` are over or stop(); at least a block each. Returns split -> [first encoded row, stop]."""
        if self.cache is None:
            return {name: list(span) for name, span in splits.items()}
        until, blocks = time.monotonic() + seconds, []
        for name, (first, last) in splits.items():
            starts = range(last + 1 - BLOCK, first - BLOCK, -BLOCK)  # counted back from the row after the split
            blocks += [(k / len(starts), name, start) for k, start in enumerate(starts)]
        rows = {}
        for part, name, start in sorted(blocks):
            if part > 0 and (time.monotonic() > until or stop()):
                break
            first = max(start, splits[name][0])
            at = torch.arange(start, start + BLOCK, device=self.device).clamp_min(first)
            self.cache[first : start + BLOCK] = self.encode(at)[first - start :]
            rows[name] = [first, splits[name][1]]
        return {name: rows[name] for name in splits}

    def __call__(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.encode(rows) if self.cache is None else self.cache[rows]
        return z, self.table[rows, self.market.n_tech :]


@dataclass
class Batch:
    """What is drawn for an update: G stretches of S consecutive rows, B = G S samples."""

    rows: torch.Tensor  # (G, S + 1) int64, the row after the last too
    position: torch.Tensor  # (B, 1) exposure before the stored trade
    after: torch.Tensor  # (B, K) exposures trained: the stored one first
    w_cost: torch.Tensor  # (B, 1)


class Replay:
    """Ring of transitions as row indices and lane scalars on the device: 16 bytes each, never windows.

    The next observation is row + 1 with the exposure that `action` leaves, the reward is recomputed from the row: a
    changed reward scale never meets stale rewards, and where a lane's episode ended its row simply goes on.
    """

    def __init__(self, size: int, lanes: int, device):
        self.size, self.lanes, self.total, self.device = size, lanes, 0, device
        self.row = torch.zeros(size, dtype=torch.int32, device=device)
        self.floats = torch.zeros(3, size, device=device)  # position, action, w_cost
        self.lane = torch.arange(lanes, device=device)

    def __len__(self) -> int:
        return min(self.total, self.size)

    def add(self, row, position, action, w_cost):
        at = (self.total + self.lane) % self.size
        self.row[at] = row.int()
        self.floats[:, at] = torch.stack([position, action, w_cost]).float()
        self.total += self.lanes

    def sample(self, n: int, segment: int, counterfactuals: int, stop: int) -> Batch:
        """n / segment stretches of one lane, and uniform random exposures beside the stored ones. stop: first row that
        is not a decision row."""
        steps = torch.arange(segment + 1, device=self.device)
        start = torch.randint(len(self), (n // segment, 1), device=self.device)
        at = (start + steps[:-1] * self.lanes) % len(self)  # (G, S)
        position, action, w_cost = self.floats[:, at.flatten(), None]  # (B, 1) each
        rows = self.row[start].long().clamp_max(stop - segment) + steps
        other = 2 * torch.rand(n, counterfactuals, device=self.device) - 1
        return Batch(rows, position, torch.cat([action, other], 1), w_cost)

    def state_dict(self) -> dict:
        n = len(self)
        return {"total": self.total, "row": self.row[:n].cpu().clone(), "floats": self.floats[:, :n].cpu().clone()}

    def load_state_dict(self, state: dict):
        n, self.total = len(state["row"]), state["total"]
        self.row[:n].copy_(state["row"])
        self.floats[:, :n].copy_(state["floats"])


class Noise:
    """gSDE in rollouts: every lane keeps its noise matrix for `every` vector steps."""

    def __init__(self, lanes: int, hidden: int, every: int, device):
        self.every, self.calls = every, 0
        self.matrix = torch.zeros(lanes, hidden, device=device)

    def __call__(self, latent, log_std):  # (N, hidden), (hidden,) -> (N,)
        if self.calls % self.every == 0:
            self.matrix.copy_(torch.randn_like(self.matrix) * log_std.exp())
        self.calls += 1
        return (latent * self.matrix).sum(1)

    def state_dict(self) -> dict:
        return {"calls": self.calls, "matrix": self.matrix.cpu().clone()}

    def load_state_dict(self, state: dict):
        self.calls = state["calls"]
        self.matrix.copy_(state["matrix"])


@torch.no_grad()
def explore(agent: Agent, contexts: Contexts, row, position, w_cost, noise: Noise) -> torch.Tensor:
    """The actor's exposures (N,) in a rollout."""
    agent.eval()
    with contexts.autocast():
        market = agent.extractor(*contexts(row))
        mean, latent = agent.actor(market, position.float()[:, None], w_cost.float()[:, None])
    return (mean + noise(latent, agent.actor.log_std)).tanh().float()


def encode_stretches(extractor, contexts: Contexts, rows) -> tuple:
    """Stretches of rows (G, S + 1) -> the market (G S, width) with its gradient, and that of every next row without."""
    market = extractor(*contexts(rows[:, :-1].flatten()))
    with torch.no_grad():
        last = extractor(*contexts(rows[:, -1]))[:, None]
        following = market.view(len(last), -1, last.shape[-1])[:, 1:]
        return market, torch.cat([following, last], 1).flatten(0, 1)


# -------------------------------------------------------------------------------------- evaluation, diagnostics
@torch.no_grad()
def latents_of(agent: Agent, contexts: Contexts, rows: torch.Tensor, until: float = math.inf) -> torch.Tensor:
    """The market part of the fusion layer for rows (n,) -> (n, width); stops at a whole block past `until`."""
    agent.eval()
    blocks = []
    for block in rows.split(512):
        with contexts.autocast():
            blocks.append(agent.extractor(*contexts(block)))
        if time.monotonic() > until:
            break
    return torch.cat(blocks)


@torch.no_grad()
def afterstate_values(agent: Agent, latents, after, w_cost):
    """Mean atom of G: (n, width), exposures (n, A), (n, 1) -> (n, A), scaled reward."""
    blocks = zip(latents.split(512), after.split(512), w_cost.split(512))
    return torch.cat([agent.critic(*block).mean((2, 3)) for block in blocks])


def grid_values(agent: Agent, latents, w_cost):
    """afterstate_values at every grid position: (n, width), (n, 1) -> (n, A)."""
    return afterstate_values(agent, latents, agent.grid.expand(len(latents), -1), w_cost)


def action_values(agent: Agent, latents, position, w_cost, after):
    """Q of trading from position (n, 1) to exposures (n, A) at w_cost (n, 1) -> (n, A), scaled reward."""
    paid = trade_reward(position, after, agent.costs, agent.config["penalty"] * w_cost)
    return afterstate_values(agent, latents, after, w_cost) + agent.reward_scale * paid


@torch.no_grad()
def act(agent: Agent, latents, position, w_cost, policy: str):
    """Deterministic exposure (n,) at (n, width), (n, 1), (n, 1)."""
    if policy == "actor":
        return agent.actor(latents, position, w_cost)[0].tanh()
    q = action_values(agent, latents, position, w_cost, agent.grid.expand(len(latents), -1))
    return agent.grid[q.argmax(1)]


def target_path(agent: Agent, latents, ret: np.ndarray, w_cost: float, policy: str) -> np.ndarray:
    """Deterministic exposures along consecutive rows, flat before the first: (n, width), (n,) -> (n,) float64."""
    w = torch.full((len(latents), 1), w_cost, device=latents.device)
    if policy == "critic_grid":
        value = grid_values(agent, latents, w).double().cpu().numpy()
        grid, scale = agent.grid.double().cpu().numpy(), float(agent.reward_scale)
        return greedy_walk_nb(value, grid, scale, agent.config["penalty"] * w_cost, ret, agent.costs)
    target, position = np.empty(len(ret)), 0.0
    for t in range(len(ret)):
        held = torch.full((1, 1), position, device=latents.device)
        target[t] = float(act(agent, latents[t : t + 1], held, w[:1], "actor"))
        _, position = trade_nb(position, target[t], ret[t], agent.costs)
    return target


def series_of(market: Market, costs: tuple) -> Series:
    """The market as scoring sees it; the ridge policy may use (last bar's technical columns) x (1, HMM columns)."""
    table = market.table.astype(np.float64)
    tech, hmm = table[:, : market.n_tech], table[:, market.n_tech :]
    x = np.concatenate([table, *(tech * hmm[:, [k]] for k in range(HMM_COLUMNS))], 1)
    walk = lambda target, a, b: walk_nb(target, market.ret[a:b], market.expected[a:b], costs)  # noqa: E731
    return Series(x, market.ret, market.rows, walk, market.bars.truth is not None)


@functools.lru_cache(16)
def optimum_of(market: Market, costs: tuple, start: int, stop: int) -> np.ndarray | None:
    """Exposures of the best policy that knows the market's law; its dynamic programme knows no funding."""
    if not market.bars.truth or costs[1]:
        return None
    return np.asarray(markets.optimum_path(market.bars.truth, costs[0], start, stop), np.float64)


def evaluate(
    agent: Agent, contexts: Contexts, split: str, args: Args, seconds: float = math.inf,
    policies: tuple = ("critic_grid", "actor"),
) -> tuple[dict, dict]:
    """Deterministic walk over a split's rows, flat before the first.

    Returns {policy: metrics, "agent": the acting policy's, "rows", "partial"} and the columns of its trace.
    """
    market, acting = contexts.market, agent.config["policy"]
    until = time.monotonic() + 0.4 * seconds  # what follows takes longer than the latents
    start, stop = contexts.rows[split]
    latents = latents_of(agent, contexts, torch.arange(start, stop, device=contexts.device), until)
    stop = start + len(latents)
    out = {"rows": [start, stop], "partial": (start, stop) != tuple(market.rows[split])}
    bars, ret, expected = market.bars, market.ret[start:stop], market.expected[start:stop]
    columns = {"timestamp": utc_times(bars.timestamp[start:stop]), "close": bars.close[start:stop], "next_return": ret}
    best = optimum_of(market, agent.costs, start, stop)
    best = walk_nb(best, ret, expected, agent.costs)[1].mean() / BP if best is not None else 0.0
    for policy in policies:
        if policy != acting and time.monotonic() > until:
            out["partial"] = True
            continue
        target = target_path(agent, latents, ret, args.eval_w_cost, policy)
        metrics, equity = path_metrics(*walk_nb(target, ret, expected, agent.costs), bars.bars_per_year)
        if bars.truth:
            metrics["score"] = metrics["mean_expected_bps"] / best if best >= 0.05 else None
        out[policy] = metrics
        name = "" if policy == acting else f"_{policy}"
        columns |= {f"position{name}": target, f"equity{name}": equity}
    out["agent"] = dict(out[acting])
    w_cost = torch.full((len(latents), 1), args.eval_w_cost, device=latents.device)
    q = grid_values(agent, latents, w_cost)
    columns["q_spread"] = (q.amax(1) - q.amin(1)).cpu().numpy()
    return out, columns


def add_baselines(out: dict, columns: dict, market: Market, costs: tuple, constant: float, seed: int):
    """Everyone whom the agent stands beside, on the same bars at the same costs."""
    start, stop = out["rows"]
    n, truth = stop - start, market.bars.truth
    paths = {
        "flat": np.zeros(n), "buy_and_hold": np.ones(n), "best_constant": np.full(n, constant),
        "random_same_turnover": random_path(n, out["agent"]["turnover"], seed),
        "optimum": optimum_of(market, costs, start, stop)}
    ret, expected = market.ret[start:stop], market.expected[start:stop]
    out["baselines"] = {}
    for name, target in paths.items():
        if target is not None:
            walked = walk_nb(target, ret, expected, costs)
            out["baselines"][name], equity = path_metrics(*walked, market.bars.bars_per_year)
            columns |= {f"position_{name}": target, f"equity_{name}": equity}
    if truth:
        columns |= {"expected": expected, "signal": truth.signal[start:stop], "regime": truth.regime[start:stop]}


@torch.no_grad()
def diagnose(agent: Agent, contexts: Contexts, split: str = "eval", n: int = 256) -> dict:
    """What the deterministic policy depends on, on n rows of a split (the same rows at every call)."""
    c, rng, device = agent.config, np.random.default_rng(0), contexts.device
    to = lambda x: torch.as_tensor(x, device=device)  # noqa: E731
    rows = to(np.sort(rng.choice(np.arange(*contexts.rows[split]), n)))
    mix = to(rng.permutation(n))
    position = to(rng.uniform(-1, 1, (n, 1)).astype(np.float32))
    w_cost = to(rng.uniform(0, 1, (n, 1)).astype(np.float32))
    zero = torch.zeros_like(position)
    z, hmm = contexts(rows)
    agent.eval()
    with contexts.autocast():
        latents, other_tech = agent.extractor(z, hmm), agent.extractor(z[mix], hmm)
        other_hmm = agent.extractor(z, hmm[mix])

    policy = functools.partial(act, agent, policy=c["policy"])
    greedy = policy(latents, position, w_cost)
    fixed = torch.stack([policy(latents, zero + p, zero) for p in (-1.0, 0.0, 1.0)])  # the market alone varies
    shuffled = {
        "technical": policy(other_tech, position, w_cost), "hmm": policy(other_hmm, position, w_cost),
        "position": policy(latents, position[mix], w_cost), "w_cost": policy(latents, position, w_cost[mix])}

    noise = torch.randn(n, generator=torch.Generator(device.type).manual_seed(0), device=device)
    sampled, log_prob, std = sample_action(agent.actor, latents, position, w_cost, noise)
    q = action_values(agent, latents, position, w_cost, agent.grid.expand(n, -1))  # (n, A)
    pair = torch.stack([greedy, sampled], 1)
    q_greedy, q_sampled = action_values(agent, latents, position, w_cost, pair).unbind(1)
    quantiles = agent.critic(latents, greedy[:, None], w_cost)  # (n, 1, C, N)
    hidden = agent.critic.nets[0][:2](agent.critic.fusion(latents, greedy[:, None], w_cost)[:, 0])
    full = agent.reward_scale * contexts.full_reward[rows].abs()
    entropy, alpha = -log_prob.mean(), agent.alpha
    found = {
        "state_dependence": fixed.std(1).mean(), "action_mean": greedy.mean(),
        "saturation": (greedy.abs() > 0.98).float().mean(), "greedy_gap": (q_greedy - q_sampled).mean(),
        "greedy_over_sampled": greedy.std() / sampled.std().clamp_min(1e-6), "q_mean": q.mean(),
        "q_action_spread": (q.amax(1) - q.amin(1)).mean(),
        "quantile_spread": (quantiles.amax(3) - quantiles.amin(3)).mean(),
        "policy_entropy": entropy, "alpha": alpha, "alpha_entropy": alpha * entropy.abs(),
        "entropy_rms": alpha * c["gamma"] * (log_prob**2).mean().sqrt(), "sigma": std.mean(),
        "log_std_mean": agent.actor.log_std.mean(), "dead_units": (hidden <= 0).all(0).float().mean(),
        "clipped_rewards": (full > REWARD_CLIP).float().mean()}
    moved = {name: float((exposure - greedy).abs().mean()) for name, exposure in shuffled.items()}
    return {name: float(x) for name, x in found.items()} | {"attribution": moved}


def alarms(found: dict, samples_per_transition: float) -> dict[str, bool]:
    """What comes before a collapse. found: diagnose()'s."""
    return {
        "q_spread_over_alpha": found["q_action_spread"] < 2 * found["alpha"],
        "entropy_over_reward": found["entropy_rms"] > 1.0,
        "samples_per_transition": samples_per_transition < 2,
        "sigma": found["sigma"] > 0.9,
        "clipped_rewards": found["clipped_rewards"] > 0.05,
        "greedy_over_sampled": found["greedy_over_sampled"] < 0.1}


def overestimation(agent: Agent, contexts: Contexts, split: str = "eval", n: int = 2048) -> float:
    """Mean of (predicted - realised) discounted value along the acting policy's path, scaled reward a decision."""
    gamma, scale = agent.config["gamma"], float(agent.reward_scale)
    start, stop = contexts.rows[split]
    n = min(n, stop - start)
    latents = latents_of(agent, contexts, torch.arange(start, start + n, device=contexts.device))
    ret = contexts.market.ret[start : start + n]
    target = target_path(agent, latents, ret, 0.0, agent.config["policy"])
    after = torch.from_numpy(target).float().to(contexts.device)[:, None]
    value = afterstate_values(agent, latents, after, torch.zeros_like(after))[:, 0].cpu().numpy()
    reward = walk_nb(target, ret, ret, agent.costs)[0]
    paid = reward - bar_growth(torch.from_numpy(target), torch.from_numpy(ret), agent.costs[1]).log().numpy()
    realised, tail = np.empty(n), 0.0
    for t in range(n - 1, -1, -1):
        tail = realised[t] = scale * reward[t] + gamma * tail
    known = max(n - int(5 / (1 - gamma)), 1)  # the last ones see too little of their future
    return float((value + scale * paid - realised)[:known].mean())


def load_policy(checkpoint: str | Path, device: str = "cpu"):
    """policy(obs) -> actions (B, 1) float32 from a checkpoint file alone: the policy that evaluation reports.

    obs: the environment's own batch, NumPy: market (B, window, columns), position (B, 1), w_cost (B, 1).
    Raises CheckpointError (one line).
    """
    state = load_run(checkpoint, Path(__file__), SCHEMA, device)
    config = state["config"]
    encoder = build_encoder(config).to(device).eval().requires_grad_(False)
    encoder.load_state_dict(state["encoder"])
    agent = Agent(config).to(device).eval().requires_grad_(False)
    agent.load_state_dict(state["agent"])

    @torch.no_grad()
    def policy(obs: dict) -> np.ndarray:
        keys = ("market", "position", "w_cost")
        market, position, w_cost = (torch.as_tensor(np.asarray(obs[k], np.float32), device=device) for k in keys)
        tech, hmm = market[..., : config["columns"]], market[:, -1, config["columns"] :]
        latents = agent.extractor(encoder.context(tech), hmm)
        return act(agent, latents, position, w_cost, config["policy"])[:, None].cpu().numpy()

    return policy


# --------------------------------------------------------------------------------------- encoder: load, pre-train
def build_encoder(config: dict) -> CryptoMAE:
    return CryptoMAE(*(config[k] for k in ("columns", "window", "d_model", "recency")))


def check_dimensions(path, found: dict, expected: dict):
    """Every dimension of the encoder that disagrees with the flags stands in one error line."""
    names = {"d_model": "d_model", "n_heads": "heads", "n_layers": "layers", "columns": "input columns",
             "window": "window"}
    wrong = [f"{name} {found.get(k)} found, {expected[k]} expected" for k, name in names.items()
             if found.get(k) != expected[k]]
    if wrong:
        raise CheckpointError(f"{path} does not fit the flags and data: {'; '.join(wrong)}")


def load_encoder(path: str, config: dict, market: Market) -> dict:
    """Weights of another run's encoder.pt, with this run's recency gain; config["trained_until"] is taken over. It must
    read the same columns, and have been trained on none of the bars that this run is judged on."""
    state = load_checkpoint(path)
    if set(state) != {"config", "encoder", "columns"}:
        raise CheckpointError(f"--encoder {path}: not an encoder.pt but a file with {', '.join(sorted(state)[:6])}")
    check_dimensions(path, state["config"], config)
    there, here = state["columns"], market.features.columns
    other = [f"{a} there, {b} here" for a, b in zip(there, here) if a != b]
    until, judged = state["config"]["trained_until"], market.time(market.rows["eval"][0])
    refuse(
        (other, f"--encoder {path} was trained on other columns: {'; '.join(other[:3])}"),
        (until >= judged, f"--encoder {path} was trained on bars until {until}, this run's eval rows begin at {judged}: "
                          "give a later --split, or pre-train without --encoder"))
    config["trained_until"] = until
    own_gain = build_encoder(config).gain  # a flag of this run, not a finding of that one
    return state["encoder"] | {"gain": own_gain}


def pretrain(contexts: Contexts, args: Args, run: Run, loop: "Loop"):
    """Masked reconstruction on windows that end in train rows, then the context's statistics."""
    encoder, rows, steps = contexts.encoder, contexts.market.rows["train"], args.mae_steps
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=MAE_LEARNING_RATE, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, MAE_LEARNING_RATE, total_steps=max(steps, 1) + 1)
    until = time.monotonic() + PRETRAIN_SHARE * run.guard.remaining()
    for step in range(steps):
        if time.monotonic() > until or run.out_of_time():
            print(f"pre-training cut to {step} of {steps} steps: learning needs the rest of --timeout {args.timeout}")
            break
        x = contexts.windows(torch.randint(*rows, (MAE_BATCH,), device=contexts.device))
        mask = torch.rand(x.shape[:2], device=x.device) < MASKED
        with contexts.autocast():
            loss = encoder.loss(x, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        loop.mae_steps += 1
        if step % 25 == 0 or step == steps - 1:
            run.log({"losses/mae": loss.detach()}, loop)
    encoder.eval().requires_grad_(False)
    with torch.no_grad(), contexts.autocast():
        drawn = [contexts.windows(torch.randint(*rows, (128,), device=contexts.device)) for _ in range(8)]
        z = torch.cat([encoder.encode(x).float().flatten(0, 1) for x in drawn])
    encoder.mean.copy_(z.mean(0))
    encoder.std.copy_(z.std(0) + 1e-6)


# -------------------------------------------------------------------------------------------- set-up of a run
@dataclass
class Loop:
    """Plain counters of the loop; a resumed run gets them back."""

    global_step: int = 0  # transitions
    updates: int = 0
    evaluated: int = 0  # updates at the last evaluation
    stale: int = 0  # evaluations since the best one
    recent: list = field(default_factory=list)  # the last three evaluations of trained agents
    rows: dict = field(default_factory=dict)  # split -> rows that were encoded
    mae_steps: int = 0


def open_market(run: Run) -> Market:
    """Bars and columns, said aloud; a checkpoint keeps its own fits."""
    args = run.args
    fitted = FeatureModel.from_state_dict(run.state["features"]) if run.state else None
    seconds = FIT_SHARE * run.guard.remaining()
    market = load_market(
        args.data, args.split, args.window, args.fill_limit, args.seed, args.hmm, fitted, seconds)
    spans = "; ".join(f"{k} {b - a} bars from {market.time(a)}" for k, (a, b) in market.rows.items())
    print(f"{args.data}: {len(market.ret)} bars, {market.n_tech} technical + {HMM_COLUMNS} HMM columns; {spans}")
    print_facts(market.bars)
    if market.bars.truth and args.funding_bps:
        print("--funding-bps: the optimum does not know funding, so there is none, and no score")
    return market


def market_name(data: str) -> str:
    if data.startswith("synthetic"):
        return data.split("?")[0].replace(":", "-")
    return "+".join(Path(p).stem for p in data.split(","))


def agent_config(run: Run, market: Market) -> dict:
    """Plain values that rebuild encoder and agent from a checkpoint alone."""
    args = run.args
    same = ("window", "d_model", "recency", "film", "fusion_width", "hidden", "dropout", "n_critics", "n_quantiles",
            "log_std_init", "reward_scaling", "gamma")
    network = {k: getattr(args, k) for k in same} | {
        "columns": market.n_tech, "n_heads": HEADS, "n_layers": LAYERS, "alpha": parse_ent_coef(args.ent_coef)[1],
        "trained_until": market.features.train_dates[1]}
    costs = {
        "cost": (args.fee_bps + args.slippage_bps) * BP, "funding": args.funding_bps * BP,
        "drift": args.position_mode == "drift", "penalty": args.turnover_penalty_bps * BP, "policy": args.policy}
    if run.state:
        check_dimensions(run.source, run.state["config"], network)
        network = run.state["config"]  # evaluated as it is, at the costs and by the policy that are asked for
    return network | costs


def open_contexts(run: Run, market: Market, config: dict) -> Contexts:
    """The market on the device, its embedding in the precision that the hardware has, kept if it fits into memory."""
    import psutil

    args, device = run.args, run.device
    bf16 = args.precision == "bf16" or (args.precision == "auto" and has_bf16(device))
    dtype = torch.bfloat16 if bf16 else torch.float32
    need = len(market.table) * args.window * args.d_model * dtype.itemsize
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    keep = need < 0.5 * free
    sizes = f"{need / 2**20:.0f} MiB in {'bf16' if bf16 else 'fp32'}, {free / 2**20:.0f} MiB free"
    print(f"embedding cache {'on' if keep else 'off'}: {sizes}")
    return Contexts(build_encoder(config).to(device), market, device, dtype, keep)


def has_bf16(device: torch.device) -> bool:
    """bf16 matrix instructions; without them bf16 is emulated and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, and young: absent means float32
    return any(getattr(torch.cpu, name, bool)() for name in probes)


def freeze_contexts(contexts: Contexts, borrowed: dict | None, config: dict, run: Run, loop: Loop):
    """Encoder from the checkpoint, from --encoder or pre-trained, then frozen; every row's context computed once."""
    encoder, market, args = contexts.encoder, contexts.market, run.args
    run.phase("pretrain")
    if run.state:
        encoder.load_state_dict(run.state["encoder"])
    elif borrowed:
        encoder.load_state_dict(borrowed)
    else:
        pretrain(contexts, args, run, loop)
    encoder.eval().requires_grad_(False)
    state = {k: v.cpu() for k, v in encoder.state_dict().items()}
    save_atomic({"config": config, "encoder": state, "columns": list(market.features.columns)},
                run.dir / "encoder.pt")

    run.phase("cache")
    splits, seconds = market.rows, CACHE_SHARE * run.guard.remaining()
    if run.resumed:  # replay and lanes stand on the rows of the first start
        splits, seconds = run.state["loop"]["rows"], math.inf
    contexts.rows = loop.rows = contexts.fill(splits, seconds, run.out_of_time)
    for split, (first, stop) in loop.rows.items():
        whole = np.ptp(market.rows[split])
        if stop - first < whole:
            print(f"embedding cache: the last {stop - first} of {whole} {split} bars, to leave time for learning")


def make_optimizers(agent: Agent, args: Args) -> tuple:
    """Of extractor and critic, actor, and log alpha."""
    film, market = agent.extractor.film, agent.extractor.market
    groups = [
        {"params": [market.weight], "lr": args.learning_rate_fusion, "weight_decay": args.weight_decay},
        {"params": list(film.parameters()) if film else [], "lr": args.learning_rate_film},
        {"params": [market.bias, *agent.critic.parameters()], "lr": args.learning_rate}]
    q_optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    actor_optimizer = torch.optim.AdamW(agent.actor.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    for group in q_optimizer.param_groups + actor_optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return q_optimizer, actor_optimizer, torch.optim.Adam([agent.log_alpha], lr=args.ent_coef_lr)


def compile_parts(agent: Agent, args: Args):
    """Networks in place; returns the critic's loss."""
    if not args.compile:
        return quantile_huber_loss
    how = {"mode": "reduce-overhead" if args.cudagraphs else None, "dynamic": False}
    for part in (agent.extractor, agent.critic, agent.target, agent.actor):
        part.compile(**how)
    return torch.compile(quantile_huber_loss, **how)


def last_step(args: Args) -> float:
    """Transitions at which training ends; time given is time used."""
    if args.eval_only:
        return 0
    if args.total_timesteps is not None:
        return args.total_timesteps
    return math.inf if args.timeout else SCHEDULE


def judge(agent: Agent, contexts: Contexts, run: Run, loop: Loop):
    """Evaluate on the eval split, log, keep the best agent, and count evaluations without a better one."""
    args, market = run.args, contexts.market
    result, _ = evaluate(agent, contexts, "eval", args, run.eval_limit(), (agent.config["policy"],))
    found, metrics = diagnose(agent, contexts), result["agent"]
    samples = loop.updates * args.batch_size / max(loop.global_step, 1)
    alarm = alarms(found, samples)
    policy = ("log_std_mean", "alpha", "action_mean", "sigma", "state_dependence", "saturation", "greedy_gap", "dead_units")
    value = ("q_mean", "q_action_spread", "quantile_spread", "alpha_entropy")
    record = {f"eval/eval/{k}": v for k, v in metrics.items()} | {f"policy/{k}": found[k] for k in policy}
    record |= {f"value/{k}": found[k] for k in value} | {f"alarm/{k}": v for k, v in alarm.items()}
    record |= {f"policy/attribution_{k}": v for k, v in found["attribution"].items()}
    record |= {"policy/entropy": found["policy_entropy"], "env/clipped_rewards": found["clipped_rewards"]}
    run.log(record, loop)

    score = metrics[selected_by(market)]
    if loop.updates:
        loop.recent = [*loop.recent, score][-3:]
        if not market.bars.truth:  # one realised mean is noise
            score = float(np.mean(loop.recent))
        whole = result["rows"] == contexts.rows["eval"]
        loop.stale = 0 if whole and run.keep_best(score, loop) else loop.stale + 1
        loop.evaluated = loop.updates
    raised = [name for name, on in alarm.items() if on and loop.updates]
    share = f"score {metrics['score']:+.3f}  " if metrics.get("score") is not None else ""
    print(f"{run.guard.elapsed():6.0f} s  {loop.global_step:>9} transitions  {loop.updates:>6} updates  eval {share}"
          f"{score:+.2f} bp  turnover {metrics['turnover']:.3f}  state_dependence {found['state_dependence']:.2f}"
          + f"  WARNING {', '.join(raised)}" * bool(raised), flush=True)


def selected_by(market: Market) -> str:
    return "mean_expected_bps" if market.bars.truth else "mean_reward_bps"


def look_first(averaged: Agent, contexts: Contexts, run: Run, loop: Loop):
    """An evaluation before the loop, also so that it is known how long one takes."""
    run.phase("eval")
    if run.resumed:
        evaluate(averaged, contexts, "eval", run.args, run.eval_limit(), (averaged.config["policy"],))
    elif not run.args.eval_only:
        judge(averaged, contexts, run, loop)


def look_last(averaged: Agent, contexts: Contexts, run: Run, loop: Loop):
    """Say why training ended and, unless a signal ended it, evaluate what it ended with: that may be the best."""
    if run.args.eval_only:
        return
    why = "all of them"
    if run.guard.signal is not None:
        why = "interrupted"
    elif run.guard.expired:
        why = "the time is over"
    elif run.args.patience and loop.stale >= run.args.patience:
        why = f"no better agent in {loop.stale} evaluations (--patience)"
    print(f"training ends at {loop.global_step} transitions: {why}")
    if run.guard.signal is None and loop.updates > loop.evaluated:
        run.phase("eval")
        judge(averaged, contexts, run, loop)


def evaluate_splits(agent: Agent, contexts: Contexts, run: Run) -> dict:
    """The agent beside the baselines on every split, and traces/{split}.parquet."""
    args, market, results = run.args, contexts.market, {}
    constant = best_constant(series_of(market, agent.costs), LEVELS)
    (run.dir / "traces").mkdir(exist_ok=True)
    for split in ("test", "eval", "train"):  # what counts comes first, while there is time
        result, columns = evaluate(agent, contexts, split, args, run.eval_limit(0.3))
        add_baselines(result, columns, market, agent.costs, constant, args.seed)
        if result["partial"]:
            print(f"{split}: evaluated on {np.ptp(result['rows'])} of {np.ptp(market.rows[split])} bars only (time)")
        pd.DataFrame(columns).to_parquet(run.dir / "traces" / f"{split}.parquet")
        results[split] = result
    return {split: results[split] for split in SPLITS}


def audit_of(agent: Agent, contexts: Contexts, run: Run, loop: Loop, results: dict) -> dict:
    """diagnose(), overestimation, the ridge policy's edge and the verdict; logs what the loop did not."""
    audit = diagnose(agent, contexts) | {"overestimation": overestimation(agent, contexts)}
    edge, error = ridge_edge([series_of(contexts.market, agent.costs)], LEVELS)
    audit |= {"ridge_edge_bps": edge, "ridge_edge_se_bps": error}
    audit["verdict"], audit["reasons"] = verdict(audit, results["eval"]["agent"], loop.updates)
    record = {"value/overestimation": audit["overestimation"]}
    for split in ("train", "test"):
        record |= {f"eval/{split}/{k}": v for k, v in results[split]["agent"].items()}
    run.log(record, loop)
    return audit


# ------------------------------------------------------------------------------------------------------- main
@experiment
def main(argv: list[str] | None = None) -> dict:
    """Train (or --eval-only), evaluate, report; returns what summary.json holds."""
    run, loop = Run(Args, argv, SCHEMA, evaluations=8), Loop()
    args, device = run.args, run.device
    refuse((args.cudagraphs and device.type != "cuda", "--cudagraphs: no CUDA device"))
    market = open_market(run)
    config = agent_config(run, market)
    borrowed = load_encoder(args.encoder, config, market) if args.encoder and not run.state else None
    run.open(market_name(args.data), market.describe())
    contexts = open_contexts(run, market, config)
    freeze_contexts(contexts, borrowed, config, run, loop)

    run.phase("setup")
    agent, averaged = Agent(config).to(device), Agent(config).to(device).eval().requires_grad_(False)
    averaged.load_state_dict(agent.state_dict())
    q_optimizer, actor_optimizer, alpha_optimizer = make_optimizers(agent, args)
    q_parameters = [p for group in q_optimizer.param_groups for p in group["params"]]
    rb, noise = Replay(BUFFER, args.num_envs, device), Noise(args.num_envs, args.hidden, args.sde_sample_freq, device)
    envs = run.closing(MarketVectorEnv(
        market, contexts.rows["train"], args.num_envs, args.episode_length, args.fee_bps, args.slippage_bps,
        args.funding_bps, args.position_mode, args.turnover_penalty_bps, args.seed, run.backend))
    envs.w_max = float(not args.w_cost_curriculum)
    envs.reset(seed=args.seed)
    loop = run.restore(
        loop, config, policy=dict(encoder=contexts.encoder, agent=averaged, features=market.features), learner=agent,
        q_optimizer=q_optimizer, actor_optimizer=actor_optimizer, alpha_optimizer=alpha_optimizer, envs=envs, rb=rb,
        noise=noise)
    critic_loss = compile_parts(agent, args)
    next_quantiles_of = greedy_next if args.policy == "critic_grid" else sampled_next
    learned, _ = parse_ent_coef(args.ent_coef)
    limit, patience = last_step(args), args.patience or math.inf
    look_first(averaged, contexts, run, loop)

    while loop.global_step < limit and loop.stale < patience and not run.out_of_time():
        # ALGO LOGIC: action
        run.phase("rollout")
        row, position, w_cost = envs.ints[ROW].clone(), envs.floats[POSITION].clone(), envs.floats[W_COST].clone()
        if args.w_cost_curriculum:
            envs.w_max = min(1.0, loop.global_step / args.w_cost_curriculum)
        if loop.global_step < args.learning_starts:
            action = 2 * torch.rand(args.num_envs, device=device) - 1
        else:
            action = explore(agent, contexts, row, position, w_cost, noise)
        envs.step_lanes(action)
        rb.add(row, position, action, w_cost)
        agent.watch_rewards(contexts.full_reward[row])
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
                    group["lr"] = group["base_lr"] * share
                if args.cudagraphs:
                    torch.compiler.cudagraph_mark_step_begin()
                batch = rb.sample(args.batch_size, args.segment, args.counterfactuals, envs.stop)
                ret = contexts.ret[batch.rows[:, :-1].flatten()][:, None]  # (B, 1)

                # critic: quantiles of holding each exposure; the cost of getting there is exact
                with contexts.autocast():
                    latents, next_latents = encode_stretches(agent.extractor, contexts, batch.rows)
                    with torch.no_grad():
                        growth = bar_growth(batch.after, ret, config["funding"])  # (B, K)
                        reward = (scale * growth.log()).clamp(-REWARD_CLIP, REWARD_CLIP)
                        done = (growth <= LOST).float()
                        held = next_position(batch.after, ret, agent.costs)
                        next_quantiles, next_log_prob = next_quantiles_of(
                            agent, next_latents, held, batch.w_cost, scale)
                        target = tqc_target(
                            next_quantiles, reward.flatten(), done.flatten(), args.gamma, agent.alpha, next_log_prob,
                            args.top_quantiles_to_drop_per_net)
                    quantiles = agent.critic(latents, batch.after, batch.w_cost)  # (B, K, C, N)
                    qf_loss = critic_loss(quantiles.flatten(0, 1), target)
                q_optimizer.zero_grad()
                qf_loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(q_parameters, MAX_GRAD_NORM)
                q_optimizer.step()

                # actor: it collects transitions, and is scored beside the greedy policy
                agent.critic.requires_grad_(False)
                with contexts.autocast():
                    latents = latents.detach()
                    pi, log_prob, _ = sample_action(agent.actor, latents, batch.position, batch.w_cost)
                    paid = trade_reward(batch.position, pi[:, None], agent.costs, config["penalty"] * batch.w_cost)
                    q = agent.critic(latents, pi[:, None], batch.w_cost).mean((1, 2, 3)) + scale * paid[:, 0]
                    actor_loss = (agent.alpha * log_prob - q).mean()
                actor_optimizer.zero_grad()
                actor_loss.backward()
                actor_optimizer.step()
                agent.critic.requires_grad_(True)

                # entropy coefficient
                if learned:
                    alpha_loss = -(agent.log_alpha * (log_prob + args.target_entropy).detach()).mean()
                    alpha_optimizer.zero_grad()
                    alpha_loss.backward()
                    alpha_optimizer.step()
                    agent.log_alpha.data.clamp_(min=math.log(max(args.ent_coef_min, 1e-30)))
                move(agent.target, agent.critic, args.tau)
            # share of the newest weights in an average that began with the first update, without the random start
            newest = (1 - args.average**args.updates_per_step) / (1 - args.average**loop.updates)
            move(averaged, agent, newest)
            averaged.reward_stats.copy_(agent.reward_stats)

        # evaluate, log, keep the best
        if loop.updates and run.every(args.eval_interval, loop.global_step):
            change = (action - position).abs()
            losses = {"losses/qf_loss": qf_loss.detach(), "losses/actor_loss": actor_loss.detach(), "losses/grad_norm": grad_norm}
            if not qf_loss.isfinite():
                raise CheckFailed(f"the critic is not finite after {loop.updates} updates: lower --learning-rate or "
                                  "--learning-rate-fusion")
            run.log(losses | {
                "losses/target_mean": target.mean(), "env/reward_std": reward.std(), "env/turnover": change.mean(),
                "env/exposure": action.mean(), "env/costs": change.mean() * config["cost"] / BP,
                "charts/learning_rate": args.learning_rate * share,
            } | envs.charts() | run.charts(loop, loop.updates * args.batch_size), loop)
            run.phase("eval")
            judge(averaged, contexts, run, loop)
        run.checkpoint(loop)

    look_last(averaged, contexts, run, loop)
    run.use_best(loop)
    run.phase("eval")
    results = evaluate_splits(averaged, contexts, run)
    audit = audit_of(averaged, contexts, run, loop, results)
    cache = 0 if contexts.cache is None else contexts.cache.nbytes
    return run.finish(
        loop, results, audit, TABLE, selected_by=selected_by(market), mae_steps=loop.mae_steps,
        samples_per_transition=loop.updates * args.batch_size / max(loop.global_step, 1),
        device={"precision": str(contexts.dtype).removeprefix("torch."), "embedding_cache_bytes": cache},
        data={"gaps": list(market.bars.gaps), "facts": list(market.bars.facts)})


if __name__ == "__main__":
    exit_with(main)
