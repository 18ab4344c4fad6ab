"""history: the trend of every cell, where it changed, and what may have done it."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import click

from edgedeploy.cli import console
from edgedeploy.errors import UsageError
from edgedeploy.records.history import HistoryMetric

_METRICS = typing.get_args(HistoryMetric)
_MOST_DRAWN = 400  # runs of one cell on a page that shows many

store_option = click.option(
    "--store",
    default=lambda: console.setting("store", ""),
    metavar="URL",
    help="A lab's shared store, postgresql://user@host/database; its password: PGPASSWORD or ~/.pgpass. "
    "[default: an index of --results]",
)


@click.command(
    epilog="""\b
Examples:
  edgedeploy history                                   every cell in a line
  edgedeploy history mobilenet-int8 --device pi4       one cell: plot, changes, newest runs
  edgedeploy history --metric peak_memory --html history.html
  edgedeploy history --push --store postgresql://ci@db/lab
""",
)
@click.argument("cell", required=False, default="")
@click.option(
    "--metric", type=click.Choice(_METRICS), default="latency_p50", show_default=True, help="What is followed."
)
@click.option("--device", default="", help="Only cells on this device.")
@click.option("--last", type=click.IntRange(1), help="Show only so many of the newest runs. [default: all]")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Also write a self-contained page here.")
@click.option("--rebuild", is_flag=True, help="Make the index anew from the files.")
@click.option("--push", is_flag=True, help="Send the runs of --results to the shared store, and stop.")
@store_option
@console.results_option
@console.quiet_option
@console.json_option
def history_command(
    cell: str,
    metric: str,
    device: str,
    last: int | None,
    html: Path | None,
    rebuild: bool,
    push: bool,
    store: str,
    results: Path,
    quiet: bool,
    as_json: bool,
) -> None:
    """Show how a figure of CELL moved over time, or of every cell: where its level changed, and what changed with it.

    CELL is a cell's name, its model, or a part of model/target/backend/precision/device.
    """
    from edgedeploy.history.store import open_store
    from edgedeploy.render.trend_figures import refreshed_sentences

    tell = console.progress(quiet)
    with open_store(results, store, lab=console.setting("lab_name", ""), rebuild=rebuild) as opened:
        if push:
            _push(opened, as_json, tell)
            return
        refreshed = opened.refresh(tell)
        for sentence in refreshed_sentences(refreshed, opened.where):
            tell(sentence)
        if cell:
            key = opened.cell_named(cell, device=device)
            found = opened.trends(metric, cell=key, last=last or 0)
        else:
            found = opened.trends(metric, device=device, last=last or (_MOST_DRAWN if html else 0))
    if device and not found:
        raise UsageError(f"no run was measured on a device {device!r}; edgedeploy history lists all cells with theirs")
    if html is not None:
        _write_page(html, found)
    if as_json:
        _print_json(cell, found, refreshed)
        return
    from edgedeploy.render.trend_text import cells_text, trend_text

    color, width = console.uses_color(), console.terminal_width()
    if cell:
        click.echo(trend_text(found[0][1], color=color, width=width))
    else:
        click.echo(cells_text([row for row, _ in found], color=color, width=width))
    if html is not None:
        click.echo(f"page: {html}")


def _push(opened: Any, as_json: bool, tell: Any) -> None:
    from edgedeploy.documents import to_builtins
    from edgedeploy.render.figures import count
    from edgedeploy.render.trend_figures import refreshed_sentences

    pushed = opened.push(tell)
    if as_json:
        console.print_json({"format": "edgedeploy.pushed/1", **to_builtins(pushed)})
        return
    for sentence in refreshed_sentences(pushed, opened.where):
        click.echo(sentence, err=True)
    click.echo(
        f"sent {count(pushed.runs, 'run')}, {count(pushed.verdicts, 'verdict')} and "
        f"{count(pushed.passports, 'passport')} to {opened.where} as {opened.lab}; "
        f"{count(pushed.known, 'file')} had been sent before"
    )


def _write_page(path: Path, found: Any) -> None:
    from edgedeploy.render.trend_html import history_html
    from edgedeploy.results import utc_now
    from edgedeploy.storage import write_atomic

    write_atomic(path, history_html(found, made_utc=utc_now()).encode())


def _print_json(cell: str, found: Any, refreshed: Any) -> None:
    from edgedeploy.documents import to_builtins

    skipped = to_builtins(refreshed)["skipped"]
    if cell:
        (row, trend) = found[0]
        body = {"format": "edgedeploy.trend/1", "row": to_builtins(row), **to_builtins(trend), "skipped": skipped}
    else:
        body = {"format": "edgedeploy.history/1", "cells": [to_builtins(row) for row, _ in found], "skipped": skipped}
    console.print_json(body)
