"""The verbs of a release file: init writes one, run takes every cell of it through the whole spine."""

from __future__ import annotations

from pathlib import Path

import click

from edgedeploy.cli import console

_DEFAULT_FILE = "edgedeploy.toml"


@click.command(epilog="Example: edgedeploy init && edgedeploy run")
@click.argument("path", type=click.Path(path_type=Path), default=_DEFAULT_FILE)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@console.json_option
def init_command(path: Path, force: bool, as_json: bool) -> None:
    """Write a commented release file at PATH (default: ./edgedeploy.toml)."""
    from edgedeploy import pipeline

    written = pipeline.init(path, force=force)
    if as_json:
        console.print_json({"format": "edgedeploy.init/1", "path": str(written)})
    else:
        click.echo(f"wrote {written}; name your model in it, then: edgedeploy run {written}")


@click.command(
    epilog="""\b
Examples:
  edgedeploy run edgedeploy.toml --html report.html
  edgedeploy run edgedeploy.toml --targets all          every installed runtime, side by side
""",
)
@click.argument("release", type=click.Path(path_type=Path), default=_DEFAULT_FILE)
@click.option("--cell", "cells", multiple=True, help="Only this candidate cell; repeatable.")
@click.option(
    "--targets",
    default="",
    metavar="all|NAME[,NAME]",
    help="Only the cells of these targets; all: every cell, on every runtime that is installed for its target.",
)
@click.option(
    "--backends",
    default="",
    metavar="all|NAME[,NAME]",
    help="Each candidate on these runtimes too, side by side with its own.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be built, shipped and measured, and stop.")
@click.option("--rebuild", is_flag=True, help="Build even if the cache has it.")
@console.trust_pickle_option
@click.option("--seed", type=int, default=0, show_default=True, help="Decides the order of bursts.")
@click.option("--junit", type=click.Path(path_type=Path), help="Also write JUnit XML here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Also write Markdown here.")
@click.option("--html", type=click.Path(path_type=Path), help="Write the HTML report here instead of into --results.")
@console.lab_option
@console.results_option
@console.quiet_option
@console.json_option
def run_command(
    release: Path,
    cells: tuple[str, ...],
    targets: str,
    backends: str,
    dry_run: bool,
    rebuild: bool,
    trust_pickle: bool,
    seed: int,
    junit: Path | None,
    markdown: Path | None,
    html: Path | None,
    lab: Path | None,
    results: Path,
    quiet: bool,
    as_json: bool,
) -> int:
    """Build, measure and judge every cell of a RELEASE file (default: ./edgedeploy.toml).

    The exit code is the verdict: 0 PASS, 1 FAIL, 4 INCONCLUSIVE.
    """
    from edgedeploy import pipeline
    from edgedeploy.arguments import names_from_text
    from edgedeploy.cli.measuring import show_outcome

    wanted: dict[str, tuple[str, ...]] = {
        "cells": cells,
        "targets": names_from_text(targets),
        "backends": names_from_text(backends),
    }
    if dry_run:
        plan = pipeline.plan(release, **wanted)
        if as_json:
            console.print_json({"format": "edgedeploy.plan/1", "steps": plan})
        else:
            click.echo("\n".join(plan))
        return 0
    outcome = pipeline.run(
        release,
        **wanted,
        rebuild=rebuild,
        trust_pickle=trust_pickle,
        seed=seed,
        lab=lab,
        results=results,
        progress=console.progress(quiet),
    )
    pipeline.write_reports(outcome, junit=junit, markdown=markdown, html=html or pipeline.report_path(outcome, results))
    code = show_outcome(outcome, as_json)
    if outcome.other_runtimes and not as_json and not quiet:
        others = ", ".join(outcome.other_runtimes)
        click.echo(f"to compare other runtimes too ({others}): edgedeploy run {release} --targets all", err=True)
    return code
