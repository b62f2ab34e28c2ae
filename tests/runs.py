"""What the tests of all three scripts do with a command line and its run directory."""
import json
import time

import torch

SUMMARY = {  # what every script's summary.json holds
    "status", "global_step", "updates", "replay_ratio", "samples_per_transition", "wall_seconds", "phases",
    "env_builds", "buffer_allocations", "sps", "eval", "audit", "versions", "device", "data",
}


def flags_of(tiny: dict, run_dir=None, /, **changes) -> list[str]:
    """{field: value} -> command line; None leaves a flag out."""
    out = []
    for key, value in (tiny | {"run_dir": run_dir} | changes).items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            out.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, tuple):
            out += [f"--{name}", *map(str, value)]
        elif value is not None:
            out += [f"--{name}", str(value)]
    return out


def wait_until(child, ready, seconds=400):
    """Until ready(), while the process `child` lives."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def records(run_dir) -> list[dict]:
    text = (run_dir / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def load_summary(run_dir) -> dict:
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads((run_dir / "summary.json").read_text(), parse_constant=refuse)


def assert_same(a, b, where=""):
    """Equal to the bit, NaN to NaN, with the place of the first difference."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        holes = torch.isnan(a)
        assert torch.equal(holes, torch.isnan(b)) and torch.equal(a[~holes], b[~holes]), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert a == b, where
