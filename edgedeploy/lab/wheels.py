"""Wheels for a board, fetched here: which fit it, what of them it needs, and one tar whose bytes are reproducible.

The board needs no package index, no pip and no compiler. Nothing of a wheel is executed here.
"""

from __future__ import annotations

import base64
import csv
import fnmatch
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgedeploy.documents import read_json, write_json
from edgedeploy.errors import DeviceError, DocumentError, ToolchainError
from edgedeploy.records.device import DeviceFacts
from edgedeploy.records.runtime import FORMAT, DeviceRuntime, Prefix, Wheel
from edgedeploy.storage import cache_dir, sha256_bytes, sha256_file

WHEELHOUSE_VARIABLE = "EDGEDEPLOY_WHEELHOUSE"
# A large wheel over a slow line.
_DOWNLOAD_LIMIT_S = 1800.0
# More than any runtime has; what is larger was made to fill a disk.
_MOST_FILES = 100_000
_MOST_BYTES = 4 << 30
# The first glibc that manylinux has tags for: PEP 600's tags begin at 2.5 on x86, at 2.17 elsewhere.
_FIRST_GLIBC = {"x86_64": 5, "i686": 5}
_ALIASES = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
# No C library will have had so many releases soon; a device's word must not make a list without end.
_MOST_MINOR = 99
# The machine that 32-bit programs run as, where the kernel is a 64-bit one.
_IN_32_BITS = {"aarch64": "armv7l", "arm64": "armv7l", "armv8l": "armv7l", "x86_64": "i686", "amd64": "i686"}
# e_machine of ELF (System V ABI) for each machine; what no entry names is not checked.
_ELF_MACHINES = {"aarch64": 183, "x86_64": 62, "armv7l": 40, "i686": 3}
# What is for compiling against, for checking types or for testing; numpy.testing reads _natype.py of a folder of tests.
_UNNEEDED = (
    "*.pyi", "*.pyx", "*.pxd", "*.h", "*.hpp", "*.a", "*.lib", "*.pyc", "*/tests/*", "*/_pyinstaller/*", "numpy/f2py/*",
    "numpy/distutils/*", "*.dist-info/RECORD", "*.dist-info/RECORD.*", "*.dist-info/sboms/*",
)  # fmt: skip
_KEPT = ("*/tests/_natype.py", "*/tests/__init__.py")
_BLOCK_BYTES = 4096
# Tar knows no time zone and GNU tar warns of 1970; wheels know nothing before 1980.
_MTIME_S = 315532800
_MANIFEST = "prefix.json"
_TAR = "prefix.tar"
_NO_MATCH = re.compile(r"No matching distribution found|ResolutionImpossible|Could not find a version that satisfies")
_NO_INDEX = re.compile(
    r"connection broken by|Failed to establish|Max retries exceeded|getaddrinfo|timed out", re.IGNORECASE
)
_OFFERED = re.compile(r"from versions: ([^)]*)\)")
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+!-]*")

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Platform:
    """What decides which wheels fit a board.

    Attributes:
        machine: as wheels call it.
        libc: "glibc" or "musl".
        libc_version: (2, 36).
        tag: "cp311"; abi: "cp311".
    """

    machine: str
    libc: str
    libc_version: tuple[int, int]
    tag: str
    abi: str

    def __str__(self) -> str:
        python = f"Python {self.tag[2]}.{self.tag[3:]}"
        return f"{python} on {self.machine} with {self.libc} {'.'.join(map(str, self.libc_version))}"


def platform_of(facts: DeviceFacts) -> Platform:
    """Return what a device's facts say of the wheels that fit it.

    Raises:
        DeviceError: there are no wheels for such a Python or C library; naming what is possible.
    """
    then = (
        'install the runtime there by other means, and name the interpreter that has it as python = "..." in lab.toml'
    )
    interpreter = facts.interpreter
    if not re.fullmatch(r"cp3\d{1,2}", interpreter.tag) or not re.fullmatch(r"cp3\d{1,2}[a-z]{0,3}", interpreter.abi):
        raise DeviceError(f"wheels are installed for CPython 3; the device's Python is {interpreter.tag!r}: {then}")
    name, _, version = facts.libc.partition(" ")
    numbers = re.match(r"(\d{1,3})\.(\d{1,3})", version)
    if name not in ("glibc", "musl") or numbers is None or int(numbers[2]) > _MOST_MINOR:
        raise DeviceError(f"the device does not say which C library it has (it says {facts.libc[:80]!r}): {then}")
    machine = facts.machine.lower()
    if not re.fullmatch(r"[a-z0-9_]{2,20}", machine):
        raise DeviceError(f"{facts.machine[:40]!r} is not a machine that there are wheels for: {then}")
    if interpreter.bits == 32:
        machine = _IN_32_BITS.get(machine, machine)
    machine = {"arm64": "aarch64", "amd64": "x86_64"}.get(machine, machine)
    return Platform(machine, name, (int(numbers[1]), int(numbers[2])), interpreter.tag, interpreter.abi)


def platform_tags(platform: Platform) -> tuple[str, ...]:
    """Return the platform tags of the wheels that a board takes, best first (PEP 600, PEP 656).

    >>> platform_tags(Platform("aarch64", "glibc", (2, 18), "cp38", "cp38"))
    ('manylinux_2_18_aarch64', 'manylinux_2_17_aarch64', 'manylinux2014_aarch64')
    """
    major, newest = platform.libc_version
    if platform.libc == "musl":
        return tuple(f"musllinux_{major}_{minor}_{platform.machine}" for minor in range(newest, -1, -1))
    tags: list[str] = []
    for minor in range(newest, _FIRST_GLIBC.get(platform.machine, 17) - 1, -1):
        tags.append(f"manylinux_{major}_{minor}_{platform.machine}")
        if minor in _ALIASES:
            tags.append(f"{_ALIASES[minor]}_{platform.machine}")
    return tuple(tags)


def normalized(name: str) -> str:
    """Return a distribution's name as comparisons and wheels' names want it (PEP 503).

    >>> normalized("AI_Edge.LiteRT")
    'ai-edge-litert'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def make_prefix(
    choices: Sequence[DeviceRuntime],
    platform: Platform,
    *,
    version: str = "",
    is_renewed: bool = False,
    progress: Progress = lambda text: None,
) -> tuple[Prefix, Path]:
    """Return a packed runtime for a board, and its tar; downloaded and packed once, then kept in the cache.

    Args:
        choices: distributions in the order of preference.
        platform: the board's.
        version: exactly this one; "": the one that is installed here, so that what is compiled and what runs it are of
            one version, or the newest where there is no such wheel for the board.
        is_renewed: ask the index again, whatever the cache has.
        progress: told what happens.

    Raises:
        DeviceError: no wheel fits the board; naming what is possible.
        ToolchainError: the index cannot be reached, pip is missing or fails, or a wheel is damaged.
    """
    if version and _VERSION.fullmatch(version) is None:
        raise DeviceError(f"{version!r} is not a version, as in onnxruntime==1.20.1")
    folder = cache_dir() / "prefixes" / _request_key(choices, platform, version)
    if not is_renewed and (kept := _kept(folder)) is not None:
        return kept
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pack-", dir=folder.parent) as scratch:
        wheels = Path(scratch) / "wheels"
        chosen, note = _download(choices, platform, version, wheels, progress)
        packed = Path(scratch) / "packed"
        packed.mkdir()
        prefix = pack(sorted(wheels.glob("*.whl")), chosen, platform, packed, note=note, progress=progress)
        if folder.exists():
            folder.rename(Path(scratch) / "replaced")
        packed.rename(folder)
    return prefix, folder / _TAR


def _request_key(choices: Sequence[DeviceRuntime], platform: Platform, version: str) -> str:
    here = [_version_here(one.distribution) for one in choices] if not version else []
    return sha256_bytes(repr((1, list(choices), platform, version, here, _UNNEEDED, _KEPT)).encode())[:32]


def _kept(folder: Path) -> tuple[Prefix, Path] | None:
    """Return what was packed before, if it is still whole."""
    try:
        prefix = read_json(folder / _MANIFEST, Prefix, FORMAT)
        is_whole = (folder / _TAR).stat().st_size == prefix.tar_bytes
    except (DocumentError, OSError):
        return None
    return (prefix, folder / _TAR) if is_whole else None


def _version_here(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


# --- fetching


def _download(
    choices: Sequence[DeviceRuntime], platform: Platform, version: str, folder: Path, progress: Progress
) -> tuple[DeviceRuntime, str]:
    """Fetch the wheels of the first choice that has one; return it, and what is to be known about it."""
    offered: dict[str, str] = {}
    wanted_first = ""
    for choice in choices:
        here = _version_here(choice.distribution)
        for wanted in dict.fromkeys([version] if version else [here, ""]):
            requirement = f"{choice.distribution}=={wanted}" if wanted else choice.distribution
            wanted_first = wanted_first or requirement
            progress(f"fetching {requirement} for {platform}")
            shutil.rmtree(folder, ignore_errors=True)
            said = _pip_download((requirement, *choice.needs), platform, folder)
            if said is None:
                got = _found_wheel(folder, choice.distribution)[1]
                is_expected = requirement == wanted_first
                return choice, "" if is_expected else (
                    f"there is no wheel of {wanted_first} for {platform}: this is {choice.distribution} {got}"
                )
            if versions := _OFFERED.search(said):
                offered[choice.distribution] = versions[1]
    raise DeviceError(_no_wheel(choices, platform, version, offered))


def _no_wheel(choices: Sequence[DeviceRuntime], platform: Platform, version: str, offered: dict[str, str]) -> str:
    names = " and none of ".join(f"{one.distribution}=={version}" if version else one.distribution for one in choices)
    instead = 'install it there by other means and name the interpreter that has it as python = "..." in lab.toml'
    known = {name: text for name, text in offered.items() if text not in ("", "none")}
    if version and known:
        instead = "versions that it could be: " + "; ".join(f"{name} {text}" for name, text in known.items())
    elif platform.libc == "musl":
        alpine = " (Alpine: apk add py3-onnxruntime)" if choices[0].distribution == "onnxruntime" else ""
        instead += f"{alpine}, or use a system with glibc, such as Debian"
    elif platform.machine not in ("aarch64", "x86_64"):
        instead += ", or put a 64-bit system on the board if its processor allows one"
    source = os.environ.get(WHEELHOUSE_VARIABLE)
    where = f" in {source} ({WHEELHOUSE_VARIABLE})" if source else ""
    return f"there is no wheel of {names} for {platform}{where}; {instead}"


def _pip_download(requirements: Sequence[str], platform: Platform, folder: Path) -> str | None:
    """Fetch wheels with their dependencies; return None, or what pip said when nothing fits.

    Raises:
        ToolchainError: it failed for another reason.
    """
    if importlib.util.find_spec("pip") is None:
        raise ToolchainError(f"pip, which fetches wheels, is not in {sys.executable}; {sys.executable} -m ensurepip")
    wheelhouse = os.environ.get(WHEELHOUSE_VARIABLE)
    if wheelhouse and not Path(wheelhouse).is_dir():
        raise ToolchainError(f"{WHEELHOUSE_VARIABLE} names {wheelhouse}, which is no folder; name one with wheels")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", "--dest", str(folder)]
    command += ["--python-version", platform.tag.removeprefix("cp"), "--implementation", "cp"]
    command += [word for abi in dict.fromkeys((platform.abi, "abi3", "none")) for word in ("--abi", abi)]
    command += [word for tag in platform_tags(platform) for word in ("--platform", tag)]
    command += ["--no-index", "--find-links", str(Path(wheelhouse).absolute())] if wheelhouse else []
    try:
        done = subprocess.run(
            [*command, *requirements],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_DOWNLOAD_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ToolchainError(
            f"fetching {' '.join(requirements)} took longer than {_DOWNLOAD_LIMIT_S:g} s; try again"
        ) from error
    if done.returncode == 0:
        return None
    if _NO_MATCH.search(done.stderr) and not _NO_INDEX.search(done.stderr):
        return done.stderr
    last = "\n".join(line for line in done.stderr.strip().splitlines()[-4:])
    raise ToolchainError(
        f"{' '.join(requirements)} cannot be fetched; without a network, put wheels for {platform} in a folder and set "
        f"{WHEELHOUSE_VARIABLE} to it. pip said:\n{last}"
    )


def _found_wheel(folder: Path, distribution: str) -> tuple[Path, str]:
    """Return a distribution's wheel and version."""
    for path in sorted(folder.glob("*.whl")):
        words = path.name.split("-")
        if normalized(words[0]) == normalized(distribution):
            return path, words[1]
    raise ToolchainError(f"pip says that it fetched {distribution}, but left no wheel of it; try again")


# --- packing


def pack(
    wheels: Sequence[Path],
    runtime: DeviceRuntime,
    platform: Platform,
    folder: Path,
    *,
    note: str = "",
    progress: Progress = lambda text: None,
) -> Prefix:
    """Write what a board needs of some wheels as one tar; the same wheels always give the same bytes.

    Args:
        wheels: of the runtime and of whatever it depends on; what is not needed is left out.
        runtime: which of them are needed, and which files.
        platform: the board's.
        folder: where the tar and its manifest are written.
        note: what a person should know about the choice.
        progress: told what happens.

    Raises:
        ToolchainError: a wheel is damaged, unsafe, or made for another machine.
    """
    needed = {normalized(runtime.distribution), *(_name_of(requirement) for requirement in runtime.needs)}
    used = [path for path in wheels if normalized(path.name.split("-")[0]) in needed]
    version = _found_wheel(wheels[0].parent, runtime.distribution)[1]
    progress(f"packing {runtime.distribution} {version}")
    contents: dict[str, bytes] = {}
    for path in used:
        for name, data in read_wheel(path, platform.machine).items():
            if contents.setdefault(name, data) != data:
                raise ToolchainError(f"{path.name} and another wheel both bring {name}; choose another version")
    contents = {name: data for name, data in contents.items() if not _is_unneeded(name, runtime.unneeded)}
    tar = folder / _TAR
    with tar.open("wb") as stream:
        write_tar(contents, stream)
    digest = sha256_file(tar)
    prefix = Prefix(
        name=f"{normalized(runtime.distribution)}-{version}-{platform.tag}-{digest[:8]}",
        distribution=runtime.distribution,
        version=version,
        module=runtime.module,
        tar_sha256=digest,
        tar_bytes=tar.stat().st_size,
        unpacked_bytes=sum(-(-len(data) // _BLOCK_BYTES) * _BLOCK_BYTES for data in contents.values()),
        files=len(contents),
        wheels=tuple(Wheel(file=one.name, sha256=sha256_file(one), size_bytes=one.stat().st_size) for one in used),
        note=note,
    )
    write_json(folder / _MANIFEST, prefix)
    return prefix


def _name_of(requirement: str) -> str:
    match = _REQUIREMENT.match(requirement)
    assert match is not None, f"{requirement!r} of a back end is not a requirement"
    return normalized(match["name"])


def _is_unneeded(name: str, patterns: Sequence[str]) -> bool:
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in _KEPT):
        return False
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in (*_UNNEEDED, *patterns))


def read_wheel(path: Path, machine: str) -> dict[str, bytes]:
    """Return the files of a wheel as they lie in site-packages, each verified by the wheel's RECORD.

    Raises:
        ToolchainError: it is damaged, names a path outside, holds a link, or a library for another machine.
    """

    def refuse(reason: str) -> ToolchainError:
        return ToolchainError(
            f"the wheel {path.name} is not safe to unpack: {reason}; fetch it again, or another version"
        )

    try:
        with zipfile.ZipFile(path) as wheel:
            entries = [entry for entry in wheel.infolist() if not entry.is_dir()]
            if len(entries) > _MOST_FILES or sum(entry.file_size for entry in entries) > _MOST_BYTES:
                raise refuse(f"it would unpack to {len(entries)} files of {sum(e.file_size for e in entries)} bytes")
            found: dict[str, bytes] = {}
            for entry in entries:
                if stat.S_ISLNK(entry.external_attr >> 16):
                    raise refuse(f"{entry.filename!r} is a link")
                if not _is_inside(entry.filename):
                    raise refuse(f"{entry.filename!r} is not a path inside")
                if entry.filename in found:
                    raise refuse(f"{entry.filename!r} is in it twice")
                found[entry.filename] = wheel.read(entry)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise ToolchainError(f"the wheel {path.name} is damaged ({error}); fetch it again") from error
    _check_record(path, found)
    placed: dict[str, bytes] = {}
    for name, data in found.items():
        _check_machine(path, name, data, machine)
        if place := _place(name):
            placed[place] = data
    return placed


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\\" not in name and "\0" not in name


def _place(name: str) -> str:
    """Return where a wheel's file lies in site-packages; "" for scripts and headers, which lie elsewhere."""
    first, _, rest = name.partition("/")
    if not first.endswith(".data"):
        return name
    scheme, _, inside = rest.partition("/")
    return inside if scheme in ("purelib", "platlib") else ""


def _check_record(path: Path, found: dict[str, bytes]) -> None:
    """Compare every file with the digest in RECORD (PEP 427), which alone has none."""
    records = [name for name in found if re.fullmatch(r"[^/]+\.dist-info/RECORD", name)]
    if len(records) != 1:
        raise ToolchainError(f"the wheel {path.name} has {len(records)} RECORD files instead of one; fetch it again")
    digests: dict[str, str] = {}
    for row in csv.reader(io.StringIO(found[records[0]].decode("utf-8", "replace"))):
        if len(row) >= 2:
            digests[row[0]] = row[1]
    unsigned = (records[0], f"{records[0]}.jws", f"{records[0]}.p7s")
    for name, data in found.items():
        if name in unsigned:
            continue
        algorithm, _, wanted = digests.get(name, "").partition("=")
        if algorithm not in ("sha256", "sha384", "sha512"):
            raise ToolchainError(f"the wheel {path.name} does not say the digest of {name}; fetch it again")
        digest = base64.urlsafe_b64encode(hashlib.new(algorithm, data).digest()).rstrip(b"=").decode()
        if digest != wanted:
            raise ToolchainError(f"{name} in the wheel {path.name} is not what its RECORD says; fetch it again")
    if absent := digests.keys() - found.keys():
        raise ToolchainError(f"the wheel {path.name} lacks {sorted(absent)[0]}, which its RECORD names; fetch it again")


def _check_machine(path: Path, name: str, data: bytes, machine: str) -> None:
    """Refuse a library for another processor, whatever the wheel's name says."""
    wanted = _ELF_MACHINES.get(machine)
    if wanted is None or data[:4] != b"\x7fELF" or len(data) < 20:
        return
    found = int.from_bytes(data[18:20], "little" if data[5] == 1 else "big")
    if found != wanted:
        named = next((name for name, code in _ELF_MACHINES.items() if code == found), f"machine {found}")
        raise ToolchainError(
            f"{name} in the wheel {path.name} is a library for {named}, and the board is {machine}; the wheel is "
            "wrongly built: choose another version"
        )


def write_tar(contents: dict[str, bytes], stream: io.BufferedIOBase | io.BufferedWriter) -> None:
    """Write files as a tar in which nothing but names and bytes counts: the order, the owner and the date are ours."""
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for folder in sorted({str(parent) for name in contents for parent in PurePosixPath(name).parents} - {"."}):
            entry = _entry(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        for name in sorted(contents):
            entry = _entry(name)
            entry.size = len(contents[name])
            tar.addfile(entry, io.BytesIO(contents[name]))


def _entry(name: str) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.mtime, entry.mode = _MTIME_S, 0o644
    return entry
