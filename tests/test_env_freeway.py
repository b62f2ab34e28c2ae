"""FreewayVectorEnv: the published numbers, autoreset, accounting, seeds, baselines, sanity checks."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_checks

from cleanrl_crypto import ppo_arz_gpu as arz
from cleanrl_crypto.ppo_arz_gpu import FreewayVectorEnv, SanityError, backstepping_law, linear_law
from common.gpu_pool import pool

PUBLISHED = {"waves": np.array(arz.WAVE)[:, None]}


def lanes(n=3, **kwargs):
    return FreewayVectorEnv(n, **({"precision": "float64", "episode_seconds": 4} | kwargs))


def total(env, make, options=PUBLISHED):
    """Return and statistics of lane 0's episode."""
    obs, _ = env.reset(seed=0, options=options)
    act, sum_ = make(env), 0.0
    for _ in range(env.length):
        obs, reward, terminated, truncated = env.step_lanes(act(obs))
        sum_ += reward[0] * env.samples
    assert truncated.all() and not terminated.any()
    stats = {k: float(v[0]) for k, v in env.final_stats.items()}
    assert stats["episode_return"] == pytest.approx(sum_, rel=1e-9)
    return stats


def constant(env):
    return lambda obs: np.zeros((env.num_envs, env.actions))


# ------------------------------------------------------------------------------------------ published numbers
@pytest.mark.parametrize("make, interval, want", [
    (constant, 1.0, -382.4993), (backstepping_law, 0.25, -263.1681),
    (lambda env: linear_law(env, 5.9), 1.0, -108.3205), (lambda env: linear_law(env, 5.9), 0.25, -103.9971)])
def test_the_published_scheme_gives_the_published_returns(make, interval, want):
    env = FreewayVectorEnv(1, decision_interval=interval, precision="float64")
    stats = total(env, make)
    # observations are float32, so a law that reads them is a rounding off
    assert stats["episode_return"] == pytest.approx(want, abs=1e-4 if make is constant else 5e-4)
    assert stats["mass_error"] < 1e-12 and stats["max_cfl"] <= 1
    single = total(FreewayVectorEnv(1, decision_interval=interval), make)
    assert single["episode_return"] == pytest.approx(want, rel=1e-4)


def test_random_actions_are_as_bad_as_published():
    env = FreewayVectorEnv(24, decision_interval=0.25)
    env.reset(seed=0, options={"waves": np.repeat(np.array(arz.WAVE)[:, None], 24, 1)})
    rng = np.random.default_rng(0)
    for _ in range(env.length):
        env.step_lanes(rng.uniform(-1, 1, (24, 1)))
    returns = env.final_stats["episode_return"]
    assert returns.mean() == pytest.approx(-711, abs=60) and 40 < returns.std() < 100


def test_the_published_loop_step_by_step():
    """A NumPy oracle of the scheme, one node array, written from the paper's formulas."""
    dx, dt, tau, star = arz.DX, arz.SAMPLE, arz.RELAX, arz.RHO_STAR
    big_v = lambda rho: arz.V_MAX * (1 - rho / arz.RHO_MAX)  # noqa: E731
    rho = star * (1 + 0.1 * np.sin(3 * np.pi * np.arange(51) * dx / arz.LENGTH))
    y = 1.2 - rho * big_v(rho)
    env = FreewayVectorEnv(1, control="both", decision_interval=0.25, episode_seconds=10, precision="float64")
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
        _, reward, _, _ = env.step_lanes([[out, into]])
        v = y / rho + big_v(rho)
        want = -np.linalg.norm(v / 10 - 1) - np.linalg.norm(rho / star - 1)
        assert reward[0] == pytest.approx(want, abs=1e-10), k
    np.testing.assert_allclose(env.u[0, :, :, 0], [rho, y], atol=1e-12)


@pytest.mark.parametrize("scheme, constant_low, constant_high, back_low, back_high", [
    ("godunov", -390, -360, -200, -175), ("muscl", -425, -395, -265, -240)])
def test_finite_volumes_agree_with_the_known_range(scheme, constant_low, constant_high, back_low, back_high):
    env = FreewayVectorEnv(1, decision_interval=0.25, precision="float64", scheme=scheme)
    stats = total(env, constant)
    assert constant_low < stats["episode_return"] < constant_high
    assert stats["throughput_veh"] == pytest.approx(1.2 * 240, rel=1e-9)
    assert back_low < total(env, backstepping_law)["episode_return"] < back_high


# ------------------------------------------------------------------------------------------ Gymnasium's rules
def test_gymnasium_accepts_it():
    gymnasium_checks(gym.make("cleanrl_crypto/Freeway-v0", episode_seconds=5).unwrapped, skip_render_check=True)
    env = gym.make_vec("cleanrl_crypto/Freeway-v0", num_envs=3, control="both", scheme="godunov", episode_seconds=5)
    assert env.action_space.shape == (3, 2) and env.observation_space.shape == (3, 102)
    obs, _ = env.reset(seed=1)
    assert env.observation_space.contains(obs)
    assert env.metadata["autoreset_mode"] == gym.vector.AutoresetMode.SAME_STEP


@pytest.mark.parametrize("scheme", ["richtmyer", "godunov", "muscl"])
def test_autoreset_sequence_is_exact(scheme):
    env = lanes(scheme=scheme)
    first, _ = env.reset(seed=5)
    action = np.full((3, 1), 0.3)
    for k in range(1, 9):
        obs, reward, terminated, truncated, info = env.step(action)
        assert truncated.all() == (k % 4 == 0) and not terminated.any()
        assert ("final_obs" in info) == (k % 4 == 0)
        if k == 4:
            # the final observation belongs to the episode that ended, the returned one to the next
            again = lanes(scheme=scheme, episode_seconds=5)
            again.reset(seed=5)
            for _ in range(4):
                longer, *_ = again.step(action)
            if scheme != "richtmyer":  # whose last update is left out, as published
                np.testing.assert_array_equal(np.stack(info["final_obs"]), longer)
            assert np.abs(np.stack(info["final_obs"]) - obs).max() > 1e-3
            assert np.abs(obs - first).max() > 1e-3  # another wave
            assert info["final_info"]["episode"]["l"].tolist() == [4, 4, 4]
            second = obs
    _ = env.reset(seed=5)
    np.testing.assert_array_equal(env.reset()[0], second)  # reset() goes on to the next episode
    np.testing.assert_array_equal(env.reset(seed=5)[0], first)


def test_the_reward_is_what_the_observation_says():
    env = lanes(decision_interval=0.25)
    env.reset(seed=0)
    obs, reward, *_ = env.step(np.zeros((3, 1)))
    norms = np.linalg.norm(obs[:, :51], axis=1) + np.linalg.norm(obs[:, 51:], axis=1)
    np.testing.assert_allclose(reward, -norms, rtol=1e-6)


def test_actions_are_clipped_and_reach_their_end():
    def after(action, control):
        env = lanes(1, control=control, scheme="godunov")
        env.reset(seed=1)
        env.step_lanes(np.atleast_2d(action))
        flow = env.lanes(env.totals)[5:7, 0]
        return flow / env.lanes(env.lane)[2, 0]  # vehicles in, out, in seconds of q*

    np.testing.assert_allclose(after([9.0], "outlet"), [1.0, 1.2], rtol=1e-9)
    np.testing.assert_allclose(after([-0.5], "outlet"), [1.0, 0.9], rtol=1e-9)
    np.testing.assert_allclose(after([1.0], "inlet"), [1.2, 1.0], rtol=1e-9)
    np.testing.assert_allclose(after([-1.0, 0.5], "both"), [1.1, 0.8], rtol=1e-9)


def test_an_action_that_is_not_finite_is_named():
    env = lanes()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="lane 1"):
        env.step(np.array([[0.0], [np.nan], [0.0]]))


# ------------------------------------------------------------------------------------------- seeds, lanes, state
@pytest.mark.parametrize("scheme", ["richtmyer", "muscl"])
def test_lanes_do_not_depend_on_how_many_there_are(scheme):
    many, few = (lanes(n, scheme=scheme, precision="float32") for n in (130, 5))
    np.testing.assert_array_equal(many.reset(seed=3)[0][:5], few.reset(seed=3)[0])
    shifted = lanes(5, scheme=scheme, precision="float32", lane0=70)
    np.testing.assert_array_equal(many.reset(seed=3)[0][70:75], shifted.reset(seed=3)[0])
    action = np.random.default_rng(0).uniform(-1, 1, (130, 1))
    for _ in range(5):
        a, b, c = many.step(action), few.step(action[:5]), shifted.step(action[70:75])
        np.testing.assert_array_equal(a[0][:5], b[0])
        np.testing.assert_array_equal(a[1][70:75], c[1])


def test_waves_fill_the_training_range_and_differ():
    env = FreewayVectorEnv(2000)
    env.reset(seed=0)
    star = env.lanes(env.lane)[0]
    assert star.min() == pytest.approx(0.11, abs=1e-4) and star.max() == pytest.approx(0.13, abs=1e-4)
    assert len(np.unique(star)) > 1900
    rho = env.lanes(env.u)[0] / star - 1
    assert 0.045 < np.abs(rho).max(0).min() and np.abs(rho).max() < 0.151
    assert np.abs(rho[0] - rho[0].mean()).max() > 0.1  # phases


def test_state_round_trip_continues_bit_for_bit():
    a, b = lanes(scheme="muscl"), lanes(scheme="muscl")
    a.reset(seed=1)
    for _ in range(3):
        a.step(np.full((3, 1), 0.5))
    np.testing.assert_array_equal(b.set_state(a.get_state()), a.rows(a.obs))
    for _ in range(4):
        for x, y in zip(a.step(np.full((3, 1), -0.5))[:4], b.step(np.full((3, 1), -0.5))[:4]):
            np.testing.assert_array_equal(x, y)


def test_resets_build_and_allocate_nothing_and_close_gives_back():
    env = lanes()
    builds, allocations, used = FreewayVectorEnv.builds, pool.stats()["allocations"], pool.stats()["in_use"]
    for seed in range(5):
        env.reset(seed=seed)
        env.step_lanes(np.zeros((3, 1)))
    assert FreewayVectorEnv.builds == builds and pool.stats()["allocations"] == allocations
    env.close()
    assert pool.stats()["in_use"] < used
    lanes()
    assert pool.stats()["allocations"] == allocations


def test_staggered_lanes_end_at_different_times_and_then_keep_their_length():
    env = lanes(8, precision="float64", episode_seconds=12)
    env.reset(seed=1, options={"stagger": True})
    ends = np.array([env.step_lanes(np.zeros((8, 1)))[3].copy() for _ in range(30)])
    assert len({int(np.argmax(column)) for column in ends.T}) > 3
    for column in ends.T:
        assert set(np.diff(np.flatnonzero(column))) == {12}
    env.reset(seed=1)
    one, _ = lanes(8, episode_seconds=12).reset(seed=1)
    np.testing.assert_array_equal(env.rows(env.obs), one)


# ----------------------------------------------------------------------------------------------- accounting
@pytest.mark.parametrize("scheme, precision, bound", [
    ("richtmyer", "float64", 1e-10), ("richtmyer", "float32", 1e-5), ("godunov", "float64", 1e-10),
    ("muscl", "float64", 1e-10), ("muscl", "float32", 1e-5)])
def test_mass_and_courant_under_wild_actions(scheme, precision, bound):
    env = FreewayVectorEnv(16, control="both", scheme=scheme, precision=precision, episode_seconds=240)
    env.reset(seed=2)
    for k in range(env.length):
        sign = np.where(np.arange(16) % 2, 1.0, -1.0)  # half the lanes are emptied, the others filled
        _, reward, terminated, _ = env.step_lanes(np.stack([sign, -sign], 1))
        assert np.isfinite(reward).all() and not terminated.any(), k
    stats = env.final_stats
    assert stats["mass_error"].max() <= bound
    assert stats["max_cfl"].max() <= (0.5 if scheme == "muscl" else 1 + 1e-6)


@pytest.mark.parametrize("pressure", ["gap", "power", "singular"])
def test_pressure_laws_give_different_roads(pressure):
    env = lanes(scheme="muscl", pressure=pressure, pressure_exponent=1.0, pressure_scale=20.0)
    obs, _ = env.reset(seed=0)
    for _ in range(3):
        obs, reward, *_ = env.step(np.zeros((3, 1)))
    assert np.isfinite(obs).all()
    other = lanes(scheme="muscl")
    other.reset(seed=0)
    for _ in range(3):
        gap, *_ = other.step(np.zeros((3, 1)))
    assert (np.abs(gap - obs).max() > 1e-3) == (pressure != "gap")


def test_the_published_scheme_refuses_other_laws():
    with pytest.raises(ValueError, match="richtmyer"):
        lanes(pressure="power")


# -------------------------------------------------------------------------------------- baselines, evaluation
def test_laws_are_tuned_on_training_waves_and_order_as_known():
    train = FreewayVectorEnv(1024, seed=1)
    laws, gains = arz.freeway_baselines(train)
    assert gains["p"][0] == pytest.approx(5.9, abs=1.0)
    test = FreewayVectorEnv(cases="eval", seed=1)
    assert list(test.splits) == ["validation", "published", "heldout"]
    result = {name: arz.evaluate(make, test)[0] for name, make in laws.items()}
    published = {name: r["published"]["episode_return"] for name, r in result.items()}
    assert published["constant"] < published["backstepping"] < published["p"] <= published["pi"] + 0.5
    assert published["pi"] == pytest.approx(-107.4, abs=2)
    held = result["pi"]["heldout"]
    assert -125 < held["episode_return"] < -95 and held["std"] > 10
    # the validation waves are not the held-out ones, and the same cases come back at every evaluation
    assert held["episode_return"] != result["pi"]["validation"]["episode_return"]
    assert arz.evaluate(laws["pi"], test)[0] == result["pi"]
    # tuning leaves the training environment with its own random waves
    train.reset(seed=1)
    assert len(np.unique(train.lanes(train.lane)[0])) > 1000


def test_an_evaluation_that_runs_out_of_time_says_so():
    env = FreewayVectorEnv(cases="eval")
    result, columns, partial = arz.evaluate(lambda env: lambda obs: np.zeros((101, 1)), env, seconds=1e-9, trace=True)
    assert partial and len(columns["time_s"]) == 1 and result["heldout"]["episode_return"] < 0
    assert {"rho_0", "v_50", "action_0", "reward"} <= set(columns)


# ------------------------------------------------------------------------------------------------- sanity
@pytest.mark.parametrize("scheme", ["richtmyer", "godunov"])
def test_sanity_passes_and_hands_the_environment_on(scheme):
    env = lanes(4, scheme=scheme, episode_seconds=20)
    builds = FreewayVectorEnv.builds
    arz.check_env(env, "float64", 1.0)
    assert FreewayVectorEnv.builds == builds
    fresh = lanes(4, scheme=scheme, episode_seconds=20)
    np.testing.assert_array_equal(env.reset(seed=7)[0], fresh.reset(seed=7)[0])


class Deaf(FreewayVectorEnv):
    def step_lanes(self, actions):
        return super().step_lanes(np.zeros_like(actions))


class Endless(FreewayVectorEnv):
    def step_lanes(self, actions):
        obs, reward, terminated, truncated = super().step_lanes(actions)
        return obs, reward, terminated, np.zeros_like(truncated)


class Leaky(FreewayVectorEnv):
    def stats(self, totals):
        return super().stats(totals) | {"mass_error": np.full(self.num_envs, 0.01)}


class Slow(FreewayVectorEnv):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.decision_interval = 5.0


class Flat(FreewayVectorEnv):
    def step_lanes(self, actions):
        obs, reward, *rest = super().step_lanes(actions)
        return obs, np.zeros_like(reward), *rest


@pytest.mark.parametrize("broken, words", [
    (Deaf, "two actions"), (Endless, "truncated"), (Leaky, "conserved"), (Slow, "--decision-interval"),
    (Flat, "many values")])
def test_sanity_fails_with_what_it_saw(broken, words):
    env = broken(4, precision="float64", episode_seconds=20)
    with pytest.raises(SanityError, match=words) as error:
        arz.check_env(env, "float64", 1.0)
    assert "saw" in str(error.value) and "\n" not in str(error.value)
