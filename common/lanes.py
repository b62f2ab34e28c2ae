"""What batched environments share. Lanes speak torch: a kernel's array and the tensor of the loop
are one memory.

A subclass has kernels, a step_lanes() that runs them, observe(), and names what it saves in SAVED.
Gymnasium's NumPy API (step, reset, final_obs, final_info, render) is a thin wrapper for other
libraries; common/sb3.py is Stable-Baselines3's.
"""

import os
import time
from dataclasses import asdict
from pathlib import Path

import gymnasium as gym
import numba as nb
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from common.gpu_pool import pool

FILM = 500  # decisions that a picture looks back on at most
JOINT = 1 << 16  # actions of all parts of a lane as one number, at most
SHARED = {}  # what instances of one environment share, the newest four
forked = False  # this process is a copy of another one


def note_fork():
    global forked
    forked = True


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=note_fork)


def refuse_fork():
    """Numba ends a copied process whose threads it cannot find; here the way out is named."""
    from numba.np.ufunc import parallel

    if forked and getattr(parallel, "_is_initialized", False):
        raise RuntimeError(
            "a copy (fork) of a process whose Numba threads ran cannot step lanes: "
            'vector_kwargs={"context": "spawn"}'
        )


class Lanes(gym.vector.VectorEnv):
    """A native batched environment. Same-step autoreset; final_* hold the last state of an end.

    backend: "cpu" (arrays are NumPy's, tensors share them) or "cuda" (arrays are Numba's on the
    device, tensors view them). take() makes both; `self.arrays[name]` goes to kernels, `self.name`
    is the tensor.
    """

    metadata = {
        "autoreset_mode": AutoresetMode.SAME_STEP,
        "render_modes": ["rgb_array"],
        "render_fps": 10,
    }
    render_mode = None
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
        refuse_fork()
        Lanes.builds += 1
        self.num_envs = num_envs
        self.backend = backend
        self.seed = int(seed)
        self.was_reset = False
        self.single_observation_space = observation
        self.single_action_space = action
        self.observation_space = gym.vector.utils.batch_space(observation, num_envs)
        self.action_space = gym.vector.utils.batch_space(action, num_envs)
        self.lease = pool.lease()
        self.arrays = {}

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

    def gauges(self) -> dict[str, torch.Tensor]:
        """What a picture shows of every lane: curves (N,) over decisions, or roads (N, points)."""
        names = [name for name in ("equity", "position") if hasattr(self, name)]
        if not names:
            raise gym.error.Error("render_mode: these lanes have nothing to draw")
        return {name: getattr(self, name) for name in names}

    def check_action(self, actions) -> torch.Tensor:
        """A user's NumPy actions as the tensor of step_lanes(). ValueError naming the lane."""
        space = self.action_space
        shape, kind = space.shape, space.dtype
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
        if np.issubdtype(kind, np.integer):
            low, high = bounds_of(space)
            bad = ((actions < low) | (actions > high)).reshape(self.num_envs, -1).any(1)
            if bad.any():
                lane = int(bad.argmax())
                raise ValueError(f"action {actions[lane]} of lane {lane} is outside its space")
        return torch.as_tensor(actions, device=self.torch_device)

    # Gymnasium
    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """All lanes to their first (seed given) or next episode; builds nothing."""
        if seed is not None:
            self.seed = int(seed)
        self.reset_lanes(seed is not None or not self.was_reset, options or {})
        self.was_reset, self.film = True, []
        self.roll_film(np.zeros(self.num_envs, bool))
        return to_numpy(self.observe()), {}

    def step(self, actions):
        if not self.was_reset:
            raise gym.error.ResetNeeded("call reset() before the first step")
        step = self.step_lanes(self.check_action(actions))
        reward, terminated, truncated = (to_numpy(x) for x in step)
        done = terminated | truncated
        info = {}
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
        self.roll_film(done)
        return to_numpy(self.observe()), reward, terminated, truncated, info

    # pictures
    def roll_film(self, done):
        """Keep what the pictures show; done (N,): lanes whose next episode began."""
        if self.render_mode is None:
            return
        if not self.film:
            self.began = np.zeros((2, self.num_envs), np.int64)
        if len(self.film) == 2 * FILM:
            self.film = self.film[FILM:]
            self.began = np.maximum(self.began - FILM, 0)
        self.began[0, done] = self.began[1, done]
        self.began[1, done] = len(self.film)
        self.film.append(to_numpy(self.gauges()))

    def picture(self, lane: int, over: bool = False) -> np.ndarray:
        """The running episode of a lane up to now, or the one before: (height, width, 3) uint8."""
        from common.pictures import Picture

        if not self.was_reset:
            raise gym.error.ResetNeeded("call reset() before the first render")
        if not hasattr(self, "painter"):
            self.painter = Picture(getattr(self, "network", None))
        last, begins = self.began[:, lane]
        frames = self.film[last:begins] if over else self.film[begins:]
        frames = frames[-FILM:]
        gauges = {}
        for name in frames[0]:
            gauges[name] = np.stack([frame[name][lane] for frame in frames])
        return self.painter.draw(gauges)

    def render(self):
        """Gymnasium's, with render_mode="rgb_array": a picture a lane."""
        if self.render_mode is None:
            return None
        return tuple(self.picture(lane) for lane in range(self.num_envs))

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
        began = time.perf_counter()
        threads = nb.get_num_threads()
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

    def gauges(self) -> dict[str, torch.Tensor]:
        """Of a network: how full every segment is, and how many wait outside."""
        net = self.network
        room = torch.tensor(net.lengths * net.jam, device=self.torch_device)
        filling = (self.counts() / room[:, None]).T
        return {"filling": filling, "vehicles outside": self.queue.sum((0, 1))}

    def fillings(self) -> dict[str, float]:
        """How full the segments of the traced lane are, for its trace."""
        filling = self.gauges()["filling"][self.traced].tolist()
        return {f"fill_{s}": x for s, x in enumerate(filling)}

    def shapes(self) -> list:
        """Points (x, y) of every segment of a network in m, to the decimetre, for a map."""
        return [[[round(x, 1), round(y, 1)] for x, y in line] for line in self.network.shapes]

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
        record = {}
        for name in ("return", "length"):
            record[f"charts/episodic_{name}"] = numbers.pop(f"episode_{name}")
        return record | {f"env/{name}": x for name, x in numbers.items()}


class OneLane(gym.Env):
    """One lane as an ordinary environment, without autoreset.

    joint: the actions of all parts of a lane (the junctions of a network) as one number.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": Lanes.metadata["render_fps"]}

    def __init__(self, lanes: Lanes, render_mode: str | None = None, joint: bool = False):
        self.render_mode = render_mode
        self.lanes = lanes
        self.over = False
        lanes.render_mode = render_mode
        self.observation_space = lanes.single_observation_space
        self.action_space = lanes.single_action_space
        self.nvec = None
        if joint:
            self.nvec, self.action_space = joint_space(self.action_space)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.over = False
        obs, _ = self.lanes.reset(seed=seed, options=options)
        return row(obs, 0), {}

    def step(self, action):
        if self.over:
            raise gym.error.ResetNeeded("the episode is over: call reset() before the next step")
        batch = np.asarray(action)[None]
        if self.nvec is not None:
            batch = split_joint(batch, self.nvec)
        obs, reward, terminated, truncated, info = self.lanes.step(batch)
        self.over = "final_obs" in info
        obs = info["final_obs"][0] if self.over else row(obs, 0)
        return obs, float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}

    def render(self):
        return self.lanes.picture(0, self.over) if self.render_mode else None

    def close(self):
        self.lanes.close()


def bounds_of(space) -> tuple:
    """The least and the greatest action of a space of whole numbers."""
    if hasattr(space, "nvec"):
        return space.start, space.start + space.nvec - 1
    return space.low, space.high


def joint_space(space) -> tuple:
    """Counts of a MultiDiscrete space's parts, and the Discrete space of all their combinations."""
    if not isinstance(space, gym.spaces.MultiDiscrete):
        raise ValueError(f"joint: the actions are {space}, not several whole numbers")
    count = int(np.prod(space.nvec.astype(float)).clip(max=JOINT + 1))
    if count > JOINT:
        raise ValueError(f"joint: more than {JOINT} combinations of {len(space.nvec)} actions")
    return space.nvec, gym.spaces.Discrete(count)


def split_joint(actions, nvec) -> np.ndarray:
    """Joint actions (N,) -> (N, parts), the last part counting fastest."""
    actions, count = np.asarray(actions), int(np.prod(nvec))
    bad = (actions < 0) | (actions >= count)
    if bad.any():
        raise ValueError(f"joint action {actions[bad][0]}: must be from 0 and below {count}")
    return np.stack(np.unravel_index(actions, nvec), -1)


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


def write_trace(folder: Path, name: str, rows: list[dict]):
    """traces/{name}.parquet of a run directory; nothing where there are no rows."""
    import pandas as pd

    if rows:
        (folder / "traces").mkdir(exist_ok=True)
        pd.DataFrame(rows).to_parquet(folder / "traces" / f"{name}.parquet")


def shared(build, args, *own: str):
    """build(args), once a process for all who ask with the same flags and files.

    args: a dataclass; own: fields that differ between instances and that build() does not read.
    """
    flags = {k: v for k, v in asdict(args).items() if k not in own}
    paths = []
    for value in flags.values():
        for name in value if isinstance(value, tuple) else (value,):
            paths += [Path(part.strip()) for part in str(name).split(",")]
    stamps = []
    for path in paths:
        if len(str(path)) < 256 and path.is_file():
            stat = path.stat()
            stamps.append((stat.st_mtime_ns, stat.st_size))
    key = build.__module__, build.__qualname__, repr(flags), tuple(stamps)
    if key not in SHARED:
        if len(SHARED) == 4:
            del SHARED[next(iter(SHARED))]
        SHARED[key] = build(args)
    return SHARED[key]


def register(name: str, make_vec):
    """gymnasium.make(name, ...) and make_vec(name, num_envs=N, ...).

    make_vec(num_envs, **kwargs) -> Lanes. Both take render_mode="rgb_array"; make() takes joint.
    """
    if name in gym.registry:  # __main__ and an import of it may be two modules
        return

    def make(render_mode=None, joint=False, **kwargs):
        return OneLane(make_vec(1, **kwargs), render_mode, joint)

    def make_lanes(num_envs=1, render_mode=None, **kwargs):
        lanes = make_vec(num_envs, **kwargs)
        lanes.render_mode = render_mode
        return lanes

    gym.register(name, entry_point=make, vector_entry_point=make_lanes)
