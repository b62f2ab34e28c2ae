"""The encoder of tqc_film_batch.py: pre-trained on train rows only, frozen afterwards, blind to
later bars."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cleanrl_crypto import tqc_film_batch as tqc
from common.data import load_bars
from common.run import UsageError
from common.timeout_guard import CheckpointError, TimeoutGuard, load_checkpoint
from runs import flags_of, refusal
from test_leakage import edited
from test_smoke_tqc_film_batch import TINY as SMOKE

TINY = SMOKE | dict(data="synthetic:regime?bars=2500", dropout=0.2)
CONFIG = {"columns": 50, "window": 16, "d_model": 32, "n_heads": tqc.HEADS, "n_layers": tqc.LAYERS,
          "recency": 1.5, "trained_until": ""}
ROWS, TRAIN_STOP = 1500, 1050
FIRST = 733 + 15 + 3  # warm-up of the features, window, and the rows before t that are compared
flags = partial(flags_of, TINY)


def same(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training run: its directory, its summary, and the contexts that lived in it."""
    run_dir, found, make = tmp_path_factory.mktemp("trained") / "run", [], tqc.open_contexts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tqc, "open_contexts", lambda *args: found.append(make(*args)) or found[0])
        summary = tqc.main(flags(run_dir))
    assert summary["updates"] > 0 and len(found) == 1
    return run_dir, summary, found[0]


@pytest.fixture(scope="module")
def small():
    """A market, its fitted features, and a frozen encoder with statistics of its own."""
    bars = load_bars(f"synthetic:regime?bars={ROWS}")
    features = tqc.fit_features(bars, TRAIN_STOP)
    weights = np.random.default_rng(0).normal(size=6 * features.n_tech + 5).tolist()
    features.linear = {"center": 0.0, "weights": weights, "spread": 10.0}
    torch.manual_seed(0)
    encoder = tqc.build_encoder(CONFIG).eval().requires_grad_(False)
    encoder.mean.normal_()
    encoder.std.uniform_(0.5, 2.0)
    return bars, features, encoder


def contexts_of(bars, features, encoder, dtype=torch.float32, keep=False, cls=tqc.Contexts):
    table, rows = features.transform(bars), {"train": (FIRST, TRAIN_STOP), "eval": (1100, 1400)}
    ret, unknown = np.nan_to_num(bars.next_return), np.full(len(table), np.nan)
    market = tqc.Market(bars, features, table, ret, 0 * ret, unknown, rows, CONFIG["window"], None)
    market.forecast = features.forecast(table)
    return cls(encoder, market, torch.device("cpu"), dtype, keep)


def test_training_moves_nothing_of_the_encoder_nor_of_its_cache_and_nothing_could(trained):
    run_dir, summary, contexts = trained
    before = load_checkpoint(run_dir / "encoder.pt")["encoder"]  # written before the first update
    assert {"mean", "std", "gain", "positions", "embed.weight", "mask_token"} <= set(before)
    assert same(before, contexts.encoder.state_dict())
    for name in ("last.pt", "best.pt"):
        assert same(before, load_checkpoint(run_dir / "checkpoints" / name)["encoder"])
    assert not any(module.training for module in contexts.encoder.modules())
    assert not any(p.requires_grad for p in contexts.encoder.parameters())
    rows = torch.arange(*contexts.rows["eval"])[:8]
    assert not contexts(rows)[0].requires_grad
    assert contexts.rows == {k: list(v) for k, v in summary["data"]["rows"].items()}
    stop = contexts.rows["eval"][1]
    rows = torch.arange(stop + 1 - tqc.BLOCK, stop + 1)  # encoded at once: the same bits
    assert torch.equal(contexts.cache[rows], contexts.encode(rows))


def test_all_rows_that_training_may_ask_for_are_encoded_and_others_agree(small):
    contexts, fresh = contexts_of(*small, keep=True), contexts_of(*small)
    rows = contexts.fill(contexts.market.rows, np.inf, lambda: False)
    assert rows == {"train": [FIRST, TRAIN_STOP], "eval": [1100, 1400]}
    for first, stop in rows.values():  # the row after the last decision too
        every = torch.arange(first, stop + 1)
        torch.testing.assert_close(contexts(every)[0], fresh(every)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filling_that_is_cut_short_keeps_the_newest_rows_of_every_split(small, dtype):
    whole, short = (contexts_of(*small, dtype, keep=True) for _ in range(2))
    whole.fill(whole.market.rows, np.inf, lambda: False)
    assert {k: b - a for k, (a, b) in short.fill(short.market.rows, -1.0, lambda: False).items()} == {
        "train": tqc.BLOCK - 1, "eval": tqc.BLOCK - 1}  # something always: no row, no evaluation
    asked = iter(range(100))
    rows = short.fill(short.market.rows, np.inf, lambda: next(asked) >= 8)
    assert rows["train"][1] == TRAIN_STOP and rows["eval"][1] == 1400
    shares = [(b - a) / np.ptp(short.market.rows[k]) for k, (a, b) in rows.items()]
    assert 0.3 < min(shares) and max(shares) < min(shares) + 0.2  # at one pace
    for first, stop in rows.values():
        assert torch.equal(short.cache[first : stop + 1], whole.cache[first : stop + 1])


def test_an_encoder_that_does_not_fit_is_refused_in_one_line(trained, small, tmp_path):
    market, good = contexts_of(*small).market, trained[0] / "encoder.pt"
    state, other = load_checkpoint(good), tmp_path / "other.pt"
    # five files of ten columns are not fifty of one file
    names = [f"{asset}/{k}" for asset in "ABCDE" for k in range(10)] + list(state["columns"][50:])
    torch.save(state | {"columns": names}, other)
    wrong = dict(columns=20, window=24, d_model=48, n_heads=8, n_layers=3)
    found = [f"--{name.replace('_', '-')} {CONFIG[name]} there, {value} here" for name, value in wrong.items()]
    # the good one was trained on 70 % of 2500 bars: those of the first 1500 cannot judge it
    for path, config, error, words in (
        (good, wrong, CheckpointError, ["encoder.pt", *found]),
        (good, {"window": 24}, CheckpointError, [found[1]]),
        (trained[0] / "checkpoints" / "best.pt", {}, CheckpointError, ["best.pt"]),
        (other, {}, UsageError, [names[0], state["columns"][0]]),
        (good, {}, UsageError, [state["config"]["trained_until"], "--split"]),
    ):
        refusal(error, tqc.load_encoder, str(path), CONFIG | config, market, words=words)


def test_a_good_encoder_is_used_instead_of_pre_training_with_this_run_s_recency(trained, tmp_path):
    path = trained[0] / "encoder.pt"
    summary = tqc.main(flags(tmp_path / "run", encoder=path, total_timesteps=512, recency=4.0))
    assert summary["mae_steps"] == 0 and summary["updates"] > 0
    assert "losses/mae" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    given, own = (load_checkpoint(p)["encoder"] for p in (path, tmp_path / "run" / "encoder.pt"))
    age = torch.arange(15, -1, -1)[:, None]
    assert torch.equal(own["gain"], torch.exp(-age / 4.0))
    assert all(torch.equal(given[k], own[k]) for k in given if k != "gain")
    best = load_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt")
    assert same(own, best["encoder"])
    assert best["config"]["trained_until"] == load_checkpoint(path)["config"]["trained_until"]


def moved(small, cut, seed, rows, dtype=torch.float32, cls=tqc.Contexts) -> list[bool]:
    """Whether an edit of the bars after `cut` moves contexts, HMM columns, forecasts of rows."""
    bars, *rest = small
    both = (contexts_of(b, *rest, dtype, cls=cls)(torch.tensor(rows)) for b in (bars, edited(bars, cut, seed)))
    return [not torch.equal(a, b) for a, b in zip(*both)]


class OneBarAhead(tqc.Contexts):
    def __init__(self, *args):
        super().__init__(*args)
        self.offsets = self.offsets + 1


@settings(max_examples=8, deadline=None, derandomize=True)
@given(t=st.integers(FIRST, ROWS - 3), seed=st.integers(0, 2**32 - 1),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_context_at_row_t_keeps_its_bits_when_later_rows_change(small, t, seed, dtype):
    assert not any(moved(small, t, seed, range(t - 3, t + 1), dtype))


def test_the_forecast_is_out_of_fold_on_train_rows_and_the_lasso_s_own_elsewhere():
    args = tqc.Args(data="synthetic:regime?bars=6000", window=16)
    market = tqc.load_market(args)
    own, (start, stop) = market.features.forecast(market.table), market.rows["train"]
    train = market.forecast[start:stop], own[start:stop]
    np.testing.assert_array_equal(market.forecast[stop:], own[stop:])
    assert own[stop:].std() > 0.1 and 0.1 < np.corrcoef(*train)[0, 1] < 0.999
    fitted = tqc.load_market(args, market.features)
    np.testing.assert_array_equal(fitted.forecast, market.forecast)
    assert not tqc.load_market(replace(args, forecast=False), market.features).forecast.any()


@pytest.mark.parametrize("t", [FIRST, ROWS - 3])
def test_context_at_row_t_does_see_bar_t_and_the_checker_catches_one_bar_more(small, t):
    z, _, forecast = moved(small, t - 1, 1, [t])
    assert z and forecast
    assert any(moved(small, t, 1, [t], cls=OneBarAhead))


def pretrained(bars, features, steps):
    """An encoder that pretrain() made on the market's train rows, and what was logged."""
    torch.manual_seed(0)
    contexts, losses, loop = contexts_of(bars, features, tqc.build_encoder(CONFIG)), [], tqc.Loop()
    with TimeoutGuard(None, signals=False) as guard:
        run = SimpleNamespace(
            args=tqc.Args(mae_steps=steps), guard=guard, out_of_time=lambda: False,
            log=lambda record, loop, step: losses.append(float(record["losses/mae"])))
        tqc.pretrain(contexts, run, loop)
    assert loop.mae_steps == steps
    return contexts, losses


def test_pre_training_sees_train_rows_only(small):
    bars, features, _ = small
    variants = bars, edited(bars, TRAIN_STOP - 1, 0), edited(bars, TRAIN_STOP - 2, 0)
    whole, later, last = (pretrained(x, features, 6)[0].encoder.state_dict() for x in variants)
    assert same(whole, later) and not same(whole, last)  # the last train row does count


def test_the_masked_reconstruction_improves_and_standardises_the_context(small):
    contexts, losses = pretrained(*small[:2], 60)
    table = contexts.table[FIRST - 15 : TRAIN_STOP, :50]
    constant = float(table.var(0).mean())  # what the best constant guess of every column would pay
    assert len(losses) == 3 and losses[-1] < 0.8 * losses[0] and losses[-1] < 0.95 * constant
    rows = torch.arange(FIRST, TRAIN_STOP)
    z = contexts.encoder.context(contexts.windows(rows)) / contexts.encoder.gain
    assert z.mean((0, 1)).abs().max() < 0.2 and (z.std((0, 1)) - 1).abs().max() < 0.2
