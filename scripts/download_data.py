r"""Download real bars with ccxt into the parquet that every script here reads.

    python scripts/download_data.py --exchange binance --symbol BTC/USDT --timeframe 1h \
        --since 2020-01-01 --until 2025-01-01 --out data/BTCUSDT_1h.parquet
    python scripts/download_data.py --exchange kraken --symbol BTC/USD --timeframe 1d --since 2024-06-01

Five years of hourly bars are 44 requests on Binance. Stop it as you like (Ctrl-C, kill -9): bars go to
OUT.partial page by page, and the same command goes on behind the last of them. The parquet appears only when
it is complete and has passed the checks of `common/data.py`. A finished file is extended by the same command
with a later --until. The bar that is still open at the exchange is left out, aloud; holes are reported, never
filled. A proxy is taken from HTTPS_PROXY. Exits 0 when the file stands, 1 when the network gave out (run it
again), 2 on a bad flag or bad bars, 130 on Ctrl-C.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import urlsplit

import ccxt
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import data  # noqa: E402

PAGE = 500  # bars a request where ccxt does not know the exchange's own maximum
LONGEST_WAIT = 60.0  # seconds between two tries


@dataclass
class Args:
    exchange: str = "binance"
    """ccxt's id of the exchange: binance, kraken, bybit, okx, coinbase, ..."""
    symbol: str = "BTC/USDT"
    """ccxt's unified symbol: BTC/USDT is spot, BTC/USDT:USDT the perpetual"""
    timeframe: str = "1h"
    """length of a bar, one that the exchange offers: 1m, 5m, 15m, 1h, 4h, 1d, ..."""
    since: str = "2020-01-01"
    """open time of the first bar, ISO date or time, UTC unless it carries an offset"""
    until: str | None = None
    """bars open before this time, ISO, UTC unless it carries an offset; None = now"""
    out: Path | None = None
    """the parquet to write; None = data/SYMBOL_TIMEFRAME.parquet"""
    limit: int | None = None
    """bars a request (> 0); None = the most that the exchange gives"""
    rate_limit: float | None = None
    """milliseconds between requests (>= 0); None = the exchange's own rule"""
    retries: int = 8
    """tries after a network error (>= 0) before it gives up; what came so far stays in OUT.partial"""
    retry_wait: float = 1.0
    """seconds before the first new try (>= 0), doubled for each further one, at most 60"""
    base_url: str | None = None
    """http(s)://HOST[:PORT][/PATH] in place of the exchange's own API host, for a proxy or a mirror"""


# ---------------------------------------------------------------------------------------------- flags
def parse_args(argv) -> Args:
    text = io.StringIO()
    try:
        with contextlib.redirect_stderr(text):
            return tyro.cli(Args, prog="download_data.py", description=__doc__, args=argv)
    except SystemExit as stop:
        if stop.code:
            # tyro draws a box: its title repeats what is inside, the frame is no text
            inside = [line for line in text.getvalue().splitlines() if not line.startswith("╭")]
            fail(re.sub("[╰╯│─]", " ", " ".join(inside)))
        raise


def fail(message, code=2):
    print("download_data.py: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(code)


def milliseconds(flag, text) -> int:
    """ISO date or time to ms since 1970; UTC where it carries no offset."""
    try:
        # Python 3.10 does not read a trailing Z
        when = datetime.fromisoformat(re.sub("Z$", "+00:00", text))
    except ValueError:
        fail(f"{flag} {text!r} is not a date or time; write 2024-01-31 or 2024-01-31T09:00")
    when = when if when.tzinfo else when.replace(tzinfo=timezone.utc)
    return int(when.timestamp() * 1000)


def iso(ms) -> str:
    return datetime.fromtimestamp(ms / 1000, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def near(name, names) -> str:
    found = difflib.get_close_matches(name, names, 3) or difflib.get_close_matches(name.upper(), names, 3)
    return f"; did you mean {' or '.join(found)}?" if found else ""


# ---------------------------------------------------------------------------------------------- exchange
def make_exchange(args: Args):
    """The ccxt exchange of `args`, able to give bars of its timeframe; touches no network."""
    if args.exchange not in ccxt.exchanges:
        fail(f"--exchange {args.exchange!r} is not known to ccxt{near(args.exchange, ccxt.exchanges)}")
    config = {"enableRateLimit": True, "timeout": 30_000, "requests_trust_env": True}
    if args.rate_limit is not None:
        config["rateLimit"] = max(args.rate_limit, 1e-3)  # 0 would divide by zero in ccxt's throttle
    exchange = getattr(ccxt, args.exchange)(config)
    frames = exchange.timeframes or {}
    # "emulated" bars are made of recent trades, history they have none
    if exchange.has.get("fetchOHLCV") is not True or not frames:
        fail(f"--exchange {args.exchange}: gives no historical bars through ccxt")
    if args.timeframe not in frames:
        fail(f"--timeframe {args.timeframe!r}: {args.exchange} offers {', '.join(frames)}")
    if args.base_url is not None:
        base = urlsplit(args.base_url)
        if base.scheme not in ("http", "https") or not base.netloc:
            fail(f"--base-url {args.base_url!r}: write http(s)://HOST[:PORT][/PATH]")
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
                fail(f"{what}: refused to this machine ({text}); try another --exchange, or --base-url", 2)
            if tries == args.retries:
                fail(f"{what}: gave up after {tries + 1} tries ({text}); the same command goes on", 1)
            wait = min(args.retry_wait * 2**tries, LONGEST_WAIT)
            tqdm.write(f"{what}: {text}; try {tries + 2} in {wait:g} s", file=sys.stderr)
            time.sleep(wait)
        except ccxt.BaseError as error:
            fail(f"{what}: {type(error).__name__}: {str(error)[:300]}")


def fetch_page(exchange, args: Args, start, limit, known=None):
    """Bars from `start` on, [ms, open, high, low, close, volume] each; one must open at `known`."""
    page = exchange.fetch_ohlcv(args.symbol, args.timeframe, start, limit)
    try:
        # ccxt takes the HTML of a gateway for a page without bars
        page or json.loads(exchange.last_http_response)
    except (TypeError, ValueError):
        raise ccxt.NetworkError(f"the answer is not JSON: {str(exchange.last_http_response)[:60]!r}") from None
    if known is not None and all(row[0] != known for row in page):
        raise ccxt.NetworkError(f"the bar of {iso(known)}, which it gave before, is not in its answer")
    return page


def bar_end(start, timeframe) -> int:
    """When the bar that opens at `start` closes; both ms since 1970."""
    if timeframe.endswith("M"):  # the one timeframe without a fixed length
        end = pd.Timestamp(start, unit="ms", tz="UTC") + pd.DateOffset(months=int(timeframe[:-1]))
        return int(end.timestamp() * 1000)
    return start + ccxt.Exchange.parse_timeframe(timeframe) * 1000


# ---------------------------------------------------------------------------------------------- files
# a table here is (n, 6) float64: ms since 1970 (exact in a double), open, high, low, close, volume


def open_partial(path: Path, header: dict, after: float):
    """The partial file, ready to append, and the table that it holds.

    Text: a line of JSON, then one bar a line. A last line without its end was cut by a crash and is dropped.
    `after` is the ms of the last finished bar (-1: none), on which the partial one builds.
    """
    if not path.exists() or b"\n" not in path.read_bytes():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**header, "after": after}) + "\n")
    raw = path.read_bytes()
    whole = raw.rindex(b"\n") + 1
    first, _, body = raw[:whole].partition(b"\n")
    try:
        found = json.loads(first)
        table = np.loadtxt(io.BytesIO(body), delimiter=",", ndmin=2, comments=None) if body else np.empty((0, 6))
        sound = table.shape[1] == 6 and not np.any(np.diff(table[:, 0]) <= 0) and found["after"] <= after
    except (ValueError, KeyError, TypeError):
        found, table, sound = {}, None, False
    if not sound:
        fail(f"{path}: damaged, or the finished file that it goes on from is gone; delete it to start again")
    same_source(path, found, header)
    file = path.open("r+b")
    file.truncate(whole)
    file.seek(whole)
    return file, table[table[:, 0] > after]


def same_source(path, found, header):
    for key, value in header.items():
        if found.get(key) != value:
            fail(f"{path}: holds --{key} {found.get(key)}, not {value}; give another --out or delete it")


def read_finished(path: Path, header: dict) -> np.ndarray:
    """The table of a parquet that an earlier run of this script finished; no rows where there is none."""
    if not path.exists():
        return np.empty((0, 6))
    timestamp, ohlcv = data.read_bars(path)
    found = json.loads((pq.read_schema(path).metadata or {}).get(b"download", b"{}"))
    if not found:
        fail(f"{path}: exists and was not written by this script; give another --out")
    same_source(path, found, header)
    return np.column_stack([timestamp.astype("datetime64[ms]").astype(np.int64), ohlcv])


def write_finished(path: Path, header: dict, table: np.ndarray) -> dict:
    """Validate the table as any script would and put it under `path` in one step; returns its gaps."""
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
    return data.find_gaps(path.stem, timestamp)


# ---------------------------------------------------------------------------------------------- download
def main(argv=None) -> dict:
    """Download; returns out, bars, new_bars, first, last, dropped (ISO times), gaps. SystemExit on errors."""
    args = parse_args(argv)
    try:
        return download(args)
    except data.DataError as error:
        fail(error)
    except OSError as error:
        fail(f"{error.filename or args.out}: {error.strerror}")
    except KeyboardInterrupt:
        fail("interrupted; the bars so far are kept, the same command goes on from there", 130)


def download(args: Args) -> dict:
    lowest = {"limit": 1, "rate_limit": 0, "retries": 0, "retry_wait": 0}
    for key, low in lowest.items():
        value = getattr(args, key)
        if value is not None and not value >= low:
            fail(f"--{key.replace('_', '-')} is {value}, must be {low} or more")
    exchange = make_exchange(args)
    since = milliseconds("--since", args.since)
    until = None if args.until is None else milliseconds("--until", args.until)
    if until is not None and until <= since:
        fail(f"--until {args.until} is not after --since {args.since}")
    out = args.out or Path("data") / f"{re.sub('[^A-Za-z0-9]', '', args.symbol)}_{args.timeframe}.parquet"
    if out.suffix != ".parquet":
        fail(f"--out {out}: must end in .parquet")

    name = f"{args.exchange} {args.symbol} {args.timeframe}"
    markets = patiently(exchange.load_markets, args, f"{args.exchange} markets")
    if args.symbol not in markets:
        fail(f"--symbol {args.symbol!r} is not traded on {args.exchange}{near(args.symbol, list(markets))}")
    # the exchange's clock decides which bar is finished: a fast clock here would let an open one in
    ahead = 0
    if exchange.has.get("fetchTime") is True:
        server = patiently(exchange.fetch_time, args, f"{args.exchange} time")
        ahead = 0 if server is None else exchange.milliseconds() - server
    now = exchange.milliseconds() - ahead
    if since >= now:
        fail(f"--since {args.since} lies in the future (the exchange's clock says {iso(now)})")
    until = now if until is None else min(until, now)

    header = {
        "exchange": args.exchange,
        "symbol": args.symbol,
        "timeframe": args.timeframe,
        "since": iso(since),
    }
    done = read_finished(out, header)
    partial = out.with_name(out.name + ".partial")
    file, more = open_partial(partial, header, done[-1, 0] if len(done) else -1.0)
    had = len(done) + len(more)
    start, last = since, since - 1
    if had:
        last = int((more if len(more) else done)[-1, 0])
        start = bar_end(last, args.timeframe)
        print(f"{out}: {had} bars up to {iso(last)} are here")
    most = exchange.feature_value(args.symbol, "fetchOHLCV", "limit") or PAGE
    limit = min(args.limit or most, most)
    step = bar_end(start, args.timeframe) - start
    left_out = None
    with file, tqdm(total=max(until - start, 0) // step, unit=" bars", desc=name, disable=None) as progress:
        while start < until and left_out is None:
            # before the request: what closes while the answer travels may not be in it yet
            now = exchange.milliseconds() - ahead
            page = patiently(functools.partial(fetch_page, exchange, args, start, limit), args, name)
            if not page and last >= since:
                # a hole, or an answer gone wrong? one that shows the last bar again can be believed
                page = patiently(functools.partial(fetch_page, exchange, args, last, limit, last), args, name)
            lines = []
            for row in page:
                if len(row) != 6 or any(not isinstance(value, (int, float)) for value in row):
                    fail(f"{name}: the exchange sent the bar {row}, not six numbers")
                if not last < row[0] < until:
                    continue
                if bar_end(row[0], args.timeframe) > now:
                    left_out = row[0]
                    break
                last = int(row[0])
                lines.append(f"{last},{','.join(repr(float(value)) for value in row[1:])}\n")
            file.write("".join(lines).encode())
            file.flush()
            # an exchange sends nothing where nothing traded, and before a listing: look one page further on
            go_on = bar_end(last, args.timeframe) if lines else start + limit * step
            progress.update((min(go_on, until) - start) // step)
            start = go_on

    if left_out is not None:
        end = iso(bar_end(left_out, args.timeframe))
        print(f"{name}: left out the bar of {iso(left_out)}, which is open until {end}")
    file, more = open_partial(partial, header, done[-1, 0] if len(done) else -1.0)
    file.close()
    table = np.concatenate([done, more])
    if not len(table):
        partial.unlink()
        fail(f"{name}: no finished bars from {iso(since)} to {iso(until)}")
    gaps = write_finished(out, header, table) if len(more) else data.find_gaps(out.stem, data.read_bars(out)[0])
    partial.unlink()
    first, last = int(table[0, 0]), int(table[-1, 0])
    if first - since >= step:
        print(f"{name}: the exchange's first bar is of {iso(first)}, --since was {args.since}")
    print(data.describe_gaps(gaps))
    print(f"{out}: {len(table)} bars, {iso(first)} .. {iso(last)}, {len(table) - had} of them new")
    return {
        "out": str(out),
        "bars": len(table),
        "new_bars": len(table) - had,
        "first": iso(first),
        "last": iso(last),
        "dropped": None if left_out is None else iso(left_out),
        "gaps": gaps,
    }


if __name__ == "__main__":
    main()
