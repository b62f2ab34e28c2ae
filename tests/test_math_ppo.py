"""PPO's pure functions against fixtures and Stable-Baselines3."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import DiagGaussianDistribution, MultiCategoricalDistribution

from cleanrl_crypto import ppo_arz_gpu as ppo

CONFIG = {"observations": 6, "actions": 2, "choices": [], "hidden": 16, "log_std_init": -0.5, "obs_scale": 2.0}


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("final, want", [
    (None, [0.5198, -0.4, 3.209057, 1.394]), (0.7, [1.1715665, 0.293, 3.209057, 1.394])])
def test_gae_fixtures(final, want):
    """A new episode begins at step 2: after a termination, or after a truncation whose final state is worth .7."""
    reward, value = column(1, 0, 2, 1), column(0.5, 0.4, 0.3, 0.2)
    next_value = column(0.4, final or 0.3, 0.2, 0.6)
    terminated = column(0, 0 if final else 1, 0, 0)
    advantage, returns = ppo.gae(reward, value, next_value, terminated, column(0, 1, 0, 0), 0.99, 0.95)
    assert advantage[:, 0].tolist() == pytest.approx(want, abs=1e-6)
    assert torch.allclose(returns, advantage + value)


def test_gae_equals_stable_baselines3():
    rng = np.random.default_rng(0)
    steps, lanes = 24, 5
    box = gym.spaces.Box(-1, 1, (1,))
    buffer = RolloutBuffer(steps, box, box, "cpu", gae_lambda=0.9, gamma=0.97, n_envs=lanes)
    reward, value = (rng.normal(size=(steps, lanes)).astype(np.float32) for _ in range(2))
    starts = (rng.random((steps + 1, lanes)) < 0.2).astype(np.float32)
    last = torch.tensor(rng.normal(size=lanes), dtype=torch.float32)
    for t in range(steps):
        zero = np.zeros((lanes, 1), np.float32)
        buffer.add(zero, zero, reward[t], starts[t], torch.tensor(value[t]), torch.zeros(lanes))
    buffer.compute_returns_and_advantage(last, starts[steps])
    next_value = torch.cat([torch.tensor(value[1:]), last[None]])
    ended = torch.tensor(starts[1:])
    advantage, returns = ppo.gae(torch.tensor(reward), torch.tensor(value), next_value, ended, ended, 0.97, 0.9)
    np.testing.assert_allclose(advantage, buffer.advantages, atol=2e-6)
    np.testing.assert_allclose(returns, buffer.returns, atol=2e-6)


def test_gaussian_equals_stable_baselines3():
    mean, action = torch.randn(7, 3), torch.randn(7, 3)
    log_std = torch.randn(3)
    other = DiagGaussianDistribution(3).proba_distribution(mean, log_std)
    torch.testing.assert_close(ppo.gaussian_log_prob(mean, log_std, action), other.log_prob(action))
    torch.testing.assert_close(ppo.gaussian_entropy(log_std).expand(7), other.entropy())


def test_factored_categorical_equals_stable_baselines3():
    choices = [3, 2, 4]
    logits = torch.randn(8, 9)
    action = torch.stack([torch.randint(n, (8,)) for n in choices], 1)
    other = MultiCategoricalDistribution(choices).proba_distribution(logits)
    log_prob, entropy = ppo.categorical_log_prob_entropy(logits, choices, action)
    torch.testing.assert_close(log_prob, other.log_prob(action))
    torch.testing.assert_close(entropy, other.entropy())


def sb3_loss(log_prob, old, advantage, value, old_value, returns, entropy, clip, clip_value, ent_coef, vf_coef):
    """stable_baselines3/ppo/ppo.py, its lines in its order."""
    ratio = torch.exp(log_prob - old)
    policy = -torch.min(advantage * ratio, advantage * torch.clamp(ratio, 1 - clip, 1 + clip)).mean()
    predicted = old_value + torch.clamp(value - old_value, -clip_value, clip_value) if clip_value else value
    return policy - ent_coef * entropy.mean() + vf_coef * torch.nn.functional.mse_loss(returns, predicted)


def test_loss_and_gradient_equal_stable_baselines3():
    """Its value loss is the mean square, ours half of it: vf_coef is twice the other's."""
    torch.manual_seed(0)
    log_prob, value = (torch.randn(64, dtype=torch.float64, requires_grad=True) for _ in range(2))
    old, advantage, old_value, returns, entropy = (torch.randn(64, dtype=torch.float64) for _ in range(5))
    ours, stats = ppo.ppo_loss(log_prob, old, advantage, value, old_value, returns, entropy, 0.2, False, 0.03, 0.8)
    theirs = sb3_loss(log_prob, old, advantage, value, old_value, returns, entropy, 0.2, None, 0.03, 0.4)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, (log_prob, value)), torch.autograd.grad(theirs, (log_prob, value))):
        torch.testing.assert_close(a, b)
    ratio = (log_prob - old).exp().detach()
    assert stats[3] == pytest.approx(float((ratio - 1 - ratio.log()).mean()))
    assert stats[4] == pytest.approx(float(((ratio - 1).abs() > 0.2).double().mean()))


def test_clipping_stops_the_gradient_on_the_far_side_only():
    old, zero = torch.zeros(4), torch.zeros(4)
    log_prob = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, _ = ppo.ppo_loss(log_prob, old, advantage, zero, zero, zero, zero, 0.2, False, 0.0, 0.0)
    grad, = torch.autograd.grad(loss, log_prob)
    assert (grad == 0).tolist() == [True, False, False, True]


def test_a_clipped_value_loss_is_never_below_the_plain_one():
    value, old, returns, zero = torch.randn(50), torch.randn(50), torch.randn(50), torch.zeros(50)
    plain, clipped = (ppo.ppo_loss(zero, zero, zero, value, old, returns, zero, 0.2, c, 0, 1)[0] for c in (False, True))
    assert clipped > plain


def test_a_minibatch_split_over_processes_has_the_same_loss():
    columns = [torch.randn(30) for _ in range(7)]
    whole, _ = ppo.ppo_loss(*columns, 0.2, True, 0.01, 0.5)
    parts = [ppo.ppo_loss(*(c[part] for c in columns), 0.2, True, 0.01, 0.5, weight=30)[0]
             for part in (slice(0, 11), slice(11, 30))]
    torch.testing.assert_close(sum(parts), whole)


def test_merged_statistics_are_those_of_all_rows():
    rows = np.random.default_rng(0).normal(3, 2, (1000, 4))
    stats = torch.zeros(3, 4, dtype=torch.float64)
    for part in np.split(rows, [1, 300, 301]):
        part = torch.tensor(part)
        ppo.merge_stats(stats, float(len(part)), part.mean(0), ((part - part.mean(0)) ** 2).sum(0))
    np.testing.assert_allclose(stats[1], rows.mean(0))
    np.testing.assert_allclose(stats[2] / stats[0], rows.var(0))


def test_normaliser_is_saved_with_the_agent():
    a, b = ppo.Agent(CONFIG), ppo.Agent(CONFIG)
    x = torch.randn(100, 6) * 5 + 3
    ppo.merge_stats(a.obs_stats, 100.0, x.double().mean(0), ((x - x.mean(0)) ** 2).double().sum(0))
    assert torch.allclose(a.normalise(x), (x * 2).clamp(-10, 10))  # the fixed scale until it is told otherwise
    a.update_obs()
    y = a.normalise(x)
    assert y.mean(0).abs().max() < 1e-5 and (y.std(0) - 1).abs().max() < 0.02
    b.load_state_dict(a.state_dict())
    assert torch.equal(b.act(b.normalise(x)), a.act(a.normalise(x)))


def test_gaussian_samples_have_their_density():
    agent = ppo.Agent(CONFIG)
    x, noise = torch.randn(5, 6), torch.randn(5, 2)
    action = agent.act(x, noise)
    torch.testing.assert_close((action - agent.act(x)) / agent.log_std.exp(), noise)
    log_prob, _ = agent.log_prob_entropy(x, action)
    want = (-0.5 * noise**2 + 0.5 - 0.5 * math.log(2 * math.pi)).sum(1)  # log std is -.5
    torch.testing.assert_close(log_prob, want)


def test_categorical_samples_have_their_frequencies():
    agent = ppo.Agent(CONFIG | {"actions": 0, "choices": [3, 2]})
    with torch.no_grad():
        agent.actor[-1].bias.copy_(torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0]))
        agent.actor[-1].weight.zero_()
        x = torch.zeros(40_000, 6)
        action = agent.act(x, torch.rand(40_000, 5, generator=torch.Generator().manual_seed(0)))
    for k, logits in enumerate(([0.0, 1.0, 2.0], [0.0, 1.0])):
        seen = np.bincount(action[:, k].numpy()) / 40_000
        np.testing.assert_allclose(seen, np.exp(logits) / np.exp(logits).sum(), atol=0.01)
    assert agent.act(x[:1]).tolist() == [[2, 1]]
