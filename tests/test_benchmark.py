"""scripts/benchmark.py really runs at tiny sizes: what it says it ran, it ran. Its timings are not looked at."""
import json
import math
import subprocess
import sys

import pytest

KEYS = {"machine", "data", "num_envs", "batch_size", "quick", "check", "ours", "peer", "defaults", "environment",
        "median"}
LOSSES = {"critic_loss", "actor_loss", "ent_coef_loss"}


@pytest.fixture(scope="module")
def quick(repo, tmp_path_factory):
    """(output, JSON) of one run of the command, from another folder."""
    folder = tmp_path_factory.mktemp("benchmark")
    command = [sys.executable, str(repo / "scripts" / "benchmark.py"), "--quick", "--threads", "1", "--out", "out.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [x.name for x in folder.iterdir()] == ["out.json"]
    return done.stdout, json.loads((folder / "out.json").read_text())


def test_keys(quick):
    _, out = quick
    assert set(out) == KEYS
    assert out["quick"] and out["data"] == "synthetic:regime?bars=3000"
    assert {"cpu", "cores", "threads", "numba_threads", "bf16_hardware", "versions"} <= set(out["machine"])
    assert out["machine"]["threads"] == out["machine"]["numba_threads"] == 1
    assert {"torch", "numpy", "numba", "sb3_contrib", "stable_baselines3", "python"} <= set(out["machine"]["versions"])


def test_ours_ran_what_was_asked_for(quick):
    _, out = quick
    assert set(out["ours"]) == {"fp32", "bf16"}
    for precision, runs in out["ours"].items():
        assert len(runs) == 2  # before the peer and after it
        for run in runs:
            assert run["precision"] == precision
            assert (run["updates"], run["transitions"], run["rows"]) == (6, 6 * 32, 6 * 16)
            assert {"--policy=actor", "--segment=1", "--counterfactuals=0", "--batch-size=16"} <= set(run["flags"])
            assert len(run["updates_per_second"]) == len(run["transitions_per_second"]) == 2
    defaults = out["defaults"]
    assert defaults["transitions"] == 8 * 32 and defaults["updates"] % 7 == 0 and defaults["updates"] > 0
    assert not any(flag.startswith(("--policy", "--batch-size", "--segment")) for flag in defaults["flags"])


def test_the_peer_ran_what_was_asked_for(quick):
    _, out = quick
    peer = out["peer"]
    assert (peer["updates"], peer["transitions"], peer["rows"]) == (5, 3 * 32, 5 * 16)
    assert len(peer["updates_per_second"]) == len(peer["transitions_per_second"]) == 2


def test_both_sides_are_the_same_problem(quick):
    _, out = quick
    check = out["check"]
    assert check["parameters"]["ours"] == check["parameters"]["peer"] > 5000
    assert check["tolerance"] == {"fp32": 1e-4, "bf16": 2e-2} and check["rows"] == 16
    for precision, losses in check["losses"].items():
        assert set(losses) == LOSSES
        for x in losses.values():
            assert x["relative"] <= check["tolerance"][precision]
            assert x["relative"] == pytest.approx(abs(x["ours"] - x["peer"]) / abs(x["peer"]), abs=1e-12)
    assert check["losses"]["bf16"]["critic_loss"]["ours"] != check["losses"]["fp32"]["critic_loss"]["ours"]


def test_the_environment_counted_its_steps(quick):
    _, out = quick
    without, with_observations = (out["environment"][f"{k}_observations"] for k in ("without", "with"))
    assert without["lane_steps"] == 3 * 200 * 32 and with_observations["lane_steps"] == 3 * 2 * 32


def test_medians_and_the_table(quick):
    said, out = quick
    for key in ("updates_per_second", "transitions_per_second"):
        m = out["median"][key]
        assert set(m) == {"peer", "fp32", "bf16", "ratio_fp32", "ratio_bf16", "defaults"}
        assert all(math.isfinite(x) and x > 0 for x in m.values())
        both = sorted(x for run in out["ours"]["fp32"] for x in run[key])
        assert m["fp32"] == pytest.approx((both[1] + both[2]) / 2)
        assert m["ratio_fp32"] == pytest.approx(m["fp32"] / m["peer"])
    assert set(out["median"]["lane_steps_per_second"]) == {"without_observations", "with_observations"}
    for words in ("--quick: no measurement", "updates", "transitions", "lane-steps without", "trainable parameters"):
        assert words in said


def test_a_wrong_count_ends_the_benchmark():
    from scripts import benchmark

    benchmark.check(True, "fine")
    with pytest.raises(RuntimeError, match="made 3 updates"):
        benchmark.check(False, "the peer made 3 updates")


def test_an_unknown_flag_is_refused(repo):
    command = [sys.executable, str(repo / "scripts" / "benchmark.py"), "--quik"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "--quik" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["benchmark_dqn", "benchmark_arz"])
def test_the_other_benchmarks_run(name, tmp_path, repo):
    argv = [sys.executable, str(repo / "scripts" / f"{name}.py"), "--quick", "--out", str(tmp_path / "out.json")]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["quick"] and min(result["median"].values()) > 0
    assert {"cpu", "cores", "threads", "versions"} <= set(result["machine"])
