"""What scripts/report.py draws of traffic: an episode in space and time, or its signals."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from scripts.report import CYCLE, INK, Page, Record, thin, within, words

# columns that are drawn together over time_s
EPISODE = re.compile(
    r"(rho|v|action)_\d+|phase_.+|(in|out)side_veh|reward|time_s"
)
CONTROL = "_constant"  # ends the name of a trace of the same episode without control
# a column of the trace -> what the figure shows, and how to read it
KINDS = {
    "rho_0": (
        "density and speed",
        "Traffic drives upwards; dark is dense and slow: stripes that run down are waves.",
    ),
    "inside_veh": (
        "vehicles and signals",
        "Waiting outside, or one colour from end to end: somebody starves.",
    ),
    "reward": ("actions and reward", "The action and what it is paid."),
}


def has_figure(column: str) -> bool:
    return bool(EPISODE.fullmatch(column))


class Panel(NamedTuple):
    """A row of an episode's figure: {key of the trace: name} as lines, image or stripes."""

    kind: str
    label: str
    keys: dict[str, str]
    height: float
    unit: str = ""
    colours: str | None = None


def columns_of(trace: dict, stem: str) -> dict[str, str]:
    """{column: its name without the stem} of an episode's columns."""
    names = {}
    for name in trace:
        if name.startswith(stem) and EPISODE.fullmatch(name):
            names[name] = name.removeprefix(stem)
    return names


def panels_of(
    trace: dict, length: float | None, actions: dict
) -> list[Panel]:
    rho = columns_of(trace, "rho_")
    v = columns_of(trace, "v_")
    phases = columns_of(trace, "phase_")
    acts = {}
    if not phases:
        acts = {
            k: actions.get(k, words(k)) for k in columns_of(trace, "action_")
        }
    vehicles = {k: k[:-4] for k in trace if k.endswith("side_veh")}
    reward = {k: "" for k in trace if k == "reward"}
    place = "position, m" if length else "point of road"
    panels = [
        Panel("image", place, rho, 1.7, "density, veh/m", "viridis_r"),
        Panel("image", place, v, 1.7, "speed, m/s", "viridis"),
        Panel("lines", "vehicles", vehicles, 1.5),
        Panel(
            "stripes", "", phases, min(0.3 + 0.2 * len(phases), 6.0), "phase"
        ),
        Panel("lines", "action", acts, 1.0),
        Panel("lines", "reward", reward, 1.0),
    ]
    return [p for p in panels if p.keys]


def draw_episode(sides: dict, length: float | None, actions: dict):
    """Traces over time_s side by side ({title: columns}) with shared scales, a row a quantity.

    length of the road in m (None: unknown); actions: {column: what to call it}.
    """
    from matplotlib.figure import Figure

    panels = panels_of(next(iter(sides.values())), length, actions)
    heights = [p.height for p in panels]
    height = sum(heights) + 0.16 * len(panels) + 0.7
    fig = Figure((10.4, height))
    shared = dict(
        squeeze=False, sharex=True, sharey="row", height_ratios=heights
    )
    grid = fig.subplots(len(panels), len(sides), **shared)
    fig.subplots_adjust(
        0.075, 0.44 / height, 0.89, 1 - 0.28 / height, 0.08, 0.14
    )
    for panel, axes in zip(panels, grid, strict=True):
        axes[0].set_ylabel(panel.label)
        if panel.kind == "lines":
            draw_lines(panel, axes, sides)
        else:
            draw_images(panel, axes, sides, length)
    for top, low, title in zip(grid[0], grid[-1], sides, strict=True):
        top.set_title(title, fontsize=9, color=INK)
        low.set_xlabel("time, s")
        low.margins(x=0)
    return fig


def span_of(trace: dict) -> tuple[float, float]:
    """Seconds from the first decision to the end of the last one."""
    t = trace["time_s"]
    step = t[-1] - t[-2] if len(t) > 1 else 1.0
    return t[0], t[-1] + step


def draw_lines(panel: Panel, axes, sides: dict):
    for ax, trace in zip(axes, sides.values(), strict=True):
        times = np.append(trace["time_s"], span_of(trace)[1])
        for i, (key, name) in enumerate(panel.keys.items()):
            # a value holds until the next decision
            values = np.append(trace[key], trace[key][-1])
            ax.step(
                times, values, where="post", color=CYCLE[i % 8], label=name
            )
    if any(panel.keys.values()):
        axes[-1].legend(
            loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9
        )


def stack(panel: Panel, trace: dict, how: str) -> np.ndarray:
    rows = []
    for key in panel.keys:
        _, values = thin(trace["time_s"], trace[key], 1000, how)
        rows.append(values)
    return np.stack(rows)


def draw_images(panel: Panel, axes, sides: dict, length: float | None):
    """Space and time, or a stripe a junction with a colour a phase: (rows, decisions)."""
    stripes = panel.kind == "stripes"
    how = "last" if stripes else "mean"
    images = [stack(panel, trace, how) for trace in sides.values()]
    levels = np.unique(np.concatenate([image.ravel() for image in images]))
    levels = levels[np.isfinite(levels)]
    style = dict(aspect="auto", origin="lower", interpolation="nearest")
    if stripes:
        style |= phase_style(levels)
        images = [np.searchsorted(levels, image) for image in images]
    elif levels.size:
        style |= dict(cmap=panel.colours, vmin=levels[0], vmax=levels[-1])
    top = length if length and not stripes else len(panel.keys)
    for ax, trace, image in zip(axes, sides.values(), images, strict=True):
        extent = *span_of(trace), 0, top
        image = ax.imshow(image, extent=extent, **style)
        ax.grid(False)
    box = axes[-1].get_position()
    place = ax.figure.add_axes((0.9, box.y0, 0.012, box.height))
    bar = ax.figure.colorbar(image, cax=place, label=panel.unit)
    if stripes:
        bar.set_ticks(range(len(levels)), labels=[f"{x:g}" for x in levels])
        name_stripes(axes, list(panel.keys.values()))


def phase_style(levels: np.ndarray) -> dict:
    from matplotlib.colors import ListedColormap

    tones = [CYCLE[i % 8] for i in range(max(len(levels), 1))]
    return dict(cmap=ListedColormap(tones), vmin=-0.5, vmax=len(tones) - 0.5)


def name_stripes(axes, names: list[str]):
    """A name a stripe, every few of them where there are many, and white lines between."""
    step = -(-len(names) // 30)
    axes[0].set_yticks(
        np.arange(0.5, len(names), step), names[::step], color=INK
    )
    axes[0].invert_yaxis()
    for ax in axes:
        for y in range(1, len(names)):
            ax.axhline(y, color="white", lw=2 / step)


def add_traces(page: Page, run: Record):
    """One greedy episode over time_s, beside the same one without control if there is one."""
    traces = {s: t for s, t in run.traces.items() if "time_s" in t}
    if not traces:
        page.lack(
            "one episode over time",
            "no traces/*.parquet has the column time_s",
        )
        return
    length = within(run.summary, "data", "road").get("length_m")
    control = run.args.get("control")
    actions = {"action_0": control or "action"}
    if control == "both":
        actions = {"action_0": "outlet", "action_1": "inlet"}
    lead = "One episode of the agent that is reported, without exploration noise."
    page.section("road", "On the road", lead)
    for name, trace in traces.items():
        if name.endswith(CONTROL) and name.removesuffix(CONTROL) in traces:
            continue
        sides = {"agent": trace}
        free = traces.get(name + CONTROL)
        if free and set(trace) <= set(free):
            sides["without control"] = free
        kind = next((k for k in KINDS if k in trace), "reward")
        what, caption = KINDS[kind]
        fig = draw_episode(sides, length, actions)
        title = f"{name}: {what} over one episode"
        alt = f"{title}, {' beside '.join(sides)}"
        page.plot(f"episode_{name}", title, fig, caption, alt, wide=True)
