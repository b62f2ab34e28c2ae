"""Hourly, daily and minute bars of currencies and metals from Dukascopy's public candle files.

What scripts/download_data.py --source dukascopy fetches; no account is needed. There is a file a
side and a period: of hourly candles a month (BASE/EURUSD/2024/00/BID_candles_hour_1.bi5, months
counted from 0), of minutes a day, of days a year. A file is LZMA over records of 24 bytes,
big-endian: seconds since the period began (UTC), open, close, low, high in points (uint32), volume
(float32). Hours without a trade repeat the last price with volume 0 and are left out. Bars are the
middle of bid and ask; the spread at the close goes to a file of its own.
"""

from __future__ import annotations

import http.client
import lzma
import sys
import time
import urllib.error
import urllib.request
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.run import CheckFailed, UsageError, refuse
from common.timeout_guard import whole_file

BASE = "https://datafeed.dukascopy.com/datafeed"
CANDLE = np.dtype(
    [("second", ">u4"), ("open", ">u4"), ("close", ">u4"), ("low", ">u4"), ("high", ">u4")]
    + [("volume", ">f4")]
)
# timeframe -> (name in the file's name, period of a file, strftime of its folder, ms of a bar)
FILES = {
    "1m": ("min_1", "D", "{0.year}/{month:02d}/{0.day:02d}", 60_000),
    "1h": ("hour_1", "M", "{0.year}/{month:02d}", 3_600_000),
    "1d": ("day_1", "Y", "{0.year}", 86_400_000),
}
# currencies whose prices have five decimals, and those with three, when they come second
FINE = set("USD EUR GBP CHF CAD AUD NZD SEK NOK DKK PLN SGD HKD MXN ZAR TRY CNH ILS".split())
COARSE = set("JPY HUF THB".split())
METALS = ("XAU", "XAG")
PAUSE = 0.3  # s between requests, for politeness


class Candles(NamedTuple):
    """What a file holds; (n,) each, prices in price units."""

    ms: np.ndarray  # int64 since 1970, of the open
    ohlc: np.ndarray  # (n, 4) float64
    volume: np.ndarray  # float64, millions of units


def point_of(symbol: str) -> float:
    """Price units of a point. UsageError for what is not known."""
    base, quote = symbol[:3], symbol[3:]
    if quote in COARSE or base in METALS:
        return 1e-3
    known = len(symbol) == 6 and quote in FINE
    names = f"six letters such as EURUSD, quoted in {', '.join(sorted(FINE | COARSE))}"
    refuse((not known, f"--symbol {symbol}: its number of decimals is not known here; {names}"))
    return 1e-5


def decode(raw: bytes, began: int, point: float, name: str) -> Candles:
    """What a .bi5 file of candles holds whose period began at `began` (ms); b"" is no candle."""
    try:
        plain = lzma.decompress(raw) if raw else b""
    except (lzma.LZMAError, EOFError) as e:
        raise UsageError(f"{name}: not a .bi5 file ({e})") from None
    size = CANDLE.itemsize
    refuse((len(plain) % size, f"{name}: {len(plain)} bytes are no records of {size}"))
    rows = np.frombuffer(plain, CANDLE)
    digits = round(-np.log10(point))
    prices = [rows[k] for k in ("open", "high", "low", "close")]
    points = np.stack(prices, 1).astype(np.float64)
    ohlc = (points * point).round(digits)
    seconds = rows["second"].astype(np.int64)
    volume = rows["volume"].astype(np.float64)
    return Candles(began + 1000 * seconds, ohlc, volume)


def middle(bid: Candles, ask: Candles, digits: int) -> tuple[np.ndarray, np.ndarray]:
    """Bars (n, 6) [ms, open, high, low, close, volume] halfway between the sides, and spreads (n,).

    Only what both sides have, and where somebody traded.
    """
    _, i, j = np.intersect1d(bid.ms, ask.ms, return_indices=True)
    volume = bid.volume[i] + ask.volume[j]
    traded = volume > 0
    volume = volume[traded]
    below = bid.ohlc[i[traded]]
    above = ask.ohlc[j[traded]]
    # half a point is a digit more
    ohlc = (0.5 * (below + above)).round(digits + 1)
    spread = above[:, 3] - below[:, 3]
    ms = bid.ms[i[traded]].astype(np.float64)
    bars = np.column_stack([ms, ohlc, volume])
    return bars, spread.round(digits)


def periods_of(timeframe: str, since: int, until: int) -> list[pd.Timestamp]:
    """Starts of the files that hold bars from `since` to before `until` (ms)."""
    unit = FILES[timeframe][1]
    first = pd.Timestamp(since, unit="ms").to_period(unit)
    last = pd.Timestamp(until - 1, unit="ms").to_period(unit)
    periods = pd.period_range(first, last)
    return [period.start_time for period in periods]


def url_of(base: str, symbol: str, timeframe: str, period, side: str) -> str:
    name, _, folder, _ = FILES[timeframe]
    folder = folder.format(period, month=period.month - 1)
    return f"{base}/{symbol}/{folder}/{side}_candles_{name}.bi5"


def fetch(url: str, args) -> bytes:
    """The body; b"" where there is no such file. Again after a network error, as flags allow."""
    for tries in range(args.retries + 1):
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "cleanrl_crypto"})
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.read()
        except urllib.error.HTTPError as e:
            if e.code == 404:
                return b""
            refuse((e.code in (401, 403, 451), f"{url}: refused to this machine ({e.code})"))
            why = f"HTTP {e.code}"
        except (OSError, http.client.HTTPException) as e:
            why = f"{type(e).__name__}: {e}"
        if tries < args.retries:
            wait = min(args.retry_wait * 2**tries, 60.0)
            tqdm.write(f"{url}: {why}; try {tries + 2} in {wait:g} s", file=sys.stderr)
            time.sleep(wait)
    raise CheckFailed(f"{url}: gave up after {args.retries + 1} tries ({why}); run it again")


def kept(path: Path, url: str, args) -> bytes:
    """A file from OUT.partial/, or from the server and then kept there."""
    if path.exists():
        return path.read_bytes()
    body = fetch(url, args)
    if body:  # a file that is not there may come
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as half:
            half.write_bytes(body)
    time.sleep(PAUSE if args.rate_limit is None else args.rate_limit / 1000)
    return body


def download(args, since: int, until: int | None, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Bars (n, 6) and spreads (n,) from `since` to before `until`; `folder` keeps what came so far.

    A file appears when its period is over, so bars end with the last finished one.
    """
    refuse(
        (
            args.timeframe not in FILES,
            f"--timeframe {args.timeframe}: dukascopy has {', '.join(FILES)}",
        )
    )
    point = point_of(args.symbol)
    digits = round(-np.log10(point))
    now = datetime.now(timezone.utc).replace(tzinfo=None)
    unit = FILES[args.timeframe][1]
    running = pd.Timestamp(now).to_period(unit).start_time
    limit = int(running.timestamp() * 1000)
    if until is None or until > limit:
        print(f"the file of {running.date()} is there when its period is over: bars end before it")
        until = limit
    if since >= until:  # what is here reaches as far as the files
        return np.empty((0, 6)), np.empty(0)
    base = (args.base_url or BASE).rstrip("/")
    bars, spreads, missing = [], [], []
    periods = periods_of(args.timeframe, since, until)
    for period in tqdm(periods, unit=" files", desc=args.symbol, disable=None):
        sides = []
        for side in ("BID", "ASK"):
            url = url_of(base, args.symbol, args.timeframe, period, side)
            path = folder / f"{args.symbol}_{args.timeframe}_{period:%Y%m%d}_{side}.bi5"
            raw = kept(path, url, args)
            try:
                sides.append(decode(raw, int(period.timestamp() * 1000), point, url))
            except UsageError:
                path.unlink(missing_ok=True)  # a page for people: asked for again next time
                raise
        table, spread = middle(*sides, digits)
        if not len(table):
            missing.append(period)
        bars.append(table)
        spreads.append(spread)
    table, spread = np.concatenate(bars), np.concatenate(spreads)
    inside = (table[:, 0] >= since) & (table[:, 0] < until)
    if missing:
        first, last = missing[0].date(), missing[-1].date()
        count = f"{len(missing)} of {len(periods)} files"
        print(f"{args.symbol}: no bars in {count}, {first} to {last}")
    return table[inside], spread[inside]


def add_spreads(path: Path, symbol: str, ms: np.ndarray, spread: np.ndarray):
    """A column of `path` (timestamp, one column of spread a symbol), beside those of other symbols.

    Where a symbol has no bar its column holds its last spread before, which no bar of it reads.
    """
    times = pd.to_datetime(ms.astype(np.int64), unit="ms", utc=True)
    index = pd.Index(times.as_unit("ns"), name="timestamp")
    table = pd.DataFrame({symbol: spread}, index=index)
    if path.exists():
        there = pd.read_parquet(path).set_index("timestamp")
        there.index = there.index.as_unit("ns")
        table = table.combine_first(there)
    table = table.ffill().bfill()
    with whole_file(path) as half:
        table.reset_index().to_parquet(half, index=False)
