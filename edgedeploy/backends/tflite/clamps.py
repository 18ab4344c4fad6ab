"""Fuses a clamp into the product or sum before it, through whatever only rearranges values between the two.

The converter fuses those that follow at once. Behind a turn of axes it leaves them, and a product whose clamp stands
apart cannot compute on integers: what it makes itself was never rounded.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from edgedeploy.backends.tflite.flatbuffer import FlatGraph
from edgedeploy.backends.tflite.kernels import REARRANGES

# Operator → its code as the activation of another one (schema.fbs, ActivationFunctionType).
_ACTIVATIONS = {"RELU": 1, "RELU_N1_TO_1": 2, "RELU6": 3}
_FUSING = frozenset({"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "ADD", "SUB", "MUL"})


def fuse_clamps(graph: FlatGraph, kept: Collection[int] = ()) -> dict[int, tuple[int, ...]]:
    """Fuse clamps, in place; what the graph computes stays the same to the bit.

    Args:
        graph: a float graph.
        kept: tensors whose own values are needed, so that no clamp may be fused over them.

    Returns:
        Tensor that was clamped → the tensors that hold the same values now, in some order of axes; the first one stands
        for it in the graph.
    """
    makers, readers = graph.makers(), graph.readers()
    seen = {int(index) for index in (*graph.graph.inputs, *graph.graph.outputs)} | set(kept)
    moved: dict[int, tuple[int, ...]] = {}
    clamped: set[int] = set()
    for clamp in list(graph.operators):
        code = _ACTIVATIONS.get(graph.operator_name(clamp))
        if code is None:
            continue
        chain = [int(clamp.inputs[0])]
        while chain[-1] in makers and graph.operator_name(makers[chain[-1]]) in REARRANGES:
            chain.append(int(makers[chain[-1]].inputs[0]))
        maker = makers.get(chain[-1])
        is_seen = any(index in seen or index in clamped or len(readers.get(index, ())) != 1 for index in chain)
        if is_seen or maker is None or not _can_clamp(graph, maker):
            continue
        maker.builtinOptions.fusedActivationFunction = code
        moved[int(clamp.outputs[0])] = tuple(chain)
        clamped.update(chain)
        graph.operators = [operator for operator in graph.operators if operator is not clamp]
    places = {after: chain[0] for after, chain in moved.items()}
    for after, before in places.items():
        graph.tensors[before].name, graph.tensors[after].name = graph.tensors[after].name, graph.tensors[before].name
    for operator in graph.operators:
        operator.inputs = np.asarray([places.get(int(i), int(i)) for i in operator.inputs], np.int32)
    graph.rename_ports(places)
    return moved


def _can_clamp(graph: FlatGraph, maker: Any) -> bool:
    options = maker.builtinOptions
    return graph.operator_name(maker) in _FUSING and options is not None and not options.fusedActivationFunction
