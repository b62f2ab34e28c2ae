"""What dqn_forex_subproc.py trades on: pairs, costs, nights, splits, columns by name; what is refused."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from cleanrl_crypto import dqn_forex_subproc as dqn
from common.data import COLUMNS, load_bars
from common.features import FAMILIES, LEAST, MIN_TRAIN, MOST, TABLE, ColumnModel, asset_views, find_column, fit_asset, fit_columns
from common.run import UsageError

BARS = 900
FEW = ("ret_1", "log_volume")  # columns that need few rows
REAL = ("EURUSD", "USDJPY")
PURGE = dqn.HORIZON + dqn.EMBARGO


def pairs_of(fitted=None, **changes) -> dqn.Pairs:
    flags = {"feature_cols": FEW, "data": f"synthetic:signal?bars={BARS}"} | changes
    return dqn.load_pairs(dqn.Args(**flags), fitted)


def real(folder, **changes) -> dqn.Pairs:
    return pairs_of(**{"data": str(folder), "symbols": REAL, "spread_pips": (1.0,)} | changes)


def forex_hours(n: int) -> pd.DatetimeIndex:
    """n hourly bars that open from Sunday 22:00 to Friday 21:00 UTC."""
    hours = pd.date_range("2023-01-01T22:00", periods=2 * n + 200, freq="h", tz="UTC")
    week, hour = hours.day_of_week, hours.hour
    closed = (week == 5) | ((week == 4) & (hour >= 22)) | ((week == 6) & (hour < 22))
    return hours[~closed][:n]


def frame_of(seed: int, price: float, times) -> pd.DataFrame:
    bars = load_bars(f"synthetic:signal?bars={len(times)}&seed={seed}")
    frame = pd.DataFrame(bars.ohlcv[0], columns=COLUMNS[1:])
    frame[["open", "high", "low", "close"]] *= price / 100
    frame.insert(0, "timestamp", times)
    return frame


@pytest.fixture
def folder(tmp_path):
    """Two pairs in the format of real ones; the second one begins later."""
    hours = forex_hours(BARS)
    frame_of(1, 1.1, hours).to_parquet(tmp_path / "EURUSD_1h.parquet", index=False)
    frame_of(2, 150.0, hours[60:]).to_parquet(tmp_path / "USDJPY_1h.parquet", index=False)
    return tmp_path


@pytest.fixture
def spread_file(folder):
    rng, table = np.random.default_rng(0), pd.DataFrame({"timestamp": forex_hours(BARS)})
    table["EURUSD"], table["USDJPY"] = rng.uniform(1e-5, 3e-4, BARS), rng.uniform(1e-3, 3e-2, BARS)
    table.to_parquet(folder / "spread.parquet", index=False)
    return folder / "spread.parquet"


def parts_of(pairs):
    """Rows of every pair: bars (T, 8), close (T,), times (T,)."""
    for k, bars in enumerate(pairs.series):
        yield pairs.bars[pairs.first[k] : pairs.first[k + 1]], bars.close, bars.timestamp


def refused(words, call, **changes):
    with pytest.raises(UsageError) as error:
        call(**changes)
    text = str(error.value)
    assert "\n" not in text and len(text) < 500 and all(word in text for word in words), text


# ---------------------------------------------------------------------------------- synthetic pairs
def test_synthetic_pairs_are_independent_paths_of_one_market():
    pairs = pairs_of(data="synthetic:signal?bars=3000&phi=.8")
    assert pairs.names == dqn.Args.symbols and len({b.sha256 for b in pairs.series}) == 4
    laws = [b.truth.law for b in pairs.series]
    assert {(law.name, law.bars, law.phi, law.ic) for law in laws} == {("signal", 3000, 0.8, 0.1)}
    assert len({law.seed for law in laws}) == 4
    paths = np.array([b.truth.signal for b in pairs.series])
    assert np.abs(np.corrcoef(paths) - np.eye(4)).max() < 0.15
    sha = [b.sha256 for b in pairs_of().series]
    assert sha == [b.sha256 for b in pairs_of(seed=9).series]  # the market's seed stands in --data
    others = [b.sha256 for k in (1, 2) for b in pairs_of(data=f"synthetic:signal?seed={k}&bars={BARS}").series]
    assert len(set(sha + others)) == 12


@pytest.mark.parametrize("changes, cost", [
    ({}, 12e-4), (dict(cost_bps=3.0), 3e-4), (dict(cost_bps=0.0), 0.0), (dict(data=f"synthetic:regime?bars={BARS}"), 10e-4)])
def test_a_side_of_a_synthetic_pair_costs_a_fifth_of_sigma(changes, cost):
    pairs = pairs_of(**changes)
    np.testing.assert_allclose(pairs.bars[:, dqn.COST], cost, rtol=1e-12)
    np.testing.assert_allclose(pairs.table[:, -1], cost * 1e4, rtol=1e-6)  # the last column says it, in bp
    assert not pairs.bars[:, dqn.FLAT].any()
    for (bars, close, _) in parts_of(pairs):
        np.testing.assert_allclose(bars[:-1, dqn.RET], close[1:] / close[:-1] - 1, atol=1e-15)


# --------------------------------------------------------------------------------------- real pairs
def test_real_pairs_pay_in_dollars(folder):
    pairs = real(folder)
    assert pairs.names == REAL and len(pairs.table) == 2 * BARS - 60
    (eur, p, _), (jpy, q, _) = parts_of(pairs)
    np.testing.assert_allclose(eur[:-1, dqn.RET], p[1:] / p[:-1] - 1, atol=1e-15)
    np.testing.assert_allclose(jpy[:-1, dqn.RET], 1 - q[:-1] / q[1:], atol=1e-15)
    assert eur[-1, dqn.RET] == jpy[-1, dqn.RET] == 0


@pytest.mark.parametrize("split", ["0.70/0.15/0.15", "2023-01-30/2023-02-13"])
def test_one_calendar_border_for_all_pairs(folder, split):
    """Pairs of unequal history: no train row of one is as late as an eval row of another."""
    pairs = real(folder, split=split)
    times = np.concatenate([b.timestamp for b in pairs.series])
    ends = {name: [(times[a], times[b - 1]) for a, b in rows] for name, rows in pairs.rows.items()}
    assert max(b for _, b in ends["train"]) < min(a for a, _ in ends["eval"])
    assert max(b for _, b in ends["eval"]) < min(a for a, _ in ends["test"])
    for k in range(2):
        (a, b), (c, d), (e, f) = (pairs.rows[name][k] - pairs.first[k] for name in dqn.SPLITS)
        assert a == pairs.models[REAL[k]]["warmup"] == 1 and c - b == e - d == PURGE
        assert f == len(pairs.series[k].close) - 1
    if "-" in split:
        assert ends["train"][0][1] < np.datetime64("2023-01-30") <= times[pairs.rows["eval"][0, 0] - PURGE]


def test_bars_of_other_lengths_are_refused(folder):
    times = pd.date_range("2023-01-02", periods=BARS, freq="4h", tz="UTC")
    frame_of(2, 150.0, times).to_parquet(folder / "USDJPY_1h.parquet", index=False)
    refused(["USDJPY", "EURUSD"], real, folder=folder)


def test_pips_are_the_instruments(folder):
    pairs = real(folder, spread_pips=(1.6, 1.5), cost_bps=0.25)
    for (bars, close, _), spread in zip(parts_of(pairs), (1.6e-4, 1.5e-2)):
        np.testing.assert_allclose(bars[:, dqn.COST], spread / 2 / close + 0.25e-4, rtol=1e-12)
    np.testing.assert_allclose(pairs.table[:, -1], pairs.bars[:, dqn.COST] * 1e4, rtol=1e-6)
    typical = list(parts_of(real(folder, spread_pips=())))
    np.testing.assert_allclose(typical[1][0][:, dqn.COST], 0.75e-2 / typical[1][1], rtol=1e-12)


@pytest.mark.parametrize("symbol, price, pip", [("XAUUSD", 2000.0, 0.01), ("USDHUF", 350.0, 0.01), ("USDCHF", 0.9, 1e-4)])
def test_a_pip_of_gold_and_of_forint_is_a_hundredth(tmp_path, symbol, price, pip):
    frame_of(1, price, forex_hours(BARS)).to_csv(tmp_path / f"{symbol}.csv", index=False, date_format="%Y-%m-%dT%H:%M:%SZ")
    ((bars, close, _),) = parts_of(real(tmp_path, symbols=(symbol,), spread_pips=(30.0,)))
    np.testing.assert_allclose(bars[:, dqn.COST], 30 * pip / 2 / close, rtol=1e-12)


def test_spread_of_every_bar_from_a_file(folder, spread_file):
    table = pd.read_parquet(spread_file).set_index("timestamp")
    pairs = real(folder, spread_pips=(), spread_file=str(spread_file))
    for symbol, (bars, close, times) in zip(REAL, parts_of(pairs)):
        wide = table[symbol].reindex(pd.DatetimeIndex(times, tz="UTC"))
        np.testing.assert_allclose(bars[:, dqn.COST], wide / 2 / close, rtol=1e-12)


def spoil(table, how):
    row = table.index[333]
    if how == "missing bar":
        return table.drop(index=row)
    if how == "missing column":
        return table.drop(columns="USDJPY")
    if how == "twice":
        return pd.concat([table.loc[:row], table.loc[row:]])
    if how == "words":
        return table.assign(USDJPY="wide")
    if how == "naive":
        return table.assign(timestamp=table["timestamp"].dt.tz_localize(None))
    table.loc[row, "USDJPY"] = {"negative": -1e-3, "hole": np.nan}[how]
    return table


@pytest.mark.parametrize("how, words", [
    ("missing bar", ["EURUSD", "2023-01-19T19:00"]), ("missing column", ["USDJPY"]), ("twice", ["333"]),
    ("negative", ["USDJPY", "2023-01-19T19:00", "-0.001"]), ("hole", ["USDJPY", "333"]), ("words", ["USDJPY"]),
    ("naive", ["timestamp", "zone"])])
def test_a_bad_spread_file_is_refused(folder, spread_file, how, words):
    spoil(pd.read_parquet(spread_file), how).to_parquet(spread_file, index=False)
    refused(["spread.parquet", *words], real, folder=folder, spread_pips=(), spread_file=str(spread_file))


def test_nights_turn_at_22_utc_a_week_has_seven_and_each_pair_has_its_swap(folder):
    pairs = real(folder, swap_long_bps=(2.0, -1.0), swap_short_bps=(-0.5,))
    hour = np.timedelta64(1, "h")
    for (bars, _, times), long in zip(parts_of(pairs), (2e-4, -1e-4)):
        close_at = times + hour
        rollovers = np.arange(close_at[0].astype("datetime64[D]"), close_at[-1] + 48 * hour, dtype="datetime64[D]")
        rollovers = (rollovers + np.timedelta64(22, "h")).astype("datetime64[ns]")
        nights = np.array([((rollovers > a) & (rollovers <= b)).sum() for a, b in zip(close_at[:-1], close_at[1:])])
        np.testing.assert_allclose(bars[:-1, dqn.SWAP_LONG], nights * long, atol=1e-18)
        np.testing.assert_allclose(bars[:-1, dqn.SWAP_SHORT], nights * -0.5e-4, atol=1e-18)
        assert nights[:120].sum() == 7 and nights.max() == 2  # a bar before a closed weekend books its two


def test_weekend_flat_marks_the_last_bar_before_closed_hours(folder):
    hold, flat = real(folder), real(folder, weekend="flat")
    assert not hold.bars[:, dqn.FLAT].any()
    for bars, _, times in parts_of(flat):
        at = pd.DatetimeIndex(times)
        friday = (at.day_of_week == 4) & (at.hour == 21)
        friday[-1] = False  # nothing is known to follow
        np.testing.assert_array_equal(bars[:, dqn.FLAT] != 0, friday)
    np.testing.assert_array_equal(hold.bars[:, dqn.RET], flat.bars[:, dqn.RET])


def test_weekend_flat_leaves_daily_bars_their_weekdays(tmp_path):
    days = pd.bdate_range("2018-01-01", periods=BARS, tz="UTC")
    frame_of(1, 1.1, days).to_parquet(tmp_path / "EURUSD.parquet", index=False)
    ((bars, _, times),) = parts_of(real(tmp_path, symbols=("EURUSD",), weekend="flat"))
    np.testing.assert_array_equal(bars[:-1, dqn.FLAT] != 0, pd.DatetimeIndex(times[:-1]).day_of_week == 4)


def test_files_by_name_take_their_pair_from_it(folder):
    paths = ",".join(str(folder / f"{s}_1h.parquet") for s in REAL)
    one, other = pairs_of(data=paths, spread_pips=(1.0,)), real(folder)
    assert one.names == REAL
    np.testing.assert_array_equal(one.table, other.table)
    np.testing.assert_array_equal(one.bars, other.bars)
    refused(["--symbols"], pairs_of, data=paths, spread_pips=(1.0,), symbols=REAL)
    (folder / "EURUSD_b.parquet").write_bytes((folder / "USDJPY_1h.parquet").read_bytes())
    twice = f"{folder}/EURUSD_1h.parquet,{folder}/EURUSD_b.parquet"
    refused(["two files"], pairs_of, data=twice, spread_pips=(1.0,))


def test_models_go_by_name_not_by_place(folder):
    fitted = real(folder)
    turned = real(folder, fitted=fitted.models, symbols=REAL[::-1])
    n = len(fitted.series[0].close)
    np.testing.assert_array_equal(turned.table[-n:], fitted.table[:n])
    (folder / "GBPUSD.parquet").write_bytes((folder / "EURUSD_1h.parquet").read_bytes())
    refused(["GBPUSD", "EURUSD"], real, folder=folder, fitted=fitted.models, symbols=("EURUSD", "GBPUSD"))
    refused(["--feature-cols", "log_volume"], real, folder=folder, fitted=fitted.models, feature_cols=("ret_1",))


@pytest.mark.parametrize("changes, words", [
    (dict(symbols=("EURUSD", "EURUSD")), ["--symbols", "twice"]), (dict(symbols=()), ["--symbols"]),
    (dict(data="x", spread_pips=(1.0,), spread_file="x"), ["--spread-pips", "--spread-file"]),
    (dict(data="x", spread_pips=(-1.0,)), ["--spread-pips", "-1"]),
    (dict(swap_long_bps=(math.nan,)), ["--swap-long-bps"]),
    (dict(spread_pips=(1.0,)), ["--spread-pips", "synthetic"]), (dict(weekend="flat"), ["--weekend", "synthetic"]),
    (dict(swap_long_bps=(1.0, 2.0)), ["--swap-long-bps", "2 values", "4 symbols"]), (dict(num_envs=2), ["--num-envs 2", "4"]),
    (dict(data="synthetic:signl"), ["signl", "signal"]), (dict(data="synthetic:signal?bar=300"), ["bar", "bars"]),
    (dict(data="synthetic:signal?bars=300"), ["300"]), (dict(split="0.5/0.5"), ["0.5/0.5"]),
    (dict(split="0.98/0.01/0.01"), ["0.98/0.01/0.01"]), (dict(data="nowhere.parquet"), ["nowhere.parquet"]),
    (dict(data="bars.txt"), ["bars.txt"]), (dict(feature_cols=("ret_1", "rsi14")), ["--feature-cols", "rsi14", "rsi_14"]),
    (dict(feature_cols=()), ["--feature-cols"]), (dict(feature_cols=("rsi_6000",)), ["rsi_6000", "5000"]),
    (dict(feature_cols=("sma_500",)), ["--feature-cols", "630", "755"])])
def test_bad_data_flags_are_refused_in_one_line(changes, words):
    refused(words, pairs_of, **changes)


@pytest.mark.parametrize("changes, words", [
    (dict(spread_pips=(1.0, 2.0, 3.0)), ["3 values", "2 symbols"]),
    (dict(symbols=("EURUSD", "NZDUSD"), spread_pips=()), ["--spread-pips", "NZDUSD"]),
    (dict(symbols=("EURUSD", "XPTUSD")), ["XPTUSD", "--spread-file"]),
    (dict(symbols=("EURGBP",), spread_file="spread.parquet", spread_pips=()), ["EURGBP"]),
    (dict(symbols=("GBPUSD",)), ["GBPUSD"]), (dict(symbols=("EURUSD", "EURUSDT")), ["EURUSDT"]),
    (dict(spread_pips=(), spread_file="nowhere.parquet"), ["nowhere.parquet"])])
def test_bad_real_pairs_are_refused_in_one_line(folder, spread_file, changes, words, monkeypatch):
    monkeypatch.chdir(folder)
    for name in ("NZDUSD", "XPTUSD", "EURGBP"):
        (folder / f"{name}.parquet").write_bytes((folder / "EURUSD_1h.parquet").read_bytes())
    refused(words, real, folder=folder, **changes)


@pytest.mark.parametrize("symbol", ["EURGBP", "EURUSDT", "USD", "eurusd"])
def test_a_pair_without_dollars_is_refused(symbol):
    refused([symbol, "USD"], dqn.account_return, symbol=symbol, close=np.ones(3))


def test_a_bad_bar_is_named(folder):
    frame = pd.read_parquet(folder / "USDJPY_1h.parquet")
    frame.loc[123, "high"] = frame.loc[123, "low"] / 2
    frame.to_parquet(folder / "USDJPY_1h.parquet", index=False)
    refused(["USDJPY_1h.parquet", "row 123", "high"], real, folder=folder)


# ---------------------------------------------------------------------------------- columns by name
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
@pytest.mark.parametrize("n", [3, 30])
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
    need = 29 + MIN_TRAIN
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
