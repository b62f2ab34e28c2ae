"""Columns of the market table: names, hand-computed values, scaling, degenerate bars, the HMM's findings."""

import json
import logging
import warnings
from dataclasses import replace
from math import gamma, log, sqrt
from pathlib import Path

import numpy as np
import pytest

from common import features
from common.data import load_bars
from common.features import (
    CLIP,
    HMM_COLUMNS,
    MIN_TRAIN,
    TECH_10,
    TECH_50,
    WARMUP,
    FeatureModel,
    dickey_fuller,
    fit_features,
    fit_hmm,
    frac_order,
    frac_weights,
    lag_sum,
    raw_columns,
)

ROWS, STOP = 2400, 1700
CRYPTO = Path(__file__).resolve().parents[2] / "shared" / "data" / "crypto"


def market(assets=1, rows=ROWS, seed=0):
    all_bars = [load_bars(f"synthetic:regime?bars={rows}&seed={seed + a}") for a in range(assets)]
    ohlcv = np.concatenate([b.ohlcv for b in all_bars])
    names = tuple(f"A{a}" for a in range(assets)) if assets > 1 else all_bars[0].names
    return replace(all_bars[0], names=names, ohlcv=ohlcv, filled=np.zeros(ohlcv.shape[:2], bool))


def walk(rows=ROWS, seed=0, sigma=0.01):
    """(1, rows, 5) random bars that gap between close and open, with volumes from nothing to a lot."""
    rng = np.random.default_rng(seed)
    c = 50 * np.exp(np.cumsum(rng.normal(0, sigma, rows)))
    o = c * np.exp(rng.normal(0, sigma, rows))
    h = np.maximum(o, c) * np.exp(rng.exponential(sigma, rows))
    low = np.minimum(o, c) * np.exp(-rng.exponential(sigma, rows))
    return np.stack([o, h, low, c, rng.exponential(10, rows)], -1)[None]


def table(ohlcv):
    bars = market(rows=ohlcv.shape[1])
    names = tuple(f"A{a}" for a in range(len(ohlcv)))
    return replace(bars, spec="table", names=names, ohlcv=ohlcv, filled=ohlcv[..., 4] == 0, truth=None)


@pytest.fixture(scope="module")
def one():
    bars = table(walk())
    return bars, fit_features(bars, STOP)


@pytest.fixture(scope="module")
def raw(one):
    bars, model = one
    columns, _ = raw_columns(bars.ohlcv, bars.timestamp, model.assets)
    return dict(zip(TECH_50, columns.T, strict=True))


# ------------------------------------------------------------------------------------------------ names
def test_fifty_documented_columns():
    assert len(TECH_50) == 50
    assert len(set(TECH_50.values())) == 50 and all(len(text) > 12 for text in TECH_50.values())
    assert len(TECH_10) == 10 and set(TECH_10) <= set(TECH_50)


@pytest.mark.parametrize("assets, tech", [(1, 50), (2, 20), (3, 30), (5, 50)])
def test_columns_by_number_of_assets(assets, tech):
    bars = market(assets, rows=1500)
    model = fit_features(bars, 1100)
    x = model.transform(bars)
    assert model.n_tech == tech and x.shape == (1500, tech + 5) and x.dtype == np.float32
    assert len(set(model.columns)) == tech + 5 and model.columns[tech:] == HMM_COLUMNS
    if assets == 1:
        assert model.columns[:50] == tuple(TECH_50)
    else:
        assert model.columns[:tech] == tuple(f"A{a}/{c}" for a in range(assets) for c in TECH_10)


def test_an_asset_has_the_same_columns_alone_and_in_company():
    both, alone = market(2), market(1)
    pair, single = fit_features(both, STOP).transform(both), fit_features(alone, STOP).transform(alone)
    at = [list(TECH_50).index(name) for name in TECH_10]
    np.testing.assert_array_equal(pair[:, :10], single[:, at])
    np.testing.assert_array_equal(pair[:, -5:], single[:, -5:])


def test_context_is_the_traded_assets():
    both = market(2)
    model = fit_features(both, STOP)
    other = both.ohlcv.copy()
    other[1, :, :4] = walk(seed=3)[0, :, :4]
    x, y = model.transform(both), model.transform(replace(both, ohlcv=other))
    np.testing.assert_array_equal(x[:, :10], y[:, :10])
    np.testing.assert_array_equal(x[:, -5:], y[:, -5:])
    assert (x[WARMUP:, 10:20] != y[WARMUP:, 10:20]).mean() > 0.5


def test_warmup_is_the_first_row_with_every_column(one):
    bars, model = one
    columns, _ = raw_columns(bars.ohlcv, bars.timestamp, model.assets)
    assert np.isfinite(columns).all(1).argmax() == model.warmup == WARMUP == 719
    x = model.transform(bars)
    assert (x[:WARMUP] == 0).all() and (x[WARMUP:] != 0).any(1).all()


# ----------------------------------------------------------------------- values, from independent formulas
T = 1234


def at(bars):
    return (bars.ohlcv[0, :, j] for j in range(5))


@pytest.mark.parametrize("m", [1, 4, 12, 24, 72])
def test_log_return(one, raw, m):
    _, _, _, c, _ = at(one[0])
    assert raw[f"ret_{m}"][T] == pytest.approx(min(0.2, max(-0.2, log(c[T] / c[T - m]))), abs=1e-12)


def test_log_return_is_clipped(one):
    bars, model = one
    ohlcv = bars.ohlcv.copy()
    ohlcv[0, T:, :4] *= 3
    columns, _ = raw_columns(ohlcv, bars.timestamp, model.assets)
    assert columns[T, list(TECH_50).index("ret_1")] == 0.2


@pytest.mark.parametrize("m", [24, 168, 720])
def test_parkinson(one, raw, m):
    _, h, low, _, _ = at(one[0])
    mean = sum(log(h[k] / low[k]) ** 2 for k in range(T - m + 1, T + 1)) / m
    assert raw[f"parkinson_{m}"][T] == pytest.approx(log(sqrt(mean / (4 * log(2)))), abs=1e-12)


@pytest.mark.parametrize("m", [24, 168])
def test_garman_klass(one, raw, m):
    o, h, low, c, _ = at(one[0])
    total = 0.0
    for k in range(T - m + 1, T + 1):
        total += 0.5 * log(h[k] / low[k]) ** 2 - (2 * log(2) - 1) * log(c[k] / o[k]) ** 2
    assert raw[f"garman_klass_{m}"][T] == pytest.approx(log(sqrt(total / m)), abs=1e-12)


def test_one_bar_range_and_its_means(one, raw):
    _, h, low, _, _ = at(one[0])
    bar = [log(log(h[k] / low[k]) / sqrt(4 * log(2))) for k in range(T - 11, T + 1)]
    assert raw["log_range"][T] == pytest.approx(bar[-1], abs=1e-12)
    assert raw["log_range_4"][T] == pytest.approx(sum(bar[-4:]) / 4, abs=1e-12)
    assert raw["log_range_12"][T] == pytest.approx(sum(bar) / 12, abs=1e-12)


@pytest.mark.parametrize(
    "name, m", [("volume_z", 24), ("volume_z", 168), ("volume_z", 336), ("volume_z", 720), ("close_z", 720)]
)
def test_z_scores(one, raw, name, m):
    bars, model = one
    volume = np.maximum(bars.ohlcv[0, :, 4], model.assets[0]["volume_floor"])
    x = bars.ohlcv[0, :, 3] if name == "close_z" else volume
    window = np.log(x[T - m + 1 : T + 1])
    assert raw[f"{name}_{m}"][T] == pytest.approx((window[-1] - window.mean()) / window.std(), rel=1e-9)


def test_volume_columns(one, raw):
    o, _, _, c, v = at(one[0])
    v = np.maximum(v, one[1].assets[0]["volume_floor"])
    day, week = v[T - 23 : T + 1], v[T - 167 : T + 1]
    assert raw["log_volume"][T] == pytest.approx(log(v[T]))
    assert raw["volume_ratio_24"][T] == pytest.approx(log(v[T] / day.mean()))
    assert raw["volume_trend"][T] == pytest.approx(log(day.mean() / week.mean()))
    up, down = (day[(sign * (c - o) > 0)[T - 23 : T + 1]].sum() for sign in (1, -1))
    assert raw["imbalance_24"][T] == pytest.approx((up - down) / (up + down))


def ema(x, m):
    """Seeded with the mean of the first m rows, as TA-Lib does."""
    y = x[:m].mean()
    for value in x[m:]:
        y += 2 / (m + 1) * (value - y)
    return y


def wilder_rsi(c, m):
    move = np.diff(c)
    up, down = move[:m].clip(0).mean(), (-move[:m]).clip(0).mean()
    for d in move[m:]:
        up, down = (up * (m - 1) + max(d, 0)) / m, (down * (m - 1) + max(-d, 0)) / m
    return 100 * up / (up + down)


@pytest.mark.parametrize("m", [6, 14, 48])
def test_rsi_by_wilders_recursion(one, raw, m):
    assert raw[f"rsi_{m}"][T] == pytest.approx(wilder_rsi(one[0].ohlcv[0, : T + 1, 3], m), rel=1e-9)


def test_price_oscillators_are_ratios(one, raw):
    _, h, low, c, _ = at(one[0])
    assert raw["ema_ratio_48"][T] == pytest.approx(log(c[T] / ema(c[: T + 1], 48)), rel=1e-9)
    line = [ema(c[: k + 1], 12) - ema(c[: k + 1], 26) for k in range(T - 400, T + 1)]
    assert raw["macd_hist"][T] == pytest.approx((line[-1] - ema(np.array(line), 9)) / c[T], rel=1e-6)
    band = c[T - 19 : T + 1]
    assert raw["bollinger_20"][T] == pytest.approx((c[T] - band.mean()) / (2 * band.std()), rel=1e-9)
    top, bottom = h[T - 13 : T + 1].max(), low[T - 13 : T + 1].min()
    assert raw["stoch_k_14"][T] == pytest.approx(100 * (c[T] - bottom) / (top - bottom), rel=1e-9)
    top, bottom = h[T - 71 : T + 1].max(), low[T - 71 : T + 1].min()
    assert raw["williams_r_72"][T] == pytest.approx(-100 * (top - c[T]) / (top - bottom), rel=1e-9)
    assert raw["close_location"][T] == pytest.approx((2 * c[T] - h[T] - low[T]) / (h[T] - low[T]), rel=1e-9)


def test_indicators_do_not_depend_on_the_unit_of_price_or_volume(one):
    bars, model = one
    unit = bars.ohlcv * np.array([1e-9] * 4 + [1e7])
    small = replace(bars, ohlcv=unit)
    np.testing.assert_allclose(fit_features(small, STOP).transform(small), model.transform(bars), atol=2e-4)


def test_calendar(one, raw):
    stamp = one[0].timestamp[T]
    hour = int((stamp - stamp.astype("datetime64[D]")) / np.timedelta64(1, "h"))
    weekday = stamp.astype("datetime64[D]").item().weekday()
    for name, phase in (("hour", hour / 24), ("weekday", weekday / 7)):
        assert raw[f"{name}_sin"][T] == pytest.approx(np.sin(2 * np.pi * phase), abs=1e-12)
        assert raw[f"{name}_cos"][T] == pytest.approx(np.cos(2 * np.pi * phase), abs=1e-12)


# -------------------------------------------------------------------------------- fractional difference
def test_fractional_weights():
    np.testing.assert_allclose(frac_weights(1.0, 5), [1, -1, 0, 0, 0], atol=0)
    d = 0.4
    closed = [gamma(k - d) / (gamma(-d) * gamma(k + 1)) for k in range(60)]
    np.testing.assert_allclose(frac_weights(d, 60), closed, rtol=1e-9)
    # half a difference taken twice is one difference, up to the cut of the window
    twice = np.convolve(frac_weights(0.5, 60), frac_weights(0.5, 60))[:60]
    np.testing.assert_allclose(twice, frac_weights(1.0, 60), atol=1e-12)


def test_fractional_difference_column(one, raw):
    bars, model = one
    x = np.log(bars.ohlcv[0, :, 3] / model.assets[0]["price_unit"])
    w = frac_weights(model.assets[0]["frac_order"])
    assert raw["frac_diff"][T] == pytest.approx(float(w @ x[T - 719 : T + 1][::-1]), abs=1e-10)


def test_dickey_fuller_against_least_squares():
    x = np.cumsum(np.random.default_rng(1).normal(size=500)) * 0.1
    design = np.column_stack([np.ones(499), x[:-1]])
    coef, rss, _, _ = np.linalg.lstsq(design, np.diff(x), rcond=None)
    se = sqrt(rss[0] / 497 * np.linalg.inv(design.T @ design)[1, 1])
    assert dickey_fuller(x) == pytest.approx(coef[1] / se, rel=1e-9)


def test_order_is_the_smallest_that_passes():
    x = np.log(walk(rows=4000, seed=2)[0, :, 3])
    d = frac_order(x)
    passes = {o: dickey_fuller(lag_sum(x, frac_weights(o))[WARMUP:]) < -2.86 for o in features.ORDERS}
    assert d == min(o for o, ok in passes.items() if ok) and d > features.ORDERS[0]
    noise = np.random.default_rng(0).normal(0, 0.01, 4000)
    assert frac_order(noise) == features.ORDERS[0]
    assert frac_order(np.zeros(4000)) == features.ORDERS[-1]


# ---------------------------------------------------------------------------------------------- scaling
def test_scaled_by_train_median_and_quartiles(one, raw):
    bars, model = one
    x = model.transform(bars)
    for k, name in enumerate(TECH_50):
        train = raw[name][WARMUP:STOP]
        low, mid, high = np.percentile(train, (25, 50, 75))
        assert model.center[k] == pytest.approx(mid) and model.scale[k] == pytest.approx((high - low) / 1.349)
        np.testing.assert_allclose(
            x[WARMUP:, k], np.clip((raw[name][WARMUP:] - mid) / model.scale[k], -5, 5), rtol=1e-5, atol=1e-5
        )
        low, mid, high = np.percentile(x[WARMUP:STOP, k], (25, 50, 75))
        assert mid == pytest.approx(0, abs=1e-5) and high - low == pytest.approx(1.349, abs=1e-4)
    assert np.abs(x[:, :50]).max() <= CLIP


def test_last_bar_volume_and_range_show_the_hidden_state():
    bars = market(rows=6000, seed=4)
    model = fit_features(bars, 4200)
    x = model.transform(bars)[4200:]
    volume, bar_range = (x[:, model.columns.index(name)] for name in ("log_volume", "log_range"))
    # v0 + .5 s + .1 noise: .5/sqrt(.26) = .981 is all there is to see
    assert np.corrcoef(volume, bars.truth.signal[4200:])[0, 1] > 0.97
    line = np.polyfit(np.log(bars.ohlcv[0, 4200:, 4]), volume, 1)
    np.testing.assert_allclose(np.polyval(line, np.log(bars.ohlcv[0, 4200:, 4])), volume, atol=1e-4)
    assert np.corrcoef(bar_range, bars.truth.regime[4200:])[0, 1] > 0.6


# ----------------------------------------------------------------------------------------- degenerate bars
def bars_of(kind):
    ohlcv = walk()
    if kind == "constant":
        ohlcv[...] = [5, 5, 5, 5, 7]
    if kind == "no volume":
        ohlcv[..., 4] = 0
    if kind == "closes only":
        ohlcv[..., :3] = ohlcv[..., 3:4]
    if kind == "silent stretch":
        ohlcv[0, 800:1000, :4] = ohlcv[0, 799, 3]
        ohlcv[0, 800:1000, 4] = 0
    if kind == "one outlier":
        ohlcv[...] = [5, 5, 5, 5, 7]
        ohlcv[0, 1500] = [5, 9, 2, 5, 1e9]
    if kind == "late storm":
        ohlcv[0, STOP:, 1] *= 3
        ohlcv[0, STOP:, 2] /= 3
        ohlcv[0, STOP:, 4] *= 1e12
    return table(ohlcv)


@pytest.mark.parametrize(
    "kind", ["constant", "no volume", "closes only", "silent stretch", "one outlier", "late storm"]
)
def test_degenerate_bars_stay_finite(kind):
    bars = bars_of(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = fit_features(bars, STOP)
        x = model.transform(bars)
    assert np.isfinite(x).all() and np.abs(x[:, :50]).max() <= CLIP
    assert (np.array(model.scale) > 0).all()
    np.testing.assert_allclose(x[WARMUP:, 50:54].sum(1), 1, atol=1e-6)


def test_a_constant_column_is_zero_with_scale_one():
    model = fit_features(bars_of("no volume"), STOP)
    k = model.columns.index("log_volume")
    assert model.scale[k] == 1.0
    assert (model.transform(bars_of("no volume"))[:, k] == 0).all()


def test_rows_filled_from_the_past_of_another_asset():
    bars = market(2)
    ohlcv = bars.ohlcv.copy()
    for t in range(1000, 1024):
        ohlcv[1, t] = [*np.repeat(ohlcv[1, 999, 3], 4), 0.0]
    bars = replace(bars, ohlcv=ohlcv, filled=ohlcv[..., 4] == 0)
    model = fit_features(bars, STOP)
    x = model.transform(bars)
    assert np.isfinite(x).all()
    # silence reads as very little volume, and leaves no trace once it has left the window
    k = model.columns.index("A1/volume_z_336")
    assert (x[1000:1003, k] < -2).all() and abs(x[1400:, k].mean()) < 1


# ----------------------------------------------------------------------------------------------- refusals
def one_line(error):
    return "\n" not in str(error.value) and str(error.value)


def test_too_few_train_rows_names_both_numbers(one):
    with pytest.raises(ValueError) as error:
        fit_features(one[0], 900)
    assert "900" in one_line(error) and str(WARMUP + MIN_TRAIN) in one_line(error)
    fit_features(one[0], WARMUP + MIN_TRAIN)


def test_train_stop_beyond_the_table(one):
    with pytest.raises(ValueError) as error:
        fit_features(one[0], ROWS + 1)
    assert str(ROWS) in one_line(error) and str(ROWS + 1) in one_line(error)


def test_other_assets_than_the_fitted_ones(one):
    bars, model = one
    with pytest.raises(ValueError, match="2 assets, features fitted on 1"):
        model.transform(market(2))
    pair = market(2)
    swapped = replace(pair, names=("A1", "A0"), ohlcv=pair.ohlcv[::-1])
    with pytest.raises(ValueError, match="order A0, A1"):
        fit_features(pair, STOP).transform(swapped)


def test_a_value_that_is_not_finite_names_column_and_row(one):
    bars, model = one
    ohlcv = bars.ohlcv.copy()
    ohlcv[0, 2000, 4] = np.nan
    with pytest.raises(ValueError, match="log_volume is not finite at row 2000"):
        model.transform(replace(bars, ohlcv=ohlcv))


# ---------------------------------------------------------------------------------------------- context
@pytest.mark.parametrize("seed", [4, 7])
def test_posterior_knows_the_regime(seed):
    """Markets on which EM from plain quantiles ends with three calm states (accuracy .93 and .96)."""
    bars = market(rows=20_000, seed=seed)
    model = fit_features(bars, 14_000)
    p = model.transform(bars)[14_000:, model.n_tech :]
    storm, regime = p[:, 2] + p[:, 3], bars.truth.regime[14_000:]
    assert ((storm > 0.5) == regime).mean() > 0.975
    assert np.corrcoef(storm, regime)[0, 1] > 0.95
    assert np.diff(model.hmm["mean"]).min() > 0
    # unsure where it is wrong
    wrong = (storm > 0.5) != regime
    assert p[wrong, 4].mean() > p[~wrong, 4].mean()


def test_context_columns(one):
    bars, model = one
    p = model.transform(bars)[WARMUP:, 50:]
    np.testing.assert_allclose(p[:, :4].sum(1), 1, atol=1e-6)
    entropy = -(p[:, :4] * np.log(np.maximum(p[:, :4], 1e-30))).sum(1) / np.log(4)
    np.testing.assert_allclose(p[:, 4], entropy, atol=1e-5)
    trans, start = np.array(model.hmm["trans"]), np.array(model.hmm["start"])
    np.testing.assert_allclose(trans.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(start @ trans, start, atol=1e-9)
    assert (np.diag(trans) >= 0.1).all()


MEAN, STD = np.array([-8.0, -6.5, -5.0, -3.5]), np.array([0.1, 0.25, 0.15, 0.3])
MOVES = np.array(
    [[0.80, 0.15, 0.03, 0.02], [0.05, 0.90, 0.04, 0.01], [0.02, 0.28, 0.60, 0.10], [0.3, 0.1, 0.1, 0.5]]
)


def known_chain(rows=6000):
    rng = np.random.default_rng(0)
    state, states = 0, np.empty(rows, int)
    for t in range(rows):
        state = states[t] = rng.choice(4, p=MOVES[state])
    return rng.normal(MEAN[states], STD[states])


@pytest.mark.parametrize("backwards", [False, True])
def test_a_known_chain_is_recovered_calm_first_and_made_sticky(backwards, monkeypatch):
    """Also where EM numbers its states the other way round."""
    if backwards:
        monkeypatch.setattr(features, "start_means", lambda x, start, rng: MEAN[::-1].copy())
    hmm = fit_hmm(known_chain(), 0)
    np.testing.assert_allclose(hmm["mean"], MEAN, atol=0.06)
    np.testing.assert_allclose(np.sqrt(hmm["var"]), STD, atol=0.04)
    np.testing.assert_allclose(hmm["trans"], 0.9 * MOVES + 0.1 * np.eye(4), atol=0.04)


def test_fit_is_repeatable_and_seeded():
    x = np.random.default_rng(0).normal(size=1500)
    assert fit_hmm(x, 3) == fit_hmm(x, 3) != fit_hmm(x, 4)


def test_fit_is_quiet_and_gives_the_log_level_back(capfd, caplog):
    caplog.set_level(logging.INFO, "hmmlearn")
    x = np.random.default_rng(0).normal(-5, 0.01, 300)  # so tight that hmmlearn says "not converging"
    fit_hmm(x, 0)
    out, err = capfd.readouterr()
    assert out == err == "" and not caplog.records
    assert logging.getLogger("hmmlearn").level == logging.INFO


# ------------------------------------------------------------------------------------------------ state
@pytest.mark.parametrize("assets", [1, 2])
def test_state_dict_is_plain_and_complete(assets):
    bars = market(assets)
    model = fit_features(bars, STOP)
    loaded = FeatureModel.from_state_dict(json.loads(json.dumps(model.state_dict())))
    assert loaded == model
    assert loaded.transform(bars).tobytes() == model.transform(bars).tobytes()


# ------------------------------------------------------------------------------------------------- real
@pytest.mark.skipif(not CRYPTO.is_dir(), reason="no real bars beside the repository")
def test_real_bars():
    bars = load_bars(",".join(str(CRYPTO / f"{name}_1h.parquet") for name in ("BTCUSDT", "ETHUSDT")))
    model = fit_features(bars, 30_000)
    x = model.transform(bars)
    assert x.shape == (len(bars.timestamp), 25) and model.columns[0] == "BTCUSDT_1h/rsi_14"
    assert np.isfinite(x).all() and (np.abs(x[WARMUP:, :20]) < CLIP).mean() > 0.98
    assert (x[WARMUP:].std(0) > 0.05).all()
