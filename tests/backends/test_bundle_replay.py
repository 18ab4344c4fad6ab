"""An artifact answers its golden inputs on the device before it is used there; one that does not changes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgedeploy import golden, installing, pipeline
from edgedeploy.build import MANIFEST, load_artifact
from edgedeploy.documents import write_json
from edgedeploy.errors import DeviceError, FidelityError
from edgedeploy.evidence.seal import new_key
from edgedeploy.installing import InstallRequest
from edgedeploy.lab.conversation import Agent
from edgedeploy.records.device import Device
from edgedeploy.storage import sha256_file
from tests.bundles import bundle_of

onnx = pytest.importorskip("onnx", reason="the host half needs onnx: pip install 'edgedeploy[onnxruntime]'")
pytest.importorskip("onnxruntime", reason="answers are computed by it: pip install 'edgedeploy[onnxruntime]'")
pytest.importorskip("cryptography", reason="signing needs it: pip install 'edgedeploy[evidence]'")


@dataclass(frozen=True)
class Site:
    """A device on this machine, and bundles of an artifact that answers as it should and of one that does not."""

    device: Device
    public: Path
    good: Path
    bad: Path

    def install(self, bundle: Path) -> installing.Installation:
        request = InstallRequest(bundle=bundle, key=self.public, device_name="desk", device=self.device)
        return installing.install(request, lambda text: None)

    @property
    def slot(self) -> Path:
        return Path(self.device.root, "installed", "default")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder, helper = tmp_path_factory.mktemp("replay"), onnx.helper
    weights = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "small",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 8])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "small.onnx"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("EDGEDEPLOY_CACHE_DIR", str(folder / "cache"))
        built = pipeline.compile("small.onnx", output="good", name="small").folder.absolute()
        key, public = new_key(folder / "signer.pem")
        device = Device(transport="local", root=str(folder / "root"), lease_dir=str(folder))
        good = bundle_of({"small": built}, key, folder / "good.edb.tar", sequence=1)
        bad = bundle_of({"small": other_answers(built, folder / "bad")}, key, folder / "bad.edb.tar", sequence=2)
        yield Site(device, public, good, bad)


def other_answers(built: Path, folder: Path) -> Path:
    """Return a copy of an artifact that promises other answers than it gives."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(built, folder)
    outputs = folder / golden.OUTPUTS
    save_file({name: values + 1 for name, values in load_file(outputs).items()}, outputs)
    artifact = load_artifact(built).artifact
    assert artifact.golden is not None
    promised = msgspec.structs.replace(artifact.golden, outputs_sha256=sha256_file(outputs))
    write_json(folder / MANIFEST, msgspec.structs.replace(artifact, golden=promised))
    return folder


def test_only_what_answers_its_golden_inputs_there_is_used(site: Site) -> None:
    done = site.install(site.good)
    assert done.replay.golden is not None
    assert done.replay.golden.samples > 0
    before = (site.slot / "current").read_text()
    with pytest.raises(FidelityError, match="is not what the model answers to the artifact's golden inputs"):
        site.install(site.bad)
    assert (site.slot / "current").read_text() == before
    assert [path.name for path in (site.slot / "releases").iterdir()] == [done.installed.release]


def test_device_without_room_is_told_before_anything_is_unpacked(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Agent.ask

    def asked(self: Agent, do: str, **fields: object) -> dict[str, object]:
        return {"free_bytes": 1000} if do == "space" else ask(self, do, **fields)  # type: ignore[arg-type]

    monkeypatch.setattr(Agent, "ask", asked)
    with pytest.raises(DeviceError, match="1000 B are free on its disk; nothing was changed there"):
        site.install(site.good)
