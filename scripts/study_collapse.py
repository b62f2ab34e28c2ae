"""Why does the earlier program's policy collapse? Its settings, and today's, one change at a time.

    python scripts/study_collapse.py --out runs/collapse          # some hours on one core
    python scripts/study_collapse.py --out runs/collapse          # after kill -9: goes on
    python scripts/study_collapse.py --out runs/collapse --cells earlier,reward_1 --jobs 2
    python scripts/study_collapse.py --out runs/collapse --show   # tables and picture again

A cell is a setting, a run is a cell and a seed, of the market and of the training alike. A run is
tqc_film_batch.py's main(), on small networks. What no flag says is wrapped around it: the scale of
rewards, one noise matrix a batch, a position that the actor hardly sees. Peers are sb3-contrib's
TQC on the registered environment.

--out holds runs.csv, one line a finished run; table.csv, table.md and picture.png. Intervals: the
interquartile mean over seeds, 95 % by a bootstrap that draws the seeds of each cell again.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.run import (  # noqa: E402
    UsageError,
    answer_help,
    check,
    exit_with,
    flag,
    parse_args,
    refuse,
)

answer_help(__name__, __file__)

import gymnasium as gym  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from filelock import FileLock, Timeout  # noqa: E402
from scipy.stats import bootstrap, trim_mean  # noqa: E402

from cleanrl_crypto import tqc_film_batch as tqc  # noqa: E402

LANES = 256
IDLE = 8  # vector steps with random actions; the last of them makes the first update
NEVER = 10**9  # transitions: evaluated once, with what training ends with
PEER_BUFFER = 32_768  # transitions: an observation is a window, 3.5 KB
DRAWS = 10_000  # bootstrap resamples
LEAST_ALPHA = 1e-4  # that the picture shows

# networks that learn in seconds, and what every run of the study shares
SMALL = {
    "window": 16,
    "d_model": 32,
    "fusion_width": 64,
    "hidden": 64,
    "mae_steps": 50,
    "precision": "fp32",
}
SHARED = {
    "forecast": False,  # it is nearly the answer, whatever the learner does
    "num_envs": LANES,
    "learning_starts": IDLE * LANES,
    "torch_threads": 1,
    "cuda": False,
    "report": False,
    "checkpoint_interval": 1e9,
}
# The earlier program's, on a smaller scale: it made 24 414 updates, a run here makes 600, and Adam
# moves a weight by at most its rate an update. So learning rates and the target's speed are ten
# times its own. Alpha's rate, which fell there and does not here, takes alpha to .05 after 40 % of
# the run and to the floor after 65 %; there it was .05 after 39 % and .013 at the end. Half a row is
# drawn a transition, as there.
EARLIER = {
    "policy": "actor",
    "gamma": 0.95,
    "reward_std": 0.06,
    "one_matrix": True,
    "dim_position": True,
    "ent_coef": "auto_0.5",
    "ent_coef_lr": 1e-2,
    "ent_coef_min": 0.01,
    "target_entropy": 0.0,
    "log_std_init": 0.0,
    "sde_sample_freq": 64,
    "top_quantiles_to_drop_per_net": 2,
    "batch_size": LANES // 2,
    "segment": 1,
    "counterfactuals": 0,
    "updates_per_step": 1,
    "episode_length": 2048,
    "tau": 0.05,
    "learning_rate": 3e-3,
    "learning_rate_fusion": 3e-3,
    "learning_rate_film": 3e-3,
    "weight_decay": 0.0,
    "dropout": 0.0,
    "recency": 1e9,
    "average": 0.0,
    "patience": 0,
    "eval_interval": NEVER,
}
# The defaults of tqc_film_batch.py beside a forecast; with 256 lanes 64 rows an update are 2.5 a
# transition, as there
TODAY = {
    "batch_size": LANES // 4,
    "eval_interval": 0.125,  # an evaluation each eighth of the run
    "learning_rate_fusion": 3e-5,
}
LARGE = {"num_envs": 1024, "learning_starts": IDLE * 1024}
TINY = {"window": 8, "d_model": 8, "fusion_width": 16, "hidden": 8, "mae_steps": 2}

NO_ALPHA = {"ent_coef": "auto_0.01", "ent_coef_lr": 3e-2, "ent_coef_min": 0.0}
LITTLE_NOISE = {"log_std_init": -3.0, "one_matrix": False, "target_entropy": -1.0}
LADDER = {
    "alpha": ("rewards of std 1; alpha from .01, fast, no floor", {"reward_std": 1.0} | NO_ALPHA),
    "drop": ("no truncation", {"top_quantiles_to_drop_per_net": 0}),
    "noise": ("little noise, drawn a row; target entropy -1", LITTLE_NOISE),
    "rows": (
        "3 counterfactuals, position visible",
        {"counterfactuals": 3, "dim_position": False},
    ),
    "grid": ("greedy on the critic's grid", {"policy": "critic_grid"}),
}
FROM_EARLIER = {
    "reward_1": ("rewards of std 1", {"reward_std": 1.0}),
    "alpha": ("alpha from .01, fast, no floor", NO_ALPHA),
    "drop_0": ("no truncation", {"top_quantiles_to_drop_per_net": 0}),
    "grid": ("greedy on the critic's grid", {"policy": "critic_grid"}),
    "counterfactuals": ("3 counterfactual exposures a row", {"counterfactuals": 3}),
    "entropy_-1": ("target entropy -1", {"target_entropy": -1.0}),
    "noise": ("initial log std -3", {"log_std_init": -3.0}),
    "updates_4": ("4 updates a step, 2 rows a transition", {"updates_per_step": 4}),
    "reward_raw": ("rewards as they are (std .006)", {"reward_std": 0.006}),
    "alpha_floor": ("no floor of alpha", {"ent_coef_min": 0.0}),
    "row_noise": ("noise drawn a row", {"one_matrix": False}),
    "position": ("position visible", {"dim_position": False}),
    "stopping": ("best of 10 evaluations, patience 3", {"eval_interval": 0.1, "patience": 3}),
    "matrix_1": ("a new noise matrix every step", {"sde_sample_freq": 1}),
    "alpha_0": ("no entropy bonus (alpha 0)", {"ent_coef": "0", "ent_coef_min": 0.0}),
    "penalty": ("penalty of trades 40 bp", {"turnover_penalty_bps": 40.0}),
    "screen": ("every column, no screen", {"screen": False}),
}
FROM_TODAY = {
    "reward_.06": ("rewards of std .06", {"reward_std": 0.06}),
    "drop_2": ("2 of 25 quantiles dropped", {"top_quantiles_to_drop_per_net": 2}),
    "counterfactuals": ("no counterfactual exposures", {"counterfactuals": 0}),
    "updates_1": ("1 update a step, .25 rows a transition", {"updates_per_step": 1}),
    "last": ("the last agent, not the best", {"eval_interval": NEVER}),
    "recency": ("every bar weighs the same", {"recency": 1e9}),
    "screen": ("every column, no screen", {"screen": False}),
    "forecast": ("with the lasso's forecast", {"forecast": True}),
}
SLOW_ALPHA = {"ent_coef_lr": 1e-2, "ent_coef_min": 0.01}
FROM_ACTOR = {
    "counterfactuals": ("no counterfactual exposures", {"counterfactuals": 0}),
    "reward_.06": ("rewards of std .06", {"reward_std": 0.06}),
    "alpha": ("slow alpha with a floor of .01", SLOW_ALPHA),
    "drop_2": ("2 of 25 quantiles dropped", {"top_quantiles_to_drop_per_net": 2}),
    "noise": ("initial log std 0", {"log_std_init": 0.0}),
    "entropy_0": ("target entropy 0", {"target_entropy": 0.0}),
    "one_matrix": ("one noise matrix a batch", {"one_matrix": True}),
    "position": ("position hardly visible", {"dim_position": True}),
}
ENTROPIES = (0.5, 0.0, -2.0, -4.0)
TABLES = {
    "earlier": "the earlier settings, one change at a time",
    "ladder": "the earlier settings, changes one after another",
    "entropy": "target entropy, all of the ladder but its last change",
    "today": "today's defaults, one thing taken away",
    "actor": "today's defaults with --policy actor, one thing taken away",
    "peer": "as many updates by sb3-contrib's TQC",
    "full": "the full architecture",
}
PEER_SAME = """batch_size tau gamma ent_coef target_entropy sde_sample_freq
    top_quantiles_to_drop_per_net""".split()
COLUMNS = """cell seed score grid_score actor_score train_score size spread attribution
    attribution_position state_dependence saturation alpha entropy alpha_entropy sigma updates
    transitions samples_per_transition verdict seconds settings""".split()
MEASURED = """grid_score actor_score train_score size spread spread_std alpha alpha_entropy entropy_share soft
    state_dependence saturation attribution attribution_position entropy sigma updates transitions
    samples_per_transition seconds""".split()
HEADS = {
    "grid_score": "greedy on its critic",
    "attribution": "attribution",
    "state_dependence": "state dependence",
    "saturation": "saturation",
    "spread_std": "spread of values, reward std",
    "alpha": "alpha",
    "entropy_share": "alpha x entropy / spread",
    "soft": "soft size",
    "size": "size",
}


@dataclass
class Args:
    # study
    out: str = "runs/collapse"
    """folder of runs.csv, the tables and the picture; the same command goes on"""
    cells: str | None = None
    """cells to run, comma-separated, as runs.csv names them (default: all)"""
    full: bool = False
    """cells of the full architecture too: ten minutes a run"""
    seeds: int = 5
    """seeds a cell, from 0 on"""
    updates: int = 600
    """updates of a run where nothing else is said"""
    bars: int = 8000
    """bars of synthetic:signal"""
    jobs: int = 1
    """processes, one thread each"""
    show: bool = False
    """run nothing: tables and picture of what runs.csv holds"""
    quick: bool = False
    """tiny sizes: a test that it runs, its numbers mean nothing"""

    def __post_init__(self):
        ranges = {(1, 1000): "seeds jobs", (10, 10**7): "updates", (3000, 10**6): "bars"}
        check(self, {}, ranges)


@dataclass
class Cell:
    name: str
    table: str
    text: str
    settings: dict  # flags, and the three wraps
    a_step: int = 1  # updates a vector step by which the length of the run is counted


# ------------------------------------------------------------------------------------------- cells
def all_cells() -> list[Cell]:
    """In the order in which they run: what says most comes first."""
    earlier = SMALL | SHARED | EARLIER
    today = SMALL | SHARED | TODAY
    actor = today | {"policy": "actor"}
    cells = [Cell("earlier", "earlier", "**the earlier settings**", earlier)]
    climbed = earlier
    for name, (text, changes) in LADDER.items():
        before = climbed
        climbed = climbed | changes
        cells.append(Cell(f"ladder_{name}", "ladder", f"+ {text}", climbed))
    cells.append(Cell("today", "today", "**today's defaults**", today, 10))
    cells.append(Cell("actor", "actor", "**the actor ships**", actor, 10))
    groups = (
        ("earlier", earlier, FROM_EARLIER, 1),
        ("actor", actor, FROM_ACTOR, 10),
        ("today", today, FROM_TODAY, 10),
    )
    for table, base, changed, a_step in groups:
        for name, (text, changes) in changed.items():
            cells.append(Cell(f"{table}_{name}", table, text, base | changes, a_step))
    for h in ENTROPIES:
        cells.append(Cell(f"entropy_{h:g}", "entropy", f"{h:g}", before | {"target_entropy": h}))
    defaults = SMALL | SHARED | {"reward_std": 0.006}  # as the environment gives them
    cells.append(Cell("peer_earlier", "peer", "at the earlier settings", earlier))
    cells.append(Cell("peer_defaults", "peer", "at its defaults, one lane", defaults))
    for name, base, a_step in (("earlier", earlier, 1), ("today", today, 10)):
        wide = {k: v for k, v in base.items() if k not in SMALL} | LARGE
        wide["batch_size"] = 4 * base["batch_size"]
        cells.append(Cell(f"full_{name}", "full", f"{name}'s settings", wide, a_step))
    return cells


def chosen_cells(args: Args) -> list[Cell]:
    cells = all_cells()
    known = [c.name for c in cells]
    names = args.cells.split(",") if args.cells else known
    unknown = sorted(set(names) - set(known))
    refuse((unknown, f"--cells {','.join(unknown)}: known are {', '.join(known)}"))
    everything = args.full or args.cells
    return [c for c in cells if c.name in names and (everything or c.table != "full")]


def settings_of(cell: Cell, seed: int, args: Args) -> dict:
    """Flags and wraps of one run; a share of the run becomes transitions."""
    s = dict(cell.settings)
    if args.quick:
        s |= TINY
    s["data"] = f"synthetic:signal?bars={args.bars}&seed={seed}"
    s["seed"] = seed
    steps = IDLE - 1 + math.ceil(args.updates / cell.a_step)
    s["total_timesteps"] = steps * s["num_envs"]
    if s.get("eval_interval", 1) < 1:
        s["eval_interval"] = int(s["eval_interval"] * s["total_timesteps"])
    return s


# ------------------------------------------------------------------- what no flag says, wrapped
def scaled_rewards(std: float):
    """Rewards of the full position have this standard deviation, where --reward-scaling gives 1."""
    scale = tqc.Agent.reward_scale.fget
    return patch.object(tqc.Agent, "reward_scale", property(lambda agent: std * scale(agent)))


def noise_of_a_batch():
    """Updates draw one gSDE matrix a batch, as SB3 does, instead of noise for every row."""
    sample = tqc.sample_action

    def sample_action(actor, market, position, w_cost, noise=None):
        if noise is None:
            with torch.no_grad():
                _, latent = actor(market, position, w_cost)
                matrix = torch.randn_like(actor.log_std) * actor.log_std.exp()
                noise = latent @ matrix / tqc.gsde_std(latent, actor.log_std)
        return sample(actor, market, position, w_cost, noise)

    return patch.object(tqc, "sample_action", sample_action)


def dim_position(inputs: int):
    """The actor's column of the position begins as small as each of its `inputs` market columns."""

    class DimActor(tqc.Actor):
        def __init__(self, width, hidden, log_std_init):
            super().__init__(width, hidden, log_std_init)
            usual = 1 / math.sqrt(3 * inputs)  # std of nn.Linear's uniform weights
            with torch.no_grad():
                self.fusion.scalars.weight[:, 0] *= usual / 0.5

    return patch.object(tqc, "Actor", DimActor)


@contextlib.contextmanager
def wrapped(settings: dict) -> Iterator[list[str]]:
    """The wraps of these settings around what it holds; gives the other settings as flags."""
    flags = dict(settings)
    std = flags.pop("reward_std", 1.0)
    inputs = flags.get("window", 64) * flags.get("d_model", 256)
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(tqc, "load_market", cached_market))
        stack.enter_context(scaled_rewards(std))
        if flags.pop("one_matrix", False):
            stack.enter_context(noise_of_a_batch())
        if flags.pop("dim_position", False):
            stack.enter_context(dim_position(inputs))
        yield list(map(as_flag, flags.items()))


def as_flag(item: tuple) -> str:
    name, value = item
    if isinstance(value, bool):
        return flag(name) if value else flag(f"no_{name}")
    return f"{flag(name)}={value}"


def cached_market(args, *_):
    """The rival and the optimum are computed once a market, not once a run."""
    a = args
    key = a.data, a.split, a.window, a.seed, a.hmm, a.screen, a.forecast, a.funding_bps, a.costs
    if key not in MARKETS:
        MARKETS[key] = load_market(args)
    return MARKETS[key]


MARKETS = {}
load_market = tqc.load_market


# -------------------------------------------------------------------------------------------- runs
def one_run(cell: Cell, seed: int, settings: dict) -> dict:
    """A line of runs.csv."""
    began = time.monotonic()
    measure = peer_run if cell.table == "peer" else script_run
    row = {"cell": cell.name, "seed": seed} | measure(cell, settings)
    row["seconds"] = time.monotonic() - began
    return row | {"settings": json.dumps(settings, sort_keys=True)}


def script_run(cell: Cell, settings: dict) -> dict:
    """tqc_film_batch.py with these settings."""
    quiet = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, wrapped(settings) as flags, quiet:
        summary = tqc.main([*flags, f"--run-dir={folder}/run"])
        trace = pd.read_parquet(f"{folder}/run/traces/test.parquet")
    test, audit = summary["eval"]["test"], summary["audit"]
    same = "state_dependence saturation alpha entropy alpha_entropy sigma verdict".split()
    return {
        "score": test["agent"]["score"],
        "grid_score": test["critic_grid"]["score"],
        "actor_score": test["actor"]["score"],
        "train_score": summary["eval"]["train"]["agent"]["score"],
        "size": trace["position"].abs().mean(),
        "spread": trace["q_spread"].mean(),
        "attribution": audit["attribution_technical"],
        "attribution_position": audit["attribution_position"],
        **{name: audit[name] for name in same},
        "updates": summary["updates"],
        "transitions": summary["global_step"],
        "samples_per_transition": summary["samples_per_transition"],
    }


def peer_run(cell: Cell, settings: dict) -> dict:
    """sb3-contrib's TQC on gymnasium's Market-v0, its policy and its losses untouched."""
    from scripts.benchmark import PeerLanes, sb3_contrib

    s = settings
    updates = s["total_timesteps"] // LANES - IDLE + 1
    lanes = s["num_envs"] if cell.name == "peer_earlier" else 1
    torch.manual_seed(s["seed"])
    torch.set_num_threads(1)
    flags = {name: s[name] for name in ("data", "window", "seed")}
    market = cached_market(tqc.Args(**flags, forecast=False))
    with patch.object(tqc, "load_market", lambda *_: market):
        env = gym.make_vec(
            "cleanrl_crypto/Market-v0", num_envs=lanes, data=s["data"], seed=s["seed"]
        )
    full = np.log1p(market.ret[slice(*market.rows["train"])])
    policy = {}
    options = {"learning_starts": 100, "buffer_size": updates + 100}
    scale = 1.0
    if cell.name == "peer_earlier":
        scale = s["reward_std"] / full.std()
        policy = {"net_arch": [s["hidden"]] * 2, "log_std_init": s["log_std_init"]}
        options = {
            "learning_starts": s["learning_starts"],
            "buffer_size": min(PEER_BUFFER, s["total_timesteps"]),
            "use_sde": True,
            "learning_rate": lambda left: s["learning_rate"] * left,
        }
        for name in PEER_SAME:
            options[name] = s[name]
    peer = sb3_contrib.TQC(
        "MultiInputPolicy",
        scaled_lanes(PeerLanes, env, scale),
        policy_kwargs=policy,
        seed=s["seed"],
        device="cpu",
        **options,
    )
    peer.learn(options["learning_starts"] + updates * lanes)
    row = peer_measures(peer, market)
    env.close()
    steps = peer.num_timesteps
    drawn = peer._n_updates * peer.batch_size / steps
    counts = {"transitions": steps, "samples_per_transition": drawn}
    return row | counts | {"updates": peer._n_updates, "verdict": ""}


def scaled_lanes(lanes, env, scale: float):
    """benchmark.py's PeerLanes without a forecast and with rewards times `scale`."""

    class ScaledLanes(lanes):
        def shown(self, obs):
            return obs | {"forecast": np.zeros((self.num_envs, 1), np.float32)}

        def step_wait(self):
            obs, reward, done, infos = super().step_wait()
            return obs, scale * reward, done, infos

    return ScaledLanes(env)


@torch.no_grad()
def peer_measures(peer, market) -> dict:
    """What script_run() takes from a summary, of the peer's policy."""
    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice(np.arange(*market.rows["eval"]), 256))
    position = rng.uniform(-1, 1, (256, 1))
    mix = rng.permutation(256)
    there = observed(market, rows, position)
    greedy = peer.predict(there, deterministic=True)[0]
    fixed = []
    for p in (-1.0, 0.0, 1.0):
        held = observed(market, rows, np.full((256, 1), p))
        fixed.append(peer.predict(held, deterministic=True)[0].std())
    moved = {}
    for what, other in (("market", rows[mix]), ("position", rows)):
        held = position[mix] if what == "position" else position
        action = peer.predict(observed(market, other, held), deterministic=True)[0]
        moved[what] = np.abs(action - greedy).mean()

    tensors = peer.policy.obs_to_tensor(there)[0]
    if peer.use_sde:
        peer.actor.reset_noise(256)
    entropy = -float(peer.actor.action_log_prob(tensors)[1].mean())
    alpha = float(peer.log_ent_coef.exp())
    values = []
    for a in tqc.LEVELS:
        action = torch.full((256, 1), float(a))
        values.append(peer.critic(tensors, action).mean((1, 2)))
    values = torch.stack(values, 1)

    path = peer_path(peer, market)
    start, stop = market.rows["test"]
    best = tqc.fixed_paths(market, start, stop)["optimum"]
    earned, most = (market.walk(x, start, stop)[1].mean() for x in (path, best))
    return {
        "score": earned / most,
        "actor_score": earned / most,
        "size": np.abs(path).mean(),
        "spread": float((values.amax(1) - values.amin(1)).mean()),
        "attribution": moved["market"],
        "attribution_position": moved["position"],
        "state_dependence": np.mean(fixed),
        "saturation": (np.abs(greedy) > 0.98).mean(),
        "alpha": alpha,
        "entropy": entropy,
        "alpha_entropy": alpha * abs(entropy),
    }


def observed(market, rows, position) -> dict:
    """The environment's observation at these rows (B,), positions (B, 1), w_cost 0."""
    windows = market.table[rows[:, None] + np.arange(1 - market.window, 1)]
    zeros = np.zeros((len(rows), 1), np.float32)
    position = position.astype(np.float32)
    return {"market": windows, "position": position, "w_cost": zeros, "forecast": zeros}


def peer_path(peer, market) -> np.ndarray:
    """Exposures (n,) along the test rows, flat before the first."""
    rows = np.arange(*market.rows["test"])
    path = np.zeros(len(rows))
    held = 0.0
    for t in range(len(rows)):
        obs = observed(market, rows[t : t + 1], np.full((1, 1), held))
        held = float(peer.predict(obs, deterministic=True)[0][0, 0])
        path[t] = held
    return path


# ------------------------------------------------------------------------------------- runs.csv
def load_rows(path: Path) -> list[dict]:
    """Finished runs."""
    return list(csv.DictReader(io.StringIO(whole_lines(path))))


def whole_lines(path: Path) -> str:
    """Without the line that kill -9 tore."""
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1]


@contextlib.contextmanager
def locked(out: Path):
    """One process writes into a folder."""
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as e:
        raise UsageError(f"--out {out}: another process writes into it") from e
    with lock:
        yield


def append_row(path: Path, row: dict):
    """One flushed line; the first brings the heads."""
    cells = {name: row.get(name, "") for name in COLUMNS}
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(cells)
        file.flush()
        os.fsync(file.fileno())


def runs_left(cells: list[Cell], rows: list[dict], args: Args) -> list[tuple]:
    """(cell, seed, settings) without a line; a line of other settings is refused."""
    done = {(row["cell"], int(row["seed"])): row["settings"] for row in rows}
    left = []
    for seed in range(args.seeds):  # so that every cell has a first run early
        for cell in cells:
            settings = settings_of(cell, seed, args)
            there = done.get((cell.name, seed))
            here = json.dumps(settings, sort_keys=True)
            why = f"{args.out}/runs.csv: {cell.name}, seed {seed} has other settings: another --out"
            refuse((there not in (None, here), why))
            if there is None:
                left.append((cell, seed, settings))
    return left


def finished_runs(left: list[tuple], jobs: int) -> Iterator[dict]:
    """Lines in the order in which the runs end."""
    if jobs == 1:
        for run in left:
            yield one_run(*run)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as workers:
        futures = [workers.submit(one_run, *run) for run in left]
        for future in as_completed(futures):
            yield future.result()


def run_rest(cells: list[Cell], path: Path, args: Args):
    """Runs without a line in runs.csv, each of which brings one."""
    if path.exists():  # cut, never written again: that would put hours of runs at risk
        os.truncate(path, len(whole_lines(path).encode()))
    left = runs_left(cells, load_rows(path), args)
    for k, row in enumerate(finished_runs(left, args.jobs), 1):
        append_row(path, row)
        said = f"{row['cell']} seed {row['seed']}: score {row['score']:.3f}"
        print(f"{k}/{len(left)} {said}, {row['seconds']:.0f} s {row['verdict']}", flush=True)


# ---------------------------------------------------------------------------------------- results
def interval(values) -> tuple[float, float, float]:
    """Interquartile mean over seeds, and the ends of its 95 % bootstrap interval."""
    values = np.asarray(values, float)
    middle = functools.partial(trim_mean, proportiontocut=0.25)
    mean = float(middle(values))
    if not np.ptp(values) > 0:  # one value, all alike, or one that is not a number
        return mean, mean, mean
    how = {"n_resamples": DRAWS, "method": "percentile", "rng": 0}
    found = bootstrap((values,), middle, **how).confidence_interval
    return mean, float(found.low), float(found.high)


def soft_size(ratio: float) -> float:
    """Mean exposure of the soft-optimal policy of a linear Q, whose spread over [-1, 1] is `ratio`
    alphas: Langevin's function."""
    x = max(ratio / 2, 1e-6)
    return 1 / math.tanh(x) - 1 / x if x > 1e-2 else x / 3


def summarise(rows: list[dict]) -> pd.DataFrame:
    """A line a cell: interquartile means, intervals of the score and of its difference from the
    table's first cell, seed by seed."""
    runs = pd.DataFrame(rows)
    texts = runs[["cell", "verdict", "settings"]]
    runs = runs.drop(columns=texts.columns).apply(pd.to_numeric, errors="coerce").join(texts)
    stds = [json.loads(text).get("reward_std", 1.0) for text in runs["settings"]]
    runs["spread_std"] = runs["spread"] / stds
    runs["entropy_share"] = runs["alpha_entropy"] / runs["spread"]
    ratios = runs["spread"] / runs["alpha"].clip(1e-9)
    runs["soft"] = [soft_size(x) for x in ratios]
    bases = {"ladder": "earlier", "entropy": "ladder_rows", "peer": "earlier"}
    out = []
    for cell in all_cells():
        own = runs[runs.cell == cell.name].set_index("seed")
        if own.empty:
            continue
        base = runs[runs.cell == bases.get(cell.table, cell.table)].set_index("seed")
        line = {"table": cell.table, "cell": cell.name, "text": cell.text, "runs": len(own)}
        line["score"], line["low"], line["high"] = interval(own["score"])
        apart = (own["score"] - base["score"]).dropna()
        if len(apart) and cell.name not in base["cell"].values:
            line["change"], line["change_low"], line["change_high"] = interval(apart)
        for name in MEASURED:
            line[name] = interval(own[name])[0]
        words = own["verdict"][own["verdict"] != ""].value_counts()
        line["verdicts"] = ", ".join(f"{n} {word}" for word, n in words.items())
        out.append(line)
    return pd.DataFrame(out)


def number(x, digits: int = 2) -> str:
    if x is None or not math.isfinite(x):
        return ""
    if abs(x) < 1e-4:
        return "0"
    text = f"{x:.{digits}f}" if abs(x) >= 0.1 else f"{x:.2g}"
    return text.replace("0.", ".", 1) if abs(x) < 1 else text


def markdown(table: pd.DataFrame) -> str:
    heads = {
        "text": "cell",
        "runs": "runs",
        "score": "score [95 %]",
        "change": "change [95 %]",
        **HEADS,
        "verdicts": "verdicts",
    }
    parts = []
    for name, title in TABLES.items():
        lines = table[table.table == name]
        if lines.empty:
            continue
        parts += [f"**{title[0].upper()}{title[1:]}**", ""]
        parts.append("| " + " | ".join(heads.values()) + " |")
        parts.append("| " + " | ".join(["---"] * len(heads)) + " |")
        for line in lines.to_dict("records"):
            cells = [line["text"], str(line["runs"])]
            cells.append(ranged(line, "score", "low", "high"))
            cells.append(ranged(line, "change", "change_low", "change_high"))
            cells += [number(line[key]) for key in HEADS]
            parts.append("| " + " | ".join([*cells, line["verdicts"]]) + " |")
        parts.append("")
    return "\n".join(parts)


def ranged(line: dict, *names: str) -> str:
    mean, low, high = (line.get(name, math.nan) for name in names)
    ends = f" [{number(low)}, {number(high)}]" if line["runs"] > 2 else ""
    return number(mean) + ends if math.isfinite(mean) else ""


def draw(table: pd.DataFrame, path: Path):
    """Scores with intervals, and beside them alpha and the spread of the values."""
    from matplotlib.figure import Figure

    from scripts.report import COLORS, GREY, INK

    height = 0.21 * (len(table) + 2 * table.table.nunique()) + 0.7
    figure = Figure((10, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    y = 0
    ticks = {}
    for name, title in TABLES.items():
        lines = table[table.table == name]
        if lines.empty:
            continue
        ticks[y] = title
        for line in lines.to_dict("records"):
            y -= 1
            ticks[y] = line["text"].replace("**", "")
            span = [line["low"], line["high"]]
            left.plot(span, [y, y], color=COLORS["agent"], lw=2, alpha=0.5)
            left.plot(line["score"], y, "o", color=COLORS["agent"], ms=5)
            left.plot(line["grid_score"], y, "o", mfc="none", color=COLORS["actor"], ms=5)
            alpha = max(line["alpha"], LEAST_ALPHA)
            right.plot([alpha, line["spread"]], [y, y], color=GREY, lw=2)
            right.plot(alpha, y, "|", color=COLORS["actor"], ms=9, mew=2)
            right.plot(line["spread"], y, "o", color=COLORS["optimum"], ms=5)
        y -= 2
    left.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    for label in left.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in TABLES.values() else "normal")
    left.axvline(0, color=INK, lw=0.8)
    left.set_xlabel("test score: what ships (filled), greedy on its critic (open)")
    right.set_xscale("log")
    right.set_xlabel("alpha (|), spread of the values (o)")
    for axes in (left, right):
        axes.grid(axis="x", color=GREY)
        axes.tick_params(labelsize=8)
        axes.xaxis.label.set_size(8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)


# ------------------------------------------------------------------------------------------- main
def main(argv: list[str] | None = None) -> dict:
    """Run what is left, then write tables and picture."""
    args, given = parse_args(Args, argv)
    if args.quick:
        args.bars, args.updates = 4000, 20
    cells = chosen_cells(args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "runs.csv"
    if not args.show:
        with locked(out):
            run_rest(cells, path, args)
    rows = load_rows(path)
    refuse((not rows, f"{path}: no finished run"))
    table = summarise(rows)
    table.to_csv(out / "table.csv", index=False, float_format="%.5g")
    (out / "table.md").write_text(markdown(table))
    draw(table, out / "picture.png")
    print(f"{out}: runs.csv, table.csv, table.md, picture.png")
    return {"runs": len(rows), "exit_code": 0}


if __name__ == "__main__":
    exit_with(main)
