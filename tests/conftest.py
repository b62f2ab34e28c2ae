import os
import runpy
import signal
import sys
from pathlib import Path

import pytest

# a background job starts with SIGINT ignored, and its children inherit that: Ctrl-C must work in every test
signal.signal(signal.SIGINT, signal.default_int_handler)

# before numpy, torch or numba are imported; child processes inherit them
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(name, str(min(2, os.cpu_count() or 1)))
os.environ.setdefault("MPLBACKEND", "Agg")


# One worker of pytest-xdist takes all tests of a script: it compiles its kernels and makes its runs once.
GROUPS = {"tqc": "tqc market encoder math kernels checkpoint", "dqn": "forex dqn subproc", "freeway": "freeway arz ppo",
          "signals": "signals network maps sumo adapters"}


def group_of(test_id: str) -> str:
    """The last group with a word of the module's name or of the case's; else the module."""
    path, _, name = test_id.partition("::")
    module, case = Path(path).stem, name.partition("[")[2].strip("]")
    words = set(f"{module}_{case}".split("_"))
    return next((name for name, its in reversed(GROUPS.items()) if words & set(its.split())), module)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Marks of xdist_group would do, but pytest 9.2 ignores them in silence (pytest-xdist's issue 1386)."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group_of(nodeid)

    return Groups(config, log)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository's root, where the command lines of the docs are run."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def one_thread():
    """For small arrays: threads of several workers would only wait for each other."""
    import numba
    import torch

    threads = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    yield
    torch.set_num_threads(threads[0])
    numba.set_num_threads(threads[1])


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run directory of the test's own that does not exist yet."""
    return tmp_path / "run"


@pytest.fixture
def refusal_of(monkeypatch, capfd):
    """refusal_of(script)(argv): run it as __main__, in this process to save its imports; expects exit code 2 and one
    line on stderr, which it returns."""

    def of(script):
        def run(argv):
            monkeypatch.setattr(sys, "argv", [str(script), *map(str, argv)])
            capfd.readouterr()
            with pytest.raises(SystemExit) as stop:
                runpy.run_path(str(script), run_name="__main__")
            err = capfd.readouterr().err
            assert stop.value.code == 2
            assert err.count("\n") == 1 and err.startswith("error: ") and "Traceback" not in err, err
            return err

        return run

    return of
