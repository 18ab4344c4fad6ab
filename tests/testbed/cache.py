"""Where devices for tests are kept: what took minutes to build, and the folders of those that run."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# What a kernel, its initrd, an unpacked tree and a disk image take, with some room.
LEAST_FREE_BYTES = 2 << 30


class TestbedError(Exception):
    """A device for tests cannot be built or started here; the text says why and what to do."""

    __test__ = False


def cache() -> Path:
    """Return the folder of everything; EDGEDEPLOY_TESTBED_DIR moves it."""
    path = Path(os.environ.get("EDGEDEPLOY_TESTBED_DIR") or Path.home() / ".cache" / "edgedeploy-testbed").absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def only_one(name: str) -> Iterator[None]:
    """Hold a lock between processes: what one builds, the others wait for and find."""
    with (cache() / f"{name}.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def digest(*parts: str | bytes) -> str:
    """Return what a cached thing is named by: twelve digits of everything that it is made from."""
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()[:12]


@contextlib.contextmanager
def made_whole(path: Path) -> Iterator[Path]:
    """Give a temporary name for a file or a folder, which gets its own only when all went well."""
    free = shutil.disk_usage(path.parent).free
    if free < LEAST_FREE_BYTES:
        raise TestbedError(f"{path.parent} has {free >> 20} MiB left, too few to build devices; make room")
    part = path.with_name(f"{path.name}.part")
    remove(part)
    yield part
    part.rename(path)


def remove(path: Path) -> None:
    """Delete a file or a folder; one that is not there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class RunFolder:
    """A folder of one running device, deleted when it stops, or by the next one when its process was killed."""

    def __init__(self, name: str) -> None:
        parent = cache() / "run"
        parent.mkdir(exist_ok=True)
        with only_one("run"):
            for old in parent.iterdir():
                _sweep(old)
            self.path = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent))
            self._owner = (self.path / "owner").open("w")
            fcntl.flock(self._owner, fcntl.LOCK_EX)
        self.path.chmod(0o755)

    def close(self) -> None:
        """Delete it; twice is once."""
        if not self._owner.closed:
            shutil.rmtree(self.path)
            self._owner.close()


def _sweep(folder: Path) -> None:
    """Delete a folder whose owner has ended."""
    try:
        owner = (folder / "owner").open("r+")
    except FileNotFoundError:  # killed before it got so far; folders are made under our lock
        shutil.rmtree(folder)
        return
    with owner:
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        shutil.rmtree(folder)
