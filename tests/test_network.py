"""Two-class ARZ on networks: fluxes, junctions, red lights, queues, conservation, files, the CUDA driver."""

import json
import math

import numpy as np
import pytest

from cleanrl_crypto import ppo_arz_gpu as arz
from common import networks
from runs import run_code
from scripts import validate_arz as val

STEADY = dict(slow=(1.0, 1.0), jitter=0.0, fill=0.0, all_red=0.0, min_green=0.0, dtype="float64", pressure="gap")


def law(pressure="power"):
    return arz.network_law(pressure, np.float64, 0.9)


def street(lanes=1, limit=18.0, length=200.0, flow=360.0, dx=5.0, links=("A", "J", "B"), pressure="gap"):
    """A road in sections with a signal at every inner node: phase 1 serves the road, phase 2 an empty side street."""
    rows, plan = [], {"signals": {}, "demand": {links[0]: {"car": flow}}, "turns": {}}
    for a, b in zip(links, links[1:]):
        rows.append({"from": a, "to": b, "length_m": length, "class": "residential", "lanes": lanes, "limit": limit})
    for a, node in zip(links, links[1:-1]):
        rows.append(rows[0] | {"from": f"X{node}", "to": node, "length_m": 50.0, "lanes": 1})
        plan["signals"][node] = [[a], [f"X{node}"]]
        plan["demand"][f"X{node}"] = {}
    return networks.build_network("street", rows, plan, dx, pressure)


def steps(env, phases, seconds):
    for _ in range(round(seconds / env.interval)):
        env.step_lanes(np.tile(phases, env.num_envs))


def inside(env, segment):
    """Vehicles (both classes) on a segment, (N,), from the densities themselves."""
    net = env.network
    s = net.ends.index(segment)
    return env.host(env.u)[:2, net.first[s] : net.first[s + 1]].sum((0, 1)) * net.par[s, networks.CELL]


# --------------------------------------------------------------------------------------------------- fluxes
@pytest.mark.parametrize("left, right, flux", [
    ((0.3, 0.6), (0.5, 0.2), 0.14), ((0.7, 0.2), (0.2, 0.6), 0.2025), ((0.8, 0.3), (0.2, 0.3), 0.24),
    ((0.4, 0.2), (0.3, 0.9), 0.09), ((0.2, 0.8), (0.8, 0.2), 0.16)])
def test_one_class_is_the_exact_godunov_flux(left, right, flux):
    (r, v), (_, v_r) = left, right
    got = arz.interface_nb(r, 0.0, 0.0, v, v + r, v_r, 1.0, 1.0, 1.0, law("gap"))  # p = rho: C 1, gamma 1
    assert got == pytest.approx(flux, abs=1e-14)


def p_of(x, pressure, k):
    if pressure == "singular":
        edge = arz.TANGENT
        u = 1 - np.minimum(x, edge)
        return k * np.where(x < edge, x / u, edge / (1 - edge) + (x - edge) / (1 - edge) ** 2)
    a, c = arz.PRESSURES[pressure]
    return k * x * (a + c * x)


@pytest.mark.parametrize("pressure", ["power", "gap", "singular"])
def test_demand_and_supply_are_the_extrema_of_the_flux(pressure):
    rng = np.random.default_rng(0)
    grid = np.linspace(0.0, 3.0, 300_001)
    for _ in range(50):
        k, b, y = rng.uniform(5, 20), rng.uniform(0, 0.6), rng.uniform(0, 1.0)
        v = rng.uniform(0, 10)
        p = p_of(grid + b, pressure, k)
        w = v + float(p_of(y + b, pressure, k))
        q = grid * (w - p)
        assert arz.class_demand_nb(y, b, v, w, k, law(pressure)) == pytest.approx(q[grid <= y].max(), abs=2e-4)
        ahead = rng.uniform(0, 12)
        star = grid[p >= max(w - ahead, 0.0)][0]  # where those behind drive as fast as those ahead
        supply = arz.class_supply_nb(w, b, ahead, k, law(pressure))
        steep = 2e-2 if pressure == "singular" else 2e-3  # times the grid's step
        assert supply == pytest.approx(max(q[grid >= star].max(), 0.0), abs=steep)


@pytest.mark.parametrize("pressure", list(arz.PRESSURES))
def test_filling_and_slope_belong_to_the_pressure(pressure):
    for x in (0.0, 0.05, 0.5, 0.89, 0.91, 1.2):
        p = arz.class_pressure_nb(x, 7.0, law(pressure))
        assert p == pytest.approx(float(p_of(x, pressure, 7.0)), abs=1e-12)
        assert arz.class_filling_nb(p / 7.0, law(pressure)) == pytest.approx(x, abs=1e-9)
        rise = (arz.class_pressure_nb(x + 1e-7, 7.0, law(pressure)) - p) / 1e-7
        assert arz.class_slope_nb(x, 7.0, law(pressure)) == pytest.approx(rise, rel=1e-4, abs=1e-5)


def test_relaxation_is_exact_and_never_speeds_up_what_stands_overfilled():
    keep = np.exp(-0.7 / 1.5)
    v, change = arz.class_relax_nb(9.0, 4.0, 11.0, 1.0 - keep, law())
    assert v == pytest.approx(11.0 + (5.0 - 11.0) * keep) and change == pytest.approx(v - 5.0)
    assert arz.class_relax_nb(9.0, 12.0, 0.0, 1.0 - keep, law()) == (0.0, 0.0)
    assert arz.class_relax_nb(0.1, 0.3, 0.7, 0.0, law())[1] == 0.0


# ------------------------------------------------------------------------------------------------ junctions
def junction(net, density, w, gate=None, k=1):
    """Fluxes of class k over all ends, one lane: density and w by segment, uniform on it."""
    n_seg, cells = len(net.ends), net.first[-1]
    own, speed, big_w = (np.zeros((cells, 1)) for _ in range(3))
    for s in range(n_seg):
        rows = slice(net.first[s], net.first[s + 1])
        own[rows], big_w[rows] = density[s], w[s]
        x = density[s] * net.par[s, networks.INV_J]
        speed[rows] = w[s] - arz.class_pressure_nb(x, net.par[s, networks.K_C], law("gap"))
    want, share, flow, mom = (np.zeros((n_seg, 1)) for _ in range(4))
    gate = np.ones((n_seg, 1)) if gate is None else np.asarray(gate, float)[:, None]
    entries, sums, totals = net.base.shape[1], np.zeros((n_seg, 1)), np.zeros((2, 1))
    arz.junctions_nb(1, k, 1.0, own, 0.0 * own, speed, big_w, want, share, flow, mom, np.zeros(1), np.zeros(1),
                     np.ones(1), gate, np.zeros((2, entries, 1)), np.zeros((2, entries, 1)), sums, sums.copy(), totals,
                     totals.copy(), totals.copy(), (net.first, *net.moves, net.entry, net.par, net.beta), law("gap"))
    return want[:, 0], flow[:, 0], mom[:, 0]


def crossing(turns, limits=None, to="CD"):
    """Roads from A and B into J, from J to C and D."""
    limits = limits or {}
    rows = [{"from": a, "to": b, "length_m": 50.0, "class": "secondary", "lanes": 1, "limit": limits.get(a + b, 36.0)}
            for a, b in (("A", "J"), ("B", "J"), *(("J", end) for end in to))]
    return networks.build_network("x", rows, {"demand": {"A": {}, "B": {}}, "turns": {"J": turns}}, pressure="gap")


def test_merge_shares_supply_by_demand_and_mixes_w_by_flow():
    net = crossing({"A": {"C": 1.0}, "B": {"C": 1.0}}, to="C")
    density, w = [0.06, 0.12, 0.15], [9.0, 10.0, 10.0]
    out, flow, mom = junction(net, density, w)
    demand = np.array([0.06 * (9.0 - 3.0), 0.25 * 0.2 * 10.0])  # free; above capacity: Q_m
    assert out[0] / out[1] == pytest.approx(demand[0] / demand[1], rel=1e-9)
    mixed = (demand * w[:2]).sum() / demand.sum()
    speed_ahead = 10.0 - 0.75 * 10.0
    supply = (mixed - speed_ahead) / 10.0 * 0.2 * speed_ahead  # rho* (w - p(rho*)), p = 10 rho / .2
    assert flow[2] == pytest.approx(supply, rel=1e-9) and flow[2] == pytest.approx(out[0] + out[1])
    assert mom[2] / flow[2] == pytest.approx(mixed, rel=1e-9)


def test_diverge_is_first_in_first_out():
    net = crossing({"A": {"C": 0.7, "D": 0.3}, "B": {"C": 1.0}})
    density, w = [0.08, 0.0, 0.0, 0.17], [10.0, 10.0, 10.0, 10.0]
    out, flow, _ = junction(net, density, w)
    demand = 0.08 * 6.0
    supply_d = 0.17 * (10.0 - 8.5)
    assert out[0] == pytest.approx(min(demand, supply_d / 0.3), rel=1e-9)
    jammed = [0.08, 0.0, 0.0, 0.2]
    out, flow, _ = junction(net, jammed, w)
    assert out[0] < 1e-9 and flow[2] < 1e-9  # nobody passes those who wait to turn


def test_w_is_carried_into_an_equal_road_and_capped_by_a_lower_limit():
    density, w = [0.04, 0.0, 0.0, 0.0], [9.5, 10.0, 10.0, 10.0]
    _, flow, mom = junction(crossing({"A": {"C": 1.0}}), density, w)
    assert flow[2] == pytest.approx(0.04 * (9.5 - 2.0)) and mom[2] / flow[2] == pytest.approx(9.5, rel=1e-12)
    _, flow, mom = junction(crossing({"A": {"C": 1.0}}, {"JC": 18.0}), density, w)
    assert mom[2] / flow[2] == pytest.approx(5.0, rel=1e-12)


def test_a_red_stop_line_lets_exactly_nothing_through():
    net = crossing({"A": {"C": 1.0}, "B": {"D": 1.0}})
    out, flow, mom = junction(net, [0.1, 0.1, 0.0, 0.0], [10.0] * 4, [0, 1, 1, 1])
    assert out[0] == flow[2] == mom[2] == 0.0 and flow[3] > 0.4
    env = arz.NetworkVectorEnv(1, street(), interval=5.0, seconds=100.0, **STEADY)
    env.reset(seed=0)
    steps(env, [1], 95)
    assert inside(env, ("J", "B"))[0] == 0.0 and inside(env, ("A", "J"))[0] > 8.0
    steps(env, [0], 5)


# ------------------------------------------------------------------------------------- formulas of traffic
def test_delay_of_one_red_matches_lwr():
    """q r^2 / (2 (1 - q/q_m)), Greenshields with q_m .25: 8.3333. The equilibrium-gap pressure with w = Vmax is LWR."""
    net = street()
    found = []
    for red in (0.0, 10.0):
        env = arz.NetworkVectorEnv(1, net, interval=2.0, seconds=202.0, **STEADY)
        env.reset(seed=0)
        steps(env, [0], 100)
        before = env.episode[1, 0]
        steps(env, [1], red)
        steps(env, [0], 100 - red)
        exit_flow = env.ledger[1].sum()
        found.append((env.episode[1, 0] - before, exit_flow, inside(env, ("A", "J"))[0]))
    extra = found[1][0] - found[0][0]
    assert abs(found[1][2] - found[0][2]) < 0.02  # the queue has gone
    # measured over the section that ends at the stop line plus what follows, hence a share of acceleration ahead
    assert extra > 8.3333 * 0.97


@pytest.mark.parametrize("scheme", ["godunov", "muscl"])
def test_delay_of_one_red_on_its_section(scheme):
    errors = [val.red_light(scheme, dx) - val.RED for dx in (5.0, 2.5, 1.25)]
    assert errors[0] < 0.25 and errors[1] < 0.1 and abs(errors[2]) < 0.03


def test_discharge_is_the_capacity():
    net = street(flow=3600.0, limit=36.0)
    env = arz.NetworkVectorEnv(1, net, interval=5.0, seconds=605.0, **STEADY)
    env.reset(seed=0)
    steps(env, [0], 300)
    left = env.ledger[1].sum()
    steps(env, [0], 300)
    assert (env.ledger[1].sum() - left) / 300 == pytest.approx(0.25 * 0.2 * 10.0, rel=0.02)
    assert env.queue[1, 0, 0] == pytest.approx(600 - env.ledger[0].sum() + env.queue[1, 0, 0], abs=1e-6)


def test_spill_back_fills_the_road_behind_and_the_queue_outside():
    net = street(links=("A", "J1", "J2", "B"), limit=36.0, flow=900.0, length=150.0)
    env = arz.NetworkVectorEnv(1, net, interval=5.0, seconds=1000.0, **STEADY)
    env.reset(seed=0)
    steps(env, [0, 1], 60)
    assert inside(env, ("J1", "J2"))[0] < 20 and env.queue.sum() < 1e-9
    steps(env, [0, 1], 500)
    for pair in (("A", "J1"), ("J1", "J2")):
        assert inside(env, pair)[0] == pytest.approx(0.2 * 150, rel=0.02)  # jam density, and not above
    assert env.u[1].max() < 0.2 * 1.001
    assert env.queue[1].sum() == pytest.approx(560 * 0.25 - 60, rel=0.02)
    assert inside(env, ("J2", "B"))[0] == 0.0


def test_motorcycles_move_between_standing_cars():
    rows = [{"from": a, "to": b, "length_m": 200.0, "class": "secondary", "lanes": 1, "limit": None}
            for a, b in (("A", "J"), ("J", "B"), ("X", "J"))]
    demand = {"A": {"motorcycle": 400, "car": 800}, "X": {}}
    net = networks.build_network("mixed", rows, {"signals": {"J": [["A"], ["X"]]}, "demand": demand}, 10.0)
    env = arz.NetworkVectorEnv(1, net, interval=5.0, seconds=400.0, **STEADY | {"pressure": "power"})
    env.reset(seed=0)
    steps(env, [1], 300)
    near_line = slice(net.first[0], net.first[1])
    m, c = env.u[0, near_line, 0], env.u[1, near_line, 0]
    assert (m + arz.ALPHA * c).max() < 0.2 * 1.02 and (m + c).max() > 0.2  # packed denser than cars alone could


# ------------------------------------------------------------------------------------------ order of the schemes
@pytest.mark.parametrize("scheme, low, high", [("godunov", 0.8, 1.2), ("muscl", 1.7, 2.4)])
def test_order_on_a_smooth_wave(scheme, low, high):
    errors = [val.smooth_street(scheme, dx) for dx in (10.0, 5.0, 2.5)]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert (orders > low).all() and (orders < high).all(), (errors, orders)


# -------------------------------------------------------------------------------- conservation, positivity
def audit(env):
    """Largest of both classes' |stored + out + queued - initial - in - floor| / (initial + in), recomputed here."""
    net = env.network
    cell = np.concatenate([np.full(n, dx) for n, dx in zip(np.diff(net.first), net.par[:, networks.CELL])])
    u, worst = env.host(env.u).astype(float), 0.0
    arrived, departed, lost, started = env.host(env.ledger)
    for k in range(2):
        stored = (u[k] * cell[:, None]).sum(0) + env.host(env.queue)[k].sum(0)
        came = started[k] + arrived[k]
        assert came.min() > 50 and departed[k].min() > 10
        worst = max(worst, (np.abs(stored + departed[k] - came - lost[k]) / came).max())
        assert lost[k].max() < (1e-12 if env.dtype == np.float64 else 1e-6) * came.min()
    return worst


@pytest.mark.parametrize("dtype, limit", [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("network, pressure, scheme", [
    ("corridor", "power", "godunov"), ("town2", "gap", "godunov"), ("corridor", "ancestor", "godunov"),
    ("corridor", "power", "muscl"), pytest.param("town2", "singular", "godunov", marks=pytest.mark.slow),
    pytest.param("corridor", "singular", "muscl", marks=pytest.mark.slow)])
def test_vehicles_are_conserved(network, pressure, scheme, dtype, limit):
    env = arz.NetworkVectorEnv(
        3, network, level=(1.5, 1.5), seconds=450.0, dtype=dtype, pressure=pressure, scheme=scheme)
    env.reset(seed=3)
    rng = np.random.default_rng(0)
    for _ in range(env.length - 1):
        env.step_lanes(rng.integers(0, 2, (3 * env.agents, 1)))
        assert (env.u >= 0).all() and np.isfinite(env.u).all()
        assert env.stat[0].max() <= env.law[14] * (1 + 1e-6)
    assert audit(env) < limit and env.stats()["mass_error"].max() < limit
    env.ledger[1] += 1.0
    assert env.stats()["mass_error"].min() > 1e-4


def test_w_and_density_stay_within_their_bounds():
    env = arz.NetworkVectorEnv(4, "corridor", level=(2.5, 2.5), seconds=900.0, dtype="float64", fill=0.5)
    env.reset(seed=1)
    rng, net = np.random.default_rng(0), env.network
    top = np.repeat(net.par[:, networks.V_C], np.diff(net.first))[:, None]
    jam = np.repeat(net.par[:, networks.JAM], np.diff(net.first))[:, None]
    for _ in range(env.length - 1):
        env.step_lanes(rng.integers(0, 2, (4 * env.agents, 1)))
        for k in range(2):
            thick = env.u[k] > 1e-6
            assert (env.u[2 + k] <= env.u[k] * top * 1.02)[thick].all()
        assert (env.u[0] + arz.ALPHA * env.u[1] < 1.1 * jam).all() and (env.u[1] < 1.1 * jam).all()


# ------------------------------------------------------------------------------------ lanes, threads, CUDA
def rollout(n, lane0=0, block=None, steps=8, **kwargs):
    env = arz.NetworkVectorEnv(n, kwargs.pop("network", "corridor"), lane0=lane0, block=block, **kwargs)
    env.reset(seed=7)
    for t in range(steps):
        lane = (lane0 + np.arange(n))[:, None]
        obs, reward, _, _ = env.step_lanes((lane + np.arange(env.agents) + t // 2) % 2)
    return env.host(env.u).copy(), obs.reshape(n, env.agents, -1).copy(), reward.reshape(n, -1).copy()


@pytest.mark.parametrize("dtype, scheme", [("float32", "godunov"), ("float64", "godunov"), ("float32", "muscl")])
def test_a_lane_does_not_depend_on_its_neighbours(dtype, scheme):
    whole = rollout(7, dtype=dtype, scheme=scheme)
    for n, lane0, block in ((7, 0, 2), (1, 5, 32), (2, 3, 1)):
        part = rollout(n, lane0, block, dtype=dtype, scheme=scheme)
        np.testing.assert_array_equal(part[0], whole[0][:, :, lane0 : lane0 + n])
        for a, b in zip(part[1:], whole[1:]):
            np.testing.assert_array_equal(a, b[lane0 : lane0 + n])


CUDA = """
import sys
import numpy as np
from cleanrl_crypto import ppo_arz_gpu as arz
for dtype, limit, scheme in (("float64", 1e-12, "godunov"), ("float32", 1e-4, "godunov"), ("float32", 1e-4, "muscl")):
    runs = []
    for backend in ("cpu", "cuda"):
        env = arz.NetworkVectorEnv(3, "town1", interval=15.0, seconds=45.0, dtype=dtype, backend=backend, scheme=scheme)
        env.reset(seed=5)
        rows = []
        for t in range(4):
            obs, reward, _, done = env.step_lanes(np.full((3, 1), t % 2))
            rows += [obs.copy().ravel(), reward.copy(), done.copy().astype(float)]
        rows += [np.asarray(env.host(env.u), float).ravel(), *env.final_stats.values()]
        runs.append(np.concatenate(rows))
        assert done.sum() == 0 and env.final_stats["mass_error"].max() < 1e-5
    np.testing.assert_allclose(runs[0], runs[1], rtol=limit, atol=limit)
    assert np.abs(runs[0]).max() > 1
"""


def test_cuda_simulator_equals_cpu(repo):
    run_code(repo, CUDA, NUMBA_ENABLE_CUDASIM="1")


# ---------------------------------------------------------------------------------------------------- files
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
    net = networks.load_network(write(tmp_path), dx=50.0)
    assert net.ends == (("A", "J"), ("B", "J"), ("J", "C")) and net.first.tolist() == [0, 4, 7, 11]
    assert net.par[:, networks.V_C] * 3.6 == pytest.approx([50, 30, 50])
    assert net.par[:, networks.JAM].tolist() == [0.4, 0.2, 0.4]
    assert net.signal.tolist() == [0, 0, -1] and net.green.tolist() == [1, 2, 0] and net.entry.tolist() == [0, 1, -1]
    assert net.base == pytest.approx(np.array([[300, 0], [600, 200]]) / 3600)
    env = arz.NetworkVectorEnv(2, write(tmp_path), seconds=60.0)
    env.reset(seed=0)
    assert np.isfinite(env.step_lanes(np.zeros((2, 1), int))[0]).all()


def edit(**change):
    return {k: v for k, v in (PLAN | change).items() if v is not None}


@pytest.mark.parametrize("table, plan, words", [
    (TABLE.replace("length_m", "length"), PLAN, "net.csv: no column 'length_m'"),
    (TABLE.replace("from,", "x,from,").replace("\nA", "\n1,A"), PLAN, "unknown column 'x'"),
    (TABLE.replace("200,secondary,2,\n", "long,secondary,2,\n"), PLAN, "line 2: length_m: 'long' is not a number"),
    (TABLE.replace("150,", "-150,"), PLAN, "line 3: length_m: -150 must be above 0"),
    (TABLE.replace("tertiary,1", "tertiary,1.5"), PLAN, "line 3: lanes: '1.5' is not a whole number"),
    (TABLE.replace("tertiary", "lane"), PLAN, "line 3: class: unknown 'lane', must be motorway"),
    (TABLE + "A,A,10,secondary,1,\n", PLAN, "line 5: from and to are both 'A'"),
    (TABLE + "A,J,10,secondary,1,\n", PLAN, "line 5: A > J is there twice"),
    ("from,to,length_m,class,lanes,limit\n", PLAN, "net.csv: no segments"),
    (TABLE, "{", "net.json: line 1: not JSON"),
    (TABLE, "[]", "net.json: must be an object"),
    (TABLE, edit(signal={}), "unknown key 'signal'"),
    (TABLE, edit(signals={"K": [["A"], ["B"]]}), "signals: no segment touches node 'K'"),
    (TABLE, edit(signals={"J": [["A"]]}), "signals: J: 1 phases, a signal needs 2 to 62"),
    (TABLE, edit(signals={"J": [["A"], ["B"]] * 35}), "signals: J: 70 phases, a signal needs 2 to 62"),
    (TABLE, edit(signals=[]), "signals: [] must be an object"),
    (TABLE, edit(signals={"J": ["A", "B"]}), "signals: J: 1: 'A' must be a list"),
    (TABLE, edit(signals={"J": [[1], ["B"]]}), "signals: J: 1: 1: 1 must be a node's name"),
    (TABLE, edit(demand={"A": 5, "B": {}}), "demand: A: 5 must be an object"),
    (TABLE, edit(demand={"A": {"car": True}, "B": {}}), "demand: A: car: True must be a number >= 0"),
    (TABLE, edit(demand={"A": {"car": math.nan}, "B": {}}), "demand: A: car: nan must be a number >= 0"),
    (TABLE, edit(turns={"J": ["A"]}), "turns: J: ['A'] must be an object"),
    (TABLE, edit(turns={"J": {"A": {"C": "all"}}}), "turns: J: A: C: 'all' must be a number >= 0"),
    (TABLE, '{"signals": {}, "signals": {}}', "the key 'signals' is there twice"),
    (TABLE.replace("A,J", "\N{LATIN CAPITAL LETTER A WITH DIAERESIS},J").encode("latin1"), PLAN,
     "net.csv: byte 36 is not UTF-8"),
    (TABLE, json.dumps(PLAN).encode("utf-16"), "net.json: byte 1 is not UTF-8"),
    (TABLE + "J,D,50,secondary,1,30,99\n", PLAN, "line 5: more values than the 6 columns"),
    (TABLE.replace("200,", "1e12,", 1), PLAN, "line 2: length_m: 1e12 must be at most 100000"),
    (TABLE.replace("tertiary,1", "tertiary,1000"), PLAN, "line 3: lanes: 1000 must be at most 100"),
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


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(networks.NetworkError, match="nothing.csv: no such file"):
        networks.load_network(str(tmp_path / "nothing.csv"))
    with pytest.raises(networks.NetworkError, match="must be freeway, corridor, townN"):
        arz.NetworkVectorEnv(1, "village")


def test_town():
    net = networks.find_network("town4")
    assert len(net.ends) == 80 and len(net.n_phases) == 16 and (net.entry >= 0).sum() == 16
    for s in range(len(net.ends)):
        shares = net.beta[1, net.moves[2][s] : net.moves[2][s + 1]]
        assert shares.sum() == pytest.approx(1.0) if len(shares) else net.ends[s][1].startswith("X")


# ------------------------------------------------------------------------------------------------- baselines
def test_webster():
    cycle, green = arz.webster_plan([0.2, 0.15], 0.5, 10.0)
    assert cycle == pytest.approx(66.667, abs=1e-3) and green == pytest.approx([32.381, 24.286], abs=1e-3)
    with pytest.raises(ValueError, match="no cycle serves"):
        arz.webster_plan([0.3, 0.25], 0.5, 10.0)


def test_mean_flows_follow_the_turns():
    net = networks.corridor_network()
    flow = arz.mean_flows(net)
    exits = [s for s in range(len(net.ends)) if net.moves[2][s] == net.moves[2][s + 1]]
    assert flow[exits].sum() == pytest.approx(net.base.sum())
    into = net.ends.index(("J1", "J2"))
    w, n, s = (net.base[:, net.entry[net.ends.index((a, "J1"))]].sum() for a in ("W", "N1", "S1"))
    assert flow[into] == pytest.approx(0.8 * w + 0.3 * n + 0.3 * s)


def test_max_pressure_is_varaiyas():
    env = arz.NetworkVectorEnv(1, crossing_with_signal(), seconds=60.0, fill=0.0)
    env.reset(seed=0)
    net = env.network
    x = {("A", "J"): 12.0, ("B", "J"): 5.0, ("J", "C"): 4.0, ("J", "D"): 8.0}
    for s, pair in enumerate(net.ends):
        env.zones[0, s] = x[pair] / (net.zone_length[0, s] * net.par[s, networks.JAM])
    sat = net.par[:, networks.JAM] * net.par[:, networks.V_C]
    expected = [sat[0] * (12 - 0.75 * 4 - 0.25 * 8), sat[1] * (5 - 4)]
    assert arz.pressures(env, False)[0, :, 0] == pytest.approx(expected, rel=1e-5)


def crossing_with_signal():
    rows = [{"from": a, "to": b, "length_m": 50.0, "class": "secondary", "lanes": n, "limit": None}
            for a, b, n in (("A", "J", 2), ("B", "J", 1), ("J", "C", 1), ("J", "D", 1))]
    turns = {"J": {"A": {"C": 0.75, "D": 0.25}, "B": {"C": 1.0}}}
    return networks.build_network(
        "x", rows, {"signals": {"J": [["A"], ["B"]]}, "demand": {"A": {}, "B": {}}, "turns": turns})
