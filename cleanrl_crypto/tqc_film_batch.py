r"""Trades one market with TQC (truncated quantile critics) over a frozen transformer encoder and an HMM context.

On a laptop: embedded market, about 3 minutes on 2 cores, test score .7 to .85 of the optimum:

    python cleanrl_crypto/tqc_film_batch.py --ent-coef auto_0.5 --timeout 300

Real bars (scripts/download_data.py gets them); of several files the first is traded, the others are seen:

    python cleanrl_crypto/tqc_film_batch.py --data data/BTCUSDT_1h.parquet --timeout 1800
    python cleanrl_crypto/tqc_film_batch.py --data data/BTCUSDT_1h.parquet,data/ETHUSDT_1h.parquet \
        --split 2023-01-01/2024-01-01

GPU, Kaggle: a GPU is used where a probe shows that it works, for the environment too.

    python cleanrl_crypto/tqc_film_batch.py --data /kaggle/input/bars/BTCUSDT_1h.parquet \
        --run-dir /kaggle/working/run --compile --cudagraphs --timeout 28800

Resume after whatever ended the run (the same command starts and continues it), or evaluate a checkpoint:

    python cleanrl_crypto/tqc_film_batch.py --run-dir runs/btc --data data/BTCUSDT_1h.parquet --resume auto
    python cleanrl_crypto/tqc_film_batch.py --data data/BTCUSDT_1h.parquet --eval-only \
        --checkpoint runs/btc/checkpoints/best.pt

Use the agent in another program, from its checkpoint alone:

    from cleanrl_crypto.tqc_film_batch import load_policy
    policy = load_policy("runs/btc/checkpoints/best.pt")
    action = policy(obs)  # market (B, 64, columns), position (B, 1), w_cost (B, 1) -> target exposure (B, 1)

The ancestor's settings. Its critic stays the afterstate one, and w_cost is constant within an episode:

    python cleanrl_crypto/tqc_film_batch.py --policy actor --counterfactuals 0 --segment 1 --batch-size 512 \
        --updates-per-step 1 --no-reward-scaling --ent-coef auto_0.5 --ent-coef-lr 3e-4 --ent-coef-min 0.01 \
        --target-entropy 0 --log-std-init 0 --top-quantiles-to-drop-per-net 2 --learning-rate 3e-4 \
        --learning-rate-fusion 3e-4 --learning-rate-film 3e-4 --average 0 --tau 0.005 --dropout 0 --weight-decay 0 \
        --recency 1e9 --episode-length 2048 --total-timesteps 25000000

Under the default --policy critic_grid, --ent-coef shapes only the actor that collects transitions: the targets of the
greedy policy that ships do not contain it.

Every flag: --help. Every metric, and what to do when it is off: docs/tqc_film_batch.md
"""
import json
import math
import os
import random
import shlex
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gymnasium as gym
import numba as nb
import numpy as np
import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F
from gymnasium.vector import AutoresetMode
from numba import cuda
from torch.utils.tensorboard import SummaryWriter

try:
    from common import markets
    from common.cli import UsageError, check, flag, parse_args
    from common.data import Bars, DataError, load_bars, split_rows
    from common.features import FeatureModel, fit_features
    from common.gpu_pool import pool, probe_cuda
    from common.scoring import BP, Series, best_constant, path_metrics, random_path, ridge_edge, verdict
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

SPLITS = ("train", "eval", "test")
RUIN = 1e-6  # floor of a bar's growth and of what a fee leaves
LOST = 3e-6  # growth at which the episode terminates: above RUIN, a fee may hit the floor in a rising bar
HMM_COLUMNS = 5  # 4 filtered state posteriors and their entropy
LEVELS = np.linspace(-1, 1, 21)  # exposures among which the best constant is found
HORIZON = 1  # bars between a decision and the end of its reward
SCHEMA = 1  # of the checkpoint


# ------------------------------------------------------------------------------------------------- arguments
@dataclass
class Args:
    # experiment
    exp_name: str = Path(__file__).stem
    """name of this experiment"""
    seed: int = 1
    """seed of everything but the synthetic market, whose seed stands in --data"""
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
    """evaluate --checkpoint on --data and stop"""
    checkpoint: str | None = None
    """checkpoint for --eval-only"""

    # data
    data: str = "synthetic:regime"
    """synthetic:{regime,signal,noise,drift}[?bars=N&seed=K&...] or files of bars, comma-separated, the first traded"""
    split: str = "0.70/0.15/0.15"
    """train/eval/test as fractions of the rows, or the first days of eval and test: 2023-01-01/2024-01-01"""
    fill_limit: int = 24
    """**bars** for which another asset's last bar may stand in for a missing one"""
    window: int = 64
    """**bars** in an observation"""
    hmm: bool = True
    """give the agent the five HMM columns (--no-hmm: zeros, so that FiLM stays the identity)"""
    film: bool = True
    """let the HMM columns modulate the encoding through FiLM (--no-film: append them to the fusion layer's input)"""

    # environment
    num_envs: int = 1024
    """lanes"""
    episode_length: int = 128
    """**bars** after which an episode is truncated"""
    fee_bps: float = 4.0
    """**bp** of equity per unit of |change of exposure|, to the exchange"""
    slippage_bps: float = 1.0
    """**bp** of equity per unit of |change of exposure|, to the market"""
    funding_bps: float = 0.0
    """**bp** a bar that a full short position pays"""
    position_mode: str = "rebalance"
    """rebalance: exposure stays at the target between decisions; drift: it moves with the price"""
    turnover_penalty_bps: float = 5.0
    """**bp** per unit of |change| that the reward loses beyond the costs at w_cost = 1"""
    w_cost_curriculum: int = 0
    """**transitions** over which the largest w_cost grows from 0 to 1"""
    eval_w_cost: float = 0.0
    """w_cost shown to the agent in evaluations, in [0, 1]"""
    cost_randomization: float = 0.0
    """each training episode's costs are multiplied by a draw from [1 - x, 1 + x], x in [0, 1]"""

    # encoder
    encoder: str | None = None
    """encoder.pt of another run, in place of pre-training"""
    d_model: int = 256
    """channels of the encoder"""
    n_heads: int = 4
    """attention heads"""
    n_layers: int = 2
    """transformer layers"""
    d_ff: int = 1024
    """hidden units of the feed-forward blocks"""
    mae_steps: int = 150
    """masked pre-training steps on train rows (fewer when --timeout is short; it says so)"""
    mae_batch_size: int = 64
    """windows a pre-training step"""
    mae_mask: float = 0.3
    """share of a window's bars that is masked"""
    mae_learning_rate: float = 3e-3
    """AdamW, one-cycle"""

    # algorithm
    total_timesteps: int = 65_536
    """environment transitions (the sum over lanes)"""
    learning_starts: int = 2_048
    """transitions with uniform random actions before the first update"""
    buffer_size: int = 2_000_000
    """transitions kept (row indices and lane scalars: 25 bytes each)"""
    batch_size: int = 256
    """rows drawn for an update"""
    segment: int = 8
    """consecutive bars of a lane drawn together: they share the market forward of row and next row"""
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
    """who acts: critic_grid (greedy on a grid of positions; its targets are the grid's maximum) or actor (gSDE)"""
    action_grid: int = 21
    """positions on the grid of critic_grid, an odd number"""
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
    learning_rate_end: float = 0.02
    """share of the learning rates that is left at --total-timesteps (cosine)"""
    warmup_updates: int = 20
    """updates over which the learning rates grow from 0"""
    weight_decay: float = 1e-2
    """AdamW, on the fusion layer's market columns"""
    dropout: float = 0.1
    """of embedding channels, while training"""
    recency: float = 1.5
    """**bars** in which the fixed gain on the embedding decays by e, going back from the last bar"""
    max_grad_norm: float = 10.0
    """gradient clipping"""
    reward_scaling: bool = True
    """divide rewards by the running standard deviation of the full position's reward (saved with the agent)"""
    reward_clip: float = 10.0
    """scaled rewards are clipped here; the share is logged"""
    sde_sample_freq: int = 64
    """vector steps for which a lane keeps its gSDE noise matrix"""
    log_std_init: float = -3.0
    """of the gSDE weights"""
    ent_coef: str = "auto_0.5"
    """entropy coefficient: a number, `auto`, or `auto_0.5` = learned from 0.5 on (Stable-Baselines3's meaning)"""
    ent_coef_lr: float = 3e-2
    """learning rate of log alpha: at 3e-4 the initial 0.5 is still .37 after 1000 updates"""
    ent_coef_min: float = 0.0
    """floor of the entropy coefficient"""
    target_entropy: float = -1.0
    """of the squashed Gaussian (its maximum is .684)"""

    # evaluation and runtime
    eval_interval: int = 4_096
    """transitions between evaluations on the eval split"""
    patience: int = 8
    """evaluations without a better one after which training stops (0: never)"""
    select: str = "auto"
    """what best.pt is chosen by on the eval split: expected (synthetic markets know it), realised, or auto"""
    timeout: float | None = None
    """**seconds** since this process started after which it has exited, None = no limit"""
    eval_timeout: float | None = None
    """**seconds** for one evaluation: it stops at the rows it has reached and says so"""
    backend: str = "auto"
    """environment kernels: auto, cpu or cuda"""
    torch_threads: int | None = None
    """torch and numba threads (None: all cores)"""
    precision: str = "auto"
    """auto (bf16 where the hardware has it), bf16 or fp32"""
    embedding_cache: str = "auto"
    """auto: encode every row once and keep it, if it fits; off: encode every batch anew"""
    compile: bool = False
    """torch.compile the losses"""
    cudagraphs: bool = False
    """with --compile on a GPU: capture the losses in CUDA graphs"""
    report: bool = True
    """write report.html at the end"""

    def __post_init__(self):
        check(self, CHOICES, RANGES)
        _, alpha = parse_ent_coef(self.ent_coef)
        drop, n, batch, width = self.top_quantiles_to_drop_per_net, self.n_quantiles, self.batch_size, self.d_model
        for wrong, why in (
            (batch % self.segment, f"--batch-size {batch} must be a multiple of --segment {self.segment}"),
            (self.action_grid % 2 == 0, f"--action-grid {self.action_grid}: must be odd, so that flat is on the grid"),
            (width % self.n_heads, f"--d-model {width} must be a multiple of --n-heads {self.n_heads}"),
            (drop >= n, f"--top-quantiles-to-drop-per-net {drop} leaves none of --n-quantiles {n}"),
            (self.eval_only != (self.checkpoint is not None), "--eval-only and --checkpoint PATH go together"),
            (self.cudagraphs and not self.compile, "--cudagraphs needs --compile"),
            (self.resume == "auto" and self.run_dir is None,
             "--resume auto needs --run-dir, the folder of the run to continue"),
            (self.ent_coef_min > alpha, f"--ent-coef-min {self.ent_coef_min} is above the initial coefficient {alpha}"),
        ):
            if wrong:
                raise ValueError(why)


CHOICES = {
    "wandb_mode": ("online", "offline", "disabled"), "position_mode": ("rebalance", "drift"),
    "policy": ("critic_grid", "actor"), "select": ("auto", "expected", "realised"),
    "backend": ("auto", "cpu", "cuda"), "precision": ("auto", "bf16", "fp32"), "embedding_cache": ("auto", "off"),
}
RANGES = {name: (low, high) for low, high, names in (  # of numeric flags, both ends allowed
    (0, 1, "eval_w_cost cost_randomization learning_rate learning_rate_fusion learning_rate_film learning_rate_end"),
    (0, 2**32 - 1, "seed"), (0, 0.9999, "gamma"), (0, 0.99999, "average"), (0, 0.99, "dropout"),
    (0.01, 0.99, "mae_mask"), (1e-6, 1, "tau"),
    (1e-9, 1, "mae_learning_rate"), (1e-3, 1e9, "recency"), (1e-6, 1e9, "reward_clip max_grad_norm"),
    (0, 10, "ent_coef_lr weight_decay"), (-20, 5, "log_std_init"), (-100, 0.68, "target_entropy"),
    (0, 255, "counterfactuals"), (0, 1023, "top_quantiles_to_drop_per_net"), (0, 1024, "updates_per_step"),
    (0, 1000, "fee_bps slippage_bps funding_bps turnover_penalty_bps"), (0, 10**7, "mae_steps"),
    (0, 10**6, "keep_checkpoints fill_limit patience ent_coef_min"), (0, 1e9, "checkpoint_interval warmup_updates"),
    (0, 10**12, "total_timesteps learning_starts w_cost_curriculum"), (1, 64, "n_layers n_critics"),
    (1, 1024, "n_quantiles"), (1, 4096, "torch_threads"), (2, 4096, "window"), (3, 1001, "action_grid"),
    (1, 2**16, "d_model n_heads d_ff fusion_width hidden"), (1, 2**20, "num_envs mae_batch_size batch_size segment"),
    (1, 2**31, "episode_length sde_sample_freq"), (1, 10**10, "buffer_size"), (1, 10**12, "eval_interval"),
    (1, 1e9, "timeout"), (0.1, 1e9, "eval_timeout"),
) for name in names.split()}
# flags that shape the agent or the data: a resumed run must agree on them
SHAPING = (
    "seed", "data", "split", "fill_limit", "window", "hmm", "film", "num_envs", "episode_length", "fee_bps",
    "slippage_bps", "funding_bps", "position_mode", "turnover_penalty_bps", "cost_randomization", "d_model", "n_heads",
    "n_layers", "d_ff", "policy", "action_grid", "n_critics", "n_quantiles", "top_quantiles_to_drop_per_net",
    "fusion_width", "hidden", "recency", "reward_scaling", "reward_clip", "gamma", "buffer_size",
)


def parse_ent_coef(text: str) -> tuple[bool, float]:
    """`auto`, `auto_0.5` or a number -> (is it learned, initial value), as Stable-Baselines3 reads it."""
    learned = text == "auto" or text.startswith("auto_")
    try:
        value = 1.0 if text == "auto" else float(text.removeprefix("auto_"))
    except ValueError:
        value = -1.0
    if not (0 < value < math.inf or (value == 0 and not learned)):
        raise ValueError(f"--ent-coef {text}: must be a number >= 0, auto, or auto_VALUE with VALUE > 0")
    return learned, value


# --------------------------------------------------------------------------------------------------- kernels
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
def trade_nb(position, target, ret, cost, funding, drift):
    """One decision and the bar it earns: ONE lane, all scalars, float64.

    position, target: exposure before and after the trade, share of equity; ret: simple return of the next bar; cost:
    fraction of equity per unit of |change|; funding: fraction a bar that a full short pays.
    Rebalanced: equity *= (1 - cost |d|) (1 + target ret - funding max(-target, 0)), d = target - position. Drifting: a
    fee on what is really traded to hold `target` of what is left, cost |d| / (1 + cost target sign(d)).
    Returns (growth of equity, fee as a share of equity, exposure at the next decision).
    """
    change = target - position
    fee = cost * abs(change)
    if drift:
        fee /= 1.0 + cost * target * (1.0 if change > 0.0 else -1.0)
    growth = 1.0 + target * ret - (funding * -target if target < 0.0 else 0.0)
    growth = growth if growth > RUIN else RUIN  # Numba's CUDA target does not know max()
    left = 1.0 - fee if 1.0 - fee > RUIN else RUIN
    after = target * (1.0 + ret) / growth if drift else target
    return left * growth, fee, after


@nb.njit(cache=True)
def episode_nb(seed, lane, episode, start, stop, w_max, cost, cost_randomization):
    """First row, w_cost (20 % at 0, 20 % at w_max, else uniform) and cost of a lane's episode, constant within it."""
    row = start + np.int64(uniform_nb(seed, lane, episode, 0) * (stop - start))
    u = uniform_nb(seed, lane, episode, 1)
    w = w_max * (0.0 if u < 0.2 else 1.0 if u > 0.8 else (u - 0.2) / 0.6)
    spread = cost_randomization * (2.0 * uniform_nb(seed, lane, episode, 2) - 1.0)
    return row, w, cost * (1.0 + spread)


def lane_py(i, action, ret, start, stop, length, rules, seed, ints, floats, reward, flags, final_ints, final_floats):
    """Step lane i in place; compiled for the CPU and, unchanged, as a CUDA device function.

    rules: (6,) cost, funding, drift, penalty, w_max, cost_randomization. ints (3, N): row, clock, episode.
    floats (6, N): position, w_cost, cost, equity, episode's reward, episode's turnover. flags (2, N): terminated,
    truncated. final_*: the lane's state before the reset, whenever a flag is set.
    """
    row, position = ints[0, i], floats[0, i]
    target = -1.0 if action[i] < -1.0 else 1.0 if action[i] > 1.0 else action[i]
    factor, fee, after = trade_nb(position, target, ret[row], floats[2, i], rules[1], rules[2] != 0.0)
    change = abs(target - position)
    reward[i] = math.log(factor) - floats[1, i] * rules[3] * change
    ints[0, i] = row + 1
    ints[1, i] += 1
    floats[0, i] = after
    floats[3, i] *= factor
    floats[4, i] += reward[i]
    floats[5, i] += change
    flags[0, i] = factor <= LOST
    flags[1, i] = not flags[0, i] and (ints[1, i] >= length or row + 1 >= stop)
    if flags[0, i] or flags[1, i]:
        for k in range(3):
            final_ints[k, i] = ints[k, i]
        for k in range(6):
            final_floats[k, i] = floats[k, i]
            floats[k, i] = 0.0
        ints[1, i] = 0
        ints[2, i] += 1
        ints[0, i], floats[1, i], floats[2, i] = episode_nb(
            seed, i, ints[2, i], start, stop, rules[4], rules[0], rules[5])
        floats[3, i] = 1.0


lane_nb = nb.njit(lane_py)


@nb.njit(parallel=True, cache=True)
def step_cpu(action, ret, start, stop, length, rules, seed, ints, floats, reward, flags, final_ints, final_floats):
    """Step all lanes: the arguments of lane_py without the lane."""
    for i in nb.prange(action.size):
        lane_nb(
            i, action, ret, start, stop, length, rules, seed, ints, floats, reward, flags, final_ints, final_floats)


def cuda_step():
    """The same lane on the GPU: a kernel with step_cpu's arguments, one thread a lane."""
    lane = cuda.jit(device=True)(lane_py)

    @cuda.jit
    def step_cuda(
            action, ret, start, stop, length, rules, seed, ints, floats, reward, flags, final_ints, final_floats):
        i = cuda.grid(1)
        if i < action.size:
            lane(
                i, action, ret, start, stop, length, rules, seed, ints, floats, reward, flags, final_ints, final_floats)

    return step_cuda


@nb.njit(cache=True)
def walk_nb(target, ret, expected, cost, funding, drift):
    """Trade the exposures `target` (n,) along returns `ret` (n,), flat before the first.

    Returns (reward, expected reward, |change|, held) (n,): log growth net of fees; target * expected - funding - fee,
    the known conditional mean of the simple return in place of the realised one; and the exposures held.
    """
    n = target.size
    reward, mean, change = np.empty(n), np.empty(n), np.empty(n)
    position = 0.0
    for t in range(n):
        change[t] = abs(target[t] - position)
        factor, fee, position = trade_nb(position, target[t], ret[t], cost, funding, drift)
        reward[t] = math.log(factor)
        mean[t] = target[t] * expected[t] - funding * max(-target[t], 0.0) - fee
    return reward, mean, change, target.copy()


@nb.njit(cache=True)
def greedy_walk_nb(value, grid, scale, penalty, ret, cost, funding, drift):
    """Greedy exposures (n,) of an afterstate critic: value (n, A) of holding grid[j], before the cost of getting there.

    argmax_j value[t, j] + scale (log(1 - fee) - penalty |grid[j] - position|); a tie keeps the nearest position.
    """
    n, m = value.shape
    target = np.empty(n)
    position = 0.0
    for t in range(n):
        best, best_q, best_change = 0, -np.inf, 0.0
        for j in range(m):
            _, fee, _ = trade_nb(position, grid[j], 0.0, cost, 0.0, drift)
            change = abs(grid[j] - position)
            q = value[t, j] + scale * (math.log(max(1.0 - fee, RUIN)) - penalty * change)
            if q > best_q or (q == best_q and change < best_change):
                best, best_q, best_change = j, q, change
        target[t] = grid[best]
        _, _, position = trade_nb(position, grid[best], ret[t], cost, funding, drift)
    return target


# ------------------------------------------------------------------------------------------------ environment
@dataclass
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


def load_market(data: str, split: str = "0.70/0.15/0.15", window: int = 64, fill_limit: int = 24, seed: int = 1,
                hmm: bool = True, features: FeatureModel | None = None) -> Market:
    """Bars -> splits -> columns, fitted on train rows unless `features` are given. Raises DataError (one line)."""
    bars = load_bars(data, fill_limit)
    purge = window + HORIZON
    train_stop = split_rows(bars.timestamp, split, purge)["train"][1]
    try:
        features = features or fit_features(bars, train_stop, seed)
        table = features.transform(bars)
    except ValueError as e:
        raise DataError(f"{data}: {e}") from e
    rows = split_rows(bars.timestamp, split, purge, first=features.warmup + window - 1)
    if not hmm:
        table[:, -HMM_COLUMNS:] = 0.0
    ret = np.nan_to_num(bars.next_return)  # the last row has no next bar and is never a decision row
    expected = bars.truth.expected if bars.truth else np.full(len(ret), np.nan)
    return Market(bars, features, table, ret, expected, rows, window)


class MarketVectorEnv(gym.vector.VectorEnv):
    """Lanes that trade one market. Same-step autoreset; truncation at `episode_length` or at the end of the rows.

    Observation: market (window, columns) float32, the bars up to the decision; position (1,), the exposure held;
    w_cost (1,). Action (1,) in [-1, 1]: target exposure. Reward: log growth of equity net of fees, minus w_cost *
    penalty * |change|. State: ints (3, N) row, clock, episode; floats (6, N) position, w_cost, cost, equity, reward,
    turnover. step_lanes() is step() without observations.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}
    builds = 0

    def __init__(
        self, market: Market, rows: tuple[int, int], num_envs: int = 1, episode_length: int = 128, fee_bps: float = 4.0,
        slippage_bps: float = 1.0, funding_bps: float = 0.0, position_mode: str = "rebalance",
        turnover_penalty_bps: float = 5.0, cost_randomization: float = 0.0, seed: int = 1, backend: str = "cpu",
    ):
        MarketVectorEnv.builds += 1
        self.market, self.num_envs, self.window = market, num_envs, market.window
        self.backend, self.seed, self.was_reset = backend, seed, False
        if position_mode not in CHOICES["position_mode"] or backend not in ("cpu", "cuda"):
            known = "must be rebalance or drift, cpu or cuda"
            raise ValueError(f"position_mode {position_mode!r}, backend {backend!r}: {known}")
        self.start, self.stop, self.length = int(rows[0]), int(rows[1]), int(episode_length)
        if not market.window - 1 <= self.start < self.stop < len(market.ret):
            raise ValueError(f"rows {rows}: need {market.window - 1} <= start < stop < {len(market.ret)}")
        box = gym.spaces.Box
        self.single_observation_space = gym.spaces.Dict({
            "market": box(-np.inf, np.inf, (self.window, market.table.shape[1]), np.float32),
            "position": box(-np.inf, np.inf, (1,), np.float32), "w_cost": box(0.0, 1.0, (1,), np.float32)})
        self.single_action_space = box(-1.0, 1.0, (1,), np.float32)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        # cost, funding, drift, penalty, w_max, cost_randomization
        self.rules = np.array([(fee_bps + slippage_bps) * BP, funding_bps * BP, position_mode == "drift",
                               turnover_penalty_bps * BP, 1.0, cost_randomization])
        self.lease = pool.lease()
        take = partial(self.lease.acquire, device=backend)
        self.ints, self.final_ints = take((3, num_envs), np.int64), take((3, num_envs), np.int64)
        self.floats, self.final_floats = take((6, num_envs), np.float64), take((6, num_envs), np.float64)
        self.action, self.reward = take((num_envs,), np.float64), take((num_envs,), np.float64)
        self.flags = take((2, num_envs), np.bool_)
        if backend == "cuda":
            self.kernel = cuda_step()[(num_envs + 127) // 128, 128]
            self.ret = pool.static(("ret", market.bars.sha256), lambda: cuda.to_device(market.ret))
        else:
            self.kernel, self.ret = step_cpu, market.ret
        self.offsets = np.arange(1 - self.window, 1)

    def host(self, array) -> np.ndarray:
        """A NumPy view of a state array (a copy on CUDA)."""
        return array.copy_to_host() if self.backend == "cuda" else array

    def to_state(self, array, values):
        if self.backend == "cuda":
            array.copy_to_device(np.ascontiguousarray(values))
        else:
            array[...] = values

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """All lanes to their first (seed given) or next episode; builds nothing."""
        ints, floats = self.host(self.ints), self.host(self.floats)
        if seed is not None:
            self.seed = int(seed)
        ints[2] = 0 if seed is not None or not self.was_reset else ints[2] + 1
        self.was_reset = True
        ints[1], floats[:] = 0, 0.0
        floats[3] = 1.0
        for i in range(self.num_envs):
            ints[0, i], floats[1, i], floats[2, i] = episode_nb(
                self.seed, i, ints[2, i], self.start, self.stop, self.rules[4], self.rules[0], self.rules[5])
        self.to_state(self.ints, ints)
        self.to_state(self.floats, floats)
        return self.observe(ints[0], floats[0], floats[1]), {}

    def step_lanes(self, action):
        """Step all lanes. action (N,) -> reward (N,) float64, terminated, truncated (N,) bool: views, overwritten."""
        self.to_state(self.action, np.asarray(action, np.float64).reshape(self.num_envs))
        self.kernel(self.action, self.ret, self.start, self.stop, self.length, self.rules, self.seed, self.ints,
                    self.floats, self.reward, self.flags, self.final_ints, self.final_floats)
        flags = self.host(self.flags)
        return self.host(self.reward), flags[0], flags[1]

    def step(self, actions):
        actions = np.asarray(actions)
        if not np.isfinite(actions).all():
            lane = int(np.flatnonzero(~np.isfinite(actions.reshape(-1)))[0])
            raise ValueError(f"action of lane {lane} is not finite")
        reward, terminated, truncated = (x.copy() for x in self.step_lanes(actions))
        ints, floats = self.host(self.ints), self.host(self.floats)
        info, done = {}, terminated | truncated
        if done.any():
            lanes = np.flatnonzero(done)
            last_ints, last = self.host(self.final_ints), self.host(self.final_floats)
            final = self.observe(last_ints[0, lanes], last[0, lanes], last[1, lanes])
            obs = np.full(self.num_envs, None, object)
            for k, i in enumerate(lanes):
                obs[i] = {name: values[k] for name, values in final.items()}
            episode = {"r": last[4], "l": last_ints[1], "equity": last[3], "turnover": last[5]}
            episode = {k: np.where(done, v, 0) for k, v in episode.items()}
            info = {"final_obs": obs, "_final_obs": done,
                    "final_info": {"episode": episode, "_episode": done}, "_final_info": done}
        return self.observe(ints[0], floats[0], floats[1]), reward, terminated, truncated, info

    def observe(self, row, position, w_cost) -> dict:
        position, w_cost = np.asarray(position, np.float32)[:, None], np.asarray(w_cost, np.float32)[:, None]
        market = self.market.table[np.asarray(row)[:, None] + self.offsets]  # (N, window, columns)
        return {"market": market, "position": position, "w_cost": w_cost}

    def get_state(self) -> dict:
        state = {name: self.host(getattr(self, name)) for name in ("ints", "floats")}
        return {name: torch.from_numpy(array.copy()) for name, array in state.items()} | {"seed": self.seed}

    def set_state(self, state: dict):
        self.to_state(self.ints, state["ints"].numpy())
        self.to_state(self.floats, state["floats"].numpy())
        self.seed, self.was_reset = state["seed"], True

    def close_extras(self, **kwargs):
        self.lease.close()


def make_vec(num_envs: int = 1, data: str = "synthetic:regime", split_name: str = "train", **kwargs) -> MarketVectorEnv:
    """gymnasium.make_vec("cleanrl_crypto/Market-v0", num_envs=8, data=..., split_name="train", fee_bps=4, ...)."""
    loading = {k: kwargs.pop(k) for k in ("split", "window", "fill_limit", "hmm") if k in kwargs}
    market = load_market(data, **loading)
    return MarketVectorEnv(market, market.rows[split_name], num_envs, **kwargs)


class MarketEnv(gym.Env):
    """One lane as an ordinary environment: gymnasium.make("cleanrl_crypto/Market-v0", data=...)."""

    metadata = {"render_modes": []}

    def __init__(self, render_mode: None = None, **kwargs):
        self.render_mode = render_mode
        self.lane = make_vec(1, **kwargs)
        self.observation_space, self.action_space = self.lane.single_observation_space, self.lane.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        obs, _ = self.lane.reset(seed=seed)
        return {name: values[0] for name, values in obs.items()}, {}

    def step(self, action):
        obs, reward, terminated, truncated, info = self.lane.step(np.asarray(action)[None])
        obs = info["final_obs"][0] if "final_obs" in info else {name: values[0] for name, values in obs.items()}
        return obs, float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}

    def close(self):
        self.lane.close()


if "cleanrl_crypto/Market-v0" not in gym.registry:  # __main__ and an import of it may be two modules
    gym.register("cleanrl_crypto/Market-v0", entry_point=MarketEnv, vector_entry_point=make_vec)


# --------------------------------------------------------------------------------------------------- networks
class Block(nn.Module):
    """Pre-LN transformer layer."""

    def __init__(self, d_model: int, n_heads: int, d_ff: int):
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.ff = nn.Sequential(nn.Linear(d_model, d_ff), nn.GELU(), nn.Linear(d_ff, d_model))

    def forward(self, x):  # (B, T, d)
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.n_heads, d // self.n_heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))
        return x + self.ff(self.norm2(x))


class CryptoMAE(nn.Module):
    """Masked autoencoder over a window of technical columns (He et al. 2022, on bars instead of patches).

    context(x) is what the agent sees: the encoding, standardised channel by channel on train rows and weighed by a
    fixed gain that decays into the past. mean, std and gain are buffers: frozen with the rest.
    """

    def __init__(self, columns: int, window: int, d_model: int, n_heads: int, n_layers: int, d_ff: int, recency: float):
        super().__init__()
        self.embed = nn.Linear(columns, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_heads, d_ff) for _ in range(n_layers))
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
        return self.market(x if self.film is not None else torch.cat([x, hmm.to(z.dtype)], 1)).float()


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

    def forward(self, market, after, w_cost):  # -> (B, K, critics, quantiles)
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
        width, hidden = c["fusion_width"], c["hidden"]
        self.costs = c["cost"], c["funding"], c["drift"]
        self.extractor = FoundationFeatureExtractor(c["window"], c["d_model"], width, c["dropout"], c["film"])
        self.critic = Critic(width, hidden, c["n_critics"], c["n_quantiles"])
        self.target = Critic(width, hidden, c["n_critics"], c["n_quantiles"]).requires_grad_(False)
        self.target.load_state_dict(self.critic.state_dict())
        self.actor = Actor(width, hidden, c["log_std_init"])
        self.log_alpha = nn.Parameter(torch.tensor(math.log(max(c["alpha"], 1e-30))))
        half = c["action_grid"] // 2
        self.register_buffer("grid", torch.arange(-half, half + 1) / half)
        self.register_buffer("reward_stats", torch.zeros(3, dtype=torch.float64))  # count, mean, sum of squares

    @property
    def alpha(self) -> torch.Tensor:
        return self.log_alpha.detach().exp().clamp_min(self.config["ent_coef_min"])

    def watch_rewards(self, rewards: np.ndarray):
        """Welford's update with a batch (Chan et al. 1983) of full-position rewards, which no policy can shrink."""
        count, mean, m2 = self.reward_stats.tolist()
        n, new = len(rewards), float(rewards.mean())
        total = count + n
        m2 += float(((rewards - new) ** 2).sum()) + (new - mean) ** 2 * count * n / total
        self.reward_stats.copy_(torch.tensor([total, mean + (new - mean) * n / total, m2], dtype=torch.float64))

    @property
    def reward_scale(self) -> float:
        count, _, m2 = self.reward_stats.tolist()
        return 1.0 / math.sqrt(m2 / count) if self.config["reward_scaling"] and count > 1 and m2 > 0 else 1.0


# -------------------------------------------------------------------------------------------------- algorithm
class QuantileHuber(torch.autograd.Function):
    """Loss and gradient in closed form: autograd would keep five (B, C, N, M) tensors."""

    @staticmethod
    def forward(ctx, current, target):
        n = current.shape[-1]
        tau = (torch.arange(n, device=current.device, dtype=current.dtype) + 0.5) / n
        delta = target[:, None, None, :] - current[..., None]  # (B, C, N, M)
        clipped = delta.clamp(-1, 1)
        huber = clipped * (delta - 0.5 * clipped)
        up, all_up = clipped.clamp_min(0).sum(-1), clipped.sum(-1)  # (B, C, N)
        above = torch.where(delta > 0, huber, 0).sum(-1)
        ctx.save_for_backward(-(tau * up + (1 - tau) * (all_up - up)) / delta.numel())
        return (tau * above + (1 - tau) * (huber.sum(-1) - above)).sum() / delta.numel()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


def quantile_huber_loss(current, target):
    """Quantile Huber loss, kappa 1 (Dabney et al. 2018, eq. 10), mean over everything; no gradient to the target.

    current (B, C, N): quantiles of each critic at (i + .5)/N; target (B, M): atoms every critic is compared with.
    """
    return QuantileHuber.apply(current, target)


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


def ent_coef_loss(log_alpha, log_prob, target_entropy: float):
    return -(log_alpha * (log_prob + target_entropy).detach()).mean()


def growth_reward(exposure, ret, funding: float):
    """log growth of a bar at `exposure`, before the cost of getting there; broadcasts."""
    return (1 + exposure * ret - funding * (-exposure).clamp_min(0)).clamp_min(RUIN).log()


def trade_reward(position, after, cost, penalty, drift: bool):
    """log(1 - fee) - penalty |change| of going from position to after (<= 0); broadcasts. Same formula as trade_nb."""
    change = after - position
    fee = cost * change.abs()
    if drift:
        fee = fee / (1 + cost * after * torch.where(change > 0, 1.0, -1.0))
    return torch.log1p(-fee.clamp_max(1 - RUIN)) - penalty * change.abs()


def drift_position(exposure, ret, funding: float, drift: bool):
    """Exposure at the next decision; broadcasts."""
    if not drift:
        return exposure
    return exposure * (1 + ret) / (1 + exposure * ret - funding * (-exposure).clamp_min(0)).clamp_min(RUIN)


def sample_action(actor: Actor, market, position, w_cost, noise=None):
    """gSDE sample for an update, its noise drawn anew for every row. Returns action (B,), log_prob (B,), std (B,)."""
    mean, latent = actor(market, position, w_cost)
    std = gsde_std(latent, actor.log_std)
    u = mean + std * (torch.randn_like(std) if noise is None else noise)
    return u.tanh(), squashed_log_prob(mean, std, u), std


@dataclass
class Batch:
    """Rows drawn for one update; tensors (B,) unless stated. A row often serves two samples: z holds each once."""

    z: torch.Tensor  # (U, T, d) context of the different rows: first those drawn, then next rows that were not
    hmm: torch.Tensor  # (U, 5)
    n_drawn: int  # of U: only these are trained
    at: torch.Tensor  # where a sample's row stands in z
    next_at: torch.Tensor  # and the next row
    ret: torch.Tensor  # simple return of the next bar
    position: torch.Tensor  # exposure before the stored trade
    after: torch.Tensor  # (B, K) exposures trained: the stored one first
    w_cost: torch.Tensor
    cost: torch.Tensor


def critic_loss(agent: Agent, batch: Batch, rules: tuple, scale: float, noise=None):
    """Loss of G at K exposures on each row, and what the actor and the log need.

    rules: funding, drift, penalty, gamma, clip. policy critic_grid: the target is the best grid position at the next
    row; actor: TQC's, the actor's next sample and its entropy. Returns (loss, market (B, width) detached, statistics).
    """
    funding, drift, penalty, gamma, clip = rules
    b, k = batch.after.shape
    n = batch.n_drawn
    trained = agent.extractor(batch.z[:n], batch.hmm[:n])  # (n, width)
    market = trained[batch.at]
    quantiles = agent.critic(market, batch.after, batch.w_cost[:, None])  # (B, K, C, N)
    with torch.no_grad():
        every = torch.cat([trained, agent.extractor(batch.z[n:], batch.hmm[n:])]) if n < len(batch.z) else trained
        next_market = every.detach()[batch.next_at]
        w, cost = batch.w_cost[:, None], batch.cost[:, None]
        growth = growth_reward(batch.after, batch.ret[:, None], funding)  # (B, K)
        reward = (scale * growth).clamp(-clip, clip)
        held = drift_position(batch.after, batch.ret[:, None], funding, drift)  # (B, K)
        done = (growth <= math.log(LOST)).float()
        if agent.config["policy"] == "critic_grid":
            values = agent.target(next_market, agent.grid.expand(b, -1), w)  # (B, A, C, N)
            moves = trade_reward(held[..., None], agent.grid, cost[..., None], (penalty * w)[..., None], drift)
            moves = scale * moves  # (B, K, A)
            best = (values.mean((2, 3))[:, None] + moves).argmax(2)  # (B, K)
            pick = best[..., None, None].expand(-1, -1, *values.shape[2:])
            next_quantiles = values.gather(1, pick).flatten(0, 1)  # (B K, C, N)
            paid = moves.gather(2, best[..., None]).flatten()  # (B K,)
            alpha, log_prob = 0.0, paid
        else:
            next_market, w, cost = (x.repeat_interleave(k, 0) for x in (next_market, w, cost))
            action, log_prob, _ = sample_action(agent.actor, next_market, held.reshape(-1, 1), w, noise)
            next_quantiles = agent.target(next_market, action[:, None], w)[:, 0]  # (B K, C, N)
            paid = scale * trade_reward(held.flatten(), action, cost[:, 0], penalty * w[:, 0], drift)
            alpha = agent.alpha
        next_quantiles = next_quantiles + paid[:, None, None]
        drop = agent.config["drop"]
        target = tqc_target(next_quantiles, reward.flatten(), done.flatten(), gamma, alpha, log_prob, drop)
    loss = quantile_huber_loss(quantiles.flatten(0, 1), target)
    clipped = (growth.abs() * scale > clip).float().mean()
    stats = torch.stack([quantiles.detach().mean(), target.mean(), clipped, reward.std()])
    return loss, market.detach(), stats


def actor_loss(agent: Agent, market, batch: Batch, rules: tuple, scale: float, noise=None):
    """E[alpha log pi - mean atom of Q], all atoms: only targets drop any. Returns (loss, log_prob (B,), std (B,))."""
    _, drift, penalty, _, _ = rules
    w = batch.w_cost[:, None]
    action, log_prob, std = sample_action(agent.actor, market, batch.position[:, None], w, noise)
    q = agent.critic(market, action[:, None], w).mean((1, 2, 3))
    q = q + scale * trade_reward(batch.position, action, batch.cost, penalty * batch.w_cost, drift)
    return (agent.alpha * log_prob - q).mean(), log_prob.detach(), std.detach()


def shared_rows(rows: np.ndarray, fixed: bool = False) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Rows drawn (B,) -> every different row once, those drawn first; where a sample's row stands, and its next row.

    fixed: (2 B,) rows, repeated or not, because a compiled graph is for one shape.
    """
    if fixed:
        at = torch.arange(len(rows))
        return np.concatenate([rows, rows + 1]), at, at + len(rows)
    drawn, at = np.unique(rows, return_inverse=True)
    different = np.concatenate([drawn, np.setdiff1d(rows + 1, drawn)])
    order = np.argsort(different)
    next_at = order[np.searchsorted(different, rows + 1, sorter=order)]
    return different, torch.from_numpy(at), torch.from_numpy(next_at)


class Replay:
    """Ring of transitions as row indices and lane scalars: 25 bytes each, never windows.

    The next observation is row + 1 with the exposure that `action` leaves (an episode's end included: rows do not
    jump), the reward is recomputed from the row, so a changed reward scale never meets stale rewards.
    """

    def __init__(self, size: int):
        self.size, self.total = size, 0
        self.row, self.episode_end = np.empty(size, np.int32), np.empty(size, np.bool_)
        self.floats = np.empty((5, size), np.float32)  # position, action, w_cost, cost, reward

    def add(self, row, position, action, w_cost, cost, reward, end):
        at = (self.total + np.arange(len(row))) % self.size
        self.row[at], self.episode_end[at] = row, end
        for k, values in enumerate((position, action, w_cost, cost, reward)):
            self.floats[k, at] = values
        self.total += len(row)

    def sample(self, rng, n: int, segment: int, stride: int) -> np.ndarray:
        """Indices (n,) of n / segment stretches of one lane: `segment` transitions, `stride` (the lanes) apart."""
        start = rng.integers(0, len(self), n // segment)
        return ((start[:, None] + np.arange(segment) * stride) % len(self)).reshape(-1)

    def __len__(self) -> int:
        return min(self.total, self.size)

    def get_state(self) -> dict:
        n = len(self)
        state = {"row": self.row[:n], "floats": self.floats[:, :n], "end": self.episode_end[:n]}
        return {"total": self.total} | {k: torch.from_numpy(v.copy()) for k, v in state.items()}

    def set_state(self, state: dict):
        n, self.total = len(state["row"]), state["total"]
        self.row[:n], self.episode_end[:n] = state["row"].numpy(), state["end"].numpy()
        self.floats[:, :n] = state["floats"].numpy()


class Contexts:
    """Encoder output per row: computed when first asked for and kept (auto), or anew for every batch (off).

    __call__(rows) -> (z (B, T, d), hmm (B, 5)). What is kept is encoded in fixed blocks of rows, so that its bits do
    not depend on who asks first. `filled` (bars,) tells the rows that were; phase() is charged with the seconds.
    """

    BLOCK = 32

    def __init__(self, encoder: CryptoMAE, market: Market, device, dtype, keep: bool, phase=nullcontext):
        self.encoder, self.window, self.device, self.dtype = encoder, market.window, device, dtype
        self.table = torch.from_numpy(market.table).to(device)
        self.n_tech, self.phase = market.n_tech, phase
        self.offsets = torch.arange(1 - self.window, 1, device=device)
        shape = (len(market.table), *encoder.positions.shape)  # (bars, T, d)
        self.cache = torch.empty(shape, dtype=dtype, device=device) if keep else None
        self.filled = np.zeros(len(market.table), bool)

    def windows(self, rows: torch.Tensor) -> torch.Tensor:
        """Technical columns of the bars up to each row: (B,) -> (B, T, n_tech)."""
        return self.table[rows[:, None] + self.offsets, : self.n_tech]

    @torch.no_grad()
    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.encoder.context(self.windows(rows)).to(self.dtype)

    def fill(self, rows: np.ndarray, should_stop=lambda: False) -> int:
        """Encode the blocks that hold `rows` and were not, the last first, until should_stop(); returns how many."""
        if self.cache is None:
            self.filled[rows] = True
            return 0
        blocks = np.unique(rows[~self.filled[rows]] // self.BLOCK)[::-1]
        with self.phase():
            for done, block in enumerate(blocks):
                if done and should_stop():  # one block always: no row, no evaluation
                    return done
                first, stop = max(block * self.BLOCK, self.window - 1), min((block + 1) * self.BLOCK, len(self.filled))
                at = torch.arange(block * self.BLOCK, (block + 1) * self.BLOCK, device=self.device)
                z = self.encode(at.clamp(self.window - 1, len(self.filled) - 1))  # one shape: the same bits anywhere
                self.cache[first:stop] = z[first - block * self.BLOCK : stop - block * self.BLOCK]
                self.filled[first:stop] = True
        return len(blocks)

    def __call__(self, rows) -> tuple[torch.Tensor, torch.Tensor]:
        rows = np.asarray(rows, np.int64)
        self.fill(rows)
        at = torch.as_tensor(rows, device=self.device)
        z = self.encode(at) if self.cache is None else self.cache[at]
        return z, self.table[at, self.n_tech :]


def draw_batch(replay: Replay, contexts: Contexts, ret: np.ndarray, rng, args: Args) -> Batch:
    """Stored transitions, each with uniform random exposures beside the stored one. ret: the market's (bars,)."""
    at = replay.sample(rng, args.batch_size, args.segment, args.num_envs)
    rows = replay.row[at].astype(np.int64)
    position, action, w_cost, cost, _ = torch.from_numpy(replay.floats[:, at]).to(contexts.device)
    different, here, following = shared_rows(rows, args.compile)
    n_drawn = int(here.max()) + 1
    here, following = here.to(contexts.device), following.to(contexts.device)
    other = rng.uniform(-1, 1, (args.batch_size, args.counterfactuals)).astype(np.float32)
    after = torch.cat([action[:, None], torch.from_numpy(other).to(contexts.device)], 1)
    earned = torch.from_numpy(ret[rows].astype(np.float32)).to(contexts.device)
    return Batch(*contexts(different), n_drawn, here, following, earned, position, after, w_cost, cost)


# -------------------------------------------------------------------------------------- evaluation, diagnostics
@torch.no_grad()
def market_latents(agent: Agent, contexts: Contexts, rows: np.ndarray, autocast, deadline: float = math.inf):
    """The market part of the fusion layer for rows (n,) -> (n, width); stops at a whole block past `deadline`."""
    agent.eval()
    blocks = []
    for at in range(0, len(rows), 512):
        with autocast():
            blocks.append(agent.extractor(*contexts(rows[at : at + 512])))
        if time.monotonic() > deadline:
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
    """Q of trading from position (n,) to exposures (n, A), under the agent's own costs -> (n, A), scaled reward."""
    cost, _, drift = agent.costs
    paid = trade_reward(position[:, None], after, cost, agent.config["penalty"] * w_cost[:, None], drift)
    return afterstate_values(agent, latents, after, w_cost[:, None]) + agent.reward_scale * paid


@torch.no_grad()
def act(agent: Agent, latents, position, w_cost, policy: str):
    """Deterministic exposure (n,) at (n, width), (n,), (n,) under the agent's own costs."""
    if policy == "actor":
        return agent.actor(latents, position[:, None], w_cost[:, None])[0].tanh()
    q = action_values(agent, latents, position, w_cost, agent.grid.expand(len(latents), -1))
    return agent.grid[q.argmax(1)]


def target_path(agent: Agent, latents, ret: np.ndarray, w_cost: float, policy: str) -> np.ndarray:
    """Deterministic exposures along consecutive rows, flat before the first: (n, width), (n,) -> (n,) float64."""
    w = torch.full((len(latents), 1), w_cost, device=latents.device)
    if policy == "critic_grid":
        value = grid_values(agent, latents, w).cpu().numpy().astype(np.float64)
        grid = agent.grid.cpu().numpy().astype(np.float64)
        return greedy_walk_nb(value, grid, agent.reward_scale, agent.config["penalty"] * w_cost, ret, *agent.costs)
    target, position = np.empty(len(ret)), 0.0
    for t in range(len(ret)):
        at = torch.tensor([position], dtype=torch.float32, device=latents.device)
        target[t] = float(act(agent, latents[t : t + 1], at, w[0], "actor"))
        _, _, position = trade_nb(position, target[t], ret[t], *agent.costs)
    return target


def series_of(market: Market, costs: tuple) -> Series:
    """The market as scoring sees it; the ridge policy may use (last bar's technical columns) x (1, HMM columns)."""
    tech, hmm = market.table[:, : market.n_tech].astype(np.float64), market.table[:, market.n_tech :].astype(np.float64)
    x = np.concatenate([tech, hmm, *(tech * hmm[:, k : k + 1] for k in range(HMM_COLUMNS))], 1)
    walk = lambda target, a, b: walk_nb(target, market.ret[a:b], market.expected[a:b], *costs)  # noqa: E731
    return Series(x, market.ret, market.rows, walk, market.bars.truth is not None)


def baseline_paths(market: Market, start: int, stop: int, costs: tuple, turnover: float, seed: int) -> dict:
    """Target exposures (n,) of everyone the agent stands beside."""
    n = stop - start
    constant = best_constant(series_of(market, costs), LEVELS)
    out = {"flat": np.zeros(n), "buy_and_hold": np.ones(n), "best_constant": np.full(n, constant),
           "random_same_turnover": random_path(n, turnover, seed)}
    if market.bars.truth:
        out["optimum"] = np.asarray(markets.optimum_path(market.bars.truth, costs[0], start, stop), np.float64)
    return out


def evaluate(agent: Agent, contexts: Contexts, market: Market, split: str, autocast, args: Args,
             policies=("critic_grid", "actor"), trace: bool = False) -> tuple[dict, dict]:
    """Deterministic walk over a split's rows, flat start, all baselines on the same bars at the same costs.

    Returns {policy: metrics, "agent": the acting policy's, "baselines": {...}, "rows", "partial"} and the columns of
    traces/{split}.parquet (q_spread with `trace` only).
    """
    acting, truth = agent.config["policy"], market.bars.truth
    first, last = market.rows[split]
    start = first + int(np.argmax(contexts.filled[first:last]))  # a short --timeout left the oldest out
    deadline = time.monotonic() + 0.4 * (args.eval_timeout or math.inf)  # what follows takes longer than the latents
    latents = market_latents(agent, contexts, np.arange(start, last), autocast, deadline)
    stop = start + len(latents)
    out = {"rows": [start, stop], "partial": (start, stop) != (first, last), "baselines": {}}
    ret, expected, per_year = market.ret[start:stop], market.expected[start:stop], market.bars.bars_per_year
    columns = {"timestamp": market.bars.timestamp[start:stop], "close": market.bars.close[start:stop]}
    columns["next_return"] = ret
    for policy in policies:
        if policy == "actor" and acting != "actor" and time.monotonic() > deadline:
            out["partial"] = True
            continue
        target = target_path(agent, latents, ret, args.eval_w_cost, policy)
        out[policy], equity = path_metrics(*walk_nb(target, ret, expected, *agent.costs), per_year)
        name = "" if policy == acting else f"_{policy}"
        columns |= {f"position{name}": target, f"equity{name}": equity}
    out["agent"] = dict(out[acting])
    paths = baseline_paths(market, start, stop, agent.costs, out["agent"]["turnover"], args.seed)
    for name, target in paths.items():
        out["baselines"][name], equity = path_metrics(*walk_nb(target, ret, expected, *agent.costs), per_year)
        columns |= {f"position_{name}": target, f"equity_{name}": equity}
    if truth:
        best = out["baselines"]["optimum"]["mean_expected_bps"]
        for mine in (out[k] for k in ("agent", *policies) if k in out):
            mine["score"] = mine["mean_expected_bps"] / best if best >= 0.05 else None
        columns |= {"expected": expected, "signal": truth.signal[start:stop], "regime": truth.regime[start:stop]}
    if trace:
        w_cost = torch.full((len(latents), 1), args.eval_w_cost, device=latents.device)
        q = grid_values(agent, latents, w_cost)
        columns["q_spread"] = (q.max(1).values - q.min(1).values).cpu().numpy()
    return out, columns


@torch.no_grad()
def diagnose(agent: Agent, contexts: Contexts, market: Market, split: str, autocast, n: int = 256) -> dict:
    """What the deterministic policy depends on, on n rows of a split (the same rows at every call)."""
    c, rng, device = agent.config, np.random.default_rng(0), agent.grid.device
    start, stop = market.rows[split]
    rows = np.sort(rng.choice(np.flatnonzero(contexts.filled[start:stop]) + start, n))
    mix = torch.from_numpy(rng.permutation(n)).to(device)
    position = torch.from_numpy(rng.uniform(-1, 1, n).astype(np.float32)).to(device)
    w_cost = torch.from_numpy(rng.uniform(0, 1, n).astype(np.float32)).to(device)
    zero = torch.zeros(n, device=device)
    z, hmm = contexts(rows)
    agent.eval()
    with autocast():
        latents, tech, context = agent.extractor(z, hmm), agent.extractor(z[mix], hmm), agent.extractor(z, hmm[mix])

    greedy = act(agent, latents, position, w_cost, c["policy"])
    fixed = [act(agent, latents, zero + p, zero, c["policy"]) for p in (-1.0, 0.0, 1.0)]  # the market alone varies

    def moved(latents, position, w_cost) -> float:
        return float((act(agent, latents, position, w_cost, c["policy"]) - greedy).abs().mean())

    noise = torch.randn(n, generator=torch.Generator(device.type).manual_seed(0), device=device)
    sampled, log_prob, std = sample_action(agent.actor, latents, position[:, None], w_cost[:, None], noise)
    q = action_values(agent, latents, position, w_cost, agent.grid.expand(n, -1))  # (n, A)
    q_greedy, q_sampled = (action_values(agent, latents, position, w_cost, a[:, None]) for a in (greedy, sampled))
    quantiles = agent.critic(latents, greedy[:, None], w_cost[:, None])  # (n, 1, C, N)
    hidden = agent.critic.nets[0][:2](agent.critic.fusion(latents, greedy[:, None], w_cost[:, None])[:, 0])
    entropy, alpha = -float(log_prob.mean()), float(agent.alpha)
    return {
        "state_dependence": float(torch.stack(fixed).std(1).mean()), "action_mean": float(greedy.mean()),
        "saturation": float((greedy.abs() > 0.98).float().mean()), "greedy_gap": float((q_greedy - q_sampled).mean()),
        "greedy_over_sampled": float(greedy.std() / sampled.std().clamp_min(1e-6)), "q_mean": float(q.mean()),
        "q_action_spread": float((q.max(1).values - q.min(1).values).mean()),
        "quantile_spread": float((quantiles.amax(3) - quantiles.amin(3)).mean()),
        "policy_entropy": entropy, "alpha": alpha, "alpha_entropy": alpha * abs(entropy),
        "entropy_rms": alpha * c["gamma"] * float((log_prob**2).mean().sqrt()), "sigma": float(std.mean()),
        "log_std_mean": float(agent.actor.log_std.mean()), "dead_units": float((hidden <= 0).all(0).float().mean()),
        "attribution": {
            "technical": moved(tech, position, w_cost), "hmm": moved(context, position, w_cost),
            "position": moved(latents, position[mix], w_cost), "w_cost": moved(latents, position, w_cost[mix])}}


def alarms(seen: dict, drawn: int, global_step: int, clipped: float) -> dict[str, bool]:
    """What comes before a collapse. seen: diagnose()'s; drawn: rows trained on; clipped: share of the rewards."""
    return {"q_spread_over_alpha": seen["q_action_spread"] < 2 * seen["alpha"],
            "entropy_over_reward": seen["entropy_rms"] > 1.0, "samples_per_transition": drawn < 2 * global_step,
            "sigma": seen["sigma"] > 0.9, "clipped_rewards": clipped > 0.05,
            "greedy_over_sampled": seen["greedy_over_sampled"] < 0.1}


@torch.no_grad()
def overestimation(agent: Agent, contexts: Contexts, market: Market, split: str, autocast, n: int = 2048) -> float:
    """Mean of (predicted - realised) discounted value along the acting policy's path, scaled reward a decision."""
    gamma, (_, funding, _) = agent.config["gamma"], agent.costs
    start, stop = market.rows[split]
    rows = (np.flatnonzero(contexts.filled[start:stop]) + start)[:n]
    latents = market_latents(agent, contexts, rows, autocast)
    ret = market.ret[rows]
    target = target_path(agent, latents, ret, 0.0, agent.config["policy"])
    after = torch.from_numpy(target).float().to(latents.device)[:, None]
    value = afterstate_values(agent, latents, after, torch.zeros_like(after))[:, 0].cpu().numpy()
    reward = agent.reward_scale * walk_nb(target, ret, ret, *agent.costs)[0]
    growth = np.log(np.maximum(1 + target * ret - funding * np.maximum(-target, 0), RUIN))
    paid = reward - agent.reward_scale * growth
    realised, tail = np.empty(len(rows)), 0.0
    for t in range(len(rows) - 1, -1, -1):
        tail = realised[t] = reward[t] + gamma * tail
    keep = max(len(rows) - int(5 / (1 - gamma + 1e-9)), 1)  # the last ones see too little of their future
    return float((value + paid - realised)[:keep].mean())


def load_agent(path, device="cpu") -> dict:
    """A checkpoint of this script. Raises CheckpointError (one line)."""
    state = load_checkpoint(path, device)
    if state.get("schema") != SCHEMA or not {"config", "encoder", "agent", "features"} <= set(state):
        found = f"schema {state.get('schema')}, expected {SCHEMA}; it holds {', '.join(sorted(map(str, state))[:6])}"
        raise CheckpointError(f"{path}: not a checkpoint of {Path(__file__).name} ({found})")
    return state


def load_policy(checkpoint: str | Path, device: str = "cpu"):
    """policy(obs) -> actions (B, 1) float32 from a checkpoint file alone: the policy that evaluation reports.

    obs: the environment's own batch, NumPy: market (B, window, columns), position (B, 1), w_cost (B, 1).
    Raises CheckpointError (one line).
    """
    state = load_agent(checkpoint, device)
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
        return act(agent, latents, position[:, 0], w_cost[:, 0], config["policy"])[:, None].cpu().numpy()

    return policy


# --------------------------------------------------------------------------------------- encoder: load, pre-train
def build_encoder(config: dict) -> CryptoMAE:
    return CryptoMAE(*(config[k] for k in ("columns", "window", "d_model", "n_heads", "n_layers", "d_ff", "recency")))


def check_dimensions(path, found: dict, expected: dict):
    """Every dimension of the encoder that disagrees with the flags stands in one error line."""
    names = {"d_model": "d_model", "n_heads": "heads", "n_layers": "layers", "d_ff": "feed-forward",
             "columns": "input columns", "window": "window"}
    wrong = [f"{name} {found[k]} found, {expected[k]} expected" for k, name in names.items() if found[k] != expected[k]]
    if wrong:
        raise CheckpointError(f"{path} does not fit the flags and data: {'; '.join(wrong)}")


def load_encoder(path: str, config: dict) -> CryptoMAE:
    """encoder.pt of another run, with this run's recency gain."""
    state = load_checkpoint(path)
    if set(state) != {"config", "encoder"}:
        raise CheckpointError(f"--encoder {path}: not an encoder.pt but a file with {', '.join(sorted(state)[:6])}")
    check_dimensions(path, state["config"], config)
    encoder = build_encoder(config)
    gain = encoder.gain.clone()
    encoder.load_state_dict(state["encoder"])
    encoder.gain.copy_(gain)  # the gain is a flag of this run, not a finding of that one
    return encoder


def pretrain(encoder: CryptoMAE, contexts: Contexts, rows: tuple, args: Args, autocast, guard, log) -> int:
    """Masked reconstruction on windows that end in train rows, then the context's statistics. Returns steps made."""
    steps, lr = args.mae_steps, args.mae_learning_rate
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=lr, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 1) + 1)
    budget = time.monotonic() + 0.12 * guard.remaining()
    step = 0
    while step < steps and not guard.should_stop():
        if time.monotonic() > budget:
            print(f"pre-training cut to {step} of {steps} steps: learning needs the rest of --timeout {args.timeout:g}")
            break
        x = contexts.windows(torch.randint(*rows, (args.mae_batch_size,), device=contexts.device))
        mask = torch.rand(x.shape[:2], device=x.device) < args.mae_mask
        with autocast():
            loss = encoder.loss(x, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == steps - 1:
            log({"losses/mae": float(loss.detach())}, 0)
        step += 1
    encoder.eval().requires_grad_(False)
    with torch.no_grad(), autocast():
        drawn = [contexts.windows(torch.randint(*rows, (128,), device=contexts.device)) for _ in range(8)]
        z = torch.cat([encoder.encode(x).float().flatten(0, 1) for x in drawn])
    encoder.mean.copy_(z.mean(0))
    encoder.std.copy_(z.std(0) + 1e-6)
    return step


# ------------------------------------------------------------------------------------------------------- main
def open_run(args: Args) -> tuple[Path, Path | str | None, dict | None]:
    """Run directory, checkpoint to start from and its content; refuses what does not fit the flags."""
    name = "+".join(Path(p).stem for p in args.data.split(","))
    if args.data.startswith("synthetic"):
        name = args.data.split("?")[0].replace(":", "-")
    run_dir = Path(args.run_dir or f"runs/{name}__{args.exp_name}__{args.seed}__{int(time.time())}")
    source = args.checkpoint or (find_last(run_dir) if args.resume == "auto" else args.resume)
    if not args.resume and (run_dir / "metrics.jsonl").exists():
        raise UsageError(f"--run-dir {run_dir} holds a run already: --resume auto continues it")
    if not source:
        return run_dir, None, None
    state = load_agent(source)
    if args.resume:
        if "replay" not in state:
            raise CheckpointError(f"{source}: holds the agent alone (for evaluation); resume from last.pt")
        there, here = state["args"], asdict(args)
        wrong = [f"{flag(k)} {there.get(k)} there, {here[k]} here" for k in SHAPING if there.get(k) != here[k]]
        if wrong:
            raise UsageError(f"{source} was made with other flags: {'; '.join(wrong)}")
        if state["global_step"] == 0:  # stopped while it pre-trained: half an encoder is not worth keeping
            print(f"{source} holds no transition yet: starting anew")
            return run_dir, None, None
    return run_dir, source, state


def choose_device(args: Args) -> tuple[torch.device, str, str]:
    """Device of torch, backend of the environment and precision, from the flags and what works."""
    torch_works, numba_works = probe_cuda() if args.cuda or args.backend == "cuda" else (False, False)
    device = torch.device("cuda" if args.cuda and torch_works else "cpu")
    if args.backend == "cuda" and not numba_works:
        raise UsageError("--backend cuda: no CUDA device on which a numba kernel runs")
    if args.cudagraphs and device.type != "cuda":
        raise UsageError("--cudagraphs: no CUDA device")
    backend, precision = args.backend, args.precision
    if backend == "auto":
        backend = "cuda" if numba_works and device.type == "cuda" else "cpu"
    if precision == "auto":
        has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()
        precision = "bf16" if has_bf16 else "fp32"
    return device, backend, precision


def cpu_has_bf16() -> bool:
    """bf16 matrix instructions; without them bf16 is emulated and slower than float32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, and young: absent means float32
    return any(getattr(torch.cpu, name, bool)() for name in probes)


def available_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        return int(next(line for line in open("/proc/meminfo") if line.startswith("MemAvailable")).split()[1]) * 1024
    except OSError:
        return 4 * 2**30  # no /proc: assume a small laptop


def agent_config(args: Args, market: Market) -> dict:
    """Plain values that rebuild encoder and agent from a checkpoint alone."""
    same = (
        "window", "d_model", "n_heads", "n_layers", "d_ff", "recency", "film", "fusion_width", "hidden", "dropout",
        "n_critics", "n_quantiles", "policy", "action_grid", "log_std_init", "ent_coef_min", "reward_scaling", "gamma")
    return {k: getattr(args, k) for k in same} | {
        "columns": market.n_tech, "drop": args.top_quantiles_to_drop_per_net, "alpha": parse_ent_coef(args.ent_coef)[1],
        "cost": (args.fee_bps + args.slippage_bps) * BP, "funding": args.funding_bps * BP,
        "drift": args.position_mode == "drift", "penalty": args.turnover_penalty_bps * BP}


def make_optimizers(agent: Agent, args: Args) -> dict:
    film, market = agent.extractor.film, agent.extractor.market
    groups = [
        {"params": [market.weight], "lr": args.learning_rate_fusion, "weight_decay": args.weight_decay},
        {"params": list(film.parameters()) if film else [], "lr": args.learning_rate_film},
        {"params": [market.bias, *agent.critic.parameters()], "lr": args.learning_rate}]
    optimizers = {
        "critic": torch.optim.AdamW(groups, weight_decay=0.0, fused=True),
        "actor": torch.optim.AdamW(agent.actor.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True),
        "alpha": torch.optim.Adam([agent.log_alpha], lr=args.ent_coef_lr)}
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def cpu_state(module: nn.Module) -> dict:
    return {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}


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
        run_dir, source, state = open_run(args)
        threads = args.torch_threads or os.cpu_count() or 1
        torch.set_num_threads(threads)
        nb.set_num_threads(min(threads, nb.config.NUMBA_NUM_THREADS))
        device, backend, precision = choose_device(args)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=precision == "bf16")
        random.seed(args.seed)
        np.random.seed(args.seed)  # noqa: NPY002 (other libraries draw from it)
        torch.manual_seed(args.seed)
        torch.use_deterministic_algorithms(args.torch_deterministic and device.type == "cpu")
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid: a pass over every new tensor
        torch.backends.cudnn.deterministic = args.torch_deterministic

        # data
        fitted = FeatureModel.from_state_dict(state["features"]) if state else None  # a checkpoint keeps its own fits
        market = load_market(args.data, args.split, args.window, args.fill_limit, args.seed, args.hmm, fitted)
        truth, stamps = market.bars.truth, market.bars.timestamp
        spans = "; ".join(f"{k} {b - a} bars from {str(stamps[a])[:16]}" for k, (a, b) in market.rows.items())
        print(f"{args.data}: {len(stamps)} bars, {market.n_tech} technical + {HMM_COLUMNS} HMM columns; {spans}")
        for gap in (g for g in market.bars.gaps if g["count"]):
            longest = f"longest {gap['longest_bars']} at {gap['longest_at']}"
            print(f"{gap['name']}: {gap['count']} gaps, {gap['missing_bars']} bars missing, {longest} (not filled)")
        if args.select == "expected" and not truth:
            raise UsageError("--select expected: the conditional mean is known on synthetic markets only")
        expected = args.select == "expected" or (args.select == "auto" and truth)
        by = "mean_expected_bps" if expected else "mean_reward_bps"
        config = agent_config(args, market)
        if state:
            check_dimensions(source, state["config"], config)
            if args.eval_only and args.policy != state["config"]["policy"]:
                print(f"the checkpoint's policy acts: {state['config']['policy']}")
            if args.eval_only:  # the checkpoint's agent at today's costs
                config = state["config"] | {k: config[k] for k in ("cost", "funding", "drift", "penalty")}
        borrowed = load_encoder(args.encoder, config) if args.encoder and not state else None

        # logging: metrics.jsonl is the record of truth, TensorBoard and wandb mirror it
        step0 = state["global_step"] if args.resume and state else 0
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

    # encoder: pre-trained on train rows, then frozen; every row's context is computed once
    with guard.phase("pretrain"):
        encoder = build_encoder(config).to(device)
        need = len(market.table) * args.window * args.d_model * dtype.itemsize
        free = available_memory(device)
        keep = args.embedding_cache == "auto" and need < 0.5 * free
        sizes = f"{need / 2**20:.0f} MiB in {precision}, {free / 2**20:.0f} MiB free"
        print(f"embedding cache {'on' if keep else 'off'}: {sizes}")
        contexts = Contexts(encoder, market, device, dtype, keep, partial(guard.phase, "cache"))
        mae_steps = 0
        if state:
            encoder.load_state_dict(state["encoder"])
        elif borrowed:
            encoder.load_state_dict(borrowed.state_dict())
        else:
            mae_steps = pretrain(encoder, contexts, market.rows["train"], args, autocast, guard, log)
        encoder.eval().requires_grad_(False)
        save_atomic({"config": config, "encoder": cpu_state(encoder)}, run_dir / "encoder.pt")
    # rows to evaluate on are encoded now, train rows when they are first drawn; of each no more than there is time for
    began, left = time.monotonic(), guard.remaining()
    for split, share in (("eval", 0.06), ("test", 0.12)):
        until = began + share * left
        contexts.fill(
            np.arange(*market.rows[split]), lambda t=until: guard.signal is not None or time.monotonic() > t)
    seconds, encoded = time.monotonic() - began, int(contexts.filled.sum())
    seconds_a_row = seconds / encoded if keep else 0.0
    start, stop = market.rows["train"]
    if math.isfinite(left) and seconds_a_row:
        start = max(start, stop - max(int(0.15 * left / seconds_a_row), args.num_envs))
    for split, have in (("eval", None), ("test", None), ("train", stop - start)):
        a, b = market.rows[split]
        have = int(contexts.filled[a:b].sum()) if have is None else have
        if have < b - a:
            print(f"embedding cache: only the last {have} of {b - a} {split} bars, to leave room for learning")
    train_rows = start, stop

    # agent, environment, replay
    with guard.phase("setup"):
        agent = Agent(config).to(device)
        averaged = Agent(config).to(device).eval().requires_grad_(False)  # what evaluation, checkpoints and users see
        averaged.load_state_dict(agent.state_dict())
        optimizers = make_optimizers(agent, args)
        optimizer, actor_optimizer, alpha_optimizer = optimizers.values()
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        get_critic_loss, get_actor_loss = critic_loss, actor_loss
        if args.compile:
            mode = "reduce-overhead" if args.cudagraphs else None
            get_critic_loss, get_actor_loss = (torch.compile(f, mode=mode) for f in (critic_loss, actor_loss))
        env = MarketVectorEnv(
            market, train_rows, args.num_envs, args.episode_length, args.fee_bps, args.slippage_bps, args.funding_bps,
            args.position_mode, args.turnover_penalty_bps, args.cost_randomization, args.seed, backend)
        env.reset(seed=args.seed)
        replay = Replay(args.buffer_size)
        rng = np.random.default_rng(args.seed)
        global_step = updates = drawn = vec_step = stale = 0
        best = {"score": -math.inf, "step": 0, "agent": None, "updates": 0}
        noise, averages, recent, timing, eval_seconds = None, {}, [], {"steps": 0, "seconds": 0.0}, 0.0
        learned, _ = parse_ent_coef(args.ent_coef)
        rules = config["funding"], config["drift"], config["penalty"], args.gamma, args.reward_clip
        if state:
            averaged.load_state_dict(state["agent"])
            best |= {"agent": cpu_state(averaged), "step": state["global_step"]}
        if step0:
            agent.load_state_dict(state["learner"])
            for key, o in optimizers.items():  # "lr" itself follows a schedule, but for alpha's
                names = ("base_lr", "weight_decay") + ("lr",) * (key == "alpha")
                flags = [{k: group[k] for k in names} for group in o.param_groups]
                o.load_state_dict(state["optimizers"][key])
                for group, flag_values in zip(o.param_groups, flags, strict=True):
                    group.update(flag_values)  # these may differ from the run that is continued
            env.set_state(state["env"])
            replay.set_state(state["replay"])
            rng.bit_generator.state = json.loads(state["rng_numpy"])
            torch.set_rng_state(state["rng_torch"])
            if device.type == "cuda":
                torch.cuda.set_rng_state(state["rng_cuda"])
            noise = None if state["noise"] is None else state["noise"].to(device)
            counters = ("global_step", "updates", "drawn", "vec_step", "stale")
            global_step, updates, drawn, vec_step, stale = (state[k] for k in counters)
            best, averages, recent = state["best"], state["averages"], state["recent"]
            print(f"resumed {source} at {global_step} transitions, {updates} updates")

    def save(name: str, whole: bool = False):
        """The agent alone, or everything that a resumed run needs."""
        state = {
            "schema": SCHEMA, "config": config, "args": asdict(args), "encoder": cpu_state(encoder),
            "agent": cpu_state(averaged), "features": market.features.state_dict(), "global_step": global_step,
            "updates": updates}
        if whole:
            state |= {
                "learner": cpu_state(agent), "optimizers": {k: o.state_dict() for k, o in optimizers.items()},
                "env": env.get_state(), "replay": replay.get_state(), "rng_numpy": json.dumps(rng.bit_generator.state),
                "rng_torch": torch.get_rng_state(), "noise": noise, "best": best, "drawn": drawn, "vec_step": vec_step,
                "rng_cuda": torch.cuda.get_rng_state() if device.type == "cuda" else None, "stale": stale,
                "averages": averages, "recent": recent, "log_lines": lines}
        with guard.phase("io"):
            save_atomic(state, run_dir / "checkpoints" / name)

    def evaluate_and_choose():
        """Evaluate on the eval split, log, keep the best agent."""
        nonlocal stale, eval_seconds
        began = time.monotonic()
        result, _ = evaluate(averaged, contexts, market, "eval", autocast, args, (args.policy,))
        seen = diagnose(averaged, contexts, market, "eval", autocast)
        alarm = alarms(seen, drawn, global_step, averages.get("env/clipped_rewards", 0.0))
        mine = result["agent"]
        policy_keys = ("log_std_mean", "alpha", "action_mean", "sigma", "state_dependence", "saturation", "greedy_gap",
                       "dead_units")
        record = {f"eval/eval/{k}": v for k, v in mine.items() if v is not None}
        record |= {"policy/entropy": seen["policy_entropy"]} | {f"policy/{k}": seen[k] for k in policy_keys}
        record |= {f"value/{k}": seen[k] for k in ("q_mean", "q_action_spread", "quantile_spread", "alpha_entropy")}
        record |= {f"policy/attribution_{k}": v for k, v in seen["attribution"].items()}
        log(record | {f"alarm/{k}": float(v) for k, v in alarm.items()}, global_step)
        recent.append(mine[by])
        value = mine[by] if by == "mean_expected_bps" else float(np.mean(recent[-3:]))  # one realised mean is noise
        if updates and value > best["score"]:
            best.update(score=value, step=global_step, updates=updates, agent=cpu_state(averaged))
            stale = 0
            save("best.pt")
        elif updates:
            stale += 1
        eval_seconds = time.monotonic() - began
        raised = [k for k, v in alarm.items() if v] if updates else []
        score = f"score {mine['score']:+.3f}  " if mine.get("score") is not None else ""
        print(f"{guard.elapsed():6.0f} s  {global_step:>9} transitions  {updates:>6} updates"
              f"  eval {score}{value:+.2f} bp  turnover {mine['turnover']:.3f}"
              f"  state_dependence {seen['state_dependence']:.2f}" + f"  WARNING {', '.join(raised)}" * bool(raised),
              flush=True)

    # the loop
    if not step0 and not args.eval_only:
        with guard.phase("eval"):
            evaluate_and_choose()
    saved, marked, step_marked = time.monotonic(), time.monotonic(), global_step
    while not args.eval_only and global_step < args.total_timesteps:
        pending = seconds_a_row * np.count_nonzero(~contexts.filled[slice(*train_rows)])
        if guard.should_stop(11.0 + 6.0 * eval_seconds + pending):  # report 3 s, exit 2 s, evaluations 4 of one
            break
        with guard.phase("rollout"):
            (row, _, _), (position, w_cost, cost, *_) = env.host(env.ints).copy(), env.host(env.floats).copy()
            if global_step < args.learning_starts:
                action = rng.uniform(-1, 1, args.num_envs)
            else:
                agent.eval()
                scalars = torch.from_numpy(np.stack([position, w_cost]).astype(np.float32)).to(device)[..., None]
                with torch.no_grad(), autocast():
                    mean, latent = agent.actor(agent.extractor(*contexts(row)), *scalars)
                    if noise is None or vec_step % args.sde_sample_freq == 0:
                        noise = torch.randn(latent.shape, device=device) * agent.actor.log_std.exp()
                    action = (mean + (latent * noise).sum(1)).tanh().float().cpu().numpy()
            if args.w_cost_curriculum:
                env.rules[4] = min(1.0, global_step / args.w_cost_curriculum)
            reward, terminated, truncated = env.step_lanes(action)
            end = terminated | truncated
            replay.add(row, position, action, w_cost, cost, reward, end)
            agent.watch_rewards(np.log1p(np.maximum(market.ret[row], RUIN - 1)))
            change = np.abs(action - position)
            averages |= {"env/turnover": float(change.mean()), "env/exposure": float(np.mean(action)),
                         "env/costs": float((cost * change).mean() / BP)}
            if end.any():
                averages["charts/episodic_return"] = float(env.host(env.final_floats)[4][end].mean())
                averages["charts/episodic_length"] = float(env.host(env.final_ints)[1][end].mean())
            global_step += args.num_envs
            vec_step += 1

        learning = global_step >= args.learning_starts
        if learning and args.updates_per_step:
            with guard.phase("learn"):
                if "before" not in timing:  # set-up, pre-training apart
                    timing["before"] = guard.elapsed() - guard.phases()["pretrain"]
                agent.train()
                scale, end = agent.reward_scale, args.learning_rate_end
                if args.compile:  # a number would be a constant of the graph
                    scale = torch.tensor(scale, device=device)
                cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, global_step / args.total_timesteps)))
                decay = end + (1 - end) * cosine
                for _ in range(args.updates_per_step):
                    batch = draw_batch(replay, contexts, market.ret, rng, args)
                    warm = min(1.0, (updates + 1) / max(args.warmup_updates, 1))
                    for group in optimizer.param_groups + actor_optimizer.param_groups:
                        group["lr"] = group["base_lr"] * warm * decay
                    with autocast():
                        loss, latents, stats = get_critic_loss(agent, batch, rules, scale)
                    optimizer.zero_grad()
                    loss.backward()
                    grad_norm = nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
                    optimizer.step()

                    agent.critic.requires_grad_(False)
                    with autocast():
                        policy_loss, log_prob, _ = get_actor_loss(agent, latents, batch, rules, scale)
                    actor_optimizer.zero_grad()
                    policy_loss.backward()
                    actor_optimizer.step()
                    agent.critic.requires_grad_(True)
                    if learned:
                        alpha_optimizer.zero_grad()
                        ent_coef_loss(agent.log_alpha, log_prob, args.target_entropy).backward()
                        alpha_optimizer.step()
                    torch._foreach_lerp_(list(agent.target.parameters()), list(agent.critic.parameters()), args.tau)
                    updates += 1
                    drawn += args.batch_size
                share = 1 - args.average**args.updates_per_step
                torch._foreach_lerp_(list(averaged.parameters()), list(agent.parameters()), share)
                averaged.reward_stats.copy_(agent.reward_stats)
                qf_loss, target_mean, clipped, reward_std = stats.tolist()
                if not math.isfinite(qf_loss):
                    flags = "--learning-rate or --learning-rate-fusion"
                    raise FloatingPointError(f"the critic is not finite after {updates} updates: lower {flags}")
                averages |= {
                    "losses/qf_loss": float(loss.detach()), "losses/actor_loss": float(policy_loss.detach()),
                    "losses/grad_norm": float(grad_norm), "losses/target_mean": target_mean,
                    "env/clipped_rewards": clipped, "env/reward_std": reward_std,
                    "charts/learning_rate": args.learning_rate * warm * decay}

        if learning and global_step % args.eval_interval < args.num_envs:
            steps, seconds = global_step - step_marked, max(time.monotonic() - marked, 1e-9)
            if vec_step > 16:  # the first ones compile and warm up
                timing["steps"] += steps
                timing["seconds"] += seconds
            charts = {"SPS": steps / seconds, "updates": updates, "replay_ratio": updates / global_step,
                      "samples_per_transition": drawn / global_step}
            log(averages | {f"charts/{k}": v for k, v in charts.items()}
                | {f"time/{k}": v for k, v in guard.phases().items()}, global_step)
            with guard.phase("eval"):
                evaluate_and_choose()
            marked, step_marked = time.monotonic(), global_step
            if args.patience and stale >= args.patience:
                print(f"no better agent in {stale} evaluations (--patience): stopping at {global_step} transitions")
                break
        if time.monotonic() - saved > args.checkpoint_interval:
            save("last.pt", whole=True)
            if args.keep_checkpoints:
                save(f"step_{global_step}.pt")
                rotate(run_dir / "checkpoints", args.keep_checkpoints)
            saved = time.monotonic()

    # the best agent on the eval split is what is reported
    if not args.eval_only:
        save("last.pt", whole=True)
        if best["agent"]:
            averaged.load_state_dict(best["agent"])
        if not (run_dir / "checkpoints" / "best.pt").exists():
            save("best.pt")
    with guard.phase("eval"):
        results = {}
        (run_dir / "traces").mkdir(exist_ok=True)
        for split in ("test", "eval", "train"):
            seconds = min(args.eval_timeout or math.inf, max(0.3 * guard.remaining(), 0.1))
            if split == "train" and not args.eval_only:
                until = time.monotonic() + seconds
                contexts.fill(np.arange(*train_rows), lambda t=until: time.monotonic() > t)
            limited = replace(args, eval_timeout=seconds if math.isfinite(seconds) else None)
            results[split], columns = evaluate(averaged, contexts, market, split, autocast, limited, trace=True)
            if results[split]["partial"]:
                print(f"{split}: evaluated on {columns['close'].size} of {np.ptp(market.rows[split])} bars only (time)")
            pd.DataFrame(columns).to_parquet(run_dir / "traces" / f"{split}.parquet")
        audit = diagnose(averaged, contexts, market, "eval", autocast)
        audit["overestimation"] = overestimation(averaged, contexts, market, "eval", autocast)
        audit["ridge_edge_bps"], audit["ridge_edge_se_bps"] = ridge_edge([series_of(market, averaged.costs)], LEVELS)
        audit["replay_ratio"] = updates / max(global_step, 1)
        made = state["updates"] if args.eval_only else updates
        audit["verdict"], audit["reasons"] = verdict(audit, results["eval"]["agent"], made)
        record = {"value/overestimation": audit["overestimation"]}
        for split in ("train", "test"):
            record |= {f"eval/{split}/{k}": v for k, v in results[split]["agent"].items() if v is not None}
        log(record, global_step)
    env.close()
    writer.close()
    jsonl.close()
    if args.track:
        wandb.finish()

    summary = {
        "status": guard.status, "command": shlex.join(sys.argv), "global_step": global_step, "updates": updates,
        "replay_ratio": audit["replay_ratio"], "samples_per_transition": drawn / max(global_step, 1),
        "best_step": best["step"], "best_updates": best["updates"], "selected_by": by, "mae_steps": mae_steps,
        "env_builds": MarketVectorEnv.builds, "buffer_allocations": pool.stats()["allocations"],
        "sps": timing["steps"] / timing["seconds"] if timing["seconds"] else None,
        "seconds_before_first_update": timing.get("before"),
        "eval": {s: results[s] for s in SPLITS}, "audit": audit,
        "versions": {m.__name__: m.__version__ for m in (torch, np, nb, gym)} | {"python": sys.version.split()[0]},
        "device": {"torch": str(device), "backend": backend, "precision": precision, "threads": threads,
                   "cpu_count": os.cpu_count(), "embedding_cache_bytes": need if keep else 0},
        "data": {"spec": args.data, "names": list(market.bars.names), "sha256": market.bars.sha256,
                 "bars": len(market.ret), "rows": market.rows, "gaps": list(market.bars.gaps),
                 "columns": list(market.features.columns)}}

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
    print(f"{run_dir}: summary.json" + (", report.html" if args.report else ""))
    write_summary()
    return summary | {"run_dir": str(run_dir), "exit_code": guard.exit_code}


def print_table(summary: dict):
    """Agent beside baselines, split by split."""
    from rich.console import Console
    from rich.table import Table

    done = f"{summary['status']} after {summary['global_step']} transitions, {summary['updates']} updates"
    table = Table(title=f"{summary['data']['spec']}: {done}")
    keys = ("score", "mean_expected_bps", "mean_reward_bps", "sharpe", "max_drawdown", "turnover", "exposure", "trades")
    for name in ("split", "who", *keys):
        table.add_column(name, justify="left" if name in ("split", "who") else "right")
    for split, result in summary["eval"].items():
        policies = {f"({p})": result[p] for p in CHOICES["policy"] if p in result}
        rows = {"agent": result["agent"]} | policies | result["baselines"]
        for name, metrics in rows.items():
            values = [metrics.get(k) for k in keys]
            cells = ["" if x is None else str(x) if isinstance(x, int) else f"{x:.3f}" for x in values]
            table.add_row(split if name == "agent" else "", name, *cells, end_section=name == list(rows)[-1])
    Console(width=130).print(table)


if __name__ == "__main__":
    try:
        code = main()["exit_code"]
    except (UsageError, DataError, CheckpointError, FloatingPointError) as e:
        print(f"error: {e}", file=sys.stderr)
        code = 1 if isinstance(e, FloatingPointError) else 2
    except OSError as e:  # a full disk under a log, a folder that went away
        print(f"error: {e.filename or 'writing the run directory'}: {e.strerror}", file=sys.stderr)
        code = 2
    sys.exit(code)
