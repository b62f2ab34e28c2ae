"""cleanrl_crypto/dqn_forex_subproc.py through its real command line, at tiny sizes."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

import runs
from cleanrl_crypto import dqn_forex_subproc as dqn
from common.run import CheckFailed
from common.timeout_guard import load_checkpoint
from runs import flags_of, load_summary, records, shared_memory, wait_until
from test_data_forex import forex_hours, frame_of

SCRIPT = Path(dqn.__file__)
TINY = dict(
    data="synthetic:signal?bars=1500", symbols=("EURUSD", "USDJPY"), cost_bps=0, num_envs=16,
    total_timesteps=2048, learning_starts=256, eval_interval=512, batch_size=32, hidden=16, episode_length=16,
    vec_mode="single", report=False, torch_threads=1, cuda=False)
POLE = dict(
    data=None, symbols=None, cost_bps=None, env_fn="pole:make", num_envs=4, vec_mode=None, num_workers=1,
    episode_length=None, total_timesteps=1024, learning_starts=128, eval_interval=512)
WORKERS = dict(vec_mode="subproc", num_workers=2, async_halves=True)
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
BASELINES = {"flat", "buy_and_hold", "best_constant", "sparse_linear", "random_same_turnover", "optimum"}
flags = partial(flags_of, TINY)


def start(run_dir, **changes):
    """The script as a process group of its own, in a folder where an import of wandb ends it."""
    (run_dir.parent / "wandb.py").write_text("raise SystemExit('wandb was imported')\n")
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags(run_dir, **changes)], cwd=run_dir.parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(run_dir.parent)})


def family(child) -> list[psutil.Process]:
    return psutil.Process(child.pid).children(recursive=True)


@pytest.fixture
def refused(refusal_of):
    return refusal_of(SCRIPT)


def forgive(state):
    """What a monitor has of the time of day; the order of a step's episodes depends on the halves."""
    monitor = state.get("parts", {}).get("monitor")
    if monitor:
        del monitor["bytes"], monitor["start"]  # times differ, also in length
        monitor["ended"].sort()


def assert_same_run(a, b):
    runs.assert_same_run(a, b, forgive)
    one, two = (pd.read_csv(x / "monitor.csv", skiprows=1).drop(columns="t") for x in (a, b))
    one, two = (frame.sort_values(list(frame)).reset_index(drop=True) for frame in (one, two))
    pd.testing.assert_frame_equal(one, two)


def test_the_average_has_no_share_of_the_random_start(tmp_path):
    """After the first updates of a run, which all come in one vector step, it is the learner."""
    dqn.main(flags(tmp_path / "r", total_timesteps=272))
    state = load_checkpoint(tmp_path / "r/checkpoints/last.pt")
    assert state["loop"]["updates"] == 4
    for name, weights in state["agent"].items():
        torch.testing.assert_close(weights, state["parts"]["learner"][name])


def check_files(run_dir, *splits):
    """What the script itself writes; the rest is run.py's (test_run.py)."""
    for name in ("monitor.csv", *(f"traces/{split}.parquet" for split in splits)):
        assert (run_dir / name).stat().st_size > 0, name
    assert not list(run_dir.rglob("*.tmp"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The command line once, on two workers in two halves, with the report: directory, output, processes left."""
    run_dir, before, children = tmp_path_factory.mktemp("base") / "run", shared_memory(), set()
    child = start(run_dir, **WORKERS, report=True, checkpoint_interval=0.2, keep_checkpoints=2)
    saved = run_dir / "checkpoints"
    wait_until(child, lambda: children.update(family(child)) or any(saved.glob("step_*.pt")))
    out, err = child.communicate(timeout=600)
    assert child.returncode == 0, err
    assert len(children) >= 3, "no worker process was there"
    _, left = psutil.wait_procs(children, timeout=5)
    return run_dir, out, err, left, shared_memory() - before


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs in this process by name, each made when it is first asked for: (run directory, summary)."""
    root = tmp_path_factory.mktemp("runs")
    return cache(lambda name, **changes: (root / name, dqn.main(flags(root / name, **changes))))


@pytest.fixture
def pole(tmp_path, monkeypatch):
    """A module of the user's with a factory, importable here and in workers."""
    (tmp_path / "pole.py").write_text("import gymnasium\n\n\ndef make():\n    return gymnasium.make('CartPole-v1')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --------------------------------------------------------------------------------- the command line
def test_run_directory_is_complete(base):
    run_dir, out, err, left, shared = base
    check_files(run_dir, "train", "eval", "test", "test_EURUSD", "test_USDJPY")
    assert "<html" in (run_dir / "report.html").read_text()
    assert not left and not shared and "Traceback" not in err and "wandb" not in err
    trace = pd.read_parquet(run_dir / "traces" / "test.parquet")
    assert str(trace["timestamp"].dt.tz) == "UTC"
    summary = load_summary(run_dir)
    assert set(summary["eval"]) == set(dqn.SPLITS) and len(summary["data"]["sha256"]) == 2
    for result in summary["eval"].values():
        assert set(result["symbols"]) == set(summary["data"]["names"]) and result["partial"] is False
        for where in (result, *result["symbols"].values()):
            assert set(where["baselines"]) == BASELINES and not any(where["baselines"]["flat"].values())
            for metrics in (where["agent"], *where["baselines"].values()):
                assert all(v is None or math.isfinite(v) for v in metrics.values())
            best = where["baselines"]["optimum"]["mean_expected_bps"]
            assert where["agent"]["score"] == pytest.approx(where["agent"]["mean_expected_bps"] / best)
    assert summary["status"] == "finished" and summary["global_step"] == 2048
    assert summary["samples_per_transition"] == pytest.approx(summary["replay_ratio"] * TINY["batch_size"])
    # 4 updates at every vector step that begins with learning_starts transitions in replay
    assert summary["updates"] == 4 * (2048 - 256) // 16 and summary["env_builds"] == 1
    performance = summary["performance"]
    assert (performance["mode"], performance["workers"], performance["lanes"]) == ("subproc", 2, 16)
    assert len(performance["worker_usage"]) == 2 and performance["restarts"] == 0
    for row in performance["worker_usage"]:
        assert 0 < row["cpu_seconds"] < 60 and 2**20 < row["uss"] < row["rss"]
        assert row["uss"] < 100 * 2**20  # the rest is the fork server's, shared
    judged = [line["global_step"] for line in records(run_dir) if "policy/state_dependence" in line]
    assert judged == [0, 512, 1024, 1536, 2048]  # the last weights too


def test_monitor_is_read_by_stable_baselines3(base):
    from stable_baselines3.common.results_plotter import load_results

    frame = load_results(str(base[0]))
    assert {"r", "l", "t", "drawdown", "turnover", "sharpe_ratio", "max_drawdown"} <= set(frame)
    assert len(frame) >= 2048 // 16 and frame["l"].max() == 16 and frame["l"].min() >= 1
    assert (frame["l"] == 16).mean() > 0.8 and (frame["t"].diff()[1:] >= 0).all()


def test_policy_from_a_checkpoint_acts_as_the_evaluation_did(base):
    """On the split's columns and the position before, as its traces have them."""
    best, results = base[0] / "checkpoints" / "best.pt", load_summary(base[0])["eval"]["test"]["symbols"]
    policy, state = dqn.load_policy(best), load_checkpoint(best)
    args = dqn.Args(**{name: TINY[name] for name in ("data", "symbols", "cost_bps")})
    pairs = dqn.load_pairs(args, state["config"]["models"])
    for name, rows in zip(TINY["symbols"], pairs.rows["test"]):
        trace = pd.read_parquet(base[0] / "traces" / f"test_{name}.parquet")
        before = trace["position"].shift(fill_value=0.0)
        obs = np.column_stack([pairs.table[slice(*rows)], before]).astype(np.float32)
        np.testing.assert_array_equal(policy(obs) - 1, trace["position"])
        assert trace["position"].nunique() > 1  # a constant would agree with all
        assert trace["equity"].iloc[-1] == pytest.approx(1 + results[name]["agent"]["total_return"])


def test_eval_only_runs_with_the_checkpoints_own_flags(base, tmp_path, capfd, refused):
    """And says what the command line changes."""
    best = base[0] / "checkpoints" / "best.pt"
    few = ["--eval-only", "--checkpoint", str(best), "--no-report", "--torch-threads", "1", "--no-cuda"]
    again = dqn.main([*few, "--run-dir", str(tmp_path / "again")])
    assert again["eval"] == load_summary(base[0])["eval"] and again["exit_code"] == 0
    assert again["data"] == load_summary(base[0])["data"] and again["performance"]["workers"] == 0
    capfd.readouterr()
    dear = dqn.main([*few, "--run-dir", str(tmp_path / "dear"), "--cost-bps", "24"])
    assert "--cost-bps" in capfd.readouterr().out
    mean = [x["eval"]["test"]["baselines"]["buy_and_hold"]["mean_expected_bps"] for x in (again, dear)]
    assert mean[1] < mean[0]
    for changes, word in ((["--symbols", "EURUSD", "GBPUSD"], "GBPUSD"), (["--feature-cols", "rsi_14"], "ema_20")):
        assert word in refused([*few, "--run-dir", tmp_path / "no", *changes])


# --------------------------------------------------------------- one trajectory, whoever steps the lanes
def test_main_twice_in_one_process(run):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    (a, first), (b, second) = run("single"), run("again")
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert_same_run(a, b)
    assert first["updates"] > 0 and first["env_builds"] == second["env_builds"] == 1
    assert second["buffer_allocations"] == first["buffer_allocations"]  # handed on


@pytest.mark.parametrize("name, changes", [
    ("dummy", dict(vec_mode="dummy", num_workers=3, checkpoint_interval=0.0)),
    ("auto", dict(vec_mode="auto", num_workers=2)),
])
def test_the_run_does_not_depend_on_how_the_lanes_step(run, name, changes):
    """Workers, blocks, and how often a checkpoint is written, are nobody's business."""
    (a, _), (b, summary) = run("single"), run(name, **changes)
    assert_same_run(a, b)
    performance = summary["performance"]
    if name == "auto":
        assert {row["vec_mode"] for row in performance["probe"]} == {"single", "dummy", "subproc"}
        best = max(performance["probe"], key=lambda row: row["steps_per_s"])
        assert performance["mode"] == best["vec_mode"] and best["steps_per_s"] > 0


def test_where_no_worker_starts_the_lanes_step_here(run, tmp_path, monkeypatch):
    def no_room(preload):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dqn, "worker_context", no_room)
    summary = dqn.main(flags(tmp_path / "run", vec_mode="subproc", num_workers=2))
    assert summary["performance"]["mode"] == "dummy" and summary["performance"]["workers"] == 0
    assert_same_run(run("single")[0], tmp_path / "run")


def test_halves_in_workers_give_the_run_of_halves_here(run, base):
    (a, _), (b, *_) = run("halves", vec_mode="dummy", num_workers=1, async_halves=True), base
    assert_same_run(a, b)


def test_real_pairs_end_to_end(tmp_path):
    for seed, name, price in ((0, "EURUSD", 1.1), (1, "USDJPY", 150.0)):
        frame = frame_of(seed, price, forex_hours(1500))
        frame.to_parquet(tmp_path / f"{name}_1h.parquet", index=False)
    changes = dict(data=tmp_path, weekend="flat", swap_long_bps=(0.5, -0.5), spread_pips=(1.5,), cost_bps=0.2,
                   leverage=2)
    summary = dqn.main(flags(tmp_path / "run", **changes))
    assert summary["data"]["names"] == ["EURUSD", "USDJPY"] and summary["selected_by"] == "mean_reward_bps"
    for result in summary["eval"].values():
        assert set(result["baselines"]) == BASELINES - {"optimum"}
        assert "score" not in result["agent"] and "mean_expected_bps" not in result["agent"]
    frame.iloc[:-9].to_parquet(tmp_path / "USDJPY_1h.parquet", index=False)
    with pytest.raises(dqn.UsageError, match="sha256"):  # other bars than the checkpoint's
        dqn.main(flags(tmp_path / "run", **changes, resume="auto", total_timesteps=4096))


def test_no_update_is_called_untrained_and_patience_ends_once_and_for_all(tmp_path):
    none = dqn.main(flags(tmp_path / "none", total_timesteps=256, updates_per_step=0))
    assert none["updates"] == 0 and none["audit"]["verdict"] == "untrained" and none["exit_code"] == 0
    changes = dict(patience=1, total_timesteps=10**6, learning_rate=0.0)
    stopped = dqn.main(flags(tmp_path / "run", **changes))
    assert stopped["status"] == "finished" and stopped["global_step"] <= 1536
    resumed = dqn.main(flags(tmp_path / "run", **changes, resume="auto"))
    assert resumed["global_step"] == stopped["global_step"] and resumed["eval"] == stopped["eval"]


def test_time_given_is_time_used_and_schedules_count_transitions(tmp_path, monkeypatch):
    monkeypatch.setattr(dqn, "SCHEDULE", 1024)
    changes = dict(total_timesteps=None, learning_rate=0.0)
    alone = dqn.main(flags(tmp_path / "alone", **changes))
    assert alone["status"] == "finished" and alone["global_step"] == 1024
    timed = dqn.main(flags(tmp_path / "timed", **changes, timeout=600, patience=4))
    assert timed["global_step"] == 2560  # an untrained agent, and five evaluations of one that stays
    rows = [r for r in records(tmp_path / "timed") if "charts/epsilon" in r]
    assert [r["charts/epsilon"] for r in rows[1:]] == [0.05] * 4  # not a share of what time allowed


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(dqn, "td_target", lambda reward, *rest: reward * math.nan)
    with pytest.raises(CheckFailed, match="not finite"):
        dqn.main(flags(tmp_path / "run"))


# ------------------------------------------------------------------------------------- how runs end
@POSIX
def test_a_sigterm_to_the_group_saves_and_a_kill_leaves_nothing(run, tmp_path):
    """As systemd and Slurm do: 143 and everything written. Then SIGKILL amid workers: none survives, the same bits."""
    changes = WORKERS | dict(resume="auto", total_timesteps=1024, checkpoint_interval=0.0)
    run_dir, before = tmp_path / "run", shared_memory()
    last = run_dir / "checkpoints" / "last.pt"

    def reached(step):
        return any(int(path.stem[5:]) >= step for path in last.parent.glob("step_*.pt"))

    child = start(run_dir, **changes)
    wait_until(child, lambda: reached(300))
    os.killpg(child.pid, signal.SIGTERM)
    out, err = child.communicate(timeout=300)
    assert child.returncode == 143 and "Traceback" not in err, err
    check_files(run_dir, "test")
    first = load_checkpoint(last)["loop"]["global_step"]
    summary = load_summary(run_dir)
    assert (summary["status"], summary["global_step"]) == ("interrupted", first)

    child = start(run_dir, **changes)
    wait_until(child, lambda: reached(max(600, first + 16)))
    workers = family(child)
    child.kill()
    child.communicate()
    _, left = psutil.wait_procs(workers, timeout=5)
    assert len(workers) >= 3 and not left and shared_memory() <= before
    assert first < load_checkpoint(last)["loop"]["global_step"] < 1024
    with open(run_dir / "metrics.jsonl", "a") as f:  # what it wrote after the checkpoint, the last line torn
        f.write(json.dumps({"global_step": 1000, "wall": 1.0, "losses/td_loss": 123.0}) + "\n" + '{"global_st')
    began = json.loads((run_dir / "monitor.csv").read_text().splitlines()[0][1:])["t_start"]
    summary = dqn.main(flags(run_dir, **changes))
    assert summary["status"] == "finished" and summary["exit_code"] == 0
    t = pd.read_csv(run_dir / "monitor.csv", skiprows=1)["t"]
    assert (t.diff()[1:] >= 0).all() and t.iloc[-1] <= time.time() - began
    whole, _ = run("short", vec_mode="dummy", num_workers=1, async_halves=True, total_timesteps=1024)
    assert_same_run(whole, run_dir)


def interrupt(monkeypatch, step, argv):
    """Run until the vector step of that number, which is not made."""
    send, steps = dqn.ForexVectorEnv.send, []

    def stop(env, half, action):
        steps.append(1)
        if len(steps) == step:
            raise KeyboardInterrupt
        return send(env, half, action)

    monkeypatch.setattr(dqn.ForexVectorEnv, "send", stop)
    with pytest.raises(KeyboardInterrupt):
        dqn.main(argv)
    monkeypatch.undo()


def test_resumed_from_any_checkpoint_it_has_the_bits_of_the_uninterrupted_run(run, tmp_path, monkeypatch):
    """Stopped after a checkpoint, it goes on in another mode; its replay has begun to forget."""
    changes = dict(leverage=3, buffer_size=512)
    whole, _ = run("levered", **changes)
    run_dir = tmp_path / "run"
    interrupt(monkeypatch, 71, flags(run_dir, **changes, checkpoint_interval=0.0))
    assert load_checkpoint(run_dir / "checkpoints" / "last.pt")["loop"]["global_step"] == 70 * 16
    dqn.main(flags(run_dir, **changes, resume="auto", vec_mode="dummy", num_workers=2))
    assert_same_run(whole, run_dir)


def test_a_run_killed_before_its_first_checkpoint_begins_anew(run, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    interrupt(monkeypatch, 40, flags(run_dir))
    dqn.main(flags(run_dir, resume="auto"))
    assert_same_run(run("single")[0], run_dir)  # monitor.csv too: no episode twice


# ---------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("changes, words", [
    (dict(num_envs=0), ["--num-envs", "0"]),
    (dict(vec_mode="threads"), ["--vec-mode", "threads", "subproc"]),
    (dict(vec_mode="subproc", num_workers=17), ["17", "16"]),
    (dict(num_envs=15, vec_mode="dummy", async_halves=True), ["15"]),
    (dict(num_workers=2), ["--num-workers", "single"]),
    (dict(rescale=True), ["--rescale", "single"]),
    (dict(vec_mode="dummy", on_worker_death="restart"), ["--on-worker-death", "dummy"]),
    (POLE | dict(leverage=2), ["--leverage", "pole:make"]),
    (POLE | dict(env_fn="nowhere:make"), ["nowhere"]),
    (dict(backend="cuda", vec_mode="dummy"), ["cuda"]),
])
def test_bad_flags_are_refused_in_one_line(pole, refused, changes, words):
    err = refused(flags(**{"run_dir": pole / "run"} | changes))
    assert all(word in err for word in words), err
    assert not (pole / "run" / "metrics.jsonl").exists() and not (pole / "runs").exists()


# ----------------------------------------------------------------------------- custom environments
def test_a_custom_environment_is_learned_in_its_workers_and_resumed(pole):
    changes = POLE | dict(learning_rate=3e-3)
    one = dqn.main(flags(pole / "one", **changes))
    two = dqn.main(flags(pole / "two", **changes | dict(num_workers=2, async_halves=True)))
    check_files(pole / "one")
    assert one["updates"] > 0 and one["performance"]["workers"] == 1 and two["performance"]["workers"] == 2
    agent = one["eval"]["eval"]["agent"]
    assert agent["episodes"] == 100 and agent["episode_return"] == agent["episode_length"] >= 8
    few = ["--eval-only", "--checkpoint", str(pole / "one" / "checkpoints" / "best.pt"), "--no-report", "--no-cuda"]
    again = dqn.main([*few, "--run-dir", str(pole / "again")])
    assert again["eval"] == one["eval"]
    more = dqn.main(flags(pole / "one", **changes | dict(resume="auto", total_timesteps=2048)))
    last = load_checkpoint(pole / "one" / "checkpoints" / "last.pt")
    assert more["global_step"] == 2048 and last["parts"]["envs"]["starts"] == 1


# -------------------------------------------------------------------------------------------- slow
@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_solves_cartpole(pole, seed):
    """60 000 transitions; then 100 episodes that chose nothing."""
    changes = dict(
        env_fn="pole:make", num_envs=8, num_workers=1, total_timesteps=60_000, learning_starts=1000, tau=1,
        target_network_frequency=128, learning_rate=2.3e-3, exploration_fraction=0.16, end_e=0.04, gamma=0.99,
        weight_decay=0, batch_size=64, buffer_size=60_000, hidden=256, eval_interval=10_000, report=False,
        torch_threads=1, cuda=False, seed=seed)
    summary = dqn.main(flags_of(changes, pole / "run"))
    assert summary["eval"]["eval"]["agent"]["episode_return"] >= 475 and summary["global_step"] == 60_000
    few = ["--eval-only", "--checkpoint", str(pole / "run" / "checkpoints" / "best.pt"), "--no-report", "--no-cuda"]
    again = dqn.main([*few, "--run-dir", str(pole / "again"), "--seed", str(seed + 1000)])
    assert again["eval"]["eval"]["agent"]["episode_return"] >= 475


@pytest.mark.slow
@pytest.mark.parametrize("market, good", [
    ("signal", lambda agent: agent["score"] > 0.85), ("noise", lambda agent: agent["mean_expected_bps"] > -0.2)])
def test_the_defaults_learn_what_the_market_holds(tmp_path, market, good):
    argv = [sys.executable, str(SCRIPT), "--data", f"synthetic:{market}", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    agent = load_summary(tmp_path / "run")["eval"]["test"]["agent"]
    assert good(agent), agent
