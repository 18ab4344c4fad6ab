"""Builders on a device: ask what is there, have files made from shipped ones, and fetch them verified."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from edgedeploy.documents import Record
from edgedeploy.errors import DeviceError
from edgedeploy.lab import answers, bundle
from edgedeploy.lab.conversation import Agent, Progress
from edgedeploy.lab.transport import Transport

PROBE_TIMEOUT_S = 60.0
# No engine is larger than this; what says that it is, is not fetched.
MOST_BYTES = 8 << 30


class Made(Record, frozen=True, kw_only=True):
    """A file that a builder made, which lies among the device's objects."""

    sha256: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    size_bytes: Annotated[int, msgspec.Meta(ge=0, le=MOST_BYTES)]


def probe(agent: Agent, builder_sha256: str) -> dict[str, Any]:
    """Return what a builder, which has been shipped, finds on the device.

    Raises:
        DeviceError: it crashed or could not be loaded.
    """
    answer = agent.ask("probe", visit="probe", builder=builder_sha256, timeout_s=PROBE_TIMEOUT_S)
    if not isinstance(answer.get("found"), dict):
        raise DeviceError(f"{agent.label}: the builder found {answer.get('found')!r:.200}, which is no table")
    return answers.read(answer["found"], dict[str, Any], agent.label, "probe")


def build(
    agent: Agent,
    builder_sha256: str,
    files: Mapping[str, str],
    options: Mapping[str, Any],
    *,
    timeout_s: float,
    hear: Callable[[Progress], None],
) -> tuple[dict[str, Any], dict[str, Made]]:
    """Have a builder work on the device, in a process of its own.

    Args:
        files: the builder's name of a file → digest; all have been shipped.
        options: the back end's.
        timeout_s: after which the build is killed.
        hear: called with how far it is.

    Returns:
        What the builder reports, and the files that it made.

    Raises:
        VisitFailed: it refused, crashed or did not end; the text has its last lines.
        DeviceError: what it answered is not what a builder answers.
    """
    job = {"builder": builder_sha256, "files": dict(files), "options": dict(options)}
    answer = agent.ask("build", visit="build", hear=hear, job=job, timeout_s=timeout_s)
    try:
        made = msgspec.convert(answer["made"], dict[str, Made])
        report = msgspec.convert(answers.bounded(answer["report"]), dict[str, Any])
    except (KeyError, ValueError, msgspec.ValidationError) as error:
        raise DeviceError(f"{agent.label}: the builder's answer is not one: {error}") from error
    return report, made


def fetch(agent: Agent, transport: Transport, made: Made, local: Path) -> None:
    """Copy a file that a builder made, whole or not at all.

    Raises:
        TransferError: it did not arrive, or something else did.
    """
    bundle.fetch(agent, transport, "objects", made.sha256, made.size_bytes, local)
