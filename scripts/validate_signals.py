"""Is the network simulator of ppo_arz_signals.py right? Three known answers, one that settles.

    python scripts/validate_signals.py          # a minute or two on one core
    python scripts/validate_signals.py --quick

A smooth wave of cars on a street (its error falls with the order of the scheme), the delay of one
red light, and the saturation flow of a green; then the corridor's delay under a fixed cycle and
under actuated control on finer and finer cells. Cars with w = the limit are LWR with a triangular
diagram, whose solutions are exact. Exit code 1 if a check fails.
"""

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.run import CheckFailed, answer_help, exit_with, parse_args

answer_help(__name__, __file__)

import numpy as np  # noqa: E402
import torch  # noqa: E402

from cleanrl_crypto import ppo_arz_signals as arz  # noqa: E402
from common.networks import RHO_JAM, build_network, capacity_of  # noqa: E402

# veh s: q r^2 / (2 (1 - q / q_m)) of q .1 veh/s, r 10 s and q_m at 5 m/s
RED = 0.1 * 10.0**2 / (2 * (1 - 0.1 / capacity_of(RHO_JAM, 5.0)))
CONTROLLERS = {
    "fixed_cycle": {"cycle": 45.0, "skew": 0.75, "speed": 12.0},
    "actuated": {"gap": 0.15, "longest": 25.0},
}
SATURATION = 1750.0, 2000.0  # veh/h and lane at 50 km/h, as in streets
SETTLED = 0.06  # of the delay on the finest cells
STEADY = dict(variation=(1.0, 1.0, 0.0), fill=0.0)


@dataclass
class Args:
    quick: bool = False
    """fewer and coarser cells"""


def street(
    dx: float,
    length: float,
    flow: float,
    limit: float,
    interval: float,
    seconds: float = 400.0,
):
    """One lane of cars through a signal without all-red; phase 1 is that of a side street."""
    rows = [
        {
            "from": a,
            "to": b,
            "length_m": length,
            "class": "residential",
            "lanes": 1,
            "limit": limit,
        }
        for a, b in (("A", "J"), ("J", "B"), ("X", "J"))
    ]
    plan = {
        "signals": {"J": [["A"], ["X"]]},
        "demand": {"A": {"car": flow}, "X": {}},
        "all_red": 0,
        "min_green": 0,
    }
    net = build_network("street", rows, plan, dx)
    envs = arz.NetworkVectorEnv(1, net, interval, seconds, **STEADY)
    envs.reset(seed=0)
    return envs


def smooth_street(dx: float) -> float:
    """L1 error (m of jam) of a smooth wave of cars in free flow, which moves at the limit."""
    seconds, top = 20.0, 10.0
    envs = street(dx, 800.0, 1e-6, 36.0, seconds)
    cells = slice(*envs.network.first[:2])
    jam = envs.network.jam[0]

    def wave(x):
        return 0.12 * np.exp(-(((x - 300.0) / 70.0) ** 2))

    points = (np.arange(20) + 0.5) / 20  # of a cell
    x = (np.arange(round(800 / dx))[:, None] + points) * dx
    rho = torch.as_tensor(wave(x).mean(1) * jam)
    envs.rho_c[cells, 0] = rho.float()
    envs.mom_c[cells, 0] = rho.float() * top
    envs.step_lanes(torch.zeros(1, 1))
    expected = wave(x - top * seconds).mean(1)
    simulated = envs.rho_c[cells, 0].double().numpy() / jam
    return float(np.abs(simulated - expected).sum() * dx)


def red_light(dx: float) -> float:
    """What one red of 10 s adds to the time (veh s) that vehicles spend on the 200 m before it."""
    spent = []
    for red in (range(0), range(120, 130)):
        envs = street(dx, 200.0, 360.0, 18.0, 1.0)
        inside = []
        for second in range(240):
            envs.step_lanes(torch.full((1, 1), int(second in red)))
            inside.append(float(envs.counts()[0, 0]))
        spent.append(float(torch.trapezoid(torch.tensor(inside[110:], dtype=torch.float64))))
    return spent[1] - spent[0]


def saturation_flow(limit: float) -> float:
    """Vehicles an hour and lane that a long green lets through from a standing queue."""
    envs = street(5.0, 400.0, 7200.0, limit, 5.0, seconds=600.0)
    for _ in range(24):
        envs.step_lanes(torch.ones(1, 1))
    left = []
    for _ in range(24):
        envs.step_lanes(torch.zeros(1, 1))
        left.append(
            float(envs.counts()[0, 0] + envs.queue.sum())
            - float(envs.totals[arz.ARRIVED + 1, 0])
        )
    return 3600 * (left[3] - left[11]) / 40  # from 20 to 60 s after the green began


def corridor(dx: float, name: str, level: float, lanes: int = 16) -> float:
    """Mean delay (veh s) of `lanes` episodes of the corridor under one controller."""
    envs = arz.NetworkVectorEnv(lanes, "corridor", 5.0, 450.0, (level, level), dx)
    envs.reset(seed=5)
    act = arz.controller(envs, name, [CONTROLLERS[name]] * lanes)
    for _ in range(envs.length):
        envs.step_lanes(act(None))
    return float(envs.stats("finals")["delay_veh_s"].mean())


def show(title: str, names, values, form: str):
    print(f"{title:44}" + "".join(f"{name:>10}" for name in names))
    print(f"{'':44}" + "".join(f"{value:>10{form}}" for value in values))


def main(argv: list[str] | None = None) -> dict:
    """The tables, printed; raises CheckFailed with every check that failed."""
    args, _ = parse_args(Args, argv)
    fine = 25.0, 12.5, 6.25
    wave_dx = red_dx = 10.0, 5.0, 2.5, 1.25
    if args.quick:
        fine = 25.0, 12.5
        wave_dx = 10.0, 5.0
        red_dx = 5.0, 2.5
    wave = [smooth_street(dx) for dx in wave_dx]
    orders = np.log2(np.array(wave[:-1]) / wave[1:])
    reds = [red_light(dx) for dx in red_dx]
    show("smooth wave, L1 error, m of jam; dx, m", wave_dx, wave, ".4f")
    show(f"one red of 10 s, veh s (LWR: {RED:.4f})", red_dx, reds, ".4f")
    limits = 30.0, 40.0, 50.0, 60.0
    delays = {}
    flows = [saturation_flow(limit) for limit in limits]
    show("saturation flow, veh/h and lane; km/h", limits, flows, ".0f")
    for name, level in product(CONTROLLERS, arz.LEVELS):
        case = f"{name} x{level}"
        delays[case] = [corridor(dx, name, level) for dx in fine]
        show(f"corridor's delay, veh s, {case}; dx, m", fine, delays[case], ".0f")
    failed = []
    if not ((orders > 0.8) & (orders < 1.3)).all():
        failed.append(
            f"orders of the smooth wave are {orders.round(2).tolist()}, expected .8 to 1.3"
        )
    if not abs(reds[-1] - RED) < 0.1:
        failed.append(f"one red costs {reds[-1]:.3f} veh s, expected {RED:.3f}")
    flow = flows[limits.index(50.0)]
    if not SATURATION[0] <= flow <= SATURATION[1]:
        failed.append(f"saturation flow {flow:.0f} veh/h, expected {SATURATION}")
    for case, delay in delays.items():
        # 25 m smear the end of a queue over the 50 m that the detectors of actuated control see
        fine_enough = delay if case.startswith("fixed") else delay[1:]
        if not np.allclose(fine_enough, delay[-1], rtol=SETTLED):
            failed.append(f"delays of {case} do not settle: {np.round(delay).tolist()}")
    if failed:
        raise CheckFailed("; ".join(failed))
    return {
        "exit_code": 0,
        "wave": wave,
        "red": reds,
        "saturation": flows,
        "delay": delays,
    }


if __name__ == "__main__":
    exit_with(main)
