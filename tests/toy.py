"""A toy experiment: what run.py and lanes.py are tested with."""

import hashlib
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.run import Run, RunArgs, answer_help, check, exit_with, experiment, refuse

answer_help(__name__, __file__)

import gymnasium as gym  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from common.lanes import Lanes  # noqa: E402

LENGTH = 5  # decisions of an episode
BUG_IN_UPDATE = BUG_IN_EVALUATION = None  # a transition at which main() raises
BUG_AT_THE_END = False
RIVAL = -math.inf  # what the cheap rival earns on the test split


@dataclass
class Args(RunArgs):
    # experiment
    exp_name: str = Path(__file__).stem
    """name of this experiment"""

    # data
    data: str | None = None
    """a file to have read"""

    # algorithm
    total_timesteps: int = 200
    """environment transitions (the sum over lanes)"""
    learning_rate: float = 1e-2
    """Adam (> 0)"""
    kind: str = "a"
    """a or b"""
    sizes: tuple[int, ...] = (1, 2)
    """widths"""

    # trouble
    hang: bool = False
    """never come back from set-up"""

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            {"kind": ("a", "b")},
            {(1, 1e9): "total_timesteps", (1e-9, 1): "learning_rate"},
        )
        refuse((not self.sizes, "--sizes: give at least one"))


@dataclass
class Loop:
    global_step: int = 0
    updates: int = 0
    stale: int = 0


class ToyLanes(Lanes):
    """x moves by the action; the first x of an episode tells seed, lane and episode."""

    SAVED = ("x", "clock", "episodes")

    def __init__(self, num_envs, seed=1):
        box = gym.spaces.Box(-9, 9, (1,), np.float32)
        super().__init__(num_envs, box, box, seed=seed)
        self.take("x", (num_envs, 1), np.float32)
        self.take("clock", (num_envs,), np.int64)
        self.take("episodes", (num_envs,), np.int64)

    def begin(self, lanes):
        number = 1000 * self.seed + 10 * torch.arange(self.num_envs) + self.episodes
        self.x[lanes, 0] = 0.1 * torch.sin(number.double())[lanes].float()
        self.clock[lanes] = 0

    def reset_lanes(self, first, options):
        self.episodes[:] = 0 if first else self.episodes + 1
        self.begin(torch.ones(self.num_envs, dtype=torch.bool))

    def observe(self):
        return self.x

    def step_lanes(self, action):
        self.x += action
        self.clock += 1
        reward, over = -self.x[:, 0].double().abs(), self.clock >= LENGTH
        self.episodes[over] += 1
        self.begin(over)
        return reward, torch.zeros_like(over), over


def read_data(args) -> dict:
    raw = Path(args.data).read_bytes() if args.data else b""
    return {"spec": args.data or "toy", "sha256": hashlib.sha256(raw).hexdigest()}


@experiment
def main(argv=None):
    run = Run(Args, argv, schema=1)
    args = run.args
    run.open("toy", read_data(args))
    envs = run.closing(ToyLanes(4, args.seed))
    envs.reset(seed=args.seed)
    net = torch.nn.Linear(1, 1)
    optimizer = torch.optim.Adam(net.parameters(), args.learning_rate)
    policy = dict(agent=net)
    loop = run.restore(Loop(), {"width": 1}, policy, optimizer=optimizer, envs=envs)
    if args.hang:
        time.sleep(1e6)

    while not args.eval_only and loop.global_step < args.total_timesteps and not run.out_of_time():
        run.phase("rollout")
        noise = torch.as_tensor(run.rng.uniform(-1, 1, (4, 1)).astype(np.float32))
        envs.step_lanes(noise)
        loop.global_step += envs.num_envs

        run.phase("learn")
        loss = ((net(envs.x) + envs.x + 0.1 * torch.randn(4, 1)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loop.updates += 1

        if run.every(40, loop.global_step):
            run.phase("eval")
            record = {"losses/loss": loss.detach(), "losses/none": None, "losses/nan": math.nan}
            run.log(record | run.charts(loop, 4 * loop.updates), loop)
            loop.stale = 0 if run.keep_best(-float(loss.detach()), loop) else loop.stale + 1
            if loop.global_step == BUG_IN_EVALUATION:
                raise ZeroDivisionError
        if loop.global_step == BUG_IN_UPDATE:
            run.phase("learn")
            raise ZeroDivisionError
        run.checkpoint(loop)

    run.use_best(loop)
    run.phase("eval")
    if BUG_AT_THE_END:
        raise ZeroDivisionError
    score = {"mean": float(net.weight.detach()), "trades": 3}
    results = {"eval": {"agent": score, "baselines": {"flat": {"mean": 0.0, "trades": 0}}}}
    results["test"] = {"agent": score, "baselines": {"sparse_linear": {"mean": RIVAL, "trades": 9}}}
    audit = {"verdict": "healthy", "reasons": ["it moves"], "nan": math.nan}
    more = dict(samples_per_transition=1.0, selected_by="mean")
    return run.finish(loop, results, audit, ("mean", "trades"), **more)


if __name__ == "__main__":
    exit_with(main)
