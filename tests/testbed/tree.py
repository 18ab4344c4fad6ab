"""The file system of an arm64 Debian, unpacked and never configured: no arm64 program runs while it is made."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from .board import am_root, new_key
from .cache import TestbedError, cache, digest, made_whole, only_one
from .tools import TREE, Mirror, debian_mirror, install, program, run

# Everything that a shell on the device needs, Python, sshd, openssl to check bundles, and what wheels of runtimes link to.
PACKAGES = (
    "base-files,base-passwd,bash,busybox-static,coreutils,dash,debianutils,diffutils,findutils,grep,gzip,hostname,"
    "iproute2,libc-bin,libgomp1,libstdc++6,login,mawk,mount,openssh-server,openssh-sftp-server,openssl,passwd,procps,"
    "python3,sed,tar,util-linux,linux-image-cloud-arm64"
)
LEFT_OUT = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*")
RECIPE = 1  # grows when what is made below changes

# Maintainer scripts would have made these. PAM was never configured, so sshd checks keys alone.
USERS = """\
root:x:0:0:root:/root:/bin/bash
pi:x:1000:1000::/home/pi:/bin/bash
sshd:x:101:65534::/run/sshd:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
# A password that nothing matches: an account without one is locked, and sshd refuses those.
SHADOW = "root:*:19000:0:99999:7:::\npi:*:19000:0:99999:7:::\nsshd:!:19000::::::\nnobody:!:19000::::::\n"
HOSTS = "127.0.0.1 localhost board\n"
NSSWITCH = "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n"
SSHD_CONFIG = """\
HostKey /etc/ssh/ssh_host_ed25519_key
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
PrintMotd no
MaxStartups 100
Subsystem sftp internal-sftp
"""
FOLDERS = (
    "proc",
    "sys",
    "dev",
    "run/sshd",
    "tmp",
    "var/tmp",
    "root/.ssh",
    "home/pi/.ssh",
    "etc/ssh",
    "opt/edge",
    "boot",
)


@dataclass(frozen=True, slots=True)
class Tree:
    """An unpacked arm64 Debian.

    Attributes:
        root: its file system.
        kernel: its kernel and modules, apart: boot/vmlinuz-*, lib/modules/*.
        recipe: digits of what it was made from.
    """

    root: Path
    kernel: Path
    recipe: str


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of all hybrid devices and virtual machines of this person: made once, never in an archive.

    Attributes:
        client: lets in as root and as pi.
        host: the devices' own.
    """

    client: Path
    host: Path


def keys() -> Keys:
    """Return the keys, made on first use."""
    folder = cache() / "keys"
    folder.mkdir(mode=0o700, exist_ok=True)
    with only_one("keys"):
        return Keys(new_key(folder / "client"), new_key(folder / "host"))


def tree() -> Tree:
    """Return the arm64 Debian, from the cache or built from apt's mirror.

    The archive in the cache is enough to make everything else again, so it is what continuous integration may keep.

    Raises:
        TestbedError: it cannot be built here; the text says why.
    """
    if not am_root():
        raise TestbedError("an arm64 tree has files of several owners, which only root can make; run it as root")
    with only_one("tree"):
        found = _cached()
        if found is None:
            install(TREE)
            _build(debian_mirror())
            found = _cached()
        assert found is not None
        return found


def _cached() -> Tree | None:
    """Return the tree if it or its archive is there."""
    archives = sorted((cache() / "archives").glob(f"tree-*-{_recipe()}.tar.zst"))
    if not archives:
        return None
    name = archives[-1].name.removesuffix(".tar.zst")
    folder = cache() / name
    if not folder.exists():
        install(TREE)
        with made_whole(folder) as part:
            part.mkdir()
            run(["tar", "--zstd", "--numeric-owner", "-xpf", archives[-1], "-C", part])
    return Tree(folder / "root", folder / "kernel", name)


def _recipe() -> str:
    return digest(str(RECIPE), *PACKAGES.split(","), *LEFT_OUT, USERS, SHADOW, HOSTS, NSSWITCH, SSHD_CONFIG, *FOLDERS)


def _build(mirror: Mirror) -> None:
    """Make the archive: packages fetched and verified by apt, unpacked, and completed by hand."""
    archives = cache() / "archives"
    archives.mkdir(exist_ok=True)
    work = cache() / "tree.work"
    if work.exists():
        shutil.rmtree(work)
    work.mkdir()
    root, kernel = work / "root", work / "kernel"
    run(
        [
            program("mmdebstrap"),
            "--quiet",
            "--mode=root",
            "--architectures=arm64",
            "--variant=extract",
            f"--include={PACKAGES}",
            *(f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT),
            '--aptopt=Apt::Install-Recommends "false"',
            '--aptopt=Acquire::Languages "none"',
            mirror.codename,
            root,
            mirror.line(),
        ],
        timeout_s=900.0,
    )
    _move_kernel(root, kernel)
    _complete(root)
    with made_whole(archives / f"tree-{mirror.codename}-{_recipe()}.tar.zst") as part:
        run(["tar", "--numeric-owner", "-I", "zstd -3 -T0", "-cf", part, "-C", work, "root", "kernel"])
    shutil.rmtree(work)


def _move_kernel(root: Path, kernel: Path) -> None:
    """Keep the kernel apart from the tree, in which nobody needs it."""
    (kernel / "lib").mkdir(parents=True)
    modules = root / "lib/modules"
    shutil.move(modules.resolve(), kernel / "lib/modules")
    shutil.move(root / "boot", kernel / "boot")


def _complete(root: Path) -> None:
    """Do what the packages' maintainer scripts would have done, as far as it is needed."""
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True, exist_ok=True)
    groups = (root / "usr/share/base-passwd/group.master").read_text()
    texts = {
        "etc/passwd": USERS,
        "etc/group": f"{groups}pi:x:1000:\n",
        "etc/shadow": SHADOW,
        "etc/hostname": "board\n",
        "etc/hosts": HOSTS,
        "etc/nsswitch.conf": NSSWITCH,
        "etc/ssh/sshd_config": SSHD_CONFIG,
    }
    for name, text in texts.items():
        (root / name).write_text(text)
    (root / "etc/shadow").chmod(0o640)
    for folder in ("tmp", "var/tmp"):
        (root / folder).chmod(0o1777)
    for folder in ("root/.ssh", "home/pi/.ssh"):
        (root / folder).chmod(0o700)
    for path in (root / "home/pi", root / "home/pi/.ssh"):
        os.chown(path, 1000, 1000)
    with contextlib.suppress(FileExistsError):
        (root / "usr/bin/awk").symlink_to("mawk")
