"""PPO's pure functions against fixtures and Stable-Baselines3."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import DiagGaussianDistribution

from cleanrl_crypto import ppo_arz_gpu as ppo

CONFIG = dict(observations=6, actions=2, hidden=16, log_std_init=-0.5, obs_scale=2.0)


def column(*values, kind=torch.float64):
    return torch.tensor(values, dtype=kind)[:, None]


@pytest.mark.parametrize("final, want", [
    (None, [0.5198, -0.4, 3.209057, 1.394]),  # a new episode begins at step 2: after a broken lane's termination
    (0.7, [1.1715665, 0.293, 3.209057, 1.394])])  # after a truncation, its final state is worth .7
def test_gae_fixtures(final, want):
    reward, value = column(1, 0, 2, 1), column(0.5, 0.4, 0.3, 0.2)
    next_value = column(0.4, final or math.nan, 0.2, 0.6)
    ended = column(0, 1, 0, 0, kind=torch.bool)
    terminated = ended if final is None else torch.zeros_like(ended)
    advantage, returns = ppo.gae(reward, value, next_value, terminated, ended, 0.99, 0.95)
    assert advantage[:, 0].tolist() == pytest.approx(want, abs=1e-6)
    assert torch.allclose(returns, advantage + value)


def test_gae_equals_stable_baselines3():
    rng = np.random.default_rng(0)
    steps, lanes = 24, 5
    box = gym.spaces.Box(-1, 1, (1,))
    buffer = RolloutBuffer(steps, box, box, "cpu", gae_lambda=0.9, gamma=0.97, n_envs=lanes)
    reward, value = (rng.normal(size=(steps, lanes)).astype(np.float32) for _ in range(2))
    starts = rng.random((steps + 1, lanes)) < 0.2
    last = torch.tensor(rng.normal(size=lanes), dtype=torch.float32)
    for t in range(steps):
        zero = np.zeros((lanes, 1), np.float32)
        value_t = torch.tensor(value[t])
        buffer.add(zero, zero, reward[t], starts[t], value_t, torch.zeros(lanes))
    buffer.compute_returns_and_advantage(last, starts[steps])
    next_value = torch.cat([torch.tensor(value[1:]), last[None]])
    ended = torch.tensor(starts[1:])
    advantage, returns = ppo.gae(
        torch.tensor(reward), torch.tensor(value), next_value, ended, ended, 0.97, 0.9)
    np.testing.assert_allclose(advantage, buffer.advantages, atol=2e-6)
    np.testing.assert_allclose(returns, buffer.returns, atol=2e-6)


def test_a_minibatchs_advantages_have_mean_0_and_deviation_1():
    advantage = ppo.normalised(torch.randn(64) * 3 + 5, 64)
    assert abs(float(advantage.mean())) < 1e-6 and float(advantage.std()) == pytest.approx(1)


def test_gaussian_equals_stable_baselines3():
    mean, action, log_std = torch.randn(7, 3), torch.randn(7, 3), torch.randn(3)
    other = DiagGaussianDistribution(3).proba_distribution(mean, log_std)
    torch.testing.assert_close(ppo.gaussian_log_prob(mean, log_std, action), other.log_prob(action))
    torch.testing.assert_close(ppo.gaussian_entropy(log_std).expand(7), other.entropy())


def test_clipping_stops_the_gradient_on_the_far_side_only():
    log_prob = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    ppo.clipped_surrogate(log_prob.exp(), advantage, 0.2).sum().backward()
    assert (log_prob.grad == 0).tolist() == [True, False, False, True]


def test_samples_have_their_density_in_rollout_and_minibatch():
    agent = ppo.Agent(**CONFIG)
    obs, noise = torch.randn(5, 6) * 9, torch.randn(5, 2)
    x = agent.normalise(obs)
    assert x.abs().max() == 10 and torch.equal(x, (obs * 2).clamp(-10, 10))
    action = agent.act(x, noise)
    torch.testing.assert_close((action - agent.act(x)) / agent.log_std.exp(), noise)
    want = (-0.5 * noise**2 + 0.5 - 0.5 * math.log(2 * math.pi)).sum(1)  # log std is -.5
    log_prob, entropy, value = agent(obs, action)
    for found in (agent.log_prob_entropy(x, action)[0], log_prob):
        torch.testing.assert_close(found, want)
    torch.testing.assert_close(value, agent.value(x))
    assert entropy.shape == (5,)


@pytest.mark.parametrize("updates, dependence, score, baselines, want", [
    (0, 0.5, -80, {"constant": -300, "pi": -100}, "untrained"),
    (9, 0.5, 9, {}, "undecided"),  # a bad CartPole, or a good one: nothing to judge it by
    (9, 0.001, -300, {"constant": -300, "pi": -100}, "collapsed"),
    (9, 0.001, -300, {"constant": -300, "pi": -300}, "constant_is_right"),
    (9, 0.5, -310, {"constant": -300, "pi": -100}, "collapsed"),
    (9, 0.5, -120, {"constant": -300, "pi": -100}, "undertrained"),
    (9, math.nan, math.nan, {"constant": -300, "pi": -100}, "collapsed"),
    (9, 0.5, -80, {"constant": -300, "pi": -100}, "healthy")])
def test_verdicts(updates, dependence, score, baselines, want):
    others = {name: {"episode_return": x} for name, x in baselines.items()}
    found, reasons = ppo.verdict(
        {"state_dependence": dependence}, {"episode_return": score}, others, updates)
    assert found == want
    # what time cut short costs less: it was called healthy
    cut = ppo.verdict({"state_dependence": dependence}, {"episode_return": score}, others, updates, partial=True)[0]
    assert cut == ("undecided" if updates else "untrained")
    assert want != "undertrained" or "pi" in " ".join(reasons)  # who beats the agent is named
