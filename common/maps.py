"""Road maps of other programs as networks: SUMO here, CityFlow and edge tables beside.

from common.maps import read_sumo
net = read_sumo("cologne8.sumocfg")  # or read_sumo("MAP.net.xml", ["MAP.rou.xml"])

Lane groups are segments: the lanes of an edge whose links turn the same way and have the same
greens.

    read_net    .net.xml -> Map: roads, links between their lanes, programs
    read_trips  demand -> Trips: how many vehicles drive each route from each minute on
    Ways        both -> only the roads that vehicles use, rows of them joined, short ones merged
    Drawing     Ways -> lane groups, and from them parts, turns, signals, gaps and demand
    draw        all of it -> Network, and Layout: what its parts are in SUMO

What has no counterpart is in net.notes, with what became of it. A picture of what was read:
python scripts/draw_map.py MAP.net.xml
"""

import gzip
import heapq
import json
import math
import os
import subprocess
import tempfile
from collections import Counter, defaultdict
from functools import cache
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from common.networks import (
    CELL_LENGTH,
    Network,
    NetworkError,
    Part,
    Signal,
    Turn,
    assemble,
    check_shape,
    near,
    read_bytes,
    read_plan,
)

BIN = 60.0  # s of a bin of the demand: in bins of 300 s a queue's random part is lost, docs/maps.md
SHORTEST = 10.0  # m: shorter roads are joined to a neighbour
POCKET = 200.0  # m before a stop line in which vehicles stand in the lanes of their turn
# s, critical gap and follow-up time of those who give way: docs/maps.md
GAP_AT_GREEN, GAP = (5.2, 2.5), (4.5, 2.5)
HEADWAY = 1.0  # s, of the SUMO driver (tau), where a vehicle type gives none
# measured in SUMO under the maps' own programs, docs/maps.md
REACTION = 0.4  # s that a queue adds to the driver's headway
START_LOSS = 1.5  # s of a green in which a queue does not move yet
AMBER_USED = 1.0  # s of amber in which it still moves; the simulator is open in all of it
SPACE = {"car": 7.5, "bus": 14.5, "truck": 9.6, "motorcycle": 4.7, "moped": 4.6}  # m, with gap
AMBER = 3.0  # s, where a map has none
DEFAULT_FLOW = 200.0  # veh/h and lane where a map comes without demand
RARE_TURN = 0.02  # of a road's vehicles: rarer turns are cut out of their routes
RARE = 0.03  # of the vehicles of lanes: turns below it count as the rest
THINNEST = 0.1  # lanes of a part
LEAST_GREEN = 5.0  # s, where a program gives no minDur (that of SUMO)
SEED = 1  # of SUMO where it gives trips their routes
TWO_WHEELS = {"motorcycle", "moped"}
NO_CARS = {"pedestrian", "bicycle", "scooter", "wheelchair", "container", "ship"}
ON_RAILS = {"tram", "rail_urban", "rail", "rail_electric", "rail_fast", "subway", "cable_car"}
SUMOS_TYPES = {"DEFAULT_BIKETYPE": "bicycle", "DEFAULT_RAILTYPE": "rail"}  # no vType names them
DEMAND = {"vehicle", "trip", "flow"}
UNREAD = {
    "WAUT": "changes programs by the clock",
    "calibrator": "changes flows by what SUMO measures",
    "variableSpeedSign": "changes limits by the clock",
}
SHORT_NAMES = {"n": "net-file", "net": "net-file", "r": "route-files", "a": "additional-files"}
SHORT_NAMES |= {"b": "begin", "e": "end"}  # of a configuration
# what a configuration may ask that moves routes or departures
ROUTING = ("scale", "junction-taz", "ignore-route-errors", "time-to-teleport", "step-length")
ROUTING += ("device.rerouting.", "routing-algorithm")


class Road(NamedTuple):
    """A stretch without a choice; several edges of the map in a row."""

    start: str
    end: str
    length: float  # m
    limit: float  # m/s
    lanes: tuple  # of ((lane id, length in m), ...), one a lane, upstream first
    width: float  # lanes on most of its length
    shape: tuple


class Link(NamedTuple):
    """A way from a lane into the next road."""

    source: str
    lane: int  # of the source, 0 is the rightmost
    target: str
    into: str  # lane id of the target
    speed: float  # m/s over the junction
    signal: str  # "" none
    index: int  # of the signal's state
    over: frozenset  # links (their numbers in the map) that this one gives way to
    numbers: frozenset  # its own numbers


class Program(NamedTuple):
    offset: float
    phases: tuple  # of (seconds, state, least seconds or None)


class Ride(NamedTuple):
    depart: float | None  # s, None: when a person comes
    edges: tuple
    kind: str | None  # its vType


class Trips(NamedTuple):
    routes: Counter  # {(edges, number of the bin, class): vehicles}
    begin: float  # s, on SUMO's clock
    seconds: float  # of the demand
    space: float  # m that a standing vehicle takes
    headway: float  # s, of the driver


class Layout(NamedTuple):
    """What a Network's parts are in SUMO."""

    lanes: dict  # part -> ((lane id, from m, to m, m along the part where it begins), ...)
    tls: dict  # signal -> (tls id, state strings of its phases)
    weight: dict  # part -> share of the vehicles of its lanes: < 1 where turns share a lane


class Group(NamedTuple):
    """Lanes of a road that turn alike: a segment."""

    name: str
    road: str
    lanes: tuple  # numbers
    width: float  # lanes; a part of one where turns share it
    flows: dict  # {next road: vehicles}
    ways: dict  # {(next road, its group or ""): vehicles}
    links: tuple
    shows: tuple = ()  # (signal, what it shows in each green phase)


# ------------------------------------------------------------------------------------ SUMO's files
@cache
def sumo():
    """sumolib, with the programs of the wheel eclipse-sumo."""
    try:
        import sumo as programs
        import sumolib
    except ModuleNotFoundError as e:
        raise NetworkError(
            f"a SUMO map needs {e.name}: pip install -r requirements-sumo.txt"
        ) from None
    os.environ.setdefault("SUMO_HOME", programs.SUMO_HOME)
    return sumolib


def parse_xml(path: Path, *roots: str):
    """The element on top, which must be one of roots; any where none is given. Reads .gz too."""
    raw = read_bytes(path)
    try:
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        tree = ElementTree.fromstring(raw)
    except (OSError, EOFError) as e:
        raise NetworkError(f"{path}: not gzip: {e}") from None
    except (LookupError, ValueError) as e:
        raise NetworkError(f"{path}: not XML: {e}") from None
    except ElementTree.ParseError as e:
        line, column = e.position
        raise NetworkError(f"{path}: line {line}, column {column}: not XML: {e.msg}") from None
    if roots and tree.tag not in roots:
        names = " or ".join(f"<{root}>" for root in roots)
        raise NetworkError(f"{path}: begins with <{tree.tag}>, must be {names}")
    return tree


class Files(NamedTuple):
    net: Path
    demand: tuple
    additional: tuple
    begin: float | None
    end: float | None
    options: tuple = ()  # of (name, value): what the configuration asks of ROUTING


def find_files(path, demand=()) -> Files:
    """A .net.xml and its demand, or a .sumocfg that names both."""
    path = Path(path)
    if path.suffix != ".sumocfg":
        return Files(path, tuple(map(Path, demand)), (), None, None)
    # the second name is that of SUMO 1.20 and later
    tree = parse_xml(path, "configuration", "sumoConfiguration")
    given = {SHORT_NAMES.get(e.tag, e.tag): e.get("value", e.get("v")) for e in tree.iter()}
    if "net-file" not in given:
        raise NetworkError(f"{path}: no net-file")
    named = {}
    for key in ("route-files", "additional-files"):
        names = (given.get(key) or "").split(",")
        named[key] = tuple(path.parent / name.strip() for name in names if name.strip())
    times = []
    for key in ("begin", "end"):
        seconds = seconds_of(given.get(key), f"{path}: {key}")
        # SUMO's -1: no limit
        times.append(seconds if seconds is None or seconds >= 0 else None)
    options = tuple(pair for pair in given.items() if pair[0].startswith(ROUTING))
    return Files(
        path.parent / given["net-file"],
        tuple(map(Path, demand)) or named["route-files"],
        named["additional-files"],
        *times,
        options,
    )


def seconds_of(text, at: str) -> float | None:
    """SUMO's times: seconds, or [days:]hours:minutes:seconds."""
    if text is None:
        return None
    try:
        parts = [float(part) for part in text.split(":")]
        parts = [0.0] * (4 - len(parts)) + parts
        days, hours, minutes, seconds = parts
    except ValueError:
        raise NetworkError(f"{at}: {text!r} is not a time") from None
    return 86400 * days + 3600 * hours + 60 * minutes + seconds


def read_trips(files: Files, notes: list) -> Trips:
    """Vehicles with the routes of the files; trips with those that SUMO gives them.

    SUMO sends a trip the fastest way at the speeds of the last three minutes. That of the empty map
    is another: on ingolstadt21 two vehicles of three drive round a queue. So SUMO runs the demand
    once, under the map's own program.
    """
    trees = [parse_xml(path, "routes", "additional") for path in files.demand]
    for path, tree in zip(files.demand, trees):
        check_order(path, tree)
    trees += map(parse_xml, files.additional)  # SUMO takes any name on top
    elements = [e for tree in trees for e in tree.iter()]
    stops = sum(e.tag in DEMAND and e.find(".//stop") is not None for e in elements)
    if stops:
        notes.append(f"{stops} vehicles and flows with stops: they drive on")
    with tempfile.TemporaryDirectory() as folder:
        copies = [copy_quiet(path, folder) for path in files.additional]
        quiet = files._replace(additional=tuple(copies))
        planned = Path(folder, "planned.xml")
        run_sumo("duarouter", quiet, "-o", planned, "--alternatives-output", "NUL")
        trees.append(ElementTree.parse(planned).getroot())
        rides = {e.get("id"): as_ride(e) for e in trees[-1].iter("vehicle")}
        waits = any(ride.depart is None for ride in rides.values())
        if waits or any(map(is_open, elements)):
            # SUMO numbers the vehicles of a flow in its own way
            own = waits or any(e.tag == "flow" or e.get("line") for e in elements)
            rides = simulate(quiet, folder, rides, own)
            notes.append("trips drive as SUMO routes them under the map's own program")
    people = sum(e.tag in ("person", "container") for e in trees[-1])
    kinds = {e.get("id"): e for tree in trees for e in tree.iter("vType")}
    return count_trips(list(rides.values()), kinds, people, files, notes)


def as_ride(vehicle) -> Ride:
    """A vehicle with its route; of several it drove the last."""
    *_, route = vehicle.iter("route")
    edges = tuple(route.get("edges").split())
    text = vehicle.get("depart")
    return Ride(float(text) if is_time(text) else None, edges, vehicle.get("type"))


def simulate(files: Files, folder: str, planned: dict, own: bool) -> dict:
    """{vehicle: Ride} as SUMO inserts and routes them; those that it never inserted as planned.

    own: who drives, and when, is SUMO's to say (it costs an eighth of the time); else as planned.
    """
    routes, trips = Path(folder, "routes.xml"), Path(folder, "trips.xml")
    flags = ["--vehroute-output", routes, "--vehroute-output.write-unfinished", "--seed", SEED]
    if own:
        flags += ["--tripinfo-output", trips, "--tripinfo-output.write-unfinished"]
        flags += ["--tripinfo-output.write-undeparted"]
    run_sumo("sumo", files, *flags)
    driven = {e.get("id"): as_ride(e) for e in ElementTree.parse(routes).iter("vehicle")}
    if not own:
        for name in planned.keys() & driven.keys():
            planned[name] = planned[name]._replace(edges=driven[name].edges)
        return planned
    rides = {}
    for trip in ElementTree.parse(trips).iter("tripinfo"):
        name, depart = trip.get("id"), float(trip.get("depart"))
        if name in driven and depart >= 0:
            wanted = round(depart - float(trip.get("departDelay")), 2)
            rides[name] = driven[name]._replace(depart=wanted, kind=trip.get("vType"))
        elif name in planned:
            rides[name] = planned[name]
    return rides


def check_order(path: Path, tree):
    """SUMO leaves out whoever departs before one that stands above: so its demand is another."""
    last = 0.0
    for e in tree:
        text = e.get("depart", e.get("begin", ""))
        if e.tag in DEMAND and is_time(text):
            now = seconds_of(text, f"{path}: {e.tag} {e.get('id')}")
            if now < last:
                raise NetworkError(
                    f"{path}: {e.tag} {e.get('id')} departs at {now:g} s but stands below one of "
                    f"{last:g} s: SUMO leaves it out: sort the file by departure"
                )
            last = last if e.get("line") else now


def is_time(text: str) -> bool:
    """Whether a departure is a moment: not "triggered", "begin" or "split"."""
    return text[:1].isdigit()


def is_open(e) -> bool:
    """Whether only a simulation knows where or when an element's vehicles drive."""
    if e.tag == "flow" and e.get("route") is None and e.find("route") is None:
        return True
    # duarouter keeps public transport for its persons
    line = e.tag in DEMAND and e.get("line")
    return line or e.tag in ("trip", "rerouter") or e.get("key") == "has.rerouting.device"


def copy_quiet(path: Path, folder: str) -> Path:
    """A copy of an additional file, in a folder of its own, that writes nothing beside the map."""
    tree = parse_xml(path)
    for e in tree.iter():
        for key in {"file", "dest"} & set(e.keys()):
            read = path.parent.resolve() / e.get(key)  # the one that is no output
            e.set(key, str(read) if e.tag == "rerouter" else "NUL")
    copy = Path(tempfile.mkdtemp(dir=folder), path.name.removesuffix(".gz"))
    ElementTree.ElementTree(tree).write(copy, "utf-8")
    return copy


def run_sumo(program: str, files: Files, *options):
    """One of SUMO's programs on a map and its demand."""
    command = [sumo().checkBinary(program), "-n", files.net]
    if files.demand:
        command += ["-r", ",".join(map(str, files.demand))]
    if files.additional:
        command += ["-a", ",".join(map(str, files.additional))]
    for option, value in (("--begin", files.begin), ("--end", files.end)):
        if value is not None:
            command += [option, value]
    for option, value in files.options:
        if program == "sumo" or option in ("scale", "junction-taz"):
            command += [f"--{option}", value]
        elif option == "ignore-route-errors":
            command += ["--ignore-errors", value]
    command += ["--no-step-log", "--no-warnings", *options]
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        names = ", ".join(path.name for path in (files.net, *files.demand))
        why = why_of(done.stderr, files) or f"{program} ended with {done.returncode}"
        raise NetworkError(f"{names}: {why}")


def why_of(stderr: str, files: Files) -> str:
    """The first error that a program of SUMO's names."""
    why = stderr.strip()[-200:]
    errors = [line for line in stderr.splitlines() if line.startswith("Error")]
    if errors:
        why = errors[0].removeprefix("Error: ")
    return nobody(files) if why.startswith("No route input") else why


def nobody(files: Files) -> str:
    return f"no vehicle departs from {files.begin} to {files.end} s: see begin and end"


def count_trips(rides: list, kinds: dict, people: int, files: Files, notes: list) -> Trips:
    """kinds: vTypes by name; people: persons and containers."""
    vehicles, left_out = [], Counter(person=people)
    for depart, edges, name in rides:
        kind = kinds.get(name)
        v_class = SUMOS_TYPES.get(name, "passenger")
        if kind is not None:
            v_class = kind.get("vClass", "passenger")
        if depart is None:
            left_out["triggered"] += 1
        elif v_class in NO_CARS | ON_RAILS:
            left_out[v_class] += 1
        else:
            vehicles.append((depart, edges, v_class, kind))
    for what, count in left_out.items():
        if count:
            notes.append(f"{count} of class {what} left out")
    if not vehicles:
        names = ", ".join(map(str, files.demand))
        raise NetworkError(f"{names}: {nobody(files)}")
    departs = [depart for depart, *_ in vehicles]
    begin, end = files.begin, files.end
    if begin is None:
        begin = min(departs)
    if end is None:
        end = max(departs) + 1
    routes, space, headway = Counter(), 0.0, 0.0
    for depart, edges, v_class, kind in vehicles:
        number = int((depart - begin) // BIN)
        counts_as = "motorcycle" if v_class in TWO_WHEELS else "car"
        routes[edges, number, counts_as] += 1
        space += space_of(kind, v_class)
        headway += HEADWAY if kind is None else float(kind.get("tau", HEADWAY))
    n = len(vehicles)
    return Trips(routes, begin, end - begin, space / n, headway / n)


def space_of(kind, v_class: str) -> float:
    usual = SPACE.get(v_class, SPACE["car"])
    if kind is None:
        return usual
    gap = float(kind.get("minGap", 2.5))
    return float(kind.get("length", usual - 2.5)) + gap


# -------------------------------------------------------------------------------------- SUMO's map
class Map(NamedTuple):
    """A map as it stands in its file."""

    where: str
    roads: dict  # {edge: Road}
    links: list
    programs: dict  # {signal: Program}


def read_net(path: Path, additional=(), notes=None) -> Map:
    tree = parse_xml(path, "net")
    junctions = {e.get("id"): e for e in tree.iter("junction") if e.get("type") != "internal"}
    try:
        net = sumo().net.readNet(str(path), withInternal=True)
    except (KeyError, ValueError, IndexError, AttributeError) as e:
        raise NetworkError(
            f"{path}: a connection, lane or junction names {e}, which the map does not have"
        ) from None
    notes = [] if notes is None else notes
    roads, dropped, bus_lanes = {}, Counter(), 0
    place = {}  # of a SUMO lane among those for cars
    for edge in net.getEdges(withInternal=False):
        lanes = [lane for lane in edge.getLanes() if lane.allows("passenger")]
        if not lanes:
            allowed = edge.getLanes()[0].getPermissions()
            dropped[min(allowed) if allowed else "nobody"] += 1
            continue
        if not edge.getSpeed() > 0:
            raise NetworkError(f"{path}: edge {edge.getID()} has a speed of {edge.getSpeed()} m/s")
        bus_lanes += len(edge.getLanes()) - len(lanes)
        place |= {lane.getID(): k for k, lane in enumerate(lanes)}
        roads[edge.getID()] = Road(
            edge.getFromNode().getID(),
            edge.getToNode().getID(),
            edge.getLength(),
            edge.getSpeed(),
            tuple(((lane.getID(), lane.getLength()),) for lane in lanes),
            len(lanes),
            shape_of(edge),
        )
    for kind, count in dropped.items():
        notes.append(f"{count} edges without cars ({kind}, ...) left out")
    if bus_lanes:
        notes.append(f"{bus_lanes} lanes without cars (buses, bicycles, pavements) left out")
    if not roads:
        raise NetworkError(f"{path}: no edge for cars")
    if net.getRoundabouts():
        notes.append(f"{len(net.getRoundabouts())} roundabouts: edges whose entries give way")
    links = read_links(net, junctions, roads, place)
    crossings = sum(e.get("type") == "rail_crossing" for e in junctions.values())
    if crossings:
        notes.append(f"{crossings} rail crossings: open, trains are left out")
    trees = {path: tree} | {extra: parse_xml(extra) for extra in additional}
    programs = read_programs(trees, notes)
    for signal in sorted({link.signal for link in links} - {"", *programs}):
        raise NetworkError(f"{path}: signal {signal} has no program (tlLogic)")
    return Map(str(path), roads, links, programs)


def shape_of(edge) -> tuple:
    try:
        line = edge.getShape()
    except IndexError:  # sumolib's answer to shape=""
        return ()
    return tuple((x, y) for x, y, *_ in line)


def read_links(net, junctions: dict, roads: dict, place: dict) -> list:
    """Links between lanes for cars, each with those that it gives way to.

    junctions: of the map's XML. The links of a junction are numbered by its lanes, then as written.
    """
    links, give_way = [], []
    for junction in junctions.values():
        ways = []
        for lane in junction.get("incLanes").split():
            if lane[0] == ":":
                continue  # inside the junction
            edge = lane[: lane.rindex("_")]
            if net.hasEdge(edge):
                ways += net.getLane(lane).getOutgoing()
        responses = {}
        for request in junction.iter("request"):
            index = int(request.get("index"))
            responses[index] = request.get("response")
        number = {}
        for k, c in enumerate(ways):
            source = c.getFromLane().getID()
            target = c.getToLane().getID()
            if source in place and target in place:
                number[k] = len(links)
                link = as_link(net, c, place, len(links))
                if junction.get("type") == "rail_crossing":  # its barriers have no program
                    link = link._replace(signal="")
                links.append(link)
        for k in number:
            # the last character is link 0's
            bits = responses.get(k, "")[::-1]
            over = [number[j] for j in number if bits[j : j + 1] == "1"]
            give_way.append(frozenset(over))
    return [link._replace(over=over) for link, over in zip(links, give_way)]


def as_link(net, c, place: dict, number: int) -> Link:
    via = c.getViaLaneID()
    speed = net.getLane(via).getSpeed() if via else c.getFromLane().getSpeed()
    return Link(
        c.getFrom().getID(),
        place[c.getFromLane().getID()],
        c.getTo().getID(),
        c.getToLane().getID(),
        speed,
        c.getTLSID() or "",
        c.getTLLinkIndex(),
        frozenset(),
        frozenset([number]),
    )


def read_programs(trees: dict, notes: list) -> dict:
    """Of several programs of a signal the last, as in SUMO: additional files stand behind."""
    programs, types = {}, {}
    for path, tree in trees.items():
        for e in tree.iter():
            if e.tag in UNREAD:
                raise NetworkError(f"{path}: {e.tag} {e.get('id')} {UNREAD[e.tag]}: take it out")
        for logic in tree.iter("tlLogic"):
            name = logic.get("id")
            at = f"{path}: tlLogic {name}"
            phases = [phase_of(phase, at) for phase in logic.iter("phase")]
            offset = seconds_of(logic.get("offset"), f"{at}: offset")
            if "off" in (logic.get("programID"), logic.get("type")):
                raise NetworkError(f"{at} is switched off: take it out, or the signal")
            if phases:
                programs[name] = Program(offset or 0.0, tuple(phases))
                types[name] = logic.get("type", "static")
            elif offset is not None and name in programs:  # it moves the program above
                programs[name] = programs[name]._replace(offset=offset)
    for kind, count in Counter(types.values()).items():
        if kind != "static":
            notes.append(f"{count} signals with {kind} programs: the planned greens count")
    return programs


def phase_of(phase, at: str) -> tuple:
    seconds = seconds_of(phase.get("duration"), f"{at}: duration")
    least = seconds_of(phase.get("minDur"), f"{at}: minDur")
    state = phase.get("state")
    if seconds is None or not state:
        raise NetworkError(f"{at}: a phase needs duration and state")
    return seconds, state, least if least and least > 0 else None


# ------------------------------------------------------------------------------------ fewer roads
class Ways:
    """Roads, links {(road, next road): [Link, ...]} and routes, on their way to fewer of them."""

    def __init__(self, plan: Map, routes: Counter, notes: list):
        self.where = plan.where
        self.programs = plan.programs
        self.notes = notes
        self.routes = self.known_routes(plan.roads, routes)
        self.split_routes(plan)
        self.look()
        self.roads = {name: road for name, road in plan.roads.items() if name in self.used}
        self.links = defaultdict(list)
        for link in plan.links:
            pair = link.source, link.target
            if pair in self.pairs:
                self.links[pair].append(link)
        if len(self.roads) < len(plan.roads):
            unused = len(plan.roads) - len(self.roads)
            notes.append(f"{unused} edges that no vehicle uses left out")

    def known_routes(self, roads: dict, routes: Counter) -> Counter:
        known, lost = Counter(), 0
        for (edges, at, kind), count in routes.items():
            if all(edge in roads for edge in edges):
                known[edges, at, kind] += count
            else:
                lost += count
        if lost:
            self.notes.append(f"{lost:.0f} vehicles left out: their routes use edges without cars")
        if not known:
            raise NetworkError(f"{self.where}: no vehicle's route lies on its edges for cars")
        return known

    def split_routes(self, plan: Map):
        """Vehicles at rare turns leave, and others begin behind: first in, first out is for queues.

        A turn of one vehicle in a hundred would hold up the other 99 where its target is full, and
        one that turns round would lock its street and that street's reverse.
        """
        roads = plan.roads
        of_pair, of_road = Counter(), Counter()
        for (edges, *_), count in self.routes.items():
            for a, b in zip(edges, edges[1:]):
                of_pair[a, b] += count
                of_road[a] += count
        linked = {(link.source, link.target) for link in plan.links}
        for a, b in sorted(set(of_pair) - linked):
            raise NetworkError(f"{plan.where}: no connection for cars from edge {a} to {b}")
        rare = set()
        for (a, b), count in of_pair.items():
            turns_round = is_reverse(roads[a], roads[b])
            if turns_round or count < RARE_TURN * of_road[a]:
                rare.add((a, b))
        split = Counter()
        for (edges, at, kind), count in self.routes.items():
            first, seconds, begun = 0, 0.0, at
            for k, (a, b) in enumerate(zip(edges, edges[1:]), 1):
                road = roads[a]
                seconds += road.length / road.limit
                if (a, b) in rare:
                    split[edges[first:k], begun, kind] += count
                    first = k
                    begun = at + int(seconds // BIN)
            split[edges[first:], begun, kind] += count
        self.routes = split
        total = sum(of_pair[pair] for pair in rare)
        if total:
            self.notes.append(
                f"{total:.0f} vehicles at U-turns and rare turns leave there, "
                "and as many begin behind"
            )

    def look(self):
        """What the routes use: pairs of roads in a row, first and last roads, all of them."""
        self.pairs, self.starts, self.lasts = set(), set(), set()
        self.nexts = defaultdict(set)
        self.befores = defaultdict(set)
        self.used = set()
        for edges in {route[0] for route in self.routes}:
            self.starts.add(edges[0])
            self.lasts.add(edges[-1])
            self.used.update(edges)
            self.pairs.update(zip(edges, edges[1:]))
        for a, b in self.pairs:
            self.nexts[a].add(b)
            self.befores[b].add(a)

    def out_of(self, road: str) -> list[Link]:
        links = []
        for to in sorted(self.nexts[road]):
            links += self.links[road, to]
        return links

    def drop(self, gone: set):
        """Takes roads out of all routes."""
        routes = Counter()
        for (edges, at, kind), count in self.routes.items():
            edges = tuple(e for e in edges if e not in gone)
            routes[edges, at, kind] += count
        self.routes = routes
        self.roads = {name: road for name, road in self.roads.items() if name not in gone}
        self.look()

    def join_rows(self) -> tuple[int, int]:
        """Roads in a row become one -> how many went, how many of them for they were short."""
        gone, short = set(), 0
        alive = set()  # numbers of the links that still exist
        for links in self.links.values():
            alive.update(*(link.numbers for link in links))
        for a in list(self.roads):
            if len(self.nexts[a]) != 1:
                continue
            (b,) = self.nexts[a]
            first = self.roads[a]
            second = self.roads[b]
            tiny = min(first.length, second.length) < SHORTEST
            lanes = len(first.lanes), len(second.lanes)
            alike = lanes[0] == lanes[1] and first.limit == second.limit
            ends_between = b in self.starts or a in self.lasts
            alone = len(self.befores[b]) == 1 and not ends_between
            # a signal or a rival stands between the two
            stops = any(x.signal or x.over & alive for x in self.links[a, b])
            worth = tiny or alike
            if a == b or stops or not alone or not worth:
                continue
            between = self.links.pop((a, b))
            self.roads[b] = in_a_row(first, second, between)
            self.befores[b] = self.befores.pop(a, set())
            for before in self.befores[b]:
                self.nexts[before] = self.nexts[before] - {a} | {b}
                links = self.links.pop((before, a))
                self.links[before, b] = [link._replace(target=b) for link in links]
            if a in self.starts:
                self.starts.add(b)
            gone.add(a)
            short += tiny
        self.drop(gone)
        return len(gone), short

    def bypass(self, road: str):
        """Takes a short road out from between several: those before lead to those behind."""
        between = self.roads[road]
        for a in self.befores[road]:
            longer = self.roads[a].length + between.length
            self.roads[a] = self.roads[a]._replace(length=longer)
            first = self.links.pop((a, road))
            for b in self.nexts[road]:
                second = self.links[road, b]
                for link, behind in product(first, second):
                    over = link.over | behind.over
                    ahead = link._replace(target=b, into=behind.into, over=over)
                    self.links[a, b].append(ahead)
        for b in self.nexts[road]:
            del self.links[road, b]
        # its two ends become one place
        old, new = between.start, between.end
        for name, other in self.roads.items():
            start = new if other.start == old else other.start
            end = new if other.end == old else other.end
            self.roads[name] = other._replace(start=start, end=end)

    def is_between(self, road: str) -> bool:
        """Whether a road may be taken out: traffic passes it, and no signal ends it."""
        at_end = road in self.starts | self.lasts
        return not at_end and not any(link.signal for link in self.out_of(road))

    def shorten(self):
        """Fewer roads: those in a row joined, those that are short merged or stretched."""
        joined, merged = self.join_rows()
        joined -= merged
        while True:
            gone, beside = set(), set()
            for road in sorted(self.roads, key=lambda name: self.roads[name].length):
                neighbours = self.befores[road] | self.nexts[road]
                tiny = self.roads[road].length < SHORTEST and self.is_between(road)
                loops = self.befores[road] & self.nexts[road]
                if tiny and road not in beside and not neighbours & gone and not loops:
                    gone.add(road)
                    beside |= neighbours
            for road in sorted(gone):  # a set's order changes from run to run
                self.bypass(road)
            if not gone:
                break
            self.drop(gone)
            merged += len(gone)
        self.links = {pair: self.links[pair] for pair in self.pairs}
        more, tiny = self.join_rows()
        stretched = [name for name, road in self.roads.items() if road.length < SHORTEST]
        for name in stretched:
            self.roads[name] = self.roads[name]._replace(length=SHORTEST)
        for count, what in (
            (joined + more - tiny, "edges joined to the next one: nobody turns between them"),
            (merged + tiny, f"edges shorter than {SHORTEST:g} m merged with a neighbour"),
            (
                len(stretched),
                f"edges shorter than {SHORTEST:g} m stretched to it: ends and signals",
            ),
        ):
            if count:
                self.notes.append(f"{count} {what}")


def in_a_row(first: Road, second: Road, links: list) -> Road:
    ahead = defaultdict(tuple)  # lane of the second -> the lane that leads into it
    for link in links:
        ahead[link.into] = ahead[link.into] or first.lanes[link.lane]
    seconds = first.length / first.limit + second.length / second.limit
    length = first.length + second.length
    return Road(
        first.start,
        second.end,
        length,
        length / seconds,
        tuple(ahead[lane[0][0]] + lane for lane in second.lanes),
        first.width if first.length > second.length else second.width,
        first.shape + second.shape,
    )


# ------------------------------------------------------------------------------------- lane groups
def greens_of(program: Program) -> list[int]:
    """Numbers of the phases that a policy may choose: something green, nothing amber."""
    return [k for k, (_, state, _) in enumerate(program.phases) if is_green(state)]


def is_green(state: str) -> bool:
    """Whether a phase is one that may be chosen: greens, no amber."""
    return bool(set(state) & set("Gg")) and not set(state) & set("yYu")


def pattern_of(link: Link, programs: dict, where: str) -> tuple:
    """(signal, what a link shows in every green phase); () without a signal.

    A link that is switched off while others are green is open: with priority (O) or without (o).
    """
    if not link.signal:
        return ()
    program = programs[link.signal]
    shown = []
    for k in greens_of(program):
        state = program.phases[k][1]
        if not 0 <= link.index < len(state):
            raise NetworkError(
                f"{where}: signal {link.signal}: state {state} has no link {link.index}"
            )
        shown.append({"o": "g", "O": "G"}.get(state[link.index], state[link.index]))
    if not set(shown) & set("Ggs"):
        raise NetworkError(
            f"{where}: signal {link.signal}: link {link.index} ({link.source} > {link.target}) "
            "is green in no phase, but vehicles take it"
        )
    return (link.signal, "".join(shown))


def spread(flows: dict, lanes: dict) -> dict:
    """Vehicles of each turn over the lanes that allow it, as evenly as they allow.

    flows {target: vehicles}, lanes {target: set of lanes} -> {(lane, target): vehicles}.
    """
    load, placed = Counter(), Counter()
    steps = 40
    for target in sorted(flows, key=lambda to: (len(lanes[to]), to)):
        for _ in range(steps):
            lane = min(sorted(lanes[target]), key=lambda k: load[k])
            load[lane] += flows[target] / steps
            placed[lane, target] += flows[target] / steps
    return placed


def groups_of(name: str, road: Road, here: list, flows: dict, lanes: dict, shown: dict) -> list:
    """Lane groups of a road.

    here: links out of it; flows {way: vehicles} and lanes {way: set of lanes} of its ways on, each
    (next road, its group or ""); shown {(lane, next road): what a signal shows}.
    """
    turns = defaultdict(dict)  # lane -> {way: vehicles}
    for (lane, way), vehicles in spread(flows, lanes).items():
        if vehicles > 0:
            turns[lane][way] = vehicles
    alike = defaultdict(list)  # lanes that show the same for the same turns
    for lane, vehicles in sorted(turns.items()):
        kinds = frozenset((way, shown[lane, way[0]]) for way in vehicles)
        patterns = frozenset(pattern for _, pattern in kinds)
        # under one green the turns need not be the same: what waits, waits together
        same = len(patterns) == 1 and all(patterns)
        key = patterns if same else kinds
        alike[key].append(lane)
    unused = [lane for lane in range(len(road.lanes)) if lane not in turns]
    width = road.width / len(road.lanes)
    groups = []
    for group in alike.values():
        groups += split_turns(name, tuple(group), width, turns, shown, here)
    if len(groups) == 1 and unused:  # one group has all lanes
        lanes = tuple(range(len(road.lanes)))
        groups = [groups[0]._replace(lanes=lanes, width=road.width)]
    return groups


def split_turns(road: str, lanes: tuple, width: float, turns, shown, here) -> list[Group]:
    """One group, or several where turns with different greens share lanes."""
    kinds = defaultdict(Counter)
    for lane in lanes:
        for way, vehicles in turns[lane].items():
            kinds[shown[lane, way[0]]][way] += vehicles
    counts = {kind: sum(flows.values()) for kind, flows in kinds.items()}
    total = sum(counts.values())
    main = max(counts, key=counts.get)
    for kind, count in counts.items():
        if kind != main and count < RARE * total:
            kinds[main].update(kinds.pop(kind))
    numbers = "-".join(map(str, lanes))
    groups = []
    for kind, flows in sorted(kinds.items()):
        share = sum(flows.values()) / total
        targets = Counter()
        for (to, _), vehicles in flows.items():
            targets[to] += vehicles
        links = []
        for link in here:
            member = link.lane in lanes and link.target in targets
            if member and (len(kinds) == 1 or shown[link.lane, link.target] == kind):
                links.append(link)
        name = f"{road}:{numbers}"
        if kind:  # (signal, what it shows)
            name += f":{kind[1]}"
        group = Group(
            name,
            road,
            lanes,
            width * len(lanes) * share,
            dict(targets),
            dict(flows),
            tuple(links),
            kind,
        )
        groups.append(group)
    return groups


# ------------------------------------------------------------------------------------- to a Network
class Drawing:
    """Parts, turns, signals and demand of a map whose roads, links and routes are known."""

    def __init__(self, ways: Ways, trips: Trips):
        self.ways = ways
        self.trips = trips
        self.passes = defaultdict(Counter)  # road -> {(edges of a route, place in it): vehicles}
        for (edges, *_), count in ways.routes.items():
            for k, road in enumerate(edges):
                self.passes[road][edges, k] += count
        self.groups = {}  # of every road
        self.shares = defaultdict(list)  # (road, way on) -> [(group, share of the way)]
        self.sorted = set()  # roads whose lanes lead to groups of the next one
        self.cut = {}  # road -> m before its end where its groups begin
        self.group_signals()
        self.of_link = defaultdict(set)  # number of a link -> its groups
        for group in chain(*self.groups.values()):
            for link in group.links:
                for number in link.numbers:
                    self.of_link[number].add(group.name)

    def group_signals(self):
        """Groups at signals; upstream, as far as POCKET, lanes by the groups they lead to."""
        to_stop = []  # (m from a road's end to a stop line, road)
        for road in self.ways.roads:
            links = self.ways.out_of(road)
            if any(link.signal for link in links):
                self.group(road, 0.0)
                heapq.heappush(to_stop, (0.0, road))
            else:
                self.groups[road] = [self.whole(road, links)]
                for to in self.ways.nexts[road]:
                    self.shares[road, (to, "")] = [(road, 1.0)]
        while to_stop:
            metres, road = heapq.heappop(to_stop)
            metres += self.ways.roads[road].length
            if road in self.cut or len(self.groups[road]) < 2 or metres > POCKET - SHORTEST:
                continue
            for before in sorted(self.ways.befores[road]):
                wide = len(self.ways.roads[before].lanes) > 1
                signal = any(link.signal for link in self.ways.out_of(before))
                if wide and not signal and before not in self.sorted:
                    self.sorted.add(before)
                    self.group(before, metres)
                    heapq.heappush(to_stop, (metres, before))

    def whole(self, road: str, links: list) -> Group:
        """All lanes of a road as one group."""
        flows = Counter()
        for (edges, k), vehicles in self.passes[road].items():
            if k + 1 < len(edges):
                flows[edges[k + 1]] += vehicles
        there = self.ways.roads[road]
        lanes = tuple(range(len(there.lanes)))
        ways = {(to, ""): vehicles for to, vehicles in flows.items()}
        return Group(road, road, lanes, there.width, dict(flows), ways, tuple(links))

    def group(self, name: str, metres: float):
        """Lane groups of a road that ends `metres` before a stop line."""
        road = self.ways.roads[name]
        here = self.ways.out_of(name)
        flows, lanes = Counter(), {}
        for (edges, k), vehicles in self.passes[name].items():
            if k + 1 < len(edges):
                for way, share in self.ways_on(name, edges, k):
                    flows[way] += share * vehicles
        for to, group in flows:
            links = [x for x in here if x.target == to]
            # the first lane id of each lane is where links lead into it
            entries = {pieces[0][0] for pieces in self.lanes_of(to, group)}
            into = [x for x in links if x.into in entries]
            lanes[to, group] = {x.lane for x in into or links}
        shown = {}
        for x in here:
            pattern = pattern_of(x, self.ways.programs, self.ways.where)
            shown[x.lane, x.target] = pattern
        found = []
        if flows:
            found = groups_of(name, road, here, flows, lanes, shown)
        if not found:
            found = [self.whole(name, here)]
        if len(found) == 1:
            found = [found[0]._replace(name=name)]
        self.groups[name] = found
        for way, vehicles in flows.items():
            shares = self.shares[name, way] = []
            for group in found:
                if way in group.ways:
                    shares.append((group.name, group.ways[way] / vehicles))
        pocket = POCKET - metres
        if len(found) > 1 and road.length > pocket + POCKET / 4:
            self.cut[name] = pocket

    def lanes_of(self, road: str, group: str) -> list:
        """Lanes of one of a road's groups; of the road where it has none of that name."""
        lanes = self.ways.roads[road].lanes
        for one in self.groups.get(road, ()):
            if one.name == group:
                return [lanes[k] for k in one.lanes]
        return list(lanes)

    def ways_on(self, road: str, edges: tuple, k: int) -> list:
        """Ways on of a route from its k-th road, each with its share."""
        to = edges[k + 1]
        by_group = road in self.sorted and to not in self.cut and len(self.groups[to]) > 1
        if not by_group or k + 2 >= len(edges):
            return [((to, ""), 1.0)]
        return [((to, group), share) for group, share in self.choice(edges, k + 1)]

    def choice(self, edges: tuple, k: int) -> list:
        """Groups in which a route drives on its k-th road, each with its share."""
        if k + 1 == len(edges):
            groups = self.groups[edges[k]]
            total = sum(group.width for group in groups)
            return [(group.name, group.width / total) for group in groups]
        shares = Counter()
        for way, share in self.ways_on(edges[k], edges, k):
            for group, part in self.shares[edges[k], way]:
                shares[group] += share * part
        return list(shares.items())

    def saturation_of(self, group: Group) -> float:
        """veh/h and lane: the driver's headway, and the way of a vehicle at the turn's speed."""
        road = self.ways.roads[group.road]
        speeds = {x.target: min(x.speed, road.limit) for x in group.links}
        total = sum(group.flows.values())
        seconds = 0.0
        for to, vehicles in group.flows.items():
            speed = speeds.get(to, road.limit)
            space = self.trips.space / speed
            seconds += vehicles / total * (self.trips.headway + REACTION + space)
        return 3600 / seconds * len(road.lanes) / road.width

    def parts(self) -> list[Part]:
        parts = []
        for name, road in self.ways.roads.items():
            length = road.length
            if name in self.cut:
                length -= self.cut[name]
                upstream, at_end = split_line(road.shape, self.cut[name] / road.length)
                parts.append(
                    Part(
                        name,
                        road.start,
                        road.start + "|" + name,
                        length,
                        road.width,
                        road.limit,
                        None,
                        upstream,
                    )
                )
            for group in self.groups[name]:
                end = road.end
                start, shape, length = road.start, road.shape, road.length
                if name in self.cut:
                    start, shape, length = road.start + "|" + name, at_end, self.cut[name]
                saturation = None
                if group.shows:
                    saturation = self.saturation_of(group)
                width = max(group.width, THINNEST)
                parts.append(
                    Part(group.name, start, end, length, width, road.limit, saturation, shape)
                )
        return parts

    def trace(self, edges: tuple) -> tuple[dict, dict]:
        """A route by parts: {part: share} where it begins, {(part, next part or ""): share}."""
        after, pairs = {"": 1.0}, Counter()
        for k in range(len(edges) - 1, -1, -1):
            road = edges[k]
            ends = k + 1 == len(edges)
            if ends and len(self.groups[road]) > 1 and (k or road in self.cut):
                here = {}  # it ends before the stop line
            elif ends or len(after) == 1:
                here = dict(self.choice(edges, k))
                for a, b in product(here, after):
                    pairs[a, b] += here[a] * after[b]
            else:
                here = self.lead(road, edges, k, after, pairs)
            if road in self.cut:
                for part, share in (here or after).items():
                    pairs[road, part] += share
                here = {road: 1.0}
            after = here or after
        return after, pairs

    def lead(self, road: str, edges: tuple, k: int, after: dict, pairs: Counter) -> dict:
        """Shares of the groups of a road before others: lanes lead to the groups they lead to."""
        here, to = Counter(), edges[k + 1]
        for part, share in after.items():
            of_way = self.shares.get((road, (to, part))) or self.shares[road, (to, "")]
            for group, own in of_way:
                here[group] += share * own
                pairs[group, part] += share * own
        return here

    def turns_and_demand(self) -> tuple[list, dict]:
        counts, begun = defaultdict(Counter), defaultdict(Counter)
        traces = {}
        for (edges, at, kind), vehicles in self.ways.routes.items():
            if edges not in traces:
                traces[edges] = self.trace(edges)
            starts, pairs = traces[edges]
            for part, share in starts.items():
                begun[part, kind][at] += share * vehicles
            for (a, b), share in pairs.items():
                counts[a][b] += share * vehicles
        turns = []
        for a, to in counts.items():
            total = sum(to.values())
            turns += [Turn(a, b, n / total) for b, n in to.items() if n]
        demand = defaultdict(dict)
        for (part, kind), by_bin in begun.items():
            flow = []
            # the last bin lasts as long as the others; of one alone an empty one shows the end
            for k in range(max(2, math.ceil(self.trips.seconds / BIN - 1e-9))):
                flow.append([k * BIN / 60, 3600 * by_bin[k] / BIN])
            demand[part][kind] = flow
        return turns, dict(demand)

    def rivals(self, group: Group) -> frozenset:
        """Groups that this one gives way to."""
        over = [number for link in group.links for number in link.over]
        names = set().union(*(self.of_link[number] for number in over))
        return frozenset(names - {group.name})

    def give_way(self) -> dict:
        """Yields of junctions without signals: the greater part of a road's vehicles decides."""
        yields = {}
        for groups in self.groups.values():
            for group in groups:
                if group.shows or not group.flows:
                    continue
                waits = set()  # next roads
                for link in group.links:
                    one = group._replace(links=(link,))
                    if self.rivals(one):
                        waits.add(link.target)
                vehicles = sum(n for to, n in group.flows.items() if to in waits)
                if vehicles >= 0.5 * sum(group.flows.values()):
                    rivals = sorted(self.rivals(group))
                    yields[group.name] = (*GAP, tuple(rivals))
        return yields

    def signals(self, yields: dict) -> tuple[list, dict]:
        """Signals, and their states in the map; adds to yields those who give way at a green."""
        by_signal = defaultdict(list)
        for groups in self.groups.values():
            for group in groups:
                if group.shows:
                    by_signal[group.shows[0]].append(group)
        signals, states = [], {}
        for name, groups in sorted(by_signal.items()):
            program = self.ways.programs[name]
            greens = greens_of(program)
            shown = {g.name: g.shows[1] for g in groups}
            phases, minor = [], []
            for p in range(len(greens)):
                phase = [name for name, chars in shown.items() if chars[p] in "Ggs"]
                phases.append(frozenset(phase))
                waits = [g for g in groups if shown[g.name][p] in "gs" and self.rivals(g)]
                minor.append(frozenset(g.name for g in waits))
                for g in waits:
                    rivals = sorted(self.rivals(g))
                    yields[g.name] = (*GAP_AT_GREEN, tuple(rivals))
            if len(phases) < 2:
                self.ways.notes.append(f"signal {name}: one phase: always open")
                continue
            idle = sum(not phase for phase in phases)
            if idle:
                self.ways.notes.append(f"signal {name}: {idle} phases serve no vehicle")
            signals.append(as_signal(name, program, greens, phases, minor, self.trips.begin))
            states[name] = (name, tuple(program.phases[k][1] for k in greens))
        return signals, states

    def layout(self, states: dict) -> Layout:
        lanes, weight = {}, {}
        for name, road in self.ways.roads.items():
            numbers = range(len(road.lanes))
            begin = 0.0
            if name in self.cut:
                begin = road.length - self.cut[name]
                lanes[name] = stretch(road, numbers, 0.0, begin)
            for group in self.groups[name]:
                lanes[group.name] = stretch(road, group.lanes, begin, road.length)
                most = road.width * len(group.lanes) / len(numbers)
                weight[group.name] = min(1.0, group.width / most)
        return Layout(lanes, states, weight)


def stretch(road: Road, numbers, begin: float, end: float) -> tuple:
    """(lane id, from m, to m, m from `begin` to there) of these lanes from `begin` to `end`."""
    found = {}
    for number in numbers:
        pieces = road.lanes[number]
        at = road.length - sum(length for _, length in pieces)
        for lane, length in pieces:
            first, last = max(begin - at, 0.0), min(end - at, length)
            if last > first:
                found.setdefault((lane, first, last), at + first - begin)
            at += length
    return tuple((*piece, place) for piece, place in found.items())


def split_line(line: tuple, share: float) -> tuple[tuple, tuple]:
    """A polyline cut before the last share of its own length, which need not be the road's."""
    left = share * sum(map(math.dist, line, line[1:]))
    for k in range(len(line) - 1, 0, -1):
        x, y = line[k]
        u, v = line[k - 1]
        long = math.dist(line[k], line[k - 1])
        if long and long >= left:
            part = left / long
            cut = x + part * (u - x), y + part * (v - y)
            return (*line[:k], cut), (cut, *line[k:])
        left -= long
    return (), line


def as_signal(
    name: str, program: Program, chosen: list, phases: list, minor: list, begin: float
) -> Signal:
    """The map's own greens; what stands between two of them becomes amber and all-red.

    A program counts from SUMO's second 0 and its offset, a run from `begin`.
    """
    number = len(program.phases)
    ambers, reds, between = [], [], []
    for k in chosen:
        amber = red = 0.0
        k = (k + 1) % number
        while k not in chosen:
            seconds, state, _ = program.phases[k]
            if set(state) & set("yYu"):
                amber += seconds
            else:
                red += seconds
            k = (k + 1) % number
        ambers.append(amber)
        reds.append(red)
        between.append(amber + red)
    amber = max(ambers, key=ambers.count)
    red = max(reds, key=reds.count)
    durations, least = [], []
    for k, pause in zip(chosen, between):
        seconds, _, at_least = program.phases[k]
        # a pause of another length than the usual one is added to the green
        durations.append(max(seconds + pause - amber - red, 1.0))
        if at_least:
            least.append(at_least)
    lengths = [seconds for seconds, *_ in program.phases]
    before = sum(lengths[: chosen[0]])
    return Signal(
        name,
        tuple(phases),
        tuple(minor),
        tuple(durations),
        (before + program.offset - begin) % sum(lengths),
        amber,
        red,
        min(least, default=LEAST_GREEN),
        amber + START_LOSS - AMBER_USED,
    )


def draw(plan: Map, trips: Trips, notes: list, dx: float) -> tuple:
    """A map and its vehicles -> Network and Layout."""
    ways = Ways(plan, trips.routes, notes)
    ways.shorten()
    drawing = Drawing(ways, trips)
    yields = drawing.give_way()
    signals, states = drawing.signals(yields)
    turns, demand = drawing.turns_and_demand()
    name = Path(plan.where).name.split(".")[0]
    net = assemble(name, drawing.parts(), turns, signals, demand, yields, tuple(notes), dx)
    return net, drawing.layout(states)


# ------------------------------------------------------------------------- a map without vehicles
DEMAND_SHAPES = {"entries": ("object", "flow"), "exits": ("object", "amount")}


def default_demand(plan: Map, path: Path, notes: list) -> Trips:
    """Demand from NAME.demand.json, which is written where it is not there.

    {"entries": {edge: veh/h or [[minute, veh/h from then on], ...]}, "exits": {edge: weight}}: the
    vehicles of an entry drive the fastest way to every exit that they can reach, by its weight.
    """
    onward = [link for link in plan.links if not is_back(plan, link)]
    targets = {link.target for link in onward}
    sources = {link.source for link in onward}
    if not path.is_file():
        entries = {
            name: DEFAULT_FLOW * len(road.lanes)
            for name, road in plan.roads.items()
            if name not in targets
        }
        exits = {name: 1 for name in plan.roads if name not in sources}
        if not entries or not exits:
            counts = f"{len(entries)} entries and {len(exits)} exits"
            raise NetworkError(f"{plan.where}: {counts}: write both into {path}")
        write_json(path, {"entries": entries, "exits": exits})
        notes.append(
            f"{path} written: {DEFAULT_FLOW:g} veh/h and lane at {len(entries)} entries: edit it"
        )
    given = read_plan(path)
    for key, value in given.items():
        if key not in DEMAND_SHAPES:
            raise NetworkError(f"{path}: unknown key {key!r}, must be entries or exits")
        check_shape(value, DEMAND_SHAPES[key], f"{path}: {key}")
        for name in value:
            if name not in plan.roads:
                raise NetworkError(f"{path}: {key}: no edge {name!r}{near(name, plan.roads)}")
    entries = given.get("entries")
    exits = given.get("exits")
    if not entries or not exits:
        raise NetworkError(f"{path}: needs entries and exits")
    routes = Counter()
    minutes = {minute for flow in entries.values() for minute in changes_of(flow)}
    minutes = sorted(minutes)
    # the last flow lasts an hour
    ends = [*minutes[1:], max(60.0, minutes[-1] + 60.0)]
    ways = fastest_ways(plan, list(entries))
    for entry, flow in entries.items():
        reached = {to: edges for to, edges in ways[entry].items() if exits.get(to, 0) > 0}
        reached.pop(entry, None)
        total = sum(exits[to] for to in reached)
        if not reached:
            raise NetworkError(f"{path}: entries: {entry}: no exit can be reached from there")
        for minute, end in zip(minutes, ends):
            rate = flow
            if isinstance(flow, list):
                rate = [x for m, x in flow if m <= minute][-1]
            for k in range(math.ceil((end - minute) / (BIN / 60))):
                at = minute + k * BIN / 60
                number = int(at * 60 // BIN)
                hours = min(BIN / 60, end - at) / 60
                for to, edges in reached.items():
                    vehicles = rate * hours * exits[to] / total
                    routes[edges, number, "car"] += vehicles
    return Trips(routes, 0.0, 60 * ends[-1], SPACE["car"], HEADWAY)


def is_back(plan: Map, link: Link) -> bool:
    """Whether a link turns round, as at the end of a street."""
    return is_reverse(plan.roads[link.source], plan.roads[link.target])


def is_reverse(a: Road, b: Road) -> bool:
    return (a.start, a.end) == (b.end, b.start)


def changes_of(flow) -> list:
    return [minute for minute, _ in flow] if isinstance(flow, list) else [0]


def fastest_ways(plan: Map, entries: list) -> dict:
    """{entry: {road: edges of the fastest way there}}."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import dijkstra

    names = list(plan.roads)
    number = {name: k for k, name in enumerate(names)}
    seconds = [road.length / road.limit for road in plan.roads.values()]
    pairs = {(number[x.source], number[x.target]) for x in plan.links}
    pairs = np.array(sorted(pairs), np.int64)
    rows, columns = pairs.reshape(-1, 2).T
    # a step costs the road that it leads into
    cost = [seconds[to] for to in columns]
    size = len(names), len(names)
    graph = csr_array((cost, (rows, columns)), shape=size)
    starts = [number[entry] for entry in entries]
    time, before = dijkstra(graph, indices=starts, return_predecessors=True)
    found = {}
    for row, entry in enumerate(entries):
        ways = found[entry] = {}
        reached = np.isfinite(time[row])
        for to in np.flatnonzero(reached):
            edges = []
            at = int(to)
            while at >= 0:  # negative: nothing before it
                edges.append(names[at])
                at = int(before[row, at])
            ways[names[to]] = tuple(reversed(edges))
    return found


def write_json(path: Path, content: dict):
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)


# ------------------------------------------------------------------------------------- one door
def read_both(path, demand=(), dx: float = CELL_LENGTH) -> tuple:
    """(Network, Layout) of a SUMO map."""
    files, notes = find_files(path, demand), []
    plan = read_net(files.net, files.additional, notes)
    additional = chain(*map(parse_xml, files.additional))
    if not files.demand and not any(e.tag in DEMAND for e in additional):
        name = files.net.name.split(".")[0]
        beside = files.net.with_name(f"{name}.demand.json")
        files = files._replace(demand=(beside,))
    if files.demand and files.demand[0].suffix == ".json":
        trips = default_demand(plan, files.demand[0], notes)
    else:
        trips = read_trips(files, notes)
    return draw(plan, trips, notes, dx)


def read_sumo(path, demand=(), dx: float = CELL_LENGTH):
    """A SUMO map (.net.xml and demand files, or a .sumocfg that names both) -> Network.

    Raises NetworkError, one line that names the file and the element.
    """
    return read_both(path, demand, dx)[0]


def is_edge_table(path) -> bool:
    """Whether a CSV is a table of edges as OpenStreetMap's tools export them."""
    path = Path(path)
    if path.suffix != ".csv" or not path.is_file():
        return False
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return {"u", "v"} <= {name.strip() for name in file.readline().split(",")}


def is_map(path: str) -> bool:
    """Whether read_map knows the file by its name: SUMO, CityFlow, an edge table."""
    return path.endswith((".net.xml", ".net.xml.gz", ".sumocfg", ".json")) or is_edge_table(path)


def read_map(path: str, demand=(), dx: float = CELL_LENGTH) -> Network:
    """Network of a SUMO map or configuration, CityFlow's roadnet.json, or an edge table."""
    from common.cityflow import read_cityflow  # both need what is above
    from common.edge_tables import read_edges

    if path.endswith(".json"):
        return read_cityflow(path, demand, dx)
    if path.endswith(".csv"):
        if demand:
            raise NetworkError(f"{path}: an edge table has its demand in {Path(path).stem}.json")
        return read_edges(path, dx)
    return read_sumo(path, demand, dx)
