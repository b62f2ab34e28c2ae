"""The notebooks are small, were executed in order, and run."""
import json
import subprocess
import sys

import pytest

NAMES = "markets", "forex", "traffic"


def cells(path):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_small_and_shows_what_it_did(name, repo):
    path = repo / "notebooks" / f"{name}.ipynb"
    code = cells(path)
    assert path.stat().st_size < 1_000_000
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    outputs = [output for c in code for output in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 3
    assert str(repo) not in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, repo, tmp_path):
    pytest.importorskip("nbconvert", reason="executes a notebook")
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--output-dir", str(tmp_path)]
    path = repo / "notebooks" / f"{name}.ipynb"
    done = subprocess.run([*command, "--ExecutePreprocessor.timeout=3600", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(cells(tmp_path / path.name)) == len(cells(path))
