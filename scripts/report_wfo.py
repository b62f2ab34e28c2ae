"""The page of scripts/run_full_wfo.py: report.py's style, one section a question."""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd

from scripts.report import RC, Page, add_scores, canvas, color_of, esc, show, thin, words
from scripts.report_market import label_growth

POINTS = 600  # of a curve


def build(name: str, summary: dict, growth: pd.DataFrame, results: list, segments: list) -> str:
    """HTML of a study: summary is results/NAME/summary.json, growth everyone's bar by bar."""
    page = Page()
    with matplotlib.rc_context(RC):
        add_header(page, name, summary)
        add_equity(page, growth, segments)
        add_tables(page, summary, segments)
        add_folds(page, summary, results)
        add_luck(page, summary)
    return page.html(f"walk-forward: {name}")


def add_header(page: Page, name: str, summary: dict):
    luck = summary["luck"]
    tone = "good" if luck["skill"] else "warn"
    page.add(f"<h1>Walk-forward: {esc(name)}</h1>")
    facts = f"{summary['finished']} of {summary['wanted']} segments finished"
    facts += f" · {summary['months']:.1f} months out of sample · trials so far: {luck['trials']}"
    if summary["partial"]:
        facts += f" · segments tested on a part of their rows (time): {summary['partial']}"
    page.add(f'<p class="soft">{esc(facts)}</p>')
    text = summary["sentence"]
    page.add(f'<div class="chips"><span class="chip {tone}"><b>{esc(text)}</b></span></div>')
    page.add('<div class="tiles">')
    year = np.sqrt(summary["bars_per_year"])
    low, high = show(luck["low"] * year, "signed"), show(luck["high"] * year, "signed")
    fold = summary["folds"]
    tiles = (
        ("Sharpe ratio, a year", show(luck["sharpe"] * year, "signed"), f"95 %: {low} to {high}"),
        ("deflated Sharpe ratio", f"{luck['deflated']:.3f}", "skill from .95 on"),
        ("months needed more", show(summary["months_more"], "int"), "at this Sharpe ratio"),
        ("worst, bp a bar", show(fold["worst_bps"], "signed"), f"segment {fold['worst_segment']}"),
    )
    for i, (label, value, small) in enumerate(tiles):
        page.add(
            f'<div class="tile{"" if i else " main"}"><span class="of">{esc(label)}</span>'
            f"<b>{esc(value)}</b><span>{esc(small)}</span></div>"
        )
    page.add("</div><!--nav-->")


def add_equity(page: Page, growth: pd.DataFrame, segments: list):
    lead = "Test months only, one after the other; every segment starts flat and pays its entry."
    page.section("equity", "Out of sample", lead)
    fig, (ax,) = canvas(9.4, 3.4, left=1.05)
    for i, who in enumerate(growth):
        total = np.cumsum(np.log1p(growth[who].to_numpy()))
        bars, total = thin(np.arange(len(total)), total, POINTS, "last")
        width = 1.8 if who == "agent" else 1.0
        times = growth.index[bars.astype(int)]
        ax.plot(times, total, label=words(who), color=color_of(who, i), lw=width)
    for segment in segments:
        ax.axvline(segment.test_start, color="#5a6675", lw=1.0, ls=":")
    label_growth(ax)
    caption = "Dotted: a new segment, with an agent of its own."
    page.add('<div class="grid">')
    page.plot("equity", "Equity of the chosen agents and of their rivals", fig, caption, wide=True)
    page.add("</div>")


def add_tables(page: Page, summary: dict, segments: list):
    lead = "The agent of a segment is the seed that did best on its eval rows."
    page.section("table", "Agent beside rivals", lead)
    blocks = {"all test months": summary["all"]}
    notes = {}
    months = {s.number: f"test {s.test_start:%Y-%m-%d} to {s.stop:%Y-%m-%d}" for s in segments}
    for number, rows in summary["segments"].items():
        block = f"segment {number}"
        blocks[block] = rows
        notes[block] = f"{months[number]}, seed {summary['seeds'][number]}"
    add_scores(page, blocks, notes)


def add_folds(page: Page, summary: dict, results: list):
    fold = summary["folds"]
    page.section("folds", "Segment by segment")
    fig, (ax,) = canvas(9.4, 2.7, left=0.75, bottom=0.45)
    for i, who in enumerate(("buy_and_hold", "sparse_linear")):
        rows = summary["segments"].items()
        y = [test[who]["mean_reward_bps"] for _, test in rows]
        ax.plot(list(summary["segments"]), y, "_", ms=22, color=color_of(who, i), label=words(who))
    for result in results:
        chosen = summary["seeds"][result["segment"]] == result["seed"]
        y = result["test"]["agent"]["mean_reward_bps"]
        label = {"label": "agent"} if result is results[0] else {}
        face = color_of("agent") if chosen else "none"
        ax.plot(result["segment"], y, "o", color=color_of("agent"), mfc=face, **label)
    ax.axhline(0, color="#1f2937", lw=0.8)
    ax.set_xticks(list(summary["segments"]))
    ax.set_xlabel("segment")
    ax.set_ylabel("realised, bp / bar")
    caption = "Every seed; the filled one was chosen on eval rows."
    page.add('<div class="grid">')
    page.plot("folds", "Test months of each segment", fig, caption, wide=True)
    page.add("</div>")
    rows = {
        "worst segment": f"{fold['worst_segment']}: {show(fold['worst_bps'], 'signed')} bp a bar",
        "standard deviation over segments": bps(fold["std_over_segments_bps"]),
        "standard deviation over seeds": bps(fold["std_over_seeds_bps"]),
    }
    for who, share in fold["beats"].items():
        ahead = summary["leads"][who]
        lead = f"lead {show(ahead['lead_bps'], 'signed')} bp a bar"
        chance = f"above 0 with probability {ahead['probability']:.2f}"
        rows[f"beats {words(who)} in"] = f"{100 * share:.0f} % of the segments; {lead}, {chance}"
    add_rows(page, rows)


def bps(x) -> str:
    return "needs two" if x is None else f"{show(x, 'signed')} bp a bar"


def add_luck(page: Page, summary: dict):
    luck = summary["luck"]
    bars_a_month = summary["bars_per_year"] / 12
    year = np.sqrt(summary["bars_per_year"])
    page.section("luck", "Luck", "Sharpe ratios of the agent's test months; docs/walk_forward.md.")
    low, high = luck["low"] * year, luck["high"] * year
    record = luck["track_record_bars"] / bars_a_month
    pbo = luck["overfitting"]
    rows = {
        "Sharpe ratio, a year": f"{luck['sharpe'] * year:+.2f}",
        "95 % interval (stationary bootstrap)": f"{low:+.2f} to {high:+.2f}",
        "skewness and kurtosis of a bar": f"{luck['skew']:.2f}, {luck['kurtosis']:.1f}",
        "probabilistic Sharpe ratio (above 0)": f"{luck['probabilistic']:.3f}",
        "configurations and seeds tried on this data": f"{luck['trials']} (results/ledger.jsonl)",
        "what the best of them shows by chance, a year": f"{luck['threshold'] * year:.2f}",
        "deflated Sharpe ratio (above that)": f"{luck['deflated']:.3f}",
        "minimum track record (one trial, 95 %)": f"{show(record, 'int')} months",
        "probability of backtest overfitting": "needs two trials" if pbo is None else f"{pbo:.2f}",
    }
    add_rows(page, rows)


def add_rows(page: Page, rows: dict):
    cells = "".join(f"<tr><th>{esc(k)}</th><td>{esc(v)}</td></tr>" for k, v in rows.items())
    page.add(f'<table class="kv"><tbody>{cells}</tbody></table>')
