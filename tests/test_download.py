"""scripts/download_data.py against a real HTTP server here that answers like Binance."""

import json
import lzma
import signal
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from common import data
from common.run import CheckFailed, UsageError
from scripts import download_data

ROOT = Path(__file__).resolve().parents[1]
HOUR = 3_600_000
START = 1_704_067_200_000  # 2024-01-01T00:00Z


def make_bars(n, start=START, holes=()):
    """n hourly bars {ms: (open, high, low, close, volume)} from `start`, less those indexed by `holes`."""
    rng = np.random.default_rng(7)
    close = (40_000.0 * np.exp(np.cumsum(rng.normal(0, 0.005, n)))).tolist()
    bars = {}
    for i in range(n):
        o, c = round(close[max(i - 1, 0)], 2), round(close[i], 2)
        high, low = round(max(o, c) * 1.002, 2), round(min(o, c) * 0.998, 2)
        bars[start + i * HOUR] = (o, high, low, c, round(rng.random() * 100, 5))
    return {ms: bar for i, (ms, bar) in enumerate(bars.items()) if i not in holes}


class StandIn(ThreadingHTTPServer):
    """Binance's endpoints over `bars`; `now` is its clock, `asked` the start of each page.

    trouble(n), for the n-th page from 0: a status to answer with; "cut" drops the connection, "hang" waits,
    "none" answers without bars, "html" with a page for people.
    """

    daemon_threads = True

    def __init__(self, bars, now):
        super().__init__(("127.0.0.1", 0), Handler)
        self.bars, self.now, self.trouble = bars, now, lambda n: None
        self.asked = []
        self.hanging, self.let_go = threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def page(self, start, stop, limit):
        found = [ms for ms in sorted(self.bars) if start <= ms < min(stop, self.now)]
        return [(ms, *self.bars[ms]) for ms in found[:limit]]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, body, status=200, kind="application/json"):
        raw = json.dumps(body).encode() if kind == "application/json" else body.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self):
        server, url = self.server, urlsplit(self.path)
        query = {key: value[0] for key, value in parse_qs(url.query).items()}
        if url.path == "/api/v3/exchangeInfo":
            symbol = {"symbol": "BTCUSDT", "status": "TRADING", "baseAsset": "BTC", "quoteAsset": "USDT"}
            return self.answer({"symbols": [{**symbol, "permissions": ["SPOT"], "filters": []}]})
        if url.path in ("/fapi/v1/exchangeInfo", "/dapi/v1/exchangeInfo"):
            return self.answer({"symbols": []})
        if url.path == "/api/v3/time":
            return self.answer({"serverTime": server.now})
        start = int(query["startTime"])
        server.asked.append(start)
        trouble = server.trouble(len(server.asked) - 1)
        if trouble == "hang":
            server.hanging.set()
            server.let_go.wait(120)
            return None
        if trouble == "cut":
            return self.connection.close()
        if trouble == "none":
            return self.answer([])
        if trouble == "html":
            return self.answer("<html>", kind="text/html")
        if trouble:
            code, why = (0, "restricted location") if trouble == 451 else (-1003, "later")
            return self.answer({"code": code, "msg": why}, trouble)
        assert query["symbol"] == "BTCUSDT" and query["interval"] == "1h"
        rows = server.page(start, 2**60, int(query["limit"]))
        tail = [0, "0", 1, "0", "0", "0"]
        return self.answer([[row[0], *map(repr, row[1:]), *tail] for row in rows])


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    started = []

    def start(bars, now=None):
        server = StandIn(bars, max(bars) + HOUR if now is None else now)
        quick = {"poll_interval": 0.01}
        threading.Thread(target=server.serve_forever, kwargs=quick, daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.let_go.set()
        server.shutdown()
        server.server_close()


def flags(server, out, /, **more):
    given = {"exchange": "binance", "symbol": "BTC/USDT", "timeframe": "1h", "since": "2024-01-01"}
    given |= {"out": out, "base_url": server.url, "rate_limit": 0, "retry_wait": 0, "limit": 100}
    given |= more
    return [str(x) for key, value in given.items() for x in ("--" + key.replace("_", "-"), value)]


def assert_holds(out, bars):
    """The parquet holds exactly `bars`, to the bit, in the columns of every bars file."""
    timestamp, ohlcv = data.read_bars(out)
    assert timestamp.astype("datetime64[ms]").astype(np.int64).tolist() == sorted(bars)
    assert np.array_equal(ohlcv, [bars[ms] for ms in sorted(bars)])
    frame = pd.read_parquet(out)
    assert list(frame) == list(data.COLUMNS) and str(frame["timestamp"].dtype) == "datetime64[ns, UTC]"


def refused(argv, kind=UsageError) -> str:
    """The one line of what main raises."""
    with pytest.raises(kind) as error:
        download_data.main(argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def at(*hours):
    return [START + hour * HOUR for hour in hours]


# ---------------------------------------------------------------------------------------- downloads
def test_pages_become_a_file_that_the_scripts_read(serve, tmp_path, capsys):
    """From the listing on, behind --since; a silence longer than a page is a gap."""
    bars = make_bars(900, start=START + 250 * HOUR, holes=range(200, 500))
    server, out = serve(bars), tmp_path / "data" / "BTCUSDT_1h.parquet"
    result = download_data.main(flags(server, out, until="2024-02-17T09:00Z"))
    assert_holds(out, {ms: bar for ms, bar in bars.items() if ms < START + 1137 * HOUR})
    assert result["bars"] == result["new_bars"] == 587 and result["gaps"]["missing_bars"] == 300
    assert result["exit_code"] == 0 and [p.name for p in out.parent.iterdir()] == [out.name]
    assert "2024-01-11T10:00:00Z" in capsys.readouterr().out  # the first bar, not --since
    assert data.load_bars(str(out)).names == ("BTCUSDT_1h",)


@pytest.mark.parametrize("trouble", [429, "cut", "html"])
def test_a_passing_network_error_is_retried(serve, tmp_path, trouble):
    bars = make_bars(250)
    server, out = serve(bars), tmp_path / "a.parquet"
    server.trouble = lambda n: trouble if n in (1, 2) else None
    download_data.main(flags(server, out))
    assert_holds(out, bars)
    assert server.asked == at(0, 100, 100, 100, 200)


def test_an_answer_without_bars_must_be_believable(serve, tmp_path):
    bars = make_bars(450)
    server, out = serve(bars), tmp_path / "a.parquet"
    # one page comes without its bars: the last bar is asked for again, and the rest is there after all
    server.trouble = lambda n: "none" if n == 2 else None
    download_data.main(flags(server, out))
    assert_holds(out, bars)
    assert server.asked[2:5] == at(200, 199, 299)
    out.unlink()
    # every page from there on: it gives up, the hole does not become a file
    server.trouble, server.asked[:] = lambda n: "none" if n >= 2 else None, []
    assert "2024-01-09T07:00:00Z" in refused(flags(server, out, retries=1), CheckFailed)
    assert server.asked[2:] == at(200, 199, 199) and not out.exists()


def test_a_lasting_network_error_ends_and_a_refusal_is_not_tried_again(serve, tmp_path):
    server, out = serve(make_bars(450)), tmp_path / "a.parquet"
    server.trouble = lambda n: 503 if n >= 2 else None
    assert "3 tries" in refused(flags(server, out, retries=2), CheckFailed)
    assert len(server.asked) == 5 and not out.exists()
    server.trouble, server.asked[:] = lambda n: 451, []
    assert "--exchange" in refused(flags(server, out))
    assert len(server.asked) == 1


@pytest.mark.parametrize("signum, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_stopped_midway_and_resumed(serve, tmp_path, signum, code):
    bars = make_bars(75)
    server, out = serve(bars), tmp_path / "a.parquet"
    server.trouble = lambda n: "hang" if n == 2 else None
    argv = flags(server, out, limit=20)  # pages too small to leave a buffer unasked
    command = [sys.executable, str(ROOT / "scripts" / "download_data.py"), *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd="/", **pipes) as process:
        deadline = time.monotonic() + 300
        while not server.hanging.wait(0.05):
            assert process.poll() is None and time.monotonic() < deadline
        process.send_signal(signum)
        _, err = process.communicate(timeout=120)
    assert process.returncode == code and err.count("\n") == (code == 130)
    partial = tmp_path / "a.parquet.partial"
    assert partial.read_text().count("\n") == 1 + 40 and not out.exists()
    with partial.open("ab") as file:  # a kill inside a write leaves the beginning of a line
        file.write(b"1704211200000,41000.0,410")
    server.let_go.set()
    server.trouble, server.asked[:] = lambda n: None, []
    assert download_data.main(argv)["new_bars"] == 35
    assert server.asked[:2] == at(40, 60)
    assert_holds(out, bars)


# ------------------------------------------------------------------------------------- the open bar
def test_the_open_bar_is_left_out_and_comes_with_the_next_run(serve, tmp_path):
    finished = make_bars(120)
    last = max(finished)
    early = finished | {last: (finished[last][0],) * 4 + (0.5,)}  # as published half an hour early
    server, out = serve(early, now=last + HOUR // 2), tmp_path / "a.parquet"
    assert download_data.main(flags(server, out))["dropped"] == "2024-01-05T23:00:00Z"
    assert_holds(out, {ms: bar for ms, bar in finished.items() if ms < last})
    server.bars, server.now, server.asked[:] = finished, last + HOUR, []  # it has just closed
    result = download_data.main(flags(server, out))
    assert server.asked == [last] and result["new_bars"] == 1 and result["dropped"] is None
    assert_holds(out, finished)


# ----------------------------------------------------------------------------------- a finished file
def test_a_finished_file_is_extended_and_left_alone(serve, tmp_path):
    bars = make_bars(400)
    server, out = serve(bars), tmp_path / "a.parquet"
    partial = tmp_path / "a.parquet.partial"
    server.trouble = lambda n: 503 if n == 1 else None
    refused(flags(server, out, retries=0), CheckFailed)
    stale = partial.read_bytes()
    server.trouble = lambda n: None
    download_data.main(flags(server, out, until="2024-01-09"))
    assert len(data.read_bars(out)[0]) == 192
    server.asked.clear()
    before = out.read_bytes()
    assert download_data.main(flags(server, out, until="2024-01-05"))["new_bars"] == 0
    assert server.asked == [] and out.read_bytes() == before
    partial.write_bytes(stale)  # a kill between the rename and the clean-up
    assert download_data.main(flags(server, out))["new_bars"] == 208
    assert server.asked == at(192, 292, 392)
    assert_holds(out, bars)


@pytest.mark.parametrize("key, value", [("since", "2024-01-02"), ("timeframe", "4h")])
def test_files_of_other_flags_are_refused(serve, tmp_path, key, value):
    server, out = serve(make_bars(250)), tmp_path / "a.parquet"
    server.trouble = lambda n: 503 if n == 1 else None
    refused(flags(server, out, retries=0), CheckFailed)
    partial = Path(f"{out}.partial")
    server.trouble = lambda n: None
    for path in (partial, out):
        before = path.read_bytes()
        message = refused(flags(server, out, **{key: value}))
        assert message.startswith(f"{path}: ") and f"--{key}" in message and value in message
        assert path.read_bytes() == before
        download_data.main(flags(server, out))  # finishes what is partial


def test_files_of_others_are_refused(serve, tmp_path):
    server, out = serve(make_bars(50)), tmp_path / "a.parquet"
    download_data.main(flags(server, out))
    pq.write_table(pq.read_table(out).replace_schema_metadata(None), out)
    assert str(out) in refused(flags(server, out))
    out.unlink()
    partial = Path(f"{out}.partial")
    for bad in ("no json\n1,2\n", '{"after": -1}\n1,1,2\n', '{"after": 1704067200000}\n'):
        partial.write_text(bad)
        assert str(partial) in refused(flags(server, out))


# ---------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("change, words", [
    ({"exchange": "binanse"}, ["--exchange", "binance"]),
    ({"timeframe": "7m"}, ["--timeframe", "1s, 1m"]),
    ({"symbol": "BTC/USDC"}, ["--symbol", "BTC/USDT"]),
    ({"since": "yesterday"}, ["--since", "yesterday"]),
    ({"until": "2023-12-31"}, ["--until 2023-12-31", "--since 2024-01-01"]),
    ({"since": "2024-01-03T02:00"}, ["2024-01-03T02:00:00Z"]),  # the exchange's clock
    ({"out": "bars.csv"}, ["--out bars.csv"]),
    ({"base_url": "localhost:1"}, ["--base-url"]),
    ({"limit": 0}, ["--limit 0"]),
    ({"retry_wait": "nan"}, ["--retry-wait nan"]),
    ({"sinse": "2024"}, ["--sinse", "--since"]),
])
def test_bad_flags_write_nothing(serve, tmp_path, change, words):
    server = serve(make_bars(50))
    message = refused(flags(server, tmp_path / "a.parquet", **change))
    assert all(word in message for word in words), message
    assert server.asked == [] and list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------- dukascopy's files
class CandleFiles(BaseHTTPRequestHandler):
    """Serves {path: body}; server.trouble is a list of statuses to answer with first."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        server.asked.append(self.path)
        status = server.trouble.pop(0) if server.trouble else 200
        body = server.files.get(self.path, b"")
        self.send_response(404 if status == 200 and self.path not in server.files else status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def candle_file(rows) -> bytes:
    """[(second, open, high, low, close in points, volume)] as Dukascopy packs them."""
    packed = [struct.pack(">5If", s, o, c, low, h, v) for s, o, h, low, c, v in rows]
    return lzma.compress(b"".join(packed), format=lzma.FORMAT_ALONE)


@pytest.fixture
def candles(monkeypatch):
    """A server of January and February 2024 of EURUSD, four days each, the fourth without trades."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), CandleFiles)
    server.asked, server.trouble, server.files = [], [], {}
    for month in (0, 1):
        for side, more in (("BID", 0), ("ASK", 12)):
            rows = []
            for h in range(96):
                price = 110_000 + 100 * month + h + more
                rows.append((3600 * h, price, price + 9, price - 7, price + 1, 0.0 if h >= 72 else 2.5))
            server.files[f"/EURUSD/2024/{month:02d}/{side}_candles_hour_1.bi5"] = candle_file(rows)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def forex(server, out, **more):
    given = {"source": "dukascopy", "symbol": "EURUSD", "since": "2024-01-01", "until": "2024-02-01", "out": out}
    given |= {"base_url": f"http://127.0.0.1:{server.server_port}", "rate_limit": 0, "retry_wait": 0} | more
    return [str(x) for key, value in given.items() for x in ("--" + key.replace("_", "-"), value)]


def test_forex_bars_lie_between_bid_and_ask_and_the_spread_has_a_file(candles, tmp_path):
    out = tmp_path / "EURUSD_1h.parquet"
    candles.trouble = [503]
    found = download_data.main(forex(candles, out))
    assert (found["bars"], found["new_bars"]) == (72, 72) and found["last"] == "2024-01-03T23:00:00Z"
    timestamp, ohlcv = data.read_bars(out)
    assert timestamp[5] == np.datetime64("2024-01-01T05:00")
    np.testing.assert_allclose(ohlcv[5], [1.10011, 1.10020, 1.10004, 1.10012, 5.0], rtol=1e-12)
    more = download_data.main(forex(candles, out, until="2024-02-02T06:00"))
    assert more["new_bars"] == 30 and more["bars"] == 102
    again = download_data.main(forex(candles, out, until="2024-02-02T06:00"))
    assert again["new_bars"] == 0 and sorted(p.name for p in tmp_path.iterdir()) == [out.name, "spread_1h.parquet"]
    times, spread = data.read_columns(tmp_path / "spread_1h.parquet", ["EURUSD"])
    assert len(times) == 102 and np.allclose(spread, 0.00012)
    assert candles.asked[-1].startswith("/EURUSD/2024/01/")


def test_forex_pairs_share_a_file_of_spreads(candles, tmp_path):
    for side, price in (("BID", 150_000), ("ASK", 150_020)):
        rows = [(3600 * h, price, price, price, price, 1.0) for h in range(2, 100)]
        candles.files[f"/USDJPY/2024/00/{side}_candles_hour_1.bi5"] = candle_file(rows)
    for symbol in ("EURUSD", "USDJPY"):
        download_data.main(forex(candles, tmp_path / f"{symbol}_1h.parquet", symbol=symbol))
    times, spread = data.read_columns(tmp_path / "spread_1h.parquet", ["EURUSD", "USDJPY"])
    assert len(times) == 100 and np.allclose(spread, [0.00012, 0.02])


def test_forex_refusals_and_what_stays_after_them(candles, tmp_path):
    out = tmp_path / "EURUSD_1h.parquet"
    for more, what in (
        ({"symbol": "EURCZK"}, "--symbol"), ({"timeframe": "4h"}, "--timeframe"),
        ({"exchange": "kraken"}, "--exchange"), ({"until": "2023-01-01"}, "--until"), ({"symbol": "GBPUSD"}, "GBPUSD"),
    ):
        assert what in refused(forex(candles, out, **more))
    candles.files["/EURUSD/2024/00/ASK_candles_hour_1.bi5"] = b"<html>later</html>"
    assert "ASK_candles_hour_1.bi5" in refused(forex(candles, out)) and not out.exists()
    candles.trouble = [503] * 9
    refused(forex(candles, out, retries=2), CheckFailed)
    assert len(list((tmp_path / "EURUSD_1h.parquet.partial").iterdir())) == 1  # BID is kept, ASK asked again
