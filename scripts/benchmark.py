"""Speed of tqc_film_batch.py beside sb3-contrib's TQC with the same networks, in one process, in turns.

    python scripts/benchmark.py --out benchmark.json       # about ten minutes on 2 CPU cores
    python scripts/benchmark.py --quick                    # tiny sizes: shows that it runs

Ours is the script itself, run with flags that make it do the peer's work (batch of different rows,
one exposure a row, the actor's targets, no dropout), and once more with its defaults. Its rates are
read from its own log: seconds of its phases `learn` and `rollout` between two log points, without
what comes before the first. The peer is sb3-contrib's TQC as it is (its buffer, losses, optimisers
and loop); its policy holds copies of our networks, and its features extractor recomputes the frozen
encoder for every batch, as any of its users would have it, in float32, the only precision it knows.
The lasso's forecast, which ours keeps row by row, is a key of the peer's observation. Its first
vector step is left out. Order: ours, peer, ours; medians are shown.

Before the peer is timed, both sides compute the three losses of a first update on the same weights,
batch and noise: float32 must agree to 1e-4 and bf16 to 2e-2 (relative), and both must train the
same number of parameters. What ran is counted and checked; a wrong count is exit code 1. CPU only.
"""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import json
import sys
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common.run import answer_help, exit_with, parse_args  # noqa: E402

answer_help(__name__, __file__)

import gymnasium as gym  # noqa: E402
import numba as nb  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import nn  # noqa: E402

from scripts.machine import check, machine, need_peer, set_threads  # noqa: E402

need_peer("stable_baselines3", "sb3_contrib")
import sb3_contrib  # noqa: E402
import stable_baselines3  # noqa: E402
from sb3_contrib.tqc import policies  # noqa: E402
from stable_baselines3.common.buffers import DictReplayBuffer  # noqa: E402
from stable_baselines3.common.callbacks import BaseCallback  # noqa: E402
from stable_baselines3.common.logger import configure  # noqa: E402
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor  # noqa: E402
from stable_baselines3.common.type_aliases import DictReplayBufferSamples  # noqa: E402
from stable_baselines3.common.vec_env import VecEnv  # noqa: E402

from cleanrl_crypto import tqc_film_batch as tqc  # noqa: E402
from common.lanes import to_numpy  # noqa: E402
from common.timeout_guard import load_checkpoint, write_json_atomic  # noqa: E402

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # relative, of each loss of the first update
TIMED = ("time/learn", "time/rollout", "charts/updates", "global_step")  # keys of metrics.jsonl
# the first two in peers, the last in lane-steps a second
TARGETS = {"updates": 40.0, "transitions": 40.0, "without_observations": 20e6}
# the peer's work: different rows, one exposure each, the actor's next action in the target
SAME_WORK = {
    "policy": "actor",
    "segment": 1,
    "counterfactuals": 0,
    "updates_per_step": 1,
    "dropout": 0.0,
}
TINY = {"window": 8, "d_model": 16, "fusion_width": 32, "hidden": 16}
TARGET_ENTROPY = -1.0


@dataclass
class Args:
    # what is measured
    data: str = "synthetic:regime"
    """market to train on, as in tqc_film_batch.py"""
    num_envs: int = 1024
    """lanes"""
    batch_size: int = 512
    """rows an update, both sides"""
    intervals: int = 3
    """log intervals of ours that are measured, a run (one more is run first)"""
    interval_steps: int = 40
    """vector steps a log interval"""
    peer_updates: int = 3
    """updates, and vector steps, of the peer that are measured (one more of each is run first)"""
    env_steps: int = 20_000
    """vector steps of one measurement of the environment, a hundredth with observations"""

    # how
    threads: int | None = None
    """torch and numba threads of both sides (default: all cores)"""
    out: str | None = None
    """write everything to this file as JSON"""
    quick: bool = False
    """tiny networks, few steps: a test that it runs, its numbers mean nothing"""


# ------------------------------------------------------------- the peer: sb3-contrib's TQC
class Features(BaseFeaturesExtractor):
    """Frozen encoder, recomputed for every batch, then FiLM and fusion: copies of our modules."""

    def __init__(self, space, agent: tqc.Agent, encoder: tqc.CryptoMAE):
        super().__init__(space, agent.config["fusion_width"])
        self.columns, self.trains_market = encoder.embed.in_features, True
        self.encoder = deepcopy(encoder).requires_grad_(False)
        self.market = deepcopy(agent.extractor)
        self.fusion = deepcopy(agent.critic.fusion)

    def forward(self, obs):
        x = obs["market"]
        z = self.encoder.context(x[..., : self.columns])
        hmm = x[:, -1, self.columns :]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_market):
            market = self.market(z, hmm, obs["forecast"])
        return self.fusion(market, obs["position"], obs["w_cost"])[:, 0]


class PeerCritic(policies.Critic):
    """SB3's critic of Q(position, action): the value of the action, plus the cost of the trade."""

    agent: tqc.Agent
    reward_scale: torch.Tensor

    def forward(self, obs, action):
        features = self.extract_features(
            {**obs, "position": action}, self.features_extractor
        )
        quantiles = torch.stack([qf(features) for qf in self.q_networks], 1)  # (B, C, N)
        paid = self.trade_reward(obs["position"], action, obs["w_cost"])
        linear = self.slope * action * obs["forecast"]
        return quantiles + (linear + self.reward_scale * paid)[..., None]


class SoftLimit(nn.Module):
    """Of the actor's mean, as ours."""

    def forward(self, mean):
        return tqc.MEAN_LIMIT * (mean / tqc.MEAN_LIMIT).tanh()


class PeerPolicy(policies.TQCPolicy):
    """SB3's policy with our agent's weights. As in ours, the critic's loss alone trains the market
    encoding."""

    @property
    def agent(self) -> tqc.Agent:
        return self.features_extractor_kwargs["agent"]

    def make_critic(self, features_extractor=None):
        kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        # the action stands in the position's column of the fusion layer, not behind it
        kwargs["features_dim"] -= 1
        critic = PeerCritic(**kwargs)
        critic.trade_reward = self.agent.trade_reward
        critic.reward_scale = self.agent.reward_scale
        critic.slope = nn.Parameter(self.agent.critic.slope.detach().clone())
        return critic.to(self.device)

    def _build(self, lr_schedule):
        ours = self.agent
        self.actor, self.critic = self.make_actor(), self.make_critic()
        self.critic_target = self.make_critic()
        for peer, critic in (
            (self.critic, ours.critic),
            (self.critic_target, ours.target),
        ):
            copy_weights(peer.features_extractor.fusion, critic.fusion)
            peer.slope.data.copy_(critic.slope)
            for qf, net in zip(peer.q_networks, critic.nets, strict=True):
                copy_weights(qf, net)
        features = self.actor.features_extractor
        features.market = self.critic.features_extractor.market
        features.trains_market = False
        copy_weights(features.fusion, ours.actor.fusion)
        copy_weights(self.actor.latent_pi, ours.actor.latent)
        copy_weights(self.actor.mu[0], ours.actor.mu)
        self.actor.mu[1] = SoftLimit()
        self.actor.log_std.data.copy_(ours.actor.log_std.data[:, None])
        self.critic_target.set_training_mode(False)
        market = set(map(id, features.market.parameters()))
        for net, without in ((self.actor, market), (self.critic, set())):
            trained = [p for p in net.parameters() if p.requires_grad]
            trained = [p for p in trained if id(p) not in without]
            rate = lr_schedule(1)
            net.optimizer = self.optimizer_class(trained, lr=rate, **self.optimizer_kwargs)


def copy_weights(to: nn.Module, source: nn.Module):
    to.load_state_dict(source.state_dict())


class PeerLanes(VecEnv):
    """Our environment behind SB3's interface, with the forecast that our agent reads in the
    observation; nothing is copied that SB3 does not ask for."""

    def __init__(self, env: tqc.MarketVectorEnv):
        self.env = env
        self.forecast = env.market.forecast.astype(np.float32)
        forecast = gym.spaces.Box(-np.inf, np.inf, (1,))
        space = gym.spaces.Dict({**env.single_observation_space, "forecast": forecast})
        super().__init__(env.num_envs, space, env.single_action_space)

    def reset(self):
        return self.shown(self.env.reset(seed=1)[0])

    def shown(self, obs: dict) -> dict:
        row = self.env.state[tqc.ROW].long()
        return obs | {"forecast": self.forecast[row][:, None]}

    def step_async(self, actions):
        self.actions = actions

    def step_wait(self):
        obs, reward, terminated, truncated, info = self.env.step(self.actions)
        infos = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(terminated | truncated):
            row = int(self.env.last[tqc.ROW, i])
            infos[i] = {
                "terminal_observation": info["final_obs"][i]
                | {"forecast": self.forecast[row : row + 1]},
                "TimeLimit.truncated": bool(truncated[i]),
            }
        return self.shown(obs), reward, terminated | truncated, infos

    def close(self):
        self.env.close()

    def get_attr(self, name, indices=None):
        return [getattr(self.env, name)] * self.num_envs

    def set_attr(self, name, value, indices=None):
        raise NotImplementedError("the lanes share one environment")

    def env_method(self, name, *args, indices=None, **kwargs):
        raise NotImplementedError("the lanes share one environment")

    def env_is_wrapped(self, wrapper_class, indices=None):
        return [False] * self.num_envs


class InOrder(DictReplayBuffer):
    """sample() is the first vector step, lane by lane: a batch that the other side gets too."""

    def sample(self, batch_size, env=None):
        def first(x):
            return self.to_torch(x[0, :batch_size])

        dones = self.dones * (1 - self.timeouts)  # as SB3: a time limit bootstraps
        return DictReplayBufferSamples(
            observations={k: first(v) for k, v in self.observations.items()},
            actions=first(self.actions),
            next_observations={k: first(v) for k, v in self.next_observations.items()},
            dones=first(dones)[:, None],
            rewards=first(self.rewards)[:, None],
        )


def make_peer(agent, encoder, env, batch_size: int, buffer=DictReplayBuffer):
    """sb3-contrib's TQC on `env`, every network a copy of ours."""
    c = agent.config
    networks = {
        "features_extractor_class": Features,
        "features_extractor_kwargs": {"agent": agent, "encoder": encoder},
        "net_arch": [c["hidden"]] * 2,
        "activation_fn": nn.ReLU,
        "log_std_init": c["log_std_init"],
        "clip_mean": tqc.MEAN_LIMIT,  # SB3's is hard: PeerPolicy makes it soft
        "n_quantiles": c["n_quantiles"],
        "n_critics": c["n_critics"],
    }
    peer = sb3_contrib.TQC(
        PeerPolicy,
        PeerLanes(env),
        learning_rate=1e-3,
        buffer_size=4 * env.num_envs,
        learning_starts=0,
        batch_size=batch_size,
        tau=0.05,
        gamma=c["gamma"],
        train_freq=1,
        gradient_steps=1,
        ent_coef="auto_0.5",
        target_entropy=TARGET_ENTROPY,
        top_quantiles_to_drop_per_net=0,
        use_sde=True,
        sde_sample_freq=64,
        replay_buffer_class=buffer,
        policy_kwargs=networks,
        device="cpu",
        seed=1,
    )
    peer.set_logger(configure(None, []))
    return peer


# ---------------------------------------------------------------- the same problem on both sides
def peer_losses(peer, batch_size: int) -> dict[str, float]:
    """One update by SB3's own train(); the losses that it logs, from the weights before a step."""
    for optimizer in optimizers_of(peer):
        optimizer.step = lambda *args: None
    peer.train(gradient_steps=1, batch_size=batch_size)
    names = ("critic_loss", "actor_loss", "ent_coef_loss")
    return {k: float(peer.logger.name_to_value[f"train/{k}"]) for k in names}


def sde_noise(actor, matrix, market, position, w_cost) -> torch.Tensor:
    """xi (B, 1) with std * xi = latent @ matrix: SB3's one noise matrix a batch, as ours takes it."""
    _, latent = actor(market, position, w_cost)
    return (latent @ matrix)[..., 0] / tqc.gsde_std(latent, actor.log_std)


@torch.no_grad()
def noises(agent, contexts, batch, matrix) -> tuple[torch.Tensor, torch.Tensor]:
    """SB3's noise (hidden, 1) at every row and at the next one."""
    rows, before, after, w_cost = batch
    latents = tqc.encode_stretches(agent.extractor, contexts, rows)
    _, held = hold(agent, contexts, rows, after)
    both = zip(latents, (before, held))
    actor = agent.actor
    return tuple(sde_noise(actor, matrix, z, p, w_cost) for z, p in both)


def hold(agent, contexts, rows, after):
    """Growth and next exposure of the bars that the first of `rows` (n, 2) earn."""
    bar = rows[:, :1]
    return tqc.hold(after, contexts.ret[bar], contexts.funding[bar], agent.costs[1])


@torch.no_grad()
def our_losses(agent, contexts, batch, noise, next_noise) -> dict[str, float]:
    """The losses of one update by the script's own functions."""
    c, scale = agent.config, agent.reward_scale
    rows, before, after, w_cost = batch
    growth, held = hold(agent, contexts, rows, after)
    lost = growth <= tqc.LOST
    with contexts.autocast():
        latents, following = tqc.encode_stretches(agent.extractor, contexts, rows)
        next_quantiles, next_log_prob = tqc.sampled_next(
            agent, following, held, w_cost, scale, next_noise
        )
        target = tqc.tqc_target(
            next_quantiles,
            (scale * growth.log()).flatten(),
            lost.float().flatten(),
            c["gamma"],
            agent.alpha,
            next_log_prob,
            0,
        )
        quantiles = agent.critic(latents, after, w_cost).flatten(0, 1)
        pi, log_prob, _ = tqc.sample_action(agent.actor, latents, before, w_cost, noise)
        q = tqc.action_values(agent, latents, before, w_cost, pi)
        losses = {
            "critic_loss": tqc.quantile_huber_loss(quantiles, target),
            "actor_loss": (agent.alpha * log_prob - q).mean(),
            "ent_coef_loss": -(agent.log_alpha * (log_prob + TARGET_ENTROPY)).mean(),
        }
    return {k: v.item() for k, v in losses.items()}


def one_step(peer, env, action: np.ndarray, scale: float) -> tuple:
    """Step all lanes once, give the transitions to the peer's buffer; as our Replay draws them."""
    row = env.state[tqc.ROW].long()
    before, w_cost = env.state[[tqc.POSITION, tqc.W_COST], :, None].float()
    lanes = PeerLanes(env)
    obs = lanes.shown(to_numpy(env.observe()))
    next_obs, reward, done, infos = lanes.step(action)
    peer._last_obs = obs
    stored = scale * reward
    peer._store_transition(peer.replay_buffer, action, next_obs, stored, done, infos)
    after = torch.from_numpy(action)
    rows = torch.stack([row, row + 1], 1)
    return rows, before, after, w_cost


def compare(agent, encoder, market, args: Args, precisions) -> dict:
    """Trainable parameters and the losses of a first update, both sides."""
    rng, n = np.random.default_rng(0), args.batch_size
    env = tqc.MarketVectorEnv(market, market.rows["train"], tqc.Args(num_envs=n))
    env.reset(seed=0)
    env.state[tqc.POSITION] = torch.from_numpy(rng.uniform(-1, 1, n))
    peer = make_peer(agent, encoder, env, n, InOrder)
    parameters = {"ours": count(p for p in agent.parameters() if p.requires_grad)}
    groups = [g for o in optimizers_of(peer) for g in o.param_groups]
    parameters["peer"] = count(p for g in groups for p in g["params"])
    same = parameters["ours"] == parameters["peer"]
    check(same, f"trainable parameters differ: {parameters}")

    action = rng.uniform(-1, 1, (n, 1)).astype(np.float32)
    batch = one_step(peer, env, action, agent.reward_scale.item())
    env.close()
    theirs = peer_losses(peer, n)
    matrix = peer.actor.action_dist.exploration_mat.detach()
    # in float32, whatever the losses run in
    exact = tqc.Contexts(encoder, market, CPU, keep=False)
    noise = noises(agent, exact, batch, matrix)
    losses = {}
    for precision in precisions:
        contexts = tqc.Contexts(encoder, market, CPU, DTYPES[precision], keep=False)
        ours = our_losses(agent, contexts, batch, *noise)
        losses[precision] = rows = {}
        for name, peers in theirs.items():
            apart = abs(ours[name] - peers) / abs(peers)
            rows[name] = {"ours": ours[name], "peer": peers, "relative": apart}
            said = f"{name} in {precision}: {ours[name]:.6g}, the peer's {peers:.6g}"
            check(apart <= TOLERANCE[precision], f"{said}: too far apart")
    tolerance = {p: TOLERANCE[p] for p in precisions}
    return {
        "parameters": parameters,
        "rows": n,
        "forecast_std": exact.forecast[batch[0]].std().item(),
        "losses": losses,
        "tolerance": tolerance,
    }


def optimizers_of(peer) -> tuple:
    return peer.actor.optimizer, peer.critic.optimizer, peer.ent_coef_optimizer


def count(parameters) -> int:
    """Elements, each tensor once."""
    different = {id(p): p for p in parameters}
    return sum(p.numel() for p in different.values())


# --------------------------------------------------------------------------- what is measured
def run_ours(flags: dict, folder: Path, args: Args, threads: int) -> dict:
    """One run of the script; rates between its log points; its counts are checked."""
    flags = {
        "data": args.data,
        "num_envs": args.num_envs,
        "torch_threads": threads,
        "mae_steps": 0,
        "patience": 0,
        "eval_timeout": 1.0,
        "checkpoint_interval": 1e9,
        "run_dir": folder,
    } | flags
    if args.quick:
        flags |= TINY
    argv = [f"--{k.replace('_', '-')}={v}" for k, v in flags.items()]
    argv += ["--no-cuda", "--no-report"]
    with contextlib.redirect_stdout(io.StringIO()):
        summary = tqc.main(argv)
    check_counts(folder, summary)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    points = [row for row in map(json.loads, lines) if "time/learn" in row]
    check(len(points) >= 2, f"{folder.name} has {len(points)} log points")
    rates = {"updates": [], "transitions": []}
    for a, b in itertools.pairwise(points):
        between = {name: b[name] - a[name] for name in TIMED}
        learn, rollout, updates, steps = between.values()
        rates["updates"].append(updates / learn)
        rates["transitions"].append(steps / (learn + rollout))
    return {
        "flags": argv,
        "precision": summary["device"]["precision"],
        "updates": summary["updates"],
        "transitions": summary["global_step"],
        "rows": rows_of(summary),
        "updates_per_second": rates["updates"],
        "transitions_per_second": rates["transitions"],
    }


def rows_of(summary: dict) -> int:
    """Rows drawn for updates."""
    return round(summary["samples_per_transition"] * summary["global_step"])


def check_counts(folder: Path, summary: dict):
    """The run must have made the transitions and updates that its flags ask for."""
    used = json.loads((folder / "args.json").read_text())
    lanes, name = used["num_envs"], folder.name
    steps = used["total_timesteps"] // lanes
    idle = -(-used["learning_starts"] // lanes) - 1  # vector steps before the first update
    updates = (steps - idle) * used["updates_per_step"]
    check(summary["status"] == "finished", f"{name} ended as {summary['status']}")
    for what, value, expected in (
        ("transitions", summary["global_step"], steps * lanes),
        ("updates", summary["updates"], updates),
        ("rows", rows_of(summary), updates * used["batch_size"]),
    ):
        check(value == expected, f"{name}: {value} {what} instead of {expected}")


class Clock(BaseCallback):
    """Time of every vector step of the peer's learn()."""

    def _on_training_start(self):
        self.times = []

    def _on_step(self) -> bool:
        self.times.append(time.perf_counter())
        return True


def run_peer(agent, encoder, market, args: Args) -> dict:
    """Transitions a second of SB3's learn(), one update a vector step; updates of its train()."""
    sizes = tqc.Args(num_envs=args.num_envs)
    env = tqc.MarketVectorEnv(market, market.rows["train"], sizes)
    peer = make_peer(agent, encoder, env, args.batch_size)
    clock, n = Clock(), args.peer_updates
    peer.learn((n + 1) * args.num_envs, callback=clock)
    learned = list(np.diff(clock.times))
    seconds = []
    for _ in range(n):
        began = time.perf_counter()
        peer.train(gradient_steps=1, batch_size=args.batch_size)
        seconds.append(time.perf_counter() - began)
    env.close()
    updates, steps = peer._n_updates, peer.num_timesteps
    check(steps == (n + 1) * args.num_envs, f"the peer made {steps} transitions")
    check(updates == 2 * n + 1 and len(learned) == n, f"the peer made {updates} updates")
    features = peer.critic.features_extractor
    encoders = features.encoder.parameters(), encoder.parameters()
    frozen = all(torch.equal(a, b) for a, b in zip(*encoders, strict=True))
    check(frozen, "the peer's frozen encoder moved")
    still = torch.equal(features.market.market.weight, agent.extractor.market.weight)
    check(not still, "the peer did not learn")
    return {
        "updates": updates,
        "transitions": steps,
        "rows": updates * args.batch_size,
        "updates_per_second": [1 / s for s in seconds],
        "transitions_per_second": [args.num_envs / s for s in learned],
    }


def run_env(market, args: Args, observations: bool) -> dict:
    """Lane-steps a second under random actions. A second walk, counted, must end in the same
    state."""
    n, share = args.num_envs, 100 if observations else 1
    steps = max(args.env_steps // share, 2)
    env = tqc.MarketVectorEnv(market, market.rows["train"], tqc.Args(num_envs=n))
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (16, n, 1))
    tensors = torch.from_numpy(actions)
    rates = []
    for length in (min(steps, 100), steps, steps, steps):
        env.reset(seed=1)
        began = time.perf_counter()
        for t in range(length):
            if observations:
                env.step(actions[t % 16])
            else:
                env.step_lanes(tensors[t % 16])
        rates.append(length * n / (time.perf_counter() - began))
    end = env.state.clone()
    env.reset(seed=1)
    bars, traded = 0, torch.zeros(n, dtype=torch.bool)
    for t in range(steps):
        reward, terminated, truncated = env.step_lanes(tensors[t % 16])
        bars += int(env.last[tqc.CLOCK][terminated | truncated].sum())
        traded |= reward != 0
    bars += int(env.state[tqc.CLOCK].sum())
    check(torch.equal(end, env.state), "the same walk through the environment ended elsewhere")
    check(bars == steps * n, "the lanes' clocks do not add up to the steps made")
    check(bool(traded.all()), "a lane never traded")
    env.close()
    return {"lane_steps": 3 * steps * n, "lane_steps_per_second": rates[1:]}


# --------------------------------------------------------------------------------------- main
def shrink(args: Args):
    """--quick: sizes of a test."""
    args.num_envs, args.batch_size = 32, 16
    args.intervals, args.interval_steps = 2, 2
    args.peer_updates, args.env_steps = 2, 200
    if args.data == "synthetic:regime":
        args.data += "?bars=6000"


def main(argv: list[str] | None = None) -> dict:
    """Run everything, print the table, write --out; returns what it wrote."""
    args, _ = parse_args(Args, argv)
    if args.quick:
        shrink(args)
    threads = set_threads(args.threads)
    # without bf16 matrix instructions it would be emulated: slower than float32, and nobody runs it
    bf16 = tqc.has_bf16(CPU)
    precisions = ("fp32", "bf16") if bf16 or args.quick else ("fp32",)
    where = machine(threads, torch, np, nb, gym, stable_baselines3, sb3_contrib)
    where |= {"numba_threads": nb.get_num_threads(), "bf16_hardware": bf16}
    result = {
        "machine": where,
        "data": args.data,
        "num_envs": args.num_envs,
        "batch_size": args.batch_size,
        "quick": args.quick,
    }
    print(", ".join(f"{k} {v}" for k, v in where.items() if k != "versions"))
    versions = where["versions"].items()
    print(", ".join(f"{k} {v}" for k, v in versions), flush=True)
    with tempfile.TemporaryDirectory() as temp:
        measure(result, args, precisions, Path(temp))
    result["median"] = medians(result)
    show(result)
    if args.out:
        write_json_atomic(result, args.out)
        print(f"written: {args.out}")
    return result | {"exit_code": 0}


def measure(result: dict, args: Args, precisions, folder: Path):
    """Ours, the comparison, the peer, ours again, ours with its defaults, the environment."""
    threads, every = result["machine"]["threads"], args.num_envs * args.interval_steps
    same = SAME_WORK | {
        "batch_size": args.batch_size,
        "learning_starts": args.num_envs,
        "eval_interval": every,
        "total_timesteps": (args.intervals + 1) * every,
    }
    runs = result["ours"] = {p: [] for p in precisions}
    for p in precisions:
        flags = same | {"precision": p}
        runs[p].append(ours(f"{p}_first", flags, folder, args, threads))
    state = load_checkpoint(folder / "fp32_first" / "checkpoints" / "last.pt")
    config = state["config"]
    market = tqc.load_market(tqc.Args(data=args.data, window=config["window"]))
    encoder = tqc.build_encoder(config).eval().requires_grad_(False)
    encoder.load_state_dict(state["encoder"])
    torch.manual_seed(1)
    agent = tqc.Agent(config)
    for critic in (agent.critic, agent.target):  # at 0 the losses would not tell of the forecast
        critic.slope.data.fill_(0.3)
    contexts = tqc.Contexts(encoder, market, CPU, keep=False)
    agent.watch_rewards(contexts.full_reward[slice(*market.rows["train"])])
    print("the losses of both on the same weights and batch ...", flush=True)
    result["check"] = compare(agent, encoder, market, args, precisions)
    print("peer ...", flush=True)
    result["peer"] = run_peer(agent, encoder, market, args)
    for p in reversed(precisions):
        flags = same | {"precision": p}
        runs[p].append(ours(f"{p}_second", flags, folder, args, threads))
    start = args.num_envs * (2 if args.quick else 8)
    flags = {
        "learning_starts": start,
        "eval_interval": start,
        "total_timesteps": start * (args.intervals + 2),
    }
    result["defaults"] = ours("defaults", flags, folder, args, threads)
    print("environment ...", flush=True)
    result["environment"] = {
        "without_observations": run_env(market, args, False),
        "with_observations": run_env(market, args, True),
    }


def ours(name: str, flags: dict, folder: Path, args: Args, threads: int) -> dict:
    print(f"ours: {name} ...", flush=True)
    out = run_ours(flags, folder / name, args, threads)
    torch.use_deterministic_algorithms(False)  # the script's own choice, no part of the peer
    gc.collect()  # its embedding cache
    return out


def medians(result: dict) -> dict:
    """What the table shows: medians over all measured intervals of all runs."""
    out = {}
    for key in ("updates_per_second", "transitions_per_second"):
        peer = median(result["peer"][key])
        out[key] = {"peer": peer, "defaults": median(result["defaults"][key])}
        for precision, runs in result["ours"].items():
            rate = median(x for run in runs for x in run[key])
            out[key][precision] = rate
            out[key][f"ratio_{precision}"] = rate / peer
    env = result["environment"]
    rates = {k: median(v["lane_steps_per_second"]) for k, v in env.items()}
    return out | {"lane_steps_per_second": rates}


def show(result: dict):
    rates = result["median"]
    title = f"{result['data']}, {result['num_envs']} lanes, batch {result['batch_size']}"
    title += " (--quick: no measurement)" * result["quick"]
    table = Table("a second", "rate", "of the peer", "target", title=title)
    for what in ("updates", "transitions"):
        row = rates[f"{what}_per_second"]
        table.add_row(f"{what}, the peer", f"{row['peer']:.4g}", "1")
        for precision in result["ours"]:
            ratio = f"{row[f'ratio_{precision}']:.1f}"
            target = f">= {TARGETS[what]:g}"
            table.add_row(f"{what}, ours, {precision}", f"{row[precision]:.4g}", ratio, target)
        table.add_row(f"{what}, ours, defaults", f"{row['defaults']:.4g}")
    for name, rate in rates["lane_steps_per_second"].items():
        target = f">= {TARGETS[name]:.0e}" if name in TARGETS else ""
        table.add_row(f"lane-steps {name.replace('_', ' ')}", f"{rate:.3e}", "", target)
    Console(width=100).print(table)
    print(f"{result['check']['parameters']['ours']} trainable parameters on both sides")
    for precision, losses in result["check"]["losses"].items():
        apart = ", ".join(f"{k} {x['relative']:.1e}" for k, x in losses.items())
        print(f"{precision}: relative difference of a first update's {apart}")


if __name__ == "__main__":
    exit_with(main)
