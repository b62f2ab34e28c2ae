"""Our environments in other libraries: gymnasium.make, its vectorization modes, pictures, SB3."""
import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import cleanrl_crypto.dqn_forex_subproc  # noqa: F401 (they register their environments)
import cleanrl_crypto.ppo_arz_gpu  # noqa: F401
import cleanrl_crypto.ppo_arz_signals  # noqa: F401
import cleanrl_crypto.tqc_film_batch as tqc

MARKET = dict(data="synthetic:signal?bars=2000", window=4, episode_length=8)
CASES = {  # name -> environment, its keywords, an action that is not in its space
    "market": ("Market-v0", MARKET, None),
    "forex": ("Forex-v0", dict(data="synthetic:signal?bars=2000", episode_length=8), 3),
    "freeway": ("Freeway-v0", dict(episode_seconds=4), None),
    "junction": ("Network-v0", dict(network="town1", seconds=30, joint=True), 2),
    "network": ("Network-v0", dict(seconds=30), [0, 2, 0, 0, 0]),
    "joint": ("Network-v0", dict(seconds=30, joint=True), 32),
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def make(case, **more):
    name, keywords, _ = CASES[case]
    return gym.make(f"cleanrl_crypto/{name}", **keywords, **more)


@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=pytest.mark.slow) if x in ("junction", "joint") else x for x in CASES])
def test_make(case):
    """Gymnasium's own checks, a step too early or too late, a picture that changes."""
    env = make(case, render_mode="rgb_array")
    check_env(env.unwrapped)
    fresh = make(case, render_mode="rgb_array").unwrapped
    for early in (fresh.render, lambda: fresh.step(env.action_space.sample())):
        with pytest.raises(gym.error.ResetNeeded):
            early()
    fresh.reset(seed=3)
    first, over = fresh.render(), False
    while not over:
        *_, terminated, truncated, _ = fresh.step(fresh.action_space.sample())
        over = terminated or truncated
    assert first.shape == (480, 640, 3) and first.dtype == np.uint8
    assert (fresh.render() != first).any() and (first < 128).any()
    with pytest.raises(gym.error.ResetNeeded):
        fresh.step(fresh.action_space.sample())
    wrong = CASES[case][2]
    if wrong is not None:
        fresh.reset()
        with pytest.raises(ValueError, match="action"):
            fresh.step(np.array(wrong))
    env.close(), fresh.close()


@pytest.mark.parametrize("case", ["market", pytest.param("network", marks=pytest.mark.slow)])
def test_sync_copies_are_single_environments(case):
    name, keywords, _ = CASES[case]
    envs = gym.make_vec(f"cleanrl_crypto/{name}", num_envs=2, vectorization_mode="sync", **keywords)
    one = make(case)
    obs, _ = envs.reset(seed=[5, 6])
    same, _ = one.reset(seed=6)
    for _ in range(3):
        action = envs.action_space.sample()
        obs, reward, *_ = envs.step(action)
        same, paid, *_ = one.step(action[1])
        assert reward[1] == paid
    envs.close(), one.close()


@pytest.mark.slow  # two processes import all anew
def test_async_copies_need_spawn(capfd):
    keywords = dict(num_envs=2, vectorization_mode="async", **CASES["network"][1])
    make("network").reset()  # Numba's threads run: a fork would die without a word
    with pytest.raises((EOFError, ConnectionResetError, BrokenPipeError)):
        gym.make_vec("cleanrl_crypto/Network-v0", vector_kwargs={"context": "fork"}, **keywords)
    assert 'vector_kwargs={"context": "spawn"}' in capfd.readouterr().err
    envs = gym.make_vec("cleanrl_crypto/Network-v0", vector_kwargs={"context": "spawn"}, **keywords)
    envs.reset(seed=1)
    obs, reward, *_ = envs.step(envs.action_space.sample())
    assert obs.shape == (2, 5, 61) and np.isfinite(reward).all()
    envs.close()


def test_instances_share_one_fitted_table(tmp_path, monkeypatch):
    fits = []
    fit = tqc.fit_features
    monkeypatch.setattr(tqc, "fit_features", lambda *a: fits.append(1) or fit(*a))
    bars = tqc.load_bars("synthetic:signal?bars=2000&seed=9")
    flags = dict(MARKET, data="synthetic:signal?bars=2000&seed=9")
    one, two = (gym.make_vec("cleanrl_crypto/Market-v0", num_envs=n, **flags) for n in (1, 3))
    other = gym.make_vec("cleanrl_crypto/Market-v0", num_envs=1, split_name="test", **flags)
    assert one.market is two.market is other.market and len(fits) == 1
    dearer = gym.make_vec("cleanrl_crypto/Market-v0", num_envs=1, fee_bps=9, **flags)
    assert dearer.market is not one.market and dearer.costs != one.costs and len(fits) == 2
    assert len(bars.timestamp) == 2000


def test_many_lanes_render_and_reported_returns():
    envs = gym.make_vec("cleanrl_crypto/Freeway-v0", num_envs=2, episode_seconds=4, render_mode="rgb_array")
    envs = gym.wrappers.vector.RecordEpisodeStatistics(envs)
    envs.reset(seed=1)
    for _ in range(4):
        *_, info = envs.step(np.zeros((2, 1), np.float32))
    pictures = envs.render()
    assert len(pictures) == 2 and (pictures[0] != pictures[1]).any()
    reported = info["final_info"]["episode"]["r"]  # the sum over four samples a decision
    np.testing.assert_allclose(4 * info["episode"]["r"], reported, rtol=1e-5)


SB3 = "stable_baselines3"
ROAD, START = dict(episode_seconds=4), dict(learning_starts=64)
# algorithm -> module, environment, policy, keywords of the environment, of the algorithm, of the adapter
LEARNERS = {
    "PPO": (SB3, "Freeway-v0", "MlpPolicy", ROAD, dict(n_steps=16, batch_size=64), {}),
    "SAC": (SB3, "Freeway-v0", "MlpPolicy", ROAD, START, {}),
    "TQC": ("sb3_contrib", "Market-v0", "MultiInputPolicy", MARKET, START, {}),
    "DQN": (SB3, "Network-v0", "MlpPolicy", dict(seconds=30), START, dict(joint=True)),
}
SLOW = ("SAC", "TQC")  # 10 s of CPU each


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in LEARNERS])
def test_sb3_learns_on_our_lanes(name):
    module, env, policy, keywords, algorithm, adapter = LEARNERS[name]
    library = pytest.importorskip(module, reason="the adapter is for Stable-Baselines3")
    torch.set_num_threads(1)
    from stable_baselines3.common.vec_env import VecMonitor

    from common.sb3 import LanesVecEnv

    lanes = gym.make_vec(f"cleanrl_crypto/{env}", num_envs=8, **keywords)
    envs = VecMonitor(LanesVecEnv(lanes, **adapter))
    model = getattr(library, name)(policy, envs, seed=1, policy_kwargs=dict(net_arch=[16]), **algorithm)
    before = [p.clone() for p in model.policy.parameters()]
    model.learn(300)
    assert model.num_timesteps >= 300 and len(model.ep_info_buffer) >= 8
    assert any((a != b).any() for a, b in zip(before, model.policy.parameters()))
    envs.close()


def test_the_adapter_tells_ends_apart():
    pytest.importorskip("stable_baselines3", reason="the adapter is for Stable-Baselines3")
    from common.sb3 import LanesVecEnv

    lanes = gym.make_vec("cleanrl_crypto/Forex-v0", num_envs=3, **CASES["forex"][1])
    envs = LanesVecEnv(lanes)
    envs.seed(4)
    first = envs.reset()
    for _ in range(8):
        obs, _, done, infos = envs.step(np.array([0, 1, 2]))
    envs.seed(4)
    assert done.all() and all(i["TimeLimit.truncated"] and i["episode"]["l"] == 8 for i in infos)
    assert (infos[0]["terminal_observation"] != obs[0]).any()
    np.testing.assert_array_equal(envs.reset(), first)
    envs.close()


@pytest.mark.slow  # four algorithms
def test_the_page_s_snippets_run():
    pytest.importorskip("sb3_contrib", reason="the page shows its TQC")
    torch.set_num_threads(1)
    page = (Path(__file__).parents[1] / "docs" / "other_libraries.md").read_text()
    snippets = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(snippets) == 5
    for code in snippets:
        if "__main__" not in code:  # the processes have a test above
            small = code.replace("learn(100_000)", "learn(512)").replace("range(250)", "range(3)")
            exec(small.replace('synthetic:signal"', 'synthetic:signal?bars=2000", window=4'), {})
