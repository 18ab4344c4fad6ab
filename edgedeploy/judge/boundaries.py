"""What two runs must have alike in what was timed before they are compared. Pure: no I/O, no clock."""

from __future__ import annotations

from edgedeploy.records.run import Run

_COPIES = {"includes_input_copy": "inputs", "includes_output_copy": "outputs"}


def differing_field(baseline: Run, candidate: Run) -> str | None:
    """Return the first field of the boundaries that keeps two runs from being compared, or None.

    Threads and batch must be equal. Copies too within one runtime, where a difference means that the measuring has
    changed; what another runtime has to copy in each inference is part of what it costs. `detail` is for readers: two
    runtimes, or two precisions of one, never say the same.
    """
    if baseline.boundary is None or candidate.boundary is None:
        return None
    copies = _COPIES if baseline.artifact.backend == candidate.artifact.backend else {}
    for field in (*copies, "threads", "batch"):
        if getattr(baseline.boundary, field) != getattr(candidate.boundary, field):
            return field
    return None


def unlike_copies(baseline: Run, candidate: Run) -> tuple[str, ...]:
    """Say which copies are inside the timed region of one run only."""
    if baseline.boundary is None or candidate.boundary is None:
        return ()
    said: list[str] = []
    for field, what in _COPIES.items():
        before, after = getattr(baseline.boundary, field), getattr(candidate.boundary, field)
        if before != after:
            sides = ("the baseline", "the candidate") if before else ("the candidate", "the baseline")
            said.append(f"the timed region of {sides[0]} includes a copy of the {what}, that of {sides[1]} does not")
    return tuple(said)
