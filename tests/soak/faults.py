"""What strikes: a seeded storm of faults, each on one device or on the host, and each taken back after a while."""

from __future__ import annotations

import collections
import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .hosts import Campaign, Host, is_past_start
from .spots import Spot

# Seconds from one strike to the next.
PAUSE_S = (2.0, 6.0)
# The longest a host may take to give its devices back after Ctrl-C.
FAREWELL_S = 60.0

Heal = Callable[[], None]


class NotNowError(Exception):
    """There is nothing that this fault could strike."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind.

    Attributes:
        strike: makes it happen and returns what takes it back.
        hold_s: how long it lasts, at least and at most.
        is_on_host: it strikes the measuring process, not a device.
        weight: how often beside others.
    """

    kind: str
    strike: Callable[[Storm, Spot], Heal]
    hold_s: tuple[float, float] = (0.0, 0.0)
    is_on_host: bool = False
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class _Struck:
    fault: Fault
    spot: Spot
    heal: Heal
    until_s: float


class Storm:
    """Faults that strike while a campaign goes on.

    Attributes:
        struck: kind → how often; during: (kind, log of the host that measured then) of each.
        rivals: other hosts that want a device.
    """

    def __init__(self, campaign: Campaign, spots: list[Spot], seed: int) -> None:
        self.campaign, self._spots = campaign, spots
        self.random = random.Random(seed)
        self.struck: collections.Counter[str] = collections.Counter()
        self.during: list[tuple[str, Path]] = []
        self.rivals: list[Host] = []
        self.log = campaign.folder / "logs" / "storm.log"
        self._active: list[_Struck] = []
        self._next_s = time.monotonic() + self.random.uniform(*PAUSE_S)

    def step(self) -> None:
        """Take back what has lasted long enough, and strike when it is time."""
        now_s = time.monotonic()
        for one in [one for one in self._active if one.until_s <= now_s]:
            self._heal(one)
        for rival in [one for one in self.rivals if not one.is_alive()]:
            self.rivals.remove(rival)
            self.campaign.reap(rival)
        if now_s >= self._next_s:
            self._next_s = now_s + self.random.uniform(*PAUSE_S)
            self._strike()

    def calm(self) -> None:
        """Take everything back."""
        for one in list(self._active):
            self._heal(one)
        for rival in self.rivals:
            rival.wait(200.0)
            self.campaign.reap(rival)
        self.rivals.clear()

    def _strike(self) -> None:
        """Let one fault happen that can happen now."""
        free = [spot for spot in self._spots if all(one.spot is not spot for one in self._active)]
        if not free:
            return
        kinds = list(FAULTS)
        while kinds:
            (fault,) = self.random.choices(kinds, [one.weight for one in kinds])
            kinds.remove(fault)
            spot = self.random.choice(free)
            hold_s = self.random.uniform(*fault.hold_s)
            try:
                heal = fault.strike(self, spot)
            except NotNowError:
                continue
            self.struck[fault.kind] += 1
            self.during.append((fault.kind, self.campaign.host.log if self.campaign.host else Path()))
            where = "host" if fault.is_on_host else spot.name
            self._note(f"{fault.kind} at {where} for {hold_s:.1f} s, round {self.campaign.rounds}")
            self._active.append(_Struck(fault, spot, heal, time.monotonic() + hold_s))
            return

    def _heal(self, one: _Struck) -> None:
        self._active.remove(one)
        one.heal()
        self._note(f"{one.fault.kind} at {one.spot.name} is over")

    def _note(self, text: str) -> None:
        with self.log.open("a") as stream:
            stream.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def _nothing() -> None:
    """Leave it as it is: it heals by itself."""


# ------------------------------------------------------------------------------------------------ the link


def _cut(how: str) -> Callable[[Storm, Spot], Heal]:
    def strike(storm: Storm, spot: Spot) -> Heal:
        _demand(spot.link.connections)
        spot.link.cut(how)  # type: ignore[arg-type]
        return _nothing

    return strike


def _refuse(storm: Storm, spot: Spot) -> Heal:
    spot.link.refuse()
    spot.link.cut()
    return spot.link.admit


def _stall(storm: Storm, spot: Spot) -> Heal:
    _demand(spot.link.connections)
    spot.link.stall()
    return spot.link.resume


def _half_open(storm: Storm, spot: Spot) -> Heal:
    _demand(spot.link.connections)
    spot.link.half_open()
    return _nothing


def _slow(storm: Storm, spot: Spot) -> Heal:
    spot.link.delay_s, spot.link.rate = 0.08, 300e3

    def heal() -> None:
        spot.link.delay_s, spot.link.rate = 0.0, 0.0

    return heal


def _cut_after(storm: Storm, spot: Spot) -> Heal:
    spot.link.cut_after(storm.random.randrange(1 << 20))
    return _nothing


# ------------------------------------------------------------------------------------------------ the device


def _sessions_killed(storm: Storm, spot: Spot) -> Heal:
    _demand(spot.board.own_sessions())
    spot.board.cut()
    return _nothing


def _sshd_frozen(storm: Storm, spot: Spot) -> Heal:
    spot.board.freeze()
    return spot.board.thaw


def _killed(role: str, number: signal.Signals) -> Callable[[Storm, Spot], Heal]:
    def strike(storm: Storm, spot: Spot) -> Heal:
        _demand(spot.send(role, number))
        return _nothing

    return strike


def _stopped(role: str) -> Callable[[Storm, Spot], Heal]:
    def strike(storm: Storm, spot: Spot) -> Heal:
        processes = _demand(spot.send(role, signal.SIGSTOP))

        def heal() -> None:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    if spot.root.encode() in _command_of(process):
                        os.kill(process, signal.SIGCONT)

        return heal

    return strike


def _disk_full(storm: Storm, spot: Spot) -> Heal:
    _demand(spot.has_disk)
    spot.fill_disk()
    return spot.free_disk


def _throttled(storm: Storm, spot: Spot) -> Heal:
    spot.identity.throttle()
    return lambda: spot.identity.throttle(0)


# ------------------------------------------------------------------------------------------------ hosts


def _host_killed(storm: Storm, spot: Spot) -> Heal:
    _living(storm).send(signal.SIGKILL)
    return _nothing


def _host_interrupted(storm: Storm, spot: Spot) -> Heal:
    host = _living(storm)
    _demand(is_past_start(host))
    host.send(signal.SIGINT)
    host.wait(FAREWELL_S)
    return _nothing


def _host_frozen(storm: Storm, spot: Spot) -> Heal:
    host = _living(storm)
    host.send(signal.SIGSTOP)
    host.is_frozen = True

    def heal() -> None:
        host.is_frozen = False
        with contextlib.suppress(ProcessLookupError):
            host.send(signal.SIGCONT)

    return heal


def _rival(storm: Storm, spot: Spot) -> Heal:
    _demand(not storm.rivals)
    artifact = storm.campaign.folder / "rival" / "artifact"
    lab, wait = storm.campaign.folder / "lab.toml", storm.random.choice(("0", "20s"))
    words = ["bench", str(artifact), "--device", spot.name, "--visits", "1", "--lab", str(lab), "--wait", wait]
    storm.rivals.append(storm.campaign.command(*words, own="rival"))
    return _nothing


def _living(storm: Storm) -> Host:
    host = storm.campaign.host
    _demand(host is not None and host.is_alive() and not host.is_frozen)
    assert host is not None
    return host


def _demand(found: object) -> list[int]:
    """Raise NotNowError where there is nothing to strike."""
    if not found:
        raise NotNowError
    return found if isinstance(found, list) else []


def _command_of(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


FAULTS = (
    Fault("link cut (fin)", _cut("fin")),
    Fault("link cut (rst)", _cut("rst")),
    Fault("link cut after n bytes", _cut_after),
    Fault("link refuses", _refuse, (1.0, 12.0)),
    Fault("link stalls", _stall, (1.0, 15.0)),
    Fault("link half-open", _half_open),
    Fault("link slow", _slow, (5.0, 20.0)),
    Fault("sshd sessions killed", _sessions_killed),
    Fault("sshd frozen", _sshd_frozen, (1.0, 12.0)),
    Fault("runner killed", _killed("agent", signal.SIGKILL)),
    Fault("runner stopped", _stopped("agent"), (1.0, 10.0)),
    Fault("watchdog killed", _killed("watchdog", signal.SIGKILL)),
    Fault("visit killed", _killed("visit", signal.SIGKILL)),
    Fault("visit crashed", _killed("visit", signal.SIGSEGV), weight=0.5),
    Fault("visit stopped", _stopped("visit"), (1.0, 10.0)),
    Fault("disk full", _disk_full, (2.0, 15.0), weight=0.6),
    Fault("throttled", _throttled, (2.0, 20.0), weight=0.6),
    Fault("host killed", _host_killed, is_on_host=True, weight=0.6),
    Fault("host interrupted", _host_interrupted, is_on_host=True, weight=0.3),
    Fault("host frozen", _host_frozen, (1.0, 10.0), is_on_host=True, weight=0.5),
    Fault("second host", _rival, weight=0.7),
)
