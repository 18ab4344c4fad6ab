"""Which wheels fit a board, and what becomes of them: verified, trimmed, packed with reproducible bytes."""

from __future__ import annotations

import io
import platform
import re
import stat
import tarfile
import zipfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedeploy.errors import DeviceError, ToolchainError
from edgedeploy.lab import wheels
from edgedeploy.lab.wheels import Platform, make_prefix, pack, platform_of, platform_tags, read_wheel
from edgedeploy.ondevice.runner import read_facts
from edgedeploy.records.device import DeviceFacts, Interpreter
from edgedeploy.records.runtime import DeviceRuntime
from edgedeploy.storage import sha256_file
from tests.tiny_wheels import write_wheel

FACTS = DeviceFacts(
    hostname="b", machine="aarch64", system="Linux", kernel="6", os_name="", libc="glibc 2.36", python="3.11.2",
    cpu_model="", isa=(), cores=4, memory_bytes=None, boot_id="", interpreter=Interpreter(tag="cp311", abi="cp311", bits=64),
)  # fmt: skip
PI = platform_of(FACTS)
TINY = DeviceRuntime(
    distribution="tiny-runtime", module="tiny_runtime", needs=("tiny-base",), unneeded=("tiny_runtime/tools/*",)
)
FILES = {
    "tiny_runtime/__init__.py": b"VERSION = '1.0'\n",
    "tiny_runtime/__init__.pyi": b"VERSION: str\n",
    "tiny_runtime/include/tiny.h": b"int tiny;\n",
    "tiny_runtime/tests/test_it.py": b"assert True\n",
    "tiny_runtime/tools/convert.py": b"import nothing\n",
    "tiny_runtime/data/table.bin": bytes(range(256)),
}


def facts(**changes: object) -> DeviceFacts:
    return msgspec.structs.replace(FACTS, **changes)


# --- which fit


@given(minor=st.integers(0, 99), machine=st.sampled_from(["aarch64", "x86_64", "armv7l", "i686"]))
def test_every_older_glibc_fits_and_no_newer_one(minor: int, machine: str) -> None:
    tags = platform_tags(Platform(machine, "glibc", (2, minor), "cp311", "cp311"))
    numbers = [int(match[1]) for tag in tags if (match := re.fullmatch(rf"manylinux_2_(\d+)_{machine}", tag))]
    assert numbers == sorted(numbers, reverse=True)
    assert all(number <= minor for number in numbers)
    oldest = 5 if machine in ("x86_64", "i686") else 17
    assert len(numbers) == max(0, minor - oldest + 1)
    for alias, needed in (("manylinux2014", 17), ("manylinux2010", 12), ("manylinux1", 5)):
        assert (f"{alias}_{machine}" in tags) == (oldest <= needed <= minor)


def test_tags_are_those_that_packaging_gives_for_this_machine() -> None:
    tags = pytest.importorskip("packaging.tags", reason="packaging comes with the extra onnxruntime")
    name, _, version = read_facts()["libc"].partition(" ")
    if name != "glibc":
        pytest.skip(f"this machine's C library is {name}")
    here = platform_of(facts(machine=platform.machine(), libc=f"glibc {version}"))
    expected = [tag for tag in tags.platform_tags() if tag.startswith("manylinux")]
    assert list(platform_tags(here)) == expected


def test_musl_has_tags_of_its_own() -> None:
    musl = platform_of(facts(libc="musl 1.2.5"))
    assert platform_tags(musl) == ("musllinux_1_2_aarch64", "musllinux_1_1_aarch64", "musllinux_1_0_aarch64")


@pytest.mark.parametrize(("machine", "expected"), [("aarch64", "armv7l"), ("x86_64", "i686"), ("armv7l", "armv7l")])
def test_a_32_bit_system_on_a_64_bit_kernel_gets_32_bit_wheels(machine: str, expected: str) -> None:
    interpreter = Interpreter(tag="cp311", abi="cp311", bits=32)
    assert platform_of(facts(machine=machine, interpreter=interpreter)).machine == expected


@given(text=st.text(max_size=40))
def test_what_a_device_says_of_itself_becomes_tags_or_a_sentence(text: str) -> None:
    for changes in (
        {"libc": text}, {"libc": f"glibc {text}"}, {"machine": text},
        {"interpreter": Interpreter(tag=text, abi=text, bits=64)},
    ):  # fmt: skip
        try:
            tags = platform_tags(platform_of(facts(**changes)))
        except DeviceError as error:
            assert "lab.toml" in str(error)
        else:
            assert len(tags) <= 200
            assert all(re.fullmatch(r"[a-z0-9_]+", tag) for tag in tags)


def test_a_glibc_from_the_future_does_not_make_a_list_without_end() -> None:
    with pytest.raises(DeviceError, match="C library"):
        platform_of(facts(libc="glibc 2.999"))


# --- what becomes of them


def made(folder: Path) -> list[Path]:
    return [
        write_wheel(folder, "tiny-runtime", "1.0", FILES, requires=["tiny-base", "unneeded"]),
        write_wheel(folder, "tiny-base", "2.0", {"tiny_base.py": b"", "tiny_runtime/shared.py": b""}),
        write_wheel(folder, "unneeded", "3.0", {"unneeded.py": b""}),
    ]


def packed(wheels_: list[Path], folder: Path) -> tuple[set[str], bytes]:
    folder.mkdir()
    prefix = pack(wheels_, TINY, PI, folder)
    data = (folder / "prefix.tar").read_bytes()
    assert (len(data), sha256_file(folder / "prefix.tar")) == (prefix.tar_bytes, prefix.tar_sha256)
    assert prefix.name == f"tiny-runtime-1.0-cp311-{prefix.tar_sha256[:8]}"
    assert {one.file: one.sha256 for one in prefix.wheels} == {path.name: sha256_file(path) for path in wheels_[:2]}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {one.name for one in tar if one.isfile()}, data


def test_what_inference_does_not_need_is_left_out_and_the_rest_is_there(tmp_path: Path) -> None:
    names, _ = packed(made(tmp_path / "wheels"), tmp_path / "packed")
    assert names == {
        "tiny_runtime/__init__.py", "tiny_runtime/data/table.bin", "tiny_runtime/shared.py", "tiny_base.py",
        "tiny_runtime-1.0.dist-info/METADATA", "tiny_runtime-1.0.dist-info/WHEEL",
        "tiny_base-2.0.dist-info/METADATA", "tiny_base-2.0.dist-info/WHEEL",
    }  # fmt: skip


def test_the_same_wheels_always_give_the_same_bytes(tmp_path: Path) -> None:
    first = made(tmp_path / "one")
    _, one = packed(first, tmp_path / "packed-one")
    _, two = packed([*reversed(made(tmp_path / "two")[:2])], tmp_path / "packed-two")
    assert one == two
    with tarfile.open(fileobj=io.BytesIO(one)) as tar:
        assert {(member.uid, member.gid, member.uname, member.mtime) for member in tar} == {(0, 0, "", 315532800)}


@pytest.mark.parametrize(
    ("unsigned", "said"),
    [
        ({"tiny_runtime/__init__.py": b"VERSION = 'changed'\n"}, "not what its RECORD says"),
        ({"tiny_runtime/extra.py": b""}, "does not say the digest of tiny_runtime/extra.py"),
        ({"../outside.py": b""}, "not a path inside"),
        ({"/etc/passwd": b""}, "not a path inside"),
        ({"a\\..\\b.py": b""}, "not a path inside"),
    ],
)
def test_a_damaged_or_unsafe_wheel_is_refused(tmp_path: Path, unsigned: dict[str, bytes], said: str) -> None:
    path = write_wheel(tmp_path, "tiny-runtime", "1.0", FILES, unsigned=unsigned)
    with pytest.raises(ToolchainError, match=re.escape(said)):
        read_wheel(path, "aarch64")


def test_a_wheel_with_a_link_is_refused(tmp_path: Path) -> None:
    path = write_wheel(tmp_path, "tiny-runtime", "1.0", FILES)
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("tiny_runtime/secrets")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/shadow")
    with pytest.raises(ToolchainError, match="is a link"):
        read_wheel(path, "aarch64")


def test_a_wheel_that_lacks_a_file_of_its_record_is_refused(tmp_path: Path) -> None:
    path = write_wheel(tmp_path, "tiny-runtime", "1.0", FILES)
    with zipfile.ZipFile(path) as whole:
        kept = {name: whole.read(name) for name in whole.namelist() if not name.endswith("table.bin")}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in kept.items():
            archive.writestr(name, data)
    with pytest.raises(ToolchainError, match=r"lacks tiny_runtime/data/table\.bin"):
        read_wheel(path, "aarch64")


def test_a_truncated_wheel_is_refused(tmp_path: Path) -> None:
    path = write_wheel(tmp_path, "tiny-runtime", "1.0", FILES)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ToolchainError, match="damaged"):
        read_wheel(path, "aarch64")


def test_a_library_for_another_processor_is_refused_whatever_the_wheel_is_called(tmp_path: Path) -> None:
    x86 = b"\x7fELF\x02\x01\x01" + bytes(9) + (3).to_bytes(2, "little") + (62).to_bytes(2, "little") + bytes(40)
    path = write_wheel(
        tmp_path, "tiny-runtime", "1.0", {"tiny_runtime/core.so": x86}, tag="cp311-cp311-manylinux_2_17_aarch64"
    )
    with pytest.raises(ToolchainError, match="a library for x86_64, and the board is aarch64"):
        read_wheel(path, "aarch64")
    assert "tiny_runtime/core.so" in read_wheel(path, "x86_64")


def test_files_of_the_data_folder_go_where_python_looks_and_scripts_go_nowhere(tmp_path: Path) -> None:
    files = {"t-1.data/purelib/tiny/x.py": b"x", "t-1.data/scripts/tiny": b"#!", "t-1.data/headers/t.h": b""}
    assert "tiny/x.py" in (found := read_wheel(write_wheel(tmp_path, "t", "1", files), "aarch64"))
    assert not any("script" in name or name.endswith(".h") for name in found)


# --- fetching them, from a folder of wheels


@pytest.fixture
def wheelhouse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "wheels"
    made(folder)
    write_wheel(folder, "tiny-runtime", "1.5", FILES, tag="cp39-cp39-manylinux_2_17_aarch64", requires=["tiny-base"])
    write_wheel(folder, "tiny-runtime", "2.0", FILES, tag="cp311-cp311-manylinux_2_38_aarch64", requires=["tiny-base"])
    monkeypatch.setenv("EDGEDEPLOY_WHEELHOUSE", str(folder))
    monkeypatch.setenv("EDGEDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    return folder


def test_the_newest_that_fits_is_taken_once_and_then_kept(wheelhouse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, tar = make_prefix([TINY], PI)
    assert (prefix.version, prefix.note, sha256_file(tar)) == ("1.0", "", prefix.tar_sha256)
    monkeypatch.setattr(wheels.subprocess, "run", None)  # pip is not asked again
    assert make_prefix([TINY], PI) == (prefix, tar)


def test_a_newer_c_library_takes_a_newer_wheel_and_an_older_python_its_own(wheelhouse: Path) -> None:
    newer = platform_of(facts(libc="glibc 2.38"))
    older = platform_of(facts(interpreter=Interpreter(tag="cp39", abi="cp39", bits=64)))
    assert make_prefix([TINY], newer)[0].version == "2.0"
    assert make_prefix([TINY], older)[0].version == "1.5"


def test_no_wheel_is_a_sentence_with_what_there_is_instead(wheelhouse: Path) -> None:
    with pytest.raises(
        DeviceError, match=r"no wheel of tiny-runtime==9\.9 .*versions that it could be: tiny-runtime 1\.0"
    ):
        make_prefix([TINY], PI, version="9.9")
    absent = msgspec.structs.replace(TINY, distribution="absent-runtime")
    with pytest.raises(DeviceError, match=r"musl 1\.2.*or use a system with glibc"):
        make_prefix([absent], platform_of(facts(libc="musl 1.2")))
    narrow = platform_of(facts(interpreter=Interpreter(tag="cp311", abi="cp311", bits=32)))
    with pytest.raises(DeviceError, match=r"armv7l.*64-bit system"):
        make_prefix([absent], narrow)


def test_the_second_choice_is_taken_where_the_first_has_no_wheel_and_it_is_said(wheelhouse: Path) -> None:
    prefix, _ = make_prefix([msgspec.structs.replace(TINY, distribution="absent-runtime"), TINY], PI)
    assert prefix.distribution == "tiny-runtime"
    assert "no wheel of absent-runtime for Python 3.11 on aarch64" in prefix.note


def test_a_damaged_tar_in_the_cache_is_packed_anew(wheelhouse: Path) -> None:
    prefix, tar = make_prefix([TINY], PI)
    tar.write_bytes(tar.read_bytes()[:-512])
    assert make_prefix([TINY], PI) == (prefix, tar)
    assert sha256_file(tar) == prefix.tar_sha256


def test_a_wheelhouse_that_is_no_folder_is_said(wheelhouse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEDEPLOY_WHEELHOUSE", str(wheelhouse / "nowhere"))
    with pytest.raises(ToolchainError, match="nowhere, which is no folder"):
        make_prefix([TINY], PI)
