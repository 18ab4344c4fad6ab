"""The compression report on a terminal."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edgedeploy.records.compression import CompressionReport, KindStatement, LayerCompression, Numbers
from edgedeploy.records.model import Model, TensorSpec
from edgedeploy.records.quantization import ActivationRange, SourceQuantization, WeightQuantization
from edgedeploy.render.compression import _compact, compression_facts, fitting_columns
from edgedeploy.render.text import inspection_text

from .render_samples import make_artifact

INT8 = Numbers(storage="int8", bits=8, is_symmetric=True, scales="channel")
UINT8 = Numbers(storage="uint8", bits=8, is_symmetric=False, scales="tensor")
INPUT = TensorSpec(name="image", dtype="float32", shape=("batch", 3, 32, 32), layout="NCHW")
OUTPUT = TensorSpec(name="scores", dtype="float32", shape=("batch", 10))


def make_layer(name, shape, **changes):
    size = 1
    for length in shape:
        size *= length
    zeros = changes.get("zero_weights", 0)
    macs = changes.pop("macs", 64 * size)
    made = LayerCompression(
        name=f"node_{name}",
        operator="Conv",
        weight=f"{name}.weight",
        weight_shape=shape,
        weight_count=size,
        output_channels=shape[0],
        parameters=size + shape[0],
        nonzero_parameters=size + shape[0] - zeros,
        macs=macs,
        effective_macs=macs - macs * zeros // size,
        stored_bytes=4 * (size + shape[0]),
        zipped_bytes=4 * (size + shape[0]) - 2 * zeros,
    )
    return replace(made, **changes)


def make_report(layers, **changes):
    made = CompressionReport(
        parameters=sum(layer.parameters for layer in layers),
        nonzero_parameters=sum(layer.nonzero_parameters for layer in layers),
        macs=sum(layer.macs for layer in layers),
        effective_macs=sum(layer.effective_macs for layer in layers),
        initializer_bytes=sum(layer.stored_bytes for layer in layers),
        zipped_bytes=sum(layer.zipped_bytes for layer in layers),
        operators={"Conv": len(layers), "Relu": len(layers)},
        layers=tuple(layers),
    )
    return replace(made, **changes)


def make_model(report, **changes):
    made = Model(
        path="models/small.onnx",
        sha256="ab" * 32,
        source="package.nets:small",
        opset=18,
        inputs=(INPUT,),
        outputs=(OUTPUT,),
        compression=report,
    )
    return replace(made, **changes)


def shown(report, *, width=80, layers=None, **changes):
    return inspection_text(make_model(report, **changes), color=False, width=width, layers=layers)


PRUNED = make_report(
    [
        make_layer("stem.conv", (32, 3, 3, 3)),
        make_layer("body.0.conv", (64, 32, 3, 3), zero_weights=9216, pattern="2:4"),
        make_layer("body.1.conv", (64, 64, 3, 3), zero_weights=27000, pattern="unstructured"),
        make_layer("head", (10, 64), operator="Gemm", macs=640),
    ],
    statements=(
        KindStatement(
            kind="pruning masks",
            layers=2,
            detail="l1_unstructured; masks multiplied into the weights",
            onnx="kept",
            onnx_reason="zeros among the weights in 2 of 2 layers",
        ),
        KindStatement(
            kind="weight-only int4",
            layers=1,
            onnx="kept",
            onnx_reason="4-bit weights in 1 of 1 layer",
            artifact="changed",
            artifact_reason="4 bits in the file, but expanded to float32 in memory in 1 layer",
            notes=("2 scales were re-scaled",),
        ),
    ),
)

GOLDEN_PRUNED = """\
package.nets:small
  file          models/small.onnx
  sha256        abababababababababababababababababababababababababababababababab
  weights file  none
  opset         18
  inputs        image float32 batch×3×32×32 NCHW
  outputs       scores float32 batch×10
  parameters    56,970, of which 36,216 are zero (63.6 %)
  MACs          3,594,880, of which 1,277,056 with a weight that is not zero
  constants     223 KiB, 152 KiB zipped
  operators     4 Conv, 4 Relu
  sparsity      2:4 in 1 of 4 layers, unstructured in 1 of 4 layers

Compression
pruning masks in 2 layers
  source        l1_unstructured; masks multiplied into the weights
  ONNX    kept  zeros among the weights in 2 of 2 layers
weight-only int4 in 1 layer
  ONNX      kept     4-bit weights in 1 of 1 layer
  artifact  changed  4 bits in the file, but expanded to float32 in memory in 1
                     layer
  note               2 scales were re-scaled

Layers

 layer        operator  params     zeros    MACs      size    zipped
 ────────────────────────────────────────────────────────────────────
 stem.conv    Conv         896       0 %  55.3 k   3.5 KiB   3.5 KiB
 body.0.conv  Conv      18,496  50 % 2:4  1.18 M  72.2 KiB  54.2 KiB
 body.1.conv  Conv      36,928      73 %  2.36 M   144 KiB  91.5 KiB
 head         Gemm         650       0 %     640  2.54 KiB  2.54 KiB"""


def test_a_pruned_model_reads_like_this_at_80_columns():
    assert shown(PRUNED) == GOLDEN_PRUNED


def quantized_report():
    per_token = Numbers(storage="int8", bits=8, is_symmetric=True, scales="token", is_dynamic=True)
    int4 = Numbers(storage="int4", bits=4, is_symmetric=True, scales="block")
    return make_report(
        [
            make_layer("first", (64, 32, 3, 3), weights=INT8, activations=UINT8, zero_weights=120),
            make_layer("shared.a", (64, 64), weights=INT8, activations=UINT8, rank=8),
            make_layer("up", (64, 32), operator="MatMulNBits", weights=int4, activations=per_token, rank=8),
            make_layer("again", (64, 64), weights=INT8, shares_with="node_shared.a", parameters=64, stored_bytes=0),
            make_layer("short", (10, 64), weights=Numbers(storage="float16", bits=16), operator="Gemm"),
            make_layer("seven", (10, 64), weights=replace(INT8, bits=7), activations=UINT8, removed_channels=22),
        ]
    )


def test_a_quantized_model_names_every_scheme_once_and_every_storage_in_its_row():
    text = shown(quantized_report(), width=110)
    facts, _, table = text.partition("Layers")
    assert (
        "weights       int8, symmetric, one scale per channel: 3 layers; int4, symmetric, one scale per block" in facts
    )
    assert "uint8, asymmetric, one scale per tensor: 3 layers" in facts
    assert "int8 dynamic, symmetric, one scale per token: 1 layer" in " ".join(facts.split())
    rows = {line.split()[0]: line.split() for line in table.splitlines() if line.startswith(" ") and "─" not in line}
    assert rows["layer"] == [
        "layer",
        "operator",
        "params",
        "removed",
        "rank",
        "weights",
        "reads",
        "MACs",
        "size",
        "zipped",
    ]
    assert rows["up"][1:7] == ["MatMulNBits", "2,112", "8", "int4", "int8", "dynamic"]
    assert rows["again"][1:5] == ["Conv", "shared", "int8", "float32"]
    assert rows["seven"][3:6] == ["22", "of", "32"]
    assert "(7 bits)" in table


def test_a_file_that_carries_a_quantization_says_that_its_bytes_are_floats():
    source = SourceQuantization(
        activations={"x": ActivationRange(low=0, high=1, origin="trained")},
        weights={"w": WeightQuantization(axis=0, scales=(1.0,), origin="trained")},
    )
    text = " ".join(shown(quantized_report(), quantization=source).split())
    assert "its own quantization of 1 weight tensor, 1 activation, 0 dynamic inputs; this file holds" in text


def test_many_layers_are_cut_to_the_largest_in_graph_order_unless_all_are_asked_for():
    layers = [make_layer(f"block.{index}", (8, 8 + index % 7)) for index in range(50)]
    text = shown(make_report(layers))
    rows = [int(line.split()[0].split(".")[1]) for line in text.splitlines() if line.startswith(" block")]
    assert len(rows) == 20
    assert rows == sorted(rows)
    assert min(index % 7 for index in rows) >= 4
    assert text.endswith("… and 30 smaller layers; --layers shows all")
    every = shown(make_report(layers), layers=True)
    assert sum(line.startswith(" block") for line in every.splitlines()) == 50
    assert "--layers" not in every
    assert "Layers" not in shown(make_report(layers), layers=False)


def test_a_narrow_screen_drops_columns_by_name_before_it_breaks_a_row():
    report = quantized_report()
    text = shown(report, width=60)
    _, _, table = text.partition("Layers")
    assert max(map(len, text.splitlines())) <= 60
    assert sum(line.split()[0] == "first" for line in table.splitlines() if line.strip()) == 1
    assert "no room for: zipped, operator" in " ".join(table.split())
    columns, dropped = fitting_columns(report.layers, 200)
    assert dropped == ()
    assert "zipped" in columns


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.text(min_size=1, max_size=60), st.integers(1, 10**6)), min_size=1, max_size=30),
    st.integers(60, 160),
)
def test_no_name_and_no_number_makes_a_line_longer_than_the_screen(named, width):
    layers = [make_layer(name, (size, 1), rank=size) for name, size in named]
    assert max(map(len, shown(make_report(layers), width=width, layers=True).splitlines())) <= width


def test_an_artifact_shows_statements_and_layers_only_when_it_is_inspected():
    artifact = replace(make_artifact("candidate"), compression=PRUNED)
    text = inspection_text(artifact, color=False, width=80)
    assert "weight-only int4 in 1 layer" in text
    assert "body.1.conv" in text
    from edgedeploy.render.text import artifact_text

    compiled = artifact_text(artifact, color=False, width=80)
    assert "weight-only int4 in 1 layer" in compiled
    assert "body.1.conv" not in compiled


def test_fates_are_coloured_where_colour_is_wanted():
    text = inspection_text(make_model(PRUNED), color=True, width=80)
    assert "\x1b[32mkept" in text
    assert "\x1b[33mchanged" in text


def test_beside_a_dense_reference_the_shares_are_named():
    report = make_report(
        [make_layer("a", (13, 8), removed_channels=3), make_layer("b", (4, 13), removed_channels=0)],
        reference_parameters=400,
        reference_macs=20_000,
    )
    facts = dict(compression_facts(report))
    assert facts["reference"] == (
        f"{100 * report.parameters / 400:.1f} % of 400 parameters, {100 * report.macs / 20_000:.1f} % of 20,000 MACs; "
        f"3 output channels removed"
    )
    assert "zeros" not in shown(report)


def test_what_cannot_be_counted_is_said():
    report = replace(make_report([make_layer("a", (4, 4))]), macs=None, effective_macs=None)
    assert dict(compression_facts(report))["MACs"] == "not available: a shape is not known before it runs"


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "?"), (0, "0"), (999, "999"), (1000, "1 k"), (7531, "7.53 k"), (999_999, "1 M"), (2.5e9, "2.5 G")],
)
def test_counts_have_three_digits(number, text):
    assert _compact(number) == text
