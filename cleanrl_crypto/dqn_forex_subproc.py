r"""Trades currency pairs with DQN: many lanes step in worker processes over shared memory, or here.

On a laptop: four embedded pairs whose best policy is known, a minute on 2 cores, test score .94 to
.96 of the optimum:

    python cleanrl_crypto/dqn_forex_subproc.py --timeout 120

Real bars, a folder of {SYMBOL}*.parquet or .csv, spread in pips or from a file (timestamp, one
column of price units a symbol):

    python cleanrl_crypto/dqn_forex_subproc.py --data data/forex --symbols EURUSD USDJPY \
        --spread-file data/forex/spread_1h.parquet --weekend flat --timeout 300

How the lanes step is measured at the start; or say it. The trajectories are the same in every mode:

    python cleanrl_crypto/dqn_forex_subproc.py --vec-mode subproc --num-workers 4 --async-halves

Any Gymnasium environment with a Box and a Discrete space, one a lane, in worker processes:

    python cleanrl_crypto/dqn_forex_subproc.py --env-fn my_module:make_env --num-envs 8

GPU, Kaggle: a GPU is used where a probe shows that it works, for the lanes too.

    python cleanrl_crypto/dqn_forex_subproc.py --data /kaggle/input/forex --timeout 3600 \
        --run-dir /kaggle/working/run

Resume after whatever ended the run (the same command starts and continues it), or evaluate:

    python cleanrl_crypto/dqn_forex_subproc.py --run-dir runs/fx --resume auto
    python cleanrl_crypto/dqn_forex_subproc.py --eval-only --checkpoint runs/fx/checkpoints/best.pt

Use the agent in another program, from its checkpoint alone:

    from cleanrl_crypto.dqn_forex_subproc import load_policy
    policy = load_policy("runs/fx/checkpoints/best.pt")
    action = policy(obs)  # (B, columns + 2) -> (B,) 0 short, 1 flat, 2 long

Every flag: --help. Every metric, and what to do when it is off: docs/dqn_forex_subproc.md
"""

import gc
import importlib
import json
import math
import os
import re
import sys
import time
from collections import Counter, defaultdict
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from multiprocessing import connection
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    from common.run import (
        CheckFailed,
        Run,
        RunArgs,
        UsageError,
        answer_help,
        check,
        exit_with,
        experiment,
        flag,
        load_run,
        refuse,
    )
except ModuleNotFoundError as e:
    if e.name != "common":
        raise
    sys.exit(
        f"{Path(__file__).name} needs the folder common/: copy it to {Path(__file__).resolve().parents[1]}"
    )

answer_help(__name__, __file__)

import gymnasium as gym
import numba as nb
import numpy as np
import pandas as pd
import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
from numba import cuda

from common import markets
from common.data import (
    find_file,
    iso,
    load_bars,
    print_facts,
    read_columns,
    split_series,
    utc_times,
)
from common.features import ColumnModel, fit_columns
from common.lanes import Lanes, register, shared
from common.scoring import (
    BP,
    Series,
    best_constant,
    edges,
    path_metrics,
    random_path,
    sparse_linear,
    usual_limit,
    verdict,
)
from common.workers import (
    FORK_SERVER,
    ask,
    carve,
    one_line,
    shared_block,
    start_process,
    worker_context,
)

SCHEMA = 3  # of the checkpoint
SPLITS = ("train", "eval", "test")
LEVELS = np.array([-1.0, 0.0, 1.0])  # positions: short, flat, long
FEW_UPDATES = 3000  # an agent of fewer is not judged
HORIZON = 1  # bars between a decision and the end of its reward
EMBARGO = 24  # bars left out between splits beside the horizon
ROLLOVER = 22  # hour UTC of the carry to the next day: 17:00 in New York in winter
CLOSED_HOURS = 24  # a longer step between two bars is a market that was closed
# hourly medians of a retail broker, 2021-24
SPREAD_PIPS = {"EURUSD": 1.6, "GBPUSD": 1.9, "USDJPY": 1.5, "USDCHF": 1.9}
PIP_SIZES = {  # price units, as brokers quote spreads
    0.0001: "EURUSD GBPUSD AUDUSD NZDUSD USDCHF USDCAD USDSEK USDNOK USDDKK USDPLN USDSGD USDCNH "
    "USDHKD USDZAR USDMXN USDTRY USDILS USDCZK",
    0.01: "USDJPY USDHUF USDTHB USDINR XAUUSD",
}
PIP = {symbol: size for size, symbols in PIP_SIZES.items() for symbol in symbols.split()}
SYNTHETIC_COST = 0.2  # of the bar's sigma, a side: so dear that a policy of signs earns little
RUIN = 1e-6  # floor of a bar's growth and of what a fee leaves
LOST = 3e-6  # growth that ends the episode: above RUIN, a fee may hit the floor in a rising bar
MAX_GRAD_NORM = 10.0  # never reached in a healthy run: it stops one bad batch
# of the averaged weights, an update: about the last 1000, quieter than the last ones
AVERAGE = 0.999
START_E = 1.0  # first probability of a random action: nothing is known yet
LAST_RATE = 0.02  # of --learning-rate, at the end of the cosine
SCHEDULE = 2_000_000  # transitions over which both fall, unless --total-timesteps says
EVAL_EPISODES = 100  # of a custom environment
EVAL_STEPS = 100_000  # vector steps after which these are cut: an episode may never end

ROWS_PER_SECOND = 50_000  # that an evaluation with its baselines walks, at least
WALK = ("growth", "mean", "change", "held")  # of an account, a bar

# what is done to lanes; LOSE: their worker died, the episode is truncated
STEP, FIRST, NEXT, LOSE = range(4)
RET, COST, SWAP_LONG, SWAP_SHORT, FLAT, LAST = range(6)  # columns of a bar
CACHE_LINE = 8  # numbers: as wide as a bar is stored
LEVERAGE, YEAR, LENGTH = range(3)  # numbers of an environment
# a lane's state, an array (N,) each: equity and peak count from 1; worst is the largest drawdown;
# total, squares and turnover are sums of the reward, its square, |change of position|
LANE = dict.fromkeys("row clock episodes position".split(), np.int64)
LANE |= dict.fromkeys("equity peak worst total squares turnover".split(), np.float64)
FLAGS = {"reward": np.float64, "terminated": np.bool_, "truncated": np.bool_}
STATIC = ("table", "bars", "ranges")  # arrays of a market that lanes only read
OUT = "obs reward terminated truncated final_obs stats".split()  # that they write
OWN = ("position",)  # columns that depend on the lane's path
SHARED = ("async_halves", "on_worker_death", "worker_timeout", "seed")  # of all lanes in workers
RULES = ("leverage", "episode_length")  # flags of the environment itself
EPISODE = ("r", "l", "drawdown", "turnover", "sharpe_ratio", "max_drawdown")  # rows of `stats`

MODULE = "cleanrl_crypto.dqn_forex_subproc"  # what workers import
PROBE_FROM = 30.0  # s that are left: with fewer, auto starts no workers, which costs seconds
ATTEMPTS = 3  # restarts of a worker without a step between them
START_SECONDS = 60.0  # for a worker to import this file and to build its environments


# ---------------------------------------------------------------------------------------- arguments
@dataclass
class Args(RunArgs):
    # experiment
    exp_name: str = Path(__file__).stem
    """name of this experiment"""

    # data
    data: str = "synthetic:signal"
    """synthetic:{signal,regime,square,square_regime,noise,drift}[?bars=N&seed=K&...], a folder of
    {SYMBOL}*.parquet or .csv, or files separated by commas, one a pair"""
    symbols: tuple[str, ...] = ("EURUSD", "GBPUSD", "USDJPY", "USDCHF")
    """pairs with the dollar on one side; on synthetic markets names of independent paths"""
    feature_cols: tuple[str, ...] = (
        "rsi_14",
        "ema_10",
        "ema_20",
        "macd",
        "atr_14",
        "ret_1",
        "log_volume",
        "volume_z_24",
        "log_range",
        "log_range_24",
        "hour_sin",
        "hour_cos",
    )
    """columns by name: docs/data.md lists them; scaled on train rows, clipped at 5"""
    split: str = "0.70/0.15/0.15"
    """train/eval/test as shares of the rows, or first days of eval and test: 2023-01-01/2024-01-01"""

    # environment
    num_envs: int | None = None
    """lanes; lane i trades symbol i modulo their number (default: 1024, with --env-fn 8)"""
    episode_length: int = 128
    """bars after which an episode is truncated"""
    leverage: float = 1.0
    """notional over equity of a long or short position, put back to it at every bar for free"""
    spread_pips: tuple[float, ...] = ()
    """pips, one for all or one a symbol, half paid a side; real pairs (default: typical of four majors)"""
    spread_file: str | None = None
    """file with timestamp and a column of spread (price units) a symbol, not with --spread-pips"""
    cost_bps: float | None = None
    """bp of notional a side: all there is on synthetic pairs (default: .2 sigma), a commission on real
    ones (default: 0)"""
    swap_long_bps: tuple[float, ...] = (0.0,)
    """bp of notional that a long pays a night (negative: receives), one for all or one a symbol; at
    22:00 UTC, weekends too"""
    swap_short_bps: tuple[float, ...] = (0.0,)
    """the same for a short"""
    weekend: str = "hold"
    """hold: positions stay open over closed hours, the gap's return and nights are booked; flat: they
    are closed before"""
    env_fn: str | None = None
    """module:factory of a custom environment (Box, Discrete), one a lane, instead of the market"""

    # workers
    vec_mode: str = "auto"
    """single (one kernel, all threads), dummy (blocks in turn), subproc (worker processes), auto: the
    fastest here"""
    num_workers: int | None = None
    """worker processes, or blocks of dummy (default: measured by auto, else one a core)"""
    async_halves: bool = False
    """two halves of the lanes in flight: one steps while the other is told what to do"""
    rescale: bool = False
    """subproc: at evaluations, measure one worker more and one less, keep the fastest"""
    on_worker_death: str = "fail"
    """fail, or restart: a dead worker is replaced and the episodes of its lanes are truncated"""
    worker_timeout: float = 4.0
    """seconds after which a worker that does not answer is taken for dead"""

    # algorithm
    total_timesteps: int | None = None
    """environment transitions, the sum over lanes (default: 2 M; with --timeout: until time or
    patience is over)"""
    learning_starts: int = 16_384
    """transitions with uniform random actions before the first update"""
    buffer_size: int = 1_000_000
    """transitions kept (on markets row numbers and what the path adds: 19 bytes each)"""
    batch_size: int = 2048
    """transitions of an update"""
    updates_per_step: int = 4
    """gradient updates a vector step"""
    gamma: float = 0.95
    """discount a transition"""
    tau: float = 0.01
    """weight of the online network when the target network is updated (1: a hard copy)"""
    target_network_frequency: int = 1
    """updates between updates of the target network"""
    end_e: float = 0.05
    """last probability of a random action, from 1"""
    exploration_fraction: float = 0.3
    """share of --total-timesteps (2 M where it is not given) over which it falls"""
    learning_rate: float = 3e-4
    """AdamW; falls to 2 % by a cosine over --total-timesteps (2 M where it is not given)"""
    weight_decay: float = 0.3
    """AdamW, decoupled"""
    hidden: int = 32
    """units of each of the two hidden layers"""

    # evaluation
    eval_interval: int = 262_144
    """transitions between evaluations on the eval split"""
    patience: int = 0
    """evaluations without a better one after which training stops (0: never)"""

    def __post_init__(self):
        super().__post_init__()
        choices = {
            "weekend": ("hold", "flat"),
            "vec_mode": ("auto", "single", "dummy", "subproc"),
            "on_worker_death": ("fail", "restart"),
        }
        ranges = {
            (0, 1): "end_e exploration_fraction learning_rate weight_decay",
            (0, 0.9999): "gamma",
            (1e-6, 1): "tau",
            (0, 1000): "cost_bps",
            (0.01, 100): "leverage",
            (0, 10**6): "patience",
            (0, 4096): "updates_per_step",
            (0, 10**12): "total_timesteps learning_starts",
            (1, 10**12): "eval_interval",
            (1, 10**6): "num_envs batch_size episode_length target_network_frequency",
            (1, 4096): "hidden num_workers",
            (1, 10**9): "buffer_size",
            (0.1, 1e9): "worker_timeout",
        }
        check(self, choices, ranges)
        rates = (*self.spread_pips, *self.swap_long_bps, *self.swap_short_bps)
        refuse(
            (
                len(set(self.symbols)) < max(len(self.symbols), 1),
                f"--symbols {' '.join(self.symbols)}: at least one, none twice",
            ),
            (
                self.spread_pips and self.spread_file,
                "--spread-pips and --spread-file: give one of them",
            ),
            (
                any(not -100 <= x <= 1000 for x in rates) or min(self.spread_pips, default=0) < 0,
                f"--spread-pips, --swap-long-bps, --swap-short-bps {rates}: must be 0 to 1000 pips, "
                "-100 to 1000 bp",
            ),
        )
        mode = f"--vec-mode {self.vec_mode}"
        here = self.vec_mode in ("single", "dummy")  # without worker processes
        for holds, given, names in (
            (self.env_fn, f"--env-fn {self.env_fn}", (*MARKET, "rescale", "vec_mode")),
            (self.synthetic, f"--data {self.data}", ("spread_pips", "spread_file", "weekend")),
            (self.vec_mode == "single", mode, ("num_workers", "async_halves")),
            (here, mode, ("on_worker_death", "worker_timeout")),
            (self.vec_mode != "subproc", mode, ("rescale",)),
        ):
            for name in names:
                odd = holds and getattr(self, name) != getattr(Args, name)
                refuse((odd, f"{flag(name)} says nothing with {given}: leave one of them out"))

    @property
    def lanes(self):
        return self.num_envs or (8 if self.env_fn else 1024)

    @property
    def synthetic(self):
        return self.data.startswith(markets.PREFIX)


# flags that shape the pairs and their environment
MARKET = (
    "data symbols feature_cols split episode_length leverage spread_pips spread_file cost_bps "
    "swap_long_bps swap_short_bps weekend"
).split()


# --------------------------------------------------------------------------------------------- data
class Pairs(NamedTuple):
    """What lanes walk over: one static table, the rows of pair after pair. Row t earns the bar to
    row t + 1."""

    names: tuple  # S symbols
    series: list  # Bars of each
    models: dict  # symbol -> state_dict of the ColumnModel that made its columns
    table: np.ndarray  # (R, F) float32 columns, the last one the cost of a side in bp
    bars: np.ndarray  # (R, 8) float64: columns RET .. LAST
    rows: dict  # split -> (S, 2) half-open decision rows
    first: np.ndarray  # (S + 1,) row at which each pair begins


def load_series(args):
    """{symbol: bars}. Raises UsageError (one line)."""
    if args.synthetic:
        try:
            seed = markets.parse_law(args.data).seed
        except ValueError as e:
            raise UsageError(f"--data {e}") from e
        base = re.sub(r"\bseed=\d+&?", "", args.data).rstrip("?&")
        base += "&" if "?" in base else "?"
        first = seed * len(args.symbols)  # independent paths of one market
        paths = [f"{base}seed={first + k}" for k in range(len(args.symbols))]
        names = args.symbols
    elif Path(args.data).is_dir():
        names = args.symbols
        paths = [find_file(args.data, symbol) for symbol in args.symbols]
    else:
        paths = [part.strip() for part in args.data.split(",")]
        names = [Path(path).stem[:6] for path in paths]
        refuse(
            (args.symbols != Args.symbols, f"--symbols: {args.data} names its pairs itself"),
            (len(set(names)) < len(names), f"--data {args.data}: two files for one pair"),
        )
    return {name: load_bars(str(path)) for name, path in zip(names, paths)}


def account_return(symbol, close):
    """Next bar's return (T,) per unit of long notional in USD, 0 in the last row.

    XXXUSD: u units bought at P earn u (P' - P) dollars, notional u P. USDXXX: u dollars earn
    u (P' - P) XXX, which are u (P' - P) / P' dollars.
    """
    has_dollar = len(symbol) == 6 and "USD" in (symbol[:3], symbol[3:])
    refuse((not has_dollar, f"--symbols {symbol}: must be XXXUSD or USDXXX, the account is in USD"))
    earned = np.diff(close) / (close[1:] if symbol.startswith("USD") else close[:-1])
    return np.append(earned, 0.0)


def one_a_symbol(name, values, symbols):
    """One value for all symbols, or one a symbol."""
    refuse(
        (
            len(values) not in (1, len(symbols)),
            f"{flag(name)}: {len(values)} values for {len(symbols)} symbols",
        )
    )
    return np.broadcast_to(np.asarray(values, np.float64), len(symbols))


def spread_of(path, symbol, bars):
    """Spread (T,) in price units of every bar, from a file."""
    times, values = read_columns(path, [symbol])
    spread = pd.Series(values[:, 0], times).reindex(bars.timestamp).to_numpy()
    bad = np.flatnonzero(~(spread >= 0))
    if len(bad):
        when = f"{symbol} at {iso(bars.timestamp[bad[0]])} is {spread[bad[0]]}"
        raise UsageError(f"--spread-file {path}: {when}, must be >= 0 ({len(bad)} bars)")
    return spread


def spreads(args, series):
    """Spread in price units of every pair: of every bar, or one for all of them."""
    if args.spread_file:
        return [spread_of(args.spread_file, symbol, bars) for symbol, bars in series.items()]
    known = PIP if args.spread_pips else SPREAD_PIPS
    odd = ", ".join(symbol for symbol in series if symbol not in known)
    refuse(
        (
            odd,
            f"--spread-pips: nothing is known of {odd}: give --spread-pips for pairs in the "
            f"table ({', '.join(PIP)}), --spread-file for others",
        )
    )
    pips = args.spread_pips or [SPREAD_PIPS[symbol] for symbol in series]
    pips = one_a_symbol("spread_pips", pips, series)
    return [n * PIP[symbol] for n, symbol in zip(pips, series)]


def side_costs(args, series):
    """Cost of a side (T,) of every bar, as a share of the notional, of every pair."""
    commission = (args.cost_bps or 0.0) * BP
    if not args.synthetic:
        pairs = zip(spreads(args, series), series.values())
        return [0.5 * spread / bars.close + commission for spread, bars in pairs]
    first, *_ = series.values()
    if args.cost_bps is None:
        commission = SYNTHETIC_COST * min(first.truth.law.sigma)
    return [np.full(len(bars.close), commission) for bars in series.values()]


def bar_rows(symbol, bars, cost, swap_long, swap_short, weekend):
    """(T, 8) of Pairs.bars, for one pair."""
    rows = np.zeros((len(bars.close), CACHE_LINE))
    rows[:, RET] = account_return(symbol, bars.close)
    rows[:, COST] = cost
    times = bars.timestamp.astype("datetime64[s]").astype(np.int64)
    step = np.diff(times)
    length = int(np.median(step))
    nights = np.diff((times + length - ROLLOVER * 3600) // 86_400)
    rows[:-1, SWAP_LONG] = nights * (swap_long * BP)
    rows[:-1, SWAP_SHORT] = nights * (swap_short * BP)
    if weekend == "flat":  # a step of daily bars has 24 hours too
        rows[:-1, FLAT] = step >= max(CLOSED_HOURS * 3600, 1.5 * length)
    return rows


def load_pairs(args, fitted=None):
    """Bars -> columns, costs, splits; fitted on train rows, unless `fitted` has the models of an
    earlier run. Raises UsageError (one line)."""
    by_name = load_series(args)
    names = tuple(by_name)
    series = list(by_name.values())
    refuse((args.lanes < len(names), f"--num-envs {args.lanes}: {len(names)} pairs need one each"))
    unknown = ", ".join(name for name in names if fitted and name not in fitted)
    refuse((unknown, f"--symbols {unknown}: not among the checkpoint's {', '.join(fitted or ())}"))
    split = partial(split_series, series, args.split, HORIZON + EMBARGO)
    models = []
    columns = []
    for name, bars, rows in zip(names, series, split()):
        model, values = fit(args, bars, rows["train"][1], fitted and fitted[name])
        models.append(model)
        columns.append(values)
    splits = split([model.warmup for model in models])

    costs = side_costs(args, by_name)
    long = one_a_symbol("swap_long_bps", args.swap_long_bps, names)
    short = one_a_symbol("swap_short_bps", args.swap_short_bps, names)
    table = []
    rows_of_bars = []
    for k, bars in enumerate(series):
        kind = "XXXUSD" if args.synthetic else names[k]  # quoted in the account's currency
        rows_of_bars.append(bar_rows(kind, bars, costs[k], long[k], short[k], args.weekend))
        table.append(np.column_stack([columns[k], costs[k] / BP]))
    first = np.cumsum([0, *map(len, table)])
    return Pairs(
        names,
        series,
        {name: model.state_dict() for name, model in zip(names, models)},
        np.concatenate(table).astype(np.float32),
        np.concatenate(rows_of_bars),
        {name: first[:-1, None] + [rows[name] for rows in splits] for name in SPLITS},
        first,
    )


def fit(args, bars, stop, state):
    """The columns' model (fitted on rows before `stop`, or an earlier run's), columns (T, F)."""
    try:
        if state is None:
            model = fit_columns(bars, args.feature_cols, stop)
        else:
            model = ColumnModel.from_state_dict(state)
        columns = model.transform(bars)
    except ValueError as e:
        raise UsageError(f"--feature-cols: {e}") from e
    there = " ".join(model.columns)
    refuse((model.columns != args.feature_cols, f"--feature-cols: the checkpoint has {there}"))
    return model, columns


def describe(args, pairs):
    """Name of the run's folder, and what the run is about: it must be the same at a resume."""
    if pairs is None:
        if user_spaces(args.env_fn)["scale"] != 1.0:
            print("uint8 observations (images?): divided by 255, into an MLP without convolutions")
        return args.env_fn.replace(":", "-"), {"spec": args.env_fn}
    if not args.synthetic:
        for bars in pairs.series:
            print_facts(bars)
    elif any(args.swap_long_bps + args.swap_short_bps):
        print("the optimum does not know the swap: a score above 1 is possible")
    name = Path(args.data.split(",")[0].split("?")[0].replace(":", "-")).stem
    return name, {
        "spec": args.data,
        "names": pairs.names,
        "rows": pairs.rows,
        "sha256": [bars.sha256 for bars in pairs.series],
        "bars": [len(bars.close) for bars in pairs.series],
        "columns": [*args.feature_cols, "cost_bps", *OWN],
    }


# ------------------------------------------------------------------------------------------ kernels
@nb.njit(cache=True)
def mix_nb(x):
    """A round of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@nb.njit(cache=True)
def uniform_nb(seed, lane, episode):
    """Counter-based uniform in [0, 1): a function of (seed, lane, episode)."""
    x = mix_nb(np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(lane))
    x = mix_nb(x + np.uint64(episode) * np.uint64(0xD1342543DE82EF95))
    return np.float64(x >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@nb.njit(error_model="numpy", cache=True)
def trade_nb(position, target, bars, t, leverage):
    """One decision and the bar it earns: ONE lane, all scalars but the row t of `bars`.

    position, target: -1, 0, 1 before and now; with x = target * leverage
    equity *= (1 - cost leverage |target - position|) (1 + x ret - |x| swap of its side).
    Returns (growth of equity over the bar, what the fee left, |change of position|).
    """
    change = abs(target - position)
    x = target * leverage
    swap = x * bars[t, SWAP_LONG] if x > 0.0 else -x * bars[t, SWAP_SHORT]
    growth = 1.0 + x * bars[t, RET] - swap
    growth = growth if growth > RUIN else RUIN  # Numba's CUDA target does not know max()
    left = 1.0 - bars[t, COST] * leverage * change
    return growth, left if left > RUIN else RUIN, change


@nb.njit(error_model="numpy", cache=True)
def observe_nb(obs, i, table, t, position):
    """Row i of `obs`: the columns of row t of the table, and those of the lane's path (OWN)."""
    columns = table.shape[1]
    for k in range(columns):
        obs[i, k] = table[t, k]
    obs[i, columns] = position


def lane_py(i, mode, action, market, numbers, seeds, lane, out):
    """Step lane i; or (mode) begin its first or next episode, or lose the one that it is in.

    market: table (R, F), bars (R, 8), ranges (S, 2) of the pairs' rows. lane: the arrays of LANE.
    out: obs (N, F + 1), reward, terminated, truncated (N,), and of the episode that ended, written
    whenever a flag is set, final_obs (N, F + 1), stats (6, N).
    """
    table, bars, ranges = market
    row, clock, episodes, position, equity, peak, worst, total, squares, turnover = lane
    obs, reward, terminated, truncated, final_obs, stats = out
    t = row[i]
    done = False
    if mode == STEP:
        choice = action[i]
        target = choice - 1 if bars[t, FLAT] == 0.0 else 0
        growth, left, change = trade_nb(position[i], target, bars, t, numbers[LEVERAGE])
        factor = growth * left
        earned = math.log(factor)
        worth = equity[i] * factor
        equity[i] = worth
        if worth > peak[i]:
            peak[i] = worth
        if worth < peak[i] * (1.0 - worst[i]):  # a division costs more than the test
            worst[i] = 1.0 - worth / peak[i]
        total[i] += earned
        squares[i] += earned * earned
        turnover[i] += change
        ruined = factor <= LOST
        row[i] = t + 1
        clock[i] = clock[i] + 1
        position[i] = target
        reward[i] = earned if 0 <= choice <= 2 else math.nan  # on a GPU nobody else looks at it
        terminated[i] = ruined
        truncated[i] = not ruined and (clock[i] >= numbers[LENGTH] or bars[t, LAST] != 0.0)
        done = terminated[i] or truncated[i]
    elif mode == LOSE:
        reward[i] = 0.0
        terminated[i] = False
        truncated[i] = True
        done = True
    if done:
        n = clock[i] if clock[i] > 0 else 1
        mean = total[i] / n
        variance = squares[i] / n - mean * mean
        observe_nb(final_obs, i, table, row[i], position[i])
        stats[0, i] = total[i]
        stats[1, i] = clock[i]
        stats[2, i] = 1.0 - equity[i] / peak[i]
        stats[3, i] = turnover[i] / n
        stats[5, i] = worst[i]
        # a constant reward leaves a variance of rounding errors
        stats[4, i] = (
            mean * math.sqrt(numbers[YEAR] / variance) if variance > 1e-12 * mean * mean else 0.0
        )
    if done or mode == FIRST or mode == NEXT:
        episodes[i] = 0 if mode == FIRST else episodes[i] + 1
        start = ranges[i % ranges.shape[0], 0]
        stop = ranges[i % ranges.shape[0], 1]
        row[i] = start + np.int64(uniform_nb(seeds[0], i, episodes[i]) * (stop - start))
        clock[i] = 0
        position[i] = 0
        equity[i] = 1.0
        peak[i] = 1.0
        worst[i] = 0.0
        total[i] = 0.0
        squares[i] = 0.0
        turnover[i] = 0.0
    observe_nb(obs, i, table, row[i], position[i])


# arrays are borrowed for a call: counting references to 23 of them for every lane would cost more
FAST = {"error_model": "numpy", "_nrt": False}
lane_nb = nb.njit(forceinline=True, **FAST)(lane_py)


@nb.njit(cache=True, **FAST)
def step_block(action, market, numbers, seeds, lane, out, lo, hi, mode):
    """Lanes lo to hi on this thread."""
    for i in range(lo, hi):
        lane_nb(i, mode, action, market, numbers, seeds, lane, out)


@nb.njit(parallel=True, cache=True, **FAST)
def step_cpu(action, market, numbers, seeds, lane, out, lo, hi, mode):
    """Lanes lo to hi on all threads."""
    for i in nb.prange(lo, hi):
        lane_nb(i, mode, action, market, numbers, seeds, lane, out)


@lru_cache(None)
def cuda_step():
    """The same lane on the GPU, one thread a lane."""
    lane_cuda = cuda.jit(device=True)(lane_py)

    @cuda.jit
    def step_cuda(action, market, numbers, seeds, lane, out, lo, hi, mode):
        i = lo + cuda.grid(1)
        if i < hi:
            lane_cuda(i, mode, action, market, numbers, seeds, lane, out)

    return step_cuda


def market_block(kernel, arrays):
    """block(lo, hi, mode): a kernel on the market's lanes lo to hi, in their arrays."""
    market, lane, out = (tuple(arrays[name] for name in names) for names in (STATIC, LANE, OUT))
    return partial(kernel, arrays["action"], market, arrays["numbers"], arrays["seeds"], lane, out)


# ---------------------------------------------------------------------------- a user's environments
def make_user_env(env_fn):
    """`module:factory` -> factory(). ValueError for what does not fit."""
    module, _, factory = env_fn.partition(":")
    if os.getcwd() not in sys.path:  # a script's own folder is on the path, the user's is not
        sys.path.insert(0, os.getcwd())
    make = getattr(importlib.import_module(module), factory, None)
    if make is None:
        raise ValueError(f"must be module:factory, {module} has no {factory!r}")
    env = make()
    spaces = getattr(env, "observation_space", None), getattr(env, "action_space", None)
    if not isinstance(spaces[0], gym.spaces.Box) or not isinstance(spaces[1], gym.spaces.Discrete):
        raise ValueError(f"needs an environment with a Box and a Discrete space, has {spaces}")
    return env


def flat(env, obs):
    """An observation as (inputs,) float32. ValueError if it is not of its space's shape."""
    obs = np.asarray(obs, np.float32)
    there = env.observation_space.shape
    if obs.shape != there:
        raise ValueError(f"an observation has the shape {obs.shape}, its space {there}")
    return obs.reshape(-1)


def user_step(env, action):
    """env.step() without its info. ValueError for what is no step."""
    step = env.step(action + int(env.action_space.start))
    if len(step) != 5:
        raise ValueError(f"step() returned {len(step)} values, Gymnasium's returns five")
    obs, reward, terminated, truncated, _ = step
    obs = flat(env, obs)
    if not (math.isfinite(reward) and np.isfinite(obs).all()):
        raise ValueError(f"step() returned the reward {reward}, the observation {obs[:9]}")
    return obs, reward, terminated, truncated


def try_user_env(pipe, env_fn):
    """In a process of its own: build, reset and step one; send its spaces, or why it is none."""
    try:
        env = make_user_env(env_fn)
        flat(env, env.reset(seed=0)[0])
        user_step(env, 0)
        env.close()
        box = env.observation_space
        low, high = (np.float32(x).reshape(-1) for x in (box.low, box.high))
        spaces = {
            "box": gym.spaces.Box(low, high, dtype=np.float32),
            "actions": int(env.action_space.n),
            "start": int(env.action_space.start),
            "scale": 1 / 255 if box.dtype == np.uint8 else 1.0,  # an image
        }
        pipe.send(spaces)
    except BaseException as e:  # also a sys.exit() of the user's
        pipe.send(one_line(e))


@lru_cache(None)
def user_spaces(env_fn):
    """The spaces of a user's environment, from a process that may die or hang. UsageError."""
    spaces = ask(worker_context(MODULE), try_user_env, env_fn, seconds=START_SECONDS)
    refuse((isinstance(spaces, str), f"--env-fn {env_fn}: {spaces}"))  # or why it has none
    return spaces


class UserBlock:
    """Steps a block of a user's environments, one after the other, into the lanes' arrays."""

    def __init__(self, env_fn, lanes, arrays):
        self.a = SimpleNamespace(**arrays)
        self.envs = {i: make_user_env(env_fn) for i in lanes}

    def __call__(self, lo, hi, mode):
        for i in range(lo, hi):
            if mode != STEP or self.step(i):
                self.begin(i, mode)

    def step(self, i):
        a = self.a
        obs, reward, terminated, truncated = user_step(self.envs[i], int(a.action[i]))
        a.reward[i] = reward
        a.terminated[i] = terminated
        a.truncated[i] = truncated
        a.total[i] += reward
        a.clock[i] += 1
        done = terminated or truncated
        (a.final_obs if done else a.obs)[i] = obs
        return done

    def begin(self, i, mode):
        """Note the episode that ended, or was lost with a worker, and begin another."""
        a = self.a
        seed = None
        if mode == LOSE:
            a.reward[i] = 0.0
            a.terminated[i] = False
            a.truncated[i] = True
            a.final_obs[i] = a.obs[i]
        if mode in (FIRST, LOSE):  # what starts anew does not repeat its first episodes
            seed = int(a.seeds[0]) + i + int(a.seeds[1]) * len(a.obs)
        a.stats[:, i] = np.nan
        a.stats[:2, i] = a.total[i], a.clock[i]
        a.total[i] = 0.0
        a.clock[i] = 0
        a.obs[i] = flat(self.envs[i], self.envs[i].reset(seed=seed)[0])

    def close(self):
        for env in self.envs.values():
            env.close()


# ------------------------------------------------------------------------------------------ workers
class WorkerError(CheckFailed):
    """A worker failed; `worker` is its number, `why` what it raised, or its fate."""

    def __init__(self, worker, lanes, why):
        self.worker = worker
        self.why = why
        where = " and ".join(f"{lo}-{hi - 1}" for lo, hi in lanes)
        super().__init__(f"worker {worker}, lanes {where}: {why}")


def work(pipe, raw, layout, env_fn, lanes):
    """A worker: carries out messages (lo, hi, mode) until the pipe closes."""
    block = None
    try:
        arrays = carve(raw, layout)
        block = UserBlock(env_fn, lanes, arrays) if env_fn else market_block(step_block, arrays)
        block(0, 0, STEP)  # read from the cache before the first step's deadline runs
        pipe.send("")
        while True:
            block(*pipe.recv())
            pipe.send("")
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except Exception as e:  # the parent raises it as a WorkerError
        with suppress(OSError):
            pipe.send(one_line(e))
    finally:
        if env_fn and block:
            block.close()


class WorkerLanes(Lanes):
    """Lanes in blocks, stepped in this process or by worker processes that share their arrays.

    step_lanes(), or send() and recv() by halves: an action is a tensor (lanes,) of int64; reward
    (float64), terminated and truncated (bool) are views that the next step overwrites; `obs`
    (N, width) float32 stands beside them; final_obs (N, width) and stats (6, N: EPISODE) hold the
    last episode of every lane that ended. vec_mode: single (all threads), dummy (blocks in turn),
    subproc.
    """

    first_action = 0  # of a user's space
    scale = 1.0  # of a user's observations

    def __init__(
        self,
        static,
        box,
        actions,
        num_envs,
        seed=1,
        *,
        env_fn=None,
        vec_mode="single",
        num_workers=1,
        async_halves=False,
        backend="cpu",
        on_worker_death="fail",
        worker_timeout=4.0,
    ):
        halves = 2 if async_halves else 1
        num_workers = 1 if vec_mode == "single" else num_workers
        refuse(
            (
                num_envs < halves * num_workers or num_envs % halves,
                f"--num-envs {num_envs}: {num_workers} workers in {halves} halves need a lane each, "
                "halves the same number",
            )
        )
        super().__init__(num_envs, box, gym.spaces.Discrete(actions), backend, seed)
        self.env_fn = env_fn
        self.vec_mode = vec_mode
        self.halves = halves
        self.actions = actions
        self.restart = on_worker_death == "restart"
        self.worker_timeout = worker_timeout
        self.restarts = 0
        self.block = None
        self.processes = {}  # worker -> its process
        self.pipes = {}
        self.failures = Counter()
        self.flying = [False] * halves
        self.owed = defaultdict(list)  # worker -> halves that it was sent, in order
        self.lost = set()  # (worker, half) whose episodes went down with it
        each = LANE | FLAGS | {"action": np.int64}
        observed = (num_envs, *box.shape)
        self.layout = {name: (x.shape, x.dtype) for name, x in static.items()}
        self.layout |= {name: ((num_envs,), kind) for name, kind in each.items()}
        self.layout |= {
            "seeds": ((2,), np.int64),  # the seed, and how often lanes started anew
            "obs": (observed, np.float32),
            "final_obs": (observed, np.float32),
            "stats": ((len(EPISODE), num_envs), np.float64),
        }
        if vec_mode == "subproc":
            self.share()
        else:
            for name, layout in self.layout.items():
                self.take(name, *layout)
        for name, x in static.items():
            getattr(self, name).copy_(torch.from_numpy(x))
        self.divide(num_workers)

    def share(self):
        """All arrays in memory that the workers see too."""
        self.context = worker_context(MODULE)
        self.raw = shared_block(self.context, self.layout)
        self.arrays = carve(self.raw, self.layout)
        for name, array in self.arrays.items():
            setattr(self, name, torch.from_numpy(array))

    def divide(self, num_workers):
        """Lanes of half h and worker w: blocks[h][w] = (lo, hi); lanes of half h: spans[h]."""
        n = self.num_envs // self.halves
        cuts = [n * w // num_workers for w in range(num_workers + 1)]
        self.blocks = [
            [(h * n + lo, h * n + hi) for lo, hi in zip(cuts, cuts[1:])] for h in range(self.halves)
        ]
        self.spans = [slice(h * n, h * n + n) for h in range(self.halves)]
        self.num_workers = num_workers

    # processes
    def start_workers(self, before=0):
        """Start all workers from number `before` on."""
        for failure in self.start(range(before, self.num_workers)):
            self.fail(*failure)

    def start(self, workers):
        """Start workers and wait until they are ready; returns those which are not, and why."""
        for w in workers:
            lanes = [i for blocks in self.blocks for i in range(*blocks[w])] if self.env_fn else []
            self.processes[w], self.pipes[w] = start_process(
                self.context, work, self.raw, self.layout, self.env_fn, lanes
            )
        deadline = time.monotonic() + START_SECONDS
        failures = []
        for w in workers:
            why = f"not ready after {START_SECONDS:g} s"
            if self.pipes[w].poll(max(deadline - time.monotonic(), 0.0)):
                why = self.answer(w)
            failures += [(w, why)] * bool(why)
        return failures

    def fail(self, w, why):
        self.close()
        raise WorkerError(w, [blocks[w] for blocks in self.blocks], why)

    def answer(self, w):
        """Read what worker w sent; returns "" or why it failed."""
        try:
            why = self.pipes[w].recv()
        except (EOFError, OSError):
            self.processes[w].join(1.0)
            return (
                f"died (exit code {self.processes[w].exitcode}; a program that starts workers "
                "needs if __name__ == '__main__':)"
            )
        if self.owed[w] and not why:
            done = w, self.owed[w].pop(0)
            if done not in self.lost:  # a lost step proves nothing
                self.failures[w] = 0
            self.lost.discard(done)
        return why

    def stop(self, workers, seconds=0.0):
        for w in workers:
            self.pipes.pop(w).close()  # a worker that is well closes its environments and ends
        for w in workers:
            process = self.processes.pop(w)
            process.join(seconds)
            process.kill()
            process.join()

    def replace(self, w, why):
        """A new worker w, which loses the episodes of the steps that the old one owed."""
        failures = [(w, why)]
        owed = self.owed.pop(w, [])
        while failures:
            self.failures[w] += 1
            if not self.restart or self.failures[w] > ATTEMPTS:
                self.fail(*failures[0])
            self.restarts += 1
            self.seeds[1] += 1
            self.stop([w])
            failures = self.start([w])
        for half in range(self.halves):
            if half in owed or self.env_fn:  # the market's lanes live in the arrays
                self.lost.add((w, half))
        for half in owed:
            self.tell(w, half)

    def tell(self, w, half):
        mode = LOSE if self.mode == STEP and (w, half) in self.lost else self.mode
        self.owed[w].append(half)
        with suppress(OSError):  # it is dead: collecting its answer finds out
            self.pipes[w].send((*self.blocks[half][w], mode))

    def rescale(self, num_workers):
        """Add or retire workers between steps; the trajectories stay the same."""
        most = self.num_envs // self.halves
        refuse(
            (self.env_fn or not self.processes, "rescale: a market's lanes in worker processes"),
            (
                any(self.flying) or not 1 <= num_workers <= most,
                f"rescale to {num_workers}: between steps, from 1 to {most}",
            ),
        )
        before = self.num_workers
        self.stop(range(num_workers, before))
        self.divide(num_workers)
        self.start_workers(min(before, num_workers))

    def worker_usage(self):
        """Per worker: pid, cpu_seconds, rss and uss (its own memory) in bytes."""
        usage = []
        for process in self.processes.values():
            with suppress(psutil.Error):
                worker = psutil.Process(process.pid)
                memory = worker.memory_full_info()
                usage.append(
                    {
                        "pid": worker.pid,
                        "cpu_seconds": sum(worker.cpu_times()[:2]),  # user, system
                        "rss": memory.rss,
                        "uss": memory.uss,
                    }
                )
        return usage

    # stepping
    def go(self, half, mode):
        """Start a kernel, or the workers, on the lanes of a half."""
        self.mode = mode
        self.flying[half] = True
        if self.processes and (mode == STEP or self.block is None):
            for w in range(self.num_workers):
                self.tell(w, half)
            return
        for lo, hi in self.blocks[half]:
            self.block(lo, hi, mode)

    def send(self, half, action):
        """Start the step of a half (0 or 1 with async_halves, else 0)."""
        self.action[self.spans[half]] = action
        self.go(half, STEP)

    def recv(self, half=0):
        """Wait for the step of a half: (reward, terminated, truncated), views of its lanes."""
        patience = self.worker_timeout if self.mode == STEP else START_SECONDS
        deadline = time.monotonic() + patience
        while pipes := {self.pipes[w]: w for w, owed in self.owed.items() if half in owed}:
            ready = connection.wait(pipes, max(deadline - time.monotonic(), 0.0))
            failures = [(pipes[p], why) for p in ready if (why := self.answer(pipes[p]))]
            if not ready:
                failures = [(w, f"no answer in {patience:g} s") for w in pipes.values()]
            for w, why in failures:
                self.replace(w, why)
                deadline = time.monotonic() + patience
        self.flying[half] = False
        span = self.spans[half]
        return self.reward[span], self.terminated[span], self.truncated[span]

    def step_lanes(self, action):
        self.action.copy_(action)
        self.all_lanes(STEP)
        return self.reward, self.terminated, self.truncated

    def all_lanes(self, mode):
        for half in range(self.halves):
            self.go(half, mode)
        for half in range(self.halves):
            self.recv(half)

    def reset_lanes(self, first, options):
        self.seeds[0] = self.seed
        self.all_lanes(FIRST if first else NEXT)

    def observe(self):
        return self.obs

    def observe_final(self, lanes):
        return self.final_obs[lanes]

    def episode(self):
        return dict(zip(EPISODE, self.stats))

    def close_extras(self, **kwargs):
        self.stop(list(self.processes), 1.0)
        super().close_extras(**kwargs)


class ForexVectorEnv(WorkerLanes):
    """Lanes that trade currency pairs, lane i pair i % S. Same-step autoreset; truncation at
    `episode_length` bars or at the end of the split's rows; termination at ruin.

    Observation (F + 1,) float32: the row's columns, position. Action: 0 short, 1 flat,
    2 long. Reward: log growth of equity net of costs.
    """

    SAVED = (*LANE, "seeds", "obs")

    def __init__(
        self,
        pairs,
        split="train",
        num_envs=1024,
        *,
        leverage=1.0,
        episode_length=128,
        **kwargs,
    ):
        dearest = leverage * pairs.bars[:, COST].max()
        refuse((dearest >= 1, f"--leverage {leverage}: a trade would cost {dearest:.3g} of equity"))
        rows = np.asarray(pairs.rows[split], np.int64)
        bars = pairs.bars.copy()
        bars[rows[:, 1] - 1, LAST] = 1.0
        year = pairs.series[0].bars_per_year
        static = dict(zip(STATIC, (pairs.table, bars, rows)))
        static["numbers"] = np.array([leverage, year, episode_length], np.float64)
        box = gym.spaces.Box(-np.inf, np.inf, (pairs.table.shape[1] + len(OWN),), np.float32)
        super().__init__(static, box, len(LEVELS), num_envs, **kwargs)
        kernel = step_cpu if self.vec_mode == "single" else step_block
        if self.backend == "cuda":
            kernel = cuda_step()[(num_envs + 127) // 128, 128]
        self.block = market_block(kernel, self.arrays)
        if self.vec_mode == "subproc":
            self.block(0, 0, STEP)  # compiled and cached before the workers start
            self.start_workers()


class CustomVectorEnv(WorkerLanes):
    """A user's environments, always in worker processes; lane i is seeded with seed + i."""

    def __init__(self, env_fn, num_envs=8, seed=1, **kwargs):
        spaces = user_spaces(env_fn)
        self.first_action = spaces["start"]
        self.scale = spaces["scale"]
        kwargs = {"vec_mode": "subproc", "env_fn": env_fn} | kwargs
        super().__init__({}, spaces["box"], spaces["actions"], num_envs, seed, **kwargs)
        self.start_workers()

    def state_dict(self):
        return {"seed": self.seed, "starts": int(self.seeds[1])}

    def load_state_dict(self, state):
        """New episodes, with seeds that no earlier start had."""
        self.seeds[1] = state["starts"] + 1
        self.reset(seed=state["seed"])


def make_vec(num_envs=8, split_name="train", pairs=None, **kwargs):
    """gymnasium.make_vec("cleanrl_crypto/Forex-v0", num_envs=8, data=..., leverage=2, ...).

    Keywords: the market's flags and seed, what WorkerLanes takes, `pairs` of an earlier
    load_pairs(); or env_fn.
    """
    if "env_fn" in kwargs:
        return CustomVectorEnv(num_envs=num_envs, **kwargs)
    flags = {name: kwargs.pop(name) for name in MARKET if name in kwargs}
    args = Args(**flags)
    rules = {name: getattr(args, name) for name in RULES}
    return ForexVectorEnv(pairs or shared(load_pairs, args), split_name, num_envs, **rules, **kwargs)


register("cleanrl_crypto/Forex-v0", make_vec)


# ------------------------------------------------------------------------- how lanes step, measured
def measure(envs, seconds):
    """Lane-steps/s with random actions, observations written."""
    actions = torch.arange(8 * envs.num_envs, device=envs.torch_device) % envs.actions
    actions = actions.view(8, -1)
    envs.step_lanes(actions[0])  # warms up
    steps = 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        envs.step_lanes(actions[steps % 8])
        steps += 1
    return steps * envs.num_envs / (time.perf_counter() - began)


def probe(make, modes, seconds=0.25):
    """Every mode measured; one that cannot run here has 0 and its error."""
    table = []
    builds = Lanes.builds
    for mode, workers in modes:
        row = {"vec_mode": mode, "num_workers": workers, "steps_per_s": 0.0}
        try:
            with closing(make(vec_mode=mode, num_workers=workers)) as envs:
                envs.reset()
                row["steps_per_s"] = measure(envs, seconds)
        except (WorkerError, OSError) as e:
            row["error"] = str(e)
        table.append(row)
        print(
            f"  {mode:8} {workers} worker(s) {row['steps_per_s']:>14,.0f} lane-steps/s "
            f"{row.get('error', '')}"
        )
    Lanes.builds = builds  # these do not count
    return table


def candidates(args, pairs, backend):
    """[(vec_mode, num_workers), ...] of which the fastest is taken."""
    if backend == "cuda" or (pairs and args.eval_only):
        return [("single", 1)]
    cores = min(os.cpu_count() or 1, args.lanes // (1 + args.async_halves))
    if args.vec_mode != "auto":
        return [(args.vec_mode, args.num_workers or cores)]
    counts = [args.num_workers] if args.num_workers else sorted({1, cores})
    modes = [("subproc", workers) for workers in counts]
    return [("single", 1), ("dummy", 1), *modes] if pairs else modes


def build_lanes(run, pairs):
    """The training environment, and how its mode was found."""
    args = run.args
    alone = pairs and args.vec_mode in ("auto", "single") and not args.async_halves
    backend = run.backend if alone else "cpu"
    refuse(
        (
            args.backend == "cuda" and not alone,
            "--backend cuda steps currency pairs in one process, without halves",
        )
    )
    kwargs = {name: getattr(args, name) for name in (SHARED + RULES if pairs else SHARED)}
    make = partial(CustomVectorEnv, args.env_fn, args.lanes, **kwargs)
    if pairs:
        make = partial(ForexVectorEnv, pairs, "train", args.lanes, backend=backend, **kwargs)
    modes = candidates(args, pairs, backend)
    table = []
    if pairs and len(modes) > 2 and run.guard.remaining() < PROBE_FROM:
        print("vec-mode auto: no time to try worker processes")
        modes = modes[:2]
    if len(modes) > 1:
        table = probe(make, modes, min(0.25, 0.01 * max(run.guard.remaining(), 1.0)))
        best = max(table, key=lambda row: row["steps_per_s"])
        modes = [(best["vec_mode"], best["num_workers"])]
    mode, workers = modes[0]
    try:
        envs = make(vec_mode=mode, num_workers=workers)
    except (WorkerError, OSError) as e:
        if mode != "subproc" or not pairs:
            raise
        print(f"--vec-mode subproc does not run here ({e}): dummy, the same trajectories")
        envs = make(vec_mode="dummy", num_workers=1)
    print(f"vec-mode {envs.vec_mode}, {args.lanes} lanes, {len(envs.processes)} worker processes")
    envs.reset(seed=args.seed)
    return envs, {
        "mode": envs.vec_mode,
        "lanes": args.lanes,
        "backend": backend,
        "probe": table,
        "rescaled": [],
    }


def rescale_by_measure(envs, seconds=0.2):
    """{workers: lane-steps/s}: one worker less and one more, measured between steps; the fastest
    stays. The trajectories are not touched."""
    state = envs.state_dict()
    now = envs.num_workers
    rates = {}
    most = max(now, min(envs.num_envs // envs.halves, 2 * (os.cpu_count() or 1)))
    for workers in sorted({max(now - 1, 1), now, min(now + 1, most)}):
        envs.rescale(workers)
        rates[workers] = measure(envs, seconds)
    envs.rescale(max(rates, key=rates.get))
    envs.load_state_dict(state)
    return rates


# ----------------------------------------------------------------------------------------- networks
class QNetwork(nn.Module):
    """Q of every action. config: plain values that rebuild it; scale: 1/255 if it sees images."""

    def __init__(self, config):
        super().__init__()
        self.scale = config["scale"]
        hidden = config["hidden"]
        self.body = nn.Sequential(
            nn.Linear(config["inputs"], hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.head = nn.Linear(hidden, config["actions"])

    def forward(self, obs):  # (B, inputs) -> (B, actions)
        return self.head(self.body(obs * self.scale))


def agent_config(args, pairs, envs):
    """Plain values that rebuild the network, and the scalers of its columns, from a checkpoint."""
    config = {
        "inputs": envs.obs.shape[1],
        "actions": envs.actions,
        "hidden": args.hidden,
        "start": envs.first_action,
        "scale": envs.scale,
        "models": None,
        "reward_scale": 1.0,
    }
    if pairs:
        config["models"] = pairs.models
        config["reward_scale"] = 1 / full_position_std(pairs, args.leverage)
    return config


def full_position_std(pairs, leverage):
    """Standard deviation of a full position's reward on train rows, which no policy can shrink."""
    ret = np.concatenate([pairs.bars[a:b, RET] for a, b in pairs.rows["train"]]) * leverage
    limit = min(usual_limit(ret), 1 - RUIN)  # beyond it are bad ticks
    return float(np.log1p(ret.clip(-limit, limit)).std()) or 1.0


def load_policy(checkpoint: str | Path, device="cpu"):
    """policy(obs) -> actions (B,) int64 from a checkpoint file alone: the greedy policy that
    evaluation reports.

    obs (B, ...): the environment's own batch, NumPy. Raises CheckpointError (one line).
    """
    state = load_run(checkpoint, Path(__file__), SCHEMA, device)
    network = QNetwork(state["config"]).to(device).eval().requires_grad_(False)
    network.load_state_dict(state["agent"])
    return partial(greedy, network, state["config"]["start"], device)


def greedy(network, start, device, obs):
    obs = torch.as_tensor(np.asarray(obs, np.float32), device=device).flatten(1)
    return network(obs).argmax(1).cpu().numpy() + start


# ---------------------------------------------------------------------------------------- algorithm
def linear_schedule(start, end, duration, t):
    """From `start` to `end` over `duration`, then `end`."""
    return max(end, start + (end - start) * t / max(duration, 1))


def cosine(t, total):
    """From 1 to LAST_RATE."""
    done = min(1.0, t / max(total, 1))
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))


def td_target(reward, done, gamma, next_target, next_online):
    """Double DQN's target (B,): reward + gamma (1 - done) Q'(a*), a* of the online network (van
    Hasselt et al. 2016). reward, done (B,); next_target, next_online (B, A): Q at the next state."""
    best = next_online.argmax(1, keepdim=True)
    return reward + gamma * (1 - done) * next_target.gather(1, best)[:, 0]


@torch.no_grad()
def move_towards(follower, leader, weight):
    """follower += weight (leader - follower), in place; no graph may grow behind it."""
    torch._foreach_lerp_(list(follower.parameters()), list(leader.parameters()), weight)


class Replay:
    """Ring of transitions on the learner's device, lanes innermost.

    On a market a row number stands for the columns (the next row is row + 1, also at an episode's
    end: rows do not jump), and own, next_own (n, width) hold what depends on the lane's path;
    elsewhere they are the whole observation.
    """

    def __init__(self, size, lanes, width, table, device):
        self.lanes = lanes
        self.width = width
        self.table = table
        self.device = device
        # vector steps: room for them, how many are in
        self.steps = max(size // lanes, 2)
        self.total = 0
        # one more: the step in flight
        n = (self.steps + 1) * lanes
        each = 11 + 8 * width
        free = psutil.virtual_memory().available
        if device.type == "cuda":
            free = torch.cuda.mem_get_info()[0]
        need = f"{n * each / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
        refuse((n * each > 0.8 * free, f"--buffer-size {size} needs {need}"))
        zeros = partial(torch.zeros, device=device)
        self.fields = {
            "row": zeros(n, dtype=torch.int32),
            "action": zeros(n, dtype=torch.int16),
            "reward": zeros(n),
            "own": zeros((n, width)),
            "next_own": zeros((n, width)),
            "terminated": zeros(n, dtype=torch.bool),
        }

    def at(self, step):
        """Views of the transitions of a vector step, a row a lane."""
        begin = step % (self.steps + 1) * self.lanes
        return {name: x[begin : begin + self.lanes] for name, x in self.fields.items()}

    def sample(self, rng, n):
        """obs (n, inputs), action (n,), reward (n,), next_obs, terminated (n,): a truncated episode
        bootstraps."""
        oldest = max(self.total - self.steps, 0)
        step = rng.integers(oldest, self.total, n) % (self.steps + 1)
        at = torch.from_numpy(step * self.lanes + rng.integers(0, self.lanes, n)).to(self.device)
        row, action, reward, obs, next_obs, terminated = (x[at] for x in self.fields.values())
        if self.table is not None:
            obs = torch.cat([self.table[row.long()], obs], 1)
            next_obs = torch.cat([self.table[row.long() + 1], next_obs], 1)
        return obs, action.long(), reward, next_obs, terminated.float()

    def state_dict(self):
        n = min(self.total, self.steps + 1) * self.lanes
        fields = {name: x[:n].cpu().clone() for name, x in self.fields.items()}
        return fields | {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"]
        for name, x in self.fields.items():
            x[: len(state[name])] = state[name].to(self.device)


class Monitor:
    """monitor.csv in Stable-Baselines3's format, a line an episode. What ended stays on the lanes'
    device until a log point, or until it is much."""

    def __init__(self, path, name, resumed):
        self.path = path
        self.steps = []
        self.ended = []
        self.start = time.time()  # of the first run, from which load_results() counts t
        self.file = path.open("a" if resumed else "w")
        if not self.file.tell():
            header = json.dumps({"t_start": self.start, "env_id": name})
            self.file.write(f"#{header}\n{','.join(('r', 'l', 't', *EPISODE[2:]))}\n")

    def add(self, done, stats):
        """Lanes after a step: which ended (n,), and EPISODE (6, n)."""
        self.steps.append((time.time() - self.start, done, stats.clone()))
        if len(self.steps) * len(done) > 2**18:
            self.flush()

    def flush(self):
        for t, done, stats in self.steps:
            for r, length, *rest in stats[:, done].T.tolist():
                self.ended.append((r, length))
                numbers = ",".join(f"{x:.6g}" for x in rest)
                self.file.write(f"{r:.9g},{length:.0f},{t:.6f},{numbers}\n")
        self.steps = []
        self.file.flush()

    def charts(self):
        """Means of the episodes that ended since the last call."""
        self.flush()
        means = np.mean(self.ended or [(np.nan, np.nan)], axis=0)
        self.ended = []
        return dict(zip(("charts/episodic_return", "charts/episodic_length"), means))

    def state_dict(self):
        self.flush()
        return {"bytes": self.path.stat().st_size, "ended": self.ended, "start": self.start}

    def load_state_dict(self, state):
        self.ended = state["ended"]
        self.start = state["start"]
        os.truncate(self.path, min(state["bytes"], self.path.stat().st_size))

    def close(self):
        self.flush()
        self.file.close()


class Collector:
    """Between lanes and replay: what was sent off is taken in a loop later, while workers step and
    the learner learns."""

    def __init__(self, envs, rb, monitor):
        self.envs = envs
        self.rb = rb
        self.monitor = monitor
        self.step = 0  # how many were sent off

    def send(self, half, obs, action):
        envs = self.envs
        lanes = self.envs.spans[half]
        here = self.rb.at(self.step)
        here["row"][lanes] = envs.row[lanes]
        here["action"][lanes] = action
        here["own"][lanes] = obs[:, -self.rb.width :]
        envs.send(half, action.to(envs.torch_device))
        if half == envs.halves - 1:
            self.rb.total = self.step  # what is in flight is not in replay
            self.step += 1

    def take_in(self, half):
        envs = self.envs
        lanes = self.envs.spans[half]
        if envs.flying[half]:
            reward, terminated, truncated = envs.recv(half)
            done = terminated | truncated
            here = self.rb.at(self.step - 1)
            here["reward"][lanes] = reward
            here["terminated"][lanes] = terminated
            after = torch.where(done[:, None], envs.final_obs[lanes], envs.obs[lanes])
            here["next_own"][lanes] = after[:, -self.rb.width :]
            self.monitor.add(done, envs.stats[:, lanes])

    def land(self):
        for half in range(self.envs.halves):
            self.take_in(half)
        self.rb.total = self.step

    def charts(self):
        """Episodes since the last call, and on a market what the last step of all lanes did."""
        self.land()
        record = self.monitor.charts() | {"env/restarts": self.envs.restarts}
        if self.rb.table is not None:
            last = self.rb.at(self.step - 1)
            held = last["next_own"]
            change = (last["next_own"] - last["own"]).abs()
            paid = self.rb.table[last["row"].long(), -1:] * change  # the last column is the cost
            record |= {
                "env/turnover": change.mean(),
                "env/exposure": held.mean(),
                "env/costs": paid.mean(),
            }
        return record

    def state_dict(self):
        self.land()  # before lanes and replay say what they hold
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


# -------------------------------------------------------------------------- evaluation, diagnostics
@nb.njit(cache=True)
def walk_nb(target, bars, expected, leverage):
    """Trade positions `target` (n,) along one pair's rows: Series.walk's four arrays."""
    n = target.size
    reward = np.empty(n)
    mean = np.empty(n)
    change = np.empty(n)
    held = np.empty(n)
    position = 0.0
    for t in range(n):
        held[t] = 0.0 if bars[t, FLAT] != 0.0 else target[t]
        growth, left, change[t] = trade_nb(position, held[t], bars, t, leverage)
        position = held[t]
        reward[t] = math.log(growth * left)
        gap = expected[t] - bars[t, RET]  # the known mean instead of the realised return
        mean[t] = growth - 1.0 + position * leverage * gap - (1.0 - left)
    return reward, mean, change, held


def walk(bars, expected, leverage, target, a, b):
    """Series.walk of one pair."""
    return walk_nb(np.asarray(target, np.float64), bars[a:b], expected[a:b], leverage)


def series_of(pairs, leverage):
    """The pairs as scoring sees them; rows count from each pair's own first."""
    out = []
    for k, (a, b) in enumerate(zip(pairs.first, pairs.first[1:])):
        truth = pairs.series[k].truth
        bars = pairs.bars[a:b]
        expected = truth.expected if truth else np.full(b - a, np.nan)
        rows = {split: tuple((rows[k] - a).tolist()) for split, rows in pairs.rows.items()}
        table = pairs.table[a:b].astype(np.float64)
        own = partial(walk, bars, expected, leverage)
        out.append(Series(table, bars[:, RET], rows, own, truth is not None))
    return out


@torch.no_grad()
def values(network, table, device):
    """Q (n, 3, actions) of rows (n, F) of a table at each position: all that an agent can be asked."""
    blocks = []
    for rows in torch.from_numpy(table).split(2**15):
        q = [network(F.pad(rows, (0, 1), value=level).to(device)) for level in LEVELS]
        blocks.append(torch.stack(q, 1))
    return torch.cat(blocks).cpu()


def greedy_path(q, flat):
    """Greedy positions (n,) along rows with values q (n, 3, 3), flat before and where `flat` (n,)
    says so; and their Q."""
    best = q.argmax(2)
    best[torch.from_numpy(flat)] = 1
    at = 1
    path = [at := choice[at] for choice in best.tolist()]
    before = torch.tensor([1, *path[:-1]])
    return LEVELS[path], q.max(2).values[torch.arange(len(path)), before].double().numpy()


def metrics_of(walks, bars_per_year):
    """{"agent", "baselines": {who}} of walks; the agent's score is its share of the optimum."""
    metrics = {}
    for who in walks.columns.unique(0):
        growth, mean, change, held = walks[who].to_numpy().T
        metrics[who], _ = path_metrics(np.log1p(growth), mean, change, held, bars_per_year)
        if "mean_expected_bps" in metrics[who]:  # a constant position costs sigma**2 / 2 of growth
            cost = growth.var() / 2 / BP
            metrics[who]["expected_growth_bps"] = metrics[who]["mean_expected_bps"] - cost
    agent = metrics.pop("agent")
    best = metrics.get("optimum")
    if best:
        earned = best["mean_expected_bps"]
        agent["score"] = agent["mean_expected_bps"] / earned if earned >= 0.05 else None
    return {"agent": agent, "baselines": metrics}


class MarketJudge:
    """Evaluates the agent on the market, pair by pair and equally weighted, beside baselines."""

    splits = ("test", "eval", "train")
    columns = (
        "score",
        "mean_expected_bps",
        "mean_reward_bps",
        "sharpe",
        "max_drawdown",
        "turnover",
        "exposure",
        "trades",
    )

    def __init__(self, run, pairs, network):
        self.run = run
        self.pairs = pairs
        self.network = network
        self.series = series_of(pairs, run.args.leverage)
        self.constants = [best_constant(series, LEVELS) for series in self.series]
        self.rivals = sparse_linear(self.series)
        self.year = pairs.series[0].bars_per_year
        self.known = pairs.series[0].truth is not None
        self.by = "expected_growth_bps" if self.known else "mean_reward_bps"

    def greedy(self, split, seconds=math.inf):
        """[(greedy positions (n,), their Q), ...] of every pair along a split; as many rows as can
        be walked and judged in `seconds`."""
        pairs = self.pairs
        rows = pairs.rows[split]
        most = max(int(min(seconds, 1e6) * ROWS_PER_SECOND / len(rows)), 2)
        paths = []
        for a, b in rows:
            cut = slice(a, min(b, a + most))
            q = values(self.network, pairs.table[cut], self.run.device)
            paths.append(greedy_path(q, pairs.bars[cut, FLAT] != 0))
        return paths

    def optimum(self, k, split):
        """Positions (n,) of the best policy along one pair's split."""
        truth = self.pairs.series[k].truth
        rows = self.series[k].rows[split]
        return markets.optimum_path(truth, self.pairs.bars[0, COST], *rows, actions=LEVELS)

    def evaluate(self, split, seconds=math.inf):
        """{"agent", "baselines", "symbols": {name: the same}, "partial"} and {name: walks}, "" being
        an account split equally over pairs, evened out at every bar (no bar, no growth)."""
        paths = [path for path, _ in self.greedy(split, seconds)]
        walks = {name: self.walks(k, split, paths[k]) for k, name in enumerate(self.pairs.names)}
        joint = pd.concat(walks.values()).groupby(level=0).sum(min_count=1)
        walks[""] = joint / len(paths)
        metrics = {name: metrics_of(walk, self.year) for name, walk in walks.items()}
        partly = sum(map(len, paths)) < np.diff(self.pairs.rows[split]).sum()
        return metrics.pop("") | {"symbols": metrics, "partial": bool(partly)}, walks

    def walks(self, k, split, path):
        """Of the agent and of its baselines along one pair's rows: columns (who, WALK)."""
        bars = self.pairs.series[k]
        series = self.series[k]
        n = len(path)
        a = series.rows[split][0]
        turnover = float(np.abs(np.diff(path, prepend=0.0)).mean())
        targets = {
            "agent": path,
            "flat": np.zeros(n),
            "buy_and_hold": np.ones(n),
            "best_constant": np.full(n, self.constants[k]),
            "sparse_linear": self.rivals[k][a : a + n],
            "random_same_turnover": random_path(n, turnover, self.run.args.seed + k, LEVELS),
        }
        if self.known:
            targets["optimum"] = self.optimum(k, split)[:n]
        walks = {}
        for who, target in targets.items():
            reward, *rest = series.walk(target, a, a + n)
            walks[who] = pd.DataFrame(dict(zip(WALK, (np.expm1(reward), *rest))))
        return pd.concat(walks, axis=1).set_index(utc_times(bars.timestamp[a : a + n]))

    def write(self, folder, split, walks):
        """traces/{split}.parquet of all pairs together, traces/{split}_{name}.parquet of each."""
        folder.mkdir(exist_ok=True)
        for k, (name, walk) in enumerate(walks.items()):
            trace = pd.DataFrame(index=walk.index.rename("timestamp"))
            for who in walk.columns.unique(0):
                tail = "" if who == "agent" else f"_{who}"
                trace[f"position{tail}"] = walk[who]["held"]
                trace[f"equity{tail}"] = (1 + walk[who]["growth"]).cumprod()
            trace["close"] = trace["equity_buy_and_hold"]
            if name:
                bars = self.pairs.series[k]
                start = self.series[k].rows[split][0]
                at = slice(start, start + len(trace))
                trace["close"] = bars.close[at]
                for what in ("expected", "signal", "regime") if bars.truth else ():
                    trace[what] = getattr(bars.truth, what)[at]
            trace["next_return"] = trace["close"].pct_change().shift(-1).fillna(0.0)
            trace.reset_index().to_parquet(folder / f"{split}{'_' * bool(name)}{name}.parquet")

    def diagnose(self, n=1024):
        """What the greedy position depends on, on n eval rows (the same ones at every call)."""
        rows = np.concatenate([np.arange(a, b) for a, b in self.pairs.rows["eval"]])
        rows = rows[:: max(len(rows) // n, 1)]
        q = values(self.network, self.pairs.table[rows], self.run.device)  # (n, positions, actions)
        worst, middle, best = q.sort(2).values.unbind(2)
        position = q.argmax(2).float() - 1
        return {
            "policy/state_dependence": position.std(0).mean(),  # the market alone varies
            "policy/action_mean": position.mean(),
            "policy/saturation": position.abs().mean(),
            "policy/greedy_gap": (best - middle).mean(),
            "value/q_mean": q.mean(),
            "value/q_action_spread": (best - worst).mean(),
        }

    def overestimation(self, greedy, reward_scale):
        """Mean of (predicted - realised) discounted value along the greedy paths of the eval split,
        scaled reward."""
        gaps = []
        gamma = self.run.args.gamma
        for series, (path, value) in zip(self.series, greedy):
            reward, *_ = series.walk(path, *series.rows["eval"])
            tail = 0.0
            realised = np.empty(len(path))
            for t in reversed(range(len(path))):
                tail = reward[t] * reward_scale + gamma * tail
                realised[t] = tail
            keep = max(len(path) - int(5 / (1 - gamma)), 1)  # the last see too little of what comes
            gaps.append(np.mean(value[:keep] - realised[:keep]))
        return float(np.mean(gaps))

    def audit(self, results, updates, improving, reward_scale):
        greedy = self.greedy("eval")
        paths = {"agent": [path for path, _ in greedy], "sparse_linear": self.rivals}
        if self.known:
            paths["optimum"] = [self.optimum(k, "eval") for k in range(len(greedy))]
        audit = {name.split("/")[1]: float(x) for name, x in self.diagnose().items()}
        audit["overestimation"] = self.overestimation(greedy, reward_scale)
        audit |= edges(self.series, paths, LEVELS, self.year)
        rows = int(np.diff(self.pairs.rows["eval"]).max())
        agent = results["eval"]["agent"]
        audit["verdict"], audit["reasons"] = verdict(
            audit, agent, updates, FEW_UPDATES, rows, improving
        )
        return audit


class CustomJudge:
    """Evaluates the agent on a user's environments: greedy episodes in workers of their own."""

    splits = ("eval",)
    by = "episode_return"
    columns = ("episode_return", "episode_return_std", "episode_length", "episodes")

    def __init__(self, run, network):
        args = run.args
        self.run = run
        self.network = network
        self.chance = np.random.default_rng(args.seed)
        self.envs = run.closing(
            CustomVectorEnv(
                args.env_fn,
                10,
                args.seed + 10**6,
                on_worker_death=args.on_worker_death,
                worker_timeout=args.worker_timeout,
            )
        )

    @torch.no_grad()
    def evaluate(self, split, seconds=math.inf, network=None):
        """The first episodes of every lane, as many of each: a fast lane must not count for more."""
        envs = self.envs
        network = network or self.network
        until = time.monotonic() + seconds
        episodes = []
        due = torch.full((envs.num_envs,), EVAL_EPISODES // envs.num_envs)
        envs.reset(seed=envs.seed)
        for _ in range(EVAL_STEPS):
            action = network(envs.obs.to(self.run.device)).argmax(1).cpu()
            _, terminated, truncated = envs.step_lanes(action)
            done = (terminated | truncated) & (due > 0)
            episodes += envs.stats[:2, done].T.tolist()
            due -= done.int()
            if not due.any() or time.monotonic() > until:
                break
        returns, lengths = np.array(episodes or [[math.nan] * 2]).T
        agent = {
            "episode_return": returns.mean(),
            "episode_return_std": returns.std(),
            "episode_length": lengths.mean(),
            "episodes": len(episodes),
        }
        return {"agent": agent, "baselines": {}, "partial": bool(due.any())}, {}

    def write(self, folder, split, walks):
        pass

    def diagnose(self):
        return {}

    def audit(self, results, updates, improving, reward_scale):
        """Healthy is what returns more than random actions do, beyond 2 standard errors."""
        chance, _ = self.evaluate("eval", self.run.eval_limit(0.3), self.random)
        agent = results["eval"]["agent"]
        random = chance["agent"]
        results["eval"]["baselines"]["random"] = random
        variance = sum(x["episode_return_std"] ** 2 / max(x["episodes"], 1) for x in (agent, random))
        ahead = agent[self.by] - random[self.by] > 2 * math.sqrt(variance)
        word = ("healthy" if ahead else "undertrained") if updates else "untrained"
        why = f"mean return {agent[self.by]:.1f}, of random actions {random[self.by]:.1f}"
        return {"verdict": word, "reasons": [why]}

    def random(self, obs):
        """Values (N, actions) whose greatest is anywhere."""
        return torch.from_numpy(self.chance.random((len(obs), self.envs.actions)))


def judge_and_keep(run, loop, judge, record):
    """Evaluate on the eval split, log everything, keep the best agent."""
    run.phase("eval")
    result, _ = judge.evaluate("eval", run.eval_limit(0.3))
    agent = result["agent"]
    run.log(
        record | judge.diagnose() | {f"eval/eval/{k}": v for k, v in agent.items()}, loop
    )
    loop.judged = loop.updates
    loop.recent = [*loop.recent[-2:], float(agent[judge.by])]
    noisy = judge.by == "mean_reward_bps"  # one realised mean
    better = run.keep_best(float(np.mean(loop.recent)) if noisy else agent[judge.by], loop)
    loop.stale = 0 if better or not loop.updates else loop.stale + 1


def final_results(run, loop, judge, reward_scale):
    """All splits, with traces, and the audit."""
    run.phase("eval")
    results = {}
    for split in judge.splits:
        results[split], walks = judge.evaluate(split, run.eval_limit(0.3))
        judge.write(run.dir / "traces", split, walks)
        if results[split]["partial"]:
            print(f"{split}: evaluated in part (time)")
    improving = loop.stale == 0 and run.guard.status != "finished"
    audit = judge.audit(results, loop.updates, improving, reward_scale)
    record = {"value/overestimation": audit.get("overestimation")}
    for split in judge.splits:
        record |= {f"eval/{split}/{k}": v for k, v in results[split]["agent"].items()}
    run.log(record, loop)
    return results, audit


# --------------------------------------------------------------------------------------------- main
@dataclass
class Loop:
    global_step: int = 0  # transitions sent off
    updates: int = 0
    judged: int = 0  # updates at the last evaluation
    stale: int = 0  # evaluations without a better one
    recent: list = field(default_factory=list)  # last scores


def schedule_of(args):
    """Transitions over which exploration and learning rate fall: never seconds."""
    return SCHEDULE if args.total_timesteps is None else args.total_timesteps


def limit_of(args):
    """Transitions after which training ends; time given is time used."""
    open_end = args.total_timesteps is None and args.timeout
    return math.inf if open_end else schedule_of(args)


def go_on(run, loop):
    """Whether there is more to do, and time; the end says why."""
    args = run.args
    why = None
    if args.eval_only:
        return False
    if args.patience and loop.stale >= args.patience:
        why = f"no better agent in {loop.stale} evaluations (--patience)"
    elif loop.global_step >= limit_of(args):
        why = run.guard.status  # finished
    elif run.out_of_time():
        why = run.guard.status  # timeout or interrupted
    if why:
        print(f"training ends at {loop.global_step} transitions: {why}")
    return why is None


@experiment
def main(argv: list[str] | None = None) -> dict:
    """Train (or --eval-only), evaluate, report; returns what summary.json holds."""
    run = Run(Args, argv, schema=SCHEMA)
    args = run.args
    device = run.device
    config = run.state and run.state["config"]
    pairs = None if args.env_fn else load_pairs(args, config and config["models"])
    envs, performance = build_lanes(run, pairs)
    run.closing(envs)
    config = config or agent_config(args, pairs, envs)
    table = torch.from_numpy(pairs.table).to(device) if pairs else None
    width = len(OWN) if pairs else config["inputs"]
    rb = Replay(args.buffer_size, args.lanes, width, table, device)
    run.open(*describe(args, pairs))

    q_network, target_network, averaged = (QNetwork(config).to(device) for _ in range(3))
    move_towards(target_network, q_network, 1.0)
    move_towards(averaged, q_network, 1.0)
    judge = MarketJudge(run, pairs, averaged) if pairs else CustomJudge(run, averaged)
    optimizer = torch.optim.AdamW(
        q_network.parameters(), args.learning_rate, weight_decay=args.weight_decay, fused=True
    )
    name = args.env_fn or "cleanrl_crypto/Forex-v0"
    monitor = run.closing(Monitor(run.dir / "monitor.csv", name, run.resumed))
    collector = Collector(envs, rb, monitor)
    # all that a resumed run needs; the collector first, as it takes in what is in flight
    loop = run.restore(
        Loop(),
        config,
        policy=dict(agent=averaged),
        collector=collector,
        learner=q_network,
        target=target_network,
        optimizer=optimizer,
        envs=envs,
        replay=rb,
        monitor=monitor,
    )
    if run.state is None:
        judge_and_keep(run, loop, judge, {})

    while go_on(run, loop):
        # ALGO LOGIC: action; a step is sent off, the learner works, then its result is taken in
        run.phase("rollout")
        duration = args.exploration_fraction * schedule_of(args)
        epsilon = linear_schedule(START_E, args.end_e, duration, loop.global_step)
        if loop.global_step < args.learning_starts:
            epsilon = 1.0
        explore = torch.from_numpy(run.rng.random(args.lanes) < epsilon).to(device)
        choices = torch.from_numpy(run.rng.integers(0, envs.actions, args.lanes)).to(device)
        for half, lanes in enumerate(envs.spans):
            collector.take_in(half)
            obs = envs.obs[lanes].to(device)
            with torch.no_grad():
                best = q_network(obs).argmax(1)
            collector.send(half, obs, torch.where(explore[lanes], choices[lanes], best))
        loop.global_step += args.lanes

        # ALGO LOGIC: training
        collected = rb.total * args.lanes
        if collected >= max(args.learning_starts, 1) and args.updates_per_step:
            run.phase("learn")
            rate = args.learning_rate * cosine(collected, schedule_of(args))
            optimizer.param_groups[0]["lr"] = rate
            for _ in range(args.updates_per_step):
                obs, action, reward, next_obs, done = rb.sample(run.rng, args.batch_size)
                with torch.no_grad():
                    target = td_target(
                        config["reward_scale"] * reward,
                        done,
                        args.gamma,
                        target_network(next_obs),
                        q_network(next_obs),
                    )
                q_values = q_network(obs).gather(1, action[:, None])[:, 0]
                loss = F.smooth_l1_loss(q_values, target)

                optimizer.zero_grad()
                loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(q_network.parameters(), MAX_GRAD_NORM)
                optimizer.step()
                loop.updates += 1
                if loop.updates % args.target_network_frequency == 0:
                    move_towards(target_network, q_network, args.tau)
            # an average that began with the first update: the random start has no share in it
            decayed = 1 - AVERAGE**args.updates_per_step
            move_towards(averaged, q_network, decayed / (1 - AVERAGE**loop.updates))

        # log, evaluate, keep the best; the last weights are a candidate too
        last = loop.global_step >= limit_of(args)
        if (run.every(args.eval_interval, loop.global_step) or last) and loop.judged < loop.updates:
            record = collector.charts() | run.charts(loop, loop.updates * args.batch_size)
            record |= {
                "losses/td_loss": loss.detach(),
                "losses/q_values": q_values.detach().mean(),
                "losses/target_mean": target.mean(),
                "losses/grad_norm": grad_norm,
                "charts/learning_rate": rate,
                "charts/epsilon": epsilon,
            }
            if not math.isfinite(record["losses/td_loss"]):
                why = "lower --learning-rate"
                raise CheckFailed(f"the loss is not finite after {loop.updates} updates: {why}")
            judge_and_keep(run, loop, judge, record)
            if args.rescale:
                performance["rescaled"].append(rescale_by_measure(envs))
        run.checkpoint(loop)

    collector.land()
    if loop.judged < loop.updates and run.guard.status == "timeout":
        judge_and_keep(run, loop, judge, {})
    run.use_best(loop)
    results, audit = final_results(run, loop, judge, config["reward_scale"])
    usage = envs.worker_usage()
    performance |= {"workers": len(usage), "restarts": envs.restarts, "worker_usage": usage}
    return run.finish(
        loop,
        results,
        audit,
        judge.columns,
        selected_by=judge.by,
        performance=performance,
        samples_per_transition=loop.updates * args.batch_size / max(loop.global_step, 1),
    )


if FORK_SERVER in os.environ:
    uniform_nb(1, 1, 1)  # Numba imports half of itself at its first call
    gc.collect()
    gc.freeze()  # or a worker's first collection of garbage would copy what it shares

if __name__ == "__main__":
    exit_with(main)
