"""TensorBoard and Weights and Biases: both mirror metrics.jsonl, and both show PAGES.

Neither may hang or end a run. wandb's waits are bounded by seconds; a call of it that fails turns
it off, aloud.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from queue import Empty, Queue

from common import text_of
from common.run import UsageError, refuse

WAIT = 5.0, 30.0  # s, least and most, for wandb to start, and twice at the end: table, uploads
SHARE = 0.05  # of --timeout, between these
OFFLINE_SECONDS = 2.0  # s that wandb takes to close its files
SLACK = 5.0  # s beyond what wandb was told, for its own work
AXES = {"global_step", "pretrain_step", "wall"}  # of a line, beside its metrics
# {page: {panel: metrics}}; * stands for any name, as <split> does in the tables of docs/
PAGES = {
    "Does it learn?": {
        "score": ["eval/*/score"],
        "expected reward, bp a bar": ["eval/*/mean_expected_bps", "eval/*/expected_growth_bps"],
        "return of an evaluation": ["eval/*/episode_return"],
        "spread over the cases": ["eval/*/std"],
        "return while exploring": ["charts/episodic_return"],
        "length of episodes": ["charts/episodic_length", "eval/*/episode_length"],
        "pre-training": ["losses/mae"],
        "critic's loss": ["losses/qf_loss", "losses/td_loss", "losses/value_loss"],
        "actor's loss": ["losses/actor_loss", "losses/policy_loss"],
        "explained variance": ["losses/explained_variance"],
        "answers to the state": ["policy/state_dependence"],
        "what the action matters": ["value/q_action_spread", "value/alpha_entropy"],
    },
    "Is it healthy?": {
        "alarms": ["alarm/*"],
        "gradient": ["losses/grad_norm"],
        "values": ["losses/target_mean", "losses/q_values", "value/q_mean", "value/v_mean"],
        "overestimation": ["value/overestimation"],
        "spread of quantiles": ["value/quantile_spread"],
        "entropy": ["policy/entropy", "policy/entropy_rms", "losses/entropy"],
        "noise of actions": ["policy/log_std_mean", "policy/sigma"],
        "entropy coefficient": ["policy/alpha"],
        "step of the policy": ["losses/approx_kl", "losses/clipfrac"],
        "greedy action": ["policy/action_mean", "policy/saturation"],
        "greedy gap": ["policy/greedy_gap"],
        "what the policy looks at": ["policy/attribution_*"],
        "rewards": ["env/reward_std", "env/clipped_rewards"],
        "learning rate": ["charts/learning_rate"],
        "random actions": ["charts/epsilon"],
        "workers replaced": ["env/restarts"],
        "mass error": ["env/mass_error", "eval/*/mass_error"],
        "Courant number": ["env/max_cfl", "eval/*/max_cfl"],
        "vehicles added by floors": ["env/floor_veh", "eval/*/floor_veh"],
    },
    "What does it earn?": {
        "reward, bp a bar": ["eval/*/mean_reward_bps"],
        "total return": ["eval/*/total_return"],
        "Sharpe ratio": ["eval/*/sharpe"],
        "largest drawdown": ["eval/*/max_drawdown"],
        "turnover": ["env/turnover", "eval/*/turnover"],
        "exposure": ["env/exposure", "eval/*/exposure"],
        "costs, bp a bar": ["env/costs"],
        "trades": ["eval/*/trades"],
    },
    "What does the road do?": {
        "delay, vehicle seconds": ["env/delay_veh_s", "eval/*/delay_veh_s"],
        "throughput, vehicles": ["env/throughput_veh", "eval/*/throughput_veh"],
        "mean speed": ["env/mean_speed", "eval/*/mean_speed"],
        "switches": ["env/switches", "eval/*/switches"],
        "queue, vehicles": ["env/queue_veh", "eval/*/queue_veh"],
    },
    "Where does the time go?": {
        "seconds by phase": ["time/*"],
        "transitions a second": ["charts/SPS"],
        "updates": ["charts/updates"],
        "updates a transition": ["charts/replay_ratio"],
        "rows drawn a transition": ["charts/samples_per_transition"],
    },
}


# ------------------------------------------------------------------------------------------- pages
def pattern(metric: str) -> str:
    """A name of PAGES or of the docs as a regular expression."""
    return "^" + re.sub(r"\\\*|<\w+>", ".+", re.escape(metric)) + "$"


def documented(script: str) -> list[str]:
    """Metrics in the tables of docs/{script}.md, * for <...>; none where there is no such page."""
    names, inside = [], False
    for line in (text_of(f"docs/{script}.md") or "").splitlines():
        first = line.split("|")[1].strip() if line.startswith("|") else None
        inside = first == "metric" or (inside and first is not None)
        names += re.findall(r"`([^`]+)`", first) if inside else []
    return [re.sub(r"<\w+>", "*", name) for name in names]


def pages_of(script: str) -> dict[str, dict[str, list[str]]]:
    """PAGES without what this script does not log; all of them where its docs page is missing."""
    names = documented(script)
    if not names:
        return PAGES
    found = {}
    for page, panels in PAGES.items():
        for title, metrics in panels.items():
            logged = [m for m in metrics if any(re.match(pattern(m), name) for name in names)]
            if logged:
                found.setdefault(page, {})[title] = logged
    return found


# ----------------------------------------------------------------------------------------- mirrors
def seconds_of(args) -> float:
    """What wandb may take at the start, and twice at the end."""
    least, most = WAIT
    return min(most, max(least, SHARE * (args.timeout or 1e9)))


def wanted(args) -> bool:
    return args.track and args.wandb_mode != "disabled"


def check_tracking(args):
    """Refuse --track where wandb cannot work, before anything is written. Asks nothing of a network
    or of a terminal."""
    refuse((args.track_artifacts and not args.track, "--track-artifacts goes with --track"))
    if not wanted(args):
        return
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it waits 10 s at exit without network
    try:
        import wandb
    except ImportError as e:
        raise UsageError(f"--track: {e}: pip install 'wandb>=0.31', or leave --track out") from e
    new = "finish_timeout" in getattr(wandb.Settings, "model_fields", ())
    why = f"--track: wandb {wandb.__version__} can hang: pip install --upgrade 'wandb>=0.31'"
    refuse((not new, why))
    if args.wandb_mode == "online":
        check_key()


def check_key():
    """Refuse a missing key, and one that cannot be one."""
    import wandb

    way_out = "run `wandb login`, set WANDB_API_KEY, or use --wandb-mode offline"
    try:
        known = wandb.login(prompt=False, verify=False)
    except Exception as e:  # whatever wandb says of a key
        raise UsageError(f"wandb: {first_line(e)}: {way_out}") from e
    refuse((not known, f"wandb has no key: {way_out}"))


class Mirrors:
    """TensorBoard's writer and wandb's run, if there is one."""

    def __init__(self, folder: Path, args, script: str, run_id: str, facts: dict, history, purge):
        """facts: what stands beside the flags in wandb's config; history: lines of metrics.jsonl
        that a resumed run has already, purge: the step from which TensorBoard gets points anew."""
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.script, self.args = folder, script, args
        new = not any(folder.glob("events.out.tfevents.*"))
        history = [{k: v for k, v in row.items() if v is not None} for row in history]
        # read in the order of their names, which hold the second and then a plain count: 10 < 9
        while any(folder.glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(0.05)
        self.writer = SummaryWriter(str(folder), purge_step=None if new else purge)
        self._defined, self.wandb, self.tracked = set(), None, wanted(args)
        if new:
            for record in history:
                self._draw(record)
            rows = "\n".join(f"|{k}|{v}|" for k, v in asdict(args).items())
            self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
        layout = {
            page: {t: ["Multiline", [pattern(m) for m in names]] for t, names in panels.items()}
            for page, panels in pages_of(script).items()
        }
        self.writer.add_custom_scalars(layout)
        if self.tracked:
            self._start(run_id, facts, history)

    def _start(self, run_id: str, facts: dict, history: list[dict]):
        args, limit = self.args, seconds_of(self.args)
        try:
            import wandb

            begin = partial(
                wandb.init,
                project=args.wandb_project_name,
                entity=args.wandb_entity,
                mode=args.wandb_mode,
                dir=str(self.folder),
                config=asdict(args) | facts,
                name=self.folder.name,
                id=run_id,
                resume="allow",
                settings=wandb.Settings(
                    init_timeout=limit,
                    x_service_wait=limit,
                    finish_timeout=limit,
                    finish_timeout_raises=True,
                    console="off",  # else every drawing of the progress line is a line of its log
                    silent=True,
                ),
            )
            self.wandb = within(2 * limit + SLACK, begin)
            self.wandb.define_metric("*", step_metric="global_step")
            # what a server lacks; an offline piece gets all, as the one before may have lost lines
            for line, record in list(enumerate(history))[self.wandb.step :]:
                self._send(record, line)
            print(f"wandb: {self.wandb.url or self.wandb.dir}")
        except Exception as e:  # whatever wandb raises
            self._give_up("did not start", e)

    def _give_up(self, what: str, error: Exception):
        self.wandb = None
        print(f"wandb {what} ({first_line(error)}): the run goes on without", file=sys.stderr)

    def log(self, record: dict, line: int):
        """record: line number `line` of metrics.jsonl. One with a pretrain_step has that as its
        axis, any other global_step."""
        known = {k: v for k, v in record.items() if v is not None}
        self._draw(known)
        if self.wandb is None:
            return
        try:
            self._send(known, line)
        except Exception as e:  # whatever wandb raises
            self._give_up("failed", e)

    def _draw(self, record: dict):
        step = record.get("pretrain_step", record["global_step"])
        for key in set(record) - AXES:
            self.writer.add_scalar(key, record[key], step)

    def _send(self, record: dict, line: int):
        """A line to wandb, under its number: what it has already, a resumed run cannot repeat."""
        point = {k: v for k, v in record.items() if k != "wall"}
        if "pretrain_step" in point:
            del point["global_step"]
            for key in set(point) - AXES - self._defined:
                self.wandb.define_metric(key, step_metric="pretrain_step")
                self._defined.add(key)
        self.wandb.log(point, step=line)

    def finish(self, summary: dict, best: dict):
        """Verdict, best step and the final table, and files if --track-artifacts."""
        if self.wandb is None:
            return
        try:  # a table asks the server
            within(seconds_of(self.args) + SLACK, partial(self._tell, summary, best))
        except Exception as e:  # whatever wandb raises
            self._give_up("failed", e)

    def _tell(self, summary: dict, best: dict):
        import wandb

        rows = [
            [split, who, name, value]
            for split, result in summary["eval"].items()
            for who, metrics in ({"agent": result["agent"]} | result["baselines"]).items()
            for name, value in metrics.items()
            if isinstance(value, (int, float))
        ]
        keys = "status commit command best_step best_updates global_step sps".split()
        found = {key: summary[key] for key in keys}
        found |= {key: summary["audit"][key] for key in ("verdict", "reasons")}
        found |= {"best_score": best["score"] if best["policy"] else None}
        found |= {f"final/{split}/{who}/{name}": value for split, who, name, value in rows}
        self.wandb.summary.update(found)
        self.wandb.summary["final"] = wandb.Table(["split", "who", "metric", "value"], rows)
        if self.args.track_artifacts:
            self._upload(wandb)

    def _upload(self, wandb):
        artifact = wandb.Artifact(f"{self.script}-{self.wandb.id}", type="run")
        for name in ("report.html", "summary.json", "checkpoints/best.pt"):
            if (self.folder / name).exists():
                artifact.add_file(str(self.folder / name), name)
        if (self.folder / "figures").exists():
            artifact.add_dir(str(self.folder / "figures"), "figures")
        self.wandb.log_artifact(artifact)

    def seconds(self) -> float:
        """What the end of wandb's run may take."""
        if self.wandb is None:
            return 0.0
        online = self.args.wandb_mode == "online"
        return 2 * seconds_of(self.args) if online else OFFLINE_SECONDS

    def close(self, failed: bool) -> bool:
        """failed: an exception ended the run. Returns whether wandb was at work."""
        self.writer.close()
        run, self.wandb = self.wandb, None
        if run is None:
            self._end_service()
            return self.tracked
        again = f"wandb sync {Path(run.dir).parent}"
        try:
            within(seconds_of(self.args) + SLACK, partial(run.finish, exit_code=int(failed)))
            if self.args.wandb_mode == "offline":
                print(f"wandb: {again}")
        except Exception as e:  # whatever wandb raises, out of time too
            print(f"wandb: not all was sent ({first_line(e)}): {again}", file=sys.stderr)
        self._end_service()
        return True

    def _end_service(self):
        """wandb's own end of a program prints a traceback where its service died."""
        if self.tracked:
            import wandb

            with suppress(Exception):  # whatever wandb raises
                within(SLACK, wandb.teardown)


def within(seconds: float, call):
    """What call() returns or raises; TimeoutError if it takes longer (it goes on in its thread)."""
    answer = Queue()
    threading.Thread(target=put_answer, args=(call, answer), daemon=True).start()
    try:
        result, error = answer.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"no answer in {seconds:.0f} s") from None
    if error is not None:
        raise error
    return result


def put_answer(call, answer: Queue):
    try:
        answer.put((call(), None))
    except Exception as e:
        answer.put((None, e))


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
