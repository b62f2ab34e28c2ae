"""cleanrl_crypto/tqc_film_batch.py through its real command line and main(argv), at tiny sizes."""

import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from cleanrl_crypto import tqc_film_batch as tqc
from common.data import COLUMNS, load_bars
from common.lanes import Lanes
from common.run import CheckFailed, Run, UsageError
from common.timeout_guard import CheckpointError
from runs import flags_of, last_of, load_summary, records, refusal

SCRIPT = Path(tqc.__file__)
TINY = dict(
    data="synthetic:regime?bars=3000", d_model=32, window=16, num_envs=64, batch_size=64, mae_steps=5,
    total_timesteps=1024, learning_starts=256, eval_interval=512, updates_per_step=2,
    fusion_width=32, hidden=32, episode_length=8, fee_bps=0.5, slippage_bps=0.0, report=False,
    torch_threads=1, cuda=False)
BASELINES = {"flat", "buy_and_hold", "best_constant", "sparse_linear", "random_same_turnover"}
flags = partial(flags_of, TINY)


def write_bars(path, spec, rows=None):
    """The first `rows` bars as a file."""
    bars = load_bars(spec)
    frame = pd.DataFrame(bars.ohlcv[0], columns=COLUMNS[1:])
    frame.insert(0, "timestamp", pd.DatetimeIndex(bars.timestamp).tz_localize("UTC"))
    frame[:rows].to_parquet(path, index=False)
    return path


def check_summary(summary, synthetic=True):
    """What the script itself writes, with values that can be; the rest is run.py's (test_run.py)."""
    assert summary["samples_per_transition"] == pytest.approx(64 * summary["replay_ratio"])
    assert {"setup", "pretrain", "cache", "eval", "io"} <= set(summary["phases"])
    assert list(summary["eval"]) == ["train", "eval", "test"]
    for split, result in summary["eval"].items():
        assert set(result["baselines"]) == BASELINES | ({"optimum"} if synthetic else set())
        assert ("score" in result["agent"]) == ("mean_expected_bps" in result["agent"]) == synthetic
        for metrics in (result["agent"], *result["baselines"].values()):
            assert all(v is None or math.isfinite(v) for v in metrics.values())
            assert -1 <= metrics["max_drawdown"] <= 0 and 0 <= metrics["turnover"] <= 2
            assert -1 <= metrics["exposure"] <= 1
        assert all(v == 0 for v in result["baselines"]["flat"].values())
        assert result["partial"] == (result["rows"] != summary["data"]["rows"][split])
        if synthetic:  # nobody beats the optimum by more than a rounding
            best = result["baselines"]["optimum"]["mean_expected_bps"]
            assert result["agent"]["score"] == pytest.approx(result["agent"]["mean_expected_bps"] / best)
            assert best > max(result["baselines"][k]["mean_expected_bps"] for k in BASELINES)
    audit = summary["audit"]
    assert audit["reasons"] and 0 <= audit["state_dependence"] <= 1
    assert all(audit[f"attribution_{name}"] >= 0 for name in ("technical", "hmm", "position", "w_cost"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The command line once, with the report: its run directory and what it printed."""
    run_dir = tmp_path_factory.mktemp("base") / "run"
    argv = [sys.executable, str(SCRIPT), *flags(run_dir, total_timesteps=1536, report=True)]
    done = subprocess.run(argv, cwd=run_dir.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return run_dir, done.stdout


# -------------------------------------------------------------------------------- the command line
def test_summary_holds_every_key_of_the_contract(base):
    run_dir, out = base
    assert (run_dir / "report.html").stat().st_size > 0
    assert "optimum" in out and "buy_and_hold" in out and str(run_dir) in out
    summary = load_summary(run_dir)
    check_summary(summary)
    assert (summary["status"], summary["global_step"]) == ("finished", 1536)
    # 2 updates at every vector step from the first one with learning_starts transitions stored
    assert summary["updates"] == 2 * (1536 - 256 + 64) // 64
    assert summary["env_builds"] == 1 and summary["buffer_allocations"] > 0
    assert summary["mae_steps"] == 5 and summary["selected_by"] == "mean_expected_bps"
    assert summary["device"]["torch"] == "cpu" and summary["device"]["threads"] == 1
    assert summary["data"]["sha256"] == load_bars(TINY["data"]).sha256
    state = last_of(run_dir)
    assert all(state["data"][key] == summary["data"][key] for key in ("sha256", "rows"))
    assert len(state["data"]["columns"]) == 55
    assert state["parts"]["learner"]["extractor.film.weight"].abs().max() > 0
    grid = state["agent"]["grid"]
    assert grid[10] == 0 and grid[0] == -1 and grid[-1] == 1  # flat is exactly flat


def test_metrics_are_json_lines_in_order_and_tensorboard_holds_the_same(base):
    lines = records(base[0])
    steps = [line["global_step"] for line in lines]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == 1536
    lengths = [line["charts/episodic_length"] for line in lines if "charts/episodic_length" in line]
    assert lengths[0] == 8.0 and 7.5 < min(lengths) <= max(lengths) == 8.0  # at the last row less
    events = EventAccumulator(str(base[0]), size_guidance={"scalars": 0}).Reload()
    names = {key for line in lines for key, value in line.items() if value is not None}
    assert set(events.Tags()["scalars"]) == names - {"global_step", "pretrain_step", "wall"}
    for name in events.Tags()["scalars"]:
        values = [line[name] for line in lines if line.get(name) is not None]
        np.testing.assert_allclose([e.value for e in events.Scalars(name)], values, rtol=1e-6)


def test_traces_tell_what_the_summary_says(base):
    bars = load_bars(TINY["data"])
    for split, result in load_summary(base[0])["eval"].items():
        trace = pd.read_parquet(base[0] / "traces" / f"{split}.parquet")
        start, stop = result["rows"]
        assert str(trace["timestamp"].dt.tz) == "UTC"
        times = trace["timestamp"].dt.tz_localize(None).to_numpy().astype("datetime64[ns]")
        np.testing.assert_array_equal(times, bars.timestamp[start:stop])
        np.testing.assert_array_equal(trace["close"], bars.close[start:stop])
        np.testing.assert_array_equal(trace["next_return"], bars.next_return[start:stop])
        np.testing.assert_array_equal(trace["expected"], bars.truth.expected[start:stop])
        everyone = {"": result["agent"]}
        if split != "train":  # those rows are walked by the policy that acts alone
            everyone["_actor"] = result["actor"]
        everyone |= {f"_{k}": v for k, v in result["baselines"].items()}
        for who, metrics in everyone.items():
            position, equity = trace[f"position{who}"].to_numpy(), trace[f"equity{who}"].to_numpy()
            change = np.abs(np.diff(position, prepend=0.0))
            reward = np.log1p(-5e-5 * change) + np.log1p(position * trace["next_return"].to_numpy())
            np.testing.assert_allclose(np.log(equity), np.cumsum(reward), atol=1e-9)
            assert metrics["exposure"] == pytest.approx(position.mean(), abs=1e-12)
            assert metrics["turnover"] == pytest.approx(change.mean(), abs=1e-12)
            assert metrics["total_return"] == pytest.approx(equity[-1] - 1, abs=1e-9)
            assert metrics["mean_reward_bps"] == pytest.approx(reward.mean() / 1e-4, abs=1e-6)


def test_a_timeout_shorter_than_the_set_up_still_leaves_a_checkpoint(tmp_path):
    summary = tqc.main(flags(tmp_path / "run", timeout=1, mae_steps=50))
    assert summary["status"] == "timeout" and summary["exit_code"] == 0
    assert summary["mae_steps"] < 50 and summary["updates"] == 0
    assert summary["audit"]["verdict"] == "untrained"
    tqc.load_policy(tmp_path / "run" / "checkpoints" / "best.pt")


def test_copied_alone_it_says_what_to_copy(tmp_path):
    alone = tmp_path / "elsewhere" / SCRIPT.name
    alone.parent.mkdir()
    shutil.copy(SCRIPT, alone)
    done = subprocess.run([sys.executable, str(alone)], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "common/" in done.stderr


# -------------------------------------------------------------------------------------- the loop
class HostReads(TorchDispatchMode):
    """Counts, by phase of the run, the operations that wait for a device: reading a scalar, and
    shapes that depend on values."""

    WAIT = ("local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if Run.current and func.__name__.lstrip("_").startswith(self.WAIT):
            self.found[Run.current.guard.current] += 1
        return func(*args, **(kwargs or {}))


def test_main_twice_in_one_process_learns_the_same_and_the_loop_never_waits_for_a_device(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        assert not (Run.current and Run.current.guard.current in ("rollout", "learn")), "copied to the host"

    for name in ("cpu", "numpy", "tolist"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, f=original, **k: (refuse(), f(self, *a, **k))[1])
    builds, results = Lanes.builds, []
    for name in ("a", "b"):
        with HostReads() as reads:
            summary = tqc.main(flags(tmp_path / name))
        assert "rollout" not in reads.found
        assert reads.found["learn"] == 2  # is the loss finite? at the two log points
        results.append(summary)
    first, second = results
    assert Lanes.builds == builds + 2 and second["buffer_allocations"] in (0, first["buffer_allocations"])
    a, b = (last_of(tmp_path / x)["parts"]["learner"] for x in "ab")
    # float32's last bits depend on where the process put its arrays; processes of their own agree to the bit
    assert all(torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-5) for k in a)


def test_a_clear_signal_is_learned_by_the_critic_and_by_the_actor(tmp_path):
    """A lasso has .999 of the optimum; an actor that learned nothing stays flat."""
    summary = tqc.main(flags(
        tmp_path / "run", data="synthetic:signal?bars=4000&ic=.6&n_states=5&phi=.8", window=4, d_model=16,
        updates_per_step=4, total_timesteps=3840, eval_interval=1920))
    test = summary["eval"]["test"]
    assert min(test["agent"]["score"], test["actor"]["score"]) > 0.95
    assert summary["audit"]["verdict"] == "healthy"


@pytest.mark.parametrize("step, stale, flags, more", [
    (tqc.SCHEDULE - 1, 0, {}, True),
    (tqc.SCHEDULE, 0, {}, False),
    (10 * tqc.SCHEDULE, 0, {"timeout": 1800}, True),  # time given is time used,
    (10 * tqc.SCHEDULE, 16, {"timeout": 1800}, False),  # until patience is over
    (10 * tqc.SCHEDULE, 16, {"timeout": 1800, "patience": 0}, True),
    (512, 0, {"timeout": 1800, "total_timesteps": 512}, False),
], ids=str)
def test_what_ends_a_training(step, stale, flags, more):
    run = SimpleNamespace(args=tqc.Args(**flags), out_of_time=lambda: False)
    assert tqc.go_on(run, tqc.Loop(global_step=step, stale=stale)) == more


def test_a_loss_that_is_not_finite_ends_the_run_and_spoils_no_checkpoint(tmp_path, monkeypatch):
    loss = tqc.quantile_huber_loss
    monkeypatch.setattr(tqc, "quantile_huber_loss", lambda *args: loss(*args) * math.nan)
    with pytest.raises(CheckFailed) as error:
        tqc.main(flags(tmp_path / "run"))
    assert error.value.exit_code == 1 and "--learning-rate" in str(error.value)
    assert not list((tmp_path / "run" / "checkpoints").glob("*.pt"))


# -------------------------------------------------------------------------------------- variants
def test_actor_drift_funding_curriculum_and_the_floor_of_alpha(tmp_path, monkeypatch):
    added = []
    add = tqc.Replay.add
    monkeypatch.setattr(tqc.Replay, "add", lambda self, state, action: (
        added.append(float(state[tqc.W_COST].max())), add(self, state, action))[1])
    summary = tqc.main(flags(
        tmp_path / "run", policy="actor", position_mode="drift", precision="fp32", funding_bps=-0.5,
        ent_coef="auto_0.1", ent_coef_min=0.09, ent_coef_lr=0.2, w_cost_curriculum=1024))
    check_summary(summary)
    assert summary["updates"] > 0 and summary["device"]["precision"] == "fp32"
    assert added[:8] == [0.0] * 8  # the first episode too
    assert 0 < max(added[8:]) < 1 and max(added[8:]) >= 0.9 * (1024 - 8 * 64) / 1024
    alpha = last_of(tmp_path / "run")["parts"]["learner"]["log_alpha"].exp()
    assert float(alpha) >= 0.09 - 1e-6  # the parameter, not its use alone
    for result in summary["eval"].values():
        assert result["actor"] == result["agent"]
    trace = pd.read_parquet(tmp_path / "run" / "traces" / "test.parquet")
    assert {"position_critic_grid", "equity_critic_grid"} <= set(trace)


def test_files_of_bars_blind_to_the_hmm_are_judged_by_whole_evaluations_of_trained_agents(tmp_path, monkeypatch):
    paths = [write_bars(tmp_path / f"{name}.parquet", f"synthetic:regime?bars=3000&seed={seed}")
             for seed, name in enumerate(("AAA", "BBB"))]
    scores, keep_best, latents_of, limited = [], Run.keep_best, tqc.latents_of, []

    def cut(agent, contexts, rows, until=math.inf):
        limited.extend([1] * (until < math.inf))
        return latents_of(agent, contexts, rows[:200] if len(limited) == 3 else rows, until)

    monkeypatch.setattr(Run, "keep_best", lambda self, score, loop: (
        scores.append(score), keep_best(self, score, loop))[1])
    monkeypatch.setattr(tqc, "latents_of", cut)
    changes = dict(hmm=False, total_timesteps=1536, eval_timeout=1e6)
    summary = tqc.main(flags(tmp_path / "run", data=",".join(map(str, paths)), **changes))
    check_summary(summary, synthetic=False)
    assert summary["data"]["names"] == ["AAA", "BBB"] and len(summary["data"]["columns"]) == 20 + 5
    assert summary["selected_by"] == "mean_reward_bps"
    assert summary["audit"]["attribution_hmm"] == 0
    evaluations = [line["eval/eval/mean_reward_bps"] for line in records(tmp_path / "run")
                   if "eval/eval/mean_reward_bps" in line]
    assert len(evaluations) == 4  # untrained, and three, of which the second is partial
    assert scores == pytest.approx([evaluations[1], np.mean(evaluations[1::2])])
    film = last_of(tmp_path / "run")["parts"]["learner"]["extractor.film.weight"]
    assert film.abs().max() == 0  # zero inputs, zero gradient


def test_the_end_is_evaluated_and_an_evaluation_that_time_cut_short_chooses_nothing(tmp_path, monkeypatch):
    latents_of = tqc.latents_of

    def cut(agent, contexts, rows, until=math.inf):
        return latents_of(agent, contexts, rows[:200] if until < math.inf else rows, until)

    monkeypatch.setattr(tqc, "latents_of", cut)
    summary = tqc.main(flags(tmp_path / "run", total_timesteps=448, learning_starts=448, eval_timeout=1e6))
    steps = [line["global_step"] for line in records(tmp_path / "run") if "eval/eval/score" in line]
    assert steps == [0, 448]
    assert all(result["partial"] for result in summary["eval"].values())
    assert summary["best_step"] == 0 and summary["updates"] == 2
    # the average has no share of the random start: after the first updates it is the learner
    last = last_of(tmp_path / "run")
    assert last["loop"]["stale"] == 1
    for name, weights in last["agent"].items():
        torch.testing.assert_close(weights, last["parts"]["learner"][name])


def test_eval_only_takes_everything_from_the_checkpoint(base, tmp_path, capsys):
    best, trained = base[0] / "checkpoints" / "best.pt", load_summary(base[0])
    plain = dict(eval_only=True, checkpoint=best, report=False, torch_threads=1, cuda=False)
    again = tqc.main(flags_of(plain | {"run_dir": tmp_path / "again"}))
    assert json.loads(json.dumps(again["eval"])) == trained["eval"]
    assert again["audit"]["verdict"] == trained["audit"]["verdict"]
    assert not (tmp_path / "again" / "checkpoints" / "last.pt").exists()
    dear = tqc.main(flags_of(plain | {"run_dir": tmp_path / "dear", "fee_bps": 20, "policy": "actor"}))
    assert "--fee-bps 0.5 there, 20.0 here" in capsys.readouterr().out
    hold, agent = (trained["eval"]["test"]["baselines"]["buy_and_hold"], dear["eval"]["test"])
    assert agent["baselines"]["buy_and_hold"]["mean_reward_bps"] < hold["mean_reward_bps"]
    assert agent["agent"] == agent["actor"]
    with pytest.raises(CheckpointError, match="--d-model 32 there, 64 here"):
        tqc.main(flags_of(plain | {"run_dir": tmp_path / "other", "d_model": 64}))


# ---------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("argv, words", [
    (["--data", "synthetic:regimes"], ["regimes", "regime"]),
    (["--funding", "nowhere.csv"], ["nowhere.csv"]),
    (["--encoder", "nowhere.pt"], ["nowhere.pt"]),
    (["--compile", "--cudagraphs"], ["--cudagraphs"]),
])
def test_a_refusal_is_one_line_exit_code_2_and_no_folder(tmp_path, refusal_of, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    given = argv[0].removeprefix("--").replace("-", "_")
    err = refusal_of(SCRIPT)([*flags(tmp_path / "run", **{given: None} if given in TINY else {}), *argv])
    assert all(word in err for word in words), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong, words", [
    ({name: value}, [f"--{name.replace('_', '-')}"]) for name, value in dict(
        num_envs=0, target_entropy=0.69, gamma=1.5, policy="greedy", weight_decay=-1, learning_starts=-1,
        log_std_init=math.nan, dropout=1, window=1, segment=32, timeout=-3).items()] + [
    (dict(cudagraphs=True), ["--cudagraphs", "--compile"]),
    (dict(top_quantiles_to_drop_per_net=25), ["25", "--n-quantiles"]),
    (dict(batch_size=60), ["--batch-size 60", "--segment 8"]),
    (dict(d_model=33), ["--d-model 33"]),
    (dict(ent_coef="0.1", ent_coef_min=0.2), ["--ent-coef-min 0.2", "0.1"]),
], ids=str)
def test_contradictions_and_bad_values_are_refused(wrong, words):
    refusal(UsageError, tqc.Args, **wrong, words=words)


# ------------------------------------------------------------------------------------------- slow
@pytest.mark.slow
def test_compiled_losses_are_the_eager_ones(tmp_path):
    """Without dropout and noise the first updates agree to rounding."""
    losses = []
    for name, compiled in (("eager", False), ("compiled", True)):
        tqc.main(flags(tmp_path / name, compile=compiled, dropout=0, precision="fp32", total_timesteps=512))
        line = [x for x in records(tmp_path / name) if "losses/qf_loss" in x][0]
        losses.append([line[f"losses/{k}"] for k in ("qf_loss", "grad_norm")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"policy": "actor"}, {"compile": True, "cudagraphs": True}], ids=str)
def test_on_a_gpu_the_loop_never_waits(tmp_path, monkeypatch, changes):
    phase = Run.phase

    def strict(self, name):
        phase(self, name)
        torch.cuda.set_sync_debug_mode("error" if name == "rollout" else "default")

    monkeypatch.setattr(Run, "phase", strict)
    summary = tqc.main(flags(tmp_path / "run", cuda=True, torch_deterministic=False, **changes))
    assert summary["device"]["backend"] == "cuda" and summary["updates"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("data, verdicts, metric, least", [
    ("synthetic:regime", ["healthy"], "score", 0.5),
    ("synthetic:drift", ["constant_is_right", "healthy"], "exposure", 0.8)])
def test_it_learns_a_regime_and_holds_a_drift(tmp_path, data, verdicts, metric, least):
    """The defaults for 200 s."""
    summary = tqc.main(["--timeout", "200", "--data", data, "--run-dir", str(tmp_path / "run")])
    assert summary["audit"]["verdict"] in verdicts, summary["audit"]["reasons"]
    assert summary["eval"]["test"]["agent"][metric] >= least
