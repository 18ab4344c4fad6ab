"""The verbs that bring a bundle to a device and build it again: install, rollback, reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgedeploy.cli import console
from edgedeploy.documents import as_document, to_builtins
from edgedeploy.errors import UsageError

_SLOT = "default"
_device_option = click.option("--device", default="local", show_default=True, help="See: edgedeploy devices list.")
_key_option = click.option("--key", type=click.Path(path_type=Path), help="The signer's public key, PEM.")
_slot_option = click.option(
    "--slot", default=_SLOT, show_default=True, help="What an application of the device finds its model by."
)


@click.command(
    epilog="""\b
Examples:
  edgedeploy install release-1.4.0.edb.tar --key release.pub.pem --device orin-desk-2
  edgedeploy install --list --device orin-desk-2
On the device, an application reads the first line of installed/default/current, which names the folder in use.
""",
)
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@_key_option
@_device_option
@click.option("--cell", default="", help="Which artifact. [default: the one that fits the device best]")
@click.option("--min-sequence", type=click.IntRange(0), default=0, help="Refuse a release before this one.")
@_slot_option
@click.option("--allow-downgrade", is_flag=True, help="Also one that is older than what is installed.")
@click.option("--list", "only_list", is_flag=True, help="Show what is installed, and install nothing.")
@console.lab_option
@console.wait_option
@console.quiet_option
@console.json_option
def install_command(
    bundle: Path | None,
    key: Path | None,
    device: str,
    cell: str,
    min_sequence: int,
    slot: str,
    allow_downgrade: bool,
    only_list: bool,
    lab: Path | None,
    wait_s: float,
    quiet: bool,
    as_json: bool,
) -> None:
    """Put a bundle's artifact in place on a device.

    The bundle is checked here and by the device itself, and the artifact answers its golden inputs there, before it
    takes the place of what is installed, in one step. What was there is kept for: edgedeploy rollback.
    """
    from edgedeploy import catalogue, installing

    entry = catalogue.device(device, lab)
    progress = console.progress(quiet)
    if only_list:
        if bundle is not None:
            raise UsageError("--list shows what is installed and installs nothing; leave the bundle out")
        _show_slots(installing.installed(device, entry, progress, wait_s=wait_s), as_json)
        return
    if bundle is None or key is None:
        raise UsageError(
            "say what to install and whose signature it must have: edgedeploy install BUNDLE --key KEY.pub.pem"
        )
    done = installing.install(
        installing.InstallRequest(
            bundle=bundle,
            key=key,
            device_name=device,
            device=entry,
            cell=cell,
            slot=slot,
            min_sequence=min_sequence,
            allow_downgrade=allow_downgrade,
            wait_s=wait_s,
        ),
        progress,
    )
    if as_json:
        console.print_json(as_document(done))
        return
    one = done.installed
    said = "uses" if done.is_new else "used before, and uses,"
    click.echo(f"{device}: slot {slot} {said} {one.bundle} {one.version} (sequence {one.sequence}), cell {one.cell}")
    click.echo(f"file: {done.path}/releases/{one.release}/{one.file}")
    click.echo(f"replay: {_replay_text(done.replay)}")
    if done.replaced:
        click.echo(f"before: {done.replaced}; back to it: edgedeploy rollback --device {device}{_slot_words(slot)}")


def _slot_words(slot: str) -> str:
    return "" if slot == _SLOT else f" --slot {slot}"


def _replay_text(replay: Any) -> str:
    if replay.golden is None:
        return str(replay.note)
    largest = max((output.max_relative for output in replay.golden.outputs), default=0.0)
    return (
        f"{replay.golden.samples} golden inputs were answered on the device as when it was built "
        f"(largest difference {largest:.1e} of the largest value)"
    )


def _show_slots(slots: Any, as_json: bool) -> None:
    states = {(one.slot, one.used): "in use" for one in slots} | {
        (one.slot, one.previous): "before" for one in slots if one.previous
    }
    rows = [
        [one.slot, states.get((one.slot, release.release), "not used"), release.bundle, release.version,
         str(release.sequence), release.cell, release.release]
        for one in slots
        for release in one.releases
    ]  # fmt: skip
    rows += [[one.slot, f"damaged: {one.problem}", "", "", "", "", ""] for one in slots if one.problem]
    heads = ("slot", "state", "bundle", "version", "sequence", "cell", "release")
    if not rows and not as_json:
        click.echo("nothing is installed there", err=True)
        return
    console.print_list("installed", heads, rows, [to_builtins(one) for one in slots], as_json)


@click.command(epilog="Example: edgedeploy rollback --device orin-desk-2")
@_device_option
@_slot_option
@console.lab_option
@console.wait_option
@console.quiet_option
@console.json_option
def rollback_command(device: str, slot: str, lab: Path | None, wait_s: float, quiet: bool, as_json: bool) -> None:
    """Go back to what a device used before the last installation, in one step."""
    from edgedeploy import catalogue, installing

    entry = catalogue.device(device, lab)
    done = installing.rollback(device, entry, console.progress(quiet), slot=slot, wait_s=wait_s)
    if as_json:
        console.print_json(as_document(done))
        return
    click.echo(
        f"{device}: slot {slot} uses {done.used.bundle} {done.used.version} (sequence {done.used.sequence}) again, no "
        f"longer {done.left.version} (sequence {done.left.sequence})"
    )


@click.command(
    epilog="""\b
Examples:
  edgedeploy reproduce release-1.4.0.edb.tar --key release.pub.pem
  edgedeploy reproduce release-1.4.0.edb.tar --key release.pub.pem --release old/edgedeploy.toml --keep rebuilt
""",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(path_type=Path), required=True, help="The signer's public key, PEM.")
@click.option(
    "--release",
    type=click.Path(path_type=Path),
    help="Beside which the sources are. [default: the bundle's own, and .]",
)
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Keep what is built in this folder.")
@console.trust_pickle_option
@console.quiet_option
@console.json_option
def reproduce_command(
    bundle: Path,
    key: Path,
    release: Path | None,
    keep: Path | None,
    trust_pickle: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Build a bundle's artifacts again from their recipes, and say which came out the same.

    Exit code 0: each is the same byte for byte, or answers its golden inputs alike. 1: one differs. 3: one could not be
    built; what differs between then and now is named.
    """
    from edgedeploy.reproduce import reproduce

    done = reproduce(bundle, key, console.progress(quiet), release=release, keep=keep, trust_pickle=trust_pickle)
    if as_json:
        console.print_json(as_document(done))
    else:
        _show_reproduction(done)
    if done.is_reproduced:
        return 0
    return 1 if any(cell.state == "differs" for cell in done.cells) else 3


_WORDS = {"identical": "byte-identical", "equal": "numerically equal", "same kit": "same kit"}


def _show_reproduction(done: Any) -> None:
    rows = [
        [
            cell.cell,
            _WORDS.get(cell.state, cell.state),
            "" if cell.largest is None else f"{cell.largest:.2g} {cell.unit}",
            "\n".join((*([cell.note] if cell.note else []), *cell.changes)),
        ]
        for cell in done.cells
    ]
    console.print_table(
        f"{done.bundle} {done.version}", ("cell", "built again", "largest difference", "what differs"), rows
    )
