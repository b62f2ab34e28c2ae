"""Shared plumbing. Kernels are cached on disk; where neither the code's folder nor the user's cache
can be written, in a temporary folder."""

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
    home = Path(os.path.expanduser("~"))  # stays "~" for a user that the system does not know
    caches = Path(__file__).resolve().parent / "__pycache__", home / ".cache" / "numba"
    if not any(folder.is_absolute() and _writable(folder) for folder in caches):
        os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(prefix="numba-")
        where = os.environ["NUMBA_CACHE_DIR"]
        print(f"no writable folder for compiled kernels: they are kept in {where}")
