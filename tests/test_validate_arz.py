"""scripts/validate_arz.py: its exact solutions, what it finds about the kernels, and records it has never seen."""

import json
import os
import re
import sys

import numpy as np
import pytest

from common.run import CheckFailed, UsageError
from scripts import validate_arz as val

# name -> rho*, v*, edges of the first wave, contact, flux at the jump, L1 of Godunov's density at N 100 (three digits)
KNOWN = {
    "shock, contact": (0.7, 0.2, (-0.1, -0.1), 0.2, (0.14, 0.126), "5.44e-03"),
    "fan, contact": (0.3, 0.6, (-0.5, 0.3), 0.6, (0.2025, 0.18225), "5.45e-03"),
    "contact": (0.8, 0.3, None, 0.3, (0.24, 0.264), "5.54e-02"),
    "vacuum": (0.0, 0.6, (-0.2, 0.6), 0.9, (0.09, 0.054), "8.55e-03"),
    "stationary shock": (0.8, 0.2, (0.0, 0.0), 0.2, (0.16, 0.16), None),
}


# --------------------------------------------------------------------------------------------- exact solutions
@pytest.mark.parametrize("name", KNOWN)
def test_exact_solver_gives_the_known_states(name):
    left, right, gamma, *_ = val.CASES[name]
    rho, v, edges, contact, flux, _ = KNOWN[name]
    found = val.riemann(left, right, gamma)
    assert (found["rho*"], found["v*"], found["contact"]) == pytest.approx((rho, v, contact), abs=1e-12)
    if edges:
        assert found["edges"] == pytest.approx(edges, abs=1e-12)
    assert found["vacuum"] == (name == "vacuum")
    f = found["rho"](0.0) * found["v"](0.0)
    assert (f, f * found["w"]) == pytest.approx(flux, abs=1e-14)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("left, right", [((0.3, 0.6), (0.5, 0.2)), ((0.7, 0.2), (0.2, 0.5)), ((0.4, 0.2), (0.3, 0.95))])
def test_exact_solutions_satisfy_the_equations(left, right, gamma):
    """Jump conditions of both conserved quantities, the fan's characteristics, and mass as the density's integral."""
    c = 0.9
    found = val.riemann(left, right, gamma, c)
    head, tail = found["edges"]
    if found["kind"] == "shock":
        rho, v = (np.array([left[k], (found["rho*"], found["v*"])[k]]) for k in range(2))
        w = v + c * rho**gamma
        assert w[0] == pytest.approx(w[1], abs=1e-12)
        assert np.diff(rho * v)[0] == pytest.approx(head * np.diff(rho)[0], abs=1e-12)
        assert head < left[1] and found["rho*"] > left[0]  # a car brakes at a shock, never speeds up
    else:
        s = np.linspace(head, tail, 101)[1:-1]
        rho, v = found["rho"](s), found["v"](s)
        assert v - gamma * c * rho**gamma == pytest.approx(s, abs=1e-12)
        assert v + c * rho**gamma == pytest.approx(np.full(99, found["w"]), abs=1e-12)
        assert found["vacuum"] == (right[1] > found["w"])
    s = np.linspace(-2, 2, 400_001)
    steps = (s[1:] + s[:-1]) / 2
    assert found["mass"](2.0) - found["mass"](-2.0) == pytest.approx(found["rho"](steps).sum() * 1e-5, abs=1e-5)


# ------------------------------------------------------------------------------------------------ the kernels
@pytest.mark.parametrize("name", KNOWN)
def test_godunov_errors_are_the_printed_ones(name):
    error, want = val.run_case(name, 100, "godunov")["L1"], KNOWN[name][5]
    assert error < 1e-14 if want is None else f"{error:.2e}" == want


def test_muscl_converges_faster_in_a_fan_and_leaves_a_vacuum_positive():
    for name, low in (("fan alone", 0.9), ("vacuum", 0.8)):
        runs = [val.run_case(name, n, "muscl") for n in (100, 200)]
        assert val.orders([r["L1"] for r in runs])[0] > low
        assert min(r["min_rho"] for r in runs) > 0


def test_orders_on_smooth_solutions_and_conservation():
    checks = []
    part = val.smooth_part(True, checks)
    assert len(checks) == 8 and all(c[3] for c in checks)
    assert 0.85 < part["contact (v .4), godunov"]["orders"][0] < part["contact (v .4), godunov"]["orders"][1] < 1
    assert 1.8 < min(part["contact (v .4), muscl"]["orders"]) < 1.92
    assert max(e["lost"] for k, e in part.items() if k != "N") < 5e-15


def test_threshold_and_growth_rates():
    checks = []
    part = val.stability_part(True, checks)
    assert all(c[3] for c in checks), [c for c in checks if not c[3]]
    for c, known in (("0.5", 0.5571), ("1", 0.0), ("1.2", -0.3166)):
        assert part["c"][c]["limit"] == pytest.approx(known, abs=1e-3)
        assert part["c"][c]["theory"] == pytest.approx(known, abs=1e-4)
    assert part["threshold"] == pytest.approx(1, abs=0.01)


def test_a_wrong_number_is_reported(monkeypatch, tmp_path):
    left, right, gamma, t, known = val.CASES["shock, contact"]
    monkeypatch.setattr(val, "CASES", {"shock, contact": (left, right, gamma, t, (5.54e-3, *known[1:]))})
    checks = []
    monkeypatch.setattr(val, "smooth_part", lambda quick, checks: {"N": ()})
    val.riemann_part(True, checks)
    monkeypatch.setitem(val.GROWTH, 0.5, 0.6)
    with pytest.raises(CheckFailed, match="linear theory's growth, c 0.5"):
        val.main(["--quick", "--parts", "stability", "--out", str(tmp_path)])
    assert [c[0] for c in checks if not c[3]] == ["godunov's L1, shock, contact, N 100"]


# -------------------------------------------------------------------------------------------------- the record
CURVE = (20.0, 60.0, 1.0)  # w, c, gamma of v = w - c rho
CELLS, BINS, DX, DT = 30, 160, 10.0, 5.0


def traffic(lwr: bool, tau: float = val.FAR, bins: int = BINS) -> dict:
    """Arrays of a record that a model made: waves that come from downstream, drivers who differ from each other."""
    t = (np.arange(bins) + 0.5) * DT
    rho = np.stack([0.17 + 0.02 * np.sin(t / 37), 0.2 + 0.06 * np.sin(t / 29) + 0.03 * np.sin(t / 61)])
    v = CURVE[0] - CURVE[1] * rho + 2.0 * np.stack([np.sin(t / 43), np.sin(t / 43)])
    out = np.empty((2, CELLS, bins))
    rest = 0.0, 1.0, 0.0 if lwr else tau
    law = CURVE[0], (*CURVE[1:], 1.0, 0.0)
    val.simulate(np.stack([rho, v]), DT, DX, 1, val.FIRST, law, rest, lwr, 0.9, out)
    return {"x_m": (np.arange(CELLS) + 0.5) * DX, "t_s": t, "density_veh_per_m": out[0],
            "speed_m_per_s": out[1] / out[0], "flow_veh_per_s": out[1]}


@pytest.fixture
def record(tmp_path):
    """record(arrays) -> path of a .npz."""
    def write(arrays, name="record.npz"):
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name
    return write


def prepared(path, **kwargs):
    return val.prepare(val.load_record(path), val.Args(ngsim=path, end_metres=10, **kwargs))


def test_errors_are_fan_and_seibolds(record):
    data = prepared(record(traffic(True)), block_metres=10, block_seconds=5, warmup=0)
    half = data["halves"][0]
    rho, v = half["rho"], half["q"] / half["rho"]
    assert data["range"] == pytest.approx((np.ptp(rho), np.ptp(v)), rel=1e-12)
    found = val.errors(rho + 0.01, (rho + 0.01) * (v - 0.5), half, data)
    assert found["E"] == pytest.approx(0.01 / np.ptp(rho) + 0.5 / np.ptp(v), rel=1e-9)
    assert (found["rho"], found["v"]) == pytest.approx((0.01, 0.5), rel=1e-9)
    assert val.errors(rho, half["q"], half, data)["E"] < 1e-14


def test_the_road_between_the_detectors_is_conserved_and_close_to_its_record(record):
    data = prepared(record(traffic(False)))
    for scheme, limit in (("godunov", 0.9), ("muscl", 0.45)):
        rho, q, ledger = val.predict("ARZ, no relaxation", (CURVE, (0.0, 1.0, val.FAR)), data["halves"][1], data,
                                     scheme=scheme)
        start, into, out, end, added, courant = ledger
        assert start + into + added - out == pytest.approx(end, rel=1e-13) and added == 0
        assert 0.5 * limit < courant <= limit
        # the fluxes at the ends are those of the detectors' states, near the record's own flow there
        assert q[0].mean() == pytest.approx(data["halves"][1]["q"][0].mean(), rel=0.02)
    lwr = val.predict("LWR", (CURVE, (0.0, 1.0, 0.0)), data["halves"][1], data)
    below = CURVE[0] - CURVE[1] * lwr[0] - lwr[1] / lwr[0]  # a bin's mean of a concave flow lies below its curve
    assert -1e-9 < below.min() and below.max() < 0.2


@pytest.mark.parametrize("scheme", val.SCHEMES)
def test_the_road_between_the_detectors_is_the_freeways(scheme):
    """Far from the ends the same states as arz.advance(), relaxation included: tau 10 s is felt within 5 s."""
    m, bin_s, bins, (w, c, gamma), rest = 40, 0.5, 10, (20.0, 40.0, 0.7), (22.0, 0.4, 10.0)
    ends = np.stack([np.repeat([[0.1], [0.3]], bins, 1), np.repeat([[14.0], [4.0]], bins, 1)])
    out, order = np.empty((2, m, bins)), val.SCHEMES[scheme][0]
    law = w, (c, gamma, 1.0, 0.0)
    val.simulate(ends, bin_s, DX, 1, order, law, rest, False, 0.02, out)
    s = (np.arange(m) + 0.5) / m
    lane = val.Lane(0.1 + 0.2 * s, 14 - 10 * s, DX)
    u, lane.law = lane.u, (c, gamma, rest[1], 0.0)
    u[1] = u[0] * ((14 - 10 * s)[:, None] + c * u[0] ** gamma)
    lane.road = DX, *rest, 1e-13, 0.02
    lane.advance(4.75, order)
    rho, q = u[0, :, 0], (u[1] - u[0] * c * u[0] ** gamma)[:, 0]
    assert out[0, 14:26, -1] == pytest.approx(rho[14:26], rel=2e-4)
    assert out[1, 14:26, -1] == pytest.approx(q[14:26], rel=2e-4)
    assert np.abs(q / rho - (14 - 10 * s))[14:26].min() > 0.2  # it did move


def test_the_interval_holds_the_mean_and_widens_with_correlation():
    noise = np.random.default_rng(1).normal(0.3, 1, 400)
    gap, low, high = val.difference(noise, np.zeros(400))
    assert gap == pytest.approx(noise.mean()) and low < gap < high
    assert high - low == pytest.approx(4 * noise.std() / 20, rel=0.25)
    slow = np.repeat(noise[:100], 4)
    _, low4, high4 = val.difference(slow, np.zeros(400))
    assert high4 - low4 > 1.4 * (high - low)


def test_what_arz_made_arz_predicts_and_lwr_does_not(record):
    """One curve, drivers 2 m/s faster or slower than it: the second family's contacts are all that LWR lacks."""
    checks = []
    data = prepared(record(traffic(False)))
    part = val.record_part(data, val.Args(quick=True), checks)
    assert all(c[3] for c in checks), [c for c in checks if not c[3]]
    models = part["models"]
    assert models["ARZ, no relaxation"]["second"]["E"] < 0.03
    assert models["ARZ, no relaxation"]["second"]["E"] < 0.3 * models["LWR"]["second"]["E"]
    assert models["LWR"]["second"]["E"] < models["mean of the first half"]["second"]["E"]
    assert models[part["best"]["ARZ"]]["first"]["E"] <= models["ARZ, no relaxation"]["first"]["E"]
    gap, low, high = part["differences"]["error"]["gap"]
    assert 0 < low < gap < high
    assert "ARZ" in val.verdict(part).split("each family's best there")[1].split(" is nearer")[0]


def test_what_lwr_made_both_predict_and_the_curve_is_found(record):
    data = prepared(record(traffic(True)))
    part = val.record_part(data, val.Args(quick=True), [])
    models = part["models"]
    assert models["LWR, Greenshields"]["second"]["E"] < 0.03
    assert models["LWR, Greenshields"]["second"]["E"] < 0.5 * models["straight line"]["second"]["E"]
    found = models["LWR, Greenshields (diagram)"]["params"]
    assert (found["w"], found["C"]) == pytest.approx(CURVE[:2], rel=0.02)
    assert part["diagram"]["power"][2] == pytest.approx(1, abs=0.1)


def test_calibration_sees_the_first_part_only(record):
    """Numbers found do not change with what comes after the split."""
    arrays = traffic(False)
    other = {k: v.copy() for k, v in arrays.items()}
    for key in ("density_veh_per_m", "flow_veh_per_s"):
        other[key][:, BINS // 2 :] *= 0.5
    found = []
    for a in (arrays, other):
        data = prepared(record(a))
        x, _ = val.calibrate("ARZ, relaxes to its curve", data, 50)
        found.append((*x, *data["range"], *data["anchors"], *data["cells"]))
    assert found[0] == found[1]


def test_the_minimiser_finds_a_minimum():
    seen = []

    def valley(p):
        seen.append(float((p[0] - 1) ** 2 + 10 * (p[1] + 2 - p[0] ** 2) ** 2))
        return seen[-1]

    for evaluations in (10, 400):
        seen.clear()
        x, value = val.nelder_mead(valley, [0.0, 0.0], evaluations)
        assert value == min(seen) and len(seen) <= evaluations + 3
    assert x == pytest.approx((1, -1), abs=1e-2) and value < 1e-4


def test_a_ramp_ends_the_stretch():
    flow = np.r_[1.5, np.full(20, 2.2), np.full(40, 2.35), np.full(30, 2.25)]
    first, last = val.no_ramp(flow + 0.01 * np.sin(np.arange(91)))
    assert 21 <= first <= 27 and 54 <= last <= 60


def test_a_growing_jam_is_no_ramp():
    """On a short record a jam stores 8 % of the flow; with what was stored the stretch is one again."""
    cells, bins, dx, dt = 60, 90, 10.0, 5.0
    growth = np.where((np.arange(cells) >= 25) & (np.arange(cells) < 35), 0.0018, 0.0)  # veh/m/s
    rho = 0.1 + growth[:, None] * dt * np.arange(bins)
    stored = np.cumsum(growth) * dx - growth * dx / 2
    q = np.repeat((2.2 - stored)[:, None], bins, 1)
    assert np.ptp(q.mean(1)) > 0.08 * 2.2
    flow = val.conserved_flow(rho, q, dx, dt)
    assert flow == pytest.approx(2.2, rel=1e-6)
    assert val.no_ramp(q.mean(1)) != val.no_ramp(flow) == (6, 53)


# ------------------------------------------------------------------------------------------------ command line
def broken(change):
    arrays = traffic(True, bins=40)
    change(arrays)
    return arrays


def put(key, index, value):
    def change(arrays):
        arrays[key][index] = value
    return change


def delete(key):
    return lambda arrays: arrays.pop(key)


def assign(key, function):
    return lambda arrays: arrays.update({key: function(arrays[key])})


@pytest.mark.parametrize("change, words", [
    (put("speed_m_per_s", (3, 7), np.nan), r"speed_m_per_s, row 3 \(x 35 m\), column 7 \(t 37.5 s\): nan must be"),
    (put("density_veh_per_m", (0, 39), -1.0), r"density_veh_per_m, row 0 .* column 39 .*: -1 must be"),
    (put("flow_veh_per_s", (29, 0), np.inf), r"flow_veh_per_s, row 29 .* column 0 .*: inf must be"),
    (put("x_m", 4, 99.0), r"x_m, row 4: 99 after 35: must rise in equal steps"),
    (put("t_s", 2, 1.0), r"t_s, row 2: 1 after 7.5: must rise"),
    (delete("speed_m_per_s"), r"array speed_m_per_s is missing; found x_m, t_s, density_veh_per_m, flow_veh_per_s"),
    (assign("flow_veh_per_s", lambda a: a[:, :-1]), r"flow_veh_per_s has shape \(30, 39\), not \(30, 40\)"),
    (assign("speed_m_per_s", lambda a: a.astype(str)), r"speed_m_per_s holds <U\d+, not numbers"),
    (assign("speed_m_per_s", lambda a: a * 3.6), r"flow_veh_per_s is not density times speed \(row \d+, column \d+"),
    (lambda a: [a[k].__imul__(0) for k in val.KEYS[2:]], r"density_veh_per_m: mean 0: no traffic"),
    (lambda a: None, r"40 bins of 5 s give a half of 20, --warmup and four blocks of --block-seconds need 24"),
])
def test_a_broken_record_is_refused_in_one_line(record, change, words):
    path = record(broken(change))
    with pytest.raises(UsageError, match=words) as refusal:
        prepared(path)
    assert str(refusal.value).startswith(f"{path}: ") and "\n" not in str(refusal.value)


def test_nobody_there_has_no_speed(record):
    arrays = traffic(True)
    arrays["density_veh_per_m"][5, 3], arrays["flow_veh_per_s"][5, 3] = 0.0, 0.0
    arrays["speed_m_per_s"][5, 3] = np.nan
    path = record(arrays)
    assert np.isfinite(val.load_record(path)["q"]).all()
    data = prepared(path, block_metres=10, block_seconds=5, warmup=0)
    half = data["halves"][0]
    assert val.errors(half["rho"], half["q"], half, data)["E"] < 1e-14  # an empty block is no error, and no NaN


def test_columns_without_a_diagram_are_refused(record):
    data = prepared(record(traffic(True)))
    rho, v = data["points"]
    with pytest.raises(UsageError, match="no fundamental diagram"):
        val.fitted_curve((rho, 5 + 30 * rho), (1.0,))


@pytest.fixture
def refusal(repo, refusal_of):
    return refusal_of(repo / "scripts" / "validate_arz.py")


def test_refusals_of_the_command(refusal, record, tmp_path):
    missing = tmp_path / "no.npz"
    said = refusal(["--ngsim", missing])
    assert f"{missing}: no such file" in said
    cut = tmp_path / "cut.npz"
    cut.write_bytes(record(traffic(True)).read_bytes()[:5000])
    assert f"{cut}: not a readable .npz file" in refusal(["--ngsim", cut])
    text = tmp_path / "text.npz"
    text.write_text("x,t,density\n")
    assert f"{text}: not a readable .npz file" in refusal(["--ngsim", text])
    np.save(tmp_path / "one.npy", np.ones(3))
    assert "one.npy: not a readable .npz file" in refusal(["--ngsim", tmp_path / "one.npy"])
    np.savez_compressed(tmp_path / "bits.npz", **traffic(True))
    bits = bytearray((tmp_path / "bits.npz").read_bytes())
    bits[20_000:20_100] = bytes(100)
    (tmp_path / "bits.npz").write_bytes(bits)
    assert "bits.npz: not a readable .npz file" in refusal(["--ngsim", tmp_path / "bits.npz"])
    assert "--parts weather: must be one of riemann, stability, record" in refusal(["--parts", "weather"])
    assert "--parts record needs --ngsim" in refusal(["--parts", "record"])
    assert "--split 2.0: must be from 0.1 to 0.9" in refusal(["--split", 2])
    assert "unknown flag --ngsm: did you mean --ngsim" in refusal(["--ngsm", "x"])
    path = tmp_path / "record.npz"
    assert f"--cells 3 90: {path} has cells 0 to 29" in refusal(["--ngsim", path, "--cells", 3, 90])
    assert "leave 1 to predict" in refusal(["--ngsim", path, "--cells", 3, 7])
    (tmp_path / "file").write_text("")
    assert "file: File exists" in refusal(["--ngsim", path, "--out", tmp_path / "file"])


def test_the_whole_command(record, tmp_path, capsys):
    path = record(traffic(False, tau=40.0))
    result = val.main(["--quick", "--evaluations", "20", "--ngsim", str(path), "--out", str(tmp_path / "out")])
    assert result["failed"] == []
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["validate_arz.html", "validate_arz.json"]
    saved = json.loads((tmp_path / "out" / "validate_arz.json").read_text())
    assert set(saved) == {"command", "quick", "riemann", "stability", "record", "checks", "failed", "seconds"}
    assert saved["quick"] and set(saved["record"]["models"]) > set(val.MODELS) | {"straight line"}
    page = (tmp_path / "out" / "validate_arz.html").read_text()
    assert page.count("<img") == 11 and not re.search(r'(src|href)="(?!data:|#)', page)
    assert "FAILED" not in page and f"{len(saved['checks'])} of {len(saved['checks'])} checks passed" in page
    said = capsys.readouterr().out
    assert "5.44e-03 (5.44e-03)" in said and "checks passed" in said


def test_parts_need_no_record(tmp_path):
    argv = ["--quick", "--parts", "stability", "--ngsim", "nowhere.npz", "--out", str(tmp_path)]
    result = val.main([*argv, "--figures", str(tmp_path / "plots")])
    assert [p.name for p in (tmp_path / "plots").iterdir()] == ["growth.png"]
    assert "record" not in result and "riemann" not in result and result["failed"] == []


@pytest.mark.slow
@pytest.mark.skipif("NGSIM_US101" not in os.environ, reason="NGSIM_US101 names no record: it may not be redistributed")
def test_the_freeway(tmp_path):
    data = val.prepare(val.load_record(os.environ["NGSIM_US101"]), val.Args())
    first, last = data["cells"]
    assert 26 <= first <= 30 and 62 <= last <= 66  # between the on-ramp and the off-ramp
    checks = []
    part = val.record_part(data, val.Args(quick=True), checks)
    assert all(c[3] for c in checks), [c for c in checks if not c[3]]
    models = {k: m["second"]["E"] for k, m in part["models"].items()}
    assert models["ARZ, no relaxation (diagram)"] == pytest.approx(0.1595, abs=0.002)
    assert models["LWR (diagram)"] == pytest.approx(0.1979, abs=0.002)
    assert models["straight line"] == pytest.approx(0.1417, abs=0.001)
    for name in val.MODELS:
        assert models[name] < 0.65 * models["mean of the first half"], name
    assert part["differences"]["diagram"]["gap"][1] > 0  # fitted to the diagram alone, ARZ is nearer
    assert sys.float_info.epsilon < part["models"]["LWR"]["max_cfl"] <= 0.9
