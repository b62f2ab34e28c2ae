"""Losses, targets, densities and rewards of tqc_film_batch.py against fixtures, plain formulas and sb3-contrib."""
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sb3_contrib.common.utils import quantile_huber_loss as sb3_quantile_huber_loss
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from torch import nn
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from cleanrl_crypto import tqc_film_batch as tqc
from scripts import benchmark

WINDOW, TECH, ROWS = 8, 6, 400
CONFIG = {
    "columns": TECH, "window": WINDOW, "d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 32, "recency": 3.0,
    "film": True, "fusion_width": 24, "hidden": 16, "dropout": 0.0, "n_critics": 2, "n_quantiles": 5, "drop": 0,
    "policy": "actor", "action_grid": 21, "log_std_init": -2.0, "alpha": 0.5, "ent_coef_min": 0.0,
    "reward_scaling": True, "gamma": 0.95, "cost": 2e-2, "funding": 0.0, "drift": False, "penalty": 1.5e-2,
}
MODES = pytest.mark.parametrize("drift", [False, True], ids=["rebalance", "drift"])


def perturb(module: nn.Module, size: float, seed: int):
    """Move every parameter, so that nothing equals its initial value (FiLM's identity, the target's copy)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += size * torch.randn(p.shape, generator=generator)


def make_agent(seed: int = 0, **changes) -> tqc.Agent:
    torch.manual_seed(seed)
    agent = tqc.Agent(CONFIG | changes)
    for k, module in enumerate((agent.extractor, agent.critic, agent.target, agent.actor)):
        perturb(module, 0.2 if module is agent.target else 0.05, seed + k)
    agent.watch_rewards(np.random.default_rng(seed).normal(0, 0.25, 1000))
    return agent


def make_encoder(config: dict, seed: int = 0) -> tqc.CryptoMAE:
    torch.manual_seed(seed)
    encoder = tqc.build_encoder(config).eval().requires_grad_(False)
    encoder.mean.normal_()
    encoder.std.uniform_(0.5, 2.0)
    return encoder


def make_market(seed: int = 0, columns: int = TECH, window: int = WINDOW) -> tqc.Market:
    """A table of noise with some bars that ruin a full long position."""
    rng = np.random.default_rng(seed)
    ret = rng.normal(0, 0.1, ROWS)
    ret[::37] = -1 + 1e-9
    table = rng.normal(size=(ROWS, columns + tqc.HMM_COLUMNS)).astype(np.float32)
    return tqc.Market(SimpleNamespace(sha256=""), None, table, ret, ret, {"train": (window - 1, ROWS - 2)}, window)


def make_batch(agent: tqc.Agent, n: int = 64, k: int = 1, seed: int = 0) -> tqc.Batch:
    rng, market = np.random.default_rng(seed), make_market(seed)
    row = rng.integers(*market.rows["train"], n)
    row[:4] = 37 * np.arange(1, 5)
    after = rng.uniform(-1, 1, (n, k))
    after[:2] = 1.0
    position, w_cost = rng.uniform(-1, 1, n), rng.uniform(0, 1, n)
    cost = np.full(n, agent.config["cost"])
    return benchmark.as_batch(make_encoder(agent.config), market, row, position, after, w_cost, cost)


def rules_of(agent: tqc.Agent, clip: float = 1e9) -> tuple:
    c = agent.config
    return c["funding"], c["drift"], c["penalty"], c["gamma"], clip


def critic_loss(agent, batch, noise=None, clip: float = 1e9) -> tuple:
    return tqc.critic_loss(agent, batch, rules_of(agent, clip), agent.reward_scale, noise)


def actor_loss(agent, batch, noise) -> torch.Tensor:
    market = agent.extractor(batch.z, batch.hmm)[batch.at].detach()
    return tqc.actor_loss(agent, market, batch, rules_of(agent), agent.reward_scale, noise)[0]


def normal(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ------------------------------------------------------------------------------------------------ quantile Huber
def plain_quantile_huber(current, target):
    """Dabney et al. (2018), eq. 10, written out."""
    n = current.shape[-1]
    tau = (torch.arange(n, dtype=current.dtype) + 0.5) / n
    delta = target[:, None, None, :] - current[..., None]
    huber = torch.where(delta.abs() <= 1, 0.5 * delta**2, delta.abs() - 0.5)
    return ((tau[:, None] - (delta < 0).to(current.dtype)).abs() * huber).mean()


def quantiles(seed: int, b: int = 33, c: int = 3, n: int = 7, m: int = 11, spread: float = 1.5, dtype=torch.float32):
    return spread * normal(b, c, n, seed=seed, dtype=dtype), spread * normal(b, m, seed=seed + 100, dtype=dtype)


def test_quantile_huber_fixture():
    current = torch.tensor([[[0, 0.5, 1], [0.2, 0.4, 2.5]], [[-1, 0, 1], [-0.5, 0.1, 0.3]]])
    target = torch.tensor([[0.1, 0.6, 1.4, 3], [-2, -0.1, 0.2, 0.9]])
    assert float(tqc.quantile_huber_loss(current, target)) == pytest.approx(0.22267361, abs=5e-8)


@pytest.mark.parametrize("spread", [0.1, 1.5, 30.0])
def test_quantile_huber_equals_sb3_contrib(spread):
    current, target = quantiles(1, spread=spread)
    theirs = sb3_quantile_huber_loss(current, target[:, None], sum_over_quantiles=False)
    assert float(tqc.quantile_huber_loss(current, target)) == pytest.approx(float(theirs), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("spread", [0.1, 1.5, 30.0])
def test_quantile_huber_gradient_is_autograd_of_the_formula(spread):
    current, target = quantiles(2, spread=spread, dtype=torch.float64)
    current[0, 0, 0] = target[0, 0]  # the kink
    ours, plain = (current.clone().requires_grad_() for _ in range(2))
    (3 * tqc.quantile_huber_loss(ours, target)).backward()
    (3 * plain_quantile_huber(plain, target)).backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-12, atol=1e-15)
    numerical = current[1:4].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tqc.quantile_huber_loss(x, target[1:4]), numerical)


def test_no_gradient_to_the_target():
    current, target = (x.requires_grad_() for x in quantiles(3))
    tqc.quantile_huber_loss(current, target).backward()
    assert current.grad is not None and target.grad is None


# --------------------------------------------------------------------------------------------------- TQC's target
NETS = torch.tensor([[[0, 0.5, 1], [0.2, 0.4, 2.5]]])


@pytest.mark.parametrize("done, expected", [(0.0, [0.233, 0.423, 0.613, 0.708]), (1.0, [0.1] * 4)])
def test_tqc_target_fixture(done, expected):
    reward, log_prob = torch.tensor([0.1]), torch.tensor([-0.7])
    target = tqc.tqc_target(NETS, reward, torch.tensor([done]), 0.95, 0.2, log_prob, 1)
    torch.testing.assert_close(target, torch.tensor([expected]))


@pytest.mark.parametrize("drop", [0, 1, 2])
def test_truncation_keeps_the_smallest_of_all_atoms(drop):
    atoms, _ = quantiles(4)
    b, c, n = atoms.shape
    expected = np.sort(atoms.reshape(b, -1).numpy(), 1)[:, : c * (n - drop)]
    np.testing.assert_array_equal(np.sort(tqc.truncate(atoms, drop).numpy(), 1), expected)


# ---------------------------------------------------------------------------------------------- squashed Gaussian
def test_squashed_log_prob_equals_torch_distributions():
    mean, std, xi = normal(3, 1000, dtype=torch.float64)
    std = 0.1 + std.abs()
    u = (mean + std * xi).clamp(-6, 6)
    law = TransformedDistribution(Normal(mean, std), [TanhTransform()])
    torch.testing.assert_close(tqc.squashed_log_prob(mean, std, u), law.log_prob(u.tanh()), rtol=1e-8, atol=1e-8)


def test_squashed_log_prob_far_out_in_float32():
    """tanh(20) is 1 in float32: from the action there is no way back, from the pre-tanh sample there is."""
    u = torch.tensor([-20.0, -9.0, 9.0, 20.0])
    gaussian = -0.5 * ((u.double() - 3) / 2) ** 2 - math.log(2) - 0.5 * math.log(2 * math.pi)
    expected = gaussian + 2 * torch.log(torch.cosh(u.double()))  # -log(1 - tanh^2)
    ours = tqc.squashed_log_prob(torch.full((4,), 3.0), torch.full((4,), 2.0), u)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-6)


def entropy(sigma: np.ndarray) -> np.ndarray:
    """H of tanh(u), u ~ N(0, sigma), by quadrature of -p log p over u."""
    xi = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    std = torch.from_numpy(sigma)[:, None]
    weight = torch.exp(-0.5 * xi**2)
    return -(tqc.squashed_log_prob(torch.zeros_like(std), std, std * xi) * weight / weight.sum()).sum(1).numpy()


def test_squashed_entropy_is_not_monotone_in_sigma():
    sigma = np.geomspace(0.02, 20, 4000)
    h = entropy(sigma)
    assert h.max() == pytest.approx(0.684, abs=5e-4)
    assert sigma[h.argmax()] == pytest.approx(0.874, abs=2e-3)
    assert (np.diff(h)[: h.argmax() - 1] > 0).all() and (np.diff(h)[h.argmax() + 1 :] < 0).all()
    roots = sigma[:-1][np.diff(np.sign(h + 1)) != 0]
    np.testing.assert_allclose(roots, [0.090, 2.92], atol=6e-3)


def test_target_entropy_flag_stops_at_the_maximum():
    tqc.Args(target_entropy=0.68)
    with pytest.raises(ValueError, match="--target-entropy"):
        tqc.Args(target_entropy=0.69)


def test_gsde_std_is_that_of_the_explicit_matrix():
    latent, log_std = normal(32, 16), 0.5 * normal(16, seed=1) - 1
    std = tqc.gsde_std(latent, log_std)
    covariance = latent.double() @ torch.diag((2 * log_std.double()).exp()) @ latent.double().T
    torch.testing.assert_close(std.double(), (covariance.diagonal() + 1e-6).sqrt(), rtol=1e-6, atol=0)
    matrices = normal(16, 40_000, seed=2) * log_std.exp()[:, None]
    torch.testing.assert_close((latent @ matrices).std(1), std, rtol=0.03, atol=0)
    theirs = StateDependentNoiseDistribution(1, learn_features=True, squash_output=True)
    theirs.proba_distribution_net(16, latent_sde_dim=16)
    theirs.proba_distribution(torch.zeros(32, 1), log_std[:, None], latent)
    torch.testing.assert_close(std, theirs.distribution.stddev[:, 0], rtol=1e-6, atol=0)


def test_sample_action_takes_one_noise_a_row():
    agent, n = make_agent(), 4096
    market, zero = normal(1, 24).expand(n, -1), torch.zeros(n, 1)
    torch.manual_seed(1)
    action, log_prob, std = tqc.sample_action(agent.actor, market, zero, zero)
    u = torch.atanh(action.double())
    assert len(action.unique()) > n // 2
    assert u.std().item() == pytest.approx(std[0].item(), rel=0.05)
    mean, _ = agent.actor(market, zero, zero)
    expected = tqc.squashed_log_prob(mean.double(), std.double(), u)
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------- every loss against sb3-contrib's train()
@MODES
@pytest.mark.parametrize("drop", [0, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_losses_equal_sb3_contribs(seed, drop, drift):
    """Critic, actor and entropy coefficient, on the same weights, transitions of the real environment and noise."""
    agent = make_agent(seed, drop=drop, drift=drift)
    encoder, market, n, length = make_encoder(agent.config, seed), make_market(seed), 64, 10
    fee, penalty = (agent.config[k] / tqc.BP for k in ("cost", "penalty"))
    env = tqc.MarketVectorEnv(market, market.rows["train"], n, length, fee_bps=fee, slippage_bps=0.0,
                              turnover_penalty_bps=penalty, position_mode="drift" if drift else "rebalance")
    peer = benchmark.make_peer(agent, encoder, env, n, benchmark.InOrder)
    rng = np.random.default_rng(seed)
    env.reset(seed=seed)
    env.floats[0] = rng.uniform(-1, 1, n)
    env.ints[1, ::2] = length - 1  # every second lane is truncated, which must bootstrap
    action = rng.uniform(-1, 1, n).astype(np.float32)
    env.ints[0, :3], action[:3] = (37, 74, 111), 1.0  # and these are ruined, which must not
    row, position, w_cost, cost = benchmark.store_step(peer, env, action, agent.reward_scale)
    stored = peer.replay_buffer
    assert stored.dones.sum() > n // 2 - 3 and (stored.dones * (1 - stored.timeouts)).sum() == 3
    assert len(np.unique(w_cost)) > 3

    gradient = {}
    for o in (peer.actor.optimizer, peer.ent_coef_optimizer):
        o.step = lambda *args: None
    peer.critic.optimizer.step = lambda *args: gradient.update(
        {k: p.grad.clone() for k, p in peer.critic.named_parameters() if p.grad is not None})
    theirs = benchmark.peer_losses(peer, n)
    matrix = peer.actor.action_dist.exploration_mat.detach()
    batch = benchmark.as_batch(encoder, market, row, position, action[:, None], w_cost, cost)
    ours = benchmark.our_losses(agent, batch, rules_of(agent), matrix)
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert min(abs(x) for x in ours.values()) > 1e-2  # not three zeros

    # the critic's gradient too; the actor's differs by design (one noise a row, not one matrix a batch)
    every = agent.extractor(batch.z, batch.hmm).detach()
    held = tqc.drift_position(batch.after, batch.ret[:, None], 0.0, drift)
    noise = benchmark.sde_noise(agent.actor, matrix, every[batch.next_at], held, batch.w_cost[:, None])
    critic_loss(agent, batch, noise)[0].backward()
    pairs = {"features_extractor.market.": agent.extractor, "features_extractor.fusion.": agent.critic.fusion,
             "qf0.": agent.critic.nets[0], "qf1.": agent.critic.nets[1]}
    mine = {k + name: p.grad for k, module in pairs.items() for name, p in module.named_parameters()}
    assert mine.keys() == gradient.keys()
    for name, g in mine.items():
        torch.testing.assert_close(g, gradient[name], rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_the_peer_trains_the_same_number_of_parameters():
    agent = make_agent()
    env = tqc.MarketVectorEnv(make_market(), (WINDOW - 1, ROWS - 2), 4)
    peer = benchmark.make_peer(agent, make_encoder(CONFIG), env, 4)
    theirs = [p for o in benchmark.optimizers_of(peer) for g in o.param_groups for p in g["params"]]
    assert len(theirs) == len(set(map(id, theirs)))
    ours = [p for p in agent.parameters() if p.requires_grad]
    assert sum(p.numel() for p in theirs) == sum(p.numel() for p in ours) == benchmark.count_parameters(ours)


def test_actor_mean_is_clipped_as_sb3s():
    agent, encoder = make_agent(), make_encoder(CONFIG)
    env = tqc.MarketVectorEnv(make_market(), (WINDOW - 1, ROWS - 2), 64)
    obs = {k: torch.from_numpy(v) for k, v in env.reset(seed=0)[0].items()}
    market = agent.extractor(encoder.context(obs["market"][..., :TECH]), obs["market"][:, -1, TECH:])
    with torch.no_grad():  # spread the means over [-6, 6]
        raw, _ = agent.actor(market, obs["position"], obs["w_cost"])
        gain = 6 / (raw - raw.mean()).abs().max()
        agent.actor.mu.weight *= gain
        agent.actor.mu.bias.copy_(gain * (agent.actor.mu.bias - raw.mean()))
    peer = benchmark.make_peer(agent, encoder, env, 4)
    mean, latent = agent.actor(market, obs["position"], obs["w_cost"])
    theirs, _, rest = peer.actor.get_action_dist_params(obs)
    torch.testing.assert_close(mean, theirs[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latent, rest["latent_sde"], rtol=1e-5, atol=1e-6)
    assert mean.abs().max() == 2 and (mean.abs() < 2).sum() > 10


def test_target_starts_as_a_copy_that_no_optimizer_trains():
    agent = tqc.Agent(CONFIG)
    pairs = list(zip(agent.target.parameters(), agent.critic.parameters(), strict=True))
    assert all(torch.equal(a, b) and not a.requires_grad and b.requires_grad for a, b in pairs)


def test_entropy_coefficient_gradient():
    """d/d log_alpha of SB3's loss is -(mean log pi + target): alpha grows while the entropy is below its target."""
    log_alpha, log_prob = torch.tensor(-0.7, requires_grad=True), torch.tensor([0.5, 2.5], requires_grad=True)
    tqc.ent_coef_loss(log_alpha, log_prob, -1.0).backward()
    assert float(log_alpha.grad) == pytest.approx(-0.5) and log_prob.grad is None


# ------------------------------------------------------------------------------------- what is ours: G, grid, costs
@MODES
def test_grid_target_equals_a_loop_over_rows_positions_and_actions(drift):
    """G(s, a) <- growth(a) + gamma (cost(a' -> best) + Z(s', best)), best = argmax_j of the mean; quantiles and all."""
    agent = make_agent(2, policy="critic_grid", drop=1, drift=drift, penalty=0.02, cost=0.03)
    batch = make_batch(agent, n=12, k=3)
    loss, market, stats = critic_loss(agent, batch)
    c, scale, losses = agent.config, agent.reward_scale, []
    with torch.no_grad():
        every = agent.extractor(batch.z, batch.hmm)
        torch.testing.assert_close(market, every[batch.at])
        for i, k in np.ndindex(12, 3):
            w, a, r = batch.w_cost[i].reshape(1, 1), float(batch.after[i, k]), float(batch.ret[i])
            growth = max(1 + a * r, tqc.RUIN)
            held = a * (1 + r) / growth if drift else a
            fees = [tqc.trade_nb(held, g, 0.0, c["cost"], 0.0, drift)[1] for g in agent.grid.tolist()]
            move = scale * (np.log1p(-np.array(fees)) - c["penalty"] * float(w) * np.abs(agent.grid.numpy() - held))
            values = agent.target(every[batch.next_at[i]][None], agent.grid[None], w)[0].numpy()  # (A, C, N)
            best = int(np.argmax(move + values.mean((1, 2))))
            atoms = np.sort(values[best].ravel())[: -c["n_critics"]] + move[best]
            target = scale * math.log(growth) + (0.0 if growth == tqc.RUIN else c["gamma"]) * atoms
            current = agent.critic(every[batch.at[i]][None], batch.after[i, k].reshape(1, 1), w)[:, 0]
            losses.append(float(plain_quantile_huber(current, torch.from_numpy(target).float()[None])))
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert len(set(np.round(losses, 6))) > 30 and torch.isfinite(stats).all()
    assert loss.requires_grad and not market.requires_grad  # the actor's loss does not train the market encoding


@pytest.mark.parametrize("policy", ["critic_grid", "actor"])
def test_counterfactual_exposures_are_averaged(policy):
    agent = make_agent(3, policy=policy)
    batch, noise = make_batch(agent, n=16, k=4), normal(16, 4)
    alone = [replace(batch, after=batch.after[:, k : k + 1]) for k in range(4)]
    single = [critic_loss(agent, one, noise[:, k])[0].item() for k, one in enumerate(alone)]
    assert critic_loss(agent, batch, noise.reshape(-1))[0].item() == pytest.approx(np.mean(single), rel=1e-5)
    assert np.std(single) > 1e-4


def test_rewards_are_clipped_and_counted():
    agent = make_agent(4, policy="critic_grid")
    batch = make_batch(agent, n=64)
    free, tight = (critic_loss(agent, batch, clip=clip)[2].tolist() for clip in (1e9, 0.2))
    growth = tqc.growth_reward(batch.after, batch.ret[:, None], 0.0) * agent.reward_scale
    assert free[2] == 0 and tight[2] == pytest.approx(float((growth.abs() > 0.2).float().mean())) and tight[2] > 0.1
    assert tight[3] == pytest.approx(float(growth.clamp(-0.2, 0.2).std()), rel=1e-5)


def test_actor_loss_averages_all_atoms_whatever_the_truncation():
    agents = make_agent(5, drop=0), make_agent(5, drop=2)
    batch, noise = make_batch(agents[0]), normal(64)
    actors = [actor_loss(agent, batch, noise).item() for agent in agents]
    critics = [critic_loss(agent, batch, noise)[0].item() for agent in agents]
    assert actors[0] == actors[1] and critics[0] != critics[1]


def test_cost_identity_is_exact():
    """Q(p, a) - Q(p', a) = log((1 - c|a-p|) / (1 - c|a-p'|)) in units of the scale: a slope of 1, not a learned one."""
    agent = make_agent(6, policy="critic_grid", cost=0.2, penalty=0.0)
    c, scale = agent.config["cost"], agent.reward_scale
    latents, (a, p, other) = normal(256, 24), normal(3, 256, seed=1, dtype=torch.float64).tanh()
    value = agent.critic(latents, a[:, None].float(), torch.zeros(256, 1)).mean((1, 2, 3)).detach().double()
    q, q_other = (value + scale * tqc.trade_reward(x, a, c, 0.0, False) for x in (p, other))
    exact = scale * torch.log((1 - c * (a - p).abs()) / (1 - c * (a - other).abs()))
    torch.testing.assert_close(q - q_other, exact, rtol=1e-9, atol=1e-12)
    assert np.polyfit(exact.numpy(), (q - q_other).numpy(), 1)[0] == pytest.approx(1, abs=1e-9) and exact.std() > 0.1


def q_by_hand(agent, latents, position: np.ndarray, w_cost: np.ndarray) -> np.ndarray:
    """(n, A): the critic's mean atoms at the grid, and the exact cost of going there."""
    c, grid = agent.config, agent.grid.numpy().astype(float)
    move = np.abs(grid - position[:, None])
    value = tqc.grid_values(agent, latents, torch.from_numpy(w_cost).float()[:, None]).numpy()
    return value + agent.reward_scale * (np.log(1 - c["cost"] * move) - c["penalty"] * w_cost[:, None] * move)


def index_of(agent, exposure: np.ndarray) -> np.ndarray:
    distance = np.abs(agent.grid.numpy() - exposure[:, None])
    assert distance.min(1).max() < 1e-6
    return distance.argmin(1)


@pytest.mark.parametrize("penalty", [0.0, 0.02])
def test_act_and_the_walk_take_the_argmax_of_that_q(penalty):
    agent = make_agent(7, policy="critic_grid", cost=0.05, penalty=penalty)
    perturb(agent.critic, 0.3, 7)  # values that differ by more than the costs
    n, latents = 200, 2 * normal(200, 24)
    position, w = normal(200, seed=1).tanh(), normal(200, seed=2).sigmoid()
    chosen = index_of(agent, tqc.act(agent, latents, position, w, "critic_grid").numpy())
    q = q_by_hand(agent, latents, position.numpy(), w.numpy())
    assert (q.max(1) - q[np.arange(n), chosen]).max() < 1e-5 and len(set(chosen)) > 5
    free = tqc.grid_values(agent, latents, w[:, None]).argmax(1).numpy()
    assert (chosen != free).mean() > 0.1  # and the costs decide on many rows

    path = tqc.target_path(agent, latents, np.zeros(n), 1.0, "critic_grid")
    before = np.concatenate([[0.0], path[:-1]])
    q = q_by_hand(agent, latents, before, np.ones(n))
    assert (q.max(1) - q[np.arange(n), index_of(agent, path)]).max() < 1e-5 and len(np.unique(path)) > 2


@pytest.mark.parametrize("n", [3, 21, 41, 101])
def test_flat_is_on_the_grid(n):
    """Exactly: an agent that stays out of the market must not be counted as one that trades 1e-8."""
    grid = make_agent(action_grid=n).grid.tolist()
    assert 0.0 in grid and grid[0] == -1 and grid[-1] == 1


@MODES
def test_reward_parts_equal_the_environments_scalar_function(drift):
    rng = np.random.default_rng(0)
    n, cost, funding, penalty = 2000, 7e-3, 2e-3, 3e-3
    position, target = rng.uniform(-1, 1, (2, n))
    position[:100] = target[:100]  # no trade
    target[100:200] = 1.0
    ret = rng.normal(0, 0.2, n).clip(-0.9, None)
    ret[100:110], target[110:120], ret[110:120] = -1 + 1e-9, -1.0, 1.5  # ruin, long and short
    position[120:130] = -500.0  # a short that drifted far: the fee of closing it ruins too
    factor, fee, after = np.array([tqc.trade_nb(*x, cost, funding, drift) for x in zip(position, target, ret)]).T
    kept = np.maximum(1 - fee, tqc.RUIN)
    assert (fee[:100] == 0).all() and (factor[100:120] <= tqc.RUIN).all() and (kept[120:130] == tqc.RUIN).all()
    position, target, ret = (torch.from_numpy(x) for x in (position, target, ret))
    paid = tqc.trade_reward(position, target, cost, 0.0, drift).numpy()
    growth = tqc.growth_reward(target, ret, funding).numpy()
    np.testing.assert_allclose(paid, np.log(kept), rtol=0, atol=1e-9)
    np.testing.assert_allclose(growth, np.log(factor / kept), rtol=0, atol=1e-9)
    np.testing.assert_allclose(tqc.drift_position(target, ret, funding, drift).numpy(), after, rtol=1e-9, atol=1e-12)
    fined = tqc.trade_reward(position, target, cost, penalty, drift).numpy()
    np.testing.assert_allclose(paid - fined, penalty * (target - position).abs().numpy(), rtol=1e-6, atol=1e-12)
    assert (after == target.numpy()).all() == (not drift)


# ---------------------------------------------------------------------------------------- reward scale, alpha, flags
@pytest.mark.parametrize("mean", [0.0, 5.0])
def test_running_statistics_equal_numpys(mean):
    rng, agent = np.random.default_rng(0), tqc.Agent(CONFIG)
    assert agent.reward_scale == 1.0
    batches = [rng.normal(mean, 0.01 * (1 + k), 1 + 97 * k) for k in range(12)]
    for batch in batches:
        agent.watch_rewards(batch)
    rewards = np.concatenate(batches)
    assert agent.reward_scale == pytest.approx(1 / rewards.std(), rel=1e-9)
    assert float(agent.reward_stats[1]) == pytest.approx(rewards.mean(), rel=1e-9)
    again = tqc.Agent(CONFIG)
    again.load_state_dict(agent.state_dict())
    assert again.reward_scale == agent.reward_scale != 1.0
    assert tqc.Agent(CONFIG | {"reward_scaling": False}).reward_scale == 1.0


@pytest.mark.parametrize("policy", ["critic_grid", "actor"])
def test_what_ent_coef_changes(policy):
    """Under critic_grid nothing that acts: the critic's loss and gradients are the same bits. Under actor all of it."""
    critics, actors, gradients = [], [], []
    for alpha in (0.5, 0.001):
        agent = make_agent(8, policy=policy, alpha=alpha)
        assert float(agent.alpha) == pytest.approx(alpha)
        batch, noise = make_batch(agent, k=2), normal(128)
        loss = critic_loss(agent, batch, noise)[0]
        loss.backward()
        critics.append(loss.item())
        gradients.append([p.grad.clone() for m in (agent.extractor, agent.critic) for p in m.parameters()])
        untouched = (agent.log_alpha, *agent.actor.parameters(), *agent.target.parameters())
        assert all(p.grad is None for p in untouched)
        actors.append(actor_loss(agent, batch, noise[:64]).item())
    same = all(torch.equal(a, b) for a, b in zip(*gradients)) and critics[0] == critics[1]
    assert same == (policy == "critic_grid")
    assert same or abs(critics[0] - critics[1]) > 1e-3
    assert abs(actors[0] - actors[1]) > 1e-2


def test_alpha_has_a_floor_and_no_gradient():
    assert float(make_agent(alpha=0.5, ent_coef_min=0.6).alpha) == pytest.approx(0.6)
    assert float(make_agent(alpha=0.5, ent_coef_min=0.01).alpha) == pytest.approx(0.5)
    assert float(make_agent(alpha=0.0).alpha) < 1e-20
    assert not make_agent().alpha.requires_grad


@pytest.mark.parametrize("text, learned, value", [
    ("auto", True, 1.0), ("auto_0.5", True, 0.5), ("auto_1e-2", True, 0.01), ("0.1", False, 0.1), ("1e-3", False, 1e-3),
    ("0", False, 0.0)])
def test_ent_coef_means_what_sb3_means(text, learned, value):
    assert tqc.parse_ent_coef(text) == (learned, value)


@pytest.mark.parametrize("text", [
    "auto_0", "auto_-1", "-0.1", "automatic", "auto_half", "nan", "inf", "0,5", "", "auto0.5", "auto_"])
def test_ent_coef_refuses_nonsense_in_one_line(text):
    with pytest.raises(ValueError, match="--ent-coef") as e:
        tqc.parse_ent_coef(text)
    assert "\n" not in str(e.value)
    with pytest.raises(tqc.UsageError, match="--ent-coef"):
        tqc.parse_args(tqc.Args, [f"--ent-coef={text}"])


# ----------------------------------------------------------------------------------------------------- FiLM, fusion
def test_film_is_the_identity_at_initialisation():
    torch.manual_seed(0)
    extractor = tqc.FoundationFeatureExtractor(WINDOW, 16, 24, 0.0, film=True)
    z, hmm = torch.randn(32, WINDOW, 16), torch.randn(32, tqc.HMM_COLUMNS)
    plain = extractor.market(z.flatten(1))
    torch.testing.assert_close(extractor(z, hmm), plain, rtol=0, atol=0)
    extractor(z, hmm).square().sum().backward()
    assert float(extractor.film.weight.grad.abs().max()) > 0  # an identity, not a dead end
    with torch.no_grad():
        extractor.film.bias[:16], extractor.film.bias[16:] = 0.5, -2.0  # gamma, beta
    torch.testing.assert_close(extractor(z, hmm), extractor.market((1.5 * z - 2).flatten(1)), rtol=1e-4, atol=1e-5)


def test_film_modulates_by_the_context_of_the_row():
    agent = make_agent(9)
    z, hmm = torch.randn(1, WINDOW, 16).expand(4, -1, -1), torch.eye(tqc.HMM_COLUMNS)[:4]
    gamma, beta = agent.extractor.film(hmm).chunk(2, -1)
    by_hand = torch.stack([agent.extractor.market((z[i] * (1 + gamma[i]) + beta[i]).flatten()) for i in range(4)])
    torch.testing.assert_close(agent.extractor(z, hmm), by_hand, rtol=1e-4, atol=1e-5)
    assert by_hand.std(0).max().item() > 1e-3


def test_no_film_appends_the_context():
    torch.manual_seed(0)
    extractor = tqc.FoundationFeatureExtractor(WINDOW, 16, 24, 0.0, film=False)
    z, hmm = torch.randn(4, WINDOW, 16), torch.randn(4, tqc.HMM_COLUMNS)
    torch.testing.assert_close(extractor(z, hmm), extractor.market(torch.cat([z.flatten(1), hmm], 1)))
    assert extractor.market.in_features == WINDOW * 16 + tqc.HMM_COLUMNS


@pytest.mark.parametrize("exposures", [1, 3])
def test_split_fusion_equals_one_linear_layer_of_16386_columns(exposures):
    """[market 16384, position, w_cost] -> 512, LayerNorm, LeakyReLU; the split saves repeating the market's part."""
    torch.manual_seed(0)
    extractor, fusion = tqc.FoundationFeatureExtractor(64, 256, 512, 0.1, film=True).eval(), tqc.Fusion(512)
    perturb(extractor.film, 0.3, 0)
    perturb(fusion.norm, 0.3, 1)
    b = 8
    z, hmm = torch.randn(b, 64, 256), torch.randn(b, tqc.HMM_COLUMNS)
    position, w_cost = torch.rand(b, exposures) * 2 - 1, torch.rand(b, 1)
    one = nn.Linear(16386, 512)
    with torch.no_grad():
        one.weight.copy_(torch.cat([extractor.market.weight, fusion.scalars.weight], 1))
        one.bias.copy_(extractor.market.bias)
        gamma, beta = extractor.film(hmm)[:, None].chunk(2, -1)
        flat = ((1 + gamma) * z + beta).flatten(1)
        for k in range(exposures):
            whole = nn.functional.leaky_relu(fusion.norm(one(torch.cat([flat, position[:, k : k + 1], w_cost], 1))))
            torch.testing.assert_close(fusion(extractor(z, hmm), position, w_cost)[:, k], whole, rtol=0, atol=1e-5)


def test_dropout_takes_whole_channels_and_only_while_training():
    torch.manual_seed(0)
    extractor = tqc.FoundationFeatureExtractor(WINDOW, 16, WINDOW * 16, 0.5, film=True)
    with torch.no_grad():
        extractor.market.weight.copy_(torch.eye(WINDOW * 16))
        extractor.market.bias.zero_()
    z, hmm = torch.ones(64, WINDOW, 16), torch.zeros(64, tqc.HMM_COLUMNS)
    seen = extractor.train()(z, hmm).view(64, WINDOW, 16)
    assert torch.equal(seen, seen[:, :1].expand_as(seen)) and set(seen.unique().tolist()) == {0.0, 2.0}
    assert 0.4 < float((seen == 0).float().mean()) < 0.6
    assert torch.equal(extractor.eval()(z, hmm).view_as(z), z)


def test_bf16_losses_stay_near_float32s():
    agent = make_agent(10)
    batch, noise, losses = make_batch(agent), normal(64), []
    for autocast in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with autocast:
            losses.append([critic_loss(agent, batch, noise)[0], actor_loss(agent, batch, noise)])
        assert all(x.dtype == torch.float32 for x in losses[-1])
    single, half = np.array([[x.item() for x in pair] for pair in losses])
    np.testing.assert_allclose(half, single, rtol=2e-2)
    assert (half != single).all()
