"""The encoder of tqc_film_batch.py: pre-trained on train rows only, frozen afterwards, blind to later bars."""

import json
import re
import runpy
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cleanrl_crypto import tqc_film_batch as tqc
from common.data import COLUMNS, load_bars
from common.timeout_guard import CheckpointError, TimeoutGuard, load_checkpoint
from runs import flags_of

SCRIPT = Path(tqc.__file__)
TINY = dict(
    data="synthetic:regime?bars=2500", d_model=32, n_heads=2, n_layers=1, d_ff=64, window=16, num_envs=64,
    batch_size=64, mae_steps=5, total_timesteps=1024, learning_starts=256, eval_interval=512,
    updates_per_step=2, fusion_width=32, hidden=32, dropout=0.2, report=False, torch_threads=1, cuda=False,
)
CONFIG = {k: TINY[k] for k in ("window", "d_model", "n_heads", "n_layers", "d_ff")} | {"columns": 50, "recency": 1.5}
CPU = torch.device("cpu")


flags = partial(flags_of, TINY)


def same(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def write_bars(path, bars):
    frame = pd.DataFrame(bars.ohlcv[0], columns=COLUMNS[1:])
    frame.insert(0, "timestamp", pd.DatetimeIndex(bars.timestamp).tz_localize("UTC"))
    frame.to_parquet(path, index=False)


def edited(bars, t, seed):
    """A copy of bars whose rows after t are other, still valid, bars."""
    rng = np.random.default_rng(seed)
    ohlcv = bars.ohlcv.copy()
    after = ohlcv[0, t + 1 :]
    prices = after[:, :4] * np.exp(rng.normal(0, rng.choice([1e-3, 0.05]), (len(after), 4)) + rng.normal())
    after[:, :4] = prices
    after[:, 1], after[:, 2] = prices.max(1), prices.min(1)
    after[:, 4] *= np.exp(rng.normal(0, 1, len(after)))
    return replace(bars, ohlcv=ohlcv)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training run, and the contexts and agents that lived in it."""
    seen = {"contexts": [], "agents": []}

    class Contexts(tqc.Contexts):
        def __init__(self, *args):
            super().__init__(*args)
            seen["contexts"].append(self)

    class Agent(tqc.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            seen["agents"].append(self)

    run_dir = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tqc, "Contexts", Contexts)
        patch.setattr(tqc, "Agent", Agent)
        summary = tqc.main(flags(run_dir))
    assert summary["updates"] > 0 and len(seen["contexts"]) == 1 and len(seen["agents"]) == 2
    return run_dir, seen["contexts"][0], seen["agents"]


# ------------------------------------------------------------------------------------------------- frozen
def test_training_moves_no_parameter_and_no_buffer_of_the_encoder(trained):
    run_dir, contexts, _ = trained
    before = load_checkpoint(run_dir / "encoder.pt")["encoder"]  # written before the first update
    assert {"mean", "std", "gain", "positions", "embed.weight", "mask_token"} <= set(before)
    for name in ("last.pt", "best.pt"):
        assert same(before, load_checkpoint(run_dir / "checkpoints" / name)["encoder"])
    assert same(before, contexts.encoder.state_dict())


def test_the_encoder_is_in_eval_mode_and_nothing_could_train_it(trained):
    _, contexts, agents = trained
    encoder = contexts.encoder
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    mine = {p.data_ptr() for p in encoder.parameters()}
    assert not any(p.data_ptr() in mine for agent in agents for p in agent.parameters())
    rows = np.arange(*contexts_rows(contexts))[:8]
    assert not contexts(rows)[0].requires_grad


def contexts_rows(contexts):
    rows = np.flatnonzero(contexts.filled)
    return rows[0], rows[0] + 256


def test_context_has_the_same_bits_twice_while_the_agent_trains(trained):
    _, contexts, agents = trained
    learner = agents[0].train()
    rows = torch.arange(*contexts_rows(contexts))
    first = contexts.encode(rows)
    market = learner.extractor(first.float(), contexts.table[rows, contexts.n_tech :])
    second = contexts.encode(rows)
    assert torch.equal(first, second)
    # the agent's own dropout is on, so the check is not about a network without any
    assert not torch.equal(market, learner.extractor(second.float(), contexts.table[rows, contexts.n_tech :]))
    assert not any(module.training for module in contexts.encoder.modules())


def test_the_cache_of_the_run_is_what_the_encoder_says_after_it(trained):
    run_dir, contexts, _ = trained
    start, stop = json.loads((run_dir / "summary.json").read_text())["data"]["rows"]["eval"]
    block = (stop - 1) // contexts.BLOCK - 1  # encoded at once: same shapes, same bits
    rows = torch.arange(block * contexts.BLOCK, (block + 1) * contexts.BLOCK)
    assert contexts.filled[rows].all()
    assert torch.equal(contexts.cache[rows], contexts.encode(rows))


def test_rows_that_nobody_asks_for_are_not_encoded(trained):
    run_dir, contexts, _ = trained
    rows = json.loads((run_dir / "summary.json").read_text())["data"]["rows"]
    assert contexts.filled[rows["train"][0] : rows["train"][1]].all()  # by the final evaluation at the latest
    assert not contexts.filled[: rows["train"][0] // contexts.BLOCK * contexts.BLOCK].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_does_not_depend_on_who_asks_first(small, dtype):
    bars, features, encoder = small
    one, other = (contexts_of(bars, features, encoder, dtype, keep=True) for _ in range(2))
    rows = np.arange(FIRST, FIRST + 200)
    one.fill(rows)
    for row in np.random.default_rng(0).permutation(rows):
        other([row])
    assert torch.equal(one(rows)[0], other(rows)[0])
    assert torch.equal(one(rows[[5, 5, 0]])[0], one(rows)[0][[5, 5, 0]])


# -------------------------------------------------------------------------------------- --encoder PATH
def refused(monkeypatch, capfd, argv):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, argv)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    err = capfd.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "Traceback" not in err, err
    return err


def test_disagreeing_dimensions_are_listed_in_one_line(trained, tmp_path, monkeypatch, capfd):
    for seed, name in enumerate(("AAA", "BBB")):
        write_bars(tmp_path / f"{name}.parquet", load_bars(f"synthetic:regime?bars=2500&seed={seed}"))
    line = refused(monkeypatch, capfd, flags(
        tmp_path / "run", encoder=trained[0] / "encoder.pt", data=f"{tmp_path}/AAA.parquet,{tmp_path}/BBB.parquet",
        d_model=48, n_heads=4, n_layers=3, d_ff=80, window=24))
    assert "encoder.pt" in line
    for name, found, expected in (("d_model", 32, 48), ("heads", 2, 4), ("layers", 1, 3), ("feed-forward", 64, 80),
                                  ("input columns", 50, 20), ("window", 16, 24)):
        assert f"{name} {found} found, {expected} expected" in line, name
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes, words", [
    (dict(d_model=48), "d_model 32 found, 48 expected"), (dict(n_heads=4), "heads 2 found, 4 expected"),
    (dict(window=24), "window 16 found, 24 expected"),
])
def test_only_what_disagrees_is_listed(trained, tmp_path, changes, words):
    with pytest.raises(CheckpointError) as error:
        tqc.load_encoder(str(trained[0] / "encoder.pt"), CONFIG | changes)
    line = str(error.value)
    assert words in line and line.count("found") == 1 and "\n" not in line


def test_a_run_checkpoint_is_no_encoder(trained):
    with pytest.raises(CheckpointError, match="best.pt"):
        tqc.load_encoder(str(trained[0] / "checkpoints" / "best.pt"), CONFIG)


def test_a_good_encoder_is_used_instead_of_pre_training(trained, tmp_path):
    path = trained[0] / "encoder.pt"
    summary = tqc.main(flags(tmp_path / "run", encoder=path, total_timesteps=512))
    assert summary["mae_steps"] == 0 and summary["updates"] > 0
    assert not [line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if "losses/mae" in line]
    given_weights = load_checkpoint(path)["encoder"]
    assert same(given_weights, load_checkpoint(tmp_path / "run" / "encoder.pt")["encoder"])
    assert same(given_weights, load_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt")["encoder"])


def test_the_recency_gain_is_this_runs_own(trained):
    given_weights = load_checkpoint(trained[0] / "encoder.pt")["encoder"]
    encoder = tqc.load_encoder(str(trained[0] / "encoder.pt"), CONFIG | {"recency": 4.0}).state_dict()
    gain = torch.exp((torch.arange(16) - 15) / 4.0)[:, None]
    assert torch.equal(encoder["gain"], gain) and not torch.equal(given_weights["gain"], gain)
    assert all(torch.equal(encoder[k], given_weights[k]) for k in encoder if k != "gain")


# ---------------------------------------------------------------------------------------------- leakage
def test_pre_training_sees_train_rows_only(tmp_path):
    bars = load_bars(TINY["data"])
    stop = round(0.7 * len(bars.timestamp))  # the first row after the train split
    made = {}
    for name, variant in (("as_is", bars), ("later", edited(bars, stop - 1, 0)), ("last", edited(bars, stop - 2, 0))):
        folder = tmp_path / name
        folder.mkdir()
        write_bars(folder / "bars.parquet", variant)
        tqc.main(flags(folder / "run", data=folder / "bars.parquet", total_timesteps=0, mae_steps=10))
        made[name] = load_checkpoint(folder / "run" / "encoder.pt")["encoder"]
    assert same(made["as_is"], made["later"])
    assert not same(made["as_is"], made["last"])  # the last train row does count


ROWS, TRAIN_STOP = 1500, 1050


@pytest.fixture(scope="module")
def small():
    """A market, its fitted features, and a frozen encoder with weights and statistics of its own."""
    bars = load_bars(f"synthetic:regime?bars={ROWS}")
    features = tqc.fit_features(bars, TRAIN_STOP)
    torch.manual_seed(0)
    encoder = tqc.build_encoder(CONFIG).eval().requires_grad_(False)
    encoder.mean.normal_()
    encoder.std.uniform_(0.5, 2.0)
    return bars, features, encoder


def contexts_of(bars, features, encoder, dtype, cls=tqc.Contexts, keep=False):
    market = tqc.Market(bars, features, features.transform(bars), np.nan_to_num(bars.next_return),
                        np.full(len(bars.timestamp), np.nan), {}, CONFIG["window"])
    return cls(encoder, market, CPU, dtype, keep)


def bits(contexts, rows):
    z, hmm = contexts(rows)
    return z.view(torch.int16 if z.dtype == torch.bfloat16 else torch.int32), hmm.contiguous().view(torch.int32)


def leaks(small, t, seed, dtype, cls=tqc.Contexts) -> bool:
    """Whether an edit of the rows after t moves a bit of the context or the HMM columns at rows <= t."""
    bars, features, encoder = small
    rows = np.arange(t - 3, t + 1)
    before = bits(contexts_of(bars, features, encoder, dtype, cls), rows)
    after = bits(contexts_of(edited(bars, t, seed), features, encoder, dtype, cls), rows)
    return not all(torch.equal(a, b) for a, b in zip(before, after))


class OneBarAhead(tqc.Contexts):
    def __init__(self, *args):
        super().__init__(*args)
        self.offsets = self.offsets + 1


FIRST = 733 + 15 + 3  # warm-up of the features, window, and the rows before t that are compared
times = st.integers(FIRST, ROWS - 3)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(t=times, seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_context_at_row_t_keeps_its_bits_when_later_rows_change(small, t, seed, dtype):
    assert small[1].warmup + CONFIG["window"] - 1 + 3 <= FIRST
    assert not leaks(small, t, seed, dtype)


@pytest.mark.parametrize("t", [FIRST, 1100, ROWS - 3])
def test_context_at_row_t_does_see_bar_t_and_the_checker_catches_one_bar_more(small, t):
    bars, features, encoder = small
    before = bits(contexts_of(bars, features, encoder, torch.float32), [t])[0]
    after = bits(contexts_of(edited(bars, t - 1, 1), features, encoder, torch.float32), [t])[0]
    assert not torch.equal(before, after)
    assert leaks(small, t, 1, torch.float32, OneBarAhead)


def test_the_cached_context_is_that_of_the_row(small):
    bars, features, encoder = small
    kept = contexts_of(bars, features, encoder, torch.float32, keep=True)
    start, stop = FIRST, FIRST + 300
    assert kept.fill(np.arange(start, stop)) == len(np.unique(np.arange(start, stop) // kept.BLOCK))
    fresh = contexts_of(bars, features, encoder, torch.float32)
    rows = np.array([start, start + 44, start + 45, stop - 1])
    np.testing.assert_allclose(kept(rows)[0], fresh(rows)[0], atol=1e-5)
    window = kept.table[rows[1] - 15 : rows[1] + 1, :50]  # the bars up to the row, oldest first
    np.testing.assert_allclose(kept(rows)[0][1], encoder.context(window[None])[0], atol=1e-5)
    assert kept.filled[start:stop].all() and kept.filled.sum() < stop - start + 2 * kept.BLOCK
    assert kept.fill(np.arange(start, stop)) == 0  # nothing twice


def test_filling_that_is_cut_short_keeps_the_newest_rows(small):
    bars, features, encoder = small
    contexts = contexts_of(bars, features, encoder, torch.float32, keep=True)
    rows = np.arange(FIRST, FIRST + 600)
    assert contexts.fill(rows, lambda: True) == 1  # something is always filled: without a row there is no evaluation
    first = rows[-1] // contexts.BLOCK * contexts.BLOCK
    assert contexts.filled[first : rows[-1] + 1].all() and not contexts.filled[:first].any()
    fresh = contexts_of(bars, features, encoder, torch.float32)
    np.testing.assert_allclose(contexts([first])[0], fresh([first])[0], atol=1e-5)


# ----------------------------------------------------------------------------------------- pre-training
def test_the_masked_reconstruction_improves(small):
    bars, features, _ = small
    torch.manual_seed(0)
    encoder = tqc.build_encoder(CONFIG)
    contexts = contexts_of(bars, features, encoder, torch.float32)
    rows = (FIRST, TRAIN_STOP)
    args, losses = tqc.Args(mae_steps=60), []
    with TimeoutGuard(None, signals=False) as guard:
        steps = tqc.pretrain(encoder, contexts, rows, args, nullcontext, guard,
                             lambda record, step: losses.append(record["losses/mae"]))
    assert steps == 60 and len(losses) == 4
    table = contexts.table[FIRST - 15 : TRAIN_STOP, :50]
    constant = float(table.var(0).mean())  # what the best constant guess of every column would pay
    assert losses[-1] < 0.8 * losses[0] and losses[-1] < 0.9 * constant, (losses, constant)
    # and the context of train rows is standardised channel by channel, the recency gain apart
    z = encoder.context(contexts.table[np.arange(*rows)[:, None] + np.arange(-15, 1), :50]) / encoder.gain
    assert z.mean((0, 1)).abs().max() < 0.2 and (z.std((0, 1)) - 1).abs().max() < 0.2
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())


def test_the_loss_is_taken_at_masked_steps_and_they_are_hidden():
    torch.manual_seed(0)
    encoder = tqc.build_encoder(CONFIG)
    x, mask = torch.randn(4, 16, 50), torch.rand(4, 16) < 0.3
    other = torch.where(mask[..., None], torch.randn_like(x), x)
    assert torch.equal(encoder.encode(x, mask), encoder.encode(other, mask))  # what is masked is not read
    guess = encoder.decode(encoder.encode(x, mask))
    wanted = ((guess - x) ** 2)[mask].mean()
    torch.testing.assert_close(encoder.loss(x, mask), wanted)


def test_pre_training_shrinks_aloud_under_a_short_timeout(tmp_path, capsys):
    summary = tqc.main(flags(tmp_path / "run", timeout=25, mae_steps=10**6, total_timesteps=0))
    said = re.search(r"pre-training cut to (\d+) of 1000000 steps.*--timeout 25", capsys.readouterr().out)
    assert said and int(said[1]) == summary["mae_steps"] > 0
    assert summary["phases"]["pretrain"] < 25 and summary["exit_code"] == 0
