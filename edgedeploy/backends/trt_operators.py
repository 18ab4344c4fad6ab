"""What TensorRT's ONNX parsers are documented not to take, by name and with a remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgedeploy.backends.trt_graph import OWN_DOMAINS, Draft, attributes, nodes_within

if TYPE_CHECKING:
    from onnx import NodeProto

_INTEGERS = "quantize the float model for this target instead, which wants symmetric int8 Q/DQ pairs"
_OUTSIDE = "compute it outside of the model"
_STANDARD = "write it with other operators and export the model again"
_SEQUENCES = "use plain tensors, and export the model again"
# "Supported: N" both in the table of TensorRT 8.5 and in that of 10.15: onnx-tensorrt, docs/operators.md.
_REFUSED = {
    **dict.fromkeys(
        ("ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul"), _INTEGERS
    ),
    **dict.fromkeys(
        ("Bernoulli", "ImageDecoder", "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss", "RegexFullMatch",
         "SoftmaxCrossEntropyLoss", "StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer", "Unique"),
        _OUTSIDE,
    ),
    **dict.fromkeys(
        ("AffineGrid", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CenterCropPad", "Col2Im",
         "Compress", "DFT", "Det", "MaxRoiPool", "MaxUnpool"),
        _STANDARD,
    ),
    **dict.fromkeys(
        ("ConcatFromSequence", "Optional", "OptionalGetElement", "OptionalHasElement", "SequenceAt",
         "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap",
         "SplitToSequence"),
        _SEQUENCES,
    ),
}  # fmt: skip
# "N" in the table of 8.5 only; what we rewrite for it (LayerNormalization) is not named here.
_UNKNOWN_TO_8_5 = frozenset({"BlackmanWindow", "HammingWindow", "HannWindow", "Hardmax", "IsInf", "STFT"})


def demand_known(draft: Draft) -> tuple[str, ...]:
    """Refuse operators that no TensorRT parses, and return notes on those that only newer ones do.

    Raises:
        CompileError: naming the node, and what to do.
    """
    newer: dict[str, str] = {}
    for node in nodes_within(draft.graph):
        if node.domain not in OWN_DOMAINS:
            hint = _INTEGERS if node.op_type.startswith(("MatMulNBits", "Dynamic", "QLinear", "QGemm")) else _STANDARD
            raise draft.refused(node, f"the operator belongs to {node.domain}, which no TensorRT parses", hint)
        if node.op_type in _REFUSED:
            raise draft.refused(node, "no TensorRT parses this operator", _REFUSED[node.op_type])
        if (what := _unparsed_use(node)) is not None:
            raise draft.refused(node, f"{what}, which no TensorRT parses", _STANDARD)
        if node.op_type in _UNKNOWN_TO_8_5:
            newer.setdefault(node.op_type, node.name)
    return tuple(
        f"TensorRT 8.5 does not parse {operator} ({name!r}); the engine needs a newer one"
        for operator, name in newer.items()
    )


def _unparsed_use(node: NodeProto) -> str | None:
    """Say which part of an operator the same tables call unsupported."""
    settings = attributes(node)
    if node.op_type == "MaxPool" and len(node.output) > 1 and node.output[1]:
        return "it gives out the places of its maxima"
    is_pool = node.op_type in ("MaxPool", "AveragePool", "LpPool")
    if is_pool and any(step != 1 for step in settings.get("dilations", ())):
        return "it pools values that are no neighbours (dilations)"
    if node.op_type == "ScatterND" and settings.get("reduction", b"none") != b"none":
        return "it combines values (reduction)"
    if node.op_type == "LSTM" and (settings.get("layout") or settings.get("input_forget")):
        return "it has the batch first (layout), or couples its gates (input_forget)"
    if node.op_type == "Resize" and settings.get("antialias"):
        return "it smooths before it shrinks (antialias)"
    return None
