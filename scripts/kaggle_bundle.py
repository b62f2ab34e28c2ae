#!/usr/bin/env python3
"""Make one file of a script and of what it imports from this repository: for Kaggle, Colab, a mail.

    python scripts/kaggle_bundle.py tqc_film_batch                 # tqc_film_batch_bundle.py
    python scripts/kaggle_bundle.py ppo_arz_gpu -o freeway.ipynb --flags "timeout=300, seed=3"

Paste the .py file into a cell, call it with %run, upload it as a Kaggle script or run it with
Python: it needs no internet and no other file of the repository, and report.html is written too.
Modules stand in it verbatim under a heading each, the script as plain code at the end; tracebacks
name lines of the one file. The notebook holds the same text in a cell, and shows the report.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import sys
from pathlib import Path
from string import Template

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import ROOT, __version__  # noqa: E402
from common.run import UsageError, commit_of, exit_with, flag_groups, refuse  # noqa: E402
from common.timeout_guard import whole_file  # noqa: E402

SCRIPTS = sorted(path.stem for path in (ROOT / "cleanrl_crypto").glob("[!_]*.py"))
PROGRAM = "scripts/report.py"  # a run starts it at its end
FOLDERS = "common", "scripts"  # where the imported modules come from
RULE = "# " + "=" * 96

TOP = """\
$begin
# $script of cleanrl-crypto $version, commit $commit, with all that it imports from there.
# Paste it into a notebook's cell, or: %run FILE.py --timeout 300, python FILE.py --timeout 300.
# --help lists the flags. The report of a run again: python FILE.py $program RUN_DIR
#
$license
$docstring

RUN_FLAGS = dict($flags)  # in a cell, and where the command line gives none
"""

HEAD = '''
import importlib.abc
import importlib.util
import linecache
import os
import sys
import tempfile
from hashlib import sha256
from pathlib import Path


class Bundle(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the modules below from this file, by the names that they have in the repository."""

    about = $about

    def __init__(self, path):
        self.path, self.texts = path, {}

    def add(self, name, text):
        """A file of the repository that begins in the line of this call."""
        self.texts[name] = "\\n" * (sys._getframe(1).f_lineno - 1) + text

    def text(self, name):
        if name == self.about["script"]:
            return Path(self.path).read_text(encoding="utf-8")
        return self.texts.get(name)

    def place(self, module):
        """Its file, and whether it is a package."""
        stem = module.replace(".", "/")
        package = any(name.startswith(f"{stem}/") for name in [*self.texts, self.about["script"]])
        return f"{stem}/__init__.py" if package else f"{stem}.py", package

    def find_spec(self, module, path=None, target=None):
        name, package = self.place(module)
        if package or name in self.texts:
            return importlib.util.spec_from_loader(module, self, origin=name, is_package=package)

    def get_source(self, module):
        return self.texts.get(self.place(module)[0], "")

    def exec_module(self, module):
        self.execute(self.place(module.__name__)[0], vars(module))

    def execute(self, name, names):
        names["__file__"] = os.path.join(self.path, *name.split("/"))
        exec(compile(self.texts.get(name, ""), self.path, "exec"), names)


def file_of_this_cell():
    """Workers, the report and the kernels' caches need a file: a cell's text is written to one."""
    lines = linecache.getlines(sys._getframe(1).f_code.co_filename)
    ends = [i for i, line in enumerate(lines) if line.strip() in ("$begin", "$end")]
    if len(ends) != 2:
        raise RuntimeError("this text must run from a file, or as a whole from a notebook's cell")
    text = "\\n" * ends[0] + "".join(lines[ends[0] : ends[1] + 1])
    user = getattr(os, "getuid", int)()
    name = f"cleanrl_crypto_{user}_{sha256(text.encode()).hexdigest()[:12]}"
    path = Path(tempfile.gettempdir(), name, Path(Bundle.about["script"]).name)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.with_suffix(".tmp").write_text(text, encoding="utf-8")
        os.replace(path.with_suffix(".tmp"), path)
    return path


PASTED = "__file__" not in globals()
if PASTED:
    path = file_of_this_cell()
    sys.path.insert(0, str(path.parent))
    sys.modules.pop(path.stem, None)
    THE_FILE = importlib.import_module(path.stem)
    bundle = THE_FILE.bundle
else:
    path = str(Path(__file__).resolve())
    bundle = next((f for f in sys.meta_path if getattr(f, "path", None) == path), None)
    if bundle is None or __name__ == "__main__":  # an edited file is another one
        sys.meta_path[:] = [f for f in sys.meta_path if not hasattr(f, "texts")]
        for name in [*sys.modules]:
            if name.split(".")[0] in ("cleanrl_crypto", "common", "scripts"):
                del sys.modules[name]
        bundle = Bundle(path)
        sys.meta_path.insert(0, bundle)
    sys.modules["$module"] = sys.modules[__name__]
SCRIPT = os.path.join(bundle.path, *bundle.about["script"].split("/"))
'''

PROGRAMS = """
if __name__ == "__main__" and not PASTED and sys.argv[1:] and sys.argv[1] in bundle.texts:
    del sys.argv[0]
    bundle.execute(sys.argv[0], {"__name__": "__main__"})
    sys.exit()
"""

RUN = """
if __name__ == "__main__":
    if PASTED:  # from here on the names are the file's
        globals().update({k: v for k, v in vars(THE_FILE).items() if not k.startswith("__")})
    summary = exit_with(main, RUN_FLAGS)
$end
"""

SHOW = """\
import html
from pathlib import Path
from IPython.display import HTML

page = html.escape(Path(summary["run_dir"], "report.html").read_text(encoding="utf-8"))
HTML(f'<div><iframe srcdoc="{page}" width="100%" height="900"></iframe></div>')
"""


# ----------------------------------------------------------------------------------------- modules
def imports_of(name: str) -> list[str]:
    """Files of the repository that a file imports, at its top or later, in that order."""
    found = []
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            own = node.module or ""
            modules = [own, *(f"{own}.{alias.name}" for alias in node.names)]
        else:
            continue
        for module in modules:
            parts = module.split(".")
            file = "/".join(parts) + ".py"
            # what a statement imports may be a module, or a name in one: only files count
            if parts[0] in FOLDERS and (ROOT / file).is_file():
                found.append(file)
    return found


def modules_of(script: str) -> list[str]:
    """All files that a script and the report need, in the order in which a reader meets them."""
    order, waiting = ["common/__init__.py"], [script, PROGRAM]
    while waiting:
        name = waiting.pop(0)
        new = [n for n in imports_of(name) if n not in order]
        order += dict.fromkeys(new)
        waiting += dict.fromkeys(new)
    return [*dict.fromkeys([*order, PROGRAM])]


# ------------------------------------------------------------------------------------------ bundle
def section(name: str) -> str:
    """A file of the repository, verbatim in a raw string."""
    text = (ROOT / name).read_text(encoding="utf-8")
    line = next((i for i, row in enumerate(text.splitlines(), 1) if "'''" in row), None)
    refuse((line, f"{name}:{line}: three ' in a row cannot stand in a bundle: write \"\"\""))
    return f"\n{RULE}\n# {name}\nbundle.add({json.dumps(name)}, r'''\n{text}''')\n"


def top_names(text: str) -> list[str]:
    """What a module's text defines: functions, classes and assigned names."""
    nodes = ast.parse(text).body
    found = [node.name for node in nodes if hasattr(node, "name")]
    targets = []
    for node in nodes:
        if isinstance(node, ast.Assign):
            targets += node.targets
    names = [target for target in targets if isinstance(target, ast.Name)]
    return found + [name.id for name in names]


def checked_flags(script: str, flags: str) -> str:
    """The keywords of --flags. UsageError for text that is none, or unknown names."""
    try:
        call = ast.parse(f"dict({flags})", mode="eval").body
        names = [keyword.arg for keyword in call.keywords]
        values = [keyword.value for keyword in call.keywords]
        # plain values only: the bundle runs this text
        ast.literal_eval(ast.Tuple(values, ast.Load()))
    except (SyntaxError, ValueError) as e:
        raise UsageError(f"--flags {flags}: must read like timeout=300, seed=3") from e
    refuse((call.args or None in names, f"--flags {flags}: must read like timeout=300, seed=3"))
    groups = [*flag_groups(ROOT / script).values()]
    groups += flag_groups(ROOT / "common/run.py", "RunArgs").values()
    known = [row[0] for rows in groups for row in rows]
    for name in names:
        near = " or ".join(difflib.get_close_matches(name, known, n=3))
        hint = f": did you mean {near}?" if near else ""
        refuse((name not in known, f"--flags {name}: {script} has no such flag{hint}"))
    return flags


def bundle(script: str, flags: str) -> str:
    """Text of the one file. script: "cleanrl_crypto/NAME.py"; flags: keywords of dict()."""
    text = (ROOT / script).read_text(encoding="utf-8")
    tree = ast.parse(text)
    lines = text.splitlines(keepends=True)
    first = tree.body[0]
    last = tree.body[-1]
    begin = first.end_lineno
    docstring = "".join(lines[:begin]).rstrip()
    body = "".join(lines[begin : last.lineno - 1])
    # __file__ of a bundle is the bundle
    body = body.replace("__file__", "SCRIPT")
    ending = ast.unparse(last.test) if isinstance(last, ast.If) else ""
    refuse(("__name__" not in ending, f"{script} must end with if __name__ == '__main__':"))
    rows = (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines()
    commit = commit_of(ROOT / script) or "unknown"
    stem = Path(script).stem
    words = {
        "begin": f"# ---- begin of {stem}, one file",
        "end": f"# ---- end of {stem}, one file",
        "script": script,
        "module": f"cleanrl_crypto.{stem}",
        "version": __version__,
        "commit": commit,
        "about": {"script": script, "commit": commit},
        "program": PROGRAM,
        "license": "\n".join(f"# {row}".rstrip() for row in rows),
        "docstring": docstring,
        "flags": flags,
    }
    names = [*modules_of(script), f"docs/{stem}.md"]
    top, head, run = (Template(part).substitute(words) for part in (TOP, HEAD, RUN))
    reserved = {*top_names(head), "RUN_FLAGS", "summary"}
    taken = reserved & {*top_names(body)}
    taken = ", ".join(taken)
    refuse((taken, f"{script}: a bundle has these names for itself, rename them: {taken}"))
    own = f"\n{RULE}\n# {script}\n{body.strip()}\n"
    return "".join([top, head, *map(section, names), PROGRAMS, own, run])


def notebook(text: str, script: str) -> str:
    """The same in a cell of its own, a title above and the report below."""
    title = f"# {Path(script).stem}\n\nOne file of cleanrl-crypto {__version__}, MIT License. "
    title += "Its flags: `RUN_FLAGS` near the top of the next cell.\n"
    cells = [("markdown", title), ("code", text), ("code", SHOW)]
    kernel = {"name": "python3", "display_name": "Python 3"}
    page = {"nbformat": 4, "nbformat_minor": 5, "cells": []}
    page["metadata"] = {"kernelspec": kernel}
    for number, (kind, source) in enumerate(cells):
        cell = {"cell_type": kind, "id": f"cell{number}", "metadata": {}}
        cell["source"] = source.splitlines(keepends=True)
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        page["cells"].append(cell)
    return json.dumps(page, indent=1) + "\n"


# -------------------------------------------------------------------------------------------- main
def main(argv: list[str] | None = None) -> dict:
    """Write the bundle; returns {"exit_code": 0, "path": its path}."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("script", help=f"one of {', '.join(SCRIPTS)}")
    parser.add_argument("-o", "--out", type=Path, help="OUT.py or OUT.ipynb (SCRIPT_bundle.py)")
    parser.add_argument("--flags", default="timeout=300", help='"timeout=300, seed=3"')
    args = parser.parse_args(argv)
    stem = Path(args.script).stem
    refuse((stem not in SCRIPTS, f"{args.script}: must be one of {', '.join(SCRIPTS)}"))
    script = f"cleanrl_crypto/{stem}.py"
    out = args.out or Path(f"{stem}_bundle.py")
    refuse((out.suffix not in (".py", ".ipynb"), f"--out {out}: must end in .py or .ipynb"))
    text = bundle(script, checked_flags(script, args.flags))
    if out.suffix == ".ipynb":
        text = notebook(text, script)
    with whole_file(out) as half:
        half.write_text(text, encoding="utf-8")
    print(f"{out}: {len(text.splitlines())} lines")
    return {"exit_code": 0, "path": out}


if __name__ == "__main__":
    exit_with(main)
