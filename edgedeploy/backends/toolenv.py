"""Environments for converters whose pins fit nowhere else: made on first use, and kept.

A folder is finished when its mark is written, which is done last. Whoever finds none makes the folder anew, locked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

from edgedeploy.errors import BackendMissing, InternalError, ToolchainError
from edgedeploy.storage import cache_dir, sha256_bytes, write_atomic

Progress = Callable[[str], None]

# Where environments are kept, where it is not the cache; and a folder of wheels for machines without a network.
TOOLS_VARIABLE = "EDGEDEPLOY_TOOLS_DIR"
WHEELHOUSE_VARIABLE = "EDGEDEPLOY_WHEELHOUSE"

_MARK = "complete"
_LOG = "install.log"
# The pins are exact and complete, and were tried with each Python version that we support, whatever a package's own
# metadata says. Sources are not built: that would run code of theirs with tools that nobody pinned.
_PIP_FLAGS = ("--no-deps", "--ignore-requires-python", "--only-binary", ":all:", "--disable-pip-version-check")
_SHOWN_EVERY_S = 5.0
_LIMIT_S = 3600.0
_LAST_LINES = 4


@dataclasses.dataclass(frozen=True, slots=True)
class ToolEnvironment:
    """A converter's packages at exact versions.

    Attributes:
        name: of the folder that it is kept in.
        requirements: pinned requirements, a file of this package.
        modules: what must be importable for this interpreter to do as well.
    """

    name: str
    requirements: Path
    modules: tuple[str, ...]

    def is_here(self) -> bool:
        """Whether this interpreter has the packages, so that no environment is needed."""
        return all(importlib.util.find_spec(name) is not None for name in self.modules)

    def is_made(self) -> bool:
        """Whether `python` would have nothing to install."""
        return self.is_here() or self._is_complete()

    def versions(self) -> dict[str, str]:
        """Return distribution → version of everything that the converter runs on.

        Where this interpreter does, that is what is installed here, "not installed" for what it works without.
        """
        pins = self._pins()
        if not self.is_here():
            return pins
        return {name: _installed(name) or "not installed" for name in pins}

    def folder(self) -> Path:
        """Return where the environment is, or will be: one for each set of pins and each Python."""
        parts = [
            *(f"{name}=={version}" for name, version in sorted(self._pins().items())),
            platform.python_implementation(),
            ".".join(map(str, sys.version_info[:2])),
            platform.system(),
            platform.machine(),
            sys.base_prefix,
        ]
        root = os.environ.get(TOOLS_VARIABLE)
        base = Path(root).expanduser().absolute() if root else cache_dir() / "tools"
        return base / f"{self.name}-{sha256_bytes(chr(10).join(parts).encode())[:12]}"

    def missing(self) -> str | None:
        """Say what keeps the environment from being made here, or None."""
        if self.is_here() or self._is_complete():
            return None
        needed = ("venv",) if _has_pip() else ("venv", "ensurepip")
        absent = [name for name in needed if importlib.util.find_spec(name) is None]
        if absent:
            return (
                f"the converter of {self.name} is kept in an environment of its own, which needs Python's module "
                f"{' and '.join(absent)}; install it (on Debian: apt install python3-venv), or install the packages "
                f"of {self.requirements} beside edgedeploy"
            )
        return None

    def python(self, progress: Progress = lambda _text: None) -> Path:
        """Return an interpreter that has the packages, making its environment when there is none.

        Two processes may ask at once: one makes it, the other waits. What an interrupted one left is made anew.

        Args:
            progress: receives a line every few seconds while packages are installed.

        Raises:
            BackendMissing: Python cannot make environments here.
            ToolchainError: the packages cannot be installed: no network, no such wheel, disk full.
        """
        if self.is_here():
            return Path(sys.executable)
        if not self._is_complete():
            if reason := self.missing():
                raise BackendMissing(reason)
            self._make(progress)
        return self._interpreter()

    def _pins(self) -> dict[str, str]:
        pins = {}
        for number, line in enumerate(self.requirements.read_text(encoding="utf-8").splitlines(), start=1):
            text = line.partition("#")[0].strip()
            if not text:
                continue
            name, equals, version = text.partition("==")
            if not equals or not version.strip():
                raise InternalError(f'{self.requirements}, line {number}: "{text}" pins no exact version')
            pins[name.strip()] = version.strip()
        return pins

    def _interpreter(self) -> Path:
        return self.folder() / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def _is_complete(self) -> bool:
        # The interpreter is a link: it dangles when the Python that made it is gone.
        return (self.folder() / _MARK).is_file() and self._interpreter().is_file()

    def _make(self, progress: Progress) -> None:
        folder = self.folder()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder.with_name(f"{folder.name}.lock"), self.name, progress):
                if self._is_complete():
                    return
                shutil.rmtree(folder, ignore_errors=True)
                progress(f"{self.name}: making the converter's environment, once, in {folder}")
                self._install(folder, progress)
                write_atomic(folder / _MARK, self.requirements.read_bytes())
        except OSError as error:
            raise ToolchainError(
                f"the environment of the converter of {self.name} could not be written to {folder}: {error}; free the "
                f"disk, or name another folder by {TOOLS_VARIABLE}"
            ) from error

    def _install(self, folder: Path, progress: Progress) -> None:
        log = folder.with_name(f"{folder.name}.{_LOG}")
        wheelhouse = os.environ.get(WHEELHOUSE_VARIABLE)
        if wheelhouse and not Path(wheelhouse).is_dir():
            raise ToolchainError(f"{WHEELHOUSE_VARIABLE} names {wheelhouse}, which is no folder; name one with wheels")
        found = ["--no-index", "--find-links", str(Path(wheelhouse).absolute())] if wheelhouse else []
        # Isolated: neither variables of Python nor the current folder decide what these interpreters import.
        here, there = [sys.executable, "-I", "-m"], str(self._interpreter())
        pip = [*here, "pip", "--python", there] if _has_pip() else [there, "-I", "-m", "pip"]
        bare = ["--without-pip"] if _has_pip() else []
        steps = {
            "making a virtual environment": [*here, "venv", "--clear", *bare, str(folder)],
            "installing its packages": [*pip, "install", *_PIP_FLAGS, *found, "--requirement", str(self.requirements)],
        }
        with log.open("w", encoding="utf-8") as stream:
            for what, command in steps.items():
                code = _run(command, stream, partial(self._show, progress, what))
                if code != 0:
                    raise ToolchainError(self._failure(what, code, log))
        log.replace(folder / _LOG)

    def _show(self, progress: Progress, what: str, seconds: float) -> None:
        progress(f"{self.name}: {what}, {seconds:.0f} s")

    def _failure(self, what: str, code: int, log: Path) -> str:
        text = log.read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()][-_LAST_LINES:]
        end = "took longer than an hour" if code == _TIMED_OUT else f"ended with code {code}"
        flags = " ".join(_PIP_FLAGS)
        return (
            f"{what} for the converter of {self.name} {end}: {' | '.join(lines) or 'it said nothing'} (all of it is "
            f"in {log}); it needs a package index once. Without a network: `pip download {flags} -d wheels -r "
            f"{self.requirements}` where there is one and the same Python, then {WHEELHOUSE_VARIABLE}=wheels here"
        )


_TIMED_OUT = 124


def _run(command: list[str], log: TextIO, tick: Callable[[float], None]) -> int:
    start = time.monotonic()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT) as process:
        try:
            while True:
                tick(time.monotonic() - start)
                try:
                    return process.wait(timeout=_SHOWN_EVERY_S)
                except subprocess.TimeoutExpired:
                    if time.monotonic() - start > _LIMIT_S:
                        process.kill()
                        return _TIMED_OUT
        except BaseException:
            process.kill()
            raise


@contextlib.contextmanager
def _locked(path: Path, name: str, progress: Progress) -> Iterator[None]:
    """Hold a lock that the system frees when its holder dies."""
    import fcntl

    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"{name}: another process is making the converter's environment; waiting for it")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _has_pip() -> bool:
    """Whether this interpreter's pip can install for another one (--python: pip 22.3); it saves unpacking one there."""
    version = _installed("pip")
    if version is None or importlib.util.find_spec("pip") is None:
        return False
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    return (int(major), int(minor) if minor.isdigit() else 0) >= (22, 3)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
