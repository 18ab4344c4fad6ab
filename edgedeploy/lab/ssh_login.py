"""Log in to an SSH server, or say in one sentence why not: the host's key is checked before anything is sent.

Only keys, never passwords; a host key is never learnt here: the person accepts it with the command that the error
names.
"""

from __future__ import annotations

import base64
import errno
import hmac
import logging
import re
import shlex
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgedeploy.errors import DeviceUnreachable, DocumentError, LoginRefused, ToolchainError
from edgedeploy.lab.ssh_config import MISSING, Hop

if TYPE_CHECKING:
    import paramiko

_log = logging.getLogger(__name__)
_PARAMIKO_LOG = f"{__name__}.paramiko"
_KEEPALIVE_S = 15  # below the shortest idle limit that home routers and firewalls are known for (30 s)
_HASHED = re.compile(r"\|1\|([A-Za-z0-9+/]{27}=)\|([A-Za-z0-9+/]{27}=)")  # salt and digest, 20 bytes each
_USUAL_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")


class _ToDebug(logging.Handler):
    """Hand paramiko's records on as ours: its background thread logs tracebacks as errors, which we raise ourselves."""

    def emit(self, record: logging.LogRecord) -> None:
        _log.debug("paramiko: %s", record.getMessage())


def log_in(route: Sequence[Hop], label: str, *, connect_timeout_s: float, silence_s: float) -> list[paramiko.Transport]:
    """Log in to every server of a route, each through the one before; the last connection is the device's.

    Args:
        route: from `ssh_config.route`.
        label: how errors name the device.
        connect_timeout_s: the limit of each step: connecting, greeting, key exchange, each key.
        silence_s: how long the kernel waits for an answer on a dead link.

    Raises:
        DeviceUnreachable: with the reason and what to do next.
        ToolchainError: paramiko is missing.
    """
    try:
        import paramiko  # noqa: F401 (asked for here so that the reason is said before anything is opened)
    except ImportError as error:
        raise ToolchainError(MISSING) from error

    connections: list[paramiko.Transport] = []
    try:
        for hop in route:
            who = label if hop is route[-1] else f"the jump host {hop} of {label}"
            stream: socket.socket | paramiko.Channel
            if connections:
                stream = _through(connections[-1], hop, who, connect_timeout_s)
            else:
                stream = _connected_socket(hop, who, connect_timeout_s, silence_s)
            connections.append(_log_in_to(hop, stream, who, connect_timeout_s))
    except BaseException:
        log_out(connections)
        raise
    return connections


def shown_key(
    route: Sequence[Hop], label: str, *, connect_timeout_s: float, silence_s: float, kinds: Sequence[str] = ()
) -> paramiko.PKey:
    """Return the host key that the last server of a route shows: nothing is sent to it; the hops before are checked.

    Args:
        route: from `ssh_config.route`.
        label: how errors name the last server.
        connect_timeout_s: as in `log_in`.
        silence_s: as in `log_in`.
        kinds: types of key to ask for first: servers have several.

    Raises:
        DeviceUnreachable: with the reason and what to do next.
        ToolchainError: paramiko is missing.
    """
    *jumps, hop = route
    jump = f"the jump host {jumps[-1]} of {label}" if jumps else label
    before = log_in(jumps, jump, connect_timeout_s=connect_timeout_s, silence_s=silence_s)
    try:
        stream: socket.socket | paramiko.Channel
        if before:
            stream = _through(before[-1], hop, label, connect_timeout_s)
        else:
            stream = _connected_socket(hop, label, connect_timeout_s, silence_s)
        connection = _new_connection(stream, connect_timeout_s)
        try:
            _prefer(connection, kinds)
            _shake_hands(connection, hop, label, connect_timeout_s)
            return connection.get_remote_server_key()
        finally:
            connection.close()
            stream.close()
    finally:
        log_out(before)


def log_out(connections: Sequence[paramiko.Transport]) -> None:
    """Close connections, the device's first."""
    for connection in reversed(connections):
        connection.close()


def _connected_socket(hop: Hop, who: str, timeout_s: float, silence_s: float) -> socket.socket:
    try:
        stream = socket.create_connection((hop.host, hop.port), timeout=timeout_s)
    except socket.gaierror as error:
        raise DeviceUnreachable(
            f"{who} cannot be found: the name {hop.host!r} does not resolve ({error.strerror}); "
            "check host in lab.toml, or write an address"
        ) from error
    except TimeoutError as error:
        raise DeviceUnreachable(
            f"{who} did not answer within {timeout_s:g} s; is it switched on, and on a network that this machine "
            "reaches?"
        ) from error
    except ConnectionRefusedError as error:
        raise DeviceUnreachable(
            f"{who} refused the connection: nothing listens on port {hop.port}; is sshd running there, and is the port "
            "right?"
        ) from error
    except OSError as error:
        if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
            raise DeviceUnreachable(
                f"{who} cannot be reached: there is no route to {hop.host}; check the network, or whether it "
                "needs a jump host"
            ) from error
        raise DeviceUnreachable(
            f"{who} cannot be reached: {error}; is it starting or shutting down, or does a firewall stand between?"
        ) from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; keepalive alone never notices a dead peer with data on the way
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence_s * 1000))
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return stream


def _through(jump: paramiko.Transport, hop: Hop, who: str, timeout_s: float) -> paramiko.Channel:
    import paramiko

    try:
        return jump.open_channel("direct-tcpip", (hop.host, hop.port), ("127.0.0.1", 0), timeout=timeout_s)
    except paramiko.ChannelException as error:
        raise DeviceUnreachable(
            f"{who} cannot be reached through the jump host, which says {error.text!r}; is {hop.host}:{hop.port} "
            "right as seen from there, and does its sshd allow TCP forwarding?"
        ) from error
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise DeviceUnreachable(f"{who} cannot be reached through the jump host: {error}") from error


def _log_in_to(hop: Hop, stream: socket.socket | paramiko.Channel, who: str, timeout_s: float) -> paramiko.Transport:
    known = known_keys(hop)
    connection = _new_connection(stream, timeout_s)
    try:
        _prefer(connection, [key.get_name() for key in known])
        _shake_hands(connection, hop, who, timeout_s)
        check_host_key(connection.get_remote_server_key(), known, hop, who)
        _authenticate(connection, hop, who, timeout_s)
    except BaseException:
        connection.close()
        stream.close()
        raise
    connection.set_keepalive(_KEEPALIVE_S)
    return connection


def _new_connection(stream: socket.socket | paramiko.Channel, timeout_s: float) -> paramiko.Transport:
    from edgedeploy.lab.ssh_connection import Connection

    connection = Connection(stream)
    connection.set_log_channel(_quiet_log())
    connection.banner_timeout = connection.auth_timeout = connection.channel_timeout = timeout_s
    connection.handshake_timeout = timeout_s + 1  # looks like a dropped connection: start_client's limit comes first
    return connection


def _quiet_log() -> str:
    """Return the name of a log whose records reach only our own debug log."""
    log = logging.getLogger(_PARAMIKO_LOG)
    if not log.handlers:
        log.addHandler(_ToDebug())
        log.propagate = False
    return _PARAMIKO_LOG


def _shake_hands(connection: paramiko.Transport, hop: Hop, who: str, timeout_s: float) -> None:
    import paramiko

    try:
        connection.start_client(timeout=timeout_s)
    except paramiko.ssh_exception.IncompatiblePeer as error:
        raise DeviceUnreachable(
            f"{who} speaks only algorithms that are no longer safe ({error}); update its SSH server"
        ) from error
    except (paramiko.SSHException, EOFError, OSError) as error:
        if connection.remote_version:
            raise DeviceUnreachable(
                f"{who} dropped the connection while keys were exchanged ({error or 'no reason given'}); try again"
            ) from error
        if isinstance(error.__context__, (EOFError, ConnectionError)):  # what paramiko's thread ran into
            raise DeviceUnreachable(
                f"{who} closed the connection without an SSH greeting; is port {hop.port} really an SSH server's, and "
                "does it not have too many logins at once (MaxStartups) or block this address?"
            ) from error
    # start_client returns as if nothing were wrong when its time is up.
    if not connection.remote_version:
        raise DeviceUnreachable(
            f"{who} accepted the connection but sent no SSH greeting within {timeout_s:g} s; is port "
            f"{hop.port} really an SSH server's, and is the device not overloaded or frozen?"
        )
    if not connection.initial_kex_done:
        raise DeviceUnreachable(
            f"{who} did not finish the key exchange within {timeout_s:g} s; is it overloaded or frozen, or the "
            "link bad?"
        )


# --- the host's key


def known_keys(hop: Hop) -> list[paramiko.PKey]:
    """Return the host keys that the person has accepted for a server.

    paramiko's own reader gives up on files with @revoked or @cert-authority lines.
    """
    import paramiko

    keys = []
    for file, number, fields in _known_hosts_lines(hop):
        if len(fields) < 3 or not any(_is_name_of(name, hop) for name in fields[0].split(",")):
            continue
        try:
            keys.append(paramiko.PKey.from_type_string(fields[1], base64.b64decode(fields[2], validate=True)))
        except paramiko.pkey.UnknownKeyType:
            continue  # of a hardware token, say: another line may hold a key that we can check
        except (ValueError, IndexError, struct.error, paramiko.SSHException) as error:
            raise DocumentError(f"{file}, line {number} holds a broken key of {hop.host_key_name}: {error}") from error
    return keys


def _known_hosts_lines(hop: Hop) -> Iterator[tuple[Path, int, list[str]]]:
    """Yield (file, line number, words) of everything but comments."""
    for file in hop.known_hosts:
        try:
            lines = file.read_text(encoding="utf-8").split("\n")  # splitlines() ends comments at vertical tabs too
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise DocumentError(f"the file of known hosts {file} cannot be read: {error}") from error
        for number, line in enumerate(lines, start=1):
            if line.strip() and not line.startswith("#"):
                yield file, number, line.split()


def _is_name_of(name: str, hop: Hop) -> bool:
    # Hashed, so that a stolen file does not tell where we go; paramiko's own check fails on broken ones.
    if hashed := _HASHED.fullmatch(name):
        salt, digest = map(base64.b64decode, hashed.groups())
        return hmac.digest(salt, hop.host_key_name.encode(), "sha1") == digest
    return name == hop.host_key_name


def _prefer(connection: paramiko.Transport, known_types: Sequence[str]) -> None:
    """Ask for a key of a type that we know: servers have several, and another one of them would look like a new key."""
    options = connection.get_security_options()
    wanted = [
        name
        for known in known_types
        for name in (("rsa-sha2-512", "rsa-sha2-256") if known == "ssh-rsa" else (known,))
        if name in options.key_types
    ]
    options.key_types = [*wanted, *(name for name in options.key_types if name not in wanted)]


def check_host_key(key: paramiko.PKey, known: Sequence[paramiko.PKey], hop: Hop, who: str) -> None:
    """Raise DeviceUnreachable, with what to do next, unless a server's key is one of those that are known for it."""
    kind = key.get_name()
    if _is_revoked(key, hop):
        raise LoginRefused(
            f"{who} shows the {kind} host key {key.fingerprint}, which a known_hosts file marks as @revoked; "
            "nothing was sent to it"
        )
    if key in known:
        return
    file = hop.known_hosts[0]
    compare = (
        "compare the fingerprint with the one that `ssh-keygen -lf /etc/ssh/ssh_host_"
        f"{_short(kind)}_key.pub` prints on the device itself"
    )
    if known:
        old = next((candidate for candidate in known if candidate.get_name() == kind), known[0])
        raise LoginRefused(
            f"THE HOST KEY OF {hop.host_key_name} HAS CHANGED: {who} now shows {kind} {key.fingerprint}, but "
            f"known_hosts has {old.get_name()} {old.fingerprint}. Either it was installed anew, or somebody is "
            f"listening in; nothing was sent to it. If you know why, {compare}, and then run: "
            f"ssh-keygen -R {shlex.quote(hop.host_key_name)} -f {shlex.quote(str(file))} && {_accept(key, hop)}"
        )
    raise LoginRefused(
        f"{who} is not a known host: it shows the {kind} key {key.fingerprint}; {compare}, and accept it with: "
        f"{_accept(key, hop)}"
    )


def _accept(key: paramiko.PKey, hop: Hop) -> str:
    """Return the command that accepts exactly this key: unlike ssh-keyscan it cannot fetch another one meanwhile."""
    file = hop.known_hosts[0]
    line = f"{hop.host_key_name} {key.get_name()} {key.get_base64()}"
    folder = "" if file.parent.is_dir() else f"mkdir -p -m 700 {shlex.quote(str(file.parent))} && "
    return f"{folder}echo {shlex.quote(line)} >> {shlex.quote(str(file))}"


def _is_revoked(key: paramiko.PKey, hop: Hop) -> bool:
    """Say whether any known_hosts file revokes this very key; for whatever host, which is stricter than OpenSSH."""
    return any(fields[0] == "@revoked" and key.get_base64() in fields for _, _, fields in _known_hosts_lines(hop))


def _short(kind: str) -> str:
    """Return how sshd calls a key's type in file names.

    >>> _short("ssh-ed25519"), _short("ecdsa-sha2-nistp256")
    ('ed25519', 'ecdsa')
    """
    return next((name for name in ("ed25519", "ecdsa", "rsa") if name in kind), kind)


# --- our own keys


def _authenticate(connection: paramiko.Transport, hop: Hop, who: str, timeout_s: float) -> None:
    import paramiko

    tried: list[str] = []
    for description, key in _own_keys(hop, tried):
        tried.append(description)
        try:
            further = connection.auth_publickey(hop.user, key)
        except paramiko.BadAuthenticationType as error:
            raise LoginRefused(
                f"{who} accepts no keys for the user {hop.user!r}, only {', '.join(error.allowed_types)}; allow "
                "PubkeyAuthentication in its sshd_config"
            ) from error
        except (paramiko.SSHException, EOFError, OSError) as error:
            if not connection.is_active():
                raise DeviceUnreachable(
                    f"{who} hung up while we logged in as {hop.user!r}, after trying {_listed(tried)}; if it allows "
                    "fewer attempts than you have keys, name one with key in lab.toml"
                ) from error
            if "timeout" in str(error).lower():
                raise DeviceUnreachable(
                    f"{who} did not answer our login as {hop.user!r} within {timeout_s:g} s; is it overloaded or "
                    "frozen?"
                ) from error
            continue  # this key was refused: the next one
        if further:
            raise LoginRefused(
                f"{who} accepted {description} but demands a second factor ({', '.join(further)}), which edgedeploy "
                "cannot give; make an exception for this user in its sshd_config"
            )
        return
    raise LoginRefused(
        f"{who} does not let the user {hop.user!r} in: tried {_listed(tried)}; check user and key in lab.toml, and "
        f"that the public key is in ~{hop.user}/.ssh/authorized_keys there (`ssh-copy-id`)"
    )


def _own_keys(hop: Hop, tried: list[str]) -> Iterator[tuple[str, paramiko.PKey]]:
    """Yield (description, key) to offer; what cannot be used is noted in `tried`, so that the error can say so.

    Named keys are the only ones offered: servers hang up after a few wrong ones. The agent may hold them, unlocked.
    """
    import paramiko

    agent = paramiko.Agent()
    try:
        in_agent: dict[str, paramiko.PKey] = {key.get_base64(): key for key in agent.get_keys()}
        if not hop.keys:
            for held in in_agent.values():
                yield f"{held.get_name()} {held.fingerprint} from the agent", held
        for file in hop.keys or tuple(Path.home() / ".ssh" / name for name in _USUAL_KEYS):
            if not file.exists():
                if hop.keys:
                    tried.append(f"{file} (no such file)")
                continue
            if (public := _public_half(file)) in in_agent:
                if hop.keys:
                    yield f"{file} through the agent", in_agent[public]
                continue
            try:
                key = paramiko.PKey.from_path(file)
            # cryptography says TypeError for a missing passphrase; ValueError and SSHException for what is no key.
            except (paramiko.PasswordRequiredException, TypeError):
                tried.append(f"{file} (locked by a passphrase: unlock it with `ssh-add {shlex.quote(str(file))}`)")
            except OSError as error:
                tried.append(f"{file} (cannot be read: {error.strerror})")
            except (ValueError, paramiko.SSHException, paramiko.pkey.UnknownKeyType):
                tried.append(f"{file} (not a private key of a usable kind)")
            else:
                yield f"{file} ({key.get_name()} {key.fingerprint})", key
    finally:
        agent.close()


def _public_half(file: Path) -> str:
    """Return the base64 part of the .pub file beside a private key, or ''."""
    public = file.with_name(file.name + ".pub")
    fields = public.read_text(encoding="utf-8").split() if public.exists() else []
    return fields[1] if len(fields) > 1 else ""


def _listed(tried: Sequence[str]) -> str:
    return ", ".join(tried) or "nothing, because there is no key in the agent and none in ~/.ssh"
