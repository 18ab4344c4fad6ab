"""targets | backends, each list | show | check."""

from __future__ import annotations

import click

from edgedeploy.cli import console


@click.group()
def targets_command() -> None:
    """Show the kinds of device that can be built for."""


@targets_command.command("list", epilog="Example: edgedeploy targets list")
@console.json_option
def list_targets(as_json: bool) -> None:
    """List every target."""
    from edgedeploy import catalogue

    targets = catalogue.targets()
    console.print_list(
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

    console.print_record(this_target(name), as_json)


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
    console.print_list("backends", ("back end", "precisions", "builds on", "here"), rows, documents, as_json)


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
    console.print_list(
        f"{one.name}: {', '.join(sorted(one.precisions))}", ("option", "default"), rows, [], as_json=False
    )


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
    console.print_list("backends", ("back end", "here"), rows, documents, as_json)
    return 3 if any(states.values()) else 0
