"""The workspace of Weights and Biases for one script as code: a section for each question.

    python scripts/dashboards.py --script tqc_film_batch --entity ME
    python scripts/dashboards.py --script ppo_arz_signals --dry-run  # prints it, needs no network

Which metrics: common/tracking.py. TensorBoard shows the same pages under "Custom scalars".
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.run import UsageError, answer_help, check, exit_with, parse_args, refuse  # noqa: E402
from common.tracking import check_key, first_line, pages_of, pattern  # noqa: E402

SCRIPTS = "tqc_film_batch", "dqn_forex_subproc", "ppo_arz_gpu", "ppo_arz_signals"


@dataclass
class Args:
    # experiment
    script: str = "tqc_film_batch"
    """whose metrics: tqc_film_batch, dqn_forex_subproc, ppo_arz_gpu or ppo_arz_signals"""
    wandb_project_name: str = "cleanrl_crypto"
    """wandb project"""
    wandb_entity: str | None = None
    """wandb team or user; needed but for --dry-run"""
    dry_run: bool = False
    """print the specification as JSON and save nothing"""

    def __post_init__(self):
        check(self, {"script": SCRIPTS}, {})
        missing = not self.dry_run and self.wandb_entity is None
        refuse((missing, "--wandb-entity: whose workspace? (--dry-run needs none)"))


def workspace_of(args: Args):
    """wandb_workspaces' Workspace: a section a page, a line plot a panel. UsageError."""
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as spaces
    except ImportError as e:
        raise UsageError(f"{e}: pip install 'wandb-workspaces>=0.4'") from e
    sections = []
    for page, panels in pages_of(args.script).items():
        plots = [
            reports.LinePlot(
                title=title,
                x="pretrain_step" if title == "pre-training" else "global_step",
                metric_regex="|".join(map(pattern, metrics)),
            )
            for title, metrics in panels.items()
        ]
        sections.append(spaces.Section(name=page, panels=plots, is_open=True))
    return spaces.Workspace(
        entity=args.wandb_entity or "",
        project=args.wandb_project_name,
        name=args.script,
        sections=sections,
        settings=spaces.WorkspaceSettings(x_axis="global_step"),
    )


def main(argv=None) -> dict:
    """Save the workspace, or print it; returns its specification."""
    args, _ = parse_args(Args, argv)
    workspace = workspace_of(args)
    spec = json.loads(workspace._model.model_dump_json(by_alias=True, exclude_none=True))
    if args.dry_run:
        print(json.dumps(spec, indent=2))
    else:
        check_key()
        try:
            print(workspace.save().url)
        except Exception as e:  # whatever wandb raises: no network, an unknown entity
            raise UsageError(f"wandb: {first_line(e)}") from e
    return {"exit_code": 0, "spec": spec}


if __name__ == "__main__":
    answer_help(__name__, __file__)
    exit_with(main)
