"""Shared plumbing, and where the repository's other files are.

Kernels are cached on disk; where neither the code's folder nor the user's cache can be written, in
a temporary folder.
"""

import os
import sys
import tempfile
from pathlib import Path

__version__ = "0.2.0"
# {"script", "commit"} of the one file that scripts/kaggle_bundle.py makes; None in a checkout
BUNDLE = getattr(__loader__, "about", None)
# the checkout or, as with a zip file that one imports from, that one file
ROOT = Path(__file__).resolve().parents[1]


def text_of(name: str) -> str | None:
    """Text of a file of the repository, e.g. "docs/data.md"; None where there is no such file."""
    if BUNDLE:
        return __loader__.text(name)
    places = ROOT / name, ROOT / "cleanrl_crypto" / name  # a wheel keeps docs/ there
    path = next((place for place in places if place.is_file()), None)
    return path and path.read_text(encoding="utf-8")


def command_of(name: str) -> list[str]:
    """What starts a program of the repository, e.g. "scripts/report.py"."""
    program = [str(ROOT), name] if BUNDLE else [str(ROOT / name)]
    return [sys.executable, *program]


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


if "NUMBA_CACHE_DIR" not in os.environ:
    home = Path(os.path.expanduser("~"))  # stays "~" for a user that the system does not know
    code = ROOT.parent if BUNDLE else ROOT / "common"
    caches = code / "__pycache__", home / ".cache" / "numba"
    if not any(folder.is_absolute() and _writable(folder) for folder in caches):
        os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(prefix="numba-")
        where = os.environ["NUMBA_CACHE_DIR"]
        print(f"no writable folder for compiled kernels: they are kept in {where}")
