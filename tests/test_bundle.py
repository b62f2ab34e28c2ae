"""One file of a script and of what it imports: from a file, a cell and a notebook, in an empty directory."""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import toy
from common.run import UsageError
from runs import load_summary
from scripts import kaggle_bundle as kb

SMALL = ("num_envs=64, checkpoint_interval=0, torch_threads=1, cuda=False, total_timesteps=1024, eval_interval=512,"
         "run_dir='run', hidden={}")
FLAGS = {
    "tqc_film_batch": "data='synthetic:regime?bars=4000', window=16, d_model=32, fusion_width=32, updates_per_step=2,"
    "mae_steps=5, learning_starts=256, batch_size=64, episode_length=16," + SMALL.format(32),
    "dqn_forex_subproc": "data='synthetic:signal?bars=4000', vec_mode='subproc', num_workers=2, learning_starts=256,"
    "batch_size=64, episode_length=16," + SMALL.format(8),
    "ppo_arz_gpu": "num_steps=4, episode_seconds=8," + SMALL.format(8),
    "ppo_arz_signals": "num_steps=4, episode_seconds=60," + SMALL.format(8),
}
# what pastes a file into a cell of IPython, which then runs more cells
PASTE = """
import sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
sys.argv = ["kernel_launcher.py", "-f", "kernel.json"]
for name in {cells}:
    shell.run_cell(open(name).read()).raise_error()
"""
MAGIC = """
from IPython.core.interactiveshell import InteractiveShell
InteractiveShell.instance().run_line_magic("run", "one_file.py --version")
"""
NEXT_CELL = """
import traceback
from common.run import check
assert summary["exit_code"] == 0 and callable(load_policy("run/checkpoints/best.pt"))
try:
    check(object(), {"kind": ()}, {})
except AttributeError as e:
    place = traceback.extract_tb(e.__traceback__)[-1]
    assert place.filename == main.__code__.co_filename
    print(f"raised in line {place.lineno}")
"""


def bundle(folder, script, flags="timeout=300", name="one_file.py"):
    """The bundle, in an empty folder."""
    folder.mkdir()
    kb.main([script, "-o", str(folder / name), "--flags", flags])
    return folder / name


def run(folder, *argv, code=0):
    """Python in a folder without the repository; returns stdout and stderr."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "NUMBA_CACHE_DIR")}
    env |= {"MPLBACKEND": "Agg", "TMPDIR": str(folder.parent)}  # a pasted cell leaves a file there
    done = subprocess.run([sys.executable, *argv], cwd=folder, env=env, text=True, capture_output=True, timeout=1800)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout, done.stderr


@pytest.mark.parametrize("script", kb.SCRIPTS)
def test_modules_stand_verbatim_under_a_heading_each(script, tmp_path, repo):
    path = bundle(tmp_path / "b", script)
    text = path.read_text()
    heads = re.findall(r"^# ((?:common|scripts|docs|cleanrl_crypto)/\w+\.\w+)$", text, re.M)
    assert heads[0] == "common/__init__.py" and heads[-1] == f"cleanrl_crypto/{script}.py"
    assert len(heads) == len(set(heads)) and {"common/run.py", "scripts/report.py", f"docs/{script}.md"} <= set(heads)
    for name in heads[:-1]:
        assert (repo / name).read_text() in text
    top = text[:text.index('r"""')]
    assert "MIT License" in top and "0.2.0" in top and re.search(r"commit [0-9a-f]{12}", top)


def test_the_one_file_answers_at_once(tmp_path):
    path = bundle(tmp_path / "b", "ppo_arz_gpu", "timeout=5")
    for flag, word in (("--help", "--checkpoint-interval"), ("--version", "ppo_arz_gpu")):
        assert word in run(path.parent, path, flag)[0]
    pytest.importorskip("IPython", reason="%run")
    assert "ppo_arz_gpu 0.2.0" in run(path.parent, "-c", MAGIC)[0]
    assert "no such run directory" in run(path.parent, path, "scripts/report.py", "nowhere", code=2)[1]


def test_what_is_refused(tmp_path):
    out = str(tmp_path / "x.py")
    for argv, word in (("nobody", "nobody"), ("ppo_arz_gpu --flags 3", "--flags 3"), ("ppo_arz_gpu -o x.txt", "x.txt"),
                       ("ppo_arz_gpu --flags seeed=3", "seed"), ("ppo_arz_gpu --flags f=print()", "print()")):
        with pytest.raises(UsageError, match=re.escape(word)):
            kb.main(["-o", out, *argv.split()])
    assert not list(tmp_path.iterdir())


def ran_well(folder, script):
    summary = load_summary(folder / "run")
    assert summary["updates"] > 0 and summary["script"] == script and re.match("[0-9a-f]{12}", summary["commit"])
    page = (folder / "run" / "report.html").read_text()
    return summary, page


@pytest.mark.parametrize("script", [s if s == "tqc_film_batch" else pytest.param(s, marks=pytest.mark.slow)
                                    for s in kb.SCRIPTS])
def test_a_pasted_cell_runs(script, tmp_path):
    """With worker processes where there are some; the notebook's own arguments are not flags; a traceback names
    lines of the one file."""
    pytest.importorskip("IPython", reason="a notebook's cell")
    path = bundle(tmp_path / "b", script, FLAGS[script])
    (path.parent / "next.py").write_text(NEXT_CELL)
    out, err = run(path.parent, "-c", PASTE.format(cells=["one_file.py", "next.py"]))
    ran_well(path.parent, script)
    line = int(re.search(r"^raised in line (\d+)$", out, re.M)[1])
    assert path.read_text().splitlines()[line - 1].strip() == "value = getattr(args, name)", err


@pytest.mark.slow
@pytest.mark.parametrize("script", kb.SCRIPTS)
def test_a_file_runs(script, tmp_path):
    """Without flags; then with some, in another process, from the caches of the first."""
    path = bundle(tmp_path / "b", script, FLAGS[script])
    run(path.parent, path)
    summary, page = ran_well(path.parent, script)
    assert "meaning" not in page or len(page) > 10_000
    run(path.parent, path, "--eval-only", "--checkpoint", "run/checkpoints/best.pt", "--run-dir", "again")
    assert load_summary(path.parent / "again")["eval"].keys() == summary["eval"].keys()


# ---------------------------------------------------------------------------------- an image that lacks packages
LACKING = """
import runpy, sys
for name in {names}:
    sys.modules[name] = None  # what an import of a package that is not there meets
sys.argv = {argv}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_all_missing_packages_are_one_line(repo, tmp_path):
    argv = [str(repo / "cleanrl_crypto" / "ppo_arz_gpu.py")]
    err = run(tmp_path, "-c", LACKING.format(names=["numba", "tyro", "talib"], argv=argv), code=2)[1]
    assert err.startswith("error: ") and err.count("\n") == 1 and "pip install numba tyro TA-Lib" in err
    assert not list(tmp_path.iterdir())


def test_flags_as_keywords_need_no_tyro(tmp_path, monkeypatch):
    for name in ("tyro", "rich"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match="pip install tyro rich"):
        toy.main(["--seed", "3"])
    for wrong, word in ((dict(seeed=3), "seed"), (dict(timeout="3"), "timeout"), (dict(seed=True), "seed=True"),
                        (dict(sizes=["1"]), "sizes")):
        with pytest.raises(UsageError, match=word):
            toy.main(**wrong)
    summary = toy.main(seed=3, sizes=[1, 2], run_dir=str(tmp_path / "r"), report=False, torch_threads=1)
    assert summary["exit_code"] == 0 and "seed=3" in summary["command"]
    assert json.loads((tmp_path / "r" / "args.json").read_text())["sizes"] == [1, 2]


def test_columns_that_need_a_missing_package_are_named(monkeypatch, tmp_path):
    from common.data import load_bars
    from common.features import fit_columns

    bars = load_bars("synthetic:signal?bars=1000")
    monkeypatch.setitem(sys.modules, "talib", None)
    with pytest.raises(UsageError, match="rsi_14, adx_14 .*pip install TA-Lib"):
        fit_columns(bars, ("ret_1", "rsi_14", "log_range", "adx_14"), 700)
    assert fit_columns(bars, ("ret_1", "log_range"), 700).columns == ("ret_1", "log_range")
    # there, and broken: the columns were left out in silence
    (tmp_path / "talib.py").write_text("import no_such_library\n")
    monkeypatch.delitem(sys.modules, "talib")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="rsi_14 .*no_such_library"):
        fit_columns(bars, ("ret_1", "rsi_14"), 700)


@pytest.mark.slow
def test_traffic_runs_where_an_image_lacks_what_it_may(tmp_path):
    path = bundle(tmp_path / "b", "ppo_arz_gpu", FLAGS["ppo_arz_gpu"])
    names = ["tyro", "rich", "talib", "hmmlearn", "empyrical", "wandb", "ccxt"]
    out = run(path.parent, "-c", LACKING.format(names=names, argv=[str(path)]))[0]
    ran_well(path.parent, "ppo_arz_gpu")
    assert "episode_return" in out


@pytest.mark.slow
def test_the_wheel_runs(tmp_path, repo):
    setuptools = pytest.importorskip("setuptools", minversion="77", reason="builds the wheel")
    files = subprocess.run(["git", "ls-files"], cwd=repo, capture_output=True, text=True).stdout.split()
    for name in files:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repo / name, tmp_path / "tree" / name)
    build = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(tmp_path / "site"), "."]
    run(tmp_path / "tree", *build)
    call = f"import runpy, sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); sys.argv[1:] = {{}};" \
        "runpy.run_module('cleanrl_crypto.ppo_arz_gpu', run_name='__main__', alter_sys=True)"
    (tmp_path / "empty").mkdir()
    assert "ppo_arz_gpu 0.2.0" in run(tmp_path / "empty", "-c", call.format(["--version"]))[0], setuptools.__version__
    flags = "--torch-threads 1 --num-envs 64 --num-steps 4 --episode-seconds 8 --total-timesteps 512 --no-cuda"
    run(tmp_path / "empty", "-c", call.format([*flags.split(), "--run-dir", "run"]))
    page = (tmp_path / "empty" / "run" / "report.html").read_text()
    assert "transitions a second of rollouts" in page  # the docs' words are in the wheel


@pytest.mark.slow
def test_the_notebook_runs_in_a_clean_kernel(tmp_path):
    pytest.importorskip("nbconvert", reason="executes a notebook")
    if not shutil.which("jupyter"):
        pytest.skip("no jupyter")
    path = bundle(tmp_path / "b", "dqn_forex_subproc", FLAGS["dqn_forex_subproc"], "one.ipynb")
    run(path.parent, "-m", "nbconvert", "--to", "notebook", "--execute", "--output", "done.ipynb", path.name)
    ran_well(path.parent, "dqn_forex_subproc")
    last = json.loads((path.parent / "done.ipynb").read_text())["cells"][-1]
    assert "<iframe" in "".join(last["outputs"][0]["data"]["text/html"])
