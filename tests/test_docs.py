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

from cleanrl_crypto import dqn_forex_subproc as dqn
from cleanrl_crypto import ppo_arz_gpu as arz
from cleanrl_crypto import tqc_film_batch as tqc
from common import features, markets, networks
from common.cli import parse_args
from common.data import split_rows

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {  # page -> what it documents
    "docs/tqc_film_batch.md": tqc, "docs/dqn_forex_subproc.md": dqn, "docs/ppo_arz_gpu.md": arz}
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", *SCRIPTS)}
DOCS = PAGES["docs/tqc_film_batch.md"]
DQN = PAGES["docs/dqn_forex_subproc.md"]
ARZ = PAGES["docs/ppo_arz_gpu.md"]
PROGRAMS = {f"cleanrl_crypto/{Path(page).stem}.py": script for page, script in SCRIPTS.items()}
SPLITS = {"docs/ppo_arz_gpu.md": ("validation", "published", "heldout")}  # the other two say theirs
NETWORK_SPLITS = ("eval", "x1.0", "x1.3")
PARTS = ("cleanrl_crypto", "common", "scripts", "tests", "docs")
FOREIGN = {"--logdir", "--index-url", "--nproc-per-node"}  # flags of tensorboard, pip and torchrun
PREFIXES = ("charts", "losses", "policy", "value", "env", "eval", "alarm", "time")
BARS, WINDOW = 4000, 16
COMMON = "--num-envs 64 --eval-interval 512 --checkpoint-interval 0 --no-report --torch-threads 1 --no-cuda"
MARKET = "--episode-length 16 --batch-size 64"
TINY = {page: [shlex.split(f"{flags} {COMMON}") for flags in runs] for page, runs in {
    "docs/tqc_film_batch.md": [f"""--data synthetic:regime?bars={BARS} --window {WINDOW} --d-model 32 --n-heads 2
        --n-layers 1 --d-ff 64 --fusion-width 32 --hidden 32 --updates-per-step 2 --mae-steps 5
        --total-timesteps 2048 --learning-starts 256 {MARKET}"""],
    "docs/dqn_forex_subproc.md": [
        f"""--data synthetic:signal?bars={BARS} --vec-mode single --hidden 8
        --total-timesteps 2048 --learning-starts 256 {MARKET}""",
        f"""--env-fn gymnasium.envs.classic_control.cartpole:CartPoleEnv --vec-mode single --hidden 8 --eval-episodes 4
        --total-timesteps 1024 --learning-starts 256 {MARKET}"""],
    "docs/ppo_arz_gpu.md": ["--num-steps 4 --episode-seconds 8 --hidden 8 --total-timesteps 1024"]}.items()}

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
    """(program, arguments) of every `python FILE ...` or `torchrun ... FILE ...` in a bash block or in inline code."""
    found = []
    for text in PAGES.values():
        shell = "\n".join(blocks(text, "bash")).replace("\\\n", " ")
        for line in shell.splitlines() + spans(text):
            for name, value in (("s", "100"), ("t", "30"), ("m", "noise")):  # the variables of the loops
                line = re.sub(rf"\${name}\b", value, line)
            # up to the next command; the & of a market's keys belongs to the argument
            start = r"\b(?:python|torchrun --nproc-per-node \d+) (\w+/\w+\.py)"
            for program, rest in re.findall(start + r"((?:[^;|&\n]|&(?=[a-z]\w*=))*)", line):
                found.append((program, shlex.split(rest, comments=True)))
    return found


def scripts_flags(program: str) -> set[str]:
    """Flags that a program under scripts/ knows, from its --help."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as stop:
        import_module(program.removesuffix(".py").replace("/", ".")).main(["--help"])
    assert not stop.value.code
    return set(re.findall(r"--[a-z][a-z-]+", said.getvalue()))


def flags_of(script) -> set[str]:
    names = {f.name.replace("_", "-"): f.type for f in fields(script.Args)}
    return {f"--{n}" for n in names} | {f"--no-{n}" for n, kind in names.items() if kind is bool}


def default(value) -> str:
    """A default as the tables show it: what one would type."""
    return (" ".join(map(str, value)) or "()") if isinstance(value, tuple) else str(value)


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory):
    """page -> the folders of real runs at tiny sizes, the market's first; made when first asked for."""
    made = {}

    def runs(page: str) -> list[Path]:
        if page not in made:
            made[page] = [tmp_path_factory.mktemp("docs") / "tiny" for _ in TINY[page]]
            for folder, flags in zip(made[page], TINY[page]):
                assert SCRIPTS[page].main([*flags, "--run-dir", str(folder)])["exit_code"] == 0
        return made[page]

    return runs


# --------------------------------------------------------------------------------- flags, commands
@pytest.mark.parametrize("page", SCRIPTS)
def test_flags_table_is_the_dataclass(page):
    found = rows(PAGES[page], ("flag", "default"))
    table = [(cells[0].strip("`"), cells[1].strip("`")) for cells in found]
    kept = fields(SCRIPTS[page].Args)
    assert table == [(f"--{f.name.replace('_', '-')}", default(f.default)) for f in kept]
    assert all(len(cells[2]) > 3 for cells in found)


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_that_is_mentioned_exists(page):
    known = FOREIGN | {"--help"}
    for program in {p for p, _ in commands() if p.startswith("scripts/")}:
        known |= scripts_flags(program)
    for script in [SCRIPTS[page]] if page in SCRIPTS else SCRIPTS.values():
        known |= flags_of(script)
    text = PAGES[page].replace("`--no-x`", "")  # stands for any switch
    unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - known
    assert not unknown


def test_every_command_parses():
    help_of = {}
    for program, argv in commands():
        assert (ROOT / program).is_file(), program
        if program.startswith("scripts/"):
            known = help_of.setdefault(program, scripts_flags(program))
            assert {a.split("=")[0] for a in argv if a.startswith("--")} <= known, (program, argv)
        elif "--help" not in argv:
            args = parse_args(PROGRAMS[program].Args, argv)
            if (getattr(args, "data", None) or "").startswith("synthetic:"):
                markets.parse_law(args.data)
            for name in getattr(args, "feature_cols", ()):
                features.find_column(name)
    assert {program for program, _ in commands()} >= {
        *PROGRAMS, "scripts/report.py", "scripts/download_data.py", "scripts/benchmark.py", "scripts/benchmark_dqn.py",
        "scripts/benchmark_arz.py", "scripts/tune_arz.py", "scripts/validate_arz.py"}


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
def documented(page: str, splits: tuple[str, ...] = ()) -> set[str]:
    names = [cells[0].strip("`") for cells in rows(PAGES[page], ("metric",))]
    assert len(set(names)) == len(names)
    splits = splits or SPLITS.get(page) or SCRIPTS[page].SPLITS
    return {name.replace("<split>", split) for name in names for split in splits}


@pytest.mark.parametrize("page", SCRIPTS)
def test_metrics_table_is_what_a_run_logs(page, tiny_runs):
    lines = [line for folder in tiny_runs(page) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = set().union(*map(json.loads, lines)) - {"global_step", "wall"}
    assert logged - documented(page) == set(), "logged, not in the docs"
    assert documented(page) - logged == set(), "in the docs, not logged"
    assert {name.split("/")[0] for name in logged} <= set(PREFIXES)
    for cells in rows(PAGES[page], ("metric",)):
        assert len(cells) == 4 and all(cells[:3]), cells[0]
        assert cells[3] or cells[0].startswith("`time/"), f"{cells[0]}: what to do if it is not healthy?"


@pytest.mark.parametrize("page", PAGES)
def test_metrics_that_are_mentioned_exist(page):
    known = {"time/...", *(f"{prefix}/" for prefix in PREFIXES)}
    for one in [page] if page in SCRIPTS else SCRIPTS:
        known |= documented(one) | (documented(one, NETWORK_SPLITS) if "arz" in one else set())
        known |= {cells[0].strip("`") for cells in rows(PAGES[one], ("metric",))}
    for span in spans(PAGES[page]):
        if re.match(rf"({'|'.join(PREFIXES)})/", span):
            assert span in known, span


@pytest.mark.parametrize("page", SCRIPTS)
def test_verdicts_are_the_codes(page, tiny_runs):
    path, text = ("cleanrl_crypto/ppo_arz_gpu.py", ARZ) if SCRIPTS[page] is arz else ("common/scoring.py", DOCS)
    source = (ROOT / path).read_text()
    verdicts = [cells[0].strip("`") for cells in rows(text, ("verdict",))]
    function = source[source.index("def verdict") :].split("\ndef ")[0]
    assert set(verdicts) == set(re.findall(r'return "(\w+)", \[', function))
    said = set(re.findall(r"verdict `(\w+)`", PAGES[page]))
    assert said and said < set(verdicts)
    for folder in tiny_runs(page):
        assert json.loads((folder / "summary.json").read_text())["audit"]["verdict"] in verdicts


@pytest.mark.parametrize("page", SCRIPTS)
def test_summary_keys_are_documented(page, tiny_runs):
    text = PAGES[page]
    section = text[text.index("### The rest of `summary.json`") : text.index("Baselines: `")]
    for folder in tiny_runs(page):
        summary = json.loads((folder / "summary.json").read_text())
        missing = [key for key in summary if not re.search(rf"`{key}[`.]", section)]
        assert not missing
    summary = json.loads((tiny_runs(page)[0] / "summary.json").read_text())
    line = text[text.index("Baselines: `") :].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", line)) == set(list(summary["eval"].values())[-1]["baselines"])


# ----------------------------------------------------------------------------- columns and numbers
def test_columns_table_is_the_features():
    table = [(cells[0], cells[1].strip("`"), cells[2]) for cells in rows(DOCS, ("column", "name"))]
    assert table == [(str(i), name, text) for i, (name, text) in enumerate(features.TECH_50.items())]
    assert len(table) == 50
    ten = DOCS[DOCS.index("Several files, 10 columns each") :].split(". Two files")[0]
    assert tuple(re.findall(r"`(\w+)`", ten)) == features.TECH_10
    for name in (features.HMM_COLUMNS[0], features.HMM_COLUMNS[3], features.HMM_COLUMNS[4]):
        assert f"`{name}`" in DOCS


def test_names_of_columns_are_the_code_s():
    table = [(cells[0].strip("`"), cells[1], cells[2]) for cells in rows(DQN, ("family",))]
    families = {k: text for k, (text, _) in features.FAMILIES.items()}
    assert table == [(f"{k}_N", text, str(features.LEAST.get(k, 1))) for k, text in families.items()]
    assert f"any N up to {features.MOST}" in DQN
    said = DQN[DQN.index("Plain names, explained in") :].split("\n\n")[0]
    plain = [k for k in features.TABLE if not re.fullmatch(rf"({'|'.join(families)})_\d+", k)]
    assert sorted(re.findall(r"`(\w+)`", said)) == sorted([*plain, "macd"])


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


def test_numbers_in_prose_follow_from_the_code_of_dqn():
    args, spaced = dqn.Args(), lambda n: f"{n:,}".replace(",", " ")
    pairs = dqn.load_pairs(args)
    size = {name: spaced(int(stop - start)) for name, ((start, stop), *_) in pairs.rows.items()}
    columns, replay = pairs.table.shape[1], dqn.Replay(2, 1, 2)
    stored = sum(getattr(replay, k).nbytes for k in replay.FIELDS) // 2
    lanes, drawn = 1024, args.updates_per_step * args.batch_size
    pips = ", ".join(f"{dqn.SPREAD_PIPS[s]:g}" for s in args.symbols)
    text = " ".join(DQN.split())
    for said in (
        f"A pair of 20 000 bars gives train {size['train']} rows, eval {size['eval']}, test {size['test']}, with "
        f"{dqn.HORIZON + dqn.EMBARGO} left out", f"`Box` ({columns + 2},) float32", f"{len(args.feature_cols)} columns",
        f"{columns} market columns alone ({columns} -> {args.hidden} -> {args.hidden} -> 3, ReLU)",
        f"{stored} bytes a transition", f"{stored} bytes each on a market",
        f"observations twice, {2 * 4 * (columns + 2)} bytes",
        f"{args.updates_per_step} x {args.batch_size} every {lanes}",
        f"{drawn // lanes} rows a transition in both", f"empty: {pips} for the default symbols",
        f"{pairs.cost[0] / dqn.BP:g} bp on `synthetic:signal`", f"A night is a {dqn.ROLLOVER}:00 UTC",
        f"A step of {dqn.WEEKEND_HOURS} hours", f"a factor of {dqn.LOST:.0e}".replace("e-0", "e-"),
        f"More than {dqn.ATTEMPTS} restarts", f"the last {1 / (1 - args.average):.0f} updates",
    ):
        assert said in text, said


def test_numbers_in_prose_follow_from_the_code_of_arz():
    args, text = arz.Args(), " ".join(ARZ.split())
    net = networks.find_network("corridor")
    env = arz.NetworkVectorEnv(1, "corridor", args.decision_interval)
    width, (low, high) = env.row_obs, arz.DEMAND_SLOW
    env.close()
    flags = {cells[0].strip("`"): cells[2] for cells in rows(ARZ, ("flag", "default"))}
    for name, values in arz.DEFAULTS.items():
        road, network = (f"{v:,}".replace(",", " ") if not isinstance(v, str) and v > 9999 else str(v) for v in values)
        assert f"None: {road}," in flags[f"--{name.replace('_', '-')}"], name
        assert f"on a network {network}" in flags[f"--{name.replace('_', '-')}"], name
    few = arz.EVAL_LANES // 5
    for said in (
        f"{len(net.ends)} segments, {net.first[-1]} cells of {net.par[:, networks.CELL].max():g} m or less, "
        f"{(net.entry >= 0).sum()} entries", f"{width} numbers",
        f"in [{low:.1g}, {high:.2g}] every {arz.KNOT:g} s and joined by lines".replace("0.", "."),
        f"every {arz.BIN:g} s",
        f"its level in {list(arz.TRAIN_LEVELS)}",
        f"(blocks of {arz.BLOCK} lanes in parallel, on networks of up to {arz.NET_BLOCK}",
        f"eval` ({few} cases", f"({2 * few} demand seeds", f"{args.num_minibatches} minibatches of "
        f"{args.num_envs * args.num_steps // args.num_minibatches}", f"gamma {args.gamma:g}".replace("0.", "."),
        f"two layers of {args.hidden} with SiLU", f"creep at {arz.CREEP * 3.6:g} km/h",
        f"L {arz.LENGTH:g} m, v_max {arz.V_MAX:g} m/s, rho_max {arz.RHO_MAX:g}".replace("0.", "."),
        f"{args.episode_seconds / arz.SAMPLE:g} samples", f"multiplied by {arz.FreewayVectorEnv.obs_scale:g}",
        *(f"`{road}` ({limit:g}" for road, limit in networks.ROADS.items()),
    ):
        assert said in text, said
    assert set(net.n_phases) == {2} and "two phases a junction" in text
    controllers = ARZ[ARZ.index("On a network: `") :].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", controllers)) == set(arz.CONTROLLERS)
    assert f"decisions every {arz.DEFAULTS['decision_interval'][1]:g} s" in " ".join(controllers.split())


def own_network(folder: Path) -> Path:
    """The page's example of a network, written to files."""
    (folder / "roads.csv").write_text(blocks(ARZ, "csv")[0])
    (folder / "roads.json").write_text(blocks(ARZ, "json")[0])
    return folder / "roads.csv"


def test_the_network_of_the_page_loads(tmp_path):
    net = networks.load_network(str(own_network(tmp_path)))
    assert net.nodes == ("cross",) and net.n_phases.tolist() == [2] and (net.entry >= 0).sum() == 3


@pytest.mark.slow
def test_the_network_of_the_page_trains_and_logs_what_the_page_says(tmp_path):
    """Compiles for half a minute: metrics, splits and baselines of a network, and the snippet that loads its agent."""
    summary = arz.main(shlex.split(f"""--scenario {own_network(tmp_path)} --num-envs 8 --num-steps 4 --hidden 8
        --episode-seconds 30 --total-timesteps 64 --eval-interval 32 --checkpoint-interval 0 --no-report
        --torch-threads 1 --no-cuda --run-dir {tmp_path / "run"}"""))
    logged = set().union(*map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()))
    expected = {k for k in documented("docs/ppo_arz_gpu.md", NETWORK_SPLITS) if not k.endswith("/floor_veh")}
    assert logged - {"global_step", "wall"} == expected
    assert tuple(summary["eval"]) == NETWORK_SPLITS
    assert set(summary["eval"]["eval"]["baselines"]) == set(arz.CONTROLLERS)
    code = next(code for code in blocks(ARZ, "python") if "corridor" in code)
    code = code.replace("runs/corridor", f"{tmp_path / 'run'}").replace('"corridor"', f'"{tmp_path / "roads.csv"}"')
    names = {}
    exec(compile(code, "docs/ppo_arz_gpu.md", "exec"), names)
    assert names["reward"].shape == (8,) and np.isfinite(names["reward"]).all()
    names["envs"].close()


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


def test_run_directory_table_is_what_a_run_writes(tiny_runs):
    patterns = [cells[0].strip("`") for cells in rows(PAGES["README.md"], ("file", "what"))]
    folders = [folder for page in SCRIPTS for folder in tiny_runs(page)]
    written = {p.relative_to(folder).as_posix() for folder in folders for p in folder.rglob("*") if p.is_file()}
    for name in written:
        assert any(fnmatch(name, pattern) for pattern in patterns), f"{name} is not in README's table"
    for pattern in set(patterns) - {"report.html"}:  # the tiny runs make none
        assert any(fnmatch(name, pattern) for name in written), f"a run writes no {pattern}"


# ---------------------------------------------------------------------------------------- snippets
@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, tiny_runs):
    """As they stand, but for the run directory and the sizes, which are the tiny run's."""
    found = blocks(PAGES[page], "python")
    assert found
    for code in found:
        if "corridor" in code:  # half a minute of compiling: in the slow test of the page's network
            continue
        name = re.search(r"cleanrl_crypto[. ](?:import )?(\w+)", code)
        name = f"docs/{name[1]}.md" if name else page
        folder, of_tqc = tiny_runs(name)[0], SCRIPTS[name] is tqc
        code = re.sub(r'"runs/[\w*]+', f'"{folder.as_posix()}', code)
        size = f", window={WINDOW}" if of_tqc else ""
        code = re.sub(r'"(synthetic:\w+)\??([^"]*)"', rf'"\1?bars={BARS}&\2"{size}', code)
        code = code.replace('&"', '"')
        said, names = io.StringIO(), {}
        with contextlib.redirect_stdout(said):
            exec(compile(code, page, "exec"), names)
        if "reward" in names:
            assert names["reward"].shape == (8,) and np.isfinite(names["reward"]).all()
            assert not of_tqc or set(names["obs"]) == {"market", "position", "w_cost"}
        if "glob" in names:  # the snippet that prints the first table's rows
            header = re.search(r"^\| market \| test score \| actor's .*$", DOCS, re.M)[0]
            assert said.getvalue().count("|") == header.count("|")
        for env in (names.get("envs"), names.get("env")):
            if env is not None:
                env.close()


# ----------------------------------------------------------------------------------- house keeping
@pytest.mark.parametrize("page", PAGES)
def test_every_number_is_filled_in(page):
    left = re.findall(r"\{\{[^}]*\}\}|^.*\bTODO\b.*$", PAGES[page], re.M)
    assert not left, f"{len(left)} to fill: {left[:3]} ..."


@pytest.mark.parametrize("page", PAGES)
def test_nothing_private_is_left(page):
    private = r"/work\b|/tmp/|\.\./shared|DESIGN\.md|DOMAIN\.md|FINDINGS|\bissue #?\d|FIXME|\blead\b"
    for line in PAGES[page].splitlines():
        assert not re.search(private, line), line


def test_tables_are_rectangular():
    for name, text in PAGES.items():
        width = None
        for line in prose(text).splitlines():
            cells = line.count("|") if line.startswith("|") else None
            assert cells is None or width in (None, cells), f"{name}: {cells} bars, not {width}: {line[:60]}"
            width = cells


def test_first_paragraph_says_what_is_not_textbook():
    first = " ".join(DQN.split("\n\n")[1].split())
    for words in ("not textbook DQN", "`--all-actions`", "`--no-all-actions`", "`--env-fn`"):
        assert words in first


def test_first_paragraph_is_about_the_entropy_coefficient():
    first = " ".join(DOCS.split("\n\n")[1].split())
    for words in ("`--policy critic_grid`", "`--policy actor`", "changes nothing in the critic",
                  "test_what_ent_coef_changes"):
        assert words in first
