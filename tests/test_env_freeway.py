"""FreewayVectorEnv: published numbers, actions, waves, accounting, baselines."""

from functools import partial

import numpy as np
import pytest
import torch

from cleanrl_crypto import ppo_arz_gpu as arz
from cleanrl_crypto.ppo_arz_gpu import AT, Backstepping, Constant, FreewayVectorEnv, LinearController

PUBLISHED = {"waves": np.array(arz.WAVE)[:, None]}
SCHEMES = ["richtmyer", "godunov", "muscl"]


def lanes(n=3, seconds=4, **kwargs):
    return FreewayVectorEnv(n, episode_seconds=seconds, **kwargs)


def still(env):
    return torch.zeros(env.num_envs, env.actions)


def total(env, make, options=PUBLISHED):
    """Statistics of lane 0's episode."""
    env.reset(seed=0, options=options)
    act, sum_ = make(env), 0.0
    for _ in range(env.length):
        reward, terminated, truncated = env.step_lanes(act(env.observe()))
        sum_ += float(reward[0]) * env.samples
    assert truncated.all() and not terminated.any()
    stats = {k: float(x[0]) for k, x in env.stats("finals").items()}
    assert stats["episode_return"] == pytest.approx(sum_, rel=1e-9)
    return stats


# --------------------------------------------------------------------------- published numbers
@pytest.mark.parametrize("make, interval, want", [
    (Constant, 1.0, -382.4993), (Backstepping, 0.25, -263.1681),
    (partial(LinearController, kp=5.9), 1.0, -108.3205),
    (partial(LinearController, kp=5.9), 0.25, -103.9971)])
def test_the_published_scheme_gives_the_published_returns(make, interval, want):
    env = FreewayVectorEnv(1, decision_interval=interval, precision="float64")
    stats = total(env, make)
    # observations are float32, so a controller that reads them is a rounding off
    bound = 1e-4 if make is Constant else 5e-4
    assert stats["episode_return"] == pytest.approx(want, abs=bound)
    assert stats["mass_error"] < 1e-12 and stats["max_cfl"] <= 1
    single = total(FreewayVectorEnv(1, decision_interval=interval), make)
    assert single["episode_return"] == pytest.approx(want, rel=1e-4)


def test_the_published_loop_step_by_step():
    """A NumPy oracle of the scheme, one node array, written from the paper's formulas."""
    dx, dt, tau, star = arz.DX, arz.SAMPLE, arz.RELAX, arz.RHO_STAR
    big_v = lambda rho: arz.V_MAX * (1 - rho / arz.RHO_MAX)  # noqa: E731
    rho = star * (1 + 0.1 * np.sin(3 * np.pi * np.arange(51) * dx / arz.LENGTH))
    y = 1.2 - rho * big_v(rho)
    env = lanes(1, 10, control="both", decision_interval=0.25, precision="float64")
    env.reset(seed=0, options=PUBLISHED)
    rng = np.random.default_rng(1)
    for k in range(39):
        out, into = rng.uniform(-1, 1, 2)
        rho[0], rho[-1] = rho[1], rho[-2]
        y[0] = 1.2 * (1 + 0.2 * into) - rho[0] * big_v(rho[0])
        y[-1] = 1.2 * (1 + 0.2 * out) - rho[-1] * big_v(rho[-1])
        f, g = y + rho * big_v(rho), y * (y / rho + big_v(rho))
        half = (rho[1:] + rho[:-1]) / 2 - dt / 2 / dx * np.diff(f)
        half_y = (y[1:] + y[:-1]) / 2 * (1 - dt / 2 / tau) - dt / 2 / dx * np.diff(g)
        f, g = half_y + half * big_v(half), half_y * (half_y / half + big_v(half))
        rho[1:-1] -= dt / dx * np.diff(f)
        y[1:-1] += -dt / dx * np.diff(g) - dt / tau * (half_y[1:] + half_y[:-1]) / 2
        reward, _, _ = env.step_lanes(torch.tensor([[out, into]]))
        v = y / rho + big_v(rho)
        want = -np.linalg.norm(v / 10 - 1) - np.linalg.norm(rho / star - 1)
        assert float(reward[0]) == pytest.approx(want, abs=1e-10), k
    np.testing.assert_allclose(env.rows("u")[..., 0], [rho, y], atol=1e-12)


@pytest.mark.parametrize("scheme, constant, backstepping", [
    ("godunov", (-390, -360), (-200, -175)), ("muscl", (-425, -395), (-265, -240))])
def test_finite_volumes_agree_with_the_known_range(scheme, constant, backstepping):
    env = FreewayVectorEnv(1, decision_interval=0.25, scheme=scheme)
    for make, (low, high) in ((Constant, constant), (Backstepping, backstepping)):
        stats = total(env, make)
        assert low < stats["episode_return"] < high and stats["queue_veh"] == 0
        assert make is Backstepping or stats["throughput_veh"] == pytest.approx(1.2 * 240, rel=1e-5)


# ------------------------------------------------------------------------------ actions, waves
@pytest.mark.parametrize("action, control, want", [  # seconds of q* that entered and left
    ([9.0], "outlet", (1.0, 1.2)), ([-0.5], "outlet", (1.0, 0.9)), ([1.0], "inlet", (1.2, 1.0)),
    ([-1.0, 0.5], "both", (1.1, 0.8))])
def test_actions_are_clipped_and_reach_their_end(action, control, want):
    env = lanes(1, control=control, scheme="godunov")
    env.reset(seed=1)
    env.step_lanes(torch.tensor([action]))
    sums, lane = arz.Totals(*env.rows("totals")), arz.Lane(*env.rows("lane"))
    flows = [float(x / lane.q_star) for x in (sums.entered, sums.left)]
    assert flows == pytest.approx(want, rel=1e-5)


def test_training_waves_fill_their_range_and_are_no_evaluation_waves():
    test, train = FreewayVectorEnv(cases="eval"), FreewayVectorEnv(500)
    test.reset(seed=arz.EVAL_SEED)
    cases = set(test.rows("lane")[AT.rho_star].tolist())
    assert len(cases) == 101 and arz.EVAL_SEED > 2**31 - 1
    assert test.rows("lane")[AT.rho_star, 50] == pytest.approx(arz.RHO_STAR)
    for seed in (1, 2**31 - 1):  # the largest that --seed takes
        train.reset(seed=seed)
        star = train.rows("lane")[AT.rho_star].numpy()
        assert not cases & set(star.tolist()) and len(np.unique(star)) > 490
        assert [star.min(), star.max()] == pytest.approx([0.11, 0.13], abs=2e-4)
    rho = train.rows("u")[0].numpy() / star - 1
    assert 0.045 < np.abs(rho).max(0).min() and np.abs(rho).max() < 0.151
    assert np.abs(rho[0] - rho[0].mean()).max() > 0.1  # phases


def test_a_broken_lane_terminates_alone_and_starts_again():
    env = lanes(4, 10, scheme="godunov")
    env.reset(seed=1)
    env.rows("u")[0, 7, 2] = float("nan")  # one block: a view
    reward, terminated, truncated = env.step_lanes(still(env))
    assert terminated.tolist() == [False, False, True, False] and not truncated.any()
    assert reward[2] == arz.BROKEN and torch.isfinite(reward).all()
    assert torch.isfinite(env.observe()).all() and torch.isnan(env.last_observations()[2]).any()
    assert env.stats("finals")["episode_length"].tolist() == [0, 0, 1, 0]


# ------------------------------------------------------------------------------------- accounting
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["random", "opposite"])
def test_no_action_leaves_the_physical_range_or_loses_a_vehicle(scheme, kind):
    env = lanes(16, 120, control="both", scheme=scheme)
    env.reset(seed=2)
    draws = torch.Generator().manual_seed(0)
    sign = 1 - 2 * (torch.arange(16) % 2)
    densest, slowest = 0.0, 99.0
    for k in range(env.length - 1):  # lanes at the extremes are emptied or filled
        action = torch.stack([sign, -sign], 1)
        if kind == "random":
            action = 2 * torch.rand(16, 2, generator=draws) - 1
        reward, terminated, _ = env.step_lanes(action)
        assert torch.isfinite(reward).all() and not terminated.any(), k
        lane, obs = arz.Lane(*env.rows("lane")[..., None]), env.observe()
        densest = max(densest, float((lane.rho_star * (1 + obs[:, :51])).max()))
        slowest = min(slowest, float((lane.v_star * (1 + obs[:, 51:])).min()))
    waiting = arz.Lane(*env.rows("lane")).waiting.clone()
    env.step_lanes(action)
    stats = env.stats("finals")
    assert densest <= arz.RHO_MAX * 1.005 and slowest >= -1e-3
    assert float(stats["mass_error"].max()) <= 1e-5
    assert float(stats["max_cfl"].max()) <= (0.5 if scheme == "muscl" else 1 + 1e-6)
    wild = scheme != "richtmyer" and kind == "opposite"
    assert (float(waiting.max()) > 10) == wild == (float(stats["queue_veh"].max()) > 10)
    assert (float(stats["floor_veh"].max()) > 1) == (scheme == "richtmyer" and kind == "opposite")


# -------------------------------------------------------------------------- baselines, evaluation
def test_controllers_are_tuned_on_training_waves_and_order_as_known():
    train, test = FreewayVectorEnv(256), FreewayVectorEnv(cases="eval")
    makers = arz.make_controllers(train, 1e9)
    assert makers["p"].keywords["kp"] == pytest.approx(5.9, abs=1.0)
    assert list(test.splits) == ["validation", "published", "heldout"]
    result = {name: arz.evaluate(make, test)[0] for name, make in makers.items()}
    published = {name: r["published"]["episode_return"] for name, r in result.items()}
    assert published["constant"] < published["backstepping"] < published["p"]
    assert published["pi"] == pytest.approx(-107.4, abs=2)
    held = result["pi"]["heldout"]
    assert -125 < held["episode_return"] < -95 and held["std"] > 10
    # the validation waves are not the held-out ones, and every evaluation has the same cases
    assert held["episode_return"] != result["pi"]["validation"]["episode_return"]
    assert arz.evaluate(makers["pi"], test)[0] == result["pi"]
    # tuning leaves the training environment with its own random waves
    train.reset(seed=1)
    assert len(train.rows("lane")[AT.rho_star].unique()) > 250


def test_what_has_no_time_ends_with_what_it_has():
    search = arz.GainSearch(lanes(16, 10), 0.0)
    assert search.best([(k, 0.0, 0.0) for k in range(9)]) == (0, 0.0, 0.0) and not search.complete
    env = FreewayVectorEnv(cases="eval")
    result, rows, cut = arz.evaluate(Constant, env, seconds=1e-9, trace=True)
    assert cut and len(rows) == 1 and result["heldout"]["episode_return"] < 0
    assert result["heldout"]["episode_length"] == 1 and np.isnan(result["heldout"]["mass_error"])  # they were 0 and 1
    assert {"time_s", "rho_0", "v_50", "action_0", "reward"} <= set(rows[0])

