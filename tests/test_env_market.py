"""The market environment: flags, the exact autoreset sequence, the accounting."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch

from cleanrl_crypto import tqc_film_batch as tqc
from common.data import DataError, load_funding
from runs import refusal

DATA = "synthetic:regime?bars=4000&seed=1"
PLAIN = dict(screen=False, forecast=False)  # every column varies, and no lasso is fitted
MODES = pytest.mark.parametrize("mode", ["rebalance", "drift"])
@pytest.fixture(scope="session")
def market():
    return tqc.load_market(tqc.Args(data=DATA, **PLAIN))


@pytest.fixture
def make(market):
    """Environments on the train rows, closed at the end; `w_cost` sets the largest of them."""
    envs = []

    def build(num_envs=4, *, table=market, rows=None, w_cost=1.0, **kwargs):
        backend = kwargs.pop("backend", "cpu")
        args = tqc.Args(num_envs=num_envs, **kwargs)
        envs.append(tqc.MarketVectorEnv(table, rows or market.rows["train"], args, backend))
        envs[-1].w_max = w_cost
        return envs[-1]

    yield build
    for env in envs:
        env.close()


def at(env, rows, clocks=0, w_cost=None):
    """Put every lane on a row of its own choice; returns the observation."""
    env.state[tqc.ROW] = torch.as_tensor(np.broadcast_to(rows, env.num_envs).copy())
    env.state[tqc.CLOCK] = torch.as_tensor(np.broadcast_to(clocks, env.num_envs).copy())
    if w_cost is not None:
        env.state[tqc.W_COST] = w_cost
    return {k: x.numpy() for k, x in env.observe().items()}


def window(market, row):
    return market.table[row - market.window + 1 : row + 1]


def draws(steps, lanes, seed=0):
    """(steps, lanes, 1) float32 in [-1, 1], with corners, flats and held positions among them."""
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1, 1, (steps, lanes, 1))
    for share, value in ((0.15, 0.0), (0.1, 1.0), (0.1, -1.0)):
        actions[rng.random(actions.shape) < share] = value
    for t in range(1, steps):
        actions[t] = np.where(rng.random((lanes, 1)) < 0.2, actions[t - 1], actions[t])
    return actions.astype(np.float32)


def same(a, b, rtol=0.0):
    """Observations, infos and states, bit for bit or within rtol."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key], rtol)
    elif isinstance(a, (tuple, list)) or (isinstance(a, np.ndarray) and a.dtype == object):
        for x, y in zip(a, b, strict=True):
            same(x, y, rtol)
    elif a is not None:
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


# ----------------------------------------------------------------------------------------- flags
def test_make_vec_takes_the_script_s_flags():
    env = gym.make_vec(
        "cleanrl_crypto/Market-v0", num_envs=3, data=DATA, split_name="eval", hmm=False, **PLAIN,
        fee_bps=0.0, slippage_bps=2.0, episode_length=6, seed=9).unwrapped
    assert (env.num_envs, env.seed, env.length) == (3, 9, 6)
    assert (env.start, env.stop) == env.market.rows["eval"]
    assert env.costs == (pytest.approx(2e-4), False)
    obs, _ = env.reset(seed=1)
    assert {k: x.shape for k, x in obs.items()} == {"market": (3, 64, 55), "position": (3, 1), "w_cost": (3, 1)}
    assert not obs["market"][..., -5:].any() and obs["market"][..., :-5].any()
    env.close()


@pytest.mark.parametrize("wrong, error", [
    ({"position_mode": "drifting"}, ValueError), ({"backend": "gpu"}, ValueError),
    ({"rows": (10, 200)}, ValueError), ({"rows": (100, 4000)}, ValueError),
    ({"rows": (200, 200)}, ValueError), ({"fee_bp": 3.0}, TypeError)])
def test_nonsense_is_refused(make, wrong, error):
    with pytest.raises(error):
        make(2, **wrong)


# -------------------------------------------------------------------------------------- autoreset
@MODES
def test_the_exact_autoreset_sequence(make, market, mode):
    n, length = 5, 7
    env = make(n, episode_length=length, position_mode=mode, seed=2)
    env.reset(seed=2)
    start, stop = market.rows["train"]
    row, w = env.state[tqc.ROW].long().numpy(), env.state[tqc.W_COST].numpy().copy()
    clock = np.arange(n)  # staggered ends
    row = np.minimum(row, stop - 2 * length)
    row[4], clock[4] = stop - 6, 0  # this one meets the end of the rows before its length
    at(env, row, clock)
    state = np.zeros((8, n))
    position, total, turnover, equity = np.zeros(n), np.zeros(n), np.zeros(n), np.ones(n)
    ends = np.zeros(n, int)
    for t, action in enumerate(1.3 * draws(40, n)):  # the lane clips them
        obs, reward, terminated, truncated, info = env.step(action)
        assert not terminated.any()
        target = action[:, 0].clip(-1, 1).astype(float)
        ret, change = market.ret[row], np.abs(target - position)
        clock, row = clock + 1, row + 1
        turnover += change
        total += reward
        equity *= np.exp(reward + w * 5e-4 * change)
        position = target
        if mode == "drift":
            position = target * (1 + ret) / (1 + target * ret)
        done = (clock == length) | (row == stop)
        assert truncated.tolist() == done.tolist(), f"step {t}"
        assert ("final_obs" in info) == ("final_info" in info) == done.any()
        if done.any():
            assert (info["_final_obs"] == done).all() and (info["_final_info"] == done).all()
            episode = info["final_info"]["episode"]
        for i in range(n):
            if done[i]:
                last = info["final_obs"][i]
                np.testing.assert_array_equal(last["market"], window(market, row[i]))
                assert last["position"] == pytest.approx([position[i]], rel=1e-6)
                assert last["w_cost"] == np.float32(w[i])
                assert episode["l"][i] == clock[i] <= length
                assert episode["r"][i] == pytest.approx(total[i], abs=1e-12)
                assert episode["turnover"][i] == pytest.approx(turnover[i], rel=1e-9)
                assert episode["equity"][i] == pytest.approx(equity[i], rel=1e-9)
                state[tqc.EPISODE, i] += 1
                tqc.begin_nb(i, env.rules, state)
                row[i], w[i] = state[tqc.ROW, i], state[tqc.W_COST, i]
                clock[i], position[i], total[i], turnover[i], equity[i] = 0, 0.0, 0.0, 0.0, 1.0
                ends[i] += 1
            elif done.any():
                assert info["final_obs"][i] is None and episode["l"][i] == 0
            np.testing.assert_array_equal(obs["market"][i], window(market, row[i]))
            assert obs["position"][i] == pytest.approx(position[i], rel=1e-6, abs=1e-9)
            assert obs["w_cost"][i] == np.float32(w[i])
        if t == 5:
            assert done[4] and ends[4] == 1  # the rows ended, not the episode's length
    assert ends.min() >= 5


# ------------------------------------------------------------------------------------- accounting
@MODES
def test_rewards_sum_to_log_equity(make, market, mode):
    """Over 400 bars, against a balance sheet in units and cash: fees, and every bar's own funding
    from longs to shorts or back."""
    n, cost = 8, 5e-4
    start = market.rows["train"][0]
    rows = start, start + 400
    funding = np.random.default_rng(9).normal(0.0, 1e-3, len(market.ret))
    table = replace(market, funding=funding)
    env = make(n, table=table, rows=rows, episode_length=10**6, position_mode=mode, w_cost=0.0)
    env.reset(seed=1)
    at(env, start, w_cost=0.0)
    rewards, units, cash, last = np.zeros(n), np.zeros(n), np.ones(n), np.zeros(n)
    for t, action in enumerate(draws(400, n), start):
        reward, _, truncated = env.step_lanes(torch.from_numpy(action))
        rewards += reward.numpy()
        a, price = action[:, 0].astype(float), market.bars.close[t]
        before = cash + units * price
        if mode == "drift":
            change = a - units * price / before
            fee = cost * np.abs(change) / (1 + cost * a * np.sign(change)) * before
        else:  # the exposure is restored between decisions at no cost
            fee = cost * np.abs(a - last) * before
        last = a
        units = a * (before - fee) / price
        cash = before - fee - units * price - funding[t] * a * (before - fee)
    assert truncated.all()
    equity, episode = cash + units * market.bars.close[rows[1]], env.episode()
    assert episode["equity"].numpy() == pytest.approx(equity, rel=1e-9)
    assert np.abs(rewards - np.log(equity)).max() < 1e-9
    assert episode["r"].numpy() == pytest.approx(rewards, abs=1e-12)


def funding_file(path, times, rates):
    frame = pd.DataFrame({"fundingTime": times, "symbol": "BTCUSDT", "fundingRate": rates})
    frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)
    return path


def test_a_payment_belongs_to_the_bar_that_holds_its_time(market, tmp_path, capsys):
    clock = pd.DatetimeIndex(market.bars.timestamp)
    # odd times: just after an hour, within one, twice in one, before the first bar, after the last
    at = clock[[8, 16, 40, 40]] + pd.to_timedelta([3, 59 * 60_000, 0, 1], "ms")
    at = at.append(clock[[0]] - pd.Timedelta("1h")).append(clock[[-1]] + pd.Timedelta("1h"))
    rates = np.array([1e-4, -2e-4, 3e-4, 4e-4, 0.05, 0.05])
    expected = np.zeros(len(clock))
    expected[[8, 16, 40]] = 1e-4, -2e-4, 7e-4
    forms = {
        "milliseconds.csv": (at - pd.Timestamp(0)) // pd.Timedelta("1ms"),
        "iso.csv": at.strftime("%Y-%m-%dT%H:%M:%S.%f+00:00"),
        "times.parquet": at.tz_localize("Asia/Tokyo").tz_convert("UTC") + pd.Timedelta("9h"),
    }
    order = np.random.default_rng(0).permutation(len(at))
    for name, times in forms.items():
        path = funding_file(tmp_path / name, times[order], rates[order])
        paid, _ = load_funding(path, market.bars)
        np.testing.assert_allclose(paid, expected, rtol=1e-12, err_msg=name)
        assert "2 outside" in capsys.readouterr().out

    args = tqc.Args(data=DATA, **PLAIN, funding=str(path), funding_bps=-0.5)
    funded = tqc.load_market(args, market.features)
    np.testing.assert_allclose(funded.funding[:-1], expected[1:] - 0.5e-4, rtol=1e-12)
    assert funded.identity() != market.identity()
    # the decision on row 39 earns bar 40: longs pay its 7 bp, less the constant's half, shorts get it
    for target, sign in ((1.0, 1), (-1.0, -1)):
        with_it, without = (m.walk(np.full(2, target), 39, 41)[0] for m in (funded, market))
        moved = np.expm1(without - with_it)
        assert moved[0] == pytest.approx(sign * 6.5e-4, rel=0.1)
        assert moved[1] == pytest.approx(sign * -0.5e-4, rel=0.1)


@pytest.mark.parametrize("changes", [
    dict(fundingRate=0.5), dict(fundingRate=np.nan), dict(fundingTime=1_700_000_000), dict(fundingTime="soon"),
    dict(fundingTime="2019-02-01T00:00:00"), dict(fundingTime="2031-01-01T00:00Z"), dict(rate=1e-4)], ids=str)
def test_a_strange_file_of_funding_is_refused_in_one_line(market, tmp_path, changes):
    times = pd.DatetimeIndex(market.bars.timestamp[:1]).strftime("%Y-%m-%dT%H:%M:%SZ")
    path = funding_file(tmp_path / "strange.csv", times, [1e-4])
    assert load_funding(path, market.bars)[0].sum() == 1e-4
    pd.read_csv(path).assign(**changes).to_csv(path, index=False)
    assert "strange.csv" in refusal(DataError, load_funding, path, market.bars)


@pytest.mark.slow
def test_drift_mode_is_the_accounting_of_a_back_testing_library(make, market):
    import vectorbt as vbt

    n, cost = 3, 7e-4
    start, stop = market.rows["train"]
    env = make(n, episode_length=10**6, fee_bps=6.0, position_mode="drift", w_cost=0.0)
    env.reset(seed=1)
    at(env, start, w_cost=0.0)
    close = market.bars.close[start : stop + 1]
    actions = draws(stop - start, n, seed=5)
    actions[:, 1] = np.abs(actions[:, 1])  # lane 1 is long or flat, lane 2 short or flat, lane 0 both
    actions[:, 2] = -np.abs(actions[:, 2])
    equity, units, orders = np.ones((len(close), n)), np.zeros(n), np.zeros((len(close), n))
    for t, action in enumerate(actions):
        # shares x that a target of equity after the fee asks for: p + x = a (1 - c |x|)
        worth, a = equity[t], action[:, 0].astype(float)
        x = a * worth - units * close[t]
        x /= np.where(x > 0, 1 + cost * a, 1 - cost * a)
        orders[t] = x / close[t]
        units += orders[t]
        _, _, _, truncated, info = env.step(action)
        now = info["final_info"]["episode"]["equity"] if truncated.all() else env.state[tqc.EQUITY]
        equity[t + 1] = now
    # every bar twice: its equity before the trade, then the trade; a large account, because orders
    # below 1e-12 shares count as none there
    price, size, account = np.repeat(close, 2), np.zeros((2 * len(close), n)), 1e6
    size[1::2] = account * orders
    for i in range(n):
        book = vbt.Portfolio.from_orders(
            price, size[:, i], price=price, fees=cost, init_cash=account, direction="both")
        assert len(book.orders.records) > 1000
        np.testing.assert_allclose(book.value().to_numpy()[::2] / account, equity[:, i], rtol=1e-9)
    assert np.ptp(equity[-1]) > 0.01


# --------------------------------------------------------------------------------------- devices
def check_backends(rtol=1e-9):
    """CPU and CUDA lanes, through the whole environment; run on a device by test_kernels.py."""
    args = tqc.Args(data=DATA, **PLAIN, num_envs=5, episode_length=6, funding_bps=2.0, position_mode="drift", seed=3)
    market = tqc.load_market(args)
    envs = [tqc.MarketVectorEnv(market, market.rows["train"], args, backend) for backend in ("cpu", "cuda")]
    same(*(env.reset(seed=4) for env in envs), rtol)
    finals = 0
    for t, action in enumerate(draws(18, 5)):
        if t == 9:
            same(*(env.reset() for env in envs), rtol)
        a, b = (env.step(action) for env in envs)
        same(a, b, rtol)
        finals += "final_obs" in a[4]
    assert finals >= 2 and envs[1].reward.is_cuda
    envs[0].load_state_dict(envs[1].state_dict())
    same(*(env.step(action) for env in envs), rtol)
