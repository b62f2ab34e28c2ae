"""The forex environment in one process: its law against independent bookkeeping, Gymnasium's contract, exact resume."""

import dataclasses
import io
import math
from decimal import Decimal, getcontext

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from cleanrl_crypto import dqn_forex_subproc as dqn
from runs import assert_compiles_for_a_gpu, run_code

MODES = pytest.mark.parametrize("mode", ["rebalance", "drift"])
OUT = ("obs", "reward", "flags", "row", "position", "final_obs", "final_row", "stats")


def make_pairs(bars=(300, 260, 340), columns=5, sigma=4e-3, seed=0, **changes):
    """Symbols of unequal length, the second one USDXXX; costs, swaps, days and forced-flat rows on every symbol."""
    rng = np.random.default_rng(seed)
    n, first = sum(bars), np.cumsum([0, *bars])[:-1]
    rows = {"train": np.array([[f + 5, f + b // 2] for f, b in zip(first, bars)]),
            "test": np.array([[f + b // 2 + 3, f + b - 1] for f, b in zip(first, bars)])}
    known = dict(
        names=("EURUSD", "USDJPY", "GBPUSD")[:len(bars)], table=rng.normal(size=(n, columns)).astype(np.float32),
        ret=rng.normal(0, sigma, n), expected=np.full(n, np.nan), cost=rng.uniform(1e-5, 4e-4, n),
        swap=rng.uniform(-1e-5, 5e-5, (2, n)), flat=rng.random(n) < 0.04, day=(np.arange(n) // 11).astype(np.int32),
        rows=rows, inverse=np.arange(len(bars)) % 3 == 1)
    blank = {f.name: None for f in dataclasses.fields(dqn.Pairs)}
    return dqn.Pairs(**blank | known | changes)


@pytest.fixture(scope="module")
def pairs():
    return make_pairs()


@pytest.fixture
def make(pairs):
    envs = []

    def build(num_envs=7, *, table=pairs, split="train", **kwargs):
        envs.append(dqn.ForexVectorEnv(table, split, num_envs, **kwargs))
        return envs[-1]

    yield build
    for env in envs:
        env.close()


def draws(steps, lanes, seed=0):
    """(steps, lanes) actions, half of them the lane's last one."""
    rng = np.random.default_rng(seed)
    actions = rng.integers(3, size=(steps, lanes))
    for t in range(1, steps):
        actions[t] = np.where(rng.random(lanes) < 0.5, actions[t - 1], actions[t])
    return actions


def outputs(env):
    return {name: np.array(getattr(env, name)) for name in OUT}


def state_of(env):
    state = env.get_state()
    return state["ints"].numpy(), state["floats"].numpy()


def uniform(seed, lane, episode):
    """Two rounds of splitmix64 in Python's integers."""
    mask = 2**64 - 1

    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31

    x = mix((seed * 0x9E3779B97F4A7C15 + lane) & mask)
    return (mix((x + episode * 0xD1342543DE82EF95) & mask) >> 11) / 2**53


class Oracle:
    """One lane in plain Python, from the description."""

    def __init__(self, pairs, lane, seed, mode, leverage, limit, length, split="train"):
        self.p, self.lane, self.seed, self.mode, self.leverage = pairs, lane, seed, mode, leverage
        self.limit, self.length, self.symbol, self.episode = limit, length, lane % len(pairs.names), -1
        self.start, self.stop = (int(x) for x in pairs.rows[split][self.symbol])
        self.begin()

    def begin(self):
        self.episode += 1
        self.row = self.start + int(uniform(self.seed, self.lane, self.episode) * (self.stop - self.start))
        self.target, self.x, self.day_start, self.changes, self.rewards, self.path = 0, 0.0, 1e5, [], [], [1e5]

    def obs(self):
        day = self.path[-1] / self.day_start - 1
        return np.array([*self.p.table[self.row], self.x / self.leverage, day], np.float32)

    def step(self, action):
        p, t, level = self.p, self.row, self.leverage
        target = 0 if p.flat[t] else int(action) - 1
        after, equity = target * level, self.path[-1]
        fee, change = 0.0, abs(target - self.x / level)
        if self.mode == "drift" and target == self.target:
            after, change = self.x, 0.0
        elif self.mode == "drift":
            left = 1.0
            for _ in range(60):  # what is left pays for reaching `after` times what is left
                left = 1 - p.cost[t] * abs(after * left - self.x)
            fee = 1 - left
        else:
            fee = p.cost[t] * level * change
        growth = 1 + after * p.ret[t] - abs(after) * p.swap[0 if after > 0 else 1][t]
        factor = max(growth, dqn.RUIN) * max(1 - fee, dqn.RUIN)
        if self.mode == "drift":
            after *= (1 - p.ret[t] if p.inverse[self.symbol] else 1 + p.ret[t]) / max(growth, dqn.RUIN)
        self.target, self.x = target, after
        self.rewards.append(math.log(factor))
        self.changes.append(change)
        self.path.append(equity * factor)
        fell = self.limit > 0 and self.path[-1] / self.day_start <= 1 - self.limit
        if p.day[t + 1] != p.day[t]:
            self.day_start = self.path[-1]
        self.row += 1
        terminated = bool(factor <= dqn.LOST or fell)
        return terminated, not terminated and (len(self.rewards) == self.length or self.row == self.stop)

    def stats(self, bars_per_year):
        path, r = np.array(self.path), np.array(self.rewards)
        down = 1 - path / np.maximum.accumulate(path)
        sharpe = r.mean() / r.std() * math.sqrt(bars_per_year) if np.ptp(r) > 1e-12 else 0.0
        return [r.sum(), len(r), down[-1], np.mean(self.changes), sharpe, down.max()]


@MODES
@pytest.mark.parametrize("limit", [0.0, 0.02])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_number_against_an_oracle(make, pairs, mode, limit, split):
    n, leverage, length = 7, 3.0, 23
    env = make(n, split=split, position_mode=mode, leverage=leverage, daily_drawdown=limit, episode_length=length,
               seed=5, bars_per_year=6000.0)
    first, info = env.reset(seed=5)
    lanes = [Oracle(pairs, i, 5, mode, leverage, limit, length, split) for i in range(n)]
    assert info == {} and (first == [lane.obs() for lane in lanes]).all()
    ends = {"terminated": 0, "length": 0, "rows": 0}
    for t, actions in enumerate(draws(400, n)):
        obs, reward, terminated, truncated, info = env.step(actions)
        for i, lane in enumerate(lanes):
            expected = lane.step(actions[i])
            assert (terminated[i], truncated[i]) == expected, f"step {t}, lane {i}"
            assert reward[i] == pytest.approx(lane.rewards[-1], abs=1e-13)
            if any(expected):
                ends["terminated" if expected[0] else "length" if len(lane.rewards) == length else "rows"] += 1
                np.testing.assert_allclose(info["final_obs"][i], lane.obs(), rtol=1e-6, atol=1e-9)
                assert env.final_row[i] == lane.row
                stats = [info["final_info"]["episode"][k][i] for k in dqn.EPISODE]
                np.testing.assert_allclose(stats, lane.stats(6000.0), rtol=1e-7, atol=1e-11)
                lane.begin()
            elif "final_obs" in info:
                assert info["final_obs"][i] is None and info["final_info"]["episode"]["l"][i] == 0
            np.testing.assert_allclose(obs[i], lane.obs(), rtol=1e-6, atol=1e-9)
            assert (env.row[i], env.position[i]) == (lane.row, lane.target)
        done = terminated | truncated
        assert ("final_obs" in info) == done.any()
        if done.any():
            assert (info["_final_obs"] == done).all() and (info["final_info"]["_episode"] == done).all()
    assert ends["length"] > 20 and ends["rows"] > 5 and (ends["terminated"] > 5) == (limit > 0)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("side", [1, -1])
def test_drift_is_a_ledger_in_two_currencies(make, inverse, side):
    """Decimal cash in the account's currency and units of the foreign one, marked at every price: 1e-9 in equity."""
    getcontext().prec = 40
    rng, n, leverage = np.random.default_rng(3), 120, 4.0
    price = (150.0 if inverse else 1.1) * np.exp(np.cumsum(rng.normal(0, 4e-3, n)))
    ret = np.append(1 - price[:-1] / price[1:] if inverse else price[1:] / price[:-1] - 1, 0.0)
    table = make_pairs((n,), rows={"train": np.array([[0, n - 1]])}, ret=ret, flat=np.zeros(n, bool),
                       inverse=np.array([inverse]))
    env = make(1, table=table, position_mode="drift", leverage=leverage, episode_length=n)
    env.reset(seed=1)
    state = env.get_state()
    state["ints"][0] = 0
    env.set_state(state)
    targets = np.repeat([0, side, side, -side, side, 0, -side, side, 0, side, -side, side], 10)[: n - 1]
    cash, units, trades = Decimal(100_000), Decimal(0), 0
    for t, target in enumerate(targets):
        now, later = (1 / Decimal(p) if inverse else Decimal(p) for p in price[t:t + 2])  # of one foreign unit
        if t == 0 or target != targets[t - 1]:
            equity, wanted = cash + units * now, int(target) * Decimal(leverage) * (-1 if inverse else 1)
            left = equity
            for _ in range(40):
                left = equity - Decimal(table.cost[t]) * abs(wanted * left - units * now)
            units, trades = wanted * left / now, trades + 1
            cash = left - units * now
        long = (units < 0) == inverse
        cash -= Decimal(table.swap[0 if long else 1][t]) * abs(units * now)
        _, _, terminated, truncated = env.step_lanes([target + 1])
        assert (terminated[0], truncated[0]) == (False, t == n - 2)
        equity = float(cash + units * later)
        if not truncated[0]:
            ints, floats = state_of(env)
            assert floats[1, 0] == pytest.approx(equity, rel=1e-9)
            exposure = float(units * later / (cash + units * later)) * (-1 if inverse else 1)
            assert floats[0, 0] * leverage == pytest.approx(exposure, rel=1e-9, abs=1e-12)
    assert 1e5 * math.exp(env.stats[0, 0]) == pytest.approx(equity, rel=1e-9) and trades >= 10
    assert abs(equity / 1e5 - 1) > 1e-3


@MODES
def test_rewards_sum_to_log_equity(make, mode):
    env = make(40, position_mode=mode, leverage=5.0, episode_length=10**6)
    env.reset(seed=2)
    total, ended = np.zeros(40), 0
    for actions in draws(300, 40):
        _, reward, terminated, truncated = env.step_lanes(actions)
        total += reward
        done = terminated | truncated
        ended += done.sum()
        np.testing.assert_allclose(env.stats[0, done], total[done], atol=1e-12)
        total[done] = 0
        _, floats = state_of(env)
        np.testing.assert_allclose(np.log(floats[1] / 1e5), total, atol=1e-9)
    assert ended > 40


def test_rebalanced_equity_is_its_formula(make, pairs):
    env = make(3, leverage=2.0, episode_length=10**6, initial_balance=5e4)
    env.reset(seed=1)
    state = env.get_state()
    state["ints"][0] = torch.from_numpy(pairs.rows["train"][:, 0].copy())
    env.set_state(state)
    steps = int(np.diff(pairs.rows["train"]).min()) - 1
    actions = draws(steps, 3)
    for action in actions:
        env.step_lanes(action)
    rows = pairs.rows["train"][:, 0] + np.arange(steps)[:, None]
    a = np.where(pairs.flat[rows], 0, actions - 1)
    change = np.abs(np.diff(a, axis=0, prepend=0))
    swap = np.where(a > 0, pairs.swap[0][rows], pairs.swap[1][rows])
    growth = (1 - 2 * pairs.cost[rows] * change) * (1 + 2 * a * pairs.ret[rows] - 2 * np.abs(a) * swap)
    np.testing.assert_allclose(state_of(env)[1][1], 5e4 * growth.prod(axis=0), rtol=1e-11)


def test_flat_rows_force_the_target_to_zero(make):
    flat = np.zeros(900, bool)
    flat[::4] = True
    table = make_pairs(flat=flat)
    env = make(30, table=table, position_mode="drift")
    env.reset(seed=1)
    for _ in range(30):
        row = env.row.copy()
        _, _, terminated, truncated = env.step_lanes(np.full(30, 2))
        on = ~(terminated | truncated)
        assert (env.position[on] == np.where(flat[row[on]], 0, 1)).all() and flat[row[on]].any()
        assert (env.obs[on & flat[row], -2] == 0).all()


def test_ruin_terminates_and_is_not_a_truncation(make):
    table = make_pairs(ret=np.full(900, 0.6), flat=np.zeros(900, bool))
    env = make(3, table=table, leverage=2.0, episode_length=1)
    env.reset(seed=1)
    _, reward, terminated, truncated, info = env.step(np.array([0, 1, 2]))
    assert terminated.tolist() == [True, False, False] and truncated.tolist() == [False, True, True]
    assert reward[0] == pytest.approx(math.log(dqn.RUIN), abs=1e-2) and np.isfinite(reward).all()
    assert info["final_info"]["episode"]["max_drawdown"][0] > 0.99999
    assert state_of(env)[1][1].tolist() == [1e5] * 3  # everyone starts again


def test_sharpe_of_a_constant_is_zero(make):
    zeros = np.zeros(900)
    table = make_pairs(ret=np.full(900, 1e-3), cost=zeros, swap=np.zeros((2, 900)), flat=zeros.astype(bool))
    env = make(2, table=table, episode_length=9)
    env.reset(seed=1)
    seen = []
    for _ in range(40):
        env.step_lanes([1, 2])
        seen.append(env.stats[4].copy())
    assert not np.any(seen)


# ---------------------------------------------------------------------------------------------- Gymnasium
def test_vector_api_spaces_and_metadata(make, pairs):
    env = make(6, episode_length=4)
    assert isinstance(env, gym.vector.VectorEnv) and env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert env.single_action_space == gym.spaces.Discrete(3) and env.observation_space.shape == (6, 7)
    obs, info = env.reset(seed=1)
    assert info == {} and obs in env.observation_space and not np.shares_memory(obs, env.obs)
    for t in range(9):
        env.action_space.seed(t)
        kept, copy = obs, obs.copy()
        obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
        assert (kept == copy).all() and obs in env.observation_space
        for x, dtype in ((reward, np.float64), (terminated, np.bool_), (truncated, np.bool_)):
            assert x.shape == (6,) and x.dtype == dtype
        for i in np.flatnonzero(truncated):
            assert info["final_obs"][i] in env.single_observation_space
    wrapped = gym.wrappers.vector.RecordEpisodeStatistics(make(6, episode_length=4))
    wrapped.reset(seed=1)
    ends = [wrapped.step(np.ones(6, np.int64))[4] for _ in range(8)]
    assert any("episode" in info for info in ends)


def test_lane_i_trades_symbol_i_modulo_s_and_starts_all_over_its_rows(make, pairs):
    env = make(300, episode_length=3)
    env.reset(seed=1)
    start, stop = pairs.rows["train"][np.arange(300) % 3].T
    seen = set()
    for actions in draws(60, 300):
        assert ((env.row >= start) & (env.row < stop)).all()
        seen |= set(env.row.tolist())
        env.step_lanes(actions)
    assert len(seen) > 0.95 * np.diff(pairs.rows["train"]).sum()


def test_an_episode_lasts_exactly_its_length(make, pairs):
    env = make(16, episode_length=11)
    env.reset(seed=3)
    lengths = []
    for actions in draws(100, 16):
        _, _, _, truncated = env.step_lanes(actions)
        stop = pairs.rows["train"][np.arange(16) % 3, 1]
        lengths += env.stats[1, truncated & (env.final_row < stop)].tolist()
    assert len(lengths) > 50 and set(lengths) == {11}


def test_two_actions_give_two_rewards_and_two_next_states(make):
    env = make(3, split="test")
    env.reset(seed=1)
    state, seen = env.get_state(), []
    for action in range(3):
        env.set_state(state)
        obs, reward, *_ = env.step_lanes([action] * 3)
        seen.append((reward.copy(), obs.copy(), env.position.copy()))
    for i in range(3):
        assert len({r[i] for r, _, _ in seen}) == 3 and len({tuple(o[i]) for _, o, _ in seen}) == 3
        assert [p[i] for _, _, p in seen] == [-1, 0, 1]


def test_a_constant_action_still_changes_the_observation(make):
    env = make(4)
    last, _ = env.reset(seed=1)
    for _ in range(50):
        obs, _, terminated, truncated, _ = env.step(np.full(4, 2))
        moved = (obs[:, :-2] != last[:, :-2]).any(axis=1)
        assert moved[~(terminated | truncated)].all()  # a new episode may begin on the row where the last one ended
        last = obs


def test_an_observation_holds_nothing_after_its_row(make, pairs):
    env = make(7)
    obs, _ = env.reset(seed=4)
    later = np.arange(900) > env.row.min()
    table, ret = pairs.table.copy(), pairs.ret.copy()
    ret[:] = 0.01
    other = make(7, table=dataclasses.replace(pairs, table=table, ret=ret))
    np.testing.assert_array_equal(other.reset(seed=4)[0], obs)  # returns to come are not in it
    lane = int(env.row.argmin())
    table[later] = np.nan
    changed = make(7, table=dataclasses.replace(pairs, table=table))
    np.testing.assert_array_equal(changed.reset(seed=4)[0][lane], obs[lane])


@pytest.mark.parametrize("wrong, word", [
    (dict(vec_mode="threads"), "vec_mode"), (dict(backend="gpu"), "backend"),
    (dict(position_mode="drifting"), "position_mode"),
    (dict(on_worker_death="ignore"), "on_worker_death"), (dict(num_envs=7, async_halves=True), "even"),
    (dict(num_envs=2, vec_mode="dummy", num_workers=3), "a lane each"), (dict(daily_drawdown=1.0), "daily_drawdown"),
    (dict(leverage=0.0), "leverage"), (dict(leverage=3000.0), "leverage"), (dict(episode_length=0), "episode_length"),
    (dict(backend="cuda", vec_mode="subproc"), "vec_mode single"), (dict(env_fn="nothing"), "module:factory"),
    (dict(env_fn="math:pi_"), "pi_"), (dict(timeout=0.0), "timeout"),
    (dict(table=make_pairs(rows={"train": np.array([[5, 9], [5, 5], [9, 12]])})), "split train"),
    (dict(table=make_pairs(rows={"train": np.array([[5, 9], [5, 8], [9, 900]])})), "split train"),
])
def test_nonsense_is_refused_in_one_line(make, wrong, word):
    with pytest.raises(ValueError, match=word) as e:
        make(**wrong)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("actions", [np.zeros(6, int), np.zeros((7, 1), int), np.zeros(7),
                                     np.array([0, 1, 2, 3, 0, 1, 2]), np.array([0, 1, 2, -1, 0, 1, 2])])
def test_an_action_that_does_not_fit_is_refused(make, actions):
    env = make()
    env.reset(seed=1)
    before = outputs(env), state_of(env)
    with pytest.raises(ValueError, match="lane 3|need 7 integers"):
        env.step(actions)
    for a, b in zip(before[1], state_of(env)):
        np.testing.assert_array_equal(a, b)


def test_order_of_calls_is_enforced(make):
    env = make(8, async_halves=True)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.ones(8, int))
    env.reset(seed=1)
    with pytest.raises(RuntimeError, match="not in flight"):
        env.recv(1)
    env.send(0, np.ones(4, int))
    with pytest.raises(RuntimeError, match="in flight"):
        env.send(0, np.ones(4, int))
    with pytest.raises(RuntimeError, match="in flight"):
        env.reset()
    env.recv(0)


# ----------------------------------------------------------------------------- seeds, state, views, builds, monitor
@MODES
def test_same_seed_same_trajectory(make, mode):
    a, b, c = (make(9, position_mode=mode, episode_length=8, seed=s) for s in (1, 2, 3))
    x, y, z = a.reset(seed=11)[0], b.reset(seed=11)[0], c.reset(seed=12)[0]
    np.testing.assert_array_equal(x, y)
    assert not np.array_equal(x, z)
    for t, actions in enumerate(draws(40, 9)):
        if t == 20:
            np.testing.assert_array_equal(a.reset()[0], b.reset()[0])
        a.step_lanes(actions)
        b.step_lanes(actions)
        for name in OUT:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_every_reset_is_a_new_episode_and_a_lane_knows_no_other(make):
    few, many = make(5, seed=21), make(50, seed=1)
    np.testing.assert_array_equal(few.reset()[0], many.reset(seed=21)[0][:5])
    assert len({tuple(few.reset()[0][:, 0]) for _ in range(6)}) == 6
    few.reset(seed=5)
    many.reset(seed=5)
    for actions in draws(30, 50):
        few.step_lanes(actions[:5])
        many.step_lanes(actions)
        np.testing.assert_array_equal(few.obs, many.obs[:5])
        np.testing.assert_array_equal(few.reward, many.reward[:5])


@MODES
def test_a_saved_state_continues_exactly_in_any_mode(make, mode):
    law = dict(position_mode=mode, leverage=3.0, daily_drawdown=0.02, episode_length=9)
    env = make(8, seed=3, **law)
    env.reset(seed=8)
    for actions in draws(13, 8):
        env.step_lanes(actions)
    file, kept = io.BytesIO(), env.obs.copy()
    torch.save(env.get_state(), file)
    others = [make(8, seed=99, **law, vec_mode=m, num_workers=w, async_halves=h)
              for m, w, h in (("single", 1, False), ("dummy", 3, False), ("dummy", 2, True))]
    for other in others:
        file.seek(0)
        other.set_state(torch.load(file, weights_only=True))
        np.testing.assert_array_equal(other.obs, kept)
    for actions in draws(40, 8, seed=1):
        env.step_lanes(actions)
        for other in others:
            other.step_lanes(actions)
            for name in ("obs", "reward", "flags", "row", "position"):
                np.testing.assert_array_equal(getattr(env, name), getattr(other, name))
    expected = env.reset()[0]
    for other in others:
        np.testing.assert_array_equal(other.reset()[0], expected)


def test_reset_and_step_build_nothing_and_hand_out_the_same_views(make):
    env = make(8, episode_length=5)
    env.reset(seed=1)
    views, builds, stats = [getattr(env, k) for k in OUT], dqn.ForexVectorEnv.builds, dqn.pool.stats()
    for k in range(4):
        env.reset(seed=k if k % 2 else None)
        for actions in draws(8, 8):
            obs, reward, terminated, truncated = env.step_lanes(actions)
            assert obs is env.obs and reward is env.reward and np.shares_memory(terminated, env.flags)
    assert dqn.ForexVectorEnv.builds == builds and dqn.pool.stats() == stats
    assert all(getattr(env, k) is view for k, view in zip(OUT, views))
    make(8)
    assert dqn.ForexVectorEnv.builds == builds + 1


def test_rows_of_the_table_are_whole_cache_lines(make):
    env = make(4)
    table, width = env.arrays["table"], env.pairs.table.shape[1]
    assert table.ctypes.data % 64 == 0 and table.strides[0] % 64 == 0
    np.testing.assert_array_equal(table[:, :width], env.pairs.table)
    assert not table[:, width:].any()


def test_two_environments_share_no_mutable_state(make):
    a, b = make(4), make(4)
    for x in a.arrays.values():
        assert not any(np.shares_memory(x, y) for y in b.arrays.values())


def test_monitor_csv_is_stable_baselines3_s(make, tmp_path):
    from stable_baselines3.common.monitor import load_results

    rows = []
    for _ in range(2):  # the second one continues the file
        env = make(6, episode_length=7, monitor=tmp_path / "monitor.csv")
        env.reset(seed=1)
        for actions in draws(30, 6):
            *_, terminated, truncated = env.step_lanes(actions)
            rows += env.stats[:, terminated | truncated].T.tolist()
        env.close()
    frame = load_results(str(tmp_path))
    header = (tmp_path / "monitor.csv").read_text().splitlines()[1].split(",")
    assert header == ["r", "l", "t", "drawdown", "turnover", "sharpe_ratio", "max_drawdown"]
    assert set(header) <= set(frame.columns)
    assert len(frame) == len(rows) > 40 and frame["t"].iloc[0] >= 0
    got = frame.sort_values(["r", "l"])[list(dqn.EPISODE)].to_numpy()
    np.testing.assert_allclose(got, sorted(rows), rtol=1e-5, atol=1e-9)
    assert (tmp_path / "monitor.csv").read_text().count("#") == 1


# ------------------------------------------------------------------------------------------------------- CUDA
CUDA = """
import sys
import numpy as np
from test_env_forex import draws, dqn, make_pairs, outputs
pairs, worst = make_pairs(), 0.0
for mode, limit in (("rebalance", 0.0), ("drift", .02)):
    law = dict(position_mode=mode, leverage=3.0, daily_drawdown=limit, episode_length=6, seed=3)
    cpu, gpu = (dqn.ForexVectorEnv(pairs, "train", 5, backend=b, **law) for b in ("cpu", "cuda"))
    assert (cpu.reset()[0] == gpu.reset()[0]).all()
    ends = 0
    for t, actions in enumerate(draws(int(sys.argv[1]), 5)):
        if t == 9:
            gpu.set_state(cpu.get_state())
        x, y = cpu.step(actions), gpu.step(actions)
        ends += x[2].sum() + x[3].sum()
        for a, b in zip(x[:4], y[:4]):
            worst = max(worst, np.abs(a.astype(float) - b).max())
        for name in ("row", "position"):
            assert (getattr(cpu, name) == gpu.host(getattr(gpu, name))).all()
    for name, a in outputs(cpu).items():
        worst = max(worst, np.abs(a.astype(float) - gpu.host(getattr(gpu, name))).max())
    assert ends > 4
    assert gpu.step_lanes(actions)[0] is gpu.obs and not isinstance(gpu.obs, np.ndarray)  # it stays on the device
assert worst <= float(sys.argv[2]), worst
print("same")
"""


def test_cuda_in_the_simulator_is_the_cpu(repo):
    assert "same" in run_code(repo, CUDA, "24", "1e-12", NUMBA_ENABLE_CUDASIM="1")


@pytest.mark.gpu
def test_cuda_on_a_device_is_the_cpu(repo):
    assert "same" in run_code(repo, CUDA, "500", "1e-6", NUMBA_ENABLE_CUDASIM="0")


def test_the_kernel_compiles_for_a_real_gpu(repo, tmp_path):
    assert_compiles_for_a_gpu(repo, tmp_path, """
from test_env_forex import dqn, make_pairs
emit(dqn.cuda_step(), 0, 5, 0, *dqn.ForexVectorEnv(make_pairs(), "train", 5).arguments[0])
""", 1)
