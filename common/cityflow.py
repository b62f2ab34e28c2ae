"""CityFlow's roadnets and flows as networks, the way of common/maps.py.

from common.cityflow import read_cityflow
net = read_cityflow("roadnet.json", ["flow.json"])  # or without, with a demand to edit
"""

import json
import math
from collections import Counter
from pathlib import Path

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


def read_cityflow(path, demand=(), dx: float = CELL_LENGTH) -> Network:
    """CityFlow's roadnet.json, and its flow.json or a demand JSON -> Network.

    Without either a NAME.demand.json is written beside it (default_demand).
    """
    path, notes = Path(path), []
    net = read_json(path)
    try:
        plan = cityflow_map(path, net)
    except (KeyError, TypeError, IndexError) as e:
        raise NetworkError(f"{path}: not a roadnet of CityFlow: {e!r} is missing or odd") from None
    if not plan.roads or not plan.links:
        raise NetworkError(f"{path}: {len(plan.roads)} roads and {len(plan.links)} lane links")
    notes.append("turns of CityFlow: nobody gives way at a green")
    demand = [Path(one) for one in demand]
    flows = [read_json(one) for one in demand]
    if demand and all(isinstance(flow, list) for flow in flows):
        return draw(plan, cityflow_trips(plan, demand, flows), notes, dx)[0]
    beside = demand[0] if demand else path.with_name(path.stem + ".demand.json")
    return draw(plan, default_demand(plan, beside, notes), notes, dx)[0]


def read_json(path: Path):
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as e:
        raise NetworkError(f"{path}: line {e.lineno}: not JSON: {e.msg}") from None


def cityflow_map(path: Path, net: dict) -> Map:
    roads, links, programs = {}, [], {}
    for road in net["roads"]:
        points = tuple((float(p["x"]), float(p["y"])) for p in road["points"])
        length = sum(math.dist(a, b) for a, b in zip(points, points[1:]))
        name = road["id"]
        lanes = tuple(((f"{name}_{k}", length),) for k in range(len(road["lanes"])))
        limit = max(lane["maxSpeed"] for lane in road["lanes"])
        ends = road["startIntersection"], road["endIntersection"]
        roads[name] = Road(*ends, length, limit, lanes, len(lanes), points)
    for node in net["intersections"]:
        light = (node.get("trafficLight") or {}).get("lightphases") or []
        signal = node["id"] if len(light) > 1 and not node.get("virtual") else ""
        if signal:
            programs[signal] = cityflow_program(light, len(node["roadLinks"]))
        for index, way in enumerate(node.get("roadLinks", [])):
            for lane in way["laneLinks"]:
                a, b = way["startRoad"], way["endRoad"]
                into = roads[b].lanes[lane["endLaneIndex"]][0][0]
                at, own = lane["startLaneIndex"], frozenset([len(links)])
                speed = roads[a].limit
                links.append(Link(a, at, b, into, speed, signal, index, frozenset(), own))
    return Map(str(path), roads, links, programs)


def cityflow_program(light: list, number: int) -> Program:
    """A phase whose links are green in every phase is the pause after each of the others."""
    always = set.intersection(*(set(phase["availableRoadLinks"]) for phase in light))
    pauses = [phase["time"] for phase in light if set(phase["availableRoadLinks"]) == always]
    pause = min(pauses, default=AMBER)
    phases = []
    for phase in light:
        green = set(phase["availableRoadLinks"])
        if green == always:
            continue
        state = "".join("G" if k in green else "r" for k in range(number))
        between = "".join("G" if k in always else "y" if k in green else "r" for k in range(number))
        phases += [(float(phase["time"]), state, None), (float(pause), between, None)]
    return Program(0.0, tuple(phases))


def cityflow_trips(plan: Map, paths: list, flows: list) -> Trips:
    routes, seconds, space, headway, total = Counter(), 0.0, 0.0, 0.0, 0
    for path, rows in zip(paths, flows):
        for k, row in enumerate(rows, 1):
            at = f"{path}: flow {k}"
            try:
                edges = cityflow_route(plan, row["route"], at)
                vehicle, every = row["vehicle"], row["interval"]
                first, last = row["startTime"], row["endTime"]
                room, pause = vehicle["length"] + vehicle["minGap"], vehicle["headwayTime"]
            except (KeyError, TypeError) as e:
                raise NetworkError(f"{at}: {e!r} is missing or odd") from None
            if not every > 0 or first < 0:
                raise NetworkError(
                    f"{at}: interval {every!r} must be > 0, startTime {first!r} >= 0"
                )
            last = max(3599.0, first) if last < 0 else last
            for n in range(int((last - first) // every) + 1):
                routes[edges, int((first + n * every) // BIN), "car"] += 1
                total, space, headway = total + 1, space + room, headway + pause
            seconds = max(seconds, last + 1)
    if not total:
        raise NetworkError(f"{paths[0]}: no flows")
    # CityFlow's headway is a safety time at speed, as SUMO's tau is
    return Trips(routes, 0.0, BIN * math.ceil(seconds / BIN), space / total, headway / total)


def cityflow_route(plan: Map, given: list, at: str) -> tuple:
    """The roads of a route; between two that do not touch the fastest way."""
    for road in given:
        if road not in plan.roads:
            raise NetworkError(f"{at}: no road {road!r}{near(road, plan.roads)}")
    linked = {(link.source, link.target) for link in plan.links}
    edges = list(given[:1])
    for a, b in zip(given, given[1:]):
        between = (a, b) if (a, b) in linked else fastest_ways(plan, [a])[a].get(b)
        if between is None:
            raise NetworkError(f"{at}: no way from road {a} to {b}")
        edges += between[1:]
    return tuple(edges)
