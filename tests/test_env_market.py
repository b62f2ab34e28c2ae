"""The market environment: flags, the exact autoreset sequence, the accounting."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence

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
    """Environments on the train rows, closed at the end."""
    envs = []

    def build(num_envs=4, *, table=market, rows=None, backend="cpu", **kwargs):
        args = tqc.Args(num_envs=num_envs, **kwargs)
        envs.append(tqc.MarketVectorEnv(table, rows or market.rows["train"], args, backend))
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
    """(steps, lanes, 1) float32 in [-1, 1], with corners and flats among them."""
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1, 1, (steps, lanes, 1))
    for share, value in ((0.15, 0.0), (0.1, 1.0), (0.1, -1.0)):
        actions[rng.random(actions.shape) < share] = value
    return actions.astype(np.float32)


def test_make_vec_takes_the_script_s_flags():
    env = gym.make_vec(
        "cleanrl_crypto/Market-v0", num_envs=3, data=DATA, split_name="eval", hmm=False, **PLAIN,
        fee_bps=0.0, slippage_bps=2.0, episode_length=6, seed=9).unwrapped
    assert (env.num_envs, env.seed, env.length) == (3, 9, 6)
    assert (env.start, env.stop) == env.market.rows["eval"]
    assert env.costs == (pytest.approx(2e-4), False)
    market = env.reset(seed=1)[0]["market"]
    assert market.shape == (3, 64, 55) and not market[..., -5:].any() and market[..., :-5].any()
    env.close()


@pytest.mark.parametrize("wrong, error", [
    ({"position_mode": "drifting"}, ValueError), ({"backend": "gpu"}, ValueError),
    ({"rows": (10, 200)}, ValueError), ({"rows": (100, 4000)}, ValueError),
    ({"rows": (200, 200)}, ValueError), ({"fee_bp": 3.0}, TypeError)])
def test_nonsense_is_refused(make, wrong, error):
    with pytest.raises(error):
        make(2, **wrong)


def test_lanes_end_one_by_one_with_their_own_window_and_where_the_rows_end(make, market):
    n, length, stop = 5, 7, market.rows["train"][1]
    env = make(n, episode_length=length, seed=2)
    env.reset(seed=2)
    row, clock = env.state[tqc.ROW].long().clamp_max(stop - 2 * length).numpy(), np.arange(n)
    row[4], clock[4] = stop - 6, 0  # this one meets the end of the rows before its length
    obs = at(env, row, clock)
    for t, action in enumerate(draws(20, n)):
        np.testing.assert_array_equal(obs["market"], [window(market, r) for r in row])
        obs, _, terminated, truncated, info = env.step(action)
        row, clock = row + 1, clock + 1
        done = (clock == length) | (row == stop)
        assert not terminated.any() and truncated.tolist() == done.tolist(), f"step {t}"
        assert t != 5 or clock[4] < length and done[4]
        if done.any():
            last, lengths = info["final_obs"], info["final_info"]["episode"]["l"]
            assert lengths.tolist() == np.where(done, clock, 0).tolist()
            for i in range(n):
                assert (last[i] is not None) == info["_final_obs"][i] == info["_final_info"][i] == done[i]
                assert not done[i] or np.array_equal(last[i]["market"], window(market, row[i]))
        row, clock = np.where(done, env.state[tqc.ROW].long(), row), np.where(done, 0, clock)


@MODES
def test_rewards_sum_to_log_equity(make, market, mode):
    """Over 400 bars, against a balance sheet in units and cash: fees, and every bar's own funding
    from longs to shorts or back; less what w_cost adds."""
    n, cost = 8, 5e-4
    start = market.rows["train"][0]
    funding = np.random.default_rng(9).normal(0.0, 1e-3, len(market.ret))
    env = make(n, table=replace(market, funding=funding), rows=(start, start + 400), episode_length=10**6,
               position_mode=mode, turnover_penalty_bps=3.0)
    env.reset(seed=1)
    w_cost = torch.linspace(0, 1, n, dtype=torch.float64)
    at(env, start, w_cost=w_cost)
    rewards, turnover, units, cash, last = np.zeros((5, n))
    cash += 1
    for t, action in enumerate(1.3 * draws(400, n), start):  # the lane clips them
        reward, _, truncated = env.step_lanes(torch.from_numpy(action))
        rewards += reward.numpy()
        a, price = action[:, 0].clip(-1, 1).astype(float), market.bars.close[t]
        before = cash + units * price
        held = units * price / before if mode == "drift" else last  # else restored at no cost
        change = a - held
        fee = cost * np.abs(change) * before
        if mode == "drift":
            fee /= 1 + cost * a * np.sign(change)
        turnover += np.abs(change)
        last = a
        units = a * (before - fee) / price
        cash = before - fee - units * price - funding[t] * a * (before - fee)
    assert truncated.all()
    equity, episode = cash + units * market.bars.close[start + 400], env.episode()
    assert episode["equity"].numpy() == pytest.approx(equity, rel=1e-9)
    assert episode["turnover"].numpy() == pytest.approx(turnover, rel=1e-9)
    assert np.abs(rewards - np.log(equity) + 3e-4 * w_cost.numpy() * turnover).max() < 1e-9
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


@pytest.mark.parametrize("changes", [
    dict(fundingRate=0.5), dict(fundingRate=np.nan), dict(fundingTime=1_700_000_000), dict(fundingTime="soon"),
    dict(fundingTime="2019-02-01T00:00:00"), dict(fundingTime="2031-01-01T00:00Z"), dict(rate=1e-4)], ids=str)
def test_a_strange_file_of_funding_is_refused_in_one_line(market, tmp_path, changes):
    times = pd.DatetimeIndex(market.bars.timestamp[:1]).strftime("%Y-%m-%dT%H:%M:%SZ")
    path = funding_file(tmp_path / "strange.csv", times, [1e-4])
    assert load_funding(path, market.bars)[0].sum() == 1e-4
    pd.read_csv(path).assign(**changes).to_csv(path, index=False)
    refusal(DataError, load_funding, path, market.bars, words=["strange.csv"])


@pytest.mark.slow
def test_drift_mode_is_the_accounting_of_a_back_testing_library(make, market):
    import vectorbt as vbt

    n, cost = 3, 7e-4
    start, stop = market.rows["train"]
    env = make(n, episode_length=10**6, fee_bps=6.0, position_mode="drift")
    env.reset(seed=1)
    at(env, start, w_cost=0.0)
    close = market.bars.close[start : stop + 1]
    actions = draws(stop - start, n, seed=5)
    actions[:, 1] = np.abs(actions[:, 1])  # lane 1 is long or flat, lane 2 short or flat, lane 0 both
    actions[:, 2] = -np.abs(actions[:, 2])
    equity, shares = np.ones((len(close), n)), np.zeros((len(close), n))
    for t, action in enumerate(actions, 1):
        *_, truncated = env.step_lanes(torch.from_numpy(action))
        state = (env.last if truncated.all() else env.state).numpy()
        equity[t] = state[tqc.EQUITY]
        shares[t] = state[tqc.POSITION] * equity[t] / close[t]
    # every bar twice: its equity before the trade, then the trade; a large account, because orders
    # below 1e-12 shares count as none there
    price, size, account = np.repeat(close, 2), np.zeros((2 * len(close), n)), 1e6
    size[1:-1:2] = account * np.diff(shares, axis=0)
    for i in range(n):
        book = vbt.Portfolio.from_orders(
            price, size[:, i], price=price, fees=cost, init_cash=account, direction="both")
        assert len(book.orders.records) > 1000
        before, after = (book.value().to_numpy() / account).reshape(-1, 2).T
        np.testing.assert_allclose(before, equity[:, i], rtol=1e-9)
        np.testing.assert_allclose(shares[1:, i] * close[:-1], actions[:, i, 0] * after[:-1], atol=1e-9)
    assert np.ptp(equity[-1]) > 0.01


def check_backends(backends=("cpu", "cuda")):
    """CPU and CUDA lanes, through the whole environment; run on a device by test_kernels.py."""
    args = tqc.Args(data=DATA, **PLAIN, num_envs=5, episode_length=6, funding_bps=2.0, position_mode="drift", seed=3)
    market = tqc.load_market(args)
    envs = [tqc.MarketVectorEnv(market, market.rows["train"], args, backend) for backend in backends]
    assert data_equivalence(*(env.reset(seed=4) for env in envs))
    for t, action in enumerate(draws(18, 5)):  # three episodes
        if t == 9:
            assert data_equivalence(*(env.reset() for env in envs))
        assert data_equivalence(*(env.step(action) for env in envs))
    assert envs[1].reward.device.type == backends[1]
    envs[0].load_state_dict(envs[1].state_dict())
    assert data_equivalence(*(env.step(action) for env in envs))
