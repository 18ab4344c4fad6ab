"""Where things are kept and how they are written: digests, atomic writes, user directories."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` that takes its place only if the block succeeds.

    What stood at `path` stays untouched, and nothing half-written is left, when the block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The kernel applies the person's umask; asking for it means to change it, under the feet of other threads.
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    try:
        yield part
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with atomic_path(path) as part:
        part.write_bytes(data)


def create_atomic(path: Path, data: bytes) -> bool:
    """Write a file whole, unless there is one already; say whether it was written, also while others try the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as cleanup:
        part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
        cleanup.callback(part.unlink, missing_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(part, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links: two writers may then meet between these lines
            if path.exists():
                return False
            part.replace(path)
    return True


# Linux: fcntl.h and linux/fs.h.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step, so that neither is ever missing; False where the system cannot.

    renameat2(2) of Linux 3.15; not every C library, and not every file system (NFS), has it.
    """
    import ctypes

    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and not rename(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE
    )


def _user_directory(variable: str, xdg: str, fallback: str) -> Path:
    chosen = os.environ.get(variable) if variable else None
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get(xdg)
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / fallback) / "edgedeploy"


def cache_dir() -> Path:
    """Return where rebuildable things live (EDGEDEPLOY_CACHE_DIR, else XDG)."""
    return _user_directory("EDGEDEPLOY_CACHE_DIR", "XDG_CACHE_HOME", ".cache")


def config_dir() -> Path:
    """Return where the person's lab.toml lives."""
    return _user_directory("", "XDG_CONFIG_HOME", ".config")


def state_dir() -> Path:
    """Return where journals and what is known of devices live (EDGEDEPLOY_STATE_DIR, else XDG)."""
    return _user_directory("EDGEDEPLOY_STATE_DIR", "XDG_STATE_HOME", ".local/state")
