"""Static data of signalised road networks: read from files, or made (a corridor, a town), validated, never changed.

    from common.networks import find_network
    net = find_network("corridor")  # or "town5", or "roads.csv" with roads.json beside it
"""
import csv
import difflib
import io
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from common.gpu_pool import pool

KMH = 1.0 / 3.6
CLASSES = ("motorcycle", "car")
VMAX = (100 * KMH, 120 * KMH)  # m/s, empty road without a limit
RHO_JAM = 0.2  # veh/m and lane
K_ANCESTOR = (5.0, 10.0)  # m/s
ROADS = {"motorway": 120.0, "primary": 60.0, "secondary": 50.0, "tertiary": 40.0, "residential": 30.0}  # km/h
CELL_LENGTH = 25.0  # m
ZONES = (50.0, 150.0)  # m upstream of the stop line: near, middle, far
INV_J, CELL, INV_DX, V_M, V_C, K_M, K_C, JAM = range(8)  # columns of Network.par


class NetworkError(ValueError):
    """One line: what is wrong with a network file, where, and what is expected."""


@dataclass(frozen=True)
class Network:
    """Static data of a network, S segments, M movements over junctions, G signals, E entries. Shared, read-only."""

    name: str
    ends: tuple  # (from, to) of every segment
    first: np.ndarray  # (S + 1,) first cell of each segment
    par: np.ndarray  # (S, 8) INV_J, CELL, INV_DX, V_M, V_C, K_M, K_C, JAM: m, s, veh
    moves: tuple  # mov_in, mov_out (M,) sorted by mov_in; in_ptr (S + 1,); by_out (M,); out_ptr (S + 1,)
    beta: np.ndarray  # (2, M) share of a class that turns there; each incoming segment's sum to 1
    entry: np.ndarray  # (S,) entry's number or -1
    signal: np.ndarray  # (S,) signal at the end or -1
    green: np.ndarray  # (S,) bit p: green in phase p
    n_phases: np.ndarray  # (G,)
    nodes: tuple  # names of the signalised junctions
    base: np.ndarray  # (2, E) mean demand, veh/s
    zone_of: np.ndarray  # (cells,) 0 near, 1, 2 far from the stop line
    weight: np.ndarray  # (cells,) share of its zone
    zone_length: np.ndarray  # (3, S) m

    @property
    def lengths(self) -> np.ndarray:
        return self.zone_length.sum(0)


def near(name: str, names) -> str:
    found = difflib.get_close_matches(str(name), [str(n) for n in names], 1)
    return f", did you mean {found[0]}?" if found else ""


SHAPES = {"signals": (dict, list, list, str), "demand": (dict, dict, float), "turns": (dict, dict, dict, float)}
MEANING = {dict: "an object", list: "a list", str: "a node's name", float: "a number >= 0"}


def check_shape(value, shape: tuple, at: str):
    """Raises NetworkError where value is not what `shape` says, level by level, and names the place."""
    kind, *inner = shape
    if kind is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
    else:
        good = isinstance(value, kind)
    if not good:
        raise NetworkError(f"{at}: {value!r} must be {MEANING[kind]}")
    for key, part in value.items() if kind is dict else enumerate(value, 1) if kind is list else ():
        check_shape(part, inner, f"{at}: {key}")


def build_network(name: str, segments: list[dict], plan: dict, dx: float = CELL_LENGTH, pressure: str = "power",
                  where: tuple[str, str] = ("segments", "plan")) -> Network:
    """Records of segments (from, to, length_m, class, lanes, limit km/h or None for the class's) and a plan -> Network.

    plan: signals {node: [[from, ...] a phase]}; demand {node: {motorcycle, car: veh/h}}, joined by every entry; turns
    {node: {from: {to: share}}}, by default in proportion to lanes * limit, never back. A segment that leads nowhere is
    an exit, one that nothing leads into an entry. where: names of both for messages. Raises NetworkError.
    """
    table, text = where
    ends = [(str(r["from"]), str(r["to"])) for r in segments]
    n = len(ends)
    nodes = sorted({node for pair in ends for node in pair})

    def known(node, section):
        if node not in nodes:
            raise NetworkError(f"{text}: {section}: no segment touches node {node!r}{near(node, nodes)}")

    for key in plan:
        if key not in ("signals", "demand", "turns"):
            raise NetworkError(f"{text}: unknown key {key!r}, must be signals, demand or turns")
        check_shape(plan[key], SHAPES[key], f"{text}: {key}")
    signals, demand, turns = (plan.get(key, {}) for key in ("signals", "demand", "turns"))
    into = {node: [s for s in range(n) if ends[s][1] == node] for node in nodes}
    out_of = {node: [s for s in range(n) if ends[s][0] == node] for node in nodes}
    par, cells, zone_of, weight, zone_length = np.zeros((n, 8)), [], [], [], np.zeros((3, n))
    k_is_v, factor = pressure != "ancestor", K_ANCESTOR
    for s, row in enumerate(segments):
        v = [min((row.get("limit") or ROADS[row["class"]]) * KMH, top) for top in VMAX]
        count = max(1, round(row["length_m"] / dx))
        jam, step = RHO_JAM * row["lanes"], row["length_m"] / count
        par[s] = 1 / jam, step, 1 / step, *v, *(v if k_is_v else factor), jam
        to_stop = step * (count - 0.5 - np.arange(count))
        zone = np.searchsorted(ZONES, to_stop)
        zone_length[:, s] = np.bincount(zone, minlength=3) * step
        cells.append(count)
        zone_of.append(zone)
        weight.append(step / zone_length[zone, s])
    moves, beta = [], []
    for node in turns:
        known(node, "turns")
    for s, (start, node) in enumerate(ends):
        ways = [j for j in out_of[node] if ends[j][1] != start]
        given = turns.get(node, {}).get(start)
        if given is None:
            shares = {ends[j][1]: par[j, JAM] * par[j, V_C] for j in ways}
        else:
            shares = given
            for to in shares:
                if to not in {ends[j][1] for j in out_of[node]}:
                    raise NetworkError(f"{text}: turns: {node}: {start}: no segment {node} > {to}{near(to, nodes)}")
        total = sum(shares.values())
        if ways and not total > 0:
            raise NetworkError(f"{text}: turns: {node}: {start}: the shares add up to {total}, must be above 0")
        if given is not None and abs(total - 1) > 1e-6:
            raise NetworkError(f"{text}: turns: {node}: {start}: the shares add up to {total:g}, must be 1")
        for j in out_of[node]:
            if shares.get(ends[j][1], 0) > 0:
                moves.append((s, j))
                beta.append(shares[ends[j][1]] / total)
    for node in turns:
        for start in turns[node]:
            if (start, node) not in ends:
                raise NetworkError(f"{text}: turns: {node}: no segment {start} > {node}{near(start, nodes)}")
    moves = np.array(moves, np.int64).reshape(-1, 2)
    mov_in, mov_out = moves[:, 0].copy(), moves[:, 1].copy()
    by_out = np.argsort(mov_out, kind="stable").astype(np.int64)
    ptr = [np.r_[0, np.cumsum(np.bincount(m, minlength=n))].astype(np.int64) for m in (mov_in, mov_out)]
    entry, base = np.full(n, -1, np.int64), []
    for node in demand:
        known(node, "demand")
        for kind in demand[node]:
            if kind not in CLASSES:
                raise NetworkError(f"{text}: demand: {node}: unknown class {kind!r}, must be motorcycle or car")
        if not any(ptr[1][s] == ptr[1][s + 1] for s in out_of[node]):
            raise NetworkError(f"{text}: demand: {node}: no entry begins there (nothing leads into an entry)")
    for s, (start, _) in enumerate(ends):
        if ptr[1][s] < ptr[1][s + 1]:
            continue
        if start not in demand:
            raise NetworkError(f"{table}: segment {s + 1}, {start} > {ends[s][1]}, is an entry (nothing leads into it) "
                               f"but {text}: demand has no {start}: give its flows, 0 to close it")
        mine = [j for j in out_of[start] if ptr[1][j] == ptr[1][j + 1]]
        share = par[s, JAM] * par[s, V_C] / sum(par[j, JAM] * par[j, V_C] for j in mine)
        entry[s] = len(base)
        base.append([demand[start].get(kind, 0) / 3600 * share for kind in CLASSES])
    signal, green, n_phases = np.full(n, -1, np.int64), np.zeros(n, np.int64), []
    for g, (node, phases) in enumerate(signals.items()):
        known(node, "signals")
        if not 2 <= len(phases) <= 62:  # bits of a whole number
            raise NetworkError(f"{text}: signals: {node}: {len(phases)} phases, a signal needs 2 to 62")
        for p, starts in enumerate(phases):
            for start in starts:
                if (start, node) not in ends:
                    raise NetworkError(
                        f"{text}: signals: {node}: phase {p + 1}: no segment {start} > {node}{near(start, nodes)}")
                green[ends.index((start, node))] |= 1 << p
        for s in into[node]:
            signal[s] = g
            if not green[s]:
                raise NetworkError(f"{text}: signals: {node}: {ends[s][0]} > {node} is green in no phase")
        n_phases.append(len(phases))
    net = Network(
        name, tuple(ends), np.r_[0, np.cumsum(cells)].astype(np.int64), par, (mov_in, mov_out, ptr[0], by_out, ptr[1]),
        np.array([beta, beta]), entry, signal, green, np.array(n_phases, np.int64), tuple(signals),
        np.array(base).T.copy(), np.concatenate(zone_of).astype(np.int64), np.concatenate(weight),
        zone_length)
    for array in (*vars(net).values(), *net.moves):
        if isinstance(array, np.ndarray):
            array.setflags(write=False)
    return net


MOST = {"length_m": 1e5, "lanes": 100, "limit": 1e3}  # m, lanes, km/h: beyond it is a slip
COLUMNS = {"from": str, "to": str, "length_m": float, "class": str, "lanes": int, "limit": float}


def unique(where: Path, pairs: list) -> dict:
    """JSON would take the last of two equal keys in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise NetworkError(f"{where}: the key {max(keys, key=keys.count)!r} is there twice")
    return found


def load_network(path: str, dx: float = CELL_LENGTH, pressure: str = "power") -> Network:
    """A segments CSV (from, to, length_m, class, lanes, limit km/h or empty) and the JSON of that stem."""
    path = Path(path)
    plan_path = path.with_suffix(".json")
    for p in (path, plan_path):
        if not p.is_file():
            raise NetworkError(f"{p}: no such file (a network is NAME.csv with its segments and NAME.json beside it)")
    rows = []
    texts = []
    for p in (path, plan_path):
        try:
            texts.append(p.read_text("utf-8-sig"))
        except UnicodeDecodeError as e:
            raise NetworkError(f"{p}: byte {e.start + 1} is not UTF-8") from None
    table, plan_text = texts
    with io.StringIO(table, newline="") as file:
        reader = csv.DictReader(file)
        got = reader.fieldnames or []
        for column in COLUMNS:
            if column not in got:
                raise NetworkError(f"{path}: no column {column!r}, needs {', '.join(COLUMNS)}")
        for column in got:
            if column not in COLUMNS:
                raise NetworkError(f"{path}: unknown column {column!r}{near(column, COLUMNS)}")
        for number, raw in enumerate(reader, 2):
            row = {}
            if None in raw:
                raise NetworkError(f"{path}: line {number}: more values than the {len(COLUMNS)} columns")
            for column, kind in COLUMNS.items():
                value = (raw[column] or "").strip()
                at = f"{path}: line {number}: {column}"
                try:
                    row[column] = None if column == "limit" and not value else kind(value)
                except ValueError:
                    word = "a whole number" if kind is int else "a number"
                    raise NetworkError(f"{at}: {value!r} is not {word}") from None
                if kind is str and not value:
                    raise NetworkError(f"{at}: is empty")
                if kind is not str and row[column] is not None and not 0 < row[column] < math.inf:
                    raise NetworkError(f"{at}: {value} must be above 0")
                if kind is not str and (row[column] or 0) > MOST[column]:
                    raise NetworkError(f"{at}: {value} must be at most {MOST[column]:g}")
            if row["class"] not in ROADS:
                raise NetworkError(
                    f"{path}: line {number}: class: unknown {row['class']!r}, must be {', '.join(ROADS)}")
            if row["from"] == row["to"]:
                raise NetworkError(f"{path}: line {number}: from and to are both {row['to']!r}")
            if (row["from"], row["to"]) in {(r["from"], r["to"]) for r in rows}:
                raise NetworkError(
                    f"{path}: line {number}: {row['from']} > {row['to']} is there twice: merge the lanes")
            rows.append(row)
    if not rows:
        raise NetworkError(f"{path}: no segments")
    try:
        plan = json.loads(plan_text, object_pairs_hook=partial(unique, plan_path))
    except json.JSONDecodeError as e:
        raise NetworkError(f"{plan_path}: line {e.lineno}: not JSON: {e.msg}") from None
    if not isinstance(plan, dict):
        raise NetworkError(f"{plan_path}: must be an object with signals, demand and turns")
    return build_network(path.stem, rows, plan, dx, pressure, (str(path), str(plan_path)))


def both_ways(a, b, length, road, lanes, limit=None) -> list[dict]:
    row = {"length_m": length, "class": road, "lanes": lanes, "limit": limit}
    return [{"from": a, "to": b, **row}, {"from": b, "to": a, **row}]


def corridor_network(dx: float = CELL_LENGTH, pressure: str = "power") -> Network:
    """5 signalised junctions on an arterial of two lanes a direction, side streets of one: 32 segments, 12 entries."""
    segments, plan = [], {"signals": {}, "demand": {}, "turns": {}}
    chain = ["W", "J1", "J2", "J3", "J4", "J5", "E"]
    for a, b, length in zip(chain, chain[1:], (300, 300, 225, 350, 250, 300)):
        segments += both_ways(a, b, length, "secondary", 2)
    for g, (west, node, east) in enumerate(zip(chain, chain[1:], chain[2:])):
        north, south = f"N{g + 1}", f"S{g + 1}"
        segments += both_ways(north, node, 200, "tertiary", 1) + both_ways(south, node, 200, "tertiary", 1)
        plan["signals"][node] = [[west, east], [north, south]]
        plan["turns"][node] = {
            west: {east: 0.8, north: 0.1, south: 0.1}, east: {west: 0.8, north: 0.1, south: 0.1},
            north: {south: 0.4, west: 0.3, east: 0.3}, south: {north: 0.4, west: 0.3, east: 0.3}}
        side = (340, 460, 300, 520, 400)[g]
        for node in (north, south):
            plan["demand"][node] = {"motorcycle": 0.4 * side, "car": 0.6 * side}
    for node in ("W", "E"):
        plan["demand"][node] = {"motorcycle": 600, "car": 900}
    return build_network("corridor", segments, plan, dx, pressure)


def town_network(n: int, dx: float = CELL_LENGTH, pressure: str = "power") -> Network:
    """A grid of n x n signalised junctions 200 m apart with an entry and an exit at every end of a street."""
    segments, plan = [], {"signals": {}, "demand": {}}
    inside = {(i, j): f"J{i}_{j}" for i in range(n) for j in range(n)}

    def name(i, j):
        return inside.get((i, j), f"X{i}_{j}")

    for i in range(n):
        for j in range(-1, n):
            segments += both_ways(name(i, j), name(i, j + 1), 200, "secondary" if i % 2 == 0 else "tertiary", 1)
            segments += both_ways(name(j, i), name(j + 1, i), 200, "secondary" if i % 2 == 0 else "tertiary", 1)
    for (i, j), node in inside.items():
        plan["signals"][node] = [[name(i, j - 1), name(i, j + 1)], [name(i - 1, j), name(i + 1, j)]]
    for node in {r["from"] for r in segments} - set(inside.values()):
        plan["demand"][node] = {"motorcycle": 100, "car": 150}
    plan["demand"] = dict(sorted(plan["demand"].items()))
    return build_network(f"town{n}", segments, plan, dx, pressure)


def find_network(spec, pressure: str = "power", dx: float = CELL_LENGTH) -> Network:
    """corridor, townN (a grid of N x N junctions), or the path of a segments CSV."""
    if isinstance(spec, Network):
        return spec
    if spec == "corridor":
        return pool.static(("network", spec, dx, pressure), lambda: corridor_network(dx, pressure))
    if spec.startswith("town") and spec[4:].isdigit() and int(spec[4:]) > 0:
        return pool.static(("network", spec, dx, pressure), lambda: town_network(int(spec[4:]), dx, pressure))
    if not spec.endswith(".csv"):
        raise NetworkError(f"--scenario {spec}: must be freeway, corridor, townN such as town5, or a segments CSV")
    return load_network(spec, dx, pressure)
