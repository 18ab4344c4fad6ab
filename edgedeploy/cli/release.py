"""The verbs of a release file: init writes one, run takes every cell of it through the whole spine."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgedeploy.cli import console
from edgedeploy.cli.reporting import report_forms, report_options
from edgedeploy.errors import UsageError

if TYPE_CHECKING:
    from edgedeploy.dask_cluster import Cluster

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
  edgedeploy run edgedeploy.toml --budget 20m           spent over the cells by the noise of their devices
  edgedeploy run --resume                               go on with the run that stopped in the middle
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
@click.option("--device", default="", help="Measure every cell here, instead of on its own device; any: of its target.")
@click.option(
    "--resume",
    is_flag=False,
    flag_value="newest",
    default="",
    metavar="[RUN]",
    help="Go on with a run that stopped in the middle, as it was started. [default: the newest of RELEASE]",
)
@click.option(
    "--scheduler",
    default="",
    metavar="dask|ADDRESS",
    help="Build and measure on Dask workers: dask (some on this machine), or tls://host:port, dask://host:port of a "
    "scheduler, which is trusted like a shell.",
)
@click.option(
    "--scheduler-security", type=click.Path(path_type=Path), help="For tls://: a TOML file that names ca, cert and key."
)
@click.option("--scheduler-insecure", is_flag=True, help="Take dask:// to another machine too: without TLS.")
@click.option("--dry-run", is_flag=True, help="Show what would be built, shipped and measured, and stop.")
@click.option("--rebuild", is_flag=True, help="Build even if the cache has it.")
@console.trust_pickle_option
@click.option("--seed", type=int, default=0, show_default=True, help="Decides the order of bursts.")
@report_options
@console.no_explain_option
@console.budget_option
@console.lab_option
@console.wait_option
@console.results_option
@console.quiet_option
@console.json_option
def run_command(
    release: Path,
    cells: tuple[str, ...],
    targets: str,
    backends: str,
    device: str,
    resume: str,
    scheduler: str,
    scheduler_security: Path | None,
    scheduler_insecure: bool,
    dry_run: bool,
    rebuild: bool,
    trust_pickle: bool,
    seed: int,
    no_explain: bool,
    budget_s: float,
    lab: Path | None,
    wait_s: float,
    results: Path,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Build, measure and judge every cell of a RELEASE file (default: ./edgedeploy.toml).

    The exit code is the verdict: 0 PASS, 1 FAIL, 4 INCONCLUSIVE.
    """
    from edgedeploy import outcomes, pipeline
    from edgedeploy.arguments import names_from_text
    from edgedeploy.cli.measuring import show_outcome

    if resume:
        release, resume = _release_and_run(release, resume)
    asked_targets, asked_backends = names_from_text(targets), names_from_text(backends)
    if dry_run:
        plan = pipeline.plan(
            release,
            cells=cells,
            targets=asked_targets,
            backends=asked_backends,
            device=device,
            budget_s=budget_s,
            lab=lab,
            results=results,
        )
        if as_json:
            console.print_json({"format": "edgedeploy.plan/1", "steps": plan})
        else:
            click.echo("\n".join(plan))
        return 0
    with console.board(quiet) as board, _executor(scheduler, scheduler_security, scheduler_insecure, board) as executor:
        outcome = pipeline.run(
            release,
            cells=cells,
            targets=asked_targets,
            backends=asked_backends,
            device=device,
            rebuild=rebuild,
            trust_pickle=trust_pickle,
            seed=seed,
            wait_s=wait_s,
            lab=lab,
            results=results,
            resume=resume,
            executor=executor,
            builders=executor.builders if executor is not None else 1,
            is_explained=not no_explain,
            budget_s=budget_s,
            progress=board,
        )
    forms = report_forms(options)
    outcomes.write_reports(outcome, **forms, kept_in=outcome.results or results)
    code = show_outcome(outcome, as_json)
    if (told := _ledger_line(outcome)) and not as_json:
        click.echo(told)
    if outcome.other_runtimes and not as_json and not quiet:
        others = ", ".join(outcome.other_runtimes)
        click.echo(f"to compare other runtimes too ({others}): edgedeploy run {release} --targets all", err=True)
    return code


@contextlib.contextmanager
def _executor(
    scheduler: str, security: Path | None, is_insecure: bool, progress: Callable[[str], None]
) -> Iterator[Cluster | None]:
    """Give the cluster that was asked for, or None."""
    if not scheduler:
        for option, is_given in (("--scheduler-security", security is not None), ("--scheduler-insecure", is_insecure)):
            if is_given:
                raise UsageError(f"{option} is about the address that --scheduler names; add that, or leave it out")
        yield None
        return
    from edgedeploy import dask_cluster

    with dask_cluster.cluster(scheduler, security=security, is_insecure=is_insecure, progress=progress) as cluster:
        yield cluster


# What a run was started with is not changed in the middle.
_AS_STARTED = (
    "cells", "targets", "backends", "device", "rebuild", "trust_pickle", "seed", "lab", "results", "dry_run",
    "budget_s",
)  # fmt: skip


def _release_and_run(release: Path, resume: str) -> tuple[Path, str]:
    """Return the release file and the run to go on with; the word after --resume may be either.

    Raises:
        UsageError: something else was asked for that was settled when the run was started.
    """
    from edgedeploy.journal import is_name
    from edgedeploy.pipeline import NEWEST

    context = click.get_current_context()
    for name in _AS_STARTED:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            option = {"cells": "--cell", "budget_s": "--budget"}.get(name, f"--{name.replace('_', '-')}")
            raise UsageError(f"--resume goes on with what the run was started with; leave {option} out")
    if resume == NEWEST or is_name(resume):
        return release, resume
    return Path(resume), NEWEST


def _ledger_line(outcome: Any) -> str:
    """Say what became of the cells when not all are judged; "" when they are."""
    entries = outcome.verdict.ledger
    counts = collections.Counter(entry.state for entry in entries)
    if counts["judged"] == len(entries):
        return ""
    parts = ", ".join(f"{counts[state]} {state}" for state in ("judged", "failed", "pending") if counts[state])
    then = f"; go on with: edgedeploy run --resume {outcome.journal}" if counts["pending"] else ""
    return f"of {len(entries)} cells: {parts}{then}"
