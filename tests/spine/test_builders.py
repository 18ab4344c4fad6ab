"""Builders on a device: what they find, how they tell, what they make, and every way in which one can end."""

import hashlib
import textwrap
import threading
from pathlib import Path

import pytest

from edgedeploy.errors import DeviceError, TransferError, VisitFailed
from edgedeploy.lab import builders, bundle
from edgedeploy.lab.builders import Made
from edgedeploy.lab.transport import LocalTransport
from edgedeploy.records.device import Device
from edgedeploy.storage import sha256_file

BUILDER = """
import os, signal, sys, time


class Refused(Exception):
    kind = "parse"


def probe():
    return {"answer": 42}


def build(files, options, folder, tell):
    print("noise from a compiler", flush=True)
    print("layer conv_7 is being timed", file=sys.stderr, flush=True)
    tell("parsing")
    how = options.get("how", "")
    if how == "refuse":
        raise Refused("node 'conv_7' (Conv) has no kernel; use another one")
    if how == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "hang":
        time.sleep(60)
    for step in range(3):
        tell("building", step + 1, 3)
    with open(files["kit"], "rb") as kit, open(os.path.join(folder, "thing.bin"), "wb") as made:
        made.write(kit.read()[::-1])
    return {"seconds": 1.5}, {"engine": "thing.bin"}
"""


@pytest.fixture
def site(tmp_path):
    """An agent on this machine, with a builder and a kit shipped to it."""
    builder, kit = tmp_path / "builder.py", tmp_path / "kit"
    builder.write_text(textwrap.dedent(BUILDER))
    kit.write_bytes(b"abc")
    root = tmp_path / "device"
    with (
        LocalTransport("bench-1") as transport,
        bundle.connect(transport, Device(transport="local", root=str(root)), device_name="bench-1") as agent,
    ):
        digests = {sha256_file(path): path for path in (builder, kit)}
        bundle.ship(agent, transport, digests)
        yield Site(agent, transport, sha256_file(builder), {"kit": sha256_file(kit)}, root)


class Site:
    def __init__(self, agent, transport, builder, files, root):
        self.agent, self.transport, self.builder, self.files, self.root = agent, transport, builder, files, root
        self.heard = []

    def build(self, timeout_s=20.0, **options):
        return builders.build(
            self.agent, self.builder, self.files, options, timeout_s=timeout_s, hear=self.heard.append
        )


def test_probe_returns_what_the_builder_finds(site):
    assert builders.probe(site.agent, site.builder) == {"answer": 42}


def test_what_a_builder_makes_comes_back_verified_and_its_progress_is_heard(site, tmp_path):
    report, made = site.build()
    assert report == {"seconds": 1.5}
    assert [(one.text, one.done, one.total) for one in site.heard] == [
        ("parsing", None, None), ("building", 1, 3), ("building", 2, 3), ("building", 3, 3),
    ]  # fmt: skip
    assert made["engine"] == Made(sha256=hashlib.sha256(b"cba").hexdigest(), size_bytes=3)
    builders.fetch(site.agent, site.transport, made["engine"], tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == b"cba"


def test_a_refusal_is_the_builders_own_sentence(site):
    with pytest.raises(VisitFailed, match=r"node 'conv_7' \(Conv\) has no kernel; use another one") as failure:
        site.build(how="refuse")
    assert failure.value.kind == "parse"


def test_a_crash_is_told_with_the_last_lines_and_the_device_lives_on(site):
    with pytest.raises(VisitFailed, match=r"(?s)killed by SIGSEGV.*layer conv_7 is being timed") as failure:
        site.build(how="segv")
    assert failure.value.kind == "died"
    assert site.build()[0] == {"seconds": 1.5}


def test_a_build_that_does_not_end_is_ended(site):
    with pytest.raises(VisitFailed, match=r"(?s)no answer within 1 s.*layer conv_7") as failure:
        site.build(timeout_s=1.0, how="hang")
    assert failure.value.kind == "timeout"


@pytest.mark.parametrize("how", ["refuse", "segv", ""])
def test_a_build_leaves_no_folder_behind_for_the_next_lease(site, how):
    try:
        site.build(how=how)
    except VisitFailed:
        assert how
    site.agent.close()
    assert not (site.root / "building").exists()


def test_a_host_that_leaves_in_the_middle_of_a_build_leaves_nothing_behind(site):
    is_building, failures = threading.Event(), []

    def build():
        try:
            builders.build(
                site.agent, site.builder, site.files, {"how": "hang"}, timeout_s=60.0, hear=lambda _: is_building.set()
            )
        except DeviceError as error:
            failures.append(error)

    host = threading.Thread(target=build)
    host.start()
    assert is_building.wait(20.0)
    assert [path.name for path in (site.root / "building").iterdir()]
    site.agent.close()
    host.join(20.0)
    assert len(failures) == 1
    with bundle.connect(site.transport, Device(transport="local", root=str(site.root)), device_name="bench-1"):
        assert not (site.root / "building").exists()


def test_what_arrives_as_something_else_is_refused(site, tmp_path):
    _, made = site.build()
    (Path(site.root) / "objects" / made["engine"].sha256).write_bytes(b"x" * made["engine"].size_bytes)
    with pytest.raises(TransferError, match="arrived with the digest"):
        builders.fetch(site.agent, site.transport, made["engine"], tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


class Odd:
    """An agent whose device answers as it likes."""

    label = "device 'odd'"

    def __init__(self, **answer):
        self.answer = answer

    def ask(self, do, **fields):
        return self.answer


@pytest.mark.parametrize(
    "answer",
    [
        {"made": {"engine": 3}, "report": {}},
        {"made": {}},
        {"made": {}, "report": "fine"},
        {"made": {"engine": {"sha256": "../../etc/passwd", "size_bytes": 1}}, "report": {}},
        {"made": {"engine": {"sha256": "0" * 64, "size_bytes": -1}}, "report": {}},
        {"made": {"engine": {"sha256": "0" * 64, "size_bytes": 1 << 60}}, "report": {}},
    ],
)
def test_an_answer_that_is_none_is_refused(answer):
    with pytest.raises(DeviceError, match="the builder's answer is not one"):
        builders.build(Odd(**answer), "0" * 64, {}, {}, timeout_s=1.0, hear=print)


def test_a_probe_that_finds_no_table_is_refused():
    with pytest.raises(DeviceError, match="which is no table"):
        builders.probe(Odd(found=[]), "0" * 64)
