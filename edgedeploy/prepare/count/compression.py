"""What compression a model carries, counted in its ONNX graph, layer by layer: zeros, ranks, bits, work and bytes."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgedeploy.errors import ModelError
from edgedeploy.prepare.count.multiply_adds import Shapes, counts_macs, node_macs, shapes_of_one_sample
from edgedeploy.prepare.count.stored_weights import (
    PRODUCTS,
    Learnt,
    Stored,
    activations_in_table,
    activations_of,
    learnt_by,
    weights_in_table,
)
from edgedeploy.prepare.graph import View, attributes, read_graph, tidy, view
from edgedeploy.records.compression import CompressionReport, LayerCompression, Numbers, Pattern
from edgedeploy.records.quantization import QuantizationTable, SourceQuantization
from edgedeploy.storage import sha256_bytes

if TYPE_CHECKING:
    from onnx import NodeProto

Mask = NDArray[np.bool_]

# From which share of zeros on a layer counts as sparse. Training leaves hardly a weight exactly zero, and rounding to
# 255 levels makes 1 to 5 % of normally distributed weights zero; rounding to 15 levels, up to a quarter.
_SPARSE, _SPARSE_IN_FEW_BITS = 0.2, 0.35
# zlib's work is the slowest part of a report, and the forms of one model share most of their constants.
_zipped_sizes: dict[str, int] = {}
_MAX_REMEMBERED = 4096


def compression_report(
    path: Path, *, table: QuantizationTable | SourceQuantization | None = None, reference: Path | None = None
) -> CompressionReport:
    """Count what a model consists of.

    Args:
        path: an .onnx file, weights inside: fp32, or with Q/DQ pairs, operators on integers or packed weights.
        table: for an fp32 file: how its weights and activations are quantized. Bytes remain those of the file.
        reference: the same network before channels were removed, as .onnx.

    Returns:
        The report, its layers in graph order.

    Raises:
        ModelError: the reference is another network, or the smaller of the two.
    """
    model = read_graph(path)
    tidy(model)  # every node gets a name of its own
    seen = view(model.graph)
    survey = _Survey(seen, shapes_of_one_sample(model, seen), _stored_bytes(model), table)
    layers = survey.layers()
    report = CompressionReport(
        parameters=sum(layer.parameters for layer in layers),
        nonzero_parameters=sum(layer.nonzero_parameters for layer in layers),
        macs=_total([layer.macs for layer in layers]),
        effective_macs=_total([layer.effective_macs for layer in layers]),
        initializer_bytes=sum(map(len, survey.stored.values())),
        zipped_bytes=sum(layer.zipped_bytes for layer in layers) + survey.unclaimed_zipped_bytes(),
        operators=dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
        layers=tuple(layers),
    )
    return report if reference is None else _beside(report, compression_report(reference), reference)


def _total(numbers: Sequence[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None


def _stored_bytes(model: Any) -> dict[str, bytes]:
    from onnx import numpy_helper

    return {item.name: item.raw_data or numpy_helper.to_array(item).tobytes() for item in model.graph.initializer}


@dataclass(slots=True)
class _Survey:
    """One walk over a graph.

    Attributes:
        stored: constant → its bytes in the file.
        claimed: constant → the layer that it was counted for.
    """

    seen: View
    shapes: Shapes
    stored: Mapping[str, bytes]
    table: QuantizationTable | SourceQuantization | None
    claimed: dict[str, str] = field(default_factory=dict)

    def layers(self) -> list[LayerCompression]:
        """Return every node that has learnt constants, or that multiplies and adds."""
        found = {node.name: learnt_by(node, self.seen) for node in self.seen.graph.node}
        made: list[LayerCompression] = []
        ranks = _ranks(self.seen, found)
        biases = _separate_biases(self.seen, found)
        joined = {name for names in biases.values() for name in names}
        for node in self.seen.graph.node:
            learnt = found[node.name]
            if node.name in joined or not (learnt.weights or learnt.others or counts_macs(node)):
                continue
            for name in biases.get(node.name, ()):
                learnt = Learnt(learnt.weights, (*learnt.others, *found[name].others))
            made.append(self._layer(node, learnt, ranks.get(node.name)))
        return made

    def unclaimed_zipped_bytes(self) -> int:
        """Return what the constants take up that belong to no layer: shapes, scales of activations."""
        return _zipped_size(b"".join(value for name, value in self.stored.items() if name not in self.claimed))

    def _layer(self, node: NodeProto, learnt: Learnt, rank: int | None) -> LayerCompression:
        everything = (*learnt.weights, *learnt.others)
        main = everything[0] if everything else None
        owner = self.claimed.get(main.name, "") if main else ""
        new = [one for one in everything if one.name not in self.claimed]
        bytes_of = [
            self.stored[name]
            for name in dict.fromkeys(name for one in everything for name in one.constants)
            if name not in self.claimed
        ]
        self.claimed.update({name: node.name for one in everything for name in one.constants})
        masks = [one.is_set for one in learnt.weights]
        size, set_weights = sum(mask.size for mask in masks), sum(int(mask.sum()) for mask in masks)
        by_output = [_by_output(node, mask) for mask in masks]
        groups = int(attributes(node).get("group", 1)) if node.op_type == "ConvTranspose" else 1
        macs = node_macs(node, self.shapes) if counts_macs(node) else 0
        weights, activations = self._numbers(node, main)
        return LayerCompression(
            name=node.name,
            operator=node.op_type,
            weight=main.name if main else "",
            weight_shape=main.is_set.shape if main else (),
            weight_count=size,
            output_channels=by_output[0].shape[0] * groups if by_output else 0,
            parameters=sum(one.is_set.size for one in new),
            nonzero_parameters=sum(int(one.is_set.sum()) for one in new),
            zero_weights=size - set_weights,
            pattern=_pattern(by_output, weights.bits),
            rank=rank,
            weights=weights,
            activations=activations,
            macs=macs,
            effective_macs=macs if macs is None or not size else round(macs * set_weights / size),
            stored_bytes=sum(map(len, bytes_of)),
            zipped_bytes=_zipped_size(b"".join(bytes_of)),
            shares_with=owner,
        )

    def _numbers(self, node: NodeProto, main: Stored | None) -> tuple[Numbers, Numbers]:
        weights = main.numbers if main else Numbers()
        if node.op_type not in PRODUCTS:
            return weights, Numbers()
        if self.table is None:
            # ONNX multiplies like with like: short floats that nothing widens meet activations of their own type.
            is_short = main is not None and main.name in node.input and "float" in weights.storage
            return weights, weights if is_short else activations_of(node, self.seen)
        name = main.name if main else ""
        grid = self.table.weights.get(name)
        return weights_in_table(grid) if grid else weights, activations_in_table(node, name, self.table, self.seen)


def _zipped_size(data: bytes) -> int:
    if not data:
        return 0
    key = sha256_bytes(data)
    if key not in _zipped_sizes:
        if len(_zipped_sizes) >= _MAX_REMEMBERED:
            _zipped_sizes.clear()
        _zipped_sizes[key] = len(zlib.compress(data))
    return _zipped_sizes[key]


# ---------------------------------------------------------------- how zeros lie


def _by_output(node: NodeProto, mask: Mask) -> Mask:
    """Return weights as (output channels, input channels, the rest)."""
    if node.op_type in ("Conv", "FusedConv", "QLinearConv", "ConvInteger", "MatMulNBits"):
        return mask
    if node.op_type == "ConvTranspose":
        return mask.swapaxes(0, 1)
    if mask.ndim == 1:  # a product with a vector
        return mask[None]
    is_turned = node.op_type in ("Gemm", "FusedGemm", "QGemm") and attributes(node).get("transB")
    if node.op_type in ("LSTM", "GRU", "RNN") or is_turned:
        return mask.reshape(-1, mask.shape[-1])
    return mask.swapaxes(-1, -2).reshape(-1, mask.shape[-2])


def _pattern(masks: Sequence[Mask], bits: int) -> Pattern:
    """Say how the zeros of matrices or filters lie, each (output channels, input channels, the rest)."""
    size, filled = sum(mask.size for mask in masks), sum(int(mask.sum()) for mask in masks)
    if not size or 1 - filled / size < (_SPARSE if bits >= 8 else _SPARSE_IN_FEW_BITS):
        return ""
    if all(_is_two_of_four(mask) for mask in masks):
        return "2:4"
    return "channels" if all(_is_dense_where_used(mask) for mask in masks) else "unstructured"


def _is_two_of_four(mask: Mask) -> bool:
    """Whether at most two of each four neighbours along the input channels are set, as sparse tensor cores demand."""
    outputs, inputs = mask.shape[:2]
    if inputs % 4:
        return False
    groups = mask.reshape(outputs, inputs // 4, 4, -1)
    return bool(groups.sum(axis=2).max() <= 2)


def _is_dense_where_used(mask: Mask) -> bool:
    """Whether the zeros are whole output or input channels, and hardly one lies elsewhere."""
    flat = np.any(mask.reshape(mask.shape[0], mask.shape[1], -1), axis=2)
    used = mask[np.any(flat, axis=1)][:, np.any(flat, axis=0)]
    return bool(used.size and used.mean() >= 1 - _SPARSE / 4)


# ---------------------------------------------------------------- layers that belong together

# What stands between two products without changing what they make together.
_TRANSPARENT = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Identity", "Cast"})


def _follower(node: NodeProto, seen: View, found: Mapping[str, Learnt]) -> NodeProto | None:
    """Return the product that alone reads what a product makes, up to a bias and how it is stored between them."""
    tensor = node.output[0]
    while True:
        reader = seen.sole_consumer(tensor)
        if reader is None or reader.op_type in PRODUCTS:
            return reader
        is_bias = reader.op_type == "Add" and bool(found[reader.name].others)
        is_rescaled = reader.op_type == "Mul" and any(_is_scale_of_integers(name, seen) for name in reader.input)
        if not (reader.op_type in _TRANSPARENT or is_bias or is_rescaled):
            return None
        tensor = reader.output[0]


def _is_scale_of_integers(tensor: str, seen: View) -> bool:
    """Whether a tensor is what an integer product is multiplied with: dynamic input scale × weight scales."""
    maker = seen.producers.get(tensor)
    if maker is None or maker.op_type != "Mul":
        return False
    makers = [seen.producers.get(name) for name in maker.input]
    return any(one is not None and one.op_type == "DynamicQuantizeLinear" for one in makers)


def _ranks(seen: View, found: Mapping[str, Learnt]) -> dict[str, int]:
    """Return node → rank for both layers of each pair whose product is one layer with more parameters."""
    ranks: dict[str, int] = {}
    for node in seen.graph.node:
        first = _factor(node, found)
        reader = None if first is None else _follower(node, seen, found)
        second = _factor(reader, found) if reader is not None else None
        if first is None or second is None or reader is None or second.shape[1] != first.shape[0]:
            continue
        # Two filters in a row act like one that reaches as far as both.
        reach = [a + b - 1 for a, b in zip(first.shape[2:], second.shape[2:], strict=False)]
        merged = second.shape[0] * first.shape[1] * int(np.prod(reach, dtype=np.int64))
        if first.size + second.size < merged and first.shape[0] < min(first.shape[1] * _area(first), second.shape[0]):
            ranks[node.name] = ranks[reader.name] = first.shape[0]
    return ranks


def _factor(node: NodeProto, found: Mapping[str, Learnt]) -> Mask | None:
    """Return the weights of a product that could be half of a pair: one matrix, or filters that see all channels."""
    weights = found[node.name].weights
    is_recurrent = "LSTM" in node.op_type or node.op_type in ("GRU", "RNN", "ConvTranspose")
    if len(weights) != 1 or is_recurrent or attributes(node).get("group", 1) != 1 or weights[0].is_set.ndim < 2:
        return None
    return _by_output(node, weights[0].is_set)


def _area(mask: Mask) -> int:
    return int(np.prod(mask.shape[2:], dtype=np.int64))


def _separate_biases(seen: View, found: Mapping[str, Learnt]) -> dict[str, list[str]]:
    """Return product → the Add nodes behind it that add its bias."""
    biases: dict[str, list[str]] = {}
    for node in seen.graph.node:
        if node.op_type != "Add" or not found[node.name].others:
            continue
        tensor = next((name for name in node.input if name in seen.producers and name not in seen.constants), "")
        maker = seen.producers.get(tensor)
        for _ in range(3):  # Cast and Mul stand between an integer product and its bias
            if maker is None or maker.op_type not in ("Cast", "Mul"):
                break
            maker = seen.producers.get(maker.input[0])
        if maker is not None and maker.op_type in PRODUCTS and found[maker.name].weights:
            biases.setdefault(maker.name, []).append(node.name)
    return biases


# ---------------------------------------------------------------- beside a dense reference


def _beside(report: CompressionReport, dense: CompressionReport, path: Path) -> CompressionReport:
    """Add how many output channels of a dense reference each layer has lost."""
    ours, theirs = ([layer for layer in one.layers if layer.weight] for one in (report, dense))
    pairs = _pairs(ours, theirs)
    if pairs is None:
        raise ModelError(
            f"the reference {path.name} is not the same network before pruning: it has {len(theirs)} layers with "
            f"weights and the model has {len(ours)}, and neither their names nor their order agree; give the dense "
            f"model that this one was made from"
        )
    removed: dict[str, int] = {}
    for layer, other in pairs:
        if not layer.output_channels:
            continue
        removed[layer.name] = other.output_channels - layer.output_channels
        if removed[layer.name] < 0:
            raise ModelError(
                f"the reference {path.name} has {other.output_channels} output channels in {other.name!r} and the "
                f"model has {layer.output_channels}; the reference must be the dense one: exchange the two"
            )
    layers = tuple(
        msgspec.structs.replace(
            layer,
            removed_channels=removed.get(layer.name),
            pattern=layer.pattern or ("channels" if removed.get(layer.name) else ""),
        )
        for layer in report.layers
    )
    return msgspec.structs.replace(
        report, layers=layers, reference_parameters=dense.parameters, reference_macs=dense.macs
    )


def _pairs(
    ours: Sequence[LayerCompression], theirs: Sequence[LayerCompression]
) -> list[tuple[LayerCompression, LayerCompression]] | None:
    """Pair layers by the names of their weights, else by their order where the operators agree."""
    by_weight = _unique(theirs)
    if all(layer.weight in by_weight for layer in ours):
        return [(layer, by_weight[layer.weight]) for layer in ours]
    if [_family(layer.operator) for layer in ours] == [_family(layer.operator) for layer in theirs]:
        return list(zip(ours, theirs, strict=True))
    return None


def _unique(layers: Collection[LayerCompression]) -> dict[str, LayerCompression]:
    return {layer.weight: layer for layer in layers if not layer.shares_with}


def _family(operator: str) -> str:
    if "Conv" in operator:
        return "Conv"
    return "MatMul" if "MatMul" in operator or "Gemm" in operator else operator
