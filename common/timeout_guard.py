"""Whatever ends a run, a loadable checkpoint stays: deadline, signals, time by phase, atomic files.

with TimeoutGuard(args.timeout) as guard:
    while not guard.should_stop(reserve=20.0):
        with guard.phase("rollout"): ...
    save_atomic(state, run_dir / "checkpoints/last.pt")
"""

import json
import math
import os
import re
import signal
import sys
import threading
import time
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path


class CheckpointError(RuntimeError):
    """One line that names the checkpoint that could not be written or read."""

    exit_code = 2


def process_age() -> float:
    """Seconds since this process started."""
    import psutil

    return max(time.time() - psutil.Process().create_time(), 0.0)


class TimeoutGuard:
    """Deadline and signals of one run, and where its wall clock went.

    timeout: seconds (> 0, else ValueError) or None = no limit. They count from the start of this
    process, imports included, or from the guard's creation.
    from_process_start: None means True only for the first guard of a process that runs a script
    (`__main__` has a file) and is younger than 60 s: a notebook's or a second main()'s guard counts
    from its creation.
    signals: the first SIGINT, SIGTERM or SIGHUP only sets `signal` (its number), the second raises
    KeyboardInterrupt. Python allows no handlers outside the main thread: `handles_signals` tells.
    Phases are for one thread.
    """

    _first = True

    def __init__(
        self, timeout: float | None, signals: bool = True, from_process_start: bool | None = None
    ):
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be > 0 seconds or None, got {timeout}")
        age, now = process_age(), time.monotonic_ns()
        if from_process_start is None:
            script = hasattr(sys.modules["__main__"], "__file__")
            from_process_start = script and age < 60 and TimeoutGuard._first
        TimeoutGuard._first = False
        before = int(age * 1e9) if from_process_start else 0
        self.timeout, self.signal, self.expired = timeout, None, False
        self._start, self._mark = now - before, now
        self._spent, self._stack = (
            {"setup": before, "other": 0},
            ["other"],
        )  # integer ns: sums are exact
        self._old = {}
        self.handles_signals = signals and threading.current_thread() is threading.main_thread()
        if self.handles_signals:
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
                signum = getattr(signal, name, signal.SIGINT)
                if signum in self._old:
                    continue
                self._old[signum] = signal.signal(signum, self._on_signal)

    def _on_signal(self, signum, frame):
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signum

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        """Give the signal handlers back, unless others came since. Call from the main thread."""
        while self._old:
            signum, old = self._old.popitem()
            if signal.getsignal(signum) == self._on_signal:
                signal.signal(signum, signal.SIG_DFL if old is None else old)

    def elapsed(self) -> float:
        return (time.monotonic_ns() - self._start) / 1e9

    def remaining(self) -> float:
        """Seconds left, negative when overdue, inf without a limit."""
        return math.inf if self.timeout is None else self.timeout - self.elapsed()

    def should_stop(self, reserve: float = 0.0) -> bool:
        """True after a signal or with at most `reserve` seconds left: the status becomes "timeout".

        Ask it to end the run only; whether an optional step still fits is a question for
        remaining().
        """
        self.expired |= self.remaining() <= reserve
        return self.expired or self.signal is not None

    @property
    def status(self) -> str:
        return (
            "interrupted" if self.signal is not None else "timeout" if self.expired else "finished"
        )

    @property
    def exit_code(self) -> int:
        return 0 if self.signal is None else 128 + int(self.signal)

    def _tick(self):
        now = time.monotonic_ns()
        self._spent[self._stack[-1]] = self._spent.get(self._stack[-1], 0) + now - self._mark
        self._mark = now

    @property
    def current(self) -> str:
        """The phase that is on."""
        return self._stack[-1]

    def mark(self, name: str):
        """From here on the wall clock is charged to `name`, but for what phase() takes out."""
        self._tick()
        self._stack[0] = name

    @contextmanager
    def phase(self, name: str):
        """Charge the block's wall clock to `name`; a phase inside it pauses it."""
        self._tick()
        self._stack.append(name)
        try:
            yield self
        finally:
            self._tick()
            self._stack.pop()

    def phases(self) -> dict[str, float]:
        """Seconds by phase, adding up to elapsed(): "setup" has the time before the guard."""
        self._tick()
        return {name: ns / 1e9 for name, ns in self._spent.items()}


def _write_atomic(path, write):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(
        f".{path.name}.*.tmp"
    ):  # of a process that was killed while it wrote
        left.unlink(missing_ok=True)
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temp, "xb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself must survive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def _line(error) -> str:
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def _check_loadable(obj, where: str):
    import torch

    # exact types: np.float64 is a float, but weights_only=True would refuse it at resume
    if type(obj) in (dict, OrderedDict, list, tuple):
        for key, value in obj.items() if isinstance(obj, dict) else enumerate(obj):
            _check_loadable(key, f"key {key!r} of {where}")
            _check_loadable(value, f"{where}[{key!r}]")
    elif not (
        type(obj) in (type(None), bool, int, float, str, bytes) or isinstance(obj, torch.Tensor)
    ):
        kind = f"{type(obj).__module__}.{type(obj).__name__}"
        raise TypeError(f"{where} is a {kind}, not a tensor or plain Python")


@contextmanager
def named(path):
    """An OSError within, as that of a full disk, names `path`."""
    try:
        yield
    except OSError as e:
        e.filename = str(path)
        raise


@contextmanager
def whole_file(path: Path):
    """A name beside `path` to write to: it becomes `path` when all is written, else it goes. An
    OSError names `path`."""
    half = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        with named(path):
            yield half
            os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def save_atomic(obj: dict, path):
    """torch.save a dict of tensors and plain Python, whole or not at all. CheckpointError."""
    import torch

    try:
        _check_loadable(obj, "checkpoint")
        _write_atomic(path, lambda f: torch.save(obj, f))
    except Exception as e:
        # torch hides what a write raised (disk full, Ctrl-C) behind an error about file positions
        cause = e.__context__ if isinstance(e.__context__, (OSError, KeyboardInterrupt)) else e
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise CheckpointError(
            f"cannot save {path}: {_line(cause)}; the file there is as it was"
        ) from e


def load_checkpoint(path, map_location="cpu") -> dict:
    """torch.load(weights_only=True) of what save_atomic wrote. Raises CheckpointError."""
    import torch

    try:
        with open(path, "rb") as f:
            zipped = f.read(4) == b"PK\x03\x04"
        if zipped and not zipfile.is_zipfile(path):
            raise EOFError("truncated, its end is missing")
        obj = torch.load(path, map_location=map_location, weights_only=True) if zipped else None
    except Exception as e:
        raise CheckpointError(f"cannot load checkpoint {path}: {_line(e)}") from e
    if not isinstance(obj, dict):
        found = f"a saved {type(obj).__name__}" if zipped else "another kind of file"
        raise CheckpointError(f"cannot load checkpoint {path}: not a checkpoint but {found}")
    return obj


def plain(obj):
    """obj for strict JSON: arrays and numpy scalars become lists and numbers, NaN and inf null."""
    obj = obj.tolist() if hasattr(obj, "tolist") else obj
    if isinstance(obj, dict):
        return {key: plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [plain(value) for value in obj]
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return str(obj) if isinstance(obj, Path) else obj


def write_json_atomic(obj, path):
    """Indented JSON of plain(obj), written whole or not at all. Raises TypeError, OSError."""
    text = json.dumps(plain(obj), indent=2, allow_nan=False)
    with named(path):
        _write_atomic(path, lambda f: f.write(text.encode() + b"\n"))


def rotate(folder, keep: int, pattern: str = "step_*.pt") -> list[Path]:
    """Delete all but the `keep` highest numbers, never last.pt or best.pt; return the deleted."""
    if keep < 0:
        raise ValueError(f"keep must be >= 0, got {keep}")
    files = [p for p in Path(folder).glob(pattern) if p.name not in ("last.pt", "best.pt")]
    files.sort(key=lambda p: [int(number) for number in re.findall(r"\d+", p.stem)])
    for path in (old := files[: max(len(files) - keep, 0)]):
        path.unlink()
    return old


def find_last(run_dir) -> Path | None:
    """checkpoints/last.pt of a run directory, or None if it holds none yet."""
    path = Path(run_dir) / "checkpoints" / "last.pt"
    return path if path.is_file() else None
