"""doctor: what is missing here and what is trusted, each with what to do about it."""

from __future__ import annotations

from pathlib import Path

import click

from edgedeploy.cli import console


@click.command(epilog="Examples: edgedeploy doctor; edgedeploy doctor --security --lab lab.toml")
@click.option("--security", is_flag=True, help="Say what is trusted, here and on the way to every device, and why.")
@console.lab_option
@console.json_option
def doctor_command(security: bool, lab: Path | None, as_json: bool) -> None:
    """Say what is installed, what is missing and the command that fixes it, and where each setting comes from.

    A missing optional part is not a failure: the exit code stays 0. Neither is a weakness that --security finds.
    """
    from edgedeploy import catalogue

    if security:
        _show_security(lab, as_json)
        return
    findings = catalogue.examine(lab)
    if as_json:
        documents = [{"part": part, "state": state, "next": command} for part, state, command in findings]
        console.print_json({"format": "edgedeploy.doctor/1", "findings": documents})
        return
    from edgedeploy.render.text import table

    rows = [list(finding) for finding in findings]
    columns = ("part", "state", "what to do")
    click.echo(table("Doctor", columns, rows, color=console.uses_color(), width=console.terminal_width()))


def _show_security(lab: Path | None, as_json: bool) -> None:
    import dataclasses

    from edgedeploy import catalogue
    from edgedeploy.lab.trust import NOT_PROTECTED

    trusted = catalogue.security(lab)
    if as_json:
        console.print_json(
            {
                "format": "edgedeploy.security/1",
                "trusted": [dataclasses.asdict(one) for one in trusted],
                "not_protected": list(NOT_PROTECTED),
            }
        )
        return
    from edgedeploy.render.figures import count
    from edgedeploy.render.text import table

    color, width = console.uses_color(), console.terminal_width()
    for subject in dict.fromkeys(one.subject for one in trusted):
        rows = [[one.part, one.what, one.why] for one in trusted if one.subject == subject]
        click.echo(table(f"Trusted: {subject}", ("part", "what", "why"), rows, color=color, width=width) + "\n")
    weak = [[one.subject, one.part, one.weakness] for one in trusted if one.weakness]
    title = count(len(weak), "weakness", "weaknesses") if weak else "No weakness was found"
    click.echo(table(title, ("where", "part", "what is weak, and what to do"), weak, color=color, width=width))
    click.echo("\nNot protected:\n" + "\n".join(f"- {one}" for one in NOT_PROTECTED))
