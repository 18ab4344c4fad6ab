"""Every exception of edgedeploy, and the exit code that each means.

Whose fault an error is decides its class, so that a script can decide from the exit code alone what to do next::

    EdgedeployError
    ├── UsageError              2   the person: a flag, a file, a name
    │   └── DocumentError       2   a file that people or machines write is not what it should be
    ├── ModelError              3   the model: cannot be loaded, exported or kept faithful
    │   ├── UntrustedPickle     3
    │   ├── WeightsMismatch     3
    │   └── FidelityError       3
    ├── ToolchainError          3   what runs on the host to build
    │   ├── BackendMissing      3
    │   └── CompileError        3
    ├── DeviceError             3   the device or the way to it
    │   ├── DeviceUnreachable   3   could not be reached, or refused us
    │   │   ├── LoginRefused    3   is not who it should be, or does not let us in: trying again is of no use
    │   │   └── DeviceLost      3   lost in the middle, and it did not come back or was lost again
    │   ├── TransferError       3   a file did not arrive
    │   ├── DeviceBusy          3   another lease holds it
    │   ├── LeaseLost           3   we held it, and lost it
    │   └── VisitFailed         3   the runner or its child died, hung or refused
    ├── StoreError              3   the database that history is kept in
    ├── BundleRefused           1   there is evidence against a bundle: changed, signed by others, not for this device
    └── InternalError          70   us

Exit code 1 of the gate (it says no) and 4 (inconclusive) are verdicts, not errors.
"""

from __future__ import annotations

from typing import Any


class EdgedeployError(Exception):
    """An error whose text is a sentence for the person at the terminal."""

    exit_code = 3

    def __reduce__(self) -> tuple[Any, ...]:
        """Let an error of any class be pickled as it stands: its text is made. Causes that are not ours stay behind."""
        cause = self.__cause__ if isinstance(self.__cause__, EdgedeployError) else None
        return _restored, (type(self), self.args, dict(self.__dict__), cause)


def _restored(
    kind: type[EdgedeployError], args: tuple[Any, ...], attributes: dict[str, Any], cause: EdgedeployError | None
) -> EdgedeployError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    error.__cause__ = cause
    return error


class UsageError(EdgedeployError):
    """What the person asked for cannot be meant."""

    exit_code = 2


class DocumentError(UsageError):
    """A release file, lab file, manifest, run or data set is not what it should be."""


class ModelError(EdgedeployError):
    """The model cannot be loaded, exported or shown to be faithful."""


class UntrustedPickle(ModelError):
    """A file can only be read by running code that it contains."""


class WeightsMismatch(ModelError):
    """The weights do not fit the model."""


class FidelityError(ModelError):
    """A converted model does not compute what its source computes."""


class ToolchainError(EdgedeployError):
    """A tool on the host that is needed to build is missing or failed."""


class BackendMissing(ToolchainError):
    """A runtime or converter is not installed here."""


class CompileError(ToolchainError):
    """A back end could not compile the model.

    Args:
        message: what happened.
        backend: the back end's name.
        node: the node in the graph, where known.
        op: the operator, where known.
        hint: what to do next.
    """

    def __init__(self, message: str, *, backend: str, node: str = "", op: str = "", hint: str = "") -> None:
        self.backend, self.node, self.op, self.hint = backend, node, op, hint
        where = f" at node {node!r}" if node else ""
        what = f" ({op})" if op else ""
        then = f"; {hint}" if hint else ""
        super().__init__(f"{backend} could not compile the model{where}{what}: {message}{then}")


class DeviceError(EdgedeployError):
    """The device, or the way to it, failed.

    Attributes:
        measured: what the block that was interrupted had measured until then, marked as dropped.
        kind: a word for programs: the runner's, or "not-shipped"; "" where nobody asks.
    """

    measured: tuple[object, ...] = ()
    kind: str = ""


class DeviceUnreachable(DeviceError):
    """The device could not be reached, or would not let us in."""


class LoginRefused(DeviceUnreachable):
    """What answered is not who it should be, or does not let us in: trying again is of no use."""


class DeviceLost(DeviceUnreachable):
    """The device was lost in the middle of a session, and did not come back or was lost again."""


class TransferError(DeviceError):
    """A file did not arrive whole on the device, or back."""


class DeviceBusy(DeviceError):
    """Somebody else holds the device."""


class LeaseLost(DeviceError):
    """The device was ours and is no more: we were silent for too long, or somebody released it by force."""


class VisitFailed(DeviceError):
    """The runner or its child died, hung, or refused the job.

    Args:
        message: what happened.
        kind: a word for programs: "died", "timeout", "missing-runtime", "bad-artifact", "bad-input" ...
    """

    def __init__(self, message: str, *, kind: str = "") -> None:
        self.kind = kind
        super().__init__(message)


class StoreError(EdgedeployError):
    """The database that history is kept in cannot be reached, read or written."""


class BundleRefused(EdgedeployError):
    """There is evidence against a bundle: it was changed, signed by somebody else, or is not for this device."""

    exit_code = 1


class InternalError(EdgedeployError):
    """A bug in edgedeploy."""

    exit_code = 70
