"""Bundles as text for a terminal: what was packed, and what verifying one showed. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from edgedeploy.records.bundle import Bundle, BundledCell, BundleVerification, Replay
from edgedeploy.records.installation import BundleOnDevice
from edgedeploy.records.model import Fidelity
from edgedeploy.render.figures import count, one_line, printable
from edgedeploy.render.text import table
from edgedeploy.units import format_bytes, format_duration

_WIDTH = 100  # where nobody says how wide the reader's screen is
_COLUMNS = ("cell", "for", "runtime", "precision", "decision", "what was found")


def verification_text(found: BundleVerification, *, color: bool, width: int | None) -> str:
    """Return who signed what, what was decided about it, and what it answered here.

    Args:
        found: what verifying returned.
        color: with ANSI styles.
        width: columns; None for 100.
    """
    columns = width or _WIDTH
    bundle = found.bundle
    head = [
        f"{found.file}: verified ({format_bytes(found.size_bytes)}, {count(len(bundle.files) + 2, 'member')})",
        f"  signed with the key {found.key_sha256}",
        f"  {_release(bundle)}",
    ]
    parts = ["\n".join(head), _cells(bundle.cells, color=color, width=columns)]
    judged = (
        f"not judged again: {found.not_rejudged}" if found.not_rejudged else "judged again from its raw runs: the same"
    )
    parts.append("\n".join([f"verdict {judged}", *(_replayed(one, found.bundle) for one in found.replays)]))
    notes = [
        f"the device half of {name} that is installed here is not the one of the bundle; the installed one was used"
        for name in found.session_differs
    ]
    parts.append(_listed([*notes, *bundle.absent], columns))
    return "\n\n".join(part for part in parts if part)


def packed_text(bundle: Bundle, *, file: str, size_bytes: int, key_sha256: str, notes: Sequence[str]) -> str:
    """Return what was packed, and what a reader of the bundle will not find in it.

    Args:
        bundle: its manifest.
        file: the bundle; size_bytes: its length.
        key_sha256: of the signer's public key; "": it is not signed.
        notes: what else its maker should know.
    """
    signed = f"signed with the key {key_sha256}" if key_sha256 else "NOT SIGNED: nobody can verify it (--sign KEY.pem)"
    head = [f"{file}: {format_bytes(size_bytes)}, {_release(bundle)}", f"  {signed}"]
    head += [f"  {one_line(cell.cell)}: {one_line(cell.summary) or cell.role}" for cell in bundle.cells]
    return "\n".join([*head, *(line for line in [_listed([*notes, *bundle.absent], _WIDTH)] if line)])


def _release(bundle: Bundle) -> str:
    return (
        f"{one_line(bundle.name)} {one_line(bundle.version)}, sequence {bundle.sequence}: {bundle.decision}, "
        f"judged {one_line(bundle.created)}"
    )


def _cells(cells: Sequence[BundledCell], *, color: bool, width: int) -> str:
    rows = [
        (
            one_line(cell.cell),
            one_line(f"{cell.target} ({cell.requires.machine or 'any machine'})"),
            one_line(f"{cell.requires.runtime.name} {cell.requires.runtime.versions}".strip()),
            cell.precision,
            cell.decision or cell.role,
            one_line(cell.summary),
        )
        for cell in cells
    ]
    return table("What it is for", _COLUMNS, rows, color=color, width=width)


def _replayed(one: Replay, bundle: Bundle) -> str:
    if one.fidelity is None:
        return f"{one_line(one.cell)}: golden answers not replayed: {printable(one.reason)}"
    cell = next(cell for cell in bundle.cells if cell.cell == one.cell)
    runtime = one_line(cell.requires.backend)
    return f"{one_line(one.cell)}: golden answers replayed with {runtime} on this machine: {_sameness(one.fidelity)}"


def _sameness(found: Fidelity) -> str:
    worst = max((output.max_relative for output in found.outputs), default=0.0)
    how = f"largest difference {worst:.2g} of the largest value, {count(found.samples, 'sample')}"
    return f"the same ({how})"


def _listed(sentences: Sequence[str], columns: int) -> str:
    return "\n".join(
        line
        for one in sentences
        for line in textwrap.wrap(printable(one), columns, initial_indent="- ", subsequent_indent="  ")
    )


def on_device_text(found: BundleOnDevice) -> str:
    """Return what a device said of a bundle that it checked by itself."""
    lines = [
        f"{one_line(found.device)} ({one_line(found.machine)}) verified it too, in {format_duration(found.seconds)}"
    ]
    for cell in found.cells:
        if cell.golden is None:
            lines.append(f"{one_line(cell.cell)}: golden answers not replayed there: {printable(cell.note)}")
        else:
            lines.append(f"{one_line(cell.cell)}: golden answers replayed there: {_sameness(cell.golden)}")
    return "\n".join([*lines, *(f"not for it: {printable(one)}" for one in found.unfit)])
