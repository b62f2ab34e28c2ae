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
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.data import COLUMNS, Bars, iso, load_bars, utc_times  # noqa: E402
from common.run import UsageError, exit_with  # noqa: E402

OWN_BARS = "synthetic:noise?bars=1500"  # with holes and silent bars, see rough()
EDITS = {
    "rows": "later rows are edited",
    "length": "later rows are missing",
    "prices": "later prices are edited",
    "volumes": "later volumes are edited",
}
KINDS = tuple(EDITS)
FIT_SHARES = (0.4, 0.6, 0.8)  # of the bars: the values of fit_until that are tried
ROUNDING = 1e-6  # of a column's spread: a smaller difference is rounding
Z = 7.0  # standard errors of a rank correlation that chance does not reach in a few hundred tests
FEW = 100  # rows that a rank correlation needs

SEEDS = 3  # episodes that are walked
STEPS = 300  # of an episode, at most
PAYOFF = 32  # steps over which the rewards of one action are added up
CUTS = 8  # bars of each episode after which the future is edited
AGAIN = 6  # other edits of the same bars, before it is said that an observation did not change
SLACK = 3  # bars by which an observation may show a new bar late


# ------------------------------------------------------------------------------------------- bars
def rough(bars: Bars, rng) -> Bars:
    """Bars with holes in time and with bars in which nothing was traded, as real ones have."""
    rows = len(bars.timestamp)
    keep = np.ones(rows, bool)
    for start in rng.integers(20, rows - 20, rows // 120):
        keep[start : start + rng.integers(1, 6)] = False
    ohlcv = bars.ohlcv.copy()
    silent = rng.integers(20, rows - 20, rows // 50)
    ohlcv[:, silent, :4] = ohlcv[:, silent - 1, 3:4]
    ohlcv[:, silent, 4] = 0.0
    return replace(part(bars, np.flatnonzero(keep), ohlcv), truth=None)


def part(bars: Bars, rows, ohlcv=None) -> Bars:
    """Some rows of bars; `ohlcv` (A, T, 5) instead of their own."""
    ohlcv = bars.ohlcv if ohlcv is None else ohlcv
    cut = {"timestamp": bars.timestamp[rows], "filled": bars.filled[:, rows]}
    return replace(bars, ohlcv=ohlcv[:, rows], **cut)


def edited(bars: Bars, cut: int, kind: str, rng) -> Bars:
    """Bars whose rows after `cut` are others that are valid too, or are not there."""
    if kind == "length":
        return part(bars, slice(0, cut + 1))
    ohlcv = bars.ohlcv.copy()
    timestamp = bars.timestamp.copy()
    after = ohlcv[:, cut + 1 :]
    if kind in ("rows", "prices"):
        wild = rng.normal(0, rng.choice([0.003, 0.03, 0.3]), after.shape[:2] + (4,))
        level = rng.normal(0, rng.choice([0.0, 0.3, 1.0]))
        prices = after[..., :4] * np.exp(wild + level)
        after[..., :4] = prices
        after[..., 1] = prices.max(-1)
        after[..., 2] = prices.min(-1)
    if kind in ("rows", "volumes"):
        after[..., 4] *= np.exp(rng.normal(0, 0.5, after.shape[:2]) + rng.normal(0, 1.0))
        after[..., 4] *= rng.random(after.shape[:2]) > 0.05
    if kind == "rows":
        timestamp[cut + 1 :] += np.median(np.diff(timestamp)) * rng.integers(0, 200)
    return replace(bars, ohlcv=ohlcv, timestamp=timestamp)


def shuffled(bars: Bars, rng) -> Bars:
    """The same kind of bars in a random order: nothing at a row tells anything of the next one."""
    rows = len(bars.timestamp)
    before = np.concatenate([bars.ohlcv[:, :1, 0], bars.ohlcv[:, :-1, 3]], 1)  # (A, T)
    shape = bars.ohlcv[..., :4] / before[..., None]
    order = rng.integers(1, rows, rows)
    shape = shape[:, order]
    close = bars.ohlcv[:, :1, 3] * np.exp(np.cumsum(np.log(shape[..., 3]), 1))
    ohlcv = bars.ohlcv[:, order].copy()
    ohlcv[..., :4] = shape * (close / shape[..., 3])[..., None]
    return replace(bars, ohlcv=ohlcv)


def mirrored(bars: Bars, last: int) -> Bars:
    """Every rise up to the close of row `last` is a fall; that close and all later rows stay."""
    ohlcv = bars.ohlcv.copy()
    past = ohlcv[:, : last + 1, :4]
    pivot = past[:, -1:, 3:4] ** 2
    ohlcv[:, : last + 1, :4] = pivot / past[..., [0, 2, 1, 3]]
    return replace(bars, ohlcv=ohlcv)


def frame_of(bars: Bars) -> pd.DataFrame:
    """What a user's function gets: open .. volume by opening time; of further assets NAME_open .."""
    index = utc_times(bars.timestamp.copy()).rename("timestamp")
    parts = {}
    for name, ohlcv in zip(bars.names, bars.ohlcv):
        prefix = f"{name}_" if parts else ""
        parts |= {prefix + column: ohlcv[:, c].copy() for c, column in enumerate(COLUMNS[1:])}
    return pd.DataFrame(parts, index=index)


# ----------------------------------------------------------------------------------------- targets
@dataclass
class Target:
    """call(bars, row): columns or an environment, fitted on the bars up to that row if it is given.

    fits   rows up to which it may fit; empty: it has no say, and may fit on nothing that comes later
    fresh  the same call from a new import of its file
    kinds  of edits that it stands
    """

    name: str
    call: Callable
    fits: tuple[int, ...] = ()
    fresh: Callable | None = None
    kinds: tuple[str, ...] = KINDS


@dataclass
class Shown:
    """What a target shows of some bars, by opening time (datetime64, UTC)."""

    frames: dict[str, pd.DataFrame]  # split -> columns; one of the name "" if there are no splits
    rounding: dict[str, float]  # column -> relative rounding of its type
    fitted: dict[str, np.ndarray]
    model: object = None  # what has a transform(bars) of its own


@dataclass
class Audit:
    """What was found and what was tried."""

    args: argparse.Namespace
    findings: dict = field(default_factory=dict)
    tried: list = field(default_factory=list)
    not_judged: list = field(default_factory=list)

    def rng(self):
        return np.random.default_rng(self.args.seed)

    def report(self, what: str, ahead: int, size: float, how: str):
        """Of several findings about one thing the farthest look ahead stays."""
        if what not in self.findings or ahead > self.findings[what][0]:
            self.findings[what] = ahead, size, how


def import_target(spec: str, fresh: bool = False):
    """The object of `module:name` or `path/to/file.py:name`. UsageError (one line)."""
    where, _, name = spec.rpartition(":")
    try:
        if where.endswith(".py"):
            path = Path(where).resolve()
            sys.path.insert(0, str(path.parent))
            loader = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(loader)
            if not fresh:
                sys.modules[path.stem] = module
            loader.loader.exec_module(module)
        else:
            sys.path.insert(0, str(Path.cwd()))
            module = importlib.import_module(where)
    except (Exception, SystemExit) as e:
        raise UsageError(f"{spec}: cannot import {where}: {first_line(e)}") from e
    found = module
    for attribute in name.split("."):
        found = getattr(found, attribute, None)
    if not callable(found):
        raise UsageError(f"{spec}: {where} has no function {name}")
    return found


def user_target(spec: str, bars: Bars) -> Target:
    function = import_target(spec)
    try:
        takes_fit = "fit_until" in inspect.signature(function).parameters
    except ValueError:  # a builtin tells nothing
        takes_fit = False

    def call(function, bars, row):
        more = {}
        if row is not None and takes_fit:
            more["fit_until"] = pd.Timestamp(bars.timestamp[row]).tz_localize("UTC")
        return function(frame_of(bars), **more)

    fits = ()
    if takes_fit:
        fits = tuple(int(share * len(bars.timestamp)) for share in FIT_SHARES)

    def first_call(bars, row):
        return call(import_target(spec, fresh=True), bars, row)

    from_file = spec.rpartition(":")[0].endswith(".py")
    return Target(spec, lambda *a: call(function, *a), fits, first_call if from_file else None)


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


def show(target: Target, bars: Bars, row, call=None) -> Shown:
    return shown_of(quietly(call or target.call, bars, row), bars, target.name)


def shown_of(result, bars: Bars, name: str) -> Shown:
    fitted, model = {}, None
    if isinstance(result, tuple) and len(result) == 2:
        result, fitted = result
    elif hasattr(result, "transform") and not isinstance(result, (pd.DataFrame, pd.Series)):
        model = fitted = result
        result = quietly(model.transform, frame_of(bars))
    splits = result if isinstance(result, dict) else {"": result}
    frames, rounding = {}, {}
    for split, values in splits.items():
        frames[str(split)], more = numbers_of(by_time(values, bars, name))
        rounding |= more
    return Shown(frames, rounding, flat(fitted), model)


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
    values = values.set_axis([str(column) for column in values.columns], axis=1)
    index = values.index
    levels = [index.get_level_values(k) for k in range(index.nlevels)]
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
    twins = pd.Series(index).groupby(np.asarray(index)).cumcount().to_numpy()
    return values.set_axis(index + pd.to_timedelta(twins, "ns"), axis=0).sort_index()


def numbers_of(frame: pd.DataFrame):
    """The columns as float64, and the relative rounding of each one's type."""
    columns, rounding = {}, {}
    for name in dict.fromkeys(frame.columns):
        values = frame[name]
        if isinstance(values, pd.DataFrame):  # two columns of one name
            values = values.iloc[:, -1]
        kind = values.dtype
        rounding[name] = 8 * np.finfo(np.float64).eps
        if pd.api.types.is_float_dtype(kind) and kind.itemsize < 8:
            rounding[name] = 8 * np.finfo(np.float32).eps
        if pd.api.types.is_datetime64_any_dtype(kind):
            values = values.astype("int64")
        elif not pd.api.types.is_numeric_dtype(kind):
            values = pd.util.hash_array(values.astype(str).to_numpy(object)) % 2**32
        columns[name] = np.asarray(values, np.float64)
    return pd.DataFrame(columns, index=frame.index), rounding


def flat(values, name: str = "", depth: int = 6) -> dict[str, np.ndarray]:
    """Every number in nested dicts, lists and objects, by its path."""
    if isinstance(values, (bool, int, float, np.number)):
        return {name: np.atleast_1d(np.float64(values))}
    if isinstance(values, str) or values is None or depth == 0:
        return {}
    if isinstance(values, (pd.Series, pd.DataFrame)):
        values = values.to_numpy()
    if isinstance(values, (list, tuple, np.ndarray)):
        with contextlib.suppress(ValueError, TypeError):
            return {name: np.asarray(values, np.float64).ravel()}
        values = dict(enumerate(values))
    if not isinstance(values, dict):
        values = getattr(values, "__dict__", {})
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{name}.{key}" if name else str(key), depth - 1)
    return found


# ----------------------------------------------------------------------------------------- columns
def audit_columns(audit: Audit, target: Target, bars: Bars):
    """A function of bars: two calls on the same bars, edits of the future, shuffled bars."""
    rng = audit.rng()
    bases = base_calls(target, bars)
    fits = list(bases)
    skip = set(audit.args.labels)
    shown = bases[fits[0]]
    columns = [column for frame in shown.frames.values() for column in frame]
    unknown = ", ".join(sorted(skip - set(columns)))
    if unknown:
        raise UsageError(f"--labels {unknown}: not among the columns {', '.join(columns)[:200]}")
    skip |= random_columns(audit, target, bars, fits[0], shown)
    if skip >= set(columns):
        raise UsageError(f"{target.name}: every column is random or a label: nothing to judge")
    kinds = target.kinds
    start = None
    splits = list(shown.frames)
    if len(splits) > 1:  # fitted on the first one; its share of the rows moves with their number
        kinds = tuple(kind for kind in kinds if kind != "length")
        fits = fits[:1]
        start = max(last_row(shown.frames[splits[0]], bars), fits[0] or 0)
        compare_splits(audit, target, bars, shown, fits[0], rng)

    counts = dict.fromkeys(kinds, 0)
    failures = []
    for fit in fits:
        edits = audit.args.edits // len(fits)
        for cut, kind in plan(bars, start or fit, edits, kinds, rng):
            other = edited(bars, cut, kind, rng)
            try:
                after = show(target, other, fit)
            except Exception as e:
                failures.append(first_line(e))
                continue
            counts[kind] += 1
            compare(audit, bases[fit], after, bars, cut, kind, skip)
            if fit is not None:
                compare_fitted(audit, bases[fit].fitted, after.fitted, cut, kind, fit)
    if not sum(counts.values()):
        raise UsageError(f"{target.name}: fails on every edit of the bars: {failures[0]}")
    silent = [kind for kind, count in counts.items() if not count]
    if silent:
        audit.not_judged.append(f"edits of {', '.join(silent)} (it fails: {failures[0]})")
    done = ", ".join(f"{kind} {count}" for kind, count in counts.items())
    audit.tried.append(f"{len(columns)} columns of {len(bars.timestamp)} bars, edits: {done}")
    compare_transform(audit, target, bars, bases[fits[0]], skip, rng)
    compare_first_import(audit, target, bars, bases, skip, rng)
    look_for_shadows(audit, target, bars, fits[-1], start, skip)


def base_calls(target: Target, bars: Bars) -> dict:
    """{row up to which it fits, or None: what is shown of the bars}. UsageError if none works."""
    bases, error = {}, None
    for fit in target.fits or (None,):
        try:
            bases[fit] = show(target, bars, fit)
        except UsageError:
            raise
        except Exception as e:
            error = e
    if not bases:
        raise UsageError(f"{target.name}: {first_line(error)}") from error
    return bases


def random_columns(audit, target, bars, fit, shown) -> set[str]:
    """Columns that are not the same in a second call on the same bars."""
    again = show(target, bars, fit)
    twice = Audit(audit.args)
    compare(twice, shown, again, bars, len(bars.timestamp) - 1, "", set())
    names = {what.split("'")[1] for what in twice.findings}
    if names:
        text = ", ".join(sorted(names)[:5])
        audit.not_judged.append(f"{text} (random: two calls on the same bars differ)")
    return names


def last_row(frame: pd.DataFrame, bars: Bars) -> int:
    return int(np.searchsorted(bars.timestamp, frame.index[-1].to_datetime64(), "right")) - 1


def plan(bars: Bars, fit, edits: int, kinds, rng) -> list[tuple[int, str]]:
    """(row after which the future is edited, kind of the edit): `edits` of them.

    Leaks that show at few rows need edits there: in the warm-up, at silent bars, before holes, and
    right after the last row that was fitted on.
    """
    first, last = (0 if fit is None else fit), len(bars.timestamp) - 2
    if fit is None:
        special = np.geomspace(1, max(last // 10, 2), max(edits // 6, 1)).astype(int).tolist()
    else:
        special = [fit] * max(edits // 4, 1)
    steps = np.diff(bars.timestamp)
    odd = (bars.ohlcv[0, :-1, 4] == 0) | (steps > 1.5 * np.median(steps))
    odd = np.flatnonzero(odd[: last + 1])
    odd = odd[odd >= first]
    special += rng.permutation(odd)[: edits // 5].tolist()
    spread = np.linspace(first, last + 1, edits - len(special) + 1)
    anywhere = [int(rng.integers(a, max(b, a + 1))) for a, b in zip(spread[:-1], spread[1:])]
    cuts = [(cut, "rows") for cut in special if "rows" in kinds]
    return cuts + [(min(cut, last), kinds[k % len(kinds)]) for k, cut in enumerate(anywhere)]


def compare(audit, before: Shown, after: Shown, bars, cut, kind, skip, whole=False):
    """Report every column that an edit after row `cut` changed at rows up to it.

    whole: all rows of these frames, whatever their times.
    """
    rows = len(bars.timestamp)
    end = bars.timestamp[cut + 1] if cut + 1 < rows else bars.timestamp[-1] + np.timedelta64(1, "us")
    for split, old in before.frames.items():
        new = after.frames.get(split, old.iloc[:0])
        old = old if whole else old[old.index < end]
        new = new if whole else new[new.index < end]
        both = old.index.intersection(new.index)
        names = [name for name in old if name not in skip]
        missing = old.index.symmetric_difference(new.index)
        missing = missing[np.isin(missing, bars.timestamp[: cut + 1])]  # not those within a hole
        if len(missing) and not audit.args.labels:
            ahead = ahead_of(missing[0], bars, cut)
            audit.report(column(split, names[0]), ahead, np.inf, where(missing[0], kind, "row"))
        for name in names:
            if name not in new:
                audit.report(column(split, name), cut + 1, np.inf, where(end, kind, "column"))
                continue
            x = old[name].reindex(both).to_numpy()
            y = new[name].reindex(both).to_numpy()
            size = difference(x, y, before.frames[split][name].to_numpy(), before.rounding[name])
            changed = np.flatnonzero(size > 0)
            if len(changed):
                first = both[changed[0]]
                text = where(first, kind, "value")
                audit.report(column(split, name), ahead_of(first, bars, cut), size.max(), text)


def column(split: str, name: str) -> str:
    return f"column '{name}'" + (f" of {split}" if split else "")


def where(time, kind: str, what: str) -> str:
    edit = EDITS.get(kind, "")
    when = pd.Timestamp(time).strftime("%Y-%m-%d %H:%M")
    if what == "value":
        return f"row {when} changes when {edit}"
    return f"the {what} of {when} comes or goes when {edit}"


def ahead_of(time, bars, cut) -> int:
    """Bars from a row to the first edited one."""
    row = int(np.searchsorted(bars.timestamp, np.datetime64(time), "right")) - 1
    return max(cut + 1 - row, 1)


def difference(x, y, whole, rounding) -> np.ndarray:
    """|x - y| over the column's spread where it is more than rounding, inf for a NaN, else 0."""
    known = whole[np.isfinite(whole)]
    spread = known.std() if len(known) else 0.0
    level = np.abs(known).max() if len(known) else 0.0
    with np.errstate(invalid="ignore"):
        size = np.abs(x - y)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    size[same | (size <= ROUNDING * spread + rounding * level)] = 0.0
    size[np.isnan(size)] = np.inf
    return size / (spread or level or 1.0)


def compare_fitted(audit, before: dict, after: dict, cut, kind, fit, rtol=ROUNDING):
    for name in before | after:
        old, new = before.get(name), after.get(name)
        what = f"fitted parameter '{name}'"
        how = f"it changes when {EDITS.get(kind)}, after the last row to fit on"
        if old is None or new is None or old.shape != new.shape:
            audit.report(what, cut + 1 - fit, np.inf, how)
        elif not np.allclose(old, new, rtol, 1e-12, equal_nan=True):
            spread = np.nanmax(np.abs(old)) or 1.0
            audit.report(what, cut + 1 - fit, np.nanmax(np.abs(old - new)) / spread, how)


def compare_splits(audit, target, bars, shown, fit, rng):
    """Nothing of a split, its labels neither, may depend on a bar of a later split: purge."""
    firsts = {}
    for split, frame in shown.frames.items():
        if len(frame):
            firsts[split] = int(np.searchsorted(bars.timestamp, frame.index[0].to_datetime64()))
    for border in sorted(firsts.values())[1:]:
        earlier = [split for split, row in firsts.items() if row < border]
        before = replace(shown, frames={split: shown.frames[split] for split in earlier})
        for kind in ("rows", "prices"):
            other = show(target, edited(bars, border - 1, kind, rng), fit)
            compare(audit, before, other, bars, border - 1, kind, set(), whole=True)
    audit.tried.append(f"{len(firsts)} splits, labels too")


def compare_transform(audit, target, bars, shown, skip, rng):
    """What was fitted stays; a model that has its own transform() is held to every row, train too."""
    if shown.model is None:
        return
    model = shown.model
    held = Target(target.name, lambda bars, _: model.transform(frame_of(bars)))
    base = show(held, bars, None)
    cuts = plan(bars, None, audit.args.edits, KINDS, rng)
    for cut, kind in cuts:
        with contextlib.suppress(Exception):  # too few bars for it
            after = show(held, edited(bars, cut, kind, rng), None)
            compare(audit, base, after, bars, cut, kind, skip)
    audit.tried.append(f"transform() alone, edits {len(cuts)}")


def compare_first_import(audit, target, bars, bases, skip, rng):
    """What a module fitted at its first call and keeps shows only in a new import."""
    if target.fresh is None:
        return
    fit = list(bases)[0]
    cut = fit or len(bars.timestamp) // 2
    other = edited(bars, cut, "rows", rng)
    compare(audit, bases[fit], show(target, other, fit, target.fresh), bars, cut, "rows", skip)


def look_for_shadows(audit, target, bars, fit, start, skip):
    """On bars in a random order no column tells the next one: if it does, it has seen it.

    This is how smoothing within the train rows shows, which edits after them cannot move.
    """
    other = shuffled(bars, audit.rng())
    try:
        frames = show(target, other, fit).frames
    except Exception as e:
        audit.not_judged.append(f"shuffled bars ({first_line(e)})")
        return
    known = next_bar(other)
    train = start or fit or 0
    border = other.timestamp[train]
    for split, frame in frames.items():
        rows = np.searchsorted(other.timestamp, frame.index.to_numpy(), "right") - 1
        clean = frame.drop(columns=[name for name in frame if name in skip])
        for early in (True, False):
            chosen = (frame.index <= border) == early
            for name, values in clean[chosen].items():
                z, of = rank_z(values.to_numpy(), {k: x[rows[chosen]] for k, x in known.items()})
                if z > Z:
                    how = f"on shuffled bars it knows the next {of}, {z:.0f} standard errors"
                    if train and early:
                        how += ", in the rows that were fitted on"
                    audit.report(column(split, name), 1, z / np.sqrt(len(values)), how)
    audit.tried.append("next bar of shuffled bars")


def next_bar(bars: Bars) -> dict[str, np.ndarray]:
    _, high, low, close, volume = bars.ohlcv[0].T
    move = np.diff(np.log(close))
    parts = {
        "return": move,
        "size of the return": np.abs(move),
        "range": np.log(high / low)[1:],
        "volume": volume[1:],
    }
    return {name: np.append(x, np.nan) for name, x in parts.items()}


def rank_z(values, known) -> tuple[float, str]:
    """Largest |rank correlation| in standard errors, of the column or its changes; with what."""
    from scipy.stats import rankdata

    best = 0.0, ""
    for x in (values, np.diff(values, prepend=np.nan)):
        for of, y in known.items():
            both = np.isfinite(x) & np.isfinite(y)
            if both.sum() < FEW:
                continue
            a, b = rankdata(x[both]), rankdata(y[both])
            spread = a.std() * b.std()
            if spread > 0:
                rho = np.mean((a - a.mean()) * (b - b.mean())) / spread
                best = max(best, (abs(rho) * np.sqrt(both.sum()), of))
    return best


# ------------------------------------------------------------------------------------- environments
@dataclass
class Walk:
    obs: np.ndarray  # (n + 1, d) float64
    rewards: np.ndarray  # (n,)


def is_env(x) -> bool:
    return hasattr(x, "reset") and hasattr(x, "step") and hasattr(x, "action_space")


def flat_obs(obs, lane) -> dict[str, np.ndarray]:
    """{part of the observation: its numbers}; of a batched environment those of lane 0."""
    if isinstance(obs, dict):
        parts = {key: flat_obs(x, lane) for key, x in obs.items()}
        return {f"{a}{b}": x for a, inner in parts.items() for b, x in inner.items()}
    if isinstance(obs, tuple):
        return flat_obs({str(k): x for k, x in enumerate(obs)}, lane)
    array = np.asarray(obs, np.float64)
    return {"": array[0].ravel() if lane else array.ravel()}


class Episodes:
    """Episodes of one target with the same seeds and actions, over bars that are edited."""

    def __init__(self, target: Target, bars: Bars, fit, steps: int):
        self.target, self.bars, self.fit = target, bars, fit
        env = self.build(bars)
        self.lane = hasattr(env, "num_envs")
        space = env.action_space
        space.seed(0)
        self.actions = [space.sample() for _ in range(steps + PAYOFF)]
        self.ends = extremes(space)
        self.steps = steps
        self.names = []
        self.base = [self.walk(env, seed) for seed in range(SEEDS)]
        again = self.build(bars)
        self.random = np.zeros(len(self.names), bool)
        self.random_reward = False
        for seed, walk in enumerate(self.base):
            other = self.walk(again, seed)
            n = min(len(walk.obs), len(other.obs))
            self.random |= self.changed(walk.obs[:n], other.obs[:n]).any(0)
            m = min(n, len(walk.rewards))
            self.random_reward |= not np.allclose(walk.rewards[:m], other.rewards[:m])

    def build(self, bars):
        env = quietly(self.target.call, bars, self.fit)
        if not is_env(env):
            raise UsageError(f"{self.target.name}: made an environment once, and then none")
        return env

    def walk(self, env, seed, steps=None, flip=None, end=0) -> Walk:
        """An episode; flip: a step that takes the extreme action `end` instead of its own."""
        steps = self.steps if steps is None else steps
        return quietly(self._walk, env, seed, steps, flip, end)

    def _walk(self, env, seed, steps, flip, end):
        obs, _ = env.reset(seed=seed)
        parts = flat_obs(obs, self.lane)
        if not self.names:
            self.names = [f"{k}[{i}]" for k, x in parts.items() for i in range(len(x))]
        seen, rewards = [np.concatenate(list(parts.values()))], []
        for k in range(steps):
            action = self.ends[end] if k == flip else self.actions[k]
            obs, reward, terminated, truncated, _ = env.step(action)
            rewards.append(float(np.ravel(reward)[0]))
            if np.ravel(terminated)[0] or np.ravel(truncated)[0]:
                break  # what is shown now may be the next episode
            seen.append(np.concatenate(list(flat_obs(obs, self.lane).values())))
        return Walk(np.array(seen), np.array(rewards))

    def changed(self, x, y) -> np.ndarray:
        """(n, d) bool: more than the rounding of float32."""
        with np.errstate(invalid="ignore"):
            size = np.abs(x - y)
        spread = np.concatenate([walk.obs for walk in self.base]).std(0)
        level = np.abs(x).max(0)
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        return ~same & ~(size <= ROUNDING * spread + 1e-6 * level)

    def firsts(self, seed, other: Walk):
        """First observation and first reward that are not those of the base; None if none is.

        And which number of the observation it was.
        """
        base = self.base[seed]
        n = min(len(base.obs), len(other.obs))
        changed = self.changed(base.obs[:n], other.obs[:n]) & ~self.random
        rows = np.flatnonzero(changed.any(1))
        obs = int(rows[0]) if len(rows) else None
        which = self.names[int(changed[obs].argmax())] if len(rows) else ""
        m = min(len(base.rewards), len(other.rewards))
        a, b = base.rewards[:m], other.rewards[:m]
        spread = base.rewards.std()
        moved = np.flatnonzero(~(np.abs(a - b) <= ROUNDING * spread + 1e-9 * np.abs(a)))
        reward = int(moved[0]) if len(moved) and not self.random_reward else None
        return obs, reward, which


def extremes(space) -> tuple:
    """Two actions that are as different as the space allows."""
    import gymnasium as gym

    spaces = gym.spaces
    if isinstance(space, spaces.Discrete):
        return space.start, space.start + space.n - 1
    if isinstance(space, spaces.Box):
        low = np.where(np.isfinite(space.low), space.low, -1.0).astype(space.dtype)
        high = np.where(np.isfinite(space.high), space.high, 1.0).astype(space.dtype)
        return low, high
    if isinstance(space, spaces.MultiDiscrete):
        return space.start.copy(), space.start + space.nvec - 1
    if isinstance(space, spaces.MultiBinary):
        return np.zeros(space.shape, space.dtype), np.ones(space.shape, space.dtype)
    if isinstance(space, spaces.Dict):
        both = {key: extremes(x) for key, x in space.spaces.items()}
        return tuple({key: x[end] for key, x in both.items()} for end in (0, 1))
    if isinstance(space, spaces.Tuple):
        both = [extremes(x) for x in space.spaces]
        return tuple(tuple(x[end] for x in both) for end in (0, 1))
    raise UsageError(f"action space {type(space).__name__}: unknown kind")


def audit_env(audit: Audit, target: Target, bars: Bars):
    """A factory of environments: what observations and rewards depend on, what an action earns."""
    rng = audit.rng()
    bars = shuffled(bars, rng)
    fit = target.fits[0] if target.fits else None
    try:
        episodes = Episodes(target, bars, fit, audit.args.steps)
    except UsageError:
        raise
    except Exception as e:
        raise UsageError(f"{target.name}: {first_line(e)}") from e
    names = [name for name, odd in zip(episodes.names, episodes.random) if odd]
    if names or episodes.random_reward:
        text = ", ".join(names[:5]) or "the reward"
        audit.not_judged.append(f"{text} (random: two episodes of one seed differ)")
    if len(names) == len(episodes.names):
        raise UsageError(f"{target.name}: every observation is random: nothing to judge")

    count = 0
    pairs = []
    for seed in range(SEEDS):
        firsts = {}
        for cut in cuts_of(episodes, seed, fit or 0, rng):
            env = episodes.build(edited(bars, cut, "rows", rng))
            firsts[cut] = episodes.firsts(seed, episodes.walk(env, seed))
        count += len(firsts)
        observations_advance(audit, episodes, seed, firsts, rng)
        rewards_are_known(audit, episodes, seed, firsts, rng)
        pairs += [(seed, cut, first[0]) for cut, first in firsts.items() if first[0] is not None]
    steps = sum(len(walk.rewards) for walk in episodes.base)
    if not pairs:
        raise UsageError(
            f"{target.name}: no edited bar reached an observation in {steps} steps: more --steps, or "
            f"the environment does not read the bars"
        )
    audit.tried.append(f"{SEEDS} episodes, {steps} steps, edits: rows {count}")
    if not audit.findings:
        actions_earn_what_comes(audit, episodes, pairs)
    length_tells_nothing(audit, episodes)


def cuts_of(episodes: Episodes, seed: int, low: int, rng) -> list[int]:
    """Rows after which to edit: around the bars that the episode walks over, and far behind them.

    The newest bar of the first observation is found by bisection.
    """
    rows = len(episodes.bars.timestamp)
    base = episodes.base[seed]

    def first_sees(cut):
        env = episodes.build(edited(episodes.bars, cut, "rows", rng))
        other = episodes.walk(env, seed, steps=0)
        return (episodes.changed(base.obs[:1], other.obs) & ~episodes.random).any()

    a, b = low - 1, rows - 1  # it sees edits after a, none after b
    while b - a > 1:
        middle = (a + b) // 2
        if first_sees(middle):
            a = middle
        else:
            b = middle
    end = min(b + len(base.rewards), rows - 1)
    around = np.linspace(b, end, CUTS + 1)
    cuts = [int(rng.integers(x, max(y, x + 1))) for x, y in zip(around[:-1], around[1:])]
    cuts += [max(a, low), max(a, low) + 1, (end + rows) // 2, rows - 2]
    return sorted({min(max(cut, low), rows - 2) for cut in cuts})


def observations_advance(audit, episodes, seed, firsts, rng):
    """An observation that shows bar c shows bar c + m at most m steps later, and the file is long
    enough for the steps that follow: else it has shown bar c too early."""
    rows = len(episodes.bars.timestamp)
    last = len(episodes.base[seed].obs) - 2  # the last one may repeat the one before
    for cut, (step, _, which) in firsts.items():
        if step is None:
            continue
        what = f"observation '{which}'"
        early = cut + 1 + (last - step) - (rows - 1)
        how = f"at step {step} of {last + 1} it depends on bar {cut + 1} of {rows}"
        if early > 0:
            audit.report(what, early, 1.0, how)
        for later, (then, *_) in firsts.items():
            due = step + (later - cut) + SLACK
            if later <= cut or due > last or (then is not None and then <= due):
                continue
            if not sees(episodes, seed, later, due, rng):
                ahead = last - due if then is None else then - due + SLACK
                how = f"at step {step} it depends on bar {cut + 1}, at step {due} not on {later + 1}"
                audit.report(what, max(ahead, 1), 1.0, how)


def sees(episodes, seed, cut, step, rng) -> bool:
    """Whether an observation up to `step` depends on a bar after `cut`, asked with several edits."""
    for _ in range(AGAIN):
        env = episodes.build(edited(episodes.bars, cut, "rows", rng))
        first = episodes.firsts(seed, episodes.walk(env, seed, steps=step))[0]
        if first is not None:
            return True
    return False


def rewards_are_known(audit, episodes, seed, firsts, rng):
    """What a reward depends on is shown by the observation that comes with it, or one bar later."""
    last = len(episodes.base[seed].obs) - 2
    for cut, (step, reward, _) in firsts.items():
        if reward is None or reward + 2 > last or (step is not None and step <= reward + 2):
            continue
        if not sees(episodes, seed, cut, reward + 2, rng):
            ahead = (last if step is None else step) - reward - 1
            how = f"at step {reward} it depends on bar {cut + 1}, which no observation shows by then"
            audit.report("reward", ahead, 1.0, how)


def payoffs(episodes, bars, pairs) -> np.ndarray:
    """What the rewards gain by one extreme action instead of the other, at the step of each pair."""
    env = episodes.build(bars)
    found = []
    for seed, _, step in pairs:
        walks = [episodes.walk(env, seed, step + PAYOFF, step, end).rewards for end in (0, 1)]
        n = min(map(len, walks))
        found.append(walks[1][step:n].sum() - walks[0][step:n].sum())
    return np.array(found)


def kept_by_mirror(episodes, pairs, back=0) -> float | None:
    """Cosine between payoffs and those after every bar up to the shown one is mirrored.

    1: nothing that was shown is earned; -1: nothing else is. None: actions earn nothing.
    """
    same, other = [], []
    for cut in {cut for _, cut, _ in pairs}:
        chosen = [pair for pair in pairs if pair[1] == cut]
        same.append(payoffs(episodes, episodes.bars, chosen))
        bars = mirrored(episodes.bars, max(cut + 1 - back, 0))
        other.append(payoffs(episodes, bars, chosen))
    a, b = np.concatenate(same), np.concatenate(other)
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size > 0 else None


def actions_earn_what_comes(audit, episodes, pairs):
    """A policy that trades on the sign of a bar that it sees must not earn this bar."""
    longest = {seed: len(walk.rewards) for seed, walk in enumerate(episodes.base)}
    pairs = [pair for pair in pairs if pair[2] < longest[pair[0]] - 1]
    kept = kept_by_mirror(episodes, pairs) if pairs and not episodes.random_reward else None
    if kept is None:
        audit.not_judged.append("same-bar fills (an action changes no reward)")
        return
    audit.tried.append(f"what {len(pairs)} actions earn with the bars that they saw mirrored")
    if kept < 0.5:
        back = 0
        while back < 64 and kept_by_mirror(episodes, pairs, back + 1) < 0.5:
            back += 1
        share = (1 - kept) / 2
        how = f"an action earns a bar that its observation shows ({share:.0%} of what it earns)"
        audit.report("reward", back + 1, share, how)


def length_tells_nothing(audit, episodes):
    """A shorter file gives the same episode, unless it begins elsewhere."""
    rows = len(episodes.bars.timestamp)
    moved = True
    for share in (0.95, 0.9, 0.8):
        bars = part(episodes.bars, slice(0, int(share * rows)))
        if episodes.fit is not None and episodes.fit >= len(bars.timestamp):
            continue
        try:
            env = episodes.build(bars)
            other = episodes.walk(env, 0)
        except Exception:
            continue
        base = episodes.base[0]
        n = min(len(base.obs), len(other.obs)) - 2
        if n < 2:
            continue
        changed = (episodes.changed(base.obs[:n], other.obs[:n]) & ~episodes.random).any(0)
        walks = base.obs[:n].std(0) > 0
        if (changed & walks).sum() > 0.5 * walks.sum():
            continue  # another first row
        moved = False
        for name in np.array(episodes.names)[changed]:
            ahead = rows - len(bars.timestamp)
            audit.report(f"observation '{name}'", ahead, 1.0, "it tells how long the file is")
    text = "edits of length (a shorter file begins elsewhere)"
    audit.not_judged.append(text) if moved else audit.tried.append("shorter files")


# ---------------------------------------------------------------------------------- run directories
def audit_run(audit: Audit, folder: Path):
    """Columns as the script fits them, parameters of the checkpoint, splits, the environment."""
    from common.timeout_guard import find_last, load_checkpoint

    try:
        flags = json.loads((folder / "args.json").read_text())
    except (OSError, ValueError) as e:
        raise UsageError(f"{folder}: not a run directory: args.json: {first_line(e)}") from e
    path = folder / "checkpoints" / "best.pt"
    path = path if path.exists() else find_last(folder)
    if path is None:
        raise UsageError(f"{folder}: holds no checkpoint")
    state = load_checkpoint(path)
    run = SimpleNamespace(state=state, flags=SimpleNamespace(**flags), data=state.get("data", {}))
    audits = {"tqc_film_batch": audit_tqc, "dqn_forex_subproc": audit_dqn}
    script = state.get("script")
    if script not in audits:
        raise UsageError(f"{folder}: a run of {script}: only {', '.join(audits)} have bars")
    audit.args.labels = []
    audits[script](audit, run)


def check_stored(audit, stored: dict, refitted: dict):
    """The parameters of a checkpoint are those that its train rows give."""
    changed = Audit(audit.args)
    stored, refitted = flat(stored), flat(refitted)
    compare_fitted(changed, stored, refitted, 0, "", 0, rtol=1e-3)
    for what, (_, size, _) in changed.findings.items():
        audit.report(f"{what} of the checkpoint", 1, size, "the train rows give another one")
    audit.tried.append(f"{len(stored)} stored parameters against a new fit")


def check_purge(audit, rows: dict, window: int, name: str):
    """rows {split: (start, stop)} of decisions; row t earns bar t + 1 and sees `window` bars."""
    order = [split for split in ("train", "eval", "test") if split in rows]
    for before, after in zip(order[:-1], order[1:]):
        free = rows[after][0] - window + 1 - (rows[before][1] + 1)
        if free < 0:
            how = f"its first window holds bars that {before} earned"
            audit.report(f"split '{after}' of {name}", -free, 1.0, how)
    audit.tried.append(f"purge of {name}")


def same_data(flags, found, stored):
    if stored and found != stored:
        raise UsageError(f"--data {flags.data}: is not what the run read (another sha256)")


def audit_tqc(audit, run):
    from cleanrl_crypto import tqc_film_batch as tqc
    from common.features import FeatureModel

    flags = run.flags
    bars = load_bars(flags.data, flags.fill_limit)
    same_data(flags, bars.sha256, run.data.get("sha256"))
    model = FeatureModel.from_state_dict(run.state["features"])

    def load(bars, features=None):
        a = flags.split, flags.window, flags.fill_limit, flags.seed, flags.hmm
        with patch.object(tqc, "load_bars", lambda *_: bars):
            return tqc.load_market(
                flags.data, *a, features, screen=flags.screen, forecast=flags.forecast
            )

    def refit(bars, _):
        market = load(bars)
        frame = pd.DataFrame(market.table, columns=market.features.columns)
        return frame.assign(forecast=market.forecast), market.features.state_dict()

    def transform(bars, _):
        return pd.DataFrame(model.transform(bars), columns=model.columns)

    def environment(bars, _):
        market = load(bars, model)
        a = flags
        rules = a.episode_length, a.fee_bps, a.slippage_bps, a.funding_bps, a.position_mode
        lanes = tqc.MarketVectorEnv(market, market.rows["test"], 1, *rules)
        return tqc.OneLane(lanes) if hasattr(tqc, "OneLane") else lanes

    market = quietly(load, bars)
    check_stored(audit, run.state["features"], market.features.state_dict())
    check_purge(audit, market.rows, flags.window, bars.names[0])
    audit.args.edits = min(audit.args.edits, 24)
    kinds = ("rows", "prices", "volumes")  # the split's shares move with the length
    fits = (market.rows["train"][1] - 1,)
    held = Target("transform", transform)
    audit_columns(audit, held, bars)
    audit.args.edits = 6
    audit_columns(audit, Target("fit", refit, fits, kinds=kinds), bars)
    audit_env(audit, Target("environment", environment), replace(bars, truth=None))


def audit_dqn(audit, run):
    from cleanrl_crypto import dqn_forex_subproc as dqn

    if run.flags.env_fn:
        raise UsageError("a run of --env-fn has no bars: give its factory as TARGET")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(run.flags).items()}
    flags = dqn.Args(**fields)
    series = dqn.load_series(flags)
    found = [bars.sha256 for bars in series.values()]
    same_data(flags, found, list(run.data.get("sha256", [])))
    stored = run.state["config"]["models"]
    pairs = quietly(dqn.load_pairs, flags)
    check_stored(audit, stored, pairs.models)
    edits = audit.args.edits
    for k, (name, bars) in enumerate(series.items()):
        rows = {split: pairs.rows[split][k] - pairs.first[k] for split in pairs.rows}
        check_purge(audit, rows, 1, name)

        def refit(bars, row, name=name):
            model, columns = dqn.fit(flags, bars, row + 1, None)
            return pd.DataFrame(columns, columns=model.columns), model.state_dict()

        def transform(bars, _, name=name):
            model, columns = dqn.fit(flags, bars, None, stored[name])
            return pd.DataFrame(columns, columns=model.columns)

        fits = (int(rows["train"][1]) - 1,)
        audit.args.edits = max(edits // 2, 8)
        audit_columns(audit, Target(f"transform of {name}", transform), bars)
        audit.args.edits = 8
        audit_columns(audit, Target(f"fit of {name}", refit, fits), bars)

    first = next(iter(series))

    def environment(bars, _):
        with patch.object(dqn, "load_series", lambda _: series | {first: bars}):
            loaded = dqn.load_pairs(flags, stored)
        rules = {name: getattr(flags, name) for name in dqn.RULES}
        return dqn.ForexVectorEnv(loaded, "test", len(series), vec_mode="single", **rules)

    audit_env(audit, Target("environment", environment), series[first])


# ------------------------------------------------------------------------------------------- verdict
def verdict(audit: Audit) -> str:
    """The last line."""
    rest = f"; not judged: {'; '.join(audit.not_judged)}" if audit.not_judged else ""
    if not audit.findings:
        return f"no leak found in {'; '.join(audit.tried)}{rest}"
    what, (ahead, size, how) = next(iter(audit.findings.items()))
    bars = "1 bar" if ahead == 1 else f"{ahead} bars"
    text = "" if not np.isfinite(size) else f", size {size:.2g}"
    more = f"; {len(audit.findings) - 1} more" if len(audit.findings) > 1 else ""
    return f"leak: {what}, {bars} ahead{text}: {how}{more}{rest}"


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: (_ for _ in ()).throw(UsageError(message))
    add = parser.add_argument
    add("target", metavar="TARGET", help="module:function, file.py:function or a run directory")
    add("--data", help="bars: a file or synthetic:MARKET (default: noise with holes)")
    add("--bars", type=int, default=3000, help="use the last N of them (default: %(default)s)")
    add("--edits", type=int, default=40, help="edits of the future (default: %(default)s)")
    add("--steps", type=int, default=STEPS, help="steps of an episode (default: %(default)s)")
    add("--labels", nargs="+", default=[], help="columns that may look ahead: what is forecast")
    add("--seed", type=int, default=1, help="of the bars and the edits (default: %(default)s)")
    args = parser.parse_args(argv)
    for name, least in (("bars", 200), ("edits", 4), ("steps", 10), ("seed", 0)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name} {getattr(args, name)}: must be {least} or more")
    return args


def read_bars(args) -> Bars:
    bars = load_bars(args.data or f"{OWN_BARS}&seed={args.seed}")
    if args.data is None:
        return rough(bars, np.random.default_rng(args.seed))
    return replace(part(bars, slice(-args.bars, None)), truth=None)


def main(argv=None) -> dict:
    args = parse(argv)
    audit = Audit(args)
    if Path(args.target).is_dir():
        audit_run(audit, Path(args.target))
    elif ":" not in args.target:
        raise UsageError(f"{args.target}: no run directory, and no module:function")
    else:
        bars = read_bars(args)
        target = user_target(args.target, bars)
        try:
            fit = target.fits[0] if target.fits else None
            environment = is_env(quietly(target.call, bars, fit))
        except (Exception, SystemExit):
            environment = False  # audit_columns tries other rows, and says why it fails
        (audit_env if environment else audit_columns)(audit, target, bars)
    for what, (ahead, size, how) in list(audit.findings.items())[:20]:
        print(f"{what:<40} {ahead:>6} bars ahead  size {size:<8.2g} {how}")
    print(verdict(audit))
    return {"exit_code": int(bool(audit.findings)), "findings": audit.findings}


if __name__ == "__main__":
    exit_with(main)
