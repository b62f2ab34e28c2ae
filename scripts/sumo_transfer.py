"""SUMO judges a policy that was trained on our simulator, beside the controllers that people use.

    python scripts/sumo_transfer.py RUN_DIR --sumocfg MAP.sumocfg --seeds 10
    python scripts/sumo_transfer.py RUN_DIR --sumocfg MAP.sumocfg --seeds 10 --video
    python scripts/sumo_transfer.py --baselines-only --sumocfg MAP.sumocfg

RUN_DIR is a run of ppo_arz_signals.py on this map; its best.pt decides. On the same seeds: the
map's own program, SUMO's actuated and delay-based ones with the same phases, Webster from the same
demand, max-pressure, a greedy wave, random. Amber, minimum green and decision interval are the same
for all who decide; SUMO's own programs look every second, as they do in use.

Everything is measured by SUMO: a vehicle's time loss plus its departure delay, over all vehicles
that wanted to depart. Those that were not inserted or did not arrive count with what they have lost
so far. --out gets runs.csv (a line a run), transfer.json, transfer.png and transfer.gif.
"""

from __future__ import annotations

import heapq
import math
import os
import sys
import tempfile
import xml.etree.ElementTree as ET
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.run import (  # noqa: E402
    CheckFailed,
    UsageError,
    answer_help,
    check,
    exit_with,
    parse_args,
    refuse,
)

answer_help(__name__, __file__)

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402

from cleanrl_crypto import ppo_arz_signals as arz  # noqa: E402
from common.maps import is_green  # noqa: E402
from common.networks import Network  # noqa: E402
from common.timeout_guard import whole_file, write_json_atomic  # noqa: E402
from common.workers import be_a_worker, worker_context  # noqa: E402

MODULE = "scripts.sumo_transfer"
POLICY, OWN = "policy", "own program"
# SUMO's types of a program that are run with the map's phases
SUMO_TYPES = {"actuated": "actuated", "delay-based": "delay_based"}
LONGEST_GREEN = 50.0  # s, of SUMO's programs where the map gives none: netconvert's default
# options under which SUMO takes vehicles out that have not arrived: they would count for nothing
REMOVE = {"max-depart-delay": "-1", "time-to-teleport.remove": "false"}  # SUMO's defaults
FRAMES = 120  # of the animation, one a decision, from the middle of the simulation
COLUMNS = {  # of runs.csv
    "delay": "time loss and departure delay, s a vehicle",
    "time_loss": "s a vehicle",
    "departure_delay": "s a vehicle",
    "stops": "a vehicle",
    "throughput": "vehicles that arrived",
    "wanted": "vehicles that wanted to depart",
    "not_inserted": "of them, still waiting to depart at the end",
    "not_arrived": "of them, still on the road at the end",
    "teleports": "vehicles that SUMO moved because they were stuck",
}


@dataclass
class Args:
    # what is judged
    run_dir: str | None = None
    """run of ppo_arz_signals.py; may stand alone, without its flag"""
    sumocfg: str | None = None
    """SUMO's configuration: network, demand, begin and end"""
    baselines_only: bool = False
    """without a run: the controllers alone"""
    seeds: int = 10
    """seeds of SUMO, from 1"""
    decision_interval: float = 5.0
    """seconds between decisions with --baselines-only; a run brings its own"""

    # runtime
    workers: int = 1
    """simulations at once, each in a process of its own"""
    out: str | None = None
    """folder of the results (default: sumo/ in RUN_DIR, or runs/sumo_MAP)"""
    video: bool = False
    """an animation of the policy beside the map's own program, of the first seed"""

    def __post_init__(self):
        ranges = {
            (1, 10_000): "seeds",
            (1, 1024): "workers",
            (1, 3600): "decision_interval",
        }
        check(self, {}, ranges)
        one = self.baselines_only != (self.run_dir is not None)
        refuse(
            (not one, "give RUN_DIR, or --baselines-only: one of them"),
            (self.sumocfg is None, "--sumocfg MAP.sumocfg is missing"),
            (
                self.video and self.baselines_only,
                "--video shows the policy: not with --baselines-only",
            ),
        )


class Case(NamedTuple):
    """A map and who controls it. Everything that a worker needs, plain data."""

    config: str
    network: Network
    layout: object  # common.maps.Layout
    controller: str
    seed: int
    interval: float  # s between decisions
    checkpoint: str  # of the policy
    additional: str  # SUMO's additional files, for its own types of program
    record: bool  # positions for an animation


# --------------------------------------------------------------------------------------------- SUMO
@contextmanager
def simulation(config: str, *flags: str):
    """libsumo with this configuration, its output in a file; SUMO's error becomes one line."""
    with tempfile.TemporaryFile() as log, silenced(log):
        import libsumo

        try:
            quiet = "--no-step-log", "--no-warnings", "--duration-log.disable"
            libsumo.start(["sumo", "-c", config, *quiet, *flags])
            yield libsumo
            libsumo.close()
        except (libsumo.TraCIException, libsumo.FatalTraCIError) as e:
            log.seek(0)
            lines = log.read().decode(errors="replace").splitlines()
            errors = [line[6:].strip() for line in lines if line.startswith("Error:")]
            why = "; ".join(errors[:2]) or " ".join(str(e).split())
            raise UsageError(f"{config}: SUMO: {why}") from None


@contextmanager
def silenced(log):
    """What C code writes to stdout and stderr goes to `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    try:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        yield
    finally:
        for here, there in zip(before, (1, 2)):
            os.dup2(here, there)
            os.close(here)


def probe(config: str) -> dict:
    """Begin, end, files, and every signal's program as SUMO runs it."""
    with simulation(config) as sumo:
        lights = sumo.trafficlight
        option = sumo.simulation.getOption
        removes = [name for name, usual in REMOVE.items() if option(name) != usual]
        programs = {}
        for tls in lights.getIDList():
            running = lights.getProgram(tls)
            logics = lights.getAllProgramLogics(tls)
            logic = next(x for x in logics if x.programID == running)
            programs[tls] = [
                (phase.state, phase.duration, phase.minDur, phase.maxDur)
                for phase in logic.phases
            ]
        return {
            "begin": sumo.simulation.getTime(),
            "end": sumo.simulation.getEndTime(),
            "additional": option("additional-files"),
            "removes": removes,
            "version": libsumo_version(),
            "programs": programs,
        }


def libsumo_version() -> str:
    import libsumo

    return libsumo.getVersion()[1]


def write_programs(path: Path, kind: str, programs: dict, min_green: dict):
    """An additional file with every signal's phases as a program of this type of SUMO's.

    programs: {signal: [(state, duration, least, longest)]} in s; min_green: {signal: s}.
    """
    root = ET.Element("additional")
    for tls, phases in programs.items():
        names = {"id": tls, "type": kind, "programID": "referee", "offset": "0"}
        logic = ET.SubElement(root, "tlLogic", names)
        for state, duration, least, longest in phases:
            row = {"duration": f"{duration:g}", "state": state}
            if is_green(state):
                longest = longest if longest > duration else LONGEST_GREEN
                row["minDur"] = f"{min_green.get(tls, least):g}"
                row["maxDur"] = f"{max(longest, duration):g}"
            ET.SubElement(logic, "phase", row)
    ET.ElementTree(root).write(path)


def between(old: str, new: str, closing: str) -> str:
    """State of the links while a signal goes from one phase to another.

    closing: what is shown ("y", then "r") where a green ends. What is green in both stays so, and
    gives way if it does in one of them; what becomes green waits.
    """
    state = ""
    for a, b in zip(old, new, strict=True):
        if a in "Gg" and b in "Gg":
            state += "g" if "g" in (a, b) else "G"
        elif a in "Gg":
            state += closing
        else:
            state += a
    return state


# --------------------------------------------------------------------------- SUMO as an environment
class SumoLanes:
    """One simulation of SUMO behind the environment's own arrays.

    `env` is a NetworkVectorEnv of one lane whose zones, outside queues, phases and ages come from
    SUMO: observations and controllers are the environment's own code.
    """

    def __init__(self, sumo, case: Case):
        net, layout = case.network, case.layout
        self.sumo, self.net = sumo, net
        self.now = sumo.simulation.getTime()
        self.end = sumo.simulation.getEndTime()
        seconds = math.ceil((self.end - self.now) / case.interval) * case.interval
        seconds = max(seconds, (net.change_at[-1] // case.interval + 1) * case.interval)
        self.env = env = arz.NetworkVectorEnv(1, net, case.interval, seconds)
        for array in (env.phase, env.queue, env.decision):
            array.zero_()
        self.pieces, self.entries = pieces_of(net, layout)
        self.tls = [layout.tls[node] for node in net.nodes]
        self.lost = net.amber + net.all_red  # (G,) s
        env.age[:, 0] = env.on_device(self.lost + net.min_green)
        self.due = []  # states to show: (second, number, signal, state)
        for tls, states in self.tls:
            sumo.trafficlight.setRedYellowGreenState(tls, states[0])
        # one call brings all vehicles: those around a junction, however far
        names = sumo.constants
        self.keys = names.VAR_LANE_ID, names.VAR_LANEPOSITION
        self.keys += names.VAR_SPEED, names.VAR_ALLOWED_SPEED
        self.center = sumo.junction.getIDList()[0]
        kind = names.CMD_GET_VEHICLE_VARIABLE
        sumo.junction.subscribeContext(self.center, kind, 1e9, self.keys)
        self.look()

    def look(self):
        """Zones and outside queues of `env` from SUMO's lanes."""
        zones, queue = self.env.zones.numpy(), self.env.queue.numpy()
        zones[:] = 0.0
        vehicles = self.sumo.junction.getContextSubscriptionResults(self.center)
        for vehicle in vehicles.values():
            lane, place, speed, allowed = (vehicle[key] for key in self.keys)
            for piece in self.pieces.get(lane, ()):
                if piece.start < place <= piece.end:
                    zone, filling = piece.at(place)
                    slow = max(0.0, 1 - speed / allowed)
                    zones[zone, piece.part, 0] += filling
                    zones[3 + zone, piece.part, 0] += filling * slow
        # short vehicles may stand denser than the environment's
        np.minimum(zones, 1.0, out=zones)
        for edge, shares in self.entries.items():
            waiting = len(self.sumo.edge.getPendingVehicles(edge))
            for entry, share in shares.items():
                queue[1, entry, 0] = waiting * share

    def step(self, action):
        """action (G,): phases asked for; one decision interval.

        As in the environment, a signal stays where it is asked for a phase that it does not have.
        """
        for g, asked in enumerate(action):
            ready = self.env.age[g, 0] >= self.lost[g] + self.net.min_green[g]
            if ready and asked != self.env.phase[g, 0] and asked < self.net.n_phases[g]:
                self.change(g, int(asked))
        until = min(self.now + self.env.decision_interval, self.end)
        while self.due and self.due[0][0] < until:
            self.run_to(self.due[0][0])
            _, _, tls, state = heapq.heappop(self.due)
            self.sumo.trafficlight.setRedYellowGreenState(tls, state)
        self.run_to(until)
        self.env.age += self.env.decision_interval
        self.env.decision += 1
        self.look()

    def change(self, g: int, asked: int):
        """Amber now, then all red, then the new phase."""
        tls, states = self.tls[g]
        old, new = states[int(self.env.phase[g, 0])], states[asked]
        shown = (
            (0.0, between(old, new, "y")),
            (self.net.amber[g], between(old, new, "r")),
            (self.lost[g], new),
        )
        for after, state in shown:
            order = len(self.due), g
            heapq.heappush(self.due, (self.now + after, order, tls, state))
        self.env.phase[g] = asked
        self.env.age[g] = 0.0

    def run_to(self, second: float):
        if second > self.now:
            self.sumo.simulationStep(float(second))
            self.now = second


class Piece(NamedTuple):
    """A stretch of a SUMO lane and the segment that it belongs to."""

    start: float  # m along the lane
    end: float
    part: int
    before: float  # m of the segment before the stretch
    dx: float  # m, of the segment's cells
    zones: tuple  # of the segment's cells
    fillings: tuple  # what a vehicle in each cell adds to its zone: share of jam density

    def at(self, place: float) -> tuple[int, float]:
        cell = int((self.before + place - self.start) / self.dx)
        cell = min(max(cell, 0), len(self.zones) - 1)
        return self.zones[cell], self.fillings[cell]


def pieces_of(net: Network, layout) -> tuple[dict, dict]:
    """{lane: its Pieces}, {edge: {entry that begins there: its share of those who wait}}."""
    pieces, entries = {}, {}
    demand = net.base.mean(0).sum(0)  # (E,)
    for s, part in enumerate(net.ids):
        cells = slice(net.first[s], net.first[s + 1])
        zones = net.zone_of[cells]
        # a lane that several turns share belongs to each of them in part
        fillings = layout.weight.get(part, 1.0) / (net.jam[s] * net.zone_length[zones, s])
        about = float(net.dx[s]), tuple(zones.tolist()), tuple(fillings.tolist())
        for lane, start, end, before in layout.lanes[part]:
            piece = Piece(start, end, s, before, *about)
            pieces.setdefault(lane, []).append(piece)
            entry = int(net.entry[s])
            if entry >= 0 and before <= 0:
                at = entries.setdefault(lane.rpartition("_")[0], {})
                at[entry] = demand[entry]
    for at in entries.values():
        together = sum(at.values())
        for entry in at:
            at[entry] = at[entry] / together if together else 1 / len(at)
    return pieces, entries


# -------------------------------------------------------------------------------------- controllers
# The environment's own controllers: s, vehicles, m/s. Their constants did best in SUMO on seeds 101
# and 102 of cologne1 and ingolstadt1, by the sum of the delays, of those tried: periods of 5, 10
# and 15 s, margins of 0, 1 and 2 vehicles, saturations from .4 to 1.
DECIDERS = {
    "Webster": ("webster", {"saturation": 0.5, "speed": 0.0}),
    "max-pressure": ("max_pressure", {"period": 10.0, "standing": 1.0, "margin": 2.0}),
    "greedy wave": ("greedy_wave", {"period": 15.0, "margin": 0.0}),
}
CONTROLLERS = (OWN, *SUMO_TYPES, *DECIDERS, "random")


def controller(case: Case, env):
    """act() -> (1, G) phases."""
    if case.controller == POLICY:
        policy = arz.load_policy(case.checkpoint)
        return lambda: policy(env.look())
    if case.controller == "random":
        rng = np.random.default_rng(case.seed)
        return lambda: rng.integers(env.network.n_phases)[None]
    name, constants = DECIDERS[case.controller]
    act = arz.controller(env, name, [constants])
    return lambda: act(None)


# ---------------------------------------------------------------------------------------- one run
def play(case: Case) -> dict:
    """One simulation, in a process of its own: a line of runs.csv, and frames if recorded."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trips, statistics = f"{folder}/trips.xml", f"{folder}/statistics.xml"
        flags = ["--seed", str(case.seed), "--tripinfo-output", trips]
        flags += ["--tripinfo-output.write-unfinished", "--tripinfo-output.write-undeparted"]
        flags += ["--statistic-output", statistics]
        if case.additional:
            flags += ["--additional-files", case.additional]
        with simulation(case.config, *flags) as sumo:
            camera = Camera(sumo) if case.record else None
            drive(sumo, case, camera)
        row = {"controller": case.controller, "seed": case.seed}
        row |= measure(trips, statistics)
    return row | {"frames": camera and camera.frames}


def drive(sumo, case: Case, camera):
    """From begin to end under the case's controller."""
    end = sumo.simulation.getEndTime()
    if case.controller in (OWN, *SUMO_TYPES):
        while (now := sumo.simulation.getTime()) < end:
            until = min(now + case.interval, end) if camera else end
            sumo.simulationStep(until)
            if camera:
                camera.shoot()
        return
    lanes = SumoLanes(sumo, case)
    act = controller(case, lanes.env)
    while lanes.now < end:
        lanes.step(np.asarray(act())[0])
        if camera:
            camera.shoot()


def measure(trips: str, statistics: str) -> dict:
    """COLUMNS from SUMO's outputs. Raises CheckFailed where nobody wanted to depart."""
    rows = [dict(trip.attrib) for trip in ET.parse(trips).getroot().iter("tripinfo")]
    if not rows:
        raise CheckFailed("SUMO reports no vehicle: the demand is not between begin and end")
    table = pd.DataFrame(rows)
    columns = ["timeLoss", "departDelay", "waitingCount", "depart", "arrival"]
    loss, wait, stops, depart, arrival = table[columns].astype(float).to_numpy().T
    # -1: did not happen
    inserted, arrived = depart >= 0, arrival >= 0
    root = ET.parse(statistics).getroot()
    return {
        "delay": float(np.mean(np.maximum(loss, 0) + wait)),
        "time_loss": float(np.mean(np.maximum(loss, 0))),
        "departure_delay": float(np.mean(wait)),
        "stops": float(np.mean(np.maximum(stops, 0))),
        "throughput": int(arrived.sum()),
        "wanted": len(table),
        "not_inserted": int((~inserted).sum()),
        "not_arrived": int((inserted & ~arrived).sum()),
        "teleports": int(root.find("teleports").get("total")),
    }


class Camera:
    """Positions and signals of a simulation: `frames`, plain data."""

    def __init__(self, sumo):
        self.sumo = sumo
        lane, lights = sumo.lane, sumo.trafficlight
        ids = [x for x in lane.getIDList() if not x.startswith(":")]
        self.frames = {"streets": [lane.getShape(x) for x in ids], "shots": []}
        self.heads = {}  # {signal: a point a link}
        for tls in lights.getIDList():
            links = lights.getControlledLinks(tls)
            ends = [lane.getShape(link[0][0])[-1] if link else None for link in links]
            self.heads[tls] = ends
        end, now = sumo.simulation.getEndTime(), sumo.simulation.getTime()
        self.middle = (now + end) / 2

    def shoot(self):
        sumo, shots = self.sumo, self.frames["shots"]
        now = sumo.simulation.getTime()
        if now < self.middle or len(shots) >= FRAMES:
            return
        car = sumo.vehicle
        cars = [(*car.getPosition(v), car.getSpeed(v)) for v in car.getIDList()]
        heads = []
        for tls, ends in self.heads.items():
            state = sumo.trafficlight.getRedYellowGreenState(tls)
            heads += [(*end, letter) for end, letter in zip(ends, state) if end]
        shots.append((now, cars, heads))


# ------------------------------------------------------------------------------------------ results
def interval_of(values) -> tuple[float, float]:
    """Mean and half width of its 95 % interval (Student's t); one value has none: NaN."""
    from scipy.stats import t

    values = np.asarray(values, float)
    n = len(values)
    if n < 2:
        return float(values.mean()), math.nan
    width = t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n)
    return float(values.mean()), float(width)


def summarise(runs: pd.DataFrame) -> list[dict]:
    """A row a controller, best first.

    With a policy, `difference`: the controller's delay less the policy's on the same seed.
    """
    delays = runs.pivot(index="seed", columns="controller", values="delay")
    rows = []
    for name, group in runs.groupby("controller"):
        mean, width = interval_of(group["delay"])
        row = {"controller": name, "delay": mean, "delay_95": width}
        if POLICY in delays and name != POLICY:
            paired = interval_of(delays[name] - delays[POLICY])
            row |= dict(zip(("difference", "difference_95"), paired))
        columns = [c for c in COLUMNS if c not in ("delay", "teleports")]
        row |= {c: float(group[c].mean()) for c in columns}
        rows.append(row | {"teleports": int(group["teleports"].sum())})
    return sorted(rows, key=lambda row: row["delay"])


def with_interval(row: dict, name: str) -> str:
    if name not in row:
        return ""
    width = row[f"{name}_95"]
    sign = "+" if name == "difference" else ""
    return f"{row[name]:{sign}.1f}" + ("" if math.isnan(width) else f" ± {width:.1f}")


def print_table(rows: list[dict], title: str):
    from rich.console import Console
    from rich.table import Table

    caption = "delay: time loss and departure delay a vehicle, stops: a vehicle; ± 95 %"
    table = Table(title=title, caption=caption)
    table.add_column("controller", no_wrap=True)
    for head in ("delay s", "less policy's", "stops", "arrived", "teleports"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["controller"],
            with_interval(row, "delay"),
            with_interval(row, "difference"),
            f"{row['stops']:.2f}",
            f"{row['throughput']:.0f} of {row['wanted']:.0f}",
            str(row["teleports"]),
            style="bold" if row["controller"] == POLICY else None,
        )
    Console().print(table)


def draw(runs: pd.DataFrame, rows: list[dict], title: str, path: Path):
    """A line a controller: every seed, the mean and its interval."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    fig, ax = plt.subplots(figsize=(8, 0.5 * len(rows) + 1.5), layout="constrained")
    for y, row in enumerate(rows):
        color = "tab:red" if row["controller"] == POLICY else "tab:blue"
        values = runs.loc[runs["controller"] == row["controller"], "delay"]
        ax.plot(values, [y] * len(values), ".", color=color, alpha=0.35)
        ax.errorbar(row["delay"], y, xerr=row["delay_95"], fmt="o", color=color, capsize=4)
    ax.set_yticks(range(len(rows)), [row["controller"] for row in rows])
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")
    ax.set_xlabel("time loss and departure delay, s a vehicle (dots: seeds; bars: 95 %)")
    ax.set_title(title)
    ax.grid(axis="x", alpha=0.3)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def animate(recorded: dict, path: Path):
    """{controller: frames} side by side; vehicles by speed, links by signal."""
    import matplotlib.pyplot as plt
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.collections import LineCollection

    fig, axes = plt.subplots(1, len(recorded), figsize=(10, 5), layout="constrained")
    drawn = []
    for ax, (name, frames) in zip(axes, recorded.items()):
        ax.add_collection(LineCollection(frames["streets"], colors="0.8", linewidths=1))
        heads = ax.scatter([], [], s=14, marker="s", zorder=2)
        cars = ax.scatter([], [], s=9, c=[], cmap="RdYlGn", vmin=0, vmax=14, zorder=3)
        ax.autoscale()
        ax.set_aspect("equal")
        ax.set_axis_off()
        drawn.append((ax, name, frames["shots"], heads, cars))
    colors = {"G": "tab:green", "g": "tab:green", "y": "gold"}

    def show(k):
        for ax, name, shots, heads, cars in drawn:
            now, at, lights = shots[k]
            at = np.array(at).reshape(-1, 3)
            cars.set_offsets(at[:, :2])
            cars.set_array(at[:, 2])
            heads.set_offsets([light[:2] for light in lights])
            heads.set_color([colors.get(light[2], "tab:red") for light in lights])
            standing = int((at[:, 2] < 0.1).sum())
            ax.set_title(f"{name}, second {now:.0f}: {standing} of {len(at)} vehicles stand")

    count = min(len(shots) for _, _, shots, _, _ in drawn)
    movie = FuncAnimation(fig, show, count)
    movie.save(path, PillowWriter(fps=8), dpi=80)
    plt.close(fig)


# --------------------------------------------------------------------------------------------- main
def in_workers(function, tasks: list, workers: int):
    """function(task) of every task as it ends, each in a process of its own: libsumo holds one
    simulation."""
    context = worker_context(MODULE)
    single = dict(mp_context=context, max_tasks_per_child=1, initializer=be_a_worker)
    with ProcessPoolExecutor(workers, **single) as pool:
        futures = [pool.submit(function, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise CheckFailed("SUMO ended its process: try one seed with sumo itself") from None
        finally:  # an error ends the rest; those that run are waited for
            for future in futures:
                future.cancel()


def check_installed():
    for name in ("libsumo", "sumo", "sumolib"):
        why = f"{name} is not installed: python -m pip install -r requirements-sumo.txt"
        refuse((find_spec(name) is None, why))
    import sumo

    os.environ.setdefault("SUMO_HOME", sumo.SUMO_HOME)


def read_run(args: Args) -> tuple[str, dict]:
    """Checkpoint of the run and what it holds."""
    path = Path(args.run_dir) / "checkpoints" / "best.pt"
    refuse((not path.is_file(), f"{path}: no such file: RUN_DIR must be a run that has ended"))
    return str(path), arz.load_run(path, Path(arz.__file__), arz.SCHEMA)


def read_map(config: str, cell_length: float) -> tuple[Network, object]:
    from common.maps import read_both

    return read_both(config, dx=cell_length)


def main(argv: list[str] | None = None) -> dict:
    """Simulate, measure, report; returns what transfer.json holds."""
    argv = sys.argv[1:] if argv is None else [str(a) for a in argv]
    if argv and not argv[0].startswith("-"):
        argv = ["--run-dir", *argv]
    args, _ = parse_args(Args, argv)
    check_installed()
    config = Path(args.sumocfg)
    refuse((not config.is_file(), f"--sumocfg {config}: no such file"))
    checkpoint, interval, cell_length = "", args.decision_interval, arz.CELL_LENGTH
    if args.run_dir:
        checkpoint, state = read_run(args)
        interval = state["args"]["decision_interval"]
        cell_length = state["args"]["cell_length"]
    net, layout = read_map(str(config), cell_length)
    if args.run_dir:
        there, here = state["data"]["sha256"], net.sha256()
        why = f"{args.run_dir} was trained on another network ({there[:12]}) than {config} gives"
        refuse((there != here, f"{why} ({here[:12]}): train with --network {config}"))
    found = next(in_workers(probe, [str(config)], 1))
    refuse(
        (found["end"] <= found["begin"], f"{config}: gives no end: add <end value=.../>"),
        (found["removes"], f"{config}: removes vehicles on their way: drop {found['removes']}"),
    )

    default = f"{args.run_dir}/sumo" if args.run_dir else f"runs/sumo_{config.stem}"
    out = Path(args.out or default)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        cases = cases_of(args, net, layout, interval, checkpoint, found, Path(folder))
        played = list(progress(in_workers(play, cases, args.workers), len(cases)))
    frames = {row["controller"]: row["frames"] for row in played if row["frames"]}
    runs = pd.DataFrame(played).drop(columns="frames").sort_values(["controller", "seed"])
    rows = summarise(runs)
    title = f"{config.stem}: {found['version']}, {args.seeds} seeds"
    report = {
        "sumocfg": str(config),
        "run_dir": args.run_dir,
        "network_sha256": net.sha256(),
        "sumo": found["version"],
        "seconds": found["end"] - found["begin"],
        "decision_interval": interval,
        "seeds": args.seeds,
        "columns": COLUMNS,
        "controllers": rows,
    }
    write_json_atomic(report, out / "transfer.json")
    with whole_file(out / "runs.csv") as half:
        runs.to_csv(half, index=False)
    with whole_file(out / "transfer.png") as half:
        draw(runs, rows, title, half)
    if args.video:
        with whole_file(out / "transfer.gif") as half:
            animate({name: frames[name] for name in (OWN, POLICY)}, half)
    print_table(rows, title)
    for row in rows:
        if row["teleports"]:
            print(f"{row['controller']}: SUMO moved {row['teleports']} vehicles that were stuck")
    print(f"results: {out}")
    return report | {"exit_code": 0}


def cases_of(args: Args, net, layout, interval, checkpoint, found, folder: Path) -> list[Case]:
    """Every controller on every seed."""
    names = ([POLICY] if args.run_dir else []) + list(CONTROLLERS)
    min_green = {layout.tls[n][0]: s for n, s in zip(net.nodes, net.min_green)}
    cases = []
    for name in names:
        additional = ""
        if name in SUMO_TYPES:
            path = folder / f"{name}.add.xml"
            write_programs(path, SUMO_TYPES[name], found["programs"], min_green)
            additional = ",".join(filter(None, (found["additional"], str(path))))
        for seed in range(1, args.seeds + 1):
            record = args.video and seed == 1 and name in (POLICY, OWN)
            about = str(Path(args.sumocfg)), net, layout, name, seed, interval
            cases.append(Case(*about, checkpoint, additional, record))
    return cases


def progress(results, total: int):
    from rich.progress import track

    return track(results, "SUMO", total=total)


if __name__ == "__main__":
    exit_with(main)
