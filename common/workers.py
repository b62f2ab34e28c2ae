"""Processes that step a script's lanes: how they start, end, and share memory with it.

    context = worker_context("cleanrl_crypto.dqn_forex_subproc")  # imported once, shared by all
    raw = shared_block(context, layout)  # layout: {name: (shape, dtype)}
    process, pipe = start_process(context, work, raw, layout)  # work(pipe, raw, layout) there
    arrays = carve(raw, layout)  # views of the same memory, on both sides

What a worker does stands in the script.
"""

from __future__ import annotations

import math
import multiprocessing as mp
import os
import signal
import sys
import threading
import traceback
from multiprocessing import connection, util

import numpy as np

from common import BUNDLE, ROOT

FORK_SERVER = "CLEANRL_CRYPTO_FORK_SERVER"  # in the environment of the fork server and its children
LINE = 64  # bytes of a cache line: no two arrays share one


def worker_context(preload: str):
    """How workers start: never by fork, which kills a process with threads.

    preload: a module that the fork server imports once; every worker shares its pages.
    """
    if "forkserver" not in mp.get_all_start_methods():  # Windows
        return mp.get_context("spawn")
    from multiprocessing import forkserver

    context = mp.get_context("forkserver")
    context.set_forkserver_preload([ROOT.stem if BUNDLE else preload])
    root = str(ROOT.parent if BUNDLE else ROOT)
    path = os.environ.get("PYTHONPATH")
    os.environ |= {"PYTHONPATH": os.pathsep.join(filter(None, (root, path))), FORK_SERVER: "1"}
    try:
        forkserver.ensure_running()
    finally:
        del os.environ[FORK_SERVER], os.environ["PYTHONPATH"]
        if path is not None:
            os.environ["PYTHONPATH"] = path
    return context


def start_process(context, task, *args):
    """A process in which task(pipe, *args) runs, and this end of the pipe."""
    ours, theirs = context.Pipe()
    process = context.Process(target=_begin, args=(task, theirs, *args), daemon=True)
    process.start()
    theirs.close()  # or the process's death would not close the pipe
    # a parent that ends without close(): multiprocessing sends SIGTERM and would wait for ever
    util.Finalize(None, process.kill, exitpriority=0)
    return process, ours


def _begin(task, pipe, *args):
    be_a_worker()
    task(pipe, *args)


def be_a_worker():
    """Signals are the parent's to handle; a worker ends when its parent says so or is gone."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    sentinel = mp.parent_process().sentinel
    threading.Thread(target=_end_after, args=(sentinel,), daemon=True).start()
    if sys.platform != "win32":  # a user's C code may keep that thread from running: SIGIO then
        import fcntl

        fcntl.fcntl(sentinel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)


def _end_after(sentinel):
    connection.wait([sentinel])
    os._exit(1)


def ask(context, task, *args, seconds: float):
    """What task(pipe, *args) sends from a process that may die or hang; if nothing, a str: why."""
    process, pipe = start_process(context, task, *args)
    try:
        answer = pipe.recv() if pipe.poll(seconds) else f"no answer in {seconds:g} s"
    except EOFError:
        process.join(1.0)
        answer = f"its process ended before it answered (exit code {process.exitcode})"
    process.kill()
    process.join()
    return answer


def one_line(e: BaseException) -> str:
    """What was raised, and where: of a user's code one wants to know both."""
    at = traceback.extract_tb(e.__traceback__)[-1]
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]} ({at.filename}:{at.lineno})"


def shared_block(context, layout: dict):
    """Memory for carve(): a file without a name, that the system frees when the last process ends."""
    sizes = [math.prod(shape) * np.dtype(kind).itemsize for shape, kind in layout.values()]
    return context.RawArray("b", sum(sizes) + LINE * (len(sizes) + 1))


def carve(raw, layout: dict) -> dict[str, np.ndarray]:
    """Arrays (views) of {name: (shape, dtype)} in a shared_block(), by cache lines."""
    block = np.frombuffer(raw, np.uint8)
    arrays = {}
    at = -block.ctypes.data % LINE
    for name, (shape, dtype) in layout.items():
        arrays[name] = np.frombuffer(raw, dtype, math.prod(shape), at).reshape(shape)
        at += -(-arrays[name].nbytes // LINE) * LINE
    return arrays
