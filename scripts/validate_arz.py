"""Is the traffic of ppo_arz_gpu.py right? Exact solutions, linear theory and a real freeway.

    python scripts/validate_arz.py                     # no record: about a minute on one core
    python scripts/validate_arz.py --ngsim record.npz  # a freeway's record too, another minute
    python scripts/validate_arz.py --quick             # coarse grids and a short calibration

Three parts: (1) Riemann problems of p = C rho^gamma against exact cell averages, smooth waves,
conservation; (2) the growth rate of a small wave on the relaxed equilibrium against linear theory,
and the pressure at which it changes sign; (3) a record of density and speed: what its two ends saw
goes in, what the road between them did is predicted, by ARZ and by LWR, both calibrated on the
first half and scored on the second. Everything is computed by the functions of ppo_arz_gpu.py;
networks are in validate_signals.py. Writes validate_arz.html (one self-contained page) and
validate_arz.json. Exit code 1: a number of parts 1 and 2, or a ledger of part 3, is not what it
must be; which one is said. 2: bad flags or a broken record.

The record is a .npz: x_m (M,), t_s (T,) centres of equal cells and bins; density_veh_per_m,
speed_m_per_s, flow_veh_per_s (M, T).
"""

import math
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.run import CheckFailed, UsageError, answer_help, check, exit_with, parse_args  # noqa: E402

answer_help(__name__, __file__)

import numba as nb  # noqa: E402
import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from cleanrl_crypto import ppo_arz_gpu as arz  # noqa: E402
from cleanrl_crypto.ppo_arz_gpu import FIRST, OPEN, RING, SECOND, SUM  # noqa: E402
from common.timeout_guard import write_json_atomic  # noqa: E402
from scripts.report import CSS, CYCLE, GREY, INK, RC, Page, canvas, esc  # noqa: E402

PARTS = ("riemann", "stability", "record")
SCHEMES = {"godunov": (FIRST, 0.9), "muscl": (SECOND, 0.45)}  # order, Courant number
FAR = 1e30  # s, a relaxation that never ends
FLOOR = 1e-4  # veh/m, of the record's simulations
BLUE, ORANGE, GREEN, PURPLE = CYCLE[:4]

# (rho, v) left and right, gamma, time, and where they are known L1 errors of Godunov's rho at N = 100, 200, 400, 800
CASES = {
    "shock, contact": (
        (0.3, 0.6),
        (0.5, 0.2),
        1.0,
        0.5,
        (5.44e-3, 3.87e-3, 2.75e-3, 1.95e-3),
    ),
    "fan, contact": ((0.7, 0.2), (0.2, 0.6), 1.0, 0.5, (5.45e-3, 3.52e-3, 2.26e-3, 1.44e-3)),
    "contact": ((0.8, 0.3), (0.2, 0.3), 1.0, 0.8, (5.54e-2, 4.14e-2, 3.04e-2, 2.21e-2)),
    "vacuum": ((0.4, 0.2), (0.3, 0.9), 1.0, 0.4, (8.55e-3, 5.29e-3, 3.13e-3, 1.81e-3)),
    "stationary shock": ((0.2, 0.8), (0.8, 0.2), 1.0, 0.5, (0.0, 0.0, 0.0, 0.0)),
    "shock alone": ((0.3, 0.6), (0.7, 0.2), 1.0, 0.5, None),
    "fan alone": ((0.7, 0.2), (0.3, 0.6), 1.0, 0.5, None),
    "shock, contact, gamma 2": ((0.3, 0.6), (0.5, 0.2), 2.0, 0.5, None),
    "fan, contact, gamma 2": ((0.7, 0.2), (0.2, 0.6), 2.0, 0.5, None),
    "vacuum, gamma 2": ((0.4, 0.2), (0.3, 0.9), 2.0, 0.4, None),
}
# V = 1 - rho, p = c rho: growth rate of the first mode on a ring of length 1
RHO0, TAU, GROWTH = 0.5, 0.2, {0.5: 0.5571, 1.0: 0.0, 1.2: -0.3166}


@dataclass
class Args:
    out: Path = Path("runs/validate_arz")
    """folder for validate_arz.html and validate_arz.json"""
    figures: Path | None = None
    """write every plot as a PNG file into this folder too"""
    parts: tuple[str, ...] = PARTS
    """of riemann, stability, record (which needs --ngsim)"""
    ngsim: Path | None = None
    """the record (.npz)"""
    cells: tuple[int, int] | None = None
    """first and last cell used (None: the longest stretch that no ramp feeds, its ends cut)"""
    split: float = 0.5
    """share of the record, from its start, that is calibrated on"""
    end_metres: float = 24.0
    """m of the stretch that serve as a detector at each end; the cells between them are
    predicted"""
    block_metres: float = 24.0
    """m of a block on which model and record are compared"""
    block_seconds: float = 15.0
    """s of such a block"""
    warmup: float = 60.0
    """s not scored: the first state between the ends is a straight line, not data"""
    evaluations: int = 500
    """simulations of the first half that the calibration of a model may take"""
    quick: bool = False
    """coarse grids and a short calibration: shows that it runs"""

    def __post_init__(self):
        for part in self.parts:
            if part not in PARTS:
                raise UsageError(f"--parts {part}: must be one of {', '.join(PARTS)}")
        check(
            self,
            {},
            {
                (0.1, 0.9): "split",
                (0, 1e5): "end_metres block_metres block_seconds",
                (0, 1e6): "warmup",
                (1, 10**6): "evaluations",
            },
        )


# ----------------------------------------------------------------------------- 1. exact solutions
def riemann(left: tuple, right: tuple, gamma: float = 1.0, c: float = 1.0) -> dict:
    """Exact solution of a Riemann problem of the homogeneous ARZ equations, p = c rho^gamma (Aw
    and Rascle, 2000).

    left, right: (rho, v). A shock or fan of the first family joins left to the middle state
    (rho*, v*) of the same w, a contact at v* joins that to right; a faster leader than w leaves a
    vacuum. Returns the states, the speeds of the fan's edges (equal for a shock) and of the
    contact, and functions of s = x / t: density, speed, and mass, the integral of the density
    from the fan's first edge.
    """
    (rho_l, v_l), (rho_r, v_r) = left, right
    w = v_l + c * rho_l**gamma

    def density(p):
        return (np.maximum(p, 0.0) / c) ** (1 / gamma)

    v_m = v_r if rho_r > 0 else w  # an empty road takes whatever comes
    rho_m = float(density(w - v_m))
    v_m = min(v_m, w)
    if rho_m > rho_l:
        head = tail = (rho_m * v_m - rho_l * v_l) / (rho_m - rho_l)
        kind = "shock"
    else:
        head, tail = v_l - gamma * c * rho_l**gamma, v_m - gamma * c * rho_m**gamma
        kind = "fan" if head < tail else "none"
    contact = v_r if rho_r > 0 else v_m

    def in_fan(s):
        return density((w - s) / (gamma + 1))  # lambda_1 = w - (gamma + 1) p = s

    def below(s):
        return -c * gamma * in_fan(s) ** (gamma + 1)  # an antiderivative of in_fan

    def rho(s):
        s = np.asarray(s, float)
        wave = np.where(
            s < head, rho_l, np.where(s < tail, in_fan(np.clip(s, head, tail)), rho_m)
        )
        return np.where(s < contact, wave, rho_r)

    def speed(s):
        s = np.asarray(s, float)
        wave = np.where(
            s < head,
            v_l,
            np.where(s < tail, w - c * in_fan(np.clip(s, head, tail)) ** gamma, v_m),
        )
        return np.where(s < contact, wave, v_r)

    def mass(s):
        s = np.asarray(s, float)
        fan = below(np.clip(s, head, tail)) - below(head) if tail > head else 0.0
        return (
            rho_l * np.minimum(s - head, 0)
            + fan
            + rho_m * (np.clip(s, tail, contact) - tail)
            + rho_r * np.maximum(s - contact, 0)
        )

    return {
        "rho*": rho_m,
        "v*": v_m,
        "w": w,
        "kind": kind,
        "edges": (head, tail),
        "contact": contact,
        "rho": rho,
        "v": speed,
        "mass": mass,
        "vacuum": contact > w and rho_r > 0,
    }


def averages(mass, edges, t: float) -> np.ndarray:
    """Cell averages of the exact density at time t, the jump at .5; edges (N + 1,)."""
    return np.diff(mass((edges - 0.5) / t)) * t / np.diff(edges)


def law_of(c: float, gamma: float) -> tuple:
    """Law of the pressure c rho^gamma up to a density of 1 (see arz.pressure_of)."""
    return (c, gamma, 1.0) if gamma == 1 else (c, gamma, 1.0, 0.0)


class Lane:
    """One lane of a road for arz.advance; v_max = rho_max = 1."""

    def __init__(self, rho, v, dx: float, c=1.0, gamma=1.0, tau=FAR, cfl=0.9):
        rho, v = (np.asarray(x, float)[:, None] for x in (rho, v))
        self.u = np.stack([rho, rho * (v + c * rho**gamma)])
        self.work, self.lane = np.zeros((6, len(rho) + 8, 1)), np.zeros((len(arz.AT), 1))
        self.totals = np.zeros((len(SUM), 1))
        self.road, self.law = (dx, 1.0, 1.0, tau, 1e-13, cfl), law_of(c, gamma)

    def advance(self, seconds: float, order, end=OPEN):
        arz.advance(
            self.u,
            self.work,
            self.lane,
            self.totals,
            self.road,
            seconds,
            order,
            end,
            end,
            self.law,
        )

    def march(self, seconds: float, order, end=OPEN):
        """Every step the largest that the Courant number allows, the last one trimmed."""
        dx, cfl = self.road[0], self.road[5]
        speed, done = np.zeros(1), 0.0
        while seconds - done > 1e-12:
            arz.fastest_wave(self.u[0], self.u[1], speed, self.law)
            step = min(cfl * dx / speed[0], seconds - done)
            # a hair less: advance() would split a step whose Courant number rounds up
            self.advance(step * (1 - 1e-12), order, end)
            done += step


def run_case(name: str, n: int, scheme: str) -> dict:
    """One Riemann problem on n cells: errors and the final state beside the exact one."""
    left, right, gamma, t, _ = CASES[name]
    order, cfl = SCHEMES[scheme]
    edges = np.linspace(0, 1, n + 1)
    x = (edges[1:] + edges[:-1]) / 2
    rho, v = (np.where(x < 0.5, left[k], right[k]) for k in range(2))
    lane = Lane(rho, v, 1 / n, 1.0, gamma, cfl=cfl)
    lane.march(t, order)
    exact = riemann(left, right, gamma)
    u, want = lane.u[:, :, 0], averages(exact["mass"], edges, t)
    return {
        "x": x,
        "rho": u[0],
        "exact": want,
        "L1": float(np.abs(u[0] - want).mean()),
        "min_rho": float(u[0].min()),
        "max_cfl": float(lane.totals[SUM.max_cfl, 0]),
        "floor": float(lane.totals[SUM.added, 0]),
    }


def orders(errors) -> list[float]:
    """Orders between grids of doubled cells."""
    e = np.asarray(errors)
    return np.log2(e[:-1] / e[1:]).tolist()


def riemann_part(quick: bool, checks: list) -> dict:
    """Errors and orders of all cases with both schemes; the known ones are compared to the
    printed digits."""
    sizes = (100, 200) if quick else (100, 200, 400, 800)
    result = {"N": sizes, "cases": {}}
    for name, (left, right, gamma, t, known) in CASES.items():
        exact = riemann(left, right, gamma)
        flux = arz.flux_nb(*left, *right, law_of(1.0, gamma))
        at_jump = float(exact["rho"](0.0) * exact["v"](0.0))
        entry = {k: exact[k] for k in ("rho*", "v*", "kind", "edges", "contact", "vacuum")}
        entry |= {
            "flux": flux,
            "exact_flux": (at_jump, at_jump * exact["w"]),
            "t": t,
            "gamma": gamma,
        }
        gap = max(abs(a - b) for a, b in zip(flux, entry["exact_flux"]))
        checks.append((f"flux at the jump, {name}", gap, "< 1e-14", gap < 1e-14))
        for scheme in SCHEMES:
            runs = [run_case(name, n, scheme) for n in sizes]
            errors = [r["L1"] for r in runs]
            # a few 1e-16: the order of rounding errors says nothing
            entry[scheme] = {
                "L1": errors,
                "orders": orders(errors) if min(errors) > 1e-12 else [],
                "min_rho": min(r["min_rho"] for r in runs),
                "max_cfl": max(r["max_cfl"] for r in runs),
                "floor": max(r["floor"] for r in runs),
            }
            limit = SCHEMES[scheme][1]
            courant = entry[scheme]["max_cfl"]
            checks.append(
                (
                    f"Courant number, {name}, {scheme}",
                    courant,
                    f"<= {limit}",
                    courant <= limit * (1 + 1e-9),
                )
            )
            low = entry[scheme]["min_rho"]
            checks.append((f"smallest density, {name}, {scheme}", low, "> 0", low > 0))
        for n, error, want in zip(sizes, entry["godunov"]["L1"], known or ()):
            # one unit of the last printed digit
            unit = 10.0 ** (math.floor(math.log10(want)) - 2) if want else 1e-14
            checks.append(
                (
                    f"godunov's L1, {name}, N {n}",
                    error,
                    f"{want:.2e}" if want else "< 1e-14",
                    abs(error - want) <= unit,
                )
            )
        entry["known"] = known
        result["cases"][name] = entry
    return result | {"smooth": smooth_part(quick, checks)}


def contact_wave(edges, t: float):
    """Smooth contact: density carried at v .4 (ring), cell averages; exact w differs from place
    to place."""
    phase = 2 * np.pi * (edges - 0.4 * t)
    return 0.5 - 0.3 / (2 * np.pi) * np.diff(np.cos(phase)) / np.diff(edges)


def first_wave(edges, t: float):
    """Smooth wave of the first family, w .9 everywhere: rho keeps its value along x = x0 + (.9 -
    2 rho) t.

    Cell averages by five Gauss points a cell; Newton for x0. Before it breaks (t 1.6).
    """
    nodes, weights = np.polynomial.legendre.leggauss(5)
    x = (edges[:-1, None] + edges[1:, None]) / 2 + nodes * np.diff(edges)[:, None] / 2
    x0 = x.copy()
    for _ in range(50):
        rho = 0.3 + 0.05 * np.sin(2 * np.pi * x0)
        x0 -= (x0 + (0.9 - 2 * rho) * t - x) / (1 - 0.2 * np.pi * np.cos(2 * np.pi * x0) * t)
    return (0.3 + 0.05 * np.sin(2 * np.pi * x0)) @ weights / 2


SMOOTH = {  # exact averages, speed of cells of density rho, time
    "contact (v .4)": (contact_wave, lambda rho: 0 * rho + 0.4, 2.5),
    "first wave (w .9)": (first_wave, lambda rho: 0.9 - rho, 0.8),
}
BANDS = {"godunov": (0.8, 1.1), "muscl": (1.7, 2.1)}  # of the measured orders


def smooth_part(quick: bool, checks: list) -> dict:
    """Orders on smooth solutions of a ring at Courant number .4, and what the ring loses."""
    sizes = (50, 100, 200) if quick else (50, 100, 200, 400)
    result = {"N": sizes}
    for name, (solution, speed, t) in SMOOTH.items():
        for scheme, (order, _) in SCHEMES.items():
            errors, lost = [], 0.0
            for n in sizes:
                edges = np.linspace(0, 1, n + 1)
                rho = solution(edges, 0.0)
                lane = Lane(rho, speed(rho), 1 / n, cfl=0.4)
                before = lane.u.sum((1, 2))
                lane.march(t, order, RING)
                errors.append(float(np.abs(lane.u[0, :, 0] - solution(edges, t)).mean()))
                lost = max(lost, float(np.abs(lane.u.sum((1, 2)) / before - 1).max()))
            measured, (low, high) = orders(errors), BANDS[scheme]
            result[f"{name}, {scheme}"] = {"L1": errors, "orders": measured, "lost": lost}
            checks.append(
                (
                    f"orders, smooth {name}, {scheme}",
                    min(measured),
                    f"from {low} to {high}",
                    low < min(measured) and max(measured) < high,
                )
            )
            checks.append(
                (f"ring keeps rho and rho w, {name}, {scheme}", lost, "< 1e-14", lost < 1e-14)
            )
    return result


# ----------------------------------------------------------------------- 2. growth of small waves
def theory(c: float, mode: int = 1):
    """Eigenvalue of the faster growing perturbation e^(i k x) of the equilibrium and its (rho, v)
    shape.

    V = 1 - rho, p = c rho: stable iff p' >= -V', that is c >= 1 (Aw and Rascle; Seibold et al.
    2013).
    """
    k, v0 = 2j * np.pi * mode, 1 - RHO0
    values, vectors = np.linalg.eig(
        np.array([[-k * v0, -k * RHO0], [-1 / TAU, -k * (v0 - RHO0 * c) - 1 / TAU]])
    )
    best = int(np.argmax(values.real))
    return values[best], vectors[:, best] / vectors[0, best]


def growth(c: float, n: int) -> float:
    """Growth rate of the first mode on n cells, by the second-order scheme, amplitude 1e-4, from
    t 1 to t 2."""
    _, shape = theory(c)
    x = (np.arange(n) + 0.5) / n
    rho, v = (np.real(s * np.exp(2j * np.pi * x)) for s in shape)
    lane = Lane(RHO0 + 1e-4 * rho, 1 - RHO0 + 1e-4 * v, 1 / n, c=c, tau=TAU, cfl=0.4)
    sizes = []
    for _ in range(2):
        lane.march(1.0, SECOND, RING)
        sizes.append(abs(np.fft.rfft(lane.u[0, :, 0])[1]))
    return math.log(sizes[1] / sizes[0])


def extrapolated(rates) -> float:
    """The limit of rates on three grids of doubled cells (Aitken)."""
    a, b, c = rates[-3:]
    return c - (c - b) ** 2 / (c - 2 * b + a)


def stability_part(quick: bool, checks: list) -> dict:
    sizes = (50, 100, 200) if quick else (100, 200, 400)
    result = {"N": sizes, "c": {}}
    for c, known in GROWTH.items():
        rates = [growth(c, n) for n in sizes]
        limit, linear = extrapolated(rates), float(theory(c)[0].real)
        result["c"][f"{c:g}"] = {"rates": rates, "limit": limit, "theory": linear}
        checks.append(
            (
                f"linear theory's growth, c {c:g}",
                linear,
                f"{known}",
                abs(linear - known) < 1e-4,
            )
        )
        checks.append(
            (f"growth, c {c:g}", limit, f"{linear:.4f} +- .01", abs(limit - linear) < 0.01)
        )
    low, high, trail = 0.8, 1.2, []
    for _ in range(6 if quick else 11):
        c = (low + high) / 2
        rate = extrapolated([growth(c, n) for n in sizes])
        trail.append((c, rate))
        low, high = (c, high) if rate > 0 else (low, c)
    found = (low + high) / 2
    result |= {"threshold": found, "bracket": (low, high), "trail": trail}
    checks.append(("threshold of stability", found, "1 +- .01", abs(found - 1) < 0.01))
    return result


# -------------------------------------------------------------------------- 3. a freeway's record
KEYS = ("x_m", "t_s", "density_veh_per_m", "speed_m_per_s", "flow_veh_per_s")


def load_record(path: Path) -> dict:
    """The arrays of a record, float64. UsageError: one line with the file and the array, row (x)
    and column (t)."""
    if not Path(path).is_file():
        raise UsageError(
            f"{path}: no such file: name a record with --ngsim, or leave the flag out"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {k: file[k] for k in file.files}
    # a .npy file gives an array, which is no context manager: TypeError
    except (
        OSError,
        ValueError,
        EOFError,
        TypeError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as e:
        raise UsageError(
            f"{path}: not a readable .npz file ({' '.join(str(e).split()) or type(e).__name__})"
        ) from e
    for key in KEYS:
        if key not in data:
            raise UsageError(
                f"{path}: array {key} is missing; found {', '.join(data) or 'nothing'}"
            )
        if data[key].dtype.kind not in "fiu":
            raise UsageError(f"{path}: {key} holds {data[key].dtype}, not numbers")
        data[key] = data[key].astype(float)
    for key in KEYS[:2]:
        axis = data[key]
        if axis.ndim != 1 or len(axis) < 2:
            raise UsageError(
                f"{path}: {key} has shape {axis.shape}, not one axis of two or more"
            )
        step = np.diff(axis)
        bad = np.flatnonzero(~(np.abs(step - step[0]) <= 1e-3 * abs(step[0])) | ~(step > 0))
        if bad.size:
            raise UsageError(
                f"{path}: {key}, row {bad[0] + 1}: {axis[bad[0] + 1]:g} after {axis[bad[0]]:g}: must rise "
                "in equal steps"
            )
    shape = len(data["x_m"]), len(data["t_s"])
    for key in KEYS[2:]:
        values = data[key]
        if values.shape != shape:
            raise UsageError(
                f"{path}: {key} has shape {values.shape}, not {shape} as x_m and t_s say"
            )
        if key == "speed_m_per_s":  # nobody there, no speed
            values[np.isnan(values) & (data["density_veh_per_m"] == 0)] = 0.0
        bad = np.argwhere(~np.isfinite(values) | (values < 0))
        if len(bad):
            row, column = bad[0]
            raise UsageError(
                f"{path}: {key}, row {row} (x {data['x_m'][row]:g} m), column {column} "
                f"(t {data['t_s'][column]:g} s): {values[row, column]:g} must be finite and >= 0"
            )
    density, flow = data["density_veh_per_m"], data["flow_veh_per_s"]
    gap = np.abs(flow - density * data["speed_m_per_s"])
    if not np.median(gap) <= 0.05 * flow.mean():
        row, column = np.unravel_index(np.argmax(gap), gap.shape)
        raise UsageError(
            f"{path}: flow_veh_per_s is not density times speed (row {row}, column {column}: "
            f"{flow[row, column]:g} against {density[row, column] * data['speed_m_per_s'][row, column]:g})"
            ": units?"
        )
    if not density.mean() > FLOOR:
        raise UsageError(
            f"{path}: density_veh_per_m: mean {density.mean():g}: no traffic to predict"
        )
    return {
        "x": data["x_m"],
        "t": data["t_s"],
        "rho": density,
        "q": flow,
        "dx": float(np.diff(data["x_m"]).mean()),
        "dt": float(np.diff(data["t_s"]).mean()),
        "path": str(path),
    }


def conserved_flow(rho, q, dx: float, dt: float) -> np.ndarray:
    """Mean flow of every cell (M,) plus what was stored upstream of it, veh/s: one number along a
    road without ramps, however short the record. The flows alone spread by what a jam stores
    while it grows."""
    ends = max(1, min(round(60 / dt), rho.shape[1] // 4))
    change = (
        (rho[:, -ends:].mean(1) - rho[:, :ends].mean(1)) * dx / ((rho.shape[1] - ends) * dt)
    )
    return q.mean(1) + np.cumsum(change) - change / 2


def no_ramp(flow) -> tuple[int, int]:
    """First and last of the longest stretch of cells whose conserved flows (M,) agree within 2 %,
    a tenth cut at its ends: where a ramp joins, flow is gained over some metres."""
    best = 0, 0
    for i in range(len(flow)):
        j = i
        while j + 1 < len(flow) and np.ptp(flow[i : j + 2]) <= 0.02 * flow[i : j + 2].mean():
            j += 1
        best = (i, j) if j - i > best[1] - best[0] else best
    cut = round(0.1 * (best[1] - best[0]))
    return best[0] + cut, best[1] - cut


@nb.njit(
    error_model="numpy"
)  # not cached: a cache would not see a change of the functions it calls
def simulate(ends, bin_s, dx, refine, order, law, rest, lwr, cfl, out):
    """A road between two detectors. Fluxes, relaxation and update are the freeway's own pointwise
    functions.

    ends (2, 2, T): density (veh/m) and speed (m/s) of the detectors before and behind the road,
    in bins of bin_s s, used as states of the ghost cells, linear in time between the bins'
    centres; out (2, M, T): mean density and flow of cell and bin. M cells of dx m, each simulated
    as `refine`. law: w of the equilibrium v = w - p(rho), and the pressure as arz.pressure_nb
    takes it; rest: (v_max, rho_max, tau), v relaxes to Greenshields' speed, or with v_max 0 to
    the curve, that is w of any vehicle to w of the curve. lwr: every vehicle has the curve's w at
    all times. First state: a straight line from end to end. Returns vehicles at the start, in,
    out, at the end, added by the floor, largest Courant number.
    """
    w_eq, pressure = law
    v_max, rho_max, tau = rest
    goal = (
        pressure[0],
        pressure[1],
        rho_max,
        0.0,
    )  # the same law beside Greenshields' jam density
    level = (
        w_eq,
        1.0,
        1.0,
    )  # with p = V(0) - V, V + p is the same at every density: w relaxes to w_eq
    m, bins = out.shape[1] * refine, ends.shape[2]
    dx = dx / refine
    rho, z, rho1, z1, p = np.empty(m), np.empty(m), np.empty(m), np.empty(m), np.empty(m)
    r, v, f, g = np.empty(m + 4), np.empty(m + 4), np.empty(m + 1), np.empty(m + 1)
    for i in range(m):
        s = (i + 0.5) / m
        rho[i] = (1 - s) * ends[0, 0, 0] + s * ends[0, 1, 0]
        p[i] = arz.pressure_nb(rho[i], pressure)
        z[i] = rho[i] * (w_eq if lwr else (1 - s) * ends[1, 0, 0] + s * ends[1, 1, 0] + p[i])
    out[:] = 0.0
    first, entered, left, added, courant = rho.sum() * dx, 0.0, 0.0, 0.0, 0.0
    for k in range(bins):
        now = 0.0
        while now < bin_s:
            for e in range(2):
                at = min(max(k + now / bin_s - 0.5, 0.0), bins - 1.0)
                k0 = min(int(at), bins - 2)
                s, j = at - k0, e * (m + 2)
                r[j] = (1 - s) * ends[0, e, k0] + s * ends[0, e, k0 + 1]
                v[j] = (1 - s) * ends[1, e, k0] + s * ends[1, e, k0 + 1]
                if lwr:
                    v[j] = w_eq - arz.pressure_nb(r[j], pressure)
                r[j + 1], v[j + 1] = r[j], v[j]
            for i in range(m):
                r[i + 2], v[i + 2] = rho[i], z[i] / rho[i] - p[i]
            speed = 0.1
            for i in range(m + 4):
                back = arz.stiffness_nb(r[i], pressure) - v[i]
                speed = max(speed, abs(v[i]), back)
            # a tenth in hand: between a ghost and its neighbour a state can arise that is faster than both
            n = math.ceil((bin_s - now) * 1.1 * speed / (cfl * dx))
            step = (bin_s - now) / n
            courant = max(courant, speed * step / dx)
            keep = 0.0 if lwr else math.exp(-0.5 * step / tau)
            for half in range(2):
                if half == 1:
                    rho1[:], z1[:] = rho, z
                    for stage in range(len(order)):
                        for i in range(m):
                            r[i + 2], v[i + 2] = rho1[i], z1[i] / rho1[i] - p[i]
                        for i in range(m + 1):
                            f[i], g[i] = arz.face_nb(
                                r[i],
                                v[i],
                                r[i + 1],
                                v[i + 1],
                                r[i + 2],
                                v[i + 2],
                                r[i + 3],
                                v[i + 3],
                                order,
                                pressure,
                            )
                        entered += f[0] * step / len(order)
                        left += f[m] * step / len(order)
                        share = 1.0 if stage == 0 else 0.5
                        for i in range(m):
                            a, b, more = arz.update_nb(
                                rho1[i],
                                z1[i],
                                f[i],
                                g[i],
                                f[i + 1],
                                g[i + 1],
                                step / dx,
                                FLOOR,
                                w_eq,
                            )
                            rho1[i], z1[i] = (
                                rho[i] + share * (a - rho[i]),
                                z[i] + share * (b - z[i]),
                            )
                            p[i] = arz.pressure_nb(rho1[i], pressure)
                            added += more * dx / len(order)
                    rho[:], z[:] = rho1, z1
                for i in range(m):
                    if v_max > 0.0:
                        z[i] = arz.relax_nb(rho[i], z[i], keep, v_max, goal)
                    else:
                        z[i] = arz.relax_nb(rho[i], z[i], keep, w_eq, level)
            for i in range(m):
                share = step / bin_s / refine
                out[0, i // refine, k] += share * rho[i]
                out[1, i // refine, k] += share * (z[i] - rho[i] * p[i])
            now = bin_s if n == 1 else now + step
    return first, entered, left, rho.sum() * dx, added, courant


def prepare(record: dict, args: Args) -> dict:
    """Both halves of the stretch: detectors (2, 2, T), and density and flow between them (M, T)."""
    rho, q, dx, dt, path = (record[k] for k in ("rho", "q", "dx", "dt", "path"))
    total, bins = rho.shape
    cut = round(args.split * bins)
    a, b = args.cells or no_ramp(conserved_flow(rho[:, :cut], q[:, :cut], dx, dt))
    if not 0 <= a <= b < total:
        raise UsageError(f"--cells {a} {b}: {path} has cells 0 to {total - 1}")
    wide, block, span = (
        max(1, round(x / y))
        for x, y in ((args.end_metres, dx), (args.block_metres, dx), (args.block_seconds, dt))
    )
    warm = math.ceil(args.warmup / dt / span) * span
    inner = b - a + 1 - 2 * wide
    if inner < block:
        raise UsageError(
            f"{path}: cells {a} to {b} without {wide} at each end leave {inner} to predict, a block has "
            f"{block}: set --cells, --end-metres or --block-metres"
        )
    if inner < 3 * wide:
        print(
            f"{path}: {inner} cells between detectors of {wide}: too few to tell models apart",
            file=sys.stderr,
        )
    if min(cut, bins - cut) < warm + 4 * span:
        raise UsageError(
            f"{path}: {bins} bins of {dt:g} s give a half of {min(cut, bins - cut)}, --warmup and four "
            f"blocks of --block-seconds need {warm + 4 * span}"
        )
    halves = []
    for part in (slice(0, cut), slice(cut, bins)):
        r, f = rho[a : b + 1, part], q[a : b + 1, part]
        ends = np.stack([np.stack([x[:wide].mean(0), x[-wide:].mean(0)]) for x in (r, f)])
        # Edie: the speed of a stretch is its flow over its density; an empty detector takes the record's top speed
        top = float((q[rho > FLOOR] / rho[rho > FLOOR]).max())
        ends[1] = np.where(ends[0] > FLOOR, ends[1] / np.maximum(ends[0], FLOOR), top)
        ends[0] = np.maximum(ends[0], FLOOR)
        halves.append({"ends": ends, "rho": r[wide:-wide], "q": f[wide:-wide]})
    data = {
        "path": path,
        "halves": halves,
        "dx": dx,
        "dt": dt,
        "block": (block, span),
        "warm": warm,
        "cells": (a, b),
        "wide": wide,
    }
    rho_, v_ = blocks(halves[0]["rho"], halves[0]["q"], data)
    data["range"] = float(np.ptp(rho_)), float(np.nanmax(v_) - np.nanmin(v_))
    data["points"] = rho_.ravel(), v_.ravel()
    # speeds are calibrated at two densities that the record holds: far less correlated than w and C
    data["anchors"] = tuple(float(x) for x in np.quantile(rho_, (0.1, 0.9)))
    if not min(data["range"]) > 0 or not 0 < data["anchors"][0] < data["anchors"][1]:
        raise UsageError(
            f"{path}: density or speed of cells {a} to {b} is constant in the first part: nothing to fit"
        )
    return data


def blocks(rho, q, data) -> tuple[np.ndarray, np.ndarray]:
    """Density and speed (flow over density) of blocks of cells and bins; what does not fill a
    block is left out."""
    (n, k), m, t = data["block"], *rho.shape

    def mean(x):
        return x[: m // n * n, : t // k * k].reshape(m // n, n, t // k, k).mean((1, 3))

    rho, q = mean(rho), mean(q)
    return rho, np.where(rho > 0, q / np.maximum(rho, 1e-12), np.nan)


def errors(rho, q, half: dict, data: dict) -> dict:
    """Fan and Seibold's error of a field (M, T): E = mean of |rho - rho_data| / Delta rho + |v -
    v_data| / Delta v over space and time; Delta: the range of the data, here of the blocks of the
    calibration half."""
    w = data["warm"]
    (r0, v0), (r1, v1) = (
        blocks(a[:, w:], b[:, w:], data) for a, b in ((half["rho"], half["q"]), (rho, q))
    )
    e_rho, e_v = (
        np.abs(r1 - r0),
        np.nan_to_num(np.abs(v1 - v0)),
    )  # an empty block has no speed to miss
    (d_rho, d_v), mean = data["range"], (float(e_rho.mean()), float(e_v.mean()))
    return {
        "E": mean[0] / d_rho + mean[1] / d_v,
        "E_rho": mean[0] / d_rho,
        "E_v": mean[1] / d_v,
        "rho": mean[0],
        "v": mean[1],
        "series": e_rho.mean(0) / d_rho + e_v.mean(0) / d_v,
    }


def straight(half: dict) -> tuple[np.ndarray, np.ndarray]:
    """No model: density and speed on a straight line between the two detectors, bin by bin."""
    m = half["rho"].shape[0]
    s = ((np.arange(m) + 0.5) / m)[:, None]
    rho, v = ((1 - s) * x[0] + s * x[1] for x in half["ends"])
    return rho, rho * v


GAMMAS = (
    0.1,
    3.0,
)  # of the calibration; towards 0 the power law is the logarithm's, with an infinite w
# name -> (first-order, gamma is fitted, relaxes to, LWR's ends are given by: density or speed)
MODELS = {
    "LWR, Greenshields": (True, False, "curve", "density"),
    "LWR": (True, True, "curve", "density"),
    "LWR, ends by speed": (True, True, "curve", "speed"),
    "ARZ, no relaxation": (False, True, "never", "both"),
    "ARZ, relaxes to its curve": (False, True, "curve", "both"),
    "ARZ, relaxes to Greenshields": (False, True, "greenshields", "both"),
}


def unpack(name: str, x, anchors) -> tuple | None:
    """Calibrated numbers of a model -> (w, c, gamma), (v_max, rho_max, tau); None outside what
    makes sense.

    x: log v at the first anchor density, log of what it is more than at the second; log gamma;
    log tau; the same two of Greenshields' line. As many as the model has.
    """
    first, fitted, target, _ = MODELS[name]
    rest, (a, b) = list(x), anchors
    v, drop = math.exp(min(rest.pop(0), 50)), math.exp(min(rest.pop(0), 50))
    gamma = math.exp(min(rest.pop(0), 50)) if fitted else 1.0
    if not GAMMAS[0] <= gamma <= GAMMAS[1]:
        return None
    c = drop / (b**gamma - a**gamma)
    w, tau, line = v + c * a**gamma, 0.0 if first else FAR, (0.0, 1.0)
    if target != "never" and not first:
        tau = math.exp(min(rest.pop(0), 50))
    if target == "greenshields":
        v, drop = math.exp(min(rest.pop(0), 50)), math.exp(min(rest.pop(0), 50))
        slope = drop / (b - a)
        line = v + slope * a, (v + slope * a) / slope
    if not (
        w < 1e4
        and drop < 100
        and v < 100
        and line[1] > b
        and (tau in (0.0, FAR) or 1 <= tau <= 3600)
    ):
        return None
    return (w, c, gamma), (*line, tau)


def predict(
    name: str, params: tuple, half: dict, data: dict, refine: int = 1, scheme: str = "godunov"
):
    """Density and flow (M, T) between the detectors, and the run's ledger."""
    (w, c, gamma), rest = params
    ends, order, cfl = half["ends"], *SCHEMES[scheme]
    if MODELS[name][3] == "speed":  # the density whose equilibrium speed was seen
        p = np.maximum(w - ends[1], pressure(FLOOR, c, gamma))
        ends = np.stack([(p / c) ** (1 / gamma), ends[1]])
    out = np.empty((2, *half["rho"].shape))
    lwr = MODELS[name][0]
    law = w, (c, gamma, 1.0, 0.0)
    ledger = simulate(ends, data["dt"], data["dx"], refine, order, law, rest, lwr, cfl, out)
    return out[0], out[1], ledger


def pressure(rho, c: float, gamma: float):
    """arz.pressure_nb of the law power, for arrays."""
    return c * np.asarray(rho, float) ** gamma


def fitted_curve(points, gammas) -> tuple[float, float, float]:
    """(w, c, gamma): least squares of the flow rho (w - c rho^gamma), as Fan and Seibold fit
    their diagrams."""
    rho, q = points[0], points[0] * np.nan_to_num(points[1])
    best = None
    for gamma in gammas:
        columns = np.stack([rho, -(rho ** (1 + gamma))], 1)
        (w, c), *_ = np.linalg.lstsq(columns, q, rcond=None)
        miss = float(((columns @ (w, c) - q) ** 2).mean())
        if c > 0 and w > 0 and (best is None or miss < best[0]):
            best = miss, (float(w), float(c), float(gamma))
    if best is None:
        raise UsageError(
            "the record's first part shows no fall of speed with density: no fundamental diagram to fit"
        )
    return best[1]


def nelder_mead(
    loss: Callable, start, evaluations: int, size: float = 0.15
) -> tuple[np.ndarray, float]:
    """Downhill simplex (Nelder and Mead, 1965) without derivatives; (best point, its loss)."""
    points = np.array([start, *(np.asarray(start) + size * np.eye(len(start)))], float)
    values = np.array([loss(p) for p in points])
    used = len(points)
    while used < evaluations:
        order = np.argsort(values, kind="stable")
        points, values = points[order], values[order]
        if values[-1] - values[0] < 1e-7 and np.abs(points - points[0]).max() < 1e-5:
            break
        centre = points[:-1].mean(0)
        tries = [centre + k * (centre - points[-1]) for k in (1.0, 2.0, 0.5, -0.5)]
        first = loss(tries[0])
        k = (
            1
            if first < values[0]
            else 0
            if first < values[-2]
            else 2
            if first < values[-1]
            else 3
        )
        second, used = (loss(tries[k]) if k else first), used + 1 + (k > 0)
        if k == 1 and first <= second:
            k, second = 0, first
        if second < values[-1]:
            points[-1], values[-1] = tries[k], second
        else:
            points[1:] = (points[0] + points[1:]) / 2
            values[1:] = [loss(p) for p in points[1:]]
            used += len(points) - 1
    best = int(np.argmin(values))
    return points[best], float(values[best])


def calibrate(name: str, data: dict, evaluations: int) -> tuple[np.ndarray, dict]:
    """The model's numbers of least E on the first half, from starts of several curvatures;
    (numbers, how it went)."""
    half, anchors = data["halves"][0], data["anchors"]
    first, fitted, target, _ = MODELS[name]

    def loss(x):
        params = unpack(name, x, anchors)
        if params is None:
            return 1e3
        rho, q, _ = predict(name, params, half, data)
        value = errors(rho, q, half, data)["E"]
        return value if math.isfinite(value) else 1e3

    def logs(curve):
        return [
            math.log(max(x, 0.1))
            for x in (
                curve[0] - pressure(anchors[0], *curve[1:]),
                float(np.ptp(pressure(anchors, *curve[1:]))),
            )
        ]

    line = fitted_curve(data["points"], (1.0,))
    best, tried = None, []
    for gamma in (0.2, 0.5, 1.0) if fitted else (1.0,):
        curve = fitted_curve(data["points"], (gamma,))
        start = logs(curve) + ([math.log(gamma)] if fitted else [])
        start += [math.log(30.0)] * (target != "never" and not first) + logs(line) * (
            target == "greenshields"
        )
        x, value = nelder_mead(loss, start, evaluations // 5)
        tried.append(value)
        best = (x, value) if best is None or value < best[1] else best
    for size in (0.1, 0.03):  # a simplex that has collapsed gets a second chance
        best = nelder_mead(loss, best[0], evaluations // 5, size)
    return best[0], {"starts": tried}


def difference(one, other, length: int = 8, draws: int = 2000) -> tuple[float, float, float]:
    """Mean of one - other, two series of blocks in time, and its 95 % interval: bootstrap of runs
    of `length` blocks, joined at the ends (circular), for what is wrong now is wrong in the next
    block too."""
    gap = np.asarray(one) - np.asarray(other)
    starts = np.random.default_rng(0).integers(0, len(gap), (draws, -(-len(gap) // length)))
    rows = (starts[:, :, None] + np.arange(length)).reshape(draws, -1)[:, : len(gap)] % len(
        gap
    )
    low, high = np.quantile(gap[rows].mean(1), (0.025, 0.975))
    return float(gap.mean()), float(low), float(high)


def record_part(data: dict, args: Args, checks: list) -> dict:
    """Calibrates on the first half, scores on the second; straight line and mean state beside the
    models."""
    first, second = data["halves"]
    evaluations = min(args.evaluations, 50) if args.quick else args.evaluations
    power = fitted_curve(data["points"], np.geomspace(*GAMMAS, 60))
    line = fitted_curve(data["points"], (1.0,))
    rows, fields = {}, {}

    def add(name, rho_q, params=None, how="", ledger=None, more=None):
        scores = [
            errors(*fields_, half, data) for fields_, half in zip(rho_q, (first, second))
        ]
        series = scores[1].pop("series")
        scores[0].pop("series")
        rows[name] = {
            "first": scores[0],
            "second": scores[1],
            "params": params,
            "calibrated": how,
        } | (more or {})
        fields[name] = {"rho": rho_q[1][0], "q": rho_q[1][1], "series": series}
        if ledger:
            start, into, out, end, added, courant = np.array(ledger).T
            error = float(np.max(np.abs(start + into + added - out - end) / (start + into)))
            rows[name] |= {
                "mass_error": error,
                "floor_veh": float(added.sum()),
                "max_cfl": float(courant.max()),
            }
            checks.append((f"vehicles conserved, {name}", error, "< 1e-12", error < 1e-12))
            checks.append(
                (
                    f"Courant number, {name}",
                    float(courant.max()),
                    "<= 0.9",
                    courant.max() <= 0.9,
                )
            )

    add("straight line", [straight(h) for h in (first, second)])
    rho_, v_ = data["points"][0].mean(), float(np.nanmean(data["points"][1]))
    add(
        "mean of the first half",
        [(0 * h["rho"] + rho_, 0 * h["rho"] + rho_ * v_) for h in (first, second)],
    )
    for name, (lwr, fitted, target, _) in MODELS.items():
        # where v relaxes to Greenshields' speed no w is anybody's goal
        used = (
            ("C", "gamma", "v_max", "rho_max")
            if target == "greenshields"
            else ("w", "C", "gamma")
        )
        used += () if lwr or target == "never" else ("tau",)

        def named(p, used=used):
            return {
                k: v
                for k, v in zip(
                    ("w", "C", "gamma", "v_max", "rho_max", "tau"), (*p[0], *p[1])
                )
                if k in used
            }

        if target != "greenshields" and (
            lwr or target == "never"
        ):  # without tau: the diagram says it all
            params = (power if fitted else line), (0.0, 1.0, 0.0 if lwr else FAR)
            runs = [predict(name, params, h, data) for h in (first, second)]
            add(
                f"{name} (diagram)",
                [r[:2] for r in runs],
                named(params),
                "diagram",
                [r[2] for r in runs],
            )
        x, how = calibrate(name, data, evaluations)
        params = unpack(name, x, data["anchors"])
        runs = [predict(name, params, h, data) for h in (first, second)]
        finer = errors(
            *predict(name, params, second, data, refine=2 if args.quick else 4)[:2],
            second,
            data,
        )["E"]
        muscl = errors(
            *predict(name, params, second, data, scheme="muscl")[:2], second, data
        )["E"]
        add(
            name,
            [r[:2] for r in runs],
            named(params),
            "error",
            [r[2] for r in runs],
            {"E_finer": finer, "E_muscl": muscl, "starts": how["starts"]},
        )
    # each family's choice is made on the first half too: the second is looked at once
    best = {
        kind: min(
            (n for n in rows if n.startswith(kind)), key=lambda n: rows[n]["first"]["E"]
        )
        for kind in ("LWR", "ARZ")
    }
    pairs = {
        "diagram": ("LWR (diagram)", "ARZ, no relaxation (diagram)"),
        "error": (best["LWR"], best["ARZ"]),
        "straight line": ("straight line", best["ARZ"]),
    }
    gaps = {
        k: {"one": a, "other": b, "gap": difference(fields[a]["series"], fields[b]["series"])}
        for k, (a, b) in pairs.items()
    }
    fine = all(math.isfinite(r["second"]["E"]) for r in rows.values())
    checks.append(("every error of the record is finite", float(fine), "1", fine))
    return {
        "record": {
            "path": data["path"],
            "cells": data["cells"],
            "end_cells": data["wide"],
            "predicted_cells": first["rho"].shape[0],
            "bins": [h["rho"].shape[1] for h in (first, second)],
            "dx": data["dx"],
            "dt": data["dt"],
            "block": data["block"],
            "warm_bins": data["warm"],
        },
        "range": data["range"],
        "diagram": {"power": power, "greenshields": line},
        "models": rows,
        "best": best,
        "differences": gaps,
        "plots": {"data": data, "fields": fields},
    }


# -------------------------------------------------------------------------------- tables and page
UNITS = {"w": "m/s", "C": "", "gamma": "", "v_max": "m/s", "rho_max": "veh/m", "tau": "s"}


def words(params: dict | None) -> str:
    return ", ".join(f"{k} {v:.4g} {UNITS[k]}".strip() for k, v in (params or {}).items())


def worse_cases(part: dict) -> list[str]:
    """Cases and grids on which muscl's error is the larger one."""
    pairs = (
        (name, n, a, b)
        for name, e in part["cases"].items()
        if not e["known"] or e["known"][0]
        for n, a, b in zip(part["N"], e["godunov"]["L1"], e["muscl"]["L1"])
    )
    return [f"{name}, N {n}: {b:.2e} beside {a:.2e}" for name, n, a, b in pairs if b > a]


def tables(result: dict) -> dict[str, tuple]:
    """anchor -> (title, headings, rows of text, sentence below), in reading order."""
    out = {}
    if "riemann" in result:
        part, rows = result["riemann"], []
        for name, e in part["cases"].items():
            for scheme in SCHEMES:
                known = e["known"] if scheme == "godunov" else None
                cells = [
                    f"{x:.2e}" + (f" ({k:.2e})" if known else "")
                    for x, k in zip(e[scheme]["L1"], known or part["N"])
                ]
                rows.append(
                    [name, scheme, *cells, " ".join(f"{x:.2f}" for x in e[scheme]["orders"])]
                )
        out["riemann"] = (
            "Riemann problems: L1 error of the density (known value)",
            ["case", "scheme", *(f"N {n}" for n in part["N"]), "orders"],
            rows,
            "Order 1/2 at a contact is right for the first-order scheme, 2/3 for the second; about 1 at "
            "a shock and, up to a logarithm, in a fan. The second order is not better everywhere: "
            + (", ".join(worse_cases(part)) or "here it is")
            + ".",
        )
        rows = [
            [
                k,
                *(f"{x:.2e}" for x in e["L1"]),
                " ".join(f"{x:.2f}" for x in e["orders"]),
                f"{e['lost']:.1e}",
            ]
            for k, e in part["smooth"].items()
            if k != "N"
        ]
        out["smooth"] = (
            "Smooth solutions on a ring: L1 error of the density",
            ["solution", *(f"N {n}" for n in part["smooth"]["N"]), "orders", "lost"],
            rows,
            "lost: the largest relative change of vehicles and of rho w on the ring.",
        )
    if "stability" in result:
        part = result["stability"]
        rows = [
            [
                c,
                *(f"{x:+.4f}" for x in e["rates"]),
                f"{e['limit']:+.4f}",
                f"{e['theory']:+.4f}",
            ]
            for c, e in part["c"].items()
        ]
        out["stability"] = (
            "Growth rate of the first mode, p = c rho, V = 1 - rho, rho .5, tau .2, length 1",
            ["c", *(f"N {n}" for n in part["N"]), "limit", "linear theory"],
            rows,
            f"Bisected on the extrapolated rate, it changes sign at c = {part['threshold']:.4f}; theory: 1.",
        )
    if "record" in result:
        part, rows = result["record"], []
        for name, e in part["models"].items():
            a, b = e["first"], e["second"]
            rows.append(
                [
                    name,
                    f"{a['E']:.4f}",
                    f"{b['E']:.4f}",
                    f"{b['E_rho']:.4f}",
                    f"{b['E_v']:.4f}",
                    f"{b['rho']:.4f}",
                    f"{b['v']:.3f}",
                    words(e["params"]),
                ]
            )
        r = part["record"]
        out["record"] = (
            f"{Path(r['path']).name}: cells {r['cells'][0]} to {r['cells'][1]}, {r['end_cells']} at each end given, "
            f"{r['predicted_cells']} predicted",
            [
                "model",
                "E, first half",
                "E, second half",
                "density's",
                "speed's",
                "veh/m",
                "m/s",
                "numbers",
            ],
            rows,
            verdict(part),
        )
    return out


def verdict(part: dict) -> str:
    """Which model is nearer to the second half, and by how much."""
    text = []
    for how, pair in part["differences"].items():
        gap, low, high = pair["gap"]
        who = (
            f"{pair['other']} is nearer"
            if low > 0
            else f"{pair['one']} is nearer"
            if high < 0
            else "no difference that this record can show"
        )
        text.append(
            {
                "diagram": "Fitted to the fundamental diagram alone, ARZ without relaxation: ",
                "error": "Calibrated on the first half's error, each family's best there: ",
                "straight line": "No model against ARZ: ",
            }[how]
            + f"E of {pair['one']} minus E of {pair['other']} {gap:+.4f} (95 % interval {low:+.4f} to "
            f"{high:+.4f}): {who}."
        )
    return " ".join(text)


def draw_case(name: str):
    fig, (ax,) = canvas(4.6, 2.4, top=0.3)
    for scheme, color in zip(SCHEMES, (ORANGE, BLUE)):
        run = run_case(name, 100, scheme)
        ax.plot(run["x"], run["rho"], ".", ms=3, color=color, label=scheme)
    left, right, gamma, t, _ = CASES[name]
    x = np.linspace(0, 1, 2001)
    ax.plot(
        x, riemann(left, right, gamma)["rho"]((x - 0.5) / t), color=INK, lw=0.9, label="exact"
    )
    ax.set_ylabel("density")
    ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.2))
    return fig


def draw_errors(part: dict):
    fig, (ax,) = canvas(4.6, 3.6, top=0.75)
    for i, name in enumerate(("shock alone", "fan alone", "contact", "vacuum")):
        for scheme, dash in zip(SCHEMES, ("--", "-")):
            ax.loglog(
                part["N"],
                part["cases"][name][scheme]["L1"],
                dash,
                color=CYCLE[i],
                marker="o",
                ms=3,
                label=f"{name}, {scheme}",
            )
    for i, (name, e) in enumerate(
        (k, e) for k, e in part["smooth"].items() if k.startswith("first wave")
    ):
        ax.loglog(
            part["smooth"]["N"],
            e["L1"],
            ("--", "-")[i],
            color=CYCLE[4],
            marker="s",
            ms=3,
            label=name,
        )
    sizes = sorted({*part["N"], *part["smooth"]["N"]})
    ax.set_xticks(sizes, sizes)
    ax.xaxis.set_minor_formatter("")
    ax.yaxis.set_major_formatter("{x:.0e}")
    ax.set_xlabel("cells")
    ax.set_ylabel("L1 error of the density")
    ax.legend(fontsize=6, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.25))
    return fig


def draw_growth(part: dict):
    fig, (ax,) = canvas(4.6, 3.6)
    c = np.linspace(0.4, 1.4, 101)
    ax.plot(c, [theory(x)[0].real for x in c], color=INK, lw=0.9, label="linear theory")
    points = [(float(k), e["limit"]) for k, e in part["c"].items()] + part["trail"]
    ax.plot(*zip(*points), "o", ms=4, color=BLUE, label="measured (N to infinity)")
    ax.axhline(0, color=GREY, lw=1)
    ax.axvline(
        part["threshold"],
        color=ORANGE,
        lw=1,
        ls="--",
        label=f"threshold {part['threshold']:.4f}",
    )
    ax.set_xlabel("c of the pressure c rho")
    ax.set_ylabel("growth rate of the first mode")
    ax.legend()
    return fig


def draw_diagram(part: dict):
    fig, (ax,) = canvas(4.6, 3.6)
    rho, v = part["plots"]["data"]["points"]
    ax.plot(rho, rho * v, ".", ms=2, color="#a3acb9", label="blocks of the first half")
    x = np.linspace(1e-3, float(rho.max()), 200)
    curves = [
        ("power, least squares", part["diagram"]["power"], INK),
        ("Greenshields, least squares", part["diagram"]["greenshields"], GREEN),
    ]
    best = part["models"][part["best"]["LWR"]]["params"]
    curves.append((part["best"]["LWR"], (best["w"], best["C"], best["gamma"]), ORANGE))
    for label, (w, c, gamma), color in curves:
        ax.plot(x, np.maximum(x * (w - pressure(x, c, gamma)), 0), color=color, label=label)
    ax.set_xlabel("density, veh/m")
    ax.set_ylabel("flow, veh/s")
    ax.legend(fontsize=7)
    return fig


def draw_scores(part: dict):
    names = list(part["models"])
    fig, (ax,) = canvas(4.6, 3.6, left=1.9)
    for half, color, shift in (("first", "#a3acb9", 0.2), ("second", BLUE, -0.2)):
        ax.barh(
            np.arange(len(names))[::-1] + shift,
            [part["models"][n][half]["E"] for n in names],
            0.36,
            color=color,
            label=f"{half} half",
        )
    ax.set_yticks(np.arange(len(names))[::-1], names, fontsize=6.5)
    ax.set_xlabel("E")
    ax.legend()
    return fig


def draw_maps(part: dict):
    """Speed over time and space of the second half: the record, and the models chosen on the
    first."""
    data, fields = part["plots"]["data"], part["plots"]["fields"]
    half = data["halves"][1]
    shown = {
        "record": half,
        **{n: fields[n] for n in (part["best"]["ARZ"], part["best"]["LWR"], "straight line")},
    }
    fig, axes = canvas(9.6, 7.4, len(shown), right=0.9, top=0.3, sharex=True)
    for ax, (name, field_) in zip(axes, shown.items()):
        _, v = blocks(field_["rho"], field_["q"], data)
        extent = (
            0,
            half["rho"].shape[1] * data["dt"] / 60,
            0,
            half["rho"].shape[0] * data["dx"],
        )
        image = ax.imshow(
            v,
            aspect="auto",
            origin="lower",
            extent=extent,
            cmap="RdYlBu",
            vmin=0,
            vmax=float(np.nanmax(data["points"][1])),
        )
        ax.set_title(name, fontsize=8, loc="left", pad=2)
        ax.set_ylabel("m")
        ax.grid(False)
    axes[-1].set_xlabel("minutes of the second half")
    fig.subplots_adjust(hspace=0.3)
    fig.colorbar(image, ax=list(axes), label="speed, m/s", fraction=0.02, pad=0.02)
    return fig


def draw_series(part: dict):
    """Speed in the middle of the predicted stretch."""
    data, fields = part["plots"]["data"], part["plots"]["fields"]
    fig, (ax,) = canvas(9.6, 2.8, top=0.3)
    half = data["halves"][1]
    chosen = {
        "record": (half, INK),
        part["best"]["ARZ"]: (fields[part["best"]["ARZ"]], BLUE),
        part["best"]["LWR"]: (fields[part["best"]["LWR"]], ORANGE),
    }
    for name, (field_, color) in chosen.items():
        _, v = blocks(field_["rho"], field_["q"], data)
        t = (np.arange(v.shape[1]) + 0.5) * data["block"][1] * data["dt"] / 60
        ax.plot(
            t,
            v[v.shape[0] // 2],
            color=color,
            lw=1.4 if name == "record" else 1.0,
            label=name,
        )
    ax.set_xlabel("minutes of the second half")
    ax.set_ylabel("speed, m/s")
    ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.14))
    return fig


def html_table(headings, rows) -> str:
    head = "".join(f"<th>{esc(h)}</th>" for h in headings)
    cell = (
        '<td style="white-space:normal;min-width:190px">{}</td>'
        if headings[-1] == "numbers"
        else "<td>{}</td>"
    )
    body = "".join(
        f"<tr><th>{esc(r[0])}</th>"
        + "".join(f"<td>{esc(x)}</td>" for x in r[1:-1])
        + cell.format(esc(r[-1]))
        + "</tr>"
        for r in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def build_page(result: dict, shown: dict) -> tuple[str, dict]:
    """The self-contained page, and its figures by name."""
    import matplotlib

    page = Page()
    failed = [c for c in result["checks"] if not c[3]]
    state = f"{len(result['checks']) - len(failed)} of {len(result['checks'])} checks passed"
    page.add(
        f'<h1>Aw-Rascle-Zhang kernels: validation</h1><div class="chips"><span class="chip '
        f'{"bad" if failed else "good"}">{state}</span></div>'
    )
    page.add(f"<pre>{esc(result['command'])}</pre><!--nav-->")
    plots = {
        "riemann": [
            ("errors", "Errors and grids", draw_errors, "Dashed: godunov, solid: muscl.")
        ],
        "stability": [
            (
                "growth",
                "Growth of small waves",
                draw_growth,
                "Measured points lie on the line.",
            )
        ],
        "record": [
            (
                "diagram",
                "Fundamental diagram",
                draw_diagram,
                "One dot a block; the curves were fitted.",
            ),
            (
                "scores",
                "Errors",
                draw_scores,
                "Shorter is better; only the second half counts.",
            ),
        ],
    }
    with matplotlib.rc_context(RC):
        for anchor, (title, headings, rows, sentence) in shown.items():
            page.section(anchor, title)
            page.add(
                html_table(headings, rows)
                + f'<p class="note">{esc(sentence)}</p><div class="grid">'
            )
            if anchor == "riemann":
                for name in list(CASES)[:5]:
                    page.plot(
                        name,
                        name,
                        draw_case(name),
                        f"t {CASES[name][3]}, 100 cells.",
                        f"density of the case {name}: both schemes and the exact solution",
                    )
            for key, heading, draw, caption in plots.get(anchor, ()):
                page.plot(key, heading, draw(result[anchor]), caption, heading)
            if anchor == "record":
                page.plot(
                    "maps",
                    "Speed",
                    draw_maps(result["record"]),
                    "Red is slow. Waves run down and to the right: upstream.",
                    "speed over time and space: record and models",
                    wide=True,
                )
                page.plot(
                    "series",
                    "Speed in the middle",
                    draw_series(result["record"]),
                    "Far from both detectors, where a prediction is hardest.",
                    "speed over time",
                    wide=True,
                )
            page.add("</div>")
        page.section("checks", "Checks")
        page.add(
            html_table(
                ["check", "found", "must be", ""],
                [
                    [n, f"{v:.6g}", w, "ok" if ok else "FAILED"]
                    for n, v, w, ok in result["checks"]
                ],
            )
        )
    nav = "".join(f'<a href="#{a}">{esc(t)}</a>' for a, t in page.sections)
    body = "\n".join(page.parts).replace("<!--nav-->", f"<nav>{nav}</nav>", 1)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        "<title>Aw-Rascle-Zhang: validation</title>\n"
        f'<meta name="viewport" content="width=device-width,initial-scale=1">\n<style>{CSS}</style></head>\n'
        f"<body><main>\n{body}\n</main></body></html>\n"
    ), page.figures


def main(argv: list[str] | None = None) -> dict:
    """What validate_arz.json holds; raises CheckFailed with every check that failed, after
    writing."""
    args, given = parse_args(Args, argv)
    if args.ngsim is None and "record" in args.parts:
        if "parts" in given:
            raise UsageError("--parts record needs --ngsim, the record")
        args.parts = PARTS[:2]
    began, checks, console = time.perf_counter(), [], Console(width=170)
    flags = map(str, sys.argv[1:] if argv is None else argv)
    result = {
        "command": " ".join(["python scripts/validate_arz.py", *flags]),
        "quick": args.quick,
    }
    # refused before minutes of work, not after
    data = prepare(load_record(args.ngsim), args) if "record" in args.parts else None
    args.out.mkdir(parents=True, exist_ok=True)
    runs = {
        "riemann": partial(riemann_part, args.quick),
        "stability": partial(stability_part, args.quick),
        "record": partial(record_part, data, args),
    }
    for name in (p for p in PARTS if p in args.parts):
        console.print(f"{name} ...")
        result[name] = runs[name](checks)
    shown = tables(result)
    for title, headings, rows, sentence in shown.values():
        table = Table(title=title)
        for i, heading in enumerate(headings):
            table.add_column(heading, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print(sentence + "\n")
    result["checks"] = [(n, float(v), w, bool(ok)) for n, v, w, ok in checks]
    result["failed"] = [n for n, _, _, ok in checks if not ok]
    page, figures = build_page(result, shown)
    result.get("record", {}).pop("plots", None)
    result["seconds"] = time.perf_counter() - began
    (args.out / "validate_arz.html.tmp").write_text(page, encoding="utf-8")
    (args.out / "validate_arz.html.tmp").replace(args.out / "validate_arz.html")
    write_json_atomic(result, args.out / "validate_arz.json")
    if args.figures:
        args.figures.mkdir(parents=True, exist_ok=True)
        for name, fig in figures.items():
            fig.savefig(args.figures / f"{name}.png", dpi=130)
    console.print(
        f"{len(checks) - len(result['failed'])} of {len(checks)} checks passed, {result['seconds']:.0f} s; "
        f"{args.out}: validate_arz.html, validate_arz.json"
    )
    if result["failed"]:
        raise CheckFailed(
            f"{len(result['failed'])} checks failed: {'; '.join(result['failed'])}"
        )
    return result | {"exit_code": 0}


if __name__ == "__main__":
    exit_with(main)
