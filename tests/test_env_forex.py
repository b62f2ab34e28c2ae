"""The forex environment in one process: independent bookkeeping, Gymnasium's contract, exact state."""

import dataclasses
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

from cleanrl_crypto import dqn_forex_subproc as dqn
from runs import assert_compiles_for_a_gpu, run_code, uniform

OUT = ("obs", "reward", "terminated", "truncated", "row", "position", "final_obs", "stats")
COLUMNS = 5
YEAR = 6000.0


def make_pairs(bars=(300, 260, 340), sigma=4e-3, seed=0, **changes) -> dqn.Pairs:
    """Pairs of unequal length, the second one USDXXX; costs, swaps and forced-flat rows on each.

    changes: columns of `bars` by name (ret, cost, flat, ...), or fields of Pairs.
    """
    rng = np.random.default_rng(seed)
    n, first = sum(bars), np.cumsum([0, *bars])
    ret = rng.normal(0, sigma, n)
    columns = {
        "ret": ret, "cost": rng.uniform(1e-5, 4e-4, n), "swap_long": rng.uniform(-1e-5, 5e-5, n),
        "swap_short": rng.uniform(-1e-5, 5e-5, n), "flat": rng.random(n) < 0.04}
    columns |= {name: changes.pop(name) for name in list(changes) if name in columns}
    table = np.zeros((n, 8))
    for name, values in columns.items():
        table[:, getattr(dqn, name.upper())] = values
    rows = {
        "train": np.array([[f + 5, f + b // 2] for f, b in zip(first, bars)]),
        "test": np.array([[f + b // 2 + 3, f + b - 1] for f, b in zip(first, bars)])}
    rows["eval"] = rows["test"]
    x = np.column_stack([rng.normal(size=(n, COLUMNS - 1)), columns["cost"] * 1e4])
    series = [SimpleNamespace(bars_per_year=YEAR, truth=None) for _ in bars]
    fields = dict(
        names=("EURUSD", "USDJPY", "GBPUSD")[: len(bars)], series=series, models={},
        table=x.astype(np.float32), bars=table, rows=rows, first=first)
    return dqn.Pairs(**fields | changes)


def draws(steps, lanes, seed=0):
    """(steps, lanes) actions, half of them the lane's last one."""
    rng = np.random.default_rng(seed)
    actions = rng.integers(3, size=(steps, lanes))
    for t in range(1, steps):
        actions[t] = np.where(rng.random(lanes) < 0.5, actions[t - 1], actions[t])
    return torch.from_numpy(actions)


def outputs(env):
    return {name: getattr(env, name).cpu().numpy().copy() for name in OUT}


def assert_equal(a, b, names=OUT):
    for name in names:
        x, y = (getattr(env, name).cpu().numpy() for env in (a, b))
        np.testing.assert_array_equal(x, y, err_msg=name)


@dataclasses.dataclass
class Oracle:
    """One lane in plain Python, from the description."""

    p: dqn.Pairs
    lane: int
    seed: int
    leverage: float
    length: int
    split: str
    episode: int = -1

    def __post_init__(self):
        self.start, self.stop = (int(x) for x in self.p.rows[self.split][self.lane % len(self.p.names)])
        self.begin()

    def begin(self):
        self.episode += 1
        share = uniform(self.seed, self.lane, self.episode)
        self.row = self.start + int(share * (self.stop - self.start))
        self.target, self.changes, self.rewards, self.path = 0, [], [], [1.0]

    def obs(self):
        return np.array([*self.p.table[self.row], self.target], np.float32)

    def step(self, action):
        bar, level = self.p.bars[self.row], self.leverage
        target = 0 if bar[dqn.FLAT] else int(action) - 1
        change = abs(target - self.target)
        swap = bar[dqn.SWAP_LONG if target > 0 else dqn.SWAP_SHORT]
        growth = 1 + target * level * bar[dqn.RET] - abs(target) * level * swap
        factor = max(growth, dqn.RUIN) * max(1 - bar[dqn.COST] * level * change, dqn.RUIN)
        self.target = target
        self.rewards.append(math.log(factor))
        self.changes.append(change)
        self.path.append(self.path[-1] * factor)
        self.row += 1
        terminated = bool(factor <= dqn.LOST)
        ended = len(self.rewards) == self.length or self.row == self.stop
        return terminated, not terminated and ended

    def stats(self):
        path, r = np.array(self.path), np.array(self.rewards)
        down = 1 - path / np.maximum.accumulate(path)
        sharpe = r.mean() / r.std() * math.sqrt(YEAR) if np.ptp(r) > 1e-12 else 0.0
        return [r.sum(), len(r), down[-1], np.mean(self.changes), sharpe, down.max()]


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_number_against_an_oracle(split):
    """Of a lane of which nothing ever changes too (its Sharpe ratio is 0), and of lanes that lose everything."""
    n, leverage, length = 7, 3.0, 23
    pairs = make_pairs()
    pairs.bars[::37, dqn.RET] = 0.5
    pairs.bars[300:560] = 0.0
    pairs.bars[300:560, dqn.RET] = 3e-3
    plan = draws(300, n).numpy()
    plan[:, 1] = 2
    env = dqn.ForexVectorEnv(pairs, split, n, leverage=leverage, episode_length=length, seed=5)
    first, info = env.reset(seed=5)
    lanes = [Oracle(pairs, i, 5, leverage, length, split) for i in range(n)]
    assert info == {} and (first == [lane.obs() for lane in lanes]).all()
    ends = {"ruin": 0, "length": 0, "rows": 0}
    for t, actions in enumerate(plan):
        obs, reward, terminated, truncated, info = env.step(actions)
        for i, lane in enumerate(lanes):
            expected = lane.step(actions[i])
            assert (terminated[i], truncated[i]) == expected, f"step {t}, lane {i}"
            assert reward[i] == pytest.approx(lane.rewards[-1], abs=1e-13)
            if any(expected):
                why = "ruin" if expected[0] else "length" if len(lane.rewards) == length else "rows"
                ends[why] += 1
                np.testing.assert_allclose(info["final_obs"][i], lane.obs(), rtol=1e-6, atol=1e-9)
                stats = [info["final_info"]["episode"][k][i] for k in dqn.EPISODE]
                np.testing.assert_allclose(stats, lane.stats(), rtol=1e-7, atol=1e-11)
                lane.begin()
            np.testing.assert_allclose(obs[i], lane.obs(), rtol=1e-6, atol=1e-9)
            assert (env.row[i], env.position[i]) == (lane.row, lane.target)
        done = terminated | truncated
        assert ("final_obs" in info) == done.any()
        assert (info.get("_final_obs", done) == done).all()
    assert ends["length"] > 20 and ends["rows"] > 5 and ends["ruin"] > 5


# ---------------------------------------------------------------------------------------- Gymnasium
def test_a_loops_wrong_action_shows_in_the_reward():
    env = dqn.ForexVectorEnv(make_pairs(), "train", 2)
    env.reset(seed=1)
    reward, *_ = env.step_lanes(torch.tensor([3, 1]))
    assert math.isnan(reward[0]) and math.isfinite(reward[1])


def test_gymnasium_makes_lanes_and_checks_what_it_is_given():
    pairs = make_pairs()
    env = gym.make("cleanrl_crypto/Forex-v0", pairs=pairs, leverage=2.0)
    obs, _ = env.reset(seed=1)
    assert obs.shape == (COLUMNS + 1,) and len(env.step(2)) == 5
    envs = gym.make_vec("cleanrl_crypto/Forex-v0", num_envs=4, pairs=pairs, split_name="test", vec_mode="dummy")
    assert envs.unwrapped.numbers[dqn.YEAR] == YEAR and envs.unwrapped.vec_mode == "dummy"
    for odd in (dict(timeout=3.0), dict(leverag=2.0), dict(leverage=3000.0)):
        with pytest.raises((TypeError, ValueError), match=next(iter(odd))):
            gym.make_vec("cleanrl_crypto/Forex-v0", num_envs=4, pairs=pairs, **odd)


# --------------------------------------------------------------------------------------------- CUDA
CUDA = """
import sys
import numpy as np
from numba import config
from test_env_forex import draws, dqn, make_pairs, outputs
rules = dict(leverage=3.0, episode_length=6, seed=3)
backends = "cpu", "cpu" if config.ENABLE_CUDASIM else "cuda"
cpu, gpu = (dqn.ForexVectorEnv(make_pairs(), "train", 5, backend=b, **rules) for b in backends)
if config.ENABLE_CUDASIM:  # on the arrays of the CPU
    gpu.block = dqn.market_block(dqn.cuda_step()[1, 128], gpu.arrays)
assert (cpu.reset()[0] == gpu.reset()[0]).all()
ends = 0
for t, actions in enumerate(draws(int(sys.argv[1]), 5).numpy()):
    if t == 9:
        gpu.load_state_dict(cpu.state_dict())
    x, y = cpu.step(actions), gpu.step(actions)
    ends += x[2].sum() + x[3].sum()
one, two = outputs(cpu), outputs(gpu)
worst = max(np.abs(one[k].astype(float) - two[k]).max() for k in one)
assert ends > 4 and worst <= float(sys.argv[2]), worst
print("same")
"""


@pytest.mark.parametrize("simulated, steps, error", [
    ("1", "24", "1e-12"), pytest.param("0", "500", "1e-6", marks=pytest.mark.gpu)])
def test_cuda_is_the_cpu(repo, simulated, steps, error):
    assert "same" in run_code(repo, CUDA, steps, error, NUMBA_ENABLE_CUDASIM=simulated)


def test_the_kernel_compiles_for_a_real_gpu(repo, tmp_path):
    assert_compiles_for_a_gpu(repo, tmp_path, """
from test_env_forex import dqn, make_pairs
block = dqn.ForexVectorEnv(make_pairs(), "train", 5).block
emit(dqn.cuda_step(), *block.args, 0, 5, 0)
""", 1)
