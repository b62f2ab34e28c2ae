"""Targets, replay, losses and walks of dqn_forex_subproc.py against formulas, ledgers and SB3's DQN."""

import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.logger import Logger
from torch import nn

from cleanrl_crypto import dqn_forex_subproc as dqn
from runs import flags_of
from test_env_forex import COLUMNS, make_pairs

CONFIG = {"inputs": COLUMNS + 1, "actions": 3, "hidden": 16, "start": 0, "scale": 1.0, "reward_scale": 250.0}
CPU = torch.device("cpu")


def network(seed=0, **changes) -> dqn.QNetwork:
    torch.manual_seed(seed)
    return dqn.QNetwork(CONFIG | changes)


def judge_of(pairs, net, **changes) -> dqn.MarketJudge:
    run = SimpleNamespace(args=dqn.Args(**changes), device=CPU)
    return dqn.MarketJudge(run, pairs, net)


# ----------------------------------------------------------------------------------------- formulas
def test_td_target_fixture():
    """Double DQN: the online network's best action, valued by the target network; plain: 4.96."""
    one = torch.ones(1)
    target, online = torch.tensor([[0.5, 1.0, 4.0]]), torch.tensor([[1.0, 3.0, 2.0]])
    assert dqn.td_target(one, 0 * one, 0.99, target, online).item() == pytest.approx(1.99)
    assert dqn.td_target(one, 0 * one, 0.99, target, target).item() == pytest.approx(4.96)
    assert dqn.td_target(one, one, 0.99, target, online).item() == 1.0


def test_schedules():
    assert [dqn.linear_schedule(1.0, 0.1, 90, t) for t in (0, 45, 90, 900)] == pytest.approx([1, 0.55, 0.1, 0.1])
    assert [dqn.cosine(t, 100) for t in (0, 50, 100, 200)] == pytest.approx([1, 0.51, 0.02, 0.02])


def test_averages_grow_no_graph():
    """The follower of a network that learns is an average of its weights, and hangs on nothing."""
    leader, follower = network(0), network(1).requires_grad_(False)
    expected = [0.9 * p + 0.1 * q.detach() for p, q in zip(follower.parameters(), leader.parameters())]
    dqn.move_towards(follower, leader, 0.1)
    for p, q in zip(follower.parameters(), expected, strict=True):
        assert p.grad_fn is None and not p.requires_grad
        torch.testing.assert_close(p, q)


def test_images_are_scaled_and_a_policy_adds_its_start():
    net = network(scale=1 / 255)
    obs = torch.full((2, COLUMNS + 1), 255.0)
    torch.testing.assert_close(net(obs), net.head(net.body(torch.ones(2, COLUMNS + 1))))
    actions = dqn.greedy(net, 5, "cpu", obs.view(2, 2, -1).numpy())
    assert actions.shape == (2,) and actions.min() >= 5


def test_reward_scale_is_the_train_rows_and_survives_a_bad_tick():
    pairs = make_pairs()
    std = dqn.full_position_std(pairs, 2.0)
    ret = np.concatenate([pairs.bars[a:b, dqn.RET] for a, b in pairs.rows["train"]])
    assert std == pytest.approx(np.log1p(2 * ret).std(), rel=1e-6)
    pairs.bars[20, dqn.RET] = 99.0
    pairs.bars[pairs.rows["test"][0, 0], dqn.RET] = 99.0  # not a train row
    assert std < dqn.full_position_std(pairs, 2.0) < 1.5 * std
    pairs.bars[:, dqn.RET] = 0.0
    assert dqn.full_position_std(pairs, 2.0) == 1.0


# ------------------------------------------------------------------------------------------- replay
@pytest.mark.parametrize("total", [5, 8, 21], ids=["filling", "full", "wrapped"])
def test_sample_draws_every_kept_transition_and_no_other(total):
    lanes, table = 4, torch.arange(300.0).view(100, 3)
    rb = dqn.Replay(8 * lanes, lanes, 1, table, CPU)
    for t in range(total + 1):  # the last one is in flight
        rb.total = t
        rb.at(t)["row"][:] = torch.arange(lanes) + 4 * t
        rb.at(t)["reward"][:] = t
    obs, action, reward, next_obs, done = rb.sample(np.random.default_rng(0), 4000)
    torch.testing.assert_close(next_obs[:, :3], obs[:, :3] + 3)  # the next row
    drawn = set(zip((obs[:, 0] / 3).tolist(), reward.tolist()))
    assert drawn == {(4.0 * t + i, t) for t in range(max(total - 8, 0), total) for i in range(lanes)}
    assert action.dtype == torch.int64 and not done.any()


def test_a_buffer_that_does_not_fit_is_refused():
    with pytest.raises(dqn.UsageError, match="--buffer-size 1000000000 .* GiB"):
        dqn.Replay(10**9, 8, 3 * 210 * 160, None, CPU)


def test_loss_and_gradient_equal_sb3s():
    """Real lanes through the collector, and into SB3's buffer as any environment's."""
    pairs, steps, gamma = make_pairs(sigma=2e-2), 300, 0.9
    env = dqn.ForexVectorEnv(pairs, "train", 1, leverage=40.0, episode_length=9)
    rb = dqn.Replay(steps, 1, 1, torch.from_numpy(pairs.table), CPU)
    collector = dqn.Collector(env, rb, SimpleNamespace(add=lambda done, stats: None))
    q_network, target_network, scale = network(0), network(1), CONFIG["reward_scale"]
    spaces = gym.make("cleanrl_crypto/Forex-v0", pairs=pairs)
    layers = {"net_arch": [16, 16], "activation_fn": nn.ReLU}
    peer = DQN("MlpPolicy", spaces, buffer_size=steps, gamma=gamma, max_grad_norm=1e9, policy_kwargs=layers)
    for theirs, ours in ((peer.q_net, q_network), (peer.q_net_target, target_network)):
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(ours.parameters()), theirs.parameters())
    env.reset(seed=3)
    buffer, rng = peer.replay_buffer, np.random.default_rng(0)
    for _ in range(steps):
        obs, action = env.obs.clone(), torch.from_numpy(rng.integers(0, 3, 1))
        collector.send(0, obs, action)
        collector.land()
        done = env.terminated | env.truncated
        after = torch.where(done[:, None], env.final_obs, env.obs)
        buffer.add(obs.numpy(), after.numpy(), action.numpy()[:, None], scale * env.reward.numpy(),
                   done.numpy(), [{"TimeLimit.truncated": bool(env.truncated[0])}])
    env.close()
    assert buffer.dones.sum() > buffer.timeouts.sum() > 5
    # every transition, in the order of their draw
    every = SimpleNamespace(integers=lambda low, high, n: np.arange(n) % high)
    buffer.sample = lambda n, env: buffer._get_samples(np.arange(n))
    gradient = []
    peer.policy.optimizer.step = lambda *args: gradient.extend(p.grad.clone() for p in peer.q_net.parameters())
    peer.set_logger(Logger(None, []))
    peer.train(1, steps)

    obs, action, reward, next_obs, done = rb.sample(every, steps)
    goes_on = done == 0
    torch.testing.assert_close(next_obs[goes_on], buffer.sample(steps, None).next_observations[goes_on])
    with torch.no_grad():  # SB3's DQN is not double
        value = target_network(next_obs)
        target = dqn.td_target(scale * reward, done, gamma, value, value)
    loss = nn.functional.smooth_l1_loss(q_network(obs).gather(1, action[:, None])[:, 0], target)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(peer.logger.name_to_value["train/loss"]), rel=1e-5)
    for p, theirs in zip(q_network.parameters(), gradient, strict=True):
        torch.testing.assert_close(p.grad, theirs, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------- walks
def test_greedy_paths_follow_the_network_and_are_flat_where_they_must():
    """What is best at a row depends on the position that the row before left."""
    pairs, net = make_pairs((1300, 1200), sigma=2e-2), network()
    for rows, (path, value) in zip(pairs.rows["test"], judge_of(pairs, net).greedy("test"), strict=True):
        at = slice(*rows)
        before = np.append(0.0, path[:-1])
        with torch.no_grad():
            q = net(torch.tensor(np.column_stack([pairs.table[at], before]), dtype=torch.float32))
        best = np.where(pairs.bars[at, dqn.FLAT] != 0, 0, q.argmax(1) - 1)
        np.testing.assert_array_equal(path, best)
        np.testing.assert_allclose(value, q.max(1).values, atol=1e-4)
        assert len(set(path)) > 1


def test_an_evaluation_sees_the_rows_that_fit_its_time():
    judge = judge_of(make_pairs((1300, 1200)), network())
    whole, part = (judge.greedy("test", s) for s in (math.inf, 20 / dqn.ROWS_PER_SECOND))
    assert [len(path) for path, _ in part] == [10, 10]
    for (a, _), (b, _) in zip(whole, part):
        np.testing.assert_array_equal(a[:10], b)


@pytest.mark.parametrize("kind, side", [("EURUSD", 1.0), ("USDJPY", -1.0)])
def test_walk_equals_an_independent_ledger(kind, side):
    """Of dollars and units of the foreign currency; long USDJPY is short yen."""
    n, leverage, rng = 300, 3.0, np.random.default_rng(5)
    price = np.exp(np.cumsum(rng.normal(0, 0.01, n + 1)))
    worth = price**side  # dollars of a foreign unit
    bars = np.zeros((n + 1, 8))
    bars[:, dqn.RET] = dqn.account_return(kind, price)
    bars[:, dqn.COST] = rng.uniform(1e-5, 5e-4, n + 1)
    bars[:, dqn.SWAP_LONG : dqn.SWAP_SHORT + 1] = rng.uniform(-1e-4, 3e-4, (n + 1, 2))
    bars[23::24, dqn.FLAT] = 1
    target = np.repeat(rng.integers(-1, 2, n // 5), 5) * 1.0
    reward, mean, change, held = dqn.walk_nb(target, bars[:n], np.full(n, np.nan), leverage)
    now = np.where(bars[:n, dqn.FLAT] != 0, 0, target)
    np.testing.assert_array_equal(held, now)
    np.testing.assert_array_equal(change, np.abs(np.diff(now, prepend=0)))
    equity, path = 100_000.0, []
    for t in range(n):
        equity *= 1 - bars[t, dqn.COST] * leverage * change[t]
        units = side * now[t] * leverage * equity / worth[t]  # rebalanced for free
        cash = equity - units * worth[t]
        night = bars[t, dqn.SWAP_LONG if now[t] > 0 else dqn.SWAP_SHORT]
        equity = cash - abs(units * worth[t]) * night + units * worth[t + 1]
        path.append(equity)
    np.testing.assert_allclose(np.cumsum(reward), np.log(np.array(path) / 1e5), atol=1e-10)
    assert np.isnan(mean).all()


def test_expected_reward_is_the_mean_of_the_realised_one():
    """The same trade with the known mean of the simple return, swap signed, the fee in full."""
    bars = np.zeros((4, 8))
    bars[:, dqn.COST], bars[:, dqn.SWAP_LONG], bars[:, dqn.SWAP_SHORT] = 1e-3, 1e-4, -2e-4
    expected = np.array([1e-3, -2e-3, 5e-4, 9.0])
    _, mean, *_ = dqn.walk_nb(np.array([1.0, 1.0, -1.0, 0.0]), bars, expected, 2.0)
    wanted = [2e-3 - 2e-4 - 2e-3, -4e-3 - 2e-4, -1e-3 + 4e-4 - 4e-3, -2e-3]
    np.testing.assert_allclose(mean, wanted, atol=1e-15)


def test_metrics_of_an_account_and_of_the_optimum():
    times = pd.date_range("2024-01-01", periods=4, freq="h", tz="UTC")
    growth = np.array([0.02, -0.03, 0.0, 0.01])
    frame = pd.DataFrame({"growth": growth, "mean": 2e-4, "change": [1.0, 0, 2, 0], "held": [1.0, 1, -1, -1]}, times)
    optimum = frame.assign(mean=4e-4)
    agent = dqn.metrics_of(pd.concat({"agent": frame, "optimum": optimum}, axis=1), 100.0)["agent"]
    assert agent["total_return"] == pytest.approx(np.prod(1 + growth) - 1) and agent["score"] == pytest.approx(0.5)
    assert agent["expected_growth_bps"] == pytest.approx(2.0 - 1e4 * growth.var() / 2)


# ----------------------------------------------------------------------------------------- learning
def test_a_clear_signal_is_learned_to_the_optimum(tmp_path):
    """A dear trade: in the middle state the position waits where it was."""
    changes = dict(
        data="synthetic:signal?bars=4000&ic=.6&n_states=5&phi=.8", symbols=("EURUSD",), cost_bps=40,
        feature_cols="log_volume", num_envs=64, batch_size=256, total_timesteps=40_000, learning_starts=1024,
        learning_rate=3e-3, weight_decay=0.01, tau=0.05, vec_mode="single", torch_threads=1, cuda=False, report=False)
    summary = dqn.main(flags_of(changes, tmp_path / "run"))
    assert summary["eval"]["test"]["agent"]["score"] > 0.95
    baselines = summary["eval"]["test"]["baselines"]
    best = baselines.pop("optimum")["mean_expected_bps"]
    assert best > max(metrics["mean_expected_bps"] for metrics in baselines.values())
    assert abs(summary["audit"]["overestimation"]) < 3 and summary["audit"]["verdict"] == "healthy"
