"""What every batched environment keeps: exact ends, lanes that know no other, seeds, states, no builds, sanity."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import cleanrl_crypto.dqn_forex_subproc  # noqa: F401 (registers its environments)
import cleanrl_crypto.tqc_film_batch  # noqa: F401
from cleanrl_crypto import ppo_arz_gpu, ppo_arz_signals
from common.gpu_pool import pool
from common.lanes import Lanes, row, to_numpy
from common.run import CheckFailed
from runs import refusal

LENGTH = 6  # decisions of an episode
MARKET = dict(data="synthetic:signal?bars=2000", window=4)
FREEWAY = dict(decision_interval=0.25)
# name -> the registered environment, its keywords, the keyword of an episode's length, its units a decision
CASES = {
    "market": ("Market-v0", MARKET, "episode_length", 1),
    "forex": ("Forex-v0", dict(data="synthetic:signal?bars=2000"), "episode_length", 1),
    "freeway": ("Freeway-v0", FREEWAY, "episode_seconds", 0.25),
    "freeway_muscl": ("Freeway-v0", FREEWAY | dict(scheme="muscl", control="both"), "episode_seconds", 0.25),
    "signals": ("Network-v0", dict(interval=15.0), "seconds", 15),
}
EVERY = pytest.mark.parametrize("case", CASES)
ROADS = pytest.mark.parametrize("case", ["freeway", "freeway_muscl", "signals"])

pytestmark = pytest.mark.usefixtures("one_thread")


def keywords_of(case, decisions=LENGTH):
    name, keywords, key, unit = CASES[case]
    return f"cleanrl_crypto/{name}", keywords | {key: decisions * unit}


@pytest.fixture
def make():
    """make(case, lanes): an environment that is closed at the end."""
    envs = []

    def build(case, lanes=3, decisions=LENGTH, **more):
        name, keywords = keywords_of(case, decisions)
        envs.append(gym.make_vec(name, num_envs=lanes, **keywords | more).unwrapped)
        return envs[-1]

    yield build
    for env in envs:
        env.close()


def draws(envs, steps):
    """`steps` random actions of every lane; a lane's do not depend on how many there are."""
    space, lanes = envs.single_action_space, []
    for lane in range(envs.num_envs):
        space.seed(lane)
        lanes.append([space.sample() for _ in range(steps)])
    return np.stack(lanes, 1)


def same(a, b):
    """Equal to the bit, but for rewards: sums over junctions, whose order depends on the number of lanes."""
    a, b = (x if isinstance(x, dict) else {"obs": x} for x in (a, b))
    assert a.keys() == b.keys()
    for key in a:
        if key == "reward":
            np.testing.assert_allclose(a[key], b[key], rtol=1e-13)
        else:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def different(a, b) -> bool:
    """Whether the parts that change with time are different."""
    a, b = (x["market"] if isinstance(x, dict) else x for x in (a, b))
    return not np.array_equal(a, b)


def play(envs, actions) -> list[dict]:
    """Every step's arrays (N, ...), copied."""
    steps = []
    for action in actions:
        ends = envs.step_lanes(torch.as_tensor(action))
        obs = to_numpy(envs.observe())
        obs = obs if isinstance(obs, dict) else {"obs": obs}
        steps.append(obs | dict(zip(("reward", "terminated", "truncated"), map(to_numpy, ends))))
    return steps


def some(step, lanes) -> dict:
    return {key: x[lanes] for key, x in step.items()}


# ------------------------------------------------------------------------------------- Gymnasium
@EVERY
def test_an_episode_ends_with_its_own_last_state_and_the_next_begins_at_once(make, case):
    envs, longer, fresh = make(case), make(case, decisions=2 * LENGTH), make(case)
    assert envs.metadata["autoreset_mode"] is gym.vector.AutoresetMode.SAME_STEP
    with pytest.raises(gym.error.ResetNeeded):
        envs.step(draws(envs, 1)[0])
    first, info = envs.reset(seed=5)
    longer.reset(seed=5)
    assert info == {} and first in envs.observation_space
    total = 0.0
    for t, action in enumerate(draws(envs, LENGTH)):
        obs, reward, terminated, truncated, info = envs.step(action)
        true, *_ = longer.step(action)
        total = total + reward
        assert obs in envs.observation_space and reward.shape == (3,)
        assert not terminated.any() and truncated.tolist() == [t == LENGTH - 1] * 3
        if t < LENGTH - 1:
            same(obs, true)
            assert info == {} and different(obs, first)
    for lane in range(3):
        last = info["final_obs"][lane]
        assert last in envs.single_observation_space and different(last, row(obs, lane))
        if case != "freeway":  # whose last update is left out, as published
            same(last, row(true, lane))
    episode = info["final_info"]["episode"]
    assert episode["l"].tolist() == [LENGTH] * 3
    assert episode["r"] == pytest.approx(total, rel=1e-5)
    fresh.reset(seed=5)
    same(obs, fresh.reset()[0])


@pytest.mark.parametrize("case", ["market", "forex", "freeway", "signals"])
def test_one_lane_of_gymnasium_is_lane_0_without_autoreset(make, case):
    name, keywords = keywords_of(case)
    one, envs = gym.make(name, **keywords).unwrapped, make(case)
    same(one.reset(seed=3)[0], row(envs.reset(seed=3)[0], 0))
    for t, action in enumerate(draws(envs, LENGTH)):
        obs, reward, terminated, truncated, _ = one.step(action[0])
        *_, info = envs.step(action)
        assert type(reward) is float and (terminated, truncated) == (False, t == LENGTH - 1)
    same(obs, info["final_obs"][0])
    one.close()


WRONG = {
    "freeway_nan": ([[0], [np.nan], [0]], "lane 1"),
    "forex_high": ([0, 1, 3], "lane 2"),
    "forex_low": ([0, -1, 1], "lane 1"),
    "signals_shape": (np.zeros((3, 4), int), r"\(3, 5\)"),
    "signals_float": (np.zeros((3, 5)), "integers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_actions_that_are_none_are_refused(make, name):
    actions, word = WRONG[name]
    envs = make(name.partition("_")[0])
    envs.reset(seed=1)
    with pytest.raises(ValueError, match=word):
        envs.step(np.array(actions))


# ------------------------------------------------------------------------------ lanes, seeds, state
@EVERY
def test_a_lane_knows_no_other_and_every_reset_is_a_new_episode(make, case):
    few, many = make(case), make(case, 40 if case == "signals" else 130)
    many.reset(seed=21)
    start, starts = few.reset()[0], many.reset(seed=1)[0]  # 1: the constructor's
    for lane in range(3):
        same(row(start, lane), row(starts, lane))
    actions = draws(many, 2 * LENGTH + 1)
    for one, other in zip(play(few, actions[:, :3]), play(many, actions)):
        same(one, some(other, slice(3)))
    again = [row(few.reset()[0], 0) for _ in range(4)]
    assert all(different(again[i], again[j]) for i in range(4) for j in range(i))
    same(few.reset(seed=1)[0], start)


@ROADS
def test_a_process_of_torchrun_has_lanes_of_its_own(make, case):
    """Those from lane0 on, as one process that has all of them."""
    blocks = {"block": 2} if case == "signals" else {}
    whole, part = make(case, 7), make(case, 3, lane0=2, **blocks)
    same(whole.reset(seed=3)[0][2:5], part.reset(seed=3)[0])
    actions = draws(whole, LENGTH + 1)
    for one, other in zip(play(whole, actions), play(part, actions[:, 2:5])):
        same(some(one, slice(2, 5)), other)


@EVERY
def test_a_state_goes_on_to_the_bit(make, case, monkeypatch):
    """Also in an environment of another seed, and of lanes in other blocks."""
    envs = make(case, 6)
    envs.reset(seed=1)
    actions = draws(envs, 3 * LENGTH)
    play(envs, actions[: LENGTH + 2])
    state = envs.state_dict()
    expected = play(envs, actions[LENGTH + 2 :])
    monkeypatch.setattr(ppo_arz_gpu, "BLOCK", 4)
    other = make(case, 6)
    other.reset(seed=9)
    other.load_state_dict(state)
    for one, two in zip(play(other, actions[LENGTH + 2 :]), expected):
        same(one, two)


@EVERY
def test_reset_and_step_build_nothing_and_environments_share_nothing(make, case):
    envs = make(case)
    envs.reset(seed=1)
    places = {name: getattr(envs, name).data_ptr() for name in envs.arrays}
    builds, stats = Lanes.builds, pool.stats()
    for seed in (None, 3, None):
        envs.reset(seed=seed)
        for action in draws(envs, LENGTH + 1):
            envs.step(action)
    assert Lanes.builds == builds and pool.stats() == stats
    assert {name: getattr(envs, name).data_ptr() for name in envs.arrays} == places
    other = make(case)
    assert Lanes.builds == builds + 1
    assert not {getattr(other, name).data_ptr() for name in other.arrays} & set(places.values())
    allocations = pool.stats()["allocations"]
    envs.close()
    make(case)
    assert pool.stats()["allocations"] == allocations  # what was given back is used again


@ROADS
def test_staggered_lanes_end_at_different_times_and_then_keep_their_length(make, case):
    envs = make(case, 40)
    envs.reset(seed=1, options={"stagger": True})
    truncated = np.stack([step["truncated"] for step in play(envs, draws(envs, 3 * LENGTH))])
    firsts = truncated.argmax(0)
    assert set(firsts) == set(range(LENGTH))
    for lane, first in zip(truncated.T, firsts):
        assert np.flatnonzero(lane).tolist() == [first, first + LENGTH, first + 2 * LENGTH]


# ------------------------------------------------------------------------------------------- sanity
@ROADS
def test_sanity_passes_and_hands_the_environment_on(make, case):
    check = ppo_arz_signals.check_env if case == "signals" else ppo_arz_gpu.check_env
    envs, fresh = (make(case, 4, 20) for _ in range(2))
    builds = Lanes.builds
    check(envs)
    assert Lanes.builds == builds
    same(envs.reset(seed=7)[0], fresh.reset(seed=7)[0])


def deaf(envs, step, action):
    return step(torch.zeros_like(action))


def endless(envs, step, action):
    reward, terminated, truncated = step(action)
    return reward, terminated, torch.zeros_like(truncated)


def flat(envs, step, action):
    reward, *ends = step(action)
    return torch.zeros_like(reward), *ends


def slow(envs, step, action):
    envs.decision_interval *= 3
    return step(action)


def short(envs, step, action):
    envs.decision += 1
    return step(action)


def leaky(envs, step, action):
    if isinstance(envs, ppo_arz_gpu.FreewayVectorEnv):
        envs.rows("u")[0, 7] *= 0.9  # one block: a view
    else:
        envs.rho_c[100] = 0.0
    return step(action)


def crowded(envs, step, action):
    result = step(action)
    envs.observe().add_(1)
    return result


WORDS = {
    deaf: "two actions",
    endless: "truncation",
    flat: "many values",
    slow: "--decision-interval",
    leaky: "conserved",
}
FAULTS = {f"{road}_{f.__name__}": (f, words) for road in ("freeway", "signals") for f, words in WORDS.items()}
FAULTS |= {"freeway_crowded": (crowded, "densities"), "signals_short": (short, "no episode to end before")}


@pytest.mark.parametrize("name", FAULTS)
def test_sanity_fails_in_one_line_with_what_it_found(name):
    fault, words = FAULTS[name]
    base, keywords, check = ppo_arz_gpu.FreewayVectorEnv, dict(episode_seconds=20), ppo_arz_gpu.check_env
    if name.startswith("signals"):
        base, keywords = ppo_arz_signals.NetworkVectorEnv, dict(interval=5.0, seconds=90.0)
        check = ppo_arz_signals.check_env

    class Broken(base):
        def step_lanes(self, action):
            return fault(self, super().step_lanes, action)

    message = refusal(CheckFailed, check, Broken(3, **keywords))
    assert words in message and "found" in message
