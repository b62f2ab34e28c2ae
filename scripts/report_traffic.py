"""What scripts/report.py draws of traffic: an episode in space and time, or its signals."""

from __future__ import annotations

import base64
import json
import re
from typing import NamedTuple

import numpy as np

from common.pictures import FULL, beside, tones
from scripts.report import CYCLE, INK, Page, Record, esc, thin, within, words

# columns that are drawn together over time_s
EPISODE = re.compile(
    r"(rho|v|action|fill)_\d+|phase_.+|(in|out)side_veh|reward|time_s"
)
# ends the name of a trace of the same episode without the agent -> what to call it
CONTROLS = {"_constant": "without control", "_fixed_cycle": "fixed cycle"}
FILM_BYTES = 600_000  # of an animation: it gets fewer frames, or none
PLAYER = """<script>
for (const film of document.querySelectorAll(".film")) {
  const data = JSON.parse(film.querySelector("script").textContent);
  const [slider, button] = [film.querySelector("input"), film.querySelector("button")];
  const sides = [...film.querySelectorAll("svg")].map((svg, i) => ({
    lines: [...svg.children], says: film.querySelectorAll("output")[i], veh: data.veh[i],
    levels: Uint8Array.from(atob(data.levels[i]), c => c.charCodeAt(0))}));
  const paint = frame => sides.forEach(({lines, says, veh, levels}) => {
    const at = (frame + 1) * lines.length;
    lines.forEach((line, s) => line.style.stroke = data.tones[levels[at + s]]);
    says.textContent = frame < 0 ? "mean of the episode" : data.time[frame] + " s"
      + (veh.length ? ", " + veh[frame] + " vehicles" : "");
  });
  let timer = 0;
  const stop = () => { clearInterval(timer); timer = 0; button.textContent = "Play"; };
  const go = () => {
    paint(++slider.value && +slider.value);
    if (+slider.value >= data.time.length - 1) stop();
  };
  slider.oninput = () => { stop(); paint(+slider.value); };
  button.onclick = () => {
    if (timer) return stop();
    if (+slider.value >= data.time.length - 1) slider.value = -1;
    button.textContent = "Pause";
    timer = setInterval(go, 100);
  };
  paint(-1);
}
</script>"""
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
    vehicles = {k: k.removesuffix("_veh") for k in trace if k.endswith("side_veh")}
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

    colours = [CYCLE[i % 8] for i in range(max(len(levels), 1))]
    return dict(cmap=ListedColormap(colours), vmin=-0.5, vmax=len(colours) - 0.5)


def name_stripes(axes, names: list[str]):
    """A name a stripe, every few of them where there are many, and white lines between."""
    step = -(-len(names) // 30)
    # a map joins its nodes' names; the margin holds nine letters
    short = [n if len(n) <= 9 else f"…{n[-8:]}" for n in names[::step]]
    axes[0].set_yticks(np.arange(0.5, len(names), step), short, color=INK)
    axes[0].invert_yaxis()
    for ax in axes:
        for y in range(1, len(names)):
            ax.axhline(y, color="white", lw=2 / step)


def is_rival(name: str, traces: dict) -> bool:
    """Whether a trace is that of another one's episode without the agent."""
    for end in CONTROLS:
        if name.endswith(end) and name.removesuffix(end) in traces:
            return True
    return False


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
        if is_rival(name, traces):
            continue
        sides = {"agent": trace}
        for end, title in CONTROLS.items():
            other = traces.get(name + end)
            if other and set(trace) <= set(other):
                sides[title] = other
        column = next((k for k in KINDS if k in trace), "reward")
        what, caption = KINDS[column]
        fig = draw_episode(sides, length, actions)
        title = f"{name}: {what} over one episode"
        alt = f"{title}, {' beside '.join(sides)}"
        page.plot(f"episode_{name}", title, fig, caption, alt, wide=True)
        add_film(page, run, name, sides, length)
    if any('class="film' in part for part in page.parts):
        page.add(PLAYER)


def add_film(page: Page, run: Record, name: str, sides: dict, length: float | None):
    """The episode as a map whose segments change their colours, side by side."""
    trace = sides["agent"]
    keys = list(columns_of(trace, "fill_"))
    what = "filling of a segment"
    low = 0.0
    full = FULL
    lines = beside(run.summary.get("shapes") or [])
    if not keys:  # one road: its points in a row
        keys = list(columns_of(trace, "rho_"))
        x = np.linspace(0, length or 1, len(keys) + 1)
        lines = [np.array([(a, 0), (b, 0)]) for a, b in zip(x, x[1:])]
        # an episode that time cut short has fewer rows than the one beside it
        every = [t[key] for t in sides.values() for key in keys]
        every = np.concatenate(every or [np.ones(1)])
        what = "density, veh/m"
        low = np.nanmin(every)
        full = np.nanmax(every)
    if not keys or len(lines) != len(keys):
        page.lack(f"{name} as a map", "summary.json has no coordinates of its segments (shapes)")
        return
    frames = int(FILM_BYTES / len(sides) / len(keys) / 1.4)
    paths = svg_lines(lines)
    if frames < 10 or len(paths) * len(sides) > FILM_BYTES:
        page.lack(f"{name} as a map", f"{len(keys)} segments are too many for an animation")
        return
    step = -(-len(trace["time_s"]) // frames)
    levels = []
    for t in sides.values():
        values = np.stack([t[key] for key in keys], 1)
        numbers = tone_numbers(values, step, low, full)
        levels.append(base64.b64encode(numbers.tobytes()).decode())
    palette = ["#" + bytes(c).hex() for c in tones(np.linspace(0, 1, 32))]
    veh = [vehicles_of(t)[::step] for t in sides.values()]
    data = {
        "tones": palette,
        "time": [f"{t:g}" for t in trace["time_s"][::step]],
        "veh": veh,
        "levels": levels,
    }
    maps = "".join(
        f"<div><b>{esc(title)}</b> <output></output>{paths}</div>" for title in sides
    )
    scale = "".join(f'<i style="background:{c}"></i>' for c in palette)
    legend = f"{what}: {low:.3g} {scale} {full:.3g}"
    kind = "film" if "fill_0" in trace else "film road"
    page.add(
        f'<figure class="{kind}"><h3>{esc(name)}: the episode on the map</h3>'
        f'<div class="legend">{legend}</div><div class="maps">{maps}</div>'
        f'<p><button type="button">Play</button> <input type="range" min="-1" value="-1" '
        f'max="{len(data["time"]) - 1}" aria-label="time"></p>'
        f'<script type="application/json">{json.dumps(data)}</script></figure>'
    )


def tone_numbers(values: np.ndarray, step: int, low: float, full: float) -> np.ndarray:
    """Tones 0 to 31 of values (decisions, segments): their mean, then every `step`th decision."""
    values = np.concatenate([values.mean(0, keepdims=True), values[::step]])
    share = (values - low) / max(full - low, 1e-9)
    share = np.nan_to_num(share).clip(0, 1)
    return (31 * share).round().astype(np.uint8)


def vehicles_of(trace: dict) -> list[str]:
    """Vehicles inside and outside at every decision; [] where the trace does not say."""
    if "inside_veh" not in trace:
        return []
    return [f"{x:.0f}" for x in trace["inside_veh"] + trace["outside_veh"]]


def svg_lines(lines: list[np.ndarray]) -> str:
    """Polylines in m as an SVG, north up; 0.3 % of the width is the least that is told apart."""
    points = np.concatenate(lines)
    low, size = points.min(0), np.ptp(points, 0)
    wide = max(float(size.max()), 1.0)
    scale = 1000 / wide
    width, height = np.maximum(size * scale, (1, 30)) + 24
    paths = ""
    for line in lines:
        at = (line - low) * scale
        text = " ".join(f"{12 + x:.0f},{height - 12 - y:.0f}" for x, y in at)
        paths += f'<polyline points="{text}"/>'
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img">{paths}</svg>'
