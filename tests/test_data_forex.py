"""What dqn_forex_subproc.py trades on: pairs, costs, nights, splits, columns by name; what is refused."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest

from cleanrl_crypto import dqn_forex_subproc as dqn
from common.data import COLUMNS, load_bars
from common.features import (
    FAMILIES,
    LEAST,
    MIN_TRAIN,
    MOST,
    asset_views,
    find_column,
    fit_asset,
    fit_columns,
)
from common.run import UsageError
from runs import refusal

BARS = 900
FEW = ("ret_1", "log_volume")  # columns that need few rows
REAL = ("EURUSD", "USDJPY")
refused = partial(refusal, UsageError)


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
    other = [b.sha256 for b in pairs_of(data=f"synthetic:signal?seed=1&bars={BARS}").series]
    assert len(set(sha + other)) == 8


@pytest.mark.parametrize("changes, cost", [
    ({}, 12e-4), (dict(cost_bps=3.0), 3e-4), (dict(data=f"synthetic:regime?bars={BARS}"), 10e-4)])
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


def test_one_calendar_border_for_all_pairs(folder):
    """Pairs of unequal history: no train row of one is as late as an eval row of another."""
    pairs = real(folder, split="2023-01-30/2023-02-13")
    times = np.concatenate([b.timestamp for b in pairs.series])
    ends = {name: [(times[a], times[b - 1]) for a, b in rows] for name, rows in pairs.rows.items()}
    assert max(b for _, b in ends["train"]) < min(a for a, _ in ends["eval"])
    assert max(b for _, b in ends["eval"]) < min(a for a, _ in ends["test"])
    rows = np.hstack([pairs.rows[name] for name in dqn.SPLITS]) - pairs.first[:-1, None]  # (pairs, 6)
    assert (rows[:, 2::2] - rows[:, 1:-1:2] == dqn.HORIZON + dqn.EMBARGO).all()
    assert rows[:, 0].tolist() == [1, 1] and (rows[:, -1] == np.diff(pairs.first) - 1).all()


@pytest.mark.parametrize("symbol, pip", [("EURUSD", 1e-4), ("USDJPY", 0.01), ("XAUUSD", 0.01), ("USDHUF", 0.01)])
def test_pips_are_the_instruments_and_a_commission_is_added(folder, symbol, pip):
    frame_of(1, 300.0, forex_hours(BARS)).to_parquet(folder / f"{symbol}_1h.parquet", index=False)
    pairs = real(folder, symbols=(symbol,), spread_pips=(30.0,), cost_bps=0.25)
    ((bars, close, _),) = parts_of(pairs)
    np.testing.assert_allclose(bars[:, dqn.COST], 30 * pip / 2 / close + 0.25e-4, rtol=1e-12)
    np.testing.assert_allclose(pairs.table[:, -1], bars[:, dqn.COST] * 1e4, rtol=1e-6)  # the last column, in bp


def test_majors_have_a_typical_spread(folder):
    *_, (bars, close, _) = parts_of(real(folder, spread_pips=()))
    np.testing.assert_allclose(bars[:, dqn.COST], 0.75e-2 / close, rtol=1e-12)


def test_spread_of_every_bar_from_a_file(folder, spread_file):
    table = pd.read_parquet(spread_file).set_index("timestamp")
    pairs = real(folder, spread_pips=(), spread_file=str(spread_file))
    for symbol, (bars, close, times) in zip(REAL, parts_of(pairs)):
        wide = table[symbol].reindex(pd.DatetimeIndex(times, tz="UTC"))
        np.testing.assert_allclose(bars[:, dqn.COST], wide / 2 / close, rtol=1e-12)


@pytest.mark.parametrize("spoil, words", [
    (lambda table, row: table.drop(index=row), ["EURUSD", "2023-01-19T19:00"]),
    (lambda table, row: table.drop(columns="USDJPY"), ["USDJPY"]),
    (lambda table, row: table.assign(USDJPY=-1e-3), ["USDJPY", "-0.001"]),
    (lambda table, row: table.assign(timestamp=table["timestamp"].dt.tz_localize(None)), ["timestamp", "zone"]),
], ids=["missing bar", "missing column", "negative", "naive times"])
def test_a_bad_spread_file_is_refused(folder, spread_file, spoil, words):
    table = pd.read_parquet(spread_file)
    spoil(table, table.index[333]).to_parquet(spread_file, index=False)
    refused(real, words=["spread.parquet", *words], folder=folder, spread_pips=(), spread_file=str(spread_file))


def test_nights_turn_at_22_utc_a_week_has_seven_and_each_pair_has_its_swap(folder):
    pairs = real(folder, swap_long_bps=(2.0, -1.0), swap_short_bps=(-0.5,))
    for (bars, _, times), long in zip(parts_of(pairs), (2e-4, -1e-4)):
        close_at = pd.DatetimeIndex(times) + pd.Timedelta("1h")
        turns = pd.date_range("2023-01-01T22:00", close_at[-1], freq="D")
        nights = np.diff(turns.searchsorted(close_at, side="right"))
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
    np.testing.assert_array_equal(one.bars, other.bars)
    refused(pairs_of, words=["--symbols"], data=paths, spread_pips=(1.0,), symbols=REAL)
    refused(pairs_of, words=["two files"], data=f"{paths},{paths}", spread_pips=(1.0,))


def test_models_go_by_name_not_by_place(folder):
    fitted = real(folder)
    turned = real(folder, fitted=fitted.models, symbols=REAL[::-1])
    n = len(fitted.series[0].close)
    np.testing.assert_array_equal(turned.table[-n:], fitted.table[:n])
    (folder / "GBPUSD.parquet").write_bytes((folder / "EURUSD_1h.parquet").read_bytes())
    refused(real, words=["GBPUSD", "EURUSD"], folder=folder, fitted=fitted.models, symbols=("EURUSD", "GBPUSD"))
    refused(real, words=["--feature-cols", "log_volume"], folder=folder, fitted=fitted.models, feature_cols=("ret_1",))


@pytest.mark.parametrize("changes, words", [
    (dict(symbols=("EURUSD", "EURUSD")), ["--symbols"]),
    (dict(data="x", spread_pips=(1.0,), spread_file="x"), ["--spread-pips", "--spread-file"]),
    (dict(data="x", spread_pips=(-1.0,)), ["--spread-pips", "-1"]),
    (dict(swap_long_bps=(math.nan,)), ["--swap-long-bps"]),
    (dict(weekend="flat"), ["--weekend", "synthetic"]),
    (dict(swap_long_bps=(1.0, 2.0)), ["--swap-long-bps", "2 values", "4 symbols"]),
    (dict(num_envs=2), ["--num-envs 2", "4"]),
    (dict(data="synthetic:signl"), ["signl", "signal"]),
    (dict(data="nowhere.parquet"), ["nowhere.parquet"]),
    (dict(split="0.98/0.01/0.01"), ["0.98/0.01/0.01"]),
    (dict(feature_cols=("ret_1", "rsi14")), ["--feature-cols", "rsi14", "rsi_14"]),
    (dict(feature_cols=("zzz",)), ["--feature-cols", "zzz", "rsi_N", "ema_N"]),
    (dict(feature_cols=("rsi_14.5",)), ["rsi_14.5"]),
    (dict(feature_cols=("rsi_14", "ema_3", "rsi_14")), ["rsi_14"]),
    (dict(feature_cols=("sma_500",)), ["--feature-cols", "630", "755"]),
    (dict(feature_cols=("sma_700",)), ["--feature-cols", "630", "955"]),
])
def test_bad_data_flags_are_refused_in_one_line(changes, words):
    refused(pairs_of, words=words, **changes)


@pytest.mark.parametrize("changes, words", [
    (dict(symbols=("EURUSD", "NZDUSD"), spread_pips=()), ["--spread-pips", "NZDUSD"]),
    (dict(symbols=("EURUSD", "XPTUSD")), ["XPTUSD", "--spread-file"]),
    (dict(symbols=("EURGBP",), spread_file="spread.parquet", spread_pips=()), ["EURGBP"]),
    (dict(symbols=("GBPUSD",)), ["GBPUSD"]),
    (dict(symbols=("EURUSD", "USDCHF")), ["EURUSD", "USDCHF"]),  # hourly bars and 4-hourly ones
])
def test_bad_real_pairs_are_refused_in_one_line(folder, spread_file, changes, words, monkeypatch):
    monkeypatch.chdir(folder)
    for name in ("NZDUSD", "XPTUSD", "EURGBP"):
        (folder / f"{name}.parquet").write_bytes((folder / "EURUSD_1h.parquet").read_bytes())
    times = pd.date_range("2023-01-02", periods=BARS, freq="4h", tz="UTC")
    frame_of(2, 0.9, times).to_parquet(folder / "USDCHF.parquet", index=False)
    refused(real, words=words, folder=folder, **changes)


# ---------------------------------------------------------------------------------- columns by name
def smooth(x: pd.Series, weight: float, n: int, first: int = 0) -> pd.Series:
    """From the mean of n values on, with the weight of each new one; Wilder's weight is 1 / n."""
    at = first + n - 1
    seeded = x.where(x.index > at)
    seeded[at] = x[first : at + 1].mean()
    return seeded.ewm(alpha=weight, adjust=False).mean()


def ema(x: pd.Series, n: int) -> pd.Series:
    return smooth(x, 2 / (n + 1), n)


def rsi(b: pd.DataFrame, n: int) -> pd.Series:
    change = b.close.diff()
    up, both = (smooth(x, 1 / n, n, 1) for x in (change.clip(lower=0), change.abs()))
    return 100 * up / both


def cci(b: pd.DataFrame, n: int) -> pd.Series:
    windows = b.typical.rolling(n)
    away = windows.apply(lambda w: np.abs(w - w.mean()).mean(), raw=True)
    return (b.typical - windows.mean()) / (0.015 * away)


def atr(b: pd.DataFrame, n: int) -> pd.Series:
    before = b.close.shift()
    true_range = np.maximum(b.high, before) - np.minimum(b.low, before)
    return np.log(smooth(true_range, 1 / n, n, 1) / b.close)


ORACLES = {  # the other families are columns of the table, of which tests/test_features.py has formulas
    "rsi": rsi,
    "cci": cci,
    "atr": atr,
    "vwap": lambda b, n: np.log(b.close / (b.volume * b.typical).rolling(n).sum() * b.volume.rolling(n).sum()),
    "ema": lambda b, n: np.log(b.close / ema(b.close, n)),
    "sma": lambda b, n: np.log(b.close / b.close.rolling(n).mean()),
    "macd": lambda b, n: (ema(b.close, 12) - ema(b.close, 26)) / b.close,
}


@pytest.fixture(scope="module")
def bars():
    return load_bars("synthetic:regime?bars=1200&seed=3")


def views_of(bars):
    return asset_views(bars.ohlcv[0], bars.timestamp, fit_asset(bars.ohlcv[0, :800]))


@pytest.mark.parametrize("family", sorted(ORACLES))
def test_columns_equal_independent_formulas(bars, family):
    frame = pd.DataFrame(bars.ohlcv[0], columns=COLUMNS[1:])
    frame["typical"] = (frame.high + frame.low + frame.close) / 3
    for n in (3, 30):
        name = family if family == "macd" else f"{family}_{n}"
        theirs = ORACLES[family](frame, n)
        assert np.isfinite(theirs).sum() > 1000
        np.testing.assert_allclose(find_column(name)(views_of(bars)), theirs, rtol=1e-6, atol=1e-6)


def test_a_window_out_of_range_is_refused(bars):
    b = views_of(bars)
    for family in FAMILIES:
        least = LEAST.get(family, 1)
        for n in (least - 1, MOST + 1):
            with pytest.raises(ValueError, match=f"{family}_{n}.*{least} to {MOST}"):
                find_column(f"{family}_{n}")
        assert np.isfinite(find_column(f"{family}_{least}")(b)[-1])


def test_columns_are_scaled_on_train_rows_and_clipped(bars):
    names = ["rsi_14", "log_volume", "sma_50", "log_range_24", "hour_sin"]
    assert fit_columns(bars, names, 49 + MIN_TRAIN).warmup == 49  # as few as that will do
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
    x = fit_columns(silent, ["ret_1", "volume_z_24", "log_volume"], 800).transform(silent)
    assert (x[:, 1:] == 0).all() and x[23:, 0].std() > 0.5
