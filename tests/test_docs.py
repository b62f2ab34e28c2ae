"""The documentation says what the code does: flags, commands, metrics, files, links, snippets."""
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from fnmatch import fnmatch
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from common.run import flag_groups, parse_args
from runs import flags_of, load_summary, records

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("tqc_film_batch", "dqn_forex_subproc", "ppo_arz_gpu", "ppo_arz_signals")
PAGES = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8")
         for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
FOREIGN = {"--logdir", "--index-url", "--nproc-per-node", "--help", "--standalone", "--nproc_per_node"}
PREFIXES = ("charts", "losses", "policy", "value", "env", "eval", "alarm", "time")


def module(script: str):
    return import_module(f"cleanrl_crypto.{script}")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def spans(text: str) -> list[str]:
    """Inline code, fenced blocks left out."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def tables(text: str) -> list[list[list[str]]]:
    """Every table as rows of cells, the line of dashes left out."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif rows:
            found.append([row for row in rows if not set("".join(row)) <= set("-: ")])
            rows = []
    return found


def commands() -> list[tuple[str, str, list[str]]]:
    """(page, program, arguments) of every `python FILE ...` and `torchrun ... FILE ...`."""
    found = []
    for page, text in PAGES.items():
        shell = "\n".join(blocks(text, "bash")).replace("\\\n", " ")
        for line in shell.splitlines() + spans(text):
            for name, value in (("s", "1"), ("t", "30"), ("m", "noise")):  # the variables of the loops
                line = re.sub(rf"\${name}\b", value, line)
            start = r"\b(?:python3?|torchrun [^;|&\n]*?) (\w+/\w+\.py)"
            arguments = r"((?:[^;|&\n]|&(?=[a-z]\w*=))*)"  # the & of a market's keys belongs to them
            for program, rest in re.findall(start + arguments, line):
                found.append((page, program, shlex.split(rest, comments=True)))
    return found


@cache  # a process each
def known_flags(program: str) -> set[str]:
    """Flags of an experiment, or of a program under scripts/ from its --help."""
    if program.startswith("cleanrl_crypto/"):
        names = {f.name.replace("_", "-") for f in fields(module(Path(program).stem).Args)}
        return {f"--{name}" for name in names} | {f"--no-{name}" for name in names}
    done = subprocess.run([sys.executable, ROOT / program, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    names = set(re.findall(r"--([a-z][a-z-]+)", done.stdout))
    return {f"--{name}" for name in names} | {f"--no-{name}" for name in names}


def test_commands_parse():
    """Those of experiments as a whole, files aside; of other programs the flags."""
    found = commands()
    assert {Path(program).stem for _, program, _ in found} >= set(SCRIPTS)
    for page, program, argv in found:
        if program.startswith("cleanrl_crypto/") and "--help" not in argv:
            parse_args(module(Path(program).stem).Args, argv)
        else:
            own = argv[: argv.index("--")] if "--" in argv else argv  # what stands behind is another script's
            unknown = {a.split("=")[0] for a in own if a.startswith("--")} - known_flags(program) - FOREIGN
            assert not unknown, (page, program, unknown)


def test_flags_that_are_mentioned_exist():
    programs = [f"cleanrl_crypto/{s}.py" for s in SCRIPTS]
    programs += [f"scripts/{p.name}" for p in (ROOT / "scripts").glob("*.py") if "argparse" in p.read_text()
                 or "parse_args" in p.read_text()]
    known = set().union(*map(known_flags, programs)) | FOREIGN
    for page, text in PAGES.items():
        unknown = {f for span in spans(text) for f in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span)} - known
        assert not unknown, (page, unknown)
        script = Path(page).stem
        if script in SCRIPTS:  # a page speaks of its own script's flags, but where it gives a command of another
            own = known_flags(f"cleanrl_crypto/{script}.py") | FOREIGN
            bare = {s.split()[0].split("=")[0] for s in spans(text) if s.startswith("--")} - own
            assert not bare, (page, bare)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_group_and_a_text(script):
    groups = flag_groups(ROOT / "cleanrl_crypto" / f"{script}.py")
    assert "flags" not in groups  # what stands before the first group
    assert all(text for rows in groups.values() for *_, text in rows)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """script -> the folder of a real run at tiny sizes, made when first asked for."""
    root = tmp_path_factory.mktemp("docs")

    @cache
    def run(script: str) -> Path:
        argv = flags_of(import_module(f"test_smoke_{script}").TINY, root / script, checkpoint_interval=0)
        assert module(script).main(argv)["exit_code"] == 0
        return root / script

    return run


def metrics_of(page: str) -> set[str]:
    """Names in the tables whose first head is `metric`; `<split>` stands for a name of its own."""
    rows = [row for table in tables(PAGES[page]) if table[0][0] == "metric" for row in table[1:]]
    return {re.sub(r"<\w+>", "*", name) for row in rows for name in re.findall(r"`([^`]+)`", row[0])}


@pytest.mark.parametrize("script", SCRIPTS)
def test_metrics_table_is_what_a_run_logs(script, tiny_run):
    logged = {key for row in records(tiny_run(script)) for key in row} - {"global_step", "wall", "pretrain_step"}
    documented = metrics_of(f"docs/{script}.md")
    assert {key.split("/")[0] for key in logged} <= set(PREFIXES)
    assert not [key for key in logged if not any(fnmatch(key, name) for name in documented)]
    assert not [name for name in documented if not any(fnmatch(key, name) for key in logged)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_run_directory_table_is_what_a_run_writes(script, tiny_run):
    """Every file is listed, and every listed one is written but for the report and other scripts' files."""
    table = next(t for t in tables(PAGES["README.md"]) if t[0][0] == "file")
    listed = [re.findall(r"`([^`]+)`", row[0])[0] for row in table[1:]]
    folder = tiny_run(script)
    written = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    written = [name for name in written if not name.startswith(".")]
    assert not [name for name in written if not any(fnmatch(name, pattern) for pattern in listed)]
    missing = {pattern for pattern in listed if not any(fnmatch(name, pattern) for name in written)}
    own = {"tqc_film_batch": "encoder.pt", "dqn_forex_subproc": "monitor.csv"}
    assert missing == {"report.html", "encoder.pt", "monitor.csv"} - {own.get(script)}


@pytest.mark.parametrize("script", ["tqc_film_batch", "dqn_forex_subproc"])
def test_a_market_s_summary_names_what_judges_agent_and_rival(script, tiny_run):
    """The last line of a run compares them by it."""
    summary = load_summary(tiny_run(script))
    test, by = summary["eval"]["test"], summary["selected_by"]
    assert np.isfinite([test["agent"][by], test["baselines"]["sparse_linear"][by]]).all()


@pytest.mark.parametrize("script", ["tqc_film_batch"])
def test_the_readme_s_snippet_runs(script, tiny_run):
    code = next(b for b in blocks(PAGES["README.md"], "python") if "load_policy" in b)
    best = tiny_run(script) / "checkpoints" / "best.pt"
    code = code.replace("runs/seed1/checkpoints/best.pt", str(best))
    code = code.replace('synthetic:regime"', 'synthetic:regime?bars=3000", window=16')
    names = {}
    exec(code, names)
    assert names["reward"].shape == (8,)


def slug(head: str) -> str:
    return re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[page])):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            assert anchor in map(slug, heads), target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_mentioned_exist(page):
    for span in spans(PAGES[page]):
        for name in re.findall(r"\b(?:cleanrl_crypto|common|scripts|tests|docs)/[\w/.]+\.(?:py|md|png)\b", span):
            assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_are_mentioned_exist(page):
    files = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py")}
    for name in re.findall(r"`(test_\w+)`", PAGES[page]):
        assert name in files or any(f"def {name}(" in text for text in files.values()), name


def test_nothing_private_is_left():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    words = re.compile(r"\b(?:ances" r"tor|DOM" r"AIN)\b|/wo" r"rk/", re.I)
    for name in files:
        if name.endswith((".py", ".md", ".txt", ".toml")):
            found = words.search((ROOT / name).read_text(encoding="utf-8"))
            assert not found, (name, found)
