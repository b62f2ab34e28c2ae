"""Walk-forward: borders, what a run can see, kill and go on, the page, the ledger."""

import json
import math
import os
import signal
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pandas as pd
import pytest

from common.data import load_bars, split_rows, utc_times
from common.run import CheckFailed, UsageError
from runs import wait_until
from scripts import run_full_wfo as wfo
from scripts.luck import Ledger
from scripts.run_full_wfo import Args, all_segments, main

PROGRAM = "scripts/run_full_wfo.py"
LAYOUT = """--train-months 4 --eval-months 1 --test-months 1 --step-months 1 --purge-hours 72 --jobs 1
    --timesteps 768 --checkpoint-interval 0""".split()
TINY = """--window 8 --d-model 8 --fusion-width 16 --hidden 8 --updates-per-step 1 --mae-steps 2 --num-envs 64
    --learning-starts 256 --batch-size 32 --episode-length 16 --eval-interval 256 --patience 0 --no-cuda --no-report
    --precision fp32 --torch-threads 1""".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """TOY.parquet, whose bars make two segments; late/TOY.parquet, the same but for the last test rows."""
    folder = tmp_path_factory.mktemp("wfo")
    bars = load_bars("synthetic:regime?bars=5350&seed=3")
    table = pd.DataFrame(bars.ohlcv[0], columns="open high low close volume".split())
    table.insert(0, "timestamp", utc_times(bars.timestamp))
    table.to_parquet(folder / "TOY.parquet", index=False)
    last = all_segments(args_of(folder / "TOY.parquet"), [("TOY", bars)])[-1]
    rows = bars.timestamp >= last.test_start.to_datetime64()
    rng = np.random.default_rng(0)
    prices = table.columns[1:5]
    table.loc[rows, prices] *= np.exp(0.05 * rng.standard_normal((rows.sum(), 1)))
    table.loc[rows, "volume"] *= rng.uniform(0.1, 10, rows.sum())
    (folder / "late").mkdir()
    table.to_parquet(folder / "late" / "TOY.parquet", index=False)
    return folder


def args_of(data, *more):
    flags = [x for x in LAYOUT if x not in more]
    return wfo.parse_args(Args, ["--data", str(data), *flags, *more])[0]


def argv_of(data, root, *more) -> list[str]:
    return ["--data", str(data), "--root", str(root), *LAYOUT, *more, "--", *TINY]


def results_of(root) -> dict:
    paths = (root / "results" / "wfo").glob("segment_*/seed_*.json")
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(paths)}


@pytest.fixture(scope="module")
def study(folder, repo):
    """A study of two segments that was killed in the second one, and went on."""
    root = folder / "killed"
    command = [sys.executable, repo / PROGRAM, *argv_of(folder / "TOY.parquet", root)]
    where = {"cwd": repo, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen(command, **where)
    last = root / "logs" / "wfo" / "segment_1" / "seed_1" / "checkpoints" / "last.pt"
    wait_until(first, last.exists)
    first.kill()
    first.communicate()
    before = {k: r["seconds"] for k, r in results_of(root).items()}
    second = subprocess.run(command, **where)
    assert second.returncode == 0, second.stderr[-2000:]
    return root, before


# ---------------------------------------------------------------------------------------- segments
def bars_of(start: str, hours: int, step: int = 1):
    times = pd.date_range(start, periods=hours // step, freq=f"{step}h").to_numpy("datetime64[ns]")
    return [("X", Namespace(timestamp=times))]


@pytest.mark.parametrize("start", ["2020-01-01", "2019-10-31 07:00", "2021-01-31 22:00", "2020-02-29"])
def test_segments_tile(start):
    """Defaults: gaps of 31 days, 13 months of train, and test months without holes or overlaps."""
    args = wfo.parse_args(Args, ["--data", "x"])[0]
    assets = bars_of(start, 24 * 365 * 3)
    segments = all_segments(args, assets)
    assert len(segments) == 6
    for segment, after in zip(segments, segments[1:]):
        assert segment.stop == after.test_start
    for s in segments:
        borders = s.start, s.eval_day, s.eval_start, s.test_day, s.test_start, s.stop
        assert s.start >= pd.Timestamp(start) and list(borders) == sorted(borders)
        assert s.eval_start - s.eval_day == s.test_start - s.test_day == pd.Timedelta(hours=744)
        assert s.eval_day - s.start >= pd.Timedelta(days=390)
        assert s.test_day - s.eval_start >= pd.Timedelta(days=28)
        assert wfo.gap_rows(s, assets) == 744


def test_too_few_bars_are_counted():
    """With exactly what is missing there is a segment."""
    args = wfo.parse_args(Args, ["--data", "x"])[0]
    for hours in (100, 10_000):
        with pytest.raises(UsageError) as error:
            all_segments(args, bars_of("2020-01-01", hours))
        missing = int(str(error.value).split(": ")[-1].split()[0])
        assert len(all_segments(args, bars_of("2020-01-01", hours + missing))) == 1
        with pytest.raises(UsageError):
            all_segments(args, bars_of("2020-01-01", hours + missing - 1))


def test_the_larger_gap_counts():
    times = pd.date_range("2020-01-01", periods=5000, freq="h").to_numpy("datetime64[ns]")
    split = "2020-05-01/2020-06-15"
    own = split_rows(times, split, 65)
    for rows in (0, 65, 744):
        found = wfo.wide_gaps(split_rows, rows)(times, split, 65)
        assert found["train"] == own["train"]
        for part in ("eval", "test"):
            start = own[part][0] + max(rows - 65, 0)
            assert found[part] == (start, own[part][1])
    with pytest.raises(UsageError):
        wfo.wide_gaps(split_rows, 2000)(times, split, 65)


# -------------------------------------------------------------------------------------------- runs
def test_kill_and_go_on(study):
    """The segment that was finished before was not run again; all files are there."""
    root, before = study
    after = results_of(root)
    assert set(before) == {"segment_0"} and set(after) == {"segment_0", "segment_1"}
    assert before["segment_0"] == after["segment_0"]["seconds"]
    log = (root / "logs" / "wfo" / "segment_1" / "seed_1.log").read_text()
    assert "resumed" in log
    for k in (0, 1):
        segment = f"segment_{k}"
        for name in ("train", "eval", "test", "TOY"):
            assert (root / "data" / "wfo" / segment / f"{name}.parquet").exists()
        for name in ("agent.pt", "encoder.pt"):
            assert (root / "weights" / "wfo" / segment / name).exists()
    assert not list(root.rglob("*.tmp"))


def test_a_run_sees_its_segment_alone(study, folder):
    root, _ = study
    bars = load_bars(str(folder / "TOY.parquet"))
    for s in all_segments(args_of(folder / "TOY.parquet"), [("TOY", bars)]):
        run_dir = root / "logs" / "wfo" / f"segment_{s.number}" / "seed_1"
        data = json.loads((run_dir / "summary.json").read_text())["data"]
        there = load_bars(data["spec"])
        assert there.timestamp[0] == s.start and there.timestamp[-1] < s.stop.to_datetime64()
        rows = {part: there.timestamp[data["rows"][part]] for part in ("train", "eval", "test")}
        assert rows["train"][1] == s.eval_day
        assert rows["eval"][0] >= s.eval_start and rows["eval"][1] == s.test_day
        assert rows["test"][0] >= s.test_start


def test_test_rows_change_nothing_before_them(study, folder, monkeypatch):
    """The agent of the last segment, fitted and chosen beside other test rows, never killed, in this process, is the
    same to the bit; what it is tested on is not."""
    root, _ = study
    late = folder / "late"
    monkeypatch.setitem(wfo.ENGINES, "local", lambda tasks, *_: (wfo.run_task(t) for t in tasks))
    done = main(argv_of(folder / "late" / "TOY.parquet", late, "--segment", "1"))
    here, there = results_of(root)["segment_1"], results_of(late)["segment_1"]
    assert done["exit_code"] == 0
    assert [path.name for path in (late / "data" / "wfo").iterdir()] == ["segment_1"]
    assert here["agent_sha256"] == there["agent_sha256"]
    assert here["agent_sha256"] != results_of(root)["segment_0"]["agent_sha256"]
    assert here["eval_score"] == there["eval_score"]
    assert here["test"]["buy_and_hold"] != there["test"]["buy_and_hold"]


def test_warm_start(study, folder, tmp_path, monkeypatch):
    """A segment begins with the agent of the one before, which is what it is without it."""
    root, _ = study
    monkeypatch.setitem(wfo.ENGINES, "local", lambda tasks, *_: (wfo.run_task(t) for t in tasks))
    argv = argv_of(folder / "TOY.parquet", tmp_path, "--warm-start")
    assert main(argv)["finished"] == 2
    cold, warm = results_of(root), results_of(tmp_path)
    assert warm["segment_0"]["agent_sha256"] == cold["segment_0"]["agent_sha256"]
    assert warm["segment_1"]["agent_sha256"] != cold["segment_1"]["agent_sha256"]

    args = args_of(folder / "TOY.parquet", "--root", str(tmp_path), "--warm-start")
    assets = wfo.load_assets(args, ())
    segments = all_segments(args, assets)
    task = wfo.make_tasks(args, {}, segments, assets, TINY)[1]
    task["run_dir"], task["result"] = str(tmp_path / "again"), str(tmp_path / "again.json")
    at = task["argv"].index("--run-dir") + 1
    task["argv"][at] = task["run_dir"]
    wfo.run_task(task | {"argv": [*task["argv"], "--total-timesteps", "64"]})  # without updates
    agents = [wfo.load_checkpoint(p)["agent"] for p in (task["needs"][0], tmp_path / "again/agent.pt")]
    assert wfo.hash_of(agents[0]) == wfo.hash_of(agents[1])


def test_flags_of_another_study_are_refused(study, folder):
    root, _ = study
    data = folder / "TOY.parquet"
    argv = argv_of(data, root)
    for wrong in (
        [*argv, "--hidden", "16"],
        [*argv, "--seed", "3"],
        [*argv, "--no-such-flag"],
        argv_of(folder / "late" / "TOY.parquet", root),  # other bars under the same name
        argv_of(data, root, "--segment", "2"),
        argv_of(data, root, "--clean"),  # nobody to ask
        argv_of(data, root / "new", "--show"),  # a study that is not there
        [*argv, f"--data={data}"],
        [*argv, "--run_dir=x"],
        argv_of(root / "data" / "wfo" / "segment_0" / "TOY.parquet", root),  # --clean would delete it
        argv_of(root / "data" / "wfo" / "segment_0" / "test.parquet", folder / "new"),
        argv_of(data, root, "--warm-start"),
        argv_of(data, root / "new", "--warm-start", "--segment", "1"),  # without the one before
        argv_of(data, root, "--warm-start", "--eval-months", "2"),
        argv_of(data, root, "--ray-address", "auto"),  # of the other engine
        argv_of(data, root, "--timeout", "5"),
    ):
        with pytest.raises(UsageError) as error:
            main(wrong)
        assert "\n" not in str(error.value)
    assert not (folder / "new").exists()


def test_flags_behind_the_dashes_have_one_form():
    own, extra = wfo.split_argv(["--seeds=2", "--", "--torch_threads=2", "--data", "a=b", "--no_cuda"])
    assert own == ["--seeds=2"] and extra == ["--torch-threads", "2", "--data", "a=b", "--no-cuda"]


@pytest.mark.parametrize("code, kind", [(2, UsageError), (1, CheckFailed), (-9, CheckFailed)])
def test_a_run_that_fails_says_why(tmp_path, code, kind):
    (tmp_path / "log").write_text("BTC: no gaps\nerror: --funding f.csv: no such file\n")
    error = wfo.failed({"segment": 3, "seed": 2, "log": str(tmp_path / "log")}, code)
    assert type(error) is kind and error.exit_code == kind.exit_code
    assert all(x in str(error) for x in ("segment 3 seed 2", "--funding f.csv", str(tmp_path / "log")))


def test_the_best_seed_on_eval_rows_is_chosen():
    """A score that was not a number (None in JSON) is chosen only where there is no other."""
    scores = {0: [None, 0.2, 0.5, 0.5], 1: [None, -1.0], 2: [None]}
    results = [
        {"segment": k, "seed": seed, "eval_score": score}
        for k, row in scores.items() for seed, score in enumerate(row)
    ]
    assert {k: r["seed"] for k, r in wfo.choose(results).items()} == {0: 2, 1: 1, 2: 0}


def test_time_is_shared_out():
    guard = Namespace(remaining=lambda: 620.0)
    assert wfo.share_of_time(guard, left=5, jobs=2) == 200
    assert wfo.share_of_time(guard, left=1, jobs=2) == 600


@pytest.mark.slow
def test_ctrl_c_saves(folder, repo, tmp_path):
    command = [sys.executable, repo / PROGRAM, *argv_of(folder / "TOY.parquet", tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = tmp_path / "logs" / "wfo" / "segment_0" / "seed_1"
    wait_until(child, (run / "metrics.jsonl").exists)
    os.kill(child.pid, signal.SIGINT)
    child.communicate(timeout=120)
    assert child.returncode == 130
    assert not results_of(tmp_path)


# -------------------------------------------------------------------------------------------- page
def test_numbers_of_the_page(study):
    root, _ = study
    folder = root / "results" / "wfo"
    summary = json.loads((folder / "summary.json").read_text())
    results = results_of(root)
    own = [json.loads((root / f"logs/wfo/{k}/seed_1/summary.json").read_text()) for k in results]
    agents = [s["eval"]["test"]["agent"] for s in own]
    total = np.prod([1 + agent["total_return"] for agent in agents])
    assert summary["all"]["agent"]["total_return"] == pytest.approx(total - 1)
    assert summary["folds"]["worst_bps"] == min(a["mean_reward_bps"] for a in agents)
    assert summary["luck"]["trials"] == 1 and summary["luck"]["overfitting"] is None
    assert summary["luck"]["bars"] == sum(np.ptp(s["eval"]["test"]["rows"]) for s in own)
    flat = [agent["mean_reward_bps"] > 0 for agent in agents]
    assert summary["folds"]["beats"]["flat"] == np.mean(flat)

    table = pd.read_csv(folder / "report.csv")
    lines = table[(table["who"] == "agent") & (table["segment"] != "all")]
    assert list(lines["mean_reward_bps"]) == pytest.approx([a["mean_reward_bps"] for a in agents])
    assert set(table["who"]) == {"agent", *wfo.RIVALS}
    assert len(table) == 3 * 6
    page = (folder / "report.html").read_text()
    assert page.count("<figure") == 2 and summary["sentence"] in page


@pytest.mark.parametrize(
    "mean, trials, months, words",
    [
        (0.0, 1, None, "nothing to judge"),
        (-0.05, 1, math.inf, "Not dist"),
        (0.02, 1, (0, 20), "Not dist"),
        (0.02, 1000, (20, 400), "Not dist"),
        (0.1, 1000, (0, 0), "Dist"),
        (0.1, 1, (0, 0), "but not from buy and hold"),
    ],
)
def test_luck_in_words(mean, trials, months, words):
    """Months that are missing grow with the number of trials; a rising market is named."""
    x = np.random.default_rng(0).normal(size=4000) if mean else np.zeros(4000)
    agent = x - x.mean() + mean
    growth = pd.DataFrame({"agent": agent} | dict.fromkeys(wfo.RIVALS, np.zeros(4000)))
    if "but" in words:
        growth["buy_and_hold"] = agent + 0.001 * np.random.default_rng(1).normal(size=4000)
    found = wfo.luck.judge(agent, trials)
    assert words in wfo.sentence(found, wfo.leads(growth), 730.5)
    if isinstance(months, tuple):
        assert months[0] <= found["bars_more"] / 730.5 <= months[1]
    elif months:
        assert found["bars_more"] == months


def test_bars_that_depend_on_each_other_are_no_skill():
    """400 independent bets of ten bars each are not 4000 bars."""
    x = np.repeat(np.random.default_rng(0).normal(size=400), 10)
    agent = x - x.mean() + 0.04
    growth = pd.DataFrame({"agent": agent} | dict.fromkeys(wfo.RIVALS, np.zeros(4000)))
    found = wfo.luck.judge(agent, 1)
    assert found["deflated"] > 0.95 and not found["skill"]
    assert wfo.sentence(found, wfo.leads(growth), 730.5).startswith("Not dist")


def test_the_ledger_counts_and_misses_lines(study, folder):
    root, _ = study
    path = root / "results" / "ledger.jsonl"
    records = Ledger(path).lines()
    assert [r["event"] for r in records] == ["tried", "scored", "scored"]
    text = path.read_text()
    lines = text.splitlines(True)
    show = argv_of(folder / "TOY.parquet", root, "--show", "--segment", "1")
    head = path.with_name("ledger.jsonl.head")
    kept = head.read_text()
    try:
        for tampered in (lines[1:], lines[:1] + lines[2:], lines[:-1]):
            path.write_text("".join(tampered))
            with pytest.raises(UsageError, match="ledger.jsonl"):
                main(show)
        path.unlink()
        head.unlink()
        with pytest.raises(UsageError, match="ledger.jsonl"):
            main(show)
    finally:
        path.write_text(text)
        head.write_text(kept)
    again = main(show)
    assert again["luck"]["trials"] == 1 and again["finished"] == 2  # not the chosen segment alone
    assert path.read_text() == text


def test_clean_leaves_the_ledger(study, folder, tmp_path):
    args = args_of(folder / "TOY.parquet", "--root", str(tmp_path), "--clean", "--yes")
    for kind in ("data", "logs", "weights", "results"):
        args.folder(kind, 0).mkdir(parents=True)
    Ledger(tmp_path / "results" / "ledger.jsonl").add({"event": "tried"})
    wfo.clean(args)
    assert not list(tmp_path.rglob("wfo"))
    assert len(Ledger(tmp_path / "results" / "ledger.jsonl").lines()) == 1


def test_clean_asks(folder, tmp_path, monkeypatch):
    """At a terminal; without a yes nothing is deleted."""
    args = args_of(folder / "TOY.parquet", "--root", str(tmp_path), "--clean")
    args.folder("logs", 0).mkdir(parents=True)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    for answer, left in (("", 1), ("n", 1), ("yes", 0)):
        monkeypatch.setattr("builtins.input", lambda _, said=answer: said)
        if left:
            with pytest.raises(UsageError):
                wfo.clean(args)
        else:
            wfo.clean(args)
        assert len(list(tmp_path.rglob("segment_0"))) == left


@pytest.mark.slow
def test_currency_pairs(tmp_path, repo):
    """dqn over a folder of pairs: a segment's runs read a folder of their own."""
    (tmp_path / "forex").mkdir()
    for seed, name in ((1, "EURUSD"), (2, "GBPUSD")):
        bars = load_bars(f"synthetic:signal?bars=5350&seed={seed}")
        table = pd.DataFrame(bars.ohlcv[0], columns="open high low close volume".split())
        table.insert(0, "timestamp", utc_times(bars.timestamp))
        table.to_parquet(tmp_path / "forex" / f"{name}_1h.parquet", index=False)
    argv = argv_of(tmp_path / "forex", tmp_path, "--script", "dqn", "--warm-start")
    own = """--symbols EURUSD GBPUSD --hidden 8 --batch-size 32 --learning-starts 256 --eval-interval 256
        --episode-length 16 --vec-mode single --no-cuda --no-report --torch-threads 1""".split()
    argv = [*argv[: argv.index("--") + 1], *own]
    done = subprocess.run([sys.executable, repo / PROGRAM, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(results_of(tmp_path)) == {"segment_0", "segment_1"}
    for k in (0, 1):
        names = {path.name for path in (tmp_path / f"data/wfo/segment_{k}").glob("*.parquet")}
        assert names == {f"{x}.parquet" for x in ("EURUSD_1h", "GBPUSD_1h", "train", "eval", "test")}
        assert (tmp_path / f"weights/wfo/segment_{k}/agent.pt").exists()
    table = pd.read_csv(tmp_path / "results" / "wfo" / "report.csv")
    assert set(table["who"]) == {"agent", *wfo.RIVALS}


def test_score_of_the_optimum_is_one(tmp_path):
    """On a synthetic market the page scores exposures by the known conditional mean."""
    bars = load_bars("synthetic:regime?bars=4000")
    (tmp_path / "args.json").write_text(json.dumps({"fee_bps": 4.0, "slippage_bps": 1.0}))
    start, stop = 3000, 3900
    best = wfo.markets.optimum_path(bars.truth, 5e-4, start, stop)
    times = pd.DatetimeIndex(bars.timestamp[start:stop])
    trace = pd.DataFrame({"position": best, "position_flat": 0.0}, times)
    result = {"run_dir": str(tmp_path), "test": {"agent": {}, "flat": {}}}
    wfo.score_synthetic(result, trace, bars)
    assert result["test"]["agent"]["score"] == pytest.approx(1)
    assert result["test"]["flat"]["mean_expected_bps"] == 0
