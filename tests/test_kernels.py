"""The market kernels: one lane's arithmetic, its random numbers, and the same lane on threads and on CUDA."""

import math
import types

import numba as nb
import numpy as np
import pytest

from cleanrl_crypto import tqc_film_batch as tqc
from runs import assert_compiles_for_a_gpu, run_code

MASK = 2**64 - 1
MODES = pytest.mark.parametrize("drift", [False, True], ids=["rebalance", "drift"])


# --------------------------------------------------------------------------------------------------- oracles
def trade(position, target, ret, cost, funding, drift):
    """The same decision on a balance sheet: equity 1 before it, a holding, cash, and a fee on what is traded."""
    if drift:
        traded = 0.0
        for _ in range(200):  # holding / equity left = target, by a contraction of factor cost |target|
            traded = target * (1.0 - cost * abs(traded)) - position
        fee = cost * abs(traded)
        holding, left = position + traded, 1.0 - fee
        assert holding == pytest.approx(target * left, abs=1e-14)
    else:
        fee = cost * abs(target - position)
        left = 1.0 - fee
        holding = target * left
    carry = funding * max(-target, 0.0) * left
    equity = max(left - holding + holding * (1.0 + ret) - carry, tqc.RUIN * left)
    return equity, fee, holding * (1.0 + ret) / equity if drift else target


def uniform(seed, lane, episode, draw):
    """splitmix64's finaliser over the counters, in Python's integers."""
    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
        x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
        return x ^ x >> 31

    seed, lane, episode, draw = map(int, (seed, lane, episode, draw))
    x = mix(seed * 0x9E3779B97F4A7C15 + lane & MASK)
    return (mix(x + episode * 0xD1342543DE82EF95 + draw & MASK) >> 11) / 2**53


def episode(seed, lane, number, start, stop, w_max, cost, spread):
    row = start + int(uniform(seed, lane, number, 0) * (stop - start))
    w = w_max * min(max((uniform(seed, lane, number, 1) - 0.2) / 0.6, 0.0), 1.0)
    return row, w, cost * (1.0 + spread * (2.0 * uniform(seed, lane, number, 2) - 1.0))


def in_python(function, **names):
    """The function's own code, uncompiled, calling `names` in place of compiled functions."""
    return types.FunctionType(function.__code__, function.__globals__ | names)


def source(kernel):
    return getattr(kernel, "py_func", kernel)  # NUMBA_DISABLE_JIT=1 leaves the function itself


lane_in_python = in_python(
    tqc.lane_py, trade_nb=source(tqc.trade_nb), episode_nb=in_python(source(tqc.episode_nb), uniform_nb=uniform))

START, STOP, LENGTH, SEED, LANES = 20, 280, 17, 5, 37


def rules(drift, cost=8e-4, funding=2e-4, penalty=7e-4, w_max=0.9, cost_randomization=0.4):
    return np.array([cost, funding, float(drift), penalty, w_max, cost_randomization])


def returns(rows=300):
    """Bars with three more than doublings, which ruin a short."""
    ret = np.random.default_rng(0).normal(0.0, 0.02, rows)
    ret[[60, 130, 200]] = 1.2, 1.0, 3.0
    return ret


def fresh(law, n=LANES):
    """State arrays of n lanes in their first episode, and the outputs, as the environment keeps them."""
    ints, floats = np.zeros((3, n), np.int64), np.zeros((6, n))
    floats[3] = 1.0
    for i in range(n):
        ints[0, i], floats[1, i], floats[2, i] = episode(SEED, i, 0, START, STOP, law[4], law[0], law[5])
    ints[1] = np.arange(n) % LENGTH  # staggered: some lane ends at every step
    return [ints, floats, np.zeros(n), np.zeros((2, n), np.bool_), np.zeros((3, n), np.int64), np.zeros((6, n))]


def actions(steps, n=LANES):
    a = np.random.default_rng(1).uniform(-1.3, 1.3, (steps, n))  # the lane clips them
    a[:, ::5] = np.round(a[:, ::5])  # corners, and no change at all
    return a


# -------------------------------------------------------------------------------------------------- one trade
@MODES
def test_a_trade_is_the_balance_sheet_s(drift):
    rng = np.random.default_rng(3)
    for k in range(2000):
        position, target = rng.uniform(-1.5, 1.5), rng.uniform(-1, 1)
        if k % 4 == 0:
            position, target = rng.choice([-1.0, -0.5, 0.0, 0.5, 1.0], 2)
        args = position, target, rng.normal(0, 0.1), rng.choice([0, 5e-4, 0.05, 0.2]), rng.choice([0, 1e-4]), drift
        assert tqc.trade_nb(*args) == pytest.approx(trade(*args), rel=1e-13, abs=1e-15), args


def test_rebalanced_growth_is_the_published_formula():
    for p, a, r, c, f in [(0, 1, 0.01, 5e-4, 1e-4), (0.3, -0.7, -0.02, 1e-3, 1e-4), (-1, 1, 0.05, 5e-4, 0)]:
        growth, fee, after = tqc.trade_nb(float(p), float(a), r, c, float(f), False)
        assert math.log(growth) == pytest.approx(
            math.log((1 - c * abs(a - p)) * (1 + a * r - (f if a < 0 else 0) * abs(a))), rel=1e-13)
        assert fee == pytest.approx(c * abs(a - p), rel=1e-15) and after == a


def test_a_drifting_trade_leaves_the_target_and_then_moves_with_the_price():
    cases = [(0.0, 1.0, 0.01, 5e-4), (0.9, 0.2, -0.03, 0.05), (-0.4, -1.0, 0.02, 0.01), (-1.0, 0.6, 0.1, 0.2)]
    for p, a, r, c in cases:
        growth, fee, after = tqc.trade_nb(p, a, r, c, 0.0, True)
        traded = math.copysign(fee / c, a - p)
        assert (p + traded) / (1.0 - fee) == pytest.approx(a, rel=1e-13)  # of equity AFTER the fee
        assert after == pytest.approx(a * (1 + r) / (1 + a * r), rel=1e-13)
        assert growth == pytest.approx((1 - fee) * (1 + a * r), rel=1e-13)
    # all in from flat: cash pays the fee too, so less than 1 is bought
    assert tqc.trade_nb(0.0, 1.0, 0.0, 0.05, 0.0, True)[1] == pytest.approx(0.05 / 1.05, rel=1e-15)


@MODES
def test_holding_is_free_and_a_full_short_pays_funding(drift):
    for a in (-1.0, -0.3, 0.0, 0.4, 1.0):
        assert tqc.trade_nb(a, a, 0.0, 0.1, 0.0, drift) == (1.0, 0.0, a)
    assert tqc.trade_nb(-1.0, -1.0, 0.0, 0.1, 1e-3, drift)[0] == 1.0 - 1e-3
    assert tqc.trade_nb(-0.5, -0.5, 0.0, 0.1, 1e-3, drift)[0] == 1.0 - 5e-4
    assert tqc.trade_nb(1.0, 1.0, 0.0, 0.1, 1e-3, drift)[0] == 1.0


@MODES
def test_ruin_is_a_floor_under_the_bar_s_growth(drift):
    for r in (1.0, 1.0 - 1e-7, 1.5, 50.0):
        assert tqc.trade_nb(-1.0, -1.0, r, 5e-4, 0.0, drift)[0] == tqc.RUIN
        growth, fee, _ = tqc.trade_nb(0.5, -1.0, r, 5e-4, 0.0, drift)
        assert fee > 0 and (1.0 - fee) * tqc.RUIN <= growth <= tqc.RUIN
    assert tqc.trade_nb(-1.0, -1.0, 1.0 - 2e-6, 5e-4, 0.0, drift)[0] == pytest.approx(2e-6, rel=1e-9)
    assert tqc.trade_nb(1.0, 1.0, -0.99, 5e-4, 0.0, drift)[0] == pytest.approx(0.01, rel=1e-12)


# --------------------------------------------------------------------------------------------- random numbers
@nb.njit(parallel=True)
def fill(seed, out):
    lanes, episodes, draws = out.shape
    for i in nb.prange(lanes):
        for e in range(episodes):
            for d in range(draws):
                out[i, e, d] = tqc.uniform_nb(seed, i, e, d)


@pytest.fixture(scope="module")
def uniforms():
    """(seeds, lanes, episodes, draws)."""
    out = np.empty((3, 512, 64, 3))
    for k in range(3):
        fill(k + 1, out[k])
    return out


def test_uniforms_are_counter_based_whatever_the_threads(uniforms):
    assert tqc.uniform_nb(1, 2, 3, 0) == tqc.uniform_nb(1, 2, 3, 0)
    for seed, lane, number, draw in [(1, 0, 0, 0), (1, 511, 63, 2), (3, 7, 1, 1), (2**31, 10**6, 10**9, 2)]:
        assert tqc.uniform_nb(seed, lane, number, draw) == uniform(seed, lane, number, draw)
    for k, lane, number, draw in np.random.default_rng(0).integers(0, uniforms.shape, (200, 4)):
        assert uniforms[k, lane, number, draw] == uniform(k + 1, lane, number, draw)
    out = np.empty(uniforms.shape[1:])
    before = nb.get_num_threads()
    try:
        for threads in range(1, min(2, nb.config.NUMBA_NUM_THREADS) + 1):
            nb.set_num_threads(threads)
            fill(2, out)
            assert (out == uniforms[1]).all()
    finally:
        nb.set_num_threads(before)


def test_uniforms_are_uniform_independent_and_never_repeat(uniforms):
    u, n = uniforms.ravel(), uniforms.size
    assert u.min() >= 0.0 and u.max() < 1.0
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * n)
    assert abs(u.var() - 1 / 12) < 5 / math.sqrt(180 * n)
    assert np.unique(u).size == n  # 53 bits: any collision is a correlation between lanes, episodes, draws or seeds
    for axis in range(4):
        a, b = (np.moveaxis(uniforms, axis, 0)[s].ravel() for s in (slice(None, -1), slice(1, None)))
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(a.size), f"neighbours along axis {axis}"
        cells = np.histogram2d(a, b, bins=16, range=[(0, 1), (0, 1)])[0]
        chi2 = ((cells - a.size / 256) ** 2).sum() / (a.size / 256)
        assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255), f"pairs along axis {axis}"


def test_an_episode_s_row_w_cost_and_cost():
    draws = np.array([tqc.episode_nb(SEED, i, e, 77, 91, 0.5, 1e-3, 0.4) for i in range(200) for e in range(100)])
    row, w, cost = draws.T
    n = len(draws)
    seen, counts = np.unique(row, return_counts=True)
    assert seen.tolist() == list(range(77, 91))  # both ends, never `stop`
    assert ((counts - n / 14) ** 2).sum() / (n / 14) < 13 + 5 * math.sqrt(26)
    tolerance = 5 * math.sqrt(0.16 / n)
    assert abs((w == 0.0).mean() - 0.2) < tolerance and abs((w == 0.5).mean() - 0.2) < tolerance
    rest = np.sort(w[(w > 0) & (w < 0.5)]) / 0.5
    assert np.abs(rest - (np.arange(rest.size) + 0.5) / rest.size).max() < 2 / math.sqrt(rest.size)
    assert w.min() == 0.0 and w.max() == 0.5
    assert 0.6e-3 <= cost.min() < 0.601e-3 and 1.399e-3 < cost.max() <= 1.4e-3
    assert abs(cost.mean() - 1e-3) < 5 * 0.4e-3 / math.sqrt(3 * n)
    assert np.abs(np.corrcoef(draws.T) - np.eye(3)).max() < 5 / math.sqrt(n)


def test_an_episode_is_a_function_of_its_counters():
    for lane, number in [(0, 0), (3, 8), (1023, 4000)]:
        got = tqc.episode_nb(SEED, lane, number, 77, 9100, 0.8, 1e-3, 0.4)
        assert got == pytest.approx(episode(SEED, lane, number, 77, 9100, 0.8, 1e-3, 0.4), rel=1e-15)
    for lane in range(50):
        row, w, cost = tqc.episode_nb(SEED, lane, 0, 5, 6, 0.0, 1e-3, 0.0)
        assert (row, w, cost) == (5, 0.0, 1e-3)


# -------------------------------------------------------------------------------------------------- one step
@MODES
def test_step_is_the_same_lane_in_python_bit_for_bit(drift):
    law, ret = rules(drift), returns()
    compiled, python = fresh(law), fresh(law)
    ends = np.zeros(2)
    for action in actions(400):
        tqc.step_cpu(action, ret, START, STOP, LENGTH, law, SEED, *compiled)
        for i in range(LANES):
            lane_in_python(i, action, ret, START, STOP, LENGTH, law, SEED, *python)
        for a, b in zip(compiled, python):
            np.testing.assert_array_equal(a, b)
        ends += compiled[3].sum(1)
    assert ends[0] > 5 and ends[1] > 500 and compiled[0][2].min() > 10  # ruins, truncations, episodes of every lane


@MODES
def test_step_is_an_independent_account_of_the_lane(drift):
    law, ret = rules(drift), returns()
    state = fresh(law)
    rows, clocks, numbers = (x.copy() for x in state[0])
    position, equity, total, turnover = np.zeros(LANES), np.ones(LANES), np.zeros(LANES), np.zeros(LANES)
    _, w, cost = np.array([episode(SEED, i, 0, START, STOP, law[4], law[0], law[5]) for i in range(LANES)]).T
    for action in actions(200):
        tqc.step_cpu(action, ret, START, STOP, LENGTH, law, SEED, *state)
        ints, floats, reward, flags, final_ints, final_floats = state
        for i in range(LANES):
            target = float(np.clip(action[i], -1, 1))
            assert START <= rows[i] < STOP
            growth, _, after = trade(position[i], target, ret[rows[i]], cost[i], law[1], drift)
            ruined = growth <= tqc.RUIN
            expected = math.log(growth) - w[i] * law[3] * abs(target - position[i])
            # once everything is lost the fee does not matter: the floor may stand before or after it
            rel, zero = (0.01, 0.01) if ruined else (1e-10, 1e-14)
            assert reward[i] == pytest.approx(expected, rel=rel, abs=zero)
            equity[i] *= growth
            total[i] += expected
            turnover[i] += abs(target - position[i])
            position[i] = after
            rows[i] += 1
            clocks[i] += 1
            over = not ruined and bool(clocks[i] >= LENGTH or rows[i] >= STOP)
            assert flags[:, i].tolist() == [ruined, over]
            if ruined or over:
                assert final_ints[:, i].tolist() == [rows[i], clocks[i], numbers[i]]
                assert final_floats[:, i] == pytest.approx(
                    [position[i], w[i], cost[i], equity[i], total[i], turnover[i]], rel=rel, abs=zero)
                numbers[i] += 1
                rows[i], w[i], cost[i] = episode(SEED, i, int(numbers[i]), START, STOP, law[4], law[0], law[5])
                clocks[i], position[i], equity[i], total[i], turnover[i] = 0, 0.0, 1.0, 0.0, 0.0
            assert ints[:, i].tolist() == [rows[i], clocks[i], numbers[i]]
            assert floats[:, i] == pytest.approx(
                [position[i], w[i], cost[i], equity[i], total[i], turnover[i]], rel=1e-10, abs=1e-14)


def test_step_does_not_depend_on_the_threads():
    if nb.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one core: numba has one thread")
    law, ret = rules(True), returns()
    one, two = fresh(law), fresh(law)
    before = nb.get_num_threads()
    try:
        for action in actions(300):
            for threads, state in ((1, one), (2, two)):
                nb.set_num_threads(threads)
                tqc.step_cpu(action, ret, START, STOP, LENGTH, law, SEED, *state)
    finally:
        nb.set_num_threads(before)
    assert one[0][2].min() > 5
    for a, b in zip(one, two):
        np.testing.assert_array_equal(a, b)


@MODES
@pytest.mark.parametrize("after", [-0.01, 0.0, 0.01])
def test_what_a_ruined_lane_owes_ends_its_episode(drift, after):
    """A short through a near-doubling keeps almost no equity: the fee of the next trade is more than all of it."""
    law = rules(drift, cost=5e-4, funding=0.0, cost_randomization=0.0)
    for rise in (0.5, 0.99, 0.9999, 0.99999, 1.0, 2.0):
        ret = np.full(300, after)
        ret[100] = rise
        state = fresh(law, 1)
        ints, floats, reward, flags, final_ints, final_floats = state
        ints[:2, 0] = 100, 0
        for action in (-1.0, 1.0, 1.0):
            lost = drift and 5e-4 * (action - floats[0, 0]) / (1 + 5e-4 * action) >= 1
            tqc.step_cpu(np.array([action]), ret, START, STOP, LENGTH, law, SEED, *state)
            assert np.isfinite(reward).all() and np.isfinite(floats).all(), f"{action} after a rise of {rise}"
            if lost or rise >= 1.0:
                assert flags[:, 0].tolist() == [True, False], f"{action} after a rise of {rise}"
                assert 0.0 < final_floats[3, 0] < 1e-5 and ints[2, 0] == 1
                break
            assert not flags.any() and floats[3, 0] > 0.0
        assert flags.any() == (rise >= (0.9999 if drift else 1.0))


# ----------------------------------------------------------------------------------------------------- walks
@MODES
def test_walk_is_plain_python(drift):
    rng = np.random.default_rng(4)
    n, cost, funding = 600, 7e-4, 3e-4
    target, ret, expected = rng.uniform(-1, 1, n), rng.normal(0, 0.03, n), rng.normal(0, 1e-3, n)
    target[100:120] = target[100]
    reward, mean, change, held = tqc.walk_nb(target, ret, expected, cost, funding, drift)
    position, equity = 0.0, 1.0
    for t in range(n):
        growth, fee, after = trade(position, target[t], ret[t], cost, funding, drift)
        assert reward[t] == pytest.approx(math.log(growth), rel=1e-11, abs=1e-15)
        carry = funding * max(-target[t], 0.0)
        assert mean[t] == pytest.approx(target[t] * expected[t] - carry - fee, rel=1e-11, abs=1e-15)
        assert change[t] == pytest.approx(abs(target[t] - position), rel=1e-11, abs=1e-15)
        position, equity = after, equity * growth
    assert (held == target).all()
    assert reward.sum() == pytest.approx(math.log(equity), abs=1e-12)
    assert np.isnan(tqc.walk_nb(target, ret, np.full(n, np.nan), cost, funding, drift)[1]).all()


@MODES
def test_a_walk_through_ruin_stays_finite(drift):
    target = np.array([-1.0, -1.0, 0.5, 0.5])
    for rise in (0.99, 0.9999, 1.0, 3.0):
        ret = np.array([rise, 0.01, 0.01, 0.01])
        reward, mean, _, _ = tqc.walk_nb(target, ret, np.zeros(4), 5e-4, 0.0, drift)
        assert np.isfinite(reward).all() and np.isfinite(mean).all(), f"a rise of {rise}: {reward}"


@MODES
def test_greedy_walk_is_plain_python(drift):
    rng = np.random.default_rng(6)
    n, grid, cost, funding, scale, penalty = 400, np.linspace(-1, 1, 21), 2e-3, 1e-4, 30.0, 5e-4
    value, ret = rng.normal(0, 0.05, (n, 21)), rng.normal(0, 0.03, n)
    target = tqc.greedy_walk_nb(value, grid, scale, penalty, ret, cost, funding, drift)
    position = 0.0
    for t in range(n):
        q = [value[t, j] + scale * (math.log(1 - trade(position, a, 0.0, cost, 0.0, drift)[1])
                                    - penalty * abs(a - position)) for j, a in enumerate(grid)]
        assert target[t] == grid[int(np.argmax(q))]
        position = trade(position, target[t], ret[t], cost, funding, drift)[2]
    assert len(set(target)) > 10


def test_greedy_walk_keeps_the_nearest_of_equals():
    grid = np.linspace(-1, 1, 5)
    value = np.zeros((4, 5))
    value[0] = [1, 0, 0, 1, 0]  # from flat: .5 is nearer than -1
    value[2] = [1, 0, 0, 0, 1]  # from .5: 1 is nearer than -1
    target = tqc.greedy_walk_nb(value, grid, 1.0, 0.0, np.zeros(4), 0.0, 0.0, False)
    assert target.tolist() == [0.5, 0.5, 1.0, 1.0]
    assert tqc.greedy_walk_nb(value[:, ::-1].copy(), grid, 1.0, 0.0, np.zeros(4), 0.0, 0.0, False).tolist() == (
        [-0.5, -0.5, -1.0, -1.0])
    # a cost or a penalty alone keeps the position; in drift mode the nearest grid position
    for cost, penalty in ((1e-3, 0.0), (0.0, 1e-3)):
        held = np.zeros((3, 5))
        held[0, 3] = 1.0
        walk = tqc.greedy_walk_nb(held, grid, 1.0, penalty, np.array([0.3, 0.3, 0.3]), cost, 0.0, True)
        assert walk.tolist() == [0.5, 0.5, 0.5]


# ------------------------------------------------------------------------------------------------------ CUDA
CUDA = """
import sys, warnings
import numpy as np
warnings.simplefilter("ignore")  # numba's word on small grids
sys.path.insert(0, "tests")
from types import SimpleNamespace
import test_kernels as k
from numba import cuda
tqc, rtol = k.tqc, float(sys.argv[1])

def same(a, b, what):
    for x, y in zip(a, b):
        (np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol) if rtol and x.dtype.kind == "f"
         else np.testing.assert_array_equal(x, y, what))

kernel, ret, threads = tqc.cuda_step(), k.returns(), 16
for drift in (False, True):
    law = k.rules(drift)
    host, device = k.fresh(law), [cuda.to_device(x) for x in k.fresh(law)]
    for action in k.actions(40):
        tqc.step_cpu(action, ret, k.START, k.STOP, k.LENGTH, law, k.SEED, *host)
        kernel[(k.LANES + threads - 1) // threads, threads](
            cuda.to_device(action), cuda.to_device(ret), k.START, k.STOP, k.LENGTH, law, k.SEED, *device)
        same(host, [x.copy_to_host() for x in device], f"drift {drift}")
    assert host[0][2].min() >= 2 and host[3].shape == (2, 37)

rng = np.random.default_rng(0)
market = tqc.Market(bars=SimpleNamespace(sha256="a test's"), features=None, window=8, ret=k.returns(),
                    table=rng.normal(size=(300, 7)).astype("f4"), expected=np.full(300, np.nan),
                    rows={"train": (20, 280)})
envs = [tqc.MarketVectorEnv(market, (20, 280), 5, 6, funding_bps=2.0, position_mode="drift", cost_randomization=0.3,
                            seed=3, backend=b) for b in ("cpu", "cuda")]
assert type(envs[1].ints) is not np.ndarray
last = [env.reset(seed=4)[0] for env in envs]
finals = 0
def check(a, b):
    for name in ("market", "position", "w_cost"):
        assert a[name].dtype == b[name].dtype == np.float32 and a[name].shape == b[name].shape
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=rtol)
check(*last)
for t, action in enumerate(k.actions(18, 5)):
    if t == 9:
        check(*[env.reset()[0] for env in envs])
    a, b = (env.step(action[:, None].astype("f4")) for env in envs)
    check(a[0], b[0])
    same(a[1:4], b[1:4], "reward and flags")
    assert a[4].keys() == b[4].keys()
    for x, y in zip(a[4].get("final_obs", ()), b[4].get("final_obs", ())):
        assert (x is None) == (y is None)
        if x is not None:
            check(x, y)
            finals += 1
    if "final_info" in a[4]:
        for key, x in a[4]["final_info"]["episode"].items():
            np.testing.assert_allclose(x, b[4]["final_info"]["episode"][key], rtol=rtol, atol=rtol)
assert finals > 5
state = envs[1].get_state()
envs[0].set_state(state)
same([envs[0].ints, envs[0].floats], [state["ints"].numpy(), state["floats"].numpy()], "state")
envs[1].set_state(state)
check(*[env.step(np.full((5, 1), 0.5, "f4"))[0] for env in envs])
print("same", finals)
"""

def test_cuda_on_the_simulator_is_the_cpu_bit_for_bit(repo):
    assert run_code(repo, CUDA, "0", NUMBA_ENABLE_CUDASIM="1").startswith("same")


@pytest.mark.gpu
def test_cuda_on_a_device_is_the_cpu(repo):
    assert run_code(repo, CUDA, "1e-9", NUMBA_ENABLE_CUDASIM="0").startswith("same")


def test_the_kernel_compiles_for_a_real_gpu(repo, tmp_path):
    assert_compiles_for_a_gpu(repo, tmp_path, """
from cleanrl_crypto import tqc_film_batch as tqc
i, f = 5, np.zeros(9)
ints, floats, flags = np.zeros((3, 3), int), np.zeros((3, 3)), np.zeros((2, 3), bool)
emit(tqc.cuda_step(), f, f, i, i, i, f, i, ints, floats, f, flags, ints, floats)
""", 1)
