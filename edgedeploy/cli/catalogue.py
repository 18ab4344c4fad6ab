"""targets | devices | backends, each list | show | check."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from edgedeploy.cli import console
from edgedeploy.documents import Record, as_document, to_builtins


@click.group()
def targets_command() -> None:
    """Show the kinds of device that can be built for."""


@targets_command.command("list", epilog="Example: edgedeploy targets list")
@console.json_option
def list_targets(as_json: bool) -> None:
    """List every target."""
    from edgedeploy import catalogue

    targets = catalogue.targets()
    _list(
        "targets",
        ("target", "machine", "back ends", "description"),
        [
            [name, target.machine or "this machine", ", ".join(sorted(target.backends)), target.description]
            for name, target in targets.items()
        ],
        list(targets.values()),
        as_json,
    )


@targets_command.command("show", epilog="Example: edgedeploy targets show raspberry-pi-5")
@click.argument("name")
@console.json_option
def show_target(name: str, as_json: bool) -> None:
    """Show a target as it will be used here (`host` becomes what this machine is)."""
    from edgedeploy.build import this_target

    _show(this_target(name), as_json)


@targets_command.command("check", epilog="Example: edgedeploy targets check")
@console.json_option
def check_targets(as_json: bool) -> None:
    """Read every target file and say which are malformed."""
    from edgedeploy import catalogue

    targets = catalogue.targets()
    if as_json:
        console.print_json({"format": "edgedeploy.check/1", "checked": list(targets)})
    else:
        click.echo(f"{len(targets)} target files are well-formed: {', '.join(targets)}")


@click.group()
def devices_command() -> None:
    """Show the physical devices that can be reached."""


@devices_command.command("list", epilog="Example: edgedeploy devices list --lab lab.toml")
@console.lab_option
@console.json_option
def list_devices(lab: Path | None, as_json: bool) -> None:
    """List every device of the lab file, and `local`, without reaching any."""
    from edgedeploy import catalogue

    devices = catalogue.devices(lab)
    _list(
        "devices",
        ("device", "transport", "host", "user", "description"),
        [
            [name, one.transport, f"{one.host}:{one.port}" if one.port else one.host, one.user, one.description]
            for name, one in devices.items()
        ],
        [{"name": name, **to_builtins(one)} for name, one in devices.items()],
        as_json,
    )


@devices_command.command("show", epilog="Example: edgedeploy devices show local")
@click.argument("name")
@console.lab_option
@console.json_option
def show_device(name: str, lab: Path | None, as_json: bool) -> None:
    """Show how a device is reached, without reaching it."""
    from edgedeploy import catalogue

    _show(catalogue.device(name, lab), as_json)


@devices_command.command("check", epilog="Example: edgedeploy devices check orin-desk-2")
@click.argument("names", nargs=-1)
@console.lab_option
@console.quiet_option
@console.json_option
def check_devices(names: tuple[str, ...], lab: Path | None, quiet: bool, as_json: bool) -> int:
    """Reach devices (default: all), start the runner there and say what each is. Exit code 3 if one fails."""
    from edgedeploy import catalogue

    checks = catalogue.check_devices(names, lab, console.progress(quiet))
    rows = []
    for check in checks:
        reached = check.facts is not None
        rows.append([check.name, "reached" if reached else "FAILED", _facts_line(check.facts) or check.problem])
        rows += [["", one.part, f"{one.state}; {one.next}" if one.next else one.state] for one in check.findings]
    documents = [
        {
            "name": check.name,
            "reached": check.facts is not None,
            "facts": to_builtins(check.facts) if check.facts else None,
            "problem": check.problem,
            "findings": [{"part": one.part, "state": one.state, "next": one.next} for one in check.findings],
        }
        for check in checks
    ]
    _list("devices", ("device", "state", "what it is, or what went wrong"), rows, documents, as_json)
    return 0 if all(check.facts for check in checks) else 3


def _facts_line(facts: Any) -> str:
    if facts is None:
        return ""
    return (
        f"{facts.machine}, {facts.cores} cores, {facts.cpu_model or 'CPU model not available'}, Python {facts.python}"
    )


@click.group()
def backends_command() -> None:
    """Show the runtimes that can be compiled for."""


@backends_command.command("list", epilog="Example: edgedeploy backends list")
@console.json_option
def list_backends(as_json: bool) -> None:
    """List every back end, whether it can compile here, and the command that makes it able to."""
    from edgedeploy.backends import load_backends

    found, broken = load_backends()
    rows = [
        [name, ", ".join(sorted(one.precisions)), one.builds_on, one.missing() or "ready"]
        for name, one in sorted(found.items())
    ]
    rows += [[name, "", "", f"broken plugin: {problem}"] for name, problem in sorted(broken.items())]
    documents = [dict(zip(("name", "precisions", "builds_on", "state"), row, strict=True)) for row in rows]
    _list("backends", ("back end", "precisions", "builds on", "here"), rows, documents, as_json)


@backends_command.command("show", epilog="Example: edgedeploy backends show onnxruntime")
@click.argument("name")
@console.json_option
def show_backend(name: str, as_json: bool) -> None:
    """Show a back end's precisions and its options (-O key=value) with their defaults."""
    import dataclasses

    from edgedeploy.backends import backend

    one = backend(name)
    options = {field.name: field.default for field in dataclasses.fields(one.options)}
    document = {
        "format": "edgedeploy.backend/1",
        "name": one.name,
        "precisions": sorted(one.precisions),
        "builds_on": one.builds_on,
        "options": options,
        "missing": one.missing(),
    }
    if as_json:
        console.print_json(document)
        return
    rows = [[f"-O {key}=", str(value)] for key, value in options.items()]
    _list(f"{one.name}: {', '.join(sorted(one.precisions))}", ("option", "default"), rows, [], as_json=False)


@backends_command.command("check", epilog="Example: edgedeploy backends check onnxruntime")
@click.argument("names", nargs=-1)
@console.json_option
def check_backends(names: tuple[str, ...], as_json: bool) -> int:
    """Say whether back ends (default: all) can compile here. Exit code 3 if one cannot."""
    from edgedeploy.backends import backend, load_backends

    found, broken = load_backends()
    states = {name: backend(name).missing() for name in (names or (*sorted(found), *sorted(broken)))}
    rows = [[name, reason or "ready"] for name, reason in states.items()]
    documents = [{"name": name, "missing": reason} for name, reason in states.items()]
    _list("backends", ("back end", "here"), rows, documents, as_json)
    return 3 if any(states.values()) else 0


def _list(noun: str, columns: Sequence[str], rows: list[list[str]], documents: Sequence[Any], as_json: bool) -> None:
    if as_json:
        items = [to_builtins(one) if isinstance(one, Record) else one for one in documents]
        console.print_json({"format": f"edgedeploy.{noun}/1", noun: items})
        return
    from edgedeploy.render.text import table

    click.echo(table(noun.capitalize(), columns, rows, color=console.uses_color(), width=console.terminal_width()))


def _show(record: Record, as_json: bool) -> None:
    if as_json:
        console.print_json(as_document(record))
        return
    from edgedeploy.render.text import table

    rows = [[key, _flat(value)] for key, value in to_builtins(record).items() if value not in ("", [], {}, None)]
    click.echo(table("", ("key", "value"), rows, color=console.uses_color(), width=console.terminal_width()))


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_flat(inner)}" for key, inner in value.items() if inner not in ("", [], {}, None))
    if isinstance(value, list):
        return ", ".join(_flat(inner) for inner in value)
    return str(value)
