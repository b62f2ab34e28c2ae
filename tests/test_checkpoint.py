"""Checkpoints of tqc_film_batch.py: real kills, real signals, the same bits afterwards, policies in
another program."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cleanrl_crypto import tqc_film_batch as tqc
from common.run import UsageError
from common.timeout_guard import load_checkpoint
from runs import assert_same, assert_same_run, flags_of, last_of, run_code, wait_until
from test_smoke_tqc_film_batch import TINY as SMOKE
from test_smoke_tqc_film_batch import write_bars

SCRIPT = Path(tqc.__file__)
TINY = SMOKE | dict(
    total_timesteps=2048, fee_bps=0.2, turnover_penalty_bps=0.0, w_cost_curriculum=1500,
    checkpoint_interval=0.3)
# two runs, so that both precisions, both policies and both position modes are covered
RUNS = dict(
    grid={},
    actor=dict(
        policy="actor", position_mode="drift", precision="fp32", ent_coef="auto_0.1", counterfactuals=1,
        checkpoint_interval=0.0, keep_checkpoints=2))
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
flags = partial(flags_of, TINY)


def start(run_dir, **changes):
    argv = [sys.executable, str(SCRIPT), *flags(run_dir, **changes)]
    return subprocess.Popen(argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run_to_its_end(run_dir, **changes) -> dict:
    child = start(run_dir, **changes)
    _, err = child.communicate(timeout=1200)
    assert child.returncode == 0, err
    return json.loads((run_dir / "summary.json").read_text())


def kill(child):
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL, "the run ended before it was killed"


def lines(run_dir) -> list[dict]:
    """metrics.jsonl of a run that writes it; a torn last line is left out."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in text]


def assert_same_encoder_too(a, b):
    assert_same_run(a, b)
    assert_same(*(load_checkpoint(x / "encoder.pt") for x in (a, b)), "encoder.pt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs, each made when it is first asked for: (run directory, summary).

    As a user makes them, in processes of their own: what a process computed before (here: other
    tests) may move the last bits of float32, and bf16 would hide that.
    """
    root = tmp_path_factory.mktemp("whole")
    return cache(lambda name: (root / name, run_to_its_end(root / name, **RUNS[name])))


@pytest.fixture
def grid(whole):
    return whole("grid")


# -------------------------------------------------------------------------------- killed, resumed
@POSIX
@pytest.mark.parametrize("name", ["grid", pytest.param("actor", marks=pytest.mark.slow)])
def test_killed_twice_and_resumed_it_has_the_bits_of_the_uninterrupted_run(whole, run_dir, name):
    changes = RUNS[name] | dict(resume="auto")
    # first while it pre-trains, before there is any checkpoint
    child = start(run_dir, **changes, mae_steps=100_000)
    wait_until(child, lambda: any("losses/mae" in line for line in lines(run_dir)))
    kill(child)
    assert not (run_dir / "checkpoints" / "last.pt").exists()
    # then at some moment after the first checkpoint
    child, delay = start(run_dir, **changes), random.uniform(0, 0.5)
    wait_until(child, (run_dir / "checkpoints" / "last.pt").exists)
    time.sleep(delay)
    kill(child)
    print(f"killed {delay:.3f} s after the first checkpoint")
    assert 0 < last_of(run_dir)["loop"]["global_step"] < 2048
    with open(run_dir / "metrics.jsonl", "a") as f:  # written after the checkpoint, the last line torn
        f.write(json.dumps({"global_step": 2000, "wall": 1.0, "losses/qf_loss": 123.0}) + "\n")
        f.write('{"global_step": 2048, "wall": 1.2, "losses/qf_l')
    assert run_to_its_end(run_dir, **changes)["status"] == "finished"
    assert_same_encoder_too(whole(name)[0], run_dir)
    assert not list(run_dir.rglob("*.tmp"))


def test_a_finished_run_that_is_resumed_stays_as_it_is_or_goes_on(grid, run_dir, tmp_path):
    shutil.copytree(grid[0], run_dir)
    tqc.main(flags(run_dir, resume="auto"))
    assert_same_encoder_too(grid[0], run_dir)
    other = tmp_path / "other"  # resumed from a path into a directory of its own
    summary = tqc.main(flags(other, resume=run_dir / "checkpoints" / "last.pt", total_timesteps=2560))
    assert summary["global_step"] == 2560 and summary["updates"] == grid[1]["updates"] + 16


# ---------------------------------------------------------------------------------------- refusals
def test_a_run_whose_bars_or_payments_are_others_is_not_resumed(tmp_path):
    path, run_dir = tmp_path / "AAA.parquet", tmp_path / "run"
    write_bars(path, "synthetic:regime?bars=3200", 3000)
    funding = tmp_path / "funding.csv"
    payment = "fundingTime,fundingRate\n2019-04-01T00:00:00.003Z,0.0001\n"
    funding.write_text(payment)
    changes = dict(data=path, funding=funding, total_timesteps=512)
    tqc.main(flags(run_dir, **changes))
    funding.write_text(payment.replace("0.0001", "0.0002"))
    with pytest.raises(UsageError, match="funding_sha256|funding-sha256"):
        tqc.main(flags(run_dir, **changes, resume="auto"))
    funding.write_text(payment)
    write_bars(path, "synthetic:regime?bars=3200")
    with pytest.raises(UsageError, match="sha256"):
        tqc.main(flags(run_dir, **changes, resume="auto"))


# ------------------------------------------------------------------------------ what a checkpoint is
def test_replay_is_small_and_only_in_last(grid):
    last, best = (load_checkpoint(grid[0] / "checkpoints" / name) for name in ("last.pt", "best.pt"))
    replay = last["parts"]["rb"]
    assert len(replay["row"]) == 2048 and "parts" not in best
    assert sum(x.nbytes for x in replay.values() if isinstance(x, torch.Tensor)) / 2048 == 16


# ------------------------------------------------------------------------------ in another program
FRESH = """
import sys
import numpy as np
from cleanrl_crypto.tqc_film_batch import load_policy
policy, obs = load_policy(sys.argv[1]), dict(np.load(sys.argv[2]))
actions = policy(obs)
some = [policy({k: v[i : i + 1] for k, v in obs.items()}) for i in range(20)]  # batch or not
np.testing.assert_allclose(actions[:20], np.concatenate(some), atol=1e-5)
np.save(sys.argv[3], actions)
"""


def observations(run_dir):
    """Walk the test split in the real environment with the trace's actions: what it showed."""
    args = tqc.Args(**json.loads((run_dir / "args.json").read_text()))
    args = replace(args, num_envs=1, episode_length=10**6)
    trace = pd.read_parquet(run_dir / "traces" / "test.parquet")
    market = tqc.load_market(args)
    start, stop = market.rows["test"]
    env = tqc.MarketVectorEnv(market, (start, stop), args)
    env.reset(seed=0)
    env.state[tqc.ROW], env.state[tqc.W_COST] = start, 0.0
    shown, rewards = [{k: x.numpy() for k, x in env.observe().items()}], []
    for action in trace["position"]:
        obs, reward, terminated, truncated, _ = env.step(np.array([[action]]))
        shown.append(obs)
        rewards.append(float(reward[0]))
    assert truncated[0] and not terminated[0] and len(trace) == stop - start
    env.close()
    # the environment earns what the trace says
    np.testing.assert_allclose(np.cumsum(rewards), np.log(trace["equity"]), atol=1e-9)
    return {k: np.concatenate([o[k] for o in shown[:-1]]) for k in shown[0]}, trace["position"].to_numpy()


def test_load_policy_in_a_fresh_process_agrees_with_the_traces(whole, tmp_path, repo):
    run, _ = whole("actor")
    obs, positions = observations(run)
    assert len(np.unique(positions)) > 1  # a constant would agree with all
    files = [str(tmp_path / name) for name in ("policy.pt", "obs.npz", "actions.npy")]
    shutil.copy(run / "checkpoints" / "best.pt", files[0])
    np.savez(files[1], **obs)
    run_code(repo, FRESH, *files)
    actions = np.load(files[2])
    assert actions.shape == (len(positions), 1) and actions.dtype == np.float32
    agree = np.abs(actions[:, 0] - positions) < 1e-5
    assert agree.mean() > 0.99, f"{agree.mean():.3f}"
