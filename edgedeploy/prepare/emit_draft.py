"""The graph that `emit` writes: the table and rules that it follows, what it adds, and what it could not keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgedeploy.errors import ModelError
from edgedeploy.prepare.graph import View
from edgedeploy.records.quantization import QuantizationTable
from edgedeploy.records.target import QuantizationRules

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# ONNX Runtime's own operators.
CONTRIB = "com.microsoft"
# Names in a sentence, before it says "and 7 more".
_NAMED = 4


@dataclass(slots=True)
class Draft:
    """What the parts of `emit` share while they rewrite one graph.

    Attributes:
        model: the copy that is written.
        seen: the fp32 graph, looked up before anything was changed.
        active: names of the nodes that compute on integers: the table's without those that the rules exclude.
        is_change_allowed: whether numbers that the rules cannot keep are replaced, with a note, instead of refused.
        note: called with a sentence for each thing that a person should know.
        front: nodes that read nothing but constants; they go before all others.
    """

    model: ModelProto
    seen: View
    table: QuantizationTable
    rules: QuantizationRules
    active: frozenset[str]
    is_change_allowed: bool
    note: Callable[[str], None]
    front: list[NodeProto] = field(default_factory=list)
    _stored: set[str] = field(default_factory=set)
    _replaced: set[str] = field(default_factory=set)

    def stored_once(self, name: str) -> bool:
        """Whether weights that several nodes read are stored already; says yes from the second call on."""
        if name in self._stored:
            return True
        self._stored.add(name)
        return False

    def constant(self, name: str, value: Any) -> str:
        """Add an initializer and return its name."""
        from onnx import numpy_helper

        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def replace_constant(self, name: str) -> None:
        """Drop an initializer, whose name a node's output takes, so that nothing that reads it has to change."""
        self._replaced.add(name)

    def finish(self, nodes: list[NodeProto]) -> None:
        """Put the nodes into the graph and remove what they replace."""
        graph = self.model.graph
        del graph.node[:]
        graph.node.extend([*self.front, *nodes])
        # Popped one by one: to rebuild the list would copy every weight.
        for index in reversed(range(len(graph.initializer))):
            if graph.initializer[index].name in self._replaced:
                del graph.initializer[index]

    def changed(self, what: str) -> None:
        """Say that something of the source cannot be kept by these rules.

        Args:
            what: a sentence without its full stop: what is replaced by what.

        Raises:
            ModelError: changes are not allowed.
        """
        if not self.is_change_allowed:
            raise ModelError(f"{what}; build for a target whose rules keep it, or give --allow-loss")
        self.note(what)

    def require_contrib(self) -> None:
        """Declare that the graph uses operators of ONNX Runtime."""
        from onnx import helper

        if all(item.domain != CONTRIB for item in self.model.opset_import):
            self.model.opset_import.append(helper.make_opsetid(CONTRIB, 1))


def named(names: list[str]) -> str:
    """Return a list of names that fits a sentence: 'a', 'b' and 7 more."""
    shown = ", ".join(repr(name) for name in names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"
