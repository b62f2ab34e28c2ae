"""common/timeout_guard.py: real signals, real kills and a really full disk, in child processes."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict

import numpy as np
import pytest
import torch

from common import timeout_guard
from common.timeout_guard import CheckpointError, TimeoutGuard, load_checkpoint, save_atomic, whole_file
from runs import refusal

POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")
LIMIT = 300  # s, only against a child that hangs: a loaded machine needs a minute to import torch
IMPORTS = """import os, signal, sys, time
from common import timeout_guard
from common.timeout_guard import *
"""


def start(repo, tmp_path, code, *args):
    """`code` as a script of its own (so that __main__ has a file), stdout piped."""
    path = tmp_path / "script.py"
    path.write_text(IMPORTS + code)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = os.environ | {"PYTHONPATH": str(repo), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, str(path), *map(str, args)], env=env, **pipes)


def run(repo, tmp_path, code, *args):
    with start(repo, tmp_path, code, *args) as child:
        out, err = child.communicate(timeout=LIMIT)
    assert child.returncode == 0, err
    return out.split("\n")


# ----------------------------------------------------------------------------------------- deadline
def test_the_deadline_counts_from_the_start_of_a_young_script(repo, tmp_path):
    # the parent's clock brackets the child's: what the child calls its age cannot exceed our wait
    before = time.monotonic()
    code = """
time.sleep(.5)
guard, second = TimeoutGuard(30), TimeoutGuard(30)
print(guard.elapsed(), guard.phases()["setup"], second.phases()["setup"])
"""
    elapsed, setup, second = map(float, run(repo, tmp_path, code)[0].split())
    wall = time.monotonic() - before
    assert 0.5 <= setup <= elapsed <= wall + 1.1  # the time of the boot is known in whole seconds
    assert second == 0.0


def test_should_stop_status_and_limits():
    with TimeoutGuard(None) as guard:
        assert guard.remaining() == math.inf and not guard.should_stop(reserve=1e9)
        assert (guard.status, guard.exit_code, guard.signal) == ("finished", 0, None)
    with TimeoutGuard(1000, from_process_start=False) as guard:
        assert not guard.should_stop(reserve=900) and guard.status == "finished"
        assert guard.remaining() < 1000 and guard.status == "finished"
        assert guard.should_stop(reserve=1000)
        assert (guard.status, guard.exit_code) == ("timeout", 0)
        assert guard.should_stop()  # a run that was told to stop is not told to go on
    for bad in (0, -1, math.nan):
        with pytest.raises(ValueError, match="timeout"):
            TimeoutGuard(bad)


# ------------------------------------------------------------------------------------------ signals
WAIT = """
for _ in range(3):
    with TimeoutGuard(60) as guard:
        print("ready")
        while not guard.should_stop():
            time.sleep(.01)
        print(guard.signal, guard.status, guard.exit_code)
"""


@POSIX
def test_the_first_signal_ends_the_loop_cleanly(repo, tmp_path):
    with start(repo, tmp_path, WAIT) as child:
        for name, code in (("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)):
            assert child.stdout.readline() == "ready\n"
            child.send_signal(getattr(signal, name))
            assert child.stdout.readline() == f"{code - 128} interrupted {code}\n"
        assert child.communicate(timeout=LIMIT) == ("", "") and child.returncode == 0


@POSIX
def test_handlers_are_given_back():
    old = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), TimeoutGuard(None) as guard:
        assert guard.handles_signals and signal.getsignal(signal.SIGTERM) != old[1]
        raise RuntimeError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == old
    found = []
    thread = threading.Thread(target=lambda: found.append(TimeoutGuard(None).handles_signals))
    thread.start()
    thread.join()
    assert found == [False]


# ------------------------------------------------------------------------------------------- phases
def test_phases_are_exclusive_and_add_up(monkeypatch):
    now = [10**9]
    monkeypatch.setattr(timeout_guard.time, "monotonic_ns", lambda: now[0])

    def sleep(seconds):
        now[0] += int(seconds * 10**9)

    guard = TimeoutGuard(None, signals=False, from_process_start=False)
    sleep(1)
    guard.mark("rollout")
    sleep(2)
    with pytest.raises(KeyError), guard.phase("io"):  # a phase takes out of the mark
        sleep(4)
        with guard.phase("rollout"):
            sleep(8)
        assert guard.current == "io"
        raise KeyError
    sleep(16)
    assert guard.phases() == {"setup": 0, "other": 1, "rollout": 26, "io": 4}
    assert sum(guard.phases().values()) == guard.elapsed() == 31


# -------------------------------------------------------------------------------------- checkpoints
def test_checkpoint_round_trip(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "agent": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": {"lr": 1e-3, 3: None},
        "rng": np.random.default_rng(0).bit_generator.state,
        "order": OrderedDict(a=(1, [2.5, True])),
        "bf16": torch.ones(2, dtype=torch.bfloat16),
        "raw": b"\0x",
    }
    save_atomic(state, tmp_path / "new" / "checkpoints" / "last.pt")
    loaded = load_checkpoint(timeout_guard.find_last(tmp_path / "new"))
    assert torch.equal(loaded["agent"]["weight"], model.weight) and loaded["args"] == state["args"]
    assert loaded["rng"] == state["rng"] and loaded["order"] == state["order"]
    optimizer.load_state_dict(loaded["optimizer"])
    assert timeout_guard.find_last(tmp_path) is None
    assert [p.name for p in (tmp_path / "new" / "checkpoints").iterdir()] == ["last.pt"]


@pytest.mark.parametrize("value", [np.float64(1), np.zeros(2), {1, 2}, torch.nn.Linear(1, 1)])
def test_what_could_not_be_loaded_is_not_saved(tmp_path, value):
    save_atomic({"good": 1}, tmp_path / "last.pt")
    for bad, where in (({"a": [0, value]}, r"\['a'\]\[1\]"), ({np.int64(3): 0}, "numpy.int64")):
        with pytest.raises(CheckpointError, match=where):
            save_atomic(bad, tmp_path / "last.pt")
    assert load_checkpoint(tmp_path / "last.pt") == {"good": 1}


FULL_DISK = """
import resource, torch
path = sys.argv[1]
save_atomic({"step": 1}, path)
for size in (1, 1000, 399_000):  # the checkpoint has 400 kB and a little
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        save_atomic({"step": 2, "a": torch.zeros(100_000)}, path)
    except CheckpointError as e:
        print(path in str(e), "File too large" in str(e))
    print(load_checkpoint(path), os.listdir(os.path.dirname(path)))
"""


@POSIX
def test_a_full_disk_leaves_the_old_file(repo, tmp_path):
    out = run(repo, tmp_path, FULL_DISK, tmp_path / "ck" / "last.pt")
    assert out[:6] == ["True True", "{'step': 1} ['last.pt']"] * 3


@POSIX
def test_kill_during_saves_always_leaves_a_loadable_file(repo, tmp_path):
    code = """
import torch
step = 0
while True:
    step += 1
    save_atomic({"step": step, "a": torch.full((200_000,), step)}, sys.argv[1])
    print(step)
"""
    path, rng = tmp_path / "ck" / "last.pt", random.Random(0)
    for _ in range(2):
        with start(repo, tmp_path, code, path) as child:
            for _ in range(3):  # it is in the middle of saving by now
                reported = int(child.stdout.readline())
            time.sleep(rng.uniform(0, 0.05))
            child.kill()
            out, _ = child.communicate()
        reported = max([reported] + [int(line) for line in out.split("\n")[:-1]])
        state = load_checkpoint(path)
        assert state["step"] >= reported and bool((state["a"] == state["step"]).all())
    save_atomic({"step": 0}, path)
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]  # nothing is left of the killed


def test_errors_on_loading_are_one_line_that_names_the_file(tmp_path):
    save_atomic({"a": torch.zeros(1000)}, tmp_path / "good.pt")
    raw = (tmp_path / "good.pt").read_bytes()
    contents = {"empty.pt": b"", "text.pt": b"hello", "half.pt": raw[:500], "tail.pt": raw[:-10]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    torch.save([1], tmp_path / "list.pt")
    torch.save({"module": torch.nn.Linear(1, 1)}, tmp_path / "module.pt")
    for name in (*contents, "missing.pt", "list.pt", "module.pt", "."):
        assert str(tmp_path / name) in refusal(CheckpointError, load_checkpoint, tmp_path / name)


# ----------------------------------------------------------------------------------- json, rotation
def test_json_holds_numbers_or_null(tmp_path):
    path = tmp_path / "new" / "summary.json"
    obj = {"nan": math.nan, "inf": np.float32(-np.inf), "array": np.array([1.0, np.nan])}
    obj |= {"int": np.int64(3), "tensor": torch.ones(2), "path": tmp_path, "nested": ({"x": [math.inf]},)}
    timeout_guard.write_json_atomic(obj, path)
    want = {"nan": None, "inf": None, "array": [1, None], "int": 3, "tensor": [1, 1]}
    assert json.loads(path.read_text()) == want | {"path": str(tmp_path), "nested": [{"x": [None]}]}
    written = path.read_text()
    with pytest.raises(TypeError):
        timeout_guard.write_json_atomic({"f": json}, path)
    assert path.read_text() == written and list(path.parent.iterdir()) == [path]


def test_rotation_keeps_the_highest_numbers_and_never_touches_last_and_best(tmp_path):
    names = ("step_9.pt", "step_10.pt", "step_100.pt", "step_2.pt", "last.pt", "best.pt", "note_1.txt")
    for name in names:
        (tmp_path / name).touch()
    assert [p.name for p in timeout_guard.rotate(tmp_path, 2)] == ["step_2.pt", "step_9.pt"]
    assert timeout_guard.rotate(tmp_path, 2) == []
    assert [p.name for p in timeout_guard.rotate(tmp_path, 0, "*.pt")] == ["step_10.pt", "step_100.pt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "last.pt", "note_1.txt"]


@POSIX
def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "map.png"
    with whole_file(path) as half:
        half.write_text("old")
    with pytest.raises(OSError) as error, whole_file(path) as half:
        half.write_text("ne")
        with open("/dev/full", "w") as full:  # what a full disk answers
            full.write("w")
    assert error.value.filename == str(path) and path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
