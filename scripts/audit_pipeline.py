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

import json
import math
import os
import shlex
import shutil
import sys
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.run import (  # noqa: E402
    UsageError,
    answer_help,
    args_of,
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
# bars x (1 - gamma) at the end of a split whose returns are not yet known
HORIZON = 5
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
    # (level, the number and what it is held against)
    checks: list = field(default_factory=list)
    numbers: dict = field(default_factory=dict)
    tables: list = field(default_factory=list)  # (title, head, rows)
    figures: list = field(default_factory=list)  # (name, title, figure, caption)

    def judge(self, level: str, reason: str):
        self.checks.append((level, reason))

    def judge_by(self, good: bool, reason: str):
        """Sound or broken; what is not a number is not good."""
        self.judge("sound" if good else "broken", reason)

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
    as_well = (null >= value).sum()
    return float((1 + as_well) / (1 + len(null)))


def against_shifts(score, x: np.ndarray, rng) -> tuple[float, float, float]:
    """score(x), the mean score of x (n, ...) shifted along its rows, the probability of chance."""
    value = score(x)
    null = []
    for shift in shifts(len(x), DRAWS, rng):
        null.append(score(np.roll(x, shift, 0)))
    return float(value), float(np.mean(null)), chance(value, null)


def interval(x: np.ndarray, rng, draws: int = 1000) -> tuple[float, float]:
    """95 % interval of the mean of x (n,), whose rows need not be independent.

    Circular block bootstrap (Politis and Romano 1992), blocks of the root of n.
    """
    n = len(x)
    length = max(1, round(math.sqrt(n)))
    blocks = -(-n // length)
    # a block's sum is a difference of running sums; behind the last row the first ones follow
    circle = np.concatenate([[0.0], x, x[:length]])
    total = np.cumsum(circle)
    start = rng.integers(n, size=(draws, blocks))
    sums = total[start + length] - total[start]
    means = sums.mean(1) / length
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def ends(low_high: tuple) -> str:
    return f"95 % {low_high[0]:+.3g} to {low_high[1]:+.3g}"


# ------------------------------------------------------------------------------------- the subject
class Subject:
    """A finished run, rebuilt from its directory by the script's own functions, in float32."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        flags = folder / "args.json"
        best = folder / "checkpoints" / "best.pt"
        refuse(
            (not folder.is_dir(), f"{folder}: no such folder"),
            (not flags.exists(), f"{folder}: holds no args.json: give a run directory"),
            (not best.exists(), f"{best}: no such file: the run has no agent yet"),
        )
        self.state = load_run(best, Path(tqc.__file__), tqc.SCHEMA)
        try:
            self.args = args_of(tqc.Args, json.loads(flags.read_text()))
        except ValueError as e:  # no JSON, or the flags of another version
            raise UsageError(f"{flags}: {e}") from e
        self.config = self.state["config"]
        # the columns as the run fitted them: a new fit would be another run's
        self.model = FeatureModel.from_state_dict(self.state["features"])
        self.market = tqc.load_market(self.args, self.model)
        there = self.state["data"]
        other = self.market.bars.sha256 != there["sha256"]
        why = f"--data {self.args.data}: has changed since {folder} was trained on it"
        refuse((other, why))
        # a walk-forward leaves out more rows between the splits than the script alone
        rows = there["rows"].items()
        self.market.rows = {split: tuple(ends) for split, ends in rows}
        # its own: the audit of a run says the same at every call
        self.rng = np.random.default_rng(0)
        # made markets know the mean of each return: measured by it, luck does not count
        self.known = self.market.bars.truth is not None
        self.unit, self.target, self.target_name = "realised", self.market.ret, "next return"
        if self.known:
            self.unit, self.target = "expected", self.market.expected
            self.target_name = "known mean of the next return"
        self.rows = {}
        for split, (start, stop) in self.market.rows.items():
            self.rows[split] = max(start, stop - SPAN), stop
        unseen = "eval", "test"
        later = [np.arange(*self.rows[split]) for split in unseen]
        self.later = np.concatenate(later)

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
        hmm = self.table[:, self.market.n_tech :]
        return hmm[:, : features.STATES].astype(np.float64)

    @cached_property
    def emission(self) -> np.ndarray:
        """(T,) log volatility of the bars, which the HMM reads."""
        bars = self.market.bars
        asset = self.model.assets[0]
        return asset_views(bars.ohlcv[0], bars.timestamp, asset).lg

    @property
    def regimes(self) -> tuple[np.ndarray, str]:
        """(T,) the true regime where it is known, else the most likely state."""
        truth = self.market.bars.truth
        if truth:
            return truth.regime, "regime"
        return self.posteriors.argmax(1), "state"

    def span(self, split) -> slice:
        return slice(*self.rows[split])

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
        return tqc.target_path(
            self.agent, latents, values, self.market, a, w_cost, policy
        )

    @cached_property
    def latents(self) -> dict:
        """split -> (n, width) the market part of the fusion layer."""
        found = {}
        for split, rows in self.rows.items():
            at = torch.arange(*rows)
            found[split] = tqc.latents_of(self.agent, self.contexts, at)
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
    model.startprob_ = start / start.sum()
    model.transmat_ = trans
    model.means_ = mean[:, None]
    model.covars_ = var[:, None]
    return model.predict_proba(x[:, None])[-1]


def log_score(x: np.ndarray, p: np.ndarray, hmm: dict, rows) -> np.ndarray:
    """(n,) log density of x at the bar after each row, given the rows' posteriors p (n, K)."""
    mean, var, trans, _ = arrays(hmm)
    prior = p @ trans
    distance = (x[rows + 1, None] - mean) ** 2 / var
    scale = np.sqrt(2 * np.pi * var)
    density = np.exp(-0.5 * distance) / scale
    # a bar that no state explains must not make the mean score infinite
    return np.log(np.maximum((prior * density).sum(1), 1e-300))


def knows_the_next_bar(x, p, hmm, rows, rng) -> tuple[np.ndarray, float]:
    """(n,) gain in log score of the posteriors p (n, K) over their mean; probability of chance."""
    # the mean over the same rows: a calm year alone is no gain
    mean = np.broadcast_to(p.mean(0), p.shape)
    blind = log_score(x, mean, hmm, rows)

    def gain(p):
        return log_score(x, p, hmm, rows) - blind

    *_, by_chance = against_shifts(lambda p: gain(p).mean(), p, rng)
    return gain(p), by_chance


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
    draw_states(run, part)


def check_filtered(run, part, hmm):
    """Columns with the future cut off, and beside hmmlearn."""
    ahead, apart = [], []
    for row in run.rng.choice(run.later, CUTS, replace=False):
        there = run.table[row, run.market.n_tech :].astype(np.float64)
        # filtered, not smoothed: a column that knew a later bar would move
        bars = part_of_bars(run.market.bars, row + 1)
        cut = run.model.transform(bars)[row, run.market.n_tech :]
        ahead.append(np.abs(cut - there).max())
        library = library_posterior(hmm, run.emission[: row + 1])
        ours = there[: len(library)]
        apart.append(np.abs(library - ours).max())
    ahead = float(np.max(ahead))
    apart = float(np.max(apart))
    part.numbers |= {"ahead": ahead, "apart": apart}
    text = f"columns change by {ahead:.2g} when the future is cut off ({CUTS} rows; "
    part.judge_by(ahead <= SAME, f"{text}at most {SAME:g})")
    text = f"columns are {apart:.2g} from hmmlearn's posterior on the bars so far "
    part.judge_by(apart <= LIBRARY, f"{text}(at most {LIBRARY:g})")


def check_power(run, part, hmm, fits, filtered, rows):
    """The next bar's volatility on eval rows, against no context, another fit, fewer states."""
    x, table, gains, scores = run.emission, [], {}, {}
    for name, p in filtered.items():
        fit = fits.get(name, hmm)
        gain, by_chance = gains[name] = knows_the_next_bar(
            x, p[rows], fit, rows, run.rng
        )
        scores[name] = log_score(x, p[rows], fit, rows)  # (n,)
        score = scores[name].mean()
        table.append((name, score, gain.mean(), by_chance))
    head = (
        "fit",
        "log score a bar",
        "gain over no context",
        "probability of chance",
    )
    part.tables.append(("Next bar's log volatility, eval rows", head, table))
    gain, by_chance = gains["this run"]
    other, others_chance = gains["its own seed again"]
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
    part.judge_by(by_chance <= CHANCE and lead[1] >= 0, text)
    # states that add nothing cost the agent columns
    for name in ("2 states", "3 states"):
        ahead = scores["this run"] - scores[name]
        lead = interval(ahead, run.rng)
        part.numbers[f"lead_over_{name[0]}_states"] = float(ahead.mean())
        if lead[1] < 0:
            part.judge(
                "weak", f"{name} tell the next volatility better: {ends(lead)}"
            )


def check_states(run, part, filtered):
    """A state that is never the most likely one, where other fits use all."""
    train = slice(*run.market.rows["train"])
    used = {}
    for name, p in filtered.items():
        most = p[train].argmax(1)
        likely = np.bincount(most, minlength=p.shape[1])
        used[name] = likely / likely.sum()
    table = [
        (name, " ".join(f"{s:.3f}" for s in share))
        for name, share in used.items()
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


def share_equal(x, y) -> float:
    return (x == y).mean()


def check_stability(run, part, filtered, rows):
    """Share of eval rows on which another fit has the same most likely state."""
    own = filtered["this run"][rows].argmax(1)
    table = []
    for name, p in filtered.items():
        # states are sorted by volatility: equal numbers mean equal states, where as many exist
        if p.shape[1] != features.STATES or name == "this run":
            continue
        other = p[rows].argmax(1)
        agree = partial(share_equal, other)
        same, shifted, by_chance = against_shifts(agree, own, run.rng)
        table.append((name, same, shifted, by_chance))
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
    stops = [*changes[1:], len(regime)]
    for start, stop in zip(changes, stops):
        # a guess that comes after the regime has ended again has missed it
        right = np.flatnonzero(guess[start:stop] == regime[start])
        lags.append(right[0] if len(right) else np.nan)
    missed = np.isnan(lags).mean() if lags else np.nan
    lag = np.nanmean(lags) if missed < 1 else math.nan
    return float(lag), float(missed)


def check_regimes(run, part, filtered):
    """Against the true regime: accuracy, lag; the best filter knows the market's own parameters."""
    truth = run.market.bars.truth
    regime, x = truth.regime, run.emission
    train, later, last = (
        slice(*run.market.rows["train"]),
        *map(run.span, ("eval", "test")),
    )
    # the best filter of the same emission: moments by the true regime, the true transitions
    kinds = np.arange(len(truth.law.sigma))
    by_regime = [x[train][regime[train] == k] for k in kinds]
    mean = np.array([values.mean() for values in by_regime])
    var = np.array([values.var() for values in by_regime])
    start = np.full(len(kinds), 1 / len(kinds))
    best = forward_filter(x, mean, var, truth.law.regime_transition, start)
    table, names = [], ("this run", "2 states", "3 states")
    for name, p in (
        {k: filtered[k] for k in names} | {"true parameters": best}
    ).items():
        count = np.stack(
            [p[train][regime[train] == k].sum(0) for k in kinds]
        )  # (R, K)
        # each state stands for the regime that it meets most on train rows
        stands_for = np.eye(len(kinds))[count.argmax(0)]
        guess = (p @ stands_for).argmax(1)
        hits = guess == regime
        right = [hits[rows].mean() for rows in (later, last)]
        lag, missed = lag_of(guess[train.start :], regime[train.start :])
        table.append((name, *right, lag, missed))
        if name == "this run":
            part.numbers |= {
                "accuracy": float(right[0]),
                "lag": lag,
                "missed": missed,
            }
            own = guess[later]
    head = (
        "filter",
        "right, eval",
        "right, test",
        "lag, bars",
        "share of changes missed",
    )
    part.tables.append(("The true regime", head, table))
    right, _, by_chance = against_shifts(
        partial(share_equal, regime[later]), own, run.rng
    )
    text = f"it names the regime on {right:.1%} of the eval rows, probability of chance "
    part.judge_by(
        by_chance <= CHANCE, f"{text}{by_chance:.3f} (at most {CHANCE})"
    )


def context_value(run: Subject) -> dict:
    """What HMM columns add to a lasso of the next return, on eval and test rows.

    {"with", "without": explained share of the variance; "gain": (n,) fall of the squared error}
    """
    market, errors = run.market, {}
    target = run.target[run.later]
    # every column: the run's screen may have thrown away what a bad context hid
    table = replace(run.model, evidence=[]).transform(market.bars)
    # products too: what the signal means may turn with the regime
    wide = with_products(table, market.n_tech)
    columns = {"without": wide[:, : market.n_tech], "with": wide}
    for name, x in columns.items():
        # fitted on train rows alone
        linear, _ = fit_linear(replace(market.series, x=x))
        weights = np.array(linear["weights"])
        forecast = (x[run.later] - linear["center"]) @ weights
        errors[name] = (target - forecast) ** 2 / (target**2).mean()
    explained = {name: 1 - error.mean() for name, error in errors.items()}
    return explained | {"gain": errors["without"] - errors["with"]}


def draw_states(run, part):
    a, b = run.rows["eval"]
    a = max(a, b - POINTS)
    fig, (ax,) = canvas(9.4, 2.6)
    at, p = np.arange(a, b), run.posteriors[a:b]
    truth = run.market.bars.truth
    labels = [f"state {k}" for k in range(p.shape[1])]
    colors = CYCLE[: p.shape[1]]
    ax.stackplot(at, p.T, labels=labels, colors=colors, alpha=0.75)
    if run.known and len(truth.law.sigma) > 1:
        regime = truth.regime[a:b]
        ax.step(at, regime, "k", lw=1.2, label="true regime")
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
    train = slice(*run.market.rows["train"])
    columns = run.market.table[train, : run.market.n_tech]
    mean = torch.as_tensor(columns.mean(0))
    fresh = new_encoder(run)
    errors = {
        split: reconstruct(run, fresh, split, mean, live) for split in run.rows
    }
    names = "encoder", "a new encoder", "column mean", "last visible bar"
    table = []
    for split, of in errors.items():
        means = [of[k].mean() for k in names]
        table.append((split, *means))
    head = "split", *names
    part.tables.append(
        ("Squared error at hidden bars, columns in use", head, table)
    )

    of = errors["eval"]
    table = []
    for i, column in enumerate(live):
        cells = [of[k][:, i].mean() for k in names]
        better = [1 - cells[0] / other for other in cells[2:]]
        table.append((run.model.columns[column], *cells, *better))
    head = "column", *names, "better than mean", "than last"
    part.tables.append(("By column, eval rows", head, table))

    error, other, by_mean, by_last = (of[k].mean(1) for k in names)
    gain, others = by_mean - error, by_mean - other
    skill = 1 - error.mean() / by_mean.mean()
    part.numbers |= {"skill": float(skill), "gain": float(gain.mean())}
    part.numbers["gain_of_new"] = float(others.mean())
    low_high = interval(gain, run.rng)
    text = f"hidden bars on eval rows: squared error {error.mean():.3f}, column mean "
    text += f"{by_mean.mean():.3f}, gain {ends(low_high)} (must be above 0)"
    part.judge_by(low_high[0] > 0, text)
    # nearer to the new one than to the column mean
    lead = interval(2 * gain - others, run.rng)
    text = f"an encoder that was pre-trained just now gains {others.mean():.3f}, this one "
    text += f"{gain.mean():.3f}; twice this less that: {ends(lead)} (must reach 0)"
    part.judge_by(lead[1] >= 0, text)
    lead = interval(by_last - error, run.rng)
    if lead[1] < 0:
        text = f"the last visible bar reconstructs better: {by_last.mean():.3f} instead of "
        part.judge(
            "weak",
            f"{text}{error.mean():.3f} (difference {ends(lead)}, must reach 0)",
        )
    check_probe(run, part)
    draw_columns(part, of, [run.model.columns[k] for k in live])


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
    rows = np.linspace(a, b - 1, WINDOWS).astype(int)
    rows = torch.as_tensor(np.unique(rows))
    x = run.contexts.windows(rows)
    # one mask for all: they are compared window by window
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(x.shape[:2], generator=generator) < tqc.MASKED
    mask[:, 0], mask[:, -1] = False, True  # a bar to copy, and one to hide
    guesses = {}
    for name, encoder in (("encoder", run.encoder), ("a new encoder", fresh)):
        parts = []
        for piece, hidden in zip(x.split(64), mask.split(64)):
            shown = encoder.embed(piece)
            z = torch.where(hidden[..., None], encoder.mask_token, shown)
            parts.append(encoder.decode(encoder.encode(z)))
        guesses[name] = torch.cat(parts)
    # the last visible bar
    bars = torch.arange(x.shape[1])
    at = torch.where(mask, 0, bars).cummax(1).values
    last = x.gather(1, at[..., None].expand_as(x))
    # windows count alike, however many of their bars are hidden
    weight = mask[..., None] / mask.sum(1)[:, None, None]
    guesses |= {"column mean": mean, "last visible bar": last}
    errors = {}
    for name, guess in guesses.items():
        error = ((guess - x) ** 2 * weight).sum(1)
        errors[name] = error.numpy()[:, live]
    return errors


def check_probe(run, part):
    """Ridge of the next return on the last bar's embedding, and on its raw columns; each with HMM
    products."""
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    market, contexts, later = run.market, run.contexts, run.later
    target = run.target[later]
    train = np.arange(*run.rows["train"])
    hmm = run.table[:, market.n_tech :]
    columns = {
        "raw columns": lambda rows: run.table[rows, : market.n_tech],
        "embedding": lambda rows: contexts(torch.as_tensor(rows))[0][
            :, -1
        ].numpy(),
    }
    table, errors = [], {}
    for name, of in columns.items():
        x = []
        for rows in (train, later):
            own = of(rows)
            both = np.concatenate([own, hmm[rows]], 1)
            x.append(with_products(both, own.shape[1]))
        # the penalty is the same for all columns, so their scales must be; train rows set both
        ridge = make_pipeline(StandardScaler(), RidgeCV(np.geomspace(1, 1e6, 13)))
        ridge.fit(x[0], market.ret[train])
        forecast = ridge.predict(x[1])
        errors[name] = (target - forecast) ** 2 / (target**2).mean()
        match, _, by_chance = against_shifts(
            partial(correlation, target), forecast, run.rng
        )
        part.numbers[f"probe_{name.split()[0]}"] = match
        table.append((name, match, by_chance, 1 - errors[name].mean()))
    head = "ridge on", "correlation", "probability of chance", "explained"
    title = f"Linear probe of the {run.target_name}, eval and test rows"
    part.tables.append((title, head, table))
    lead = interval(errors["raw columns"] - errors["embedding"], run.rng)
    if lead[1] < 0:
        text = "raw columns of the last bar foretell the next return better than its embedding: "
        part.judge("weak", f"{text}explained share {ends(lead)} (must reach 0)")


def correlation(x, y) -> float:
    """0 where one of them does not vary."""
    if not (x.std() and y.std()):
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def draw_columns(part, of, names):
    height = max(2.2, 0.19 * len(names) + 0.6)
    fig, (ax,) = canvas(9.4, height, left=1.6, bottom=0.4)
    at = np.arange(len(names))
    for i, (who, error) in enumerate(of.items()):
        color = CYCLE[i]
        mean = error.mean(0)
        ax.plot(mean, at, "o", color=color, ms=4, label=who)
    ax.set_yticks(at, names)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("squared error at hidden bars")
    title = "Reconstruction by column, eval rows"
    part.figures.append(("mae_columns", title, fig, "Left is better."))


# --------------------------------------------------------------------------------------------- FiLM
def audit_film(run: Subject, part: Part):
    """Does it move with the context, and what do context, FiLM and forecast earn?"""
    if not run.args.hmm:
        part.judge("off", "--no-hmm: FiLM's input is zeros")
        return
    if not run.model.passed.any():
        part.judge(
            "off", "no technical column passed the screen: nothing to modulate"
        )
        return
    inputs = {}
    for split in ("eval", "test"):
        rows = torch.arange(*run.rows[split])
        inputs[split] = run.contexts(rows)
    contexts = [hmm for _, hmm, _ in inputs.values()]
    show_film(run, part, torch.cat(contexts))
    ratio = film_ratio(run, inputs["eval"])
    part.numbers["ratio"] = ratio
    text = f"a shifted context moves the fused features by {ratio:.2g} of what a shifted "
    part.judge_by(
        ratio >= ROUNDING, f"{text}market does (at least {ROUNDING:.2g})"
    )
    ablate(run, part, inputs)


@torch.no_grad()
def film_ratio(run, inputs) -> float:
    z, hmm, forecast = inputs
    # half the rows is the farthest shift: nothing of the own neighbourhood is left
    half = len(z) // 2
    own = z, hmm
    other_context = z, hmm.roll(half, 0)
    other_market = z.roll(half, 0), hmm
    # without the last feature: the forecast passes FiLM by
    fused = []
    for inputs in (own, other_context, other_market):
        fused.append(run.agent.extractor(*inputs, forecast)[:, :-1])
    by_context, by_market = (x - fused[0] for x in fused[1:])
    ratio = by_context.square().mean() / by_market.square().mean()
    return float(ratio.sqrt())


@torch.no_grad()
def show_film(run, part, hmm):
    """gamma and beta over the data and where one state is certain."""
    film, states = run.agent.extractor.film, features.STATES
    gamma, beta = film(hmm).chunk(2, -1)
    table = [("over eval and test rows, mean", *sizes(gamma, beta))]
    spread = gamma - gamma.mean(0), beta - beta.mean(0)
    table.append(("their spread over rows", *sizes(*spread)))
    # a one at the state's column, the remaining HMM columns 0
    pure = film(torch.eye(states, tqc.HMM_COLUMNS)).chunk(2, -1)
    for k in range(states):
        where = f"state {k} certain"
        own = sizes(pure[0][k], pure[1][k])
        table.append((where, *own))
    part.numbers["gamma_spread"] = float(gamma.std(0).mean())
    part.numbers["beta_spread"] = float(beta.std(0).mean())
    head = "where", "gamma, mean", "gamma - 1, RMS", "beta, mean", "beta, RMS"
    part.tables.append(("FiLM", head, table))
    fig, (ax,) = canvas(9.4, 2.4, bottom=0.42)
    at_pure = 1 + pure[0].numpy()
    order = np.argsort(at_pure[-1] - at_pure[0])
    for k in range(states):
        ax.plot(at_pure[k][order], color=CYCLE[k], label=f"state {k}")
    ax.axhline(1, color="k", lw=0.8, ls=":")
    ax.set_xlabel("channel, by what the storm changes")
    ax.set_ylabel("gamma")
    title = "gamma where one state is certain"
    part.figures.append(("film_gamma", title, fig, "1: untouched."))


def sizes(gamma, beta) -> tuple:
    """Mean and root mean square of each; the layer gives gamma - 1."""
    found = []
    for x, untouched in ((gamma, 1), (beta, 0)):
        size = x.square().mean().sqrt()
        found += [float(untouched + x.mean()), float(size)]
    return tuple(found)


def variants(run: Subject, split: str, inputs):
    """(name, latents) of the agent with one input spoiled; names that repeat are draws."""
    z, hmm, forecast = inputs
    extractor, start = run.agent.extractor, run.rows[split][0]
    at = np.arange(start, start + len(z))
    yield "as it is", extractor(z, hmm, forecast)
    # weights and bias 0: FiLM returns 0, and gamma is 1 plus that
    film = extractor.film.state_dict().items()
    off = {f"film.{name}": torch.zeros_like(x) for name, x in film}
    latents = torch.func.functional_call(extractor, off, (z, hmm, forecast))
    yield "FiLM off (gamma 1, beta 0)", latents
    mean = hmm.mean(0, keepdim=True).expand_as(hmm)
    yield "FiLM at its mean", extractor(z, mean, forecast)
    yield "forecast 0", extractor(z, hmm, 0 * forecast)
    # a generator of its own: the draws do not move with what was judged before
    rng = np.random.default_rng(1)
    for shift in shifts(len(z), WALKS, rng):
        moved = hmm.roll(int(shift), 0)
        latents = extractor(z, moved, forecast)
        yield "context shifted in FiLM", latents
        if run.args.forecast:
            # the lasso reads the context times the columns: its share goes with it
            columns = run.market.table[at, : run.market.n_tech]
            table = np.concatenate([columns, moved.numpy()], 1)
            other = run.model.forecast(table)
            other = torch.as_tensor(other)[:, None]
            latents = torch.cat([latents[:, :-1], other], 1)
        yield "context shifted in FiLM and forecast", latents
    for shift in shifts(len(z), FEW, rng):
        yield "encoding shifted", extractor(z.roll(int(shift), 0), hmm, forecast)


@torch.no_grad()
def ablate(run, part, inputs):
    """What the agent earns on eval and test rows with an input spoiled."""
    earned = {}
    for split in inputs:
        for name, latents in variants(run, split, inputs[split]):
            of = run.earned(run.path_of(split, latents), split)
            earned.setdefault(name, {}).setdefault(split, []).append(of)
    series = {}  # name -> (draws, rows of eval and test)
    for name, of in earned.items():
        both = [np.array(of[split]) for split in of]
        series[name] = np.concatenate(both, 1)
    intact = series.pop("as it is")[0]
    table = [("as it is", intact.mean(), "", "", "")]
    loss = {}
    for name, draws in series.items():
        # row by row against the same market: most of the noise is in both
        paired = intact - draws.mean(0)
        loss[name] = float(paired.mean()), interval(paired, run.rng)
        drawn = len(draws) == WALKS
        by_chance = chance(intact.mean(), draws.mean(1)) if drawn else ""
        cost, low_high = loss[name]
        table.append((name, draws.mean(), cost, ends(low_high), by_chance))
        part.numbers[f"cost, {name}"] = loss[name][0]
    head = (
        "agent",
        f"bp a bar, {run.unit}",
        "it costs",
        "interval",
        "probability of chance",
    )
    part.tables.append(("With an input spoiled, eval and test rows", head, table))
    draw_costs(part, loss, run.unit)
    moves = max(np.ptp(run.paths[split]) for split in inputs) > STILL
    judge_context(run, part, loss, moves)


def judge_context(run, part, loss, moves: bool):
    """Only an agent that moves can ignore a context, and only one that pays."""
    mean, low_high = loss["context shifted in FiLM and forecast"]
    value = context_value(run)["gain"]
    worth = interval(value, run.rng)
    text = f"the true context earns {mean:+.2f} bp a bar more than a shifted one ({ends(low_high)})"
    if worth[0] > 0 and moves:
        text += " (must be above 0); a lasso's explained share rises with it by "
        text += f"{value.mean():.2f} ({ends(worth)})"
        part.judge_by(low_high[0] > 0, text)
    elif low_high[0] > 0:
        part.judge("sound", text)
    mean, low_high = loss["context shifted in FiLM"]
    if low_high[0] <= 0:
        text = f"FiLM's own share of that is not to be seen: {mean:+.3f} bp a bar "
        part.judge("weak", f"{text}({ends(low_high)})")


def draw_costs(part, loss, unit):
    height = 0.34 * len(loss) + 0.6
    color = CYCLE[0]
    fig, (ax,) = canvas(9.4, height, left=2.6, bottom=0.42)
    for i, (mean, (low, high)) in enumerate(loss.values()):
        ax.plot([low, high], [i, i], color=color, lw=2)
        ax.plot(mean, i, "o", color=color)
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
    market, contexts, path = run.market, run.contexts, run.paths[split]
    # it looks at the eval rows: for this call, those of `split`
    with patch.object(contexts, "rows", {"eval": run.rows[split]}):
        found = tqc.diagnose(run.agent, contexts)
    audit = {}
    for name, x in found.items():
        audit[name.split("/")[1]] = x
    a, b = run.rows[split]
    rows = market.rows | {"eval": (a, b)}
    series = replace(market.series, rows=rows)
    fixed = tqc.fixed_paths(market, a, b)
    paths = {name: [p] for name, p in fixed.items()}
    a_year = market.bars.bars_per_year
    paths["agent"] = [path]
    audit |= edges([series], paths, tqc.LEVELS, a_year)
    metrics, _ = tqc.path_metrics(*market.walk(path, a, b), a_year)
    updates = run.state["loop"]["updates"]
    word, reasons = verdict(
        audit, metrics, updates, tqc.FEW_UPDATES, b - a, False
    )
    audit |= {
        "verdict": word,
        "reason": reasons[0],
        "turnover": metrics["turnover"],
    }

    def earned(path):
        return run.earned(path, split).mean()

    # the same positions at other times: what a share of long, short and flat earns by itself
    audit["earned"], _, audit["chance"] = against_shifts(earned, path, run.rng)
    return audit


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
    table = [
        (label, *(of[name] for of in found.values()))
        for name, label in names.items()
    ]
    part.tables.append(("Diagnostics by split", ("", *found), table))
    of = found["eval"]
    for name, value in of.items():
        if name != "reason":
            part.numbers[name] = value
    text = f"eval rows: {of['verdict']} ({of['reason']}); {of['earned']:+.2f} bp a bar, edge "
    text += f"{of['edge_bps']:+.2f} over the best constant or flat, state dependence "
    text += f"{of['state_dependence']:.3f} (at least {STILL}); positions shifted along the "
    text += f"rows earn as much with probability {of['chance']:.3f} (at most {CHANCE})"
    # an undertrained agent is weak, not broken, where its positions earn more than chance
    level = "broken" if of["verdict"] in ("collapsed", "untrained") else "sound"
    if of["verdict"] == "undertrained":
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
        earned = run.earned(run.path_of("eval", policy=policy), "eval").mean()
        ships = policy == run.config["policy"]
        table.append((policy + " (ships)" * ships, spread, earned))
        part.numbers[f"state_dependence_{policy}"] = spread
        if not ships and spread < STILL and part.numbers["verdict"] == "healthy":
            text = f"{policy}, which does not ship, takes one position whatever the market: state "
            part.judge(
                "broken", f"{text}dependence {spread:.3f} (at least {STILL})"
            )
    head = "policy", "state dependence", f"bp a bar, {run.unit}"
    part.tables.append(("Both policies, eval rows", head, table))


def horizon(run: Subject) -> int:
    """Bars until a reward counts for no more than e^-5 of itself."""
    return int(HORIZON / (1 - run.config["gamma"]))


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
    blocks = zip(*(x.split(512) for x in (latents, after, cost)))
    atoms = [agent.critic(*block)[:, 0].flatten(1) for block in blocks]
    atoms = torch.cat(atoms)
    atoms = atoms.sort(1).values.double().numpy()  # (n, M)

    scale = float(agent.reward_scale)
    penalty = run.config["penalty"] * w_cost
    reward, _, change, _ = run.market.walk(path, a, b)
    span = slice(a, b)
    paid = run.market.funding[span]
    earned = path * (run.market.ret[span] - paid)
    # what holding earns, no trade
    held = scale * np.log(np.maximum(1 + earned, tqc.RUIN))
    whole = scale * (reward - penalty * change)
    # from the end; the first step is charged nothing, for its trade is already in the position
    result, tail = held.copy(), 0.0
    for t in reversed(range(len(path))):
        result[t] += gamma * tail
        tail = whole[t] + gamma * tail
    # later returns are cut short by the end of the rows
    n = max(len(path) - horizon(run), 1)
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
    found = {split: calibration(run, split) for split in run.rows}
    of = found["eval"]
    table = [(split, *shares(places)) for split, places in found.items()]
    regime, kind = run.regimes
    here = regime[run.span("eval")][: len(of["step"])]
    for k in np.unique(here):
        table.append((f"eval, {kind} {k}", *shares(of, here == k)))
    for w in (0.5, 1.0):
        places = calibration(run, "eval", w)
        table.append((f"eval, w_cost {w:g}", *shares(places)))
    title = f"Calibration: share inside the predicted {INNER:.0%} range, place among the quantiles"
    head = "rows", "inside, next step", "inside, return", "mean place of the return"
    part.tables.append((title, head, table))
    draw_pit(part, of)

    numbers = zip(("inside_step", "inside_return", "place"), shares(of))
    part.numbers |= dict(numbers)
    if of["size"] < SAME:
        part.judge(
            "sound",
            "it never holds a position on eval rows: nothing to calibrate",
        )
        return
    rows, needed = len(of["return"]), horizon(run)
    if rows < needed:  # not even one return that no other one overlaps
        text = f"{rows} eval rows have returns that are known to their end, "
        part.judge("off", f"{text}calibration needs {needed}")
        return
    # nearer to a point, to everything, or to one side than to a calibrated critic
    narrow, wide, side = INNER / 2, (1 + INNER) / 2, 0.25
    step, whole = (inside(of[name]) for name in ("step", "return"))
    reach = interval(step, run.rng)
    text = f"{step.mean():.0%} of the next steps lie inside the predicted {INNER:.0%} range "
    text += f"({ends(reach)}; nearer to {INNER} than to 0: above {narrow})"
    part.judge_by(reach[1] >= narrow, text)
    reach = interval(whole, run.rng)
    text = f"{whole.mean():.0%} of the returns lie inside the predicted {INNER:.0%} range "
    if reach[0] > wide:
        text += f"({ends(reach)}; nearer to {INNER} than to 1: below {wide:g})"
        part.judge("broken", text)
    if reach[1] < INNER:
        part.judge(
            "weak",
            f"{text}({ends(reach)}): too narrow, so do not read them as risk",
        )
    reach = interval(of["return"], run.rng)
    text = f"returns stand at {of['return'].mean():.2f} among their quantiles ({ends(reach)}; "
    text += f"nearer to .5 than to an end: from {side} to {1 - side})"
    part.judge_by(reach[1] >= side and reach[0] <= 1 - side, text)


def shares(places: dict, rows=slice(None)) -> tuple:
    """Of what calibration() gives: inside (next step, return), and the mean place of the return."""
    step, whole = places["step"][rows], places["return"][rows]
    found = inside(step), inside(whole), whole
    return tuple(float(x.mean()) for x in found)


def check_regime_rewards(run, part):
    regime, kind = run.regimes
    table = []
    for split in ("eval", "test"):
        everyone = beside(run, split)
        earned = {
            name: run.earned(path, split) for name, path in everyone.items()
        }
        own = regime[run.span(split)]
        for k in np.unique(own):
            here = own == k
            held = everyone["agent"][here]
            cells = [earned[name][here].mean() for name in earned]
            size = np.abs(held).mean()
            cells += [here.mean(), held.mean(), size]
            table.append((f"{split}, {kind} {k}", *cells))
    head = "rows", *earned, "share of rows", "mean exposure", "mean size"
    part.tables.append((f"By {kind}: bp a bar, {run.unit}", head, table))


def beside(run, split) -> dict:
    """Exposures of the agent, its cheap rival and, where it is known, the optimum."""
    everyone = {"agent": run.paths[split]} | tqc.fixed_paths(
        run.market, *run.rows[split]
    )
    return {
        k: everyone[k]
        for k in ("agent", "sparse_linear", "optimum")
        if k in everyone
    }


def check_w_cost(run, part):
    """The shown dislike of trading must lower the turnover, where training charged it."""
    table, trades = [], []
    for w in (0.0, 0.25, 0.5, 0.75, 1.0):
        path = run.path_of("eval", w_cost=w)
        change = np.abs(np.diff(path, prepend=0.0))
        trades.append(change)
        earned = run.earned(path, "eval").mean()
        table.append((f"{w:g}", change.mean(), earned))
    head = "w_cost", "turnover", f"bp a bar, {run.unit}"
    part.tables.append(("By w_cost, eval rows", head, table))
    # w_cost 0 less w_cost 1, row by row
    saved = trades[0] - trades[-1]
    part.numbers["turnover_saved"] = float(saved.mean())
    low_high = interval(saved, run.rng)
    # of fewer than two full changes of position nothing can be said
    charged, trading = run.config["penalty"] > 0, trades[0].sum() > 2
    if charged and trading and low_high[1] < 0:
        text = "it trades more when trading costs more: turnover falls by "
        part.judge("weak", f"{text}{ends(low_high)}")


def draw_pit(part, of):
    fig, (ax,) = canvas(9.4, 2.4)
    for i, name in enumerate(("step", "return")):
        label = {"step": "next step", "return": "discounted return"}[name]
        color = CYCLE[i]
        ax.hist(of[name], 20, density=True, alpha=0.5, color=color, label=label)
    ax.axhline(1, color="k", lw=0.8, ls=":")
    ax.set_xlabel("place among the predicted quantiles")
    caption = "Calibrated: flat at 1. High ends: too narrow."
    part.figures.append(
        ("tqc_places", "Calibration of the quantiles, eval rows", fig, caption)
    )


def draw_path(run, part):
    at = np.arange(*run.rows["test"])
    fig, axes = canvas(9.4, 3.6, 2, sharex=True)
    for i, (name, path) in enumerate(beside(run, "test").items()):
        total = np.cumsum(run.earned(path, "test")) / 100
        label = name.replace("_", " ")
        axes[0].plot(at, total, color=CYCLE[i], label=label)
    axes[0].set_ylabel(f"% {run.unit}")
    path = run.paths["test"]
    axes[1].plot(at, path, color=CYCLE[0], lw=0.7)
    axes[1].set_ylabel("exposure")
    axes[1].set_xlabel("row")
    part.figures.append(
        ("tqc_path", "Test rows", fig, "Simple sums, net of costs.")
    )


# ------------------------------------------------------------------------------------------- report
def cell(x) -> str:
    """Of a table: text as it is, a number to three digits, nothing for none."""
    if x is None or isinstance(x, str):
        return x or ""
    return f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}"


def print_part(part: Part, console: Console):
    console.rule(f"{TITLES[part.name]}: {part.verdict}", align="left")
    for title, head, rows in part.tables:
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for i, name in enumerate(head):
            table.add_column(name, justify="right" if i else "left")
        for row in rows:
            table.add_row(*map(cell, row))
        console.print(table)


def build(folder: Path, parts: list[Part], command: str) -> Page:
    page = Page()
    page.add(f'<h1>Audit of {esc(folder.name)}</h1><div class="chips">')
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
        reasons = [
            f"<li><b>{level}</b>: {esc(why)}</li>" for level, why in checks
        ]
        page.add(f'<ul class="reasons">{"".join(reasons)}</ul><div class="grid">')
        for name, title, fig, caption in part.figures:
            page.plot(name, title, fig, caption, wide=True)
        page.add("</div>")
        for title, head, rows in part.tables:
            page.add(
                f'<h3 style="margin-top:26px">{esc(title)}</h3>{html_table(head, rows)}'
            )
    return page


def html_table(head, rows) -> str:
    body = ""
    for row in [head, *rows]:
        kind = "td" if row is not head else "th"
        first, *cells = (esc(cell(x)) for x in row)
        cells = "".join(f"<{kind}>{x}</{kind}>" for x in cells)
        body += f'<tr><th style="text-align:left">{first}</th>{cells}</tr>'
    return f'<div class="scroll"><table>{body}</table></div>'


def write(folder: Path, parts: list[Part], command: str):
    """RUN_DIR/audit/, whole or not at all."""
    out, half = folder / "audit", folder / f".audit.{os.getpid()}.tmp"
    found = {}
    for part in parts:
        found[part.name] = {
            name: getattr(part, name) for name in ("verdict", "checks", "numbers")
        }
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


AUDITS = {
    "hmm": audit_hmm,
    "mae": audit_mae,
    "film": audit_film,
    "tqc": audit_tqc,
}


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
    way_out = "look at --root and --name"
    refuse(
        (not found, f"--segment {args.segment}: {folder} holds no run: {way_out}")
    )
    return found


def main(argv=None) -> dict:
    args, _ = parse_args(Args, argv)
    if args.torch_threads:
        torch.set_num_threads(args.torch_threads)
    console = Console(width=max(shutil.get_terminal_size((120, 24)).columns, 100))
    command = shlex.join(
        ["python", "scripts/audit_pipeline.py", *map(str, argv or sys.argv[1:])]
    )
    found = {}
    for folder in run_dirs(args):
        parts = audit_run(folder, args.mode)
        write(folder, parts, command)
        for part in parts:
            print_part(part, console)
        print(f"\n{folder}: audit/audit.html, audit/audit.json")
        for part in parts:
            print(
                f"{TITLES[part.name]}: {part.verdict}: {'; '.join(part.reasons)}"
            )
        found[str(folder)] = {part.name: part.verdict for part in parts}
    broken = any("broken" in of.values() for of in found.values())
    return {"exit_code": int(broken), "verdicts": found}


if __name__ == "__main__":
    exit_with(main)
