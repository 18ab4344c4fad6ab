"""The two graphs for a TensorRT builder: what they compute, in which types, what is refused."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from edgedeploy.backends.trt_forms import engine_forms  # noqa: E402
from edgedeploy.backends.trt_profiles import parse_axes  # noqa: E402
from edgedeploy.backends.trt_proof import disagreement  # noqa: E402
from edgedeploy.errors import CompileError, UsageError  # noqa: E402
from edgedeploy.prepare.count.compression import compression_report  # noqa: E402
from edgedeploy.prepare.dataset import random_samples  # noqa: E402
from edgedeploy.prepare.emission.emit import emit, shorten  # noqa: E402
from edgedeploy.prepare.graph import specs_of  # noqa: E402
from edgedeploy.prepare.half_range import beyond_half  # noqa: E402
from edgedeploy.prepare.ptq.quantize import quantize  # noqa: E402
from edgedeploy.records.model import Model, TensorSpec  # noqa: E402
from edgedeploy.records.target import load_target  # noqa: E402
from edgedeploy.storage import sha256_file  # noqa: E402

RULES = load_target("jetson-orin", machine="aarch64", isa=()).quantization["tensorrt"]
BATCH = {"batch": (1, 2, 8)}
FLOAT, HALF, INT8 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8
# eps of float16 is 2^-11; ten layers of it, as a part of the largest answer. Seen: 1.4e-4 to 3.6e-4.
HALF_NOISE = 2e-3
# One code of one tensor in 127, where rounding in float16 falls on the other side. Seen: 0 to 1.5e-2.
OTHER_CODES = 4e-2


class Layers:
    """Writes a network node by node, with random weights."""

    def __init__(self):
        self.nodes, self.constants, self._random = [], {}, np.random.default_rng(0)

    def then(self, operator, *inputs, **settings):
        count = len(self.nodes)
        name = f"{operator.lower()}{count}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=f"node_{name}", **settings))
        return name

    def weights(self, *shape, scale=None):
        value = self._random.standard_normal(shape) * (scale or 1 / np.sqrt(max(np.prod(shape[1:]), 1)))
        name = f"weights{len(self.constants)}"
        self.constants[name] = value.astype(np.float32)
        return name

    def conv(self, source, before, after, size=3, groups=1, scale=None):
        inputs = [self.weights(after, before // groups, size, size, scale=scale), self.weights(after, scale=0.1)]
        return self.then("Conv", source, *inputs, group=groups, pads=[size // 2] * 4)

    def linear(self, source, before, after):
        added = self.then("MatMul", source, self.weights(before, after, scale=before**-0.5))
        return self.then("Add", added, self.weights(after, scale=0.1))

    def head(self, source, before):
        flat = self.then("Flatten", self.then("GlobalAveragePool", source))
        return self.then("Gemm", flat, self.weights(4, before), self.weights(4), transB=1)


def residual(net):
    x = net.then("MaxPool", net.then("Relu", net.conv("image", 3, 8)), kernel_shape=[2, 2], strides=[2, 2])
    for before, after in ((8, 8), (8, 12)):
        inner = net.conv(net.then("Relu", net.conv(x, before, after)), after, after)
        shortcut = x if before == after else net.conv(x, before, after, 1)
        x = net.then("Relu", net.then("Add", inner, shortcut))
    return net.head(x, 12)


def mobile(net):
    """Write depthwise convolutions, HardSwish, ReLU6 and a squeeze-and-excitation branch."""
    net.constants |= {"zero": np.float32(0), "six": np.float32(6)}
    stem = net.then("HardSwish", net.conv("image", 3, 8))
    inner = net.conv(net.then("Clip", net.conv(stem, 8, 16, 1), "zero", "six"), 16, 16, groups=16)
    gate = net.then("HardSigmoid", net.conv(net.then("GlobalAveragePool", inner), 16, 16, 1))
    return net.head(net.then("Add", stem, net.conv(net.then("Mul", inner, gate), 16, 8, 1)), 8)


def encoder(net):
    """Write one layer of a transformer: attention with one head, GELU, two normalizations."""
    net.constants |= {"shrink": np.float32(0.25), "ones": np.ones(16, np.float32)}
    query, key, value = (net.linear("tokens", 16, 16) for _ in range(3))
    scores = net.then("MatMul", query, net.then("Transpose", key, perm=[0, 2, 1]))
    seen = net.then("MatMul", net.then("Softmax", net.then("Mul", scores, "shrink")), value)
    x = net.then("LayerNormalization", net.then("Add", "tokens", net.linear(seen, 16, 16)), "ones", net.weights(16))
    inner = net.linear(net.then("Gelu", net.linear(x, 16, 24)), 24, 16)
    return net.linear(net.then("LayerNormalization", net.then("Add", x, inner), "ones"), 16, 4)


def large(net):
    """Write convolutions between which values reach 1e5, and come back."""
    net.constants["back"] = np.float32(1e-5)
    grown = net.then("Relu", net.conv("image", 3, 8, scale=3e4))
    return net.head(net.then("Mul", net.conv(grown, 8, 8), "back"), 8)


IMAGE = TensorSpec(name="image", dtype="float32", shape=("batch", 3, 10, 10))
TOKENS = TensorSpec(name="tokens", dtype="float32", shape=("batch", 5, 16))
NETS = {"residual": (residual, IMAGE), "mobile": (mobile, IMAGE), "encoder": (encoder, TOKENS), "large": (large, IMAGE)}


class Net:
    """A canonical model, its forms by precision, made once, and what to feed it."""

    def __init__(self, name, folder):
        write, spec = NETS[name]
        net = Layers()
        output = write(net)
        made_of = made(net.nodes, net.constants, opset=20, inputs=((spec.name, FLOAT, spec.shape),), outputs=(output,))
        path = saved(made_of, folder)
        self.folder, self.samples = folder, random_samples([spec], 16, 0)
        self.model = Model(
            path=str(path),
            sha256=sha256_file(path),
            source=name,
            opset=20,
            inputs=(spec,),
            outputs=specs_of(made_of.graph.output),
            compression=compression_report(path),
        )
        self.beyond = beyond_half(self.model, self.samples)
        self.feeds = [self.samples.batch(start, start + 2) for start in (0, 2)]
        self._made = {}

    def path(self, precision):
        if precision not in self._made:
            self._made[precision] = Path(self._formed(precision).path)
        return self._made[precision]

    def _formed(self, precision):
        if precision == "fp16":
            return shorten(self.model, "float16", self.folder / "short.onnx", self.samples).model
        if precision == "int8":
            table = quantize(self.model, self.samples, RULES)
            return emit(self.model, table, RULES, self.samples, self.folder / "int8.onnx", allow_change=True).model
        return self.model

    def forms(self, precision, float_type="float16", beyond=None):
        known = self.beyond if beyond is None else beyond
        return forms_of(self.path(precision), precision, float_type=float_type, beyond_half=known, axes=BATCH)


def forms_of(path, precision="fp32", *, float_type="float16", beyond_half=None, axes=None):
    return engine_forms(
        path, precision, float_type=float_type, beyond_half=beyond_half or {}, axes=axes or {}, backend="tensorrt"
    )


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    made = {}

    def net(name):
        if name not in made:
            made[name] = Net(name, tmp_path_factory.mktemp(name))
        return made[name]

    return net


def kinds(model):
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    found = {value.name: value.type.tensor_type.elem_type for value in [*inferred.input, *inferred.value_info]}
    return (
        found
        | {value.name: value.type.tensor_type.elem_type for value in inferred.output}
        | {item.name: item.data_type for item in model.graph.initializer}
    )


def operators(model):
    return [node.op_type for node in model.graph.node]


def interface(model):
    return [(value.name, value.type.tensor_type.elem_type) for value in (*model.graph.input, *model.graph.output)]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_both_forms_compute_what_the_model_does(nets, name, precision):
    net = nets(name)
    forms = net.forms(precision)
    typed = {"fp32": 0.0, "fp16": HALF_NOISE, "int8": OTHER_CODES}[precision]
    # The weak form spells out normalizations, which sums in another order.
    assert disagreement(forms.weak, net.path(precision), net.feeds) <= 1e-6
    assert disagreement(forms.typed, net.path(precision), net.feeds) <= typed


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_forms_are_what_the_oldest_parsers_take(nets, name, precision):
    net = nets(name)
    forms = net.forms(precision)
    canonical = onnx.load(net.model.path)
    for form in (forms.weak, forms.typed):
        onnx.checker.check_model(form, full_check=True)
        assert [(item.domain, item.version) for item in form.opset_import] == [("", 17)]
        assert interface(form) == interface(canonical)
        names = [node.name for node in form.graph.node]
        assert all(names)
        assert len(set(names)) == len(names)
    assert not {"LayerNormalization", "HardSwish", "Gelu"} & set(operators(forms.weak))
    floats = {kind for kind in kinds(forms.weak).values() if kind in (FLOAT, HALF, TensorProto.DOUBLE)}
    assert floats == {FLOAT}
    assert set(names_of(canonical)) <= set(names_of(forms.typed))


def names_of(model):
    return [node.name for node in model.graph.node]


@pytest.mark.parametrize("name", NETS)
def test_int8_form_needs_no_cast_between_pairs(nets, name):
    """A product on integers reads its DequantizeLinear itself, and a cast follows only where floats go on."""
    forms = nets(name).forms("int8")
    for form in (forms.weak, forms.typed):
        makers = {output: node for node in form.graph.node for output in node.output}
        types = kinds(form)
        products = [node for node in form.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
        assert {node.name for node in products} >= set(forms.int8_nodes)
        for node in products:
            from_pairs = [makers.get(item, node).op_type == "DequantizeLinear" for item in node.input[:2]]
            assert all(from_pairs) == (node.name in forms.int8_nodes)
        for node in form.graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                data, scale, point = (types[item] for item in node.input)
                stored = types[node.output[0]] if node.op_type == "QuantizeLinear" else data
                assert (scale, point, stored) == (FLOAT, INT8, INT8)
    assert forms.int8_nodes
    assert not set(forms.int8_nodes) & set(forms.float32_nodes)


def test_residual_network_is_quantized_throughout(nets):
    forms = nets("residual").forms("int8")
    products = [node.name for node in forms.typed.graph.node if node.op_type in ("Conv", "Gemm")]
    assert list(forms.int8_nodes) == products
    assert "Cast" not in operators(forms.typed)
    assert disagreement(forms.typed, nets("residual").path("int8"), nets("residual").feeds) == 0.0


def test_pairs_are_named_as_in_the_model_and_hold_its_scales(nets):
    net = nets("residual")
    forms = net.forms("int8")
    canonical, emitted = onnx.load(net.model.path), onnx.load(net.path("int8"))
    weights = {item.name for item in canonical.graph.initializer}
    tensors = {name for node in canonical.graph.node for name in (*node.input, *node.output)}
    assert set(forms.pairs) <= tensors
    assert "image" in forms.pairs
    written = {item.name: numpy_helper.to_array(item) for item in emitted.graph.initializer}
    for name, scales in forms.pairs.items():
        assert scales == tuple(written[f"{name}/scale"].reshape(-1).tolist())
    assert {len(forms.pairs[name]) for name in set(forms.pairs) & weights} == {4, 8, 12}
    assert all(len(forms.pairs[name]) == 1 for name in set(forms.pairs) - weights)
    pairs = [node for node in forms.typed.graph.node if node.op_type == "DequantizeLinear"]
    assert len(forms.pairs) == len(pairs)


def test_weak_form_rounds_float_weights_to_the_very_codes(nets):
    forms = nets("residual").forms("int8")
    stored = {item.name: numpy_helper.to_array(item) for item in forms.typed.graph.initializer}
    weak = {item.name: numpy_helper.to_array(item) for item in forms.weak.graph.initializer}
    weights = [
        node for node in forms.typed.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in stored
    ]
    assert len(weights) == len(forms.int8_nodes)
    makers = {node.output[0]: node for node in forms.weak.graph.node}
    for node in weights:
        rounding = makers[makers[node.output[0]].input[0]]
        assert rounding.op_type == "QuantizeLinear"
        graph = helper.make_graph(
            [rounding], "one", [], [helper.make_tensor_value_info(rounding.output[0], INT8, None)],
            [numpy_helper.from_array(weak[name], name) for name in rounding.input],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        codes = ReferenceEvaluator(model).run(None, {})[0]
        np.testing.assert_array_equal(codes, stored[node.input[0]])
        assert [item.i for item in rounding.attribute if item.name == "axis"] == [0]


@pytest.mark.parametrize("name", NETS)
def test_half_form_stores_and_computes_in_half_floats(nets, name):
    forms = nets(name).forms("fp16")
    types = kinds(forms.typed)
    readers = {}
    for node in forms.typed.graph.node:
        for item in node.input:
            readers.setdefault(item, []).append(node.name)
    for node in forms.typed.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.name not in forms.float32_nodes:
            assert {types[item] for item in (*node.input, *node.output)} == {HALF}
        if node.name in forms.float32_nodes:
            floats = {types[item] for item in (*node.input, *node.output)} & {FLOAT, HALF}
            assert floats == {FLOAT}


def test_values_beyond_half_pass_between_float32_nodes_unharmed(nets):
    net = nets("large")
    assert max(net.beyond.values()) > 1e5
    careless = net.forms("fp16", beyond={})
    assert disagreement(careless.typed, net.path("fp16"), net.feeds) == np.inf
    forms = net.forms("fp16")
    canonical = onnx.load(net.model.path)
    touching = {node.name for node in canonical.graph.node if set(net.beyond) & {*node.input, *node.output}}
    assert touching == set(forms.float32_nodes)
    assert all("reaches" in reason for reason in forms.float32_nodes.values())
    types = kinds(forms.typed)
    assert all(types[name] == FLOAT for name in net.beyond)
    casts = [node.input[0] for node in forms.typed.graph.node if node.op_type == "Cast"]
    assert not set(casts) & set(net.beyond)
    assert forms.notes == ()
    assert "computes on integers and its result reaches" in " ".join(net.forms("int8").notes)


def test_float32_engine_keeps_floats_as_they_are(nets):
    for precision in ("fp16", "int8"):
        forms = nets("mobile").forms(precision, "float32")
        assert forms.float32_nodes == {}
        assert HALF not in kinds(forms.typed).values()
        assert disagreement(forms.typed, nets("mobile").path(precision), nets("mobile").feeds) == 0.0


def test_sensitive_parts_of_a_normalization_are_named_for_both_forms(nets):
    forms = nets("encoder").forms("fp16")
    reasons = {
        forms.float32_nodes[node.name]: node for node in forms.weak.graph.node if node.name in forms.float32_nodes
    }
    assert {"Pow", "ReduceMean"} <= set(reasons)
    assert any("too small for float16" in reason for reason in reasons)
    assert "LayerNormalization" in operators(forms.typed)


# ---- graphs made by hand ------------------------------------------------------------------------------------------


def made(nodes, constants=None, *, opset=18, inputs=(("x", FLOAT, (2, 6, 4, 4)),), outputs=("y",)):
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info(name, kind, list(shape)) for name, kind, shape in inputs],
        [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    inferred = {item.name: item for item in onnx.shape_inference.infer_shapes(model).graph.output}
    for output in model.graph.output:
        output.CopyFrom(inferred[output.name])
        if not output.type.tensor_type.HasField("shape"):
            kind = output.type.tensor_type.elem_type or FLOAT
            output.CopyFrom(helper.make_tensor_value_info(output.name, kind, [None] * 4))
    return model


def saved(model, folder):
    path = Path(folder) / "made.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def feed(shape=(2, 6, 4, 4), seed=0):
    return {"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}


def node(operator, inputs, output="y", name="the_node", **settings):
    return helper.make_node(operator, inputs, [output] if isinstance(output, str) else output, name=name, **settings)


NEWER = {
    "ReduceMean over axes": (18, [node("ReduceMean", ["x", "axes"], keepdims=0)], {"axes": np.array([1, -1])}),
    "ReduceMax over all axes": (20, [node("ReduceMax", ["x"])], {}),
    "ReduceL2 over none": (18, [node("ReduceL2", ["x", "axes"], noop_with_empty_axes=1)], {"axes": np.array([], np.int64)}),
    "Split with a smaller rest": (
        18,
        [node("Concat", ["x", "x"], "wide", "widen", axis=3), node("Split", ["wide"], ["a", "b", "y"], axis=3, num_outputs=3)],
        {},
    ),
    "Pad of some axes": (
        19,
        [node("Pad", ["x", "pads", "", "axes"])],
        {"pads": np.array([1, 0, 2, 1]), "axes": np.array([3, 2])},
    ),
    "Resize of some axes by scales": (
        19,
        [node("Resize", ["x", "", "scales"], axes=[2, 3], mode="nearest", antialias=0)],
        {"scales": np.array([2, 2], np.float32)},
    ),
    "Resize of some axes to sizes": (
        18, [node("Resize", ["x", "", "", "sizes"], axes=[3, 2], mode="linear")], {"sizes": np.array([6, 8])},
    ),
    "GridSample": (
        20,
        [node("GridSample", ["x", "grid"], mode="linear", padding_mode="border")],
        {"grid": np.random.default_rng(1).uniform(-1, 1, (2, 3, 3, 2)).astype(np.float32)},
    ),
    "Gelu": (20, [node("Gelu", ["x"])], {}),
    "Gelu by tanh": (20, [node("Gelu", ["x"], approximate="tanh")], {}),
    "Mish": (18, [node("Mish", ["x"])], {}),
    "GroupNormalization per channel": (
        21,
        [node("GroupNormalization", ["x", "scale", "bias"], num_groups=3)],
        {"scale": np.arange(6, dtype=np.float32), "bias": np.ones(6, np.float32)},
    ),
    "AveragePool": (22, [node("AveragePool", ["x"], kernel_shape=[2, 2], dilations=[1, 1])], {}),
    "Cast": (21, [node("Cast", ["x"], "i", to=TensorProto.INT32, name="first"), node("Cast", ["i"], to=1)], {}),
    "RMSNormalization": (23, [node("RMSNormalization", ["x", "scale"])], {"scale": np.full(4, 2, np.float32)}),
}  # fmt: skip


@pytest.mark.parametrize("name", NEWER)
def test_newer_opsets_are_said_in_opset_17(tmp_path, name):
    opset, nodes, constants = NEWER[name]
    path = saved(made(nodes, constants, opset=opset), tmp_path)
    forms = forms_of(path)
    for form in (forms.weak, forms.typed):
        onnx.checker.check_model(form, full_check=True)
        assert form.opset_import[0].version == 17
        assert disagreement(form, path, [feed()]) <= 1e-6
    assert "the_node" in names_of(forms.typed)


@pytest.mark.parametrize(
    ("nodes", "constants", "opset", "said"),
    [
        ([node("Unique", ["x"])], {}, 18, r"'the_node' \(Unique\): no TensorRT parses.*outside of the model"),
        ([node("Det", ["x"])], {}, 18, r"\(Det\): no TensorRT parses"),
        ([node("FusedGelu", ["x"], domain="com.microsoft")], {}, 18, "belongs to com.microsoft"),
        ([node("MaxPool", ["x"], ["y", "i"], kernel_shape=[2, 2]), node("Identity", ["i"], "z", name="other")], {}, 18,
         "places of its maxima"),
        ([node("MaxPool", ["x"], kernel_shape=[2, 2], dilations=[2, 2])], {}, 18, "dilations"),
        ([node("ReduceMax", ["x", "axes"])], None, 18, "axes are computed in each inference"),
        ([node("Pad", ["x", "pads"], mode="wrap")], {"pads": np.array([0] * 3 + [1] + [0] * 4)}, 19, "wrap"),
        ([node("LayerNormalization", ["x", "scale"], ["h", "m"], name="norm"), node("Add", ["h", "m"])],
         {"scale": np.ones(4, np.float32)}, 18, r"'norm'.*mean or deviation 'm' is read"),
        ([node("Resize", ["x", "", "scales"], antialias=1, mode="linear")],
         {"scales": np.array([1, 1, 0.5, 0.5], np.float32)}, 18, "smooths before it shrinks"),
    ],
)  # fmt: skip
def test_what_no_parser_takes_is_refused_by_name(tmp_path, nodes, constants, opset, said):
    inputs = (("x", FLOAT, (2, 6, 4, 4)), *((("axes", TensorProto.INT64, (1,)),) if constants is None else ()))
    graph = helper.make_graph(
        nodes, "made",
        [helper.make_tensor_value_info(name, kind, list(shape)) for name, kind, shape in inputs],
        [helper.make_tensor_value_info("y", FLOAT, [None] * 4)],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )  # fmt: skip
    domains = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    path = saved(helper.make_model(graph, opset_imports=domains, ir_version=10), tmp_path)
    with pytest.raises(CompileError, match=said) as refused:
        forms_of(path)
    assert refused.value.hint
    assert refused.value.node


def test_operator_that_only_newer_versions_parse_is_noted(tmp_path):
    forms = forms_of(saved(made([node("Hardmax", ["x"])]), tmp_path))
    assert forms.notes == ("TensorRT 8.5 does not parse Hardmax ('the_node'); the engine needs a newer one",)


# ---- float types --------------------------------------------------------------------------------------------------


def half_forms(model, folder, **more):
    """Return the forms of a graph without weights, as an fp16 model has them."""
    return forms_of(saved(model, folder), "fp16", **more)


def test_constant_that_half_cannot_hold_keeps_its_reader_in_float32(tmp_path):
    nodes = [
        node("Add", ["x", "epsilon"], "a", "tiny"),
        node("Mul", ["a", "mask"], "b", "huge"),
        node("Mul", ["b", "back"], "c", "between"),
        node("Add", ["c", "plain"], "y", "ordinary"),
    ]
    constants = {"epsilon": 1e-6, "mask": -3e38, "back": -3e-38, "plain": -np.inf}
    model = made(nodes, {name: np.float32(value) for name, value in constants.items()})
    forms = half_forms(model, tmp_path)
    assert forms.float32_nodes.keys() == {"tiny", "huge", "between"}
    assert forms.float32_nodes["huge"] == "its constant 'mask' reaches 3e+38"
    assert "too small" in forms.float32_nodes["tiny"]
    assert disagreement(forms.typed, tmp_path / "made.onnx", [feed()]) <= HALF_NOISE


def test_cheap_node_between_float32_nodes_is_not_cast_to_and_fro(tmp_path):
    nodes = [
        node("Exp", ["x"], "a", "first"),
        node("Relu", ["a"], "b", "middle"),
        node("Log", ["b"], "y", "last"),
    ]
    forms = half_forms(made(nodes), tmp_path)
    assert forms.float32_nodes == {"first": "Exp", "last": "Log", "middle": "it stands between float32 nodes"}
    assert "Cast" not in operators(forms.typed)


def recurrent(operator, between, **settings):
    """Return a product, a node between, and a recurrent node that reads the sequence with the batch second."""
    sides = 2 if settings.get("direction") == "bidirectional" else 1
    gates = {"LSTM": 4, "GRU": 3}[operator]
    rng = np.random.default_rng(0)
    # TensorRT-RTX 1.7.1 takes minutes for a GRU of 4 values, and no second for these.
    shapes = {"w": (8, 8), "input": (sides, gates * 12, 8), "hidden": (sides, gates * 12, 12)}
    constants = {name: (rng.standard_normal(shape) / 3).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        node("MatMul", ["x", "w"], "a", "product"),
        node(between, ["a"], "b", "between"),
        node("Transpose", ["b"], "c", "transpose", perm=[1, 0, 2]),
        node(operator, ["c", "input", "hidden"], "y", "recurrent", hidden_size=12, **settings),
    ]
    return made(nodes, constants, inputs=(("x", FLOAT, (1, 6, 8)),))


@pytest.mark.parametrize(
    ("operator", "between", "direction", "single"),
    [
        ("LSTM", "Relu", "forward", {"between", "transpose", "recurrent"}),
        ("GRU", "Identity", "forward", {"product", "between", "transpose", "recurrent"}),
        ("LSTM", "Identity", "bidirectional", {"recurrent"}),
    ],
)
def test_sequence_for_a_recurrent_node_is_made_in_float32(tmp_path, operator, between, direction, single):
    forms = half_forms(recurrent(operator, between, direction=direction), tmp_path)
    assert forms.float32_nodes.keys() == single
    assert disagreement(forms.typed, tmp_path / "made.onnx", [feed((1, 6, 8))]) <= HALF_NOISE
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    assert isinstance(engine_of(trt, forms.typed, {}), int)


def test_body_reads_float32_and_stays_so(tmp_path):
    def branch(name, operator):
        result = [helper.make_tensor_value_info(f"{name}_out", FLOAT, None)]
        return helper.make_graph([node(operator, ["h"], f"{name}_out", name)], name, [], result)

    nodes = [
        node("Relu", ["x"], "h", "outside"),
        node("ReduceSum", ["x"], "sum", "total", keepdims=0),
        node("Greater", ["sum", "zero"], "which", "compare"),
        node("If", ["which"], "chosen", "choice", then_branch=branch("yes", "Sqrt"), else_branch=branch("no", "Neg")),
        node("Mul", ["chosen", "h"], "y", "after"),
    ]
    model = made(nodes, {"zero": np.float32(0)})
    forms = half_forms(model, tmp_path)
    onnx.checker.check_model(forms.typed, full_check=True)
    assert kinds(forms.typed)["h"] == HALF
    for seed in (0, 1, 2, 3):
        assert disagreement(forms.typed, tmp_path / "made.onnx", [feed(seed=seed)]) <= HALF_NOISE


def test_output_that_is_read_on_is_float32_outside_and_half_inside(tmp_path):
    nodes = [node("Sigmoid", ["x"], "y", "first"), node("Tanh", ["y"], "z", "second")]
    forms = half_forms(made(nodes, outputs=("y", "z")), tmp_path)
    assert interface(forms.typed) == [("x", FLOAT), ("y", FLOAT), ("z", FLOAT)]
    second = next(item for item in forms.typed.graph.node if item.name == "second")
    assert kinds(forms.typed)[second.input[0]] == HALF
    assert disagreement(forms.typed, tmp_path / "made.onnx", [feed()]) <= HALF_NOISE


def test_integers_are_cast_from_float32_where_that_is_what_there_is(tmp_path):
    """4097 is no half float: a cast to integers must not read the rounded copy that another reader asked for."""
    nodes = [
        node("Tanh", ["x"], "h", "reads_half"),
        node("Cast", ["x"], "i", "to_integer", to=TensorProto.INT32),
        node("Cast", ["i"], "z", "back", to=FLOAT),
        node("Identity", ["h"], "y", "out"),
    ]
    path = saved(made(nodes, outputs=("y", "z")), tmp_path)
    forms = forms_of(path, "fp16")
    values = {"x": np.full((2, 6, 4, 4), 4097, np.float32)}
    assert disagreement(forms.typed, path, [values]) <= HALF_NOISE


POINTWISE = ("Relu", "Sigmoid", "Exp", "Neg", "Softplus", "Identity", "Abs")
JOINING = ("Add", "Mul", "Sub", "Max")


@st.composite
def random_graphs(draw):
    """Return nodes on tensors of one shape, some read several times, and which tensors are said to be too large."""
    tensors, nodes = ["x"], []
    for index in range(draw(st.integers(1, 9))):
        operator = draw(st.sampled_from(POINTWISE + JOINING))
        count = 2 if operator in JOINING else 1
        sources = [draw(st.sampled_from([*tensors, *(["c"] if count == 2 else [])])) for _ in range(count)]
        # Values stay small, so that only types can go wrong.
        nodes.append(node(operator, sources, f"raw{index}", f"n{index}"))
        nodes.append(node("Tanh", [f"raw{index}"], f"t{index}", f"bound{index}"))
        tensors.append(f"t{index}")
    return nodes, draw(st.sets(st.sampled_from(tensors))), draw(st.sets(st.sampled_from(tensors[1:]), min_size=1))


@settings(max_examples=40, deadline=None)
@given(random_graphs())
def test_types_agree_at_every_edge_of_any_graph(tmp_path_factory, drawn):
    nodes, large, outputs = drawn
    folder = tmp_path_factory.mktemp("any")
    model = made(nodes, {"c": np.float32(0.5)}, inputs=(("x", FLOAT, (2, 3)),), outputs=tuple(sorted(outputs)))
    forms = half_forms(model, folder, beyond_half=dict.fromkeys(large, 7e4))
    onnx.checker.check_model(forms.typed, full_check=True)
    types = kinds(forms.typed)
    assert all(types[name] == FLOAT for name in large if name in types)
    assert disagreement(forms.typed, folder / "made.onnx", [feed((2, 3))]) <= 5e-3


# ---- Q/DQ that is not ours ----------------------------------------------------------------------------------------


def quantized(**changed):
    """Return a convolution between pairs with a float or int32 bias; `changed` replaces constants."""
    rng = np.random.default_rng(3)
    constants = {
        "s": np.float32(0.05), "z": np.int8(0), "w": rng.integers(-127, 128, (4, 6, 1, 1)).astype(np.int8),
        "ws": np.full(4, 0.01, np.float32), "wz": np.zeros(4, np.int8),
        "b": np.arange(4, dtype=np.int32), "bs": np.full(4, 0.0005, np.float32), "bz": np.zeros(4, np.int32),
    } | changed  # fmt: skip
    axis = changed.pop("axis", 0)
    constants.pop("axis", None)
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], "xq", "x/quantize"),
        node("DequantizeLinear", ["xq", "s", "z"], "xd", "x/dequantize"),
        node("DequantizeLinear", ["w", "ws", "wz"], "wd", "w/dequantize", axis=axis),
        node("DequantizeLinear", ["b", "bs", "bz"], "bd", "b/dequantize", axis=0),
        node("Conv", ["xd", "wd", "bd"], "h", "conv"),
        node("QuantizeLinear", ["h", "s", "z"], "hq", "y/quantize"),
        node("DequantizeLinear", ["hq", "s", "z"], "y", "y/dequantize"),
    ]
    return made(nodes, constants)


def test_int32_bias_becomes_a_float_one(tmp_path):
    path = saved(quantized(), tmp_path)
    forms = forms_of(path, "int8")
    assert forms.int8_nodes == ("conv",)
    bias = {item.name: numpy_helper.to_array(item) for item in forms.typed.graph.initializer}["bd"]
    np.testing.assert_array_equal(bias, np.arange(4, dtype=np.float32) * np.float32(0.0005))
    for form in (forms.weak, forms.typed):
        assert TensorProto.INT32 not in kinds(form).values()
        assert disagreement(form, path, [feed()]) == 0.0
    assert forms.pairs.keys() == {"xd", "wd", "y"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"z": np.int8(3)}, r"'x/quantize' \(QuantizeLinear\): its zero-point is 3"),
        ({"z": np.uint8(0)}, "it stores uint8"),
        ({"s": np.float16(0.05)}, "its scale is float16"),
        ({"s": np.full(6, 0.05, np.float32), "z": np.zeros(6, np.int8)}, "'x' has a scale for each channel"),
        ({"s": np.float32(0)}, "not above zero"),
        ({"wz": np.array([0, 5, 0, 0], np.int8)}, r"'w/dequantize'.*zero-point is 5"),
        ({"ws": np.full(6, 0.01, np.float32), "wz": np.zeros(6, np.int8), "axis": 1}, r"'conv'.*scales along axis 1"),
    ],
)
def test_other_quantization_is_refused_by_name(tmp_path, changed, said):
    opset = 19 if changed.get("s", np.float32(0)).dtype == np.float16 else 18
    model = quantized(**changed)
    model.opset_import[0].version = opset
    with pytest.raises(CompileError, match=said) as refused:
        forms_of(saved(model, tmp_path), "int8")
    assert "quantize the model again by this target's own rules" in refused.value.hint


def test_weights_that_multiply_floats_become_floats_of_the_same_values(tmp_path):
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (6, 5)).astype(np.int8)
    constants = {"w": codes, "s": np.full(5, 0.02, np.float32), "z": np.zeros(5, np.int8)}
    nodes = [node("DequantizeLinear", ["w", "s", "z"], "wd", "w/dequantize", axis=1), node("MatMul", ["x", "wd"])]
    path = saved(made(nodes, constants, inputs=(("x", FLOAT, (3, 6)),)), tmp_path)
    forms = forms_of(path, "int8", float_type="float32")
    assert (forms.int8_nodes, forms.pairs) == ((), {})
    assert operators(forms.typed) == operators(forms.weak) == ["MatMul"]
    assert "'wd' multiply float activations" in forms.notes[0]
    assert disagreement(forms.typed, path, [feed((3, 6))]) == 0.0


# ---- sizes --------------------------------------------------------------------------------------------------------


def dynamic(folder):
    """Return a model with three inputs that share an axis, one of whose axes has no name."""
    nodes = [node("Add", ["a", "b"], "h", "add"), node("Concat", ["h", "c"], "y", "concat", axis=1)]
    shapes = {"a": ("batch", "length"), "b": ("batch", "length"), "c": ("batch", None)}
    return saved(made(nodes, inputs=tuple((name, FLOAT, shape) for name, shape in shapes.items())), folder)


def test_one_range_serves_an_axis_of_several_inputs(tmp_path):
    forms = forms_of(dynamic(tmp_path), axes=parse_axes("batch=1:2:4, length=3:5:9, c_1=7"))
    both = {"min": [1, 3], "opt": [2, 5], "max": [4, 9]}
    assert forms.profiles == {"a": both, "b": both, "c": {"min": [1, 7], "opt": [2, 7], "max": [4, 7]}}
    shapes = [
        [size.dim_param or size.dim_value for size in item.type.tensor_type.shape.dim]
        for item in forms.weak.graph.input
    ]
    assert shapes == [["batch", "length"], ["batch", "length"], ["batch", 7]]


def test_axes_with_one_size_are_fixed_in_the_graph(tmp_path):
    forms = forms_of(dynamic(tmp_path), axes=parse_axes("batch=4,length=5,c_1=7"))
    assert forms.profiles == {}
    for form in (forms.weak, forms.typed):
        shapes = [[size.dim_value for size in item.type.tensor_type.shape.dim] for item in form.graph.input]
        assert shapes == [[4, 5], [4, 5], [4, 7]]


def test_axis_without_a_range_is_told_what_to_type(tmp_path):
    path = dynamic(tmp_path)
    with pytest.raises(CompileError, match="axes length, c_1 of a, b, c have no sizes") as refused:
        forms_of(path, axes=parse_axes("batch=1:2:4"))
    typed = refused.value.hint.split("-O axes=")[1].split()[0]
    assert typed == "batch=1:2:4,length=1:1:8,c_1=1:1:8"
    assert forms_of(path, axes=parse_axes(typed)).profiles["a"]["max"] == [4, 8]


def test_range_for_an_axis_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no dynamic axis 'lenght'; did you mean \"length\"\?"):
        forms_of(dynamic(tmp_path), axes=parse_axes("lenght=1:2:4"))


NAMES = st.text("abcdefgh_0123456789*+ ", min_size=1).map(str.strip).filter(bool)
RANGES = st.lists(st.integers(1, 10**6), min_size=3, max_size=3).map(sorted).map(tuple)


@given(st.dictionaries(NAMES, RANGES, max_size=4))
def test_axes_are_read_as_they_are_written(axes):
    text = ",".join(
        f"{name}={low}" if low == high else f"{name}={low}:{best}:{high}" for name, (low, best, high) in axes.items()
    )
    assert parse_axes(text) == axes


@pytest.mark.parametrize(
    "text", ["batch", "=1", "batch=", "batch=0", "batch=-1", "batch=1:2", "batch=1:2:3:4", "batch=3:2:4", "batch=1.5",
             "batch=1,", "batch=1,batch=2", "batch=²"]
)  # fmt: skip
def test_axes_that_cannot_be_meant_are_refused(text):
    with pytest.raises(UsageError, match="-O axes"):
        parse_axes(text)


# ---- the proof itself ---------------------------------------------------------------------------------------------


def test_disagreement_is_a_part_of_the_largest_answer(tmp_path):
    path = saved(made([node("Mul", ["x", "c"])], {"c": np.float32(2)}), tmp_path)
    other = made([node("Mul", ["x", "c"])], {"c": np.float32(2.02)})
    assert disagreement(other, path, [feed(), feed(seed=1)]) == pytest.approx(0.01, rel=1e-4)
    nothing = made([node("Mul", ["x", "c"])], {"c": np.float32(np.nan)})
    assert disagreement(nothing, path, [feed()]) == np.inf


# ---- a real TensorRT ----------------------------------------------------------------------------------------------


def engine_of(trt, model, profiles):
    """Parse and build a form for a GPU that need not be here; return the plan's size, or what was said instead."""
    said = []

    class Log(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)

        def log(self, severity, text):
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                said.append(text)

    log = Log()
    builder = trt.Builder(log)
    network, config = builder.create_network(0), builder.create_builder_config()
    if not trt.OnnxParser(network, log).parse(model.SerializeToString()):
        return said
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    for name, sizes in profiles.items():
        profile.set_shape(name, sizes["min"], sizes["opt"], sizes["max"])
    if profiles:
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    return said if plan is None else plan.nbytes


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_real_compiler_parses_and_builds_the_typed_form(nets, name, precision):
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    forms = nets(name).forms(precision)
    assert isinstance(engine_of(trt, forms.typed, forms.profiles), int)


def test_real_compiler_refuses_what_is_refused_here(tmp_path):
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    assert any("zero point" in text for text in engine_of(trt, quantized(z=np.int8(3)), {}))
