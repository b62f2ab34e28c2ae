"""The Ray engine of scripts/run_full_wfo.py: one task a segment and seed.

A worker sees --root under the same path (one machine, a shared disk), or works in a folder of its
own: then bars reach it through Ray's object store, and its run directory is copied to --ray-storage
at every checkpoint. A worker that is lost costs what came after the last checkpoint: Ray starts the
task again, and the run goes on from there. docs/cluster.md
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.run import CheckFailed, UsageError, need, refuse  # noqa: E402
from common.timeout_guard import TimeoutGuard, write_json_atomic  # noqa: E402
from scripts import run_full_wfo as wfo  # noqa: E402

need("ray", "fsspec", why="--engine ray needs requirements-cluster.txt")

import fsspec  # noqa: E402
import ray  # noqa: E402

RETRIES = 10  # workers that one run may lose
OBJECT_STORE = 200_000_000  # bytes, of a cluster started here: bars of a segment are a megabyte
# stay on the worker: they are its own, or the next checkpoint replaces them
OWN = (".lock", ".pid", "step_*.pt", "*.tmp")


class Lost(RuntimeError):
    """Somebody wants the machine back: Ray starts the task elsewhere."""


# ----------------------------------------------------------------------------------------- storage
class Mirror(threading.Thread):
    """A run directory and its log, copied to a folder that outlives the worker."""

    def __init__(self, run_dir: Path, log: Path, url: str, seconds: float):
        super().__init__(daemon=True)
        self.run_dir, self.log, self.seconds = run_dir, log, seconds
        self.fs, self.url = fsspec.core.url_to_fs(url)
        self.last = run_dir / "checkpoints" / "last.pt"
        self.copied = {}  # path: when it was written, as of the last copy
        self.over = threading.Event()

    def run(self):
        while not self.over.wait(self.seconds):
            try:
                if self.last.exists() and self.changed(self.last):
                    self.push()
            except Exception as e:  # whatever a storage raises: the next copy may work
                print(f"{self.url}: not copied ({type(e).__name__}: {e}): the run goes on")

    def push(self):
        """metrics.jsonl may be longer than last.pt knows, never shorter: last.pt is read first."""
        checkpoint, now = None, {}
        if self.last.exists():
            now[self.last] = self.last.stat().st_mtime_ns
            checkpoint = self.last.read_bytes()
        for path in sorted(self.run_dir.rglob("*")):
            stays = path == self.last or any(map(path.match, OWN))
            if path.is_file() and not stays and self.changed(path):
                now[path] = path.stat().st_mtime_ns
                name = path.relative_to(self.run_dir)
                self.put(name.as_posix(), path.read_bytes())
        if self.log.exists():  # not of a run for which no time was left
            self.put("log", self.log.read_bytes())
        if checkpoint is not None:
            self.put("checkpoints/last.pt", checkpoint)
        self.copied |= now

    def changed(self, path: Path) -> bool:
        return path.stat().st_mtime_ns != self.copied.get(path)

    def put(self, name: str, content: bytes):
        """Whole or not at all."""
        path = f"{self.url}/{name}"
        folder, _, _ = path.rpartition("/")
        self.fs.makedirs(folder, exist_ok=True)
        self.fs.pipe_file(f"{path}.part", content)
        self.fs.mv(f"{path}.part", path)

    def pull(self, leave: str = ""):
        """What was copied, into the run directory; not the file `leave`."""
        if not self.fs.exists(self.url):
            return
        for path in self.fs.find(self.url):
            name = path[len(self.url) + 1 :]
            if name == leave or name.endswith(".part"):
                continue
            own = self.log if name == "log" else self.run_dir / name
            own.parent.mkdir(parents=True, exist_ok=True)
            temporary = own.with_name(f".{own.name}.{os.getpid()}.tmp")
            self.fs.get_file(path, str(temporary))
            os.replace(temporary, own)


# -------------------------------------------------------------------------------------- the worker
def run_here(task: dict, share: float, until: float) -> dict:
    """The run of `task` in a worker: its result, or {"error", "exit_code"}; {} without time.

    share: seconds that the run may take; until: Unix time at which the study ends.
    """
    limit = min(share, until - time.time())
    if limit < wfo.LEAST_SECONDS:
        return {}
    if limit < math.inf:
        task = task | {"argv": [*task["argv"], "--timeout", f"{limit:.0f}"]}
    before = os.getcwd()
    try:
        return in_place(task)
    finally:
        os.chdir(before)  # the next task of this worker may be another study's


def run_apart(task: dict, share: float, until: float, files: dict, url: str, seconds: float):
    """run_here() without a shared disk.

    files: {path: content} of what the run reads; url: where its run directory is copied, every
    `seconds`.
    """
    with tempfile.TemporaryDirectory(prefix="cleanrl_crypto_") as folder:
        place = Path(folder)
        for name, content in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
        for name in ("log", "result"):
            (place / task[name]).parent.mkdir(parents=True, exist_ok=True)
        mirror = Mirror(place / task["run_dir"], place / task["log"], url, seconds)
        mirror.pull()
        mirror.start()
        result = run_here(task | {"place": folder}, share, until)
        mirror.over.set()
        mirror.join()
        mirror.push()
    return result


def in_place(task: dict) -> dict:
    """run_task() in the study's working directory, its words in the log."""
    refuse_strangers(task)
    os.chdir(task["place"])
    with open(task["log"], "a", buffering=1) as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                return wfo.run_task(task)
            except Exception as e:
                code = getattr(e, "exit_code", 1)
                if not hasattr(e, "exit_code"):
                    traceback.print_exc()
                print(f"error: {e}")
                if code > 128:  # a signal that the study did not send, or it would not read this
                    raise Lost(str(e)) from e
                return {"error": str(e), "exit_code": code}


def refuse_strangers(task: dict):
    """UsageError where this machine does not see the study's files."""
    data, *_ = value_of(task["argv"], "--data").split(",")
    seen = Path(task["place"], data).exists()
    way_out = "put --root on a shared disk, or give --ray-storage"
    refuse((not seen, f"{socket.gethostname()} does not see {data} in {task['place']}: {way_out}"))


remote = ray.remote(max_retries=RETRIES, retry_exceptions=[Lost])
run_here_there, run_apart_there = remote(run_here), remote(run_apart)


def value_of(argv: list[str], name: str) -> str:
    return argv[argv.index(name) + 1]


# -------------------------------------------------------------------------------------- the driver
def threads_of(args: wfo.Args, jobs: int, argv: list[str]) -> int:
    """Cores of a run: --torch-threads behind --, a share of this machine, or 1 on a cluster."""
    if "--torch-threads" in argv:
        return int(value_of(argv, "--torch-threads"))
    if args.ray_address or "RAY_ADDRESS" in os.environ:
        return 1
    return max(1, (os.cpu_count() or 1) // jobs)


def connect(args: wfo.Args, jobs: int, threads: int):
    """To the cluster of --ray-address, or to one that is started here."""
    how = {"log_to_driver": False, "logging_level": "ERROR"}
    address = args.ray_address or os.environ.get("RAY_ADDRESS")
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # as processes of the local engine
        how["num_cpus"] = jobs * threads
        how["object_store_memory"] = OBJECT_STORE
        how["include_dashboard"] = False
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address or "local", **how)
    except ConnectionError as e:
        why = str(e).splitlines()[0]
        raise UsageError(f"--ray-address {address}: no cluster answers: {why}") from e
    signal.signal(signal.SIGTERM, handler)  # Ray's would end the study without its runs


def slots(cpus: int, gpus: float) -> int:
    """Runs at once; 0 where the cluster has no room yet."""
    there = ray.cluster_resources()
    room = [there.get("CPU", 0) // cpus]
    if gpus:
        room.append(there.get("GPU", 0) // gpus)
    return int(min(room))


class Sender:
    """Makes tasks of Ray from tasks of the study."""

    def __init__(self, args: wfo.Args, share: float, until: float, threads: int):
        self.args, self.limits, self.threads = args, (share, until), threads
        self.how = {"num_cpus": threads, "num_gpus": args.ray_gpus}
        self.bars = {}  # by segment: its files in the object store

    def send(self, task: dict):
        argv = list(task["argv"])
        if "--torch-threads" not in argv:
            argv += ["--torch-threads", str(self.threads)]
        task = task | {"argv": argv, "place": os.getcwd()}
        if self.args.ray_storage is None:
            return run_here_there.options(**self.how).remote(task, *self.limits)
        files = self.files(task)
        url = url_of(self.args, task)
        seconds = max(self.args.checkpoint_interval, 1.0)
        task = relative(task, self.args.root)
        return run_apart_there.options(**self.how).remote(task, *self.limits, files, url, seconds)

    def files(self, task: dict):
        """{path from --root on: content} of what the run reads, in the object store."""
        number = task["segment"]
        if number not in self.bars or task["needs"]:
            folder = self.args.folder("data", number)
            content = {}
            for path in map(Path, [*folder.iterdir(), *task["needs"]]):
                name = path.relative_to(self.args.root)
                content[name.as_posix()] = path.read_bytes()
            self.bars[number] = ray.put(content)
        return self.bars[number]


def relative(task: dict, root: str) -> dict:
    """The task with paths from `root` on: a worker lays them out in a folder of its own."""
    head = f"{Path(root)}/"
    found = {}
    for name, value in task.items():
        values = value if isinstance(value, list) else [value]
        values = [cut(x, head) if isinstance(x, str) else x for x in values]
        found[name] = values if isinstance(value, list) else values[0]
    return found


def cut(text: str, head: str) -> str:
    """`text`, comma-separated paths, without their common head."""
    return ",".join(part.removeprefix(head) for part in text.split(","))


def url_of(args: wfo.Args, task: dict) -> str:
    """Where a run directory is copied: a folder for every identity, for flags may change."""
    name = f"segment_{task['segment']}/seed_{task['seed']}/{task['identity'][:16]}"
    return f"{args.ray_storage.rstrip('/')}/{args.name}/{name}"


def take_in(task: dict, found: dict, args: wfo.Args) -> dict:
    """The result of a task that is done, its files here."""
    if "error" in found:
        raise wfo.failed(task, found["exit_code"], found["error"])
    if args.ray_storage:
        run_dir, log = Path(task["run_dir"]), Path(task["log"])
        mirror = Mirror(run_dir, log, url_of(args, task), 1.0)
        mirror.pull(leave="checkpoints/last.pt")
        result = {k: v for k, v in found.items() if k != "run_dir"}
        write_json_atomic(result, task["result"])
    return found | {"run_dir": task["run_dir"]}


def run(tasks: list[dict], args: wfo.Args, guard: TimeoutGuard):
    """Yields results as they come."""
    jobs = args.jobs or wfo.default_jobs(len(tasks))
    threads = threads_of(args, jobs, tasks[0]["argv"])
    connect(args, jobs, threads)
    room = slots(threads, args.ray_gpus)
    if not room:
        print(f"the cluster has no room for a run ({threads} CPUs, {args.ray_gpus} GPUs) yet")
    room = min(max(room, 1), len(tasks))
    share = wfo.share_of_time(guard, len(tasks), room)
    until = time.time() + guard.remaining() - wfo.REPORT_SECONDS
    sender = Sender(args, share, until, threads)
    left, running, seconds, late = list(tasks), {}, [], 0
    progress = wfo.Progress(len(tasks))
    try:
        while (left or running) and guard.signal is None:
            for task in [task for task in left if wfo.can_start(task)]:
                left.remove(task)
                running[sender.send(task)] = task
            done = len(tasks) - len(left) - len(running) - late
            progress.show(done, list(running.values())[:room], seconds, room)
            over, _ = ray.wait(list(running), timeout=1.0, fetch_local=False)
            for ref in over:
                task = running.pop(ref)
                found = fetch(ref)
                if not found:
                    late += 1
                    continue
                result = take_in(task, found, args)
                seconds.append(result["seconds"])
                yield result
            if late and not running:
                break
        if late:
            late += len(left)
            print(f"time is over: {late} runs are left, the same command goes on")
        progress.show(len(tasks) - late, [], seconds, room)
    finally:
        progress.close()
        end(list(running))


def fetch(ref) -> dict:
    """What a task returned; CheckFailed where its workers died RETRIES times."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as e:
        lines = str(e).strip().splitlines()
        raise CheckFailed(f"Ray: {lines[-1]}") from e


def end(refs: list):
    """Ask the runs to save themselves, and leave the cluster."""
    for ref in refs:
        ray.cancel(ref)
    if refs:
        ray.wait(refs, num_returns=len(refs), timeout=wfo.PATIENCE, fetch_local=False)
    ray.shutdown()
