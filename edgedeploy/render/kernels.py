"""What an engine consists of, kernel by kernel, and how it was built: facts and rows. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from edgedeploy.records.artifact import EngineReceipt, Layer
from edgedeploy.render.figures import NOT_AVAILABLE, count, printable
from edgedeploy.units import format_bytes, format_duration

COLUMNS = ("kernel", "kind", "in", "out", "tactic")
# Where nobody asked for all of them, this many are shown: the table then ends on the screen that it began on.
_MOST_ROWS = 20
_TACTIC_LENGTH = 40
_NODES_NAMED = 3
# How the nodes of a Q/DQ pair are called in a form.
_ROUNDING = ("/quantize", "/dequantize")


def kernel_facts(layers: Sequence[Layer]) -> list[tuple[str, str]]:
    """Return how many kernels compute on what."""
    if not layers:
        return []
    precisions = Counter(layer.precision or NOT_AVAILABLE for layer in layers)
    parts = ", ".join(f"{number} {precision}" for precision, number in precisions.most_common())
    return [("kernels", f"{len(layers)}: {parts}")]


def kernel_rows(layers: Sequence[Layer], *, is_all: bool) -> list[tuple[str, ...]]:
    """Return the rows of the table, in the order of execution."""
    shown = layers if is_all else layers[:_MOST_ROWS]
    return [
        (
            _label(layer),
            printable(layer.kind),
            layer.precision,
            layer.output,
            _cut(printable(layer.tactic), _TACTIC_LENGTH),
        )
        for layer in shown
    ]


def kernels_left_out(layers: Sequence[Layer], *, is_all: bool) -> str:
    """Say how many kernels the table does not show; "" when none."""
    left = 0 if is_all else len(layers) - _MOST_ROWS
    return f"and {count(left, 'more kernel')}: edgedeploy inspect with --layers shows all" if left > 0 else ""


def receipt_facts(receipt: EngineReceipt | None) -> list[tuple[str, str]]:
    """Return where and how an engine was built."""
    if receipt is None:
        return []
    tied = receipt.fingerprint
    where = ", ".join(
        part
        for part in (
            tied.gpu,
            f"compute capability {tied.compute_capability}",
            f"TensorRT {tied.tensorrt}",
            f"driver for CUDA {tied.driver}" if tied.driver else "",
            f"JetPack {tied.jetpack}" if tied.jetpack else "",
        )
        if part
    )
    typing = "precisions from the graph" if receipt.is_typed else f"precisions by flags ({', '.join(receipt.flags)})"
    workspace = format_bytes(receipt.workspace_bytes) if receipt.workspace_bytes else NOT_AVAILABLE
    facts = [("tied to", where), ("built", f"on {receipt.device}, {typing}, workspace {workspace}")]
    if receipt.timing_cache_sha256:
        facts.append(("timing cache", receipt.timing_cache_sha256))
    for number, one in enumerate(receipt.builds, 1):
        text = f"{one.sha256[:12]}, {format_bytes(one.size_bytes)}, in {format_duration(one.seconds)}"
        if one.p50_s is not None:
            text += f", p50 {format_duration(one.p50_s)}"
        if one.largest_difference:
            text += f", answers {one.largest_difference:.1g} from the chosen one's"
        facts.append((f"engine {number}", text + (", chosen" if one.is_chosen and len(receipt.builds) > 1 else "")))
    return facts


def _label(layer: Layer) -> str:
    """Name a kernel by the model's nodes that it computes; that it rounds, its types say."""
    nodes = [node for node in layer.nodes if not node.endswith(_ROUNDING)] or [layer.name]
    more = f" +{len(nodes) - _NODES_NAMED}" if len(nodes) > _NODES_NAMED else ""
    return " + ".join(printable(node) for node in nodes[:_NODES_NAMED]) + more


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
