"""What a virtual machine starts from: kernel, initrd, disk and a snapshot of it running. No arm64 program is emulated here."""

from __future__ import annotations

import gzip
import lzma
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .cache import cache, digest, made_whole, only_one
from .identity import MODELS, Identity
from .tools import program, run
from .tree import Keys, Tree

DISK_BYTES = 2 << 30
PAYLOAD_BYTES = 1 << 30  # one size for all, because a snapshot remembers its drives

# Of Debian's cloud kernel, in the order of loading; ext4 is built in.
BOOT_MODULES = (
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio_mmio",
    "drivers/block/virtio_blk",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
    "drivers/char/hw_random/virtio-rng",
)
# Bad links and full disks inside the machine.
FAULT_MODULES = ("net/sched/sch_netem", "net/sched/sch_tbf", "drivers/block/loop")

# Drives of virt machines are numbered backwards: the root is found by its serial number.
INIT = """\
#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
for module in {modules}; do insmod "/m/$module.ko"; done
n=0; root=
while [ -z "$root" ] && [ $n -lt 200 ]; do
    for block in /sys/block/vd*; do [ "$(cat "$block/serial" 2>/dev/null)" = root ] && root=/dev/${{block##*/}}; done
    n=$((n + 1)); [ -n "$root" ] || sleep 0.05
done
mount -t ext4 -o rw "$root" /newroot || exec sh
mount --move /dev /newroot/dev; mount --move /proc /newroot/proc; mount --move /sys /newroot/sys
exec switch_root /newroot /sbin/init
"""
INITTAB = """\
::sysinit:/etc/rcS
::respawn:/usr/sbin/sshd -D -e -E /var/log/sshd.log
::ctrlaltdel:/sbin/reboot
::shutdown:/bin/sync
::shutdown:/bin/busybox umount -a -r
"""
RCS = """\
#!/bin/sh
mount -t tmpfs -o mode=755 tmpfs /run; mkdir -p /run/sshd; mkdir -p -m 1777 /run/lock
mount -t tmpfs -o size=64m,mode=1777 tmpfs /tmp
mkdir -p /dev/pts /dev/shm; mount -t devpts devpts /dev/pts; mount -t tmpfs -o mode=1777 tmpfs /dev/shm
ln -s /proc/self/fd /dev/fd
mount -t cgroup2 none /sys/fs/cgroup
hostname vm
ip link set lo up; ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; ip route add default via 10.0.2.2
for module in {modules}; do insmod "/lib/modules/edge/$module.ko"; done
echo "boot-id $(cat /proc/sys/kernel/random/boot_id)" > /dev/console
"""
PAYLOAD = """\
#!/bin/sh
# Mounts the second drive. A snapshot's kernel may still know the first block of another drive.
for block in /sys/block/vd*; do
    [ "$(cat "$block/serial")" = payload ] || continue
    /bin/busybox blockdev --flushbufs "/dev/${block##*/}" && mount -o ro "/dev/${block##*/}" /opt/edge
done
"""
IDENTIFY = """\
#!/bin/sh
# Makes the machine look like a board: identify pi4 | orin
board=/opt/boards/$1
mount --bind "$board/sys" /sys && mount -t cgroup2 none /sys/fs/cgroup && mount --bind "$board/cpuinfo" /proc/cpuinfo &&
    cp -a "$board/files/." / && hostname "$1"
"""
APPLETS = ("reboot", "poweroff", "halt", "insmod", "modprobe", "lsmod", "rmmod", "init")


@dataclass(frozen=True, slots=True)
class Image:
    """What QEMU starts from, in one folder."""

    folder: Path

    @property
    def kernel(self) -> Path:
        """Return the kernel."""
        return self.folder / "kernel"

    @property
    def initrd(self) -> Path:
        """Return the first file system, in memory."""
        return self.folder / "initrd"

    @property
    def disk(self) -> Path:
        """Return the root file system."""
        return self.folder / "root.img"

    def snapshot(self, cpu: str, memory_mib: int, cores: int) -> Path:
        """Return where the disk with the snapshot of a running machine is, or will be."""
        return self.folder / f"ready-{cpu}-{memory_mib}-{cores}.qcow2"


def image(tree: Tree, keys: Keys) -> Image:
    """Return kernel, initrd and disk, made on first use."""
    public = [Path(f"{key}.pub").read_text() for key in (keys.client, keys.host)]
    scripts = (INIT, INITTAB, RCS, PAYLOAD, IDENTIFY, *BOOT_MODULES, *FAULT_MODULES, *APPLETS)
    boards = Path(__file__).with_name("identity.py").read_text()
    folder = cache() / f"image-{digest(tree.recipe, *public, *scripts, boards, str(DISK_BYTES))}"
    with only_one("image"):
        if not folder.exists():
            with made_whole(folder) as part:
                part.mkdir()
                _make_kernel(tree, part)
                _make_disk(tree, keys, part)
    return Image(folder)


def payload_drive(folder: Path | None, path: Path) -> Path:
    """Make a read-only drive of a folder, or an empty one."""
    with path.open("wb") as stream:
        stream.truncate(PAYLOAD_BYTES)
    if folder is not None:
        run([program("mke2fs"), "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d", folder, path])
    return path


def overlay(base: Path, path: Path) -> Path:
    """Make a disk that has what another one has, and keeps apart what is written."""
    run([program("qemu-img"), "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path])
    return path


def _make_kernel(tree: Tree, folder: Path) -> None:
    """Make the kernel and a small initrd: busybox and what finds the disk."""
    (kernel,) = (tree.kernel / "boot").glob("vmlinuz-*")
    shutil.copy(kernel, folder / "kernel")
    stage = folder / "initrd.work"
    for name in ("bin", "m", "proc", "sys", "dev", "newroot"):
        (stage / name).mkdir(parents=True)
    shutil.copy(_busybox(tree), stage / "bin/busybox")
    for applet in ("sh", "mount", "insmod", "switch_root", "sleep", "cat"):
        (stage / "bin" / applet).symlink_to("busybox")
    for name in BOOT_MODULES:
        _copy_module(tree, name, stage / "m")
    (stage / "init").write_text(INIT.format(modules=_names(BOOT_MODULES)))
    (stage / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(stage)) for path in sorted(stage.rglob("*")))
    made = subprocess.run(
        [program("cpio"), "--create", "--format=newc", "--quiet", "--owner=0:0"],
        input=names.encode(),
        capture_output=True,
        cwd=stage,
        check=True,
        timeout=60,
    )
    (folder / "initrd").write_bytes(gzip.compress(made.stdout, 1))
    shutil.rmtree(stage)


def _make_disk(tree: Tree, keys: Keys, folder: Path) -> None:
    """Make the root file system, without mounting anything."""
    stage = folder / "root.work"
    run(["cp", "-a", "--reflink=auto", tree.root, stage])
    for applet in APPLETS:
        link = stage / "sbin" / applet
        link.unlink(missing_ok=True)
        link.symlink_to("/bin/busybox")
    modules = stage / "lib/modules/edge"
    modules.mkdir(parents=True)
    for name in FAULT_MODULES:
        _copy_module(tree, name, modules)
    (stage / "etc/hostname").write_text("vm\n")
    (stage / "etc/inittab").write_text(INITTAB)
    scripts = {"etc/rcS": RCS.format(modules=_names(FAULT_MODULES)), "sbin/payload": PAYLOAD, "sbin/identify": IDENTIFY}
    for name, text in scripts.items():
        (stage / name).write_text(text)
        (stage / name).chmod(0o755)
    (stage / "var/log").mkdir(parents=True, exist_ok=True)
    for user in ("root", "home/pi"):
        shutil.copy(f"{keys.client}.pub", stage / user / ".ssh/authorized_keys")
    shutil.copy(keys.host, stage / "etc/ssh/ssh_host_ed25519_key")
    for kind in MODELS:
        Identity(kind, stage / "opt/boards" / kind)  # type: ignore[arg-type]  # the keys of MODELS are the kinds
        (stage / "opt/boards" / kind / "sys/fs/cgroup").mkdir(parents=True)
    disk = folder / "root.img"
    with disk.open("wb") as stream:
        stream.truncate(DISK_BYTES)
    # A small journal, as boards have one: after a power cut the file system is whole.
    run([program("mke2fs"), "-q", "-F", "-t", "ext4", "-J", "size=4", "-E", "root_owner=0:0", "-d", stage, disk])
    shutil.rmtree(stage)


def _names(modules: tuple[str, ...]) -> str:
    return " ".join(Path(name).name for name in modules)


def _busybox(tree: Tree) -> Path:
    found = [path for path in (tree.root / "bin/busybox", tree.root / "usr/bin/busybox") if path.exists()]
    return found[0]


def _copy_module(tree: Tree, name: str, folder: Path) -> None:
    """Copy a kernel module; later releases of Debian compress them, which busybox does not undo."""
    (found,) = (tree.kernel / "lib/modules").glob(f"*/kernel/{name}.ko*")
    data = found.read_bytes()
    (folder / f"{Path(name).name}.ko").write_bytes(lzma.decompress(data) if found.suffix == ".xz" else data)
