"""The host's end of the runner's JSON lines: a state machine without I/O, and a thin driver over a channel."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from edgedeploy.errors import DeviceBusy, DeviceError, DeviceUnreachable, LeaseLost, TransferError, VisitFailed
from edgedeploy.lab import answers
from edgedeploy.lab.transport import Channel
from edgedeploy.records.device import DeviceFacts, DeviceSettings
from edgedeploy.records.run import Conditions

PROTOCOL = 2
# A login shell may greet on stdout before our runner starts; more than this is not a greeting.
GREETING_LINES = 100
# A device's log line may be of any length; a terminal's is not.
PROGRESS_CHARACTERS = 200
# The end of what a process printed is 20 lines; a word for programs is one word.
STDERR_CHARACTERS = 16384
KIND_CHARACTERS = 64
# What a command without a limit of its own may take, however lively the heartbeats: hashing a full card.
LONGEST_ANSWER_S = 3600.0


@dataclass(frozen=True, slots=True)
class Hello:
    """What the runner says first."""

    runner_sha256: str
    python: str
    facts: DeviceFacts
    lease: answers.Lease


@dataclass(frozen=True, slots=True)
class Busy:
    """Another agent holds the device, for `expires_s` more unless it renews."""

    holder: str
    expires_s: float


@dataclass(frozen=True, slots=True)
class Waiting:
    """We are in the queue for a device that another agent holds."""

    holder: str
    position: int
    of: int


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


Event = Hello | Busy | Waiting | Heartbeat | Progress | Answer | Refusal


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
            # Not json.loads, which takes NaN, lone surrogates and numbers beyond a float for good.
            event = msgspec.json.decode(line, type=dict[str, Any])
            name = event.pop("event")
        except (msgspec.DecodeError, ValueError, KeyError, RecursionError) as error:
            text = line[:800].decode("utf-8", "replace")[:200]
            if not self._has_greeted and len(self.greeting) < GREETING_LINES:
                self.greeting.append(text)
                return None
            raise DeviceError(f"the runner said {text!r}, which is not a line of its protocol") from error
        try:
            return self._understand(name, event)
        except (KeyError, TypeError, ValueError, msgspec.ValidationError) as error:
            raise DeviceError(f"the runner sent an incomplete {answers.told(name)!r} event: {error}") from error

    def _understand(self, name: object, event: dict[str, Any]) -> Event:
        if name == "heartbeat":
            return Heartbeat()
        if name == "progress":
            done, total = (msgspec.convert(event.get(key), int | None) for key in ("done", "total"))
            return Progress(answers.clipped(event["text"], PROGRESS_CHARACTERS), done, total)
        if name == "busy":
            return Busy(answers.told(event["holder"]), msgspec.convert(event["expires_s"], answers.Seconds))
        if name == "waiting":
            position, of = (msgspec.convert(event[key], answers.Count) for key in ("position", "of"))
            return Waiting(answers.told(event["holder"]), position, of)
        if name == "hello":
            if event["protocol"] != PROTOCOL:
                raise DeviceError(
                    f"the runner speaks protocol {answers.told(event['protocol'])}, this edgedeploy speaks {PROTOCOL}; "
                    "upgrade the older of the two"
                )
            self._has_greeted = True
            answers.bounded(event)
            return Hello(
                str(event["runner_sha256"]),
                str(event["python"]),
                msgspec.convert(event["facts"], DeviceFacts),
                msgspec.convert(event["lease"], answers.Lease),
            )
        number = event.pop("id")
        if number != self._waiting_for and self._has_greeted:
            raise DeviceError(f"the runner answered command {answers.told(number)}, but {self._waiting_for} was asked")
        self._waiting_for = None
        if name == "answer":
            return Answer(event)
        if name == "error":
            tail = answers.clipped(event.get("stderr_tail", ""), STDERR_CHARACTERS)
            return Refusal(answers.clipped(event["kind"], KIND_CHARACTERS), answers.clipped(event["message"]), tail)
        raise DeviceError(
            f"the runner sent the unknown event {answers.told(name)!r}; is it newer than this edgedeploy?"
        )


def _limit_s(fields: Mapping[str, object]) -> float:
    """Return how long the runner itself lets a command take: each of the visits that it names has its time."""
    timeout_s, visits = fields.get("timeout_s"), fields.get("visits")
    if not isinstance(timeout_s, (int, float)):
        return LONGEST_ANSWER_S
    return timeout_s * (len(visits) if isinstance(visits, list) else 1)


class Agent:
    """The runner's agent on one device, for as long as the channel is open.

    Every error names the device, the visit and what happened.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        label: str,
        root: str,
        silence_s: float,
        name: str = "NAME",
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Wrap a channel.

        Args:
            channel: a running `runner.py agent`.
            label: how errors name the device.
            root: where files are kept on the device.
            silence_s: the longest silence before the device counts as lost.
            name: the device's in lab.toml.
            progress: told why we wait.
        """
        self.label, self.root, self.name, self.progress = label, root, name, progress
        self._sending, self._closing = threading.Lock(), threading.Event()
        self._settings = DeviceSettings()
        self._channel, self._silence_s = channel, silence_s
        self._conversation = Conversation()
        self._hello: Hello | None = None
        self._allowed: frozenset[str] = frozenset()
        self.settings_applied: dict[str, str] = {}
        self.settings_refused: dict[str, str] = {}
        self.start_again: Callable[[], None] = self._cannot_start_again

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
        while isinstance(event := self._next("starting the runner"), Waiting):
            place = f"{ordinal(event.position)} of {event.of} in the queue"
            self.progress(f"{self.name}: waiting for {answers.visible(event.holder)} ({place})")
        if isinstance(event, Busy):
            raise DeviceBusy(
                f"{self.label} is in use by {answers.visible(event.holder)}; its lease ends in {event.expires_s:.0f} s "
                f"unless it is renewed; queue for it with --wait 10m, or see what taking it away would break: "
                f"edgedeploy devices release {self.name}"
            )
        if isinstance(event, Refusal) and event.kind == "busy":
            raise DeviceBusy(f"{self.label} is in use: {event.message}")
        if isinstance(event, Refusal):
            raise DeviceError(f"{self.label}: the runner could not start: {event.message}")
        if not isinstance(event, Hello):
            raise DeviceError(f"{self.label}: the runner did not say hello but {answers.told(event)}")
        self._hello = event
        threading.Thread(target=self._renew, args=(event.lease.seconds / 4,), daemon=True).start()
        return event

    def _cannot_start_again(self) -> None:
        raise DeviceUnreachable(f"{self.label}: the connection to the runner was lost; connect again")

    def take_over(self, fresh: Agent) -> None:
        """Go on with another conversation with the same device: this one's connection was lost."""
        self.close()
        allowed = self._allowed
        vars(self).update(vars(fresh))
        self._allowed = allowed

    def _renew(self, period_s: float) -> None:
        """Keep the lease for as long as this process runs, whatever its other threads do."""
        while not self._closing.wait(period_s):
            try:
                self._send(b'{"do":"renew"}')
            except DeviceError:  # whoever talks to the device sees it too, and says what was going on
                return

    def _send(self, line: bytes) -> None:
        with self._sending:
            self._channel.send_line(line)

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
            LeaseLost: the device is ours no more.
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
            self._send(self._conversation.command(do, **fields))
        except DeviceUnreachable as error:
            raise DeviceUnreachable(f"{error}, before {what} could be asked{self._last_words()}") from error
        limit_s = _limit_s(fields)
        latest_s = time.monotonic() + limit_s + self._silence_s
        while isinstance(event := self._next(what, latest_s), Progress):
            hear(event)
        if isinstance(event, Answer):
            return event.fields
        if not isinstance(event, Refusal):
            raise DeviceError(f"{self.label}: the runner answered {what} with {answers.told(event)}")
        tail = f"\nThe last lines that it printed:\n{event.stderr_tail}" if event.stderr_tail else ""
        message = f"{self.label}: {what} failed: {event.message}{tail}"
        if event.kind == "lease-lost":
            raise LeaseLost(message)
        if visit or do == "bursts":
            raise VisitFailed(message, kind=event.kind)
        refused = TransferError(message) if do == "commit" else DeviceError(message)
        refused.kind = event.kind
        raise refused

    def _next(self, what: str, latest_s: float = math.inf) -> Event:
        """Return the next event that is not a heartbeat; at `latest_s` of the monotonic clock a live device is lost."""
        deadline_s = time.monotonic() + self._silence_s
        while True:
            if time.monotonic() > latest_s:
                raise DeviceUnreachable(
                    f"{self.label} shows signs of life but never answers {what}, far beyond its time; start its runner "
                    f"anew by connecting again{self._last_words()}"
                )
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
        return "\nThe last lines that it printed:\n" + answers.visible("\n".join(lines)) if lines else ""

    def missing(self, digests: Sequence[str]) -> tuple[str, ...]:
        """Return which objects are not, or not whole, on the device."""
        said = answers.read(self.ask("have", digests=list(digests)), answers.Missing, self.label, "have")
        return tuple(digest for digest in digests if digest in said.missing)

    def commit(self, part: str, sha256: str) -> None:
        """Give an upload its name, after the device has verified it; raises TransferError when it is not whole."""
        self.ask("commit", part=part, sha256=sha256)

    def allow(self, digests: Iterable[str]) -> None:
        """Have the runner execute these files beside those that it was told before; one started anew knows of none."""
        self._allowed |= frozenset(digests)
        if self._allowed:
            self.ask("allow", digests=sorted(self._allowed))

    def conditions(self, visits: Sequence[str] = ()) -> dict[str, Conditions]:
        """Return the device's state now: one record per visit with its own CPU time, and one under "" without."""
        answer = self.ask("conditions", visits=list(visits))
        state = answers.read(answer, answers.State, self.label, "conditions")
        own_core_s = {"": None, **{visit: state.own_core_s.get(visit) for visit in visits}}
        return {
            visit: answers.read({**state.conditions, "own_core_s": own}, Conditions, self.label, "conditions")
            for visit, own in own_core_s.items()
        }

    def apply(self, settings: DeviceSettings) -> None:
        """Set the device as its entry in lab.toml asks; the runner undoes it when it ends, however it ends.

        What could not be set stands in `settings_refused`, with what would allow it.
        """
        self._settings = settings
        names = ("governor", "power_mode", "fixed_clocks", "cpu_affinity")
        unset = DeviceSettings()
        wanted = {name: getattr(settings, name) for name in names if getattr(settings, name) != getattr(unset, name)}
        if not wanted:
            return
        said = answers.read(
            self.ask("set", settings={**wanted, "sudo": settings.sudo}), answers.Applied, self.label, "set"
        )
        self.settings_applied = {name: answers.visible(text) for name, text in said.applied.items()}
        self.settings_refused = {name: answers.visible(text) for name, text in said.refused.items()}
        for name, why in self.settings_refused.items():
            self.progress(f"{self.name}: {name} stays as it is: {why}")

    def cool(self) -> answers.Cooled | None:
        """Wait until the device is as cool as its entry in lab.toml asks; None where it asks for nothing."""
        below_celsius, cap_s = self._settings.start_below_celsius, self._settings.cooling_cap_s
        if below_celsius is None:
            return None
        answer = self.ask(
            "cool",
            hear=lambda told: self.progress(f"{self.name}: {answers.visible(told.text)}"),
            below_celsius=below_celsius,
            cap_s=cap_s,
        )
        return answers.read(answer, answers.Cooled, self.label, "cool")

    def close(self) -> None:
        """End the runner and whatever it started; never raises."""
        self._closing.set()
        self._channel.close()


def ordinal(number: int) -> str:
    """Return a place in a row.

    >>> [ordinal(number) for number in (1, 2, 3, 4, 11, 21)]
    ['1st', '2nd', '3rd', '4th', '11th', '21st']
    """
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th") if number % 100 not in (11, 12, 13) else "th"
    return f"{number}{ending}"
