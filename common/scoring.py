"""How a trader of one or more assets is judged: metrics of a path, its rivals, the verdict.

A script hands over its assets as `Series`; walk() is the script's own accounting, so costs are the
run's.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numba import njit

from common.run import ask_deadline

BP = 1e-4  # one basis point
BATCHES = 20  # consecutive pieces whose means give a standard error
FOLDS = 5  # of the train rows, to choose the lasso's penalty
CHUNK = 4_096  # rows of a lasso's columns at once
GAP = 64  # rows beside a fold that are not used: columns look back
SMOOTHING = (0.0, 0.5, 0.7, 0.8, 0.9)  # weight of a forecast's past
# of a no-trade band, in standard deviations
THRESHOLDS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
NOTHING = 0.05  # bp a bar: an optimum that earns less earns nothing
STILL = 0.05  # state_dependence below which a position is one and the same; at random above .2
ENOUGH = 0.25  # share of the edge that is there, from which on an agent is healthy


@dataclass
class Series:
    """One asset. Row t is a decision row, held to row t + 1.

    walk(target (n,), start, stop) -> (reward, expected reward, |change|, held), (n,) each, of
    trading the exposures `target` on rows [start, stop), flat before the first: log growth net of
    costs; and the known conditional mean of the simple return instead of the realised one, NaN on
    real bars.
    """

    x: np.ndarray  # (T, K) float64 columns that the cheap rival sees, or what makes them: x[a:b]
    ret: np.ndarray  # (T,) simple return of the next bar
    rows: dict  # split -> (start, stop)
    walk: Callable
    known: bool  # the conditional mean is


def path_metrics(
    reward, mean, change, held, bars_per_year: float
) -> tuple[dict, np.ndarray]:
    """Metrics of what Series.walk returned, and the equity (n,) after each bar (1 before)."""
    import empyrical  # most of a second

    growth = np.expm1(reward)
    sharpe = 0.0
    if growth.std() > 0:
        sharpe = float(empyrical.sharpe_ratio(growth, annualization=bars_per_year))
    metrics = {
        "mean_reward_bps": float(reward.mean() / BP),
        "total_return": math.expm1(reward.sum()),
        "sharpe": sharpe,
        "max_drawdown": float(empyrical.max_drawdown(growth)),
        "turnover": float(change.mean()),
        "exposure": float(held.mean()),
        "trades": int((change > 1e-9).sum()),
    }
    if np.isfinite(mean).all():
        metrics["mean_expected_bps"] = float(mean.mean() / BP)
    return metrics, np.exp(np.cumsum(reward))


def standard_error(x: np.ndarray) -> float:
    """Of the mean of (n,) values that need not be independent: from the means of BATCHES pieces."""
    pieces = np.array_split(x, min(BATCHES, len(x)))
    if len(pieces) < 2:
        return math.inf
    means = np.array([piece.mean() for piece in pieces])
    return float(means.std(ddof=1) / math.sqrt(len(means)))


def usual_limit(returns: np.ndarray) -> float:
    """Size beyond which a return is not the market's: 12 robust standard deviations.

    A scale of rewards that is learned from returns clipped there survives a bad tick. inf where
    most returns are equal.
    """
    low, high = np.quantile(returns, (0.25, 0.75))
    sigma = (high - low) / 1.349
    return 12.0 * sigma or math.inf


def best_constant(series: Series, levels) -> float:
    """The constant exposure of `levels` that earned most on the train rows, entry paid.

    0 unless that is more than 2 standard errors above flat: on noise some constant is always ahead.
    """
    a, b = series.rows["train"]
    best = 0.0
    earned = None
    for level in levels:
        constant = np.full(b - a, float(level))
        path = series.walk(constant, a, b)[0]
        if earned is None or path.mean() > earned.mean():
            best = float(level)
            earned = path
    visible = earned.mean() > 2 * standard_error(earned)
    return best if visible or 0 not in levels else 0.0


def random_path(n: int, turnover: float, seed: int, levels=None) -> np.ndarray:
    """Exposures (n,), uniform on [-1, 1] (or on `levels`), that jump to have this mean |change|."""
    rng = np.random.default_rng(seed)
    size = 2 / 3  # of a jump, on average
    if levels is not None:
        size = np.abs(np.subtract.outer(levels, levels)).mean()
    jump = rng.random(n) < min(turnover / size, 1.0)
    jump[0] = True
    if levels is None:
        goals = rng.uniform(-1, 1, n)
    else:
        goals = rng.choice(np.asarray(levels, float), n)
    return goals[last_true(jump)]


def last_true(mask: np.ndarray) -> np.ndarray:
    """(n,) index of the last True up to each row, 0 before the first."""
    rows = np.arange(len(mask))
    return np.maximum.accumulate(np.where(mask, rows, 0))


@njit(cache=True)
def ewma_nb(x, keep):
    out = x.copy()
    for t in range(1, x.size):
        news = (1.0 - keep) * x[t]
        out[t] = keep * out[t - 1] + news
    return out


def band(forecast: np.ndarray, level: float) -> np.ndarray:
    """+1 above `level`, -1 below -`level`, otherwise as before (0 at first)."""
    far = np.abs(forecast) > level
    side = np.where(far, np.sign(forecast), 0.0)
    return side[last_true(side != 0)]


@dataclass
class Sums:
    """Sums over rows of columns x (n, K), less a level, and next returns y (n,): all that a lasso
    asks of them. Those of two sets of rows add up: folds share one pass, a block at a time."""

    gram: np.ndarray  # (K + 2, K + 2) products of (x - level, y, 1)
    high: np.ndarray  # (3, K) of (x - level)^2 y, (x - level)^2 y^2, (x - level) y^2

    def __add__(self, other):
        return Sums(self.gram + other.gram, self.high + other.high)


def sums_of(series: Series, start: int, stop: int, level: np.ndarray) -> Sums:
    """Sums over rows [start, stop); level (K,): near the mean, so that little cancels."""
    wide = len(level) + 2
    sums = Sums(np.zeros((wide, wide)), np.zeros((3, len(level))))
    for rows in blocks(start, stop):
        ask_deadline("the lasso", stop - start)
        x, y = series.x[rows] - level, series.ret[rows]
        z = np.column_stack([x, y, np.ones(len(y))])
        sums.gram += z.T @ z
        square = x**2
        sums.high[0] += y @ square
        sums.high[1] += y**2 @ square
        sums.high[2] += y**2 @ x
    return sums


def blocks(start: int, stop: int) -> list[slice]:
    return [slice(a, min(a + CHUNK, stop)) for a in range(start, stop, CHUNK)]


def train_sums(assets: list[Series]) -> tuple[np.ndarray, list[Sums]]:
    """level (K,), and Sums of the train rows of all assets: all of them, then those that each of
    FOLDS consecutive stretches leaves out, without GAP rows on both its sides."""
    first = assets[0].rows["train"][0]
    level = assets[0].x[first : first + CHUNK].mean(0)
    parts = [[] for _ in range(FOLDS + 1)]
    for s in assets:
        edges = fold_edges(s)
        cuts = np.concatenate([edges, edges - GAP, edges + GAP])
        cuts = np.unique(cuts.clip(*s.rows["train"])).tolist()
        for start, stop in zip(cuts, cuts[1:]):
            sums = sums_of(s, start, stop, level)
            parts[0].append(sums)
            for k, (low, high) in enumerate(zip(edges, edges[1:])):
                if stop <= low - GAP or start >= high + GAP:
                    parts[k + 1].append(sums)
    return level, [functools.reduce(operator.add, part) for part in parts]


def fold_edges(series: Series) -> np.ndarray:
    """(FOLDS + 1,) rows at which the folds of its train rows begin and end."""
    a, b = series.rows["train"]
    return a + (b - a) * np.arange(FOLDS + 1) // FOLDS


def lasso_path_of(level: np.ndarray, sums: Sums, penalties=None, adaptive=False):
    """Lasso of y on x along penalties: (penalties, center (K,), weights (K, P)).

    weights belong to x as it is; penalties, where none are given, go from the first at which all
    weights are 0 down to a tenth of it. adaptive: a column's penalty is divided by the square of
    its t-value (Zou 2006 with marginal regressions), and the last one is a hundredth of the first.
    """
    from sklearn.linear_model import lasso_path  # more than a second

    n = int(sums.gram[-1, -1])
    k = len(level)
    ask_deadline("the lasso", n)
    mean = sums.gram[-1] / n
    product = sums.gram - n * np.outer(mean, mean)  # of what is left of x and y without their means
    scale = np.sqrt(np.diag(product)[:k].clip(0) / n) + 1e-9
    if adaptive:
        scale = scale / np.maximum(marginal_t(sums) ** 2, 1e-6)
    gram = product[:k, :k] / np.outer(scale, scale)
    rhs = product[:k, k] / scale
    if penalties is None:
        first = np.abs(rhs).max() / n
        steps = np.geomspace(1, 0.01, 24) if adaptive else np.geomspace(1, 0.1, 12)
        penalties = first * steps
    # beside the products sklearn reads the shape of x and the size of y alone
    x = np.broadcast_to(0.0, (n, k))
    y = np.zeros(n)
    y[0] = math.sqrt(product[k, k])
    products = dict(precompute=gram, Xy=rhs, check_input=False)
    path = lasso_path(x, y, alphas=penalties, max_iter=100_000, **products)
    return penalties, level + mean[:k], path[1] / scale[:, None]


def marginal_t(sums: Sums) -> np.ndarray:
    """t-values (K,) of the covariance of each column of x with y."""
    n = sums.gram[-1, -1]
    mean = sums.gram / n
    x, y = mean[-1, :-2], mean[-1, -2]
    xx = np.diag(mean)[:-2]
    xy = mean[:-2, -2]
    yy = mean[-2, -2]
    xxy, xxyy, xyy = sums.high / n
    covariance = xy - x * y
    # mean square of (x - its mean) (y - its mean), multiplied out
    square = xxyy - 2 * y * xxy + y**2 * xx
    square += x**2 * yy - 2 * x * xyy
    square += 4 * x * y * xy - 3 * x**2 * y**2
    variance = square - covariance**2
    variance = np.maximum(variance, 1e-300)
    return covariance / np.sqrt(variance / n)


def forecasts_on(series: Series, start: int, stop: int, center, weights) -> np.ndarray:
    """Forecasts (stop - start, P) of rows by weights (K, P), or (stop - start,) by weights (K,)."""
    parts = []
    for rows in blocks(start, stop):
        parts.append((series.x[rows] - center) @ weights)
    return np.concatenate(parts)


def out_of_fold(assets, level, others: list[Sums], penalties, adaptive=False) -> list[np.ndarray]:
    """Forecasts (n, P) of an asset's train rows by lassos that were fitted on the other folds."""
    forecasts = [[] for _ in assets]
    for k, sums in enumerate(others):
        _, center, weights = lasso_path_of(level, sums, penalties, adaptive)
        for s, parts in zip(assets, forecasts):
            low, high = fold_edges(s)[k : k + 2]
            parts.append(forecasts_on(s, low, high, center, weights))
    return [np.concatenate(parts) for parts in forecasts]


def sparse_linear(assets: list[Series]) -> list[np.ndarray]:
    """Exposures (T,) of the cheap rival, an array an asset: a lasso of the next return on x.

    One lasso for all assets. Penalty, smoothing and no-trade threshold are those that earn most on
    the train rows, out of fold; flat where nothing earns.
    """
    trains = [slice(*s.rows["train"]) for s in assets]
    flat = [np.zeros(len(s.ret)) for s in assets]
    y = np.concatenate([s.ret[part] for s, part in zip(assets, trains)])
    if not y.std() > 0:
        return flat
    level, (whole, *others) = train_sums(assets)
    penalties, center, weights = lasso_path_of(level, whole)
    forecasts = out_of_fold(assets, level, others, penalties)

    most = 0.0
    choice = None
    for k in range(1, len(penalties)):  # the first penalty leaves no weight
        for keep in SMOOTHING:
            ask_deadline("the lasso's thresholds", len(y))
            smooth = [ewma_nb(np.ascontiguousarray(f[:, k]), keep) for f in forecasts]
            spread = np.concatenate(smooth).std()
            for threshold in THRESHOLDS:
                paths = [band(forecast, threshold * spread) for forecast in smooth]
                score = earned_on(assets, paths, trains)
                if score > most:
                    most = score
                    choice = k, keep, threshold
    if choice is None:
        return flat
    k, keep, threshold = choice
    smooth = []
    for s in assets:
        forecast = forecasts_on(s, 0, len(s.ret), center, weights[:, k])
        smooth.append(ewma_nb(forecast, keep))
    spread = spread_on(smooth, trains)
    return [band(forecast, threshold * spread) for forecast in smooth]


def spread_on(forecasts: list, rows: list[slice]) -> float:
    pieces = [forecast[part] for forecast, part in zip(forecasts, rows)]
    return np.concatenate(pieces).std()


def earned_on(assets: list[Series], targets: list, rows: list[slice]) -> float:
    """Mean reward, over assets, of trading `targets` (n,) on these rows of each."""
    means = []
    for series, target, part in zip(assets, targets, rows):
        reward = series.walk(target, part.start, part.stop)[0]
        means.append(reward.mean())
    return float(np.mean(means))


def edge_over_constant(
    assets: list[Series], paths: list, split: str, levels
) -> tuple[float, float]:
    """What `paths` earn over the best constant on a split, bp a bar, and its standard error.

    Or over flat, where that constant loses: not to hold what was wrong is no skill. paths:
    exposures (T,), or (n,) of the split alone, an array an asset. Mean over assets; where the
    conditional mean is known (synthetic) it stands in for the realised return.
    """
    means = []
    errors = []
    for s, path in zip(assets, paths):
        a, b = s.rows[split]
        if len(path) != b - a:
            path = path[a:b]
        which = int(s.known)  # of what walk returns: realised or expected
        chosen = np.full(b - a, best_constant(s, levels))
        constant = s.walk(chosen, a, b)[which]
        if constant.mean() < 0:
            constant = np.zeros(b - a)
        edge = s.walk(path, a, b)[which] - constant
        means.append(edge.mean())
        errors.append(standard_error(edge))
    error = np.sqrt(np.sum(np.square(errors))) / len(assets)
    edge = np.mean(means)
    return float(edge / BP), float(error / BP)


def fit_linear(series: Series) -> tuple[dict, np.ndarray]:
    """An adaptive lasso of the next return on x, and its forecasts (n,) of the train rows, out of
    fold.

    The penalty is that of the smallest squared error out of fold. Plain values: penalty, center and
    weights (K,) of x, spread (of the forecasts) by which a reader of the forecast divides.
    """
    y = series.ret[slice(*series.rows["train"])]
    y = y - y.mean()
    level, (whole, *others) = train_sums([series])
    penalties, center, weights = lasso_path_of(level, whole, adaptive=True)
    forecasts = out_of_fold([series], level, others, penalties, adaptive=True)[0]
    errors = [((y - forecast) ** 2).mean() for forecast in forecasts.T]
    k = int(np.argmin(errors))
    forecast = forecasts[:, k]
    # no forecast of other rows: then none of the train rows either
    if not weights[:, k].any():
        forecast = np.zeros(len(y))
    linear = {
        "penalty": float(penalties[k]),
        "center": center.tolist(),
        "weights": weights[:, k].tolist(),
        "spread": float(forecast.std()) or 1.0,
    }
    return linear, forecast / linear["spread"]


def edge_that_matters(returns: np.ndarray, bars_per_year: float) -> float:
    """Bp a bar that give a full position a Sharpe ratio of 1 a year."""
    return float(returns.std() / math.sqrt(bars_per_year) / BP)


def edges(assets: list[Series], paths: dict, levels, bars_per_year: float) -> dict:
    """What stands behind a verdict: what agent, rival and optimum earn over the best constant.

    paths: {"agent", "sparse_linear" and, where it is known, "optimum": exposures (n,) of the eval
    split, an array an asset}. Bp a bar.
    """
    result = {}
    for name, who in (("edge", "agent"), ("rival_edge", "sparse_linear")):
        edge, error = edge_over_constant(assets, paths[who], "eval", levels)
        result[f"{name}_bps"] = edge
        result[f"{name}_se_bps"] = error
    result["optimum_edge_bps"] = None
    if "optimum" in paths:
        edge, _ = edge_over_constant(assets, paths["optimum"], "eval", levels)
        result["optimum_edge_bps"] = edge
    returns = [s.ret[slice(*s.rows["train"])] for s in assets]
    result["matters_bps"] = edge_that_matters(np.concatenate(returns), bars_per_year)
    return result


def verdict(
    audit: dict,
    agent: dict,
    updates: int,
    least_updates: int,
    rows: int,
    improving: bool,
) -> tuple[str, list[str]]:
    """What the agent is, in a word, and why.

    audit: state_dependence, and in bp a bar, on the eval split, over the best constant, with
    standard errors: edge_bps, edge_se_bps of the agent, rival_edge_bps, rival_edge_se_bps of
    sparse_linear, optimum_edge_bps (None on real bars); matters_bps: see edge_that_matters. agent:
    path_metrics on that split, which has `rows`. An agent of fewer than least_updates, or of a run
    that was cut while it was `improving`, has not collapsed.
    """
    if updates == 0:
        return "untrained", ["no gradient update was made"]
    numbers = describe(audit, agent)
    if audit["matters_bps"] == 0:
        return "constant_is_right", [
            "the price never moves: there is nothing to earn",
            numbers,
        ]

    goal = rival = audit["rival_edge_bps"]
    least = 2 * audit["rival_edge_se_bps"]
    optimum = audit["optimum_edge_bps"]
    matters = audit["matters_bps"]
    visible = rival > least
    if optimum is not None:
        visible = optimum >= NOTHING and (visible or optimum >= matters)
        goal = optimum
    # more than the opening trade
    trades = agent["trades"] > 1 and agent["turnover"] >= 1e-3 + 1 / rows
    moves = trades and audit["state_dependence"] >= STILL
    earns = audit["edge_bps"] > 2 * audit["edge_se_bps"]
    if visible:
        if moves and earns and audit["edge_bps"] >= ENOUGH * goal:
            return "healthy", [
                "the position answers to the market, and that earns",
                numbers,
            ]
        if improving or updates < least_updates:
            return "undertrained", [
                f"it stopped early, after {updates} updates",
                numbers,
            ]
        if moves:
            why = f"it answers to the market, but earns less than {ENOUGH:.0%} of what is there"
            return "undertrained", [why, numbers]
        return "collapsed", [
            "one position whatever the market, yet there is an edge",
            numbers,
        ]
    if moves and earns:
        return "healthy", [
            "the position answers to the market, and that earns",
            numbers,
        ]
    if optimum is None and least > matters:
        why = f"an edge below {least:.2f} bp a bar would not show on these rows, and one of "
        return "undecided", [f"{why}{matters:.2f} matters", numbers]
    if moves or (optimum or 0.0) >= NOTHING:
        why = "the edge is too weak to be seen"
        if moves:
            why = "it trades where no edge is to be seen"
        return "undecided", [why, numbers]
    return "constant_is_right", [
        "one position whatever the market, and no edge",
        numbers,
    ]


def describe(audit: dict, agent: dict) -> str:
    """The numbers behind a verdict."""
    text = f"state_dependence {audit['state_dependence']:.3f}, turnover {agent['turnover']:.4f}, "
    text += f"exposure {agent['exposure']:+.2f}; "
    text += "over the best constant, or flat, on eval in bp a bar: agent "
    text += f"{audit['edge_bps']:+.2f} (standard error {audit['edge_se_bps']:.2f}), sparse_linear "
    text += f"{audit['rival_edge_bps']:+.2f} ({audit['rival_edge_se_bps']:.2f})"
    if audit["optimum_edge_bps"] is not None:
        text += f", optimum {audit['optimum_edge_bps']:+.2f}"
    return text
