"""The Ray engine against the local one: a worker is killed, the results are the same."""

import os
import subprocess
import sys

import psutil
import pytest

ray = pytest.importorskip("ray", reason="pip install -r requirements-cluster.txt")
pytest.importorskip("fsspec", reason="pip install -r requirements-cluster.txt")

from runs import wait_until  # noqa: E402
from scripts import ray_engine  # noqa: E402
from test_wfo import LAYOUT, TINY, folder  # noqa: E402, F401

PROGRAM = "scripts/run_full_wfo.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """Two machines of one worker each, as far as Ray knows, and no memory to speak of."""
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    size = {"num_cpus": 1, "object_store_memory": 10**8}
    cluster = Cluster(initialize_head=True, head_node_args=size)
    cluster.add_node(**size)
    yield cluster
    cluster.shutdown()


def test_a_run_without_time_has_nothing_to_copy(tmp_path):
    """Its place at the storage stays as it is; one with a log is copied whole and comes back."""
    run_dir, log, url = tmp_path / "run", tmp_path / "log", (tmp_path / "bucket").as_uri()
    run_dir.mkdir()
    mirror = ray_engine.Mirror(run_dir, log, url, 1.0)
    mirror.push()
    assert not list((tmp_path / "bucket").rglob("*"))
    log.write_text("said")
    (run_dir / "metrics.jsonl").write_text("{}")
    mirror.push()
    there = ray_engine.Mirror(tmp_path / "there", tmp_path / "log_there", url, 1.0)
    there.pull()
    assert (tmp_path / "there" / "metrics.jsonl").read_text() == "{}"
    assert (tmp_path / "log_there").read_text() == "said"


def argv_of(data, root, *more) -> list:
    long = " ".join(LAYOUT).replace("--jobs 1", "--jobs 2").replace("768", "4096").split()
    own = ["--data", data, "--root", root, "--segment", "0", "--seeds", "2", *long, *more]
    return [*map(str, own), "--", *TINY]


def results_of(root) -> dict:
    """{file: its lines but that of the time} of every seed."""
    found = {}
    for path in sorted((root / "results" / "wfo" / "segment_0").glob("seed_*.json")):
        lines = path.read_text().splitlines()
        found[path.name] = [line for line in lines if not line.startswith('  "seconds"')]
    return found


def workers_of(nodes) -> list[psutil.Process]:
    """Processes in which a run is on, of these machines."""
    found = []
    for node in nodes:
        raylet = next(x.process for x in node.all_processes["raylet"])
        children = psutil.Process(raylet.pid).children()
        found += [child for child in children if child.name().startswith("ray::run_")]
    return found


@pytest.fixture(scope="module")
def local(folder, repo):  # noqa: F811
    """Results of the local engine."""
    root = folder / "local"
    command = [sys.executable, repo / PROGRAM, *argv_of(folder / "TOY.parquet", root)]
    subprocess.run(command, check=True, capture_output=True)
    return results_of(root)


@pytest.mark.parametrize("shared", [True, False])
def test_a_worker_is_killed(folder, repo, cluster, local, tmp_path, shared):  # noqa: F811
    """In the middle of its run; without a shared disk its directory is lost with it."""
    root, storage = tmp_path / "study", tmp_path / "bucket"
    more = ["--engine", "ray", "--ray-address", cluster.address]
    more += [] if shared else ["--ray-storage", storage.as_uri()]
    argv = argv_of(folder / "TOY.parquet", root, *more)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    child = subprocess.Popen([sys.executable, repo / PROGRAM, *argv], **options)
    place = root / "logs" if shared else storage
    wait_until(child, lambda: len(list(place.rglob("last.pt"))) == 2, seconds=900)
    workers = workers_of(cluster.list_all_nodes())
    workers[0].kill()
    said, _ = child.communicate(timeout=900)
    assert child.returncode == 0, said[-2000:]
    assert len(workers) == 2 and results_of(root) == local
    logs = [path.read_text() for path in (root / "logs" / "wfo" / "segment_0").glob("*.log")]
    assert sum("resumed" in log for log in logs) == 1
    for kind, name in (("weights", "agent.pt"), ("results", "report.html")):
        assert list((root / kind).rglob(name))
    runs = (root / "logs").rglob("traces/test.parquet")
    assert len(list(runs)) == 2 and not list(tmp_path.rglob("*.part"))
