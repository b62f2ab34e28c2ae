"""Pages against the docs; wandb and TensorBoard with the real parts: offline files, a closed port, a dead service."""
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import toy
from common import tracking
from common.run import UsageError, parse_args
from common.tracking import AXES, PAGES, Mirrors, documented, pages_of, pattern
from runs import records
from scripts import dashboards

SCRIPTS = dashboards.SCRIPTS
TINY = ["--no-report", "--torch-threads", "1", "--no-cuda", "--track", "--wandb-mode", "offline"]
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")


def pieces(folder):
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"))


def read_piece(path):
    """Records of a .wandb file: LevelDB's log, blocks of 32 KiB after a head of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<HB", raw[at + 4 : at + 7])
        part += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(part)
            part = b""


def items(message) -> dict:
    return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in message}


# ------------------------------------------------------------------------------------------- pages
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_documented_metric_is_on_a_page(script):
    shown = [m for panels in pages_of(script).values() for names in panels.values() for m in names]
    names = documented(script)
    assert len(names) > 30 and len(shown) == len(set(shown)) and len(pages_of(script)) == 4
    for name in names:
        assert len([m for m in shown if re.match(pattern(m), name)]) == 1, name


def test_every_metric_of_a_page_is_documented():
    names = {name for script in SCRIPTS for name in documented(script)}
    for panels in PAGES.values():
        for metric in (m for listed in panels.values() for m in listed):
            assert any(re.match(pattern(metric), name) for name in names), metric
    assert pages_of("toy") == PAGES  # no page in docs/


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_workspace_is_made_of_the_pages(script, capsys):
    pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is optional")
    dashboards.main(["--script", script, "--dry-run"])
    spec = json.loads(capsys.readouterr().out)
    sections = spec["spec"]["section"]["panelBankConfig"]["sections"]
    assert [s["name"] for s in sections] == list(pages_of(script))
    shown = [panel["config"]["metricRegex"] for s in sections for panel in s["panels"]]
    assert all(any(re.search(regex, name) for regex in shown) for name in documented(script))
    assert all(any(re.search(regex, name) for name in documented(script)) for regex in shown)


# ------------------------------------------------------------------------------------------ mirrors
def test_what_wandb_cannot_do_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "short")
    folder = ["--run-dir", str(tmp_path / "r")]
    for argv in (["--track"], ["--track-artifacts"]):
        with pytest.raises(UsageError):
            toy.main([*argv, *folder])
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    with pytest.raises(UsageError, match="pip install"):
        toy.main([*TINY, *folder])
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_keeps_its_id_and_its_last_piece_is_whole(tmp_path):
    pytest.importorskip("wandb", reason="wandb is optional")
    folder = tmp_path / "r"
    toy.main([*TINY, "--run-dir", str(folder), "--total-timesteps", "80"])
    own = (folder / "run_id").read_text().strip()
    new = tmp_path / "new"
    last = str(folder / "checkpoints" / "last.pt")
    more = ["--total-timesteps", "160", "--track-artifacts", "--resume", last]
    summary = toy.main([*TINY, "--run-dir", str(new), *more])
    assert (new / "run_id").read_text().strip() == own and own in str(pieces(new)[0])
    found = list(read_piece(pieces(new)[0]))
    lines = records(new)
    history = [items(r.history.item) for r in found if r.HasField("history")]
    assert [h["global_step"] for h in history] == [40, 80, 120, 160]
    assert [h["losses/loss"] for h in history] == [row["losses/loss"] for row in lines]
    config = {k: v for r in found if r.HasField("run") for k, v in items(r.run.config.update).items()}
    assert config["kind"] == "a" and config["script"] == "toy" and config["read"]["spec"] == "toy"
    told = {k: v for r in found if r.HasField("summary") for k, v in items(r.summary.update).items()}
    assert told["verdict"] == "healthy" and told["best_step"] == summary["best_step"]
    assert told["final/eval/agent/trades"] == 3 and told["final"]["nrows"] == 8
    artifacts = {r.artifact.name: r.artifact.manifest.contents for r in found if r.HasField("artifact")}
    assert {entry.path for entry in artifacts[f"toy-{own}"]} == {"checkpoints/best.pt", "summary.json"}
    assert tensorboard(new).Scalars("losses/loss")[0].step == 40  # the folder it came from had it


def tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return events


def mirrors(folder, **flags):
    folder.mkdir()
    args = toy.Args(track=True, **flags)
    return Mirrors(folder, args, "toy", "abc", {}, [], None)


def test_pre_training_has_an_axis_of_its_own(tmp_path):
    pytest.importorskip("wandb", reason="wandb is optional")
    both = mirrors(tmp_path / "r", wandb_mode="offline")
    for line in range(3):
        both.log({"global_step": 0, "pretrain_step": 25 * line, "wall": 1.0, "losses/mae": 0.5}, line)
    both.log({"global_step": 64, "wall": 2.0, "losses/td": 0.5, "losses/none": None}, 3)
    both.close(failed=False)
    events = tensorboard(tmp_path / "r")
    assert [e.step for e in events.Scalars("losses/mae")] == [0, 25, 50]
    assert [e.step for e in events.Scalars("losses/td")] == [64]
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    found = list(read_piece(pieces(tmp_path / "r")[0]))
    metrics = {r.metric.name or r.metric.glob_name: r.metric for r in found if r.HasField("metric")}
    assert metrics["losses/mae"].step_metric == "pretrain_step"
    assert metrics["*"].step_metric == "global_step"
    last = [items(r.history.item) for r in found if r.HasField("history")][-1]
    assert last["losses/td"] == 0.5 and AXES & set(last) == {"global_step"}


def test_training_goes_on_without_network_and_without_wandb_s_service(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb", reason="wandb is optional")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # closed
    line = {"global_step": 4, "wall": 1.0, "losses/loss": 0.5}
    for name, flags in (("online", {"timeout": 10.0}), ("offline", {"wandb_mode": "offline"})):
        both = mirrors(tmp_path / name, **flags)
        assert (both.wandb is None) == (name == "online")
        if name == "offline":
            for child in psutil.Process().children():
                if "wandb-core" in child.name():
                    child.kill()
                    child.wait()
        for number in range(3):
            both.log(line | {"global_step": number}, number)
        both.finish({"eval": {}}, {})
        both.close(failed=False)
        lines = capsys.readouterr().err.splitlines()
        assert len([line for line in lines if not line.startswith("wandb: ")]) == 1  # beside wandb's own
        assert len(tensorboard(tmp_path / name).Scalars("losses/loss")) == 3


def test_what_takes_too_long_is_left_alone():
    with pytest.raises(TimeoutError):
        tracking.within(0.01, lambda: __import__("time").sleep(60))
    assert tracking.within(60, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        tracking.within(60, lambda: 1 / 0)


# --------------------------------------------------------------------------------------- progress
TALK = """
import sys, time
from common.progress import PROGRESS, unbreakable
sys.stdout, sys.stderr = unbreakable(sys.stdout), unbreakable(sys.stderr)
PROGRESS.begin(lambda: "learning " + 99 * "x")
for k in range(3):
    time.sleep(.4)
    print("fact", k)
PROGRESS.end()
print("table")
"""


@POSIX
def test_a_terminal_gets_one_line_that_fits_it(repo):
    pty, fcntl, termios = (__import__(name) for name in ("pty", "fcntl", "termios"))
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
        os.chdir(repo)
        os.execv(sys.executable, [sys.executable, "-c", TALK])
    out = b""
    try:
        while piece := os.read(terminal, 4096):
            out += piece
    except OSError:  # how a terminal ends on Linux
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    lines = out.decode().replace("\r\n", "\n").splitlines(keepends=True)
    drawn = [text for text in "".join(lines).replace("\n", "\r").split("\r") if "learning" in text]
    assert drawn and max(map(len, drawn)) <= 60
    last = [line.rstrip("\n").split("\r")[-1] for line in "".join(lines).split("\n")]
    assert last[:-1] == ["fact 0", "fact 1", "fact 2", "table"]


def test_elsewhere_it_is_plain_lines(repo):
    done = subprocess.run([sys.executable, "-c", TALK], cwd=repo, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("learning") and lines[1:] == ["fact 0", "fact 1", "fact 2", "table"]
    assert done.stderr == ""


def test_words_of_the_line(tmp_path, monkeypatch):
    """Phase, transitions, score and best one of a run, as the loop leaves them."""
    said = []
    monkeypatch.setattr(toy.Run, "checkpoint", lambda run, loop: said.append(run.words()))
    toy.main(["--no-report", "--no-cuda", "--torch-threads", "1", "--run-dir", str(tmp_path / "r"), "--timeout", "900"])
    assert len(said) == 50 and "4 transitions" in said[0] and "left" in said[0]
    assert "200 transitions" in said[-1] and "best" in said[-1] and "best" not in said[0]


def test_a_sweep_s_agent_names_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "sweep7")
    toy.main(["--no-report", "--no-cuda", "--run-dir", str(tmp_path / "r"), "--total-timesteps", "8"])
    assert (tmp_path / "r" / "run_id").read_text() == "sweep7\n"


def test_a_sweep_s_parameters_are_flags():
    yaml = pytest.importorskip("yaml", reason="comes with wandb")
    sweep = yaml.safe_load((Path(toy.__file__).parents[1] / "scripts" / "sweep_tqc.yaml").read_text())
    from cleanrl_crypto.tqc_film_batch import Args

    ends = {k: v.get("values") or [v["min"], v["max"]] for k, v in sweep["parameters"].items()}
    for k in (0, -1):
        _, given = parse_args(Args, [f"--{name}={values[k]}" for name, values in ends.items()])
        assert given == set(ends)
    own = [word for word in sweep["command"] if word.startswith("--")]
    assert set(own) == {"--track", "--timeout"} and sweep["metric"]["name"] == "best_score"
