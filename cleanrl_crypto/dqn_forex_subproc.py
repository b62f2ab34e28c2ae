r"""Trades currency pairs with DQN: many lanes step in worker processes over shared memory, or in this one.

On a laptop: four embedded pairs whose best policy is known, a minute on 2 cores, test score .92 to .96 of the optimum:

    python cleanrl_crypto/dqn_forex_subproc.py --timeout 120

Real bars, a folder of {SYMBOL}*.parquet or .csv, spread in pips or from a file (timestamp, one column of price units
a symbol):

    python cleanrl_crypto/dqn_forex_subproc.py --data data/forex --symbols EURUSD GBPUSD USDJPY USDCHF \
        --spread-file data/forex/spread_1h.parquet --weekend flat --timeout 300

How the lanes step is measured at the start; or say it. The trajectories are the same in every mode:

    python cleanrl_crypto/dqn_forex_subproc.py --vec-mode subproc --num-workers 4 --async-halves --timeout 120

Any Gymnasium environment with a Box and a Discrete space, one a lane, in worker processes:

    python cleanrl_crypto/dqn_forex_subproc.py --env-fn my_module:make_env --num-envs 8 --total-timesteps 60000

GPU, Kaggle: a GPU is used where a probe shows that it works, for the lanes too.

    python cleanrl_crypto/dqn_forex_subproc.py --data /kaggle/input/forex --run-dir /kaggle/working/run --timeout 3600

Resume after whatever ended the run (the same command starts and continues it), or evaluate a checkpoint:

    python cleanrl_crypto/dqn_forex_subproc.py --run-dir runs/fx --resume auto
    python cleanrl_crypto/dqn_forex_subproc.py --eval-only --checkpoint runs/fx/checkpoints/best.pt

Use the agent in another program, from its checkpoint alone:

    from cleanrl_crypto.dqn_forex_subproc import load_policy
    policy = load_policy("runs/fx/checkpoints/best.pt")
    action = policy(obs)  # (B, columns + 3) as the environment gives them -> (B,) 0 short, 1 flat, 2 long

Every flag: --help. Every metric, and what to do when it is off: docs/dqn_forex_subproc.md
"""

import gc
import importlib
import json
import math
import multiprocessing as mp
import os
import signal
import struct
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from functools import lru_cache, partial
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    from common.run import CheckFailed, Run, RunArgs, UsageError, answer_help, check, exit_with
    from common.run import experiment, flag, load_run, refuse
except ModuleNotFoundError as e:
    if e.name != "common":
        raise
    sys.exit(f"{Path(__file__).name} needs the folder common/: copy it to {Path(__file__).resolve().parents[1]}")

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
from common.data import Bars, find_file, load_bars, print_facts, read_columns, split_series, utc_times
from common.features import ColumnModel, fit_columns
from common.lanes import Lanes, register
from common.scoring import BP, Series, best_constant, path_metrics, random_path, ridge_edge, verdict

SCHEMA = 2  # of the checkpoint
SPLITS = ("train", "eval", "test")
LEVELS = np.array([-1.0, 0.0, 1.0])  # positions: short, flat, long
HORIZON = 1  # bars between a decision and the end of its reward
EMBARGO = 24  # bars left out between splits beside the horizon
ROLLOVER = 22  # hour UTC at which a position is carried to the next day (17:00 in New York in winter)
CLOSED_HOURS = 24  # a longer step between two bars is a market that was closed
SPREAD_PIPS = {"EURUSD": 1.6, "GBPUSD": 1.9, "USDJPY": 1.5, "USDCHF": 1.9}  # hourly medians of a retail broker, 2021-24
PIP = {  # price units, as brokers quote spreads
    0.0001: "EURUSD GBPUSD AUDUSD NZDUSD USDCHF USDCAD USDSEK USDNOK USDDKK USDPLN USDSGD USDCNH USDHKD USDZAR USDMXN "
            "USDTRY USDILS USDCZK",
    0.01: "USDJPY USDHUF USDTHB USDINR XAUUSD"}
SYNTHETIC_COST = 0.2  # of the bar's sigma, a side: so dear that a policy of signs earns little
RUIN = 1e-6  # floor of a bar's growth and of what a fee leaves
LOST = 3e-6  # growth at which the episode terminates: above RUIN, a fee may hit the floor in a rising bar
MAX_GRAD_NORM = 10.0  # never reached in a healthy run: it stops one bad batch
AVERAGE = 0.999  # of the averaged weights, an update: about the last 1000; they earn .01 to .03 more than the last ones
START_E = 1.0  # first probability of a random action: nothing is known yet
LAST_RATE = 0.02  # of --learning-rate, at the end of the cosine
EVAL_EPISODES = 100  # of a custom environment
EVAL_STEPS = 100_000  # vector steps after which these are cut: an episode may never end

STEP, FIRST, NEXT, SHOW, LOSE = range(5)  # what is done to lanes; LOSE: their worker died, the episode is truncated
RET, COST, SWAP_LONG, SWAP_SHORT, FOREIGN, NEW_DAY, FLAT, LAST = range(8)  # columns of a bar: one cache line
LEVERAGE, DRIFT, LIMIT, YEAR, LENGTH = range(5)  # numbers of an environment
LANE = {  # a lane's state, one array (N,) each
    "row": np.int64, "clock": np.int64, "episodes": np.int64, "position": np.int64,
    "held": np.float64,  # exposure over leverage: drifts away from the position
    "equity": np.float64, "peak": np.float64, "day_start": np.float64,  # over the episode's first equity
    "worst": np.float64,  # largest drawdown
    "total": np.float64, "squares": np.float64, "turnover": np.float64}  # sums of reward, reward**2, |change|
OWN = ("exposure", "drawdown_today")  # columns that depend on the lane's path
EPISODE = ("r", "l", "drawdown", "turnover", "sharpe_ratio", "max_drawdown")  # rows of `stats`

PRELOAD = ("cleanrl_crypto.dqn_forex_subproc",)  # imported once by the fork server, shared by every worker
FORK_SERVER = "CLEANRL_CRYPTO_FORK_SERVER"  # in the environment of the fork server and of what it starts
ATTEMPTS = 3  # restarts of a worker without a step between them
START_SECONDS = 60.0  # for a worker to import this file and to build its environments
MESSAGE = struct.Struct("<BBqq")  # mode, half, first lane, end lane


# ---------------------------------------------------------------------------------------- arguments
@dataclass
class Args(RunArgs):
    # experiment
    exp_name: str = Path(__file__).stem
    """name of this experiment"""

    # data
    data: str = "synthetic:signal"
    """synthetic:{signal,regime,noise,drift}[?bars=N&seed=K&...], a folder of {SYMBOL}*.parquet or .csv, or files
    separated by commas, one a pair"""
    symbols: tuple[str, ...] = ("EURUSD", "GBPUSD", "USDJPY", "USDCHF")
    """pairs with the dollar on one side; on synthetic markets mere names of independent paths of one market"""
    feature_cols: tuple[str, ...] = (
        "rsi_14", "ema_10", "ema_20", "macd", "atr_14", "ret_1", "log_volume", "volume_z_24", "log_range",
        "log_range_24", "hour_sin", "hour_cos")
    """columns by name: docs/dqn_forex_subproc.md lists them; scaled on train rows, clipped at 5"""
    split: str = "0.70/0.15/0.15"
    """train/eval/test as shares of the rows, or the first days of eval and test: 2023-01-01/2024-01-01"""

    # environment
    num_envs: int | None = None
    """lanes; lane i trades symbol i modulo their number (default: 1024, with --env-fn 8)"""
    episode_length: int = 128
    """bars after which an episode is truncated"""
    leverage: float = 1.0
    """notional over equity of a long or short position"""
    position_mode: str = "rebalance"
    """rebalance: notional stays at equity x leverage; drift: units stay the same until the target changes"""
    spread_pips: tuple[float, ...] = ()
    """pips, one for all or one a symbol, half paid a side; real pairs (default: what is typical of four majors)"""
    spread_file: str | None = None
    """file with timestamp and one column of spread (price units) a symbol, instead of --spread-pips"""
    cost_bps: float | None = None
    """bp of notional a side: all there is on synthetic pairs (default: .2 sigma), a commission on real ones (default: 0)"""
    swap_long_bps: tuple[float, ...] = (0.0,)
    """bp of notional that a long pays a night (negative: receives), one for all or one a symbol; 22:00 UTC, weekends
    too"""
    swap_short_bps: tuple[float, ...] = (0.0,)
    """the same for a short"""
    weekend: str = "hold"
    """hold: positions stay open over closed hours, the gap's return and nights are booked; flat: closed before them"""
    daily_drawdown: float = 0.0
    """share of the day's first equity whose loss ends the episode, 0: no limit"""
    env_fn: str | None = None
    """module:factory of a custom environment (Box, Discrete), one a lane, instead of the market"""

    # workers
    vec_mode: str = "auto"
    """single (one kernel, all threads), dummy (blocks in turn), subproc (worker processes), auto: the fastest here"""
    num_workers: int | None = None
    """worker processes, or blocks of dummy (default: measured by auto, else one a core)"""
    async_halves: bool = False
    """two halves of the lanes in flight: one steps while the other is told what to do"""
    rescale: bool = False
    """with --vec-mode subproc: at evaluations, measure one worker more and one less, keep the fastest"""
    on_worker_death: str = "fail"
    """fail, or restart: a worker that died is replaced and the episodes of its lanes are truncated"""
    worker_timeout: float = 4.0
    """seconds after which a worker that does not answer is taken for dead"""

    # algorithm
    total_timesteps: int = 2_000_000
    """environment transitions (the sum over lanes)"""
    learning_starts: int = 16_384
    """transitions with uniform random actions before the first update"""
    buffer_size: int = 1_000_000
    """transitions kept (on markets row numbers and what the path adds: 27 bytes each)"""
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
    """share of --total-timesteps over which it falls"""
    learning_rate: float = 3e-4
    """AdamW; falls to 2 % by a cosine"""
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
        check(self, {"position_mode": ("rebalance", "drift"), "vec_mode": ("auto", "single", "dummy", "subproc"),
                     "on_worker_death": ("fail", "restart"), "weekend": ("hold", "flat")}, {
            (0, 1): "end_e exploration_fraction learning_rate weight_decay", (0, 0.9999): "gamma",
            (0, 0.99): "daily_drawdown", (1e-6, 1): "tau", (0, 1000): "cost_bps", (0.01, 100): "leverage",
            (0, 10**6): "patience", (0, 4096): "updates_per_step", (0, 10**12): "total_timesteps learning_starts",
            (1, 10**6): "num_envs batch_size episode_length target_network_frequency",
            (1, 4096): "hidden num_workers", (1, 10**9): "buffer_size", (1, 10**12): "eval_interval",
            (0.1, 1e9): "worker_timeout"})
        twice = [name for k, name in enumerate(self.symbols) if name in self.symbols[:k]]
        rates = (*self.swap_long_bps, *self.swap_short_bps)
        refuse(
            (not self.symbols, "--symbols: at least one"),
            (twice, f"--symbols {' '.join(self.symbols)}: one is named twice"),
            (self.spread_pips and self.spread_file, "--spread-pips and --spread-file: give one of them"),
            (any(not 0 <= x <= 1000 for x in self.spread_pips), f"--spread-pips {self.spread_pips}: must be 0 to 1000"),
            (any(not -100 <= x <= 100 for x in rates), f"--swap-long-bps, --swap-short-bps {rates}: must be -100 to 100"))
        for names, meant, said in MODES:
            said = said(self)
            for name in names if said else ():
                default = type(self).__dataclass_fields__[name].default
                refuse((getattr(self, name) != default, f"{flag(name)} says nothing with {said}: it is for {meant}"))

    @property
    def lanes(self) -> int:
        return self.num_envs or (8 if self.env_fn else 1024)

    @property
    def market_is_synthetic(self) -> bool:
        return self.data.startswith(markets.PREFIX)


MARKET = (  # flags that shape the pairs and their environment
    "data", "symbols", "feature_cols", "split", "episode_length", "leverage", "position_mode", "spread_pips",
    "spread_file", "cost_bps", "swap_long_bps", "swap_short_bps", "weekend", "daily_drawdown")
MODES = (  # flags, what they are for, and the other mode if the arguments choose it
    ((*MARKET, "rescale"), "currency pairs", lambda a: a.env_fn and f"--env-fn {a.env_fn}"),
    (("spread_pips", "spread_file", "weekend"), "real pairs (--cost-bps is for synthetic ones)",
     lambda a: a.market_is_synthetic and f"--data {a.data}"),
    (("num_workers", "async_halves"), "blocks and workers", lambda a: a.vec_mode == "single" and "--vec-mode single"),
    (("on_worker_death", "worker_timeout", "rescale"), "worker processes",
     lambda a: a.vec_mode in ("single", "dummy") and f"--vec-mode {a.vec_mode}"),
    (("rescale",), "--vec-mode subproc", lambda a: a.vec_mode == "auto" and "--vec-mode auto"),
    (("vec_mode",), "currency pairs (a custom environment lives in workers, or in dummy)",
     lambda a: a.env_fn and a.vec_mode == "single" and f"--env-fn {a.env_fn}"))


# --------------------------------------------------------------------------------------------- data
class Pairs(NamedTuple):
    """What lanes walk over: one static table, the rows of pair after pair. Row t earns the bar to row t + 1."""

    names: tuple[str, ...]  # S pairs
    series: list[Bars]
    models: dict[str, dict]  # state_dict of the ColumnModel that made each pair's columns
    table: np.ndarray  # (R, F) float32 columns, the last one the cost of a side in bp
    bars: np.ndarray  # (R, 8) float64: RET next bar's return a unit of long exposure, in account currency; COST and SWAP_*
    # shares of notional; FOREIGN return of the foreign currency; NEW_DAY the next row is of another trading day; FLAT
    # the target is forced to 0; LAST is the environment's
    expected: np.ndarray  # (R,) conditional mean of RET, NaN on real pairs
    rows: dict[str, np.ndarray]  # split -> (S, 2) half-open decision rows
    first: np.ndarray  # (S + 1,) row at which each pair begins

    def of(self, k: int) -> slice:
        """Rows of pair k."""
        return slice(int(self.first[k]), int(self.first[k + 1]))


def load_series(args: Args) -> dict[str, Bars]:
    """{symbol: bars}. Raises UsageError (one line)."""
    if not args.market_is_synthetic:
        if Path(args.data).is_dir():
            return {symbol: load_bars(str(find_file(args.data, symbol))) for symbol in args.symbols}
        refuse((args.symbols != Args.symbols, f"--symbols with --data {args.data}: pairs are named by their files"))
        paths = [part.strip() for part in args.data.split(",")]
        names = [Path(path).stem[:6] for path in paths]
        twice = [name for k, name in enumerate(names) if name in names[:k]]
        refuse((twice, f"--data {args.data}: two files for {', '.join(twice)}"))
        return {name: load_bars(path) for name, path in zip(names, paths)}
    try:
        seed = markets.parse_law(args.data).seed
    except ValueError as e:
        raise UsageError(f"--data {e}") from e
    base, _, query = args.data.partition("?")
    others = [pair for pair in query.split("&") if pair and not pair.startswith("seed=")]
    seeds = [seed * len(args.symbols) + k for k in range(len(args.symbols))]  # independent paths of one market
    specs = [f"{base}?{'&'.join([*others, f'seed={k}'])}" for k in seeds]
    return dict(zip(args.symbols, map(load_bars, specs)))


def account_return(symbol: str, close: np.ndarray) -> tuple[np.ndarray, bool]:
    """Next bar's return (T,) per unit of long notional in USD, 0 in the last row; and whether USD is the base.

    XXXUSD: u units bought at P earn u (P' - P) dollars, notional u P. USDXXX: u dollars earn u (P' - P) XXX, which are
    u (P' - P) / P' dollars.
    """
    has_dollar = len(symbol) == 6 and "USD" in (symbol[:3], symbol[3:])
    refuse((not has_dollar, f"--symbols {symbol}: must be XXXUSD or USDXXX, the account is in USD"))
    inverse = symbol.startswith("USD")
    earned = np.diff(close) / (close[1:] if inverse else close[:-1])
    return np.append(earned, 0.0), inverse


def one_a_symbol(name: str, values: tuple, symbols) -> np.ndarray:
    """One value for all symbols, or one a symbol."""
    many = len(values) not in (1, len(symbols))
    refuse((many, f"{flag(name)}: {len(values)} values for {len(symbols)} symbols ({', '.join(symbols)})"))
    return np.broadcast_to(np.asarray(values, np.float64), len(symbols))


def spreads(args: Args, series: dict[str, Bars]) -> list[np.ndarray]:
    """Spread of every bar in price units, an array (T,) a pair."""
    symbols = list(series)
    if args.spread_file:
        times, values = read_columns(args.spread_file, symbols)
        out = []
        for k, (symbol, bars) in enumerate(series.items()):
            at = np.searchsorted(times, bars.timestamp).clip(max=len(times) - 1)
            spread = np.where(times[at] == bars.timestamp, values[at, k], np.nan)
            bad = np.flatnonzero(~(spread >= 0))
            if len(bad):
                when = np.datetime_as_string(bars.timestamp[bad[0]], "m")
                raise UsageError(f"--spread-file {args.spread_file}: {symbol} at {when}Z is {spread[bad[0]]}, must be >= "
                                 f"0 ({len(bad)} of {len(spread)} bars)")
            out.append(spread)
        return out
    size = {symbol: pip for pip, names in PIP.items() for symbol in names.split()}
    odd = [symbol for symbol in symbols if symbol not in size]
    refuse((odd, f"--spread-pips: the size of a pip of {', '.join(odd)} is not known: use --spread-file, in price units"))
    unknown = [symbol for symbol in symbols if symbol not in SPREAD_PIPS]
    refuse((not args.spread_pips and unknown,
            f"--spread-pips: no typical spread is known for {', '.join(unknown)}; give one a symbol"))
    pips = args.spread_pips or tuple(SPREAD_PIPS[symbol] for symbol in symbols)
    pips = one_a_symbol("spread_pips", pips, symbols)
    return [np.full(len(b.close), p * size[s]) for (s, b), p in zip(series.items(), pips)]


def bar_rows(symbol: str, bars: Bars, cost, swap_long: float, swap_short: float, weekend: str) -> np.ndarray:
    """(T, 8) of Pairs.bars, for one pair."""
    rows = np.zeros((len(bars.close), 8))
    earned, inverse = account_return(symbol, bars.close)
    step = np.diff(bars.timestamp).astype("timedelta64[s]").astype(np.int64)
    length = int(np.median(step))
    close_at = bars.timestamp.astype("datetime64[s]").astype(np.int64) + length
    nights = np.diff((close_at - ROLLOVER * 3600) // 86_400)
    rows[:, RET] = earned
    rows[:, FOREIGN] = -earned if inverse else earned
    rows[:, COST] = cost
    rows[:-1, SWAP_LONG] = nights * (swap_long * BP)
    rows[:-1, SWAP_SHORT] = nights * (swap_short * BP)
    rows[:-1, NEW_DAY] = nights != 0
    if weekend == "flat":  # of daily bars every step has 24 hours
        rows[:-1, FLAT] = step >= max(CLOSED_HOURS * 3600, 1.5 * length)
    return rows


def load_pairs(args: Args, fitted: dict[str, dict] | None = None) -> Pairs:
    """Bars -> columns, costs, splits; fitted on train rows unless `fitted` has the pairs' models. UsageError."""
    by_name = load_series(args)
    names, series = tuple(by_name), list(by_name.values())
    unknown = [name for name in names if fitted is not None and name not in fitted]
    refuse((unknown, f"--symbols: the checkpoint knows {', '.join(fitted or ())}, not {', '.join(unknown)}"))
    refuse((args.lanes < len(names), f"--num-envs {args.lanes}: {len(names)} pairs need a lane each"))
    purge = HORIZON + EMBARGO
    stops = [split["train"][1] for split in split_series(series, args.split, purge)]
    try:
        if fitted is None:
            models = [fit_columns(bars, args.feature_cols, stop) for bars, stop in zip(series, stops)]
        else:
            models = [ColumnModel.from_state_dict(fitted[name]) for name in names]
        columns = [model.transform(bars) for model, bars in zip(models, series)]
    except ValueError as e:
        raise e if isinstance(e, UsageError) else UsageError(f"--feature-cols: {e}") from e
    splits = split_series(series, args.split, purge, [model.warmup for model in models])

    if args.market_is_synthetic:  # quoted in account currency
        side = SYNTHETIC_COST * min(series[0].truth.law.sigma) if args.cost_bps is None else args.cost_bps * BP
        costs, kinds = [np.full(len(bars.close), side) for bars in series], ["XXXUSD"] * len(names)
    else:
        half = [0.5 * spread / bars.close for spread, bars in zip(spreads(args, by_name), series)]
        costs, kinds = [x + (args.cost_bps or 0.0) * BP for x in half], names
    swap_long, swap_short = (one_a_symbol(name, getattr(args, name), names) for name in ("swap_long_bps", "swap_short_bps"))
    first = np.cumsum([0, *(len(bars.close) for bars in series)])
    bars = [bar_rows(*part, args.weekend) for part in zip(kinds, series, costs, swap_long, swap_short)]
    expected = [b.truth.expected if b.truth else np.full(len(b.close), np.nan) for b in series]
    return Pairs(
        names=names, series=series, models={name: model.state_dict() for name, model in zip(names, models)},
        table=np.concatenate([np.column_stack([x, c / BP]) for x, c in zip(columns, costs)]).astype(np.float32),
        bars=np.concatenate(bars), expected=np.concatenate(expected), first=first,
        rows={split: np.array([rows[split] for rows in splits]) + first[:-1, None] for split in SPLITS})


def describe_pairs(args: Args, pairs: Pairs) -> dict:
    """What the run is about, for its checkpoint and summary; and said."""
    spans = "; ".join(f"{split} {int(np.diff(rows).sum())} bars" for split, rows in pairs.rows.items())
    cost = [np.median(pairs.bars[a:b, COST]) / BP for a, b in pairs.rows["train"]]
    sides = ", ".join(f"{name} {x:.2f}" for name, x in zip(pairs.names, cost))
    print(f"{args.data}: {len(pairs.names)} pairs, {spans}; {pairs.table.shape[1] - 1} columns; median cost in bp a side: "
          f"{sides}")
    if not args.market_is_synthetic:
        for bars in pairs.series:
            print_facts(bars)
    elif any(args.swap_long_bps) or any(args.swap_short_bps) or args.position_mode == "drift":
        print("the optimum knows neither swap nor drift: a score above 1 is possible")
    return {
        "spec": args.data, "names": list(pairs.names), "sha256": [bars.sha256 for bars in pairs.series],
        "rows": pairs.rows, "bars": [len(bars.close) for bars in pairs.series],
        "columns": [*args.feature_cols, "cost_bps", *OWN]}


# ------------------------------------------------------------------------------------------ kernels
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
def trade_nb(last, held, target, bars, t, leverage, drift):
    """One decision and the bar it earns: ONE lane, all scalars but the row t of `bars`.

    last, target: positions -1, 0, 1 before and now; held: exposure before the trade over leverage.
    Rebalanced: equity *= (1 - cost leverage |target - held|) (1 + x ret - |x| swap), x = target * leverage. Drifting:
    what is held are f units of the foreign currency, worth +-x of equity; they change only when the target does, then
    to what is worth x of the equity AFTER the fee: fee = cost |y - x| / (1 + cost y sign(y - x)) from exposure x to y.
    After the bar f is worth (1 + foreign) as much and equity g times: x' = x (1 + foreign) / g, for both kinds of pair.
    Returns (growth of equity over the bar, what the fee left, exposure over leverage after the trade, at the next
    decision, |change of exposure|).
    """
    cost = bars[t, COST]
    change, fee, x = abs(target - held), 0.0, target * leverage
    if drift and target == last:
        change, x = 0.0, held * leverage
    else:
        fee = cost * leverage * change
        if drift:
            fee /= 1.0 + cost * x * (1.0 if target > held else -1.0)
    swap = x * bars[t, SWAP_LONG] if x > 0.0 else -x * bars[t, SWAP_SHORT]
    growth = 1.0 + x * bars[t, RET] - swap
    growth = growth if growth > RUIN else RUIN  # Numba's CUDA target does not know max()
    left = 1.0 - fee if 1.0 - fee > RUIN else RUIN
    after = x * (1.0 + bars[t, FOREIGN]) / growth / leverage if drift else np.float64(target)
    return growth, left, x / leverage, after, change


@nb.njit(error_model="numpy", cache=True)
def observe_nb(obs, i, table, t, held, day_growth):
    """Write row i of `obs`: the columns of row t of the table, and those of the lane's path (OWN)."""
    columns = table.shape[1]
    for k in range(columns):
        obs[i, k] = table[t, k]
    obs[i, columns] = held
    obs[i, columns + 1] = day_growth - 1.0


def lane_py(i, mode, action, market, numbers, seeds, lane, out):
    """Step lane i; or (mode) begin its first or next episode, lose the one that it is in, only show where it is.

    market: table (R, F), bars (R, 8), rows (S, 2). lane: the arrays of LANE. out: obs (N, F + 2), reward, terminated,
    truncated (N,), and of the episode that ended, written whenever a flag is set, final_obs (N, F + 2), stats (6, N).
    """
    table, bars, rows = market
    row, clock, episodes, position, held, equity, peak, day_start, worst, total, squares, turnover = lane
    obs, reward, terminated, truncated, final_obs, stats = out
    t, done = row[i], False
    if mode == STEP:
        choice = action[i]
        target = choice - 1 if bars[t, FLAT] == 0.0 else 0
        growth, left, _, after, change = trade_nb(
            position[i], held[i], target, bars, t, numbers[LEVERAGE], numbers[DRIFT] != 0.0)
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
        ruined = factor <= LOST or (numbers[LIMIT] > 0.0 and worth <= day_start[i] * (1.0 - numbers[LIMIT]))
        if bars[t, NEW_DAY] != 0.0:
            day_start[i] = worth
        row[i], clock[i], position[i], held[i] = t + 1, clock[i] + 1, target, after
        reward[i] = earned if 0 <= choice <= 2 else math.nan  # on a GPU nobody else looks at it
        terminated[i] = ruined
        truncated[i] = not ruined and (clock[i] >= numbers[LENGTH] or bars[t, LAST] != 0.0)
        done = terminated[i] or truncated[i]
    elif mode == LOSE:
        reward[i], terminated[i], truncated[i] = 0.0, False, True
        done = True
    if done:
        n = clock[i] if clock[i] > 0 else 1
        mean = total[i] / n
        variance = squares[i] / n - mean * mean
        observe_nb(final_obs, i, table, row[i], held[i], equity[i] / day_start[i])
        stats[0, i], stats[1, i], stats[2, i] = total[i], clock[i], 1.0 - equity[i] / peak[i]
        stats[3, i], stats[5, i] = turnover[i] / n, worst[i]
        # a constant reward leaves a variance of rounding errors
        stats[4, i] = mean * math.sqrt(numbers[YEAR] / variance) if variance > 1e-12 * mean * mean else 0.0
    if done or mode == FIRST or mode == NEXT:
        episodes[i] = 0 if mode == FIRST else episodes[i] + 1
        start, stop = rows[i % rows.shape[0], 0], rows[i % rows.shape[0], 1]
        row[i] = start + np.int64(uniform_nb(seeds[0], i, episodes[i], 0) * (stop - start))
        clock[i], position[i] = 0, 0
        equity[i], peak[i], day_start[i] = 1.0, 1.0, 1.0
        held[i], worst[i], total[i], squares[i], turnover[i] = 0.0, 0.0, 0.0, 0.0, 0.0
    observe_nb(obs, i, table, row[i], held[i], equity[i] / day_start[i])


# arrays are borrowed for a call: counting references to 24 of them for every lane would cost more than the lane
FAST = {"error_model": "numpy", "_nrt": False}
lane_nb = nb.njit(forceinline=True, **FAST)(lane_py)


@nb.njit(cache=True, **FAST)
def step_block(lo, hi, mode, action, market, numbers, seeds, lane, out):
    """Lanes lo to hi on this thread: the arguments of lane_py after the lanes."""
    for i in range(lo, hi):
        lane_nb(i, mode, action, market, numbers, seeds, lane, out)


@nb.njit(parallel=True, cache=True, **FAST)
def step_cpu(lo, hi, mode, action, market, numbers, seeds, lane, out):
    """step_block on all threads."""
    for i in nb.prange(lo, hi):
        lane_nb(i, mode, action, market, numbers, seeds, lane, out)


@lru_cache(None)
def cuda_step():
    """The same lane on the GPU: a kernel with step_block's arguments, one thread a lane."""
    lane_cuda = cuda.jit(device=True)(lane_py)

    @cuda.jit
    def step_cuda(lo, hi, mode, action, market, numbers, seeds, lane, out):
        i = lo + cuda.grid(1)
        if i < hi:
            lane_cuda(i, mode, action, market, numbers, seeds, lane, out)

    return step_cuda


class MarketBlock:
    """Steps a block of the market's lanes in their arrays."""

    def __init__(self, kernel, arrays: dict):
        names = ("obs", "reward", "terminated", "truncated", "final_obs", "stats")
        market, lane, out = (tuple(arrays[k] for k in part) for part in (("table", "bars", "rows"), LANE, names))
        self.kernel, self.rest = kernel, (arrays["action"], market, arrays["numbers"], arrays["seeds"], lane, out)

    def __call__(self, lo: int, hi: int, mode: int):
        self.kernel(lo, hi, mode, *self.rest)

    def close(self):
        pass


# -------------------------------------------------------------------------- a user's environments
def make_user_env(env_fn: str) -> gym.Env:
    """`module:factory` -> factory(). ValueError for a spec, an environment or spaces that do not fit."""
    module, _, factory = env_fn.partition(":")
    if not module or not factory:
        raise ValueError("must be module:factory")
    if os.getcwd() not in sys.path:  # a script's own folder is on the path, the user's is not
        sys.path.insert(0, os.getcwd())
    make = getattr(importlib.import_module(module), factory, None)
    if make is None:
        raise ValueError(f"{module} has no {factory}")
    env = make()
    if not isinstance(env, gym.Env):
        raise ValueError(f"returned {type(env).__name__}, not a gymnasium.Env")
    obs, action = env.observation_space, env.action_space
    if not isinstance(obs, gym.spaces.Box) or not isinstance(action, gym.spaces.Discrete):
        raise ValueError(f"needs a Box and a Discrete space, has {obs} and {action}")
    return env


def checked_step(env: gym.Env, action: int) -> tuple[np.ndarray, float, bool, bool]:
    """(obs (width,) float32, reward, terminated, truncated). ValueError for what is no step."""
    found = env.step(action)
    if not isinstance(found, tuple) or len(found) != 5:
        raise ValueError("step() must return (obs, reward, terminated, truncated, info)")
    obs, reward, terminated, truncated, _ = found
    if not math.isfinite(reward):
        raise ValueError(f"step() returned the reward {reward}")
    return flat(env, obs), float(reward), bool(terminated), bool(truncated)


def flat(env: gym.Env, obs) -> np.ndarray:
    shape = env.observation_space.shape
    if np.shape(obs) != shape:
        raise ValueError(f"an observation has shape {np.shape(obs)}, its space {shape}")
    out = np.asarray(obs, np.float32).reshape(-1)
    if not np.isfinite(out).all():
        raise ValueError("an observation is not finite")
    return out


def one_line(e: BaseException) -> str:
    """What was raised, and where: of a user's code one wants to know both."""
    at = traceback.extract_tb(e.__traceback__)[-1]
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]} ({at.filename}:{at.lineno} in {at.name})"


def try_user_env(pipe, env_fn: str):
    """In a process of its own: build one, reset it, step it; send what the spaces are, or why it does not fit."""
    be_a_worker()
    try:
        env = make_user_env(env_fn)
        box, action = env.observation_space, env.action_space
        obs, _ = env.reset(seed=0)
        flat(env, obs)
        checked_step(env, int(action.start))
        image = box.dtype == np.uint8 and box.shape and (box.high == 255).all()
        reply = {"low": np.float32(box.low).reshape(-1), "high": np.float32(box.high).reshape(-1),
                 "actions": int(action.n), "start": int(action.start), "scale": 1 / 255 if image else 1.0}
        env.close()
    except BaseException as e:  # also a sys.exit() of the user's
        reply = one_line(e)
    pipe.send(reply)


@lru_cache(None)
def user_spaces(env_fn: str) -> dict:
    """What the spaces of a user's environment are, from a process that may die or hang. UsageError."""
    context = worker_context()
    ours, theirs = context.Pipe()
    process = context.Process(target=try_user_env, args=(theirs, env_fn), daemon=True)
    process.start()
    theirs.close()
    try:
        reply = ours.recv() if ours.poll(START_SECONDS) else f"no first step in {START_SECONDS:g} s"
    except EOFError:
        process.join(1.0)
        reply = f"its process ended before the first step (exit code {process.exitcode})"
    process.kill()
    process.join()
    refuse((isinstance(reply, str), f"--env-fn {env_fn}: {reply}"))
    return reply


class UserBlock:
    """Steps a block of a user's environments, one a lane, one after the other, into the arrays of the lanes."""

    def __init__(self, env_fn: str, lanes, arrays: dict):
        self.a, self.envs = arrays, {i: make_user_env(env_fn) for i in lanes}

    def __call__(self, lo: int, hi: int, mode: int):
        a = self.a
        seed, starts = (int(x) for x in a["seeds"])
        for i in range(lo, hi):
            done = True
            if mode == STEP:
                done = self.step(i)
            elif mode == LOSE:  # the episode went down with a worker
                a["reward"][i], a["terminated"][i], a["truncated"][i] = 0.0, False, True
                a["final_obs"][i] = a["obs"][i]
            if done:
                a["stats"][:, i] = np.nan
                a["stats"][:2, i] = a["total"][i], a["clock"][i]
                a["total"][i], a["clock"][i] = 0.0, 0
                again = mode in (FIRST, LOSE)  # a lane that starts anew does not repeat its first episodes
                obs, _ = self.envs[i].reset(seed=seed + i + starts * len(a["obs"]) if again else None)
                a["obs"][i] = flat(self.envs[i], obs)

    def step(self, i: int) -> bool:
        a, env = self.a, self.envs[i]
        obs, reward, terminated, truncated = checked_step(env, int(a["action"][i]) + int(env.action_space.start))
        a["reward"][i], a["terminated"][i], a["truncated"][i] = reward, terminated, truncated
        a["total"][i] += reward
        a["clock"][i] += 1
        done = terminated or truncated
        a["final_obs" if done else "obs"][i] = obs
        return done

    def close(self):
        for env in self.envs.values():
            env.close()


# ------------------------------------------------------------------------------------------ workers
class WorkerError(CheckFailed):
    """A worker failed; `worker` is its number, `why` what it raised, or its fate."""

    def __init__(self, worker: int, lanes: list[tuple[int, int]], why: str):
        self.worker, self.why = worker, why
        super().__init__(f"worker {worker}, lanes {' and '.join(f'{lo}-{hi - 1}' for lo, hi in lanes)}: {why}")


def carve(raw, layout: dict[str, tuple]) -> dict[str, np.ndarray]:
    """Arrays (views) of a layout {name: (shape, dtype)} in a block of shared memory, each from a cache line's start."""
    block, arrays = np.frombuffer(raw, np.uint8), {}
    at = -block.ctypes.data % 64
    for name, (shape, dtype) in layout.items():
        arrays[name] = np.frombuffer(raw, dtype, math.prod(shape), at).reshape(shape)
        at += -(-arrays[name].nbytes // 64) * 64
    return arrays


def worker_context():
    """How workers start: never by fork, which kills a process with threads. The fork server runs when this returns."""
    methods = mp.get_all_start_methods()
    if "forkserver" not in methods:
        return mp.get_context("spawn")
    from multiprocessing import forkserver  # not on Windows

    context = mp.get_context("forkserver")
    path, root = os.environ.get("PYTHONPATH"), str(Path(__file__).resolve().parents[1])
    os.environ |= {"PYTHONPATH": root + (os.pathsep + path if path else ""), FORK_SERVER: "1"}
    try:
        context.set_forkserver_preload(list(PRELOAD))
        forkserver.ensure_running()
    finally:
        del os.environ[FORK_SERVER], os.environ["PYTHONPATH"]
        if path is not None:
            os.environ["PYTHONPATH"] = path
    return context


def be_a_worker():
    """Signals are the parent's to handle; a worker ends when its parent says so, or is gone, whatever it is doing."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    sentinel = mp.parent_process().sentinel
    threading.Thread(target=end_after, args=(sentinel,), daemon=True).start()
    if sys.platform != "win32":  # that thread never runs if a user's C code keeps the interpreter lock: SIGIO then
        import fcntl

        fcntl.fcntl(sentinel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)


def end_after(sentinel):
    connection.wait([sentinel])
    os._exit(1)


def work(pipe, raw, layout: dict, env_fn: str | None, lanes: list):
    """A worker: carries out messages (mode, half, lo, hi) until the pipe closes."""
    be_a_worker()
    block = None
    try:
        arrays = carve(raw, layout)
        block = UserBlock(env_fn, lanes, arrays) if env_fn else MarketBlock(step_block, arrays)
        block(0, 0, STEP)  # compiled, or read from the cache, before the first step's deadline runs
        pipe.send_bytes(b"k\xff")
        while True:
            mode, half, lo, hi = MESSAGE.unpack(pipe.recv_bytes())
            block(lo, hi, mode)
            pipe.send_bytes(b"k%c" % half)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except Exception as e:  # the parent raises it as a WorkerError
        try:
            pipe.send_bytes(b"e" + one_line(e).encode())
        except OSError:
            pass
    finally:
        if block:
            block.close()


class WorkerLanes(Lanes):
    """Lanes in blocks, stepped in this process or by worker processes that share their arrays.

    step_lanes(), or send() and recv() by halves: an action is a tensor (lanes,) of int64; reward (float64), terminated
    and truncated (bool) are views that the next step overwrites, `obs` (N, width) float32 stands beside them, final_obs
    (N, width) and stats (6, N: EPISODE) hold the last episode of every lane that ended.
    vec_mode: single (all threads), dummy (blocks in turn), subproc.
    """

    def __init__(
        self, layout: dict[str, tuple], low, high, actions: int, num_envs: int, seed: int = 1, *, env_fn: str | None = None,
        vec_mode: str = "single", num_workers: int = 1, async_halves: bool = False, backend: str = "cpu",
        on_worker_death: str = "fail", worker_timeout: float = 4.0,
    ):
        halves = 2 if async_halves else 1
        num_workers = 1 if vec_mode == "single" else num_workers
        refuse((vec_mode not in ("single", "dummy", "subproc"), f"vec_mode {vec_mode!r}: single, dummy or subproc"),
               (on_worker_death not in ("fail", "restart"), f"on_worker_death {on_worker_death!r}: fail or restart"),
               (num_envs < halves * num_workers or num_workers < 1 or num_envs % halves,
                f"num_envs {num_envs}: {num_workers} workers in {halves} halves need a lane each, halves the same number"),
               (backend == "cuda" and (vec_mode != "single" or async_halves),
                "backend cuda steps all lanes in this process: vec_mode single, no halves"))
        width = len(low)
        super().__init__(num_envs, gym.spaces.Box(low, high, (width,), np.float32), gym.spaces.Discrete(actions), backend,
                         seed)
        self.env_fn, self.vec_mode, self.halves, self.actions = env_fn, vec_mode, halves, actions
        self.on_worker_death, self.worker_timeout, self.restarts = on_worker_death, worker_timeout, 0
        self.processes, self.pipes, self.failures, self.block = [], [], [], None
        self.flying, self.sent = [False] * halves, [0.0] * halves
        self.waiting, self.lost = ([set() for _ in range(halves)] for _ in range(2))  # workers
        n = num_envs
        self.layout = layout | {
            "seeds": ((2,), np.int64),  # the seed, and how often everything started anew
            "action": ((n,), np.int64), "obs": ((n, width), np.float32), "final_obs": ((n, width), np.float32),
            "reward": ((n,), np.float64), "terminated": ((n,), np.bool_), "truncated": ((n,), np.bool_),
            "stats": ((len(EPISODE), n), np.float64)} | {name: ((n,), kind) for name, kind in LANE.items()}
        if vec_mode == "subproc":
            self.context = worker_context()
            # a file without a name behind file descriptors: the system frees it when the last process ends
            size = sum(-(-math.prod(shape) * np.dtype(kind).itemsize // 64) * 64 for shape, kind in self.layout.values())
            self.raw = self.context.RawArray("b", size + 64)
            self.arrays = carve(self.raw, self.layout)
            for name, array in self.arrays.items():
                setattr(self, name, torch.from_numpy(array))
        else:
            for name, (shape, kind) in self.layout.items():
                self.take(name, shape, kind)
        self.seeds[0] = self.seed
        self.divide(num_workers)

    def divide(self, num_workers: int):
        """Lanes of half h and worker w: blocks[h][w] = (lo, hi); lanes of half h: spans[h]."""
        n = self.num_envs // self.halves
        cuts = [[h * n + n * w // num_workers for w in range(num_workers + 1)] for h in range(self.halves)]
        self.blocks = [list(zip(c[:-1], c[1:])) for c in cuts]
        self.spans = [slice(c[0], c[-1]) for c in cuts]
        self.num_workers = num_workers

    # processes
    def start_workers(self):
        self.processes, self.pipes = [None] * self.num_workers, [None] * self.num_workers
        self.failures = [0] * self.num_workers
        for failure in self.start(range(self.num_workers)):
            self.fail(*failure)

    def lanes_of(self, w: int) -> list[tuple[int, int]]:
        return [self.blocks[h][w] for h in range(self.halves)]

    def start(self, workers) -> list[tuple[int, str]]:
        """Start workers and wait until they are ready; returns those which are not, and why."""
        for w in workers:
            self.pipes[w], theirs = self.context.Pipe()
            lanes = [i for lo, hi in self.lanes_of(w) for i in range(lo, hi)] if self.env_fn else []
            self.processes[w] = self.context.Process(
                target=work, daemon=True, name=f"lanes-{w}", args=(theirs, self.raw, self.layout, self.env_fn, lanes))
            self.processes[w].start()
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
        half = reply[1]
        if half < self.halves:
            self.waiting[half].discard(w)
            if w not in self.lost[half]:  # a lost step proves nothing
                self.failures[w] = 0
            self.lost[half].discard(w)
        return ""

    def stop(self, w: int):
        self.pipes[w].close()
        self.processes[w].kill()
        self.processes[w].join()
        self.processes[w].close()

    def replace(self, w: int, why: str):
        """A new worker w, in which the episodes of the steps that the old one owed are lost; or WorkerError."""
        failures = [(w, why)]
        while failures:
            self.failures[w] += 1
            if self.on_worker_death == "fail" or self.failures[w] > ATTEMPTS:
                self.fail(*failures[0])
            self.restarts += 1
            self.seeds[1] += 1
            self.stop(w)
            failures = self.start([w])
        for half in sorted(range(self.halves), key=lambda h: self.sent[h]):
            owed = w in self.waiting[half]
            if owed or self.env_fn:  # the market's lanes live in the arrays, a user's in their worker
                self.lost[half].add(w)
            if owed:
                self.tell(w, half)

    def tell(self, w: int, half: int):
        mode = LOSE if self.mode == STEP and w in self.lost[half] else self.mode
        try:
            self.pipes[w].send_bytes(MESSAGE.pack(mode, half, *self.blocks[half][w]))
        except OSError:  # it is dead: collecting its answer finds out
            pass

    def rescale(self, num_workers: int):
        """Add or retire workers between steps; the trajectories stay the same."""
        most = self.num_envs // self.halves
        refuse((self.vec_mode != "subproc" or self.env_fn, "rescale: needs vec_mode subproc and the market's own lanes"),
               (any(self.flying) or not 1 <= num_workers <= most,
                f"rescale to {num_workers}: between steps only, from 1 to {most}"))
        before = self.num_workers
        for w in range(num_workers, before):
            self.stop(w)
        self.divide(num_workers)
        for items, blank in ((self.processes, None), (self.pipes, None), (self.failures, 0)):
            items[num_workers:] = [blank] * max(num_workers - before, 0)
        for failure in self.start(range(before, num_workers)):
            self.fail(*failure)

    def worker_usage(self) -> list[dict]:
        """Per worker: pid, cpu_seconds, rss and uss (its own memory) in bytes; a dead one only its pid."""
        usage = []
        for process in self.processes:
            row = {"pid": process.pid}
            try:
                found = psutil.Process(process.pid)
                times, memory = found.cpu_times(), found.memory_full_info()
                row |= {"cpu_seconds": times.user + times.system, "rss": memory.rss, "uss": memory.uss}
            except psutil.Error:
                pass
            usage.append(row)
        return usage

    # stepping
    def go(self, half: int, mode: int):
        """Start a kernel, or the workers, on the lanes of a half."""
        self.mode, self.flying[half] = mode, True
        if self.processes and (mode == STEP or self.block is None):
            self.sent[half] = time.monotonic()
            self.waiting[half] = set(range(self.num_workers))
            for w in range(self.num_workers):
                self.tell(w, half)
            return
        for lo, hi in self.blocks[half]:
            self.block(lo, hi, mode)

    def send(self, half: int, action: torch.Tensor):
        """Start the step of a half (0 or 1 with async_halves, else 0). On CUDA nobody waits to check the action: one out
        of range makes the reward NaN."""
        if not self.was_reset:
            raise gym.error.ResetNeeded("call reset() before the first step")
        if self.flying[half]:
            raise RuntimeError(f"send: half {half} is in flight, recv({half}) comes first")
        if self.backend == "cpu":
            bad = (action < 0) | (action >= self.actions)
            if bad.any():
                lane = self.spans[half].start + int(bad.int().argmax())
                raise ValueError(f"action of lane {lane} is not in 0..{self.actions - 1}")
        self.action[self.spans[half]] = action
        self.go(half, STEP)

    def recv(self, half: int = 0):
        """Wait for the step of a half: (reward, terminated, truncated), views of its lanes."""
        if not self.flying[half]:
            raise RuntimeError(f"recv: half {half} is not in flight, send({half}, action) comes first")
        patience = self.worker_timeout if self.mode == STEP else START_SECONDS
        deadline = time.monotonic() + patience
        while self.waiting[half]:
            pipes = {self.pipes[w]: w for w in self.waiting[half]}
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

    def step_lanes(self, action: torch.Tensor):
        for half, span in enumerate(self.spans):
            self.send(half, action[span])
        for half in range(self.halves):
            self.recv(half)
        return self.reward, self.terminated, self.truncated

    def all_lanes(self, mode: int):
        if any(self.flying):
            raise RuntimeError("a half is in flight: recv() comes first")
        for half in range(self.halves):
            self.go(half, mode)
        for half in range(self.halves):
            self.recv(half)

    def reset_lanes(self, first: bool, options: dict):
        self.seeds[0] = self.seed
        self.all_lanes(FIRST if first else NEXT)

    def observe(self):
        return self.obs

    def observe_final(self, lanes):
        return self.final_obs[lanes]

    def episode(self):
        return dict(zip(EPISODE, self.stats))

    def close_extras(self, **kwargs):
        for pipe in self.pipes:
            if pipe is not None:
                pipe.close()  # a worker that is well closes its environments and ends
        for process in self.processes:
            if process is not None:
                process.join(1.0)
                process.kill()
                process.join()
                process.close()
        if self.block:
            self.block.close()
        self.processes, self.pipes = [], []
        super().close_extras(**kwargs)


class ForexVectorEnv(WorkerLanes):
    """Lanes that trade currency pairs, lane i pair i % S. Same-step autoreset; truncation at `episode_length` bars or at
    the end of the split's rows; termination at ruin or at the daily drawdown limit.

    Observation (F + 2,) float32: the row's columns, exposure / leverage, equity over its value at the start of the
    trading day - 1. Action: 0 short, 1 flat, 2 long. Reward: log growth of equity net of costs.
    """

    SAVED = tuple(LANE)

    def __init__(
        self, pairs: Pairs, split: str = "train", num_envs: int = 1024, *, leverage: float = 1.0,
        position_mode: str = "rebalance", daily_drawdown: float = 0.0, episode_length: int = 128, **kwargs,
    ):
        rows, size = np.asarray(pairs.rows[split], np.int64), len(pairs.table)
        dearest = leverage * pairs.bars[:, COST].max(initial=0)
        bad_rows = rows.shape != (len(pairs.names), 2) or (np.diff(rows) <= 0).any() or rows.min() < 0
        refuse((position_mode not in ("rebalance", "drift"), f"position_mode {position_mode!r}: rebalance or drift"),
               (not 0 <= daily_drawdown < 1, f"daily_drawdown {daily_drawdown}: must be in [0, 1)"),
               (episode_length < 1 or not leverage > 0, "episode_length must be at least 1, leverage above 0"),
               (bad_rows or rows.max() >= size,
                f"split {split}: decision rows {rows.tolist()} must be a range a pair, none empty, that ends before {size}"),
               (dearest >= 1, f"leverage {leverage}: a trade would cost {dearest:.3g} of equity"))
        width = pairs.table.shape[1] + len(OWN)
        layout = {"table": (pairs.table.shape, np.float32), "bars": (pairs.bars.shape, np.float64),
                  "rows": (rows.shape, np.int64), "numbers": ((5,), np.float64)}
        everything = np.full(width, np.inf, np.float32)
        super().__init__(layout, -everything, everything, len(LEVELS), num_envs, **kwargs)
        bars = pairs.bars.copy()
        bars[rows[:, 1] - 1, LAST] = 1.0
        numbers = [leverage, position_mode == "drift", daily_drawdown, pairs.series[0].bars_per_year, episode_length]
        for name, values in (("table", pairs.table), ("bars", bars), ("rows", rows), ("numbers", numbers)):
            getattr(self, name).copy_(torch.as_tensor(np.asarray(values)))
        if self.backend == "cuda":
            kernel = cuda_step()[(num_envs + 127) // 128, 128]
        else:
            kernel = step_cpu if self.vec_mode == "single" else step_block
        self.block = MarketBlock(kernel, self.arrays)
        if self.vec_mode == "subproc":
            self.block(0, 0, STEP)  # compiled and cached before the workers start
            self.start_workers()

    def load_state_dict(self, state: dict):
        """Continue exactly, whatever the mode and the workers were."""
        super().load_state_dict(state)
        self.seeds[0] = self.seed
        self.all_lanes(SHOW)


class CustomVectorEnv(WorkerLanes):
    """A user's environments, lane i seeded with seed + i; in worker processes, or (dummy) in this one to debug them."""

    def __init__(self, env_fn: str, num_envs: int = 8, seed: int = 1, **kwargs):
        self.spaces = spaces = user_spaces(env_fn)
        super().__init__({}, spaces["low"], spaces["high"], spaces["actions"], num_envs, seed, env_fn=env_fn, **kwargs)
        if self.vec_mode == "subproc":
            self.start_workers()
        else:
            self.block = UserBlock(env_fn, range(num_envs), self.arrays)

    def state_dict(self) -> dict:
        return {"seed": self.seed, "starts": int(self.seeds[1])}

    def load_state_dict(self, state: dict):
        """New episodes, with seeds that no earlier start had."""
        self.seeds[1] = state["starts"] + 1
        self.reset(seed=state["seed"])


def env_flags(args: Args) -> dict:
    """Keyword arguments of ForexVectorEnv that the market's flags decide."""
    names = ("leverage", "position_mode", "daily_drawdown", "episode_length", "seed")
    return {name: getattr(args, name) for name in names}


def make_vec(num_envs: int = 8, split_name: str = "train", pairs: Pairs | None = None, **kwargs) -> WorkerLanes:
    """gymnasium.make_vec("cleanrl_crypto/Forex-v0", num_envs=8, split_name="train", data=..., leverage=2, ...).

    Keywords: the market's flags, seed, the workers' arguments, and pairs= of an earlier load_pairs() or env_fn=.
    """
    workers = ("vec_mode", "num_workers", "async_halves", "backend", "on_worker_death", "worker_timeout")
    ours = {k: kwargs.pop(k) for k in workers if k in kwargs}
    if "env_fn" in kwargs:
        return CustomVectorEnv(num_envs=num_envs, **{"vec_mode": "subproc"} | kwargs | ours)
    odd = [k for k in kwargs if k not in (*MARKET, "seed")]
    if odd:
        raise TypeError(f"make_vec: unknown keyword {', '.join(odd)}; known: {', '.join((*MARKET, 'seed', *workers))}")
    symbols = kwargs.get("symbols", Args.symbols)
    args = Args(num_envs=max(num_envs, len(symbols)), **kwargs)
    return ForexVectorEnv(pairs or load_pairs(args), split_name, num_envs, **env_flags(args), **ours)


register("cleanrl_crypto/Forex-v0", make_vec)


# ------------------------------------------------------------------------------------- how lanes step
def candidates(args: Args, backend: str) -> list[tuple[str, int]]:
    """Modes and numbers of workers to try: the fastest that runs here is taken."""
    most = args.lanes // (2 if args.async_halves else 1)
    cores = min(os.cpu_count() or 1, most)
    counts = [args.num_workers] if args.num_workers else sorted({1, cores})
    if backend == "cuda":
        return [("single", 1)]
    if args.vec_mode == "auto":
        workers = [("subproc", w) for w in counts]
        return workers if args.env_fn else [("single", 1), ("dummy", 1), *workers]
    return [(args.vec_mode, args.num_workers or cores)]


def measure(env: WorkerLanes, seconds: float) -> float:
    """Lane-steps/s with random actions, observations written."""
    draws = torch.from_numpy(np.random.default_rng(0).integers(env.actions, size=(8, env.num_envs)))
    for action in draws[:3]:
        env.step_lanes(action.to(env.torch_device))
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        env.step_lanes(draws[steps % 8].to(env.torch_device))
        steps += 1
    return steps * env.num_envs / (time.perf_counter() - began)


def probe(make, modes: list[tuple[str, int]], seconds: float = 0.25) -> list[dict]:
    """Every mode measured; one that cannot run here has 0 and its error."""
    table = []
    for mode, workers in modes:
        row = {"vec_mode": mode, "num_workers": workers, "steps_per_s": 0.0}
        env = None
        try:
            env = make(vec_mode=mode, num_workers=workers)
            env.reset()
            row["steps_per_s"] = measure(env, seconds)
        except (WorkerError, OSError) as e:
            row["error"] = str(e)
        if env:
            env.close()
        table.append(row)
    return table


def build_lanes(run: Run, pairs: Pairs | None) -> tuple[WorkerLanes, dict]:
    """The training environment, and how its mode was found."""
    args = run.args
    backend = run.backend if args.vec_mode in ("auto", "single") and not (args.env_fn or args.async_halves) else "cpu"
    refuse((args.backend == "cuda" and backend == "cpu", "--backend cuda steps currency pairs in one process: --vec-mode "
            "single, no --async-halves"))
    shared = dict(async_halves=args.async_halves, backend=backend, on_worker_death=args.on_worker_death,
                  worker_timeout=args.worker_timeout)
    if args.env_fn:
        make = partial(CustomVectorEnv, args.env_fn, args.lanes, args.seed, **shared)
    else:
        make = partial(ForexVectorEnv, pairs, "train", args.lanes, **env_flags(args), **shared)
    modes, table = candidates(args, backend), []
    if len(modes) > 1:
        builds = Lanes.builds
        table = probe(make, modes, min(0.25, max(0.01 * run.guard.remaining(), 0.02)))
        Lanes.builds = builds  # the probe's do not count
        modes = [max((row["steps_per_s"], row["vec_mode"], row["num_workers"]) for row in table)[1:]]
        for row in table:
            failed = f"  ({row['error']})" if "error" in row else ""
            print(f"  {row['vec_mode']:8} {row['num_workers']} worker(s) {row['steps_per_s']:>14,.0f} lane-steps/s{failed}")
    mode, workers = modes[0]
    try:
        envs = make(vec_mode=mode, num_workers=workers)
    except (WorkerError, OSError) as e:
        if mode != "subproc" or args.env_fn:
            raise
        print(f"--vec-mode subproc does not run here ({e}): the same trajectories in this process", file=sys.stderr)
        mode, workers = "dummy", 1
        envs = make(vec_mode=mode, num_workers=workers)
    print(f"vec-mode {mode}, {args.lanes} lanes" + (f", {workers} worker(s)" if mode == "subproc" else ""))
    envs.reset(seed=args.seed)
    return envs, {"mode": mode, "lanes": args.lanes, "backend": backend, "probe": table, "rescaled": []}


def rescale_by_measure(envs: WorkerLanes, seconds: float = 0.2) -> list[dict]:
    """One worker less and one more, measured between steps; the fastest stays. The trajectories are not touched."""
    state = envs.state_dict()
    now, most = envs.num_workers, min(envs.num_envs // envs.halves, 2 * (os.cpu_count() or 1))
    table = []
    for workers in sorted({max(now - 1, 1), now, min(now + 1, max(most, now))}):
        envs.rescale(workers)
        table.append({"workers": workers, "steps_per_s": measure(envs, seconds)})
    envs.rescale(max(table, key=lambda row: row["steps_per_s"])["workers"])
    envs.load_state_dict(state)
    return table


# ----------------------------------------------------------------------------------------- networks
class QNetwork(nn.Module):
    """Q of every action. config: plain values that rebuild it; scale: 1/255 where observations are images."""

    def __init__(self, config: dict):
        super().__init__()
        self.scale = config["scale"]
        hidden = config["hidden"]
        self.network = nn.Sequential(
            nn.Linear(config["inputs"], hidden), nn.ReLU(),
            nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, config["actions"]))

    def forward(self, obs):  # (B, inputs) -> (B, actions)
        return self.network(obs * self.scale)


class RewardScale(nn.Module):
    """1 / running standard deviation of a full position's reward, which no policy can shrink (Chan et al. 1983)."""

    def __init__(self):
        super().__init__()
        for name in ("count", "mean", "squares"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def watch(self, reward):
        """Take in a batch (n,) of float64; nothing waits for the device."""
        n, mean = len(reward), reward.mean()
        total = self.count + n
        change = mean - self.mean
        self.squares += ((reward - mean) ** 2).sum() + change**2 * self.count * n / total
        self.mean += change * n / total
        self.count += n

    def forward(self, reward):
        variance = self.squares / self.count.clamp_min(1)
        return reward * torch.where(variance > 0, variance, 1.0).rsqrt()


def agent_config(args: Args, pairs: Pairs | None, envs: WorkerLanes) -> dict:
    """Plain values that rebuild the network, and the scalers of its columns, from a checkpoint alone."""
    spaces = {"start": 0, "scale": 1.0} if pairs else {k: envs.spaces[k] for k in ("start", "scale")}
    return spaces | {
        "inputs": envs.obs.shape[1], "actions": envs.actions, "hidden": args.hidden, "market": pairs is not None,
        "models": pairs.models if pairs else {}}


def load_policy(checkpoint: str | Path, device: str = "cpu"):
    """policy(obs) -> actions (B,) int64 from a checkpoint file alone: the greedy policy that evaluation reports.

    obs (B, ...): the environment's own batch, NumPy. Raises CheckpointError (one line).
    """
    state = load_run(checkpoint, Path(__file__), SCHEMA, device)
    network = QNetwork(state["config"]).to(device).eval().requires_grad_(False)
    network.load_state_dict(state["agent"])
    return partial(greedy_action, network, state["config"]["start"], device)


def greedy_action(network: QNetwork, start: int, device: str, obs) -> np.ndarray:
    obs = torch.as_tensor(np.asarray(obs, np.float32), device=device).flatten(1)
    return network(obs).argmax(1).cpu().numpy() + start


# ---------------------------------------------------------------------------------------- algorithm
def linear_schedule(start: float, end: float, duration: float, t: float) -> float:
    """From `start` to `end` over `duration`, then `end`."""
    return max(end, start + (end - start) * t / max(duration, 1))


def cosine(t: float, total: float) -> float:
    """From 1 to LAST_RATE."""
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, t / max(total, 1))))


def td_target(reward, done, gamma: float, next_target, next_online):
    """Double DQN's target (B,): reward + gamma (1 - done) Q'(a*), a* of the online network (van Hasselt et al. 2016).

    reward, done (B,); next_target, next_online (B, A): Q at the next state.
    """
    best = next_online.argmax(1, keepdim=True)
    return reward + gamma * (1 - done) * next_target.gather(1, best)[:, 0]


@torch.no_grad()
def move_towards(follower: nn.Module, leader: nn.Module, weight: float):
    """follower += weight (leader - follower), in place; no graph may grow behind it."""
    torch._foreach_lerp_(list(follower.parameters()), list(leader.parameters()), weight)


class Batch(NamedTuple):
    obs: torch.Tensor  # (B, inputs)
    action: torch.Tensor  # (B,)
    reward: torch.Tensor
    next_obs: torch.Tensor
    terminated: torch.Tensor  # (B,) float: a truncated episode bootstraps


class Replay:
    """Ring of transitions on the learner's device, lanes innermost; begin() when an action is sent, end() afterwards.

    On a market a row number stands for the columns (the next row is row + 1, also at an episode's end: rows do not
    jump), and `state`, `next_state` (n, width) hold what depends on the lane's path; elsewhere the whole observation.
    """

    FIELDS = ("row", "action", "reward", "state", "next_state", "terminated")

    def __init__(self, size: int, lanes: int, width: int, table: torch.Tensor | None, device):
        self.steps, self.lanes, self.width, self.table, self.device = max(size // lanes, 2), lanes, width, table, device
        self.total = 0  # vector steps that are complete
        n = (self.steps + 1) * lanes  # one more: the step in flight
        free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available
        each = 11 + 8 * width
        refuse((n * each > 0.8 * free, f"--buffer-size {size}: {n * each / 2**30:.1f} GiB at {each} bytes a transition, "
                f"{free / 2**30:.1f} GiB are free: {int(0.5 * free / each)} would fit"))
        self.row = torch.zeros(n, dtype=torch.int32, device=device)
        self.action = torch.zeros(n, dtype=torch.int16, device=device)
        self.reward = torch.zeros(n, device=device)
        self.state, self.next_state = (torch.zeros((n, width), device=device) for _ in range(2))
        self.terminated = torch.zeros(n, dtype=torch.bool, device=device)

    def slot(self, step: int, lanes: slice | None = None) -> slice:
        """Where the lanes of a vector step lie."""
        at = step % (self.steps + 1) * self.lanes
        return slice(at + lanes.start, at + lanes.stop) if lanes else slice(at, at + self.lanes)

    def begin(self, step: int, lanes: slice, row, obs, action):
        at = self.slot(step, lanes)
        self.row[at], self.state[at], self.action[at] = row, obs[:, -self.width :], action

    def end(self, step: int, lanes: slice, reward, next_obs, terminated):
        at = self.slot(step, lanes)
        self.reward[at], self.next_state[at], self.terminated[at] = reward, next_obs[:, -self.width :], terminated

    def __len__(self) -> int:
        return min(self.total, self.steps) * self.lanes

    def sample(self, rng, n: int) -> Batch:
        oldest = self.total - min(self.total, self.steps)
        step = rng.integers(oldest, self.total, n) % (self.steps + 1)
        at = torch.from_numpy(step * self.lanes + rng.integers(0, self.lanes, n)).to(self.device)
        obs, next_obs = self.state[at], self.next_state[at]
        if self.table is not None:
            row = self.row[at].long()
            obs, next_obs = (torch.cat(x, 1) for x in ((self.table[row], obs), (self.table[row + 1], next_obs)))
        return Batch(obs, self.action[at].long(), self.reward[at], next_obs, self.terminated[at].float())

    def state_dict(self) -> dict:
        n = min(self.total, self.steps + 1) * self.lanes
        return {"total": self.total} | {name: getattr(self, name)[:n].cpu().clone() for name in self.FIELDS}

    def load_state_dict(self, state: dict):
        self.total = state["total"]
        for name in self.FIELDS:
            getattr(self, name)[: len(state[name])] = state[name].to(self.device)


class Monitor:
    """monitor.csv in Stable-Baselines3's format, a line an episode. What ended is kept on the lanes' device, and written
    at log points (and when the buffer is full)."""

    def __init__(self, path: Path, name: str, envs: WorkerLanes, resumed: bool):
        n, self.path = envs.num_envs, path
        self.room, self.used, self.sums = max(1, min(256, 2**18 // n)), 0, [0.0, 0.0, 0.0]
        self.done = torch.zeros((self.room, n), dtype=torch.bool, device=envs.torch_device)
        self.stats = torch.zeros((self.room, len(EPISODE), n), dtype=torch.float64, device=envs.torch_device)
        self.times = np.zeros(self.room)
        self.start = time.time()
        old = resumed and path.exists() and path.stat().st_size > 0
        if old:  # t goes on from the first start, which load_results() adds to it
            with path.open() as f:
                self.start = json.loads(f.readline()[1:])["t_start"]
        self.file = path.open("a" if old else "w")
        if not old:
            self.file.write(f"#{json.dumps({'t_start': self.start, 'env_id': name})}\n")
            self.file.write("r,l,t,drawdown,turnover,sharpe_ratio,max_drawdown\n")
            self.file.flush()

    def add(self, lanes: slice, done, stats):
        """The lanes of a half after a step; the last half makes the vector step whole."""
        self.done[self.used, lanes] = done
        self.stats[self.used, :, lanes] = stats
        if lanes.stop == self.done.shape[1]:
            self.times[self.used] = time.time() - self.start
            self.used += 1
            if self.used == self.room:
                self.flush()

    def flush(self):
        done, stats = (x[: self.used].cpu().numpy() for x in (self.done, self.stats))
        for k, lane in np.argwhere(done):
            r, length, *rest = stats[k, :, lane].tolist()
            self.sums = [a + b for a, b in zip(self.sums, (r, length, 1.0))]
            self.file.write(f"{r:.9g},{length:.0f},{self.times[k]:.6f},{','.join(f'{x:.6g}' for x in rest)}\n")
        self.used = 0
        self.file.flush()

    def charts(self) -> dict:
        """Means of the episodes that ended since the last call; none if none did."""
        self.flush()
        (r, length, n), self.sums = self.sums, [0.0, 0.0, 0.0]
        return {"charts/episodic_return": r / n, "charts/episodic_length": length / n} if n else {}

    def state_dict(self) -> dict:
        self.flush()
        return {"bytes": self.path.stat().st_size, "sums": self.sums}

    def load_state_dict(self, state: dict):
        self.sums = state["sums"]
        os.truncate(self.path, min(state["bytes"], self.path.stat().st_size))

    def close(self):
        self.flush()
        self.file.close()


class Collector:
    """Between lanes and replay: what was sent off is taken in a loop later, while the learner works."""

    def __init__(self, envs: WorkerLanes, rb: Replay, monitor: Monitor):
        self.envs, self.rb, self.monitor, self.step = envs, rb, monitor, 0  # step: vector steps sent off

    def send(self, half: int, obs, action):
        envs, lanes = self.envs, self.envs.spans[half]
        self.rb.begin(self.step, lanes, envs.row[lanes], obs, action)
        envs.send(half, action.to(envs.torch_device))
        if half == envs.halves - 1:
            self.rb.total = self.step  # what is in flight is not in replay
            self.step += 1

    def take_in(self, half: int):
        envs, lanes = self.envs, self.envs.spans[half]
        if not envs.flying[half]:
            return
        reward, terminated, truncated = envs.recv(half)
        done = terminated | truncated
        after = torch.where(done[:, None], envs.final_obs[lanes], envs.obs[lanes])
        self.rb.end(self.step - 1, lanes, reward, after, terminated)
        self.monitor.add(lanes, done, envs.stats[:, lanes])

    def land(self):
        for half in range(self.envs.halves):
            self.take_in(half)
        self.rb.total = self.step

    def charts(self, bars) -> dict:
        """Episodes since the last call, and on a market what the last step of all lanes was like."""
        self.land()
        record = self.monitor.charts() | {"env/restarts": self.envs.restarts}
        if bars is not None:
            at = self.rb.slot(self.step - 1)
            held, move = self.rb.next_state[at, 0], (self.rb.next_state[at, 0] - self.rb.state[at, 0]).abs()
            paid = bars[self.rb.row[at].long(), COST] * move / BP
            record |= {"env/turnover": move.mean(), "env/exposure": held.mean(), "env/costs": paid.mean()}
        return record

    def state_dict(self) -> dict:
        self.land()  # before the lanes and the replay say what they hold
        return {"step": self.step}

    def load_state_dict(self, state: dict):
        self.step = state["step"]


# --------------------------------------------------------------------------- evaluation, diagnostics
@nb.njit(cache=True)
def greedy_nb(layers, table, bars, start, stop, account, leverage, drift, limit, path):
    """Greedy positions path[start:stop] of a network on rows of its pair, from account (3,): last position, exposure
    over leverage, growth since the day began; it is left as it is after the last row.

    The account at the daily drawdown limit is flat until the next trading day.
    """
    w1, b1, w2, b2, w3, b3 = layers
    obs = np.empty((1, table.shape[1] + 2), np.float32)
    last, held, day = account[0], account[1], account[2]
    for t in range(start, stop):
        observe_nb(obs, 0, table, t, held, day)
        h = np.maximum(np.dot(obs, w1) + b1, np.float32(0))
        h = np.maximum(np.dot(h, w2) + b2, np.float32(0))
        q = np.dot(h, w3) + b3  # (1, 3)
        target = float(np.argmax(q)) - 1.0
        if bars[t, FLAT] != 0.0 or (limit > 0.0 and day <= 1.0 - limit):
            target = 0.0
        growth, left, _, held, _ = trade_nb(last, held, target, bars, t, leverage, drift)
        day = 1.0 if bars[t, NEW_DAY] != 0.0 else day * growth * left
        last = path[t] = target
    account[0], account[1], account[2] = last, held, day


@nb.njit(cache=True)
def walk_nb(target, bars, expected, leverage, drift):
    """Trade positions `target` (n,) along one pair's rows: Series.walk's four arrays, exposure held over leverage."""
    n = target.size
    reward, mean, change, exposure = np.empty(n), np.empty(n), np.empty(n), np.empty(n)
    held, last = 0.0, 0.0
    for t in range(n):
        aim = 0.0 if bars[t, FLAT] != 0.0 else target[t]
        growth, left, exposure[t], held, change[t] = trade_nb(last, held, aim, bars, t, leverage, drift)
        x = exposure[t] * leverage
        swap = x * bars[t, SWAP_LONG] if x > 0 else -x * bars[t, SWAP_SHORT]
        reward[t] = math.log(growth * left)
        mean[t] = x * expected[t] - swap - (1.0 - left)
        last = aim
    return reward, mean, change, exposure


def walk(bars, expected, leverage: float, drift: bool, target, a: int, b: int):
    """Series.walk of one pair."""
    return walk_nb(np.asarray(target, np.float64), bars[a:b], expected[a:b], leverage, drift)


def greedy_paths(network: QNetwork, pairs: Pairs, split: str, args: Args, seconds: float = math.inf) -> list[np.ndarray]:
    """Greedy positions (n,) of every pair along a split, flat before the first; shorter, all by as much, after
    `seconds`."""
    layers = tuple(
        np.ascontiguousarray(p.detach().cpu().numpy().T) for p in network.network.parameters())  # w1, b1, w2, ...
    rows, drift, until = pairs.rows[split], args.position_mode == "drift", time.monotonic() + seconds
    paths, accounts = np.zeros(len(pairs.table)), np.tile([0.0, 0.0, 1.0], (len(rows), 1))
    longest, done = int(np.diff(rows).max()), 0
    while done < longest and (done == 0 or time.monotonic() < until):
        for (a, b), account in zip(rows, accounts):
            part = min(a + done, b), min(a + done + 1024, b)
            greedy_nb(layers, pairs.table, pairs.bars, *part, account, args.leverage, drift, args.daily_drawdown, paths)
        done += 1024
    return [paths[a : min(b, a + done)] for a, b in rows]


def series_of(pairs: Pairs, args: Args) -> list[Series]:
    """The pairs as scoring sees them; rows count from each pair's own first."""
    out = []
    for k, first in enumerate(pairs.first[:-1]):
        cut = pairs.of(k)
        own = partial(walk, pairs.bars[cut], pairs.expected[cut], args.leverage, args.position_mode == "drift")
        rows = {split: tuple(int(x) - int(first) for x in r[k]) for split, r in pairs.rows.items()}
        known = pairs.series[k].truth is not None
        out.append(Series(pairs.table[cut].astype(np.float64), pairs.bars[cut, RET], rows, own, known))
    return out


def optimum_path(policy: np.ndarray, truth, start: int, stop: int) -> np.ndarray:
    """Positions (n,) of the best policy (regimes, states, 3) over -1, 0, 1 on rows [start, stop), flat before."""
    table, position = policy[truth.regime[start:stop], truth.s[start:stop]].tolist(), 1
    return LEVELS[[position := row[position] for row in table]]


def equal_weights(walks: list[pd.DataFrame], bars_per_year: float) -> tuple[dict, pd.DataFrame]:
    """Metrics, and position and equity by time, of an account split equally over pairs, evened out at every bar; a pair
    without a bar earns nothing there."""
    column = {name: pd.concat([w[name] for w in walks], axis=1) for name in ("reward", "mean", "change", "held")}
    known = not any(w["mean"].isna().any() for w in walks)
    growth = np.expm1(column["reward"]).fillna(0.0).mean(axis=1).to_numpy()
    mean, change, held = (column[name].fillna(0.0).mean(axis=1).to_numpy() for name in ("mean", "change", "held"))
    metrics, equity = path_metrics(np.log1p(growth), mean if known else mean * np.nan, change, held, bars_per_year)
    metrics["trades"] = int((column["change"] > 1e-9).to_numpy().sum())
    if known:  # log growth: what a constant position of sigma costs, sigma**2 / 2, is in it
        metrics["expected_growth_bps"] = metrics["mean_expected_bps"] - float(growth.var() / 2 / BP)
    return metrics, pd.DataFrame({"position": held, "equity": equity}, index=column["reward"].index)


def with_score(metrics: dict) -> dict:
    """{who: metrics} -> {"agent", "baselines"}, the agent's score = share of the optimum where that is known."""
    agent, best = metrics.pop("agent"), metrics.get("optimum")
    if best:
        earned = best["mean_expected_bps"]
        agent["score"] = agent["mean_expected_bps"] / earned if earned >= 0.05 else None
    return {"agent": agent, "baselines": metrics}


class MarketJudge:
    """Evaluates on the market: the agent, pair by pair and equally weighted, beside its baselines."""

    COLUMNS = ("score", "mean_expected_bps", "mean_reward_bps", "sharpe", "max_drawdown", "turnover", "exposure", "trades")

    def __init__(self, pairs: Pairs, args: Args, device):
        self.pairs, self.args, self.device, self.series = pairs, args, device, series_of(pairs, args)
        self.constants = [best_constant(s, LEVELS) for s in self.series]
        truth = pairs.series[0].truth
        self.optimum = markets.optimum(truth.law, float(pairs.bars[0, COST]), actions=LEVELS) if truth else None
        self.by = "expected_growth_bps" if truth else "mean_reward_bps"

    def evaluate(self, network: QNetwork, split: str, seconds: float = math.inf) -> tuple[dict, dict]:
        """{"agent", "baselines", "symbols": {name: {"agent", "baselines"}}, "partial"} and traces {name: frame}."""
        paths = greedy_paths(network, self.pairs, split, self.args, seconds)
        out, traces, walks = {"symbols": {}, "partial": False}, {}, {}
        for k, (name, path) in enumerate(zip(self.pairs.names, paths)):
            out["partial"] |= len(path) < np.diff(self.series[k].rows[split])[0]
            walked, frame = self.walk_pair(k, split, path)
            metrics = {}
            for who, walk_of in walked.items():
                tail = "" if who == "agent" else f"_{who}"
                metrics[who], equity = path_metrics(*walk_of.to_numpy().T, self.pairs.series[k].bars_per_year)
                frame[f"position{tail}"], frame[f"equity{tail}"] = walk_of["held"].to_numpy(), equity
                walks.setdefault(who, []).append(walk_of)
            out["symbols"][name], traces[name] = with_score(metrics), frame
        metrics, columns = {}, {}
        for who, frames in walks.items():
            metrics[who], joint = equal_weights(frames, self.pairs.series[0].bars_per_year)
            tail = "" if who == "agent" else f"_{who}"
            columns |= {f"{name}{tail}": joint[name] for name in joint}
        close = columns["equity_buy_and_hold"]
        columns |= {"close": close, "next_return": close.pct_change().shift(-1).fillna(0.0)}
        traces[""] = pd.DataFrame(columns).rename_axis("timestamp").reset_index()
        return with_score(metrics) | out, traces

    def walk_pair(self, k: int, split: str, path: np.ndarray) -> tuple[dict, pd.DataFrame]:
        """The walks of the agent and of its baselines along one pair's rows, and what the trace says of the rows."""
        bars, series = self.pairs.series[k], self.series[k]
        a, n = series.rows[split][0], len(path)
        turnover = float(np.abs(np.diff(path, prepend=0.0)).mean())
        targets = {"agent": path, "flat": np.zeros(n), "buy_and_hold": np.ones(n),
                   "best_constant": np.full(n, self.constants[k]),
                   "random_same_turnover": random_path(n, turnover, self.args.seed + k, LEVELS)}
        if self.optimum is not None:
            targets["optimum"] = optimum_path(self.optimum, bars.truth, a, a + n)
        at, times = slice(a, a + n), utc_times(bars.timestamp[a : a + n])
        columns = {"timestamp": times, "close": bars.close[at], "next_return": series.ret[at]}
        if series.known:
            columns |= {"expected": bars.truth.expected[at], "signal": bars.truth.signal[at],
                        "regime": bars.truth.regime[at]}
        names = ("reward", "mean", "change", "held")
        walks = {who: pd.DataFrame(dict(zip(names, series.walk(target, a, a + n))), index=times)
                 for who, target in targets.items()}
        return walks, pd.DataFrame(columns)

    def score(self, result: dict, loop) -> float:
        """What best.pt is chosen by. One realised mean is noise: the last three."""
        value = result["agent"][self.by]
        loop.recent = [*loop.recent[-2:], value]
        return float(np.mean(loop.recent)) if self.by == "mean_reward_bps" else value

    def line(self, result: dict) -> str:
        agent = result["agent"]
        score = f"score {agent['score']:+.3f}  " if agent.get("score") is not None else ""
        return f"{score}{agent[self.by]:+.2f} bp  turnover {agent['turnover']:.3f}"

    @torch.no_grad()
    def diagnose(self, network: QNetwork, split: str = "eval", n: int = 1024) -> dict:
        """What the greedy position depends on, on n rows of a split (the same rows at every call)."""
        rng = np.random.default_rng(0)
        rows = np.concatenate([np.arange(a, b) for a, b in self.pairs.rows[split]])
        rows = np.sort(rng.choice(rows, min(n, len(rows)), replace=False))
        held = torch.from_numpy(rng.integers(-1, 2, len(rows)).astype(np.float32)).to(self.device)
        mix = torch.from_numpy(rng.permutation(len(rows))).to(self.device)
        x = torch.from_numpy(self.pairs.table[rows]).to(self.device)
        obs = torch.cat([x, held[:, None], torch.zeros_like(held)[:, None]], 1)
        other_rows, other_position = torch.cat([x[mix], obs[:, -2:]], 1), obs.clone()
        other_position[:, -2] = held[mix]

        q = network(obs)
        ordered, greedy = q.sort(1).values, q.argmax(1).float() - 1
        fixed = []  # the market alone varies
        for position in LEVELS:
            obs[:, -2] = position
            fixed.append(network(obs).argmax(1).float().std())
        obs[:, -2] = held
        hidden = network.network[:4](obs * network.scale)
        return {
            "policy/state_dependence": torch.stack(fixed).mean(), "policy/action_mean": greedy.mean(),
            "policy/saturation": (greedy != 0).float().mean(), "policy/greedy_gap": (ordered[:, 2] - ordered[:, 1]).mean(),
            "policy/dead_units": (hidden <= 0).all(0).float().mean(),
            "policy/attribution_technical": (network(other_rows).argmax(1) - 1 - greedy).abs().mean(),
            "policy/attribution_position": (network(other_position).argmax(1) - 1 - greedy).abs().mean(),
            "value/q_mean": q.mean(), "value/q_action_spread": (ordered[:, 2] - ordered[:, 0]).mean()}

    @torch.no_grad()
    def overestimation(self, network: QNetwork, scale: RewardScale, gamma: float, split: str, n: int = 2048) -> float:
        """Mean of (predicted - realised) discounted value of the greedy action along its path, scaled reward."""
        gaps = []
        for k, path in enumerate(greedy_paths(network, self.pairs, split, self.args)):
            a, path = self.series[k].rows[split][0], path[:n]
            reward, _, _, held = self.series[k].walk(path, a, a + len(path))
            table = self.pairs.table[self.pairs.of(k)][a : a + len(path)]
            before = np.append(0.0, held[:-1])
            obs = np.column_stack([table, before, 0 * before]).astype(np.float32)
            value = network(torch.from_numpy(obs).to(self.device)).max(1).values.cpu().numpy()
            reward, tail = scale(torch.from_numpy(reward).to(self.device)).cpu().numpy(), 0.0
            realised = np.array([tail := r + gamma * tail for r in reward[::-1]])[::-1]
            keep = max(len(reward) - int(5 / (1 - gamma)), 1)  # the last ones see too little of their future
            gaps.append((value - realised)[:keep].mean())
        return float(np.mean(gaps))

    def finish(self, run: Run, loop, network: QNetwork, scale: RewardScale) -> tuple[dict, dict]:
        """All splits with traces, and the audit."""
        (run.dir / "traces").mkdir(exist_ok=True)
        results = {}
        for split in ("test", "eval", "train"):
            results[split], traces = self.evaluate(network, split, run.eval_limit(0.3))
            if results[split]["partial"]:
                print(f"{split}: evaluated on {len(traces[''])} bars only (time)")
            for name, frame in traces.items():
                frame.to_parquet(run.dir / "traces" / f"{split}{'_' * bool(name)}{name}.parquet")
        audit = {name.split("/")[1]: float(x) for name, x in self.diagnose(network).items()}
        audit["overestimation"] = self.overestimation(network, scale, run.args.gamma, "eval")
        audit["ridge_edge_bps"], audit["ridge_edge_se_bps"] = ridge_edge(self.series, LEVELS)
        audit["verdict"], audit["reasons"] = verdict(audit, results["eval"]["agent"], loop.updates)
        record = {f"eval/{split}/{k}": v for split in ("train", "test") for k, v in results[split]["agent"].items()}
        run.log(record | {"value/overestimation": audit["overestimation"]}, loop)
        for name, pair in results["test"]["symbols"].items():
            best = max(pair["baselines"], key=lambda who: pair["baselines"][who]["mean_reward_bps"])
            print(f"test {name}: agent {pair['agent']['mean_reward_bps']:+.2f} bp a bar, best baseline {best} "
                  f"{pair['baselines'][best]['mean_reward_bps']:+.2f}")
        return {split: results[split] for split in SPLITS}, audit

    def close(self):
        pass


class CustomJudge:
    """Evaluates on a user's environments: greedy episodes in workers of their own."""

    COLUMNS = ("episode_return", "episode_return_std", "episode_length", "episodes")
    by = "episode_return"

    def __init__(self, args: Args, device):
        mode = {"vec_mode": "dummy"} if args.vec_mode == "dummy" else {"vec_mode": "subproc"}
        self.envs, self.device = CustomVectorEnv(
            args.env_fn, 10, args.seed + 10**6, on_worker_death=args.on_worker_death, worker_timeout=args.worker_timeout,
            **mode), device

    @torch.no_grad()
    def evaluate(self, network: QNetwork, split: str, seconds: float = math.inf) -> tuple[dict, dict]:
        """The first episodes of every lane, as many of each: a fast lane must not count for more."""
        envs, until = self.envs, time.monotonic() + seconds
        share, done = -(-EVAL_EPISODES // envs.num_envs), [[] for _ in range(envs.num_envs)]
        envs.reset(seed=envs.seed)
        for _ in range(EVAL_STEPS):
            if min(map(len, done)) >= share or time.monotonic() > until:
                break
            _, terminated, truncated = envs.step_lanes(network(envs.obs.to(self.device)).argmax(1).cpu())
            for i in (terminated | truncated).nonzero()[:, 0].tolist():
                done[i].append(envs.stats[:2, i].tolist())
        kept = np.array([episode for lane in done for episode in lane[:share]]).reshape(-1, 2)
        partly = len(kept) < share * envs.num_envs
        kept = kept if len(kept) else np.full((1, 2), np.nan)
        return {"agent": {"episode_return": kept[:, 0].mean(), "episode_return_std": kept[:, 0].std(),
                          "episode_length": kept[:, 1].mean(), "episodes": int(np.isfinite(kept[:, 0]).sum())},
                "baselines": {}, "partial": partly}, {}

    def score(self, result: dict, loop) -> float:
        return result["agent"][self.by]

    def line(self, result: dict) -> str:
        return f"return {result['agent'][self.by]:.1f} over {result['agent']['episodes']} episodes"

    def diagnose(self, network: QNetwork) -> dict:
        return {}

    def finish(self, run: Run, loop, network: QNetwork, scale: RewardScale) -> tuple[dict, dict]:
        result, _ = self.evaluate(network, "eval", run.eval_limit(0.5))
        found = f"mean {self.line(result)} of a custom environment"
        return {"eval": result}, {"verdict": "healthy" if loop.updates else "untrained", "reasons": [found]}

    def close(self):
        self.envs.close()


def judge_and_keep(run: Run, loop, averaged: QNetwork, judge, record: dict):
    """Evaluate on the eval split, log everything, keep the best agent."""
    run.phase("eval")
    result, _ = judge.evaluate(averaged, "eval", run.eval_limit(0.3))
    record = record | judge.diagnose(averaged) | {f"eval/eval/{k}": v for k, v in result["agent"].items()}
    run.log(record, loop)
    score, loop.judged = judge.score(result, loop), loop.updates
    if run.keep_best(score, loop):
        loop.stale = 0
    elif loop.updates:
        loop.stale += 1
    print(f"{run.guard.elapsed():6.0f} s  {loop.global_step:>9} transitions  {loop.updates:>6} updates  eval "
          f"{judge.line(result)}", flush=True)


# --------------------------------------------------------------------------------------------- main
@dataclass
class Loop:
    global_step: int = 0  # transitions sent off
    updates: int = 0
    judged: int = 0  # updates at the last evaluation
    stale: int = 0  # evaluations without a better one
    recent: list = field(default_factory=list)  # last scores


@experiment
def main(argv: list[str] | None = None) -> dict:
    """Train (or --eval-only), evaluate, report; returns what summary.json holds."""
    run = Run(Args, argv, schema=SCHEMA)
    args, device = run.args, run.device
    pairs = None if args.env_fn else load_pairs(args, run.state["config"]["models"] if run.state else None)
    envs, performance = build_lanes(run, pairs)
    run.closing(envs)
    judge = run.closing(CustomJudge(args, device) if pairs is None else MarketJudge(pairs, args, device))
    config = agent_config(args, pairs, envs) if run.state is None else run.state["config"]
    q_network, target_network, averaged = (QNetwork(config).to(device) for _ in range(3))
    move_towards(target_network, q_network, 1.0)
    move_towards(averaged, q_network, 1.0)
    reward_scale = RewardScale().to(device)
    optimizer = torch.optim.AdamW(q_network.parameters(), args.learning_rate, weight_decay=args.weight_decay, fused=True)
    table, bars, full_position = market_tensors(pairs, args, device)
    rb = Replay(args.buffer_size, args.lanes, len(OWN) if pairs else config["inputs"], table, device)
    run.open(*identity(args, pairs))
    monitor = run.closing(Monitor(run.dir / "monitor.csv", args.env_fn or "cleanrl_crypto/Forex-v0", envs, run.resumed))
    collector = Collector(envs, rb, monitor)
    # all that a resumed run needs, by name; the collector first, as it takes in what is in flight
    loop = run.restore(
        Loop(), config, policy=dict(agent=averaged, reward_scale=reward_scale), collector=collector, learner=q_network,
        target=target_network, optimizer=optimizer, envs=envs, replay=rb, monitor=monitor)

    if run.state is None:
        judge_and_keep(run, loop, averaged, judge, {})
    while not args.eval_only and loop.global_step < args.total_timesteps and not finished(run, loop):
        # ALGO LOGIC: action; every step of the lanes is sent off, the learner works, then its result is taken in
        run.phase("rollout")
        epsilon = linear_schedule(START_E, args.end_e, args.exploration_fraction * args.total_timesteps, loop.global_step)
        explore = run.rng.random(args.lanes) < (epsilon if loop.global_step >= args.learning_starts else 1.0)
        explore = torch.from_numpy(explore).to(device)
        choices = torch.from_numpy(run.rng.integers(0, envs.actions, args.lanes)).to(device)
        for half, lanes in enumerate(envs.spans):
            collector.take_in(half)
            obs = envs.obs[lanes].to(device)
            with torch.no_grad():
                greedy = q_network(obs).argmax(1)
            collector.send(half, obs, torch.where(explore[lanes], choices[lanes], greedy))
        if pairs:  # where the lanes stood, whatever they did there
            reward_scale.watch(full_position[rb.row[rb.slot(collector.step - 1)].long()])
        loop.global_step += args.lanes

        # ALGO LOGIC: training
        if rb.total * args.lanes >= args.learning_starts and rb.total:
            run.phase("learn")
            rate = args.learning_rate * cosine(rb.total * args.lanes, args.total_timesteps)
            optimizer.param_groups[0]["lr"] = rate
            for _ in range(args.updates_per_step):
                batch = rb.sample(run.rng, args.batch_size)
                with torch.no_grad():
                    reward = reward_scale(batch.reward) if pairs else batch.reward
                    next_target, next_online = target_network(batch.next_obs), q_network(batch.next_obs)
                    target = td_target(reward, batch.terminated, args.gamma, next_target, next_online)
                q_values = q_network(batch.obs).gather(1, batch.action[:, None])[:, 0]
                loss = F.smooth_l1_loss(q_values, target)

                optimizer.zero_grad()
                loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(q_network.parameters(), MAX_GRAD_NORM)
                optimizer.step()
                loop.updates += 1
                if loop.updates % args.target_network_frequency == 0:
                    move_towards(target_network, q_network, args.tau)
            move_towards(averaged, q_network, 1 - AVERAGE**args.updates_per_step)

        # evaluate, log, keep the best
        if run.every(args.eval_interval, loop.global_step) and loop.judged < loop.updates:
            run.phase("rollout")
            record = collector.charts(bars)
            record |= {
                "losses/td_loss": loss.detach(), "losses/q_values": q_values.detach().mean(),
                "losses/target_mean": target.mean(), "losses/grad_norm": grad_norm, "charts/learning_rate": rate,
                "charts/epsilon": epsilon} | run.charts(loop, loop.updates * args.batch_size)
            if not math.isfinite(record["losses/td_loss"]):
                raise CheckFailed(f"the loss is not finite after {loop.updates} updates: lower --learning-rate")
            judge_and_keep(run, loop, averaged, judge, record)
            if args.rescale:
                performance["rescaled"].append(rescale_by_measure(envs))
        run.checkpoint(loop)

    # the best agent on the eval split is what is reported; the last one is a candidate too
    run.phase("eval")
    collector.land()
    if loop.judged < loop.updates and not args.eval_only:
        judge_and_keep(run, loop, averaged, judge, collector.charts(bars) | run.charts(loop, loop.updates * args.batch_size))
    run.use_best(loop)
    run.phase("eval")
    results, audit = judge.finish(run, loop, averaged, reward_scale)
    performance |= {"workers": len(envs.processes), "restarts": envs.restarts, "worker_usage": envs.worker_usage()}
    return run.finish(
        loop, results, audit, judge.COLUMNS, selected_by=judge.by, performance=performance,
        samples_per_transition=loop.updates * args.batch_size / max(loop.global_step, 1))


def identity(args: Args, pairs: Pairs | None) -> tuple[str, dict]:
    """Name of the run's folder, and what the run is about."""
    if pairs is None:
        print(f"--env-fn {args.env_fn}: unscaled rewards, no baselines")
        return args.env_fn.replace(":", "-"), {"spec": args.env_fn}
    name = Path(args.data.split(",")[0].split("?")[0].replace(":", "-")).stem
    return name, describe_pairs(args, pairs)


def market_tensors(pairs: Pairs | None, args: Args, device):
    """On the learner's device: the columns, the bars, and log growth of a full position (R,); None without a market."""
    if pairs is None:
        return None, None, None
    growth = np.log1p(np.maximum(args.leverage * pairs.bars[:, RET], RUIN - 1))
    return tuple(torch.from_numpy(x).to(device) for x in (pairs.table, pairs.bars, growth))


def finished(run: Run, loop: Loop) -> bool:
    """No more time, or (--patience) no better agent: a resumed run stops at once then."""
    if run.args.patience and loop.stale >= run.args.patience:
        print(f"no better agent in {loop.stale} evaluations (--patience): stopping at {loop.global_step} transitions")
        return True
    return run.out_of_time()


if FORK_SERVER in os.environ:
    gc.collect()
    gc.freeze()  # or a worker's first collection of garbage would copy what it shares

if __name__ == "__main__":
    exit_with(main)
