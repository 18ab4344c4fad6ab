"""What quantizing each layer costs, and what layers left in float give: accuracy, size, latency."""

from __future__ import annotations

from edgedeploy.documents import Record

# History of edgedeploy.sensitivity:
#   1 (0.2.0)  first version
FORMAT = "edgedeploy.sensitivity/1"


class LayerSensitivity(Record, frozen=True, kw_only=True):
    """What quantizing one node alone costs.

    Attributes:
        sqnr_db: the outputs' ratio of signal to quantization noise, on calibration samples.
        float_bytes: how much more the model takes when this node's weights stay float.
    """

    node: str
    sqnr_db: float
    float_bytes: int


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


class SensitivityCurve(Record, frozen=True, kw_only=True):
    """What leaving more and more layers in float gives.

    Attributes:
        layers: each alone, most sensitive first.
        points: no layer left in float, then one layer more at each point, by noise for each byte.
    """

    layers: tuple[LayerSensitivity, ...]
    points: tuple[PlanPoint, ...]


class PrecisionPlan(Record, frozen=True, kw_only=True):
    """The layers left in float that were found to meet a budget.

    Attributes:
        layers: each alone, most sensitive first.
        curve: what was measured: no layer left in float, then one layer more at each point until the budget was met.
        chosen: the point that the plan takes, the curve's last.
    """

    budget_db: float
    layers: tuple[LayerSensitivity, ...]
    curve: tuple[PlanPoint, ...]
    chosen: PlanPoint


class SensitivityStep(Record, frozen=True, kw_only=True):
    """One more layer left in float, on top of those of the steps before.

    Attributes:
        left: the nodes that this step leaves; empty for the first step, where all layers are quantized. More than one
            where a layer is read by layers in float only.
        gain_db: against the step before, 0.0 for the first.
        size_bytes: of the written .onnx.
        latency_ratio: to fp32, measured on this machine; None where the target is not this machine.
    """

    left: tuple[str, ...]
    sqnr_db: float
    gain_db: float
    size_bytes: int
    latency_ratio: float | None


class Sensitivity(Record, frozen=True, kw_only=True):
    """How accuracy, size and latency change as more layers stay float.

    Attributes:
        calibration: the set that everything was measured on.
        method: how the table was made.
        fp32_bytes: of the float .onnx.
        layers: each alone, most sensitive first.
        timing: how the latency ratios were measured, or why they were not.
    """

    model: str
    target: str
    backend: str
    calibration: str
    samples: int
    method: str
    fp32_bytes: int
    layers: tuple[LayerSensitivity, ...]
    steps: tuple[SensitivityStep, ...]
    timing: str
