"""Bundles on a device: checked, put in place in one step, rolled back, refused; and what dying at any moment leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest

from edgedeploy import cli, installing, pipeline
from edgedeploy.errors import BundleRefused, DeviceError, ToolchainError, UsageError
from edgedeploy.evidence import check
from edgedeploy.evidence.seal import new_key
from edgedeploy.installing import InstallRequest
from edgedeploy.ondevice import runner
from edgedeploy.records.bundle import Bundle, BundledCell, DeviceDemand, RuntimeDemand
from edgedeploy.records.device import Device, DeviceFacts, Gpu
from edgedeploy.storage import sha256_file
from tests.bundles import believe, bundle_of, forged, with_cells

from .conftest import TARGET

pytest.importorskip("onnx", reason="the host half needs onnx: pip install 'edgedeploy[onnxruntime]'")
pytest.importorskip("cryptography", reason="signing needs it: pip install 'edgedeploy[evidence]'")


def quiet(text: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Site:
    """A folder with compiled artifacts, the keys of a signer, and bundles of three releases."""

    folder: Path
    key: Path
    public: Path
    artifacts: dict[str, Path]
    bundles: dict[int, Path]

    def bundle(self, name: str, *cells: str, **changes: object) -> Path:
        chosen = {cell: self.artifacts[cell] for cell in cells or ("one",)}
        return bundle_of(chosen, self.key, self.folder / f"{name}.edb.tar", **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Desk:
    """A device on this machine and what is installed on it."""

    site: Site
    device: Device

    @property
    def root(self) -> Path:
        return Path(self.device.root)

    def request(self, bundle: Path | int, **changes: object) -> InstallRequest:
        file = self.site.bundles[bundle] if isinstance(bundle, int) else bundle
        asked = InstallRequest(bundle=file, key=self.site.public, device_name="desk", device=self.device)
        return replace(asked, **changes)  # type: ignore[arg-type]

    def install(self, bundle: Path | int, **changes: object) -> installing.Installation:
        return installing.install(self.request(bundle, **changes), quiet)

    def rollback(self, slot: str = "default") -> installing.RolledBack:
        return installing.rollback("desk", self.device, quiet, slot=slot)


def in_use(root: Path, slot: str = "default") -> str:
    """Return the version that an application of the device finds, as one reads it; "" where nothing is installed.

    Every file of what it finds must be what its receipt says: an application never sees a part of a release.
    """
    folder = root / "installed" / slot
    if not (folder / "current").exists():
        return ""
    used = folder / (folder / "current").read_text().splitlines()[0]
    receipt = json.loads((used / "installed.json").read_text())
    assert (used / receipt["file"]).is_file()
    for name, (sha256, size) in receipt["files"].items():
        assert (sha256_file(used / name), (used / name).stat().st_size) == (sha256, size)
    return str(receipt["version"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    import onnx

    folder = tmp_path_factory.mktemp("site")
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("Relu", ["image"], ["scores"], name="relu")],
        "tiny",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["batch", 4])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "tiny.onnx")
    (folder / "targets").mkdir()
    (folder / "targets" / "fake-board.toml").write_text(TARGET)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("CACHE", "STATE"):
            patch.setenv(f"EDGEDEPLOY_{name}_DIR", str(folder / name.lower()))
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        patch.delenv("EDGEDEPLOY_LAB", raising=False)
        artifacts = {
            name: pipeline.compile(
                "tiny.onnx", target="fake-board", backend="fake", options={"duration_us": microseconds},
                output=Path("build") / name, name="tiny",
            ).folder.absolute()
            for name, microseconds in (("one", 50.0), ("two", 60.0))
        }  # fmt: skip
        key, public = new_key(folder / "signer.pem")
        made = Site(folder, key, public, artifacts, {})
        for number in (1, 2, 3):
            made.bundles[number] = made.bundle(f"release-{number}", version=f"1.{number}.0", sequence=number)
        yield made


@pytest.fixture
def desk(site: Site, tmp_path: Path) -> Desk:
    """Give a device on which nothing is installed."""
    return new_desk(site, tmp_path)


@pytest.fixture(scope="module")
def template(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """Give a device on which two releases were installed, to be copied."""
    made = new_desk(site, tmp_path_factory.mktemp("template"))
    first, second = made.install(1), made.install(2)
    assert (first.is_new, first.replaced, first.installed.version) == (True, "", "1.1.0")
    assert "computes nothing" in first.replay.note
    assert second.replaced == first.installed.release
    return made


@pytest.fixture
def used(template: Desk, tmp_path: Path) -> Desk:
    """Give a device that uses release 2, before which it used release 1."""
    shutil.copytree(template.root, tmp_path / "root")
    return new_desk(template.site, tmp_path)


def new_desk(site: Site, folder: Path) -> Desk:
    (folder / "lease").mkdir()
    return Desk(site, Device(transport="local", root=str(folder / "root"), lease_dir=str(folder / "lease")))


# ------------------------------------------------------------------------------------------------ in place, and back


def test_application_finds_what_was_installed_and_what_was_before_stays(used: Desk) -> None:
    assert in_use(used.root) == "1.2.0"
    third = used.install(3)
    assert third.is_new
    assert in_use(used.root) == third.installed.version == "1.3.0"
    releases = {path.name for path in (used.root / "installed/default/releases").iterdir()}
    assert releases == {third.replaced, third.installed.release}, "the oldest is deleted"
    assert third.replaced.startswith("2-")
    assert sorted(path.name for path in (used.root / "installed/default").iterdir()) == ["current", "releases"]
    assert not (used.root / "objects" / sha256_file(used.site.bundles[3])).exists(), "what it held lies unpacked"


def test_rollback_goes_back_once_and_says_when_there_is_nothing_further(used: Desk) -> None:
    done = used.rollback()
    assert (done.used.version, done.left.version) == ("1.1.0", "1.2.0")
    assert in_use(used.root) == "1.1.0"
    with pytest.raises(DeviceError, match="and nothing before it to go back to"):
        used.rollback()
    assert used.install(2).installed.version == in_use(used.root) == "1.2.0"
    with pytest.raises(DeviceError, match="slot other of the device has nothing installed"):
        used.rollback("other")


def test_installing_what_is_installed_changes_nothing(used: Desk) -> None:
    pointer = used.root / "installed/default/current"
    before = (pointer.read_text(), pointer.stat().st_ino)
    again = used.install(2)
    assert not again.is_new
    assert [f"releases/{name}" for name in (again.installed.release, again.replaced)] == before[0].splitlines()
    assert (pointer.read_text(), pointer.stat().st_ino) == before


def test_what_was_damaged_is_not_gone_back_to_and_is_put_right_by_installing_again(used: Desk) -> None:
    second, first = (used.root / "installed/default" / line for line in pointer_of(used).splitlines())
    for folder in (first, second):
        model = next(folder.glob("model*"))
        model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(DeviceError, match="is not what was installed; nothing was switched: install it again"):
        used.rollback()
    repaired = used.install(2)
    assert repaired.is_new
    assert repaired.installed.release == f"{second.name}.2"
    assert in_use(used.root) == "1.2.0"


def pointer_of(desk: Desk) -> str:
    return (desk.root / "installed/default/current").read_text()


def test_slots_are_independent_and_no_name_of_one_leads_anywhere(used: Desk) -> None:
    used.install(1, slot="detector")
    assert (in_use(used.root, "detector"), in_use(used.root)) == ("1.1.0", "1.2.0")
    with pytest.raises(DeviceError, match="is not the name of a slot"):
        used.install(1, slot="../x")
    slots = {one.slot: one for one in installing.installed("desk", used.device, quiet)}
    assert set(slots) == {"default", "detector"} == {path.name for path in (used.root / "installed").iterdir()}
    assert slots["detector"].path == str(used.root / "installed/detector")


@pytest.mark.parametrize("name", ["../x", "a/b", "", "A", ".", "x" * 65, "a\n", "current.part", 3, None])
def test_what_is_no_name_of_a_slot_is_refused(name: object) -> None:
    with pytest.raises(runner.Refusal, match="is not the name of a slot"):
        runner.Slot("/nowhere", name)


def test_pointer_that_says_nothing_is_told_and_not_guessed_at(used: Desk) -> None:
    pointer = used.root / "installed/default/current"
    pointer.write_text("releases/../../objects\n")
    (slot,) = installing.installed("desk", used.device, quiet)
    assert "does not say which release is used" in slot.problem
    with pytest.raises(DeviceError, match="delete it there, and install again"):
        used.install(3)
    pointer.unlink()
    assert used.install(3).installed.version == in_use(used.root) == "1.3.0"


# ------------------------------------------------------------------------------------------------ what is refused


def test_older_release_is_refused_here_and_by_the_device_itself(used: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"tiny 1\.1\.0 \(sequence 1\) is older than tiny 1\.2\.0 \(sequence 2\)"):
        used.install(1)
    with pytest.raises(BundleRefused, match="older than allowed"):
        used.install(3, min_sequence=4)
    monkeypatch.setattr(installing, "_demand_newer", lambda *arguments: None)
    with pytest.raises(BundleRefused, match=r"older than allowed.*nothing on the device was changed"):
        used.install(1)
    assert in_use(used.root) == "1.2.0"
    done = used.install(1, allow_downgrade=True)
    assert in_use(used.root) == done.installed.version == "1.1.0"


@pytest.mark.parametrize("at", [b'"model_sha256"', b"edgedeploy.fake/1", b"ustar"])
def test_forged_bundle_is_refused_here_and_by_the_device_itself(
    used: Desk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at: bytes
) -> None:
    genuine = used.site.bundles[3]
    path = forged(genuine, at, tmp_path / "forged.edb.tar")
    with pytest.raises(BundleRefused):
        used.install(path)
    believe(monkeypatch, genuine, path)
    with pytest.raises(BundleRefused, match="nothing on the device was changed"):
        used.install(path)
    assert in_use(used.root) == "1.2.0"
    assert sorted(entry.name for entry in (used.root / "installed/default").iterdir()) == ["current", "releases"]


def test_signature_of_somebody_else_is_refused(desk: Desk, tmp_path: Path) -> None:
    _, other = new_key(tmp_path / "other.pem")
    with pytest.raises(BundleRefused, match="signed with another key"):
        desk.install(1, key=other)
    assert not (desk.root / "installed").exists()


def test_bundle_for_another_machine_is_refused_here_and_by_the_device_itself(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = desk.site.bundle("sparc", machine="sparc64")
    with pytest.raises(UsageError, match=r"nothing in the bundle is for .*it is for sparc64"):
        desk.install(path)
    with pytest.raises(UsageError, match=r"cell 'one' is not for .*sparc64"):
        desk.install(path, cell="one")
    monkeypatch.setattr(installing, "why_unfit", lambda *arguments: "")
    with pytest.raises(BundleRefused, match="for sparc64, not for"):
        desk.install(path)
    assert in_use(desk.root) == ""


def test_of_several_that_fit_the_most_specific_is_taken_and_equals_are_asked_about(desk: Desk) -> None:
    both = desk.site.bundle("both", "one", "two")
    with pytest.raises(UsageError, match=r"2 cells of the bundle fit .*--cell: one, two"):
        desk.install(both)
    assert desk.install(both, cell="two").installed.cell == "two"
    with pytest.raises(UsageError, match="no cell 'twa'; did you mean \"two\""):
        desk.install(both, cell="twa")
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Feat")))
    feature = flags.partition(":")[2].split()[0]
    better = desk.site.bundle("better", "one", "two", isa={"one": (feature,), "two": ()}, sequence=2)
    assert desk.install(better).installed.cell == "one"


def test_device_without_openssl_says_so(desk: Desk, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPATH=/nowhere exec {os.path.realpath("/proc/self/exe")} "$@"\n')
    python.chmod(0o755)
    device = msgspec.structs.replace(desk.device, python=str(python))
    with pytest.raises(DeviceError, match="openssl"):
        desk.install(1, device=device)
    assert in_use(desk.root) == ""


def test_what_is_no_bundle_or_no_key_is_a_sentence(desk: Desk, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        desk.install(tmp_path / "nothing")
    text = tmp_path / "text"
    text.write_text("no bundle")
    with pytest.raises((BundleRefused, UsageError)):
        desk.install(text)
    with pytest.raises(UsageError, match="no public key"):
        desk.install(1, key=text)


def test_checker_that_cannot_run_is_no_pass(desk: Desk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "check.py"
    broken.write_text("print('fine')\n")
    monkeypatch.setattr(installing, "CHECK", broken)
    with pytest.raises(ToolchainError, match="could not be checked"):
        desk.install(1)


# ------------------------------------------------------------------------------------------------ dying at any moment


class Steps:
    """Counts what changes the disk below a folder, and dies at one of them as a power cut would: nothing is tidied up."""

    NAMES = ("mkdir", "rename", "replace", "fsync", "link", "rmdir", "unlink")

    def __init__(self, folder: Path, die_at: int) -> None:
        self.folder, self.die_at, self.did = str(folder), die_at, list[tuple[str, str]]()

    def watch(self, patch: Callable[[object, str, object], None]) -> None:
        for name in self.NAMES:
            patch(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, act: Callable[..., object]) -> Callable[..., object]:
        def step(*words: object, **options: object) -> object:
            place = str(Path(f"/proc/self/fd/{words[0]}").readlink()) if isinstance(words[0], int) else str(words[0])
            if place.startswith(self.folder):
                if len(self.did) == self.die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                self.did.append((name, " ".join([place, *(str(word) for word in words[1:2])])))
            return act(*words, **options)

        return step


def device_half(root: Path, site: Site, number: int) -> None:
    """Do on a device what `install` asks of it, in this process."""
    objects = root / "objects"
    files = {"program": installing.CHECK, "bundle": site.bundles[number], "key": site.public}
    for path in files.values():
        shutil.copyfile(path, objects / sha256_file(path))
    job = {name: sha256_file(path) for name, path in files.items()} | {"cell": "one", "keep": []}
    child = runner.VisitChild(str(root), None)
    child.checked_bundle = lambda job, folder: checked_in_this_process(root, job, folder)
    agent = types.SimpleNamespace(
        root=str(root),
        alone=lambda visit, command, timeout_s: child.check(command["job"], command["folder"]),
        checked=lambda job, key: job,
        check=lambda: None,
        beat=lambda: None,
    )
    agent.demand_whole = lambda place, release: runner.Agent.demand_whole(agent, place, release)
    placed = runner.Agent.place(agent, "check", "default", job, 60.0)
    runner.Agent.switch(agent, "default", placed["release"])


def checked_in_this_process(root: Path, job: dict[str, str], folder: str) -> dict[str, object]:
    """Do what the program that checks bundles does, so that its steps are counted too."""
    found = check.verify(str(root / "objects" / job["bundle"]), str(root / "objects" / job["key"]), cell=job["cell"])
    cells = check.fitting(found.manifest, cell=job["cell"])
    check.extract(found, [*check.needed(cells[0]), check.MANIFEST], folder)
    return dict(check.report(found, cells))


def test_death_at_any_step_leaves_the_old_release_or_the_new_one_and_the_next_installation_goes_on(
    template: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, root = template.site, tmp_path / "dying"
    found: list[str] = []
    while not found or found[-1] != "alive":
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(template.root, root)
        pid = os.fork()
        if pid == 0:
            Steps(root / "installed", len(found)).watch(monkeypatch.setattr)
            status = 1
            try:
                device_half(root, site, 3)
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        found.append("alive" if status == 0 else in_use(root))
        assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
        assert in_use(root) in ("1.2.0", "1.3.0")
        assert len(found) < 200
        if len(found) % 5 == 0:  # whatever is left, the next installation clears it away and is complete
            device_half(root, site, 3)
            assert in_use(root) == "1.3.0"
            assert sorted(path.name for path in (root / "installed/default").iterdir()) == ["current", "releases"]
            assert len(list((root / "installed/default/releases").iterdir())) == 2
    deaths = found[:-1]
    switched = deaths.index("1.3.0")
    assert switched > 10, "there are as many steps before the one that counts"
    assert set(deaths[:switched]) == {"1.2.0"}
    assert set(deaths[switched:]) == {"1.3.0"}


def test_nothing_gets_its_name_before_it_is_on_the_disk(used: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut may lose is what was not synced: names in the wrong order would show a half release."""
    steps = Steps(used.root / "installed", -1)
    with monkeypatch.context() as patch:
        steps.watch(patch.setattr)
        device_half(used.root, used.site, 3)
    slot = str(used.root / "installed/default")
    told = [(name, words.replace(slot, "SLOT")) for name, words in steps.did]
    named = next(at for at, (name, words) in enumerate(told) if name == "rename" and " SLOT/releases/3-" in words)
    pointed = told.index(("replace", "SLOT/current.part SLOT/current"))
    synced = {words.rpartition("/")[2] for name, words in told[:named] if name == "fsync"}
    release = next((used.root / "installed/default/releases").glob("3-*"))
    assert {path.name for path in release.iterdir()} <= synced
    assert ("fsync", told[named][1].partition(" ")[0]) in told[:named], "the folder itself"
    assert ("fsync", "SLOT/releases") in told[named:pointed]
    assert ("fsync", "SLOT/current.part") in told[named:pointed]
    assert ("fsync", "SLOT") in told[pointed:]


KILLING = """\
import os, runpy, signal, sys
if sys.argv[1].startswith("-"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
sys.executable = {own!r}
replace, rename = os.replace, os.rename
def deadly(act):
    def step(old, new, **options):
        if {word!r} in str(new):
            os.kill(os.getpid(), signal.SIGKILL)
        return act(old, new, **options)
    return step
os.replace, os.rename = deadly(replace), deadly(rename)
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("word", ["/releases/3-", "/default/current"])
def test_agent_that_is_killed_in_the_middle_leaves_a_whole_release_and_frees_the_device(
    used: Desk, tmp_path: Path, word: str
) -> None:
    deadly, program = tmp_path / "deadly", tmp_path / "deadly.py"
    program.write_text(KILLING.format(python=sys.executable, own=str(deadly), word=word))
    deadly.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
    deadly.chmod(0o755)
    with pytest.raises(DeviceError, match=r"SIGKILL|closed its end"):
        used.install(3, device=msgspec.structs.replace(used.device, python=str(deadly)))
    assert in_use(used.root) == "1.2.0"
    done = used.install(3, wait_s=20.0)
    assert in_use(used.root) == done.installed.version == "1.3.0"
    assert sorted(path.name for path in (used.root / "installed/default").iterdir()) == ["current", "releases"]
    assert len(list((used.root / "installed/default/releases").iterdir())) == 2


# ------------------------------------------------------------------------------------------------ which cell fits


FACTS = DeviceFacts(
    hostname="board", machine="aarch64", system="Linux", kernel="6", os_name="", libc="", python="3.11", cpu_model="",
    isa=("asimd", "asimddp"), cores=4, memory_bytes=None, boot_id="",
)  # fmt: skip


def cell(name: str = "x", **demands: object) -> BundledCell:
    wanted = {"machine": "aarch64", "backend": "onnxruntime", "runtime": RuntimeDemand(name="onnxruntime"), **demands}
    return BundledCell(
        cell=name, model="m", target="t", precision="fp32", device="d", requires=DeviceDemand(**wanted),  # type: ignore[arg-type]
        artifact="a", manifest="b", sha256="0" * 64, session="s", run="", inputs=(), outputs=(),
    )  # fmt: skip


def test_cell_is_for_a_device_when_machine_features_runtime_and_gpu_are() -> None:
    from edgedeploy.records.artifact import Fingerprint

    why = installing.why_unfit
    assert why(cell(), FACTS, "") == ""
    assert "for x86_64, and the device is aarch64" in why(cell(machine="x86_64"), FACTS, "")
    assert "features i8mm" in why(cell(isa=("asimd", "i8mm")), FACTS, "")
    assert "none of them" in why(cell(any_isa=("sve", "i8mm")), FACTS, "")
    assert why(cell(any_isa=("sve", "asimddp")), FACTS, "") == ""
    measured = RuntimeDemand(name="onnxruntime", measured="1.23.2", versions=">=1.23.2,<2")
    assert why(cell(runtime=measured), FACTS, "1.24.0") == ""
    assert "the device has 1.22.0" in why(cell(runtime=measured), FACTS, "1.22.0")
    assert why(cell(runtime=measured), FACTS, "") == "", (
        "a runtime that the device brings itself is asked by the replay"
    )
    tied = Fingerprint(gpu="Orin", compute_capability="8.7", tensorrt="10.3.0", driver="12.6", jetpack="6.2")
    orin = msgspec.structs.replace(
        FACTS, gpus=(Gpu(name="Orin", compute_capability="8.7"),), tensorrt="10.3.0.30", jetpack="6.2"
    )
    assert why(cell(fingerprint=tied), orin, "") == ""
    assert "has no GPU" in why(cell(fingerprint=tied), FACTS, "")
    newer = msgspec.structs.replace(orin, tensorrt="10.7.0")
    assert "tied to TensorRT 10.3.0, and the device has 10.7.0" in why(cell(fingerprint=tied), newer, "")


def test_baseline_is_never_what_is_installed() -> None:
    base = msgspec.structs.replace(cell("base"), role="baseline")
    assert installing.best_of([base, cell("new")], {}, "board").cell == "new"
    with pytest.raises(UsageError, match="nothing but baselines"):
        installing.best_of([base], {}, "board")


# ------------------------------------------------------------------------------------------------ the device's own word


def test_device_checks_and_says_what_of_a_bundle_is_for_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lab = lab_of(desk)
    found = installing.verify_on_device(desk.site.bundles[2], desk.site.public, "desk", lab, 0.0, quiet)
    assert (found.bundle, found.version, found.sequence) == ("tiny", "1.2.0", 2)
    assert [one.cell for one in found.cells] == ["one"]
    assert found.seconds > 0
    path = forged(desk.site.bundles[2], b"edgedeploy.fake/1", tmp_path / "forged.edb.tar")
    believe(monkeypatch, desk.site.bundles[2], path)
    with pytest.raises(BundleRefused):
        installing.verify_on_device(path, desk.site.public, "desk", lab, 0.0, quiet)


# ------------------------------------------------------------------------------------------------ as it is typed


def test_install_list_and_rollback_as_they_are_typed(
    used: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = ["--device", "desk", "--lab", str(lab_of(used)), "-q"]
    bundles, key = used.site.bundles, ["--key", str(used.site.public)]
    assert cli.run(["install", str(bundles[3]), *there]) == 2
    assert "whose signature" in capsys.readouterr().err
    bad = forged(bundles[3], b"edgedeploy.fake/1", tmp_path / "forged.edb.tar")
    assert cli.run(["install", str(bad), *key, *there, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["kind"] == "BundleRefused"
    assert cli.run(["install", str(bundles[3]), *key, *there]) == 0
    said = capsys.readouterr().out
    assert "desk: slot default uses tiny 1.3.0 (sequence 3), cell one" in said
    assert "back to it: edgedeploy rollback --device desk" in said
    file = Path(next(line for line in said.splitlines() if line.startswith("file: ")).removeprefix("file: "))
    assert file.is_file()
    assert cli.run(["install", "--list", *there, "--json"]) == 0
    (slot,) = json.loads(capsys.readouterr().out)["installed"]
    assert [one["version"] for one in slot["releases"]] == ["1.2.0", "1.3.0"]
    assert cli.run(["rollback", *there]) == 0
    assert "uses tiny 1.2.0 (sequence 2) again, no longer 1.3.0" in capsys.readouterr().out
    assert cli.run(["rollback", *there]) == 3
    assert "nothing before it to go back to" in capsys.readouterr().err


def lab_of(desk: Desk) -> Path:
    lab = desk.root.parent / "lab.toml"
    lab.write_text(
        'format = "edgedeploy.lab/1"\n[devices.desk]\ntransport = "local"\n'
        f'root = "{desk.root}"\nlease_dir = "{desk.device.lease_dir}"\n'
    )
    return lab


def test_what_a_manifest_calls_itself_moves_no_file_here_or_there(desk: Desk) -> None:
    names = with_cells(cell="../../../escape")
    path = desk.site.bundle("names", changed=lambda bundle: msgspec.structs.replace(names(bundle), name="../../name"))
    done = desk.install(path)
    assert done.installed.bundle == "../../name"
    assert Path(done.path) == desk.root / "installed/default"
    everything = {one for one in desk.root.parent.rglob("*") if "escape" in one.name}
    assert not everything


def test_bundle_without_a_manifest_we_know_is_a_sentence(desk: Desk) -> None:
    def newer(bundle: Bundle) -> Bundle:
        return msgspec.structs.replace(bundle, format="edgedeploy.bundle/99")

    with pytest.raises(ToolchainError, match="newer edgedeploy; upgrade"):
        desk.install(desk.site.bundle("newer", changed=newer))
