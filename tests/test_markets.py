"""Synthetic markets: bars obey their law, the optimum has its reference values; how traders are judged."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import lasso_path

from common import scoring
from common.features import Products, with_products
from common.markets import ACTIONS, Law, generate, mean_reward, optimum, optimum_path, parse_law, rouwenhorst
from runs import refusal

SIGMA = 0.006
BP = 1e-4
LONG = 200_000  # bars: standard errors of a correlation are .0022


@pytest.fixture(scope="module", params=["signal", "regime", "square", "square_regime", "noise", "drift"])
def market(request):
    law = parse_law(f"synthetic:{request.param}?bars={LONG}&seed=5")
    return law, *generate(law)


@pytest.fixture(scope="module")
def regime():
    return generate(parse_law(f"synthetic:regime?bars={LONG}&seed=7"))


def next_return(ohlcv):
    return ohlcv[1:, 3] / ohlcv[:-1, 3] - 1


def corr(x, y):
    return np.corrcoef(x, y)[0, 1]


# (1, S, P): +-1 by the sign of s, and at s = 0 the position it has
SIGN = np.repeat([[0], [10], [20]], (10, 1, 10), 0) + np.zeros((1, 1, 21), int)
SIGN[:, 10] = np.arange(21)
STAY = np.broadcast_to(np.arange(21), (1, 21, 21))


# ------------------------------------------------------------------ reference values of the optimum
@pytest.mark.parametrize("gamma", [0.95, 0.999])
@pytest.mark.parametrize("cost, best, turnover, sign", [
    (0.05, 0.07150, 0.1459, 0.07150),
    (0.20, 0.05555, 0.0716, 0.04961),
    (0.50, 0.03624, 0.0397, 0.00584),
])
def test_reference_values_of_the_signal_market(gamma, cost, best, turnover, sign):
    law = parse_law("synthetic:signal")
    reward, change = mean_reward(law, cost * SIGMA, optimum(law, cost * SIGMA, gamma))
    assert reward / SIGMA == pytest.approx(best, abs=6e-6)
    assert change == pytest.approx(turnover, abs=6e-5)
    assert mean_reward(law, cost * SIGMA, SIGN)[0] / SIGMA == pytest.approx(sign, abs=6e-6)


@pytest.mark.parametrize("name, gammas, best, change, best_blind", [
    ("regime", (0.95, 0.99, 0.999), 7.79, 0.060, 0.54), ("square_regime", (0.99,), 5.75, 0.2214, 0.16)])
def test_reference_values_of_the_markets_with_two_regimes(name, gammas, best, change, best_blind):
    law = parse_law(f"synthetic:{name}")
    for gamma in gammas:
        reward, turnover = mean_reward(law, 5 * BP, optimum(law, 5 * BP, gamma))
        assert reward / BP == pytest.approx(best, abs=0.005)
        assert turnover == pytest.approx(change, abs=0.0005)
    # a policy blind to the regime earns its mean, so its problem has one regime with that mean
    mean = 1 / 3 * 0.012 - 2 / 3 * 0.005
    blind = optimum(Law(name, ic=law.ic, phi=law.phi, sigma=(mean,), sign=(-1,)), 5 * BP)
    reward, _ = mean_reward(law, 5 * BP, np.repeat(blind, 2, axis=0))
    assert reward / BP == pytest.approx(best_blind, abs=0.005)


# --------------------------------------------------------------------------- the dynamic programme
TINY = Law("tiny", n_states=2, ic=0.3, phi=0.6, sigma=(SIGMA,))
FEW = np.array([-1.0, 0.0, 1.0])


@pytest.mark.parametrize("funding", [0.0, 0.2 * SIGMA, -0.2 * SIGMA, (0.1 * SIGMA, 0.3 * SIGMA)])
def test_optimum_beats_every_policy_of_a_tiny_market(funding, cost=0.4):
    tables = (np.array(t).reshape(1, 2, 3) for t in itertools.product(range(3), repeat=6))
    brute = max(mean_reward(TINY, cost * SIGMA, table, FEW, funding)[0] for table in tables)
    policy = optimum(TINY, cost * SIGMA, 1.0, FEW, funding)
    best = mean_reward(TINY, cost * SIGMA, policy, FEW, funding)[0]
    assert best == pytest.approx(brute, abs=1e-12)


@pytest.mark.parametrize("name, funding, held", [
    ("noise", 1e-4, -1), ("noise", -1e-4, 1), ("noise", (1e-4, 1e-4), 0), ("noise", 0.0, 0), ("drift", 0.0, 1)])
def test_funding_is_paid_by_longs_and_received_by_shorts_and_a_drift_is_held(name, funding, held):
    truth = generate(parse_law(f"synthetic:{name}?bars=500"))[2]
    assert (optimum_path(truth, 5 * BP, 100, 400, funding=funding) == held).all()
    with pytest.raises(ValueError, match="over time"):
        optimum_path(truth, 5 * BP, 0, 400, funding=np.zeros(400))


def test_ties_keep_the_position():
    for name, cost, table in (("noise", 0.0, STAY), ("signal", 0.0, SIGN), ("signal", 1.0, STAY)):
        assert (optimum(parse_law(f"synthetic:{name}"), cost) == table).all(), name


def test_the_square_market_is_blind_to_the_sign_of_its_signal():
    law = parse_law("synthetic:square")
    values, *_ = rouwenhorst(law.n_states, law.phi)
    assert (ACTIONS[optimum(law, 0.0)[0]] == np.sign(values**2 - 1)[:, None]).all()
    assert mean_reward(law, 0.0, SIGN)[0] == pytest.approx(0, abs=1e-12)


def test_path_follows_the_table_from_flat_and_earns_what_the_law_says(regime):
    truth = regime[2]
    policy = optimum(truth.law, 5 * BP)
    path = optimum_path(truth, 5 * BP, 500, 3500)
    position, walked = 10, []
    for t in range(500, 3500):
        position = policy[truth.regime[t], truth.s[t], position]
        walked.append(ACTIONS[position])
    assert path.dtype == np.float64 and path.tolist() == walked
    path = optimum_path(truth, 5 * BP, 0, LONG)
    earned = path * truth.expected - 5 * BP * np.abs(np.diff(path, prepend=0.0))
    blocks = earned.reshape(100, -1).mean(1)
    error = blocks.std() / 10
    assert earned.mean() == pytest.approx(mean_reward(truth.law, 5 * BP, policy)[0], abs=4 * error)
    assert 0 < 4 * error < 0.5 * BP


def test_generated_chains_move_by_their_law(market):
    law, _, _, truth = market
    values, rows, weights = rouwenhorst(law.n_states, law.phi)
    assert (truth.signal == values[truth.s]).all() and weights @ rows == pytest.approx(weights, abs=1e-12)
    for chain, table in ((truth.s, rows), (truth.regime, law.regime_transition)):
        moves = np.zeros_like(table)
        np.add.at(moves, (chain[:-1], chain[1:]), 1)
        count = moves.sum(1, keepdims=True)
        error = np.sqrt(table * (1 - table) * np.maximum(count, 1)) + 1
        assert (np.abs(moves - count * table) < 5 * error).all()


# ----------------------------------------------------------------------------------------- the bars
def test_returns_follow_the_expected_return(market):
    law, _, ohlcv, truth = market
    earned = next_return(ohlcv)
    sigma = np.array(law.sigma)[truth.regime[:-1]]
    shock = (earned - truth.expected[:-1]) / sigma
    assert shock.mean() == pytest.approx(0, abs=0.01)
    assert shock.std() == pytest.approx(np.sqrt(1 - law.ic**2), abs=0.007)
    for k, wanted in enumerate(law.sigma):
        assert earned[truth.regime[:-1] == k].std() == pytest.approx(wanted, rel=0.015)
    if law.ic:
        assert corr(earned / sigma, truth.expected[:-1] / sigma) == pytest.approx(law.ic, abs=0.01)
    else:
        assert truth.expected == pytest.approx(np.full(LONG, law.drift))
    assert corr(shock[1:], shock[:-1]) == pytest.approx(0, abs=0.01)


def test_a_row_foretells_the_next_bar_and_no_other(regime):
    _, ohlcv, truth = regime
    law, log_volume = truth.law, np.log(ohlcv[:, 4])
    sign = np.array(law.sign)[truth.regime[:-1]]
    shock = (next_return(ohlcv) - truth.expected[:-1]) / np.array(law.sigma)[truth.regime[:-1]]
    news = truth.signal[1:] - law.phi * truth.signal[:-1]  # what s[t+1] adds to s[t]
    noise = log_volume - log_volume.mean() - 0.5 * (truth.signal - truth.signal.mean())
    for other in (news * sign, noise[:-1], noise[1:]):
        assert corr(shock, other) == pytest.approx(0, abs=0.009)
    # volume shows the signal before it pays
    assert noise.std() == pytest.approx(0.1, abs=0.002)
    assert corr(log_volume, truth.signal) == pytest.approx(0.5 / np.hypot(0.5, 0.1), abs=0.005)


def test_high_and_low_are_bridge_extremes_of_the_bars_own_regime(regime):
    _, ohlcv, truth = regime
    opens, high, low, close, _ = ohlcv.T
    b, sigma = np.log(close / opens), np.array(truth.law.sigma)[truth.regime]
    for x, end in ((np.log(high / opens), b), (np.log(opens / low), -b)):
        u = np.exp(-2 * x * (x - end) / sigma**2)  # P(max > x) of a bridge from 0 to its end
        assert stats.kstest(u, "uniform").pvalue > 1e-3
        assert corr(u, b) == pytest.approx(0, abs=0.01)


def test_one_seed_one_market_and_fewer_bars_are_a_prefix():
    for query in ("regime?", "signal?tails=4&"):
        long, short, other = (
            generate(parse_law(f"synthetic:{query}{more}"))
            for more in ("seed=3&bars=3000", "seed=3&bars=1000", "seed=4&bars=3000"))
        for whole, part in zip((*long[:2], long[2].expected), (*short[:2], short[2].expected)):
            assert np.array_equal(whole[:1000], part)
        assert not np.array_equal(long[1], other[1])


# --------------------------------------------------------------------------------- specs and errors
def test_spec_keys_reach_the_law():
    law = parse_law("synthetic:regime?bars=500&seed=7&ic=.2&phi=.8&sigma=.004/.009&n_states=11&tails=5")
    found = (law.bars, law.seed, law.ic, law.phi, law.sigma, law.n_states, law.tails)
    assert found == (500, 7, 0.2, 0.8, (0.004, 0.009), 11, 5.0)
    assert parse_law("synthetic:drift?drift=-.001").drift == -0.001
    assert parse_law("synthetic:drift?sigma=.01").drift == pytest.approx(0.0005)


@pytest.mark.parametrize("spec, words", [
    ("regime", ["'regime'"]),
    ("synthetic:regim", ["regim'", "mean regime"]),
    ("synthetic:regime?bar=5", ["'bar'", "mean bars"]),
    ("synthetic:noise?ic=.1", ["'ic'"]),
    ("synthetic:regime?bars", ["'bars'"]),
    ("synthetic:regime?seed=1&seed=2", ["'seed'"]),
    ("synthetic:regime?seed=1.5", ["seed", "1.5"]),
    ("synthetic:signal?sigma=nan", ["sigma", "nan"]),
    ("synthetic:regime?sigma=.005", ["sigmas", "1", "2"]),
    ("synthetic:signal?ic=1.5", ["ic", "1.5", "-1", "1"]),
    ("synthetic:signal?phi=1", ["phi", "1.0", "0.99999"]),
    ("synthetic:signal?bars=63", ["bars", "63", "64"]),
    ("synthetic:drift?drift=.05", ["drift", "0.05", "0.006"]),
])
def test_bad_specs_are_refused_in_one_line(spec, words):
    refusal(ValueError, parse_law, spec, words=words)


# ---------------------------------------------------------------------------------- how it is judged
def series_of(spec):
    """A market with plain accounting: position times return, less cost times change; and its optimum's path."""
    _, ohlcv, truth = generate(parse_law(f"synthetic:{spec}"))
    ret = np.append(next_return(ohlcv), 0.0)
    n = len(ret)
    rows = {"train": (0, int(0.7 * n)), "eval": (int(0.7 * n), int(0.85 * n)), "test": (int(0.85 * n), n - 1)}

    def walk(target, a, b):
        change = np.abs(np.diff(target, prepend=0.0))
        paid = BP * change
        reward = np.log1p(target * ret[a:b] - paid)
        return reward, target * truth.expected[a:b] - paid, change, target

    return scoring.Series(np.log(ohlcv[:, 4:]), ret, rows, walk, True), optimum_path(truth, BP, 0, n)


@pytest.mark.parametrize("spec, constant", [
    ("drift?bars=20000", 1.0),
    ("drift?bars=20000&drift=-.0003", -1.0),
    *((f"noise?bars=4000&seed={seed}", 0.0) for seed in range(4)),
])
def test_the_best_constant_is_flat_unless_an_edge_is_seen(spec, constant):
    assert scoring.best_constant(series_of(spec)[0], ACTIONS) == constant


def test_nothing_is_earned_by_not_holding_a_constant_that_turned_wrong():
    """A run that held nearly nothing was called healthy: its best constant of the train rows lost on eval."""
    ret = np.repeat([-1e-3, 1e-3], 400) + 1e-4 * np.random.default_rng(0).normal(size=800)

    def walk(target, a, b):
        return target * ret[a:b], target * ret[a:b], np.abs(np.diff(target, prepend=0.0)), target

    series = scoring.Series(None, ret, {"train": (0, 400), "eval": (400, 800)}, walk, True)
    assert scoring.best_constant(series, ACTIONS) == -1
    paths = {"agent": [np.zeros(400)], "sparse_linear": [np.full(400, 0.5)], "optimum": [np.ones(400)]}
    audit = scoring.edges([series], paths, ACTIONS, 8766.0)
    found = [audit[f"{who}edge_bps"] for who in ("", "rival_", "optimum_")]
    assert found == pytest.approx([0, 5, 10], rel=0.01)


def test_standard_error_and_usual_limit():
    x = np.random.default_rng(0).normal(1.0, 2.0, 40_000)
    assert scoring.standard_error(x) == pytest.approx(2 / 200, rel=0.4)
    assert scoring.standard_error(x[:1]) == math.inf
    x[17] = 1e6  # a bad tick
    assert scoring.usual_limit(x) == pytest.approx(24, rel=0.03)
    assert scoring.usual_limit(np.zeros(9)) == math.inf


def test_path_metrics_by_hand():
    """Those that a trace does not tell (test_traces_tell_what_the_summary_says)."""
    growth, change = np.array([0.02, -0.03, 0.0, 0.01]), np.array([1.0, 0.0, 2.0, 1e-12])
    metrics, _ = scoring.path_metrics(np.log1p(growth), np.full(4, 2e-4), change, np.ones(4), 100.0)
    assert metrics["sharpe"] == pytest.approx(10 * growth.mean() / growth.std(ddof=1))
    assert metrics["max_drawdown"] == pytest.approx(-0.03) and metrics["trades"] == 2
    assert metrics["mean_expected_bps"] == pytest.approx(2.0)


@pytest.mark.parametrize("levels", [None, np.array([-1.0, 0.0, 1.0])], ids=["continuous", "levels"])
@pytest.mark.parametrize("turnover", [0.0, 0.02, 0.2, 0.6])
def test_random_path_has_the_turnover_it_is_asked_for(turnover, levels):
    path = scoring.random_path(60_000, turnover, 1, levels)
    assert np.abs(np.diff(path)).mean() == pytest.approx(turnover, rel=0.08, abs=1e-4)
    assert abs(path.mean()) < 0.25 or turnover == 0
    if levels is not None:
        assert set(path) <= set(levels)
    else:
        assert np.abs(path).max() <= 1


def test_the_sparse_rival_is_chosen_inside_the_train_rows():
    pairs = [series_of(f"signal?bars=6000&ic=.3&seed={k}")[0] for k in (0, 1)]
    paths = scoring.sparse_linear(pairs)
    edge, se = scoring.edge_over_constant(pairs, paths, "test", ACTIONS)
    assert edge > 4 * se > 0 and all(set(path) <= {-1.0, 0.0, 1.0} for path in paths)
    for s in pairs:  # what comes later says the opposite
        s.ret[s.rows["train"][1] :] *= -1
    again = scoring.sparse_linear(pairs)
    assert all(np.array_equal(a, b) for a, b in zip(paths, again))
    for spec in ("noise?bars=6000", "drift?bars=20000&drift=.002"):
        series = [series_of(spec)[0]]
        found = scoring.edge_over_constant(series, scoring.sparse_linear(series), "test", ACTIONS)
        assert found[0] < 2 * found[1] + 1e-9


def test_a_linear_forecast_is_of_all_rows_or_of_none():
    some = []
    for seed in range(8):  # weak enough that the penalty often leaves no weight, but in single folds some
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(800, 10))
        ret = 0.01 * rng.normal(size=800) + 0.0006 * x[:, 0]
        series = scoring.Series(x, ret, {"train": (0, 700)}, None, False)
        linear, out_of_fold = scoring.fit_linear(series)
        some.append(np.any(linear["weights"]))
        assert out_of_fold.any() == some[-1]
        assert not some[-1] or out_of_fold.std() == pytest.approx(1)
    assert 0 < sum(some) < 8


def test_a_lasso_of_sums_is_that_of_the_whole_table():
    """A block at a time, folds put together from sums: the same as with all columns in memory, and without them."""
    rng = np.random.default_rng(0)
    table = np.concatenate([rng.normal(size=(30_000, 50)), rng.random((30_000, 5))], 1).astype(np.float32)
    table[:, 7] = 3.0  # a constant column
    ret = 0.01 * rng.normal(size=30_000) + 0.001 * table[:, 0]
    columns = Products(table, 50)
    rows = (9, 29_000), (50, 220)
    assets = [scoring.Series(columns, ret, {"train": train}, None, False) for train in rows]
    tracemalloc.start()
    level, parts = scoring.train_sums(assets)
    scoring.fit_linear(assets[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    dense = with_products(table, 50)
    assert peak < dense.nbytes
    low, high = 9 + 28_991 // 5 - 64, 9 + 2 * 28_991 // 5 + 64  # the second fold of the first, with its gaps
    # the second asset's folds are shorter than the gap: of its 170 rows the second leaves out 34 and 64 on both sides
    second = np.r_[9:low, high:29_000], np.r_[50:50, 50 + 68 + 64 : 220]
    for sums, (a, b) in ((parts[0], (np.r_[9:29_000], np.r_[50:220])), (parts[2], second)):
        x, y = np.concatenate([dense[a], dense[b]]), np.concatenate([ret[a], ret[b]])
        x, y = x - x.mean(0), y - y.mean()
        covariance = x.T @ y / len(y)
        t = covariance / np.sqrt(((x**2).T @ y**2 / len(y) - covariance**2).clip(1e-300) / len(y))
        moves = np.arange(305) != 7
        assert scoring.marginal_t(sums)[moves] == pytest.approx(t[moves], rel=1e-8, abs=1e-9)
        penalties, center, weights = scoring.lasso_path_of(level, sums)
        z = x / (x.std(0) + 1e-9)
        path = lasso_path(z, y, alphas=penalties, precompute=z.T @ z, Xy=z.T @ y, max_iter=10_000)[1]
        assert weights * (x.std(0) + 1e-9)[:, None] == pytest.approx(path, rel=1e-6, abs=1e-12)
        assert path[0, -1] > 0 and (weights[7] == 0).all()


MOVES, STILL, OPENS = (0.1, 50, 0.5), (0.0, 0, 0.0), (1 / 400, 1, 0.5)  # turnover, trades, state_dependence


@pytest.mark.parametrize("path, agent, rival, optimum, changes, expected", [
    (MOVES, 1.0, 1.0, 1.1, {}, "healthy"),
    (MOVES, 1.0, 1.0, None, {}, "healthy"),
    (MOVES, 1.0, 1.0, 1.1, {"updates": 0}, "untrained"),
    (STILL, 0.0, 1.0, 1.1, {}, "collapsed"),
    (STILL, 0.0, 1.0, None, {}, "collapsed"),
    (OPENS, 0.0, 1.0, 1.1, {}, "collapsed"),  # the opening trade is no answer
    (STILL, 0.0, 1.0, 1.1, {"updates": 99}, "undertrained"),
    (STILL, 0.0, 1.0, 1.1, {"improving": True}, "undertrained"),
    (MOVES, 0.1, 1.0, 1.1, {}, "undertrained"),  # it moves, but earns nothing to speak of
    (MOVES, -1.0, 1.0, 1.1, {}, "undertrained"),
    (STILL, 0.0, 0.0, 0.0, {}, "constant_is_right"),
    (STILL, 0.0, 0.0, None, {}, "constant_is_right"),
    (STILL, 0.0, 0.0, None, {"error": 0.4}, "undecided"),  # an edge that matters would not show
    (STILL, 0.0, 0.0, 0.2, {}, "undecided"),  # there is one, too weak to show
    (MOVES, 0.0, 0.0, 0.0, {}, "undecided"),
    (MOVES, 0.0, 0.0, 0.0, {"matters": 0.0}, "constant_is_right"),  # a price that never moves
])
def test_verdicts(path, agent, rival, optimum, changes, expected):
    turnover, trades, dependence = path
    given = {"updates": 500, "improving": False, "matters": 0.6, "error": 0.1} | changes
    audit = {
        "state_dependence": dependence, "edge_bps": agent, "edge_se_bps": given["error"], "rival_edge_bps": rival,
        "rival_edge_se_bps": given["error"], "optimum_edge_bps": optimum, "matters_bps": given["matters"]}
    metrics = {"turnover": turnover, "exposure": 0.5, "trades": trades}
    assert scoring.verdict(audit, metrics, given["updates"], 100, 400, given["improving"])[0] == expected


def test_verdicts_of_policies_that_are_known():
    """Twelve fresh markets, four policies each: the word is right for all but 5 %."""
    right = total = 0
    edge = "healthy", "collapsed", "collapsed", "undertrained"
    nothing = "constant_is_right", "constant_is_right", "constant_is_right", "undecided"
    for market, words in (("regime?ic=.3&", edge), ("signal?ic=.3&", edge), ("noise?", nothing)):
        for seed in range(4):
            s, optimum_s = series_of(f"{market}bars=6000&seed={seed}")
            a, b = s.rows["eval"]
            best = optimum_s[a:b]
            paths = {"sparse_linear": scoring.sparse_linear([s]), "optimum": [best]}
            policies = best, np.zeros(b - a), np.full(b - a, 0.3), scoring.random_path(b - a, 0.1, seed)
            for policy, dependence, word in zip(policies, (0.5, 0.0, 0.0, 0.4), words):
                audit = scoring.edges([s], paths | {"agent": [policy]}, ACTIONS, 8766.0)
                metrics, _ = scoring.path_metrics(*s.walk(policy, a, b), 8766.0)
                found, _ = scoring.verdict(audit | {"state_dependence": dependence}, metrics, 500, 100, b - a, False)
                right += found == word
                total += 1
    assert right >= 0.95 * total
