"""Speed of training ppo_arz_signals.py on a SUMO map beside sumo-rl with Stable-Baselines3's PPO.

    python scripts/benchmark_sumo_rl.py --sumocfg MAP.sumocfg  # about eight minutes

Both control the same signals every 5 s and both are counted in decisions of signals a second of
training: start-up, compiling, tuning of baselines and evaluations are left out. sumo-rl's signals
are rows of one PPO as ours are. It runs twice: at its fastest (libsumo, without its info), and as
it comes (TraCI, with its info).
Needs sumo-rl and stable-baselines3, and sumo-rl needs pettingzoo.
"""

import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.run import answer_help, exit_with, parse_args, refuse  # noqa: E402

answer_help(__name__, __file__)

import gymnasium as gym  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from scripts.machine import need_peer  # noqa: E402

need_peer("stable_baselines3", "sumo_rl", "pettingzoo")
from stable_baselines3 import PPO  # noqa: E402
from stable_baselines3.common.callbacks import BaseCallback  # noqa: E402
from stable_baselines3.common.vec_env import VecEnv  # noqa: E402

from cleanrl_crypto import ppo_arz_signals as arz  # noqa: E402
from common.maps import find_files, sumo  # noqa: E402

AMBER, MIN_GREEN, INTERVAL = 3, 5, 5  # s


@dataclass
class Args:
    sumocfg: str = ""
    """SUMO's configuration: network, demand, begin and end"""
    seconds: float = 120.0
    """of each training; ours gets a minute more for compiling and baselines"""
    torch_threads: int = 1
    """of each training; SUMO itself has one"""


class Signals(VecEnv):
    """sumo-rl's environment: a row a signal, observations and actions padded to the largest."""

    def __init__(self, sumocfg: str, info: bool):
        from sumo_rl import SumoEnvironment

        files = find_files(sumocfg)
        self.env = SumoEnvironment(
            str(files.net),
            ",".join(map(str, files.demand)),
            begin_time=int(files.begin),
            num_seconds=int(files.end - files.begin),
            delta_time=INTERVAL,
            yellow_time=AMBER,
            min_green=MIN_GREEN,
            sumo_warnings=False,
            add_system_info=info,
            add_per_agent_info=info,
        )
        self.names = self.env.ts_ids
        self.phases = [int(self.env.action_spaces(name).n) for name in self.names]
        width = max(self.env.observation_spaces(name).shape[0] for name in self.names)
        observation = gym.spaces.Box(0, 1, (width,))
        action = gym.spaces.Discrete(max(self.phases))
        super().__init__(len(self.names), observation, action)
        self.decisions = 0

    def rows(self, by_name: dict) -> np.ndarray:
        """(signals, width)."""
        rows = np.zeros((self.num_envs, *self.observation_space.shape), np.float32)
        for row, name in zip(rows, self.names):
            values = by_name[name]
            row[: len(values)] = values
        return rows

    def reset(self):
        return self.rows(self.env.reset())

    def step_async(self, actions):
        self.actions = actions

    def step_wait(self):
        asked = zip(self.names, self.actions, self.phases)
        phases = {name: int(action) % n for name, action, n in asked}
        obs, rewards, dones, _ = self.env.step(phases)
        self.decisions += self.num_envs
        obs, infos = self.rows(obs), [{} for _ in self.names]
        over = dones["__all__"]
        if over:
            for info, row in zip(infos, obs):
                info |= {"terminal_observation": row, "TimeLimit.truncated": True}
            obs = self.reset()
        reward = np.array([rewards[name] for name in self.names], np.float32)
        return obs, reward, np.full(self.num_envs, over), infos

    def close(self):
        self.env.close()

    # what VecEnv asks for and PPO does not need here
    def get_attr(self, name, indices=None):
        return [None] * self.num_envs

    def set_attr(self, name, value, indices=None):
        pass

    def env_method(self, name, *args, indices=None, **kwargs):
        return [None] * self.num_envs

    def env_is_wrapped(self, wrapper, indices=None):
        return [False] * self.num_envs


class Until(BaseCallback):
    """Ends learn() after so many seconds."""

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds

    def _on_training_start(self):
        self.began = time.monotonic()

    def _on_step(self) -> bool:
        return time.monotonic() - self.began < self.seconds


def peer_rate(sumocfg: str, seconds: float, threads: int, info: bool) -> float:
    """Decisions of signals a second of sumo-rl with PPO."""
    sumo()  # SUMO_HOME
    torch.set_num_threads(threads)
    envs = Signals(sumocfg, info)
    until = Until(seconds)
    agent = PPO("MlpPolicy", envs, n_steps=128, batch_size=256, device="cpu")
    agent.learn(10**9, until)
    rate = envs.decisions / (time.monotonic() - until.began)
    envs.close()
    return rate


def peer_rates(args: Args) -> dict[str, float]:
    """sumo-rl at its fastest and as it comes.

    It reads LIBSUMO_AS_TRACI when it is imported, so each has a process of its own.
    """
    rates = {}
    for name, info in {"libsumo": False, "traci": True}.items():
        os.environ.pop("LIBSUMO_AS_TRACI", None)
        if name == "libsumo":
            os.environ["LIBSUMO_AS_TRACI"] = "1"
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            asked = args.sumocfg, args.seconds, args.torch_threads, info
            rates[name] = process.submit(peer_rate, *asked).result()
    return rates


def own_rates(args: Args) -> tuple[float, float]:
    """Decisions of signals a second of collecting and learning, and of learning alone."""
    with tempfile.TemporaryDirectory() as folder:
        about = "--network", args.sumocfg, "--timeout", args.seconds + 60
        flags = "--torch-threads", args.torch_threads, "--no-report", "--no-cuda"
        summary = arz.main([*map(str, about + flags), "--run-dir", f"{folder}/run"])
    rollout, learn = summary["phases"]["rollout"], summary["phases"]["learn"]
    decisions = len(arz.find_network(args.sumocfg).nodes) * summary["global_step"]
    return decisions / (rollout + learn), decisions / learn


def main(argv=None) -> dict:
    """Our rate, the peer's rates and the ratios."""
    args, _ = parse_args(Args, argv)
    refuse((not args.sumocfg, "--sumocfg MAP.sumocfg is missing"))
    rates = peer_rates(args)
    own, learning = own_rates(args)
    print(
        f"decisions of signals a second, {args.torch_threads} threads: ours {own:,.0f} "
        f"({learning:,.0f} if simulating took no time)"
    )
    for name, rate in rates.items():
        print(f"sumo-rl with PPO through {name}: {rate:,.0f}, ratio {own / rate:.1f}")
    return {"exit_code": 0, "own": own, "peer": rates}


if __name__ == "__main__":
    exit_with(main)
