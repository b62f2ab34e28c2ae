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
from matplotlib.ticker import LogLocator  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from cleanrl_crypto import tqc_film_batch as tqc  # noqa: E402
from common import features  # noqa: E402
from common.features import FeatureModel, asset_views, forward_filter, with_products  # noqa: E402
from common.scoring import BP, STILL, edges, fit_linear, verdict  # noqa: E402
from common.timeout_guard import write_json_atomic  # noqa: E402
from scripts.report import CYCLE, RC, Page, canvas, esc, texts, write_figures  # noqa: E402

MODES = ("hmm", "mae", "tqc", "film", "all")
TITLES = {"hmm": "HMM", "mae": "Encoder", "film": "FiLM", "tqc": "Agent"}
TONES = {"sound": "good", "weak": "warn", "broken": "bad", "off": "calm"}
VERDICTS = ("off", "sound", "weak", "broken")  # the worst of a part's checks is the part's
MEANING = {  # for the reader
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
TAIL = 5
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
        one = (self.run_dir is None) != (self.segment is None)
        refuse((not one, "give one of --run-dir RUN_DIR and --segment NUMBER"))


@dataclass
class Part:
    """What an audit says of a part of the run: the worst verdict of its checks, and why."""

    name: str
    # (verdict, the number and what it is held against)
    checks: list = field(default_factory=list)
    numbers: dict = field(default_factory=dict)
    tables: list = field(default_factory=list)  # (title, head, rows)
    figures: list = field(default_factory=list)  # (name, title, figure, caption)

    def judge(self, verdict: str, reason: str):
        self.checks.append((verdict, reason))

    def judge_by(self, good: bool, reason: str):
        """Sound or broken; what is not a number is not good."""
        self.judge("sound" if good else "broken", reason)

    @property
    def verdict(self) -> str:
        return max((word for word, _ in self.checks), key=VERDICTS.index)

    @property
    def reasons(self) -> list[str]:
        """Why it is no better than its verdict."""
        return [reason for word, reason in self.checks if word == self.verdict]


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
        data = self.state["data"]
        changed = self.market.bars.sha256 != data["sha256"]
        why = f"--data {self.args.data}: has changed since {folder} was trained on it"
        refuse((changed, why))
        # a walk-forward leaves out more rows between the splits than the script alone
        self.market.rows = {split: tuple(ends) for split, ends in data["rows"].items()}
        # its own: the audit of a run says the same at every call
        self.rng = np.random.default_rng(0)
        # synthetic markets know the mean of each return: measured by it, luck does not count
        self.known = self.market.bars.truth is not None
        self.unit = "expected" if self.known else "realised"
        self.target = self.market.expected if self.known else self.market.ret
        self.target_name = "known mean of the next return" if self.known else "next return"
        self.rows = {}
        for split, (start, stop) in self.market.rows.items():
            self.rows[split] = max(start, stop - SPAN), stop
        unseen = [np.arange(*self.rows[split]) for split in ("eval", "test")]
        self.unseen = np.concatenate(unseen)

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

    def path_of(self, split, latents=None, w_cost=None, policy=None) -> np.ndarray:
        a, _ = self.rows[split]
        latents = self.latents[split] if latents is None else latents
        w_cost = self.args.eval_w_cost if w_cost is None else w_cost
        w_cost = torch.full((len(latents), 1), w_cost)
        values = tqc.afterstate_values(self.agent, latents, w_cost)
        policy = policy or self.config["policy"]
        return tqc.target_path(
            self.agent, latents, values, self.market, a, w_cost, policy
        )

    @cached_property
    def latents(self) -> dict:
        """split -> (n, width) the market part of the fusion layer."""
        latents = {}
        for split, (start, stop) in self.rows.items():
            rows = torch.arange(start, stop)
            latents[split] = tqc.latents_of(self.agent, self.contexts, rows)
        return latents


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
    changes = []
    distances = []
    for row in run.rng.choice(run.unseen, CUTS, replace=False):
        columns = run.table[row, run.market.n_tech :].astype(np.float64)
        # filtered, not smoothed: a column that knew a later bar would move
        bars = part_of_bars(run.market.bars, row + 1)
        without_future = run.model.transform(bars)[row, run.market.n_tech :]
        changes.append(np.abs(without_future - columns).max())
        library = library_posterior(hmm, run.emission[: row + 1])
        ours = columns[: len(library)]
        distances.append(np.abs(library - ours).max())
    change = float(np.max(changes))
    distance = float(np.max(distances))
    part.numbers |= {"ahead": change, "apart": distance}
    part.judge_by(
        change <= SAME,
        f"columns change by {change:.2g} when the future is cut off ({CUTS} rows; "
        f"at most {SAME:g})",
    )
    part.judge_by(
        distance <= LIBRARY,
        f"columns are {distance:.2g} from hmmlearn's posterior on the bars so far "
        f"(at most {LIBRARY:g})",
    )


def check_power(run, part, hmm, fits, filtered, rows):
    """The next bar's volatility on eval rows, against no context, another fit, fewer states."""
    x = run.emission
    table = []
    gains = {}  # name -> (n,) gains, probability of chance
    scores = {}  # name -> (n,)
    for name, p in filtered.items():
        fit = fits.get(name, hmm)
        gains[name] = knows_the_next_bar(x, p[rows], fit, rows, run.rng)
        scores[name] = log_score(x, p[rows], fit, rows)
        gain, by_chance = gains[name]
        table.append((name, scores[name].mean(), gain.mean(), by_chance))
    head = (
        "fit",
        "log score a bar",
        "gain over no context",
        "probability of chance",
    )
    part.tables.append(("Next bar's log volatility, eval rows", head, table))
    gain, by_chance = gains["this run"]
    refit_gain, refit_chance = gains["its own seed again"]
    part.numbers |= {
        "gain": float(gain.mean()),
        "gain_of_refit": float(refit_gain.mean()),
        "gain_chance": by_chance,
    }
    # where no fit can do it, that is the market's doing and not this run's
    if refit_chance > CHANCE:
        part.judge(
            "weak",
            "no fit on train rows knows the next bar (probability of chance "
            f"{refit_chance:.2f})",
        )
        return
    # nearer to the new fit than to no context: gain > refit_gain / 2
    lead = interval(2 * gain - refit_gain, run.rng)
    part.judge_by(
        by_chance <= CHANCE and lead[1] >= 0,
        f"it tells {gain.mean():.4f} nats a bar of the next volatility on eval rows, a new fit "
        f"{refit_gain.mean():.4f}; probability of chance {by_chance:.3f} (at most {CHANCE}), "
        f"twice it less the new fit's: {ends(lead)} (must reach 0)",
    )
    # states that add nothing cost the agent columns
    for name in ("2 states", "3 states"):
        gain = scores["this run"] - scores[name]
        lead = interval(gain, run.rng)
        part.numbers[f"lead_over_{name[0]}_states"] = float(gain.mean())
        if lead[1] < 0:
            part.judge(
                "weak", f"{name} tell the next volatility better: {ends(lead)}"
            )


def check_states(run, part, filtered):
    """A state that is never the most likely one, where other fits use all."""
    train = slice(*run.market.rows["train"])
    shares = {}  # name -> (K,) of train rows
    table = []
    for name, p in filtered.items():
        likely = p[train].argmax(1)
        shares[name] = np.bincount(likely, minlength=p.shape[1]) / len(likely)
        table.append((name, " ".join(f"{share:.3f}" for share in shares[name])))
    part.tables.append(
        ("Share of train rows by most likely state", ("fit", "shares"), table)
    )
    least = shares["this run"].min()
    # other seeds only: half of the rows may really lack a regime
    least_of_others = min(x.min() for name, x in shares.items() if "seed" in name)
    part.numbers["least_state"] = float(least)
    if least == 0 and least_of_others > 0:
        part.judge(
            "broken",
            "a state is never the most likely one on train rows; other fits: "
            f"{least_of_others:.3f} at least",
        )


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
            part.judge(
                "weak",
                f"{name}: states agree on {same:.0%} of the eval rows, chance {by_chance:.2f} "
                f"(at most {CHANCE})",
            )
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


def best_filter(run: Subject) -> np.ndarray:
    """(T, R) posteriors of a filter that knows the true transitions and, of train rows, the mean
    and the variance of what the HMM reads in each true regime."""
    truth = run.market.bars.truth
    train = slice(*run.market.rows["train"])
    x, regime = run.emission[train], truth.regime[train]
    by_regime = [x[regime == k] for k in range(len(truth.law.sigma))]
    mean = np.array([values.mean() for values in by_regime])
    var = np.array([values.var() for values in by_regime])
    start = np.full(len(mean), 1 / len(mean))
    return forward_filter(run.emission, mean, var, truth.law.regime_transition, start)


def regimes_of(p: np.ndarray, regime: np.ndarray, train: slice) -> np.ndarray:
    """(T,) regimes that the posteriors p (T, K) name: each state stands for the true one that it
    meets most on train rows."""
    kinds = np.arange(regime.max() + 1)
    meets = np.stack([p[train][regime[train] == k].sum(0) for k in kinds])  # (R, K)
    stands_for = np.eye(len(kinds))[meets.argmax(0)]
    return (p @ stands_for).argmax(1)


def check_regimes(run, part, filtered):
    """Against the true regime: accuracy, lag; the best filter knows the market's own parameters."""
    regime = run.market.bars.truth.regime
    train = slice(*run.market.rows["train"])
    eval_rows = run.span("eval")
    test_rows = run.span("test")
    filters = {name: filtered[name] for name in ("this run", "2 states", "3 states")}
    filters["true parameters"] = best_filter(run)
    guesses = {}
    table = []
    for name, p in filters.items():
        guess = guesses[name] = regimes_of(p, regime, train)
        right = guess == regime
        lag, missed = lag_of(guess[train.start :], regime[train.start :])
        row = right[eval_rows].mean(), right[test_rows].mean(), lag, missed
        table.append((name, *row))
    _, accuracy, _, lag, missed = table[0]
    part.numbers |= {"accuracy": float(accuracy), "lag": lag, "missed": missed}
    head = (
        "filter",
        "right, eval",
        "right, test",
        "lag, bars",
        "share of changes missed",
    )
    part.tables.append(("The true regime", head, table))
    score = partial(share_equal, regime[eval_rows])
    right, _, by_chance = against_shifts(score, guesses["this run"][eval_rows], run.rng)
    part.judge_by(
        by_chance <= CHANCE,
        f"it names the regime on {right:.1%} of the eval rows, probability of chance "
        f"{by_chance:.3f} (at most {CHANCE})",
    )


def context_value(run: Subject) -> dict:
    """What HMM columns add to a lasso of the next return, on eval and test rows.

    {"with", "without": explained share of the variance; "gain": (n,) fall of the squared error}
    """
    market = run.market
    target = run.target[run.unseen]
    # every column: the run's screen may have thrown away what a bad context hid
    table = replace(run.model, evidence=[]).transform(market.bars)
    # products too: what the signal means may turn with the regime
    wide = with_products(table, market.n_tech)
    columns = {"without": wide[:, : market.n_tech], "with": wide}
    errors = {}
    for name, x in columns.items():
        # fitted on train rows alone
        linear, _ = fit_linear(replace(market.series, x=x))
        weights = np.array(linear["weights"])
        forecast = (x[run.unseen] - linear["center"]) @ weights
        errors[name] = (target - forecast) ** 2 / (target**2).mean()
    explained = {name: 1 - error.mean() for name, error in errors.items()}
    return explained | {"gain": errors["without"] - errors["with"]}


def draw_states(run, part):
    a, b = run.rows["eval"]
    a = max(a, b - POINTS)
    fig, (ax,) = canvas(9.4, 2.6, bottom=0.42)
    at = np.arange(a, b)
    p = run.posteriors[a:b]
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
    names = "encoder", "a new encoder", "column mean", "last visible bar"
    table = []
    for split in run.rows:
        errors = reconstruct(run, fresh, split, mean, live)
        means = [errors[name].mean() for name in names]
        table.append((split, *means))
        if split == "eval":
            eval_errors = errors
    head = "split", *names
    part.tables.append(
        ("Squared error at hidden bars, columns in use", head, table)
    )

    table = []
    for i, column in enumerate(live):
        cells = [eval_errors[name][:, i].mean() for name in names]
        better = [1 - cells[0] / simple for simple in cells[2:]]
        table.append((run.model.columns[column], *cells, *better))
    head = "column", *names, "better than mean", "than last"
    part.tables.append(("By column, eval rows", head, table))

    # (windows,) each
    error, new_error, mean_error, last_error = (eval_errors[k].mean(1) for k in names)
    gain = mean_error - error
    new_gain = mean_error - new_error
    part.numbers |= {
        "skill": float(1 - error.mean() / mean_error.mean()),
        "gain": float(gain.mean()),
        "gain_of_new": float(new_gain.mean()),
    }
    low_high = interval(gain, run.rng)
    part.judge_by(
        low_high[0] > 0,
        f"hidden bars on eval rows: squared error {error.mean():.3f}, column mean "
        f"{mean_error.mean():.3f}, gain {ends(low_high)} (must be above 0)",
    )
    # nearer to the new one than to the column mean
    lead = interval(2 * gain - new_gain, run.rng)
    part.judge_by(
        lead[1] >= 0,
        f"an encoder that was pre-trained just now gains {new_gain.mean():.3f}, this one "
        f"{gain.mean():.3f}; twice this less that: {ends(lead)} (must reach 0)",
    )
    lead = interval(last_error - error, run.rng)
    if lead[1] < 0:
        part.judge(
            "weak",
            f"the last visible bar reconstructs better: {last_error.mean():.3f} instead of "
            f"{error.mean():.3f} (difference {ends(lead)}, must reach 0)",
        )
    check_probe(run, part)
    draw_columns(part, eval_errors, [run.model.columns[k] for k in live])


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
    mask[:, 0] = False  # a bar to copy
    mask[:, -1] = True  # and one to hide
    guesses = {}
    for name, encoder in (("encoder", run.encoder), ("a new encoder", fresh)):
        parts = []
        for piece, hidden in zip(x.split(64), mask.split(64)):
            z = encoder.embed(piece)
            z = torch.where(hidden[..., None], encoder.mask_token, z)
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

    target = run.target[run.unseen]
    train = np.arange(*run.rows["train"])
    table = []
    errors = {}
    for name, columns_of in (("raw columns", raw_columns), ("embedding", last_embedding)):
        x = []
        for rows in (train, run.unseen):
            columns = columns_of(run, rows)
            hmm = run.table[rows, run.market.n_tech :]
            both = np.concatenate([columns, hmm], 1)
            x.append(with_products(both, columns.shape[1]))
        # the penalty is the same for all columns, so their scales must be; train rows set both
        ridge = make_pipeline(StandardScaler(), RidgeCV(np.geomspace(1, 1e6, 13)))
        ridge.fit(x[0], run.market.ret[train])
        forecast = ridge.predict(x[1])
        errors[name] = (target - forecast) ** 2 / (target**2).mean()
        score = partial(correlation, target)
        match, _, by_chance = against_shifts(score, forecast, run.rng)
        part.numbers[f"probe_{name.split()[0]}"] = match
        table.append((name, match, by_chance, 1 - errors[name].mean()))
    head = "ridge on", "correlation", "probability of chance", "explained"
    title = f"Linear probe of the {run.target_name}, eval and test rows"
    part.tables.append((title, head, table))
    lead = interval(errors["raw columns"] - errors["embedding"], run.rng)
    if lead[1] < 0:
        part.judge(
            "weak",
            "raw columns of the last bar foretell the next return better than its embedding: "
            f"explained share {ends(lead)} (must reach 0)",
        )


def raw_columns(run: Subject, rows: np.ndarray) -> np.ndarray:
    return run.table[rows, : run.market.n_tech]


def last_embedding(run: Subject, rows: np.ndarray) -> np.ndarray:
    z, _, _ = run.contexts(torch.as_tensor(rows))
    return z[:, -1].numpy()


def correlation(x, y) -> float:
    """0 where one of them does not vary."""
    if not (x.std() and y.std()):
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def draw_columns(part, errors, names):
    height = max(2.2, 0.19 * len(names) + 0.6)
    fig, (ax,) = canvas(9.4, height, left=1.6, bottom=0.42)
    at = np.arange(len(names))
    for i, (who, error) in enumerate(errors.items()):
        color = CYCLE[i]
        mean = error.mean(0)
        ax.plot(mean, at, "o", color=color, ms=4, label=who)
    ax.set_yticks(at, names)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")
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
    part.judge_by(
        ratio >= ROUNDING,
        f"a shifted context moves the fused features by {ratio:.2g} of what a shifted market "
        f"does (at least {ROUNDING:.2g})",
    )
    ablate(run, part, inputs)


@torch.no_grad()
def film_ratio(run, inputs) -> float:
    z, hmm, forecast = inputs
    # half the rows is the farthest shift: nothing of the own neighbourhood is left
    half = len(z) // 2
    extractor = run.agent.extractor
    # without the last feature: the forecast passes FiLM by
    fused = extractor(z, hmm, forecast)[:, :-1]
    other_context = extractor(z, hmm.roll(half, 0), forecast)[:, :-1]
    other_market = extractor(z.roll(half, 0), hmm, forecast)[:, :-1]
    by_context = (other_context - fused).square().mean()
    by_market = (other_market - fused).square().mean()
    return float((by_context / by_market).sqrt())


@torch.no_grad()
def show_film(run, part, hmm):
    """gamma and beta over the data and where one state is certain."""
    film = run.agent.extractor.film
    states = features.STATES
    gamma, beta = film(hmm).chunk(2, -1)
    table = [("over eval and test rows, mean", *sizes(gamma, beta))]
    spread = gamma - gamma.mean(0), beta - beta.mean(0)
    table.append(("their spread over rows", *sizes(*spread)))
    # a one at the state's column, the remaining HMM columns 0
    pure = film(torch.eye(states, tqc.HMM_COLUMNS)).chunk(2, -1)
    for k in range(states):
        table.append((f"state {k} certain", *sizes(pure[0][k], pure[1][k])))
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
    numbers = []
    for x, untouched in ((gamma, 1), (beta, 0)):
        size = x.square().mean().sqrt()
        numbers += [float(untouched + x.mean()), float(size)]
    return tuple(numbers)


def variants(run: Subject, split: str, inputs):
    """(name, latents) of the agent with one input spoiled; names that repeat are draws."""
    z, hmm, forecast = inputs
    extractor = run.agent.extractor
    rows = np.arange(*run.rows[split])
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
            columns = run.market.table[rows, : run.market.n_tech]
            table = np.concatenate([columns, moved.numpy()], 1)
            other_forecast = torch.as_tensor(run.model.forecast(table))[:, None]
            latents = torch.cat([latents[:, :-1], other_forecast], 1)
        yield "context shifted in FiLM and forecast", latents
    for shift in shifts(len(z), FEW, rng):
        yield "encoding shifted", extractor(z.roll(int(shift), 0), hmm, forecast)


@torch.no_grad()
def ablate(run, part, inputs):
    """What the agent earns on eval and test rows with an input spoiled."""
    by_split = {}  # name -> split -> a list of (rows,), one a draw
    for split in inputs:
        for name, latents in variants(run, split, inputs[split]):
            rewards = run.earned(run.path_of(split, latents), split)
            by_split.setdefault(name, {}).setdefault(split, []).append(rewards)
    series = {}  # name -> (draws, rows of eval and test)
    for name, draws in by_split.items():
        series[name] = np.concatenate([np.array(x) for x in draws.values()], 1)
    intact = series.pop("as it is")[0]
    table = [("as it is", intact.mean(), "", "", "")]
    loss = {}
    for name, draws in series.items():
        # row by row against the same market: most of the noise is in both
        paired = intact - draws.mean(0)
        cost = float(paired.mean())
        low_high = interval(paired, run.rng)
        loss[name] = cost, low_high
        is_null = len(draws) == WALKS
        by_chance = chance(intact.mean(), draws.mean(1)) if is_null else ""
        table.append((name, draws.mean(), cost, ends(low_high), by_chance))
        part.numbers[f"cost, {name}"] = cost
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
        part.judge(
            "weak",
            f"FiLM's own share of that is not to be seen: {mean:+.3f} bp a bar ({ends(low_high)})",
        )


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
    check_edge(run, part, {split: diagnose_split(run, split) for split in run.rows})
    check_other_policy(run, part)
    check_calibration(run, part)
    check_regime_rewards(run, part)
    check_w_cost(run, part)
    draw_path(run, part)


def diagnose_split(run: Subject, split: str) -> dict:
    """diagnose() and the verdict, as the script makes them, of another split."""
    market = run.market
    path = run.paths[split]
    # it looks at the eval rows: for this call, those of `split`
    with patch.object(run.contexts, "rows", {"eval": run.rows[split]}):
        record = tqc.diagnose(run.agent, run.contexts)
    audit = {name.split("/")[1]: x for name, x in record.items()}
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


def check_edge(run, part, audits):
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
        table.append((label, *(audit[name] for audit in audits.values())))
    part.tables.append(("Diagnostics by split", ("", *audits), table))
    audit = audits["eval"]
    word, reason = audit["verdict"], audit["reason"]
    part.numbers |= {name: x for name, x in audit.items() if name != "reason"}
    # an undertrained agent is weak, not broken, where its positions earn more than chance
    by_chance = audit["chance"] > CHANCE
    judgement = {
        "collapsed": "broken",
        "untrained": "broken",
        "undertrained": "broken" if by_chance else "weak",
        "undecided": "weak",
    }
    part.judge(
        judgement.get(word, "sound"),
        f"eval rows: {word} ({reason}); {audit['earned']:+.2f} bp a bar, edge "
        f"{audit['edge_bps']:+.2f} over the best constant or flat, state dependence "
        f"{audit['state_dependence']:.3f} (at least {STILL}); positions shifted along the "
        f"rows earn as much with probability {audit['chance']:.3f} (at most {CHANCE})",
    )


@torch.no_grad()
def check_other_policy(run, part):
    """State dependence of both policies: the actor collects even where the grid ships."""
    latents = run.latents["eval"]
    flat = torch.zeros(len(latents), 1)
    table = []
    for policy in tqc.POLICIES:
        fixed = []
        with patch.dict(run.agent.config, policy=policy):
            for p in (-1.0, 0.0, 1.0):
                fixed.append(tqc.act(run.agent, latents, flat + p, flat))
        # over rows, at one held position: what only the market can cause
        spread = float(torch.stack(fixed).std(1).mean())
        earned = run.earned(run.path_of("eval", policy=policy), "eval").mean()
        ships = policy == run.config["policy"]
        table.append((policy + " (ships)" * ships, spread, earned))
        part.numbers[f"state_dependence_{policy}"] = spread
        if not ships and spread < STILL and part.numbers["verdict"] == "healthy":
            part.judge(
                "broken",
                f"{policy}, which does not ship, takes one position whatever the market: state "
                f"dependence {spread:.3f} (at least {STILL})",
            )
    head = "policy", "state dependence", f"bp a bar, {run.unit}"
    part.tables.append(("Both policies, eval rows", head, table))


def horizon(run: Subject) -> int:
    """Bars until a reward counts for no more than e^-5 of itself."""
    return int(TAIL / (1 - run.config["gamma"]))


@torch.no_grad()
def calibration(run: Subject, split: str, w_cost: float) -> dict:
    """Place of what came (n,) among the predicted quantiles, 0 to 1, along the policy's path.

    "return": the discounted rewards that really followed; "step": the next reward and a quantile
    drawn at the next row, as training sees it. And the size of that return, "size".
    """
    a, b = run.rows[split]
    gamma = run.config["gamma"]
    path = run.path_of(split, w_cost=w_cost)
    atoms = atoms_of(run, split, path, w_cost)

    scale = float(run.agent.reward_scale)
    penalty = run.config["penalty"] * w_cost
    reward, _, change, _ = run.market.walk(path, a, b)
    returns = path * (run.market.ret[a:b] - run.market.funding[a:b])
    # what holding earns, without the trade; and with it
    holding = scale * np.log(np.maximum(1 + returns, tqc.RUIN))
    whole = scale * (reward - penalty * change)
    # from the end; the first step is charged nothing, for its trade is already in the position
    result = holding.copy()
    tail = 0.0
    for t in reversed(range(len(path))):
        result[t] += gamma * tail
        tail = whole[t] + gamma * tail
    # later returns are cut short by the end of the rows
    n = max(len(path) - horizon(run), 1)
    # the next row's quantiles stand for the rest, as in the critic's target
    draw = run.rng.integers(atoms.shape[1], size=n)
    following = atoms[np.arange(n) + 1, draw] + (whole - holding)[1 : n + 1]
    limit = tqc.REWARD_CLIP
    target = holding[:n].clip(-limit, limit) + gamma * following
    return {
        "return": place(atoms[:n], result[:n]),
        "step": place(atoms[:n], target),
        "size": float(result[:n].std()),
    }


@torch.no_grad()
def atoms_of(run: Subject, split: str, path: np.ndarray, w_cost: float) -> np.ndarray:
    """(n, M) sorted atoms of holding the exposures `path` (n,)."""
    latents = run.latents[split]
    after = torch.as_tensor(path[:, None]).float()
    w_costs = torch.full_like(after, w_cost)
    blocks = zip(latents.split(512), after.split(512), w_costs.split(512))
    atoms = [run.agent.critic(*block)[:, 0].flatten(1) for block in blocks]
    return torch.cat(atoms).sort(1).values.double().numpy()


def place(atoms: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(n,) share of the atoms (n, M) below x (n,); ties count half."""
    below = (atoms < x[:, None]).mean(1)
    return (below + (atoms <= x[:, None]).mean(1)) / 2


def inside(u: np.ndarray) -> np.ndarray:
    edge = (1 - INNER) / 2  # left out at either end
    return ((u > edge) & (u < 1 - edge)).astype(float)


def check_calibration(run, part):
    """Shares inside the predicted 80 % range; three errors, each nearer to calibrated or not."""
    shown = run.args.eval_w_cost
    by_split = {split: calibration(run, split, shown) for split in run.rows}
    places = by_split["eval"]
    table = [(split, *shares(x)) for split, x in by_split.items()]
    regime, kind = run.regimes
    of_row = regime[run.span("eval")][: len(places["step"])]
    for k in np.unique(of_row):
        table.append((f"eval, {kind} {k}", *shares(places, of_row == k)))
    for w in (0.0, 0.5, 1.0):
        if w != shown:
            table.append((f"eval, w_cost {w:g}", *shares(calibration(run, "eval", w))))
    title = f"Calibration: share inside the predicted {INNER:.0%} range, place among the quantiles"
    head = "rows", "inside, next step", "inside, return", "mean place of the return"
    part.tables.append((title, head, table))
    draw_pit(part, places)

    names = "inside_step", "inside_return", "place"
    part.numbers |= dict(zip(names, shares(places)))
    if places["size"] < SAME:
        part.judge(
            "sound",
            "it never holds a position on eval rows: nothing to calibrate",
        )
        return
    rows = len(places["return"])
    if rows < horizon(run):  # not even one return that no other one overlaps
        part.judge(
            "off",
            f"{rows} eval rows have returns that are known to their end, "
            f"calibration needs {horizon(run)}",
        )
        return
    # nearer to a point, to everything, or to one side than to a calibrated critic
    narrow = INNER / 2
    wide = (1 + INNER) / 2
    side = 0.25
    step = inside(places["step"])
    low, high = interval(step, run.rng)
    part.judge_by(
        high >= narrow,
        f"{step.mean():.0%} of the next steps lie inside the predicted {INNER:.0%} range "
        f"({ends((low, high))}; nearer to {INNER} than to 0: above {narrow})",
    )
    whole = inside(places["return"])
    low, high = interval(whole, run.rng)
    text = f"{whole.mean():.0%} of the returns lie inside the predicted {INNER:.0%} range "
    text += f"({ends((low, high))}"
    if low > wide:
        part.judge("broken", f"{text}; nearer to {INNER} than to 1: below {wide:g})")
    if high < INNER:
        part.judge("weak", f"{text}): too narrow, so do not read them as risk")
    low, high = interval(places["return"], run.rng)
    part.judge_by(
        high >= side and low <= 1 - side,
        f"returns stand at {places['return'].mean():.2f} among their quantiles "
        f"({ends((low, high))}; nearer to .5 than to an end: from {side} to {1 - side})",
    )


def shares(places: dict, rows=slice(None)) -> tuple:
    """Of what calibration() gives: inside (next step, return), and the mean place of the return."""
    step = places["step"][rows]
    whole = places["return"][rows]
    return tuple(float(x.mean()) for x in (inside(step), inside(whole), whole))


def check_regime_rewards(run, part):
    regime, kind = run.regimes
    table = []
    for split in ("eval", "test"):
        everyone = beside(run, split)
        rewards = {name: run.earned(path, split) for name, path in everyone.items()}
        of_row = regime[run.span(split)]
        for k in np.unique(of_row):
            rows = of_row == k
            exposure = everyone["agent"][rows]
            cells = [x[rows].mean() for x in rewards.values()]
            cells += [rows.mean(), exposure.mean(), np.abs(exposure).mean()]
            table.append((f"{split}, {kind} {k}", *cells))
    head = "rows", *everyone, "share of rows", "mean exposure", "mean size"
    part.tables.append((f"By {kind}: bp a bar, {run.unit}", head, table))


def beside(run, split) -> dict:
    """Exposures of the agent, its cheap rival and, where it is known, the optimum."""
    fixed = tqc.fixed_paths(run.market, *run.rows[split])
    rivals = {k: fixed[k] for k in ("sparse_linear", "optimum") if k in fixed}
    return {"agent": run.paths[split]} | rivals


def check_w_cost(run, part):
    """The shown dislike of trading must lower the turnover, where training charged it."""
    table = []
    changes = []
    for w in (0.0, 0.25, 0.5, 0.75, 1.0):
        path = run.path_of("eval", w_cost=w)
        change = np.abs(np.diff(path, prepend=0.0))
        changes.append(change)
        earned = run.earned(path, "eval").mean()
        table.append((f"{w:g}", change.mean(), earned))
    head = "w_cost", "turnover", f"bp a bar, {run.unit}"
    part.tables.append(("By w_cost, eval rows", head, table))
    # w_cost 0 less w_cost 1, row by row
    fall = changes[0] - changes[-1]
    part.numbers["turnover_saved"] = float(fall.mean())
    low_high = interval(fall, run.rng)
    # of fewer than two full changes of position nothing can be said
    trades = changes[0].sum() > 2
    if run.config["penalty"] > 0 and trades and low_high[1] < 0:
        part.judge(
            "weak",
            f"it trades more when trading costs more: turnover falls by {ends(low_high)}",
        )


def draw_pit(part, places):
    fig, (ax,) = canvas(9.4, 2.4, bottom=0.42)
    for i, name in enumerate(("step", "return")):
        label = {"step": "next step", "return": "discounted return"}[name]
        color = CYCLE[i]
        ax.hist(places[name], 20, density=True, alpha=0.5, color=color, label=label)
    ax.axhline(1, color="k", lw=0.8, ls=":")
    ax.set_xlabel("place among the predicted quantiles")
    caption = "Calibrated: flat at 1. High ends: too narrow."
    part.figures.append(
        ("tqc_places", "Calibration of the quantiles, eval rows", fig, caption)
    )


def draw_path(run, part):
    at = np.arange(*run.rows["test"])
    fig, axes = canvas(9.4, 3.6, 2, bottom=0.42, sharex=True)
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
        lead = f"{part.verdict}: {MEANING[part.verdict]}"
        page.section(part.name, TITLES[part.name], lead)
        # the worst first: it made the verdict
        checks = sorted(part.checks, key=lambda check: -VERDICTS.index(check[0]))
        reasons = [f"<li><b>{word}</b>: {esc(why)}</li>" for word, why in checks]
        page.add(f'<ul class="reasons">{"".join(reasons)}</ul><div class="grid">')
        for name, title, fig, caption in part.figures:
            page.plot(name, title, fig, caption, wide=True)
        page.add("</div>")
        for title, head, rows in part.tables:
            page.add(
                f'<h3 style="margin-top:26px">{esc(title)}</h3>{html_table(head, rows)}'
            )
    return page


def column_texts(column) -> list[str]:
    """Numbers with the same decimals, a dash for none; a column that holds a text cell by cell."""
    if any(isinstance(x, str) for x in column):
        return [cell(x) for x in column]
    return texts([None if x is None else float(x) for x in column])


def html_table(head, rows) -> str:
    first, *others = map(esc, head)
    top = f'<th style="text-align:left">{first}</th>'
    top += "".join(f"<th>{name}</th>" for name in others)
    body = ""
    for first, *cells in zip(*map(column_texts, zip(*rows))):
        cells = "".join(f"<td>{esc(x)}</td>" for x in cells)
        body += f"<tr><th>{esc(first)}</th>{cells}</tr>"
    return (
        f'<div class="scroll"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def write(folder: Path, parts: list[Part], command: str):
    """RUN_DIR/audit/, whole or not at all."""
    out = folder / "audit"
    half = folder / f".audit.{os.getpid()}.tmp"
    record = {}
    for part in parts:
        record[part.name] = {
            "verdict": part.verdict,
            "checks": part.checks,
            "numbers": part.numbers,
        }
    try:
        with matplotlib.rc_context(RC):
            page = build(folder, parts, command)
            write_figures(page, half)
        text = page.html(f"audit: {folder.name}")
        (half / "audit.html").write_text(text, encoding="utf-8")
        write_json_atomic(record, half / "audit.json")
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
    run = Subject(folder)
    parts = []
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
    folders = sorted(path for path in folder.glob("seed_*") if path.is_dir())
    why = f"--segment {args.segment}: {folder} holds no run: look at --root and --name"
    refuse((not folders, why))
    return folders


def main(argv=None) -> dict:
    args, _ = parse_args(Args, argv)
    if args.torch_threads:
        torch.set_num_threads(args.torch_threads)
    console = Console(width=max(shutil.get_terminal_size((120, 24)).columns, 100))
    command = shlex.join(
        ["python", "scripts/audit_pipeline.py", *map(str, argv or sys.argv[1:])]
    )
    verdicts = {}
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
        verdicts[str(folder)] = {part.name: part.verdict for part in parts}
    broken = any("broken" in words.values() for words in verdicts.values())
    return {"exit_code": int(broken), "verdicts": verdicts}


if __name__ == "__main__":
    exit_with(main)
