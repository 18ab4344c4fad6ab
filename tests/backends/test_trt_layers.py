"""What an engine consists of: inspectors of five versions and the log of TensorRT-RTX, read or refused, never crashed on."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedeploy.backends import trt_layers
from edgedeploy.backends.trt_layers import (
    engine_report,
    fates,
    kept_in_float32,
    layers_from_inspector,
    layers_from_rtx_log,
    not_on_integers,
    read_layers,
    write_layers,
)
from edgedeploy.errors import CompileError, DocumentError
from edgedeploy.records.artifact import Layer
from tests.backends.inspector_texts import DETAILED_10, DETAILED_11, DETAILED_85, NAMES_ONLY, OPEN_86, RTX_LOG

NODES = ("/c1/Conv", "/c2/Conv", "/fc/Gemm")
PAIRS = {"x": (0.02,), "r1": (0.03,), "r2": (0.04,), "f": (0.01,), "c1.weight": (0.1, 0.2)}


def by_node(layers, node):
    return [layer for layer in layers if node in layer.nodes]


# ---------------------------------------------------------------- each version


def test_names_alone_tell_nodes_and_no_precision():
    layers = layers_from_inspector(NAMES_ONLY)
    assert len(layers) == 6
    assert not any(layer.precision or layer.kind for layer in layers)
    assert layers[2].nodes == ("c2.weight", "c2.weight/quantize", "/c2/Conv", "/Add", "/r2/Relu")
    assert layers[3].nodes == ()
    assert layers[4].nodes == ("/gate/Sigmoid", "/gate/Mul")
    assert not_on_integers(layers, NODES) == dict.fromkeys(NODES, "")


def test_layers_of_8_5_are_known_by_their_names_and_their_integers():
    layers = layers_from_inspector(DETAILED_85)
    assert [(layer.kind, layer.precision, layer.output) for layer in layers] == [
        ("Reformat", "fp32", "int8"),
        ("CaskConvolution", "int8", "int8"),
        ("CaskConvolution", "int8", "int8"),
        ("PoolingV2", "int8", "fp16"),
        ("CaskGemmConvolution", "fp16", "fp32"),
    ]
    assert layers[1].format == "Row major Int8 format"
    assert layers[1].tactic.startswith("sm80_xmma_fprop")
    assert "r1/quantize" in layers[1].nodes
    assert "r1/dequantize" in layers[2].nodes
    assert not_on_integers(layers, NODES) == {"/fc/Gemm": "fp16"}
    assert fates(layers, PAIRS) == {
        "x": "kept", "r1": "kept", "r2": "kept", "f": "dropped", "c1.weight": "kept",
    }  # fmt: skip


def test_weights_and_kernel_names_tell_the_type_where_sizes_are_open():
    layers = layers_from_inspector(OPEN_86)
    assert [layer.precision for layer in layers] == ["int8", "fp16"]
    assert layers[0].nodes == ("c1.weight/dequantize", "/c1/Conv", "/r1/Relu")


@pytest.mark.parametrize("text", [DETAILED_10, DETAILED_11], ids=["10", "11"])
def test_layers_of_10_and_11_are_the_same_whether_type_and_format_are_one_word_or_two(text):
    layers = layers_from_inspector(text)
    assert [(layer.kind, layer.precision, layer.output) for layer in layers] == [
        ("kgen", "fp32", "int8"),
        ("conv", "int8", "int8"),
        ("fusion", "int8", "fp16"),
        ("kgen", "fp16", "fp16"),
        ("gemm", "fp16", "fp32"),
    ]
    assert layers[1].format == ("" if text == DETAILED_10 else "Row major linear format")
    assert fates(layers, PAIRS) == {
        "x": "kept", "r1": "kept", "r2": "folded", "f": "dropped", "c1.weight": "kept",
    }  # fmt: skip


def test_log_of_rtx_is_read_line_by_line():
    layers = layers_from_rtx_log(RTX_LOG.splitlines())
    assert [(layer.name, layer.kind, layer.precision, layer.output) for layer in layers] == [
        ("__myl_MulMinMaxRounCastConc_myl0_0", "kgen", "fp32", "int8"),
        ("/c1/Conv_myl0_1", "correlation", "int8", "fp32"),
        ("__myl_Move_myl0_6", "kgen", "int8", "int8"),
    ]
    assert layers[1].nodes == ("/c1/Conv", "x/dequantize", "c1.weight/dequantize")
    assert layers[1].format == "(NHWC) Channel major format"
    assert layers[2].format == "(Arbitrary) Format with stride order = [4,1,0,3,2]"
    assert layers[2].tactic == "__myl_Move_0xc47c"
    assert layers[2].nodes == ()
    assert fates(layers, {"x": (0.02,)}) == {"x": "kept"}


def test_log_without_a_table_has_no_layers_and_the_last_of_two_tables_counts():
    assert layers_from_rtx_log(["[I] Engine generation completed"]) == ()
    first = [line.replace("/c1/Conv", "/other/Conv") for line in RTX_LOG.splitlines()]
    assert layers_from_rtx_log([*first, *RTX_LOG.splitlines()]) == layers_from_rtx_log(RTX_LOG.splitlines())


# ---------------------------------------------------------------- what was asked for, and what is there


def test_layer_that_was_meant_to_be_int8_and_is_not_is_named():
    report = engine_report(layers_from_inspector(DETAILED_85), NODES, PAIRS, ["a note"])
    assert report.quantized == ("CaskConvolution /c1/Conv", "CaskConvolution /c2/Conv")
    assert report.float_islands == ("CaskGemmConvolution fc.weight",)
    assert report.notes[0] == "a note"
    assert "/fc/Gemm was meant to run on integers and computes in float (fp16)" in report.notes
    assert "f" not in report.scales
    assert report.scales["c1.weight"] == (0.1, 0.2)
    assert report.operators == {"CaskConvolution": 2, "CaskGemmConvolution": 1, "PoolingV2": 1, "Reformat": 1}


def test_scale_that_vanished_is_refused_on_demand_and_noted_otherwise():
    layers = layers_from_inspector(DETAILED_85)
    with pytest.raises(CompileError, match="this scale is not in the engine: f") as refused:
        engine_report(layers, NODES[:2], PAIRS, is_refused=True, backend="tensorrt_rtx")
    assert (refused.value.backend, refused.value.node) == ("tensorrt_rtx", "f/quantize")
    assert "lost_scales=note" in refused.value.hint
    assert "no kernel rounds f: its scale is lost" in engine_report(layers, NODES[:2], PAIRS).notes


def test_pair_that_stands_on_the_grid_of_another_is_not_lost():
    layers = layers_from_inspector(DETAILED_85)
    report = engine_report(layers, NODES[:2], {**PAIRS, "f": PAIRS["r2"]}, is_refused=True)
    assert not any("lost" in note for note in report.notes)


def test_what_is_not_known_is_said_and_not_refused():
    report = engine_report(layers_from_inspector(NAMES_ONLY), NODES, {}, is_refused=True)
    assert report.quantized == ()
    (note,) = report.notes
    assert "/c1/Conv, /c2/Conv, /fc/Gemm run on integers or in float is not known" in note


def test_kernel_that_multiplies_decides_not_those_that_round_before_or_add_after():
    layers = (
        Layer(name="round", kind="kgen", precision="int8", output="int8", nodes=("/c",)),
        Layer(name="product", kind="correlation", precision="fp16", output="fp16", nodes=("/c", "x/dequantize")),
    )
    assert not_on_integers(layers, ["/c"]) == {"/c": "fp16"}
    assert not_on_integers(layers[:1], ["/c"]) == {}
    assert not_on_integers((), ["/c"]) == {"/c": ""}


def test_product_inside_a_kernel_that_rounds_for_itself_is_not_known():
    nodes = ("/c1", "r/quantize", "/r", "r/dequantize", "/c2", "w/dequantize", "y/quantize")
    layers = (Layer(name="round and multiply", kind="kgen", precision="fp32", output="int8", nodes=nodes),)
    assert not_on_integers(layers, ["/c2"]) == {"/c2": ""}
    (note,) = engine_report(layers, ["/c2"], {"r": (0.1,)}, is_refused=True).notes
    assert "not known: they are fused into kernels that round for themselves" in note
    (float_note,) = engine_report((Layer(name="k", kind="kgen", precision="fp32", nodes=("/c2",)),), ["/c2"], {}).notes
    assert float_note == "/c2 was meant to run on integers and computes in float (fp32)"


def test_float_engine_has_no_islands():
    layers = layers_from_inspector(DETAILED_10)
    assert engine_report(layers, (), {}).float_islands == ()
    assert engine_report(layers, NODES, {}).float_islands == ("kgen /gap", "gemm /fc/Gemm")


def test_all_nodes_kept_in_float32_are_named_by_reason():
    (note,) = kept_in_float32({f"/n{index}": "Exp" for index in range(9)} | {"/big": "its output reaches 7.1e4"})
    assert note.startswith("10 nodes are kept in float32: /n0, /n1, ")
    assert all(f"/n{index}" in note for index in range(9))
    assert note.endswith(" (Exp); /big (its output reaches 7.1e4)")
    assert kept_in_float32({}) == ()


# ---------------------------------------------------------------- layers.json


def test_layers_beside_an_engine_are_read_again_and_bound_to_it(tmp_path):
    engine = tmp_path / "model.engine"
    engine.write_bytes(b"plan")
    report = engine_report(layers_from_inspector(DETAILED_10), NODES, PAIRS, ["a note"])
    write_layers(engine, report)
    first = (tmp_path / "layers.json").read_bytes()
    assert read_layers(engine) == report
    write_layers(engine, report)
    assert (tmp_path / "layers.json").read_bytes() == first
    engine.write_bytes(b"another plan")
    with pytest.raises(DocumentError, match="describes another engine"):
        read_layers(engine)


def test_missing_or_damaged_layers_are_a_sentence(tmp_path):
    engine = tmp_path / "model.engine"
    engine.write_bytes(b"plan")
    with pytest.raises(DocumentError, match=r"layers\.json is missing.*compile again"):
        read_layers(engine)
    for damage in (b"", b"{", b"[]", b"\xff\xfe", b'{"format": "edgedeploy.layers/9"}'):
        (tmp_path / "layers.json").write_bytes(damage)
        with pytest.raises(DocumentError):
            read_layers(engine)


# ---------------------------------------------------------------- what a device may send

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
WORDS = (
    "Name",
    "LayerType",
    "Inputs",
    "Outputs",
    "TacticName",
    "Metadata",
    "Weights",
    "Type",
    "Format/Datatype",
    "Datatype",
)
ENTRIES = st.dictionaries(st.sampled_from(WORDS), JSON | st.lists(st.dictionaries(st.sampled_from(WORDS), JSON)))


def read_or_refused(read, given):
    try:
        return read(given)
    except DocumentError as error:
        assert "build" in str(error) or "install" in str(error)
        return None


@settings(max_examples=100, deadline=None)
@given(JSON | st.fixed_dictionaries({"Layers": st.lists(ENTRIES | st.text() | JSON)}))
def test_any_json_is_read_or_refused_with_a_sentence(value):
    layers = read_or_refused(layers_from_inspector, json.dumps(value))
    if layers is not None:
        assert len(layers) == len(value["Layers"])
        engine_report(layers, NODES, PAIRS)


@settings(max_examples=100, deadline=None)
@given(st.text() | st.binary().map(lambda data: data.decode("latin-1")))
def test_garbage_is_refused_with_a_sentence(text):
    assert read_or_refused(layers_from_inspector, text) is None


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(DETAILED_85)), st.integers(0, len(RTX_LOG)))
def test_truncated_text_is_read_or_refused_with_a_sentence(end, log_end):
    if end < len(DETAILED_85):
        assert read_or_refused(layers_from_inspector, DETAILED_85[:end]) is None
    read_or_refused(layers_from_rtx_log, RTX_LOG[:log_end].splitlines())


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_any_words_in_the_log_are_read_or_refused(name, metadata):
    line = f"Name: {name}, LayerType: kgen, Inputs: [{metadata}], Outputs: [], TacticName: t, StreamId: 0, Metadata: {metadata}"
    read_or_refused(layers_from_rtx_log, ["[V] Layers:", line])


def test_what_is_nested_too_deeply_or_too_large_is_refused(monkeypatch):
    with pytest.raises(DocumentError, match="not valid JSON"):
        layers_from_inspector("[" * 200_000)
    with pytest.raises(DocumentError, match="not valid JSON"):
        layers_from_inspector("9" * 5_000)
    monkeypatch.setattr(trt_layers, "_MOST_LAYERS", 2)
    with pytest.raises(DocumentError, match="has 3 layers, and 2 are read"):
        layers_from_inspector('{"Layers": ["a", "b", "c"]}')
    monkeypatch.setattr(trt_layers, "_MOST_CHARACTERS", 10)
    with pytest.raises(DocumentError, match="characters, and 10 are read"):
        layers_from_inspector('{"Layers": []}')


def test_long_names_and_deep_expressions_are_read_in_reasonable_time():
    deep = "PWN(" * 4_000 + "a" + ")" * 4_000
    layers = layers_from_inspector(
        json.dumps({"Layers": [deep, "x" * 100_000, {"Name": "n", "Metadata": "[ONNX Layer: " * 20_000}]})
    )
    assert len(layers[1].name) == 2_000
    assert len(layers) == 3


@given(st.lists(st.text(st.characters(exclude_characters="[]\x1e\x1f", exclude_categories=["Zs", "Zl", "Zp", "Cc", "Cs"]), min_size=1), min_size=1, max_size=6, unique=True),
       st.sampled_from(["", "\x1e", "\x1f", " "]))  # fmt: skip
def test_nodes_in_metadata_come_back_as_they_are(names, separator):
    metadata = separator.join(f"[ONNX Layer: {name}]" for name in names)
    (layer,) = layers_from_inspector(json.dumps({"Layers": [{"Name": "fused", "Metadata": metadata}]}))
    assert layer.nodes == tuple(names)
