"""Statistics of luck against published values and simulated studies; a ledger that misses lines."""

import json
import math

import numpy as np
import pytest

from common.run import UsageError
from scripts import luck
from scripts.luck import Ledger, Trials

BARS_A_YEAR = 8766


# ------------------------------------------------------------------------------- published values
def test_probabilistic_sharpe_of_the_paper():
    found = luck.probabilistic_sharpe(0.458, 24), luck.probabilistic_sharpe(0.458, 24, -2.448, 10.164)
    assert found == pytest.approx((0.981675, 0.913361), abs=1e-6)


def test_deflated_sharpe_of_the_paper():
    ratio = 2.5 / math.sqrt(250)
    threshold = luck.expected_best(0.5 / 250, 100)
    assert threshold == pytest.approx(0.113172, abs=1e-6)
    assert luck.probabilistic_sharpe(ratio, 1250, -3, 10, threshold) == pytest.approx(0.900397, abs=1e-6)
    assert luck.expected_best(0.002, 1) == 0


def test_minimum_track_record_of_the_paper():
    ratio, benchmark = 2 / math.sqrt(252), 1 / math.sqrt(252)
    bars = luck.minimum_track_record(ratio, benchmark=benchmark)
    assert bars / 252 == pytest.approx(2.730984, abs=1e-6)
    assert luck.probabilistic_sharpe(ratio, bars, benchmark=benchmark) == pytest.approx(0.95)
    assert luck.minimum_track_record(benchmark, benchmark=ratio) == math.inf


def test_bars_needed_reach_the_confidence():
    bars, ratio = 1000, 0.04
    threshold = luck.expected_best(1 / (bars - 1), 20)
    more = luck.bars_needed(ratio, bars, -1.0, 6.0, threshold)
    assert more > bars
    later = threshold * math.sqrt((bars - 1) / (more - 1))
    assert luck.probabilistic_sharpe(ratio, more, -1.0, 6.0, later) == pytest.approx(0.95)


def test_interval_covers_the_truth():
    """Of 100 samples the 95 % interval misses the true ratio in few."""
    inside = 0
    for seed in range(100):
        low, high = luck.sharpe_interval(np.random.default_rng(seed).normal(0.1, 1.0, 500))
        inside += low < 0.1 < high
    assert inside >= 88


def test_overfitting_on_noise_and_with_one_that_is_better():
    rng = np.random.default_rng(0)
    noise = [luck.overfitting(rng.normal(size=(400, 10)), blocks=8) for _ in range(60)]
    assert np.mean(noise) == pytest.approx(0.51, abs=0.08)
    edge = rng.normal(size=(400, 10))
    edge[:, 3] += 0.5
    assert luck.overfitting(edge, blocks=8) < 0.02
    assert luck.overfitting(np.zeros((64, 2)), blocks=4) == 0.5  # nobody is better than nobody


def test_nothing_moves():
    found = luck.judge(np.zeros(100), trials=3)
    assert found["sharpe"] == 0 and found["bars_more"] == math.inf
    assert found["deflated"] < 0.5


# ------------------------------------------------------------------------------ simulated studies
def cheap_study(seed: int, edge: float, policies: int = 20, bars: int = BARS_A_YEAR) -> dict:
    """The best of 20 trend followers on a market of noise; with `edge`, the market follows one."""
    rng = np.random.default_rng(seed)
    noise = 0.006 * rng.standard_normal(bars)
    spans = np.unique(np.geomspace(2, 400, policies).astype(int))
    past = np.cumsum(noise)
    signs = np.array([np.sign(past - np.roll(past, span)) for span in spans])
    signs[:, :400] = 0
    returns = noise + edge * 0.006 * np.roll(signs[7], 1)
    earned = np.roll(signs, 1, 1) * returns
    earned[:, 0] = 0
    ratios = [luck.sharpe(path) for path in earned]
    return luck.judge(earned[int(np.argmax(ratios))], len(spans), ratios)


def test_forty_studies():
    noise = [cheap_study(seed, 0.0)["deflated"] for seed in range(40)]
    skill = [cheap_study(seed, 0.06)["deflated"] for seed in range(40)]
    assert np.mean(np.array(noise) < 0.95) >= 0.95
    assert np.mean(np.array(skill) > 0.95) >= 0.80


# ----------------------------------------------------------------------------------------- ledger
def fill(path, lines=4) -> Ledger:
    ledger = Ledger(path)
    for k in range(lines):
        ledger.add({"event": "tried", "data": "d", "trial": f"t{k}", "k": k})
    return ledger


def edit(path, how):
    lines = path.read_text().splitlines(True)
    path.write_text("".join(how(lines)))


def changed(lines):
    record = json.loads(lines[1])
    record["trial"] = "another"
    return [lines[0], json.dumps(record) + "\n", *lines[2:]]


TAMPERED = {
    "first": lambda lines: lines[1:],
    "middle": lambda lines: lines[:1] + lines[2:],
    "last": lambda lines: lines[:-1],
    "all": lambda lines: [],
    "order": lambda lines: [lines[1], lines[0], *lines[2:]],
    "changed": changed,
    "added": lambda lines: [*lines, lines[-1]],
    "no JSON": lambda lines: [*lines[:-1], "x\n"],
}


@pytest.mark.parametrize("how", TAMPERED)
def test_ledger_misses_lines(tmp_path, how):
    path = tmp_path / "ledger.jsonl"
    ledger = fill(path)
    assert [record["k"] for record in ledger.lines()] == [0, 1, 2, 3]
    edit(path, TAMPERED[how])
    with pytest.raises(UsageError, match="ledger.jsonl"):
        ledger.lines()
    with pytest.raises(UsageError):
        ledger.add({"event": "tried"})


def test_ledger_after_kill(tmp_path):
    """A torn line never counted; a head that lags one line is behind, not wrong."""
    path = tmp_path / "ledger.jsonl"
    ledger = fill(path, 2)
    head = ledger.head.read_text()
    ledger.add({"k": 2})
    ledger.head.write_text(head)
    with path.open("a") as file:
        file.write('{"k": 3, "prev')
    assert len(ledger.lines()) == 3
    ledger.add({"k": 3})
    assert [record["k"] for record in ledger.lines()][2:] == [2, 3]
    ledger.head.unlink()
    with pytest.raises(UsageError):
        ledger.lines()


def test_trials_of_a_data_set():
    x = np.random.default_rng(0).normal(0.1, 1, 300)
    records = [{"event": "tried", "data": d, "trial": t} for d, t in (("d", "a"), ("d", "b"), ("e", "c"), ("d", "a"))]
    for segment, part in enumerate(np.split(x, 3)):
        moments = {"bars": 100, "mean": part.mean(), "square": np.square(part).mean()}
        records.append({"event": "scored", "data": "d", "trial": "a", "segment": segment} | moments)
    trials = Trials(records, "d")
    assert len(trials) == 2  # b was tried and never scored
    assert trials.sharpes() == pytest.approx([luck.sharpe(x)])
