"""cleanrl_crypto/dqn_forex_subproc.py through its real command line, at tiny sizes."""

import json
import math
import os
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

from cleanrl_crypto import dqn_forex_subproc as dqn
from common.data import COLUMNS, load_bars
from common.timeout_guard import load_checkpoint
from runs import SUMMARY, assert_same, flags_of, load_summary, records, wait_until

SCRIPT = Path(dqn.__file__)
TINY = dict(
    data="synthetic:signal?bars=1500", symbols=("EURUSD", "USDJPY"), num_envs=16, total_timesteps=2048,
    learning_starts=256, eval_interval=512, batch_size=32, hidden=16, episode_length=16, vec_mode="single",
    report=False, torch_threads=1, cuda=False,
)
PLAIN = dict(all_actions=False, n_step=3, dueling=True, daily_drawdown=0.02, position_mode="drift")
POLE = dict(
    data=None, symbols=None, env_fn="pole:make", num_envs=4, vec_mode="dummy", num_workers=1, episode_length=None,
    total_timesteps=1024, learning_starts=128, eval_interval=512, eval_episodes=4,
)
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

KEYS = SUMMARY | {"performance"}
METRICS = {
    "mean_reward_bps", "total_return", "sharpe", "max_drawdown", "turnover", "exposure", "trades", "mean_expected_bps",
}
BASELINES = {"flat", "buy_and_hold", "best_constant", "random_same_turnover", "optimum"}
LOGGED = {
    "charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/updates", "charts/replay_ratio",
    "charts/learning_rate", "losses/td_loss", "losses/q_values", "losses/grad_norm", "policy/entropy",
    "policy/action_mean", "policy/state_dependence", "policy/saturation", "policy/greedy_gap", "value/q_mean",
    "value/q_action_spread", "value/overestimation", "env/turnover", "env/exposure", "env/costs", "time/learn",
    "time/rollout", "eval/eval/mean_reward_bps", "eval/test/mean_reward_bps", "eval/train/mean_reward_bps",
    "eval/eval/score", "eval/eval/turnover",
}


flags = partial(flags_of, TINY)


def start(run_dir, **changes):
    """The script as a process of its own, in a folder where an import of wandb ends it."""
    (run_dir.parent / "wandb.py").write_text("raise SystemExit('wandb was imported')\n")
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags(run_dir, **changes)], cwd=run_dir.parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(run_dir.parent)})


def command(run_dir, **changes):
    """Its exit code, stdout and stderr."""
    child = start(run_dir, **changes)
    out, err = child.communicate(timeout=600)
    return child.returncode, out, err


def family(pid: int) -> set[int]:
    """Processes that descend from pid, this one's own view of /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(stat.parent.name)] = int(fields[1])
    found, new = set(), {pid}
    while new:
        found |= new
        new = {child for child, parent in parents.items() if parent in found} - found
    return found - {pid}


def alive(pids) -> set[int]:
    out = set()
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                out.add(pid)
        except OSError:
            pass
    return out


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


@pytest.fixture
def refused(refusal_of):
    return refusal_of(SCRIPT)


def untimed(run_dir) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in ("wall", "charts/SPS") and not k.startswith("time/")}
            for line in records(run_dir)]


def assert_same_run(a, b):
    """Two run directories hold the same agent, learner, optimiser, environment, replay and metrics."""
    for name in ("last.pt", "best.pt"):
        one, two = (load_checkpoint(x / "checkpoints" / name) for x in (a, b))
        for state in (one, two):
            del state["args"]  # the run directory's name, --resume, --vec-mode
            state.pop("monitor_bytes", None)  # times of day are of different lengths
        assert_same(one, two, name)
    assert untimed(a) == untimed(b)
    one, two = (load_summary(x) for x in (a, b))
    for key in ("status", "global_step", "updates", "best_step", "eval", "audit", "samples_per_transition"):
        assert one[key] == two[key], key
    one, two = (pd.read_csv(x / "monitor.csv", skiprows=1).drop(columns="t") for x in (a, b))
    pd.testing.assert_frame_equal(one.sort_values(list(one)).reset_index(drop=True),
                                  two.sort_values(list(two)).reset_index(drop=True))


def check_summary(summary, market=True):
    """Every key of the contract's table, with values that can be."""
    assert KEYS <= set(summary)
    assert summary["status"] in ("finished", "timeout", "interrupted")
    steps = max(summary["global_step"], 1)
    assert summary["replay_ratio"] == pytest.approx(summary["updates"] / steps)
    assert summary["samples_per_transition"] == pytest.approx(summary["updates"] * TINY["batch_size"] / steps)
    assert sum(summary["phases"].values()) == pytest.approx(summary["wall_seconds"], rel=0.02)
    assert {"setup", "eval", "io"} <= set(summary["phases"]) and min(summary["phases"].values()) >= 0
    assert {"torch", "numpy", "numba", "gymnasium", "python"} <= set(summary["versions"])
    assert summary["audit"]["verdict"] in ("healthy", "collapsed", "constant_is_right", "untrained")
    assert summary["audit"]["reasons"] and all(isinstance(reason, str) for reason in summary["audit"]["reasons"])
    if not market:
        return
    assert set(summary["eval"]) == {"train", "eval", "test"}
    for split, result in summary["eval"].items():
        assert set(result["symbols"]) == set(summary["data"]["names"])
        for where in (result, *result["symbols"].values()):
            assert set(where["baselines"]) == BASELINES and "score" in where["agent"]
            for who, metrics in {"agent": where["agent"], **where["baselines"]}.items():
                assert METRICS <= set(metrics), (split, who)
                assert all(v is None or math.isfinite(v) for v in metrics.values()), (split, who)
                assert -1 <= metrics["max_drawdown"] <= 0 and 0 <= metrics["turnover"] <= 2
                assert -1.5 <= metrics["exposure"] <= 1.5 and isinstance(metrics["trades"], int)
            assert all(v == 0 for v in where["baselines"]["flat"].values())
            best = where["baselines"]["optimum"]["mean_expected_bps"]
            assert where["agent"]["score"] == pytest.approx(where["agent"]["mean_expected_bps"] / best)
    assert len(summary["data"]["sha256"]) == 2 and all(int(x, 16) for x in summary["data"]["sha256"])
    assert 0 <= summary["audit"]["state_dependence"] <= 1


def check_files(run_dir, *splits):
    names = ["args.json", "metrics.jsonl", "summary.json", "monitor.csv", "checkpoints/last.pt", "checkpoints/best.pt"]
    for name in names + [f"traces/{split}.parquet" for split in splits]:
        assert (run_dir / name).stat().st_size > 0, name
    assert list(run_dir.glob("events.out.tfevents.*")) and not list(run_dir.rglob("*.tmp"))
    for path in (run_dir / "checkpoints").glob("*.pt"):
        assert isinstance(torch.load(path, weights_only=True), dict)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The command line once, on two workers in two halves, with the report: its run directory and what it printed."""
    run_dir, before = tmp_path_factory.mktemp("base") / "run", shared_memory()
    child = start(run_dir, vec_mode="subproc", num_workers=2, async_halves=True, report=True, checkpoint_interval=0.2,
                  keep_checkpoints=2)
    seen = set()

    def workers():
        seen.update(family(child.pid))
        return (run_dir / "monitor.csv").exists() and (run_dir / "monitor.csv").read_text().count("\n") > 3

    wait_until(child, workers)
    out, err = child.communicate(timeout=600)
    assert child.returncode == 0, err
    assert len(seen) >= 2, "no worker process was seen"
    return run_dir, out, err, alive(seen), shared_memory() - before


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Runs in this process by name, each made when it is first asked for: (run directory, summary)."""
    runs, root = {}, tmp_path_factory.mktemp("made")

    def get(name, **changes):
        if name not in runs:
            runs[name] = root / name, dqn.main(flags(root / name, **changes))
        return runs[name]

    return get


@pytest.fixture
def pole(tmp_path, monkeypatch):
    """A module of the user's with a factory, importable here and in workers."""
    (tmp_path / "pole.py").write_text("import gymnasium\n\n\ndef make():\n    return gymnasium.make('CartPole-v1')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pole", raising=False)
    return tmp_path


# ---------------------------------------------------------------------------------------- the command line
def test_run_directory_is_complete(base):
    run_dir, out, err, *_ = base
    check_files(run_dir, "train", "eval", "test", "test_EURUSD", "test_USDJPY")
    page = (run_dir / "report.html").read_text()
    assert "<html" in page and ("data:image" in page or "<svg" in page)
    args = json.loads((run_dir / "args.json").read_text())
    assert set(args) == set(dqn.Args.__dataclass_fields__) and args["hidden"] == 16 and args["report"] is True
    assert "Traceback" not in err and "wandb" not in err
    assert "optimum" in out and "buy_and_hold" in out and str(run_dir) in out


def test_nothing_survives_the_run(base):
    *_, left, shared = base
    assert not left and not shared


def test_summary_holds_every_key_of_the_contract(base):
    summary = load_summary(base[0])
    check_summary(summary)
    assert summary["status"] == "finished" and summary["global_step"] == 2048
    # 4 updates at every vector step that begins with learning_starts transitions in replay
    assert summary["updates"] == 4 * (2048 - 256) // 16
    assert summary["env_builds"] == 1 and summary["device"]["torch"] == "cpu"
    performance = summary["performance"]
    assert (performance["mode"], performance["workers"], performance["lanes"]) == ("subproc", 2, 16)
    assert len(performance["worker_usage"]) == 2 and performance["restarts"] == 0
    assert performance["steps_per_s"] > 0
    if sys.platform == "linux":
        assert all(row["cpu_seconds"] > 0 and row["rss"] > row["uss"] > 0 for row in performance["worker_usage"])
    bars = [load_bars(f"synthetic:signal?bars=1500&seed={k}") for k in (0, 1)]
    assert summary["data"]["sha256"] == [b.sha256 for b in bars]


def test_metrics_are_json_lines_in_order_with_the_names_of_the_contract(base):
    lines = records(base[0])
    steps = [line["global_step"] for line in lines]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == 2048
    assert not LOGGED - {key for line in lines for key in line}
    lengths = [line["charts/episodic_length"] for line in lines if "charts/episodic_length" in line]
    assert max(lengths) <= 16 and np.mean(lengths) > 12


def test_rotated_checkpoints_hold_the_agent_alone(base, refused):
    folder = base[0] / "checkpoints"
    rotated = sorted(folder.glob("step_*.pt"))
    assert 1 <= len(rotated) <= 2
    for path in (*rotated, folder / "best.pt"):
        state = load_checkpoint(path)
        assert "agent" in state and "replay" not in state and "learner" not in state
        dqn.load_policy(path)
    assert "last.pt" in refused(flags(base[0], resume=rotated[0]))


def test_monitor_is_read_by_stable_baselines3(base):
    from stable_baselines3.common.results_plotter import load_results

    frame = load_results(str(base[0]))
    assert {"r", "l", "t", "drawdown", "turnover", "sharpe_ratio", "max_drawdown"} <= set(frame)
    assert len(frame) >= 2048 // 16 and frame["l"].max() == 16 and frame["l"].min() >= 1  # the rows of a split end
    assert (frame["l"] == 16).mean() > 0.8 and (frame["t"].diff()[1:] >= 0).all()


def test_policy_from_a_checkpoint_acts_as_the_evaluation_did(base):
    """Step a real lane from the split's first row with load_policy: the traces' positions and equity."""
    run_dir = base[0]
    policy = dqn.load_policy(run_dir / "checkpoints" / "best.pt")
    args = dqn.Args(**{k: v for k, v in TINY.items() if k in ("data", "symbols")})
    env = dqn.ForexVectorEnv(dqn.load_pairs(args), "test", 2, episode_length=10**6)
    env.reset(seed=0)
    state = env.get_state()
    first = env.pairs.rows["test"][:, 0]
    state["ints"][:] = torch.tensor([first.tolist(), [0, 0], [0, 0], [0, 0]])
    state["floats"][:] = torch.tensor([0.0, 1e5, 1e5, 1e5, 0, 0, 0, 0], dtype=torch.float64)[:, None]
    env.set_state(state)
    traces = [pd.read_parquet(run_dir / "traces" / f"test_{name}.parquet") for name in args.symbols]
    equity = 0.0
    for t in range(len(traces[0])):
        action = policy(np.array(env.obs))
        assert action.shape == (2,) and np.issubdtype(action.dtype, np.integer)
        np.testing.assert_array_equal(action - 1, [trace["position"][t] for trace in traces])
        equity = equity + env.step(action)[1]
        np.testing.assert_allclose(np.exp(equity), [trace["equity"][t] for trace in traces], rtol=1e-9)
    env.close()


def test_eval_only_repeats_the_evaluation(base, tmp_path):
    best = base[0] / "checkpoints" / "best.pt"
    again = dqn.main(flags(tmp_path / "again", eval_only=True, checkpoint=best))
    assert again["eval"] == load_summary(base[0])["eval"]
    assert again["updates"] == 0 and again["global_step"] == 0 and again["exit_code"] == 0
    assert again["audit"]["verdict"] != "untrained"
    assert not (tmp_path / "again" / "checkpoints" / "best.pt").exists()


def test_eval_only_of_other_pairs_than_it_was_made_for(base, tmp_path, refused):
    best = base[0] / "checkpoints" / "best.pt"
    for symbols in (("EURUSD",), ("EURUSD", "GBPUSD", "USDJPY")):
        err = refused(flags(tmp_path / "run", eval_only=True, checkpoint=best, symbols=symbols))
        assert "--symbols" in err and "2" in err
    err = refused(flags(tmp_path / "run", eval_only=True, checkpoint=best, feature_cols=("rsi_14", "ret_1")))
    assert "columns" in err and "ema_20" in err


# ------------------------------------------------------------------------------- one law, whoever steps the lanes
def test_main_twice_in_one_process(made):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    began = time.monotonic()
    a, first = made("single")
    assert first["wall_seconds"] <= time.monotonic() - began  # this call's wall clock, not the process's
    b, second = made("again")
    for run_dir, summary in ((a, first), (b, second)):
        check_files(run_dir, "train", "eval", "test")
        check_summary(load_summary(run_dir))
        assert {k for k in summary if k not in ("run_dir", "exit_code")} == set(load_summary(run_dir))
        assert summary["env_builds"] == 1
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert_same_run(a, b)
    assert first["updates"] > 0 and second["buffer_allocations"] == first["buffer_allocations"]  # handed on


@pytest.mark.parametrize("name, changes", [
    ("dummy", dict(vec_mode="dummy", num_workers=3)), ("subproc", dict(vec_mode="subproc", num_workers=2)),
    ("auto", dict(vec_mode="auto", num_workers=2)), ("saved", dict(checkpoint_interval=0.0)),
    ("halves", dict(vec_mode="dummy", num_workers=1, async_halves=True)),
])
def test_the_run_does_not_depend_on_how_the_lanes_step(made, name, changes):
    """Workers, blocks, halves, and how often a checkpoint is written, are nobody's business."""
    (a, _), (b, summary) = made("single"), made(name, **changes)
    assert_same_run(a, b)
    performance = summary["performance"]
    if name == "auto":
        rows = performance["probe"]
        assert {row["vec_mode"] for row in rows} == {"single", "dummy", "subproc"}
        best = max(rows, key=lambda row: row["steps_per_s"])
        assert performance["mode"] == best["vec_mode"] and best["steps_per_s"] > 0
        assert summary["env_builds"] == 1
    else:
        assert performance["mode"] == changes.get("vec_mode", "single")


def test_halves_in_workers_give_the_run_of_halves_here(made, base):
    """Also while checkpoints are written between steps."""
    (a, _), (b, *_) = made("halves", vec_mode="dummy", num_workers=1, async_halves=True), base
    assert_same_run(a, b)


def test_another_seed_is_another_run_on_the_same_market(made):
    (a, one), (b, two) = made("single"), made("seed", seed=2, total_timesteps=1024)
    first, second = (load_checkpoint(x / "checkpoints" / "best.pt")["agent"] for x in (a, b))
    assert not torch.equal(first["online.body.0.weight"], second["online.body.0.weight"])
    assert one["data"]["sha256"] == two["data"]["sha256"]
    assert one["eval"]["test"]["baselines"]["optimum"] == two["eval"]["test"]["baselines"]["optimum"]


def test_plain_dqn_with_everything_on(made):
    run_dir, summary = made("plain", **PLAIN)
    check_files(run_dir, "train", "eval", "test")
    check_summary(load_summary(run_dir))
    config = load_checkpoint(run_dir / "checkpoints" / "best.pt")["config"]
    assert config["all_actions"] is False and config["dueling"] is True and summary["updates"] > 0


def test_real_pairs_end_to_end(tmp_path):
    for seed, name, price in ((0, "EURUSD", 1.1), (1, "USDJPY", 150.0)):
        bars = load_bars(f"synthetic:signal?bars=1500&seed={seed}")
        frame = pd.DataFrame(bars.ohlcv[0], columns=COLUMNS[1:])
        frame[["open", "high", "low", "close"]] *= price / 100
        frame.insert(0, "timestamp", pd.DatetimeIndex(bars.timestamp).tz_localize("UTC"))
        frame.to_parquet(tmp_path / f"{name}_1h.parquet", index=False)
    summary = dqn.main(flags(tmp_path / "run", data=None, data_dir=tmp_path, weekend="flat", swap_long_bps=0.5,
                             spread_pips=(1.5,), commission_bps=0.2))
    assert summary["data"]["names"] == ["EURUSD", "USDJPY"] and summary["selected_by"] == "mean_reward_bps"
    for result in summary["eval"].values():
        assert set(result["baselines"]) == BASELINES - {"optimum"}
        assert "score" not in result["agent"] and "mean_expected_bps" not in result["agent"]
    assert all("optimum" not in c for c in pd.read_parquet(tmp_path / "run" / "traces" / "test_USDJPY.parquet"))


def test_no_update_is_called_untrained(tmp_path):
    summary = dqn.main(flags(tmp_path / "run", total_timesteps=256, updates_per_step=0))
    check_summary(load_summary(tmp_path / "run"))
    assert summary["updates"] == 0 and summary["audit"]["verdict"] == "untrained" and summary["exit_code"] == 0


def test_patience_stops_early(tmp_path, capsys):
    summary = dqn.main(flags(tmp_path / "run", patience=1, total_timesteps=10**6, learning_rate=0.0, average=0.0))
    assert summary["status"] == "finished" and summary["global_step"] <= 1536
    assert "--patience" in capsys.readouterr().out


def test_a_buffer_that_wraps_and_is_shorter_than_the_window(tmp_path, refused):
    kept = dict(all_actions=False, total_timesteps=1024, buffer_size=128)
    summary = dqn.main(flags(tmp_path / "run", **kept, n_step=4))
    assert summary["updates"] > 0 and summary["status"] == "finished"
    err = refused(flags(tmp_path / "short", **kept, n_step=10))
    assert "--n-step" in err and "--buffer-size" in err


# ------------------------------------------------------------------------------------------------- how runs end
def test_a_timeout_ends_cleanly_before_it(tmp_path):
    began, before = time.monotonic(), os.times()
    code, out, err = command(tmp_path / "run", total_timesteps=10**9, timeout=15)
    seconds, after = time.monotonic() - began, os.times()
    assert code == 0, err
    check_files(tmp_path / "run", "test")
    summary = load_summary(tmp_path / "run")
    check_summary(summary)
    assert summary["status"] == "timeout" and summary["global_step"] < 10**9
    worked = after.children_user + after.children_system - before.children_user - before.children_system
    if seconds > 15 and worked < 0.6 * seconds:
        pytest.skip(f"{worked:.0f} s of work in {seconds:.0f} s: this machine is too busy to keep a deadline")
    assert seconds < 15 and summary["wall_seconds"] < 15 and summary["updates"] > 0


@POSIX
def test_an_interrupt_leaves_a_checkpoint_and_a_kill_nothing_else(made, tmp_path):
    """SIGINT: 130 and everything written. Then SIGKILL amid workers: none survives, and the bits are the same."""
    changes = dict(vec_mode="subproc", num_workers=2, async_halves=True, resume="auto", total_timesteps=1024)
    run_dir, before = tmp_path / "run", shared_memory()
    last = run_dir / "checkpoints" / "last.pt"

    def reached(step):
        return any(int(path.stem[5:]) >= step for path in last.parent.glob("step_*.pt"))

    child = start(run_dir, **changes, checkpoint_interval=0.0)
    wait_until(child, lambda: reached(300))
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=300)
    if child.returncode != 0:  # it may have ended by itself just before
        assert child.returncode == 130 and "Traceback" not in err, err
        assert load_summary(run_dir)["status"] == "interrupted"
        check_files(run_dir, "test")
    first = load_checkpoint(last)["global_step"]

    child = start(run_dir, **changes, checkpoint_interval=0.0)
    wait_until(child, lambda: reached(max(600, first + 16)))
    workers = family(child.pid)
    child.kill()
    child.communicate()
    assert first < 1024 and child.returncode == -signal.SIGKILL and len(workers) >= 2
    deadline = time.monotonic() + 5
    while alive(workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(workers) and shared_memory() <= before
    assert first < load_checkpoint(last)["global_step"] < 1024
    with open(run_dir / "metrics.jsonl", "a") as f:  # what it wrote after the checkpoint, the last line torn
        f.write(json.dumps({"global_step": 1000, "wall": 1.0, "losses/td_loss": 123.0}) + "\n" + '{"global_st')

    summary = dqn.main(flags(run_dir, **changes))
    assert summary["status"] == "finished" and summary["exit_code"] == 0
    whole, _ = made("short", vec_mode="dummy", num_workers=1, async_halves=True, total_timesteps=1024)
    assert_same_run(whole, run_dir)


def interrupt(monkeypatch, step: int, argv):
    """Run until the vector step of that number, which is not made."""
    send, steps = dqn.ForexVectorEnv.send, []

    def stop(env, half, actions):
        steps.append(1)
        if len(steps) == step:
            raise KeyboardInterrupt
        return send(env, half, actions)

    monkeypatch.setattr(dqn.ForexVectorEnv, "send", stop)
    with pytest.raises(KeyboardInterrupt):
        dqn.main(argv)
    monkeypatch.undo()


def test_resumed_from_any_checkpoint_it_has_the_bits_of_the_uninterrupted_run(made, tmp_path, monkeypatch):
    """Plain DQN with n-step returns, drift and the drawdown limit: stop after a checkpoint, go on in another mode."""
    whole, _ = made("plain", **PLAIN)
    run_dir = tmp_path / "run"
    interrupt(monkeypatch, 71, flags(run_dir, **PLAIN, checkpoint_interval=0.0))
    assert load_checkpoint(run_dir / "checkpoints" / "last.pt")["global_step"] == 70 * 16
    dqn.main(flags(run_dir, **PLAIN, resume="auto", vec_mode="dummy", num_workers=2))
    assert_same_run(whole, run_dir)


def test_a_run_killed_before_its_first_checkpoint_begins_anew(made, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    interrupt(monkeypatch, 40, flags(run_dir))
    dqn.main(flags(run_dir, resume="auto"))
    assert_same_run(made("single")[0], run_dir)  # monitor.csv too: no episode twice


def test_resume_refuses_other_flags(made, tmp_path, refused):
    run_dir, _ = made("single")
    for changes in (dict(seed=5), dict(hidden=8), dict(symbols=("EURUSD", "GBPUSD")), dict(cost_bps=1.0)):
        name = next(iter(changes)).replace("_", "-")
        assert f"--{name}" in refused(flags(run_dir, resume="auto", **changes))
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
    assert "--resume auto" in refused(flags(run_dir))
    assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")} == before


# ---------------------------------------------------------------------------------------------- refusals
def test_a_refusal_is_one_line_and_exit_code_2(tmp_path):
    code, out, err = command(tmp_path / "run", data_dir=tmp_path)
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and "--data" in err and "--data-dir" in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes, words", [
    (dict(num_envs=0), ["--num-envs", "0"]), (dict(gamma="nan"), ["--gamma"]), (dict(timeout=-3), ["--timeout"]),
    (dict(vec_mode="threads"), ["--vec-mode", "threads", "subproc"]), (dict(leverage=0), ["--leverage"]),
    (dict(weekend="close"), ["--weekend", "close"]), (dict(on_worker_death="pray"), ["--on-worker-death"]),
    (dict(n_step=3), ["--n-step", "--no-all-actions"]),
    (dict(daily_drawdown=0.1), ["--daily-drawdown", "--no-all-actions"]),
    (dict(eval_only=True), ["--eval-only", "--checkpoint"]), (dict(checkpoint="x.pt"), ["--eval-only", "--checkpoint"]),
    (dict(resume="auto", run_dir=None), ["--resume", "--run-dir"]), (dict(resume="nowhere.pt"), ["nowhere.pt"]),
    (dict(eval_only=True, checkpoint="nowhere.pt"), ["nowhere.pt"]), (dict(rescale=True), ["--rescale", "subproc"]),
    (dict(start_e=0.1, end_e=0.5), ["--end-e", "--start-e"]),
    (dict(data=None, data_dir="nowhere"), ["nowhere", "EURUSD"]),
    (dict(data="synthetic:signals"), ["signals", "signal"]), (dict(feature_cols=("rsi14",)), ["rsi14", "rsi_14"]),
    (dict(vec_mode="subproc", num_workers=17), ["17", "16"]), (dict(num_envs=15, async_halves=True), ["15"]),
    (dict(backend="cuda", vec_mode="dummy"), ["cuda"]),
    (dict(env_fn="pole:make"), ["--env-fn", "--data"]),
])
def test_bad_flags_are_refused_in_one_line(tmp_path, refused, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    err = refused(flags(**{"run_dir": tmp_path / "run"} | changes))
    assert all(word in err for word in words), err
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "runs").exists()


def test_tracking_without_wandb_is_refused(tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it raises ImportError
    assert "wandb" in refused(flags(tmp_path / "run", track=True))


# ------------------------------------------------------------------------------------- custom environments
def test_a_custom_environment_from_the_working_directory(pole):
    code, out, err = command_at(pole, **POLE)
    assert code == 0, err
    check_files(pole / "run")


def command_at(folder, **changes):
    """As a user types it in the folder of the module: no PYTHONPATH."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, str(SCRIPT), *flags(folder / "run", **changes)], cwd=folder, env=clean,
                          text=True, capture_output=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_a_custom_environment_is_learned_in_workers_as_here(pole):
    changes = POLE | dict(average=0.9, learning_rate=3e-3)
    one = dqn.main(flags(pole / "one", **changes))
    two = dqn.main(flags(pole / "two", **changes | dict(vec_mode="subproc", num_workers=2)))
    check_summary(load_summary(pole / "one"), market=False)
    assert one["updates"] > 0 and one["eval"] == two["eval"]
    assert untimed(pole / "one") == untimed(pole / "two")
    agent = one["eval"]["eval"]["agent"]
    assert agent["episodes"] == 4 and agent["episode_return"] == agent["episode_length"] >= 8
    policy = dqn.load_policy(pole / "one" / "checkpoints" / "best.pt")
    assert set(policy(np.random.default_rng(0).normal(size=(50, 4)))) <= {0, 1}
    again = dqn.main(flags(pole / "again", **POLE, eval_only=True, checkpoint=pole / "one" / "checkpoints" / "best.pt"))
    assert again["eval"] == one["eval"]


@pytest.mark.parametrize("spec, words", [
    ("pole", ["pole", "module:factory"]), ("pole:nothing", ["nothing"]), ("nowhere:make", ["nowhere"]),
    ("pole:number", ["int"]), ("pole:pendulum", ["Discrete"]),
])
def test_a_bad_factory_is_refused_in_one_line(pole, refused, spec, words):
    with open(pole / "pole.py", "a") as f:
        f.write("\n\ndef number():\n    return 3\n\n\ndef pendulum():\n    return gymnasium.make('Pendulum-v1')\n")
    err = refused(flags(pole / "run", **POLE | dict(env_fn=spec)))
    assert all(word in err for word in words), err
    assert not (pole / "run" / "metrics.jsonl").exists()


# -------------------------------------------------------------------------------------------------- slow
@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_solves_cartpole(pole, seed):
    """60 000 transitions; then 100 episodes that chose nothing."""
    import gymnasium

    argv = ["--env-fn", "pole:make", "--num-envs", "8", "--vec-mode", "dummy", "--num-workers", "1",
            "--total-timesteps", "60000", "--learning-starts", "1000", "--train-frequency", "32",
            "--updates-per-step", "128", "--tau", "1", "--target-network-frequency", "128", "--learning-rate", "2.3e-3",
            "--exploration-fraction", "0.16", "--end-e", "0.04", "--gamma", "0.99", "--weight-decay", "0",
            "--batch-size", "64", "--buffer-size", "60000", "--hidden", "256", "--average", "0.995",
            "--eval-interval", "10000", "--no-report", "--torch-threads", "1", "--no-cuda", "--seed", str(seed),
            "--run-dir", str(pole / "run")]
    summary = dqn.main(argv)
    assert summary["eval"]["eval"]["agent"]["episodes"] == 100
    assert summary["eval"]["eval"]["agent"]["episode_return"] >= 475 and summary["global_step"] == 60_000
    policy, returns = dqn.load_policy(pole / "run" / "checkpoints" / "best.pt"), []
    env = gymnasium.make("CartPole-v1")
    for k in range(100):
        (obs, _), total, over = env.reset(seed=10_000 + k), 0.0, False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(int(policy(obs[None])[0]))
            total, over = total + reward, terminated or truncated
        returns.append(total)
    assert np.mean(returns) >= 475


@pytest.mark.slow
@pytest.mark.parametrize("market, good", [
    ("signal", lambda agent: agent["score"] > 0.6), ("noise", lambda agent: agent["mean_expected_bps"] > -0.2)])
def test_the_defaults_learn_what_the_market_holds(tmp_path, market, good):
    argv = [sys.executable, str(SCRIPT), "--data", f"synthetic:{market}", "--timeout", "120", "--run-dir",
            str(tmp_path / "run")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    agent = load_summary(tmp_path / "run")["eval"]["test"]["agent"]
    assert good(agent), agent
