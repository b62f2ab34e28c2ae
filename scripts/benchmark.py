"""Speed of tqc_film_batch.py beside sb3-contrib's TQC with the same networks: same machine, same process, in turns.

    python scripts/benchmark.py --out benchmark.json       # about ten minutes on 2 CPU cores
    python scripts/benchmark.py --quick                    # tiny sizes: shows that it runs, its numbers mean nothing

Ours is the script itself, run with flags that make it do the peer's work (batch of different rows, one exposure a
row, the actor's targets, no dropout), and once more with the defaults it ships with. Its rates are read from its own
log: seconds of its phases `learn` and `rollout` between two log points, what comes before the first one left out.
The peer is sb3-contrib's TQC as it is (its buffer, losses, optimisers and loop); its policy holds copies of our
networks, and its features extractor recomputes the frozen encoder for every batch, as any of its users would have
it, in float32, the only precision it knows. Its first vector step is left out. Order: ours, peer, ours; medians are
shown. Before the peer is timed, both sides compute the three losses of a first update on the same weights, batch and
noise: float32 must agree to 1e-4 and bf16 to 2e-2 (relative), and both must train the same number of parameters.
What ran is counted and checked; a wrong count ends the benchmark with exit code 1. CPU only.
"""
import contextlib
import gc
import io
import itertools
import json
import os
import sys
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import gymnasium as gym  # noqa: E402
import numba as nb  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import nn  # noqa: E402

try:
    import sb3_contrib
    import stable_baselines3
    from sb3_contrib.tqc import policies
    from stable_baselines3.common.buffers import DictReplayBuffer
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import configure
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
    from stable_baselines3.common.type_aliases import DictReplayBufferSamples
    from stable_baselines3.common.vec_env import VecEnv
except ImportError as e:
    sys.exit(f"scripts/benchmark.py: {e}: the peer comes with pip install -r requirements-test.txt")

from cleanrl_crypto import tqc_film_batch as tqc  # noqa: E402
from common.timeout_guard import load_checkpoint, write_json_atomic  # noqa: E402
from scripts.machine import check, machine  # noqa: E402

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # relative, of each loss of the first update
TARGETS = {"updates": 40.0, "transitions": 40.0, "without_observations": 20e6}  # the first two in peers
# the peer's work: different rows, one exposure each, the actor's next action in the target, no dropout
SAME_WORK = {"policy": "actor", "segment": 1, "counterfactuals": 0, "updates_per_step": 1, "dropout": 0.0}
TINY = {"window": 8, "d_model": 16, "n_heads": 2, "d_ff": 32, "fusion_width": 32, "hidden": 16}


@dataclass
class Args:
    data: str = "synthetic:regime"
    """market to train on, as in tqc_film_batch.py"""
    threads: int | None = None
    """torch and numba threads of both sides (None: all cores)"""
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
    """vector steps of one measurement of the environment, observations off (a hundredth of them with observations)"""
    out: Path | None = None
    """write everything to this file as JSON"""
    quick: bool = False
    """tiny networks, few steps: a test that it runs"""


# ------------------------------------------------------------------------------------- the peer: sb3-contrib's TQC
class Features(BaseFeaturesExtractor):
    """Frozen encoder, recomputed for every batch, then FiLM and fusion: copies of our modules."""

    def __init__(self, space, agent: tqc.Agent, encoder: tqc.CryptoMAE):
        super().__init__(space, agent.config["fusion_width"])
        self.columns, self.trains_market = encoder.embed.in_features, True
        self.encoder, self.market, self.fusion = (deepcopy(m) for m in (encoder, agent.extractor, agent.critic.fusion))
        self.encoder.requires_grad_(False)

    def forward(self, obs):
        x = obs["market"]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_market):
            market = self.market(self.encoder.context(x[..., : self.columns]), x[:, -1, self.columns :])
        return self.fusion(market, obs["position"], obs["w_cost"])[:, 0]


class PeerCritic(policies.Critic):
    """SB3's critic of Q(position, action): our afterstate's value at the action, plus the cost of getting there."""

    config: dict
    reward_scale: float

    def forward(self, obs, action):
        features = self.extract_features({**obs, "position": action}, self.features_extractor)
        quantiles = torch.stack([qf(features) for qf in self.q_networks], 1)  # (B, critics, quantiles)
        c, scale = self.config, self.reward_scale
        paid = tqc.trade_reward(obs["position"], action, c["cost"], c["penalty"] * obs["w_cost"], c["drift"])
        return quantiles + scale * paid[..., None]


class PeerPolicy(policies.TQCPolicy):
    """SB3's policy with our agent's weights. As in ours, the critic's loss alone trains the market encoding."""

    def make_critic(self, features_extractor=None):
        agent = self.features_extractor_kwargs["agent"]
        kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        kwargs["features_dim"] -= 1  # the action stands in the position's column of the fusion layer, not behind it
        critic = PeerCritic(**kwargs)
        critic.config, critic.reward_scale = agent.config, agent.reward_scale
        return critic.to(self.device)

    def _build(self, lr_schedule):
        agent = self.features_extractor_kwargs["agent"]
        self.actor, self.critic, self.critic_target = self.make_actor(), self.make_critic(), self.make_critic()
        for peer, ours in ((self.critic, agent.critic), (self.critic_target, agent.target)):
            peer.features_extractor.fusion.load_state_dict(ours.fusion.state_dict())
            for qf, net in zip(peer.q_networks, ours.nets, strict=True):
                qf.load_state_dict(net.state_dict())
        features = self.actor.features_extractor
        features.market, features.trains_market = self.critic.features_extractor.market, False
        features.fusion.load_state_dict(agent.actor.fusion.state_dict())
        self.actor.latent_pi.load_state_dict(agent.actor.latent.state_dict())
        self.actor.mu[0].load_state_dict(agent.actor.mu.state_dict())
        self.actor.log_std.data.copy_(agent.actor.log_std.data[:, None])
        self.critic_target.set_training_mode(False)
        market = set(map(id, features.market.parameters()))
        for net, without in ((self.actor, market), (self.critic, set())):
            trained = [p for p in net.parameters() if p.requires_grad and id(p) not in without]
            net.optimizer = self.optimizer_class(trained, lr=lr_schedule(1), **self.optimizer_kwargs)


class Lanes(VecEnv):
    """Our environment behind SB3's interface; nothing is copied that SB3 does not ask for."""

    def __init__(self, env: tqc.MarketVectorEnv):
        self.env = env
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self):
        return self.env.reset(seed=1)[0]

    def step_async(self, actions):
        self.actions = actions

    def step_wait(self):
        obs, reward, terminated, truncated, info = self.env.step(self.actions)
        infos = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(terminated | truncated):
            infos[i] = {"terminal_observation": info["final_obs"][i], "TimeLimit.truncated": bool(truncated[i])}
        return obs, reward, terminated | truncated, infos

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
    """sample() is the first vector step, lane by lane: a batch that the other side can be given too."""

    def sample(self, batch_size, env=None):
        def first(x):
            return self.to_torch(x[0, :batch_size])

        dones = self.dones * (1 - self.timeouts)  # as SB3: a time limit bootstraps
        return DictReplayBufferSamples(
            observations={k: first(v) for k, v in self.observations.items()}, actions=first(self.actions),
            next_observations={k: first(v) for k, v in self.next_observations.items()},
            dones=first(dones)[:, None], rewards=first(self.rewards)[:, None])


def make_peer(agent: tqc.Agent, encoder: tqc.CryptoMAE, env, batch_size: int, buffer=DictReplayBuffer):
    """sb3-contrib's TQC on `env`, every network a copy of ours."""
    c = agent.config
    networks = {
        "features_extractor_class": Features, "features_extractor_kwargs": {"agent": agent, "encoder": encoder},
        "net_arch": [c["hidden"]] * 2, "activation_fn": nn.ReLU, "log_std_init": c["log_std_init"],
        "n_quantiles": c["n_quantiles"], "n_critics": c["n_critics"]}
    peer = sb3_contrib.TQC(
        PeerPolicy, Lanes(env), learning_rate=1e-3, buffer_size=4 * env.num_envs, learning_starts=0,
        batch_size=batch_size, tau=0.05, gamma=c["gamma"], train_freq=1, gradient_steps=1, ent_coef="auto_0.5",
        target_entropy=-1.0, top_quantiles_to_drop_per_net=c["drop"], use_sde=True, sde_sample_freq=64,
        replay_buffer_class=buffer, policy_kwargs=networks, device="cpu", seed=1)
    peer.set_logger(configure(None, []))
    return peer


def peer_losses(peer: sb3_contrib.TQC, batch_size: int) -> dict[str, float]:
    """One update by SB3's own train(); the losses that it logs, all three from the weights before their steps."""
    peer.train(gradient_steps=1, batch_size=batch_size)
    return {k: float(peer.logger.name_to_value[f"train/{k}"]) for k in ("critic_loss", "actor_loss", "ent_coef_loss")}


def sde_noise(actor: tqc.Actor, matrix: torch.Tensor, market, position, w_cost) -> torch.Tensor:
    """xi (B,) with std * xi = latent @ matrix: SB3's one noise matrix a batch, as our losses take their noise."""
    with torch.no_grad():
        _, latent = actor(market, position, w_cost)
        return (latent @ matrix)[:, 0] / tqc.gsde_std(latent, actor.log_std)


def our_losses(agent: tqc.Agent, batch: tqc.Batch, rules: tuple, matrix, autocast=contextlib.nullcontext) -> dict:
    """The three losses of one update, from the script's own functions, under SB3's noise matrix (hidden, 1)."""
    funding, drift, *_ = rules
    with torch.no_grad():  # the noise in float32, whatever the losses run in
        every, w = agent.extractor(batch.z, batch.hmm), batch.w_cost[:, None]
        held = tqc.drift_position(batch.after, batch.ret[:, None], funding, drift)
        noise = sde_noise(agent.actor, matrix, every[batch.at], batch.position[:, None], w)
        next_noise = sde_noise(agent.actor, matrix, every[batch.next_at], held, w)
    with autocast():
        loss, market, _ = tqc.critic_loss(agent, batch, rules, agent.reward_scale, next_noise)
        policy_loss, log_prob, _ = tqc.actor_loss(agent, market, batch, rules, agent.reward_scale, noise)
    losses = {"critic_loss": loss, "actor_loss": policy_loss,
              "ent_coef_loss": tqc.ent_coef_loss(agent.log_alpha, log_prob, -1.0)}
    return {k: v.item() for k, v in losses.items()}


def store_step(peer: sb3_contrib.TQC, env: tqc.MarketVectorEnv, action: np.ndarray, scale: float) -> tuple:
    """Step all lanes once and give the transitions to the peer's buffer; returns what our replay holds of them."""
    lanes = Lanes(env)
    row, position, w_cost, cost = env.ints[0].copy(), *(env.floats[k].astype(np.float32) for k in (0, 1, 2))
    obs = env.observe(row, position, w_cost)
    next_obs, reward, done, infos = lanes.step(action[:, None])
    peer._last_obs = obs
    peer._store_transition(peer.replay_buffer, action[:, None], next_obs, scale * reward, done, infos)
    return row, position, w_cost, cost


def as_batch(encoder: tqc.CryptoMAE, market: tqc.Market, row, position, after, w_cost, cost) -> tqc.Batch:
    """Our batch of those transitions; after (n, K). The encoder's output is computed once for each different row."""
    contexts = tqc.Contexts(encoder, market, torch.device("cpu"), torch.float32, keep=False)
    different, at, next_at = tqc.shared_rows(row)
    z, hmm = contexts(different)
    floats = {"ret": market.ret[row], "position": position, "after": after, "w_cost": w_cost, "cost": cost}
    floats = {k: torch.from_numpy(np.asarray(v, np.float32)) for k, v in floats.items()}
    return tqc.Batch(z=z, hmm=hmm, n_drawn=len(np.unique(row)), at=at, next_at=next_at, **floats)


# ------------------------------------------------------------------------------------------------ what is measured
def run_ours(flags: dict, folder: Path, args: Args, threads: int) -> dict:
    """One run of the script; rates between its log points. It must have made the updates that were asked for."""
    tiny = TINY if args.quick else {}
    flags = tiny | {"data": args.data, "num_envs": args.num_envs, "torch_threads": threads, "mae_steps": 0,
                    "patience": 0, "eval_timeout": 1.0, "checkpoint_interval": 1e9, "run_dir": str(folder)} | flags
    argv = [f"--{k.replace('_', '-')}={v}" for k, v in flags.items()] + ["--no-cuda", "--no-report"]
    with contextlib.redirect_stdout(io.StringIO()):
        summary = tqc.main(argv)
    used = json.loads((folder / "args.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    points = [r for r in lines if "time/learn" in r]
    steps = used["total_timesteps"] // used["num_envs"]
    idle = -(-used["learning_starts"] // used["num_envs"]) - 1  # vector steps before the first with updates
    updates = (steps - idle) * used["updates_per_step"]
    made, rows = summary["updates"], round(summary["samples_per_transition"] * summary["global_step"])
    check(summary["status"] == "finished", f"{folder.name} ended as {summary['status']}")
    stepped = summary["global_step"]
    check(stepped == steps * used["num_envs"], f"{folder.name} made {stepped} transitions")
    check(made == updates, f"{folder.name} made {made} updates, {updates} were asked for")
    check(rows == updates * used["batch_size"], f"{folder.name} drew {rows} rows in {updates} updates")
    check(len(points) >= 2, f"{folder.name} has {len(points)} log points")
    rates = {"updates": [], "transitions": []}
    for a, b in itertools.pairwise(points):
        learn, rollout = (b[f"time/{k}"] - a[f"time/{k}"] for k in ("learn", "rollout"))
        rates["updates"].append((b["charts/updates"] - a["charts/updates"]) / learn)
        rates["transitions"].append((b["global_step"] - a["global_step"]) / (learn + rollout))
    return {"flags": argv, "precision": summary["device"]["precision"], "updates": updates,
            "transitions": stepped, "rows": rows, "updates_per_second": rates["updates"],
            "transitions_per_second": rates["transitions"]}


class Clock(BaseCallback):
    """Time of every vector step of the peer's learn()."""

    def _on_training_start(self):
        self.times = []

    def _on_step(self) -> bool:
        self.times.append(time.perf_counter())
        return True


def run_peer(agent, encoder, market, args: Args) -> dict:
    """Transitions a second of SB3's learn(), one update a vector step; then updates a second of its train()."""
    env = tqc.MarketVectorEnv(market, market.rows["train"], args.num_envs, seed=1)
    peer = make_peer(agent, encoder, env, args.batch_size)
    clock, n = Clock(), args.peer_updates
    peer.learn((n + 1) * args.num_envs, callback=clock)
    learned, seconds = list(np.diff(clock.times)), []
    check(peer.num_timesteps == (n + 1) * args.num_envs, f"the peer made {peer.num_timesteps} transitions")
    check(peer._n_updates == n + 1 and len(learned) == n, f"the peer made {peer._n_updates} updates while stepping")
    for _ in range(n):
        began = time.perf_counter()
        peer.train(gradient_steps=1, batch_size=args.batch_size)
        seconds.append(time.perf_counter() - began)
    check(peer._n_updates == 2 * n + 1, f"the peer made {peer._n_updates} updates")
    features = peer.critic.features_extractor
    pairs = zip(features.encoder.parameters(), encoder.parameters(), strict=True)
    check(all(torch.equal(a, b) for a, b in pairs), "the peer's frozen encoder moved")
    check(not torch.equal(features.market.market.weight, agent.extractor.market.weight), "the peer did not learn")
    env.close()
    return {"updates": 2 * n + 1, "transitions": peer.num_timesteps, "rows": (2 * n + 1) * args.batch_size,
            "updates_per_second": [1 / s for s in seconds],
            "transitions_per_second": [args.num_envs / s for s in learned]}


def compare(agent, encoder, market, args: Args, precisions) -> dict:
    """Trainable parameters and the losses of a first update, both sides, on the same weights, batch and noise."""
    rng, n = np.random.default_rng(0), args.batch_size
    env = tqc.MarketVectorEnv(market, market.rows["train"], n, seed=0)
    env.reset(seed=0)
    env.floats[0] = rng.uniform(-1, 1, n)
    peer = make_peer(agent, encoder, env, n, InOrder)
    action = rng.uniform(-1, 1, n).astype(np.float32)
    row, position, w_cost, cost = store_step(peer, env, action, agent.reward_scale)
    env.close()
    batch = as_batch(encoder, market, row, position, action[:, None], w_cost, cost)
    parameters = {"ours": count_parameters(p for p in agent.parameters() if p.requires_grad),
                  "peer": count_parameters(p for o in optimizers_of(peer) for g in o.param_groups for p in g["params"])}
    check(parameters["ours"] == parameters["peer"], f"trainable parameters differ: {parameters}")
    for o in optimizers_of(peer):
        o.step = lambda *args: None  # so that all three losses are of the same weights
    theirs = peer_losses(peer, n)
    matrix = peer.actor.action_dist.exploration_mat.detach()
    rules = (0.0, False, agent.config["penalty"], agent.config["gamma"], float("inf"))
    losses = {}
    for p in precisions:
        autocast = (lambda: torch.autocast("cpu", torch.bfloat16)) if p == "bf16" else contextlib.nullcontext
        mine = our_losses(agent, batch, rules, matrix, autocast)
        losses[p] = {k: {"ours": mine[k], "peer": v, "relative": abs(mine[k] - v) / abs(v)} for k, v in theirs.items()}
        for k, x in losses[p].items():
            check(x["relative"] <= TOLERANCE[p], f"{k} in {p}: {x['ours']:.6g}, the peer's {x['peer']:.6g}: more than "
                                                 f"{TOLERANCE[p]:g} apart")
    return {"parameters": parameters, "rows": n, "losses": losses, "tolerance": {p: TOLERANCE[p] for p in precisions}}


def optimizers_of(peer) -> tuple:
    return peer.actor.optimizer, peer.critic.optimizer, peer.ent_coef_optimizer


def count_parameters(parameters) -> int:
    """Elements, each tensor once."""
    return sum(p.numel() for p in {id(p): p for p in parameters}.values())


def run_env(market, args: Args, observations: bool) -> dict:
    """Lane-steps a second of the environment, random actions. A second, counted walk must end in the same state."""
    steps = max(args.env_steps // (100 if observations else 1), 2)
    env = tqc.MarketVectorEnv(market, market.rows["train"], args.num_envs, seed=1)
    actions = np.random.default_rng(0).uniform(-1, 1, (16, args.num_envs))
    step, rates = env.step if observations else env.step_lanes, []
    for n in (min(steps, 100), steps, steps, steps):
        env.reset(seed=1)
        began = time.perf_counter()
        for t in range(n):
            step(actions[t % 16])
        rates.append(n * args.num_envs / (time.perf_counter() - began))
    timed = env.ints.copy(), env.floats.copy()
    env.reset(seed=1)
    done, traded = 0, np.zeros(args.num_envs, bool)
    for t in range(steps):
        reward, terminated, truncated = env.step_lanes(actions[t % 16])
        done += int(env.final_ints[1][terminated | truncated].sum())
        traded |= reward != 0
    same = np.array_equal(timed[0], env.ints) and np.array_equal(timed[1], env.floats)
    check(same, "the same walk through the environment ended elsewhere")
    check(done + int(env.ints[1].sum()) == steps * args.num_envs, "the lanes' clocks do not add up to the steps made")
    check(bool(traded.all()), "a lane never traded")
    env.close()
    return {"lane_steps": 3 * steps * args.num_envs, "lane_steps_per_second": rates[1:]}


def main(argv: list[str] | None = None) -> dict:
    """Run everything, print the table, write --out; returns what it wrote."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    if args.quick:
        args.num_envs, args.batch_size, args.intervals, args.interval_steps = 32, 16, 2, 2
        args.peer_updates, args.env_steps = 2, 200
        args.data = "synthetic:regime?bars=3000" if args.data == "synthetic:regime" else args.data
    threads = args.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    nb.set_num_threads(min(threads, nb.config.NUMBA_NUM_THREADS))
    # without bf16 matrix instructions it would be emulated: slower than float32, and nobody runs it
    precisions = ("fp32", "bf16") if tqc.cpu_has_bf16() or args.quick else ("fp32",)
    where = machine(threads, torch, np, nb, gym, stable_baselines3, sb3_contrib) | {
        "numba_threads": nb.get_num_threads(), "bf16_hardware": tqc.cpu_has_bf16()}
    result = {"machine": where, "data": args.data, "num_envs": args.num_envs,
              "batch_size": args.batch_size, "quick": args.quick}
    print(", ".join(f"{k} {v}" for k, v in result["machine"].items() if k != "versions"))
    print(", ".join(f"{k} {v}" for k, v in result["machine"]["versions"].items()), flush=True)
    runs = {p: [] for p in precisions}
    every = args.num_envs * args.interval_steps
    same = SAME_WORK | {"batch_size": args.batch_size, "learning_starts": args.num_envs, "eval_interval": every,
                        "total_timesteps": (args.intervals + 1) * every}

    with tempfile.TemporaryDirectory() as temp:
        def ours(name: str, flags: dict) -> dict:
            print(f"ours: {name} ...", flush=True)
            out = run_ours(flags, Path(temp) / name, args, threads)
            torch.use_deterministic_algorithms(False)  # the script's own choice, no part of the peer
            gc.collect()  # its embedding cache
            return out

        for p in precisions:
            runs[p].append(ours(f"{p}_first", same | {"precision": p}))
        state = load_checkpoint(Path(temp) / "fp32_first" / "checkpoints" / "last.pt")
        config = state["config"]
        market = tqc.load_market(args.data, window=config["window"])
        encoder = tqc.build_encoder(config).eval().requires_grad_(False)
        encoder.load_state_dict(state["encoder"])
        torch.manual_seed(1)
        agent = tqc.Agent(config)
        agent.watch_rewards(np.log1p(market.ret[slice(*market.rows["train"])]))
        print("the losses of both on the same weights and batch ...", flush=True)
        result["check"] = compare(agent, encoder, market, args, precisions)
        print("peer ...", flush=True)
        result["peer"] = run_peer(agent, encoder, market, args)
        for p in reversed(precisions):
            runs[p].append(ours(f"{p}_second", same | {"precision": p}))
        result["ours"] = runs
        steps = 2 if args.quick else 8
        result["defaults"] = ours("defaults", {
            "learning_starts": args.num_envs * steps, "eval_interval": args.num_envs * steps,
            "total_timesteps": args.num_envs * steps * (args.intervals + 2)})
    print("environment ...", flush=True)
    result["environment"] = {"without_observations": run_env(market, args, False),
                             "with_observations": run_env(market, args, True)}
    result["median"] = medians(result)
    show(result)
    if args.out:
        write_json_atomic(result, args.out)
        print(f"written: {args.out}")
    return result


def medians(result: dict) -> dict:
    """What the table shows: medians over all measured intervals of all runs."""
    out = {}
    for key in ("updates_per_second", "transitions_per_second"):
        mine = {p: median(x for run in runs for x in run[key]) for p, runs in result["ours"].items()}
        peer = median(result["peer"][key])
        ratios = {f"ratio_{p}": v / peer for p, v in mine.items()}
        out[key] = {"peer": peer} | mine | ratios | {"defaults": median(result["defaults"][key])}
    env = result["environment"]
    out["lane_steps_per_second"] = {k: median(v["lane_steps_per_second"]) for k, v in env.items()}
    return out


def show(result: dict):
    precisions, median_of = list(result["ours"]), result["median"]
    title = f"{result['data']}, {result['num_envs']} lanes, batch {result['batch_size']}"
    table = Table(title=title + (" (--quick: no measurement)" if result["quick"] else ""))
    columns = ["a second", "peer", *(f"ours {p}" for p in precisions), *(f"{p} / peer" for p in precisions)]
    for name in [*columns, "target", "ours, defaults"]:
        table.add_column(name, justify="left" if name == "a second" else "right")
    for name in ("updates", "transitions"):
        m = median_of[f"{name}_per_second"]
        ours = [f"{m[p]:.4g}" for p in precisions] + [f"{m[f'ratio_{p}']:.1f}" for p in precisions]
        table.add_row(name, f"{m['peer']:.4g}", *ours, f">= {TARGETS[name]:g} x peer", f"{m['defaults']:.4g}")
    for name, value in median_of["lane_steps_per_second"].items():
        target = f">= {TARGETS[name]:.0e}" if name in TARGETS else ""
        blank = [""] * (2 * len(precisions) - 1)
        table.add_row(f"lane-steps {name.replace('_', ' ')}", "", f"{value:.3e}", *blank, target, "")
    Console(width=130).print(table)
    print(f"{result['check']['parameters']['ours']} trainable parameters on both sides")
    for p, losses in result["check"]["losses"].items():
        apart = ", ".join(f"{k} {x['relative']:.1e}" for k, x in losses.items())
        print(f"{p}: relative difference of a first update's {apart} (allowed {TOLERANCE[p]:g})")


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)
