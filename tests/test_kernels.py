"""The market kernels: one lane's arithmetic, its random numbers, and the same lane on CUDA."""

import math

import numpy as np
import pytest

from cleanrl_crypto import tqc_film_batch as tqc
from runs import assert_compiles_for_a_gpu, run_code, uniform

MODES = pytest.mark.parametrize("drift", [False, True], ids=["rebalance", "drift"])
START, STOP, LENGTH, SEED, LANES = 20, 280, 17, 5, 37
RULES = START, STOP, LENGTH, 0.9, 7e-4, SEED


def trade(position, target, ret, funding, costs):
    """The same decision on a balance sheet: equity 1 before it, a holding, cash, and a fee."""
    cost, drift = costs
    traded = target - position
    if drift:
        for _ in range(200):  # holding / equity left = target: a contraction of factor cost |target|
            traded = target * (1.0 - cost * abs(traded)) - position
    fee = cost * abs(traded)
    left = 1.0 - fee
    holding = position + traded if drift else target * left
    carry = funding * target * left
    equity = max(left - holding + holding * (1.0 + ret) - carry, tqc.RUIN * left)
    return equity, holding * (1.0 + ret) / equity if drift else target


def payments(rows=300):
    """Funding of every bar: every eighth pays, either way."""
    paid = np.zeros(rows)
    paid[::8] = np.random.default_rng(2).normal(0.0, 3e-3, len(paid[::8]))
    return paid


def returns(rows=300):
    """Bars with three more than doublings, which ruin a short."""
    ret = np.random.default_rng(0).normal(0.0, 0.02, rows)
    ret[[60, 130, 200]] = 1.2, 1.0, 3.0
    return ret


def begin_all(rules, state):
    for i in range(state.shape[1]):
        tqc.begin_nb(i, rules, state)


def fresh(n=LANES):
    """Arrays of n lanes in their first episode, as the environment keeps them."""
    state = np.zeros((8, n))
    begin_all(RULES, state)
    state[tqc.CLOCK] = np.arange(n) % LENGTH  # staggered: some lane ends at every step
    return state, state * 0, np.zeros(n), np.zeros((2, n), np.bool_)


def actions(steps, n=LANES):
    a = np.random.default_rng(1).uniform(-1.3, 1.3, (steps, n))  # the lane clips them
    a[:, ::5] = np.round(a[:, ::5])  # corners, and no change at all
    return a


@pytest.mark.parametrize("seed, number", [(SEED, 0), (SEED, 63), (2**31, 10**9)])
def test_an_episode_s_row_and_w_cost_are_those_of_its_own_counters(seed, number):
    state = np.ones((8, 200))
    state[tqc.EPISODE] = number
    begin_all((77, 91, LENGTH, 0.5, 0.0, seed), state)
    for lane in range(200):
        share, draw = uniform(seed, lane, number, 0), uniform(seed, lane, number, 1)
        w_cost = 0.5 * np.clip((draw - 0.2) / 0.6, 0, 1)
        assert state[tqc.ROW, lane] == 77 + int(share * 14)
        assert state[tqc.W_COST, lane] == pytest.approx(w_cost, rel=1e-14)
    assert set(state[tqc.ROW]) == set(range(77, 91))  # both ends, never `stop`
    assert not state[[tqc.CLOCK, tqc.POSITION, tqc.RETURN, tqc.TURNOVER]].any()
    assert (state[tqc.EQUITY] == 1).all()


@MODES
@pytest.mark.parametrize("after", [-0.01, 0.01])
def test_what_a_ruined_lane_owes_ends_its_episode(drift, after):
    """After a near-doubling a short has almost no equity: the next fee is more than all of it."""
    costs = 5e-4, drift
    for rise in (0.5, 0.99, 0.9999, 0.99999, 1.0, 2.0):
        ret = np.full(300, after)
        ret[100] = rise
        lanes = state, last, reward, flags = fresh(1)
        state[:2, 0] = 100, 0
        for action in (-1.0, 1.0, 1.0):
            lost = drift and 5e-4 * (action - state[tqc.POSITION, 0]) / (1 + 5e-4 * action) >= 1
            tqc.step_cpu(np.array([action]), ret, 0 * ret, costs, RULES, lanes)
            assert np.isfinite(reward).all() and np.isfinite(state).all(), (action, rise)
            if lost or rise >= 1.0:
                assert flags[:, 0].tolist() == [True, False], (action, rise)
                assert 0.0 < last[tqc.EQUITY, 0] < 1e-5 and state[tqc.EPISODE, 0] == 1
                break
            assert not flags.any() and state[tqc.EQUITY, 0] > 0.0
        assert flags.any() == (rise >= (0.9999 if drift else 1.0))


@MODES
def test_walk_is_plain_python(drift):
    rng = np.random.default_rng(4)
    n, costs, funding = 600, (0.05, drift), payments(600)
    target, ret, expected = rng.uniform(-1, 1, n), rng.normal(0, 0.03, n), rng.normal(0, 1e-3, n)
    target[:100] = rng.choice([-1.0, 0.0, 1.0], 100)  # corners, flat, no change
    reward, mean, change, held = tqc.walk_nb(target, ret, funding, expected, costs)
    position = 0.0
    for t in range(n):
        growth, after = trade(position, target[t], ret[t], funding[t], costs)
        fee = 1 - trade(position, target[t], 0.0, 0.0, costs)[0]
        assert reward[t] == pytest.approx(math.log(growth), rel=1e-11, abs=1e-15)
        earned = target[t] * (expected[t] - funding[t]) - fee
        assert mean[t] == pytest.approx(earned, rel=1e-10, abs=1e-15)
        assert change[t] == pytest.approx(abs(target[t] - position), rel=1e-11, abs=1e-15)
        position = after
    assert (held == target).all()
    assert np.isnan(tqc.walk_nb(target, ret, funding, np.full(n, np.nan), costs)[1]).all()


@MODES
def test_greedy_walk_is_plain_python(drift):
    rng = np.random.default_rng(6)
    n, grid, costs, scale, penalty = 300, np.linspace(-1, 1, 21), (2e-3, drift), 30.0, 5e-4
    value, ret = rng.normal(0, 0.05, (n, 21)), rng.normal(0, 0.03, n)
    target = tqc.greedy_walk_nb(value, grid, scale, penalty, ret, payments(), costs)
    position = 0.0
    for t in range(n):
        left = [math.log(trade(position, a, 0.0, 0.0, costs)[0]) for a in grid]
        q = value[t] + scale * (np.array(left) - penalty * np.abs(grid - position))
        assert target[t] == grid[int(np.argmax(q))]
        position = trade(position, target[t], ret[t], payments()[t], costs)[1]
    assert len(set(target)) > 10


def test_greedy_walk_keeps_the_nearest_of_equals():
    grid, free, nothing = np.linspace(-1, 1, 5), (0.0, False), np.zeros(4)
    value = np.zeros((4, 5))
    value[0] = [1, 0, 0, 1, 0]  # from flat: .5 is nearer than -1
    value[2] = [1, 0, 0, 0, 1]  # from .5: 1 is nearer than -1
    for sign in (1, -1):
        shown = np.ascontiguousarray(value[:, ::sign])
        target = tqc.greedy_walk_nb(shown, grid, 1.0, 0.0, nothing, nothing, free)
        assert target.tolist() == [sign * 0.5, sign * 0.5, sign * 1.0, sign * 1.0]
    # a cost or a penalty alone keeps the position; in drift mode the nearest grid position
    held = np.zeros((3, 5))
    held[0, 3] = 1.0
    for cost, penalty in ((1e-3, 0.0), (0.0, 1e-3)):
        rise = np.full(3, 0.3)
        path = tqc.greedy_walk_nb(held, grid, 1.0, penalty, rise, nothing, (cost, True))
        assert path.tolist() == [0.5, 0.5, 0.5]


CUDA = """
import sys, warnings
import numpy as np
warnings.simplefilter("ignore")  # Numba's word on small grids
import test_kernels as k
from numba import config, cuda
tqc, rtol = k.tqc, float(sys.argv[1])
kernel, bars, threads = tqc.step_cuda, (k.returns(), k.payments()), 16
for drift in (False, True):
    host = k.fresh()
    device = k.fresh()  # the simulator does not unwrap device arrays in a tuple
    if not config.ENABLE_CUDASIM:
        device = tuple(map(cuda.to_device, device))
    for action in k.actions(40):
        tqc.step_cpu(action, *bars, (8e-4, drift), k.RULES, host)
        kernel[(k.LANES + threads - 1) // threads, threads](
            cuda.to_device(action), *map(cuda.to_device, bars), (8e-4, drift), k.RULES, device)
        for x, y in zip(host, device):
            np.testing.assert_allclose(x, np.asarray(y), rtol=rtol, atol=rtol)
    assert host[0][tqc.EPISODE].min() >= 2
print("same")
"""
DEVICE = "import test_env_market; test_env_market.check_backends(); print('same')"


def test_cuda_on_the_simulator_is_the_cpu_bit_for_bit(repo):
    assert run_code(repo, CUDA, "0", NUMBA_ENABLE_CUDASIM="1") == "same\n"


@pytest.mark.gpu
@pytest.mark.parametrize("code", [CUDA, DEVICE], ids=["kernel", "environment"])
def test_cuda_on_a_device_is_the_cpu(repo, code):
    assert run_code(repo, code, "1e-9", NUMBA_ENABLE_CUDASIM="0") == "same\n"


def test_the_kernel_compiles_for_a_real_gpu(repo, tmp_path):
    assert_compiles_for_a_gpu(repo, tmp_path, """
from cleanrl_crypto import tqc_film_batch as tqc
i, f = 5, np.zeros(9)
state, flags = np.zeros((8, 3)), np.zeros((2, 3), bool)
rules = (i, i, i, 1.0, 1.0, i)
emit(tqc.step_cuda, f, f, f, (1.0, True), rules, (state, state, f, flags))
""", 1)
