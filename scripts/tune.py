"""Search flags of a training script with Optuna: every trial is a run of its main(), judged on the
eval split; the test split stays unseen.

    python scripts/tune.py --script tqc --search learning-rate=1e-3..1e-2:log hidden=128,256 \
        gamma=.9...99 -- --data data/BTCUSDT_1h.parquet --split 2023-01-01/2023-04-01
    python scripts/tune.py --script freeway --search ent-coef=0...01 num-steps=8..64:log --trials 40

What is searched: NAME=LOW..HIGH (whole numbers where both are), :log behind it for a logarithmic
scale, or NAME=A,B,C. What stands after -- goes to every trial. The same command goes on after
whatever ended it, kill -9 too: a trial that was on goes on from its checkpoint. Results: a table at
the end, logs/NAME/trial_X (run directories), and a line of results/ledger.jsonl for every trial.

Many machines, with --root on a shared disk: one lends the study, all others take part.

    python scripts/tune.py --serve 13000 --name big
    python scripts/tune.py --storage grpc://HOST:13000 --name big --search ... -- ...
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import sys
import time
import warnings
from dataclasses import asdict, dataclass, fields
from functools import partial
from multiprocessing import connection, get_context
from pathlib import Path
from typing import NamedTuple
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
    need,
    parse_args,
    refuse,
)

answer_help(__name__, __file__)

from filelock import FileLock, Timeout  # noqa: E402

from common.timeout_guard import TimeoutGuard, named, plain, write_json_atomic  # noqa: E402
from scripts import luck  # noqa: E402
from scripts import run_full_wfo as wfo  # noqa: E402

SCRIPTS = wfo.SCRIPTS | {"freeway": "ppo_arz_gpu", "signals": "ppo_arz_signals"}
# keys of metrics.jsonl that a trial is judged by: the first that holds a number
JUDGES = {
    "tqc": ("eval/eval/mean_expected_bps", "eval/eval/mean_reward_bps"),
    "dqn": (
        "eval/eval/expected_growth_bps",
        "eval/eval/mean_reward_bps",
        "eval/eval/episode_return",
    ),
    "freeway": ("eval/validation/episode_return",),
    "signals": ("eval/validation/episode_return",),
}
# flags of the training script that the study sets
OWN = {"run_dir", "resume", "eval_only", "checkpoint", "report"}
SAME = MAY_CHANGE - {"total_timesteps", "timeout"}  # change no trial's value
STARTUP = 5  # trials that nobody is cut off in: the median of fewer says little
SHOWN = 10  # trials in the table
WARMING = 10  # trials that are drawn at random
FAILURES = 3  # trials without a value that end a study that has none
CONNECT = 20.0  # seconds for another machine to answer
ENDING = 5.0  # seconds of --timeout for the table


@dataclass
class Args:
    # study
    script: str = "tqc"
    """tqc, dqn, freeway or signals"""
    search: tuple[str, ...] = ()
    """what is searched: NAME=LOW..HIGH, NAME=LOW..HIGH:log or NAME=A,B,C"""
    trials: int = 20
    """trials of the study: this command's, earlier ones and other processes'"""
    name: str = "tune"
    """folder of this study under logs/ and results/"""
    root: str = "."
    """where these folders are"""
    prune: bool = True
    """end trials that are worse than the median of those before at the same transition"""
    show: bool = False
    """run nothing: the table again"""

    # runtime
    timeout: float | None = None
    """seconds for this command; trials that are on then go on next time, from their checkpoints"""
    jobs: int | None = None
    """trials at once (default: as many as cores and memory allow)"""
    storage: str | None = None
    """grpc://HOST:PORT of a study that another machine serves (default: a journal in
    results/NAME)"""
    serve: int | None = None
    """lend the study of --name to other machines at this port, from a database in results/NAME"""

    def __post_init__(self):
        ranges = {
            (1, 10**6): "trials",
            (1, 1000): "jobs",
            (wfo.LEAST_SECONDS, 1e9): "timeout",
            (1, 65535): "serve",
        }
        check(self, {"script": tuple(SCRIPTS)}, ranges)
        strange = self.storage is not None and not address_of(self.storage)
        refuse(
            (strange, f"--storage {self.storage}: must be grpc://HOST:PORT"),
            ("/" in self.name or self.name in ("", ".", ".."), f"--name {self.name}: one folder"),
            (self.serve and self.storage, "--serve and --storage: give one of them"),
            (not self.search and not self.serve, "--search: what? for example gamma=.9...99"),
        )

    def folder(self, kind: str) -> Path:
        return Path(self.root) / kind / self.name


def address_of(storage: str) -> tuple[str, int] | None:
    head, _, rest = storage.partition("grpc://")
    host, _, port = rest.rpartition(":")
    return (host, int(port)) if not head and host and port.isdecimal() else None


# ------------------------------------------------------------------------------------- search space
class Range(NamedTuple):
    name: str
    low: float
    high: float
    log: bool
    whole: bool

    def suggest(self, trial):
        if self.whole:
            return trial.suggest_int(self.name, self.low, self.high, log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)

    @property
    def ends(self) -> tuple:
        return self.low, self.high


class Choice(NamedTuple):
    name: str
    values: tuple[str, ...]

    def suggest(self, trial):
        return trial.suggest_categorical(self.name, self.values)

    @property
    def ends(self) -> tuple:
        return self.values


def parse_search(text: str) -> Range | Choice:
    """NAME=LOW..HIGH[:log] or NAME=A,B,C. UsageError."""
    name, equals, rest = text.partition("=")
    name = name.replace("-", "_")
    way_out = "give NAME=LOW..HIGH, NAME=LOW..HIGH:log or NAME=A,B,C"
    refuse((not equals or not rest, f"--search {text}: {way_out}"))
    if ".." not in rest:
        values = tuple(rest.split(","))
        refuse((len(set(values)) < 2, f"--search {text}: one value is no search"))
        return Choice(name, values)
    borders, _, scale = rest.partition(":")
    low, _, high = borders.partition("..")
    try:
        ends = [number(low), number(high)]
    except ValueError:
        raise UsageError(f"--search {text}: {way_out}") from None
    log = scale == "log"
    refuse(
        (scale not in ("", "log"), f"--search {text}: the scale is :log or nothing"),
        (not ends[0] < ends[1], f"--search {text}: {low} must be below {high}"),
        (log and ends[0] <= 0, f"--search {text}: a logarithmic scale begins above 0"),
    )
    whole = all(isinstance(x, int) for x in ends)
    return Range(name, *ends, log, whole)


def number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def argv_of(values: dict, module) -> list[str]:
    """{field: value} -> flags of the script."""
    booleans = {f.name for f in fields(module.Args) if f.type in (bool, "bool")}
    argv = []
    for name, value in values.items():
        if name in booleans:
            off = str(value).lower() in ("false", "no", "0")
            argv.append(flag(f"no_{name}" if off else name))
        else:
            argv += [flag(name), str(value)]
    return argv


def check_space(space: list, extra: list[str], module):
    """The script's flags as they stand after --; both ends of every range must be allowed."""
    flags, given = parse_args(module.Args, extra)
    names = [part.name for part in space]
    own = given & OWN
    twice = {name for name in names if names.count(name) > 1} | given & set(names)
    refuse(
        (own, f"after --: {', '.join(map(flag, sorted(own)))} is set by the study itself"),
        (twice, f"--search: {', '.join(map(flag, sorted(twice)))} is given twice"),
        (OWN & set(names), "--search: a run's folder is nothing to search"),
    )
    for part in space:
        for value in part.ends:
            parse_args(module.Args, [*extra, *argv_of({part.name: value}, module)])
    return flags


# ------------------------------------------------------------------------------------------- trials
def eval_for_test(split):
    """split_rows() or split_series() whose test rows are the eval rows: nobody looks at others."""

    def changed(*args, **kwargs):
        found = split(*args, **kwargs)
        for ranges in found if isinstance(found, list) else [found]:
            ranges["test"] = ranges["eval"]
        return found

    return changed


def first_cases(make):
    """make_envs() of a road whose evaluations hold the cases that choose, and no held-out ones."""

    def changed(*args, **kwargs):
        envs = make(*args, **kwargs)
        envs.splits = dict(list(envs.splits.items())[:1])
        return envs

    return changed


def without_test(module):
    """Context in which the script's main() never looks at what it would be tested on."""
    for name in ("split_rows", "split_series"):
        if hasattr(module, name):
            return patch.object(module, name, eval_for_test(getattr(module, name)))
    return patch.object(module, "make_envs", first_cases(module.make_envs))


def run_trial(task: dict):
    """One run, and its value on the eval split in task["result"]."""
    module = importlib.import_module(f"cleanrl_crypto.{task['script']}")
    with without_test(module):
        summary = module.main(task["argv"])
    if summary["status"] == "interrupted":
        stop = CheckFailed("interrupted")
        stop.exit_code = summary["exit_code"]
        raise stop
    write_json_atomic(result_of(summary), task["result"])


def result_of(summary: dict) -> dict:
    """What best.pt was chosen by, of best.pt, on the split that chose it."""
    split, metric = "eval", summary["selected_by"]
    if metric in summary["eval"]:  # traffic names the split
        split, metric = metric, "episode_return"
    value = summary["eval"][split]["agent"][metric]
    return {"metric": f"{metric} on {split}", "value": value}


class Job:
    """A trial that is on: its process, and the transitions of what was reported."""

    def __init__(self, trial, task: dict, lock: FileLock, process):
        self.trial, self.task, self.lock, self.process = trial, task, lock, process
        self.reported, self.pruned = set(), False

    def follow(self, judges: tuple, prune: bool) -> bool:
        """Report what the run logged since; whether it should end."""
        path = Path(self.task["run_dir"]) / "metrics.jsonl"
        if not path.exists():
            return False
        # from its start each time: a run that goes on cuts it back to its checkpoint
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        for line in whole.splitlines():
            record = json.loads(line)
            step, value = record["global_step"], judged(record, judges)
            if value is None or step == 0 or step in self.reported:
                continue
            self.reported.add(step)
            self.trial.report(value, step)
        return bool(prune and self.reported and self.trial.should_prune())


def judged(record: dict, judges: tuple) -> float | None:
    values = (record.get(name) for name in judges)
    return next((value for value in values if value is not None), None)


# -------------------------------------------------------------------------------------------- study
def data_of(args: Args, flags) -> str:
    """Name of what a trial is tried on, as run_full_wfo.py gives it to the ledger."""
    if args.script not in wfo.SCRIPTS:
        return luck.fingerprint([args.script, getattr(flags, "scenario", None)])
    if getattr(flags, "env_fn", None):
        return luck.fingerprint(flags.env_fn)
    study = wfo.Args(data=flags.data, script="tqc")
    if not flags.data.startswith("synthetic:"):
        study.script = args.script
    return wfo.data_name(wfo.load_assets(study, getattr(flags, "symbols", ())))


def shaping(flags) -> dict:
    """The flags that a trial's value depends on."""
    return {k: v for k, v in plain(asdict(flags)).items() if k not in SAME}


def open_storage(args: Args):
    """Optuna's: a journal here, another machine's study, or the database that is served."""
    import optuna

    if args.storage:
        host, port = address_of(args.storage)
        return optuna.storages.GrpcStorageProxy(host=host, port=port)
    folder = args.folder("results")
    lost = args.show and not (folder / "journal.log").exists()
    refuse((lost, f"--show: {folder} holds no study: look at --root and --name"))
    folder.mkdir(parents=True, exist_ok=True)
    if args.serve:  # Optuna's proxy serves no journals
        return optuna.storages.RDBStorage(f"sqlite:///{folder / 'study.db'}")
    path = str(folder / "journal.log")
    backend = optuna.storages.journal.JournalFileBackend(path)
    backend.append_logs = partial(append, path, backend.append_logs)
    return optuna.storages.JournalStorage(backend)


def append(path: str, write, logs: list):
    """write(logs), whose OSError names no file."""
    with named(path):
        write(logs)


def open_study(args: Args, identity: dict):
    """The study of --name. UsageError where it is one of other flags or data."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = open_storage(args)
    if args.storage:
        try:
            storage.wait_server_ready(timeout=CONNECT)
        except Exception as e:  # whatever gRPC raises
            raise UsageError(f"--storage {args.storage}: nobody answers") from e
    study = optuna.create_study(
        storage=storage,
        study_name=args.name,
        direction="maximize",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(n_startup_trials=WARMING, multivariate=True),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP),
    )
    here, there = flat(identity), study.user_attrs.get("identity")
    if there is None:
        study.set_user_attr("identity", here)
        return study
    other = [k for k in here if here[k] != there.get(k)]
    why = differences(there, here, other)
    refuse((other, f"--name {args.name} is a study of other settings: {why}: another --name"))
    return study


def flat(identity: dict) -> dict:
    """As it comes back from JSON."""
    found = {k: v for k, v in identity.items() if k != "flags"} | identity["flags"]
    return json.loads(json.dumps(found))


class Tuner:
    """The study, and the trials that are on in this process."""

    def __init__(self, args: Args, extra: list[str], space: list, module, study, data: str):
        self.args, self.extra, self.space, self.module = args, extra, space, module
        self.study, self.data = study, data
        self.ledger = luck.Ledger(Path(args.root) / "results" / "ledger.jsonl")
        self.asking = FileLock(args.folder("results") / ".asking")
        self.on, self.failures = [], []
        for kind in ("results", "logs"):
            args.folder(kind).mkdir(parents=True, exist_ok=True)

    def numbers(self, *states: str) -> list:
        """Trials in these states of Optuna."""
        return [t for t in self.study.get_trials(deepcopy=False) if t.state.name in states]

    def lock_of(self, folder: str) -> FileLock:
        """Held by the process whose trial it is, and free when that is gone."""
        return FileLock(self.args.folder("logs") / f"{folder}.lock")

    def adopt(self):
        """Trials of processes that are gone: others go on in their folders."""
        import optuna

        for trial in self.numbers("RUNNING"):
            folder = trial.user_attrs.get("folder", f"trial_{trial.number}")
            lock = self.lock_of(folder)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            if len(trial.params) == len(self.space):
                self.study.enqueue_trial(trial.params, {"folder": folder})
            lock.release()

    def more(self) -> bool:
        taken = self.numbers("COMPLETE", "PRUNED", "RUNNING")
        return bool(self.numbers("WAITING")) or len(taken) < self.args.trials

    def run(self, guard: TimeoutGuard):
        """Trials until there are enough, or no more time."""
        jobs = self.args.jobs or wfo.default_jobs(self.args.trials)
        with self.asking:
            self.adopt()
        try:
            while guard.signal is None and guard.remaining() > ENDING:
                while len(self.on) < jobs and self.more():
                    self.start(jobs)
                if not self.on:
                    break
                connection.wait([job.process.sentinel for job in self.on], timeout=1.0)
                for job in list(self.on):
                    self.look(job)
        finally:
            for job in self.on:  # what it has done since its checkpoint is lost
                job.process.kill()
                job.process.join()
                job.lock.release()

    def start(self, jobs: int):
        """One more trial in a process of its own."""
        with self.asking:
            trial = self.study.ask()
            folder = trial.user_attrs.get("folder", f"trial_{trial.number}")
            trial.set_user_attr("folder", folder)
            lock = self.lock_of(folder)
            lock.acquire(timeout=0)
        values = {part.name: part.suggest(trial) for part in self.space}
        run_dir = self.args.folder("logs") / folder
        argv = [*self.extra, *argv_of(values, self.module)]
        try:
            flags, _ = parse_args(self.module.Args, argv)
        except UsageError as e:  # two values that do not go together
            self.fail(trial, str(e))
            lock.release()
            return
        self.write_down(flags)
        argv += ["--run-dir", str(run_dir), "--resume", "auto", "--no-report"]
        if "--torch-threads" not in argv:
            argv += ["--torch-threads", str(max(1, (os.cpu_count() or 1) // jobs))]
        task = {
            "script": SCRIPTS[self.args.script],
            "argv": argv,
            "run_dir": str(run_dir),
            "log": str(run_dir.with_suffix(".log")),
            "result": str(self.args.folder("results") / f"{folder}.json"),
        }
        # of a study whose journal was deleted: another configuration's
        Path(task["result"]).unlink(missing_ok=True)
        wfo.wait_for_lock(run_dir)
        process = get_context("spawn").Process(target=wfo.work, args=(run_trial, task))
        process.start()
        self.on.append(Job(trial, task, lock, process))

    def write_down(self, flags):
        """The ledger's line of a configuration, before it runs, once."""
        config = {"script": self.args.script, "flags": shaping(flags)}
        record = {"event": "tried", "data": self.data, "trial": luck.fingerprint(config)}
        known = {(r["data"], r.get("trial")) for r in self.ledger.lines()}
        if (self.data, record["trial"]) not in known:
            at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            more = {"seed": flags.seed, "name": self.args.name, "study": config, "at": at}
            self.ledger.add(record | more)

    def look(self, job: Job):
        """Report what it logged; end it, or take in what it came to."""
        over = job.process.exitcode is not None  # asked first: nothing is logged after that
        bad = job.follow(JUDGES[self.args.script], self.args.prune)
        if bad and not over:
            job.pruned = True
            job.process.kill()  # it needs no evaluation
            job.process.join()
        if bad or over:
            self.on.remove(job)
            self.finish(job)
            job.lock.release()

    def finish(self, job: Job):
        import optuna

        result = Path(job.task["result"])
        if result.exists():
            self.take_in(job.trial, **json.loads(result.read_text()))
        elif job.pruned:
            self.study.tell(job.trial, state=optuna.trial.TrialState.PRUNED)
            step = max(job.reported)
            print(f"trial {job.trial.number}: ended at {step} transitions", flush=True)
        else:
            self.fail(job.trial, wfo.last_line(job.task["log"]))

    def take_in(self, trial, metric: str, value: float | None):
        if value is None:
            self.fail(trial, f"{metric} is not a number")
            return
        trial.set_user_attr("metric", metric)
        self.study.tell(trial, value)
        print(f"trial {trial.number}: {value:.4f}", flush=True)

    def fail(self, trial, why: str):
        """A trial without a value; the study goes on unless every one is like that."""
        import optuna

        trial.set_user_attr("why", why)
        self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        self.failures.append(why)
        print(f"trial {trial.number} failed: {why}", flush=True)
        hopeless = len(self.failures) >= FAILURES and not self.numbers("COMPLETE")
        if hopeless:
            raise CheckFailed(f"the first {FAILURES} trials failed: {why}")


# -------------------------------------------------------------------------------------------- table
def print_table(args: Args, extra: list[str], study, module):
    """The best trials, and the command of the first."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    trials = [t for t in study.get_trials(deepcopy=False) if t.value is not None]
    complete = [t for t in trials if t.state.name == "COMPLETE"]
    refuse((not complete, f"{args.folder('results')}: no trial has a value yet"))
    best = sorted(complete, key=lambda t: -t.value)
    names = sorted(best[0].params)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("trial", "value", *map(flag, names)):
        table.add_column(name, justify="right", no_wrap=True)
    for trial in best[:SHOWN]:
        values = [short(trial.params[name]) for name in names]
        table.add_row(str(trial.number), f"{trial.value:.4f}", *values)
    Console(width=max(100, 14 * len(names) + 20)).print(table)
    pruned = len(trials) - len(complete)
    print(f"{len(complete)} trials, {pruned} ended early; value: {best[0].user_attrs['metric']}")
    argv = [*extra, *argv_of(best[0].params, module)]
    print(f"python cleanrl_crypto/{SCRIPTS[args.script]}.py {shlex.join(argv)}")
    return best[0]


def short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --------------------------------------------------------------------------------------------- main
def serve(args: Args) -> dict:
    """Lend the study of --name until Ctrl-C."""
    need("grpc", why="--serve needs gRPC")
    import optuna

    storage = open_storage(args)
    print(f"study {args.name}: --storage grpc://HOST:{args.serve} on other machines", flush=True)
    try:
        optuna.storages.run_grpc_proxy_server(storage, host="0.0.0.0", port=args.serve)
    except KeyboardInterrupt:
        return {"exit_code": 130}
    return {"exit_code": 0}


def main(argv: list[str] | None = None) -> dict:
    """Search, or go on, and print the table; returns the best trial's value and flags."""
    given = sys.argv[1:] if argv is None else [str(a) for a in argv]
    own, extra = wfo.split_argv(given)
    args, _ = parse_args(Args, own)
    need("optuna", why="scripts/tune.py needs Optuna")
    warnings.filterwarnings("ignore", module="optuna")  # of what it calls experimental
    if args.serve:
        return serve(args)
    module = importlib.import_module(f"cleanrl_crypto.{SCRIPTS[args.script]}")
    space = [parse_search(text) for text in args.search]
    flags = check_space(space, extra, module)
    data = data_of(args, flags)
    searched = sorted(args.search)
    identity = {"script": args.script, "search": searched, "data": data, "flags": shaping(flags)}
    study = open_study(args, identity)
    with TimeoutGuard(args.timeout) as guard:
        tuner = Tuner(args, extra, space, module, study, data)
        if not args.show:
            tuner.run(guard)
        if guard.signal is not None:
            print("interrupted: the same command goes on")
            return {"exit_code": guard.exit_code}
        best = print_table(args, extra, study, module)
    return {"value": best.value, "flags": best.params, "exit_code": 0}


if __name__ == "__main__":
    exit_with(main)
