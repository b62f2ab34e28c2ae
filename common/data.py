"""Bars from a source: load, validate, align, split.

One door for every market: `load_bars("synthetic:regime")`, `load_bars("BTC.parquet")` or, with the
traded asset first, `load_bars("BTC.parquet,ETH.csv")`. A file holds the columns of `COLUMNS`, one
row a bar, `timestamp` being the bar's OPEN time with a time zone. Whatever is impossible in a file
is a `DataError` of one line that names the file, the row (0 is the first bar), the column and the
time; what is merely implausible is said by `print_facts`. Nothing is repaired, sorted, dropped or
filled in silence.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from common.run import UsageError

if TYPE_CHECKING:
    from common import markets

COLUMNS = ("timestamp", "open", "high", "low", "close", "volume")
KINDS = (".parquet", ".csv")
IMPORT = "python scripts/import_bars.py {} --out data/NAME.parquet may import it"
MIN_ROWS = 3  # two bars make a spacing, a third makes it a series
FAR = 0.20  # a move of one bar beyond this is said
FUNDING_TIMES = ("fundingTime", "fundingRateTimestamp", "calc_time", "timestamp", "time")
FUNDING_RATES = ("fundingRate", "last_funding_rate", "funding_rate", "rate")
FAR_FUNDING = 0.1  # a payment of a tenth of the position is a rate in per cent
REPAIR = "scripts/import_bars.py {} repairs that"
BROKER_TIME = (
    "the clocks of MetaTrader and of most brokers are not, convert those first "
    "(bars: scripts/import_bars.py --tz)"
)
YEAR = np.timedelta64(31_557_600, "s").astype("timedelta64[ns]")  # Julian year, 365.25 days

DATE = re.compile(r"\d{4}-\d\d-\d\d")
ISO = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?")
OFFSET = re.compile(r"(Z|[+-]\d\d(:?\d\d)?)")


class DataError(UsageError):
    """Input that cannot be used; the message is one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).splitlines()))


@dataclass(frozen=True, eq=False)
class Bars:
    """Bars of one or more assets on one clock; the first asset is the traded one.

    spec       as given to `load_bars`
    names      A asset names: the file's stem, or "synthetic:regime"
    timestamp  (T,) datetime64[ns], UTC, bar OPEN time, strictly increasing
    ohlcv      (A, T, 5) float64: open, high, low, close (price), volume
    filled     (A, T) bool: the row was carried forward from the asset's own past (never asset 0)
    gaps       one dict an asset, see `find_gaps`; measured on the file, before any alignment
    facts      one dict an asset, see `find_facts`; measured there too
    sha256     hex digest of the files' bytes in order, or of the generated arrays
    bars_per_year  (T - 1) / years spanned, from the clock's own bars
    truth      what is known of a synthetic market (`markets.Truth`), None for files
    """

    spec: str
    names: tuple[str, ...]
    timestamp: np.ndarray
    ohlcv: np.ndarray
    filled: np.ndarray
    gaps: tuple[dict, ...]
    sha256: str
    bars_per_year: float
    truth: markets.Truth | None = None
    facts: tuple[dict, ...] = ()

    @property
    def close(self) -> np.ndarray:
        """(T,) float64 close of the traded asset."""
        return self.ohlcv[0, :, 3]

    @property
    def next_return(self) -> np.ndarray:
        """(T,) float64: what a decision on row t earns, close[t+1]/close[t] - 1; NaN in the last."""
        out = np.full(len(self.timestamp), np.nan)
        out[:-1] = self.close[1:] / self.close[:-1] - 1.0
        return out


# ------------------------------------------------------------------------------------ one source
def load_bars(spec: str, fill_limit: int = 24) -> Bars:
    """Bars of `spec`: "synthetic:MARKET[?key=value&...]", or .parquet and .csv files with commas.

    The first file is traded and gives the clock. A row for which another file has no bar of its own
    takes the last one before it: open = high = low = close = its close, volume 0. That bar may be
    at most `fill_limit` bars (of the first file's median spacing) old. Raises DataError.
    """
    spec = str(spec)
    if fill_limit < 0:
        raise DataError(f"--fill-limit {fill_limit}: must be 0 or more bars")
    paths = [part.strip() for part in spec.split(",")]
    if not all(paths):
        raise DataError(f"data '{spec}': part {paths.index('')} is empty; give FILE or FILE,FILE")
    if any(path.startswith("synthetic:") for path in paths):
        if len(paths) > 1:
            raise DataError(f"data '{spec}': a synthetic market cannot be mixed with other parts")
        return _synthetic(paths[0])

    digest, path_of, names, tables = hashlib.sha256(), {}, [], []
    for path in paths:
        raw = _read_bytes(path)
        key, name = hashlib.sha256(raw).digest(), Path(path).stem
        if key in path_of:
            raise DataError(f"{path}: the same bars as {path_of[key]}; give every file once")
        if name in names:
            raise DataError(f"{path}: a file named '{name}' was given before; rename one of them")
        path_of[key] = path
        names.append(name)
        digest.update(raw)
        tables.append(read_bars(path, raw))

    clock, first = tables[0]
    ohlcv = np.empty((len(paths), len(clock), 5))
    filled = np.zeros((len(paths), len(clock)), bool)
    ohlcv[0] = first
    for a in range(1, len(paths)):
        ohlcv[a], filled[a] = _align(paths[a], *tables[a], paths[0], clock, fill_limit)
    return Bars(
        spec=spec,
        names=tuple(names),
        timestamp=clock,
        ohlcv=ohlcv,
        filled=filled,
        gaps=tuple(find_gaps(name, times) for name, (times, _) in zip(names, tables)),
        sha256=digest.hexdigest(),
        bars_per_year=_bars_per_year(clock),
        facts=tuple(find_facts(name, *table) for name, table in zip(names, tables)),
    )


def _synthetic(spec: str) -> Bars:
    from common import markets

    try:
        law = markets.parse_law(spec)
        timestamp, ohlcv, truth = markets.generate(law)
    except ValueError as error:
        raise DataError(f"data {_line(error)}") from None
    timestamp = timestamp.astype("datetime64[ns]")
    check_bars(spec, timestamp, ohlcv)
    name = spec.partition("?")[0]
    return Bars(
        spec=spec,
        names=(name,),
        timestamp=timestamp,
        ohlcv=ohlcv[None],
        filled=np.zeros((1, len(timestamp)), bool),
        gaps=(find_gaps(name, timestamp),),
        sha256=hashlib.sha256(timestamp.tobytes() + ohlcv.tobytes()).hexdigest(),
        bars_per_year=_bars_per_year(timestamp),
        truth=truth,
        facts=(find_facts(name, timestamp, ohlcv),),
    )


def find_file(folder: str | Path, symbol: str) -> Path:
    """The one .parquet or .csv file in `folder` whose name begins with `symbol`. DataError."""
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: no such folder")
    paths = (path for kind in KINDS for path in Path(folder).glob(f"{symbol}*{kind}"))
    found = sorted(paths)
    if len(found) != 1:
        what = ", ".join(path.name for path in found[:4]) or "none"
        raise DataError(
            f"{folder}: need exactly one {symbol}*.parquet or {symbol}*.csv, found {what}"
        )
    return found[0]


def _bars_per_year(timestamp: np.ndarray) -> float:
    return float((len(timestamp) - 1) / ((timestamp[-1] - timestamp[0]) / YEAR))


# -------------------------------------------------------------------------------------- one file
def read_bars(path: str | Path, raw: bytes | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read and validate a file of bars: (T,) datetime64[ns] UTC and (T, 5) float64 open..volume.

    `raw`: the file's bytes, so that what the caller hashed is what is parsed; None reads them.
    """
    timestamp, ohlcv = _read(path, raw, COLUMNS[1:], exact=True)
    check_bars(path, timestamp, ohlcv)
    return timestamp, ohlcv


def read_columns(
    path: str | Path, names, raw: bytes | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Times and the named columns (T, n) of a .parquet or .csv file with a `timestamp` column.

    For what goes with bars: spreads, funding. Times are held to the rules of bars, values are
    finite, other columns are ignored. DataError.
    """
    timestamp, values = _read(path, raw, tuple(names), exact=False)
    _check_times(path, timestamp)
    bad = ~np.isfinite(values)
    _refuse(path, timestamp, bad, names, lambda i, c: f"{values[i, c]} is not finite")
    return timestamp, values


def _read(path, raw, names, exact):
    raw = _read_bytes(path) if raw is None else raw
    read = _read_csv if Path(path).suffix.lower() == ".csv" else _read_parquet
    return read(path, raw, names, exact)


def _read_bytes(path: str | Path) -> bytes:
    kind = Path(path).suffix
    if kind.lower() not in KINDS:
        why = f"unknown kind of file '{kind}'; bars come as .parquet or .csv"
        raise DataError(f"{path}: {why}; {IMPORT.format(path)}")
    try:
        return Path(path).expanduser().read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file (looked from {Path.cwd()})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _read_parquet(path, raw, names, exact):
    try:
        # without pandas' metadata an index that was saved as `timestamp` is a column like any other
        table = pq.read_table(io.BytesIO(raw))
        table.validate(full=True)
        found = table.column_names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable parquet file: {_line(error)[:200]}") from None
    _check_columns(path, found, names, exact)
    timestamp = _parquet_times(path, table["timestamp"])
    values = np.empty((len(table), len(names)))
    for c, name in enumerate(names):
        kind = table[name].type
        number = (
            pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind)
        )
        if not number:
            raise DataError(f"{path}: column '{name}' has type {kind}, not a number")
        values[:, c] = table[name].cast(pa.float64(), safe=False).to_numpy()
    return timestamp, values


def _parquet_times(path, column):
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return parse_times(path, ["" if x is None else x for x in column.to_pylist()])
    if pa.types.is_integer(kind):
        raise DataError(_epoch(path, str(column[0]) if len(column) else "0"))
    if not pa.types.is_timestamp(kind):
        raise DataError(f"{path}: column 'timestamp' has type {kind}, not a time with a time zone")
    if kind.tz is None:
        raise DataError(
            f"{path}: column 'timestamp' has no time zone; use .dt.tz_localize('UTC') only if "
            f"it is UTC: {BROKER_TIME}"
        )
    try:
        times = column.cast(pa.timestamp("ns", "UTC"))
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{path}: column 'timestamp' does not fit nanoseconds: {_line(error)}"
        ) from None
    return times.to_numpy().astype("datetime64[ns]")


def _read_csv(path, raw, names, exact):
    try:
        rows = list(csv.reader(io.StringIO(raw.decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a readable CSV file: {_line(error)}") from None
    while rows and not rows[-1]:
        rows.pop()
    if not rows:
        raise DataError(f"{path}: empty; the first line must be {','.join(('timestamp', *names))}")
    header = [name.strip() for name in rows.pop(0)]
    _check_columns(path, header, names, exact)
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise DataError(f"{path}: row {i} has {len(row)} fields, the header has {len(header)}")
    at = header.index("timestamp")
    timestamp = parse_times(path, [row[at].strip() for row in rows])
    values = np.empty((len(rows), len(names)))
    for c, name in enumerate(names):
        j = header.index(name)
        for i, row in enumerate(rows):
            try:
                values[i, c] = float(row[j])
            except ValueError:
                text = row[j]
                why = f"{text[:40]!r} is not a number" if text.strip() else "is empty"
                raise DataError(f"{_at(path, timestamp, i, name)}: {why}") from None
    return timestamp, values


def _check_columns(path, found, names, exact):
    wanted = ("timestamp", *names)
    missing = [name for name in wanted if name not in found]
    extra = [name for i, name in enumerate(found) if name not in wanted or name in found[:i]]
    extra = extra if exact else [name for name in extra if name in wanted]
    if missing or extra:
        kinds = [("missing", missing), ("extra", extra)]
        what = " and ".join(
            f"{kind} {', '.join(repr(name[:40]) for name in some)}" for kind, some in kinds if some
        )
        need = (
            f"bars have exactly {', '.join(COLUMNS)}; {IMPORT.format(path)}"
            if exact
            else f"found {', '.join(found)[:200]}"
        )
        raise DataError(f"{path}: columns {what}; {need}")


# ---------------------------------------------------------------------------------------- funding
def load_funding(path: str | Path, bars: Bars) -> tuple[np.ndarray, str]:
    """What a full long position pays in each bar, (T,) float64, a fraction of it; the file's sha256.

    A .csv or .parquet file as exchanges give it, a payment a row: a time (a column of FUNDING_TIMES:
    milliseconds since 1970, or a time with a zone) and a rate (one of FUNDING_RATES: a fraction of
    the position, positive: longs pay shorts). A payment belongs to the bar that holds its time, and
    the payments of a bar are added up. Those outside of the bars are left out, aloud. DataError.
    """
    raw = _read_bytes(path)
    read = pd.read_csv if Path(path).suffix.lower() == ".csv" else pd.read_parquet
    try:
        table = read(io.BytesIO(raw))
    except (ValueError, OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable table: {_line(error)[:200]}") from None
    times = _funding_times(path, _one_of(path, table, FUNDING_TIMES))
    rates = pd.to_numeric(_one_of(path, table, FUNDING_RATES), errors="coerce").to_numpy(np.float64)
    wrong = np.flatnonzero(~(np.abs(rates) < FAR_FUNDING))
    if len(wrong):
        i = wrong[0]
        why = f"must be a fraction of the position within {FAR_FUNDING:g}, not per cent"
        raise DataError(f"{path}: row {i}, {iso(times[i])}: rate {rates[i]:g} {why}")
    copies = len(times) - len(np.unique(times))
    if copies or np.isnat(times).any():
        raise DataError(f"{path}: {copies} duplicate or empty times: give every payment once")

    clock = bars.timestamp
    end = clock[-1] + _length(clock)
    inside = (times >= clock[0]) & (times < end)
    span = f"bars are {iso(clock[0])} .. {iso(end)}"
    if not inside.any():
        there = f"payments of {iso(times.min())} .. {iso(times.max())}" if len(times) else "no payments"
        raise DataError(f"{path}: {there}, {span}: none is within them")
    first, last = times[inside].min(), times[inside].max()
    left_out = f"{np.sum(~inside)} outside of the bars are left out"
    print(f"{path}: {inside.sum()} payments, {iso(first)} .. {iso(last)}, {left_out}; {span}")
    row = np.searchsorted(clock, times[inside], side="right") - 1
    return np.bincount(row, rates[inside], len(clock)), hashlib.sha256(raw).hexdigest()


def _one_of(path, table, names):
    """The one column of `table` that has one of `names`."""
    found = [name for name in table.columns if name in names]
    if len(found) != 1:
        there = ", ".join(map(str, table.columns))[:200]
        raise DataError(f"{path}: need one column of {', '.join(names)}; found {there}")
    return table[found[0]]


def _funding_times(path, column) -> np.ndarray:
    if pd.api.types.is_numeric_dtype(column):
        times = pd.to_datetime(column, unit="ms", errors="coerce")
        wrong = ~times.between("2000-01-01", "2100-01-01")
        if wrong.any():
            i = int(wrong.argmax())
            raise DataError(f"{path}: row {i}: time {column[i]} is not in milliseconds since 1970")
        return times.to_numpy("datetime64[ns]")
    if isinstance(column.dtype, pd.DatetimeTZDtype):
        return column.dt.tz_convert("UTC").dt.tz_localize(None).to_numpy("datetime64[ns]")
    return parse_times(path, column.astype(str))


def parse_times(path, texts) -> np.ndarray:
    """ISO 8601 strings, each with its own offset or Z, as (T,) datetime64[ns] UTC. DataError."""
    for i, text in enumerate(texts):
        iso = ISO.match(text)
        if iso and OFFSET.fullmatch(text, iso.end()):
            continue
        at = f"{path}: row {i}, column 'timestamp'"
        if not text:
            raise DataError(f"{at}: is empty")
        if re.fullmatch(r"[+-]?\d+(\.\d*)?", text):
            raise DataError(_epoch(path, text, i))
        if DATE.fullmatch(text) or (iso and iso.end() == len(text)):
            zoned = f"{text[:10]}T{text[11:] or '00:00'}Z"
            raise DataError(
                f"{at}: {text!r} has no time zone; write {zoned} only if it is UTC: {BROKER_TIME}"
            )
        raise DataError(f"{at}: {text[:40]!r} is not a time; write 2024-01-31T09:00:00Z")
    parsed = pd.to_datetime(
        pd.Series(texts, dtype=object), format="ISO8601", utc=True, errors="coerce"
    )
    # numpy wraps years that do not fit 64 bits of nanoseconds around, in silence
    bad = np.flatnonzero(parsed.isna() | (parsed.dt.year < 1678) | (parsed.dt.year > 2261))
    if len(bad):
        i = bad[0]
        raise DataError(
            f"{path}: row {i}, column 'timestamp': {texts[i]!r} is no date in 1678 .. 2261"
        )
    return parsed.dt.tz_convert("UTC").dt.tz_localize(None).to_numpy().astype("datetime64[ns]")


def utc_times(timestamp: np.ndarray) -> pd.DatetimeIndex:
    """Times as this module reads them back: with their zone, for what a script writes."""
    return pd.DatetimeIndex(timestamp).tz_localize("UTC")


def _epoch(path, text, row=0):
    digits = len(text.lstrip("+-").partition(".")[0])
    unit = {10: "s", 13: "ms", 16: "us", 19: "ns"}.get(digits, "ms")
    return (
        f"{path}: row {row}, column 'timestamp': {text[:40]} is an epoch, its unit a guess; "
        f"{IMPORT.format(path)} with --unit {unit}"
    )


# ------------------------------------------------------------------------------------ validation
def check_bars(path: str | Path, timestamp: np.ndarray, ohlcv: np.ndarray) -> None:
    """DataError on the first impossible bar of (T,) datetime64 and (T, 5) float64 open..volume."""
    if len(timestamp) < MIN_ROWS:
        raise DataError(f"{path}: {len(timestamp)} rows, at least {MIN_ROWS} are needed")
    _check_times(path, timestamp)
    check = partial(_refuse, path, timestamp, names=COLUMNS[1:], flag="--drop-incomplete")
    check(~np.isfinite(ohlcv), say=lambda i, c: f"{ohlcv[i, c]} is not finite")
    check = partial(check, flag="--drop-impossible")
    bad = ohlcv <= 0.0
    bad[:, 4] = ohlcv[:, 4] < 0.0
    wrong = ("not positive",) * 4 + ("negative",)
    check(bad, say=lambda i, c: f"{ohlcv[i, c]:g} is {wrong[c]}")
    low, high = ohlcv[:, 2], ohlcv[:, 1]
    bad = np.zeros_like(bad)
    bad[:, 1] = high < low
    check(bad, say=lambda i, c: f"{high[i]:.12g} is below low {low[i]:.12g}")
    for c in (0, 3):
        bad[:, c] = (ohlcv[:, c] < low) | (ohlcv[:, c] > high)
    price = "{:.12g} is outside {:.12g} .. {:.12g}"
    check(bad, say=lambda i, c: price.format(ohlcv[i, c], low[i], high[i]))


def _check_times(path, timestamp):
    """DataError unless times are set, sorted and unique; it counts the rows that are not."""
    unset = np.flatnonzero(np.isnat(timestamp))
    if len(unset):
        raise DataError(f"{path}: row {unset[0]}, column 'timestamp': is empty")
    back = np.flatnonzero(np.diff(timestamp) <= np.timedelta64(0, "ns")) + 1
    if not len(back):
        return
    i = back[0]
    twin = np.flatnonzero(timestamp[:i] == timestamp[i])
    copies = len(timestamp) - len(np.unique(timestamp))
    disorder = int((np.diff(timestamp) < np.timedelta64(0, "ns")).sum())
    what = (
        f"duplicate of row {twin[0]}" if len(twin) else f"before row {i - 1}: not sorted by time"
    )
    counts = f"in the file {copies} duplicate times, {disorder} rows earlier than the row before"
    way_out = REPAIR.format("--sort --drop-duplicates" if disorder else "--drop-duplicates")
    raise DataError(f"{_at(path, timestamp, i, 'timestamp')}: {what} ({counts}); {way_out}")


def _refuse(path, timestamp, bad, names, say, flag=""):
    """DataError about the first marked cell of (T, n) `bad`, if there is one; flag: mends it."""
    rows = np.flatnonzero(bad.any(1))
    if len(rows):
        i, c = rows[0], int(np.argmax(bad[rows[0]]))
        more = f" (and {len(rows) - 1} more such rows)" if len(rows) > 1 else ""
        way_out = f"; {REPAIR.format(flag)}" if flag else ""
        raise DataError(f"{_at(path, timestamp, i, names[c])}: {say(i, c)}{more}{way_out}")


def _at(path, timestamp, row, column):
    return f"{path}: row {row}, column '{column}', {iso(timestamp[row])}"


def iso(time) -> str:
    return pd.Timestamp(time).isoformat() + "Z"


def _line(error) -> str:
    return " ".join(str(error).split())


# -------------------------------------------------------------------- gaps, and what is implausible
def find_gaps(name: str, timestamp: np.ndarray) -> dict:
    """Holes in (T,) datetime64 times against their median spacing.

    {"name", "count" of gaps, "missing_bars" in all of them, "longest_bars" missing in the longest,
    "longest_at": time of the last bar before the longest, ISO with Z, None without gaps}. A gap is
    a step of 1.5 spacings or more.
    """
    steps = np.diff(timestamp).astype("timedelta64[ns]").astype(np.int64)
    missing = np.maximum(np.rint(steps / np.median(steps)).astype(np.int64) - 1, 0)
    longest = int(np.argmax(missing))
    return {
        "name": name,
        "count": int(np.count_nonzero(missing)),
        "missing_bars": int(missing.sum()),
        "longest_bars": int(missing[longest]),
        "longest_at": iso(timestamp[longest]) if missing[longest] else None,
    }


def describe_gaps(gap: dict) -> str:
    """One line about a dict of `find_gaps`."""
    if not gap["count"]:
        return f"{gap['name']}: no gaps"
    return (
        f"{gap['name']}: {gap['count']} gaps, {gap['missing_bars']} bars missing; "
        f"longest {gap['longest_bars']} bars after {gap['longest_at']}"
    )


def find_facts(name: str, timestamp: np.ndarray, ohlcv: np.ndarray) -> dict:
    """What one should know of (T, 5) bars before a run believes them; moves are simple returns.

    "largest_move" from close to close, its time, "far_moves" beyond FAR, "bounces": those of them
    that the next bar takes back, as it does after a bad tick; "largest_opening" from the last close
    to the open, its time, "far_openings"; "moving": the price moves at all; "volume": its one value
    where it is constant, else None.
    """
    close, volume = ohlcv[:, 3], ohlcv[:, 4]
    move = close[1:] / close[:-1] - 1.0
    opening = ohlcv[1:, 0] / close[:-1] - 1.0
    size = np.abs(np.log(close[1:] / close[:-1]))
    left = np.abs(np.log(close[2:] / close[:-2]))  # what is left of a move one bar later
    far = np.abs(move) > FAR
    row, at_open = int(np.argmax(size)), int(np.argmax(np.abs(np.log1p(opening))))
    return {
        "name": name,
        "largest_move": float(move[row]),
        "largest_move_at": iso(timestamp[row + 1]),
        "far_moves": int(far.sum()),
        "bounces": int((far[:-1] & (left < 0.25 * size[:-1])).sum()),
        "largest_opening": float(opening[at_open]),
        "largest_opening_at": iso(timestamp[at_open + 1]),
        "far_openings": int((np.abs(opening) > FAR).sum()),
        "moving": bool(np.ptp(close) > 0),
        "volume": float(volume[0]) if np.ptp(volume) == 0 else None,
    }


def describe_facts(facts: dict) -> list[str]:
    """Lines about a dict of `find_facts`: the largest move, then whatever is implausible."""
    name, limit = facts["name"], f"{FAR:.0%}"
    lines = [
        f"{name}: largest move of a bar {facts['largest_move']:+.2%} at {facts['largest_move_at']}"
    ]
    if facts["far_moves"]:
        lines.append(
            f"{name}: implausible: {facts['far_moves']} moves beyond {limit}, {facts['bounces']} "
            f"of them taken back by the next bar (a bad tick?)"
        )
    if facts["far_openings"]:
        lines.append(
            f"{name}: implausible: {facts['far_openings']} bars open more than {limit} from the "
            f"last close, the farthest {facts['largest_opening']:+.2%} at "
            f"{facts['largest_opening_at']}"
        )
    if not facts["moving"]:
        lines.append(f"{name}: implausible: the price never moves")
    if facts["volume"] is not None:
        lines.append(
            f"{name}: volume is {facts['volume']:g} in every bar: its columns carry nothing"
        )
    return lines


def print_facts(bars: Bars):
    """Gaps and implausible bars of every asset: what a run says before it believes its data."""
    for gap, facts in zip(bars.gaps, bars.facts):
        print(describe_gaps(gap))
        print("\n".join(describe_facts(facts)))


# --------------------------------------------------------------------------------- several files
def _align(path, times, ohlcv, clock_path, clock, fill_limit):
    """Rows of one asset on another's clock: (T, 5) values and (T,) bool: carried forward."""
    # the close of a longer bar is known only after the clock's bar has closed: a look ahead
    _same_length(path, times, clock_path, clock)
    step = np.median(np.diff(clock))
    row = np.searchsorted(times, clock, side="right") - 1
    if row[0] < 0:
        raise DataError(
            f"{path}: starts at {iso(times[0])}, {clock_path} at {iso(clock[0])}; "
            f"cut {clock_path} to start at {iso(times[0])} or get earlier bars of {path}"
        )
    age = (clock - times[row]) / step
    filled = age > 0.0
    if filled.all():
        raise DataError(
            f"{path}: no bar opens at the time of one of {clock_path} (first bar {iso(times[0])})"
        )
    late = np.flatnonzero(age > fill_limit)
    if len(late):
        i = late[0]
        raise DataError(
            f"{path}: no bar for {iso(clock[i])} (row {i} of {clock_path}): the last is {age[i]:g} "
            f"bars older ({iso(times[row[i]])}), the limit is {fill_limit} (and {len(late) - 1} more "
            f"rows); "
            f"--fill-limit {math.ceil(age.max())} would take them all"
        )
    out = ohlcv[row]
    out[filled, :4] = out[filled, 3:4]
    out[filled, 4] = 0.0
    return out, filled


def _same_length(path, times, other_path, other):
    own, length = _length(times), _length(other)
    if abs(own / length - 1.0) > 0.1:
        raise DataError(
            f"{path}: bars of {_span(own)}, {other_path} has {_span(length)}; resample one of them"
        )


def _length(times):
    """The commonest step: how long a bar is, also where an illiquid market leaves many out."""
    steps, counts = np.unique(np.diff(times), return_counts=True)
    return steps[np.argmax(counts)]


def _span(step) -> str:
    return str(pd.Timedelta(step)).removeprefix("0 days ")


# ---------------------------------------------------------------------------------------- splits
def split_rows(
    timestamp: np.ndarray, split: str, purge: int, first: int = 0, name: str = ""
) -> dict[str, tuple[int, int]]:
    """Half-open ranges of DECISION rows in time order: {"train": (start, stop), "eval", "test"}.

    timestamp  (T,) datetime64, sorted, UTC. A decision on row t earns bar t + 1: none on the last
    split      "0.70/0.15/0.15": shares of the T rows; "2023-01-01/2024-01-01": first UTC day of
               eval, of test
    purge      rows left out at the START of eval and of test, so that no window there touches a bar
               that an earlier split earned: at least window + horizon
    first      first usable row (feature warm-up + window - 1); train starts there
    name       of the file, for error messages

    Training may touch the bars [0, train stop]. DataError when a split has fewer than
    max(purge, 1) rows.
    """
    where = f"{name}: split '{split}'" if name else f"split '{split}'"
    shares, days = _parse_split(timestamp, split, where)
    if shares:
        rows = len(timestamp)
        borders = round(shares[0] * rows), round((shares[0] + shares[1]) * rows)
    else:
        borders = np.searchsorted(timestamp, days)
    return _ranges(len(timestamp), borders, purge, first, where)


def split_series(
    series: list[Bars], split: str, purge: int, first: int | list[int] = 0
) -> list[dict]:
    """`split_rows` of several series by ONE calendar border for all, whatever their histories.

    A network that learns from all of them then never sees a train row of one on a date that is eval
    or test in another. Shares are of the rows of all series together. DataError also when bars have
    different lengths.
    """
    firsts = [first] * len(series) if np.ndim(first) == 0 else first
    for bars in series[1:]:
        _same_length(bars.names[0], bars.timestamp, series[0].names[0], series[0].timestamp)
    clock, counts = np.unique(
        np.concatenate([bars.timestamp for bars in series]), return_counts=True
    )
    shares, days = _parse_split(clock, split, f"split '{split}'")
    if shares:
        before = np.cumsum(counts) - counts  # rows of all series before each time
        cuts = np.multiply((shares[0], shares[0] + shares[1]), counts.sum())
        days = [clock[np.argmin(np.abs(before - cut))] for cut in cuts]
    out = []
    for bars, start in zip(series, firsts):
        borders = np.searchsorted(bars.timestamp, days)
        dates = f"eval from {iso(days[0])}, test from {iso(days[1])}"
        where = f"{bars.names[0]}: split '{split}' ({dates})"
        way_out = f"its bars are {iso(bars.timestamp[0])} .. {iso(bars.timestamp[-1])}"
        out.append(_ranges(len(bars.timestamp), borders, purge, start, where, way_out))
    return out


def _ranges(rows, borders, purge, first, where, way_out=""):
    """Ranges of decision rows from the first row of eval and of test, before any purge."""
    if purge < 0 or first < 0:
        raise DataError(f"{where}: purge {purge} and first row {first} must be 0 or more")
    eval_row, test_row = (int(row) for row in borders)
    ranges = {
        "train": (first, eval_row),
        "eval": (eval_row + purge, test_row),
        "test": (test_row + purge, rows - 1),
    }
    need = max(purge, 1)
    for part, (start, stop) in ranges.items():
        if stop - start < need:
            least = first + need + 2 * (purge + need) + 1
            better = _possible_split(rows, purge, first)
            way_out = way_out or (
                f"--split {better} would do"
                if better
                else f"at least {least} bars are needed in all"
            )
            raise DataError(
                f"{where}: {part} has {max(stop - start, 0)} of {rows} rows (warm-up {first}, "
                f"purge {purge}), at least {need} are needed; {way_out}"
            )
    return ranges


def _possible_split(rows, purge, first):
    """Shares that give every split its rows, near the default's proportions; None if none do."""
    need = max(purge, 1)
    least = np.array([first + need, purge + need, purge + need + 1])
    spare = rows - least.sum()
    if spare < 0:
        return None
    train, middle, _ = (least + spare * np.array([0.7, 0.15, 0.15])) / rows
    for digits in (2, 3, 4, 6):
        shares = round(train, digits), round(middle, digits)
        eval_row, test_row = round(shares[0] * rows), round(sum(shares) * rows)
        sizes = np.array([eval_row, test_row - eval_row, rows - test_row])
        if (sizes >= least).all():
            return "/".join(f"{x:.{digits}f}" for x in (*shares, 1.0 - sum(shares)))
    return None


def _parse_split(timestamp, split, where):
    """Three shares and None, or None and two days within the times."""
    parts = split.split("/")
    usage = (
        "write 0.70/0.15/0.15 (shares of rows) or 2023-01-01/2024-01-01 (first days of eval, test)"
    )
    if len(parts) == 3:
        try:
            shares = [float(part) for part in parts]
        except ValueError:
            raise DataError(f"{where}: not three numbers; {usage}") from None
        if not all(0.0 < share < 1.0 for share in shares) or abs(sum(shares) - 1.0) > 1e-6:
            raise DataError(
                f"{where}: shares above 0 must sum to 1, these to {sum(shares):g}; {usage}"
            )
        return shares, None
    if len(parts) == 2 and all(DATE.fullmatch(part) for part in parts):
        try:
            days = [np.datetime64(part, "ns") for part in parts]
        except ValueError as error:
            raise DataError(f"{where}: {_line(error)}; {usage}") from None
        if days[0] >= days[1]:
            raise DataError(f"{where}: eval starts on {parts[0]}, not before test on {parts[1]}")
        for part, day in zip(parts, days):
            if not timestamp[0] < day <= timestamp[-1]:
                raise DataError(
                    f"{where}: {part} is outside {iso(timestamp[0])} .. {iso(timestamp[-1])}"
                )
        return None, days
    raise DataError(f"{where}: not understood; {usage}")
