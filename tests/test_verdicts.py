"""The verdict of 60 trained runs whose kind is known beforehand; a run is some ten seconds."""
import pytest

from cleanrl_crypto import tqc_film_batch as tqc
from runs import flags_of

TINY = dict(
    num_envs=256, d_model=16, window=16, fusion_width=64, hidden=64, mae_steps=20, total_timesteps=12_288,
    batch_size=128, eval_interval=2_048, torch_threads=1, cuda=False, report=False)
# the earlier program's actor: an entropy that covers the whole range, truncation, few updates
EARLIER = dict(
    policy="actor", ent_coef_lr=0.01, ent_coef_min=0.01, target_entropy=0.0, counterfactuals=0, forecast=False,
    top_quantiles_to_drop_per_net=2, log_std_init=0.0, updates_per_step=1, total_timesteps=40_960, segment=1,
    dropout=0.0, average=0.0, patience=0)
KINDS = {  # what was trained: market, flags, seeds, verdicts that are right
    "healthy": ("signal?bars=12000", {}, 14, {"healthy"}),
    "healthy in two regimes": ("regime?bars=12000", {}, 10, {"healthy"}),
    "nothing to earn": ("noise?bars=12000", {}, 10, {"constant_is_right"}),
    "a constant earns": ("drift?bars=12000", {}, 6, {"constant_is_right"}),
    "collapsed": ("signal?bars=12000", EARLIER, 8, {"collapsed"}),
    "cut": ("regime?bars=12000", dict(total_timesteps=3_072, learning_rate=1e-4), 6, {"undertrained"}),
    "never trained": ("signal?bars=12000", dict(learning_starts=10**9, total_timesteps=2_048), 2, {"untrained"}),
    "weak edge": ("signal?bars=12000&ic=.01", {}, 4, {"undecided", "constant_is_right"}),
}


@pytest.mark.slow
def test_57_of_60_verdicts_are_right(tmp_path):
    """95 %, over markets that no setting was chosen on."""
    wrong, runs = [], 0
    for kind, (market, flags, seeds, right) in KINDS.items():
        for seed in range(300, 300 + seeds):
            data = f"synthetic:{market}&seed={seed}"
            run_dir = tmp_path / f"{kind}_{seed}".replace(" ", "_")
            summary = tqc.main(flags_of(TINY, run_dir, data=data, seed=seed, **flags))
            word = summary["audit"]["verdict"]
            runs += 1
            if word not in right:
                wrong.append((kind, seed, word, summary["audit"]["reasons"]))
            print(f"{kind:24} {seed} {word}", flush=True)
    assert runs == 60 and len(wrong) <= 3, wrong
