"""Does it see the future? Edits what comes after random bars, and compares what was visible before.

    python scripts/leak_audit.py my_features.py:columns
    python scripts/leak_audit.py my_package.envs:make_env --data data/BTCUSDT_1h.parquet
    python scripts/leak_audit.py runs/seed1

TARGET is a function of bars that returns columns, a factory that makes a Gymnasium environment of
bars, or a run directory of the TQC or the DQN script. The last line says where the first leak is,
or what was tried without finding one. Exit code 0: no leak found, 1: a leak, 2: the target cannot
be judged. docs/leak_audit.md: what is passed, what is compared, what cannot be found.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.data import COLUMNS, Bars, load_bars, utc_times  # noqa: E402
from common.run import UsageError, args_of, exit_with  # noqa: E402

OWN_BARS = "synthetic:noise?bars=1500"  # with holes and silent bars, see rough()
MIRROR = 0, 2, 1, 3  # the column of which a mirrored open, high, low, close is made
EDITS = {
    "rows": "later rows are edited",
    "length": "later rows are missing",
    "prices": "later prices are edited",
    "volumes": "later volumes are edited",
}
FIT_SHARES = (0.4, 0.6, 0.8)  # of the bars: the values of fit_until that are tried
ROUNDING = 1e-6  # of a column's spread: a smaller difference is rounding
Z = 7.0  # standard errors that chance does not reach in a few hundred tests
LATER = np.datetime64("2262-01-01", "ns")  # than any bar
TABLES = pd.Series, pd.DataFrame
NUMBERS = bool, int, float, np.number, list, tuple, np.ndarray
FEW = 100  # rows that a rank correlation needs

SEEDS = 3  # episodes that are walked
PAYOFF = 32  # steps over which the rewards of one action are added up
ACTIONS = 16  # whose payoff is compared
CUTS = 8  # bars within each episode after which the future is edited
AGAIN = 6  # other edits of the same bars, before it is said that an observation did not change
SLACK = 3  # bars by which an observation may show a new bar late
FAR = 64  # bars: where the search for how far an environment looks ahead ends

DEFAULTS = {"bars": 3000, "edits": 40, "steps": 300, "labels": [], "earned": []}
IDLE = {  # flags that say nothing of a kind of target
    "a run directory": ("data", "bars", "edits", "labels", "earned"),
    "a function that returns columns": ("steps",),
    "an environment": ("edits", "labels", "earned"),
}


# ------------------------------------------------------------------------------------------- bars
def rough(bars: Bars, rng) -> Bars:
    """Bars with holes in time and with bars in which nothing was traded, as real ones have."""
    rows = len(bars.timestamp)
    keep = np.ones(rows, bool)
    for start in rng.integers(20, rows - 20, rows // 120):
        stop = start + rng.integers(1, 6)
        keep[start:stop] = False
    ohlcv = bars.ohlcv.copy()
    for row in rng.integers(20, rows - 20, rows // 50):
        ohlcv[:, row, :4] = ohlcv[:, row - 1, 3:4]
        ohlcv[:, row, 4] = 0.0
    return some_rows(replace(bars, ohlcv=ohlcv, truth=None), keep)


def some_rows(bars: Bars, rows) -> Bars:
    return replace(
        bars,
        timestamp=bars.timestamp[rows],
        ohlcv=bars.ohlcv[:, rows],
        filled=bars.filled[:, rows],
    )


def edited(bars: Bars, cut: int, kind: str, rng) -> Bars:
    """Bars whose rows after `cut` are others that are valid too, or are not there."""
    if kind == "length":
        return some_rows(bars, slice(0, cut + 1))
    ohlcv = bars.ohlcv.copy()
    timestamp = bars.timestamp.copy()
    after = ohlcv[:, cut + 1 :]
    size = after.shape[:2]
    if kind in ("rows", "prices"):
        # calm and wild ones at the old level or far from it: a leak may show at one of them only
        wild = rng.choice([0.003, 0.03, 0.3])
        level = rng.choice([0.0, 0.3, 1.0]) * rng.normal()
        moves = rng.normal(level, wild, (*size, 4))
        prices = after[..., :4] * np.exp(moves)
        after[..., :4] = prices
        after[..., 1] = prices.max(-1)
        after[..., 2] = prices.min(-1)
    if kind in ("rows", "volumes"):
        level = rng.normal()
        moves = rng.normal(level, 0.5, size)
        traded = rng.random(size) > 0.05
        after[..., 4] *= traded * np.exp(moves)
    if kind == "rows":
        steps = np.diff(timestamp)
        hole = np.median(steps) * rng.integers(0, 200)
        timestamp[cut + 1 :] += hole
    return replace(bars, ohlcv=ohlcv, timestamp=timestamp)


def shuffled(bars: Bars, rng) -> Bars:
    """The same kind of bars in a random order: nothing at a row tells anything of the next one."""
    rows = len(bars.timestamp)
    order = rng.integers(1, rows, rows)
    before = bars.ohlcv[:, order - 1, 3:4]
    ohlcv = bars.ohlcv[:, order].copy()
    shape = ohlcv[..., :4] / before  # (A, T, 4), over the last close
    moves = np.log(shape[..., 3])
    growth = np.exp(np.cumsum(moves, 1))
    close = bars.ohlcv[:, :1, 3] * growth
    last = close / shape[..., 3]
    ohlcv[..., :4] = shape * last[..., None]
    return replace(bars, ohlcv=ohlcv)


def mirrored(bars: Bars, last: int) -> Bars:
    """Every rise up to the close of row `last` is a fall; that close and all later rows stay."""
    ohlcv = bars.ohlcv.copy()
    past = bars.ohlcv[:, : last + 1]
    pivot = past[:, -1:, 3] ** 2
    for c, mirror in enumerate(MIRROR):
        ohlcv[:, : last + 1, c] = pivot / past[..., mirror]
    return replace(bars, ohlcv=ohlcv)


def frame_of(bars: Bars) -> pd.DataFrame:
    """What a user's function gets: open .. volume by opening time; further assets: NAME_open .."""
    columns = {}
    for name, ohlcv in zip(bars.names, bars.ohlcv):
        prefix = f"{name}_" if columns else ""
        for column, values in zip(COLUMNS[1:], ohlcv.T):
            columns[prefix + column] = values.copy()
    index = utc_times(bars.timestamp.copy())
    return pd.DataFrame(columns, index=index.rename("timestamp"))


def draw(rng, start, stop) -> int:
    """A row from start on and before stop, or start."""
    return int(rng.integers(start, max(stop, start + 1)))


def row_at(bars: Bars, time) -> int:
    """The last row that opens at a time or before it."""
    time = np.datetime64(time, "ns")
    return int(np.searchsorted(bars.timestamp, time, "right")) - 1


# ----------------------------------------------------------------------------------------- targets
@dataclass
class Target:
    """call(bars, row): columns or an environment, fitted on the bars up to that row if it is given.

    fits   rows up to which it may fit; empty: it has no say, and may fit on nothing that is later
    fresh  the same call from a new import of its file
    kinds  of edits that it stands
    part   of a run directory, for the last line
    """

    name: str
    call: Callable
    fits: tuple[int, ...] = ()
    fresh: Callable | None = None
    kinds: tuple[str, ...] = tuple(EDITS)
    part: str = ""


@dataclass
class Output:
    """What a target shows of some bars, by opening time (datetime64, UTC)."""

    frames: dict[str, pd.DataFrame]  # split -> columns; one of the name "" if there are no splits
    rounding: dict[str, float]  # column -> relative rounding of its type
    fitted: dict[str, np.ndarray]
    model: object = None  # what has a transform(bars) of its own


@dataclass
class Audit:
    """What was found and what was tried."""

    args: argparse.Namespace
    findings: dict = field(default_factory=dict)  # what -> (bars ahead, size, how)
    tried: list = field(default_factory=list)
    not_judged: list = field(default_factory=list)

    def report(self, what: str, ahead, size, how: str):
        """Of several findings about one thing the farthest look ahead stays."""
        before = self.findings.get(what)
        if before is None or ahead > before[0]:
            self.findings[what] = int(ahead), float(size), how


def import_target(spec: str, fresh: bool = False):
    """The object of `module:name` or `path/to/file.py:name`. UsageError (one line)."""
    where, _, name = spec.rpartition(":")
    try:
        if where.endswith(".py"):
            function = import_file(Path(where).resolve(), fresh)
        else:
            sys.path.insert(0, str(Path.cwd()))
            function = importlib.import_module(where)
    except (Exception, SystemExit) as e:
        raise UsageError(f"{spec}: cannot import {where}: {first_line(e)}") from e
    for attribute in name.split("."):
        function = getattr(function, attribute, None)
    if not callable(function):
        raise UsageError(f"{spec}: {where} has no function {name}")
    return function


def import_file(path: Path, fresh: bool):
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    if not fresh:
        sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def user_target(spec: str, bars: Bars) -> Target:
    function = import_target(spec)
    try:
        takes_fit = "fit_until" in inspect.signature(function).parameters
    except ValueError:  # a builtin tells nothing
        takes_fit = False

    def call(bars, row, function=function):
        if not takes_fit:
            return function(frame_of(bars))
        time = pd.Timestamp(bars.timestamp[row], tz="UTC")
        return function(frame_of(bars), fit_until=time)

    def first_call(bars, row):
        return call(bars, row, import_target(spec, fresh=True))

    target = Target(spec, call)
    if takes_fit:
        rows = len(bars.timestamp)
        target.fits = tuple(int(share * rows) for share in FIT_SHARES)
    if spec.rpartition(":")[0].endswith(".py"):
        target.fresh = first_call
    return target


def attempt(name: str, function, *args):
    """quietly(), with a UsageError where the target `name` fails."""
    try:
        return quietly(function, *args)
    except UsageError:
        raise
    except Exception as e:
        raise UsageError(f"{name}: {first_line(e)}") from e


def first_line(e) -> str:
    text = (str(e).splitlines() or [""])[0]
    return f"{type(e).__name__}: {text}"[:300]


def quietly(function, *args):
    """function(*args) with the same random numbers each time, without warnings and prints."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 that is what the user's code may draw from
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(io.StringIO()):
            return function(*args)


# ------------------------------------------------------------------------------- what columns show
def output_of(target: Target, bars: Bars, row) -> Output:
    """One call: columns, (columns, fitted), {split: columns} or an object with transform(bars)."""
    result = quietly(target.call, bars, row)
    fitted, model = {}, None
    if isinstance(result, tuple) and len(result) == 2:
        result, fitted = result
    elif hasattr(result, "transform") and not isinstance(result, TABLES):
        model = fitted = result
        result = quietly(model.transform, frame_of(bars))
    splits = result if isinstance(result, dict) else {"": result}
    output = Output({}, {}, flat(fitted), model)
    for split, values in splits.items():
        frame = by_time(values, bars, target.name)
        output.frames[str(split)] = numbers_of(frame, output.rounding)
    return output


def by_time(values, bars: Bars, name: str) -> pd.DataFrame:
    """Columns by opening time; a time that stands twice is told apart by nanoseconds."""
    if isinstance(values, pd.Series):
        values = values.to_frame(values.name or "column")
    if not isinstance(values, pd.DataFrame):
        array = np.asarray(values)
        if array.ndim == 0 or array.dtype == object:
            kind = type(values).__name__
            raise UsageError(f"{name}: returned {kind}, not columns or an environment")
        values = pd.DataFrame(array.reshape(len(array), -1))
    index = values.index
    levels = map(index.get_level_values, range(index.nlevels))
    times = [level for level in levels if isinstance(level, pd.DatetimeIndex)]
    if times:
        index = times[0]
    elif "timestamp" in values:
        index = pd.DatetimeIndex(values["timestamp"])
    elif len(values) == len(bars.timestamp):
        index = pd.DatetimeIndex(bars.timestamp)
    else:
        rows = f"{len(values)} rows for {len(bars.timestamp)} bars"
        raise UsageError(f"{name}: returned {rows} without the bars' times as index")
    if index.tz is not None:
        index = index.tz_convert("UTC").tz_localize(None)
    index = index.as_unit("ns")
    times = pd.Series(index)
    twin = times.groupby(times).cumcount()
    index += pd.to_timedelta(twin.to_numpy(), "ns")
    return values.set_axis(index, axis=0).sort_index()


def numbers_of(frame: pd.DataFrame, rounding: dict) -> pd.DataFrame:
    """The columns as float64; `rounding` gets the relative rounding of each one's type."""
    columns = {}
    for k, name in enumerate(frame.columns):
        values = frame.iloc[:, k]
        kind = values.dtype
        single = pd.api.types.is_float_dtype(kind) and kind.itemsize < 8
        precision = np.float32 if single else np.float64
        rounding[str(name)] = 8 * np.finfo(precision).eps
        if pd.api.types.is_datetime64_any_dtype(kind):
            values = values.astype("int64")
        elif not pd.api.types.is_numeric_dtype(kind):
            text = values.astype(str).to_numpy(object)
            values = pd.util.hash_array(text) % 2**32
        columns[str(name)] = np.asarray(values, np.float64)
    return pd.DataFrame(columns, index=frame.index)


def flat(values, name: str = "", depth: int = 6) -> dict[str, np.ndarray]:
    """Every number in nested dicts, lists and objects, by its path."""
    if isinstance(values, str) or values is None or depth == 0:
        return {}
    if isinstance(values, TABLES):
        values = values.to_numpy()
    if isinstance(values, NUMBERS):
        with contextlib.suppress(ValueError, TypeError):
            return {name: np.asarray(values, np.float64).ravel()}
        values = dict(enumerate(values))
    if not isinstance(values, dict):
        values = getattr(values, "__dict__", {})
    numbers = {}
    for key, value in values.items():
        path = f"{name}.{key}" if name else str(key)
        numbers |= flat(value, path, depth - 1)
    return numbers


def moved(x, y, spread, level) -> np.ndarray:
    """Whether two arrays differ by more than rounding; NaN is equal to NaN."""
    unknown = np.isnan(x) & np.isnan(y)
    with np.errstate(invalid="ignore"):
        size = np.abs(x - y)
    near = size <= ROUNDING * spread + level
    return ~(near | unknown | (x == y))


# ----------------------------------------------------------------------------------------- columns
class ColumnAudit:
    """A function of bars: two calls on the same bars, edits of the future, shuffled bars."""

    def __init__(self, audit: Audit, target: Target, bars: Bars, edits: int):
        self.audit = audit
        self.target = target
        self.bars = bars
        self.edits = edits
        self.rng = np.random.default_rng(audit.args.seed)
        self.bases = self.first_calls()  # row up to which it fits, or None -> Output
        self.fit, self.base = next(iter(self.bases.items()))
        self.columns = [name for frame in self.base.frames.values() for name in frame]
        self.skip = self.columns_to_skip()

    def run(self):
        self.compare_splits()
        self.edit_the_future()
        self.edit_under_a_held_fit()
        self.call_a_new_import()
        self.shuffle()

    def first_calls(self) -> dict:
        """One call for each row up to which it may fit. UsageError if none works."""
        bases = {}
        error = None
        for fit in self.target.fits or (None,):
            try:
                bases[fit] = output_of(self.target, self.bars, fit)
            except UsageError:
                raise
            except (Exception, SystemExit) as e:
                error = e
        if not bases:
            raise UsageError(f"{self.target.name}: {first_line(error)}") from error
        return bases

    def columns_to_skip(self) -> set[str]:
        """Labels, and columns that are not the same in a second call on the same bars."""
        args = self.audit.args
        unknown = set(args.labels + args.earned) - set(self.columns)
        if unknown:
            names = ", ".join(self.columns)[:200]
            raise UsageError(f"no column {', '.join(sorted(unknown))}: there are {names}")
        again = output_of(self.target, self.bars, self.fit)
        odd = set()
        for split, frame in self.base.frames.items():
            other = again.frames[split]
            for name in frame:
                if not np.array_equal(frame[name], other[name], equal_nan=True):
                    odd.add(name)
        if odd:
            names = ", ".join(sorted(odd)[:5])
            self.audit.not_judged.append(f"{names} (random: two calls on the same bars differ)")
        if odd >= set(self.columns):
            raise UsageError(f"{self.target.name}: every column is random: nothing to judge")
        return odd | set(args.labels)

    def compare_splits(self):
        """Nothing of a split, its labels neither, may depend on a bar of a later split: purge."""
        self.start = self.fit
        frames = self.base.frames
        if len(frames) == 1:
            return
        firsts = {}
        for split, frame in frames.items():
            firsts[split] = row_at(self.bars, frame.index[0])
        train = min(firsts, key=firsts.get)
        last = frames[train].index[-1]
        self.start = max(row_at(self.bars, last), self.fit or 0)
        self.bases = {self.fit: self.base}
        for border in sorted(firsts.values())[1:]:
            cut = border - 1
            earlier = {name: x for name, x in frames.items() if firsts[name] <= cut}
            before = replace(self.base, frames=earlier)
            for kind in ("rows", "prices"):
                after = self.show(cut, kind, self.fit)
                self.compare(before, after, cut, kind, skip=(), whole=True)
        self.audit.tried.append(f"{len(firsts)} splits, labels too")

    def kinds(self) -> list[str]:
        """Of edits; a split's share of the rows moves with their number."""
        kinds = list(self.target.kinds)
        if len(self.base.frames) > 1 and "length" in kinds:
            kinds.remove("length")
        return kinds

    def show(self, cut, kind, fit, target=None) -> Output:
        bars = edited(self.bars, cut, kind, self.rng)
        return output_of(target or self.target, bars, fit)

    def edit_the_future(self):
        counts = dict.fromkeys(self.kinds(), 0)
        failures = []
        edits = self.edits // len(self.bases)
        for fit, base in self.bases.items():
            start = self.start if len(self.bases) == 1 else fit
            for cut, kind in self.plan(start, edits):
                try:
                    after = self.show(cut, kind, fit)
                except Exception as e:  # too few bars for it, or bars that it refuses
                    failures.append(first_line(e))
                    continue
                counts[kind] += 1
                self.compare(base, after, cut, kind, self.skip)
                if fit is not None:
                    ahead = cut + 1 - fit
                    compare_fitted(self.audit, base.fitted, after.fitted, ahead, kind)
        if not any(counts.values()):
            raise UsageError(f"{self.target.name}: fails on edited bars: {failures[0]}")
        for kind, count in counts.items():
            if not count:
                self.audit.not_judged.append(f"edits of {kind} (it fails: {failures[0]})")
        done = ", ".join(f"{kind} {count}" for kind, count in counts.items())
        rows = len(self.bars.timestamp)
        columns = f"{self.target.part}{len(self.columns)} columns"
        self.audit.tried.append(f"{columns} of {rows} bars, edits: {done}")

    def plan(self, start, edits: int) -> list[tuple[int, str]]:
        """(row after which the future is edited, kind of edit), about `edits` of them.

        Leaks that show at few rows need edits there: in the warm-up, at silent bars, before holes,
        and right after the last row that was fitted on.
        """
        last = len(self.bars.timestamp) - 2
        if start is None:
            first = 0
            warm_up = np.geomspace(1, last // 10, edits // 6 + 1)
            special = warm_up.astype(int).tolist()
        else:
            first = min(start, last)
            special = [first] * (edits // 4 + 1)
        steps = np.diff(self.bars.timestamp)
        hole = steps > 1.5 * np.median(steps)
        silent = self.bars.ohlcv[0, :-1, 4] == 0
        odd = (hole | silent)[first:last]
        rows = first + np.flatnonzero(odd)
        rows = self.rng.permutation(rows)
        special += rows[: edits // 5].tolist()
        plan = [(cut, "rows") for cut in special]
        kinds = self.kinds()
        others = max(edits - len(special), len(kinds))
        edges = np.linspace(first, last + 1, others + 1)
        for k in range(others):
            cut = draw(self.rng, edges[k], edges[k + 1])
            kind = kinds[k % len(kinds)]
            plan.append((min(cut, last), kind))
        return plan

    def compare(self, before, after, cut, kind, skip, whole=False):
        """Report every column that an edit after row `cut` changed at rows up to it.

        whole: all rows of these frames, whatever their times.
        """
        times = np.append(self.bars.timestamp, LATER)
        end = times[cut + 1]
        for split, everything in before.frames.items():
            old = everything
            new = after.frames.get(split, everything[:0])
            if not whole:
                old = old[old.index < end]
                new = new[new.index < end]
            self.compare_rows(split, old, new, cut, kind)
            names = []
            for name in old:
                if name in new:
                    names.append(name)
                elif name not in skip:
                    how = f"there is no such column when {EDITS[kind]}"
                    what = column(split, name)
                    self.audit.report(what, cut + 1, np.inf, how)
            both = old.index.intersection(new.index)
            x = old.loc[both, names].to_numpy()
            y = new.loc[both, names].to_numpy()
            finite = np.ma.masked_invalid(everything[names].to_numpy())
            spread = finite.std(0).filled(0.0)
            level = np.abs(finite).max(0).filled(0.0)
            rounding = np.array([before.rounding[name] for name in names])
            changed = moved(x, y, spread, rounding * level)
            for k in np.flatnonzero(changed.any(0)):
                if names[k] in skip:
                    continue
                rows = changed[:, k]
                unit = spread[k] or level[k] or 1.0
                gap = x[rows, k] - y[rows, k]
                # a number that comes or goes is the largest change there is
                size = np.nan_to_num(np.abs(gap), nan=np.inf).max()
                time = both[rows.argmax()]
                what = column(split, names[k])
                how = f"changes when {EDITS[kind]}"
                self.report_row(what, time, cut, size / unit, how)

    def compare_rows(self, split, old, new, cut, kind):
        """Rows that come or go, those within a hole aside; labels may take the last ones away."""
        missing = old.index.symmetric_difference(new.index)
        past = self.bars.timestamp[: cut + 1]
        missing = missing[np.isin(missing, past)]
        if len(missing) and not self.audit.args.labels:
            what = column(split, old.columns[0])
            how = f"comes or goes when {EDITS[kind]}"
            self.report_row(what, missing[0], cut, np.inf, how)

    def report_row(self, what, time, cut, size, how):
        ahead = cut + 1 - row_at(self.bars, time)
        when = time.strftime("%Y-%m-%d %H:%M")
        self.audit.report(what, max(ahead, 1), size, f"row {when} {how}")

    def edit_under_a_held_fit(self):
        """A model that has its own transform() is held to every row, those of its fit too."""
        model = self.base.model
        if model is None:
            return

        def transform(bars, _):
            return model.transform(frame_of(bars))

        held = Target(self.target.name, transform)
        base = output_of(held, self.bars, None)
        count = 0
        for cut, kind in self.plan(None, self.edits):
            with contextlib.suppress(UsageError):  # too few bars for it
                after = attempt(self.target.name, self.show, cut, kind, None, held)
                self.compare(base, after, cut, kind, self.skip)
                count += 1
        if count:
            self.audit.tried.append(f"transform() alone, {count} edits")
        else:
            self.audit.not_judged.append("transform() alone (it fails on edited bars)")

    def call_a_new_import(self):
        """What a module fitted at its first call and keeps shows only in a new import."""
        if self.target.fresh is None:
            return
        target = replace(self.target, call=self.target.fresh)
        cut = self.start or len(self.bars.timestamp) // 2
        try:
            after = attempt(self.target.name, self.show, cut, "rows", self.fit, target)
        except UsageError as e:
            self.audit.not_judged.append(f"a new import ({e})")
            return
        self.compare(self.base, after, cut, "rows", self.skip)

    def shuffle(self):
        """On bars in a random order no column tells the next one: if it does, it has seen it.

        This is how smoothing within the train rows shows, which edits after them cannot move. And
        nobody earns anything there, but who trades on the bar that he is filled at.
        """
        bars = shuffled(self.bars, self.rng)
        try:
            frames = output_of(self.target, bars, self.fit).frames
        except Exception as e:
            self.audit.not_judged.append(f"shuffled bars ({first_line(e)})")
            return
        following = next_bar(bars)
        border = bars.timestamp[self.start or 0]
        for split, frame in frames.items():
            for early in (True, False):
                part = frame[(frame.index <= border) == early]
                rows = np.searchsorted(bars.timestamp, part.index, "right") - 1
                for name in part.columns.difference([*self.skip], sort=False):
                    z, what = rank_z(part[name].to_numpy(), following.iloc[rows])
                    if z > Z:
                        how = f"on shuffled bars it knows the next {what}, {z:.0f} standard errors"
                        how += ", in the rows of the fit" * (early and bool(self.start))
                        size = z / np.sqrt(len(part))
                        self.audit.report(column(split, name), 1, size, how)
            self.compare_earnings(split, frame)
        self.audit.tried.append("next bar of shuffled bars")

    def compare_earnings(self, split, frame):
        for name in self.audit.args.earned:
            x = frame[name].dropna().to_numpy()
            mean = x.mean() / (x.std() or 1.0)
            z = mean * np.sqrt(len(x))
            if z > Z:
                how = f"it earns on shuffled bars, {z:.0f} standard errors: a fill at a known price"
                self.audit.report(column(split, name), 1, mean, how)


def column(split: str, name: str) -> str:
    return f"column '{name}'" + (f" of {split}" if split else "")


def compare_fitted(audit, before: dict, after: dict, ahead, kind, rtol=ROUNDING):
    """Report fitted parameters that an edit after the last row of the fit changed."""
    for name in before | after:
        what = f"fitted parameter '{name}'"
        how = f"it changes when {EDITS[kind]}, after the last row to fit on"
        old = before.get(name)
        new = after.get(name)
        if old is None or new is None or old.shape != new.shape:
            audit.report(what, ahead, np.inf, how)
        elif not np.allclose(old, new, rtol, 1e-12, equal_nan=True):
            level = np.nanmax(np.abs(old)) or 1.0
            gap = np.nanmax(np.abs(old - new))
            audit.report(what, ahead, gap / level, how)


def next_bar(bars: Bars) -> pd.DataFrame:
    """What can be known of the next bar, NaN in the last row."""
    _, high, low, close, volume = bars.ohlcv[0].T
    move = np.diff(np.log(close), prepend=np.nan)
    parts = {
        "return": move,
        "size of the return": np.abs(move),
        "range": np.log(high / low),
        "volume": volume,
    }
    return pd.DataFrame(parts).shift(-1)


def rank_z(values, following: pd.DataFrame) -> tuple[float, str]:
    """Largest |rank correlation| in standard errors, of the column or its changes; with what."""
    from scipy.stats import rankdata

    best = 0.0, ""
    complete = following.notna().all(axis=1).to_numpy()
    changes = np.diff(values, prepend=np.nan)
    for x in (values, changes):
        both = np.isfinite(x) & complete
        count = both.sum()
        if count < FEW or np.ptp(x[both]) == 0:
            continue
        a = rankdata(x[both])
        b = rankdata(following[both], axis=0)
        a -= a.mean()
        b -= b.mean(0)
        size = np.linalg.norm(a) * np.linalg.norm(b, axis=0)
        size = np.maximum(size, 1.0)
        rho = np.abs(a @ b) / size
        k = int(rho.argmax())
        # without a relation rho has a standard error of 1 / sqrt(count)
        z = float(rho[k] * np.sqrt(count))
        best = max(best, (z, following.columns[k]))
    return best


# ------------------------------------------------------------------------------------- environments
@dataclass
class Walk:
    obs: np.ndarray  # (n + 1, d) float64; without the last one where the episode ended
    rewards: np.ndarray  # (n,)


@dataclass
class First:
    """What an edit of the bars after `cut` changed first; None: nothing."""

    cut: int
    step: int | None  # of the observation
    reward: int | None
    which: str  # number of the observation


def is_env(x) -> bool:
    return all(hasattr(x, name) for name in ("reset", "step", "action_space"))


def flat_obs(obs, lane: bool, name: str = "") -> dict[str, np.ndarray]:
    """{part of the observation: its numbers}; of a batched environment those of lane 0."""
    if isinstance(obs, tuple):
        obs = {str(k): x for k, x in enumerate(obs)}
    if isinstance(obs, dict):
        numbers = {}
        for key, x in obs.items():
            numbers |= flat_obs(x, lane, name + key)
        return numbers
    array = np.asarray(obs, np.float64)
    return {name: np.ravel(array[0] if lane else array)}


def extremes(space) -> tuple:
    """Two actions that are as different as the space allows."""
    import gymnasium as gym

    if isinstance(space, gym.spaces.Box):
        low, high = space.low.copy(), space.high.copy()
        low[~np.isfinite(low)] = -1.0
        high[~np.isfinite(high)] = 1.0
        return low, high
    if isinstance(space, gym.spaces.Discrete):
        return space.start, space.start + space.n - 1
    if isinstance(space, gym.spaces.MultiDiscrete):
        return space.start.copy(), space.start + space.nvec - 1
    raise UsageError(f"action space {type(space).__name__}: must be Box, Discrete or MultiDiscrete")


def common_part(a, b) -> tuple:
    """Two arrays up to the length of the shorter one."""
    n = min(len(a), len(b))
    return a[:n], b[:n]


class EnvAudit:
    """A factory of environments: what observations and rewards depend on, what an action earns.

    Every episode has the same seed and the same random actions, over bars that are edited.
    """

    def __init__(self, audit: Audit, target: Target, bars: Bars):
        self.audit = audit
        self.target = target
        self.rng = np.random.default_rng(audit.args.seed)
        self.bars = shuffled(bars, self.rng)
        self.rows = len(bars.timestamp)
        self.fit = target.fits[0] if target.fits else None
        self.names = []
        self.walk_twice()

    def walk_twice(self):
        """The episodes; numbers that two episodes of one seed do not share are random."""
        env = self.build(self.bars)
        steps = self.audit.args.steps
        self.lane = hasattr(env, "num_envs")
        env.action_space.seed(0)
        self.actions = []
        for _ in range(steps + PAYOFF):
            self.actions.append(env.action_space.sample())
        self.ends = extremes(env.action_space)
        self.base = [self.walk(env, seed, steps) for seed in range(SEEDS)]
        everything = np.concatenate([walk.obs for walk in self.base])
        self.spread = everything.std(0)
        self.random = np.zeros(len(self.names), bool)
        self.of_bars = self.random.copy()  # numbers that an edit of the bars has changed
        self.random_reward = False
        env = self.build(self.bars)
        for seed, base in enumerate(self.base):
            again = self.walk(env, seed, steps)
            a, b = common_part(base.obs, again.obs)
            self.random |= self.changed(a, b).any(0)
            a, b = common_part(base.rewards, again.rewards)
            self.random_reward |= not np.allclose(a, b)
        odd = [name for name, random in zip(self.names, self.random) if random]
        if self.random_reward:
            odd.append("the reward")
        if odd:
            names = ", ".join(odd[:5])
            self.audit.not_judged.append(f"{names} (random: two episodes of one seed differ)")
        if self.random.all():
            raise UsageError(f"{self.target.name}: every observation is random: nothing to judge")

    def build(self, bars):
        return attempt(self.target.name, self.target.call, bars, self.fit)

    def edit(self, cut):
        return self.build(edited(self.bars, cut, "rows", self.rng))

    def walk(self, env, seed, steps, flip=None, end=0) -> Walk:
        """An episode; flip: a step that takes the extreme action `end` instead of its own."""
        return attempt(self.target.name, self.walk_aloud, env, seed, steps, flip, end)

    def walk_aloud(self, env, seed, steps, flip, end):
        obs, _ = env.reset(seed=seed)
        parts = flat_obs(obs, self.lane)
        if not self.names:
            for part_name, x in parts.items():
                self.names += [f"{part_name}[{k}]" for k in range(len(x))]
        obs_so_far = [np.concatenate([*parts.values()])]
        rewards = []
        for k in range(steps):
            action = self.ends[end] if k == flip else self.actions[k]
            obs, reward, terminated, truncated, _ = env.step(action)
            ended = terminated | truncated
            if self.lane:
                reward, ended = reward[0], ended[0]
            rewards.append(float(reward))
            if ended:
                break  # what is shown now may be the next episode
            parts = flat_obs(obs, self.lane)
            obs_so_far.append(np.concatenate([*parts.values()]))
        return Walk(np.array(obs_so_far), np.array(rewards))

    def changed(self, x, y) -> np.ndarray:
        """(n, d) bool: more than the rounding of float32, random numbers aside."""
        level = 1e-6 * np.abs(x).max(0)
        return moved(x, y, self.spread, level) & ~self.random

    def first(self, cut, seed, other: Walk) -> First:
        base = self.base[seed]
        a, b = common_part(base.obs, other.obs)
        changed = self.changed(a, b)
        first = First(cut, None, None, "")
        self.of_bars |= changed.any(0)
        if changed.any():
            first.step = int(changed.any(1).argmax())
            first.which = self.names[changed[first.step].argmax()]
        a, b = common_part(base.rewards, other.rewards)
        spread = base.rewards.std()
        changed = moved(a, b, spread, 1e-9 * np.abs(a))
        if changed.any() and not self.random_reward:
            first.reward = int(changed.argmax())
        return first

    def run(self):
        pairs = []  # (seed, cut, step whose observation shows a bar after the cut)
        count = 0
        for seed, base in enumerate(self.base):
            firsts = []
            for cut in self.cuts(seed):
                other = self.walk(self.edit(cut), seed, len(base.rewards))
                firsts.append(self.first(cut, seed, other))
            self.observations_advance(seed, firsts)
            self.rewards_are_known(seed, firsts)
            last = len(base.rewards) - 1
            count += len(firsts)
            for first in firsts:
                if first.step is not None and first.step < last:
                    pairs.append((seed, first.cut, first.step))
        steps = sum(len(walk.rewards) for walk in self.base)
        if not pairs:
            why = "more --steps, or the environment does not read the bars"
            raise UsageError(f"{self.target.name}: no edit reached one of {steps} steps: {why}")
        self.audit.tried.append(f"{SEEDS} episodes, {steps} steps, edits: rows {count}")
        if not self.audit.findings:
            self.actions_earn_what_comes(pairs)
        self.length_tells_nothing()

    def cuts(self, seed) -> list[int]:
        """Rows after which to edit: around the bars that the episode walks over, and far behind.

        The newest bar of the first observation is found by bisection.
        """
        base = self.base[seed]
        low = self.fit or 0
        # rows: an edit after the first is in the observation, an edit after the other is not
        shows = low - 1
        hides = self.rows - 1
        while hides - shows > 1:
            middle = (shows + hides) // 2
            env = self.edit(middle)
            other = self.walk(env, seed, 0)
            if self.changed(base.obs[:1], other.obs).any():
                shows = middle
            else:
                hides = middle
        end = min(hides + len(base.rewards), self.rows - 1)
        edges = np.linspace(hides, end, CUTS + 1)
        far_behind = (end + self.rows) // 2
        cuts = [shows, shows + 1, far_behind, self.rows - 2]
        for k in range(CUTS):
            cuts.append(draw(self.rng, edges[k], edges[k + 1]))
        inside = np.clip(cuts, low, self.rows - 2)
        return np.unique(inside).tolist()

    def observations_advance(self, seed, firsts):
        """An observation that shows bar c shows bar c + m at most m steps later, and the file is
        long enough for the steps that follow: else it has shown bar c too early."""
        last = len(self.base[seed].obs) - 2  # the last one may repeat the one before
        for first in firsts:
            if first.step is None:
                continue
            bar = first.cut + 1
            what = f"observation '{first.which}'"
            early = bar + (last - first.step) - (self.rows - 1)
            if early > 0:
                how = f"at step {first.step} of {last + 1} it depends on bar {bar} of {self.rows}"
                self.audit.report(what, early, 1.0, how)
            for later in firsts:
                due = first.step + later.cut - first.cut + SLACK
                then = last if later.step is None else later.step
                if later.cut <= first.cut or due > last or then <= due:
                    continue
                if not self.shows(seed, later.cut, due):
                    how = f"at step {first.step} it depends on bar {bar}, "
                    how += f"but at step {due} not on bar {later.cut + 1}"
                    self.audit.report(what, then - due + SLACK, 1.0, how)

    def shows(self, seed, cut, step) -> bool:
        """Whether an observation up to `step` depends on a bar after `cut`, asked several times."""
        for _ in range(AGAIN):
            other = self.walk(self.edit(cut), seed, step)
            if self.first(cut, seed, other).step is not None:
                return True
        return False

    def rewards_are_known(self, seed, firsts):
        """What a reward depends on is in the observation that comes with it, or one bar later."""
        last = len(self.base[seed].obs) - 2
        for first in firsts:
            if first.reward is None:
                continue
            due = first.reward + 2
            then = last if first.step is None else first.step
            if then > due and due <= last and not self.shows(seed, first.cut, due):
                how = f"at step {first.reward} it depends on bar {first.cut + 1}, "
                how += "which no observation shows by then"
                self.audit.report("reward", then - due + 1, 1.0, how)

    def payoffs(self, bars, pairs) -> list[float]:
        """What the rewards gain by one extreme action instead of the other, at each pair's step."""
        env = self.build(bars)
        gains = []
        for seed, _, step in pairs:
            low, high = (self.walk(env, seed, step + PAYOFF, step, end) for end in (0, 1))
            a, b = common_part(low.rewards, high.rewards)
            gains.append((b[step:] - a[step:]).sum())
        return gains

    def kept_by_mirror(self, pairs, back=0) -> float | None:
        """Cosine between payoffs and those after every bar up to the shown one is mirrored.

        1: nothing that was shown is earned; -1: nothing else is. None: actions earn nothing.
        """
        before = []
        after = []
        for cut in {cut for _, cut, _ in pairs}:
            some = [pair for pair in pairs if pair[1] == cut]
            last = max(cut + 1 - back, 0)
            bars = mirrored(self.bars, last)
            before += self.payoffs(self.bars, some)
            after += self.payoffs(bars, some)
        size = np.linalg.norm(before) * np.linalg.norm(after)
        if not size > 0:
            return None
        return float(np.dot(before, after) / size)

    def actions_earn_what_comes(self, pairs):
        """A policy that trades on the sign of a bar that it sees must not earn this bar."""
        pairs = sorted(pairs, key=lambda pair: pair[2])[:ACTIONS]  # near the start: fewer steps
        kept = None if self.random_reward else self.kept_by_mirror(pairs)
        if kept is None:
            self.audit.not_judged.append("same-bar fills (an action changes no reward)")
            return
        self.audit.tried.append(f"{len(pairs)} actions with the bars that they saw mirrored")
        if kept < 0.5:
            back = 1
            while back < FAR and self.kept_by_mirror(pairs, back) < 0.5:
                back += 1
            share = (1 - kept) / 2
            how = f"an action earns a bar that its observation shows ({share:.0%} of what it earns)"
            self.audit.report("reward", back, share, how)

    def length_tells_nothing(self):
        """A shorter file gives the same episode, unless it begins elsewhere."""
        base = self.base[0]
        compared = False
        for share in (0.95, 0.9, 0.8):
            rows = int(share * self.rows)
            try:
                env = self.build(some_rows(self.bars, slice(0, rows)))
                other = self.walk(env, 0, len(base.rewards))
            except UsageError:  # too few bars for it
                continue
            a, b = common_part(base.obs[:-2], other.obs[:-2])
            if len(a) < 2:
                continue
            changed = self.changed(a, b).any(0)
            if changed[self.of_bars].mean() > 0.5:
                continue  # another first row
            compared = True
            for k in np.flatnonzero(changed):
                what = f"observation '{self.names[k]}'"
                self.audit.report(what, self.rows - rows, 1.0, "it tells how long the file is")
        if compared:
            self.audit.tried.append("shorter files")
        else:
            why = "a shorter file is refused or begins elsewhere"
            self.audit.not_judged.append(f"edits of length ({why})")


# ---------------------------------------------------------------------------------- run directories
def audit_run(audit: Audit, folder: Path):
    """Columns as the script fits them, parameters of the checkpoint, splits, the environment."""
    from common.timeout_guard import find_last, load_checkpoint

    flags = folder / "args.json"
    if not flags.exists():
        raise UsageError(f"{folder}: holds no args.json: give a run directory, or module:function")
    path = folder / "checkpoints" / "best.pt"
    if not path.exists():
        path = find_last(folder)
    if path is None:
        raise UsageError(f"{folder}: holds no checkpoint")
    state = load_checkpoint(path)
    audits = {"tqc_film_batch": audit_tqc, "dqn_forex_subproc": audit_dqn}
    name = state.get("script")
    if name not in audits:
        raise UsageError(f"{folder}: a run of {name}: only {', '.join(audits)} have bars")
    script = importlib.import_module(f"cleanrl_crypto.{name}")
    try:
        args = args_of(script.Args, json.loads(flags.read_text()))
    except ValueError as e:  # no JSON, or the flags of another version
        raise UsageError(f"{flags}: {e}") from e
    with one_thread():
        audits[name](audit, script, args, state)


@contextlib.contextmanager
def one_thread():
    """A kernel of few lanes on several threads mostly waits for them."""
    import numba

    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        yield
    finally:
        numba.set_num_threads(threads)


def check_data(flags, sha256, in_checkpoint):
    if sha256 != in_checkpoint:
        raise UsageError(f"--data {flags.data}: has changed since the run read it (its sha256)")


def check_stored(audit, stored: dict, refitted: dict):
    """The parameters of a checkpoint are those that its train rows give.

    What is iterated (HMM, lasso) or chosen by it may depend on the version: it is said, no more.
    """
    changed = Audit(audit.args)
    stored = flat(stored)
    compare_fitted(changed, stored, flat(refitted), 1, "rows", rtol=1e-3)
    others = []
    for what, (_, size, _) in changed.findings.items():
        if any(name in what for name in ("center", "scale", "asset")):
            audit.report(f"{what} of the checkpoint", 1, size, "the train rows give another value")
        else:
            others.append(what.split("'")[1])
    if others:
        names = ", ".join(others[:5])
        audit.not_judged.append(f"{names} (a new fit differs: another version of the code?)")
    audit.tried.append(f"{len(stored)} stored parameters against a new fit")


def check_purge(audit, rows: dict, window: int, name: str):
    """rows {split: (start, stop)} of decisions; row t earns bar t + 1 and sees `window` bars."""
    for before, after in (("train", "eval"), ("eval", "test")):
        newest_earned = rows[before][1]
        oldest_shown = rows[after][0] - window + 1
        if oldest_shown <= newest_earned:
            how = f"its first window holds bars that {before} earned"
            ahead = newest_earned - oldest_shown + 1
            audit.report(f"split '{after}' of {name}", ahead, 1.0, how)
    audit.tried.append(f"purge of {name}")


def audit_tqc(audit, tqc, flags, state):
    from common.features import FeatureModel

    bars = load_bars(flags.data, flags.fill_limit)
    check_data(flags, bars.sha256, state["data"]["sha256"])
    model = FeatureModel.from_state_dict(state["features"])

    # the script's own code, with bars that it did not read from a file
    def load(bars, features=None, forecast=False):
        other = replace(flags, forecast=forecast)
        with patch.object(tqc, "load_bars", lambda *_: bars):
            return tqc.load_market(other, features)

    def refit(bars, _):
        market = load(bars, None, flags.forecast)
        features = market.features
        frame = pd.DataFrame(market.table, columns=features.columns)
        frame["forecast"] = market.forecast
        return frame, features.state_dict()

    def transform(bars, _):
        values = model.transform(bars)
        return pd.DataFrame(values, columns=model.columns)

    def environment(bars, _):
        market = load(bars, model)
        one = replace(flags, num_envs=1)
        return tqc.MarketVectorEnv(market, market.rows["test"], one)

    market = quietly(load, bars, None, flags.forecast)
    check_stored(audit, state["features"], market.features.state_dict())
    check_purge(audit, market.rows, flags.window, bars.names[0])
    held = Target("columns", transform, part="with the fit held ")
    ColumnAudit(audit, held, bars, 24).run()
    fits = (market.rows["train"][1],)  # the bar that the last train decision earns
    kinds = ("rows", "prices", "volumes")  # the split's shares move with the length
    fitted = Target("columns", refit, fits, kinds=kinds, part="fitted again ")
    ColumnAudit(audit, fitted, bars, 6).run()
    target = Target("environment", environment)
    EnvAudit(audit, target, replace(bars, truth=None)).run()


def audit_dqn(audit, dqn, flags, state):
    if flags.env_fn:
        raise UsageError("a run of --env-fn has no bars: give its factory as TARGET")
    series = dqn.load_series(flags)
    hashes = [bars.sha256 for bars in series.values()]
    check_data(flags, hashes, list(state["data"]["sha256"]))
    stored = state["config"]["models"]
    pairs = quietly(dqn.load_pairs, flags)
    check_stored(audit, stored, pairs.models)

    def columns(bars, row, name):
        if row is None:
            model, values = dqn.fit(flags, bars, None, stored[name])
        else:  # fitted again, up to that row
            model, values = dqn.fit(flags, bars, row + 1, None)
        frame = pd.DataFrame(values, columns=model.columns)
        return frame, model.state_dict()

    for k, (name, bars) in enumerate(series.items()):
        # rows of all pairs stand in one table: a pair's own begin at its first
        rows = {}
        for split, of_pairs in pairs.rows.items():
            rows[split] = of_pairs[k] - pairs.first[k]
        check_purge(audit, rows, 1, name)
        call = partial(columns, name=name)
        held = Target(name, call, part=f"{name} with the fit held ")
        ColumnAudit(audit, held, bars, 16).run()
        stop = int(rows["train"][1])
        fits = (stop - 1,)
        fitted = replace(held, fits=fits, part=f"{name} fitted again ")
        ColumnAudit(audit, fitted, bars, 8).run()

    first = next(iter(series))

    def environment(bars, _):
        edited_series = series | {first: bars}
        with patch.object(dqn, "load_series", lambda _: edited_series):
            loaded = dqn.load_pairs(flags, stored)
        rules = {name: getattr(flags, name) for name in dqn.RULES}
        lanes = len(series)
        return dqn.ForexVectorEnv(loaded, "test", lanes, vec_mode="single", **rules)

    target = Target("environment", environment)
    EnvAudit(audit, target, series[first]).run()


# ------------------------------------------------------------------------------------------ verdict
def verdict(audit: Audit) -> str:
    """The last line."""
    rest = f"; not judged: {'; '.join(audit.not_judged)}" if audit.not_judged else ""
    if not audit.findings:
        return f"no leak found in {'; '.join(audit.tried)}{rest}"
    what, (ahead, size, how) = next(iter(audit.findings.items()))
    bars = "1 bar" if ahead == 1 else f"{ahead} bars"
    text = f", size {size:.2g}" if np.isfinite(size) else ""
    more = len(audit.findings) - 1
    others = f"; {more} more" if more else ""
    return f"leak: {what}, {bars} ahead{text}: {how}{others}{rest}"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message)


def parse(argv):
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    add = parser.add_argument
    add("target", metavar="TARGET", help="module:function, file.py:function or a run directory")
    add("--data", help="bars: files or synthetic:MARKET (default: noise with holes)")
    add("--bars", type=int, help="use the last N of --data (default: %(default)s)")
    add("--edits", type=int, help="edits of the future (default: %(default)s)")
    add("--steps", type=int, help="steps of an episode (default: %(default)s)")
    add("--labels", nargs="+", help="columns that may look ahead: what is forecast")
    add("--earned", nargs="+", help="columns of what a backtest earned in each bar")
    add("--seed", type=int, default=1, help="of the bars and the edits (default: %(default)s)")
    parser.set_defaults(**DEFAULTS)
    args = parser.parse_args(argv)
    if args.data is None and args.bars != DEFAULTS["bars"]:
        raise UsageError("--bars needs --data")
    for name, least in {"bars": 200, "edits": 4, "steps": 10, "seed": 0}.items():
        value = getattr(args, name)
        if value < least:
            raise UsageError(f"--{name} {value}: must be {least} or more")
    return args


def refuse_idle(args, kind: str):
    """UsageError for a flag that says nothing of this kind of target."""
    for name in IDLE[kind]:
        if getattr(args, name) != DEFAULTS.get(name):
            raise UsageError(f"--{name}: says nothing of {kind}")


def read_bars(args) -> Bars:
    if args.data is None:
        bars = load_bars(f"{OWN_BARS}&seed={args.seed}")
        return rough(bars, np.random.default_rng(args.seed))
    bars = replace(load_bars(args.data), truth=None)
    return some_rows(bars, slice(-args.bars, None))


def makes_env(target: Target, bars: Bars) -> bool:
    fit = target.fits[0] if target.fits else None
    try:
        return is_env(quietly(target.call, bars, fit))
    except (Exception, SystemExit):
        return False  # ColumnAudit tries other rows, and says why it fails


def main(argv=None) -> dict:
    args = parse(argv)
    audit = Audit(args)
    if Path(args.target).is_dir():
        refuse_idle(args, "a run directory")
        audit_run(audit, Path(args.target))
    elif ":" not in args.target:
        raise UsageError(f"{args.target}: no run directory, and no module:function")
    else:
        bars = read_bars(args)
        target = user_target(args.target, bars)
        if makes_env(target, bars):
            refuse_idle(args, "an environment")
            EnvAudit(audit, target, bars).run()
        else:
            refuse_idle(args, "a function that returns columns")
            ColumnAudit(audit, target, bars, args.edits).run()
    if len(audit.findings) > 1:
        for what, (ahead, size, how) in audit.findings.items():
            print(f"{what:<32} {ahead:>5} bars ahead, size {size:<7.2g} {how}")
    print(verdict(audit))
    return {"exit_code": int(bool(audit.findings)), "findings": audit.findings}


if __name__ == "__main__":
    exit_with(main)
