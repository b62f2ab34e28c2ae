"""cleanrl_crypto/ppo_arz_gpu.py through its real command line, at tiny sizes."""

import json
import math
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cleanrl_crypto import ppo_arz_gpu as ppo
from common.timeout_guard import CheckpointError, load_checkpoint
from runs import SUMMARY, assert_same, flags_of, records, wait_until

SCRIPT = Path(ppo.__file__)
TINY = dict(num_envs=16, num_steps=8, num_minibatches=2, update_epochs=2, hidden=16, episode_seconds=10,
            total_timesteps=512, eval_interval=256, report=False, torch_threads=1, cuda=False)
STATS = {"episode_return", "delay_veh_s", "throughput_veh", "mean_speed", "switches"}
LOGGED = {
    "charts/episodic_return", "charts/SPS", "charts/updates", "charts/replay_ratio", "charts/learning_rate",
    "losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/approx_kl", "losses/clipfrac",
    "losses/grad_norm", "losses/explained_variance", "policy/entropy", "policy/log_std_mean", "policy/action_mean",
    "policy/state_dependence", "policy/saturation", "value/v_mean", "env/max_cfl", "env/mass_error", "time/learn",
    "time/rollout", "eval/validation/episode_return", "eval/published/episode_return", "eval/heldout/episode_return"}


flags = partial(flags_of, TINY)


def command(run_dir, *before, **changes):
    """The script as a process of its own: (exit code, stdout, stderr)."""
    done = subprocess.run([sys.executable, *before, str(SCRIPT), *flags(run_dir, **changes)], cwd=run_dir.parent,
                          capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr


def check_run(run_dir, summary):
    assert SUMMARY <= set(summary) and summary["updates"] > 0
    assert summary["replay_ratio"] == pytest.approx(summary["updates"] / summary["global_step"])
    assert sum(summary["phases"].values()) == pytest.approx(summary["wall_seconds"], rel=0.02)
    assert summary["env_builds"] == 2
    assert set(summary["eval"]) == {"validation", "published", "heldout"}
    for result in summary["eval"].values():
        assert {"constant", "p", "pi"} <= set(result["baselines"])
        for metrics in (result["agent"], *result["baselines"].values()):
            assert STATS <= set(metrics) and all(math.isfinite(v) for v in metrics.values())
            assert metrics["mass_error"] < 1e-5 and metrics["max_cfl"] <= 1 + 1e-6
    assert summary["audit"]["verdict"] in ("healthy", "collapsed", "constant_is_right", "untrained")
    assert LOGGED <= {key for record in records(run_dir) for key in record}
    assert json.loads((run_dir / "summary.json").read_text())["eval"] == summary["eval"]
    assert json.loads((run_dir / "args.json").read_text())["num_envs"] == 16
    assert {"last.pt", "best.pt"} <= {p.name for p in (run_dir / "checkpoints").iterdir()}
    assert list(run_dir.glob("events.out.tfevents.*"))
    trace = pd.read_parquet(run_dir / "traces" / "freeway.parquet")
    assert {"time_s", "action_0", "reward", "rho_0", "v_50"} <= set(trace) and len(trace) == 10


# ------------------------------------------------------------------------------------------------ whole runs
def test_the_command_line(tmp_path):
    code, out, err = command(tmp_path / "run")
    assert code == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    check_run(tmp_path / "run", summary)
    assert summary["status"] == "finished" and summary["global_step"] == 512
    assert summary["updates"] == 512 // (16 * 8) * 2 * 2
    assert "sanity" in out and "heldout" in out


@pytest.mark.parametrize("changes", [
    dict(control="both", scheme="godunov", norm_obs=True, norm_reward=True),
    dict(scheme="muscl", clip_vloss=True, ent_coef=0.01, target_kl=0.01, control="inlet", precision="float64"),
    pytest.param(dict(scheme="muscl", pressure="singular", pressure_exponent=0.5, pressure_scale=2.0),
                 marks=pytest.mark.slow)])
def test_variants_and_two_runs_in_one_process(tmp_path, changes):
    results = [ppo.main(flags(tmp_path / name, **changes)) for name in "ab"]
    for name, summary in zip("ab", results):
        check_run(tmp_path / name, summary)
    assert results[0]["eval"] == results[1]["eval"]  # the same flags, the same bits
    a, b = (load_checkpoint(tmp_path / x / "checkpoints" / "last.pt")["learner"] for x in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_resume_gives_the_bits_of_the_uninterrupted_run(tmp_path):
    changes = dict(norm_obs=True, norm_reward=True, anneal_lr=False)
    ppo.main(flags(tmp_path / "whole", **changes))
    ppo.main(flags(tmp_path / "parts", **changes, total_timesteps=256))
    ppo.main(flags(tmp_path / "parts", **changes, resume="auto"))
    a, b = (load_checkpoint(tmp_path / x / "checkpoints" / "last.pt") for x in ("whole", "parts"))
    assert a["global_step"] == b["global_step"] == 512 and a["updates"] == b["updates"]
    assert all(torch.equal(a["learner"][k], b["learner"][k]) for k in a["learner"])
    assert all(torch.equal(a["env"][k], b["env"][k]) for k in a["env"] if k != "seed")


@pytest.mark.parametrize("changes", [
    dict(norm_obs=True, control="both"), dict(scenario="town1", episode_seconds=50, num_envs=8, eval_interval=128)])
def test_killed_and_resumed_it_has_the_bits_of_the_uninterrupted_run(tmp_path, changes):
    """SIGKILL after some checkpoint; the same command goes on from there, and nobody can tell from what it leaves."""
    changes = changes | dict(checkpoint_interval=0, total_timesteps=4096, resume="auto")
    ppo.main(flags(tmp_path / "whole", **changes))
    argv = [sys.executable, str(SCRIPT), *flags(tmp_path / "parts", **changes)]
    child = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    rotated = tmp_path / "parts" / "checkpoints"
    wait_until(child, lambda: len(list(rotated.glob("step_*.pt"))) >= 2)
    child.kill()
    child.communicate()
    reached = load_checkpoint(rotated / "last.pt")["global_step"]
    assert 0 < reached < 4096 and not (tmp_path / "parts" / "summary.json").exists()
    ppo.main(flags(tmp_path / "parts", **changes))
    ppo.main(flags(tmp_path / "parts", **changes))  # there is nothing left to do: nothing changes
    a, b = (load_checkpoint(tmp_path / x / "checkpoints" / "last.pt") for x in ("whole", "parts"))
    for state in (a, b):
        state.pop("args")
        state["env"].pop("seed", None)  # of the same episodes: a resumed environment is told by its state
        state["averages"] = {k: v for k, v in state["averages"].items() if not k.startswith("time/")}
    assert_same(a, b)
    one, two = ([{k: v for k, v in r.items() if k not in ("wall", "charts/SPS") and not k.startswith("time/")}
                 for r in records(tmp_path / x)] for x in ("whole", "parts"))
    for x, y in zip(one, two):
        assert x == y, {k: (v, y.get(k)) for k, v in x.items() if y.get(k) != v}
    assert len(one) == len(two) and one[-1]["global_step"] == 4096


def test_a_policy_from_its_file_alone_acts_as_evaluated(tmp_path, capsys):
    ppo.main(flags(tmp_path / "run"))
    policy = ppo.load_policy(tmp_path / "run" / "checkpoints" / "best.pt")
    env = ppo.FreewayVectorEnv(cases="eval", episode_seconds=10)
    result, _, _ = ppo.evaluate(lambda env: policy, env)
    again = ppo.main(flags(tmp_path / "again", eval_only=True, checkpoint=tmp_path / "run" / "checkpoints" / "best.pt"))
    assert again["eval"]["heldout"]["agent"] == result["heldout"] and again["updates"] == 0
    action = policy(np.zeros((3, 102), np.float32))
    assert action.shape == (3, 1) and action.dtype == np.float32 and np.abs(action).max() <= 1
    assert "other flags" not in capsys.readouterr().out
    ppo.main(flags(tmp_path / "there", eval_only=True, checkpoint=tmp_path / "run" / "checkpoints" / "best.pt",
                   scheme="muscl"))
    assert "was trained with other flags: --scheme richtmyer there, muscl here" in capsys.readouterr().out


def test_sigterm_leaves_a_checkpoint_and_143(tmp_path):
    argv = [sys.executable, str(SCRIPT), *flags(tmp_path / "run", total_timesteps=10**9, num_steps=64)]
    child = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and child.poll() is None:
        path = tmp_path / "run" / "metrics.jsonl"
        if path.exists() and "charts/SPS" in path.read_text():
            break
        time.sleep(0.2)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=300)
    assert child.returncode == 143, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "interrupted" and summary["updates"] > 0
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["global_step"] == summary["global_step"]


def test_a_timeout_ends_cleanly(tmp_path):
    summary = ppo.main(flags(tmp_path / "run", total_timesteps=10**9, timeout=15))
    assert summary["status"] == "timeout" and summary["exit_code"] == 0
    ppo.load_policy(tmp_path / "run" / "checkpoints" / "best.pt")


def test_a_slow_simulation_call_stops_the_run(tmp_path, capsys):
    summary = ppo.main(flags(tmp_path / "run", sim_timeout=1e-6, total_timesteps=10**6))
    assert summary["status"] == "timeout" and summary["global_step"] == 128
    assert "--sim-timeout" in capsys.readouterr().out


def test_gymnasium_tasks_run_with_the_same_agent(tmp_path):
    for env_id in ("CartPole-v1", "Pendulum-v1"):
        summary = ppo.main(flags(tmp_path / env_id, env_id=env_id, episode_seconds=None, num_envs=4, norm_obs=True,
                                 norm_reward=True))
        assert summary["updates"] > 0 and math.isfinite(summary["eval"]["validation"]["agent"]["episode_return"])


# ------------------------------------------------------------------------------------------- two processes
def test_two_processes_follow_one(tmp_path):
    """The same lanes, noise and minibatches: the losses of every logged step are the same but for rounding."""
    same = dict(norm_obs=True, norm_reward=True, eval_interval=128, total_timesteps=384)
    assert ppo.main(flags(tmp_path / "one", **same))["exit_code"] == 0
    argv = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]  # a free port
    code, _, err = command(tmp_path / "two", *argv, **same)
    assert code == 0, err[-2000:]
    one, two = ([r for r in records(tmp_path / x) if "losses/policy_loss" in r] for x in ("one", "two"))
    assert len(one) == len(two) == 3
    for a, b in zip(one, two):
        for key in ("losses/policy_loss", "losses/value_loss", "losses/approx_kl", "losses/grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-5), key


# ------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize("changes, words", [
    (dict(scenario="corridor", control="both"), "--control: of the freeway alone"),
    (dict(scenario="corridor", scheme="richtmyer"), "--scheme richtmyer: of the freeway alone"),
    (dict(cell_length=10.0), "--cell-length: of networks alone"),
    (dict(scheme="muscl", pressure="ancestor"), "--pressure ancestor: of networks alone"),
    (dict(cfl=0.5), "--cfl 0.5 needs --scheme"),
    (dict(scenario="corridor", scheme="muscl", cfl=0.7), "--cfl 0.7: at most 0.5"),
    (dict(env_id="CartPole-v1", scheme="muscl", decision_interval=2.0), "--scheme, --decision-interval: of the scen"),
    (dict(env_id="CartPole-v1", scenario="corridor"), "exclude each other")])
def test_a_flag_that_would_do_nothing_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        ppo.Args(**changes)


@pytest.mark.parametrize("changes, words", [
    (dict(num_envs=0), "--num-envs"), (dict(gamma=1.5), "--gamma"), (dict(scheme="upwind"), "--scheme"),
    (dict(decision_interval=0.3), "--decision-interval"), (dict(episode_seconds=10.5), "--episode-seconds"),
    (dict(num_minibatches=3), "--num-minibatches"), (dict(eval_only=True), "--checkpoint"),
    (dict(cudagraphs=True), "--compile"), (dict(resume="auto", run_dir=None), "--run-dir"),
    (dict(pressure="power"), "--pressure"), (dict(scheme="muscl", cfl=0.9), "--cfl"),
    (dict(backend="cuda", scheme="muscl"), "--backend"), (dict(scenario="motorway"), "--scenario"),
    (dict(env_id="CartPole-v99", episode_seconds=None), "CartPole"), (dict(resume="nowhere.pt"), "nowhere.pt")])
def test_a_bad_flag_is_refused_in_one_line(tmp_path, monkeypatch, changes, words):
    if changes.get("backend") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has what the refusal misses")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ppo.UsageError, CheckpointError, ppo.NetworkError), match=words) as error:
        ppo.main(flags(tmp_path / "run", **changes))
    assert "\n" not in str(error.value)


def test_a_refusal_is_exit_code_2_without_traceback(tmp_path):
    code, out, err = command(tmp_path / "run", num_envs=-1)
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ") and "--num-envs" in err
    done = subprocess.run([sys.executable, str(SCRIPT), "--num-env", "3"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "--num-envs" in done.stderr and not (tmp_path / "run").exists()


def test_other_flags_at_resume_are_refused(tmp_path):
    ppo.main(flags(tmp_path / "run", total_timesteps=128))
    with pytest.raises(ppo.UsageError, match="--control"):
        ppo.main(flags(tmp_path / "run", resume="auto", control="both"))
    with pytest.raises(ppo.UsageError, match="--resume auto"):
        ppo.main(flags(tmp_path / "run"))


# --------------------------------------------------------------------------------------------------- slow
@pytest.mark.slow
@pytest.mark.parametrize("env_id, goal, more", [
    ("CartPole-v1", 475, dict(num_envs=8, num_steps=128, num_minibatches=4, learning_rate=1e-3, gamma=0.99,
                              total_timesteps=200_000)),
    ("Pendulum-v1", -250, dict(num_envs=8, num_steps=256, num_minibatches=8, update_epochs=10, learning_rate=1e-3,
                               gamma=0.9, log_std_init=-0.5, norm_obs=True, norm_reward=True,
                               total_timesteps=200_000))])
def test_known_tasks_are_solved(tmp_path, env_id, goal, more):
    more |= dict(env_id=env_id, episode_seconds=None, hidden=64, eval_interval=20_000)
    summary = ppo.main(flags(tmp_path / "run", **more))
    assert summary["eval"]["validation"]["agent"]["episode_return"] >= goal


@pytest.mark.slow
def test_it_damps_the_published_wave(tmp_path):
    argv = ["--total-timesteps", "8000000", "--no-report", "--run-dir", str(tmp_path / "run")]
    assert subprocess.run([sys.executable, str(SCRIPT), *argv], capture_output=True, timeout=1500).returncode == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    held = summary["eval"]["heldout"]
    assert summary["eval"]["published"]["agent"]["episode_return"] > -106
    assert held["agent"]["episode_return"] > 0.95 * held["baselines"]["pi"]["episode_return"]
