"""What the benchmarks share: what they say about where they ran, and how they refuse a wrong count."""
import os
import platform


def machine(threads: int, *modules) -> dict:
    """Name of the CPU, cores, threads, versions of the modules and of Python."""
    try:
        cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    versions = {m.__name__: m.__version__ for m in modules} | {"python": platform.python_version()}
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": threads, "versions": versions}


def check(ok: bool, message: str):
    if not ok:
        raise RuntimeError(message)
