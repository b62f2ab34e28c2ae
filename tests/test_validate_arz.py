"""scripts/validate_arz.py: its exact solutions, what it finds about the kernels, and records it has never seen."""

import json
import os
import re
import sys

import numpy as np
import pytest

from common.run import CheckFailed, UsageError
from runs import refusal
from scripts import validate_arz as val


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
        edges = found["rho"](np.array([head + 1e-9, tail - 1e-9]))  # the fan joins both states
        assert edges == pytest.approx([left[0], found["rho*"]], abs=1e-4)
    s = np.linspace(-2, 2, 400_001)
    steps = (s[1:] + s[:-1]) / 2
    assert found["mass"](2.0) - found["mass"](-2.0) == pytest.approx(found["rho"](steps).sum() * 1e-5, abs=1e-5)


def test_a_wrong_number_is_reported(monkeypatch, tmp_path):
    left, right, gamma, t, known = val.CASES["shock, contact"]
    monkeypatch.setattr(val, "CASES", {"shock, contact": (left, right, gamma, t, (5.54e-3, *known[1:]))})
    monkeypatch.setattr(val, "smooth_part", lambda quick, checks: {"N": ()})
    argv = ["--quick", "--parts", "riemann", "--ngsim", "nowhere.npz", "--out", tmp_path / "out", "--figures", tmp_path]
    with pytest.raises(CheckFailed, match="1 checks failed: godunov's L1, shock, contact, N 100"):
        val.main(argv)
    assert (tmp_path / "shock_contact.png").exists()
    assert "FAILED" in (tmp_path / "out" / "validate_arz.html").read_text()


CURVE = (20.0, 60.0, 1.0)  # w, c, gamma of v = w - c rho
CELLS, BINS, DX, DT = 30, 160, 10.0, 5.0


def traffic(lwr: bool, bins: int = BINS) -> dict:
    """Arrays of a record that a model made: waves that come from downstream, drivers who differ from each other."""
    t = (np.arange(bins) + 0.5) * DT
    rho = np.stack([0.17 + 0.02 * np.sin(t / 37), 0.2 + 0.06 * np.sin(t / 29) + 0.03 * np.sin(t / 61)])
    v = CURVE[0] - CURVE[1] * rho + 2.0 * np.stack([np.sin(t / 43), np.sin(t / 43)])
    out = np.empty((2, CELLS, bins))
    rest = 0.0, 1.0, 0.0 if lwr else val.FAR
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


def test_what_lwr_made_both_predict_and_the_curve_is_found(record):
    data = prepared(record(traffic(True)))
    part = val.record_part(data, val.Args(quick=True), val.Checks())
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
        law, rest = val.calibrate("ARZ, relaxes to its curve", data, 50)
        found.append((*law, *rest, *data["range"], *data["anchors"], *data["cells"]))
    assert found[0] == found[1]


def test_a_ramp_ends_the_stretch_and_a_growing_jam_is_no_ramp():
    """On a short record a jam stores 8 % of the flow; with what was stored the stretch is one again."""
    cells, bins, dx, dt = 60, 90, 10.0, 5.0
    growth = np.where((np.arange(cells) >= 20) & (np.arange(cells) < 30), 0.0018, 0.0)  # veh/m/s
    rho = 0.1 + growth[:, None] * dt * np.arange(bins)
    stored = np.cumsum(growth) * dx - growth * dx / 2
    q = np.repeat((2.2 - stored)[:, None], bins, 1)
    flow = val.conserved_flow(rho, q, dx, dt)
    assert flow == pytest.approx(2.2, rel=1e-6)
    assert (val.no_ramp(q.mean(1)), val.no_ramp(flow)) == ((31, 56), (6, 53))


def test_a_stretch_too_short_to_tell_models_apart_is_said(record, capsys):
    data = val.load_record(record(traffic(True)))
    for last, words in ((15, "7 cells between detectors of 3"), (25, "")):
        val.prepare(data, val.Args(cells=(3, last), end_metres=30, block_metres=10))
        err = capsys.readouterr().err
        assert words in err and bool(words) == bool(err)


@pytest.mark.parametrize("change, words", [
    (lambda a: a["speed_m_per_s"].__setitem__((3, 7), np.nan), r"speed_m_per_s, row 3 .* column 7 .*: nan"),
    (lambda a: a["density_veh_per_m"].__setitem__((0, 39), -1), r"density_veh_per_m, row 0 .* column 39 .*: -1"),
    (lambda a: a["x_m"].__setitem__(4, 99), r"x_m, row 4: 99 after 35"),
    (lambda a: a.pop("speed_m_per_s"), "array speed_m_per_s is missing"),
    (lambda a: a.update(flow_veh_per_s=a["flow_veh_per_s"][:, 1:]), r"flow_veh_per_s has shape \(30, 39\)"),
    (lambda a: a.update(x_m=a["x_m"].astype(str)), "x_m holds <U"),
    (lambda a: a.update(speed_m_per_s=3.6 * a["speed_m_per_s"]), "flow_veh_per_s is not density times speed"),
    (lambda a: [a[k].__imul__(0) for k in val.KEYS[2:]], "density_veh_per_m: mean 0"),
    (lambda a: None, "40 bins of 5 s")])
def test_a_broken_record_is_refused_in_one_line(record, change, words):
    arrays = traffic(True, bins=40)
    change(arrays)
    path = record(arrays)
    message = refusal(UsageError, prepared, path)
    assert message.startswith(f"{path}: ") and re.search(words, message)


def test_nobody_there_has_no_speed(record):
    arrays = traffic(True)
    arrays["density_veh_per_m"][5, 3], arrays["flow_veh_per_s"][5, 3] = 0.0, 0.0
    arrays["speed_m_per_s"][5, 3] = np.nan
    path = record(arrays)
    assert np.isfinite(val.load_record(path)["q"]).all()
    data = prepared(path, block_metres=10, block_seconds=5, warmup=0)
    half = data["halves"][0]
    assert val.errors(half["rho"], half["q"], half, data)["E"] < 1e-14  # an empty block is no error, and no NaN
    rho, _ = data["points"]
    with pytest.raises(UsageError, match="no fundamental diagram"):
        val.fitted_curve((rho, 5 + 30 * rho), (1.0,))


def test_refusals_of_the_command(repo, refusal_of, record, tmp_path):
    path = record(traffic(True))
    np.save(tmp_path / "one.npy", np.ones(3))
    np.savez_compressed(tmp_path / "bits.npz", **traffic(True))
    bits = (tmp_path / "bits.npz").read_bytes()
    (tmp_path / "bits.npz").write_bytes(bits[:20_000] + bytes(100) + bits[20_100:])
    (tmp_path / "cut.npz").write_bytes(bits[:5000])
    (tmp_path / "text.npz").write_text("x,t,density")
    for name in ("one.npy", "bits.npz", "cut.npz", "text.npz"):
        refusal(UsageError, val.load_record, tmp_path / name, words=[f"{name}: not a readable .npz file"])
    for argv, words in (
        (["--ngsim", "no.npz"], "no.npz: no such file"), (["--parts", "weather"], "--parts weather"),
        (["--parts", "record"], "--ngsim"), (["--split", 2], "--split"),
        (["--ngsim", path, "--cells", 3, 90], "--cells 3 90"), (["--ngsim", path, "--cells", 3, 7], "--cells"),
        (["--ngsim", path, "--out", tmp_path / "one.npy"], "one.npy: File exists")):
        assert words in refusal_of(repo / "scripts" / "validate_arz.py")(argv)


def test_the_whole_command(record, tmp_path, capsys):
    """What ARZ made ARZ predicts and LWR does not: drivers 2 m/s faster or slower than one curve."""
    path, out = record(traffic(False)), tmp_path / "out"
    result = val.main(["--quick", "--ngsim", str(path), "--out", str(out), "--end-metres", "10"])
    assert result["failed"] == []
    saved = json.loads((out / "validate_arz.json").read_text())
    assert set(saved) == {"command", "quick", "riemann", "stability", "record", "checks", "failed", "seconds"}
    page = (out / "validate_arz.html").read_text()
    assert page.count("<img") == 7 and not re.search(r'(src|href)="(?!data:|#)', page)
    assert "FAILED" not in page and "5.44e-03 (5.44e-03)" in capsys.readouterr().out
    assert "vacuum, N 100: 9.47e-03 beside 8.55e-03" in val.worse_cases(result["riemann"])
    smooth, stability = saved["riemann"]["smooth"], saved["stability"]
    assert 0.85 < min(smooth["contact (v .4), godunov"]["orders"]) < 1
    assert 1.8 < min(smooth["contact (v .4), muscl"]["orders"]) < 1.92
    assert saved["riemann"]["cases"]["fan alone"]["muscl"]["orders"][0] > 0.9
    for c, known in (("0.5", 0.5571), ("1", 0.0), ("1.2", -0.3166)):
        assert stability["c"][c]["limit"] == pytest.approx(known, abs=1e-3)
    assert stability["threshold"] == pytest.approx(1, abs=0.01)
    models, best = saved["record"]["models"], saved["record"]["best"]
    alone = models["ARZ, no relaxation"]["second"]["E"]
    assert alone < 0.03 and alone < 0.3 * models["LWR"]["second"]["E"]
    assert models["LWR"]["second"]["E"] < models["mean of the first half"]["second"]["E"]
    assert models[best["ARZ"]]["first"]["E"] <= models["ARZ, no relaxation"]["first"]["E"]
    gap, low, high = saved["record"]["differences"]["error"]["gap"]
    assert 0 < low < gap < high


@pytest.mark.slow
@pytest.mark.skipif("NGSIM_US101" not in os.environ, reason="NGSIM_US101 names no record: it may not be redistributed")
def test_the_freeway(tmp_path):
    data = val.prepare(val.load_record(os.environ["NGSIM_US101"]), val.Args())
    first, last = data["cells"]
    assert 26 <= first <= 30 and 62 <= last <= 66  # between the on-ramp and the off-ramp
    checks = val.Checks()
    part = val.record_part(data, val.Args(quick=True), checks)
    assert checks.failed() == []
    models = {k: m["second"]["E"] for k, m in part["models"].items()}
    assert models["ARZ, no relaxation (diagram)"] == pytest.approx(0.1595, abs=0.002)
    assert models["LWR (diagram)"] == pytest.approx(0.1979, abs=0.002)
    assert models["straight line"] == pytest.approx(0.1417, abs=0.001)
    for name in val.MODELS:
        assert models[name] < 0.65 * models["mean of the first half"], name
    assert part["differences"]["diagram"]["gap"][1] > 0  # fitted to the diagram alone, ARZ is nearer
    assert sys.float_info.epsilon < part["models"]["LWR"]["max_cfl"] <= 0.9
