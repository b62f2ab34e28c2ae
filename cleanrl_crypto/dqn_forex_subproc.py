r"""Trades currency pairs with DQN: many lanes step in worker processes over shared memory, or in this one.

On a laptop: four embedded pairs whose best policy is known, a minute on 2 cores, test score .92 to .96 of the optimum:

    python cleanrl_crypto/dqn_forex_subproc.py --timeout 120

Real bars, {DIR}/{SYMBOL}*.parquet, spread in pips or from a file (timestamp, one column of price units a symbol):

    python cleanrl_crypto/dqn_forex_subproc.py --data-dir data/forex --symbols EURUSD GBPUSD USDJPY USDCHF \
        --spread-file data/forex/spread_1h.parquet --weekend flat --timeout 300

How the lanes step is measured at the start; or say it. The trajectories are the same in every mode:

    python cleanrl_crypto/dqn_forex_subproc.py --vec-mode subproc --num-workers 4 --async-halves --timeout 120

Any Gymnasium environment with a Box and a Discrete space, one a lane, learned by plain DQN:

    python cleanrl_crypto/dqn_forex_subproc.py --env-fn my_module:make_env --num-envs 8 --total-timesteps 60000

GPU, Kaggle: a GPU is used where a probe shows that it works, for the lanes too.

    python cleanrl_crypto/dqn_forex_subproc.py --data-dir /kaggle/input/forex --run-dir /kaggle/working/run \
        --timeout 3600

Resume after whatever ended the run (the same command starts and continues it), or evaluate a checkpoint:

    python cleanrl_crypto/dqn_forex_subproc.py --run-dir runs/fx --resume auto
    python cleanrl_crypto/dqn_forex_subproc.py --eval-only --checkpoint runs/fx/checkpoints/best.pt

Use the agent in another program, from its checkpoint alone:

    from cleanrl_crypto.dqn_forex_subproc import load_policy
    policy = load_policy("runs/fx/checkpoints/best.pt")
    action = policy(obs)  # (B, columns + 3) as the environment gives them -> (B,) 0 short, 1 flat, 2 long

The default is not textbook DQN: as the market does not answer to one small trader, every stored row is trained at
every position and action (--all-actions). Plain DQN is --no-all-actions; docs/dqn_forex_subproc.md compares them.

Every flag: --help. Every metric, and what to do when it is off: docs/dqn_forex_subproc.md
"""
import gc
import importlib
import json
import math
import multiprocessing as mp
import os
import random
import shlex
import signal
import struct
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import connection
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
from llvmlite import ir
from numba import cuda, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch.utils.tensorboard import SummaryWriter

try:
    from common import markets
    from common.cli import UsageError, check, flag, parse_args
    from common.data import Bars, DataError, load_bars, split_rows
    from common.features import ColumnModel, fit_columns
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
LEVELS = np.array([-1.0, 0.0, 1.0])  # positions: short, flat, long
HORIZON = 1  # bars between a decision and the end of its reward
EMBARGO = 24  # bars left out between splits beside the horizon
ROLLOVER = 22  # hour UTC at which a position is carried to the next day (17:00 in New York in winter)
WEEKEND_HOURS = 24  # a longer step between two bars is a market that was closed
SPREAD_PIPS = {"EURUSD": 1.6, "GBPUSD": 1.9, "USDJPY": 1.5, "USDCHF": 1.9}  # hourly medians of a retail broker, 2021-24
SYNTHETIC_COST = 0.2  # of the bar's sigma, per unit of change: DOMAIN's hard case, where a sign policy earns little
RUIN = 1e-6  # floor of a bar's growth and of what a fee leaves
LOST = 3e-6  # growth at which the episode terminates: above RUIN, a fee may hit the floor in a rising bar
STEP, FIRST, NEXT, SHOW = range(4)  # what a kernel does to its lanes
RET, COST, SWAP_LONG, SWAP_SHORT, FOREIGN, NEW_DAY, FLAT, LAST = range(8)  # columns of a bar: one cache line
EPISODE = ("r", "l", "drawdown", "turnover", "sharpe_ratio", "max_drawdown")  # rows of `stats`
# imported once by the fork server, shared by every worker
PRELOAD = ("numpy", "numba", "pandas", "torch", "torch.utils.tensorboard", "gymnasium", "tyro",
           "cleanrl_crypto.dqn_forex_subproc")
FORK_SERVER = "CLEANRL_CRYPTO_FORK_SERVER"  # in the environment of the fork server and of what it starts
ATTEMPTS = 3  # restarts of a worker without a step between them
START_SECONDS = 60.0  # for a worker to import this file and to build its environments
MESSAGE = struct.Struct("<BBBqq")  # mode, half, parity, first lane, end lane
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
    """evaluate --checkpoint and stop"""
    checkpoint: str | None = None
    """checkpoint for --eval-only"""

    # data
    data: str | None = None
    """synthetic:{signal,regime,noise,drift}[?bars=N&seed=K&...] or files, one a pair (None: synthetic:signal)"""
    data_dir: str | None = None
    """folder of {SYMBOL}*.parquet, in place of --data"""
    symbols: tuple[str, ...] = ("EURUSD", "GBPUSD", "USDJPY", "USDCHF")
    """pairs with the dollar on one side; on synthetic markets mere names of independent paths of one law"""
    feature_cols: tuple[str, ...] = (
        "rsi_14", "ema_10", "ema_20", "macd", "atr_14", "ret_1", "log_volume", "volume_z_24", "log_range",
        "log_range_24", "hour_sin", "hour_cos")
    """columns by name: docs/dqn_forex_subproc.md lists them; scaled on train rows, clipped at 5"""
    split: str = "0.70/0.15/0.15"
    """train/eval/test as fractions of the rows, or the first days of eval and test: 2023-01-01/2024-01-01"""

    # environment
    num_envs: int | None = None
    """lanes; lane i trades symbol i modulo their number (None: 1024, with --env-fn 8)"""
    vec_mode: str = "auto"
    """single (one kernel, all threads), dummy (blocks in turn), subproc (worker processes), auto: the fastest here"""
    num_workers: int | None = None
    """worker processes, or blocks of dummy (None: measured by auto, else one a core)"""
    async_halves: bool = False
    """two halves of the lanes in flight: one steps while the other is told what to do"""
    rescale: bool = False
    """subproc: at evaluations, measure one worker more and one less, keep the fastest"""
    on_worker_death: str = "fail"
    """fail, or restart: a worker that died is replaced and its lanes go on exactly; a custom episode is truncated"""
    worker_timeout: float = 4.0
    """**seconds** after which a worker that does not answer is taken for dead"""
    env_fn: str | None = None
    """module:factory of a custom environment (Box, Discrete), one a lane, in place of the market; plain DQN"""
    episode_length: int = 128
    """**bars** after which an episode is truncated"""
    leverage: float = 1.0
    """notional over equity of a long or short position"""
    initial_balance: float = 100_000.0
    """account currency (USD)"""
    position_mode: str = "rebalance"
    """rebalance: notional stays at equity x leverage; drift: units stay the same until the target changes"""
    spread_pips: tuple[float, ...] = ()
    """**pips**, one for all or one a symbol, half paid a side (empty: what is typical of four majors); real bars"""
    spread_file: str | None = None
    """parquet with timestamp and one column of spread (**price units**) a symbol, in place of --spread-pips"""
    commission_bps: float = 0.0
    """**bp** of notional a side"""
    cost_bps: float | None = None
    """**bp** of notional a side on synthetic markets, commission apart (None: 0.2 sigma)"""
    swap_long_bps: float = 0.0
    """**bp** of notional that a long pays a night (negative: receives), counted at 22:00 UTC, weekend nights too"""
    swap_short_bps: float = 0.0
    """the same for a short"""
    weekend: str = "hold"
    """hold: positions stay open over closed hours, the gap's return and nights are booked; flat: closed before them"""
    daily_drawdown: float = 0.0
    """share of the day's first equity whose loss ends the episode, 0 = no limit; needs --no-all-actions"""
    monitor: bool = True
    """write monitor.csv, a line an episode (Stable-Baselines3's format)"""

    # algorithm
    total_timesteps: int = 2_000_000
    """environment transitions (the sum over lanes)"""
    learning_starts: int = 16_384
    """transitions with uniform random actions before the first update"""
    buffer_size: int = 1_000_000
    """transitions kept (row indices and lane scalars: 28 bytes each)"""
    batch_size: int = 2048
    """transitions drawn for an update"""
    updates_per_step: int = 4
    """gradient updates a vector step"""
    train_frequency: int = 1
    """vector steps between updates"""
    all_actions: bool = True
    """train every position and action on each drawn row (the market is exogenous); --no-all-actions: plain DQN"""
    double_q: bool = True
    """the online network chooses the next action, the target network judges it"""
    dueling: bool = False
    """value and advantage heads"""
    n_step: int = 1
    """transitions whose rewards are summed before the bootstrap; above 1 needs --no-all-actions"""
    gamma: float = 0.95
    """discount a transition"""
    tau: float = 0.01
    """weight of the online network when the target network is updated (1: a hard copy)"""
    target_network_frequency: int = 1
    """updates between updates of the target network"""
    start_e: float = 1.0
    """first probability of a random action"""
    end_e: float = 0.05
    """last probability of a random action"""
    exploration_fraction: float = 0.3
    """share of --total-timesteps over which it falls"""
    learning_rate: float = 3e-4
    """Adam with decoupled weight decay; falls to 2 % by a cosine"""
    weight_decay: float = 0.3
    """AdamW"""
    hidden: int = 32
    """units of each of the two hidden layers"""
    max_grad_norm: float = 10.0
    """gradient clipping"""
    average: float = 0.999
    """decay an update of the averaged weights that evaluation and checkpoints use (0: the last weights)"""
    reward_scaling: bool = True
    """divide rewards by the running standard deviation of a full position's reward (saved with the agent)"""

    # evaluation and runtime
    eval_interval: int = 262_144
    """transitions between evaluations on the eval split"""
    eval_episodes: int = 100
    """episodes of an evaluation of a custom environment"""
    patience: int = 0
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
    report: bool = True
    """write report.html at the end"""

    def __post_init__(self):
        check(self, CHOICES, RANGES)
        market = self.env_fn is None
        for wrong, why in (
            (self.data and self.data_dir, f"--data {self.data} and --data-dir {self.data_dir}: give one of them"),
            (self.env_fn and (self.data or self.data_dir), "--env-fn takes the place of --data and --data-dir"),
            (not self.symbols, "--symbols: at least one"),
            (len(set(self.symbols)) < len(self.symbols), f"--symbols {' '.join(self.symbols)}: one is named twice"),
            (self.spread_pips and self.spread_file, "--spread-pips and --spread-file: give one of them"),
            (any(not 0 <= s <= 1000 for s in self.spread_pips), f"--spread-pips {self.spread_pips}: must be 0 to 1000"),
            (self.eval_only != (self.checkpoint is not None), "--eval-only and --checkpoint PATH go together"),
            (self.resume == "auto" and self.run_dir is None,
             "--resume auto needs --run-dir, the folder of the run to continue"),
            (market and self.all_actions and self.n_step > 1,
             f"--n-step {self.n_step} needs --no-all-actions: targets of all actions are one step long"),
            (max(self.buffer_size // (self.num_envs or (1024 if market else 8)), 2) < self.n_step,
             f"--buffer-size {self.buffer_size} holds fewer than --n-step {self.n_step} transitions of every lane"),
            (market and self.all_actions and self.daily_drawdown > 0,
             f"--daily-drawdown {self.daily_drawdown} needs --no-all-actions: its end depends on the path"),
            (self.end_e > self.start_e, f"--end-e {self.end_e} is above --start-e {self.start_e}"),
            (self.rescale and self.vec_mode != "subproc", f"--rescale needs --vec-mode subproc, not {self.vec_mode}"),
            (self.rescale and not market, "--rescale: custom environments live in their worker"),
        ):
            if wrong:
                raise ValueError(why)


CHOICES = {
    "wandb_mode": ("online", "offline", "disabled"), "position_mode": ("rebalance", "drift"),
    "vec_mode": ("auto", "single", "dummy", "subproc"), "on_worker_death": ("fail", "restart"),
    "weekend": ("hold", "flat"), "select": ("auto", "expected", "realised"), "backend": ("auto", "cpu", "cuda"),
}
RANGES = {name: (low, high) for low, high, names in (  # of numeric flags, both ends allowed
    (0, 1, "start_e end_e exploration_fraction learning_rate weight_decay"), (0, 2**32 - 1, "seed"),
    (0, 0.9999, "gamma"), (0, 0.99999, "average"), (0, 0.99, "daily_drawdown"), (1e-6, 1, "tau"),
    (0, 1000, "commission_bps cost_bps"), (-100, 100, "swap_long_bps swap_short_bps"), (0.01, 100, "leverage"),
    (1e-6, 1e12, "initial_balance max_grad_norm"), (0, 10**6, "keep_checkpoints patience"),
    (0, 1e9, "checkpoint_interval"),
    (0, 4096, "updates_per_step"), (0, 10**12, "total_timesteps learning_starts"), (1, 1000, "n_step"),
    (1, 10**6, "num_envs batch_size episode_length eval_episodes train_frequency target_network_frequency"),
    (1, 4096, "hidden num_workers torch_threads"), (1, 10**9, "buffer_size"), (1, 10**12, "eval_interval"),
    (1, 1e9, "timeout"), (0.1, 1e9, "eval_timeout worker_timeout"),
) for name in names.split()}
# flags that shape the agent or the data: a resumed run must agree on them
SHAPING = (
    "seed", "data", "data_dir", "symbols", "feature_cols", "split", "num_envs", "env_fn", "episode_length", "leverage",
    "initial_balance", "position_mode", "spread_pips", "spread_file", "commission_bps", "cost_bps", "swap_long_bps",
    "swap_short_bps", "weekend", "daily_drawdown", "all_actions", "dueling", "n_step", "gamma", "hidden",
    "reward_scaling", "buffer_size",
)


# ------------------------------------------------------------------------------------------------------ data
def load_series(args: Args) -> list[Bars]:
    """Bars of every pair, and its name in bars.names[0]. Raises DataError, UsageError (one line)."""
    if args.data_dir:
        paths = []
        for symbol in args.symbols:
            found = sorted(Path(args.data_dir).glob(f"{symbol}*.parquet"))
            if len(found) != 1:
                what = "no file" if not found else f"{len(found)} files, {', '.join(p.name for p in found[:3])}"
                raise UsageError(f"--data-dir {args.data_dir}: {what} matching {symbol}*.parquet, need exactly one")
            paths.append(found[0])
        return [load_bars(str(path)) for path in paths]
    spec = args.data or "synthetic:signal"
    if not spec.startswith(markets.PREFIX):
        return [load_bars(path) for path in spec.split(",")]
    try:
        seed = markets.parse_law(spec).seed
    except ValueError as e:
        raise UsageError(f"--data {e}") from e
    base, _, query = spec.partition("?")
    others = [pair for pair in query.split("&") if pair and not pair.startswith("seed=")]
    seeds = [seed * len(args.symbols) + k for k in range(len(args.symbols))]  # independent paths of one law
    return [load_bars(f"{base}?{'&'.join([*others, f'seed={k}'])}") for k in seeds]


def account_return(symbol: str, close: np.ndarray) -> tuple[np.ndarray, bool]:
    """Next bar's return (T,) per unit of long notional in USD, 0 in the last row; and whether USD is the base.

    XXXUSD: u units bought at P earn u (P' - P) dollars, notional u P. USDXXX: u dollars earn u (P' - P) XXX, which are
    u (P' - P) / P' dollars.
    """
    if len(symbol) != 6 or "USD" not in (symbol[:3], symbol[3:]):
        raise UsageError(f"--symbols {symbol}: must be XXXUSD or USDXXX, the account is in USD")
    inverse = symbol.startswith("USD")
    earned = np.diff(close) / (close[1:] if inverse else close[:-1])
    return np.append(earned, 0.0), inverse


def spreads(args: Args, symbols, series: list[Bars]) -> list[np.ndarray]:
    """Spread of every bar in price units, an array (T,) a symbol."""
    if args.spread_file:
        what = f"--spread-file {args.spread_file}"
        try:
            table = pd.read_parquet(args.spread_file)
        except (OSError, ValueError) as e:
            raise DataError(f"{what}: {str(e).splitlines()[0]}") from e
        missing = [name for name in ("timestamp", *symbols) if name not in table]
        if missing:
            raise DataError(f"{what}: no column {', '.join(missing)}")
        for name in ("timestamp", *symbols):
            try:
                column = table[name]
                table[name] = pd.to_datetime(column, utc=True) if name == "timestamp" else column.astype(float)
            except (ValueError, TypeError) as e:
                raise DataError(f"{what}: column {name}: {str(e).splitlines()[0]}") from e
        twice = table["timestamp"][table["timestamp"].duplicated()]
        if len(twice):
            raise DataError(f"{what}: column timestamp: {twice.iloc[0]} is there twice")
        table = table.set_index(table["timestamp"].dt.tz_convert(None).astype("datetime64[ns]"))
        out = []
        for symbol, bars in zip(symbols, series):
            spread = table[symbol].reindex(bars.timestamp).to_numpy(np.float64)
            bad = np.flatnonzero(~(spread >= 0) | ~np.isfinite(spread))
            if len(bad):
                at = np.datetime_as_string(bars.timestamp[bad[0]], "m")
                raise DataError(f"--spread-file {args.spread_file}: {symbol} at {at}Z is {spread[bad[0]]}, must be >= 0"
                                f" ({len(bad)} bars)")
            out.append(spread)
        return out
    pips = args.spread_pips
    if not pips:
        unknown = [s for s in symbols if s not in SPREAD_PIPS]
        if unknown:
            raise UsageError(f"--spread-pips: no typical spread is known for {', '.join(unknown)}; give one a symbol")
        pips = [SPREAD_PIPS[s] for s in symbols]
    if len(pips) not in (1, len(symbols)):
        raise UsageError(f"--spread-pips: {len(pips)} values for {len(symbols)} symbols")
    pips = np.broadcast_to(pips, len(symbols))
    return [np.full(len(b.close), p * (1e-2 if s.endswith("JPY") else 1e-4)) for s, b, p in zip(symbols, series, pips)]


def load_pairs(args: Args, models: list[ColumnModel] | None = None) -> "Pairs":
    """Bars -> columns, returns, splits; fitted on train rows unless `models` are given. DataError, UsageError."""
    series = load_series(args)
    synthetic = series[0].truth is not None
    if synthetic or args.data_dir:
        symbols = args.symbols
    else:
        symbols = tuple(b.names[0][:6] for b in series)
    twice = [name for i, name in enumerate(symbols) if name in symbols[:i]]
    for wrong, why in (
        (twice, f"--data {args.data}: two files for {', '.join(twice)}"),
        (models and len(models) != len(series),
         f"--symbols: {len(series)} pairs, not the checkpoint's {len(models or ())}"),
        (synthetic and (args.spread_pips or args.spread_file), "--spread-pips: synthetic pairs take --cost-bps"),
        (not synthetic and args.cost_bps is not None, "--cost-bps: real pairs take --spread-pips or --spread-file"),
    ):
        if wrong:
            raise UsageError(why)
    wide = [None] * len(series) if synthetic else spreads(args, symbols, series)
    parts, rows, fitted, start = [], {split: [] for split in SPLITS}, [], 0
    for k, (symbol, bars) in enumerate(zip(symbols, series)):
        t = len(bars.close)
        try:
            train_stop = split_rows(bars.timestamp, args.split, HORIZON + EMBARGO)["train"][1]
            model = models[k] if models else fit_columns(bars, args.feature_cols, train_stop)
            columns = model.transform(bars)
        except DataError:
            raise
        except ValueError as e:
            raise (UsageError if "feature" in str(e) else DataError)(f"--feature-cols: {e}") from e
        for split, (a, b) in split_rows(bars.timestamp, args.split, HORIZON + EMBARGO, first=model.warmup).items():
            rows[split].append((start + a, start + b))
        if synthetic:  # quoted in account currency, a whole spread of 2 costs
            sigma = min(bars.truth.law.sigma)
            side = SYNTHETIC_COST * sigma if args.cost_bps is None else args.cost_bps * BP
            cost, (earned, inverse) = np.full(t, side), account_return("XXXUSD", bars.close)
        else:
            earned, inverse = account_return(symbol, bars.close)
            cost = 0.5 * wide[k] / bars.close
        cost = cost + args.commission_bps * BP
        step = np.diff(bars.timestamp).astype("timedelta64[s]").astype(np.int64)
        length = np.median(step)
        closed = np.append(step >= WEEKEND_HOURS * 3600, False)
        close_at = bars.timestamp.astype("datetime64[s]").astype(np.int64) + int(length)
        night = (close_at - ROLLOVER * 3600) // 86_400
        nights = np.append(np.diff(night), 0)
        parts.append({
            "table": np.column_stack([columns, cost / BP]).astype(np.float32), "ret": earned, "cost": cost,
            "expected": bars.truth.expected if synthetic else np.full(t, np.nan),
            "swap": np.stack([nights * args.swap_long_bps, nights * args.swap_short_bps]) * BP,
            "flat": closed & (args.weekend == "flat"), "day": night.astype(np.int32), "inverse": inverse})
        fitted.append(model)
        start += t
    join = {k: np.concatenate([p[k] for p in parts], axis=-1 if k == "swap" else 0) for k in parts[0] if k != "inverse"}
    return Pairs(
        names=tuple(symbols), rows={k: np.array(v, np.int64) for k, v in rows.items()},
        inverse=np.array([p["inverse"] for p in parts]), series=series, models=fitted, **join)


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


@nb.njit(error_model="numpy", cache=True)
def trade_nb(last, held, target, ret, cost, swap_long, swap_short, foreign, leverage, drift):
    """One decision and the bar it earns: ONE lane, all scalars.

    last, target: positions -1, 0, 1 before and now; held: exposure before the trade over leverage (drifted in drift
    mode); ret: return of the next bar per unit of long exposure; cost, swap_*: shares of notional; foreign: return in
    account currency of the pair's foreign currency, ret for XXXUSD and -ret for USDXXX.
    Rebalanced: equity *= (1 - cost leverage |target - held|) (1 + x ret - |x| swap), x = target * leverage. Drifting:
    what is held are f units of the foreign currency, worth +-x of equity; they change only when the target does, then
    to what is worth x of the equity AFTER the fee: fee = cost |y - x| / (1 + cost y sign(y - x)) from exposure x to y.
    After the bar f is worth (1 + foreign) as much and equity g times: x' = x (1 + foreign) / g, for both kinds of pair.
    Returns (factor of equity, exposure over leverage at the next decision, |change of position|).
    """
    change, fee, x = abs(target - held), 0.0, target * leverage
    if drift and target == last:
        change, x = 0.0, held * leverage
    else:
        fee = cost * leverage * change
        if drift:
            fee /= 1.0 + cost * x * (1.0 if target > held else -1.0)
    growth = 1.0 + x * ret - (x * swap_long if x > 0.0 else -x * swap_short)
    growth = growth if growth > RUIN else RUIN  # Numba's CUDA target does not know max()
    left = 1.0 - fee if 1.0 - fee > RUIN else RUIN
    after = x * (1.0 + foreign) / growth / leverage if drift else np.float64(target)
    return left * growth, after, change


@nb.njit(error_model="numpy", cache=True)
def log_nb(x):
    """log(x) to 1e-15 of itself; near 1, where factors of equity are, by the series of atanh, in line."""
    d = x - 1.0
    if not -0.02 < d < 0.02:
        return math.log(x)
    z = d / (2.0 + d)
    y = z * z
    return 2.0 * z * (1.0 + y * (1 / 3 + y * (1 / 5 + y * (1 / 7 + y / 9))))


def lane_py(i, mode, action, table, bars, rows, law, rules, ints, floats, new_ints, new_floats, obs, reward, flags, row,
            position, final_obs, final_row, stats):
    """Lane i from one state buffer to the other: a step, or (mode) a first or a next episode, or only its observation.

    The source is never written: a step that was interrupted is redone from it, exactly.
    law: (3,) length, seed, restarts (users' environments need them). rules: (5,) leverage, drift, daily drawdown limit,
    initial balance, bars a year. ints (4, N): row, clock, episode, position. floats (8, N): exposure over leverage,
    equity, its peak, its value at the start of the trading day, largest drawdown, and the episode's sums of reward,
    reward**2 and |change of position|. flags (2, N): terminated, truncated. final_*, stats: of the episode that ended,
    written whenever a flag is set.
    """
    columns = obs.shape[1] - 2  # the table's rows are padded
    t, clock, episode, last = ints[0, i], ints[1, i], ints[2, i], ints[3, i]
    held, equity, peak, day_start, worst = floats[0, i], floats[1, i], floats[2, i], floats[3, i], floats[4, i]
    total, squares, turnover = floats[5, i], floats[6, i], floats[7, i]
    done = False
    if mode == STEP:
        target = action[i] - 1 if bars[t, FLAT] == 0.0 else 0
        factor, held, change = trade_nb(last, held, target, bars[t, RET], bars[t, COST], bars[t, SWAP_LONG],
                                        bars[t, SWAP_SHORT], bars[t, FOREIGN], rules[0], rules[1] != 0.0)
        growth = log_nb(factor)
        equity *= factor
        peak = equity if equity > peak else peak
        if equity < peak * (1.0 - worst):  # a division costs more than the test
            worst = 1.0 - equity / peak
        total += growth
        squares += growth * growth
        turnover += change
        terminated = factor <= LOST or (rules[2] > 0.0 and equity <= day_start * (1.0 - rules[2]))
        day_start = equity if bars[t, NEW_DAY] != 0.0 else day_start
        t, clock, last = t + 1, clock + 1, target
        truncated = not terminated and (clock >= law[0] or bars[t - 1, LAST] != 0.0)
        reward[i] = growth
        flags[0, i], flags[1, i] = terminated, truncated
        done = terminated or truncated
        if done:
            for k in range(columns):
                final_obs[i, k] = table[t, k]
            final_obs[i, columns] = held
            final_obs[i, columns + 1] = equity / day_start - 1.0
            final_row[i] = t
            mean = total / clock
            variance = squares / clock - mean * mean
            stats[0, i], stats[1, i], stats[2, i], stats[3, i] = total, clock, 1.0 - equity / peak, turnover / clock
            # a constant reward leaves a variance of rounding errors
            stats[4, i] = mean * math.sqrt(rules[4] / variance) if variance > 1e-12 * mean * mean else 0.0
            stats[5, i] = worst
    if done or mode == FIRST or mode == NEXT:
        episode = 0 if mode == FIRST else episode + 1
        symbol = i % rows.shape[0]
        start, stop = rows[symbol, 0], rows[symbol, 1]
        t, clock, last = start + np.int64(uniform_nb(law[1], i, episode, 0) * (stop - start)), 0, 0
        equity = rules[3]
        peak, day_start = equity, equity
        held, worst, total, squares, turnover = 0.0, 0.0, 0.0, 0.0, 0.0
    new_ints[0, i], new_ints[1, i], new_ints[2, i], new_ints[3, i] = t, clock, episode, last
    new_floats[0, i], new_floats[1, i], new_floats[2, i], new_floats[3, i] = held, equity, peak, day_start
    new_floats[4, i], new_floats[5, i], new_floats[6, i], new_floats[7, i] = worst, total, squares, turnover
    row[i], position[i] = t, last
    for k in range(columns):
        obs[i, k] = table[t, k]
    obs[i, columns] = held
    obs[i, columns + 1] = equity / day_start - 1.0


# arrays are borrowed for a call: counting references to 18 of them for every lane would cost more than the lane
FAST = {"error_model": "numpy", "_nrt": False}
lane_nb = nb.njit(forceinline=True, **FAST)(lane_py)
AHEAD = 12  # lanes: by then the row that a lane will read has come from memory


@intrinsic
def prefetch(context, array, row, column):
    """Begin to load array[row, column] into the cache; reads nothing, so it may point past what will be needed."""
    def generate(context, builder, signature, args):
        kind, word = signature.args[0], ir.IntType(32)
        values = context.make_array(kind)(context, builder, args[0])
        address = cgutils.get_item_pointer(context, builder, kind, values, args[1:], wraparound=False)
        address = builder.bitcast(address, ir.IntType(8).as_pointer())
        load = ir.FunctionType(ir.VoidType(), [address.type, word, word, word])
        load = cgutils.get_or_insert_function(builder.module, load, "llvm.prefetch.p0i8")
        builder.call(load, [address, word(0), word(3), word(1)])  # to read, into all caches, data
        return context.get_dummy_value()

    return types.void(array, row, column), generate


@nb.njit(forceinline=True, **FAST)
def announce(j, hi, ints, bars, table):
    """Lanes lie anywhere in the tables: without this a step waits for memory more than it computes."""
    t = ints[0, j if j < hi else hi - 1]
    prefetch(bars, t, 0)
    prefetch(table, t + 1, 0)


@nb.njit(cache=True, **FAST)
def step_block(lo, hi, mode, action, table, bars, rows, law, rules, ints, floats, new_ints, new_floats, obs, reward,
               flags, row, position, final_obs, final_row, stats):
    """Lanes lo to hi on this thread: the arguments of lane_py after the lanes."""
    for i in range(lo, hi):
        announce(i + AHEAD, hi, ints, bars, table)
        lane_nb(i, mode, action, table, bars, rows, law, rules, ints, floats, new_ints, new_floats, obs, reward, flags,
                row, position, final_obs, final_row, stats)


@nb.njit(parallel=True, cache=True, **FAST)
def step_cpu(lo, hi, mode, action, table, bars, rows, law, rules, ints, floats, new_ints, new_floats, obs, reward,
             flags, row, position, final_obs, final_row, stats):
    """step_block on all threads."""
    for i in nb.prange(lo, hi):
        announce(i + AHEAD, hi, ints, bars, table)
        lane_nb(i, mode, action, table, bars, rows, law, rules, ints, floats, new_ints, new_floats, obs, reward, flags,
                row, position, final_obs, final_row, stats)


def cuda_step():
    """The same lane on the GPU: a kernel with step_block's arguments, one thread a lane."""
    lane = cuda.jit(device=True)(lane_py)

    @cuda.jit
    def step_cuda(lo, hi, mode, action, table, bars, rows, law, rules, ints, floats, new_ints, new_floats, obs, reward,
                  flags, row, position, final_obs, final_row, stats):
        i = lo + cuda.grid(1)
        if i < hi:
            lane(i, mode, action, table, bars, rows, law, rules, ints, floats, new_ints, new_floats, obs, reward, flags,
                 row, position, final_obs, final_row, stats)

    return step_cuda


# ------------------------------------------------------------------------------------------------ environment
@dataclass
class Pairs:
    """What lanes walk over: one static table, the rows of symbol after symbol. Row t earns the bar to row t + 1."""

    names: tuple[str, ...]  # S symbols
    table: np.ndarray  # (R, F) float32 features
    ret: np.ndarray  # (R,) float64 next bar's return per unit of long exposure, account currency: see `inverse`
    expected: np.ndarray  # (R,) float64 its conditional mean, NaN on real bars
    cost: np.ndarray  # (R,) float64 share of notional paid per unit of |change of exposure|: half spread + commission
    swap: np.ndarray  # (2, R) float64 share of notional that a long, a short pays until the next row
    flat: np.ndarray  # (R,) bool: the target is forced to 0 at this row
    day: np.ndarray  # (R,) int32 trading day
    rows: dict[str, np.ndarray]  # split -> (S, 2) int64 half-open decision rows of each symbol
    series: list[Bars]  # of each symbol
    models: list[ColumnModel]  # what made its columns
    inverse: np.ndarray  # (S,) bool: USDXXX in a USD account, ret = 1 - P/P'; else XXXUSD, ret = P'/P - 1

    def bars(self, split: str) -> np.ndarray:
        """(R, 8) float64: what a step reads of its row; LAST marks the split's last decision row of each symbol."""
        first = np.min([rows[:, 0] for rows in self.rows.values()], axis=0)
        symbol = np.searchsorted(first, np.arange(len(self.ret)), side="right") - 1
        bars = np.zeros((len(self.ret), 8))
        for column, values in ((RET, self.ret), (COST, self.cost), (SWAP_LONG, self.swap[0]), (FLAT, self.flat),
                               (SWAP_SHORT, self.swap[1]),
                               (FOREIGN, np.where(self.inverse[symbol.clip(0)], -self.ret, self.ret))):
            bars[:, column] = values
        bars[:-1, NEW_DAY] = self.day[1:] != self.day[:-1]
        bars[np.asarray(self.rows[split])[:, 1] - 1, LAST] = 1.0
        return bars


class WorkerError(RuntimeError):
    """A worker failed; `worker` is its number, `lanes` its (first, end) of each half, `why` its traceback or fate."""

    def __init__(self, worker: int, lanes: list[tuple[int, int]], why: str):
        self.worker, self.lanes, self.why = worker, lanes, why
        super().__init__(f"worker {worker}, lanes {' and '.join(f'{lo}-{hi - 1}' for lo, hi in lanes)}: {why}")


def shapes(pairs_shape: tuple, symbols: int, n: int, width: int) -> dict[str, tuple]:
    """name -> (shape, dtype) of everything that the processes of an environment share; the first four are static.

    A row of the table fills whole cache lines, of 16 float32."""
    r, f = pairs_shape
    m = n + (72 - n) % 512  # rows of state a power of two apart would share cache sets
    return {
        "table": ((r, -(-f // 16) * 16), np.float32), "bars": ((r, 8), np.float64), "rows": ((symbols, 2), np.int64),
        "rules": ((5,), np.float64), "law": ((3,), np.int64), "action": ((n,), np.int64),
        "ints": ((2, 4, m), np.int64), "floats": ((2, 8, m), np.float64), "obs": ((n, width), np.float32),
        "reward": ((n,), np.float64), "flags": ((2, n), np.bool_), "row": ((n,), np.int64),
        "position": ((n,), np.int8), "final_obs": ((n, width), np.float32), "final_row": ((n,), np.int64),
        "stats": ((len(EPISODE), n), np.float64), "lost": ((n,), np.uint8)}


def carve(raw, layout: dict[str, tuple]) -> dict[str, np.ndarray]:
    """Arrays (views) of a layout in a block of shared memory, each at a multiple of 64 bytes."""
    block, arrays = np.frombuffer(raw, np.uint8), {}
    at = -block.ctypes.data % 64
    for name, (shape, dtype) in layout.items():
        arrays[name] = np.frombuffer(raw, dtype, math.prod(shape), at).reshape(shape)
        at += -(-arrays[name].nbytes // 64) * 64
    return arrays


def kernel_arguments(a: dict) -> list[tuple]:
    """The kernels' arguments after (lo, hi, mode), for a step from state buffer 0 and from buffer 1."""
    static = [a[k] for k in ("action", "table", "bars", "rows", "law", "rules")]
    out = [a[k] for k in ("obs", "reward", "flags", "row", "position", "final_obs", "final_row", "stats")]
    return [(*static, a["ints"][p], a["floats"][p], a["ints"][1 - p], a["floats"][1 - p], *out) for p in (0, 1)]


def make_user_env(env_fn: str) -> gym.Env:
    """`module:factory` -> factory(). ValueError for a spec, an environment or spaces that do not fit."""
    module, _, factory = env_fn.partition(":")
    if not module or not factory:
        raise ValueError(f"--env-fn {env_fn}: must be module:factory")
    if os.getcwd() not in sys.path:  # a script's own folder is on the path, the user's is not
        sys.path.insert(0, os.getcwd())
    make = getattr(importlib.import_module(module), factory, None)
    if make is None:
        raise ValueError(f"--env-fn {env_fn}: {module} has no {factory}")
    env = make()
    if not isinstance(env, gym.Env):
        raise ValueError(f"--env-fn {env_fn}: returned {type(env).__name__}, not a gymnasium.Env")
    obs, action = env.observation_space, env.action_space
    if not isinstance(obs, gym.spaces.Box) or not isinstance(action, gym.spaces.Discrete):
        raise ValueError(f"--env-fn {env_fn}: needs a Box and a Discrete space, has {obs} and {action}")
    return env


class UserEnvs:
    """A user's environments, one a lane, stepped one after the other into the same arrays as the kernel's lanes."""

    def __init__(self, env_fn: str, lanes, arrays: dict, n_actions: int):
        self.a, self.envs = arrays, {i: make_user_env(env_fn) for i in lanes}
        for i, env in self.envs.items():
            size, n = math.prod(env.observation_space.shape), int(env.action_space.n)
            if (size, n) != (arrays["obs"].shape[1], n_actions):
                expected = f"{arrays['obs'].shape[1]} and {n_actions}"
                raise ValueError(f"--env-fn {env_fn}: lane {i} has {size} observations and {n} actions, not {expected}")

    def __call__(self, lo: int, hi: int, mode: int):
        a, seed = self.a, int(self.a["law"][1])
        for i in range(lo, hi):
            env, done = self.envs[i], True
            lost = mode == STEP and int(a["lost"][i]) == 1  # its episode went down with a worker
            a["lost"][i] = 2 * lost
            if mode == STEP:
                reward, terminated, truncated, last = 0.0, False, True, a["obs"][i]
                if not lost:
                    action = int(a["action"][i]) + int(env.action_space.start)
                    last, reward, terminated, truncated, _ = env.step(action)
                a["reward"][i], a["flags"][0, i], a["flags"][1, i] = reward, terminated, truncated
                a["floats"][0, 5, i] += reward
                a["ints"][0, 1, i] += 1
                done = terminated or truncated
                if done:
                    a["final_obs"][i] = np.asarray(last, np.float32).reshape(-1)
                    a["stats"][:, i] = np.nan
                    a["stats"][:2, i] = a["floats"][0, 5, i], a["ints"][0, 1, i]
            if done:
                again = int(a["law"][2]) * len(self.a["lost"]) * lost  # a lost lane does not begin as at first
                last, _ = env.reset(seed=seed + i + again if lost or mode == FIRST else None)
                a["floats"][0, 5, i], a["ints"][0, 1, i] = 0.0, 0
            a["obs"][i] = np.asarray(last, np.float32).reshape(-1)

    def close(self):
        for env in self.envs.values():
            env.close()


def die_with_parent():
    """End this worker when its parent ends, however that ends and whatever this worker is doing."""
    sentinel = mp.parent_process().sentinel

    def watch():
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if sys.platform != "win32":  # that thread never runs if a user's C code keeps the interpreter lock: SIGIO then
        import fcntl

        fcntl.fcntl(sentinel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)


def start_fork_server(context):
    """Start it, unless it runs, with this repository on its path: it imports PRELOAD, and then no collection of garbage
    will write to what the workers share."""
    from multiprocessing import forkserver  # not on Windows

    path, root = os.environ.get("PYTHONPATH"), str(Path(__file__).resolve().parents[1])
    os.environ |= {"PYTHONPATH": root + (os.pathsep + path if path else ""), FORK_SERVER: "1"}
    try:
        context.set_forkserver_preload(list(PRELOAD))
        forkserver.ensure_running()
    finally:
        del os.environ[FORK_SERVER]
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path


def work(pipe, raw, layout: dict, env_fn: str | None, lanes: list, n_actions: int):
    """A worker: carries out messages (mode, half, parity, lo, hi) until the pipe closes; it holds no lane's state."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    die_with_parent()
    try:
        arrays = carve(raw, layout)
        arguments = kernel_arguments(arrays)
        users = UserEnvs(env_fn, lanes, arrays, n_actions) if env_fn else None
        if not users:
            step_block(0, 0, STEP, *arguments[0])  # from the cache, before the first step's deadline runs
        pipe.send_bytes(b"k\xff")
        while True:
            mode, half, parity, lo, hi = MESSAGE.unpack(pipe.recv_bytes())
            if users:
                users(lo, hi, mode)
            else:
                step_block(lo, hi, mode, *arguments[parity])
            pipe.send_bytes(b"k%c" % half)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception:  # the parent raises it: WorkerError carries this traceback
        pipe.send_bytes(b"e" + traceback.format_exc().encode())


class ForexVectorEnv(gym.vector.VectorEnv):
    """Lanes that trade currency pairs, lane i symbol i % S. Same-step autoreset; truncation at `episode_length` bars
    or at the end of the split's rows; termination at ruin or at the daily drawdown limit.

    Observation (F + 2,) float32: the row's features, exposure / leverage, equity over its value at the start of the
    trading day - 1. Action: 0 short, 1 flat, 2 long. Reward: log growth of equity net of costs.
    step_lanes(), or send() and recv() by halves, return views that the next step overwrites: obs (N, F + 2), reward
    (N,) float64, terminated, truncated (N,) bool; row (N,) int64 and position (N,) int8 stand beside them, final_obs,
    final_row and stats (6, N: EPISODE) hold the last episode of every lane that ended.
    env_fn "module:factory": a user's environments in place of ours, lane i seeded with seed + i.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}
    builds = 0

    def __init__(
        self, pairs: Pairs | None, split: str = "train", num_envs: int = 1024, *, vec_mode: str = "single",
        num_workers: int = 1, async_halves: bool = False, leverage: float = 1.0, initial_balance: float = 100_000.0,
        position_mode: str = "rebalance", daily_drawdown: float = 0.0, episode_length: int = 128,
        bars_per_year: float = 6_240.0, seed: int = 1, backend: str = "cpu", on_worker_death: str = "fail",
        timeout: float = 4.0, env_fn: str | None = None, monitor: str | Path | None = None,
    ):
        self.closed, self.processes, self.pipes, self.lease, self.users, self.log = True, [], [], None, None, None
        for name, value, known in (
                ("vec_mode", vec_mode, ("single", "dummy", "subproc")), ("backend", backend, ("cpu", "cuda")),
                ("position_mode", position_mode, ("rebalance", "drift")),
                ("on_worker_death", on_worker_death, ("fail", "restart"))):
            if value not in known:
                raise ValueError(f"{name} {value!r}: must be one of {', '.join(known)}")
        halves = 2 if async_halves else 1
        if vec_mode == "single":
            num_workers = 1
        for wrong, why in (
                (backend == "cuda" and (vec_mode != "single" or env_fn or async_halves),
                 "backend cuda steps our lanes in one process: it needs vec_mode single, no env_fn and no halves"),
                (num_envs < 1 or num_workers < 1 or num_envs < halves * num_workers,
                 f"num_envs {num_envs}: {num_workers} workers in {halves} halves need a lane each"),
                (num_envs % halves, f"num_envs {num_envs}: two halves need an even number"),
                (not 0 <= daily_drawdown < 1, f"daily_drawdown {daily_drawdown}: must be in [0, 1)"),
                (episode_length < 1, f"episode_length {episode_length}: must be at least 1"),
                (not leverage > 0 or not initial_balance > 0, "leverage and initial_balance must be above 0"),
                (not timeout > 0, f"timeout {timeout}: must be above 0 s")):
            if wrong:
                raise ValueError(why)
        ForexVectorEnv.builds += 1
        self.pairs, self.split, self.num_envs, self.vec_mode, self.backend = pairs, split, num_envs, vec_mode, backend
        self.num_workers, self.halves, self.timeout, self.env_fn = num_workers, halves, timeout, env_fn
        self.on_worker_death, self.restarts, self.seed, self.was_reset = on_worker_death, 0, int(seed), False
        if env_fn:
            probe_env = make_user_env(env_fn)
            space, action = probe_env.observation_space, probe_env.action_space
            probe_env.close()
            self.n_actions, width, size, symbols = int(action.n), math.prod(space.shape), (0, 0), 1
            low, high = (np.asarray(x, np.float32).reshape(-1) for x in (space.low, space.high))
        else:
            symbols, size, self.n_actions = len(pairs.names), pairs.table.shape, 3
            rows, width, low, high = np.asarray(pairs.rows[split], np.int64), size[1] + 2, -np.inf, np.inf
            if rows.shape != (symbols, 2) or (np.diff(rows) <= 0).any() or rows.min() < 0 or rows.max() >= size[0]:
                why = f"must be a range for each of {symbols} symbols, none empty, that ends before {size[0]}"
                raise ValueError(f"split {split}: decision rows {rows.tolist()} {why}")
            if leverage * pairs.cost.max(initial=0) >= 1:
                raise ValueError(f"leverage {leverage}: a trade would cost {leverage * pairs.cost.max():.3g} of equity")
        self.single_observation_space = gym.spaces.Box(low, high, (width,), np.float32)
        self.single_action_space = gym.spaces.Discrete(self.n_actions)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

        self.layout = shapes(size, symbols, num_envs, width)
        if vec_mode == "subproc":
            # a file without a name behind file descriptors: the kernel frees it when the last process ends
            bytes_ = 64 + sum(-(-math.prod(s) * np.dtype(d).itemsize // 64) * 64 for s, d in self.layout.values())
            self.context = mp.get_context("forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn")
            self.raw = self.context.RawArray("b", bytes_)
            self.arrays = carve(self.raw, self.layout)
        else:
            self.lease = pool.lease()
            take = partial(self.lease.acquire, device=backend)
            self.arrays = {name: take(shape, dtype) for name, (shape, dtype) in self.layout.items()}
        for name in ("obs", "reward", "flags", "row", "position", "final_obs", "final_row", "stats", "lost", "action"):
            setattr(self, name, self.arrays[name])
        if not env_fn:
            for name, values in (("table", np.pad(pairs.table, ((0, 0), (0, -size[1] % 16)))),
                                 ("bars", pairs.bars(split)), ("rows", rows)):
                self.put(name, values)
        drift = position_mode == "drift"
        self.put("rules", np.array([leverage, drift, daily_drawdown, initial_balance, bars_per_year]))
        self.put("law", np.array([episode_length, self.seed, 0]))
        self.arguments = kernel_arguments(self.arrays)
        self.terminated, self.truncated = self.flags[0], self.flags[1]
        self.parity, self.flying, self.sent = [0] * halves, [False] * halves, [0.0] * halves
        self.waiting = [set() for _ in range(halves)]
        self.divide(num_workers)
        self.closed = False
        try:
            if backend == "cuda":
                self.kernel = cuda_step()[(num_envs + 127) // 128, 128]
            elif vec_mode != "single" and not env_fn:
                step_block(0, 0, STEP, *self.arguments[0])  # compiled and cached before the workers start
            if vec_mode == "subproc":
                if self.context.get_start_method() == "forkserver":
                    start_fork_server(self.context)
                self.processes, self.pipes = [None] * num_workers, [None] * num_workers
                self.failures = [0] * num_workers
                for failure in self.start(range(num_workers)):
                    self.fail(*failure)
            elif env_fn:
                self.users = UserEnvs(env_fn, range(num_envs), self.arrays, self.n_actions)
        except BaseException:
            self.close()
            raise
        if monitor is not None:
            self.open_monitor(Path(monitor))

    def divide(self, num_workers: int):
        """Lanes of half h and worker w: blocks[h][w] = (lo, hi); lanes of half h: spans[h]."""
        n = self.num_envs // self.halves
        cuts = [[h * n + n * w // num_workers for w in range(num_workers + 1)] for h in range(self.halves)]
        self.blocks = [list(zip(c[:-1], c[1:])) for c in cuts]
        self.spans = [slice(c[0], c[-1]) for c in cuts]
        self.num_workers = num_workers

    def put(self, name: str, values):
        if self.backend == "cuda":
            self.arrays[name].copy_to_device(np.ascontiguousarray(values, self.arrays[name].dtype))
        else:
            self.arrays[name][...] = values

    def host(self, array) -> np.ndarray:
        """A NumPy view of an array (a copy on CUDA)."""
        return array.copy_to_host() if self.backend == "cuda" else array

    # workers
    def lanes_of(self, w: int) -> list[tuple[int, int]]:
        return [self.blocks[h][w] for h in range(self.halves)]

    def start(self, workers) -> list[tuple[int, str]]:
        """Start workers and wait until they are ready; returns those which are not, and why."""
        for w in workers:
            self.pipes[w], theirs = self.context.Pipe()
            lanes = [i for lo, hi in self.lanes_of(w) for i in range(lo, hi)] if self.env_fn else []
            process = self.context.Process(
                target=work, daemon=True, name=f"forex-{w}",
                args=(theirs, self.raw, self.layout, self.env_fn, lanes, self.n_actions))
            process.start()
            self.processes[w] = process
            theirs.close()  # or the worker's death would not close the pipe
        deadline, failures = time.monotonic() + START_SECONDS, []
        for w in workers:
            why = f"not ready after {START_SECONDS:g} s"
            if self.pipes[w].poll(max(deadline - time.monotonic(), 0.0)):
                why = self.answer(w)
            if why.startswith("died"):
                why += " before it was ready; the program that builds this must guard it: if __name__ == '__main__':"
            failures += [(w, why)] * bool(why)
        return failures

    def fail(self, w: int, why: str):
        error = WorkerError(w, self.lanes_of(w), why)
        self.close()
        raise error

    def answer(self, w: int) -> str:
        """Read what worker w sent; returns "" or why it failed."""
        try:
            reply = self.pipes[w].recv_bytes()
        except (EOFError, OSError):
            self.processes[w].join(1.0)
            return f"died (exit code {self.processes[w].exitcode})"
        if reply[:1] == b"e":
            return reply[1:].decode()
        if reply[1] < self.halves:
            self.waiting[reply[1]].discard(w)
            if not any(self.lost[lo:hi].any() for lo, hi in self.lanes_of(w)):  # a lost step proves nothing
                self.failures[w] = 0
        return ""

    def stop(self, w: int):
        self.pipes[w].close()
        self.processes[w].kill()
        self.processes[w].join()
        self.processes[w].close()

    def failed(self, w: int, why: str):
        """Replace worker w and give it its messages again, or raise WorkerError."""
        failures = [(w, why)]
        while failures:
            self.failures[w] += 1
            if self.on_worker_death == "fail" or self.failures[w] > ATTEMPTS:
                self.fail(*failures[0])
            self.restarts += 1
            self.stop(w)
            if self.env_fn:
                self.arrays["law"][2] = self.restarts
                for lo, hi in self.lanes_of(w):
                    self.lost[lo:hi] = 1
            failures = self.start([w])
        for half in sorted(range(self.halves), key=lambda h: self.sent[h]):
            if w in self.waiting[half]:
                self.tell(w, half)

    def tell(self, w: int, half: int):
        try:
            self.pipes[w].send_bytes(MESSAGE.pack(self.mode, half, self.parity[half], *self.blocks[half][w]))
        except OSError:  # it is dead: collecting its answer finds out
            pass

    def rescale(self, num_workers: int):
        """Add or retire workers between steps; the trajectories stay the same."""
        if self.vec_mode != "subproc" or self.env_fn:
            raise ValueError("rescale: needs vec_mode subproc and our own lanes, whose state no worker holds")
        if any(self.flying) or not 1 <= num_workers <= self.num_envs // self.halves:
            raise ValueError(f"rescale to {num_workers}: between steps only, from 1 to {self.num_envs // self.halves}")
        before = self.num_workers
        for w in range(num_workers, before):
            self.stop(w)
        self.divide(num_workers)
        for items, blank in ((self.processes, None), (self.pipes, None), (self.failures, 0)):
            items[num_workers:] = [blank] * max(num_workers - before, 0)
        for failure in self.start(range(before, num_workers)):
            self.fail(*failure)

    def worker_usage(self) -> list[dict]:
        """Per worker: pid, cpu_seconds, rss and uss in bytes (None where /proc does not tell)."""
        usage = []
        for process in self.processes:
            row = {"pid": process.pid, "cpu_seconds": None, "rss": None, "uss": None}
            try:
                fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
                row["cpu_seconds"] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
                kb = [line.split() for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]]
                kb = {name: 1024 * int(value) for name, value, _ in kb}
                row |= {"rss": kb["Rss:"], "uss": kb["Private_Clean:"] + kb["Private_Dirty:"]}
            except OSError:
                pass
            usage.append(row)
        return usage

    # stepping
    def go(self, half: int, mode: int):
        """Start a kernel, or the workers, on the lanes of a half."""
        if not self.was_reset and mode == STEP:
            raise RuntimeError("call reset() before the first step")
        self.mode, self.flying[half], parity = mode, True, self.parity[half]
        if self.vec_mode == "subproc" and (mode == STEP or self.env_fn):
            self.sent[half] = time.monotonic()
            self.waiting[half] = set(range(self.num_workers))
            for w in range(self.num_workers):
                self.tell(w, half)
            return
        for lo, hi in self.blocks[half]:
            if self.users:
                self.users(lo, hi, mode)
            elif self.vec_mode != "single":
                step_block(lo, hi, mode, *self.arguments[parity])
            elif self.backend == "cuda":
                self.kernel(lo, hi, mode, *self.arguments[parity])
            else:
                step_cpu(lo, hi, mode, *self.arguments[parity])

    def send(self, half: int, actions):
        """Start the step of a half (0 or 1 with async_halves, else 0); actions (lanes of the half,) of integers."""
        if self.flying[half]:
            raise RuntimeError(f"send: half {half} is in flight, recv({half}) comes first")
        if self.backend == "cuda":
            actions = cuda.as_cuda_array(actions) if hasattr(actions, "__cuda_array_interface__") else actions
            self.action.copy_to_device(actions)
        else:
            mine = self.action[self.spans[half]]
            mine[:] = actions
            seen = mine.view(np.uint64)  # one pass: what is negative is huge
            if seen.max() >= self.n_actions:
                lane = np.flatnonzero(seen >= self.n_actions)[0] + self.spans[half].start
                raise ValueError(f"action of lane {lane} is not in 0..{self.n_actions - 1}")
        self.go(half, STEP)

    def recv(self, half: int = 0):
        """Wait for a half's step: (obs, reward, terminated, truncated), views of its lanes."""
        if not self.flying[half]:
            raise RuntimeError(f"recv: half {half} is not in flight, send({half}, actions) comes first")
        deadline = time.monotonic() + self.timeout
        while self.waiting[half]:
            pipes = {self.pipes[w]: w for w in self.waiting[half]}
            ready = connection.wait(pipes, max(deadline - time.monotonic(), 0.0))
            failures = [(pipes[p], why) for p in ready if (why := self.answer(pipes[p]))]
            if not ready:
                failures = [(w, f"no answer in {self.timeout:g} s") for w in pipes.values()]
            for w, why in failures:
                self.failed(w, why)
                deadline = time.monotonic() + self.timeout
        self.flying[half] = False
        self.parity[half] ^= 1
        span = self.spans[half]
        if self.log and self.mode == STEP:
            self.monitor(span)
        if self.halves == 1:
            return self.obs, self.reward, self.terminated, self.truncated
        return self.obs[span], self.reward[span], self.terminated[span], self.truncated[span]

    def step_lanes(self, actions):
        """Step all lanes: actions (N,) integers -> obs, reward, terminated, truncated: views (CUDA: device arrays)."""
        if self.halves == 1:
            self.send(0, actions)
            return self.recv(0)
        for half, span in enumerate(self.spans):
            self.send(half, actions[span])
        for half in range(self.halves):
            self.recv(half)
        return self.obs, self.reward, self.terminated, self.truncated

    def step(self, actions):
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or not np.issubdtype(actions.dtype, np.integer):
            raise ValueError(f"actions: need {self.num_envs} integers, got {actions.dtype} {actions.shape}")
        obs, reward, terminated, truncated = (self.host(x).copy() for x in self.step_lanes(actions))
        info, done = {}, terminated | truncated
        if done.any():
            last, final = self.host(self.final_obs), np.full(self.num_envs, None, object)
            for i in np.flatnonzero(done):
                final[i] = last[i].copy()
            episode = {k: np.where(done, v, 0.0) for k, v in zip(EPISODE, self.host(self.stats))}
            info = {"final_obs": final, "_final_obs": done,
                    "final_info": {"episode": episode, "_episode": done}, "_final_info": done}
        if self.env_fn and (self.lost == 2).any():
            info |= {"lost": self.lost == 2, "_lost": self.lost == 2}
        return obs, reward, terminated, truncated, info

    def all_lanes(self, mode: int):
        if any(self.flying):
            raise RuntimeError("a half is in flight: recv() comes first")
        for half in range(self.halves):
            self.go(half, mode)
        for half in range(self.halves):
            self.recv(half)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """All lanes to their first (seed given) or next episode; builds nothing."""
        if seed is not None:
            self.seed = int(seed)
            law = self.host(self.arrays["law"])
            law[1] = self.seed
            self.put("law", law)
        mode = FIRST if seed is not None or not self.was_reset else NEXT
        self.all_lanes(mode)
        self.was_reset = True
        return self.host(self.obs).copy(), {}

    def get_state(self) -> dict:
        """Tensors and plain Python, with which set_state() continues exactly; of users' environments only the seed."""
        state = {"seed": self.seed, "was_reset": self.was_reset}
        if self.env_fn:
            return state
        for name in ("ints", "floats"):
            both = self.host(self.arrays[name])
            parts = [both[p][:, span] for p, span in zip(self.parity, self.spans)]
            state[name] = torch.from_numpy(np.concatenate(parts, axis=1))
        return state

    def set_state(self, state: dict):
        """Continue from get_state(), whatever the mode and the workers were; users' environments start anew."""
        if self.env_fn:
            self.reset(seed=state["seed"])
            return
        self.seed, self.was_reset = state["seed"], state["was_reset"]
        law = self.host(self.arrays["law"])
        law[1] = self.seed
        self.put("law", law)
        for name in ("ints", "floats"):
            both = np.zeros(self.arrays[name].shape, self.arrays[name].dtype)
            both[..., :self.num_envs] = state[name].numpy()
            self.put(name, both)
        self.all_lanes(SHOW)

    def close_extras(self, **kwargs):
        for pipe in self.pipes:
            if pipe is not None:
                pipe.close()  # a worker that is well ends by itself
        for process in self.processes:
            if process is not None:
                process.join(1.0)
                process.kill()
                process.join()
                process.close()
        if self.users:
            self.users.close()
        if self.lease:
            self.lease.close()
        if self.log:
            self.log.close()
        self.processes, self.pipes, self.log = [], [], None

    # monitor.csv
    def open_monitor(self, path: Path):
        """Stable-Baselines3's format; a file that exists is continued."""
        new = not path.exists() or path.stat().st_size == 0
        self.log, self.t_start, self.flushed = path.open("a"), time.time(), 0.0
        if new:
            name = self.env_fn or "cleanrl_crypto/Forex-v0"
            self.log.write(f"#{json.dumps({'t_start': self.t_start, 'env_id': name})}\n")
            self.log.write("r,l,t,drawdown,turnover,sharpe_ratio,max_drawdown\n")
        self.log.flush()

    def monitor(self, span: slice):
        done = np.flatnonzero(self.host(self.terminated)[span] | self.host(self.truncated)[span]) + span.start
        now = time.time() - self.t_start
        for r, length, *rest in self.host(self.stats)[:, done].T.tolist():
            self.log.write(f"{r:.9g},{length:.0f},{now:.6f},{','.join(f'{x:.6g}' for x in rest)}\n")
        if now - self.flushed > 1.0:
            self.log.flush()
            self.flushed = now


def probe(make, candidates: list[dict], seconds: float = 0.5) -> list[dict]:
    """Lane-steps/s of make(mode=, workers=, lanes=) environments, each stepped for `seconds`, observations written.

    Returns the candidates with steps_per_s; one that cannot run here has 0 and its error.
    """
    rows = []
    for candidate in candidates:
        try:
            env = make(**candidate)
        except (WorkerError, OSError) as e:
            rows.append(candidate | {"steps_per_s": 0.0, "error": str(e)})
            continue
        env.reset()
        actions = np.random.default_rng(0).integers(env.n_actions, size=(8, env.num_envs))
        for k in range(3):
            env.step_lanes(actions[k])
        steps, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            env.step_lanes(actions[steps % 8])
            steps += 1
        rows.append(candidate | {"steps_per_s": steps * env.num_envs / (time.perf_counter() - began)})
        env.close()
    return rows


def make_vec(num_envs: int = 1, split_name: str = "train", **kwargs) -> ForexVectorEnv:
    """gymnasium.make_vec("cleanrl_crypto/Forex-v0", num_envs=8, split_name="train", data=..., leverage=2, ...).

    Keywords: fields of Args, arguments of ForexVectorEnv, or pairs= of an earlier load_pairs().
    """
    ours = {k: kwargs.pop(k) for k in ("vec_mode", "num_workers", "async_halves", "backend") if k in kwargs}
    pairs = kwargs.pop("pairs", None)
    args = Args(**{k: kwargs.pop(k) for k in list(kwargs) if k in Args.__dataclass_fields__})
    return ForexVectorEnv(pairs or load_pairs(args), split_name, num_envs, **env_flags(args), **ours, **kwargs)


class ForexEnv(gym.Env):
    """One lane as an ordinary environment: gymnasium.make("cleanrl_crypto/Forex-v0", symbols=("EURUSD",))."""

    metadata = {"render_modes": []}

    def __init__(self, render_mode: None = None, **kwargs):
        self.render_mode = render_mode
        self.lane = make_vec(1, **kwargs)
        self.observation_space, self.action_space = self.lane.single_observation_space, self.lane.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        return self.lane.reset(seed=seed)[0][0], {}

    def step(self, action):
        obs, reward, terminated, truncated, info = self.lane.step(np.array([action]))
        obs = info["final_obs"][0] if "final_obs" in info else obs[0]
        return obs, float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}

    def close(self):
        self.lane.close()


def env_flags(args: Args) -> dict:
    """Keyword arguments of ForexVectorEnv that the market's flags decide."""
    return {k: getattr(args, k) for k in ("leverage", "initial_balance", "position_mode", "daily_drawdown",
                                          "episode_length", "seed")}


if "cleanrl_crypto/Forex-v0" not in gym.registry:  # __main__ and an import of it may be two modules
    gym.register("cleanrl_crypto/Forex-v0", entry_point=ForexEnv, vector_entry_point=make_vec)


# --------------------------------------------------------------------------------------------------- networks
class QNetwork(nn.Module):
    """Two hidden layers; dueling: Q = V + A - mean A (Wang et al. 2016)."""

    def __init__(self, inputs: int, hidden: int, actions: int, dueling: bool):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.advantage = nn.Linear(hidden, actions)
        self.value = nn.Linear(hidden, 1) if dueling else None

    def forward(self, x):  # (B, inputs) -> (B, actions)
        x = self.body(x)
        a = self.advantage(x)
        return a if self.value is None else self.value(x) + a - a.mean(1, keepdim=True)


class Agent(nn.Module):
    """Everything that learns, and the statistics it needs: one state_dict. config: plain values that rebuild it.

    all_actions: the network sees the market alone and gives G(row, position after the trade); Q(row, position, a) =
    G(row, a) + scale log(1 - cost leverage |a - position|), exactly, as a proportional cost separates. Otherwise the
    network sees the whole observation and gives Q.
    """

    def __init__(self, config: dict):
        super().__init__()
        c = self.config = config
        self.market = c["columns"] if c["all_actions"] else c["inputs"]  # leading columns that the network sees
        self.online = QNetwork(self.market, c["hidden"], c["actions"], c["dueling"])
        self.target = QNetwork(self.market, c["hidden"], c["actions"], c["dueling"]).requires_grad_(False)
        self.target.load_state_dict(self.online.state_dict())
        self.register_buffer("levels", torch.tensor([-1.0, 0.0, 1.0]))
        self.register_buffer("reward_stats", torch.zeros(3, dtype=torch.float64))  # count, mean, sum of squares

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

    def forward(self, obs):
        """Q of every action at observations (B, inputs) -> (B, actions), scaled reward."""
        q = self.online(obs[:, : self.market])
        if not self.config["all_actions"]:
            return q
        cost, held = obs[:, self.market - 1], obs[:, self.market]  # the last market column is the cost in bp
        return q + self.reward_scale * move_reward(cost * BP * self.config["leverage"], held, self.levels)


# -------------------------------------------------------------------------------------------------- algorithm
def move_reward(cost, position, levels):
    """log(1 - cost |level - position|) of going from position (B,) to each of levels (A,); cost (B,) a unit: (B, A)."""
    return torch.log1p(-(cost[:, None] * (levels - position[:, None]).abs()).clamp_max(1 - RUIN))


def hold_reward(ret, swap_long, swap_short, leverage: float):
    """log growth of a bar held at -1, 0, +1 times leverage: (B,) each -> (B, 3). Same formula as trade_nb."""
    short, long = 1 - leverage * ret - leverage * swap_short, 1 + leverage * ret - leverage * swap_long
    return torch.stack([short, torch.ones_like(ret), long], 1).clamp_min(RUIN).log()


def td_target(reward, done, discount, next_target, next_online=None):
    """DQN's target (B,): r + discount (1 - done) Q'(a*), a* by the online network if given (van Hasselt et al. 2016).

    reward, done, discount (B,); next_target, next_online (B, A): Q at the next state.
    """
    best = (next_target if next_online is None else next_online).argmax(1, keepdim=True)
    return reward + discount * (1 - done) * next_target.gather(1, best)[:, 0]


def all_action_target(reward, done, gamma: float, next_target, next_online, moves, forced):
    """Targets (B, A) of holding each position over a bar.

    reward, done (B, A); next_target, next_online (B, A): G at the next row; moves (B, A, A'): reward of going from a to
    a' there; forced (B,) bool: only flat is possible there. The next position maximises G + move.
    """
    blocked = torch.zeros_like(moves)
    blocked[:, :, [0, 2]] = torch.where(forced[:, None, None], -torch.inf, 0.0)
    best = (next_online[:, None] + moves + blocked).argmax(2, keepdim=True)  # (B, A, 1)
    value = (next_target[:, None] + moves).gather(2, best)[..., 0]
    return reward + gamma * (1 - done) * value


def dqn_loss(q, action, target):
    """Smooth L1 of the taken actions' values, mean over the batch: (B, A), (B,), (B,)."""
    return F.smooth_l1_loss(q.gather(1, action[:, None])[:, 0], target)


class Replay:
    """Ring of transitions, lanes innermost. On the market `row` and what the path adds to it, never features.

    The next row is row + 1 (an episode's end included: rows do not jump). state, next_state (n, width) float32:
    exposure and drawdown; of custom environments the whole observation.
    """

    def __init__(self, size: int, lanes: int, width: int):
        self.steps, self.lanes, self.total = max(size // lanes, 2), lanes, 0  # total: vector steps seen
        n = self.steps * lanes
        self.row, self.action, self.reward = np.zeros(n, np.int32), np.zeros(n, np.int16), np.zeros(n, np.float32)
        self.state, self.next_state = np.zeros((n, width), np.float32), np.zeros((n, width), np.float32)
        self.terminated, self.truncated = np.zeros(n, np.bool_), np.zeros(n, np.bool_)

    def put(self, step: int, span: slice, **values):
        """Write the lanes of `span` at vector step `step`."""
        at = (step % self.steps) * self.lanes
        for name, value in values.items():
            getattr(self, name)[at + span.start : at + span.stop] = value

    def __len__(self) -> int:
        return min(self.total, self.steps)  # whole vector steps

    def sample(self, rng, n: int, n_step: int = 1) -> np.ndarray:
        """Indices (n,) of transitions that have n_step - 1 later ones."""
        oldest = self.total - len(self)
        step = rng.integers(oldest, self.total - n_step + 1, n) % self.steps
        return step * self.lanes + rng.integers(0, self.lanes, n)

    def n_step_return(self, at, n_step: int, gamma: float):
        """Summed rewards (n,), last index, whether it terminated, the bootstrap's discount; an end stops it."""
        total, weight, last = np.zeros(len(at), np.float32), np.ones(len(at), np.float32), at.copy()
        alive = np.ones(len(at), bool)
        for k in range(n_step):
            here = (at + k * self.lanes) % len(self.row)
            last = np.where(alive, here, last)
            total += np.where(alive, weight * self.reward[here], 0)
            weight = np.where(alive, weight * np.float32(gamma), weight)
            alive &= ~(self.terminated[here] | self.truncated[here])
        return total, last, self.terminated[last].astype(np.float32), weight

    FIELDS = ("row", "action", "reward", "state", "next_state", "terminated", "truncated")

    def get_state(self) -> dict:
        n = len(self) * self.lanes
        return {"total": self.total} | {k: torch.from_numpy(getattr(self, k)[:n].copy()) for k in self.FIELDS}

    def set_state(self, state: dict):
        self.total = state["total"]
        for k in self.FIELDS:
            getattr(self, k)[: len(state[k])] = state[k].numpy()


class Table:
    """The market's rows on the learner's device."""

    def __init__(self, pairs: Pairs, device):
        tensor = partial(torch.as_tensor, device=device)
        self.x, self.flat = tensor(pairs.table), tensor(pairs.flat)
        self.ret, self.cost = tensor(pairs.ret, dtype=torch.float32), tensor(pairs.cost, dtype=torch.float32)
        self.swap = tensor(pairs.swap, dtype=torch.float32)


def all_action_loss(agent: Agent, table: Table, rows, double: bool):
    """Loss of G at every position on rows (B,), whoever visited them; returns (loss, mean G, mean target)."""
    c, scale = agent.config, agent.reward_scale
    x, after = table.x[rows], table.x[rows + 1]
    g = agent.online(x)  # (B, 3)
    with torch.no_grad():
        reward = hold_reward(table.ret[rows], *table.swap[:, rows], c["leverage"])  # (B, 3)
        next_target = agent.target(after)
        next_online = agent.online(after) if double else next_target
        cost = (table.cost[rows + 1] * c["leverage"]).repeat_interleave(3)
        moves = scale * move_reward(cost, agent.levels.repeat(len(rows)), agent.levels).view(-1, 3, 3)
        done = (reward <= math.log(LOST)).float()
        forced = table.flat[rows + 1]
        target = all_action_target(scale * reward, done, c["gamma"], next_target, next_online, moves, forced)
    return F.smooth_l1_loss(g, target), g.detach().mean(), target.mean()


def replay_loss(agent: Agent, replay: Replay, table: Table | None, at, n_step: int, double: bool, device):
    """DQN's loss on stored transitions at (n,); returns (loss, mean Q, mean target)."""
    reward, last, done, discount = replay.n_step_return(at, n_step, agent.config["gamma"])
    tensor = partial(torch.as_tensor, device=device)
    obs, after = tensor(replay.state[at]), tensor(replay.next_state[last])
    if table is not None:
        obs = torch.cat([table.x[tensor(replay.row[at].astype(np.int64))], obs], 1)
        after = torch.cat([table.x[tensor(replay.row[last].astype(np.int64)) + 1], after], 1)
    q = agent.online(obs)
    with torch.no_grad():
        next_target = agent.target(after)
        next_online = agent.online(after) if double else None
        reward = agent.reward_scale * tensor(reward)
        target = td_target(reward, tensor(done), tensor(discount), next_target, next_online)
    return dqn_loss(q, tensor(replay.action[at].astype(np.int64)), target), q.detach().mean(), target.mean()


# -------------------------------------------------------------------------------------- evaluation, diagnostics
@nb.njit(cache=True)
def greedy_walk_nb(value, scale, ret, cost, swap, flat, inverse, leverage, drift):
    """Greedy positions (n,) of an afterstate network: value (n, 3) of holding -1, 0, 1 after the trade.

    argmax value + scale log(1 - cost leverage |level - held|); a tie keeps the nearest position.
    """
    n = len(value)
    target = np.zeros(n)
    held, last = 0.0, 0.0
    for t in range(n):
        best, best_q, best_change = 0.0, -np.inf, 0.0
        for j in range(3):
            change = abs(j - 1.0 - held)
            q = value[t, j] + scale * math.log(max(1.0 - cost[t] * leverage * change, RUIN))
            if q > best_q or (q == best_q and change < best_change):
                best, best_q, best_change = j - 1.0, q, change
        target[t] = 0.0 if flat[t] else best
        foreign = -ret[t] if inverse else ret[t]
        _, held, _ = trade_nb(
            last, held, target[t], ret[t], cost[t], swap[0, t], swap[1, t], foreign, leverage, drift)
        last = target[t]
    return target


@torch.no_grad()
def target_paths(agent: Agent, pairs: Pairs, split: str, args: Args, device, deadline: float = math.inf) -> list:
    """Greedy positions (n,) of every pair along a split, flat before the first.

    Plain DQN sees its position, so it walks bar by bar, all pairs in one batch, until `deadline`; after the daily
    drawdown limit its position is flat until the next trading day.
    """
    rows, drift, limit = pairs.rows[split], args.position_mode == "drift", args.daily_drawdown
    if agent.config["all_actions"]:
        paths = []
        for (a, b), inverse in zip(rows, pairs.inverse):
            x = torch.from_numpy(pairs.table[a:b]).to(device)
            value = torch.cat([agent.online(part) for part in x.split(8192)]).cpu().numpy().astype(np.float64)
            bars = (np.ascontiguousarray(x[..., a:b]) for x in (pairs.ret, pairs.cost, pairs.swap, pairs.flat))
            paths.append(greedy_walk_nb(value, agent.reward_scale, *bars, bool(inverse), args.leverage, drift))
        return paths
    n, s = np.diff(rows)[:, 0], len(rows)
    paths = np.zeros((s, n.max()))
    held, last, day_growth = np.zeros(s), np.zeros(s), np.ones(s)
    inverse = np.where(pairs.inverse, -1.0, 1.0)
    for t in range(n.max()):
        if time.monotonic() > deadline:
            return [path[: min(t, k)] for path, k in zip(paths, n)]
        at = np.minimum(rows[:, 0] + t, rows[:, 1] - 1)
        state = np.stack([held, day_growth - 1], 1).astype(np.float32)
        obs = torch.from_numpy(np.concatenate([pairs.table[at], state], 1)).to(device)
        target = agent(obs).argmax(1).cpu().numpy() - 1.0
        target[pairs.flat[at] | ((limit > 0) & (day_growth <= 1 - limit))] = 0.0
        for k, row in enumerate(at):
            ret = pairs.ret[row]
            factor, held[k], _ = trade_nb(last[k], held[k], target[k], ret, pairs.cost[row], *pairs.swap[:, row],
                                          inverse[k] * ret, args.leverage, drift)
            day_growth[k] = 1.0 if pairs.day[row + 1] != pairs.day[row] else day_growth[k] * factor
        last = paths[:, t] = target
    return [path[:k] for path, k in zip(paths, n)]


@nb.njit(cache=True)
def walk_nb(target, ret, expected, cost, swap, flat, inverse, leverage, drift):
    """Trade positions `target` (n,) along one pair's bars: Series.walk's four arrays, exposure held over leverage."""
    n = target.size
    reward, mean, change, exposure = np.empty(n), np.empty(n), np.empty(n), np.empty(n)
    held, last = 0.0, 0.0
    for t in range(n):
        aim = 0.0 if flat[t] else target[t]
        foreign = -ret[t] if inverse else ret[t]
        fee = trade_nb(last, held, aim, 0.0, cost[t], 0.0, 0.0, 0.0, leverage, drift)[0]
        exposure[t] = held if drift and aim == last else aim
        x = exposure[t] * leverage
        mean[t] = x * expected[t] - (x * swap[0, t] if x > 0 else -x * swap[1, t]) - (1.0 - fee)
        factor, held, change[t] = trade_nb(
            last, held, aim, ret[t], cost[t], swap[0, t], swap[1, t], foreign, leverage, drift)
        reward[t] = math.log(factor)
        last = aim
    return reward, mean, change, exposure


def series_of(pairs: Pairs, args: Args) -> list[Series]:
    """The pairs as scoring sees them; rows count from each pair's own first."""
    out, starts = [], np.cumsum([0] + [len(b.close) for b in pairs.series])
    for k, first in enumerate(starts[:-1]):
        cut = slice(first, starts[k + 1])
        columns = [x[..., cut] for x in (pairs.ret, pairs.expected, pairs.cost, pairs.swap, pairs.flat)]
        rest = bool(pairs.inverse[k]), args.leverage, args.position_mode == "drift"

        def walk(target, a, b, columns=columns, rest=rest):
            return walk_nb(np.asarray(target, np.float64), *(np.ascontiguousarray(x[..., a:b]) for x in columns), *rest)

        rows = {split: tuple(int(x) - int(first) for x in r[k]) for split, r in pairs.rows.items()}
        known = pairs.series[k].truth is not None
        out.append(Series(pairs.table[cut].astype(np.float64), columns[0], rows, walk, known))
    return out


def optimum_path(policy: np.ndarray, truth, start: int, stop: int) -> np.ndarray:
    """Positions (n,) of the best policy (regimes, states, 3) over -1, 0, 1 on rows [start, stop), flat before."""
    table, position = policy[truth.regime[start:stop], truth.s[start:stop]].tolist(), 1
    return LEVELS[[position := row[position] for row in table]]


class Judge:
    """Evaluates on the market: the agent, pair by pair and equally weighted, beside its baselines."""

    def __init__(self, pairs: Pairs, args: Args, device):
        self.pairs, self.args, self.device, self.series = pairs, args, device, series_of(pairs, args)
        self.constants = [best_constant(s, LEVELS) for s in self.series]
        truths = [b.truth for b in pairs.series]
        cost = float(pairs.cost[0])
        self.optimum = markets.optimum(truths[0].law, cost, actions=LEVELS) if truths[0] else None

    def evaluate(self, agent: Agent, split: str, deadline: float = math.inf) -> tuple[dict, dict]:
        """{"agent", "baselines", "symbols": {name: {"agent", "baselines"}}, "partial"} and traces {name: columns}.

        The equally weighted account is put back to equal parts at every bar; a pair without a bar earns nothing there.
        """
        paths = target_paths(agent, self.pairs, split, self.args, self.device, deadline)
        partial_ = any(len(p) < s.rows[split][1] - s.rows[split][0] for p, s in zip(paths, self.series))
        out, traces, walks = {"symbols": {}, "partial": partial_}, {}, {}
        for k, (name, bars, s) in enumerate(zip(self.pairs.names, self.pairs.series, self.series)):
            a, b = s.rows[split][0], s.rows[split][0] + max(len(paths[k]), 1)
            path = paths[k] if len(paths[k]) else np.zeros(1)
            n, turnover = b - a, float(np.abs(np.diff(path, prepend=0.0)).mean())
            targets = {"agent": path, "flat": np.zeros(n), "buy_and_hold": np.ones(n),
                       "best_constant": np.full(n, self.constants[k]),
                       "random_same_turnover": random_path(n, turnover, self.args.seed + k, LEVELS)}
            if self.optimum is not None:
                targets["optimum"] = optimum_path(self.optimum, bars.truth, a, b)
            columns = {"timestamp": bars.timestamp[a:b], "close": bars.close[a:b], "next_return": s.ret[a:b]}
            if s.known:
                columns |= {"expected": self.pairs.expected[self.row(k, a) : self.row(k, b)],
                            "signal": bars.truth.signal[a:b], "regime": bars.truth.regime[a:b]}
            mine = {}
            for who, target in targets.items():
                walked = s.walk(target, a, b)
                mine[who], equity = path_metrics(*walked, bars.bars_per_year)
                tail = "" if who == "agent" else f"_{who}"
                columns |= {f"position{tail}": walked[3], f"equity{tail}": equity}
                walks.setdefault(who, []).append(pd.DataFrame(
                    dict(zip(("reward", "mean", "change", "held"), walked)), index=bars.timestamp[a:b]))
            out["symbols"][name] = with_score(mine)
            traces[name] = columns
        joint = {}
        for who, frames in walks.items():
            joint[who], traces_equity, held, index = equal_weights(frames, self.pairs.series[0].bars_per_year)
            tail = "" if who == "agent" else f"_{who}"
            traces.setdefault("", {"timestamp": index})
            traces[""] |= {f"position{tail}": held, f"equity{tail}": traces_equity}
        traces[""] |= {"close": traces[""]["equity_buy_and_hold"]}
        traces[""]["next_return"] = np.append(np.diff(traces[""]["close"]) / traces[""]["close"][:-1], 0.0)
        return with_score(joint) | out, traces

    def row(self, k: int, t: int) -> int:
        return t + sum(len(b.close) for b in self.pairs.series[:k])


def equal_weights(frames: list[pd.DataFrame], bars_per_year: float):
    """Metrics, equity, mean position and times of an account split equally over pairs, evened out at every bar."""
    column = {c: pd.concat([f[c] for f in frames], axis=1) for c in ("reward", "mean", "change", "held")}
    growth = np.expm1(column["reward"]).fillna(0.0).mean(axis=1).to_numpy()
    known = not any(f["mean"].isna().any() for f in frames)
    mean, change, held = (column[c].fillna(0.0).mean(axis=1).to_numpy() for c in ("mean", "change", "held"))
    metrics, equity = path_metrics(np.log1p(growth), mean if known else mean * np.nan, change, held, bars_per_year)
    metrics["trades"] = int((column["change"] > 1e-9).to_numpy().sum())
    return metrics, equity, held, column["reward"].index.to_numpy()


def with_score(metrics: dict) -> dict:
    """{who: metrics} -> {"agent", "baselines"}, the agent's score = share of the optimum where that is known."""
    agent, best = metrics.pop("agent"), metrics.get("optimum")
    if best:
        earned = best["mean_expected_bps"]
        agent["score"] = agent["mean_expected_bps"] / earned if earned >= 0.05 else None
    return {"agent": agent, "baselines": metrics}


@torch.no_grad()
def diagnose(agent: Agent, pairs: Pairs, split: str, epsilon: float, device, n: int = 1024) -> dict:
    """What the greedy position depends on, on n rows of a split (the same rows at every call)."""
    rng = np.random.default_rng(0)
    rows = np.concatenate([np.arange(a, b) for a, b in pairs.rows[split]])
    rows = np.sort(rng.choice(rows, min(n, len(rows)), replace=False))
    n, x = len(rows), torch.from_numpy(pairs.table[rows]).to(device)
    held = torch.from_numpy(rng.integers(-1, 2, n).astype(np.float32)).to(device)
    mix, zero = torch.from_numpy(rng.permutation(n)).to(device), torch.zeros(n, device=device)

    def q_of(x, held):
        return agent(torch.cat([x, held[:, None], zero[:, None]], 1))

    def act(x, held):
        return agent.levels[q_of(x, held).argmax(1)]

    q, greedy = q_of(x, held), act(x, held)
    fixed = [act(x, zero + p) for p in (-1.0, 0.0, 1.0)]  # the market alone varies
    ordered = q.sort(1).values
    hidden = agent.online.body(torch.cat([x, held[:, None], zero[:, None]], 1)[:, : agent.market])
    share = epsilon / 3
    return {
        "state_dependence": float(torch.stack(fixed).std(1).mean()), "action_mean": float(greedy.mean()),
        "saturation": float((greedy != 0).float().mean()), "greedy_gap": float((ordered[:, 2] - ordered[:, 1]).mean()),
        "q_mean": float(q.mean()), "q_action_spread": float((ordered[:, 2] - ordered[:, 0]).mean()),
        "policy_entropy": -sum(p * math.log(p) for p in (share, share, 1 - 2 * share) if p > 0),
        "dead_units": float((hidden <= 0).all(0).float().mean()),
        "attribution": {"technical": float((act(x[mix], held) - greedy).abs().mean()),
                        "position": float((act(x, held[mix]) - greedy).abs().mean())}}


@torch.no_grad()
def overestimation(agent: Agent, judge: Judge, split: str, path_of: list[np.ndarray], n: int = 2048) -> float:
    """Mean of (predicted - realised) discounted value of the greedy action along its path, scaled reward a decision."""
    gaps, gamma = [], agent.config["gamma"]
    for k, (s, path) in enumerate(zip(judge.series, path_of)):
        a, b = s.rows[split][0], s.rows[split][0] + min(len(path), n)
        reward, _, _, held = s.walk(path[: b - a], a, b)
        rows = np.arange(judge.row(k, a), judge.row(k, b))
        before = np.append(0.0, held[:-1])
        obs = np.concatenate([judge.pairs.table[rows], np.stack([before, 0 * before], 1)], 1).astype(np.float32)
        value = agent(torch.from_numpy(obs).to(judge.device)).max(1).values.cpu().numpy()
        realised, tail = np.empty(len(reward)), 0.0
        for t in range(len(reward) - 1, -1, -1):
            tail = realised[t] = agent.reward_scale * reward[t] + gamma * tail
        keep = max(len(reward) - int(5 / (1 - gamma + 1e-9)), 1)  # the last ones see too little of their future
        gaps.append(float((value - realised)[:keep].mean()))
    return float(np.mean(gaps))


@torch.no_grad()
def play(agent: Agent, env: ForexVectorEnv, episodes: int, device, deadline: float = math.inf) -> dict:
    """Greedy episodes of a custom environment: the first of every lane, as many as its share of `episodes`."""
    share, done = -(-episodes // env.num_envs), [[] for _ in range(env.num_envs)]
    obs, _ = env.reset(seed=env.seed)
    while min(len(d) for d in done) < share and time.monotonic() < deadline:
        action = agent(torch.from_numpy(np.array(obs)).to(device)).argmax(1).cpu().numpy()
        obs, _, terminated, truncated = env.step_lanes(action)
        for i in np.flatnonzero(terminated | truncated):
            done[i].append(env.stats[:2, i].tolist())
    kept = [episode for lane in done for episode in lane[:share]][:episodes]  # a fast lane must not count for more
    returns = np.array([r for r, _ in kept]) if kept else np.zeros(1)
    lengths = np.array([length for _, length in kept]) if kept else np.zeros(1)
    return {"agent": {"episode_return": float(returns.mean()), "episode_return_std": float(returns.std()),
                      "episode_length": float(lengths.mean()), "episodes": len(kept)}, "baselines": {},
            "partial": len(kept) < episodes}


def load_agent(path, device="cpu") -> dict:
    """A checkpoint of this script. Raises CheckpointError (one line)."""
    state = load_checkpoint(path, device)
    if state.get("schema") != SCHEMA or not {"config", "agent", "models"} <= set(state):
        found = f"schema {state.get('schema')}, expected {SCHEMA}; it holds {', '.join(sorted(map(str, state))[:6])}"
        raise CheckpointError(f"{path}: not a checkpoint of {Path(__file__).name} ({found})")
    return state


def load_policy(checkpoint: str | Path, device: str = "cpu"):
    """policy(obs) -> actions (B,) int64 from a checkpoint file alone: the greedy policy that evaluation reports.

    obs (B, inputs) float32: the environment's own batch, NumPy. Raises CheckpointError (one line).
    """
    state = load_agent(checkpoint, device)
    agent = Agent(state["config"]).to(device).eval().requires_grad_(False)
    agent.load_state_dict(state["agent"])

    @torch.no_grad()
    def policy(obs) -> np.ndarray:
        return agent(torch.as_tensor(np.asarray(obs, np.float32), device=device)).argmax(1).cpu().numpy()

    return policy


# ------------------------------------------------------------------------------------------------------- main
def open_run(args: Args) -> tuple[Path, Path | str | None, dict | None]:
    """Run directory, checkpoint to start from and its content; refuses what does not fit the flags."""
    name = args.env_fn or args.data_dir or args.data or "synthetic:signal"
    name = Path(name.split(",")[0].split("?")[0].replace(":", "-")).stem
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
        there, here = state["args"], json.loads(json.dumps(asdict(args)))  # tuples as they were saved
        wrong = [f"{flag(k)} {there.get(k)} there, {here[k]} here" for k in SHAPING if there.get(k) != here[k]]
        if wrong:
            raise UsageError(f"{source} was made with other flags: {'; '.join(wrong)}")
    return run_dir, source, state


def agent_config(args: Args, env: ForexVectorEnv) -> dict:
    """Plain values that rebuild the agent from a checkpoint alone."""
    inputs, market = env.single_observation_space.shape[0], args.env_fn is None
    return {
        "inputs": inputs, "columns": inputs - 2 if market else 0, "actions": int(env.single_action_space.n),
        "hidden": args.hidden, "dueling": args.dueling, "all_actions": args.all_actions and market, "gamma": args.gamma,
        "reward_scaling": args.reward_scaling and market, "leverage": args.leverage,
        "feature_cols": list(args.feature_cols) if market else []}


def choose_device(args: Args) -> tuple[torch.device, str]:
    """Device of torch and backend of the environment, from the flags and what works."""
    works = probe_cuda() if args.cuda or args.backend == "cuda" else (False, False)
    device = torch.device("cuda" if args.cuda and works[0] else "cpu")
    if args.backend == "cuda" and not works[1]:
        raise UsageError("--backend cuda: no CUDA device on which a numba kernel runs")
    if args.backend != "auto":
        return device, args.backend
    fits = not args.env_fn and args.vec_mode in ("auto", "single") and not args.async_halves
    return device, "cuda" if works[1] and device.type == "cuda" and fits else "cpu"


def build_env(args: Args, pairs: Pairs | None, lanes: int, backend: str, monitor: Path | None):
    """The training environment and how its mode was found: (env, performance). `auto` measures every candidate."""
    cores = os.cpu_count() or 1
    make = partial(
        ForexVectorEnv, pairs, "train", lanes, async_halves=args.async_halves, backend=backend, env_fn=args.env_fn,
        bars_per_year=pairs.series[0].bars_per_year if pairs else 1.0, on_worker_death=args.on_worker_death,
        timeout=args.worker_timeout, **env_flags(args))
    mode, workers, table = args.vec_mode, args.num_workers or min(cores, lanes // 2 or 1), []
    if mode == "auto" and backend == "cuda":
        mode, workers = "single", 1
        print("vec-mode single: the lanes step on the GPU")
    elif mode == "auto":
        counts = [args.num_workers] if args.num_workers else sorted({1, workers})
        candidates = [{"vec_mode": "single", "num_workers": 1}, {"vec_mode": "dummy", "num_workers": 1}]
        candidates += [{"vec_mode": "subproc", "num_workers": w} for w in counts]
        table = probe(make, candidates, 0.25)
        best = max(table, key=lambda row: row["steps_per_s"])
        mode, workers = best["vec_mode"], best["num_workers"]
        for row in table:
            print(f"  {row['vec_mode']:8} {row['num_workers']} worker(s) {row['steps_per_s']:>14,.0f} lane-steps/s"
                  + (f"  ({row['error']})" if "error" in row else ""))
        print(f"vec-mode {mode}" + (f", {workers} workers" if mode == "subproc" else ", one process: it wins here"))
    ForexVectorEnv.builds = 0  # the probe's do not count
    env = make(vec_mode=mode, num_workers=workers, monitor=monitor)
    return env, {"mode": mode, "workers": workers if mode == "subproc" else 0, "lanes": lanes, "backend": backend,
                 "probe": table}


def rescale_by_measure(env: ForexVectorEnv, seconds: float = 0.2) -> list[dict]:
    """One worker less and one more, measured between steps; the fastest stays. The trajectories are not touched."""
    state, monitor, env.log = env.get_state(), env.log, None
    actions = np.ones(env.num_envs, np.int64)
    cores, table = os.cpu_count() or 1, []
    for workers in sorted({max(env.num_workers - 1, 1), env.num_workers, min(env.num_workers + 1, 2 * cores)}):
        env.rescale(workers)
        env.step_lanes(actions)
        steps, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            env.step_lanes(actions)
            steps += 1
        table.append({"workers": workers, "steps_per_s": steps * env.num_envs / (time.perf_counter() - began)})
    env.rescale(max(table, key=lambda row: row["steps_per_s"])["workers"])
    env.set_state(state)
    env.log = monitor
    return table


def cpu_state(module: nn.Module) -> dict:
    return {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}


def main(argv: list[str] | None = None) -> dict:
    """Train (or --eval-only), evaluate, report; returns what summary.json holds."""
    args = parse_args(Args, argv)
    guard = TimeoutGuard(args.timeout, from_process_start=None if argv is None else False)
    built, ForexVectorEnv.builds = [], 0
    try:
        return run(args, guard, built)
    finally:
        for env in built:
            env.close()
        guard.close()


def run(args: Args, guard: TimeoutGuard, built: list) -> dict:
    with guard.phase("setup"):
        run_dir, source, state = open_run(args)
        threads = args.torch_threads or os.cpu_count() or 1
        torch.set_num_threads(threads)
        nb.set_num_threads(min(threads, nb.config.NUMBA_NUM_THREADS))
        device, backend = choose_device(args)
        random.seed(args.seed)
        np.random.seed(args.seed)  # noqa: NPY002 (other libraries draw from it)
        torch.manual_seed(args.seed)
        torch.use_deterministic_algorithms(args.torch_deterministic and device.type == "cpu")
        torch.backends.cudnn.deterministic = args.torch_deterministic

        # data
        market, pairs = args.env_fn is None, None
        if market:
            fitted = [ColumnModel.from_state_dict(m) for m in state["models"]] if state else None  # its own fits
            pairs = load_pairs(args, fitted)
            first = pairs.series[0]
            spans = "; ".join(f"{k} {int(np.diff(r).sum())} bars" for k, r in pairs.rows.items())
            cost = ", ".join(f"{n} {np.median(pairs.cost[a:b]) / BP:.2f}" for n, (a, b) in
                             zip(pairs.names, pairs.rows["train"]))
            print(f"{args.data_dir or args.data or 'synthetic:signal'}: {len(pairs.names)} pairs, {spans}; "
                  f"{pairs.table.shape[1] - 1} columns; median cost in bp a side: {cost}")
            for gap in (b.gaps[0] for b in pairs.series if b.gaps[0]["count"]):
                print(f"{gap['name']}: {gap['count']} gaps, longest {gap['longest_bars']} bars at {gap['longest_at']}"
                      f" ({args.weekend} over closed hours)")
            if args.select == "expected" and not first.truth:
                raise UsageError("--select expected: the conditional mean is known on synthetic markets only")
            expected = args.select == "expected" or (args.select == "auto" and first.truth)
            by = "mean_expected_bps" if expected else "mean_reward_bps"
        else:
            by = "episode_return"
            print(f"--env-fn {args.env_fn}: plain DQN, unscaled rewards, no baselines")
        lanes = args.num_envs or (1024 if market else 8)

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

        # environment and agent
        monitor = run_dir / "monitor.csv" if args.monitor and not args.eval_only else None
        if monitor and not step0:
            monitor.unlink(missing_ok=True)  # of a run that ended before its first checkpoint
        if args.eval_only and market:
            env, performance = None, {}
            config = state["config"] | {"leverage": args.leverage}
            if config["feature_cols"] != list(args.feature_cols):
                columns = " ".join(config["feature_cols"])
                raise UsageError(f"--feature-cols: {source} was made with the columns {columns}")
        else:
            try:
                env, performance = build_env(args, pairs, lanes, backend, monitor)
            except (ValueError, ImportError) as e:
                raise UsageError(str(e).splitlines()[0]) from e
            built.append(env)
            env.reset(seed=args.seed)
            config = agent_config(args, env) if not args.eval_only else state["config"]
        eval_env = None
        if not market:
            eval_env = ForexVectorEnv(
                None, "eval", min(10, args.eval_episodes), vec_mode="dummy", env_fn=args.env_fn, seed=args.seed + 10**6)
            built.append(eval_env)
        write_json_atomic(asdict(args), run_dir / "args.json")
        path, kept = run_dir / "metrics.jsonl", []
        if step0 and path.exists():  # cut back to the checkpoint
            kept = [line for line in path.read_text().splitlines(True) if line.endswith("\n")][: state["log_lines"]]
        path.write_text("".join(kept))
        jsonl, lines = open(path, "a"), len(kept)
        writer = SummaryWriter(str(run_dir), purge_step=step0 or None)
        if not step0:
            rows = "\n".join(f"|{k}|{v}|" for k, v in asdict(args).items())
            writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
        if args.track:
            wandb.init(
                project=args.wandb_project_name, entity=args.wandb_entity, mode=args.wandb_mode, dir=str(run_dir),
                config=asdict(args), name=run_dir.name, id=run_dir.name.replace("/", "_"), resume="allow")

        agent = Agent(config).to(device)
        averaged = Agent(config).to(device).eval().requires_grad_(False)  # what evaluation, checkpoints and users see
        averaged.load_state_dict(agent.state_dict())
        optimizer = torch.optim.AdamW(agent.online.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay,
                                      fused=True)
        rng = np.random.default_rng(args.seed)
        table = Table(pairs, device) if market else None
        judge = Judge(pairs, args, device) if market else None
        width = 2 if market else config["inputs"]
        replay = Replay(0 if args.eval_only else args.buffer_size, lanes, width)
        global_step = updates = drawn = vec_step = stale = 0
        best = {"score": -math.inf, "step": 0, "agent": None, "updates": 0}
        averages, recent, timing, eval_seconds, rescaled = {}, [], {"steps": 0, "seconds": 0.0}, 0.0, []
        ended = []  # (return, length) of the episodes since the last log point, (2, n) each
        if state:
            averaged.load_state_dict(state["agent"])
            best |= {"agent": cpu_state(averaged), "step": state["global_step"]}
        if step0:
            agent.load_state_dict(state["learner"])
            flags = {k: optimizer.param_groups[0][k] for k in ("weight_decay",)}
            optimizer.load_state_dict(state["optimizer"])
            optimizer.param_groups[0].update(flags)  # these may differ from the run that is continued
            env.set_state(state["env"])
            replay.set_state(state["replay"])
            if not market:  # their episodes start anew: no return runs across the seam
                last = (state["vec_step"] - 1) % replay.steps * lanes
                replay.truncated[last : last + lanes] = True
            rng.bit_generator.state = json.loads(state["rng_numpy"])
            torch.set_rng_state(state["rng_torch"])
            global_step, updates, drawn, vec_step, stale = (
                state[k] for k in ("global_step", "updates", "drawn", "vec_step", "stale"))
            best, averages, recent = state["best"], state["averages"], state["recent"]
            ended = [] if state["ended"] is None else [state["ended"].numpy()]
            if monitor and monitor.exists():
                env.log.flush()
                os.truncate(monitor, min(state["monitor_bytes"], monitor.stat().st_size))
            print(f"resumed {source} at {global_step} transitions, {updates} updates")

    def log(record: dict, step: int):
        nonlocal lines
        record = {k: v if v is not None and math.isfinite(v) else None for k, v in record.items()}
        jsonl.write(json.dumps({"global_step": step, "wall": round(guard.elapsed(), 3)} | record) + "\n")
        jsonl.flush()
        lines += 1
        for key, value in record.items():
            if value is not None:
                writer.add_scalar(key, value, step)
        if args.track:
            wandb.log({k: v for k, v in record.items() if v is not None}, step=step)

    def save(name: str, whole: bool = False):
        """The agent alone, or everything that a resumed run needs."""
        state = {
            "schema": SCHEMA, "config": config, "args": json.loads(json.dumps(asdict(args))),
            "agent": cpu_state(averaged), "models": [m.state_dict() for m in pairs.models] if market else [],
            "global_step": global_step, "updates": updates}
        if whole:
            if env.log:
                env.log.flush()
            state |= {
                "learner": cpu_state(agent), "optimizer": optimizer.state_dict(), "env": env.get_state(),
                "replay": replay.get_state(), "rng_numpy": json.dumps(rng.bit_generator.state),
                "rng_torch": torch.get_rng_state(), "best": best, "drawn": drawn, "vec_step": vec_step, "stale": stale,
                "averages": averages, "recent": recent, "log_lines": lines,
                "ended": torch.from_numpy(np.concatenate(ended, 1)) if ended else None,
                "monitor_bytes": monitor.stat().st_size if monitor else 0}
        with guard.phase("io"):
            save_atomic(state, run_dir / "checkpoints" / name)

    def epsilon() -> float:
        span = max(args.exploration_fraction * args.total_timesteps, 1)
        return max(args.end_e, args.start_e + (args.end_e - args.start_e) * vec_step * lanes / span)  # of steps sent

    def evaluate_and_choose():
        """Evaluate on the eval split (or play), log, keep the best agent."""
        nonlocal stale, eval_seconds
        began = time.monotonic()
        deadline = began + (args.eval_timeout or math.inf)
        if market:
            result, _ = judge.evaluate(averaged, "eval", deadline)
            seen = diagnose(averaged, pairs, "eval", epsilon(), device)
            keys = ("state_dependence", "action_mean", "saturation", "greedy_gap", "dead_units")
            record = {"policy/entropy": seen["policy_entropy"]} | {f"policy/{k}": seen[k] for k in keys}
            record |= {f"value/{k}": seen[k] for k in ("q_mean", "q_action_spread")}
            record |= {f"policy/attribution_{k}": v for k, v in seen["attribution"].items()}
            more = f"turnover {result['agent']['turnover']:.3f}  state_dependence {seen['state_dependence']:.2f}"
        else:
            result, record = play(averaged, eval_env, args.eval_episodes, device, deadline), {}
            more = f"over {result['agent']['episodes']} episodes"
        mine = result["agent"]
        log({f"eval/eval/{k}": v for k, v in mine.items()} | record, global_step)
        recent.append(mine[by])
        value = float(np.mean(recent[-3:])) if by == "mean_reward_bps" else mine[by]  # one realised mean is noise
        if updates and value > best["score"]:
            best.update(score=value, step=global_step, updates=updates, agent=cpu_state(averaged))
            stale = 0
            save("best.pt")
        elif updates:
            stale += 1
        eval_seconds = time.monotonic() - began
        score = f"score {mine['score']:+.3f}  " if mine.get("score") is not None else ""
        unit = " bp" if market else ""
        print(f"{guard.elapsed():6.0f} s  {global_step:>9} transitions  {updates:>6} updates"
              f"  eval {score}{value:+.2f}{unit}  {more}", flush=True)

    # the loop: every step of the lanes is sent off, the learner works, then its result is taken in
    flying = [False] * (env.halves if env else 0)
    if env:
        obs = torch.as_tensor(env.obs, device=device) if backend == "cuda" else torch.from_numpy(env.obs)
        row, small = env.host(env.row).copy(), env.host(env.obs)[:, -width:].copy()
        actions = np.zeros(lanes, np.int64)

    def collect(half: int):
        """Take in the step of a half: transitions to replay, episodes to the log."""
        nonlocal global_step
        _, reward, terminated, truncated = (env.host(x) for x in env.recv(half))
        span, flying[half] = env.spans[half], False
        after = env.host(env.obs)[span, -width:].copy()
        following, done = after.copy(), terminated | truncated
        if done.any():
            following[done] = env.host(env.final_obs)[span, -width:][done]
            ended.append(env.host(env.stats)[:2, span][:, done])
        replay.put(vec_step - 1, span, row=row[span], state=small[span], action=actions[span], reward=reward,
                   next_state=following, terminated=terminated, truncated=truncated)
        row[span], small[span] = env.host(env.row)[span], after
        global_step += span.stop - span.start

    def collect_all():
        for half in range(len(flying)):
            if flying[half]:
                collect(half)
        replay.total = vec_step

    if not step0 and not args.eval_only:
        with guard.phase("eval"):
            evaluate_and_choose()
    saved, marked, step_marked = time.monotonic(), time.monotonic(), global_step
    interval = max(args.eval_interval // lanes, 1)  # vector steps
    while not args.eval_only and vec_step * lanes < args.total_timesteps:
        if guard.should_stop(4.0 + 7.0 * eval_seconds):  # the final evaluations took 5 to 6 of these, the report 3 s
            break
        with guard.phase("rollout"):
            draws, choices = rng.random(lanes), rng.integers(0, config["actions"], lanes)
            explore = draws < (1.0 if vec_step * lanes < args.learning_starts else epsilon())
            for half, span in enumerate(env.spans):
                if flying[half]:
                    collect(half)
                if explore[span].all():
                    greedy = choices[span]
                else:
                    with torch.no_grad():
                        greedy = agent(obs[span].to(device)).argmax(1).cpu().numpy()
                actions[span] = np.where(explore[span], choices[span], greedy)
                env.send(half, actions[span])
                flying[half] = True
            if market:  # at the rows the lanes stand on: does not depend on when a step is taken in
                agent.watch_rewards(np.log1p(np.maximum(args.leverage * pairs.ret[row], RUIN - 1)))
            replay.total = vec_step  # what is in flight is not in replay yet
            vec_step += 1

        learning = global_step >= args.learning_starts and replay.total > args.n_step and args.updates_per_step > 0
        if learning and vec_step % args.train_frequency == 0:
            with guard.phase("learn"):
                decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, global_step / args.total_timesteps)))
                optimizer.param_groups[0]["lr"] = args.learning_rate * decay
                for _ in range(args.updates_per_step):
                    at = replay.sample(rng, args.batch_size, args.n_step)
                    if config["all_actions"]:
                        rows = torch.from_numpy(replay.row[at].astype(np.int64)).to(device)
                        loss, q_mean, target_mean = all_action_loss(agent, table, rows, args.double_q)
                    else:
                        loss, q_mean, target_mean = replay_loss(
                            agent, replay, table, at, args.n_step, args.double_q, device)
                    optimizer.zero_grad()
                    loss.backward()
                    grad_norm = nn.utils.clip_grad_norm_(agent.online.parameters(), args.max_grad_norm)
                    optimizer.step()
                    updates += 1
                    drawn += args.batch_size
                    if updates % args.target_network_frequency == 0:
                        torch._foreach_lerp_(
                            list(agent.target.parameters()), list(agent.online.parameters()), args.tau)
                torch._foreach_lerp_(list(averaged.parameters()), list(agent.parameters()),
                                     1 - args.average**args.updates_per_step)
                averaged.reward_stats.copy_(agent.reward_stats)

        if vec_step % interval == 0 and updates:
            with guard.phase("rollout"):
                collect_all()
            if not math.isfinite(loss_now := float(loss.detach())):
                raise FloatingPointError(f"the loss is not finite after {updates} updates: lower --learning-rate")
            if ended:  # since the last log point
                r, length = np.concatenate(ended, 1).mean(1).tolist()
                averages |= {"charts/episodic_return": r, "charts/episodic_length": length}
                ended.clear()
            if market:  # of the last step
                at = slice((vec_step - 1) % replay.steps * lanes, ((vec_step - 1) % replay.steps + 1) * lanes)
                held, move = replay.next_state[at, 0], np.abs(replay.next_state[at, 0] - replay.state[at, 0])
                paid = pairs.cost[replay.row[at]] * move / BP
                averages |= {"env/turnover": float(move.mean()), "env/exposure": float(held.mean()),
                             "env/costs": float(paid.mean())}
            averages |= {
                "losses/td_loss": loss_now, "losses/q_values": float(q_mean), "losses/grad_norm": float(grad_norm),
                "losses/target_mean": float(target_mean), "charts/learning_rate": args.learning_rate * decay,
                "charts/epsilon": epsilon(), "env/restarts": float(env.restarts)}
            steps, seconds = global_step - step_marked, max(time.monotonic() - marked, 1e-9)
            timing["steps"] += steps
            timing["seconds"] += seconds
            charts = {"SPS": steps / seconds, "updates": updates, "replay_ratio": updates / global_step,
                      "samples_per_transition": drawn / global_step}
            log(averages | {f"charts/{k}": v for k, v in charts.items()}
                | {f"time/{k}": v for k, v in guard.phases().items()}, global_step)
            with guard.phase("eval"):
                evaluate_and_choose()
            if args.rescale:
                with guard.phase("setup"):
                    rescaled.append(rescale_by_measure(env))
            marked, step_marked = time.monotonic(), global_step
            if args.patience and stale >= args.patience:
                print(f"no better agent in {stale} evaluations (--patience): stopping at {global_step} transitions")
                break
        if time.monotonic() - saved > args.checkpoint_interval:
            collect_all()
            save("last.pt", whole=True)
            if args.keep_checkpoints:
                save(f"step_{global_step}.pt")
                rotate(run_dir / "checkpoints", args.keep_checkpoints)
            saved = time.monotonic()

    # the best agent on the eval split is what is reported
    if not args.eval_only:
        collect_all()
        save("last.pt", whole=True)
        if best["agent"]:
            averaged.load_state_dict(best["agent"])
        if not (run_dir / "checkpoints" / "best.pt").exists():
            save("best.pt")
    made, results, audit = state["updates"] if args.eval_only else updates, {}, {}
    with guard.phase("eval"):
        if market:
            (run_dir / "traces").mkdir(exist_ok=True)
            for split in ("test", "eval", "train"):
                seconds = min(args.eval_timeout or math.inf, max(0.3 * guard.remaining(), 0.1))
                results[split], traces = judge.evaluate(averaged, split, time.monotonic() + seconds)
                if results[split]["partial"]:
                    print(f"{split}: evaluated on {len(traces['']['close'])} bars only (time)")
                for name, columns in traces.items():
                    pd.DataFrame(columns).to_parquet(run_dir / "traces" / f"{split}{'_' * bool(name)}{name}.parquet")
            audit = diagnose(averaged, pairs, "eval", epsilon(), device)
            paths = target_paths(averaged, pairs, "eval", args, device, time.monotonic() + 0.2 * guard.remaining())
            audit["overestimation"] = overestimation(averaged, judge, "eval", paths)
            audit["ridge_edge_bps"], audit["ridge_edge_se_bps"] = ridge_edge(judge.series, LEVELS)
            audit["replay_ratio"] = updates / max(global_step, 1)
            audit["verdict"], audit["reasons"] = verdict(audit, results["eval"]["agent"], made)
            record = {"value/overestimation": audit["overestimation"]}
            for split in ("train", "test"):
                record |= {f"eval/{split}/{k}": v for k, v in results[split]["agent"].items()}
            log(record, global_step)
        else:
            until = time.monotonic() + 0.5 * guard.remaining()
            results["eval"] = play(averaged, eval_env, args.eval_episodes, device, until)
            found = f"mean return {results['eval']['agent']['episode_return']:.1f} of a custom environment"
            audit = {"verdict": "healthy" if made else "untrained", "replay_ratio": updates / max(global_step, 1),
                     "reasons": [found]}
    builds = ForexVectorEnv.builds
    if env:
        rate = timing["steps"] / timing["seconds"] if timing["seconds"] else None
        performance |= {"workers": len(env.processes), "steps_per_s": rate, "restarts": env.restarts,
                        "rescaled": rescaled, "worker_usage": env.worker_usage()}
    for one in built:
        one.close()
    writer.close()
    jsonl.close()
    if args.track:
        wandb.finish()

    summary = {
        "status": guard.status, "command": shlex.join(sys.argv), "global_step": global_step, "updates": updates,
        "replay_ratio": audit["replay_ratio"], "samples_per_transition": drawn / max(global_step, 1),
        "best_step": best["step"], "best_updates": best["updates"], "selected_by": by, "env_builds": builds,
        "buffer_allocations": pool.stats()["allocations"],
        "sps": timing["steps"] / timing["seconds"] if timing["seconds"] else None,
        "eval": {s: results[s] for s in SPLITS if s in results}, "audit": audit, "performance": performance,
        "versions": {m.__name__: m.__version__ for m in (torch, np, nb, gym)} | {"python": sys.version.split()[0]},
        "device": {"torch": str(device), "backend": backend, "threads": threads, "cpu_count": os.cpu_count()},
        "data": {"spec": args.env_fn or args.data_dir or args.data or "synthetic:signal"}}
    if market:
        summary["data"] |= {
            "names": list(pairs.names), "sha256": [b.sha256 for b in pairs.series], "rows": pairs.rows,
            "bars": [len(b.close) for b in pairs.series], "gaps": [b.gaps[0] for b in pairs.series],
            "columns": [*args.feature_cols, "cost_bps", "exposure", "drawdown_today"]}

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
    """Agent beside baselines, split by split; then pair by pair on test."""
    from rich.console import Console
    from rich.table import Table

    done = f"{summary['status']} after {summary['global_step']} transitions, {summary['updates']} updates"
    table = Table(title=f"{summary['data']['spec']}: {done}")
    keys = ("score", "mean_expected_bps", "mean_reward_bps", "sharpe", "max_drawdown", "turnover", "exposure", "trades")
    if "test" not in summary["eval"]:
        keys = ("episode_return", "episode_return_std", "episode_length", "episodes")
    for name in ("split", "who", *keys):
        table.add_column(name, justify="left" if name in ("split", "who") else "right")
    blocks = list(summary["eval"].items())
    blocks += [(f"test {name}", r) for name, r in summary["eval"].get("test", {}).get("symbols", {}).items()]
    for split, result in blocks:
        rows = {"agent": result["agent"]} | result["baselines"]
        for name, metrics in rows.items():
            values = [metrics.get(k) for k in keys]
            cells = ["" if x is None else str(x) if isinstance(x, int) else f"{x:.3f}" for x in values]
            table.add_row(split if name == "agent" else "", name, *cells, end_section=name == list(rows)[-1])
    Console(width=130).print(table)


if FORK_SERVER in os.environ:
    gc.collect()
    gc.freeze()

if __name__ == "__main__":
    try:
        code = main()["exit_code"]
    except (UsageError, DataError, CheckpointError, FloatingPointError, WorkerError) as e:
        print(f"error: {e}", file=sys.stderr)
        code = 1 if isinstance(e, (FloatingPointError, WorkerError)) else 2
    except OSError as e:  # a full disk under a log, a folder that went away
        print(f"error: {e.filename or 'writing the run directory'}: {e.strerror}", file=sys.stderr)
        code = 2
    sys.exit(code)
