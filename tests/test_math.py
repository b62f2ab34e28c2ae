"""Losses, targets, densities and rewards of tqc_film_batch.py against fixtures, plain formulas and
sb3-contrib."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sb3_contrib import TQC
from torch import nn
from torch.distributions import Normal, TanhTransform

from cleanrl_crypto import tqc_film_batch as tqc
from common.run import UsageError
from runs import refusal

WINDOW, TECH, ROWS, CPU = 8, 6, 400, torch.device("cpu")
CONFIG = {
    "columns": TECH, "window": WINDOW, "d_model": 16, "recency": 3.0, "fusion_width": 24,
    "hidden": 16, "dropout": 0.0, "n_critics": 2, "n_quantiles": 5, "policy": "actor",
    "log_std_init": -2.0, "alpha": 0.5, "reward_scaling": True, "gamma": 0.95,
    "costs": (2e-2, False), "penalty": 1.5e-2}
MODES = pytest.mark.parametrize("drift", [False, True], ids=["rebalance", "drift"])


def perturb(module: nn.Module, size: float, seed: int):
    """Move every parameter, so that nothing equals its initial value (FiLM, the target's copy)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += size * torch.randn(p.shape, generator=generator)


def make_agent(seed=0, **changes) -> tqc.Agent:
    torch.manual_seed(seed)
    agent = tqc.Agent(CONFIG | changes)
    for k, module in enumerate((agent.extractor, agent.critic, agent.target, agent.actor)):
        perturb(module, 0.2 if module is agent.target else 0.05, seed + k)
    agent.watch_rewards(0.25 * normal(1000, seed=seed).double())
    return agent


def make_contexts(seed=0) -> tqc.Contexts:
    """A frozen encoder over a table of noise with some bars that ruin a full long position."""
    rng = np.random.default_rng(seed)
    ret = rng.normal(0, 0.1, ROWS)
    ret[::37] = -1 + 1e-9
    table = rng.normal(size=(ROWS, TECH + tqc.HMM_COLUMNS)).astype(np.float32)
    rows = {"train": (WINDOW - 1, ROWS - 2)}
    forecast = rng.normal(size=ROWS).astype(np.float32)
    funding = rng.uniform(5e-4, 2e-3, ROWS)
    market = tqc.Market(None, None, table, ret, funding, ret, rows, WINDOW, None, None, forecast)
    torch.manual_seed(seed)
    encoder = tqc.build_encoder(CONFIG).eval().requires_grad_(False)
    encoder.mean.normal_()
    encoder.std.uniform_(0.5, 2.0)
    return tqc.Contexts(encoder, market, CPU, keep=False)


def make_batch(agent, n=64, k=1, seed=0) -> SimpleNamespace:
    """A batch of single rows, what it earns and pays (n, 1), its market and next market (n, width)."""
    rng, contexts = np.random.default_rng(seed), make_contexts(seed)
    row = rng.integers(*contexts.market.rows["train"], n)
    row[:4] = 37 * np.arange(1, 5)
    draws = [rng.uniform(-1, 1, (n, 1)), rng.uniform(-1, 1, (n, k)), rng.uniform(0, 1, (n, 1))]
    position, after, w_cost = (torch.from_numpy(x).float() for x in draws)
    after[:2] = 1.0  # through a ruinous bar
    rows = torch.from_numpy(np.stack([row, row + 1], 1))
    market, following = tqc.encode_stretches(agent.extractor, contexts, rows)
    bar = contexts.ret[rows[:, :1]], contexts.funding[rows[:, :1]]
    return SimpleNamespace(
        before=position, after=after, w_cost=w_cost, bar=bar, market=market, following=following)


def losses(agent, batch, noise=None, drop=0, next_noise=None) -> dict:
    """The three losses as the loop makes them of the script's functions, without clipping rewards."""
    c, scale = agent.config, agent.reward_scale
    with torch.no_grad():
        growth, held = tqc.hold(batch.after, *batch.bar, c["costs"][1])
        look_ahead, more = tqc.greedy_next, ()
        if c["policy"] == "actor":
            look_ahead, more = tqc.sampled_next, (next_noise,)
        atoms, log_prob = look_ahead(agent, batch.following, held, batch.w_cost, scale, *more)
        reward, done = (scale * growth.log()).flatten(), (growth <= tqc.LOST).float().flatten()
        target = tqc.tqc_target(atoms, reward, done, c["gamma"], agent.alpha, log_prob, drop)
    market = batch.market
    quantiles = agent.critic(market, batch.after, batch.w_cost)
    qf_loss = tqc.quantile_huber_loss(quantiles.flatten(0, 1), target)
    pi, log_prob, _ = tqc.sample_action(
        agent.actor, market.detach(), batch.before, batch.w_cost, noise)
    paid = scale * agent.trade_reward(batch.before, pi, batch.w_cost)
    q = agent.critic(market.detach(), pi, batch.w_cost).mean((2, 3)) + paid
    surprise = (log_prob - 1.0).detach()
    return {"critic_loss": qf_loss, "actor_loss": (agent.alpha * log_prob - q).mean(),
            "ent_coef_loss": -(agent.log_alpha * surprise).mean(), "target": target}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ------------------------------------------------------------------------------- squashed Gaussian
def test_squashed_log_prob_equals_torch_distributions():
    """Also where tanh is 1: from the action there is no way back, from the sample there is."""
    mean, xi = 3 * normal(2, 1000)
    std = 0.1 + mean.abs()
    u = (mean + std * xi).clamp(-20, 20)
    expected = Normal(mean, std).log_prob(u) - TanhTransform().log_abs_det_jacobian(u, u.tanh())
    assert (u.tanh().abs() == 1).sum() > 100
    torch.testing.assert_close(tqc.squashed_log_prob(mean, std, u), expected, rtol=1e-6, atol=1e-5)


def test_sample_action_takes_one_noise_a_row():
    agent, n = make_agent(), 4096
    market, zero = normal(1, 25).expand(n, -1), torch.zeros(n, 1)
    torch.manual_seed(1)
    action, log_prob, std = tqc.sample_action(agent.actor, market, zero, zero)
    u = torch.atanh(action.double())
    assert len(action.unique()) > n // 2
    assert u.std().item() == pytest.approx(std[0].item(), rel=0.05)
    mean, _ = agent.actor(market, zero, zero)
    expected = tqc.squashed_log_prob(mean.double(), std.double(), u)
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        agent.actor.mu.weight *= 100
    assert 4.9 < agent.actor(normal(256, 25), zero[:256], zero[:256])[0].abs().max() < 5


def test_rollouts_keep_a_noise_matrix_a_lane_until_it_is_drawn_again():
    agent, contexts, matrix = make_agent(), make_contexts(), torch.zeros(4, 16)
    state = torch.zeros(8, 4, dtype=torch.float64)
    state[tqc.ROW] = torch.tensor([50, 50, 60, 60])
    torch.manual_seed(0)
    first = tqc.explore(agent, contexts, state, matrix, True)
    kept = matrix.clone()
    assert torch.equal(first, tqc.explore(agent, contexts, state, matrix, False))
    assert first[0] != first[1] and torch.equal(matrix, kept)  # lanes of one row differ
    tqc.explore(agent, contexts, state, matrix, True)
    assert not torch.equal(matrix, kept)
    assert float(kept.std()) == pytest.approx(math.exp(-2), rel=0.4)


class PeerCritic:
    """What TQC.train() asks of a critic: our heads, and the cost of the trade."""

    def __init__(self, agent, heads):
        self.agent, self.heads, self.n_critics, self.quantiles_total = agent, heads, 2, 10
        self.optimizer, self.gradient = SimpleNamespace(zero_grad=heads.zero_grad, step=self.step), {}

    def step(self):
        self.gradient = {name: p.grad.clone() for name, p in self.heads.named_parameters()}

    def __call__(self, obs, action):
        a = self.agent
        paid = a.reward_scale * a.trade_reward(obs["position"], action, obs["w_cost"])
        return self.heads(obs["market"], action, obs["w_cost"])[:, 0] + paid[..., None]

    def parameters(self):
        return self.heads.parameters()


@pytest.mark.parametrize("drop, drift", [(0, False), (2, True)])
def test_losses_equal_sb3_contrib_s(drop, drift):
    """Critic, actor and entropy coefficient by its own train(), on the same transitions and noise."""
    agent, n = make_agent(costs=(2e-2, drift)), 64
    batch = make_batch(agent, n)
    ret, funding = batch.bar
    noise, next_noise = normal(n, 1, seed=5), normal(n, 1, seed=6)
    growth = 1 + batch.after * (ret - funding)
    done = (growth <= 0).float()
    paid = agent.trade_reward(batch.before, batch.after, batch.w_cost)
    held = batch.after * (1 + ret) / growth.clamp_min(tqc.RUIN) if drift else batch.after
    market = batch.market = batch.market.detach()
    obs = {"market": market, "position": batch.before, "w_cost": batch.w_cost}
    next_obs = {"market": batch.following, "position": held, "w_cost": batch.w_cost}
    reward = agent.reward_scale * (growth.clamp_min(tqc.RUIN).log() + paid)
    data = SimpleNamespace(
        observations=obs, actions=batch.after, next_observations=next_obs, rewards=reward, dones=done,
        discounts=None)
    logged, noises = {}, [noise, next_noise]
    idle = SimpleNamespace(zero_grad=lambda: None, step=lambda: None)

    def action_log_prob(obs):
        where = obs["market"].detach(), obs["position"], obs["w_cost"]
        pi, log_prob, _ = tqc.sample_action(agent.actor, *where, noises.pop(0))
        return pi, log_prob[:, 0]

    peer = SimpleNamespace(
        policy=SimpleNamespace(set_training_mode=lambda mode: None), _n_updates=0, use_sde=False,
        actor=SimpleNamespace(optimizer=idle, action_log_prob=action_log_prob),
        critic=PeerCritic(agent, agent.critic),
        critic_target=PeerCritic(agent, agent.target), ent_coef_optimizer=idle,
        log_ent_coef=agent.log_alpha, target_entropy=-1.0, gamma=agent.config["gamma"], tau=0.0,
        top_quantiles_to_drop_per_net=drop, target_update_interval=10, batch_norm_stats=[],
        batch_norm_stats_target=[], _update_learning_rate=lambda optimizers: None, _vec_normalize_env=None,
        replay_buffer=SimpleNamespace(sample=lambda size, env=None: data),
        logger=SimpleNamespace(record=lambda key, value, **_: logged.update({key: value})))
    TQC.train(peer, 1, n)
    gradient = peer.critic.gradient
    assert done.sum() == 2

    ours = losses(agent, batch, noise, drop, next_noise)
    for name in ("critic_loss", "actor_loss", "ent_coef_loss"):
        assert ours[name].item() == pytest.approx(float(logged[f"train/{name}"]), rel=1e-5), name
        assert abs(ours[name].item()) > 1e-2
    # the cost of the trade stands on both sides of the loss: the heads' gradients are the same
    agent.critic.zero_grad()
    ours["critic_loss"].backward()
    for name, p in agent.critic.named_parameters():
        torch.testing.assert_close(p.grad, gradient[name], rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------- greedy targets, rewards, replay
@MODES
def test_the_greedy_target_is_the_best_grid_exposure_with_its_trade_paid(drift):
    agent = make_agent(policy="critic_grid", costs=(2e-2, drift))
    batch = make_batch(agent, 16, 3)
    _, held = tqc.hold(batch.after, *batch.bar, drift)
    scale = agent.reward_scale
    atoms, log_prob = tqc.greedy_next(agent, batch.following, held, batch.w_cost, scale)
    assert atoms.shape == (48, 2, 5) and not log_prob.any()
    for n, found in enumerate(atoms):
        i, k = divmod(n, 3)
        row, candidates = slice(i, i + 1), []
        for a in agent.grid:
            z = agent.target(batch.following[row], a[None, None], batch.w_cost[row])[0, 0]
            candidates.append(z + scale * agent.trade_reward(held[i, k], a, batch.w_cost[i]))
        best = max(candidates, key=lambda z: float(z.mean()))
        torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-5)


@MODES
def test_rewards_are_those_of_the_kernels(drift):
    agent = tqc.Agent(CONFIG | {"costs": (5e-3, drift)})
    for position, target, ret, funding in 0.3 * normal(200, 4, dtype=torch.float64):
        growth, after = tqc.trade_nb(*map(float, (position, target, ret, funding)), agent.costs)
        ours, held = tqc.hold(target, ret, funding, drift)
        reward = ours.log() + agent.trade_reward(position, target, 0.7)
        penalty = CONFIG["penalty"] * 0.7 * float((target - position).abs())
        assert float(reward) == pytest.approx(math.log(growth) - penalty, rel=1e-10)
        assert float(held) == pytest.approx(after, rel=1e-12)


def test_what_ent_coef_changes():
    """Nothing in the greedy policy's targets; under policy actor it enters them, as in TQC."""
    for policy, moved in (("critic_grid", False), ("actor", True)):
        targets = []
        for alpha in (0.5, 0.01):
            agent = make_agent(policy=policy, alpha=alpha)
            targets.append(losses(agent, make_batch(agent), normal(64, 1), 0, normal(64, 1))["target"])
        assert torch.equal(*targets) != moved, policy


def test_the_slope_of_q_in_the_cost_of_the_trade_is_1():
    agent = make_agent(policy="critic_grid")
    latents, w, after = normal(64, 25), torch.rand(64, 1), agent.grid.expand(64, -1)
    here, there = torch.full((64, 1), -0.4), torch.full((64, 1), 0.9)
    q = [tqc.action_values(agent, latents, p, w) for p in (here, there)]
    paid = [agent.trade_reward(p, after, w) for p in (here, there)]
    expected = agent.reward_scale * (paid[0] - paid[1])
    torch.testing.assert_close(q[0] - q[1], expected, rtol=1e-4, atol=1e-5)
    before = agent.critic(latents, after, w)
    agent.critic.slope.data += 0.7  # and what the forecast says is linear in the exposure
    more = (agent.critic(latents, after, w) - before).mean((2, 3))
    torch.testing.assert_close(more, 0.7 * after * latents[:, -1:], rtol=1e-4, atol=1e-5)


def test_reward_scale_is_one_over_the_standard_deviation_and_no_bad_tick_s():
    agent = tqc.Agent(CONFIG)
    assert float(agent.reward_scale) == 1.0
    rewards = 0.003 + 0.01 * normal(40, 100, dtype=torch.float64)
    for part in rewards:
        agent.watch_rewards(part)
    assert float(agent.reward_scale) == pytest.approx(1 / float(rewards.std(correction=0)), rel=1e-6)
    agent.config = CONFIG | {"reward_scaling": False}
    assert float(agent.reward_scale) == 1.0
    contexts, agent = make_contexts(), tqc.Agent(CONFIG)
    ret = np.random.default_rng(0).normal(0, 0.01, ROWS)
    ret[100:102] = 99.0, -0.99
    market = replace(contexts.market, ret=ret)
    agent.watch_rewards(tqc.Contexts(contexts.encoder, market, CPU, keep=False).full_reward)
    assert float(agent.reward_scale) == pytest.approx(100, rel=0.3)  # 1, if they were taken as they are


def test_replay_gives_stretches_of_a_lane_back_and_survives_its_ring():
    rb, lanes = tqc.Replay(50, 4, CPU), 4
    for t in range(30):  # 120 transitions into 50 places; lanes are 100 rows apart
        state = torch.full((8, lanes), t / 100)
        state[tqc.ROW] = torch.arange(lanes) * 100 + t
        rb.add(state, -state[tqc.POSITION])
    assert len(rb) == 50 and rb.total == 120
    torch.manual_seed(0)
    rows, before, after, _ = rb.sample(400, 5, 2, stop=10**6)
    assert rows.shape == (80, 6) and after.shape == (400, 3)
    assert (rows.diff(dim=1) == 1).all()
    assert torch.equal(after[:, :1], -before)  # the stored exposure comes first
    other = after[:, 1:]
    assert other.min() < -0.9 and other.max() > 0.9 and abs(float(other.mean())) < 0.1
    first = rows[:, 0] % 100
    assert first.min() >= 30 - 50 / 4 - 1  # what was overwritten is gone
    stop = int(rows[:, -1].max()) - 3
    torch.manual_seed(0)
    assert rb.sample(400, 5, 2, stop)[0].max() == stop  # the next row at most


def test_stretches_encode_every_row_once_and_next_rows_without_gradient():
    agent, contexts = make_agent(), make_contexts()
    rows = torch.tensor([[50, 51, 52, 53], [90, 91, 92, 93]])
    market, following = tqc.encode_stretches(agent.extractor, contexts, rows)
    for got, wanted in ((market, rows[:, :-1]), (following, rows[:, 1:])):
        expected = agent.extractor(*contexts(wanted.flatten()))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert market.requires_grad and not following.requires_grad


# -------------------------------------------------------------------------------- averages, schedules
def test_averages_keep_no_graph():
    """A follower of weights that learn is a leaf, and the average that its formula says."""
    agent, average = make_agent(), make_agent(1).requires_grad_(False)
    weight, other = average.critic.nets[0][0].weight, agent.critic.nets[0][0].weight
    expected = 0.9 * weight + 0.1 * other.detach()
    tqc.move(average, agent, 0.1)
    assert all(p.grad_fn is None and not p.requires_grad for p in average.parameters())
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("total", [None, 100_000])
def test_learning_rates_warm_up_and_fall_to_their_end(total):
    args, end = tqc.Args(total_timesteps=total), total or tqc.SCHEDULE
    share = [tqc.learning_rate_share(tqc.Loop(step, 100), args) for step in (0, end // 2, end, 3 * end)]
    assert share == pytest.approx([1.0, 0.51, 0.02, 0.02], abs=1e-4)
    assert tqc.learning_rate_share(tqc.Loop(0, 5), args) == pytest.approx(0.25)


def test_ent_coef_is_read_as_stable_baselines3_reads_it():
    good = {"auto": 1.0, "auto_0.5": 0.5, "0.2": 0.2, "0": 0.0}
    assert {text: tqc.initial_alpha(text) for text in good} == good
    for text in ("auto_0", "-0.1", "automatic", "inf", ""):
        assert "--ent-coef" in refusal(UsageError, tqc.Args, ent_coef=text)


# ----------------------------------------------------------------------------------- FiLM and fusion
def test_split_fusion_equals_one_linear_layer_over_market_and_scalars():
    extractor, fusion = tqc.FoundationFeatureExtractor(16, 64, 48, 0.1).eval(), tqc.Fusion(48)
    perturb(extractor.film, 0.3, 0)
    perturb(fusion.norm, 0.3, 1)
    z, hmm, forecast = normal(8, 16, 64), normal(8, tqc.HMM_COLUMNS), normal(8, 1)
    position, w_cost = normal(8, 3, seed=1), normal(8, 1, seed=2)
    gamma, beta = extractor.film(hmm)[:, None].chunk(2, -1)
    flat = ((1 + gamma) * z + beta).flatten(1)
    weight = torch.cat([extractor.market.weight, fusion.scalars.weight], 1)
    split = fusion(extractor(z, hmm, forecast), position, w_cost)
    for k in range(3):
        x = torch.cat([flat, position[:, k : k + 1], w_cost, forecast], 1)
        x = nn.functional.linear(x, weight, extractor.market.bias)
        whole = nn.functional.leaky_relu(fusion.norm(x))
        torch.testing.assert_close(split[:, k], whole, rtol=0, atol=1e-5)


def test_dropout_takes_whole_channels_and_only_while_training():
    extractor = tqc.FoundationFeatureExtractor(WINDOW, 16, WINDOW * 16, 0.5)
    extractor.market = nn.Identity()
    z, hmm, forecast = torch.ones(64, WINDOW, 16), torch.zeros(64, tqc.HMM_COLUMNS), torch.zeros(64, 1)
    shown = extractor.train()(z, hmm, forecast)[:, :-1].view(z.shape)
    assert torch.equal(shown, shown[:, :1].expand_as(shown))
    assert set(shown.unique().tolist()) == {0.0, 2.0}
    assert 0.4 < float((shown == 0).float().mean()) < 0.6
    assert torch.equal(extractor.eval()(z, hmm, forecast)[:, :-1].view(z.shape), z)


def test_entropy_calls_an_actor_back_from_its_limit():
    """Without a gradient there alpha grew without end, and the exposures became NaN."""
    torch.manual_seed(0)
    actor = tqc.Actor(4, 8, -3.0)
    nn.init.constant_(actor.mu.bias, 12.0)
    _, log_prob, _ = tqc.sample_action(actor, torch.zeros(16, 5), torch.zeros(16, 2), torch.zeros(16, 1))
    log_prob.mean().backward()
    assert actor.mu.bias.grad.item() > 0.01
