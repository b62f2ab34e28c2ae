"""The freeway's kernels against oracles and themselves (exact solutions: test_validate_arz.py)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cleanrl_crypto import ppo_arz_gpu as arz
from cleanrl_crypto.ppo_arz_gpu import AT, FIRST, FLUX, OPEN, RING, SECOND, SUM
from runs import assert_compiles_for_a_gpu, run_code
from scripts.validate_arz import Lane, riemann

GAP = (1.0, 1.0, 1.0)  # p = rho; a law's type is its length
LAWS = [(1.3, 1.0, 1.0), (1.0, 2.0, 1.0, 0.0), (0.7, 0.5, 1.0, 0.0), (0.4, 1.0, 1.0, 0.0, 0.0)]


class Road(Lane):
    """A lane with ends and a ledger."""

    def run(self, seconds, order, left, right):
        arz.advance(self.u, self.work, self.lane, self.totals, self.road, seconds, order, left, right, self.law)

    def total(self, name):
        return self.totals[getattr(SUM, name), 0]

    def lost(self, start):
        """What the ledger misses, relative to the vehicles (sum of densities) at the start."""
        gained = self.total("entered") - self.total("left") + self.total("added")
        return abs(start + gained / self.road[0] - self.u[0].sum()) / start


@pytest.mark.parametrize("law", LAWS)
@given(rho=st.floats(1e-3, 0.95))
@settings(max_examples=30, deadline=None)
def test_pressure_and_density_are_inverse_and_stiffness_is_the_slope(law, rho):
    assert arz.density_nb(arz.pressure_nb(rho, law), law) == pytest.approx(rho, rel=1e-10)
    h = 1e-6 * rho
    slope = (arz.pressure_nb(rho + h, law) - arz.pressure_nb(rho - h, law)) / (2 * h)
    assert arz.stiffness_nb(rho, law) == pytest.approx(rho * slope, rel=1e-6)


@pytest.mark.parametrize("law", LAWS)
@given(w=st.floats(1e-3, 5.0))
@settings(max_examples=30, deadline=None)
def test_the_critical_density_maximises_the_flux(law, w):
    best = arz.critical_nb(w, law)
    top = arz.density_nb(w, law)
    flux = best * (w - arz.pressure_nb(best, law))
    grid = np.linspace(1e-9, top, 1001)
    assert 0 < best < top
    assert flux >= max(r * (w - arz.pressure_nb(r, law)) for r in grid) - 1e-9


@given(rl=st.floats(0, 1), vl=st.floats(0, 1), rr=st.floats(0, 1), vr=st.floats(0, 1))
@settings(max_examples=500, deadline=None)
def test_flux_equals_the_exact_godunov_flux(rl, vl, rr, vr):
    exact = riemann((rl, vl), (rr, vr))
    f, g = arz.flux_nb(rl, vl, rr, vr, (1.0, 1.0, 2.0))
    assert f == pytest.approx(float(exact["rho"](0.0) * exact["v"](0.0)), abs=1e-12)
    assert g == pytest.approx(f * exact["w"], abs=1e-15)


def test_no_middle_state_is_denser_than_the_jam():
    assert arz.flux_nb(0.9, 0.9, 0.9, 0.5, GAP)[0] == pytest.approx(0.5, abs=1e-15)  # 1.3 * .5 without


def test_relaxation_is_exact_at_uniform_density():
    road = Road(np.full(20, 0.3), np.full(20, 0.1), 1.0, tau=2.0)
    road.run(3.0, FIRST, RING, RING)
    v = road.u[1] / road.u[0] - road.u[0]
    assert v == pytest.approx(0.7 + (0.1 - 0.7) * np.exp(-1.5), rel=1e-12)
    assert road.u[0] == pytest.approx(0.3, rel=1e-13)


@pytest.mark.parametrize("order", [FIRST, SECOND])
def test_what_the_first_cell_cannot_take_waits_and_enters_later(order):
    road = Road(np.full(20, 0.7), np.full(20, 0.3), 0.1, cfl=0.45)
    road.lane[AT.q_in], road.lane[AT.q_out] = 0.25, 0.0
    road.run(6.0, order, FLUX, FLUX)
    waiting = road.lane[AT.waiting, 0]
    v = road.u[1] / road.u[0] - road.u[0]
    assert waiting > 0.5 and v.min() > -1e-9
    assert road.u[0].max() < 1.15  # w above p(jam) stands denser than 1; it was 1.7 without a limit
    assert road.total("entered") + waiting == pytest.approx(0.25 * 6, rel=1e-9)
    road.lane[AT.q_in], road.lane[AT.q_out] = 0.0, 0.2
    road.run(60.0, order, FLUX, FLUX)
    assert road.lane[AT.waiting, 0] == pytest.approx(0, abs=1e-9) and road.lost(20 * 0.7) < 1e-12
    assert road.total("entered") == pytest.approx(0.25 * 6, rel=1e-9)


@pytest.mark.parametrize("seconds, right", [(0.5, FLUX), (3.0, OPEN)])
def test_an_empty_road_gives_what_it_has_and_the_floor_is_counted(seconds, right):
    road = Road(np.full(10, 0.02), np.full(10, 0.9), 0.1)
    road.road = *road.road[:4], 1e-3, 0.9  # the floor
    road.lane[AT.q_out] = 0.3  # more is asked for than there is
    road.run(seconds, FIRST, FLUX, right)
    assert road.lost(10 * 0.02) < 1e-12 and road.u[0].min() >= 0.999e-3
    if right == FLUX:
        assert road.total("left") == pytest.approx(0.02 * 0.9 * 0.5, rel=0.02)
    else:  # nothing enters, the road runs empty
        assert road.total("clamped") == road.total("added") > 1e-6


def test_a_closed_outlet_lets_nothing_pass_and_the_queue_spills_back():
    road = Road(np.full(50, 0.2), np.full(50, 0.8), 0.02)
    road.run(0.5, FIRST, OPEN, FLUX)
    assert road.total("left") == 0.0
    rho, v = road.u[0, :, 0], (road.u[1] / road.u[0] - road.u[0])[:, 0]
    assert rho[-1] == pytest.approx(1.0, rel=1e-3) and v[-1] == pytest.approx(0.0, abs=1e-3)
    # the tail moves back at (0 - .2 .8) / (1 - .2) = -.2: .1 of road is stopped after .5
    assert (v < 0.4).sum() * 0.02 == pytest.approx(0.1, abs=0.025)


def test_float32_stays_float32():
    f32 = np.float32
    law = tuple(map(f32, GAP))
    for value in arz.flux_nb.py_func(f32(0.3), f32(0.6), f32(0.5), f32(0.2), law):
        assert value.dtype == np.float32


CHILD = """
import sys, numpy as np, torch
from cleanrl_crypto import ppo_arz_gpu as arz
out = {}
for case in sys.argv[3:]:
    scheme, pressure = case.split("-")
    env = arz.FreewayVectorEnv(2, control="both", scheme=scheme, pressure=pressure, seed=4,
                               decision_interval=0.25, episode_seconds=0.5)
    env.backend = sys.argv[1]  # the simulator's kernels take the host's arrays, which torch can view
    rng = np.random.default_rng(0)
    rows = [env.reset(seed=4)[0].ravel()]
    for _ in range(3):
        reward, terminated, truncated = env.step_lanes(torch.tensor(rng.uniform(-1, 1, (2, 2))))
        rows += [env.observe().numpy().ravel().copy(), reward.numpy().copy(), truncated.numpy() * 1.0,
                 env.last_observations().numpy().ravel().copy()]
    rows += [x.numpy().ravel() for x in env.stats("finals").values()]
    out[case] = np.concatenate(rows)
np.savez(sys.argv[2], **out)
"""


@pytest.mark.parametrize("cases", [
    ["richtmyer-gap", "godunov-gap"],
    pytest.param(["muscl-singular", "godunov-power"], marks=pytest.mark.slow)])
def test_the_cuda_simulator_gives_the_cpus_numbers(tmp_path, repo, cases):
    results = {}
    for backend, simulate in (("cpu", "0"), ("cuda", "1")):
        path = tmp_path / f"{backend}.npz"
        run_code(repo, CHILD, backend, str(path), *cases, NUMBA_ENABLE_CUDASIM=simulate)
        results[backend] = np.load(path)
    for key, cpu in results["cpu"].items():
        assert np.isfinite(cpu).all()
        np.testing.assert_allclose(results["cuda"][key], cpu, rtol=1e-4, atol=2e-6, err_msg=key)


@pytest.mark.parametrize("cases", [
    [("richtmyer", "gap")],
    pytest.param([("muscl", "gap"), ("godunov", "power"), ("muscl", "singular")], marks=pytest.mark.slow)])
def test_the_kernels_compile_for_a_real_gpu(repo, tmp_path, cases):
    """The simulator runs Python, and so takes what CUDA has not: whole rows, np.ceil, max()."""
    assert_compiles_for_a_gpu(repo, tmp_path, f"cases = {cases}" + """
from cleanrl_crypto import ppo_arz_gpu as arz
for scheme, pressure in cases:
    e = arz.FreewayVectorEnv(4, scheme=scheme, pressure=pressure)
    decide, start = arz.cuda_kernels()
    emit(decide, e.state, e.result, e.rules, e.order, e.arrays["action"], e.seed, e.lane0)
    emit(start, e.state, e.arrays["obs"], e.road, e.order, e.pressure, e.seed, e.lane0)
""", 2 * len(cases))
