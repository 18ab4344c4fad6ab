"""The verbs that measure and judge: bench, compare, gate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edgedeploy.cli import console
from edgedeploy.cli.reporting import report_forms, report_options
from edgedeploy.documents import as_document, to_builtins
from edgedeploy.errors import EdgedeployError, UsageError

_EXIT_CODES = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 4}


def _measuring_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        [
            click.option("--device", default="local", show_default=True, help="See: edgedeploy devices list."),
            console.lab_option,
            console.wait_option,
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
            click.option(
                "--margin",
                "margins",
                multiple=True,
                metavar="METRIC=AMOUNT",
                help="E.g. latency_p50=+5%; a limit: 'latency_p50<=5ms'; both: 'latency_p50=+3%, <= 5ms'.",
            ),
            click.option(
                "--max-blocks", type=click.IntRange(2), default=16, show_default=True, help="A/B pairs at most."
            ),
            click.option(
                "--allow-stored-pass",
                is_flag=True,
                help="Let a latency pass against one of another session, by the device's known noise.",
            ),
        ]
    ):
        command = option(command)
    return command


# What says how an artifact is made: only for --compare-precisions, which makes them.
_BUILDING = {
    "weights": "--weights",
    "inputs": "--input",
    "target": "--target",
    "backends": "--backend",
    "calibration": "--calibration",
    "options": "-O",
    "quantization": "-Q",
    "allow_loss": "--allow-loss",
    "margin": "--margin",
    "name": "--name",
    "trust_pickle": "--trust-pickle",
}


@click.command(
    epilog="""\b
Examples:
  edgedeploy bench build/int8 --device local --evaluation edgedeploy/demo/evaluation
  edgedeploy bench build/int8 --profile
  edgedeploy bench model.onnx --compare-precisions --backend all --calibration samples.npz \\
      --evaluation evaluation.npz
""",
)
@click.argument("artifact", metavar="ARTIFACT|MODEL")
@click.option("--visits", type=click.IntRange(1), help="Fresh processes. [default: 5; to compare: at most 16 pairs]")
@click.option("--profile", is_flag=True, help="Time single operators too, in a pass of their own.")
@click.option("--compare-precisions", is_flag=True, help="Build MODEL in every precision and measure each beside fp32.")
@click.option("--calibration", type=click.Path(path_type=Path), help="To compare: a calibration set for int8.")
@click.option("--target", help="To compare: a kind of device; see: edgedeploy targets list. [default: host]")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    metavar="NAME",
    help="To compare: a runtime, or all; repeatable. [default: onnxruntime]",
)
@click.option("--margin", metavar="accuracy=AMOUNT", help="To compare: what may be lost. [default: accuracy=-1pt]")
@console.weights_option
@console.input_option
@click.option("-O", "options", multiple=True, metavar="KEY=VALUE", help="To compare: an option of the back ends.")
@click.option("-Q", "quantization", multiple=True, metavar="KEY=VALUE", help="To compare: as of compile.")
@click.option("--allow-loss", is_flag=True, help="To compare: build also what loses compression.")
@click.option("--name", help="To compare: what to call the model. [default: from MODEL]")
@console.trust_pickle_option
@_measuring_options
def bench_command(
    artifact: str,
    visits: int | None,
    profile: bool,
    compare_precisions: bool,
    quiet: bool,
    as_json: bool,
    **given: Any,
) -> int:
    """Measure ARTIFACT (a folder that compile wrote) on a device and store the run.

    With --compare-precisions: build MODEL (as of compile) in every precision that the target and the back ends allow,
    measure each interleaved with fp32, and name the fastest that keeps accuracy. Exit code 4: too noisy to tell any.
    """
    from edgedeploy import pipeline

    if compare_precisions:
        if profile:
            raise UsageError("--profile times the operators of one artifact; leave --compare-precisions out")
        return _compare_precisions(artifact, visits, quiet, as_json, given)
    for key, flag in _BUILDING.items():
        if given.pop(key):
            raise UsageError(
                f"{flag} says how an artifact is made, and bench measures one that is there; add --compare-precisions "
                f"to build and compare, or leave it out"
            )
    from edgedeploy.render.text import run_text

    run, path = pipeline.bench(
        Path(artifact), visits=visits or 5, profile=profile, progress=console.progress(quiet), **given
    )
    if as_json:
        console.print_json({**as_document(run), "path": str(path)})
    else:
        click.echo(run_text(run, color=console.uses_color(), width=console.terminal_width()))
        click.echo(f"run: {path}")
    return 0


def _compare_precisions(model: str, visits: int | None, quiet: bool, as_json: bool, given: dict[str, Any]) -> int:
    from edgedeploy import pipeline
    from edgedeploy.render.text import comparison_text

    if visits is not None and visits < 2:
        raise UsageError("--visits 1 says nothing about a difference; --compare-precisions needs 2 at least")
    chosen: dict[str, Any] = {
        "target": given.pop("target") or "host",
        "backends": given.pop("backends") or ("onnxruntime",),
        "margin": given.pop("margin") or "",
        "options": console.parse_pairs(given.pop("options")),
        "max_blocks": visits or 16,
    }
    found = pipeline.compare_precisions(model, **chosen, **given, progress=console.progress(quiet))
    if as_json:
        console.print_json(as_document(found))
    else:
        click.echo(comparison_text(found, color=console.uses_color(), width=console.terminal_width()))
    return 0 if found.fastest else _EXIT_CODES["INCONCLUSIVE"]


@click.command(epilog="Example: edgedeploy compare build/fp32 build/int8")
@click.argument("baseline", metavar="A")
@click.argument("candidate", metavar="B")
@report_options
@_judging_options
@_measuring_options
def compare_command(baseline: str, candidate: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Show how B differs from A, without a verdict in the exit code.

    Two artifact folders are measured interleaved now; two stored runs are compared as they are.
    """
    from edgedeploy import outcomes, pipeline

    forms = report_forms(options)
    outcome = pipeline.gate(
        candidate, baseline=baseline, is_explained=False, progress=console.progress(quiet), **options
    )
    outcomes.write_reports(outcome, **forms)
    show_outcome(outcome, as_json)


@click.command(
    epilog="""\b
Examples:
  edgedeploy gate build/int8 --baseline build/fp32 --margin latency_p50=+5% --margin accuracy=-1pt
  edgedeploy gate RUN_B --baseline RUN_A          two stored runs; nothing is measured
  edgedeploy gate RUN_B                           against the blessed baseline (edgedeploy baseline set)
  edgedeploy gate build/int8 --aa --times 20      against itself: how often does the gate raise a false alarm?
  edgedeploy gate edgedeploy.toml --aa            likewise every candidate of a release file
""",
)
@click.argument("candidate", required=False)
@click.option("--aa", "against_itself", is_flag=True, help="Judge CANDIDATE, or a release file, against itself.")
@click.option("--times", type=click.IntRange(1), default=1, show_default=True, help="With --aa: how often.")
@click.option("--baseline", help="An artifact folder or a run. [default: the blessed baseline]")
@report_options
@console.no_explain_option
@_judging_options
@_measuring_options
def gate_command(
    candidate: str | None,
    against_itself: bool,
    times: int,
    baseline: str | None,
    no_explain: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Judge CANDIDATE (an artifact folder or a stored run) against a baseline.

    The exit code is the verdict: 0 PASS, 1 FAIL, 4 INCONCLUSIVE. With --aa it says whether the gate can be trusted: 1
    where it is proven to raise more false alarms than its error rate allows, else 0.
    """
    from edgedeploy import outcomes, pipeline

    if against_itself:
        return _gate_against_itself(Path(candidate or "edgedeploy.toml"), times, quiet, as_json, options)
    if candidate is None:
        raise UsageError("say what is judged: an artifact folder or a stored run; or --aa, to try the gate itself")
    if times != 1:
        raise UsageError("--times says how often the gate is tried on itself; add --aa, or leave it out")
    forms = report_forms(options)
    outcome = pipeline.gate(
        candidate, baseline=baseline, is_explained=not no_explain, progress=console.progress(quiet), **options
    )
    was_measured = bool(outcome.artifacts)
    outcomes.write_reports(outcome, **forms, kept_in=options["results"] if was_measured else None)
    return show_outcome(outcome, as_json)


# What a release file says for all of its cells.
_OF_ARTIFACTS = {
    "evaluation": "--evaluation",
    "metric": "--metric",
    "output_name": "--output-name",
    "margins": "--margin",
    "max_blocks": "--max-blocks",
}


def _gate_against_itself(reference: Path, times: int, quiet: bool, as_json: bool, options: dict[str, Any]) -> int:
    """Try the gate on something that has not changed; return 1 where it is shown to cry wolf too often."""
    from edgedeploy import selfcheck
    from edgedeploy.render.noise import false_alarm_line

    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        is_given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        is_of_report = name not in ("candidate", "against_itself", "times", "quiet", "as_json", "no_explain") and (
            name not in _OF_ARTIFACTS and name not in ("device", "lab", "wait_s", "seed", "results")
        )
        if is_given and is_of_report:
            raise UsageError(f"{parameter.opts[0]} is of no use with --aa, which only counts; leave it out")
        if is_given and name in _OF_ARTIFACTS and reference.suffix == ".toml":
            raise UsageError(f"{reference} itself says {parameter.opts[0]}; leave it out, or give an artifact folder")
    of_artifact = {} if reference.suffix == ".toml" else {name: options[name] for name in _OF_ARTIFACTS}
    found = selfcheck.check(
        reference,
        times=times,
        results=options["results"],
        progress=console.progress(quiet),
        device=options["device"] if _is_given(context, "device") or reference.suffix != ".toml" else "",
        lab=options["lab"],
        wait_s=options["wait_s"],
        seed=options["seed"],
        **of_artifact,
    )
    if as_json:
        document = {
            "format": "edgedeploy.selfcheck/1",
            "outcomes": [to_builtins(one) for one in found.outcomes],
            "summary": to_builtins(found.summary),
            "kept": to_builtins(found.kept),
            "files": [str(path) for path in found.files],
        }
        console.print_json(document)
    else:
        rows = [
            [str(number), outcome.decision, _alarms_of(outcome), f"{outcome.seconds:.1f} s"]
            for number, outcome in enumerate(found.outcomes, start=1)
        ]
        console.print_table(f"{reference} against itself", ("gate", "decision", "false alarm in", "took"), rows)
        click.echo(false_alarm_line(found.summary))
        if found.kept.gates > found.summary.gates:
            devices = ", ".join(found.kept.devices)
            click.echo(f"all gates of {devices} that are kept: {false_alarm_line(found.kept)}")
    return 1 if found.is_proven_wrong else 0


def _alarms_of(outcome: Any) -> str:
    return ", ".join(f"{cell.cell}: {', '.join(cell.failed)}" for cell in outcome.cells if cell.failed)


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


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
