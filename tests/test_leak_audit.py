"""The leak audit catches planted leaks, and lets their clean twins pass."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import leaks
from cleanrl_crypto import dqn_forex_subproc as dqn
from common.data import check_bars, load_bars
from common.timeout_guard import save_atomic
from scripts import leak_audit

FILE = Path(leaks.__file__)
NAMES = [name.removeprefix("leak_") for name in vars(leaks) if name.startswith("leak_")]
AHEAD = {  # bars that the leak looks ahead; edits find more than half of them
    "next_bar": 1,
    "target_in_features": 5,
    "chikou_span": 26,
    "swing_highs": 5,
    "centred_mean": 10,
    "gradient": 1,
    "wavelet": 7,
    "four_hours": 3,
    "no_purge": 24,
    "env_next_bar": 1,
    "env_paid_at_the_close_that_was_seen": 1,
    "env_window_begins_at_the_row": 7,
    "env_reward_of_the_next_day": 23,
}


def audit(target, *flags):
    return leak_audit.main([str(target), *map(str, flags)])


@pytest.mark.parametrize("name", NAMES)
def test_the_leak_is_caught(name):
    found = audit(f"{FILE}:leak_{name}", *leaks.FLAGS.get(name, []))
    assert found["exit_code"] == 1
    if name in AHEAD:
        ahead, _, _ = next(iter(found["findings"].values()))
        assert AHEAD[name] / 2 <= ahead <= AHEAD[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_clean_twin_passes(name):
    found = audit(f"{FILE}:clean_{name}", *leaks.FLAGS.get(name, []))
    assert found["exit_code"] == 0 and not found["findings"]


def test_there_are_enough_of_them():
    assert len(NAMES) >= 25
    assert all(hasattr(leaks, f"clean_{name}") for name in NAMES)


# ------------------------------------------------------------------------------- other targets
TARGETS = """
import gymnasium as gym
import numpy as np
import pandas as pd
from leaks import Env, features

DICE = np.random.default_rng()

def all_random(bars):
    return DICE.normal(size=len(bars))

def one_random(bars):
    return features(bars).assign(noise=DICE.normal(size=len(bars)))

def seeded(bars):
    return features(bars).assign(noise=np.random.normal(size=len(bars)))

def fails(bars):
    raise KeyError("price")

def nothing(bars):
    return None

def rows_without_times(bars):
    return np.zeros(len(bars) - 1)

class Smoothed:
    '''Fitted on train rows, and smooths those alone: only transform() of its own shows it.'''

    def __init__(self, bars, fit_until):
        self.mean, self.stop = features(bars)[:fit_until].mean(), fit_until

    def transform(self, bars):
        x = features(bars) - self.mean
        train = x[: self.stop].rolling(3, center=True, min_periods=1).mean()
        x.loc[train.index] = train
        return x

class Filtered(Smoothed):
    def transform(self, bars):
        return features(bars) - self.mean

class RandomObservation(Env):
    def observe(self):
        return np.append(super().observe(), DICE.normal()).astype(np.float32)

class SignAlone(Env):
    def observe(self):
        return np.array([np.sign(self.ret[self.t]), self.position], np.float32)

class FourBarsAStep(Env):
    length = 200

    def step(self, action):
        self.position = self.target(action)
        reward = self.position * self.ret[self.t + 1 : self.t + 5].sum()
        self.t += 4
        return self.observe(), reward, False, self.t - self.first >= self.length, {}

class PaidAtTheExit(Env):
    '''Buy, hold, sell; the whole trade is paid when it is closed, at a close that was seen.'''

    action_space = gym.spaces.Discrete(3)

    def target(self, action):
        return [0.0, self.position, 1.0][action]

    def earn(self, before):
        if self.position > before:
            self.entry = self.close[self.t]
        return np.log(self.close[self.t] / self.entry) if self.position < before else 0.0

class OwnBarsOnly(Filtered):
    def __init__(self, bars, fit_until):
        super().__init__(bars, fit_until)
        self.end = str(bars.close.iloc[-1])

    def transform(self, bars):
        if str(bars.close.iloc[-1]) != self.end:
            raise ValueError("other bars")
        return super().transform(bars)

class RefusesEdits(Env):
    closes = set()

    def __init__(self, bars):
        self.closes.add(bars.close.sum())
        if len(self.closes) > 2:
            raise ValueError("edited")
        super().__init__(bars)

class WithoutBars(Env):
    def observe(self):
        return np.zeros(2, np.float32)
"""


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    path = tmp_path_factory.mktemp("targets") / "targets_of_a_user.py"
    path.write_text(TARGETS)
    return path


@pytest.mark.parametrize(
    "name, code",
    [
        ("one_random", 0),
        ("seeded", 0),
        ("Smoothed", 1),
        ("Filtered", 0),
        ("OwnBarsOnly", 0),
        ("RandomObservation", 0),
        ("SignAlone", 0),
        ("FourBarsAStep", 0),
        ("PaidAtTheExit", 0),
    ],
)
def test_targets_of_other_kinds(targets, name, code, capsys):
    assert audit(f"{targets}:{name}")["exit_code"] == code
    line = capsys.readouterr().out.splitlines()[-1]
    assert ("not judged: noise" in line) == (name == "one_random")
    assert ("not judged: [17]" in line) == (name == "RandomObservation")


@pytest.mark.parametrize(
    "argv",
    [
        ["{targets}:all_random"],
        ["{targets}:fails"],
        ["{targets}:nothing"],
        ["{targets}:rows_without_times"],
        ["{targets}:WithoutBars"],
        ["{targets}:absent"],
        ["{targets}:RefusesEdits"],
        ["{targets}:seeded", "--labels", "absent"],
        ["{targets}:seeded", "--edits", "1"],
        ["{targets}:seeded", "--data", "absent.csv"],
        ["{targets}:seeded", "--absent"],
        ["{targets}:seeded", "--steps", "20"],
        ["{targets}:seeded", "--bars", "500"],
        ["{targets}:SignAlone", "--edits", "8"],
        ["no_such_module:columns"],
        ["no_such_folder"],
        ["{folder}"],
    ],
)
def test_what_cannot_be_judged_is_one_line(targets, refusal_of, argv):
    script = Path(leak_audit.__file__)
    names = {"targets": targets, "folder": targets.parent}
    refusal_of(script)([text.format(**names) for text in argv])


def test_the_command_line(targets, repo):
    command = [sys.executable, repo / "scripts" / "leak_audit.py", "leaks:leak_global_scaler"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FILE.parent)
    assert done.returncode == 1, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert last.startswith("leak: column 'mean_2'") and "'mean_2'" in first


@pytest.mark.parametrize("kind", leak_audit.EDITS)
def test_edits_keep_the_past_and_leave_valid_bars(kind):
    bars = load_bars("synthetic:noise?bars=300")
    for seed in range(5):
        other = leak_audit.edited(bars, 200, kind, np.random.default_rng(seed))
        assert np.array_equal(other.ohlcv[:, :201], bars.ohlcv[:, :201])
        assert np.array_equal(other.timestamp[:201], bars.timestamp[:201])
        check_bars("edited", other.timestamp, other.ohlcv[0])
        same = other.ohlcv.shape == bars.ohlcv.shape and (other.ohlcv == bars.ohlcv).all()
        assert not same


def test_a_mirror_turns_past_returns_and_keeps_the_rest():
    bars = load_bars("synthetic:noise?bars=300")
    other = leak_audit.mirrored(bars, 200)
    check_bars("mirrored", other.timestamp, other.ohlcv[0])
    moves = [np.diff(np.log(x.close)) for x in (bars, other)]
    np.testing.assert_allclose(moves[1][:200], -moves[0][:200], rtol=1e-9, atol=1e-12)
    assert np.array_equal(other.ohlcv[:, 201:], bars.ohlcv[:, 201:])


# ------------------------------------------------------------------------------- run directories
def folder_of_a_run(folder, rows_too_many=0):
    """What the audit reads of a DQN run, without one: flags, and a checkpoint with its models."""
    flags = dqn.Args(
        data="synthetic:signal?bars=1200",
        symbols=("EURUSD",),
        feature_cols=("ret_1", "rsi_14"),
        num_envs=4,
    )
    pairs = dqn.load_pairs(flags)
    (name, bars), *_ = dqn.load_series(flags).items()
    stop = int(pairs.rows["train"][0, 1]) + rows_too_many
    model, _ = dqn.fit(flags, bars, stop, None)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(asdict(flags)))
    state = {
        "script": "dqn_forex_subproc",
        "schema": dqn.SCHEMA,
        "data": {"sha256": [bars.sha256]},
        "config": {"models": {name: model.state_dict()}},
    }
    save_atomic(state, folder / "checkpoints" / "best.pt")
    return folder


@pytest.mark.parametrize("rows_too_many, code", [(0, 0), (300, 1)])
def test_a_run_directory(tmp_path, rows_too_many, code):
    folder = folder_of_a_run(tmp_path / "run", rows_too_many)
    assert audit(folder)["exit_code"] == code


def test_flags_that_say_nothing_of_a_run_are_refused(tmp_path, refusal_of):
    folder = folder_of_a_run(tmp_path / "run")
    line = refusal_of(Path(leak_audit.__file__))([folder, "--edits", "400"])
    assert "--edits" in line


def test_a_run_whose_data_changed_is_refused(tmp_path, refusal_of):
    folder = folder_of_a_run(tmp_path / "run")
    flags = json.loads((folder / "args.json").read_text())
    flags["data"] += "&seed=2"
    (folder / "args.json").write_text(json.dumps(flags))
    refusal_of(Path(leak_audit.__file__))([folder])
