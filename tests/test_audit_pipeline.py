"""The audit of a run's parts names what was broken on purpose, and nothing in sound runs."""
import json
import shutil
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch

from cleanrl_crypto import tqc_film_batch as tqc
from common import features
from common.timeout_guard import load_checkpoint, save_atomic
from runs import flags_of
from scripts import audit_pipeline as audit

TINY = dict(
    num_envs=256, d_model=16, window=16, fusion_width=64, hidden=64, mae_steps=100, total_timesteps=12_288,
    batch_size=128, eval_interval=2_048, torch_threads=1, cuda=False, report=False)
SCRIPT = audit.__file__


def train(run_dir, seed=1, **flags):
    data = f"synthetic:regime?bars=12000&seed={seed}"
    assert tqc.main(flags_of(TINY, run_dir, data=data, seed=seed, **flags))["exit_code"] == 0
    return run_dir


def verdicts(folder, mode="all") -> dict:
    return {part.name: part.verdict for part in audit.audit_run(folder, mode)}


# ------------------------------------------------------------------------------------------- chance
def test_chance_is_uniform_where_there_is_nothing_and_small_where_there_is():
    rng = np.random.default_rng(0)
    x, found = np.repeat(rng.normal(size=(60, 50)), 20, 1), []  # blocks of 20 equal rows
    for row, other in zip(x, x[1:]):
        null = [audit.correlation(np.roll(row, s), other) for s in audit.shifts(1000, 99, rng)]
        found.append(audit.chance(audit.correlation(row, other), null))
    assert 0.35 < np.mean(found) < 0.65 and np.mean(np.array(found) <= 0.1) < 0.25
    null = [audit.correlation(np.roll(x[0], s), x[0]) for s in audit.shifts(1000, 99, rng)]
    assert audit.chance(1.0, null) == 0.01


def test_the_interval_holds_the_mean_of_rows_that_depend_on_each_other():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(200):
        low, high = audit.interval(np.repeat(rng.normal(size=250), 10), rng, 300)
        inside += low < 0 < high
    assert 174 <= inside <= 199  # of 200; blocks of bars as if independent: some 90


def test_lag_and_places():
    regime = np.repeat([0, 1, 0, 1], 10)
    assert audit.lag_of(np.roll(regime, 3), regime) == (3.0, 0.0)
    assert audit.lag_of(np.zeros(40, int), regime) == (0.0, pytest.approx(2 / 3))
    atoms = np.array([[0.0, 1.0, 2.0, 3.0], [5.0, 5.0, 5.0, 5.0]])
    assert audit.place(atoms, np.array([1.5, 5.0])).tolist() == [0.5, 0.5]
    u = np.random.default_rng(0).uniform(size=10_000)
    assert abs(audit.inside(u).mean() - 0.8) < 0.02


def test_a_filter_s_last_row_is_the_library_s_posterior_and_earlier_ones_are_not():
    hmm = {"mean": [-1.0, 1.0], "var": [1.0, 1.0], "trans": [[0.95, 0.05], [0.1, 0.9]], "start": [0.5, 0.5]}
    x = np.random.default_rng(0).normal(size=200)
    ours = features.forward_filter(x, *audit.arrays(hmm))
    for rows in (50, 200):
        np.testing.assert_allclose(audit.library_posterior(hmm, x[:rows]), ours[rows - 1], atol=1e-9)
    assert np.abs(audit.library_posterior(hmm, x)[0] - ours[100, 0]) > 1e-3


@pytest.mark.parametrize("argv", [
    [], ["--run-dir", "{}", "--segment", "0"], ["--run-dir", "{}/none"], ["--run-dir", "{}"],
    ["--run-dir", "{}", "--mode", "hm"], ["--segment", "3", "--root", "{}"], ["--run-dir", "{}", "--modes", "hmm"]])
def test_bad_input_is_one_line(refusal_of, tmp_path, argv):
    line = refusal_of(SCRIPT)([text.format(tmp_path) for text in argv])
    assert not argv or any(text.format(tmp_path).split("=")[0] in line for text in argv)


# --------------------------------------------------------------------------------------- sound, broken
@pytest.fixture(scope="module")
def sound(tmp_path_factory, one_thread):
    return train(tmp_path_factory.mktemp("sound") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_nothing_of_a_sound_run_is_blamed(sound, tmp_path, seed):
    folder = sound if seed == 1 else train(tmp_path / "run", seed)
    found = audit.main(["--run-dir", str(folder)])
    assert found["exit_code"] == 0
    assert "broken" not in found["verdicts"][str(folder)].values()
    assert found["verdicts"][str(folder)]["hmm"] == "sound"
    page = (folder / "audit" / "audit.html").read_text()
    assert len(page) > 50_000 and "http" not in page.replace("http://www.w3.org", "")
    record = json.loads((folder / "audit" / "audit.json").read_text())
    assert record["hmm"]["numbers"]["accuracy"] > 0.95 and record["tqc"]["numbers"]["chance"] <= 0.05
    assert len(list((folder / "audit").glob("*.png"))) >= 6
    assert not list(folder.glob(".audit*"))


@pytest.mark.slow
def test_a_segment_is_every_seed_of_it_beside_other_segments(sound, tmp_path):
    for name in ("segment_0/seed_1", "segment_0/seed_2", "segment_1/seed_1"):
        shutil.copytree(sound, tmp_path / "logs" / "wfo" / name, ignore=shutil.ignore_patterns("audit"))
    found = audit.main(["--segment", "0", "--root", str(tmp_path), "--mode", "hmm"])
    assert found["exit_code"] == 0 and len(found["verdicts"]) == 2
    page = (tmp_path / "logs" / "wfo" / "segment_0" / "seed_2" / "audit" / "audit.html").read_text()
    assert "segment_1" in page and "segment_0<" not in page


@pytest.mark.slow
def test_it_judges_the_rows_that_the_run_was_judged_on(sound, tmp_path):
    """Those of a walk-forward begin later than the flags say; of too few the calibration is not judged."""
    folder = tmp_path / "run"
    shutil.copytree(sound, folder, ignore=shutil.ignore_patterns("audit"))
    path = folder / "checkpoints" / "best.pt"
    state = load_checkpoint(path)
    stop = state["data"]["rows"]["eval"][1]
    state["data"]["rows"]["eval"][0] = stop - 150
    save_atomic(state, path)
    part, = audit.audit_run(folder, "tqc")
    assert audit.Subject(folder).rows["eval"] == (stop - 150, stop)
    assert "off" in [level for level, _ in part.checks]


@pytest.mark.slow
def test_it_judges_the_policy_at_the_w_cost_that_the_run_was_judged_at(sound, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(sound, folder, ignore=shutil.ignore_patterns("audit"))
    flags = json.loads((folder / "args.json").read_text()) | {"eval_w_cost": 1.0}
    (folder / "args.json").write_text(json.dumps(flags))
    (cheap,), (dear,) = (audit.audit_run(x, "tqc") for x in (sound, folder))
    assert dear.numbers["turnover"] < 0.8 * cheap.numbers["turnover"]


def shuffled(context, axis):
    def other(x, hmm):
        p = context(x, hmm)
        order = np.random.default_rng(0).permutation(len(p)) if axis == 0 else [2, 0, 3, 1, 4]
        return p[order] if axis == 0 else p[:, order]
    return other


def smoothed(context):
    def other(x, hmm):
        from hmmlearn.hmm import GaussianHMM

        mean, var, trans, start = audit.arrays(hmm)
        model = GaussianHMM(len(mean), "diag", init_params="")
        model.startprob_, model.transmat_ = start / start.sum(), trans
        model.means_, model.covars_ = mean[:, None], var[:, None]
        return np.concatenate([model.predict_proba(x[:, None]), context(x, hmm)[:, -1:]], 1)
    return other


def random_encoder(state):
    torch.manual_seed(0)
    fresh = tqc.build_encoder(state["config"]).state_dict()
    state["encoder"] |= {k: v for k, v in fresh.items() if k not in ("mean", "std", "gain", "positions")}


def reversed_columns(state):
    state["encoder"]["embed.weight"] = state["encoder"]["embed.weight"].flip(1)


def one_state(state):
    hmm = state["features"]["hmm"]
    hmm["mean"], hmm["var"] = [sum(hmm["mean"]) / 4] * 4, [sum(hmm["var"]) / 4] * 4


def dead_state(state):
    state["features"]["hmm"]["mean"][1] = 50.0


def dead_film(state):
    for name in ("weight", "bias"):
        state["agent"][f"extractor.film.{name}"].zero_()


def constant_actor(state):
    state["agent"]["actor.mu.weight"].zero_()


def constant_position(state):
    state["agent"]["critic.slope"].zero_()
    for k in range(state["config"]["n_critics"]):
        state["agent"][f"critic.nets.{k}.4.weight"].zero_()


def quantiles(state, spread, shift=0.0):
    for k in range(state["config"]["n_critics"]):
        for name in ("weight", "bias"):
            x = state["agent"][f"critic.nets.{k}.4.{name}"]
            mean = x.mean(0, keepdim=True)
            x.copy_(mean + spread * (x - mean))
        state["agent"][f"critic.nets.{k}.4.bias"] += shift


CHECKPOINT = {  # what is planted in a checkpoint: the part that must be named
    random_encoder: "mae", reversed_columns: "mae", one_state: "hmm", dead_state: "hmm", dead_film: "film",
    constant_actor: "tqc", constant_position: "tqc", partial(quantiles, spread=0.0): "tqc",
    partial(quantiles, spread=12.0): "tqc", partial(quantiles, spread=1.0, shift=8.0): "tqc"}


@pytest.mark.slow
@pytest.mark.parametrize("fault", CHECKPOINT, ids=lambda f: getattr(f, "__name__", str(getattr(f, "keywords", f))))
def test_a_fault_in_the_checkpoint_is_named(sound, tmp_path, fault):
    folder = tmp_path / "run"
    shutil.copytree(sound, folder, ignore=shutil.ignore_patterns("audit"))
    path = folder / "checkpoints" / "best.pt"
    state = load_checkpoint(path)
    fault(state)
    save_atomic(state, path)
    assert verdicts(folder, CHECKPOINT[fault])[CHECKPOINT[fault]] == "broken"


@pytest.mark.slow
@pytest.mark.parametrize("fault", [smoothed, partial(shuffled, axis=0), partial(shuffled, axis=1)])
def test_a_fault_in_the_code_of_the_context_is_named(sound, fault):
    with patch.object(features, "context", fault(features.context)):
        assert verdicts(sound, "hmm")["hmm"] == "broken"


@pytest.mark.slow
def test_an_agent_trained_on_a_shuffled_context_is_named_by_film(tmp_path):
    with patch.object(features, "context", shuffled(features.context, 0)):
        folder = train(tmp_path / "run")
    assert verdicts(folder, "film")["film"] == "broken"


@pytest.mark.slow
def test_an_encoder_trained_on_shuffled_columns_is_named(tmp_path):
    windows = tqc.Contexts.train_windows

    def mixed(contexts, n):
        x = windows(contexts, n)  # every column of every bar from another window
        return torch.gather(x.flatten(0, 1), 0, torch.rand(x.flatten(0, 1).shape).argsort(0)).view_as(x)

    with patch.object(tqc.Contexts, "train_windows", mixed):
        folder = train(tmp_path / "run", total_timesteps=2_048)
    assert verdicts(folder, "mae")["mae"] == "broken"
