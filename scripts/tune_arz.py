"""Constants of the corridor's signal baselines, by grid search on training seeds; where ppo_arz_gpu.py's TUNED is from.

    python scripts/tune_arz.py                    # both demand levels, decisions every 5 s: about 3 minutes on 2 cores
    python scripts/tune_arz.py --interval 1 --controllers actuated      # what deciding more often would be worth
    python scripts/tune_arz.py --scenario town3 --lanes 16 --levels 1.0

For every demand level and controller: total delay (veh s) of an episode, mean over the lanes and its standard error,
vehicles through, switches, for the best and the worst constants; then the best ones as TUNED holds them. Lanes are
training lanes 0, 1, ... of --seed: their demand is not that of an evaluation case, whose lanes and seed are others.
"""
import sys
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

from cleanrl_crypto import ppo_arz_gpu as arz  # noqa: E402
from common.cli import UsageError, check, parse_args  # noqa: E402
from common.networks import NetworkError  # noqa: E402

GRIDS = {  # seconds, shares, m/s; a cycle, a period that the decisions cannot keep is left out
    "fixed_cycle": {"cycle": (20, 25, 30, 35, 40, 45, 50, 60, 75, 90), "share": (0.5, 0.55, 0.6, 0.65, 0.7),
                    "speed": (0.0, 10.0, 12.0, 14.0, 17.0)},
    "webster": {"level": (0.8, 1.0, 1.15, 1.3, 1.5), "saturation": (0.2, 0.225, 0.25, 0.275, 0.3, 0.35),
                "speed": (0.0, 10.0, 12.0, 14.0, 17.0)},
    "actuated": {"gap": (0.05, 0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25, 0.3),
                 "longest": (15.0, 20.0, 25.0, 30.0, 40.0, 60.0)},
    "max_pressure": {"period": (5, 10, 15, 20, 25, 30), "standing": (False, True), "margin": (0.0, 1.0, 2.0, 4.0, 8.0)},
}


@dataclass
class Args:
    scenario: str = "corridor"
    """corridor, townN, or a CSV of segments with a JSON of signals beside it"""
    controllers: tuple[str, ...] = tuple(GRIDS)
    """which of fixed_cycle, webster, actuated and max_pressure"""
    levels: tuple[float, ...] = (1.0, 1.3)
    """demand over its mean; the constants are chosen for each"""
    interval: float = 5.0
    """**seconds** between decisions"""
    seconds: float = 450.0
    """**seconds** of an episode"""
    lanes: int = 64
    """training lanes, one episode each"""
    seed: int = 1
    """of the lanes"""
    shown: int = 3
    """of the best rows, a controller"""

    def __post_init__(self):
        check(self, {}, {"lanes": (2, 2**16), "interval": (0.25, 3600), "seed": (0, 2**31 - 1), "shown": (1, 1000)})
        for name in self.controllers:
            if name not in GRIDS:
                raise ValueError(f"--controllers {name}: must be one of {', '.join(GRIDS)}")


def delays(make, env, seed: int) -> dict:
    """One episode of every lane under make(env) -> act: the lanes' statistics."""
    env.reset(seed=seed)
    act = make(env)
    for _ in range(env.length):
        env.step_lanes(act(None))
    return env.final_stats


def search(name: str, env, seed: int) -> list[tuple[dict, dict]]:
    """(constants, statistics) of a controller's whole grid, least delay first."""
    grid, found = GRIDS[name], []
    for values in product(*grid.values()):
        constants = dict(zip(grid, values))
        if constants.get("period", 0) % env.interval:
            continue
        found.append((constants, delays(partial(arz.CONTROLLERS[name], **constants), env, seed)))
    return sorted(found, key=lambda pair: pair[1]["delay_veh_s"].mean())


def main(argv: list[str] | None = None) -> dict:
    """{level: {controller: constants}}, the tables printed."""
    args = parse_args(Args, argv)
    tuned = {}
    for level in args.levels:
        env = arz.NetworkVectorEnv(
            args.lanes, args.scenario, args.interval, args.seconds, level=(level, level), seed=args.seed)
        tuned[level] = {}
        for name in args.controllers:
            found = search(name, env, args.seed)
            print(f"demand x{level:g}, {name}: {len(found)} plans, {args.lanes} lanes, decisions every "
                  f"{args.interval:g} s, delay (veh s), vehicles through, switches")
            for constants, stats in found[: args.shown] + found[-1:]:
                delay, through, switches = (stats[k] for k in ("delay_veh_s", "throughput_veh", "switches"))
                print(f"  {delay.mean():9.1f} +- {delay.std() / np.sqrt(len(delay)):6.1f}  {through.mean():7.1f}  "
                      f"{switches.mean():6.1f}  {constants}", flush=True)
            tuned[level][name] = found[0][0]
        env.close()
    print("TUNED = {")
    for level, rows in tuned.items():
        print(f"    {level}: {{")
        for name, constants in rows.items():
            print(f'        "{name}": {constants},'.replace("'", '"'))
        print("    },")
    print("}")
    return tuned


if __name__ == "__main__":
    try:
        main()
    except (UsageError, NetworkError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
