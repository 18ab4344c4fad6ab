"""int8: what is quantized, that the graph means what the table says, and that ONNX Runtime fuses it."""

from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgedeploy.backends.onnxruntime import BACKEND  # noqa: E402
from edgedeploy.errors import FidelityError, ModelError  # noqa: E402
from edgedeploy.prepare.dataset import random_samples  # noqa: E402
from edgedeploy.prepare.emission import emit as emit_module  # noqa: E402
from edgedeploy.prepare.emission.emit import emit  # noqa: E402
from edgedeploy.prepare.export import export  # noqa: E402
from edgedeploy.prepare.fidelity import compare  # noqa: E402
from edgedeploy.prepare.graph import Runner, read_graph, view  # noqa: E402
from edgedeploy.prepare.load import Loaded, load  # noqa: E402
from edgedeploy.prepare.ptq.calibrate import extremes, mean_errors  # noqa: E402
from edgedeploy.prepare.ptq.equalize import equalize  # noqa: E402
from edgedeploy.prepare.ptq.quantize import quantize  # noqa: E402
from edgedeploy.prepare.simplify import simplify  # noqa: E402
from edgedeploy.records.model import TensorSpec  # noqa: E402
from edgedeploy.records.quantization import QuantizationPolicy  # noqa: E402
from edgedeploy.records.target import QuantizationRules  # noqa: E402

HERE = Path(__file__).parent
IMAGE = TensorSpec(name="image", dtype="float32", shape=("batch", 3, 8, 8))
SPECS = {
    "residual": [IMAGE],
    "residual_with_taps": [IMAGE],
    "two_inputs": [
        TensorSpec(name="tokens", dtype="float32", shape=("batch", "length", 6)),
        TensorSpec(name="bias", dtype="float32", shape=("batch", 8)),
    ],
    "small_mlp": [TensorSpec(name="vector", dtype="float32", shape=("batch", 12))],
    "large_mlp": [TensorSpec(name="vector", dtype="float32", shape=("batch", 12))],
}
X86 = QuantizationRules(activation_dtype="uint8", activation_symmetric=False, weight_bits=7)
VNNI = QuantizationRules(activation_dtype="uint8", activation_symmetric=False, weight_bits=8)
ARM = QuantizationRules(activation_dtype="int8", activation_symmetric=False, weight_bits=8)
SYMMETRIC = QuantizationRules(activation_dtype="int8", activation_symmetric=True, weight_bits=8)


@pytest.fixture(scope="module")
def canonical(tmp_path_factory):
    """Return a function from a network's name to its simplified fp32 model and 24 samples, made once."""
    made = {}

    def model_of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            samples = random_samples(SPECS[name], 24, 0)
            model = export(load(f"tiny_nets:{name}", None, base=HERE), SPECS[name], samples, folder / "e.onnx")
            made[name] = simplify(model, samples, folder / "s.onnx"), samples
        return made[name]

    return model_of


def from_onnx(nodes, inputs, outputs, constants, out, count=12, opset=18):
    """Return a canonical model and samples for a graph written by hand."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    specs = [TensorSpec(name=name, dtype="float32", shape=tuple(shape)) for name, shape in inputs.items()]
    samples = random_samples(specs, count, 0)
    model = export(Loaded("onnx", "hand", program), None, samples, out / "e.onnx")
    return simplify(model, samples, out / "s.onnx"), samples


@pytest.mark.parametrize("rules", [X86, VNNI, ARM, SYMMETRIC], ids=["x86", "vnni", "arm", "symmetric"])
@pytest.mark.parametrize("name", list(SPECS))
def test_int8_stays_close_to_fp32_on_samples_it_was_not_calibrated_on(tmp_path, canonical, name, rules):
    model, samples = canonical(name)
    table = quantize(model, samples, rules)
    form = emit(model, table, rules, samples, tmp_path / "q.onnx").model
    other = random_samples(SPECS[name], 24, 1)
    for is_optimized in (False, True):
        runs = Runner(Path(model.path)), Runner(Path(form.path), is_optimized=is_optimized)
        fidelity = compare(*runs, other.batches(model.inputs), names=("fp32", "int8"), sample_source="other")
        for output in fidelity.outputs:
            # Untrained networks on noise: 7-bit weights alone cost about 1 % of the signal's power at worst.
            assert output.sqnr_db is not None
            assert output.sqnr_db > 20, output
    assert (form.inputs, form.outputs) == (model.inputs, model.outputs)
    assert [record.candidate for record in form.fidelity[-2:]] == ["int8 as written", "int8 on integer kernels"]


def test_opset_17_is_quantized_as_18_is(tmp_path):
    """Which axes are reduced was an attribute until 17: what the calibration adds to a graph must speak its opset."""
    weights = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    tables = []
    for opset in (17, 18):
        folder = tmp_path / str(opset)
        folder.mkdir()
        nodes = [
            helper.make_node("Conv", ["x", "w"], ["a"], name="first"),
            helper.make_node("Relu", ["a"], ["b"], name="clamp"),
            helper.make_node("Conv", ["b", "v"], ["y"], name="second"),
        ]
        constants = {"w": weights, "v": weights[:, :1].repeat(4, 1)}
        sizes = {"x": [1, 3, 8, 8]}, {"y": [1, 4, 4, 4]}
        model, samples = from_onnx(nodes, *sizes, constants, folder, opset=opset)
        model = equalize(model, samples, folder / "equalized.onnx")
        tables.append(quantize(model, samples, X86, QuantizationPolicy()))
    assert tables[0].nodes == ("first", "second")
    assert (tables[0].weights, tables[0].bias_deltas) == (tables[1].weights, tables[1].bias_deltas)


def test_weights_and_biases_are_integers_in_the_file(tmp_path, canonical):
    model, samples = canonical("residual")
    form = emit(model, quantize(model, samples, X86), X86, samples, tmp_path / "q.onnx").model
    seen = view(read_graph(Path(form.path)).graph)
    weights = {name: value for name, value in seen.constants.items() if value.dtype == np.int8 and value.ndim > 1}
    assert len(weights) == 5
    assert max(np.abs(value.astype(int)).max() for value in weights.values()) == 63
    assert not [name for name, value in seen.constants.items() if value.dtype == np.float32 and value.ndim > 1]
    biases = [value for name, value in seen.constants.items() if value.dtype == np.int32 and "integers" in name]
    assert len(biases) == 5
    assert form.compression.parameters == model.compression.parameters


@pytest.mark.parametrize("rules", [VNNI, ARM], ids=["vnni", "arm"])
def test_every_layer_is_fused_into_an_integer_operator(tmp_path, canonical, rules):
    model, samples = canonical("residual")
    form = emit(model, quantize(model, samples, rules), rules, samples, tmp_path / "q.onnx").model
    report = BACKEND.inspect(Path(form.path))
    assert report.float_islands == ()
    assert "Clip" not in report.operators
    kinds = Counter(label.split()[0] for label in report.quantized)
    assert kinds == {"QLinearConv": 4, "QLinearAdd": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1}


def test_tensor_that_is_output_and_consumed_is_both(tmp_path, canonical):
    model, samples = canonical("residual_with_taps")
    form = emit(model, quantize(model, samples, VNNI), VNNI, samples, tmp_path / "q.onnx").model
    batch = samples.batch(0, 2)
    answer = Runner(Path(form.path))(batch)
    assert set(answer) == {"logits", "stem"}
    # What is handed out is what the rest of the network reads: values of one 8-bit grid.
    assert len(np.unique(answer["stem"])) <= 256
    assert BACKEND.inspect(Path(form.path)).float_islands == ()


def test_batch_stays_dynamic(tmp_path, canonical):
    model, samples = canonical("residual")
    form = emit(model, quantize(model, samples, X86), X86, samples, tmp_path / "q.onnx").model
    run = Runner(Path(form.path))
    whole = run(samples.batch(0, 7))["output"]
    single = np.concatenate([run(samples.batch(index, index + 1))["output"] for index in range(7)])
    np.testing.assert_allclose(whole, single, atol=1e-5)


def test_both_inputs_of_a_residual_sum_are_quantized(canonical):
    model, samples = canonical("residual")
    table = quantize(model, samples, X86)
    graph = read_graph(Path(model.path)).graph
    sums = [node for node in graph.node if node.op_type == "Add"]
    assert sums
    for node in sums:
        assert node.name in table.nodes
        assert set(node.input) <= set(table.activations)


def test_ranges_are_the_extremes_over_all_samples_and_contain_zero(canonical):
    model, samples = canonical("small_mlp")
    ranges = extremes(model, samples, ["vector"])
    values = samples.batch(0, samples.count)["vector"]
    assert ranges["vector"].low == pytest.approx(float(values.min()))
    assert ranges["vector"].high == pytest.approx(float(values.max()))
    relu = next(node.output[0] for node in read_graph(Path(model.path)).graph.node if node.op_type == "Relu")
    assert extremes(model, samples, [relu])[relu].low == 0.0


def test_mean_error_is_exact_at_padded_borders(tmp_path):
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    model, samples = from_onnx(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="conv", pads=[1, 1, 1, 1])],
        {"x": ["n", 3, 5, 5]},
        {"y": ["n", 4, 5, 5]},
        {"w": weight},
        tmp_path,
    )
    error = np.random.default_rng(1).standard_normal(weight.shape).astype(np.float32)
    node = next(node for node in read_graph(Path(model.path)).graph.node if node.op_type == "Conv")
    got = mean_errors(model, samples, {node.name: error})[node.name]
    images = torch.from_numpy(samples.batch(0, samples.count)["x"])
    expected = torch.conv2d(images, torch.from_numpy(error), padding=1).mean((0, 2, 3)).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_bias_correction_brings_int8_closer(canonical, tmp_path):
    # Inputs with a mean, as behind a Relu: there rounding errors of weights add up instead of cancelling out.
    rng = np.random.default_rng(0)
    weights = {f"w{index}": rng.standard_normal((64, 64)).astype(np.float32) / 8 for index in range(3)}
    nodes = []
    for index in range(3):
        nodes.append(helper.make_node("Gemm", [f"a{index}", f"w{index}"], [f"g{index}"], transB=1, name=f"gemm{index}"))
        nodes.append(helper.make_node("Relu", [f"g{index}"], [f"a{index + 1}"]))
    model, samples = from_onnx(nodes, {"a0": ["n", 64]}, {"a3": ["n", 64]}, weights, tmp_path, count=64)
    table = quantize(model, samples, X86)
    corrected = emit(model, table, X86, samples, tmp_path / "with.onnx").model
    plain = emit(model, msgspec.structs.replace(table, bias_deltas={}), X86, samples, tmp_path / "without.onnx").model
    assert corrected.fidelity[-2].outputs[0].sqnr_db > plain.fidelity[-2].outputs[0].sqnr_db + 0.5


def test_shared_weights_are_stored_once(tmp_path):
    weight = np.random.default_rng(0).standard_normal((6, 6, 3, 3)).astype(np.float32) / 10
    model, samples = from_onnx(
        [
            helper.make_node("Conv", ["x", "w"], ["h"], name="one", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Conv", ["r", "w"], ["y"], name="two", pads=[1, 1, 1, 1]),
        ],
        {"x": ["n", 6, 5, 5]},
        {"y": ["n", 6, 5, 5]},
        {"w": weight},
        tmp_path,
    )
    form = emit(model, quantize(model, samples, X86), X86, samples, tmp_path / "q.onnx").model
    kept = [v for v in view(read_graph(Path(form.path)).graph).constants.values() if v.shape == weight.shape]
    assert [value.dtype for value in kept] == [np.int8]
    assert form.fidelity[-2].outputs[0].sqnr_db > 20


def test_moves_and_concatenation_stay_on_integers(tmp_path):
    rng = np.random.default_rng(0)
    convolution = {"w": rng.standard_normal((4, 3, 3, 3)).astype(np.float32)}
    linear = {"v": rng.standard_normal((2, 7 * 4)).astype(np.float32), "shape": np.array([0, -1])}
    model, samples = from_onnx(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("Concat", ["r", "x"], ["t"], axis=1),
            helper.make_node("MaxPool", ["t"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
            helper.make_node("Reshape", ["p", "shape"], ["f"]),
            helper.make_node("Gemm", ["f", "v"], ["y"], transB=1),
        ],
        {"x": ["n", 3, 4, 4]},
        {"y": ["n", 2]},
        convolution | linear,
        tmp_path,
    )
    table = quantize(model, samples, VNNI)
    form = emit(model, table, VNNI, samples, tmp_path / "q.onnx").model
    assert table.activations["t"] == table.activations["p"] == table.activations["f"]
    operators = BACKEND.inspect(Path(form.path)).operators
    assert operators["QLinearConcat"] == operators["QGemm"] == operators["QLinearConv"] == 1
    assert operators.get("DequantizeLinear", 0) == 0
    assert form.fidelity[-2].outputs[0].sqnr_db > 25


def test_dead_channel_keeps_its_bias(tmp_path):
    weight = np.random.default_rng(0).standard_normal((3, 2, 1, 1)).astype(np.float32)
    weight[1] = 1e-12
    bias = np.array([0.5, 3.0, -0.5], np.float32)
    model, samples = from_onnx(
        [helper.make_node("Conv", ["x", "w", "b"], ["y"])],
        {"x": ["n", 2, 4, 4]},
        {"y": ["n", 3, 4, 4]},
        {"w": weight, "b": bias},
        tmp_path,
    )
    form = emit(model, quantize(model, samples, VNNI), VNNI, samples, tmp_path / "q.onnx").model
    channel = Runner(Path(form.path))(samples.batch(0, 3))["y"][:, 1]
    np.testing.assert_allclose(channel, 3.0, atol=0.05)


def test_model_without_weights_cannot_be_int8(tmp_path):
    model, samples = from_onnx([helper.make_node("Relu", ["x"], ["y"])], {"x": ["n", 4]}, {"y": ["n", 4]}, {}, tmp_path)
    with pytest.raises(ModelError, match="nothing can be quantized; build it as fp32"):
        quantize(model, samples, X86)


def test_tensor_that_becomes_infinite_is_named(tmp_path):
    model, samples = from_onnx(
        [helper.make_node("Exp", ["x"], ["big"]), helper.make_node("MatMul", ["big", "w"], ["y"])],
        {"x": ["n", 4]},
        {"y": ["n", 2]},
        {"w": np.ones((4, 2), np.float32)},
        tmp_path,
    )
    boiling = {"x": np.random.default_rng(0).uniform(900, 1000, (12, 4)).astype(np.float32)}
    samples = type(samples)(samples.name, "", 12, None, boiling, {})
    with pytest.raises(ModelError, match="tensor 'big' becomes NaN or infinite on samples 0 to 1"):
        quantize(model, samples, X86)


def test_table_of_another_model_is_refused(tmp_path, canonical):
    model, samples = canonical("small_mlp")
    table = quantize(model, samples, X86)
    other, other_samples = canonical("large_mlp")
    with pytest.raises(ModelError, match="made for another model"):
        emit(other, table, X86, other_samples, tmp_path / "q.onnx")


def test_optimiser_that_changes_the_meaning_is_caught(tmp_path, canonical, monkeypatch):
    model, samples = canonical("small_mlp")

    class Miscompiled(Runner):
        def __init__(self, source, *, is_optimized=True):
            super().__init__(source, is_optimized=is_optimized)
            self.is_broken = is_optimized and Path(source).name == "q.onnx"

        def __call__(self, inputs):
            answer = super().__call__(inputs)
            return {name: value[:, ::-1] for name, value in answer.items()} if self.is_broken else answer

    table = quantize(model, samples, X86)
    monkeypatch.setattr(emit_module, "Runner", Miscompiled)
    with pytest.raises(FidelityError, match="optimiser breaks the int8 form"):
        emit(model, table, X86, samples, tmp_path / "q.onnx")


def test_same_inputs_give_the_same_table_and_bytes(tmp_path, canonical):
    model, samples = canonical("residual")
    tables = [quantize(model, samples, X86) for _ in range(2)]
    assert tables[0] == tables[1]
    forms = [emit(model, tables[0], X86, samples, tmp_path / f"{index}.onnx").model for index in range(2)]
    assert forms[0].sha256 == forms[1].sha256


def test_progress_is_told(canonical):
    model, samples = canonical("small_mlp")
    said = []
    quantize(model, samples, X86, progress=said.append)
    assert said[-1] == "measuring rounding errors: 24 of 24 samples"
