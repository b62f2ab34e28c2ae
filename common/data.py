"""Bars from a source: load, validate, align, split.

One door for every market: `load_bars("synthetic:regime")`, `load_bars("BTC.parquet")` or, with the traded
asset first, `load_bars("BTC.parquet,ETH.csv")`. A file holds the columns of `COLUMNS`, one row a bar,
`timestamp` being the bar's OPEN time with a time zone. Whatever is wrong with a file is a `DataError` of one
line that names the file, the row (0 is the first bar), the column and the time. Nothing is repaired, sorted,
dropped or filled in silence.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from common import markets

COLUMNS = ("timestamp", "open", "high", "low", "close", "volume")
MIN_ROWS = 3  # two bars make a spacing, a third makes it a series
YEAR = np.timedelta64(31_557_600, "s").astype("timedelta64[ns]")  # Julian year, 365.25 days

DATE = re.compile(r"\d{4}-\d\d-\d\d")
ISO = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?")
OFFSET = re.compile(r"(Z|[+-]\d\d(:?\d\d)?)")


class DataError(ValueError):
    """Input that cannot be used; the message is one line, fit for stderr. Scripts exit 2 on it."""

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).splitlines()))


@dataclass(frozen=True, eq=False)
class Bars:
    """Bars of one or more assets on one clock; the first asset is the traded one.

    spec       as given to `load_bars`
    names      A asset names: the file's stem, or "synthetic:regime"
    timestamp  (T,) datetime64[ns], UTC, bar OPEN time, strictly increasing
    ohlcv      (A, T, 5) float64: open, high, low, close (price), volume
    filled     (A, T) bool: the row was carried forward from the asset's own past (never for asset 0)
    gaps       one dict an asset, see `find_gaps`; measured on the file itself, before any alignment
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

    @property
    def close(self) -> np.ndarray:
        """(T,) float64 close of the traded asset."""
        return self.ohlcv[0, :, 3]

    @property
    def next_return(self) -> np.ndarray:
        """(T,) float64: what a decision on row t earns, close[t+1] / close[t] - 1; NaN in the last row."""
        out = np.full(len(self.timestamp), np.nan)
        out[:-1] = self.close[1:] / self.close[:-1] - 1.0
        return out


# ---------------------------------------------------------------------------------------------- one source
def load_bars(spec: str, fill_limit: int = 24) -> Bars:
    """Bars of `spec`: "synthetic:MARKET[?key=value&...]", or .parquet and .csv files, comma-separated.

    The first file is traded and gives the clock. A row for which another file has no bar of its own takes the
    last one before it: open = high = low = close = its close, volume 0. That bar may be at most `fill_limit`
    bars (of the first file's median spacing) old. Raises DataError.
    """
    spec = str(spec)
    if fill_limit < 0:
        raise DataError(f"fill limit of {fill_limit} bars: it must be 0 or more")
    paths = [part.strip() for part in spec.split(",")]
    if not all(paths):
        raise DataError(f"data '{spec}': part {paths.index('')} is empty; give FILE or FILE,FILE")
    if any(path.startswith("synthetic:") for path in paths):
        if len(paths) > 1:
            raise DataError(f"data '{spec}': a synthetic market cannot be mixed with other parts")
        return _synthetic(paths[0])

    digest, seen, names, tables = hashlib.sha256(), {}, [], []
    for path in paths:
        raw = _read_bytes(path)
        key, name = hashlib.sha256(raw).digest(), Path(path).stem
        if key in seen:
            raise DataError(f"{path}: the same bars as {seen[key]}; give every file once")
        if name in names:
            raise DataError(f"{path}: a file named '{name}' was given before; rename one of them")
        seen[key] = path
        names.append(name)
        digest.update(raw)
        tables.append(read_bars(path, raw))

    clock, first = tables[0]
    ohlcv = np.empty((len(paths), len(clock), 5))
    filled = np.zeros((len(paths), len(clock)), bool)
    ohlcv[0] = first
    for a in range(1, len(paths)):
        ohlcv[a], filled[a] = _align(paths[a], *tables[a], paths[0], clock, fill_limit)
    gaps = tuple(find_gaps(name, times) for name, (times, _) in zip(names, tables, strict=True))
    return Bars(spec, tuple(names), clock, ohlcv, filled, gaps, digest.hexdigest(), _bars_per_year(clock))


def _synthetic(spec: str) -> Bars:
    from common import markets  # here, because it compiles kernels that files do not need

    try:
        law = markets.parse_law(spec)
        timestamp, ohlcv, truth = markets.generate(law)
    except ValueError as error:
        raise DataError(f"data {_line(error)}") from None
    timestamp = timestamp.astype("datetime64[ns]")
    check_bars(spec, timestamp, ohlcv)
    name = spec.partition("?")[0]
    sha = hashlib.sha256(timestamp.tobytes() + ohlcv.tobytes())
    filled = np.zeros((1, len(timestamp)), bool)
    gaps = (find_gaps(name, timestamp),)
    return Bars(
        spec, (name,), timestamp, ohlcv[None], filled, gaps, sha.hexdigest(), _bars_per_year(timestamp), truth
    )


def _bars_per_year(timestamp: np.ndarray) -> float:
    return float((len(timestamp) - 1) / ((timestamp[-1] - timestamp[0]) / YEAR))


# ---------------------------------------------------------------------------------------------- one file
def read_bars(path: str | Path, raw: bytes | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read and validate one .parquet or .csv file: (T,) datetime64[ns] UTC and (T, 5) float64 open..volume.

    `raw`: the file's bytes, so that what the caller hashed is what is parsed; None reads them. DataError.
    """
    raw = _read_bytes(path) if raw is None else raw
    read = _read_csv if Path(path).suffix.lower() == ".csv" else _read_parquet
    timestamp, ohlcv = read(path, raw)
    check_bars(path, timestamp, ohlcv)
    return timestamp, ohlcv


def _read_bytes(path: str | Path) -> bytes:
    if Path(path).suffix.lower() not in (".parquet", ".csv"):
        raise DataError(f"{path}: unknown kind of file '{Path(path).suffix}'; bars come as .parquet or .csv")
    try:
        return Path(path).expanduser().read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file (looked from {Path.cwd()})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _read_parquet(path, raw):
    try:
        # without pandas' metadata an index that was saved as `timestamp` is a column like any other
        table = pq.read_table(io.BytesIO(raw))
        table.validate(full=True)
        names = table.column_names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable parquet file: {_line(error)[:200]}") from None
    _check_columns(path, names)
    time = table["timestamp"]
    if pa.types.is_timestamp(time.type):
        if time.type.tz is None:
            raise DataError(
                f"{path}: column 'timestamp' has no time zone; use .dt.tz_localize('UTC') if it is UTC"
            )
        try:
            timestamp = time.cast(pa.timestamp("ns", "UTC")).to_numpy().astype("datetime64[ns]")
        except pa.ArrowInvalid as error:
            raise DataError(f"{path}: column 'timestamp' does not fit nanoseconds: {_line(error)}") from None
    elif pa.types.is_string(time.type) or pa.types.is_large_string(time.type):
        timestamp = _parse_times(path, ["" if x is None else x for x in time.to_pylist()])
    elif pa.types.is_integer(time.type):
        raise DataError(_epoch(path, str(time[0]) if len(time) else "0"))
    else:
        raise DataError(f"{path}: column 'timestamp' has type {time.type}, not a time with a time zone")
    ohlcv = np.empty((len(table), 5))
    for c, name in enumerate(COLUMNS[1:]):
        kind = table[name].type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind)):
            raise DataError(f"{path}: column '{name}' has type {kind}, not a number")
        ohlcv[:, c] = table[name].cast(pa.float64(), safe=False).to_numpy()
    return timestamp, ohlcv


def _read_csv(path, raw):
    try:
        rows = list(csv.reader(io.StringIO(raw.decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a readable CSV file: {_line(error)}") from None
    while rows and not rows[-1]:
        rows.pop()
    if not rows:
        raise DataError(f"{path}: empty; the first line must be {','.join(COLUMNS)}")
    header = [name.strip() for name in rows.pop(0)]
    _check_columns(path, header)
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise DataError(f"{path}: row {i} has {len(row)} fields, the header has {len(header)}")
    where = {name: header.index(name) for name in COLUMNS}
    timestamp = _parse_times(path, [row[where["timestamp"]].strip() for row in rows])
    ohlcv = np.empty((len(rows), 5))
    for c, name in enumerate(COLUMNS[1:]):
        j = where[name]
        for i, row in enumerate(rows):
            try:
                ohlcv[i, c] = float(row[j])
            except ValueError:
                found = f"{row[j][:40]!r} is not a number" if row[j].strip() else "is empty"
                raise DataError(f"{_at(path, timestamp, i, name)}: {found}") from None
    return timestamp, ohlcv


def _check_columns(path, found):
    missing = [name for name in COLUMNS if name not in found]
    extra = [name for i, name in enumerate(found) if name not in COLUMNS or name in found[:i]]
    if missing or extra:
        found = [("missing", missing), ("extra", extra)]
        what = " and ".join(
            f"{kind} {', '.join(repr(name[:40]) for name in names)}" for kind, names in found if names
        )
        raise DataError(f"{path}: columns {what}; bars have exactly {', '.join(COLUMNS)}")


def _parse_times(path, texts):
    """ISO 8601 strings, each with its own offset or Z, to datetime64[ns] UTC."""
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
            raise DataError(f"{at}: {text!r} has no time zone; write {zoned} if it is UTC")
        raise DataError(f"{at}: {text[:40]!r} is not a time; write 2024-01-31T09:00:00Z")
    parsed = pd.to_datetime(pd.Series(texts, dtype=object), format="ISO8601", utc=True, errors="coerce")
    # numpy wraps years that do not fit 64 bits of nanoseconds around, in silence
    bad = np.flatnonzero(parsed.isna() | (parsed.dt.year < 1678) | (parsed.dt.year > 2261))
    if len(bad):
        raise DataError(
            f"{path}: row {bad[0]}, column 'timestamp': {texts[bad[0]]!r} is no date in 1678 .. 2261"
        )
    return parsed.dt.tz_convert("UTC").dt.tz_localize(None).to_numpy().astype("datetime64[ns]")


def _epoch(path, text, row=0):
    unit = {10: "s", 13: "ms", 16: "us", 19: "ns"}.get(len(text.lstrip("+-").partition(".")[0]), "ms")
    return (
        f"{path}: row {row}, column 'timestamp': {text[:40]} is an epoch, its unit a guess; "
        f"convert it: pd.to_datetime(df['timestamp'], unit='{unit}', utc=True)"
    )


# ---------------------------------------------------------------------------------------------- validation
def check_bars(path: str | Path, timestamp: np.ndarray, ohlcv: np.ndarray) -> None:
    """DataError on the first impossible bar of (T,) datetime64 and (T, 5) float64 open..volume of `path`."""
    if len(timestamp) < MIN_ROWS:
        raise DataError(f"{path}: {len(timestamp)} rows, at least {MIN_ROWS} are needed")
    unset = np.flatnonzero(np.isnat(timestamp))
    if len(unset):
        raise DataError(f"{path}: row {unset[0]}, column 'timestamp': is empty")
    back = np.flatnonzero(np.diff(timestamp) <= np.timedelta64(0, "ns"))
    if len(back):
        i = back[0] + 1
        twin = np.flatnonzero(timestamp[:i] == timestamp[i])
        what = f"duplicate of row {twin[0]}" if len(twin) else f"before row {i - 1}: not sorted by time"
        raise DataError(f"{_at(path, timestamp, i, 'timestamp')}: {what}")
    bad = ~np.isfinite(ohlcv)
    _refuse(path, timestamp, bad, lambda i, c: f"{ohlcv[i, c]} is not finite")
    bad = ohlcv <= 0.0
    bad[:, 4] = ohlcv[:, 4] < 0.0
    wrong = ("not positive",) * 4 + ("negative",)
    _refuse(path, timestamp, bad, lambda i, c: f"{ohlcv[i, c]:g} is {wrong[c]}")
    low, high = ohlcv[:, 2], ohlcv[:, 1]
    bad = np.zeros_like(bad)
    bad[:, 1] = high < low
    _refuse(path, timestamp, bad, lambda i, c: f"{high[i]:.12g} is below low {low[i]:.12g}")
    for c in (0, 3):
        bad[:, c] = (ohlcv[:, c] < low) | (ohlcv[:, c] > high)
    _refuse(
        path, timestamp, bad, lambda i, c: f"{ohlcv[i, c]:.12g} is outside {low[i]:.12g} .. {high[i]:.12g}"
    )


def _refuse(path, timestamp, bad, say):
    """DataError about the first marked cell of (T, 5) `bad`, if there is one."""
    rows = np.flatnonzero(bad.any(1))
    if len(rows):
        i, c = rows[0], int(np.argmax(bad[rows[0]]))
        more = f" (and {len(rows) - 1} more such rows)" if len(rows) > 1 else ""
        raise DataError(f"{_at(path, timestamp, i, COLUMNS[c + 1])}: {say(i, c)}{more}")


def _at(path, timestamp, row, column):
    return f"{path}: row {row}, column '{column}', {_iso(timestamp[row])}"


def _iso(time) -> str:
    return pd.Timestamp(time).isoformat() + "Z"


def _line(error) -> str:
    return " ".join(str(error).split())


def find_gaps(name: str, timestamp: np.ndarray) -> dict:
    """Holes in (T,) datetime64 times against their median spacing.

    {"name", "count" of gaps, "missing_bars" in all of them, "longest_bars" missing in the longest,
    "longest_at": time of the last bar before the longest, ISO with Z, None without gaps}. A gap is a step of
    1.5 spacings or more.
    """
    steps = np.diff(timestamp).astype("timedelta64[ns]").astype(np.int64)
    missing = np.maximum(np.rint(steps / np.median(steps)).astype(np.int64) - 1, 0)
    longest = int(np.argmax(missing))
    return {
        "name": name,
        "count": int(np.count_nonzero(missing)),
        "missing_bars": int(missing.sum()),
        "longest_bars": int(missing[longest]),
        "longest_at": _iso(timestamp[longest]) if missing[longest] else None,
    }


def describe_gaps(gap: dict) -> str:
    """One line about a dict of `find_gaps`."""
    if not gap["count"]:
        return f"{gap['name']}: no gaps"
    return (
        f"{gap['name']}: {gap['count']} gaps, {gap['missing_bars']} bars missing; "
        f"longest {gap['longest_bars']} bars after {gap['longest_at']}"
    )


# ---------------------------------------------------------------------------------------------- several files
def _align(path, times, ohlcv, clock_path, clock, fill_limit):
    """Rows of one asset on another's clock: (T, 5) values and (T,) bool of those carried forward."""
    length, own = _length(clock), _length(times)
    # the close of a longer bar is known only after the clock's bar has closed: it would be a look ahead
    if abs(own / length - 1.0) > 0.1:
        raise DataError(
            f"{path}: bars of {_span(own)}, {clock_path} has {_span(length)}; resample one of them"
        )
    step = np.median(np.diff(clock))
    row = np.searchsorted(times, clock, side="right") - 1
    if row[0] < 0:
        raise DataError(
            f"{path}: starts at {_iso(times[0])}, {clock_path} at {_iso(clock[0])}; "
            f"cut {clock_path} to start at {_iso(times[0])} or get earlier bars of {path}"
        )
    age = (clock - times[row]) / step
    filled = age > 0.0
    if filled.all():
        raise DataError(
            f"{path}: no bar opens at the time of one of {clock_path} (first bar {_iso(times[0])})"
        )
    late = np.flatnonzero(age > fill_limit)
    if len(late):
        i = late[0]
        raise DataError(
            f"{path}: no bar for {_iso(clock[i])} (row {i} of {clock_path}): the last is {age[i]:g} bars "
            f"older ({_iso(times[row[i]])}), the fill limit is {fill_limit} (and {len(late) - 1} more rows)"
        )
    out = ohlcv[row]
    out[filled, :4] = out[filled, 3:4]
    out[filled, 4] = 0.0
    return out, filled


def _length(times):
    """The commonest step: how long a bar is, also where an illiquid market leaves many out."""
    steps, counts = np.unique(np.diff(times), return_counts=True)
    return steps[np.argmax(counts)]


def _span(step) -> str:
    return str(pd.Timedelta(step)).removeprefix("0 days ")


# ---------------------------------------------------------------------------------------------- splits
def split_rows(timestamp: np.ndarray, split: str, purge: int, first: int = 0) -> dict[str, tuple[int, int]]:
    """Half-open ranges of DECISION rows {"train": (start, stop), "eval": ..., "test": ...} in time order.

    timestamp  (T,) datetime64, sorted, UTC. A decision on row t earns bar t + 1: no range goes beyond T - 1
    split      "0.70/0.15/0.15": shares of the T rows; "2023-01-01/2024-01-01": first UTC day of eval, of test
    purge      rows left out at the START of eval and of test, so that no window there touches a bar that an
               earlier split earned: at least window + horizon
    first      first usable row (feature warm-up + window - 1); train starts there

    Training may touch the bars [0, train stop]. DataError when a split has fewer than max(purge, 1) rows.
    """
    rows = len(timestamp)
    if purge < 0 or first < 0:
        raise DataError(f"split '{split}': purge {purge} and first row {first} must be 0 or more")
    eval_row, test_row = _borders(timestamp, split)
    ranges = {
        "train": (first, eval_row),
        "eval": (eval_row + purge, test_row),
        "test": (test_row + purge, rows - 1),
    }
    need = max(purge, 1)
    for name, (start, stop) in ranges.items():
        if stop - start < need:
            raise DataError(
                f"split '{split}': {name} has {max(stop - start, 0)} of {rows} rows (warm-up {first}, purge "
                f"{purge}), at least {need} are needed; give more bars or another split"
            )
    return ranges


def _borders(timestamp, split):
    """First row of eval and of test, before any purge."""
    parts, rows = split.split("/"), len(timestamp)
    usage = "write 0.70/0.15/0.15 (shares of rows) or 2023-01-01/2024-01-01 (first day of eval and of test)"
    if len(parts) == 3:
        try:
            shares = [float(part) for part in parts]
        except ValueError:
            raise DataError(f"split '{split}': not three numbers; {usage}") from None
        if not all(0.0 < share < 1.0 for share in shares) or abs(sum(shares) - 1.0) > 1e-6:
            raise DataError(
                f"split '{split}': shares above 0 must sum to 1, these to {sum(shares):g}; {usage}"
            )
        return round(shares[0] * rows), round((shares[0] + shares[1]) * rows)
    if len(parts) == 2 and all(DATE.fullmatch(part) for part in parts):
        try:
            days = [np.datetime64(part, "ns") for part in parts]
        except ValueError as error:
            raise DataError(f"split '{split}': {_line(error)}; {usage}") from None
        if days[0] >= days[1]:
            raise DataError(f"split '{split}': eval starts on {parts[0]}, not before test on {parts[1]}")
        for part, day in zip(parts, days, strict=True):
            if not timestamp[0] < day <= timestamp[-1]:
                raise DataError(
                    f"split '{split}': {part} is outside {_iso(timestamp[0])} .. {_iso(timestamp[-1])}"
                )
        return tuple(int(np.searchsorted(timestamp, day)) for day in days)
    raise DataError(f"split '{split}': not understood; {usage}")
