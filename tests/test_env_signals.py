"""The signalised network: signals, demand, reward and sight, evaluation cases, baselines."""

import numpy as np
import pytest
import torch

from cleanrl_crypto import ppo_arz_signals as arz
from common import networks

SHORT = dict(interval=15.0, seconds=90.0)
CROSS = [  # a junction of four roads and four phases, one for each
    {"from": a, "to": b, "length_m": 100.0, "class": "secondary", "lanes": 1, "limit": None}
    for node in "NESW" for a, b in ((node, "J"), ("J", node))]

pytestmark = pytest.mark.usefixtures("one_thread")


def make(n=2, seed=4, **kwargs):
    envs = arz.NetworkVectorEnv(n, **(SHORT | kwargs))
    envs.reset(seed=seed)
    return envs


def actions(envs, t=0):
    lane = torch.arange(envs.num_envs)[:, None]
    return (lane + torch.arange(envs.agents) + t) % 2


def same(envs, phase=0):
    return torch.full((envs.num_envs, envs.agents), phase)


def crossing(**plan):
    phases = {"J": [[node] for node in "NESW"]}
    demand = {node: {"car": flow} for node, flow in zip("NESW", (375, 225, 300, 150))}
    return networks.build_network("cross", CROSS, {"signals": phases, "demand": demand} | plan)


@pytest.mark.parametrize("change, words", [
    (dict(interval=7.0, seconds=450.0), "interval 7.0 s must divide"),
    (dict(network=networks.build_network("x", CROSS, {"demand": {n: {"car": 9} for n in "NESW"}})), "no signal"),
    (dict(network=crossing(demand={n: {} for n in "NESW"})), "demand is 0 everywhere"),
    (dict(network=crossing(demand={n: {"car": [[0, 9], [1.5, 5]]} for n in "NESW"})), "changes at minute 1.5, after"),
    (dict(cases="eval", level=arz.LEVELS, num_envs=12), "fifths")])
def test_what_does_not_fit_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        arz.NetworkVectorEnv(**(SHORT | change))


def test_reward_is_minus_the_delay_of_all_junctions():
    envs, total = make(3), torch.zeros(3)
    for t in range(envs.length):
        before = envs.totals[arz.DELAY].clone()
        reward, _, _ = envs.step_lanes(actions(envs, t))
        total += reward
        assert torch.allclose(envs.local_reward.sum(1), reward)
        if t < envs.length - 1:
            assert torch.allclose(reward, before - envs.totals[arz.DELAY])
    stats = envs.stats("finals")
    assert torch.allclose(stats["episode_return"].float(), total)
    assert (stats["throughput_veh"] > 20).all() and ((1 < stats["mean_speed"]) & (stats["mean_speed"] < 14)).all()


def test_delay_is_the_integral_of_the_vehicles_that_stand():
    """A side street that is shut for good: everybody stands, so its delay is vehicles times seconds."""
    envs = make(1, seconds=600.0, level=(2.0, 2.0), variation=(1.0, 1.0, 0.0))
    for _ in range(30):
        envs.step_lanes(same(envs))
    net = envs.network
    s = net.ends.index(("N1", "J1"))

    def vehicles():
        return float(envs.counts()[s, 0] + envs.queue[:, net.entry[s], 0].sum())

    before = vehicles()
    envs.step_lanes(same(envs))
    assert vehicles() > before > 40
    assert float(envs.delay[s, 0]) == pytest.approx(15 * (before + vehicles()) / 2, rel=0.02)


def test_a_number_that_is_not_finite_ends_the_lane():
    envs = make()
    s = envs.network.ends.index(("J2", "J3"))
    envs.rho_m[envs.network.first[s], 1] = np.nan
    reward, terminated, truncated = envs.step_lanes(actions(envs))
    assert terminated.tolist() == [False, True] and not truncated.any() and torch.isfinite(reward).all()


@pytest.mark.parametrize("plan, shortest", [({}, 10), ({"all_red": 2.0, "min_green": 3.0}, 5)])
def test_minimum_green_and_all_red_of_the_plan_hold(plan, shortest):
    envs = make(1, network=crossing(**plan), interval=1.0, seconds=120.0)
    generator, phase, switches = torch.Generator().manual_seed(0), envs.phase.clone(), []
    for t in range(119):
        envs.step_lanes(torch.randint(0, 4, (1, 1), generator=generator))
        if (envs.phase != phase).any():
            switches.append(t)
        phase = envs.phase.clone()
    assert np.diff(switches).min() == shortest and len(switches) > 8


def test_demand_is_random_changes_within_an_episode_and_has_the_mean_it_should():
    rules = arz.Rules(1, 1, 1.0, 0, *arz.VARIATION, 0.0, 0.0, 0.0)
    factor = np.array([[[arz.demand_factor_nb(1, lane, k % 2, k // 2, float(t), rules) for t in range(0, 450, 15)]
                        for k in range(4)] for lane in range(200)])  # two episodes, two roads
    assert factor.std(2).mean() > 0.1 and factor.min() > 0.19
    assert np.abs(np.corrcoef(factor.mean(2).T) - np.eye(4)).max() < 0.25
    envs = make(200, seconds=450.0, level=(1.3, 1.3))
    for t in range(envs.length - 1):
        envs.step_lanes(actions(envs, t))
    arrived = envs.totals[arz.ARRIVED : arz.ARRIVED + 2].mean(1)
    assert arrived.numpy() == pytest.approx(1.3 * envs.network.base[0].sum(1) * 435, rel=0.03)


def test_evaluation_cases_are_fixed_paired_and_apart_from_training():
    envs = arz.NetworkVectorEnv(15, cases="eval", level=arz.LEVELS, **SHORT)
    obs = envs.reset(seed=9)[0]
    np.testing.assert_array_equal(obs, envs.reset(seed=9)[0])
    low, high = envs.splits["x1.0"], envs.splits["x1.3"]
    np.testing.assert_array_equal(obs[low], obs[high])  # the same start, another demand
    levels = {name: envs.level[0, lanes].tolist() for name, lanes in envs.splits.items()}
    assert levels["x1.0"] == [1.0] * 6 and levels["x1.3"] == [1.3] * 6
    assert len(levels["eval"]) == 3 and set(levels["eval"]) == {1.0, 1.3}
    others = np.concatenate([make(15, 9).observe().numpy(), obs[low]])
    assert not (obs[envs.splits["eval"], None] == others[None]).all((2, 3)).any()


@pytest.fixture(scope="module")
def delays():
    """Total delay of every controller on the crossing of four phases, and of one that never switches."""
    envs = arz.NetworkVectorEnv(64, crossing(), 5.0, 300.0)
    tuned, sweeps = arz.tune(envs)
    assert sweeps == 2
    envs.assign(np.arange(100, 164), np.ones((2, 64)))
    found, served = {}, {}
    for name in (*tuned, "stuck"):
        envs.reset(seed=6)
        act = arz.tuned_controller(envs, name, tuned[name]) if name in tuned else lambda obs: same(envs)
        phases = []
        for _ in range(envs.length):
            asked = act(envs.observe())
            assert asked.shape == (64, 1) and asked.min() >= 0 and asked.max() <= 3
            envs.step_lanes(asked)
            phases.append(envs.phase[0].clone())
        found[name] = float(envs.stats("finals")["delay_veh_s"].mean())
        served[name] = [len(lane.unique()) for lane in torch.stack(phases[:-1], 1)]
    return found, served, tuned


@pytest.mark.parametrize("name", sorted(arz.CONTROLLERS.keys() - {"own_program"}))  # the crossing has none
def test_baselines_serve_every_phase_of_a_network_that_is_no_corridor(delays, name):
    found, served, _ = delays
    assert found[name] < 0.6 * found["stuck"] and min(served[name]) == 4


def test_tuning_finds_what_the_start_does_not_know(delays):
    _, _, tuned = delays
    envs = arz.NetworkVectorEnv(64, crossing(), 5.0, 300.0)
    for name in ("actuated", "max_pressure", "fixed_cycle"):
        rows = [arz.START[name], tuned[name][1.0]]
        start, best = arz.delays(envs, name, rows, [1.0, 1.0], np.inf)
        assert best < start


def test_tuning_keeps_the_decisions_and_the_clock():
    tuned, sweeps = arz.tune(arz.NetworkVectorEnv(4, crossing(), 7.0, 35.0))
    assert sweeps == 2 and all(row["period"] % 7 == 0 for row in tuned["max_pressure"].values())
    tuned, sweeps = arz.tune(make(2), 0.0)
    assert sweeps == 0 and tuned["actuated"][1.0] == arz.START["actuated"]


def one_plan(envs, name, **constants):
    return arz.controller(envs, name, [constants] * envs.num_envs)


def test_actuated_leaves_an_empty_street():
    envs = make(1, interval=5.0, seconds=300.0, fill=0.0)
    act = one_plan(envs, "actuated", gap=0.1, longest=40.0)
    ends = envs.network.ends
    envs.zones.zero_()
    envs.zones[0, ends.index(("N2", "J2"))] = 0.5
    assert act(None).tolist() == [[0, 1, 0, 0, 0]]
    envs.zones[0, ends.index(("J1", "J2"))] = 0.5
    assert act(None).tolist() == [[0, 0, 0, 0, 0]]
    envs.age[1] = 50.0
    assert act(None).tolist() == [[0, 1, 0, 0, 0]]


def test_a_fixed_cycle_keeps_its_times_and_a_lane_gets_the_constants_of_its_demand():
    """Two levels in one environment ask for what each would ask for alone."""
    tuned = {1.0: {"cycle": 40.0, "skew": 0.0, "speed": 0.0}, 1.3: {"cycle": 80.0, "skew": 2.0, "speed": 14.0}}
    envs = arz.NetworkVectorEnv(10, cases="eval", level=arz.LEVELS, interval=5.0, seconds=300.0)
    envs.reset(seed=1)
    mixed = arz.tuned_controller(envs, "fixed_cycle", tuned)
    alone = [one_plan(envs, "fixed_cycle", **row) for row in tuned.values()]
    high, different, first = (envs.level[0] == 1.3)[:, None], 0, []
    for _ in range(30):
        asked, low_plan, high_plan = (act(None) for act in (mixed, *alone))
        assert torch.equal(asked, torch.where(high, high_plan, low_plan))
        different += int((low_plan != high_plan).sum())
        first.append(int(low_plan[0, 0]))
        envs.step_lanes(asked)
    assert different > 100 and 0 < high.sum() < 10
    assert first[:24] == ([0] * 4 + [1] * 4) * 3


def test_where_no_request_counts_the_agent_keeps_the_phase_and_learns_nothing():
    envs = make(8, interval=5.0)
    torch.manual_seed(0)
    agent = arz.Agent(observations=envs.row_obs, phases=2, hidden=64, phase_at=envs.phase_at)
    for t in range(6):
        envs.step_lanes(torch.randint(0, 2, (8, 5), generator=torch.Generator().manual_seed(t)))
    free, phase = envs.age.T.flatten() >= 10, envs.phase.T.flatten()
    agent.actor[-1].weight.data *= 300  # far from a coin toss
    x = agent.normalise(envs.observe().flatten(0, 1))
    assert 5 < free.sum() < 35 and 0 < phase[~free].double().mean() < 1
    for noise in (None, torch.rand(40, 2)):
        asked = agent.act(x, noise)
        assert torch.equal(asked[~free], phase[~free])
    assert (asked[free] != phase[free]).any()
    log_prob, entropy = agent.log_prob_entropy(x, asked)
    assert (log_prob[~free].abs() < 1e-6).all() and (entropy[~free] < 1e-6).all() and (entropy[free] > 1e-6).any()
    agent.log_prob_entropy(x[~free], 1 - asked[~free])[0].sum().backward()
    assert all((p.grad == 0).all() for p in agent.actor.parameters())


def test_rewards_are_divided_by_the_spread_of_the_discounted_return():
    generator = torch.Generator().manual_seed(0)
    rewards, ends = torch.randn(50, 6, generator=generator), torch.rand(50, 6, generator=generator) < 0.1
    scale = arz.RewardScale(6, 0.9, "cpu")
    scaled = [scale(rewards[i : i + 10], ends[i : i + 10]) for i in range(0, 50, 10)]
    returns, running = [], np.zeros(6)
    for reward, ended in zip(rewards.numpy().astype(float), ends.numpy()):
        running = running * 0.9 + reward
        returns.append(running.copy())
        running[ended] = 0
    assert float(scaled[-1][0, 0]) == pytest.approx(float(rewards[40, 0]) / np.std(returns), rel=1e-5)
    other = arz.RewardScale(6, 0.9, "cpu")
    other.load_state_dict(scale.state_dict())
    assert torch.equal(other(rewards[:5], ends[:5]), scale(rewards[:5], ends[:5]))


@pytest.mark.parametrize("dependence, agent, updates, expected", [
    (0.5, 90.0, 0, "untrained"), (0.5, 90.0, 9, "healthy"), (0.5, 101.0, 9, "undertrained"),
    (0.001, 300.0, 9, "collapsed"), (0.001, 100.5, 9, "constant_is_right")])
def test_the_verdict(dependence, agent, updates, expected):
    baselines = {"webster": {"delay_veh_s": 120.0}, "actuated": {"delay_veh_s": 100.0}}
    audit = {"state_dependence": dependence}
    name, reasons = arz.verdict(audit, {"delay_veh_s": agent}, baselines, updates)
    assert name == expected and reasons
    cut = arz.verdict(audit, {"delay_veh_s": agent}, baselines, updates, partial=True)[0]
    assert cut == ("undecided" if updates else "untrained")
    assert updates == 0 or "actuated" in reasons[-1]
