"""scripts/report.py and its parts, on run directories made by hand."""
import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from scripts import report, report_market, report_traffic

SCRIPTS = sorted(Path(__file__).parents[1].glob("cleanrl_crypto/*.py"))
PAGES = [report.ROOT / "docs" / f"{p.stem}.md" for p in SCRIPTS]


# --------------------------------------------------------------------------------- run directories
SWEEP = [
    {"w_cost": w, "mean_reward_bps": 5 - w, "turnover": 0.1 - 0.05 * w, "mean_expected_bps": None}
    for w in (0, 0.25, 0.5, 0.75, 1)
]


def make_trace(n: int, seed: int, synthetic: bool = True) -> pd.DataFrame:
    """A market whose signal flips its sign in the storm, and policies that trade it."""
    rng = np.random.default_rng(seed)
    signal = np.round(2 * np.sin(np.arange(n) / 20)) / 2
    regime = np.arange(n) // 100 % 2
    sigma = np.where(regime == 1, 0.012, 0.005)
    expected = 0.14 * signal * np.where(regime == 1, -1, 1) * sigma
    growth = expected + sigma * rng.standard_normal(n)
    position = {
        "": np.round(np.clip(200 * expected + rng.normal(0, 0.2, n), -1, 1), 1),
        "_actor": np.round(np.clip(100 * expected, -1, 1), 1),
        "_flat": np.zeros(n),
        "_buy_and_hold": np.ones(n),
    }
    times = pd.date_range("2024-01-01", periods=n, freq="h", tz="UTC")
    columns = {"timestamp": times, "close": 100 * np.cumprod(1 + growth)}
    columns |= {"next_return": np.append(growth[:-1], np.nan), "q_spread": rng.random(n)}
    if synthetic:
        position["_optimum"] = np.sign(expected)
        columns |= {"expected": expected, "signal": signal, "regime": regime}
    for name, exposure in position.items():
        cost = 5e-4 * np.abs(np.diff(exposure, prepend=0.0))
        columns[f"position{name}"] = exposure
        columns[f"equity{name}"] = np.cumprod(1 + exposure * growth - cost)
    return pd.DataFrame(columns)


def metrics_of(expected: float, synthetic: bool) -> dict:
    metrics = {"mean_reward_bps": expected - 0.123, "max_drawdown": -expected / 100 or None, "trades": 12_000}
    return metrics | ({"mean_expected_bps": expected} if synthetic else {})


def scores(synthetic: bool = True) -> dict:
    """A split of summary.json: the critic's grid acts, the optimum earns 8 bp."""
    everyone = {"flat": 0.0, "buy_and_hold": -1.5} | ({"optimum": 8.0} if synthetic else {})
    agent = metrics_of(6.0, synthetic) | {"score": 0.75 if synthetic else None}
    baselines = {k: metrics_of(v, synthetic) for k, v in everyone.items()}
    return {"agent": agent, "critic_grid": agent, "actor": metrics_of(4.0, synthetic),
            "baselines": baselines, "rows": [], "partial": False}


NAMES = ("losses/qf_loss", "charts/SPS", "policy/alpha", "policy/state_dependence", "value/q_action_spread",
         "env/turnover", "alarm/sigma")


def log_lines(points: int) -> list[dict]:
    rows = []
    for i, x in enumerate(np.linspace(0, 1, points).tolist()):
        row = {"global_step": 1024 * (1 + 12 * i), "wall": 200 * x, "time/learn": 100 * x}
        row |= {name: x * k for k, name in enumerate(NAMES)}
        if i % 4 == 0:
            row |= {"eval/eval/score": 0.7 * x, "eval/eval/turnover": 0.2}
        rows.append(row)
    return rows


def write(folder: Path, args: dict, summary: dict, rows: list[dict], traces: dict) -> Path:
    (folder / "traces").mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(args))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, frame in traces.items():
        frame.to_parquet(folder / "traces" / f"{name}.parquet")
    return folder


def make_run(folder: Path, bars=60, points=4, synthetic=True, traces=True) -> Path:
    """A market's run directory as the training script leaves it; points: log points."""
    sizes = {"train": 2 * bars, "eval": bars, "test": bars}
    frames = {s: make_trace(n, k, synthetic) for k, (s, n) in enumerate(sizes.items())}
    data = "synthetic:regime" if synthetic else "BTCUSDT_1h.parquet"
    attribution = {"technical": 0.42, "hmm": 0.31}
    evidence = {"rsi_14": 1.0, "log_volume": 9.5, "ret_1": 4.5}
    summary = {
        "status": "timeout", "began": "2026-01-02 03:04:05 UTC", "commit": "0ddba11c0ffe+",
        "command": "cleanrl_crypto/tqc_film_batch.py --timeout 300",
        "global_step": 480_000, "updates": 470, "best_step": 2048,
        "phases": {"setup": 8.1, "rollout": 40.2, "learn": 160.3},
        "eval": {s: scores(synthetic) for s in frames},
        "audit": {"verdict": "healthy", "reasons": ["yes"], "attribution": attribution, "w_cost_sweep": SWEEP},
        "versions": {"torch": "2.9"}, "device": {"torch": "cpu", "backend": "cpu"},
        "data": {"spec": data, "names": ["BTC"], "sha256": "0123456789abcdef" * 4,
                 "screen": {"evidence": evidence, "least": 4.0}},
    }
    args = {"exp_name": "tqc_film_batch", "seed": 1, "data": data, "timeout": 300.0}
    return write(folder, args, summary, log_lines(points), frames if traces else {})


def make_pairs(folder: Path) -> Path:
    """The account of two pairs of unequal history."""
    pairs = {"EURUSD": make_trace(200, 0), "USDJPY": make_trace(150, 1)}
    frames, results = {}, {}
    for split in ("train", "eval", "test"):
        frames[split] = make_trace(200, 5, synthetic=False)
        frames |= {f"{split}_{name}": frame for name, frame in pairs.items()}
        results[split] = scores() | {"symbols": {k: scores() for k in pairs}}
    data = {"names": list(pairs), "sha256": ["3147a5aa" * 8, "d459b83c" * 8]}
    summary = {"command": "dqn_forex_subproc.py", "updates": 9, "eval": results, "data": data}
    return write(folder, {"exp_name": "dqn"}, summary, log_lines(3), frames)


def road_columns(freeway: bool, fade: float) -> pd.DataFrame:
    """A wave that fades, or two junctions."""
    t = np.arange(60.0)
    frame = {"time_s": t if freeway else 5 * t, "action_0": np.exp(-t / fade), "reward": -np.exp(-t / fade)}
    if not freeway:
        town = {"phase_J1": t // 7 % 2, "phase_J2": t // 5 % 3, "inside_veh": 100 + t, "outside_veh": t / 9}
        return pd.DataFrame(frame | town)
    wave = np.exp(-t / fade) * np.sin(np.arange(51)[:, None] / 4 - t / 3)
    for i, w in enumerate(wave):
        frame |= {f"rho_{i}": 0.12 + 0.01 * w, f"v_{i}": 10 - w}
    return pd.DataFrame(frame)


def goals(episode_return: float, delay_veh_s: float) -> dict:
    return {"episode_return": episode_return, "delay_veh_s": delay_veh_s, "max_cfl": 0.6}


def make_road(folder: Path, kind: str = "freeway", twin: bool = False) -> Path:
    """A traffic run as the training script leaves it."""
    freeway = kind == "freeway"
    traces = {kind: road_columns(freeway, 9.0)}
    if twin:
        traces[f"{kind}_constant"] = road_columns(freeway, 300.0)
    others = {"constant": goals(-383.0, 880.0), "p": goals(-108.5, 870.0), "pi": goals(-107.9, 900.0)}
    split = {"agent": goals(-90.0, 900.0), "baselines": others}
    summary = {
        "command": "cleanrl_crypto/ppo_arz_gpu.py", "updates": 9, "selected_by": "validation",
        "eval": {"validation": split, "published": split, "heldout": split},
        "data": {"spec": kind, "road": {"length_m": 500.0} if freeway else None},
    }
    stats = {f"eval/heldout/{k}": v for k, v in split["agent"].items()}
    rows = [{"global_step": 32 * i, "losses/entropy": -1.0} | stats for i in (1, 2)]
    return write(folder, {"exp_name": "ppo", "control": "outlet"}, summary, rows, traces)


def edit(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def page_of(run: Path) -> str:
    return report.main([str(run)]).read_text(encoding="utf-8")


def images_in(page: str) -> list[tuple[str, str]]:
    """(alternative text, SVG source) of every image."""
    found = re.findall(r'<img alt="([^"]*)" src="data:image/svg\+xml;base64,([^"]*)">', page)
    return [(alt, base64.b64decode(data).decode()) for alt, data in found]


def rows_in(page: str, start: str = "<table") -> dict[str, list[str]]:
    """{first cell: other cells} of the table that begins after `start`."""
    block = page[page.index(start) :]
    found = re.findall(r"<tr[^>]*><th>(.*?)</th>(.*?)</tr>", block[: block.index("</table>")])
    return {re.sub("<.*?>", "", name): re.findall("<td>(.*?)</td>", cells) for name, cells in found}


def text_of(page: str) -> str:
    """What a reader sees; every tag but the empty ones must be closed, in order."""
    body, stack = re.sub("<(style|script).*?</\\1>", "", page, flags=re.S), []
    for close, tag in re.findall(r"<(/?)([a-z]\w*)[^>]*>", body):
        if close:
            assert stack.pop() == tag
        elif tag not in ("meta", "img", "br", "path", "input", "polyline"):
            stack.append(tag)
    assert stack == []
    return re.sub("<[^>]*>", "", body)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[Path, str]:
    run = make_run(tmp_path_factory.mktemp("runs") / "full", bars=600, points=30)
    return run, page_of(run)


@pytest.fixture(scope="module")
def figures(full) -> dict:
    return report.build(report.read_run(full[0])).figures


# ------------------------------------------------------------------------------------------- pages
def test_full_run_has_every_section_and_figure(full, figures):
    _, page = full
    for anchor in "table equity chance positions learning values screen sweep health traces details".split():
        assert f'id="{anchor}"' in page and f'href="#{anchor}"' in page
    assert set(figures) == {
        "equity_test", "equity_eval", "positions", "band", "histogram", "against_signal",
        "against_expected", "costs", "curve_score", "q_spread", "screen", "sweep"}
    assert 'id="missing"' not in page and "PARTIAL" not in page
    assert "2026-01-02 03:04:05 UTC" in page and "0ddba11c0ffe+" in page
    assert len(page) < 1_500_000
    images = images_in(page)
    assert len(images) == page.count("<img") == page.count("<figcaption>") == 12
    assert all(alt for alt, _ in images)
    # a small curve for every metric without a figure; times are bars
    shown = re.findall(r"<tr><th><b>(.*?)</b>", page)
    assert {k.split("/")[-1].replace("_", " ") for k in NAMES} <= set(shown)
    evaluated, traces = ["turnover"], ["train", "eval", "test"]
    assert page.count('<svg class="spark"') == len([*NAMES, "wall", *evaluated, *traces])
    text_of(page)


def test_table_shows_the_numbers_of_the_summary(full):
    page = full[1]
    block = page[page.index("<th>test</th>") : page.index("<th>eval</th>")]
    table = {k: v for k, v in rows_in(block + "</table>", "<th>").items() if v}
    # the critic's grid acts: its row would repeat the agent's
    assert table == {
        "agent": ["0.75", "+6.00", "+5.88", "−6.0 %", "12,000"],
        "actor": ["0.50", "+4.00", "+3.88", "−4.0 %", "12,000"],
        "optimum": ["1.00", "+8.00", "+7.88", "−8.0 %", "12,000"],
        "buy and hold": ["−0.19", "−1.50", "−1.62", "+1.5 %", "12,000"],
        "flat": ["0.00", "0.00", "−0.12", "–", "12,000"],
    }


def test_page_needs_no_other_file(full):
    page = full[1]
    assert not re.search(r"https?://", page)
    sources = re.findall(r'\bsrc="([^"]*)"', page)
    assert all(s.startswith("data:image/svg+xml;base64,") for s in sources)
    assert not re.search(r"<(script|link|iframe|object)\b|@import|url\(", page)
    for _, svg in images_in(page):
        refs = re.findall(r'(?:xlink:)?href="([^"]*)"', svg) + re.findall(r"url\(([^)]*)\)", svg)
        assert all(r.startswith(("#", "data:image/png;base64,")) for r in refs)


def test_program_writes_the_same_bytes_with_light_imports(full, tmp_path):
    run, page = full
    import matplotlib

    assert matplotlib.rcParams["svg.fonttype"] == "path"  # a caller's own style is left alone
    (run / "report.html").unlink()
    code = ("import runpy, sys\nsys.argv = sys.argv[1:]\n"
            "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit as e:\n    assert e.code == 0\n"
            "print(sorted({'pandas', 'torch', 'numba', 'matplotlib.pyplot'} & set(sys.modules)))")
    program = [sys.executable, "-c", code, report.__file__]
    command = [*program, str(run), "--figures", "png"]
    env = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.stdout.splitlines() == [str(run / "report.html"), "[]"] and done.stderr == ""
    assert (run / "report.html").read_bytes() == page.encode()
    assert not list(run.glob("*.tmp"))
    assert (tmp_path / "png" / "equity_test.png").read_bytes().startswith(b"\x89PNG")


# -------------------------------------------------------------------------------- the docs' tables
@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_docs_explain_what_the_report_asks_for(path):
    table = report.metric_table(path.read_text())
    assert len(table) > 20 and all(row.formula and row.healthy for row in table.values())
    page = report.Page(meanings=table)
    split = f"eval/any/{'episode_return' if 'ppo' in path.stem else 'score'}"
    for key in (split, "state_dependence", "time/learn", "policy/state_dependence"):
        assert page.meaning(key).healthy, key
    # another group's metric of the same name is another metric
    assert page.meaning("losses/state_dependence") == ("", "", "")


def test_a_metric_stands_beside_its_row_of_the_docs(full):
    page = report.Page(meanings=report.read_run(full[0]).meanings)
    keys = ("policy/alpha", "eval/<split>/score", "time/learn", "alarm/sigma")
    texts = [report.from_markdown(t) for key in keys for t in page.meaning(key)]
    assert all(text in full[1] for text in texts)


# ------------------------------------------------------------------------------------------ market
def test_curves_carry_the_data(full):
    """A figure of the wrong column looks as fine as the right one."""
    run, _ = full
    trace = report.read_run(run).traces["test"]
    frame = pd.read_parquet(run / "traces" / "test.parquet")
    fig = report_market.draw_equity(trace, {"agent": trace["equity"]})
    x, y = fig.axes[0].lines[0].get_data()
    assert len(y) <= 350 and y[-1] == np.log(frame["equity"].iloc[-1])
    assert x[-1] == np.datetime64(frame["timestamp"].iloc[-1].tz_localize(None))
    depth = fig.axes[1].lines[0].get_ydata().min()
    assert depth == pytest.approx(100 * (frame["equity"] / frame["equity"].cummax() - 1).min())
    fig = report_market.draw_response(trace, trace["signal"], "signal")
    lines = {line.get_label(): line for line in fig.axes[0].lines}
    rows = (frame["regime"] == 1) & (frame["signal"] == 1.0)
    for who, column in (("agent", "position"), ("optimum", "position_optimum")):
        line = lines[f"{who}, regime 1"]
        at = list(line.get_xdata()).index(1.0)
        assert line.get_ydata()[at] == pytest.approx(frame[column][rows].mean())
    one = {k: v for k, v in trace.items() if k != "regime"}
    lines = report_market.draw_response(one, one["signal"], "signal").axes[0].lines
    for line in lines:  # a colour is a policy: the optimum was in the agent's blue
        assert line.get_color() == report.COLORS[line.get_label()]
    bars = report_market.draw_histogram({"test": trace}).axes[0].patches
    assert sum(bar.get_height() for bar in bars) == pytest.approx(100)
    assert bars[20].get_height() == pytest.approx(100 * (frame["position"] == 1.0).mean())
    lines = report_market.draw_costs([trace]).axes[0].lines
    before, costs, after = (line.get_ydata()[-1] for line in lines)
    assert after == pytest.approx(100 * np.log(frame["equity"].iloc[-1])) and costs < 0
    assert before + costs == pytest.approx(after)
    # within a decade the ticks between were the source of TeX
    fig = report_market.draw_spread({"policy/alpha": (np.arange(9.0), np.linspace(0.2, 0.8, 9))})
    assert {label.get_text() for label in fig.axes[0].get_yticklabels(which="both")} >= {"0.2", "0.5", ""}
    assert not [label for label in fig.axes[0].get_yticklabels(which="both") if "$" in label.get_text()]
    for power in (1, 10, 20):
        axes = report_market.draw_equity(trace, {"agent": trace["equity"] ** power}).axes[0]
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert len(names) > 2 and all(re.fullmatch(r"(0|[+−][\d,.]{1,3}) %", name) for name in names)  # round
        ticks = [float(name[:-2].replace("−", "-")) for name in names]
        assert 100 * np.expm1(axes.get_yticks()) == pytest.approx(ticks)


def test_screen_and_sweep_carry_the_data(full, figures):
    ax = figures["screen"].axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["log_volume", "ret_1", "rsi_14"]
    assert [bar.get_width() for bar in ax.patches] == [9.5, 4.5, 1.0]
    blue = [to_hex(bar.get_facecolor()) == report_market.LONG for bar in ax.patches]
    assert blue == [True, True, False]  # the third lies below what is needed
    assert set(ax.lines[0].get_xdata()) == {4.0} and "2 of 3 technical" in full[1]
    ax = figures["sweep"].axes[0]
    x, y = ax.lines[0].get_data()
    assert list(x) == [row["turnover"] for row in SWEEP] and list(y) == [5, 4.75, 4.5, 4.25, 4]
    assert [t.get_text() for t in ax.texts] == ["0", "0.25", "0.5", "0.75", "1"]


@pytest.mark.parametrize("least, passing", [(None, "0 of 3"), (1.0, "3 of 3")])
def test_a_screen_that_lets_nothing_or_everything_through(tmp_path, least, passing):
    run = make_run(tmp_path / "run", points=2)
    data = json.loads((run / "summary.json").read_text())["data"]
    data["screen"]["least"] = least
    edit(run / "summary.json", data=data)
    assert f"{passing} technical" in text_of(page_of(run))


def test_intervals_are_those_of_the_mean():
    rng = np.random.default_rng(3)
    first, noise = rng.standard_normal((2, 4000))
    one, two = report_market.bootstrap_means(np.stack([first, first + noise]), 2000)
    # all rows are resampled at the same bars: a difference has the interval of the differences
    for sample, series in ((one, first), (two, first + noise), (two - one, noise)):
        spread = series.std() / np.sqrt(4000)
        assert sample.std() == pytest.approx(spread, rel=0.1)
        assert sample.mean() == pytest.approx(series.mean(), abs=0.2 * spread)
    # bars that follow each other closely say less than their number
    slow = np.repeat(rng.standard_normal(100), 40)[None]
    assert np.std(report_market.bootstrap_means(slow, 500)) > 2.5 * slow.std() / np.sqrt(4000)


def test_chance_of_the_agent_and_its_lead(full):
    trace = report.read_run(full[0]).traces["test"]
    rows = report_market.chance_rows(trace)
    agent, flat = rows["agent"], rows["flat"]
    equity = trace["equity"]
    assert agent["mean_reward_bps"] == pytest.approx(1e4 * np.log(equity[-1]) / len(equity))
    assert agent["from_bps"] < agent["mean_reward_bps"] < agent["to_bps"]
    assert flat["from_bps"] == flat["to_bps"] == 0
    assert flat["lead_from_bps"] == pytest.approx(agent["from_bps"])


def test_pairs_are_a_table_the_test_split_unfolded(tmp_path):
    run = make_pairs(tmp_path / "run")
    page = page_of(run)
    folds = re.findall(r"<details( open)?><summary>(test|eval|train):", page)
    assert folds == [(" open", "test"), ("", "eval"), ("", "train")]
    table = rows_in(page, 'id="pairs"')
    assert list(table) == ["", "EURUSD", "USDJPY"]
    # score, expected, realised, its interval, the best baseline, drawdown, trades
    for row in table["EURUSD"], table["USDJPY"]:
        assert row[:3] + row[5:] == ["0.75", "+6.00", "+5.88", "−0.12", "−6.0 %", "12,000"]
    # one account, two stripes; the pairs have no row of dashes and no figure of their own
    figures = report.build(report.read_run(run)).figures
    assert [t.get_text() for t in figures["band"].axes[0].get_yticklabels()] == ["EURUSD", "USDJPY"]
    assert {"equity_test", "equity_eval"} == {k for k in figures if k.startswith("equity")}
    # the account's mean position times its mean return is not what it earned: costs are the pairs' own
    costs = figures["costs"].axes[0].lines[1].get_ydata()
    steps = np.delete(np.diff(costs), [148, 198])  # the next return of a pair's last bar is not known
    assert (steps < 1e-9).all() and costs[-1] < -1
    assert "symbols" not in text_of(page) and "3147a5aa, d459b83c" in page


# ------------------------------------------------------------------------------------ broken files
def refused(run: Path, capsys, code: int = 2) -> str:
    """The one line on stderr of a run that cannot be drawn; no page may be left behind."""
    assert report.program([str(run)]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith("\n")
    assert not (run / "report.html").exists()
    return err


BROKEN = [
    ("args.json", None, "args.json"),
    ("metrics.jsonl", None, "metrics.jsonl"),
    ("summary.json", None, "summary.json"),
    ("summary.json", b'{"status": ', "summary.json: .* line 1"),
    ("summary.json", b"[1]", "summary.json: .* list"),
    ("args.json", b"\xff\xfe", "args.json: .* UTF-8"),
    ("metrics.jsonl", b'{"global_step": 1}\n{global_step}\n{}\n', "metrics.jsonl: .* line 2"),
    ("metrics.jsonl", b'{"losses/x": 1}\n', "line 1 .* global_step"),
    ("metrics.jsonl", b'{"global_step": 5, "losses/x": "big"}\n', "losses/x is a str"),
    ("traces/eval.parquet", b"PAR1 no", "eval.parquet: "),
]


def test_broken_files_are_named(tmp_path, capsys):
    run = make_run(tmp_path / "run", points=2)
    for name, content, want in BROKEN:
        path = run / name
        before = path.read_bytes()
        path.write_bytes(content) if content else path.unlink()
        assert re.search(want, refused(run, capsys)), (name, content)
        path.write_bytes(before)
    assert "absent" in refused(tmp_path / "absent", capsys)


def test_a_bug_is_one_line_and_exit_code_1(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "run", points=2)
    monkeypatch.setattr(report, "part_of", lambda run: 1 // 0)
    assert "ZeroDivisionError at test_report.py" in refused(run, capsys, code=1)


# ------------------------------------------------------------------------------------ strange runs
def test_cut_last_line_is_left_out_aloud(tmp_path):
    run = make_run(tmp_path / "run", points=3)
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"global_step": 999, "losses/qf')
    record = report.read_run(run)
    assert len(record.notes) == 1 and len(record.metrics["losses/qf_loss"][0]) == 3
    assert record.notes[0] in page_of(run)


def test_run_without_traces_or_with_unknown_columns(tmp_path):
    run = make_run(tmp_path / "run", points=3, traces=False)
    pd.DataFrame({"position": np.empty(0)}).to_parquet(run / "traces" / "test.parquet")  # no rows
    page = page_of(run)
    assert 'id="table"' in page and 'id="equity"' not in page and 'id="missing"' in page
    # all that a script may leave out of its summary, at once
    (run / "summary.json").write_text("{}")
    (run / "args.json").write_text("{}")
    text_of(page_of(run))


def test_real_bars_have_no_optimum_and_a_part_of_them_is_marked(tmp_path):
    run = make_run(tmp_path / "run", bars=200, points=5, synthetic=False)
    edit(run / "summary.json", eval={"test": scores(False) | {"partial": True}})
    assert "PARTIAL" in text_of(page_of(run))
    figures = report.build(report.read_run(run)).figures
    assert {"against_past_24", "against_past_168"} == {k for k in figures if "against" in k}
    labels = [line.get_label() for fig in figures.values() for ax in fig.axes for line in ax.lines]
    assert labels and not any("optimum" in label for label in labels)


def test_text_from_files_is_escaped(tmp_path):
    run = make_run(tmp_path / "run", points=2)
    evil = '<script>alert("1")</script>&$x_{$'
    edit(run / "args.json", exp_name=evil, data=evil, note=evil)
    summary = json.loads((run / "summary.json").read_text())
    summary["audit"] |= {"verdict": evil, "reasons": [evil], evil: 1.0}
    summary["eval"]["test"]["baselines"][evil] = {evil: 1.0}
    summary["eval"]["test"]["symbols"] = {evil: {"agent": {evil: 1.0}, "baselines": {}}}
    summary |= {"phases": {evil: 1.0}, "status": evil, "command": evil}
    (run / "summary.json").write_text(json.dumps(summary))
    with open(run / "metrics.jsonl", "a") as f:
        row = {f"losses/{evil}": 1.0, f"alarm/{evil}": 1.0, f"eval/{evil}/score": 0.1}
        f.write(json.dumps({"global_step": 9999} | row) + "\n")
    frame = pd.read_parquet(run / "traces" / "test.parquet")
    frame[f"position_{evil}"], frame[f"equity_{evil}"], frame[evil] = 0.5, 1.0, 2.0
    frame.to_parquet(run / "traces" / "test.parquet")
    page = page_of(run)
    text_of(page)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not any("<script" in svg for _, svg in images_in(page))


# ----------------------------------------------------------------------------------------- traffic
def test_road_in_space_and_time_beside_the_road_without_control(tmp_path):
    run = report.read_run(make_road(tmp_path / "run", twin=True))
    # one picture instead of 104 lines, and the second trace only beside the first
    page = report.build(run)
    assert [k for k in page.figures if not k.startswith("curve")] == ["episode_freeway"]
    assert "traces" not in [anchor for anchor, _ in page.sections]
    sides = {"agent": run.traces["freeway"], "without control": run.traces["freeway_constant"]}
    length = run.summary["data"]["road"]["length_m"]
    assert page.figures["episode_freeway"].axes[0].images[0].get_extent() == [0, 60, 0, length]
    fig = report_traffic.draw_episode(sides, length, {"action_0": "outlet"})
    panels = np.array(fig.axes[:8]).reshape(4, 2)
    for row, stem in enumerate(("rho", "v")):
        images = [ax.images[0] for ax in panels[row]]
        for image, trace in zip(images, sides.values(), strict=True):
            points = np.stack([trace[f"{stem}_{i}"] for i in range(51)])
            assert np.array_equal(image.get_array(), points)
        both = np.concatenate([image.get_array() for image in images])
        assert all(image.get_clim() == (both.min(), both.max()) for image in images)
    for row, key in ((2, "action_0"), (3, "reward")):
        for ax, trace in zip(panels[row], sides.values(), strict=True):
            assert np.array_equal(ax.lines[0].get_ydata()[:-1], trace[key])


def test_an_episode_that_time_cut_short_stands_beside_a_whole_one(tmp_path):
    folder = make_road(tmp_path / "run", twin=True)
    path = folder / "traces" / "freeway.parquet"
    pd.read_parquet(path)[:40].to_parquet(path)
    page = page_of(folder)
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page)[1])
    agent, other = (len(base64.b64decode(x)) // 51 for x in data["levels"])
    assert (agent, other) == (41, 61)


def test_an_episode_moves_on_a_map_beside_the_one_without_the_agent(tmp_path):
    """The levels that the page's script paints: a row of the mean, then one a decision."""
    run = make_road(tmp_path / "run", kind="town")
    path = run / "traces" / "town.parquet"
    trace = pd.read_parquet(path)
    for s in range(3):
        trace[f"fill_{s}"] = np.linspace(0, 0.2 * s, len(trace))
    trace.to_parquet(path)
    page = page_of(run)
    assert "as a map" in text_of(page) and "<script" not in page  # no coordinates
    trace.assign(fill_0=0.5).to_parquet(run / "traces" / "town_fixed_cycle.parquet")
    edit(run / "summary.json", shapes=[[[0, 0], [0, 100]], [[0, 100], [80, 100]], [[80, 100], [0, 0]]])
    page = page_of(run)
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page)[1])
    agent, other = (np.frombuffer(base64.b64decode(x), np.uint8).reshape(-1, 3) for x in data["levels"])
    assert agent.shape == (61, 3) and page.count("<polyline") == 6 and len(data["tones"]) == 32
    # full is half of what a segment holds
    assert agent[1].tolist() == [0, 0, 0] and agent[-1].tolist() == [0, 12, 25] and agent[0].tolist() == [0, 6, 12]
    assert (other[:, 0] == 31).all() and (other[:, 1:] == agent[:, 1:]).all()
    assert data["time"][-1] == "295" and data["veh"][0][0] == "100" and "fixed cycle" in text_of(page)
    assert len(page) < 1_000_000 and "as a map" not in text_of(page)


def test_headline_of_traffic(tmp_path):
    page = page_of(make_road(tmp_path / "run"))
    assert not re.search(r"\b(market|bars|equity|trades)\b", text_of(page))
    # the split that chose nothing, its best two baselines: the return's highest, the delay's lowest
    tiles = re.findall(r'class="of">(.*?)</span><b>(.*?)</b><span>(.*?)</span>', page)
    assert tiles[0][0].startswith("heldout") and tiles[0][1:] == ("−90", "pi −107.9 · p −108.5")
    assert tiles[1][1:] == ("900", "p 870 · constant 880")
    assert page.index("<th>heldout</th>") < page.index("<th>validation</th>")
