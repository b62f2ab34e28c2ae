"""Buffers on CPU or CUDA that outlive an environment, and a count of what was really allocated.

    self.lease = pool.lease()  # an environment's own state, never shared
    self.rho = self.lease.acquire((cells, lanes), np.float32, "cuda")
    self.net = pool.static(("corridor", sha256), build_network)  # read-only, one for all
    ...
    self.lease.close()  # the next environment gets the buffers

reset() writes into the buffers it has; a second build of the same size allocates nothing.
"""

import math
from collections import defaultdict
from dataclasses import fields, is_dataclass

import numpy as np


def _freeze(obj):
    # Device arrays cannot be made read-only; kernels take them as inputs by convention.
    if isinstance(obj, np.ndarray):
        if isinstance(obj.base, np.ndarray):
            raise ValueError(
                f"static: array {obj.shape} is a view, writeable through its base: copy it"
            )
        obj.setflags(write=False)
    elif isinstance(obj, dict):
        for value in obj.values():
            _freeze(value)
    elif isinstance(obj, (list, tuple)):
        for value in obj:
            _freeze(value)
    elif is_dataclass(obj):
        for field in fields(obj):
            _freeze(getattr(obj, field.name))


class Pool:
    """Free buffers by (shape, dtype, device), for one thread.

    device: "cpu" (numpy array) or "cuda" (numba device array on the current device). Queue work on
    device buffers on the default stream: what still runs when a buffer is released is then over
    before its next owner's work begins.
    """

    def __init__(self):
        self._free = defaultdict(list)
        self._used = {}  # id(array) -> (key, array); holding the array keeps its id unique
        self._static = {}
        self._counts = dict.fromkeys(
            ("allocations", "acquires", "bytes", "bytes_in_use", "static_builds"), 0
        )

    @staticmethod
    def _key(shape, dtype, device):
        shape = (shape,) if np.ndim(shape) == 0 else tuple(shape)
        key = tuple(int(n) for n in shape), np.dtype(dtype)
        if min(key[0], default=0) < 0:
            raise ValueError(f"shape {key[0]}: no side can be negative")
        if device == "cuda":
            from numba import cuda

            cuda.current_context()  # makes one where there is none yet
            return *key, f"cuda:{cuda.gpus.current.id}"
        if device != "cpu":
            raise ValueError(f"device must be cpu or cuda, got {device!r}")
        return *key, device

    @staticmethod
    def _allocate(shape, dtype, device):
        if device == "cpu":  # from the start of a cache line
            raw = np.empty(math.prod(shape) * dtype.itemsize + 64, np.uint8)
            skip = -raw.ctypes.data % 64
            return raw[skip : skip + raw.size - 64].view(dtype).reshape(shape)
        from numba import cuda

        return cuda.device_array(shape, dtype)

    def acquire(self, shape, dtype, device: str = "cpu"):
        """A buffer of zeros that nobody else holds."""
        key = self._key(shape, dtype, device)
        size = math.prod(key[0]) * key[1].itemsize
        if self._free[key]:
            array = self._free[key].pop()
        else:
            array = self._allocate(*key)
            self._counts["allocations"] += 1
            self._counts["bytes"] += size
        if device == "cuda":  # an assignment would compile a kernel first
            array.copy_to_device(np.zeros(*key[:2]))
        else:
            array.fill(0)
        self._used[id(array)] = key, array
        self._counts["acquires"] += 1
        self._counts["bytes_in_use"] += size
        return array

    def release(self, array):
        """Take a buffer back. ValueError for a view, a second release, what is not from here."""
        if id(array) not in self._used:
            kind = f"{type(array).__name__} of shape {getattr(array, 'shape', None)}"
            raise ValueError(
                f"release: {kind} is not in use here: foreign, a view, or released before"
            )
        key, array = self._used.pop(id(array))
        self._counts["bytes_in_use"] -= math.prod(key[0]) * key[1].itemsize
        self._free[key].append(array)

    def lease(self) -> "Lease":
        return Lease(self)

    def static(self, key, build):
        """What build() returned when `key` was asked for first, its numpy arrays (in dicts, tuples,
        lists and dataclasses too) read-only. The key must name everything that build() depends on."""
        if key not in self._static:
            value = build()
            _freeze(value)
            self._static[key] = value
            self._counts["static_builds"] += 1
        return self._static[key]

    def stats(self) -> dict[str, int]:
        """allocations really made, acquires, bytes held, in_use (buffers), ..."""
        return {**self._counts, "in_use": len(self._used)}


class Lease:
    """Buffers that one owner acquired and gives back together: close() (twice is fine)."""

    def __init__(self, pool: Pool):
        self._pool, self._arrays, self.closed = pool, [], False

    def acquire(self, shape, dtype, device: str = "cpu"):
        if self.closed:
            raise ValueError("acquire: this lease is closed")
        self._arrays.append(self._pool.acquire(shape, dtype, device))
        return self._arrays[-1]

    def close(self):
        self.closed = True
        while self._arrays:
            self._pool.release(self._arrays.pop())


pool = Pool()  # the process's one


def probe_cuda(device: int = 0) -> tuple[bool, bool]:
    """Does a real kernel run on this GPU, which is then selected: (torch, numba).

    is_available() alone has been wrong; a failure is printed.
    """
    import torch
    from numba import cuda

    if not torch.cuda.is_available():
        return False, False
    works = [False, False]
    try:
        torch.cuda.set_device(device)
        works[0] = float(torch.ones(8, device="cuda").add_(1).sum()) == 16.0
    except RuntimeError as e:
        print(
            f"CUDA is there but torch's first kernel failed ({str(e).splitlines()[0]}): "
            "running on the CPU"
        )
    try:
        cuda.select_device(device)

        @cuda.jit
        def double(x):
            x[cuda.grid(1)] *= 2.0

        array = cuda.to_device(np.ones(8))
        double[1, 8](array)
        works[1] = float(array.copy_to_host().sum()) == 16.0
    except Exception as e:  # whatever the driver raises: it is printed and the CPU kernels run
        print(
            f"CUDA is there but numba's first kernel failed ({str(e).splitlines()[0]}): "
            "environment on the CPU"
        )
    return works[0], works[1]
