"""scripts/download_data.py against a real HTTP server here that answers like Binance and like Bitstamp."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import ccxt
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from common import data
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
    """Binance's and Bitstamp's endpoints over `bars`; `now` is its clock, `asked` the start of each page,
    `spans` how many ms a page of Bitstamp's may cover.

    trouble(n), for the n-th page from 0: a status to answer with; "cut" drops the connection, "hang" waits,
    "none" answers without bars, "html" with a page for people.
    """

    daemon_threads = True

    def __init__(self, bars, now):
        super().__init__(("127.0.0.1", 0), Handler)
        self.bars, self.now, self.trouble = bars, now, lambda n: None
        self.asked, self.spans = [], []
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
        if url.path == "/api/v2/markets/":
            market = {
                "name": "BTC/USD",
                "market_symbol": "btcusd",
                "base_currency": "BTC",
                "base_decimals": 8,
            }
            more = {
                "counter_currency": "USD",
                "counter_decimals": 2,
                "trading": "Enabled",
                "market_type": "SPOT",
            }
            return self.answer(
                [{**market, **more, "minimum_order_value": "10", "description": "Bitcoin / U.S. dollar"}]
            )
        if url.path == "/api/v2/currencies/":
            return self.answer([])
        if url.path not in ("/api/v3/klines", "/api/v2/ohlc/btcusd/"):
            return self.answer({"code": -1, "msg": f"no such endpoint {url.path}"}, 404)

        binance = url.path == "/api/v3/klines"
        start = int(query["startTime"]) if binance else int(query["start"]) * 1000
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
            told = {451: (0, "Service unavailable from a restricted location")}.get(trouble, (-1003, "later"))
            return self.answer(dict(zip(("code", "msg"), told, strict=True)), trouble)
        if binance:
            assert query["symbol"] == "BTCUSDT" and query["interval"] == "1h"
            rows = server.page(start, 2**60, int(query["limit"]))
            tail = [0, "0", 1, "0", "0", "0"]
            return self.answer([[row[0], *map(repr, row[1:]), *tail] for row in rows])
        stop = (int(query["end"]) + 1) * 1000
        server.spans.append(stop - start)
        rows = server.page(start, stop, int(query["limit"]))
        names = ("open", "high", "low", "close", "volume")
        ohlc = [{"timestamp": str(ms // 1000), **dict(zip(names, map(repr, bar), strict=True))} for ms, *bar in rows]
        return self.answer({"data": {"pair": "BTC/USD", "ohlc": ohlc}})


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    started = []

    def start(bars, now=None):
        server = StandIn(bars, max(bars) + HOUR if now is None else now)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.let_go.set()
        server.shutdown()
        server.server_close()


def flags(server, out, /, **more):
    given = {"exchange": "binance", "symbol": "BTC/USDT", "timeframe": "1h", "since": "2024-01-01"}
    given |= {"out": out, "base_url": server.url, "rate_limit": 0, "retry_wait": 0, "limit": 100} | more
    return [str(x) for key, value in given.items() for x in ("--" + key.replace("_", "-"), value)]


def assert_holds(out, bars):
    """The parquet holds exactly `bars`, to the bit, in the columns of every bars file."""
    timestamp, ohlcv = data.read_bars(out)
    assert timestamp.astype("datetime64[ms]").astype(np.int64).tolist() == sorted(bars)
    assert np.array_equal(ohlcv, [bars[ms] for ms in sorted(bars)])
    frame = pd.read_parquet(out)
    assert list(frame) == list(data.COLUMNS) and str(frame["timestamp"].dtype) == "datetime64[ns, UTC]"


def refused(capsys, argv, code=2):
    """Run main, expect `code` and nothing but one line on stderr; that line."""
    with pytest.raises(SystemExit) as stop:
        download_data.main(argv)
    assert stop.value.code == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("download_data.py: ")
    return err


# ---------------------------------------------------------------------------------------------- pages
def test_pages_equal_the_servers_bars(serve, tmp_path, capsys):
    bars = make_bars(1000, holes=range(340, 345))
    server, out = serve(bars), tmp_path / "deep" / "BTCUSDT_1h.parquet"
    result = download_data.main(flags(server, out, limit=300, until="2024-03-01"))
    assert_holds(out, bars)
    # every page starts where the one before ended; the last one, behind the newest bar, is never asked for
    assert server.asked == [START, START + 300 * HOUR, START + 605 * HOUR, START + 905 * HOUR]
    assert result["bars"] == result["new_bars"] == 995 and result["dropped"] is None
    assert result["gaps"]["missing_bars"] == 5 and result["gaps"]["longest_at"] == "2024-01-15T03:00:00Z"
    assert "1 gaps, 5 bars missing; longest 5 bars after 2024-01-15T03:00:00Z" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    loaded = data.load_bars(str(out))
    assert loaded.names == ("BTCUSDT_1h",) and loaded.ohlcv.shape == (1, 995, 5)


def test_until_is_exclusive_and_since_may_lie_within(serve, tmp_path):
    bars = make_bars(200)
    server, out = serve(bars), tmp_path / "a.parquet"
    download_data.main(flags(server, out, since="2024-01-02T03:00Z", until="2024-01-03T05:00:00+02:00"))
    assert_holds(out, {START + i * HOUR: bars[START + i * HOUR] for i in range(27, 51)})


def test_page_size_never_exceeds_what_the_exchange_gives(serve, tmp_path):
    bars = make_bars(1500)
    server, out = serve(bars), tmp_path / "a.parquet"
    argv = flags(server, out, exchange="bitstamp", symbol="BTC/USD", until="2024-03-03T12:00", limit=9999)
    download_data.main(argv)
    assert_holds(out, bars)
    assert server.asked == [START, START + 1000 * HOUR]
    assert set(server.spans) == {1000 * HOUR}


def test_another_exchange_without_a_clock_and_empty_pages(serve, tmp_path, capsys):
    # listed 250 hours after --since, silent for 300 hours later on: windows that hold nothing
    bars = make_bars(900, start=START + 250 * HOUR, holes=range(200, 500))
    server, out = serve(bars), tmp_path / "a.parquet"
    argv = flags(server, out, exchange="bitstamp", symbol="BTC/USD", until="2024-02-17T22:00")
    download_data.main(argv)
    assert_holds(out, bars)
    said = capsys.readouterr().out
    assert "the exchange's first bar is of 2024-01-11T10:00:00Z, --since was 2024-01-01" in said
    assert "1 gaps, 300 bars missing" in said


# ---------------------------------------------------------------------------------------------- trouble
@pytest.mark.parametrize("trouble", [500, 429, "cut", "html"])
def test_a_passing_network_error_is_retried(serve, tmp_path, capsys, trouble):
    bars = make_bars(250)
    server, out = serve(bars), tmp_path / "a.parquet"
    server.trouble = lambda n: trouble if n in (1, 2) else None
    download_data.main(flags(server, out))
    assert_holds(out, bars)
    assert server.asked == [START] + [START + 100 * HOUR] * 3 + [START + 200 * HOUR]
    assert capsys.readouterr().err.count("; try ") == 2


def test_an_answer_without_bars_must_be_believable(serve, tmp_path, capsys):
    bars = make_bars(450)
    server, out = serve(bars), tmp_path / "a.parquet"
    # one page comes without its bars: the last bar is asked for again, and what follows it is there after all
    server.trouble = lambda n: "none" if n == 2 else None
    download_data.main(flags(server, out))
    assert_holds(out, bars)
    assert server.asked[2:5] == [START + i * HOUR for i in (200, 199, 299)]
    out.unlink()
    capsys.readouterr()
    # every page from there on: it gives up, the hole does not become a file
    server.trouble, server.asked[:] = lambda n: "none" if n >= 2 else None, []
    with pytest.raises(SystemExit) as stop:
        download_data.main(flags(server, out, retries=1))
    err = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and "the bar of 2024-01-09T07:00:00Z, which it gave before" in err[-1]
    assert server.asked[2:] == [START + i * HOUR for i in (200, 199, 199)] and not out.exists()


def test_a_lasting_network_error_ends_and_the_next_run_asks_for_the_rest_only(serve, tmp_path, capsys):
    bars = make_bars(450)
    server, out = serve(bars), tmp_path / "a.parquet"
    server.trouble = lambda n: 503 if n >= 2 else None
    with pytest.raises(SystemExit) as stop:
        download_data.main(flags(server, out, retries=2))
    err = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and "gave up after 3 tries" in err[-1] and len(err) == 3
    assert len(server.asked) == 5 and not out.exists()
    server.trouble, server.asked[:] = lambda n: None, []
    result = download_data.main(flags(server, out))
    assert server.asked == [START + i * HOUR for i in (200, 300, 400)]
    assert result["new_bars"] == 250 and result["bars"] == 450
    assert_holds(out, bars)
    assert not list(tmp_path.glob("*.partial"))


def test_the_exchanges_own_rate_limit_holds():
    exchange = download_data.make_exchange(download_data.Args(exchange="kraken", timeframe="1d"))
    assert exchange.enableRateLimit is True and exchange.rateLimit == ccxt.kraken().rateLimit > 0
    exchange = download_data.make_exchange(download_data.Args(rate_limit=250.0))
    assert exchange.enableRateLimit is True and exchange.rateLimit == 250.0


def test_a_refusal_by_country_is_not_retried(serve, tmp_path, capsys):
    server = serve(make_bars(50))
    server.trouble = lambda n: 451
    assert "try another --exchange" in refused(capsys, flags(server, tmp_path / "a.parquet"))
    assert len(server.asked) == 1


def run_until_it_hangs(server, argv, page):
    """The script as a process of its own, stopped inside the request for `page`."""
    server.trouble = lambda n: "hang" if n == page else None
    command = [sys.executable, str(ROOT / "scripts" / "download_data.py"), *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/")
    try:
        deadline = time.monotonic() + 300
        while not server.hanging.wait(0.05):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=1)
    except BaseException:
        process.kill()
        raise
    return process


def test_killed_midway_and_resumed(serve, tmp_path):
    bars = make_bars(75)
    server, out = serve(bars), tmp_path / "a.parquet"
    argv = flags(server, out, limit=20)  # pages too small to leave a buffer unasked
    process = run_until_it_hangs(server, argv, 2)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=120)
    partial = tmp_path / "a.parquet.partial"
    assert partial.exists() and not out.exists()
    # a kill inside a write leaves the beginning of a line
    with partial.open("ab") as file:
        file.write(b"1704211200000,41000.0,410")
    server.let_go.set()
    server.trouble, server.asked[:] = lambda n: None, []
    assert download_data.main(argv)["new_bars"] == 35
    assert server.asked == [START + i * HOUR for i in (40, 60)]
    assert_holds(out, bars)


def test_interrupted_by_the_user(serve, tmp_path):
    server, out = serve(make_bars(450)), tmp_path / "a.parquet"
    process = run_until_it_hangs(server, flags(server, out), 1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err.count("\n") == 1 and "the bars so far are kept" in err
    assert (tmp_path / "a.parquet.partial").read_text().count("\n") == 1 + 100


@pytest.mark.parametrize("keep", [0, 1, 60, 150, 5000, 9999])
def test_a_partial_file_cut_anywhere_goes_on(serve, tmp_path, keep):
    bars = make_bars(250)
    server, out = serve(bars), tmp_path / "a.parquet"
    server.trouble = lambda n: 503 if n == 2 else None
    with pytest.raises(SystemExit):
        download_data.main(flags(server, out, retries=0))
    partial = tmp_path / "a.parquet.partial"
    whole = partial.read_bytes()
    partial.write_bytes(whole[:keep])
    stored = max(whole[:keep].count(b"\n") - 1, 0)
    server.trouble, server.asked[:] = lambda n: None, []
    assert download_data.main(flags(server, out))["new_bars"] == 250 - stored
    assert server.asked[0] == START + stored * HOUR
    assert_holds(out, bars)


# ---------------------------------------------------------------------------------------------- the open bar
def test_the_open_bar_is_left_out_and_comes_with_the_next_run(serve, tmp_path, capsys):
    bars = make_bars(120)
    last = max(bars)
    finished = dict(bars)
    bars[last] = (bars[last][0],) * 4 + (0.5,)  # as published half an hour early
    server, out = serve(bars, now=last + HOUR // 2), tmp_path / "a.parquet"
    result = download_data.main(flags(server, out))
    assert result["dropped"] == "2024-01-05T23:00:00Z"
    assert "left out the bar of 2024-01-05T23:00:00Z" in capsys.readouterr().out
    assert_holds(out, {ms: bar for ms, bar in finished.items() if ms < last})
    server.bars, server.now, server.asked[:] = finished, last + HOUR, []
    result = download_data.main(flags(server, out))
    assert server.asked == [last] and result["new_bars"] == 1 and result["dropped"] is None
    assert_holds(out, finished)


def test_a_bar_that_just_closed_stays(serve, tmp_path):
    bars = make_bars(50)
    server, out = serve(bars, now=max(bars) + HOUR), tmp_path / "a.parquet"
    assert download_data.main(flags(server, out))["dropped"] is None
    assert_holds(out, bars)


def test_months_have_their_own_lengths():
    ms = [int(pd.Timestamp(f"2024-0{m}-01", tz="UTC").timestamp() * 1000) for m in (2, 3, 5)]
    assert download_data.bar_end(ms[0], "1M") == ms[1] and download_data.bar_end(ms[0], "3M") == ms[2]
    assert download_data.bar_end(ms[0], "4h") == ms[0] + 4 * HOUR


# ------------------------------------------------------------------------------------------ a finished file
def test_a_finished_file_is_extended_and_left_alone(serve, tmp_path):
    bars = make_bars(400)
    server, out = serve(bars), tmp_path / "a.parquet"
    download_data.main(flags(server, out, until="2024-01-09"))
    assert len(data.read_bars(out)[0]) == 192
    server.asked.clear()
    before = out.read_bytes()
    assert download_data.main(flags(server, out, until="2024-01-05"))["new_bars"] == 0
    assert server.asked == [] and out.read_bytes() == before
    assert download_data.main(flags(server, out))["new_bars"] == 208
    assert server.asked == [START + i * HOUR for i in (192, 292, 392)]
    assert_holds(out, bars)


def test_a_kill_between_the_rename_and_the_clean_up_loses_nothing(serve, tmp_path):
    bars = make_bars(250)
    server, out = serve(bars), tmp_path / "a.parquet"
    server.trouble = lambda n: 503 if n == 2 else None
    with pytest.raises(SystemExit):
        download_data.main(flags(server, out, retries=0))
    stale = (tmp_path / "a.parquet.partial").read_bytes()
    server.trouble = lambda n: None
    download_data.main(flags(server, out, until="2024-01-10"))
    (tmp_path / "a.parquet.partial").write_bytes(stale)
    download_data.main(flags(server, out))
    assert_holds(out, bars)


def test_a_partial_file_whose_finished_part_is_gone(serve, tmp_path, capsys):
    server, out = serve(make_bars(450)), tmp_path / "a.parquet"
    download_data.main(flags(server, out, until="2024-01-05"))
    server.trouble = lambda n: 503 if n == 2 else None
    with pytest.raises(SystemExit):
        download_data.main(flags(server, out, retries=0))
    out.unlink()
    capsys.readouterr()
    assert "goes on from is gone" in refused(capsys, flags(server, out))


@pytest.mark.parametrize("suffix", ["", ".partial"])
@pytest.mark.parametrize("key, value", [("since", "2024-01-02"), ("timeframe", "4h")])
def test_files_of_other_flags_are_refused(serve, tmp_path, capsys, suffix, key, value):
    server, out = serve(make_bars(250)), tmp_path / "a.parquet"
    server.trouble = lambda n: 503 if suffix and n == 1 else None
    with pytest.raises(SystemExit) if suffix else open(os.devnull):
        download_data.main(flags(server, out, retries=0))
    before = Path(f"{out}{suffix}").read_bytes()
    capsys.readouterr()
    err = refused(capsys, flags(server, out, **{key: value}))
    assert f"{out}{suffix}: holds --{key}" in err and value in err
    assert Path(f"{out}{suffix}").read_bytes() == before


def test_files_of_others_are_refused(serve, tmp_path, capsys):
    server, out = serve(make_bars(50)), tmp_path / "a.parquet"
    download_data.main(flags(server, out))
    pq.write_table(pq.read_table(out).replace_schema_metadata(None), out)
    capsys.readouterr()
    assert "was not written by this script" in refused(capsys, flags(server, out))
    out.unlink()
    for bad in ("no json\n1,2\n", '{"after": -1}\n1,1,2\n', '{"after": -1}\n2,1,1,1,1,1\n1,1,1,1,1,1\n'):
        Path(f"{out}.partial").write_text(bad)
        assert "a.parquet.partial: damaged" in refused(capsys, flags(server, out))


# ---------------------------------------------------------------------------------------------- bad input
def test_bars_that_cannot_be_never_become_a_parquet(serve, tmp_path, capsys):
    bars = make_bars(150)
    o, high, low, c, v = bars[START + 120 * HOUR]
    bars[START + 120 * HOUR] = (o, low / 2, low, c, v)
    server, out = serve(bars), tmp_path / "a.parquet"
    err = refused(capsys, flags(server, out))
    assert f"{out}: row 120, column 'high', 2024-01-06T00:00:00Z: " in err
    assert not out.exists() and not list(tmp_path.glob("*.tmp*"))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"exchange": "binanse"}, "--exchange 'binanse' is not known to ccxt; did you mean binance"),
        ({"timeframe": "7m"}, "--timeframe '7m': binance offers 1s, 1m"),
        ({"symbol": "BTC/USDC"}, "--symbol 'BTC/USDC' is not traded on binance; did you mean BTC/USDT?"),
        ({"since": "yesterday"}, "--since 'yesterday' is not a date"),
        ({"until": "2023-12-31"}, "--until 2023-12-31 is not after --since 2024-01-01"),
        (
            {"since": "2024-01-03T02:00"},
            "lies in the future (the exchange's clock says 2024-01-03T02:00:00Z)",
        ),
        ({"out": "bars.csv"}, "--out bars.csv: must end in .parquet"),
        ({"base_url": "localhost:1"}, "--base-url 'localhost:1': write http(s)://HOST"),
        ({"limit": 0}, "--limit is 0, must be 1 or more"),
        ({"retries": -1}, "--retries is -1, must be 0 or more"),
        ({"retry_wait": "nan"}, "--retry-wait is nan, must be 0 or more"),
        ({"sinse": "2024"}, "--sinse"),
        ({"retries": "many"}, "many"),
    ],
)
def test_bad_flags_are_one_line_and_exit_2(serve, tmp_path, capsys, change, words):
    server = serve(make_bars(50))
    err = refused(capsys, flags(server, tmp_path / "a.parquet", **change))
    assert words in err
    assert server.asked == [] and list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(serve, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    err = refused(capsys, flags(serve(make_bars(50)), tmp_path / "file" / "a.parquet"))
    assert f"{tmp_path / 'file'}" in err


def test_no_bars_at_all(serve, tmp_path, capsys):
    server = serve({START + 900 * HOUR: (1, 1, 1, 1, 1)})
    err = refused(capsys, flags(server, tmp_path / "a.parquet", until="2024-01-20"))
    assert "no finished bars from 2024-01-01T00:00:00Z to 2024-01-20T00:00:00Z" in err
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_has_no_traceback(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "download_data.py"), "--exchange", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "'nowhere' is not known to ccxt" in done.stderr
