"""Speed of ppo_arz_gpu.py: its simulator beside the same scheme in NumPy, its training beside
Stable-Baselines3's PPO.

    python scripts/benchmark_arz.py --out benchmark_arz.json  # about two minutes on 2 CPU cores
    python scripts/benchmark_arz.py --quick                   # tiny sizes: its numbers mean nothing

Simulator: the freeway with flux at both ends, MUSCL with SSPRK2, float32, through the vector API; a
cell update is one cell over one whole time step (both stages, relaxation, Courant number and floor
included), and the kernel itself counts the steps of every lane. Beside it the same scheme for one
road in NumPy, one solver step a call, as published environments do it; before it is timed, both
simulate 60 s of one wave in float64 and must agree to 1e-9.
Training: the script itself on the freeway, its rate read from its own log, beside SB3's PPO on the
same environment with the same layers, minibatch share and epochs. In turns, medians shown; what ran
is counted and checked. CPU only.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
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
from stable_baselines3 import PPO  # noqa: E402
from stable_baselines3.common.vec_env import DummyVecEnv  # noqa: E402

from cleanrl_crypto import ppo_arz_gpu as arz  # noqa: E402
from common.lanes import OneLane  # noqa: E402
from common.timeout_guard import load_checkpoint, write_json_atomic  # noqa: E402

CELLS = arz.NODES - 1


@dataclass
class Args:
    lanes: int = 1024
    """roads of ours"""
    seconds: float = 3.0
    """seconds of one measurement of a simulator"""
    repeats: int = 3
    """measurements, in turns"""
    train_steps: int = 1_310_720
    """transitions of ours, a run"""
    peer_steps: int = 16_384
    """transitions of the peer that are measured, a run (after a rollout that is not)"""
    threads: int | None = None
    """torch and numba threads of both sides (default: all cores)"""
    out: Path | None = None
    """write everything to this file as JSON"""
    quick: bool = False
    """tiny sizes: a test that it runs"""

    def __post_init__(self):
        if self.quick:
            self.lanes, self.seconds, self.repeats = 64, 0.1, 1
            self.train_steps, self.peer_steps = 8_192, 2_048


class NumpyRoad:
    """One road: rho, rho w of CELLS cells; p = c rho, Greenshields, prescribed flux at both
    ends."""

    def __init__(self, rho, q):
        self.c, self.a, self.q, self.steps = arz.V_MAX / arz.RHO_MAX, 0.45 * arz.DX, q, 0
        self.rho, self.z = rho.copy(), q + self.c * rho**2

    def speeds(self, rho, z):
        return z / rho - self.c * rho

    def relaxed(self, rho, z, dt):
        rest = rho * (arz.V_MAX * (1 - rho / arz.RHO_MAX) + self.c * rho)
        return z + (rest - z) * (1 - np.exp(-0.5 * dt / arz.RELAX))

    def flux(self, rho_l, v_l, rho_r, v_r):
        w = np.maximum(v_l + self.c * rho_l, 0)
        best, most = w / (2 * self.c), w**2 / (4 * self.c)
        behind = np.clip(v_r, 0, w)
        middle = (w - behind) / self.c
        f = np.minimum(
            np.where(rho_l <= best, rho_l * v_l, most),
            np.where(middle >= best, middle * behind, most),
        )
        return f, f * w

    def euler(self, rho, z, dt):
        v = self.speeds(rho, z)
        r, u = np.pad(rho, 2, "edge"), np.pad(v, 2, "edge")
        values = []
        for x in (r, u):
            d = np.diff(x)
            slope = np.where(
                d[1:] * d[:-1] > 0, np.where(np.abs(d[1:]) < np.abs(d[:-1]), d[1:], d[:-1]), 0
            )
            values.append((x[1:-2] + 0.5 * slope[:-1], x[2:-1] - 0.5 * slope[1:]))
        (r_l, r_r), (u_l, u_r) = values
        f, g = self.flux(r_l, u_l, r_r, u_r)
        f[0] = self.q
        g[0] = self.q * (min(self.q / rho[0], arz.V_MAX) + self.c * rho[0])
        f[-1] = min(self.q, rho[-1] * arz.V_MAX)
        g[-1] = f[-1] * (v[-1] + self.c * rho[-1])
        rho, z = rho - dt / arz.DX * np.diff(f), z - dt / arz.DX * np.diff(g)
        return np.maximum(rho, arz.RHO_FLOOR), np.where(
            rho < arz.RHO_FLOOR, arz.RHO_FLOOR * arz.V_MAX, z
        )

    def step(self, left: float) -> float:
        """One solver step towards `left` seconds from now; returns what is left then."""
        v = self.speeds(self.rho, self.z)
        fastest = max(np.abs(v).max(), np.abs(v - self.c * self.rho).max())
        n = max(np.ceil(left * fastest / self.a), 1)
        dt = left / n
        self.z = self.relaxed(self.rho, self.z, dt)
        rho, z = self.euler(*self.euler(self.rho, self.z, dt), dt)
        self.rho, self.z = 0.5 * (self.rho + rho), 0.5 * (self.z + z)
        self.z = self.relaxed(self.rho, self.z, dt)
        self.steps += 1
        return left - dt if n > 1 else 0.0


def same_result(seconds: int = 60) -> float:
    """Largest relative difference of the two simulators in float64, after `seconds` of the
    published wave."""
    env = arz.FreewayVectorEnv(1, scheme="muscl", precision="float64")
    env.reset(seed=1, options={"waves": np.array(arz.WAVE)[:, None]})
    rho, _ = env.rows("u")[..., 0].numpy().copy()
    road = NumpyRoad(rho, float(env.rows("lane")[arz.AT.q_star, 0]))
    for _ in range(seconds):
        env.step_lanes(torch.zeros(1, 1))
        for _ in range(env.samples):
            left = arz.SAMPLE
            while left > 0:
                left = road.step(left)
    ours = env.rows("u")[..., 0].numpy()
    steps = int(env.rows("totals")[arz.SUM.steps, 0])
    check(steps == road.steps, f"the kernel made {steps} steps, NumPy {road.steps}")
    difference = float(
        max(np.abs(ours[0] / road.rho - 1).max(), np.abs(ours[1] / road.z - 1).max())
    )
    env.close()
    return difference


def rate_of_ours(args: Args, scheme: str, seconds: float) -> dict:
    """Cell updates/s of step_lanes(), solver steps counted by the kernel."""
    env = arz.FreewayVectorEnv(args.lanes, scheme=scheme, seed=1)
    env.reset(seed=1)
    spread = np.exp(arz.Args.log_std_init)  # the actions of a first rollout
    actions = spread * torch.randn(
        8, args.lanes, 1, generator=torch.Generator().manual_seed(0)
    )
    for k in range(2):
        env.step_lanes(actions[k])
    total, decisions, spent = 0, 0, 0.0
    while spent < seconds:
        before = env.rows("totals")[arz.SUM.steps].clone()
        began = time.perf_counter()
        _, terminated, truncated = env.step_lanes(actions[decisions % 8])
        spent += time.perf_counter() - began
        alive = ~(terminated | truncated)  # an episode that ended took its count away
        total += int((env.rows("totals")[arz.SUM.steps] - before)[alive].sum())
        decisions += 1
    expected = decisions * args.lanes * env.samples
    check(
        total >= 0.9 * expected,
        f"{scheme}: {total} solver steps where at least {expected} are needed",
    )
    check(float(env.stats()["max_cfl"].max()) <= 1.0 + 1e-6, "a Courant number above 1")
    check(bool(torch.isfinite(env.observe()).all()), "an observation is not finite")
    cells = env.rows("u").shape[1]
    env.close()
    return {
        "lanes": args.lanes,
        "solver_steps": total,
        "decisions": decisions,
        "cell_updates_per_second": total * cells / spent,
    }


def rate_of_numpy(seconds: float) -> dict:
    road = NumpyRoad(
        arz.RHO_STAR * (1 + 0.1 * np.sin(3 * np.pi * (np.arange(CELLS) + 0.5) / CELLS)), 1.2
    )
    began, left = time.perf_counter(), 0.0
    while time.perf_counter() - began < seconds:
        left = road.step(left or arz.SAMPLE)
    seconds = time.perf_counter() - began
    check(np.isfinite(road.rho).all(), "the NumPy road broke")
    return {
        "lanes": 1,
        "solver_steps": road.steps,
        "cell_updates_per_second": road.steps * CELLS / seconds,
    }


def train_ours(args: Args, threads: int) -> dict:
    """The script's own transitions/s after warm-up, on the default freeway."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            "--total-timesteps",
            args.train_steps,
            "--torch-threads",
            threads,
            "--no-cuda",
            "--no-report",
            "--num-envs",
            args.lanes,
            "--run-dir",
            f"{folder}/run",
            "--eval-interval",
            10 * args.train_steps,
        ]
        summary = arz.main([str(f) for f in flags])
        state = load_checkpoint(f"{folder}/run/checkpoints/best.pt")
    ours = arz.Args
    expected = (
        summary["global_step"]
        // (args.lanes * ours.num_steps)
        * ours.update_epochs
        * ours.num_minibatches
    )
    check(
        summary["global_step"] >= args.train_steps and summary["updates"] == expected,
        "ours did not train",
    )
    return {
        "transitions": summary["global_step"],
        "updates": summary["updates"],
        "parameters": sum(
            v.numel()
            for k, v in state["agent"].items()
            if k.split(".")[0] in ("actor", "critic")
        ),
        "samples_per_transition": summary["samples_per_transition"],
        "transitions_per_second": summary["sps"],
    }


def train_peer(args: Args, threads: int) -> dict:
    """SB3's PPO: 8 one-lane environments, rollouts of 8 x 256, 4 epochs, minibatches of 64, the
    same layers."""
    torch.set_num_threads(threads)
    ours, lanes, steps, batch = arz.Args, 8, 256, 64
    env = DummyVecEnv([lambda: OneLane(arz.FreewayVectorEnv(1))] * lanes)
    peer = PPO(
        "MlpPolicy",
        env,
        n_steps=steps,
        batch_size=batch,
        n_epochs=ours.update_epochs,
        gamma=ours.gamma,
        seed=1,
        device="cpu",
        policy_kwargs={
            "net_arch": [ours.hidden, ours.hidden],
            "activation_fn": torch.nn.SiLU,
        },
    )
    peer.learn(lanes * steps)
    updates, made, began = peer._n_updates, peer.num_timesteps, time.perf_counter()
    peer.learn(args.peer_steps, reset_num_timesteps=False)
    seconds = time.perf_counter() - began
    epochs, made = peer._n_updates - updates, peer.num_timesteps - made
    wanted = made // (lanes * steps) * ours.update_epochs
    check(
        epochs == wanted, f"the peer made {epochs} epochs in {made} transitions, not {wanted}"
    )
    env.close()
    return {
        "transitions": made,
        "updates": epochs * lanes * steps // batch,
        "parameters": sum(
            p.numel() for n, p in peer.policy.named_parameters() if n != "log_std"
        ),
        "samples_per_transition": float(ours.update_epochs),
        "transitions_per_second": made / seconds,
    }


def main(argv: list[str] | None = None) -> dict:
    args, _ = parse_args(Args, argv)
    threads = set_threads(args.threads)
    difference = same_result()
    check(difference < 1e-9, f"the simulators differ by {difference:.1e} after 60 s")
    rates = {
        "ours, muscl": [],
        "ours, godunov": [],
        "ours, richtmyer": [],
        "NumPy, muscl": [],
    }
    train = {"ours": [], "SB3 PPO": []}
    for _ in range(args.repeats):
        for name in list(rates)[:3]:
            rates[name].append(rate_of_ours(args, name.split()[1], args.seconds))
        rates["NumPy, muscl"].append(rate_of_numpy(args.seconds))
    for _ in range(args.repeats):
        train["ours"].append(train_ours(args, threads))
        train["SB3 PPO"].append(train_peer(args, threads))
    for key in ("parameters", "samples_per_transition"):
        seen = [train[name][0][key] for name in train]
        check(seen[0] == seen[1], f"{key} differ: {seen[0]} and {seen[1]}")
    middle = {k: median(r["cell_updates_per_second"] for r in v) for k, v in rates.items()}
    middle |= {
        f"train {k}": median(r["transitions_per_second"] for r in v) for k, v in train.items()
    }
    result = {
        "machine": machine(threads, torch, np, nb, stable_baselines3),
        "quick": args.quick,
        "difference": difference,
        "simulators": rates,
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
    for name in ("what", "lanes", "a second, median", "of the peer", "target"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for name, runs in result["simulators"].items():
        table.add_row(
            f"cell updates, {name}",
            str(runs[0]["lanes"]),
            f"{middle[name]:,.0f}",
            f"{middle[name] / middle['NumPy, muscl']:.0f} x",
            "400 M" if name == "ours, muscl" else "",
        )
    for name in result["training"]:
        peer = middle["train SB3 PPO"]
        table.add_row(
            f"transitions trained, {name}",
            "",
            f"{middle['train ' + name]:,.0f}",
            f"{middle['train ' + name] / peer:.0f} x",
            "80 k" if name == "ours" else "",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    exit_with(main)
