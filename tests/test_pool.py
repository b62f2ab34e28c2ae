"""common/gpu_pool.py on the CPU, on CUDA's simulator, and (marked gpu) on a device."""

from dataclasses import make_dataclass

import numpy as np
import pytest

from common.gpu_pool import Pool, probe_cuda
from runs import run_code


def test_a_released_buffer_comes_back_zeroed_and_nothing_is_allocated():
    pool = Pool()
    first = pool.acquire((3, 4), np.float32)
    assert first.shape == (3, 4) and first.dtype == np.float32 and not first.any()
    first[...] = 7
    pool.release(first)
    second = pool.acquire([3, np.int64(4)], "f4")  # another spelling of the same key
    assert second is first and not second.any()
    counts = {"allocations": 1, "acquires": 2, "bytes": 48, "bytes_in_use": 48, "in_use": 1}
    assert pool.stats() == counts | {"static_builds": 0}
    pool.release(second)
    for shape, dtype in (((4, 3), np.float32), (12, np.float32), ((3, 4), np.int32)):
        assert pool.acquire(shape, dtype).dtype == dtype
    assert pool.stats()["allocations"] == 4


def test_misuse_is_refused_and_not_counted():
    pool = Pool()
    wrong = (3, np.float32, "gpu"), ((-1,), np.float32), (3, "no such dtype")
    for arguments in wrong:
        with pytest.raises((ValueError, TypeError)):
            pool.acquire(*arguments)
    assert not any(pool.stats().values())
    array = pool.acquire((2, 3), np.float64)
    for foreign in (np.zeros((2, 3)), array[:], Pool().acquire((2, 3), np.float64), None):
        with pytest.raises(ValueError, match="release"):
            pool.release(foreign)
    pool.release(array)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        pool.release(array)
    assert pool.stats()["in_use"] == 0 and pool.stats()["bytes_in_use"] == 0


def test_a_lease_gives_everything_back():
    pool = Pool()
    for _ in range(3):  # three environments one after the other cost one
        lease = pool.lease()
        arrays = [lease.acquire((2, 2), np.float64) for _ in range(3)]
        assert len({id(array) for array in arrays}) == 3
        lease.close()
        lease.close()
        assert pool.stats()["in_use"] == 0
    assert pool.stats()["allocations"] == 3
    with pytest.raises(ValueError, match="closed"):
        lease.acquire(2, np.float32)


def test_static_data_is_built_once_and_cannot_be_written():
    pool = Pool()
    Network = make_dataclass("Network", ["length", "lanes"])

    def build():
        return {"net": Network(np.ones(3), (np.arange(4), [np.zeros(2)])), "n": 3}

    train, evaluation = pool.static(("net", 1), build), pool.static(("net", 1), build)
    assert train is evaluation and pool.stats()["static_builds"] == 1
    net = train["net"]
    for array in (net.length, net.lanes[0], net.lanes[1][0]):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 5
    assert pool.static(("net", 2), build) is not train and pool.stats()["static_builds"] == 2
    with pytest.raises(ValueError, match="view"):
        pool.static("view", lambda: np.zeros(4)[:2])
    with pytest.raises(ZeroDivisionError):
        pool.static("bad", lambda: 1 / 0)
    assert pool.static("bad", lambda: 1) == 1 and pool.stats()["static_builds"] == 3


CUDA = """
import numpy as np
from numba import cuda
from common.gpu_pool import pool

@cuda.jit
def add(x, y):
    i, j = cuda.grid(2)
    if i < x.shape[0] and j < x.shape[1]:
        x[i, j] += y[i]

def environment():
    lease = pool.lease()
    state = lease.acquire((3, 5), np.float32, "cuda")
    static = pool.static("y", lambda: cuda.to_device(np.arange(3, dtype=np.float32)))
    add[(1, 1), (8, 8)](state, static)
    assert state.copy_to_host().sum() == 15
    return lease, state

train, a = environment()
evaluation, b = environment()
assert a is not b
for lease in (train, evaluation):
    lease.close()
lease, c = environment()  # zeroed again: the sum would be 30 otherwise
assert c is a or c is b
lease.close()
for shape in ((), (0,), (2, 3, 4)):
    assert not pool.acquire(shape, np.int64, "cuda").copy_to_host().any()
stats = pool.stats()
print(stats["allocations"], stats["acquires"], stats["in_use"], stats["static_builds"])
"""


@pytest.mark.parametrize("simulated", [True, pytest.param(False, marks=pytest.mark.gpu)])
def test_cuda(repo, simulated):
    out = run_code(repo, CUDA, NUMBA_ENABLE_CUDASIM=str(int(simulated)))
    assert out.split() == ["5", "6", "3", "1"]


@pytest.mark.gpu
def test_a_probe_runs_a_kernel_of_both():
    assert probe_cuda() == (True, True)


def test_a_cpu_run_does_not_import_cuda(repo):
    code = """
import sys, numpy as np
from common.gpu_pool import pool
pool.acquire(3, np.float32)
print('numba' in sys.modules, 'torch' in sys.modules)
"""
    assert run_code(repo, code).split() == ["False", "False"]
