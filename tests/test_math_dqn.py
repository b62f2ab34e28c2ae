"""Targets, losses, rewards and walks of dqn_forex_subproc.py against fixtures, formulas, ledgers and SB3's DQN."""

import dataclasses
import itertools
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from cleanrl_crypto import dqn_forex_subproc as dqn
from common import markets

COLUMNS = 5  # the last one is the cost in bp
CONFIG = {
    "inputs": COLUMNS + 2, "columns": COLUMNS, "actions": 3, "hidden": 16, "dueling": False, "all_actions": True,
    "gamma": 0.9, "reward_scaling": True, "leverage": 2.0, "feature_cols": [],
}
MODES = pytest.mark.parametrize("drift", [False, True], ids=["rebalance", "drift"])


def make_pairs(bars=(300, 260), sigma=4e-3, seed=0, **changes) -> dqn.Pairs:
    """Symbols of unequal length, the second one USDXXX; costs in bp stand in the last column of the table."""
    rng = np.random.default_rng(seed)
    n, first = sum(bars), np.cumsum([0, *bars])[:-1]
    rows = {"train": np.array([[f + 5, f + b // 2] for f, b in zip(first, bars)]),
            "test": np.array([[f + b // 2 + 3, f + b - 1] for f, b in zip(first, bars)])}
    cost = rng.uniform(1e-5, 4e-4, n)
    known = dict(
        names=("EURUSD", "USDJPY")[: len(bars)], ret=rng.normal(0, sigma, n), expected=np.full(n, np.nan), cost=cost,
        table=np.column_stack([rng.normal(size=(n, COLUMNS - 1)), cost * 1e4]).astype(np.float32), rows=rows,
        swap=rng.uniform(-1e-5, 5e-5, (2, n)), flat=rng.random(n) < 0.04, day=(np.arange(n) // 11).astype(np.int32),
        inverse=np.array([False, True][: len(bars)]))
    blank = {f.name: None for f in dataclasses.fields(dqn.Pairs)}
    return dqn.Pairs(**blank | known | changes)


def make_agent(seed: int = 0, **changes) -> dqn.Agent:
    """Online and target networks that differ, a reward scale that is not 1."""
    torch.manual_seed(seed)
    agent = dqn.Agent(CONFIG | changes)
    with torch.no_grad():
        for p in agent.target.parameters():
            p += 0.2 * torch.randn_like(p)
    agent.watch_rewards(np.random.default_rng(seed).normal(0, 4e-3, 1000))
    return agent


# ---------------------------------------------------------------------------------------------------- TD target
TARGET, ONLINE = torch.tensor([[0.5, 1.0, 4.0]]), torch.tensor([[1.0, 3.0, 2.0]])


@pytest.mark.parametrize("online, expected", [(ONLINE, 1.99), (None, 4.96)], ids=["double", "plain"])
def test_td_target_fixture(online, expected):
    one = torch.ones(1)
    assert dqn.td_target(one, 0 * one, 0.99 * one, TARGET, online).item() == pytest.approx(expected, abs=1e-6)


def test_td_target_row_by_row():
    g = torch.Generator().manual_seed(1)
    reward, discount, target, online = (torch.randn(s, generator=g) for s in ((50,), (50,), (50, 4), (50, 4)))
    done = (torch.arange(50) % 3 == 0).float()
    for chosen, given in ((online, online), (target, None)):
        ours = dqn.td_target(reward, done, discount, target, given)
        for b in range(50):
            value = 0.0 if done[b] else float(discount[b]) * float(target[b, int(chosen[b].argmax())])
            assert ours[b].item() == pytest.approx(float(reward[b]) + value, abs=1e-6)


def test_no_gradient_passes_through_the_target():
    agent, pairs = make_agent(), make_pairs()
    dqn.all_action_loss(agent, dqn.Table(pairs, "cpu"), torch.arange(10, 60), True)[0].backward()
    assert all(p.grad is None for p in agent.target.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in agent.online.parameters())


# --------------------------------------------------------------------------------------------------- n-step return
def fill(replay: dqn.Replay, steps: int, seed: int = 0, ends: float = 0.25) -> list[dict]:
    """`steps` vector steps of random transitions; what each step held."""
    rng, seen = np.random.default_rng(seed), []
    n, width = replay.lanes, replay.state.shape[1]
    for t in range(steps):
        kind = rng.random(n)
        step = {"reward": rng.normal(size=n).astype(np.float32), "row": rng.integers(0, 99, n),
                "action": rng.integers(0, 3, n), "terminated": kind < ends / 2,
                "truncated": (kind >= ends / 2) & (kind < ends), "state": rng.normal(size=(n, width)),
                "next_state": rng.normal(size=(n, width))}
        for half in (slice(0, n // 2), slice(n // 2, n)):  # as --async-halves writes
            replay.put(t, half, **{k: v[half] for k, v in step.items()})
        replay.total = t + 1
        seen.append(step)
    return seen


@pytest.mark.parametrize("total", [5, 8, 21], ids=["filling", "full", "wrapped"])
@pytest.mark.parametrize("n_step", [1, 2, 5])
def test_n_step_return_equals_a_naive_loop(total, n_step):
    gamma, lanes = 0.9, 12
    replay = dqn.Replay(8 * lanes, lanes, 2)
    seen = fill(replay, total)
    times = range(max(total - 8, 0), total - n_step + 1)  # those with n_step - 1 later ones
    at = np.array([(t % 8) * lanes + lane for t in times for lane in range(lanes)])
    before = at.copy()
    summed, last, done, discount = replay.n_step_return(at, n_step, gamma)
    np.testing.assert_array_equal(at, before)
    kinds = set()
    for k, (t, lane) in enumerate(itertools.product(times, range(lanes))):
        total_reward, weight, j = 0.0, 1.0, t
        while True:
            step = seen[j]
            total_reward, weight = total_reward + weight * step["reward"][lane], weight * gamma
            end = "terminated" if step["terminated"][lane] else "truncated" if step["truncated"][lane] else ""
            if end or j == t + n_step - 1:
                break
            j += 1
        kinds.add((end, j - t))
        assert summed[k] == pytest.approx(total_reward, abs=1e-5)
        assert last[k] == (j % 8) * lanes + lane
        assert done[k] == (end == "terminated")  # a time limit bootstraps
        assert discount[k] == pytest.approx(gamma ** (j - t + 1), rel=1e-6)
    if n_step == 5 and total > 8:
        assert {("terminated", 1), ("truncated", 1), ("", 4)} <= kinds


@pytest.mark.parametrize("total, n_step", [(5, 1), (5, 3), (8, 4), (21, 1), (21, 5)])
def test_sample_draws_every_transition_with_enough_later_ones_and_no_other(total, n_step):
    lanes = 3
    replay = dqn.Replay(8 * lanes, lanes, 1)
    fill(replay, total)
    allowed = {(t % 8) * lanes + i for t in range(max(total - 8, 0), total - n_step + 1) for i in range(lanes)}
    assert set(replay.sample(np.random.default_rng(0), 5000, n_step).tolist()) == allowed


@pytest.mark.parametrize("total", [3, 8, 13], ids=["filling", "full", "wrapped"])
def test_replay_state_continues_exactly(total):
    a, b = dqn.Replay(40, 5, 2), dqn.Replay(40, 5, 2)
    fill(a, total)
    fill(b, 6, seed=9)  # what it held before is gone
    state = a.get_state()
    assert all(isinstance(v, (int, torch.Tensor)) for v in state.values())
    kept = {k: v.clone() for k, v in state.items() if k != "total"}
    b.set_state(state)
    assert len(a) == len(b) and a.total == b.total
    for _ in range(2):
        at = a.sample(np.random.default_rng(1), 300, 2)
        np.testing.assert_array_equal(at, b.sample(np.random.default_rng(1), 300, 2))
        for x, y in zip(a.n_step_return(at, 2, 0.9), b.n_step_return(at, 2, 0.9)):
            np.testing.assert_array_equal(x, y)
        for name in dqn.Replay.FIELDS:
            np.testing.assert_array_equal(getattr(a, name)[at], getattr(b, name)[at])
        for replay in (a, b):
            step = {k: np.full(getattr(replay, k)[:5].shape, 1) for k in dqn.Replay.FIELDS}
            replay.put(total, slice(0, 5), **step)
            replay.total = total + 1
    for k, v in kept.items():  # the saved state is a copy
        assert torch.equal(state[k], v), k


# ------------------------------------------------------------------------------------------- against SB3's train()
class Spaces(gym.Env):
    """Spaces for SB3, which is never asked to step."""

    def __init__(self):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (CONFIG["inputs"],), np.float32)
        self.action_space = gym.spaces.Discrete(3)


def store(pairs: dqn.Pairs, steps: int, buffer, scale: float, **rules) -> dqn.Replay:
    """Random steps of one real lane, into SB3's buffer as any environment's and into ours as the script does."""
    env = dqn.ForexVectorEnv(pairs, "train", 1, leverage=CONFIG["leverage"], **rules)
    replay, rng = dqn.Replay(steps, 1, 2), np.random.default_rng(0)
    obs, _ = env.reset(seed=3)
    row = env.row.copy()
    for t in range(steps):
        action = rng.integers(0, 3, 1)
        after, reward, terminated, truncated, info = env.step(action)
        done = terminated | truncated
        final = np.stack(info["final_obs"]) if done[0] else after
        buffer.add(obs, final, action[:, None], scale * reward, done, [{"TimeLimit.truncated": bool(truncated[0])}])
        replay.put(t, slice(0, 1), row=row, state=obs[:, -2:], action=action, reward=reward, next_state=final[:, -2:],
                   terminated=terminated, truncated=truncated)
        obs, row = after, env.row.copy()
    replay.total = steps
    env.close()
    return replay


@pytest.mark.parametrize("n_step", [1, 3])
def test_replay_loss_and_gradient_equal_sb3s(n_step):
    pairs, steps = make_pairs(sigma=1e-2), 300
    agent = make_agent(all_actions=False)
    kind, extra = ReplayBuffer, {}
    if n_step > 1:
        kind, extra = NStepReplayBuffer, {"n_steps": n_step, "gamma": CONFIG["gamma"]}
    at = np.arange(steps - n_step + 1)

    class InOrder(kind):
        """sample() is every stored transition, in order: a batch that the other side can be given too."""

        def sample(self, batch_size, env=None):
            return self._get_samples(at)

    peer = DQN("MlpPolicy", DummyVecEnv([Spaces]), buffer_size=steps, gamma=CONFIG["gamma"], max_grad_norm=1e9,
               learning_rate=1e-3, replay_buffer_class=InOrder, replay_buffer_kwargs=extra, seed=1,
               policy_kwargs={"net_arch": [16, 16], "activation_fn": nn.ReLU}, device="cpu")
    for theirs, ours in ((peer.q_net, agent.online), (peer.q_net_target, agent.target)):
        with torch.no_grad():
            for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
                p.copy_(q)
    replay = store(pairs, steps, peer.replay_buffer, agent.reward_scale, episode_length=9, daily_drawdown=0.02)
    stored = peer.replay_buffer
    assert 5 < (stored.dones * (1 - stored.timeouts)).sum() and 5 < stored.timeouts.sum()

    gradient = []
    peer.policy.optimizer.step = lambda *args: gradient.extend(p.grad.clone() for p in peer.q_net.parameters())
    logger = Logger(None, [])
    peer.set_logger(logger)
    peer.train(1, len(at))
    loss, q_mean, _ = dqn.replay_loss(agent, replay, dqn.Table(pairs, "cpu"), at, n_step, False, "cpu")
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(logger.name_to_value["train/loss"]), rel=1e-5)
    assert float(loss.detach()) > 0.01 and math.isfinite(float(q_mean))
    for p, theirs in zip(agent.online.parameters(), gradient, strict=True):
        torch.testing.assert_close(p.grad, theirs, rtol=1e-5, atol=1e-5)


def test_double_q_changes_the_loss_as_the_formula_says():
    pairs, agent = make_pairs(sigma=1e-2), make_agent(all_actions=False)
    buffer = ReplayBuffer(100, Spaces().observation_space, Spaces().action_space, n_envs=1)
    replay, at = store(pairs, 100, buffer, 1.0, episode_length=9), np.arange(100)
    data = buffer._get_samples(at)
    with torch.no_grad():
        best = agent.online(data.next_observations).argmax(1)
        value = agent.target(data.next_observations)[torch.arange(100), best]
        target = agent.reward_scale * data.rewards[:, 0] + CONFIG["gamma"] * (1 - data.dones[:, 0]) * value
        q = agent.online(data.observations).gather(1, data.actions.long())[:, 0]
        expected = nn.functional.smooth_l1_loss(q, target)
        table = dqn.Table(pairs, "cpu")
        double, plain = (dqn.replay_loss(agent, replay, table, at, 1, x, "cpu")[0] for x in (True, False))
    torch.testing.assert_close(double, expected)
    assert abs(double - plain) > 1e-4


# ---------------------------------------------------------------------------------------------- rewards, afterstates
@pytest.mark.parametrize("leverage", [0.5, 1.0, 20.0])
def test_hold_plus_move_is_the_environments_reward(leverage):
    rng, n = np.random.default_rng(0), 40
    ret, cost, long, short = rng.normal(0, 0.02, n), rng.uniform(0, 4e-4, n), *rng.uniform(-1e-4, 3e-4, (2, n))
    ret[:2] = -0.9, 0.9  # ruins a side
    tensors = [torch.from_numpy(x) for x in (ret, cost, long, short)]
    hold = dqn.hold_reward(tensors[0], *tensors[2:], leverage)
    levels = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    for last, (a, target) in itertools.product((-1.0, 0.0, 1.0), enumerate((-1.0, 0.0, 1.0))):
        move = dqn.move_reward(tensors[1] * leverage, torch.full((n,), last, dtype=torch.float64), levels)
        for t in range(n):
            factor, after, change = dqn.trade_nb(
                last, last, target, ret[t], cost[t], long[t], short[t], ret[t], leverage, False)
            assert (move[t, a] + hold[t, a]).item() == pytest.approx(math.log(factor), rel=1e-12, abs=1e-15)
            assert after == target and change == abs(target - last)


def brute_targets(reward, done, gamma, target, online, moves, forced):
    out = np.empty(reward.shape)
    for b, a in itertools.product(range(len(reward)), range(3)):
        options = [1] if forced[b] else [0, 1, 2]
        best = max(options, key=lambda j: online[b, j] + moves[b, a, j])  # noqa: B023
        out[b, a] = reward[b, a] + (0 if done[b, a] else gamma * (target[b, best] + moves[b, a, best]))
    return out


def test_all_action_target_equals_enumeration():
    rng, n = np.random.default_rng(0), 200
    reward, target, online = rng.normal(size=(3, n, 3))
    moves, done, forced = -rng.random((n, 3, 3)), rng.random((n, 3)) < 0.1, rng.random(n) < 0.2
    tensors = [torch.from_numpy(x).float() for x in (target, online, moves)]
    ours = dqn.all_action_target(torch.from_numpy(reward).float(), torch.from_numpy(done).float(), 0.9, *tensors,
                                 torch.from_numpy(forced))
    np.testing.assert_allclose(ours, brute_targets(reward, done, 0.9, target, online, moves, forced), atol=1e-5)


@pytest.mark.parametrize("double", [True, False])
def test_all_action_loss_equals_enumeration_through_the_environments_law(double):
    pairs, agent = make_pairs(), make_agent()
    pairs.ret[40], pairs.ret[41] = -0.9999, 0.9999  # at leverage 2: a long, a short is ruined
    rows, leverage, scale = np.arange(5, 130), CONFIG["leverage"], agent.reward_scale
    levels, x = (-1.0, 0.0, 1.0), torch.from_numpy(pairs.table)

    def growth(last, aim, ret, cost, long, short):
        return math.log(dqn.trade_nb(last, last, aim, ret, cost, long, short, ret, leverage, False)[0])

    hold = np.array([[growth(a, a, pairs.ret[t], 0.0, *pairs.swap[:, t]) for a in levels] for t in rows])
    moves = np.array([[[growth(a, j, 0.0, pairs.cost[t + 1], 0.0, 0.0) for j in levels] for a in levels] for t in rows])
    with torch.no_grad():
        g, target, online = agent.online(x[rows]), agent.target(x[rows + 1]).numpy(), agent.online(x[rows + 1]).numpy()
    done = hold <= math.log(dqn.LOST)
    assert done.sum() == 2 and pairs.flat[rows + 1].sum() > 2
    wanted = brute_targets(scale * hold, done, CONFIG["gamma"], target, online if double else target, scale * moves,
                           pairs.flat[rows + 1])
    loss, g_mean, target_mean = dqn.all_action_loss(agent, dqn.Table(pairs, "cpu"), torch.from_numpy(rows), double)
    expected = nn.functional.smooth_l1_loss(g.double(), torch.from_numpy(wanted))
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert float(g_mean) == pytest.approx(float(g.mean()), rel=1e-5)
    assert float(target_mean) == pytest.approx(wanted.mean(), rel=1e-4)


def observe(pairs: dqn.Pairs, rows, held) -> torch.Tensor:
    state = np.stack([held, 0 * np.asarray(held)], 1)
    return torch.from_numpy(np.concatenate([pairs.table[rows], state], 1).astype(np.float32))


def test_q_of_a_position_differs_by_the_cost_of_the_move_alone():
    """DOMAIN: the regression of Q(s, p, a) - Q(s, p', a) on the difference of the two costs has slope 1."""
    pairs, agent = make_pairs(), make_agent().double()
    rng, rows = np.random.default_rng(0), np.arange(5, 150)
    p, other = rng.uniform(-1, 1, (2, len(rows)))
    with torch.no_grad():
        q, q_other = (agent(observe(pairs, rows, held).double()).numpy() for held in (p, other))
    p, other = p.astype(np.float32).astype(float), other.astype(np.float32).astype(float)  # as they are observed
    levels, cost = np.array([-1.0, 0.0, 1.0]), pairs.table[rows, -1:].astype(float) * 1e-4 * CONFIG["leverage"]
    fees = [agent.reward_scale * np.log1p(-cost * np.abs(levels - held[:, None])) for held in (p, other)]
    change, fee = (q - q_other).ravel(), (fees[0] - fees[1]).ravel()
    assert np.std(fee) > 0.01
    slope, level = np.polyfit(fee, change, 1)
    assert slope == pytest.approx(1, abs=1e-9) and level == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(change, fee, atol=1e-9)


def test_plain_dqn_sees_its_position_and_the_afterstate_network_the_market_alone():
    pairs, rows = make_pairs(), np.arange(5, 50)
    plain, after = make_agent(all_actions=False), make_agent()
    assert plain.online.body[0].in_features == COLUMNS + 2 and after.online.body[0].in_features == COLUMNS
    short, long = (plain(observe(pairs, rows, np.full(45, p))) for p in (-1.0, 1.0))
    assert (short - long).abs().min() > 0


def test_dueling_is_value_plus_centred_advantage():
    net, x = dqn.QNetwork(4, 8, 3, True), torch.randn(20, 4)
    q, h = net(x), net.body(x)
    torch.testing.assert_close(q.mean(1, keepdim=True), net.value(h))
    torch.testing.assert_close(q - q.mean(1, keepdim=True), net.advantage(h) - net.advantage(h).mean(1, keepdim=True))


def test_reward_scale_is_the_running_standard_deviation():
    agent = dqn.Agent(CONFIG)
    assert agent.reward_scale == 1
    parts = np.split(np.random.default_rng(0).normal(3e-3, 7e-3, 1000), [1, 10, 400])
    for part in parts:
        agent.watch_rewards(part)
    assert agent.reward_scale == pytest.approx(1 / np.concatenate(parts).std(), rel=1e-9)
    again = dqn.Agent(CONFIG)
    again.load_state_dict(agent.state_dict())
    assert again.reward_scale == agent.reward_scale
    off = dqn.Agent(CONFIG | {"reward_scaling": False})
    off.watch_rewards(parts[-1])
    assert off.reward_scale == 1


# ------------------------------------------------------------------------------------------------------------- walks
@MODES
@pytest.mark.parametrize("swap", [0.0, 0.2], ids=["no-swap", "swap"])
@pytest.mark.parametrize("symbol", [0, 1], ids=["EURUSD", "USDJPY"])
def test_greedy_path_is_forwards_argmax_step_by_step(symbol, swap, drift):
    pairs, agent = make_pairs(sigma=2e-2), make_agent()
    pairs.cost[:], pairs.table[:, -1] = 4e-4, 4.0  # so dear that the position matters
    pairs.swap[:] = swap
    args = dqn.Args(position_mode="drift" if drift else "rebalance", leverage=CONFIG["leverage"])
    ours = dqn.target_paths(agent, pairs, "test", args, "cpu")[symbol]
    (a, b), held, last, path, swayed = pairs.rows["test"][symbol], 0.0, 0.0, [], 0
    with torch.no_grad():
        for t in range(a, b):
            q, from_flat = agent(observe(pairs, [t, t], [held, 0.0]))
            swayed += int(q.argmax() != from_flat.argmax())
            path.append(0.0 if pairs.flat[t] else float(q.argmax()) - 1)
            foreign = -pairs.ret[t] if pairs.inverse[symbol] else pairs.ret[t]
            _, held, _ = dqn.trade_nb(last, held, path[-1], pairs.ret[t], pairs.cost[t], *pairs.swap[:, t], foreign,
                                      CONFIG["leverage"], drift)
            last = path[-1]
    np.testing.assert_array_equal(ours, path)
    assert swayed > 5 and len(set(path)) > 1


@MODES
def test_plain_paths_are_forwards_argmax_in_the_environment(drift):
    """All pairs in one batch, with the daily drawdown limit: the real lane, put on the split's first row, agrees."""
    pairs, agent, limit = make_pairs(sigma=2e-2), make_agent(all_actions=False), 0.05
    args = dqn.Args(position_mode="drift" if drift else "rebalance", leverage=CONFIG["leverage"], all_actions=False,
                    daily_drawdown=limit)
    paths = dqn.target_paths(agent, pairs, "test", args, "cpu")
    env = dqn.ForexVectorEnv(pairs, "test", 2, leverage=CONFIG["leverage"], position_mode=args.position_mode,
                             episode_length=10**6, daily_drawdown=limit)
    env.reset(seed=0)
    stopped = 0
    for k, (a, b) in enumerate(pairs.rows["test"]):
        t, state, path, halted = a, env.get_state(), [], False
        state["ints"][:, k] = torch.tensor([a, 0, 0, 0])
        state["floats"][:, k] = torch.tensor([0.0, 1e5, 1e5, 1e5, 0, 0, 0, 0])
        env.set_state(state)
        while t < b:
            with torch.no_grad():
                action = int(agent(torch.from_numpy(env.obs[k : k + 1].copy())).argmax())
            actions = np.ones(2, int)
            actions[k] = 1 if halted else action
            path.append(0.0 if pairs.flat[t] else actions[k] - 1.0)
            _, _, terminated, _ = env.step_lanes(actions)
            halted = (halted or terminated[k]) and pairs.day[t + 1] == pairs.day[t]
            t += 1
            if terminated[k] and t < b:  # the account goes on, flat until the next day
                stopped += 1
                state = env.get_state()
                state["ints"][:, k] = torch.tensor([t, 0, 0, 0])
                state["floats"][:, k] = torch.tensor([0.0, 1e5, 1e5, 1e5, 0, 0, 0, 0])
                env.set_state(state)
        np.testing.assert_array_equal(paths[k][: len(path)], path)
    env.close()
    assert stopped > 3


class Ledger:
    """An account in dollars that holds units of the foreign currency; prices as quoted, fees and swaps in dollars."""

    def __init__(self, inverse: bool, leverage: float, drift: bool):
        self.inverse, self.leverage, self.drift = inverse, leverage, drift
        self.cash, self.units, self.last = 100_000.0, 0.0, 0.0

    def dollars(self, price):  # of one unit of foreign currency
        return 1 / price if self.inverse else price

    def equity(self, price):
        return self.cash + self.units * self.dollars(price)

    def step(self, aim, price, after, cost, long, short):
        worth, equity = self.dollars(price), self.equity(price)
        side = -1.0 if self.inverse else 1.0  # long USDJPY is short yen
        if not (self.drift and aim == self.last):
            if self.drift:  # what is left pays for reaching its own multiple
                left = equity
                for _ in range(80):
                    traded = abs(side * aim * self.leverage * left - self.units * worth)
                    left = equity - cost * traded
            else:  # by rule: the position's change, of the equity before; evened out for nothing
                left = equity * (1 - cost * self.leverage * abs(aim - self.last))
            self.units = side * aim * self.leverage * left / worth
            self.cash = left - self.units * worth
        notional = abs(self.units * worth)
        bought = self.units * side > 0
        self.cash -= notional * (long if bought else short)
        self.last = aim
        return self.equity(after)


@MODES
@pytest.mark.parametrize("leverage", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["EURUSD", "USDJPY"])
@pytest.mark.parametrize("aim", ["long", "short", "mixed"])
def test_walk_equals_an_independent_ledger(kind, aim, leverage, drift):
    n, rng = 300, np.random.default_rng(5)
    price = (1.1 if kind == "EURUSD" else 150.0) * np.exp(np.cumsum(rng.normal(0, 0.01, n + 1)))
    cost, swap = rng.uniform(1e-5, 5e-4, n), rng.uniform(-1e-4, 3e-4, (2, n)) * (rng.random(n) < 0.2)
    flat = np.arange(n) % 24 == 23  # before closed hours
    target = {"long": np.ones(n), "short": -np.ones(n),
              "mixed": np.repeat(rng.integers(-1, 2, n // 5), 5).astype(float)}[aim]
    ret, inverse = dqn.account_return(kind, price)
    reward, mean, change, held = dqn.walk_nb(
        target, ret[:n], np.full(n, np.nan), cost, swap, flat, inverse, leverage, drift)
    book, path = Ledger(kind == "USDJPY", leverage, drift), []
    for t in range(n):
        path.append(book.step(0.0 if flat[t] else target[t], price[t], price[t + 1], cost[t], *swap[:, t]))
    np.testing.assert_allclose(np.cumsum(reward), np.log(np.array(path) / 1e5), atol=1e-10)
    assert (held[flat] == 0).all() and np.isnan(mean).all()
    if not drift:
        now = np.where(flat, 0, target)
        np.testing.assert_array_equal(held, now)
        np.testing.assert_array_equal(change, np.abs(np.diff(now, prepend=0)))
    elif aim == "long" and leverage == 3.0:
        assert np.std(held[~flat]) > 1e-3  # exposure drifts with the price


def test_a_position_held_over_a_rise_earns_by_hand():
    """Half a percent up, long one: 100 000 USD hold 100 000 / 1.25 EUR; USDJPY's gain is in yen, at the new price."""
    one, off = np.ones(1), np.zeros(1, bool)
    for kind, p, q, gain in (("EURUSD", 1.25, 1.26, 80_000 * 0.01), ("USDJPY", 150.0, 151.5, 100_000 * 1.5 / 151.5)):
        ret, inverse = dqn.account_return(kind, np.array([p, q]))
        reward = dqn.walk_nb(one, ret[:1], 0 * one, 0 * one, np.zeros((2, 1)), off, inverse, 1.0, False)[0]
        assert 1e5 * math.expm1(reward[0]) == pytest.approx(gain, rel=1e-12)


def test_expected_reward_is_the_mean_of_the_realised_one():
    """mean: the same trade with the known mean of the simple return, and the fee in full."""
    target, flat = np.array([1.0, 1.0, -1.0, 0.0]), np.zeros(4, bool)
    expected, cost = np.array([1e-3, -2e-3, 5e-4, 9.0]), np.full(4, 1e-3)
    swap = np.array([[1e-4] * 4, [2e-4] * 4])
    _, mean, *_ = dqn.walk_nb(target, np.zeros(4), expected, cost, swap, flat, False, 2.0, False)
    np.testing.assert_allclose(mean, [2e-3 - 2e-4 - 2e-3, -4e-3 - 2e-4, -1e-3 - 4e-4 - 4e-3, -2e-3], atol=1e-15)


# ---------------------------------------------------------------------------------------------------------- learning
def test_all_actions_learning_reaches_the_optimum():
    """A clear signal and a dear trade."""
    args = dqn.Args(data="synthetic:signal?bars=6000&ic=.6&n_states=5&phi=.8", symbols=("EURUSD",), cost_bps=40.0,
                    feature_cols=("log_volume",), num_envs=64, batch_size=256, hidden=32)
    pairs = dqn.load_pairs(args)
    torch.manual_seed(0)
    agent = dqn.Agent(CONFIG | {"inputs": 4, "columns": 2, "hidden": 32, "leverage": 1.0, "gamma": 0.95})
    (a, b), = pairs.rows["train"]
    agent.watch_rewards(np.log1p(pairs.ret[a:b]))
    table, rng = dqn.Table(pairs, "cpu"), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(agent.online.parameters(), lr=3e-3)
    for k in range(500):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - k / 500)
        loss, *_ = dqn.all_action_loss(agent, table, torch.from_numpy(rng.integers(a, b, 256)), True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch._foreach_lerp_(list(agent.target.parameters()), list(agent.online.parameters()), 0.05)
    judge = dqn.Judge(pairs, args, "cpu")
    result, traces = judge.evaluate(agent, "test")
    start, stop = judge.series[0].rows["test"]
    path, signal = traces["EURUSD"]["position"], pairs.series[0].truth.signal[start:stop]
    assert result["agent"]["score"] > 0.97
    # at a dear price the position waits: in the middle state it is what it was
    assert {-1.0, 1.0} <= set(path[np.abs(signal) < 0.1]) and np.mean(path != np.sign(signal)) > 0.2
    best = result["baselines"]["optimum"]["mean_expected_bps"]
    # the levels' optimum is never worse than another rule of the same levels
    assert best > max(v["mean_expected_bps"] for k, v in result["baselines"].items() if k != "optimum")


def test_optimum_path_is_the_tables():
    args = dqn.Args(data="synthetic:signal?bars=1500", symbols=("EURUSD",))
    truth = dqn.load_series(args)[0].truth
    policy = markets.optimum(truth.law, 1.2e-3, actions=dqn.LEVELS)
    path, at = dqn.optimum_path(policy, truth, 100, 900), 1
    for t in range(100, 900):
        at = policy[truth.regime[t], truth.s[t], at]
        assert path[t - 100] == dqn.LEVELS[at]
    np.testing.assert_array_equal(path, markets.optimum_path(truth, 1.2e-3, 100, 900, actions=dqn.LEVELS))


# ----------------------------------------------------------------------------------------------------- kernels
def test_the_logarithm_in_line_is_the_logarithm():
    rng = np.random.default_rng(0)
    x = 1 + np.r_[rng.uniform(-0.03, 0.03, 2000), rng.normal(0, 1e-4, 1000), rng.normal(0, 1e-9, 100), 0.0, -0.02, 0.02]
    x = np.r_[x, 1e-9, 0.5, 2.0]
    want = np.log(x.astype(np.longdouble)).astype(float)
    got = np.array([dqn.log_nb(v) for v in x])
    np.testing.assert_allclose(got, want, rtol=1e-15)
    assert dqn.log_nb(1.0) == 0.0
