"""A run from its first flag to its exit code. The training loop stays in its script: nothing that one
tunes is here.

    @experiment
    def main(argv=None) -> dict:
        run = Run(Args, argv, schema=1)  # flags, clock, seeds, device; run.state: what --resume found
        args = run.args
        ...  # load what the run is about: it is refused before anything is written
        run.open("regime", data)  # directory, lock, logs; a checkpoint of other data is refused
        loop = run.restore(Loop(), config, policy=dict(agent=averaged), learner=agent, envs=envs)
        while not args.eval_only and loop.global_step < steps and not run.out_of_time():
            run.phase("rollout")
            ...
            run.checkpoint(loop)  # every --checkpoint-interval
        return run.finish(loop, results, audit, columns)

    if __name__ == "__main__":
        exit_with(main)

Only the standard library is imported before it is needed: `--help` answers at once.
"""

from __future__ import annotations

import ast
import difflib
import faulthandler
import importlib.util
import inspect
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
import uuid
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, fields, replace
from functools import wraps
from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin, get_type_hints

from common import BUNDLE, ROOT, __version__, command_of, text_of
from common.progress import PROGRESS, WORDS, Pace, clock, unbreakable
from common.timeout_guard import (
    CheckpointError,
    TimeoutGuard,
    find_last,
    load_checkpoint,
    named,
    plain,
    rotate,
    save_atomic,
    write_json_atomic,
)

# what every script imports, and pip's names of packages that are imported by another
PACKAGES = "torch numpy numba gymnasium pandas pyarrow psutil filelock tensorboard".split()
SOME_NEED = "tyro rich talib hmmlearn empyrical sklearn scipy matplotlib tqdm".split()
PIP_NAMES = {"sklearn": "scikit-learn", "talib": "TA-Lib", "empyrical": "empyrical-reloaded"}
REPORT_SECONDS = 6.0  # for scripts/report.py and the end of the process
LONG = 100_000  # rows of a history from which on the work before the loop asks the deadline
EXIT_SECONDS = 5.0  # of a process that ends there
LAST_SECONDS = 60.0  # after all is written, in which wandb's own end may hang
GRACE = 15.0  # seconds after --timeout (or a tenth of it) that a call may hang before all ends
SHOWN = "pretrain_step", "eval/eval/score", "alarm/"  # of what is logged, on the progress line
# A resumed run may change these; every other flag shapes the agent or what it is judged by.
MAY_CHANGE = {
    "run_dir",
    "resume",
    "eval_only",
    "checkpoint",
    "checkpoint_interval",
    "keep_checkpoints",
    "timeout",
    "eval_timeout",
    "total_timesteps",
    "track",
    "wandb_project_name",
    "wandb_entity",
    "wandb_mode",
    "track_artifacts",
    "cuda",
    "backend",
    "torch_threads",
    "report",
    "vec_mode",
    "num_workers",
    "async_halves",
    "rescale",
    "on_worker_death",
    "worker_timeout",
}  # same trajectories


class UsageError(ValueError):
    """Bad flags or input: one line that names the flag, file, row or column and says what to do."""

    exit_code = 2


class CheckFailed(RuntimeError):
    """The run cannot go on (a sanity check, a loss that is not finite, a dead worker): one line."""

    exit_code = 1


class OutOfTime(RuntimeError):
    """The run must end and there is nothing to save yet: one line."""

    exit_code = 2


@dataclass
class RunArgs:
    """Flags that every script has. A group of --help begins at a comment."""

    # experiment
    exp_name: str = ""
    """name of this experiment"""
    seed: int = 1
    """seed of everything that the run draws (a synthetic market's own seed is in --data)"""
    torch_deterministic: bool = True
    """deterministic torch kernels"""
    cuda: bool = True
    """use the GPU if a probe shows that it works"""
    track: bool = False
    """log to Weights and Biases too"""
    wandb_project_name: str = "cleanrl_crypto"
    """wandb project"""
    wandb_entity: str | None = None
    """wandb team or user"""
    wandb_mode: str = "online"
    """online, offline or disabled"""
    track_artifacts: bool = False
    """upload report.html, its figures and best.pt to wandb at the end"""

    # run directory
    run_dir: str | None = None
    """folder of this run (default: runs/{env}__{exp_name}__{seed}__{unix time})"""
    resume: str | None = None
    """a checkpoint to continue from, or auto: the one in --run-dir if there is one"""
    checkpoint_interval: float = 60.0
    """seconds between checkpoints (last.pt and a rotated copy of the agent)"""
    keep_checkpoints: int = 3
    """rotated checkpoints kept beside last.pt and best.pt"""
    eval_only: bool = False
    """evaluate --checkpoint with its own flags and stop; a flag given beside it wins, and is printed"""
    checkpoint: str | None = None
    """checkpoint for --eval-only"""
    report: bool = True
    """write report.html at the end"""

    # runtime
    timeout: float | None = None
    """seconds since this process started after which it has exited (default: no limit)"""
    eval_timeout: float | None = None
    """seconds for one evaluation: it stops at what it has reached and says so"""
    backend: str = "auto"
    """where the environment's kernels run: auto, cpu or cuda"""
    torch_threads: int | None = None
    """torch and Numba threads (default: all cores)"""

    def __post_init__(self):
        choices = {
            "wandb_mode": ("online", "offline", "disabled"),
            "backend": ("auto", "cpu", "cuda"),
        }
        ranges = {
            (0, 2**31 - 1): "seed",
            (0, 1e9): "checkpoint_interval",
            (0, 10**6): "keep_checkpoints",
            (1, 1e9): "timeout",
            (0.1, 1e9): "eval_timeout",
            (1, 4096): "torch_threads",
        }
        check(self, choices, ranges)
        alone = self.eval_only != (self.checkpoint is not None)
        lost = self.resume == "auto" and self.run_dir is None
        refuse(
            (alone, "--eval-only and --checkpoint PATH go together"),
            (self.eval_only and self.resume, "--eval-only and --resume: give one of them"),
            (lost, "--resume auto needs --run-dir, the run to continue"),
        )


# ------------------------------------------------------------------------------------------- flags
def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def refuse(*rules: tuple):
    """UsageError with the first message whose condition holds: refuse((wrong, "--x 3: ..."))."""
    for wrong, why in rules:
        if wrong:
            raise UsageError(why)


def check(args, choices: dict, ranges: dict):
    """Refuse values outside choices {field: allowed} or ranges {(low, high): "fields"}.

    Both ends are allowed; None passes.
    """
    for name, known in choices.items():
        value = getattr(args, name)
        allowed = ", ".join(map(str, known))
        refuse((value not in known, f"{flag(name)} {value}: must be one of {allowed}"))
    for (low, high), names in ranges.items():
        for name in names.split():
            value = getattr(args, name)
            good = value is None or low <= value <= high  # a NaN is refused too
            ends = " to ".join(str(x) if isinstance(x, int) else f"{x:g}" for x in (low, high))
            refuse((not good, f"{flag(name)} {value}: must be from {ends}"))


def in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return bool(ipython and ipython.get_ipython())


def own_argv() -> list[str]:
    """The flags that this program was started with: those of a notebook's kernel are not its own."""
    program = getattr(sys.modules["__main__"], "__file__", None) or ""  # of %run, or none
    if in_notebook():
        if Path(program).resolve() != Path(sys.argv[0]).resolve():
            return []
    return sys.argv[1:]


def need(*names: str, why: str):
    """UsageError where a package is missing: `why`, and one command for all that are missing."""
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if absent:
        others = [name for name in [*PACKAGES, *SOME_NEED] if name not in names]
        absent += [name for name in others if importlib.util.find_spec(name) is None]
        pip = " ".join(PIP_NAMES.get(name, name) for name in absent)
        raise UsageError(f"{why}: pip install {pip}")


def parse_args(cls, argv: list[str] | dict | None):
    """The dataclass `cls`, and the names of the flags given.

    argv: as on the command line; None, the process's own; or {field: value}, which needs no tyro.
    """
    if isinstance(argv, dict):
        return args_of(cls, argv), set(argv)
    argv = own_argv() if argv is None else [str(a) for a in argv]
    answer(argv, script_of(cls))
    need("tyro", why="flags on a command line need tyro (main(timeout=300) does not)")
    import tyro

    known = {flag(f.name): f.name for f in fields(cls)}
    known |= {flag(f"no_{f.name}"): f.name for f in fields(cls) if f.type in (bool, "bool")}
    names = [token.split("=")[0].replace("_", "-") for token in argv if token.startswith("--")]
    for name in names:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f": did you mean {' or '.join(near)}?" if near else ""
        refuse((name not in known, f"unknown flag {name}{hint}"))
    stderr = io.StringIO()
    try:
        with redirect_stderr(stderr):
            return tyro.cli(cls, args=argv), {known[name] for name in names}
    except SystemExit as e:
        # colours, a box, of dashes where the terminal is not UTF-8
        text = re.sub(r"\x1b\[[0-9;]*m|[^\x20-\x7e]+|-{3,}", " ", stderr.getvalue())
        frame = rf"^.*?Error parsing ({cls.__name__}: )?|Argument helptext.*|For full helptext.*"
        raise UsageError(re.sub(frame, "", " ".join(text.split())).strip()) from e


def args_of(cls, flags: dict):
    """The dataclass `cls` from {field: value}. UsageError for an unknown name or another type."""
    hints = {f.name: get_type_hints(cls)[f.name] for f in fields(cls)}
    for name, value in flags.items():
        near = difflib.get_close_matches(name, hints, n=3)
        hint = f": did you mean {' or '.join(near)}?" if near else ""
        refuse((name not in hints, f"unknown flag {name}{hint}"))
        kind = getattr(hints[name], "__name__", str(hints[name]))
        refuse((not fits(value, hints[name]), f"{name}={value!r}: must be of type {kind}"))
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in flags.items()})


def fits(value, kind) -> bool:
    """Whether a flag of this type takes the value; an int is a float too, and a list a tuple."""
    inner = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if get_origin(kind) is tuple:
        whole = isinstance(value, (tuple, list))
        return whole and all(fits(one, inner[0]) for one in value)
    if kind in (int, float):
        kinds = (int, float) if kind is float else int
        return isinstance(value, kinds) and not isinstance(value, bool)
    return isinstance(value, kind)


def script_of(cls) -> Path:
    """The script that defines `cls`."""
    return ROOT / BUNDLE["script"] if BUNDLE else Path(inspect.getsourcefile(cls))


def source_of(path: str | Path) -> str:
    """Text of a script or of a file here, also where all are one file."""
    if BUNDLE:
        return text_of(Path(path).relative_to(ROOT).as_posix())
    return Path(path).read_text(encoding="utf-8")


def flag_groups(path: str | Path, name: str = "Args") -> dict[str, list[tuple]]:
    """Flags of a dataclass, read from its source: {group: [(field, type, default, text), ...]}."""
    source = source_of(path)
    top = ast.parse(source).body
    assigned = [node for node in top if isinstance(node, ast.Assign)]
    constants = {ast.unparse(node.targets[0]): ast.unparse(node.value) for node in assigned}
    classes = (node for node in top if isinstance(node, ast.ClassDef))
    body = next(node.body for node in classes if node.name == name)
    lines, groups, group = source.splitlines(), {}, "flags"
    for node, after in zip(body, [*body[1:], None]):
        if not isinstance(node, ast.AnnAssign):
            continue
        above = lines[node.lineno - 2].strip()
        group = above[2:] if above.startswith("# ") else group
        text = after.value.value if isinstance(after, ast.Expr) else ""
        kind = ast.unparse(node.annotation)
        default = ast.unparse(node.value) if node.value else ""
        default = constants.get(default, default)
        row = node.target.id, kind, default, " ".join(text.split())
        groups.setdefault(group, []).append(row)
    return groups


def print_help(path: str | Path):
    """--help of a script from its source alone: its first sentence, its flags in groups."""
    script = Path(path)
    source = source_of(script)
    program = ROOT.name if BUNDLE else f"{script.parent.name}/{script.name}"
    print(f"usage: python {program} [--flag value ...]\n")
    print(textwrap.fill(ast.get_docstring(ast.parse(source)).split("\n\n")[0], 80))
    groups = flag_groups(script)
    own = {row[0] for rows in groups.values() for row in rows}
    if "(RunArgs)" in source:
        for group, rows in flag_groups(__file__, "RunArgs").items():
            groups[group] = groups.get(group, []) + [row for row in rows if row[0] not in own]
    for group, rows in groups.items():
        print(f"\n{group}")
        for row in rows:
            print_flag(*row)


def print_flag(name: str, kind: str, default: str, text: str):
    """A flag of --help: name and type in 33 columns, what it is in the 46 beside them."""
    head = f"  {flag(name)}"
    if kind.startswith("Positional"):
        head = f"  {name.upper()}"
    elif kind != "bool":
        one = kind.split(" |")[0]
        head += " " + re.sub(r"tuple\[|[],]", "", one).upper()
    if default == "True":
        text += f" ({flag('no_' + name)} turns it off)"
    elif default not in ("False", "None", "()", "", "''") and name != "exp_name":
        words = re.sub(r"^Path\(|[()',]", "", default)  # of a tuple as one gives them
        text += f" (default: {words})"
    lines = textwrap.wrap(text, 46, break_on_hyphens=False)
    if len(head) >= 33:
        print(head)
        head = ""
    for line in lines:
        print(f"{head:<33} {line}")
        head = ""


def answer(argv: list[str], path: str | Path):
    """--help and --version print and end the process."""
    if {"-h", "--help"} & set(argv):
        sys.stdout = unbreakable(sys.stdout)
        print_help(path)
        raise SystemExit(0)
    if "--version" in argv:
        commit = commit_of(Path(path))
        print(f"{Path(path).stem} {__version__}" + f", commit {commit}" * bool(commit))
        raise SystemExit(0)


def answer_help(module: str, path: str):
    """Between a script's light and heavy imports: `python script.py --help` answers at once.

    So do packages that are missing.
    """
    program = module == "__main__"
    if program:
        answer(own_argv(), path)
    try:
        need(*PACKAGES, why=f"{Path(path).name} needs packages")
    except UsageError as e:
        if not program:
            raise ImportError(str(e)) from None
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    if program and "(RunArgs)" in source_of(path):
        start_talking()


def start_talking():
    """The first word of a run: its libraries take seconds."""
    sys.stdout, sys.stderr = unbreakable(sys.stdout), unbreakable(sys.stderr)
    PROGRESS.begin()


# --------------------------------------------------------------------------------------------- run
class Run:
    """One run. Attributes: args, dir, device (torch), backend, rng (NumPy), best, guard, state (the
    checkpoint to start from, or None), rank and world (torchrun)."""

    first = True  # the next run is the first one of this process
    current = None  # the run of this process, for what must happen when main() raises
    flags = None  # those that exit_with() gave main(): a program without a command line

    def __init__(self, cls, argv, schema: int, evaluations: float = 5.0):
        """evaluations: how many evaluations' time the end of the run takes."""
        self.args, given = parse_args(cls, argv)
        self.argv = argv
        self.is_program = argv is None or argv is Run.flags
        self.script, self.schema = script_of(cls), schema
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.dir = self.lock = self.mirrors = self.jsonl = None
        self.state = self.source = self.loop = None
        self.config, self.data, self.lines = {}, {}, 0
        self.best = {"score": -math.inf, "step": 0, "updates": 0, "policy": None}
        self._policy, self._parts, self._open_things, self._fired = {}, {}, [], {}
        self._failed, self._counters, self._shown, self._pace = False, None, {}, Pace()
        self._saved, self._due = time.monotonic(), False
        self._evaluations, self.eval_seconds, self._eval_began = evaluations, 0.0, None
        self._iteration_began = None
        self._sps = {"steps": 0, "seconds": 0.0, "mark": None, "latest": None}
        self._piece = {"work": "", "began": 0.0, "longest": 0.0}
        # a program's first run began with its process, however long its imports took
        from_start = self.is_program and not in_notebook() and Run.first
        Run.first = False
        self.guard = TimeoutGuard(self.args.timeout, from_process_start=from_start)
        self.guard.mark("setup")
        Run.current = self
        PROGRESS.begin(self.words)
        check_tracking(self.args)
        self._load_state(given)
        self._set_up_device()
        if self.args.timeout and self.is_program:  # a call that hangs: stacks on stderr, code 1
            late = max(self.guard.remaining(), 0) + max(GRACE, 0.1 * self.args.timeout)
            faulthandler.dump_traceback_later(late, exit=True)

    def _load_state(self, given: set[str]):
        args = self.args
        source = args.checkpoint or args.resume
        if args.resume == "auto":
            source = find_last(args.run_dir)
        if source is None:
            return
        state = load_run(source, self.script, self.schema)
        there, here = state["args"], plain(asdict(args))
        different = [k for k in here if k not in MAY_CHANGE and there.get(k) != here[k]]
        if args.eval_only:  # its own flags; what the command line says wins
            own = {k: there[k] for k in different if k in there and k not in given}
            own = {k: tuple(v) if isinstance(v, list) else v for k, v in own.items()}
            self.args = replace(args, **own)
            different = [k for k in different if k in given]
        why = f"{source} was made with other flags: {differences(there, here, different)}"
        if different and args.eval_only:
            print(why)
        elif not args.eval_only:
            if "parts" not in state:
                what = "holds the agent alone (for evaluation); resume from last.pt"
                raise CheckpointError(f"{source}: {what}")
            refuse((different, why))
            if state["loop"]["global_step"] == 0:  # half a pre-training is not worth keeping
                print(f"{source} holds no transition yet: starting anew")
                self.source = Path(source)
                return
        self.state, self.source = state, Path(source)

    def _set_up_device(self):
        import random

        import numba as nb
        import numpy as np
        import torch

        from common.gpu_pool import probe_cuda
        from common.lanes import Lanes

        args, seed = self.args, self.args.seed
        threads = self.threads = args.torch_threads or max(1, (os.cpu_count() or 1) // self.world)
        torch.set_num_threads(threads)
        nb.set_num_threads(min(threads, nb.config.NUMBA_NUM_THREADS))
        if args.torch_deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        local = int(os.environ.get("LOCAL_RANK", 0))
        torch_works = numba_works = False
        forced = args.backend == "cuda"
        if args.cuda or forced:
            torch_works, numba_works = probe_cuda(local)
        on_gpu = args.cuda and torch_works
        refuse(
            (
                forced and not numba_works,
                "--backend cuda: no CUDA device runs a Numba kernel here",
            ),
            (
                forced and not on_gpu,
                "--backend cuda needs torch on the GPU too: not with --no-cuda",
            ),
        )
        self.device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
        self.backend = "cuda" if args.backend != "cpu" and numba_works and on_gpu else "cpu"
        if self.world > 1:
            torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 (other libraries draw from it)
        torch.manual_seed(seed)
        self.rng = np.random.default_rng(seed)
        torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=on_gpu)
        torch.backends.cudnn.deterministic = args.torch_deterministic
        # a debugging aid: a pass over every new tensor
        torch.utils.deterministic.fill_uninitialized_memory = False
        self._builds = Lanes.builds

    @property
    def resumed(self) -> bool:
        return self.state is not None and not self.args.eval_only

    # directory and logs
    def open(self, name: str, data: dict):
        """Directory, lock and logs.

        data: what the run is about, plain values with a sha256 of what was read; a checkpoint that
        was made of other data is refused (--resume) or said (--eval-only).
        """
        args, self.data = self.args, plain(data)
        if self.state:
            there = self.state["data"]
            other = [k for k in self.data if self.data[k] != there.get(k)]
            why = f"{self.source} was made with other data: {differences(there, self.data, other)}"
            refuse((other and self.resumed, why))
            if other:
                print(why)
        if self.rank:
            return
        from common.tracking import Mirrors

        self._claim(name)
        for half_written in self.dir.rglob(".*.tmp"):  # by a process that was killed
            half_written.unlink()
        before = self.state if self.resumed else None
        own = before["run"]["id"] if before else uuid.uuid4().hex[:12]
        self.id = os.environ.get("WANDB_RUN_ID", own)  # what an agent of a sweep calls it
        write_json_atomic(asdict(args), self.dir / "args.json")
        (self.dir / "run_id").write_text(self.id + "\n")
        history = self._open_log(before)
        facts = {"script": self.script.stem, "commit": commit_of(self.script), "read": self.data}
        purge = before["loop"]["global_step"] + 1 if before else None
        name = self.script.stem
        self.mirrors = Mirrors(self.dir, args, name, self.id, facts, history, purge)

    def _open_log(self, before: dict | None) -> list[dict]:
        """metrics.jsonl, cut back to the checkpoint; a new directory gets the history too.

        Returns what it holds.
        """
        path, kept = self.dir / "metrics.jsonl", []
        if before:
            old = self.source.resolve().parent.parent / "metrics.jsonl"
            history = path if path.exists() else old
            lines = history.read_text().splitlines(True) if history.exists() else []
            kept = [line for line in lines if line.endswith("\n")][: before["run"]["log_lines"]]
        path.write_text("".join(kept))
        self.jsonl, self.lines = path.open("a"), len(kept)
        return [json.loads(line) for line in kept]

    def _claim(self, name: str):
        from filelock import FileLock, Timeout

        args = self.args
        default = f"runs/{name}__{args.exp_name}__{args.seed}__{int(time.time())}"
        self.dir = base = Path(args.run_dir or default)
        taken = 1
        try:
            while args.run_dir is None:  # two starts within a second get two folders
                try:
                    self.dir.mkdir(parents=True)
                    break
                except FileExistsError:
                    taken += 1
                    self.dir = base.with_name(f"{base.name}-{taken}")
            (self.dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.dir / ".lock")
            lock.acquire(timeout=0)
        except Timeout:
            pid = self.dir / ".pid"
            owner = pid.read_text() if pid.exists() else "?"
            raise UsageError(f"--run-dir {self.dir}: in use by process {owner}") from None
        except OSError as e:
            raise UsageError(f"--run-dir {self.dir}: {e.strerror}") from e
        self.lock = lock
        lines, last = self.dir / "metrics.jsonl", find_last(self.dir)
        # a run that was killed before its first line left nothing to continue
        held = last is not None or (lines.exists() and lines.stat().st_size > 0)
        here = self.dir.resolve() / "checkpoints"
        own = args.resume == "auto"
        if args.resume and self.source:
            own = self.source.resolve().parent == here
        why = f"--run-dir {self.dir} holds a run already: --resume auto continues it"
        refuse((held and not own, why))
        if self.resumed and last and not last.samefile(self.source):
            step = load_run(last, self.script, self.schema)["loop"]["global_step"]
            behind = self.state["loop"]["global_step"]
            why = f"--resume {self.source} stands at {behind} transitions, {last} at {step}"
            refuse((step > behind, f"{why}: --resume auto, or another --run-dir"))
        (self.dir / ".pid").write_text(str(os.getpid()))

    def log(self, record: dict, loop, pretrain_step: int | None = None):
        """A line of metrics.jsonl, the record of truth; TensorBoard and wandb mirror it.

        None and NaN become null. pretrain_step: the axis of what is logged before the loop.
        """
        if self.rank:
            return
        axes = {"global_step": loop.global_step, "wall": round(self.guard.elapsed(), 3)}
        if pretrain_step is not None:
            axes["pretrain_step"] = pretrain_step
        record = {k: plain(float(v)) if v is not None else None for k, v in record.items()}
        line = axes | record
        with named(self.dir / "metrics.jsonl"):
            self.jsonl.write(json.dumps(line) + "\n")
            self.jsonl.flush()
        self.mirrors.log(line, self.lines)
        self.lines += 1
        shown = {k: v for k, v in line.items() if k.startswith(SHOWN)}
        self._shown = self._shown | shown  # a new one: the progress line reads it from its thread

    def words(self) -> str:
        """What the progress line says."""
        guard, shown, loop = self.guard, self._shown, self._counters
        words = [clock(guard.elapsed()), WORDS.get(guard.current, guard.current)]
        limits = [guard.remaining()]
        if guard.current == "pretrain":
            words += [f"step {shown.get('pretrain_step', 0)}"]
        elif loop is not None and loop.global_step:
            words += [f"{loop.global_step:,} transitions"]
            pace = self._pace.of(loop.global_step)
            if pace and WORDS.get(guard.current) == "learning":
                words += [f"{pace:,.0f}/s"]
                limits += [((self.args.total_timesteps or math.inf) - loop.global_step) / pace]
        if min(limits) < math.inf:
            words += [f"{clock(min(limits))} left"]
        if shown.get("eval/eval/score") is not None:
            words += [f"score {shown['eval/eval/score']:.3f}"]
        if "eval" in shown:
            best = max(self.best["score"], shown["eval"])
            words += [f"eval {shown['eval']:.4g}, best {best:.4g}"]
        if loop is not None and loop.updates:
            words += [f"{k[6:]}!" for k, on in shown.items() if k.startswith("alarm/") and on]
        return "  ".join(words)

    def charts(self, loop, samples: int | None = None) -> dict:
        """charts/SPS since the last call (rollouts and learning), counts, time by phase."""
        spent, step, sps = self.guard.phases(), loop.global_step, self._sps
        seconds = spent.get("rollout", 0) + spent.get("learn", 0)
        if sps["mark"]:  # before the first call kernels compile and caches warm up
            steps, took = step - sps["mark"][0], seconds - sps["mark"][1]
            if took > 0:
                sps["latest"] = steps / took
                sps["steps"] += steps
                sps["seconds"] += took
        sps["mark"] = step, seconds
        record = {
            "charts/SPS": sps["latest"],
            "charts/updates": loop.updates,
            "charts/replay_ratio": loop.updates / max(step, 1),
        }
        if samples is not None:
            record["charts/samples_per_transition"] = samples / max(step, 1)
        return record | {f"time/{k}": v for k, v in spent.items()}

    # clock
    def phase(self, name: str):
        """From here on the wall clock is charged to `name`."""
        now = time.monotonic()
        if self._eval_began is not None:
            self.eval_seconds, self._eval_began = now - self._eval_began, None
        if name == "eval":
            self._eval_began = now
        elif name == "rollout":
            self._iteration_began = now
        self.guard.mark(name)

    def reserve(self) -> float:
        """Seconds that the end of the run takes: its evaluations and the report."""
        upload = self.mirrors.seconds() if self.mirrors else 0.0
        return REPORT_SECONDS + upload + self._evaluations * self.eval_seconds

    def out_of_time(self, more: float = 0.0) -> bool:
        """Whether to leave the loop: a signal, or no time for the end and an iteration as long as
        the last one, evaluations apart.

        more: seconds beside the final evaluations and the report. All processes of torchrun get the
        same answer.
        """
        if self._iteration_began is not None:
            more += (self._eval_began or time.monotonic()) - self._iteration_began
        stop = self.guard.should_stop(self.reserve() + more)
        self._due = time.monotonic() - self._saved > self.args.checkpoint_interval
        if self.world > 1:
            import torch

            votes = torch.tensor(
                [stop, self._due and self.rank == 0], dtype=torch.float, device=self.device
            )
            torch.distributed.all_reduce(votes)
            stop, self._due = votes.bool().tolist()
        return stop

    def eval_limit(self, share: float = 1.0) -> float:
        """Seconds for an evaluation now: --eval-timeout, at most `share` of what is left."""
        left = max(share * self.guard.remaining(), 0.1)
        return min(self.args.eval_timeout or math.inf, left)

    def every(self, period: int, step: int, name: str = "eval") -> bool:
        """Whether `step` passed a multiple of `period` since this was last true; resumed too."""
        fired = step // period > self._fired.get(name, 0)
        if fired:
            self._fired[name] = step // period
        return fired

    # checkpoints
    def restore(self, loop, config: dict, policy: dict, **parts):
        """Say what is saved, and load it if the run is resumed. Returns the loop's counters.

        config: plain values that rebuild the networks. policy: what load_policy() needs, in every
        checkpoint; parts: what else a resumed run needs, in last.pt. Each has state_dict() and
        load_state_dict(), or is a random generator.
        """
        self.config, self._policy, self._parts = config, policy, parts
        self.loop = self._counters = loop
        state = self.state
        if state is None:
            return loop
        self._load_policy(state)
        counters = state["loop"]
        if self.args.eval_only:
            loop.global_step, loop.updates = counters["global_step"], counters["updates"]
            return loop
        for name, part in parts.items():
            saved = state["parts"][name]
            if name in state["by_rank"]:
                saved = saved[self.rank % len(saved)]
            load_part(part, saved, name)
        own = state["run"]
        self.best, self._fired = own["best"], own["fired"]
        load_part(self.rng, own["rng"], "rng")
        set_torch_rng(own["torch_rng"], self.device)
        for name, value in counters.items():
            setattr(loop, name, value)
        if self.rank:
            return loop
        if self.best["policy"]:  # best.pt may be younger than last.pt
            self._save("best.pt", self.best["loop"], self.best["policy"])
        print(f"resumed {self.source} at {loop.global_step} transitions, {loop.updates} updates")
        return loop

    def _load_policy(self, state: dict):
        for name, part in self._policy.items():
            load_part(part, state[name], name)

    def _save(self, name: str, loop: dict, policy: dict, **more):
        state = {
            "schema": self.schema,
            "script": self.script.stem,
            "args": plain(asdict(self.args)),
            "data": self.data,
            "config": self.config,
            "loop": loop,
        }
        save_atomic(state | policy | more, self.dir / "checkpoints" / name)

    def policy_state(self) -> dict:
        return {name: state_of(part) for name, part in self._policy.items()}

    def save_last(self, loop):
        """checkpoints/last.pt: all that a resumed run needs. Every process of torchrun calls it."""
        with self.guard.phase("io"):
            parts = {name: state_of(part) for name, part in self._parts.items()}
            by_rank = []
            if self.world > 1:
                by_rank = [
                    k for k, part in self._parts.items() if getattr(part, "per_rank", False)
                ]
                everyone = gather({name: parts[name] for name in by_rank}, self.rank, self.world)
                parts |= {name: [one[name] for one in everyone] for name in by_rank}
            self._saved = time.monotonic()
            if self.rank:
                return
            own = {
                "best": self.best,
                "fired": self._fired,
                "log_lines": self.lines,
                "id": self.id,
                "rng": state_of(self.rng),
                "torch_rng": torch_rng(self.device),
            }
            more = {"parts": parts, "run": own, "by_rank": by_rank}
            self._save("last.pt", asdict(loop), self.policy_state(), **more)

    def check_config(self, config: dict):
        """UsageError where a checkpoint's config differs from this one."""
        saved = self.state["config"] if self.state else config
        unlike = []
        for key, value in config.items():
            if saved.get(key) != value:
                unlike.append(f"{key} {saved.get(key)} there, {value} here")
        refuse((unlike, f"{self.source} does not fit these flags: {'; '.join(unlike)}"))

    def checkpoint(self, loop):
        """Every --checkpoint-interval: last.pt and a rotated copy of the agent."""
        if self.world == 1:
            self._due = time.monotonic() - self._saved > self.args.checkpoint_interval
        if not self._due:
            return
        self.save_last(loop)
        if self.args.keep_checkpoints and self.rank == 0:
            self._save(f"step_{loop.global_step}.pt", asdict(loop), self.policy_state())
            rotate(self.dir / "checkpoints", self.args.keep_checkpoints)

    def keep_best(self, score: float, loop) -> bool:
        """best.pt, if there were updates and `score` is above every one before."""
        self._shown = self._shown | {"eval": float(score)}
        if self.rank or not loop.updates or not score > self.best["score"]:
            return False
        policy = self.policy_state()
        self.best = {
            "score": float(score),
            "step": loop.global_step,
            "updates": loop.updates,
            "policy": policy,
            "loop": asdict(loop),
        }
        self._save("best.pt", self.best["loop"], policy)
        return True

    def use_best(self, loop):
        """After the loop: last.pt is written, and the policy becomes that of best.pt if there is one."""
        if self.args.eval_only:
            return
        self.save_last(loop)
        self.loop = None  # last.pt is whole, and the policy is another one from here on
        if self.rank:
            return
        if self.best["policy"]:
            self._load_policy(self.best["policy"])
        else:
            self._save("best.pt", asdict(loop), self.policy_state())

    # the end
    def closing(self, thing):
        """`thing`, whose close() is called when main() ends, however it ends."""
        self._open_things.append(thing)
        return thing

    def close(self):
        while self._open_things:
            self._open_things.pop().close()
        PROGRESS.end()
        if self.jsonl:
            self.jsonl.close()
        tracked = self.mirrors is not None and self.mirrors.close(self._failed)
        if self.lock:
            (self.dir / ".pid").unlink(missing_ok=True)
            self.lock.release()
        self.mirrors = self.jsonl = self.lock = None
        if self.world > 1:
            import torch

            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
        if tracked and self.is_program:  # nor may wandb hang when it ends
            faulthandler.dump_traceback_later(LAST_SECONDS, exit=True)
        self.guard.close()
        Run.current = None

    def rescue(self):
        """main() raised: between two iterations the state is whole, and last.pt keeps it."""
        self._failed = True
        if self.loop and self.dir and not self.args.eval_only and self.world == 1:
            if self.guard.current not in ("rollout", "learn"):
                try:
                    self.save_last(self.loop)
                except Exception as e:  # what ended the run is what is to be read
                    print(f"last.pt was not saved: {e}", file=sys.stderr)

    def finish(self, loop, results: dict, audit: dict, columns: tuple, **more) -> dict:
        """summary.json, report.html and the table.

        results: {split: {"agent": metrics, "baselines": {name: metrics}}}; columns: the metrics of
        the table; more: keys of the summary, merged where both are dicts.
        """
        import gymnasium
        import numba
        import numpy
        import torch

        from common.gpu_pool import pool
        from common.lanes import Lanes

        if self.rank:
            return {"exit_code": self.guard.exit_code}
        updates, steps = loop.updates, loop.global_step
        replay_ratio = updates / max(steps, 1)
        audit = {"replay_ratio": replay_ratio} | audit
        versions = {m.__name__: m.__version__ for m in (torch, numpy, numba, gymnasium)}
        began = time.gmtime(time.time() - self.guard.elapsed())
        seconds = self._sps["seconds"]
        summary = {
            "status": self.guard.status,
            "command": self.command(),
            "script": self.script.stem,
            "commit": commit_of(self.script),
            "began": time.strftime("%Y-%m-%d %H:%M:%S UTC", began),
            "global_step": steps,
            "updates": updates,
            "replay_ratio": replay_ratio,
            "best_step": self.best["step"],
            "best_updates": self.best["updates"],
            "env_builds": Lanes.builds - self._builds,
            "buffer_allocations": pool.stats()["allocations"],
            "sps": self._sps["steps"] / seconds if seconds else None,
            "eval": results,
            "audit": audit,
            "versions": versions | {"python": sys.version.split()[0]},
            "device": {
                "torch": str(self.device),
                "backend": self.backend,
                "threads": self.threads,
                "cpu_count": os.cpu_count(),
                "processes": self.world,
            },
            "data": self.data,
        }
        for key, value in more.items():
            merged = isinstance(summary.get(key), dict)
            summary[key] = summary[key] | value if merged else value
        self.phase("report")
        self._write(summary)
        wrote = self._report()
        self.phase("upload")
        self.mirrors.finish(summary, self.best)
        self.mirrors.close(failed=False)
        PROGRESS.end()
        done = self.guard.status
        if self.args.eval_only:
            done = f"{self.args.checkpoint} evaluated,"
        print(f"{self.data.get('spec', '')}: {done} after {steps} transitions, {updates} updates")
        print_table(summary, columns)
        print(f"{audit['verdict']}: {'; '.join(audit['reasons'])}")
        print(f"{self.dir}: summary.json" + ", report.html" * wrote)
        rival = rival_line(summary)
        if rival:
            print(rival)
        self._write(summary)
        return summary | {"run_dir": str(self.dir), "exit_code": self.guard.exit_code}

    def command(self) -> str:
        """The command line, or the call of main() from another program or a notebook."""
        if isinstance(self.argv, dict):
            flags = ", ".join(f"{k}={v!r}" for k, v in self.argv.items())
            return f"{self.script.name}: main({flags})"
        own = self.argv is None and own_argv() == sys.argv[1:]
        program = sys.argv[0] if own else self.script.name
        flags = own_argv() if self.argv is None else self.argv
        return shlex.join([program, *map(str, flags)])

    def _write(self, summary: dict):
        summary.update(wall_seconds=self.guard.elapsed(), phases=self.guard.phases())
        write_json_atomic(summary, self.dir / "summary.json")

    def _report(self) -> bool:
        command = [*command_of("scripts/report.py"), str(self.dir)]
        if self.args.track_artifacts:
            command += ["--figures", str(self.dir / "figures")]
        left = self.guard.remaining() - 1.0
        if not self.args.report:
            return False
        why = f"{max(left, 0):.0f} s are left"
        if left >= 3.0:
            limit = left if left < math.inf else None
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
                if done.returncode == 0:
                    return True
                why = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            except subprocess.TimeoutExpired:
                why = f"not done in {left:.0f} s"
        print(
            f"report.html was not written ({why}); again: {shlex.join(command)}",
            file=sys.stderr,
        )
        return False


# ----------------------------------------------------------------------------------------- helpers
def ask_deadline(work: str, rows: int):
    """OutOfTime if the time is over or a signal came: between the pieces of work before the loop.

    A history of fewer than LONG rows is worked through: even a run without time then leaves a
    checkpoint.
    """
    if Run.current is None or rows < LONG:
        return
    guard, piece, now = Run.current.guard, Run.current._piece, time.monotonic()
    if piece["work"] == work:
        piece["longest"] = max(piece["longest"], now - piece["began"])
    piece["work"], piece["began"] = work, now
    if guard.signal is not None:
        stop = OutOfTime(f"interrupted in {work}")
        stop.exit_code = guard.exit_code
        raise stop
    if guard.remaining() < EXIT_SECONDS + piece["longest"]:
        limit = f"--timeout {guard.timeout:g} is too short for {work} of {rows} rows"
        raise OutOfTime(f"{limit}: give more time, or fewer bars")


def differences(there: dict, here: dict, names) -> str:
    return "; ".join(f"{flag(k)} {there.get(k)} there, {here.get(k)} here" for k in names)


def commit_of(path: Path) -> str | None:
    """The commit of the checkout of `path`, with a + where files differ; None outside of one."""
    if BUNDLE:
        return BUNDLE["commit"]
    command = "git describe --always --abbrev=12 --exclude=* --dirty=+".split()
    options = {"cwd": path.parent, "capture_output": True, "text": True, "timeout": 5}
    try:
        return subprocess.run(command, **options).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):  # no git, a disk that hangs
        return None


def load_run(path, script: Path, schema: int, device="cpu") -> dict:
    """A checkpoint of `script`. Raises CheckpointError (one line)."""
    state = load_checkpoint(path, device)
    name, number = state.get("script"), state.get("schema")
    if (name, number) != (script.stem, schema):
        found = f"of {name}, schema {number}; expected schema {schema}"
        raise CheckpointError(f"{path}: not a checkpoint of {script.name} ({found})")
    return state


def state_of(part) -> dict | str:
    """What a part saves, on the CPU; generators of random numbers too."""
    import numpy as np
    import torch

    if isinstance(part, np.random.Generator):
        return json.dumps(part.bit_generator.state)
    if isinstance(part, torch.Generator):
        return {"device": part.device.type, "state": part.get_state()}
    state = part.state_dict()
    if isinstance(part, torch.nn.Module):
        return {k: v.detach().cpu().clone() for k, v in state.items()}
    return state


def load_part(part, state, name: str):
    import numpy as np
    import torch

    if isinstance(part, np.random.Generator):
        part.bit_generator.state = json.loads(state)
    elif not isinstance(part, torch.Generator):
        if hasattr(part, "load_state_dict"):  # a market's fits were rebuilt from the state before
            part.load_state_dict(state)
    elif part.device.type == state["device"]:
        part.set_state(state["state"])
    else:
        where = f"made on {state['device']}, on {part.device.type} now"
        print(f"{name}: {where}: random numbers start from the seed")


def torch_rng(device) -> dict:
    import torch

    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_torch_rng(state: dict, device):
    import torch

    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def gather(own: dict, rank: int, world: int) -> list:
    """What every process of torchrun holds, on the first; elsewhere nothing."""
    import torch

    everyone = [None] * world if rank == 0 else None
    torch.distributed.gather_object(own, everyone)
    return everyone or []


def check_tracking(args):
    """Refuse --track where wandb cannot work."""
    from common import tracking

    tracking.check_tracking(args)


def print_table(summary: dict, columns: tuple):
    """Agent beside baselines, split by split, with as many columns as the terminal is wide."""
    if importlib.util.find_spec("rich") is None:
        print_plain(summary, columns)
        return
    from rich.console import Console

    width = shutil.get_terminal_size((130, 24)).columns
    shown = list(columns)
    while len(shown) > 1:
        table = table_of(summary, shown)
        if Console(width=10_000).measure(table).minimum <= width:
            break
        shown.pop()
    Console(width=width).print(table_of(summary, shown))
    hidden = ", ".join(columns[len(shown) :])
    if hidden:
        print(f"more columns in summary.json: {hidden}")


def print_plain(summary: dict, columns: tuple):
    """The table without rich: a line for each who and split."""
    rows = [("split", "who", *columns)]
    for split, result in summary["eval"].items():
        for name, metrics in ({"agent": result["agent"]} | result["baselines"]).items():
            rows.append((split, name, *(cell(metrics.get(k)) for k in columns)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print(" ".join(text.rjust(width) for text, width in zip(row, widths)))


def table_of(summary: dict, columns: list):
    """rich's table; a head has a word a line, so that columns are as wide as their numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for name in ("split", "who", *columns):
        side = "left" if name in ("split", "who") else "right"
        table.add_column(name.replace("_", "\n"), justify=side, vertical="bottom", no_wrap=True)
    for split, result in summary["eval"].items():
        rows = {"agent": result["agent"]} | result["baselines"]
        for name, metrics in rows.items():
            cells = [cell(metrics.get(k)) for k in columns]
            first, last = name == "agent", name == list(rows)[-1]
            table.add_row(split if first else "", name, *cells, end_section=last)
    return table


def rival_line(summary: dict) -> str | None:
    """Where the cheap rival of a market beats the agent on unseen rows, in the metric that judges."""
    by, test = summary.get("selected_by"), summary["eval"].get("test", {})
    rival = test.get("baselines", {}).get("sparse_linear", {}).get(by)
    if rival is None or rival <= test["agent"][by]:
        return None
    numbers = f"{by} {rival:.3f} against {test['agent'][by]:.3f}"
    return f"sparse_linear beats the agent on the test split: {numbers}"


def cell(x) -> str:
    if x is None:
        return ""
    return str(x) if isinstance(x, int) else f"{x:.3f}"


def experiment(main):
    """Decorates main(argv): whatever ends it, last.pt keeps a whole state, and all is closed."""

    own = inspect.signature(main).parameters

    @wraps(main)
    def wrapped(argv=None, **kwargs):
        """main(["--seed", "3"]) or main(seed=3); with neither, the process's own flags."""
        flags = {k: kwargs.pop(k) for k in list(kwargs) if k not in own}
        refuse((flags and argv is not None, "flags: as a list or as keywords, not both"))
        try:
            return main(flags or argv, **kwargs)
        except BaseException:
            if Run.current:
                Run.current.rescue()
            raise
        finally:
            if Run.current:
                Run.current.close()

    return wrapped


def out_of_memory(e: Exception) -> bool:
    """NumPy's, or torch's on a GPU or a CPU."""
    torchs = isinstance(e, RuntimeError) and re.search(
        "out of memory|can't allocate memory", str(e)
    )
    return isinstance(e, MemoryError) or bool(torchs)


def exit_with(main, flags: dict | None = None):
    """Run main() as a program: an exception with an `exit_code` is one line, any other a bug.

    flags: those of a run that gets none on its command line. In a notebook a run that went well
    ends no process: what main() returned is returned.
    """
    sys.stdout, sys.stderr = unbreakable(sys.stdout), unbreakable(sys.stderr)
    Run.flags = None if in_notebook() else flags
    result = None
    try:
        result = main() if flags is None or own_argv() else main(flags)
        code, why = result["exit_code"], None
    except OSError as e:  # a full disk under a log, a folder that went away
        file = f"{e.filename}: " if e.filename else ""
        code, why = 2, file + (e.strerror or str(e))
    except Exception as e:
        code, why = getattr(e, "exit_code", 1), e
        if out_of_memory(e):
            text = (str(e).splitlines() or [""])[0]
            why = f"out of memory: smaller buffers, batches or networks, or fewer lanes ({text})"
        elif not hasattr(e, "exit_code"):
            PROGRESS.end()
            raise
    PROGRESS.end()
    if why is not None:
        print(f"error: {why}", file=sys.stderr)
    sys.stdout.flush()
    if in_notebook() and not code:
        return result
    sys.exit(code)
