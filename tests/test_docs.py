"""The documentation says what the code does: flags, metrics, columns, files, links, commands, snippets."""
import contextlib
import io
import json
import re
import shlex
from dataclasses import fields
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from cleanrl_crypto import tqc_film_batch as tqc
from common import features, markets
from common.data import split_rows

ROOT = Path(__file__).resolve().parent.parent
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/tqc_film_batch.md")}
DOCS = PAGES["docs/tqc_film_batch.md"]
PARTS = ("cleanrl_crypto", "common", "scripts", "tests", "docs")
FOREIGN = {"--logdir", "--index-url"}  # flags of tensorboard and pip
PREFIXES = ("charts", "losses", "policy", "value", "env", "eval", "alarm", "time")
BARS, WINDOW = 4000, 16
TINY = shlex.split(f"""--data synthetic:regime?bars={BARS} --window {WINDOW} --d-model 32 --n-heads 2
    --n-layers 1 --d-ff 64 --fusion-width 32 --hidden 32 --num-envs 64 --episode-length 16 --batch-size 64
    --updates-per-step 2 --mae-steps 5 --total-timesteps 2048 --learning-starts 256 --eval-interval 512
    --checkpoint-interval 0 --no-report --torch-threads 1 --no-cuda""")


# ---------------------------------------------------------------------------------- reading a page
def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def spans(text: str) -> list[str]:
    """Inline code, fenced blocks left out."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def rows(text: str, heads: tuple[str, ...]) -> list[list[str]]:
    """Cells of every row of every table whose header starts with `heads`."""
    found, inside = [], False
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            inside = False
        elif tuple(cells[: len(heads)]) == heads:
            inside = True
        elif inside and not set(line) <= set("|- :"):
            found.append(cells)
    return found


def commands() -> list[tuple[str, list[str]]]:
    """(program, arguments) of every `python FILE ...` in a bash block or in inline code."""
    found = []
    for text in PAGES.values():
        shell = "\n".join(blocks(text, "bash")).replace("\\\n", " ")
        for line in shell.splitlines() + spans(text):
            for name, value in (("s", "100"), ("t", "30"), ("m", "noise")):  # the variables of the loops
                line = re.sub(rf"\${name}\b", value, line)
            # up to the next command; the & of a market's keys belongs to the argument
            for program, rest in re.findall(r"\bpython (\w+/\w+\.py)((?:[^;|&\n]|&(?=[a-z]\w*=))*)", line):
                found.append((program, shlex.split(rest, comments=True)))
    return found


def scripts_flags(program: str) -> set[str]:
    """Flags that a program under scripts/ knows, from its --help."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as stop:
        import_module(program.removesuffix(".py").replace("/", ".")).main(["--help"])
    assert not stop.value.code
    return set(re.findall(r"--[a-z][a-z-]+", said.getvalue()))


NAMES = {f.name.replace("_", "-"): f.type for f in fields(tqc.Args)}
ARGS_FLAGS = {f"--{n}" for n in NAMES} | {f"--no-{n}" for n, kind in NAMES.items() if kind is bool}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A real run at tiny sizes."""
    folder = tmp_path_factory.mktemp("docs") / "tiny"
    assert tqc.main([*TINY, "--run-dir", str(folder)])["exit_code"] == 0
    return folder


# --------------------------------------------------------------------------------- flags, commands
def test_flags_table_is_the_dataclass():
    table = [(cells[0].strip("`"), cells[1].strip("`")) for cells in rows(DOCS, ("flag", "default"))]
    args = tqc.Args()
    assert table == [(f"--{f.name.replace('_', '-')}", str(getattr(args, f.name))) for f in fields(args)]
    assert all(len(cells[2]) > 3 for cells in rows(DOCS, ("flag", "default")))


def test_every_flag_that_is_mentioned_exists():
    known = ARGS_FLAGS | FOREIGN | {"--help"}
    for program in {p for p, _ in commands() if p.startswith("scripts/")}:
        known |= scripts_flags(program)
    for name, text in PAGES.items():
        text = text.replace("`--no-x`", "")  # stands for any switch
        unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - known
        assert not unknown, f"{name}: {unknown}"


def test_every_command_parses():
    help_of = {}
    for program, argv in commands():
        assert (ROOT / program).is_file(), program
        if program.startswith("scripts/"):
            known = help_of.setdefault(program, scripts_flags(program))
            assert {a.split("=")[0] for a in argv if a.startswith("--")} <= known, (program, argv)
        elif "--help" not in argv:
            args = tqc.parse_args(tqc.Args, argv)
            if args.data.startswith("synthetic:"):
                markets.parse_law(args.data)
    assert {program for program, _ in commands()} >= {
        "cleanrl_crypto/tqc_film_batch.py", "scripts/report.py", "scripts/download_data.py",
        "scripts/benchmark.py"}


def test_download_commands_are_accepted():
    download = import_module("scripts.download_data")
    lines = [argv for program, argv in commands() if program == "scripts/download_data.py"]
    assert lines
    for argv in lines:
        args = download.parse_args(argv)
        assert args.out.suffix == ".parquet" and args.since < args.until


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for text in PAGES.values():
        code = [*blocks(text, "bash"), *spans(text)]
        for target in re.findall(r"^make (\w+)", "\n".join(code), re.M):
            assert target in targets, target
    run = re.search(r"tqc_film_batch\.py (--ent-coef[^$\n]*)", (ROOT / "Makefile").read_text())[1].split()
    assert ("cleanrl_crypto/tqc_film_batch.py", run) in commands()  # make run without make


# ----------------------------------------------------------------------------------------- metrics
def test_metrics_table_is_what_a_run_logs(tiny):
    lines = (tiny / "metrics.jsonl").read_text().splitlines()
    logged = set().union(*map(json.loads, lines)) - {"global_step", "wall"}
    table = rows(DOCS, ("metric",))
    names = [cells[0].strip("`") for cells in table]
    assert len(set(names)) == len(names)
    documented = {name.replace("<split>", split) for name in names for split in tqc.SPLITS}
    assert {name.split("/")[0] for name in documented} == set(PREFIXES)
    assert logged - documented == set(), "logged, not in the docs"
    assert documented - logged == set(), "in the docs, not logged"
    for cells in table:
        assert len(cells) == 4 and all(cells[:3]), cells[0]
        assert cells[3] or cells[0].startswith("`time/"), f"{cells[0]}: what to do if it is not healthy?"


def test_metrics_that_are_mentioned_exist():
    names = [cells[0].strip("`") for cells in rows(DOCS, ("metric",))]
    documented = {name.replace("<split>", split) for name in names for split in ("<split>", *tqc.SPLITS)}
    documented.add("time/...")
    for name, text in PAGES.items():
        for span in spans(text):
            if re.match(rf"({'|'.join(PREFIXES)})/", span):
                assert span in documented, f"{name}: {span}"


def test_verdicts_are_the_codes(tiny):
    source = (ROOT / "common/scoring.py").read_text()
    verdicts = [cells[0].strip("`") for cells in rows(DOCS, ("verdict", "rule, on the eval split"))]
    function = source[source.index("def verdict") :].split("\ndef ")[0]
    assert set(verdicts) == set(re.findall(r'return "(\w+)", \[', function))
    assert json.loads((tiny / "summary.json").read_text())["audit"]["verdict"] in verdicts


def test_summary_keys_are_documented(tiny):
    summary = json.loads((tiny / "summary.json").read_text())
    section = DOCS[DOCS.index("### The rest of `summary.json`") : DOCS.index("Baselines: `flat`")]
    missing = [key for key in summary if not re.search(rf"`{key}[`.]", section)]
    assert not missing
    baselines = set(summary["eval"]["test"]["baselines"])
    line = DOCS[DOCS.index("Baselines: `flat`") :].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", line)) == baselines


# ----------------------------------------------------------------------------- columns and numbers
def test_columns_table_is_the_features():
    table = [(cells[0], cells[1].strip("`"), cells[2]) for cells in rows(DOCS, ("column", "name"))]
    assert table == [(str(i), name, text) for i, (name, text) in enumerate(features.TECH_50.items())]
    assert len(table) == 50
    ten = DOCS[DOCS.index("Several files, 10 columns each") :].split(". Two files")[0]
    assert tuple(re.findall(r"`(\w+)`", ten)) == features.TECH_10
    for name in (features.HMM_COLUMNS[0], features.HMM_COLUMNS[3], features.HMM_COLUMNS[4]):
        assert f"`{name}`" in DOCS


def test_numbers_in_prose_follow_from_the_code():
    args, spaced = tqc.Args(), "{:,}".format
    hours = np.datetime64("2019-01-01T00", "ns") + np.arange(20_000) * np.timedelta64(1, "h")
    ranges = split_rows(hours, args.split, args.window + tqc.HORIZON, features.WARMUP + args.window - 1)
    size = {name: spaced(stop - start).replace(",", " ") for name, (start, stop) in ranges.items()}
    steps = args.total_timesteps // args.num_envs
    fused = args.window * args.d_model
    rows_a_transition = args.updates_per_step * args.batch_size / args.num_envs
    for said in (
        f"train {size['train']} rows, eval {size['eval']}, test {size['test']}",
        f"{spaced(args.total_timesteps).replace(',', ' ')} / {args.num_envs} = {steps} vector steps",
        f"[market {fused}, position, `w_cost`]", f"(B, {fused}) -> (B, {args.fusion_width})",
        f"{fused * 2 // 1024} KiB a bar in bf16", f"{rows_a_transition:g} rows a transition",
        f"{args.action_grid} exposures", f"fewer than {features.WARMUP + features.MIN_TRAIN} train rows",
        f"The first {features.WARMUP} rows are warm-up",
        f"`market` ({args.window}, {50 + len(features.HMM_COLUMNS)})",
        f"{sum(np.dtype(t).itemsize for t in (np.int32, np.bool_)) + 5 * 4}\nbytes a transition",
    ):
        assert said in DOCS, said
    assert args.counterfactuals + 1 == 4 and "one of the four exposures" in DOCS
    replay = tqc.Replay(1)
    assert replay.row.nbytes + replay.episode_end.nbytes + replay.floats.nbytes == 25


# ------------------------------------------------------------------------------------ files, links
def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.is_file(), f"{page}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(path.read_text(encoding="utf-8")), re.M)
            assert anchor in {slug(h) for h in headings}, f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_mentioned_exist(page):
    text = PAGES[page]
    for path in re.findall(rf"\b((?:{'|'.join(PARTS)})/[\w./-]*\w\.\w+)", text):
        assert (ROOT / path).is_file(), f"{page}: {path}"
    ours = {p.name for part in PARTS for p in (ROOT / part).rglob("*.py")}
    for name in re.findall(r"\b(\w+\.py)\b", text):
        assert name in ours, f"{page}: {name}"
    for name in re.findall(r"\b(requirements[\w-]*\.txt)", text):
        assert (ROOT / name).is_file(), f"{page}: {name}"
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"\b(test_\w+)\b(?!\.py)", text):
        assert f"def {name}(" in tests, f"{page}: {name}"


def test_images_are_small_and_shown():
    images = list((ROOT / "docs/img").glob("*.png"))
    assert images
    for image in images:
        assert image.stat().st_size < 150_000, f"{image.name}: {image.stat().st_size} bytes"
        assert any(f"img/{image.name})" in text for text in PAGES.values()), f"{image.name} is not shown"


def test_run_directory_table_is_what_a_run_writes(tiny):
    patterns = [cells[0].strip("`") for cells in rows(PAGES["README.md"], ("file", "what"))]
    written = [p.relative_to(tiny).as_posix() for p in tiny.rglob("*") if p.is_file()]
    for name in written:
        assert any(fnmatch(name, pattern) for pattern in patterns), f"{name} is not in README's table"
    for pattern in set(patterns) - {"report.html"}:  # the tiny run makes none
        assert any(fnmatch(name, pattern) for name in written), f"a run writes no {pattern}"


# ---------------------------------------------------------------------------------------- snippets
@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, tiny):
    """As they stand, but for the run directory and the sizes, which are the tiny run's."""
    found = blocks(PAGES[page], "python")
    assert found
    for code in found:
        code = re.sub(r'"runs/[\w*]+', f'"{tiny.as_posix()}', code)
        code = re.sub(r'"(synthetic:\w+)\??([^"]*)"', rf'"\1?bars={BARS}&\2", window={WINDOW}', code)
        code = code.replace('&"', '"')
        said, names = io.StringIO(), {}
        with contextlib.redirect_stdout(said):
            exec(compile(code, page, "exec"), names)
        if "policy" in names:
            assert names["reward"].shape == (8,) and np.isfinite(names["reward"]).all()
            assert set(names["obs"]) == {"market", "position", "w_cost"}
        if "glob" in names:  # the snippet that prints the first table's rows
            header = re.search(r"^\| market \| test score \| actor's .*$", DOCS, re.M)[0]
            assert said.getvalue().count("|") == header.count("|")
        for env in (names.get("envs"), names.get("env")):
            if env is not None:
                env.close()


# ----------------------------------------------------------------------------------- house keeping
@pytest.mark.parametrize("page", PAGES)
def test_every_number_is_filled_in(page):
    left = re.findall(r"\{\{.*?\}\}", PAGES[page], re.S)
    assert not left, f"{len(left)} to fill: {left[:3]} ..."


@pytest.mark.parametrize("page", PAGES)
def test_nothing_private_is_left(page):
    private = r"/work\b|/tmp/|\.\./shared|DESIGN\.md|DOMAIN\.md|FINDINGS|\bissue #?\d|TODO|FIXME|\blead\b"
    for line in PAGES[page].splitlines():
        assert not re.search(private, line), line


def test_tables_are_rectangular():
    for name, text in PAGES.items():
        width = None
        for line in prose(text).splitlines():
            cells = line.count("|") if line.startswith("|") else None
            assert cells is None or width in (None, cells), f"{name}: {cells} bars, not {width}: {line[:60]}"
            width = cells


def test_first_paragraph_is_about_the_entropy_coefficient():
    first = " ".join(DOCS.split("\n\n")[1].split())
    for words in ("`--policy critic_grid`", "`--policy actor`", "changes nothing in the critic",
                  "test_what_ent_coef_changes"):
        assert words in first
