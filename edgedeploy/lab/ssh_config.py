"""The way to an SSH device: lab.toml first, then OpenSSH's configuration, then OpenSSH's defaults."""

from __future__ import annotations

import getpass
import glob
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgedeploy.errors import DocumentError, ToolchainError, UsageError
from edgedeploy.records.device import Device

MISSING = "paramiko, which edgedeploy speaks SSH with, is not installed here; pip install 'edgedeploy[ssh]'"
_SYSTEM_CONFIG = Path("/etc/ssh/ssh_config")
_SYSTEM_KNOWN_HOSTS = Path("/etc/ssh/ssh_known_hosts")
_DEFAULT_PORT = 22
_MAX_INCLUDE_DEPTH = 16  # OpenSSH's own limit
_MAX_JUMPS = 8  # more than anybody has; a jump host that names itself would go round for ever

_SETTING = re.compile(r"\s*(\w+)(?:\s*=\s*|\s+)(.+?)\s*$")
_ADDRESS = re.compile(r"(?:ssh://)?(?:(?P<user>[^@]+)@)?(?P<host>\[[^\]]+\]|[^:\[\]@]+)(?::(?P<port>\d+))?/?")


@dataclass(frozen=True, slots=True)
class Hop:
    """One SSH server on the way, and everything needed to log in to it.

    Attributes:
        host_key_name: how known_hosts calls it: "host", "[host]:port" or a HostKeyAlias.
        keys: private key files; empty: the agent and the usual key files.
        known_hosts: files that may vouch for it; the first is the one to add a new key to.
    """

    host: str
    port: int
    user: str
    host_key_name: str
    keys: tuple[Path, ...]
    known_hosts: tuple[Path, ...]

    def __str__(self) -> str:
        return f"{self.user}@{self.host}:{self.port}"


def route(device: Device, config: Path | None = None) -> tuple[Hop, ...]:
    """Return the servers to log in to: jump hosts in order, then the device.

    A jump host that lab.toml names is vouched for by the device's `known_hosts`, and is offered the device's `key`
    unless OpenSSH's configuration names another for it.

    Args:
        device: an entry of lab.toml with transport "ssh".
        config: the person's configuration; None: ~/.ssh/config.

    Raises:
        DocumentError: the configuration cannot be read, or asks for what we cannot do.
        UsageError: `jump` is not an address.
        ToolchainError: paramiko is missing.
    """
    settings = _Settings(config or Path.home() / ".ssh" / "config")
    found = settings.of(device.host)
    last = _hop(
        found,
        host=device.host,
        port=device.port,
        user=device.user,
        keys=_files(device.key) or _files(found.get("identityfile", "")),
        known_hosts=_files(device.known_hosts),
    )
    jump = device.jump or found.get("proxyjump", "")
    if not jump and found.get("proxycommand"):
        raise DocumentError(
            f"{settings.path} sets ProxyCommand for {device.host}, which edgedeploy does not run; use ProxyJump there, "
            "or jump in lab.toml"
        )
    return (*_jumps(jump, settings, device), last)


class _Settings:
    """OpenSSH's configuration: the person's file, then the system's; the first value found wins."""

    def __init__(self, path: Path) -> None:
        try:
            import paramiko
        except ImportError as error:
            raise ToolchainError(MISSING) from error

        self.path = path
        lines = [line for file in (path, _SYSTEM_CONFIG) for line in ("Host *", *_with_includes(file, file.parent))]
        try:
            self._config = paramiko.SSHConfig.from_text("\n".join(lines))
        except paramiko.ConfigParseError as error:
            raise DocumentError(f"{path} is not a configuration that ssh would accept: {error}") from error

    def of(self, host: str) -> Mapping[str, str]:
        """Return the settings of a host, keys in lower case; IdentityFile's are joined by newlines."""
        import paramiko

        try:
            found = self._config.lookup(host)
        # paramiko needs the package invoke for Match exec, and raises its ImportError on use.
        except (ImportError, paramiko.ConfigParseError, paramiko.ssh_exception.CouldNotCanonicalize) as error:
            raise DocumentError(
                f"{self.path} cannot be applied to {host} ({error}); name host, port, user and key in lab.toml instead"
            ) from error
        return {key: "\n".join(value) if isinstance(value, list) else value or "" for key, value in found.items()}


def _with_includes(file: Path, base: Path, block: str = "Host *", depth: int = 0) -> Iterator[str]:
    """Yield the lines of a configuration with every Include replaced by what it names, which paramiko does not do.

    After an Include the block it stands in is opened again, because a Host line of the included file ends there.
    """
    if depth > _MAX_INCLUDE_DEPTH:
        raise DocumentError(f"{file} is included more than {_MAX_INCLUDE_DEPTH} deep; does a file include itself?")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return  # OpenSSH works without either file
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"{file} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        match = _SETTING.match(line)
        keyword = match[1].lower() if match else ""
        if keyword in ("host", "match"):
            block = line.strip()
        if match is None or keyword != "include":
            yield line
            continue
        for pattern in shlex.split(match[2]):
            for name in sorted(glob.glob(str(base / Path(pattern).expanduser()))):  # noqa: PTH207 (absolute pattern)
                for included in _with_includes(Path(name), base, block, depth + 1):
                    if _narrows(included, block):
                        raise DocumentError(
                            f"{file}, line {number} includes {name} inside the block {block!r}, and that file has "
                            "blocks of its own, which edgedeploy cannot nest; move the Include above the first Host"
                        )
                    yield included
        yield block


def _narrows(line: str, block: str) -> bool:
    """Say whether a line opens a block inside one that does not hold for every host."""
    if " ".join(block.lower().split()) in ("host *", "match all"):
        return False
    match = _SETTING.match(line)
    return match is not None and match[1].lower() in ("host", "match") and line != block


def _jumps(spec: str, settings: _Settings, device: Device) -> tuple[Hop, ...]:
    """Return the hops that "user@a:22,b" stands for; the first of them may have a ProxyJump of its own, as in ssh."""
    hops: list[Hop] = []
    while spec and spec.lower() != "none":
        if len(hops) >= _MAX_JUMPS:
            raise DocumentError(
                f"the way to {device.host} has more than {_MAX_JUMPS} jump hosts; does one jump through itself?"
            )
        addresses = [parse_address(part) for part in spec.split(",")]
        found = [settings.of(host) for _, host, _ in addresses]
        hops[:0] = [
            _hop(
                setting,
                host=host,
                port=port,
                user=user,
                keys=_files(setting.get("identityfile", "")) or _files(device.key),
                known_hosts=_files(device.known_hosts),
            )
            for (user, host, port), setting in zip(addresses, found, strict=True)
        ]
        spec = found[0].get("proxyjump", "")
    return tuple(hops)


def parse_address(text: str, what: str = "the jump host") -> tuple[str, str, int]:
    """Return (user, host, port) of "user@host:port"; what is left out is "" or 0.

    >>> parse_address("alice@[::1]:2222"), parse_address("gate")
    (('alice', '::1', 2222), ('', 'gate', 0))
    """
    match = _ADDRESS.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{what} {text!r} is not an address like user@host:port")
    return match["user"] or "", match["host"].strip("[]"), int(match["port"] or 0)


def _hop(
    found: Mapping[str, str], *, host: str, port: int, user: str, keys: tuple[Path, ...], known_hosts: tuple[Path, ...]
) -> Hop:
    """Complete what was given from OpenSSH's settings of that host, then from OpenSSH's defaults."""
    name = found.get("hostname") or host
    if not port:
        try:
            port = int(found.get("port", _DEFAULT_PORT))
        except ValueError as error:
            raise DocumentError(f"the ssh configuration gives {host} the port {found['port']!r}") from error
    return Hop(
        host=name,
        port=port,
        user=user or found.get("user") or getpass.getuser(),
        host_key_name=(found.get("hostkeyalias") or (name if port == _DEFAULT_PORT else f"[{name}]:{port}")).lower(),
        keys=keys,
        known_hosts=known_hosts or _known_hosts(found),
    )


def _files(text: str) -> tuple[Path, ...]:
    return tuple(Path(line).expanduser() for line in text.split("\n") if line)


def _known_hosts(found: Mapping[str, str]) -> tuple[Path, ...]:
    # "none" and /dev/null switch the check off in ssh; here it cannot be switched off, so they count as not said.
    named = [file for file in shlex.split(found.get("userknownhostsfile", "")) if file not in ("none", "/dev/null")]
    user = [Path(file).expanduser() for file in named] or [Path.home() / ".ssh" / "known_hosts"]
    return (*user, _SYSTEM_KNOWN_HOSTS)
