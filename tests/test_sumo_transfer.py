"""scripts/sumo_transfer.py: what it shows signals, reads from lanes and says of vehicles."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cleanrl_crypto import ppo_arz_signals as arz
from common.networks import find_network
from common.timeout_guard import save_atomic
from scripts import sumo_transfer as st

SCRIPT = st.ROOT / "scripts" / "sumo_transfer.py"
TLS = "GS_cluster_357187_359543"  # cologne1's signal
AMBER = 5.0  # s, of its program


# ------------------------------------------------------------------------------------- without SUMO
@pytest.mark.parametrize(
    "old, new, amber, red",
    [
        ("GGGggrrrrr", "rrrGGrrrrr", "yyyggrrrrr", "rrrggrrrrr"),
        ("rrrGGrrrrr", "rrrrrGGGgg", "rrryyrrrrr", "rrrrrrrrrr"),
        ("GGgGrGGG", "GGGrrrrr", "GGgyryyy", "GGgrrrrr"),
        ("Gs", "rs", "ys", "rs"),
    ],
)
def test_greens_that_end_turn_amber_and_those_of_both_phases_stay(old, new, amber, red):
    assert (st.between(old, new, "y"), st.between(old, new, "r")) == (amber, red)


@pytest.mark.parametrize(
    "state, expected", [("Ggr", True), ("Gyr", False), ("GYr", False), ("rrr", False), ("uGr", False)]
)
def test_phases_to_choose_from(state, expected):
    assert st.is_green(state) is expected


def test_interval_is_students():
    assert st.interval_of([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.48414), abs=1e-5)
    assert np.isnan(st.interval_of([1.0])[1])


def test_differences_are_paired_by_seed():
    delays = {"policy": (10.0, 20.0, 30.0), "random": (12.0, 22.0, 32.0)}
    lines = [
        {c: 1 for c in st.COLUMNS} | {"controller": name, "seed": seed, "delay": delay}
        for name, values in delays.items()
        for seed, delay in enumerate(values)
    ]
    rows = st.summarise(pd.DataFrame(lines).sample(frac=1, random_state=1))
    assert [row["controller"] for row in rows] == ["policy", "random"]
    assert rows[0]["delay_95"] > 20 and "difference" not in rows[0]
    assert (rows[1]["difference"], rows[1]["difference_95"]) == pytest.approx((2.0, 0.0), abs=1e-9)
    assert rows[1]["teleports"] == 3


def test_all_who_wanted_to_depart_count(tmp_path):
    trips, statistics = tmp_path / "trips.xml", tmp_path / "statistics.xml"
    row = '<tripinfo timeLoss="{}" departDelay="{}" waitingCount="{}" depart="{}" arrival="{}"/>'
    rows = (10, 1, 2, 5, 50), (30, 0, 1, 6, -1), (0, 100, 0, -1, -1)
    trips.write_text(f"<tripinfos>{''.join(row.format(*r) for r in rows)}</tripinfos>")
    statistics.write_text('<statistics><teleports total="4"/></statistics>')
    found = st.measure(trips, statistics)
    assert (found["delay"], found["stops"]) == pytest.approx((141 / 3, 1.0))
    counts = "throughput wanted not_inserted not_arrived teleports".split()
    assert [found[name] for name in counts] == [1, 3, 1, 1, 4]


def test_vehicles_of_lanes_are_the_environments_vehicles():
    """Every vehicle counts once, in the zone of the cell that it is in."""
    net = find_network("corridor")
    lanes = {part: ((f"e{s}_0", 0.0, net.lengths[s], 0.0),) for s, part in enumerate(net.ids)}
    layout = SimpleNamespace(lanes=lanes, weight={net.ids[0]: 0.5})
    pieces, entries = st.pieces_of(net, layout)
    env = arz.NetworkVectorEnv(1, net)
    for s in range(len(net.ids)):
        (piece,) = pieces[f"e{s}_0"]
        for cell, place in enumerate(np.arange(0.5, len(piece.zones)) * net.dx[s]):
            zone, filling = piece.at(place)
            assert zone == net.zone_of[net.first[s] + cell]
            env.zones[zone, s, 0] += filling
    count = np.diff(net.first) * np.where(np.arange(len(net.ids)) == 0, 0.5, 1.0)
    np.testing.assert_allclose(env.counts()[:, 0], count, rtol=1e-5)
    assert sorted(e for at in entries.values() for e in at) == list(range(net.base.shape[2]))
    assert all(sum(at.values()) == pytest.approx(1) for at in entries.values())


# ---------------------------------------------------------------------------------------- with SUMO
@pytest.fixture(scope="module")
def cologne(tmp_path_factory):
    """cologne1, four minutes of it."""
    pytest.importorskip("libsumo", reason="needs SUMO: requirements-sumo.txt")
    maps = find_spec("sumo_rl")  # only its files: importing it wants SUMO_HOME
    if maps is None:
        pytest.skip("the wheel of sumo-rl holds the maps of the RESCO benchmark")
    folder = st.Path(maps.origin).parent / "nets" / "RESCO" / "cologne1"
    path = tmp_path_factory.mktemp("map") / "cologne1.sumocfg"
    path.write_text(
        f'<configuration><input><net-file value="{folder}/cologne1.net.xml"/>'
        f'<route-files value="{folder}/cologne1.rou.xml"/></input>'
        '<time><begin value="25200"/><end value="25440"/></time></configuration>'
    )
    return path


@pytest.fixture(scope="module")
def run_of(cologne):
    """run_of(name, sha256): the folder of a run whose agent knows nothing."""
    net, _ = st.read_map(str(cologne), arz.CELL_LENGTH)
    env = arz.NetworkVectorEnv(1, net)
    config = {"observations": env.row_obs, "phases": int(net.n_phases.max())}
    config |= {"hidden": 4, "phase_at": env.phase_at}

    def make(name, sha256=None):
        state = {"script": "ppo_arz_signals", "schema": arz.SCHEMA, "config": config}
        state["agent"] = arz.Agent(**config).state_dict()
        state["args"] = {"decision_interval": 5.0, "cell_length": arz.CELL_LENGTH}
        state["data"] = {"sha256": sha256 or net.sha256()}
        folder = cologne.parent / name / "checkpoints"
        folder.mkdir(parents=True)
        save_atomic(state, folder / "best.pt")
        return folder.parent

    return make


@pytest.fixture(scope="module")
def played(cologne, run_of):
    """{controller: its line} of three of them on seed 1; the signal's states under random."""
    states, record = cologne.with_name("states.xml"), cologne.with_name("record.add.xml")
    event = f'<timedEvent type="SaveTLSStates" source="{TLS}" dest="{states}"/>'
    record.write_text(f"<additional>{event}</additional>")
    st.check_installed()
    net, layout = st.read_map(str(cologne), arz.CELL_LENGTH)
    policy = str(run_of("played") / "checkpoints" / "best.pt")
    about = str(cologne), net, layout
    cases = [st.Case(*about, name, 1, 5.0, policy, "", False) for name in (st.OWN, st.POLICY)]
    cases.append(st.Case(*about, "random", 1, 5.0, "", str(record), False))
    lines = {line["controller"]: line for line in st.in_workers(st.play, cases, 1)}
    steps = ElementTree.parse(states).getroot().iter("tlsState")
    return lines, [step.get("state") for step in steps], net


def ask_for_a_missing_phase(case):
    with st.simulation(case.config, "--seed", "1") as sumo:
        lanes = st.SumoLanes(sumo, case)
        first = lanes.env.phase[:, 0].tolist()
        for _ in range(6):
            lanes.step(lanes.net.n_phases)
        return first, lanes.env.phase[:, 0].tolist()


def test_a_phase_that_a_signal_does_not_have_is_no_request(cologne):
    """As in the environment: junctions of one network have different numbers of phases."""
    case = st.Case(str(cologne), *st.read_map(str(cologne), arz.CELL_LENGTH), "random", 1, 5.0, "", "", False)
    ((first, last),) = st.in_workers(ask_for_a_missing_phase, [case], 1)
    assert first == last


def test_own_program_is_what_sumo_itself_measures(played, cologne):
    import sumo

    out = cologne.with_name("statistics.xml")
    argv = [f"{sumo.SUMO_HOME}/bin/sumo", "-c", cologne, "--seed", "1", "--statistic-output", out]
    argv += ["--duration-log.statistics", "--tripinfo-output.write-unfinished"]
    subprocess.run(argv, capture_output=True, check=True)
    found = ElementTree.parse(out).getroot().find("vehicleTripStatistics")
    line = played[0][st.OWN]
    lost = float(found.get("timeLoss")) * float(found.get("count"))
    assert line["time_loss"] == pytest.approx(lost / line["wanted"], abs=0.01)
    waited = float(found.get("totalDepartDelay"))
    assert line["departure_delay"] == pytest.approx(waited / line["wanted"], abs=1e-6)


def test_every_vehicle_is_somewhere(played):
    lines = played[0]
    assert len({line["wanted"] for line in lines.values()}) == 1
    assert len({line["delay"] for line in lines.values()}) == 3
    for line in lines.values():
        parts = line["throughput"], line["not_inserted"], line["not_arrived"]
        assert sum(parts) == line["wanted"]


def test_amber_and_least_green_hold_whoever_decides(played):
    """As SUMO records the signal, second by second, under random decisions."""
    _, states, net = played
    assert len(states) >= 235
    lengths = {"G": [], "y": []}
    for link in zip(*states):
        text = "".join(link).replace("g", "G")
        for letter, found in lengths.items():
            found += [len(x) for x in re.findall(f"(?<=[^{letter}]){letter}+(?=[^{letter}])", text)]
        assert "Gr" not in text
    assert set(lengths["y"]) == {AMBER} and len(lengths["y"]) > 40
    assert min(lengths["G"]) >= net.min_green[0]


@pytest.mark.slow
def test_command_line_judges_all_controllers(cologne, run_of):
    run = run_of("run")
    argv = [sys.executable, SCRIPT, run, "--sumocfg", cologne, "--seeds", "1", "--video"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = run / "sumo"
    runs = pd.read_csv(out / "runs.csv")
    assert sorted(runs["controller"]) == sorted([st.POLICY, *st.CONTROLLERS])
    assert runs["wanted"].nunique() == 1 and runs["delay"].nunique() == len(runs)
    report = json.loads((out / "transfer.json").read_text())
    means = {row["controller"]: row["delay"] for row in report["controllers"]}
    assert means == pytest.approx(runs.set_index("controller")["delay"].to_dict())
    assert means["random"] > means["greedy wave"]
    paired = {row["controller"]: row.get("difference") for row in report["controllers"]}
    assert paired["random"] == pytest.approx(means["random"] - means[st.POLICY])
    assert (out / "transfer.png").stat().st_size > 5000
    with Image.open(out / "transfer.gif") as movie:
        assert movie.n_frames == 25  # the second half of four minutes, every five seconds


# ----------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "argv, named",
    [
        ([], "RUN_DIR"),
        (["--baselines-only"], "--sumocfg"),
        (["--baselines-only", "--sumocfg", "nowhere.sumocfg"], "nowhere.sumocfg"),
        (["nowhere", "--sumocfg", "{map}"], "best.pt"),
        (["{other}", "--sumocfg", "{map}"], "another network"),
        (["run", "--baselines-only", "--sumocfg", "{map}"], "--baselines-only"),
        (["--baselines-only", "--video", "--sumocfg", "{map}"], "--video"),
        (["--baselines-only", "--sumocfg", "{map}", "--seeds", "0"], "--seeds"),
        (["--baselines-only", "--sumocfg", "{broken}"], "no.net.xml"),
        (["--baselines-only", "--sumocfg", "{leaky}"], "max-depart-delay"),
    ],
)
def test_one_line_says_what_is_wrong(refusal_of, cologne, run_of, argv, named):
    broken = cologne.with_name("broken.sumocfg")
    broken.write_text(cologne.read_text().replace("cologne1.net.xml", "no.net.xml"))
    leaky = cologne.with_name("leaky.sumocfg")
    leaky.write_text(cologne.read_text().replace("</time>", '</time><max-depart-delay value="20"/>'))
    other = run_of("other", "0" * 64) if "{other}" in argv else ""
    argv = [a.format(map=cologne, broken=broken, leaky=leaky, other=other) for a in argv]
    assert named in refusal_of(SCRIPT)(argv)
