"""CityFlow's roadnets and flows as networks, the way of common/maps.py.

from common.cityflow import read_cityflow
net = read_cityflow("roadnet.json", ["flow.json"])  # or without, with a demand to edit
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.maps import (
    AMBER,
    BIN,
    Link,
    Map,
    Program,
    Road,
    Trips,
    default_demand,
    draw,
    fastest_ways,
)
from common.networks import CELL_LENGTH, Network, NetworkError, near, read_text

LAST = 3599.0  # s, of a flow without an end
OFTEN, LONG = 0.01, 1e6  # s between vehicles, s of a flow: beyond them is a slip
ODD = KeyError, TypeError, IndexError, AttributeError, ValueError  # of JSON that is something else


def read_cityflow(path, demand=(), dx: float = CELL_LENGTH) -> Network:
    """CityFlow's roadnet.json, and its flow.json or a demand JSON -> Network.

    Without either a NAME.demand.json is written beside it (default_demand).
    """
    path, notes = Path(path), []
    net = read_json(path)
    try:
        plan = cityflow_map(path, net)
    except ODD as e:
        raise NetworkError(f"{path}: not a roadnet of CityFlow: {missing(e)}") from None
    if not plan.roads or not plan.links:
        raise NetworkError(f"{path}: {len(plan.roads)} roads and {len(plan.links)} lane links")
    notes.append("turns of CityFlow: nobody gives way at a green")
    files = [Path(file) for file in demand]
    flows = [read_json(file) for file in files]
    if flows and all(isinstance(flow, list) for flow in flows):
        trips = cityflow_trips(plan, files, flows)
    else:
        beside = path.with_name(path.stem + ".demand.json")
        chosen = files[0] if files else beside
        trips = default_demand(plan, chosen, notes)
    return draw(plan, trips, notes, dx)[0]


def read_json(path: Path):
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as e:
        raise NetworkError(f"{path}: line {e.lineno}: not JSON: {e.msg}") from None
    except RecursionError:
        raise NetworkError(f"{path}: brackets within brackets, hundreds deep") from None


def missing(error: Exception) -> str:
    """What an error of ODD says of the JSON."""
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def cityflow_map(path: Path, net: dict) -> Map:
    roads = {road["id"]: cityflow_road(road) for road in net["roads"]}
    if len(roads) < len(net["roads"]):
        raise ValueError("a road's id is there twice")
    links, programs = [], {}
    for node in net["intersections"]:
        signal = ""
        light = node.get("trafficLight") or {}
        phases = light.get("lightphases") or []
        ways = node.get("roadLinks", [])
        if len(phases) > 1 and not node.get("virtual"):
            signal = node["id"]
            programs[signal] = cityflow_program(signal, phases, len(ways))
        for index, way in enumerate(ways):
            for pair in way["laneLinks"]:
                link = cityflow_link(roads, way, pair)
                number = frozenset([len(links)])
                links.append(link._replace(signal=signal, index=index, numbers=number))
    return Map(str(path), roads, links, programs)


def cityflow_road(road: dict) -> Road:
    points = tuple((float(p["x"]), float(p["y"])) for p in road["points"])
    length = sum(map(math.dist, points, points[1:]))
    lanes = road["lanes"]
    limit = max(lane["maxSpeed"] for lane in lanes)
    if not limit > 0:
        raise ValueError(f"{road['id']}: maxSpeed {limit}")
    return Road(
        road["startIntersection"],
        road["endIntersection"],
        length,
        limit,
        tuple(((lane_id(road["id"], k), length),) for k in range(len(lanes))),
        len(lanes),
        points,
    )


def lane_id(road: str, lane: int) -> str:
    return f"{road}_{lane}"


def cityflow_link(roads: dict, way: dict, pair: dict) -> Link:
    source, target = way["startRoad"], way["endRoad"]
    lane, into = pair["startLaneIndex"], pair["endLaneIndex"]
    for road, number in ((source, lane), (target, into)):
        if not 0 <= number < len(roads[road].lanes):
            raise IndexError(f"{road}: lane {number}")
    nobody = frozenset()
    speed = roads[source].limit
    return Link(source, lane, target, lane_id(target, into), speed, "", 0, nobody, nobody)


def cityflow_program(node: str, light: list, number: int) -> Program:
    """A phase whose links are green in every phase is the pause after each of the others."""
    greens = [set(phase["availableRoadLinks"]) for phase in light]
    seconds = [float(phase["time"]) for phase in light]
    odd = set().union(*greens) - set(range(number))
    if odd or not min(seconds) > 0:
        raise ValueError(f"{node}: lightphases: roadLinks {sorted(odd)}, times {seconds}")
    always = set.intersection(*greens)
    pauses = [s for s, green in zip(seconds, greens) if green == always]
    pause = min(pauses, default=AMBER)
    phases = []
    for s, green in zip(seconds, greens):
        if green == always:
            continue
        state = ["r"] * number
        for link in green:
            state[link] = "G"
        after = state.copy()
        for link in green - always:
            after[link] = "y"
        phases.append((s, "".join(state), None))
        phases.append((pause, "".join(after), None))
    return Program(0.0, tuple(phases))


class Flow(NamedTuple):
    route: list
    departs: np.ndarray  # (vehicles,) s
    end: float  # s
    space: float  # m that a standing vehicle takes
    headway: float  # s


def read_flow(row: dict, at: str) -> Flow:
    try:
        vehicle = row["vehicle"]
        space = float(vehicle["length"] + vehicle["minGap"])
        # a safety time at speed, as SUMO's tau is
        headway = float(vehicle["headwayTime"])
        every, first = float(row["interval"]), float(row["startTime"])
        last, route = float(row["endTime"]), list(row["route"])
    except ODD as e:
        raise NetworkError(f"{at}: {missing(e)}") from None
    if not every >= OFTEN or not 0 <= first <= LONG or not last <= LONG:
        raise NetworkError(
            f"{at}: interval {every:g} must be >= {OFTEN:g}, startTime {first:g} and "
            f"endTime {last:g} from 0 (no end: -1) to {LONG:g}"
        )
    if last < 0:
        last = max(LAST, first)
    count = max(0, int((last - first) // every) + 1)
    departs = first + every * np.arange(count)
    return Flow(route, departs, last + 1, space, headway)


def cityflow_trips(plan: Map, paths: list, tables: list) -> Trips:
    routes, flows = Counter(), []
    for path, rows in zip(paths, tables):
        for k, row in enumerate(rows, 1):
            at = f"{path}: flow {k}"
            flow = read_flow(row, at)
            edges = cityflow_route(plan, flow.route, at)
            for number in flow.departs // BIN:
                routes[edges, int(number), "car"] += 1
            flows.append(flow)
    counts = [len(flow.departs) for flow in flows]
    if not sum(counts):
        raise NetworkError(f"{paths[0]}: no vehicle departs")
    space = np.average([flow.space for flow in flows], weights=counts)
    headway = np.average([flow.headway for flow in flows], weights=counts)
    bins = math.ceil(max(flow.end for flow in flows) / BIN)
    return Trips(routes, 0.0, BIN * bins, float(space), float(headway))


def cityflow_route(plan: Map, given: list, at: str) -> tuple:
    """The roads of a route; between two that do not touch the fastest way."""
    for road in given:
        if road not in plan.roads:
            raise NetworkError(f"{at}: no road {road!r}{near(road, plan.roads)}")
    if not given:
        raise NetworkError(f"{at}: its route is empty")
    linked = {(link.source, link.target) for link in plan.links}
    edges = list(given[:1])
    for a, b in zip(given, given[1:]):
        between = (a, b)
        if between not in linked:
            between = fastest_ways(plan, [a])[a].get(b)
        if between is None:
            raise NetworkError(f"{at}: no way from road {a} to {b}")
        edges += between[1:]
    return tuple(edges)
