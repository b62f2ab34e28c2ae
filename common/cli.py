"""Command lines: tyro, with every refusal in one line."""

from __future__ import annotations

import difflib
import io
import re
import sys
from contextlib import redirect_stderr
from dataclasses import fields

import tyro


class UsageError(ValueError):
    """One line that names the flag; scripts print it on stderr and exit with 2."""


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check(args, choices: dict, ranges: dict):
    """Refuse values outside choices {field: allowed} or ranges {field: (low, high)}, both ends allowed; None passes."""
    for name, known in choices.items():
        if (value := getattr(args, name)) not in known:
            raise ValueError(f"{flag(name)} {value}: must be one of {', '.join(map(str, known))}")
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:  # a NaN is refused too
            raise ValueError(f"{flag(name)} {value}: must be from {low:g} to {high:g}")


def parse_args(cls, argv: list[str] | None):
    """An instance of the dataclass `cls` from argv (None: the process's own). UsageError with near matches."""
    argv = sys.argv[1:] if argv is None else [str(a) for a in argv]
    known = {flag(prefix + f.name) for f in fields(cls) for prefix in (("", "no_") if f.type is bool else ("",))}
    for token in argv:
        name = token.split("=")[0].replace("_", "-")
        if token.startswith("--") and name != "--help" and name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise UsageError(f"unknown flag {name}" + (f": did you mean {' or '.join(near)}?" if near else ""))
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(cls, args=argv)
    except ValueError as e:
        raise UsageError(str(e)) from e
    except SystemExit as e:
        if e.code in (0, None):
            raise
        words = " ".join(re.sub(r"\x1b\[[0-9;]*m|[^\x20-\x7e]+", " ", said.getvalue()).split())  # no colours, no box
        frame = rf"^.*?Error parsing ({cls.__name__}: )?|Argument helptext.*|For full helptext.*"
        raise UsageError(re.sub(frame, "", words).strip()) from e
