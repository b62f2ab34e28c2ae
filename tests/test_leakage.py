"""No feature or HMM column sees the future: random edits of later rows, for transform and for fit."""

from dataclasses import replace

import numpy as np
import pytest
from hmmlearn.hmm import GaussianHMM
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data import load_bars
from common.features import WARMUP, asset_views, context, fit_columns, fit_features
from scripts import leak_audit

ROWS, STOP = 1600, 1100
EDITS = settings(max_examples=25, deadline=None, derandomize=True)
rows = st.one_of(st.integers(0, ROWS - 2), st.integers(WARMUP - 2, ROWS - 2))
seeds = st.integers(0, 2**32 - 1)


def market(assets):
    """Bars of independent markets on one clock; the last of several has silent, flat bars."""
    several = [load_bars(f"synthetic:regime?bars={ROWS}&seed={a}") for a in range(assets)]
    ohlcv = np.concatenate([bars.ohlcv for bars in several])
    if assets > 1:
        for t in (300, 301, 302, 900, 1300):
            ohlcv[-1, t] = [*np.repeat(ohlcv[-1, t - 1, 3], 4), 0.0]
    names = tuple(f"A{a}" for a in range(assets))
    return replace(several[0], names=names, ohlcv=ohlcv, filled=ohlcv[..., 4] == 0, truth=None)


def edited(bars, t, seed, kind="rows"):
    """A copy whose rows after t are other, still valid, bars, or (kind "length") are not there."""
    return leak_audit.edited(bars, t, kind, np.random.default_rng(seed))


def leaks(columns, bars, t, seed):
    """Whether an edit of the rows after t, or their absence, moves a bit of columns at rows <= t."""
    before = columns(bars)[: t + 1].tobytes()
    after, cut = (columns(edited(bars, t, seed, kind)) for kind in ("rows", "length"))
    return before != after[: t + 1].tobytes() or before != cut.tobytes()


def refits(fit, bars, stop, seed):
    """Whether an edit of the rows from stop on, or their absence, moves anything that was fitted."""
    before = fit(bars).state_dict()
    after, cut = (fit(edited(bars, stop - 1, seed, kind)) for kind in ("rows", "length"))
    return before != after.state_dict() or before != cut.state_dict()


@pytest.fixture(scope="module", params=[1, 5])
def fitted(request):
    bars = market(request.param)
    return bars, fit_features(bars, STOP)


NAMES = ["rsi_7", "vwap_20", "atr_9", "close_z_50", "macd", "frac_diff", "volume_ratio_5", "ret_3"]


@EDITS
@given(t=rows, seed=seeds)
def test_rows_up_to_t_keep_their_bits_when_later_rows_change(fitted, t, seed):
    bars, model = fitted
    assert not leaks(model.transform, bars, t, seed)


@pytest.mark.parametrize("t", [WARMUP - 1, WARMUP, 1000])
def test_row_t_does_see_bar_t(fitted, t):
    bars, model = fitted
    before, after = model.transform(bars), model.transform(edited(bars, t - 1, 7))
    moved = (before[t:] != after[t:]).any(1)
    assert moved[max(WARMUP - t, 0) :].all()


def hmm_input(bars, model):
    return asset_views(bars.ohlcv[0], bars.timestamp, model.assets[0]).lg


def smoothed(x, hmm):
    m = GaussianHMM(4, "diag")
    m.startprob_, m.transmat_ = np.array(hmm["start"]), np.array(hmm["trans"])
    m.means_, m.covars_ = np.array(hmm["mean"])[:, None], np.array(hmm["var"])[:, None]
    return m.predict_proba(x[:, None])


def test_a_row_of_the_filter_is_the_last_one_of_the_library_s_smoother(fitted):
    bars, model = fitted
    x = hmm_input(bars, model)[:50]
    for t, row in enumerate(context(x, model.hmm)):
        np.testing.assert_allclose(row[:4], smoothed(x[: t + 1], model.hmm)[-1], atol=1e-9)


CHEATS = {
    "smoothed": smoothed,
    "whole sample": lambda x, hmm: (x - x.mean()) / x.std(),
    "next bar": lambda x, hmm: np.append(x[1:], 0.0),
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_the_checker_catches(fitted, cheat):
    bars, model = fitted
    columns = lambda b: CHEATS[cheat](hmm_input(b, model), model.hmm)  # noqa: E731
    assert all(leaks(columns, bars, t, t) for t in range(1000, 1500, 100))


def test_nothing_fitted_changes_when_rows_after_train_change(fitted):
    bars, _ = fitted
    seed = 1
    assert not refits(lambda b: fit_features(b, STOP, seed, screen=True), bars, STOP, seed)
    assert not refits(lambda b: fit_columns(b, NAMES, STOP), bars, STOP, seed)


def test_the_last_train_row_does_move_what_is_fitted(fitted):
    bars, model = fitted
    other = fit_features(edited(bars, STOP - 2, 0), STOP)
    assert other.state_dict() != model.state_dict()
    late = lambda b: fit_features(b, min(STOP + 1, len(b.timestamp)))  # noqa: E731
    assert refits(late, bars, STOP, 0)
