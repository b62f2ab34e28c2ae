"""Is a backtest more than luck? Statistics of Sharpe ratios, and a ledger of all that was tried.

    # growth (T,): simple return of each bar, costs paid; Sharpe ratios are a bar's, never a year's
    found = judge(growth, trials=12, trial_sharpes=[0.01, 0.02])
    found["deflated"], found["bars_more"]

    ledger = Ledger("results/ledger.jsonl")
    ledger.add({"event": "tried", ...})  # a line, chained to the line before by its hash
    ledger.lines()  # UsageError where a line was changed or is missing

Probabilistic Sharpe ratio and minimum track record: Bailey and Lopez de Prado (2012). Deflated
Sharpe ratio: the same (2014). Probability of backtest overfitting by CSCV: Bailey, Borwein, Lopez
de Prado and Zhu (2017).
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
from common.timeout_guard import named, plain, write_json_atomic  # noqa: E402
from scripts.report_market import bootstrap_means  # noqa: E402

CONFIDENCE = 0.95
BLOCKS = 16  # of CSCV: 12 870 ways to take half of them
MOMENTS = "bars", "mean", "square"  # of a segment's returns
START = "0" * 64  # what the first line of a ledger is chained to


# --------------------------------------------------------------------------------- Sharpe ratios
def sharpe(returns: np.ndarray) -> float:
    """Mean over standard deviation of (T,) returns, a bar; 0 where nothing moves."""
    return ratio_of(np.mean(returns), np.std(returns))


def ratio_of(mean: float, std: float) -> float:
    return float(mean / std) if std > 0 else 0.0


def shape(returns: np.ndarray) -> tuple[float, float]:
    """Skewness and kurtosis (of a normal: 0 and 3)."""
    if not np.std(returns) > 0:
        return 0.0, 3.0
    g3 = skew(returns)
    g4 = kurtosis(returns, fisher=False)
    return float(g3), float(g4)


def sharpe_spread(ratio: float, g3: float, g4: float) -> float:
    """Standard deviation of an estimated Sharpe ratio, times sqrt(T - 1)."""
    asymmetry = -g3 * ratio
    tails = (g4 - 1) / 4 * ratio**2
    variance = 1 + asymmetry + tails
    return math.sqrt(max(variance, 1e-12))


def probabilistic_sharpe(ratio, bars, g3=0.0, g4=3.0, benchmark=0.0) -> float:
    """Probability that the true Sharpe ratio is above `benchmark`; ratios a bar."""
    error = sharpe_spread(ratio, g3, g4) / math.sqrt(bars - 1)
    z = (ratio - benchmark) / error
    return float(norm.cdf(z))


def expected_best(variance: float, trials: int) -> float:
    """Sharpe ratio that the best of `trials` is expected to show when all are worth nothing."""
    if trials < 2:
        return 0.0
    gamma = np.euler_gamma
    first = norm.ppf(1 - 1 / trials)
    second = norm.ppf(1 - 1 / (trials * math.e))
    best = (1 - gamma) * first + gamma * second
    return float(math.sqrt(variance) * best)


def minimum_track_record(ratio, g3=0.0, g4=3.0, benchmark=0.0) -> float:
    """Bars after which this Sharpe ratio is above `benchmark` at CONFIDENCE; inf where never."""
    if ratio <= benchmark:
        return math.inf
    spread = sharpe_spread(ratio, g3, g4)
    root = norm.ppf(CONFIDENCE) * spread / (ratio - benchmark)
    return float(1 + root**2)


def bars_needed(ratio, bars, g3, g4, threshold) -> float:
    """Bars after which the deflated Sharpe ratio reaches CONFIDENCE, if the ratio stays.

    threshold: expected_best() on `bars` bars; what chance shows falls as 1 / sqrt(bars).
    """
    if ratio <= 0:
        return math.inf
    spread = sharpe_spread(ratio, g3, g4)
    chance = threshold * math.sqrt(bars - 1)
    root = (norm.ppf(CONFIDENCE) * spread + chance) / ratio
    return float(1 + root**2)


def sharpe_interval(returns: np.ndarray) -> tuple[float, float]:
    """Of the Sharpe ratio a bar, by the stationary bootstrap with blocks of T^(1/3) bars."""
    squares = np.square(returns)
    mean, square = bootstrap_means(np.array([returns, squares]))
    variance = np.maximum(square - mean**2, 1e-300)
    ratios = mean / np.sqrt(variance)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ratios, (tail, 1 - tail))
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
    variance = chance = 1 / (bars - 1)
    if len(trial_sharpes) > 1:
        variance = max(np.var(trial_sharpes, ddof=1), chance)
    threshold = expected_best(variance, trials)
    needed = bars_needed(ratio, bars, g3, g4, threshold)
    deflated = probabilistic_sharpe(ratio, bars, g3, g4, threshold)
    return {
        # the formulas take bars to be independent, the bootstrap does not
        "skill": deflated >= CONFIDENCE and low > 0,
        "bars": bars,
        "trials": trials,
        "sharpe": ratio,
        "low": low,
        "high": high,
        "skew": g3,
        "kurtosis": g4,
        "probabilistic": probabilistic_sharpe(ratio, bars, g3, g4),
        "threshold": threshold,
        "deflated": deflated,
        "track_record_bars": minimum_track_record(ratio, g3, g4),
        "bars_more": max(needed - bars, 0.0),
    }


def overfitting(returns: np.ndarray, blocks: int = BLOCKS) -> float:
    """Probability of backtest overfitting of (T, N) returns, N trials at the same bars.

    Share of the ways to take half of the blocks in which the trial that is best there is below the
    median of all trials in the other half. On noise about a half, with a wide spread.
    """
    middle = (returns.shape[1] + 1) / 2  # rank of the median
    parts = np.array_split(returns, blocks)
    moments = np.array([moments_of(part) for part in parts])
    below = []
    for half in combinations(range(blocks), blocks // 2):
        chosen = np.zeros(blocks, bool)
        chosen[list(half)] = True
        best = int(np.argmax(ratios_of(moments[chosen])))
        ranks = rankdata(ratios_of(moments[~chosen]))
        side = np.sign(middle - ranks[best])
        below.append((side + 1) / 2)  # on the median itself: half a loss
    return float(np.mean(below))


def moments_of(part: np.ndarray) -> np.ndarray:
    """(3, N) of a block (T, N): bars, sums, sums of squares."""
    bars = np.full(part.shape[1], len(part))
    return np.array([bars, part.sum(0), np.square(part).sum(0)])


def ratios_of(moments: np.ndarray) -> np.ndarray:
    """Sharpe ratios (N,) over blocks, from their moments (blocks, 3, N)."""
    bars, total, squares = moments.sum(0)
    mean = total / bars
    variance = squares / bars - mean**2
    std = np.sqrt(np.maximum(variance, 0.0))
    moves = std > 1e-15
    nothing = np.zeros_like(mean)
    return np.divide(mean, std, out=nothing, where=moves)


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
        self.head = Path(f"{path}.head")
        self.lock = FileLock(f"{path}.lock")
        self.records, self.stamp = [], None  # what was read, and the file's state then
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def lines(self) -> list[dict]:
        """All records. UsageError (one line) where one was changed or taken out.

        A file that nobody touched since is not read again.
        """
        stamp = self.state()
        if stamp != self.stamp:
            self.records = self.read()
            self.stamp = stamp
        self.check_end(self.records)
        return list(self.records)

    def state(self) -> tuple:
        """Of the file: any write changes it."""
        if not self.path.exists():
            return ()
        found = self.path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    def read(self) -> list[dict]:
        text = self.path.read_text() if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # kill -9 may tear the line that was being written
        records, before = [], START
        for i, line in enumerate(whole.splitlines()):
            record = parse(line)
            content = without_hash(record)
            own = record.get("hash") == fingerprint(content)
            chained = record.get("previous") == before
            if not own or not chained:
                raise self.broken(f"line {i + 1} was changed, or lines before it are missing")
            records.append(record)
            before = record["hash"]
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
        with self.lock:
            records = self.lines()
            before = records[-1]["hash"] if records else START
            line = plain(record) | {"previous": before}
            line["hash"] = fingerprint(line)
            self.write(json.dumps(line))
            self.records = [*records, line]
            self.stamp = self.state()
            head = {"lines": len(self.records), "hash": line["hash"]}
            write_json_atomic(head, self.head)
        return line["hash"]

    def write(self, line: str):
        """At the end of the file; half a line there is cut off."""
        with named(self.path), self.path.open("a+b") as file:
            whole = end_of_lines(file)
            file.truncate(whole)
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def without_hash(record: dict) -> dict:
    return {k: v for k, v in record.items() if k != "hash"}


def end_of_lines(file) -> int:
    """Bytes of a file up to its last whole line."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 1, 0))
    if file.read() == b"\n":
        return size
    file.seek(0)
    return file.read().rfind(b"\n") + 1


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
                number = record["segment"]
                segments[number] = [record[name] for name in MOMENTS]

    def __len__(self):
        return len(self.scores)

    def sharpes(self) -> list[float]:
        """Sharpe ratio a bar of every trial over the segments that it was scored on."""
        found = []
        for segments in self.scores.values():
            rows = np.array(list(segments.values()))
            bars, mean, square = rows.reshape(-1, 3).T
            if bars.sum() < 2:
                continue
            mean = np.average(mean, weights=bars)
            square = np.average(square, weights=bars)
            variance = max(square - mean**2, 0.0)
            found.append(ratio_of(mean, math.sqrt(variance)))
        return found
