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

from common.run import (  # noqa: E402
    CheckFailed,
    UsageError,
    answer_help,
    check,
    exit_with,
    parse_args,
    refuse,
)

answer_help(__name__, __file__)

import numba as nb  # noqa: E402
import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from scipy.optimize import minimize  # noqa: E402

from cleanrl_crypto import ppo_arz_gpu as arz  # noqa: E402
from cleanrl_crypto.ppo_arz_gpu import FIRST, OPEN, RING, SECOND, SUM  # noqa: E402
from common.timeout_guard import write_json_atomic  # noqa: E402
from scripts.report import CYCLE, INK, RC, Page, canvas, esc, write_figures  # noqa: E402

PARTS = ("riemann", "stability", "record")
SCHEMES = {"godunov": (FIRST, 0.9), "muscl": (SECOND, 0.45)}  # order, Courant number
FAR = 1e30  # s, a relaxation that never ends
FLOOR = 1e-4  # veh/m, of the record's simulations
BLUE, ORANGE, GREEN = CYCLE[:3]

# (rho, v) left and right, gamma, time, and where they are known L1 errors of Godunov's rho at
# N = 100, 200, 400, 800
CASES = {
    "shock, contact": (
        (0.3, 0.6),
        (0.5, 0.2),
        1.0,
        0.5,
        (5.44e-3, 3.87e-3, 2.75e-3, 1.95e-3),
    ),
    "fan, contact": (
        (0.7, 0.2),
        (0.2, 0.6),
        1.0,
        0.5,
        (5.45e-3, 3.52e-3, 2.26e-3, 1.44e-3),
    ),
    "contact": (
        (0.8, 0.3),
        (0.2, 0.3),
        1.0,
        0.8,
        (5.54e-2, 4.14e-2, 3.04e-2, 2.21e-2),
    ),
    "vacuum": (
        (0.4, 0.2),
        (0.3, 0.9),
        1.0,
        0.4,
        (8.55e-3, 5.29e-3, 3.13e-3, 1.81e-3),
    ),
    "stationary shock": ((0.2, 0.8), (0.8, 0.2), 1.0, 0.5, (0.0, 0.0, 0.0, 0.0)),
    "shock alone": ((0.3, 0.6), (0.7, 0.2), 1.0, 0.5, None),
    "fan alone": ((0.7, 0.2), (0.3, 0.6), 1.0, 0.5, None),
    "shock, contact, gamma 2": ((0.3, 0.6), (0.5, 0.2), 2.0, 0.5, None),
    "fan, contact, gamma 2": ((0.7, 0.2), (0.2, 0.6), 2.0, 0.5, None),
    "vacuum, gamma 2": ((0.4, 0.2), (0.3, 0.9), 2.0, 0.4, None),
}
# V = 1 - rho, p = c rho: growth rate of the first mode on a ring of length 1
RHO0, TAU = 0.5, 0.2
GROWTH = {0.5: 0.5571, 1.0: 0.0, 1.2: -0.3166}


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
            known = ", ".join(PARTS)
            refuse((part not in PARTS, f"--parts {part}: must be one of {known}"))
        ranges = {
            (0.1, 0.9): "split",
            (0, 1e5): "end_metres block_metres block_seconds",
            (0, 1e6): "warmup",
            (1, 10**6): "evaluations",
        }
        check(self, {}, ranges)


class Checks(list):
    """What was checked: (name, number found, what it must be, whether it is)."""

    def add(self, name: str, found, must: str, good):
        self.append((name, float(found), must, bool(good)))

    def below(self, name: str, found, limit: float):
        self.add(name, found, f"< {limit:g}", found < limit)

    def courant(self, name: str, found, limit: float):
        self.add(f"Courant number, {name}", found, f"<= {limit:g}", found <= limit * (1 + 1e-9))

    def near(self, name: str, found, want: float, margin: float):
        self.add(name, found, f"{want:.4g} +- {margin:.0e}", abs(found - want) <= margin)

    def failed(self) -> list[str]:
        return [name for name, _, _, good in self if not good]


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
        head = v_l - gamma * c * rho_l**gamma
        tail = v_m - gamma * c * rho_m**gamma
        kind = "fan" if head < tail else "none"
    contact = v_r if rho_r > 0 else v_m

    def in_fan(s):
        s = np.clip(s, head, tail)
        return density((w - s) / (gamma + 1))  # lambda_1 = w - (gamma + 1) p = s

    def below(s):
        return -c * gamma * in_fan(s) ** (gamma + 1)  # an antiderivative of in_fan

    def profile(s, before, within, behind, after):
        wave = np.where(s < tail, within, behind)
        wave = np.where(s < head, before, wave)
        return np.where(s < contact, wave, after)

    def rho(s):
        return profile(s, rho_l, in_fan(s), rho_m, rho_r)

    def speed(s):
        within = w - c * in_fan(s) ** gamma
        return profile(s, v_l, within, v_m, v_r)

    def mass(s):
        fan = below(s) - below(head) if tail > head else 0.0
        before = rho_l * np.minimum(s - head, 0)
        behind = rho_m * (np.clip(s, tail, contact) - tail)
        return before + fan + behind + rho_r * np.maximum(s - contact, 0)

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
    integral = mass((edges - 0.5) / t) * t
    return np.diff(integral) / np.diff(edges)


def law_of(c: float, gamma: float) -> tuple:
    """Law of the pressure c rho^gamma up to a density of 1 (see arz.pressure_of)."""
    return (c, gamma, 1.0) if gamma == 1 else (c, gamma, 1.0, 0.0)


class Lane:
    """One lane of a road for arz.advance; v_max = rho_max = 1."""

    def __init__(self, rho, v, dx: float, c=1.0, gamma=1.0, tau=FAR, cfl=0.9):
        rho = np.array(rho)[:, None]
        v = np.array(v)[:, None]
        n = len(rho)
        w = v + c * rho**gamma
        z = rho * w
        self.u = np.stack([rho, z])
        self.work = np.zeros((6, n + 8, 1))
        self.lane = np.zeros((len(arz.AT), 1))
        self.totals = np.zeros((len(SUM), 1))
        # the floor must add nothing that the checks of conservation could see
        v_max = rho_max = 1.0
        floor = 1e-13
        self.road = dx, v_max, rho_max, tau, floor, cfl
        self.law = law_of(c, gamma)

    def advance(self, seconds: float, order, end=OPEN):
        lane = self.u, self.work, self.lane, self.totals, self.road
        arz.advance(*lane, seconds, order, end, end, self.law)

    def march(self, seconds: float, order, end=OPEN):
        """Every step the largest that the Courant number allows, the last one trimmed."""
        dx, *_, cfl = self.road
        speed = np.zeros(1)
        done = 0.0
        while seconds - done > 1e-12:
            rho, z = self.u
            arz.fastest_wave(rho, z, speed, self.law)
            longest = cfl * dx / speed[0]
            step = min(longest, seconds - done)
            # a hair less: advance() would split a step whose Courant number rounds up
            self.advance(step * (1 - 1e-12), order, end)
            done += step


def run_case(name: str, n: int, scheme: str) -> dict:
    """One Riemann problem on n cells: errors and the final state beside the exact one."""
    left, right, gamma, t, _ = CASES[name]
    order, cfl = SCHEMES[scheme]
    edges = np.linspace(0, 1, n + 1)
    x = (edges[1:] + edges[:-1]) / 2
    before = x < 0.5
    (rho_l, v_l), (rho_r, v_r) = left, right
    rho = np.where(before, rho_l, rho_r)
    v = np.where(before, v_l, v_r)
    lane = Lane(rho, v, 1 / n, 1.0, gamma, cfl=cfl)
    lane.march(t, order)
    mass = riemann(left, right, gamma)["mass"]
    exact = averages(mass, edges, t)
    rho = lane.u[0, :, 0]
    error = np.abs(rho - exact)
    totals = lane.totals[:, 0]
    return {
        "x": x,
        "rho": rho,
        "L1": float(error.mean()),
        "min_rho": float(rho.min()),
        "max_cfl": float(totals[SUM.max_cfl]),
        "floor": float(totals[SUM.added]),
    }


def orders(errors) -> list[float]:
    """Orders between grids of doubled cells."""
    e = np.asarray(errors)
    return np.log2(e[:-1] / e[1:]).tolist()


def riemann_part(quick: bool, checks: Checks) -> dict:
    """Errors and orders of all cases with both schemes; the known ones to the printed digits."""
    sizes = (100, 200) if quick else (100, 200, 400, 800)
    result = {"N": sizes, "cases": {}}
    for name, (left, right, gamma, _, known) in CASES.items():
        exact = riemann(left, right, gamma)
        flux = arz.flux_nb(*left, *right, law_of(1.0, gamma))
        # Godunov's flux is the exact solution's at x / t = 0
        rho = exact["rho"](0.0)
        speed = exact["v"](0.0)
        at_jump = float(rho * speed)
        exact_flux = at_jump, at_jump * exact["w"]
        facts = "rho*", "v*", "kind", "edges", "contact", "vacuum"
        entry = {k: exact[k] for k in facts}
        entry["flux"] = flux
        entry["exact_flux"] = exact_flux
        gap = np.subtract(flux, exact_flux)
        gap = np.abs(gap).max()
        checks.below(f"flux at the jump, {name}", gap, 1e-14)
        for scheme, (_, limit) in SCHEMES.items():
            runs = [run_case(name, n, scheme) for n in sizes]
            errors = [r["L1"] for r in runs]
            low = min(r["min_rho"] for r in runs)
            courant = max(r["max_cfl"] for r in runs)
            # a few 1e-16: the order of rounding errors says nothing
            entry[scheme] = {
                "L1": errors,
                "orders": orders(errors) if min(errors) > 1e-12 else [],
                "min_rho": low,
                "max_cfl": courant,
                "floor": max(r["floor"] for r in runs),
            }
            checks.courant(f"{name}, {scheme}", courant, limit)
            checks.add(f"smallest density, {name}, {scheme}", low, "> 0", low > 0)
        errors = entry["godunov"]["L1"]
        for n, error, want in zip(sizes, errors, known or ()):
            # one unit of the last printed digit
            digits = 14
            if want:
                digits = 2 - math.floor(math.log10(want))
            unit = 10.0**-digits
            checks.near(f"godunov's L1, {name}, N {n}", error, want, unit)
        entry["known"] = known
        result["cases"][name] = entry
    return result | {"smooth": smooth_part(quick, checks)}


def contact_wave(edges, t: float):
    """Smooth contact: density carried at v .4 (ring), cell averages; exact w differs from place
    to place."""
    phase = 2 * np.pi * (edges - 0.4 * t)
    slope = np.diff(np.cos(phase)) / np.diff(edges)
    return 0.5 - 0.3 / (2 * np.pi) * slope


def first_wave(edges, t: float):
    """Smooth wave of the first family, w .9 everywhere: rho keeps its value along x = x0 + (.9 -
    2 rho) t.

    Cell averages by five Gauss points a cell; Newton for x0. Before it breaks (t 1.6).
    """
    nodes, weights = np.polynomial.legendre.leggauss(5)
    centres = (edges[:-1] + edges[1:]) / 2
    half = np.diff(edges)[:, None] / 2
    x = centres[:, None] + nodes * half
    x0 = x.copy()
    for _ in range(50):
        rho = 0.3 + 0.05 * np.sin(2 * np.pi * x0)
        miss = x0 + (0.9 - 2 * rho) * t - x
        slope = 1 - 0.2 * np.pi * np.cos(2 * np.pi * x0) * t
        x0 -= miss / slope
    rho = 0.3 + 0.05 * np.sin(2 * np.pi * x0)
    return rho @ weights / 2


SMOOTH = {  # exact averages, speed of cells of density rho, time
    "contact (v .4)": (contact_wave, lambda rho: 0 * rho + 0.4, 2.5),
    "first wave (w .9)": (first_wave, lambda rho: 0.9 - rho, 0.8),
}
BANDS = {"godunov": (0.8, 1.1), "muscl": (1.7, 2.1)}  # of the measured orders


def smooth_part(quick: bool, checks: Checks) -> dict:
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
                exact = solution(edges, t)
                gap = np.abs(lane.u[0, :, 0] - exact)
                errors.append(float(gap.mean()))
                after = lane.u.sum((1, 2))
                change = np.abs(after / before - 1)
                lost = max(lost, float(change.max()))
            case = f"{name}, {scheme}"
            measured = orders(errors)
            result[case] = {"L1": errors, "orders": measured, "lost": lost}
            low, high = BANDS[scheme]
            least = min(measured)
            good = low < least and max(measured) < high
            must = f"from {low} to {high}"
            checks.add(f"orders, smooth {case}", least, must, good)
            checks.below(f"ring keeps rho and rho w, {case}", lost, 1e-14)
    return result


# ----------------------------------------------------------------------- 2. growth of small waves
def theory(c: float, mode: int = 1):
    """Eigenvalue of the faster growing perturbation e^(i k x) of the equilibrium and its (rho, v)
    shape.

    V = 1 - rho, p = c rho: stable iff p' >= -V', that is c >= 1 (Aw and Rascle; Seibold et al.
    2013).
    """
    k = 2j * np.pi * mode
    v0 = 1 - RHO0
    back = v0 - RHO0 * c  # lambda_1
    rate = 1 / TAU
    of_rho = [-k * v0, -k * RHO0]
    of_v = [-rate, -k * back - rate]
    matrix = np.array([of_rho, of_v])
    values, vectors = np.linalg.eig(matrix)
    best = int(np.argmax(values.real))
    shape = vectors[:, best]
    return values[best], shape / shape[0]


def growth(c: float, n: int) -> float:
    """Growth rate of the first mode on n cells, by the second-order scheme, amplitude 1e-4, from
    t 1 to t 2."""
    _, shape = theory(c)
    x = (np.arange(n) + 0.5) / n
    wave = np.exp(2j * np.pi * x)
    of_rho, of_v = shape
    rho = RHO0 + 1e-4 * np.real(of_rho * wave)
    v = 1 - RHO0 + 1e-4 * np.real(of_v * wave)
    lane = Lane(rho, v, 1 / n, c=c, tau=TAU, cfl=0.4)
    sizes = []
    for _ in range(2):
        lane.march(1.0, SECOND, RING)
        rho = lane.u[0, :, 0]
        modes = np.fft.rfft(rho)
        sizes.append(abs(modes[1]))
    at_1, at_2 = sizes
    return math.log(at_2 / at_1)


def extrapolated(rates) -> float:
    """The limit of rates on three grids of doubled cells (Aitken)."""
    a, b, c = rates[-3:]
    return c - (c - b) ** 2 / (c - 2 * b + a)


def stability_part(quick: bool, checks: Checks) -> dict:
    sizes = (50, 100, 200) if quick else (100, 200, 400)
    result = {"N": sizes, "c": {}}
    for c, known in GROWTH.items():
        rates = [growth(c, n) for n in sizes]
        limit = extrapolated(rates)
        value, _ = theory(c)
        linear = float(value.real)
        row = {"rates": rates, "limit": limit, "theory": linear}
        result["c"][f"{c:g}"] = row
        checks.near(f"linear theory's growth, c {c:g}", linear, known, 1e-4)
        checks.near(f"growth, c {c:g}", limit, linear, 0.01)
    # bisection: small waves grow below the threshold, and die out above it
    low, high = 0.8, 1.2
    trail = []
    for _ in range(6 if quick else 11):
        c = (low + high) / 2
        rate = extrapolated([growth(c, n) for n in sizes])
        trail.append((c, rate))
        if rate > 0:
            low = c
        else:
            high = c
    found = (low + high) / 2
    result |= {"threshold": found, "bracket": (low, high), "trail": trail}
    checks.near("threshold of stability", found, 1, 0.01)
    return result


# -------------------------------------------------------------------------- 3. a freeway's record
KEYS = ("x_m", "t_s", "density_veh_per_m", "speed_m_per_s", "flow_veh_per_s")
BROKEN = zipfile.BadZipFile, zlib.error  # a file cut short, a bit that fell over


def load_record(path: Path) -> dict:
    """The arrays of a record, float64. UsageError: one line with the file and the array, row (x)
    and column (t)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {k: file[k] for k in file.files}
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    # a .npy file gives an array, which is no context manager: TypeError
    except (OSError, ValueError, EOFError, TypeError, RuntimeError, *BROKEN) as e:
        why = " ".join(str(e).split()) or type(e).__name__
        raise UsageError(f"{path}: not a readable .npz file ({why})") from e
    for key in KEYS:
        found = ", ".join(data) or "nothing"
        refuse((key not in data, f"{path}: array {key} is missing; found {found}"))
        kind = data[key].dtype
        refuse((kind.kind not in "fiu", f"{path}: {key} holds {kind}, not numbers"))
        data[key] = data[key].astype(float)
    for key in KEYS[:2]:
        check_axis(f"{path}: {key}", data[key])
    x, t, density, speed, flow = (data[key] for key in KEYS)
    shape = len(x), len(t)
    for key in KEYS[2:]:
        values = data[key]
        why = f"{path}: {key} has shape {values.shape}, not {shape} as x_m and t_s say"
        refuse((values.shape != shape, why))
        if values is speed:  # nobody there, no speed
            speed[np.isnan(speed) & (density == 0)] = 0.0
        wrong = ~np.isfinite(values) | (values < 0)
        for row, column in np.argwhere(wrong):
            place = f"row {row} (x {x[row]:g} m), column {column} (t {t[column]:g} s)"
            value = f"{values[row, column]:g}"
            raise UsageError(f"{path}: {key}, {place}: {value} must be finite and >= 0")
    gap = np.abs(flow - density * speed)
    if not np.median(gap) <= 0.05 * flow.mean():
        row, column = np.unravel_index(np.argmax(gap), gap.shape)
        product = density[row, column] * speed[row, column]
        place = f"row {row}, column {column}: {flow[row, column]:g} against {product:g}"
        raise UsageError(f"{path}: flow_veh_per_s is not density times speed ({place}): units?")
    mean = density.mean()
    why = f"{path}: density_veh_per_m: mean {mean:g}: no traffic to predict"
    refuse((not mean > FLOOR, why))
    return {
        "rho": density,
        "q": flow,
        "dx": float(np.diff(x).mean()),
        "dt": float(np.diff(t).mean()),
        "path": str(path),
    }


def check_axis(what: str, axis: np.ndarray):
    flat = axis.ndim == 1 and len(axis) >= 2
    refuse((not flat, f"{what} has shape {axis.shape}, not one axis of two or more"))
    step = np.diff(axis)
    equal = np.abs(step - step[0]) <= 1e-3 * abs(step[0])
    for k in np.flatnonzero(~equal | ~(step > 0)):
        why = f"{axis[k + 1]:g} after {axis[k]:g}: must rise in equal steps"
        raise UsageError(f"{what}, row {k + 1}: {why}")


def conserved_flow(rho, q, dx: float, dt: float) -> np.ndarray:
    """Mean flow of every cell (M,) plus what was stored upstream of it, veh/s: one number along a
    road without ramps, however short the record. The flows alone spread by what a jam stores
    while it grows."""
    bins = rho.shape[1]
    n = max(1, min(round(60 / dt), bins // 4))
    before = rho[:, :n].mean(1)
    after = rho[:, -n:].mean(1)
    change = after - before
    change *= dx / ((bins - n) * dt)
    return q.mean(1) + np.cumsum(change) - change / 2


def no_ramp(flow) -> tuple[int, int]:
    """First and last of the longest stretch of cells whose conserved flows (M,) agree within 2 %,
    a tenth cut at its ends: where a ramp joins, flow is gained over some metres."""
    first = last = 0
    for i in range(len(flow)):
        for j in range(i + last - first + 1, len(flow)):
            stretch = flow[i : j + 1]
            if np.ptp(stretch) > 0.02 * stretch.mean():
                break
            first, last = i, j
    cut = round(0.1 * (last - first))
    return first + cut, last - cut


# not cached: a cache would not see a change of the functions they call
jit = nb.njit(error_model="numpy")


@jit
def detectors(ends, at, lwr, w_eq, pressure, r, v):
    """What the detectors saw `at` bins from the start, as states of two ghost cells at each end."""
    last = ends.shape[2] - 1
    k = min(int(at), last - 1)
    s = at - k
    now = ends[:, :, k]
    later = ends[:, :, k + 1]
    for e in range(2):
        j = e * (r.shape[0] - 2)
        rho = (1 - s) * now[0, e] + s * later[0, e]
        speed = (1 - s) * now[1, e] + s * later[1, e]
        if lwr:
            speed = w_eq - arz.pressure_nb(rho, pressure)
        r[j : j + 2] = rho
        v[j : j + 2] = speed


@jit
def fastest(r, v, pressure) -> float:
    speed = 0.1
    for i in range(r.shape[0]):
        back = arz.stiffness_nb(r[i, 0], pressure) - v[i, 0]
        speed = max(speed, abs(v[i, 0]), back)
    return speed


@jit
def simulate(ends, bin_s, dx, refine, order, law, rest, lwr, cfl, out):
    """A road between two detectors, by the freeway's own functions on one lane.

    ends (2, 2, T): density (veh/m) and speed (m/s) of the detectors before and behind the road,
    in bins of bin_s s, linear in time between the bins' centres; out (2, M, T): mean density and
    flow of cell and bin. M cells of dx m, each simulated as `refine`. law: w of the equilibrium
    v = w - p(rho), and the pressure as arz.pressure_nb takes it; rest: (v_max, rho_max, tau), v
    relaxes to Greenshields' speed, or with v_max 0 to the curve, that is w of any vehicle to w of
    the curve. lwr: every vehicle has the curve's w at all times. First state: a straight line
    from end to end. Returns vehicles at the start, in, out, at the end, added by the floor,
    largest Courant number.
    """
    w_eq, pressure = law
    v_max, rho_max, tau = rest
    # the same law beside Greenshields' jam density
    goal = pressure[0], pressure[1], rho_max, 0.0
    # with p = V(0) - V, V + p is the same at every density: w relaxes to w_eq
    level = w_eq, 1.0, 1.0
    m = out.shape[1] * refine
    bins = ends.shape[2]
    dx = dx / refine
    stages = len(order)
    rho = np.empty((m, 1))
    z = np.empty((m, 1))
    half_rho = np.empty((m, 1))
    half_z = np.empty((m, 1))
    r = np.empty((m + 4, 1))
    v = np.empty((m + 4, 1))
    f = np.empty((m + 1, 1))
    g = np.empty((m + 1, 1))
    a = np.zeros(1)
    keep = np.zeros(1)
    added = np.zeros(1)

    # the first state
    start = ends[:, :, 0]
    for i in range(m):
        s = (i + 0.5) / m
        rho[i] = (1 - s) * start[0, 0] + s * start[0, 1]
        p = arz.pressure_nb(rho[i, 0], pressure)
        speed = (1 - s) * start[1, 0] + s * start[1, 1]
        w = w_eq if lwr else speed + p
        z[i] = rho[i] * w
    out[:] = 0.0
    first = rho.sum() * dx
    entered = 0.0
    left = 0.0
    courant = 0.0
    for k in range(bins):
        now = 0.0
        while now < bin_s:
            # steps that end with the bin
            at = max(k + now / bin_s - 0.5, 0.0)
            at = min(at, bins - 1.0)
            arz.primitives(rho, z, r, v, OPEN, pressure)
            detectors(ends, at, lwr, w_eq, pressure, r, v)
            speed = fastest(r, v, pressure)
            rest_s = bin_s - now
            # a tenth in hand: between a ghost and its neighbour a state can arise that is faster
            n = math.ceil(rest_s * 1.1 * speed / (cfl * dx))
            step = rest_s / n
            courant = max(courant, speed * step / dx)
            a[0] = step / dx
            keep[0] = 0.0
            if not lwr:
                keep[0] = math.exp(-0.5 * step / tau)
            # half of the relaxation before the transport, half after it (Strang)
            for half in range(2):
                if half == 1:
                    half_rho[:] = rho
                    half_z[:] = z
                    for _ in order:
                        arz.primitives(half_rho, half_z, r, v, OPEN, pressure)
                        detectors(ends, at, lwr, w_eq, pressure, r, v)
                        arz.faces(r, v, f, g, order, pressure)
                        entered += f[0, 0] * step / stages
                        left += f[m, 0] * step / stages
                        cells = half_rho, half_z
                        arz.update(*cells, f, g, a, *cells, added, FLOOR, w_eq)
                    if stages == 1:
                        rho[:] = half_rho
                        z[:] = half_z
                    else:
                        arz.go_half_way(rho, half_rho)
                        arz.go_half_way(z, half_z)
                if v_max > 0.0:
                    arz.relax(rho, z, keep, v_max, goal)
                else:
                    arz.relax(rho, z, keep, w_eq, level)
            share = step / bin_s / refine
            for i in range(m):
                cell = i // refine
                here = rho[i, 0]
                p = arz.pressure_nb(here, pressure)
                flow = z[i, 0] - here * p
                out[0, cell, k] += share * here
                out[1, cell, k] += share * flow
            now = bin_s if n == 1 else now + step
    last = rho.sum() * dx
    added_veh = added[0] * dx / stages
    return first, entered, left, last, added_veh, courant


def prepare(record: dict, args: Args) -> dict:
    """Both halves of the stretch: detectors (2, 2, T), and density and flow between them (M, T)."""
    rho, q = record["rho"], record["q"]
    dx, dt = record["dx"], record["dt"]
    path = record["path"]
    total, bins = rho.shape
    cut = round(args.split * bins)
    a, b = args.cells or (0, 0)
    if args.cells is None:
        # of the first half: the second is scored, and nothing is chosen by it
        flow = conserved_flow(rho[:, :cut], q[:, :cut], dx, dt)
        a, b = no_ramp(flow)
    outside = not 0 <= a <= b < total
    refuse((outside, f"--cells {a} {b}: {path} has cells 0 to {total - 1}"))
    wide = max(1, round(args.end_metres / dx))
    block = max(1, round(args.block_metres / dx))
    span = max(1, round(args.block_seconds / dt))
    warm = math.ceil(args.warmup / dt / span) * span
    inner = b - a + 1 - 2 * wide
    shorter = min(cut, bins - cut)
    need = warm + 4 * span
    refuse(
        (
            inner < block,
            f"{path}: cells {a} to {b} without {wide} at each end leave {inner} to predict, "
            f"a block has {block}: set --cells, --end-metres or --block-metres",
        ),
        (
            shorter < need,
            f"{path}: {bins} bins of {dt:g} s give a half of {shorter}, --warmup and four blocks "
            f"of --block-seconds need {need}",
        ),
    )
    if inner < 3 * wide:
        why = f"{inner} cells between detectors of {wide}: too few to tell models apart"
        print(f"{path}: {why}", file=sys.stderr)
    halves = []
    # Edie: a stretch's speed is its flow over its density; nobody there: the record's top speed
    held = rho > FLOOR
    top = float((q[held] / rho[held]).max())
    stretch = slice(a, b + 1)
    inside = slice(wide, -wide)
    both = slice(0, wide), slice(-wide, None)
    for part in (slice(0, cut), slice(cut, bins)):
        r = rho[stretch, part]
        f = q[stretch, part]
        density = np.stack([r[end].mean(0) for end in both])
        flow = np.stack([f[end].mean(0) for end in both])
        empty = density <= FLOOR
        density = np.maximum(density, FLOOR)
        speed = np.where(empty, top, flow / density)
        ends = np.stack([density, speed])  # (2, 2, T)
        half = {"ends": ends, "rho": r[inside], "q": f[inside]}
        halves.append(half)
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
    first = halves[0]
    density, speed = blocks(first["rho"], first["q"], data)
    spread = np.nanmax(speed) - np.nanmin(speed)
    data["range"] = float(np.ptp(density)), float(spread)
    data["points"] = density.ravel(), speed.ravel()
    # speeds are calibrated at two densities that the record holds: far less correlated than w and C
    low, high = np.quantile(density, (0.1, 0.9)).tolist()
    data["anchors"] = low, high
    constant = not min(data["range"]) > 0
    flat = constant or not 0 < low < high
    why = f"density or speed of cells {a} to {b} is constant in the first part: nothing to fit"
    refuse((flat, f"{path}: {why}"))
    return data


def blocks(rho, q, data) -> tuple[np.ndarray, np.ndarray]:
    """Density and speed (flow over density) of blocks of cells and bins; what does not fill a
    block is left out."""
    n, k = data["block"]
    m, t = rho.shape
    rows, columns = m // n, t // k

    def mean(x):
        x = x[: rows * n, : columns * k]
        parts = x.reshape(rows, n, columns, k)
        return parts.mean((1, 3))

    rho = mean(rho)
    q = mean(q)
    v = q / np.maximum(rho, 1e-12)
    v[~(rho > 0)] = np.nan
    return rho, v


def errors(rho, q, half: dict, data: dict) -> dict:
    """Fan and Seibold's error of a field (M, T): E = mean of |rho - rho_data| / Delta rho + |v -
    v_data| / Delta v over space and time; Delta: the range of the data, here of the blocks of the
    calibration half."""
    scored = np.s_[:, data["warm"] :]
    r0, v0 = blocks(half["rho"][scored], half["q"][scored], data)
    r1, v1 = blocks(rho[scored], q[scored], data)
    e_rho = np.abs(r1 - r0)
    e_v = np.abs(v1 - v0)
    e_v = np.nan_to_num(e_v)  # an empty block has no speed to miss
    d_rho, d_v = data["range"]
    rho = float(e_rho.mean())
    v = float(e_v.mean())
    of_rho = rho / d_rho
    of_v = v / d_v
    return {
        "E": of_rho + of_v,
        "E_rho": of_rho,
        "E_v": of_v,
        "rho": rho,
        "v": v,
        "series": e_rho.mean(0) / d_rho + e_v.mean(0) / d_v,
    }


def straight(half: dict) -> tuple[np.ndarray, np.ndarray]:
    """No model: density and speed on a straight line between the two detectors, bin by bin."""
    m = len(half["rho"])
    s = (np.arange(m) + 0.5) / m
    s = s[:, None]
    density, speed = half["ends"]
    rho = (1 - s) * density[0] + s * density[1]
    v = (1 - s) * speed[0] + s * speed[1]
    return rho, rho * v


GAMMAS = 0.1, 3.0  # of the calibration; towards 0 the power law is the logarithm's, w infinite
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
    rest = [math.exp(min(number, 50)) for number in x]
    a, b = anchors
    v = rest.pop(0)
    drop = rest.pop(0)
    gamma = rest.pop(0) if fitted else 1.0
    if not GAMMAS[0] <= gamma <= GAMMAS[1]:
        return None
    c = drop / (b**gamma - a**gamma)
    w = v + c * a**gamma
    tau, line = 0.0 if first else FAR, (0.0, 1.0)
    if target != "never" and not first:
        tau = rest.pop(0)
    if target == "greenshields":
        v, drop = rest
        slope = drop / (b - a)
        v_max = v + slope * a
        line = v_max, v_max / slope
    sound = w < 1e4 and drop < 100 and v < 100 and line[1] > b
    if not sound or not (tau in (0.0, FAR) or 1 <= tau <= 3600):
        return None
    return (w, c, gamma), (*line, tau)


def predict(
    name: str,
    params: tuple,
    half: dict,
    data: dict,
    refine: int = 1,
    scheme: str = "godunov",
):
    """Density and flow (M, T) between the detectors, and the run's ledger."""
    (w, c, gamma), rest = params
    lwr, _, _, given = MODELS[name]
    order, cfl = SCHEMES[scheme]
    ends = half["ends"]
    if given == "speed":  # the density whose equilibrium speed was seen
        speed = ends[1]
        p = np.maximum(w - speed, pressure(FLOOR, c, gamma))
        density = (p / c) ** (1 / gamma)
        ends = np.stack([density, speed])
    shape = half["rho"].shape
    out = np.empty((2, *shape))
    law = w, (c, gamma, 1.0, 0.0)
    dt, dx = data["dt"], data["dx"]
    ledger = simulate(ends, dt, dx, refine, order, law, rest, lwr, cfl, out)
    rho, q = out
    return rho, q, ledger


def pressure(rho, c: float, gamma: float):
    """arz.pressure_nb of the law power, for arrays."""
    return c * np.asarray(rho, float) ** gamma


def fitted_curve(points, gammas) -> tuple[float, float, float]:
    """(w, c, gamma): least squares of the flow rho (w - c rho^gamma), as Fan and Seibold fit
    their diagrams."""
    rho, v = points
    q = rho * np.nan_to_num(v)
    best, least_miss = None, math.inf
    for gamma in gammas:
        fall = rho ** (1 + gamma)
        columns = np.stack([rho, -fall], 1)
        (w, c), *_ = np.linalg.lstsq(columns, q, rcond=None)
        miss = columns @ (w, c) - q
        miss = float((miss**2).mean())
        better = best is None or miss < least_miss
        if c > 0 and w > 0 and better:
            best = float(w), float(c), float(gamma)
            least_miss = miss
    why = "the record's first part shows no fall of speed with density"
    refuse((best is None, f"{why}: no fundamental diagram to fit"))
    return best


def least(loss: Callable, start, evaluations: int, size: float = 0.15) -> tuple:
    """Downhill simplex without derivatives; (best point, its loss)."""
    axes = np.eye(len(start))
    corners = np.asarray(start) + size * axes
    options = {
        "initial_simplex": np.vstack([start, corners]),
        "maxfev": evaluations,
        "xatol": 1e-5,
        "fatol": 1e-7,
    }
    found = minimize(loss, start, method="Nelder-Mead", options=options)
    return found.x, found.fun


def calibrate(name: str, data: dict, evaluations: int) -> tuple:
    """The model of least E on the first half, from starts of several curvatures."""
    half = data["halves"][0]
    anchors = data["anchors"]
    first, fitted, target, _ = MODELS[name]
    share = evaluations // 5  # three starts at most, and two restarts

    def loss(x):
        params = unpack(name, x, anchors)
        if params is None:
            return 1e3
        rho, q, _ = predict(name, params, half, data)
        value = errors(rho, q, half, data)["E"]
        if math.isfinite(value):
            return value
        return 1e3

    def logs(curve):
        w, *law = curve
        low, high = pressure(anchors, *law)
        speeds = np.maximum([w - low, high - low], 0.1)
        return np.log(speeds).tolist()

    best = None
    gammas = (0.2, 0.5, 1.0) if fitted else (1.0,)
    for gamma in gammas:
        curve = fitted_curve(data["points"], (gamma,))
        start = logs(curve)
        if fitted:
            start.append(math.log(gamma))
        if target != "never" and not first:
            start.append(math.log(30.0))
        if target == "greenshields":
            line = fitted_curve(data["points"], (1.0,))
            start += logs(line)
        found = least(loss, start, share)
        if best is None or found[1] < best[1]:
            best = found
    for size in (0.1, 0.03):  # a simplex that has collapsed gets a second chance
        best = least(loss, best[0], share, size)
    return unpack(name, best[0], anchors)


def difference(one, other, length: int = 8, draws: int = 2000) -> tuple[float, float, float]:
    """Mean of one - other, two series of blocks in time, and its 95 % interval: bootstrap of runs
    of `length` blocks, joined at the ends (circular), for what is wrong now is wrong in the next
    block too."""
    gap = np.asarray(one) - np.asarray(other)
    n = len(gap)
    runs = math.ceil(n / length)
    rng = np.random.default_rng(0)
    starts = rng.integers(0, n, (draws, runs))
    rows = starts[:, :, None] + np.arange(length)  # (draws, runs, length)
    rows = rows.reshape(draws, -1)
    rows = rows[:, :n] % n
    means = gap[rows].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    mean = gap.mean()
    return float(mean), float(low), float(high)


class Scores:
    """Errors of predictions on both halves: a row of the table and the fields of a picture each."""

    def __init__(self, data: dict, checks: Checks):
        self.data = data
        self.checks = checks
        self.rows = {}
        self.fields = {}

    def add(self, name: str, runs: list[tuple], **more):
        """runs: of each half density, flow (M, T) and, of a model, the ledger."""
        halves = self.data["halves"]
        scores = []
        for (rho, q, *_), half in zip(runs, halves):
            found = errors(rho, q, half, self.data)
            series = found.pop("series")
            scores.append(found)
        first, second = scores
        self.rows[name] = {"first": first, "second": second} | more
        # of the second half, the last one
        self.fields[name] = {"rho": rho, "q": q, "series": series}

    def add_model(self, title: str, name: str, params: tuple, **more):
        data = self.data
        runs = [predict(name, params, half, data) for half in data["halves"]]
        numbers = named(name, params)
        self.add(title, runs, params=numbers, **more)
        ledgers = [ledger for _, _, ledger in runs]
        columns = np.array(ledgers).T
        start, into, out, end, added, courant = columns
        missing = start + into + added - out - end
        lost = np.abs(missing) / (start + into)
        lost = float(lost.max())
        courant = float(courant.max())
        row = self.rows[title]
        row["mass_error"] = lost
        row["max_cfl"] = courant
        row["floor_veh"] = float(added.sum())
        self.checks.below(f"vehicles conserved, {title}", lost, 1e-12)
        self.checks.courant(title, courant, 0.9)

    def best(self, family: str) -> str:
        """Chosen on the first half: the second is looked at once."""
        found = {}
        for name, row in self.rows.items():
            if name.startswith(family):
                found[name] = row["first"]["E"]
        return min(found, key=found.get)


def named(name: str, params: tuple) -> dict[str, float]:
    """The numbers that a model has, of those of unpack()."""
    first, _, target, _ = MODELS[name]
    (w, c, gamma), (v_max, rho_max, tau) = params
    result = {"C": c, "gamma": gamma}
    if target == "greenshields":  # v relaxes to a speed: no w is anybody's goal
        result |= {"v_max": v_max, "rho_max": rho_max}
    else:
        result = {"w": w} | result
    return result if first or target == "never" else result | {"tau": tau}


def record_part(data: dict, args: Args, checks: Checks) -> dict:
    """Calibrates on the first half, scores on the second; straight line and mean state beside the
    models."""
    halves = data["halves"]
    first, second = halves
    evaluations = args.evaluations
    if args.quick:
        evaluations = min(evaluations, 50)
    points = data["points"]
    gammas = np.geomspace(*GAMMAS, 60)
    power = fitted_curve(points, gammas)
    line = fitted_curve(points, (1.0,))
    scores = Scores(data, checks)
    scores.add("straight line", [straight(half) for half in halves])
    rho, v = (np.nanmean(x) for x in points)
    still = []
    for half in halves:
        shape = half["rho"].shape
        density = np.full(shape, rho)
        still.append((density, density * v))
    scores.add("mean of the first half", still)
    for name, (lwr, fitted, target, _) in MODELS.items():
        if lwr or target == "never":  # without tau the diagram says it all
            curve = power if fitted else line
            tau = 0.0 if lwr else FAR
            params = curve, (0.0, 1.0, tau)
            scores.add_model(f"{name} (diagram)", name, params)
        params = calibrate(name, data, evaluations)
        # the same numbers on finer cells and by the other scheme: how much of E is the grid's
        finer = predict(name, params, second, data, refine=2 if args.quick else 4)
        muscl = predict(name, params, second, data, scheme="muscl")
        others = {}
        for key, run in (("E_finer", finer), ("E_muscl", muscl)):
            rho, q, _ = run
            others[key] = errors(rho, q, second, data)["E"]
        scores.add_model(name, name, params, **others)
    best = {family: scores.best(family) for family in ("LWR", "ARZ")}
    pairs = {
        "diagram": ("LWR (diagram)", "ARZ, no relaxation (diagram)"),
        "error": (best["LWR"], best["ARZ"]),
        "straight line": ("straight line", best["ARZ"]),
    }
    gaps, fields = {}, scores.fields
    for how, (one, other) in pairs.items():
        a = fields[one]["series"]
        b = fields[other]["series"]
        gap = difference(a, b)
        gaps[how] = {"one": one, "other": other, "gap": gap}
    found = [row["second"]["E"] for row in scores.rows.values()]
    fine = bool(np.isfinite(found).all())
    checks.add("every error of the record is finite", fine, "1", fine)
    names = "path", "cells", "wide", "dx", "dt", "block", "warm"
    facts = {k: data[k] for k in names}
    facts["predicted"], facts["bins"] = first["rho"].shape
    return {
        "record": facts,
        "range": data["range"],
        "diagram": {"power": power, "greenshields": line},
        "models": scores.rows,
        "best": best,
        "differences": gaps,
        "plots": {"data": data, "fields": fields},
    }


# -------------------------------------------------------------------------------- tables and page
UNITS = {"w": "m/s", "C": "", "gamma": "", "v_max": "m/s", "rho_max": "veh/m", "tau": "s"}


def words(params: dict) -> str:
    return ", ".join(f"{k} {v:.4g} {UNITS[k]}".strip() for k, v in params.items())


def worse_cases(part: dict) -> list[str]:
    """Cases and grids on which muscl's error is the larger one."""
    found = []
    for name, e in part["cases"].items():
        known = e["known"] or [1.0]
        for n, a, b in zip(part["N"], e["godunov"]["L1"], e["muscl"]["L1"]):
            if b > a and known[0]:  # where it is 0, rounding errors say nothing
                found.append(f"{name}, N {n}: {b:.2e} beside {a:.2e}")
    return found


def scientific(numbers) -> list[str]:
    return [f"{x:.2e}" for x in numbers]


def decimals(numbers) -> str:
    return " ".join(f"{x:.2f}" for x in numbers)


def riemann_table(part: dict) -> tuple:
    rows = []
    for name, e in part["cases"].items():
        for scheme in SCHEMES:
            cells = scientific(e[scheme]["L1"])
            if e["known"] and scheme == "godunov":
                cells = [f"{a} ({b})" for a, b in zip(cells, scientific(e["known"]))]
            rows.append([name, scheme, *cells, decimals(e[scheme]["orders"])])
    note = (
        "Order 1/2 at a contact is right for the first-order scheme, 2/3 for the second; about 1 "
        "at a shock and, up to a logarithm, in a fan. The second order is not better everywhere: "
    )
    note += (", ".join(worse_cases(part)) or "here it is") + "."
    title = "Riemann problems: L1 error of the density (known value)"
    return title, ["case", "scheme", *sizes_of(part), "orders"], rows, note


def smooth_table(part: dict) -> tuple:
    rows = []
    for name, e in part.items():
        if name != "N":
            lost = f"{e['lost']:.1e}"
            rows.append([name, *scientific(e["L1"]), decimals(e["orders"]), lost])
    title = "Smooth solutions on a ring: L1 error of the density"
    note = "lost: the largest relative change of vehicles and of rho w on the ring."
    return title, ["solution", *sizes_of(part), "orders", "lost"], rows, note


def stability_table(part: dict) -> tuple:
    rows = []
    for c, e in part["c"].items():
        rates = *e["rates"], e["limit"], e["theory"]
        rows.append([c, *(f"{x:+.4f}" for x in rates)])
    title = "Growth rate of the first mode, p = c rho, V = 1 - rho, rho .5, tau .2, length 1"
    found = f"changes sign at c = {part['threshold']:.4f}; theory: 1."
    note = f"Bisected on the extrapolated rate, it {found}"
    return title, ["c", *sizes_of(part), "limit", "linear theory"], rows, note


def record_table(part: dict) -> tuple:
    rows, r = [], part["record"]
    for name, e in part["models"].items():
        second = e["second"]
        scores = [e["first"]["E"]]
        scores += [second[k] for k in ("E", "E_rho", "E_v", "rho")]
        scores = [f"{x:.4f}" for x in scores]
        speed = f"{second['v']:.3f}"
        numbers = words(e.get("params", {}))
        rows.append([name, *scores, speed, numbers])
    first, last = r["cells"]
    cells = f"cells {first} to {last}, {r['wide']} at each end given"
    title = f"{Path(r['path']).name}: {cells}, {r['predicted']} predicted"
    heads = "model", "E, first half", "E, second half", "density's", "speed's", "veh/m", "m/s"
    return title, [*heads, "numbers"], rows, verdict(part)


def sizes_of(part: dict) -> list[str]:
    return [f"N {n}" for n in part["N"]]


def tables(result: dict) -> dict[str, tuple]:
    """anchor -> (title, headings, rows of text, sentence below), in reading order."""
    out = {}
    if "riemann" in result:
        out["riemann"] = riemann_table(result["riemann"])
        out["smooth"] = smooth_table(result["riemann"]["smooth"])
    if "stability" in result:
        out["stability"] = stability_table(result["stability"])
    if "record" in result:
        out["record"] = record_table(result["record"])
    return out


HOW = {
    "diagram": "Fitted to the fundamental diagram alone, ARZ without relaxation",
    "error": "Calibrated on the first half's error, each family's best there",
    "straight line": "No model against ARZ",
}


def verdict(part: dict) -> str:
    """Which model is nearer to the second half, and by how much."""
    text = []
    for how, pair in part["differences"].items():
        gap, low, high = pair["gap"]
        one, other = pair["one"], pair["other"]
        who = "no difference that this record can show"
        if low > 0:
            who = f"{other} is nearer"
        elif high < 0:
            who = f"{one} is nearer"
        size = f"{gap:+.4f} (95 % interval {low:+.4f} to {high:+.4f})"
        text.append(f"{HOW[how]}: E of {one} minus E of {other} {size}: {who}.")
    return " ".join(text)


def draw_case(name: str):
    fig, (ax,) = canvas(4.6, 2.4)
    for scheme, color in zip(SCHEMES, (ORANGE, BLUE)):
        run = run_case(name, 100, scheme)
        ax.plot(run["x"], run["rho"], ".", ms=3, color=color, label=scheme)
    left, right, gamma, t, _ = CASES[name]
    density = riemann(left, right, gamma)["rho"]
    x = np.linspace(0, 1, 2001)
    s = (x - 0.5) / t
    ax.plot(x, density(s), color=INK, lw=0.9, label="exact")
    ax.set_ylabel("density")
    return fig


def draw_diagram(part: dict):
    fig, (ax,) = canvas(4.6, 3.6)
    rho, v = part["plots"]["data"]["points"]
    flow = rho * v
    ax.plot(rho, flow, ".", ms=2, color="#a3acb9", label="blocks of the first half")
    x = np.linspace(1e-3, float(rho.max()), 200)
    name = part["best"]["LWR"]
    fits = part["diagram"]
    curves = {
        "power, least squares": fits["power"],
        "Greenshields, least squares": fits["greenshields"],
        name: part["models"][name]["params"].values(),
    }
    for label, color in zip(curves, (INK, GREEN, ORANGE)):
        w, c, gamma = curves[label]
        speed = w - pressure(x, c, gamma)
        flow = np.maximum(x * speed, 0)
        ax.plot(x, flow, color=color, label=label)
    ax.set_xlabel("density, veh/m")
    ax.set_ylabel("flow, veh/s")
    return fig


def draw_maps(part: dict):
    """Speed over time and space of the second half: the record, and the models chosen on the
    first."""
    data = part["plots"]["data"]
    fields = part["plots"]["fields"]
    best = part["best"]
    second = data["halves"][1]
    shown = {"record": second}
    for name in (best["ARZ"], best["LWR"], "straight line"):
        shown[name] = fields[name]
    cells, bins = second["rho"].shape
    minutes = bins * data["dt"] / 60
    metres = cells * data["dx"]
    _, speeds = data["points"]
    style = {
        "aspect": "auto",
        "origin": "lower",
        "extent": (0, minutes, 0, metres),
        "cmap": "RdYlBu",
        "vmin": 0,
        "vmax": float(np.nanmax(speeds)),
    }
    fig, axes = canvas(9.6, 7.4, len(shown), right=0.9, top=0.3, sharex=True)
    for ax, (name, field_) in zip(axes, shown.items()):
        _, v = blocks(field_["rho"], field_["q"], data)
        image = ax.imshow(v, **style)
        ax.set_title(name, fontsize=8, loc="left", pad=2)
        ax.set_ylabel("m")
        ax.grid(False)
    axes[-1].set_xlabel("minutes of the second half")
    fig.subplots_adjust(hspace=0.3)
    fig.colorbar(image, ax=list(axes), label="speed, m/s", fraction=0.02, pad=0.02)
    return fig


def html_table(headings, rows) -> str:
    head = "".join(f"<th>{esc(h)}</th>" for h in headings)
    body = ""
    for first, *others in rows:
        cells = "".join(f"<td>{esc(x)}</td>" for x in others)
        body += f"<tr><th>{esc(first)}</th>{cells}</tr>"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def build_page(result: dict, shown: dict) -> Page:
    import matplotlib

    page, checks = Page(), result["checks"]
    failed = result["failed"]
    state = f"{len(checks) - len(failed)} of {len(checks)} checks passed"
    chip = f'<span class="chip {"bad" if failed else "good"}">{state}</span>'
    page.add(f'<h1>Aw-Rascle-Zhang kernels: validation</h1><div class="chips">{chip}</div>')
    page.add(f"<pre>{esc(result['command'])}</pre><!--nav-->")
    with matplotlib.rc_context(RC):
        for anchor, (title, headings, rows, sentence) in shown.items():
            page.section(anchor, title)
            page.add(f'{html_table(headings, rows)}<p class="note">{esc(sentence)}</p>')
            page.add('<div class="grid">')
            add_plots(page, anchor, result.get(anchor))
            page.add("</div>")
    page.section("checks", "Checks")
    rows = []
    for name, found, must, good in checks:
        rows.append([name, f"{found:.6g}", must, "ok" if good else "FAILED"])
    page.add(html_table(["check", "found", "must be", ""], rows))
    return page


def add_plots(page: Page, anchor: str, part: dict | None):
    if anchor == "riemann":
        for name in list(CASES)[:5]:
            page.plot(name, name, draw_case(name), f"t {CASES[name][3]}, 100 cells.")
    if anchor == "record":
        caption = "One dot a block; the curves were fitted."
        page.plot("diagram", "Fundamental diagram", draw_diagram(part), caption)
        caption = "Red is slow. Waves run down and to the right: upstream."
        page.plot("maps", "Speed", draw_maps(part), caption, wide=True)


def main(argv: list[str] | None = None) -> dict:
    """What validate_arz.json holds; raises CheckFailed with every check that failed, after
    writing."""
    args, given = parse_args(Args, argv)
    if args.ngsim is None and "record" in args.parts:
        refuse(("parts" in given, "--parts record needs --ngsim, the record"))
        args.parts = PARTS[:2]
    began, checks = time.perf_counter(), Checks()
    console = Console(width=170)
    flags = map(str, sys.argv[1:] if argv is None else argv)
    command = " ".join(["python scripts/validate_arz.py", *flags])
    result = {"command": command, "quick": args.quick}
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
    failed = checks.failed()
    result |= {"checks": checks, "failed": failed}
    page = build_page(result, shown)
    result.get("record", {}).pop("plots", None)
    result["seconds"] = time.perf_counter() - began
    (args.out / "validate_arz.html").write_text(page.html("Aw-Rascle-Zhang: validation"))
    write_json_atomic(result, args.out / "validate_arz.json")
    if args.figures:
        write_figures(page, args.figures)
    passed = f"{len(checks) - len(failed)} of {len(checks)} checks passed"
    files = f"{args.out}: validate_arz.html, validate_arz.json"
    console.print(f"{passed}, {result['seconds']:.0f} s; {files}")
    if failed:
        raise CheckFailed(f"{len(failed)} checks failed: {'; '.join(failed)}")
    return result | {"exit_code": 0}


if __name__ == "__main__":
    exit_with(main)
