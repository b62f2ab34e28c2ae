"""Checkpoints of tqc_film_batch.py: real kills, real signals, the same bits afterwards, policies in another program."""

import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cleanrl_crypto import tqc_film_batch as tqc
from common.timeout_guard import CheckpointError, load_checkpoint
from runs import assert_same, flags_of, wait_until

SCRIPT = Path(tqc.__file__)
TINY = dict(
    data="synthetic:regime?bars=3000", d_model=32, n_heads=2, n_layers=1, d_ff=64, window=16, num_envs=64,
    batch_size=64, mae_steps=5, total_timesteps=2048, learning_starts=256, eval_interval=512,
    updates_per_step=2, fusion_width=32, hidden=32, episode_length=8, fee_bps=0.2, slippage_bps=0.0,
    turnover_penalty_bps=0.0, cost_randomization=0.5, w_cost_curriculum=1500, checkpoint_interval=0.3,
    report=False, torch_threads=1, cuda=False,
)
# three runs, so that the default precision, both policies, both position modes and both FiLM modes are covered
GRID = dict()
ACTOR = dict(policy="actor", precision="fp32", ent_coef="auto_0.1", counterfactuals=1)
DRIFT = dict(position_mode="drift", precision="fp32", film=False, checkpoint_interval=0.0, keep_checkpoints=2)
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


flags = partial(flags_of, TINY)


def start(run_dir, **changes):
    return subprocess.Popen([sys.executable, str(SCRIPT), *flags(run_dir, **changes)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def kill(child):
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL, "the run ended before it was killed"


def logged(run_dir, text):
    """Whether metrics.jsonl holds `text` by now."""
    path = run_dir / "metrics.jsonl"
    return path.exists() and text in path.read_text()


def reached(run_dir, step):
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return any(json.loads(line)["global_step"] >= step for line in lines)


def untimed(line: str) -> dict:
    return {k: v for k, v in json.loads(line).items()
            if k not in ("wall", "charts/SPS") and not k.startswith("time/")}


def metrics(run_dir) -> list[dict]:
    text = (run_dir / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [untimed(line) for line in text.splitlines()]


def assert_same_run(a, b):
    """Two run directories hold the same agent, learner, optimisers, environment, replay and metrics."""
    for name in ("last.pt", "best.pt"):
        one, two = (load_checkpoint(x / "checkpoints" / name) for x in (a, b))
        for state in (one, two):
            del state["args"]  # the run directory's name, --resume
        assert_same(one, two, name)
    assert_same(load_checkpoint(a / "encoder.pt"), load_checkpoint(b / "encoder.pt"), "encoder.pt")
    assert metrics(a) == metrics(b)
    one, two = (json.loads((x / "summary.json").read_text()) for x in (a, b))
    for key in ("status", "global_step", "updates", "best_step", "eval", "audit"):
        assert one[key] == two[key], key


def refused(monkeypatch, capfd, argv):
    """Exit code 2 and one line on stderr from the script's own __main__, in this process; returns the line."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, argv)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    err = capfd.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "Traceback" not in err, err
    return err


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs by name, each made when it is first asked for: (run directory, summary)."""
    made, root = {}, tmp_path_factory.mktemp("whole")

    def get(name, changes):
        if name not in made:
            made[name] = root / name, tqc.main(flags(root / name, **changes))
        return made[name]

    return get


@pytest.fixture
def grid(whole):
    return whole("grid", GRID)


@pytest.fixture
def actor(whole):
    return whole("actor", ACTOR)


@pytest.fixture
def drift(whole):
    return whole("drift", DRIFT)


# --------------------------------------------------------------------------------------- killed, resumed
@POSIX
def test_killed_twice_and_resumed_it_has_the_bits_of_the_uninterrupted_run(grid, run_dir):
    # first while it pre-trains, before there is any checkpoint
    child = start(run_dir, **GRID, mae_steps=100_000, resume="auto")
    wait_until(child, lambda: logged(run_dir, "losses/mae"))
    kill(child)
    assert not (run_dir / "checkpoints" / "last.pt").exists()
    # then at some moment after the first checkpoint
    child, delay = start(run_dir, **GRID, resume="auto"), random.uniform(0, 0.5)
    wait_until(child, (run_dir / "checkpoints" / "last.pt").exists)
    time.sleep(delay)
    kill(child)
    print(f"killed {delay:.3f} s after the first checkpoint")
    step = load_checkpoint(run_dir / "checkpoints" / "last.pt")["global_step"]
    assert 0 < step < 2048
    with open(run_dir / "metrics.jsonl", "a") as f:  # what it wrote after the checkpoint, the last line torn
        f.write(json.dumps({"global_step": 2000, "wall": 1.0, "losses/qf_loss": 123.0}) + "\n")
        f.write('{"global_step": 2048, "wall": 1.2, "losses/qf_l')
    summary = tqc.main(flags(run_dir, **GRID, resume="auto"))
    assert summary["status"] == "finished" and summary["exit_code"] == 0
    assert_same_run(grid[0], run_dir)
    assert not list(run_dir.rglob("*.tmp"))


@POSIX
@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(3))
def test_kills_at_random_moments(grid, run_dir, attempt):
    for n in range(20):
        child, delay = start(run_dir, **GRID, resume="auto"), random.uniform(0.5, 12)
        try:
            out, err = child.communicate(timeout=delay)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            print(f"kill {n} after {delay:.2f} s")
        else:
            assert child.returncode == 0, err
            break
    else:
        tqc.main(flags(run_dir, **GRID, resume="auto"))
    assert_same_run(grid[0], run_dir)


def test_a_finished_run_that_is_resumed_stays_as_it_is(grid, run_dir):
    shutil.copytree(grid[0], run_dir, dirs_exist_ok=True)
    tqc.main(flags(run_dir, **GRID, resume="auto"))
    assert_same_run(grid[0], run_dir)


@POSIX
@pytest.mark.parametrize("signum, code, name, changes", [
    (signal.SIGTERM, 143, "actor", ACTOR), (signal.SIGINT, 130, "drift", DRIFT)])
def test_a_signal_leaves_a_checkpoint_that_resumes_to_the_same_bits(whole, run_dir, signum, code, name, changes):
    child = start(run_dir, **changes)
    wait_until(child, lambda: reached(run_dir, 512))
    child.send_signal(signum)
    out, err = child.communicate(timeout=400)
    assert child.returncode == code and "Traceback" not in err, err
    state = load_checkpoint(run_dir / "checkpoints" / "last.pt")
    assert 512 <= state["global_step"] < 2048 and state["updates"] > 0
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "interrupted" and summary["global_step"] == state["global_step"]
    assert set(summary["eval"]) == {"train", "eval", "test"}
    tqc.load_policy(run_dir / "checkpoints" / "best.pt")
    tqc.main(flags(run_dir, **changes, resume="auto"))
    assert_same_run(whole(name, changes)[0], run_dir)


@POSIX
def test_a_signal_while_it_pre_trains_leaves_a_loadable_checkpoint(run_dir):
    def interrupt():
        deadline = time.monotonic() + 400
        while not logged(run_dir, "losses/mae") and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)  # the guard's handler is installed: metrics.jsonl is there

    thread = threading.Thread(target=interrupt)
    thread.start()
    summary = tqc.main(flags(run_dir, mae_steps=10**6))
    thread.join()
    assert summary["exit_code"] == 143 and summary["status"] == "interrupted" and summary["updates"] == 0
    for name in ("last.pt", "best.pt"):
        load_checkpoint(run_dir / "checkpoints" / name)
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "interrupted"
    # an encoder that was cut off half way is not used as it is, and the averaged agent starts where the learner does
    again = tqc.main(flags(run_dir, resume="auto", total_timesteps=0))
    assert again["status"] == "finished" and again["mae_steps"] == TINY["mae_steps"]
    state = load_checkpoint(run_dir / "checkpoints" / "last.pt")
    assert_same(state["agent"], state["learner"])


def copy_of(run, run_dir):
    shutil.copytree(run, run_dir)
    return run_dir


def test_a_finished_run_goes_on_with_more_transitions(grid, run_dir):
    copy_of(grid[0], run_dir)
    summary = tqc.main(flags(run_dir, **GRID, resume="auto", total_timesteps=2560))
    assert summary["global_step"] == 2560 and summary["updates"] == grid[1]["updates"] + 16
    steps = [line["global_step"] for line in metrics(run_dir)]
    assert steps == sorted(steps) and steps[-1] == 2560


def test_resume_from_a_path_into_a_new_run_directory(grid, run_dir):
    last = grid[0] / "checkpoints" / "last.pt"
    summary = tqc.main(flags(run_dir, **GRID, resume=last, total_timesteps=2560))
    assert summary["status"] == "finished" and summary["global_step"] == 2560
    assert load_checkpoint(run_dir / "checkpoints" / "last.pt")["global_step"] == 2560
    steps = [line["global_step"] for line in metrics(run_dir)]
    assert steps == sorted(steps)


@pytest.mark.parametrize("changes", [
    dict(learning_rate=0, learning_rate_fusion=0, learning_rate_film=0),
    dict(dropout=0.5), dict(ent_coef_min=0.25), dict(ent_coef_lr=0.5), dict(weight_decay=0.5),
], ids=lambda x: next(iter(x)))
def test_a_flag_changed_at_resume_is_obeyed_or_refused_but_never_ignored(grid, run_dir, changes):
    copy_of(grid[0], run_dir)
    before = load_checkpoint(run_dir / "checkpoints" / "last.pt")
    try:
        tqc.main(flags(run_dir, **GRID, resume="auto", total_timesteps=2560, **changes))
    except ValueError as error:
        assert all(f"--{k.replace('_', '-')}" in str(error) for k in changes)
        return
    after = load_checkpoint(run_dir / "checkpoints" / "last.pt")
    if "learning_rate" in changes:
        a, b = before["learner"], after["learner"]
        moved = [k for k in a if not torch.equal(a[k], b[k])]
        assert not [k for k in moved if k.startswith(("critic.", "actor.", "extractor."))]
    elif "ent_coef_lr" in changes:
        assert after["optimizers"]["alpha"]["param_groups"][0]["lr"] == 0.5
    elif "weight_decay" in changes:
        assert after["optimizers"]["critic"]["param_groups"][0]["weight_decay"] == 0.5
    else:
        assert {k: after["config"][k] for k in changes} == changes


# ---------------------------------------------------------------------------------------------- refusals
OTHER = dict(
    seed=2, data="synthetic:regime?bars=3001", split="0.6/0.2/0.2", fill_limit=3, window=8, hmm=False,
    film=False, num_envs=32, episode_length=9, fee_bps=0.3, slippage_bps=0.1, funding_bps=0.1,
    position_mode="drift", turnover_penalty_bps=1.0, cost_randomization=0.1, d_model=16, n_heads=4, n_layers=2,
    d_ff=32, policy="actor", action_grid=5, n_critics=1, n_quantiles=5, top_quantiles_to_drop_per_net=1,
    fusion_width=16, hidden=16, recency=2.0, reward_scaling=False, reward_clip=5.0, gamma=0.9, buffer_size=9999,
)


def test_resume_with_other_shaping_flags_is_refused_with_both_values(grid, run_dir):
    copy_of(grid[0], run_dir)
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    assert set(tqc.SHAPING) <= set(OTHER)
    made_with = load_checkpoint(run_dir / "checkpoints" / "last.pt")["args"]
    for key, value in OTHER.items():
        with pytest.raises(ValueError) as error:
            tqc.main(flags(run_dir, **(GRID | {key: value}), resume="auto"))
        line = str(error.value)
        assert f"--{key.replace('_', '-')} {made_with[key]}" in line and str(value) in line, line
        assert "\n" not in line
    with pytest.raises(ValueError) as error:
        tqc.main(flags(run_dir, **(GRID | OTHER), resume="auto"))
    assert all(f"--{key.replace('_', '-')} {made_with[key]}" in str(error.value) for key in OTHER)
    assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before


def test_resume_from_the_agent_alone_is_refused(grid, run_dir, monkeypatch, capfd):
    best = grid[0] / "checkpoints" / "best.pt"
    line = refused(monkeypatch, capfd, flags(run_dir, **GRID, resume=best))
    assert "best.pt" in line and "last.pt" in line
    assert not run_dir.exists()


def truncated(path, grid):
    path.write_bytes((grid / "checkpoints" / "last.pt").read_bytes()[:-5000])


def text(path, grid):
    path.write_text("not a checkpoint")


def empty(path, grid):
    path.write_bytes(b"")


def saved_list(path, grid):
    torch.save([1, 2, 3], path)


def other_schema(path, grid):
    torch.save(load_checkpoint(grid / "checkpoints" / "last.pt") | {"schema": 99}, path)


def other_script(path, grid):
    torch.save({"schema": 1, "args": {}, "agent": {}, "global_step": 3, "replay": {}}, path)


def encoder(path, grid):
    shutil.copy(grid / "encoder.pt", path)


@pytest.mark.parametrize("make", [truncated, text, empty, saved_list, other_schema, other_script, encoder])
def test_a_file_that_is_no_checkpoint_is_refused(grid, tmp_path, run_dir, monkeypatch, capfd, make):
    path = tmp_path / "strange.pt"
    make(path, grid[0])
    with pytest.raises(CheckpointError, match=r"strange\.pt"):
        tqc.load_policy(path)
    for changes in (dict(resume=path), dict(eval_only=True, checkpoint=path)):
        assert "strange.pt" in refused(monkeypatch, capfd, flags(run_dir, **GRID, **changes))
    assert not run_dir.exists()


def test_resume_auto_refuses_a_broken_last_checkpoint_and_keeps_it(grid, run_dir, monkeypatch, capfd):
    copy_of(grid[0], run_dir)
    truncated(run_dir / "checkpoints" / "last.pt", grid[0])
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    assert "last.pt" in refused(monkeypatch, capfd, flags(run_dir, **GRID, resume="auto"))
    assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before


# ------------------------------------------------------------------------------------ what a checkpoint is
def test_every_checkpoint_loads_with_weights_only(drift):
    paths = sorted(drift[0].rglob("*.pt"))
    assert {p.name for p in paths} >= {"encoder.pt", "last.pt", "best.pt"}
    for path in paths:
        assert isinstance(torch.load(path, weights_only=True), dict)


def test_rotation_keeps_the_last_k(drift, grid):
    # checkpoint_interval 0: one after every vector step of 64 transitions
    steps = sorted(int(p.stem.removeprefix("step_")) for p in (drift[0] / "checkpoints").glob("step_*.pt"))
    assert steps == [1984, 2048]
    for step in steps:
        state = load_checkpoint(drift[0] / "checkpoints" / f"step_{step}.pt")
        assert state["global_step"] == step and "replay" not in state
        tqc.load_policy(drift[0] / "checkpoints" / f"step_{step}.pt")
    assert len(list((grid[0] / "checkpoints").glob("step_*.pt"))) <= 3


def test_replay_is_small_and_only_in_last(grid):
    replay = tqc.Replay(1000)
    held = sum(x.nbytes for x in vars(replay).values() if isinstance(x, np.ndarray))
    assert 0 < held / 1000 < 40
    last, best = (load_checkpoint(grid[0] / "checkpoints" / name) for name in ("last.pt", "best.pt"))
    saved = last["replay"]
    assert len(saved["row"]) == 2048
    assert sum(x.nbytes for x in saved.values() if isinstance(x, torch.Tensor)) / 2048 < 40
    for key in ("replay", "learner", "optimizers", "env", "rng_torch"):
        assert key in last and key not in best
    agents = list((grid[0] / "checkpoints").glob("step_*.pt"))
    assert all("replay" not in load_checkpoint(path) for path in agents)


def test_eval_only_reproduces_the_summary(grid, run_dir):
    trained, best = grid[1], grid[0] / "checkpoints" / "best.pt"
    again = tqc.main(flags(run_dir, **GRID, eval_only=True, checkpoint=best))
    assert again["exit_code"] == 0
    assert again["eval"] == trained["eval"]
    for key in ("state_dependence", "attribution", "q_action_spread", "overestimation", "verdict", "ridge_edge_bps"):
        assert again["audit"][key] == trained["audit"][key], key
    for split in ("train", "eval", "test"):
        one, two = (pd.read_parquet(x / "traces" / f"{split}.parquet") for x in (grid[0], run_dir))
        pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert best.read_bytes() != b"" and not (run_dir / "checkpoints" / "last.pt").exists()


def test_eval_only_pays_the_costs_it_is_told(grid, run_dir):
    best = grid[0] / "checkpoints" / "best.pt"
    again = tqc.main(flags(run_dir, **(GRID | dict(fee_bps=20)), eval_only=True, checkpoint=best))
    test = again["eval"]["test"]
    assert test["baselines"]["buy_and_hold"]["mean_reward_bps"] < (
        grid[1]["eval"]["test"]["baselines"]["buy_and_hold"]["mean_reward_bps"])
    assert test["agent"]["turnover"] < grid[1]["eval"]["test"]["agent"]["turnover"]  # and trades less for it


# ---------------------------------------------------------------------------------- in another program
FRESH = """
import sys
import numpy as np
from cleanrl_crypto.tqc_film_batch import load_policy
for name in sys.argv[1:]:
    with np.load(f"{name}.npz") as obs:
        np.save(f"{name}.npy", load_policy(f"{name}.pt")({k: obs[k] for k in ("market", "position", "w_cost")}))
"""


def observations(run_dir, changes):
    """Walk the test split in the real environment with the actions of the trace: what it showed at every bar."""
    args = TINY | changes
    trace = pd.read_parquet(run_dir / "traces" / "test.parquet")
    market = tqc.load_market(args["data"], window=args["window"])
    start, stop = market.rows["test"]
    assert stop - start == len(trace)
    env = tqc.MarketVectorEnv(market, (start, stop), 1, 10**6, args["fee_bps"], args["slippage_bps"],
                              position_mode=args.get("position_mode", "rebalance"))
    env.reset(seed=0)
    state = env.get_state()
    state["ints"][0], state["floats"][:2] = start, 0.0  # flat, w_cost 0
    state["floats"][2] = args["fee_bps"] * 1e-4
    env.set_state(state)
    shown, rewards = [], []
    obs = env.observe(env.ints[0], env.floats[0], env.floats[1])
    for action in trace["position"]:
        shown.append(obs)
        obs, reward, terminated, truncated, _ = env.step(np.array([[action]]))
        rewards.append(float(reward[0]))
    assert truncated[0] and not terminated[0]
    env.close()
    # the environment earns what the trace says
    np.testing.assert_allclose(np.cumsum(rewards), np.log(trace["equity"]), atol=1e-9)
    return {k: np.concatenate([o[k] for o in shown]) for k in shown[0]}, trace["position"].to_numpy()


def test_load_policy_in_a_fresh_process_agrees_with_the_traces(actor, drift, tmp_path, repo):
    expected = {}
    for name, (run, _), changes in (("actor", actor, ACTOR), ("drift", drift, DRIFT)):
        obs, expected[name] = observations(run, changes)
        assert expected[name].std() > 0.02 and len(np.unique(expected[name])) > 5  # a constant would agree with all
        np.savez(tmp_path / f"{name}.npz", **obs)
        shutil.copy(run / "checkpoints" / "best.pt", tmp_path / f"{name}.pt")
    done = subprocess.run([sys.executable, "-c", FRESH, *expected], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(repo)}, timeout=400)
    assert done.returncode == 0, done.stderr
    for name, positions in expected.items():
        actions = np.load(tmp_path / f"{name}.npy")
        assert actions.shape == (len(positions), 1) and actions.dtype == np.float32
        agree = np.abs(actions[:, 0] - positions) < 1e-5
        assert agree.mean() > 0.99, f"{name}: {agree.mean():.3f}"


def test_load_policy_does_not_depend_on_the_batch(actor, drift):
    for (run, _), changes in ((actor, ACTOR), (drift, DRIFT)):
        obs, _ = observations(run, changes)
        policy = tqc.load_policy(run / "checkpoints" / "best.pt")
        many = policy(obs)
        np.testing.assert_array_equal(many, policy(obs))
        one = np.concatenate([policy({k: v[i : i + 1] for k, v in obs.items()}) for i in range(20)])
        np.testing.assert_allclose(many[:20], one, atol=1e-5)
