"""Is a backtest more than luck? Statistics of Sharpe ratios, and a ledger of everything that was tried.

    # growth (T,): simple return of each bar, costs paid; Sharpe ratios are a bar's, never a year's
    found = judge(growth, trials=12, trial_sharpes=[0.01, 0.02])
    found["deflated"], found["bars_more"]

    ledger = Ledger("results/ledger.jsonl")
    ledger.add({"event": "tried", ...})  # an append-only line, chained to the line before by its hash
    ledger.lines()  # UsageError where a line was changed or is missing

Probabilistic Sharpe ratio and minimum track record: Bailey and Lopez de Prado (2012). Deflated Sharpe
ratio: the same (2014). Probability of backtest overfitting by CSCV: Bailey, Borwein, Lopez de Prado
and Zhu (2017).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
from filelock import FileLock
from scipy.stats import kurtosis, norm, rankdata, skew

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.run import UsageError  # noqa: E402
from common.timeout_guard import plain, write_json_atomic  # noqa: E402
from scripts.report_market import bootstrap_means  # noqa: E402

CONFIDENCE = 0.95
BLOCKS = 16  # of CSCV: 12 870 ways to take half of them
START = "0" * 64  # what the first line of a ledger is chained to


# --------------------------------------------------------------------------------- Sharpe ratios
def sharpe(returns: np.ndarray) -> float:
    """Mean over standard deviation of (T,) returns, a bar; 0 where nothing moves."""
    std = np.std(returns)
    return float(np.mean(returns) / std) if std > 0 else 0.0


def shape(returns: np.ndarray) -> tuple[float, float]:
    """Skewness and kurtosis (of a normal: 0 and 3)."""
    if not np.std(returns) > 0:
        return 0.0, 3.0
    return float(skew(returns)), float(kurtosis(returns, fisher=False))


def sharpe_spread(ratio: float, g3: float, g4: float) -> float:
    """Standard deviation of an estimated Sharpe ratio, times sqrt(T - 1)."""
    return math.sqrt(max(1 - g3 * ratio + (g4 - 1) / 4 * ratio**2, 1e-12))


def probabilistic_sharpe(ratio, bars, g3=0.0, g4=3.0, benchmark=0.0) -> float:
    """Probability that the true Sharpe ratio is above `benchmark`; ratios a bar."""
    z = (ratio - benchmark) * math.sqrt(bars - 1) / sharpe_spread(ratio, g3, g4)
    return float(norm.cdf(z))


def expected_best(variance: float, trials: int) -> float:
    """Sharpe ratio that the best of `trials` is expected to show when all are worth nothing."""
    if trials < 2:
        return 0.0
    gamma = np.euler_gamma
    first = norm.ppf(1 - 1 / trials)
    second = norm.ppf(1 - 1 / (trials * math.e))
    return float(math.sqrt(variance) * ((1 - gamma) * first + gamma * second))


def minimum_track_record(ratio, g3=0.0, g4=3.0, benchmark=0.0, confidence=CONFIDENCE) -> float:
    """Bars after which this Sharpe ratio is above `benchmark` at that confidence; inf where never."""
    if ratio <= benchmark:
        return math.inf
    z = norm.ppf(confidence) * sharpe_spread(ratio, g3, g4)
    return float(1 + (z / (ratio - benchmark)) ** 2)


def bars_needed(ratio, bars, g3, g4, threshold, confidence=CONFIDENCE) -> float:
    """Bars after which the deflated Sharpe ratio reaches `confidence`, if the ratio stays.

    threshold: expected_best() on `bars` bars; what chance shows falls as 1 / sqrt(bars).
    """
    if ratio <= 0:
        return math.inf
    z = norm.ppf(confidence) * sharpe_spread(ratio, g3, g4)
    return float(1 + ((z + threshold * math.sqrt(bars - 1)) / ratio) ** 2)


def sharpe_interval(returns: np.ndarray, confidence=CONFIDENCE) -> tuple[float, float]:
    """Of the Sharpe ratio a bar, by the stationary bootstrap with blocks of T^(1/3) bars."""
    mean, square = bootstrap_means(np.array([returns, np.square(returns)]))
    ratios = mean / np.sqrt(np.maximum(square - mean**2, 1e-300))
    low, high = np.quantile(ratios, (0.5 - confidence / 2, 0.5 + confidence / 2))
    return float(low), float(high)


def judge(returns: np.ndarray, trials: int, trial_sharpes=()) -> dict:
    """What luck has to do with (T,) returns; Sharpe ratios a bar.

    trials: how many configurations and seeds were tried. Their Sharpe ratios give the spread that
    deflates; it is never taken to be less than what chance spreads independent ones: a few seeds of
    one configuration resemble each other.
    """
    bars, ratio = len(returns), sharpe(returns)
    g3, g4 = shape(returns)
    low, high = sharpe_interval(returns)
    variance = np.var(trial_sharpes, ddof=1) if len(trial_sharpes) > 1 else 0.0
    threshold = expected_best(max(variance, 1 / (bars - 1)), trials)
    needed = bars_needed(ratio, bars, g3, g4, threshold)
    return {
        "bars": bars,
        "trials": trials,
        "sharpe": ratio,
        "low": low,
        "high": high,
        "skew": g3,
        "kurtosis": g4,
        "probabilistic": probabilistic_sharpe(ratio, bars, g3, g4),
        "threshold": threshold,
        "deflated": probabilistic_sharpe(ratio, bars, g3, g4, threshold),
        "track_record_bars": minimum_track_record(ratio, g3, g4),
        "bars_more": max(needed - bars, 0.0),
    }


def overfitting(returns: np.ndarray, blocks: int = BLOCKS) -> float:
    """Probability of backtest overfitting of (T, N) returns, N trials at the same bars.

    Share of the ways to take half of the blocks in which the trial that is best there is below the
    median of all trials in the other half. On noise about a half, with a wide spread.
    """
    parts = np.array_split(returns, blocks)
    sums = np.array([part.sum(0) for part in parts])
    squares = np.array([np.square(part).sum(0) for part in parts])
    lengths = np.array([len(part) for part in parts])

    def ratios(chosen):
        chosen = list(chosen)
        n = lengths[chosen].sum()
        mean = sums[chosen].sum(0) / n
        square = squares[chosen].sum(0)
        std = np.sqrt(np.maximum(square / n - mean**2, 0.0))
        return np.divide(mean, std, out=np.zeros_like(mean), where=std > 1e-15)

    below = []
    for half in combinations(range(blocks), blocks // 2):
        other = set(range(blocks)) - set(half)
        best = int(np.argmax(ratios(half)))
        ranks = rankdata(ratios(other))
        median = (returns.shape[1] + 1) / 2
        # on the median itself: half a loss
        below.append((np.sign(median - ranks[best]) + 1) / 2)
    return float(np.mean(below))


# ---------------------------------------------------------------------------------------- ledger
def fingerprint(value) -> str:
    """sha256 of plain values, whatever the order of their keys."""
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def parse(line: str) -> dict:
    """A line's record, {} where it is none."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


class Ledger:
    """A file of one JSON object a line that only grows.

    Each line holds the hash of the line before and its own. FILE.head holds the number of lines and
    the last hash, so that lines that are cut off at the end are missed too.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.head = self.path.with_name(self.path.name + ".head")
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def lock(self):
        return FileLock(str(self.path) + ".lock")

    def lines(self) -> list[dict]:
        """All records. UsageError (one line) where one was changed or taken out."""
        text = self.path.read_text() if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # kill -9 may tear the line that was being written
        records, before = [], START
        for i, line in enumerate(whole.splitlines()):
            record = parse(line)
            content = {k: v for k, v in record.items() if k != "hash"}
            own = record.get("hash") == fingerprint(content)
            if not own or record.get("previous") != before:
                raise self.broken(f"line {i + 1} was changed, or lines before it are missing")
            records.append(record)
            before = record["hash"]
        self.check_end(records)
        return records

    def check_end(self, records: list[dict]):
        """The head may lag one line behind: a process was killed between the two writes."""
        if not self.head.exists():
            if len(records) > 1:
                raise self.broken(f"{self.head.name} is missing")
            return
        head = json.loads(self.head.read_text())
        n = head["lines"]
        if n > len(records):
            raise self.broken(f"{len(records)} lines, there were {n}")
        if n and records[n - 1]["hash"] != head["hash"]:
            raise self.broken(f"line {n} is another one than was written")
        if len(records) > n + 1:
            raise self.broken(f"{len(records)} lines, {n} were written")

    def broken(self, why: str) -> UsageError:
        way_out = "put the file back; without it nobody knows how much was tried"
        return UsageError(f"{self.path}: {why}: {way_out}")

    def add(self, record: dict) -> str:
        """One more line; returns its hash."""
        with self.lock():
            records = self.lines()
            if records:
                os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
            before = records[-1]["hash"] if records else START
            line = plain(record) | {"previous": before}
            line["hash"] = fingerprint(line)
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
            write_json_atomic({"lines": len(records) + 1, "hash": line["hash"]}, self.head)
        return line["hash"]


class Trials:
    """What the ledger says about one data set: configurations and seeds, and what they earned.

    A trial is a configuration and a seed. Events: "tried" when it began; "scored" after each of its
    segments, with bars, mean and mean square of its returns out of sample.
    """

    def __init__(self, records: list[dict], data: str):
        self.scores = {}
        for record in records:
            if record.get("data") != data:
                continue
            segments = self.scores.setdefault(record["trial"], {})
            if record["event"] == "scored":
                segments[record["segment"]] = record["bars"], record["mean"], record["square"]

    def __len__(self):
        return len(self.scores)

    def sharpes(self) -> list[float]:
        """Sharpe ratio a bar of every trial over the segments that it was scored on."""
        found = []
        for segments in self.scores.values():
            bars, mean, square = np.array(list(segments.values())).reshape(-1, 3).T
            if bars.sum() < 2:
                continue
            mean = np.average(mean, weights=bars)
            std = math.sqrt(max(np.average(square, weights=bars) - mean**2, 0.0))
            found.append(float(mean / std) if std > 0 else 0.0)
        return found
