"""Two-class ARZ on networks: fluxes, junctions, red lights, queues, conservation, files, the CUDA driver."""

import math

import numpy as np
import pytest
import torch

from cleanrl_crypto import ppo_arz_signals as arz
from common import networks
from runs import assert_compiles_for_a_gpu, refusal, run_code, write_network
from scripts import validate_signals as val

STEADY = dict(variation=(1.0, 1.0, 0.0), fill=0.0)
WAVE = networks.QUEUE_WAVE
NO_WAIT = {"all_red": 0, "min_green": 0}
JAM = networks.RHO_JAM


pytestmark = pytest.mark.usefixtures("one_thread")


def street():
    """A road in three sections with signals between: phase 1 serves the road, phase 2 an empty side street."""
    links, rows = ("A", "J1", "J2", "B"), []
    plan = {"signals": {}, "demand": {"A": {"car": 900}}} | NO_WAIT
    for a, b in zip(links, links[1:]):
        rows.append({"from": a, "to": b, "length_m": 150.0, "class": "residential", "lanes": 1, "limit": 36.0})
    for a, node in zip(links, links[1:-1]):
        rows.append(rows[0] | {"from": f"X{node}", "to": node, "length_m": 50.0})
        plan["signals"][node] = [[a], [f"X{node}"]]
        plan["demand"][f"X{node}"] = {}
    return networks.build_network("street", rows, plan, 5.0)


def play(envs, phases, seconds):
    for _ in range(round(seconds / envs.decision_interval)):
        envs.step_lanes(torch.tensor([phases]).expand(envs.num_envs, -1))


def inside(envs, segment) -> float:
    """Vehicles (both classes) on a segment of lane 0, from the densities themselves."""
    net = envs.network
    s = net.ends.index(segment)
    cells = slice(net.first[s], net.first[s + 1])
    return float((envs.rho_m + envs.rho_c)[cells, 0].double().sum()) * net.dx[s]


# --------------------------------------------------------------------------------------------------------- fluxes
def p_of(x, k):
    """Pressure at x of the jam density: what a triangular diagram takes off the limit k."""
    return np.maximum(k + WAVE - WAVE / np.maximum(x, 1e-9), 0.0)


def test_a_flux_is_the_smaller_of_demand_and_supply_the_extrema_of_the_diagram():
    """Found on a grid; a quarter of the vehicles carries a quarter of it."""
    rng, grid = np.random.default_rng(0), np.linspace(1e-6, 1.0, 300_001)
    for _ in range(50):
        k, x = rng.uniform(5, 20), rng.uniform(0.01, 1.0)
        w, ahead = rng.uniform(0.5, 1.0) * k, rng.uniform(0, k)
        flux = grid * (w - p_of(grid, k))
        v = w - float(p_of(x, k))
        star = grid[p_of(grid, k) <= max(w - ahead, 0.0)][-1]  # where those behind drive as fast as those ahead
        expected = min(flux[grid <= x].max(), flux[grid >= star - 1e-5].max())
        for part in (1.0, 0.25):
            own = arz.interface_nb(part * x, (1 - part) * x, v, w, ahead, 1.0, 1.0, k)
            assert own == pytest.approx(part * expected, abs=2e-3)


def test_relaxation_is_exact_and_never_speeds_up_what_stands_overfilled():
    rest = np.exp(-0.7 / 1.5)
    v, change = arz.relax_nb(9.0, 4.0, 11.0, 1.0 - rest)  # from 9 - 4 towards 11 m/s
    assert v == pytest.approx(11.0 + (5.0 - 11.0) * rest)
    assert change == pytest.approx(v - 5.0)
    assert arz.relax_nb(9.0, 12.0, 0.0, 1.0 - rest) == (0.0, 0.0)
    assert arz.relax_nb(0.1, 0.3, 0.7, 0.0)[1] == 0.0


# ------------------------------------------------------------------------------------------------------ junctions
def crossing(turns, limits=None, to="CD", lanes=(1, 1, 1, 1)):
    """Roads from A and B into J, from J to C and D."""
    pairs = [("A", "J"), ("B", "J"), *(("J", end) for end in to)]
    rows = [{"from": a, "to": b, "length_m": 50.0, "class": "secondary", "lanes": n,
             "limit": (limits or {}).get(a + b, 36.0)} for (a, b), n in zip(pairs, lanes)]
    plan = {"signals": {"J": [["A"], ["B"]]}, "demand": {"A": {"car": 1}, "B": {}}, "turns": {"J": turns}}
    return networks.build_network("x", rows, plan)


def fluxes(net, density, w):
    """Fluxes of cars over all ends and starts: density over jam density and w by segment, uniform on it."""
    envs = arz.NetworkVectorEnv(1, net, 5.0, 50.0, **STEADY)
    for s in range(len(net.ends)):
        cells = slice(net.first[s], net.first[s + 1])
        envs.rho_c[cells], envs.w_c[cells] = density[s] * net.jam[s], w[s]
        envs.v_c[cells] = w[s] - p_of(density[s], net.limit[1, s])
    envs.gate.fill_(1.0)
    envs.dt.fill_(1.0)
    cells, scratch, street_, result = envs.records
    lo, hi = np.uint64(0), np.uint64(1)
    arz.junctions_nb(lo, hi, envs.roads, cells, scratch, street_, result.totals)
    return (x[1, :, 0].double().numpy().copy() for x in (envs.out, envs.into, envs.into_mom))


def test_merge_shares_supply_by_demand_and_mixes_w_by_flow():
    net = crossing({"A": {"C": 1.0}, "B": {"C": 1.0}}, to="C")
    out, flow, mom = fluxes(net, [0.2, 0.6, 0.75], [9.0, 10.0, 10.0])
    demand = JAM * np.array([0.2 * 9.0, 10.0 * WAVE / (10.0 + WAVE)])  # free; a queue: capacity
    assert out[0] / out[1] == pytest.approx(demand[0] / demand[1], rel=1e-5)
    mixed = (demand * [9.0, 10.0]).sum() / demand.sum()
    speed_ahead = WAVE * (1 / 0.75 - 1)
    supply = JAM * WAVE / (10.0 + WAVE - mixed + speed_ahead) * speed_ahead  # rho* (w - p(rho*))
    assert flow[2] == pytest.approx(supply, rel=1e-5) and flow[2] == pytest.approx(out[0] + out[1])
    assert mom[2] / flow[2] == pytest.approx(mixed, rel=1e-5)


def test_diverge_is_first_in_first_out():
    net, w = crossing({"A": {"C": 0.7, "D": 0.3}, "B": {"C": 1.0}}), [10.0] * 4
    out, flow, _ = fluxes(net, [0.3, 0.0, 0.0, 0.85], w)
    assert out[0] == pytest.approx(JAM * min(0.3 * 10.0, WAVE * 0.15 / 0.3), rel=1e-5)
    out, flow, _ = fluxes(net, [0.3, 0.0, 0.0, 1.0], w)
    assert out[0] < 1e-6 and flow[2] < 1e-6  # nobody passes those who wait to turn


def test_w_is_carried_into_an_equal_road_and_capped_by_a_lower_limit():
    density, w = [0.2, 0.0, 0.0, 0.0], [9.5, 10.0, 10.0, 10.0]
    _, flow, mom = fluxes(crossing({"A": {"C": 1.0}}), density, w)
    assert flow[2] == pytest.approx(0.2 * JAM * 9.5) and mom[2] / flow[2] == pytest.approx(9.5)
    _, flow, mom = fluxes(crossing({"A": {"C": 1.0}}, {"JC": 18.0}), density, w)
    assert mom[2] / flow[2] == pytest.approx(5.0)


# ------------------------------------------------------------------------------------------- formulas of traffic
def test_known_answers_of_traffic():
    """A smooth wave, one red, a green's discharge, and a corridor's delay on finer cells: the program checks them."""
    result = val.main(["--quick"])
    assert result["exit_code"] == 0 and result["wave"][0] / result["wave"][1] == pytest.approx(2, rel=0.2)
    errors = np.abs(np.array(result["red"]) - val.RED)
    assert errors[1] < 0.1 and errors[1] < errors[0]
    capacity = [3600 * networks.capacity_of(JAM, limit / 3.6) for limit in (30, 40, 50, 60)]
    assert result["saturation"] == pytest.approx(capacity, rel=0.01) and 1750 < capacity[2] < 2000
    for case in ("fixed_cycle x1.0", "fixed_cycle x1.3"):
        coarse, fine = result["delay"][case]
        assert coarse == pytest.approx(fine, rel=0.05)


def test_a_red_lets_nothing_through_and_fills_the_road_behind_and_the_queue_outside():
    envs = arz.NetworkVectorEnv(1, street(), 5.0, 1000.0, **STEADY)
    envs.reset(seed=0)
    play(envs, [0, 1], 60)
    assert inside(envs, ("J1", "J2")) < 20 and envs.queue.sum() < 1e-4
    play(envs, [0, 1], 500)
    for pair in (("A", "J1"), ("J1", "J2")):
        assert inside(envs, pair) == pytest.approx(JAM * 150, rel=0.02)  # jam density, and not above
    assert envs.rho_c.max() < JAM * 1.001 and inside(envs, ("J2", "B")) == 0.0
    assert float(envs.queue[1].sum()) == pytest.approx(560 * 0.25 - 300 * JAM, rel=0.02)


# ----------------------------------------------------------------------------------------- conservation, positivity
def corridor(**change):
    return arz.NetworkVectorEnv(4, "corridor", level=(2.5, 2.5), fill=0.5, **change)


def town(**change):
    return arz.NetworkVectorEnv(3, "town2", level=(1.5, 1.5), **change)


def laid(**change):
    """Vehicles begin and end inside; turns and saturation flows are drawn anew every episode."""
    random = dict(saturation=0.2, turns=0.3, fill=0.3, level=(1.0, 1.5))
    return arz.NetworkVectorEnv(4, lay(), 5.0, 300.0, **random, **change)


@pytest.mark.parametrize("dtype, limit", [
    ("float32", 1e-5), pytest.param("float64", 1e-12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [corridor, town, laid])
def test_vehicles_are_conserved(make, dtype, limit):
    envs = make(dtype=dtype)
    assert make is not town or (len(envs.network.ends), envs.agents, envs.network.notes) == (24, 4, ())
    envs.reset(seed=3)
    net, generator, phases = envs.network, torch.Generator().manual_seed(0), int(envs.n_phases.max())
    top, jam, metres = (torch.as_tensor(np.repeat(x, np.diff(net.first))) for x in (net.limit[1], net.jam, net.dx))
    most = 0.0
    for _ in range(envs.length - 1):
        envs.step_lanes(torch.randint(0, phases, (envs.num_envs, envs.agents), generator=generator))
        for rho, mom in ((envs.rho_m, envs.mom_m), (envs.rho_c, envs.mom_c)):
            assert (rho >= 0).all() and torch.isfinite(rho).all()
            assert (mom <= rho * (top[:, None] + arz.CREEP) * 1.001)[rho > 1e-4].all()
        assert (torch.maximum(envs.rho_m + 0.6 * envs.rho_c, envs.rho_c) < 1.1 * jam[:, None]).all()
        most = max(most, float(((envs.rho_m + envs.rho_c) / jam[:, None]).max()))
    assert most > 1.1 or make is not corridor  # motorcycles stand between cars
    for k, rho in enumerate((envs.rho_m, envs.rho_c)):  # counted anew, not by the kernel
        stored = metres @ rho.double() + envs.queue[k].sum(0)
        came = envs.totals[arz.STARTED + k] + envs.totals[arz.ARRIVED + k]
        gone, lost = envs.totals[arz.DEPARTED + k], envs.totals[arz.LOST + k]
        assert came.min() > 9 and gone.min() > 5
        assert ((stored + gone - came - lost).abs() / came).max() < limit
        assert lost.max() < 1e-6 * came.min()
    assert envs.stats()["mass_error"].max() < limit
    assert envs.totals[arz.MAX_CFL].max() <= 0.9 * (1 + 1e-6)
    envs.totals[arz.DEPARTED] += 1.0  # one vehicle too many
    assert envs.stats()["mass_error"].min() > 1e-4


def test_every_episode_has_turns_and_saturation_flows_of_its_own():
    envs = laid()
    envs.reset(seed=2)
    envs.step_lanes(torch.zeros(4, 1))
    net, share = envs.network, envs.share.double()
    by_end = torch.as_tensor(net.move_from[np.argsort(net.move_to, kind="stable")])
    whole = envs.leave.double().index_add(0, by_end, share)
    assert whole.numpy() == pytest.approx(1.0, abs=1e-6)
    assert share.std(1).max() > 0.02
    factor = (envs.saturation.double() / torch.as_tensor(net.capacity)[:, None]).numpy()
    assert 0.8 < factor.min() and factor.max() < 1.2 and factor.std() > 0.05


# ------------------------------------------------------------------------------------------- lanes, threads, CUDA
def roll(make):
    """Numbers of a few decisions and one end of an episode, of either backend."""
    envs, rows = make(3, lay(), 15.0, 45.0, level=(1.0, 1.3), saturation=0.1, turns=0.2), []
    envs.reset(seed=5)
    for t in range(4):
        reward, _, truncated = envs.step_lanes(torch.full((3, 1), t % 3))
        rows += [envs.obs.double().flatten(), reward.clone(), truncated.double(), envs.rho_c.double().flatten()]
    return torch.cat([*rows, envs.finals.flatten()]).numpy()


SIMULATED = """
import sys
import numpy as np, torch
from functools import partial
from cleanrl_crypto import ppo_arz_signals as arz
from test_network import roll
class Simulated(arz.NetworkVectorEnv):  # the device arrays of Numba's simulator are NumPy's inside
    torch_device = torch.device("cpu")
    def take(self, name, shape, dtype):
        self.arrays[name] = self.lease.acquire(shape, dtype, "cuda")
        setattr(self, name, torch.from_numpy(self.arrays[name]._ary))
np.save(sys.argv[1], roll(partial(Simulated, backend="cuda")))
"""


def test_cuda_simulator_equals_cpu(repo, tmp_path):
    run_code(repo, SIMULATED, str(tmp_path / "cuda.npy"), NUMBA_ENABLE_CUDASIM="1")
    expected = roll(arz.NetworkVectorEnv)
    np.testing.assert_allclose(np.load(tmp_path / "cuda.npy"), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected).max() > 100


COMPILED = """
from cleanrl_crypto import ppo_arz_signals as arz
def type_of(x):  # records keep their names
    if isinstance(x, tuple):
        return nb.types.BaseTuple.from_types([type_of(y) for y in x], type(x))
    return nb.typeof(np.array(x) if isinstance(x, np.ndarray) else x)
envs = arz.NetworkVectorEnv(4, "town1")
rules = arz.Rules(1, 90, *envs.settings)
emit(arz.on_gpu(arz.decide_nb), 1, envs.arrays["action"], envs.roads, *envs.records, rules)
for kernel in (arz.begin_nb, arz.show_nb):
    emit(arz.on_gpu(kernel), 1, 0, envs.roads, *envs.records, rules)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_a_real_gpu(repo, tmp_path):
    assert_compiles_for_a_gpu(repo, tmp_path, COMPILED, 3)


# ---------------------------------------------------------------------------------------------------------- files
TABLE = """from,to,length_m,class,lanes,limit
A,J,200,secondary,2,
B,J,150,tertiary,1,30
J,C,200,secondary,2,50
"""
PLAN = {"signals": {"J": [["A"], ["B"]]}, "demand": {"A": {"car": 600, "motorcycle": 300}, "B": {"car": 200}}}


OVER_TIME = {"A": {"car": [[0, 600], [2, 1200], [3.5, 100]], "motorcycle": 300}, "B": {"car": 200}}


def test_a_network_from_files(tmp_path):
    path = write_network(tmp_path, TABLE, PLAN | {"all_red": 2, "min_green": 5})
    net = networks.load_network(path, dx=50.0)
    assert net.ends == (("A", "J"), ("B", "J"), ("J", "C"))
    assert net.ids == ("A > J", "B > J", "J > C")
    assert net.first.tolist() == [0, 4, 7, 11]  # cells of 50 m
    assert net.limit[1] * 3.6 == pytest.approx([50, 30, 50])
    assert net.jam.tolist() == [0.3, 0.15, 0.3]
    assert net.signal.tolist() == [0, 0, -1]
    assert net.green.tolist() == [1, 2, 0]  # bits of the phases
    assert (net.all_red, net.min_green, net.amber) == ([2], [5], [0])
    assert (net.notes, net.shapes) == ((), ((), (), ()))


def test_what_arrives_follows_the_demand_over_time(tmp_path):
    """Vehicles are conserved too, and the plans are those of the mean demand."""
    path = write_network(tmp_path, TABLE, PLAN | {"demand": OVER_TIME})
    envs = arz.NetworkVectorEnv(2, path, 50.0, 350.0, **STEADY)
    envs.reset(seed=0)
    came = []
    for t in range(6):
        envs.step_lanes(torch.full((2, 1), t % 2))
        came.append(envs.totals[arz.ARRIVED :, 0][:2].tolist())
    cars = np.array([600, 600, 0.4 * 600 + 0.6 * 1200, 1200, 0.2 * 1200 + 0.8 * 100, 100]) + 200
    hourly = np.column_stack([np.full(6, 300), cars])
    np.testing.assert_allclose(came, (hourly * 50 / 3600).cumsum(0), rtol=1e-5)
    envs.step_lanes(torch.zeros(2, 1))
    assert envs.stats("finals")["mass_error"].max() < 1e-5
    mean = (600 * 120 + 1200 * 90 + 100 * 140) / 350 + 300
    capacity = 3600 * envs.network.capacity
    assert arz.flow_ratios(envs)[0] == pytest.approx([mean / capacity[0], 200 / capacity[1]])


def test_coordinates_give_segments_their_shape(tmp_path):
    """Between nodes, or along a line; they are a picture's, and change nothing else."""
    more = {"nodes": {"A": [-200, 0], "J": [0, 0]}, "lines": {"B": {"J": [[0, 150], [9.5, 80], [0, 0]]}}}
    net = networks.load_network(write_network(tmp_path, TABLE, PLAN | more))
    assert net.shapes == (((-200, 0), (0, 0)), ((0, 150), (9.5, 80), (0, 0)), ())
    assert net.sha256() == networks.load_network(write_network(tmp_path, TABLE, PLAN)).sha256()


UMLAUT = "\N{LATIN CAPITAL LETTER A WITH DIAERESIS}"
RING = "from,to,length_m,class,lanes,limit\nA,B,50,primary,1,\nB,C,50,primary,1,\nC,A,50,primary,1,\n"
BAD_TABLES = [  # what is written instead of what, and the words of the refusal
    ("length_m", "length", "net.csv: no column 'length_m'"),
    ("from,", "From,", "found 'From'"),
    (",", ";", "commas"),
    ("from,", "# roads of A\nfrom,", "'# roads of A'"),
    ("200,secondary,2,\n", "long,secondary,2,\n", "line 2: length_m: 'long' is not a number"),
    ("150,", "-150,", "line 3: length_m: -150"),
    ("secondary,2,\n", "lane,2,\n", "line 2: class: unknown 'lane'"),
    ("2,50\n", "2,50\nA,A,10,secondary,1,\n", "line 5: from and to are both 'A'"),
    ("2,50\n", "2,50\nA,J,10,secondary,1,\n", "line 5: A > J is there twice"),
    ("2,50\n", "2,50\nJ,D,50,secondary,1,30,99\n", "line 5: more values than the 6 columns"),
    (TABLE, "from,to,length_m,class,lanes,limit\n", "net.csv: no segments"),
]
BAD_PLANS = [  # keys of the plan, and the words
    ({"signal": {}}, "unknown key 'signal'"),
    ({"nodes": {"J": [0, "north"]}}, "nodes: J: [0, 'north'] must be [x, y]"),
    ({"nodes": {"K": [0, 1]}}, "nodes: no segment touches node 'K'"),
    ({"lines": {"A": {"C": [[0, 1], [1, 1]]}}}, "lines: A: C: no segment A > C"),
    ({"lines": {"A": {"J": [[0, 1]]}}}, "lines: A: J: 1 points"),
    ({"signals": {"K": [["A"], ["B"]]}}, "signals: no segment touches node 'K'"),
    ({"signals": {"J": [["A"]]}}, "signals: J: 1 phases"),
    ({"signals": {"J": [["A", "B"], []]}}, "signals: J: phase 2 is empty"),
    ({"signals": {"J": ["A", "B"]}}, "signals: J: 1: 'A' must be a list"),
    ({"signals": {"J": [["A"], ["A"]]}}, "B > J is green in no phase"),
    ({"turns": {"J": {"A": {"C": 0.9}}}}, "turns: J: A: the shares add up to 0.9"),
    ({"turns": {"J": {"A": {"D": 1}}}}, "turns: J: A: no segment J > D"),
    ({"priority": {"J": ["A"]}}, "priority: J: has a signal"),
    ({"demand": {"A": {"car": 1}}}, "segment 2, B > J, is an entry"),
]
BAD_DEMANDS = [  # of one entry
    ("J", {"car": 1}, "demand: J: no entry begins there"),
    ("A", {"bus": 1}, "demand: A: unknown class 'bus'"),
    ("A", {"car": -1}, "demand: A: car: -1 must be a number >= 0"),
    ("A", {"car": math.nan}, "demand: A: car: nan must be a number >= 0"),
    ("B", {"car": [[0, 1], [5, 2], [5, 3]]}, "B: car: 3: minute 5 comes after"),
    ("B", {"car": [[5, 1]]}, "demand: B: car: 1: begins at minute 5"),
    ("B", {"car": [[0, 1], [5, -2]]}, "demand: B: car: 2: [5, -2] must be"),
    ("B", {"car": []}, "demand: B: car: [] must be"),
]
BAD_TEXTS = [
    (RING, {}, "net.csv: no entry"),
    (TABLE, "{", "net.json: line 1: not JSON"),
    (TABLE, "[" * 100_000, "net.json: "),
    (TABLE, '{"all_red": ' + "9" * 5000 + "}", "net.json: "),
    (TABLE, '{"signals": {}, "signals": {}}', "the key 'signals' is there twice"),
    (TABLE.replace("A,J", f"{UMLAUT},J").encode("latin1"), PLAN, "net.csv: byte 36 is not UTF-8"),
]
BAD_FILES = [
    *((TABLE.replace(old, new), PLAN, words) for old, new, words in BAD_TABLES),
    *((TABLE, PLAN | change, words) for change, words in BAD_PLANS),
    *((TABLE, PLAN | {"demand": PLAN["demand"] | {entry: flow}}, words) for entry, flow, words in BAD_DEMANDS),
    *BAD_TEXTS,
]


@pytest.mark.parametrize("table, plan, words", BAD_FILES, ids=[words for *_, words in BAD_FILES])
def test_a_wrong_file_is_named_in_one_line(tmp_path, table, plan, words):
    path = write_network(tmp_path, table, plan)
    assert len(refusal(networks.NetworkError, networks.load_network, path, words=(words, str(tmp_path)))) < 600


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(networks.NetworkError, match="nothing.csv: no such file"):
        networks.load_network(str(tmp_path / "nothing.csv"))
    for spec in ("village", "town0", "town9999"):
        with pytest.raises(networks.NetworkError, match=f"--scenario {spec}"):
            arz.NetworkVectorEnv(1, spec)


def test_what_is_allowed_but_strange_is_noted(tmp_path):
    table = TABLE.replace("150,tertiary", "2,tertiary") + "X,Y,80,footway,1,20\nC,K,40,secondary,1,\n"
    demand = PLAN["demand"] | {"A": {"car": 9000}, "X": {}}
    signals = PLAN["signals"] | {"K": [["C"], ["C"]]}
    notes = networks.load_network(write_network(tmp_path, table, {"demand": demand, "signals": signals})).notes
    words = "2 m long", "9000 veh/h", "signals: K", "no connection"
    assert len(notes) == 4 and all(any(word in note for note in notes) for word in words)


def test_classes_shares_and_links_as_they_come(tmp_path):
    """OSM's classes with a limit, _link roads, and thirds with two decimals."""
    table = TABLE + "J,D,90,trunk_link,1,\nJ,E,90,service,1,20\n"
    plan = PLAN | {"turns": {"J": {"A": {"C": 0.33, "D": 0.33, "E": 0.33}}}}
    net = networks.load_network(write_network(tmp_path, table, plan))
    assert net.limit[1, 3] * 3.6 == pytest.approx(networks.ROADS["trunk"])
    assert net.share[:3] == pytest.approx([1 / 3] * 3)


# ------------------------------------------------------------------------------------------- parts, turns, signals
LAID = [  # part, from, to
    ("up", "A", "a"),
    ("through", "a", "J"),
    ("left", "a", "J"),
    ("against", "B", "J"),
    ("side", "C", "J"),
    ("east", "J", "X"),
    ("west", "J", "Y"),
    ("main", "Y", "Z"),
    ("minor", "Q", "Z"),
    ("out", "Z", "W"),
]
TURNS = [  # part, next part, share
    ("up", "through", 0.7),
    ("up", "left", 0.3),
    ("through", "east", 1),
    ("left", "west", 1),
    ("side", "east", 0.5),
    ("side", "west", 0.5),
    ("against", "west", 1),
    ("west", "main", 0.8),
    ("west", "", 0.2),
    ("main", "out", 1),
    ("minor", "out", 1),
]
LIGHT = networks.Signal(
    "J",
    phases=({"through", "left", "against"}, {"through", "left"}, {"side"}),
    minor=({"left"}, set(), set()),
    durations=(20.0, 8.0, 12.0),
    offset=7.0,
    amber=3.0,
    all_red=1.0,
    min_green=5.0,
    start_up=2.0,
)
FLOWS = {
    "up": {"car": 700, "motorcycle": 100},
    "against": {"car": 400},
    "side": {"car": 200},
    "minor": {"car": 300},
    "main": {"car": [[0, 50], [0.5, 90]]},  # begins inside: west leads into it
}
YIELDS = {"left": (4.5, 2.5, ("against",)), "minor": (5.0, 3.0, ("main",))}  # gap and follow-up time, s; to whom


def lay(part=None, turns=TURNS, signals=(LIGHT,), demand=FLOWS, yields=YIELDS, **change):
    """Two parallel lanes behind a short road, a left turn that gives way in phase 1, an entry and a sink inside."""
    parts = [networks.Part(*names, 50.0, 1, 10.0) for names in LAID]
    parts = [one._replace(**change) if one.id == part else one for one in parts]
    return networks.assemble("laid", parts, [networks.Turn(*turn) for turn in turns], signals, demand, yields)


def of_parts(net, values) -> dict:
    """{part: value} without zeros."""
    return {part: value for part, value in zip(net.ids, np.round(np.array(values, float), 6).tolist()) if value}


@pytest.mark.parametrize("metres, both", [(50.0, {"up", "through", "side"}), (61.0, set())])
def test_what_stands_before_a_close_signal_belongs_to_both(metres, both):
    """up, through and side lead over J to east, which ends at another signal X."""
    light = networks.Signal("X", ({"east"}, {"out"}), ((), ()), (20.0, 8.0))
    net = lay("east", signals=(LIGHT, light), turns=[*TURNS, ("east", "main", 1)], length=metres)
    first, second = net.owners().T
    assert first[:6].tolist() == [0, 0, 0, 0, 0, 1]
    assert {part for part, owner in zip(net.ids, second) if owner == 1} == both
    envs = arz.NetworkVectorEnv(1, network=net, interval=5.0, seconds=100.0)
    envs.reset(seed=1)
    reward = sum(float(envs.step_lanes(torch.zeros(1, 2))[0]) for _ in range(20))
    assert reward == pytest.approx(-float(envs.stats("finals")["delay_veh_s"]))  # counted once


def test_parts_with_names_of_their_own():
    net = lay("through", saturation=1200.0, lanes=2, shape=((0, 0), (50, 0)))
    assert net.ids == tuple(name for name, *_ in LAID)
    assert net.ends[1] == net.ends[2] == ("a", "J")  # two lanes side by side
    assert net.shapes[1] == ((0, 0), (50, 0))
    assert of_parts(net, net.leave) == {"east": 1, "west": 0.2, "out": 1}
    assert net.capacity[1] == pytest.approx(2 / 3)
    first, second = net.owners().T
    assert (second == -1).all()  # one signal alone
    # a road's delay belongs to the signal that it leads to, else to the one behind it
    assert of_parts(net, first < 0) == {"minor": True}
    assert net.pieces(5.0).tolist() == [1, 2, 1, 1] and net.horizon(20.0) == 60.0
    west, main, _, out = (3600 * net.mean_flows(net.base[0]))[6:]
    assert west == pytest.approx(740)
    assert main == pytest.approx(50 + 0.8 * 740) and out == pytest.approx(350 + 0.8 * 740)


def light(**change):
    return {"signals": [LIGHT._replace(**change)]}


BAD_LAYS = [
    (dict(part="left", id="through"), "part 'through': its id"),
    (dict(part="left", length=-1), "part 'left': length -1 must be"),
    (dict(turns=TURNS[1:]), "turns of part 'up' add up to 0.3"),
    (dict(turns=[*TURNS, ("east", "est", 1)]), "no part 'est', did you mean west?"),
    (dict(turns=[*TURNS, TURNS[0]]), "turn 'up' > 'through': is there twice"),
    (light(phases=LIGHT.phases[:1]), "signal 'J': 1 phases"),
    (light(phases=({"thru"}, {"left"})), "signal 'J': phase 1: no part 'thru'"),
    (dict(signals=[LIGHT, LIGHT]), "has another signal already"),
    (light(minor=({"side"},)), "minor 1: part 'side' is not green"),
    (light(durations=(9.0,)), "signal 'J': durations"),
    (light(amber=-1), "signal 'J': amber -1"),
    (dict(yields={"minor": YIELDS["minor"]}), "part 'left' has a minor green but no yields"),
    (dict(yields=YIELDS | {"side": (1.0, 2.0, ())}), "yields: side: 1.0, 2.0"),
    (dict(demand={}), "no demand"),
    (dict(demand={"up": {"bus": 1}}), "demand: up: unknown class 'bus'"),
    (dict(demand={"upp": {"car": 1}}), "demand: no part 'upp', did you mean up?"),
]


@pytest.mark.parametrize("change, words", BAD_LAYS, ids=[words for _, words in BAD_LAYS])
def test_what_cannot_be_assembled_is_named(change, words):
    refusal(networks.NetworkError, lay, words=("laid: ", words), **change)


def lanes_of(net, seconds=60.0, n=1, interval=1.0, **kwargs):
    envs = arz.NetworkVectorEnv(n, net, interval, seconds, **(STEADY | kwargs))
    envs.reset(seed=2)
    return envs


def lights(envs) -> str:
    """Of through, left, against and side: - red, G green, g green that gives way."""
    shown = ""
    for gate, follow in zip(envs.gate[1:5, 0], envs.follow[1:5, 0]):
        gives_way = bool(torch.isfinite(follow))
        shown += "-" if gate == 0 else "g" if gives_way else "G"
    return shown


def test_amber_all_red_and_greens_that_last_through_a_switch():
    """Second by second after each switch: to phase 2 at once, to phase 3 after 12 s."""
    envs, rows = lanes_of(lay()), []
    for t in range(30):
        envs.step_lanes(torch.tensor([[1 if t < 12 else 2]]))
        rows.append(lights(envs))
    assert rows[:7] == ["GgG-"] * 3 + ["Gg--"] * 3 + ["GG--"]  # against closes after amber, the others stay
    assert rows[12:20] == ["GG--"] * 3 + ["----"] * 3 + ["---G"] * 2  # start-up after amber and all-red
    assert float(envs.totals[arz.SWITCHES]) == 2


@pytest.mark.parametrize("part, expected", [
    ("through", 0.25),  # 900 vehicles an hour
    ("left", math.exp(-400 / 3600 * 3.25) / 2.5),  # against has 400; gap 3.25 s, follow-up time 2.5 s
])
def test_a_green_discharges_its_saturation_and_gaps_let_siegloch_s_flow_through(part, expected):
    """Long queues: through is limited, left and minor wait for gaps in a steady flow."""
    flows = {"up": {"car": 1800}, "against": {"car": 400}, "side": {}, "main": {"car": 300}, "minor": {"car": 1500}}
    other = "left" if part == "through" else "through"
    turns = [turn for turn in TURNS if turn[0] not in ("up", "west", "left")]
    turns += [("up", part, 1.0), ("up", other, 0.0), ("west", "", 1), ("left", "", 1)]
    envs = lanes_of(lay("through", turns=turns, demand=flows, saturation=900.0), 600.0)
    asked = [envs.network.ids.index(name) for name in (part, "minor")]
    counts = []
    for _ in range(500):
        envs.step_lanes(torch.zeros(1, 1))
        counts.append(envs.out[1, asked, 0].tolist())
    flow, minor = np.mean(counts[300:], 0)
    assert flow == pytest.approx(expected, rel=0.02)
    assert minor == pytest.approx(math.exp(-300 / 3600 * 3.5) / 3, rel=0.02)


def test_what_a_junction_of_many_phases_sees():
    """Vehicles on up and through, some that stand on through, three that wait outside."""
    envs, cars = lanes_of(lay(), fill=0.0), 50 * JAM
    zones = torch.zeros(6, 10, 1)
    zones[0, 0], zones[0, 1], zones[3, 1] = 0.2, 0.4, 0.1  # of the jam density
    envs.zones.copy_(zones)
    envs.queue[1, 0] = 3.0
    obs = envs.look()[0, 0]
    assert len(obs) == envs.row_obs == 4 * 19 + 3 + 2 + 1 + 6
    assert obs[:2].tolist() == [pytest.approx(0.4), 0]
    # what stands on up comes to through and left
    assert obs[10].item() == pytest.approx(0.7 * 0.2) and obs[16 + 10].item() == pytest.approx(0.3 * 0.2)
    waits, comes = obs[-6:-3], obs[-3:]  # by phase
    assert waits.tolist() == pytest.approx([0.01 * cars, 0.01 * cars, 0], abs=1e-6)
    assert comes.tolist() == pytest.approx([0.1 * cars * 0.6, 0.1 * cars * 0.6, 0], rel=1e-5)
    wave = arz.phase_pressures(envs, torch.zeros(1), downstream=False)()[0, :, 0]
    assert wave.numpy() == pytest.approx([cars * 0.6 + 3, cars * 0.6 + 3, 0], rel=1e-5)


def test_the_map_s_own_program_and_flows_that_are_green_twice():
    envs = lanes_of(lay(), 120.0)
    act, asked = arz.own_program(envs), []
    for _ in range(110):
        asked.append(int(act(None)))
        envs.step_lanes(act(None))
    begins = [t for t in range(1, 110) if asked[t] != asked[t - 1]]
    assert begins == [3, 27, 39, 55, 79, 91, 107] and asked[3] == 0  # greens of 20, 8 and 12 s after 4 s of change
    capacity = 3600 * envs.network.capacity[0]
    mean = 3600 * envs.network.mean_flows(envs.network.demand_table(120.0, 1)[0])
    ratios = mean / capacity
    assert arz.flow_ratios(envs)[0] == pytest.approx([max(ratios[1:4]), 0, ratios[4]])


def test_amber_and_priority_of_a_plan(tmp_path):
    table = TABLE + "J,K,50,secondary,1,\nX,C,50,residential,1,\nC,D,50,secondary,1,\n"
    demand = PLAN["demand"] | {"X": {"car": 60}}
    plan = PLAN | {"demand": demand, "amber": 3, "priority": {"C": ["J"]}}
    net = networks.load_network(write_network(tmp_path, table, plan))
    minor = net.ids.index("X > C")
    assert net.amber.tolist() == [3]
    first, stop = net.yield_ptr[minor : minor + 2]
    assert net.yield_to[first:stop].tolist() == [net.ids.index("J > C")]
    assert net.follow[minor] == pytest.approx(1 / 3.3) and np.isinf(net.follow).sum() == 5
    with pytest.raises(networks.NetworkError, match="priority: C: no segment K > C"):
        networks.load_network(write_network(tmp_path, table, plan | {"priority": {"C": ["K"]}}))


# ------------------------------------------------------------------------------------------------------ baselines
def test_webster():
    cycle, green = arz.webster_plan([0.2, 0.15], 0.5, 10.0)
    assert cycle == pytest.approx(66.667, abs=1e-3) and green == pytest.approx([32.381, 24.286], abs=1e-3)
    cycle, green = arz.webster_plan([0.0, 0.0], 0.5, 10.0)
    assert cycle == pytest.approx(20.0) and green == pytest.approx([5.0, 5.0])
    with pytest.raises(ValueError, match="no cycle serves"):
        arz.webster_plan([0.3, 0.25], 0.5, 10.0)


def test_max_pressure_is_varaiyas():
    net = crossing({"A": {"C": 0.75, "D": 0.25}, "B": {"C": 1.0}}, lanes=(2, 1, 1, 1))
    envs = arz.NetworkVectorEnv(1, net, seconds=60.0, fill=0.0)
    envs.reset(seed=0)
    x = {("A", "J"): 12.0, ("B", "J"): 5.0, ("J", "C"): 4.0, ("J", "D"): 8.0}
    for s, pair in enumerate(net.ends):
        envs.zones[0, s] = x[pair] / (net.zone_length[0, s] * net.jam[s])
    saturation = net.capacity
    expected = [saturation[0] * (12 - 0.75 * 4 - 0.25 * 8), saturation[1] * (5 - 4)]
    assert arz.phase_pressures(envs, torch.zeros(1))()[0, :, 0].numpy() == pytest.approx(expected, rel=1e-5)
