"""A labgrid coordinator: its places, who holds each, and how one is acquired and given back.

A place that is acquired stays so until somebody releases it: labgrid knows no expiry. Therefore we acquire under a name
that is used once and says which process it is, `host/user#edgedeploy.<pid>.<start>.<where>.<once>`: what is released is
only ever what was acquired under that name, and a process that is seen to be dead on this machine need not be waited
for. The coordinator takes every name on trust and speaks without encryption; what keeps strangers off a device is its
host key and ours.

Each call is a short conversation of its own with a limit on its time. The messages are those of labgrid's own package.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import queue
import re
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedeploy.documents import closest
from edgedeploy.errors import DeviceBusy, DeviceError, DeviceUnreachable, ToolchainError, UsageError

DEFAULT_PORT = 20408  # labgrid's own
MISSING = "labgrid, whose places are named in lab.toml, is not installed here; pip install 'edgedeploy[labgrid]'"
# More places and resources than any lab has; a coordinator that sends more is none.
MOST_UPDATES = 100_000
# What a coordinator's words may be: they end up in our messages and in the way to a device.
_TOLD_CHARACTERS = 200
_ADDRESS = re.compile(r"[A-Za-z0-9_:][A-Za-z0-9._:%-]{0,252}")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@\\-]{0,63}")
_OURS = re.compile(
    r"(?P<person>.+)#edgedeploy\.(?P<pid>\d{1,10})\.(?P<start>\d{1,20})\.(?P<where>[0-9a-f]{12})\.\w{1,16}"
)
_WAITING, _ALLOCATED = 0, 1  # labgrid's ReservationState
_BROKEN = "<broken>"  # what labgrid writes where the place would stand that has a resource


@dataclass(frozen=True, slots=True)
class Service:
    """A NetworkService that a place has: where its device's SSH server is.

    Attributes:
        name: as labgrid writes it, "exporter/group/NetworkService/name".
        user: "" where the resource does not say.
        jump: the host to go through; "" where it can be reached directly.
    """

    name: str
    address: str
    port: int
    user: str = ""
    jump: str = ""
    is_available: bool = True


@dataclass(frozen=True, slots=True)
class Place:
    """A place as the coordinator knows it.

    Attributes:
        holder: who acquired it; "" when it is free.
        reservation: the token of the reservation that it is kept for; "" when it is kept for nobody.
        services: where SSH servers of its resources are.
        absent: patterns of its resources that no connected exporter has.
        lent: its resources that another place has acquired, and that place.
        resources: how many resources it matches.
    """

    name: str
    comment: str = ""
    aliases: tuple[str, ...] = ()
    holder: str = ""
    reservation: str = ""
    services: tuple[Service, ...] = ()
    absent: tuple[str, ...] = ()
    lent: tuple[tuple[str, str], ...] = ()
    resources: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """A reservation, on its way to the head of the queue.

    Attributes:
        is_ours: whether the place is kept for us now; else `position` of `of` wait.
    """

    is_ours: bool
    position: int = 0
    of: int = 0


@dataclass(frozen=True, slots=True)
class Coordinator:
    """Where a coordinator is.

    Attributes:
        address: "host:port".
        timeout_s: the longest that one conversation may take.
    """

    address: str
    timeout_s: float = 10.0

    def places(self) -> dict[str, Place]:
        """Return every place, by name.

        Raises:
            DeviceUnreachable: the coordinator cannot be reached, or speaks another protocol.
            ToolchainError: labgrid is not installed here.
        """
        with self._conversation() as conversation:
            return conversation.places()

    def place(self, name: str) -> Place:
        """Return one place, by its name or alias.

        Raises:
            UsageError: there is none; naming the likely intended one.
        """
        found = self.places()
        if name in found:
            return found[name]
        for place in found.values():
            if name in place.aliases:
                return place
        names = sorted(map(told, found))
        known = ", ".join(names[:20]) or "none"
        raise UsageError(
            f"the labgrid coordinator {self.address} has no place {name!r}{closest(name, names)} (it has: {known})"
        )

    def acquire(self, name: str, holder: str) -> bool:
        """Acquire a place under a name of `new_holder`; say whether it was free.

        Raises:
            DeviceError: it is free, and the coordinator refuses all the same.
        """
        with self._conversation(holder) as conversation:
            refusal = conversation.acquire(name)
        if not refusal:
            return True
        place = self.place(name)
        if place.holder or place.reservation or place.lent:
            return False
        raise DeviceError(f"{self._who(name)} could not be acquired: {refusal}")

    def release(self, name: str, holder: str) -> None:
        """Give a place back if it is still that holder's; nothing happens when it is not."""
        with self._conversation() as conversation:
            conversation.release(name, holder)

    def reserve(self, name: str, holder: str) -> str:
        """Queue for a place, to acquire it under that name; the coordinator forgets it when nobody asks for a minute.

        Returns:
            The token to ask with.
        """
        with self._conversation(holder) as conversation:
            return conversation.reserve(name)

    def turn(self, token: str) -> Turn | None:
        """Ask how far a reservation has come, which keeps it alive; None when the coordinator has forgotten it."""
        with self._conversation() as conversation:
            return conversation.turn(token)

    def cancel(self, token: str) -> None:
        """Leave the queue; a reservation that is gone already is not an error."""
        with self._conversation() as conversation:
            conversation.cancel(token)

    def force_release(self, name: str) -> str:
        """Take a place away from whoever holds it, and return who that was, in words.

        Raises:
            UsageError: nobody holds it, or there is no such place.
            DeviceBusy: it changed hands meanwhile.
        """
        place = self.place(name)
        if not place.holder:
            raise UsageError(f"{self._who(place.name)} is held by nobody; there is nothing to release")
        self.release(place.name, place.holder)
        after = self.place(place.name).holder
        if after:
            raise DeviceBusy(f"{self._who(place.name)} was just acquired by {told_holder(after)}; ask again")
        return told_holder(place.holder)

    def why_busy(self, place: Place) -> str:
        """Say who or what keeps a place from being acquired."""
        if place.holder:
            return f"is in use by {told_holder(place.holder)}"
        if place.reservation:
            with self._conversation() as conversation:
                owner = conversation.owner(place.reservation)
            return f"is reserved for {told_holder(owner)}" if owner else "is reserved"
        if place.lent and place.lent[0][1] == _BROKEN:
            return f"has {place.lent[0][0]}, which its exporter calls broken; restart labgrid-exporter there"
        if place.lent:
            return f"shares {place.lent[0][0]} with the place {place.lent[0][1]!r}, which is in use"
        return "was in use a moment ago"

    def _who(self, place: str) -> str:
        return f"the place {place!r} of the labgrid coordinator {self.address}"

    @contextlib.contextmanager
    def _conversation(self, name: str = "") -> Iterator[_Conversation]:
        """Talk to the coordinator under a name; whatever goes wrong becomes a sentence."""
        try:
            import grpc
            from labgrid.remote.generated import labgrid_coordinator_pb2, labgrid_coordinator_pb2_grpc
        except ImportError as error:
            raise ToolchainError(MISSING) from error

        host, _, port = self.address.rpartition(":")
        target = self.address if host and port.isdigit() else f"{self.address}:{DEFAULT_PORT}"
        # The coordinator tells its clients apart by their connections, which gRPC would share between threads.
        channel = grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)])
        stub = labgrid_coordinator_pb2_grpc.CoordinatorStub(channel)
        conversation = _Conversation(stub, labgrid_coordinator_pb2, self.timeout_s)
        try:
            conversation.begin(name or own_person())
            yield conversation
        except grpc.RpcError as error:
            raise DeviceUnreachable(self._sentence(error)) from error
        finally:
            conversation.end()
            channel.close()

    def _sentence(self, error: Any) -> str:
        import grpc

        code, details = error.code(), told(error.details() or "")
        who = f"the labgrid coordinator {self.address}"
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"{who} did not answer within {self.timeout_s:g} s; is it frozen, or the network down?"
        if code in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
            return (
                f"{who} does not speak the protocol of labgrid {_labgrid_version()} ({details}); is it another "
                "version's, or no coordinator at all?"
            )
        if code is grpc.StatusCode.UNAVAILABLE:
            return f"{who} cannot be reached ({details}); is labgrid-coordinator running there, and is the port right?"
        return f"{who} refuses: {details or code.name}"


class _Conversation:
    """One stream to the coordinator, and the requests that count as its sender's.

    Args:
        stub: labgrid's.
        messages: labgrid's module of messages.
        timeout_s: the limit of the whole conversation, and of each request.
    """

    def __init__(self, stub: Any, messages: Any, timeout_s: float) -> None:
        self._stub, self._messages, self._timeout_s = stub, messages, timeout_s
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stream: Any = None
        self._places: dict[str, Any] = {}
        self._resources: dict[tuple[str, str, str], Any] = {}

    def begin(self, name: str) -> None:
        """Say who we are, and read all places and resources."""
        send = self._messages.ClientInMessage
        version = _labgrid_version()
        self._outbox.put(send(startup=self._messages.StartupDone(version=version, name=name)))
        self._outbox.put(send(subscribe=self._messages.Subscribe(all_places=True)))
        self._outbox.put(send(subscribe=self._messages.Subscribe(all_resources=True)))
        self._outbox.put(send(sync=self._messages.Sync(id=1)))
        self._stream = self._stub.ClientStream(iter(self._outbox.get, None), timeout=self._timeout_s)
        updates = 0
        for message in self._stream:
            updates += len(message.updates)
            if updates > MOST_UPDATES:
                raise DeviceUnreachable(f"a labgrid coordinator sent more than {MOST_UPDATES} places and resources")
            for update in message.updates:
                self._take(update)
            if message.HasField("sync") and message.sync.id == 1:
                return
        raise DeviceUnreachable("a labgrid coordinator ended the conversation before it had told its places")

    def _take(self, update: Any) -> None:
        kind = update.WhichOneof("kind")
        if kind == "place":
            self._places[update.place.name] = update.place
        elif kind == "resource":
            path = update.resource.path
            self._resources[path.exporter_name, path.group_name, path.resource_name] = update.resource

    def end(self) -> None:
        """Close the stream."""
        self._outbox.put(None)
        if self._stream is not None:
            self._stream.cancel()

    def places(self) -> dict[str, Place]:
        """Return what was read."""
        return {name: _place(message, self._resources) for name, message in self._places.items()}

    def acquire(self, name: str) -> str:
        """Acquire; return why not, or ""."""
        import grpc

        try:
            self._stub.AcquirePlace(self._messages.AcquirePlaceRequest(placename=name), timeout=self._timeout_s)
        except grpc.RpcError as error:
            if error.code() not in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.PERMISSION_DENIED):
                raise
            return told(error.details() or error.code().name)
        return ""

    def release(self, name: str, holder: str) -> None:
        request = self._messages.ReleasePlaceRequest(placename=name, fromuser=holder)
        self._stub.ReleasePlace(request, timeout=self._timeout_s)

    def reserve(self, name: str) -> str:
        group = self._messages.Reservation.Filter(filter={"name": name})
        request = self._messages.CreateReservationRequest(filters={"main": group}, prio=0.0)
        return str(self._stub.CreateReservation(request, timeout=self._timeout_s).reservation.token)

    def turn(self, token: str) -> Turn | None:
        import grpc

        request = self._messages.PollReservationRequest(token=token)
        try:
            mine = self._stub.PollReservation(request, timeout=self._timeout_s).reservation
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                raise
            return None
        if mine.state == _ALLOCATED:
            return Turn(is_ours=True)
        if mine.state != _WAITING:
            return None
        queued = [one for one in self._reservations() if one.state == _WAITING and _wants(one) == _wants(mine)]
        order = [one.token for one in sorted(queued, key=lambda one: (-one.prio, one.created))]
        return Turn(is_ours=False, position=order.index(token) + 1 if token in order else len(order), of=len(order))

    def cancel(self, token: str) -> None:
        import grpc

        request = self._messages.CancelReservationRequest(token=token)
        try:
            self._stub.CancelReservation(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                raise

    def owner(self, token: str) -> str:
        return next((one.owner for one in self._reservations() if one.token == token), "")

    def _reservations(self) -> list[Any]:
        answer = self._stub.GetReservations(self._messages.GetReservationsRequest(), timeout=self._timeout_s)
        return list(answer.reservations)


def _wants(reservation: Any) -> str:
    return str(reservation.filters["main"].filter.get("name", "")) if "main" in reservation.filters else ""


def _place(message: Any, resources: dict[tuple[str, str, str], Any]) -> Place:
    """Return a place with what the connected exporters have for it."""
    from labgrid.remote.common import ResourceMatch

    patterns = [ResourceMatch.from_pb2(one) for one in message.matches]
    found = {
        "/".join((exporter, group, resource.cls, name)): resource
        for (exporter, group, name), resource in resources.items()
        if any(pattern.ismatch((exporter, group, resource.cls, name)) for pattern in patterns)
    }
    absent = [one for one in patterns if not any(one.ismatch(tuple(path.split("/", 3))) for path in found)]
    return Place(
        name=message.name,
        comment=told(message.comment),
        aliases=tuple(message.aliases),
        holder=message.acquired,
        reservation=message.reservation,
        services=tuple(
            service
            for path, resource in sorted(found.items())
            if resource.cls == "NetworkService" and (service := _service(path, resource)) is not None
        ),
        absent=tuple(told(str(pattern)) for pattern in absent),
        lent=tuple(
            (told(path), told(one.acquired)) for path, one in found.items() if one.acquired not in ("", message.name)
        ),
        resources=len(found),
    )


def _service(path: str, resource: Any) -> Service | None:
    """Return where an SSH server is; None where the exporter's words cannot be an address."""
    from labgrid.remote.common import build_dict_from_map

    params, extra = build_dict_from_map(resource.params), build_dict_from_map(resource.extra)
    address, port, user = str(params.get("address", "")), params.get("port", 22), str(params.get("username", ""))
    jump = str(extra.get("proxy", "")) if extra.get("proxy_required") is True else ""
    is_sound = (
        _ADDRESS.fullmatch(address) is not None
        and type(port) is int
        and 0 < port <= 65535
        and (not user or _USER.fullmatch(user) is not None)
        and (not jump or _ADDRESS.fullmatch(jump) is not None)
    )
    return Service(told(path), address, port, user, jump, bool(resource.avail)) if is_sound else None


# ---------------------------------------------------------------- names


def new_holder() -> str:
    """Return a name for this process to acquire one place under, once."""
    start, where = _start(os.getpid()), _where()
    # Without /proc nobody can see later whether the process still lives, and the name does not say when it began.
    process = f"{os.getpid()}.{start}.{where}" if start and where else str(os.getpid())
    return f"{own_person()}#edgedeploy.{process}.{secrets.token_hex(4)}"


def own_person() -> str:
    """Return who `labgrid-client` would be here: LG_HOSTNAME/LG_USERNAME, else this host and user."""
    host = os.environ.get("LG_HOSTNAME") or socket.gethostname()
    return f"{host}/{os.environ.get('LG_USERNAME') or getpass.getuser()}"


def is_dead(holder: str) -> bool:
    """Say whether a holder is a process of ours on this machine that has ended; False where that cannot be known."""
    match = _OURS.fullmatch(holder)
    return match is not None and match["where"] == _where() and _start(int(match["pid"])) != match["start"]


def told_holder(holder: str) -> str:
    """Say a holder in words.

    >>> told_holder("bench/alice#edgedeploy.4242.98765.0123456789ab.1f"), told_holder("bench/alice")
    ('alice on bench (edgedeploy, process 4242)', 'alice on bench')
    """
    person, _, process = holder.partition("#edgedeploy.")
    host, _, user = person.partition("/")
    words = f"{user} on {host}" if user else host
    return told(f"{words} (edgedeploy, process {process.partition('.')[0]})" if process else words)


def told(text: str) -> str:
    r"""Return what a coordinator said, fit for a line of ours.

    >>> told("a\x1b[31m\nb")
    'a?[31m?b'
    """
    return "".join(letter if letter.isprintable() else "?" for letter in text[:_TOLD_CHARACTERS])


def _start(pid: int) -> str:
    """Return when a process started, in the kernel's ticks since boot; "" where there is none, or no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


def _where() -> str:
    """Return what tells this boot and set of process numbers from every other; "" where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        numbers = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
    return hashlib.sha256(f"{boot} {numbers}".encode()).hexdigest()[:12]


def _labgrid_version() -> str:
    from labgrid.util.version import labgrid_version

    return str(labgrid_version())
