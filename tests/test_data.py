"""common/data.py: what is a file of bars, what is refused and where, alignment, facts, splits."""

import hashlib
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import runs
from common import data
from common.data import COLUMNS, DataError, load_bars, read_bars, split_rows, split_series

FAST = settings(max_examples=40, deadline=None, derandomize=True)
KINDS = ("parquet", "csv")
refusal = partial(runs.refusal, DataError)


def make_frame(n=40, seed=0, start="2024-01-01", freq="h"):
    """n valid bars."""
    rng = np.random.default_rng(seed)
    close = 100.0 * np.exp(np.cumsum(rng.normal(0, 0.01, n)))
    opened = np.append(100.0, close[:-1])
    return pd.DataFrame({
        "timestamp": pd.date_range(start, periods=n, freq=freq, tz="UTC").as_unit("ns"),
        "open": opened,
        "high": np.maximum(opened, close) * 1.01,
        "low": np.minimum(opened, close) * 0.99,
        "close": close,
        "volume": rng.random(n) * 10,
    })


def save(frame, path):
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path, index=False)
    return str(path)


def nanoseconds(frame):
    times = frame["timestamp"].dt.tz_convert("UTC").dt.tz_localize(None)
    return times.to_numpy().astype("datetime64[ns]")


def values(frame):
    return frame[list(COLUMNS[1:])].to_numpy(float)


# ---------------------------------------------------------------------------------------- one file
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_read_to_the_bit(tmp_path, kind):
    frame = make_frame(50)
    path = save(frame, tmp_path / f"BTC.USDT_1h.{kind}")
    bars = load_bars(path)
    assert bars.names == ("BTC.USDT_1h",) and bars.spec == path and bars.truth is None
    assert bars.timestamp.dtype == "datetime64[ns]"
    assert np.array_equal(bars.timestamp, nanoseconds(frame))
    assert bars.ohlcv.dtype == np.float64 and np.array_equal(bars.ohlcv[0], values(frame))
    assert bars.filled.shape == (1, 50) and not bars.filled.any()
    assert bars.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    close = frame["close"].to_numpy(copy=True)
    assert np.array_equal(bars.close, close)
    assert np.array_equal(bars.next_return[:-1], close[1:] / close[:-1] - 1)
    assert np.isnan(bars.next_return[-1])
    assert bars.bars_per_year == pytest.approx(8766.0)


def mixed_zones(times):
    zones = ["UTC", "Europe/Berlin", "Asia/Kolkata", "America/New_York"]
    return [t.tz_convert(zones[i % 4]).isoformat() for i, t in enumerate(times)]


def times_as(write):
    """write(frame with other times, path) for a function of the times."""
    return lambda f, p: save(clock(write)(f), p)


def write_as_windows(frame, path):
    text = frame.to_csv(index=False, lineterminator="\r\n").encode()
    path.write_bytes(b"\xef\xbb\xbf" + text + b"\r\n\r\n")


VARIANTS = {
    "shuffled.parquet": lambda f, p: save(f[list(COLUMNS[::-1])], p),
    "index.parquet": lambda f, p: f.set_index("timestamp").to_parquet(p),
    "ms.parquet": times_as(lambda t: t.dt.as_unit("ms")),
    "zone.parquet": times_as(lambda t: t.dt.tz_convert("Asia/Tokyo")),
    "text.parquet": times_as(mixed_zones),
    "zones.csv": times_as(mixed_zones),
    "short.csv": times_as(lambda t: t.dt.strftime("%Y-%m-%d %H:%M:%S.000+00")),
    "windows.csv": write_as_windows,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_ways_to_write_the_same_bars(tmp_path, name):
    frame = make_frame()
    VARIANTS[name](frame, tmp_path / name)
    timestamp, ohlcv = read_bars(tmp_path / name)
    assert np.array_equal(timestamp, nanoseconds(frame)) and np.array_equal(ohlcv, values(frame))


# ---------------------------------------------------------------------------------------- refusals
def cell(row, column, value):
    return lambda frame: frame.assign(**{column: frame[column].mask(frame.index.isin(np.atleast_1d(row)), value)})


def clock(write):
    return lambda frame: frame.assign(timestamp=write(frame["timestamp"]))


def moved(rows, to):
    return clock(lambda times: times.mask(times.index.isin(rows), times[to].set_axis(rows)))


def text(value):
    """Row 3 has this time."""
    return clock(lambda times: [value if i == 3 else t.isoformat() for i, t in enumerate(times)])


BAD = [  # an edit of 40 bars -> what the refusal names
    (lambda f: f.drop(columns=["low", "volume"]), ["'low', 'volume'"]),
    (lambda f: f.rename(columns={"open": "Open"}), ["'open'", "'Open'"]),
    (lambda f: f[:2], ["2 rows", "3"]),
    (moved([10, 11], [11, 10]), ["row 11, column 'timestamp', 2024-01-01T10", "0 dup", "1 row", "--sort"]),
    (moved([20], [19]), ["row 20, column 'timestamp'", "of row 19", "1 duplicate", "--drop-duplicates"]),
    (lambda f: pd.concat([f, f[5:9]]), ["row 40", "of row 5", "4 duplicate", "1 rows earlier"]),
    (cell(8, "high", np.inf), ["row 8, column 'high', 2024-01-01T08:00:00Z: inf", "--drop-incomplete"]),
    (cell([3, 9, 30], "low", 0.0), ["row 3, column 'low', 2024-01-01T03:00:00Z: 0 ", "2 more", "--drop-impossible"]),
    (cell(4, "volume", -1.0), ["row 4, column 'volume', 2024-01-01T04:00:00Z: -1 "]),
    (cell(5, "high", 1.0), ["row 5, column 'high', 2024-01-01T05:00:00Z: 1 "]),
    (cell(6, "open", 1e3), ["row 6, column 'open', 2024-01-01T06:00:00Z: 1000 "]),
    (cell(7, "close", 1e-3), ["row 7, column 'close', 2024-01-01T07:00:00Z: 0.001 "]),
    (cell(2, "volume", np.nan), ["row 2, column 'volume', 2024-01-01T02:00:00Z: "]),
    (lambda f: f.assign(close="n/a"), ["column 'close'"]),
    (text("2024-01-01 03:00:00"), ["row 3,", "2024-01-01T03:00:00Z", "MetaTrader", "import_bars.py --tz"]),
    (text("1704078000000"), ["row 3,", "--unit ms"]),
    (text("9999-01-01T03:00Z"), ["row 3,", "1678 .. 2261"]),
    (text("2024-01-01T03:00 CET"), ["row 3,", "CET"]),
    (text(""), ["row 3,", "empty"]),
    (clock(lambda t: t.dt.tz_localize(None)), ["MetaTrader"]),
    (clock(lambda t: t.dt.as_unit("s").astype("int64")), ["--unit s"]),
    (clock(lambda t: t.where(t.index != 6)), ["row 6, column 'timestamp'"]),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit, words", BAD)
def test_bars_that_cannot_be_are_refused(tmp_path, kind, edit, words):
    path = save(edit(make_frame()), tmp_path / f"bad.{kind}")
    assert refusal(load_bars, path, words=words).startswith(f"{path}: ")


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_no_files(tmp_path, kind):
    (tmp_path / f"empty.{kind}").touch()
    (tmp_path / f"noise.{kind}").write_bytes(b"\xff\xfe\x00nothing")
    (tmp_path / f"folder.{kind}").mkdir()
    for name in ("none", "empty", "noise", "folder"):
        path = tmp_path / f"{name}.{kind}"
        assert refusal(load_bars, path).startswith(f"{path}: ")
    for spec in ("a.txt", "", "a.csv,,b.csv", "synthetic:regime?bar=5", "synthetic:regime,a.csv"):
        refusal(load_bars, spec)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_beside_bars_obey_the_rules_of_bars(tmp_path, kind):
    frame = make_frame()[["timestamp", "close", "volume", "open"]]
    path = save(frame, tmp_path / f"spread.{kind}")
    times, spread = data.read_columns(path, ("volume", "close"))
    assert np.array_equal(times, nanoseconds(frame))
    assert np.array_equal(spread, frame[["volume", "close"]])
    assert "'EURUSD'" in refusal(data.read_columns, path, ("close", "EURUSD"))
    for edit, word in ((moved([7], [6]), "row 7"), (cell(4, "close", np.inf), "row 4, column 'close'")):
        path = save(edit(frame.copy()), tmp_path / f"bad.{kind}")
        assert word in refusal(data.read_columns, path, ("close",))


def test_a_folder_gives_one_file_of_either_kind(tmp_path):
    for name in ("EURUSD_1h.csv", "USDJPY_1h.parquet", "USDJPY_4h.csv", "GBPUSD.txt"):
        (tmp_path / name).touch()
    assert data.find_file(tmp_path, "EURUSD") == tmp_path / "EURUSD_1h.csv"
    assert data.find_file(tmp_path, "USDJPY_1h") == tmp_path / "USDJPY_1h.parquet"
    refusal(data.find_file, tmp_path, "USDJPY", words=["USDJPY_1h.parquet", "USDJPY_4h.csv"])
    refusal(data.find_file, tmp_path, "GBPUSD", words=["GBPUSD"])
    refusal(data.find_file, tmp_path / "no", "EURUSD", words=[str(tmp_path / "no")])


# ----------------------------------------------------------------------------------- gaps and facts
def test_gaps_are_reported_and_never_filled(tmp_path):
    frame = make_frame(200).drop(index=[*range(20, 23), 50, *range(100, 107)])
    bars = load_bars(save(frame, tmp_path / "g.csv"))
    want = {"name": "g", "count": 3, "missing_bars": 11, "longest_bars": 7}
    assert bars.gaps == (want | {"longest_at": "2024-01-05T03:00:00Z"},)
    assert len(bars.timestamp) == 189 and not bars.filled.any()
    assert bars.bars_per_year == pytest.approx(188 / (199 / 8766.0), rel=1e-12)


def test_what_is_implausible_is_said(tmp_path, capsys):
    frame = make_frame(200)
    clean = load_bars(save(frame, tmp_path / "clean.csv"))
    frame.loc[70, ["high", "close"]] *= 100.0  # a bad tick
    frame.loc[120:, ["open", "high", "low", "close"]] *= 2.0  # a true jump, at the open
    bars = load_bars(save(frame, tmp_path / "tick.parquet"))
    facts, close = bars.facts[0], clean.close
    assert facts["largest_move"] == pytest.approx(100 * close[70] / close[69] - 1)
    assert facts["largest_move_at"] == "2024-01-03T22:00:00Z"
    assert (facts["far_moves"], facts["bounces"]) == (3, 1)
    assert facts["far_openings"] == 2  # back from the tick, and the jump
    assert facts["largest_opening_at"] == "2024-01-03T23:00:00Z"

    frame[["open", "high", "low", "close"]] = 5.0
    frame["volume"] = 3.0
    flat = load_bars(save(frame, tmp_path / "flat.csv"))
    assert not flat.facts[0]["moving"] and flat.facts[0]["volume"] == 3.0
    for of, words in ((clean, []), (bars, ["moves", "open"]), (flat, ["never moves", "volume is 3"])):
        data.print_facts(of)
        _, _, *more = capsys.readouterr().out.splitlines()  # gaps, the largest move
        assert len(more) == len(words) and all(word in line for word, line in zip(words, more))


# ------------------------------------------------------------------------------------ several files
def write_two(folder, first, second):
    return f"{save(first, folder / 'A_1h.parquet')},{save(second, folder / 'B_1h.csv')}"


def test_two_files_on_the_clock_of_the_first(tmp_path):
    a = make_frame(60).drop(index=[30])
    bars = load_bars(write_two(tmp_path, a, make_frame(100, start="2023-12-31").drop(index=[40, 41, 42])))
    assert bars.names == ("A_1h", "B_1h") and np.array_equal(bars.timestamp, nanoseconds(a))
    assert np.array_equal(bars.ohlcv[0], values(a)) and not bars.filled[0].any()
    assert [gap["missing_bars"] for gap in bars.gaps] == [1, 3]
    both = (tmp_path / "A_1h.parquet").read_bytes() + (tmp_path / "B_1h.csv").read_bytes()
    assert bars.sha256 == hashlib.sha256(both).hexdigest()


def test_the_fill_limit_is_exact(tmp_path):
    b = make_frame(60, seed=1).drop(index=range(20, 25))
    spec = write_two(tmp_path, make_frame(60), b)
    assert load_bars(spec, fill_limit=5).filled[1].sum() == 5
    words = "B_1h.csv: ", "2024-01-02T00:00:00Z", "row 24", "5 bars", "2024-01-01T19:00:00Z", "--fill-limit 5"
    refusal(load_bars, spec, 4, words=words)
    refusal(load_bars, spec, 0, words=["4 more rows"])
    refusal(load_bars, spec, -1, words=["--fill-limit -1"])


DROPS = st.sets(st.integers(1, 59), max_size=12)


@settings(FAST, max_examples=15)
@given(DROPS, DROPS, st.integers(5, 55), st.floats(0.5, 2.0))
def test_alignment_sees_the_past_only(tmp_path_factory, drop_a, drop_b, t, factor):
    folder = tmp_path_factory.mktemp("align")
    a = make_frame(60).drop(index=sorted(drop_a))
    b = make_frame(60, seed=1).drop(index=sorted(drop_b))
    bars = load_bars(write_two(folder, a, b), fill_limit=60)
    times = nanoseconds(b)
    for row, time in enumerate(bars.timestamp):
        at = np.flatnonzero(times <= time)[-1]
        own, old = values(b)[at], times[at] < time
        assert bars.filled[1, row] == old
        assert np.array_equal(bars.ohlcv[1, row], [own[3]] * 4 + [0.0] if old else own)
    # rows behind t are changed, and some of them lost: nothing up to t moves
    cut = pd.Timestamp("2024-01-01", tz="UTC") + pd.Timedelta(hours=t)
    later = b["timestamp"] > cut
    b.loc[later, list(COLUMNS[1:5])] *= factor
    again = load_bars(write_two(folder, a, b[~later | (b.index % 11 > 0)]), fill_limit=60)
    known = bars.timestamp <= np.datetime64(cut.tz_localize(None))
    assert np.array_equal(bars.ohlcv[:, known], again.ohlcv[:, known])
    assert np.array_equal(bars.filled[:, known], again.filled[:, known])


def test_files_that_cannot_be_aligned(tmp_path):
    for second, words in (
        (make_frame(60, start="2024-01-01T05:00"), ["starts at 2024-01-01T05:00:00Z"]),
        (make_frame(30), ["2024-01-03T06:00:00Z", "row 54"]),
        (make_frame(800, start="2023-12-31", freq="4h"), ["04:00:00", "01:00:00"]),
        (make_frame(800, start="2023-12-31", freq="5min"), ["00:05:00", "01:00:00"]),
        (make_frame(90, start="2023-12-31T00:30"), ["no bar opens"]),
    ):
        refusal(load_bars, write_two(tmp_path, make_frame(60), second), words=["B_1h.csv", *words])
    # half of the hours are missing, the median step is two hours: the bars are hourly all the same
    b = make_frame(61, seed=1).drop(index=[i for i in range(61) if i % 6 in (2, 4, 5)])
    assert load_bars(write_two(tmp_path, make_frame(60), b)).filled[1].sum() == 30


def test_the_same_file_twice(tmp_path):
    one = save(make_frame(), tmp_path / "A.csv")
    shutil.copy(one, tmp_path / "B.csv")
    for two in (one, tmp_path / "." / "A.csv", tmp_path / "B.csv"):
        assert refusal(load_bars, f"{one},{two}").startswith(f"{two}: ")


# ------------------------------------------------------------------------------------------- splits
HOURS = np.datetime64("2022-07-01", "ns") + np.arange(20_000) * np.timedelta64(1, "h")
SHARES = "0.70/0.15/0.15"


def test_split_by_shares_and_by_dates():
    want = dict(train=(800, 14_000), eval=(14_066, 17_000), test=(17_066, 19_999))
    assert split_rows(HOURS, SHARES, purge=66, first=800) == want
    dates = "2023-01-01/2024-01-01"
    want = dict(train=(5, 4416), eval=(4426, 13_176), test=(13_186, 19_999))
    assert split_rows(HOURS, dates, purge=10, first=5) == want
    # a date within a gap starts with the first bar after it
    assert split_rows(np.delete(HOURS, range(4400, 4500)), dates, 0)["eval"] == (4400, 13_076)


PERCENT = st.integers(1, 98)


@FAST
@given(st.integers(3, 400), st.integers(0, 40), st.integers(0, 60), PERCENT, PERCENT)
def test_splits_never_touch_and_a_refusal_names_one_that_would_do(rows, purge, first, train, middle):
    middle = min(middle, 99 - train)
    split = f"{train / 100}/{middle / 100}/{(100 - train - middle) / 100}"
    try:
        found = split_rows(HOURS[:rows], split, purge, first)
    except DataError as error:
        need = max(purge, 1)
        least = first + need + 2 * (purge + need) + 1
        assert f" of {rows} rows" in str(error)
        if rows < least:
            assert f"at least {least} bars" in str(error)
            return
        better = str(error).rpartition("--split ")[2].split()[0]
        found = split_rows(HOURS[:rows], better, purge, first)
    assert list(found) == ["train", "eval", "test"]
    (a, b), (c, d), (e, f) = found.values()
    assert first == a < b <= c < d <= e < f == rows - 1
    assert c - b == purge and e - d == purge and min(b - a, d - c, f - e) >= purge


@pytest.mark.parametrize("split", [
    "0.7/0.2/0.2", "0.7/0.3/0", "1.2/-0.1/-0.1", "nan/0.5/0.5", "a/b/c", "0.7/0.3", "",
    "2023-01-01", "2023-01-01/2023-13-01", "2024-01-01/2023-01-01", "2023-01-01/2030-01-01",
])
def test_splits_that_are_refused(split):
    assert refusal(split_rows, HOURS, split, 10).startswith(f"split '{split}': ")


def series(tmp_path, *frames):
    return [load_bars(save(f, tmp_path / f"P{k}.csv")) for k, f in enumerate(frames)]


@pytest.mark.parametrize("split", [SHARES, "2024-01-12/2024-01-16"])
def test_one_calendar_border_for_pairs_of_unequal_history(tmp_path, split):
    """Split one by one, train rows of the long pair would span the eval dates of the short one."""
    pairs = series(tmp_path, make_frame(480), make_frame(288, seed=1, start="2024-01-09"))
    found = split_series(pairs, split, purge=5, first=[20, 7])
    assert [rows["train"][0] for rows in found] == [20, 7]
    times = [{k: bars.timestamp[a:b] for k, (a, b) in rows.items()} for bars, rows in zip(pairs, found)]
    for one in times:
        for other in times:
            assert one["train"][-1] < other["eval"][0] and one["eval"][-1] < other["test"][0]
    rows = [np.diff(list(x.values())).sum() + 10 for x in found]  # what a border cost: the purges
    assert rows == [480 - 1 - 20, 288 - 1 - 7]


def test_series_that_cannot_share_a_border(tmp_path):
    late, longer = make_frame(60, start="2024-01-19"), make_frame(300, freq="4h")
    for other, word in ((late, "train has 0 of 60"), (longer, "04:00:00")):
        refusal(split_series, series(tmp_path, make_frame(480), other), SHARES, 5, words=["P1: ", word])
