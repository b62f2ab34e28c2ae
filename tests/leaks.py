"""Leaks that people reported, planted on purpose (leak_NAME), each with its clean twin (clean_NAME).

Columns: bars -> columns of what is known at the close of each bar. Environments: bars -> gym.Env.
"""

import gymnasium as gym
import numpy as np
import pandas as pd
from hmmlearn.hmm import GaussianHMM
from scipy import signal
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from common.features import forward_filter


def log_returns(bars):
    return np.log(bars.close).diff().rename("ret")


def features(bars):
    ret = log_returns(bars)
    columns = {f"mean_{n}": ret.rolling(n).mean() for n in (2, 5, 10, 20)}
    return pd.DataFrame(columns).assign(volume=np.log1p(bars.volume)).fillna(0.0)


# ------------------------------------------------------------------------- the next bars themselves
def leak_next_bar(bars):
    return bars.close.shift(-1) / bars.close - 1


def clean_next_bar(bars):
    return bars.close / bars.close.shift(1) - 1


def leak_target_in_features(bars):
    moved = bars.close.shift(-5) > bars.close
    return features(bars).assign(up=moved.astype(int))


def clean_target_in_features(bars):
    moved = bars.close > bars.close.shift(5)
    return features(bars).assign(up=moved.astype(int))


def leak_chikou_span(bars):
    return pd.DataFrame({"chikou": bars.close.shift(-26), "kijun": bars.close.rolling(26).mean()})


def clean_chikou_span(bars):
    return pd.DataFrame({"chikou": bars.close.shift(26), "kijun": bars.close.rolling(26).mean()})


def leak_rows_chosen_by_their_future(bars):
    ret = log_returns(bars)
    return features(bars)[ret.shift(-1).abs() < 0.01]


def clean_rows_chosen_by_their_future(bars):
    ret = log_returns(bars)
    return features(bars)[ret.abs() < 0.01]


def leak_time_to_next_bar(bars):
    time = bars.index.to_series()
    return (time.shift(-1) - time).dt.total_seconds()


def clean_time_to_next_bar(bars):
    time = bars.index.to_series()
    return (time - time.shift(1)).dt.total_seconds()


def leak_swing_highs(bars):
    highest = bars.high.rolling(11, center=True).max()
    return (bars.high == highest).astype(float)


def clean_swing_highs(bars):
    highest = bars.high.rolling(11).max()
    return (bars.high.shift(5) == highest).astype(float)


# -------------------------------------------------------------------- filters that look both ways
def leak_centred_mean(bars):
    return bars.close / bars.close.rolling(21, center=True, min_periods=1).mean()


def clean_centred_mean(bars):
    return bars.close / bars.close.rolling(21, min_periods=1).mean()


def leak_gradient(bars):
    return np.gradient(np.log(bars.close.to_numpy()))


def clean_gradient(bars):
    return np.diff(np.log(bars.close.to_numpy()), prepend=np.nan)


def leak_savgol(bars):
    return signal.savgol_filter(np.log(bars.close), 15, 2)


def clean_savgol(bars):
    weights = signal.savgol_coeffs(15, 2, pos=14)
    return signal.lfilter(weights[::-1], 1.0, np.log(bars.close))


def leak_zero_phase(bars):
    b, a = signal.butter(2, 0.1)
    return signal.filtfilt(b, a, np.log(bars.close))


def clean_zero_phase(bars):
    b, a = signal.butter(2, 0.1)
    return signal.lfilter(b, a, np.log(bars.close))


def leak_fft(bars):
    spectrum = np.fft.rfft(np.log(bars.close))
    spectrum[40:] = 0
    return np.fft.irfft(spectrum, len(bars))


def clean_fft(bars, window=64):
    x = np.log(bars.close.to_numpy())
    x = np.concatenate([np.full(window - 1, x[0]), x])
    spectrum = np.fft.rfft(np.lib.stride_tricks.sliding_window_view(x, window))
    return np.abs(spectrum[:, 1:4])


def haar(x):
    """Means of blocks of 8 bars, as a wavelet's approximation has them."""
    block = np.arange(len(x)) // 8
    return x.groupby(block).transform("mean")


def leak_wavelet(bars):
    return haar(log_returns(bars).fillna(0.0))


def clean_wavelet(bars):
    return log_returns(bars).fillna(0.0).rolling(8, min_periods=1).mean()


def leak_detrended(bars):
    return signal.detrend(np.log(bars.close.to_numpy()))


def clean_detrended(bars):
    x = np.log(bars.close)
    return x - x.rolling(200, min_periods=2).mean()


# ----------------------------------------------------------------------------------------- filling
def leak_warm_up_filled_back(bars):
    return bars.close.rolling(20).mean().bfill()


def clean_warm_up_filled_back(bars):
    return bars.close.rolling(20).mean().fillna(0.0)


def leak_interpolated(bars):
    return bars.volume.replace(0.0, np.nan).interpolate()


def clean_interpolated(bars):
    return bars.volume.replace(0.0, np.nan).ffill()


def leak_change_after_bfill(bars):
    return bars.volume.replace(0.0, np.nan).bfill().pct_change()


def clean_change_after_bfill(bars):
    return bars.volume.replace(0.0, np.nan).ffill().pct_change()


def leak_holes_filled_back(bars):
    return bars.asfreq("1h").close.bfill()


def clean_holes_filled_back(bars):
    return bars.asfreq("1h").close.ffill()


def stacked(bars):
    """One asset below the other, as a long table has them."""
    assets = [pd.DataFrame({"asset": k, "x": bars[k]}) for k in ("volume", "close")]
    return pd.concat(assets)


def leak_rolled_over_assets(bars):
    return stacked(bars).x.rolling(10, min_periods=1).mean()


def clean_rolled_over_assets(bars):
    rolled = stacked(bars).groupby("asset", sort=False).x.rolling(10, min_periods=1).mean()
    return rolled.reset_index("asset", drop=True)


# --------------------------------------------------------------------------------- longer timeframes
def leak_four_hours(bars):
    longer = bars.close.resample("4h").last()
    return longer.reindex(bars.index, method="ffill")


def clean_four_hours(bars):
    longer = bars.close.resample("4h").last()
    longer.index += pd.Timedelta("3h")  # the opening time of its last bar
    return longer.reindex(bars.index, method="ffill")


def leak_resample_label(bars):
    longer = bars.close.resample("6h", closed="right", label="left").mean()
    return longer.reindex(bars.index, method="ffill")


def clean_resample_label(bars):
    longer = bars.close.resample("6h", closed="right", label="right").mean()
    return longer.reindex(bars.index, method="ffill")


def leak_merged_day(bars):
    day = bars.resample("1D").agg({"high": "max", "low": "min"}).add_prefix("day_")
    return pd.merge_asof(bars, day, left_index=True, right_index=True)


def clean_merged_day(bars):
    day = bars.resample("1D").agg({"high": "max", "low": "min"}).add_prefix("day_")
    day.index += pd.Timedelta("23h")
    return pd.merge_asof(bars, day, left_index=True, right_index=True)


def leak_day_s_high(bars):
    return bars.high.groupby(bars.index.date).transform("max") / bars.close


def clean_day_s_high(bars):
    return bars.high.groupby(bars.index.date).cummax() / bars.close


# ------------------------------------------------------------------------------- fitted on all rows
def leak_global_scaler(bars):
    x = features(bars)
    return (x - x.mean()) / x.std()


def clean_global_scaler(bars, fit_until):
    x = features(bars)
    train = x[:fit_until]
    return (x - train.mean()) / train.std()


def leak_scaler_one_row_late(bars, fit_until):
    x = features(bars)
    stop = x.index.get_loc(fit_until) + 2
    train = x[:stop]
    return (x - train.mean()) / train.std(), {"mean": train.mean(), "std": train.std()}


def clean_scaler_one_row_late(bars, fit_until):
    x = features(bars)
    stop = x.index.get_loc(fit_until) + 1
    train = x[:stop]
    return (x - train.mean()) / train.std(), {"mean": train.mean(), "std": train.std()}


KEPT = []


def leak_scaler_kept_in_a_global(bars):
    x = features(bars)
    if not KEPT:
        KEPT.extend([x.mean(), x.std()])
    return (x - KEPT[0]) / KEPT[1]


def clean_scaler_kept_in_a_global(bars):
    x = features(bars)
    return (x - x.expanding(2).mean()) / x.expanding(2).std()


def leak_global_rank(bars):
    return bars.volume.rank(pct=True)


def clean_global_rank(bars):
    return bars.volume.rolling(200, min_periods=1).rank(pct=True)


def leak_global_clip(bars):
    ret = log_returns(bars)
    return ret.clip(*ret.quantile([0.05, 0.95]))


def clean_global_clip(bars, fit_until):
    ret = log_returns(bars)
    return ret.clip(*ret[:fit_until].quantile([0.05, 0.95]))


def leak_highest_to_come(bars):
    return bars.close / bars.high[::-1].cummax()[::-1]


def clean_highest_to_come(bars):
    return bars.close / bars.high.cummax()


def leak_pca(bars):
    return PCA(2, svd_solver="full").fit_transform(features(bars))


def clean_pca(bars, fit_until):
    x = features(bars)
    model = PCA(2, svd_solver="full").fit(x[:fit_until].to_numpy())
    return model.transform(x.to_numpy()), model


def best_two(x, y):
    score = x.corrwith(y).abs().sort_values()
    return x[score.index[-2:]]


def leak_feature_selection(bars):
    return best_two(features(bars), log_returns(bars).shift(-1))


def clean_feature_selection(bars, fit_until):
    x, ret = features(bars), log_returns(bars)
    train = x[:fit_until]
    return x[best_two(train, ret[:fit_until].shift(-1)).columns]


def leak_target_mean_by_hour(bars):
    return log_returns(bars).shift(-1).groupby(bars.index.hour).transform("mean")


def clean_target_mean_by_hour(bars):
    past = log_returns(bars)
    by_hour = past.groupby(bars.index.hour)
    return by_hour.transform(lambda x: x.expanding().mean())


def leak_clusters(bars):
    x = features(bars)[["mean_20", "volume"]].to_numpy()
    return KMeans(3, n_init=1, random_state=0).fit(x).transform(x)


def clean_clusters(bars, fit_until):
    x = features(bars)[["mean_20", "volume"]]
    model = KMeans(3, n_init=1, random_state=0).fit(x[:fit_until].to_numpy())
    return model.transform(x.to_numpy())


def log_range(bars):
    return np.log(np.maximum(np.log(bars.high / bars.low), 1e-5)).to_numpy()


CHAIN = {
    "mean": np.array([-5.5, -4.5]),
    "var": np.array([0.5, 0.5]),
    "trans": np.array([[0.9, 0.1], [0.1, 0.9]]),
    "start": np.array([0.5, 0.5]),
}


def leak_hmm_posterior(bars):
    model = GaussianHMM(2, "diag")
    model.startprob_, model.transmat_ = CHAIN["start"], CHAIN["trans"]
    model.means_, model.covars_ = CHAIN["mean"][:, None], CHAIN["var"][:, None]
    return model.predict_proba(log_range(bars)[:, None])


def clean_hmm_posterior(bars):
    return forward_filter(log_range(bars), *CHAIN.values())


def leak_place_in_the_file(bars):
    return features(bars).assign(place=np.linspace(0, 1, len(bars)))


def clean_place_in_the_file(bars):
    hours = (bars.index - bars.index[0]) / pd.Timedelta("1h")
    return features(bars).assign(place=hours)


# ------------------------------------------------------------------------------------------- splits
def leak_smoothed_train_rows(bars, fit_until):
    ret = log_returns(bars)
    x = ret.rolling(4, min_periods=1).mean()
    train = ret[:fit_until].rolling(4, center=True, min_periods=1).mean()
    x[:fit_until] = train
    return x.to_frame("smooth")


def clean_smoothed_train_rows(bars, fit_until):
    return log_returns(bars).rolling(4, min_periods=1).mean().to_frame("smooth")


def labelled(bars):
    return features(bars).assign(label=np.log(bars.close).shift(-24) - np.log(bars.close))


def leak_no_purge(bars):
    x = labelled(bars)
    border = int(0.7 * len(x))
    return {"train": x[:border], "test": x[border:]}


def clean_no_purge(bars):
    x = labelled(bars)
    border = int(0.7 * len(x))
    return {"train": x[: border - 24], "test": x[border:]}


def leak_filled_across_splits(bars):
    x = bars.volume.replace(0.0, np.nan).to_frame()
    border = int(0.7 * len(x))
    x.iloc[border - 1] = np.nan
    x = x.bfill()
    return {"train": x[:border], "test": x[border:]}


def clean_filled_across_splits(bars):
    x = bars.volume.replace(0.0, np.nan).to_frame()
    border = int(0.7 * len(x))
    x.iloc[border - 1] = np.nan
    x = x.ffill()
    return {"train": x[:border], "test": x[border:]}


def leak_backtest(bars):
    """In the market over every bar that rises, as if its close were known at its open."""
    ret = log_returns(bars)
    return pd.DataFrame({"long": ret > 0, "pnl": ret.where(ret > 0, 0.0)})


def clean_backtest(bars):
    ret = log_returns(bars)
    return pd.DataFrame({"long": ret > 0, "pnl": ret.where(ret.shift(1) > 0, 0.0)})


FLAGS = {"no_purge": ["--labels", "label"], "backtest": ["--earned", "pnl"]}


# ------------------------------------------------------------------------------------- environments
class Env(gym.Env):
    """Position in [-1, 1] held over the next bar; what can leak is a method."""

    window, length, start = 8, 250, 20
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, bars):
        self.bars = bars
        self.open, self.close = bars.open.to_numpy(), bars.close.to_numpy()
        self.ret = np.diff(np.log(self.close), prepend=np.log(self.close[0]))
        self.table = self.make_table()
        wide = self.table.shape[1]
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (self.window * wide + 1,))

    def make_table(self):
        return np.column_stack([self.ret, np.log1p(self.bars.volume)])

    def rows(self):
        """The window that is shown at row t."""
        return slice(self.t - self.window + 1, self.t + 1)

    def observe(self):
        seen = self.table[self.rows()].ravel()
        return np.append(seen, self.position).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = self.first = self.begin()
        self.position = 0.0
        return self.observe(), {}

    def begin(self):
        return int(self.np_random.integers(self.start, len(self.ret) - self.length - 30))

    def earn(self, before):
        """Log return of the position that the action at row t leads to."""
        return self.position * self.ret[self.t + 1]

    def target(self, action):
        return float(np.clip(action[0], -1, 1))

    def step(self, action):
        before = self.position
        self.position = self.target(action)
        reward = self.earn(before) - 5e-4 * abs(self.position - before)
        self.t += 1
        return self.observe(), reward, False, self.t - self.first >= self.length, {}


clean_env_next_bar = Env


class leak_env_next_bar(Env):
    def rows(self):
        return slice(self.t - self.window + 2, self.t + 2)


class leak_env_paid_at_the_close_that_was_seen(Env):
    def earn(self, before):
        return self.position * self.ret[self.t]


class clean_env_paid_at_the_close_that_was_seen(Env):
    """The reward comes one step late, for the position that was held before."""

    def earn(self, before):
        return before * self.ret[self.t]


class leak_env_filled_at_the_open_that_was_seen(Env):
    def earn(self, before):
        return self.position * np.log(self.close[self.t + 1] / self.open[self.t])


class clean_env_filled_at_the_open_that_was_seen(Env):
    def earn(self, before):
        return self.position * np.log(self.close[self.t + 2] / self.open[self.t + 1])


class leak_env_window_begins_at_the_row(Env):
    def rows(self):
        return slice(self.t, self.t + self.window)


class clean_env_window_begins_at_the_row(Env):
    """Discrete actions: sell, hold, buy; the window is longer."""

    window = 16
    action_space = gym.spaces.Discrete(3)

    def target(self, action):
        return self.position if action == 1 else float(action - 1)


class leak_env_normalised_on_all_rows(Env):
    def make_table(self):
        table = super().make_table()
        return (table - table.mean(0)) / table.std(0)


class clean_env_normalised_on_all_rows(Env):
    """It may fit on the bars up to `fit_until`."""

    length = 600

    def __init__(self, bars, fit_until):
        self.train = len(bars[:fit_until])
        super().__init__(bars)

    def make_table(self):
        table = super().make_table()
        train = table[: self.train]
        return (table - train.mean(0)) / train.std(0)

    def begin(self):
        return self.train - 20


class leak_env_normalised_on_train_and_test(Env):
    """Fitted on the first 80 % of the rows; the episodes are among them."""

    def make_table(self):
        table = super().make_table()
        train = table[: int(0.8 * len(table))]
        return (table - train.mean(0)) / train.std(0)

    def begin(self):
        return 100


class clean_env_normalised_on_train_and_test(Env):
    def make_table(self):
        table = pd.DataFrame(super().make_table())
        table = (table - table.expanding().mean()) / (table.expanding().std() + 1e-9)
        return table.fillna(0.0).to_numpy()


class leak_env_day_s_high(Env):
    def make_table(self):
        high = np.log(self.bars.high.groupby(self.bars.index.date).transform("max"))
        return np.column_stack([self.ret, high - np.log(self.close)])


class clean_env_day_s_high(Env):
    def make_table(self):
        high = np.log(self.bars.high.groupby(self.bars.index.date).cummax())
        return np.column_stack([self.ret, high - np.log(self.close)])


class leak_env_reward_scale_of_all_rows(Env):
    def earn(self, before):
        return super().earn(before) / self.ret.std()


class clean_env_reward_scale_of_all_rows(Env):
    def earn(self, before):
        return super().earn(before) / self.ret[: self.t + 1].std()


class leak_env_reward_of_the_next_day(Env):
    def earn(self, before):
        return self.position * self.ret[self.t + 1 : self.t + 25].sum()


class clean_env_reward_of_the_next_day(Env):
    """Paid when a day is over, for what was held over it."""

    held = 0.0

    def earn(self, before):
        self.held += super().earn(before)
        if (self.t - self.first) % 24:
            return 0.0
        paid, self.held = self.held, 0.0
        return paid

    def reset(self, **kwargs):
        self.held = 0.0
        return super().reset(**kwargs)


class leak_env_rest_of_the_file(Env):
    def observe(self):
        return np.append(super().observe(), 1 - self.t / len(self.ret)).astype(np.float32)

    def begin(self):
        return 100


class clean_env_rest_of_the_file(Env):
    def observe(self):
        return np.append(super().observe(), (self.t - self.first) / 250).astype(np.float32)

    def begin(self):
        return 100
