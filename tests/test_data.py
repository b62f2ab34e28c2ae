"""common/data.py: what is a file of bars, what is refused and in which words, alignment, splits."""

import hashlib
import io
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data import COLUMNS, DataError, describe_gaps, find_gaps, load_bars, read_bars, split_rows

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="real bars (../shared/data) are not part of the project"
)
FAST = settings(max_examples=60, deadline=None, derandomize=True)
KINDS = ("parquet", "csv")


def make_frame(n=40, seed=0, start="2024-01-01", freq="h"):
    """n valid bars."""
    rng = np.random.default_rng(seed)
    close = 100.0 * np.exp(np.cumsum(rng.normal(0, 0.01, n)))
    opened = np.append(100.0, close[:-1])
    return pd.DataFrame(
        {
            "timestamp": pd.date_range(start, periods=n, freq=freq, tz="UTC").as_unit("ns"),
            "open": opened,
            "high": np.maximum(opened, close) * 1.01,
            "low": np.minimum(opened, close) * 0.99,
            "close": close,
            "volume": rng.random(n) * 10,
        }
    )


def save(frame, path):
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path, index=False)
    return str(path)


def refusal(call, *args):
    """The message of the DataError that call(*args) must raise: one line."""
    with pytest.raises(DataError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def nanoseconds(frame):
    return frame["timestamp"].dt.tz_convert("UTC").dt.tz_localize(None).to_numpy().astype("datetime64[ns]")


def values(frame):
    return frame[list(COLUMNS[1:])].to_numpy(float)


# ---------------------------------------------------------------------------------------------- one file
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_read_to_the_bit(tmp_path, kind):
    frame = make_frame(50)
    path = save(frame, tmp_path / f"BTC.USDT_1h.{kind}")
    bars = load_bars(path)
    assert bars.names == ("BTC.USDT_1h",) and bars.spec == path and bars.truth is None
    assert bars.timestamp.dtype == "datetime64[ns]" and np.array_equal(bars.timestamp, nanoseconds(frame))
    assert bars.ohlcv.dtype == np.float64 and np.array_equal(bars.ohlcv[0], values(frame))
    assert bars.filled.shape == (1, 50) and not bars.filled.any()
    assert bars.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert np.array_equal(bars.close, frame["close"])
    assert np.array_equal(
        bars.next_return[:-1], frame["close"].to_numpy()[1:] / frame["close"].to_numpy()[:-1] - 1
    )
    assert np.isnan(bars.next_return[-1])


def variants():
    """The same bars written in other legitimate ways, as (name, write(frame, path))."""

    def csv(times):
        return lambda f, p: f.assign(timestamp=times(f["timestamp"])).to_csv(p, index=False)

    def mixed(times):
        zones = ["UTC", "Europe/Berlin", "Asia/Kolkata", "America/New_York"]
        return [t.tz_convert(zones[i % 4]).isoformat() for i, t in enumerate(times)]

    yield "shuffled.parquet", lambda f, p: f[list(COLUMNS[::-1])].to_parquet(p, index=False)
    yield "index.parquet", lambda f, p: f.set_index("timestamp").to_parquet(p)
    yield "ms.parquet", lambda f, p: f.assign(timestamp=f["timestamp"].dt.as_unit("ms")).to_parquet(p)
    yield (
        "zone.parquet",
        lambda f, p: f.assign(timestamp=f["timestamp"].dt.tz_convert("Asia/Tokyo")).to_parquet(p),
    )
    yield "text.parquet", lambda f, p: f.assign(timestamp=mixed(f["timestamp"])).to_parquet(p)
    yield "shuffled.csv", lambda f, p: f[list(COLUMNS[::-1])].to_csv(p, index=False)
    yield "z.csv", csv(lambda t: t.dt.strftime("%Y-%m-%dT%H:%MZ"))
    yield "zones.csv", csv(mixed)
    yield "short.csv", csv(lambda t: t.dt.strftime("%Y-%m-%d %H:%M:%S.000+00"))
    yield (
        "windows.csv",
        lambda f, p: p.write_bytes(
            b"\xef\xbb\xbf" + f.to_csv(index=False, lineterminator="\r\n").encode() + b"\r\n\r\n"
        ),
    )


@pytest.mark.parametrize("name, write", list(variants()), ids=lambda x: x if isinstance(x, str) else "")
def test_other_ways_to_write_the_same_bars(tmp_path, name, write):
    frame = make_frame()
    write(frame, tmp_path / name)
    timestamp, ohlcv = read_bars(tmp_path / name)
    assert np.array_equal(timestamp, nanoseconds(frame)) and np.array_equal(ohlcv, values(frame))


@FAST
@given(st.lists(st.floats(1e-300, 1e300), min_size=3, max_size=8), st.integers(0, 2**60))
def test_csv_prices_and_nanoseconds_survive_text(closes, ns):
    times = np.array([ns + i * 3_600_000_000_000 for i in range(len(closes))], "datetime64[ns]")
    rows = [f"{t}Z,{c!r},{c!r},{c!r},{c!r},0" for t, c in zip(times, closes, strict=True)]
    timestamp, ohlcv = read_bars("x.csv", "\n".join([",".join(COLUMNS), *rows]).encode())
    assert np.array_equal(timestamp, times) and ohlcv[:, 3].tolist() == closes


# ---------------------------------------------------------------------------------------------- refusals
def cell(row, column, value):
    def edit(frame):
        frame[column] = frame[column].astype(object)
        frame.loc[row, column] = value
        frame[column] = frame[column].astype(float)
        return frame

    return edit


def swapped(frame):
    frame.loc[[10, 11], "timestamp"] = frame.loc[[11, 10], "timestamp"].to_numpy()
    return frame


def doubled(frame):
    frame.loc[20, "timestamp"] = frame.loc[19, "timestamp"]
    return frame


BAD = {
    "missing": (
        lambda f: f.drop(columns=["low", "volume"]),
        ["columns missing 'low', 'volume'", "exactly timestamp"],
    ),
    "extra": (lambda f: f.assign(vwap=1.0, n=2), ["columns extra 'vwap', 'n'"]),
    "case": (lambda f: f.rename(columns={"open": "Open"}), ["missing 'open' and extra 'Open'"]),
    "few": (lambda f: f[:2], ["2 rows, at least 3 are needed"]),
    "none": (lambda f: f[:0], ["0 rows, at least 3 are needed"]),
    "unsorted": (swapped, ["row 11, column 'timestamp', 2024-01-01T10:00:00Z", "before row 10"]),
    "reversed": (lambda f: f[::-1], ["row 1, column 'timestamp', 2024-01-02T14:00:00Z", "not sorted"]),
    "duplicate": (doubled, ["row 20, column 'timestamp', 2024-01-01T19:00:00Z", "duplicate of row 19"]),
    "far duplicate": (
        lambda f: pd.concat([f, f[5:6]]),
        ["row 40, column 'timestamp', 2024-01-01T05:00:00Z", "duplicate of row 5"],
    ),
    "inf": (cell(8, "high", np.inf), ["row 8, column 'high', 2024-01-01T08:00:00Z: inf is not finite"]),
    "zero": (cell(9, "low", 0.0), ["row 9, column 'low', 2024-01-01T09:00:00Z: 0 is not positive"]),
    "negative": (
        cell(39, "close", -3.5),
        ["row 39, column 'close', 2024-01-02T15:00:00Z: -3.5 is not positive"],
    ),
    "volume": (cell(4, "volume", -1.0), ["row 4, column 'volume', 2024-01-01T04:00:00Z: -1 is negative"]),
    "high<low": (cell(5, "high", 1.0), ["row 5, column 'high', 2024-01-01T05:00:00Z: 1 is below low "]),
    "open": (cell(6, "open", 1e3), ["row 6, column 'open', 2024-01-01T06:00:00Z: 1000 is outside "]),
    "close": (cell(7, "close", 1e-3), ["row 7, column 'close', 2024-01-01T07:00:00Z: 0.001 is outside "]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit, words", BAD.values(), ids=BAD)
def test_bars_that_cannot_be_are_refused(tmp_path, kind, edit, words):
    path = save(edit(make_frame()), tmp_path / f"bad.{kind}")
    message = refusal(load_bars, path)
    assert message.startswith(path)
    for word in words:
        assert word in message


def test_further_bad_rows_are_counted(tmp_path):
    frame = make_frame()
    frame.loc[[3, 9, 30], "low"] = -1.0
    assert "row 3, column 'low'" in refusal(load_bars, save(frame, tmp_path / "a.csv"))
    assert "(and 2 more such rows)" in refusal(load_bars, save(frame, tmp_path / "a.parquet"))


def test_a_bar_without_range_and_volume_is_fine(tmp_path):
    frame = make_frame()
    for name in COLUMNS[1:5]:
        frame.loc[7, name] = 100.0
    frame.loc[7, "volume"] = 0.0
    load_bars(save(frame, tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    "text, words",
    [
        (
            "2024-01-01 03:00:00",
            "'2024-01-01 03:00:00' has no time zone; write 2024-01-01T03:00:00Z if it is UTC",
        ),
        ("2024-01-01", "'2024-01-01' has no time zone; write 2024-01-01T00:00Z if it is UTC"),
        ("1704078000000", "1704078000000 is an epoch"),
        ("1704078000", "unit='s'"),
        ("1.704078e9", "'1.704078e9' is not a time"),
        ("2024-13-01T03:00Z", "'2024-13-01T03:00Z' is no date in 1678 .. 2261"),
        ("2024-02-30T03:00Z", "'2024-02-30T03:00Z' is no date in 1678 .. 2261"),
        ("9999-01-01T03:00Z", "'9999-01-01T03:00Z' is no date in 1678 .. 2261"),
        ("01/02/2024 03:00", "'01/02/2024 03:00' is not a time"),
        ("2024-01-01T03:00 CET", "is not a time"),
        ("", "is empty"),
        ("nan", "'nan' is not a time"),
    ],
)
def test_times_that_are_no_times(tmp_path, text, words):
    for kind in KINDS:
        frame = make_frame()
        frame["timestamp"] = [t.isoformat() for t in frame["timestamp"]]
        frame.loc[3, "timestamp"] = text
        path = save(frame, tmp_path / f"bad.{kind}")
        message = refusal(load_bars, path)
        assert message.startswith(f"{path}: row 3, column 'timestamp'") and words in message


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda t: t.dt.tz_localize(None), "column 'timestamp' has no time zone; use .dt.tz_localize('UTC')"),
        (lambda t: t.dt.as_unit("ms").astype("int64"), "is an epoch, its unit a guess; convert it"),
        (lambda t: t.dt.as_unit("s").astype("int64"), "unit='s'"),
        (lambda t: t.astype("int64").astype(float), "column 'timestamp' has type double"),
        (lambda t: t.where(t.index != 6), "row 6, column 'timestamp': is empty"),
        (lambda t: t.dt.as_unit("s") + pd.Timedelta(days=200_000), "does not fit nanoseconds"),
    ],
)
def test_parquet_times_that_are_no_times(tmp_path, edit, words):
    frame = make_frame()
    frame["timestamp"] = edit(frame["timestamp"])
    assert words in refusal(load_bars, save(frame, tmp_path / "bad.parquet"))


@pytest.mark.parametrize(
    "text, words", [("", "is empty"), ("1,5", "'1,5' is not a number"), ("n/a", "not a number")]
)
def test_csv_cells_that_are_no_numbers(tmp_path, text, words):
    frame = make_frame().astype({"low": object})
    frame.loc[5, "low"] = text
    message = refusal(load_bars, save(frame, tmp_path / "bad.csv"))
    assert "row 5, column 'low', 2024-01-01T05:00:00Z: " in message and words in message


@pytest.mark.parametrize("kind", KINDS)
def test_not_a_number(tmp_path, kind):
    path = save(cell(2, "volume", np.nan)(make_frame()), tmp_path / f"bad.{kind}")
    words = {"csv": "is empty", "parquet": "nan is not finite"}[kind]
    assert f"row 2, column 'volume', 2024-01-01T02:00:00Z: {words}" in refusal(load_bars, path)
    raw = make_frame().to_csv(index=False).splitlines()
    raw[3] = ",".join([*raw[3].split(",")[:5], "NaN"])
    (tmp_path / "nan.csv").write_text("\n".join(raw))
    assert "row 2, column 'volume', 2024-01-01T02:00:00Z: nan" in refusal(load_bars, tmp_path / "nan.csv")


def test_parquet_columns_that_are_no_numbers(tmp_path):
    frame = make_frame().astype({"close": str})
    assert "column 'close' has type " in refusal(load_bars, save(frame, tmp_path / "bad.parquet"))


def test_ragged_csv(tmp_path):
    lines = make_frame().to_csv(index=False).splitlines()
    for text, words in (
        (lines[4] + ",7", "row 3 has 7 fields, the header has 6"),
        ("1,2", "row 3 has 2 fields"),
    ):
        (tmp_path / "bad.csv").write_text("\n".join([*lines[:4], text, *lines[5:]]))
        assert words in refusal(load_bars, tmp_path / "bad.csv")
    lines[0] = "timestamp,open,high,low,close,close"
    (tmp_path / "bad.csv").write_text("\n".join(lines))
    assert "missing 'volume' and extra 'close'" in refusal(load_bars, tmp_path / "bad.csv")


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_no_files(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    assert f"{path}: no such file" in refusal(load_bars, path)
    path.write_bytes(b"")
    assert f"{path}: " in refusal(load_bars, path)
    path.write_bytes(b"\xff\xfe\x00nothing")
    assert f"{path}: not a readable {kind if kind == 'parquet' else 'CSV'} file" in refusal(load_bars, path)
    path.unlink()
    path.mkdir()
    assert f"{path}: cannot be read" in refusal(load_bars, path)
    assert "unknown kind of file '.txt'" in refusal(load_bars, "a.txt")
    assert "unknown kind of file ''" in refusal(load_bars, "regime")


def as_bytes(kind):
    buffer = io.BytesIO()
    frame = make_frame(6)
    frame.to_parquet(buffer, index=False) if kind == "parquet" else frame.to_csv(buffer, index=False)
    return buffer.getvalue()


@FAST
@given(st.sampled_from(KINDS), st.lists(st.tuples(st.floats(0, 0.999), st.integers(-20, 255)), max_size=3))
def test_damaged_bytes_load_or_are_refused_in_one_line(kind, edits):
    raw = bytearray(as_bytes(kind))
    for where, change in edits:
        i = int(where * len(raw))
        if change < 0:
            del raw[i : i - change]
        else:
            raw[i] = change
    try:
        timestamp, ohlcv = read_bars(f"x.{kind}", bytes(raw))
    except DataError as error:
        assert str(error).startswith(f"x.{kind}: ") and "\n" not in str(error)
    else:
        assert (np.diff(timestamp) > np.timedelta64(0)).all() and np.isfinite(ohlcv).all()
        assert (ohlcv[:, 2] <= ohlcv[:, [0, 3]].min(1)).all() and (
            ohlcv[:, 1] >= ohlcv[:, [0, 3]].max(1)
        ).all()
        assert (ohlcv[:, :4] > 0).all() and (ohlcv[:, 4] >= 0).all()


# ---------------------------------------------------------------------------------------------- gaps
def test_gaps_are_reported_and_never_filled(tmp_path):
    frame = make_frame(200).drop(index=[*range(20, 23), 50, *range(100, 107)])
    bars = load_bars(save(frame, tmp_path / "g.csv"))
    want = {
        "name": "g",
        "count": 3,
        "missing_bars": 11,
        "longest_bars": 7,
        "longest_at": "2024-01-05T03:00:00Z",
    }
    assert bars.gaps == (want,)
    assert len(bars.timestamp) == 189 and not bars.filled.any()
    assert describe_gaps(want) == "g: 3 gaps, 11 bars missing; longest 7 bars after 2024-01-05T03:00:00Z"
    assert bars.bars_per_year == pytest.approx(188 / (199 / 8766.0), rel=1e-12)
    whole = load_bars(save(make_frame(), tmp_path / "w.csv"))
    assert whole.bars_per_year == pytest.approx(8766.0) and describe_gaps(whole.gaps[0]) == "w: no gaps"
    assert whole.gaps[0]["longest_at"] is None


@FAST
@given(st.sets(st.integers(1, 98), max_size=30))
def test_gaps_against_a_count_by_hand(missing):
    clock = np.arange("2024-01-01", "2024-01-05T04", dtype="datetime64[h]").astype("datetime64[ns]")
    kept = [i for i in range(100) if i not in missing]
    runs = [b - a - 1 for a, b in zip(kept, kept[1:], strict=False) if b - a > 1]
    gap = find_gaps("x", clock[kept])
    assert (gap["count"], gap["missing_bars"]) == (len(runs), len(missing))
    assert gap["longest_bars"] == max(runs, default=0)


# ---------------------------------------------------------------------------------------------- several files
def write_two(folder, first, second):
    return f"{save(first, folder / 'A_1h.parquet')},{save(second, folder / 'B_1h.csv')}"


def test_two_files_on_the_clock_of_the_first(tmp_path):
    a = make_frame(60).drop(index=[30])
    b = make_frame(100, seed=1, start="2023-12-31").drop(index=[40, 41, 42])
    bars = load_bars(write_two(tmp_path, a, b))
    assert bars.names == ("A_1h", "B_1h") and bars.ohlcv.shape == (2, 59, 5)
    assert np.array_equal(bars.timestamp, nanoseconds(a)) and np.array_equal(bars.ohlcv[0], values(a))
    assert np.flatnonzero(bars.filled[1]).tolist() == [16, 17, 18] and not bars.filled[0].any()
    last = b.loc[39, "close"]
    assert np.array_equal(bars.ohlcv[1, 16:19], [[last] * 4 + [0.0]] * 3)
    own = b.set_index("timestamp").loc[a["timestamp"].drop(index=[16, 17, 18])]
    assert np.array_equal(bars.ohlcv[1, ~bars.filled[1]], own[list(COLUMNS[1:])])
    assert [gap["missing_bars"] for gap in bars.gaps] == [1, 3]
    digest = hashlib.sha256((tmp_path / "A_1h.parquet").read_bytes() + (tmp_path / "B_1h.csv").read_bytes())
    assert bars.sha256 == digest.hexdigest()
    assert load_bars(bars.spec.replace(",", " , ")).names == bars.names


def test_the_fill_limit_is_exact(tmp_path):
    b = make_frame(60, seed=1).drop(index=range(20, 25))
    spec = write_two(tmp_path, make_frame(60), b)
    assert load_bars(spec, fill_limit=5).filled[1].sum() == 5
    message = refusal(load_bars, spec, 4)
    assert message.startswith(str(tmp_path / "B_1h.csv"))
    assert "no bar for 2024-01-02T00:00:00Z (row 24 of " in message
    assert "the last is 5 bars older (2024-01-01T19:00:00Z), the fill limit is 4 (and 0 more rows)" in message
    assert "must be 0 or more" in refusal(load_bars, spec, -1)
    assert "the fill limit is 0 (and 4 more rows)" in refusal(load_bars, spec, 0)


@settings(FAST, max_examples=25)
@given(
    st.sets(st.integers(1, 59), max_size=12),
    st.sets(st.integers(1, 59), max_size=12),
    st.integers(5, 55),
    st.floats(0.5, 2.0),
)
def test_alignment_sees_the_past_only(tmp_path_factory, drop_a, drop_b, t, factor):
    folder = tmp_path_factory.mktemp("align")
    a, b = make_frame(60).drop(index=sorted(drop_a)), make_frame(60, seed=1).drop(index=sorted(drop_b))
    bars = load_bars(write_two(folder, a, b), fill_limit=60)
    times = nanoseconds(b)
    for row, time in enumerate(bars.timestamp):
        at = np.flatnonzero(times <= time)[-1]
        own = values(b)[at]
        assert bars.filled[1, row] == (times[at] < time)
        assert np.array_equal(bars.ohlcv[1, row], [own[3]] * 4 + [0.0] if times[at] < time else own)
    # rows behind t are changed, and some of them lost: nothing up to t moves
    cut = pd.Timestamp("2024-01-01", tz="UTC") + pd.Timedelta(hours=t)
    later = b["timestamp"] > cut
    b.loc[later, list(COLUMNS[1:5])] *= factor
    again = load_bars(write_two(folder, a, b[~later | (b.index % 11 > 0)]), fill_limit=60)
    known = bars.timestamp <= np.datetime64(cut.tz_localize(None))
    assert np.array_equal(bars.ohlcv[:, known], again.ohlcv[:, known])
    assert np.array_equal(bars.filled[:, known], again.filled[:, known])


def test_files_that_cannot_be_aligned(tmp_path):
    a = make_frame(60)
    message = refusal(load_bars, write_two(tmp_path, a, make_frame(60, start="2024-01-01T05:00")))
    assert "B_1h.csv: starts at 2024-01-01T05:00:00Z, " in message
    assert "A_1h.parquet to start at 2024-01-01T05:00:00Z or get earlier bars of " in message
    message = refusal(load_bars, write_two(tmp_path, a, make_frame(30)), 24)
    assert "no bar for 2024-01-03T06:00:00Z (row 54 of " in message
    for freq, words in (("4h", "bars of 04:00:00, "), ("5min", "bars of 00:05:00, ")):
        message = refusal(load_bars, write_two(tmp_path, a, make_frame(800, start="2023-12-31", freq=freq)))
        assert words in message and "A_1h.parquet has 01:00:00; resample" in message
    message = refusal(load_bars, write_two(tmp_path, a, make_frame(90, start="2023-12-31T00:30")))
    assert "B_1h.csv: no bar opens at the time of one of " in message


def test_an_illiquid_market_is_no_longer_bar(tmp_path):
    # half of the hours are missing, so the median step is two hours; the bars are hourly all the same
    b = make_frame(61, seed=1).drop(index=[i for i in range(61) if i % 6 in (2, 4, 5)])
    assert np.median(np.diff(nanoseconds(b))) > np.timedelta64(1, "h")
    assert load_bars(write_two(tmp_path, make_frame(60), b)).filled[1].sum() == 30


def test_the_same_file_twice(tmp_path):
    (tmp_path / "other").mkdir()
    one = save(make_frame(), tmp_path / "A.csv")
    shutil.copy(one, tmp_path / "B.csv")
    (tmp_path / "C.csv").symlink_to(one)
    for two in (one, tmp_path / "." / "A.csv", tmp_path / "B.csv", tmp_path / "C.csv"):
        assert f"{two}: the same bars as {one}; give every file once" in refusal(load_bars, f"{one},{two}")
    two = save(make_frame(seed=1), tmp_path / "other" / "A.parquet")
    assert f"{two}: a file named 'A' was given before" in refusal(load_bars, f"{one},{two}")


@pytest.mark.parametrize(
    "spec, part", [("", 0), (",a.csv", 0), ("a.csv,", 1), ("a.csv,,b.csv", 1), ("a.csv, ", 1)]
)
def test_empty_parts(spec, part):
    assert f"part {part} is empty" in refusal(load_bars, spec)


# ---------------------------------------------------------------------------------------------- synthetic
def test_synthetic_bars():
    bars = load_bars("synthetic:regime?bars=500&seed=3")
    assert bars.names == ("synthetic:regime",) and bars.ohlcv.shape == (1, 500, 5)
    assert bars.timestamp.dtype == "datetime64[ns]" and bars.ohlcv.dtype == np.float64
    assert bars.bars_per_year == pytest.approx(8766.0) and bars.gaps[0]["count"] == 0
    assert bars.truth.expected.shape == (500,) and bars.truth.law.seed == 3
    assert load_bars("synthetic:regime?bars=500&seed=3").sha256 == bars.sha256
    assert load_bars("synthetic:regime?bars=500&seed=4").sha256 != bars.sha256
    assert (
        len(
            {load_bars(f"synthetic:{name}?bars=99").sha256 for name in ("regime", "signal", "noise", "drift")}
        )
        == 4
    )


@pytest.mark.parametrize(
    "spec, words",
    [
        ("synthetic:regme", "did you mean regime"),
        ("synthetic:regime?bar=5", "did you mean bars"),
        ("synthetic:regime?bars=many", "bars"),
        ("synthetic:", "synthetic:"),
        ("synthetic:regime,a.csv", "cannot be mixed"),
        ("a.csv,synthetic:noise", "cannot be mixed"),
    ],
)
def test_synthetic_specs_that_are_refused(spec, words):
    assert words in refusal(load_bars, spec)


# ---------------------------------------------------------------------------------------------- splits
HOURS = np.datetime64("2022-07-01", "ns") + np.arange(20_000) * np.timedelta64(1, "h")


def test_split_by_shares():
    assert split_rows(HOURS, "0.70/0.15/0.15", 0) == {
        "train": (0, 14_000),
        "eval": (14_000, 17_000),
        "test": (17_000, 19_999),
    }
    assert split_rows(HOURS, "0.70/0.15/0.15", purge=66, first=800) == {
        "train": (800, 14_000),
        "eval": (14_066, 17_000),
        "test": (17_066, 19_999),
    }


def test_split_by_dates():
    ranges = split_rows(HOURS, "2023-01-01/2024-01-01", purge=10, first=5)
    assert ranges == {"train": (5, 4416), "eval": (4426, 13_176), "test": (13_186, 19_999)}
    assert HOURS[4416] == np.datetime64("2023-01-01") and HOURS[13_176] == np.datetime64("2024-01-01")
    # a date within a gap starts with the first bar after it
    assert split_rows(np.delete(HOURS, range(4400, 4500)), "2023-01-01/2024-01-01", 0)["eval"] == (
        4400,
        13_076,
    )


@FAST
@given(st.integers(3, 400), st.integers(0, 40), st.integers(0, 60), st.integers(1, 98), st.integers(1, 98))
def test_splits_never_touch(rows, purge, first, train, middle):
    split = f"{train / 100}/{min(middle, 99 - train) / 100}/{(100 - train - min(middle, 99 - train)) / 100}"
    if train + min(middle, 99 - train) >= 100 or min(middle, 99 - train) < 1:
        assert "must sum to 1" in refusal(split_rows, HOURS[:rows], split, purge, first)
        return
    try:
        ranges = split_rows(HOURS[:rows], split, purge, first)
    except DataError as error:
        assert f"at least {max(purge, 1)} are needed" in str(error) and f" of {rows} rows" in str(error)
        return
    assert list(ranges) == ["train", "eval", "test"]
    (a, b), (c, d), (e, f) = ranges.values()
    assert first == a < b <= c < d <= e < f == rows - 1
    assert c - b == purge and e - d == purge and min(b - a, d - c, f - e) >= purge


def test_too_few_rows_for_a_split():
    message = refusal(split_rows, HOURS[:1000], "0.70/0.15/0.15", 100)
    assert "eval has 50 of 1000 rows" in message and "at least 100 are needed" in message
    message = refusal(split_rows, HOURS[:1000], "0.70/0.15/0.15", 5, 900)
    assert "train has 0 of 1000 rows (warm-up 900, purge 5)" in message
    # the last row earns nothing: one bar is not enough for a test split
    assert "test has 0 of 4 rows" in refusal(split_rows, HOURS[:4], "0.5/0.25/0.25", 0)
    assert split_rows(HOURS[:5], "0.4/0.2/0.4", 0)["test"] == (3, 4)


@pytest.mark.parametrize(
    "split, words",
    [
        ("0.7/0.2/0.2", "must sum to 1, these to 1.1"),
        ("0.7/0.3/0", "shares above 0"),
        ("1.2/-0.1/-0.1", "shares above 0"),
        ("70/15/15", "must sum to 1, these to 100"),
        ("nan/0.5/0.5", "shares above 0"),
        ("a/b/c", "not three numbers; write 0.70/0.15/0.15"),
        ("0.7/0.3", "not understood; write 0.70/0.15/0.15"),
        ("", "not understood"),
        ("2023-01-01", "not understood"),
        ("2023-01-01/0.5", "not understood"),
        ("2023-01-01/2023-13-01", "split '2023-01-01/2023-13-01': "),
        ("2024-01-01/2023-01-01", "eval starts on 2024-01-01, not before test on 2023-01-01"),
        ("2023-01-01/2023-01-01", "not before test"),
        ("2023-01-01/2030-01-01", "2030-01-01 is outside 2022-07-01T00:00:00Z .. 2024-10-11T07:00:00Z"),
        ("2022-07-01/2023-01-01", "2022-07-01 is outside"),
    ],
)
def test_splits_that_are_refused(split, words):
    message = refusal(split_rows, HOURS, split, 10)
    assert message.startswith(f"split '{split}': ") and words in message


def test_negative_purge():
    assert "purge -1 and first row 0 must be 0 or more" in refusal(split_rows, HOURS, "0.70/0.15/0.15", -1)
    assert "first row -2" in refusal(split_rows, HOURS, "0.70/0.15/0.15", 1, -2)


# ---------------------------------------------------------------------------------------------- real bars
@shared
def test_real_crypto_bars():
    one, two = SHARED / "crypto" / "BTCUSDT_1h.parquet", SHARED / "crypto" / "ETHUSDT_1h.parquet"
    bars = load_bars(f"{one},{two}")
    assert bars.names == ("BTCUSDT_1h", "ETHUSDT_1h") and bars.ohlcv.shape == (2, 43_848, 5)
    assert not bars.filled.any() and [gap["count"] for gap in bars.gaps] == [0, 0]
    assert bars.bars_per_year == pytest.approx(8766.0)
    rows = split_rows(bars.timestamp, "2023-01-01/2024-01-01", purge=66, first=900)
    assert rows == {"train": (900, 26_304), "eval": (26_370, 35_064), "test": (35_130, 43_847)}


@shared
def test_real_forex_bars():
    names = ("EURUSD_1h", "GBPUSD_1h", "USDJPY_1h", "USDCHF_1h")
    bars = load_bars(",".join(str(SHARED / "forex" / f"{name}.parquet") for name in names))
    assert bars.names == names and bars.ohlcv.shape == (4, 24_399, 5) and not bars.filled.any()
    assert all(gap["count"] == 205 and gap["longest_bars"] == 72 for gap in bars.gaps)
    assert 6200 < bars.bars_per_year < 6260  # five days a week
    message = refusal(load_bars, SHARED / "forex" / "spread_1h.parquet")
    assert "missing 'open', 'high', 'low', 'close', 'volume' and extra 'EURUSD', " in message


@shared
def test_real_forex_weekends_are_longer_than_the_fill_limit(tmp_path):
    eth, eur = SHARED / "crypto" / "ETHUSDT_1h.parquet", SHARED / "forex" / "EURUSD_1h.parquet"
    frame = pd.read_parquet(eth)
    cut = save(frame[frame["timestamp"] >= "2021-01-31T22:00Z"], tmp_path / "ETHUSDT_1h.parquet")
    assert "starts at 2021-01-31T22:00:00Z" in refusal(load_bars, f"{eth},{eur}")
    assert "no bar for 2021-02-06T22:00:00Z (row 144 of " in refusal(load_bars, f"{cut},{eur}")
    filled = load_bars(f"{cut},{eur}", fill_limit=100).filled[1]
    assert filled.sum() == len(filled) - 24_399
