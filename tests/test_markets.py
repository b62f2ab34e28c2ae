"""Synthetic markets: the bars obey their law, and the optimum reproduces its reference values."""
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.markets import (
    ACTIONS,
    Law,
    expected_return,
    generate,
    mean_reward,
    optimum,
    optimum_path,
    parse_law,
    rouwenhorst,
    stationary,
)

SIGMA = 0.006
BP = 1e-4
LONG = 200_000  # bars: standard errors of a correlation are .0022


@pytest.fixture(scope="module", params=["signal", "regime", "noise", "drift"])
def market(request):
    law = parse_law(f"synthetic:{request.param}?bars={LONG}&seed=5")
    return law, *generate(law)


@pytest.fixture(scope="module")
def signal():
    return generate(parse_law(f"synthetic:signal?bars={LONG}&seed=6"))


@pytest.fixture(scope="module")
def regime():
    return generate(parse_law(f"synthetic:regime?bars={LONG}&seed=7"))


def next_return(ohlcv):
    return ohlcv[1:, 3] / ohlcv[:-1, 3] - 1


def corr(x, y):
    return np.corrcoef(x, y)[0, 1]


def one_regime(ic=0.1, phi=0.9, n_states=21):
    return Law("signal", ic=ic, phi=phi, n_states=n_states, sigma=(SIGMA,))


def sign_policy(n_states=21):
    """(1, S, P): +-1 by the sign of s, and at s = 0 the position it has."""
    side = np.sign(np.arange(n_states) - (n_states - 1) / 2).astype(int)
    return np.where(side[:, None] == 0, np.arange(21), 10 + 10 * side[:, None])[None]


# ---------------------------------------------------------------- reference values of the optimum
@pytest.mark.parametrize("gamma", [0.95, 0.99, 0.999])
@pytest.mark.parametrize(
    "cost, best, turnover, sign",
    [(0.05, 0.07150, 0.1459, 0.07150), (0.20, 0.05555, 0.0716, 0.04961), (0.50, 0.03624, 0.0397, 0.00584)],
)
def test_reference_values_of_the_signal_market(gamma, cost, best, turnover, sign):
    law = one_regime()
    reward, change = mean_reward(law, cost * SIGMA, optimum(law, cost * SIGMA, gamma))
    assert reward / SIGMA == pytest.approx(best, abs=6e-6)
    assert change == pytest.approx(turnover, abs=6e-5)
    assert mean_reward(law, cost * SIGMA, sign_policy())[0] / SIGMA == pytest.approx(sign, abs=6e-6)


@pytest.mark.parametrize("gamma", [0.95, 0.99, 0.999])
def test_reference_values_of_the_regime_market(gamma):
    law = parse_law("synthetic:regime")
    reward, turnover = mean_reward(law, 5 * BP, optimum(law, 5 * BP, gamma))
    assert reward / BP == pytest.approx(7.79, abs=0.005)
    assert turnover == pytest.approx(0.060, abs=0.0005)


def test_best_policy_blind_to_the_regime():
    law = parse_law("synthetic:regime")
    weights = stationary(law.regime_transition)
    assert weights == pytest.approx([2 / 3, 1 / 3], abs=1e-12)
    # a policy that cannot see the regime earns its mean, so its own problem has one regime with that mean
    mean = float(weights @ np.multiply(law.sigma, law.sign))
    assert mean == pytest.approx(2 / 3 * 0.005 - 1 / 3 * 0.012)
    blind = optimum(Law("blind", ic=law.ic, phi=law.phi, sigma=(-mean,), sign=(-1,)), 5 * BP)
    reward, _ = mean_reward(law, 5 * BP, np.repeat(blind, 2, axis=0))
    assert reward / BP == pytest.approx(0.54, abs=0.005)


def test_two_state_drift_regime_oracle():
    law = one_regime(ic=0.2, phi=1 - 2 / 200, n_states=2)  # mean length 200: leaves with probability 1/200
    reward, turnover = mean_reward(law, 0.05 * SIGMA, optimum(law, 0.05 * SIGMA))
    assert reward / SIGMA == pytest.approx(0.2 - 0.05 * 2 / 200, abs=1e-9)
    assert turnover == pytest.approx(2 / 200, abs=1e-9)


@pytest.mark.parametrize("cost", [0.05, 0.5])
def test_holding_earns_nothing_and_random_actions_pay(cost):
    law = one_regime()
    hold = np.broadcast_to(np.arange(21), (1, 21, 21))
    assert mean_reward(law, cost * SIGMA, hold) == (0, 0)
    random = np.full((1, 21, 21, 21), 1 / 21)
    reward, turnover = mean_reward(law, cost * SIGMA, random)
    assert reward / SIGMA == pytest.approx(-0.698 * cost, abs=5e-4 * cost)
    assert turnover == pytest.approx(440 / 63 / 10, abs=1e-9)  # (n^2 - 1)/(3 n) steps of .1
    fine = np.linspace(-1, 1, 401)  # towards a continuous uniform
    law = one_regime(n_states=2)
    reward, _ = mean_reward(law, cost * SIGMA, np.full((1, 2, 401, 401), 1 / 401), fine)
    assert reward / SIGMA == pytest.approx(-2 * cost / 3, rel=5e-3)


def test_a_policy_that_alternates_has_a_mean():
    flip = np.broadcast_to(np.where(np.arange(21) == 20, 0, 20), (1, 21, 21))  # -1 to +1 and back, every bar
    reward, turnover = mean_reward(one_regime(), 5 * BP, flip)
    assert turnover == pytest.approx(2, abs=1e-9) and reward == pytest.approx(-10 * BP, abs=1e-12)


def test_threshold_of_the_constant_trap():
    """Above c = IC E[s; s >= k] / (2 P(s >= k, s' < k)) every threshold policy without memory loses."""
    values, rows, weights = rouwenhorst(21, 0.9)
    states = np.arange(21)

    def threshold(k):
        up = states >= k
        return 0.1 * (weights * values)[up].sum() / (2 * weights[up] @ rows[np.ix_(up, ~up)].sum(1))

    c = max(threshold(k) for k in range(1, 21))
    assert c == pytest.approx(0.349, abs=5e-4)

    def best_step(cost):  # +1 from state k on, else 0
        steps = (np.where(states >= k, 20, 10) for k in range(1, 21))
        tables = (np.broadcast_to(step[:, None], (1, 21, 21)) for step in steps)
        return max(mean_reward(one_regime(), cost * SIGMA, table)[0] for table in tables)

    assert best_step(0.999 * c) > 0 > best_step(1.001 * c)
    dear = 1.2 * c * SIGMA
    assert mean_reward(one_regime(), dear, optimum(one_regime(), dear))[0] > 0.03 * SIGMA  # memory escapes


# ---------------------------------------------------------------- the dynamic programme
@pytest.mark.parametrize("cost", [0.0, 0.1, 0.4, 3.0])
def test_optimum_beats_every_policy_of_a_tiny_market(cost):
    law = Law("tiny", n_states=2, ic=0.3, phi=0.6, sigma=(SIGMA,))
    actions = np.array([-1.0, 0.0, 1.0])
    tables = (np.array(t).reshape(1, 2, 3) for t in itertools.product(range(3), repeat=6))
    brute = max(mean_reward(law, cost * SIGMA, table, actions)[0] for table in tables)
    best = mean_reward(law, cost * SIGMA, optimum(law, cost * SIGMA, 1.0, actions), actions)[0]
    assert best == pytest.approx(brute, abs=1e-12)


def test_ties_keep_the_position():
    stay = np.broadcast_to(np.arange(21), (1, 21, 21))
    noise = parse_law("synthetic:noise")
    for cost in (0.0, 5 * BP):
        assert (optimum(noise, cost) == stay).all()
    free = optimum(parse_law("synthetic:signal"), 0.0)
    assert (free == sign_policy()).all()
    assert (optimum(parse_law("synthetic:signal"), 1.0) == stay).all()  # too dear to move at all


def test_right_answers_of_noise_and_drift():
    drift = parse_law("synthetic:drift")
    assert expected_return(drift) == pytest.approx(0.05 * SIGMA)
    assert (optimum(drift, 5 * BP) == 20).all()
    _, _, truth = generate(drift)
    assert (optimum_path(truth, 5 * BP, 100, 3000) == 1).all()
    _, _, truth = generate(parse_law("synthetic:noise"))
    assert (optimum_path(truth, 5 * BP, 100, 3000) == 0).all()


def test_path_follows_the_table_from_flat(regime):
    truth = regime[2]
    policy = optimum(truth.law, 5 * BP)
    path = optimum_path(truth, 5 * BP, 500, 3500)
    assert path.shape == (3000,) and path.dtype == np.float64
    position, walked = 10, []
    for t in range(500, 3500):
        position = policy[truth.regime[t], truth.s[t], position]
        walked.append(ACTIONS[position])
    assert path.tolist() == walked
    again = optimum_path(truth, 5 * BP, 500, 1500)
    assert (again == path[:1000]).all()


def test_path_earns_what_the_stationary_law_says(regime):
    truth = regime[2]
    path = optimum_path(truth, 5 * BP, 0, LONG)
    earned = path * truth.expected - 5 * BP * np.abs(np.diff(path, prepend=0.0))
    blocks = earned.reshape(100, -1).mean(1)
    reward, _ = mean_reward(truth.law, 5 * BP, optimum(truth.law, 5 * BP))
    assert earned.mean() == pytest.approx(reward, abs=4 * blocks.std() / 10)
    assert 0 < 4 * blocks.std() / 10 < 0.5 * BP


def test_cache_is_read_and_keyed_by_every_input(tmp_path):
    law = parse_law("synthetic:signal")
    first = optimum(law, 5 * BP, cache_dir=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    assert (first == optimum(law, 5 * BP)).all()
    marked = np.zeros_like(first)
    np.savez(file, policy=marked)
    assert (optimum(law, 5 * BP, cache_dir=tmp_path / "cache") == marked).all()  # read, not solved
    assert optimum_path(generate(law)[2], 5 * BP, 0, 9, cache_dir=tmp_path / "cache").tolist() == [-1] * 9
    file.write_bytes(file.read_bytes()[:50])
    assert (optimum(law, 5 * BP, cache_dir=tmp_path / "cache") == first).all()  # cut short: solved again
    keys = ("ic=.11", "phi=.91", "sigma=.007", "n_states=5")
    others = [f"signal?{key}" for key in keys] + ["drift", "noise", "regime"]
    for other in others:
        optimum(parse_law(f"synthetic:{other}"), 5 * BP, cache_dir=tmp_path / "cache")
    optimum(law, 6 * BP, cache_dir=tmp_path / "cache")
    optimum(law, 5 * BP, 0.95, cache_dir=tmp_path / "cache")
    optimum(law, 5 * BP, actions=np.linspace(-1, 1, 5), cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == len(others) + 4
    optimum(parse_law("synthetic:signal?seed=9&bars=500"), 5 * BP, cache_dir=tmp_path / "cache")  # same chain
    assert len(list((tmp_path / "cache").iterdir())) == len(others) + 4
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} == {".npz"}


# ---------------------------------------------------------------- the chains
@pytest.mark.parametrize("n_states, phi", [(2, 0.5), (3, 0.9), (21, 0.9), (21, 0.97), (20, -0.3)])
def test_rouwenhorst_moments_are_exact(n_states, phi):
    values, rows, weights = rouwenhorst(n_states, phi)
    assert rows.min() >= 0 and rows.sum(1) == pytest.approx(np.ones(n_states), abs=1e-12)
    assert weights @ rows == pytest.approx(weights, abs=1e-12)
    assert stationary(rows) == pytest.approx(weights, abs=1e-10)
    assert weights @ values == pytest.approx(0, abs=1e-12)
    assert weights @ values**2 == pytest.approx(1, abs=1e-12)
    assert rows @ values == pytest.approx(phi * values, abs=1e-12)  # hence the autocorrelation at every lag


def test_generated_chains_move_by_their_law(market):
    law, _, _, truth = market
    values, rows, _ = rouwenhorst(law.n_states, law.phi)
    assert (truth.signal == values[truth.s]).all()
    assert corr(truth.signal[1:], truth.signal[:-1]) == pytest.approx(law.phi, abs=0.005)
    assert corr(truth.signal[5:], truth.signal[:-5]) == pytest.approx(law.phi**5, abs=0.02)
    assert truth.signal.mean() == pytest.approx(0, abs=0.08)
    assert truth.signal.std() == pytest.approx(1, abs=0.05)
    for chain, table in ((truth.s, rows), (truth.regime, law.regime_transition)):
        seen = np.zeros_like(table)
        np.add.at(seen, (chain[:-1], chain[1:]), 1)
        count = seen.sum(1, keepdims=True)
        error = np.sqrt(table * (1 - table) * np.maximum(count, 1)) + 1
        assert (np.abs(seen - count * table) < 5 * error).all()
    share = np.bincount(truth.regime, minlength=len(law.sigma)) / LONG
    assert share == pytest.approx(stationary(law.regime_transition), abs=0.05)


def test_the_first_bar_is_drawn_from_the_stationary_law():
    starts = [generate(parse_law(f"synthetic:regime?bars=64&seed={k}"))[2] for k in range(1000)]
    signal, storm = np.array([(t.signal[0], t.regime[0]) for t in starts]).T
    assert signal.mean() == pytest.approx(0, abs=0.13) and signal.std() == pytest.approx(1, abs=0.1)
    assert storm.mean() == pytest.approx(1 / 3, abs=0.06)


# ---------------------------------------------------------------- the bars
def test_bars_are_consistent(market):
    _, timestamps, ohlcv, truth = market
    opens, high, low, close, _ = ohlcv.T
    assert timestamps.dtype == "datetime64[ns]" and timestamps.shape == (LONG,)
    assert (np.diff(timestamps) == np.timedelta64(1, "h")).all()
    assert ohlcv.dtype == np.float64 and np.isfinite(ohlcv).all() and (ohlcv > 0).all()
    assert (high >= np.maximum(opens, close)).all() and (low <= np.minimum(opens, close)).all()
    assert (opens[1:] == close[:-1]).all()
    assert high[0] > low[0]  # bar 0 has a range too
    assert truth.s.dtype == truth.regime.dtype == np.int64
    assert [len(x) for x in (truth.s, truth.signal, truth.regime, truth.expected)] == [LONG] * 4


def test_default_market():
    law = parse_law("synthetic:regime")
    timestamps, ohlcv, _ = generate(law)
    assert (law.bars, law.seed, law.ic, law.phi, law.n_states) == (20_000, 0, 0.14, 0.97, 21)
    assert law.sigma == (0.005, 0.012) and law.sign == (1, -1)
    assert law.regime_transition.tolist() == [[0.995, 0.005], [0.010, 0.990]]
    assert ohlcv.shape == (20_000, 5) and str(timestamps[0]) == "2019-01-01T00:00:00.000000000"
    signal = parse_law("synthetic:signal")
    assert (signal.ic, signal.phi, signal.sigma) == (0.1, 0.9, (0.006,))


def test_returns_follow_the_expected_return(market):
    law, _, ohlcv, truth = market
    earned = next_return(ohlcv)
    sigma = np.array(law.sigma)[truth.regime[:-1]]
    shock = (earned - truth.expected[:-1]) / sigma
    assert shock.mean() == pytest.approx(0, abs=0.01)
    assert shock.std() == pytest.approx(np.sqrt(1 - law.ic**2), abs=0.007)
    for k, wanted in enumerate(law.sigma):  # sd of the next return in each regime: the one of the regime
        assert earned[truth.regime[:-1] == k].std() == pytest.approx(wanted, rel=0.015)
    if law.ic:
        assert corr(earned / sigma, truth.expected[:-1] / sigma) == pytest.approx(law.ic, abs=0.01)
    else:
        assert truth.expected == pytest.approx(np.full(LONG, law.drift))
    assert corr(shock[1:], shock[:-1]) == pytest.approx(0, abs=0.01)


def test_a_row_foretells_the_next_bar_and_no_other(regime):
    _, ohlcv, truth = regime
    earned, law = next_return(ohlcv), truth.law
    shock = (earned - truth.expected[:-1]) / np.array(law.sigma)[truth.regime[:-1]]
    news = truth.signal[1:] - law.phi * truth.signal[:-1]  # what s[t+1] adds to s[t]
    assert corr(shock, news * np.array(law.sign)[truth.regime[:-1]]) == pytest.approx(0, abs=0.009)
    volume_noise = np.log(ohlcv[:, 4]) - 0.5 * truth.signal
    assert corr(shock, volume_noise[:-1]) == pytest.approx(0, abs=0.009)
    assert corr(shock, volume_noise[1:]) == pytest.approx(0, abs=0.009)
    # the bar that shows a new regime still has the old one's return
    switch = truth.regime[1:] != truth.regime[:-1]
    assert shock[switch].std() == pytest.approx(1, abs=0.1)


def test_volume_shows_the_signal_before_it_pays(signal):
    _, ohlcv, truth = signal
    log_volume = np.log(ohlcv[:, 4])
    noise = log_volume - log_volume.mean() - 0.5 * (truth.signal - truth.signal.mean())
    assert noise.std() == pytest.approx(0.1, abs=0.002)
    shown = 0.5 / np.hypot(0.5, 0.1)
    assert corr(log_volume, truth.signal) == pytest.approx(shown, abs=0.005)
    assert corr(log_volume[:-1], next_return(ohlcv)) == pytest.approx(0.1 * shown, abs=0.01)


def test_high_and_low_are_bridge_extremes_of_the_bars_own_regime(regime):
    _, ohlcv, truth = regime
    opens, high, low, close, _ = ohlcv.T
    b, sigma = np.log(close / opens), np.array(truth.law.sigma)[truth.regime]
    up, down = np.log(high / opens), -np.log(low / opens)
    u_high = np.exp(-2 * up * (up - b) / sigma**2)  # P(max > h) of a bridge from 0 to b
    u_low = np.exp(-2 * down * (down + b) / sigma**2)
    grid = (np.arange(LONG) + 0.5) / LONG
    for u in (u_high, u_low):
        assert np.abs(np.sort(u) - grid).max() < 2 / np.sqrt(LONG)  # Kolmogorov-Smirnov
        assert corr(u, b) == pytest.approx(0, abs=0.01)
        for new in (0, 1):  # the first bar of a regime already has its range
            first = 1 + np.flatnonzero(np.diff(truth.regime) == 2 * new - 1)
            assert u[first].mean() == pytest.approx(0.5, abs=0.05)
    assert corr(u_high, u_low) == pytest.approx(0, abs=0.01)
    span = np.log(high / low)
    assert span[truth.regime == 1].mean() > 1.8 * span[truth.regime == 0].mean()


def test_fat_tails_have_unit_variance():
    law = parse_law(f"synthetic:signal?bars={LONG}&tails=6")
    _, ohlcv, truth = generate(law)
    shock = (next_return(ohlcv) - truth.expected[:-1]) / (SIGMA * np.sqrt(1 - law.ic**2))
    assert shock.std() == pytest.approx(1, abs=0.015)
    for quantile, beyond in ((2.4469, 0.05), (3.7074, 0.01), (5.9588, 0.001)):  # of Student's t with nu 6
        share = (np.abs(shock) > quantile * np.sqrt(4 / 6)).mean()
        assert share == pytest.approx(beyond, abs=4 * np.sqrt(beyond / LONG))
    wild = next_return(generate(parse_law("synthetic:signal?bars=50000&tails=2.05&sigma=.1&seed=3"))[1])
    assert wild.min() >= -0.95 - 1e-9


def test_one_seed_one_market():
    spec = "synthetic:regime?bars=3000&seed="
    first, same, other = (generate(parse_law(spec + seed)) for seed in ("3", "3", "4"))
    assert first[1].tobytes() == same[1].tobytes() and first[2].s.tobytes() == same[2].s.tobytes()
    assert first[1].tobytes() != other[1].tobytes() and first[2].s.tobytes() != other[2].s.tobytes()


@pytest.mark.parametrize("query", ["regime?seed=3", "signal?seed=3&tails=4"])
def test_fewer_bars_are_a_prefix(query):
    timestamps, ohlcv, truth = generate(parse_law(f"synthetic:{query}&bars=5000"))
    short_timestamps, short, short_truth = generate(parse_law(f"synthetic:{query}&bars=1000"))
    assert (short_timestamps == timestamps[:1000]).all()
    assert short.tobytes() == ohlcv[:1000].tobytes()
    assert short_truth.expected.tobytes() == truth.expected[:1000].tobytes()


# ---------------------------------------------------------------- specs and errors
def test_spec_keys_reach_the_law():
    law = parse_law("synthetic:regime?bars=500&seed=7&ic=.2&phi=.8&sigma=.004/.009&n_states=11&tails=5")
    found = (law.bars, law.seed, law.ic, law.phi, law.sigma, law.n_states, law.tails)
    assert found == (500, 7, 0.2, 0.8, (0.004, 0.009), 11, 5.0)
    assert parse_law("synthetic:drift?drift=-.001").drift == -0.001
    assert parse_law("synthetic:drift?sigma=.01").drift == pytest.approx(0.0005)


@pytest.mark.parametrize(
    "spec, words",
    [
        ("regime", ["'regime'", "synthetic:NAME"]),
        ("synthetic:regim", ["regim'", "did you mean regime"]),
        ("synthetic:", ["unknown market ''", "regime, signal, noise, drift"]),
        ("synthetic:regime?bar=5", ["'bar'", "did you mean bars"]),
        ("synthetic:regime?zzz=5", ["'zzz'", "bars, seed, n_states, phi, sigma, tails, ic"]),
        ("synthetic:noise?ic=.1", ["'ic'"]),
        ("synthetic:signal?drift=.1", ["'drift'"]),
        ("synthetic:regime?bars", ["'bars'", "key=value"]),
        ("synthetic:regime?seed=1&seed=2", ["'seed'", "twice"]),
        ("synthetic:regime?seed=1.5", ["seed", "1.5", "whole number"]),
        ("synthetic:regime?phi=high", ["phi", "high", "number"]),
        ("synthetic:signal?sigma=-.01", ["sigma", "-0.01", "above 0"]),
        ("synthetic:signal?sigma=nan", ["sigma", "nan"]),
        ("synthetic:signal?sigma=.2", ["sigma", "0.2", "0.1"]),
        ("synthetic:regime?sigma=.005", ["sigmas", "1", "2"]),
        ("synthetic:signal?sigma=.005/.01", ["sigmas", "2", "1"]),
        ("synthetic:signal?ic=1.5", ["ic", "1.5", "-1 to 1"]),
        ("synthetic:signal?ic=nan", ["ic", "nan"]),
        ("synthetic:signal?phi=1", ["phi", "1.0", "below 1"]),
        ("synthetic:signal?n_states=1", ["n_states", "1", "2"]),
        ("synthetic:signal?bars=63", ["bars", "63", "64"]),
        ("synthetic:signal?bars=3000000", ["bars", "3000000", "2000000"]),
        ("synthetic:signal?seed=-1", ["seed", "-1", "0"]),
        ("synthetic:signal?tails=2", ["tails", "2.0", "above 2"]),
        ("synthetic:drift?drift=.05", ["drift", "0.05", "0.006"]),
    ],
)
def test_bad_specs_are_refused_in_one_line(spec, words):
    with pytest.raises(ValueError) as error:
        parse_law(spec)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_bad_arguments_are_refused():
    law = parse_law("synthetic:signal?bars=500")
    truth = generate(law)[2]
    for call, words in (
        (lambda: optimum(law, -1e-4), "cost is -0.0001"),
        (lambda: optimum(law, float("nan")), "cost is nan"),
        (lambda: optimum(law, 1e-4, 1.01), "gamma is 1.01"),
        (lambda: optimum(law, 1e-4, actions=[1.0, 0.0]), "increasing"),
        (lambda: optimum_path(truth, 1e-4, 400, 501), r"\[400, 501\).*500 bars"),
        (lambda: optimum_path(truth, 1e-4, 400, 400), r"\[400, 400\)"),
        (lambda: optimum_path(truth, 1e-4, 0, 10, actions=[-1.0, 0.5]), "nearest is 0.5"),
        (lambda: mean_reward(law, 1e-4, np.zeros((1, 21, 20), int)), r"\(1, 21, 20\)"),
        (lambda: Law("x", sign=(1, 1), sigma=(0.01, 0.01)), "regime_transition"),
        (lambda: generate(parse_law("synthetic:drift?bars=200000&sigma=.1&drift=.1")), "the price leaves"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
