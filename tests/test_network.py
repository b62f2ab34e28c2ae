"""Two-class ARZ on networks: fluxes, junctions, red lights, queues, conservation, files, the CUDA driver."""

import json
import math

import numba as nb
import numpy as np
import pytest
import torch

from cleanrl_crypto import ppo_arz_signals as arz
from common import networks
from runs import assert_compiles_for_a_gpu, run_code
from scripts import validate_signals as val

STEADY = dict(variation=(1.0, 1.0, 0.0), fill=0.0, pressure="gap")
LAW = {name: arz.Law(*pair) for name, pair in arz.PRESSURES.items()}
NO_WAIT = {"all_red": 0, "min_green": 0}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These arrays are small: threads of several workers would only wait for each other."""
    threads = torch.get_num_threads(), nb.get_num_threads()
    torch.set_num_threads(1)
    nb.set_num_threads(1)
    yield
    torch.set_num_threads(threads[0])
    nb.set_num_threads(threads[1])


def street(limit=18.0, length=200.0, flow=360.0, dx=5.0, links=("A", "J", "B")):
    """A road in sections with a signal at every inner node: phase 1 serves the road, phase 2 an empty side street."""
    rows, plan = [], {"signals": {}, "demand": {links[0]: {"car": flow}}, "turns": {}} | NO_WAIT
    for a, b in zip(links, links[1:]):
        rows.append({"from": a, "to": b, "length_m": length, "class": "residential", "lanes": 1, "limit": limit})
    for a, node in zip(links, links[1:-1]):
        rows.append(rows[0] | {"from": f"X{node}", "to": node, "length_m": 50.0})
        plan["signals"][node] = [[a], [f"X{node}"]]
        plan["demand"][f"X{node}"] = {}
    return networks.build_network("street", rows, plan, dx)


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
@pytest.mark.parametrize("left, right, flux", [
    ((0.3, 0.6), (0.5, 0.2), 0.14), ((0.7, 0.2), (0.2, 0.6), 0.2025), ((0.8, 0.3), (0.2, 0.3), 0.24),
    ((0.4, 0.2), (0.3, 0.9), 0.09), ((0.2, 0.8), (0.8, 0.2), 0.16)])
def test_one_class_is_the_exact_godunov_flux(left, right, flux):
    (r, v), (_, v_r) = left, right
    got = arz.interface_nb(r, 0.0, 0.0, v, v + r, v_r, 1.0, 1.0, 1.0, LAW["gap"])  # p = rho: C 1, gamma 1
    assert got == pytest.approx(flux, abs=1e-14)


def p_of(x, pressure, k):
    linear, square = arz.PRESSURES[pressure]
    return k * x * (linear + square * x)


@pytest.mark.parametrize("pressure", arz.PRESSURES)
def test_demand_and_supply_are_the_extrema_of_the_flux(pressure):
    rng, law = np.random.default_rng(0), LAW[pressure]
    grid = np.linspace(0.0, 3.0, 300_001)
    for _ in range(50):
        k, b, y = rng.uniform(5, 20), rng.uniform(0, 0.6), rng.uniform(0, 1.0)
        v = rng.uniform(0, 10)
        p = p_of(grid + b, pressure, k)
        w = v + float(p_of(y + b, pressure, k))
        q = grid * (w - p)
        assert arz.demand_nb(y, b, v, w, k, law) == pytest.approx(q[grid <= y].max(), abs=2e-4)
        ahead = rng.uniform(0, 12)
        star = grid[p >= max(w - ahead, 0.0)][0]  # where those behind drive as fast as those ahead
        supply = arz.supply_nb(w, b, ahead, k, law)
        assert supply == pytest.approx(max(q[grid >= star].max(), 0.0), abs=2e-3)


@pytest.mark.parametrize("pressure", arz.PRESSURES)
def test_filling_and_slope_belong_to_the_pressure(pressure):
    law = LAW[pressure]
    for x in (0.0, 0.05, 0.5, 0.91, 1.2):
        p = arz.pressure_nb(x, 7.0, law)
        assert p == pytest.approx(p_of(x, pressure, 7.0), abs=1e-12)
        assert arz.filling_nb(p / 7.0, law) == pytest.approx(x, abs=1e-9)
        rise = (arz.pressure_nb(x + 1e-7, 7.0, law) - p) / 1e-7
        assert arz.slope_nb(x, 7.0, law) == pytest.approx(rise, rel=1e-4, abs=1e-5)


def test_relaxation_is_exact_and_never_speeds_up_what_stands_overfilled():
    rest = np.exp(-0.7 / 1.5)
    v, change = arz.relax_nb(9.0, 4.0, 11.0, 1.0 - rest)
    assert v == pytest.approx(11.0 + (5.0 - 11.0) * rest) and change == pytest.approx(v - 5.0)
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


def fluxes(net, density, w, gate=(1, 1, 1, 1)):
    """Fluxes of cars over all ends and starts: density and w by segment, uniform on it."""
    envs = arz.NetworkVectorEnv(1, net, 5.0, 50.0, **STEADY)
    for s in range(len(net.ends)):
        cells = slice(net.first[s], net.first[s + 1])
        envs.rho_c[cells], envs.w_c[cells] = density[s], w[s]
        envs.v_c[cells] = w[s] - p_of(density[s] / net.jam[s], "gap", net.limit[1, s])
        envs.gate[s] = gate[s]
    envs.dt.fill_(1.0)
    cells, scratch, street_, result = envs.records
    lo, hi = np.uint64(0), np.uint64(1)
    arz.junctions_nb(lo, hi, 1, envs.roads, cells, scratch, street_, result.totals, envs.law)
    return (x[1, :, 0].double().numpy().copy() for x in (envs.out, envs.into, envs.into_mom))


def test_merge_shares_supply_by_demand_and_mixes_w_by_flow():
    net = crossing({"A": {"C": 1.0}, "B": {"C": 1.0}}, to="C")
    out, flow, mom = fluxes(net, [0.06, 0.12, 0.15], [9.0, 10.0, 10.0])
    demand = np.array([0.06 * (9.0 - 3.0), 0.25 * 0.2 * 10.0])  # free; above capacity: Q_m
    assert out[0] / out[1] == pytest.approx(demand[0] / demand[1], rel=1e-5)
    mixed = (demand * [9.0, 10.0]).sum() / demand.sum()
    speed_ahead = 10.0 - 0.75 * 10.0
    supply = (mixed - speed_ahead) / 10.0 * 0.2 * speed_ahead  # rho* (w - p(rho*)), p = 10 rho / .2
    assert flow[2] == pytest.approx(supply, rel=1e-5) and flow[2] == pytest.approx(out[0] + out[1])
    assert mom[2] / flow[2] == pytest.approx(mixed, rel=1e-5)


def test_diverge_is_first_in_first_out():
    net, w = crossing({"A": {"C": 0.7, "D": 0.3}, "B": {"C": 1.0}}), [10.0] * 4
    out, flow, _ = fluxes(net, [0.08, 0.0, 0.0, 0.17], w)
    assert out[0] == pytest.approx(min(0.08 * 6.0, 0.17 * (10.0 - 8.5) / 0.3), rel=1e-5)
    out, flow, _ = fluxes(net, [0.08, 0.0, 0.0, 0.2], w)
    assert out[0] < 1e-6 and flow[2] < 1e-6  # nobody passes those who wait to turn


def test_w_is_carried_into_an_equal_road_and_capped_by_a_lower_limit():
    density, w = [0.04, 0.0, 0.0, 0.0], [9.5, 10.0, 10.0, 10.0]
    _, flow, mom = fluxes(crossing({"A": {"C": 1.0}}), density, w)
    assert flow[2] == pytest.approx(0.04 * (9.5 - 2.0)) and mom[2] / flow[2] == pytest.approx(9.5)
    _, flow, mom = fluxes(crossing({"A": {"C": 1.0}}, {"JC": 18.0}), density, w)
    assert mom[2] / flow[2] == pytest.approx(5.0)


def test_a_red_stop_line_lets_exactly_nothing_through():
    net = crossing({"A": {"C": 1.0}, "B": {"D": 1.0}})
    out, flow, mom = fluxes(net, [0.1, 0.1, 0.0, 0.0], [10.0] * 4, [0, 1, 1, 1])
    assert out[0] == flow[2] == mom[2] == 0.0 and flow[3] > 0.4
    envs = arz.NetworkVectorEnv(1, street(), 5.0, 100.0, **STEADY)
    envs.reset(seed=0)
    play(envs, [1], 95)
    assert inside(envs, ("J", "B")) == 0.0 and inside(envs, ("A", "J")) > 8.0


# ------------------------------------------------------------------------------------------- formulas of traffic
def test_delay_of_one_red_is_that_of_lwr_and_gets_nearer_on_finer_cells():
    errors = [abs(val.red_light(dx) - val.RED) for dx in (5.0, 2.5)]
    assert errors[0] < 0.3 and errors[1] < 0.15


def test_a_smooth_wave_converges_with_first_order():
    errors = np.array([val.smooth_street(dx) for dx in (10.0, 5.0, 2.5)])
    orders = np.log2(errors[:-1] / errors[1:])
    assert ((0.8 < orders) & (orders < 1.2)).all(), (errors, orders)


def test_discharge_is_the_capacity():
    envs = arz.NetworkVectorEnv(1, street(flow=3600.0, limit=36.0), 5.0, 605.0, **STEADY)
    envs.reset(seed=0)
    play(envs, [0], 300)
    before = float(envs.totals[arz.DEPARTED + 1, 0])
    play(envs, [0], 300)
    assert (float(envs.totals[arz.DEPARTED + 1, 0]) - before) / 300 == pytest.approx(0.25 * 0.2 * 10.0, rel=0.02)
    assert float(envs.totals[arz.ARRIVED + 1, 0]) == pytest.approx(600, rel=1e-5)


def test_spill_back_fills_the_road_behind_and_the_queue_outside():
    net = street(links=("A", "J1", "J2", "B"), limit=36.0, flow=900.0, length=150.0)
    envs = arz.NetworkVectorEnv(1, net, 5.0, 1000.0, **STEADY)
    envs.reset(seed=0)
    play(envs, [0, 1], 60)
    assert inside(envs, ("J1", "J2")) < 20 and envs.queue.sum() < 1e-4
    play(envs, [0, 1], 500)
    for pair in (("A", "J1"), ("J1", "J2")):
        assert inside(envs, pair) == pytest.approx(0.2 * 150, rel=0.02)  # jam density, and not above
    assert envs.rho_c.max() < 0.2 * 1.001 and inside(envs, ("J2", "B")) == 0.0
    assert float(envs.queue[1].sum()) == pytest.approx(560 * 0.25 - 60, rel=0.02)


def test_motorcycles_move_between_standing_cars():
    rows = [{"from": a, "to": b, "length_m": 200.0, "class": "secondary", "lanes": 1, "limit": None}
            for a, b in (("A", "J"), ("J", "B"), ("X", "J"))]
    plan = {"signals": {"J": [["A"], ["X"]]}, "demand": {"A": {"motorcycle": 400, "car": 800}, "X": {}}} | NO_WAIT
    envs = arz.NetworkVectorEnv(1, networks.build_network("mixed", rows, plan, 10.0), 5.0, 400.0,
                                **STEADY | {"pressure": "power"})
    envs.reset(seed=0)
    play(envs, [1], 300)
    before_line = slice(*envs.network.first[:2])
    m, c = envs.rho_m[before_line, 0], envs.rho_c[before_line, 0]
    assert (m + 0.6 * c).max() < 0.2 * 1.02 and (m + c).max() > 0.2  # packed denser than cars alone could


# ----------------------------------------------------------------------------------------- conservation, positivity
@pytest.mark.parametrize("network, pressure, dtype, limit", [
    ("corridor", "power", "float32", 1e-5), ("town2", "gap", "float32", 1e-5),
    pytest.param("corridor", "power", "float64", 1e-12, marks=pytest.mark.slow),
    pytest.param("town2", "gap", "float64", 1e-12, marks=pytest.mark.slow)])
def test_vehicles_are_conserved(network, pressure, dtype, limit):
    envs = arz.NetworkVectorEnv(3, network, level=(1.5, 1.5), dtype=dtype, pressure=pressure)
    envs.reset(seed=3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(envs.length - 1):
        envs.step_lanes(torch.randint(0, 2, (3, envs.agents), generator=generator))
        assert (envs.rho_m >= 0).all() and (envs.rho_c >= 0).all() and torch.isfinite(envs.rho_c).all()
    dx = torch.as_tensor(np.repeat(envs.network.dx, np.diff(envs.network.first)))
    totals = envs.totals
    for k, rho in enumerate((envs.rho_m, envs.rho_c)):  # counted anew, not by the kernel
        stored = dx @ rho.double() + envs.queue[k].sum(0)
        came = totals[arz.STARTED + k] + totals[arz.ARRIVED + k]
        assert came.min() > 50 and totals[arz.DEPARTED + k].min() > 10
        error = (stored + totals[arz.DEPARTED + k] - came - totals[arz.LOST + k]).abs() / came
        assert error.max() < limit and totals[arz.LOST + k].max() < 1e-6 * came.min()
    assert envs.stats()["mass_error"].max() < limit and envs.totals[arz.MAX_CFL].max() <= 0.9 * (1 + 1e-6)
    envs.totals[arz.DEPARTED] += 1.0
    assert envs.stats()["mass_error"].min() > 1e-4


def test_w_and_density_stay_within_their_bounds():
    envs = arz.NetworkVectorEnv(4, "corridor", 15.0, 900.0, level=(2.5, 2.5), fill=0.5)
    envs.reset(seed=1)
    net, generator = envs.network, torch.Generator().manual_seed(0)
    top, jam = (torch.as_tensor(np.repeat(x, np.diff(net.first)))[:, None] for x in (net.limit[1], net.jam))
    for _ in range(envs.length - 1):
        envs.step_lanes(torch.randint(0, 2, (4, 5), generator=generator))
        for rho, mom in ((envs.rho_m, envs.mom_m), (envs.rho_c, envs.mom_c)):
            assert (mom <= rho * top * 1.02)[rho > 1e-4].all()
        assert (envs.rho_m + 0.6 * envs.rho_c < 1.1 * jam).all() and (envs.rho_c < 1.1 * jam).all()


# ------------------------------------------------------------------------------------------- lanes, threads, CUDA
def rollout(n, lane0=0, block=None, dtype="float32", steps=8):
    envs = arz.NetworkVectorEnv(n, "corridor", 15.0, lane0=lane0, block=block, dtype=dtype)
    envs.reset(seed=7)
    lane = lane0 + torch.arange(n)[:, None]
    for t in range(steps):
        envs.step_lanes((lane + torch.arange(5) + t // 2) % 2)
    return [x.clone() for x in (envs.rho_c.T, envs.mom_m.T, envs.obs, envs.local_reward)]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_a_lane_does_not_depend_on_its_neighbours(dtype):
    whole = rollout(7, dtype=dtype)
    for n, lane0, block in ((7, 0, 2), (1, 5, 32), (2, 3, 1)):
        part = rollout(n, lane0, block, dtype)
        assert all(torch.equal(a, b[lane0 : lane0 + n]) for a, b in zip(part, whole))


SIMULATED = """
import sys
import numpy as np, torch
from cleanrl_crypto import ppo_arz_signals as arz
class Simulated(arz.NetworkVectorEnv):  # the device arrays of Numba's simulator are NumPy's inside
    torch_device = torch.device("cpu")
    def take(self, name, shape, dtype):
        self.arrays[name] = self.lease.acquire(shape, dtype, "cuda")
        setattr(self, name, torch.from_numpy(self.arrays[name]._ary))
envs = Simulated(3, "town1", 15.0, 45.0, level=(1.0, 1.3), backend="cuda")
envs.reset(seed=5)
rows = []
for t in range(4):
    reward, terminated, truncated = envs.step_lanes(torch.full((3, 1), t % 2))
    rows += [envs.obs.double().flatten(), reward.clone(), truncated.double(), envs.rho_c.double().flatten()]
np.save(sys.argv[1], torch.cat([*rows, envs.finals.flatten()]).numpy())
"""


def test_cuda_simulator_equals_cpu(repo, tmp_path):
    run_code(repo, SIMULATED, str(tmp_path / "cuda.npy"), NUMBA_ENABLE_CUDASIM="1")
    envs, rows = arz.NetworkVectorEnv(3, "town1", 15.0, 45.0, level=(1.0, 1.3)), []
    envs.reset(seed=5)
    for t in range(4):
        reward, _, truncated = envs.step_lanes(torch.full((3, 1), t % 2))
        rows += [envs.obs.double().flatten(), reward.clone(), truncated.double(), envs.rho_c.double().flatten()]
    expected = torch.cat([*rows, envs.finals.flatten()]).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "cuda.npy"), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected).max() > 100 and envs.stats("finals")["mass_error"].max() < 1e-5


COMPILED = """
from cleanrl_crypto import ppo_arz_signals as arz
def type_of(x):  # records keep their names
    if isinstance(x, tuple):
        return nb.types.BaseTuple.from_types([type_of(y) for y in x], type(x))
    return nb.typeof(np.array(x) if isinstance(x, np.ndarray) else x)
envs = arz.NetworkVectorEnv(4, "town1")
rules = arz.Rules(1, 90, *envs.times)
decide, begin = arz.cuda_kernels()
emit(decide, 1, envs.arrays["action"], envs.roads, *envs.records, rules, envs.law)
emit(begin, 1, 0, envs.roads, *envs.records, rules, envs.law)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_a_real_gpu(repo, tmp_path):
    assert_compiles_for_a_gpu(repo, tmp_path, COMPILED, 2)


# ---------------------------------------------------------------------------------------------------------- files
TABLE = """from,to,length_m,class,lanes,limit
A,J,200,secondary,2,
B,J,150,tertiary,1,30
J,C,200,secondary,2,50
"""
PLAN = {"signals": {"J": [["A"], ["B"]]}, "demand": {"A": {"car": 600, "motorcycle": 300}, "B": {"car": 200}}}


def write(folder, table=TABLE, plan=PLAN):
    plan = plan if isinstance(plan, (str, bytes)) else json.dumps(plan)
    for name, text in (("net.csv", table), ("net.json", plan)):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder / "net.csv")


def test_a_network_from_files(tmp_path):
    net = networks.load_network(write(tmp_path, plan=PLAN | {"all_red": 2, "min_green": 5}), dx=50.0)
    assert net.ends == (("A", "J"), ("B", "J"), ("J", "C")) and net.first.tolist() == [0, 4, 7, 11]
    assert net.limit[1] * 3.6 == pytest.approx([50, 30, 50]) and net.jam.tolist() == [0.4, 0.2, 0.4]
    assert net.signal.tolist() == [0, 0, -1] and net.green.tolist() == [1, 2, 0] and net.entry.tolist() == [0, 1, -1]
    assert net.base == pytest.approx(np.array([[300, 0], [600, 200]]) / 3600)
    assert (net.all_red, net.min_green) == (2, 5) and net.notes == ()
    envs = arz.NetworkVectorEnv(2, write(tmp_path), seconds=60.0)
    envs.reset(seed=0)
    envs.step_lanes(torch.zeros(2, 1))
    assert torch.isfinite(envs.observe()).all() and envs.network.all_red == networks.ALL_RED


def edit(**change):
    return {k: v for k, v in (PLAN | change).items() if v is not None}


UMLAUT = "\N{LATIN CAPITAL LETTER A WITH DIAERESIS}"
RING = "from,to,length_m,class,lanes,limit\nA,B,50,primary,1,\nB,C,50,primary,1,\nC,A,50,primary,1,\n"


@pytest.mark.parametrize("table, plan, words", [
    (TABLE.replace("length_m", "length"), PLAN, "net.csv: no column 'length_m'"),
    (TABLE.replace("from,", "From,"), PLAN, "found 'From'"),
    (TABLE.replace(",", ";"), PLAN, "commas"),
    ("# roads of A\n" + TABLE, PLAN, "'# roads of A'"),
    (TABLE.replace("from,", "x,from,").replace("\nA", "\n1,A"), PLAN, "unknown column 'x'"),
    (TABLE.replace("200,secondary,2,\n", "long,secondary,2,\n"), PLAN, "line 2: length_m: 'long' is not a number"),
    (TABLE.replace("150,", "-150,"), PLAN, "line 3: length_m: -150"),
    (TABLE.replace("150,", "0.01,"), PLAN, "line 3: length_m: 0.01"),
    (TABLE.replace(",1,30", ",1,0.5"), PLAN, "line 3: limit: 0.5"),
    (TABLE.replace("tertiary,1", "tertiary,1.5"), PLAN, "line 3: lanes: '1.5' is not a whole number"),
    (TABLE.replace("secondary,2,\n", "lane,2,\n"), PLAN, "line 2: class: unknown 'lane'"),
    (TABLE + "A,A,10,secondary,1,\n", PLAN, "line 5: from and to are both 'A'"),
    (TABLE + "A,J,10,secondary,1,\n", PLAN, "line 5: A > J is there twice"),
    ("from,to,length_m,class,lanes,limit\n", PLAN, "net.csv: no segments"),
    (RING, {}, "net.csv: no entry"),
    (TABLE, "{", "net.json: line 1: not JSON"),
    (TABLE, "[]", "net.json: must be an object"),
    (TABLE, "[" * 100_000, "net.json: "),
    (TABLE, '{"all_red": ' + "9" * 5000 + "}", "net.json: "),
    (TABLE, edit(signal={}), "unknown key 'signal'"),
    (TABLE, edit(all_red="two"), "all_red: 'two' must be a number >= 0"),
    (TABLE, edit(signals={"K": [["A"], ["B"]]}), "signals: no segment touches node 'K'"),
    (TABLE, edit(signals={"J": [["A"]]}), "signals: J: 1 phases"),
    (TABLE, edit(signals={"J": [["A"], ["B"]] * 35}), "signals: J: 70 phases"),
    (TABLE, edit(signals={"J": [["A", "B"], []]}), "signals: J: phase 2 is empty"),
    (TABLE, edit(signals=[]), "signals: [] must be an object"),
    (TABLE, edit(signals={"J": ["A", "B"]}), "signals: J: 1: 'A' must be a list"),
    (TABLE, edit(signals={"J": [[1], ["B"]]}), "signals: J: 1: 1: 1 must be a node's name"),
    (TABLE, edit(demand={"A": 5, "B": {}}), "demand: A: 5 must be an object"),
    (TABLE, edit(demand={"A": {"car": True}, "B": {}}), "demand: A: car: True must be a number >= 0"),
    (TABLE, edit(demand={"A": {"car": math.nan}, "B": {}}), "demand: A: car: nan must be a number >= 0"),
    (TABLE, edit(turns={"J": ["A"]}), "turns: J: ['A'] must be an object"),
    (TABLE, edit(turns={"J": {"A": {"C": "all"}}}), "turns: J: A: C: 'all' must be a number >= 0"),
    (TABLE, '{"signals": {}, "signals": {}}', "the key 'signals' is there twice"),
    (TABLE.replace("A,J", f"{UMLAUT},J").encode("latin1"), PLAN, "net.csv: byte 36 is not UTF-8"),
    (TABLE, json.dumps(PLAN).encode("utf-16"), "net.json: byte 1 is not UTF-8"),
    (TABLE + "J,D,50,secondary,1,30,99\n", PLAN, "line 5: more values than the 6 columns"),
    (TABLE.replace("200,", "1e12,", 1), PLAN, "line 2: length_m: 1e12"),
    (TABLE.replace("tertiary,1", "tertiary,1000"), PLAN, "line 3: lanes: 1000"),
    (TABLE, edit(signals={"J": [["A"], ["C"]]}), "signals: J: phase 2: no segment C > J"),
    (TABLE, edit(signals={"J": [["A"], ["A"]]}), "B > J is green in no phase"),
    (TABLE, edit(demand={"A": {"car": 1}}), "segment 2, B > J, is an entry"),
    (TABLE, edit(demand=PLAN["demand"] | {"J": {"car": 1}}), "demand: J: no entry begins there"),
    (TABLE, edit(demand=PLAN["demand"] | {"A": {"bus": 1}}), "demand: A: unknown class 'bus'"),
    (TABLE, edit(demand=PLAN["demand"] | {"A": {"car": -1}}), "demand: A: car: -1 must be a number >= 0"),
    (TABLE, edit(turns={"J": {"A": {"C": 0.9}}}), "turns: J: A: the shares add up to 0.9"),
    (TABLE, edit(turns={"J": {"A": {"D": 1}}}), "turns: J: A: no segment J > D"),
    (TABLE, edit(turns={"J": {"Z": {"C": 1}}}), "turns: J: no segment Z > J"),
])
def test_a_wrong_file_is_named_in_one_line(tmp_path, table, plan, words):
    with pytest.raises(networks.NetworkError) as caught:
        networks.load_network(write(tmp_path, table, plan))
    assert words in str(caught.value) and "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(networks.NetworkError, match="nothing.csv: no such file"):
        networks.load_network(str(tmp_path / "nothing.csv"))
    for spec in ("village", "town0", "town9999"):
        with pytest.raises(networks.NetworkError, match=f"--scenario {spec}"):
            arz.NetworkVectorEnv(1, spec)


def test_what_is_allowed_but_strange_is_noted(tmp_path):
    table = TABLE.replace("150,tertiary", "2,tertiary") + "X,Y,80,footway,1,20\nC,K,40,secondary,1,\n"
    plan = edit(demand=PLAN["demand"] | {"A": {"car": 9000}, "X": {}})
    plan["signals"] = PLAN["signals"] | {"K": [["C"], ["C"]]}
    notes = networks.load_network(write(tmp_path, table, plan)).notes
    words = "2 m long", "9000 veh/h", "signals: K", "no connection"
    assert len(notes) == 4 and all(any(word in note for note in notes) for word in words)


def test_classes_shares_and_links_as_they_come(tmp_path):
    """OSM's classes with a limit, _link roads, and thirds with two decimals."""
    table = TABLE + "J,D,90,trunk_link,1,\nJ,E,90,service,1,20\n"
    plan = edit(turns={"J": {"A": {"C": 0.33, "D": 0.33, "E": 0.33}}})
    net = networks.load_network(write(tmp_path, table, plan))
    assert net.limit[1, 3] * 3.6 == pytest.approx(networks.ROADS["trunk"])
    assert net.share[:3] == pytest.approx([1 / 3] * 3)


def test_town():
    net = networks.find_network("town4")
    assert len(net.ends) == 80 and len(net.n_phases) == 16 and (net.entry >= 0).sum() == 16 and net.notes == ()
    total = np.bincount(net.move_from, net.share, minlength=80)
    assert total[net.leads_on()] == pytest.approx(1.0) and (~net.leads_on()).sum() == 16


# ------------------------------------------------------------------------------------------------------ baselines
def test_webster():
    cycle, green = arz.webster_plan([0.2, 0.15], 0.5, 10.0)
    assert cycle == pytest.approx(66.667, abs=1e-3) and green == pytest.approx([32.381, 24.286], abs=1e-3)
    cycle, green = arz.webster_plan([0.0, 0.0], 0.5, 10.0)
    assert cycle == pytest.approx(20.0) and green == pytest.approx([5.0, 5.0])
    with pytest.raises(ValueError, match="no cycle serves"):
        arz.webster_plan([0.3, 0.25], 0.5, 10.0)


def test_mean_flows_follow_the_turns():
    net = networks.corridor_network()
    flow = arz.mean_flows(net)
    assert flow[~net.leads_on()].sum() == pytest.approx(net.base.sum())
    into = net.ends.index(("J1", "J2"))
    w, n, s = (net.base[:, net.entry[net.ends.index((a, "J1"))]].sum() for a in ("W", "N1", "S1"))
    assert flow[into] == pytest.approx(0.8 * w + 0.3 * n + 0.3 * s)


def test_max_pressure_is_varaiyas():
    net = crossing({"A": {"C": 0.75, "D": 0.25}, "B": {"C": 1.0}}, lanes=(2, 1, 1, 1))
    envs = arz.NetworkVectorEnv(1, net, seconds=60.0, fill=0.0)
    envs.reset(seed=0)
    x = {("A", "J"): 12.0, ("B", "J"): 5.0, ("J", "C"): 4.0, ("J", "D"): 8.0}
    for s, pair in enumerate(net.ends):
        envs.zones[0, s] = x[pair] / (net.zone_length[0, s] * net.jam[s])
    saturation = net.jam * net.limit[1]
    expected = [saturation[0] * (12 - 0.75 * 4 - 0.25 * 8), saturation[1] * (5 - 4)]
    assert arz.Pressures(envs)(torch.zeros(1))[0, :, 0].numpy() == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_the_validation_as_a_program():
    result = val.main(["--quick"])
    assert result["exit_code"] == 0 and len(result["wave"]) == 2
    assert result["saturation"]["gap"][2] == pytest.approx(2500, rel=0.02)  # a quarter of jam density times limit
