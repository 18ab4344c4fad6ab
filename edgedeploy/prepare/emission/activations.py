"""Where an emitted graph rounds activations, to which grid, and which clamps the grids make superfluous."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgedeploy.prepare.emission.draft import NAMES, Draft
from edgedeploy.prepare.graph import attributes
from edgedeploy.prepare.grid import ActivationGrid, activation_grid

if TYPE_CHECKING:
    from onnx import NodeProto

PRODUCTS = ("Conv", "Gemm", "MatMul")
CLAMPS = ("Relu", "Clip")


def activation_grids(draft: Draft) -> dict[str, ActivationGrid]:
    """Return the grid of every activation that is rounded.

    Raises:
        ModelError: a trained grid that the rules cannot keep, where changes are not allowed.
    """
    unused = _only_near_excluded(draft)
    if draft.rules.residual_add == "skip":
        unused |= _fused_branches(draft)
    grids: dict[str, ActivationGrid] = {}
    moved: dict[str, float] = {}
    widened: list[str] = []
    for tensor, values in draft.table.activations.items():
        if tensor in unused:
            continue
        if values.grid is None:
            grids[tensor] = activation_grid(values, draft.rules)
            continue
        from edgedeploy.prepare.source.inherit import map_grid

        grid, is_exact, change = map_grid(values, draft.rules)
        dtype = np.dtype(draft.rules.activation_dtype)
        grids[tensor] = ActivationGrid(float(np.float32(grid.scale)), grid.zero_point, dtype)
        if not is_exact:
            moved[tensor] = change
        # One code more than trained is the usual -128 beside -127; QuantizeLinear ends where the type ends.
        elif grid.low_code > np.iinfo(dtype).min + 1 or grid.high_code < np.iinfo(dtype).max - 1:
            widened.append(tensor)
    if moved:
        draft.changed(
            f"the trained grids of {NAMES} do not fit {_words(draft)} activations and would be scaled anew, by up to "
            f"{max(map(abs, moved.values())):.1%}",
            *sorted(moved),
        )
    if widened:
        draft.note(
            f"the trained grids of {NAMES} use a part of the 8-bit codes: values inside are kept exactly, values "
            f"outside are clamped later than in training",
            *sorted(widened),
        )
    return grids


def _words(draft: Draft) -> str:
    return f"{'symmetric' if draft.rules.activation_symmetric else 'asymmetric'} {draft.rules.activation_dtype}"


def _only_near_excluded(draft: Draft) -> set[str]:
    """Return activations that an excluded node makes or reads, and no integer node reads.

    An excluded node reads what was not rounded: between two rounded tensors runtimes would compute it on integers.
    """
    nodes = [node for node in draft.seen.graph.node if node.op_type in draft.rules.excluded_operators]
    touched = {name for node in nodes for name in (*node.input, *_made_by(node, draft))}
    return {
        name for name in touched if not any(node.name in draft.active for node in draft.seen.consumers.get(name, ()))
    }


def _made_by(node: NodeProto, draft: Draft) -> set[str]:
    """Return a node's outputs and those of the clamps that alone read them."""
    made = set(node.output)
    for name in node.output:
        reader = draft.seen.sole_consumer(name)
        if reader is not None and reader.op_type in CLAMPS:
            made.update(reader.output)
    return made


def _fused_branches(draft: Draft) -> set[str]:
    """Return, for each residual sum, the tensors of the branch that the engine adds within its convolution.

    Where both branches end in a convolution it is the first operand, `y` in `y += shortcut(x)`.
    """
    found: set[str] = set()
    for node in draft.seen.graph.node:
        if node.op_type != "Add" or node.name not in draft.active:
            continue
        branch = next((tensors for name in node.input if (tensors := _unread_product(name, draft))), None)
        if branch:
            found |= branch
    return found


def _unread_product(tensor: str, draft: Draft) -> set[str]:
    """Return a tensor and what it clamps when it comes from an integer product and one node alone reads it."""
    if draft.seen.sole_consumer(tensor) is None:
        return set()
    maker = draft.seen.producers.get(tensor)
    tensors = {tensor}
    if maker is not None and maker.op_type in CLAMPS and _reads_alone(maker, draft):
        tensors.add(maker.input[0])
        maker = draft.seen.producers.get(maker.input[0])
    if maker is None or maker.op_type not in PRODUCTS or maker.name not in draft.active:
        return set()
    return tensors


def superfluous_clamps(draft: Draft, grids: dict[str, ActivationGrid]) -> frozenset[str]:
    """Return names of Relu and Clip nodes that cannot change a code of the grid that follows them."""
    return frozenset(
        node.name
        for node in draft.seen.graph.node
        if node.op_type in CLAMPS
        and node.output[0] in grids
        and node.input[0] not in grids
        and _reads_alone(node, draft)
        and (bounds := _bounds(node, draft)) is not None
        and clamps_nothing(bounds, grids[node.output[0]])
    )


def _reads_alone(node: NodeProto, draft: Draft) -> bool:
    reader = draft.seen.sole_consumer(node.input[0])
    return reader is not None and reader.name == node.name


def clamps_nothing(bounds: tuple[float, float], grid: ActivationGrid) -> bool:
    """Whether rounding to a grid gives the same codes with and without clamping to [low, high] before.

    Rounding is monotone, so it does exactly if the bounds themselves are rounded to the grid's first and last code.
    """
    codes = np.iinfo(grid.dtype)
    low, high = (
        np.clip(np.rint(np.float32(bound) / np.float32(grid.scale)) + grid.zero_point, codes.min, codes.max)
        for bound in bounds
    )
    return bool(low == codes.min and high == codes.max)


def _bounds(node: NodeProto, draft: Draft) -> tuple[float, float] | None:
    if node.op_type == "Relu":
        return 0.0, np.inf
    settings = attributes(node)
    bounds = [settings.get("min", -np.inf), settings.get("max", np.inf)]  # attributes up to opset 10
    for index, name in enumerate(node.input[1:3]):
        if name and name not in draft.seen.constants:
            return None
        if name:
            bounds[index] = float(draft.seen.constants[name])
    return bounds[0], bounds[1]


def activation_pair(draft: Draft, tensor: str, source: str, result: str, grid: ActivationGrid) -> list[NodeProto]:
    """Return QuantizeLinear and DequantizeLinear between two tensors; both zero-points are written even when 0."""
    from onnx import helper

    scale = draft.constant(f"{tensor}/scale", np.float32(grid.scale))
    zero_point = draft.constant(f"{tensor}/zero_point", np.asarray(grid.zero_point, grid.dtype))
    stored = f"{tensor}/stored"
    return [
        helper.make_node("QuantizeLinear", [source, scale, zero_point], [stored], name=f"{tensor}/quantize"),
        helper.make_node("DequantizeLinear", [stored, scale, zero_point], [result], name=f"{tensor}/dequantize"),
    ]
