"""The host's end of the runner's JSON lines: a state machine without I/O, and a thin driver over a channel."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from edgedeploy.errors import DeviceBusy, DeviceError, DeviceUnreachable, TransferError, VisitFailed
from edgedeploy.lab.transport import Channel
from edgedeploy.records.device import DeviceFacts
from edgedeploy.records.run import Conditions

PROTOCOL = 1
# A login shell may greet on stdout before our runner starts; more than this is not a greeting.
GREETING_LINES = 100
# A device's log line may be of any length; a terminal's is not.
PROGRESS_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Hello:
    """What the runner says first."""

    runner_sha256: str
    python: str
    facts: DeviceFacts


@dataclass(frozen=True, slots=True)
class Busy:
    """Another agent holds the device."""

    holder: str


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The runner lives and is still at it."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a command is that takes minutes; `done` of `total` where they are known."""

    text: str
    done: int | None
    total: int | None


@dataclass(frozen=True, slots=True)
class Answer:
    """A command was done."""

    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A command could not be done.

    Attributes:
        kind: a word for programs: "died", "timeout", "missing-runtime", "bad-artifact", "bad-input" ...
        message: a sentence.
        stderr_tail: the last lines that the process concerned printed.
    """

    kind: str
    message: str
    stderr_tail: str


Event = Hello | Busy | Heartbeat | Progress | Answer | Refusal


class Conversation:
    """One conversation with one agent. Pure: lines in, events out.

    It starts by waiting for the runner's hello; then one command at a time is asked and answered.
    """

    def __init__(self) -> None:
        self._number = 0
        self._waiting_for: int | None = None
        self._has_greeted = False
        self.greeting: list[str] = []

    def command(self, do: str, **fields: object) -> bytes:
        """Return the line that asks for something.

        Raises:
            DeviceError: the answer to the last command has not come: the conversation is out of step.
        """
        if self._waiting_for is not None:
            raise DeviceError(f"cannot ask the runner for {do!r}: it still owes an answer; connect again")
        self._number += 1
        self._waiting_for = self._number
        return json.dumps({"id": self._number, "do": do, **fields}, allow_nan=False).encode()

    def feed(self, line: bytes) -> Event | None:
        """Return what a line means; None for a line of the login shell's greeting.

        Raises:
            DeviceError: it is not what the protocol allows.
        """
        try:
            event = json.loads(line)
            name = event.pop("event")
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            text = line.decode("utf-8", "replace")[:200]
            if not self._has_greeted and len(self.greeting) < GREETING_LINES:
                self.greeting.append(text)
                return None
            raise DeviceError(f"the runner said {text!r}, which is not a line of its protocol") from error
        try:
            return self._understand(name, event)
        except (KeyError, TypeError, msgspec.ValidationError) as error:
            raise DeviceError(f"the runner sent an incomplete {name!r} event: {error}") from error

    def _understand(self, name: object, event: dict[str, Any]) -> Event:
        if name == "heartbeat":
            return Heartbeat()
        if name == "progress":
            done, total = (msgspec.convert(event.get(key), int | None) for key in ("done", "total"))
            return Progress(str(event["text"])[:PROGRESS_CHARACTERS], done, total)
        if name == "busy":
            return Busy(str(event["holder"]))
        if name == "hello":
            if event["protocol"] != PROTOCOL:
                raise DeviceError(
                    f"the runner speaks protocol {event['protocol']}, this edgedeploy speaks {PROTOCOL}; "
                    "upgrade the older of the two"
                )
            self._has_greeted = True
            return Hello(
                str(event["runner_sha256"]), str(event["python"]), msgspec.convert(event["facts"], DeviceFacts)
            )
        number = event.pop("id")
        if number != self._waiting_for and self._has_greeted:
            raise DeviceError(f"the runner answered command {number}, but {self._waiting_for} was asked")
        self._waiting_for = None
        if name == "answer":
            return Answer(event)
        if name == "error":
            return Refusal(str(event["kind"]), str(event["message"]), str(event.get("stderr_tail", "")))
        raise DeviceError(f"the runner sent the unknown event {name!r}; is it newer than this edgedeploy?")


class Agent:
    """The runner's agent on one device, for as long as the channel is open.

    Every error names the device, the visit and what happened.
    """

    def __init__(self, channel: Channel, *, label: str, root: str, silence_s: float) -> None:
        """Wrap a channel.

        Args:
            channel: a running `runner.py agent`.
            label: how errors name the device.
            root: where files are kept on the device.
            silence_s: the longest silence before the device counts as lost.
        """
        self.label, self.root = label, root
        self._channel, self._silence_s = channel, silence_s
        self._conversation = Conversation()
        self._hello: Hello | None = None

    @property
    def facts(self) -> DeviceFacts:
        """Return what the device is."""
        return self._greeted().facts

    @property
    def runner_sha256(self) -> str:
        """Return the digest of the runner that is running."""
        return self._greeted().runner_sha256

    @property
    def python(self) -> str:
        """Return the interpreter that runs it."""
        return self._greeted().python

    def _greeted(self) -> Hello:
        assert self._hello is not None, "greet() comes first"
        return self._hello

    def greet(self) -> Hello:
        """Wait for the runner's hello.

        Raises:
            DeviceBusy: another agent holds the device.
            DeviceUnreachable: it ended, or said nothing.
            DeviceError: it is not our runner, or another protocol.
        """
        event = self._next("starting the runner")
        if isinstance(event, Busy):
            raise DeviceBusy(f"{self.label} is in use by {event.holder}; wait for it, or stop it there")
        if isinstance(event, Refusal):
            raise DeviceError(f"{self.label}: the runner could not start: {event.message}")
        if not isinstance(event, Hello):
            raise DeviceError(f"{self.label}: the runner did not say hello but {event}")
        self._hello = event
        return event

    def ask(
        self,
        do: str,
        *,
        visit: str = "",
        visits: Sequence[str] = (),
        hear: Callable[[Progress], None] = lambda progress: None,
        **fields: object,
    ) -> dict[str, Any]:
        """Ask for something and wait for the answer; what is said meanwhile goes to `hear`.

        Raises:
            VisitFailed: the runner refused, or the visit died or hung; `kind` says which.
            TransferError: an upload did not arrive whole.
            DeviceUnreachable: the connection or the runner itself was lost.
        """
        if do == "bursts":
            what = f"{do} in visit {' and '.join(map(repr, dict.fromkeys(visits)))}"
        else:
            what = f"{do} in visit {visit!r}" if visit else do
        if visit:
            fields["visit"] = visit
        if visits:
            fields["visits"] = list(visits)
        try:
            self._channel.send_line(self._conversation.command(do, **fields))
        except DeviceUnreachable as error:
            raise DeviceUnreachable(f"{error}, before {what} could be asked{self._last_words()}") from error
        while isinstance(event := self._next(what), Progress):
            hear(event)
        if isinstance(event, Answer):
            return event.fields
        if not isinstance(event, Refusal):
            raise DeviceError(f"{self.label}: the runner answered {what} with {event}")
        tail = f"\nThe last lines that it printed:\n{event.stderr_tail}" if event.stderr_tail else ""
        message = f"{self.label}: {what} failed: {event.message}{tail}"
        if visit or do == "bursts":
            raise VisitFailed(message, kind=event.kind)
        raise TransferError(message) if do == "commit" else DeviceError(message)

    def _next(self, what: str) -> Event:
        """Return the next event that is not a heartbeat."""
        deadline_s = time.monotonic() + self._silence_s
        while True:
            try:
                line = self._channel.receive_line(deadline_s - time.monotonic())
            except DeviceUnreachable as error:
                raise DeviceUnreachable(f"{error}, during {what}{self._last_words()}") from error
            if line is None:
                raise DeviceUnreachable(
                    f"{self.label} fell silent during {what}: not even a heartbeat for {self._silence_s:g} s; "
                    f"check its power and network{self._last_words()}"
                )
            try:
                event = self._conversation.feed(line)
            except DeviceError as error:
                raise DeviceError(f"{self.label}: {error}{self._last_words()}") from error
            if event is None:
                continue
            if not isinstance(event, Heartbeat):
                return event
            deadline_s = time.monotonic() + self._silence_s

    def _last_words(self) -> str:
        """Return what the runner, or the shell before it, printed, as a tail for a message."""
        lines = [*self._conversation.greeting[-5:], *self._channel.stderr_tail().splitlines()]
        return "\nThe last lines that it printed:\n" + "\n".join(lines) if lines else ""

    def missing(self, digests: Sequence[str]) -> tuple[str, ...]:
        """Return which objects are not, or not whole, on the device."""
        return tuple(self.ask("have", digests=list(digests))["missing"])

    def commit(self, part: str, sha256: str) -> None:
        """Give an upload its name, after the device has verified it; raises TransferError when it is not whole."""
        self.ask("commit", part=part, sha256=sha256)

    def conditions(self, visits: Sequence[str] = ()) -> dict[str, Conditions]:
        """Return the device's state now: one record per visit with its own CPU time, and one under "" without."""
        answer = self.ask("conditions", visits=list(visits))
        own: Mapping[str, float | None] = {"": None, **answer["own_core_s"]}
        return {
            visit: msgspec.convert({**answer["conditions"], "own_core_s": own_core_s}, Conditions)
            for visit, own_core_s in own.items()
        }

    def close(self) -> None:
        """End the runner and whatever it started; never raises."""
        self._channel.close()
