"""The benchmarks really run at tiny sizes: what they say they ran, they ran. No timing is looked at."""

import json
import subprocess
import sys

import pytest

from common.run import CheckFailed
from scripts.machine import check, need_peer

LOSSES = {"critic_loss", "actor_loss", "ent_coef_loss"}


def run(repo, name: str, *argv, cwd=None):
    command = [sys.executable, str(repo / "scripts" / f"{name}.py"), *map(str, argv)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def quick(repo, tmp_path_factory) -> dict:
    """What one run of the command from another folder wrote."""
    folder = tmp_path_factory.mktemp("benchmark")
    argv = ("--quick", "--threads", 1, "--out", "out.json")
    done = run(repo, "benchmark", *argv, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [x.name for x in folder.iterdir()] == ["out.json"]
    return json.loads((folder / "out.json").read_text())


@pytest.mark.slow
def test_both_sides_ran_what_was_asked_for(quick):
    assert set(quick["ours"]) == {"fp32", "bf16"}
    for precision, runs in quick["ours"].items():
        assert len(runs) == 2  # before the peer and after it
        for ours in runs:
            assert ours["precision"] == precision
            counts = ours["updates"], ours["transitions"], ours["rows"]
            assert counts == (6, 6 * 32, 6 * 16)
            assert {"--policy=actor", "--segment=1", "--batch-size=16"} <= set(ours["flags"])
            assert len(ours["updates_per_second"]) == len(ours["transitions_per_second"]) == 2
    defaults = quick["defaults"]
    assert defaults["transitions"] == 8 * 32 and defaults["updates"] % 7 == 0 < defaults["updates"]
    assert not any(f.startswith(("--policy", "--batch-size")) for f in defaults["flags"])
    peer = quick["peer"]
    assert (peer["updates"], peer["transitions"], peer["rows"]) == (5, 3 * 32, 5 * 16)
    assert len(peer["updates_per_second"]) == len(peer["transitions_per_second"]) == 2
    steps = {k: v["lane_steps"] for k, v in quick["environment"].items()}
    assert steps == {"without_observations": 3 * 200 * 32, "with_observations": 3 * 2 * 32}


@pytest.mark.slow
def test_both_sides_are_the_same_problem(quick):
    check = quick["check"]
    assert check["parameters"]["ours"] == check["parameters"]["peer"] > 5000
    assert check["tolerance"] == {"fp32": 1e-4, "bf16": 2e-2} and check["rows"] == 16
    assert check["forecast_std"] > 0  # a forecast of 0 would hide who reads another one
    for precision, losses in check["losses"].items():
        assert set(losses) == LOSSES
        for x in losses.values():
            assert x["relative"] <= check["tolerance"][precision]
            assert x["relative"] == pytest.approx(abs(x["ours"] - x["peer"]) / abs(x["peer"]))
    bf16, fp32 = (check["losses"][p]["critic_loss"]["ours"] for p in ("bf16", "fp32"))
    assert bf16 != fp32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["benchmark_dqn", "benchmark_arz"])
def test_the_other_benchmarks_run(name, tmp_path, repo):
    done = run(repo, name, "--quick", "--out", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["quick"] and min(result["median"].values()) > 0
    assert {"cpu", "cores", "threads", "versions"} <= set(result["machine"])


def test_a_wrong_count_ends_a_benchmark():
    check(True, "fine")
    with pytest.raises(CheckFailed) as stop:
        check(False, "3 updates")
    assert stop.value.exit_code == 1 and "3 updates" in str(stop.value)


def test_a_peer_that_is_not_installed_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        need_peer("numpy", "no_such_peer")
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and "no_such_peer" in line


def test_an_unknown_flag_is_refused(repo):
    done = run(repo, "benchmark", "--quik")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--quik" in done.stderr
