"""Why one artifact is slower, or less accurate, than another: layer by layer, sample by sample."""

from __future__ import annotations

from typing import Literal

from edgedeploy.documents import Record
from edgedeploy.records.run import ArtifactReference
from edgedeploy.records.verification import LayerComparison

# History of edgedeploy.explanation:
#   1 (0.2.0)  first version
FORMAT = "edgedeploy.explanation/1"

# compute: what the model asks for. convert: between integers and floats, or float types. layout: values are laid down
# in another order. Of the latter two, what a runtime adds by itself; a model's own transposition computes.
LayerRole = Literal["compute", "convert", "layout"]
CauseKind = Literal["precision", "work", "fusion", "conversions", "layouts", "kernel", "appeared", "slower"]


class ProfiledLayer(Record, frozen=True, kw_only=True):
    """One layer of a runtime's own graph, timed while the runtime watched all of them.

    Attributes:
        name: the runtime's; kind: the runtime's word for what it computes.
        precision: what it computes on, "int8", "fp32"; "" where that is not known, or nothing is computed.
        nodes: of the model, which it computes together; empty where they are not known.
        tensors: of the model, which it makes; another runtime may name its layers by these.
        detail: how it lies in memory and which kernel was chosen, in the runtime's words.
        passes_s: seconds, one for each pass: the median of the pass's inferences.
    """

    name: str
    kind: str = ""
    role: LayerRole = "compute"
    precision: str = ""
    nodes: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    detail: str = ""
    passes_s: tuple[float, ...]


class Profile(Record, frozen=True, kw_only=True):
    """One side of an explanation.

    Attributes:
        cell: what people call it.
        runtime: name and version, as the device said.
        layers: in the order of execution; empty where the runtime does not say what single layers take.
        not_available: why there are none; "" where there are.
        whole_s: median of the inferences that nobody watched, one for each block.
    """

    cell: str
    artifact: ArtifactReference
    runtime: str
    layers: tuple[ProfiledLayer, ...] = ()
    not_available: str = ""
    whole_s: tuple[float, ...] = ()


class GroupDifference(Record, frozen=True, kw_only=True):
    """Layers of both sides that compute the same nodes of the model, and what they take on either side.

    Attributes:
        name: for people; "conv3 + relu3".
        nodes: of the model; empty for what a runtime added by itself.
        baseline_layers, candidate_layers: places in the layers of the two profiles; one may be empty.
        baseline_precision, candidate_precision: "int8", "fp32", "int8 + fp32"; "" where not known.
        baseline_macs, candidate_macs: multiply-accumulates of its nodes for one sample; None where not known.
        baseline_s, candidate_s: mean over the passes.
        difference_s: candidate less baseline, mean over the pairs of passes; positive is slower.
        low_s, high_s: its 95 % interval, of this group alone; None with less than two pairs.
        p: two-sided, against "there is no difference"; None with less than two pairs.
        is_proven: whether p holds within 5 % for all groups together (Holm).
        share: of the sum of all groups' differences; None where that sum is not proven to differ from zero.
        changes: what is known to be different, in words.
    """

    name: str
    role: LayerRole = "compute"
    nodes: tuple[str, ...] = ()
    baseline_layers: tuple[int, ...] = ()
    candidate_layers: tuple[int, ...] = ()
    baseline_precision: str = ""
    candidate_precision: str = ""
    baseline_macs: int | None = None
    candidate_macs: int | None = None
    baseline_s: float
    candidate_s: float
    difference_s: float
    low_s: float | None = None
    high_s: float | None = None
    p: float | None = None
    is_proven: bool = False
    share: float | None = None
    changes: tuple[str, ...] = ()


class Change(Record, frozen=True, kw_only=True):
    """A difference in seconds, candidate less baseline, with its 95 % interval; None with less than two pairs."""

    seconds: float
    low_s: float | None = None
    high_s: float | None = None


class Cause(Record, frozen=True, kw_only=True):
    """One reason, in words.

    Attributes:
        text: a sentence with its figures.
        groups: places in the groups of the explanation.
        difference: of its groups together; None where nothing was timed.
        share: as in GroupDifference.
    """

    kind: CauseKind
    text: str
    groups: tuple[int, ...] = ()
    difference: Change | None = None
    share: float | None = None
    is_proven: bool = False


class SpeedExplanation(Record, frozen=True, kw_only=True):
    """Why inferences of the candidate take longer, or shorter.

    Attributes:
        passes: pairs of passes in which every layer was timed, in the order A B, B A.
        groups: the largest difference first.
        layers: all groups together, while the runtime watched.
        whole: of inferences that nobody watched.
        baseline_overhead_s, candidate_overhead_s: the sum of all layers, watched, less a whole inference, unwatched.
        agrees: whether `layers` and `whole` are the same within their intervals; None where that cannot be told.
        causes: at most three, the largest first.
        counteracting: what took the other direction, in words; "" where nothing proven did.
        notes: what a reader of the figures should know.
    """

    baseline: Profile
    candidate: Profile
    passes: int
    groups: tuple[GroupDifference, ...] = ()
    layers: Change | None = None
    whole: Change | None = None
    baseline_overhead_s: float | None = None
    candidate_overhead_s: float | None = None
    agrees: bool | None = None
    causes: tuple[Cause, ...] = ()
    counteracting: str = ""
    notes: tuple[str, ...] = ()


class MovedSample(Record, frozen=True, kw_only=True):
    """A sample that the candidate answers worse.

    Attributes:
        index: its place in the evaluation set.
        label: its true class; None where it has none.
        baseline_class, candidate_class: what each side answers; None for a metric without classes.
        baseline_margin, candidate_margin: score of the true class less the largest other; for an error, that error.
        loss: how much worse the candidate is, in the same unit; positive is worse.
    """

    index: int
    label: int | None = None
    baseline_class: int | None = None
    candidate_class: int | None = None
    baseline_margin: float
    candidate_margin: float
    loss: float


class ClassMove(Record, frozen=True, kw_only=True):
    """One class of the evaluation set.

    Attributes:
        samples: that have it.
        baseline_right, candidate_right: how many of them each side answers rightly.
        lost, gained: answered rightly by the baseline only, and by the candidate only.
        p: exact McNemar, two-sided; is_proven: whether it holds within 5 % for all classes together (Holm).
    """

    label: int
    samples: int
    baseline_right: int
    candidate_right: int
    lost: int
    gained: int
    p: float
    is_proven: bool = False


class Flip(Record, frozen=True, kw_only=True):
    """Samples of one class whose answer changed from one class to another.

    Attributes:
        indices: of the first of them; samples: how many there are.
    """

    label: int
    baseline_class: int
    candidate_class: int
    samples: int
    indices: tuple[int, ...] = ()


class AccuracyExplanation(Record, frozen=True, kw_only=True):
    """Why the candidate answers worse.

    Attributes:
        metric: of the evaluation set.
        baseline_value, candidate_value: the metric; None without labels.
        layers: tensor by tensor, the baseline's graph as the reference; None where the artifacts are no ONNX graphs, or
            two different ones.
        causes: sentences, the most telling first.
        worst: the largest losses first.
        classes: those that moved, the largest loss first.
        flips: what each changed answer was and is, the most frequent first; only what the baseline had right.
    """

    dataset: str
    metric: str
    samples: int
    baseline_value: float | None = None
    candidate_value: float | None = None
    layers: LayerComparison | None = None
    causes: tuple[str, ...] = ()
    worst: tuple[MovedSample, ...] = ()
    classes: tuple[ClassMove, ...] = ()
    flips: tuple[Flip, ...] = ()
    notes: tuple[str, ...] = ()


class Explanation(Record, frozen=True, kw_only=True):
    """What `explain` found.

    Attributes:
        cell: the candidate's; baseline_cell: what it is compared with.
        metrics: of the gate that are explained ("latency_p50", "accuracy"); empty where somebody just asked.
        seconds: how long finding out took.
        notes: what could not be found out, and why.
    """

    format: str = FORMAT
    cell: str
    baseline_cell: str
    device: str
    metrics: tuple[str, ...] = ()
    speed: SpeedExplanation | None = None
    accuracy: AccuracyExplanation | None = None
    explained_utc: str
    seconds: float
    notes: tuple[str, ...] = ()
    edgedeploy: str
