"""Is this my map? What a SUMO map, an edge table or a CityFlow roadnet became, as text and picture.

    python scripts/draw_map.py MAP.sumocfg
    python scripts/draw_map.py MAP.net.xml --demand MAP.rou.xml --out map.png
    python scripts/draw_map.py edges.csv

Left the segments, coloured by lanes, with entries, exits and signals; right every phase of the
first signals: green, green that gives way (dashed), red. Any --scenario may be drawn that has
coordinates.
Exits 0 when the picture stands, 2 on a map that cannot be read.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.run import UsageError, answer_help, exit_with, parse_args, refuse

answer_help(__name__, __file__)

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
from tyro.conf import Positional  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from common.networks import RHO_JAM, Network, find_network  # noqa: E402
from common.timeout_guard import whole_file  # noqa: E402

BESIDE = 3.5  # m between the segments of one road in the picture
PANELS = 12  # phases drawn
AROUND = 90.0  # m of a signal's approaches that are drawn
RED, GREEN, GREY = "#c0392b", "#1e8449", "#b3bac2"


@dataclass
class Args:
    map: Positional[str]
    """a SUMO map (.net.xml) or configuration (.sumocfg), an edge table, CityFlow's roadnet.json, or
    a scenario of ppo_arz_signals.py with coordinates"""
    demand: tuple[str, ...] = field(default_factory=tuple)
    """files of vehicles of a map that does not name them"""
    out: str = ""
    """picture to write; "" for MAP.png beside the map"""


def describe(net: Network):
    print(
        f"{net.name}: {len(net.ids)} segments, {net.lengths.sum() / 1000:.1f} km, "
        f"{len(net.nodes)} signals with {net.n_phases.sum()} phases, {net.base.shape[2]} entries"
    )
    if len(net.change_at) > 1:
        bins = np.diff(net.change_at, append=2 * net.change_at[-1] - net.change_at[-2])
        vehicles = (net.base.sum((1, 2)) * bins).sum()
        print(f"{vehicles:.0f} vehicles in {bins.sum() / 60:g} minutes")
    for g, node in enumerate(net.nodes):
        greens = ", ".join(f"{s:g}" for s in net.durations[g, : net.n_phases[g]])
        print(
            f"  {node}: greens of {greens} s, amber {net.amber[g]:g} s, "
            f"all red {net.all_red[g]:g} s, at least {net.min_green[g]:g} s"
        )
    for note in net.notes:
        print(f"  note: {note}")


def lines_of(net: Network) -> list[np.ndarray]:
    """(points, 2) of every segment, those of one road beside each other."""
    number, lines = {}, []
    for shape in net.shapes:
        # segments of one road have the same shape: the k-th lies k widths to the right
        k = number.get(shape, 0)
        number[shape] = k + 1
        line = np.array(shape, float)
        along = np.gradient(line, axis=0)
        length = np.linalg.norm(along, axis=1, keepdims=True)
        along /= length + 1e-9
        x, y = along.T
        right = np.stack([y, -x], 1)
        lines.append(line + right * BESIDE * (k + 0.5))
    return lines


def last_metres(line: np.ndarray, metres: float) -> np.ndarray:
    """The end of a polyline (points, 2) in m, cut between two points where need be."""
    steps = np.diff(line, axis=0)
    pieces = np.linalg.norm(steps, axis=1)
    backwards = np.cumsum(pieces[::-1])
    to_end = np.r_[backwards[::-1], 0.0]  # (points,)
    if to_end[0] <= metres:
        return line
    k = int(np.flatnonzero(to_end > metres)[-1])
    point = line[k]
    rest = line[k + 1 :]
    too_far = to_end[k] - metres
    piece = to_end[k] - to_end[k + 1]
    step = rest[0] - point
    cut = point + too_far / piece * step
    return np.vstack([cut, rest])


def draw_whole(ax, net: Network, lines: list):
    # colours and widths tell up to four lanes apart
    lanes = net.jam / RHO_JAM
    colours = plt.get_cmap("viridis_r")
    for line, width in zip(lines, lanes):
        width = min(width, 4)
        color = colours(width / 4)
        thick = 0.8 + 0.5 * width
        ax.plot(*line.T, color=color, lw=thick)

    entries = np.flatnonzero(net.entry >= 0)
    exits = np.flatnonzero(net.leave == 1)
    starts = np.array([lines[s][0] for s in entries])
    ends = np.array([lines[s][-1] for s in exits])  # (exits, 2)
    into = dict(s=12, zorder=3, marker="^", color="tab:blue")
    out = dict(s=12, zorder=3, marker="s", color="tab:orange")
    ax.scatter(*starts.T, label="entries", **into)
    # a closed network has no exits, and nothing to unpack
    if len(ends):
        ax.scatter(*ends.T, label="exits", **out)

    # a signal's number stands at the stop line of its first approach
    text = dict(color=RED, fontsize=9, weight="bold", zorder=4)
    signals = range(len(net.nodes))
    for g in signals:
        approaches = np.flatnonzero(net.signal == g)
        line = lines[approaches[0]]
        point = line[-1]
        ax.annotate(str(g + 1), point, **text)

    scale = plt.Normalize(0, 4)
    bar = plt.cm.ScalarMappable(scale, colours)
    plt.colorbar(bar, ax=ax, label="lanes", shrink=0.6, ticks=range(5))
    ax.legend(fontsize=7, loc="lower right")
    size = f"{len(lines)} segments, {len(signals)} signals"
    ax.set_title(f"{net.name}: {size}", fontsize=10)


def draw_phase(ax, net: Network, lines: list, g: int, p: int):
    """Approaches of signal g in phase p, and where their vehicles go on."""
    approaches = np.flatnonzero(net.signal == g)
    for s in approaches:
        # bit p of both numbers belongs to phase p
        green = (net.green[s] >> p) & 1
        minor = (net.minor[s] >> p) & 1
        colour = GREEN if green else RED
        dashes = "--" if minor else "-"
        style = dict(color=colour, ls=dashes)
        end = last_metres(lines[s], AROUND)
        width = 2.2 if green else 1.2
        ax.plot(*end.T, lw=width, **style)
        moves = np.flatnonzero(net.move_from == s)
        for target in net.move_to[moves]:
            # the first metres of a road are the last ones of its way back
            back = lines[target][::-1]
            back = last_metres(back, AROUND)
            ax.plot(*back[::-1].T, color=GREY, lw=0.8, zorder=0)
            if green:
                way = np.vstack([end[-1], back[-1]])
                ax.plot(*way.T, lw=0.8, **style)
    seconds = net.durations[g, p]
    title = f"signal {g + 1}, phase {p + 1}"
    if seconds:
        title += f", {seconds:g} s"
    ax.set_title(title, fontsize=7)


def draw(net: Network, out: Path):
    lines = lines_of(net)
    phases = []
    for g, count in enumerate(net.n_phases):
        phases += [(g, p) for p in range(count)]
    phases = phases[:PANELS]

    # the map takes the left half, three panels in a row the right one
    rows = max(1, math.ceil(len(phases) / 3))
    figure = plt.figure(figsize=(16, 9), layout="constrained")
    grid = figure.add_gridspec(rows, 6)
    whole = figure.add_subplot(grid[:, :3])
    draw_whole(whole, net, lines)
    axes = [whole]
    for k, (g, p) in enumerate(phases):
        row, column = divmod(k, 3)
        ax = figure.add_subplot(grid[row, 3 + column])
        draw_phase(ax, net, lines, g, p)
        ax.locator_params(nbins=4)
        axes.append(ax)
    for ax in axes:
        ax.set_aspect("equal", "datalim")
        ax.tick_params(labelsize=6)

    with whole_file(out) as half:
        figure.savefig(half, dpi=110)
    plt.close(figure)


def main(argv=None) -> dict:
    """Describe and draw one map."""
    args, _ = parse_args(Args, argv)
    net = find_network(args.map, demand=args.demand)
    describe(net)
    given = Path(args.map)
    name = given.name.split(".")[0]  # of MAP.net.xml: MAP
    out = given.with_name(f"{name}.png")
    if args.out:
        out = Path(args.out)
    drawable = out.suffix in (".png", ".svg", ".pdf")
    refuse((not drawable, f"--out {out}: must be .png, .svg or .pdf"))
    if not all(len(shape) > 1 for shape in net.shapes):
        raise UsageError(f"{args.map}: has no coordinates of its segments to draw")
    draw(net, out)
    print(f"picture: {out}")
    return {"exit_code": 0, "segments": len(net.ids), "picture": str(out)}


if __name__ == "__main__":
    exit_with(main)
