"""The market environment: Gymnasium's contract, the exact autoreset sequence, and the accounting of trades."""

import io
import math
import warnings
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from cleanrl_crypto import tqc_film_batch as tqc
from common.gpu_pool import pool

DATA = "synthetic:regime?bars=4000&seed=1"
MODES = pytest.mark.parametrize("mode", ["rebalance", "drift"])
STATE = ("ints", "floats", "final_ints", "final_floats", "action", "reward", "flags")


@pytest.fixture(scope="session")
def market():
    return tqc.load_market(DATA)


@pytest.fixture
def make(market):
    """Environments on the train rows, closed at the end; `w_cost` sets the largest that is drawn."""
    envs = []

    def build(num_envs=4, *, table=market, rows=None, w_cost=1.0, **kwargs):
        envs.append(tqc.MarketVectorEnv(table, rows or market.rows["train"], num_envs, **kwargs))
        envs[-1].rules[4] = w_cost
        return envs[-1]

    yield build
    for env in envs:
        env.close()


def at(env, rows, clocks=0, w_cost=None):
    """Put every lane on a row of its own choice, flat."""
    state = env.get_state()
    state["ints"][0] = torch.as_tensor(np.broadcast_to(rows, env.num_envs).copy())
    state["ints"][1] = torch.as_tensor(np.broadcast_to(clocks, env.num_envs).copy())
    if w_cost is not None:
        state["floats"][1] = w_cost
    env.set_state(state)
    ints, floats = env.ints, env.floats
    return env.observe(ints[0], floats[0], floats[1])


def window(market, row):
    return market.table[row - market.window + 1: row + 1]


def draws(steps, lanes, seed=0):
    """(steps, lanes, 1) float32 in [-1, 1], with corners, flats and held positions among them."""
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1, 1, (steps, lanes, 1))
    actions[rng.random(actions.shape) < 0.15] = 0.0
    actions[rng.random(actions.shape) < 0.1] = 1.0
    actions[rng.random(actions.shape) < 0.1] = -1.0
    for t in range(1, steps):
        actions[t] = np.where(rng.random((lanes, 1)) < 0.2, actions[t - 1], actions[t])
    return actions.astype(np.float32)


def same(a, b):
    """Observations, infos and states, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, np.ndarray) and a.dtype == object:
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif isinstance(a, (tuple, list)):
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------------------------------ Gymnasium's contract
def test_gymnasium_s_checker_is_content():
    env = gym.make("cleanrl_crypto/Market-v0", data=DATA, episode_length=5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env.unwrapped)
        obs, info = env.reset(seed=3)
        for t in range(5):  # through gym.make's own wrappers, to the end of an episode
            assert obs in env.observation_space and isinstance(info, dict)
            obs, reward, terminated, truncated, info = env.step(np.array([0.5], np.float32))
            assert type(reward) is float and (terminated, truncated) == (False, t == 4)
    words = [str(w.message) for w in caught if "Box observation space m" not in str(w.message)]
    assert not [w for w in words if "WARN" in w], words  # unbounded columns are meant
    last, (first, _) = obs, env.reset()
    assert last["position"] == 0.5 and first["position"] == 0.0  # not the first of the next episode
    assert not np.array_equal(last["market"], first["market"])
    env.close()


def test_vector_spaces_shapes_and_metadata(make):
    env = make(6, episode_length=4)
    assert isinstance(env, gym.vector.VectorEnv) and env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert env.action_space.shape == (6, 1) and env.single_action_space == gym.spaces.Box(-1, 1, (1,), np.float32)
    obs, info = env.reset(seed=1)
    assert info == {}
    for t in range(9):
        assert obs in env.observation_space
        assert {k: (v.shape, v.dtype) for k, v in obs.items()} == {
            "market": ((6, 64, 55), np.float32), "position": ((6, 1), np.float32), "w_cost": ((6, 1), np.float32)}
        for i in range(6):
            assert {k: v[i] for k, v in obs.items()} in env.single_observation_space
        env.action_space.seed(t)
        obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
        for x, dtype in ((reward, np.float64), (terminated, np.bool_), (truncated, np.bool_)):
            assert x.shape == (6,) and x.dtype == dtype
        for i in np.flatnonzero(truncated):
            assert info["final_obs"][i] in env.single_observation_space


def test_make_vec_and_what_it_refuses():
    env = gym.make_vec("cleanrl_crypto/Market-v0", num_envs=3, data=DATA, split_name="eval", hmm=False, fee_bps=0.0,
                       slippage_bps=2.0, episode_length=6, seed=9)
    inner = env.unwrapped
    assert isinstance(inner, tqc.MarketVectorEnv) and inner.num_envs == 3 and inner.seed == 9
    assert (inner.start, inner.stop) == inner.market.rows["eval"] and inner.rules[0] == pytest.approx(2e-4)
    obs, _ = env.reset(seed=1)
    assert not obs["market"][..., -5:].any() and obs["market"][..., :-5].any()
    assert env.step(np.zeros((3, 1), np.float32))[1].tolist() == [0.0, 0.0, 0.0]
    env.close()
    with pytest.raises(TypeError, match="fee_bp"):
        tqc.MarketVectorEnv(inner.market, (100, 200), 2, fee_bp=3.0)


@pytest.mark.parametrize("wrong", [{"position_mode": "drifting"}, {"backend": "gpu"}, {"rows": (10, 200)},
                                   {"rows": (100, 4000)}, {"rows": (200, 200)}])
def test_nonsense_is_refused(make, wrong):
    with pytest.raises(ValueError):
        make(2, **wrong)


# ------------------------------------------------------------------------------------------------ autoreset
@MODES
def test_the_exact_autoreset_sequence(make, market, mode):
    n, length = 5, 7
    env = make(n, episode_length=length, position_mode=mode, seed=2)
    env.reset(seed=2)
    start, stop = market.rows["train"]
    row, w, number = env.ints[0].copy(), env.floats[1].copy(), np.zeros(n, int)
    clock = np.arange(n)  # staggered ends: one lane or none at a step
    row = np.minimum(row, stop - 2 * length)
    row[4] = stop - 6  # this one meets the end of the rows before its length
    clock[4] = 0
    at(env, row, clock)
    position, total, turnover, equity = np.zeros(n), np.zeros(n), np.zeros(n), np.ones(n)
    ends = np.zeros(n, int)
    for t, action in enumerate(draws(40, n)):
        obs, reward, terminated, truncated, info = env.step(action)
        assert not terminated.any()
        ret = market.ret[row]
        clock += 1
        row = row + 1
        turnover += np.abs(action[:, 0] - position)
        total += reward
        equity *= np.exp(reward + w * 5e-4 * np.abs(action[:, 0] - position))
        position = action[:, 0].astype(float)
        if mode == "drift":
            position = position * (1 + ret) / (1 + position * ret)
        done = (clock == length) | (row == stop)
        assert truncated.tolist() == done.tolist(), f"step {t}"
        assert ("final_obs" in info) == ("final_info" in info) == done.any()
        if done.any():
            assert (info["_final_obs"] == done).all() and (info["_final_info"] == done).all()
            assert (info["final_info"]["_episode"] == done).all()
        for i in range(n):
            if done[i]:
                last, episode = info["final_obs"][i], info["final_info"]["episode"]
                np.testing.assert_array_equal(last["market"], window(market, row[i]))
                assert last["position"] == pytest.approx([position[i]], rel=1e-6) and last["position"].shape == (1,)
                assert last["w_cost"] == np.float32(w[i])
                assert episode["l"][i] == clock[i] <= length and episode["r"][i] == pytest.approx(total[i], abs=1e-12)
                assert episode["turnover"][i] == pytest.approx(turnover[i], rel=1e-9)
                assert episode["equity"][i] == pytest.approx(equity[i], rel=1e-9)
                number[i] += 1
                row[i], w[i], _ = tqc.episode_nb(2, i, number[i], start, stop, 1.0, 5e-4, 0.0)
                clock[i], position[i], total[i], turnover[i], equity[i] = 0, 0.0, 0.0, 0.0, 1.0
                ends[i] += 1
            elif done.any():
                assert info["final_obs"][i] is None and info["final_info"]["episode"]["l"][i] == 0
            np.testing.assert_array_equal(obs["market"][i], window(market, row[i]))
            assert obs["position"][i] == pytest.approx(position[i], rel=1e-6, abs=1e-9)
            assert obs["w_cost"][i] == np.float32(w[i])
        if t == 5:
            assert done[4] and ends[4] == 1  # the rows ended, not the episode's length
    assert ends.min() >= 5


def test_an_episode_lasts_exactly_its_length(make, market):
    env = make(16, episode_length=11, seed=3)
    env.reset(seed=3)
    lengths = []
    for action in draws(200, 16):
        row = env.ints[0].copy()
        _, _, _, truncated, info = env.step(action)
        for i in np.flatnonzero(truncated):
            lengths.append((info["final_info"]["episode"]["l"][i], row[i] + 1 == env.stop))
    assert len(lengths) > 200 and {length for length, cut in lengths if not cut} == {11}


@MODES
def test_ruin_terminates_and_is_not_a_truncation(make, market, mode):
    ret = market.ret.copy()
    row = market.rows["train"][1] - 1
    ret[row] = 1.3  # more than doubles: a full short owes more than it has
    env = make(3, table=replace(market, ret=ret), position_mode=mode, episode_length=1, w_cost=0.0)
    env.reset(seed=1)
    at(env, row, w_cost=0.0)
    obs, reward, terminated, truncated, info = env.step(np.array([[-1.0], [1.0], [-0.5]], np.float32))
    assert terminated.tolist() == [True, False, False] and truncated.tolist() == [False, True, True]
    assert reward[0] == pytest.approx(math.log(tqc.RUIN), abs=1e-2)
    assert np.isfinite(reward).all() and (obs["position"] == 0).all()
    assert info["_final_obs"].all() and info["final_info"]["episode"]["equity"][0] <= tqc.RUIN
    np.testing.assert_array_equal(info["final_obs"][0]["market"], window(market, row + 1))
    assert env.floats[3].tolist() == [1.0, 1.0, 1.0]  # everyone starts again


# ----------------------------------------------------------------------------------------------- accounting
@MODES
def test_rewards_sum_to_log_equity(make, market, mode):
    """Over the whole train split, against a balance sheet in units and cash that pays fees and funding."""
    n, cost, funding = 8, 5e-4, 1e-4
    start, stop = market.rows["train"]
    env = make(n, episode_length=10**6, funding_bps=1.0, position_mode=mode, w_cost=0.0)
    env.reset(seed=1)
    at(env, start, w_cost=0.0)
    rewards = np.zeros(n)
    units, cash, last = np.zeros(n), np.ones(n), np.zeros(n)
    for t, action in enumerate(draws(stop - start, n), start):
        _, reward, _, truncated, info = env.step(action)
        rewards += reward
        a, price = action[:, 0].astype(float), market.bars.close[t]
        before = cash + units * price
        if mode == "drift":
            change = a - units * price / before
            fee = cost * np.abs(change) / (1 + cost * a * np.sign(change)) * before
        else:  # exposure is restored between decisions at no cost: it is the last target, whatever the price did
            fee = cost * np.abs(a - last) * before
        last = a
        units = a * (before - fee) / price
        cash = before - fee - units * price - funding * np.maximum(-a, 0) * (before - fee)
    assert truncated.all() and stop - start > 2000
    equity = cash + units * market.bars.close[stop]
    assert info["final_info"]["episode"]["equity"] == pytest.approx(equity, rel=1e-9)
    assert np.abs(rewards - np.log(equity)).max() < 1e-9  # 1e-6 is what is promised
    assert info["final_info"]["episode"]["r"] == pytest.approx(rewards, abs=1e-12)


def test_drift_mode_is_the_accounting_of_a_back_testing_library(make, market):
    import vectorbt as vbt

    n, cost = 3, 7e-4
    start, stop = market.rows["train"]
    env = make(n, episode_length=10**6, fee_bps=6.0, slippage_bps=1.0, position_mode="drift", w_cost=0.0)
    env.reset(seed=1)
    at(env, start, w_cost=0.0)
    close = market.bars.close[start: stop + 1]
    actions = draws(stop - start, n, seed=5)
    actions[:, 1] = np.abs(actions[:, 1])  # lane 1 is long or flat, lane 2 short or flat, lane 0 both
    actions[:, 2] = -np.abs(actions[:, 2])
    equity, units, orders = np.ones((len(close), n)), np.zeros(n), np.zeros((len(close), n))
    for t, action in enumerate(actions):
        # the shares which a target of equity after the fee asks for: |shares| is worth x with p + x = a (1 - c |x|)
        worth, a = equity[t], action[:, 0].astype(float)
        x = a * worth - units * close[t]
        x /= np.where(x > 0, 1 + cost * a, 1 - cost * a)
        orders[t] = x / close[t]
        units += orders[t]
        _, _, _, truncated, info = env.step(action)
        equity[t + 1] = info["final_info"]["episode"]["equity"] if truncated.all() else env.floats[3]
    assert truncated.all()
    # every bar twice: its equity before the trade, then the trade; a large account, because orders below 1e-12
    # shares count as none there
    price, size, account = np.repeat(close, 2), np.zeros((2 * len(close), n)), 1e6
    size[1::2] = account * orders
    for i in range(n):
        book = vbt.Portfolio.from_orders(price, size[:, i], price=price, fees=cost, init_cash=account, direction="both")
        records = book.orders.records
        filled = np.bincount(records["idx"], records["size"] * np.where(records["side"] == 0, 1, -1), len(size))
        np.testing.assert_allclose(filled, size[:, i], rtol=1e-12, atol=1e-6)  # none was refused or filled in part
        assert (np.abs(filled) > 1.0).sum() > 1000
        np.testing.assert_allclose(book.value().to_numpy()[::2] / account, equity[:, i], rtol=1e-9)
        assert book.final_value() / account == pytest.approx(equity[-1, i], rel=1e-9)
    assert np.ptp(equity[-1]) > 0.01


def test_rebalanced_equity_is_its_formula(make, market):
    start, stop = market.rows["train"]
    env = make(4, episode_length=10**6, fee_bps=3.0, slippage_bps=0.5, w_cost=0.0)
    env.reset(seed=1)
    at(env, start, w_cost=0.0)
    actions = draws(stop - start, 4, seed=6)
    path, sums = [], np.zeros(4)
    for action in actions:
        _, reward, _, truncated, info = env.step(action)
        path.append(info["final_info"]["episode"]["equity"] if truncated.all() else env.floats[3].copy())
        sums += reward
    a = actions[:, :, 0].astype(float)
    change = np.abs(np.diff(a, axis=0, prepend=0.0))
    r = (market.bars.close[start + 1: stop + 1] / market.bars.close[start:stop] - 1)[:, None]
    equity = np.cumprod((1 - 3.5e-4 * change) * (1 + a * r), axis=0)
    np.testing.assert_allclose(path, equity, rtol=1e-11)
    assert np.abs(sums - np.log(equity[-1])).max() < 1e-9


@MODES
def test_w_cost_is_constant_in_an_episode_and_is_the_reward_s(make, market, mode):
    env = make(32, episode_length=9, position_mode=mode, turnover_penalty_bps=20.0, funding_bps=1.0, seed=4)
    obs, _ = env.reset(seed=4)
    seen = [obs["w_cost"][:, 0]]
    for action in draws(60, 32):
        w, position, equity = env.floats[1].copy(), env.floats[0].copy(), env.floats[3].copy()
        shown = obs["w_cost"][:, 0]
        assert (shown == w.astype(np.float32)).all()
        obs, reward, _, truncated, info = env.step(action)
        after = env.floats[3].copy()
        if truncated.any():
            after[truncated] = info["final_info"]["episode"]["equity"][truncated]
        change = np.abs(action[:, 0] - position)
        np.testing.assert_allclose(reward - np.log(after / equity), -w * 20e-4 * change, atol=1e-12)
        assert (obs["w_cost"][~truncated, 0] == shown[~truncated]).all()
        for i in np.flatnonzero(truncated):
            assert info["final_obs"][i]["w_cost"] == shown[i]
        seen.append(obs["w_cost"][truncated, 0])
    seen = np.concatenate(seen)
    assert 0.1 < (seen == 0).mean() < 0.3 and 0.1 < (seen == 1).mean() < 0.3 and len(set(seen)) > 50


def test_costs_are_randomised_per_episode_and_charged(make):
    env = make(64, episode_length=3, cost_randomization=0.5, w_cost=0.0, seed=5)
    env.reset(seed=5)
    costs = []
    for action in draws(30, 64):
        cost, position, row = env.floats[2].copy(), env.floats[0].copy(), env.ints[0].copy()
        _, reward, _, truncated, _ = env.step(action)
        assert (env.floats[2][~truncated] == cost[~truncated]).all()
        a = action[:, 0].astype(float)
        growth = (1 - cost * np.abs(a - position)) * (1 + a * env.market.ret[row])
        np.testing.assert_allclose(reward, np.log(growth), atol=1e-13)
        costs.append(env.floats[2][truncated])
    costs = np.concatenate(costs)
    assert costs.min() >= 2.5e-4 and costs.max() <= 7.5e-4
    assert np.ptp(costs) > 4.8e-4 and np.unique(costs).size == costs.size


# --------------------------------------------------------------------------------------- cause and effect, time
def test_two_actions_give_two_rewards_and_two_next_states(make, market):
    env = make(3, fee_bps=0.0, slippage_bps=0.0, w_cost=0.0)
    env.reset(seed=1)
    row = market.rows["train"][0] + 100
    at(env, row, w_cost=0.0)
    obs, reward, *_ = env.step(np.array([[-1.0], [0.25], [1.0]], np.float32))
    assert obs["position"][:, 0].tolist() == [-1.0, 0.25, 1.0]
    assert len(set(reward)) == 3 and np.sign(reward[2]) == np.sign(market.ret[row]) == -np.sign(reward[0])
    assert len(set(env.floats[3])) == 3


def test_a_constant_action_still_changes_the_observation(make):
    env = make(4, episode_length=50)
    last, _ = env.reset(seed=1)
    for _ in range(60):
        obs, *_ = env.step(np.ones((4, 1), np.float32))
        assert all(not np.array_equal(obs["market"][i], last["market"][i]) for i in range(4))
        last = obs


def test_actions_beyond_the_box_are_clipped(make):
    wide, box = make(2, episode_length=5), make(2, episode_length=5)
    for env in (wide, box):
        env.reset(seed=1)
    same(wide.step(np.array([[3.0], [-7.0]])), box.step(np.array([[1.0], [-1.0]])))
    assert box.floats[0].tolist() == [1.0, -1.0]


@MODES
def test_a_decision_on_bar_t_earns_bar_t_plus_1(make, market, mode):
    start, stop = market.rows["train"]
    rows = np.array([start, start + 500, stop - 1])
    env = make(3, fee_bps=0.0, slippage_bps=0.0, position_mode=mode, w_cost=0.0)
    env.reset(seed=1)
    obs = at(env, rows, w_cost=0.0)
    for i, t in enumerate(rows):
        np.testing.assert_array_equal(obs["market"][i], window(market, t))  # its last bar is t
    close = market.bars.close
    _, reward, *_ = env.step(np.ones((3, 1), np.float32))
    assert np.exp(reward) - 1 == pytest.approx(close[rows + 1] / close[rows] - 1, rel=1e-11, abs=1e-15)


def test_an_observation_holds_nothing_after_its_bar(make, market):
    start, stop = market.rows["train"]
    for t in (start, start + 777, stop - 1):
        table, ret = market.table.copy(), market.ret.copy()
        table[t + 1:], ret[t + 1:] = np.nan, np.nan
        edited, plain = make(2, table=replace(market, table=table, ret=ret)), make(2)
        for env in (edited, plain):
            env.reset(seed=1)
        same(at(edited, t), at(plain, t))
        action = np.array([[0.5], [-1.0]], np.float32)
        # and the reward of t needs t's own return only
        np.testing.assert_array_equal(edited.step_lanes(action)[0], plain.step_lanes(action)[0])
        ret[t] += 0.01
        at(edited, t)
        assert (edited.step_lanes(action)[0] != plain.reward).all()


# -------------------------------------------------------------------------------- builds, state, determinism
def test_reset_builds_and_allocates_nothing(make):
    env = make(8, episode_length=5)
    env.reset(seed=1)
    arrays = [getattr(env, name) for name in STATE]
    builds, stats = tqc.MarketVectorEnv.builds, pool.stats()
    for k in range(6):
        env.reset(seed=k if k % 2 else None)
        for action in draws(12, 8):
            env.step(action)
    assert tqc.MarketVectorEnv.builds == builds and pool.stats() == stats
    assert all(getattr(env, name) is array for name, array in zip(STATE, arrays))
    make(8)
    assert tqc.MarketVectorEnv.builds == builds + 1 and pool.stats()["in_use"] == stats["in_use"] + len(STATE)


def test_a_second_environment_of_the_same_size_allocates_nothing(make):
    make(9).close()
    allocations, in_use = pool.stats()["allocations"], pool.stats()["in_use"]
    make(9).close()
    assert pool.stats()["allocations"] == allocations and pool.stats()["in_use"] == in_use


def test_two_environments_never_share_mutable_state(make):
    train, evaluation = make(4, seed=1), make(4, seed=1)
    for a in STATE + ("rules",):
        for b in STATE + ("rules",):
            assert not np.shares_memory(getattr(train, a), getattr(evaluation, b))
    first, _ = train.reset(seed=1)
    evaluation.reset(seed=2)
    before, shown = train.get_state(), {k: v.copy() for k, v in first.items()}
    for action in draws(20, 4):
        evaluation.step(action)
    after = train.get_state()
    assert torch.equal(before["ints"], after["ints"]) and torch.equal(before["floats"], after["floats"])
    # what was handed out is the caller's: later steps do not write into it, nor does the caller into the market
    second, reward, terminated, truncated, _ = train.step(np.ones((4, 1), np.float32))
    kept = [x.copy() for x in (reward, terminated, truncated)]
    train.step(-np.ones((4, 1), np.float32))
    same(first, shown)
    same(kept, [reward, terminated, truncated])
    second["market"][:], second["position"][:] = 7.0, 7.0
    assert not (train.market.table == 7.0).all(1).any() and not (train.floats[0] == 7.0).any()


@MODES
def test_same_seed_same_trajectory(make, mode):
    a, b, other = (make(6, episode_length=8, position_mode=mode, cost_randomization=0.2, seed=s) for s in (1, 2, 3))
    x, y, z = a.reset(seed=11), b.reset(seed=11), other.reset(seed=12)
    same(x, y)
    assert not np.array_equal(x[0]["market"], z[0]["market"])
    first = []
    for t, action in enumerate(draws(40, 6)):
        if t == 20:
            same(a.reset(), b.reset())
        first.append(a.step(action))
        same(first[-1], b.step(action))
    a.reset(seed=11)  # and again, in the same environment
    for t, action in enumerate(draws(40, 6)[:20]):
        same(first[t], a.step(action))


def test_the_constructor_s_seed_is_the_first_reset_s_and_every_reset_a_new_episode(make):
    a, b = make(5, seed=21), make(5, seed=1)
    same(a.reset(), b.reset(seed=21))
    starts = [tuple(a.reset()[0]["market"][:, -1, 0]) for _ in range(5)]
    assert len(set(starts)) == 5


def test_a_lane_does_not_depend_on_how_many_there_are(make):
    few, many = make(3, episode_length=6), make(40, episode_length=6)
    few.reset(seed=5)
    many.reset(seed=5)
    for action in draws(30, 40):
        x, y = few.step(action[:3]), many.step(action)
        np.testing.assert_array_equal(x[1], y[1][:3])
        np.testing.assert_array_equal(x[0]["market"], y[0]["market"][:3])


@MODES
def test_a_saved_state_continues_exactly(make, mode):
    law = dict(episode_length=7, position_mode=mode, cost_randomization=0.3, funding_bps=1.0)
    env, fresh = make(5, seed=3, **law), make(5, seed=99, **law)
    env.reset(seed=8)
    for action in draws(10, 5):
        env.step(action)
    state, file = env.get_state(), io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    frozen = {name: state[name].clone() for name in ("ints", "floats")}
    expected = [env.step(action) for action in draws(30, 5, seed=1)]
    after = env.reset()
    assert all(torch.equal(state[name], frozen[name]) for name in frozen)  # a copy, not a view
    fresh.set_state(torch.load(file, weights_only=True))  # tensors and plain Python
    for want, action in zip(expected, draws(30, 5, seed=1)):
        same(want, fresh.step(action))
    same(after, fresh.reset())
    assert sum("final_obs" in want[4] for want in expected) > 3


@MODES
def test_step_lanes_is_step_without_observations(make, mode):
    a, b = (make(7, episode_length=6, position_mode=mode) for _ in range(2))
    a.reset(seed=1)
    b.reset(seed=1)
    for action in draws(50, 7):
        _, reward, terminated, truncated, _ = a.step(action)
        got = b.step_lanes(action[:, 0])
        same([reward, terminated, truncated], list(got))
        for name in STATE:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert got[0].base is b.reward or got[0] is b.reward  # a view: nothing is copied


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_action_that_is_not_finite_is_refused(make, bad):
    env = make(4)
    env.reset(seed=1)
    before = env.get_state()
    action = np.zeros((4, 1), np.float32)
    action[2] = bad
    with pytest.raises(ValueError, match="lane 2"):
        env.step(action)
    after = env.get_state()
    assert torch.equal(before["ints"], after["ints"]) and torch.equal(before["floats"], after["floats"])
    for shape in ((3, 1), (5,), (4, 2)):
        with pytest.raises(ValueError):
            env.step(np.zeros(shape, np.float32))
