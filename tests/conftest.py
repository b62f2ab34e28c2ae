import os
import signal
from pathlib import Path

import pytest

# a background job starts with SIGINT ignored, and its children inherit that: Ctrl-C must work in every test
signal.signal(signal.SIGINT, signal.default_int_handler)

# before numpy, torch or numba are imported; child processes inherit them
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(name, str(min(2, os.cpu_count() or 1)))
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository's root, where the command lines of the docs are run."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run directory of the test's own that does not exist yet."""
    return tmp_path / "run"
