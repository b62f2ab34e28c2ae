"""FreewayVectorEnv: published numbers, actions, waves, accounting, baselines."""

from functools import partial

import numpy as np
import pytest
import torch

from cleanrl_crypto import ppo_arz_gpu as arz
from cleanrl_crypto.ppo_arz_gpu import AT, Backstepping, Constant, FreewayVectorEnv, LinearController

PUBLISHED = {"waves": np.array(arz.WAVE)[:, None]}
SCHEMES = ["richtmyer", "godunov", "muscl"]


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
    """A NumPy oracle of the scheme, one node array of u = (rho, y), written from the paper's formulas."""
    dx, dt, relax = arz.DX, arz.SAMPLE, np.array([[0], [arz.SAMPLE / arz.RELAX]])

    def free(rho):
        return arz.V_MAX * (1 - rho / arz.RHO_MAX)

    def change(u):
        return dt / dx * np.diff(u * (u[1] / u[0] + free(u[0])))

    rho = arz.RHO_STAR * (1 + 0.1 * np.sin(3 * np.pi * np.arange(51) * dx / arz.LENGTH))
    u = np.stack([rho, 1.2 - rho * free(rho)])
    env = FreewayVectorEnv(1, episode_seconds=10, control="both", decision_interval=0.25, precision="float64")
    env.reset(seed=0, options=PUBLISHED)
    for out, into in np.random.default_rng(1).uniform(-1, 1, (39, 2)):
        for end, near, action in ((0, 1, into), (-1, -2, out)):
            u[:, end] = u[0, near], 1.2 * (1 + 0.2 * action) - u[0, near] * free(u[0, near])
        half = (u[:, 1:] + u[:, :-1]) / 2 * (1 - relax / 2) - change(u) / 2
        u[:, 1:-1] -= change(half) + relax * (half[:, 1:] + half[:, :-1]) / 2
        reward, _, _ = env.step_lanes(torch.tensor([[out, into]]))
        v = u[1] / u[0] + free(u[0])
        want = -np.linalg.norm(v / 10 - 1) - np.linalg.norm(u[0] / arz.RHO_STAR - 1)
        assert float(reward[0]) == pytest.approx(want, abs=1e-10)
    np.testing.assert_allclose(env.rows("u")[..., 0], u, atol=1e-12)


@pytest.mark.parametrize("scheme, constant, backstepping", [
    ("godunov", (-390, -360), (-200, -175)), ("muscl", (-425, -395), (-265, -240))])
def test_finite_volumes_agree_with_the_known_range(scheme, constant, backstepping):
    env = FreewayVectorEnv(1, decision_interval=0.25, scheme=scheme)
    for make, (low, high) in ((Constant, constant), (Backstepping, backstepping)):
        stats = total(env, make)
        assert low < stats["episode_return"] < high and stats["queue_veh"] == 0
        assert make is Backstepping or stats["throughput_veh"] == pytest.approx(1.2 * 240, rel=1e-5)


@pytest.mark.parametrize("action, control, want", [  # seconds of q* that entered and left
    ([9.0], "outlet", (1.0, 1.2)), ([-0.5], "outlet", (1.0, 0.9)), ([1.0], "inlet", (1.2, 1.0)),
    ([-1.0, 0.5], "both", (1.1, 0.8))])
def test_actions_are_clipped_and_reach_their_end(action, control, want):
    env = FreewayVectorEnv(1, episode_seconds=4, control=control, scheme="godunov")
    env.reset(seed=1)
    env.step_lanes(torch.tensor([action]))
    sums, q_star = arz.Totals(*env.rows("totals")), env.rows("lane")[AT.q_star]
    assert [float(x / q_star) for x in (sums.entered, sums.left)] == pytest.approx(want, rel=1e-5)


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
    env = FreewayVectorEnv(4, episode_seconds=10, scheme="godunov")
    env.reset(seed=1)
    env.rows("u")[0, 7, 2] = float("nan")  # one block: a view
    reward, terminated, truncated = env.step_lanes(torch.zeros(4, 1))
    assert terminated.tolist() == [False, False, True, False] and not truncated.any()
    assert reward[2] == arz.BROKEN and torch.isfinite(reward).all()
    assert torch.isfinite(env.observe()).all() and torch.isnan(env.last_observations()[2]).any()
    assert env.stats("finals")["episode_length"].tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["random", "opposite"])
def test_no_action_leaves_the_physical_range_or_loses_a_vehicle(scheme, kind):
    env = FreewayVectorEnv(16, episode_seconds=120, control="both", scheme=scheme)
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
    waiting = env.rows("lane")[AT.waiting].clone()
    env.step_lanes(action)
    stats = env.stats("finals")
    assert densest <= arz.RHO_MAX * 1.005 and slowest >= -1e-3
    assert float(stats["mass_error"].max()) <= 1e-5
    assert float(stats["max_cfl"].max()) <= (0.5 if scheme == "muscl" else 1 + 1e-6)
    wild = scheme != "richtmyer" and kind == "opposite"
    assert (float(waiting.max()) > 10) == wild == (float(stats["queue_veh"].max()) > 10)
    assert (float(stats["floor_veh"].max()) > 1) == (scheme == "richtmyer" and kind == "opposite")


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
    search = arz.GainSearch(FreewayVectorEnv(16, episode_seconds=10), 0.0)
    assert search.best([(k, 0.0, 0.0) for k in range(9)]) == (0, 0.0, 0.0) and not search.complete
    env = FreewayVectorEnv(cases="eval")
    result, rows, cut = arz.evaluate(Constant, env, seconds=1e-9, trace=True)
    assert cut and len(rows) == 1 and result["heldout"]["episode_return"] < 0
    assert result["heldout"]["episode_length"] == 1 and np.isnan(result["heldout"]["mass_error"])  # they were 0 and 1
    assert {"time_s", "rho_0", "v_50", "action_0", "reward"} <= set(rows[0])
