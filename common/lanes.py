"""What batched environments share. Lanes speak torch: a kernel's array and the tensor of the loop
are one memory.

A subclass has kernels, a step_lanes() that runs them, observe(), and names what it saves in SAVED.
Gymnasium's NumPy API (step, reset, final_obs, final_info) is a thin wrapper for other libraries.
"""

import gymnasium as gym
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
            state[name] = getattr(self, name).cpu().clone()
        return state

    def load_state_dict(self, state: dict):
        for name in self.SAVED:
            getattr(self, name).copy_(state[name])
        self.seed, self.was_reset = state["seed"], True

    def close_extras(self, **kwargs):
        self.lease.close()


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
