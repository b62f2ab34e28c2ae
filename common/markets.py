"""Synthetic markets whose best policy is known exactly, and that policy by dynamic programming.

A hidden signal s (Rouwenhorst chain, unit variance) and a hidden regime set the next bar's SIMPLE
return:

    r[t+1] = sigma[regime t] (ic sign[regime t] h(s[t]) + sqrt(1 - ic^2) eps) + drift,    r > -0.95

Bar t shows s[t] in its volume and regime[t] in its range: a policy reads both at its close and
earns bar t+1. Markets: `regime` (the signal's sign flips in the storm), `signal`, `square` (what counts
is the signal's square, which a line through a column does not see), `square_regime` (both: the
square's sign flips in the storm), `noise` (ic 0: do not trade) and `drift` (constant mean: hold
+1). h(s) is s; on the squares it is (s^2 - 1) / sqrt(2).

    law = parse_law("synthetic:regime?bars=20000&seed=3")
    timestamps, ohlcv, truth = generate(law)
    positions = optimum_path(truth, cost=5e-4, start=14000, stop=17000)
"""

from __future__ import annotations

import difflib
import math
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

PREFIX = "synthetic:"
START_TIME = np.datetime64("2019-01-01T00:00", "ns")  # UTC
START_PRICE = 100.0
LOG_VOLUME = math.log(1000.0)
RETURN_FLOOR = -0.95  # a simple return must stay above -1
MIN_BARS, MAX_BARS = (
    64,
    2_000_000,
)  # datetime64[ns] ends in 2262, 2.1 million hours after START_TIME
ACTIONS = np.arange(-10, 11) / 10  # linspace(-1, 1, 21) without its rounding: 0 and +-.1 are exact

CALM_AND_STORM = {
    "ic": 0.14,
    "sigma": (0.005, 0.012),
    "sign": (1, -1),
    "regime_transition": ((0.995, 0.005), (0.010, 0.990)),
}
MARKETS = {
    "regime": CALM_AND_STORM | {"phi": 0.97},
    "signal": {"ic": 0.1},
    "square": {"ic": 0.1},
    "square_regime": CALM_AND_STORM | {"phi": 0.9},
    "noise": {"ic": 0.0},
    "drift": {"ic": 0.0},
}
LIMITS = {  # both ends allowed
    "bars": (MIN_BARS, MAX_BARS),
    "seed": (0, 2**63),
    "n_states": (2, 201),
    "ic": (-1, 1),
    "phi": (-0.99999, 0.99999),
    "tails": (2.0001, 1e6),
}
WHOLE = ("bars", "seed", "n_states")  # keys that take whole numbers
DRIFT = 0.05  # mean of the drift market, in sigma a bar
KEYS = ("bars", "seed", "n_states", "phi", "sigma", "tails")
MARKET_KEYS = {
    "regime": (*KEYS, "ic"),
    "signal": (*KEYS, "ic"),
    "square": (*KEYS, "ic"),
    "square_regime": (*KEYS, "ic"),
    "noise": KEYS,
    "drift": (*KEYS, "drift"),
}


@dataclass(frozen=True, eq=False)
class Law:
    """Parameters of a synthetic market; a value out of range is a ValueError with both numbers.

    sigma and drift are simple returns a bar (.006 = .6 %); sigma and sign have one entry a regime;
    the rows of regime_transition (R, R) sum to 1; tails is nu of a Student t scaled to unit
    variance (None: normal).
    """

    name: str
    bars: int = 20_000
    seed: int = 0
    n_states: int = 21
    ic: float = 0.1
    phi: float = 0.9
    sigma: tuple[float, ...] = (0.006,)
    sign: tuple[int, ...] = (1,)
    regime_transition: np.ndarray = ((1.0,),)
    drift: float = 0.0
    tails: float | None = None

    def __post_init__(self):
        rows = np.array(self.regime_transition, np.float64)
        rows.setflags(write=False)
        object.__setattr__(self, "regime_transition", rows)
        for name, (low, high) in LIMITS.items():
            self._need(name, getattr(self, name), low, high)
        n = len(self.sign)
        self._need("number of sigmas (one a regime: a/b)", len(self.sigma), n, n)
        for sigma in self.sigma:
            self._need("sigma", sigma, 1e-9, 0.1)
        calm = min(self.sigma)
        self._need("drift", self.drift, -calm, calm)
        square = rows.shape == (n, n) and rows.min() >= 0
        if not square or not np.allclose(rows.sum(1), 1, atol=1e-12):
            wanted = f"{n} x {n}, rows >= 0 that sum to 1"
            raise ValueError(
                f"{PREFIX}{self.name}: regime_transition is {rows.tolist()}, must be {wanted}"
            )

    def _need(self, what: str, value, low, high):
        if value is not None and not low <= value <= high:
            raise ValueError(
                f"{PREFIX}{self.name}: {what} is {value}, must be from {low:g} to {high:g}"
            )


@dataclass(frozen=True, eq=False)
class Truth:
    """What a generated market hides, one row a bar.

    s (T,) int64 index of the signal's state; signal (T,) float64 its value; regime (T,) int64;
    expected (T,) float64, E[simple return of bar t+1 | s[t], regime[t]].
    """

    law: Law
    s: np.ndarray
    signal: np.ndarray
    regime: np.ndarray
    expected: np.ndarray


def parse_law(spec: str) -> Law:
    """Law of "synthetic:NAME[?key=value&...]"; two regimes take two sigmas ("sigma=.005/.012").

    Keys: bars, seed, n_states, phi, sigma, tails; ic (not of noise and drift); drift (drift only: a
    simple return a bar, default .05 sigma). An unknown market or key, a key given twice and a value
    out of range are each a ValueError of one line.
    """
    if not spec.startswith(PREFIX):
        raise ValueError(f"{spec!r}: must be {PREFIX}NAME, NAME one of {', '.join(MARKETS)}")
    name, _, query = spec[len(PREFIX) :].partition("?")
    if name not in MARKETS:
        raise ValueError(f"{spec!r}: unknown market {name!r}{_near(name, MARKETS)}")
    given = {}
    for pair in query.split("&") if query else ():
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"{spec!r}: {pair!r} is not key=value")
        if key not in MARKET_KEYS[name]:
            raise ValueError(f"{spec!r}: unknown key {key!r}{_near(key, MARKET_KEYS[name])}")
        if key in given:
            raise ValueError(f"{spec!r}: key {key!r} is given twice")
        given[key] = _number(spec, key, text)
    if name == "drift":
        sigma = given.get("sigma", Law.sigma)
        given.setdefault("drift", DRIFT * sigma[0])
    return Law(name, **{**MARKETS[name], **given})


def _near(word: str, known) -> str:
    close = difflib.get_close_matches(word, known, n=2, cutoff=0.5)
    if close:
        return f": did you mean {' or '.join(close)}?"
    return f", choose from {', '.join(known)}"


def _number(spec: str, key: str, text: str):
    try:
        if key == "sigma":
            return tuple(float(part) for part in text.split("/"))
        return int(text) if key in WHOLE else float(text)
    except ValueError:
        kind = "a whole number" if key in WHOLE else "a number"
        raise ValueError(f"{spec!r}: {key} is {text!r}, must be {kind}") from None


def rouwenhorst(n_states: int, phi: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values (N,), transition (N, N), stationary law (N,): unit variance, autocorrelation phi.

    Source: Rouwenhorst (1995), Kopecky and Suen (2010); the stationary law is Binomial(N - 1, 1/2).
    """
    p = (1 + phi) / 2
    rows = np.array([[p, 1 - p], [1 - p, p]])
    for n in range(3, n_states + 1):
        wide = np.zeros((n, n))
        wide[:-1, :-1] += p * rows
        wide[:-1, 1:] += (1 - p) * rows
        wide[1:, :-1] += (1 - p) * rows
        wide[1:, 1:] += p * rows
        wide[1:-1] /= 2  # the inner rows were added twice
        rows = wide
    last = n_states - 1
    values = np.linspace(-1, 1, n_states) * math.sqrt(last)
    weights = np.array([math.comb(last, k) / 2**last for k in range(n_states)])
    return values, rows, weights


def stationary(rows: np.ndarray) -> np.ndarray:
    """Stationary law (N,) of the transition matrix rows (N, N)."""
    n = len(rows)
    equations = np.vstack([rows.T - np.eye(n), np.ones(n)])
    right = np.append(np.zeros(n), 1.0)
    solution = np.linalg.lstsq(equations, right, rcond=None)
    return solution[0]


def expected_return(law: Law) -> np.ndarray:
    """E[simple return of the next bar | regime, s], (R, S) float64.

    The floor on returns is left out: it is 79 sigma away at the defaults.
    """
    values = rouwenhorst(law.n_states, law.phi)[0]
    if law.name.startswith("square"):
        values = (values**2 - 1) / math.sqrt(2)  # mean 0, variance 1 - 1 / (n_states - 1)
    slope = np.multiply(law.sigma, law.sign) * law.ic
    return np.outer(slope, values) + law.drift


def _steps(weights) -> list[float]:
    return np.r_[np.cumsum(weights)[:-1], 1.0].tolist()  # ends at 1, which no uniform reaches


def _walk(rows: np.ndarray, first: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    table = [_steps(row) for row in rows]
    path = np.empty(len(uniform), np.int64)
    row = _steps(first)
    for t, u in enumerate(uniform.tolist()):
        state = bisect_right(row, u)
        path[t] = state
        row = table[state]
    return path


def _bars(log_return, sigma, uniform):
    """Open, high, low, close (T,) from log returns; the extremes are those of a Brownian bridge.

    P(high > h) = exp(-2 h (h - b) / sigma^2), b the bar's log return; uniform (T, 2).
    """
    close = START_PRICE * np.exp(np.cumsum(log_return))
    opens = np.r_[START_PRICE, close[:-1]]
    scale = -2 * sigma[:, None] ** 2
    spread = np.sqrt(log_return[:, None] ** 2 + scale * np.log(1 - uniform))
    up = (log_return + spread[:, 0]) / 2
    down = (log_return - spread[:, 1]) / 2
    top, bottom = np.maximum(opens, close), np.minimum(opens, close)
    high = np.maximum(opens * np.exp(up), top)
    low = np.minimum(opens * np.exp(down), bottom)
    return opens, high, low, close


def generate(law: Law) -> tuple[np.ndarray, np.ndarray, Truth]:
    """Hourly bars: (T,) datetime64[ns] UTC bar opens, ohlcv (T, 5) float64, and their Truth.

    Bar 0 opens and closes at 100 (nothing precedes it). Fewer bars of one law are a prefix of more.
    """
    # A stream each, filled row by row: the number of bars then changes no bar
    chain, bridge, normal, tail = np.random.default_rng(law.seed).spawn(4)
    values, rows, weights = rouwenhorst(law.n_states, law.phi)
    uniform = chain.random((law.bars, 2))
    s = _walk(rows, weights, uniform[:, 0])
    transition = law.regime_transition
    regime = _walk(transition, stationary(transition), uniform[:, 1])
    sigma = np.array(law.sigma)[regime]
    expected = expected_return(law)[regime, s]

    eps, volume_noise = normal.standard_normal((law.bars, 2)).T
    if law.tails is not None:
        draws = tail.chisquare(law.tails, law.bars)
        eps = eps * np.sqrt((law.tails - 2) / draws)
    shock = sigma * math.sqrt(1 - law.ic**2) * eps
    earned = np.maximum(expected + shock, RETURN_FLOOR)
    log_return = np.r_[0.0, np.log1p(earned[:-1])]  # what row t foretells, bar t+1 shows
    far = np.abs(np.cumsum(log_return)) > 200  # float64 reaches 709
    if far.any():
        where = f"at bar {int(np.argmax(far))} of {law.bars}"
        raise ValueError(f"{PREFIX}{law.name}: the price leaves 1e-85 to 1e89 {where}")
    prices = _bars(log_return, sigma, bridge.random((law.bars, 2)))
    volume = np.exp(LOG_VOLUME + 0.5 * values[s] + 0.1 * volume_noise)

    ohlcv = np.stack([*prices, volume], 1)
    timestamps = START_TIME + np.arange(law.bars) * np.timedelta64(1, "h")
    truth = Truth(law, s, values[s], regime, expected)
    return timestamps.astype("datetime64[ns]"), ohlcv, truth


def _tables(law: Law, cost: float, actions, funding=0.0):
    """Transition of (regime, s) (X, X), reward of holding (X, A), size of a move (P, A)."""
    actions = np.asarray(actions, np.float64)
    increasing = actions.ndim == 1 and (np.diff(actions) > 0).all()
    if not increasing or not np.isfinite(actions).all():
        raise ValueError(
            f"actions must be a finite increasing (A,) array, found {actions.tolist()}"
        )
    if not 0 <= cost < math.inf:
        wanted = "0 or more (fraction of equity per unit of change)"
        raise ValueError(f"cost is {cost}, must be {wanted}")
    constant = np.shape(funding) in ((), (2,))
    if not constant or not np.isfinite(funding).all():
        raise ValueError(
            "funding must be a finite number a bar or a pair (long, short): the optimum of funding "
            "that changes over time is not known"
        )
    long, short = (funding, -funding) if np.ndim(funding) == 0 else funding
    signal = rouwenhorst(law.n_states, law.phi)[1]
    rows = np.kron(law.regime_transition, signal)
    paid = np.where(actions > 0, long, -short) * actions
    hold = expected_return(law).reshape(-1, 1) * actions - paid
    return rows, hold, np.abs(actions[:, None] - actions)


def _flat(actions) -> int:
    flat = int(np.argmin(np.abs(actions)))
    if actions[flat] != 0:
        raise ValueError(f"a flat start needs an action 0, the nearest is {actions[flat]}")
    return flat


def optimum(
    law: Law, cost: float, gamma: float = 0.99, actions=ACTIONS, funding=0.0
) -> np.ndarray:
    """Best policy (R, S, P) int64: index of the next position, given regime, signal and position.

    Maximises the discounted sum of a E[r] - cost |a - p| - funding a (gamma 1: its mean); cost is
    a fraction of equity per unit of change (5 bp = 5e-4). Of equally good moves it takes the
    smallest: a tie keeps the position. funding: what a unit long pays a bar and a unit short
    receives, signed; or a pair, what a unit long and what a unit short pays.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma is {gamma}, must be above 0 and at most 1")
    rows, hold, size = _tables(law, cost, actions, funding)
    shape = (len(law.sigma), law.n_states, len(size))
    return _solve(rows, hold, size, cost, gamma).reshape(shape)


def _solve(rows, hold, size, cost: float, gamma: float) -> np.ndarray:
    # Relative value iteration: a constant in the value changes no decision; without it the rest
    # converges at the chains' own speed (phi) instead of gamma's
    scale = np.abs(hold).max() + cost
    value = np.zeros_like(hold)
    for _ in range(200_000):
        arrive = hold + gamma * (rows @ value)  # (X, A)
        new = (arrive[:, :, None] - cost * size).max(1)  # (X, P): size is symmetric
        change = new - value
        value = new - new.mean()
        size_of_value = scale + np.abs(value).max()
        if np.ptp(change) <= 1e-12 * size_of_value:
            break
    else:
        raise RuntimeError(f"no optimum after 200000 sweeps at gamma {gamma}: lower gamma or phi")
    arrive = hold + gamma * (rows @ value)
    # a hair of extra cost, far above rounding, sends ties to the smallest move
    tie = 1e-8 * scale or 1.0
    return (arrive[:, None, :] - (cost + tie) * size).argmax(2)


def optimum_path(
    truth: Truth,
    cost: float,
    start: int,
    stop: int,
    gamma: float = 0.99,
    actions=ACTIONS,
    funding=0.0,
) -> np.ndarray:
    """Positions (stop - start,) float64 that the optimum takes on rows [start, stop), flat before.

    The position of row t earns bar t+1. funding: see `optimum`.
    """
    if not 0 <= start < stop <= len(truth.s):
        raise ValueError(f"rows [{start}, {stop}) are not within the market's {len(truth.s)} bars")
    actions = np.asarray(actions, np.float64)
    position = _flat(actions)
    policy = optimum(truth.law, cost, gamma, actions, funding)
    rows = slice(start, stop)
    table = policy[truth.regime[rows], truth.s[rows]].tolist()  # (stop - start, P)
    path = [position := row[position] for row in table]
    return actions[path]


def mean_reward(
    law: Law, cost: float, policy: np.ndarray, actions=ACTIONS, funding=0.0
) -> tuple[float, float]:
    """Long-run mean of a bar's a E[r] - cost |a - p| - funding a, and of |a - p| (turnover).

    From a flat start. policy: indices (R, S, P), or probabilities (R, S, P, A).
    """
    actions = np.asarray(actions, np.float64)
    rows, hold, size = _tables(law, cost, actions, funding)
    n = len(actions)
    policy = np.asarray(policy)
    wanted = (len(law.sigma), law.n_states, n)
    if policy.shape not in (wanted, wanted + (n,)):
        raise ValueError(
            f"policy is {policy.shape}, must be {wanted}, or {wanted + (n,)} probabilities"
        )
    chances = np.eye(n)[policy] if policy.ndim == 3 else policy
    policy = chances.reshape(-1, n, n)  # (X, P, A)
    before = np.zeros_like(hold)  # law of (regime, s, position before the decision)
    before[:, _flat(actions)] = stationary(rows)
    for _ in range(200_000):
        after = (before[:, None, :] @ policy)[:, 0]  # (X, A)
        # half a step: a policy that alternates has no limit otherwise
        step = (rows.T @ after - before) / 2
        before += step
        if np.abs(step).sum() <= 1e-13:
            break
    else:
        raise RuntimeError("the policy's positions have not settled after 200000 bars")
    after = (before[:, None, :] @ policy)[:, 0]
    turnover = float(np.einsum("xp,xpa,pa->", before, policy, size))
    return float((after * hold).sum()) - cost * turnover, turnover
