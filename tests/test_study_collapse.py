"""The study of the collapse as a program at tiny sizes, its file of finished runs, its statistics."""

import csv
import importlib
import json
import math
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from cleanrl_crypto import tqc_film_batch as tqc
from runs import wait_until

study = importlib.import_module("scripts.study_collapse")
CELLS = "earlier,today"


def lines_of(folder) -> list[dict]:
    with (folder / "runs.csv").open() as file:
        return list(csv.DictReader(file))


def command(repo, folder, *more) -> list[str]:
    program = [sys.executable, str(repo / "scripts" / "study_collapse.py")]
    return [*program, "--quick", "--seeds", "1", "--cells", CELLS, "--out", str(folder), *more]


@pytest.fixture(scope="module")
def finished(repo, tmp_path_factory):
    """Killed after the first run, a torn line left behind, then the same command again."""
    folder = tmp_path_factory.mktemp("study")
    child = subprocess.Popen(command(repo, folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_until(child, lambda: (folder / "runs.csv").exists() and len(lines_of(folder)) == 1)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    first = (folder / "runs.csv").read_text()
    with (folder / "runs.csv").open("a") as file:
        file.write("today,0,0.1")
    done = subprocess.run(command(repo, folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, first


def test_the_same_command_goes_on_after_a_kill(finished):
    folder, first = finished
    assert (folder / "runs.csv").read_text().startswith(first)
    assert [row["cell"] for row in lines_of(folder)] == ["earlier", "today"]
    assert list(folder.glob("*")) and not list(folder.glob("tmp*"))


def test_a_run_has_the_settings_of_its_cell(finished):
    rows = {row["cell"]: row for row in lines_of(finished[0])}
    earlier = json.loads(rows["earlier"]["settings"])
    assert earlier["policy"] == "actor" and earlier["reward_std"] == 0.06
    counts = {name: (int(row["updates"]), int(row["transitions"])) for name, row in rows.items()}
    assert counts == {"earlier": (20, 27 * 256), "today": (20, 9 * 256)}
    # the actor ships in one, the grid in the other; alpha has hardly moved from .5
    assert rows["earlier"]["score"] == rows["earlier"]["actor_score"]
    assert rows["today"]["score"] == rows["today"]["grid_score"]
    assert 0.4 < float(rows["earlier"]["alpha"]) < 0.5
    # a scaled reward is .06 there and 1 here, and so is what the critics can have learned
    assert all(0 < float(row["spread"]) < 5 for row in rows.values())


def test_tables_and_picture(finished):
    folder = finished[0]
    text = (folder / "table.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1 and len(rows) == 6
    assert (folder / "picture.png").stat().st_size > 5000
    with (folder / "table.csv").open() as file:
        table = {row["cell"]: row for row in csv.DictReader(file)}
    scores = {row["cell"]: float(row["score"]) for row in lines_of(folder)}
    for name, score in scores.items():
        assert float(table[name]["score"]) == pytest.approx(score, abs=1e-4)


def test_other_settings_in_the_same_folder_are_refused(finished):
    folder = finished[0]
    argv = ["--seeds=1", f"--cells={CELLS}", f"--out={folder}", "--updates=30"]
    with pytest.raises(ValueError) as refused:
        study.main(argv)
    assert refused.value.exit_code == 2 and "earlier, seed 0" in str(refused.value)


def test_unknown_cells_are_refused(tmp_path):
    with pytest.raises(ValueError) as refused:
        study.main(["--cells=earlier,tomorow", f"--out={tmp_path}"])
    assert refused.value.exit_code == 2 and "tomorow" in str(refused.value)


def test_interquartile_mean_and_its_interval():
    assert study.interval(range(1, 9))[0] == 4.5
    mean, low, high = study.interval([0.1, 0.2, 0.3, 0.4, 9.0])
    assert mean == pytest.approx(0.3)  # the ends do not count
    assert 0.1 <= low < mean < high < 9.0
    assert study.interval([0.5]) == (0.5, 0.5, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # scipy's
        assert all(map(math.isnan, study.interval([0.5, 0.7, math.nan])))
    # of many draws of a normal distribution: about the usual interval of a mean
    x = np.random.default_rng(0).normal(size=400)
    _, low, high = study.interval(x)
    assert 0.15 < high - low < 0.3


def test_change_is_counted_seed_by_seed():
    rows = []
    for seed, luck in enumerate((0.0, 0.4, -0.3)):  # a seed moves both cells alike
        for cell, score in (("earlier", 0.1), ("earlier_reward_1", 0.3)):
            numbers = dict.fromkeys(study.COLUMNS, "1")
            rows.append(numbers | {"cell": cell, "seed": str(seed), "score": str(score + luck), "settings": "{}"})
    table = study.summarise(rows).set_index("cell")
    line = table.loc["earlier_reward_1"]
    assert line[["change", "change_low", "change_high"]].tolist() == pytest.approx([0.2] * 3)
    assert line["high"] - line["low"] > 0.3 and line["runs"] == 3
    assert math.isnan(table.loc["earlier", "change"])


@pytest.mark.parametrize("ratio, size", [(0.0, 0.0), (0.06, 0.01), (2.0, 0.3130), (200.0, 0.99)])
def test_size_of_a_soft_position(ratio, size):
    """The mean of a density proportional to exp(x a) on [-1, 1], x half the ratio."""
    assert study.soft_size(ratio) == pytest.approx(size, abs=1e-4)


def test_every_cell_differs_from_the_first_of_its_table_and_is_a_command():
    args = study.Args()
    cells = study.all_cells()
    assert len({c.name for c in cells}) == len(cells)
    seen = {}
    for cell in cells:
        settings = study.settings_of(cell, 0, args)
        key = cell.table, json.dumps(settings, sort_keys=True)
        assert key not in seen or cell.table == "peer", (cell.name, seen.get(key))
        seen[key] = cell.name
        if cell.table != "peer":
            with study.wrapped(settings) as flags:
                study.parse_args(tqc.Args, flags)


def test_wraps_act_and_are_gone_afterwards():
    before = tqc.Agent.reward_scale, tqc.sample_action, tqc.Actor, tqc.load_market
    settings = {"reward_std": 0.06, "one_matrix": True, "dim_position": True}
    torch.manual_seed(0)
    with study.wrapped(settings | {"window": 8, "d_model": 8}) as flags:
        assert flags == ["--window=8", "--d-model=8"]
        actor = tqc.Actor(16, 32, 0.0)
        assert actor.fusion.scalars.weight[:, 0].std() < 0.2 < actor.fusion.scalars.weight[:, 1].std()
        # rows that are alike get the same noise, others do not
        market = torch.randn(1, 17).repeat(6, 1)
        market[3:] = torch.randn(1, 17)
        held = torch.zeros(6, 1)
        action = tqc.sample_action(actor, market, held, held)[0]
        assert action[:3].std() < 1e-6 and action[3:].std() < 1e-6
        assert abs(action[0] - action[3]) > 1e-3
    assert before == (tqc.Agent.reward_scale, tqc.sample_action, tqc.Actor, tqc.load_market)
    action = tqc.sample_action(actor, market, held, held)[0]
    assert action[:3].std() > 1e-2
