"""Layers that a table leaves in float are computed in float by ONNX Runtime too."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed here")
pytest.importorskip("onnxscript", reason="onnxscript is not installed here")

import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional

from edgedeploy.errors import FidelityError
from edgedeploy.prepare.dataset import random_samples
from edgedeploy.prepare.emission import emit as emit_module
from edgedeploy.prepare.emission.emit import emit
from edgedeploy.prepare.export import export
from edgedeploy.prepare.graph import read_graph, view
from edgedeploy.prepare.load import Loaded
from edgedeploy.prepare.ptq.quantize import quantize
from edgedeploy.prepare.simplify import simplify
from edgedeploy.records.model import TensorSpec
from edgedeploy.records.quantization import QuantizationPolicy
from edgedeploy.records.target import QuantizationRules

RULES = {
    "arm": QuantizationRules(activation_dtype="int8", activation_symmetric=False, clamps="absorbed"),
    "vnni": QuantizationRules(activation_dtype="uint8", activation_symmetric=False, clamps="absorbed"),
    "tensorrt": QuantizationRules(
        activation_dtype="int8", activation_symmetric=True, bias="float32", residual_add="skip"
    ),
}


class Branched(nn.Module):
    """A middle layer whose input another layer reads too, so that it is integers even when the middle is float."""

    def __init__(self, first, middle, last, other):
        super().__init__()
        self.first, self.middle, self.last, self.other = first, middle, last, other

    def forward(self, x):
        shared = functional.relu(self.first(x))
        return self.last(functional.relu(self.middle(shared))) + self.other(shared)


def small():
    return Branched(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, 1, 1, groups=2), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1))


def large():
    return Branched(nn.Linear(12, 640), nn.Linear(640, 640), nn.Linear(640, 5), nn.Linear(640, 5))


# Small: within the exporter's folding limits; large: 640 * 640 is beyond both.
NETWORKS = {"small": (small, (3, 10, 10)), "large": (large, (12,))}


@pytest.fixture(scope="module", params=NETWORKS)
def middle_in_float(request, tmp_path_factory):
    """Return a model, samples, the name of its middle layer, and that layer's weights, which one scale does not suit."""
    make, shape = NETWORKS[request.param]
    torch.manual_seed(0)
    module = make().eval()
    with torch.no_grad():  # weights that read a dead channel make the step of all others too large
        module.first.weight[0], module.first.bias[0] = 0, -1
        module.middle.weight[:4, 0] = 300
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", *shape))
    samples = random_samples([spec], 24, 0)
    folder = tmp_path_factory.mktemp(request.param)
    exported = export(Loaded("module", request.param, module), [spec], samples, folder / "e.onnx")
    model = simplify(exported, samples, folder / "s.onnx")
    seen = view(read_graph(Path(model.path)).graph)
    weight = module.middle.weight.detach().numpy()
    (name,) = [
        node.name
        for node in seen.graph.node
        if node.op_type in ("Conv", "Gemm")
        and any(np.array_equal(seen.constants[node.input[1]], each) for each in (weight, weight.T))
    ]
    return model, samples, name, weight


def form_of(middle_in_float, rules, folder):
    model, samples, name, _ = middle_in_float
    policy = QuantizationPolicy(float_layers=(name,), rounding="nearest", equalize=False)
    return emit(model, quantize(model, samples, rules, policy), rules, samples, folder / "form.onnx").model


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_layer_left_in_float_is_as_good_when_the_runtime_has_optimised(middle_in_float, rules, tmp_path):
    written, run = (item.outputs[0].sqnr_db for item in form_of(middle_in_float, rules, tmp_path).fidelity[-2:])
    assert run > written - 0.5


@pytest.mark.parametrize("rules", ["arm", "vnni"])
def test_runtime_keeps_the_float_weights(middle_in_float, rules, tmp_path):
    form_of(middle_in_float, RULES[rules], tmp_path)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "form.onnx"), options, providers=["CPUExecutionProvider"])
    constants = [numpy_helper.to_array(item) for item in onnx.load(tmp_path / "optimised.onnx").graph.initializer]
    weight = middle_in_float[3]
    assert any(np.array_equal(found, each) for found in constants for each in (weight, weight.T))


def test_without_the_guard_the_runtime_rounds_them(middle_in_float, tmp_path, monkeypatch):
    monkeypatch.setattr(emit_module, "keep_float", lambda graph: graph)
    with pytest.raises(FidelityError, match="ONNX Runtime's optimiser breaks the int8 form"):
        form_of(middle_in_float, RULES["arm"], tmp_path)


def test_form_for_a_back_end_with_float_biases_has_one_scale_for_each_tensor(middle_in_float, tmp_path):
    form_of(middle_in_float, RULES["tensorrt"], tmp_path)
    graph = onnx.load(tmp_path / "form.onnx").graph
    weights = {item.name for item in graph.initializer}
    shapes = {item.name: list(item.dims) for item in graph.initializer}
    activations = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] not in weights]
    assert activations
    assert all(shapes[node.input[1]] == [] for node in activations)
