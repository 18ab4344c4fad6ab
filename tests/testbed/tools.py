"""Programs that devices are made with and from: which are missing, and their installation by apt."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from .cache import TestbedError, only_one

# Debian's package → a program that it brings.
PLAIN = {"openssh-server": "sshd", "openssh-client": "ssh"}
TREE = {**PLAIN, "mmdebstrap": "mmdebstrap", "zstd": "zstd"}
HYBRID = {**TREE, "qemu-user-static": "qemu-aarch64-static"}
VM = {
    **TREE,
    "qemu-system-arm": "qemu-system-aarch64",
    "qemu-utils": "qemu-img",
    "cpio": "cpio",
    "e2fsprogs": "mke2fs",
}
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin:/sbin"


@dataclass(frozen=True, slots=True)
class Mirror:
    """Where this machine gets Debian from, and the keys that sign it."""

    uri: str
    codename: str
    keyring: str

    def line(self) -> str:
        """Return it as a line of sources.list."""
        return f"deb [signed-by={self.keyring}] {self.uri} {self.codename} main"


def program(name: str) -> str:
    """Return a program's path. Raises TestbedError where it is not installed."""
    found = shutil.which(name, path=_PATH)
    if found is None:
        raise TestbedError(f"there is no {name} here; run: python -m tests.testbed build")
    return found


def missing(packages: dict[str, str]) -> list[str]:
    """Return the packages whose program is not there."""
    return [package for package, name in packages.items() if shutil.which(name, path=_PATH) is None]


def install(packages: dict[str, str]) -> None:
    """Install what is missing, as root or by a sudo that asks for no password.

    Raises:
        TestbedError: it cannot; the text has the command for a person.
    """
    with only_one("apt"):
        wanted = missing(packages)
        if not wanted:
            return
        become_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
        by_hand = f"install them yourself: sudo apt-get install --no-install-recommends {' '.join(wanted)}"
        if shutil.which("apt-get") is None:
            raise TestbedError(f"{', '.join(wanted)} are missing, and there is no apt-get here; install them yourself")
        environment = [*become_root, "env", "DEBIAN_FRONTEND=noninteractive"]
        install = ["install", "-y", "-qq", "--no-install-recommends", *wanted]
        for command in (["update", "-qq"], install):
            try:
                done = subprocess.run(
                    [*environment, "apt-get", *command], capture_output=True, text=True, timeout=600, check=False
                )
            except OSError as error:
                raise TestbedError(f"{wanted} are missing and {error.filename} is too; {by_hand}") from error
            if done.returncode != 0:
                raise TestbedError(f"apt-get {command[0]} failed: {done.stderr.strip()[-500:]}; {by_hand}")


def debian_mirror() -> Mirror:
    """Return the release and the mirror that this machine's own apt uses, to get arm64 packages from there.

    Raises:
        TestbedError: it is no Debian, or its apt knows no main archive of it.
    """
    form = "$(CREATED_BY)|$(ORIGIN)|$(COMPONENT)|$(ARCHITECTURE)|$(SUITE)|$(CODENAME)|$(REPO_URI)|$(SIGNED_BY)|"
    said = _indexes(form)
    if not said:  # a fresh image has no lists yet, and without them apt does not say whose release it is
        become_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
        subprocess.run([*become_root, "apt-get", "update", "-qq"], capture_output=True, timeout=300, check=False)
        said = _indexes(form)
    if not said:
        raise TestbedError(
            "apt's configuration names no main archive of a Debian release, from which the arm64 packages of devices "
            "could come; build them on Debian, or in a container of it (docker/device.Dockerfile)"
        )
    uri, codename, keyring = said[0]
    # What apt trusts by default is more than Debian's own keys.
    return Mirror(uri, codename, keyring or "/usr/share/keyrings/debian-archive-keyring.gpg")


def _indexes(form: str) -> list[tuple[str, str, str]]:
    """Return (URI, codename, keyring) of the main archives of Debian releases that apt is configured with."""
    try:
        done = subprocess.run(
            ["apt-get", "indextargets", "--format", form], capture_output=True, text=True, timeout=60, check=False
        )
    except OSError as error:
        raise TestbedError(f"there is no {error.filename} here; devices are built from Debian's packages") from error
    found = []
    for line in done.stdout.splitlines():
        created_by, origin, component, _, suite, codename, uri, keyring = line.split("|")[:8]
        is_release = not codename.endswith(("-updates", "-security", "-backports", "-proposed-updates"))
        if (created_by, origin, component) == ("Packages", "Debian", "main") and is_release and "-" not in suite:
            found.append((uri, codename, "" if keyring.startswith("$(") else keyring.split(",")[0]))
    return found


def run(argv: Iterable[object], *, timeout_s: float = 300.0, stdin: bytes = b"") -> bytes:
    """Run a program to its end and return what it prints.

    Raises:
        TestbedError: it failed; the text has its last lines.
    """
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(words, input=stdin, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise TestbedError(f"{words[0]} did not end within {timeout_s:g} s") from error
    if done.returncode != 0:
        raise TestbedError(f"{words[0]} failed: {done.stderr.decode(errors='replace').strip()[-800:]}")
    return done.stdout
