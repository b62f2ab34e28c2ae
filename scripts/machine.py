"""What the benchmarks share: where they ran, and how they refuse a wrong count."""

import os
import platform

from common.run import CheckFailed


def machine(threads: int, *modules) -> dict:
    """Name of the CPU, cores, threads, versions of the modules and of Python."""
    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":")[1] for line in lines if line.startswith("model name")]
        cpu = names[0].strip() if names else cpu
    versions = {m.__name__: m.__version__ for m in modules}
    versions["python"] = platform.python_version()
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": threads, "versions": versions}


def check(ok: bool, message: str):
    if not ok:
        raise CheckFailed(message)
