"""common/run.py, with the toy experiment of toy.py."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.summary.writer.event_file_writer import EventFileWriter

import toy
from common import run as common_run
from common.run import CheckFailed, Run, UsageError, exit_with, flag_groups, load_run, refuse
from common.timeout_guard import CheckpointError, load_checkpoint
from runs import SUMMARY, assert_same, assert_same_run, last_of, load_summary, records, refusal

TOY = Path(toy.__file__)
TINY = ["--no-report", "--torch-threads", "1", "--checkpoint-interval", "0", "--no-cuda"]


def play(folder, *argv, **kwargs):
    return toy.main([*TINY, "--run-dir", str(folder), *map(str, argv)], **kwargs)


def child(*argv, code=None, **kwargs):
    """The toy as a program of its own."""
    command = [sys.executable, *(["-c", code] if code else [str(TOY)]), *map(str, argv)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    path = os.pathsep.join([str(TOY.parents[1]), str(TOY.parent)])
    return subprocess.Popen(command, **pipes | kwargs, env=os.environ | {"PYTHONPATH": path})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of 200 transitions, and what main returned."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, play(folder)


# ------------------------------------------------------------------------------------------- flags
@pytest.mark.parametrize("argv, words", [
    (["--lerning-rate", "1"], ["--lerning-rate", "--learning-rate"]),
    (["--learning_rate", "7"], ["--learning-rate 7", "1e-09", "1"]),
    (["--learning-rate", "nan"], ["--learning-rate nan"]),
    (["--seed", "2147483648"], ["--seed 2147483648", "2147483647"]),
    (["--kind", "c"], ["--kind c", "a, b"]),
    (["--sizes"], ["--sizes"]),
    (["surplus"], ["surplus"]),
    (["--eval-only"], ["--eval-only", "--checkpoint"]),
    (["--eval-only", "--checkpoint", "a.pt", "--resume", "b.pt"], ["--eval-only", "--resume"]),
    (["--resume", "auto"], ["--run-dir"]),
    (["--backend", "cuda", "--no-cuda"], ["--backend cuda"]),
])
def test_bad_flags_are_one_line_and_write_nothing(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with redirect_stdout(io.StringIO()):  # no UTF-8 there: tyro draws its boxes with dashes
        assert "---" not in refusal(UsageError, toy.main, argv, words=words)
    assert not list(tmp_path.iterdir()) and Run.current is None


def test_help_comes_from_the_source_in_groups(capsys):
    groups = flag_groups(TOY)
    assert list(groups) == ["experiment", "data", "algorithm", "trouble"]
    assert groups["algorithm"][1] == ("learning_rate", "float", "0.01", "Adam (> 0)")
    with pytest.raises(SystemExit) as stop:
        toy.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and max(map(len, out.splitlines())) <= 80
    shown = re.findall(r"^  (--[\w-]+)", out, re.M)
    assert sorted(shown) == sorted(common_run.flag(f.name) for f in fields(toy.Args))
    heads = re.findall(r"^[a-z][a-z ]*$", out, re.M)
    assert heads == ["experiment", "data", "algorithm", "trouble", "run directory", "runtime"]


def test_help_imports_nothing_heavy():
    code = f"""
import runpy, sys
sys.argv = [{str(TOY)!r}, "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    print(stop.code, {{"torch", "numpy", "numba", "tyro"}} & set(sys.modules), file=sys.stderr)
"""
    out, err = child(code=code).communicate(timeout=300)
    assert err == "0 set()\n" and "--learning-rate" in out


def fail(error):
    raise error


@pytest.mark.parametrize("ends, code, lines", [
    (lambda: refuse((True, "bad")), 2, 1),
    (lambda: fail(CheckFailed("bad")), 1, 1),
    (lambda: fail(OSError(28, "No space left on device", "metrics.jsonl")), 2, 1),
    (lambda: np.empty(2**50), 1, 1),
    (lambda: torch.empty(2**50), 1, 1),
    (lambda: {"exit_code": 143}, 143, 0),
])
def test_exit_codes(ends, code, lines, capsys):
    with pytest.raises(SystemExit) as stop:
        exit_with(ends)
    err = capsys.readouterr().err
    assert stop.value.code == code and err.count("\n") == lines == err.count("error: ")
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        exit_with(lambda: 1 / 0)


# ----------------------------------------------------------------------------------- what a run writes
def test_a_run_writes_what_it_promises(whole):
    folder, result = whole
    assert not list(folder.rglob("*.tmp")) and list(folder.glob("events.out.tfevents.*"))
    steps = {f"step_{step}.pt" for step in (192, 196, 200)}  # --keep-checkpoints 3
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"last.pt", "best.pt"} | steps
    summary = load_summary(folder)
    assert SUMMARY <= set(summary) and result["exit_code"] == 0
    assert (summary["status"], summary["global_step"], summary["updates"]) == ("finished", 200, 50)
    assert summary["replay_ratio"] == 0.25 and summary["env_builds"] == 1 and summary["sps"] > 0
    assert summary["audit"]["nan"] is None and summary["audit"]["verdict"] == "healthy"
    assert sum(summary["phases"].values()) == pytest.approx(summary["wall_seconds"], rel=0.02)
    assert {"setup", "rollout", "learn", "eval", "io"} <= set(summary["phases"])
    best = load_checkpoint(folder / "checkpoints" / "best.pt")
    assert set(best) == {"schema", "script", "args", "data", "config", "loop", "agent"}
    assert_same({"agent": best["agent"]}, last_of(folder)["run"]["best"]["policy"])
    rows = records(folder)
    assert [row["global_step"] for row in rows] == list(range(40, 201, 40))
    assert all(row["losses/none"] is None and row["losses/nan"] is None for row in rows)
    assert rows[0]["charts/SPS"] is None and rows[-1]["charts/SPS"] > 0
    args = json.loads((folder / "args.json").read_text())
    assert args["sizes"] == [1, 2] and set(args) == {field.name for field in fields(toy.Args)}
    assert summary["eval"]["eval"] == result["eval"]["eval"]
    assert not (folder / ".pid").exists() and Run.current is None


def test_two_starts_within_a_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common_run.time, "time", lambda: 1e9)
    for _ in range(2):
        toy.main([*TINY, "--total-timesteps", "8"])
    found = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert found == ["toy__toy__1__1000000000", "toy__toy__1__1000000000-2"]


def test_a_start_of_minutes_counts_once(tmp_path, monkeypatch):
    """Imports from a cold disk took 70 s, and --timeout then counted from their end."""
    monkeypatch.setattr("common.timeout_guard.process_age", lambda: 100.0)
    monkeypatch.setattr("sys.argv", ["toy.py", *TINY, "--total-timesteps", "8", "--run-dir", str(tmp_path / "r")])
    monkeypatch.setattr(Run, "first", True)
    assert toy.main()["wall_seconds"] > 100
    monkeypatch.setattr("sys.argv", ["toy.py", *TINY, "--total-timesteps", "8", "--run-dir", str(tmp_path / "t")])
    assert toy.main()["wall_seconds"] < 100
    # a bundle has its flags in its text
    monkeypatch.setattr("sys.argv", ["one_file.py"])
    monkeypatch.setattr(Run, "first", True)
    monkeypatch.setattr(Run, "flags", None)
    flags = {"total_timesteps": 8, "run_dir": str(tmp_path / "b"), "report": False, "cuda": False}
    with pytest.raises(SystemExit):
        exit_with(toy.main, flags)
    assert load_summary(tmp_path / "b")["wall_seconds"] > 100


def test_a_run_that_was_killed_before_its_first_line_refuses_no_other(tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
    assert play(folder, "--total-timesteps", 8)["exit_code"] == 0
    assert "holds a run" in refusal(UsageError, play, folder)


def test_a_folder_has_one_owner(tmp_path):
    run = Run(toy.Args, [*TINY, "--run-dir", str(tmp_path / "r")], schema=1)
    run.open("toy", {})
    for more in ([], ["--resume", "auto"]):
        assert str(os.getpid()) in refusal(UsageError, play, tmp_path / "r", *more)
    run.close()
    play(tmp_path / "r", "--resume", "auto", "--total-timesteps", 8)
    assert "r holds" in refusal(UsageError, play, tmp_path / "r")
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refusal(UsageError, play, tmp_path / "file" / "r")


def test_no_iteration_begins_that_would_not_end(tmp_path, monkeypatch):
    """Of 11 seconds the end gets 6, which leaves no room for a second iteration of 4."""
    step = toy.ToyLanes.step_lanes
    monkeypatch.setattr(toy.ToyLanes, "step_lanes", lambda *a: [time.sleep(4), step(*a)][1])
    summary = play(tmp_path / "r", "--timeout", 11.5)
    assert summary["status"] == "timeout" and summary["updates"] <= 1


def test_time_given_is_time_used(tmp_path):
    summary = play(tmp_path / "r", "--total-timesteps", 10**9, "--timeout", 7.0)
    assert (summary["status"], summary["exit_code"]) == ("timeout", 0) and summary["updates"] > 1
    assert summary["wall_seconds"] < 7


@pytest.mark.parametrize("rival, last_words", [(1e9, "sparse_linear"), (-1e9, "summary.json")])
def test_the_last_line_says_when_the_cheap_rival_is_better(rival, last_words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy, "RIVAL", rival)
    play(tmp_path / "r", "--total-timesteps", 8)
    assert last_words in capsys.readouterr().out.splitlines()[-1]


def test_the_table_fits_the_terminal(monkeypatch, capsys):
    columns = {"mean_expected_bps": -12.5, "sharpe": 1.0, "turnover": 0.01, "trades": 7}
    rows = {"random_same_turnover": columns, "optimum": columns}
    summary = {"eval": {"test": {"agent": columns, "baselines": rows}}}
    for width, shown in ((100, 4), (50, 2)):
        monkeypatch.setenv("COLUMNS", str(width))
        common_run.print_table(summary, list(columns))
        out = capsys.readouterr().out
        agent = next(line for line in out.splitlines() if "agent" in line)
        assert len(agent.split()) == 2 + shown and max(map(len, out.splitlines())) <= width
        assert all(name in out for name in list(columns)[shown:])  # said where it is instead


# ------------------------------------------------------------------------------------------- resume
def tensorboard_steps(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [event.step for event in events.Scalars("losses/loss")]


def test_a_bug_within_an_update_keeps_the_last_whole_state(tmp_path, whole, monkeypatch):
    """Resumed, nothing of the log is lost or there twice, TensorBoard's points neither: not even
    within a second, when the count in its files' names goes from 9 to 10 (or 99 to 100)."""
    folder = tmp_path / "r"
    while not any(re.search(r"\.9*8$", file.name) for file in tmp_path.iterdir()):
        EventFileWriter(str(tmp_path)).close()
    monkeypatch.setattr(toy, "BUG_IN_UPDATE", 120)
    with pytest.raises(ZeroDivisionError):
        play(folder)
    assert last_of(folder)["loop"]["global_step"] == 116
    assert records(folder)[-1]["global_step"] == 120  # logged after the last checkpoint
    monkeypatch.undo()
    play(folder, "--resume", "auto")
    assert_same_run(folder, whole[0])
    assert tensorboard_steps(folder) == list(range(40, 201, 40)) == tensorboard_steps(whole[0])


@pytest.mark.parametrize("name, value, step", [("BUG_IN_EVALUATION", 80, 80), ("BUG_AT_THE_END", True, 200)])
def test_a_bug_elsewhere_saves_a_state_that_is_whole(name, value, step, tmp_path, whole, monkeypatch):
    """At the end too, where the policy in memory is that of best.pt."""
    folder = tmp_path / "r"
    monkeypatch.setattr(toy, name, value)
    with pytest.raises(ZeroDivisionError):
        play(folder, "--checkpoint-interval", 1e6)
    assert last_of(folder)["loop"]["global_step"] == step
    assert not (folder / ".pid").exists() and Run.current is None
    monkeypatch.undo()
    play(folder, "--resume", "auto")
    assert_same_run(folder, whole[0])


def test_metrics_are_cut_back_and_come_along_into_a_new_folder(tmp_path, whole):
    old, new = tmp_path / "old", tmp_path / "new"
    play(old, "--total-timesteps", 120)
    with (old / "metrics.jsonl").open("a") as file:
        file.write('{"global_step": 160}\n{"global_step": 20')  # after last.pt, and a torn line
    before = (old / "metrics.jsonl").read_bytes()
    play(new, "--resume", old / "checkpoints" / "last.pt")
    assert (old / "metrics.jsonl").read_bytes() == before
    assert_same_run(new, whole[0])
    play(old, "--resume", "auto")
    assert_same_run(old, whole[0])


def test_refusals_to_resume(tmp_path, whole):
    data = tmp_path / "bars.csv"
    data.write_text("1")
    folder = tmp_path / "r"
    play(folder, "--data", data, "--total-timesteps", 80)
    state = last_of(folder)
    resume = ["--data", data, "--resume", "auto"]
    for more, words in (
        (["--learning-rate", 0.1, "--kind", "b"], ["--learning-rate 0.01 there, 0.1", "--kind a there"]),
        (["--seed", 2], ["--seed 1 there, 2 here"]),
    ):
        refusal(UsageError, play, folder, *resume, *more, words=words)
    data.write_text("1\n2")  # a row was added
    assert "sha256" in refusal(UsageError, play, folder, *resume)
    data.write_text("1")
    assert_same(last_of(folder), state)
    best = folder / "checkpoints" / "best.pt"
    assert "last.pt" in refusal(CheckpointError, play, tmp_path / "n", "--resume", best)
    assert str(tmp_path / "no.pt") in refusal(CheckpointError, play, folder, "--resume", tmp_path / "no.pt")
    for script, schema, word in ((Path("other.py"), 1, "other.py"), (TOY, 2, "schema 2")):
        assert word in refusal(CheckpointError, load_run, best, script, schema)
    early = shutil.copy(folder / "checkpoints" / "last.pt", folder / "checkpoints" / "early.pt")
    below = shutil.copytree(folder, folder / "below") / "checkpoints" / "last.pt"
    free = ["--checkpoint-interval", 5, "--keep-checkpoints", 1, "--total-timesteps", 120]
    assert play(folder, *resume, *free)["global_step"] == 120
    history = (folder / "metrics.jsonl").read_bytes()
    for path, words in ((early, ["80", "120"]), (below, ["r holds"])):  # a run that is further on
        refusal(UsageError, play, folder, "--data", data, "--resume", path, words=words)
    assert (folder / "metrics.jsonl").read_bytes() == history


# ---------------------------------------------------------------------------------------- eval only
def test_evaluation_runs_with_the_checkpoints_flags_and_prints_differences(tmp_path, capsys):
    folder = tmp_path / "r"
    data = tmp_path / "bars.csv"
    data.write_text("1")
    trained = play(folder, "--sizes", 5, "--kind", "b", "--data", data)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    data.write_text("2")
    evaluate = ["--eval-only", "--checkpoint", folder / "checkpoints" / "best.pt"]
    capsys.readouterr()
    result = play(tmp_path / "e", *evaluate, "--learning-rate", 0.5)
    out = " ".join(capsys.readouterr().out.split())
    assert "--learning-rate 0.01 there, 0.5 here" in out and "sha256" in out
    assert "--kind" not in out and "--sizes" not in out
    args = json.loads((tmp_path / "e" / "args.json").read_text())
    assert (args["sizes"], args["kind"], args["learning_rate"]) == ([5], "b", 0.5)
    assert result["eval"] == trained["eval"] and result["global_step"] == trained["best_step"]
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert not list((tmp_path / "e").rglob("*.pt"))
    assert "holds a run" in refusal(UsageError, play, folder, *evaluate)


# ------------------------------------------------------------------------- signals, streams, watchdog
def test_a_closed_stdout_does_not_end_a_run(tmp_path):
    read, write = os.pipe()
    os.close(read)
    process = child(*TINY, "--run-dir", tmp_path / "r", stdout=write)
    os.close(write)
    err = process.communicate(timeout=300)[1]
    assert process.returncode == 0 and err == ""
    assert load_summary(tmp_path / "r")["status"] == "finished"


def test_a_call_that_never_returns_is_ended_with_its_stacks(tmp_path):
    code = "import common.run, toy; common.run.GRACE = 6.0; common.run.exit_with(toy.main)"
    argv = [*TINY, "--run-dir", tmp_path / "r", "--hang", "--timeout", "1"]
    process = child(*argv, code=code)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and re.search(r'toy.py", line \d+ in main', err)


def test_kernels_are_kept_elsewhere_where_nothing_can_be_written(tmp_path):
    """A read-only home and repository: a file stands where each cache folder would be made."""
    package = tmp_path / "common"
    package.mkdir()
    shutil.copy(Path(common_run.__file__).with_name("__init__.py"), package)
    (package / "__pycache__").touch()
    (tmp_path / "home").touch()
    env = {k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    env |= {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    code = "import common, os; print(os.path.isdir(os.environ['NUMBA_CACHE_DIR']))"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True, check=True).stdout
    assert out.splitlines()[-1] == "True" and len(out.splitlines()) == 2


# -------------------------------------------------------------------------------------------- wandb
def test_wandb_needs_a_key_before_anything_is_written(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is optional")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert "WANDB_API_KEY" in refusal(UsageError, play, tmp_path / "r", "--track")
    assert not (tmp_path / "r").exists()
