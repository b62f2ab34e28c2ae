"""Does each part of a trained run do its work: HMM, encoder, FiLM, agent?

    python scripts/audit_pipeline.py --run-dir runs/seed1
    python scripts/audit_pipeline.py --run-dir runs/seed1 --mode film
    python scripts/audit_pipeline.py --segment 2    # every seed of a segment of a walk-forward

Each part gets a verdict with the number and the threshold that decide it: sound, weak (it works,
but something simpler does as well), broken, or off (a flag, or nothing to judge). Thresholds come
from the same numbers where chance alone makes them: contexts and positions that are shifted along
the rows, blocks of rows that are drawn again. Exit code 1 where a part is broken, 2 for bad input.
RUN_DIR/audit/ gets audit.html (one self-contained page), its figures as PNG and audit.json.
docs/audit_pipeline.md explains each number.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.run import (  # noqa: E402
    UsageError,
    answer_help,
    check,
    exit_with,
    load_run,
    parse_args,
    refuse,
)

answer_help(__name__, __file__)

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from cleanrl_crypto import tqc_film_batch as tqc  # noqa: E402
from common import features  # noqa: E402
from common.features import FeatureModel, asset_views, forward_filter, with_products  # noqa: E402
from common.scoring import BP, STILL, edges, fit_linear, verdict  # noqa: E402
from common.timeout_guard import write_json_atomic  # noqa: E402
from scripts.report import CYCLE, RC, Page, canvas, esc, write_figures  # noqa: E402

MODES = ("hmm", "mae", "tqc", "film", "all")
TITLES = {"hmm": "HMM", "mae": "Encoder", "film": "FiLM", "tqc": "Agent"}
TONES = {"sound": "good", "weak": "warn", "broken": "bad", "off": "calm"}
LEVELS = ("off", "sound", "weak", "broken")  # the worst is the verdict
RULE = {  # what a verdict means for the reader
    "sound": "does its work",
    "weak": "works, but something simpler does as well",
    "broken": "does not do its work",
    "off": "not judged",
}
SPAN = 4000  # last decision rows of a split that are looked at
DRAWS = 199  # of a null distribution that costs no forward pass
WALKS = 19  # of one that does: the least with which chance is below .05
FEW = 3  # where only the mean is shown
CHANCE = 0.05  # at or below it a number is not chance
CUTS = 8  # rows after which the future is cut off
WINDOWS = 512  # a split, for the encoder
SAME = 1e-5  # float32 rounding of a probability
LIBRARY = 1e-3  # of hmmlearn's posterior beside ours
ROUNDING = 2.0**-8  # of bf16, in which embeddings may be kept
HORIZON = (
    5  # bars / (1 - gamma) at the end of a split, whose returns are not yet known
)
INNER = 0.8  # share that should lie between the 10 % and the 90 % quantile
POINTS = 400  # of a curve


@dataclass
class Args:
    # what to audit
    run_dir: str | None = None
    """a run directory of tqc_film_batch.py"""
    segment: int | None = None
    """instead: number of a segment of a walk-forward, every seed of it"""
    root: str = "."
    """with --segment: folder of the study, see scripts/run_full_wfo.py"""
    name: str = "wfo"
    """with --segment: name of the study"""
    mode: str = "all"
    """hmm, mae (the encoder), film, tqc (the agent) or all"""
    torch_threads: int | None = None
    """torch threads (default: all cores)"""

    def __post_init__(self):
        ranges = {(0, 10**6): "segment", (1, 4096): "torch_threads"}
        check(self, {"mode": MODES}, ranges)
        given = (self.run_dir is not None) + (self.segment is not None)
        refuse((given != 1, "give one of --run-dir RUN_DIR and --segment NUMBER"))


@dataclass
class Part:
    """What an audit found: the verdict is the worst level of its checks."""

    name: str
    checks: list = field(
        default_factory=list
    )  # (level, the number and what it is held against)
    numbers: dict = field(default_factory=dict)
    tables: list = field(default_factory=list)  # (title, head, rows)
    figures: list = field(default_factory=list)  # (name, title, figure, caption)

    def judge(self, level: str, reason: str):
        self.checks.append((level, reason))

    @property
    def verdict(self) -> str:
        return max((level for level, _ in self.checks), key=LEVELS.index)

    @property
    def reasons(self) -> list[str]:
        """Why it is no better than its verdict."""
        return [reason for level, reason in self.checks if level == self.verdict]


# ------------------------------------------------------------------------------------------ chance
def shifts(n: int, draws: int, rng) -> np.ndarray:
    """(draws,) circular shifts of n rows, none of them by less than a tenth.

    A shifted series keeps its own shape and loses what it knows of the others.
    """
    return rng.integers(n // 10, n - n // 10 + 1, draws)


def chance(value: float, null) -> float:
    """Probability that chance does as well: the share of (null and value) at or above value."""
    null = np.asarray(null)
    return float((1 + (null >= value).sum()) / (1 + len(null)))


def interval(x: np.ndarray, rng, draws: int = 1000) -> tuple[float, float]:
    """95 % interval of the mean of x (n,), whose rows need not be independent.

    Circular block bootstrap (Politis and Romano 1992), blocks of the root of n.
    """
    n = len(x)
    length = max(1, round(math.sqrt(n)))
    blocks = -(-n // length)
    # a block's sum is a difference of running sums; behind the last row the first ones follow
    total = np.cumsum(np.concatenate([[0.0], x, x[:length]]))
    start = rng.integers(n, size=(draws, blocks))
    means = (total[start + length] - total[start]).mean(1) / length
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def ends(low_high: tuple) -> str:
    return f"95 % {low_high[0]:+.3g} to {low_high[1]:+.3g}"


# ------------------------------------------------------------------------------------- the subject
class Subject:
    """A finished run, rebuilt from its directory by the script's own functions, in float32."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        try:
            flags = json.loads((folder / "args.json").read_text())
        except (OSError, ValueError) as e:
            raise UsageError(
                f"{folder}: not a run directory: args.json: {e}"
            ) from e
        path = folder / "checkpoints" / "best.pt"
        if not path.exists():
            raise UsageError(
                f"{folder}: holds no checkpoints/best.pt: the run has no agent yet"
            )
        self.state = load_run(path, Path(tqc.__file__), tqc.SCHEMA)
        try:
            self.args = tqc.Args(**flags)
        except TypeError as e:
            raise UsageError(
                f"{folder}/args.json: flags of another version: {e}"
            ) from e
        self.config = self.state["config"]
        # the columns as the run fitted them: a new fit would be another run's
        self.model = FeatureModel.from_state_dict(self.state["features"])
        self.market = tqc.load_market(self.args, self.model)
        here, there = self.market.bars.sha256, self.state["data"]["sha256"]
        refuse(
            (
                here != there,
                f"--data {self.args.data}: is not what {folder} was trained on",
            )
        )
        # its own: the audit of a run says the same at every call
        self.rng = np.random.default_rng(0)
        # made markets know the mean of each return: measured by it, luck does not count
        self.known = self.market.bars.truth is not None
        self.unit = "expected" if self.known else "realised"
        self.rows = {}
        for split, (start, stop) in self.market.rows.items():
            self.rows[split] = max(start, stop - SPAN), stop

    @cached_property
    def agent(self):
        agent = tqc.Agent(self.config).eval().requires_grad_(False)
        agent.load_state_dict(self.state["agent"])
        return agent

    @cached_property
    def encoder(self):
        encoder = tqc.build_encoder(self.config).eval().requires_grad_(False)
        encoder.load_state_dict(self.state["encoder"])
        return encoder

    @cached_property
    def contexts(self):
        """Encodings of the last SPAN rows of every split."""
        contexts = tqc.Contexts(self.encoder, self.market, torch.device("cpu"))
        # a training run fills in pieces while time remains: here all at once
        contexts.rows = contexts.fill(self.rows, math.inf, lambda: False)
        return contexts

    @cached_property
    def table(self) -> np.ndarray:
        """(T, n_tech + 5) columns, the HMM's too where --no-hmm hides them from the agent."""
        return self.model.transform(self.market.bars)

    @property
    def posteriors(self) -> np.ndarray:
        """(T, 4)"""
        return self.table[:, self.market.n_tech :][:, : features.STATES].astype(
            np.float64
        )

    @cached_property
    def emission(self) -> np.ndarray:
        """(T,) log volatility of the bars, which the HMM reads."""
        bars = self.market.bars
        return asset_views(bars.ohlcv[0], bars.timestamp, self.model.assets[0]).lg

    @property
    def regimes(self) -> tuple[np.ndarray, str]:
        """(T,) the true regime where it is known, else the most likely state."""
        truth = self.market.bars.truth
        if truth:
            return truth.regime, "regime"
        return self.posteriors.argmax(1), "state"

    def earned(self, path, split) -> np.ndarray:
        """(n,) bp a bar of the exposures `path`; by the known mean where there is one."""
        a, b = self.rows[split]
        return self.market.walk(path, a, b)[int(self.known)] / BP

    @cached_property
    def paths(self) -> dict:
        """split -> exposures (n,) of the policy that ships, flat before the first."""
        return {split: self.path_of(split) for split in self.rows}

    def path_of(self, split, latents=None, w_cost=0.0, policy=None) -> np.ndarray:
        a, _ = self.rows[split]
        latents = self.latents[split] if latents is None else latents
        w_cost = torch.full((len(latents), 1), w_cost)
        values = tqc.afterstate_values(self.agent, latents, w_cost)
        policy = policy or self.config["policy"]
        return tqc.target_path(self.agent, latents, values, self.market, a, w_cost, policy)

    @cached_property
    def latents(self) -> dict:
        """split -> (n, width) the market part of the fusion layer."""
        found = {}
        for split, rows in self.rows.items():
            found[split] = tqc.latents_of(
                self.agent, self.contexts, torch.arange(*rows)
            )
        return found


# ---------------------------------------------------------------------------------------------- HMM
def part_of_bars(bars, stop: int):
    return replace(
        bars,
        timestamp=bars.timestamp[:stop],
        ohlcv=bars.ohlcv[:, :stop],
        filled=bars.filled[:, :stop],
        truth=None,
    )


def arrays(hmm: dict) -> list:
    return [np.array(hmm[key]) for key in ("mean", "var", "trans", "start")]


def library_posterior(hmm: dict, x: np.ndarray) -> np.ndarray:
    """(K,) hmmlearn's posterior of the last row of x (T,): there nothing is left to smooth."""
    from hmmlearn.hmm import GaussianHMM

    mean, var, trans, start = arrays(hmm)
    # "": what is set here stays, nothing is initialised by a fit
    model = GaussianHMM(len(mean), "diag", init_params="")
    model.startprob_, model.transmat_ = start / start.sum(), trans
    model.means_, model.covars_ = mean[:, None], var[:, None]
    return model.predict_proba(x[:, None])[-1]


def log_score(x: np.ndarray, p: np.ndarray, hmm: dict, rows) -> np.ndarray:
    """(n,) log density of x at the bar after each row, given the rows' posteriors p (n, K)."""
    mean, var, trans, _ = arrays(hmm)
    prior = p @ trans
    distance = (x[rows + 1, None] - mean) ** 2 / var
    density = np.exp(-0.5 * distance) / np.sqrt(2 * np.pi * var)
    # a bar that no state explains must not make the mean score infinite
    return np.log(np.maximum((prior * density).sum(1), 1e-300))


def knows_the_next_bar(x, p, hmm, rows, rng) -> tuple[np.ndarray, float]:
    """(n,) gain in log score of the posteriors p (n, K) over their mean; probability of chance.

    Chance: the same posteriors, shifted along the rows.
    """
    # the mean over the same rows: a calm year alone is no gain
    blind = log_score(x, np.broadcast_to(p.mean(0), p.shape), hmm, rows)
    gain = log_score(x, p, hmm, rows) - blind
    null = []
    for shift in shifts(len(p), DRAWS, rng):
        null.append((log_score(x, np.roll(p, shift, 0), hmm, rows) - blind).mean())
    return gain, chance(gain.mean(), null)


def fit_states(x, seed, states=features.STATES) -> dict:
    with patch.object(features, "STATES", states):
        return features.fit_hmm(x, seed)


def other_fits(run: Subject) -> dict:
    """HMMs by other seeds, of fewer states, of half the train rows, and of other segments."""
    train = run.emission[features.WARMUP : run.market.rows["train"][1]]
    half = len(train) // 2
    seed = run.args.seed
    fits = {"its own seed again": fit_states(train, seed)}
    for other in (seed + 1, seed + 2):
        fits[f"seed {other}"] = fit_states(train, other)
    fits["first half of train"] = fit_states(train[:half], seed)
    fits["second half of train"] = fit_states(train[half:], seed)
    for states in (2, 3):
        fits[f"{states} states"] = fit_states(train, seed, states)
    # of a walk-forward: the other segments' runs were fitted on other years
    for folder in sorted(run.folder.parents[1].glob("segment_*/seed_*")):
        path = folder / "checkpoints" / "best.pt"
        if folder.parent != run.folder.parent and path.exists():
            state = load_run(path, Path(tqc.__file__), tqc.SCHEMA)
            fits[folder.parent.name] = state["features"]["hmm"]
    return fits


def audit_hmm(run: Subject, part: Part):
    """Filtered? What its parameters say? Does it know the next bar, as much as another fit does?"""
    hmm = run.model.hmm
    if not run.args.hmm:
        part.judge("off", "--no-hmm: the agent's HMM columns are zeros")
        return
    rows = np.arange(*run.rows["eval"])
    fits = other_fits(run)
    # all of them read the same bars, so that they differ by their parameters only
    filtered = {"this run": run.posteriors}
    for name, fit in fits.items():
        filtered[name] = forward_filter(run.emission, *arrays(fit))
    check_filtered(run, part, hmm)
    check_power(run, part, hmm, fits, filtered, rows)
    check_states(run, part, filtered)
    check_stability(run, part, filtered, rows)
    if run.known and len(run.market.bars.truth.law.sigma) > 1:
        check_regimes(run, part, filtered)
    check_products(run, part)
    draw_states(run, part)


def check_filtered(run, part, hmm):
    """Columns with the future cut off, and beside hmmlearn."""
    bars = run.market.bars
    choice = np.concatenate(
        [np.arange(*run.rows[split]) for split in ("eval", "test")]
    )
    ahead, apart = 0.0, 0.0
    for row in run.rng.choice(choice, CUTS, replace=False):
        there = run.table[row, run.market.n_tech :].astype(np.float64)
        # filtered, not smoothed: a column that knew a later bar would move
        cut = run.model.transform(part_of_bars(bars, row + 1))[
            row, run.market.n_tech :
        ]
        ahead = max(ahead, np.abs(cut - there).max())
        library = library_posterior(hmm, run.emission[: row + 1])
        apart = max(apart, np.abs(library - there[: len(library)]).max())
    part.numbers |= {"ahead": float(ahead), "apart": float(apart)}
    what = (
        f"columns change by {ahead:.2g} when the future is cut off ({CUTS} rows; "
    )
    what += f"at most {SAME:g})"
    part.judge("broken" if ahead > SAME else "sound", what)
    what = f"columns are {apart:.2g} from hmmlearn's posterior on the bars so far "
    what += f"(at most {LIBRARY:g})"
    part.judge("broken" if apart > LIBRARY else "sound", what)


def check_power(run, part, hmm, fits, filtered, rows):
    """The next bar's volatility on eval rows, against no context, another fit, fewer states."""
    x, table, found = run.emission, [], {}
    for name, p in filtered.items():
        fit = fits.get(name, hmm)
        gain, by_chance = knows_the_next_bar(x, p[rows], fit, rows, run.rng)
        found[name] = gain, by_chance
        score = log_score(x, p[rows], fit, rows).mean()
        table.append(
            (name, f"{score:.4f}", f"{gain.mean():+.4f}", f"{by_chance:.3f}")
        )
    head = "fit", "log score a bar", "gain over no context", "probability of chance"
    part.tables.append(("Next bar's log volatility, eval rows", head, table))
    gain, by_chance = found["this run"]
    other, others_chance = found["its own seed again"]
    part.numbers |= {
        "gain": float(gain.mean()),
        "gain_of_refit": float(other.mean()),
    }
    part.numbers["gain_chance"] = by_chance
    # where no fit can do it, that is the market's doing and not this run's
    if others_chance > CHANCE:
        text = "no fit on train rows knows the next bar (probability of chance "
        part.judge("weak", f"{text}{others_chance:.2f})")
        return
    # nearer to the new fit than to no context: gain > other / 2
    lead = interval(2 * gain - other, run.rng)
    text = f"it tells {gain.mean():.4f} nats a bar of the next volatility on eval rows, a new fit "
    text += f"{other.mean():.4f}; probability of chance {by_chance:.3f} (at most {CHANCE}), "
    text += f"twice it less the new fit's: {ends(lead)} (must reach 0)"
    part.judge("broken" if by_chance > CHANCE or lead[1] < 0 else "sound", text)
    fewer = {
        k: log_score(x, filtered[k][rows], fits[k], rows)
        for k in ("2 states", "3 states")
    }
    own = log_score(x, filtered["this run"][rows], hmm, rows)
    # states that add nothing cost the agent columns
    for name, score in fewer.items():
        lead = interval(own - score, run.rng)
        part.numbers[f"lead_over_{name[0]}_states"] = float((own - score).mean())
        if lead[1] < 0:
            part.judge(
                "weak", f"{name} tell the next volatility better: {ends(lead)}"
            )


def check_states(run, part, filtered):
    """A state that is never the most likely one, where other fits use all."""
    train = slice(*run.market.rows["train"])
    used = {}
    for name, p in filtered.items():
        share = np.bincount(p[train].argmax(1), minlength=p.shape[1]) / len(
            p[train]
        )
        used[name] = share
    table = [
        (name, " ".join(f"{s:.3f}" for s in share)) for name, share in used.items()
    ]
    part.tables.append(
        ("Share of train rows by most likely state", ("fit", "shares"), table)
    )
    least = used["this run"].min()
    # other seeds only: half of the rows may really lack a regime
    others = [share.min() for name, share in used.items() if "seed" in name]
    part.numbers["least_state"] = float(least)
    if least == 0 and min(others) > 0:
        text = f"a state is never the most likely one on train rows; other fits: {min(others):.3f}"
        part.judge("broken", f"{text} at least")


def check_stability(run, part, filtered, rows):
    """Share of eval rows on which another fit has the same most likely state."""
    own = filtered["this run"][rows].argmax(1)
    table = []
    for name, p in filtered.items():
        # states are sorted by volatility: equal numbers mean equal states, where as many exist
        if p.shape[1] != features.STATES or name == "this run":
            continue
        other = p[rows].argmax(1)
        same = (own == other).mean()
        null = [
            (np.roll(own, s) == other).mean()
            for s in shifts(len(own), DRAWS, run.rng)
        ]
        by_chance = chance(same, null)
        table.append(
            (name, f"{same:.3f}", f"{np.mean(null):.3f}", f"{by_chance:.3f}")
        )
        if by_chance > CHANCE:
            text = f"{name}: states agree on {same:.0%} of the eval rows, chance {by_chance:.2f}"
            part.judge("weak", f"{text} (at most {CHANCE})")
    head = "other fit", "same state", "shifted", "probability of chance"
    part.tables.append(
        ("Stability over seeds and segments, eval rows", head, table)
    )


def lag_of(guess: np.ndarray, regime: np.ndarray) -> tuple[float, float]:
    """Mean bars until a guess follows a change of regime; share of changes that it misses."""
    changes = np.flatnonzero(np.diff(regime)) + 1
    lags = []
    for start, stop in zip(changes, [*changes[1:], len(regime)]):
        # a guess that comes after the regime has ended again has missed it
        right = np.flatnonzero(guess[start:stop] == regime[start])
        lags.append(right[0] if len(right) else np.nan)
    missed = np.isnan(lags).mean() if lags else np.nan
    return (float(np.nanmean(lags)) if missed < 1 else math.nan), float(missed)


def check_regimes(run, part, filtered):
    """Against the true regime: accuracy, lag; the best filter knows the market's own parameters."""
    truth = run.market.bars.truth
    regime, x = truth.regime, run.emission
    train = slice(*run.market.rows["train"])
    # the best filter of the same emission: moments by the true regime, the true transitions
    kinds = np.arange(len(truth.law.sigma))
    mean = np.array([x[train][regime[train] == k].mean() for k in kinds])
    var = np.array([x[train][regime[train] == k].var() for k in kinds])
    start = np.full(len(kinds), 1 / len(kinds))
    best = forward_filter(x, mean, var, truth.law.regime_transition, start)
    table, names = [], ("this run", "2 states", "3 states")
    shown = {k: filtered[k] for k in names} | {"true parameters": best}
    for name, p in shown.items():
        count = np.stack(
            [p[train][regime[train] == k].sum(0) for k in kinds]
        )  # (R, K)
        # each state stands for the regime that it meets most on train rows
        guess = (p @ np.eye(len(kinds))[count.argmax(0)]).argmax(1)
        cells = [name]
        for split in ("eval", "test"):
            rows = slice(*run.rows[split])
            cells.append(f"{(guess[rows] == regime[rows]).mean():.3f}")
        lag, missed = lag_of(guess[train.start :], regime[train.start :])
        table.append((*cells, f"{lag:.1f}", f"{missed:.0%}"))
        if name == "this run":
            rows = slice(*run.rows["eval"])
            right = (guess[rows] == regime[rows]).mean()
            draws = shifts(len(guess[rows]), DRAWS, run.rng)
            null = [(np.roll(guess[rows], s) == regime[rows]).mean() for s in draws]
            by_chance = chance(right, null)
            part.numbers |= {"accuracy": float(right), "lag": lag, "missed": missed}
    head = "filter", "right, eval", "right, test", "lag, bars", "changes missed"
    part.tables.append(("The true regime", head, table))
    text = f"it names the regime on {right:.1%} of the eval rows, probability of chance "
    part.judge(
        "broken" if by_chance > CHANCE else "sound",
        f"{text}{by_chance:.3f} (at most .05)",
    )


def context_value(run: Subject) -> dict:
    """What HMM columns add to a lasso of the next return, on eval and test rows.

    {"with", "without": explained share of the variance; "gain": (n,) fall of the squared error}
    """
    market, errors, found = run.market, {}, {}
    target = market.expected if run.known else market.ret
    later = np.concatenate(
        [np.arange(*run.rows[split]) for split in ("eval", "test")]
    )
    # every column: the run's screen may have thrown away what a bad context hid
    table = replace(run.model, evidence=[]).transform(market.bars)
    # products too: what the signal means may turn with the regime
    wide = with_products(table, market.n_tech)
    for name, x in (("without", wide[:, : market.n_tech]), ("with", wide)):
        # fitted on train rows alone
        linear, _ = fit_linear(replace(market.series, x=x))
        forecast = (x[later] - linear["center"]) @ np.array(linear["weights"])
        errors[name] = (target[later] - forecast) ** 2
        found[name] = 1 - errors[name].mean() / (target[later] ** 2).mean()
    return found | {
        "gain": (errors["without"] - errors["with"]) / (target[later] ** 2).mean()
    }


def check_products(run, part):
    # shown without a verdict: what a context is worth is the market's, not the HMM's
    found = context_value(run)
    low_high = interval(found["gain"], run.rng)
    of = "known mean of the next return" if run.known else "next return"
    rows = [("columns", f"{found['without']:.4f}", "")]
    rows.append(
        ("columns, HMM and products", f"{found['with']:.4f}", ends(low_high))
    )
    part.numbers["context_value"] = float(found["gain"].mean())
    title = f"Share of the {of} that a lasso explains, eval and test rows"
    part.tables.append((title, ("lasso on", "explained", "gain"), rows))


def draw_states(run, part):
    a, b = run.rows["eval"]
    a = max(a, b - POINTS)
    fig, (ax,) = canvas(9.4, 2.6)
    p = run.posteriors[a:b]
    labels = [f"state {k}" for k in range(p.shape[1])]
    ax.stackplot(
        np.arange(a, b), p.T, labels=labels, colors=CYCLE[: p.shape[1]], alpha=0.75
    )
    if run.known and len(run.market.bars.truth.law.sigma) > 1:
        ax.step(
            np.arange(a, b),
            run.market.bars.truth.regime[a:b],
            "k",
            lw=1.2,
            label="true regime",
        )
    ax.set_xlabel("row")
    caption = "Filtered posteriors, calmest state first."
    part.figures.append(("hmm_states", "States, last eval rows", fig, caption))


# ------------------------------------------------------------------------------------------ encoder
def audit_mae(run: Subject, part: Part):
    """Reconstruction, against the column's mean and the last visible bar; a probe."""
    live = np.flatnonzero(run.model.passed)
    if not len(live):
        part.judge(
            "off", "no technical column passed the screen: every window is zeros"
        )
        return
    # the mean of train rows: the encoder was pre-trained on no others
    train = run.market.table[slice(*run.market.rows["train"]), : run.market.n_tech]
    mean = torch.as_tensor(train.mean(0))
    fresh = new_encoder(run)
    errors = {
        split: reconstruct(run, fresh, split, mean, live) for split in run.rows
    }
    found = {
        split: {k: v.mean() for k, v in of.items()} for split, of in errors.items()
    }
    names = "encoder", "a new encoder", "column mean", "last visible bar"
    table = [(split, *(f"{found[split][k]:.4f}" for k in names)) for split in found]
    part.tables.append(
        ("Squared error at hidden bars, columns in use", ("split", *names), table)
    )

    of = errors["eval"]
    table = []
    for i, column in enumerate(live):
        cells = [of[k][:, i].mean() for k in names]
        by_mean, by_last = (1 - cells[0] / other for other in cells[2:])
        shown = f"{by_mean:+.2f}", f"{by_last:+.2f}"
        table.append(
            (run.model.columns[column], *(f"{c:.3f}" for c in cells), *shown)
        )
    head = "column", *names, "better than mean", "than last"
    part.tables.append(("By column, eval rows", head, table))

    error, other, by_mean, by_last = (of[k].mean(1) for k in names)
    gain, others = by_mean - error, by_mean - other
    skill = 1 - error.mean() / by_mean.mean()
    part.numbers |= {"skill": float(skill), "gain": float(gain.mean())}
    part.numbers["gain_of_new"] = float(others.mean())
    low_high = interval(gain, run.rng)
    text = (
        f"hidden bars on eval rows: squared error {error.mean():.3f}, column mean "
    )
    text += f"{by_mean.mean():.3f}, gain {ends(low_high)} (must be above 0)"
    part.judge("broken" if low_high[0] <= 0 else "sound", text)
    # nearer to the new one than to the column mean
    lead = interval(2 * gain - others, run.rng)
    text = f"an encoder that was pre-trained just now gains {others.mean():.3f}, this one "
    text += f"{gain.mean():.3f}; twice this less that: {ends(lead)} (must reach 0)"
    part.judge("broken" if lead[1] < 0 else "sound", text)
    lead = interval(by_last - error, run.rng)
    if lead[1] < 0:
        text = f"the last visible bar reconstructs better: {by_last.mean():.3f} instead of "
        part.judge(
            "weak",
            f"{text}{error.mean():.3f} (difference {ends(lead)}, must reach 0)",
        )
    check_probe(run, part)
    draw_columns(run, part, of, live)


def new_encoder(run: Subject):
    """Pre-trained now, on the same train rows, by as many steps (--encoder: by the default)."""
    steps = run.state["loop"]["mae_steps"] or tqc.Args.mae_steps
    # what pretrain() asks of a run: no limit of time, no log
    trainer = SimpleNamespace(
        args=replace(run.args, mae_steps=steps),
        guard=SimpleNamespace(remaining=lambda: math.inf),
        out_of_time=lambda: False,
        log=lambda *_: None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(run.args.seed)
        encoder = tqc.build_encoder(run.config)
        contexts = tqc.Contexts(
            encoder, run.market, torch.device("cpu"), keep=False
        )
        tqc.pretrain(contexts, trainer, tqc.Loop())
    return encoder.eval()


@torch.no_grad()
def reconstruct(run: Subject, fresh, split: str, mean, live) -> dict:
    """{who: (windows, columns in use) squared error at hidden bars} on a split."""
    a, b = run.rows[split]
    rows = torch.as_tensor(np.unique(np.linspace(a, b - 1, WINDOWS).astype(int)))
    x = run.contexts.windows(rows)
    # one mask for all: they are compared window by window
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(x.shape[:2], generator=generator) < tqc.MASKED
    mask[:, 0], mask[:, -1] = False, True  # a bar to copy, and one to hide
    guesses = {}
    for name, encoder in (("encoder", run.encoder), ("a new encoder", fresh)):
        parts = []
        for piece, hidden in zip(x.split(64), mask.split(64)):
            z = torch.where(
                hidden[..., None], encoder.mask_token, encoder.embed(piece)
            )
            parts.append(encoder.decode(encoder.encode(z)))
        guesses[name] = torch.cat(parts)
    at = (
        torch.where(mask, 0, torch.arange(x.shape[1])).cummax(1).values
    )  # last visible bar
    last = x.gather(1, at[..., None].expand_as(x))
    # windows count alike, however many of their bars are hidden
    weight = mask[..., None] / mask.sum(1)[:, None, None]
    guesses |= {"column mean": mean, "last visible bar": last}
    return {
        k: (((g - x) ** 2 * weight).sum(1)).numpy()[:, live]
        for k, g in guesses.items()
    }


def check_probe(run, part):
    """Ridge of the next return on the last bar's embedding, and on its raw columns; each with HMM
    products."""
    from sklearn.linear_model import RidgeCV
    from sklearn.preprocessing import StandardScaler

    market, contexts = run.market, run.contexts
    target = market.expected if run.known else market.ret
    later = np.concatenate(
        [np.arange(*run.rows[split]) for split in ("eval", "test")]
    )
    train = np.arange(*run.rows["train"])
    hmm = run.table[:, market.n_tech :]
    columns = {
        "raw columns": lambda rows: run.table[rows, : market.n_tech],
        "embedding": lambda rows: contexts(torch.as_tensor(rows))[0][:, -1].numpy(),
    }
    table, errors, scale = [], {}, (target[later] ** 2).mean()
    for name, of in columns.items():
        x = []
        for rows in (train, later):
            own = of(rows)
            x.append(
                with_products(np.concatenate([own, hmm[rows]], 1), own.shape[1])
            )
        # the penalty is the same for all columns, so their scales must be; train rows set both
        scaler = StandardScaler().fit(x[0])
        ridge = RidgeCV(np.geomspace(1, 1e6, 13))
        ridge.fit(scaler.transform(x[0]), market.ret[train])
        forecast = ridge.predict(scaler.transform(x[1]))
        errors[name] = (target[later] - forecast) ** 2 / scale
        match = correlation(forecast, target[later])
        draws = shifts(len(later), DRAWS, run.rng)
        null = [correlation(np.roll(forecast, s), target[later]) for s in draws]
        by_chance = chance(match, null)
        part.numbers[f"probe_{name.split()[0]}"] = float(match)
        table.append(
            (
                name,
                f"{match:+.3f}",
                f"{by_chance:.3f}",
                f"{1 - errors[name].mean():+.4f}",
            )
        )
    head = "ridge on", "correlation", "probability of chance", "explained"
    of = "known mean of the next return" if run.known else "next return"
    part.tables.append(
        (f"Linear probe of the {of}, eval and test rows", head, table)
    )
    lead = interval(errors["raw columns"] - errors["embedding"], run.rng)
    if lead[1] < 0:
        text = "raw columns of the last bar foretell the next return better than its embedding: "
        part.judge("weak", f"{text}explained share {ends(lead)} (must reach 0)")


def correlation(x, y) -> float:
    """0 where one of them does not vary."""
    if not (x.std() and y.std()):
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def draw_columns(run, part, of, live):
    names = [run.model.columns[k] for k in live]
    fig, (ax,) = canvas(
        9.4, max(2.2, 0.19 * len(names) + 0.6), left=1.6, bottom=0.4
    )
    at = np.arange(len(names))
    for i, (who, error) in enumerate(of.items()):
        ax.plot(error.mean(0), at, "o", color=CYCLE[i], ms=4, label=who)
    ax.set_yticks(at, names)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("squared error at hidden bars")
    part.figures.append(
        (
            "mae_columns",
            "Reconstruction by column, eval rows",
            fig,
            "Left is better.",
        )
    )


# --------------------------------------------------------------------------------------------- FiLM
def audit_film(run: Subject, part: Part):
    """Does it move with the context, and what do context, FiLM and forecast earn?"""
    if not run.args.hmm:
        part.judge("off", "--no-hmm: FiLM's input is zeros")
        return
    if not run.model.passed.any():
        part.judge("off", "no technical column passed the screen: nothing to modulate")
        return
    rows = {split: torch.arange(*run.rows[split]) for split in ("eval", "test")}
    inputs = {split: run.contexts(at) for split, at in rows.items()}
    show_film(run, part, torch.cat([hmm for _, hmm, _ in inputs.values()]))
    ratio = film_ratio(run, inputs["eval"])
    part.numbers["ratio"] = ratio
    text = f"a shifted context moves the fused features by {ratio:.2g} of what a shifted "
    text += "market does "
    part.judge(
        "broken" if ratio < ROUNDING else "sound",
        f"{text}(at least {ROUNDING:.2g})",
    )
    ablate(run, part, inputs)


@torch.no_grad()
def film_ratio(run, inputs) -> float:
    z, hmm, forecast = inputs
    # without the last feature: the forecast passes FiLM by
    intact = run.agent.extractor(z, hmm, forecast)[:, :-1]
    # half the rows is the farthest shift: nothing of the own neighbourhood is left
    half = len(z) // 2
    by_context = (
        run.agent.extractor(z, hmm.roll(half, 0), forecast)[:, :-1] - intact
    )
    by_market = run.agent.extractor(z.roll(half, 0), hmm, forecast)[:, :-1] - intact
    return float(
        by_context.square().mean().sqrt() / by_market.square().mean().sqrt()
    )


@torch.no_grad()
def show_film(run, part, hmm):
    """gamma and beta over the data and where one state is certain."""
    film = run.agent.extractor.film
    states = features.STATES
    # a one at the state's column, the remaining HMM columns 0
    pure = torch.eye(states, tqc.HMM_COLUMNS)
    gamma, beta = film(hmm).chunk(2, -1)
    table = [("over eval and test rows, mean", *sizes(gamma, beta))]
    table.append(
        (
            "their spread over rows",
            *sizes(gamma - gamma.mean(0), beta - beta.mean(0)),
        )
    )
    at_pure = 1 + film(pure).chunk(2, -1)[0]
    for k in range(states):
        g, b = film(pure[k : k + 1]).chunk(2, -1)
        table.append((f"state {k} certain", *sizes(g, b)))
    part.numbers |= {
        "gamma_spread": float(gamma.std(0).mean()),
        "beta_spread": float(beta.std(0).mean()),
    }
    head = "where", "gamma, mean", "gamma - 1, RMS", "beta, mean", "beta, RMS"
    part.tables.append(("FiLM", head, table))
    fig, (ax,) = canvas(9.4, 2.4, bottom=0.42)
    order = np.argsort((at_pure[-1] - at_pure[0]).numpy())
    for k in range(states):
        ax.plot(at_pure[k].numpy()[order], color=CYCLE[k], label=f"state {k}")
    ax.axhline(1, color="k", lw=0.8, ls=":")
    ax.set_xlabel("channel, by what the storm changes")
    ax.set_ylabel("gamma")
    part.figures.append(
        ("film_gamma", "gamma where one state is certain", fig, "1: untouched.")
    )


def sizes(gamma, beta) -> tuple:
    root = [float(x.square().mean().sqrt()) for x in (gamma, beta)]
    return (
        f"{1 + gamma.mean():.3f}",
        f"{root[0]:.3f}",
        f"{beta.mean():+.3f}",
        f"{root[1]:.3f}",
    )


def variants(run: Subject, split: str, inputs):
    """(name, latents) of the agent with one input spoiled; names that repeat are draws."""
    z, hmm, forecast = inputs
    extractor, start = run.agent.extractor, run.rows[split][0]
    at = np.arange(start, start + len(z))
    yield "as it is", extractor(z, hmm, forecast)
    # weights and bias 0: FiLM returns 0, and gamma is 1 plus that
    off = {
        name: torch.zeros_like(x) for name, x in extractor.film.state_dict().items()
    }
    with swapped(extractor.film, off):
        yield "FiLM off (gamma 1, beta 0)", extractor(z, hmm, forecast)
    yield (
        "FiLM at its mean",
        extractor(z, hmm.mean(0, keepdim=True).expand_as(hmm), forecast),
    )
    yield "forecast 0", extractor(z, hmm, 0 * forecast)
    # a generator of its own: the draws do not move with what was judged before
    rng = np.random.default_rng(1)
    for shift in shifts(len(z), WALKS, rng):
        moved = hmm.roll(int(shift), 0)
        latents = extractor(z, moved, forecast)
        yield "context shifted in FiLM", latents
        if run.args.forecast:
            # the lasso reads the context times the columns: its share goes with it
            table = np.concatenate(
                [run.market.table[at, : run.market.n_tech], moved.numpy()], 1
            )
            other = torch.as_tensor(run.model.forecast(table))[:, None]
            latents = torch.cat([latents[:, :-1], other], 1)
        yield "context shifted in FiLM and forecast", latents
    for shift in shifts(len(z), FEW, rng):
        yield "encoding shifted", extractor(z.roll(int(shift), 0), hmm, forecast)


@contextlib.contextmanager
def swapped(module, state: dict):
    own = {name: x.clone() for name, x in module.state_dict().items()}
    module.load_state_dict(state)
    try:
        yield
    finally:
        module.load_state_dict(own)


@torch.no_grad()
def ablate(run, part, inputs):
    """What the agent earns on eval and test rows with an input spoiled."""
    earned = {}
    for split in inputs:
        for name, latents in variants(run, split, inputs[split]):
            path = run.path_of(split, latents)
            earned.setdefault(name, {}).setdefault(split, []).append(
                run.earned(path, split)
            )
    series = {}  # name -> (draws, rows of eval and test)
    for name, of in earned.items():
        series[name] = np.concatenate([np.array(of[split]) for split in of], 1)
    intact = series.pop("as it is")[0]
    table = [("as it is", f"{intact.mean():+.3f}", "", "", "")]
    loss = {}
    for name, draws in series.items():
        # row by row against the same market: most of the noise is in both
        paired = intact - draws.mean(0)
        loss[name] = paired.mean(), interval(paired, run.rng)
        by_chance = (
            chance(intact.mean(), draws.mean(1)) if len(draws) == WALKS else None
        )
        cells = f"{draws.mean():+.3f}", f"{paired.mean():+.3f}", ends(loss[name][1])
        table.append(
            (name, *cells, "" if by_chance is None else f"{by_chance:.2f}")
        )
    head = (
        "agent",
        f"bp a bar, {run.unit}",
        "it costs",
        "interval",
        "probability of chance",
    )
    part.tables.append(("With an input spoiled, eval and test rows", head, table))
    part.numbers |= {
        f"cost, {name}": float(mean) for name, (mean, _) in loss.items()
    }
    draw_costs(part, loss, run.unit)

    mean, low_high = loss["context shifted in FiLM and forecast"]
    value = context_value(run)["gain"]
    worth = interval(value, run.rng)
    moves = max(np.ptp(run.paths[split]) for split in inputs) > STILL
    text = f"the true context earns {mean:+.2f} bp a bar more than a shifted one ({ends(low_high)})"
    # only an agent that moves can ignore a context, and only one that pays
    if worth[0] > 0 and moves:
        text += " (must be above 0); a lasso's explained share rises with it by "
        text += f"{value.mean():.2f} ({ends(worth)})"
        part.judge("broken" if low_high[0] <= 0 else "sound", text)
    elif low_high[0] > 0:
        part.judge("sound", text)
    mean, low_high = loss["context shifted in FiLM"]
    if low_high[0] <= 0:
        text = f"FiLM's own share of that is not to be seen: {mean:+.3f} bp a bar "
        part.judge("weak", f"{text}({ends(low_high)})")


def draw_costs(part, loss, unit):
    fig, (ax,) = canvas(9.4, 0.34 * len(loss) + 0.6, left=2.6, bottom=0.42)
    for i, (mean, (low, high)) in enumerate(loss.values()):
        ax.plot([low, high], [i, i], color=CYCLE[0], lw=2)
        ax.plot(mean, i, "o", color=CYCLE[0])
    ax.axvline(0, color="k", lw=0.8)
    ax.set_yticks(range(len(loss)), list(loss))
    ax.set_xlabel(f"bp a bar that it costs, {unit}")
    part.figures.append(
        ("film_costs", "What each input earns", fig, "95 % intervals.")
    )


# -------------------------------------------------------------------------------------------- agent
def audit_tqc(run: Subject, part: Part):
    """Does the position answer to the market, does that earn, do the quantiles hold?"""
    found = {split: diagnose_split(run, split) for split in run.rows}
    check_edge(run, part, found)
    check_other_policy(run, part)
    check_calibration(run, part)
    check_regime_rewards(run, part)
    check_w_cost(run, part)
    draw_path(run, part)


def diagnose_split(run: Subject, split: str) -> dict:
    """diagnose() and the verdict, as the script makes them, of another split."""
    contexts = run.contexts
    # it looks at the eval rows: for this call, those of `split`
    own, contexts.rows = contexts.rows, {"eval": run.rows[split]}
    try:
        found = tqc.diagnose(run.agent, contexts)
    finally:
        contexts.rows = own
    audit = {name.split("/")[1]: x for name, x in found.items()}
    market, path = run.market, run.paths[split]
    a, b = run.rows[split]
    series = replace(market.series, rows=market.rows | {"eval": (a, b)})
    paths = {name: [p] for name, p in tqc.fixed_paths(market, a, b).items()} | {
        "agent": [path]
    }
    audit |= edges([series], paths, tqc.LEVELS, market.bars.bars_per_year)
    reward, mean, change, held = market.walk(path, a, b)
    metrics, _ = tqc.path_metrics(
        reward, mean, change, held, market.bars.bars_per_year
    )
    updates = run.state["loop"]["updates"]
    word, reasons = verdict(audit, metrics, updates, tqc.FEW_UPDATES, b - a, False)
    # the same positions at other times: what a share of long, short and flat earns by itself
    null = []
    for shift in shifts(b - a, DRAWS, run.rng):
        null.append(run.earned(np.roll(path, shift), split).mean())
    earned = run.earned(path, split)
    audit |= {
        "verdict": word,
        "reason": reasons[0],
        "turnover": metrics["turnover"],
    }
    return audit | {"earned": earned.mean(), "chance": chance(earned.mean(), null)}


def check_edge(run, part, found):
    names = {
        "earned": f"bp a bar, {run.unit}",
        "chance": "probability of chance",
        "edge_bps": "edge, bp",
        "rival_edge_bps": "sparse_linear, bp",
        "optimum_edge_bps": "optimum, bp",
        "state_dependence": "state dependence",
        "turnover": "turnover",
        "attribution_technical": "by market",
        "attribution_hmm": "by HMM",
        "attribution_position": "by position",
        "q_action_spread": "spread of Q",
        "quantile_spread": "spread of quantiles",
        "verdict": "verdict",
    }
    table = []
    for name, label in names.items():
        cells = [found[split][name] for split in found]
        table.append(
            (label, *(c if isinstance(c, str) else number(c) for c in cells))
        )
    part.tables.append(("Diagnostics by split", ("", *found), table))
    of = found["eval"]
    part.numbers |= {k: v for k, v in of.items() if not isinstance(v, str)}
    part.numbers["verdict"] = of["verdict"]
    text = f"eval rows: {of['verdict']} ({of['reason']}); {of['earned']:+.2f} bp a bar, edge "
    text += (
        f"{of['edge_bps']:+.2f} over the best constant or flat, state dependence "
    )
    text += f"{of['state_dependence']:.3f} (at least {STILL}); positions shifted along the "
    text += (
        f"rows earn as much with probability {of['chance']:.3f} (at most {CHANCE})"
    )
    # an undertrained agent is weak, not broken, where its positions earn more than chance
    level = "sound"
    if of["verdict"] in ("collapsed", "untrained"):
        level = "broken"
    elif of["verdict"] == "undertrained":
        level = "broken" if of["chance"] > CHANCE else "weak"
    elif of["verdict"] == "undecided":
        level = "weak"
    part.judge(level, text)


@torch.no_grad()
def check_other_policy(run, part):
    """State dependence of both policies: the actor collects even where the grid ships."""
    latents = run.latents["eval"]
    table, flat = [], torch.zeros(len(latents), 1)
    for policy in tqc.POLICIES:
        with patch.dict(run.agent.config, policy=policy):
            fixed = [
                tqc.act(run.agent, latents, flat + p, flat)
                for p in (-1.0, 0.0, 1.0)
            ]
        # over rows, at one held position: what only the market can cause
        spread = float(torch.stack(fixed).std(1).mean())
        path = run.path_of("eval", policy=policy)
        ships = " (ships)" if policy == run.config["policy"] else ""
        table.append(
            (
                policy + ships,
                f"{spread:.3f}",
                f"{run.earned(path, 'eval').mean():+.3f}",
            )
        )
        part.numbers[f"state_dependence_{policy}"] = spread
        if not ships and spread < STILL and part.numbers["verdict"] == "healthy":
            text = f"{policy}, which does not ship, takes one position whatever the market: state "
            part.judge(
                "broken", f"{text}dependence {spread:.3f} (at least {STILL})"
            )
    head = "policy", "state dependence", f"bp a bar, {run.unit}"
    part.tables.append(("Both policies, eval rows", head, table))


@torch.no_grad()
def calibration(run: Subject, split: str, w_cost=0.0) -> dict:
    """Place of what came (n,) among the predicted quantiles, 0 to 1, along the policy's path.

    "return": the discounted rewards that really followed; "step": the next reward and a quantile
    drawn at the next row, as training sees it. And the size of that return, "size".
    """
    agent, (a, b) = run.agent, run.rows[split]
    latents, gamma = run.latents[split], run.config["gamma"]
    cost = torch.full((len(latents), 1), w_cost)
    path = run.path_of(split, w_cost=w_cost)
    after = torch.as_tensor(path[:, None]).float()
    blocks = zip(latents.split(512), after.split(512), cost.split(512))
    atoms = torch.cat([agent.critic(*block)[:, 0].flatten(1) for block in blocks])
    atoms = atoms.sort(1).values.double().numpy()  # (n, M)

    scale, penalty = float(agent.reward_scale), run.config["penalty"] * w_cost
    reward, _, change, _ = run.market.walk(path, a, b)
    span = slice(a, b)
    earned = path * (run.market.ret[span] - run.market.funding[span])
    held = scale * np.log(
        np.maximum(1 + earned, tqc.RUIN)
    )  # what holding earns, no trade
    whole = scale * (reward - penalty * change)
    # from the end; the first step is charged nothing, for its trade is already in the position
    result, tail = held.copy(), 0.0
    for t in reversed(range(len(path))):
        result[t] += gamma * tail
        tail = whole[t] + gamma * tail
    # later returns are cut short by the end of the rows
    n = max(len(path) - int(HORIZON / (1 - gamma)), 1)
    # the next row's quantiles stand for the rest, as in the critic's target
    drawn = run.rng.integers(atoms.shape[1], size=n)
    rows = np.arange(n)
    following = atoms[rows + 1, drawn] + (whole - held)[1 : n + 1]
    limit = tqc.REWARD_CLIP
    target = held[:n].clip(-limit, limit) + gamma * following
    return {
        "return": place(atoms[:n], result[:n]),
        "step": place(atoms[:n], target),
        "size": float(result[:n].std()),
    }


def place(atoms: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(n,) share of the atoms (n, M) below x (n,); ties count half."""
    below = (atoms < x[:, None]).mean(1)
    return (below + (atoms <= x[:, None]).mean(1)) / 2


def inside(u: np.ndarray) -> np.ndarray:
    edge = (1 - INNER) / 2  # left out at either end
    return ((u > edge) & (u < 1 - edge)).astype(float)


def check_calibration(run, part):
    """Shares inside the predicted 80 % range; three errors, each nearer to calibrated or not."""
    table, places = [], {}
    for split in run.rows:
        of = places[split] = calibration(run, split)
        cells = [inside(of[k]).mean() for k in ("step", "return")]
        table.append(
            (split, *(f"{c:.3f}" for c in cells), f"{of['return'].mean():.3f}")
        )
    head = "rows", "inside, next step", "inside, return", "mean place of the return"
    regime, kind = run.regimes
    a, b = run.rows["eval"]
    of = places["eval"]
    for k in np.unique(regime[a:b]):
        here = regime[a:b][: len(of["step"])] == k
        if here.any():
            cells = [inside(of[name])[here].mean() for name in ("step", "return")]
            cells.append(of["return"][here].mean())
            table.append((f"eval, {kind} {k}", *(f"{c:.3f}" for c in cells)))
    for w in (0.5, 1.0):
        other = calibration(run, "eval", w)
        cells = [inside(other[name]).mean() for name in ("step", "return")]
        cells.append(other["return"].mean())
        table.append((f"eval, w_cost {w:g}", *(f"{c:.3f}" for c in cells)))
    title = f"Calibration: share inside the predicted {INNER:.0%} range, place among the quantiles"
    part.tables.append((title, head, table))
    draw_pit(part, of)

    step, whole = (inside(of[name]) for name in ("step", "return"))
    part.numbers |= {
        "inside_step": float(step.mean()),
        "inside_return": float(whole.mean()),
    }
    part.numbers["place"] = float(of["return"].mean())
    if of["size"] < SAME:
        part.judge(
            "sound", "it never holds a position on eval rows: nothing to calibrate"
        )
        return
    # nearer to a point, to everything, or to one side than to a calibrated critic
    narrow, wide, side = INNER / 2, (1 + INNER) / 2, 0.25
    reach = interval(step, run.rng)
    text = f"{step.mean():.0%} of the next steps lie inside the predicted {INNER:.0%} range "
    text += f"({ends(reach)}; nearer to {INNER} than to 0: above {narrow})"
    part.judge("broken" if reach[1] < narrow else "sound", text)
    reach = interval(whole, run.rng)
    text = f"{whole.mean():.0%} of the returns lie inside the predicted {INNER:.0%} range "
    if reach[0] > wide:
        part.judge(
            "broken",
            f"{text}({ends(reach)}; nearer to {INNER} than to 1: below {wide:g})",
        )
    if reach[1] < INNER:
        part.judge(
            "weak",
            f"{text}({ends(reach)}): too narrow, so do not read them as risk",
        )
    reach = interval(of["return"], run.rng)
    text = f"returns stand at {of['return'].mean():.2f} among their quantiles ({ends(reach)}; "
    text += f"nearer to .5 than to an end: from {side} to {1 - side})"
    one_sided = reach[1] < side or reach[0] > 1 - side
    part.judge("broken" if one_sided else "sound", text)


def check_regime_rewards(run, part):
    regime, kind = run.regimes
    table = []
    for split in ("eval", "test"):
        a, b = run.rows[split]
        everyone = {"agent": run.paths[split]} | tqc.fixed_paths(run.market, a, b)
        names = [k for k in ("agent", "sparse_linear", "optimum") if k in everyone]
        for k in np.unique(regime[a:b]):
            here = regime[a:b] == k
            cells = [
                f"{run.earned(everyone[name], split)[here].mean():+.2f}"
                for name in names
            ]
            held = run.paths[split][here]
            cells += [
                f"{here.mean():.0%}",
                f"{held.mean():+.2f}",
                f"{np.abs(held).mean():.2f}",
            ]
            table.append((f"{split}, {kind} {k}", *cells))
    head = "rows", *names, "share of rows", "mean exposure", "mean size"
    part.tables.append((f"By {kind}: bp a bar, {run.unit}", head, table))


def check_w_cost(run, part):
    """The shown dislike of trading must lower the turnover, where training charged it."""
    table, trades = [], []
    for w in (0.0, 0.25, 0.5, 0.75, 1.0):
        path = run.path_of("eval", w_cost=w)
        change = np.abs(np.diff(path, prepend=0.0))
        trades.append(change)
        table.append(
            (
                f"{w:g}",
                f"{change.mean():.4f}",
                f"{run.earned(path, 'eval').mean():+.3f}",
            )
        )
    head = "w_cost", "turnover", f"bp a bar, {run.unit}"
    part.tables.append(("By w_cost, eval rows", head, table))
    # w_cost 0 less w_cost 1, row by row
    saved = trades[0] - trades[-1]
    part.numbers["turnover_saved"] = float(saved.mean())
    low_high = interval(saved, run.rng)
    if run.config["penalty"] > 0 and trades[0].sum() > 2 and low_high[1] < 0:
        part.judge(
            "weak",
            f"it trades more when trading costs more: turnover falls by {ends(low_high)}",
        )


def draw_pit(part, of):
    fig, (ax,) = canvas(9.4, 2.4)
    for i, name in enumerate(("step", "return")):
        label = {"step": "next step", "return": "discounted return"}[name]
        ax.hist(of[name], 20, density=True, alpha=0.5, color=CYCLE[i], label=label)
    ax.axhline(1, color="k", lw=0.8, ls=":")
    ax.set_xlabel("place among the predicted quantiles")
    caption = "Calibrated: flat at 1. High ends: too narrow."
    part.figures.append(
        ("tqc_places", "Calibration of the quantiles, eval rows", fig, caption)
    )


def draw_path(run, part):
    a, b = run.rows["test"]
    fig, axes = canvas(9.4, 3.6, 2, sharex=True)
    everyone = {"agent": run.paths["test"]} | tqc.fixed_paths(run.market, a, b)
    for i, name in enumerate(
        k for k in ("agent", "sparse_linear", "optimum") if k in everyone
    ):
        total = np.cumsum(run.earned(everyone[name], "test"))
        axes[0].plot(
            np.arange(a, b),
            total / 100,
            color=CYCLE[i],
            label=name.replace("_", " "),
        )
    axes[0].set_ylabel(f"% {run.unit}")
    axes[1].plot(np.arange(a, b), everyone["agent"], color=CYCLE[0], lw=0.7)
    axes[1].set_ylabel("exposure")
    axes[1].set_xlabel("row")
    part.figures.append(
        ("tqc_path", "Test rows", fig, "Simple sums, net of costs.")
    )


# ------------------------------------------------------------------------------------------- report
def number(x) -> str:
    if x is None:
        return ""
    return f"{x:.3g}" if isinstance(x, float) and abs(x) < 1000 else f"{x}"


def print_part(part: Part, console: Console):
    console.rule(f"{TITLES[part.name]}: {part.verdict}", align="left")
    for title, head, rows in part.tables:
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for i, name in enumerate(head):
            table.add_column(name, justify="right" if i else "left")
        for row in rows:
            table.add_row(*map(str, row))
        console.print(table)


def build(folder: Path, parts: list[Part], command: str) -> Page:
    page = Page()
    page.add(f"<h1>Audit of {esc(folder.name)}</h1>")
    page.add('<div class="chips">')
    for part in parts:
        chip = f"{TITLES[part.name]} <b>{part.verdict}</b>"
        page.add(f'<span class="chip {TONES[part.verdict]}">{chip}</span>')
    page.add(f"</div><pre>{esc(command)}</pre><!--nav-->")
    for part in parts:
        page.section(
            part.name, TITLES[part.name], f"{part.verdict}: {RULE[part.verdict]}"
        )
        # the worst first: it made the verdict
        checks = sorted(part.checks, key=lambda c: -LEVELS.index(c[0]))
        reasons = "".join(
            f"<li><b>{level}</b>: {esc(why)}</li>" for level, why in checks
        )
        page.add(f'<ul class="reasons">{reasons}</ul>')
        page.add('<div class="grid">')
        for name, title, fig, caption in part.figures:
            page.plot(name, title, fig, caption, wide=True)
        page.add("</div>")
        for title, head, rows in part.tables:
            page.add(
                f'<h3 style="margin-top:26px">{esc(title)}</h3>{html_table(head, rows)}'
            )
    return page


def html_table(head, rows) -> str:
    first = f'<th style="text-align:left">{esc(head[0])}</th>'
    first += "".join(f"<th>{esc(name)}</th>" for name in head[1:])
    body = ""
    for row in rows:
        cells = "".join(f"<td>{esc(cell)}</td>" for cell in row[1:])
        body += f"<tr><th>{esc(row[0])}</th>{cells}</tr>"
    table = f"<table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def write(folder: Path, parts: list[Part], command: str):
    """RUN_DIR/audit/, whole or not at all."""
    out = folder / "audit"
    half = folder / f".audit.{os.getpid()}.tmp"
    found = {}
    for part in parts:
        record = {
            "verdict": part.verdict,
            "checks": part.checks,
            "numbers": part.numbers,
        }
        found[part.name] = record
    try:
        with matplotlib.rc_context(RC):
            page = build(folder, parts, command)
            write_figures(page, half)
        text = page.html(f"audit: {folder.name}")
        (half / "audit.html").write_text(text, encoding="utf-8")
        write_json_atomic(found, half / "audit.json")
        shutil.rmtree(out, ignore_errors=True)
        os.replace(half, out)
    finally:
        shutil.rmtree(half, ignore_errors=True)


AUDITS = {"hmm": audit_hmm, "mae": audit_mae, "film": audit_film, "tqc": audit_tqc}


def audit_run(folder: Path, mode: str) -> list[Part]:
    """The parts of a run directory, judged."""
    run, parts = Subject(folder), []
    for name, audit in AUDITS.items():
        if mode in (name, "all"):
            part = Part(name)
            with matplotlib.rc_context(RC):
                audit(run, part)
            parts.append(part)
    return parts


def run_dirs(args: Args) -> list[Path]:
    if args.run_dir is not None:
        return [Path(args.run_dir)]
    folder = Path(args.root) / "logs" / args.name / f"segment_{args.segment}"
    found = sorted(path for path in folder.glob("seed_*") if path.is_dir())
    refuse((not found, f"--segment {args.segment}: {folder} holds no run"))
    return found


def main(argv=None) -> dict:
    args, _ = parse_args(Args, argv)
    if args.torch_threads:
        torch.set_num_threads(args.torch_threads)
    console = Console(width=max(shutil.get_terminal_size((120, 24)).columns, 100))
    command = " ".join(
        ["python scripts/audit_pipeline.py", *map(str, argv or sys.argv[1:])]
    )
    found = {}
    for folder in run_dirs(args):
        parts = audit_run(folder, args.mode)
        write(folder, parts, command)
        for part in parts:
            print_part(part, console)
        print(f"\n{folder}: audit/audit.html, audit/audit.json")
        for part in parts:
            print(f"{TITLES[part.name]}: {part.verdict}: {'; '.join(part.reasons)}")
        found[str(folder)] = {part.name: part.verdict for part in parts}
    broken = any("broken" in of.values() for of in found.values())
    return {"exit_code": int(broken), "verdicts": found}


if __name__ == "__main__":
    exit_with(main)
