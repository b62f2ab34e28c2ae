import base64
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scripts import report

BASELINES = ("flat", "buy_and_hold", "best_constant", "random_same_turnover")
SECTIONS = ("table", "equity", "positions", "learning", "health", "details")


def make_trace(n: int, seed: int, synthetic: bool) -> pd.DataFrame:
    """A market whose signal flips its sign in the storm, and policies that trade it more or less well."""
    rng = np.random.default_rng(seed)
    noise, signal, regime = rng.standard_normal(n), np.zeros(n), np.zeros(n, int)
    for t in range(1, n):
        signal[t] = 0.97 * signal[t - 1] + 0.243 * noise[t]
        regime[t] = regime[t - 1] ^ int(rng.random() < 0.008)
    signal = np.round(signal * 2) / 2
    sigma = np.where(regime == 1, 0.012, 0.005)
    expected = 0.14 * signal * np.where(regime == 1, -1, 1) * sigma
    next_return = expected + sigma * rng.standard_normal(n)
    close = 100 * np.cumprod(1 + np.concatenate([[0.0], next_return[:-1]]))

    def smooth(x: np.ndarray, keep: float) -> np.ndarray:
        out = np.zeros(n)
        for t in range(n):
            out[t] = np.clip(keep * out[t - 1] + (1 - keep) * x[t], -1, 1)
        return np.round(out * 10) / 10

    edge = expected / expected.std()
    position = {
        "": smooth(3 * (edge + rng.normal(0, 1.0, n)), 0.9),
        "_actor": smooth(2 * (edge + rng.normal(0, 2.0, n)), 0.9),
        "_flat": np.zeros(n),
        "_buy_and_hold": np.ones(n),
        "_best_constant": np.full(n, 0.3),
        "_random_same_turnover": np.repeat(rng.uniform(-1, 1, -(-n // 12)), 12)[:n],
    } | ({"_optimum": smooth(5 * edge, 0.8)} if synthetic else {})
    columns = {
        "timestamp": pd.date_range("2024-01-01", periods=n, freq="h", tz="UTC").astype("datetime64[ns, UTC]"),
        "close": close,
        "next_return": np.append(next_return[:-1], np.nan),
        "q_spread": np.abs(rng.normal(0.5, 0.1, n)),
    }
    for name, p in position.items():
        cost = 5e-4 * np.abs(np.diff(p, prepend=0.0))
        columns |= {f"position{name}": p, f"equity{name}": np.cumprod(1 + p * next_return - cost)}
    if synthetic:
        columns |= {"expected": expected, "signal": signal, "regime": regime}
    return pd.DataFrame(columns)


def scores(trace: pd.DataFrame, split: str) -> dict:
    def of(name: str) -> dict:
        p, e = trace[f"position{name}"], trace[f"equity{name}"]
        change = np.abs(np.diff(p, prepend=0.0))
        out = {
            "mean_reward_bps": 1e4 * float(np.log(e).diff().mean()),
            "total_return": float(e.iloc[-1] - 1),
            "sharpe": float(np.log(e).diff().mean() / max(np.log(e).diff().std(), 1e-12) * 93.6),
            "max_drawdown": float((e / e.cummax() - 1).min()),
            "turnover": float(change.mean()),
            "exposure": float(p.mean()),
            "trades": int((change > 0).sum()),
        }
        if "expected" in trace:
            out["mean_expected_bps"] = 1e4 * float((p * trace["expected"]).mean() - 5e-4 * change.mean())
        return out

    names = [c[len("position_") :] for c in trace if c.startswith("position_") and c != "position_actor"]
    out = {
        "agent": of(""),
        "critic_grid": of(""),
        "actor": of("_actor"),
        "baselines": {k: of(f"_{k}") for k in names},
    }
    for k in ("agent", "critic_grid", "actor"):
        best = out["baselines"].get("optimum", {}).get("mean_expected_bps")
        out[k]["score"] = out[k]["mean_expected_bps"] / best if best else None
    return out | {"rows": [100, 100 + len(trace)], "partial": False}


def make_run(
    path: Path, bars: int = 900, points: int = 40, synthetic: bool = True, traces: bool = True
) -> Path:
    """A run directory as the training script leaves it; points is the number of log points."""
    (path / "traces").mkdir(parents=True)
    args = {
        "exp_name": "tqc_film_batch",
        "seed": 1,
        "data": "synthetic:regime" if synthetic else "BTCUSDT_1h.parquet",
        "timeout": 300.0,
        "ent_coef": "auto_0.5",
        "total_timesteps": 25_000_000,
        "encoder": None,
    }
    (path / "args.json").write_text(json.dumps(args))
    rng, lines, step = np.random.default_rng(0), [], np.linspace(0, 1, max(points, 2))
    for i in range(points):
        x, alpha = step[i], 0.5 * float(np.exp(-8 * step[i])) + 0.002
        spread = 0.4 * (1 - np.exp(-5 * x)) + 1e-3
        row = {"global_step": int(1024 * (1 + 12 * i)), "wall": 20 + 200 * x}
        row |= {
            "losses/qf_loss": 0.1 + np.exp(-6 * x) + rng.normal(0, 0.01),
            "losses/actor_loss": -x,
            "losses/grad_norm": 1 + x,
        }
        row |= {
            "charts/SPS": 5000 + rng.normal(0, 100),
            "charts/updates": 12 * i,
            "charts/replay_ratio": 0.01,
        }
        row |= {
            "policy/alpha": alpha,
            "policy/entropy": 0.6 - 1.6 * x,
            "policy/state_dependence": 0.6 * x,
            "policy/saturation": 0.2 * x,
            "policy/attribution_technical": x,
            "policy/attribution_hmm": x / 2,
        }
        row |= {"value/q_action_spread": spread, "value/q_mean": 3 * x, "env/turnover": 0.9 - 0.8 * x}
        row |= {
            "alarm/q_spread_over_alpha": float(spread < 2 * alpha),
            "alarm/sigma": float(x < 0.3),
            "alarm/clipped_rewards": 0.0,
        }
        if i % 4 == 0:
            score = float(0.72 * (1 - np.exp(-4 * x)) + rng.normal(0, 0.02))
            row |= {
                "eval/eval/score": score,
                "eval/eval/mean_expected_bps": 7 * score,
                "eval/eval/actor_score": 0.9 * score,
                "eval/eval/critic_grid_score": score,
                "eval/eval/turnover": 0.2 * np.exp(-2 * x) + 0.05,
            }
        lines.append(json.dumps(row))
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n" if lines else "")
    frames = {
        s: make_trace(n, k, synthetic)
        for k, (s, n) in enumerate({"train": 2 * bars, "eval": bars, "test": bars}.items())
    }
    summary = {
        "status": "timeout",
        "global_step": 480_000,
        "updates": 470,
        "replay_ratio": 0.00098,
        "samples_per_transition": 3.1,
        "best_step": 320_000,
        "wall_seconds": 287.4,
        "env_builds": 2,
        "buffer_allocations": 9,
        "sps": 5012.0,
        "phases": {
            "setup": 8.1,
            "pretrain": 31.0,
            "cache": 22.0,
            "rollout": 40.2,
            "learn": 160.3,
            "eval": 20.0,
            "io": 5.8,
        },
        "eval": {s: scores(f, s) for s, f in frames.items()},
        "audit": {
            "verdict": "healthy",
            "reasons": ["the position answers to the market: state_dependence 0.412"],
            "state_dependence": 0.412,
            "q_action_spread": 0.41,
            "alpha_entropy": 0.0021,
            "ridge_edge_bps": 3.2,
            "attribution": {"technical": 0.42, "hmm": 0.31, "position": 0.12, "w_cost": 0.02},
        },
        "versions": {"torch": "2.9"},
        "device": {"torch": "cpu", "backend": "cpu", "precision": "bf16"},
        "data": {
            "spec": args["data"],
            "names": ["BTC"],
            "sha256": "0123456789abcdef" * 4,
            "gaps": [{"count": 0, "longest_at": None}],
        },
    }
    (path / "summary.json").write_text(json.dumps(summary))
    for s, f in frames.items():
        f.to_parquet(path / "traces" / f"{s}.parquet") if traces else None
    return path


def edit(path: Path, **changes) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | changes))


def page_of(run: Path) -> str:
    return Path(report.main([str(run)])).read_text(encoding="utf-8")


def figures_in(page: str) -> list[tuple[str, str]]:
    """(alternative text, SVG source) of every image."""
    found = re.findall(r'<img alt="([^"]*)" src="data:image/svg\+xml;base64,([^"]*)">', page)
    return [(alt, base64.b64decode(data).decode()) for alt, data in found]


def fails(run: Path, capsys) -> str:
    """The one line on stderr of a run that cannot be drawn; no page may be left behind."""
    with pytest.raises(SystemExit) as e:
        report.main([str(run)])
    err = capsys.readouterr().err
    assert e.value.code == 2
    assert err.count("\n") == 1 and err.endswith("\n")
    assert not (run / "report.html").exists()
    return err


def make_road(path: Path, kind: str = "freeway", twin: bool = False, **flags) -> Path:
    """A traffic run as the training script leaves it: a stop-and-go wave that fades, or two junctions."""
    (path / "traces").mkdir(parents=True)
    args = {"exp_name": "ppo_arz_gpu", "seed": 1, "scenario": kind, "env_id": None, "control": "outlet"} | flags
    (path / "args.json").write_text(json.dumps(args))
    t, freeway = np.arange(60.0), kind == "freeway"

    def columns(fade: float) -> dict:
        wave = fade**0.1 * np.exp(-t / fade) * np.sin(np.arange(51)[:, None] / 4 - t / 3)
        road = {f"rho_{i}": 0.12 + 0.01 * w for i, w in enumerate(wave)}
        road |= {f"v_{i}": 10 - w for i, w in enumerate(wave)}
        town = {"phase_J1": t // 7 % 2, "phase_J2": t // 5 % 3, "inside_veh": 100 + t, "outside_veh": t / 9}
        acts = {"action_0": np.exp(-t / fade), "reward": -np.exp(-t / fade)}
        return {"time_s": t if freeway else 5 * t} | (road if freeway else town) | acts

    pd.DataFrame(columns(9.0)).to_parquet(path / "traces" / f"{kind}.parquet")
    if twin:
        pd.DataFrame(columns(300.0)).to_parquet(path / "traces" / f"{kind}_constant.parquet")
    row = {"delay_veh_s": 900.0, "throughput_veh": 280.0, "mean_speed": 9.5, "switches": 1.34, "std": 2.0}
    row |= {"mass_error": 1e-7, "max_cfl": 0.6, "floor_veh": 0.0}
    base = {k: row | {"episode_return": r} for k, r in (("constant", -383.0), ("p", -108.5), ("pi", -107.9))}
    base["p"], base["constant"] = base["p"] | {"delay_veh_s": 870.0}, base["constant"] | {"delay_veh_s": 880.0}
    split = {"agent": row | {"episode_return": -90.0}, "baselines": base, "partial": False}
    audit = {"verdict": "healthy", "reasons": [], "state_dependence": 0.08}
    summary = {"status": "timeout", "updates": 9, "global_step": 64, "selected_by": "validation", "audit": audit}
    summary |= {"eval": {"validation": split, "published": split, "heldout": split}}
    (path / "summary.json").write_text(json.dumps(summary))
    stats = {f"env/{k}": v for k, v in row.items()} | {f"eval/heldout/{k}": v for k, v in split["agent"].items()}
    stats |= {"losses/clipfrac": 0.01, "losses/entropy": -1.0, "policy/state_dependence": 0.08, "policy/saturation": 0}
    lines = [json.dumps({"global_step": 32 * i} | stats) for i in (1, 2)]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return path


class Balance(HTMLParser):
    """Raises on a closing tag that does not match; text outside of <style> is kept."""

    VOID = {"meta", "img", "br"}

    def __init__(self, page: str):
        super().__init__()
        self.open, self.text = [], ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if "style" not in self.open else ""


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[Path, str]:
    run = make_run(tmp_path_factory.mktemp("runs") / "full")
    return run, page_of(run)


def test_full_run_has_every_section_and_plot(full):
    run, page = full
    for anchor in SECTIONS:
        assert f'id="{anchor}"' in page and f'href="#{anchor}"' in page
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    for title in (
        "test: equity and drawdown",
        "eval: equity and drawdown",
        "test: positions under price, 500 bars",
        "test: positions over the whole split",
        "How often it holds which position",
        "test: position against signal",
        "test: position against expected return",
        "score: evaluations",
        "What actions are worth",
        "qf loss",
        "state dependence",
        "Alarms over time",
        "Where 287 seconds went",
        "What the greedy action listens to",
    ):
        assert any(t.startswith(title) for t in titles), title
    assert 'id="missing"' not in page
    text = Balance(page).text
    for word in ("timeout", "healthy", "the position answers to the market", "PARTIAL"):
        assert (word in text) == (word != "PARTIAL")
    assert len(page) < 3_000_000
    # a plot without a word on how a healthy one looks, or for those who cannot see it, is half a plot
    assert len(figures_in(page)) == page.count("<img") == page.count("<figcaption>") == len(titles) >= 25
    assert all(alt for alt, _ in figures_in(page)) and "<figcaption></figcaption>" not in page


def test_table_shows_the_numbers_of_the_summary(full):
    run, page = full
    entry = json.loads((run / "summary.json").read_text())["eval"]["test"]
    block = page[page.index("<th>test</th>") : page.index("<th>eval</th>")]
    rows = {
        re.sub("<.*?>", "", name): re.findall("<td>(.*?)</td>", cells)
        for name, cells in re.findall(r"<tr[^>]*><th>(.*?)</th>(.*?)</tr>", block)
        if "<td>" in cells
    }
    # critic_grid acts here: its row would repeat the agent's
    assert list(rows) == [
        "agent",
        "actor",
        "optimum",
        "buy and hold",
        "best constant",
        "random same turnover",
        "flat",
    ]
    agent = entry["agent"]
    minus = lambda s: s.replace("-", "−")  # noqa: E731
    assert rows["agent"][:3] == [
        minus(f"{agent['score']:.2f}"),
        minus(f"{agent['mean_expected_bps']:+.2f}"),
        minus(f"{agent['mean_reward_bps']:+.2f}"),
    ]
    assert rows["agent"][5] == minus(f"{100 * agent['max_drawdown']:.1f} %")
    assert rows["optimum"][0] == "1.00" and rows["flat"][-1] == "0" and rows["buy and hold"][-1] == "1"


def test_page_needs_no_other_file(full):
    page = full[1]
    assert not re.search(r"https?://", page)
    assert all(s.startswith("data:image/svg+xml;base64,") for s in re.findall(r'\bsrc="([^"]*)"', page))
    assert not re.search(r"<(script|link|iframe|object)\b|@import|url\(", page)
    for _, svg in figures_in(page):
        refs = re.findall(r'(?:xlink:)?href="([^"]*)"', svg) + re.findall(r"url\(([^)]*)\)", svg)
        assert all(r.startswith(("#", "data:image/png;base64,")) for r in refs)


def test_same_files_give_the_same_bytes(full):
    run, page = full
    (run / "report.html").unlink()
    code = f"from scripts import report; report.main([{str(run)!r}])"
    env = os.environ | {"PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=Path(report.__file__).parents[1])
    assert (run / "report.html").read_bytes() == page.encode()
    assert not list(run.glob("*.tmp"))


def test_drawing_leaves_the_callers_matplotlib_alone(full):
    import matplotlib

    assert matplotlib.rcParams["svg.fonttype"] == "path"
    late = "{'matplotlib', 'pyarrow', 'pandas'}"
    code = f"import sys; from scripts import report; assert not {late} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(report.__file__).parents[1])


def test_curves_carry_the_data(full):
    """A plot of the wrong column looks as fine as the right one: check points against the files."""
    run, _ = full
    trace = report.load_run(str(run)).traces["test"]
    frame = pd.read_parquet(run / "traces" / "test.parquet")
    x, y = report.draw_equity(trace).axes[0].lines[0].get_data()
    assert (
        len(y) <= 350
        and y[-1] == frame["equity"].iloc[-1]
        and x[-1] == np.datetime64(frame["timestamp"].iloc[-1].tz_localize(None))
    )
    depth = min(
        line.get_ydata()[np.isfinite(line.get_ydata())].min()
        for line in report.draw_equity(trace).axes[1].lines[:1]
    )
    assert depth == pytest.approx(100 * (frame["equity"] / frame["equity"].cummax() - 1).min())
    lines = {
        line.get_label(): line
        for line in report.draw_response(trace, trace["signal"], "signal").axes[0].lines
    }
    rows = (frame["regime"] == 1) & (frame["signal"] == 1.0)
    at = list(lines["agent, regime 1"].get_xdata()).index(1.0)
    assert lines["agent, regime 1"].get_ydata()[at] == pytest.approx(frame["position"][rows].mean())
    assert lines["optimum, regime 1"].get_ydata()[at] == pytest.approx(frame["position_optimum"][rows].mean())


def test_typical_stretch_is_the_median_window():
    position = np.zeros(900)
    position[300:600:2], position[600:900:30] = 1.0, 1.0
    assert report.typical_stretch(position, 300) == (600, 900)
    assert report.typical_stretch(position[:200], 300) == (0, 200)


def test_thin_keeps_ends_extremes_and_means():
    x, y = np.arange(1001), np.sin(np.arange(1001) / 9.0)
    y[500] = np.nan
    for how, want in (("last", y[-1]), ("mean", None), ("min", None), ("max", None)):
        a, b = report.thin(x, y, 100, how)
        assert len(a) == len(b) <= 100 and a[-1] == 1000
        assert want is None or b[-1] == want
    assert report.thin(x, y, 100, "min")[1].min() == np.nanmin(y) and report.thin(x, y, 100, "max")[
        1
    ].max() == np.nanmax(y)
    assert report.thin(x, y, 100)[1][0] == pytest.approx(y[:11].mean())
    assert np.isfinite(report.thin(x, y, 100)[1]).all()


@pytest.mark.parametrize("name", ["args.json", "metrics.jsonl", "summary.json"])
def test_missing_file_is_one_line_and_exit_2(tmp_path, capsys, name):
    run = make_run(tmp_path / "run", bars=60, points=2)
    (run / name).unlink()
    assert f"{name}: missing" in fails(run, capsys)


def test_broken_files_are_named(tmp_path, capsys):
    run = make_run(tmp_path / "run", bars=60, points=4)
    good = (run / "metrics.jsonl").read_text()
    for text, want in (
        (good.replace('"wall"', "wall", 1), "metrics.jsonl: broken JSON at line 1"),
        (good + '{"losses/x": 1}\n', "metrics.jsonl: line 5 has no global_step"),
        (good + '{"global_step": 5, "losses/x": "big"}\n', "losses/x is a str"),
    ):
        (run / "metrics.jsonl").write_text(text)
        assert want in fails(run, capsys)
    (run / "metrics.jsonl").write_text(good)
    (run / "traces" / "eval.parquet").write_bytes(b"PAR1 no")
    assert "eval.parquet: broken parquet" in fails(run, capsys)
    (run / "traces" / "eval.parquet").unlink()
    (run / "summary.json").write_text('{"status": ')
    assert "summary.json: broken JSON at line 1" in fails(run, capsys)
    (run / "summary.json").write_text("[1]")
    assert "summary.json: expected a JSON object" in fails(run, capsys)
    assert "no such run directory" in fails(tmp_path / "absent", capsys)


def test_command_line(tmp_path):
    run = make_run(tmp_path / "run", bars=60, points=2)
    command = [sys.executable, report.__file__]
    done = subprocess.run(
        [*command, run, "--figures", tmp_path / "png"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(run / "report.html"), "")
    assert (tmp_path / "png" / "equity_test.png").read_bytes().startswith(b"\x89PNG")
    done = subprocess.run([*command, run, "--figure-dir", "x"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--figure-dir" in done.stderr


def test_cut_last_line_is_left_out_aloud(tmp_path):
    run = make_run(tmp_path / "run", bars=60, points=3)
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"global_step": 999, "losses/qf')
    assert "the last line of metrics.jsonl (line 4) is cut off" in page_of(run)


def test_null_and_nan_are_dashes_and_holes(tmp_path):
    run = make_run(tmp_path / "run", bars=80, points=6)
    summary = json.loads((run / "summary.json").read_text())
    for split in summary["eval"].values():
        split["agent"] |= {"score": None, "sharpe": float("nan")}
        split["partial"] = True
    summary |= {"sps": None, "best_step": None, "phases": {"learn": None, "eval": 1.0}}
    summary["audit"] |= {
        "overestimation": None,
        "attribution": {"technical": None, "hmm": 0.1},
        "reasons": [],
    }
    (run / "summary.json").write_text(json.dumps(summary))
    frame = pd.read_parquet(run / "traces" / "test.parquet")
    frame.loc[3:9, "position"] = np.nan
    frame["equity_actor"] = np.nan
    frame.loc[40:, "equity"] = 0.0
    frame.loc[:, "signal"] = np.nan
    frame.to_parquet(run / "traces" / "test.parquet")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"policy/alpha": None, "value/q_mean": float("nan"), "losses/qf_loss": float("inf")}
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    page = page_of(run)
    assert "–</td>" in page and "No number was logged (all null)." in page and "PARTIAL" in page
    assert ">nan<" not in page.lower() and ">none<" not in page.lower()
    assert "position against signal" not in page and "return over the past 24 bars" in page


@pytest.mark.parametrize("points", [0, 1])
def test_run_without_updates(tmp_path, points):
    run = make_run(tmp_path / "run", bars=40, points=points)
    edit(
        run / "summary.json",
        updates=0,
        replay_ratio=0.0,
        global_step=0,
        audit={"verdict": "untrained", "reasons": ["no gradient update was made"]},
    )
    text = Balance(page_of(run)).text
    assert "No gradient update was made: below is the agent as it was born." in text
    assert "untrained" in text and "summary.json has no audit.attribution" in text
    assert ("metrics.jsonl has no alarm/ key" in text) == (points == 0)


def test_run_without_traces_or_with_unknown_columns(tmp_path):
    run = make_run(tmp_path / "run", bars=40, points=3, traces=False)
    text = Balance(page_of(run)).text
    assert "Agent beside baselines" in text and "action histogram: no traces/*.parquet with rows" in text
    # another experiment's trace: no price, no position; its columns are drawn all the same
    pd.DataFrame({"queue": np.arange(50.0), "phase": np.arange(50) % 4, "name": ["x"] * 50}).to_parquet(
        run / "traces" / "town.parquet"
    )
    edit(
        run / "summary.json",
        eval={
            "town": {
                "agent": {"delay_veh_s": 12900.0, "jams": 3},
                "baselines": {"fixed_cycle": {"delay_veh_s": 19600.0}},
            }
        },
    )
    page = page_of(run)
    text = Balance(page).text
    assert "<h3>town: queue</h3>" in page and "<h3>town: phase</h3>" in page
    assert "fixed cycle" in text and "12,900" in text and "jams" in text
    assert "no traces/*.parquet has the column position" in text
    # all that a script may leave out of its summary, at once
    (run / "summary.json").write_text("{}")
    (run / "args.json").write_text("{}")
    assert "summary.json has no eval" in page_of(run)


def test_real_bars_have_no_optimum(tmp_path):
    run = make_run(tmp_path / "run", bars=200, points=5, synthetic=False)
    page = page_of(run)
    assert "position against return over the past 24 bars" in page and "against signal" not in page
    assert "optimum" not in re.sub(r"<figcaption>.*?</figcaption>|<style>.*?</style>", "", page)


def test_text_from_files_is_escaped(tmp_path):
    run = make_run(tmp_path / "run", bars=40, points=2)
    evil = '<script>alert("1")</script>&$x_{$'
    edit(run / "args.json", exp_name=evil, data=evil, note=evil)
    summary = json.loads((run / "summary.json").read_text())
    summary["audit"] |= {"verdict": evil, "reasons": [evil], evil: 1.0, "attribution": {evil: 0.5}}
    summary["eval"]["test"]["baselines"][evil] = {evil: 1.0}
    summary |= {"phases": {evil: 1.0}, "status": evil}
    (run / "summary.json").write_text(json.dumps(summary))
    with open(run / "metrics.jsonl", "a") as f:
        f.write(
            json.dumps(
                {"global_step": 9999, f"losses/{evil}": 1.0, f"alarm/{evil}": 1.0, f"eval/{evil}/score": 0.1}
            )
            + "\n"
        )
    frame = pd.read_parquet(run / "traces" / "test.parquet")
    frame[f"position_{evil}"], frame[f"equity_{evil}"], frame[evil] = 0.5, 1.0, 2.0
    frame.to_parquet(run / "traces" / "test.parquet")
    page = page_of(run)
    Balance(page)
    assert "<script" not in page and "&lt;script&gt;" in page
    for _, svg in figures_in(page):
        assert "<script" not in svg


def test_road_in_space_and_time_beside_the_road_without_control(tmp_path):
    run = make_road(tmp_path / "run", twin=True)
    page = page_of(run)
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    assert 'id="road">On the road</h2>' in page and "freeway: density and speed over one episode" in titles
    # one picture in place of 104 lines, and the second trace only beside the first
    assert not [t for t in titles if re.search(r"rho|\bv \d|constant|action|reward", t)]
    traces = report.load_run(str(run)).traces
    free = traces.pop("freeway_constant")
    sides = {"agent": traces["freeway"], "without control": free}
    fig = report.draw_episode(sides, 500.0, {"action_0": "outlet"})
    panels = np.array(fig.axes[:8]).reshape(4, 2)
    for row, stem, unit in ((0, "rho", "density, veh/m"), (1, "v", "speed, m/s")):
        images = [ax.images[0] for ax in panels[row]]
        for image, trace in zip(images, sides.values(), strict=True):
            assert np.array_equal(image.get_array(), np.stack([trace[f"{stem}_{i}"] for i in range(51)]))
            assert image.get_extent() == [0, 60, 0, 500] and image.origin == "lower"
        both = np.concatenate([image.get_array() for image in images])
        assert all(image.get_clim() == (both.min(), both.max()) for image in images)
        assert fig.axes[8 + row].get_ylabel() == unit and panels[row, 0].get_ylabel() == "position, m"
    for row, key in ((2, "action_0"), (3, "reward")):
        for ax, trace in zip(panels[row], sides.values(), strict=True):
            assert np.array_equal(ax.lines[0].get_ydata()[:-1], trace[key])
    assert {ax.get_xlim() for ax in panels.ravel()} == {(0, 60)}
    assert [ax.get_title() for ax in panels[0]] == list(sides) and panels[3, 0].get_xlabel() == "time, s"
    # metres are known of the freeway alone
    assert report.draw_episode(sides, None, {}).axes[0].get_ylabel() == "point of road"


def test_network_shows_vehicles_phases_and_reward(tmp_path):
    run = make_road(tmp_path / "run", "corridor")
    page = page_of(run)
    assert "<h3>corridor: vehicles and signals over one episode</h3>" in page and 'id="traces"' not in page
    trace = report.load_run(str(run)).traces["corridor"]
    vehicles, phases, reward, bar = report.draw_episode({"agent": trace}, None, {}).axes
    for line, key in zip(vehicles.lines, ("inside_veh", "outside_veh"), strict=True):
        assert line.get_label() == key[:-4] and np.array_equal(line.get_ydata()[:-1], trace[key])
    image = phases.images[0]
    assert np.array_equal(image.get_array(), [trace["phase_J1"], trace["phase_J2"]])
    assert [t.get_text() for t in phases.get_yticklabels()] == ["J1", "J2"] and phases.yaxis_inverted()
    # every phase its own colour, and the bar says which
    assert len({image.to_rgba(x) for x in (0, 1, 2)}) == 3
    assert [t.get_text() for t in bar.get_yticklabels()] == ["0", "1", "2"]
    assert np.array_equal(reward.lines[0].get_ydata()[:-1], trace["reward"])
    assert reward.get_ylabel() == "reward of\nJ1, veh s" and reward.get_xlim() == (0, 300)


def test_words_of_traffic(tmp_path):
    page = page_of(make_road(tmp_path / "run"))
    text = Balance(page).text
    assert not re.search(r"market|position(?!, m)|bars|trad|equity|target entropy|Q over actions", text)
    for want in ("the policy reacts to the state of the road", "Does it react to the state of the road?",
                 "picked on validation", "1e-5 or less in float32, 1e-10 or less in float64.", "1 or less: above it",
                 "Below 0.2", "max Courant number", "added by the floor, veh", "phase changes of all junctions"):
        assert want in text, want
    # the split that chose nothing, its best two baselines, best first: the return's highest, the delay's lowest
    tiles = re.findall(r'class="of">(.*?)</span><b>(.*?)</b><span>(.*?)</span>', page)
    assert tiles[:2] == [("heldout: return", "−90", "pi −107.9 · p −108.5"),
                         ("heldout: delay, veh s", "900", "p 870 · constant 880")]
    assert page.index("<th>heldout</th>") < page.index("<th>validation</th>")
    # a Gymnasium environment has no road
    text = Balance(page_of(make_road(tmp_path / "gym", env_id="CartPole-v1"))).text
    assert "ppo_arz_gpu on CartPole-v1" in text and "reacts to the state" in text
    assert not re.search(r"state of the road|market|On the road", text)
