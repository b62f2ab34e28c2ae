"""Static data of signalised road networks: read from files or made, validated, never changed.

from common.networks import find_network
net = find_network("corridor")  # or "town5", or "roads.csv" with roads.json beside it
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
ALL_RED, MIN_GREEN = 4.0, 6.0  # s, where a plan gives none
SHORT = 5.0  # m: below it a segment's cell makes every time step small


class NetworkError(ValueError):
    """One line: what is wrong with a network file, where, and what is expected."""

    exit_code = 2


@dataclass(frozen=True)
class Network:
    """Static data of a network, shared and read-only.

    S segments, M moves over junctions, G signals, E entries, B bins of the mean demand.
    """

    name: str
    ends: tuple  # (from, to) of every segment
    first: np.ndarray  # (S + 1,) first cell of each segment
    dx: np.ndarray  # (S,) m, of a cell
    jam: np.ndarray  # (S,) veh/m of all lanes
    limit: np.ndarray  # (2, S) m/s by class
    move_from: np.ndarray  # (M,) segments, ascending
    move_to: np.ndarray  # (M,)
    share: np.ndarray  # (M,) of the vehicles of move_from; each segment's sum to 1
    entry: np.ndarray  # (S,) the entry's number or -1
    signal: np.ndarray  # (S,) the signal at the end or -1
    green: np.ndarray  # (S,) bit p: green in phase p
    n_phases: np.ndarray  # (G,)
    nodes: tuple  # names of the signalised junctions
    change_at: np.ndarray  # (B,) s of an episode when the mean demand changes, first 0
    base: np.ndarray  # (B, 2, E) mean demand from then on, veh/s
    zone_of: np.ndarray  # (cells,) 0 near, 1, 2 far from the stop line
    zone_share: np.ndarray  # (cells,) of its zone
    zone_length: np.ndarray  # (3, S) m
    all_red: float  # s after every phase
    min_green: float  # s before a phase may end
    notes: tuple  # lines: what is allowed but looks like a slip
    shapes: tuple  # ((x, y), ...) m of every segment, for a picture; () if unknown

    @property
    def lengths(self) -> np.ndarray:
        return self.zone_length.sum(0)

    @property
    def capacity(self) -> np.ndarray:
        """(S,) veh/s of cars that a segment carries, and a green discharges."""
        return capacity_of(self.jam, self.limit[1])

    def leads_on(self) -> np.ndarray:
        """(S,) whether anything leads out of a segment; where not, it is an exit."""
        return np.isin(np.arange(len(self.ends)), self.move_from)

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
        return np.einsum("nb,bke->nke", seconds, self.base) / interval

    def sha256(self) -> str:
        """Of all that the physics reads."""
        plain = self.ends, self.nodes, self.all_red, self.min_green, QUEUE_WAVE
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


class Builder:
    """Segments and a plan on their way to a Network.

    Every method raises NetworkError with the file and the place.
    """

    def __init__(
        self, segments: list[dict], plan: dict, dx: float, where: tuple[str, str]
    ):
        self.table, self.text = where
        for key, value in plan.items():
            if key not in SHAPES:
                raise NetworkError(
                    f"{self.text}: unknown key {key!r}, must be one of {', '.join(SHAPES)}"
                )
            check_shape(value, SHAPES[key], f"{self.text}: {key}")
        self.plan, self.rows, self.notes = plan, segments, []
        self.ends = [(str(row["from"]), str(row["to"])) for row in segments]
        self.index = {pair: s for s, pair in enumerate(self.ends)}
        self.nodes = sorted({node for pair in self.ends for node in pair})
        self.into = {node: [] for node in self.nodes}
        self.out_of = {node: [] for node in self.nodes}
        for s, (start, node) in enumerate(self.ends):
            self.out_of[start].append(s)
            self.into[node].append(s)
        self.size(dx)

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

    def size(self, dx: float):
        """Cells, speeds and zones of the segments."""
        n = len(self.rows)
        self.dx, self.jam, self.limit = np.zeros(n), np.zeros(n), np.zeros((2, n))
        self.zone_length, counts, zone_of, zone_share = np.zeros((3, n)), [], [], []
        for s, row in enumerate(self.rows):
            speed = (
                row.get("limit") or ROADS[row["class"].removesuffix("_link")]
            ) * KMH
            self.limit[:, s] = [min(speed, top) for top in TOP_SPEED]
            count = max(1, round(row["length_m"] / dx))
            self.jam[s], self.dx[s] = RHO_JAM * row["lanes"], row["length_m"] / count
            to_stop = self.dx[s] * (count - 0.5 - np.arange(count))
            zone = np.searchsorted(ZONES, to_stop)
            self.zone_length[:, s] = np.bincount(zone, minlength=3) * self.dx[s]
            counts.append(count)
            zone_of.append(zone)
            zone_share.append(self.dx[s] / self.zone_length[zone, s])
            if row["length_m"] < SHORT:
                self.notes.append(
                    f"{self.name_of(s)} is {row['length_m']:g} m long: time steps shrink with it"
                )
        self.first = np.r_[0, np.cumsum(counts)].astype(np.int64)
        self.zone_of = np.concatenate(zone_of).astype(np.int64)
        self.zone_share = np.concatenate(zone_share)
        self.weight = self.jam * self.limit[1]  # of a way on: lanes times speed

    def name_of(self, s: int) -> str:
        return f"{self.table}: segment {s + 1}, {self.ends[s][0]} > {self.ends[s][1]},"

    def join(self):
        """Moves over the junctions and their shares."""
        turns, moves, shares = self.plan.get("turns", {}), [], []
        for node in turns:
            self.check_node(node, "turns")
            for start in turns[node]:
                self.find_segment(start, node, f"turns: {node}")
        for s, (start, node) in enumerate(self.ends):
            given = turns.get(node, {}).get(start)
            share = (
                self.usual_shares(s)
                if given is None
                else self.given_shares(given, node, start)
            )
            total = sum(share.values())
            for j in self.out_of[node]:
                if share.get(j, 0) > 0:
                    moves.append((s, j))
                    shares.append(share[j] / total)
        moves = np.array(moves, np.int64).reshape(-1, 2)
        self.move_from, self.move_to, self.share = (
            moves[:, 0].copy(),
            moves[:, 1].copy(),
            np.array(shares, float),
        )

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

    def fill(self):
        """Entries, and the mean demand of each."""
        demand, led_into = self.plan.get("demand", {}), set(self.move_to.tolist())
        self.find_changes(demand)
        entries = [s for s in range(len(self.ends)) if s not in led_into]
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
        self.entry, base = np.full(len(self.ends), -1, np.int64), []
        for s in entries:
            start = self.ends[s][0]
            if start not in demand:
                raise NetworkError(
                    f"{self.name_of(s)} is an entry (nothing leads into it) but "
                    f"{self.text}: demand has no {start}: give its flows, 0 to close it"
                )
            together = sum(self.weight[j] for j in self.out_of[start] if j in entries)
            share = self.weight[s] / together
            self.entry[s] = len(base)
            flows = [
                self.flow_over_time(demand[start].get(kind, 0)) for kind in CLASSES
            ]
            base.append(np.array(flows) / 3600 * share)  # (2, B)
            largest = base[-1].sum(0).max()
            most = capacity_of(self.jam[s], self.limit[1, s])
            if largest > most:
                wants, most = 3600 * largest, 3600 * most
                self.notes.append(
                    f"{self.name_of(s)} has a demand of {wants:.0f} veh/h but carries {most:.0f}"
                )
        self.base = np.array(base).T.copy()

    def find_changes(self, demand: dict):
        """The minutes and seconds at which any flow changes."""
        flows = [flow for by_class in demand.values() for flow in by_class.values()]
        minutes = {
            minute for flow in flows if isinstance(flow, list) for minute, _ in flow
        }
        self.minutes = sorted(minutes | {0})
        self.change_at = 60.0 * np.array(self.minutes, float)

    def flow_over_time(self, flow) -> list:
        """veh/h of every bin between two changes."""
        if not isinstance(flow, list):
            return [flow] * len(self.minutes)
        return [[x for at, x in flow if at <= minute][-1] for minute in self.minutes]

    def draw(self):
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
        self.shapes = []
        for start, node in self.ends:
            straight = [
                points[end]
                for end in (start, node)
                if start in points and node in points
            ]
            line = lines.get(start, {}).get(node, straight)
            self.shapes.append(tuple((float(x), float(y)) for x, y in line))

    def light(self):
        """Signals and their phases."""
        signals = self.plan.get("signals", {})
        self.signal, self.green = (
            np.full(len(self.ends), value, np.int64) for value in (-1, 0)
        )
        for g, (node, phases) in enumerate(signals.items()):
            at = f"signals: {node}"
            self.check_node(node, "signals")
            if not 2 <= len(phases) <= 62:  # bits of a whole number
                raise NetworkError(
                    f"{self.text}: {at}: {len(phases)} phases, a signal needs 2 to 62"
                )
            for p, starts in enumerate(phases):
                if not starts:
                    raise NetworkError(
                        f"{self.text}: {at}: phase {p + 1} is empty: name the nodes it serves"
                    )
                for start in starts:
                    self.green[
                        self.find_segment(start, node, f"{at}: phase {p + 1}")
                    ] |= 1 << p
            for s in self.into[node]:
                self.signal[s] = g
                if not self.green[s]:
                    raise NetworkError(
                        f"{self.text}: {at}: {self.ends[s][0]} > {node} is green in no phase"
                    )
            if not self.out_of[node]:
                self.notes.append(
                    f"{self.text}: {at}: no segment leaves it: a signal at an exit"
                )
        self.n_phases = np.array([len(phases) for phases in signals.values()], np.int64)

    def look_for_islands(self):
        """Segments that no vehicle of the largest connected part can reach."""
        part = {}
        for first in self.nodes:
            reached = [] if first in part else [first]
            while reached:
                node = reached.pop()
                if node in part:
                    continue
                part[node] = first
                reached += [self.ends[s][1] for s in self.out_of[node]]
                reached += [self.ends[s][0] for s in self.into[node]]
        parts = Counter(part[start] for start, _ in self.ends)
        largest = parts.most_common(1)[0][0]
        apart = [s for s, (start, _) in enumerate(self.ends) if part[start] != largest]
        if apart:
            self.notes.append(
                f"{self.name_of(apart[0])} and {len(apart) - 1} more have no connection "
                "with the rest"
            )


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
    {from: {to: share}}}, by default in proportion to lanes * limit, never back; all_red, min_green
    (s); for pictures nodes {node: [x, y]} in m and lines {from: {to: [[x, y], ...]}}. A segment
    that leads nowhere is an exit, one that nothing leads into an entry. where: names of both for
    messages.
    """
    b = Builder(segments, plan, dx, where)
    b.join()
    b.fill()
    b.light()
    b.look_for_islands()
    b.draw()
    net = Network(
        name,
        tuple(b.ends),
        b.first,
        b.dx,
        b.jam,
        b.limit,
        b.move_from,
        b.move_to,
        b.share,
        b.entry,
        b.signal,
        b.green,
        b.n_phases,
        tuple(plan.get("signals", {})),
        b.change_at,
        b.base,
        b.zone_of,
        b.zone_share,
        b.zone_length,
        float(plan.get("all_red", ALL_RED)),
        float(plan.get("min_green", MIN_GREEN)),
        tuple(b.notes),
        tuple(b.shapes),
    )
    for array in vars(net).values():
        if isinstance(array, np.ndarray):
            array.setflags(write=False)
    return net


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


def read_text(path: Path) -> str:
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
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as e:
        raise NetworkError(f"{path}: byte {e.start + 1} is not UTF-8") from None
    except OSError as e:
        raise NetworkError(f"{path}: {e.strerror}") from None


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
    for a, b, length in zip(chain, chain[1:], (300, 300, 225, 350, 250, 300)):
        segments += both_ways(a, b, length, "secondary", 2)
    for g, (west, node, east) in enumerate(zip(chain, chain[1:], chain[2:])):
        north, south = f"N{g + 1}", f"S{g + 1}"
        segments += both_ways(north, node, 200, "tertiary", 1)
        segments += both_ways(south, node, 200, "tertiary", 1)
        plan["signals"][node] = [[west, east], [north, south]]
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
    for node in sorted({row["from"] for row in segments} - set(inside.values())):
        plan["demand"][node] = {"motorcycle": 75, "car": 112.5}
    return build_network(f"town{n}", segments, plan, dx)


def find_network(spec, dx: float = CELL_LENGTH) -> Network:
    """corridor, townN (a grid of N x N junctions), or the path of a segments CSV."""
    if isinstance(spec, Network):
        return spec
    if spec == "corridor":
        return pool.static(("network", spec, dx), lambda: corridor_network(dx))
    size = spec[4:]
    if spec.startswith("town") and size.isdigit() and 0 < int(size) <= 50:
        return pool.static(("network", spec, dx), lambda: town_network(int(size), dx))
    if not spec.endswith(".csv"):
        raise NetworkError(
            f"--scenario {spec}: must be corridor, townN such as town5 (at most 50), "
            "or a segments CSV"
        )
    return load_network(spec, dx)
