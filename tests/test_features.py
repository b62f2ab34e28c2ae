"""Columns of the market table: names, values by hand, scaling, degenerate bars, the HMM's findings."""

import json
import re
import warnings
from dataclasses import replace
from math import log

import numpy as np
import pandas as pd
import pytest
from hmmlearn.hmm import GaussianHMM
from scipy import special, stats

import toy
from common import features
from common import run as common_run
from common.data import DataError, load_bars
from common.features import HMM_COLUMNS, TECH_10, TECH_50, WARMUP, dickey_fuller, fit_features, fit_hmm, frac_weights
from runs import refusal

ROWS, STOP = 2400, 1700


def market(assets=1, rows=ROWS, seed=0):
    several = [load_bars(f"synthetic:regime?bars={rows}&seed={seed + a}") for a in range(assets)]
    ohlcv = np.concatenate([bars.ohlcv for bars in several])
    names = tuple(f"A{a}" for a in range(assets)) if assets > 1 else several[0].names
    return replace(several[0], names=names, ohlcv=ohlcv, filled=np.zeros(ohlcv.shape[:2], bool))


def walk(rows=ROWS, seed=0, sigma=0.01):
    """(1, rows, 5) bars that gap between close and open, with volumes from nothing to a lot."""
    rng = np.random.default_rng(seed)
    c = 50 * np.exp(np.cumsum(rng.normal(0, sigma, rows)))
    o = c * np.exp(rng.normal(0, sigma, rows))
    h = np.maximum(o, c) * np.exp(rng.exponential(sigma, rows))
    low = np.minimum(o, c) * np.exp(-rng.exponential(sigma, rows))
    return np.stack([o, h, low, c, rng.exponential(10, rows)], -1)[None]


def table(ohlcv):
    bars = market(rows=ohlcv.shape[1])
    filled = ohlcv[..., 4] == 0
    return replace(bars, spec="t.csv", names=("A0",), ohlcv=ohlcv, filled=filled, truth=None)


@pytest.fixture(scope="module")
def one():
    bars = table(walk())
    return bars, fit_features(bars, STOP)


# ------------------------------------------------------------------------------------------- names
def test_the_page_names_every_column(repo):
    text = (repo / "docs" / "data.md").read_text()
    assert len(TECH_50) == 50 and len(TECH_10) == 10
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (.+) \|$", text, re.M)
    assert rows == [(str(k), *item) for k, item in enumerate(TECH_50.items())]
    rows = re.findall(r"^\| `(\w+)_N` \| (.+) \| (\d) \|$", text, re.M)
    least = features.LEAST
    assert rows == [(k, what, str(least.get(k, 1))) for k, (what, _) in features.FAMILIES.items()]
    assert all(f"`{name}`" in text for name in (*TECH_10, *features.SINGLE))


@pytest.mark.parametrize("assets, tech", [(1, 50), (2, 20)])
def test_columns_by_number_of_assets(assets, tech):
    bars = market(assets, rows=1500)
    model = fit_features(bars, 1100)
    x = model.transform(bars)
    assert model.n_tech == tech and x.shape == (1500, tech + 5) and x.dtype == np.float32
    assert model.warmup == WARMUP == 719 and (x[:WARMUP] == 0).all()
    raw, _ = features.raw_columns(bars.ohlcv, bars.timestamp, model.assets)
    np.testing.assert_allclose(model.center, np.median(raw[WARMUP:1100], 0))
    assert len(set(model.columns)) == tech + 5 and model.columns[tech:] == HMM_COLUMNS
    several = tuple(f"A{a}/{c}" for a in range(assets) for c in TECH_10)
    assert model.columns[:tech] == (tuple(TECH_50) if assets == 1 else several)
    assert model.train_dates == ("2019-01-01T00:00:00Z", "2019-02-15T19:00:00Z")
    loaded = type(model).from_state_dict(json.loads(json.dumps(model.state_dict())))
    assert loaded == model and loaded.transform(bars).tobytes() == x.tobytes()


T = 1234


def ema(x, m):
    """Seeded with the mean of the first m rows, as TA-Lib does."""
    y = x[:m].mean()
    for value in x[m:]:
        y += 2 / (m + 1) * (value - y)
    return y


def z_last(x):
    return (x[-1] - x.mean()) / x.std()


def oracle(o, h, low, c, v):
    """What row T of the raw columns must hold, from bars [0, T]."""
    parkinson = np.log(h / low) ** 2 / (4 * log(2))
    gk = 0.5 * np.log(h / low) ** 2 - (2 * log(2) - 1) * np.log(c / o) ** 2
    day = v[-24:]
    flow = (np.sign(c - o) * v)[-24:]
    want = {f"ret_{m}": log(c[T] / c[T - m]) for m in (1, 4, 12, 24, 72)}
    want |= {f"parkinson_{m}": 0.5 * log(parkinson[-m:].mean()) for m in (24, 168, 720)}
    want |= {f"garman_klass_{m}": 0.5 * log(gk[-m:].mean()) for m in (24, 168)}
    want |= {f"volume_z_{m}": z_last(np.log(v[-m:])) for m in (24, 168, 336, 720)}
    want |= {f"close_z_{m}": z_last(np.log(c[-m:])) for m in (24, 168, 720)}
    want |= {f"ema_ratio_{m}": log(c[T] / ema(c, m)) for m in (12, 48)}
    want |= {
        "log_range": 0.5 * log(parkinson[T]),
        "log_range_4": 0.5 * np.log(parkinson[-4:]).mean(),
        "log_range_12": 0.5 * np.log(parkinson[-12:]).mean(),
        "log_volume": log(v[T]),
        "volume_ratio_24": log(v[T] / day.mean()),
        "volume_trend": log(day.mean() / v[-168:].mean()),
        "imbalance_24": flow.sum() / day.sum(),
        "bollinger_20": z_last(c[-20:]) / 2,
        "bollinger_width_20": log(c[-20:].std() / c[-20:].mean()),
        "close_location": (2 * c[T] - h[T] - low[T]) / (h[T] - low[T]),
    }
    return want


def test_columns_against_formulas_written_anew(one):
    bars, model = one
    asset, stamp = model.assets[0], pd.Timestamp(bars.timestamp[T])
    o, h, low, c, v = bars.ohlcv[0, : T + 1].T
    want = oracle(o, h, low, c, np.maximum(v, asset["volume_floor"]))
    x = np.log(c / asset["price_unit"])
    want["frac_diff"] = frac_weights(asset["frac_order"]) @ x[-720:][::-1]
    for name, phase in (("hour", stamp.hour / 24), ("weekday", stamp.weekday() / 7)):
        want[f"{name}_sin"] = np.sin(2 * np.pi * phase)
        want[f"{name}_cos"] = np.cos(2 * np.pi * phase)
    columns, _ = features.raw_columns(bars.ohlcv, bars.timestamp, model.assets)
    raw = dict(zip(TECH_50, columns[T], strict=True))
    found = {name: raw[name] for name in want}
    assert found == pytest.approx(want, rel=1e-6, abs=1e-10) and len(want) == 34


# ---------------------------------------------------------------------------- fractional difference
def test_fractional_weights():
    k = np.arange(60)
    np.testing.assert_allclose(frac_weights(0.4, 60), (-1.0) ** k * special.binom(0.4, k), rtol=1e-9)


def test_dickey_fuller_against_least_squares():
    x = np.cumsum(np.random.default_rng(1).normal(size=500)) * 0.1
    line = stats.linregress(x[:-1], np.diff(x))
    assert dickey_fuller(x) == pytest.approx(line.slope / line.stderr, rel=1e-9)


def test_order_is_the_smallest_that_passes():
    x = np.log(walk(rows=4000, seed=2)[0, :, 3])
    d = features.frac_order(x)
    t = {o: dickey_fuller(features.lag_sum(x, frac_weights(o))[WARMUP:]) for o in features.ORDERS}
    assert d == min(o for o in t if t[o] < -2.86) and d > features.ORDERS[0]
    assert features.frac_order(np.zeros(4000)) == features.ORDERS[-1]


def test_a_bad_tick_in_the_train_rows_moves_little():
    """One close 100 times its neighbours: rows that do not look back to it stay where they were."""
    bars = table(walk(rows=9000))
    ohlcv = bars.ohlcv.copy()
    ohlcv[0, 800, [1, 3]] *= 100
    tick = replace(bars, ohlcv=ohlcv)
    model, spoiled = fit_features(bars, 7000), fit_features(tick, 7000)
    assert spoiled.assets == model.assets  # the order of the fractional difference among them
    x, y = (m.transform(b)[800 + 720 :] for m, b in ((model, bars), (spoiled, tick)))
    assert np.abs(x - y).mean(0).max() < 0.35  # a tenth of the train rows look 720 bars back to it
    assert np.abs(np.subtract(model.hmm["mean"], spoiled.hmm["mean"])).max() < 0.05


def degenerate(kind):
    ohlcv = walk()
    if kind == "constant":
        ohlcv[...] = [5, 5, 5, 5, 7]
    if kind == "no volume":
        ohlcv[..., 4] = 0
    if kind == "one outlier":
        ohlcv[...] = [5, 5, 5, 5, 7]
        ohlcv[0, 1500] = [5, 9, 2, 5, 1e9]
    if kind == "late storm":
        ohlcv[0, STOP:, 1] *= 3
        ohlcv[0, STOP:, 2] /= 3
        ohlcv[0, STOP:, 4] *= 1e12
    return table(ohlcv)


@pytest.mark.parametrize("kind", ["constant", "no volume", "one outlier", "late storm"])
def test_degenerate_bars_stay_finite(kind):
    bars = degenerate(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = fit_features(bars, STOP)
        x = model.transform(bars)
    assert np.isfinite(x).all() and np.abs(x[:, :50]).max() <= features.CLIP
    assert (np.array(model.scale) > 0).all()
    np.testing.assert_allclose(x[WARMUP:, 50:54].sum(1), 1, atol=1e-6)
    k = model.columns.index("log_volume")
    if kind == "no volume":
        assert model.scale[k] == 1.0 and (x[:, k] == 0).all()


def test_refusals_name_the_file_the_numbers_and_the_way_out(one):
    bars, model = one
    pair, ohlcv = market(2), bars.ohlcv.copy()
    swapped = replace(pair, names=("A1", "A0"), ohlcv=pair.ohlcv[::-1])
    ohlcv[0, 2000, 4] = np.nan
    for call, words in (
        (lambda: fit_features(bars, 900), ["t.csv: 900 train rows", "975", "0.41"]),  # of 2400
        (lambda: fit_features(bars, ROWS + 1), ["t.csv", "2400", "2401"]),
        (lambda: model.transform(pair), ["2 assets", "1"]),
        (lambda: fit_features(pair, STOP).transform(swapped), ["A0, A1"]),
        (lambda: model.transform(replace(bars, ohlcv=ohlcv)), ["t.csv", "log_volume", "row 2000"]),
    ):
        refusal(DataError, call, words=words)


# -------------------------------------------------------------------------------------------- screen
def test_t_values_by_simulation():
    """A slow column and slow errors: the plain t-value is far too wide, this one nearly a normal."""
    rng, values = np.random.default_rng(0), []
    for _ in range(200):
        slow = np.apply_along_axis(np.convolve, 1, rng.normal(size=(2, 1007)), np.ones(8), "valid")
        values.append(features.newey_west_t(slow[:1].T, slow[1])[0])
    assert 0.8 < np.std(values) < 1.5  # without lags: 2.4


@pytest.mark.parametrize("size", [1, 3])
def test_the_bound_of_the_screen(size):
    """All beyond it pass, whatever their sign: those of scipy's Benjamini-Yekutieli."""
    t = size * np.random.default_rng(0).normal(size=(50, 2))
    p = stats.false_discovery_control(2 * stats.norm.sf(np.abs(t)).ravel(), method="by")
    first = stats.norm.isf(0.01 / (1 / np.arange(1, 101)).sum() / 100 / 2)  # the strongest one's
    assert features.least_t(t, 0.01) == pytest.approx(np.abs(t).ravel()[p <= 0.01].min(initial=first))


@pytest.mark.parametrize("name, passes", [
    ("signal?ic=.3&", True), ("square?ic=.3&", True), ("square_regime?ic=.3&", True), ("noise?", False)])
def test_the_screen_keeps_what_foretells_and_drops_the_rest(name, passes):
    bars = load_bars(f"synthetic:{name}bars=6000")
    model = fit_features(bars, 4200, screen=True)
    volume = model.columns.index("log_volume")
    assert bool(model.passed[volume]) == passes and (passes or not model.passed.any())
    assert model.passed.sum() < 35
    x = model.transform(bars)
    assert (x[:, :50][:, ~model.passed] == 0).all() and x[:, 50:].any()
    assert fit_features(bars, 4200).passed.all()


# ------------------------------------------------------------------------------------------- context
@pytest.mark.parametrize("seed", [4, 7])
def test_posterior_knows_the_regime(seed):
    """Markets on which EM from plain quantiles ends with three calm states (.93 and .96)."""
    bars = market(rows=20_000, seed=seed)
    model = fit_features(bars, 14_000)
    p = model.transform(bars)[14_000:, model.n_tech :]
    storm, regime = p[:, 2] + p[:, 3], bars.truth.regime[14_000:]
    assert ((storm > 0.5) == regime).mean() > 0.975
    assert np.diff(model.hmm["mean"]).min() > 0


def test_a_long_history_is_fitted_on_stretches(monkeypatch, capsys):
    monkeypatch.setattr(features, "HMM_ROWS", 3000)
    bars = market(rows=12_000, seed=4)
    model = fit_features(bars, 9_000)
    assert "3000 of 8281" in capsys.readouterr().out
    p = model.transform(bars)[9_000:, model.n_tech :]
    assert ((p[:, 2] + p[:, 3] > 0.5) == bars.truth.regime[9_000:]).mean() > 0.95


def test_a_deadline_ends_the_fit_and_is_said(capsys):
    x = np.random.default_rng(0).normal(size=3000)
    hmm = fit_hmm(x, 0, seconds=0.0)
    assert "1 of 4" in capsys.readouterr().out
    assert hmm != fit_hmm(x, 0) and np.isfinite(hmm["mean"]).all()
    np.testing.assert_allclose(np.sum(hmm["trans"], 1), 1, atol=1e-12)


MEAN, STD = np.array([-8.0, -6.5, -5.0, -3.5]), np.array([0.1, 0.25, 0.15, 0.3])
MOVES = np.array([
    [0.80, 0.15, 0.03, 0.02],
    [0.05, 0.90, 0.04, 0.01],
    [0.02, 0.28, 0.60, 0.10],
    [0.30, 0.10, 0.10, 0.50],
])


def test_a_known_chain_is_recovered_calm_first_and_made_sticky(monkeypatch):
    """Where EM numbers its states the other way round."""
    monkeypatch.setattr(features, "start_means", lambda x, start, rng: MEAN[::-1].copy())
    law = GaussianHMM(4)
    law.startprob_, law.transmat_, law.means_, law.covars_ = MOVES[0], MOVES, MEAN[:, None], STD[:, None] ** 2
    hmm = fit_hmm(law.sample(6000, random_state=0)[0][:, 0], 0)
    np.testing.assert_allclose(hmm["mean"], MEAN, atol=0.06)
    np.testing.assert_allclose(np.sqrt(hmm["var"]), STD, atol=0.04)
    np.testing.assert_allclose(hmm["trans"], 0.9 * MOVES + 0.1 * np.eye(4), atol=0.04)


@pytest.mark.parametrize("argv, signum, code", [(["--timeout", 1], None, 2), ([], 15, 143), ([], None, 0)])
def test_a_long_history_asks_the_deadline(argv, signum, code, monkeypatch):
    """Without time, or after a signal, one line ends the run; a short history is worked through."""
    bars = load_bars("synthetic:noise?bars=1500")
    run = common_run.Run(toy.Args, ["--no-cuda", *argv], schema=1)
    run.guard.signal = signum
    model = fit_features(bars, 1100)
    monkeypatch.setattr(common_run, "LONG", 1000)
    try:
        for work in (lambda: fit_features(bars, 1100, screen=True), lambda: model.transform(bars)):
            if not code:
                work()
                continue
            with pytest.raises(common_run.OutOfTime) as stop:
                work()
            assert stop.value.exit_code == code
    finally:
        run.close()
