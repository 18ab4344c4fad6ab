"""The integer reference: ONNX's own cases, and real quantized networks in codes beside ONNX Runtime."""

import importlib
import platform
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.backend.test.case import node as onnx_cases  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from torch import nn  # noqa: E402

from edgedeploy.errors import FidelityError, ModelError, UsageError  # noqa: E402
from edgedeploy.prepare import integer  # noqa: E402
from edgedeploy.prepare.dataset import random_samples  # noqa: E402
from edgedeploy.prepare.graph import Runner  # noqa: E402
from edgedeploy.prepare.integer import IntegerReference, compare_codes, runtime_codes  # noqa: E402
from edgedeploy.records.model import TensorSpec  # noqa: E402
from edgedeploy.records.target import QuantizationRules  # noqa: E402

HERE = Path(__file__).parent
# Every case that onnx has for these operators; the files of all operators together take 20 s to import.
QUANTIZED = (
    "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger",
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear",
)  # fmt: skip
COMPUTED = (
    "Add", "AveragePool", "Clip", "Concat", "Conv", "Gemm", "GlobalAveragePool", "MatMul", "MaxPool", "Mul",
    "ReduceMean", "Relu", "Sub",
)  # fmt: skip
MOVED = (
    "Flatten", "Gather", "GlobalMaxPool", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip


def cases_of(*operators):
    """Return onnx's cases of one node of these operators."""
    for operator in operators:
        importlib.import_module(f"onnx.backend.test.case.node.{operator.lower()}")
    return [
        pytest.param(case, id=case.name.removeprefix("test_"))
        for case in onnx_cases._NodeTestCases
        if len(case.model.graph.node) == 1 and case.model.graph.node[0].op_type in operators
    ]


def as_arrays(values):
    return [numpy_helper.to_array(v) if isinstance(v, TensorProto) else np.asarray(v) for v in values]


@pytest.mark.parametrize("case", cases_of(*QUANTIZED, "MaxPool", "AveragePool"))
def test_onnx_specification_case(case):
    graph = case.model.graph
    for inputs, outputs in case.data_sets:
        given = dict(zip([value.name for value in graph.input], as_arrays(inputs), strict=True))
        got = IntegerReference(case.model).run(given)
        for value, expected in zip(graph.output, as_arrays(outputs), strict=True):
            answer = got.outputs[value.name]
            assert (answer.dtype, answer.shape) == (expected.dtype, expected.shape)
            if expected.dtype.kind in "iu":
                np.testing.assert_array_equal(answer, expected)
            else:
                np.testing.assert_allclose(
                    answer.astype(np.float64), expected.astype(np.float64), rtol=case.rtol, atol=case.atol
                )


def on_codes(model, rng):
    """Feed a model's float inputs through DequantizeLinear; return it, codes for it, and the floats they stand for."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    codes, reals = {}, {}
    for index, value in enumerate(made.graph.input):
        shape = [size.dim_value for size in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.elem_type != TensorProto.FLOAT or not shape:
            continue
        name, scale, zero = value.name, np.float32(rng.uniform(0.01, 0.1)), np.int8(rng.integers(-30, 30))
        codes[f"{name}/codes"] = rng.integers(-128, 128, shape).astype(np.int8)
        reals[name] = (codes[f"{name}/codes"].astype(np.float32) - zero) * scale
        made.graph.initializer.extend(
            [numpy_helper.from_array(scale, f"{name}/scale"), numpy_helper.from_array(zero, f"{name}/zero")]
        )
        made.graph.node.insert(
            index,
            helper.make_node("DequantizeLinear", [f"{name}/codes", f"{name}/scale", f"{name}/zero"], [name]),
        )
        value.name = f"{name}/codes"
        value.type.tensor_type.elem_type = TensorProto.INT8
    for opset in made.opset_import:
        opset.version = max(opset.version, 13)
    return made, codes, reals


def float_cases(*operators):
    """Return the cases that have a float tensor, less two on which onnx.reference takes seconds."""
    return [
        item
        for item in cases_of(*operators)
        if on_codes(item.values[0].model, np.random.default_rng(0))[1] and not item.id.endswith("pool_3d_default")
    ]


@pytest.mark.parametrize("case", float_cases(*COMPUTED, *MOVED))
def test_operator_on_codes_computes_what_onnx_does_on_their_floats(case, monkeypatch):
    made, codes, reals = on_codes(case.model, np.random.default_rng(0))
    node, settings = case.model.graph.node[0], {item.name for item in case.model.graph.node[0].attribute}
    in_float = []
    plain = integer._Float.__call__
    monkeypatch.setattr(integer._Float, "__call__", lambda self, given: in_float.append(given) or plain(self, given))
    names = [value.name for value in case.model.graph.input]
    others = dict(zip(names, as_arrays(case.data_sets[0][0]), strict=True))
    expected = ReferenceEvaluator(case.model).run(None, {**others, **reals})
    got = IntegerReference(made).run({**{k: v for k, v in others.items() if k not in reals}, **codes}).outputs
    for value, wanted in zip(case.model.graph.output, expected, strict=True):
        assert got[value.name].dtype == wanted.dtype
        scale = np.abs(wanted).max(initial=1)
        np.testing.assert_allclose(got[value.name], wanted, rtol=0, atol=1e-6 * scale)
    is_left_to_onnx = (
        (node.op_type == "Gemm" and settings & {"alpha", "beta"})
        or (node.op_type == "MatMul" and min(value.ndim for value in reals.values()) == 1)
        or (node.op_type == "MaxPool" and len(node.output) == 2)
        or (node.op_type == "ReduceMean" and not others.get("axes", np.ones(1)).size)
    )
    if node.op_type in COMPUTED:
        assert bool(in_float) == bool(is_left_to_onnx)
    else:  # moves are onnx.reference's, on integers
        assert all(given[0].dtype in (np.int64, np.float32) for given in in_float)


IMAGE = TensorSpec(name="image", dtype="float32", shape=("batch", 3, 8, 8))
VECTOR = TensorSpec(name="vector", dtype="float32", shape=("batch", 12))
# On both sides of the exporter's folding limits.
NETWORKS = {"residual": IMAGE, "large_mlp": VECTOR}
RULES = {
    "x86": QuantizationRules(activation_dtype="uint8", activation_symmetric=False, weight_bits=7),
    "vnni": QuantizationRules(activation_dtype="uint8", activation_symmetric=False),
    "arm": QuantizationRules(activation_dtype="int8", activation_symmetric=False),
    "symmetric": QuantizationRules(activation_dtype="int8", activation_symmetric=True),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a function from a network and rules to its Q/DQ file and a batch of 64, made once."""
    from edgedeploy.prepare.emission.emit import emit
    from edgedeploy.prepare.export import export
    from edgedeploy.prepare.load import load
    from edgedeploy.prepare.ptq.quantize import quantize
    from edgedeploy.prepare.simplify import simplify

    folder = tmp_path_factory.mktemp("written")
    made = {}

    def form_of(name, rules):
        spec = [NETWORKS[name]]
        samples = random_samples(spec, 64, 0)
        if name not in made:
            model = export(load(f"tiny_nets:{name}", None, base=HERE), spec, samples, folder / f"{name}.onnx")
            made[name] = simplify(model, samples, folder / f"{name}-simple.onnx")
        if (name, rules) not in made:
            table = quantize(made[name], samples, RULES[rules])
            made[name, rules] = folder / f"{name}-{rules}.onnx"
            emit(made[name], table, RULES[rules], samples, made[name, rules])
        return made[name, rules], samples.batch(0, 64)

    return form_of


class Attention(nn.Module):
    """One block of a transformer: its products of activations, Softmax, LayerNormalization and Gelu."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, tokens):
        batch, length, width = tokens.shape
        parts = self.qkv(self.norm(tokens)).reshape(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(query @ key.transpose(-2, -1) / (width // self.heads) ** 0.5, -1)
        mixed = (weights @ value).transpose(1, 2).reshape(batch, length, width)
        tokens = tokens + self.out(mixed)
        return tokens + self.down(nn.functional.gelu(self.up(tokens)))


@pytest.fixture(scope="module")
def attention(tmp_path_factory):
    """Return a function from a type of activations to an attention block as ONNX Runtime's quantizer writes it."""
    quantization = pytest.importorskip("onnxruntime.quantization", reason="onnxruntime is not installed")
    folder = tmp_path_factory.mktemp("attention")
    torch.manual_seed(0)
    tokens = torch.randn(8, 10, 32)
    torch.onnx.export(
        Attention().eval(),
        (tokens,),
        folder / "float.onnx",
        dynamo=True,
        opset_version=18,
        input_names=["tokens"],
        external_data=False,
        verbose=False,
    )
    batch = {"tokens": tokens.numpy()}

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.batches = iter([batch])

        def get_next(self):
            return next(self.batches, None)

    def form_of(activations):
        if activations == "dynamic":
            quantization.quantize_dynamic(
                folder / "float.onnx", folder / "dynamic.onnx", weight_type=quantization.QuantType.QInt8
            )
            return folder / "dynamic.onnx", batch
        quantization.quantize_static(
            folder / "float.onnx",
            folder / f"{activations}.onnx",
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.from_string(activations),
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
        )
        return folder / f"{activations}.onnx", batch

    return form_of


def differing(reference, candidate):
    return {item.tensor: item for item in compare_codes(reference, candidate) if item.differing}


@pytest.mark.parametrize("rules", list(RULES))
@pytest.mark.parametrize("name", list(NETWORKS))
def test_codes_are_those_of_exact_kernels(written, name, rules):
    path, batch = written(name, rules)
    engine = runtime_codes(path, batch, precise=True)
    answer = IntegerReference(path).run(batch, instead=engine)
    assert list(answer.codes) == list(engine)
    assert not answer.overflows
    # A sum that lies beside the middle between two codes goes where float32 puts it: seen once in 38,400.
    for item in differing(answer.codes, engine).values():
        assert item.max_lsb == 1
        assert item.differing_fraction < 1e-3, item
    assert sum(codes.size for codes in engine.values()) > 1000


def test_outputs_are_those_of_exact_kernels(written):
    path, batch = written("residual", "vnni")
    engine = Runner(path)(batch)
    outputs = IntegerReference(path).run(batch).outputs
    for name, values in engine.items():
        assert outputs[name].dtype == values.dtype
        # All codes agree, so that the head's sums do.
        np.testing.assert_allclose(outputs[name], values, rtol=1e-6, atol=1e-6 * np.abs(values).max())


def has_vnni():
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "vnni" in flags.read_text()


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or has_vnni(), reason="only x86 without VNNI adds pairs in 16 bits"
)
def test_default_kernels_saturate_on_x86_without_vnni_and_the_reference_does_not(written):
    path, batch = written("large_mlp", "vnni")
    reference = IntegerReference(path).run(batch).codes
    saturated = differing(reference, runtime_codes(path, batch, precise=False))
    exact = differing(reference, runtime_codes(path, batch, precise=True))
    assert max(item.max_lsb for item in saturated.values()) > 10
    assert all(item.max_lsb <= 1 for item in exact.values())


@pytest.mark.parametrize("activations", ["QUInt8", "QInt8"])
def test_attention_block_differs_from_the_runtime_only_where_that_approximates(attention, activations):
    path, batch = attention(activations)
    engine = runtime_codes(path, batch, precise=True)
    got = differing(IntegerReference(path).run(batch, instead=engine).codes, engine)
    # Products of activations, LayerNormalization, Erf and sums agree in each code; ONNX Runtime's QLinearSoftmax sums
    # rounded exponentials.
    assert len(engine) == 31
    assert [name.removesuffix("_QuantizeLinear_Output") for name in got] == ["softmax"]
    assert got["softmax_QuantizeLinear_Output"].max_lsb == 1


def test_codes_of_activations_quantized_anew_in_each_inference_are_the_runtimes(attention):
    path, batch = attention("dynamic")
    engine = runtime_codes(path, batch, precise=True)
    assert len(engine) == 4
    assert differing(IntegerReference(path).run(batch, instead=engine).codes, engine) == {}


FLOAT, INT8, UINT8, INT32 = TensorProto.FLOAT, TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32
# Scales of few bits: float32 computes such graphs exactly, so that their codes can be demanded, ties included.
GRID = {"scale": np.float32(0.125), "zero": np.int8(3), "one": np.float32(1), "nothing": np.int8(0)}


def tiny(nodes, constants, inputs, outputs):
    """Return a graph written by hand: nodes as (operator, inputs, output, attributes)."""
    graph = helper.make_graph(
        [helper.make_node(kind, read, [made], name=made, **more) for kind, read, made, more in nodes],
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (GRID | constants).items()],
    )
    # onnx.reference has no older DequantizeLinear.
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def chain(middle, constants, shape):
    """Return a graph that quantizes `x`, computes `middle` on it from "real" to "made", and quantizes again."""
    return tiny(
        [
            ("QuantizeLinear", ["x", "scale", "zero"], "codes", {}),
            ("DequantizeLinear", ["codes", "scale", "zero"], "real", {}),
            *middle,
            ("QuantizeLinear", ["made", "out/scale", "out/zero"], "stored", {}),
            ("DequantizeLinear", ["stored", "out/scale", "out/zero"], "y", {}),
        ],
        {"out/scale": np.float32(0.25), "out/zero": np.int8(-5)} | constants,
        {"x": (FLOAT, shape)},
        {"y": FLOAT},
    )


def as_floats(model, batch):
    """Compute a Q/DQ graph in float as it is written; return its codes."""
    written = onnx.ModelProto()
    written.CopyFrom(model)
    written.graph.output.append(helper.make_tensor_value_info("stored", INT8, None))
    return ReferenceEvaluator(written).run(["stored"], batch)[0]


WEIGHT = {
    "w/codes": np.random.default_rng(0).integers(-127, 128, (6, 5)).astype(np.int8),
    "w/scale": np.arange(1, 7, dtype=np.float32) / 512,
    "w/zero": np.zeros(6, np.int8),
}
WEIGHT_NODE = ("DequantizeLinear", ["w/codes", "w/scale", "w/zero"], "w", {"axis": 0})


@pytest.mark.parametrize(
    "middle",
    [
        [WEIGHT_NODE, ("Transpose", ["w"], "wt", {"perm": [1, 0]}), ("MatMul", ["real", "wt"], "made", {})],
        [WEIGHT_NODE, ("Gemm", ["real", "w", "b"], "made", {"transB": 1})],
        [WEIGHT_NODE, ("Gemm", ["real", "w"], "sum", {"transB": 1}), ("Add", ["sum", "b"], "made", {})],
        [
            WEIGHT_NODE,
            ("Gemm", ["real", "w", "b"], "sum", {"transB": 1}),
            ("Clip", ["sum", "low", "high"], "made", {}),
        ],
        [("Relu", ["real"], "r", {}), ("Mul", ["r", "real"], "p", {}), ("Concat", ["p", "real"], "made", {"axis": 1})],
        [("Concat", ["real", "real"], "t", {"axis": 1}), ("Pad", ["t", "pads", "fill"], "made", {})],
        [("Sub", ["real", "row"], "made", {})],
        [("ReduceMean", ["real", "axes"], "m", {"keepdims": 0}), ("Unsqueeze", ["m", "axes"], "made", {})],
        [("Sigmoid", ["real"], "made", {})],
    ],
    ids=["transposed", "float-bias", "late-bias", "clip", "mul-concat", "concat-pad", "sub", "mean", "sigmoid"],
)
def test_graph_written_by_hand_gives_the_codes_of_its_float_form(middle):
    constants = WEIGHT | {
        "b": np.arange(-3, 3, dtype=np.float32) * 0.875,
        "low": np.float32(-0.77),
        "high": np.float32(1.13),
        "row": np.linspace(-1, 1, 5, dtype=np.float32),
        "pads": np.asarray([0, 1, 0, 2]),
        "fill": np.float32(0),
        "axes": np.asarray([1]),
    }
    model = chain(middle, constants, ["n", 5])
    batch = {"x": np.random.default_rng(1).uniform(-13, 13, (40, 5)).astype(np.float32)}
    codes = IntegerReference(model).run(batch).codes["stored"]
    assert len(np.unique(codes)) > 3
    np.testing.assert_array_equal(codes, as_floats(model, batch))


def test_bias_on_the_accumulators_grid_is_added_in_whole_numbers():
    bias = {"b/codes": np.asarray([1], np.int32), "b/scale": np.float32(0.125), "b/zero": np.int32(0)}
    model = chain(
        [
            ("DequantizeLinear", ["w/codes", "one", "nothing"], "w", {}),
            ("DequantizeLinear", ["b/codes", "b/scale", "b/zero"], "b", {}),
            ("Gemm", ["real", "w", "b"], "made", {}),
        ],
        bias | {"w/codes": np.full((3, 1), 127, np.int8), "out/zero": np.int8(0)},
        ["n", 3],
    )
    batch = {"x": np.asarray([[0.125, 0, 0], [0.125, -0.125, 0]], np.float32)}
    # 127 + 1 is 64 steps of twice the grid; 0 + 1 is half a step, which goes to the even code.
    assert IntegerReference(model).run(batch).codes["stored"].tolist() == [[64], [0]]


def test_accumulator_that_overflows_wraps_and_is_reported():
    depth = 70_000
    model = tiny(
        [("MatMulInteger", ["a", "b"], "y", {})],
        {"b": np.full((depth, 1), 255, np.uint8)},
        {"a": (UINT8, [1, depth])},
        {"y": INT32},
    )
    answer = IntegerReference(model).run({"a": np.full((1, depth), 255, np.uint8)})
    assert answer.outputs["y"].tolist() == [[255 * 255 * depth - 2**32]]
    assert answer.overflows == {"y": 1}


def test_codes_of_another_engine_go_on_in_place_of_ours():
    model = chain([("Relu", ["real"], "made", {})], {}, ["n", 2])
    batch = {"x": np.asarray([[1.0, 2.0]], np.float32)}
    other = {"codes": np.asarray([[43, 3]], np.int8)}
    answer = IntegerReference(model).run(batch, instead=other)
    assert answer.codes["codes"].tolist() == [[11, 19]]
    assert answer.codes["stored"].tolist() == [[15, -5]]  # 5.0 and 0.0 in steps of 0.25
    assert answer.outputs["y"].tolist() == [[5.0, 0.0]]


@pytest.mark.parametrize("arithmetic", ["float32", "fixed-point"])
def test_other_requantization_stays_within_one_code(arithmetic):
    middle = [WEIGHT_NODE, ("Gemm", ["real", "w"], "made", {"transB": 1})]
    model = chain(middle, WEIGHT, ["n", 5])
    batch = {"x": np.random.default_rng(1).uniform(-13, 13, (500, 5)).astype(np.float32)}
    exact = IntegerReference(model).run(batch).codes
    got = differing(exact, IntegerReference(model, arithmetic=arithmetic).run(batch).codes)
    assert all(item.max_lsb == 1 and item.differing_fraction < 0.02 for item in got.values())


def test_differences_are_counted_in_codes():
    expected = {"a": np.asarray([[0, 255], [7, 9]], np.uint8), "b": np.zeros((0, 3), np.int8)}
    actual = {"b": np.zeros((0, 3), np.int8), "a": np.asarray([[255, 255], [7, 8]], np.uint8), "c": np.zeros(1)}
    first, second = compare_codes(expected, actual)
    assert (first.tensor, first.elements, first.differing, first.max_lsb) == ("a", 4, 2, 255)
    assert first.differing_fraction == 0.5
    assert (second.elements, second.differing_fraction, second.max_lsb) == (0, 0.0, 0)


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        ({}, "gives no codes for a"),
        ({"a": np.zeros(3, np.int8)}, "are int8 .* and the reference has uint8"),
        ({"a": np.zeros((3, 1), np.uint8)}, "not the same graph"),
    ],
)
def test_codes_that_cannot_be_compared_are_named(candidate, words):
    with pytest.raises(FidelityError, match=words):
        compare_codes({"a": np.zeros(3, np.uint8)}, candidate)


def test_what_the_reference_cannot_compute_is_named():
    foreign = tiny([("QLinearAdd", ["x"], "y", {"domain": "com.microsoft"})], {}, {"x": (FLOAT, [1])}, {"y": FLOAT})
    with pytest.raises(ModelError, match=r"'y' is a com\.microsoft\.QLinearAdd, which .* does not know"):
        IntegerReference(foreign)
    wrong = tiny([("Reshape", ["x", "to"], "y", {})], {"to": np.asarray([7])}, {"x": (FLOAT, [1])}, {"y": FLOAT})
    with pytest.raises(ModelError, match=r"'y' \(Reshape\) cannot be computed by onnx\.reference: ValueError"):
        IntegerReference(wrong).run({"x": np.zeros(2, np.float32)})
    branch = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "b", [], [onnx.ValueInfoProto(name="z")])
    forked = tiny(
        [("If", ["c"], "y", {"then_branch": branch, "else_branch": branch})],
        {},
        {"x": (FLOAT, [1]), "c": (TensorProto.BOOL, [])},
        {"y": FLOAT},
    )
    with pytest.raises(ModelError, match=r"'y' \(If\) holds a graph of its own"):
        IntegerReference(forked)


def test_bad_inputs_are_named():
    model = chain([("Relu", ["real"], "made", {})], {}, ["n", 2]).SerializeToString()
    reference = IntegerReference(model)
    with pytest.raises(UsageError, match="has the inputs x, and image were given"):
        reference.run({"image": np.zeros((1, 2), np.float32)})
    with pytest.raises(ModelError, match="NaN is to be quantized by node 'codes'"):
        reference.run({"x": np.full((1, 2), np.nan, np.float32)})
    with pytest.raises(ModelError, match="ONNX Runtime cannot give the codes"):
        runtime_codes(model, {"image": np.zeros((1, 2), np.float32)}, precise=True)
