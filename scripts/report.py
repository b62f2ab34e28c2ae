#!/usr/bin/env python3
"""Draw one run directory as one self-contained page.

    python scripts/report.py runs/NAME                  # writes runs/NAME/report.html
    python scripts/report.py runs/NAME --figures docs/  # and every figure as a PNG file

It reads args.json, metrics.jsonl, summary.json and traces/*.parquet of that directory, and what
docs/{script}.md says about each metric. The same files give the same bytes. What the files do not
hold is listed at the end of the page, never guessed. A missing or broken file is one line on
stderr and exit code 2; a bug is one line and exit code 1.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import os
import re
import sys
import traceback
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import text_of  # noqa: E402

# -------------------------------------------------------------------------------------- vocabulary
# Okabe-Ito tones: told apart by colour-blind readers, dark enough on white
COLORS = {
    "agent": "#0b62b5",
    "critic_grid": "#c2591a",
    "actor": "#c2591a",
    "optimum": "#138a5e",
    "sparse_linear": "#a8487f",
    "buy_and_hold": "#4b5563",
    "best_constant": "#a97c00",
    "random_same_turnover": "#a3acb9",
    "flat": "#1f2937",
}
POLICIES = tuple(COLORS)
CYCLE = (
    "#0b62b5",
    "#c2591a",
    "#138a5e",
    "#a8487f",
    "#a97c00",
    "#3a9fd0",
    "#4b5563",
    "#7a4fb5",
)
RED, GREY, INK = "#c62f2f", "#e5e8ec", "#1b2430"
# A colour is a policy. What the agent does on several splits has tones of its blue: by name, or
# in the order of the splits, of which the first has chosen.
TONES_OF_SPLITS = ("#0b62b5", "#9cc3e8", "#082c54", "#5a6675")
SPLITS = {"eval": 0, "train": 1, "test": 2}
# key of summary.json -> (heading, kind of number); other keys follow in the file's order
COLUMNS = {
    "score": ("score", "share"),
    "mean_expected_bps": ("expected, bp / bar", "signed"),
    "expected_growth_bps": ("expected growth, bp / bar", "signed"),
    "mean_reward_bps": ("realised, bp / bar", "signed"),
    "from_bps": ("95 % from", "signed"),
    "to_bps": ("95 % to", "signed"),
    "rival_bps": ("best baseline", "signed"),
    "lead_bps": ("agent's lead", "signed"),
    "lead_from_bps": ("lead, 95 % from", "signed"),
    "lead_to_bps": ("lead, 95 % to", "signed"),
    "total_return": ("total return", "percent"),
    "sharpe": ("Sharpe, a year", "signed"),
    "max_drawdown": ("max drawdown", "percent"),
    "turnover": ("turnover a bar", "small"),
    "exposure": ("exposure", "signed"),
    "trades": ("trades", "int"),
    "episode_return": ("return", "plain"),
    "delay_veh_s": ("delay, veh s", "plain"),
    "throughput_veh": ("throughput, veh", "plain"),
    "mean_speed": ("mean speed, m/s", "plain"),
    "switches": ("switches", "plain"),
    "std": ("std over cases", "plain"),
    "mass_error": ("mass error", "plain"),
    "max_cfl": ("max Courant number", "small"),
    "floor_veh": ("added by the floor, veh", "plain"),
}
FORMATS = {
    "share": ".2f",
    "signed": "+,.2f",
    "percent": "+,.1%",
    "small": ".3f",
    "int": ",.0f",
}
# what one wants to be better at than the baselines, the first that a run has first
GOALS = (
    "score",
    "mean_expected_bps",
    "mean_reward_bps",
    "sharpe",
    "episode_return",
    "delay_veh_s",
    "mean_speed",
    "throughput_veh",
)
# first part of a metric's name -> title of its table in reading order, whether it is unfolded
GROUPS = {
    "policy": ("Policy", True),
    "value": ("Values", True),
    "losses": ("Losses", True),
    "alarm": ("Alarms: red while one is raised", True),
    "env": ("Environment", False),
    "charts": ("Charts", False),
    "eval": ("More of the evaluations", False),
    "": ("Everything else that was logged", False),
}
TONES = {
    "finished": "good",
    "timeout": "good",
    "interrupted": "warn",
    "healthy": "good",
    "collapsed": "bad",
    "constant_is_right": "calm",
    "undecided": "warn",
    "undertrained": "warn",
    "untrained": "warn",
}
CSS = """
:root{--ink:#1b2430;--soft:#5a6675;--line:#e3e7ec;--wash:#f6f8fa;--blue:#0b62b5}
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:#fff;color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1160px;margin:0 auto;padding:28px 20px 64px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 4px;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:1.22rem;margin:52px 0 4px;letter-spacing:-.01em}
h3{font-size:.98rem;margin:0 0 6px;font-weight:620;overflow-wrap:anywhere}
p{margin:0 0 10px}.soft,figcaption,.note{color:var(--soft)}
.lead{color:var(--soft);max-width:74ch}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.86em}
pre{background:var(--wash);border:1px solid var(--line);border-radius:8px;padding:10px 12px;
margin:14px 0;
white-space:pre-wrap;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:18px 0 0;padding:9px 0;
border-top:1px solid var(--line);
border-bottom:1px solid var(--line);font-size:.9rem}
nav a{color:var(--blue);text-decoration:none}nav a:hover{text-decoration:underline}
.chips,.legend{display:flex;flex-wrap:wrap;gap:8px;margin:14px 0 6px}
.chip{border-radius:99px;padding:3px 12px;font-size:.9rem;border:1px solid}
.good{background:#e9f7ef;border-color:#b5dfc7;color:#0d5c37}
.bad{background:#fdecec;border-color:#f3bcbc;color:#94201f}
.warn{background:#fff6e2;border-color:#efd695;color:#755102}
.calm{background:#eaf3fc;border-color:#b9d7f3;color:#0b4f91}
.plain{background:var(--wash);border-color:var(--line);color:var(--ink)}
.reasons{margin:8px 0 0;padding-left:20px;max-width:88ch}.reasons li{margin:2px 0;
overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,165px),1fr));gap:12px;
margin:20px 0 0}
.tile{border:1px solid var(--line);border-radius:12px;padding:12px 14px 10px}
.tile b{display:block;font-size:1.65rem;line-height:1.15;font-weight:650;letter-spacing:-.02em;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.tile span{display:block;font-size:.82rem;color:var(--soft)}.tile .of{color:var(--ink)}
.tile.main{background:#eef5fc;border-color:#c5dcf3}.tile.main b{color:var(--blue)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr));
gap:26px 30px;margin-top:16px}
figure{margin:0;min-width:0}figure img{display:block;width:100%;height:auto}
details+figure{margin-top:24px}figcaption{font-size:.88rem;line-height:1.45;margin-top:4px;
max-width:84ch}
.legend{gap:2px 16px;margin:0 0 4px;font-size:.85rem}
.legend i{display:inline-block;width:18px;height:0;border-top:3px solid;margin-right:6px;
vertical-align:middle}
.wide{grid-column:1/-1}.scroll{overflow-x:auto;scrollbar-width:thin}
.wide .scroll img{min-width:640px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem;width:100%}
th,td{padding:4px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
thead th{font-weight:550;color:var(--soft);font-size:.8rem;vertical-align:bottom;
white-space:normal;min-width:64px}
tbody th{text-align:left;font-weight:450;position:sticky;left:0;background:#fff}
tr.split th{padding-top:20px;font-weight:650;border-bottom:2px solid var(--ink)}
.rows{font-weight:400;color:var(--soft);font-size:.82rem}
tr.agent td,tr.agent th{background:#eef5fc;font-weight:620}
i.dot{display:inline-block;width:.72em;height:.72em;border-radius:3px;margin-right:8px}
table.kv,table.health{table-layout:fixed}
table.kv :is(th,td),table.health :is(th,td){text-align:left;white-space:normal;
overflow-wrap:anywhere;
vertical-align:top;padding:5px 12px 5px 0;line-height:1.4}
table.kv th{width:38%;font-weight:450;color:var(--soft)}
table.health :is(th,td){font-size:.84rem}table.health th:first-child{width:27%}
table.health th:nth-child(2){width:222px}table.health th:nth-child(3){width:104px}
table.health tbody th b{font-weight:620;display:block}
svg.spark{display:block;width:100%;height:44px}svg.spark path{fill:none;stroke:var(--blue);
stroke-width:1.6;
vector-effect:non-scaling-stroke;stroke-linejoin:round}
i.bar{display:block;height:14px;margin-top:3px;border-radius:3px;background:#7d8fa3}
details :is(th,td){padding-left:6px;padding-right:6px}
details{border:1px solid var(--line);border-radius:10px;padding:10px 14px;margin-top:14px}
summary{cursor:pointer;font-weight:600}details[open]>summary{margin-bottom:8px}
.note{background:var(--wash);border-radius:8px;padding:8px 12px;font-size:.9rem;margin-top:12px}
.film{margin-top:26px}.film .maps{display:grid;grid-template-columns:repeat(auto-fit,
minmax(min(100%,420px),1fr));gap:14px}
.film svg{display:block;width:100%;height:auto;max-height:70vh;background:var(--wash);
border-radius:8px;margin-top:4px}.film polyline{fill:none;stroke:#cfe2f3;stroke-width:5;
stroke-linecap:butt;vector-effect:non-scaling-stroke}.film output{color:var(--soft)}
.film.road polyline{stroke-width:22}
.film .legend i{width:5px;height:12px;border:0;margin:0}.film .legend{gap:0;align-items:center;
white-space:pre}.film p{display:flex;gap:12px;margin-top:10px}.film input{flex:1;max-width:520px}
.film button{font:inherit;min-width:84px;padding:4px 14px;border:1px solid var(--line);
border-radius:8px;background:#fff;color:var(--blue)}
@media(max-width:600px){.film polyline{stroke-width:3.5}.film.road polyline{stroke-width:16}
main{padding:18px 14px 48px}h1{font-size:1.35rem}h2{margin-top:40px}
.tile b{font-size:1.35rem}.tiles{grid-template-columns:1fr 1fr}.wide .scroll img{min-width:820px}
.wide .scroll::before,.scroll:has(table)::before{content:"scroll sideways \\2192";
position:sticky;left:0;
font-size:.8rem;color:var(--blue)}
table{font-size:.82rem}th,td{padding:5px 7px}
table.health thead{display:none}table.health tr{display:block;padding:8px 0;
border-bottom:1px solid var(--line)}
table.health tbody :is(th,td){display:block;width:auto!important;border:0;padding:1px 0}
table.health td[title]:not(:empty)::before{content:attr(title) ": ";color:var(--soft)}}
@media print{nav{display:none}figure{break-inside:avoid}}
"""
SPARK = '<svg class="spark" viewBox="0 0 220 44" preserveAspectRatio="none">{}</svg>'
RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
    "font.size": 9,
    # names come from files: a lone $ would be a formula and stop the page
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": "#5a6675",
    "axes.edgecolor": "#c4cbd4",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#edf0f3",
    "grid.linewidth": 0.7,
    "xtick.color": "#5a6675",
    "ytick.color": "#5a6675",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 1.2,
    "date.converter": "concise",
    "path.simplify_threshold": 0.3,
    "axes.formatter.useoffset": False,
}


class ReportError(ValueError):
    """A run directory that cannot be drawn; the message is one line that names the file."""


# ------------------------------------------------------------------------------------------- input
class Meaning(NamedTuple):
    """A row of a docs page's table of metrics."""

    formula: str
    healthy: str
    action: str


def metric_table(page: str) -> dict[str, Meaning]:
    """{name: row} of the tables of a docs page whose first heading is `metric`.

    Their cells: one or more names in backticks, formula, healthy range, what to do if not. "as
    above" stands for the cell above, "as there" for that of the metric X whose formula is "as `X`".
    """
    table, inside, above = {}, False, Meaning("", "", "")
    for line in page.splitlines():
        cells = re.split(r"(?<!\\)\|", line.strip())[1:-1]
        cells = [c.strip().replace("\\|", "|") for c in cells]
        if not cells:
            inside = False
        elif cells[0].lower() == "metric":
            inside = True
        elif inside:
            pairs = zip(cells[1:] + [""] * 3, above)
            above = Meaning(*(b if a == "as above" else a for a, b in pairs))
            table |= {name: above for name in re.findall(r"`([^`]+)`", cells[0])}
    for name, row in table.items():
        other = re.match(r"as `([^`]+)`", row.formula)
        there = table.get(other[1], row) if other else row
        table[name] = Meaning(*(b if a == "as there" else a for a, b in zip(row, there)))
    return table


@dataclass
class Record:
    """A run directory: metrics are {name: (steps, values)}, traces {split: columns}."""

    args: dict
    summary: dict
    metrics: dict[str, tuple[np.ndarray, np.ndarray]]
    traces: dict[str, dict[str, np.ndarray]]
    notes: list[str] = field(default_factory=list)
    meanings: dict[str, Meaning] = field(default_factory=dict)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ReportError(f"{path}: missing; a run that ended has one") from None
    except UnicodeDecodeError:
        raise ReportError(f"{path}: broken, not UTF-8 text") from None
    except OSError as e:
        raise ReportError(f"{path}: cannot be read ({e.strerror})") from None


def read_json(path: Path) -> dict:
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as e:
        raise ReportError(
            f"{path}: broken JSON at line {e.lineno}, column {e.colno} ({e.msg})"
        ) from None
    if not isinstance(value, dict):
        raise ReportError(
            f"{path}: expected a JSON object, found {type(value).__name__}"
        )
    return value


def read_metrics(
    path: Path,
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """metrics.jsonl as {name: (global_step int64, value float64)} and notes; null is NaN."""
    lines = read_text(path).split("\n")
    # a list a key: not every line logs every metric
    points, notes = {}, []
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            # a killed process leaves half a line, and only ever the last one
            if n < len(lines):
                raise ReportError(
                    f"{path}: broken JSON at line {n}, column {e.colno} ({e.msg})"
                ) from None
            notes.append(
                f"the last line of metrics.jsonl (line {n}) is cut off and was left out"
            )
            continue
        step = row.pop("global_step", None) if isinstance(row, dict) else None
        if not isinstance(step, (int, float)) or step != step:
            raise ReportError(f"{path}: line {n} has no global_step")
        step = row.pop("pretrain_step", step)  # the axis of what is logged before the loop
        for key, value in row.items():
            if value is not None and not isinstance(value, (int, float)):
                kind = type(value).__name__
                raise ReportError(
                    f"{path}: line {n}, {key} is a {kind}, expected a number or null"
                )
            points.setdefault(key, []).append(
                (step, np.nan if value is None else value)
            )
    metrics = {}
    for key, pairs in points.items():
        steps, values = zip(*pairs)
        metrics[key] = np.array(steps, np.int64), np.array(values, np.float64)
    return metrics, notes


def read_trace(path: Path) -> dict[str, np.ndarray]:
    """Columns of a parquet file: numbers float64 (null is NaN), times datetime64[ns], no text."""
    # pyarrow's buffers: its to_numpy() and fill_null() import pandas, a quarter of a second
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path).read()
    except (OSError, pa.ArrowException) as e:
        raise ReportError(
            f"{path}: broken parquet ({' '.join(str(e).split())[:120]})"
        ) from None
    out = {}
    for name in table.column_names if table.num_rows else ():
        column = table[name].combine_chunks()
        kind = column.type
        if pa.types.is_timestamp(kind):
            times = values_of(column.cast(pa.int64()), np.int64, -(2**63))
            out[name] = times.view(f"M8[{kind.unit}]").astype("M8[ns]")
            continue
        if pa.types.is_boolean(kind):
            column = column.cast(pa.int8())
        elif not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
            continue
        out[name] = values_of(column.cast(pa.float64()), np.float64, np.nan)
    return out


def values_of(column, dtype, hole) -> np.ndarray:
    """An Arrow array's numbers, `hole` where it holds null."""
    import pyarrow as pa

    values = np.frombuffer(column.buffers()[1], dtype, len(column), 8 * column.offset)
    nulls = np.from_dlpack(column.is_null().cast(pa.int8()))
    return np.where(nulls == 1, hole, values)


def read_run(run_dir: str | Path) -> Record:
    """All that the page is made of. ReportError names the first missing or broken file."""
    folder = Path(run_dir)
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such run directory")
    args = read_json(folder / "args.json")
    metrics, notes = read_metrics(folder / "metrics.jsonl")
    summary = read_json(folder / "summary.json")
    traces = {
        p.stem: read_trace(p) for p in sorted((folder / "traces").glob("*.parquet"))
    }
    traces = {k: v for k, v in traces.items() if any(len(c) for c in v.values())}
    return Record(args, summary, metrics, traces, notes, read_meanings(args, summary))


def read_meanings(args: dict, summary: dict) -> dict[str, Meaning]:
    """The table of metrics of the page of the script that ran; {} where there is no page."""
    scripts = re.findall(r"(\w+)\.py\b", str(summary.get("command", ""))[:300])
    for name in (summary.get("script"), *scripts[:1], args.get("exp_name")):
        page = re.fullmatch(r"\w+", str(name)) and text_of(f"docs/{name}.md")
        if page:
            return metric_table(page)
    return {}


# ----------------------------------------------------------------------------------------- numbers
def number(x) -> float:
    """x as a float, NaN for null and for anything that is no number."""
    return float(x) if isinstance(x, (int, float)) else float("nan")


def plain_format(sizes: list[float]) -> str:
    """Format of numbers of these sizes: four digits of the largest."""
    most = max(sizes, default=0.0)
    if all(x == int(x) for x in sizes) and most < 1e15:
        return ",.0f"
    if most >= 1e15 or most < 1e-3:
        return ".1e"
    return f",.{max(0, 3 - int(np.floor(np.log10(most))))}f"


def texts(values, kind: str = "plain") -> list[str]:
    """Numbers of one column with the same decimals; a dash for NaN. kind: a key of FORMATS."""
    numbers = [number(x) for x in values]
    form = FORMATS.get(kind) or plain_format(
        [abs(x) for x in numbers if np.isfinite(x)]
    )
    out = []
    for x in numbers:
        if not np.isfinite(x):
            out.append("–" if x != x else "∞" if x > 0 else "−∞")
            continue
        text = format(x, form).replace("%", " %")
        if not re.search("[1-9]", text):
            text = text.lstrip("+-")  # a zero has no sign
        # a true minus is as wide as a digit, so columns line up
        out.append(text if "e" in text else text.replace("-", "−"))
    return out


def show(x, kind: str = "plain") -> str:
    return texts([x], kind)[0]


def within(value, *keys) -> dict:
    """value[key][key]... if all are dicts, else {}: any part of a summary may be missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def words(name) -> str:
    return str(name).replace("_", " ")


def heading(key: str) -> str:
    return COLUMNS[key][0] if key in COLUMNS else words(key)


def unbroken(title: str) -> str:
    """The title with its unit, what stands behind a comma, in one piece."""
    name, comma, unit = title.partition(", ")
    return name + comma + unit.replace(" ", "\u00a0")


def kind_of(key: str) -> str:
    return COLUMNS[key][1] if key in COLUMNS else "plain"


def esc(x) -> str:
    # control characters other than white space may not appear in a page at all
    return html.escape(
        re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "�", str(x)), quote=True
    )


def from_markdown(text: str) -> str:
    """A cell of a docs table as HTML: code spans stay, links lose their address."""
    text = (
        re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
        .replace("\\*", "∗")
        .replace("**", "")
    )
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", esc(text))


def flat_items(value, prefix: str = "") -> list[tuple[str, object]]:
    """Nested JSON as (dotted key, value) rows."""
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value):
        pairs = list(enumerate(value))
    else:
        value = listed(value) if isinstance(value, list) else value
        return [(prefix, value)]
    return [
        row for key, v in pairs for row in flat_items(v, f"{prefix}.{key}".strip("."))
    ]


def thin(x: np.ndarray, y: np.ndarray, n: int, how: str = "mean"):
    """(x, y) in at most n buckets: each one's last x and its mean, last or least y."""
    k = max(1, -(-len(y) // n))
    if k == 1:
        return x, y
    start = np.arange(0, len(y), k)
    last = np.minimum(start + k, len(y)) - 1
    if how == "last":
        return x[last], y[last]
    if how == "min":
        return x[last], np.fmin.reduceat(y, start)
    ok = np.isfinite(y)
    count = np.add.reduceat(ok.astype(np.float64), start)
    total = np.add.reduceat(np.where(ok, y, 0.0), start)
    return x[last], np.divide(
        total, count, out=np.full(len(start), np.nan), where=count > 0
    )


def runs_of(mask: np.ndarray) -> list[tuple[int, int]]:
    """Half-open index ranges in which mask (n,) holds."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2], edges[1::2], strict=True))


def ordered(splits, last=None) -> list[str]:
    """Unseen data first: test, heldout, eval, train, then the others; `last` is the last."""
    first = [s for s in ("test", "heldout", "eval", "train") if s in splits]
    return sorted(dict.fromkeys([*first, *splits]), key=lambda s: s == last)


def color_of(name: str, i: int = 0) -> str:
    return COLORS.get(name, CYCLE[1 + (i + 2) % 7])  # the first is the agent's


def tone_of(split: str, i: int = 0) -> str:
    return TONES_OF_SPLITS[SPLITS.get(split, i) % len(TONES_OF_SPLITS)]


# -------------------------------------------------------------------------------------------- page
@dataclass
class Page:
    """Sections, figures and tables in reading order; lacks: what the files did not allow."""

    parts: list[str] = field(default_factory=list)
    sections: list[tuple[str, str]] = field(default_factory=list)
    lacks: list[tuple[str, str]] = field(default_factory=list)
    figures: dict = field(default_factory=dict)
    meanings: dict[str, Meaning] = field(default_factory=dict)

    def add(self, text: str):
        self.parts.append(text)

    def section(self, anchor: str, title: str, lead: str = ""):
        self.sections.append((anchor, title))
        lead = f'<p class="lead">{esc(lead)}</p>' if lead else ""
        self.add(f'<h2 id="{anchor}">{esc(title)}</h2>{lead}')

    def plot(
        self, name: str, title: str, fig, caption="", alt="", wide=False, metric=""
    ):
        """One figure with heading, legend and alternative text.

        Below it stand a sentence and the docs' row of a metric.
        """
        # SVG with real text: sharp on every screen, a tenth of a PNG; a date would change the bytes
        buffer = io.BytesIO()
        fig.savefig(buffer, format="svg", metadata={"Date": None}, dpi=150)
        self.figures[re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")] = fig
        data = base64.b64encode(buffer.getvalue()).decode()
        lines = [esc(caption)] if caption else []
        for label, text in zip(
            ("", "<b>Healthy</b>: ", "<b>If not</b>: "), self.meaning(metric)
        ):
            if text:
                lines.append(label + from_markdown(text))
        self.add(
            f"<figure{' class=wide' if wide else ''}><h3>{esc(title)}</h3>{legend_of(fig)}"
            f'<div class="scroll"><img alt="{esc(alt or title)}" '
            f'src="data:image/svg+xml;base64,{data}"></div>'
            f"<figcaption>{'<br>'.join(lines)}</figcaption></figure>"
        )

    def lack(self, what: str, why: str):
        self.lacks.append((what, why))

    def meaning(self, key: str) -> Meaning:
        """The docs' row of a metric, <...> standing for anything; a bare name is the last part."""
        for name, row in self.meanings.items():
            pattern = re.sub("<[^>]+>", "*", name)
            if "/" not in key and "alarm" not in name:
                pattern = pattern.rpartition("/")[2]
            if pattern != "*" and fnmatchcase(key, pattern):
                return row
        return Meaning("", "", "")

    def html(self, title: str) -> str:
        # sections are known only now: a run without traces has no link to them
        nav = "".join(f'<a href="#{a}">{esc(t)}</a>' for a, t in self.sections)
        body = "\n".join(self.parts).replace("<!--nav-->", f"<nav>{nav}</nav>", 1)
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f"<title>{esc(title)}</title>\n"
            '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
            f"<style>{CSS}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
        )


def handles_of(fig) -> dict:
    """{label: artist} of a figure's legend; {} if the figure has one of its own."""
    if fig.legends or any(ax.get_legend() for ax in fig.axes):
        return {}
    handles = {}
    for ax in fig.axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    return handles


def legend_of(fig) -> str:
    """The legend as HTML: as large as the page's text on every screen."""
    from matplotlib.colors import to_hex

    keys = []
    for label, handle in handles_of(fig).items():
        patch = getattr(handle, "patches", [handle])[0]
        line = hasattr(patch, "get_linestyle") and hasattr(patch, "get_color")
        color = patch.get_color() if line else np.ravel(patch.get_facecolor())[:3]
        dash = "dashed" if line and patch.get_linestyle() in ("--", ":", "-.") else "solid"
        style = f"border-top:3px {dash} {to_hex(color)}"
        if line and patch.get_marker() == "o" and patch.get_linestyle() == "None":
            style = f"border:4px solid {to_hex(color)};border-radius:50%;width:0"
        keys.append(f'<span><i style="{style}"></i>{esc(label)}</span>')
    return f'<div class="legend">{"".join(keys)}</div>' if keys else ""


def canvas(
    width: float,
    height: float,
    rows: int = 1,
    left=0.62,
    right=0.12,
    top=0.1,
    bottom=0.34,
    **kw,
):
    """A figure and its axes, margins in inches: constrained layout takes longer than drawing."""
    from matplotlib.figure import Figure

    fig = Figure((width, height))
    axes = fig.subplots(rows, 1, squeeze=False, **kw)[:, 0]
    fig.subplots_adjust(
        left / width, bottom / height, 1 - right / width, 1 - top / height, hspace=0.12
    )
    return fig, axes


def step_axis(ax, count: int = 5):
    """Transitions as 250k or 1.5M; call it after plotting."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(count, integer=True))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_xlabel("transitions")
    # a run that ended before its second log point has one place on the axis, not a range of
    # thousandths
    if ax.dataLim.width == 0:
        ax.set_xticks([ax.dataLim.x0])


def curve(ax, x, y, n: int = 250, **kw):
    """A series as a line of bucket means, with dots where the points are few."""
    x, y = thin(x, y, n)
    ax.plot(x, y, marker="o" if np.isfinite(y).sum() < 25 else None, ms=2.6, **kw)


def draw_curves(lines: dict, levels: dict, best_step: float):
    """One evaluated metric over global_step, a line a split.

    levels: horizontal references, {label: (value, colour)}.
    """
    fig, (ax,) = canvas(4.6, 2.7, left=0.75, bottom=0.45)
    for i, (name, (x, y)) in enumerate(lines.items()):
        curve(ax, x, y, color=tone_of(name, i), label=name)
    # before the reference lines, which would count as data
    step_axis(ax)
    for name, (y, color) in levels.items():
        ax.axhline(y, color=color, lw=1.0, ls="--", label=words(name))
    # NaN where no checkpoint was chosen
    if best_step == best_step:
        ax.axvline(best_step, color=INK, lw=0.9, ls=":", label="best checkpoint")
    return fig


def spark(x: np.ndarray, y: np.ndarray) -> str:
    """A series of bucket means as a small inline SVG, log scale where it spans decades."""
    x, y = thin(x, y, 150)
    ok = np.isfinite(y)
    # a series that falls by decades (alpha, losses) shows only its first points on a linear axis
    if y[ok].min() > 0 and y[ok].max() > 50 * y[ok].min():
        y = np.log(y, where=ok, out=y.copy())
    low, high = y[ok].min(), y[ok].max()
    down = 40 - 36 * (y - low) / (high - low) if high > low else np.full(len(y), 22.0)
    right = across(x)
    path = ""
    for start, stop in runs_of(ok):
        points = [f"{right[i]:.1f} {down[i]:.1f}" for i in range(start, stop)]
        path += f"M{'L'.join(points)}" + ("h2" if stop - start == 1 else "")
    return SPARK.format(f'<path d="{path}"/>')


def strip(x: np.ndarray, y: np.ndarray) -> str:
    """Red where y > 0, grey where it is 0: an alarm holds until the next log point."""
    step = x[-1] - x[-2] if len(x) > 1 else 1
    edges = across(np.append(x, x[-1] + step))
    paths = ""
    for mask, color in ((y == 0, GREY), (y > 0, RED)):
        spans = [
            f"M{edges[a]:.1f} 14H{edges[b]:.1f}V30H{edges[a]:.1f}Z"
            for a, b in runs_of(mask)
        ]
        paths += f'<path style="fill:{color};stroke:none" d="{"".join(spans)}"/>'
    return SPARK.format(paths)


def across(x: np.ndarray) -> np.ndarray:
    # pre-training has no transitions: its points are counted instead
    x = np.arange(len(x)) if x[0] == x[-1] else x - x[0]
    return 4 + 212 * x / max(x[-1], 1)


# ---------------------------------------------------------------------------------------- sections
def title_of(run: Record) -> str:
    name, data = str(run.args.get("exp_name") or "run"), within(run.summary, "data")
    for what in (run.args.get("data"), data.get("spec"), run.args.get("env_fn")):
        if what:
            return f"{name} on {what}"
    return name


def facts_of(run: Record) -> dict:
    """What one asks first about a run: when, on what, with which code."""
    summary = run.summary
    data, device = within(summary, "data"), within(summary, "device")
    hardware = [device.get(k) for k in ("torch", "backend", "precision")]
    versions = within(summary, "versions")
    return {
        "began": summary.get("began"),
        "commit": summary.get("commit"),
        "seed": run.args.get("seed"),
        "on": listed(list(dict.fromkeys(h for h in hardware if h))),
        "bars of": listed(data.get("names")),
        "input sha256": listed(data.get("sha256"), 8),
        "with": listed([f"{k} {v}" for k, v in versions.items()]),
    }


def listed(value, length: int | None = None) -> str:
    """One or several names, each cut to a length."""
    values = value if isinstance(value, list) else [value or ""]
    return ", ".join(str(v)[:length] for v in values)


def add_header(page: Page, run: Record):
    """Title, facts, status, verdict with reasons, command, and the numbers one asks for first."""
    summary, audit = run.summary, within(run.summary, "audit")
    page.add(f"<h1>{esc(title_of(run))}</h1>")
    facts = " · ".join(f"{k} {v}" for k, v in facts_of(run).items() if v or v == 0)
    page.add(f'<p class="soft">{esc(facts)}</p><div class="chips">')
    for kind, source in (("status", summary), ("verdict", audit)):
        value = str(source.get(kind) or "unknown")
        page.add(
            f'<span class="chip {TONES.get(value, "plain")}">'
            f"{kind} <b>{esc(words(value))}</b></span>"
        )
    page.add("</div>")
    reasons = "".join(f"<li>{esc(r)}</li>" for r in audit.get("reasons") or [])
    page.add(f'<ul class="reasons">{reasons}</ul>')
    if summary.get("command"):
        page.add(f"<pre>{esc(summary['command'])}</pre>")
    page.add('<div class="tiles">')
    for i, (label, value, small) in enumerate(tiles_of(run)):
        page.add(
            f'<div class="tile{"" if i else " main"}"><span class="of">{esc(label)}</span>'
            f"<b>{esc(value)}</b><span>{esc(small)}</span></div>"
        )
    page.add("</div><!--nav-->")
    if summary.get("updates") == 0:
        page.add(
            '<p class="note">No gradient update was made: below is the agent as it was born.</p>'
        )


def best_two(rows: dict, key: str) -> list[str]:
    """The two of the agent's rivals whose metric `key` is best: lowest delay, else highest."""
    rivals = [k for k in rows if k not in ("agent", "actor", "critic_grid")]
    rivals = [k for k in rivals if np.isfinite(number(rows[k].get(key)))]
    sign = 1 if key == "delay_veh_s" else -1
    return sorted(rivals, key=lambda k: sign * rows[k][key])[:2]


def goals_of(agent: dict) -> list[str]:
    keys = [k for k in GOALS if np.isfinite(number(agent.get(k)))]
    # on a network the return is minus the delay: one of them is enough
    if number(agent.get("episode_return")) == -number(agent.get("delay_veh_s")):
        keys.remove("episode_return")
    return keys


def tiles_of(run: Record) -> list[tuple[str, str, str]]:
    """(label, value, small print): results on unseen data, then what they took."""
    summary, tiles = run.summary, []
    splits = ordered(within(summary, "eval"), summary.get("selected_by"))
    split = next((s for s in splits if within(summary, "eval", s)), "")
    rows = table_rows(within(summary, "eval", split))
    for key in goals_of(rows.get("agent", {}))[:3]:
        title, kind = COLUMNS[key]
        rivals = [f"{words(k)} {show(rows[k][key], kind)}" for k in best_two(rows, key)]
        label = f"{split}: {title.replace(', bp / bar', ' bp')}"
        tiles.append((label, show(rows["agent"][key], kind), " · ".join(rivals)))
    limit = run.args.get("timeout")
    limit = f"limit {show(limit)} s" if limit else "no limit"
    ratio = show(summary.get("samples_per_transition"), "share")
    speed = show(summary.get("sps"), "int")
    for label, key, small in (
        ("gradient updates", "updates", f"{ratio} rows a transition"),
        ("transitions", "global_step", "" if speed in ("–", "0") else f"{speed} a second"),
        ("wall clock, s", "wall_seconds", limit),
    ):
        tiles.append((label, show(summary.get(key), "int"), small))
    return tiles


def dicts_of(value: dict) -> dict[str, dict]:
    return {k: v for k, v in value.items() if isinstance(v, dict)}


def table_rows(result: dict) -> dict[str, dict]:
    """{who: metrics} of one split, known names first; everyone gets a score if the agent has."""
    agent = within(result, "agent")
    rows = dicts_of(result)
    baselines = dicts_of(rows.pop("baselines", {}))
    rows.pop("symbols", None)
    # the policy that acts is the agent: the same numbers twice would only be noise
    rows = {k: v for k, v in rows.items() if k == "agent" or v != agent} | baselines
    mean = {k: number(v.get("mean_expected_bps")) for k, v in rows.items()}
    flat = mean.get("flat", np.nan)
    span = mean.get("optimum", np.nan) - flat
    if np.isfinite(number(agent.get("score"))) and span > 0:
        rows = {k: {"score": (mean[k] - flat) / span} | v for k, v in rows.items()}
    return {k: rows[k] for k in [*POLICIES, *rows] if k in rows}


def columns_of(blocks: dict[str, dict[str, dict]]) -> list[str]:
    """Keys that hold a number anywhere in {block: {who: metrics}}, in reading order."""
    keys = {}
    for rows in blocks.values():
        for metrics in rows.values():
            keys |= {k: v for k, v in metrics.items() if not np.isnan(number(v))}
    return [k for k in COLUMNS if k in keys] + [k for k in keys if k not in COLUMNS]


def add_scores(
    page: Page,
    blocks: dict[str, dict[str, dict]],
    notes: dict[str, str] | None = None,
    policies: bool = True,
):
    """One table, a block a split, a row for everyone; the columns are those of all blocks.

    policies: rows are policies, which have colours.
    """
    keys = columns_of(blocks)
    everyone = [metrics for rows in blocks.values() for metrics in rows.values()]
    cells = zip(*(texts([m.get(k) for m in everyone], kind_of(k)) for k in keys))
    head = "".join(f"<th>{esc(unbroken(heading(k)))}</th>" for k in keys)
    page.add(
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>'
    )
    for block, rows in blocks.items():
        if notes is not None:
            note = f'<span class="rows">{esc(notes.get(block, ""))}</span>'
            page.add(
                f'<tr class="split"><th>{esc(block)}</th><th colspan="{len(keys)}">{note}</th></tr>'
            )
        for i, name in enumerate(rows):
            dot = f'<i class="dot" style="background:{color_of(name, i)}"></i>' * policies
            who = f"{dot}{esc(words(name))}"
            data = "".join(f"<td>{esc(text)}</td>" for text in next(cells))
            page.add(
                f"<tr{' class=agent' if name == 'agent' else ''}><th>{who}</th>{data}</tr>"
            )
    page.add("</tbody></table></div>")


def add_table(page: Page, run: Record):
    """Everyone beside everyone, a block a split."""
    results = within(run.summary, "eval")
    chosen = run.summary.get("selected_by")
    blocks = {s: table_rows(within(results, s)) for s in ordered(results, chosen)}
    if not columns_of(blocks):
        page.lack("the table of scores", "summary.json has no eval.<split>.agent")
        return
    lead = (
        "The best checkpoint is chosen on {}; the splits above it are the honest ones."
    )
    lead = lead.format(chosen if chosen in results else "eval")
    page.section("table", "Agent beside baselines", lead)
    notes = {split: note_of(within(results, split)) for split in blocks}
    add_scores(page, blocks, notes)


def note_of(result: dict) -> str:
    """Which rows a split has, and whether time cut it."""
    notes = ["PARTIAL: time ran out"] if result.get("partial") else []
    rows = result.get("rows")
    if isinstance(rows, list) and rows and isinstance(rows[0], int):
        notes.append(f"rows {rows[0]:,} to {rows[1] - 1:,}")
    return ", ".join(notes)


def eval_curves(metrics: dict) -> dict[str, dict]:
    """{metric: {split: (x, y)}} of the keys eval/<split>/<metric>."""
    curves = {}
    for key, series in metrics.items():
        group, _, rest = key.partition("/")
        split, _, metric = rest.partition("/")
        if group == "eval" and metric:
            curves.setdefault(metric, {})[split] = series
    return {k: curves[k] for k in [*COLUMNS, *curves] if k in curves}


def add_learning(page: Page, run: Record, most: int = 4) -> dict:
    """Evaluations over training; returns the evaluated metrics that got no figure."""
    curves = eval_curves(run.metrics)
    if not curves:
        page.lack("learning curves", "metrics.jsonl has no eval/<split>/<metric>")
        return {}
    results, chosen = within(run.summary, "eval"), run.summary.get("selected_by")
    split = chosen if chosen in results else "eval"
    rows = table_rows(within(results, split))
    best_step = number(run.summary.get("best_step"))
    lead = "The x axis is environment transitions everywhere."
    page.section("learning", "Learning", lead)
    page.add('<div class="grid">')
    goals = [k for k in goals_of(rows.get("agent", {})) if k in curves]
    for key in (goals or list(curves))[:most]:
        levels = {}
        for name in best_two(rows, key):
            color = color_of(name, list(rows).index(name))  # as in the table
            levels[f"{name}, {split}"] = rows[name][key], color
        fig = draw_curves(curves.pop(key), levels, best_step)
        title = f"{heading(key)}: evaluations"
        page.plot(f"curve_{key}", title, fig, metric=f"eval/{split}/{key}")
    page.add("</div>")
    return curves


def add_rows(page: Page, title: str, rows: list[tuple], unfolded: bool):
    """A folded table of (metric, curve as HTML, value, small print) beside the docs' words."""
    page.add(
        f"<details{' open' if unfolded else ''}><summary>{esc(title)}</summary>"
        '<table class="health"><thead><tr><th>metric</th><th></th><th>last</th>'
        "<th>healthy</th><th>if not</th></tr></thead><tbody>"
    )
    for key, curve_html, value, small in rows:
        row = page.meaning(key)
        name, formula = words(key.split("/", 1)[-1]), from_markdown(row.formula)
        page.add(
            f'<tr><th><b>{esc(name)}</b><span class="soft">{formula}</span></th>'
            f"<td>{curve_html}</td>"
            f'<td>{esc(value)}<br><span class="soft">{esc(small)}</span></td>'
            f'<td title="healthy">{from_markdown(row.healthy)}</td>'
            f'<td title="if not">{from_markdown(row.action)}</td></tr>'
        )
    page.add("</tbody></table></details>")


def series_row(key: str, x: np.ndarray, y: np.ndarray) -> tuple:
    """A row of add_rows for one logged metric."""
    ok = y[np.isfinite(y)]
    if not len(ok):
        return key, "", "–", "all null"
    if key.startswith("alarm/"):
        share = show(100 * np.mean(ok > 0), "int")
        return key, strip(x, y), show(y[-1], "int"), f"{share} % of log points"
    # each with digits of its own: a loss that fell by decades did not end at 0.0000
    last, low, high = map(show, (y[-1], ok.min(), ok.max()))
    drawn = spark(x, y) if len(ok) > 1 else ""
    return key, drawn, last, f"{low} to {high}" if low != high else ""


def add_health(page: Page, run: Record, curves: dict):
    """Every logged metric, the audit's numbers, the time by phase, beside the docs' words."""
    lead = "Small curves run over all transitions; below the last value, the range."
    page.section("health", "Health", lead)
    groups = {}
    # in the order of the docs
    for key in dict.fromkeys([*page.meanings, *run.metrics]):
        group = key.split("/")[0] if "/" in key else ""
        if key in run.metrics and group not in ("eval", "time"):
            row = series_row(key, *run.metrics[key])
            groups.setdefault(group if group in GROUPS else "", []).append(row)
    for key, lines in curves.items():
        for split, series in lines.items():
            row = series_row(f"eval/{split}/{key}", *series)
            groups.setdefault("eval", []).append(row)
    for group, (title, unfolded) in GROUPS.items():
        if group in groups:
            add_rows(page, title, groups[group], unfolded)
        elif group in ("losses", "policy", "value"):
            page.lack(f"{group} over training", f"metrics.jsonl has no {group}/ key")
    audit = dict(within(run.summary, "audit"))
    for key in ("verdict", "reasons", "w_cost_sweep"):  # they stand elsewhere on the page
        audit.pop(key, None)
    rows = [(k.replace(".", "_"), "", show(v), "") for k, v in flat_items(audit) if k]
    if rows:
        add_rows(page, "The audit's numbers", rows, True)
    else:
        page.lack("the audit's numbers", "summary.json has no audit")
    add_phases(page, within(run.summary, "phases"))


def add_phases(page: Page, phases: dict):
    seconds = {str(k): number(v) for k, v in phases.items()}
    total = np.nansum(list(seconds.values()))
    if not total > 0:
        page.lack("time by phase", "summary.json has no phases")
        return
    rows = []
    for name in sorted(seconds, key=lambda k: -np.nan_to_num(seconds[k])):
        share = 100 * np.nan_to_num(seconds[name]) / total
        bar = f'<i class="bar" style="width:{share:.1f}%"></i>'
        rows.append((f"time/{name}", bar, f"{seconds[name]:.1f} s", f"{share:.0f} %"))
    add_rows(page, f"Where {total:.0f} seconds went", rows, True)


def add_pairs(page: Page, title: str, pairs: list[tuple[str, object]]):
    """A folded table of keys and values."""
    page.add(f'<details><summary>{esc(title)}</summary><table class="kv">')
    for key, value in pairs:
        if isinstance(value, float):
            value = f"{value:.6g}"  # a flag has the digits that one gave it
        text = "–" if value is None else value
        page.add(f"<tr><th>{esc(key)}</th><td>{esc(text)}</td></tr>")
    page.add("</table></details>")


def add_others(page: Page, run: Record, known, most: int = 24):
    """Small curves of the trace columns without a figure; known(column): it has one."""
    rows = []
    for split in ordered(run.traces):
        for name, y in run.traces[split].items():
            if y.dtype.kind == "f" and not known(name):
                key, *rest = series_row(name, np.arange(len(y)), y)
                rows.append((f"{split}/{split}: {key}", *rest))
    if rows:
        page.section("traces", "Other columns of the traces")
        add_rows(page, "Over the rows of their file", rows[:most], True)
    if len(rows) > most:
        page.lack(f"{len(rows) - most} more trace columns", f"only {most} are drawn")


def add_details(page: Page, run: Record):
    """What ran, on what; and what this page could not show."""
    page.section("details", "Details")
    elsewhere = ("eval", "audit", "phases")
    rest = {k: v for k, v in run.summary.items() if k not in elsewhere}
    rest.pop("shapes", None)  # thousands of numbers
    add_pairs(page, "Flags (args.json)", flat_items(run.args))
    add_pairs(page, "Run (summary.json)", flat_items(rest))
    for note in run.notes:
        page.add(f'<p class="note">{esc(note)}</p>')
    if page.lacks:
        rows = "".join(
            f"<li><b>{esc(what)}</b>: {esc(why)}</li>" for what, why in page.lacks
        )
        lead = "Not on this page, because the files do not hold it:"
        page.add(f'<div class="note" id="missing">{lead}<ul>{rows}</ul></div>')


# -------------------------------------------------------------------------------------------- main
def part_of(run: Record):
    """The module that draws this run's traces, by what they and the evaluations hold."""
    names = {k.split("/")[-1] for k in run.metrics} | {
        c for t in run.traces.values() for c in t
    }
    if names & {"time_s", "delay_veh_s"}:
        from scripts import report_traffic as part
    else:
        from scripts import report_market as part
    return part


def build(run: Record) -> Page:
    """The page; a function of `run` alone: no clock, no path, no chance."""
    import matplotlib

    part = part_of(run)
    page = Page(meanings=run.meanings)
    # a context, so that a caller's own figures keep their style
    with matplotlib.rc_context(RC):
        add_header(page, run)
        add_table(page, run)
        part.add_traces(page, run)
        rest = add_learning(page, run)
        add_health(page, run, rest)
        add_others(page, run, part.has_figure)
        add_details(page, run)
    return page


def write_figures(page: Page, folder: Path):
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(RC):
        for name, fig in page.figures.items():
            handles = handles_of(fig)
            if handles:
                place = dict(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncol=4)
                fig.legend(handles.values(), handles, **place)
            fig.savefig(folder / f"{name}.png", dpi=160, bbox_inches="tight")


def main(argv: list[str] | None = None) -> Path:
    """Write RUN_DIR/report.html, return its path; a missing or broken file raises ReportError."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = lambda message: parser.exit(2, f"report: {message}\n")
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", type=Path, help="directory of one run"
    )
    parser.add_argument(
        "--figures",
        metavar="DIR",
        type=Path,
        help="also write every figure as DIR/<name>.png",
    )
    args = parser.parse_args(argv)
    run = read_run(args.run_dir)
    page = build(run)
    path = args.run_dir / "report.html"
    # replaced in one go: a reader never meets half a page, and a full disk keeps the old one
    part = path.with_suffix(".html.tmp")
    part.write_text(page.html(title_of(run)), encoding="utf-8", newline="\n")
    os.replace(part, path)
    if args.figures:
        write_figures(page, args.figures)
    return path


def program(argv: list[str] | None = None) -> int:
    """main() with its exit code and one line: the page's path, or what is wrong."""
    try:
        print(main(argv))
    except ReportError as e:
        print(f"report: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"report: {e.filename}: {e.strerror}", file=sys.stderr)
        return 2
    except Exception as e:  # a bug: the run that waits for the page shows one line
        place = traceback.extract_tb(e.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        print(
            f"report: {type(e).__name__} at {where}: {' '.join(str(e).split())[:300]}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    from scripts import report  # the parts import this module by its name

    sys.exit(report.program())
