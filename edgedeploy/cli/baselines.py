"""baseline set | show | list."""

from __future__ import annotations

from pathlib import Path

import click

from edgedeploy.cli import console
from edgedeploy.documents import to_builtins
from edgedeploy.errors import UsageError
from edgedeploy.records.run import Baseline
from edgedeploy.results import Results

_COLUMNS = ("target", "model", "run", "by", "set", "why")


@click.group()
def baseline_command() -> None:
    """Bless a run as the reference, or show the blessed ones."""


@baseline_command.command("set", epilog='Example: edgedeploy baseline set RUN --why "release 1.4 as shipped"')
@click.argument("run")
@click.option("--why", required=True, help="Why this run becomes the reference; it is stored and reviewed.")
@console.results_option
@console.json_option
def set_(run: str, why: str, results: Path, as_json: bool) -> None:
    """Point the baseline of RUN's target and model at RUN (a path or the digest at its end)."""
    store = Results(results)
    baseline, path = store.set_baseline(store.find_run(run), why)
    _show([baseline], as_json)
    if not as_json:
        click.echo(f"baseline: {path}")


@baseline_command.command(epilog="Example: edgedeploy baseline show host my-model")
@click.argument("target")
@click.argument("model")
@console.results_option
@console.json_option
def show(target: str, model: str, results: Path, as_json: bool) -> None:
    """Show the baseline of one TARGET and MODEL."""
    baseline = Results(results).baseline(target, model)
    if baseline is None:
        raise UsageError(f"there is no baseline for target {target!r} and model {model!r} in {results}; set one with: "
                         f"edgedeploy baseline set RUN --why ...")  # fmt: skip
    _show([baseline], as_json)


@baseline_command.command("list", epilog="Example: edgedeploy baseline list")
@console.results_option
@console.json_option
def list_(results: Path, as_json: bool) -> None:
    """List every baseline."""
    _show(Results(results).baselines(), as_json)


def _show(baselines: list[Baseline], as_json: bool) -> None:
    if as_json:
        console.print_json({"format": "edgedeploy.baselines/1", "baselines": [to_builtins(one) for one in baselines]})
        return
    from edgedeploy.render.text import table

    rows = [[one.target, one.model, one.run, one.by, one.set_utc, one.why] for one in baselines]
    click.echo(table("Baselines", _COLUMNS, rows, color=console.uses_color(), width=console.terminal_width()))
