r"""Import the files that traders have into the parquet that every script here reads.

    python scripts/import_bars.py BTCUSDT-1m-2024-*.zip --out data/BTCUSDT_1m.parquet
    python scripts/import_bars.py EURUSD_M1.csv --tz America/New_York+7 --resample 1h \
        --out data/EURUSD_1h.parquet

It tells a file by its content, says what it is and what was assumed, and asks for a flag where it
would have to guess. Several files are parts of one series, in the order given; a file with a column
of symbols becomes one parquet a symbol, OUT_SYMBOL.parquet. Nothing is repaired without a flag, and
nothing is written before every check has passed. Exits 0 when all files stand, 2 on a bad flag or
bad bars.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import re
import sys
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import data  # noqa: E402
from common.run import UsageError, exit_with, refuse  # noqa: E402

HEAD = 1 << 16  # bytes that tell what a file is
BLOCK = 8 << 20  # bytes of text parsed at a time
SEPARATORS = (",", ";", "\t", "|")
EMPTY = ["", "nan", "NaN", "null", "NULL", "None", "NA", "N/A", "#N/A", "-"]
PRICES = ("open", "high", "low", "close")
VALUES = (*PRICES, "volume")
ROLES = ("timestamp", "date", "time", *VALUES, "symbol", "skip")

INDEX = "index level 0"  # pandas' own, in a parquet
# what columns are called, in small letters and without < > _
CALLED = {
    "timestamp": "timestamp, datetime, date/time, unix, unix timestamp, open time, gmt time,"
    f" local time, utc time, window start, {INDEX}, ts, t",
    "date": "date, day",
    "time": "time",
    "open": "open, o",
    "high": "high, h",
    "low": "low, l",
    "close": "close, c",
    "volume": "v, tickvol, tick volume",
    "symbol": "symbol, ticker, pair, instrument",
}
ROLE_OF = {word.strip(): role for role, words in CALLED.items() for word in words.split(",")}

# kind, columns that tell it, zone of its times (None: the file does not say), price side
KINDS = (
    ("MetaTrader 5", {"date", "tickvol"}, None, "bid"),
    ("stooq", {"ticker", "per", "date"}, None, "trades"),
    ("Yahoo", {"date", "adj close"}, None, "trades"),
    ("Dukascopy", {"gmt time"}, "UTC", ""),
    ("Dukascopy", {"local time"}, None, ""),
    ("Kaggle's Bitcoin minutes", {"timestamp", "volume (btc)"}, "UTC", "trades"),
    ("Binance klines", {"open time", "close time", "ignore"}, "UTC", "trades"),
    ("CryptoDataDownload", {"cryptodatadownload"}, "UTC", "trades"),
    ("CryptoDataDownload", {"unix", "date", "symbol"}, "UTC", "trades"),
    ("polygon", {"window start"}, "UTC", "trades"),
    ("polygon", {"t", "o", "h", "l", "c"}, "UTC", "trades"),
)
# kind, its first row (fields joined by |), its columns, zone, price side
NUMBER = r"[\d.,]+"
HEADERLESS = (
    (
        "Binance klines",
        rf"\d{{13,16}}(\|{NUMBER}){{5}}\|\d{{13,16}}(\|{NUMBER}){{5}}",
        ("timestamp", *VALUES, *["skip"] * 6),
        "UTC",
        "trades",
    ),
    ("HistData", rf"\d{{8}} \d{{6}}(\|{NUMBER}){{5}}", ("timestamp", *VALUES), "-05:00", "bid"),
    (
        "MetaTrader 4",
        rf"\d{{4}}\.\d\d\.\d\d\|\d\d:\d\d(\|{NUMBER}){{5}}",
        ("date", "time", *VALUES),
        None,
        "bid",
    ),
)
ASK_ZONE = {
    "MetaTrader": "the broker's time, which is not UTC; most have midnight at 17:00 in New York: "
    "--tz America/New_York+7, others --tz Europe/Athens "
    "(HistData's files for MetaTrader: --tz UTC-5)",
    "Yahoo": "days of the exchange: --tz America/New_York, --tz UTC for crypto",
    "stooq": "times of an exchange: --tz UTC, --tz Europe/Warsaw, --tz America/New_York",
}
# a time is one of these, then a fraction and a zone or neither
DATES = ("%Y-%m-%d", "%Y.%m.%d", "%d.%m.%Y", "%Y%m%d")
CLOCKS = ("", " %H:%M", " %H:%M:%S", "T%H:%M", "T%H:%M:%S", " %H%M%S", " %I-%p")
TAIL = re.compile(r"(\.\d{1,9})? ?(Z|GMT|UTC)?([+-]\d\d(?::?\d\d)?)?")
EPOCH = re.compile(r"\d{8,19}(\.\d*)?")
UNITS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
FORMS = [day + clock for day in DATES for clock in CLOCKS]
MAGIC = {b"PAR1": "parquet", b"ARROW1": "feather", b"FEA1": "feather"}
BY_NAME = "columns by name"
FIRST, LAST = (
    315_532_800,
    4_102_444_800,
)  # 1980 and 2100, between which the size of an epoch tells its unit

DAMAGE = (
    EOFError,
    zlib.error,
    gzip.BadGzipFile,
    zipfile.BadZipFile,
    pa.ArrowException,
    UnicodeError,
)
# column, what is wrong, where
IMPOSSIBLE = (
    ("open", "is not positive", "open <= 0"),
    ("high", "is not positive", "high <= 0"),
    ("low", "is not positive", "low <= 0"),
    ("close", "is not positive", "close <= 0"),
    ("volume", "is negative", "volume < 0"),
    ("high", "is below low", "high < low"),
    ("open", "is outside low .. high", "open < low | open > high"),
    ("close", "is outside low .. high", "close < low | close > high"),
)


# ------------------------------------------------------------------------------------------- flags
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message)


def parse(argv):
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    add = parser.add_argument
    add("files", metavar="FILE", nargs="+", type=Path, help="csv, txt, feather, parquet; gz or zip")
    add("--out", type=Path, required=True, help="the parquet to write")
    layout = parser.add_argument_group("what a file does not say")
    add = layout.add_argument
    add(
        "--tz",
        help="zone of its times: UTC, Europe/Athens, UTC-5, America/New_York+7 (hours ahead)",
    )
    add("--columns", help=f"its columns in order, of {', '.join(ROLES)}")
    add("--separator", help="between columns: , ; | or tab")
    add("--unit", choices=UNITS, help="of its epochs")
    add("--time-format", help="of its times, as strptime has it: '%%d/%%m/%%Y %%H:%%M'")
    add("--symbols", help="import these only, with commas")
    repairs = parser.add_argument_group("repairs, each of them counted")
    add = repairs.add_argument
    cut = "rows with an empty value, and with --resample a cut bar at the ends"
    add("--drop-incomplete", action="store_true", help=cut)
    impossible = "rows with prices outside of low .. high or not positive"
    add("--drop-impossible", action="store_true", help=impossible)
    add("--sort", action="store_true", help="by time")
    add("--drop-duplicates", action="store_true", help="rows that say the same again")
    add("--keep", choices=("first", "last"), help="of rows with one time and different values")
    add("--resample", help="longer bars: 5m, 1h, 4h, 1d (of the UTC day)")
    args = parser.parse_args(argv)
    usage = f"--columns {args.columns}: of {', '.join(ROLES)}"
    columns = (args.columns or "skip").split(",")
    refuse(
        (args.out.suffix != ".parquet", f"--out {args.out}: must end in .parquet"),
        (args.keep and not args.drop_duplicates, "--keep goes with --drop-duplicates"),
        (set(columns) - set(ROLES), usage),
    )
    if args.separator:
        args.separator = {"tab": "\t", r"\t": "\t"}.get(args.separator, args.separator)
        refuse((args.separator not in SEPARATORS, f"--separator {args.separator}: , ; | or tab"))
    args.zone = parse_zone(args.tz) if args.tz else None
    args.rule = parse_rule(args.resample) if args.resample else None
    return args


def parse_zone(text: str):
    """A zone's name or offset, and the hours that its clock is set ahead: (tzinfo, Timedelta)."""
    ahead = pd.Timedelta(0)
    offset = re.fullmatch(r"([+-])(\d\d):?(\d\d)", text)
    if offset:
        sign, hours, minutes = offset.groups()
        return "UTC", pd.Timedelta(f"{sign}{hours}:{minutes}:00")
    try:
        return ZoneInfo(text), ahead
    except (ValueError, OSError, KeyError):
        pass
    try:
        name, hours = re.fullmatch(r"(\w.*?)([+-]\d{1,2})", text).groups()
        return ZoneInfo(name), pd.Timedelta(hours=int(hours))
    except (ValueError, OSError, KeyError, AttributeError):
        way_out = "write UTC, Europe/Athens, UTC-5 or America/New_York+7"
        raise UsageError(f"--tz {text!r} is no time zone; {way_out}") from None


def parse_rule(text: str) -> int:
    """Nanoseconds of a bar of --resample."""
    found = re.fullmatch(r"(\d+)(m|min|h|d|D)", text)
    minutes = {"m": 1, "min": 1, "h": 60, "d": 1440, "D": 1440}
    length = int(found[1]) * minutes[found[2]] if found else 0
    good = length and 1440 % length == 0
    refuse((not good, f"--resample {text}: a divisor of a day, as 5m, 1h, 4h or 1d"))
    return length * 60 * 10**9


# ----------------------------------------------------------------------------------- what a file is
@dataclass
class Layout:
    """How a file is laid out, told by its first rows.

    zone   of its times where its publisher says so; None: it must be asked for
    names  of all columns; roles: {role: place of its column}
    """

    kind: str
    zone: str | None
    side: str
    names: list[str]
    roles: dict[str, int]
    form: str = "text"
    separator: str = ","
    encoding: str = "utf8"
    skip: int = 0
    comma: bool = False  # 1,25 is a price
    notes: list[str] = field(default_factory=list)


def open_raw(path: Path):
    """The file's bytes, unpacked."""
    raw = path.expanduser().open("rb")
    magic = raw.read(4)
    raw.seek(0)
    if magic[:2] == b"\x1f\x8b":
        return gzip.open(raw)
    if magic != b"PK\x03\x04":
        return raw
    archive = zipfile.ZipFile(raw)
    names = [name for name in archive.namelist() if not name.endswith("/")]
    refuse((len(names) != 1, f"{path}: holds {len(names)} files; unpack it, give those you mean"))
    return archive.open(names[0])


def find_layout(path: Path, args) -> Layout:
    with open_raw(path) as raw:
        head = raw.read(HEAD)
    refuse((not head.strip(), f"{path}: is empty"))
    for magic, form in MAGIC.items():
        if head.startswith(magic):
            return arrow_layout(path, form, args)
    return text_layout(path, head, args)


def arrow_layout(path: Path, form: str, args) -> Layout:
    refuse((args.separator, f"--separator: {path} is a {form} file"))
    schema = next(read_arrow(path, form)).schema
    names = [re.sub("^__|__$", "", name) for name in schema.names]
    layout = by_given(path, names, args) if args.columns else by_header(path, names)
    layout.form = form
    if set(names) == {"date", *VALUES} and form == "feather":
        layout.kind, layout.side = "freqtrade", "trades"
    return layout


def text_layout(path: Path, head: bytes, args) -> Layout:
    wide = head[:2] in (b"\xff\xfe", b"\xfe\xff")
    text = head.decode("utf-16" if wide else "utf-8-sig", errors="replace")
    json_way = f"{path}: JSON is not read; save it as CSV or feather"
    refuse((text.lstrip()[:1] in ("[", "{"), json_way))
    lines = text.splitlines()[:50]
    separator, rows = split(path, lines, args.separator)
    width = commonest_width(rows)
    header = next(i for i, row in enumerate(rows) if len(row) == width)
    above = " ".join(lines[:header])
    skip = header
    while skip < len(rows) and is_heading(rows[skip]):
        skip += 1
    refuse((skip == len(rows), f"{path}: no row of numbers in its first {len(lines)} lines"))
    first = [cell.strip() for cell in rows[skip]]
    if args.columns:
        layout = by_given(path, first, args)
    elif skip == header:
        layout = by_first_row(path, first)
    else:
        names = rows[header]
        yfinance = names[0] == "Price" and rows[header + 1][0] == "Ticker"
        layout = by_header(path, ["Date", *names[1:]] if yfinance else names, above)
        if yfinance:
            layout.kind, layout.side = "Yahoo", "trades"
    if above:
        layout.notes.append(f"left out the text above its columns: {above[:80]}")
    layout.separator, layout.skip = separator, skip
    layout.encoding = "utf-16" if wide else "utf8"
    layout.comma = bool(re.fullmatch(r"\d+,\d+", first[layout.roles["open"]]))
    return layout


def is_number(text: str) -> bool:
    return bool(re.fullmatch(r"\s*[+-]?\d+([.,]\d*)?([eE][+-]?\d+)?\s*", text))


def is_heading(row: list[str]) -> bool:
    return not any(map(is_number, row)) and not re.search(r"\d", row[0])


def split(path: Path, lines: list[str], given: str | None) -> tuple[str, list]:
    """The separator, and the lines split by it; UsageError where there is not just one."""
    found = {}
    for separator in [given] if given else SEPARATORS:
        rows = list(csv.reader(lines, delimiter=separator))
        width = commonest_width(rows)
        numbers = max(sum(map(is_number, row)) for row in rows)
        if width >= 5 and numbers >= 4:
            found[separator] = rows
    names = " or ".join(repr(separator) for separator in found)
    none = f"{path}: no rows of a time and four prices in its first {len(lines)} lines"
    refuse(
        (not found, f"{none}; --separator says what stands between columns"),
        (len(found) > 1, f"{path}: separated by {names}? --separator says by which"),
    )
    return found.popitem()


def commonest_width(rows: list[list[str]]) -> int:
    widths = [len(row) for row in rows if row]
    return max(set(widths), key=widths.count)


def by_given(path: Path, first: list[str], args) -> Layout:
    """Columns as --columns names them."""
    columns = args.columns.split(",")
    count = f"--columns names {len(columns)} columns, {path} has {len(first)}: {', '.join(first)}"
    roles = {role: place for place, role in enumerate(columns) if role != "skip"}
    twice = len(roles) + columns.count("skip") < len(columns)
    refuse(
        (len(columns) != len(first), count),
        (twice, f"--columns {args.columns}: names a column twice"),
    )
    return finish(path, Layout("columns as given", None, "", columns, roles))


def by_first_row(path: Path, first: list[str]) -> Layout:
    """Without a header: a kind that its first row tells."""
    row = "|".join(first)
    for kind, pattern, columns, zone, side in HEADERLESS:
        if re.fullmatch(pattern, row):
            roles = {role: place for place, role in enumerate(columns) if role != "skip"}
            return finish(path, Layout(kind, zone, side, list(columns), roles))
    what = f"{path}: columns without names, the first row is {', '.join(first)[:120]}"
    usage = "--columns timestamp,open,high,low,close,volume says what they are"
    raise UsageError(f"{what}; {usage}")


def by_header(path: Path, names: list[str], above: str = "") -> Layout:
    """A kind that the names of its columns tell, or the text above them; or columns by name."""
    words = [re.sub(r"[<>]", "", name).replace("_", " ").strip().lower() for name in names]
    kind = BY_NAME, None, ""
    if "cryptodatadownload" in above.lower():
        words.append("cryptodatadownload")
    for name, needed, zone, side in reversed(KINDS):
        if needed <= set(words):
            kind = name, zone, side
    roles, volumes = {}, []
    times = [word for word in words[: len(names)] if ROLE_OF.get(word) in ("timestamp", "date")]
    for place, word in enumerate(words[: len(names)]):
        role = ROLE_OF.get(word)
        if word == INDEX and len(times) > 1:  # numbers of the rows that pandas kept
            continue
        zoned = re.fullmatch(r"time \(([\w/]+)\)", word)  # JForex
        if zoned:
            role, kind = "timestamp", ("Dukascopy", zoned[1].upper(), "")
        if word.startswith("vol") or role == "volume":
            volumes.append(place)
            continue
        twice = f"{names[roles.get(role, 0)]!r} and {names[place]!r} could both be its {role}"
        refuse((role in roles, f"{path}: columns {twice}; --columns says which"))
        if role:
            roles[role] = place
    exact = [place for place in volumes if words[place] == "volume"]
    several = len(volumes) > 1 and len(exact) != 1
    which = ", ".join(repr(names[place]) for place in volumes)
    unsure = several and kind[0] == BY_NAME
    refuse((unsure, f"{path}: columns {which} could all be its volume; --columns says which"))
    if volumes:
        roles["volume"] = (exact or volumes)[0]
    layout = Layout(*kind, names, roles)
    if several:
        layout.notes.append(f"volume is its column {names[roles['volume']]!r} (of {which})")
    return finish(path, layout)


def finish(path: Path, layout: Layout) -> Layout:
    """Check that there is a time and four prices."""
    roles = layout.roles
    if "timestamp" in roles:
        roles.pop("date", None)
        roles.pop("time", None)
    elif not {"date", "time"} <= set(roles):
        alone = roles.pop("date", roles.pop("time", None))
        if alone is not None:
            roles["timestamp"] = alone
    wanted = PRICES if "date" in roles else ("timestamp", *PRICES)
    missing = ", ".join(role for role in wanted if role not in roles)
    found = ", ".join(layout.names)[:200]
    refuse((missing, f"{path}: no column is its {missing}, of {found}; --columns says which"))
    if "volume" not in roles:
        layout.notes.append("it has no volume: 0 in every bar")
    if layout.kind == "Dukascopy":
        side = re.search("bid|ask", path.name.lower())
        layout.side = f"{side[0]} (by its name)" if side else ""
    return layout


# ------------------------------------------------------------------------------------------- times
class Clock:
    """Turns the times of one file into UTC, all in the form that the first one has."""

    def __init__(self, path: Path, layout: Layout, args):
        self.path, self.layout, self.args = path, layout, args
        self.form = None  # of the first time: "epoch", "typed", "given", or a strptime format
        self.zoned = None  # every time carries its zone, or none does
        self.units = set()

    def utc(self, column: pa.Array, row: int) -> np.ndarray:
        """(n,) datetime64[ns], NaT where empty; `row` is the file's first of this column."""
        if self.form is None:
            self.form = self.find_form(column)
            if self.form is None:
                return np.full(len(column), np.datetime64("NaT", "ns"))
        if self.form == "typed":
            return self.typed(column, row)
        if self.form == "epoch":
            return self.epochs(column, row)
        if self.form == "given":
            return self.given(column, row)
        return self.text(column, row)

    def find_form(self, column):
        if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
            return "typed"
        if self.args.time_format:
            return "given"
        column = column.drop_null()
        if not len(column):
            return None
        first = str(column[0])
        for form in FORMS:
            match = re.match(pattern_of(form), first)
            if match and TAIL.fullmatch(first[match.end() :]):
                return form
        if EPOCH.fullmatch(first) or (self.args.unit and is_number(first)):
            return "epoch"
        why = f"{self.path}: its first time, {first[:40]!r}, has no known form"
        raise UsageError(
            f"{why}; say it with --time-format '%d/%m/%Y %H:%M', or --unit of an epoch"
        )

    def typed(self, column, row):
        times = column.cast(pa.timestamp("ns", getattr(column.type, "tz", None)))
        naive = times.to_numpy(zero_copy_only=False).astype("datetime64[ns]")
        if getattr(column.type, "tz", None):
            return self.known_zone(naive)
        return self.localize(naive, row)

    def epochs(self, column, row):
        """Their size tells the unit: from 1980 to 2100 no two units overlap."""
        whole = pa.types.is_integer(column.type)
        if not whole:
            text = column.cast(pa.string())
            whole = not pc.any(pc.match_substring(text, ".")).as_py()
        try:
            numbers = column.cast(pa.int64() if whole else pa.float64())
        except pa.ArrowInvalid:
            bad = first_bad_number(column)
            raise self.unlike(bad + row, column[bad]) from None
        empty = numbers.is_null().to_numpy(zero_copy_only=False)
        numbers = numbers.fill_null(0).to_numpy(zero_copy_only=False)
        scale = np.zeros(len(numbers), np.int64)
        for unit, length in UNITS.items():
            a_second = 10**9 // length
            fits = (numbers >= FIRST * a_second) & (numbers <= LAST * a_second)
            if self.args.unit:
                fits = np.full(len(numbers), unit == self.args.unit)
            scale[fits & ~empty] = length
            if (fits & ~empty).any():
                self.units.add(unit)
        odd = np.flatnonzero((scale == 0) & ~empty)
        if len(odd):
            what = (
                f"row {odd[0] + row}: {numbers[odd[0]]} is no epoch from 1980 to 2100 in any unit"
            )
            raise UsageError(f"{self.path}: {what}; --unit says which it is")
        # a double holds milliseconds exactly, not nanoseconds
        times = numbers * scale if whole else np.rint(numbers * (scale / 1e6)) * 1e6
        times = times.astype(np.int64).astype("datetime64[ns]")
        times[empty] = np.datetime64("NaT")
        return self.known_zone(times)

    def given(self, column, row):
        form, zoned = self.args.time_format, "%z" in self.args.time_format
        text = column.cast(pa.string()).to_pandas()
        try:
            times = pd.to_datetime(text, format=form, errors="coerce", utc=zoned)
        except ValueError as error:
            raise UsageError(f"--time-format {form!r}: {error}") from None
        self.refuse_unlike(times.isna().to_numpy() & text.notna().to_numpy(), column, row)
        naive = times.dt.tz_localize(None).to_numpy().astype("datetime64[ns]")
        return self.known_zone(naive) if zoned else self.localize(naive, row)

    def text(self, column, row):
        column = column.cast(pa.string())
        width = len(pd.Timestamp(2000, 1, 1).strftime(self.form))
        body = pc.utf8_slice_codeunits(column, 0, width)
        naive = pc.strptime(body, format=self.form, unit="ns", error_is_null=True)
        # strptime takes the 31st of February for the 3rd of March
        day = self.form.replace("%Y", "0000").replace("%m", "00").index("%d")
        written = pc.utf8_slice_codeunits(column, day, day + 2)
        right = pc.equal(pc.utf8_lpad(pc.cast(pc.day(naive), pa.string()), 2, "0"), written)
        tails = pc.utf8_slice_codeunits(column, width).dictionary_encode()
        known = [TAIL.fullmatch(tail) for tail in tails.dictionary.to_pylist()]
        place = tails.indices.fill_null(0).to_numpy(zero_copy_only=False)
        empty = column.is_null().to_numpy(zero_copy_only=False)
        good = right.fill_null(False).to_numpy(zero_copy_only=False)
        if known:
            good = good & np.array([match is not None for match in known])[place]
        self.refuse_unlike(~good & ~empty, column, row)

        times = naive.to_numpy(zero_copy_only=False).astype("datetime64[ns]")
        if not known:
            return times
        shifts = np.array([tail_shift(match) if match else 0 for match in known])
        zoned = np.array([bool(match and (match[2] or match[3])) for match in known])[place]
        if self.zoned is None:
            self.zoned = bool(zoned[~empty][0])
        self.refuse_unlike((zoned != self.zoned) & ~empty, column, row)
        times = times + shifts[place].astype("timedelta64[ns]")
        return self.known_zone(times) if self.zoned else self.localize(times, row)

    def refuse_unlike(self, bad, column, row):
        if bad.any():
            at = int(np.argmax(bad))
            raise self.unlike(at + row, column[at])

    def unlike(self, row, value):
        form = {"given": self.args.time_format, "epoch": "an epoch"}.get(self.form, self.form)
        what = f"row {row}: {str(value)[:40]!r} is not a time like those before ({form})"
        return UsageError(f"{self.path}: {what}")

    def known_zone(self, times):
        self.zoned = True
        refuse(
            (self.args.tz, f"--tz {self.args.tz}: the times of {self.path} are UTC or carry a zone")
        )
        return times

    def localize(self, naive, row):
        """Local times to UTC; one that the clock shows twice or never is refused."""
        self.zoned = False
        zone, ahead = (
            self.args.zone or (self.layout.zone and parse_zone(self.layout.zone)) or (None, None)
        )
        if zone is None:
            kind = self.layout.kind
            hint = next((text for name, text in ASK_ZONE.items() if kind.startswith(name)), None)
            hint = hint or "times without a zone: --tz UTC, --tz America/New_York, --tz +02:00"
            raise UsageError(f"{self.path}: {kind}: {hint}")
        local = pd.DatetimeIndex(naive - ahead.to_timedelta64())
        aware = local.tz_localize(zone, ambiguous="NaT", nonexistent="NaT")
        lost = np.flatnonzero(aware.isna() & ~np.isnat(naive))
        if len(lost):
            first = local[lost[0]]
            never = pd.isna(first.tz_localize(zone, ambiguous=True, nonexistent="NaT"))
            what = "does not exist" if never else "happens twice"
            when = pd.Timestamp(naive[lost[0]]).isoformat(" ")
            zone = self.args.tz or self.layout.zone
            why = f"{when} {what} in {zone} (daylight saving; {len(lost)} such rows here)"
            way_out = "another --tz, or a file in UTC"
            raise UsageError(f"{self.path}: row {lost[0] + row}: {why}: {way_out}")
        return aware.tz_convert("UTC").tz_localize(None).to_numpy().astype("datetime64[ns]")

    def describe(self) -> str:
        if self.units:
            return f"epochs in {' and '.join(unit for unit in UNITS if unit in self.units)}, UTC"
        if self.zoned:
            return "with their zone"
        if self.args.tz:
            return f"of {self.args.tz} (--tz)"
        return f"of {self.layout.zone}, as {self.layout.kind} publishes them"


def pattern_of(form: str) -> str:
    pattern = re.escape(form).replace("%Y", r"\d{4}").replace("%p", "[AP]M")
    return re.sub("%[mdHMSI]", r"\\d\\d", pattern)


def tail_shift(match) -> int:
    """Nanoseconds from the written time to UTC: its fraction, less its offset."""
    fraction = round(float(match[1] or 0) * 1e9)
    if not match[3]:
        return fraction
    digits = match[3][1:].replace(":", "").ljust(4, "0")
    offset = (int(digits[:2]) * 60 + int(digits[2:])) * 60 * 10**9
    return fraction + (offset if match[3][0] == "-" else -offset)


# ------------------------------------------------------------------------------------------ reading
def read_arrow(path: Path, form: str):
    """Batches of a feather or parquet file."""
    raw = open_raw(path)
    if form == "parquet":
        yield from pq.ParquetFile(raw).iter_batches()
    else:
        yield from pyarrow.feather.read_table(raw).to_batches()


def read_text(path: Path, layout: Layout):
    """Batches of a text file, every column text."""
    uneven = []
    names = [str(place) for place in range(len(layout.names))]
    reader = pyarrow.csv.open_csv(
        open_raw(path),
        pyarrow.csv.ReadOptions(
            use_threads=False,
            block_size=BLOCK,
            skip_rows=layout.skip,
            column_names=names,
            encoding=layout.encoding,
        ),
        pyarrow.csv.ParseOptions(
            delimiter=layout.separator,
            invalid_row_handler=lambda row: uneven.append(row) or "skip",
        ),
        pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            null_values=EMPTY,
            strings_can_be_null=True,
            include_columns=[str(place) for place in layout.roles.values()],
        ),
    )
    for batch in reader:
        yield batch
        if uneven:
            break
    if uneven:
        row = uneven[0]
        fields = f"has {row.actual_columns} fields, the others {row.expected_columns}"
        raise UsageError(f"{path}: row {row.number - 1 - layout.skip}, {row.text[:60]!r}: {fields}")


def first_bad_number(column) -> int:
    text = column.to_pandas()
    bad = pd.to_numeric(text, errors="coerce").isna() & text.notna()
    return int(np.argmax(bad.to_numpy()))


def numbers_of(path: Path, column: pa.Array, role: str, layout: Layout, row: int) -> np.ndarray:
    """(n,) float64, NaN where empty."""
    if pa.types.is_string(column.type):
        column = pc.utf8_trim_whitespace(column)
        if layout.comma:
            column = pc.replace_substring(column, ",", ".")
    try:
        numbers = column.cast(pa.float64(), safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        bad = first_bad_number(column)
        what = f"{str(column[bad])[:40]!r} is not a number"
        raise UsageError(f"{path}: row {bad + row}, column {role!r}: {what}") from None
    return numbers.to_numpy(zero_copy_only=False)


class Table:
    """Rows of all files in the order of the files, and the codes of their symbols."""

    def __init__(self, args):
        self.wanted = set(args.symbols.split(",")) if args.symbols else None
        self.files, self.parts, self.codes = [], [], {}
        self.named = None  # the files have a column of symbols

    def add(self, path: Path, layout: Layout, args) -> Clock:
        file, clock, row = len(self.files), Clock(path, layout, args), 0
        self.files.append(path)
        named = "symbol" in layout.roles
        mixed = self.named not in (None, named)
        refuse(
            (self.wanted and not named, f"--symbols: {path} has no column of symbols"),
            (mixed, f"{path}: some files have a column of symbols, others none; import them apart"),
        )
        self.named = named
        batches = (
            read_text(path, layout) if layout.form == "text" else read_arrow(path, layout.form)
        )
        for batch in batches:
            column = {
                role: batch.column(str(place) if layout.form == "text" else place)
                for role, place in layout.roles.items()
            }
            if "date" in column:
                pair = (
                    pc.utf8_trim_whitespace(column[role].cast(pa.string()))
                    for role in ("date", "time")
                )
                column["timestamp"] = pc.binary_join_element_wise(*pair, " ")
            part = {"timestamp": clock.utc(column["timestamp"], row)}
            for role in VALUES:
                part[role] = np.zeros(len(batch))
                if role in column:
                    part[role] = numbers_of(path, column[role], role, layout, row)
            part["code"] = np.zeros(len(batch), np.int32)
            if "symbol" in column:
                part["code"] = self.codes_of(column["symbol"])
            part["file"] = np.full(len(batch), file, np.int16)
            part["row"] = np.arange(row, row + len(batch), dtype=np.int32)
            frame = pd.DataFrame(part)
            self.parts.append(frame[frame.code >= 0] if self.wanted else frame)
            row += len(batch)
        refuse((clock.zoned is None, f"{path}: no row with a time"))
        return clock

    def codes_of(self, column: pa.Array) -> np.ndarray:
        """(n,) int32: a number for each symbol, -1 for those that --symbols leaves out."""
        encoded = column.cast(pa.string()).fill_null("").dictionary_encode()
        codes = []
        for symbol in encoded.dictionary.to_pylist():
            symbol = symbol.strip()
            wanted = self.wanted is None or symbol in self.wanted
            codes.append(self.codes.setdefault(symbol, len(self.codes)) if wanted else -1)
        return np.array(codes or [0], np.int32)[encoded.indices.to_numpy(zero_copy_only=False)]

    def series(self):
        """(symbol, its rows) one by one; the symbol is "" where the files name none."""
        frame = pd.concat(self.parts, ignore_index=True)
        self.parts = []
        missing = ", ".join(sorted((self.wanted or set()) - set(self.codes)))
        refuse((missing, f"--symbols {missing}: in none of the files"))
        if len(self.codes) <= 1:
            yield next(iter(self.codes), ""), frame
            return
        refuse(("" in self.codes, f"{self.files[0]}: some rows have no symbol"))
        for symbol, code in self.codes.items():
            yield symbol, frame[frame.code == code].reset_index(drop=True)


# ---------------------------------------------------------------------------------------- repairing
class Repairs:
    """Rows of one series, made sound where a flag says so; UsageError with the row elsewhere."""

    def __init__(self, rows: pd.DataFrame, files: list[Path], args):
        self.rows, self.files, self.args, self.counts = rows, files, args, {}

    def where(self, row) -> str:
        time = row.timestamp
        when = "" if pd.isna(time) else f", {data.iso(time)}"
        return f"{self.files[row.file]}: row {row.row}{when}"

    def drop(self, bad: np.ndarray, flag: str, why):
        """Leave the marked rows out if --flag says so; else refuse the first: why(row)."""
        count = int(bad.sum())
        if not count:
            return
        if not getattr(self.args, flag):
            row = next(self.rows[bad].itertuples())
            more = f" (and {count - 1} more such rows)" if count > 1 else ""
            way_out = f"--{flag.replace('_', '-')} leaves them out"
            raise UsageError(f"{self.where(row)}: {why(row)}{more}; {way_out}")
        self.counts[flag] = self.counts.get(flag, 0) + count
        self.rows = self.rows[~bad].reset_index(drop=True)

    def check_values(self):
        empty = ~np.isfinite(self.rows[list(VALUES)].to_numpy()).all(1)
        empty |= self.rows.timestamp.isna().to_numpy()
        self.drop(empty, "drop_incomplete", lambda row: f"{first_empty(row)} is empty")
        for column, why, wrong in IMPOSSIBLE:
            bad = self.rows.eval(wrong, engine="python").to_numpy()
            say = f"{column} {why}"
            self.drop(bad, "drop_impossible", lambda row, say=say: say)

    def check_order(self):
        back = self.rows.timestamp.diff().to_numpy() < np.timedelta64(0, "ns")
        count = int(back.sum())
        if not count:
            return
        if not self.args.sort:
            row = next(self.rows[back].itertuples())
            what = f"earlier than the row before ({count} such rows)"
            raise UsageError(f"{self.where(row)}: {what}; --sort sorts by time")
        self.counts["sort"] = count
        self.rows = self.rows.sort_values("timestamp", kind="stable", ignore_index=True)

    def check_copies(self):
        copies = self.rows.duplicated(["timestamp", *VALUES]).to_numpy()
        self.drop(copies, "drop_duplicates", lambda row: "the same bar again")
        rivals = self.rows.duplicated("timestamp", keep=self.args.keep or "first").to_numpy()
        self.drop(rivals, "keep", lambda row: "a second bar of this time, with other values")

    def resample(self):
        """Bars of --resample: first open, highest, lowest, last close, sum of volumes."""
        rule, rows = self.args.rule, self.rows
        times = rows.timestamp.to_numpy().astype("datetime64[ns]").astype(np.int64)
        step = commonest_step(times)
        wrong = f"--resample {self.args.resample}: bars of {span(step)} do not make such"
        refuse((rule % step or rule == step, wrong))
        start = times // rule * rule
        first = np.flatnonzero(np.diff(start, prepend=start[0] - 1))
        last = np.append(first[1:], len(rows)) - 1
        cut_first = times[0] != start[0]
        cut_last = times[-1] + step < start[-1] + rule
        self.rows = pd.DataFrame({
            "timestamp": start[first].astype("datetime64[ns]"),
            "open": rows.open.to_numpy()[first],
            "high": np.maximum.reduceat(rows.high.to_numpy(), first),
            "low": np.minimum.reduceat(rows.low.to_numpy(), first),
            "close": rows.close.to_numpy()[last],
            "volume": np.add.reduceat(rows.volume.to_numpy(), first),
        })  # fmt: skip
        self.counts["resample"] = len(rows)
        if self.args.drop_incomplete:
            self.rows = self.rows[int(cut_first) : len(self.rows) - int(cut_last)]
            self.counts["cut_bars"] = int(cut_first) + int(cut_last)
        elif cut_first or cut_last:
            ends = " and ".join(
                name for name, cut in (("first", cut_first), ("last", cut_last)) if cut
            )
            print(f"the {ends} bar of {self.args.resample} is cut; --drop-incomplete leaves it out")

    def describe(self):
        said = {
            "drop_incomplete": "rows with an empty value left out",
            "drop_impossible": "rows with impossible values left out",
            "sort": "rows were earlier than the row before: sorted by time",
            "drop_duplicates": "copies of a bar left out",
            "keep": f"further bars of one time left out, the {self.args.keep} kept",
            "resample": f"bars became {len(self.rows)} of {self.args.resample}",
            "cut_bars": "cut bars at the ends left out",
        }
        return [f"{count} {said[what]}" for what, count in self.counts.items() if count]


def first_empty(row) -> str:
    values = {name: getattr(row, name) for name in ("timestamp", *VALUES)}
    return next(name for name, x in values.items() if pd.isna(x) or x in (np.inf, -np.inf))


def commonest_step(times: np.ndarray) -> int:
    steps, counts = np.unique(np.diff(times), return_counts=True)
    return int(steps[np.argmax(counts)])


def span(nanoseconds: int) -> str:
    return str(pd.Timedelta(nanoseconds)).removeprefix("0 days ")


# ------------------------------------------------------------------------------------------ writing
def write(tables: dict[Path, pd.DataFrame], source: dict):
    """All files or none: each under a temporary name first."""
    temporary = {}
    try:
        for path, rows in tables.items():
            temporary[path] = path.with_name(path.stem + ".tmp.parquet")
            columns = [pa.array(rows[name].to_numpy()) for name in data.COLUMNS]
            columns[0] = columns[0].cast(pa.timestamp("ns")).cast(pa.timestamp("ns", "UTC"))
            table = pa.table(columns, data.COLUMNS)
            table = table.replace_schema_metadata({"import": json.dumps(source)})
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, temporary[path])
        for path, part in temporary.items():
            part.replace(path)
    finally:
        for part in temporary.values():
            part.unlink(missing_ok=True)


def main(argv=None) -> dict:
    """Import; returns out {path: bars}, files (a dict each) and repairs {path: counts}."""
    args = parse(argv)
    table, found = Table(args), []
    for path in args.files:
        try:
            layout = find_layout(path, args)
            clock = table.add(path, layout, args)
        except DAMAGE as error:
            raise UsageError(
                f"{path}: cannot be read: {' '.join(str(error).split())[:200]}"
            ) from None
        found.append(
            {"file": path.name, "kind": layout.kind, "times": clock.describe(), "side": layout.side}
        )
        describe(path, layout, clock)
    refuse((args.unit and not clock.units, f"--unit: the times of {path} are no epochs"))

    tables, repairs = {}, {}
    series = list(table.series())
    for symbol, rows in series:
        out = args.out
        if len(series) > 1:
            out = out.with_name(f"{out.stem}_{re.sub('[^A-Za-z0-9.-]', '', symbol)}.parquet")
        refuse(
            (out.exists(), f"{out}: exists; delete it or give another --out"),
            (
                out in tables,
                f"{out}: the name of two symbols, {symbol} is one; --symbols takes one",
            ),
        )
        work = Repairs(rows, table.files, args)
        work.check_values()
        work.check_order()
        work.check_copies()
        if args.rule:
            work.resample()
        times = work.rows.timestamp.to_numpy().astype("datetime64[ns]")
        data.check_bars(
            f"{args.files[0]} {symbol}".strip(), times, work.rows[list(VALUES)].to_numpy()
        )
        tables[out], repairs[str(out)] = work.rows, work.counts
        for line in work.describe():
            print(f"{out}: {line}")
    write(tables, {"files": found, "repairs": repairs})
    for out, rows in tables.items():
        times = rows.timestamp.to_numpy().astype("datetime64[ns]")
        step = span(commonest_step(times.astype(np.int64)))
        print(f"{out}: {len(rows)} bars of {step}, {data.iso(times[0])} .. {data.iso(times[-1])}")
        print(data.describe_gaps(data.find_gaps(out.stem, times)))
    return {
        "out": {str(out): len(rows) for out, rows in tables.items()},
        "files": found,
        "repairs": repairs,
        "exit_code": 0,
    }


def describe(path: Path, layout: Layout, clock: Clock):
    """What the file is, and what nobody can read in it."""
    how = layout.form if layout.form != "text" else f"columns separated by {layout.separator!r}"
    print(f"{path}: {layout.kind}, {how}")
    side = layout.side or "not said by the file (bid, ask or trades)"
    print(f"{path}: times {clock.describe()}, taken as the opening of the bar; prices: {side}")
    places = set(layout.roles.values())
    rest = [name for place, name in enumerate(layout.names) if place not in places]
    rest = ", ".join(name for name in rest if name != "skip")
    if rest:
        print(f"{path}: left out: {rest}")
    for note in layout.notes:
        print(f"{path}: {note}")


if __name__ == "__main__":
    exit_with(main)
