"""Runtimes that are installed on a device, what it may execute, and uploads that go on: through a real runner."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from edgedeploy.errors import DeviceError, TransferError, VisitFailed
from edgedeploy.lab import bundle
from edgedeploy.lab.conversation import Agent
from edgedeploy.lab.transport import RESUME_BYTES, LocalTransport
from edgedeploy.records.device import Device
from edgedeploy.storage import sha256_bytes

# Says which runtime it got by its name, and takes any artifact.
SESSION = b"""
import struct
import toyruntime


class Session:
    runtime = "toy " + toyruntime.__version__

    def __init__(self, artifact, options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def boundary(self):
        return {"includes_input_copy": False, "includes_output_copy": False, "threads": 1}

    def bind(self, batch):
        pass

    def infer(self):
        pass

    def outputs(self):
        return {"y": (struct.pack("<f", 1.0), "float32", [1, 1])}
"""
WARM_UP = {"window": 2, "tolerance": 1e9, "cap_s": 1.0}


class Counting(LocalTransport):
    """Notes from where uploads went on."""

    def __init__(self) -> None:
        super().__init__("bench")
        self.offsets: list[int] = []

    def put(self, local: Path, remote: str, *, offset: int = 0) -> None:
        self.offsets.append(offset)
        super().put(local, remote, offset=offset)


@dataclass
class Bench:
    folder: Path
    agent: Agent
    transport: Counting
    job: dict[str, object] = field(default_factory=dict)

    def ship(self, content: bytes, name: str = "file") -> str:
        digest = sha256_bytes(content)
        path = self.folder / name
        path.write_bytes(content)
        bundle.ship(self.agent, self.transport, {digest: path})
        return digest

    def path(self, *names: str) -> Path:
        return Path(self.agent.root, *names)

    def install(self, name: str, **files: str) -> dict[str, object]:
        return self.agent.ask("install", tar=self.ship(tar_of(files), "x.tar"), name=name)

    def outputs(self, **changes: object) -> dict[str, object]:
        return self.agent.ask("outputs", visit="try", job={**self.job, **changes}, timeout_s=60.0)


def tar_of(files: dict[str, str]) -> bytes:
    """Return an archive of {"package__module": text of package/module.py}."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as writer:
        for name, text in files.items():
            info = tarfile.TarInfo(name.replace("__", "/", 1) + ".py")
            info.size = len(text.encode())
            writer.addfile(info, io.BytesIO(text.encode()))
    return stream.getvalue()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder, transport = tmp_path_factory.mktemp("bench"), Counting()
    device = Device(transport="local", root=str(folder / "root"), lease_dir=str(folder / "lease"), timeout_s=60.0)
    with bundle.connect(transport, device, device_name="bench") as agent:
        bench = Bench(folder, agent, transport)
        bench.job = {
            "session": bench.ship(SESSION, "session.py"),
            "artifact": bench.ship(b"artifact"),
            "inputs": bench.ship(save({"x": np.zeros((1, 4), np.float32)}), "inputs"),
            "options": {}, "batch": 1, "warm_up": WARM_UP,
        }  # fmt: skip
        yield bench


# ------------------------------------------------------------------------------------------------ runtimes


def test_versions_of_a_runtime_live_side_by_side_and_a_job_names_its_own(bench: Bench) -> None:
    for version in ("1.0", "2.0"):
        bench.install(f"toy-{version}-0a1b2c3d", toyruntime____init__=f"__version__ = {version!r}\n")
    for version in ("2.0", "1.0"):
        assert bench.outputs(runtime=f"toy-{version}-0a1b2c3d")["runtime"] == f"toy {version}"
        tried = bench.agent.ask("try_runtime", name=f"toy-{version}-0a1b2c3d", module="toyruntime")
        assert tried == {"version": version}
    names = [one["name"] for one in bench.agent.ask("runtimes")["runtimes"]]
    assert {"toy-1.0-0a1b2c3d", "toy-2.0-0a1b2c3d"} <= set(names)
    with pytest.raises(VisitFailed, match="has no module 'toyruntime'") as caught:
        bench.outputs()
    assert caught.value.kind == "missing-runtime"


def test_trying_a_runtime_keeps_what_was_compiled(bench: Bench) -> None:
    bench.install("compiled-1-00000000", toyruntime____init__="__version__ = '1'\n")
    bench.agent.ask("try_runtime", name="compiled-1-00000000", module="toyruntime")
    assert list(bench.path("runtimes", "compiled-1-00000000", "toyruntime", "__pycache__").glob("*.pyc"))


def test_installing_twice_changes_nothing_and_removing_twice_neither(bench: Bench) -> None:
    first = bench.install("twice-1-00000000", a="x = 1\n")
    assert first == {"size_bytes": 6}
    assert bench.install("twice-1-00000000", a="x = 1\n", b="y = 2\n") == first
    assert bench.agent.ask("remove_runtime", name="twice-1-00000000") == {"freed_bytes": 6}
    assert bench.agent.ask("remove_runtime", name="twice-1-00000000") == {"freed_bytes": 0}
    assert not bench.path("runtimes", "twice-1-00000000").exists()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "an instruction that this processor does not have"),
        ("raise ImportError('libgomp.so.1: cannot open shared object file')", "libgomp.so.1: cannot open"),
        ("import nothing_like_this", "No module named 'nothing_like_this'"),
    ],
)
def test_runtime_that_does_not_import_says_why(bench: Bench, body: str, said: str) -> None:
    name = f"broken-1-{sha256_bytes(body.encode())[:8]}"
    bench.install(name, toyruntime____init__=body)
    with pytest.raises(DeviceError, match=said):
        bench.agent.ask("try_runtime", name=name, module="toyruntime")
    assert bench.agent.ask("space")["free_bytes"] > 0  # the runner is well


def test_module_of_another_place_is_not_the_runtimes(bench: Bench) -> None:
    bench.install("empty-1-00000000", a="x = 1\n")
    with pytest.raises(DeviceError, match=r"empty-1-00000000 has no module json"):
        bench.agent.ask("try_runtime", name="empty-1-00000000", module="json")


@pytest.mark.parametrize("module", ["os; import x", "", "a..b", "../x", 3])
def test_what_is_no_module_is_not_imported(bench: Bench, module: object) -> None:
    with pytest.raises(DeviceError, match="not the name of a module"):
        bench.agent.ask("try_runtime", name="toy-1.0-0a1b2c3d", module=module)


def test_runtime_that_was_removed_is_named(bench: Bench) -> None:
    with pytest.raises(VisitFailed, match="runtime gone-1-00000000 is not installed on the device; provision it again"):
        bench.outputs(runtime="gone-1-00000000")


def test_archive_that_is_none_leaves_no_runtime(bench: Bench) -> None:
    digest = bench.ship(b"not a tar at all" * 100)
    with pytest.raises(DeviceError, match="not a whole tar file"):
        bench.agent.ask("install", tar=digest, name="none-1-00000000")
    with pytest.raises(DeviceError, match="is not on the device; ship it first"):
        bench.agent.ask("install", tar="0" * 64, name="none-1-00000000")
    assert [path.name for path in bench.path("runtimes").iterdir() if path.name.startswith("none")] == []


def test_installing_goes_on_over_what_a_power_cut_left(bench: Bench) -> None:
    left = bench.path("runtimes", "cut-1-00000000.part")
    left.mkdir()
    (left / "half.py").write_text("x")
    assert "cut-1-00000000.part" not in json.dumps(bench.agent.ask("runtimes"))
    bench.install("cut-1-00000000", a="x = 1\n")
    assert not left.exists()
    assert [path.name for path in bench.path("runtimes", "cut-1-00000000").iterdir()] == ["a.py"]


# ------------------------------------------------------------------------------------------------ what may be executed


def test_only_device_halves_that_were_shipped_are_executed(bench: Bench) -> None:
    """A file that lies there, from another host or another day, is data until this host names it."""
    stranger = SESSION + b"# another\n"
    digest = bench.ship(stranger, "session.bin")
    with pytest.raises(VisitFailed, match=f"{digest} is not on the list of files") as caught:
        bench.outputs(session=digest)
    assert caught.value.kind == "not-allowed"
    bench.agent.ask("allow", digests=[digest])
    assert bench.outputs(session=digest, runtime="toy-1.0-0a1b2c3d")["runtime"] == "toy 1.0"


@pytest.mark.parametrize("do", ["open", "memory", "profile", "outputs"])
def test_no_way_to_a_session_leads_around_the_list(bench: Bench, do: str) -> None:
    fields = {"count": 1} if do in ("memory", "profile") else {}
    with pytest.raises(VisitFailed, match="not on the list"):
        bench.agent.ask(do, visit="x", job={**bench.job, "session": "0" * 64}, timeout_s=20.0, **fields)


def test_no_way_to_a_builder_leads_around_the_list(bench: Bench) -> None:
    with pytest.raises(VisitFailed, match="not on the list"):
        bench.agent.ask("probe", visit="x", builder="0" * 64, timeout_s=20.0)
    with pytest.raises(VisitFailed, match="not on the list"):
        bench.agent.ask("build", visit="x", job={"builder": "0" * 64, "files": {}, "options": {}}, timeout_s=20.0)


def test_what_was_changed_after_it_was_verified_is_not_executed(bench: Bench) -> None:
    digest = bench.ship(SESSION + b"# to be changed\n", "session.py")
    bench.path("objects", digest).write_bytes(SESSION + b"# to be CHANGED\n")
    with pytest.raises(VisitFailed, match="is not what its name says") as caught:
        bench.outputs(session=digest, runtime="toy-1.0-0a1b2c3d")
    assert caught.value.kind == "corrupt-object"


@pytest.mark.parametrize("digests", [["../x"], [3], ["0" * 63], [None]])
def test_list_of_what_may_be_executed_takes_digests_alone(bench: Bench, digests: list[object]) -> None:
    with pytest.raises(DeviceError, match="is not a SHA-256 digest"):
        bench.agent.ask("allow", digests=digests)


# ------------------------------------------------------------------------------------------------ uploads


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(1, 4 * RESUME_BYTES),
    cut=st.floats(0, 1.2),
    damage=st.sampled_from(["", "middle", "end"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_upload_goes_on_from_any_cut_and_never_trusts_a_damaged_start(
    bench: Bench, size: int, cut: float, damage: str, seed: int
) -> None:
    content = np.random.default_rng(seed).bytes(size)
    start = bytearray((content + b"more than there was to send")[: int(size * cut)])
    if damage and start:
        start[len(start) // 2 if damage == "middle" else -1] ^= 1
    digest = sha256_bytes(content)
    (bench.path("objects") / f"{digest}.part").write_bytes(bytes(start))
    bench.transport.offsets.clear()
    assert bench.ship(content) == digest
    assert bench.path("objects", digest).read_bytes() == content
    assert not (bench.path("objects") / f"{digest}.part").exists()
    is_prefix = content.startswith(bytes(start)) and len(start) <= size
    assert bench.transport.offsets == [len(start) // RESUME_BYTES * RESUME_BYTES if is_prefix else 0]
    bench.path("objects", digest).unlink()


def test_start_that_is_changed_after_it_was_looked_at_is_sent_again(bench: Bench, monkeypatch) -> None:
    content = os.urandom(3 * RESUME_BYTES)
    part = bench.path("objects") / f"{sha256_bytes(content)}.part"
    part.write_bytes(content[: 2 * RESUME_BYTES])
    original = LocalTransport.put

    def spoilt(self: LocalTransport, local: Path, remote: str, *, offset: int = 0) -> None:
        original(self, local, remote, offset=offset)
        if offset:
            with part.open("r+b") as stream:
                stream.write(b"what a lost connection still wrote")

    monkeypatch.setattr(LocalTransport, "put", spoilt)
    bench.transport.offsets.clear()
    digest = bench.ship(content)
    assert bench.transport.offsets == [2 * RESUME_BYTES, 0]
    assert bench.path("objects", digest).read_bytes() == content


def test_full_disk_is_told_before_anything_is_sent(bench: Bench, monkeypatch) -> None:
    original = bench.agent.ask

    def ask(do: str, **fields: object) -> dict[str, object]:
        said = original(do, **fields)
        return {**said, "free_bytes": 5 << 20} if do in ("have", "space") else said

    monkeypatch.setattr(bench.agent, "ask", ask)
    bench.transport.offsets.clear()
    with pytest.raises(TransferError, match=r"2 MiB are to be sent to .*, and only 5 MiB are free there; make room"):
        bench.ship(os.urandom(2 << 20))
    assert bench.transport.offsets == []


# ------------------------------------------------------------------------------------------------ cleaning up


def test_what_nobody_uses_goes_and_what_this_session_uses_stays(bench: Bench) -> None:
    old, new = bench.ship(b"old"), bench.ship(b"new")
    bench.install("unused-1-00000000", a="x = 1\n")
    now_s = time.time() + 2 * 86400
    bench.agent.ask("have", digests=[new, bench.job["session"]], now_s=now_s)
    said = bench.agent.ask("clean", unused_s=86400.0, now_s=now_s)
    assert said["removed"] >= 2
    assert not bench.path("objects", old).exists()
    assert not bench.path("runtimes", "unused-1-00000000").exists()
    assert bench.path("objects", new).exists()
    assert bench.path("objects", bench.agent.runner_sha256).exists()
    assert bench.agent.missing([bench.job["session"], new, old]) == (old,)


def test_nothing_of_the_last_hour_is_deleted(bench: Bench) -> None:
    with pytest.raises(DeviceError, match="within the last hour"):
        bench.agent.ask("clean", unused_s=0, now_s=time.time())


def test_outputs_are_fetched_by_digest_and_size(bench: Bench, tmp_path: Path) -> None:
    bench.install("again-1-00000000", toyruntime____init__="__version__ = '1'\n")
    for digest, path in ((bench.job["artifact"], b"artifact"),):
        if bench.agent.missing([digest]):
            bench.ship(path)
    bench.ship(save({"x": np.zeros((1, 4), np.float32)}), "inputs")
    said = bench.outputs(runtime="again-1-00000000")
    assert "path" not in said
    with pytest.raises(TransferError, match="no more than 3 B were expected"):
        bundle.fetch(bench.agent, bench.transport, "outputs", said["sha256"], 3, tmp_path / "out")
    bundle.fetch(bench.agent, bench.transport, "outputs", said["sha256"], said["size_bytes"], tmp_path / "out")
    assert sha256_bytes((tmp_path / "out").read_bytes()) == said["sha256"]
