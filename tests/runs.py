"""What the tests of all three scripts do with a command line, its run directory and its CUDA kernels."""
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common.timeout_guard import load_checkpoint

SUMMARY = {  # what every script's summary.json holds
    "status", "global_step", "updates", "replay_ratio", "samples_per_transition", "wall_seconds", "phases",
    "env_builds", "buffer_allocations", "sps", "eval", "audit", "versions", "device", "data",
}


def flags_of(tiny: dict, run_dir=None, /, **changes) -> list[str]:
    """{field: value} -> command line; None leaves a flag out."""
    out = []
    for key, value in (tiny | {"run_dir": run_dir} | changes).items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            out.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, tuple):
            out += [f"--{name}", *map(str, value)]
        elif value is not None:
            out += [f"--{name}", str(value)]
    return out


def wait_until(child, ready, seconds=400):
    """Until ready(), while the process `child` lives."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def records(run_dir) -> list[dict]:
    text = (run_dir / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def untimed(run_dir) -> list[dict]:
    """metrics.jsonl without what a clock decides."""
    clock = re.compile("wall|time/.*|charts/SPS")
    return [{k: v for k, v in line.items() if not clock.fullmatch(k)} for line in records(run_dir)]


def last_of(run_dir) -> dict:
    return load_checkpoint(run_dir / "checkpoints" / "last.pt")


def load_summary(run_dir) -> dict:
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads((run_dir / "summary.json").read_text(), parse_constant=refuse)


def refusal(kind, call, *args, words=(), **kwargs) -> str:
    """What the exception of that kind says, which the call must raise: one line, with these words."""
    with pytest.raises(kind) as error:
        call(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


def uniform(seed, lane, episode, draw=0) -> float:
    """What the kernels' counters give: two rounds of splitmix64's finaliser, in Python's integers."""
    mask = 2**64 - 1

    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31

    seed, lane, episode, draw = map(int, (seed, lane, episode, draw))
    x = mix(seed * 0x9E3779B97F4A7C15 + lane & mask)
    return (mix(x + episode * 0xD1342543DE82EF95 + draw & mask) >> 11) / 2**53


def write_network(folder, table, plan) -> str:
    """net.csv with the segments, net.json with the plan: text, bytes or what JSON can say."""
    plan = plan if isinstance(plan, (str, bytes)) else json.dumps(plan)
    for name, text in (("net.csv", table), ("net.json", plan)):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder / "net.csv")


def plain(x):
    """Tensors of a state as NumPy's assert_equal takes them."""
    if isinstance(x, torch.Tensor):
        return str(x.dtype), x.shape, (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    return [plain(value) for value in x] if isinstance(x, (list, tuple)) else x


def assert_same(a, b, where=""):
    """Equal to the bit, NaN to NaN, with the place of the first difference."""
    np.testing.assert_equal(plain(a), plain(b), where)


def assert_same_run(a, b, forgive=None):
    """Two run directories hold the same agent, learner, lanes, random numbers, log and results, to the bit.

    forgive(state): takes out of a checkpoint what may be different.
    """
    for name in ("last.pt", "best.pt"):
        one, two = (load_checkpoint(x / "checkpoints" / name) for x in (a, b))
        for state in (one, two):
            del state["args"]  # the run directory's name, --resume
            state.get("run", {}).pop("id", None)
            if forgive:
                forgive(state)
        assert_same(one, two, name)
    assert untimed(a) == untimed(b)
    one, two = (load_summary(x) for x in (a, b))
    for key in ("status", "global_step", "updates", "best_step", "eval", "audit"):
        assert one[key] == two[key], key


def run_code(repo, code, *argv, **environment) -> str:
    """What `code` prints in a process of its own, for NUMBA_ENABLE_CUDASIM is read at import."""
    path = os.pathsep.join([str(repo), str(repo / "tests"), *sys.path])
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *argv], cwd=repo, text=True, capture_output=True,
                          timeout=600, env=os.environ | {"PYTHONPATH": path} | environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


EMIT = """
import sys
import numba as nb
import numpy as np
from numba import cuda
from types import SimpleNamespace
try:
    from numba.cuda.cudadrv import nvvm
    nvvm.NVVM()
    cuda.cudadrv.libs.get_libdevice()
except Exception as e:
    print("SKIP", type(e).__name__, str(e).splitlines()[0])
    sys.exit()
if not cuda.is_available():  # a device function asks which card it is for: the one thing that is missing here
    cuda.dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=(8, 0))

def type_of(x):  # on a device every array can be written
    if isinstance(x, tuple):
        return nb.types.BaseTuple.from_types([type_of(y) for y in x])
    return nb.typeof(np.array(x) if isinstance(x, np.ndarray) else x)

def emit(kernel, *args):
    ptx, result = cuda.compile(kernel.py_func, nb.void(*map(type_of, args)), cc=(8, 0), device=False, abi="numba",
                               output="ptx")
    assert result == nb.void, result
    print(ptx + "// end of kernel")
"""


def assert_compiles_for_a_gpu(repo, folder, code: str, kernels: int):
    """The kernels that `code` gives to emit(kernel, *arguments) become PTX, and machine code where there is ptxas."""
    out = run_code(repo, EMIT + code, NUMBA_ENABLE_CUDASIM="0")
    if out.startswith("SKIP"):
        pytest.skip(f"no NVVM to compile with: {out[5:].strip()}")
    parts = out.split("// end of kernel")[:-1]
    assert len(parts) == kernels
    ptxas = shutil.which("ptxas", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin")))
    for k, ptx in enumerate(parts):
        assert ".target sm_80" in ptx and ptx.count(".visible .entry") == 1
        assert ".extern .func" not in ptx  # nothing left that a GPU does not have
        assert "st.global" in ptx or "st.f" in ptx
        if ptxas:
            (folder / f"{k}.ptx").write_text(ptx)
            subprocess.run([ptxas, "-arch=sm_80", folder / f"{k}.ptx", "-o", folder / f"{k}.cubin"], check=True)
            assert (folder / f"{k}.cubin").stat().st_size > 1000


def shared_memory() -> set[str]:
    """What stands in /dev/shm, but for semaphores, which any process has there for a moment."""
    folder = Path("/dev/shm")
    return {path.name for path in folder.glob("*") if not path.name.startswith("sem.mp-")}
