"""Runtimes on a board without internet: each in a folder of its own, versions side by side, tried before it counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from edgedeploy.errors import DeviceError, ToolchainError
from edgedeploy.lab import answers, bundle
from edgedeploy.lab.conversation import Agent
from edgedeploy.lab.transport import Transport
from edgedeploy.lab.wheels import normalized
from edgedeploy.records.device import DeviceFacts
from edgedeploy.records.runtime import DeviceRuntime, Prefix
from edgedeploy.storage import sha256_file
from edgedeploy.units import format_bytes

_NAME = re.compile(r"(?P<distribution>[a-z0-9-]+)-(?P<version>[^-]+)-(?P<tag>cp3\d{1,2})-(?P<digest>[0-9a-f]{8})")
# Directories, the index of objects, and what the import compiles.
_SPARE_BYTES = 32 << 20
_TRY_TIMEOUT_S = 300.0

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Installed:
    """A runtime in a folder of its own on a device.

    Attributes:
        tag: of the Python that it is for, "cp311".
    """

    name: str
    distribution: str
    version: str
    tag: str
    size_bytes: int


class _Runtime(msgspec.Struct, frozen=True):
    name: answers.Text
    size_bytes: answers.Count


class _Runtimes(msgspec.Struct, frozen=True):
    runtimes: Annotated[tuple[_Runtime, ...], msgspec.Meta(max_length=1000)]


class _Space(msgspec.Struct, frozen=True):
    free_bytes: answers.Count


def installed(agent: Agent) -> tuple[Installed, ...]:
    """Return the runtimes that were provisioned on a device."""
    said = answers.read(agent.ask("runtimes"), _Runtimes, agent.label, "runtimes")
    found = []
    for one in said.runtimes:
        if match := _NAME.fullmatch(one.name):
            found.append(Installed(one.name, match[1], match[2], match[3], one.size_bytes))
    return tuple(found)


def choose(
    found: Collection[Installed], choices: Sequence[DeviceRuntime], facts: DeviceFacts, *, version: str = ""
) -> Installed | None:
    """Return the runtime that a session is opened with, or None where nothing fitting is installed.

    Args:
        found: what is installed.
        choices: a back end's distributions in the order of preference.
        facts: of the device; what was installed for another Python does not count.
        version: exactly this one; "": the newest of the first distribution that is there.
    """
    for choice in choices:
        fitting = [
            one
            for one in found
            if one.distribution == normalized(choice.distribution)
            and one.tag == facts.interpreter.tag
            and version in ("", one.version)
        ]
        if fitting:
            return max(fitting, key=lambda one: (version_key(one.version), one.name))
    return None


def version_key(version: str) -> tuple[tuple[int, int, str], ...]:
    """Return what versions are ordered by: numbers as numbers, a pre-release before the release, "post" after it.

    >>> sorted(["1.9.2", "1.20.0.post1", "1.20.0", "1.20.0rc1"], key=version_key)
    ['1.9.2', '1.20.0rc1', '1.20.0', '1.20.0.post1']
    """
    words = re.findall(r"\d{1,18}|[a-z]+", version.lower())
    ranks = ((1, int(word), "") if word.isdigit() else (0 if word == "post" else -1, 0, word) for word in words)
    return (*ranks, (0, 0, ""))


def install(agent: Agent, transport: Transport, prefix: Prefix, tar: Path, progress: Progress) -> str:
    """Put a packed runtime on a device and try it there.

    Args:
        agent: the runner there.
        transport: the way for files.
        prefix: what was packed; tar: the file.
        progress: told what happens.

    Returns:
        The version that the module says of itself; "" where it says none.

    Raises:
        TransferError: it did not arrive.
        DeviceError: the disk is too small, or the runtime cannot be imported there; it is removed then.
    """
    if sha256_file(tar) != prefix.tar_sha256:
        tar.unlink()
        raise ToolchainError(f"{tar} was damaged since it was packed and is deleted; run the same command again")
    missing = agent.missing([prefix.tar_sha256])
    wanted = (prefix.tar_bytes if missing else 0) + prefix.unpacked_bytes + _SPARE_BYTES
    free = answers.read(agent.ask("space"), _Space, agent.label, "space").free_bytes
    if free < wanted:
        raise DeviceError(
            f"{agent.label}: {prefix.distribution} {prefix.version} needs {format_bytes(wanted)} on its disk while it "
            f"is installed, and {format_bytes(free)} are free; free some space there, remove unused runtimes (devices "
            "provision NAME --prune), or choose another root in lab.toml"
        )
    if missing:
        progress(f"sending {prefix.name} ({format_bytes(prefix.tar_bytes)})")
        bundle.ship(agent, transport, {prefix.tar_sha256: tar})
    progress(f"unpacking {prefix.name}")
    agent.ask("install", tar=prefix.tar_sha256, name=prefix.name)
    transport.remove(f"{agent.root}/objects/{prefix.tar_sha256}")  # what it held lies unpacked beside it
    progress(f"trying {prefix.module}")
    return try_runtime(agent, prefix.name, prefix.distribution, prefix.module)


def try_runtime(agent: Agent, name: str, distribution: str, module: str) -> str:
    """Import a runtime on the device, in a process of its own; return its version.

    Raises:
        DeviceError: it cannot be imported, with what to do; it was removed, so that nothing uses it.
    """
    try:
        said = agent.ask("try_runtime", name=name, module=module, timeout_s=_TRY_TIMEOUT_S)
    except DeviceError as error:
        advice = advise(str(error), distribution)
        agent.ask("remove_runtime", name=name)
        raise DeviceError(f"{error}\n{advice}; {name} was removed again") from error
    version = said.get("version", "")
    return answers.clipped(version, 64) if isinstance(version, str) else ""


def advise(text: str, distribution: str) -> str:
    """Return what to do about a runtime that was installed and cannot be imported.

    >>> advise("libgomp.so.1: cannot open shared object file", "onnxruntime")
    'the board lacks the library libgomp.so.1: install its package there (Debian: apt install libgomp1)'
    """
    packages = {"libgomp.so.1": "libgomp1", "libstdc++.so.6": "libstdc++6", "libatomic.so.1": "libatomic1"}
    older = f"provision another version ({distribution}==...), older ones ask for less"
    if "SIGILL" in text:
        return f"its instructions are not all known to this processor: {older}"
    if library := re.search(r"(lib[\w+.-]+\.so[\w.]*): cannot open shared object", text):
        package = packages.get(library[1])
        hint = f" (Debian: apt install {package})" if package else ""
        return f"the board lacks the library {library[1]}: install its package there{hint}"
    if needed := re.search(r"version [`'](\w+_[\d.]+)' not found", text):
        return f"the board's system is older than the runtime was built for ({needed[1]}): {older}"
    if re.search(r"wrong ELF class|invalid ELF header|Exec format", text):
        return "it is for another processor than the board's: is the right interpreter named as python in lab.toml?"
    if re.search(r"_ARRAY_API|compiled using NumPy 1", text):
        return f"it was built for an older numpy: {older}, or a newer one"
    if "SIGKILL" in text or "MemoryError" in text:
        return "the board's memory was not enough to load it: stop what else runs there"
    return f"{older}; or install it there by other means, and name the interpreter that has it as python in lab.toml"


def unused(
    found: Collection[Installed],
    backends: Mapping[str, Sequence[DeviceRuntime]],
    facts: DeviceFacts,
    pinned: Mapping[str, str],
) -> tuple[Installed, ...]:
    """Return the runtimes that no session would be opened with.

    Args:
        found: what is installed.
        backends: every back end's distributions.
        facts: of the device.
        pinned: back end → version of the device's entry.
    """
    used = {choose(found, choices, facts, version=pinned.get(name, "")) for name, choices in backends.items()}
    return tuple(one for one in found if one not in used)


def remove(agent: Agent, names: Sequence[str]) -> None:
    """Delete provisioned runtimes on a device."""
    for name in names:
        agent.ask("remove_runtime", name=name)
