"""Static data of signalised road networks: read from files or made, validated, never changed.

from common.networks import find_network
net = find_network("corridor")  # or "town5", or "roads.csv" with roads.json beside it

assemble() makes a network of parts, turns and signals: whatever reads a map ends there.
"""

import csv
import difflib
import hashlib
import io
import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.gpu_pool import pool

KMH = 1.0 / 3.6
CLASSES = ("motorcycle", "car")
TOP_SPEED = (100 * KMH, 120 * KMH)  # m/s, of a class on an empty road without a limit
# a lane of 50 km/h carries 1 903 veh/h: jam density x limit x wave / (limit + wave)
RHO_JAM = 0.15  # veh/m and lane
QUEUE_WAVE = 17 * KMH  # m/s, at which a queue that is let go dissolves from its head
ROADS = {  # km/h where a segment gives no limit; a class that ends in _link has that of its road
    "motorway": 120.0,
    "trunk": 100.0,
    "primary": 60.0,
    "secondary": 50.0,
    "tertiary": 40.0,
    "unclassified": 40.0,
    "residential": 30.0,
    "living_street": 20.0,
}
CELL_LENGTH = 25.0  # m
ZONES = (50.0, 150.0)  # m upstream of the stop line: near, middle, far
AMBER, ALL_RED, MIN_GREEN = 0.0, 4.0, 6.0  # s, where a plan gives none
GIVE_WAY = 6.2, 3.3  # s, critical gap and follow-up time (HCM, a right turn from a minor road)
CLOSE = 60.0  # m between two signals: what stands before the first is the work of both
SHORT = 5.0  # m: below it a segment's cell makes every time step small
PART_RANGES = {  # m, how many, m/s, veh/h and lane: beyond them is a slip
    "length": (0.1, 1e5),
    "lanes": (0.1, 100),
    "limit": (0.8, 280),
    "saturation": (1, 1e4),
}
TIMES = "amber", "all_red", "min_green", "start_up", "offset"


class NetworkError(ValueError):
    """One line: what is wrong with a network file, where, and what is expected."""

    exit_code = 2


class Part(NamedTuple):
    """A segment by its own name: one direction of a street, or the lanes of one movement."""

    id: str
    start: str  # nodes, for pictures and names; several parts may join the same two
    end: str
    length: float  # m
    lanes: float  # how many
    limit: float  # m/s
    saturation: float | None = None  # veh/h and lane over its end; None: what the diagram gives
    shape: tuple = ()  # ((x, y), ...) m


class Turn(NamedTuple):
    """The share of the source's vehicles that go on to the target; "": that end their trip.

    A source's shares add up to 1; a part without turns is an exit.
    """

    source: str
    target: str
    share: float


class Signal(NamedTuple):
    """The greens that a policy may choose. A part that no signal names is always open."""

    node: str  # its name
    phases: tuple  # of sets of part ids that are green, 2 to 62
    minor: tuple = ()  # of sets, by phase: greens that give way; () none
    durations: tuple = ()  # s of green of each phase in the map's own program; () unknown
    offset: float = 0.0  # s into a run when that program's first green begins
    amber: float = AMBER  # s after a green that ends
    all_red: float = ALL_RED  # s after amber
    min_green: float = MIN_GREEN  # s before a green may end
    start_up: float = 0.0  # s of a green in which nobody moves yet


@dataclass(frozen=True)
class Network:
    """Static data of a network, shared and read-only.

    S segments, M moves over junctions, G signals of at most P phases, E entries, B bins of the
    mean demand, Y pairs of who gives way to whom.
    """

    name: str
    ids: tuple  # names of the segments
    ends: tuple  # (from, to) of every segment
    shapes: tuple  # ((x, y), ...) m of every segment, for a picture; () if unknown
    first: np.ndarray  # (S + 1,) first cell of each segment
    dx: np.ndarray  # (S,) m, of a cell
    jam: np.ndarray  # (S,) veh/m of all lanes
    limit: np.ndarray  # (2, S) m/s by class
    saturation: np.ndarray  # (S,) veh/s of all lanes over a segment's end, inf: no limit but the road's
    zone_of: np.ndarray  # (cells,) 0 near, 1, 2 far from the stop line
    zone_share: np.ndarray  # (cells,) of its zone
    zone_length: np.ndarray  # (3, S) m
    move_from: np.ndarray  # (M,) segments, ascending
    move_to: np.ndarray  # (M,)
    share: np.ndarray  # (M,) of the vehicles of move_from
    leave: np.ndarray  # (S,) share of a segment's vehicles that end there; with share 1 a segment
    entry: np.ndarray  # (S,) the entry's number or -1
    change_at: np.ndarray  # (B,) s of an episode when the mean demand changes, first 0
    base: np.ndarray  # (B, 2, E) mean demand from then on, veh/s
    nodes: tuple  # names of the signals
    signal: np.ndarray  # (S,) the signal at the end or -1
    green: np.ndarray  # (S,) bit p: green in phase p
    minor: np.ndarray  # (S,) bit p: gives way in phase p
    n_phases: np.ndarray  # (G,)
    durations: np.ndarray  # (G, P) s of green in the map's own program, 0 unknown
    offset: np.ndarray  # (G,) s
    amber: np.ndarray  # (G,) s
    all_red: np.ndarray  # (G,) s
    min_green: np.ndarray  # (G,) s
    start_up: np.ndarray  # (G,) s
    yield_ptr: np.ndarray  # (S + 1,) a segment's part of yield_to
    yield_to: np.ndarray  # (Y,) segments that have priority
    gap: np.ndarray  # (S,) s, critical gap less half the follow-up time
    follow: np.ndarray  # (S,) veh/s of all lanes into an endless gap
    notes: tuple  # lines: what is allowed but looks like a slip

    @property
    def lengths(self) -> np.ndarray:
        return self.zone_length.sum(0)

    @property
    def capacity(self) -> np.ndarray:
        """(S,) veh/s of cars that a segment carries, and a green discharges."""
        return np.minimum(capacity_of(self.jam, self.limit[1]), self.saturation)

    @property
    def change(self) -> np.ndarray:
        """(G,) s between two greens."""
        return self.amber + self.all_red

    def leads_on(self) -> np.ndarray:
        """(S,) whether anything leads out of a segment; where not, it is an exit."""
        return np.isin(np.arange(len(self.ends)), self.move_from)

    def owners(self) -> np.ndarray:
        """(S, 2) the signals that a segment's delay belongs to; -1: none.

        The first is the next on the way, else the last. The second stands CLOSE behind it: a queue
        of its own that reaches back through the first hardly shows on the short road between them.
        """
        owner = self.signal.copy()
        heaviest = np.argsort(self.share, kind="stable")  # of several writes the last one counts
        ways = self.move_from[heaviest], self.move_to[heaviest]
        for behind, ahead in (ways, ways[::-1]):
            while True:
                new = (owner[behind] < 0) & (owner[ahead] >= 0)
                if not new.any():
                    break
                owner[behind[new]] = owner[ahead[new]]
        second = np.full(len(owner), -1)
        a, b = self.move_from, self.move_to
        between = (self.signal[a] >= 0) & (self.signal[b] >= 0) & (self.lengths[b] < CLOSE)
        between &= self.signal[a] != self.signal[b]
        second[a[between]] = self.signal[b[between]]
        way_back = (self.signal[a] < 0) & (owner[a] == owner[b])
        while True:
            new = way_back & (second[a] < 0) & (second[b] >= 0)
            if not new.any():
                return np.stack([owner, second], 1)
            second[a[new]] = second[b[new]]

    def around(self) -> tuple[np.ndarray, np.ndarray]:
        """(G, A) segments that end at each signal, and that those lead into; -1 fills a row."""
        rows = []
        for g in range(len(self.nodes)):
            ahead = self.move_to[self.signal[self.move_from] == g]
            rows.append((np.flatnonzero(self.signal == g), np.unique(ahead)))
        width = max(len(row) for pair in rows for row in pair)
        tables = np.full((2, len(rows), width), -1, np.int64)
        for g, pair in enumerate(rows):
            for table, row in zip(tables, pair):
                table[g, : len(row)] = row
        return tables[0], tables[1]

    def pieces(self, interval: float) -> np.ndarray:
        """s between the moments of an interval at which some signal may change what it shows.

        Switches are at its beginning.
        """
        marks = np.r_[self.amber, self.change, self.change + self.start_up] % interval
        return np.diff(np.unique(np.r_[0.0, marks.round(6), interval]))

    def horizon(self, interval: float) -> float:
        """s of the demand, in whole intervals: its last change lasts as long as the one before.

        An hour where it never changes.
        """
        changes = self.change_at
        end = 2 * changes[-1] - changes[-2] if len(changes) > 1 else 3600.0
        return math.ceil(end / interval) * interval

    def reach(self) -> np.ndarray:
        """(G,) m from the first signal on, where each has a segment to the next."""
        reach = np.zeros(len(self.nodes))
        for g, pair in enumerate(zip(self.nodes, self.nodes[1:]), 1):
            length = self.lengths[self.ends.index(pair)] if pair in self.ends else 0.0
            reach[g] = reach[g - 1] + length
        return reach

    def mean_flows(self, demand: np.ndarray) -> np.ndarray:
        """(S,) veh/s when nothing queues for ever: demand (2, E), passed on by turning shares."""
        source = np.zeros(len(self.ends))
        source[self.entry >= 0] = demand.sum(0)[self.entry[self.entry >= 0]]
        total = source.copy()
        for _ in range(10 * len(self.ends)):
            after = source.copy()
            np.add.at(after, self.move_to, self.share * total[self.move_from])
            if np.abs(after - total).max() < 1e-12:
                break
            total = after
        return total

    def demand_table(self, interval: float, count: int) -> np.ndarray:
        """Mean demand (veh/s) of `count` intervals of `interval` s, (count, 2, E).

        One row stands for all where the demand never changes.
        """
        if len(self.change_at) == 1:
            return self.base
        edges = interval * np.arange(count + 1)[:, None]
        lasts = np.diff(self.change_at, append=np.inf)
        before = np.clip(edges - self.change_at, 0.0, lasts)
        seconds = np.diff(before, axis=0)  # (count, B) of every bin in every interval
        table = np.einsum("nb,bke->nke", seconds, self.base) / interval
        table.setflags(write=False)  # as `base` is: kernels are compiled for one type
        return table

    def sha256(self) -> str:
        """Of all that the physics reads."""
        plain = self.ends, self.nodes, QUEUE_WAVE
        content = hashlib.sha256(repr(plain).encode())
        for array in vars(self).values():
            if isinstance(array, np.ndarray):
                content.update(np.ascontiguousarray(array))
        return content.hexdigest()


def capacity_of(jam, limit):
    """veh/s of cars in the triangular diagram of a road."""
    return jam * limit * QUEUE_WAVE / (limit + QUEUE_WAVE)


def near(name: str, names) -> str:
    found = difflib.get_close_matches(str(name), [str(n) for n in names], 1)
    return f", did you mean {found[0]}?" if found else ""


# ----------------------------------------------------------------------------------------- the plan
def is_number(value) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value)


def is_amount(value) -> bool:
    return is_number(value) and value >= 0


def is_pair(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def is_flow(value) -> bool:
    return is_amount(value) or (isinstance(value, list) and len(value) > 0)


KINDS = {
    "object": (lambda value: isinstance(value, dict), "an object"),
    "list": (lambda value: isinstance(value, list), "a list"),
    "name": (lambda value: isinstance(value, str), "a node's name"),
    "amount": (is_amount, "a number >= 0"),
    "flow": (is_flow, "a number >= 0 or [[minute, veh/h from then on], ...]"),
    "point": (is_pair, "[x, y], two numbers"),
}
SHAPES = {
    "signals": ("object", "list", "list", "name"),
    "demand": ("object", "object", "flow"),
    "turns": ("object", "object", "object", "amount"),
    "priority": ("object", "list", "name"),
    "amber": ("amount",),
    "all_red": ("amount",),
    "min_green": ("amount",),
    "nodes": ("object", "point"),
    "lines": ("object", "object", "list", "point"),
}


def check_shape(value, shape: tuple, at: str):
    """Raises NetworkError where value is not what `shape` says, level by level."""
    kind, *inner = shape
    is_good, meaning = KINDS[kind]
    if not is_good(value):
        raise NetworkError(f"{at}: {value!r:.80} must be {meaning}")
    parts = ()
    if kind == "flow" and isinstance(value, list):
        check_over_time(value, at)
    elif inner:
        parts = value.items() if kind == "object" else enumerate(value, 1)
    for key, part in parts:
        check_shape(part, inner, f"{at}: {key}")


def check_over_time(pairs: list, at: str):
    """Raises NetworkError where pairs are not [minute, flow] with minutes that rise from 0."""
    before = None
    for k, pair in enumerate(pairs, 1):
        if not is_pair(pair) or min(pair) < 0:
            raise NetworkError(
                f"{at}: {k}: {pair!r:.80} must be [minute, veh/h], both >= 0"
            )
        minute = pair[0]
        if before is None and minute != 0:
            raise NetworkError(
                f"{at}: {k}: begins at minute {minute:g}, must begin at 0"
            )
        if before is not None and minute <= before:
            raise NetworkError(
                f"{at}: {k}: minute {minute:g} comes after {before:g}: must rise"
            )
        before = minute


# ------------------------------------------------------------------------------------------- assemble
def index_of(name: str, parts) -> dict[str, int]:
    """Numbers of the parts by id. Raises NetworkError where a part is not one."""
    index = {}
    for s, part in enumerate(parts):
        at = f"{name}: part {part.id!r}"
        if part.id in index or not part.id:
            raise NetworkError(f"{at}: its id is empty or there twice")
        for field, (low, high) in PART_RANGES.items():
            value = getattr(part, field)
            if value is None and field == "saturation":
                continue
            if not is_number(value) or not low <= value <= high:
                raise NetworkError(f"{at}: {field} {value!r} must be from {low:g} to {high:g}")
        index[part.id] = s
    if not index:
        raise NetworkError(f"{name}: no parts")
    return index


def find_part(index: dict, part: str, at: str) -> int:
    if part not in index:
        raise NetworkError(f"{at}: no part {part!r}{near(part, index)}")
    return index[part]


def cells_of(parts, dx: float) -> dict:
    """Cells, speeds and zones of the parts."""
    n = len(parts)
    fine, jam, limit, saturation = np.zeros(n), np.zeros(n), np.zeros((2, n)), np.full(n, np.inf)
    zone_length, counts, zone_of, zone_share = np.zeros((3, n)), [], [], []
    for s, part in enumerate(parts):
        limit[:, s] = [min(part.limit, top) for top in TOP_SPEED]
        count = max(1, round(part.length / dx))
        jam[s], fine[s] = RHO_JAM * part.lanes, part.length / count
        if part.saturation is not None:
            saturation[s] = part.saturation / 3600 * part.lanes
        to_stop = fine[s] * (count - 0.5 - np.arange(count))
        zone = np.searchsorted(ZONES, to_stop)
        zone_length[:, s] = np.bincount(zone, minlength=3) * fine[s]
        counts.append(count)
        zone_of.append(zone)
        zone_share.append(fine[s] / zone_length[zone, s])
    return {
        "first": np.r_[0, np.cumsum(counts)].astype(np.int64),
        "dx": fine,
        "jam": jam,
        "limit": limit,
        "saturation": saturation,
        "zone_of": np.concatenate(zone_of).astype(np.int64),
        "zone_share": np.concatenate(zone_share),
        "zone_length": zone_length,
    }


def moves_of(name: str, index: dict, turns) -> dict:
    """Moves over the junctions, their shares, and the shares of those that end."""
    shares = {}
    for turn in turns:
        at = f"{name}: turn {turn.source!r} > {turn.target!r}"
        pair = find_part(index, turn.source, at), -1
        if turn.target:
            pair = pair[0], find_part(index, turn.target, at)
        if pair in shares or pair[0] == pair[1]:
            raise NetworkError(f"{at}: is there twice, or leads back into itself")
        if not is_amount(turn.share):
            raise NetworkError(f"{at}: share {turn.share!r} must be a number >= 0")
        shares[pair] = turn.share
    total = np.bincount([s for s, _ in shares], list(shares.values()), minlength=len(index))
    for part, s in index.items():
        if abs(total[s] - 1) > 1e-6 and any(pair[0] == s for pair in shares):
            raise NetworkError(f"{name}: turns of part {part!r} add up to {total[s]:g}, must be 1")
    leave = np.where(total == 0, 1.0, 0.0)
    moves, share = [], []
    for (s, j), part in sorted(shares.items()):
        if j < 0:
            leave[s] = part / total[s]
        elif part > 0:
            moves.append((s, j))
            share.append(part / total[s])
    moves = np.array(moves, np.int64).reshape(-1, 2)
    return {
        "move_from": moves[:, 0].copy(),
        "move_to": moves[:, 1].copy(),
        "share": np.array(share, float),
        "leave": leave,
    }


def entries_of(name: str, index: dict, demand: dict) -> dict:
    """Entries in the parts' order, and the mean demand of each."""
    check_shape(demand, SHAPES["demand"], f"{name}: demand")
    for part, flows in demand.items():
        find_part(index, part, f"{name}: demand")
        for kind in flows:
            if kind not in CLASSES:
                hint = f"unknown class {kind!r}, must be {' or '.join(CLASSES)}"
                raise NetworkError(f"{name}: demand: {part}: {hint}")
    if not demand:
        raise NetworkError(f"{name}: no demand: no part is an entry, so nobody can arrive")
    flows = [flow for by_class in demand.values() for flow in by_class.values()]
    changes = {minute for flow in flows if isinstance(flow, list) for minute, _ in flow}
    minutes = sorted(changes | {0})
    entry, base = np.full(len(index), -1, np.int64), []
    for part in sorted(demand, key=index.get):
        entry[index[part]] = len(base)
        by_class = [flow_over_time(demand[part].get(kind, 0), minutes) for kind in CLASSES]
        base.append(np.array(by_class) / 3600)  # (2, B)
    return {
        "entry": entry,
        "change_at": 60.0 * np.array(minutes, float),
        "base": np.array(base).T.copy(),
    }


def flow_over_time(flow, minutes: list) -> list:
    """veh/h of every bin between two changes."""
    if not isinstance(flow, list):
        return [flow] * len(minutes)
    return [[x for at, x in flow if at <= minute][-1] for minute in minutes]


def signals_of(name: str, index: dict, signals) -> dict:
    """Signals, their phases and their times."""
    n = len(index)
    signal, green, minor = (np.full(n, value, np.int64) for value in (-1, 0, 0))
    most = max((len(one.phases) for one in signals), default=0)
    durations = np.zeros((len(signals), most))
    for g, one in enumerate(signals):
        at = f"{name}: signal {one.node!r}"
        if not 2 <= len(one.phases) <= 62:  # bits of a whole number
            raise NetworkError(f"{at}: {len(one.phases)} phases, a signal needs 2 to 62")
        for p, phase in enumerate(one.phases):
            if not phase and not one.durations:  # a map's program may serve nobody for a while
                raise NetworkError(f"{at}: phase {p + 1} is empty: name the parts it serves")
            for part in phase:
                s = find_part(index, part, f"{at}: phase {p + 1}")
                if signal[s] not in (-1, g):
                    raise NetworkError(f"{at}: part {part!r} has another signal already")
                signal[s] = g
                green[s] |= 1 << p
        for p, phase in enumerate(one.minor):
            for part in phase:
                if p >= len(one.phases) or part not in one.phases[p]:
                    raise NetworkError(f"{at}: minor {p + 1}: part {part!r} is not green then")
                minor[index[part]] |= 1 << p
        if one.durations:
            if len(one.durations) != len(one.phases) or not min(one.durations) > 0:
                raise NetworkError(f"{at}: durations must be one a phase, each above 0")
            durations[g, : len(one.phases)] = one.durations
        for field in TIMES:
            if not is_amount(getattr(one, field)):
                raise NetworkError(f"{at}: {field} {getattr(one, field)!r} must be s >= 0")
    times = {field: np.array([getattr(one, field) for one in signals], float) for field in TIMES}
    return times | {
        "nodes": tuple(one.node for one in signals),
        "signal": signal,
        "green": green,
        "minor": minor,
        "n_phases": np.array([len(one.phases) for one in signals], np.int64),
        "durations": durations,
    }


def yields_of(name: str, parts, index: dict, yields: dict, minor) -> dict:
    """Who gives way to whom, and how fast gaps are used."""
    gap, follow, to = np.zeros(len(index)), np.full(len(index), np.inf), []
    for part in yields:
        find_part(index, part, f"{name}: yields")
    for s, part in enumerate(parts):
        if part.id not in yields:
            if minor[s]:
                raise NetworkError(f"{name}: part {part.id!r} has a minor green but no yields")
            to.append([])
            continue
        critical, follow_up, others = yields[part.id]
        at = f"{name}: yields: {part.id}"
        if not 0 < follow_up <= critical < math.inf:
            raise NetworkError(f"{at}: {critical!r}, {follow_up!r}: critical gap >= follow-up > 0")
        gap[s], follow[s] = critical - follow_up / 2, part.lanes / follow_up
        to.append(sorted(find_part(index, other, at) for other in others))
    return {
        "gap": gap,
        "follow": follow,
        "yield_ptr": np.r_[0, np.cumsum([len(others) for others in to])].astype(np.int64),
        "yield_to": np.array([j for others in to for j in others], np.int64),
    }


def look_for_slips(parts, data: dict) -> list[str]:
    """Notes: what is allowed but looks like a slip."""
    notes = []
    largest = data["base"].sum(1).max(0)
    capacity = np.minimum(capacity_of(data["jam"], data["limit"][1]), data["saturation"])
    for s, part in enumerate(parts):
        if part.length < SHORT:
            notes.append(f"{part.id} is {part.length:g} m long: time steps shrink with it")
        wants = largest[data["entry"][s]] if data["entry"][s] >= 0 else 0.0
        if wants > capacity[s]:
            wants, most = 3600 * wants, 3600 * capacity[s]
            notes.append(f"{part.id} has a demand of {wants:.0f} veh/h but carries {most:.0f}")
    for g, node in enumerate(data["nodes"]):
        if (data["leave"][data["signal"] == g] == 1).all():
            notes.append(f"signals: {node}: nothing leads on from it: a signal at an exit")
    return notes + look_for_islands(parts)


def look_for_islands(parts) -> list[str]:
    """Parts that no vehicle of the largest connected group can reach."""
    beside, group = {}, {}
    for part in parts:
        beside.setdefault(part.start, []).append(part.end)
        beside.setdefault(part.end, []).append(part.start)
    for first in beside:
        reached = [] if first in group else [first]
        while reached:
            node = reached.pop()
            if node not in group:
                group[node] = first
                reached += beside[node]
    largest = Counter(group[part.start] for part in parts).most_common(1)[0][0]
    apart = [part.id for part in parts if group[part.start] != largest]
    if not apart:
        return []
    return [f"{apart[0]} and {len(apart) - 1} more have no connection with the rest"]


def assemble(
    name: str,
    parts: list[Part],
    turns: list[Turn],
    signals: list[Signal],
    demand: dict,
    yields: dict | None = None,
    notes: tuple = (),
    dx: float = CELL_LENGTH,
) -> Network:
    """Parts, turns and signals -> Network.

    demand: {part id: {motorcycle, car: veh/h or [[minute, veh/h from then on], ...]}} of entries;
    any part may be one: traffic may start inside. yields: {part id: (critical gap s, follow-up s,
    (part ids that have priority, ...))}: what gives way, always where it has no signal, else in
    phases of `minor`. Raises NetworkError, one line that names the part or signal.
    """
    index = index_of(name, parts)
    data = cells_of(parts, dx)
    data |= moves_of(name, index, turns)
    data |= entries_of(name, index, demand)
    data |= signals_of(name, index, signals)
    data |= yields_of(name, parts, index, yields or {}, data["minor"])
    data["notes"] = (*notes, *look_for_slips(parts, data))
    for array in data.values():
        if isinstance(array, np.ndarray):
            array.setflags(write=False)
    ends = tuple((part.start, part.end) for part in parts)
    shapes = tuple(part.shape for part in parts)
    return Network(name, tuple(index), ends, shapes, **data)


# --------------------------------------------------------------------------------------- CSV and JSON
class Builder:
    """Segments and a plan on their way to assemble().

    Every method raises NetworkError with the file and the place.
    """

    def __init__(self, segments: list[dict], plan: dict, where: tuple[str, str]):
        self.table, self.text = where
        for key, value in plan.items():
            if key not in SHAPES:
                raise NetworkError(
                    f"{self.text}: unknown key {key!r}, must be one of {', '.join(SHAPES)}"
                )
            check_shape(value, SHAPES[key], f"{self.text}: {key}")
        self.plan, self.rows = plan, segments
        self.ends = [(str(row["from"]), str(row["to"])) for row in segments]
        self.ids = [f"{start} > {node}" for start, node in self.ends]
        self.index = {pair: s for s, pair in enumerate(self.ends)}
        self.nodes = sorted({node for pair in self.ends for node in pair})
        self.into = {node: [] for node in self.nodes}
        self.out_of = {node: [] for node in self.nodes}
        for s, (start, node) in enumerate(self.ends):
            self.out_of[start].append(s)
            self.into[node].append(s)
        self.limit = [
            (row.get("limit") or ROADS[row["class"].removesuffix("_link")]) * KMH
            for row in segments
        ]
        lanes = [row["lanes"] for row in segments]
        # of a way on: lanes times speed
        self.weight = np.array(lanes) * RHO_JAM * np.minimum(self.limit, TOP_SPEED[1])

    def check_node(self, node, section: str):
        if node not in self.into:
            raise NetworkError(
                f"{self.text}: {section}: no segment touches node {node!r}{near(node, self.nodes)}"
            )

    def find_segment(self, start, node, at: str) -> int:
        if (start, node) not in self.index:
            known = [self.ends[s][0] for s in self.into[node]]
            raise NetworkError(
                f"{self.text}: {at}: no segment {start} > {node}{near(start, known)}"
            )
        return self.index[start, node]

    def turns(self) -> list[Turn]:
        """Moves over the junctions and their shares."""
        given, found = self.plan.get("turns", {}), []
        for node in given:
            self.check_node(node, "turns")
            for start in given[node]:
                self.find_segment(start, node, f"turns: {node}")
        for s, (start, node) in enumerate(self.ends):
            own = given.get(node, {}).get(start)
            share = (
                self.usual_shares(s)
                if own is None
                else self.given_shares(own, node, start)
            )
            total = sum(share.values())
            for j in self.out_of[node]:
                if share.get(j, 0) > 0:
                    found.append(Turn(self.ids[s], self.ids[j], share[j] / total))
        return found

    def usual_shares(self, s: int) -> dict:
        """In proportion to lanes times limit, never back."""
        start, node = self.ends[s]
        return {
            j: self.weight[j] for j in self.out_of[node] if self.ends[j][1] != start
        }

    def given_shares(self, given: dict, node: str, start: str) -> dict:
        at, ways = (
            f"turns: {node}: {start}",
            {self.ends[j][1]: j for j in self.out_of[node]},
        )
        for to in given:
            if to not in ways:
                raise NetworkError(
                    f"{self.text}: {at}: no segment {node} > {to}{near(to, ways)}"
                )
        total = sum(given.values())
        if abs(total - 1) > 0.0101:  # thirds may be written .33
            raise NetworkError(
                f"{self.text}: {at}: the shares add up to {total:g}, must be 1"
            )
        return {ways[to]: share for to, share in given.items()}

    def demand(self, turns: list[Turn]) -> dict:
        """Demand of the nodes, shared by the entries that begin there."""
        demand, led_into = self.plan.get("demand", {}), {turn.target for turn in turns}
        entries = [s for s, part in enumerate(self.ids) if part not in led_into]
        if not entries:
            raise NetworkError(
                f"{self.table}: no entry: something leads into every segment, so nobody can arrive"
            )
        for node, flows in demand.items():
            self.check_node(node, "demand")
            for kind in flows:
                if kind not in CLASSES:
                    hint = f"unknown class {kind!r}, must be motorcycle or car"
                    raise NetworkError(f"{self.text}: demand: {node}: {hint}")
            if not set(self.out_of[node]) & set(entries):
                raise NetworkError(
                    f"{self.text}: demand: {node}: no entry begins there "
                    "(nothing leads into an entry)"
                )
        found = {}
        for s in entries:
            start = self.ends[s][0]
            if start not in demand:
                raise NetworkError(
                    f"{self.table}: segment {s + 1}, {self.ids[s]}, is an entry (nothing leads "
                    f"into it) but {self.text}: demand has no {start}: give its flows, 0 to close it"
                )
            together = sum(self.weight[j] for j in self.out_of[start] if j in entries)
            share = self.weight[s] / together
            found[self.ids[s]] = {
                kind: scaled(flow, share) for kind, flow in demand[start].items()
            }
        return found

    def shapes(self) -> list[tuple]:
        """Polylines of the segments: as given, else straight between known nodes."""
        points, lines = self.plan.get("nodes", {}), self.plan.get("lines", {})
        for node in points:
            self.check_node(node, "nodes")
        for start in lines:
            self.check_node(start, "lines")
            for node, line in lines[start].items():
                at = f"lines: {start}: {node}"
                self.check_node(node, f"lines: {start}")
                self.find_segment(start, node, at)
                if len(line) < 2:
                    raise NetworkError(
                        f"{self.text}: {at}: {len(line)} points, needs 2 or more"
                    )
        found = []
        for start, node in self.ends:
            straight = [
                points[end]
                for end in (start, node)
                if start in points and node in points
            ]
            line = lines.get(start, {}).get(node, straight)
            found.append(tuple((float(x), float(y)) for x, y in line))
        return found

    def signals(self) -> list[Signal]:
        """Signals and their phases."""
        times = {key: self.plan[key] for key in TIMES if key in self.plan}
        found = []
        for node, phases in self.plan.get("signals", {}).items():
            at = f"{self.text}: signals: {node}"
            self.check_node(node, "signals")
            if not 2 <= len(phases) <= 62:
                raise NetworkError(f"{at}: {len(phases)} phases, a signal needs 2 to 62")
            greens = []
            for p, starts in enumerate(phases, 1):
                if not starts:
                    raise NetworkError(f"{at}: phase {p} is empty: name the nodes it serves")
                place = f"signals: {node}: phase {p}"
                greens.append({self.ids[self.find_segment(a, node, place)] for a in starts})
            for s in self.into[node]:
                if not any(self.ids[s] in green for green in greens):
                    raise NetworkError(f"{at}: {self.ids[s]} is green in no phase")
            found.append(Signal(node, tuple(greens), **times))
        return found

    def yields(self) -> dict:
        """Whoever is not on the main road of a junction without a signal gives way."""
        found = {}
        for node, starts in self.plan.get("priority", {}).items():
            self.check_node(node, "priority")
            if node in self.plan.get("signals", {}):
                raise NetworkError(f"{self.text}: priority: {node}: has a signal")
            main = {self.find_segment(start, node, f"priority: {node}") for start in starts}
            for s in set(self.into[node]) - main:
                found[self.ids[s]] = *GIVE_WAY, [self.ids[j] for j in main]
        return found


def scaled(flow, share: float):
    """A flow, or one that changes, times a share."""
    if isinstance(flow, list):
        return [[minute, x * share] for minute, x in flow]
    return flow * share


def build_network(
    name: str,
    segments: list[dict],
    plan: dict,
    dx: float = CELL_LENGTH,
    where: tuple[str, str] = ("segments", "plan"),
) -> Network:
    """Records of segments and a plan -> Network.

    segments: from, to, length_m, class, lanes, limit (km/h, None for the class's).
    plan: signals {node: [[from, ...] a phase]}; demand {node: {motorcycle, car: flow}}, shared by
    the entries that begin there, a flow veh/h or [[minute, veh/h from then on], ...]; turns {node:
    {from: {to: share}}}, by default in proportion to lanes * limit, never back; priority {node:
    [from, ...]}, the main road of a junction without a signal; amber, all_red, min_green (s); for
    pictures nodes {node: [x, y]} in m and lines {from: {to: [[x, y], ...]}}. A segment that leads
    nowhere is an exit, one that nothing leads into an entry. where: names of both for messages.
    """
    b = Builder(segments, plan, where)
    turns, signals, shapes = b.turns(), b.signals(), b.shapes()
    parts = []
    for row, part, pair, limit, shape in zip(segments, b.ids, b.ends, b.limit, shapes):
        parts.append(Part(part, *pair, row["length_m"], row["lanes"], limit, None, shape))
    return assemble(name, parts, turns, signals, b.demand(turns), b.yields(), dx=dx)


# -------------------------------------------------------------------------------------------- files
COLUMNS = {
    "from": str,
    "to": str,
    "length_m": float,
    "class": str,
    "lanes": int,
    "limit": float,
}
ALLOWED = {
    "length_m": (0.1, 1e5),
    "lanes": (1, 100),
    "limit": (3, 1e3),
}  # m, lanes, km/h: beyond them is a slip
LARGEST = 50_000_000  # bytes of a file


def unique(where: Path, pairs: list) -> dict:
    """JSON would take the last of two equal keys in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise NetworkError(
            f"{where}: the key {max(keys, key=keys.count)!r} is there twice"
        )
    return found


def read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise NetworkError(
            f"{path}: no such file (a network is NAME.csv with its segments and "
            "NAME.json beside it)"
        )
    if path.stat().st_size > LARGEST:
        raise NetworkError(
            f"{path}: {path.stat().st_size} bytes, at most {LARGEST} are read"
        )
    try:
        return path.read_bytes()
    except OSError as e:
        raise NetworkError(f"{path}: {e.strerror}") from None


def read_text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise NetworkError(f"{path}: byte {e.start + 1} is not UTF-8") from None


def check_columns(path: Path, columns: list):
    found = ", ".join(map(repr, columns)) or "an empty line"
    for column in COLUMNS:
        if column not in columns:
            hint = ""
            if column in [c.strip().lower() for c in columns]:
                hint = " (lower case, no spaces)"
            elif ";" in found or "\\t" in found:
                hint = " (commas separate columns)"
            elif found.startswith("'#"):
                hint = " (the first line names the columns)"
            needs = ", ".join(COLUMNS)
            raise NetworkError(
                f"{path}: no column {column!r}{hint}, found {found:.200}; needs {needs}"
            )
    for column in columns:
        if column not in COLUMNS:
            raise NetworkError(
                f"{path}: unknown column {column!r}{near(column, COLUMNS)}"
            )


def read_value(column: str, text: str, at: str):
    kind = COLUMNS[column]
    if column == "limit" and not text:
        return None
    if kind is str:
        if not text:
            raise NetworkError(f"{at}: is empty")
        return text
    try:
        value = kind(text)
    except ValueError:
        word = "a whole number" if kind is int else "a number"
        raise NetworkError(f"{at}: {text!r:.80} is not {word}") from None
    low, high = ALLOWED[column]
    if not low <= value <= high:
        raise NetworkError(f"{at}: {text:.80} must be from {low:g} to {high:g}")
    return value


def read_segments(path: Path) -> list[dict]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    rows, pairs = [], set()
    try:
        check_columns(path, list(reader.fieldnames or []))
        for number, raw in enumerate(reader, 2):
            at = f"{path}: line {number}"
            if None in raw:
                raise NetworkError(f"{at}: more values than the {len(COLUMNS)} columns")
            row = {
                column: read_value(
                    column, (raw[column] or "").strip(), f"{at}: {column}"
                )
                for column in COLUMNS
            }
            pair = row["from"], row["to"]
            if row["limit"] is None and row["class"].removesuffix("_link") not in ROADS:
                known = ", ".join(ROADS)
                raise NetworkError(
                    f"{at}: class: unknown {row['class']!r}: give its limit, or one of {known}"
                )
            if row["from"] == row["to"]:
                raise NetworkError(f"{at}: from and to are both {row['to']!r}")
            if pair in pairs:
                raise NetworkError(
                    f"{at}: {row['from']} > {row['to']} is there twice: merge the lanes"
                )
            pairs.add(pair)
            rows.append(row)
    except csv.Error as e:
        raise NetworkError(f"{path}: line {reader.line_num}: {e}") from None
    if not rows:
        raise NetworkError(f"{path}: no segments")
    return rows


def read_plan(path: Path) -> dict:
    try:
        plan = json.loads(read_text(path), object_pairs_hook=partial(unique, path))
    except json.JSONDecodeError as e:
        raise NetworkError(f"{path}: line {e.lineno}: not JSON: {e.msg}") from None
    except RecursionError:
        raise NetworkError(
            f"{path}: brackets within brackets, hundreds deep: not a plan"
        ) from None
    except NetworkError:
        raise
    except ValueError as e:  # a number of thousands of digits
        raise NetworkError(f"{path}: {e}") from None
    if not isinstance(plan, dict):
        raise NetworkError(f"{path}: must be an object with {', '.join(SHAPES)}")
    return plan


def load_network(path: str, dx: float = CELL_LENGTH) -> Network:
    """A CSV of segments (from, to, length_m, class, lanes, limit) and the JSON of that stem."""
    table = Path(path)
    text = table.with_suffix(".json")
    return build_network(
        table.stem, read_segments(table), read_plan(text), dx, (str(table), str(text))
    )


# --------------------------------------------------------------------------------------------- made
def both_ways(a, b, length, road, lanes, limit=None) -> list[dict]:
    row = {"length_m": length, "class": road, "lanes": lanes, "limit": limit}
    return [{"from": a, "to": b, **row}, {"from": b, "to": a, **row}]


def corridor_network(dx: float = CELL_LENGTH) -> Network:
    """5 signalised junctions on an arterial of two lanes a direction.

    Side streets of one lane: 32 segments, 12 entries.
    """
    segments, plan = [], {"signals": {}, "demand": {}, "turns": {}}
    chain = ["W", "J1", "J2", "J3", "J4", "J5", "E"]
    x = 0
    plan["nodes"] = {"W": [0, 0]}
    for a, b, length in zip(chain, chain[1:], (300, 300, 225, 350, 250, 300)):
        x += length
        plan["nodes"][b] = [x, 0]
        segments += both_ways(a, b, length, "secondary", 2)
    for g, (west, node, east) in enumerate(zip(chain, chain[1:], chain[2:])):
        north, south = f"N{g + 1}", f"S{g + 1}"
        segments += both_ways(north, node, 200, "tertiary", 1)
        segments += both_ways(south, node, 200, "tertiary", 1)
        plan["signals"][node] = [[west, east], [north, south]]
        for end, y in ((north, 200), (south, -200)):
            plan["nodes"][end] = [plan["nodes"][node][0], y]
        plan["turns"][node] = {
            west: {east: 0.8, north: 0.1, south: 0.1},
            east: {west: 0.8, north: 0.1, south: 0.1},
            north: {south: 0.4, west: 0.3, east: 0.3},
            south: {north: 0.4, west: 0.3, east: 0.3},
        }
        side = (255, 345, 225, 390, 300)[g]
        for start in (north, south):
            plan["demand"][start] = {"motorcycle": 0.4 * side, "car": 0.6 * side}
    for start in ("W", "E"):
        plan["demand"][start] = {"motorcycle": 450, "car": 675}
    return build_network("corridor", segments, plan, dx)


def town_network(n: int, dx: float = CELL_LENGTH) -> Network:
    """A grid of n x n signalised junctions 200 m apart.

    An entry and an exit at every end of a street.
    """
    segments, plan = [], {"signals": {}, "demand": {}}
    inside = {(i, j): f"J{i}_{j}" for i in range(n) for j in range(n)}

    def name(i, j):
        return inside.get((i, j), f"X{i}_{j}")

    for i in range(n):
        road = "secondary" if i % 2 == 0 else "tertiary"
        for j in range(-1, n):
            segments += both_ways(name(i, j), name(i, j + 1), 200, road, 1)
            segments += both_ways(name(j, i), name(j + 1, i), 200, road, 1)
    for (i, j), node in inside.items():
        plan["signals"][node] = [
            [name(i, j - 1), name(i, j + 1)],
            [name(i - 1, j), name(i + 1, j)],
        ]
    places = {name(i, j): [200 * j, 200 * i] for i in range(-1, n + 1) for j in range(-1, n + 1)}
    plan["nodes"] = {row["from"]: places[row["from"]] for row in segments}
    for node in sorted({row["from"] for row in segments} - set(inside.values())):
        plan["demand"][node] = {"motorcycle": 75, "car": 112.5}
    return build_network(f"town{n}", segments, plan, dx)


def find_network(spec, dx: float = CELL_LENGTH, demand=()) -> Network:
    """corridor, townN (a grid of N x N junctions), or the path of a segments CSV or a map.

    demand: files of a map's vehicles, where it does not name them.
    """
    if isinstance(spec, Network):
        return spec
    from common.maps import is_map, read_map  # they end in assemble() above

    if is_map(spec):
        return pool.static(("network", spec, *demand, dx), lambda: read_map(spec, demand, dx))
    if demand:
        raise NetworkError(f"--demand belongs to a map of another program, not to {spec}")
    if spec == "corridor":
        return pool.static(("network", spec, dx), lambda: corridor_network(dx))
    size = spec[4:]
    if spec.startswith("town") and size.isdigit() and 0 < int(size) <= 50:
        return pool.static(("network", spec, dx), lambda: town_network(int(size), dx))
    if not spec.endswith(".csv"):
        raise NetworkError(
            f"--scenario {spec}: must be corridor, townN such as town5 (at most 50), "
            "a segments CSV, or a map: NAME.net.xml, NAME.sumocfg, a roadnet.json, an edge table"
        )
    return load_network(spec, dx)
