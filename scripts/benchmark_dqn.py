"""Speed of dqn_forex_subproc.py beside Stable-Baselines3: lanes alone, and training; one process.

    python scripts/benchmark_dqn.py --out benchmark_dqn.json  # about three minutes on 2 CPU cores
    python scripts/benchmark_dqn.py --quick                   # tiny sizes: its numbers mean nothing

Lanes: ForexVectorEnv's step_lanes() with every lane's observation written, in this process and
through worker processes; beside it the same environment, one lane each, in SB3's DummyVecEnv and
SubprocVecEnv. Training: the script itself, its rate read from its own summary, beside SB3's DQN on
the same pairs with the same two hidden layers and the same number of samples drawn a transition
(ours in large batches, the peer in its own batches of 32). In turns, medians shown. What ran is
counted and checked: steps, updates, samples, parameters; a wrong count ends the benchmark with exit
code 1. CPU only.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.run import answer_help, exit_with, parse_args  # noqa: E402

answer_help(__name__, __file__)

import numba as nb  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from scripts.machine import check, machine, need_peer, set_threads, title_of  # noqa: E402

need_peer("stable_baselines3")
import stable_baselines3  # noqa: E402
from stable_baselines3 import DQN  # noqa: E402
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv  # noqa: E402

from cleanrl_crypto import dqn_forex_subproc as dqn  # noqa: E402
from common.lanes import OneLane  # noqa: E402
from common.timeout_guard import load_checkpoint, write_json_atomic  # noqa: E402

MODES = ("single", "dummy", "subproc 1", "subproc 2", "SB3 DummyVecEnv", "SB3 SubprocVecEnv")


@dataclass
class Args:
    # benchmark
    lanes: int = 16_384
    """lanes of ours where the lanes alone are measured"""
    seconds: float = 3.0
    """seconds of one measurement of the lanes"""
    peer_lanes: int = 8
    """lanes (SubprocVecEnv: processes) of the peer"""
    repeats: int = 3
    """measurements, in turns"""
    train_steps: int = 786_432
    """transitions of ours, a run"""
    peer_steps: int = 24_000
    """transitions of the peer that are measured, a run (after 2 000 that are not)"""
    threads: int | None = None
    """torch and Numba threads of both sides (default: all cores)"""
    out: Path | None = None
    """write everything to this file as JSON"""
    quick: bool = False
    """tiny sizes: a test that it runs"""

    def __post_init__(self):
        if self.quick:
            self.lanes, self.peer_lanes = 64, 4
            self.seconds, self.repeats = 0.1, 1
            self.train_steps, self.peer_steps = 65_536, 400


def timed(step, seconds: float) -> tuple[int, float]:
    """Calls of step(k) in `seconds`, and the seconds they took."""
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        step(steps % 16)
        steps += 1
    return steps, time.perf_counter() - began


def rate_of_lanes(env, seconds: float) -> dict:
    """Lane-steps/s of ours; every lane's clock is compared with the number of steps."""
    env.reset(seed=1)
    lanes = env.num_envs
    rng = np.random.default_rng(0)
    actions = torch.from_numpy(rng.integers(0, 3, (16, lanes)))
    # compilation and the workers' start are not what is measured
    for k in range(4):
        env.step_lanes(actions[k])
    steps, took = timed(lambda k: env.step_lanes(actions[k]), seconds)
    # a lane that stands still has neither a clock nor an episode behind it
    stepped = (env.clock + env.episodes > 0).all()
    in_time = env.clock.max() <= steps + 4
    check(bool(stepped and in_time), "a lane did not step")
    shown = env.obs[:64, :-1]
    true = env.table[env.row[:64]]
    check(torch.equal(shown, true), "stale observations")
    rate = steps * lanes / took
    return {"lanes": lanes, "steps": steps, "lane_steps_per_second": rate}


def one_lane(pairs, k: int):
    envs = dqn.make_vec(1, pairs=pairs, seed=k)
    return OneLane(envs)


def rate_of_peer(vec_env, seconds: float) -> dict:
    """Lane-steps/s of an SB3 VecEnv."""
    vec_env.reset()
    lanes = vec_env.num_envs
    rng = np.random.default_rng(0)
    actions = rng.integers(0, 3, (16, lanes))
    vec_env.step(actions[0])
    steps, took = timed(lambda k: vec_env.step(actions[k]), seconds)
    rate = steps * lanes / took
    return {"lanes": lanes, "steps": steps, "lane_steps_per_second": rate}


def lanes_of(name: str, args, pairs) -> dict:
    if name.startswith("SB3"):
        makers = [partial(one_lane, pairs, k) for k in range(args.peer_lanes)]
        kind = DummyVecEnv if "Dummy" in name else partial(SubprocVecEnv, start_method="forkserver")
        env, rate = kind(makers), rate_of_peer
    else:
        mode, _, workers = name.partition(" ")
        env = dqn.ForexVectorEnv(
            pairs, "train", args.lanes, vec_mode=mode, num_workers=int(workers or 1))
        rate = rate_of_lanes
    result = rate(env, args.seconds)
    env.close()
    return result


def train_ours(args, threads: int) -> dict:
    """The script's own transitions/s after warm-up, and what it drew."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "vec-mode": "single",
            "total-timesteps": args.train_steps,
            "torch-threads": threads,
            "run-dir": f"{folder}/run",
            "eval-interval": args.train_steps // 3,
        }
        argv = [str(x) for name, value in flags.items() for x in (f"--{name}", value)]
        summary = dqn.main([*argv, "--no-cuda", "--no-report"])
        weights = load_checkpoint(f"{folder}/run/checkpoints/best.pt")["agent"]
    trained = summary["global_step"] >= args.train_steps and summary["updates"] > 0
    check(trained, "ours did not train")
    return {
        "transitions": summary["global_step"],
        "updates": summary["updates"],
        "parameters": sum(x.numel() for x in weights.values()),
        "samples_per_transition": summary["samples_per_transition"],
        "transitions_per_second": summary["sps"],
    }


def train_peer(args, pairs, threads: int) -> dict:
    """SB3's DQN as it is, on one-lane environments of ours: 2 updates of 32 for 8 transitions."""
    torch.set_num_threads(threads)
    lanes, warm = args.peer_lanes, 2_000
    hidden = dqn.Args.hidden
    env = DummyVecEnv([partial(one_lane, pairs, k) for k in range(lanes)])
    peer = DQN(
        "MlpPolicy",
        env,
        batch_size=32,
        train_freq=(1, "step"),
        gradient_steps=lanes // 4,
        gamma=dqn.Args.gamma,
        learning_starts=warm // 2,
        buffer_size=100_000,
        seed=1,
        device="cpu",
        policy_kwargs={"net_arch": [hidden, hidden]},
    )
    # half of the warm-up fills the buffer, the other half runs the first updates
    peer.learn(warm)
    updates_before = peer._n_updates
    steps_before = peer.num_timesteps
    began = time.perf_counter()
    peer.learn(args.peer_steps, reset_num_timesteps=False)
    seconds = time.perf_counter() - began
    updates = peer._n_updates - updates_before
    steps = peer.num_timesteps - steps_before
    right = updates == steps // lanes * (lanes // 4)
    check(right, f"the peer made {updates} updates in {steps} transitions")
    env.close()
    return {
        "transitions": steps,
        "updates": updates,
        "parameters": sum(p.numel() for p in peer.q_net.parameters()),
        "samples_per_transition": 32 * updates / steps,
        "transitions_per_second": steps / seconds,
    }


def main(argv: list[str] | None = None) -> dict:
    args, _ = parse_args(Args, argv)
    threads = set_threads(args.threads)
    pairs = dqn.load_pairs(dqn.Args())
    lanes = {name: [] for name in MODES}
    train = {"ours": [], "SB3 DQN": []}
    # in turns: what slows the machine for a while slows both sides
    for _ in range(args.repeats):
        for name in MODES:
            lanes[name].append(lanes_of(name, args, pairs))
        train["ours"].append(train_ours(args, threads))
        train["SB3 DQN"].append(train_peer(args, pairs, threads))
    ours = train["ours"][0]
    peer = train["SB3 DQN"][0]
    # comparable sides: as many samples a transition, networks of one size
    drawn = ours["samples_per_transition"] / peer["samples_per_transition"]
    equal = args.quick or abs(drawn - 1) < 0.05
    check(equal, f"ours drew {drawn:.2f} times the peer's samples a transition")
    check(ours["parameters"] == peer["parameters"], "the networks differ")
    middle = {}
    for name, runs in lanes.items():
        middle[name] = median(run["lane_steps_per_second"] for run in runs)
    for name, runs in train.items():
        middle[name] = median(run["transitions_per_second"] for run in runs)
    result = {
        "machine": machine(threads, torch, np, nb, stable_baselines3),
        "quick": args.quick,
        "lanes": lanes,
        "training": train,
        "median": middle,
        "exit_code": 0,
    }
    if args.out:
        write_json_atomic(result, args.out)
    show(result)
    return result


def show(result: dict):
    middle = result["median"]
    table = Table(title=title_of(result))
    for name in ("what", "lanes or samples", "a second, median", "of the peer"):
        table.add_column(name, justify="left" if name == "what" else "right")
    best = max(middle["SB3 DummyVecEnv"], middle["SB3 SubprocVecEnv"])
    for name, runs in result["lanes"].items():
        rate = middle[name]
        times = f"{rate / best:.0f} x"
        count = str(runs[0]["lanes"])
        table.add_row(f"lane-steps, {name}", count, f"{rate:,.0f}", times)
    for name, runs in result["training"].items():
        rate = middle[name]
        times = f"{rate / middle['SB3 DQN']:.1f} x"
        samples = f"{runs[0]['samples_per_transition']:.1f} each"
        table.add_row(f"transitions trained, {name}", samples, f"{rate:,.0f}", times)
    Console(width=100).print(table)


if __name__ == "__main__":
    exit_with(main)
