"""A bundle on an aarch64 board: checked by the board itself, answered there, in place, back, and refused; seconds are told."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgedeploy import cli, installing, pipeline
from edgedeploy.errors import BundleRefused, DeviceError, UsageError
from edgedeploy.installing import InstallRequest
from edgedeploy.lab import bundle as shipping
from edgedeploy.lab import provision
from edgedeploy.lab.inventory import load_lab, open_transport
from edgedeploy.records.device import Device
from edgedeploy.storage import sha256_file
from tests.bundles import believe, bundle_of, forged
from tests.testbed.cache import cache
from tests.testbed.hybrid import Hybrid
from tests.testbed.vm import Vm

from .test_provision import a_model

pytest.importorskip("onnxruntime", reason="compiling needs it: pip install 'edgedeploy[onnxruntime]'")
pytest.importorskip("cryptography", reason="signing needs it: pip install 'edgedeploy[evidence]'")

INSTALLED = ".cache/edgedeploy/installed/default"


def quiet(text: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Site:
    """An artifact for the board, signed bundles of it, and the board as `devices add` and `provision` leave it."""

    folder: Path
    lab: Path
    public: Path
    bundles: dict[int, Path]
    foreign: Path

    @property
    def device(self) -> Device:
        return load_lab(self.lab).devices["bare"]

    def install(self, bundle: Path, **changes: object) -> installing.Installation:
        request = InstallRequest(
            bundle=bundle,
            key=self.public,
            device_name="bare",
            device=self.device,
            **changes,  # type: ignore[arg-type]
        )
        return installing.install(request, quiet)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, hybrid: Hybrid) -> Iterator[Site]:
    from edgedeploy.evidence.seal import new_key

    folder = tmp_path_factory.mktemp("arm")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder))
        patch.delenv("SSH_AUTH_SOCK", raising=False)
        patch.delenv("EDGEDEPLOY_LAB", raising=False)
        patch.setenv("EDGEDEPLOY_CACHE_DIR", str(cache() / "host"))
        lab = folder / "lab.toml"
        shown = subprocess.run(
            ["ssh-keygen", "-lf", "-"], input=hybrid.known_hosts.read_bytes(), stdout=subprocess.PIPE, check=True
        ).stdout.split()[1]
        login = [f"{hybrid.user}@{hybrid.host}:{hybrid.port}", "--key", str(hybrid.key)]
        add = ["devices", "add", "bare", *login, "--fingerprint", shown.decode(), "--lab", str(lab), "--json"]
        assert cli.run(add) == 0
        assert cli.run(["devices", "provision", "bare", "--runtime", "onnxruntime", "--lab", str(lab), "-q"]) == 0
        a_model(folder / "small.onnx")
        built = pipeline.compile("small.onnx", target="raspberry-pi-4", output="built", name="small")
        key, public = new_key(folder / "signer.pem")
        artifacts = {"small": built.folder.absolute()}
        bundles = {
            number: bundle_of(
                artifacts, key, folder / f"{number}.edb.tar", version=f"1.{number}.0", sequence=number,
                machine="aarch64", isa={"small": ("asimd",)},
            )
            for number in (1, 2)
        }  # fmt: skip
        foreign = bundle_of(artifacts, key, folder / "foreign.edb.tar", machine="x86_64", sequence=9)
        yield Site(folder, lab, public, bundles, foreign)
        entry = load_lab(lab).devices["bare"]
        with (
            open_transport("bare", entry) as transport,
            shipping.connect(transport, entry, device_name="bare") as agent,
        ):
            provision.remove(agent, [one.name for one in provision.installed(agent)])


def used_on(board: Hybrid | Vm) -> tuple[str, str]:
    """Return the folder that an application of the board reads first, and the digest of the model that it finds there."""
    folder = board.ssh("head", "-n1", f"{INSTALLED}/current").strip()
    return folder, board.ssh("sha256sum", f"{INSTALLED}/{folder}/model.onnx").split()[0]


def test_board_checks_answers_and_uses_a_bundle_and_goes_back(
    site: Site, hybrid: Hybrid, capsys: pytest.CaptureFixture[str]
) -> None:
    started_s = time.monotonic()
    checked = installing.verify_on_device(site.bundles[1], site.public, "bare", site.lab, 60.0, quiet)
    verified_s = time.monotonic() - started_s
    assert checked.machine == "aarch64"
    (cell,) = checked.cells
    assert cell.golden is not None, cell.note
    assert cell.golden.samples > 0
    first = site.install(site.bundles[1])
    assert first.replay.golden is not None
    folder, digest = used_on(hybrid)
    assert folder == f"releases/{first.installed.release}"
    assert digest == first.installed.sha256 == sha256_file(site.folder / "built" / "model.onnx")
    started_s = time.monotonic()
    second = site.install(site.bundles[2])
    installed_s = time.monotonic() - started_s
    assert used_on(hybrid)[0] == f"releases/{second.installed.release}"
    with pytest.raises(UsageError, match="is older than"):
        site.install(site.bundles[1])
    back = installing.rollback("bare", site.device, quiet)
    assert used_on(hybrid)[0] == f"releases/{back.used.release}" == f"releases/{first.installed.release}"
    with pytest.raises(DeviceError, match="nothing before it to go back to"):
        installing.rollback("bare", site.device, quiet)
    with capsys.disabled():
        print(
            f"\n  on the board: checking {checked.seconds:.1f} s, verify and replay {verified_s:.1f} s in all, "
            f"install {installed_s:.1f} s"
        )


def test_board_itself_refuses_what_is_for_another_processor(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="it is for x86_64, and the device is aarch64"):
        site.install(site.foreign)
    monkeypatch.setattr(installing, "why_unfit", lambda *arguments: "")
    with pytest.raises(BundleRefused, match="is for x86_64, not for aarch64"):
        site.install(site.foreign)


def test_board_itself_refuses_a_forged_bundle(
    site: Site, hybrid: Hybrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = used_on(hybrid) if "current" in hybrid.ssh("sh", "-c", f"ls {INSTALLED} || true") else None
    path = forged(site.bundles[2], b'"model_sha256"', tmp_path / "forged.edb.tar")
    believe(monkeypatch, site.bundles[2], path)
    with pytest.raises(BundleRefused, match="nothing on the device was changed"):
        site.install(path, slot="forged")
    with pytest.raises(BundleRefused):
        installing.verify_on_device(path, site.public, "bare", site.lab, 60.0, quiet)
    assert "current" not in hybrid.ssh("ls", INSTALLED.replace("default", "forged")).split()
    assert before is None or used_on(hybrid) == before


@pytest.mark.long
def test_release_is_whole_after_a_power_cut_right_after_it_was_installed(site: Site, vm: Vm) -> None:
    entry = vm.device(timeout_s=120.0)
    request = InstallRequest(bundle=site.bundles[1], key=site.public, device_name="vm", device=entry)
    first = installing.install(request, quiet)
    assert "for want of a runtime" in first.replay.note
    second = installing.install(
        InstallRequest(bundle=site.bundles[2], key=site.public, device_name="vm", device=entry), quiet
    )
    vm.power_cut()
    vm.wait_until_up()
    assert used_on(vm) == (f"releases/{second.installed.release}", second.installed.sha256)
