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
from common.timeout_guard import (
    CheckpointError,
    TimeoutGuard,
    find_last,
    load_checkpoint,
    plain,
    process_age,
    rotate,
    save_atomic,
    write_json_atomic,
)

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
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
    env = os.environ | {"PYTHONPATH": str(repo), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, str(path), *map(str, args)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(repo, tmp_path, code, *args):
    with start(repo, tmp_path, code, *args) as child:
        out, err = child.communicate(timeout=LIMIT)
    assert child.returncode == 0, err
    return out.split("\n")


# ---------------------------------------------------------------- deadline
@LINUX
def test_deadline_counts_from_process_start(repo, tmp_path):
    # the parent's clock brackets the child's: what the child calls its age cannot exceed our wait
    before = time.monotonic()
    code = """
time.sleep(.5)
guard = TimeoutGuard(30)
print(guard.elapsed(), guard.phases()["setup"])
print(30 - guard.remaining())
"""
    out = run(repo, tmp_path, code)
    wall = time.monotonic() - before
    elapsed, setup = map(float, out[0].split())
    assert 0.5 <= setup <= elapsed <= float(out[1]) <= wall + 0.02  # /proc counts in ticks of 10 ms


@LINUX
def test_process_age_includes_what_ran_before_the_import(repo, tmp_path):
    code = "before = process_age()\ntime.sleep(.2)\nprint(before, process_age())"
    (tmp_path / "script.py").write_text("import time\ntime.sleep(.5)\n" + IMPORTS + code)
    out = subprocess.run([sys.executable, tmp_path / "script.py"], env=os.environ | {"PYTHONPATH": str(repo)},
                         text=True, capture_output=True, check=True).stdout
    before, after = map(float, out.split())
    assert before >= 0.5 and after - before >= 0.2


@LINUX
def test_only_the_first_guard_of_a_young_script_counts_from_process_start(repo, tmp_path):
    code = """
time.sleep(.3)
guards = TimeoutGuard(30), TimeoutGuard(30), TimeoutGuard(30, from_process_start=True)
print(*(guard.phases()["setup"] >= .3 for guard in guards), guards[1].phases()["setup"])
"""
    assert run(repo, tmp_path, code)[0] == "True False True 0.0"
    late = "timeout_guard.process_age = lambda: 61.0\nprint(TimeoutGuard(30).phases()['setup'])"
    assert run(repo, tmp_path, late)[0] == "0.0"
    command = IMPORTS + "print(TimeoutGuard(30).phases()['setup'])"  # a notebook has no __main__ file either
    out = subprocess.run([sys.executable, "-c", command], env=os.environ | {"PYTHONPATH": str(repo)},
                         text=True, capture_output=True, check=True).stdout
    assert float(out) == 0.0


def test_without_proc_the_age_counts_from_the_import(monkeypatch):
    def unreadable(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(timeout_guard.Path, "read_text", unreadable)
    since_import = (time.monotonic_ns() - timeout_guard._IMPORTED) / 1e9
    age = process_age()
    assert since_import <= age <= (time.monotonic_ns() - timeout_guard._IMPORTED) / 1e9


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
    with TimeoutGuard(1e-6, from_process_start=False) as guard:
        time.sleep(1e-3)
        assert guard.remaining() < 0 and guard.should_stop()
    for bad in (0, -1, math.nan):
        with pytest.raises(ValueError, match="timeout must be > 0"):
            TimeoutGuard(bad)


# ---------------------------------------------------------------- signals
WAIT = """
with TimeoutGuard(60) as guard:
    print("ready")
    while not guard.should_stop():
        time.sleep(.01)
    print(guard.signal, guard.status)
    print("closing")
    if len(sys.argv) > 1:
        time.sleep(60)
raise SystemExit(guard.exit_code)
"""


@POSIX
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_ends_the_loop_cleanly(repo, tmp_path, signum):
    with start(repo, tmp_path, WAIT) as child:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signum)
        out, err = child.communicate(timeout=LIMIT)
    assert out.splitlines()[0] == f"{int(signum)} interrupted"
    assert child.returncode == 128 + signum and err == ""


@POSIX
def test_second_signal_raises_keyboard_interrupt(repo, tmp_path):
    with start(repo, tmp_path, WAIT, "stay") as child:
        child.stdout.readline()
        child.send_signal(signal.SIGTERM)
        child.stdout.readline(), child.stdout.readline()
        child.send_signal(signal.SIGINT)
        err = child.communicate(timeout=LIMIT)[1]
    assert "KeyboardInterrupt" in err and child.returncode != 0


@POSIX
def test_second_signal_while_saving_is_not_called_a_full_disk(repo, tmp_path):
    # torch turns whatever a write raises into an error of its own
    code = """
import torch
guard = TimeoutGuard(None)
def save(obj, f, real_save=torch.save):
    class File:
        flush, writes = f.flush, 0
        def write(self, data):
            self.writes += 1
            if self.writes == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            return f.write(data)
    real_save(obj, File())
torch.save = save
try:
    save_atomic({"a": torch.zeros(9)}, sys.argv[1])
except BaseException as e:
    print(type(e).__name__, os.listdir(os.path.dirname(sys.argv[1])))
"""
    (tmp_path / "ck").mkdir()
    assert run(repo, tmp_path, code, tmp_path / "ck" / "last.pt")[0] == "KeyboardInterrupt []"


@POSIX
def test_handlers_are_given_back():
    old = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), TimeoutGuard(None) as guard:
        assert guard.handles_signals and signal.getsignal(signal.SIGTERM) == guard._on_signal
        raise RuntimeError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == old
    guard.close()  # twice is fine

    guard = TimeoutGuard(None)
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # somebody else's, installed later, is not undone
        guard.close()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) == old[0]
    finally:
        signal.signal(signal.SIGTERM, old[1])

    with TimeoutGuard(None, signals=False) as guard:
        assert not guard.handles_signals and signal.getsignal(signal.SIGINT) == old[0]


def test_a_guard_in_another_thread_says_that_it_handles_no_signals():
    seen = {}

    def work():
        with TimeoutGuard(None) as guard:
            seen["handles"], seen["stop"] = guard.handles_signals, guard.should_stop()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == {"handles": False, "stop": False}


@POSIX
def test_main_twice_in_one_process(repo, tmp_path):
    code = """
def main(interrupt):
    with TimeoutGuard(50) as guard:
        if interrupt:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(.01)
        return guard.should_stop(), guard.status, guard.exit_code
print(main(True), main(False), signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
    assert run(repo, tmp_path, code)[0] == "(True, 'interrupted', 130) (False, 'finished', 0) True"


# ---------------------------------------------------------------- phases
def test_phases_are_exclusive_and_add_up(monkeypatch):
    now = [10**9]
    monkeypatch.setattr(timeout_guard.time, "monotonic_ns", lambda: now[0])

    def sleep(seconds):
        now[0] += int(seconds * 10**9)

    guard = TimeoutGuard(None, signals=False, from_process_start=False)
    sleep(1)
    with guard.phase("rollout"):
        sleep(2)
        with guard.phase("io"):
            sleep(4)
            with guard.phase("rollout"):  # a phase inside itself is counted once
                sleep(8)
        sleep(16)
        during = guard.phases()
    assert during["rollout"] == 26 and sum(during.values()) == guard.elapsed() == 31
    sleep(32)
    with pytest.raises(KeyError), guard.phase("learn"):
        sleep(64)
        raise KeyError
    sleep(128)
    assert guard.phases() == {"setup": 0, "other": 1 + 32 + 128, "rollout": 26, "io": 4, "learn": 64}
    assert sum(guard.phases().values()) == guard.elapsed() == 255


def test_phases_add_up_on_the_real_clock():
    guard = TimeoutGuard(None, signals=False, from_process_start=True)
    for i in range(500):
        with guard.phase("abc"[i % 3]), guard.phase("cab"[i % 3]):
            math.factorial(200)
    before, phases, after = guard.elapsed(), guard.phases(), guard.elapsed()
    assert before - 1e-6 <= sum(phases.values()) <= after + 1e-6  # 1e-6: adding floats, not clocks
    assert phases["setup"] > 0 and min(phases.values()) >= 0


# ---------------------------------------------------------------- checkpoints
def test_checkpoint_round_trip(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "agent": model.state_dict(), "optimizer": optimizer.state_dict(), "args": {"lr": 1e-3, 3: None},
        "torch_rng": torch.get_rng_state(), "numpy_rng": np.random.default_rng(0).bit_generator.state,
        "order": OrderedDict(a=(1, [2.5, True])), "bf16": torch.ones(2, dtype=torch.bfloat16), "raw": b"\0x",
    }
    save_atomic(state, tmp_path / "new" / "checkpoints" / "last.pt")
    loaded = load_checkpoint(find_last(tmp_path / "new"))
    assert torch.equal(loaded["agent"]["weight"], model.weight) and loaded["args"] == state["args"]
    assert loaded["numpy_rng"] == state["numpy_rng"] and loaded["order"] == state["order"]
    optimizer.load_state_dict(loaded["optimizer"])
    assert find_last(tmp_path) is None
    assert [p.name for p in (tmp_path / "new" / "checkpoints").iterdir()] == ["last.pt"]


@pytest.mark.parametrize("value", [np.float64(1), np.zeros(2), {1, 2}, lambda: 0, torch.nn.Linear(1, 1)])
def test_what_could_not_be_loaded_is_not_saved(tmp_path, value):
    save_atomic({"good": 1}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"cannot save .*last\.pt: checkpoint\['a'\]\[1\] is a "):
        save_atomic({"a": [0, value]}, tmp_path / "last.pt")
    assert load_checkpoint(tmp_path / "last.pt") == {"good": 1}
    with pytest.raises(CheckpointError, match="of checkpoint is a numpy.int64"):
        save_atomic({np.int64(3): 0}, tmp_path / "last.pt")


@POSIX
def test_a_write_that_fails_midway_leaves_the_old_file(repo, tmp_path):
    code = """
import resource, torch
save_atomic({"step": 1}, sys.argv[1])
for size in (1, 1000, 100_000, 399_000):  # the checkpoint has 400 kB and a little
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        save_atomic({"step": 2, "a": torch.zeros(100_000)}, sys.argv[1])
    except CheckpointError as e:
        print(e)
    print(load_checkpoint(sys.argv[1]), os.listdir(os.path.dirname(sys.argv[1])))
write_json_atomic([1], sys.argv[1] + ".json")
try:
    write_json_atomic(list(range(100_000)), sys.argv[1] + ".json")
except OSError as e:
    print(e.strerror, open(sys.argv[1] + ".json").read().split())
"""
    path = tmp_path / "ck" / "last.pt"
    out = run(repo, tmp_path, code, path)
    error = f"cannot save {path}: File too large; the file there is as it was"
    assert out[:8] == [error, "{'step': 1} ['last.pt']"] * 4
    assert out[8] == "File too large ['[', '1', ']']"


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
    path, rng, steps = tmp_path / "ck" / "last.pt", random.Random(0), []
    for _ in range(4):
        with start(repo, tmp_path, code, path) as child:
            for _ in range(3):  # it is in the middle of saving by now
                reported = int(child.stdout.readline())
            time.sleep(rng.uniform(0, 0.05))
            child.kill()
            out, _ = child.communicate()
        reported = max([reported] + [int(line) for line in out.split("\n")[:-1]])
        state = load_checkpoint(path)
        assert state["step"] >= reported and bool((state["a"] == state["step"]).all())
        steps.append(state["step"])
    assert min(steps) >= 3
    save_atomic({"step": 0}, path)
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]  # nothing is left of the killed ones


def test_errors_on_loading_are_one_line_that_names_the_file(tmp_path):
    good = tmp_path / "good.pt"
    save_atomic({"a": torch.zeros(1000)}, good)
    raw = good.read_bytes()
    bad = {
        "missing.pt": (None, "No such file"), "empty.pt": (b"", "another kind of file"),
        "text.pt": (b"hello", "another kind of file"), "half.pt": (raw[: len(raw) // 2], "truncated"),
        "tail.pt": (raw[:-10], "truncated"),
    }
    for name, (content, why) in bad.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=why) as error:
            load_checkpoint(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint but a saved list"):
        load_checkpoint(tmp_path / "list.pt")
    torch.save({"module": torch.nn.Linear(1, 1)}, tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match="cannot load checkpoint .*module.pt: Weights only load failed"):
        load_checkpoint(tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match="Is a directory|Permission denied"):
        load_checkpoint(tmp_path)


# ---------------------------------------------------------------- json, rotation
def test_json_holds_numbers_or_null(tmp_path):
    path = tmp_path / "new" / "summary.json"
    obj = {"nan": math.nan, "inf": np.float32(-np.inf), "array": np.array([1.0, np.nan]), "int": np.int64(3),
           "tensor": torch.ones(2), "bool": np.bool_(True), "path": tmp_path, "nested": ({"x": [math.inf]},)}
    write_json_atomic(obj, path)
    assert json.loads(path.read_text()) == {
        "nan": None, "inf": None, "array": [1, None], "int": 3, "tensor": [1, 1], "bool": True,
        "path": str(tmp_path), "nested": [{"x": [None]}],
    }
    written = path.read_text()
    assert plain(1.5) == 1.5 and plain("nan") == "nan"
    with pytest.raises(TypeError):
        write_json_atomic({"f": json}, path)
    assert path.read_text() == written and list(path.parent.iterdir()) == [path]


def test_rotation_keeps_the_highest_numbers_and_never_touches_last_and_best(tmp_path):
    for name in ("step_9.pt", "step_10.pt", "step_100.pt", "step_2.pt", "last.pt", "best.pt", "note_1.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in rotate(tmp_path, 2)] == ["step_2.pt", "step_9.pt"]
    assert rotate(tmp_path, 2) == []
    assert [p.name for p in rotate(tmp_path, 0, "*.pt")] == ["step_10.pt", "step_100.pt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "last.pt", "note_1.txt"]
    with pytest.raises(ValueError, match="keep must be >= 0"):
        rotate(tmp_path, -1)
