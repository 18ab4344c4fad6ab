"""The first process of a hybrid device: private namespaces, arm64 programs by qemu, an overlay, then sshd.

A program of its own, started as `python -I -S namespace.py SPEC.json`, because it must have one thread. Everything that
it mounts and registers belongs to namespaces that end with it, whichever way it ends.
"""

import ctypes
import json
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

NEW_USER, NEW_PID, NEW_MOUNT, NEW_UTS, NEW_IPC = 0x10000000, 0x20000000, 0x20000, 0x4000000, 0x8000000
BIND, RECURSIVE, PRIVATE = 0x1000, 0x4000, 0x40000
SET_DEATH_SIGNAL, KILL = 1, 9
# An aarch64 ELF file, whatever its type; F: the interpreter is opened now, and so it is found from within the tree.
BINFMT = (
    r":edge-aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
    r":\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:{}:F"
)
AT = Path("/mnt")  # owned by root, as are its parents, which sshd demands of ChrootDirectory
DEVICE = AT / "device"
NODES = ("null", "zero", "full", "random", "urandom", "tty")
LINKS = {"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}
libc = ctypes.CDLL(None, use_errno=True)


def check(status: int, what: object) -> None:
    """Raise what a function of the C library reported."""
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(kind: str, target: Path, options: str = "", source: Path | None = None, flags: int = 0) -> None:
    """Mount, as mount(2)."""
    words = [str(word).encode() for word in (source or "none", target, kind)]
    check(libc.mount(*words, ctypes.c_ulong(flags), options.encode()), f"mount {kind or source} on {target}")


def bind(source: Path, target: Path) -> None:
    """Show a file or a folder in another place too; the place must be there."""
    mount("", target, source=source, flags=BIND | RECURSIVE)


def folder(path: Path, mode: int = 0o755) -> Path:
    """Make a folder with exactly that mode."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(mode)
    return path


def tmpfs(path: Path, mode: int, size_bytes: int = 0) -> None:
    """Mount an empty file system in memory."""
    path.mkdir(parents=True, exist_ok=True)
    mount("tmpfs", path, f"mode={mode:o}" + (f",size={size_bytes}" if size_bytes else ""))


def main(spec: dict[str, Any]) -> int:
    """Enter namespaces; the parent stays outside and waits, so that it can map users and be killed as one with us."""
    asks, answers = os.pipe(), os.pipe()
    child = os.fork()
    if child:
        os.read(asks[0], 1)
        if spec["private_binfmt"]:
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{child}/{name}").write_text("0 0 65536\n")
        os.write(answers[1], b"x")
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    check(libc.prctl(SET_DEATH_SIGNAL, KILL), "prctl")
    if spec["private_binfmt"]:
        check(libc.unshare(NEW_USER), "a user namespace")
        check(libc.prctl(SET_DEATH_SIGNAL, KILL), "prctl")  # changing users clears it
    os.write(asks[1], b"x")
    os.read(answers[0], 1)
    check(libc.unshare(NEW_MOUNT | NEW_PID | NEW_UTS | NEW_IPC), "namespaces")
    first = os.fork()
    if first:
        return os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
    check(libc.prctl(SET_DEATH_SIGNAL, KILL), "prctl")
    become_device(spec)
    return 127


def held(path: str) -> Path:
    """Return a name for a folder that stays when a mount hides it."""
    return Path(f"/proc/self/fd/{os.open(path, os.O_PATH)}")


def become_device(spec: dict[str, Any]) -> None:
    """Make the device's file system, then be its sshd."""
    check(libc.mount(b"none", b"/", None, ctypes.c_ulong(RECURSIVE | PRIVATE), None), "private mounts")
    lower, board = held(spec["tree"]), held(spec["board"])
    payload = held(spec["payload"]) if spec["payload"] else None
    mount("proc", Path("/proc"))
    if spec["private_binfmt"]:
        formats = Path("/proc/sys/fs/binfmt_misc")
        mount("binfmt_misc", formats)
        (formats / "register").write_text(BINFMT.format(spec["qemu"]))
    tmpfs(AT, 0o755, spec["disk_bytes"])
    upper, work = folder(AT / "upper"), folder(AT / "work")
    folder(DEVICE)
    shutil.copytree(board / "files", upper, symlinks=True, dirs_exist_ok=True)
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    mount("overlay", DEVICE, options + (",userxattr" if spec["private_binfmt"] else ""))

    mount("proc", DEVICE / "proc")
    bind(board / "cpuinfo", DEVICE / "proc/cpuinfo")
    bind(board / "boot_id", DEVICE / "proc/sys/kernel/random/boot_id")
    bind(board / "sys", DEVICE / "sys")
    make_dev(DEVICE / "dev")
    tmpfs(DEVICE / "tmp", 0o1777, spec["tmp_bytes"])
    tmpfs(DEVICE / "run", 0o755)
    folder(DEVICE / "run/lock", 0o1777)
    if payload is not None:
        bind(payload, DEVICE / "opt/edge")

    # sshd asks for users and keys before it enters the tree.
    for name in ("passwd", "group", "shadow", "nsswitch.conf"):
        bind(DEVICE / "etc" / name, Path("/etc", name))
    tmpfs(Path("/run"), 0o755)
    folder(Path("/run/sshd"))
    shutil.copy(spec["authorized_key"], AT / "authorized_keys")
    (AT / "authorized_keys").chmod(0o644)
    socket.sethostname(spec["hostname"])
    os.chdir("/")
    os.execv(spec["sshd"], [spec["sshd"], "-D", "-e", "-f", spec["config"]])


def make_dev(dev: Path) -> None:
    """Fill /dev; sshd makes terminals outside the tree, and so both see the same ones."""
    tmpfs(dev, 0o755)
    for name in NODES:
        (dev / name).touch()
        bind(Path("/dev", name), dev / name)
    mount("devpts", Path("/dev/pts"), "newinstance,ptmxmode=0666,mode=620,gid=5")
    bind(Path("/dev/pts"), folder(dev / "pts"))
    tmpfs(dev / "shm", 0o1777)
    for name, target in LINKS.items():
        (dev / name).symlink_to(target)


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text())))
