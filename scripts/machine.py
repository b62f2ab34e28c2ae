"""What the benchmarks share: their peer's packages, threads, where they ran, a refused count."""

import os
import platform
import sys

from common.run import CheckFailed, UsageError, need


def need_peer(*packages: str):
    """Exit code 2 and one line where a package of the peer is not installed."""
    why = "the peer comes with pip install -r requirements-test.txt, or"
    try:
        need(*packages, why=why)
    except UsageError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(e.exit_code)


def set_threads(wanted: int | None) -> int:
    """Threads of torch and Numba, all cores if none are wanted; returns how many."""
    import numba as nb
    import torch

    threads = wanted or os.cpu_count() or 1
    torch.set_num_threads(threads)
    nb.set_num_threads(min(threads, nb.config.NUMBA_NUM_THREADS))
    return threads


def machine(threads: int, *modules) -> dict:
    """Name of the CPU, cores, threads, versions of the modules and of Python."""
    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":")[1] for line in lines if line.startswith("model name")]
        cpu = names[0].strip() if names else cpu
    versions = {m.__name__: m.__version__ for m in modules}
    versions["python"] = platform.python_version()
    cores = os.cpu_count()
    return {"cpu": cpu, "cores": cores, "threads": threads, "versions": versions}


def title_of(result: dict) -> str:
    """Of the table of a benchmark: where it ran, and whether its numbers mean anything."""
    where = result["machine"]
    text = f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads"
    return text + " (--quick: these numbers mean nothing)" * result["quick"]


def check(ok: bool, message: str):
    if not ok:
        raise CheckFailed(message)
