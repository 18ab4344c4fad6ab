"""What the runner keeps on a device: objects by digest, uploads in parts, runtimes from hostile archives, dates of use."""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedeploy.lab.bundle import RUNNER
from edgedeploy.ondevice import runner

DAY_S = 86400.0


def silent():
    """Beat nothing: nobody waits."""


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> runner.Store:
    runner.prepare_root(str(tmp_path))
    return runner.Store(str(tmp_path))


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The files that the runner reads through to verify them."""
    found, original = [], runner.digest_of

    def watched(path, beat):
        found.append(Path(path).name)
        return original(path, beat)

    monkeypatch.setattr(runner, "digest_of", watched)
    return found


def upload(store: runner.Store, content: bytes) -> str:
    digest = digest_of(content)
    Path(store.part_path(digest)).write_bytes(content)
    store.commit(digest, silent)
    store.write_index()
    return digest


# ------------------------------------------------------------------------------------------------ the index


def test_what_was_verified_is_not_read_again_by_this_runner_or_the_next(store, read):
    digest = upload(store, b"weights")
    assert read == [f"{digest}.part"]
    assert store.has(digest, silent)
    assert runner.Store(store.root).has(digest, silent)
    assert read == [f"{digest}.part"]


def test_file_that_was_changed_is_read_even_if_its_size_and_date_are_the_same(store, read):
    digest = upload(store, b"weights")
    path = Path(store.root, "objects", digest)
    before = path.stat()
    path.write_bytes(b"WEIGHTS")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not store.has(digest, silent)
    assert read[1:] == [digest]
    assert not path.exists()


def test_file_that_was_replaced_by_a_right_one_is_read_once(store, read):
    digest = upload(store, b"weights")
    path = Path(store.root, "objects", digest)
    path.unlink()
    path.write_bytes(b"weights")
    assert store.has(digest, silent)
    assert store.has(digest, silent)
    assert read[1:] == [digest]


@pytest.mark.parametrize(
    "index", ["", "{", "[]", '{"objects/x": 3}', '{"objects/x": {"is": null}}', "\x00" * 100, "[" * 100_000]
)
def test_torn_index_costs_time_and_nothing_else(store, read, index):
    digest = upload(store, b"weights")
    Path(store.index_path).write_text(index)
    again = runner.Store(store.root)
    assert again.has(digest, silent)
    again.write_index()
    assert runner.Store(store.root).has(digest, silent)
    assert read[1:] == [digest]


def test_upload_of_something_else_is_refused_and_deleted(store):
    digest = digest_of(b"weights")
    Path(store.part_path(digest)).write_bytes(b"weigh")
    with pytest.raises(runner.Refusal, match=r"arrived as something else \(5 bytes"):
        store.commit(digest, silent)
    assert list(Path(store.root, "objects").iterdir()) == []


@pytest.mark.parametrize("digest", ["", "a" * 63, "A" * 64, "../" + "a" * 61, "a" * 64 + "\n", None, 3])
def test_what_is_no_digest_names_no_file(store, digest):
    with pytest.raises(runner.Refusal, match="is not a SHA-256 digest"):
        store.part_path(digest)


# ------------------------------------------------------------------------------------------------ dates


def used(store: runner.Store, content: bytes, now_s: float | None) -> str:
    store.now_s = now_s
    digest = upload(store, content)
    assert store.has(digest, silent)
    store.write_index()
    return f"objects/{digest}"


def test_only_what_was_not_used_for_a_while_is_deleted(store):
    old, new = used(store, b"old", 100 * DAY_S), used(store, b"new", 109 * DAY_S)
    store.now_s = 110 * DAY_S
    assert store.unused(5 * DAY_S, set()) == [old]
    assert store.unused(5 * DAY_S, {old}) == []
    assert store.remove(old) == 3
    assert [path.name for path in Path(store.root, "objects").iterdir()] == [new.removeprefix("objects/")]


def test_what_was_never_dated_counts_from_when_it_is_first_seen(store):
    name = used(store, b"old", None)
    store.now_s = 100 * DAY_S
    assert store.unused(5 * DAY_S, set()) == []
    store.now_s = 106 * DAY_S
    assert store.unused(5 * DAY_S, set()) == [name]


def test_date_of_a_host_whose_clock_was_ahead_is_set_right(store):
    name = used(store, b"old", 9999 * DAY_S)
    store.now_s = 100 * DAY_S
    assert store.unused(5 * DAY_S, set()) == []
    store.now_s = 106 * DAY_S
    assert store.unused(5 * DAY_S, set()) == [name]


def test_runtime_that_is_removed_goes_whole(store):
    folder = Path(store.root, "runtimes", "toy-1-0a1b2c3d")
    (folder / "toy").mkdir(parents=True)
    (folder / "toy" / "__init__.py").write_text("x = 1\n")
    assert store.remove("runtimes/toy-1-0a1b2c3d") == 6
    assert list(Path(store.root, "runtimes").iterdir()) == []


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../objects", "a/b", "/etc", "-rf", "x.part", "a\n", "a" * 200, ".hidden", "ü", None, 7]
)
def test_what_is_no_name_of_a_runtime_names_no_folder(tmp_path, name):
    with pytest.raises(runner.Refusal, match="not a name that a runtime may have"):
        runner.runtime_path(str(tmp_path), name)


# ------------------------------------------------------------------------------------------------ archives


def member(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", link: str = "", mode: int = 0o644):
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname, info.mode = kind, len(content), link, mode
    return info, content


def archive(*members, form: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as writer:
        for info, content in members:
            writer.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def unpacked(folder: Path, content: bytes) -> Path:
    """Unpack into folder/jail/in, beside which a file lies that must not be touched."""
    inside = folder / "jail" / "in"
    inside.mkdir(parents=True)
    (folder / "jail" / "victim").write_text("unharmed")
    (folder / "x.tar").write_bytes(content)
    runner.unpack(str(folder / "x.tar"), str(inside), silent)
    return inside


def test_tree_comes_out_as_it_went_in(tmp_path):
    inside = unpacked(
        tmp_path,
        archive(
            member("./", tarfile.DIRTYPE),
            member("./pkg", tarfile.DIRTYPE),
            member("pkg/__init__.py", content=b"x = 1\n"),
            member("pkg/deep/er/lib.so.1", content=b"\x7fELF" * 1000, mode=0o4777),
            member("pkg/deep/er/lib.so", tarfile.SYMTYPE, link="lib.so.1"),
            member("pkg/" + "long" * 40 + ".py", content=b"y"),
        ),
    )
    assert (inside / "pkg" / "__init__.py").read_bytes() == b"x = 1\n"
    library = inside / "pkg" / "deep" / "er" / "lib.so"
    assert library.resolve().read_bytes() == b"\x7fELF" * 1000
    assert library.resolve().stat().st_mode & 0o7777 == 0o755 & ~umask()
    assert (inside / "pkg" / ("long" * 40 + ".py")).read_bytes() == b"y"


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


HOSTILE = {
    "absolute": ([member("/etc/passwd", content=b"x")], "leads out"),
    "upwards": ([member("../victim", content=b"x")], "leads out"),
    "upwards in the middle": ([member("a/../../victim", content=b"x")], "leads out"),
    "link out": ([member("a", tarfile.SYMTYPE, link="../victim")], "leads out"),
    "absolute link": ([member("a", tarfile.SYMTYPE, link="/etc/passwd")], "leads out"),
    "chain of links": (
        [member("a", tarfile.SYMTYPE, link="."), member("b", tarfile.SYMTYPE, link="a/..")],
        "leads out",
    ),
    "through a link": ([member("a", tarfile.SYMTYPE, link="b"), member("a/x", content=b"x")], "a file and a folder"),
    "folder over a link": (
        [member("b", tarfile.DIRTYPE), member("a", tarfile.SYMTYPE, link="b"), member("a", tarfile.DIRTYPE)],
        "a file and a folder",
    ),
    "below a file": ([member("a", content=b"x"), member("a/b", content=b"x")], "a file and a folder"),
    "twice": ([member("a", content=b"x"), member("./a", content=b"y")], "twice"),
    "file over a folder": ([member("a", tarfile.DIRTYPE), member("a", content=b"y")], "twice"),
    "link over a file": ([member("a", content=b"y"), member("a", tarfile.SYMTYPE, link="b")], "twice"),
    "hard link": ([member("a", content=b"x"), member("b", tarfile.LNKTYPE, link="a")], "not a file"),
    "hard link out": ([member("b", tarfile.LNKTYPE, link="../victim")], "not a file"),
    "device": ([member("a", tarfile.CHRTYPE)], "not a file"),
    "disk": ([member("a", tarfile.BLKTYPE)], "not a file"),
    "pipe": ([member("a", tarfile.FIFOTYPE)], "not a file"),
    "odd type": ([member("a", b"Z", b"x")], "not a file"),
    "contiguous": ([member("a", tarfile.CONTTYPE, b"x")], "not a file"),
    "deep": ([member("/".join("a" * 40), content=b"x")], "too long"),
    "long name": ([member("a" * 256, content=b"x")], "too long"),
    "long path": ([member("/".join(["a" * 200] * 6), content=b"x")], "too long"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archive_is_refused_and_writes_nothing_outside(tmp_path, case):
    members, reason = HOSTILE[case]
    with pytest.raises(runner.Refusal, match=reason) as caught:
        unpacked(tmp_path, archive(*members))
    assert caught.value.kind == "bad-archive"
    assert sorted(path.name for path in (tmp_path / "jail").iterdir()) == ["in", "victim"]
    assert (tmp_path / "jail" / "victim").read_text() == "unharmed"


def test_sparse_member_is_refused(tmp_path):
    """It says 1 TiB in a kibibyte."""
    info = tarfile.TarInfo("huge")
    info.pax_headers = {
        "GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": "huge", "GNU.sparse.size": str(1 << 40),
        "GNU.sparse.map": "0,1",
    }  # fmt: skip
    info.size = 1
    with pytest.raises(runner.Refusal, match="not a file"):
        unpacked(tmp_path, archive((info, b"x")))
    assert list((tmp_path / "jail" / "in").iterdir()) == []


@pytest.mark.parametrize("how", ["gz", "bz2", "xz"])
def test_compressed_archive_is_refused(tmp_path, how):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=f"w:{how}") as writer:
        info, content = member("a", content=b"x")
        writer.addfile(info, io.BytesIO(content))
    with pytest.raises(runner.Refusal, match="not a whole tar"):
        unpacked(tmp_path, stream.getvalue())


def test_too_many_members_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "MOST_FILES", 20)
    with pytest.raises(runner.Refusal, match="more than 20"):
        unpacked(tmp_path, archive(*(member(f"{number}") for number in range(30))))


def test_too_many_folders_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "MOST_FILES", 20)
    with pytest.raises(runner.Refusal, match="more than 20"):
        unpacked(tmp_path, archive(*(member(f"{number}/a/b/c/d/e") for number in range(10))))


WORDS = st.sampled_from(["a", "b", "c", "..", ".", "", "victim", "in"])
NAMES = st.lists(WORDS, min_size=1, max_size=4).map("/".join)
MEMBERS = st.builds(
    member,
    NAMES,
    st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]),
    st.just(b""),
    NAMES,
)


@settings(max_examples=60, deadline=None)
@given(members=st.lists(MEMBERS, max_size=6), form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
def test_no_archive_writes_or_points_outside(tmp_path_factory, members, form):
    folder = tmp_path_factory.mktemp("any")
    try:
        inside = unpacked(folder, archive(*members, form=form))
    except runner.Refusal:
        inside = folder / "jail" / "in"
    assert sorted(path.name for path in (folder / "jail").iterdir()) == ["in", "victim"]
    assert (folder / "jail" / "victim").read_text() == "unharmed"
    for path in inside.rglob("*"):
        assert path.is_symlink() or path.is_dir() or path.is_file()
        assert os.path.realpath(path).startswith(os.path.realpath(inside))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_archive_is_refused_or_unpacked_and_nothing_else(tmp_path_factory, data):
    content = bytearray(archive(member("a/b", content=b"x" * 700), member("c", tarfile.SYMTYPE, link="a/b")))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=8)):
        content[place] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    folder = tmp_path_factory.mktemp("damaged")
    try:
        unpacked(folder, bytes(content))
    except runner.Refusal as refusal:
        assert refusal.kind == "bad-archive"
    assert (folder / "jail" / "victim").read_text() == "unharmed"


def test_runner_is_never_deleted_by_itself(tmp_path):
    """Its own file lies among the objects and nobody asks whether it is there."""
    root = tmp_path / "root"
    runner.prepare_root(str(root))
    name = digest_of(RUNNER.read_bytes())
    (root / "objects" / name).write_bytes(RUNNER.read_bytes())
    index = {f"objects/{name}": {"is": None, "used_s": 1.0}}
    (root / "index.json").write_text(json.dumps(index))
    store = runner.Store(str(root))
    store.now_s = 1000 * DAY_S
    assert store.unused(DAY_S, {f"objects/{name}"}) == []
    assert store.unused(DAY_S, set()) == [f"objects/{name}"]
