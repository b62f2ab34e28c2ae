"""common/timeout_guard.py: real signals, real kills and a really full disk, in child processes."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

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


def test_a_thread_handles_no_signals():
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
def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    save_atomic({"good": 1}, tmp_path / "last.pt")
    for value in (np.float64(1), np.zeros(2), torch.nn.Linear(1, 1)):
        for bad, where in (({"a": [0, value]}, "['a'][1]"), ({np.int64(3): 0}, "numpy.int64")):
            assert where in refusal(CheckpointError, save_atomic, bad, tmp_path / "last.pt")
    assert load_checkpoint(tmp_path / "last.pt") == {"good": 1}


FULL_DISK = """
import resource, torch
path = sys.argv[1]
save_atomic({"step": 1}, path)
open(os.path.join(os.path.dirname(path), ".last.pt.1.tmp"), "w").close()  # of a process that was killed
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
