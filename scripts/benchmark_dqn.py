"""Speed of dqn_forex_subproc.py beside Stable-Baselines3: the lanes alone, and training; same machine, same process.

    python scripts/benchmark_dqn.py --out benchmark_dqn.json  # about three minutes on 2 CPU cores
    python scripts/benchmark_dqn.py --quick                   # tiny sizes: shows that it runs, its numbers mean nothing

Lanes: ForexVectorEnv's step_lanes() with every lane's observation written, in this process and through worker
processes; beside it the same environment, one lane each, in SB3's DummyVecEnv and SubprocVecEnv. Actions are drawn
before the clock starts. Training: the script itself, its rate read from its own log, beside SB3's DQN on the same
pairs with the same two hidden layers and the same number of samples drawn a transition (ours in large batches, the
peer in its own batches of 32). In turns, medians shown. What ran is counted and checked: steps, updates, samples,
parameters; a wrong count ends the benchmark with exit code 1. CPU only.
"""
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numba as nb  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

try:
    import stable_baselines3
    from stable_baselines3 import DQN
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
except ImportError as e:
    sys.exit(f"scripts/benchmark_dqn.py: {e}: the peer comes with pip install -r requirements-test.txt")

from cleanrl_crypto import dqn_forex_subproc as dqn  # noqa: E402
from common.timeout_guard import write_json_atomic  # noqa: E402
from scripts.machine import check, machine  # noqa: E402


@dataclass
class Args:
    lanes: int = 16_384
    """lanes of ours where the lanes alone are measured"""
    seconds: float = 3.0
    """**seconds** of one measurement of the lanes"""
    peer_lanes: int = 8
    """lanes (SubprocVecEnv: processes) of the peer"""
    repeats: int = 3
    """measurements, in turns"""
    train_steps: int = 786_432
    """transitions of ours, a run"""
    peer_steps: int = 24_000
    """transitions of the peer that are measured, a run (after 2 000 that are not)"""
    threads: int | None = None
    """torch and numba threads of both sides (None: all cores)"""
    out: Path | None = None
    """write everything to this file as JSON"""
    quick: bool = False
    """tiny sizes: a test that it runs"""


def rate_of_lanes(env, lanes: int, seconds: float) -> dict:
    """Lane-steps/s of ours; every lane's clock is compared with the number of steps."""
    env.reset(seed=1)
    actions = np.random.default_rng(0).integers(0, 3, (16, lanes))
    for k in range(4):
        env.step_lanes(actions[k])
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        env.step_lanes(actions[steps % 16])
        steps += 1
    seconds = time.perf_counter() - began
    _, clock, episode, _ = env.get_state()["ints"].numpy()
    check(((clock + episode) > 0).all() and clock.max() <= steps + 4, "a lane did not step")
    rows = env.host(env.row)[:64]
    seen = env.host(env.obs)[:64, : env.pairs.table.shape[1]]
    check(np.array_equal(seen, env.pairs.table[rows]), "stale observations")
    return {"lanes": lanes, "steps": steps, "lane_steps_per_second": steps * lanes / seconds}


def one_lane(pairs, k: int):
    return dqn.ForexEnv(pairs=pairs, seed=k)


def rate_of_peer(vec_env, seconds: float) -> dict:
    """Lane-steps/s of an SB3 VecEnv."""
    vec_env.reset()
    actions = np.random.default_rng(0).integers(0, 3, (16, vec_env.num_envs))
    vec_env.step(actions[0])
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        vec_env.step(actions[steps % 16])
        steps += 1
    seconds = time.perf_counter() - began
    return {"lanes": vec_env.num_envs, "steps": steps, "lane_steps_per_second": steps * vec_env.num_envs / seconds}


def train_ours(args: Args, threads: int, extra: list[str]) -> dict:
    """The script's own transitions/s after warm-up, and what it drew."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--vec-mode", "single", "--total-timesteps", args.train_steps, "--torch-threads", threads, "--no-cuda",
                 "--no-report", "--run-dir", f"{folder}/run", "--eval-interval", args.train_steps // 3, *extra]
        summary = dqn.main([str(f) for f in flags])
        state = dqn.load_agent(f"{folder}/run/checkpoints/best.pt")
    check(summary["global_step"] >= args.train_steps and summary["updates"] > 0, "ours did not train")
    parameters = sum(v.numel() for k, v in state["agent"].items() if k.startswith("online."))
    return {"transitions": summary["global_step"], "updates": summary["updates"], "parameters": parameters,
            "samples_per_transition": summary["samples_per_transition"], "transitions_per_second": summary["sps"]}


def train_peer(args: Args, pairs, threads: int) -> dict:
    """SB3's DQN as it is, on one-lane environments of ours: 2 updates of 32 for 8 transitions, 8 samples each."""
    torch.set_num_threads(threads)
    lanes, warm, hidden = args.peer_lanes, 2_000, dqn.Args().hidden
    env = DummyVecEnv([partial(one_lane, pairs, k) for k in range(lanes)])
    peer = DQN("MlpPolicy", env, batch_size=32, train_freq=(1, "step"), gradient_steps=lanes // 4, gamma=0.95,
               learning_starts=warm // 2, buffer_size=100_000, policy_kwargs={"net_arch": [hidden, hidden]}, seed=1,
               device="cpu")
    peer.learn(warm)
    updates, steps, began = peer._n_updates, peer.num_timesteps, time.perf_counter()
    peer.learn(args.peer_steps, reset_num_timesteps=False)
    seconds = time.perf_counter() - began
    updates, steps = peer._n_updates - updates, peer.num_timesteps - steps
    check(updates == steps // lanes * (lanes // 4), f"the peer made {updates} updates in {steps} transitions")
    env.close()
    parameters = sum(p.numel() for p in peer.q_net.parameters())
    return {"transitions": steps, "updates": updates, "parameters": parameters,
            "samples_per_transition": 32 * updates / steps, "transitions_per_second": steps / seconds}


def main(argv: list[str] | None = None) -> dict:
    args = tyro.cli(Args, args=argv)
    if args.quick:
        args.lanes, args.seconds, args.repeats, args.train_steps, args.peer_steps = 64, 0.1, 1, 65_536, 400
        args.peer_lanes = 4
    threads = args.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    nb.set_num_threads(min(threads, nb.config.NUMBA_NUM_THREADS))
    pairs = dqn.load_pairs(dqn.Args())
    names = "single", "dummy", "subproc 1", "subproc 2", "SB3 DummyVecEnv", "SB3 SubprocVecEnv"
    lanes_of = {name: [] for name in names}
    for _ in range(args.repeats):
        for name in lanes_of:
            if name.startswith("SB3"):
                makers = [partial(one_lane, pairs, k) for k in range(args.peer_lanes)]
                env = (DummyVecEnv if "Dummy" in name else partial(SubprocVecEnv, start_method="forkserver"))(makers)
                lanes_of[name].append(rate_of_peer(env, args.seconds))
            else:
                mode, _, workers = name.partition(" ")
                env = dqn.ForexVectorEnv(pairs, "train", args.lanes, vec_mode=mode, num_workers=int(workers or 1))
                lanes_of[name].append(rate_of_lanes(env, args.lanes, args.seconds))
            env.close()
    train = {"ours": [], "ours, plain DQN": [], "SB3 DQN": []}
    for _ in range(args.repeats):
        train["ours"].append(train_ours(args, threads, []))
        train["SB3 DQN"].append(train_peer(args, pairs, threads))
        train["ours, plain DQN"].append(train_ours(args, threads, ["--no-all-actions"]))
    wanted = train["SB3 DQN"][0]["samples_per_transition"]
    for name, runs in train.items():
        for run in runs:
            drawn = run["samples_per_transition"]
            equal = args.quick or abs(drawn / wanted - 1) < 0.05
            check(equal, f"{name}: {drawn:.2f} samples a transition, the peer drew {wanted:.2f}")
    check(train["ours, plain DQN"][0]["parameters"] == train["SB3 DQN"][0]["parameters"], "the networks differ")
    middle = {k: median(r["lane_steps_per_second"] for r in v) for k, v in lanes_of.items()}
    middle |= {k: median(r["transitions_per_second"] for r in v) for k, v in train.items()}
    result = {"machine": machine(threads, torch, np, nb, stable_baselines3),
              "quick": args.quick, "lanes": lanes_of, "training": train, "median": middle}
    if args.out:
        write_json_atomic(result, args.out)
    show(result)
    return result


def show(result: dict):
    where, middle = result["machine"], result["median"]
    table = Table(title=f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads"
                  + (" (--quick: these numbers mean nothing)" if result["quick"] else ""))
    for name in ("what", "lanes", "a second, median", "of the peer", "target"):
        table.add_column(name, justify="left" if name == "what" else "right")
    best = max(middle["SB3 DummyVecEnv"], middle["SB3 SubprocVecEnv"])
    target = {"single": "50 M", "subproc 2": "20 M", "ours": "10 x", "ours, plain DQN": "10 x"}
    for name, runs in result["lanes"].items():
        table.add_row(f"lane-steps, {name}", str(runs[0]["lanes"]), f"{middle[name]:,.0f}",
                      f"{middle[name] / best:.0f} x", target.get(name, ""))
    for name, runs in result["training"].items():
        peer = middle["SB3 DQN"]
        table.add_row(f"transitions trained, {name}", f"{runs[0]['samples_per_transition']:.1f} samples each",
                      f"{middle[name]:,.0f}", f"{middle[name] / peer:.1f} x", target.get(name, ""))
    Console(width=130).print(table)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as e:
        sys.exit(f"error: {e}")
