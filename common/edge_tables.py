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
    for name in ("u", "v", "length"):
        if name not in columns:
            raise NetworkError(f"{path}: no column {name!r}; an edge table has {', '.join(TABLE)}")
    if "highway" not in columns and "maxspeed" not in columns:
        raise NetworkError(f"{path}: needs a column highway or maxspeed: how fast is a street?")
    extra = [name for name in columns if name not in (*TABLE, "geometry", "")]
    if extra:
        notes.append(f"columns without a use: {', '.join(extra)}")
    rows, both = [], []
    for number, raw in enumerate(reader, 2):
        at = f"{path}: line {number}"
        raw = {key.strip(): (value or "").strip() for key, value in raw.items() if key}
        row = {"from": raw["u"], "to": raw["v"], "line": points_of(raw.get("geometry", ""), at)}
        if not row["from"] or not row["to"]:
            raise NetworkError(f"{at}: u and v must name the two ends")
        row["length_m"] = amount(raw["length"], f"{at}: length", 0.01, 1e5)
        row["class"], row["limit"] = class_and_limit(raw, at)
        one_way = one_way_of(raw.get("oneway", ""), f"{at}: oneway")
        row["lanes"] = lanes_of(raw.get("lanes", ""), one_way, f"{at}: lanes")
        if one_way < 0:
            row = backward(row)
        rows.append(row)
        if not one_way:
            both.append(row)
    there = {(row["from"], row["to"]) for row in rows}
    reverse = [backward(row) for row in both if (row["to"], row["from"]) not in there]
    if reverse:
        notes.append(f"{len(reverse)} two-way streets got their reverse")
    return to_metres(rows + reverse)


def backward(row: dict) -> dict:
    line = [*reversed(row["line"])]
    return row | {"from": row["to"], "to": row["from"], "line": line}


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
    return [x.strip(" '\"") for x in re.split(r"[;|,]", text.strip("[]")) if x.strip(" '\"")]


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
    values = [amount(x, at, 1, 100) for x in values_of(text) if x != "nan"]
    if not values:
        return 1
    return max(1, int(min(values)) // (1 if one_way else 2))


def points_of(text: str, at: str) -> list:
    found = re.fullmatch(r"LINESTRING\s*\((.*)\)", text)
    if not found:
        return []
    try:
        return [tuple(map(float, pair.split()[:2])) for pair in found[1].split(",")]
    except ValueError:
        raise NetworkError(f"{at}: geometry: {text:.60} is no LINESTRING of numbers") from None


def to_metres(rows: list[dict]) -> list[dict]:
    """Lines in degrees as metres around their middle; lengths are the table's."""
    points = np.array([point for row in rows for point in row["line"]]).reshape(-1, 2)
    if not len(points) or np.abs(points[:, 0]).max() > 180 or np.abs(points[:, 1]).max() > 90:
        return rows
    x0, y0 = points.mean(0)
    degree = 111_195.0  # m
    east = degree * math.cos(math.radians(y0))
    for row in rows:
        row["line"] = [((x - x0) * east, (y - y0) * degree) for x, y in row["line"]]
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
    plan = {"signals": {}, "demand": {}, "lines": defaultdict(dict)}
    rank = {name: k for k, name in enumerate(ROADS)}
    for node, approaches in list(into.items()):
        ranks = [rank.get(row["class"].removesuffix("_link"), len(rank)) for row in approaches]
        if len(approaches) >= 3 and sorted(ranks)[2] <= rank["tertiary"]:
            plan["signals"][node] = two_phases(approaches, ranks)
    for row in rows:
        if not {before["from"] for before in into[row["from"]]} - {row["to"]}:
            flow = plan["demand"].setdefault(row["from"], {"car": 0.0})
            flow["car"] += DEFAULT_FLOW * row["lanes"]
    for row in rows:
        if row["line"]:
            plan["lines"][row["from"]][row["to"]] = row["line"]
    return plan


def two_phases(approaches: list[dict], ranks: list[int]) -> list[list[str]]:
    """Opposite approaches together: by bearing, or by rank where there are no lines."""
    names = [row["from"] for row in approaches]
    order = sorted(range(len(names)), key=lambda k: ranks[k])
    first = {order[0], order[1]}
    if all(row["line"] for row in approaches):
        bearings = [bearing(row["line"]) for row in approaches]
        main = bearings[order[0]]
        first = {k for k, angle in enumerate(bearings) if abs(math.cos(angle - main)) > 0.7071}
        if len(first) == len(names):
            first = {order[0]}
    return [
        [names[k] for k in sorted(first)],
        [names[k] for k in range(len(names)) if k not in first],
    ]


def bearing(line: list) -> float:
    (x, y), (u, v) = line[-2], line[-1]
    return math.atan2(v - y, u - x)
