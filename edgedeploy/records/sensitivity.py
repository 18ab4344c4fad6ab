"""What quantizing each layer costs, and which layers are left in float to meet a budget."""

from __future__ import annotations

from edgedeploy.documents import Record


class LayerSensitivity(Record, frozen=True, kw_only=True):
    """The outputs' ratio of signal to quantization noise when one node alone is quantized, on calibration samples."""

    node: str
    sqnr_db: float


class PlanPoint(Record, frozen=True, kw_only=True):
    """What leaving some layers in float gives.

    Attributes:
        float_nodes: every node with weights that stays float, those included that only such nodes read.
        sqnr_db: of the worst output, on calibration samples, in the arithmetic of the written graph.
        size_bytes: of weights, scales and biases, without the rest of the file.
    """

    float_nodes: tuple[str, ...]
    sqnr_db: float
    size_bytes: int


class PrecisionPlan(Record, frozen=True, kw_only=True):
    """The smallest set of layers in float that was found to meet a budget.

    Attributes:
        layers: most sensitive first.
        curve: what was measured: no layer left in float, the most sensitive one, two ... until the budget was met.
        chosen: the point that the plan takes.
    """

    budget_db: float
    layers: tuple[LayerSensitivity, ...]
    curve: tuple[PlanPoint, ...]
    chosen: PlanPoint
