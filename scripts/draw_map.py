"""Is this my map? What a SUMO map, an edge table or a CityFlow roadnet became, as text and picture.

    python scripts/draw_map.py MAP.sumocfg
    python scripts/draw_map.py MAP.net.xml --demand MAP.rou.xml --out map.png
    python scripts/draw_map.py edges.csv

Left the segments, coloured by lanes, with entries, exits and signals; right every phase of the first
signals: green, green that gives way (dashed), red. Any --scenario may be drawn that has coordinates.
Exits 0 when the picture stands, 2 on a map that cannot be read.
"""

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
            f"  {node}: greens of {greens} s, amber {net.amber[g]:g} s, all red {net.all_red[g]:g} s, "
            f"at least {net.min_green[g]:g} s"
        )
    for note in net.notes:
        print(f"  note: {note}")


def lines_of(net: Network) -> list[np.ndarray]:
    """(points, 2) of every segment, those of one road beside each other."""
    number, lines = {}, []
    for shape in net.shapes:
        k = number.get(shape, 0)
        number[shape] = k + 1
        line = np.array(shape, float)
        along = np.gradient(line, axis=0)
        along /= np.linalg.norm(along, axis=1, keepdims=True) + 1e-9
        right = np.stack([along[:, 1], -along[:, 0]], 1)
        lines.append(line + right * BESIDE * (k + 0.5))
    return lines


def last_metres(line: np.ndarray, metres: float) -> np.ndarray:
    to_end = np.r_[np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1)[::-1])[::-1], 0.0]
    if to_end[0] <= metres:
        return line
    k = int(np.flatnonzero(to_end > metres)[-1])
    share = (to_end[k] - metres) / (to_end[k] - to_end[k + 1])
    return np.vstack([line[k] + share * (line[k + 1] - line[k]), line[k + 1 :]])


def draw_whole(ax, net: Network, lines: list):
    lanes = net.jam / RHO_JAM
    colours = plt.get_cmap("viridis_r")
    for s, line in enumerate(lines):
        ax.plot(*line.T, color=colours(min(lanes[s], 4) / 4), lw=0.8 + 0.5 * min(lanes[s], 4))
    starts = np.array([line[0] for s, line in enumerate(lines) if net.entry[s] >= 0])
    ends = np.array([line[-1] for s, line in enumerate(lines) if net.leave[s] == 1])
    stops = [lines[int(np.flatnonzero(net.signal == g)[0])][-1] for g in range(len(net.nodes))]
    ax.scatter(*starts.T, s=12, marker="^", color="tab:blue", label="entries", zorder=3)
    if len(ends):
        ax.scatter(*ends.T, s=12, marker="s", color="tab:orange", label="exits", zorder=3)
    for g, point in enumerate(stops):
        ax.annotate(str(g + 1), point, color=RED, fontsize=9, weight="bold", zorder=4)
    bar = plt.cm.ScalarMappable(plt.Normalize(0, 4), colours)
    plt.colorbar(bar, ax=ax, label="lanes", shrink=0.6)
    ax.legend(fontsize=7, loc="lower right")
    ax.set_title(f"{net.name}: {len(lines)} segments, {len(net.nodes)} signals", fontsize=10)


def draw_phase(ax, net: Network, lines: list, g: int, p: int):
    """Approaches of signal g in phase p, and where their vehicles go on."""
    approaches = np.flatnonzero(net.signal == g)
    for s in approaches:
        green, minor = (net.green[s] >> p) & 1, (net.minor[s] >> p) & 1
        colour, style = (GREEN if green else RED), ("--" if minor else "-")
        end = last_metres(lines[s], AROUND)
        ax.plot(*end.T, color=colour, ls=style, lw=2.2 if green else 1.2)
        for m in np.flatnonzero(net.move_from == s):
            onward = lines[net.move_to[m]]
            first = last_metres(onward[::-1], AROUND)[::-1]
            ax.plot(*first.T, color=GREY, lw=0.8, zorder=0)
            if green:
                way = np.vstack([end[-1], first[0]])
                ax.plot(*way.T, color=colour, ls=style, lw=0.8)
    seconds = net.durations[g, p]
    own = f", {seconds:g} s" if seconds else ""
    ax.set_title(f"signal {g + 1}, phase {p + 1}{own}", fontsize=7)


def draw(net: Network, out: Path):
    lines = lines_of(net)
    phases = [(g, p) for g in range(len(net.nodes)) for p in range(net.n_phases[g])][:PANELS]
    rows = max(1, -(-len(phases) // 3))
    figure = plt.figure(figsize=(16, 9), layout="constrained")
    grid = figure.add_gridspec(rows, 6)
    axes = [figure.add_subplot(grid[:, :3])]
    draw_whole(axes[0], net, lines)
    for k, (g, p) in enumerate(phases):
        axes.append(figure.add_subplot(grid[k // 3, 3 + k % 3]))
        draw_phase(axes[-1], net, lines, g, p)
    for ax in axes:
        ax.set_aspect("equal", "datalim")
        ax.tick_params(labelsize=6)
    beside = out.with_name(out.stem + ".part" + out.suffix)
    figure.savefig(beside, dpi=110)
    plt.close(figure)
    beside.replace(out)


def main(argv=None) -> dict:
    """Describe and draw one map."""
    args, _ = parse_args(Args, argv)
    net = find_network(args.map, demand=args.demand)
    describe(net)
    name = Path(args.map).name.split(".")[0]
    out = Path(args.out) if args.out else Path(args.map).with_name(f"{name}.png")
    refuse((out.suffix not in (".png", ".svg", ".pdf"), f"--out {out}: must be .png, .svg or .pdf"))
    if not all(len(shape) > 1 for shape in net.shapes):
        raise UsageError(f"{args.map}: has no coordinates of its segments to draw")
    draw(net, out)
    print(f"picture: {out}")
    return {"exit_code": 0, "segments": len(net.ids), "picture": str(out)}


if __name__ == "__main__":
    exit_with(main)
