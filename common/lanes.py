"""What batched environments share. Lanes speak torch: a kernel's array and the tensor of the loop
are one memory.

A subclass has kernels, a step_lanes() that runs them, observe(), and names what it saves in SAVED.
Gymnasium's NumPy API (step, reset, final_obs, final_info) is a thin wrapper for other libraries.
"""

import time

import gymnasium as gym
import numba as nb
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from common.gpu_pool import pool


class Lanes(gym.vector.VectorEnv):
    """A native batched environment. Same-step autoreset; final_* hold the last state of an end.

    backend: "cpu" (arrays are NumPy's, tensors share them) or "cuda" (arrays are Numba's on the
    device, tensors view them). take() makes both; `self.arrays[name]` goes to kernels, `self.name`
    is the tensor.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}
    SAVED: tuple[str, ...] = ()  # names of what take() made that a resumed run needs
    builds = 0  # environments built in this process
    per_rank = True  # processes of torchrun have lanes of their own

    def __init__(
        self,
        num_envs: int,
        observation: gym.Space,
        action: gym.Space,
        backend: str = "cpu",
        seed: int = 1,
    ):
        Lanes.builds += 1
        self.num_envs, self.backend = num_envs, backend
        self.seed, self.was_reset = int(seed), False
        self.single_observation_space, self.single_action_space = observation, action
        self.observation_space = gym.vector.utils.batch_space(observation, num_envs)
        self.action_space = gym.vector.utils.batch_space(action, num_envs)
        self.lease, self.arrays = pool.lease(), {}

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda" if self.backend == "cuda" else "cpu")

    def take(self, name: str, shape: tuple, dtype) -> torch.Tensor:
        """Zeros from the pool: arrays[name] for kernels and, the same memory, the tensor `name`."""
        array = self.arrays[name] = self.lease.acquire(shape, dtype, self.backend)
        tensor = torch.as_tensor(array, device=self.torch_device)
        setattr(self, name, tensor)
        return tensor

    # one number a lane, lane axis last: other shapes where a kernel has lanes in blocks
    def rows(self, name: str) -> torch.Tensor:
        """What take() made, (..., N)."""
        return getattr(self, name)

    def spread(self, name: str, values: torch.Tensor):
        """The way back."""
        getattr(self, name).copy_(values)

    # a subclass writes these
    def step_lanes(self, action: torch.Tensor):
        """Step all lanes: action (N, ...) on the device -> reward, terminated, truncated (N,).

        Tensors that the next call overwrites.
        """
        raise NotImplementedError

    def reset_lanes(self, first: bool, options: dict):
        """All lanes to their first or next episode; builds nothing."""
        raise NotImplementedError

    def observe(self):
        """The observation of every lane: a tensor (N, ...), or a dict of them."""
        raise NotImplementedError

    def observe_final(self, lanes: torch.Tensor):
        """The last observation of the episodes that ended in `lanes` (n,) int64, as observe()."""
        raise NotImplementedError

    def episode(self) -> dict[str, torch.Tensor]:
        """Statistics (N,) of every lane's last ended episode; "r" its return, "l" its length."""
        raise NotImplementedError

    def check_action(self, actions) -> torch.Tensor:
        """A user's NumPy actions as the tensor of step_lanes(). ValueError naming the lane."""
        shape, kind = self.action_space.shape, self.action_space.dtype
        actions = np.asarray(actions)
        if actions.shape != shape:
            raise ValueError(f"actions: need shape {shape}, got {actions.shape}")
        whole = np.issubdtype(actions.dtype, np.integer)
        if np.issubdtype(kind, np.integer) and not whole:
            raise ValueError(f"actions: need integers, got {actions.dtype}")
        by_lane = actions.reshape(self.num_envs, -1)
        bad = ~np.isfinite(by_lane).all(1)
        if bad.any():
            raise ValueError(f"action of lane {int(bad.argmax())} is not finite")
        space = self.action_space
        if hasattr(space, "nvec"):  # discrete
            bad = (actions < space.start) | (actions >= space.start + space.nvec)
            bad = bad.reshape(self.num_envs, -1).any(1)
            if bad.any():
                raise ValueError(f"action of lane {int(bad.argmax())} is outside its space")
        return torch.as_tensor(actions, device=self.torch_device)

    # Gymnasium
    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """All lanes to their first (seed given) or next episode; builds nothing."""
        if seed is not None:
            self.seed = int(seed)
        self.reset_lanes(seed is not None or not self.was_reset, options or {})
        self.was_reset = True
        return to_numpy(self.observe()), {}

    def step(self, actions):
        if not self.was_reset:
            raise gym.error.ResetNeeded("call reset() before the first step")
        step = self.step_lanes(self.check_action(actions))
        reward, terminated, truncated = (to_numpy(x) for x in step)
        done, info = terminated | truncated, {}
        if done.any():
            lanes = np.flatnonzero(done)
            ended = torch.as_tensor(lanes, device=self.torch_device)
            last = to_numpy(self.observe_final(ended))
            final = np.full(self.num_envs, None, object)
            for k, lane in enumerate(lanes):
                final[lane] = row(last, k)
            episode = {}
            for key, x in self.episode().items():
                episode[key] = np.where(done, to_numpy(x), 0)
            info = {
                "final_obs": final,
                "_final_obs": done,
                "final_info": {"episode": episode, "_episode": done},
                "_final_info": done,
            }
        return to_numpy(self.observe()), reward, terminated, truncated, info

    def state_dict(self) -> dict:
        """Tensors and plain values with which load_state_dict() goes on exactly, on any device."""
        state = {"seed": self.seed}
        for name in self.SAVED:
            state[name] = self.rows(name).cpu().clone()
        return state

    def load_state_dict(self, state: dict):
        for name in self.SAVED:
            self.spread(name, state[name])
        self.seed, self.was_reset = state["seed"], True

    def close_extras(self, **kwargs):
        self.lease.close()


class SimulatedLanes(Lanes):
    """Lanes of a simulation, whose calls are timed and whose episodes have statistics.

    A subclass has stats("totals"), of the running episodes, and stats("finals"), of every lane's
    last one, {name: (N,)} with episode_return and episode_length (0: none yet) among them.
    """

    WORST: tuple[str, ...] = ()  # the largest of the lanes is shown, of other statistics the mean
    longest_call = 0.0  # s
    timed = False  # wait for the GPU, whose kernels return at once

    def simulate(self, kernel, blocks: int, *arguments):
        """kernel(*arguments); on a CPU a thread without a block of lanes would only be waited for."""
        began, threads = time.perf_counter(), nb.get_num_threads()
        nb.set_num_threads(min(threads, blocks))
        try:
            kernel(*arguments)
        finally:
            nb.set_num_threads(threads)
        if self.timed and self.backend == "cuda":
            torch.cuda.synchronize()
        self.longest_call = max(self.longest_call, time.perf_counter() - began)

    def last_observations(self):
        """Of the lanes whose episode ended in this step, the last one of that episode; (N, ...)."""
        raise NotImplementedError

    def observe_final(self, lanes):
        return self.last_observations()[lanes]

    def stats(self, name: str = "totals") -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def episode(self):
        stats = self.stats("finals")
        return stats | {"r": stats["episode_return"], "l": stats["episode_length"]}

    def latest(self) -> dict[str, torch.Tensor]:
        """Statistics of every lane's last episode; of the running one where none has ended."""
        running, ended = self.stats(), self.stats("finals")
        done = ended["episode_length"] > 0
        return {k: torch.where(done, x, running[k]).double() for k, x in ended.items()}

    def summary(self, stats: dict[str, torch.Tensor], lanes) -> dict[str, float]:
        """One number for `lanes` (an index) of each statistic."""
        result = {}
        for name, x in stats.items():
            x = x[lanes].double()
            result[name] = float(x.max() if name in self.WORST else x.mean())
        return result

    def episode_record(self) -> dict[str, float]:
        """What a log point says of every lane's last episode, by the lanes that have one."""
        stats = self.stats("finals")
        done = stats["episode_length"] > 0
        if not done.any():
            return {}
        numbers = self.summary(stats, done)
        charts = ("return", "length")
        charts = {f"charts/episodic_{k}": numbers.pop(f"episode_{k}") for k in charts}
        return charts | {f"env/{k}": x for k, x in numbers.items()}


class OneLane(gym.Env):
    """One lane as an ordinary environment, without autoreset."""

    metadata = {"render_modes": []}

    def __init__(self, lanes: Lanes, render_mode: None = None):
        self.render_mode, self.lanes = render_mode, lanes
        self.observation_space = lanes.single_observation_space
        self.action_space = lanes.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        obs, _ = self.lanes.reset(seed=seed, options=options)
        return row(obs, 0), {}

    def step(self, action):
        batch = np.asarray(action)[None]
        obs, reward, terminated, truncated, info = self.lanes.step(batch)
        obs = info["final_obs"][0] if "final_obs" in info else row(obs, 0)
        return obs, float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}

    def close(self):
        self.lanes.close()


def row(x, k: int):
    """Row k of an array, or of each array of a dict."""
    if isinstance(x, dict):
        return {key: y[k] for key, y in x.items()}
    return x[k]


def to_numpy(x):
    """A NumPy copy of a tensor, or of a dict of them."""
    if isinstance(x, dict):
        return {key: to_numpy(y) for key, y in x.items()}
    return x.cpu().numpy().copy()


def register(name: str, make_vec):
    """gymnasium.make(name, ...) and make_vec(name, num_envs=N, ...).

    make_vec(num_envs, **kwargs) -> Lanes.
    """
    if name in gym.registry:  # __main__ and an import of it may be two modules
        return

    def make(render_mode=None, **kwargs):
        return OneLane(make_vec(1, **kwargs), render_mode)

    gym.register(name, entry_point=make, vector_entry_point=make_vec)
