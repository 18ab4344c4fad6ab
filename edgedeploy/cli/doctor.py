"""doctor: what is missing here, and the command that fixes it."""

from __future__ import annotations

from pathlib import Path

import click

from edgedeploy.cli import console


@click.command(epilog="Example: edgedeploy doctor")
@console.lab_option
@console.json_option
def doctor_command(lab: Path | None, as_json: bool) -> None:
    """Say what is installed, what is missing and the command that fixes it, and where each setting comes from.

    A missing optional part is not a failure: the exit code stays 0.
    """
    from edgedeploy import catalogue

    findings = catalogue.examine(lab)
    if as_json:
        documents = [{"part": part, "state": state, "next": command} for part, state, command in findings]
        console.print_json({"format": "edgedeploy.doctor/1", "findings": documents})
        return
    from edgedeploy.render.text import table

    rows = [list(finding) for finding in findings]
    columns = ("part", "state", "what to do")
    click.echo(table("Doctor", columns, rows, color=console.uses_color(), width=console.terminal_width()))
