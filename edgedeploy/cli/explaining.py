"""The verb that says why one artifact is slower or less accurate than another: explain."""

from __future__ import annotations

from pathlib import Path

import click

from edgedeploy.cli import console
from edgedeploy.documents import as_document


@click.command(
    epilog="""\b
Examples:
  edgedeploy explain build/fp32 build/int8 --evaluation edgedeploy/demo/evaluation
  edgedeploy explain RUN_A RUN_B                          two stored runs, whose artifacts are in the cache
  edgedeploy explain bench_results/reports/….json int8    a cell of a verdict; without a name, the first that failed
""",
)
@click.argument("baseline", metavar="A|VERDICT")
@click.argument("candidate", metavar="[B|CELL]", default="")
@click.option("--device", default="", help="See: edgedeploy devices list. [default: where it was measured, or local]")
@console.lab_option
@console.wait_option
@click.option("--evaluation", type=click.Path(path_type=Path), help="A labelled set: folder or .npz.")
@click.option("--metric", default="top1", show_default=True, help="top1, top5 or mae.")
@click.option("--output-name", default="", help="The judged output of a model with several.")
@click.option(
    "--passes", type=click.IntRange(2), default=8, show_default=True, help="Pairs of passes that time layers, at most."
)
@click.option(
    "--cap", "cap_s", type=click.FloatRange(1), default=120.0, show_default=True, help="Seconds; then no pair is begun."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Decides the order of bursts.")
@click.option("--html", type=click.Path(path_type=Path), help="Also write a self-contained HTML page here.")
@console.results_option
@console.quiet_option
@console.json_option
def explain_command(
    baseline: str,
    candidate: str,
    device: str,
    lab: Path | None,
    wait_s: float,
    evaluation: Path | None,
    metric: str,
    output_name: str,
    passes: int,
    cap_s: float,
    seed: int,
    html: Path | None,
    results: Path,
    quiet: bool,
    as_json: bool,
) -> int:
    """Say why B is slower or less accurate than A: layer by layer, class by class, sample by sample.

    Both artifacts are profiled on one device, in turns, each pass a fresh process. What a runtime fuses differently is
    brought together through the nodes of the model; every difference has an interval over the passes.
    """
    from edgedeploy import pipeline

    found, path = pipeline.explain(
        baseline,
        candidate,
        device=device,
        lab=lab,
        evaluation=evaluation,
        metric=metric,
        output_name=output_name,
        passes=passes,
        cap_s=cap_s,
        seed=seed,
        wait_s=wait_s,
        results=results,
        progress=console.progress(quiet),
    )
    if html is not None:
        from edgedeploy.render.explanation_page import explanation_html
        from edgedeploy.storage import write_atomic

        write_atomic(html, explanation_html(found).encode())
    if as_json:
        console.print_json({**as_document(found), "path": str(path)})
        return 0
    from edgedeploy.render.explanation import explanation_text

    click.echo(explanation_text(found, color=console.uses_color(), width=console.terminal_width()))
    click.echo(f"explanation: {path}")
    if html is not None:
        click.echo(f"page: {html}")
    return 0
