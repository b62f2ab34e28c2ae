r"""Download real bars, of an exchange through ccxt or of currencies from Dukascopy, into the
parquet that every script here reads.

    python scripts/download_data.py --exchange binance --symbol BTC/USDT --timeframe 1h \
        --since 2020-01-01 --until 2025-01-01 --out data/BTCUSDT_1h.parquet
    python scripts/download_data.py --exchange kraken --symbol BTC/USD --timeframe 1d
    python scripts/download_data.py --source dukascopy --symbol EURUSD --since 2020-01-01

Five years of hourly bars are 44 requests on Binance. Stop it as you like (Ctrl-C, kill -9): bars go
to OUT.partial page by page, and the same command goes on behind the last of them. The parquet
appears only when it is complete and has passed the checks of `common/data.py`. A finished file is
extended by the same command with a later --until. The open bar is left out, aloud;
holes are reported, never filled. A proxy is taken from HTTPS_PROXY. Exits 0 when the file stands, 1
when the network gave out (run it again), 2 on a bad flag or bad bars, 130 on Ctrl-C.

Dukascopy's public candle files need no account: data/forex/EURUSD_1h.parquet holds bars halfway
between bid and ask, data/forex/spread_1h.parquet gets a column of the spread at their closes, for
--spread-file (scripts/dukascopy.py has the format).
"""

from __future__ import annotations

import difflib
import functools
import io
import json
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.run import CheckFailed, UsageError, answer_help, check, exit_with, parse_args, refuse

answer_help(__name__, __file__)

import ccxt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from tqdm import tqdm  # noqa: E402

from common import data  # noqa: E402
from scripts import dukascopy  # noqa: E402

PAGE = 500  # bars a request where ccxt does not know the exchange's own maximum
LONGEST_WAIT = 60.0  # seconds between two tries


class Interrupted(CheckFailed):
    exit_code = 130


@dataclass
class Args:
    # bars
    source: str = "ccxt"
    """ccxt (exchanges), or dukascopy (currencies and metals; no account, bid and ask)"""
    exchange: str = "binance"
    """with ccxt: its id of the exchange: binance, kraken, bybit, okx, coinbase, ..."""
    symbol: str = "BTC/USDT"
    """ccxt's unified symbol: BTC/USDT is spot, BTC/USDT:USDT the perpetual; or EURUSD, XAUUSD,
    ..."""
    timeframe: str = "1h"
    """length of a bar, one that the source offers: 1m, 5m, 15m, 1h, 4h, 1d, ...; dukascopy has 1m,
    1h and 1d"""
    since: str = "2020-01-01"
    """open time of the first bar, ISO date or time, UTC unless it carries an offset"""
    until: str | None = None
    """bars open before this time, ISO, UTC unless it carries an offset (default: now)"""
    out: Path | None = None
    """the parquet to write (default: data/SYMBOL_TIMEFRAME.parquet, dukascopy's in data/forex)"""

    # network
    limit: int | None = None
    """bars a request (default: the most that the exchange gives)"""
    rate_limit: float | None = None
    """milliseconds between requests (default: the exchange's own rule)"""
    retries: int = 8
    """tries after a network error before it gives up; what came so far stays in OUT.partial"""
    retry_wait: float = 1.0
    """seconds before the first new try, doubled for each further one, at most 60"""
    base_url: str | None = None
    """http(s)://HOST[:PORT][/PATH] instead of the exchange's own API host: a proxy or a mirror"""

    def __post_init__(self):
        check(self, {"source": ("ccxt", "dukascopy")}, {(1, 1e9): "limit", (0, 1e9): "rate_limit retries retry_wait"})


# ------------------------------------------------------------------------------------------- flags
def milliseconds(flag, text) -> int:
    """ISO date or time to ms since 1970; UTC where it carries no offset."""
    try:
        # Python 3.10 does not read a trailing Z
        when = datetime.fromisoformat(re.sub("Z$", "+00:00", text))
    except ValueError:
        usage = "write 2024-01-31 or 2024-01-31T09:00"
        raise UsageError(f"{flag} {text!r} is not a date or time; {usage}") from None
    when = when if when.tzinfo else when.replace(tzinfo=timezone.utc)
    return int(when.timestamp() * 1000)


def iso(ms) -> str:
    return datetime.fromtimestamp(ms / 1000, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def near(name, names) -> str:
    found = difflib.get_close_matches(name, names, 3)
    found = found or difflib.get_close_matches(name.upper(), names, 3)
    return f"; did you mean {' or '.join(found)}?" if found else ""


# ---------------------------------------------------------------------------------------- exchange
def make_exchange(args: Args):
    """The ccxt exchange of `args`, able to give bars of its timeframe; touches no network."""
    name = args.exchange
    unknown = f"--exchange {name!r} is not known to ccxt{near(name, ccxt.exchanges)}"
    refuse((name not in ccxt.exchanges, unknown))
    config = {"enableRateLimit": True, "timeout": 30_000, "requests_trust_env": True}
    if args.rate_limit is not None:
        config["rateLimit"] = max(args.rate_limit, 1e-3)  # ccxt's throttle divides by it
    exchange = getattr(ccxt, name)(config)
    frames = exchange.timeframes or {}
    # "emulated" bars are made of recent trades, history they have none
    no_history = exchange.has.get("fetchOHLCV") is not True or not frames
    offered = f"{name} offers {', '.join(frames)}"
    refuse(
        (no_history, f"--exchange {name}: gives no historical bars through ccxt"),
        (args.timeframe not in frames, f"--timeframe {args.timeframe!r}: {offered}"),
    )
    if args.base_url is not None:
        base = urlsplit(args.base_url)
        good = base.scheme in ("http", "https") and base.netloc
        refuse((not good, f"--base-url {args.base_url!r}: write http(s)://HOST[:PORT][/PATH]"))
        exchange.urls["api"] = redirect(exchange.urls["api"], args.base_url.rstrip("/"))
    return exchange


def redirect(urls, base):
    """The same tree of URLs with `base` in place of every scheme and host."""
    if isinstance(urls, dict):
        return {key: redirect(value, base) for key, value in urls.items()}
    return re.sub(r"^\w+://[^/]*", base, urls) if isinstance(urls, str) else urls


def patiently(call, args: Args, what):
    """call(), again after a network error, at most `--retries` times and each time later."""
    for tries in range(args.retries + 1):
        try:
            return call()
        except ccxt.NetworkError as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            if re.search(r" (403|451) ", text):
                way_out = "try another --exchange, or --base-url"
                raise UsageError(f"{what}: refused to this machine ({text}); {way_out}") from None
            if tries == args.retries:
                way_out = "the same command goes on"
                raise CheckFailed(
                    f"{what}: gave up after {tries + 1} tries ({text}); {way_out}"
                ) from None
            wait = min(args.retry_wait * 2**tries, LONGEST_WAIT)
            tqdm.write(f"{what}: {text}; try {tries + 2} in {wait:g} s", file=sys.stderr)
            time.sleep(wait)
        except ccxt.BaseError as error:
            text = " ".join(str(error).split())[:300]
            raise UsageError(f"{what}: {type(error).__name__}: {text}") from None


def fetch_page(exchange, args: Args, start, limit, known=None):
    """Bars from `start` on, [ms, open, high, low, close, volume] each; one must open at `known`."""
    page = exchange.fetch_ohlcv(args.symbol, args.timeframe, start, limit)
    try:
        # ccxt takes the HTML of a gateway for a page without bars
        page or json.loads(exchange.last_http_response)
    except (TypeError, ValueError):
        answer = str(exchange.last_http_response)[:60]
        raise ccxt.NetworkError(f"the answer is not JSON: {answer!r}") from None
    if known is not None and all(row[0] != known for row in page):
        raise ccxt.NetworkError(f"{iso(known)}, a bar that it gave before, is not in its answer")
    return page


def bar_end(start, timeframe) -> int:
    """When the bar that opens at `start` closes; both ms since 1970."""
    if timeframe.endswith("M"):  # the one timeframe without a fixed length
        end = pd.Timestamp(start, unit="ms", tz="UTC") + pd.DateOffset(months=int(timeframe[:-1]))
        return int(end.timestamp() * 1000)
    return start + ccxt.Exchange.parse_timeframe(timeframe) * 1000


# ------------------------------------------------------------------------------------------- files
# a table here is (n, 6) float64: ms since 1970 (exact in a double), open, high, low, close, volume


def open_partial(path: Path, header: dict, after: float):
    """The partial file, ready to append, and the table that it holds.

    Text: a line of JSON, then one bar a line. A last line without its end was cut by a crash and is
    dropped. `after` is the ms of the last finished bar (-1: none), on which the partial one builds.
    """
    if not path.exists() or b"\n" not in path.read_bytes():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**header, "after": after}) + "\n")
    raw = path.read_bytes()
    whole = raw.rindex(b"\n") + 1
    first, _, body = raw[:whole].partition(b"\n")
    try:
        found = json.loads(first)
        table = np.empty((0, 6))
        if body:
            table = np.loadtxt(io.BytesIO(body), delimiter=",", ndmin=2, comments=None)
        in_order = table.shape[1] == 6 and not np.any(np.diff(table[:, 0]) <= 0)
        sound = in_order and found["after"] <= after
    except (ValueError, KeyError, TypeError):
        found, table, sound = {}, None, False
    if not sound:
        why = "damaged, or the finished file that it goes on from is gone"
        raise UsageError(f"{path}: {why}; delete it to start again")
    same_source(path, found, header)
    file = path.open("r+b")
    file.truncate(whole)
    file.seek(whole)
    return file, table[table[:, 0] > after]


def same_source(path, found, header):
    for key, value in header.items():
        if found.get(key) != value:
            way_out = "give another --out or delete it"
            raise UsageError(f"{path}: holds --{key} {found.get(key)}, not {value}; {way_out}")


def read_finished(path: Path, header: dict) -> np.ndarray:
    """The table of a parquet that an earlier run of this script finished, or one without rows."""
    if not path.exists():
        return np.empty((0, 6))
    timestamp, ohlcv = data.read_bars(path)
    found = json.loads((pq.read_schema(path).metadata or {}).get(b"download", b"{}"))
    refuse((not found, f"{path}: exists and was not written by this script; give another --out"))
    same_source(path, found, header)
    return np.column_stack([timestamp.astype("datetime64[ms]").astype(np.int64), ohlcv])


def write_finished(path: Path, header: dict, table: np.ndarray):
    """Validate the table as any script would and put it under `path` in one step."""
    milli = table[:, 0].astype(np.int64)
    timestamp = milli.astype("datetime64[ms]").astype("datetime64[ns]")
    data.check_bars(path, timestamp, table[:, 1:])
    columns = [
        pa.array(timestamp, pa.timestamp("ns", "UTC")),
        *(pa.array(column) for column in table[:, 1:].T),
    ]
    out = pa.table(columns, data.COLUMNS).replace_schema_metadata({"download": json.dumps(header)})
    temporary = path.with_name(path.stem + ".tmp.parquet")
    try:
        with temporary.open("wb") as file:
            pq.write_table(out, file)
            file.flush()
            os.fsync(file.fileno())
        data.read_bars(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------- download
def main(argv=None) -> dict:
    """Download; returns out, bars, new_bars, first, last, dropped (ISO times), gaps."""
    args, given = parse_args(Args, argv)
    try:
        if args.source == "ccxt":
            return download(args)
        odd = " and ".join(f"--{name}" for name in sorted(given & {"exchange", "limit"}))
        refuse((odd, f"{odd} says nothing with --source {args.source}: leave it out"))
        return download_pair(args)
    except KeyboardInterrupt:
        kept = "the bars so far are kept, the same command goes on from there"
        raise Interrupted(f"interrupted; {kept}") from None


def span_of(args: Args) -> tuple[int, int | None]:
    """--since and --until in ms."""
    since = milliseconds("--since", args.since)
    until = None if args.until is None else milliseconds("--until", args.until)
    backwards = until is not None and until <= since
    refuse((backwards, f"--until {args.until} is not after --since {args.since}"))
    return since, until


def download_pair(args: Args) -> dict:
    """A currency pair's bars and spreads, from Dukascopy's files."""
    since, until = span_of(args)
    name = f"{args.symbol}_{args.timeframe}.parquet"
    out = args.out or Path("data") / "forex" / name
    refuse((out.suffix != ".parquet", f"--out {out}: must end in .parquet"))
    header = {
        "source": args.source,
        "symbol": args.symbol,
        "timeframe": args.timeframe,
        "since": iso(since),
    }
    done = read_finished(out, header)
    start = since
    if len(done):
        last = int(done[-1, 0])
        start = bar_end(last, args.timeframe)
        print(f"{out}: {len(done)} bars up to {iso(last)} are here")
    partial = out.with_name(out.name + ".partial")
    table, spread = np.empty((0, 6)), np.empty(0)
    if until is None or until > start:
        table, spread = dukascopy.download(args, start, until, partial)
    if not len(done) and not len(table):
        raise UsageError(f"{args.symbol}: no bars from {iso(since)} on")
    if len(table):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_finished(out, header, np.concatenate([done, table]))
        spreads = out.with_name(f"spread_{args.timeframe}.parquet")
        dukascopy.add_spreads(spreads, args.symbol, table[:, 0], spread)
        print(f"{spreads}: mean spread of {args.symbol} {spread.mean():.6g}")
    shutil.rmtree(partial, ignore_errors=True)
    bars = data.load_bars(out)
    data.print_facts(bars)
    first, last = (int(x.astype("datetime64[ms]").astype(int)) for x in bars.timestamp[[0, -1]])
    print(f"{out}: {len(bars.timestamp)} bars, {iso(first)} .. {iso(last)}, {len(table)} of them new")
    return {
        "out": str(out),
        "bars": len(bars.timestamp),
        "new_bars": len(table),
        "first": iso(first),
        "last": iso(last),
        "dropped": None,
        "gaps": bars.gaps[0],
        "exit_code": 0,
    }


def download(args: Args) -> dict:
    exchange = make_exchange(args)
    since, until = span_of(args)
    stem = re.sub("[^A-Za-z0-9]", "", args.symbol)
    out = args.out or Path("data") / f"{stem}_{args.timeframe}.parquet"
    refuse((out.suffix != ".parquet", f"--out {out}: must end in .parquet"))

    name = f"{args.exchange} {args.symbol} {args.timeframe}"
    markets = patiently(exchange.load_markets, args, f"{args.exchange} markets")
    hint = near(args.symbol, list(markets))
    unknown = f"--symbol {args.symbol!r} is not traded on {args.exchange}{hint}"
    refuse((args.symbol not in markets, unknown))
    # the exchange's clock decides which bar is finished: a fast clock here would let an open one in
    ahead = 0
    if exchange.has.get("fetchTime") is True:
        server = patiently(exchange.fetch_time, args, f"{args.exchange} time")
        ahead = 0 if server is None else exchange.milliseconds() - server
    now = exchange.milliseconds() - ahead
    clock = f"the exchange's clock says {iso(now)}"
    refuse((since >= now, f"--since {args.since} lies in the future ({clock})"))
    until = now if until is None else min(until, now)

    header = {
        "exchange": args.exchange,
        "symbol": args.symbol,
        "timeframe": args.timeframe,
        "since": iso(since),
    }
    done = read_finished(out, header)
    partial = out.with_name(out.name + ".partial")
    finished_to = done[-1, 0] if len(done) else -1.0
    file, more = open_partial(partial, header, finished_to)
    had = len(done) + len(more)
    start, last = since, since - 1
    if had:
        last = int((more if len(more) else done)[-1, 0])
        start = bar_end(last, args.timeframe)
        print(f"{out}: {had} bars up to {iso(last)} are here")
    most = exchange.feature_value(args.symbol, "fetchOHLCV", "limit") or PAGE
    limit = min(args.limit or most, most)
    step = bar_end(start, args.timeframe) - start
    total = max(until - start, 0) // step
    still_open = None
    with file, tqdm(total=total, unit=" bars", desc=name, disable=None) as progress:
        while start < until and still_open is None:
            # before the request: what closes while the answer travels may not be in it yet
            now = exchange.milliseconds() - ahead
            ask = functools.partial(fetch_page, exchange, args)
            page = patiently(functools.partial(ask, start, limit), args, name)
            if not page and last >= since:
                # a hole, or a wrong answer? one that shows the last bar again can be believed
                page = patiently(functools.partial(ask, last, limit, last), args, name)
            rows, still_open = finished_bars(page, args, last, until, now)
            for row in rows:
                file.write(",".join([str(int(row[0])), *map(repr, map(float, row[1:]))]).encode())
                file.write(b"\n")
            file.flush()
            # an exchange sends nothing where nothing traded, and before a listing: look further on
            go_on = start + limit * step
            if rows:
                last = int(rows[-1][0])
                go_on = bar_end(last, args.timeframe)
            progress.update((min(go_on, until) - start) // step)
            start = go_on

    if still_open is not None:
        end = iso(bar_end(still_open, args.timeframe))
        print(f"{name}: left out the bar of {iso(still_open)}, which is open until {end}")
    file, more = open_partial(partial, header, finished_to)
    file.close()
    table = np.concatenate([done, more])
    if not len(table):
        partial.unlink()
        raise UsageError(f"{name}: no finished bars from {iso(since)} to {iso(until)}")
    if len(more):
        write_finished(out, header, table)
    partial.unlink()
    bars = data.load_bars(out)
    first, last = int(table[0, 0]), int(table[-1, 0])
    if first - since >= step:
        print(f"{name}: the exchange's first bar is of {iso(first)}, --since was {args.since}")
    data.print_facts(bars)
    print(f"{out}: {len(table)} bars, {iso(first)} .. {iso(last)}, {len(table) - had} of them new")
    return {
        "out": str(out),
        "bars": len(table),
        "new_bars": len(table) - had,
        "first": iso(first),
        "last": iso(last),
        "dropped": None if still_open is None else iso(still_open),
        "gaps": bars.gaps[0],
        "exit_code": 0,
    }


def finished_bars(page, args: Args, last, until, now) -> tuple[list, int | None]:
    """Rows of a page after `last`, before `until`, and the time of the first still open."""
    rows = []
    for row in page:
        if len(row) != 6 or any(not isinstance(value, (int, float)) for value in row):
            raise UsageError(f"{args.exchange}: it sent the bar {row}, not six numbers")
        if not last < row[0] < until:
            continue
        if bar_end(row[0], args.timeframe) > now:
            return rows, row[0]
        rows.append(row)
    return rows, None


if __name__ == "__main__":
    exit_with(main)
