"""The steps of one measuring session as they happen: what a journal keeps, and a session is continued from."""

from __future__ import annotations

from edgedeploy.documents import Record
from edgedeploy.records.device import DeviceFacts
from edgedeploy.records.model import Fidelity
from edgedeploy.records.run import Boundary, LayerTime, MemoryVisit, Outputs, Visit


class SideBegun(Record, frozen=True, kw_only=True):
    """One side of a session: what must still be the same when it is continued.

    Attributes:
        runtime: the provisioned runtime on the device; "": what its Python has.
    """

    cell: str
    artifact_sha256: str
    session_sha256: str
    inputs_sha256: str
    runtime: str = ""


class Begun(Record, frozen=True, kw_only=True, tag_field="step", tag="begun"):
    """A device was reached for the first time; all runs of the session carry these words."""

    session: str
    started_utc: str
    device: str
    facts: DeviceFacts
    runner_sha256: str
    schedule: str
    seed: int
    sides: tuple[SideBegun, ...]
    settings_applied: dict[str, str] = {}
    settings_refused: dict[str, str] = {}


class Continued(Record, frozen=True, kw_only=True, tag_field="step", tag="continued"):
    """The device was reached again: after a lost link, or by another process.

    Attributes:
        event: a sentence for the run's readers.
    """

    utc: str
    boot_id: str
    event: str


class Shipped(Record, frozen=True, kw_only=True, tag_field="step", tag="shipped"):
    """Everything that the sides name is on the device.

    Attributes:
        sent: digests that had to be copied.
    """

    sent: tuple[str, ...]


class GoldenAnswered(Record, frozen=True, kw_only=True, tag_field="step", tag="golden"):
    """A side answers on the device what its model answers."""

    side: int
    fidelity: Fidelity


class OutputsComputed(Record, frozen=True, kw_only=True, tag_field="step", tag="outputs"):
    """A side has answered the evaluation set."""

    side: int
    outputs: Outputs
    runtime: str
    boundary: Boundary


class MemoryMeasured(Record, frozen=True, kw_only=True, tag_field="step", tag="memory"):
    """A side's peak memory was measured once more."""

    side: int
    visit: MemoryVisit


class OperatorsTimed(Record, frozen=True, kw_only=True, tag_field="step", tag="operators"):
    """A side's operators were timed one by one; `event` says why there are none."""

    side: int
    layers: tuple[LayerTime, ...]
    event: str = ""


class Taken(Record, frozen=True, kw_only=True):
    """One side's visit in a block, marked by the conditions it was taken in."""

    side: int
    visit: Visit
    runtime: str
    boundary: Boundary


class BlockEnded(Record, frozen=True, kw_only=True, tag_field="step", tag="block"):
    """A block is over.

    Attributes:
        taken: its visits; of a block that failed those that had been measured until then.
        failure: why it does not count; "" where it does.
        is_fatal: the session ends with it.
        is_lost: the device or the way to it was lost: no fault of what was measured.
    """

    block: int
    taken: tuple[Taken, ...]
    failure: str = ""
    is_fatal: bool = False
    is_lost: bool = False


class SentinelVisited(Record, frozen=True, kw_only=True, tag_field="step", tag="sentinel"):
    """The small model that never changes was visited, before the first block or after the last.

    Attributes:
        number: which one, where the sides run on different runtimes.
        is_end: after the last block.
        visit: None where it failed or was left out; `event` then says why.
    """

    number: int
    is_end: bool
    visit: Visit | None
    event: str = ""


Step = (
    Begun
    | Continued
    | Shipped
    | GoldenAnswered
    | OutputsComputed
    | MemoryMeasured
    | OperatorsTimed
    | SentinelVisited
    | BlockEnded
)
