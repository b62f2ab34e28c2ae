#!/usr/bin/env python3
"""Draw one run directory as one self-contained page.

    python scripts/report.py runs/NAME                  # writes runs/NAME/report.html
    python scripts/report.py runs/NAME --figures docs/  # and every plot as a PNG file

It reads args.json, metrics.jsonl, summary.json and traces/*.parquet of that directory and nothing else, so a
run that lost its report can make it again: the same files give the same bytes. What the files do not hold is
listed at the end of the page, never guessed. A missing or broken file: one line on stderr, exit code 2.
"""

import argparse
import base64
import glob
import html
import io
import json
import os
import re
import shlex
import sys
from dataclasses import dataclass, field

import numpy as np

# ------------------------------------------------------------------------------------------------- vocabulary
POLICIES = ("agent", "critic_grid", "actor", "optimum", "buy_and_hold", "best_constant",
            "random_same_turnover", "flat")
# Okabe-Ito tones: told apart by colour-blind readers, dark enough on white
COLORS = {
    "agent": "#0b62b5", "actor": "#c2591a", "critic_grid": "#c2591a", "optimum": "#138a5e",
    "buy_and_hold": "#4b5563", "best_constant": "#a97c00", "random_same_turnover": "#a3acb9",
    "flat": "#1f2937",
}
CYCLE = ("#0b62b5", "#c2591a", "#138a5e", "#a8487f", "#a97c00", "#3a9fd0", "#4b5563", "#7a4fb5")
LONG, SHORT, RED, GREY, INK = "#0b62b5", "#d1622b", "#c62f2f", "#e5e8ec", "#1b2430"
REGIMES = ("#0b62b5", "#c2591a", "#138a5e", "#a8487f")
STYLE = {"agent": dict(lw=1.9, zorder=6), "optimum": dict(lw=1.3, ls=(0, (4, 2)), zorder=5),
         "flat": dict(lw=0.8, ls=":"), "actor": dict(lw=1.2, zorder=4), "critic_grid": dict(lw=1.2, zorder=4)}
# drawn together over time_s
EPISODE = re.compile(r"(rho|v|action)_\d+|phase_.+|(in|out)side_veh|reward")
FREEWAY_M = 500.0  # of the scenario freeway
TRACE_COLUMNS = {"timestamp", "close", "next_return", "position", "equity", "expected", "signal", "regime", "time_s"}

# key of summary.json -> (heading, format kind); keys that are not here follow in the file's order
COLUMNS = {
    "score": ("score", "score"),
    "mean_expected_bps": ("expected, bp / bar", "bps"),
    "mean_reward_bps": ("realised, bp / bar", "bps"),
    "total_return": ("total return", "return"),
    "sharpe": ("Sharpe, a year", "bps"),
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
# shown in the header where the run did not record its command line
FLAGS = ("data", "scenario", "policy", "ent_coef", "total_timesteps", "timeout", "checkpoint", "seed")
CURVES = ("score", "mean_expected_bps", "mean_reward_bps", "episode_return", "delay_veh_s", "turnover",
          "mean_speed", "throughput_veh", "switches")
TILES = ("score", "mean_expected_bps", "mean_reward_bps", "sharpe", "episode_return", "delay_veh_s", "mean_speed",
         "throughput_veh")

# last part of a metric's (or audit number's) name -> how a healthy one looks, in one sentence
HEALTHY = {
    "score": "Climbs towards 1 (the optimum) and stays; if train rises while eval falls, it is overfitting.",
    "mean_expected_bps": "Climbs above 0 and levels off below the optimum; eval and train move together.",
    "mean_reward_bps": "Climbs on eval too; it is noisier than the expected reward, so look at the trend.",
    "total_return": "Follows the mean reward.",
    "episode_return": "Climbs, then levels off above the baselines.",
    "delay_veh_s": "On a network falls below the baselines; on the freeway it hardly answers to control.",
    "throughput_veh": "Level or rising; lower than the baselines' means that traffic is held back.",
    "mean_speed": "Level or rising; a fall while the delay grows is congestion.",
    "switches": "Freeway: half the sum of |change of action|, falls with the noise. Networks: phase changes of all "
    "junctions; near the most that all-red and minimum green allow, the signals flicker.",
    "std": "The spread between a split's cases, not the agent's; 0 where there is one case.",
    "turnover": "High while it explores, then falls to what the edge can pay for.",
    "exposure": "Moves around the market's own drift; glued to -1 or +1 means a constant policy.",
    "episodic_return": "Climbs, then levels off (it includes exploration noise).",
    "episodic_length": "Constant where a time limit ends every episode.",
    "SPS": "Flat after warm-up; a long decline means something grows.",
    "updates": "Rises in a straight line; 0 means nothing was learned.",
    "replay_ratio": "Settles at the value the flags imply (updates a transition).",
    "samples_per_transition": "Settles at 2 or more rows drawn a transition.",
    "learning_rate": "Follows its schedule.",
    "grad_norm": "Falls early, then flat without spikes.",
    "critic_loss": "Falls, then flat; steady growth means divergence.",
    "qf_loss": "Falls, then flat; steady growth means divergence.",
    "actor_loss": "Drifts to minus the Q value and levels off; its sign has no meaning.",
    "alpha_loss": "Hovers around 0 once alpha has settled.",
    "mae": "Falls quickly, then slowly, and is still above 0.",
    "value_loss": "Falls, then flat.",
    "policy_loss": "Small, around 0, without trend.",
    "approx_kl": "Below about 0.02.",
    "clipfrac": "Below 0.2, and falling with the learning rate.",
    "explained_variance": "Climbs towards 1.",
    "entropy": "Falls from its start and settles near the target; it belongs to the sampling policy.",
    "policy_entropy": "Finite: near the target entropy, far from the start.",
    "log_std_mean": "Falls slowly from its start; exp of it should end well below 0.9.",
    "sigma": "Falls below 0.9.",
    "alpha": "Leaves its initial value within some hundred updates and ends small.",
    "alpha_entropy": "Small beside q_action_spread.",
    "action_mean": "Moves around; glued to -1 or +1 means a constant policy.",
    "state_dependence": "Well above 0: at one fixed position the greedy action still moves with the market.",
    "saturation": "Below 1: not every action sits at the limit (bang-bang is right where costs are low).",
    "attribution": "The market groups (technical, hmm) above 0: how far the action moves if shuffled.",
    "greedy_gap": "Finite and steady: greedy and sampled actions agree up to exploration.",
    "v_mean": "Of the order of reward / (1 - gamma); runaway growth is divergence.",
    "q_mean": "Of the order of reward / (1 - gamma); runaway growth is divergence.",
    "q_action_spread": "Well above alpha: 10 to 60 times alpha is usual, below 2 the actions are noise.",
    "quantile_spread": "Above 0, about the scale of the return's noise; collapse to 0 is a dead critic.",
    "overestimation": "Around 0; steady growth means Q promises more than rewards deliver.",
    "cost_slope": "Near 1: the critic charges a change of position what it costs.",
    "dead_units": "Near 0.",
    "costs": "Falls as churn stops; above the earnings it eats the edge.",
    "max_cfl": "1 or less: above it the scheme is unstable.",
    "mass_error": "At round-off: 1e-5 or less in float32, 1e-10 or less in float64.",
    "floor_veh": "0: nothing had to be added to an empty road, or cut from a jammed one.",
    "ridge_edge_bps": "More than 2 standard errors above 0: there is more to learn than a constant position.",
    "clipped_rewards": "Below 0.05.",
}
ALARMS = {
    "q_spread_over_alpha": "Q spread over actions < 2 alpha",
    "entropy_over_reward": "entropy term larger than reward",
    "samples_per_transition": "fewer than 2 rows drawn a transition",
    "sigma": "exploration sigma > 0.9",
    "clipped_rewards": "more than 5 % of rewards clipped",
    "greedy_over_sampled": "greedy actions hardly vary (< 0.1 of sampled)",
}
# one sentence under every plot that is not one metric's
SENTENCES = {
    "equity": "Healthy: the blue line climbs steadily above the baselines, most of the way to the "
    "green optimum, and its drawdowns are shallower and shorter than those of buy and hold.",
    "equity_real": "Healthy: the blue line climbs steadily above the baselines on both splits, and its "
    "drawdowns are shallower and shorter than those of buy and hold.",
    "positions": "Healthy: positions change with the market, are held for many bars and follow the "
    "optimum where it is known; one flat block of colour is a constant policy, a comb is "
    "churn.",
    "band": "Blue is long, orange short, white flat. Healthy: the agent's stripe has the optimum's "
    "rhythm (where known); one colour from end to end is a constant policy.",
    "histogram": "Healthy: more than one position, alike on every split; a single spike is a constant "
    "policy.",
    "signal": "Healthy: a slope, of the other sign in the regime that flips the signal, close to the "
    "dashed optimum; a flat line ignores the signal.",
    "expected": "Healthy: one rising curve in every regime, short on the left and long on the right.",
    "past": "Healthy: any clear slope or bend (up is trend following, down is reversal); a flat "
    "line means that it does not react to this.",
    "costs": "Healthy: costs eat a minor part of what is earned before them; if what is left falls "
    "while the grey line climbs, it trades too much.",
    "q_spread": "Healthy: the blue spread ends 10 to 60 times above alpha and far above alpha × "
    "|entropy|; below them the policy is paid for being random and collapses.",
    "reaction": "Healthy: state dependence (how far the greedy action moves with the market at "
    "one fixed position) is well above 0, saturation is below 1, few units are dead.",
    "alarms": "Healthy: red at most at the beginning (alpha starts high, exploration starts wide) and "
    "grey at the end; the number is the share of log points at which the alarm was raised.",
    "attribution": "Healthy: the market groups (technical, hmm) are well above 0; if only position counts, "
    "the agent just stays where it is.",
    "phases": "Healthy: learn is the longest bar; together they are the wall clock.",
    "trace_q_spread": "Healthy: many times alpha at every bar; where it sinks, the agent sees little to "
    "choose.",
}
# the same keys where the run is no market's
ROAD = {
    "place": "the state of the road",
    "healthy": "the policy reacts to the state of the road",
    "collapsed": "the policy does not react to the state of the road",
    "constant_is_right": "no baseline gains on a constant action: a constant policy is the right answer",
    "entropy": "Falls slowly from its start, not at once; it belongs to the sampling policy.",
    "state_dependence": "Well above 0.01: the greedy action moves with the state of the road.",
    "saturation": "Below 0.01: few greedy actions lie beyond the actuator's range (0 where actions are discrete).",
    "reaction": "Healthy: state dependence (how far the greedy action moves) is well above 0.01, saturation near 0.",
    "phases": "Healthy: rollout and learn are the longest bars; together they are the wall clock.",
    "road": "Dark is dense and slow; traffic drives upwards. Healthy: the stripes (stop-and-go waves) fade early and "
    "stay away, the action returns to 0 (1 is a flux 20 % above the steady one) and the reward rises to its best.",
    "network": "Healthy: nobody waits outside for long, the vehicles inside level off, and every junction keeps "
    "changing its colour; one colour from end to end lets the others starve.",
    "episode": "Healthy: the action answers to what happens; a flat line is a constant policy.",
}
LEADS = {
    "table": "Same bars, same costs. Nobody trained on test and eval; the best checkpoint is "
    "picked on eval, so test is the honest one.",
    "cases": "Same cases for everyone. The best checkpoint is picked on {}; the other splits are the honest ones.",
    "score": " Score is the share of what the optimum earns.",
    "learning": "The x axis is environment transitions everywhere.",
}
# first part of a metric's name -> title of its box, in reading order
GROUPS = {"losses": "Losses", "policy": "Policy", "value": "Values", "env": "Environment", "charts": "Charts",
          "eval": "More of the evaluations", "time": "Time", "": "Everything else that was logged"}
TONES = {
    "finished": "good", "timeout": "good", "interrupted": "warn",
    "healthy": "good", "collapsed": "bad", "constant_is_right": "calm", "untrained": "warn",
}
MEANING = {
    "finished": "all transitions done",
    "timeout": "ended by its own deadline, everything saved",
    "interrupted": "stopped from outside, checkpoint saved",
    "healthy": "the policy reacts to the market",
    "collapsed": "the policy does not react to the market",
    "constant_is_right": "no edge beyond a constant position: a constant policy is the right answer",
    "untrained": "no gradient updates, or too few to judge",
}
CSS = """
:root{--ink:#1b2430;--soft:#5a6675;--line:#e3e7ec;--wash:#f6f8fa;--blue:#0b62b5}
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:#fff;color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",
Arial,sans-serif}
main{max-width:1160px;margin:0 auto;padding:28px 20px 64px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 4px;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:1.22rem;margin:52px 0 4px;letter-spacing:-.01em}
h3{font-size:.98rem;margin:0 0 6px;font-weight:620;overflow-wrap:anywhere}
p{margin:0 0 10px}.soft,figcaption,.note{color:var(--soft)}
.lead{color:var(--soft);max-width:74ch}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.86em}
pre{background:var(--wash);border:1px solid var(--line);border-radius:8px;padding:10px 12px;margin:14px 0;
white-space:pre-wrap;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:18px 0 0;padding:9px 0;border-top:1px solid var(--line);
border-bottom:1px solid var(--line);font-size:.9rem}
nav a{color:var(--blue);text-decoration:none}nav a:hover{text-decoration:underline}
.chips{display:flex;flex-wrap:wrap;gap:8px;margin:14px 0 6px}
.chip{border-radius:99px;padding:3px 12px;font-size:.9rem;border:1px solid}
.good{background:#e9f7ef;border-color:#b5dfc7;color:#0d5c37}
.bad{background:#fdecec;border-color:#f3bcbc;color:#94201f}
.warn{background:#fff6e2;border-color:#efd695;color:#755102}
.calm{background:#eaf3fc;border-color:#b9d7f3;color:#0b4f91}
.plain{background:var(--wash);border-color:var(--line);color:var(--ink)}
.reasons{margin:8px 0 0;padding-left:20px;max-width:88ch}.reasons li{margin:2px 0;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,
minmax(min(100%,165px),1fr));gap:12px;margin:20px 0 0}
.tile{border:1px solid var(--line);border-radius:12px;padding:12px 14px 10px}
.tile b{display:block;font-size:1.65rem;line-height:1.15;font-weight:650;letter-spacing:-.02em;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.tile span{display:block;font-size:.82rem;color:var(--soft)}.tile .of{color:var(--ink)}
.tile.main{background:#eef5fc;border-color:#c5dcf3}.tile.main b{color:var(--blue)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,
minmax(min(100%,460px),1fr));gap:26px 30px;margin-top:16px}
.minis{display:grid;grid-template-columns:repeat(auto-fill,
minmax(min(100%,230px),1fr));gap:22px 20px;margin-top:14px}
figure{margin:0;min-width:0}figure img{display:block;width:100%;height:auto}
figcaption{font-size:.88rem;line-height:1.45;margin-top:4px;max-width:84ch}.minis figcaption{font-size:.78rem}
.minis h3{font-size:.84rem;margin-bottom:2px}
.wide{grid-column:1/-1}.scroll{overflow-x:auto}.wide .scroll img{min-width:640px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem;width:100%}
th,td{padding:4px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
thead th{font-weight:550;color:var(--soft);font-size:.8rem;vertical-align:bottom;
white-space:normal;min-width:64px}
tbody th{text-align:left;font-weight:450;position:sticky;left:0;background:#fff}
tr.split th{padding-top:20px;font-weight:650;color:var(--ink);border-bottom:2px solid var(--ink)}
.rows{font-weight:400;color:var(--soft);font-size:.82rem}
tr.agent td,tr.agent th{background:#eef5fc;font-weight:620}
i.dot{display:inline-block;width:.72em;height:.72em;border-radius:3px;margin-right:8px}
table.kv{table-layout:fixed}table.kv th,table.kv td{text-align:left;white-space:normal;overflow-wrap:anywhere;
vertical-align:top;padding:4px 10px 4px 0}
table.kv th{width:38%;font-weight:450;color:var(--soft)}
details{border:1px solid var(--line);border-radius:10px;padding:10px 14px;margin-top:14px}
summary{cursor:pointer;font-weight:600}details[open] summary{margin-bottom:8px}
.note{background:var(--wash);border-radius:8px;padding:8px 12px;font-size:.9rem;margin-top:12px}
@media(max-width:600px){main{padding:18px 14px 48px}h1{font-size:1.35rem}h2{margin-top:40px}
.tile b{font-size:1.35rem}
.tiles{grid-template-columns:1fr 1fr}.wide .scroll img{min-width:820px}
.minis{grid-template-columns:repeat(auto-fill,minmax(min(100%,200px),1fr))}
table{font-size:.82rem}th,td{padding:5px 7px}}
@media print{nav{display:none}figure{break-inside:avoid}}
"""
RC = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "font.family": "sans-serif", "font.size": 8.5,
    # names come from files: a lone $ would be a formula and stop the page
    "text.parse_math": False, "text.color": INK, "axes.labelcolor": "#5a6675", "axes.edgecolor": "#c4cbd4",
    "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#edf0f3", "grid.linewidth": 0.7, "xtick.color": "#5a6675",
    "ytick.color": "#5a6675", "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0,
    "ytick.minor.size": 0, "legend.frameon": False, "legend.fontsize": 8, "legend.handlelength": 1.4,
    "legend.columnspacing": 1.2, "lines.linewidth": 1.2, "date.converter": "concise",
    "path.simplify_threshold": 0.3, "axes.formatter.useoffset": False,
}


class ReportError(ValueError):
    """A run directory that cannot be drawn; the message is one line that names the file."""


# ------------------------------------------------------------------------------------------------------ input
@dataclass
class Run:
    """What a run directory holds: metrics maps a name to (steps, values), traces a split to its columns."""

    args: dict
    summary: dict
    metrics: dict[str, tuple[np.ndarray, np.ndarray]]
    traces: dict[str, dict[str, np.ndarray]]
    notes: list[str] = field(default_factory=list)


def read_json(path: str) -> dict:
    """One JSON object of a file; ReportError names the file (and line) if it is absent, cut or no object."""
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except FileNotFoundError:
        raise ReportError(f"{path}: missing; a run writes it when it ends (continue it: --resume)") from None
    except OSError as e:
        raise ReportError(f"{path}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError:
        raise ReportError(f"{path}: broken, not UTF-8 text") from None
    except json.JSONDecodeError as e:
        raise ReportError(f"{path}: broken JSON at line {e.lineno}, column {e.colno} ({e.msg})") from None
    if not isinstance(value, dict):
        raise ReportError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_metrics(path: str) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """metrics.jsonl as {name: (global_step int64, value float64)} and notes; null is NaN."""
    try:
        with open(path, encoding="utf-8") as f:
            lines = f.read().split("\n")
    except FileNotFoundError:
        raise ReportError(f"{path}: missing; it is the record of the run") from None
    except OSError as e:
        raise ReportError(f"{path}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError:
        raise ReportError(f"{path}: broken, not UTF-8 text") from None
    # a list a key: not every line logs every metric
    steps, values, notes = {}, {}, []
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            # a killed process leaves half a line, and only ever the last one
            if n == len(lines):
                notes.append(f"the last line of metrics.jsonl (line {n}) is cut off and was left out")
                continue
            raise ReportError(f"{path}: broken JSON at line {n}, column {e.colno} ({e.msg})") from None
        step = row.get("global_step") if isinstance(row, dict) else None
        if not isinstance(step, (int, float)) or step != step:
            raise ReportError(f"{path}: line {n} has no global_step")
        for key, value in row.items():
            if value is not None and not isinstance(value, (int, float)):
                kind = type(value).__name__
                raise ReportError(f"{path}: line {n}, {key} is a {kind}, expected a number or null")
            if key != "global_step":
                steps.setdefault(key, []).append(int(step))
                values.setdefault(key, []).append(np.nan if value is None else float(value))
    return {k: (np.array(steps[k], np.int64), np.array(values[k], np.float64)) for k in steps}, notes


def read_trace(path: str) -> dict[str, np.ndarray]:
    """Columns of one parquet file: numbers float64 (null is NaN), times datetime64[ns], text left out."""
    # pyarrow alone: pandas would double the time of a small report
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path).read()
    except (OSError, pa.ArrowException) as e:
        raise ReportError(f"{path}: broken parquet ({' '.join(str(e).split())[:120]})") from None
    out = {}
    for name in table.column_names:
        column = table[name]
        if pa.types.is_timestamp(column.type):
            out[name] = column.to_numpy().astype("datetime64[ns]")
        elif pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
            out[name] = column.to_numpy().astype(np.float64)
        elif pa.types.is_boolean(column.type):
            out[name] = column.cast(pa.int8()).to_numpy().astype(np.float64)
    return out


def load_run(run_dir: str) -> Run:
    """Everything the page is made of. Raises ReportError naming the first missing or broken file."""
    if not os.path.isdir(run_dir):
        raise ReportError(f"{run_dir}: no such run directory")
    args = read_json(os.path.join(run_dir, "args.json"))
    metrics, notes = read_metrics(os.path.join(run_dir, "metrics.jsonl"))
    summary = read_json(os.path.join(run_dir, "summary.json"))
    paths = sorted(glob.glob(os.path.join(glob.escape(run_dir), "traces", "*.parquet")))
    traces = {os.path.splitext(os.path.basename(p))[0]: read_trace(p) for p in paths}
    traces = {k: v for k, v in traces.items() if any(len(c) for c in v.values())}
    return Run(args, summary, metrics, traces, notes)


# ---------------------------------------------------------------------------------------------------- numbers
def number(x) -> float:
    """x as a float, NaN for null and for anything that is no number."""
    return float(x) if isinstance(x, (int, float)) else float("nan")


def show(x, kind: str = "plain") -> str:
    """A number as a reader wants it (kind: a format of COLUMNS); a dash for null and NaN."""
    x = number(x)
    if x != x:
        return "–"
    if abs(x) == float("inf"):
        return "∞" if x > 0 else "−∞"
    if kind == "return" and x > 9:
        text = f"× {1 + x:,.0f}"
    elif kind in ("percent", "return"):
        text = f"{100 * x:+.1f} %" if kind == "return" and abs(x) >= 5e-4 else f"{100 * x:.1f} %"
    elif kind == "int" or (kind == "plain" and x == int(x) and abs(x) < 1e15):
        text = f"{x:,.0f}"
    elif kind in ("score", "bps", "signed", "small"):
        text = format(x, {"score": ".2f", "bps": "+.2f", "signed": "+.2f", "small": ".3f"}[kind])
        if float(text) == 0:
            text = text.lstrip("+-")
    else:
        text = f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"
    # a true minus is as wide as a digit, so columns line up
    return text.replace("-", "−") if "e" not in text else text


def within(value, *keys) -> dict:
    """value[key][key]... if all of it are dicts, else an empty one: any part of a summary may be missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def words(name) -> str:
    return str(name).replace("_", " ")


def heading(key: str) -> str:
    return COLUMNS[key][0] if key in COLUMNS else words(key)


def own_words(run: Run) -> dict[str, str]:
    """ROAD for a run that names a scenario, less the road where a Gymnasium environment took its place, else {}."""
    own = ROAD if "scenario" in run.args else {}
    return {k: v.replace(" of the road", "") for k, v in own.items()} if run.args.get("env_id") else own


def best_two(base: dict, key: str) -> list[str]:
    """The two baselines whose metric `key` is best: lowest delay, else highest."""
    known = [k for k in base if np.isfinite(number(within(base, k).get(key)))]
    return sorted(known, key=lambda k: base[k][key] * (1 if key == "delay_veh_s" else -1))[:2]


def healthy(metric: str, own: dict) -> str:
    text = (HEALTHY | own).get(metric, "A clear trend, then level.")
    return f"Healthy: {text[0].lower()}{text[1:]}"


def esc(x) -> str:
    # control characters other than white space may not appear in a page at all
    return html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "�", str(x)), quote=True)


def flat_items(value, prefix: str = "") -> list[tuple[str, str]]:
    """Nested JSON as (dotted key, text) rows."""
    if isinstance(value, dict) and value:
        return [row for k, v in value.items() for row in flat_items(v, f"{prefix}.{k}" if prefix else str(k))]
    if isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value):
        return [row for i, v in enumerate(value) for row in flat_items(v, f"{prefix}[{i}]")]
    if isinstance(value, list):
        value = ", ".join(map(str, value)) or "none"
    if isinstance(value, float):
        value = show(value)
    return [(prefix, "–" if value is None else str(value))]


def thin(x: np.ndarray, y: np.ndarray, n: int, how: str = "mean"):
    """(x, y) in at most n buckets: each one's last x and its mean, last, min or max y (NaN if all are)."""
    k = max(1, -(-len(y) // n))
    if k == 1:
        return x, y
    start = np.arange(0, len(y), k)
    stop = np.minimum(start + k, len(y))
    if how == "last":
        return x[stop - 1], y[stop - 1]
    if how in ("min", "max"):
        return x[stop - 1], (np.fmin if how == "min" else np.fmax).reduceat(y, start)
    ok = np.isfinite(y)
    count = np.add.reduceat(ok.astype(np.float64), start)
    total = np.add.reduceat(np.where(ok, y, 0.0), start)
    return x[stop - 1], np.divide(total, count, out=np.full(len(start), np.nan), where=count > 0)


def runs_of(mask: np.ndarray) -> list[tuple[int, int]]:
    """Half-open index ranges in which mask (n,) holds."""
    edge = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return list(zip(edge[::2].tolist(), edge[1::2].tolist(), strict=True))


def policies_of(trace: dict, stem: str) -> dict[str, np.ndarray]:
    """{policy name: its column `stem` or `stem_<name>`}, known names first."""
    found = {"agent": trace[stem]} if stem in trace else {}
    found |= {k[len(stem) + 1 :]: v for k, v in trace.items() if k.startswith(stem + "_")}
    return {k: found[k] for k in [*POLICIES, *found] if k in found}


def ordered(splits, last=None) -> list[str]:
    """Unseen data first: test, heldout, eval, train, then the others as the file has them; `last` is the last."""
    out = [s for s in ("test", "heldout", "eval", "train") if s in splits]
    return sorted(out + [s for s in splits if s not in out], key=lambda s: s == last)


def color_of(name: str, i: int = 0) -> str:
    return COLORS.get(name, CYCLE[(i + 3) % len(CYCLE)])


# ------------------------------------------------------------------------------------------------------- page
@dataclass
class Page:
    """Sections and plots in reading order; `lacks` collects what the files did not allow."""

    parts: list[str] = field(default_factory=list)
    sections: list[tuple[str, str]] = field(default_factory=list)
    lacks: list[tuple[str, str]] = field(default_factory=list)
    figures: dict = field(default_factory=dict)
    # sentences in place of the market's; empty for a market
    own: dict = field(default_factory=dict)

    def add(self, text: str) -> None:
        self.parts.append(text)

    def section(self, anchor: str, title: str, lead: str = "") -> None:
        self.sections.append((anchor, title))
        lead = f'<p class="lead">{esc(lead)}</p>' if lead else ""
        self.add(f'<h2 id="{anchor}">{esc(title)}</h2>{lead}')

    def plot(self, name: str, title: str, fig, healthy: str, alt: str, wide: bool = False) -> None:
        """One figure as inline SVG with a heading, an alternative text and a sentence below."""
        # SVG with real text: sharp on every screen, a tenth of a PNG; a date inside would change the bytes
        buf = io.BytesIO()
        fig.savefig(buf, format="svg", metadata={"Date": None}, dpi=150)
        self.figures[re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")] = fig
        data = base64.b64encode(buf.getvalue()).decode()
        img = f'<img alt="{esc(alt)}" src="data:image/svg+xml;base64,{data}">'
        self.add(f'<figure{" class=wide" if wide else ""}><h3>{esc(title)}</h3>'
                 f'<div class="scroll">{img}</div><figcaption>{esc(healthy)}</figcaption></figure>')

    def lack(self, what: str, why: str) -> None:
        self.lacks.append((what, why))


def canvas(width: float, height: float, rows: int = 1, left=0.62, right=0.12, top=0.1, bottom=0.34, **kw):
    """A figure and its axes, margins in inches (constrained layout would take longer than the drawing)."""
    from matplotlib.figure import Figure

    fig = Figure((width, height))
    axes = fig.subplots(rows, 1, squeeze=False, **kw)[:, 0]
    fig.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height, hspace=0.12)
    return fig, axes


def step_axis(ax, count: int = 5) -> None:
    """Transitions as 250k or 1.5M; call it after plotting."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(count, integer=True))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    # a run that ended before its second log point has one place on the axis, not a range of thousandths
    if ax.dataLim.width == 0:
        ax.set_xticks([ax.dataLim.x0])


def curve(ax, x, y, n: int = 250, **kw) -> None:
    """A series as a line of bucket means, with dots where there are too few points for a line to be seen."""
    x, y = thin(x, y, n)
    ax.plot(x, y, marker="o" if np.isfinite(y).sum() < 25 else None, ms=2.6, **kw)


def log_ticks(ax, low: float, high: float) -> None:
    """A log axis labelled with plain numbers, also when it spans far less than a decade."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

    ax.set_yscale("log")
    if not (0 < low <= high < np.inf):
        return
    low, high = low / (high / low) ** 0.04 * 0.9999, high * (high / low) ** 0.04 * 1.0001
    if high / low < 4:
        ticks = MaxNLocator(5).tick_values(low, high)
    else:
        decades = range(int(np.floor(np.log10(low))), int(np.log10(high)) + 2)
        ticks = [m * 10.0**e for e in decades for m in (1, 2, 5)]
        ticks = ticks if high / low < 300 else [t for t in ticks if f"{t:e}"[0] == "1"]
        ticks = [t for t in ticks if low <= t <= high]
        ticks = ticks[:: -(-len(ticks) // 7)] if ticks else [low, high]
    ax.yaxis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1000 else f"{v:.4g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylim(low, high)


# ------------------------------------------------------------------------------------------------------ plots
def draw_equity(trace: dict):
    """Equity (log) over drawdown for the agent and everyone in the trace."""
    curves = {k: np.where(v > 0, v, np.nan) for k, v in policies_of(trace, "equity").items()}
    x = trace.get("timestamp", np.arange(len(trace["equity"])))
    fig, (top, low) = canvas(4.9, 4.3, 2, top=0.56, sharex=True, height_ratios=(2.2, 1))
    for i, (name, y) in enumerate(curves.items()):
        style = dict(color=color_of(name, i), lw=1.0) | STYLE.get(name, {})
        # last of a bucket keeps the final equity, min keeps the deepest drawdown: a mean would flatter both
        top.plot(*thin(x, y, 350, "last"), label=words(name), **style)
        if name != "flat" and np.isfinite(y).any():
            peak = np.fmax.accumulate(np.fmax(y, np.nan))
            low.plot(*thin(x, 100 * (y / peak - 1), 350, "min"), **style)
    seen = np.concatenate([c[np.isfinite(c)] for c in curves.values()])
    if len(seen):
        log_ticks(top, seen.min(), seen.max())
    top.set_ylabel("equity, log scale")
    low.set_ylabel("drawdown, %")
    fig.legend(*top.get_legend_handles_labels(), loc="upper left", ncol=4, bbox_to_anchor=(0.0, 1.0))
    return fig


def typical_stretch(position: np.ndarray, n: int) -> tuple[int, int]:
    """(start, stop) of the n-bar window whose turnover is the median one: neither the best nor the worst."""
    if len(position) <= n:
        return 0, len(position)
    # windows side by side: the choice depends on nothing but the positions
    starts = np.arange(0, len(position) - n + 1, n)
    change = np.abs(np.diff(np.nan_to_num(position), prepend=0.0))
    turnover = np.array([change[s : s + n].sum() for s in starts])
    start = int(starts[np.argsort(turnover, kind="stable")[len(starts) // 2]])
    return start, start + n


def draw_positions(trace: dict, bars: int = 500):
    """Price over position for a typical stretch, the regime (if known) as a tint."""
    a, b = typical_stretch(trace["position"], bars)
    x = trace.get("timestamp", np.arange(len(trace["position"])))[a:b]
    fig, (top, low) = canvas(10.4, 4.2, 2, top=0.34, sharex=True, height_ratios=(1.5, 1))
    if "close" in trace:
        top.plot(x, trace["close"][a:b], color=INK, lw=1.1, label="close")
    if "regime" in trace:
        regime = trace["regime"][a:b]
        for value in np.unique(regime[np.isfinite(regime)])[1:]:
            for i, (s, e) in enumerate(runs_of(regime == value)):
                for ax in (top, low):
                    label = f"regime {value:g}" if i == 0 and ax is top else None
                    tint = dict(color=REGIMES[int(value) % 4], alpha=0.13, lw=0)
                    ax.axvspan(x[s], x[min(e, len(x) - 1)], label=label, **tint)
    p = trace["position"][a:b]
    low.fill_between(x, p, 0, where=p >= 0, step="post", color=LONG, alpha=0.75, lw=0, label="long")
    low.fill_between(x, p, 0, where=p <= 0, step="post", color=SHORT, alpha=0.75, lw=0, label="short")
    if "position_optimum" in trace:
        best = trace["position_optimum"][a:b]
        low.step(x, best, where="post", color=COLORS["optimum"], lw=1.0, label="optimum")
    low.axhline(0, color="#98a2ae", lw=0.7)
    low.set_ylim(-1.08, 1.08) if np.nanmax(np.abs(p), initial=0) <= 1.0001 else None
    top.margins(x=0)
    top.set_ylabel("price")
    low.set_ylabel("position")
    handles = [h + g for h, g in zip(top.get_legend_handles_labels(), low.get_legend_handles_labels())]
    fig.legend(*handles, loc="upper left", ncol=7, bbox_to_anchor=(0.04, 1.0))
    return fig, b - a


def draw_band(trace: dict):
    """One stripe a policy over the whole split: blue long, orange short."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.dates import date2num

    # flat is an empty stripe
    rows = {k: v for k, v in policies_of(trace, "position").items() if k != "flat"}
    x = trace.get("timestamp", np.arange(len(trace["position"])))
    ends = date2num(x[[0, -1]]) if x.dtype.kind == "M" else x[[0, -1]].astype(float)
    image = np.stack([thin(x, v, 1000)[1] for v in rows.values()])
    cmap = LinearSegmentedColormap.from_list("position", [SHORT, "#f7d9c9", "#ffffff", "#c8ddf2", LONG])
    fig, (ax,) = canvas(10.4, 0.55 + 0.3 * len(rows), left=1.5)
    limit = max(1.0, np.nanmax(np.abs(image), initial=0))
    ax.imshow(image, aspect="auto", cmap=cmap, vmin=-limit, vmax=limit, interpolation="nearest",
              extent=(ends[0], max(ends[1], ends[0] + 1e-6), len(rows) - 0.5, -0.5))
    if x.dtype.kind == "M":
        ax.xaxis_date()
    ax.set_yticks(range(len(rows)), [words(k) for k in rows], color=INK)
    for y in range(1, len(rows)):
        ax.axhline(y - 0.5, color="white", lw=3)
    ax.grid(False)
    return fig


def draw_histogram(traces: dict):
    """How often the agent holds which position, by split; the optimum and the actor beside it."""
    limit = max(1.0, *(np.nanmax(np.abs(t["position"]), initial=0) for t in traces.values()))
    # bins centred on tenths of the range, so that a grid of positions fills them evenly
    edges = limit * (np.arange(22) - 10.5) / 10
    middle = (edges[1:] + edges[:-1]) / 2
    first, *others = traces
    lines = {f"agent, {first}": (traces[first]["position"], {})}
    for split, color in zip(others, ("#4b5563", "#a3acb9", *CYCLE)):
        lines[f"agent, {split}"] = (traces[split]["position"], dict(color=color, lw=1.2))
    for name in ("critic_grid", "actor", "optimum"):
        if f"position_{name}" in traces[first]:
            style = dict(color=COLORS[name]) | STYLE[name]
            lines[f"{words(name)}, {first}"] = (traces[first][f"position_{name}"], style)
    fig, (ax,) = canvas(4.9, 3.4, top=0.56, bottom=0.42)
    for i, (label, (values, style)) in enumerate(lines.items()):
        values = values[np.isfinite(values)]
        share = 100 * np.histogram(values, edges)[0] / max(1, len(values))
        if i == 0:
            ax.bar(middle, share, 0.085 * limit, color=LONG, alpha=0.8, label=label)
        else:
            ax.plot(middle, share, marker="o", ms=2, label=label, **style)
    ax.set_ylabel("% of bars")
    ax.set_xlabel("position")
    ax.set_ylim(bottom=0)
    handles, labels = (x[-1:] + x[:-1] for x in ax.get_legend_handles_labels())
    fig.legend(handles, labels, loc="upper left", ncol=3, bbox_to_anchor=(0.0, 1.0))
    return fig


def draw_costs(trace: dict):
    """Cumulative log return before costs, costs, and what is left; None if the trace cannot tell."""
    if not {"position", "equity", "next_return"} <= set(trace) or np.nanmin(trace["equity"], initial=1) <= 0:
        return None
    x = trace.get("timestamp", np.arange(len(trace["equity"])))
    # costs are not in the trace: they are what the equity lacks of the position's own growth
    growth = np.nan_to_num(trace["position"] * trace["next_return"])
    gross = 100 * np.cumsum(np.log1p(np.maximum(growth, -0.999)))
    net = 100 * np.log(trace["equity"])
    fig, (ax,) = canvas(4.9, 3.4, top=0.36, bottom=0.42)
    lines = ((gross, "before costs", dict(color="#8a94a1")), (net - gross, "costs", dict(color=SHORT)),
             (net, "what is left", dict(color=LONG, lw=1.9)))
    for y, label, style in lines:
        ax.plot(*thin(x, y, 350, "last"), label=label, **style)
    ax.axhline(0, color="#98a2ae", lw=0.7)
    ax.set_ylabel("cumulative log return, %")
    fig.legend(*ax.get_legend_handles_labels(), loc="upper left", ncol=3, bbox_to_anchor=(0.0, 1.0))
    return fig


def draw_response(trace: dict, x: np.ndarray, label: str, bins: int = 21):
    """Position against x (n,): points and bin means, one colour a regime (if known), the optimum dashed."""
    position, best = trace["position"], trace.get("position_optimum")
    regime = trace.get("regime", np.zeros(len(x)))
    ok = np.isfinite(x) & np.isfinite(position) & np.isfinite(regime)
    fig, (ax,) = canvas(4.9, 3.4, top=0.56, bottom=0.42)
    levels = np.unique(x[ok])
    # a chain has few states: its own levels are the bins; a continuous x is cut where bars are equally many
    discrete = len(levels) <= 2 * bins
    cuts = levels if discrete else np.unique(np.quantile(x[ok], np.linspace(0.005, 0.995, bins)))
    mid = cuts if discrete else (cuts[1:] + cuts[:-1]) / 2
    gap = np.min(np.diff(levels)) if discrete and len(levels) > 1 else 0.0
    values = np.unique(regime[ok])[:4]
    for k, value in enumerate(values):
        color = REGIMES[k]
        rows = np.flatnonzero(ok & (regime == value))
        some = rows[:: max(1, len(rows) // 700)]
        shift = gap * (np.modf(some * 0.6180339887)[0] - 0.5) * 0.7
        # jitter by the golden ratio: a grid of states and positions would hide how many bars a dot stands for
        wobble = 0.04 * (np.modf(some * 0.7548776662)[0] - 0.5)
        dots = dict(ms=3.6, color=color, alpha=0.3, mew=0, rasterized=True)
        ax.plot(x[some] + shift, position[some] + wobble, ".", **dots)
        where = np.searchsorted(cuts, x[rows], "left" if discrete else "right") - (not discrete)
        who_what = (("agent", position, dict(lw=1.9)), ("optimum", best, dict(lw=1.2, ls="--")))
        for who, column, style in who_what:
            if column is None:
                continue
            y = column[rows]
            keep = (where >= 0) & (where < len(mid)) & np.isfinite(y)
            n = np.bincount(where[keep], minlength=len(mid))[: len(mid)]
            mean = np.bincount(where[keep], y[keep], minlength=len(mid))[: len(mid)] / np.maximum(n, 1)
            tag = f"{who}, regime {value:g}" if len(values) > 1 else who
            # two bars do not make a mean
            style["color"] = color if len(values) > 1 else COLORS[who]
            ax.plot(mid[n >= 3], mean[n >= 3], label=tag, **style)
    ax.set_xlabel(label)
    ax.set_ylabel("position")
    ax.set_ylim(-1.08, 1.08) if np.nanmax(np.abs(position[ok]), initial=0) <= 1.0001 else None
    fig.legend(*ax.get_legend_handles_labels(), loc="upper left", ncol=2, bbox_to_anchor=(0.0, 1.0))
    return fig


def draw_curves(lines: dict, levels: dict, best_step, label: str):
    """One evaluated metric over global_step, a line a split; levels are horizontal references."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    levels = {name: y for name, y in levels.items() if np.isfinite(y)}
    entries = len(lines) + len(levels) + (best_step == best_step)
    fig, (ax,) = canvas(4.9, 3.0, top=0.36 if entries <= 4 else 0.56, bottom=0.42)
    for i, (name, (x, y)) in enumerate(lines.items()):
        color = {"eval": LONG, "train": "#8a94a1", "test": "#138a5e"}.get(name, CYCLE[i % 8])
        curve(ax, x, y, color=color, label=name, lw=1.6 if name == "eval" else 1.1)
    # before the reference lines, which would count as data
    step_axis(ax)
    # six digits would push the axis' name off the figure
    if np.isfinite(ax.dataLim.y0) and np.abs(ax.dataLim.intervaly).max() >= 1e4:
        ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    for i, (name, y) in enumerate(levels.items()):
        ax.axhline(y, color=color_of(name, i), lw=1.0, ls="--", label=words(name))
    if best_step == best_step:
        ax.axvline(best_step, color=INK, lw=0.9, ls=":", label="best checkpoint")
    ax.set_ylabel(label)
    ax.set_xlabel("transitions")
    fig.legend(*ax.get_legend_handles_labels(), loc="upper left", ncol=4, bbox_to_anchor=(0.0, 1.0))
    return fig


def draw_spread(metrics: dict):
    """q_action_spread beside alpha and alpha * |entropy|, log scale."""
    lines = {"spread of Q over actions": (*metrics["value/q_action_spread"], dict(color=LONG, lw=1.9))}
    if "policy/alpha" in metrics:
        x, alpha = metrics["policy/alpha"]
        lines["alpha"] = (x, alpha, dict(color="#8a94a1"))
        if "value/alpha_entropy" in metrics:
            lines["alpha × |entropy|"] = (*metrics["value/alpha_entropy"], dict(color=SHORT, lw=1.5))
        elif "policy/entropy" in metrics and np.array_equal(metrics["policy/entropy"][0], x):
            term = alpha * np.abs(metrics["policy/entropy"][1])
            lines["alpha × |entropy|"] = (x, term, dict(color=SHORT, lw=1.5))
    fig, (ax,) = canvas(4.9, 3.0, top=0.36, bottom=0.42)
    seen = [np.empty(0)]
    for name, (x, y, style) in lines.items():
        y = np.where(y > 0, y, np.nan)
        seen.append(y[np.isfinite(y)])
        curve(ax, x, y, label=name, **style)
    seen = np.concatenate(seen)
    if len(seen):
        # an entropy that crosses 0 dives on a log axis: five decades are enough to see it
        log_ticks(ax, max(seen.min(), seen.max() * 1e-5), seen.max())
    step_axis(ax)
    ax.set_xlabel("transitions")
    fig.legend(*ax.get_legend_handles_labels(), loc="upper left", ncol=3, bbox_to_anchor=(0.0, 1.0))
    return fig


def draw_alarms(alarms: dict):
    """A row an alarm: red while it is raised, grey while it is quiet, with the share of the log points."""
    from matplotlib.transforms import blended_transform_factory

    fig, (ax,) = canvas(10.4, 0.62 + 0.3 * len(alarms), left=3.1, right=0.75, bottom=0.46)
    for row, (x, y) in enumerate(alarms.values()):
        step = float(np.median(np.diff(x))) if len(x) > 1 else 1.0
        # an alarm holds until the next log point looks again
        edge = np.append(x, x[-1] + step).astype(float)
        for mask, color in ((y == 0, GREY), (y > 0, RED)):
            spans = [(edge[s], edge[e] - edge[s]) for s, e in runs_of(mask)]
            ax.broken_barh(spans, (row - 0.36, 0.72), color=color, lw=0)
        share = np.mean(y[np.isfinite(y)] > 0) if np.isfinite(y).any() else np.nan
        ax.text(1.01, row, f"{show(100 * share, 'int')} %", va="center", color=RED if share > 0 else INK,
                transform=blended_transform_factory(ax.transAxes, ax.transData))
    ax.set_yticks(range(len(alarms)), [ALARMS.get(k, words(k)) for k in alarms], color=INK)
    ax.set_ylim(len(alarms) - 0.5, -0.5)
    ax.margins(x=0)
    step_axis(ax)
    ax.set_xlabel("transitions")
    ax.grid(False)
    return fig


def draw_bars(values: dict[str, float], texts: list[str], color: str, label: str):
    """Horizontal bars, the value written at the end of each."""
    fig, (ax,) = canvas(4.9, 0.6 + 0.29 * len(values), left=1.3, right=1.0, bottom=0.46)
    width = np.nan_to_num(np.array(list(values.values()), float))
    ax.barh(range(len(values)), width, color=color, height=0.66)
    for y, (w, text) in enumerate(zip(width, texts, strict=True)):
        ax.annotate(text, (max(w, 0.0), y), (4, 0), textcoords="offset points", va="center", color=INK)
    ax.set_yticks(range(len(values)), [words(k) for k in values], color=INK)
    ax.set_ylim(len(values) - 0.5, -0.5)
    ax.set_xlabel(label)
    ax.grid(axis="y", visible=False)
    return fig


def draw_episode(sides: dict, length: float | None, names: dict):
    """Traces over time_s side by side ({title: columns}) with shared scales, a row a quantity.

    Density and speed as space-time diagrams (length in m; None: unknown), vehicles, phases or actions, reward.
    names: {column: what to call it} of the actions.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    first = next(iter(sides.values()))
    seen = list(filter(EPISODE.fullmatch, first))
    of = lambda stem: {k: k[len(stem):] for k in seen if k.startswith(stem)}  # noqa: E731
    phases, actions = of("phase_"), {k: names.get(k, words(k)) for k in of("action_")}
    place = "position, m" if length else "point of road"
    # a junction is paid for its own roads, and the trace holds the first one's reward
    paid = f"reward of\n{next(iter(phases.values()))}, veh s" if len(phases) > len(actions) > 0 else "reward"
    rows = ((place, of("rho_"), "viridis_r", "density, veh/m", 1.7), (place, of("v_"), "viridis", "speed, m/s", 1.7),
            ("vehicles", {k: k[:-4] for k in seen if k.endswith("side_veh")}, None, "", 1.5),
            ("", phases, "", "phase", min(0.3 + 0.2 * len(phases), 6.0)),
            ("action", {} if phases else actions, None, "", 1.0),
            (paid, {"reward": ""} if "reward" in seen else {}, None, "", 1.0))
    rows = [row for row in rows if row[1]]
    heights = [row[-1] for row in rows]
    fig = Figure((10.4, height := sum(heights) + 0.16 * len(rows) + 0.7))
    grid = fig.subplots(len(rows), len(sides), squeeze=False, sharex=True, sharey="row", height_ratios=heights)
    fig.subplots_adjust(0.075, 0.44 / height, 0.89, 1 - 0.28 / height, 0.08, 0.14)
    for (label, keys, colours, unit, _), axes in zip(rows, grid, strict=True):
        axes[0].set_ylabel(label)
        everyone = np.concatenate([t[k] for t in sides.values() for k in keys])
        levels = np.unique(everyone[np.isfinite(everyone)]) if np.isfinite(everyone).any() else np.zeros(1)
        for ax, trace in zip(axes, sides.values(), strict=True):
            t = trace["time_s"]
            end = 2 * t[-1] - t[-2] if len(t) > 1 else t[0] + 1
            if colours is None:
                for i, (k, name) in enumerate(keys.items()):
                    # a value holds until the next decision
                    held = np.append(t, end), np.append(trace[k], trace[k][-1])
                    ax.step(*held, where="post", color=CYCLE[i % 8], label=name)
                continue
            image = np.stack([thin(t, trace[k], 1000, "mean" if colours else "last")[1] for k in keys])
            style = dict(cmap=colours, vmin=levels[0], vmax=levels[-1])
            if not colours:
                image = np.where(np.isfinite(image), np.searchsorted(levels, image), np.nan)
                tones = ListedColormap([CYCLE[i % 8] for i in range(len(levels))])
                style = dict(cmap=tones, vmin=-0.5, vmax=len(levels) - 0.5)
            low, high = (0, length) if colours and length else (-0.5, len(keys) - 0.5)
            image = ax.imshow(image, aspect="auto", origin="lower", interpolation="nearest",
                              extent=(t[0], end, low, high), **style)
            ax.grid(False)
        if colours is None:
            axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5)) if any(keys.values()) else None
            continue
        where = axes[-1].get_position()
        bar = fig.colorbar(image, cax=fig.add_axes((0.9, where.y0, 0.012, where.height)), label=unit)
        if not colours:
            bar.set_ticks(range(len(levels)), labels=[f"{x:g}" for x in levels])
            some = -(-len(keys) // 30)
            axes[0].set_yticks(range(0, len(keys), some), list(keys.values())[::some], color=INK)
            axes[0].invert_yaxis()
            axes[0].hlines(np.arange(1, len(keys)) - 0.5, t[0], end, color="white", lw=2 / some)
    for top, low, title in zip(grid[0], grid[-1], sides, strict=True):
        top.set_title(title, fontsize=9, color=INK)
        low.set_xlabel("time, s")
        low.margins(x=0)
    return fig


def draw_mini(lines: dict, dates: bool = False):
    """A small plot of one metric (or of one metric by split)."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    fig, (ax,) = canvas(2.7, 1.45, left=0.5, right=0.08, top=0.08 if len(lines) < 2 else 0.24, bottom=0.2)
    for i, (name, (x, y)) in enumerate(lines.items()):
        curve(ax, x, y, 150, color=CYCLE[i % 8], label=words(name), lw=1.1)
    seen = np.concatenate([y[np.isfinite(y)] for _, y in lines.values()])
    # a series that falls by decades (alpha, losses) shows only its first points on a linear axis
    if len(seen) and seen.min() > 0 and seen.max() / seen.min() > 50:
        log_ticks(ax, seen.min(), seen.max())
    else:
        ax.yaxis.set_major_locator(MaxNLocator(4))
        if len(seen) and (np.abs(seen).max() >= 1e4 or 0 < np.abs(seen).max() < 1e-3):
            ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    if dates:
        x = next(iter(lines.values()))[0][[0, -1]]
        ax.set_xticks(x, np.datetime_as_string(x, "D"))
        ax.get_xticklabels()[0].set_ha("left")
        ax.get_xticklabels()[1].set_ha("right")
    else:
        step_axis(ax, 3)
    ax.tick_params(labelsize=7.5, pad=2)
    if len(lines) > 1:
        handles = ax.get_legend_handles_labels()
        fig.legend(*handles, loc="upper left", ncol=4, fontsize=7, handlelength=0.8, columnspacing=0.7,
                   handletextpad=0.4, bbox_to_anchor=(0, 1.04))
    return fig


# --------------------------------------------------------------------------------------------------- sections
def add_header(page: Page, run: Run) -> None:
    """Title, status, verdict with reasons, command, and the numbers one asks for first."""
    a, s = run.args, run.summary
    audit, data, device = within(s, "audit"), within(s, "data"), s.get("device")
    what = a.get("data") or a.get("env_id") or a.get("scenario") or data.get("spec") or ""
    title = f"{a.get('exp_name', 'run')} on {what}" if what else str(a.get("exp_name", "run"))
    page.add(f"<h1>{esc(title)}</h1>")
    if isinstance(device, dict):
        found = (str(device[k]) for k in ("torch", "backend", "precision") if device.get(k))
        device = ", ".join(dict.fromkeys(found))
    names = data.get("names") if isinstance(data.get("names"), list) else []
    facts = {
        "seed": a.get("seed"),
        "on": device or None,
        "bars of": ", ".join(map(str, names)) if names and names != [what] else None,
        "input sha256": str(data["sha256"])[:12] if data.get("sha256") else None,
    }
    facts = " · ".join(f"{k} {v}" for k, v in facts.items() if v is not None)
    page.add(f'<p class="soft">{esc(facts)}</p><div class="chips">')
    for kind, value in (("status", s.get("status")), ("verdict", audit.get("verdict"))):
        value = "unknown" if value is None else str(value)
        meaning = f": {(MEANING | page.own)[value]}" if value in MEANING else ""
        text = f"{kind} <b>{esc(words(value))}</b>{esc(meaning)}"
        page.add(f'<span class="chip {TONES.get(value, "plain")}">{text}</span>')
    page.add("</div>")
    reasons = audit.get("reasons") or []
    reasons = reasons if isinstance(reasons, list) else [reasons]
    if reasons:
        page.add('<ul class="reasons">' + "".join(f"<li>{esc(r)}</li>" for r in reasons) + "</ul>")
    command = s.get("command") or a.get("command")
    if isinstance(command, list):
        command = shlex.join(map(str, command))
    if not command:
        given = (f"--{k.replace('_', '-')} {shlex.quote(str(a[k]))}" for k in FLAGS if a.get(k) is not None)
        command = " ".join(given)
    page.add(f"<pre>{esc(command)}</pre>" if command else "")
    tiles = [
        f'<div class="tile{mark}"><span class="of">{esc(label)}</span><b>{esc(value)}</b>'
        f"<span>{esc(small)}</span></div>"
        for mark, label, value, small in headline(run, bool(page.own))
    ]
    page.add(f'<div class="tiles">{"".join(tiles)}</div><!--nav-->')
    if s.get("updates") == 0:
        page.add('<p class="note">No gradient update was made: below is the agent as it was born.</p>')


def headline(run: Run, road: bool) -> list[tuple[str, str, str, str]]:
    """(css class, label, value, small print) of the tiles: results on unseen data, then what they took."""
    a, s, tiles = run.args, run.summary, []
    splits = ordered(within(s, "eval"), s.get("selected_by") if road else None)
    split = next((k for k in splits if within(s, "eval", k)), "")
    agent, base = within(s, "eval", split, "agent"), within(s, "eval", split, "baselines")
    # on a network the return is minus the delay: one of them is enough
    twice = number(agent.get("episode_return")) == -number(agent.get("delay_veh_s"))
    for key in TILES:
        if np.isnan(number(agent.get(key))) or len(tiles) == 3 or (twice and key == "episode_return"):
            continue
        title, kind = COLUMNS[key]
        rivals = [k for k in dict.fromkeys(("optimum", "best_constant", "buy_and_hold", *base))]
        rivals = best_two(base, key) if road else [k for k in rivals if key in within(base, k)][:2]
        beside = " · ".join(f"{words(k)} {show(base[k][key], kind)}" for k in rivals)
        beside = "share of what the optimum earns" if key == "score" else beside
        label = f"{split}: {title.replace(', bp / bar', ' bp')}"
        tiles.append(("" if tiles else " main", label, show(agent[key], kind), beside))
    drawn, limit = show(s.get("samples_per_transition"), "score"), a.get("timeout")
    limit = f"limit {show(limit)} s" if limit else "no limit"
    drawn = f"{drawn} rows drawn a transition" if s.get("updates") else "nothing was learned"
    whole = {k: show(s.get(k), "int") for k in ("updates", "global_step", "sps", "wall_seconds")}
    tiles.append(("", "gradient updates", whole["updates"], drawn))
    speed = f"{whole['sps']} a second" if s.get("sps") else ""
    tiles.append(("", "transitions", whole["global_step"], speed))
    tiles.append(("", "wall clock", f"{whole['wall_seconds']} s", limit))
    return tiles


def table_rows(result: dict) -> dict[str, dict]:
    """{who: metrics} of one split, known names first; where the agent has a score, everyone gets one."""
    rows = {k: v for k, v in result.items() if isinstance(v, dict) and k != "baselines"}
    # the policy that acts is the agent: the same numbers twice would only be noise
    rows = {k: v for k, v in rows.items() if k == "agent" or v != rows.get("agent")}
    rows |= {k: v for k, v in within(result, "baselines").items() if isinstance(v, dict)}
    rows = {k: rows[k] for k in [*POLICIES, *rows] if k in rows}
    mean = {k: number(v.get("mean_expected_bps")) for k, v in rows.items()}
    span = mean.get("optimum", np.nan) - mean.get("flat", np.nan)
    if np.isfinite(number(within(rows, "agent").get("score"))) and span > 0:
        rows = {k: {"score": (mean[k] - mean["flat"]) / span} | v for k, v in rows.items()}
    return rows


def add_table(page: Page, run: Run) -> None:
    """Everyone beside everyone, a block a split: same bars, same costs."""
    chosen = run.summary.get("selected_by") if page.own else None
    results = {k: within(run.summary, "eval", k) for k in ordered(within(run.summary, "eval"), chosen)}
    blocks = {split: table_rows(result) for split, result in results.items()}
    cells = [(k, v) for rows in blocks.values() for row in rows.values() for k, v in row.items()]
    seen = dict.fromkeys(k for k, v in cells if not np.isnan(number(v)))
    keys = [k for k in COLUMNS if k in seen] + [k for k in seen if k not in COLUMNS]
    if not keys:
        page.lack("the table of scores", "summary.json has no eval.<split>.agent")
        return
    markets = any(k in seen for k in ("mean_reward_bps", "mean_expected_bps"))
    lead = (LEADS["table"] if markets else "") + (LEADS["score"] if "score" in seen else "")
    lead = LEADS["cases"].format(chosen) if chosen else lead
    page.section("table", "Agent beside baselines", lead)
    head = "".join(f"<th>{esc(heading(k))}</th>" for k in keys)
    page.add(f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>')
    for split, rows in blocks.items():
        bars = results[split].get("rows")
        note = f"rows {bars[0]:,} to {bars[1] - 1:,}" if isinstance(bars, list) and len(bars) == 2 else ""
        note += " · PARTIAL, time ran out" if results[split].get("partial") else ""
        page.add(f'<tr class="split"><th>{esc(split)}</th>')
        page.add(f'<th colspan="{len(keys)}"><span class="rows">{esc(note)}</span></th></tr>')
        for i, (name, row) in enumerate(rows.items()):
            texts = (show(row.get(k), COLUMNS[k][1] if k in COLUMNS else "plain") for k in keys)
            data = "".join(f"<td>{esc(text)}</td>" for text in texts)
            who = f'<i class="dot" style="background:{color_of(name, i)}"></i>{esc(words(name))}'
            page.add(f"<tr{' class=agent' if name == 'agent' else ''}><th>{who}</th>{data}</tr>")
    page.add("</tbody></table></div>")


def add_traces(page: Page, run: Run) -> None:
    """Equity, positions and behaviour of market traces."""
    traces = {s: run.traces[s] for s in ordered(run.traces)}
    why = "no traces/*.parquet has the column {}" if traces else "no traces/*.parquet with rows"
    # equity on train rows says nothing about the market and dwarfs the others
    unseen = [s for s in traces if s != "train"] or list(traces)
    with_equity = [s for s in unseen if "equity" in traces[s]]
    with_position = {s: t for s, t in traces.items() if "position" in t}
    if with_equity:
        page.section("equity", "Equity and drawdown")
        page.add('<div class="grid">')
        for s in with_equity:
            text = SENTENCES["equity" if "equity_optimum" in traces[s] else "equity_real"]
            alt = f"Equity on a log scale and drawdown on the {s} split, agent beside baselines"
            page.plot(f"equity_{s}", f"{s}: equity and drawdown", draw_equity(traces[s]), text, alt)
        page.add("</div>")
    else:
        page.lack("equity and drawdown", why.format("equity"))
    if not with_position:
        for what in ("positions under price", "action histogram", "action against signal"):
            page.lack(what, why.format("position"))
        return
    s, trace = next(iter(with_position.items()))
    page.section("positions", "What it holds, and when")
    page.add('<div class="grid">')
    fig, bars = draw_positions(trace)
    title = f"{s}: positions under price, {bars} bars of typical turnover"
    page.plot("positions", title, fig, SENTENCES["positions"], f"Price and position, {bars} bars", wide=True)
    title, alt = f"{s}: positions over the whole split", f"Stripes of everyone's positions, {s} split"
    page.plot("band", title, draw_band(trace), SENTENCES["band"], alt, wide=True)
    title, alt = "How often it holds which position", "Histogram of positions by split"
    page.plot("histogram", title, draw_histogram(with_position), SENTENCES["histogram"], alt)
    add_responses(page, s, trace)
    if fig := draw_costs(trace):
        alt = f"Cumulative log return before costs, costs and what is left on the {s} split"
        page.plot("costs", f"{s}: what trading costs", fig, SENTENCES["costs"], alt)
    page.add("</div>")


def add_episode(page: Page, run: Run) -> None:
    """One greedy episode over time_s: of a road in space and time, beside the road that nobody controls."""
    traces = {s: t for s, t in run.traces.items() if "time_s" in t and any(map(EPISODE.fullmatch, t))}
    if not traces:
        page.lack("one episode over time", "no traces/*.parquet with rows has the column time_s")
        return
    freeway = run.args["scenario"] == "freeway" and not run.args.get("env_id")
    ends = {"both": ("outlet", "inlet")}.get(run.args.get("control"), (run.args.get("control"),))
    names = {f"action_{i}": str(end) for i, end in enumerate(ends) if freeway and end}
    title = "One episode" if run.args.get("env_id") else "On the road"
    page.section("road", title, "One episode of the agent that is reported, without exploration noise.")
    for s, trace in traces.items():
        free = traces.get(f"{s}_constant")
        if s.endswith("_constant") and s[: -len("_constant")] in traces:
            continue
        sides = {"agent": trace} | ({"without control": free} if free and set(trace) <= set(free) else {})
        kind = next((k for k, c in (("road", "rho_0"), ("network", "inside_veh")) if c in trace), "episode")
        what = {"road": "density and speed", "network": "vehicles and signals"}.get(kind, "actions and reward")
        alt = f"{s}: {what} over time, {' beside '.join(sides)}"
        fig = draw_episode(sides, FREEWAY_M if freeway else None, names)
        page.plot(f"episode_{s}", f"{s}: {what} over one episode", fig, page.own[kind], alt, wide=True)


def add_responses(page: Page, split: str, trace: dict) -> None:
    """Position against signal and conditional mean where the trace knows them, else against past returns."""
    # on a drift market both are constants: nothing to plot against
    known = {k: trace[k][np.isfinite(trace[k])] for k in ("signal", "expected") if k in trace}
    varying = {k for k, v in known.items() if len(np.unique(v)) > 1}
    plots = []
    if "signal" in varying:
        plots.append(("signal", "signal", trace["signal"]))
    if "expected" in varying:
        plots.append(("expected", "expected return of the next bar, bp", 1e4 * trace["expected"]))
    for bars in (24, 168) if "close" in trace and "signal" not in varying else ():
        past = np.full(len(trace["close"]), np.nan)
        past[bars:] = 100 * (trace["close"][bars:] / trace["close"][:-bars] - 1)
        plots.append(("past", f"return over the past {bars} bars, %", past))
    plots = [(kind, label, x) for kind, label, x in plots if np.isfinite(x).any()]
    for kind, label, x in plots:
        title, alt = f"{split}: position against {label}", f"Position against {label} on the {split} split"
        page.plot(f"against_{label}", title, draw_response(trace, x, label), SENTENCES[kind], alt)
    if not plots:
        page.lack("action against signal", f"traces/{split}.parquet has no signal, expected or close")


def eval_curves(metrics: dict) -> dict[str, dict]:
    """{metric: {line: (x, y)}} of the keys eval/<split>/[who/]<metric> and eval/<split>/<who>_<metric>."""
    out = {}
    for key, xy in metrics.items():
        parts = key.split("/")
        if parts[0] == "eval" and len(parts) >= 3:
            who = next((p for p in POLICIES if parts[-1].startswith(p + "_")), "")
            metric = parts[-1][len(who) + 1 :] if who else parts[-1]
            who = " ".join(words(p) for p in (*parts[2:-1], who) if p and p != "agent")
            out.setdefault(metric, {})[f"{parts[1]} {who}".strip()] = xy
    for metric, lines in out.items():
        agent = [y for name, (_, y) in lines.items() if " " not in name]
        # the policy that acts is logged under its own name too
        twin = lambda name, y: " " in name and any(starts(a, y) for a in agent)  # noqa: B023, E731
        out[metric] = {name: xy for name, xy in lines.items() if not twin(name, xy[1])}
    return {k: out[k] for k in [*CURVES, *out] if k in out}


def starts(a: np.ndarray, b: np.ndarray) -> bool:
    return len(b) <= len(a) and np.array_equal(a[: len(b)], b, equal_nan=True)


def add_learning(page: Page, run: Run) -> None:
    """Evaluations over training, then everything else that was logged, small."""
    curves = eval_curves(run.metrics)
    # NaN where no checkpoint was chosen: no line is drawn
    best = number(run.summary.get("best_step"))
    page.section("learning", "Learning", LEADS["learning"])
    page.add('<div class="grid">')
    drawn = [k for k in curves if k in CURVES][:5] or list(curves)[:5]
    split = str(run.summary.get("selected_by")) if page.own else "eval"
    base = within(run.summary, "eval", split, "baselines")
    for k in drawn:
        rivals = ("optimum",) if k == "turnover" else ("optimum", "best_constant")
        levels = {r: number(within(base, r).get(k)) for r in rivals}
        # by definition of the score
        levels = {"optimum": 1.0} if k == "score" else levels
        levels = {f"{r}, {split}": base[r][k] for r in best_two(base, k)} if page.own and k in TILES else levels
        fig = draw_curves(curves[k], levels, best, heading(k))
        page.plot(f"curve_{k}", f"{heading(k)}: evaluations", fig, healthy(k, page.own), f"{words(k)} over training")
    if not curves:
        page.lack("learning curves", "metrics.jsonl has no eval/<split>/<metric>")
    if "value/q_action_spread" in run.metrics:
        title = "What actions are worth, beside what randomness is paid"
        alt = "Spread of Q over actions beside alpha times entropy, log scale"
        page.plot("q_spread", title, draw_spread(run.metrics), SENTENCES["q_spread"], alt)
    elif not page.own:
        page.lack("spread of Q beside alpha × entropy", "metrics.jsonl has no value/q_action_spread")
    reaction = ("policy/state_dependence", "policy/saturation", "policy/dead_units")
    lines = {words(k.split("/")[1]): run.metrics[k] for k in reaction if k in run.metrics}
    if reaction[0] in run.metrics:
        fig, alt = draw_curves(lines, {}, best, ""), "State dependence and saturation over training"
        title = f"Does it react to {page.own.get('place', 'the market')}?"
        page.plot("reaction", title, fig, (SENTENCES | page.own)["reaction"], alt)
    else:
        page.lack("state dependence over training", f"metrics.jsonl has no {reaction[0]}")
    page.add("</div>")
    groups = {}
    for key in run.metrics:
        group = key.split("/")[0] if "/" in key else ""
        if group not in ("eval", "alarm"):
            # one plot for all parts of the attribution
            stem, _, part = key.partition("attribution_")
            whole = f"{stem}attribution" if part else key
            group = group if group in GROUPS else ""
            groups.setdefault(group, {}).setdefault(whole, {})[part or key] = run.metrics[key]
    if rest := {f"eval/{k}": lines for k, lines in curves.items() if k not in drawn}:
        groups["eval"] = rest
    for group, title in GROUPS.items():
        if group in groups:
            add_minis(page, title, groups[group], group in ("losses", "policy", "value"))
        elif group in ("losses", "policy", "value"):
            page.lack(f"{title.lower()} over training", f"metrics.jsonl has no {group}/ key")


def add_minis(page: Page, title: str, plots: dict, unfolded: bool) -> None:
    """Small plots in a box that folds; plots: {metric: {line: (x, y)}}."""
    page.add(f'<details{" open" if unfolded else ""}><summary>{esc(title)}</summary><div class="minis">')
    for key, lines in plots.items():
        name = key.split("/")[-1]
        text = (HEALTHY | page.own).get(name, "A clear trend or none; no jumps.")
        if not any(np.isfinite(y).any() for _, y in lines.values()):
            text = "No number was logged (all null)."
        # pre-training has no transitions: its points are counted instead
        if all(len(x) > 1 and x[0] == x[-1] for x, _ in lines.values()):
            text += " (No transitions yet: x counts log points.)"
            lines = {k: (np.arange(1, len(x) + 1), y) for k, (x, y) in lines.items()}
        title = words(key.split("/", 1)[-1])
        page.plot(f"metric_{key}", title, draw_mini(lines), text, f"{key} over training")
    page.add("</div></details>")


def add_health(page: Page, run: Run) -> None:
    """Alarms, attribution, time by phase and the audit's numbers."""
    alarms = {k.split("/", 1)[1]: v for k, v in run.metrics.items() if k.startswith("alarm/")}
    audit = within(run.summary, "audit")
    attribution = {str(k): number(v) for k, v in within(audit, "attribution").items()}
    phases = {str(k): number(v) for k, v in within(run.summary, "phases").items()}
    page.section("health", "Health")
    page.add('<div class="grid">')
    if alarms:
        title, alt = "Alarms over time", "Strip of alarms over training"
        page.plot("alarms", title, draw_alarms(alarms), SENTENCES["alarms"], alt, wide=True)
    elif not page.own:
        page.lack("alarms over time", "metrics.jsonl has no alarm/ key")
    if attribution:
        texts = [show(v, "small") for v in attribution.values()]
        fig = draw_bars(attribution, texts, LONG, "mean |change of action| when shuffled")
        title, alt = "What the greedy action listens to", "Bars of attribution by input group"
        page.plot("attribution", title, fig, SENTENCES["attribution"], alt)
    elif not page.own:
        page.lack("attribution", "summary.json has no audit.attribution")
    if phases:
        total = np.nansum(list(phases.values())) or np.nan
        phases = dict(sorted(phases.items(), key=lambda kv: -np.nan_to_num(kv[1])))
        texts = [f"{show(round(v, 1))} s · {show(100 * v / total, 'int')} %" for v in phases.values()]
        fig = draw_bars(phases, texts, "#7d8fa3", "seconds")
        title = f"Where {show(total, 'int')} seconds went"
        page.plot("phases", title, fig, (SENTENCES | page.own)["phases"], "Bars of seconds by phase")
    else:
        page.lack("time by phase", "summary.json has no phases")
    page.add("</div>")
    shown = {k: v for k, v in audit.items() if k not in ("verdict", "reasons", "attribution")}
    if shown:
        add_pairs(page, "The audit's numbers", flat_items(shown), HEALTHY | page.own)
    else:
        page.lack("the audit's numbers", "summary.json has no audit")


def add_pairs(page: Page, title: str, pairs: list[tuple[str, str]], hints: dict) -> None:
    """A folded table of keys and values, with a hint under those that have one."""
    page.add(f'<details><summary>{esc(title)}</summary><table class="kv">')
    for k, v in pairs:
        hint = f'<br><span class="soft">{esc(hints[k])}</span>' if k in hints else ""
        page.add(f"<tr><th>{esc(k)}</th><td>{esc(v)}{hint}</td></tr>")
    page.add("</table></details>")


def add_others(page: Page, run: Run, most: int = 24) -> None:
    """Small plots of trace columns that have no plot of their own."""
    plots = []
    for split in ordered(run.traces):
        trace = run.traces[split]
        x = trace.get("timestamp", trace.get("time_s"))
        for name, y in trace.items():
            known = name in TRACE_COLUMNS or name.startswith(("position_", "equity_"))
            known |= bool(page.own and "time_s" in trace and EPISODE.fullmatch(name))
            if not known and y.dtype.kind == "f":
                plots.append((split, name, np.arange(len(y)) if x is None else x, y))
    if not plots:
        return
    page.section("traces", "Other columns of the traces")
    page.add('<div class="minis">')
    for split, name, x, y in plots[:most]:
        text = SENTENCES.get(f"trace_{name}", HEALTHY.get(name, "Drawn as the file has it."))
        fig = draw_mini({name: (x, y)}, dates=x.dtype.kind == "M")
        alt = f"Column {name} of the {split} trace"
        page.plot(f"trace_{split}_{name}", f"{split}: {words(name)}", fig, text, alt)
    page.add("</div>")
    if len(plots) > most:
        page.lack(f"{len(plots) - most} more trace columns", f"only the first {most} are drawn")


def add_details(page: Page, run: Run) -> None:
    """What ran, on what; and what this page could not show."""
    page.section("details", "Details")
    rest = {k: v for k, v in run.summary.items() if k not in ("eval", "audit", "phases")}
    add_pairs(page, "Flags (args.json)", flat_items(run.args) if run.args else [], {})
    add_pairs(page, "Run (summary.json)", flat_items(rest) if rest else [], {})
    for note in run.notes:
        page.add(f'<p class="note">{esc(note)}</p>')
    if page.lacks:
        rows = "".join(f"<li><b>{esc(what)}</b>: {esc(why)}</li>" for what, why in page.lacks)
        lead = "Not on this page, because the files do not hold it:"
        page.add(f'<div class="note" id="missing">{lead}<ul>{rows}</ul></div>')


# ------------------------------------------------------------------------------------------------------- main
def build(run: Run) -> tuple[str, dict]:
    """The page as text and its figures by name; a function of `run` alone: no clock, no path, no chance."""
    import matplotlib

    page = Page(own=own_words(run))
    # a context, so that a caller's own plots keep their style
    with matplotlib.rc_context(RC):
        add_header(page, run)
        add_table(page, run)
        add_episode(page, run) if page.own else add_traces(page, run)
        add_learning(page, run)
        add_health(page, run)
        add_others(page, run)
        add_details(page, run)
    # sections are known only now: a run without traces has no link to them
    nav = "".join(f'<a href="#{a}">{esc(t)}</a>' for a, t in page.sections)
    body = "\n".join(page.parts).replace("<!--nav-->", f"<nav>{nav}</nav>", 1)
    a = run.args
    title = f"{a.get('exp_name', 'run')} · {a.get('data') or a.get('env_id') or a.get('scenario') or ''}"
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>{esc(title.strip(' ·'))}</title>\n"
        f'<meta name="viewport" content="width=device-width,initial-scale=1">\n<style>{CSS}</style></head>\n'
        f"<body><main>\n{body}\n</main></body></html>\n"
    )
    return text, page.figures


def main(argv: list[str] | None = None) -> str:
    """Write RUN_DIR/report.html, return its path; a missing or broken file: a line on stderr, exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = lambda message: parser.exit(2, f"report: {message}\n")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="directory of one run")
    parser.add_argument("--figures", metavar="DIR", help="also write every plot as DIR/<name>.png")
    args = parser.parse_args(argv)
    path = os.path.join(args.run_dir, "report.html")
    try:
        text, figures = build(load_run(args.run_dir))
    except ReportError as e:
        print(f"report: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    # replaced in one go: a reader never meets half a page, and a full disk keeps the old one
    with open(f"{path}.tmp", "w", encoding="utf-8", newline="\n") as f:
        f.write(text)
    os.replace(f"{path}.tmp", path)
    if args.figures:
        os.makedirs(args.figures, exist_ok=True)
        for name, fig in figures.items():
            fig.savefig(os.path.join(args.figures, f"{name}.png"), dpi=160)
    return path


if __name__ == "__main__":
    print(main())
