"""Products whose weights alone are integers, or whose activations are rounded anew in each inference, as nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.prepare.emission.draft import CONTRIB, NAMES, Draft
from edgedeploy.prepare.emission.weights import Codes, codes_of
from edgedeploy.prepare.graph import attributes
from edgedeploy.prepare.ptq.quantized_set import weight_axis
from edgedeploy.records.quantization import WeightQuantization

if TYPE_CHECKING:
    from onnx import NodeProto

# Per-channel scales are repeated for each block of a row, as MatMulNBits has no other form: 3 % of 8-bit weights.
# Measured on 4 matrices of 4096 x 4096: 66 MiB for 64 MiB of codes; blocks of 32 take 72 MiB and are no faster.
_BLOCK = 128
# MatMulNBits takes blocks of 16, 32, 64, 128 or 256.
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 256
# accuracy_level of MatMulNBits: 1 computes in float32, 4 rounds the activations of each block to int8.
_FLOAT32, _INT8 = 1, 4


def fits_packed(node: NodeProto, name: str, draft: Draft) -> bool:
    """Whether MatMulNBits can stand for a node that multiplies with these weights."""
    grid = draft.table.weights[name]
    if not _is_plain_product(node, name, draft) or grid.bits > 8:
        return False
    if grid.axis is None or len(grid.scales) == 1:
        return True
    width = draft.seen.constants[name].shape[1 - weight_axis(node)]
    return grid.axis == weight_axis(node) and (grid.block in (0, width) or _block_of(grid, width) >= _SMALLEST_BLOCK)


def _is_plain_product(node: NodeProto, name: str, draft: Draft) -> bool:
    if node.op_type not in ("Gemm", "MatMul") or node.domain or node.input[1] != name:
        return False
    settings = attributes(node)
    is_plain = settings.get("alpha", 1.0) == 1.0 and settings.get("beta", 1.0) == 1.0 and not settings.get("transA")
    return is_plain and draft.seen.constants[name].ndim == 2


def _block_of(grid: WeightQuantization, width: int) -> int:
    """Return a block size that MatMulNBits takes and that divides the grid's blocks."""
    if grid.block and grid.block < width and len(grid.scales) > 1:
        return min(grid.block & -grid.block, _LARGEST_BLOCK)
    return max(_SMALLEST_BLOCK, min(_BLOCK, 1 << (width - 1).bit_length()))


def packed_product(draft: Draft, node: NodeProto, name: str) -> list[NodeProto]:
    """Return a product as MatMulNBits, which keeps 4- or 8-bit weights packed in memory, and an Add for its bias.

    8-bit weights, and weights whose source rounds its activations, are computed with activations rounded to int8 in
    blocks. The kernel that does not takes 30 times as long for 8-bit weights (4 products of 4096 x 4096 with one row on
    x86 with AVX2, onnxruntime 1.31.1: 600 ms; rounded: 7 ms; 4-bit weights in float32: 32 ms; float32 weights: 23 ms).
    """
    from onnx import helper

    grid = draft.table.weights[name]
    weight = draft.seen.constants[name]
    axis = weight_axis(node)
    bits = 4 if grid.bits <= 4 else 8
    level = _INT8 if bits == 8 or name in draft.table.dynamic else _FLOAT32
    channels, width = weight.shape[axis], weight.shape[1 - axis]
    block = _block_of(grid, width)
    if not draft.stored_once(f"{name}/packed"):
        codes = codes_of(weight, grid, name)
        rows = codes if axis == 0 else codes.T
        draft.constant(f"{name}/packed", _packed(rows, bits, block))
        blocks = -(-width // block)
        draft.constant(f"{name}/scale", _by_block(grid.scales, grid, (channels, blocks), block, np.float32).reshape(-1))
        if any(grid.zero_points):
            points = _by_block(grid.zero_points, grid, (channels, blocks), block, np.int32) + 2 ** (bits - 1)
            draft.constant(f"{name}/zero_point", _packed_points(points, bits))
        _tell_level(draft, name, level)
    inputs = [node.input[0], f"{name}/packed", f"{name}/scale"]
    if any(grid.zero_points):
        inputs.append(f"{name}/zero_point")
    bias = node.input[2] if len(node.input) > 2 else ""
    product = helper.make_node(
        "MatMulNBits",
        inputs,
        [f"{node.output[0]}/product" if bias else node.output[0]],
        name=f"{node.name}/product" if bias else node.name,
        domain=CONTRIB,
        K=width,
        N=channels,
        bits=bits,
        block_size=block,
        accuracy_level=level,
    )
    draft.require_contrib()
    return [product, *_add(node, bias)]


def _tell_level(draft: Draft, name: str, level: int) -> None:
    dynamic = draft.table.dynamic.get(name)
    if level == _FLOAT32:
        return
    if dynamic is None:
        draft.note(
            f"the runtime rounds what it multiplies with the 8-bit weights {NAMES} to int8, in blocks of a row", name
        )
    else:
        source = (
            f"{'symmetric' if dynamic.symmetric else 'asymmetric'}, per {'token' if dynamic.per_token else 'tensor'}"
        )
        draft.note(
            f"the activations that the weights {NAMES} multiply are rounded in each inference, as int8 symmetric in "
            f"blocks of a row (source: {source})",
            name,
        )


def _packed(rows: Codes, bits: int, block: int) -> NDArray[np.uint8]:
    """Return codes as (channels, blocks, bytes): unsigned, two 4-bit codes a byte, the lower half first."""
    channels, width = rows.shape
    middle = 2 ** (bits - 1)
    padded = np.full((channels, -(-width // block) * block), middle, np.uint8)
    padded[:, :width] = rows + middle
    blocks = padded.reshape(channels, -1, block)
    return blocks if bits == 8 else (blocks[..., 0::2] | (blocks[..., 1::2] << 4)).astype(np.uint8)


def _packed_points(points: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Return zero-points as MatMulNBits reads them: two 4-bit ones a byte, each channel from a new byte."""
    unsigned = points.astype(np.uint8)
    if bits == 8:
        return unsigned.reshape(-1)
    if unsigned.shape[1] % 2:
        unsigned = np.pad(unsigned, ((0, 0), (0, 1)))
    return (unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)).astype(np.uint8).reshape(-1)


def _by_block(
    values: tuple[float, ...] | tuple[int, ...],
    grid: WeightQuantization,
    shape: tuple[int, int],
    block: int,
    dtype: Any,
) -> NDArray[Any]:
    """Return a grid's scales or zero-points as (channels, blocks of the packed form)."""
    flat = np.asarray(values, dtype)
    if flat.size == 1:
        return np.full(shape, flat.reshape(()), dtype)
    matrix = flat.reshape(shape[0], -1)
    if matrix.shape[1] > 1:
        matrix = matrix.repeat(grid.block // block, axis=1)[:, : shape[1]]
    return np.ascontiguousarray(np.broadcast_to(matrix, shape))


def _add(node: NodeProto, bias: str) -> list[NodeProto]:
    from onnx import helper

    return (
        [helper.make_node("Add", [f"{node.output[0]}/product", bias], list(node.output), name=node.name)]
        if bias
        else []
    )


def fits_dynamic(node: NodeProto, name: str, draft: Draft) -> bool:
    """Whether DynamicQuantizeLinear and an operator on integers can stand for a node that reads these weights."""
    grid = draft.table.weights[name]
    if node.op_type == "Conv" and not node.domain and node.input[1] == name:
        # ONNX Runtime's ConvInteger takes one zero-point for all filters.
        is_known = len(node.input) < 3 or node.input[2] in draft.seen.constants
        return is_known and (len(grid.scales) == 1 or grid.axis == 0) and len(set(grid.zero_points)) <= 1
    is_along = len(grid.scales) == 1 or (grid.axis == weight_axis(node) and not grid.block)
    return _is_plain_product(node, name, draft) and is_along


def dynamic_product(draft: Draft, node: NodeProto, name: str) -> list[NodeProto]:
    """Return a product or convolution on integers whose activation gets its grid from its own values in each inference.

    ONNX Runtime fuses the nodes of a product into DynamicQuantizeMatMul. The grid is one of 256 codes for the whole
    tensor.
    """
    from onnx import helper

    grid = draft.table.weights[name]
    is_product = node.op_type != "Conv"
    if not draft.stored_once(f"{name}/integers"):
        codes = codes_of(draft.seen.constants[name], grid, name)
        dtype = dynamic_storage(draft, codes, grid)
        arranged = codes.T if is_product and weight_axis(node) == 0 else codes
        _store_codes(draft, name, np.ascontiguousarray(arranged), grid, dtype, is_product=is_product)
        tell_dynamic(draft, name)
    rounded, scale, point = (f"{node.name}/{word}" for word in ("rounded", "rounded_scale", "rounded_zero_point"))
    bias = node.input[2] if len(node.input) > 2 else ""
    sums, floats, factor = (f"{node.name}/{word}" for word in ("sums", "float_sums", "factor"))
    product = f"{node.output[0]}/product" if bias else node.output[0]
    return [
        helper.make_node(
            "DynamicQuantizeLinear", [node.input[0]], [rounded, scale, point], name=f"{node.name}/quantize"
        ),
        helper.make_node(
            "MatMulInteger" if is_product else "ConvInteger",
            [rounded, f"{name}/integers", point, f"{name}/zero_point"],
            [sums],
            name=f"{node.name}/multiply",
            **({} if is_product else attributes(node)),
        ),
        helper.make_node("Cast", [sums], [floats], name=f"{node.name}/cast", to=1),
        helper.make_node("Mul", [scale, f"{name}/scale"], [factor], name=f"{node.name}/scales"),
        helper.make_node("Mul", [floats, factor], [product], name=f"{node.name}/rescale" if bias else node.name),
        *_add(node, bias if is_product or not bias else _bias_of_channels(draft, node, bias)),
    ]


def _bias_of_channels(draft: Draft, node: NodeProto, bias: str) -> str:
    """Store a convolution's bias in the shape in which it is added to what the convolution makes."""
    axes = draft.seen.constants[node.input[1]].ndim - 2
    return draft.constant(f"{node.name}/bias", draft.seen.constants[bias].reshape(-1, *[1] * axes))


def dynamic_storage(draft: Draft, codes: Codes, grid: WeightQuantization) -> np.dtype[Any]:
    """Return int8, or uint8 where products with signed bytes would saturate: two of them are added in 16 bits there."""
    is_safe = draft.rules.weight_bits >= grid.bits or int(np.abs(codes).max(initial=0)) <= 2 ** (8 - 2)
    return np.dtype(np.int8 if is_safe else np.uint8)


def _store_codes(
    draft: Draft, name: str, codes: Codes, grid: WeightQuantization, dtype: np.dtype[Any], *, is_product: bool
) -> None:
    """Store codes, scales and zero-points as integer operators read them; one scale has no axis."""
    offset = 128 if dtype == np.uint8 else 0
    scales = np.asarray(grid.scales, np.float32)
    own = () if scales.size == 1 else scales.shape
    points = np.broadcast_to(np.asarray(grid.zero_points or (0,)) + offset, scales.shape).astype(dtype).reshape(own)
    draft.constant(f"{name}/integers", (codes.astype(np.int32) + offset).astype(dtype))
    if is_product:
        draft.constant(f"{name}/scale", scales.reshape(own))
        draft.constant(f"{name}/zero_point", points)
    else:
        axes = codes.ndim - 2
        draft.constant(f"{name}/scale", scales.reshape(own and (-1, *[1] * axes)))
        draft.constant(f"{name}/zero_point", points.reshape(-1)[0])


def tell_dynamic(draft: Draft, name: str) -> None:
    """Note where the source's way of rounding activations differs from the runtime's, per tensor and asymmetric."""
    how = draft.table.dynamic[name]
    differences = [word for word, is_so in (("symmetric", how.symmetric), ("per token", how.per_token)) if is_so]
    if how.bits != 8:
        differences.append(f"to {how.bits} bits")
    if differences:
        draft.note(
            f"the source rounds the activations that the weights {NAMES} multiply {' and '.join(differences)}; ONNX "
            f"Runtime rounds them per tensor, asymmetric, to 8 bits",
            name,
        )


def fits_dynamic_lstm(node: NodeProto, draft: Draft) -> bool:
    """Whether DynamicQuantizeLSTM can stand for an LSTM: both matrices as integers, batch in the middle."""
    if node.op_type != "LSTM" or node.domain or attributes(node).get("layout"):
        return False
    return all(name in draft.table.dynamic and _lstm_scales(name, draft) is not None for name in node.input[1:3])


def _lstm_scales(name: str, draft: Draft) -> NDArray[np.float32] | None:
    """Return scales as (directions,) or (directions, 4 * hidden), None where the operator has no form for them."""
    grid, weight = draft.table.weights[name], draft.seen.constants[name]
    directions, rows = weight.shape[0], weight.shape[1]
    scales = np.asarray(grid.scales, np.float32)
    if grid.storage != "integer" or grid.bits > 8:
        return None
    if scales.size == 1:
        return np.full(directions, scales.reshape(()), np.float32)
    if grid.axis == 0 and scales.size == directions:
        return scales
    # A signed matrix with a scale for each row has no zero-points in this operator.
    if grid.axis == 1 and scales.size == rows and not any(grid.zero_points):
        return np.tile(scales, (directions, 1))
    return None


def dynamic_lstm(draft: Draft, node: NodeProto) -> list[NodeProto]:
    """Return an LSTM on integers; its matrices are stored transposed, (directions, input, 4 * hidden)."""
    from onnx import helper

    numbers: list[str] = []
    for name in node.input[1:3]:
        if not draft.stored_once(f"{name}/integers"):
            grid = draft.table.weights[name]
            codes = codes_of(draft.seen.constants[name], grid, name)
            scales = _lstm_scales(name, draft)
            assert scales is not None  # fits_dynamic_lstm has looked
            dtype = dynamic_storage(draft, codes, grid)
            offset = 128 if dtype == np.uint8 else 0
            points = np.broadcast_to(np.asarray(grid.zero_points or (0,)) + offset, scales.shape)
            turned = np.ascontiguousarray((codes.astype(np.int32) + offset).astype(dtype).transpose(0, 2, 1))
            draft.constant(f"{name}/integers", turned)
            draft.constant(f"{name}/scale", scales)
            draft.constant(f"{name}/zero_point", np.ascontiguousarray(points).astype(dtype))
            tell_dynamic(draft, name)
        numbers += [f"{name}/scale", f"{name}/zero_point"]
    inputs = [*node.input, *[""] * (8 - len(node.input)), *numbers]
    inputs[1:3] = [f"{name}/integers" for name in node.input[1:3]]
    lstm = helper.make_node("DynamicQuantizeLSTM", inputs, list(node.output), name=node.name, domain=CONTRIB)
    lstm.attribute.extend(item for item in node.attribute if item.name != "layout")
    draft.require_contrib()
    return [lstm]
