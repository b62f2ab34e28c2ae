"""Columns of a market table: technical indicators, a robust scaler, a forward-filtered HMM context.

`fit_features(bars, train_stop)` looks at bar rows [0, train_stop) and at nothing else.
`model.transform(bars)` gives (T, n_tech + 5) float32: technical columns, hmm_p0 .. hmm_p3 and
hmm_entropy. Row t holds what is known at the CLOSE of bar t: nothing at row t changes when later
rows change.

One asset gives the 50 columns of `TECH_50`; A > 1 assets give the 10 of `TECH_10` each, the traded
one first. `fit_columns(bars, names, train_stop)` and its `transform` give columns by NAME instead,
one asset, no context: those of `TABLE` and of `FAMILIES` (rsi_14, ema_20, volume_z_48, ...).

The context is a 4-state Gaussian HMM of one emission, the traded bar's log Garman-Klass volatility
(docs/data.md: what else was tried). It is filtered forward, never smoothed; states stand in the
order of their mean: hmm_p0 is the calmest.
"""

from __future__ import annotations

import difflib
import logging
import math
import time
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
from numba import njit

from common.data import DataError, iso
from common.run import LONG, UsageError, ask_deadline, need
from common.scoring import usual_limit

if TYPE_CHECKING:
    from common.data import Bars

LOOKBACK = 720  # bars of the longest window: 30 days of hours
WARMUP = LOOKBACK - 1  # first row whose longest window is full
JUDGES = "empyrical", "sklearn", "scipy"  # packages of common/scoring.py
MIN_TRAIN = 256  # rows after warm-up, at least: quartiles of 50 columns and a 4-state HMM
CLIP = 5.0  # robust standard deviations
RETURN_CLIP = 0.20  # log return
TINY = 1e-8  # a spread below this is rounding noise
CHUNK = 4_096  # rows of the forecast at once
PIECE = 10  # columns of the screen at once
SECONDS_A_BAR = 6e-5  # CPU seconds a bar on one core (docs/data.md)
ORDERS = tuple(
    round(0.05 * k, 2) for k in range(1, 21)
)  # candidates for the fractional difference
DF_CRITICAL = -2.86  # Dickey-Fuller t with a constant, 5 % (Fuller 1976, MacKinnon 2010)

STATES = 4
STICKY = 0.1  # weight of the identity in the filter's transition matrix
STARTS = 4  # of EM; the best train likelihood is kept
EM_ITER = 150  # at most
EM_TOL = 0.1  # nats gained in an iteration, below which EM ends
STAY = 0.9  # EM's first guess of the transition's diagonal
SLOW = 24  # bars of the mean whose levels EM starts from
HMM_ROWS = 50_000  # EM sees all train rows, or this many
STRETCHES = 10  # in so many pieces, spread evenly
OUTLIER = 8.0  # robust standard deviations: EM sees a bad tick no farther out
HMM_COLUMNS = (*(f"hmm_p{k}" for k in range(STATES)), "hmm_entropy")
FALSE_DISCOVERIES = 0.01  # expected share of them among the columns that pass the screen


# --------------------------------------------------------------------------------------- windows
@njit(cache=True)
def lag_sum(x, w):
    """(T,) y[t] = sum_k w[k] x[t-k], NaN before row len(w) - 1."""
    n, m = len(x), len(w)
    y = np.full(n, np.nan)
    y[m - 1 :] = 0.0
    # lag outside, row inside: vectorises, and row t adds its terms in the same order whatever T is
    for k in range(m):
        for t in range(m - 1, n):
            y[t] += w[k] * x[t - k]
    return y


@njit(cache=True)
def lag_std(x, mean, m):
    """(T,) population std of the last m rows around mean[t], NaN before row m - 1."""
    n = len(x)
    y = np.full(n, np.nan)
    y[m - 1 :] = 0.0
    for k in range(m):
        for t in range(m - 1, n):
            y[t] += (x[t - k] - mean[t]) ** 2
    return np.sqrt(y / m)


def rolling_mean(x, m):
    """(T,) mean of the last m rows, NaN before row m - 1."""
    return lag_sum(x, np.full(m, 1.0 / m))


def zscore(x, m):
    """(T,) (x - mean)/std over the last m rows; 0 where the window is flat."""
    mean = rolling_mean(x, m)
    return (x - mean) / np.maximum(lag_std(x, mean, m), TINY)


# ------------------------------------------------------------------------- fractional difference
def frac_weights(d, width=LOOKBACK):
    """(width,) weights of (1 - L)^d, newest first: w_k = w_(k-1) (k - 1 - d)/k (Hosking 1981)."""
    k = np.arange(1, width)
    return np.concatenate(([1.0], np.cumprod((k - 1 - d) / k)))


def dickey_fuller(x):
    """t statistic of b in x_t - x_(t-1) = a + b x_(t-1) + e, without lags; 0 for a constant."""
    lag, dx = x[:-1] - x[:-1].mean(), np.diff(x)
    sxx = lag @ lag
    if sxx < TINY**2 * len(x):
        return 0.0
    b = lag @ dx / sxx
    e = dx - dx.mean() - b * lag
    variance = max(e @ e, TINY**2) / (len(dx) - 2)
    return float(b / np.sqrt(variance / sxx))


def without_ticks(log_close):
    """The same path with its moves clipped: a bad tick makes any price look stationary."""
    moves = np.diff(log_close)
    if np.abs(moves).max() <= RETURN_CLIP:
        return log_close
    tame = np.cumsum(moves.clip(-RETURN_CLIP, RETURN_CLIP))
    return np.append(0.0, tame) + log_close[0]


def frac_order(log_close):
    """Smallest of ORDERS whose difference passes the Dickey-Fuller test; else the last."""
    x = without_ticks(log_close)
    for d in ORDERS:
        ask_deadline("the fractional difference", len(x))
        difference = lag_sum(x, frac_weights(d))[WARMUP:]
        if dickey_fuller(difference) < DF_CRITICAL:
            return d
    return ORDERS[-1]


# --------------------------------------------------------------------------------------- columns
def indicator(name, *args, **kwargs):
    import talib  # a second

    return getattr(talib, name)(*args, **kwargs)


def bar_variance(opn, high, low, close):
    """Parkinson and Garman-Klass (1980) variance of each bar's log return; 0 without a range."""
    hl, co = np.log(high / low), np.log(close / opn)
    parkinson = hl**2 / (4 * np.log(2))
    garman_klass = 0.5 * hl**2 - (2 * np.log(2) - 1) * co**2
    return parkinson, garman_klass


def log_root(var, floor):
    return np.log(np.maximum(np.sqrt(var), floor))


def log_return(b, m):
    y = np.full(len(b.x), np.nan)
    move = b.x[m:] - b.x[:-m]
    y[m:] = move.clip(-RETURN_CLIP, RETURN_CLIP)
    return y


def macd_hist(b, fast, slow, signal):
    return indicator("MACD", b.c, fast, slow, signal)[2] / b.c


def macd(b):
    fast, slow = indicator("EMA", b.c, 12), indicator("EMA", b.c, 26)
    return (fast - slow) / b.c


def di_spread(b, m):
    plus = indicator("PLUS_DI", b.h, b.l, b.c, m)
    return plus - indicator("MINUS_DI", b.h, b.l, b.c, m)


def ema_ratio(b, m):
    return np.log(b.c / indicator("EMA", b.c, m))


def sma_ratio(b, m):
    return np.log(b.c / rolling_mean(b.c, m))


def vwap_ratio(b, m):
    typical = (b.h + b.l + b.c) / 3
    traded = rolling_mean(b.v * typical, m)
    return np.log(b.c * rolling_mean(b.v, m) / traded)


def true_range(b, m):
    average = indicator("ATR", b.h, b.l, b.c, m)
    return np.maximum(average / b.c, b.range_floor)


def atr_ratio(b, fast, slow):
    return np.log(true_range(b, fast) / true_range(b, slow))


def band_width(b, m):
    mean = rolling_mean(b.c, m)
    width = lag_std(b.c, mean, m) / mean
    return np.log(np.maximum(width, b.range_floor))


def volume_ratio(b, m):
    return np.log(b.v / rolling_mean(b.v, m))


def volume_trend(b, fast, slow):
    return np.log(rolling_mean(b.v, fast) / rolling_mean(b.v, slow))


def imbalance(b, m):
    signed = b.v * np.sign(b.c - b.o)
    return rolling_mean(signed, m) / rolling_mean(b.v, m)


def close_location(b):
    span = np.maximum(b.h - b.l, TINY * b.c)
    return (2 * b.c - b.h - b.l) / span


def parkinson(b, m):
    return log_root(rolling_mean(b.pk, m), b.range_floor)


def garman_klass(b, m):
    return log_root(rolling_mean(b.gk, m), b.range_floor)


# name_N of any N: (what it is, formula of the raw column). Price levels enter as ratios only,
# volatilities as logs, so that a storm stays inside the clip.
FAMILIES = {
    "rsi": ("relative strength index, N bars", lambda b, n: indicator("RSI", b.c, n)),
    "ema": ("log of close over its exponential moving average, N bars", ema_ratio),
    "sma": ("log of close over its moving average, N bars", sma_ratio),
    "vwap": (
        "log of close over the volume-weighted average of (high + low + close)/3, N bars",
        vwap_ratio,
    ),
    "atr": (
        "log of the average true range over close, N bars",
        lambda b, n: np.log(true_range(b, n)),
    ),
    "ret": ("log return over N bars, clipped at .20", log_return),
    "adx": (
        "average directional index, N bars",
        lambda b, n: indicator("ADX", b.h, b.l, b.c, n),
    ),
    "cci": ("commodity channel index, N bars", lambda b, n: indicator("CCI", b.h, b.l, b.c, n)),
    "close_z": ("z-score of log close, N bars", lambda b, n: zscore(b.x, n)),
    "log_volume": ("mean of log volume, N bars", lambda b, n: rolling_mean(b.lv, n)),
    "volume_z": ("z-score of log volume, N bars", lambda b, n: zscore(b.lv, n)),
    "volume_ratio": ("log of volume over its N-bar mean", volume_ratio),
    "imbalance": ("up less down volume over all volume, N bars", imbalance),
    "log_range": ("mean of log_range, N bars", lambda b, n: rolling_mean(b.lr, n)),
    "parkinson": ("log Parkinson volatility, N bars", parkinson),
    "garman_klass": ("log Garman-Klass volatility, N bars", garman_klass),
}
LEAST = {
    "rsi": 2,
    "adx": 2,
    "cci": 2,
    "close_z": 2,
    "volume_z": 2,
    "ema": 2,
    "sma": 2,
}  # else 1 bar
MOST = 5000  # bars

SINGLE = {  # columns that are no family's
    "macd": ("MACD line 12/26 over close", macd),
    "macd_hist": ("MACD histogram 12/26/9 over close", lambda b: macd_hist(b, 12, 26, 9)),
    "macd_hist_slow": ("MACD histogram 48/104/36 over close", lambda b: macd_hist(b, 48, 104, 36)),
    "di_spread_14": (
        "positive less negative directional indicator, 14 bars",
        lambda b: di_spread(b, 14),
    ),
    "log_volume": ("log volume of the bar", lambda b: b.lv),
    "volume_trend": (
        "log of the 24-bar over the 168-bar mean of volume",
        lambda b: volume_trend(b, 24, 168),
    ),
    "log_range": ("log Parkinson range of the bar, log(high/low)/sqrt(4 log 2)", lambda b: b.lr),
    "frac_diff": (
        "fractional difference of log close, 720 weights, order chosen on train rows",
        lambda b: lag_sum(b.x, frac_weights(b.frac_order)),
    ),
    "ema_ratio_12": ("log of close over its EMA, 12 bars", lambda b: ema_ratio(b, 12)),
    "ema_ratio_48": ("log of close over its EMA, 48 bars", lambda b: ema_ratio(b, 48)),
    "ema_ratio_168": ("log of close over its EMA, 168 bars", lambda b: ema_ratio(b, 168)),
    "atr_ratio": (
        "log of the 14-bar over the 100-bar average true range",
        lambda b: atr_ratio(b, 14, 100),
    ),
    "bollinger_20": (
        "Bollinger position (close - mean)/(2 std), 20 bars",
        lambda b: zscore(b.c, 20) / 2,
    ),
    "bollinger_width_20": ("log of std over mean of close, 20 bars", lambda b: band_width(b, 20)),
    "stoch_k_14": (
        "stochastic %K, 14 bars",
        lambda b: indicator("STOCHF", b.h, b.l, b.c, fastk_period=14)[0],
    ),
    "williams_r_72": ("Williams %R, 72 bars", lambda b: indicator("WILLR", b.h, b.l, b.c, 72)),
    "aroon_osc_25": ("Aroon oscillator, 25 bars", lambda b: indicator("AROONOSC", b.h, b.l, 25)),
    "close_location": (
        "close within the bar, (2 close - high - low)/(high - low)",
        close_location,
    ),
    "hour_sin": (
        "sine of the bar's opening time within the UTC day",
        lambda b: np.sin(b.day),
    ),
    "hour_cos": (
        "cosine of the bar's opening time within the UTC day",
        lambda b: np.cos(b.day),
    ),
    "weekday_sin": (
        "sine of the bar's UTC weekday (Monday 0) within the week",
        lambda b: np.sin(b.week),
    ),
    "weekday_cos": (
        "cosine of the bar's UTC weekday (Monday 0) within the week",
        lambda b: np.cos(b.week),
    ),
}


def _member(name: str) -> tuple:
    """(what it is, formula(views)) of a column of a family: rsi_14."""
    family, _, number = name.rpartition("_")
    text, formula = FAMILIES[family]
    text = text.replace("N bars", "1 bar") if number == "1" else text.replace("N", number)
    return text, lambda b: formula(b, int(number))


ORDER = """
rsi_6 rsi_14 rsi_48 macd_hist macd_hist_slow adx_14 adx_48 di_spread_14
ret_1 ret_4 ret_12 ret_24 ret_72
log_volume volume_ratio_24 volume_trend volume_z_24 volume_z_168 volume_z_336 volume_z_720
imbalance_6 imbalance_24 imbalance_168
log_range log_range_4 log_range_12
parkinson_24 parkinson_168 parkinson_720 garman_klass_24 garman_klass_168
close_z_24 close_z_168 close_z_720 frac_diff ema_ratio_12 ema_ratio_48 ema_ratio_168 atr_ratio
bollinger_20 bollinger_width_20 stoch_k_14 williams_r_72 cci_20 aroon_osc_25 close_location
hour_sin hour_cos weekday_sin weekday_cos
"""
TABLE = {name: SINGLE.get(name) or _member(name) for name in ORDER.split()}
TECH_50 = {name: text for name, (text, _) in TABLE.items()}
TECH_10 = tuple(
    "rsi_14 macd_hist adx_14 ret_1 volume_ratio_24 volume_z_336 parkinson_24 garman_klass_24 "
    "close_z_720 frac_diff".split()
)


def asset_views(ohlcv, timestamp, fit):
    """What the formulas read, from one asset's (T, 5) bars and the dict of `fit_asset`."""
    # TA-Lib treats anything below 1e-14 as zero: a coin priced at 1e-8 needs a unit of its own
    prices = [np.ascontiguousarray(ohlcv[:, j]) / fit["price_unit"] for j in range(4)]
    opn, high, low, close = prices
    volume = np.maximum(ohlcv[:, 4], fit["volume_floor"])
    pk, gk = bar_variance(opn, high, low, close)
    second = timestamp.astype("datetime64[ns]").astype(np.int64) // 1_000_000_000
    weekday = (second // 86400 + 3) % 7  # 1970-01-01 was a Thursday
    return SimpleNamespace(
        o=opn,
        h=high,
        l=low,
        c=close,
        v=volume,
        x=np.log(close),
        lv=np.log(volume),
        pk=pk,
        gk=gk,
        lr=log_root(pk, fit["range_floor"]),
        lg=log_root(gk, fit["range_floor"]),
        range_floor=fit["range_floor"],
        frac_order=fit["frac_order"],
        day=2 * np.pi * (second % 86400) / 86400,
        week=2 * np.pi * weekday / 7,
    )


def positive_floor(x, none):
    """A tenth of the positive values' 1 % quantile: a zero is very quiet, not -inf. Or `none`."""
    x = x[x > 0]
    return float(np.quantile(x, 0.01) / 10) if len(x) else none


def fit_asset(ohlcv):
    """Units, floors and fractional order of one asset, from its train rows (T, 5)."""
    pk, _ = bar_variance(*ohlcv[:, :4].T)
    enough = len(ohlcv) > LOOKBACK + 8
    return {
        "price_unit": float(np.median(ohlcv[:, 3])),
        "volume_floor": positive_floor(ohlcv[:, 4], 1.0),
        "range_floor": positive_floor(np.sqrt(pk), 1e-4),
        "frac_order": frac_order(np.log(ohlcv[:, 3])) if enough else ORDERS[-1],
    }


def stack(names, b):
    """(T, n) float64 raw columns by name of one asset's views, NaN where a window is not full."""
    columns, lacking = [], []
    for name in names:
        ask_deadline("the columns", len(b.x))
        formula = find_column(name)
        try:
            columns.append(formula(b))
        except ImportError as error:
            lacking.append(name)
            failure = error
    if lacking:
        why = f"features {', '.join(lacking)} need TA-Lib"
        need("talib", why=why)
        raise UsageError(f"{why}, which does not load: {failure}")
    return np.column_stack(columns)


def raw_columns(ohlcv, timestamp, fits):
    """(T, n_tech) float64, NaN where a window is not full, and the traded asset's views."""
    views = [asset_views(ohlcv[a], timestamp, fit) for a, fit in enumerate(fits)]
    names = TABLE if len(fits) == 1 else TECH_10
    tables = [stack(names, b) for b in views]
    table = tables[0] if len(tables) == 1 else np.concatenate(tables, 1)
    return table, views[0]


def robust_scale(raw) -> tuple[list[float], list[float]]:
    """Median and IQR/1.349 of each column of (T, n): one bad tick moves neither."""
    low, center, high = np.quantile(raw, (0.25, 0.5, 0.75), axis=0)
    iqr, std = (high - low) / 1.349, raw.std(0)
    # a column that mostly sits on one value has no quartile range, a constant one no spread at all
    scale = np.where(iqr > TINY, iqr, np.where(std > TINY, std, 1.0))
    return center.tolist(), scale.tolist()


def scaled(raw, model):
    """(T, n) standardised by train rows, clipped to +-CLIP."""
    return ((raw - model.center) / model.scale).clip(-CLIP, CLIP)


def finish(out, model, spec):
    """float32, 0 before warm-up. DataError naming the first value that is not finite."""
    out[: model.warmup] = 0.0
    if not np.isfinite(out).all():
        row, col = np.argwhere(~np.isfinite(out))[0]
        raise DataError(f"{spec}: feature {model.columns[col]} is not finite at row {row}")
    return out.astype(np.float32)


# --------------------------------------------------------------------------------------- context
@njit(cache=True)
def forward_filter(x, mean, var, trans, start):
    """(T, K) P(state_t | x_0 .. x_t) of a Gaussian HMM: mean, var, start (K,), trans (K, K)."""
    n, states = len(x), len(mean)
    p = np.empty((n, states))
    prior = start.copy()
    for t in range(n):
        top = -np.inf
        for k in range(states):
            distance = (x[t] - mean[k]) ** 2 / var[k]
            distance += np.log(var[k])
            p[t, k] = np.log(prior[k]) - 0.5 * distance
            top = max(top, p[t, k])
        total = 0.0
        for k in range(states):
            # the largest is 1: an outlier cannot underflow every state
            p[t, k] = np.exp(p[t, k] - top)
            total += p[t, k]
        for k in range(states):
            p[t, k] /= total
        for k in range(states):
            prior[k] = 0.0
            for j in range(states):
                prior[k] += p[t, j] * trans[j, k]
    return p


def hmm_rows(x):
    """What EM sees of x (T,), and the lengths of its stretches (None: all of it in one).

    A bad tick is pulled in to OUTLIER: a state of its own would be wasted on it.
    """
    low, middle, high = np.quantile(x, (0.25, 0.5, 0.75))
    reach = OUTLIER * (high - low) / 1.349
    if reach > TINY:
        x = x.clip(middle - reach, middle + reach)
    if len(x) <= HMM_ROWS:
        return x, None
    length = HMM_ROWS // STRETCHES
    starts = np.linspace(0, len(x) - length, STRETCHES).astype(int)
    print(f"HMM: fitted on {HMM_ROWS} of {len(x)} train rows, {STRETCHES} stretches of {length}")
    stretches = [x[a : a + length] for a in starts]
    return np.concatenate(stretches), [length] * STRETCHES


def start_means(x, start, rng):
    """(4,) where EM begins: even levels of the slow mean, later starts jittered by half a step."""
    slow = rolling_mean(x, SLOW)[SLOW - 1 :]
    low, high = np.quantile(slow, (0.02, 0.98))
    step = (high - low) / (STATES - 1)
    jitter = (start > 0) * step * rng.uniform(-0.5, 0.5, STATES)
    return np.linspace(low, high, STATES) + jitter


def first_guess(x, means):
    """hmmlearn's model where EM begins."""
    from hmmlearn.hmm import GaussianHMM

    model = GaussianHMM(STATES, "diag", n_iter=EM_ITER, tol=EM_TOL, init_params="")
    move = (1 - STAY) / (STATES - 1)
    model.startprob_ = np.full(STATES, 1 / STATES)
    model.transmat_ = move + (STAY - move) * np.eye(STATES)
    model.means_ = means[:, None]
    model.covars_ = np.full((STATES, 1), x.var() / STATES + 1e-4)
    return model


def run_em(model, x, lengths, deadline):
    """EM to its end, or to the first iteration after `deadline`."""
    monitor = model.monitor_
    report = monitor.report

    def report_in_time(log_prob):
        report(log_prob)
        if time.monotonic() > deadline:
            monitor.tol = math.inf  # this iteration's gain is then too small to go on

    monitor.report = report_in_time
    try:
        model.implementation = "scaling"  # three times as fast as "log"
        model.fit(x[:, None], lengths)
    except ValueError:  # underflow at an outlier; "log" goes on from the same parameters
        model.implementation = "log"
        model.fit(x[:, None], lengths)


def fit_hmm(x, seed, seconds=math.inf):
    """4-state Gaussian HMM of x (T,): mean, var, start (4,), sticky trans (4, 4), calmest first.

    EM begins at levels of the slow mean: from plain quantiles it gave three states to the calm
    regime in 5 of 12 synthetic markets (accuracy .93 to .98 instead of .99). After `seconds` it
    stops with what it has, and says so.
    """
    x, lengths = hmm_rows(x)
    rng, deadline = np.random.default_rng(seed), time.monotonic() + seconds
    log = logging.getLogger("hmmlearn")
    level, best, best_ll = log.level, None, -np.inf
    log.setLevel(logging.ERROR)  # it warns where its prior on the variance costs likelihood
    try:
        for start in range(STARTS):
            if best and time.monotonic() > deadline:
                print(f"HMM: out of time after {start} of {STARTS} starts of EM")
                break
            model = first_guess(x, start_means(x, start, rng))
            run_em(model, x, lengths, deadline)
            if model.monitor_.history[-1] > best_ll:
                best, best_ll = model, model.monitor_.history[-1]
    finally:
        log.setLevel(level)
    if best is None:
        raise DataError(
            f"the HMM found no finite likelihood on {len(x)} train rows of log volatility"
        )
    order = np.argsort(best.means_[:, 0], kind="stable")
    moves = best.transmat_[np.ix_(order, order)]
    trans = (1 - STICKY) * moves + STICKY * np.eye(STATES)
    trans /= trans.sum(1, keepdims=True)
    return {
        "mean": best.means_[order, 0].tolist(),
        "var": best.covars_[order, 0, 0].tolist(),
        "trans": trans.tolist(),
        "start": np.linalg.matrix_power(trans, 1 << 14).mean(0).tolist(),  # stationary
    }


def context(x, hmm):
    """(T, 5) filtered state probabilities of x (T,), and their entropy over log 4, in [0, 1]."""
    parameters = (np.array(hmm[key]) for key in ("mean", "var", "trans", "start"))
    p = forward_filter(x, *parameters)
    surprise = -np.log(np.maximum(p, 1e-300))
    entropy = (p * surprise).sum(1, keepdims=True) / np.log(STATES)
    return np.concatenate([p, entropy], 1)


# ----------------------------------------------------------------------------------------- screen
def newey_west_t(x, y) -> np.ndarray:
    """(K,) t-values of the covariance of each column of x (T, K) with y (T,).

    They survive returns whose size comes in clusters: Newey and West 1987, with their lag
    4 (T/100)^(2/9).
    """
    rows = len(y)
    u = (x - x.mean(0)) * (y - y.mean())[:, None]
    mean = u.mean(0)
    u = u - mean
    variance = (u**2).mean(0)
    lags = int(4 * (rows / 100) ** (2 / 9))
    for lag in range(1, lags + 1):
        ask_deadline("the screen of columns", rows)
        weight = 1 - lag / (lags + 1)
        variance += 2 * weight * np.einsum("tk,tk->k", u[lag:], u[:-lag]) / rows
    return mean / np.sqrt(np.maximum(variance, 1e-300) / rows)


def least_t(t, share) -> float:
    """The |t| from which on at most `share` of what passes is expected to be chance.

    Benjamini and Yekutieli 2001: it holds however the columns depend on each other. Where none
    passes, what the strongest would need.
    """
    from scipy.stats import norm

    size = np.sort(np.abs(t).ravel())[::-1]
    rank = np.arange(1, size.size + 1)
    bound = share * rank / (size.size * (1 / rank).sum())
    passing = np.flatnonzero(2 * norm.sf(size) <= bound)
    return float(size[passing[-1]] if passing.size else norm.isf(bound[0] / 2))


def centred_square(x) -> np.ndarray:
    """(T, K): with its mean a square times a context would mostly be the context."""
    square = x**2
    return square - square.mean(0)


def screen_columns(tech, hmm, ret) -> list[float]:
    """Evidence that technical columns (T, K) say something about the next return (T,): (K,).

    |t| over what is needed, the largest of a column's: of it and of its square, alone and times
    each context column (T, 5). Columns and squares are judged apart: a rule for both would ask more
    of the columns.
    """
    pieces = [tech[:, k : k + PIECE] for k in range(0, tech.shape[1], PIECE)]
    evidence = []
    for shape in (np.asarray, centred_square):
        t = []
        for context in (1.0, *hmm.T[:, :, None]):
            t.append([newey_west_t(shape(piece) * context, ret) for piece in pieces])
        t = np.abs([np.concatenate(row) for row in t])
        evidence.append(t.max(0) / least_t(t, FALSE_DISCOVERIES))
    return np.max(evidence, 0).tolist()


def with_products(table, n_tech: int) -> np.ndarray:
    """(T, 6 n_tech + 5) float64: a table (T, n_tech + 5), and its technical columns times context."""
    table = np.asarray(table, np.float64)
    tech = table[:, :n_tech]
    products = [tech * table[:, k : k + 1] for k in range(n_tech, table.shape[1])]
    return np.concatenate([table, *products], 1)


class Products:
    """The rows of with_products(table, n_tech) that are asked for: of a million bars all would be
    2.4 GB."""

    def __init__(self, table, n_tech: int):
        self.table, self.n_tech = table, n_tech

    def __getitem__(self, rows: slice) -> np.ndarray:
        return with_products(self.table[rows], self.n_tech)


# ----------------------------------------------------------------------------------------- models
class Fitted:
    """A dataclass of fitted parameters that a checkpoint holds."""

    def state_dict(self) -> dict:
        """Lists, strings and numbers only: a checkpoint with it loads with weights_only=True."""
        state = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in state.items()}

    @classmethod
    def from_state_dict(cls, state: dict):
        names = ("names", "columns", "train_dates")
        fields = {k: tuple(v) if k in names else v for k, v in state.items()}
        return cls(**fields)


@dataclass
class FeatureModel(Fitted):
    """Fitted parameters, nothing else.

    names    A assets, the traded one first
    columns  all n_tech + 5 names; with A > 1 technical ones read "BTCUSDT_1h/rsi_14"
    n_tech   50 for one asset, 10 A for A > 1
    warmup   first row where every column is finite; earlier rows are 0 in `transform`
    assets   per asset: price_unit, volume_floor, range_floor (log return), frac_order
    center, scale  (n_tech,) train median and IQR/1.349 of the raw columns
    hmm      mean, var, start (4,), trans (4, 4) of the log Garman-Klass volatility of a bar
    train_dates    open time of the first and of the last bar that was fitted on, ISO with Z
    evidence (n_tech,) of each technical column about the next train return, see screen_columns
    least_evidence   columns below it are 0 in `transform`; 0: no screen
    linear   a lasso on with_products(), see scoring.fit_linear; empty: none
    """

    names: tuple[str, ...]
    columns: tuple[str, ...]
    n_tech: int
    warmup: int
    assets: list[dict]
    center: list[float]
    scale: list[float]
    hmm: dict
    train_dates: tuple[str, ...] = ()
    evidence: list[float] = field(default_factory=list)
    least_evidence: float = 0.0
    linear: dict = field(default_factory=dict)

    def forecast(self, table) -> np.ndarray:
        """(T,) float32 linear forecast of the next return from rows (T, n_tech + 5), size about 1."""
        forecast = np.zeros(len(table), np.float32)
        if not self.linear:
            return forecast
        center, weights = np.array(self.linear["center"]), np.array(self.linear["weights"])
        for start in range(0, len(table), CHUNK):  # a row has 6 n_tech + 5 columns
            rows = slice(start, start + CHUNK)
            x = with_products(table[rows], self.n_tech) - center
            part = x @ weights / self.linear["spread"]
            forecast[rows] = part.clip(-CLIP, CLIP)
        return forecast

    @property
    def passed(self) -> np.ndarray:
        """(n_tech,) bool: technical columns that the screen lets through."""
        if not self.evidence:
            return np.ones(self.n_tech, bool)
        return np.array(self.evidence) >= self.least_evidence

    @property
    def screen(self) -> dict:
        """Evidence of every technical column, and how much was needed."""
        evidence = dict(zip(self.columns, self.evidence))
        return {"evidence": evidence, "least": self.least_evidence}

    def describe_screen(self) -> str:
        """Which technical columns say something about the next return, and how strongly."""
        if not self.evidence:
            return "no screen: the agent reads every technical column"
        order = [k for k in np.argsort(self.evidence)[::-1] if self.passed[k]]
        names = [f"{self.columns[k]} {self.evidence[k]:.1f}" for k in order[:5]]
        what = f"{len(order)} of {self.n_tech} technical columns show evidence on train rows"
        strongest = "so not trading may well be the right answer"
        if names:
            strongest = f"the strongest, with |t| over what is needed: {', '.join(names)}"
            if self.linear and not any(self.linear["weights"]):
                strongest = f"{strongest}\nno linear forecast: the lasso keeps none of them"
        return f"screen: {what}\n{strongest}"

    def transform(self, bars: Bars) -> np.ndarray:
        """(T, n_tech + 5) float32: technical columns scaled and clipped to +-5, then the context.

        A column that did not pass the screen is 0.

        DataError: another number or order of assets than the fitted one; a column not finite.
        """
        there, here = self.names, tuple(bars.names)
        if len(here) != len(there):
            raise DataError(f"{bars.spec}: {len(here)} assets, features fitted on {len(there)}")
        if here != there and set(here) == set(there):
            raise DataError(f"{bars.spec}: features fitted on the order {', '.join(there)}")
        raw, traded = raw_columns(bars.ohlcv, bars.timestamp, self.assets)
        tech = scaled(raw, self) * self.passed
        out = np.concatenate([tech, context(traded.lg, self.hmm)], 1)
        return finish(out, self, bars.spec)


@dataclass
class ColumnModel(Fitted):
    """Fitted parameters of named columns of one asset: see FeatureModel."""

    columns: tuple[str, ...]
    warmup: int
    asset: dict
    center: list[float]
    scale: list[float]
    train_dates: tuple[str, ...] = ()

    def transform(self, bars: Bars) -> np.ndarray:
        """(T, n) float32 of the first asset, scaled, clipped to +-5. DataError: not finite."""
        b = asset_views(bars.ohlcv[0], bars.timestamp, self.asset)
        raw = stack(self.columns, b)
        return finish(scaled(raw, self), self, bars.spec)


def too_few(bars, train_stop, warmup, what):
    """DataError with the rows needed and, if the file has them, the split that would do."""
    need, rows = warmup + MIN_TRAIN, len(bars.timestamp)
    share = math.ceil(100 * need / rows) / 100
    way_out = "give more bars"
    if share < 0.9:
        way_out = f"a --split whose first share is {share:.2f} or more would do"
    return DataError(
        f"{bars.spec}: {train_stop} train rows, {what} at least {need} ({warmup} of warm-up and "
        f"{MIN_TRAIN} to fit on); {way_out}"
    )


def fit_features(
    bars: Bars, train_stop: int, seed: int = 0, seconds: float = math.inf, screen: bool = False
) -> FeatureModel:
    """Fit on bar rows [0, train_stop) only; seed moves the HMM's later starts.

    seconds: for the HMM, which stops there with what it has. screen: technical columns without
    evidence on train rows are 0. DataError, one line with both numbers:
    train_stop beyond the table, or fewer rows than the windows need.
    """
    need("hmmlearn", *JUDGES, why="a market's HMM columns and scores need packages")
    rows = len(bars.timestamp)
    if train_stop > rows:
        raise DataError(f"{bars.spec}: train rows end at {train_stop} of {rows} rows")
    if train_stop < WARMUP + MIN_TRAIN:
        raise too_few(bars, train_stop, WARMUP, "the features need")
    if rows >= LONG:
        cost = f"about {SECONDS_A_BAR * rows:.0f} s of one core"
        print(f"{bars.spec}: {rows} bars: columns, screen and linear forecast take {cost}")
    ohlcv, timestamp = bars.ohlcv[:, :train_stop], bars.timestamp[:train_stop]
    fits = [fit_asset(asset) for asset in ohlcv]
    raw, traded = raw_columns(ohlcv, timestamp, fits)
    ask_deadline("the scale of the columns", train_stop)
    center, scale = robust_scale(raw[WARMUP:])
    ask_deadline("the HMM", train_stop)
    names = tuple(TABLE)
    if len(fits) > 1:
        names = tuple(f"{asset}/{column}" for asset in bars.names for column in TECH_10)
    model = FeatureModel(
        names=tuple(bars.names),
        columns=names + HMM_COLUMNS,
        n_tech=len(names),
        warmup=WARMUP,
        assets=fits,
        center=center,
        scale=scale,
        hmm=fit_hmm(traded.lg[WARMUP:], seed, seconds),
        train_dates=(iso(timestamp[0]), iso(timestamp[-1])),
    )
    if screen:
        ask_deadline("the screen of columns", train_stop)
        rows = slice(WARMUP, train_stop - 1)  # the last row's next bar is not a train row
        tech = scaled(raw[rows], model)
        hmm = context(traded.lg, model.hmm)[rows]
        ret = bars.next_return[rows]
        limit = usual_limit(ret)
        model.evidence = screen_columns(tech, hmm, ret.clip(-limit, limit))
        model.least_evidence = 1.0
    return model


# ---------------------------------------------------------------------------------- columns by name
def find_column(name: str):
    """formula(views) of a column of TABLE, of `macd`, or of a family: rsi_14. ValueError."""
    family, _, number = name.rpartition("_")
    if name in SINGLE:
        return SINGLE[name][1]
    if family in FAMILIES and number.isascii() and number.isdigit():
        n, least = int(number), LEAST.get(family, 1)
        if not least <= n <= MOST:
            raise ValueError(f"feature {name}: {n} bars, must be from {least} to {MOST}")
        return _member(name)[1]
    number = number if number.isdigit() else "N"
    known = [*TABLE, *SINGLE, *(f"{k}_{number}" for k in FAMILIES)]
    near = difflib.get_close_matches(name, dict.fromkeys(known), n=3)
    hint = f"families: {', '.join(f'{k}_N' for k in FAMILIES)}"
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    raise ValueError(f"unknown feature {name}: {hint}")


def fit_columns(bars: Bars, names, train_stop: int) -> ColumnModel:
    """Fit named columns on bar rows [0, train_stop) of the first asset.

    ValueError about a name, DataError about the bars: one line.
    """
    need(*JUDGES, why="a market's scores need packages")
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice or not names:
        raise ValueError(f"feature {twice[0]} is named twice" if twice else "no feature is named")
    for name in names:
        find_column(name)
    asset = fit_asset(bars.ohlcv[0, :train_stop])
    timestamp = bars.timestamp[:train_stop]
    b = asset_views(bars.ohlcv[0, :train_stop], timestamp, asset)
    raw = stack(names, b)
    holes = np.flatnonzero(~np.isfinite(raw).all(1))
    warmup = int(holes[-1]) + 1 if len(holes) else 0
    known = np.isfinite(raw).any(0)
    never = [name for name, column in zip(names, known) if not column]
    if never:  # the whole table tells how far it looks back
        full = find_column(never[0])(asset_views(bars.ohlcv[0], bars.timestamp, asset))
        first = int(np.argmax(np.append(np.isfinite(full), True)))
        raise too_few(bars, train_stop, first, f"feature {never[0]} needs")
    if train_stop < warmup + MIN_TRAIN:
        raise too_few(bars, train_stop, warmup, "these features need")
    center, scale = robust_scale(raw[warmup:])
    dates = iso(timestamp[0]), iso(timestamp[-1])
    return ColumnModel(tuple(names), warmup, asset, center, scale, dates)
