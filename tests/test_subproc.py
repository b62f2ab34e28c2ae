"""Worker processes: one trajectory whatever steps it, every fault noticed, nothing left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from cleanrl_crypto import dqn_forex_subproc as dqn
from test_env_forex import OUT, draws, make_pairs, outputs

LAW = dict(position_mode="drift", leverage=3.0, daily_drawdown=0.02, episode_length=9)
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def pairs():
    return make_pairs()


@pytest.fixture
def make(pairs):
    envs = []

    def build(num_envs=14, *, mode="subproc", workers=2, halves=False, **kwargs):
        law = {} if "env_fn" in kwargs else LAW
        kwargs = law | dict(seed=3) | kwargs
        kwargs |= dict(vec_mode=mode, num_workers=workers, async_halves=halves)
        envs.append(dqn.ForexVectorEnv(pairs, "train", num_envs, **kwargs))
        return envs[-1]

    yield build
    for env in envs:
        env.close()


def same(a, b):
    for name in OUT:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def pids(env):
    return [process.pid for process in env.processes]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ------------------------------------------------------------------------------------------ one trajectory
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("mode, workers", [("dummy", 1), ("dummy", 3), ("subproc", 1), ("subproc", 2), ("subproc", 3)])
def test_the_trajectory_is_the_same_whatever_steps_it(make, mode, workers, halves):
    single, other = make(mode="single"), make(mode=mode, workers=workers, halves=halves)
    np.testing.assert_array_equal(single.reset(seed=7)[0], other.reset(seed=7)[0])
    ended = 0
    for t, actions in enumerate(draws(60, 14)):
        if t == 30:
            np.testing.assert_array_equal(single.reset()[0], other.reset()[0])
        *_, terminated, truncated = single.step_lanes(actions)
        other.step_lanes(actions)
        same(single, other)
        ended += (terminated | truncated).sum()
    assert ended > 40


@pytest.mark.parametrize("mode", ["dummy", "subproc"])
def test_two_halves_in_flight(make, mode):
    """Halves run ahead of each other, as a learner drives them: each lane's trajectory is still the same."""
    single, env = make(mode="single"), make(mode=mode, halves=True)
    single.reset(seed=7)
    env.reset(seed=7)
    actions, spans = draws(40, 14), (slice(0, 7), slice(7, 14))
    expected = [[x.copy() for x in single.step_lanes(a)] for a in actions]
    env.send(0, actions[0, :7])
    for t in range(40):
        env.send(1, actions[t, 7:])
        for half, span in enumerate(spans):
            got = env.recv(half)
            for x, y in zip(got, expected[t]):
                np.testing.assert_array_equal(x, y[span])
                assert any(np.shares_memory(x, v) for v in (env.obs, env.reward, env.flags))
            if half == 0 and t < 39:
                env.send(0, actions[t + 1, :7])


def test_gymnasium_s_api_in_workers(make):
    env, single = make(), make(mode="single")
    assert isinstance(env, gym.vector.VectorEnv)
    obs, _ = env.reset(seed=1)
    single.reset(seed=1)
    assert obs in env.observation_space
    for actions in draws(25, 14):
        x, y = env.step(actions), single.step(actions)
        for a, b in zip(x[:4], y[:4]):
            np.testing.assert_array_equal(a, b)
        assert x[4].keys() == y[4].keys()
        for a, b in zip(x[4].get("final_obs", ()), y[4].get("final_obs", ())):
            np.testing.assert_array_equal(a, b)


def test_rescale_changes_the_workers_only(make):
    env, single = make(workers=1), make(mode="single")
    env.reset(seed=1)
    single.reset(seed=1)
    for t, actions in enumerate(draws(60, 14)):
        if t % 12 == 11:
            workers = (3, 2, 5, 1, 4)[t // 12]
            env.rescale(workers)
            assert len(set(pids(env))) == workers == env.num_workers
        env.step_lanes(actions)
        single.step_lanes(actions)
        same(env, single)
    with pytest.raises(ValueError, match="rescale to 15"):
        env.rescale(15)
    with pytest.raises(ValueError, match="subproc"):
        single.rescale(2)


def test_a_state_moves_between_modes(make):
    env, other = make(workers=3, halves=True), make(mode="single", seed=50)
    env.reset(seed=1)
    for actions in draws(11, 14):
        env.step_lanes(actions)
    other.set_state(env.get_state())
    back = make(workers=1)
    back.set_state(other.get_state())
    for actions in draws(20, 14, seed=1):
        for e in (env, other, back):
            e.step_lanes(actions)
        for name in ("obs", "reward", "flags", "row", "position"):
            np.testing.assert_array_equal(getattr(env, name), getattr(other, name))
            np.testing.assert_array_equal(getattr(env, name), getattr(back, name))


def test_the_table_is_in_shared_memory_once(make):
    env = make(workers=3)
    env.reset(seed=1)
    env.arrays["table"][:] = 7.0  # a worker that had a copy would not see it
    env.step_lanes(np.ones(14, int))
    assert (env.obs[:, :-2] == 7.0).all()


# -------------------------------------------------------------------------------------------------- faults
def test_a_killed_worker_is_noticed_and_named(make):
    env = make(workers=2)
    env.reset(seed=1)
    env.step_lanes(np.ones(14, int))
    os.kill(pids(env)[1], signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(dqn.WorkerError, match="worker 1, lanes 7-13: died .exit code -9") as e:
        env.step_lanes(np.ones(14, int))
    assert time.monotonic() - began < 5 and e.value.worker == 1 and e.value.lanes == [(7, 14)]
    assert env.processes == [] and env.closed


@linux
def test_a_hanging_worker_is_noticed(make):
    env = make(workers=2, halves=True)
    env.reset(seed=1)
    hung = pids(env)
    os.kill(hung[0], signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(dqn.WorkerError, match="worker 0, lanes 0-2 and 7-9: no answer in 4 s"):
        env.step_lanes(np.ones(14, int))
    assert time.monotonic() - began < 6
    assert not any(alive(pid) for pid in hung)


def test_a_worker_that_raises_sends_its_traceback(make):
    env = make(workers=2)
    env.reset(seed=1)
    env.pipes[0].send_bytes(b"nonsense")
    with pytest.raises(dqn.WorkerError, match="(?s)worker 0, lanes 0-6: Traceback.*struct.error"):
        env.step_lanes(np.ones(14, int))


@linux
@pytest.mark.parametrize("how", ["half done", "before", "after", "hang", "raise"])
@pytest.mark.parametrize("halves", [False, True])
def test_restart_is_exact(make, how, halves):
    env, calm = make(workers=2, halves=halves, on_worker_death="restart", timeout=1.0), make(mode="single")
    env.reset(seed=1)
    calm.reset(seed=1)
    for t, actions in enumerate(draws(24, 14)):
        at, pid = t in (5, 6, 17), pids(env)[t % 2]
        if at and how == "before":
            os.kill(pid, signal.SIGKILL)
        elif at and how == "raise":
            env.pipes[t % 2].send_bytes(b"nonsense")
        elif at and how in ("hang", "half done"):
            os.kill(pid, signal.SIGSTOP)
        for half, span in enumerate(env.spans):
            env.send(half, actions[span])
        if at and how == "half done":  # what a step that dies in the middle leaves behind
            for half in range(env.halves):
                lo, hi = env.blocks[half][t % 2]
                for name in ("ints", "floats"):
                    env.arrays[name][1 - env.parity[half]][:, lo:hi - 1] = 99
                env.obs[lo:hi - 1], env.reward[lo:hi - 1], env.flags[:, lo:hi - 1] = 99, 99, True
            os.kill(pid, signal.SIGKILL)
        if at and how == "after":
            os.kill(pid, signal.SIGKILL)
        for half in range(env.halves):
            env.recv(half)
        calm.step_lanes(actions)
        for name in ("obs", "reward", "flags", "row", "position"):
            np.testing.assert_array_equal(getattr(env, name), getattr(calm, name), err_msg=f"{name}, step {t}")
        done = env.flags.any(axis=0)
        for name in ("final_obs", "stats"):
            x, y = (np.atleast_2d(getattr(e, name)) for e in (env, calm))
            np.testing.assert_array_equal(*((a[done] if name == "final_obs" else a[:, done]) for a in (x, y)))
    assert env.restarts == 3
    if how == "half done":
        np.testing.assert_array_equal(env.get_state()["ints"], calm.get_state()["ints"])


@linux
def test_workers_killed_at_random_leave_the_trajectory_as_it_was(make):
    env, calm = make(600, workers=3, halves=True, on_worker_death="restart"), make(600, mode="single")
    env.reset(seed=1)
    calm.reset(seed=1)
    stop, rng = threading.Event(), np.random.default_rng(0)

    def shoot():
        while not stop.wait(rng.uniform(0.3, 0.9)):
            try:
                os.kill(pids(env)[rng.integers(3)], signal.SIGKILL)
            except (ProcessLookupError, TypeError, ValueError, AttributeError):  # it is being replaced
                pass

    thread = threading.Thread(target=shoot)
    thread.start()
    try:
        actions = draws(50, 600)
        for t in range(100_000):
            env.step_lanes(actions[t % 50])
            calm.step_lanes(actions[t % 50])
            np.testing.assert_array_equal(env.obs, calm.obs)
            np.testing.assert_array_equal(env.reward, calm.reward)
            if env.restarts >= 5:
                break
    finally:
        stop.set()
        thread.join()
    assert env.restarts >= 5


def test_a_worker_that_never_works_is_not_restarted_for_ever(make):
    env = make(2, workers=2, env_fn=f"{__name__}:always_raises", on_worker_death="restart")
    env.reset(seed=1)
    with pytest.raises(dqn.WorkerError, match="(?s)Traceback.*no step today"):
        for _ in range(20):
            env.step_lanes(np.zeros(2, int))
    assert 3 <= env.restarts <= 6


# ------------------------------------------------------------------------------------------------- no leaks
PARENT = """
import sys, time
import numpy as np
import test_subproc as t
if __name__ == "__main__":
    env_fn = f"test_subproc:{sys.argv[1]}" if sys.argv[1] != "ours" else None
    law = dict(vec_mode="subproc", num_workers=2, env_fn=env_fn, timeout=60.0)
    env = t.dqn.ForexVectorEnv(t.make_pairs(), "train", 4, **law)
    env.reset(seed=1)
    print(*t.pids(env), flush=True)
    env.send(0, np.zeros(4, int))
    time.sleep(60)
"""


def children(pid):
    """Every process below `pid`."""
    below, found = {}, []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            below.setdefault(int(stat.read_text().rsplit(")", 1)[1].split()[1]), []).append(int(stat.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            pass
    todo = [pid]
    while todo:
        found += (more := below.get(todo.pop(), []))
        todo += more
    return found


@linux
@pytest.mark.parametrize("env_fn", ["ours", "hangs", "hangs_in_c"])
@pytest.mark.parametrize("how", ["kill the parent", "kill everything", "Ctrl-C"])
def test_nothing_survives_the_parent(tmp_path, repo, env_fn, how):
    before = set(os.listdir("/dev/shm"))
    (tmp_path / "parent.py").write_text(PARENT)
    path = os.pathsep.join([str(repo), str(repo / "tests"), *sys.path])
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py", env_fn], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True, env=os.environ | {"PYTHONPATH": path})
    try:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        family = children(parent.pid)
        assert set(workers) <= set(family)
        time.sleep(0.3)  # the step is under way
        if how == "Ctrl-C":
            parent.send_signal(signal.SIGINT)
        else:
            for pid in family * (how == "kill everything") + [parent.pid]:
                os.kill(pid, signal.SIGKILL)
        parent.wait(10)
        deadline = time.monotonic() + 5
        while any(alive(pid) for pid in family) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not [pid for pid in family if alive(pid)]
        assert not set(os.listdir("/dev/shm")) - before
    finally:
        parent.kill()
        parent.wait()


@linux
def test_close_leaves_no_worker(make):
    env = make(workers=3)
    env.reset(seed=1)
    workers = pids(env)
    assert all(alive(pid) for pid in workers)
    env.close()
    env.close()
    assert not any(alive(pid) for pid in workers)


# ----------------------------------------------------------------------------------- a user's environments
class Counter(gym.Env):
    """Counts to a target that the seed draws; action 1 adds one. Reward: the count."""

    observation_space = gym.spaces.Box(0, 100, (2, 2), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.target, self.count = int(self.np_random.integers(3, 9)), 0
        return np.full((2, 2), self.target, np.float32), {}

    def step(self, action):
        self.count += int(action)
        obs = np.array([[self.target, self.count], [action, 0]], np.float32)
        return obs, float(self.count), self.count >= self.target, False, {}


class Raises(Counter):
    def step(self, action):
        raise RuntimeError("no step today")


class Hangs(Counter):
    def step(self, action):
        while True:
            pass


class HangsInC(Counter):
    def step(self, action):
        import ctypes

        ctypes.PyDLL(None).sleep(60)  # keeps the interpreter lock


def counter():
    return Counter()


def cartpole():
    return gym.make("CartPole-v1")


def always_raises():
    return Raises()


def hangs():
    return Hangs()


def hangs_in_c():
    return HangsInC()


def broken():
    raise OSError("no such rocket")


def broken_in_workers():
    import multiprocessing

    if multiprocessing.parent_process() is not None:
        raise OSError("no such rocket")
    return Counter()


def continuous():
    return gym.make("Pendulum-v1")


@pytest.mark.parametrize("mode, workers, halves", [("single", 1, False), ("dummy", 2, True), ("subproc", 1, False),
                                                   ("subproc", 3, True)])
def test_a_user_s_environment_is_stepped_as_it_is(make, mode, workers, halves):
    env = make(6, mode=mode, workers=workers, halves=halves, env_fn=f"{__name__}:cartpole", timeout=30.0)
    lanes = [cartpole() for _ in range(6)]
    obs, _ = env.reset(seed=11)
    np.testing.assert_array_equal(obs, [lane.reset(seed=11 + i)[0] for i, lane in enumerate(lanes)])
    assert env.single_action_space == gym.spaces.Discrete(2) and obs in env.observation_space
    total, ended = np.zeros(6), 0
    for actions in np.random.default_rng(0).integers(2, size=(70, 6)):
        obs, reward, terminated, truncated, info = env.step(actions)
        total += reward
        for i, lane in enumerate(lanes):
            expected, r, stop, cut, _ = lane.step(actions[i])
            assert (reward[i], terminated[i], truncated[i]) == (r, stop, cut)
            if stop or cut:
                np.testing.assert_array_equal(info["final_obs"][i], expected)
                assert info["final_info"]["episode"]["r"][i] == total[i] == info["final_info"]["episode"]["l"][i]
                total[i], expected, ended = 0, lane.reset()[0], ended + 1
            np.testing.assert_array_equal(obs[i], expected)
    assert ended > 6


def test_observations_are_flattened(make):
    env = make(3, mode="dummy", workers=1, env_fn=f"{__name__}:counter")
    assert env.reset(seed=1)[0].shape == (3, 4)
    assert env.step(np.array([0, 1, 1]))[0][:, 1:].tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 0]]
    with pytest.raises(ValueError, match="lane 1 is not in 0..1"):
        env.step(np.array([0, 2, 1]))


@linux
def test_a_lost_user_s_episode_is_truncated_and_counted(make):
    env = make(6, workers=2, halves=True, env_fn=f"{__name__}:counter", on_worker_death="restart", timeout=30.0)
    env.reset(seed=1)
    before = env.step(np.ones(6, int))[0]
    os.kill(pids(env)[1], signal.SIGKILL)
    obs, reward, terminated, truncated, info = env.step(np.ones(6, int))
    lost = np.array([0, 1, 1, 0, 1, 1], bool)  # the second worker's lanes of either half
    assert truncated.tolist() == lost.tolist() and not terminated.any() and env.restarts == 1
    assert (info["lost"] == lost).all() and (reward[lost] == 0).all() and (reward[~lost] == 2).all()
    for i in np.flatnonzero(lost):
        np.testing.assert_array_equal(info["final_obs"][i], before[i])
        assert (obs[i] == obs[i, 0]).all()  # a first observation
    obs, reward, terminated, truncated, info = env.step(np.ones(6, int))
    assert "lost" not in info and (reward[lost] == 1).all() and not truncated.any()


@linux
def test_a_user_s_environment_that_hangs_is_noticed(make):
    env = make(2, workers=1, env_fn=f"{__name__}:hangs_in_c", timeout=1.0)
    env.reset(seed=1)
    began, worker = time.monotonic(), pids(env)
    with pytest.raises(dqn.WorkerError, match="no answer in 1 s"):
        env.step_lanes(np.zeros(2, int))
    assert time.monotonic() - began < 5 and not alive(worker[0])


@pytest.mark.parametrize("env_fn, error, word", [
    ("broken", OSError, "no such rocket"), ("broken_in_workers", dqn.WorkerError, "(?s)Traceback.*no such rocket"),
    ("continuous", ValueError, "Discrete"), ("missing", ValueError, "missing")])
def test_a_factory_s_error_arrives(make, env_fn, error, word):
    with pytest.raises(error, match=word):
        make(4, env_fn=f"{__name__}:{env_fn}")


def test_rescale_refuses_a_user_s_environments(make):
    env = make(4, env_fn=f"{__name__}:counter")
    with pytest.raises(ValueError, match="our own lanes"):
        env.rescale(1)


# ----------------------------------------------------------------------------------------------- measuring
@linux
def test_usage_of_every_worker(make):
    env = make(workers=2)
    env.reset(seed=1)
    usage = env.worker_usage()
    assert [row["pid"] for row in usage] == pids(env)
    for row in usage:
        assert 0 < row["cpu_seconds"] < 60 and 2**20 < row["uss"] < row["rss"]
        assert row["uss"] < 100 * 2**20  # the rest is the fork server's, shared
    assert make(mode="single").worker_usage() == []


def test_probe_measures_every_candidate(make, pairs):
    candidates = [{"mode": m, "workers": w, "lanes": n} for m, w, n in (("single", 1, 64), ("dummy", 2, 64),
                                                                       ("subproc", 2, 64))]

    def build(mode, workers, lanes):
        if lanes < 64:
            raise OSError("no room")
        return make(lanes, mode=mode, workers=workers)

    rows = dqn.probe(build, [*candidates, {"mode": "subproc", "workers": 1, "lanes": 8}], 0.05)
    assert [{k: row[k] for k in ("mode", "workers", "lanes")} for row in rows[:3]] == candidates
    assert all(row["steps_per_s"] > 0 and "error" not in row for row in rows[:3])
    assert rows[3]["steps_per_s"] == 0 and rows[3]["error"] == "no room"


def test_outputs_are_the_shared_arrays(make):
    env = make()
    env.reset(seed=1)
    obs, reward, terminated, truncated = env.step_lanes(np.ones(14, int))
    assert obs is env.obs and reward is env.reward and np.shares_memory(terminated, env.flags)
    assert set(outputs(env)) == set(OUT)
