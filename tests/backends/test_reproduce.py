"""What a bundle's recipes make today beside what was released: the same bytes, the same answers, or what differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgedeploy import cli, pipeline
from edgedeploy.build import MANIFEST, load_artifact
from edgedeploy.documents import write_json
from edgedeploy.errors import BundleRefused, DocumentError
from edgedeploy.evidence.seal import new_key
from edgedeploy.records.installation import ReproducedCell, Reproduction
from edgedeploy.reproduce import RELEASE, changes_of, reproduce
from edgedeploy.storage import sha256_file
from tests.bundles import bundle_of

onnx = pytest.importorskip("onnx", reason="the host half needs onnx: pip install 'edgedeploy[onnxruntime]'")
pytest.importorskip("onnxruntime", reason="answers are computed by it: pip install 'edgedeploy[onnxruntime]'")
pytest.importorskip("cryptography", reason="signing needs it: pip install 'edgedeploy[evidence]'")

RELEASE_FILE = """\
format = "edgedeploy.release/1"
name = "small"
[models.small]
source = "small.onnx"
[calibration]
set = "samples.npz"
[[cells]]
name = "fp32"
model = "small"
target = "host"
backend = "onnxruntime"
precision = "fp32"
[gate]
baseline = "fp32"
"""


@dataclass(frozen=True)
class Works:
    """A working directory with the sources, and what was released of them."""

    folder: Path
    key: Path
    public: Path
    released: dict[str, Path]

    def bundle(self, name: str, *cells: Path, is_whole: bool = True) -> Path:
        folders = {folder.name: folder for folder in cells}
        members = {RELEASE: (self.folder / "edgedeploy.toml").read_bytes()} if is_whole else {}
        return bundle_of(folders, self.key, self.folder / f"{name}.edb.tar", extra=members)

    def reproduce(self, bundle: Path, **options: Path) -> Reproduction:
        return reproduce(bundle, self.public, lambda text: None, **options)  # type: ignore[arg-type]

    def altered(self, name: str, change: float) -> Path:
        """Return a copy of the fp32 artifact whose file is another one, by a note in it and its weights by so much."""
        folder = self.folder / name
        shutil.copytree(self.released["fp32"], folder)
        artifact = load_artifact(folder).artifact
        file = folder / artifact.file
        model = onnx.load(file)
        model.doc_string = "made elsewhere"
        for weights in model.graph.initializer:
            values = onnx.numpy_helper.to_array(weights)
            if values.dtype == np.float32:
                weights.CopyFrom(onnx.numpy_helper.from_array(values * np.float32(1 + change), weights.name))
        onnx.save(model, file)
        changed = msgspec.structs.replace(artifact, sha256=sha256_file(file), size_bytes=file.stat().st_size)
        write_json(folder / MANIFEST, changed)
        return folder


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Works]:
    folder, generator = tmp_path_factory.mktemp("works"), np.random.default_rng(0)
    helper = onnx.helper
    weights = generator.normal(size=(16, 8)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])],
        "small",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 8])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "small.onnx"
    )
    np.savez(folder / "samples.npz", x=generator.normal(size=(32, 16)).astype(np.float32))
    (folder / "edgedeploy.toml").write_text(RELEASE_FILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("EDGEDEPLOY_CACHE_DIR", str(folder / "cache"))
        patch.setenv("EDGEDEPLOY_STATE_DIR", str(folder / "state"))
        released = {
            precision: pipeline.compile(
                "small.onnx", precision=precision, calibration="samples.npz", name="small",
                output=Path("released") / precision,
            ).folder.absolute()
            for precision in ("fp32", "int8")
        }  # fmt: skip
        key, public = new_key(folder / "signer.pem")
        yield Works(folder, key, public, released)


def only(found: Reproduction) -> ReproducedCell:
    (cell,) = found.cells
    return cell


def test_same_sources_and_tools_give_the_same_bytes(works: Works) -> None:
    cached = {path: path.stat().st_mtime_ns for path in (works.folder / "cache").rglob("*") if path.is_file()}
    found = works.reproduce(works.bundle("both", *works.released.values()), keep=works.folder / "kept")
    assert [(cell.cell, cell.state, cell.changes) for cell in found.cells] == [
        ("fp32", "identical", ()),
        ("int8", "identical", ()),
    ]
    assert found.is_reproduced
    kept = [load_artifact(folder).artifact.sha256 for folder in sorted((works.folder / "kept").iterdir())]
    assert kept == [cell.then_sha256 for cell in found.cells]
    now = {path: path.stat().st_mtime_ns for path in (works.folder / "cache").rglob("*") if path.is_file()}
    assert now == cached, "what was released stays in the cache as it is"


def test_other_bytes_with_the_same_answers_are_numerically_equal(works: Works) -> None:
    cell = only(works.reproduce(works.bundle("noted", works.altered("noted", 0.0))))
    assert (cell.state, cell.largest, cell.unit) == ("equal", 0.0, "of the largest value")
    assert cell.then_sha256 != cell.now_sha256


def test_answers_that_differ_a_little_are_equal_and_told_and_by_more_they_differ(works: Works) -> None:
    near = only(works.reproduce(works.bundle("near", works.altered("near", 1e-5))))
    assert near.state == "equal"
    assert near.largest == pytest.approx(1e-5, rel=0.1)
    far = works.reproduce(works.bundle("far", works.altered("far", 0.05)))
    assert only(far).state == "differs"
    assert only(far).largest == pytest.approx(0.05, rel=0.1)
    assert "further apart" in only(far).note
    assert not far.is_reproduced


def test_sources_that_are_others_are_named_and_not_built(
    works: Works, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = works.bundle("plain", works.released["int8"])
    for name in ("small.onnx", "samples.npz", "edgedeploy.toml"):
        shutil.copy(works.folder / name, tmp_path / name)
    np.savez(tmp_path / "samples.npz", x=np.ones((32, 16), np.float32))
    found = works.reproduce(bundle, release=tmp_path / "edgedeploy.toml")
    assert only(found).state == "not built"
    assert "the calibration set" in only(found).note
    assert any(change.startswith("the calibration set: ") for change in only(found).changes)
    (tmp_path / "small.onnx").unlink()
    assert "does not exist" in only(works.reproduce(bundle, release=tmp_path / "edgedeploy.toml")).note
    assert not found.is_reproduced


def test_tools_of_other_versions_are_named(works: Works) -> None:
    folder = works.folder / "older"
    shutil.copytree(works.released["fp32"], folder)
    artifact = load_artifact(folder).artifact
    toolchain = {**artifact.recipe.toolchain, "onnx": "1.0.0", "gone": "2.0"}
    recipe = msgspec.structs.replace(artifact.recipe, toolchain=toolchain)
    write_json(folder / MANIFEST, msgspec.structs.replace(artifact, recipe=recipe))
    cell = only(works.reproduce(works.bundle("older", folder)))
    assert cell.state == "identical"
    assert cell.changes == (
        "gone: 2.0 then, not there now",
        f"onnx: 1.0.0 then, {artifact.recipe.toolchain['onnx']} now",
    )
    assert changes_of(artifact.recipe, artifact.recipe) == ()


def test_bundle_without_a_release_file_asks_for_one(works: Works) -> None:
    bundle = works.bundle("without", works.released["fp32"], is_whole=False)
    with pytest.raises(DocumentError, match="name the release file with --release"):
        works.reproduce(bundle)
    assert only(works.reproduce(bundle, release=works.folder / "edgedeploy.toml")).state == "identical"


def test_forged_bundle_is_not_built_from(works: Works) -> None:
    path = works.bundle("forged", works.released["fp32"])
    data = bytearray(path.read_bytes())
    data[data.rindex(b'"model_sha256"')] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BundleRefused):
        works.reproduce(path)


def test_reproduce_as_it_is_typed(works: Works, capsys: pytest.CaptureFixture[str]) -> None:
    same = works.bundle("typed", works.released["fp32"])
    words = ["reproduce", str(same), "--key", str(works.public), "-q"]
    assert cli.run(words) == 0
    assert "byte-identical" in capsys.readouterr().out
    assert cli.run([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["format"] == "edgedeploy.reproduction/1"
    assert document["is_reproduced"] is True
    other = works.bundle("typed-far", works.altered("typed-far", 0.05))
    assert cli.run(["reproduce", str(other), "--key", str(works.public), "-q"]) == 1
    assert "differs" in capsys.readouterr().out
