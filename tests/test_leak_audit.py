"""The leak audit catches planted leaks and lets their clean twins pass."""

from pathlib import Path

import pytest

import leaks
from scripts import leak_audit

FILE = Path(leaks.__file__)
NAMES = [name.removeprefix("leak_") for name in vars(leaks) if name.startswith("leak_")]


def audit(target, *flags):
    return leak_audit.main([str(target), *map(str, flags)])


def flags_of(name):
    labels = leaks.LABELS.get(name)
    return ["--labels", *labels] if labels else []


@pytest.mark.parametrize("name", NAMES)
def test_the_leak_is_caught(name):
    found = audit(f"{FILE}:leak_{name}", *flags_of(name))
    assert found["exit_code"] == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_clean_twin_passes(name):
    found = audit(f"{FILE}:clean_{name}", *flags_of(name))
    assert found["exit_code"] == 0 and not found["findings"]
