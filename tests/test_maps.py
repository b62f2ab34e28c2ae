"""Maps of other programs: what they become, ten broken or odd ones, edge tables, CityFlow, pictures."""

import gzip
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from common import maps, networks, run
from scripts import draw_map

pytest.importorskip("sumolib", reason="optional: requirements-sumo.txt")
sumo = pytest.importorskip("sumo", reason="optional: requirements-sumo.txt")

ROOT = Path(__file__).resolve().parents[1]
PLACES = {"W": (-300, 0), "E": (300, 0), "N": (0, 300), "S": (0, -300), "M": (-150, 0)}
LANES = {"WM": 2, "MJ": 2, "JE": 2, "JW": 1, "NJ": 1, "JS": 1, "EJ": 2}
ROADS = "".join(
    f'<edge id="{name}" from="{name[0]}" to="{name[1]}" numLanes="{n}" speed="13.9" priority="{n}"/>'
    for name, n in LANES.items())
WAYS = [("WM", "JE"), ("WM", "JE"), ("WM", "JS"), ("NJ", "JS"), ("EJ", "JW"), ("EJ", "JS")] * 10
TRIPS = "".join(f'<trip id="t{k}" depart="{100 + 10 * k}" from="{a}" to="{b}"/>' for k, (a, b) in enumerate(WAYS))


def netconvert(folder: Path, *options) -> Path:
    out = folder / "cross.net.xml"
    binary = maps.sumo().checkBinary("netconvert")
    done = subprocess.run([binary, *options, "-o", out], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def cross(tmp_path_factory):
    """A signalised crossing, its western road of two edges in a row; 60 trips from second 100 on."""
    folder = tmp_path_factory.mktemp("cross")
    nodes = "".join(f'<node id="{n}" x="{x}" y="{y}"/>' for n, (x, y) in PLACES.items())
    (folder / "a.nod.xml").write_text(f'<nodes>{nodes}<node id="J" x="0" y="0" type="traffic_light"/></nodes>')
    (folder / "a.edg.xml").write_text(f"<edges>{ROADS}</edges>")
    (folder / "cross.rou.xml").write_text(f"<routes>{TRIPS}</routes>")
    netconvert(folder, "-n", "a.nod.xml", "-e", "a.edg.xml", "--no-turnarounds", "--tls.yellow.time", "4")
    (folder / "cross.sumocfg").write_text(
        '<configuration><input><net-file value="cross.net.xml"/><route-files value="cross.rou.xml"/></input>'
        '<time><begin value="100"/><end value="700"/></time></configuration>')
    return folder


@pytest.fixture
def own(cross, tmp_path):
    """A copy of the crossing to break."""
    for path in cross.glob("cross.*"):
        (tmp_path / path.name).write_text(path.read_text())
    return tmp_path


def shares(net) -> np.ndarray:
    return np.bincount(net.move_from, net.share, len(net.ids)) + net.leave


def test_a_crossing_becomes_lane_groups_phases_and_demand(cross):
    net, layout = maps.read_both(cross / "cross.sumocfg")
    assert shares(net) == pytest.approx(np.ones(len(net.ids)))
    assert len(net.nodes) == 1 and net.amber[0] == 4
    program = maps.read_net(cross / "cross.net.xml").programs["J"]
    greens = [program.phases[k] for k in maps.greens_of(program)]
    assert net.durations[0].tolist() == [seconds for seconds, *_ in greens]
    assert layout.tls["J"] == ("J", tuple(state for _, state, _ in greens))
    assert vehicles(net).sum() == pytest.approx(60)  # every trip, in bins of a minute
    assert net.base.shape[0] == 10
    west = [s for s, name in enumerate(net.ids) if name.startswith("MJ")]
    assert net.lengths[west] == pytest.approx(300, abs=30)  # the two edges in a row are one
    assert net.jam[west].sum() == pytest.approx(2 * networks.RHO_JAM)
    stretches = layout.lanes[net.ids[west[0]]]
    assert {lane.split("_")[0] for lane, *_ in stretches} == {"WM", "MJ"}
    assert (net.signal[west] == 0).all()


def test_a_left_turn_gives_way_to_those_it_crosses(cross):
    net = maps.read_sumo(cross / "cross.sumocfg")
    left = [s for s, name in enumerate(net.ids) if name.startswith("EJ") and net.minor[s]]
    assert len(left) == 1
    rivals = {net.ids[s].split(":")[0] for s in net.yield_to[net.yield_ptr[left[0]]:net.yield_ptr[left[0] + 1]]}
    assert rivals == {"MJ"}


def test_saturation_flow_is_the_drivers_headway(cross):
    """Defaults of SUMO: tau 1 s, 5 m and a gap of 2.5 m; straight on at the limit."""
    net = maps.read_sumo(cross / "cross.sumocfg")
    straight = next(s for s, name in enumerate(net.ids) if name.startswith("MJ") and not net.minor[s])
    lanes = net.jam[straight] / networks.RHO_JAM
    expected = 3600 / (1 + maps.REACTION + 7.5 / 13.9)
    assert 3600 * net.saturation[straight] / lanes <= expected * 1.001
    assert 3600 * net.saturation[straight] / lanes > 0.7 * expected


def test_a_program_counts_from_sumos_clock(own):
    text = (own / "cross.net.xml").read_text()
    (own / "cross.net.xml").write_text(re.sub(r'programID="0" offset="0"', 'programID="0" offset="7"', text))
    net = maps.read_sumo(own / "cross.sumocfg")
    cycle = (net.durations[0] + net.change[0]).sum()
    assert net.offset[0] == pytest.approx((7 - 100) % cycle)


# what is broken, the file, what in it, by what; what the line names
BROKEN = {
    "unknown connection": ("cross.net.xml", 'from="NJ" to="JS"', 'from="NJ" to="XX"', "XX"),
    "demand edge not there": ("cross.rou.xml", 'to="JE"', 'to="JX"', "JX"),
    "two networks in one file": ("cross.net.xml", "</net>", "</net><net/>", "not XML"),
    "not a map": ("cross.net.xml", r"(</?)net\b", r"\1town", "<town>"),
    "cut off": ("cross.net.xml", "</net>", "", "not XML"),
    "nobody departs": ("cross.sumocfg", 'begin value="100"', 'begin value="695"', "695"),
    "no program": ("cross.net.xml", r"(?s)<tlLogic.*?</tlLogic>", "", "tlLogic"),
    "a signal that is off": ("cross.net.xml", 'programID="0"', 'programID="off"', "tlLogic J"),
    "a phase without end": ("cross.net.xml", r'(<phase )duration="\d+"', r"\1", "tlLogic J"),
    "programs by the clock": ("cross.net.xml", "</net>", '<WAUT id="night"/></net>', "WAUT night"),
    "flows by measurement": ("cross.net.xml", "</net>", '<calibrator id="c"/></net>', "calibrator c"),
    "nobody may drive": ("cross.net.xml", 'speed="13.90"', 'speed="0"', "edge EJ"),
    "not in order": ("cross.rou.xml", 'depart="200"', 'depart="150"', "trip t10"),
    "five parts of a time": ("cross.sumocfg", 'value="700"', 'value="0:0:0:0:700"', "0:0:0:0:700"),
    "a state too short": ("cross.net.xml", r'state="\w+"', 'state="G"', "'J'"),
    "never green": ("cross.net.xml", r'state="(\w)\w', r'state="\1r', "green in no phase"),
    "no cars": ("cross.net.xml", "<lane ", '<lane allow="rail" ', "cars"),
    "no begin": ("cross.sumocfg", 'begin value="100"', 'begin value="dawn"', "dawn"),
    "no such net": ("cross.sumocfg", "cross.net", "town.net", "town.net.xml"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_map_is_one_line_that_names_it(own, case):
    name, old, new, word = BROKEN[case]
    text = (own / name).read_text()
    changed = re.sub(old, new, text)
    assert changed != text
    (own / name).write_text(changed)
    with pytest.raises(networks.NetworkError) as e:
        maps.read_sumo(own / "cross.sumocfg")
    assert word in str(e.value) and "\n" not in str(e.value) and e.value.exit_code == 2


CARS, EDGES = "from='WM' to='JE'", "<route edges='WM MJ JE'/>"
PEOPLE = "<person id='p' depart='100'><ride from='WM' to='JE' lines='taxi'/></person>"
# what drives, cars and motorcycles that SUMO would insert from 100 to 700 s
DEMANDS = {
    "flows by number and rate": (
        f"<flow id='a' begin='0' end='400' period='10'>{EDGES}</flow>"
        f"<flow id='b' begin='100' end='400' vehsPerHour='360'>{EDGES}</flow>"
        f"<flow id='c' begin='100' end='700' number='7'>{EDGES}</flow>", (30 + 30 + 7, 0)),
    "flows without routes": (
        f"<flow id='a' begin='0' end='400' period='10' {CARS}/><flow id='b' begin='100' perHour='60' {CARS}/>",
        (30 + 10, 0)),
    "types": (
        "<vTypeDistribution id='d'><vType id='m' vClass='moped' probability='1'/></vTypeDistribution>"
        "<vType id='t' vClass='tram'/>"
        f"<vehicle id='b' depart='100' type='DEFAULT_BIKETYPE'>{EDGES}</vehicle>"
        f"<vehicle id='t' depart='100' type='t'>{EDGES}</vehicle>"
        f"<flow id='a' type='d' begin='100' end='700' number='9'>{EDGES}</flow>", (0, 9)),
    "moments that SUMO knows": (
        f"{PEOPLE}<vehicle id='taxi' line='taxi' depart='triggered'>{EDGES}</vehicle>"
        f"<vehicle id='now' depart='begin'>{EDGES}</vehicle>"
        f"<vehicle id='bus' line='1' depart='0:2:30'>{EDGES}<stop lane='MJ_0' endPos='50' duration='5'/></vehicle>",
        (3, 0)),
    "a minute that is cut": ("".join(f"<vehicle id='{k}' depart='{100 + 10 * k}'>{EDGES}</vehicle>"
                                     for k in range(7)), (7, 0)),
}


def vehicles(net) -> np.ndarray:
    """(2,) motorcycles and cars of the whole demand."""
    lasts = np.diff(net.change_at, append=net.horizon(1.0))
    return np.einsum("b,bke->k", lasts, net.base)


@pytest.mark.parametrize("case", DEMANDS)
def test_vehicles_are_those_that_sumo_inserts(own, case):
    text, (cars, motorcycles) = DEMANDS[case]
    (own / "cross.rou.xml").write_text(f"<routes>{text}</routes>")
    config = own / "cross.sumocfg"
    if "cut" in case:
        config.write_text(config.read_text().replace('<end value="700"/>', ""))
    assert vehicles(maps.read_sumo(own / "cross.sumocfg")) == pytest.approx([motorcycles, cars])


def test_a_configuration_as_people_write_it(own):
    """Short names, a name with a space, gzip, demand, a program's offset and outputs in additional
    files of one name, twice as many vehicles."""
    net = (own / "cross.net.xml").read_bytes()
    (own / "my town.net.xml.gz").write_bytes(gzip.compress(net))
    (own / "sub").mkdir()
    later = '<tlLogic id="J" programID="0" offset="7"/>'
    (own / "a.xml").write_text(f"<additional>{TRIPS}{later}</additional>")
    loop = '<e1Detector id="d" lane="MJ_0" pos="20" freq="60" file="nowhere/loop.xml"/>'
    (own / "sub" / "a.xml").write_text(f"<additional>{loop}</additional>")
    (own / "c.sumocfg").write_text(
        '<configuration><n v="my town.net.xml.gz"/><a v="a.xml, sub/a.xml"/><b v="0:01:40"/><e v="700"/>'
        '<scale value="2"/></configuration>')
    before = sorted(own.rglob("*"))
    read = maps.read_sumo(own / "c.sumocfg")
    assert vehicles(read) == pytest.approx([0, 120]) and sorted(own.rglob("*")) == before
    cycle = (read.durations[0] + read.change[0]).sum()
    assert read.offset[0] == pytest.approx((7 - 100) % cycle)


def test_a_road_that_closes_sends_vehicles_round(own):
    closed = '<interval begin="0" end="700"><destProbReroute id="JS" probability="1"/></interval>'
    (own / "r.add.xml").write_text(f'<additional><rerouter id="r" edges="WM">{closed}</rerouter></additional>')
    routes = "".join(f"<vehicle id='{k}' depart='{100 + 10 * k}'>{EDGES}</vehicle>" for k in range(9))
    (own / "cross.rou.xml").write_text(f"<routes>{routes}</routes>")
    config = own / "cross.sumocfg"
    config.write_text(config.read_text().replace("</input>", '<additional-files value="r.add.xml"/></input>'))
    net = maps.read_sumo(config)
    assert vehicles(net)[1] == pytest.approx(9)
    assert {end for _, end in net.ends} >= {"S"} and "E" not in {end for _, end in net.ends}


def change_signal(folder: Path, chars: dict):
    """Writes {way such as "NJJS": what its link shows in each phase} into the crossing's program."""
    path = folder / "cross.net.xml"
    text = path.read_text()
    index = {a + b: int(k) for a, b, k in re.findall(r'from="(\wJ)" to="(J\w)".*? linkIndex="(\d+)"', text)}
    for k, phase in enumerate(re.findall(r"<phase .*?/>", text)):
        state = list(re.search(r'state="(\w+)"', phase)[1])
        for way, shown in chars.items():
            state[index[way]] = shown[k]
        text = text.replace(phase, re.sub(r'state="\w+"', f'state="{"".join(state)}"', phase))
    path.write_text(text)


def test_a_rare_turn_waits_for_the_green_of_the_others(own):
    """One left turn in forty shares the lane of those who drive straight on."""
    trips = "".join(f"<trip id='{k}' depart='{100 + 10 * k}' from='NJ' to='{'JE' if k == 20 else 'JS'}'/>"
                    for k in range(40))
    (own / "cross.rou.xml").write_text(f"<routes>{trips}</routes>")
    usual = maps.read_sumo(own / "cross.sumocfg")
    assert usual.green[usual.ids.index("NJ")] == 0b100  # of phases 0, 2 and 4 the last
    change_signal(own, {"NJJE": "rrGyrr"})
    net = maps.read_sumo(own / "cross.sumocfg")
    assert net.green.tolist() == usual.green.tolist()


def test_links_that_are_switched_off_are_open(own):
    """O: with priority; o: it gives way, here to those who are green."""
    change_signal(own, {"NJJS": "O" * 6, "NJJE": "O" * 6, "EJJS": "o" * 6})
    net = maps.read_sumo(own / "cross.sumocfg")
    every = 2 ** net.n_phases[0] - 1
    north = net.ids.index("NJ")
    assert net.green[north] == every and not net.minor[north]
    left = [s for s, name in enumerate(net.ids) if name.startswith("EJ") and net.minor[s]]
    assert len(left) == 1 and net.green[left] == every


def test_barriers_of_rails_are_open_for_cars(tmp_path):
    nodes = {"W": (-200, 0), "E": (200, 0), "N": (0, 200), "S": (0, -200), "R": (0, 100), "J": (0, 0)}
    types = {"J": "rail_crossing", "R": "rail_signal"}
    text = "".join(f'<node id="{n}" x="{x}" y="{y}" type="{types.get(n, "priority")}"/>' for n, (x, y) in nodes.items())
    (tmp_path / "a.nod.xml").write_text(f"<nodes>{text}</nodes>")
    rails = "".join(f'<edge id="{n}" from="{n[0]}" to="{n[1]}" allow="rail"/>' for n in ("NR", "RJ", "JS"))
    roads = "".join(f'<edge id="{n}" from="{n[0]}" to="{n[1]}"/>' for n in ("WJ", "JE"))
    (tmp_path / "a.edg.xml").write_text(f"<edges>{rails}{roads}</edges>")
    path = netconvert(tmp_path, "-n", "a.nod.xml", "-e", "a.edg.xml")
    (tmp_path / "cross.demand.json").write_text('{"entries": {"WJ": 60}, "exits": {"JE": 1}}')
    net = maps.read_sumo(path)
    assert vehicles(net)[1] == pytest.approx(60) and not net.nodes


def test_odd_maps_load_and_are_right(own):
    usual = maps.read_sumo(own / "cross.sumocfg")
    text = (own / "cross.net.xml").read_text()
    degrees = re.sub(r'(shape)="([^"]*)"', lambda m: f'shape="{shrunk(m[2])}"', text)
    (own / "cross.net.xml").write_text(degrees)
    assert maps.read_sumo(own / "cross.sumocfg").lengths == pytest.approx(usual.lengths)  # lengths are the lanes'
    (own / "cross.net.xml").write_text(re.sub(r'(?s)<tlLogic.*?</tlLogic>| tl="J" linkIndex="\d+"', "", text))
    bare = maps.read_sumo(own / "cross.sumocfg")
    assert not bare.nodes and bare.yield_to.size  # no signals: the junction goes by priority
    config = own / "cross.sumocfg"
    config.write_text(config.read_text().replace("configuration", "sumoConfiguration"))  # as SUMO writes it today
    (own / "cross.rou.xml").write_text('<routes><trip id="0" depart="200" from="WM" to="WM"/></routes>')
    one = maps.read_sumo(own / "cross.sumocfg")
    assert one.ids == ("WM",) and one.leave.tolist() == [1.0] and one.entry.tolist() == [0]


def test_a_map_without_coordinates_loads_and_is_not_drawn(own):
    text = (own / "cross.net.xml").read_text()
    (own / "bare.net.xml").write_text(re.sub(r'(<lane [^>]*shape)="[^"]*"', r'\1=""', text))
    assert maps.read_sumo(own / "bare.net.xml").ids == maps.read_sumo(own / "cross.net.xml").ids
    with pytest.raises(run.UsageError, match="bare.net.xml"):
        draw_map.main([str(own / "bare.net.xml")])


def test_trips_drive_round_a_queue_as_in_sumo(tmp_path):
    """The short way ends at a signal that passes half of them; on the empty map nobody goes round."""
    places = {"W": (0, 0), "X": (200, 0), "Y": (500, 0), "E": (700, 0), "Z": (900, 0)}
    places |= {"D": (350, -300), "N": (500, 200)}
    nodes = "".join(f'<node id="{n}" x="{x}" y="{y}"/>' for n, (x, y) in places.items())
    (tmp_path / "a.nod.xml").write_text(f"<nodes>{nodes}</nodes>".replace('id="Y"', 'id="Y" type="traffic_light"'))
    edges = "".join(f'<edge id="{n}" from="{n[0]}" to="{n[1]}" numLanes="{k}" speed="13.9"/>'
                    for n, k in {"WX": 2, "XY": 1, "YE": 1, "XD": 1, "DE": 1, "EZ": 2, "NY": 1}.items())
    (tmp_path / "a.edg.xml").write_text(f"<edges>{edges}</edges>")
    path = netconvert(tmp_path, "-n", "a.nod.xml", "-e", "a.edg.xml", "--no-turnarounds")
    trips = "".join(f'<trip id="{k}" depart="{2 * k}" from="{("WX", "NY")[k % 5 == 4]}" to="EZ"/>' for k in range(500))
    (tmp_path / "a.rou.xml").write_text(f"<routes>{trips}</routes>")
    net = maps.read_sumo(path, [tmp_path / "a.rou.xml"])
    goes_round = [net.share[m] for m, to in enumerate(net.move_to) if net.ids[to].startswith(("XD", "DE"))]
    assert 0.05 < max(goes_round) < 0.9 and net.sha256() == maps.read_sumo(path, [tmp_path / "a.rou.xml"]).sha256()


def test_a_line_is_cut_by_its_own_length():
    line = (0, 0), (3, 0), (3, 1)
    assert maps.split_line(line, 0.5) == (((0, 0), (2, 0)), ((2, 0), (3, 0), (3, 1)))


def shrunk(shape: str) -> str:
    points = [pair.split(",") for pair in shape.split()]
    return " ".join(",".join(f"{float(x) / 1e5:.6f}" for x in pair) for pair in points)


def test_a_map_without_demand_gets_one_to_edit(own):
    (own / "cross.rou.xml").unlink()
    maps.read_sumo(own / "cross.net.xml")
    path = own / "cross.demand.json"
    given = json.loads(path.read_text())
    assert set(given["entries"]) == {"WM", "NJ", "EJ"} and set(given["exits"]) == {"JE", "JS", "JW"}
    path.write_text(json.dumps(given | {"entries": {"WM": [[0, 120], [30, 240]]}}))
    net = maps.read_sumo(own / "cross.net.xml")
    assert (net.base.sum((1, 2)) * 60).sum() == pytest.approx(60 + 240)
    path.write_text(json.dumps({"entries": {"WN": 5}, "exits": {"JE": 1}}))
    with pytest.raises(networks.NetworkError, match="WN"):
        maps.read_sumo(own / "cross.net.xml")


def test_an_extract_of_openstreetmap_through_netconvert(tmp_path):
    nodes = {1: (52.505, 13.4), 2: (52.505, 13.403), 3: (52.505, 13.407), 4: (52.5075, 13.403), 5: (52.5025, 13.403)}
    ways = {10: ([1, 2, 3], "secondary"), 11: ([4, 2, 5], "tertiary")}
    text = "".join(f'<node id="{n}" lat="{y}" lon="{x}"/>' for n, (y, x) in nodes.items())
    text = text.replace('id="2" lat="52.505" lon="13.403"/>', 'id="2" lat="52.505" lon="13.403">'
                        '<tag k="highway" v="traffic_signals"/></node>')
    for way, (refs, road) in ways.items():
        tags = f'<tag k="highway" v="{road}"/><tag k="maxspeed" v="50"/>'
        text += f'<way id="{way}">' + "".join(f'<nd ref="{n}"/>' for n in refs) + tags + "</way>"
    (tmp_path / "town.osm").write_text(f'<osm version="0.6">{text}</osm>')
    path = netconvert(tmp_path, "--osm-files", "town.osm", "--geometry.remove", "--tls.join", "--tls.guess-signals")
    net = maps.read_sumo(path)
    assert len(net.nodes) == 1 and net.base.shape[2] >= 4
    assert draw_map.main([str(path), "--out", str(tmp_path / "a.png")])["exit_code"] == 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_a_nearly_empty_cell_takes_nothing_back():
    """Its w is rounding: below zero it once drew vehicles out of an exit (ingolstadt7, minute 15)."""
    from cleanrl_crypto import ppo_arz_signals as arz

    assert arz.supply_nb(-30.0, 0.0, 13.9) == 0 < arz.supply_nb(10.0, 5.0, 13.9)


# -------------------------------------------------------------------------------------------------- other programs
HEAD = "u,v,highway,length,oneway,lanes,maxspeed\n"
STREETS = """1,2,secondary,200,False,4,50
2,3,"['secondary', 'primary']",270,False,"['3', '2']","['50', '30']"
4,2,tertiary,280,True,,30 mph
2,5,tertiary,280,True,,
5,6,residential,0.7,False,,
6,7,residential,100,yes,,
7,7,residential,100,False,,
"""


def test_an_edge_table(tmp_path):
    (tmp_path / "edges.csv").write_text(HEAD + STREETS)
    net = maps.read_map(str(tmp_path / "edges.csv"))
    where = {ends: s for s, ends in enumerate(net.ends)}
    assert set(where) == {("1", "2"), ("2", "1"), ("2", "3"), ("3", "2"), ("4", "2"), ("2", "5"), ("5", "7")}
    assert net.jam[where["1", "2"]] == pytest.approx(2 * networks.RHO_JAM)  # four lanes are two a direction
    assert net.jam[where["2", "3"]] == pytest.approx(networks.RHO_JAM)
    assert net.limit[1, where["2", "3"]] == pytest.approx(30 / 3.6)
    assert net.limit[1, where["4", "2"]] == pytest.approx(30 * 1.609344 / 3.6)
    assert net.limit[1, where["2", "5"]] == pytest.approx(40 / 3.6)  # a class stands for a limit
    plan = json.loads((tmp_path / "edges.json").read_text())
    assert plan["demand"] == {"1": {"car": 400}, "3": {"car": 200}, "4": {"car": 200}}
    plan["demand"]["1"]["car"] = 90
    (tmp_path / "edges.json").write_text(json.dumps(plan))
    assert maps.read_map(str(tmp_path / "edges.csv")).base.sum() * 3600 == pytest.approx(490)


@pytest.mark.parametrize("row, word", [
    ("1,2,cart track,20,False,1,", "line 9: highway"), ("1,2,secondary,far,False,1,", "line 9: length"),
    ("1,2,secondary,20,maybe,1,", "line 9: oneway"), ("1,2,secondary,20,False,none,", "line 9: lanes"),
    ("1,2,secondary,20,False,1,fast", "line 9: maxspeed"), (",2,secondary,20,False,1,", "line 9: u and v"),
    ("1,2,secondary,20,False,1,,LINESTRING (1 2),", "line 9: geometry")])
def test_a_bad_row_of_an_edge_table_is_named(tmp_path, row, word):
    (tmp_path / "edges.csv").write_text(HEAD.strip() + ",geometry\n" + STREETS + row + "\n")
    with pytest.raises(networks.NetworkError, match=word):
        maps.read_map(str(tmp_path / "edges.csv"))
    assert not (tmp_path / "edges.json").exists()


def roadnet() -> dict:
    """CityFlow's form: a crossing of two one-way roads; a pause of 5 s, then a green for each."""
    places = {"W": (-300, 0), "E": (300, 0), "N": (0, 300), "S": (0, -300), "J": (0, 0)}
    lane = {"width": 3, "maxSpeed": 11.11}
    roads, links = [], []
    for a, b in ("WJ", "JE", "NJ", "JS"):
        points = [dict(zip("xy", places[n])) for n in (a, b)]
        ends = {"startIntersection": a, "endIntersection": b}
        roads.append({"id": a + b, "points": points, "lanes": [lane, lane]} | ends)
    for a, b in (("WJ", "JE"), ("NJ", "JS")):
        ways = [{"startLaneIndex": k, "endLaneIndex": k, "points": []} for k in range(2)]
        links.append({"type": "go_straight", "startRoad": a, "endRoad": b, "laneLinks": ways})
    phases = [(5, []), (30, [0]), (20, [1])]
    light = {"lightphases": [{"time": s, "availableRoadLinks": green} for s, green in phases]}
    crossing = {"id": "J", "virtual": False, "roadLinks": links, "trafficLight": light}
    return {"roads": roads, "intersections": [crossing] + [{"id": n, "virtual": True} for n in "WENS"]}


def test_a_roadnet_of_cityflow(tmp_path):
    (tmp_path / "roadnet.json").write_text(json.dumps(roadnet()))
    vehicle = {"length": 5.0, "minGap": 2.5, "headwayTime": 1.5}
    flow = {"vehicle": vehicle, "route": ["WJ", "JE"], "interval": 10.0, "startTime": 0, "endTime": 599}
    (tmp_path / "flow.json").write_text(json.dumps([flow, flow | {"route": ["NJ", "JS"], "interval": 20.0}]))
    net = maps.read_map(str(tmp_path / "roadnet.json"), [str(tmp_path / "flow.json")])
    assert net.durations.tolist() == [[30, 20]] and net.amber.tolist() == [5]
    assert (net.base.sum((1, 2)) * 60).sum() == pytest.approx(90)
    assert net.saturation[net.signal == 0] * 3600 == pytest.approx(2 * 3600 / (1.5 + maps.REACTION + 7.5 / 11.11))
    for change, word in (
            ({"route": ["WJ", "JX"]}, "'JX'"), ({"route": []}, "route"), ({"interval": 1e-9}, "interval 1e-09"),
            ({"endTime": math.inf}, "endTime inf"), ({"startTime": math.nan}, "startTime nan")):
        (tmp_path / "flow.json").write_text(json.dumps([flow | change]))
        with pytest.raises(networks.NetworkError, match=f"flow 1: .*{word}"):
            maps.read_map(str(tmp_path / "roadnet.json"), [str(tmp_path / "flow.json")])


@pytest.mark.parametrize("where, value, word", [
    (("intersections", 0, "roadLinks", 0, "laneLinks", 0, "startLaneIndex"), 2, "WJ: lane 2"),
    (("intersections", 0, "trafficLight", "lightphases", 1, "availableRoadLinks"), [-1], r"J: .*\[-1\]"),
    (("intersections", 0, "trafficLight", "lightphases", 1, "time"), -3, "J: .*-3"),
    (("roads", 0, "lanes"), [{"width": 3, "maxSpeed": 0}] * 2, "WJ: maxSpeed 0"),
    (("roads", 0, "id"), "JE", "twice")])
def test_an_odd_roadnet_is_one_line_that_names_it(tmp_path, where, value, word):
    odd = part = roadnet()
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    (tmp_path / "roadnet.json").write_text(json.dumps(odd))
    with pytest.raises(networks.NetworkError, match=word):
        maps.read_map(str(tmp_path / "roadnet.json"))
    for text in ("[" * 100_000, "[]", "{}"):
        (tmp_path / "roadnet.json").write_text(text)
        with pytest.raises(networks.NetworkError, match="roadnet.json: "):
            maps.read_map(str(tmp_path / "roadnet.json"))


# --------------------------------------------------------------------------------------------------------- RESCO
RESCO = "cologne1 cologne3 cologne8 ingolstadt1 ingolstadt7 ingolstadt21 grid4x4 arterial4x4".split()


@pytest.mark.slow
@pytest.mark.parametrize("name", RESCO)
def test_the_maps_of_resco_load_and_conserve_vehicles(name):
    from cleanrl_crypto import ppo_arz_signals as arz

    spec = importlib.util.find_spec("sumo_rl")
    if spec is None:
        pytest.skip("optional: the maps are in the wheel sumo-rl")
    config = Path(spec.submodule_search_locations[0], "nets", "RESCO", name, f"{name}.sumocfg")
    began = time.process_time()
    net = maps.read_sumo(config)
    assert time.process_time() - began < 10
    assert shares(net) == pytest.approx(np.ones(len(net.ids)))
    assert net.lengths.min() >= maps.SHORTEST - 1e-9
    envs = arz.NetworkVectorEnv(1, net, 5.0, 3600.0, fill=0.0)
    envs.reset(seed=1)
    act = arz.controller(envs, "own_program", [{}])
    for _ in range(envs.length):
        envs.step_lanes(act(envs.observe()))
    again = f"from common import maps; print(maps.read_sumo({str(config)!r}).sha256())"
    other = {**os.environ, "PYTHONHASHSEED": "1"}  # sets in another order
    done = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True, env=other, cwd=ROOT)
    assert done.stdout.strip() == net.sha256()
    stats = {key: float(value[0]) for key, value in envs.stats("finals").items()}
    assert stats["mass_error"] < 1e-3 and math.isfinite(stats["delay_veh_s"]) and stats["throughput_veh"] > 500
