"""scripts/import_bars.py on small files in the formats that their publishers write."""
import gzip
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from common import data
from common.run import UsageError
from scripts import import_bars

SCRIPT = Path(import_bars.__file__)
START = pd.Timestamp("2019-01-01")
OHLCV = np.array([
    [1.5, 1.75, 1.25, 1.625, 10.0],
    [1.625, 1.875, 1.5, 1.5, 20.0],
    [1.5, 1.5, 1.25, 1.375, 0.0],
    [1.375, 2.0, 1.375, 1.875, 40.0],
])  # fmt: skip


def lines(row, times, *above):
    """Text of one line a bar: `row` formatted with its time t, epoch e and o, h, l, c, v."""
    bars = (dict(zip("ohlcv", bar)) for bar in OHLCV)
    below = [row.format(t=t, e=int(t.timestamp()), **bar) for t, bar in zip(times, bars)]
    return "\n".join([*above, *below]) + "\n"


def times(step="1min", start=START):
    return pd.date_range(start, periods=len(OHLCV), freq=step)


def run(tmp_path, text, *flags, name="bars.csv"):
    """What main() returned, times and values of the one file that it wrote."""
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    out = tmp_path / "out" / "X.parquet"
    result = import_bars.main([str(path), "--out", str(out), *flags])
    assert [file.name for file in out.parent.iterdir()] == ["X.parquet"]
    return result, *data.read_bars(out)


def refused(tmp_path, text, *flags, name="bars.csv"):
    """The one line that refuses the file; nothing was written."""
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        import_bars.main([str(path), "--out", str(tmp_path / "out" / "X.parquet"), *flags])
    assert not (tmp_path / "out").exists()
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    return str(error.value)


BINANCE = "{e}000,{o},{h},{l},{c},{v},{e}999,1.0,5,2.0,3.0,0"
BINANCE_US = "{e}000000,{o},{h},{l},{c},{v},{e}999999,1.0,5,2.0,3.0,0"
BINANCE_HEADER = (
    "open_time,open,high,low,close,volume,close_time,quote_volume,count,"
    "taker_buy_volume,taker_buy_quote_volume,ignore"
)
CDD = "https://www.CryptoDataDownload.com"
MT5 = "<DATE>\t<TIME>\t<OPEN>\t<HIGH>\t<LOW>\t<CLOSE>\t<TICKVOL>\t<VOL>\t<SPREAD>"
MT5_ROW = "{t:%Y.%m.%d}\t{t:%H:%M:%S}\t{o}\t{h}\t{l}\t{c}\t{v}\t7\t5"
MT4_ROW = "{t:%Y.%m.%d},{t:%H:%M},{o},{h},{l},{c},{v}"
HISTDATA = "{t:%Y%m%d %H%M%S};{o};{h};{l};{c};{v}"
LOCAL = "Local time,Open,High,Low,Close,Volume"
GMT = "Gmt time,Open,High,Low,Close,Volume"
KAGGLE = "Timestamp,Open,High,Low,Close,Volume_(BTC),Volume_(Currency),Weighted_Price"
YAHOO = "Date,Open,High,Low,Close,Adj Close,Volume"
YAHOO_ROW = "{t:%Y-%m-%d},{o},{h},{l},{c},1.0,{v}"
STOOQ = "<TICKER>,<PER>,<DATE>,<TIME>,<OPEN>,<HIGH>,<LOW>,<CLOSE>,<VOL>,<OPENINT>"
STOOQ_ROW = "4IG.HU,5,{t:%Y%m%d},{t:%H%M%S},{o},{h},{l},{c},{v},0"
POLYGON = "ticker,volume,open,close,high,low,window_start,transactions"
SIMPLE = "time,open,high,low,close,volume"
SIMPLE_ROW = "{t:%Y-%m-%d %H:%M:%S},{o},{h},{l},{c},{v}"
MINUTES, DAYS = times(), times("D")

# kind, side, hours from the times in the file to UTC, text, flags
FORMATS = {
    "binance": ("Binance klines", "trades", 0, lines(BINANCE, MINUTES), ()),
    "binance us": ("Binance klines", "trades", 0, lines(BINANCE_US, MINUTES), ()),
    "binance header": ("Binance klines", "trades", 0, lines(BINANCE, MINUTES, BINANCE_HEADER), ()),
    "cdd": ("CryptoDataDownload", "trades", 0, lines(
        "{e}000,{t},BTC/USDT,{o},{h},{l},{c},{v},99,3", MINUTES,
        CDD, "unix,date,symbol,open,high,low,close,Volume BTC,Volume USDT,tradecount"), ()),
    "cdd without unix": ("CryptoDataDownload", "trades", 0, lines(
        "{t:%Y-%m-%d %I-%p},BTCUSD,{o},{h},{l},{c},{v},99", times("h", START + pd.Timedelta("11h")),
        CDD, "Date,Symbol,Open,High,Low,Close,Volume BTC,Volume USD"), ()),
    "yahoo": ("Yahoo", "trades", 5, lines(YAHOO_ROW, DAYS, YAHOO), ("--tz", "America/New_York")),
    "yfinance": ("Yahoo", "trades", 0, lines(
        "{t:%Y-%m-%d},{c},{h},{l},{o},{v}", DAYS, "Price,Close,High,Low,Open,Volume",
        "Ticker,BTC-USD,BTC-USD,BTC-USD,BTC-USD,BTC-USD", "Date,,,,,"), ("--tz", "UTC")),
    "mt5": ("MetaTrader 5", "bid", -2, lines(MT5_ROW, MINUTES, MT5), ("--tz", "Europe/Athens")),
    "mt5 utf-16": ("MetaTrader 5", "bid", -2, lines(MT5_ROW, MINUTES, MT5).encode("utf-16"),
                   ("--tz", "America/New_York+7")),
    "mt5 daily": ("MetaTrader 5", "bid", -3, lines(
        "{t:%Y.%m.%d}\t{o}\t{h}\t{l}\t{c}\t{v}\t7\t5", DAYS, MT5.replace("<TIME>\t", "")), ("--tz", "+03:00")),
    "mt4": ("MetaTrader 4", "bid", -2, lines(MT4_ROW, MINUTES), ("--tz", "Europe/Athens")),
    "histdata": ("HistData", "bid", 5, lines(HISTDATA, MINUTES), ()),
    "dukascopy": ("Dukascopy", "", 0, lines("{t:%d.%m.%Y %H:%M:%S}.000,{o},{h},{l},{c},{v}", MINUTES, GMT), ()),
    "dukascopy local": ("Dukascopy", "", -1, lines(
        "{t:%d.%m.%Y %H:%M:%S}.000 GMT+0100,{o},{h},{l},{c},{v}", MINUTES, LOCAL), ()),
    "jforex": ("Dukascopy", "", -2, lines(
        "{t:%Y.%m.%d %H:%M:%S},{o},{h},{l},{c},{v}", MINUTES, "Time (EET),Open,High,Low,Close,Volume "), ()),
    "kaggle": ("Kaggle's Bitcoin minutes", "trades", 0, lines("{e},{o},{h},{l},{c},{v},99,1.5", MINUTES, KAGGLE), ()),
    "stooq": ("stooq", "trades", -1, lines(STOOQ_ROW, MINUTES, STOOQ), ("--tz", "Europe/Warsaw")),
    "polygon": ("polygon", "trades", 0, lines(
        "AAPL,{v},{o},{c},{h},{l},{e}000000000,7", MINUTES, POLYGON), ()),
    "polygon api": ("polygon", "trades", 0, lines(
        "{v},1.5,{o},{c},{h},{l},{e}000,7", MINUTES, "v,vw,o,c,h,l,t,n"), ()),
    "by name": ("columns by name", "", -2, lines(
        "{t:%Y-%m-%dT%H:%M:%S}+02:00,{o},{h},{l},{c},{v}", MINUTES, SIMPLE), ()),
    "given": ("columns as given", "", 0, lines(
        "{t:%d/%m/%Y %H:%M}|{o}|x|{h}|{l}|{c}|{v}", MINUTES),
        ("--columns", "timestamp,open,skip,high,low,close,volume", "--time-format", "%d/%m/%Y %H:%M", "--tz", "UTC")),
    "decimal comma": ("columns by name", "", 0, lines(
        "{e};{o};{h};{l};{c};{v}", MINUTES, SIMPLE.replace(",", ";")).replace(".", ","), ()),
}  # fmt: skip
HOURS = {"cdd without unix"}
LONG = {"yahoo", "yfinance", "mt5 daily"}


@pytest.mark.parametrize("case", FORMATS)
def test_every_format_gives_the_same_bars(case, tmp_path):
    kind, side, hours, text, flags = FORMATS[case]
    result, found, values = run(tmp_path, text, *flags)
    expected = DAYS if case in LONG else MINUTES
    if case in HOURS:
        expected = times("h", START + pd.Timedelta("11h"))
    expected = expected + pd.Timedelta(hours=hours)
    np.testing.assert_array_equal(found, expected.to_numpy())
    np.testing.assert_array_equal(values, OHLCV)
    assert result["exit_code"] == 0 and list(result["out"].values()) == [4]
    assert (result["files"][0]["kind"], result["files"][0]["side"]) == (kind, side)


def test_feather_of_freqtrade_and_parquet(tmp_path):
    frame = pd.DataFrame(OHLCV, columns=import_bars.VALUES)
    frame.insert(0, "date", MINUTES.tz_localize("UTC").as_unit("ms"))
    frame.to_feather(tmp_path / "a.feather")
    result, found, values = run(tmp_path, (tmp_path / "a.feather").read_bytes())
    assert result["files"][0]["kind"] == "freqtrade"
    np.testing.assert_array_equal(found, MINUTES.to_numpy())
    np.testing.assert_array_equal(values, OHLCV)

    # of rows that were picked out pandas stores the numbers too
    frame.set_index(2 * np.arange(len(frame))).to_parquet(tmp_path / "b.parquet")
    (tmp_path / "b").mkdir()
    _, found, values = run(tmp_path / "b", (tmp_path / "b.parquet").read_bytes())
    np.testing.assert_array_equal(found, MINUTES.to_numpy())
    np.testing.assert_array_equal(values, OHLCV)

    frame.assign(date=MINUTES).set_index("date").to_parquet(tmp_path / "a.parquet")
    out = tmp_path / "Y.parquet"
    with pytest.raises(UsageError, match="--tz"):
        import_bars.main([str(tmp_path / "a.parquet"), "--out", str(out)])
    import_bars.main([str(tmp_path / "a.parquet"), "--out", str(out), "--tz", "Asia/Tokyo"])
    np.testing.assert_array_equal(data.read_bars(out)[0], (MINUTES - pd.Timedelta("9h")).to_numpy())


def test_several_files_packed_files_and_where_they_came_from(tmp_path):
    """Two months of Binance, the second in microseconds, zip and gz."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.csv", lines(BINANCE, MINUTES))
    later = times(start=START + pd.Timedelta("1h"))
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(lines(BINANCE_US, later).encode()))
    out = tmp_path / "X.parquet"
    import_bars.main([str(tmp_path / "a.zip"), str(tmp_path / "b.csv.gz"), "--out", str(out)])
    np.testing.assert_array_equal(data.read_bars(out)[0], np.concatenate([MINUTES, later]))
    assert b"b.csv.gz" in pq.read_schema(out).metadata[b"import"]


def test_one_file_a_symbol(tmp_path):
    path = tmp_path / "day.csv"
    rows = lines("AAPL,{v},{o},{c},{h},{l},{e}000000000,7", MINUTES, POLYGON)
    rows += lines("BRK/B,{v},{o},{c},{h},{l},{e}000000000,7", times("h"))
    path.write_text(rows)
    result = import_bars.main([str(path), "--out", str(tmp_path / "a" / "X.parquet")])
    assert [Path(out).name for out in result["out"]] == ["X_AAPL.parquet", "X_BRKB.parquet"]
    np.testing.assert_array_equal(data.read_bars(tmp_path / "a" / "X_BRKB.parquet")[0], times("h"))
    (tmp_path / "no_symbol.csv").write_text(lines(BINANCE, MINUTES))
    with pytest.raises(UsageError, match="no_symbol.csv"):
        import_bars.main([str(path), str(tmp_path / "no_symbol.csv"), "--out", str(tmp_path / "c.parquet")])
    import_bars.main([str(path), "--out", str(tmp_path / "b.parquet"), "--symbols", "BRK/B"])
    np.testing.assert_array_equal(data.read_bars(tmp_path / "b.parquet")[0], times("h"))


BAD = lines(BINANCE, MINUTES).splitlines()
NAN = lines("{e},{o},{h},{l},{c},{v},99,1.5", MINUTES, KAGGLE).splitlines()
NAN.insert(3, f"{int(START.timestamp()) + 90},NaN,NaN,NaN,NaN,NaN,NaN,NaN")
RIVAL = BAD[1].replace("1.5,20.0", "1.75,20.0")
LOW = BAD[3].replace("1.375,2.0,1.375", "1.375,2.0,1.5")

# rows, the row that is refused, the flag that it names, flags that repair, what is counted, which of the bars stay
COPIES = ["--drop-duplicates"]
REPAIRS = {
    "incomplete": (NAN, 2, "--drop-incomplete", ["--drop-incomplete"], {"drop_incomplete": 1}, [0, 1, 2, 3]),
    "copies": ([*BAD[:2], *BAD[1:]], 2, "--drop-duplicates", COPIES, {"drop_duplicates": 1}, [0, 1, 2, 3]),
    "rivals": ([*BAD[:2], RIVAL, *BAD[2:]], 2, "--keep", [*COPIES, "--keep", "first"], {"keep": 1}, [0, 1, 2, 3]),
    "newest first": (BAD[::-1], 1, "--sort", ["--sort"], {"sort": 3}, [0, 1, 2, 3]),
    "impossible": ([*BAD[:3], LOW], 3, "--drop-impossible", ["--drop-impossible"], {"drop_impossible": 1}, [0, 1, 2]),
}  # fmt: skip


@pytest.mark.parametrize("case", REPAIRS)
def test_nothing_is_repaired_without_its_flag(case, tmp_path):
    rows, row, flag, flags, counts, stay = REPAIRS[case]
    text = "\n".join(rows)
    why = refused(tmp_path, text)
    assert f"row {row}," in why and flag in why
    result, found, values = run(tmp_path, text, *flags)
    np.testing.assert_array_equal(found, MINUTES.to_numpy()[stay])
    np.testing.assert_array_equal(values, OHLCV[stay])
    assert list(result["repairs"].values()) == [counts]


def test_epochs_of_a_given_unit(tmp_path):
    _, found, _ = run(tmp_path, lines("{t:%M},{o},{h},{l},{c},{v}", MINUTES, SIMPLE), "--unit", "s")
    assert found.astype("datetime64[s]").astype(int).tolist() == [0, 1, 2, 3]


def test_keep_last(tmp_path):
    text = "\n".join([*BAD[:2], RIVAL, *BAD[2:]])
    _, _, values = run(tmp_path, text, "--drop-duplicates", "--keep", "last")
    assert values[1].tolist() == [1.625, 1.875, 1.5, 1.75, 20.0]


def test_resample(tmp_path):
    """Minutes 8 to 27 of an hour in bars of 5 minutes: the first and the last are cut."""
    start = START + pd.Timedelta("8min")
    minutes = pd.date_range(start, periods=20, freq="min")
    price = np.arange(100, 120)
    text = "".join(
        f"{int(t.timestamp())}000,{p},{p + 2},{p - 1},{p + 1},{i},{int(t.timestamp())}999,1,5,2,3,0\n"
        for i, (t, p) in enumerate(zip(minutes, price))
    )
    whole = [[102, 108, 101, 107, 20], [107, 113, 106, 112, 45], [112, 118, 111, 117, 70]]
    result, found, values = run(tmp_path, text, "--resample", "5m", "--drop-incomplete")
    np.testing.assert_array_equal(found, pd.date_range(START + pd.Timedelta("10min"), periods=3, freq="5min"))
    assert values.tolist() == whole
    assert list(result["repairs"].values()) == [{"resample": 20, "cut_bars": 2}]
    (tmp_path / "out" / "X.parquet").unlink()
    _, found, values = run(tmp_path, text, "--resample", "5m")
    assert len(found) == 5 and values[1:4].tolist() == whole and values[0].tolist() == [100, 103, 99, 102, 1]


def autumn(start):
    return lines(SIMPLE_ROW, times("30min", pd.Timestamp(start)), SIMPLE)


SLASHED = lines("{t:%d/%m/%Y %H:%M},{o},{h},{l},{c},{v}", MINUTES, SIMPLE)
PLAIN = lines(SIMPLE_ROW, MINUTES, SIMPLE)
# text, flags, what the line must name
REFUSALS = {
    "metatrader's zone": (lines(MT5_ROW, MINUTES, MT5), [], "--tz"),
    "metatrader 4's zone": (lines(MT4_ROW, MINUTES), [], "--tz"),
    "yahoo's zone": (lines(YAHOO_ROW, DAYS, YAHOO), [], "--tz"),
    "stooq's zone": (lines(STOOQ_ROW, MINUTES, STOOQ), [], "--tz"),
    "no zone": (PLAIN, [], "--tz"),
    "not a zone": (PLAIN, ["--tz", "Europe/Atens"], "--tz"),
    "zone of an epoch": (lines(BINANCE, MINUTES), ["--tz", "UTC"], "--tz"),
    "an hour that happens twice": (autumn("2019-11-03 00:30"), ["--tz", "America/New_York"], "row 1"),
    "an hour that never happens": (autumn("2019-03-10 01:00"), ["--tz", "America/New_York"], "row 2"),
    "day or month first": (SLASHED, ["--tz", "UTC"], "--time-format"),
    "no names": (lines("{e},{o},{h},{l},{c},{v}", MINUTES), [], "--columns"),
    "columns that are too few": (lines("{e},{o},{h},{l},{c},{v}", MINUTES), ["--columns", "timestamp,open"], "6"),
    "two volumes": (lines("{e},{o},{h},{l},{c},{v},{v}", MINUTES, "time,open,high,low,close,vol a,vol b"), [],
                    "--columns"),
    "no price": (lines("{e},{o},{h},{l},{v}", MINUTES, "time,open,high,low,volume"), [], "close"),
    "two separators": (lines("{e},{o};1,{h};1,{l};1,{c};1,{v}", MINUTES), [], "--separator"),
    "spaces": (lines("{e} {o} {h} {l} {c} {v}", MINUTES), [], "--separator"),
    "small epochs": (lines("{t:%M},{o},{h},{l},{c},{v}", MINUTES, SIMPLE), [], "--unit"),
    "epochs of no unit": (lines(BINANCE, MINUTES).replace("15463", "95463"), [], "--unit"),
    "a unit without epochs": (PLAIN, ["--tz", "UTC", "--unit", "ms"], "--unit"),
    "the 31st of February": (PLAIN.replace("2019-01-01 00:02", "2019-02-31 00:02"), ["--tz", "UTC"], "row 2"),
    "another form of time": (PLAIN.replace("2019-01-01 00:02", "01.01.2019 00:02"), ["--tz", "UTC"], "row 2"),
    "a word for a price": (PLAIN.replace("1.5,1.5,", "1.5,high,"), ["--tz", "UTC"], "row 2"),
    "an uneven row": (PLAIN + "2019-01-01,2\n", ["--tz", "UTC"], "row 4"),
    "hours from days": (lines(YAHOO_ROW, DAYS, YAHOO), ["--tz", "UTC", "--resample", "1h"], "--resample"),
    "a rule that divides no day": (PLAIN, ["--resample", "7h"], "--resample"),
    "a symbol that is not there": (lines(STOOQ_ROW, MINUTES, STOOQ), ["--tz", "UTC", "--symbols", "X"], "X"),
    "an unknown flag": (PLAIN, ["--zone", "UTC"], "--zone"),
    "json": ("[[1, 2]]", [], "JSON"),
    "nothing": ("", [], "empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_it_cannot_know_is_asked_for(case, tmp_path):
    text, flags, word = REFUSALS[case]
    assert word in refused(tmp_path, text, *flags)


def test_local_times_on_both_sides_of_daylight_saving(tmp_path):
    """A week of hours but for the one that happens twice; brokers follow New York, 7 hours ahead."""
    days = lines(MT5_ROW, times("D", pd.Timestamp("2019-03-08 12:00")), MT5)
    _, found, _ = run(tmp_path, days, "--tz", "America/New_York+7")
    hours = pd.DatetimeIndex(found).hour.tolist()
    assert hours == [10, 10, 9, 9]


def test_nothing_is_half_written(tmp_path):
    """The second symbol is refused: the first is not written either; what stands is not replaced."""
    path = tmp_path / "day.csv"
    rows = lines("A,{v},{o},{c},{h},{l},{e}000000000,7", MINUTES, POLYGON)
    path.write_text(rows + "\n".join(["B,0,1,1,1,1,1546300800000000000,1"]))
    out = tmp_path / "out" / "X.parquet"
    with pytest.raises(UsageError):
        import_bars.main([str(path), "--out", str(out)])
    assert not out.parent.exists()
    argv = [str(path), "--out", str(out), "--symbols", "A"]
    import_bars.main(argv)
    before = out.read_bytes()
    with pytest.raises(UsageError, match="exists"):
        import_bars.main(argv)
    assert out.read_bytes() == before


def test_exit_code(refusal_of, tmp_path):
    assert "missing.csv" in refusal_of(SCRIPT)([tmp_path / "missing.csv", "--out", tmp_path / "x.parquet"])
