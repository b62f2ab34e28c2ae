"""cleanrl_crypto/ppo_arz_gpu.py through its real command line, at tiny sizes."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch

from cleanrl_crypto import ppo_arz_gpu as ppo
from common.lanes import SimulatedLanes
from common.run import UsageError
from common.timeout_guard import load_checkpoint
from runs import assert_same_run, flags_of, last_of, records, wait_until

SCRIPT = Path(ppo.__file__)
TINY = dict(
    num_envs=16, num_steps=8, num_minibatches=2, update_epochs=2, hidden=16, episode_seconds=10,
    total_timesteps=512, eval_interval=256, report=False, torch_threads=1, cuda=False)
flags = partial(flags_of, TINY)


def command(run_dir, *before, **changes):
    """The script as a process of its own: (exit code, stdout, stderr)."""
    argv = [sys.executable, *before, str(SCRIPT), *flags(run_dir, **changes)]
    done = subprocess.run(argv, cwd=run_dir.parent, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr


def check_run(run_dir, summary):
    """What the script itself writes; the rest is run.py's (test_run.py)."""
    assert summary["updates"] > 0 and summary["env_builds"] == 2
    assert set(summary["eval"]) == {"validation", "published", "heldout"}
    for result in summary["eval"].values():
        assert {"constant", "p", "pi"} <= set(result["baselines"])
        for metrics in (result["agent"], *result["baselines"].values()):
            assert all(math.isfinite(x) for x in metrics.values())
            assert metrics["mass_error"] < 1e-5 and metrics["max_cfl"] <= 1 + 1e-6
    trace = pd.read_parquet(run_dir / "traces" / "freeway.parquet")
    assert {"time_s", "action_0", "reward", "rho_0", "v_50"} <= set(trace) and len(trace) == 10


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of the command line that others compare with."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    code, out, err = command(run_dir, checkpoint_interval=0, total_timesteps=2048)
    assert code == 0, err
    return run_dir, out


def test_the_command_line(whole):
    run_dir, out = whole
    summary = json.loads((run_dir / "summary.json").read_text())
    check_run(run_dir, summary)
    assert summary["status"] == "finished" and summary["global_step"] == 2048
    assert summary["updates"] == 2048 // (16 * 8) * 2 * 2
    assert summary["data"]["road"]["rho_max"] == 0.16
    assert "sanity" in out and "heldout" in out


@pytest.mark.parametrize("changes", [
    dict(control="both", scheme="godunov", target_kl=0.01, ent_coef=0.01),
    pytest.param(dict(scheme="muscl", pressure="singular", control="inlet", anneal_lr=False),
                 marks=pytest.mark.slow)])
def test_other_controls_schemes_and_losses(tmp_path, changes):
    check_run(tmp_path / "run", ppo.main(flags(tmp_path / "run", **changes)))


def test_killed_and_resumed_it_has_the_bits_of_the_uninterrupted_run(whole, tmp_path):
    """SIGKILL after some checkpoint; nobody can tell from what the resumed run leaves."""
    changes = dict(checkpoint_interval=0, total_timesteps=2048, resume="auto")
    argv = [sys.executable, str(SCRIPT), *flags(tmp_path / "parts", **changes)]
    child = subprocess.Popen(
        argv, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "parts" / "checkpoints"
    wait_until(child, lambda: len(list(folder.glob("step_*.pt"))) >= 2)
    child.kill()
    child.communicate()
    assert 0 < last_of(tmp_path / "parts")["loop"]["global_step"] < 2048
    ppo.main(flags(tmp_path / "parts", **changes))
    assert_same_run(whole[0], tmp_path / "parts")


def test_a_policy_from_its_file_alone_acts_as_evaluated(whole, tmp_path):
    best = whole[0] / "checkpoints" / "best.pt"
    policy = ppo.load_policy(best)
    env = ppo.FreewayVectorEnv(cases="eval", episode_seconds=10)
    result, _, _ = ppo.evaluate(lambda env: lambda obs: torch.tensor(policy(obs)), env)
    action = policy(np.zeros((3, 102), np.float32))
    assert action.shape == (3, 1) and action.dtype == np.float32 and np.abs(action).max() <= 1
    again = ppo.main(["--eval-only", "--checkpoint", str(best), "--run-dir", str(tmp_path / "again")])
    assert again["eval"]["heldout"]["agent"] == result["heldout"]  # its own 10 s, not the default
    trained = load_checkpoint(best)["loop"]
    assert again["updates"] == trained["updates"]
    with pytest.raises(UsageError, match="actions 1 there, 2 here"):
        ppo.main(["--eval-only", "--checkpoint", str(best), "--control", "both", "--run-dir", str(tmp_path / "both")])


def test_a_slow_simulation_call_stops_the_run_and_the_compiler_does_not(tmp_path):
    summary = ppo.main(flags(tmp_path / "run", sim_timeout=1e-6, total_timesteps=10**6))
    assert (summary["status"], summary["exit_code"], summary["global_step"]) == ("timeout", 0, 128)
    env = ppo.FreewayVectorEnv(2, episode_seconds=10)
    env.longest_call = 99.0
    ppo.check_road(SimpleNamespace(args=ppo.Args(), eval_limit=lambda share: 99.0), env)
    assert 0 < env.longest_call < 9


def test_a_broken_lane_does_not_break_the_run(tmp_path):
    """One lane is not a number in the middle of training: it terminates, the others train on."""
    class Broken(ppo.FreewayVectorEnv):
        calls = 0

        def step_lanes(self, action):
            self.calls += 1
            if self.calls == 20:
                self.rows("u")[0, 7, 2] = math.nan
            return super().step_lanes(action)

    small = dict(scheme="godunov", episode_seconds=10)
    envs, eval_envs = Broken(16, **small), ppo.FreewayVectorEnv(cases="eval", **small)
    summary = ppo.main(flags(tmp_path / "run", **small), envs=envs, eval_envs=eval_envs)
    assert summary["status"] == "finished" and summary["audit"]["verdict"] == "undecided"
    assert np.isfinite(losses_of(tmp_path / "run")).all()


class Target(SimulatedLanes):
    """The action that is asked for is what one sees; reward: minus the square of what is missed."""

    obs_scale, traced, length, decision_interval = 1.0, 0, 5, 1.0

    def __init__(self, num_envs: int, **splits):
        box = gym.spaces.Box(-1, 1, (1,), np.float32)
        super().__init__(num_envs, box, box)
        self.splits = splits

    def draw(self):
        self.asked = 2 * torch.rand(self.num_envs, 1, generator=self.draws) - 1

    def reset_lanes(self, first, options):
        if first:
            self.draws = torch.Generator().manual_seed(self.seed)
        self.draw()
        self.totals, self.finals = torch.zeros(2, 2, self.num_envs)

    def observe(self):
        return self.asked

    last_observations = observe  # what is asked for tells nothing of what comes next

    def step_lanes(self, action):
        reward = -((action - self.asked) ** 2).flatten()
        self.draw()
        self.totals += torch.stack([reward, torch.ones(self.num_envs)])
        over = self.totals[1] == self.length
        self.finals = torch.where(over, self.totals, self.finals)
        self.totals = torch.where(over, 0.0, self.totals)
        return reward, torch.zeros_like(over), over

    def stats(self, name="totals"):
        return dict(zip(("episode_return", "episode_length"), getattr(self, name)))

    def trace(self):
        return {}


def test_a_known_task_is_solved(tmp_path):
    """The loop learns: the best constant has -1.67 an episode, a policy that is right 0."""
    changes = dict(
        num_envs=32, num_steps=16, num_minibatches=4, update_epochs=4, learning_rate=3e-3, log_std_init=-1.0,
        eval_interval=2048, total_timesteps=10_240)
    eval_envs = Target(64, validation=slice(0, 64))
    summary = ppo.main(flags(tmp_path / "run", **changes), envs=Target(32), eval_envs=eval_envs)
    assert summary["eval"]["validation"]["agent"]["episode_return"] > -0.05
    assert summary["audit"]["verdict"] == "undecided"  # there is no baseline


@pytest.mark.parametrize("resumed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_follow_one(tmp_path, resumed):
    """The same lanes, noise and minibatches: losses are the same but for rounding; then resumed."""
    same = dict(eval_interval=128, total_timesteps=256)
    assert ppo.main(flags(tmp_path / "one", **same))["exit_code"] == 0
    argv = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]  # a free port
    for more in (same, *[same | dict(resume="auto", total_timesteps=384)] * resumed):
        code, _, err = command(tmp_path / "two", *argv, **more)
        assert code == 0, err[-2000:]
    one, two = (losses_of(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 2 and len(two) == 2 + resumed
    np.testing.assert_allclose(two[:2], one, rtol=1e-3, atol=1e-5)
    lanes = last_of(tmp_path / "two")["parts"]["envs"]  # every process has lanes of its own
    assert len(lanes) == 2 and not torch.equal(lanes[0]["lane"], lanes[1]["lane"])


def losses_of(run_dir) -> list[list[float]]:
    names = [f"losses/{name}" for name in ("policy_loss", "value_loss", "approx_kl", "grad_norm")]
    return [[r[name] for name in names] for r in records(run_dir) if names[0] in r]


@pytest.mark.parametrize("changes, words", [
    (dict(num_envs=0), "--num-envs"), (dict(gamma=1.5), "--gamma"), (dict(scheme="upwind"), "--scheme"),
    (dict(decision_interval=0.3), "--decision-interval"), (dict(episode_seconds=10.5), "--episode-seconds"),
    (dict(num_minibatches=3), "--num-minibatches"), (dict(cudagraphs=True), "--compile"),
    (dict(pressure="power"), "--pressure"), (dict(pressure_scale=20.0, scheme="muscl"), "--pressure-scale"),
    (dict(scenario="corridor"), "ppo_arz_signals.py --scenario corridor"), (dict(seed=2**31), "--seed")])
def test_a_bad_flag_is_refused(tmp_path, changes, words):
    with pytest.raises(UsageError, match=words):
        ppo.main(flags(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_it_damps_the_published_wave(tmp_path):
    summary = ppo.main(["--total-timesteps", "8000000", "--no-report", "--run-dir", str(tmp_path / "run")])
    held = summary["eval"]["heldout"]
    assert summary["eval"]["published"]["agent"]["episode_return"] > -106
    assert held["agent"]["episode_return"] > 0.95 * held["baselines"]["pi"]["episode_return"]
    assert summary["audit"]["verdict"] == "healthy"
