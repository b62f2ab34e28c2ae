"""How a trader of one or more assets is judged: metrics of a path, what stands beside it, and the verdict.

A script hands over its assets as `Series`; walk() is the script's own accounting, so costs are the run's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import empyrical
import numpy as np
from numba import njit

BP = 1e-4  # one basis point


@dataclass
class Series:
    """One asset. Row t is a decision row, held to row t + 1.

    walk(target (n,), start, stop) -> (reward, expected reward, |change|, held), (n,) each, of trading the exposures
    `target` on rows [start, stop), flat before the first: log growth net of costs; and the known conditional mean of
    the simple return in place of the realised one, NaN on real bars.
    """

    x: np.ndarray  # (T, K) float64 columns that the ridge policy sees
    ret: np.ndarray  # (T,) simple return of the next bar
    rows: dict  # split -> (start, stop)
    walk: Callable
    known: bool  # the conditional mean is


def path_metrics(reward, mean, change, held, bars_per_year: float) -> tuple[dict, np.ndarray]:
    """Metrics of what Series.walk returned, and the equity (n,) after each bar, 1 before the first."""
    growth = np.expm1(reward)
    moves = growth.std() > 0
    metrics = {
        "mean_reward_bps": float(reward.mean() / BP), "total_return": math.expm1(reward.sum()),
        "sharpe": float(empyrical.sharpe_ratio(growth, annualization=bars_per_year)) if moves else 0.0,
        "max_drawdown": float(empyrical.max_drawdown(growth)), "turnover": float(change.mean()),
        "exposure": float(held.mean()), "trades": int((change > 1e-9).sum())}
    if np.isfinite(mean).all():
        metrics["mean_expected_bps"] = float(mean.mean() / BP)
    return metrics, np.exp(np.cumsum(reward))


def best_constant(series: Series, levels) -> float:
    """The constant exposure of `levels` that earned most on the train rows, entry paid."""
    a, b = series.rows["train"]
    earned = [series.walk(np.full(b - a, float(x)), a, b)[0].mean() for x in levels]
    return float(levels[int(np.argmax(earned))])


def random_path(n: int, turnover: float, seed: int, levels=None) -> np.ndarray:
    """Exposures (n,), uniform on [-1, 1] (or on `levels`), that jump as often as this mean |change| a bar asks for."""
    rng = np.random.default_rng(seed)
    size = 2 / 3 if levels is None else np.abs(np.subtract.outer(levels, levels)).mean()  # of a jump
    jump = rng.random(n) < min(turnover / size, 1.0)
    jump[0] = True
    drawn = rng.uniform(-1, 1, n) if levels is None else rng.choice(np.asarray(levels, float), n)
    return drawn[np.maximum.accumulate(np.where(jump, np.arange(n), 0))]


@njit(cache=True)
def ewma_nb(x, keep):
    out = x.copy()
    for t in range(1, x.size):
        out[t] = keep * out[t - 1] + (1.0 - keep) * x[t]
    return out


def band(forecast: np.ndarray, level: float) -> np.ndarray:
    """+1 above `level`, -1 below -`level`, otherwise as before (0 at first)."""
    side = np.where(np.abs(forecast) > level, np.sign(forecast), 0.0)
    return side[np.maximum.accumulate(np.where(side != 0, np.arange(len(side)), 0))]


def ridge_edge(assets: list[Series], levels) -> tuple[float, float]:
    """Edge in bp a bar, and its standard error, of the best ridge policy over the best constant, on the eval split.

    One ridge of the next return on x, fitted on the first 70 % of every asset's train rows; penalty, smoothing and
    no-trade threshold chosen on the rest. Mean over assets; standard error from 20 batch means an asset; where the
    conditional mean is known (synthetic) it stands in for the realised return.
    """
    fits = [(a, a + int(0.7 * (b - a)), b) for a, b in (s.rows["train"] for s in assets)]
    seen = np.concatenate([s.x[a:fit] for s, (a, fit, _) in zip(assets, fits)])
    center, scale = seen.mean(0), seen.std(0) + 1e-9
    seen = (seen - center) / scale
    earned = np.concatenate([s.ret[a:fit] for s, (a, fit, _) in zip(assets, fits)])
    gram, rhs = seen.T @ seen, seen.T @ (earned - earned.mean())

    best, paths = -math.inf, []
    for penalty in (1e2, 1e3, 1e4):
        weights = np.linalg.solve(gram + penalty * np.eye(len(gram)), rhs)
        forecasts = [(s.x - center) / scale @ weights for s in assets]
        for smooth in (0.0, 0.7, 0.9):
            smoothed = [ewma_nb(f, smooth) for f in forecasts]
            spread = np.std(np.concatenate([f[a:fit] for f, (a, fit, _) in zip(smoothed, fits)]))
            for threshold in (0.0, 0.5, 1.0, 1.5, 2.0):
                targets = [band(f, threshold * spread) for f in smoothed]
                earned = (s.walk(t[fit:b], fit, b)[0].mean() for s, t, (_, fit, b) in zip(assets, targets, fits))
                score = float(np.mean(list(earned)))
                if score > best:
                    best, paths = score, targets

    means, errors = [], []
    for s, path in zip(assets, paths):
        a, b = s.rows["eval"]
        constant = np.full(b - a, best_constant(s, levels))
        edge = s.walk(path[a:b], a, b)[s.known] - s.walk(constant, a, b)[s.known]  # [0] realised, [1] expected
        batches = np.array([x.mean() for x in np.array_split(edge, 20)])
        means.append(edge.mean())
        errors.append(batches.std(ddof=1) / math.sqrt(20))
    return float(np.mean(means) / BP), float(np.sqrt(np.sum(np.square(errors))) / len(assets) / BP)


def verdict(audit: dict, agent: dict, updates: int) -> tuple[str, list[str]]:
    """healthy, collapsed, constant_is_right or untrained, and why.

    audit: state_dependence, ridge_edge_bps, ridge_edge_se_bps; agent: path_metrics on the eval split.
    """
    if updates == 0:
        return "untrained", ["no gradient update was made"]
    dependence, turnover, exposure = audit["state_dependence"], agent["turnover"], agent["exposure"]
    edge, se = audit["ridge_edge_bps"], audit["ridge_edge_se_bps"]
    found = f"ridge policy over best constant on eval: {edge:+.2f} bp a bar, standard error {se:.2f}"
    seen = f"state_dependence {dependence:.3f}, turnover {turnover:.4f}, exposure {exposure:+.2f}"
    if dependence >= 0.02 and turnover >= 1e-3:
        return "healthy", [f"the position answers to the market: {seen}", found]
    if edge > 2 * se:
        return "collapsed", [f"one position whatever the market: {seen}", f"yet there is an edge; {found}"]
    return "constant_is_right", [f"one position whatever the market: {seen}", f"and no edge is to be seen; {found}"]
