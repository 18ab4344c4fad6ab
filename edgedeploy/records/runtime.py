"""A runtime as it is put on a device that has no package index: what is wanted, and what was made of it."""

from __future__ import annotations

from edgedeploy.documents import Record

# History of edgedeploy.prefix:
#   1 (0.1.0)  first version
FORMAT = "edgedeploy.prefix/1"


class DeviceRuntime(Record, frozen=True, kw_only=True):
    """One distribution that a back end's device half can run on.

    Attributes:
        distribution: as package indexes call it.
        module: what the device half imports of it.
        needs: what else that imports, as requirements: "numpy<2"; other dependencies of the distribution are left out.
        unneeded: patterns of files inside that inference never reads.
    """

    distribution: str
    module: str
    needs: tuple[str, ...] = ("numpy",)
    unneeded: tuple[str, ...] = ()


class Wheel(Record, frozen=True, kw_only=True):
    """A wheel that a prefix was made of."""

    file: str
    sha256: str
    size_bytes: int


class Prefix(Record, frozen=True, kw_only=True):
    """A folder for sys.path, packed for a device.

    Attributes:
        name: what it is called on the device: "<distribution>-<version>-<Python>-<eight digits of the tar's digest>".
        note: what a person should know about the choice of version; "" where it is the one that was to be expected.
        unpacked_bytes: of its files, on a disk with blocks of 4 KiB.
    """

    format: str = FORMAT
    name: str
    distribution: str
    version: str
    module: str
    tar_sha256: str
    tar_bytes: int
    unpacked_bytes: int
    files: int
    wheels: tuple[Wheel, ...]
    note: str = ""
