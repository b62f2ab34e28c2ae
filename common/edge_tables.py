"""Tables of edges, as the tools of OpenStreetMap export them, as networks.

from common.edge_tables import read_edges
net = read_edges("edges.csv")  # u, v, highway, length, oneway, lanes, maxspeed

Signals, demand and turns stand in edges.json, which is written where it is not there.
"""

import csv
import dataclasses
import io
import math
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from common.maps import DEFAULT_FLOW, SHORTEST, write_json
from common.networks import (
    CELL_LENGTH,
    ROADS,
    Network,
    NetworkError,
    build_network,
    read_plan,
    read_text,
)

TABLE = "u", "v", "highway", "length", "oneway", "lanes", "maxspeed"
MILE = 1.609344  # km
DEGREE = 111_195.0  # m
RANKS = list(ROADS)  # the greatest first


def read_edges(path, dx: float = CELL_LENGTH) -> Network:
    """An edge table (u, v, highway, length, oneway, lanes, maxspeed) -> Network.

    Signals, demand and turns are in the JSON of that name, as for any segments CSV; where it is not
    there it is written with a flow at every entry and a proposal of signals, for you to edit.
    """
    path, notes = Path(path), []
    rows = merge_edges(table_rows(path, notes), notes)
    if not rows:
        raise NetworkError(f"{path}: no edges between different nodes")
    beside = path.with_suffix(".json")
    if not beside.is_file():
        write_json(beside, propose_plan(rows))
        notes.append(f"{beside} written: signals are a proposal, flows a default: edit it")
    for row in rows:
        row.pop("line", None)
    plan = read_plan(beside)
    net = build_network(path.stem, rows, plan, dx, (str(path), str(beside)))
    return dataclasses.replace(net, notes=(*notes, *net.notes))


def table_rows(path: Path, notes: list) -> list[dict]:
    """Segments of the table, two-way streets with their reverse."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    columns = [name.strip() for name in reader.fieldnames or []]
    check_columns(path, columns, notes)
    try:
        table = list(reader)
    except csv.Error as e:
        raise NetworkError(f"{path}: line {reader.line_num}: {e}") from None
    rows, both = [], []
    for number, raw in enumerate(table, 2):
        cells = {}
        for key, text in raw.items():
            if key is not None:  # None: cells beyond the last column
                cells[key.strip()] = (text or "").strip()
        row, one_way = read_row(cells, f"{path}: line {number}")
        rows.append(row)
        if not one_way:
            both.append(row)
    there = {(row["from"], row["to"]) for row in rows}
    reverse = [backward(row) for row in both]
    reverse = [row for row in reverse if (row["from"], row["to"]) not in there]
    if reverse:
        notes.append(f"{len(reverse)} two-way streets got their reverse")
    return to_metres(rows + reverse)


def check_columns(path: Path, columns: list, notes: list):
    for name in ("u", "v", "length"):
        if name not in columns:
            raise NetworkError(f"{path}: no column {name!r}; an edge table has {', '.join(TABLE)}")
    if "highway" not in columns and "maxspeed" not in columns:
        raise NetworkError(f"{path}: needs a column highway or maxspeed: how fast is a street?")
    known = *TABLE, "geometry", ""
    extra = [name for name in columns if name not in known]
    if extra:
        notes.append(f"columns without a use: {', '.join(extra)}")


def read_row(cells: dict, at: str) -> tuple[dict, int]:
    """A segment and one_way_of its street."""
    if not cells["u"] or not cells["v"]:
        raise NetworkError(f"{at}: u and v must name the two ends")
    one_way = one_way_of(cells.get("oneway", ""), f"{at}: oneway")
    street, limit = class_and_limit(cells, at)
    row = {
        "from": cells["u"],
        "to": cells["v"],
        "line": points_of(cells.get("geometry", ""), at),
        "length_m": amount(cells["length"], f"{at}: length", 0.01, 1e5),
        "class": street,
        "limit": limit,
        "lanes": lanes_of(cells.get("lanes", ""), one_way, f"{at}: lanes"),
    }
    return (backward(row) if one_way < 0 else row), one_way


def backward(row: dict) -> dict:
    back = dict(row)
    back["from"] = row["to"]
    back["to"] = row["from"]
    back["line"] = row["line"][::-1]
    return back


def amount(text: str, at: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        raise NetworkError(f"{at}: {text!r:.60} is not a number") from None
    if not low <= value <= high:
        raise NetworkError(f"{at}: {text} must be from {low:g} to {high:g}")
    return value


def values_of(text: str) -> list[str]:
    """Several values of one street: ['50', '30'], 50;30 or 50|30."""
    pieces = re.split(r"[;|,]", text.strip("[]"))
    values = [piece.strip(" '\"") for piece in pieces]
    return [value for value in values if value]


def class_and_limit(raw: dict, at: str) -> tuple[str, float | None]:
    """The first known class; the lowest limit in km/h, None for the class's."""
    limits = []
    for text in values_of(raw.get("maxspeed", "")):
        if text in ("none", "signals", "nan", "walk") or ":" in text:
            continue  # no number, or a country's rule such as DE:urban
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(mph|km/?h|kph)?", text)
        if not found:
            raise NetworkError(f"{at}: maxspeed: {text!r:.60} is no speed in km/h or mph")
        limits.append(float(found[1]) * (MILE if found[2] == "mph" else 1))
    classes = values_of(raw.get("highway", ""))
    known = [name for name in classes if name.removesuffix("_link") in ROADS]
    if not known and not limits:
        which, given = ", ".join(ROADS), raw.get("highway", "")
        raise NetworkError(f"{at}: highway: {given!r:.60}: give maxspeed, or one of {which}")
    limit = min(limits) if limits else None
    if limit is not None and not 3 <= limit <= 1000:
        raise NetworkError(f"{at}: maxspeed: {limit:g} km/h must be from 3 to 1000")
    return (known or classes or ["road"])[0], limit


def one_way_of(text: str, at: str) -> int:
    """1 from u to v, -1 back, 0 both."""
    words = {
        "": 0,
        "false": 0,
        "no": 0,
        "0": 0,
        "true": 1,
        "yes": 1,
        "1": 1,
        "-1": -1,
        "reverse": -1,
    }
    if text.lower() not in words:
        raise NetworkError(f"{at}: {text!r:.60} must be one of {', '.join(words)}")
    return words[text.lower()]


def lanes_of(text: str, one_way: int, at: str) -> int:
    """Lanes of one direction: a two-way street's number is that of both."""
    values = [amount(value, at, 1, 100) for value in values_of(text) if value != "nan"]
    least = int(min(values, default=1))
    return least if one_way else max(1, least // 2)


def points_of(text: str, at: str) -> list:
    found = re.fullmatch(r"LINESTRING\s*\((.*)\)", text)
    if not found:
        return []
    line = []
    try:
        for point in found[1].split(","):
            x, y, *_ = point.split()
            line.append((float(x), float(y)))
    except ValueError:
        raise NetworkError(f"{at}: geometry: {text:.60} is no LINESTRING of numbers") from None
    if len(line) < 2:
        raise NetworkError(f"{at}: geometry: {text:.60} needs 2 points or more")
    return line


def to_metres(rows: list[dict]) -> list[dict]:
    """Lines in degrees as metres around their middle; lengths are the table's."""
    points = [point for row in rows for point in row["line"]]
    if not points:
        return rows
    east, north = np.array(points).T
    degrees = np.abs(east).max() <= 180 and np.abs(north).max() <= 90
    if not degrees:
        return rows
    middle = np.array([east.mean(), north.mean()])
    shrunk = math.cos(math.radians(middle[1]))
    scale = DEGREE * np.array([shrunk, 1.0])
    for row in rows:
        if row["line"]:
            metres = (np.array(row["line"]) - middle) * scale
            row["line"] = metres.tolist()
    return rows


def merge_edges(rows: list[dict], notes: list) -> list[dict]:
    """Ends of short edges become one node; loops go; of parallel edges one has all lanes."""
    same = {}
    short = [row for row in rows if row["length_m"] < SHORTEST and row["from"] != row["to"]]
    for row in short:
        a, b = (find_root(same, row[end]) for end in ("from", "to"))
        if a != b:
            same[max(a, b)] = min(a, b)
    found, loops, parallel = {}, 0, 0
    for row in rows:
        pair = find_root(same, row["from"]), find_root(same, row["to"])
        if pair[0] == pair[1]:
            loops += row["from"] == row["to"] or row["length_m"] >= SHORTEST
        elif pair in found:
            parallel += 1
            found[pair]["lanes"] += row["lanes"]
        else:
            found[pair] = row | {"from": pair[0], "to": pair[1]}
    for count, what in (
        (len(short), f"edges shorter than {SHORTEST:g} m merged with their neighbours"),
        (loops, "edges from a node to itself left out"),
        (parallel, "edges beside another between the same nodes: their lanes added to it"),
    ):
        if count:
            notes.append(f"{count} {what}")
    return list(found.values())


def find_root(same: dict, node: str) -> str:
    while node in same:
        node = same[node]
    return node


def propose_plan(rows: list[dict]) -> dict:
    """Signals where three streets of some rank meet, and a flow at every entry."""
    into = defaultdict(list)
    for row in rows:
        into[row["to"]].append(row)
    signals, demand, lines = {}, {}, defaultdict(dict)
    for node, approaches in into.items():
        if len(approaches) >= 3:
            third = sorted(map(rank_of, approaches))[2]
            if third <= RANKS.index("tertiary"):
                signals[node] = two_phases(approaches)
    for row in rows:
        start, end, line = row["from"], row["to"], row["line"]
        others = [before for before in into.get(start, ()) if before["from"] != end]
        if not others:
            flow = demand.setdefault(start, {"car": 0.0})
            flow["car"] += DEFAULT_FLOW * row["lanes"]
        if line:
            lines[start][end] = line
    return {"signals": signals, "demand": demand, "lines": lines}


def rank_of(row: dict) -> int:
    """0 for the greatest class of street."""
    name = row["class"].removesuffix("_link")
    return RANKS.index(name) if name in RANKS else len(RANKS)


def two_phases(approaches: list[dict]) -> list[list[str]]:
    """Opposite approaches together: by bearing, or by rank where there are no lines."""
    by_rank = sorted(approaches, key=rank_of)
    main = by_rank[0]
    first = by_rank[:2]
    if all(row["line"] for row in approaches):
        first = [row for row in approaches if is_along(row, main)]
        if len(first) == len(approaches):
            first = [main]
    names = [row["from"] for row in first]
    others = [row["from"] for row in approaches if row not in first]
    return [names, others]


def is_along(row: dict, main: dict) -> bool:
    """Whether a road ends within 45 degrees of another's direction, or of its opposite."""
    angle = bearing(row["line"]) - bearing(main["line"])
    return abs(math.cos(angle)) > math.cos(math.pi / 4)


def bearing(line: list) -> float:
    (x, y), (u, v) = line[-2:]
    return math.atan2(v - y, u - x)
