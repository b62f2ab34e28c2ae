"""What dqn_forex_subproc.py trades on: pairs, costs, nights, columns by name; how it is scored; what is refused."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cleanrl_crypto import dqn_forex_subproc as dqn
from common import features, markets, scoring
from common.cli import UsageError, check, parse_args
from common.data import COLUMNS, DataError, load_bars
from common.features import FAMILIES, LEAST, MOST, TABLE, ColumnModel, asset_views, find_column, fit_asset, fit_columns
from test_leakage import leaks, market, refits

BARS = 900
FEW = ("ret_1", "log_volume")  # columns that need few rows
REAL = ("EURUSD", "USDJPY")


def pairs_of(**changes) -> dqn.Pairs:
    return dqn.load_pairs(dqn.Args(**{"feature_cols": FEW, "data": f"synthetic:signal?bars={BARS}"} | changes))


def real(folder, **changes) -> dqn.Pairs:
    return pairs_of(**{"data": None, "data_dir": str(folder), "symbols": REAL, "spread_pips": (1.0,)} | changes)


def forex_hours(n: int) -> pd.DatetimeIndex:
    """n hourly bars that open from Sunday 22:00 to Friday 21:00 UTC."""
    hours = pd.date_range("2023-01-01T22:00", periods=2 * n + 200, freq="h", tz="UTC")
    week, hour = hours.day_of_week, hours.hour
    closed = (week == 5) | ((week == 4) & (hour >= 22)) | ((week == 6) & (hour < 22))
    return hours[~closed][:n]


def frame_of(seed: int, price: float, n: int = BARS) -> pd.DataFrame:
    frame = pd.DataFrame(load_bars(f"synthetic:signal?bars={n}&seed={seed}").ohlcv[0], columns=COLUMNS[1:])
    frame[["open", "high", "low", "close"]] *= price / 100
    frame.insert(0, "timestamp", forex_hours(n))
    return frame


@pytest.fixture
def folder(tmp_path):
    """Two pairs in the format of real ones, of unequal length."""
    frame_of(1, 1.1).to_parquet(tmp_path / "EURUSD_1h.parquet", index=False)
    frame_of(2, 150.0, BARS - 60).to_parquet(tmp_path / "USDJPY_1h.parquet", index=False)
    return tmp_path


@pytest.fixture
def spread_file(folder):
    table = pd.DataFrame({"timestamp": forex_hours(BARS)})
    rng = np.random.default_rng(0)
    table["EURUSD"], table["USDJPY"] = rng.uniform(1e-5, 3e-4, BARS), rng.uniform(1e-3, 3e-2, BARS)
    table.to_parquet(folder / "spread.parquet", index=False)
    return folder / "spread.parquet"


def line_of(error, kind=(UsageError, DataError)) -> str:
    assert error.type in kind
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


# --------------------------------------------------------------------------------------------------- synthetic pairs
def test_synthetic_pairs_are_independent_paths_of_one_law():
    pairs = pairs_of(data="synthetic:signal?bars=3000&phi=.8")
    assert pairs.names == dqn.Args.symbols and len({b.sha256 for b in pairs.series}) == 4
    laws = [b.truth.law for b in pairs.series]
    assert {(law.name, law.bars, law.phi, law.ic, law.sigma) for law in laws} == {("signal", 3000, 0.8, 0.1, (0.006,))}
    assert len({law.seed for law in laws}) == 4
    for what in ("signal", "expected"):
        paths = np.array([getattr(b.truth, what) for b in pairs.series])
        assert np.abs(np.corrcoef(paths) - np.eye(4)).max() < 0.15  # 3000 bars, autocorrelation .8
    returns = np.array([b.next_return[:-1] for b in pairs.series])
    assert np.abs(np.corrcoef(returns) - np.eye(4)).max() < 4 / math.sqrt(3000)


def test_the_markets_seed_stands_in_the_spec_alone():
    sha = [b.sha256 for b in pairs_of().series]
    assert sha == [b.sha256 for b in pairs_of(seed=9).series]
    others = [b.sha256 for k in (1, 2, 3) for b in pairs_of(data=f"synthetic:signal?seed={k}&bars={BARS}").series]
    assert len(set(sha + others)) == 16  # no path twice


def test_synthetic_pairs_are_quoted_in_account_currency_at_a_fifth_of_sigma():
    pairs, at = pairs_of(commission_bps=0.5), 0
    assert not pairs.inverse.any() and not pairs.flat.any()
    for bars in pairs.series:
        n = len(bars.close)
        np.testing.assert_allclose(pairs.ret[at : at + n - 1], bars.next_return[:-1], atol=1e-15)
        np.testing.assert_array_equal(pairs.expected[at : at + n], bars.truth.expected)
        at += n
    np.testing.assert_allclose(pairs.cost, 0.2 * 0.006 + 0.5e-4, rtol=1e-12)
    np.testing.assert_allclose(pairs.table[:, -1], 12.5, rtol=1e-6)  # the last column says it, in bp
    np.testing.assert_allclose(pairs_of(cost_bps=3.0).cost, 3e-4, rtol=1e-12)
    assert pairs_of(cost_bps=0.0).cost.max() == 0


@pytest.mark.parametrize("name, ic", [("noise", 0), ("drift", 0), ("regime", 0.14)])
def test_every_synthetic_market_makes_pairs(name, ic):
    pairs = pairs_of(data=f"synthetic:{name}?bars={BARS}", symbols=("EURUSD", "USDJPY"))
    assert [b.truth.law.ic for b in pairs.series] == [ic] * 2
    assert pairs.cost[0] == pytest.approx(0.2 * min(pairs.series[0].truth.law.sigma))


# -------------------------------------------------------------------------------------------------------- real pairs
def test_real_pairs_keep_their_rows_and_their_own_splits(folder):
    pairs = real(folder)
    files = [pd.read_parquet(folder / f"{s}_1h.parquet") for s in REAL]
    assert pairs.names == REAL and pairs.inverse.tolist() == [False, True] and np.isnan(pairs.expected).all()
    first = [0, BARS]
    assert len(pairs.ret) == len(pairs.table) == 2 * BARS - 60
    eur, jpy = (f["close"].to_numpy() for f in files)
    np.testing.assert_allclose(pairs.ret[: BARS - 1], eur[1:] / eur[:-1] - 1, atol=1e-15)
    np.testing.assert_allclose(pairs.ret[BARS:-1], 1 - jpy[:-1] / jpy[1:], atol=1e-15)  # of a dollar, paid in dollars
    assert pairs.ret[BARS - 1] == pairs.ret[-1] == 0
    assert set(pairs.rows) == set(dqn.SPLITS)
    for k, frame in enumerate(files):
        n = len(frame)
        (a, b), (c, d), (e, f) = (pairs.rows[s][k] - first[k] for s in dqn.SPLITS)
        assert a == pairs.models[k].warmup == 1  # ret_1 is known from the second bar on
        assert (b, d, f) == (round(0.7 * n), round(0.85 * n), n - 1)
        assert c - b == e - d == dqn.HORIZON + dqn.EMBARGO


def test_splits_by_date_fall_on_each_pairs_own_rows(folder):
    pairs, start = real(folder, split="2023-01-30/2023-02-13"), 0
    for k, bars in enumerate(pairs.series):
        (_, b), (c, d), (e, _) = (pairs.rows[s][k] - start for s in dqn.SPLITS)
        days = [bars.timestamp[t].astype("datetime64[D]") for t in (b - 1, b, d - 1, d)]
        assert days[0] < np.datetime64("2023-01-30") <= days[1]
        assert days[2] < np.datetime64("2023-02-13") <= days[3]
        start += len(bars.close)


def test_a_pip_of_yen_is_a_hundredth(folder):
    pairs = real(folder, spread_pips=(1.6, 1.5), commission_bps=0.25)
    for k, (spread, cut) in enumerate(((1.6e-4, slice(0, BARS)), (1.5e-2, slice(BARS, None)))):
        np.testing.assert_allclose(pairs.cost[cut], spread / 2 / pairs.series[k].close + 0.25e-4, rtol=1e-12)
    np.testing.assert_allclose(pairs.table[:, -1], pairs.cost * 1e4, rtol=1e-6)
    one = real(folder, spread_pips=(2.0,))
    np.testing.assert_allclose(one.cost[:BARS], 1e-4 / one.series[0].close, rtol=1e-12)
    typical = real(folder, spread_pips=())
    np.testing.assert_allclose(typical.cost[BARS:], 0.75e-2 / typical.series[1].close, rtol=1e-12)


def test_spread_of_every_bar_from_a_file(folder, spread_file):
    table = pd.read_parquet(spread_file)
    pairs = real(folder, spread_pips=(), spread_file=str(spread_file))
    for k, (symbol, cut) in enumerate(zip(REAL, (slice(0, BARS), slice(BARS, None)))):
        n = len(pairs.series[k].close)
        np.testing.assert_allclose(pairs.cost[cut], table[symbol][:n] / 2 / pairs.series[k].close, rtol=1e-12)


def spoil(path, how):
    table = pd.read_parquet(path)
    if how == "missing bar":
        table = table.drop(index=333)
    elif how == "missing column":
        table = table.drop(columns="USDJPY")
    elif how == "negative":
        table.loc[333, "USDJPY"] = -1e-3
    elif how == "hole":
        table.loc[333, "USDJPY"] = np.nan
    elif how == "twice":
        table = pd.concat([table, table.iloc[[333]]])
    elif how == "words":
        table["USDJPY"] = ["wide"] * len(table)
    elif how == "no time":
        table["timestamp"] = ["soon"] * len(table)
    table.to_parquet(path, index=False)
    if how == "no parquet":
        path.write_text("spread")


@pytest.mark.parametrize("how, words", [
    ("missing bar", ["EURUSD", "2023-01-19T19:00Z"]), ("missing column", ["USDJPY"]),
    ("negative", ["USDJPY", "2023-01-19T19:00Z", "-0.001"]), ("hole", ["USDJPY", "2023-01-19T19:00Z"]),
    ("twice", ["timestamp"]), ("words", ["USDJPY"]), ("no time", ["timestamp"]), ("no parquet", ["spread.parquet"]),
])
def test_a_bad_spread_file_is_refused_in_one_line(folder, spread_file, how, words):
    spoil(spread_file, how)
    with pytest.raises((UsageError, DataError)) as error:
        real(folder, spread_pips=(), spread_file=str(spread_file))
    text = line_of(error)
    assert "--spread-file" in text and all(word in text for word in words), text


def test_nights_and_days_turn_at_22_utc_and_a_week_has_seven(folder):
    pairs, start = real(folder, swap_long_bps=2.0, swap_short_bps=-0.5), 0
    hour = np.timedelta64(1, "h")
    for bars in pairs.series:
        n = len(bars.close)
        close_at = bars.timestamp + hour
        rollovers = np.arange(close_at[0].astype("datetime64[D]"), close_at[-1] + 48 * hour, dtype="datetime64[D]")
        rollovers = (rollovers + np.timedelta64(22, "h")).astype("datetime64[ns]")
        nights = [int(((rollovers > a) & (rollovers <= b)).sum()) for a, b in zip(close_at[:-1], close_at[1:])]
        cut = slice(start, start + n - 1)
        np.testing.assert_allclose(pairs.swap[0, cut], np.multiply(nights, 2e-4), atol=1e-18)
        np.testing.assert_allclose(pairs.swap[1, cut], np.multiply(nights, -0.5e-4), atol=1e-18)
        np.testing.assert_array_equal(np.diff(pairs.day[start : start + n]), nights)
        assert sum(nights[:120]) == 7 and max(nights) == 2  # a bar a closed weekend books its two
        start += n


def test_weekend_flat_marks_the_last_bar_before_closed_hours(folder):
    hold, flat = real(folder), real(folder, weekend="flat")
    assert not hold.flat.any()
    start = 0
    for bars in flat.series:
        n = len(bars.close)
        at = pd.DatetimeIndex(bars.timestamp)
        friday = (at.day_of_week == 4) & (at.hour == 21)
        friday[-1] = False  # nothing is known to follow
        np.testing.assert_array_equal(flat.flat[start : start + n], friday)
        start += n
    assert flat.flat.sum() >= 8
    np.testing.assert_array_equal(hold.ret, flat.ret)  # the gap's return stays in the data


def test_one_file_a_symbol(folder):
    (folder / "EURUSD_4h.parquet").write_bytes((folder / "EURUSD_1h.parquet").read_bytes())
    with pytest.raises((UsageError, DataError)) as error:
        real(folder)
    text = line_of(error)
    assert "2 files" in text and "EURUSD_1h.parquet" in text and "EURUSD_4h.parquet" in text
    with pytest.raises((UsageError, DataError)) as error:
        real(folder, symbols=("GBPUSD",))
    text = line_of(error)
    assert "no file" in text and "GBPUSD*.parquet" in text and str(folder) in text


@pytest.mark.parametrize("symbol", ["EURGBP", "EURUSDT", "USD", "eurusd"])
def test_a_pair_without_dollars_is_refused(folder, symbol):
    (folder / "EURUSD_1h.parquet").rename(folder / f"{symbol}_1h.parquet")
    with pytest.raises((UsageError, DataError)) as error:
        real(folder, symbols=(symbol,))
    assert symbol in line_of(error) and "USD" in line_of(error)


def test_files_by_name_take_their_symbol_from_it(folder):
    paths = ",".join(str(folder / f"{s}_1h.parquet") for s in REAL)
    one, other = pairs_of(data=paths, spread_pips=(1.0,)), real(folder)
    assert one.names == REAL
    for name in ("table", "ret", "cost", "swap", "day", "inverse"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_two_files_of_one_pair_are_refused(folder):
    (folder / "EURUSD_b.parquet").write_bytes((folder / "USDJPY_1h.parquet").read_bytes())
    with pytest.raises((UsageError, DataError)) as error:
        pairs_of(data=f"{folder}/EURUSD_1h.parquet,{folder}/EURUSD_b.parquet", spread_pips=(1.0,))
    assert "EURUSD" in line_of(error)


@pytest.mark.parametrize("changes, words", [
    (dict(data="synthetic:signal", data_dir="x"), ["--data ", "--data-dir x"]),
    (dict(symbols=("EURUSD", "EURUSD")), ["--symbols", "twice"]),
    (dict(symbols=()), ["--symbols"]),
    (dict(spread_pips=(1.0,), spread_file="x"), ["--spread-pips", "--spread-file"]),
    (dict(spread_pips=(-1.0,)), ["--spread-pips", "-1"]),
])
def test_contradicting_flags_are_refused_before_anything_is_read(changes, words):
    with pytest.raises(ValueError) as error:
        dqn.Args(**changes)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("changes, words", [
    (dict(spread_pips=(1.0,)), ["--spread-pips", "--cost-bps"]),
    (dict(spread_file="x.parquet"), ["--spread", "--cost-bps"]),
    (dict(data="synthetic:signl"), ["signl", "signal"]),
    (dict(data="synthetic:signal?bar=300"), ["bar", "bars"]),
    (dict(data="synthetic:signal?bars=300"), ["300", "rows"]),
    (dict(data="synthetic:signal?bars=64"), ["64"]),
    (dict(split="0.5/0.5"), ["0.5/0.5"]),
    (dict(split="0.98/0.01/0.01"), ["0.98/0.01/0.01"]),
    (dict(data="nowhere.parquet"), ["nowhere.parquet"]),
    (dict(data="bars.txt"), ["bars.txt"]),
    (dict(feature_cols=("ret_1", "rsi14")), ["--feature-cols", "rsi14", "rsi_14"]),
    (dict(feature_cols=("ret_1", "ret_1")), ["--feature-cols", "ret_1", "twice"]),
    (dict(feature_cols=()), ["--feature-cols"]),
    (dict(feature_cols=("rsi_6000",)), ["--feature-cols", "rsi_6000", "5000"]),
    (dict(feature_cols=("sma_500",)), ["--feature-cols", "630", "755"]),
])
def test_bad_data_flags_are_refused_in_one_line(changes, words):
    with pytest.raises((UsageError, DataError)) as error:
        pairs_of(**changes)
    text = line_of(error)
    assert all(word in text for word in words), text


@pytest.mark.parametrize("changes, words", [
    (dict(cost_bps=3.0), ["--cost-bps", "--spread-pips"]),
    (dict(spread_pips=(1.0, 2.0, 3.0)), ["3 values", "2 symbols"]),
    (dict(symbols=("EURUSD", "NZDUSD"), spread_pips=()), ["--spread-pips", "NZDUSD"]),
    (dict(spread_pips=(), spread_file="nowhere.parquet"), ["nowhere.parquet"]),
])
def test_bad_costs_of_real_pairs_are_refused_in_one_line(folder, changes, words):
    (folder / "NZDUSD_1h.parquet").write_bytes((folder / "EURUSD_1h.parquet").read_bytes())
    with pytest.raises((UsageError, DataError)) as error:
        real(folder, **changes)
    assert all(word in line_of(error) for word in words), error.value


def test_a_bad_bar_is_named(folder):
    frame = pd.read_parquet(folder / "USDJPY_1h.parquet")
    frame.loc[123, "high"] = frame.loc[123, "low"] / 2
    frame.to_parquet(folder / "USDJPY_1h.parquet", index=False)
    with pytest.raises(DataError) as error:
        real(folder)
    assert "USDJPY_1h.parquet" in line_of(error) and "row 123" in line_of(error) and "high" in line_of(error)


# ------------------------------------------------------------------------------------------------- columns by name
def wilder(x: np.ndarray, n: int, first: int) -> np.ndarray:
    """Mean of the first n values from `first` on, then (n - 1) parts of it and one of the new value."""
    out = np.full(len(x), np.nan)
    out[first + n - 1] = x[first : first + n].mean()
    for t in range(first + n, len(x)):
        out[t] = (out[t - 1] * (n - 1) + x[t]) / n
    return out


def ema(x: np.ndarray, n: int) -> np.ndarray:
    out = np.full(len(x), np.nan)
    out[n - 1] = x[:n].mean()
    for t in range(n, len(x)):
        out[t] = out[t - 1] + 2 / (n + 1) * (x[t] - out[t - 1])
    return out


def true_range(b: pd.DataFrame) -> np.ndarray:
    before = b.close.shift()
    return np.maximum.reduce([b.high - b.low, (b.high - before).abs(), (b.low - before).abs()])


def adx(b: pd.DataFrame, n: int) -> np.ndarray:
    """Wilder (1978): directional movement and true range smoothed as sums, their index averaged."""
    up, down, span = b.high.diff().to_numpy(), -b.low.diff().to_numpy(), true_range(b)
    plus, minus = np.where((up > down) & (up > 0), up, 0), np.where((down > up) & (down > 0), down, 0)
    sums, dx = [x[1:n].sum() for x in (plus, minus, span)], np.full(len(b), np.nan)
    for t in range(n, len(b)):
        sums = [s - s / n + x[t] for s, x in zip(sums, (plus, minus, span))]
        dx[t] = 100 * abs(sums[0] - sums[1]) / (sums[0] + sums[1])
    return wilder(dx, n, n)


def z(x: pd.Series, n: int) -> pd.Series:
    return (x - x.rolling(n).mean()) / x.rolling(n).std(ddof=0)


def rsi(b: pd.DataFrame, n: int):
    change = b.close.diff().to_numpy()
    up, down = (wilder(np.maximum(side * change, 0), n, 1) for side in (1, -1))
    return 100 * up / (up + down)


def variances(b: pd.DataFrame):
    hl, co = np.log(b.high / b.low), np.log(b.close / b.open)
    return hl**2 / (4 * math.log(2)), 0.5 * hl**2 - (2 * math.log(2) - 1) * co**2


def typical(b: pd.DataFrame) -> pd.Series:
    return (b.high + b.low + b.close) / 3


def cci(b: pd.DataFrame, n: int):
    mean = typical(b).rolling(n).mean()
    away = typical(b).rolling(n).apply(lambda w: np.abs(w - w.mean()).mean(), raw=True)
    return (typical(b) - mean) / (0.015 * away)


ORACLES = {
    "rsi": rsi, "adx": adx, "cci": cci,
    "ema": lambda b, n: np.log(b.close / ema(b.close.to_numpy(), n)),
    "sma": lambda b, n: np.log(b.close / b.close.rolling(n).mean()),
    "vwap": lambda b, n: np.log(b.close * b.volume.rolling(n).sum() / (b.volume * typical(b)).rolling(n).sum()),
    "atr": lambda b, n: np.log(wilder(true_range(b), n, 1) / b.close),
    "ret": lambda b, n: np.log(b.close).diff(n).clip(-0.2, 0.2),
    "close_z": lambda b, n: z(np.log(b.close), n),
    "log_volume": lambda b, n: np.log(b.volume).rolling(n).mean(),
    "volume_z": lambda b, n: z(np.log(b.volume), n),
    "volume_ratio": lambda b, n: np.log(b.volume / b.volume.rolling(n).mean()),
    "imbalance": lambda b, n: (b.volume * np.sign(b.close - b.open)).rolling(n).sum() / b.volume.rolling(n).sum(),
    "log_range": lambda b, n: (0.5 * np.log(variances(b)[0])).rolling(n).mean(),
    "parkinson": lambda b, n: 0.5 * np.log(variances(b)[0].rolling(n).mean()),
    "garman_klass": lambda b, n: 0.5 * np.log(variances(b)[1].rolling(n).mean()),
}


@pytest.fixture(scope="module")
def bars():
    return load_bars("synthetic:regime?bars=1200&seed=3")


def views_of(bars):
    return asset_views(bars.ohlcv[0], bars.timestamp, fit_asset(bars.ohlcv[0, :800]))


def test_every_family_has_a_formula_here():
    assert set(ORACLES) == set(FAMILIES)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("n", [3, 7, 30])
def test_columns_equal_independent_formulas(bars, family, n):
    frame = pd.DataFrame(bars.ohlcv[0], columns=COLUMNS[1:])
    ours = find_column(f"{family}_{n}")(views_of(bars))
    theirs = np.array(ORACLES[family](frame, n), float)
    assert np.isfinite(ours[3 * n :]).all()
    if family != "adx":
        np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    both = np.isfinite(ours) & np.isfinite(theirs)
    assert both.sum() > 1000
    np.testing.assert_allclose(ours[both], theirs[both], rtol=1e-6, atol=1e-6)


def test_macd_and_the_clock(bars):
    frame, b = pd.DataFrame(bars.ohlcv[0], columns=COLUMNS[1:]), views_of(bars)
    c = frame.close.to_numpy()
    np.testing.assert_allclose(find_column("macd")(b), (ema(c, 12) - ema(c, 26)) / c, atol=1e-10)
    at = pd.DatetimeIndex(bars.timestamp)
    np.testing.assert_allclose(find_column("hour_sin")(b), np.sin(2 * np.pi * at.hour / 24), atol=1e-12)
    np.testing.assert_allclose(find_column("hour_cos")(b), np.cos(2 * np.pi * at.hour / 24), atol=1e-12)


def test_families_agree_with_the_table_of_fixed_columns(bars):
    b, shared = views_of(bars), 0
    for name in TABLE:
        family, _, n = name.rpartition("_")
        if family in FAMILIES and n.isdigit():
            np.testing.assert_allclose(FAMILIES[family][1](b, int(n)), find_column(name)(b), atol=1e-12, err_msg=name)
            shared += 1
    assert shared > 15


@pytest.mark.parametrize("name", ["ema_20", "sma_20", "vwap_20", "atr_14", "macd", "ret_5", "close_z_30", "cci_20"])
def test_price_levels_enter_as_ratios(bars, name):
    """In another unit of price and of volume, the same columns."""
    other = replace(bars, ohlcv=bars.ohlcv * np.array([1e-4] * 4 + [1e3]))
    one, two = (fit_columns(b, [name], 800).transform(b) for b in (bars, other))
    np.testing.assert_allclose(one, two, atol=2e-4)


@pytest.mark.parametrize("name, words", [
    ("rsl_14", ["rsl_14", "rsi_14"]), ("rsi14", ["rsi14", "rsi_14"]), ("RSI_14", ["RSI_14"]), ("macdd", ["macd"]),
    ("log_vol", ["log_volume"]), ("hour_sine", ["hour_sin"]), ("close", ["close"]), ("zzz", ["zzz", "rsi_N", "ema_N"]),
    ("rsi_", ["rsi_"]), ("rsi_-3", ["rsi_-3"]), ("rsi_1.5", ["rsi_1.5"]), ("ret_²", ["ret_²"]), ("", ["unknown"]),
])
def test_an_unknown_column_is_refused_with_its_neighbours(name, words):
    with pytest.raises(ValueError) as error:
        find_column(name)
    text = str(error.value)
    assert "feature" in text and "\n" not in text and all(word in text for word in words), text


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_window_out_of_range_is_refused(bars, family):
    least, b = LEAST.get(family, 1), views_of(bars)
    for n in (0, least - 1, MOST + 1):
        with pytest.raises(ValueError, match=f"{family}_{n}.*must be from {least} to {MOST}"):
            find_column(f"{family}_{n}")
    assert np.isfinite(find_column(f"{family}_{least}")(b)[-1])
    find_column(f"{family}_{MOST}")


def test_a_column_named_twice_is_refused(bars):
    with pytest.raises(ValueError, match="rsi_14 is named twice"):
        fit_columns(bars, ["rsi_14", "ema_3", "rsi_14"], 800)
    with pytest.raises(ValueError, match="no feature"):
        fit_columns(bars, [], 800)


def test_too_few_rows_are_refused_with_both_numbers(bars):
    need = 29 + features.MIN_TRAIN
    assert fit_columns(bars, ["sma_30"], need).warmup == 29
    with pytest.raises(ValueError, match=f"{need - 1} train rows.*{need}.*29 of warm-up"):
        fit_columns(bars, ["sma_30"], need - 1)


def test_the_number_of_rows_that_a_refusal_asks_for_is_enough(bars):
    """Also where the window is longer than the train rows, so that no row of it is full."""
    with pytest.raises(ValueError) as error:
        fit_columns(bars, ["sma_700"], 600)
    need = int(str(error.value).split("at least ")[1].split()[0])
    assert fit_columns(bars, ["sma_700"], need).warmup == 699


def test_columns_are_scaled_on_train_rows_and_clipped(bars):
    names = ["rsi_14", "log_volume", "sma_50", "log_range_24", "hour_sin"]
    model, b = fit_columns(bars, names, 800), views_of(bars)
    x = model.transform(bars)
    assert x.dtype == np.float32 and x.shape == (1200, 5) and model.warmup == 49
    assert (x[:49] == 0).all() and (x[49:] != 0).any(0).all()
    for k, name in enumerate(names):
        raw = find_column(name)(b)
        low, mid, high = np.percentile(raw[49:800], [25, 50, 75])
        np.testing.assert_allclose(x[49:, k], np.clip((raw[49:] - mid) / ((high - low) / 1.349), -5, 5), atol=1e-5)
    assert np.abs(x).max() <= 5


def test_a_constant_column_is_zero(bars):
    silent = replace(bars, ohlcv=bars.ohlcv.copy())
    silent.ohlcv[..., 4] = 7.0
    model = fit_columns(silent, ["ret_1", "volume_z_24", "log_volume"], 800)
    x = model.transform(silent)
    assert (x[:, 1:] == 0).all() and model.warmup == 23 and x[23:, 0].std() > 0.5


def test_a_model_is_plain_values(bars):
    model = fit_columns(bars, dqn.Args.feature_cols, 800)
    state = model.state_dict()

    def plain(v):
        return all(map(plain, v)) if type(v) is list else plain(list(v.values())) if type(v) is dict else type(v) in (
            str, int, float)

    assert plain(state)
    np.testing.assert_array_equal(ColumnModel.from_state_dict(state).transform(bars), model.transform(bars))


EDITS = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
names = st.lists(st.one_of(
    st.tuples(st.sampled_from(sorted(FAMILIES)), st.integers(2, 120)).map(lambda x: f"{x[0]}_{x[1]}"),
    st.sampled_from(["macd", "macd_hist", "stoch_k_14", "aroon_osc_25", "close_location", "hour_sin", "weekday_cos"]),
), min_size=1, max_size=6, unique=True)


@pytest.fixture(scope="module")
def long():
    return market(1)


@EDITS
@given(names=names, t=st.integers(0, 1598), seed=st.integers(0, 2**32 - 1))
def test_rows_up_to_t_keep_their_bits_when_later_rows_change(long, names, t, seed):
    assert not leaks(fit_columns(long, names, 1100).transform, long, t, seed)


@EDITS
@given(names=names, seed=st.integers(0, 2**32 - 1))
def test_nothing_is_fitted_on_rows_after_train(long, names, seed):
    assert not refits(lambda b: fit_columns(b, names, 1100).state_dict(), long, 1100, seed)


def test_the_property_goes_red_on_a_look_ahead(long):
    model = fit_columns(long, ["ret_1"], 1100)
    assert leaks(lambda b: np.roll(model.transform(b), -1, 0), long, 1000, 0)
    assert refits(lambda b: fit_columns(b, ["ret_1"], min(1300, len(b.close))).state_dict(), long, 1100, 0)


def test_row_t_does_see_bar_t(long):
    for name in ("ret_1", "log_volume", "rsi_14", "atr_14", "vwap_20"):
        model = fit_columns(long, [name], 1100)
        ohlcv = long.ohlcv.copy()
        ohlcv[0, 1200] *= [1, 1.05, 1, 1.04, 3]
        x, y = model.transform(long), model.transform(replace(long, ohlcv=ohlcv))
        assert (x[:1200] == y[:1200]).all() and x[1200] != y[1200], name


# ---------------------------------------------------------------------------------------------------------- scoring
def series_of(spec: str, cost: float = 1e-4, seeds=(0, 1), cols=("log_volume",)) -> list[scoring.Series]:
    args = dqn.Args(data=spec, symbols=("EURUSD", "USDJPY")[: len(seeds)], feature_cols=cols, cost_bps=cost / 1e-4)
    return dqn.series_of(dqn.load_pairs(args), args)


def test_path_metrics_by_hand():
    reward = np.log([1.02, 0.97, 1.0, 1.01])
    metrics, equity = scoring.path_metrics(
        reward, np.full(4, 2e-4), np.array([1.0, 0.0, 2.0, 1e-12]), np.array([1.0, 1.0, -1.0, -1.0]), 100.0)
    growth = np.array([0.02, -0.03, 0.0, 0.01])
    np.testing.assert_allclose(equity, np.cumprod(1 + growth))
    assert metrics["mean_reward_bps"] == pytest.approx(1e4 * np.log(1 + growth).mean())
    assert metrics["total_return"] == pytest.approx(equity[-1] - 1)
    assert metrics["sharpe"] == pytest.approx(10 * growth.mean() / growth.std(ddof=1))
    assert metrics["max_drawdown"] == pytest.approx(-0.03)
    assert metrics["turnover"] == pytest.approx(0.75) and metrics["trades"] == 2 and metrics["exposure"] == 0
    assert metrics["mean_expected_bps"] == pytest.approx(2.0)
    unknown, _ = scoring.path_metrics(reward, np.full(4, np.nan), np.zeros(4), np.zeros(4), 100.0)
    assert "mean_expected_bps" not in unknown
    still, _ = scoring.path_metrics(np.zeros(4), np.zeros(4), np.zeros(4), np.zeros(4), 100.0)
    assert all(v == 0 for v in still.values())


@pytest.mark.parametrize("drift, best", [(0.003, 1.0), (-0.003, -1.0)])
def test_best_constant_is_chosen_on_train_rows(drift, best):
    (s, _) = series_of(f"synthetic:drift?bars=1500&drift={drift}")
    a, b = s.rows["train"]
    s.ret[b:] = -np.sign(drift) * 0.01  # what follows says the opposite; walk reads the same array
    assert scoring.best_constant(s, dqn.LEVELS) == best
    earned = [s.walk(np.full(b - a, x), a, b)[0].mean() for x in dqn.LEVELS]
    assert dqn.LEVELS[int(np.argmax(earned))] == best
    costly = series_of(f"synthetic:drift?bars=1500&drift={drift}", cost=0.0999)[0]
    costly.ret[:] = best * 1e-5
    assert scoring.best_constant(costly, dqn.LEVELS) == 0  # its entry is paid


@pytest.mark.parametrize("levels", [None, dqn.LEVELS], ids=["continuous", "levels"])
@pytest.mark.parametrize("turnover", [0.0, 0.02, 0.2, 0.6])
def test_random_path_has_the_turnover_it_is_asked_for(turnover, levels):
    path = scoring.random_path(60_000, turnover, 1, levels)
    assert np.abs(np.diff(path)).mean() == pytest.approx(turnover, rel=0.08, abs=1e-4)
    assert abs(path.mean()) < 0.25 or turnover == 0
    if levels is not None:
        assert set(path) <= set(levels)
    else:
        assert np.abs(path).max() <= 1
    np.testing.assert_array_equal(path, scoring.random_path(60_000, turnover, 1, levels))
    assert turnover == 0 or (path != scoring.random_path(60_000, turnover, 2, levels)).any()


def test_ridge_finds_the_edge_of_signal_and_none_in_noise():
    edge, se = scoring.ridge_edge(series_of("synthetic:signal?bars=6000&ic=.3"), dqn.LEVELS)
    assert edge > 4 * se > 0 and edge > 2
    for seed in (0, 1):
        noise, se = scoring.ridge_edge(series_of(f"synthetic:noise?bars=6000&seed={seed}"), dqn.LEVELS)
        assert noise < 2 * se + 1e-9
    hold, se = scoring.ridge_edge(series_of("synthetic:drift?bars=6000&drift=.002"), dqn.LEVELS)
    assert hold < 2 * se + 1e-9  # long for ever is the best constant


def test_ridge_stands_beside_the_optimum():
    """What it earns is of the size that the best policy earns, and never above it."""
    pairs = series_of("synthetic:signal?bars=8000&ic=.3")
    edge, _ = scoring.ridge_edge(pairs, dqn.LEVELS)
    truths = [dqn.load_series(dqn.Args(data=f"synthetic:signal?bars=8000&ic=.3&seed={k}", symbols=("EURUSD",)))[0].truth
              for k in (0, 1)]
    policy = markets.optimum(truths[0].law, 1e-4, actions=dqn.LEVELS)
    best = []
    for s, truth in zip(pairs, truths):
        a, b = s.rows["eval"]
        best.append(s.walk(dqn.optimum_path(policy, truth, a, b), a, b)[1].mean() * 1e4)
    assert 0.6 * np.mean(best) < edge < 1.3 * np.mean(best)


def outcome(updates=10, dependence=0.5, turnover=0.1, edge=1.0, se=0.1):
    audit = {"state_dependence": dependence, "ridge_edge_bps": edge, "ridge_edge_se_bps": se}
    name, reasons = scoring.verdict(audit, {"turnover": turnover, "exposure": 0.5}, updates)
    assert reasons and all(isinstance(r, str) and r for r in reasons)
    return name


def test_verdicts():
    assert outcome(updates=0) == "untrained"
    assert outcome() == "healthy"
    assert outcome(edge=0.0) == "healthy"
    for constant in (dict(dependence=0.0), dict(turnover=0.0), dict(dependence=0.019), dict(turnover=9e-4)):
        assert outcome(**constant) == "collapsed"
        assert outcome(**constant, edge=0.19) == "constant_is_right"
        assert outcome(**constant, edge=-1.0) == "constant_is_right"


# ------------------------------------------------------------------------------------------------------ command lines
@dataclass
class Flags:
    learning_rate: float = 1e-3
    """a rate"""
    mode: str = "a"
    """a or b"""
    names: tuple[str, ...] = ("x",)
    """names"""
    report: bool = True
    """a report"""

    def __post_init__(self):
        check(self, {"mode": ("a", "b")}, {"learning_rate": (0, 1)})


def test_flags_are_parsed():
    args = parse_args(Flags, ["--learning-rate", "0.5", "--names", "p", "q", "--no-report"])
    assert args == Flags(0.5, "a", ("p", "q"), False)
    assert parse_args(Flags, ["--learning_rate=0.25", "--mode", "b"]) == Flags(0.25, "b")
    assert parse_args(Flags, []) == Flags()


@pytest.mark.parametrize("argv, words", [
    (["--learning-rat", "1"], ["unknown flag --learning-rat", "--learning-rate"]),
    (["--xyz"], ["unknown flag --xyz"]),
    (["--learning-rate", "fast"], ["--learning-rate", "fast"]),
    (["--learning-rate", "2"], ["--learning-rate 2", "0", "1"]),
    (["--learning-rate", "nan"], ["--learning-rate nan"]),
    (["--learning-rate"], ["--learning-rate"]),
    (["--mode", "c"], ["--mode c", "a, b"]),
    (["--no-mode"], ["unknown flag --no-mode"]),
    (["stray"], ["stray"]),
])
def test_every_refusal_is_one_line_that_names_the_flag(argv, words, capfd):
    with pytest.raises(UsageError) as error:
        parse_args(Flags, argv)
    text = line_of(error)
    assert all(word in text for word in words), text
    assert "\x1b" not in text and text.isascii()
    out, err = capfd.readouterr()
    assert out == err == ""


def test_help_is_shown_and_ends_cleanly(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(Flags, ["--help"])
    assert stop.value.code in (0, None) and "--learning-rate" in capsys.readouterr().out
