"""The Aw-Rascle-Zhang kernels of cleanrl_crypto/ppo_arz_gpu.py against exact solutions, oracles and themselves."""


import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cleanrl_crypto import ppo_arz_gpu as arz
from cleanrl_crypto.ppo_arz_gpu import FIRST, FLUX, LINEAR, OPEN, POWER, RING, SECOND, SINGULAR
from runs import assert_compiles_for_a_gpu, run_code

FAR = 1e30  # a relaxation time that never ends
LAWS = ((LINEAR, 1.3, 1.0), (POWER, 1.0, 2.0), (POWER, 0.7, 0.5), (SINGULAR, 0.4, 1.0), (SINGULAR, 0.4, 2.0))

# (rho, v) left and right, time, L1 errors of rho at N = 100, 200, 400, 800 (reproduced twice, independently)
RIEMANN = {
    "shock": ((0.3, 0.6), (0.5, 0.2), 0.5, (5.44e-3, 3.87e-3, 2.75e-3, 1.95e-3), (0.14, 0.126)),
    "fan": ((0.7, 0.2), (0.2, 0.6), 0.5, (5.45e-3, 3.52e-3, 2.26e-3, 1.44e-3), (0.2025, 0.18225)),
    "contact": ((0.8, 0.3), (0.2, 0.3), 0.8, (5.54e-2, 4.14e-2, 3.04e-2, 2.21e-2), (0.24, 0.264)),
    "vacuum": ((0.4, 0.2), (0.3, 0.9), 0.4, (8.55e-3, 5.29e-3, 3.13e-3, 1.81e-3), (0.09, 0.054)),
    "stationary": ((0.2, 0.8), (0.8, 0.2), 0.5, (0, 0, 0, 0), (0.16, 0.16)),
}


def road(rho, v, dx, law=LINEAR, c=1.0, gamma=1.0, jam=1.0, v_max=1.0, tau=FAR, cfl=0.9, floor=1e-13,
         dtype=np.float64):
    """State, scratch, lane data, totals and parameters of one block; rho, v (M,) or (M, W)."""
    rho, v = (np.atleast_2d(np.asarray(x, float).T).T.astype(dtype) for x in (rho, v))
    m, w = rho.shape
    p = np.vectorize(lambda r: arz.pressure_nb(r, law, c, gamma, jam))(rho.astype(float))
    u = np.stack([rho, rho * (v + p)]).astype(dtype)
    par = np.array([dx, v_max, jam, tau, floor, 0, 0, c, gamma, cfl], dtype)
    return u, np.zeros((6, m + 8, w), dtype), np.zeros((8, w), dtype), np.zeros((13, w)), par


def run(state, seconds, order, left=OPEN, right=OPEN, law=LINEAR):
    u, work, lane, totals, par = state
    arz.advance(u, work, lane, totals, par, u.dtype.type(seconds), order, left, right, law)
    return u


def exact_rho(left, right, s):
    """Exact density at x / t = s of a Riemann problem with p = rho."""
    (rl, vl), (rr, vr) = left, right
    w = rl + vl
    middle = max(w - vr, 0.0)
    if middle > rl:  # shock
        speed = (middle * vr - rl * vl) / (middle - rl)
        wave = np.where(s < speed, rl, middle)
    else:  # fan of lambda_1 = w - 2 rho
        wave = np.clip((w - s) / 2, middle, rl)
    return np.where(s < vr, wave, rr)


def exact_averages(left, right, t, edges, fine=400):
    """Cell averages, by many points a cell."""
    n = len(edges) - 1
    x = edges[:-1, None] + (np.arange(fine) + 0.5) / fine * np.diff(edges)[:, None]
    return exact_rho(left, right, (x - 0.5) / t).reshape(n, fine).mean(1)


# ------------------------------------------------------------------------------------------------ pointwise
@pytest.mark.parametrize("name", RIEMANN)
def test_flux_at_the_jump(name):
    left, right, _, _, flux = RIEMANN[name]
    assert arz.flux_nb(*left, *right, LINEAR, 1.0, 1.0, 1.0) == pytest.approx(flux, abs=1e-14)


@pytest.mark.parametrize("law, c, gamma", LAWS)
@given(rho=st.floats(1e-3, 0.95))
@settings(max_examples=50, deadline=None)
def test_pressure_and_density_are_inverse_and_the_stiffness_is_rho_times_the_slope(law, c, gamma, rho):
    p = arz.pressure_nb(rho, law, c, gamma, 1.0)
    assert arz.density_nb(p, law, c, gamma, 1.0) == pytest.approx(rho, rel=1e-10)
    h = 1e-6 * rho
    slope = (arz.pressure_nb(rho + h, law, c, gamma, 1.0) - arz.pressure_nb(rho - h, law, c, gamma, 1.0)) / (2 * h)
    assert arz.stiffness_nb(rho, law, c, gamma, 1.0) == pytest.approx(rho * slope, rel=1e-6)


@pytest.mark.parametrize("law, c, gamma", LAWS)
@given(w=st.floats(1e-3, 5.0))
@settings(max_examples=50, deadline=None)
def test_the_critical_density_maximises_the_flux(law, c, gamma, w):
    best = arz.critical_nb(w, law, c, gamma, 1.0)
    flux = best * (w - arz.pressure_nb(best, law, c, gamma, 1.0))
    top = arz.density_nb(w, law, c, gamma, 1.0)
    grid = np.linspace(1e-9, top, 2001)
    values = [r * (w - arz.pressure_nb(r, law, c, gamma, 1.0)) for r in grid]
    assert 0 < best < top and flux >= max(values) - 1e-9


@given(rl=st.floats(0, 1), vl=st.floats(0, 1), rr=st.floats(0, 1), vr=st.floats(0, 1))
@settings(max_examples=500, deadline=None)
def test_flux_equals_the_exact_godunov_flux(rl, vl, rr, vr):
    """rho (w_L - rho) of the exact solution at x = 0 (p = rho), found from the wave speeds and not from demands."""
    w, middle = rl + vl, max(rl + vl - vr, 0.0)
    if middle > rl:
        speed = (middle * (w - middle) - rl * vl) / (middle - rl)
        rho = rl if speed > 0 else middle
        if abs(speed) < 1e-9:
            return
    else:
        rho = min(max(w / 2, middle), rl)
    f, g = arz.flux_nb(rl, vl, rr, vr, LINEAR, 1.0, 1.0, 1.0)
    if rr == 0:  # an empty road lets everything pass, whatever speed its cell remembers
        rho = min(w / 2, rl)
    assert f == pytest.approx(rho * (w - rho), abs=1e-12)
    assert g == pytest.approx(f * w, abs=1e-15)


def test_an_empty_road_is_entered_and_a_jammed_one_is_not():
    into_empty, _ = arz.flux_nb(0.5, 0.5, 0.0, 0.0, LINEAR, 1.0, 1.0, 1.0)
    assert into_empty == pytest.approx(0.25)
    assert arz.flux_nb(0.5, 0.5, 0.9, 0.0, LINEAR, 1.0, 1.0, 1.0) == (0.0, 0.0)
    assert arz.flux_nb(0.0, 0.5, 0.5, 0.2, LINEAR, 1.0, 1.0, 1.0)[0] == 0.0


@pytest.mark.parametrize("a, b, want", [(1.0, 2.0, 1.0), (-3.0, -2.0, -2.0), (1.0, -1.0, 0.0), (0.0, 5.0, 0.0)])
def test_minmod(a, b, want):
    assert arz.minmod_nb(a, b) == want


# --------------------------------------------------------------------------------------------- Riemann problems
def riemann(name, n, order=FIRST, dtype=np.float64, cfl=0.9):
    left, right, t, *_ = RIEMANN[name]
    x = (np.arange(n) + 0.5) / n
    rho, v = (np.where(x < 0.5, left[k], right[k]) for k in range(2))
    # the test's own time steps: the largest that the Courant number allows, the last one trimmed
    state, now, big = road(rho, v, 1 / n, dtype=dtype, cfl=cfl), 0.0, np.inf
    while t - now > 1e-12:
        u = state[0].astype(float)
        speed = u[1] / u[0] - u[0]
        big = max(np.abs(speed).max(), np.abs(speed - u[0]).max())
        dt = min(cfl / n / big, t - now)
        run(state, dt * (1 - 1e-12), order)
        now += dt
    error = np.abs(state[0][0, :, 0] - exact_averages(left, right, t, np.linspace(0, 1, n + 1))).mean()
    return error, state


@pytest.mark.parametrize("name", RIEMANN)
def test_godunov_reaches_the_known_errors(name):
    for n, want in zip((100, 200, 400, 800), RIEMANN[name][3]):
        error, (_, _, _, totals, _) = riemann(name, n)
        assert error == pytest.approx(want, rel=0.02, abs=1e-14 if name == "stationary" else 1e-4)
        assert totals[8, 0] <= 0.9 + 1e-9


@pytest.mark.parametrize("name", ["shock", "fan", "contact", "vacuum"])
def test_muscl_is_better_than_godunov(name):
    first, _ = riemann(name, 200)
    second, (u, *_) = riemann(name, 200, SECOND, cfl=0.45)
    assert second < (1.0 if name == "vacuum" else 0.8) * first  # next to a vacuum the slopes are limited to nothing
    assert u[0].min() > 0


def test_a_contact_overshoots_in_v_and_keeps_w_bounded():
    for n in (100, 400):
        right = np.arange(n) >= n // 2
        state = road(np.where(right, 0.2, 0.8), np.full(n, 0.3), 1 / n)
        for k in range(20):
            u = run(state, 0.9 / n / 0.5 * (1 - 1e-12), FIRST)[:, :, 0]
            w = u[1] / u[0]
            assert 0.5 - 1e-12 <= w.min() and w.max() <= 1.1 + 1e-12
            if k == 0:
                assert (w - u[0]).max() == pytest.approx(0.4707, abs=1e-4)


# ---------------------------------------------------------------------------------------------------- orders
@pytest.mark.parametrize("order, low, high", [(FIRST, 0.8, 1.1), (SECOND, 1.7, 2.1)])
def test_order_of_convergence_at_a_smooth_contact(order, low, high):
    errors = []
    for n in (50, 100, 200, 400):
        edges = np.linspace(0, 1, n + 1)
        mean = lambda s, e=edges, n=n: 0.5 - 0.3 * n / (2 * np.pi) * np.diff(np.cos(2 * np.pi * (e - s)))  # noqa: E731
        state = road(mean(0.0), np.full(n, 0.4), 1 / n, cfl=0.4)
        start = state[0].copy()
        run(state, 2.5, order, RING, RING)
        errors.append(np.abs(state[0][0, :, 0] - mean(1.0)).mean())
        assert state[0].sum(1) == pytest.approx(start.sum(1), rel=1e-12)  # a ring conserves rho and rho w
    measured = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert (measured > low).all() and (measured < high).all(), measured


# ------------------------------------------------------------------------------------------------- relaxation
def test_relaxation_is_exact_at_uniform_density():
    state = road(np.full(20, 0.3), np.full(20, 0.1), 1.0, tau=2.0)
    run(state, 3.0, FIRST, RING, RING)
    v = state[0][1] / state[0][0] - state[0][0]
    assert v == pytest.approx(0.7 + (0.1 - 0.7) * np.exp(-1.5), rel=1e-12)
    assert state[0][0] == pytest.approx(0.3, rel=1e-13)


@pytest.mark.parametrize("c, growth", [(0.5, 0.5571), (1.2, -0.3166)])
def test_the_uniform_equilibrium_is_stable_where_linear_theory_says(c, growth):
    """p = c rho, V = 1 - rho, rho 0.5, tau 0.2: p' >= -V' iff c >= 1; the first mode's growth rate on a ring."""
    n = 400
    x = (np.arange(n) + 0.5) / n
    # the growing eigenvector, so that one mode alone is measured
    k, rho0, tau = 2 * np.pi, 0.5, 0.2
    v0 = 1 - rho0
    matrix = np.array([[-1j * k * v0, -1j * k * rho0], [-1 / tau, -1j * k * (v0 - rho0 * c) - 1 / tau]])
    rates, vectors = np.linalg.eig(matrix)
    mode = int(np.argmax(rates.real))
    assert rates[mode].real == pytest.approx(growth, abs=2e-4)
    shape = np.real(vectors[:, [mode]] / vectors[0, mode] * np.exp(1j * k * x))
    state = road(rho0 + 1e-4 * shape[0], v0 + 1e-4 * shape[1], 1 / n, c=c, tau=tau, cfl=0.4)
    size = lambda: np.abs(np.fft.rfft(state[0][0, :, 0])[1])  # noqa: E731
    before = size()
    run(state, 1.0, SECOND, RING, RING)
    assert np.log(size() / before) == pytest.approx(growth, abs=0.03)


# --------------------------------------------------------------------------------------------- ends and ledger
def ledger(state, start):
    u, _, _, totals, par = state
    return start + totals[5] - totals[6] + totals[7] - u[0].sum(0) * par[0]


@pytest.mark.parametrize("law, c, gamma", LAWS)
@pytest.mark.parametrize("order", [FIRST, SECOND])
def test_vehicles_are_conserved_and_courant_stays_below_its_limit(law, c, gamma, order):
    rng = np.random.default_rng(0)
    rho, v = rng.uniform(0.05, 0.6, (60, 5)), rng.uniform(0, 0.8, (60, 5))
    state = road(rho, v, 0.1, law, c, gamma, tau=5.0, cfl=0.45, floor=1e-6)
    state[2][3], state[2][4] = 0.05, 0.03
    start = state[0][0].sum(0) * 0.1
    run(state, 8.0, order, FLUX, FLUX, law)
    assert np.abs(ledger(state, start) / start).max() < 1e-12
    assert state[0][0].min() >= 0.999e-6 and np.isfinite(state[0]).all()
    assert 0 < state[3][8].max() <= 0.45 + 1e-9
    assert state[3][5] == pytest.approx(0.05 * 8, rel=1e-9) and state[3][6] == pytest.approx(0.03 * 8, rel=1e-9)


def test_what_the_floor_adds_is_counted():
    state = road(np.full(10, 0.02), np.full(10, 0.9), 0.1, floor=1e-3)
    state[2][3], state[2][4] = 0.0, 0.3  # more is asked for at the outlet than there is
    start = state[0][0].sum(0) * 0.1
    run(state, 1.0, FIRST, FLUX, FLUX)
    assert state[3][7] > 1e-4
    assert np.abs(ledger(state, start)).max() < 1e-12
    assert state[0][0].min() >= 0.999e-3


def test_a_closed_outlet_lets_nothing_pass_and_the_queue_spills_back():
    state = road(np.full(50, 0.2), np.full(50, 0.8), 0.02, cfl=0.9)
    run(state, 0.5, FIRST, OPEN, FLUX)
    assert state[3][6] == 0.0
    rho, v = state[0][0, :, 0], (state[0][1] / state[0][0] - state[0][0])[:, 0]
    assert rho[-1] == pytest.approx(1.0, rel=1e-3) and v[-1] == pytest.approx(0.0, abs=1e-3)
    # the tail moves back at (0 - .2 .8) / (1 - .2) = -.2: .1 of road is stopped after .5
    assert (v < 0.4).sum() * 0.02 == pytest.approx(0.1, abs=0.025)


def test_demand_enters_as_far_as_the_first_cell_allows():
    state = road(np.array([0.9] * 5 + [0.1] * 15), np.array([0.05] * 5 + [0.9] * 15), 0.1)
    state[2][3], state[2][7] = 5.0, 1.0  # 5 a second wait, w = 1
    before = state[0][0].sum() * 0.1
    run(state, 0.05, FIRST, arz.DEMAND, OPEN)
    entered = state[3][5, 0]
    assert 0 < entered <= 0.25 * 0.05 + 1e-12  # never above the capacity w^2 / 4
    assert state[0][0].sum() * 0.1 - before == pytest.approx(entered - state[3][6, 0], abs=1e-12)
    slow = road(np.full(20, 0.1), np.full(20, 0.9), 0.1)
    slow[2][3], slow[2][7] = 0.02, 1.0
    run(slow, 0.5, FIRST, arz.DEMAND, OPEN)
    assert slow[3][5, 0] == pytest.approx(0.01, rel=1e-9)


def test_lanes_do_not_see_each_other():
    rng = np.random.default_rng(1)
    rho, v = rng.uniform(0.1, 0.6, (30, 7)), rng.uniform(0.1, 0.8, (30, 7))
    together = run(road(rho, v, 0.1, tau=3.0), 1.0, SECOND, RING, RING)
    for k in range(7):
        alone = run(road(rho[:, k], v[:, k], 0.1, tau=3.0), 1.0, SECOND, RING, RING)
        assert (alone[:, :, 0] == together[:, :, k]).all()


@pytest.mark.parametrize("order", [FIRST, SECOND])
def test_float32_stays_float32_and_close(order):
    rng = np.random.default_rng(2)
    rho, v = rng.uniform(0.1, 0.6, (30, 4)), rng.uniform(0.1, 0.8, (30, 4))
    double = run(road(rho, v, 0.1, tau=3.0), 1.0, order, RING, RING)
    single = run(road(rho, v, 0.1, tau=3.0, dtype=np.float32), 1.0, order, RING, RING)
    assert single.dtype == np.float32 and np.abs(single - double).max() < 2e-5
    f32 = np.float32
    for value in arz.flux_nb.py_func(f32(0.3), f32(0.6), f32(0.5), f32(0.2), LINEAR, f32(1), f32(1), f32(1)):
        assert value.dtype == np.float32


def test_the_block_driver_is_the_block_function():
    rng = np.random.default_rng(3)
    rho, v = rng.uniform(0.1, 0.6, (20, 6)), rng.uniform(0.1, 0.8, (20, 6))
    one = run(road(rho, v, 0.1), 1.0, FIRST)
    parts = [road(rho[:, k : k + 3], v[:, k : k + 3], 0.1) for k in (0, 3)]
    u, work, lane, totals = (np.stack([part[i] for part in parts]) for i in range(4))
    arz.advance_cpu(u, work, lane, totals, parts[0][4], 1.0, FIRST, OPEN, OPEN, LINEAR)
    assert (np.concatenate(list(u), -1) == one).all()


# --------------------------------------------------------------------------------------------------- CUDA
CHILD = """
import sys, numpy as np
from numba import cuda
from cleanrl_crypto import ppo_arz_gpu as arz
out = {}
for scheme, pressure in (("godunov", "gap"), ("godunov", "power"), ("muscl", "singular")):
    env = arz.FreewayVectorEnv(2, control="both", scheme=scheme, pressure=pressure, pressure_exponent=1.0, seed=4,
                               precision="float64", decision_interval=0.25, episode_seconds=0.5,
                               backend=sys.argv[1])
    rng = np.random.default_rng(0)
    rows = [env.reset(seed=4)[0].ravel()]
    for _ in range(3):
        obs, reward, terminated, truncated = env.step_lanes(rng.uniform(-1, 1, (2, 2)))
        rows += [obs.ravel().copy(), reward.copy(), truncated * 1.0, env.final_obs.ravel().copy()]
    rows += [v for v in env.final_stats.values()]
    out[scheme + pressure] = np.concatenate(rows)
    env.close()
np.savez(sys.argv[2], **out)
"""


def test_the_cuda_simulator_gives_the_cpus_numbers(tmp_path, repo):
    results = {}
    for backend, simulate in (("cpu", "0"), ("cuda", "1")):
        run_code(repo, CHILD, backend, str(tmp_path / f"{backend}.npz"), NUMBA_ENABLE_CUDASIM=simulate)
        results[backend] = np.load(tmp_path / f"{backend}.npz")
    for key, cpu in results["cpu"].items():
        assert np.isfinite(cpu).all()
        np.testing.assert_allclose(results["cuda"][key], cpu, rtol=1e-6, atol=1e-9, err_msg=key)


def test_the_kernels_compile_for_a_real_gpu(repo, tmp_path):
    """The simulator runs Python, and so takes what CUDA has not: whole rows, np.ceil, max()."""
    assert_compiles_for_a_gpu(repo, tmp_path, """
from cleanrl_crypto import ppo_arz_gpu as arz
for scheme, pressure, precision in (("muscl", "gap", "float32"), ("godunov", "singular", "float64")):
    e = arz.FreewayVectorEnv(4, scheme=scheme, pressure=pressure, precision=precision)
    decide, start = arz.build_cuda()
    emit(decide, e.u, e.work, e.lane, e.totals, e.finals, e.ints, e.waves, e.par, e.order, e.law, e.control, e.action,
         e.obs, e.final, e.reward, e.flags, e.seed, e.lane0, e.length, e.samples)
    emit(start, e.u, e.work, e.lane, e.totals, e.ints, e.waves, e.par, e.order, e.law, e.obs, e.seed, e.lane0)
for scheme, pressure, dtype in (("godunov", "power", "float32"), ("muscl", "singular", "float64")):
    e = arz.NetworkVectorEnv(4, "town1", scheme=scheme, pressure=pressure, dtype=dtype)
    z, s, q = e.u.dtype, e.sums.shape[1], e.queue.shape[1]
    scratch = np.zeros((8, 9, 4), z), np.zeros((8, s, 4), z), np.zeros((16, 4), z), np.zeros((4, q, 4))
    emit(arz.cuda_decide(), e.action, e.u, *scratch, e.state, e.sums, e.ledger, e.stat, e.zones, e.episode, e.rules,
         e.seed, e.data, e.net, e.order, e.law[:-1], e.law[-1])
""", 6)
