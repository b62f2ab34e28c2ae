"""Tuning: what is searched, what a trial may see, when it is ended early, kill and go on."""

import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

optuna = pytest.importorskip("optuna", reason="pip install -r requirements-cluster.txt")

from cleanrl_crypto import ppo_arz_gpu, tqc_film_batch  # noqa: E402
from common.data import load_bars, split_rows, split_series, utc_times  # noqa: E402
from common.run import UsageError  # noqa: E402
from runs import records, wait_until  # noqa: E402
from scripts import tune  # noqa: E402
from scripts.luck import Ledger  # noqa: E402

TINY = """--episode-seconds 8 --hidden 8 --num-envs 64 --eval-interval 512 --total-timesteps 2048
    --num-steps 4 --no-cuda --torch-threads 1""".split()
SEARCH = ["ent-coef=0..0.01", "num-minibatches=1,2"]


def argv_of(root, *more) -> list[str]:
    own = ["--script", "freeway", "--root", str(root), "--jobs", "1", "--search", *SEARCH, *more]
    return [*own, "--", *TINY]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("gamma=.9...99", tune.Range("gamma", 0.9, 0.99, False, False)),
        ("learning-rate=1e-4..1e-2:log", tune.Range("learning_rate", 1e-4, 1e-2, True, False)),
        ("hidden=64..256:log", tune.Range("hidden", 64, 256, True, True)),
        ("hidden=64,256", tune.Choice("hidden", ("64", "256"))),
    ],
)
def test_search(text, expected):
    assert tune.parse_search(text) == expected


WRONG = """gamma gamma= gamma=.9 gamma=.9.. gamma=a..b gamma=.99...9 gamma=0...9:log
    gamma=.9...99:sqrt hidden=64"""


@pytest.mark.parametrize("text", WRONG.split())
def test_no_search(text):
    with pytest.raises(UsageError, match="--search"):
        tune.parse_search(text)


@pytest.mark.parametrize(
    "search, more",
    [
        ("no-such-flag=1,2", []),
        ("gamma=.9..1.5", []),  # an end that the script refuses
        ("hidden=8,16", []),  # stands after -- too
        ("run-dir=a,b", []),
        ("gamma=.9...99", ["--seed", "1", "--run-dir", "x"]),
        ("gamma=.9...99", ["--run_dir=x"]),
    ],
)
def test_space_is_checked(tmp_path, search, more):
    argv = ["--script", "freeway", "--root", str(tmp_path), "--search", search]
    with pytest.raises(UsageError) as error:
        tune.main([*argv, "--", *TINY, *more])
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_show_makes_nothing(tmp_path):
    with pytest.raises(UsageError, match="--show"):
        tune.main(argv_of(tmp_path, "--show"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size, name", [(1, "journal.log"), (20_600, "ledger.jsonl")])
def test_a_disk_that_is_full_names_the_file(tmp_path, size, name):
    resource = pytest.importorskip("resource", reason="Unix: files of a limited size")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ledger = Ledger(tmp_path / "results" / "ledger.jsonl")
    ledger.add({"data": "x" * 20_000, "trial": "y"})  # the next line does not fit
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            tune.main(argv_of(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(next((tmp_path / "results").rglob(name)))


def test_test_rows_are_the_eval_rows():
    bars = load_bars("synthetic:regime?bars=2000")
    split = "0.7/0.15/0.15"
    found = tune.eval_for_test(split_rows)(bars.timestamp, split, 10)
    own = split_rows(bars.timestamp, split, 10)
    assert found["test"] == found["eval"] == own["eval"] and found["train"] == own["train"]
    both = tune.eval_for_test(split_series)([bars, bars], split, 10)
    assert [rows["test"] for rows in both] == [own["eval"]] * 2


def test_a_trial_of_the_road(tmp_path):
    """It is judged on the validation waves, and meets no others."""
    run_dir = tmp_path / "run"
    task = {"script": "ppo_arz_gpu", "argv": [*TINY, "--run-dir", run_dir, "--no-report"]}
    tune.run_trial(task | {"result": tmp_path / "result.json"})
    value = json.loads((tmp_path / "result.json").read_text())["value"]
    keys = {key for record in records(run_dir) for key in record if key.startswith("eval/")}
    assert keys and all(key.startswith("eval/validation/") for key in keys)
    seen = [record["eval/validation/episode_return"] for record in records(run_dir)]
    assert value == pytest.approx(max(seen))
    with_all = ppo_arz_gpu.make_envs(ppo_arz_gpu.Args(), "cpu", cases="eval")
    assert len(with_all.splits) == 3
    with_all.close()


def test_worse_than_the_median_ends(tmp_path):
    """Half a line is not read; transitions without updates are not judged."""
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(2))
    for value in (1.0, 2.0):
        trial = study.ask()
        for step in (100, 200):
            trial.report(value, step)
        study.tell(trial, value)
    task = {"run_dir": str(tmp_path)}
    job = tune.Job(study.ask(), task, None, None)
    judges = tune.JUDGES["tqc"]
    assert not job.follow(judges, True)
    path = tmp_path / "metrics.jsonl"
    expected, realised = judges
    bad = json.dumps({"global_step": 100, expected: None, realised: 0.5})
    first = json.dumps({"global_step": 0, realised: -9}) + "\n"
    path.write_text(first + bad[:50])
    assert not job.follow(judges, True) and not job.reported
    path.write_text(first + bad + "\n")
    assert not job.follow(judges, False)
    assert job.reported == {100}
    assert job.follow(judges, True)
    third = first.replace(": 0,", ": 300,")
    path.write_text(first + third)  # cut back to a checkpoint, and longer than before soon
    assert not job.follow(judges, False) and job.reported == {100, 300}
    path.write_text(3 * (first + third))
    assert not job.follow(judges, False)
    good = tune.Job(study.ask(), task, None, None)
    path.write_text(bad.replace("0.5", "1.6") + "\n")
    assert not good.follow(judges, True)


@pytest.mark.slow
def test_test_rows_change_no_trial(tmp_path):
    """The value of a trial on bars whose test rows are others is the same to the bit."""
    bars = load_bars("synthetic:regime?bars=4000&seed=3")
    table = pd.DataFrame(bars.ohlcv[0], columns="open high low close volume".split())
    table.insert(0, "timestamp", utc_times(bars.timestamp))
    argv = """--window 8 --d-model 8 --fusion-width 16 --hidden 8 --updates-per-step 1 --mae-steps 2
        --num-envs 64 --learning-starts 256 --batch-size 32 --episode-length 16 --no-report
        --eval-interval 256 --total-timesteps 768 --no-cuda --torch-threads 1""".split()
    values = []
    for name in ("early", "late"):
        if name == "late":
            rng = np.random.default_rng(0)
            table.loc[3400:, "volume"] *= rng.uniform(0.1, 10, 600)
            table.loc[3400:, table.columns[1:5]] *= np.exp(0.05 * rng.standard_normal((600, 1)))
        table.to_parquet(tmp_path / f"{name}.parquet", index=False)
        own = ["--data", tmp_path / f"{name}.parquet", "--run-dir", tmp_path / name]
        task = {"script": "tqc_film_batch", "argv": [*argv, *own]}
        tune.run_trial(task | {"result": tmp_path / "result.json"})
        values.append((tmp_path / "result.json").read_text())
    assert values[0] == values[1]
    assert hasattr(tqc_film_batch, "split_rows")


def trials_of(root) -> list:
    backend = optuna.storages.journal.JournalFileBackend(str(root / "results/tune/journal.log"))
    storage = optuna.storages.JournalStorage(backend)
    return optuna.load_study(study_name="tune", storage=storage).get_trials()


@pytest.mark.slow
def test_kill_and_go_on(repo, tmp_path):
    """Killed in its second trial; the same command goes on with it, in the same folder."""
    command = [sys.executable, repo / "scripts/tune.py", *argv_of(tmp_path, "--trials", "3")]
    command += ["--checkpoint-interval", "0"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen(command, **options)
    wait_until(first, (tmp_path / "logs/tune/trial_1/checkpoints/last.pt").exists, seconds=900)
    first.kill()
    first.communicate()
    second = subprocess.run(command, **options)
    assert second.returncode == 0, second.stderr[-2000:]
    states = [trial.state.name for trial in trials_of(tmp_path)]
    assert sorted(states) == ["COMPLETE"] * 3 + ["FAIL"]
    folders = {path.name for path in (tmp_path / "logs/tune").iterdir() if path.is_dir()}
    assert len(folders) == 3 and "resumed" in (tmp_path / "logs/tune/trial_1.log").read_text()
    lines = Ledger(tmp_path / "results/ledger.jsonl").lines()
    assert len({line["trial"] for line in lines}) == len(lines) == 3
    best = max(t.value for t in trials_of(tmp_path) if t.value is not None)
    assert f"{best:.4f}" in second.stdout
    show = subprocess.run([*command[:-2], "--checkpoint-interval", "9"], **options)
    assert show.returncode == 0 and len(trials_of(tmp_path)) == 4  # there are enough


@pytest.mark.slow
def test_two_processes_take_part(repo, tmp_path):
    """In a study that a third one serves; Ctrl-C ends it with 130."""
    pytest.importorskip("grpc")
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    program = [sys.executable, repo / "scripts/tune.py"]
    own = ["--root", tmp_path, "--name", "big"]
    options = {"stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([*program, "--serve", port, *own], **options)
    assert port in server.stdout.readline()
    more = ["--storage", f"grpc://localhost:{port}", "--name", "big", "--trials", "2"]
    command = [*program, *argv_of(tmp_path, *more)]
    others = [subprocess.Popen(command, **options) for _ in range(2)]
    said = [other.communicate(timeout=900)[0] for other in others]
    os.kill(server.pid, signal.SIGINT)
    server.communicate(timeout=60)
    assert [server.returncode, *(other.returncode for other in others)] == [130, 0, 0]
    assert "2 trials" in said[0] or "2 trials" in said[1]
    assert len(Ledger(tmp_path / "results/ledger.jsonl").lines()) == 2
