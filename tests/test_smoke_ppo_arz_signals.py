"""cleanrl_crypto/ppo_arz_signals.py through its command line, at tiny sizes: runs, resume, refusals, processes."""

import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from cleanrl_crypto import ppo_arz_signals as arz
from common.run import CheckFailed, UsageError
from runs import assert_same, flags_of, last_of, records, untimed, wait_until, write_network

SCRIPT = Path(arz.__file__)
TINY = dict(
    scenario="town1", num_envs=4, num_steps=5, num_minibatches=2, update_epochs=2, hidden=8, episode_seconds=50,
    total_timesteps=120, eval_interval=60, report=False, torch_threads=1, cuda=False)
ROADS = "from,to,length_m,class,lanes,limit\nA,J,100,secondary,1,\nB,J,100,tertiary,1,\nJ,C,100,secondary,1,\n"
PLAN = {"signals": {"J": [["A"], ["B"]]}, "demand": {"A": {"car": 0}, "B": {"car": 1200}}}
# as a program of its own, but with the kernels that this process has compiled
PROGRAM = f"import sys; sys.path.insert(0, {str(SCRIPT.parents[1])!r}); " \
          "from cleanrl_crypto.ppo_arz_signals import exit_with, main; exit_with(main)"

flags = partial(flags_of, TINY)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the default flags at tiny size: its directory and its summary."""
    run_dir = tmp_path_factory.mktemp("signals") / "run"
    return run_dir, arz.main(flags(run_dir))


def test_a_run_and_what_it_leaves(finished):
    run_dir, summary = finished
    assert summary["status"] == "finished" and summary["global_step"] == 120
    assert summary["updates"] == 120 // (4 * 5) * 2 * 2 and summary["samples_per_transition"] == 2
    assert summary["env_builds"] == 2 and set(summary["eval"]) == {"eval", "x1.0", "x1.3"}
    for result in summary["eval"].values():
        assert set(result["baselines"]) == set(arz.CONTROLLERS) - {"own_program"}
        for metrics in (result["agent"], *result["baselines"].values()):
            assert all(math.isfinite(v) for v in metrics.values()) and metrics["delay_veh_s"] > 0
            assert metrics["mass_error"] < 1e-5 and metrics["max_cfl"] <= 0.9 + 1e-6
    assert (run_dir / "traces" / "town1.parquet").stat().st_size > 500


def test_the_last_weights_are_evaluated(tmp_path):
    arz.main(flags(tmp_path / "run", eval_interval=100, total_timesteps=80))
    assert [r["global_step"] for r in records(tmp_path / "run") if "eval/eval/std" in r] == [80]


def test_the_learning_rate_falls_and_target_kl_stops_epochs(tmp_path):
    arz.main(flags(tmp_path / "run", target_kl=1e-6, learning_rate=0.05))
    logged = [r for r in records(tmp_path / "run") if "charts/learning_rate" in r]
    assert [r["charts/learning_rate"] for r in logged] == pytest.approx([0.025, 0.0], abs=1e-9)
    assert logged[-1]["charts/updates"] < 24


def test_a_network_that_breaks_ends_in_one_line(tmp_path):
    class Broken(arz.NetworkVectorEnv):
        def step_lanes(self, action):
            result = super().step_lanes(action)
            self.rho_c[3, 1] = np.nan
            return result

    envs = Broken(4, "town1", seconds=50.0)
    with pytest.raises(CheckFailed, match="lane 1, segment"):
        arz.main(flags(tmp_path / "run"), envs=envs)


@pytest.mark.parametrize("kill", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_interrupted_and_resumed_it_has_the_bits_of_the_uninterrupted_run(tmp_path, kill):
    steps = 2000 if kill else 120
    changes = dict(resume="auto", checkpoint_interval=0, total_timesteps=steps, anneal_lr=False)
    arz.main(flags(tmp_path / "whole", **changes))
    parts = tmp_path / "parts"
    if kill:
        argv = [sys.executable, "-c", PROGRAM, *flags(parts, **changes)]
        child = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_until(child, lambda: len(list((parts / "checkpoints").glob("step_*.pt"))) >= 2)
        child.kill()
        child.communicate()
        assert 0 < last_of(parts)["loop"]["global_step"] < steps
    else:
        arz.main(flags(parts, **changes | dict(total_timesteps=60)))
    arz.main(flags(parts, **changes))
    a, b = (last_of(tmp_path / name) for name in ("whole", "parts"))
    assert a["loop"]["global_step"] == steps
    assert_same(a["agent"], b["agent"])
    assert_same(a["parts"], b["parts"])
    one, two = ([r for r in untimed(tmp_path / name) if "losses/entropy" in r] for name in ("whole", "parts"))
    assert one == two and len(one) >= 2


def test_a_policy_from_its_file_alone_acts_as_evaluated(finished, tmp_path):
    run_dir, summary = finished
    path = run_dir / "checkpoints" / "best.pt"
    policy = arz.load_policy(path)
    envs = arz.NetworkVectorEnv(arz.EVAL_LANES, "town1", seconds=50.0, cases="eval", level=arz.LEVELS)
    result, _, _ = arz.evaluate(lambda envs: lambda obs: torch.as_tensor(policy(obs.numpy())), envs)
    assert result["x1.3"] == summary["eval"]["x1.3"]["agent"]
    own = dict(eval_only=True, checkpoint=path, report=False, torch_threads=1, cuda=False)  # town1, 50 s: its own
    again = arz.main(flags_of(own, tmp_path / "again"))
    assert again["eval"]["x1.3"]["agent"] == result["x1.3"] and again["global_step"] == summary["best_step"]
    with pytest.raises(UsageError, match="does not fit"):
        arz.main(flags(tmp_path / "other", eval_only=True, checkpoint=path, scenario="town2"))


def test_it_learns_which_road_has_the_traffic_and_resumes_on_no_other_network(tmp_path):
    path = write_network(tmp_path, ROADS, PLAN)
    changes = dict(
        scenario=path, num_envs=16, num_steps=20, learning_rate=3e-3, episode_seconds=100, total_timesteps=640)
    result = arz.main(flags(tmp_path / "run", **changes))["eval"]["eval"]
    assert result["agent"]["switches"] <= 1
    assert result["agent"]["delay_veh_s"] < 0.5 * result["baselines"]["always_switch"]["delay_veh_s"]
    write_network(tmp_path, ROADS, PLAN | {"demand": {"A": {"car": 400}, "B": {"car": 200}}})
    with pytest.raises(UsageError, match="sha256"):
        arz.main(flags(tmp_path / "run", **changes, resume="auto"))


def test_refusals_are_one_line_with_exit_code_2(refusal_of, tmp_path):
    for changes, words in (
            (dict(num_minibatches=3), "--num-minibatches 3"), (dict(decision_interval=7), "--decision-interval 7"),
            (dict(gamma=1.0), "--gamma 1.0"),
            (dict(scenario="freeway"), "--scenario freeway"), (dict(cell_length=1000), "--cell-length 1000"),
            (dict(levels=(1.3, 1.0)), "--levels 1.3 1.0"), (dict(demand="a.rou.xml"), "--demand"),
            (dict(network="a.net.xml"), "--network a.net.xml and --scenario"),
            (dict(scenario=tmp_path / "none.csv"), "none.csv: no such file"), (dict(seed=2**31), "--seed")):
        assert words in refusal_of(SCRIPT)(flags(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_large_town_keeps_a_short_deadline(tmp_path):
    """Set-up, tuning and evaluations ask the clock: without that this takes minutes."""
    summary = arz.main(flags(tmp_path / "run", scenario="town8", num_envs=64, episode_seconds=450, timeout=12,
                             total_timesteps=10**9, num_minibatches=2))
    assert summary["status"] == "timeout" and summary["exit_code"] == 0
    assert summary["wall_seconds"] < 60


@pytest.mark.slow
def test_two_processes_follow_one_and_resume_with_lanes_of_their_own(tmp_path):
    def together(**changes):
        argv = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program]
        subprocess.run([sys.executable, *argv, *flags(tmp_path / "two", **changes)], check=True, timeout=600)

    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    arz.main(flags(tmp_path / "one", anneal_lr=False))
    together(total_timesteps=60, anneal_lr=False)
    together(resume="auto", anneal_lr=False)
    one, two = ([r for r in records(tmp_path / name) if "losses/entropy" in r] for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for key in ("losses/policy_loss", "losses/value_loss", "losses/entropy"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4)
    parts = last_of(tmp_path / "two")["parts"]
    assert [p["lane_id"].tolist() for p in parts["envs"]] == [[0, 1], [2, 3]]
    assert not torch.equal(parts["scale"][0]["running"], parts["scale"][1]["running"])
