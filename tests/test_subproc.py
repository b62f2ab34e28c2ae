"""Worker processes: one trajectory whatever steps it, every fault noticed, nothing left behind."""

import ctypes
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch

from cleanrl_crypto import dqn_forex_subproc as dqn
from common.run import UsageError
from runs import refusal, shared_memory
from test_env_forex import assert_equal, draws, make_pairs

RULES = dict(leverage=3.0, episode_length=9)
linux = pytest.mark.skipif(sys.platform != "linux", reason="sends POSIX signals")
ONES = torch.ones(14, dtype=torch.int64)


@pytest.fixture
def make():
    envs = []

    def build(num_envs=14, *, mode="subproc", workers=2, halves=False, env_fn=None, **kwargs):
        kwargs = dict(seed=3, num_workers=workers, async_halves=halves) | kwargs
        if env_fn:
            envs.append(dqn.CustomVectorEnv(f"{__name__}:{env_fn}", num_envs, **kwargs))
        else:
            kwargs = RULES | dict(vec_mode=mode) | kwargs
            envs.append(dqn.ForexVectorEnv(make_pairs(), "train", num_envs, **kwargs))
        return envs[-1]

    yield build
    for env in envs:
        env.close()


def pids(env):
    return [process.pid for process in env.processes.values()]


def all_gone(processes):
    """Within a minute; a zombie is gone."""
    known = [psutil.Process(pid) for pid in processes if psutil.pid_exists(pid)]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in known):
            return True
        time.sleep(0.05)
    return False


# ----------------------------------------------------------------------------------- one trajectory
def test_two_halves_in_flight(make):
    """Halves run ahead of each other, as a learner drives them: each lane's trajectory is the same."""
    single, env = make(mode="single"), make(halves=True)
    single.reset(seed=7)
    env.reset(seed=7)
    actions, spans = draws(40, 14), (slice(0, 7), slice(7, 14))
    expected = [[x.clone() for x in single.step_lanes(a)] for a in actions]
    env.send(0, actions[0, :7])
    with pytest.raises(UsageError):
        env.rescale(1)
    for t in range(40):
        env.send(1, actions[t, 7:])
        for half, span in enumerate(spans):
            for x, y in zip(env.recv(half), expected[t]):
                assert torch.equal(x, y[span])
            if half == 0 and t < 39:
                env.send(0, actions[t + 1, :7])


def test_rescale_by_measure_leaves_the_lanes_where_they_were(make):
    """Also where there is no room for one worker more."""
    env, calm = make(2), make(2, mode="single")
    for e in (env, calm):
        e.reset(seed=1)
        e.step_lanes(ONES[:2])
    rates = dqn.rescale_by_measure(env, 0.02)
    assert set(rates) == {1, 2} and min(rates.values()) > 0
    for workers in (1, 2):
        env.rescale(workers)
        assert len(set(pids(env))) == workers
        for e in (env, calm):
            e.step_lanes(ONES[:2])
        assert_equal(env, calm, ("obs", "reward", "row", "position"))
    for odd, workers in ((env, 3), (calm, 2)):
        with pytest.raises(UsageError, match="rescale"):
            odd.rescale(workers)


def test_the_table_is_in_shared_memory_once(make):
    env = make(workers=3)
    env.reset(seed=1)
    env.table[:] = 7.0  # a worker that had a copy would not see it
    env.step_lanes(ONES)
    assert (env.obs[:, :-1] == 7.0).all()


# ------------------------------------------------------------------------------------------- faults
@linux
@pytest.mark.parametrize("name, worker, why", [
    ("SIGKILL", 1, "worker 1, lanes 3-6 and 10-13: died .exit code -9"),
    ("SIGSTOP", 0, "worker 0, lanes 0-2 and 7-9: no answer in 1 s"),
])
def test_a_dead_or_hanging_worker_is_noticed_and_named(make, name, worker, why):
    env = make(halves=True, worker_timeout=1.0)
    env.reset(seed=1)
    env.step_lanes(ONES)
    workers = pids(env)
    os.kill(workers[worker], getattr(signal, name))
    with pytest.raises(dqn.WorkerError, match=why) as e:
        env.step_lanes(ONES)
    assert e.value.worker == worker and e.value.exit_code == 1
    assert env.closed and all_gone(workers)


@linux
def test_workers_leave_signals_to_their_parent(make):
    env = make()
    env.reset(seed=1)
    for pid in pids(env):
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, name)
    time.sleep(0.2)
    env.step_lanes(ONES)


@linux
@pytest.mark.parametrize("name, halves", [("SIGKILL", True), ("SIGSTOP", False)])
def test_restart_truncates_the_lanes_of_the_dead_and_no_other(make, name, halves):
    env = make(halves=halves, on_worker_death="restart", worker_timeout=1.0)
    calm = make(mode="single")
    env.reset(seed=1)
    calm.reset(seed=1)
    for e in (env, calm):
        e.step_lanes(ONES)
    before = env.obs.clone(), env.episodes.clone()
    os.kill(pids(env)[1], getattr(signal, name))
    for e in (env, calm):
        e.step_lanes(ONES)
    lost = torch.zeros(14, dtype=torch.bool)
    for blocks in env.blocks:
        lost[slice(*blocks[1])] = True
    assert env.restarts == 1 and env.truncated[lost].all() and not env.terminated[lost].any()
    assert (env.reward[lost] == 0).all() and torch.equal(env.final_obs[lost], before[0][lost])
    assert (env.episodes[lost] == before[1][lost] + 1).all() and (env.clock[lost] == 0).all()
    assert (env.stats[1, lost] == 1).all()  # the episode's length, of the steps that were whole
    for name in ("obs", "reward", "truncated"):
        assert torch.equal(getattr(env, name)[~lost], getattr(calm, name)[~lost]), name
    env.step_lanes(ONES)
    assert not env.truncated[lost].any() and (env.clock[lost] == 1).all()


def test_a_worker_that_never_works_is_not_restarted_for_ever(make):
    env = make(2, env_fn="raises_later", on_worker_death="restart")
    env.reset(seed=1)
    with pytest.raises(dqn.WorkerError, match="no step today .*test_subproc.py"):
        for _ in range(20):
            env.step_lanes(ONES[:2])
    assert 3 <= env.restarts <= 8


PARENT = """
import sys, time
import torch
import test_subproc as t
if __name__ == "__main__":
    env = t.dqn.CustomVectorEnv(f"test_subproc:{sys.argv[1]}", 4, num_workers=2, worker_timeout=60.0)
    env.reset(seed=1)
    env.step_lanes(torch.zeros(4, dtype=torch.int64))
    print(*t.pids(env), flush=True)
    env.send(0, torch.ones(4, dtype=torch.int64))
    time.sleep(600)
"""


@linux
@pytest.mark.parametrize("env_fn, how", [
    ("hangs", "Ctrl-C"),
    ("hangs", "kill"),
    pytest.param("hangs_in_c", "Ctrl-C", marks=pytest.mark.slow),
    pytest.param("hangs_in_c", "kill", marks=pytest.mark.slow),
])
def test_nothing_survives_the_parent(tmp_path, repo, env_fn, how):
    before = shared_memory()
    (tmp_path / "parent.py").write_text(PARENT)
    path = os.pathsep.join([str(repo), str(repo / "tests"), *sys.path])
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py", env_fn], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": path})
    try:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        family = [p.pid for p in psutil.Process(parent.pid).children(recursive=True)]
        assert set(workers) <= set(family)
        time.sleep(0.3)  # the step is under way
        parent.send_signal(signal.SIGINT if how == "Ctrl-C" else signal.SIGKILL)
        parent.wait(60)
        assert all_gone(family)
        assert not shared_memory() - before
    finally:
        parent.kill()
        parent.wait()


# ----------------------------------------------------------------------------- a user's environments
def closed_by(pid) -> Path:
    return Path(tempfile.gettempdir(), f"closed_by_{pid}")


class Counts(gym.Env):
    """Counts to a target that the seed draws; action 6 adds one, 5 none. Reward: the count."""

    observation_space = gym.spaces.Box(0, 100, (2, 2), np.float32)
    action_space = gym.spaces.Discrete(2, start=5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.target, self.count = int(self.np_random.integers(3, 9)), 0
        return np.full((2, 2), self.target, np.float32), {}

    def step(self, action):
        assert action in (5, 6)
        self.count += int(action) - 5
        obs = np.array([[self.target, self.count], [action, 0]], np.float32)
        return obs, float(self.count), self.count >= self.target, False, {}

    def close(self):
        if closed_by(os.getpid()).exists():
            with closed_by(os.getpid()).open("a") as f:
                f.write("x")


class Odd(Counts):
    """Counts, but for what `do` makes of an action and of its step."""

    def step(self, action):
        return self.do(action, super().step(action))


def odd(do):
    env = Odd()
    env.do = do
    return env


def spinning(action, step):
    while action == 6:
        pass
    return step


def sleeping_in_c(action, step):
    if action == 6:
        ctypes.PyDLL(None).sleep(60)  # keeps the interpreter lock
    return step


def raising(action, step):
    if action == 6:
        raise RuntimeError("no step today")
    return step


def no_rocket():
    raise KeyError("no such rocket")


def cartpole():
    return gym.make("CartPole-v1")


def continuous():
    return gym.make("Pendulum-v1")


counter, number, exits = Counts, int, partial(os._exit, 3)
hangs, hangs_in_c = partial(odd, spinning), partial(odd, sleeping_in_c)
raises_later = partial(odd, raising)
nan_reward = partial(odd, lambda action, step: (step[0], math.nan, *step[2:]))
four = partial(odd, lambda action, step: step[:4])
wrong_shape = partial(odd, lambda action, step: (np.zeros(7, np.float32), *step[1:]))


def test_a_user_s_environment_is_stepped_as_it_is(make):
    """As Gymnasium's own vector does it."""
    env = make(6, workers=3, halves=True, env_fn="cartpole", worker_timeout=30.0)
    peer = gym.vector.SyncVectorEnv([cartpole] * 6, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    obs, _ = env.reset(seed=11)
    np.testing.assert_array_equal(obs, peer.reset(seed=11)[0])
    assert env.single_action_space == gym.spaces.Discrete(2) and obs in env.observation_space
    length, ended = np.zeros(6), 0
    for actions in np.random.default_rng(0).integers(2, size=(70, 6)):
        *ours, info = env.step(actions)
        *theirs, expected = peer.step(actions)
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(x, y)
        length += 1
        for i in np.flatnonzero(ours[2]):
            np.testing.assert_array_equal(info["final_obs"][i], expected["final_obs"][i])
            episode = info["final_info"]["episode"]
            assert episode["r"][i] == length[i] == episode["l"][i]
            length[i], ended = 0, ended + 1
    assert ended > 6


def test_a_space_that_starts_at_five_is_flattened_and_closed(make):
    env = make(3, workers=1, env_fn="counter")
    assert env.reset(seed=1)[0].shape == (3, 4) and env.first_action == 5
    obs = env.step(np.array([0, 1, 1]))[0]
    assert obs[:, 1:].tolist() == [[0, 5, 0], [1, 6, 0], [1, 6, 0]]
    note = closed_by(*pids(env))
    note.touch()
    env.pipes[0].close()  # as close() does, which does not wait for ever
    env.processes[0].join(60)
    assert note.read_text() == "xxx"
    note.unlink()


@linux
def test_a_lost_user_s_episode_is_truncated_and_begins_with_another_seed(make):
    env = make(6, halves=True, env_fn="counter", on_worker_death="restart", worker_timeout=30.0)
    env.reset(seed=1)
    before = env.step(np.ones(6, int))[0]
    os.kill(pids(env)[1], signal.SIGKILL)
    obs, reward, terminated, truncated, info = env.step(np.ones(6, int))
    lost = np.array([0, 1, 1, 0, 1, 1], bool)  # the second worker's lanes of either half
    assert truncated.tolist() == lost.tolist() and not terminated.any() and env.restarts == 1
    assert (reward[lost] == 0).all() and (reward[~lost] == 2).all()
    for i in np.flatnonzero(lost):
        np.testing.assert_array_equal(info["final_obs"][i], before[i])
        assert (obs[i] == obs[i, 0]).all()  # a first observation
    assert not env.step(np.ones(6, int))[3].any()


def test_a_resumed_user_s_environment_does_not_repeat_its_first_episodes(make):
    first, again = make(6, env_fn="counter"), make(6, env_fn="counter")
    obs, _ = first.reset(seed=1)
    state = first.state_dict()
    again.load_state_dict(state)
    once = again.obs.clone()
    again.load_state_dict(again.state_dict())
    starts = [obs.tolist(), once.tolist(), again.obs.tolist()]
    assert starts[0] != starts[1] != starts[2] != starts[0]


@pytest.mark.parametrize("env_fn, word", [
    ("no_rocket", "KeyError.*no such rocket"),
    ("exits", "exit code 3"),
    ("continuous", "Discrete"),
    ("missing", "missing"),
    ("number", "Box"),
    ("nan_reward", "reward nan"),
    ("four", "4"),
    ("wrong_shape", "(7,)"),
])
def test_a_bad_factory_is_one_line(env_fn, word):
    message = refusal(UsageError, dqn.user_spaces, f"{__name__}:{env_fn}")
    assert re.search(f"--env-fn test_subproc:{env_fn}: .*{word}", message)


# ---------------------------------------------------------------------------------------- measuring
def test_a_mode_that_does_not_run_here_has_its_error_and_the_others_count(make):
    def build(vec_mode, num_workers):
        if vec_mode == "subproc":
            raise dqn.WorkerError(0, [(0, 7)], "no room")
        return make(mode=vec_mode, workers=num_workers)

    rows = dqn.probe(build, [("single", 1), ("dummy", 2), ("subproc", 2)], 0.02)
    assert [row["steps_per_s"] > 0 for row in rows] == [True, True, False]
    assert "no room" in rows[2]["error"]
