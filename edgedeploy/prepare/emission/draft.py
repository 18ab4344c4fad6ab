"""The graph that `emit` writes: the table and rules that it follows, what it adds, and what it could not keep."""

from __future__ import annotations

from collections.abc import Sequence
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
# Where a sentence names tensors, so that what is said of many of them is said once.
NAMES = "<names>"
# Names in a sentence, before it says how many there are.
_NAMED = 2


@dataclass(slots=True)
class Draft:
    """What the parts of `emit` share while they rewrite one graph.

    Attributes:
        model: the copy that is written.
        seen: the fp32 graph, looked up before anything was changed.
        active: names of the nodes that compute on integers: the table's without those that the rules exclude.
        is_change_allowed: whether numbers that the rules cannot keep are replaced, with a note, instead of refused.
        front: nodes that read nothing but constants; they go before all others.
        notes: what a person should know: sentence with NAMES in it → the tensors that it is true of.
    """

    model: ModelProto
    seen: View
    table: QuantizationTable
    rules: QuantizationRules
    active: frozenset[str]
    is_change_allowed: bool
    front: list[NodeProto] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)
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

    def note(self, what: str, *names: str) -> None:
        """Keep a sentence that a person should read.

        Args:
            what: a sentence without its full stop, with NAMES where the tensors stand that it is about.
            names: those tensors; the same sentence about others is not kept again.
        """
        told = self.notes.setdefault(what, [])
        told += [name for name in dict.fromkeys(names) if name not in told]

    def changed(self, what: str, *names: str) -> None:
        """Say that something of the source cannot be kept by these rules: what is replaced by what, as for `note`.

        Raises:
            ModelError: changes are not allowed.
        """
        if not self.is_change_allowed:
            raise ModelError(f"{_filled(what, names)}; build for a target whose rules keep it, or give --allow-loss")
        self.note(what, *names)

    def sentences(self) -> tuple[str, ...]:
        """Return the notes with their names filled in."""
        return tuple(_filled(what, names) for what, names in self.notes.items())

    def require_contrib(self) -> None:
        """Declare that the graph uses operators of ONNX Runtime."""
        from onnx import helper

        if all(item.domain != CONTRIB for item in self.model.opset_import):
            self.model.opset_import.append(helper.make_opsetid(CONTRIB, 1))


def _filled(what: str, names: Sequence[str]) -> str:
    """Name tensors in a sentence: 'a' and 'b', or 'a', 'b' ... (26 in all)."""
    shown = [repr(name) for name in names[:_NAMED]]
    if len(names) > _NAMED:
        return what.replace(NAMES, f"{', '.join(shown)} ... ({len(names)} in all)")
    return what.replace(NAMES, " and ".join(shown))
