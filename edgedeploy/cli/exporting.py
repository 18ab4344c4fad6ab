"""The verb that sends results to where people already look: export."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgedeploy.cli import console

if TYPE_CHECKING:
    from edgedeploy.records.artifact import Artifact


@click.group()
def export_command() -> None:
    """Send results to where people already look."""


@export_command.command(
    "mlflow",
    epilog="""\b
Examples:
  edgedeploy export mlflow bench_results/reports/VERDICT.json --tracking-uri https://mlflow.example:5000
  edgedeploy export mlflow RUN_A RUN_B --tracking-uri sqlite:///mlflow.db --with-artifacts
""",
)
@click.argument("references", metavar="VERDICT|RUN...", nargs=-1, required=True)
@click.option(
    "--tracking-uri",
    default=lambda: os.environ.get("MLFLOW_TRACKING_URI", ""),
    metavar="URI",
    help="Of a server (https://...) or a database (sqlite:///mlflow.db). [default: MLFLOW_TRACKING_URI]",
)
@click.option("--experiment", default="edgedeploy", show_default=True, help="Is made where it does not exist.")
@click.option("--with-artifacts", is_flag=True, help="Send the compiled files too, as far as the cache has them.")
@console.results_option
@console.quiet_option
@console.json_option
def export_mlflow(
    references: tuple[str, ...],
    tracking_uri: str,
    experiment: str,
    with_artifacts: bool,
    results: Path,
    quiet: bool,
    as_json: bool,
) -> None:
    """Send verdicts and runs to MLflow: a run for each measured artifact, below one for its gate.

    What is there already is not sent again. MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD and
    MLFLOW_TRACKING_TOKEN are MLflow's own variables for servers that ask who you are.
    """
    from edgedeploy.exports import mlflow

    exported = mlflow.export(
        references,
        results=results,
        tracking_uri=mlflow.demand_uri(tracking_uri),
        experiment=experiment,
        find_artifact=_in_cache if with_artifacts else None,
        progress=console.progress(quiet),
    )
    if as_json:
        documents = [
            {"name": one.name, "digest": one.digest, "run_id": one.run_id, "state": one.state, "url": one.url}
            for one in exported
        ]
        console.print_json({"format": "edgedeploy.export/1", "experiment": experiment, "runs": documents})
        return
    rows = [[one.name, one.state, one.url or one.run_id] for one in exported]
    console.print_table(f"MLflow, experiment {experiment}", ("run", "state", "where"), rows)


def _in_cache(key: str) -> tuple[Path, Artifact] | None:
    from edgedeploy.build import stored_artifact
    from edgedeploy.storage import cache_dir

    folder = cache_dir() / "artifacts" / key
    artifact = stored_artifact(folder, key)
    return (folder, artifact) if artifact is not None else None
