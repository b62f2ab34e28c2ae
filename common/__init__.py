"""Shared plumbing. Kernels are cached on disk; where neither the code's folder nor the user's cache can be written, in a
temporary folder."""

import os
import tempfile
from pathlib import Path


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


if "NUMBA_CACHE_DIR" not in os.environ:
    if not _writable(Path(__file__).parent / "__pycache__") and not _writable(Path.home() / ".cache" / "numba"):
        os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(prefix="numba-")
        print(f"no writable folder for compiled kernels: they are kept in {os.environ['NUMBA_CACHE_DIR']}")
