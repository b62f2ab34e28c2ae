"""Walk forward: train on some months, choose on the next, test on those after, move on, and ask of
the whole whether it was luck.

    python scripts/run_full_wfo.py --data data/BTCUSDT_1h.parquet --seeds 2 --timeout 7200
    python scripts/run_full_wfo.py --data data/BTCUSDT_1h.parquet --seeds 2  # after kill -9
    python scripts/run_full_wfo.py --data data/BTCUSDT_1h.parquet --show     # the page again
    python scripts/run_full_wfo.py --data data/forex --script dqn --timesteps 500000 \
        -- --symbols EURUSD GBPUSD --spread-file data/forex/spread_1h.parquet
    python scripts/run_full_wfo.py --data data/BTCUSDT_1h.parquet --seeds 8 --engine ray \
        --ray-address HOST:6379

What stands after -- goes to the training script. Every segment has bars of its own, in files of its
own: a run cannot see others. Its train rows fit everything, its eval rows choose, its test rows are
reported. Under --root: data/NAME, logs/NAME, weights/NAME, results/NAME; and results/ledger.jsonl,
one line for everything ever tried, which outlives --clean. docs/walk_forward.md explains the page,
docs/cluster.md the engines.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import math
import os
import shutil
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from multiprocessing import connection, get_context
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.run import (  # noqa: E402
    MAY_CHANGE,
    CheckFailed,
    UsageError,
    answer_help,
    check,
    differences,
    exit_with,
    flag,
    parse_args,
    refuse,
)

answer_help(__name__, __file__)

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from filelock import FileLock, Timeout  # noqa: E402

from common import markets  # noqa: E402
from common.data import COLUMNS, Bars, find_file, iso, load_bars, utc_times  # noqa: E402
from common.scoring import BP, NOTHING, path_metrics  # noqa: E402
from common.timeout_guard import (  # noqa: E402
    TimeoutGuard,
    load_checkpoint,
    save_atomic,
    whole_file,
    write_json_atomic,
)
from common.workers import be_a_worker  # noqa: E402
from scripts import luck  # noqa: E402

SCRIPTS = {"tqc": "tqc_film_batch", "dqn": "dqn_forex_subproc"}
NETWORKS = {"tqc_film_batch": "Agent", "dqn_forex_subproc": "QNetwork"}  # what agent.pt holds
# flags of the training script that the study sets
OWN = {
    "data",
    "split",
    "seed",
    "run_dir",
    "resume",
    "eval_only",
    "checkpoint",
    "timeout",
    "total_timesteps",
    "checkpoint_interval",
    "encoder",
}
PARTS = ("train", "eval", "test")
BARS_OF_NAME = 1000  # first bars by which a data set is known: rows added at its end change nothing
MEMORY = 3e9  # bytes of a run: 19 months of hourly bars, encoded
REPORT_SECONDS = 20.0  # for the page, at the end of --timeout
LEAST_SECONDS = 20.0  # of a run
PATIENCE = 60.0  # seconds that a run gets to save itself after Ctrl-C
DYING = 60.0  # seconds in which a process that was lost gives its run directory back
PASSIVE = "buy_and_hold", "best_constant"  # a rising market alone makes them look skilled
NAMED = 4  # runs that the progress line names; of more it gives the number
RIVALS = ("flat", "buy_and_hold", "best_constant", "random_same_turnover", "sparse_linear")


@dataclass
class Args:
    # study
    data: str = ""
    """files of bars, comma-separated, the first traded (tqc); a folder or files, one a pair (dqn);
    or a synthetic market (tqc)"""
    script: str = "tqc"
    """tqc (one market, exposures) or dqn (currency pairs)"""
    name: str = "wfo"
    """folder of this study under data/, logs/, weights/ and results/"""
    root: str = "."
    """where these four folders are"""
    segment: str = "all"
    """number of one segment, from 0 on, or all"""
    seeds: int = 1
    """seeds a segment, from 1 on"""
    timesteps: int | None = None
    """transitions of a run (default: the script's own rule)"""
    timeout: float | None = None
    """seconds for this command, shared out among the runs that are left (default: no limit)"""
    warm_start: bool = False
    """start from the agent, and its encoder, of the segment before and the same seed"""
    clean: bool = False
    """first delete the study's four folders, after asking; the ledger stays"""
    yes: bool = False
    """do not ask"""
    show: bool = False
    """run nothing: the page again, of what is finished"""

    # segments
    train_months: int = 13
    """months that everything is fitted on (the columns' warm-up is in them)"""
    eval_months: int = 1
    """months that choose the checkpoint and the seed"""
    test_months: int = 3
    """months that are reported"""
    step_months: int = 3
    """months from one segment to the next"""
    purge_hours: float = 720.0
    """hours before eval and before test without decisions: as far as the columns look back"""
    embargo_hours: float = 24.0
    """hours added to each of these two gaps"""

    # runtime
    engine: str = "local"
    """where runs run: local = processes here; ray = one task a run, on a cluster or here"""
    ray_address: str | None = None
    """HOST:PORT of a Ray cluster that is up, or auto (default: one is started here)"""
    ray_storage: str | None = None
    """for workers that do not see --root: folder that they all reach, s3://bucket/study or any
    other that fsspec knows; runs travel through it"""
    ray_gpus: float = 0.0
    """GPUs that a run asks Ray for; .25 = four runs share one"""
    jobs: int | None = None
    """runs at once (default: as many as cores and memory allow)"""
    checkpoint_interval: float = 60.0
    """seconds of work that kill -9 may cost a run"""

    def __post_init__(self):
        choices = {"script": tuple(SCRIPTS), "engine": tuple(ENGINES)}
        ranges = {
            (1, 1000): "seeds train_months eval_months test_months step_months jobs",
            (1, 10**12): "timesteps",
            (LEAST_SECONDS, 1e9): "timeout",
            (0, 1e6): "purge_hours embargo_hours checkpoint_interval",
            (0, 64): "ray_gpus",
        }
        check(self, choices, ranges)
        number = self.segment == "all" or self.segment.isdecimal()
        refuse(
            (not self.data, "--data: give files of bars, a folder, or synthetic:MARKET"),
            (not number, f"--segment {self.segment}: must be all or a number from 0 on"),
            ("/" in self.name or self.name in ("", ".", ".."), f"--name {self.name}: one folder"),
            (self.name in ("trials", "ledger.jsonl"), f"--name {self.name}: is the ledger's"),
            (
                self.warm_start and self.step_months < self.eval_months,
                f"--warm-start: --step-months {self.step_months} must be at least --eval-months "
                f"{self.eval_months}: an agent would start from one that its eval rows chose",
            ),
            (self.show and self.clean, "--show and --clean: give one of them"),
            (self.engine == "local" and self.for_ray, f"{self.for_ray}: needs --engine ray"),
        )

    @property
    def for_ray(self) -> str:
        """The flags of the other engine that are set."""
        names = ("ray_address", "ray_storage", "ray_gpus")
        return ", ".join(flag(name) for name in names if getattr(self, name))

    def folder(self, kind: str, segment: int | None = None) -> Path:
        """data, logs, weights or results of the study, or of one of its segments."""
        path = Path(self.root) / kind / self.name
        return path if segment is None else path / f"segment_{segment}"


@dataclass
class Segment:
    """Rows of `train` are before `eval_day`, those of eval and test follow a gap; times are UTC."""

    number: int
    start: pd.Timestamp
    eval_day: pd.Timestamp  # --split's first day of eval; the gap after it has no decisions
    eval_start: pd.Timestamp
    test_day: pd.Timestamp
    test_start: pd.Timestamp
    stop: pd.Timestamp


# ---------------------------------------------------------------------------------------- segments
def load_assets(args: Args, symbols) -> list[tuple[str, Bars]]:
    """(file name of its slices, bars) of every asset."""
    if args.data.startswith("synthetic:"):
        refuse((args.script == "dqn", f"--data {args.data}: dqn walks over files of pairs"))
        bars = load_bars(args.data)
        return [(bars.names[0].replace(":", "-"), bars)]
    if args.script == "dqn" and Path(args.data).is_dir():
        paths = [find_file(args.data, symbol) for symbol in symbols]
    else:
        paths = [Path(part.strip()) for part in args.data.split(",")]
    names = [path.stem for path in paths]
    taken = ", ".join(set(names) & set(PARTS))
    own = args.folder("data").resolve()
    inside = any(own in path.resolve().parents for path in paths)
    refuse(
        (len(set(names)) < len(names), f"--data {args.data}: two files of one name"),
        (taken, f"--data {args.data}: a part of each segment is called {taken}: rename the file"),
        (inside, f"--name {args.name}: {own} holds --data, and --clean deletes it: another --name"),
    )
    return [(path.stem, load_bars(str(path))) for path in paths]


def bar_length(bars: Bars) -> pd.Timedelta:
    return pd.Timedelta(np.median(np.diff(bars.timestamp)))


def layout(args: Args, first: pd.Timestamp, number: int) -> Segment:
    """Segment `number` of bars that begin at `first`; every border is a UTC day."""
    gap = pd.Timedelta(days=math.ceil((args.purge_hours + args.embargo_hours) / 24))
    months = pd.DateOffset
    day = first.ceil("D")
    test = day + months(months=args.train_months) + gap + months(months=args.eval_months) + gap
    while True:  # months have no fixed length: count back from the test months, which must tile
        start = before_test(args, test, gap)[0]
        if start >= day:
            break
        test += pd.Timedelta(days=1)
    begin = test + months(months=number * args.step_months)
    stop = test + months(months=number * args.step_months + args.test_months)
    return Segment(number, *before_test(args, begin, gap), begin, stop)


def before_test(args: Args, test: pd.Timestamp, gap: pd.Timedelta) -> tuple:
    """Start of train, its end, start of eval and its end, of the segment whose test starts then."""
    test_day = test - gap
    eval_start = test_day - pd.DateOffset(months=args.eval_months)
    eval_day = eval_start - gap
    start = eval_day - pd.DateOffset(months=args.train_months)
    return start, eval_day, eval_start, test_day


def all_segments(args: Args, assets: list) -> list[Segment]:
    """As many as the bars that all assets have allow. UsageError where --segment is none of them."""
    first = max(pd.Timestamp(bars.timestamp[0]) for _, bars in assets)
    length = max(bar_length(bars) for _, bars in assets)
    last = min(pd.Timestamp(bars.timestamp[-1]) for _, bars in assets) + length
    segments = []
    while layout(args, first, len(segments)).stop <= last:
        segments.append(layout(args, first, len(segments)))
    wanted = 0 if args.segment == "all" else int(args.segment)
    if wanted >= len(segments):
        need = layout(args, first, wanted)
        missing = math.ceil((need.stop - last) / length)
        raise UsageError(
            f"{args.data}: segment {wanted} needs bars from {need.start:%Y-%m-%d} to "
            f"{need.stop:%Y-%m-%d}, the file ends at {iso(last)}: {missing} bars are missing"
        )
    return segments


def between(bars: Bars, start: pd.Timestamp, stop: pd.Timestamp) -> slice:
    return slice(*np.searchsorted(bars.timestamp, [start.to_datetime64(), stop.to_datetime64()]))


def count(bars: Bars, start: pd.Timestamp, stop: pd.Timestamp) -> int:
    rows = between(bars, start, stop)
    return int(rows.stop - rows.start)


def gap_rows(segment: Segment, assets: list) -> int:
    """Bars in the longer one of the two gaps."""
    rows = []
    for _, bars in assets:
        rows.append(count(bars, segment.eval_day, segment.eval_start))
        rows.append(count(bars, segment.test_day, segment.test_start))
    return max(rows)


def parts_of(segment: Segment) -> dict:
    return {
        "train": (segment.start, segment.eval_day),
        "eval": (segment.eval_start, segment.test_day),
        "test": (segment.test_start, segment.stop),
    }


def print_segments(segments: list[Segment], assets: list):
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for head in ("segment", *PARTS):
        table.add_column(head, no_wrap=True)
    for segment in segments:
        cells = [str(segment.number)]
        for start, stop in parts_of(segment).values():
            last = stop - pd.Timedelta(days=1)
            bars = count(assets[0][1], start, stop)
            cells.append(f"{start:%Y-%m-%d} .. {last:%Y-%m-%d} ({bars} bars)")
        table.add_row(*cells)
    Console(width=max(shutil.get_terminal_size().columns, 130)).print(table)


def write_slices(args: Args, segment: Segment, assets: list, wanted: bool) -> tuple[str, str]:
    """The segment's bars, and nothing else, in files; --data of its runs, and a hash of the bars.

    train, eval and test.parquet are the same bars by part, for your own programs. A segment
    that is not wanted gets no files.
    """
    folder = args.folder("data", segment.number)
    if wanted:
        folder.mkdir(parents=True, exist_ok=True)
    digest, paths, tables = hashlib.sha256(), [], []
    for name, bars in assets:
        path = folder / f"{name}.parquet"
        rows = between(bars, segment.start, segment.stop)
        values = bars.ohlcv[0, rows]
        digest.update(bars.timestamp[rows].tobytes() + np.ascontiguousarray(values).tobytes())
        table = pd.DataFrame(values, columns=COLUMNS[1:])
        table.insert(0, "timestamp", utc_times(bars.timestamp[rows]))
        if path.exists():
            there = pd.read_parquet(path)
            other = not there.equals(table)
            refuse((other, f"{path} holds other bars than --data: --clean, or another --name"))
        elif wanted:
            write_parquet(table, path)
        paths.append(str(path))
        tables.append(table.assign(name=name))
    whole = pd.concat(tables)
    parts = parts_of(segment) if wanted else {}
    for part, (start, stop) in parts.items():
        times = whole["timestamp"].dt.tz_localize(None)
        write_parquet(whole[(times >= start) & (times < stop)], folder / f"{part}.parquet")
    in_folder = args.script == "dqn" and Path(args.data).is_dir()
    return str(folder) if in_folder else ",".join(paths), digest.hexdigest()


def write_parquet(table: pd.DataFrame, path: Path):
    """Whole or not at all."""
    with whole_file(path) as half:
        table.to_parquet(half, index=False)


# -------------------------------------------------------------------------------------------- runs
def split_argv(argv: list[str]) -> tuple[list[str], list[str]]:
    """Flags of the study, and those of the training script behind --: name, value."""
    if "--" not in argv:
        return argv, []
    at, extra = argv.index("--"), []
    for token in argv[at + 1 :]:
        name, equals, value = token.partition("=")
        if name.startswith("--"):  # --torch_threads=2 too is known by its name
            extra.append(name.replace("_", "-"))
            extra += [value] if equals else []
        else:
            extra.append(token)
    return argv[:at], extra


def script_args(args: Args, extra: list[str]):
    """The training script's flags. UsageError where one is unknown, or the study's to set."""
    module = importlib.import_module(f"cleanrl_crypto.{SCRIPTS[args.script]}")
    parsed, given = parse_args(module.Args, ["--data", args.data, *extra])
    own = given & OWN if "--data" in extra else given & OWN - {"data"}
    taken = ", ".join(flag(name) for name in sorted(own))
    refuse((taken, f"after --: {taken} is set by the study itself"))
    return parsed


def identity(args: Args, flags, assets: list) -> dict:
    """What the study is: a study of another identity has another --name."""
    shape = {k: v for k, v in asdict(flags).items() if k not in OWN | MAY_CHANGE}
    names = """script timesteps warm_start train_months eval_months test_months step_months
        purge_hours embargo_hours"""
    own = {name: getattr(args, name) for name in names.split()}
    return own | {"flags": shape, "data": data_name(assets)}


def data_name(assets: list) -> str:
    """Hash of each asset's first bars."""
    digest = hashlib.sha256()
    for _, bars in assets:
        rows = slice(BARS_OF_NAME)
        digest.update(bars.timestamp[rows].tobytes() + bars.ohlcv[:, rows].tobytes())
    return digest.hexdigest()


def trial_of(study: dict, seed: int) -> str:
    """Configuration and seed, in a hash; the data set is another key of the ledger."""
    return luck.fingerprint({k: v for k, v in study.items() if k != "data"} | {"seed": seed})


def make_tasks(args: Args, study: dict, segments: list, assets: list, extra: list) -> list[dict]:
    """Plain values, all that run_task() needs, by segment and seed. Writes the bars of --segment."""
    tasks = []
    for segment in segments:
        wanted = args.segment == "all" or segment.number == int(args.segment)
        data, bars = write_slices(args, segment, assets, wanted)
        for seed in range(1, args.seeds + 1):
            run_dir = args.folder("logs", segment.number) / f"seed_{seed}"
            split = f"{segment.eval_day:%Y-%m-%d}/{segment.test_day:%Y-%m-%d}"
            argv = ["--data", data, "--split", split, "--seed", str(seed)]
            argv += ["--run-dir", str(run_dir), "--resume", "auto"]
            argv += ["--checkpoint-interval", str(args.checkpoint_interval)]
            if args.timesteps:
                argv += ["--total-timesteps", str(args.timesteps)]
            before = args.folder("logs", segment.number - 1) / f"seed_{seed}"
            needs = []
            if args.warm_start and segment.number > 0:
                needs.append(str(before / "agent.pt"))
            if needs and args.script == "tqc":
                needs.append(str(before / "encoder.pt"))
                argv += ["--encoder", needs[1]]
            trial = trial_of(study, seed)
            task = {
                "script": SCRIPTS[args.script],
                "argv": argv + extra,
                "gap_rows": gap_rows(segment, assets),
                "segment": segment.number,
                "seed": seed,
                "trial": trial,
                "identity": luck.fingerprint([trial, segment.number, bars]),
                "needs": needs,
                "run_dir": str(run_dir),
                "log": str(run_dir.with_suffix(".log")),
                "result": str(args.folder("results", segment.number) / f"seed_{seed}.json"),
            }
            for path in (task["log"], task["result"]) if wanted else ():
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            tasks.append(task)
    return tasks


def can_start(task: dict) -> bool:
    """Whether what it starts from is there."""
    return all(Path(path).exists() for path in task["needs"])


def check_needs(tasks: list[dict]):
    """UsageError where a run needs what no other one makes."""
    makers = {task["run_dir"] for task in tasks}
    for task in tasks:
        lost = [path for path in task["needs"] if not Path(path).exists()]
        lost = [path for path in lost if str(Path(path).parent) not in makers]
        why = f"--warm-start: segment {task['segment']} needs {lost}: run the one before it first"
        refuse((lost, why))


def wide_gaps(split, rows: int):
    """split_rows() or split_series() with at least `rows` rows between two parts."""

    def wide(bars, text, purge, *more):
        found = split(bars, text, purge, *more)
        for ranges in found if isinstance(found, list) else [found]:
            for part in ("eval", "test"):
                start, stop = ranges[part]
                start += max(rows - purge, 0)
                refuse((start >= stop, f"split '{text}': a gap of {rows} rows leaves no {part}"))
                ranges[part] = start, stop
        return found

    return wide


def begin_with(agent: str, network):
    """The class `network`, but for the weights that it begins with: those of agent.pt."""
    weights = load_checkpoint(agent)["agent"]

    class Warm(network):
        def __init__(self, *args):
            super().__init__(*args)
            self.load_state_dict(weights)

    return Warm


def run_task(task: dict) -> dict:
    """One run: train, choose and test on one segment with one seed; what it came to, plain values.

    It needs the task's files and nothing of this process. A run that was killed goes on.
    """
    module = importlib.import_module(f"cleanrl_crypto.{task['script']}")
    wait_for_lock(task["run_dir"])
    name = "split_rows" if hasattr(module, "split_rows") else "split_series"
    wide = wide_gaps(getattr(module, name), task["gap_rows"])
    network = NETWORKS[task["script"]]
    first = getattr(module, network)
    if task["needs"]:
        first = begin_with(task["needs"][0], first)
    with patch.object(module, name, wide), patch.object(module, network, first):
        summary = module.main(task["argv"])
    if summary["status"] == "interrupted":
        stop = CheckFailed(f"segment {task['segment']} seed {task['seed']}: interrupted")
        stop.exit_code = summary["exit_code"]
        raise stop
    run_dir = Path(task["run_dir"])
    agent = load_checkpoint(run_dir / "checkpoints" / "best.pt")
    # what load_policy() needs; paths and hashes of the whole file's bars stay behind
    agent = {k: v for k, v in agent.items() if k not in ("args", "data")}
    save_atomic(agent, run_dir / "agent.pt")
    judged = summary["selected_by"]
    result = {
        "identity": task["identity"],
        "trial": task["trial"],
        "segment": task["segment"],
        "seed": task["seed"],
        "status": summary["status"],
        "updates": summary["updates"],
        "best_step": summary["best_step"],
        "eval_score": summary["eval"]["eval"]["agent"][judged],
        "agent_sha256": hash_of(agent),
        "verdict": summary["audit"]["verdict"],
        "partial": bool(summary["eval"]["test"].get("partial")),
        "test": who_of(summary["eval"]["test"]),
        "seconds": summary["wall_seconds"],
    }
    write_json_atomic(result, task["result"])
    return read_result(task)


def hash_of(agent: dict) -> str:
    """Of the values: the same ones may be pickled in more than one way."""
    return luck.fingerprint(tensors_hashed(agent))


def tensors_hashed(value):
    if isinstance(value, dict):
        return {str(k): tensors_hashed(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [tensors_hashed(v) for v in value]
    if hasattr(value, "numpy"):
        raw = value.contiguous().numpy().tobytes()
        return [str(value.dtype), list(value.shape), hashlib.sha256(raw).hexdigest()]
    return value


def who_of(result: dict) -> dict:
    """{who: metrics} of the agent and everybody beside it."""
    return {"agent": result["agent"]} | result["baselines"]


def read_result(task: dict) -> dict | None:
    """The result of a finished run; None of an unfinished one, or of other bars or flags."""
    path = Path(task["result"])
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    same = result["identity"] == task["identity"]
    return result | {"run_dir": task["run_dir"]} if same else None


def wait_for_lock(run_dir: Path | str):
    """Until nobody owns a run directory: who was killed may be dying. If somebody lives there, the
    run itself says so."""
    lock = Path(run_dir) / ".lock"
    if lock.exists():
        with contextlib.suppress(Timeout), FileLock(lock, timeout=DYING):
            pass


# ------------------------------------------------------------------------------------ local engine
def work(call, task: dict):
    """A process of its own for call(task); what it prints goes into a file."""
    be_a_worker()
    os.setsid()  # a terminal's Ctrl-C is for the study, which then asks every run once
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until the script saves itself at one
    with open(task["log"], "a", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        call(task)
    except Exception as e:
        if not hasattr(e, "exit_code"):
            traceback.print_exc()
        print(f"error: {e}", file=sys.stderr, flush=True)
        os._exit(getattr(e, "exit_code", 1))


def default_jobs(runs: int) -> int:
    import psutil

    memory = int(psutil.virtual_memory().available / MEMORY)
    return max(1, min(os.cpu_count() or 1, memory, runs))


def share_of_time(guard: TimeoutGuard, left: int, jobs: int) -> float:
    """Seconds for the next run, when `left` are left and `jobs` run at once."""
    rounds = math.ceil(left / jobs)
    return (guard.remaining() - REPORT_SECONDS) / rounds


def run_local(tasks: list[dict], args: Args, guard: TimeoutGuard):
    """Yields results as they come; every run is a process here."""
    context = get_context("spawn")
    jobs = args.jobs or default_jobs(len(tasks))
    threads = max(1, (os.cpu_count() or 1) // jobs)
    left, running, seconds = list(tasks), {}, []
    progress = Progress(len(tasks))
    try:
        while (left or running) and guard.signal is None:
            ready = [task for task in left if can_start(task)]
            while ready and len(running) < jobs:
                task = ready.pop(0)
                limit = share_of_time(guard, len(left), jobs)
                if limit < LEAST_SECONDS:
                    progress.close()
                    print(f"time is over: {len(left)} runs are left, the same command goes on")
                    left = []
                    break
                left.remove(task)
                running[start_run(task, limit, threads, context)] = task
            progress.show(len(tasks) - len(left) - len(running), running.values(), seconds, jobs)
            connection.wait([process.sentinel for process in running], timeout=1.0)
            for process in [p for p in running if p.exitcode is not None]:
                task = running.pop(process)
                result = read_result(task)
                if process.exitcode or result is None:
                    raise failed(task, process.exitcode)
                seconds.append(result["seconds"])
                yield result
        progress.show(len(tasks) - len(left), [], seconds, jobs)
    finally:
        progress.close()
        end_runs(running)


def start_run(task: dict, limit: float, threads: int, context):
    """The process of a run that has `limit` seconds."""
    argv = list(task["argv"])
    if "--torch-threads" not in argv:
        argv += ["--torch-threads", str(threads)]
    if limit < math.inf:
        argv += ["--timeout", f"{limit:.0f}"]
    process = context.Process(target=work, args=(run_task, task | {"argv": argv}))
    process.start()
    return process


def last_line(log: str) -> str:
    lines = Path(log).read_text().splitlines()
    return lines[-1].removeprefix("error: ") if lines else "it said nothing"


def failed(task: dict, code: int | None, why: str = "") -> Exception:
    """why: what went wrong, if not the last line of the log."""
    why = why or last_line(task["log"])
    error = UsageError if code == 2 else CheckFailed
    what = f"segment {task['segment']} seed {task['seed']}"
    return error(f"{what} (exit code {code}, {task['log']}): {why}")


def end_runs(running):
    """Ask them to save themselves; what does not end is killed."""
    for process in running:
        process.terminate()
    until = time.monotonic() + PATIENCE
    for process in running:
        process.join(max(until - time.monotonic(), 0.1))
        process.kill()


class Progress:
    """One line: runs done, running, time left."""

    def __init__(self, total: int):
        self.total = total
        self.last = ""
        self.live = sys.stdout.isatty()

    def show(self, done: int, running, seconds: list, jobs: int):
        names = ", ".join(f"segment {t['segment']} seed {t['seed']}" for t in running)
        if len(running) > NAMED:
            names = f"{len(running)} of them"
        text = f"{done} of {self.total} runs done; running: {names or 'none'}"
        if seconds and done < self.total:
            left = np.mean(seconds) * (self.total - done) / jobs
            text += f"; about {left / 60:.0f} min left"
        if text == self.last:
            return
        print(f"\r\033[K{text}" if self.live else text, end="" if self.live else "\n", flush=True)
        self.last = text

    def close(self):
        if self.live:
            print()


def run_ray(tasks: list[dict], args: Args, guard: TimeoutGuard):
    """Yields results as they come; every run is a task of Ray."""
    from scripts import ray_engine

    yield from ray_engine.run(tasks, args, guard)


# an engine yields the results of run_task(), whose argv it completes with threads and --timeout
ENGINES = {"local": run_local, "ray": run_ray}


# ------------------------------------------------------------------------------------------ ledger
def open_ledger(args: Args, study: dict, tasks: list[dict]) -> luck.Ledger:
    """The ledger, with a line for every seed of this study before anything runs."""
    ledger = luck.Ledger(Path(args.root) / "results" / "ledger.jsonl")
    known = {(r["data"], r["trial"]) for r in ledger.lines()}
    for task in tasks:
        new = (study["data"], task["trial"]) not in known
        there = read_result(task) is not None
        why = f"{ledger.path} does not know of {task['result']}: put the ledger back"
        refuse((new and there, why))
        if new and not args.show:
            known.add((study["data"], task["trial"]))
            record = {"event": "tried", "data": study["data"], "trial": task["trial"]}
            more = {"seed": task["seed"], "name": args.name, "study": study}
            ledger.add(record | {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())} | more)
    return ledger


def score_line(ledger: luck.Ledger, study: dict, result: dict):
    """The ledger's line of a finished run, once."""
    key = study["data"], result["trial"], result["segment"]
    scored = (r for r in ledger.lines() if r["event"] == "scored")
    if key in {(r["data"], r["trial"], r["segment"]) for r in scored}:
        return
    growth = growth_of(read_trace(result))["agent"]
    moments = {"bars": len(growth), "mean": growth.mean(), "square": np.square(growth).mean()}
    record = {"event": "scored", "data": study["data"], "trial": result["trial"]}
    ledger.add(record | {"segment": result["segment"], "seed": result["seed"]} | moments)


# ------------------------------------------------------------------------------------ out of sample
def read_trace(result: dict) -> pd.DataFrame:
    """The test rows of a run: positions and equities of everyone."""
    trace = pd.read_parquet(Path(result["run_dir"]) / "traces" / "test.parquet")
    return trace.set_index(pd.DatetimeIndex(trace["timestamp"]).tz_localize(None))


def column(trace: pd.DataFrame, what: str, who: str) -> np.ndarray:
    return trace[what if who == "agent" else f"{what}_{who}"].to_numpy()


def growth_of(trace: pd.DataFrame) -> pd.DataFrame:
    """Simple return of everyone's account in each bar, costs paid."""
    found = {}
    for who in ("agent", *RIVALS):
        equity = column(trace, "equity", who)
        found[who] = equity / np.append(1.0, equity[:-1]) - 1
    return pd.DataFrame(found, trace.index)


def score_synthetic(result: dict, trace: pd.DataFrame, bars: Bars):
    """Adds what the known conditional mean pays, and the agent's share of the optimum."""
    args = json.loads((Path(result["run_dir"]) / "args.json").read_text())
    cost = (args["fee_bps"] + args["slippage_bps"]) * BP
    start = int(np.searchsorted(bars.timestamp, trace.index[0].to_datetime64()))
    stop = start + len(trace)
    expected = bars.truth.expected[start:stop]
    paths = {who: column(trace, "position", who) for who in result["test"]}
    paths["optimum"] = markets.optimum_path(bars.truth, cost, start, stop)
    for who, path in paths.items():
        change = np.abs(np.diff(path, prepend=0.0))
        mean = float((path * expected - cost * change).mean() / BP)
        result["test"].setdefault(who, {})["mean_expected_bps"] = mean
    best = result["test"]["optimum"]["mean_expected_bps"]
    agent = result["test"]["agent"]
    agent["score"] = agent["mean_expected_bps"] / best if best >= NOTHING else None


def choose(results: list[dict]) -> dict[int, dict]:
    """Of every segment the seed that did best on its eval rows, the first of equal ones."""
    best = {}
    for result in sorted(results, key=eval_score, reverse=True):
        best.setdefault(result["segment"], result)
    return dict(sorted(best.items()))


def eval_score(result: dict) -> float:
    """What was not a number is the worst."""
    score = result["eval_score"]
    return -math.inf if score is None else score


def publish(args: Args, chosen: dict[int, dict]):
    """weights/NAME/segment_X: the agent that was chosen there, and its encoder."""
    for number, result in chosen.items():
        folder = args.folder("weights", number)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("agent.pt", "encoder.pt"):
            source = Path(result["run_dir"]) / name
            if source.exists():
                with whole_file(folder / name) as half:
                    shutil.copyfile(source, half)


def stitch(chosen: dict[int, dict], bars_per_year: float) -> tuple[pd.DataFrame, dict]:
    """Growth of everyone, segment after segment, and the metrics of that; each starts flat."""
    parts = [growth_of(read_trace(result)) for result in chosen.values()]
    growth = pd.concat(parts)
    again = growth.index.duplicated()  # a step shorter than the test months: the earlier one counts
    growth = growth[~again]
    lengths = [len(part) for part in parts]
    metrics = {}
    for who in growth:
        reward = np.log1p(growth[who].to_numpy())
        nothing = np.zeros(len(reward))
        found, _ = path_metrics(reward, nothing + np.nan, nothing, nothing, bars_per_year)
        rows = [result["test"][who] for result in chosen.values()]
        for name in ("turnover", "exposure"):
            found[name] = float(np.average([row[name] for row in rows], weights=lengths))
        found["trades"] = sum(row["trades"] for row in rows)
        metrics[who] = found
    return growth, metrics


def folds(chosen: dict[int, dict], results: list[dict]) -> dict:
    """Segment by segment: the worst, how far they spread, how often the agent beat each."""
    by = "mean_reward_bps"
    agent = {k: r["test"]["agent"][by] for k, r in chosen.items()}
    worst = min(agent, key=agent.get)
    beaten = {}
    for who in RIVALS:
        beaten[who] = float(np.mean([agent[k] > r["test"][who][by] for k, r in chosen.items()]))
    seeds = {}
    for result in results:
        seeds.setdefault(result["segment"], []).append(result["test"]["agent"][by])
    seeds = {k: x for k, x in seeds.items() if len(x) > 1}
    over_seeds = [np.std(x, ddof=1) for x in seeds.values()]
    over_segments = np.std(list(agent.values()), ddof=1) if len(agent) > 1 else None
    return {
        "segments": len(chosen),
        "worst_segment": worst,
        "worst_bps": agent[worst],
        "std_over_segments_bps": over_segments,
        "std_over_seeds_bps": np.mean(over_seeds) if over_seeds else None,
        "beats": beaten,
    }


def save_trial(args: Args, results: list[dict]):
    """results/trials: the returns of every seed, for CSCV with what else was or will be tried."""
    folder = Path(args.root) / "results" / "trials"
    folder.mkdir(parents=True, exist_ok=True)
    for trial in {result["trial"] for result in results}:
        own = sorted((r for r in results if r["trial"] == trial), key=lambda r: r["segment"])
        growth = pd.concat([growth_of(read_trace(result))["agent"] for result in own])
        growth = growth[~growth.index.duplicated()]
        table = pd.DataFrame({"timestamp": growth.index, "growth": growth.to_numpy()})
        write_parquet(table, folder / f"{trial[:16]}.parquet")


def trial_returns(args: Args, trials: luck.Trials, times: pd.DatetimeIndex) -> np.ndarray:
    """(T, N) of the trials on this data set that were tested at all of `times`."""
    folder = Path(args.root) / "results" / "trials"
    found = []
    for trial in trials.scores:
        path = folder / f"{trial[:16]}.parquet"
        if path.exists():
            table = pd.read_parquet(path).set_index("timestamp")["growth"].reindex(times)
            if table.notna().all():
                found.append(table.to_numpy())
    return np.array(found).T


def leads(growth: pd.DataFrame) -> dict:
    """The agent's lead over each rival, bp a bar, with the probability that it is above 0."""
    found = {}
    for who in RIVALS:
        lead = (growth["agent"] - growth[who]).to_numpy()
        g3, g4 = luck.shape(lead)
        ratio = luck.sharpe(lead)
        found[who] = {
            "lead_bps": float(lead.mean() / BP),
            "probability": luck.probabilistic_sharpe(ratio, len(lead), g3, g4),
        }
    return found


def sentence(found: dict, ahead: dict, bars_a_month: float) -> str:
    """Luck or not, in words."""
    if found["low"] == found["high"] == 0:
        return "The agent never traded in the test months: there is nothing to judge."
    have = found["bars"] / bars_a_month
    said = f"deflated Sharpe ratio {found['deflated']:.3f} after {found['trials']} trials"
    said += f" and {have:.1f} months out of sample"
    if found["deflated"] < luck.CONFIDENCE:
        if found["bars_more"] == math.inf:
            end = "at a Sharpe ratio of 0 or less no number of months would show skill"
        else:
            more = math.ceil(found["bars_more"] / bars_a_month)
            end = f"at the same Sharpe ratio it would take {more} more months"
        return f"Not distinguishable from luck ({said}): {end}."
    if not found["skill"]:
        end = "the bootstrap's interval, for which bars depend on each other, reaches below 0"
        return f"Not distinguishable from luck ({said}): {end}."
    text = f"Distinguishable from luck ({said})"
    level = luck.CONFIDENCE
    close = [w for w in PASSIVE if ahead[w]["probability"] < level]
    if close:
        return f"{text}, but not from {' and '.join(w.replace('_', ' ') for w in close)}."
    return f"{text}."


# --------------------------------------------------------------------------------------------- page
def conclude(args: Args, study: dict, segments: list, assets: list, results: list, ledger) -> dict:
    """results/NAME: report.html, report.csv and summary.json of the finished segments."""
    complete = []
    for segment in segments:
        own = [r for r in results if r["segment"] == segment.number]
        complete += own if len(own) == args.seeds else []
    if not complete:
        print("no segment is finished: no page")
        return {}
    bars = assets[0][1]
    for result in complete if bars.truth else []:
        score_synthetic(result, read_trace(result), bars)
    save_trial(args, complete)
    chosen = choose(complete)
    publish(args, chosen)
    growth, metrics = stitch(chosen, bars.bars_per_year)
    trials = luck.Trials(ledger.lines(), study["data"])
    found = luck.judge(growth["agent"].to_numpy(), len(trials), trials.sharpes())
    tried = trial_returns(args, trials, growth.index)
    enough = tried.ndim == 2 and tried.shape[1] > 1 and len(tried) >= 4 * luck.BLOCKS
    found["overfitting"] = luck.overfitting(tried) if enough else None
    ahead = leads(growth)
    bars_a_month = bars.bars_per_year / 12
    summary = {
        "study": study,
        "sentence": sentence(found, ahead, bars_a_month),
        "luck": found,
        "months": found["bars"] / bars_a_month,
        "months_more": found["bars_more"] / bars_a_month,
        "folds": folds(chosen, complete),
        "leads": ahead,
        "all": metrics,
        "segments": {k: r["test"] for k, r in chosen.items()},
        "seeds": {k: r["seed"] for k, r in chosen.items()},
        "partial": [k for k, r in chosen.items() if r["partial"]],
        "bars_per_year": bars.bars_per_year,
        "finished": len(chosen),
        "wanted": len(segments),
    }
    folder = args.folder("results")
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(summary, complete, segments, folder / "report.csv")
    write_json_atomic(summary, folder / "summary.json")
    from scripts import report_wfo

    page = report_wfo.build(args.name, summary, growth, complete, segments)
    with whole_file(folder / "report.html") as half:
        half.write_text(page, encoding="utf-8")
    print(summary["sentence"])
    print(f"{folder}: report.html, report.csv, summary.json")
    return summary


def write_csv(summary: dict, results: list[dict], segments: list[Segment], path: Path):
    """A line a segment, seed and rival; the chosen seed has chosen 1, the whole is segment all."""
    starts = {s.number: s for s in segments}
    lines = []
    for result in results:
        segment = starts[result["segment"]]
        is_chosen = summary["seeds"][result["segment"]] == result["seed"]
        for who, metrics in result["test"].items():
            lines.append(
                {
                    "segment": segment.number,
                    "test_start": f"{segment.test_start:%Y-%m-%d}",
                    "test_stop": f"{segment.stop:%Y-%m-%d}",
                    "seed": result["seed"],
                    "chosen": int(is_chosen),
                    "who": who,
                }
                | metrics
            )
    for who, metrics in summary["all"].items():
        lines.append({"segment": "all", "chosen": 1, "who": who} | metrics)
    with whole_file(path) as half:
        pd.DataFrame(lines).to_csv(half, index=False)


# --------------------------------------------------------------------------------------------- main
def clean(args: Args):
    # results first: if this is killed, no run counts as finished whose files are gone
    folders = [args.folder(kind) for kind in ("results", "logs", "weights", "data")]
    folders = [folder for folder in folders if folder.exists()]
    if not folders:
        return
    if args.folder("results").exists():
        lock_of(args).release()  # nobody walks there
    listed = ", ".join(map(str, folders))
    if not args.yes:
        refuse((not sys.stdin.isatty(), f"--clean deletes {listed}: give --yes too"))
        answer = input(f"delete {listed}? [y/N] ")
        refuse((answer.strip().lower() not in ("y", "yes"), "--clean: nothing was deleted"))
    for folder in folders:
        shutil.rmtree(folder)
    print(f"deleted {listed}")


def lock_of(args: Args) -> FileLock:
    """The lock of the study's folder, taken. UsageError where another process has it."""
    folder = args.folder("results")
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        way_out = "wait for it, or give another --name"
        raise UsageError(f"{folder}: another process walks there: {way_out}") from None
    return lock


def claim(args: Args, study: dict):
    """The study's folder: one process at a time, one identity."""
    folder = args.folder("results")
    path = folder / "study.json"
    lost = args.show and not path.exists()
    refuse((lost, f"--show: {folder} holds no study: look at --root and --name"))
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_of(args)
    if path.exists():
        there = flat(json.loads(path.read_text()))
        here = flat(json.loads(json.dumps(study)))
        other = [k for k in here if here[k] != there.get(k)]
        why = differences(there, here, other)
        refuse((other, f"{folder} is a study of other settings: {why}: --clean, or another --name"))
    else:
        write_json_atomic(study, path)
    return lock


def flat(study: dict) -> dict:
    return {k: v for k, v in study.items() if k != "flags"} | study["flags"]


def main(argv: list[str] | None = None) -> dict:
    """Walk, or go on, and write the page; returns what results/NAME/summary.json holds."""
    given = sys.argv[1:] if argv is None else [str(a) for a in argv]
    own, extra = split_argv(given)
    args, _ = parse_args(Args, own)
    flags = script_args(args, extra)
    assets = load_assets(args, getattr(flags, "symbols", ()))
    segments = all_segments(args, assets)
    chosen = segments if args.segment == "all" else [segments[int(args.segment)]]
    print_segments(chosen, assets)
    if args.clean:
        clean(args)
    study = identity(args, flags, assets)
    with TimeoutGuard(args.timeout) as guard, claim(args, study):
        tasks = make_tasks(args, study, segments, assets, extra)
        ledger = open_ledger(args, study, tasks)
        results = [r for r in map(read_result, tasks) if r]
        # only the runs are chosen: a page of the best segment would be luck
        wanted = {segment.number for segment in chosen}
        finished = {r["identity"] for r in results}
        left = [t for t in tasks if t["segment"] in wanted and t["identity"] not in finished]
        left = [] if args.show else left
        check_needs(left)
        for result in results:
            score_line(ledger, study, result)
        if results:
            print(f"{len(results)} of {len(tasks)} runs were finished before")
        if left:
            with contextlib.closing(ENGINES[args.engine](left, args, guard)) as engine:
                for result in engine:
                    score_line(ledger, study, result)
                    results.append(result)
        if guard.signal is not None:
            print("interrupted: the same command goes on")
            return {"exit_code": guard.exit_code}
        summary = conclude(args, study, segments, assets, results, ledger)
    return summary | {"exit_code": 0}


if __name__ == "__main__":
    exit_with(main)
