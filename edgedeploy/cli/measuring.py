"""The verbs that measure and judge: bench, compare, gate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edgedeploy.cli import console
from edgedeploy.documents import as_document
from edgedeploy.errors import EdgedeployError

_EXIT_CODES = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 4}


def _measuring_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        [
            click.option("--device", default="local", show_default=True, help="See: edgedeploy devices list."),
            console.lab_option,
            click.option("--evaluation", type=click.Path(path_type=Path), help="A labelled set: folder or .npz."),
            click.option("--metric", default="top1", show_default=True, help="top1, top5 or mae."),
            click.option("--output-name", default="", help="The judged output of a model with several."),
            click.option("--seed", type=int, default=0, show_default=True, help="Decides the order of bursts."),
            console.results_option,
            console.quiet_option,
            console.json_option,
        ]
    ):
        command = option(command)
    return command


def _judging_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        [
            click.option("--margin", "margins", multiple=True, metavar="METRIC=AMOUNT", help="E.g. latency_p50=+5%."),
            click.option(
                "--max-blocks", type=click.IntRange(2), default=16, show_default=True, help="A/B pairs at most."
            ),
        ]
    ):
        command = option(command)
    return command


@click.command(epilog="Example: edgedeploy bench build/int8 --device local --evaluation edgedeploy/demo/evaluation")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--visits", type=click.IntRange(1), default=5, show_default=True, help="Fresh processes.")
@_measuring_options
def bench_command(artifact: Path, visits: int, quiet: bool, as_json: bool, **options: Any) -> None:
    """Measure ARTIFACT (a folder that compile wrote) on a device and store the run."""
    from edgedeploy import pipeline
    from edgedeploy.render.text import run_text

    run, path = pipeline.bench(artifact, visits=visits, progress=console.progress(quiet), **options)
    if as_json:
        console.print_json({**as_document(run), "path": str(path)})
        return
    click.echo(run_text(run, color=console.uses_color(), width=console.terminal_width()))
    click.echo(f"run: {path}")


@click.command(epilog="Example: edgedeploy compare build/fp32 build/int8")
@click.argument("baseline", metavar="A")
@click.argument("candidate", metavar="B")
@_judging_options
@_measuring_options
def compare_command(baseline: str, candidate: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Show how B differs from A, without a verdict in the exit code.

    Two artifact folders are measured interleaved now; two stored runs are compared as they are.
    """
    from edgedeploy import pipeline

    outcome = pipeline.gate(candidate, baseline=baseline, progress=console.progress(quiet), **options)
    show_outcome(outcome, as_json)


@click.command(
    epilog="""\b
Examples:
  edgedeploy gate build/int8 --baseline build/fp32 --margin latency_p50=+5% --margin accuracy=-1pt
  edgedeploy gate RUN_B --baseline RUN_A          two stored runs; nothing is measured
  edgedeploy gate RUN_B                           against the blessed baseline (edgedeploy baseline set)
""",
)
@click.argument("candidate")
@click.option("--baseline", help="An artifact folder or a run. [default: the blessed baseline]")
@click.option("--junit", type=click.Path(path_type=Path), help="Also write JUnit XML here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Also write Markdown here.")
@click.option("--html", type=click.Path(path_type=Path), help="Also write a self-contained HTML report here.")
@_judging_options
@_measuring_options
def gate_command(
    candidate: str,
    baseline: str | None,
    junit: Path | None,
    markdown: Path | None,
    html: Path | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Judge CANDIDATE (an artifact folder or a stored run) against a baseline.

    The exit code is the verdict: 0 PASS, 1 FAIL, 4 INCONCLUSIVE.
    """
    from edgedeploy import pipeline

    outcome = pipeline.gate(candidate, baseline=baseline, progress=console.progress(quiet), **options)
    pipeline.write_reports(outcome, junit=junit, markdown=markdown, html=html)
    return show_outcome(outcome, as_json)


def show_outcome(outcome: Any, as_json: bool) -> int:
    """Print an outcome; return the exit code of its decision."""
    from edgedeploy.render.text import verdict_text

    if as_json:
        console.print_json(as_document(outcome.verdict))
    else:
        click.echo(
            verdict_text(outcome.verdict, outcome.runs, color=console.uses_color(), width=console.terminal_width())
        )
        for label, path in outcome.files.items():
            click.echo(f"{label}: {path}")
    decision: str = outcome.verdict.decision
    if outcome.problems and decision != "FAIL":
        return EdgedeployError.exit_code
    return _EXIT_CODES[decision]
