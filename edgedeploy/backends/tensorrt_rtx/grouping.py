"""Joins small groups of convolutions on integers, which TensorRT-RTX would fill up with zeros."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.backends.trt_graph import attributes, names_read, set_attribute

if TYPE_CHECKING:
    from onnx import ModelProto

# Its kernels on integers read this many channels at once, so its smallest group has as many.
_SMALLEST_GROUP = 4


def join_small_groups(model: ModelProto, int8_nodes: Collection[str]) -> None:
    """Give convolutions with one or two channels a group wider groups, in which the other channels' weights are 0.

    TensorRT-RTX 1.7.1 widens such a group by channels that are 0: its input grows to two or four times as many, and the
    zeros lie in the engine, as large as the activation (EfficientNet-Lite0 in int8: 18.8 MB, and 10.2 MB without).
    Neighbouring groups fill a group as well, and give the same sums of integers by the same kernel.

    Args:
        model: strongly typed; changed in place.
        int8_nodes: names of the products that are meant to run on integers.
    """
    from onnx import numpy_helper

    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    stored = {item.name: item for item in graph.initializer}
    readers = Counter(name for node in graph.node for name in names_read(node))
    for node in graph.node:
        if node.op_type != "Conv" or node.name not in int8_nodes:
            continue
        weights = makers[node.input[1]]
        codes = stored.get(weights.input[0])
        if codes is None or readers[weights.input[0]] > 1 or readers[node.input[1]] > 1:
            continue
        groups, channels = int(attributes(node).get("group", 1)), int(codes.dims[1])
        joined = _SMALLEST_GROUP // channels
        if joined > 1 and groups % joined == 0:
            wide = _widened(numpy_helper.to_array(codes), groups, joined)
            codes.CopyFrom(numpy_helper.from_array(wide, codes.name))
            set_attribute(node, "group", groups // joined)


def _widened(codes: NDArray[Any], groups: int, joined: int) -> NDArray[Any]:
    """Return weights (out, in of a group, ...) that read `joined` groups, all but their own as 0."""
    outputs, channels, *kernel = codes.shape
    wide = np.zeros((outputs, channels * joined, *kernel), codes.dtype)
    for part in range(joined):
        own = (np.arange(outputs) // (outputs // groups)) % joined == part
        wide[own, part * channels : (part + 1) * channels] = codes[own]
    return wide
