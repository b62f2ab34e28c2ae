"""What scripts/report.py draws of a market: equity, chance, pairs, positions, values."""

from __future__ import annotations

import numpy as np

from scripts.report import (
    COLORS,
    INK,
    POLICIES,
    Page,
    Record,
    add_scores,
    best_two,
    canvas,
    color_of,
    curve,
    esc,
    number,
    ordered,
    runs_of,
    step_axis,
    table_rows,
    thin,
    tone_of,
    within,
    words,
)

LONG, SHORT = "#0b62b5", "#d1622b"
PAID = "#7a4fb5"  # costs, entropy: no policy's colour, nor a side's
REGIMES = (LONG, PAID, "#3a9fd0", "#4b5563")
STYLE = {
    "agent": dict(lw=1.9, zorder=6),
    "optimum": dict(lw=1.3, ls=(0, (4, 2)), zorder=5),
    "flat": dict(lw=0.8, ls=":"),
    "actor": dict(lw=1.2, zorder=4),
    "critic_grid": dict(lw=1.2, zorder=4),
}
COLUMNS = {
    "timestamp",
    "close",
    "next_return",
    "position",
    "equity",
    "expected",
    "signal",
    "regime",
}
PAST = (24, 168)  # bars
EVAL = "eval/<split>/"  # begins the docs' names of evaluated metrics
LAST = 500  # bars of the picture of positions under price
MOST = 30  # columns of the picture of the screen
DRAWS = 500  # resamples of the bootstrap


def has_figure(column: str) -> bool:
    return column in COLUMNS or column.startswith(("position_", "equity_"))


def policies_of(trace: dict, stem: str) -> dict[str, np.ndarray]:
    """{policy: its column `stem` or `stem_<policy>`}, known names first."""
    columns = {"agent": trace[stem]} if stem in trace else {}
    for name, values in trace.items():
        if name.startswith(stem + "_"):
            columns[name.removeprefix(stem + "_")] = values
    return {k: columns[k] for k in [*POLICIES, *columns] if k in columns}


def time_of(trace: dict, column: str) -> np.ndarray:
    return trace.get("timestamp", np.arange(len(trace[column])))


def pairs_of(traces: dict, split: str) -> dict[str, dict]:
    """{pair: its trace} of a split whose account holds several: traces/<split>_<pair>.parquet."""
    return {
        k[len(split) + 1 :]: t
        for k, t in traces.items()
        if k.startswith(split + "_")
    }


def accounts_of(run: Record) -> dict[str, dict]:
    """{split: trace}, unseen data first, without the traces of single pairs."""
    stems = tuple(name + "_" for name in run.traces)
    names = [name for name in run.traces if not name.startswith(stems)]
    return {s: run.traces[s] for s in ordered(names)}


# --------------------------------------------------------------------------------------- intervals
def bootstrap_means(growth: np.ndarray, draws: int = DRAWS) -> np.ndarray:
    """Means (k, draws) of resamples of growth (k, n), all rows at the same bars.

    The stationary bootstrap of Politis and Romano (1994): blocks of bars begin anywhere, go on
    from the start behind the end, and have geometric lengths of mean n^(1/3).
    """
    rng = np.random.default_rng(0)
    n = growth.shape[1]
    length = max(n ** (1 / 3), 1.0)
    shape = draws, int(2 * n / length) + 40
    ends = np.minimum(np.cumsum(rng.geometric(1 / length, shape), 1), n)
    lengths = np.diff(ends, prepend=0)
    starts = rng.integers(0, n, shape)
    means = np.empty((len(growth), draws))
    for row, mean in zip(growth, means):
        total = np.concatenate([[0.0], np.cumsum(np.tile(row, 2))])
        mean[:] = (total[starts + lengths] - total[starts]).sum(1) / n
    return means


def growth_of(trace: dict) -> dict[str, np.ndarray]:
    """{policy: log growth of its equity, bar by bar}, if that is positive throughout."""
    curves = policies_of(trace, "equity")
    return {
        k: np.diff(np.log(y), prepend=0.0)
        for k, y in curves.items()
        if np.nanmin(y, initial=1) > 0 and np.isfinite(y).all()
    }


def interval(sample: np.ndarray) -> tuple[float, float]:
    low, high = 1e4 * np.quantile(sample, (0.025, 0.975))
    return float(low), float(high)


def chance_rows(trace: dict) -> dict[str, dict]:
    """{policy: its realised bp a bar and the agent's lead over it, with 95 % intervals}."""
    growth = growth_of(trace)
    if "agent" not in growth or len(growth["agent"]) < 20:
        return {}
    means = dict(zip(growth, bootstrap_means(np.array(list(growth.values())))))
    rows = {}
    for name, bars in growth.items():
        low, high = interval(means[name])
        rows[name] = {
            "mean_reward_bps": 1e4 * bars.mean(),
            "from_bps": low,
            "to_bps": high,
        }
        if name != "agent":
            low, high = interval(means["agent"] - means[name])
            lead = 1e4 * (growth["agent"] - bars).mean()
            rows[name] |= {
                "lead_bps": lead,
                "lead_from_bps": low,
                "lead_to_bps": high,
            }
    return rows


# ----------------------------------------------------------------------------------------- figures
def draw_equity(trace: dict, lines: dict):
    """Equity (log) over drawdown; lines: {name: equity}, all over the times of `trace`."""
    x = time_of(trace, "equity")
    fig, (top, low) = canvas(
        4.6, 3.9, 2, left=0.85, sharex=True, height_ratios=(2.2, 1)
    )
    for i, (name, equity) in enumerate(lines.items()):
        style = dict(color=color_of(name, i), lw=1.0) | STYLE.get(name, {})
        growth = np.log(
            equity, where=equity > 0, out=np.full(len(equity), np.nan)
        )
        # the last of a bucket keeps the final equity, its least the deepest drawdown: a mean
        # would flatter both
        top.plot(*thin(x, growth, 350, "last"), label=words(name), **style)
        fall = 100 * np.expm1(growth - np.fmax.accumulate(growth))
        low.plot(*thin(x, fall, 350, "min"), **style)
    label_growth(top)
    low.set_ylabel("drawdown, %")
    return fig


def label_growth(ax):
    """The axis of what is drawn as log growth; call it after plotting."""
    limits = ax.get_ylim()
    ax.set_yticks(*growth_ticks(*limits))
    ax.set_ylim(limits)
    ax.set_ylabel("growth, log scale")


def growth_ticks(low: float, high: float) -> tuple[np.ndarray, list[str]]:
    """Ticks between two log growths at round returns, and what to call them."""
    from matplotlib.ticker import MaxNLocator

    locator = MaxNLocator(5)
    if high - low < 0.3:  # nearly linear: returns at even distances
        returns = locator.tick_values(np.expm1(low), np.expm1(high))
    else:  # 60 %, not 64.9 %
        returns = np.expm1(locator.tick_values(low, high))
        size = 10.0 ** np.floor(np.log10(np.maximum(np.abs(returns), 1e-3)))
        returns = np.unique(np.round(returns / size) * size)
    returns = returns[(returns > np.expm1(low)) & (returns < np.expm1(high))]
    names = []
    for x in 100 * returns:
        name = f"{x:+,.0f} %" if abs(x) >= 100 else f"{x:+.3g} %"
        names.append(name.replace("-", "−").replace("+0 ", "0 "))
    return np.log1p(returns), names


def draw_positions(trace: dict, bars: int, above: str = "price"):
    """Price over position for the last bars, the regime (if known) as a tint."""
    part = {k: v[-bars:] for k, v in trace.items()}
    x = time_of(part, "position")
    position = part["position"]
    fig, (top, low) = canvas(10.4, 3.9, 2, left=0.85, sharex=True, height_ratios=(1.5, 1))
    if "close" in part:
        top.plot(x, part["close"], color=INK, lw=1.1, label=above)
    regime = part.get("regime", np.zeros(len(x)))
    for value in np.unique(regime[np.isfinite(regime)])[1:]:
        tint = dict(
            color=REGIMES[int(value) % 4],
            alpha=0.13,
            lw=0,
            label=f"regime {value:g}",
        )
        for start, stop in runs_of(regime == value):
            top.axvspan(x[start], x[min(stop, len(x) - 1)], **tint)
    for side, color, where in (
        ("long", LONG, position >= 0),
        ("short", SHORT, position <= 0),
    ):
        style = dict(step="post", color=color, alpha=0.75, lw=0, label=side)
        low.fill_between(x, position, 0, where=where, **style)
    if "position_optimum" in part:
        best = part["position_optimum"]
        low.step(
            x,
            best,
            where="post",
            color=COLORS["optimum"],
            lw=1.0,
            label="optimum",
        )
    top.margins(x=0)
    top.set_ylabel(above)
    low.set_ylabel("position")
    return fig


def draw_band(rows: dict):
    """A stripe a row over the whole split, {name: (times, positions)}: blue long, orange short."""
    from matplotlib.colors import LinearSegmentedColormap

    tones = [SHORT, "#f7d9c9", "#ffffff", "#c8ddf2", LONG]
    colours = LinearSegmentedColormap.from_list("position", tones)
    fig, (ax,) = canvas(10.4, 0.55 + 0.3 * len(rows), left=1.6)
    limit = max(1.0, *(np.nanmax(np.abs(p), initial=0) for _, p in rows.values()))
    for i, (times, position) in enumerate(rows.values()):
        x, mean = thin(times, position, 1000)
        style = dict(cmap=colours, vmin=-limit, vmax=limit, rasterized=True)
        ax.pcolormesh(x, [i - 0.45, i + 0.45], mean[None, :-1], **style)
    ax.set_yticks(range(len(rows)), [words(k) for k in rows], color=INK)
    ax.invert_yaxis()
    ax.grid(False)
    return fig


def draw_histogram(traces: dict):
    """How often the agent holds which position, by split."""
    positions = [
        t["position"][np.isfinite(t["position"])] for t in traces.values()
    ]
    limit = max(1.0, *(np.abs(p).max(initial=0) for p in positions))
    # bins centred on tenths of the range, so that a grid of positions fills them evenly
    edges = limit * (np.arange(22) - 10.5) / 10
    shares = [np.full(len(p), 100 / max(len(p), 1)) for p in positions]
    fig, (ax,) = canvas(4.6, 3.0, bottom=0.45)
    ax.hist(
        positions,
        edges,
        weights=shares,
        label=list(traces),
        color=[tone_of(name, i) for i, name in enumerate(traces)],
    )
    ax.set_ylabel("% of bars")
    ax.set_xlabel("position")
    return fig


def gross_of(trace: dict) -> np.ndarray:
    """(n,) log growth of the position without costs."""
    returns = np.nan_to_num(trace["position"] * trace["next_return"])
    return np.log1p(np.maximum(returns, -0.999))


def draw_costs(traces: list[dict]):
    """Cumulative log return before and after costs, mean of the traces; None if one cannot tell.

    The trace of an account of several pairs cannot: the mean position times the mean return is not
    what it earned.
    """
    every = [growth_of(trace).get("agent") for trace in traces]
    if any(g is None or "next_return" not in t for g, t in zip(every, traces)):
        return None
    times = [time_of(trace, "equity") for trace in traces]
    x = np.unique(np.concatenate(times))
    growth, gross = np.zeros((2, len(x)))
    for trace, bars, at in zip(traces, every, times):
        rows = np.searchsorted(x, at)
        growth[rows] += bars / len(traces)
        gross[rows] += gross_of(trace) / len(traces)
    # costs are not in a trace: they are what the equity lacks of the position's own growth
    lines = {
        "before costs": (gross, "#8a94a1"),
        "costs": (growth - gross, PAID),
        "what is left": (growth, LONG),
    }
    fig, (ax,) = canvas(4.6, 3.0)
    for label, (bars, color) in lines.items():
        ax.plot(
            *thin(x, 100 * np.cumsum(bars), 350, "last"), color=color, label=label
        )
    ax.set_ylabel("cumulative log return, %")
    return fig


def bin_means(where: np.ndarray, y: np.ndarray, n: int) -> np.ndarray:
    """Mean of y in each of n bins; NaN where fewer than three: two bars do not make a mean."""
    where, y = where[np.isfinite(y)], y[np.isfinite(y)]
    count = np.bincount(where, minlength=n)
    total = np.bincount(where, y, minlength=n)
    return np.where(count >= 3, total / np.maximum(count, 1), np.nan)


def draw_response(trace: dict, x: np.ndarray, label: str, bins: int = 21):
    """Mean position in bins of x (n,), a colour a regime if there are several; optimum dashed."""
    regime = trace.get("regime", np.zeros(len(x)))
    ok = np.isfinite(x) & np.isfinite(regime)
    cuts = np.unique(np.quantile(x[ok], np.linspace(0, 1, bins + 1)))
    where = np.searchsorted(cuts, x, "right") - 1
    fig, (ax,) = canvas(4.6, 3.0, bottom=0.45)
    values = np.unique(regime[ok])[:4]
    for i, value in enumerate(values):
        rows = ok & (regime == value)
        tag = f", regime {value:g}" if len(values) > 1 else ""
        # a bin lies at the mean of its x: the few states of a chain stay where they are
        middle = bin_means(where[rows], x[rows], len(cuts))
        for who, name, dash in (
            ("position", "agent", "-"),
            ("position_optimum", "optimum", "--"),
        ):
            if who in trace:
                mean = bin_means(where[rows], trace[who][rows], len(cuts))
                color = REGIMES[i] if len(values) > 1 else COLORS[name]
                style = dict(
                    color=color, ls=dash, lw=1.9 if dash == "-" else 1.2
                )
                ax.plot(
                    middle[middle == middle],
                    mean[middle == middle],
                    label=name + tag,
                    **style,
                )
    ax.set_xlabel(label)
    ax.set_ylabel("mean position")
    return fig


def draw_spread(metrics: dict):
    """q_action_spread beside alpha and alpha * |entropy|, log scale."""
    from matplotlib.ticker import LogLocator

    lines = {
        "value/q_action_spread": ("spread of Q over actions", LONG),
        "policy/alpha": ("alpha", "#8a94a1"),
        "value/alpha_entropy": ("alpha × |entropy|", PAID),
    }
    fig, (ax,) = canvas(4.6, 2.7, bottom=0.45)
    for key in [k for k in lines if k in metrics]:
        x, y = metrics[key]
        label, color = lines[key]
        # an entropy that crosses 0 dives on a log axis: five decades are enough to see it
        least = 1e-5 * np.nan_to_num(y).max(initial=0)
        curve(ax, x, np.where(y > least, y, np.nan), color=color, label=label)
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    between = (1, 2, 5) if high < 100 * low else (1,)
    ax.yaxis.set_major_locator(LogLocator(subs=between))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    step_axis(ax)
    return fig


def draw_screen(evidence: dict, least: float | None):
    """Evidence of columns, the strongest on top; dashed: what is needed."""
    names, sizes = list(evidence), list(evidence.values())
    least_size = np.inf if least is None else least
    colors = [LONG if size >= least_size else "#b4bdc9" for size in sizes]
    longest = max(map(len, names))
    margin = 0.2 + 0.08 * longest  # inches
    height = 0.6 + 0.18 * len(names)
    fig, (ax,) = canvas(4.2, height, left=margin, bottom=0.45)
    ax.barh(range(len(names)), sizes, 0.7, color=colors)
    if least is not None:
        ax.axvline(least, color=INK, lw=1.0, ls="--", label=f"needed: {least:.2f}")
    ax.set_yticks(range(len(names)), names, color=INK)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(False, axis="y")
    ax.set_xlabel("evidence")
    return fig


def draw_sweep(sweep: list[dict]):
    """Return against turnover of one agent that is told several w_cost."""
    lines = {
        "mean_expected_bps": ("expected", LONG, "-"),
        "mean_reward_bps": ("realised", "#8a94a1", "--"),
    }
    fig, (ax,) = canvas(4.6, 3.0, left=0.75, bottom=0.45)
    turnover = [row["turnover"] for row in sweep]
    keys = [k for k in lines if sweep[0].get(k) is not None]
    for key in keys:
        label, color, dash = lines[key]
        returns = [row[key] for row in sweep]
        ax.plot(turnover, returns, dash, color=color, marker="o", ms=4, label=label)
    for row, x in zip(sweep, turnover):
        place = dict(xytext=(0, 7), textcoords="offset points", ha="center")
        ax.annotate(f"{row['w_cost']:g}", (x, row[keys[0]]), **place)
    ax.margins(0.12, 0.15)
    ax.locator_params(axis="x", nbins=4)
    ax.set_xlabel("turnover a bar")
    ax.set_ylabel("bp a bar")
    return fig


# ---------------------------------------------------------------------------------------- sections
def add_traces(page: Page, run: Record):
    """Equity, chance, pairs, positions and behaviour."""
    accounts = accounts_of(run)
    with_equity = {s: t for s, t in accounts.items() if "equity" in t}
    if len(with_equity) > 1:
        # equity on train rows says nothing about the market and dwarfs the others
        with_equity.pop("train", None)
    if with_equity:
        add_equity(page, with_equity)
        add_chance(page, with_equity)
    else:
        page.lack(
            "equity and drawdown", "no traces/*.parquet has the column equity"
        )
    add_symbols(page, run)
    with_position = {s: t for s, t in accounts.items() if "position" in t}
    if with_position:
        add_positions(page, run, with_position)
    else:
        page.lack("positions", "no traces/*.parquet has the column position")
    if {"value/q_action_spread", "policy/alpha"} <= set(run.metrics):
        add_values(page, run)
    add_screen(page, within(run.summary, "data", "screen"))
    add_sweep(page, within(run.summary, "audit").get("w_cost_sweep"))


def add_equity(page: Page, traces: dict):
    page.section("equity", "Equity and drawdown")
    page.add('<div class="grid">')
    for split, trace in traces.items():
        fig = draw_equity(trace, policies_of(trace, "equity"))
        title = f"{split}: equity and drawdown"
        page.plot(f"equity_{split}", title, fig, metric=EVAL + "total_return")
    page.add("</div>")


def add_chance(page: Page, traces: dict):
    """Realised numbers with what chance makes of them."""
    blocks = {s: chance_rows(t) for s, t in traces.items()}
    blocks = {s: rows for s, rows in blocks.items() if rows}
    if not blocks:
        page.lack("intervals", "no trace has 20 bars of positive equity")
        return
    lead = (
        f"95 % intervals of the realised bp a bar, from {DRAWS} resamples of the bars "
        "(stationary bootstrap). Where the interval of the lead holds 0, these bars cannot "
        "tell the two apart."
    )
    page.section("chance", "What chance could explain", lead)
    add_scores(page, blocks, {})


def add_symbols(page: Page, run: Record):
    """Pair by pair: a table a split, the first unfolded."""
    results = within(run.summary, "eval")
    splits = [s for s in ordered(results) if within(results, s, "symbols")]
    for i, split in enumerate(splits):
        if i == 0:
            page.section("pairs", "Pair by pair")
        traces = pairs_of(run.traces, split)
        rows = {}
        for pair, result in within(results, split, "symbols").items():
            rows[pair] = pair_row(result, traces.get(pair, {}))
        page.add(
            f"<details{'' if i else ' open'}><summary>{esc(split)}: the agent</summary>"
        )
        add_scores(page, {split: rows}, policies=False)
        page.add("</details>")


def pair_row(result: dict, trace: dict) -> dict:
    """The agent's metrics on one pair, their interval, and the best baseline's realised mean."""
    everyone = table_rows(result)
    row = chance_rows(trace).get("agent", {}) | everyone.get("agent", {})
    for name in best_two(everyone, "mean_reward_bps"):
        if name != "optimum" and "rival_bps" not in row:
            row["rival_bps"] = everyone[name]["mean_reward_bps"]
    return row


def add_positions(page: Page, run: Record, traces: dict):
    split, trace = next(iter(traces.items()))
    pairs = {
        k: t for k, t in pairs_of(run.traces, split).items() if "position" in t
    }
    page.section("positions", "What it holds, and when")
    page.add('<div class="grid">')
    bars = min(LAST, len(trace["position"]))
    what, above = "positions under price", "price"
    if pairs:  # their account's close is the equity of holding them all
        what, above = "mean position of the pairs under buy and hold of them all", "equity"
    fig = draw_positions(trace, bars, above)
    title = f"{split}: {what}, the last {bars} bars"
    page.plot("positions", title, fig, wide=True, metric=EVAL + "exposure")
    times = time_of(trace, "position")
    policies = policies_of(trace, "position")
    policies.pop("flat", None)  # an empty stripe
    rows = {k: (times, position) for k, position in policies.items()}
    if pairs:
        rows = {
            k: (time_of(t, "position"), t["position"]) for k, t in pairs.items()
        }
    title = f"{split}: positions over the whole split"
    legend = "Blue is long, orange short, white flat."
    page.plot("band", title, draw_band(rows), legend, wide=True)
    title = "How often it holds which position"
    page.plot("histogram", title, draw_histogram(traces), metric="policy/state_dependence")
    single = list(pairs.values()) or [trace]
    add_responses(page, split, single)
    title = f"{split}: what trading costs"
    if pairs:
        title += ", mean of the pairs"
    fig = draw_costs(single)
    if fig:
        page.plot("costs", title, fig, metric=EVAL + "turnover")
    page.add("</div>")


def with_past(trace: dict) -> dict:
    """The trace with its expected return in bp and its return over the past bars in %."""
    out = dict(trace)
    if "expected" in trace:
        out["expected"] = 1e4 * trace["expected"]
    for bars in PAST if "close" in trace else ():
        past = np.full(len(trace["close"]), np.nan)
        past[bars:] = 100 * (trace["close"][bars:] / trace["close"][:-bars] - 1)
        out[f"past_{bars}"] = past
    return out


def add_responses(page: Page, split: str, traces: list[dict]):
    """Position against signal and conditional mean if known, else against past returns."""
    traces = [with_past(t) for t in traces]
    names = [k for k in traces[0] if all(k in t for t in traces)]
    trace = {k: np.concatenate([t[k] for t in traces]) for k in names}
    # on a drift market both are constants: nothing to plot against
    varies = {
        k for k, v in trace.items() if len(np.unique(v[np.isfinite(v)])) > 1
    }
    labels = {
        "signal": "signal",
        "expected": "expected return of the next bar, bp",
    }
    if "signal" not in varies:
        for bars in PAST:
            labels[f"past_{bars}"] = f"return over the past {bars} bars, %"
    for key in [k for k in labels if k in varies]:
        fig = draw_response(trace, trace[key], labels[key])
        title = f"{split}: position against {labels[key]}"
        page.plot(
            f"against_{key}", title, fig, "A flat line does not react to it."
        )
    if not varies & labels.keys():
        page.lack(
            "position against signal", "no trace has signal, expected or close"
        )


def add_values(page: Page, run: Record):
    """What actions are worth, beside what randomness is paid."""
    page.section("values", "What actions are worth")
    page.add('<div class="grid">')
    title = "Spread of Q over actions, alpha and entropy"
    page.plot("q_spread", title, draw_spread(run.metrics), metric="value/q_action_spread")
    page.add("</div>")


def add_screen(page: Page, screen: dict):
    """Which technical columns say something about the next return of the train rows."""
    evidence = {k: number(v) for k, v in within(screen, "evidence").items()}
    if not evidence:
        return
    least = screen.get("least")
    order = sorted(evidence, key=evidence.get, reverse=True)
    strong = [k for k in order if least is not None and evidence[k] >= least]
    lead = f"{len(strong)} of {len(order)} technical columns show evidence; the others are 0."
    page.section("screen", "Screen of columns", lead)
    fig = draw_screen({k: evidence[k] for k in order[:MOST]}, least)
    caption = (
        "Largest |t| of a column or its square with the next return, alone and times a column of "
        "the HMM, over what is needed."
    )
    if not strong:
        caption += " No column has enough: the false-discovery rule lets none through."
    if len(order) > MOST:
        caption += f" {len(order) - MOST} weaker columns are not drawn."
    page.add('<div class="grid">')
    page.plot("screen", "Evidence on train rows", fig, caption)
    page.add("</div>")


def add_sweep(page: Page, sweep: list | None):
    """One trained agent, told that turnover weighs more and more."""
    if not sweep:
        return
    page.section("sweep", "What w_cost does")
    caption = "The number at a point is w_cost: from left to right it should fall."
    page.add('<div class="grid">')
    page.plot("sweep", "Return against turnover", draw_sweep(sweep), caption)
    page.add("</div>")
