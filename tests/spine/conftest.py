"""A place of its own for every test: cache, lab, targets and results, and two artifacts of the fake back end."""

from pathlib import Path

import pytest

from edgedeploy import pipeline

TARGET = """\
format = "edgedeploy.target/1"
name = "fake-board"
description = "a board that exists only in tests"

[backends.fake]
precisions = ["fp32", "int8"]

[conditions]
max_foreign_load = 1000.0
"""


def make_place(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Make a folder the working directory, in which nothing of the person's own settings is seen."""
    targets = folder / "targets"
    targets.mkdir(exist_ok=True)
    (targets / "fake-board.toml").write_text(TARGET)
    patch.setenv("EDGEDEPLOY_CACHE_DIR", str(folder / "cache"))
    patch.setenv("EDGEDEPLOY_STATE_DIR", str(folder / "state"))
    patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    patch.delenv("EDGEDEPLOY_LAB", raising=False)
    patch.chdir(folder)


def make_model(folder: Path) -> Path:
    """Write a small ONNX file with one dynamic batch axis."""
    onnx = pytest.importorskip("onnx", reason="the host half needs onnx: pip install 'edgedeploy[onnxruntime]'")
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("Relu", ["image"], ["scores"], name="relu")],
        "tiny",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["batch", 4])],
    )
    path = folder / "tiny.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty working directory of its own."""
    make_place(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture
def model(place) -> Path:
    """A small ONNX file in it."""
    return make_model(place)


@pytest.fixture
def compiled(model):
    """Compile the tiny model for the fake back end with given options."""

    def compile_as(name: str, **options) -> Path:
        built = pipeline.compile(
            "tiny.onnx", target="fake-board", backend="fake", options=options, output=Path("build") / name, name=name
        )
        return built.folder

    return compile_as
