"""How the forms of one model compare on the same samples: outputs, task metrics, and layers."""

from __future__ import annotations

from edgedeploy.documents import Record
from edgedeploy.records.model import Fidelity

# History of edgedeploy.verification:
#   1 (0.2.0)  first version
FORMAT = "edgedeploy.verification/1"


class Form(Record, frozen=True, kw_only=True):
    """One form of the model.

    Attributes:
        name: what tables call it: "PyTorch", "fp32 ONNX", "artifact".
        detail: what exactly was run, and how.
    """

    name: str
    detail: str


class PairedScores(Record, frozen=True, kw_only=True):
    """The same samples, scored in two forms.

    Attributes:
        lost: samples that score worse in the candidate.
        gained: samples that score better in it.
    """

    reference: str
    candidate: str
    lost: int
    gained: int


class MetricValues(Record, frozen=True, kw_only=True):
    """One task metric of every form.

    Attributes:
        metric: as it was asked for.
        outputs: the outputs that it judges.
        values: form → value.
        pairs: each form against the first; empty where the metric has no score for a single sample.
    """

    metric: str
    outputs: tuple[str, ...]
    larger_is_better: bool
    values: dict[str, float]
    pairs: tuple[PairedScores, ...] = ()


class LayerError(Record, frozen=True, kw_only=True):
    """One tensor that exists under the same name in both forms.

    Attributes:
        tensor: its name.
        operator: of the node that makes it in the reference.
        sqnr_db: 10 log10(sum reference² / sum error²) over all samples; None when the error is exactly zero.
        drop_db: how much lower that ratio is than the lowest of the compared tensors that it is computed from, ratios
            above 50 dB (and exact tensors, and the model's inputs) counting as 50 dB; negative where the error shrinks.
    """

    tensor: str
    operator: str
    max_abs: float
    sqnr_db: float | None
    drop_db: float


class LayerComparison(Record, frozen=True, kw_only=True):
    """Two forms compared tensor by tensor, in the order of the graph.

    Attributes:
        not_compared: tensors of the reference that the candidate does not have: fused, renamed or removed.
        jump: the first of the tensors with the largest drop, if that is 3 dB or more; "" when no layer adds more noise
            than it inherits.
    """

    reference: str
    candidate: str
    samples: int
    layers: tuple[LayerError, ...]
    not_compared: int
    jump: str


class Verification(Record, frozen=True, kw_only=True):
    """What `verify` found.

    Attributes:
        subject: the model or artifact, as the person named it.
        forms: the first is the reference of all others.
        fidelity: one record for each pair that was compared.
        unmet: a sentence for each limit of the person's that is not met.
        notes: what a reader of the figures should know.
    """

    format: str = FORMAT
    subject: str
    samples: int
    sample_source: str
    is_synthetic: bool
    forms: tuple[Form, ...]
    fidelity: tuple[Fidelity, ...]
    metrics: tuple[MetricValues, ...] = ()
    layers: LayerComparison | None = None
    unmet: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    edgedeploy: str
