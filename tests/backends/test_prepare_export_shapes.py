"""Compression that needs no lowering is carried as it is: cut channels, students, several tasks, inputs and outputs."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from edgedeploy.prepare.dataset import random_samples  # noqa: E402
from edgedeploy.prepare.export import export  # noqa: E402
from edgedeploy.prepare.graph import Runner, read_graph  # noqa: E402
from edgedeploy.prepare.load import load  # noqa: E402
from edgedeploy.prepare.simplify import simplify  # noqa: E402
from edgedeploy.records.model import TensorSpec  # noqa: E402

HERE = Path(__file__).parent
IMAGE = TensorSpec(name="image", dtype="float32", shape=("batch", 3, 8, 8), layout="NCHW")
VECTOR = TensorSpec(name="vector", dtype="float32", shape=("batch", 12))
TOKENS = TensorSpec(name="tokens", dtype="int64", shape=("batch", "length"))


def canonical(name, specs, folder):
    """Return the canonical model of a factory in structural_nets, and its graph."""
    samples = random_samples(specs, 4, 0)
    loaded = load(f"structural_nets:{name}", None, base=HERE)
    model = simplify(export(loaded, specs, samples, folder / "m.onnx"), samples, folder / "s.onnx")
    return model, read_graph(Path(model.path)).graph


def kernels(graph):
    readers = {node.input[1]: node.op_type for node in graph.node if node.op_type in ("Conv", "Gemm")}
    return {tuple(item.dims) for item in graph.initializer if item.name in readers}


def test_odd_channel_counts_with_concatenation_and_residual_sums_are_kept(tmp_path):
    model, graph = canonical("channels_cut", [IMAGE], tmp_path)
    assert kernels(graph) == {(13, 3, 3, 3), (37, 13, 3, 3), (13, 37, 1, 1), (7, 13, 3, 3), (9, 20, 1, 1), (5, 9)}
    # Normalisation is folded, and nothing pads or slices channels back to even counts.
    assert {node.op_type for node in graph.node} <= {
        "Conv", "Relu", "Add", "Concat", "GlobalAveragePool", "Flatten", "Reshape", "Gemm",
    }  # fmt: skip
    assert max(output.max_relative for record in model.fidelity for output in record.outputs) < 1e-5
    assert model.compression.parameters == sum(
        int(np.prod(item.dims)) for item in graph.initializer if item.data_type == 1
    )


def test_a_student_returns_what_its_forward_returns_in_evaluation(tmp_path):
    model, graph = canonical("student", [VECTOR], tmp_path)
    assert [spec.name for spec in model.outputs] == ["output"]
    assert kernels(graph) == {(8, 12), (5, 8)}


def test_tasks_of_one_trunk_keep_their_names_and_share_it(tmp_path):
    model, graph = canonical("several_tasks", [IMAGE], tmp_path)
    assert [(spec.name, spec.shape) for spec in model.outputs] == [
        ("boxes", ("batch", 4)),
        ("heads_age", ("batch", 1)),
        ("heads_kind", ("batch", 5)),
        ("map", ("batch", 8, 8, 8)),
    ]
    assert sum(node.op_type == "Conv" for node in graph.node) == 1


def test_inputs_of_different_types_and_a_dynamic_length_are_kept(tmp_path):
    model, _ = canonical("image_and_tokens", [IMAGE, TOKENS], tmp_path)
    assert {spec.name: spec.dtype for spec in model.inputs} == {"image": "float32", "tokens": "int64"}
    batch = {"image": np.zeros((3, 3, 8, 8), np.float32), "tokens": np.ones((3, 11), np.int64)}
    answer = Runner(Path(model.path))(batch)
    assert {name: value.shape for name, value in answer.items()} == {"output_0": (3, 4), "output_1": (3, 11, 8)}
