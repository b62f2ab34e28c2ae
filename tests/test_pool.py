"""common/gpu_pool.py on the CPU, on CUDA's simulator, and (marked gpu) on a device."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest

from common.gpu_pool import Pool
from runs import run_code


def test_a_released_buffer_comes_back_zeroed_and_nothing_is_allocated():
    pool = Pool()
    first = pool.acquire((3, 4), np.float32)
    assert first.shape == (3, 4) and first.dtype == np.float32 and not first.any()
    first[...] = 7
    pool.release(first)
    second = pool.acquire([3, np.int64(4)], "f4")  # another spelling of the same key
    assert second is first and not second.any()
    second[...] = 7
    pool.release(second)
    assert (pool.acquire((3, 4), np.float32, zero=False) == 7).all()
    assert pool.stats() == {"allocations": 1, "acquires": 3, "bytes": 48, "bytes_in_use": 48, "in_use": 1,
                            "static_builds": 0}


def test_mutable_state_is_never_shared():
    # an evaluation environment once overwrote the training environment's state through one pooled array
    pool = Pool()
    train, evaluation = pool.acquire(5, np.float64), pool.acquire(5, np.float64)
    train[...] = 1
    assert not np.shares_memory(train, evaluation) and not evaluation.any()
    assert pool.stats()["allocations"] == 2 and pool.stats()["bytes_in_use"] == 80


@pytest.mark.parametrize(
    "other", [{"shape": (4, 3)}, {"shape": 12}, {"dtype": np.int32}, {"device": "pinned"}]
)
def test_shape_dtype_and_device_are_all_part_of_the_key(other):
    pool = Pool()
    key = {"shape": (3, 4), "dtype": np.float32, "device": "cpu"}
    pool.release(pool.acquire(**key))
    array = pool.acquire(**key | other)
    assert pool.stats()["allocations"] == 2
    assert array.dtype == (key | other)["dtype"] and array.size == 12 and isinstance(array, np.ndarray)


def test_releasing_what_is_not_in_use_is_an_error():
    pool = Pool()
    array = pool.acquire((2, 3), np.float64)
    for foreign in (np.zeros((2, 3)), array[:], array.T, Pool().acquire((2, 3), np.float64), None):
        with pytest.raises(ValueError, match="release: .* is not in use here"):
            pool.release(foreign)
    pool.release(array)
    with pytest.raises(ValueError, match=r"ndarray of shape \(2, 3\) is not in use"):
        pool.release(array)
    assert pool.stats()["in_use"] == 0 and pool.stats()["bytes_in_use"] == 0


def test_nonsense_is_refused_and_not_counted():
    pool = Pool()
    with pytest.raises(ValueError, match="device must be cpu, pinned or cuda, got 'gpu'"):
        pool.acquire(3, np.float32, "gpu")
    with pytest.raises(ValueError):
        pool.acquire((-1,), np.float32)
    with pytest.raises(TypeError):
        pool.acquire(3, "no such dtype")
    assert not any(pool.stats().values())


def test_borrow_and_lease_give_everything_back():
    pool = Pool()
    with pytest.raises(KeyError), pool.borrow(4, np.float32) as array:
        assert pool.stats()["in_use"] == 1 and array.shape == (4,)
        raise KeyError
    assert pool.stats()["in_use"] == 0

    for _ in range(3):  # three environments one after the other cost one
        lease = pool.lease()
        arrays = [lease.acquire((2, 2), np.float64) for _ in range(3)]
        assert len({id(array) for array in arrays}) == 3
        lease.close()
        lease.close()
        assert pool.stats()["in_use"] == 0
    assert pool.stats()["allocations"] == 1 + 3
    with pytest.raises(ValueError, match="lease is closed"):
        lease.acquire(2, np.float32)
    with pytest.raises(KeyError), pool.lease() as lease:
        lease.acquire(2, np.float32)
        raise KeyError
    assert pool.stats()["in_use"] == 0


@dataclass
class Network:
    length: np.ndarray
    lanes: tuple
    name: str


def test_static_data_is_built_once_and_cannot_be_written():
    pool, builds = Pool(), []

    def build():
        builds.append(1)
        return {"net": Network(np.ones(3), (np.arange(4), [np.zeros(2)]), "a"), "n": 3}

    train, evaluation = pool.static(("net", 1), build), pool.static(("net", 1), build)
    assert train is evaluation and len(builds) == 1
    for array in (train["net"].length, train["net"].lanes[0], train["net"].lanes[1][0]):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 5
    pool.static(("net", 2), build)
    assert len(builds) == 2 == pool.stats()["static_builds"]

    base = np.zeros(4)
    with pytest.raises(ValueError, match="is a view"):
        pool.static("view", lambda: base[:2])
    with pytest.raises(ZeroDivisionError):
        pool.static("bad", lambda: 1 / 0)
    assert pool.static("bad", lambda: 1) == 1 and pool.stats()["static_builds"] == 3


def test_trim_frees_what_is_free_only():
    pool = Pool()
    kept, free = pool.acquire(8, np.uint8), pool.acquire(4, np.uint8)
    pool.release(free)
    pool.static("a", lambda: 1)
    pool.trim()
    assert pool.stats()["bytes"] == 8 and pool.static("a", lambda: 2) == 2
    pool.release(kept)
    assert pool.acquire(8, np.uint8) is kept and pool.acquire(4, np.uint8) is not free
    assert pool.stats()["allocations"] == 3 and pool.stats()["bytes"] == 12


def test_threads_never_get_the_same_buffer():
    pool, clashes, builds = Pool(), [], []
    old = sys.getswitchinterval()

    def build():
        builds.append(1)
        time.sleep(0.05)  # the others ask for it meanwhile
        return np.arange(3)

    def work(me):
        for _ in range(300):
            with pool.borrow(16, np.int64) as array:
                array[...] = me
                pool.static("shared", build)
                if not (array == me).all():
                    clashes.append(me)

    try:
        sys.setswitchinterval(1e-6)
        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(old)
    stats = pool.stats()
    assert clashes == [] and len(builds) == 1 and stats["in_use"] == 0
    assert stats["acquires"] == 6 * 300 and stats["static_builds"] == 1
    assert stats["allocations"] <= 6 and stats["bytes"] == stats["allocations"] * 128


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
    host = lease.acquire((3, 5), np.float32, "pinned")
    static = pool.static("y", lambda: cuda.to_device(np.arange(3, dtype=np.float32)))
    add[(1, 1), (8, 8)](state, static)
    state.copy_to_host(host)
    assert host.sum() == 15, host
    return lease, state

train, a = environment()
evaluation, b = environment()
assert a is not b
for lease in (train, evaluation):
    lease.close()
lease, c = environment()  # zeroed again: the sum would be 30 otherwise
assert c is a or c is b
try:
    pool.release(a if c is b else b)
except ValueError as e:
    assert "not in use" in str(e)
else:
    raise AssertionError("a released device array was released again")
lease.close()
for shape in ((), (0,), (2, 3, 4)):
    assert not pool.acquire(shape, np.int64, "cuda").copy_to_host().any()
stats = pool.stats()
print(stats["allocations"], stats["acquires"], stats["in_use"], stats["static_builds"])
"""


def run_cuda(repo, **env):
    assert run_code(repo, CUDA, **env).split() == ["7", "9", "3", "1"]


def test_cuda_on_the_simulator(repo):
    run_cuda(repo, NUMBA_ENABLE_CUDASIM="1")


@pytest.mark.gpu
def test_cuda_on_a_device(repo):
    run_cuda(repo, NUMBA_ENABLE_CUDASIM="0")


def test_a_cpu_run_does_not_import_cuda(repo):
    code = ("import sys, numpy as np\nfrom common.gpu_pool import pool\npool.acquire(3, np.float32)\n"
            "print('numba' in sys.modules, 'torch' in sys.modules)")
    out = subprocess.run([sys.executable, "-c", code], cwd=repo, env=os.environ | {"PYTHONPATH": str(repo)},
                         text=True, capture_output=True, check=True).stdout
    assert out.split() == ["False", "False"]
