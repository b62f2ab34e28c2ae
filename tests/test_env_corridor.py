"""The corridor: Gymnasium's contract, signals, demand, what is paid and seen, evaluation cases, baselines."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from cleanrl_crypto import ppo_arz_gpu as arz
from common import networks
from common.cli import UsageError
from common.gpu_pool import pool
from scripts import tune_arz

SHORT = dict(interval=15.0, seconds=90.0)


def make(n=2, **kwargs):
    env = arz.NetworkVectorEnv(n, **(SHORT | kwargs))
    env.reset(seed=4)
    return env


def actions(env, t=0):
    return (np.arange(env.num_envs)[:, None] + np.arange(env.agents) + t) % 2


def test_spaces_and_shapes():
    env = arz.NetworkVectorEnv(3, **SHORT)
    obs, info = env.reset(seed=0)
    assert obs.shape == (3, 5, env.row_obs) and obs in env.observation_space and info == {}
    assert isinstance(env, gym.vector.VectorEnv)
    assert env.metadata["autoreset_mode"] == gym.vector.AutoresetMode.SAME_STEP
    obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
    assert obs in env.observation_space and reward.shape == terminated.shape == truncated.shape == (3,)
    rows, reward, terminated, truncated = env.step_lanes(np.zeros((15, 1), np.int64))
    assert rows.shape == (15, env.row_obs) and reward.shape == truncated.shape == (15,)
    for wrong in (np.full((3, 5), 2), np.full((3, 5), -1), np.zeros((3, 4), int)):
        with pytest.raises(ValueError, match="actions must be"):
            env.step(wrong)


def test_made_by_gymnasium():
    env = gym.make_vec("cleanrl_crypto/Network-v0", num_envs=3, interval=5.0, seconds=50.0, level=(1.0, 1.3))
    ours = arz.NetworkVectorEnv(3, interval=5.0, seconds=50.0, level=(1.0, 1.3))
    np.testing.assert_array_equal(env.reset(seed=3)[0], ours.reset(seed=3)[0])
    chosen = env.action_space.sample()
    for got, expected in zip(env.step(chosen)[:4], ours.step(chosen)[:4]):
        np.testing.assert_array_equal(got, expected)


def test_episodes_end_at_their_length_and_the_next_begins_at_once():
    env = make()
    longer = make(seconds=180.0)
    for t in range(env.length):
        obs, reward, terminated, truncated, info = env.step(actions(env, t))
        true = longer.step(actions(env, t))[0]
        assert not terminated.any() and truncated.all() == truncated.any() == (t == env.length - 1)
    assert env.length == 6
    np.testing.assert_array_equal(np.stack(info["final_obs"]), true)
    np.testing.assert_array_equal(env.final_obs, true.reshape(10, -1))
    assert (info["final_info"]["episode"]["l"] == 6).all() and (obs != true).any()
    fresh = arz.NetworkVectorEnv(2, **SHORT)
    fresh.reset(seed=4)
    np.testing.assert_array_equal(obs, fresh.reset()[0])  # the second episode of the same lanes


def test_reward_is_minus_the_delay():
    env = make(n=3)
    total, rows = np.zeros(3), []
    for t in range(env.length):
        before = env.episode[0].copy()
        _, reward, _, done = env.step_lanes(actions(env, t))
        rows.append(reward.copy())
        total += reward.reshape(3, 5).sum(1)
        if t < env.length - 1:
            assert reward.reshape(3, 5).sum(1) == pytest.approx(before - env.episode[0])
    stats = env.final_stats
    assert stats["episode_return"] == pytest.approx(total) and (stats["delay_veh_s"] == -stats["episode_return"]).all()
    assert (stats["throughput_veh"] > 20).all() and (stats["mean_speed"] > 1).all() and (stats["mean_speed"] < 14).all()
    assert len(np.unique(np.round(rows, 3))) > 80
    for team in (0.0, 0.4, 1.0):
        assert arz.NetworkVectorEnv(1, team=team, **SHORT).pay.sum(0) == pytest.approx(1.0)


def test_delay_is_the_integral_of_the_density_that_does_not_move():
    """One junction shut for good and nothing relaxing away: everybody stands, so delay is vehicles times seconds."""
    env = make(n=1, seconds=600.0, slow=(1.0, 1.0), jitter=0.0, dtype="float64")
    for _ in range(30):
        env.step_lanes(np.zeros((5, 1), int))
    s = env.network.ends.index(("N1", "J1"))
    inside = (env.counts()[s, 0] + env.queue[:, env.network.entry[s], 0].sum())
    env.step_lanes(np.zeros((5, 1), int))
    after = (env.counts()[s, 0] + env.queue[:, env.network.entry[s], 0].sum())
    assert after > inside > 40
    assert env.sums[0, s, 0] == pytest.approx(15 * (inside + after) / 2, rel=0.02)


def test_two_actions_give_two_states_and_a_constant_one_changes_the_observation():
    a, b = make(), make()
    first = a.step_lanes(np.zeros((10, 1), int))[0].copy()
    other = b.step_lanes(np.eye(10, dtype=int)[:, :1])[0].copy()  # one junction of lane 0
    assert (first[0] != other[0]).any() and np.array_equal(first[5:], other[5:])
    assert (a.u[:, :, 0] != b.u[:, :, 0]).any() and np.array_equal(a.u[:, :, 1], b.u[:, :, 1])
    second = a.step_lanes(np.zeros((10, 1), int))[0]
    assert (first != second).any(1).all()


def test_seeds():
    obs = [arz.NetworkVectorEnv(4, **SHORT).reset(seed=s)[0] for s in (1, 1, 2)]
    np.testing.assert_array_equal(obs[0], obs[1])
    assert (obs[0] != obs[2]).any() and (obs[0][0] != obs[0][1]).any()


def test_reset_builds_nothing():
    env = make()
    builds, before = arz.NetworkVectorEnv.builds, pool.stats()
    for _ in range(3):
        env.reset()
        for t in range(7):
            env.step_lanes(actions(env, t))
    assert arz.NetworkVectorEnv.builds == builds and pool.stats()["allocations"] == before["allocations"]
    env.close()
    arz.NetworkVectorEnv(2, **SHORT)
    assert pool.stats()["allocations"] == before["allocations"]


def test_minimum_green_and_all_red():
    env = make(n=1, interval=1.0, seconds=120.0, all_red=4.0, min_green=6.0)
    rng, phase, changed, gap = np.random.default_rng(0), env.phase.copy(), {}, []
    for t in range(119):
        env.step_lanes(rng.integers(0, 2, (5, 1)))
        for g in np.flatnonzero((env.phase != phase)[:, 0]):
            gap.append(t - changed.get(g, -100))
            changed[g] = t
        phase = env.phase.copy()
    assert min(gap) == 10 and len(gap) > 20


def test_all_red_shuts_every_approach():
    env = make(n=1, interval=1.0, seconds=60.0, all_red=4.0, min_green=0.0, fill=0.3, dtype="float64")
    net = env.network
    arms = [s for s, (a, _) in enumerate(net.ends) if a == "J3"]
    moved = []
    for t in range(20):
        before = env.u.copy()
        env.step_lanes(np.full((5, 1), 1 if t >= 10 else 0))
        cells = [net.first[s] for s in arms]
        rest = [np.arange(net.first[s], net.first[s + 1]) for s in arms]
        stored = sum((env.u[:2, r] - before[:2, r]).sum() * net.par[s, networks.CELL] for r, s in zip(rest, arms))
        moved.append((stored, env.u[:2, cells].sum()))
    assert moved[13][1] < moved[9][1] * 0.7 and moved[16][1] > moved[13][1]


def test_demand_is_random_changes_within_an_episode_and_has_the_mean_it_should():
    level = 1.3
    factor = np.array([[[arz.demand_factor_nb(1, lane, 0, e, t, 0.4, 1.6, 0.5) for t in range(0, 450, 15)]
                        for e in range(4)] for lane in range(200)])
    assert factor.mean() == pytest.approx(1.0, abs=0.03) and factor.std(2).mean() > 0.1 and factor.min() > 0.19
    assert abs(np.corrcoef(factor[:, 0].mean(1), factor[:, 1].mean(1))[0, 1]) < 0.25
    env = make(n=200, seconds=450.0, level=(level, level))
    for t in range(env.length - 1):
        env.step_lanes(actions(env, t))
    expected = level * env.network.base.sum(1) * 435
    assert env.ledger[0].mean(1) == pytest.approx(expected, rel=0.03)


def test_inflow_really_enters_and_what_cannot_waits_outside():
    env = make(n=1, seconds=900.0, level=(3.0, 3.0), fill=0.0)
    for _ in range(50):
        env.step_lanes(np.zeros((5, 1), int))
    assert env.counts().sum() > 100 and env.queue.sum() > 100
    obs = env.step_lanes(np.zeros((5, 1), int))[0]
    assert obs[0].max() > 10  # the queue outside is seen


def test_a_state_can_be_put_back():
    env = make()
    for t in range(8):
        env.step_lanes(actions(env, t))
    state = {k: v.clone() if torch.is_tensor(v) else v for k, v in env.get_state().items()}
    ahead = [tuple(x.copy() for x in env.step_lanes(actions(env, t))) for t in range(6)]
    other = arz.NetworkVectorEnv(2, **SHORT)
    other.reset(seed=99)
    other.set_state(state)
    for t in range(6):
        for a, b in zip(other.step_lanes(actions(env, t)), ahead[t]):
            np.testing.assert_array_equal(a, b)


def test_staggered_lanes_end_at_different_times():
    env = make(n=60)
    env.reset(seed=4, options={"stagger": True})
    ends = [env.step_lanes(actions(env, t))[3].reshape(60, 5)[:, 0].copy() for t in range(6)]
    assert (np.sum(ends, 0) == 1).all() and set(np.sum(ends, 1)) <= {9, 10, 11}
    again = [env.step_lanes(actions(env, t))[3].reshape(60, 5)[:, 0].copy() for t in range(6)]
    np.testing.assert_array_equal(ends, again)  # then every episode has its length
    env.reset(seed=4)
    assert not any(env.step_lanes(actions(env, t))[3].any() for t in range(5))


def test_evaluation_cases_are_fixed_paired_and_apart_from_training():
    env = arz.NetworkVectorEnv(15, cases="eval", **SHORT)
    obs = env.reset(seed=9)[0].copy()
    np.testing.assert_array_equal(obs, env.reset(seed=9)[0])
    low, high = env.splits["x1.0"], env.splits["x1.3"]
    np.testing.assert_array_equal(obs[low], obs[high])  # the same start, another demand
    assert next(iter(env.splits)) == "eval" and (env.levels[0, high] == 1.3).all() and (env.levels[0, low] == 1.0).all()
    assert [len(range(15)[lanes]) for lanes in env.splits.values()] == [3, 6, 6]
    assert set(env.levels[0, env.splits["eval"]]) == {1.0, 1.3}
    train = arz.NetworkVectorEnv(15, **SHORT).reset(seed=9)[0]
    assert not (train[:, None] == obs[None]).all((2, 3)).any()
    assert not (obs[env.splits["eval"], None] == obs[None, low]).all((2, 3)).any()
    with pytest.raises(ValueError, match="fifths"):
        arz.NetworkVectorEnv(12, cases="eval", **SHORT)


def test_flags_that_do_not_fit():
    with pytest.raises(ValueError, match="interval 7.0 s must divide"):
        arz.NetworkVectorEnv(1, interval=7.0, seconds=450.0)
    with pytest.raises(ValueError, match="all-red"):
        arz.NetworkVectorEnv(1, interval=3.0, seconds=450.0, all_red=4.0)
    with pytest.raises(KeyError):
        arz.NetworkVectorEnv(1, pressure="none", **SHORT)


def test_nan_is_found_and_named():
    env = make()
    s = env.network.ends.index(("J2", "J3"))
    env.u[0, env.network.first[s], 1] = np.nan
    with pytest.raises(FloatingPointError, match="lane 1, segment J2 > J3"):
        env.step_lanes(actions(env))


BASELINES = tuple(arz.CONTROLLERS)


@pytest.fixture(scope="module")
def delays():
    found, env = {}, arz.NetworkVectorEnv(8, interval=15.0, seconds=450.0)
    makers = env.baselines(env) | {"stuck": lambda env: lambda obs: np.zeros((env.num_envs * env.agents, 1), int)}
    for name, maker in makers.items():
        env.reset(seed=6)
        act = maker(env)
        for _ in range(env.length):
            asked = act(env.obs)
            assert asked.shape == (40, 1) and set(np.unique(asked)) <= {0, 1}
            env.step_lanes(asked)
        found[name] = env.final_stats["delay_veh_s"].mean()
    return found


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_serve_the_traffic(delays, name):
    assert delays[name] < 0.75 * delays["stuck"]


def test_fixed_cycle_keeps_its_times():
    env = make(n=1, interval=5.0, seconds=300.0)
    act = arz.fixed_cycle(env, 60.0, 0.5, 0.0)
    asked = []
    for _ in range(24):
        asked.append(act(None)[0, 0])
        env.step_lanes(act(None))
    assert asked == ([0] * 6 + [1] * 6) * 2


def test_actuated_leaves_an_empty_street():
    env = make(n=1, interval=5.0, seconds=300.0, fill=0.0)
    act = arz.actuated(env, 0.1, 40.0)
    env.zones[:] = 0.0
    env.zones[0, env.network.ends.index(("N2", "J2"))] = 0.5
    assert act(None)[:, 0].tolist() == [0, 1, 0, 0, 0]
    env.zones[0, env.network.ends.index(("J1", "J2"))] = 0.5
    assert act(None)[:, 0].tolist() == [0] * 5
    env.age[1] = 50.0
    assert act(None)[:, 0].tolist() == [0, 1, 0, 0, 0]


def test_a_lane_gets_the_constants_of_its_demand(monkeypatch):
    """Two levels in one environment ask for what each would ask for alone."""
    monkeypatch.setattr(arz, "TUNED", {
        1.0: {"fixed_cycle": {"cycle": 40.0, "share": 0.5, "speed": 0.0}},
        1.3: {"fixed_cycle": {"cycle": 80.0, "share": 0.75, "speed": 14.0}}})
    env = arz.NetworkVectorEnv(10, cases="eval", interval=5.0, seconds=300.0)
    env.reset(seed=1)
    mixed = env.baselines()["fixed_cycle"](env)
    alone = [arz.fixed_cycle(env, **row["fixed_cycle"]) for row in arz.TUNED.values()]
    differ = 0
    for _ in range(30):
        asked, one, other = (act(None).reshape(10, 5) for act in (mixed, *alone))
        high = env.levels[0] == 1.3
        np.testing.assert_array_equal(asked, np.where(high[:, None], other, one))
        differ += (one != other).sum()
        env.step_lanes(asked)
    assert differ > 100 and 0 < high.sum() < 10


# --------------------------------------------------------------------------------------------------- sanity
def test_sanity_passes_in_all_precisions_and_hands_the_environment_on():
    for dtype in ("float32", "float64"):
        env = arz.Junctions(3, interval=5.0, seconds=90.0, level=(1.0, 1.3), dtype=dtype)
        builds = arz.NetworkVectorEnv.builds
        arz.check_env(env, dtype, 1.0)
        assert arz.NetworkVectorEnv.builds == builds
        fresh = arz.Junctions(3, interval=5.0, seconds=90.0, level=(1.0, 1.3), dtype=dtype)
        np.testing.assert_array_equal(env.reset(seed=7)[0], fresh.reset(seed=7)[0])


class Deaf(arz.Junctions):
    def step_lanes(self, actions):
        return super().step_lanes(np.zeros_like(actions))


class Blind(arz.Junctions):
    def observe(self, lanes):
        return self.obs


class Endless(arz.Junctions):
    def step_lanes(self, actions):
        obs, reward, terminated, truncated = super().step_lanes(actions)
        return obs, reward, terminated, np.zeros_like(truncated)


class Short(arz.Junctions):
    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        self.clock[0] = 2
        return obs, info


class Leaky(arz.Junctions):
    def step_lanes(self, actions):
        self.u[:2, 100] = 0.0
        return super().step_lanes(actions)


class Slow(arz.Junctions):
    decision_interval = 15.0


class Empty(arz.Junctions):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        nobody = np.zeros_like(self.data[3])
        nobody.setflags(write=False)  # the same type: nothing is compiled again
        self.data = (*self.data[:3], nobody, *self.data[4:])


class Flat(arz.Junctions):
    def step_lanes(self, actions):
        obs, reward, *rest = super().step_lanes(actions)
        return obs, np.zeros_like(reward), *rest


@pytest.mark.parametrize("broken, words", [
    (Deaf, "two actions"), (Blind, "two actions"), (Endless, "truncated"), (Short, "no episode to end before"),
    (Leaky, "conserved"), (Slow, "--decision-interval"), (Empty, "inflow"), (Flat, "many values")])
def test_sanity_fails_with_what_it_saw(broken, words):
    env = broken(3, interval=5.0, seconds=90.0, dtype="float64")
    with pytest.raises(arz.SanityError, match=words) as error:
        arz.check_env(env, "float64", 1.0)
    assert "saw" in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------- agent
@pytest.mark.parametrize("norm_obs", [False, True])
def test_where_no_request_counts_the_agent_keeps_the_phase_and_learns_nothing(norm_obs):
    env = make(n=8, interval=5.0)
    torch.manual_seed(0)
    agent = arz.Agent(arz.agent_config(arz.Args(scenario="corridor", norm_obs=norm_obs), env) | {"choices": [2]})
    rng, seen = np.random.default_rng(0), []
    for _ in range(6):
        seen.append(env.step_lanes(rng.integers(0, 2, (40, 1)))[0].copy())
    free, phase = env.age.T.reshape(-1) >= 10, env.phase.T.reshape(-1)
    obs = torch.from_numpy(np.concatenate(seen))
    if norm_obs:
        arz.merge_stats(agent.obs_stats, torch.full((61,), 240.0), obs.mean(0), obs.var(0, unbiased=False) * 240)
        agent.update_obs()
    agent.actor[-1].weight.data *= 300  # far from a coin toss
    x = agent.normalise(obs[-40:])
    assert 5 < free.sum() < 35 and 0 < phase[~free].mean() < 1
    for noise in (None, torch.rand(40, 2)):
        asked = agent.act(x, noise)[:, 0].numpy()
        np.testing.assert_array_equal(asked[~free], phase[~free])
    assert (asked[free] != phase[free]).any()
    log_prob, entropy = agent.log_prob_entropy(x, torch.from_numpy(asked)[:, None])
    assert (log_prob[~free].abs() < 1e-6).all() and (entropy[~free] < 1e-6).all() and (entropy[free] > 1e-6).any()
    agent.log_prob_entropy(x[~free], 1 - torch.from_numpy(asked[~free])[:, None])[0].sum().backward()
    assert all((p.grad == 0).all() for p in agent.actor.parameters())
    agent.log_prob_entropy(x[free], torch.from_numpy(asked[free])[:, None])[0].sum().backward()
    assert any((p.grad != 0).any() for p in agent.actor.parameters())


# ----------------------------------------------------------------------------------------- whole runs, tuning
def test_a_run_of_the_command_line(tmp_path, capsys):
    flags = ("--scenario town2 --num-envs 4 --num-steps 10 --num-minibatches 2 --update-epochs 3 --total-timesteps 80 "
             "--eval-interval 40 --decision-interval 5 --episode-seconds 50 --no-report --torch-threads 1 --no-cuda")
    summary = arz.main([*flags.split(), "--run-dir", str(tmp_path / "run")])
    assert "sanity: the environment passed its checks" in capsys.readouterr().out
    assert summary["env_builds"] == 2 and summary["updates"] == 2 * 3 * 2 and summary["global_step"] == 80
    assert summary["samples_per_transition"] == 3 * 4  # epochs, junctions
    for split in ("eval", "x1.0", "x1.3"):
        rows = summary["eval"][split]
        assert set(rows["baselines"]) == set(arz.CONTROLLERS) and rows["agent"]["delay_veh_s"] > 0
    policy = arz.load_policy(tmp_path / "run" / "checkpoints" / "best.pt")
    env = arz.NetworkVectorEnv(2, "town2", interval=5.0, seconds=50.0)
    asked = policy(env.reset(seed=0)[0].reshape(8, -1))
    assert asked.shape == (8, 1) and set(asked[:, 0]) <= {0, 1}


def test_defaults_are_the_scenarios_own():
    road, net = arz.Args(), arz.Args(scenario="corridor")
    assert (road.num_envs, road.decision_interval, road.episode_seconds) == (1024, 1.0, 240.0)
    assert (net.decision_interval, net.episode_seconds) == (5.0, 450.0) and net.norm_reward and not road.norm_reward
    assert arz.Args(scenario="corridor", decision_interval=15.0).decision_interval == 15.0
    assert all(getattr(args, name) is not None for args in (road, net) for name in arz.DEFAULTS)


def test_tuning_finds_the_least_delay(monkeypatch, capsys):
    monkeypatch.setitem(tune_arz.GRIDS, "fixed_cycle", {"cycle": (30, 60, 33), "share": (0.6,), "speed": (0.0, 14.0)})
    flags = "--lanes 3 --levels 1.0 1.2 --seconds 150 --controllers fixed_cycle --seed 5"
    tuned = tune_arz.main(flags.split())
    assert list(tuned) == [1.0, 1.2]
    printed = capsys.readouterr().out
    for level, rows in tuned.items():
        env = arz.NetworkVectorEnv(3, interval=5.0, seconds=150.0, level=(level, level))
        delay = {}
        for cycle in (30, 60, 33):
            for speed in (0.0, 14.0):
                env.reset(seed=5)
                act = arz.fixed_cycle(env, cycle, 0.6, speed)
                for _ in range(env.length):
                    env.step_lanes(act(None))
                delay[cycle, speed] = env.final_stats["delay_veh_s"].mean()
        best = min(delay, key=delay.get)
        assert (rows["fixed_cycle"]["cycle"], rows["fixed_cycle"]["speed"]) == best
        assert f"{delay[best]:.1f}" in printed
    with pytest.raises(UsageError, match="must be one of"):
        tune_arz.main(["--controllers", "webstar"])


def test_the_constants_come_from_the_grids():
    for rows in arz.TUNED.values():
        for name, constants in rows.items():
            assert all(value in tune_arz.GRIDS[name][key] for key, value in constants.items())
