"""cleanrl_crypto/tqc_film_batch.py through its real command line, at tiny sizes."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cleanrl_crypto import tqc_film_batch as tqc
from common.data import COLUMNS, load_bars
from common.timeout_guard import load_checkpoint
from runs import SUMMARY, flags_of, load_summary, records

SCRIPT = Path(tqc.__file__)
TINY = dict(
    data="synthetic:regime?bars=3000", d_model=32, n_heads=2, n_layers=1, d_ff=64, window=16, num_envs=64,
    batch_size=64, mae_steps=5, total_timesteps=1024, learning_starts=256, eval_interval=512,
    updates_per_step=2, fusion_width=32, hidden=32, episode_length=8, fee_bps=0.5, slippage_bps=0.0,
    report=False, torch_threads=1, cuda=False,
)
LAST_STEPS = dict(learning_rate=0, learning_rate_fusion=0, learning_rate_film=0)

METRICS = {
    "mean_reward_bps", "total_return", "sharpe", "max_drawdown", "turnover", "exposure", "trades",
}
BASELINES = {"flat", "buy_and_hold", "best_constant", "random_same_turnover"}
AUDIT = {
    "state_dependence", "policy_entropy", "saturation", "greedy_gap", "q_action_spread", "alpha_entropy",
    "attribution", "dead_units", "overestimation", "replay_ratio", "ridge_edge_bps", "ridge_edge_se_bps",
    "verdict", "reasons",
}
LOGGED = {
    "charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/updates", "charts/replay_ratio",
    "charts/learning_rate", "losses/qf_loss", "losses/actor_loss", "losses/grad_norm", "policy/entropy",
    "policy/log_std_mean", "policy/alpha", "policy/action_mean", "policy/state_dependence",
    "policy/saturation", "policy/greedy_gap", "value/q_mean", "value/q_action_spread",
    "value/quantile_spread", "value/overestimation", "env/turnover", "env/exposure", "env/costs",
    "time/learn", "time/rollout", "eval/eval/mean_reward_bps", "eval/test/mean_reward_bps",
    "eval/train/mean_reward_bps", "eval/eval/score", "eval/eval/turnover",
}


flags = partial(flags_of, TINY)


def command(run_dir, **changes):
    """The script as a process of its own: (exit code, stdout, stderr)."""
    done = subprocess.run([sys.executable, str(SCRIPT), *flags(run_dir, **changes)], cwd=run_dir.parent,
                          capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def refused(refusal_of):
    return refusal_of(SCRIPT)


def check_summary(summary, updates=True):
    """Every key of the contract's table, with values that can be."""
    assert SUMMARY <= set(summary)
    assert summary["status"] in ("finished", "timeout", "interrupted")
    steps = summary["global_step"]
    assert not updates or (summary["updates"] > 0 and summary["sps"] is None or summary["sps"] > 0)
    assert summary["replay_ratio"] == pytest.approx(summary["updates"] / max(steps, 1))
    assert summary["samples_per_transition"] == pytest.approx(
        summary["updates"] * TINY["batch_size"] / max(steps, 1))
    assert sum(summary["phases"].values()) == pytest.approx(summary["wall_seconds"], rel=0.02)
    assert {"setup", "pretrain", "rollout", "learn", "eval", "io"} - {"rollout", "learn"} <= set(summary["phases"])
    assert all(seconds >= 0 for seconds in summary["phases"].values())
    synthetic = summary["data"]["spec"].startswith("synthetic")
    baselines = BASELINES | ({"optimum"} if synthetic else set())
    names = METRICS | ({"mean_expected_bps"} if synthetic else set())
    assert set(summary["eval"]) == {"train", "eval", "test"}
    for split, result in summary["eval"].items():
        assert set(result["baselines"]) == baselines
        assert ("score" in result["agent"]) == synthetic
        for who, metrics in {"agent": result["agent"], **result["baselines"]}.items():
            assert names <= set(metrics), (split, who)
            assert all(v is None or math.isfinite(v) for v in metrics.values()), (split, who)
            assert -1 <= metrics["max_drawdown"] <= 0 and 0 <= metrics["turnover"] <= 2
            assert -1 <= metrics["exposure"] <= 1 and isinstance(metrics["trades"], int)
        assert all(v == 0 for v in result["baselines"]["flat"].values())
        assert result["baselines"]["buy_and_hold"]["exposure"] == 1
        start, stop = result["rows"]
        if not result["partial"]:
            assert [start, stop] == list(summary["data"]["rows"][split])
    if synthetic:  # nobody beats the optimum by more than a rounding
        for result in summary["eval"].values():
            best = result["baselines"]["optimum"]["mean_expected_bps"]
            assert all(x["mean_expected_bps"] < 1.15 * best for x in result["baselines"].values())
    audit = summary["audit"]
    assert AUDIT <= set(audit)
    assert audit["verdict"] in ("healthy", "collapsed", "constant_is_right", "untrained")
    assert audit["reasons"] and all(isinstance(reason, str) and reason for reason in audit["reasons"])
    assert set(audit["attribution"]) == {"technical", "hmm", "position", "w_cost"}
    assert 0 <= audit["state_dependence"] <= 1 and 0 <= audit["saturation"] <= 1
    assert {"torch", "numpy", "numba", "gymnasium", "python"} <= set(summary["versions"])
    assert summary["versions"]["torch"] == torch.__version__
    assert len(summary["data"]["sha256"]) == 64 and int(summary["data"]["sha256"], 16)


def check_files(run_dir):
    for name in ("args.json", "metrics.jsonl", "summary.json", "encoder.pt", "checkpoints/last.pt",
                 "checkpoints/best.pt", "traces/train.parquet", "traces/eval.parquet", "traces/test.parquet"):
        assert (run_dir / name).stat().st_size > 0, name
    assert list(run_dir.glob("events.out.tfevents.*"))
    assert not list(run_dir.rglob("*.tmp"))
    for name in ("encoder.pt", "checkpoints/last.pt", "checkpoints/best.pt"):
        assert isinstance(torch.load(run_dir / name, weights_only=True), dict)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The command line once, with the report: its run directory and what it printed."""
    run_dir = tmp_path_factory.mktemp("base") / "run"
    code, out, err = command(run_dir, total_timesteps=2048, report=True)
    assert code == 0, err
    return run_dir, out, err


# ---------------------------------------------------------------------------------------- the command line
def test_run_directory_is_complete(base):
    run_dir, out, err = base
    check_files(run_dir)
    page = (run_dir / "report.html").read_text()
    assert "<html" in page and "data:image" in page or "<svg" in page
    args = json.loads((run_dir / "args.json").read_text())
    assert set(args) == set(tqc.Args.__dataclass_fields__) and args["d_model"] == 32 and args["report"] is True
    assert "Traceback" not in err
    assert "optimum" in out and "buy_and_hold" in out and str(run_dir) in out


def test_summary_holds_every_key_of_the_contract(base):
    summary = load_summary(base[0])
    check_summary(summary)
    assert summary["status"] == "finished" and summary["global_step"] == 2048
    # 2 updates at every vector step from the first one with learning_starts transitions in the buffer
    assert summary["updates"] == 2 * (2048 - 256 + 64) // 64
    assert summary["env_builds"] == 1 and summary["buffer_allocations"] > 0
    assert summary["mae_steps"] == 5
    assert summary["device"]["torch"] == "cpu" and summary["device"]["threads"] == 1
    assert summary["data"]["sha256"] == load_bars(TINY["data"]).sha256


def test_score_is_the_share_of_the_optimum(base):
    for result in load_summary(base[0])["eval"].values():
        best = result["baselines"]["optimum"]["mean_expected_bps"]
        assert result["agent"]["score"] == pytest.approx(result["agent"]["mean_expected_bps"] / best)
        assert best > max(result["baselines"][k]["mean_expected_bps"] for k in BASELINES)


def test_metrics_are_json_lines_in_order_with_the_names_of_the_contract(base):
    lines = records(base[0])
    steps = [line["global_step"] for line in lines]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == 2048
    assert all(line["wall"] >= 0 for line in lines)
    seen = {key for line in lines for key in line}
    assert not LOGGED - seen
    # an episode of 8 bars is truncated at 8
    assert {line["charts/episodic_length"] for line in lines if "charts/episodic_length" in line} == {8.0}
    assert [line["charts/updates"] for line in lines if "charts/updates" in line][-1] == 58


def test_tensorboard_holds_what_metrics_jsonl_holds(base):
    run_dir, *_ = base
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    wanted = {}
    for line in records(run_dir):
        for key, value in line.items():
            if key not in ("global_step", "wall") and value is not None:
                wanted.setdefault(key, []).append((line["global_step"], value))
    assert set(events.Tags()["scalars"]) == set(wanted)
    for key, values in wanted.items():
        found = events.Scalars(key)
        assert [e.step for e in found] == [step for step, _ in values], key
        np.testing.assert_allclose([e.value for e in found], [v for _, v in values], rtol=1e-6, err_msg=key)


def test_traces_tell_what_the_summary_says(base):
    run_dir, *_ = base
    summary, bars = load_summary(run_dir), load_bars(TINY["data"])
    for split, result in summary["eval"].items():
        trace = pd.read_parquet(run_dir / "traces" / f"{split}.parquet")
        start, stop = result["rows"]
        np.testing.assert_array_equal(trace["timestamp"].to_numpy().astype("datetime64[ns]"),
                                      bars.timestamp[start:stop])
        np.testing.assert_array_equal(trace["close"], bars.close[start:stop])
        np.testing.assert_array_equal(trace["next_return"], bars.next_return[start:stop])
        np.testing.assert_array_equal(trace["expected"], bars.truth.expected[start:stop])
        assert {"signal", "regime", "q_spread", "position_actor", "equity_actor"} <= set(trace.columns)
        everyone = {"": result["agent"], "_actor": result["actor"]}
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


def test_flat_on_the_grid_is_exactly_flat(base):
    # -1e-8 instead of 0 makes one trade and an annual Sharpe ratio of 8 out of doing nothing
    grid = load_checkpoint(base[0] / "checkpoints" / "best.pt")["agent"]["grid"]
    assert grid[len(grid) // 2] == 0 and grid[0] == -1 and grid[-1] == 1


def test_film_learned_something(base):
    learner = load_checkpoint(base[0] / "checkpoints" / "last.pt")["learner"]
    assert learner["extractor.film.weight"].abs().max() > 0


def test_a_short_timeout_ends_cleanly_before_it(tmp_path):
    began, before = time.monotonic(), os.times()
    code, out, err = command(tmp_path / "run", total_timesteps=10**9, patience=0, timeout=30)
    seconds, after = time.monotonic() - began, os.times()
    assert code == 0, err
    check_files(tmp_path / "run")
    summary = load_summary(tmp_path / "run")
    check_summary(summary, updates=False)
    assert summary["status"] == "timeout" and summary["global_step"] < 10**9
    tqc.load_policy(tmp_path / "run" / "checkpoints" / "best.pt")
    worked = after.children_user + after.children_system - before.children_user - before.children_system
    if seconds > 30 and worked < 0.6 * seconds:
        pytest.skip(f"{worked:.0f} s of work in {seconds:.0f} s: this machine is too busy to keep a deadline")
    assert seconds < 30 and summary["wall_seconds"] < 30
    assert summary["updates"] > 0


def test_a_timeout_shorter_than_the_set_up_still_leaves_a_checkpoint(tmp_path):
    summary = tqc.main(flags(tmp_path / "run", timeout=1, mae_steps=50))
    assert summary["status"] == "timeout" and summary["exit_code"] == 0
    check_files(tmp_path / "run")
    check_summary(load_summary(tmp_path / "run"), updates=False)
    tqc.load_policy(tmp_path / "run" / "checkpoints" / "best.pt")


def test_copied_alone_it_says_what_to_copy(tmp_path):
    alone = tmp_path / "elsewhere" / SCRIPT.name
    alone.parent.mkdir()
    shutil.copy(SCRIPT, alone)
    done = subprocess.run([sys.executable, str(alone)], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "copy" in done.stderr and "common" in done.stderr


# ------------------------------------------------------------------------------------------- one process
def test_main_twice_in_one_process(tmp_path):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    builds, results = tqc.MarketVectorEnv.builds, []
    for name in ("a", "b"):
        began = time.monotonic()
        summary = tqc.main(flags(tmp_path / name))
        # each run's own guard: its wall clock is this call's, not the process's
        assert summary["wall_seconds"] <= time.monotonic() - began
        assert summary["wall_seconds"] == pytest.approx(time.monotonic() - began, rel=0.1)
        assert summary["phases"]["setup"] < summary["wall_seconds"]
        check_files(tmp_path / name)
        written = load_summary(tmp_path / name)
        check_summary(written)
        assert {k for k in summary if k not in ("run_dir", "exit_code")} == set(written)
        assert written["eval"] == json.loads(json.dumps(summary["eval"]))
        results.append(summary)
    first, second = results
    assert tqc.MarketVectorEnv.builds == builds + 2
    assert first["env_builds"] >= 1 and second["env_builds"] >= 1
    # the second environment takes the buffers that the first gave back
    assert second["buffer_allocations"] in (0, first["buffer_allocations"])
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    # and the same flags give the same bits
    assert second["eval"] == first["eval"]
    a, b = (load_checkpoint(tmp_path / x / "checkpoints" / "last.pt")["learner"] for x in ("a", "b"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_another_seed_gives_another_run(tmp_path, base):
    tqc.main(flags(tmp_path / "run", seed=2, total_timesteps=512))
    a = load_checkpoint(tmp_path / "run" / "encoder.pt")["encoder"]
    b = load_checkpoint(base[0] / "encoder.pt")["encoder"]
    assert not torch.equal(a["embed.weight"], b["embed.weight"])


# ---------------------------------------------------------------------------------------------- variants
def test_actor_and_drift_and_fp32(tmp_path):
    summary = tqc.main(flags(tmp_path / "run", policy="actor", position_mode="drift", precision="fp32"))
    check_summary(load_summary(tmp_path / "run"))
    assert summary["updates"] > 0 and summary["device"]["precision"] == "fp32"
    config = load_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt")["config"]
    assert config["policy"] == "actor" and config["drift"] is True
    for result in summary["eval"].values():
        assert {k: result["actor"][k] for k in METRICS} == {k: result["agent"][k] for k in METRICS}
    trace = pd.read_parquet(tmp_path / "run" / "traces" / "test.parquet")
    assert {"position_critic_grid", "equity_critic_grid"} <= set(trace)
    # a drifting +1 stays +1, a drifting half does not: what is held before a trade is not what was traded to
    position, ret = trace["position"].to_numpy(), trace["next_return"].to_numpy()
    held = np.concatenate([[0.0], (position * (1 + ret) / (1 + position * ret))[:-1]])
    turnover = np.abs(position - held).mean()
    assert summary["eval"]["test"]["agent"]["turnover"] == pytest.approx(turnover, rel=1e-9)
    assert turnover != pytest.approx(np.abs(np.diff(position, prepend=0)).mean(), rel=1e-9)


def test_no_hmm_blinds_the_agent_and_evaluation_keeps_to_it(tmp_path):
    summary = tqc.main(flags(tmp_path / "run", hmm=False))
    check_summary(load_summary(tmp_path / "run"))
    assert summary["audit"]["attribution"]["hmm"] == 0
    assert summary["data"]["columns"][-5:] == ["hmm_p0", "hmm_p1", "hmm_p2", "hmm_p3", "hmm_entropy"]
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert state["learner"]["extractor.film.weight"].abs().max() == 0  # zero inputs, zero gradient
    # an agent that never saw the columns must not be shown them, whatever the flags of the evaluation
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    try:
        again = tqc.main(flags(tmp_path / "again", eval_only=True, checkpoint=best))
    except ValueError as error:
        assert "hmm" in str(error)
    else:
        assert again["eval"] == summary["eval"]


def test_no_film_appends_the_columns(tmp_path):
    summary = tqc.main(flags(tmp_path / "run", film=False))
    check_summary(load_summary(tmp_path / "run"))
    agent = load_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt")["agent"]
    assert not [k for k in agent if "film" in k]
    assert agent["extractor.market.weight"].shape == (32, 16 * 32 + 5)
    assert summary["updates"] > 0


def test_embedding_cache_off_evaluates_the_same(base, tmp_path):
    run_dir, *_ = base
    trained = load_summary(run_dir)
    again = tqc.main(flags(tmp_path / "off", embedding_cache="off", eval_only=True,
                           checkpoint=run_dir / "checkpoints" / "best.pt"))
    assert again["device"]["embedding_cache_bytes"] == 0 < trained["device"]["embedding_cache_bytes"]
    for split, result in trained["eval"].items():
        for who in ("agent", "critic_grid", "actor"):
            mine, other = result[who], again["eval"][split][who]
            assert other["mean_reward_bps"] == pytest.approx(mine["mean_reward_bps"], abs=0.05)
            assert other["turnover"] == pytest.approx(mine["turnover"], rel=0.02, abs=1e-3)
        assert again["eval"][split]["baselines"]["optimum"] == result["baselines"]["optimum"]


def test_training_without_the_embedding_cache(tmp_path):
    summary = tqc.main(flags(tmp_path / "run", embedding_cache="off", total_timesteps=512))
    check_summary(load_summary(tmp_path / "run"))
    assert summary["updates"] == 2 * (512 - 256 + 64) // 64


def test_patience_stops_early(tmp_path, capsys):
    # nothing learns, so the first evaluation after an update stays the best
    summary = tqc.main(flags(tmp_path / "run", patience=1, total_timesteps=10**6, reward_scaling=False,
                             **LAST_STEPS))
    assert summary["global_step"] == 1024 and summary["best_step"] == 512
    assert summary["status"] == "finished" and summary["exit_code"] == 0
    assert "--patience" in capsys.readouterr().out


def test_no_update_is_called_untrained(tmp_path):
    summary = tqc.main(flags(tmp_path / "run", total_timesteps=0, mae_steps=0))
    check_files(tmp_path / "run")
    check_summary(load_summary(tmp_path / "run"), updates=False)
    assert summary["updates"] == 0 and summary["audit"]["verdict"] == "untrained"


def write_bars(path, spec):
    bars = load_bars(spec)
    frame = pd.DataFrame(bars.ohlcv[0], columns=COLUMNS[1:])
    frame.insert(0, "timestamp", pd.DatetimeIndex(bars.timestamp).tz_localize("UTC"))
    frame.to_parquet(path, index=False)


def test_several_files_of_bars(tmp_path):
    for seed, name in enumerate(("AAA", "BBB")):
        write_bars(tmp_path / f"{name}.parquet", f"synthetic:regime?bars=3000&seed={seed}")
    summary = tqc.main(flags(tmp_path / "run", data=f"{tmp_path}/AAA.parquet,{tmp_path}/BBB.parquet"))
    check_files(tmp_path / "run")
    check_summary(load_summary(tmp_path / "run"))
    assert summary["data"]["names"] == ["AAA", "BBB"] and len(summary["data"]["columns"]) == 20 + 5
    assert summary["selected_by"] == "mean_reward_bps"
    assert load_checkpoint(tmp_path / "run" / "encoder.pt")["encoder"]["embed.weight"].shape == (32, 20)
    trace = pd.read_parquet(tmp_path / "run" / "traces" / "test.parquet")
    assert not {"expected", "signal", "regime", "position_optimum"} & set(trace)


# ---------------------------------------------------------------------------------------------- refusals
def test_a_refusal_is_one_line_and_exit_code_2(tmp_path):
    code, out, err = command(tmp_path / "run", data=tmp_path / "missing.parquet")
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and "missing.parquet" in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_an_unknown_flag_names_its_neighbour(tmp_path, refused):
    err = refused([*flags(tmp_path / "run"), "--learning-rat", "1"])
    assert "--learning-rat" in err and "--learning-rate" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag, value", [
    ("--num-envs", "0"), ("--num-envs", "many"), ("--gamma", "1.5"), ("--gamma", "nan"), ("--timeout", "-3"),
    ("--policy", "greedy"), ("--precision", "fp16"), ("--ent-coef", "auto_x"), ("--ent-coef", "-1"),
    ("--ent-coef", "auto_0"), ("--n-heads", "0"), ("--d-model", "0"), ("--d-ff", "0"), ("--hidden", "0"),
    ("--fusion-width", "0"), ("--seed", "-1"), ("--weight-decay", "-1"), ("--mae-learning-rate", "-1"),
    ("--reward-clip", "0"), ("--learning-starts", "-1"), ("--log-std-init", "nan"),
    ("--w-cost-curriculum", "-1"), ("--torch-threads", "0"), ("--ent-coef-min", "-1"),
    ("--dropout", "1"), ("--window", "1"), ("--mae-mask", "0"),
])
def test_a_bad_value_is_refused_with_its_flag(tmp_path, refused, flag, value):
    name = flag.removeprefix("--").replace("-", "_")
    argv = [x for x in flags(tmp_path / "run", total_timesteps=0, **{name: None})]
    assert flag in refused([*argv, flag, value])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes, words", [
    (dict(eval_only=True), ["--eval-only", "--checkpoint"]),
    (dict(checkpoint="x.pt"), ["--eval-only", "--checkpoint"]),
    (dict(cudagraphs=True), ["--cudagraphs", "--compile"]),
    (dict(cudagraphs=True, compile=True), ["--cudagraphs", "CUDA"]),
    (dict(backend="cuda"), ["--backend", "CUDA"]),
    (dict(resume="auto", run_dir=None), ["--resume", "--run-dir"]),
    (dict(top_quantiles_to_drop_per_net=25), ["--top-quantiles-to-drop-per-net", "25", "--n-quantiles"]),
    (dict(batch_size=60), ["--batch-size", "60", "--segment", "8"]),
    (dict(d_model=33), ["--d-model", "33", "--n-heads", "2"]),
    (dict(action_grid=20), ["--action-grid", "20", "odd"]),
    (dict(ent_coef="0.1", ent_coef_min=0.2), ["--ent-coef-min", "0.2", "0.1"]),
    (dict(data="synthetic:regimes"), ["regimes", "regime"]),
    (dict(data="synthetic:regime?bar=3000"), ["bar", "bars"]),
    (dict(data="bars.txt"), ["bars.txt", ".parquet"]),
    (dict(data="synthetic:regime?bars=500"), ["500"]),
    (dict(split="0.5/0.5"), ["0.5/0.5"]),
    (dict(split="0.98/0.01/0.01"), ["0.98/0.01/0.01"]),
    (dict(encoder="nowhere.pt"), ["nowhere.pt"]),
    (dict(eval_only=True, checkpoint="nowhere.pt"), ["nowhere.pt"]),
    (dict(resume="nowhere.pt"), ["nowhere.pt"]),
])
def test_contradictions_and_bad_inputs_are_refused(tmp_path, refused, monkeypatch, changes, words):
    if changes.get("backend") == "cuda" or changes.get("cudagraphs"):
        if torch.cuda.is_available():
            pytest.skip("this machine has what the refusal misses")
    monkeypatch.chdir(tmp_path)
    err = refused(flags(tmp_path / "run", **changes))
    assert all(word in err for word in words), err
    assert not (tmp_path / "run").exists() and not (tmp_path / "runs").exists()


def test_choosing_by_expected_reward_needs_a_synthetic_market(tmp_path, refused):
    write_bars(tmp_path / "AAA.parquet", "synthetic:regime?bars=3000")
    err = refused(flags(tmp_path / "run", data=tmp_path / "AAA.parquet", select="expected"))
    assert "--select" in err
    assert not (tmp_path / "run").exists()


def test_a_bad_row_of_a_file_is_named(tmp_path, refused):
    write_bars(tmp_path / "AAA.parquet", "synthetic:regime?bars=3000")
    frame = pd.read_parquet(tmp_path / "AAA.parquet")
    frame.loc[1234, "high"] = frame.loc[1234, "low"] / 2
    frame.to_parquet(tmp_path / "AAA.parquet", index=False)
    err = refused(flags(tmp_path / "run", data=tmp_path / "AAA.parquet"))
    assert "AAA.parquet" in err and "1234" in err and "high" in err
    assert not (tmp_path / "run").exists()


def test_a_run_directory_in_use_is_not_overwritten(base, refused):
    run_dir, *_ = base
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
    err = refused(flags(run_dir))
    assert "--run-dir" in err and "--resume auto" in err
    assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")} == before


def test_a_run_directory_that_is_a_file_is_refused(tmp_path, refused):
    (tmp_path / "run").write_text("not a folder")
    assert "--run-dir" in refused(flags(tmp_path / "run"))


def test_tracking_without_wandb_is_refused(tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it raises ImportError
    assert "wandb" in refused(flags(tmp_path / "run", track=True))
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------- slow
def learn(tmp_path, *more):
    """The defaults of the command line for 200 s: its summary."""
    argv = [sys.executable, str(SCRIPT), "--timeout", "200", "--run-dir", str(tmp_path / "run"), *more]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return load_summary(tmp_path / "run")


@pytest.mark.slow
def test_it_learns_the_regime_market(tmp_path):
    summary = learn(tmp_path)
    assert summary["audit"]["verdict"] == "healthy", summary["audit"]["reasons"]
    assert summary["eval"]["test"]["agent"]["score"] >= 0.5
    assert summary["audit"]["state_dependence"] > 0.3


@pytest.mark.slow
def test_on_the_drift_market_it_holds(tmp_path):
    summary = learn(tmp_path, "--data", "synthetic:drift")
    assert summary["audit"]["verdict"] in ("constant_is_right", "healthy")
    assert summary["eval"]["test"]["agent"]["exposure"] > 0.8
