"""Task metrics: outputs and labels → one figure, with a score per sample where there is one. No randomness."""

from __future__ import annotations

import contextlib
import io
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edgedeploy.documents import closest
from edgedeploy.errors import BackendMissing, ModelError, UsageError
from edgedeploy.judge.scores import score

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

BuiltIn = Literal[
    "top1", "top5", "mae", "mse", "cosine", "f1_macro", "f1_micro", "f1_binary", "auc", "eer", "map", "map50"
]
BUILT_IN: tuple[BuiltIn, ...] = typing.get_args(BuiltIn)
_SMALLER_IS_BETTER = ("mae", "mse", "eer")
# What is a share of something, so that a loss of it may be written in points.
RATES = ("top1", "top5", "f1_macro", "f1_micro", "f1_binary", "auc", "eer", "map", "map50")
_DETECTION = ("boxes", "scores", "labels")
# The label array that belongs to no output in particular.
ONLY = ""


@dataclass(frozen=True, slots=True)
class MetricChoice:
    """A metric as a person named it: NAME, NAME@OUTPUT, or NAME@OUTPUT,OUTPUT for those that read several.

    Attributes:
        text: as written.
        name: a built-in metric, or "package.module:function".
        outputs: the outputs that it reads; empty: the only one, or for map the three named boxes, scores and labels.
    """

    text: str
    name: str
    outputs: tuple[str, ...] = ()

    @property
    def is_function(self) -> bool:
        """Whether it is the person's own."""
        return ":" in self.name


@dataclass(frozen=True, slots=True)
class Scored:
    """What a metric says.

    Attributes:
        scores: one per sample; None where the metric exists for the whole set only.
    """

    value: float
    scores: tuple[float, ...] | None = None


Function = Callable[[Any, Any], Any]


def metric_from_text(text: str) -> MetricChoice:
    """Parse a metric's name; raises UsageError with the likely intended one.

    >>> metric_from_text("top1@logits").outputs
    ('logits',)
    """
    name, at, rest = text.partition("@")
    outputs = tuple(rest.split(",")) if at else ()
    if at and not all(outputs):
        raise UsageError(f"--metric {text} names no output after the @; write for example top1@logits")
    if ":" in name:
        module, _, function = name.partition(":")
        if not all(part.isidentifier() for part in [*module.split("."), *function.split(".")]):
            raise UsageError(f"--metric {text} is not of the form package.module:function")
    elif name not in BUILT_IN:
        # The part of a name that people leave out: "f1" for f1_macro.
        longer = [one for one in BUILT_IN if name and one.startswith(name)]
        hint = f'; did you mean "{longer[0]}"?' if longer else closest(name, BUILT_IN)
        raise UsageError(
            f"there is no metric {name!r}{hint} (known: {', '.join(BUILT_IN)}, or package.module:function)"
        )
    elif name in ("map", "map50") and at and len(outputs) != 3:
        raise UsageError(f"--metric {text}: {name} reads three outputs; write {name}@BOXES,SCORES,LABELS")
    elif name not in ("map", "map50") and len(outputs) > 1:
        raise UsageError(f"--metric {text}: {name} reads one output")
    return MetricChoice(text, name, outputs)


def outputs_of(metric: MetricChoice, known: Sequence[str], default: str = "") -> tuple[str, ...]:
    """Return the names of the outputs that a metric reads.

    Args:
        metric: what was asked for.
        known: the model's outputs.
        default: the one to read where the metric names none; "": the only one.

    Raises:
        UsageError: no such output, or several to choose from.
    """
    if metric.name in ("map", "map50") and not metric.outputs:
        wanted: tuple[str, ...] = _DETECTION
    else:
        wanted = metric.outputs or ((default,) if default else ())
    listed = ", ".join(known)
    for name in wanted:
        if name not in known:
            raise UsageError(
                f"metric {metric.text} reads the output {name!r}, which the model does not have"
                f"{closest(name, known)} (it has: {listed}); name it as in {metric.name}@OUTPUT"
            )
    if not wanted and len(known) != 1:
        raise UsageError(
            f"the model has {len(known)} outputs ({listed}); say which one {metric.name} judges: --metric "
            f"{metric.name}@{known[0]}, or --output {known[0]} for all metrics"
        )
    return wanted or tuple(known)


def is_larger_better(metric: MetricChoice, function: Function | None = None) -> bool:
    """Say which way a metric points; a function's attribute `larger_is_better` says it, and True is assumed."""
    if metric.is_function:
        return bool(getattr(function, "larger_is_better", True))
    return metric.name not in _SMALLER_IS_BETTER


def evaluate(
    metric: MetricChoice, outputs: Mapping[str, Array], labels: Mapping[str, Array], function: Function | None = None
) -> Scored:
    """Score a model's outputs against labels.

    Args:
        metric: what to compute. top1, top5, mae: `judge.scores`. mse, cosine: mean squared error, and cosine similarity
            with the label, of each sample. f1_*: scikit-learn's F1 of the arg-max (or of integer outputs as they are).
            auc, eer: two classes, from one score a sample, or the difference of two. map, map50: COCO's average
            precision, over IoU 0.50:0.95 or at 0.50, of boxes (samples, most, 4) with corners x1, y1, x2, y2, and
            scores and labels (samples, most); a row without a positive score or with a negative label is padding, and
            at most 100 detections a sample count.
        outputs: the outputs that it reads, in its order, first axis = sample.
        labels: "" → the set's `labels`; output name → its `labels.<output>`, which come first. For map: "boxes",
            laid out like the outputs, and "classes", (samples, most) class numbers, -1 where a sample has fewer.
        function: (outputs, labels) → a number, or one for each sample. It gets the array of a single output, or a
            dictionary of several; likewise labels: the array, or a dictionary where the set has several.

    Raises:
        UsageError: labels that are missing or do not fit; a function that fails.
        ModelError: an output is NaN or infinite.
        BackendMissing: scikit-learn or pycocotools is not installed.
    """
    for name, values in outputs.items():
        _demand_finite(name, values)
    if metric.is_function:
        assert function is not None, "the caller has imported it"
        return _of_function(metric, function, outputs, labels)
    if metric.name in ("map", "map50"):
        return Scored(_average_precision(metric.name, list(outputs.values()), labels))
    ((name, output),) = outputs.items()
    truth = labels_for(name, labels)
    if len(output) != len(truth):
        raise UsageError(f"{len(output)} outputs {name!r} cannot be scored against {len(truth)} labels")
    if metric.name in ("top1", "top5", "mae"):
        return _mean_of(score(metric.name, output, truth))
    if metric.name in ("mse", "cosine"):
        return _mean_of(_regression(metric.name, output, truth))
    if metric.name in ("auc", "eer"):
        return Scored(_detection_error(metric.name, output, truth))
    return Scored(_f1(metric.name.removeprefix("f1_"), output, truth))


def labels_for(output: str, labels: Mapping[str, Array]) -> Array:
    """Return the labels of one output: its own, or those of the set."""
    for name in (output, ONLY):
        if name in labels:
            return labels[name]
    held = ", ".join(f"labels.{name}" if name else "labels" for name in labels) or "none"
    raise UsageError(
        f"the evaluation set has no labels for output {output!r} (it has: {held}); save them as `labels` or "
        f"`labels.{output}`"
    )


def _mean_of(scores: Sequence[float]) -> Scored:
    return Scored(sum(scores) / len(scores), tuple(scores))


def _demand_finite(name: str, values: Array) -> None:
    import numpy as np

    if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
        first = int(np.argmax(~np.isfinite(values.reshape(len(values), -1)).all(axis=1)))
        raise ModelError(f"output {name!r} is NaN or infinite for sample {first}, so no metric can be computed from it")


def _regression(name: str, output: Array, truth: Array) -> tuple[float, ...]:
    import numpy as np

    answered = np.asarray(output, np.float64).reshape(len(output), -1)
    expected = np.asarray(truth, np.float64).reshape(len(truth), -1)
    if answered.shape != expected.shape:
        raise UsageError(
            f"labels of {expected.shape[1]} numbers a sample do not fit outputs of {answered.shape[1]}; {name} "
            f"compares number with number"
        )
    if name == "mse":
        return tuple(float(error) for error in ((answered - expected) ** 2).mean(axis=1))
    norms = np.linalg.norm(answered, axis=1) * np.linalg.norm(expected, axis=1)
    products = (answered * expected).sum(axis=1)
    # Two zero vectors agree; one zero vector has no direction to agree in.
    alike = (answered == expected).all(axis=1).astype(np.float64)
    return tuple(float(one) for one in np.where(norms > 0, products / np.where(norms > 0, norms, 1.0), alike))


def _class_numbers(name: str, truth: Array) -> Array:
    import numpy as np

    flat = truth.reshape(len(truth), -1)
    if flat.shape[1] != 1 or not (np.issubdtype(truth.dtype, np.integer) or truth.dtype == np.bool_):
        raise UsageError(f"{name} needs one class number a sample; the labels have shape {truth.shape}, {truth.dtype}")
    numbers: Array = flat[:, 0].astype(np.int64)
    return numbers


def _f1(average: str, output: Array, truth: Array) -> float:
    import numpy as np

    expected = _class_numbers(f"f1_{average}", truth)
    rows = output.reshape(len(output), -1)
    if rows.shape[1] == 1 and np.issubdtype(output.dtype, np.integer):
        answered = rows[:, 0].astype(np.int64)
    elif rows.shape[1] > 1 and rows.shape[1] == output.shape[-1]:
        if expected.min() < 0 or expected.max() >= rows.shape[1]:
            raise UsageError(
                f"the labels span {expected.min()} to {expected.max()}, but the output has {rows.shape[1]} classes"
            )
        answered = rows.argmax(axis=1)
    else:
        raise UsageError(
            f"f1_{average} needs a row of class scores, or a class number, a sample; the output has shape "
            f"{output.shape}, {output.dtype}. A single score has no threshold of its own: use auc or eer, or a "
            f"package.module:function with yours"
        )
    if average == "binary" and not set(np.unique([*expected, *answered])) <= {0, 1}:
        raise UsageError("f1_binary needs the classes 0 and 1; use f1_macro or f1_micro for more")
    return float(_sklearn().f1_score(expected, answered, average=average, zero_division=0.0))


def _detection_error(name: str, output: Array, truth: Array) -> float:
    """Return the area under the ROC curve, or the equal error rate.

    Source: ISO/IEC 19795-1:2021, the error rate at which false matches and false non-matches are equally frequent; the
    two rates are interpolated linearly between neighbouring thresholds of the ROC curve.
    """
    import numpy as np

    expected = _class_numbers(name, truth)
    rows = np.asarray(output, np.float64).reshape(len(output), -1)
    if rows.shape[1] > 2:
        raise UsageError(
            f"{name} needs one score a sample, or two class scores; the output has {rows.shape[1]}. For more classes "
            f"give a package.module:function that says how they are averaged"
        )
    if set(np.unique(expected)) != {0, 1}:
        raise UsageError(f"{name} needs labels 0 and 1, and samples of both; found {sorted(set(expected.tolist()))}")
    scores = rows[:, -1] - rows[:, 0] if rows.shape[1] == 2 else rows[:, 0]
    if name == "auc":
        return float(_sklearn().roc_auc_score(expected, scores))
    false_positive, true_positive, _ = _sklearn().roc_curve(expected, scores, drop_intermediate=False)
    gap = (1 - true_positive) - false_positive  # falls from 1 to -1
    after = int(np.argmax(gap <= 0))
    before = after - 1
    share = gap[before] / (gap[before] - gap[after])
    return float(false_positive[before] + share * (false_positive[after] - false_positive[before]))


def _average_precision(name: str, outputs: Sequence[Array], labels: Mapping[str, Array]) -> float:
    """Return COCO's average precision, computed by pycocotools."""
    import numpy as np

    boxes, scores, classes = outputs
    if "boxes" not in labels or "classes" not in labels:
        raise UsageError(
            f"{name} needs the arrays labels.boxes (samples, most, 4: corners x1, y1, x2, y2) and labels.classes "
            f"(samples, most: -1 where a sample has fewer objects) in the evaluation set"
        )
    truth_boxes, truth_classes = labels["boxes"], labels["classes"]
    _demand_boxes("the outputs", boxes, classes, scores)
    _demand_boxes("the labels", truth_boxes, truth_classes)
    if len(boxes) != len(truth_boxes):
        raise UsageError(f"{len(boxes)} samples of boxes cannot be scored against {len(truth_boxes)} of labels")
    wanted = [(sample, place) for sample, place in np.argwhere(truth_classes >= 0)]
    if not wanted:
        raise UsageError(f"labels.classes holds no object (all are negative), so {name} is not defined")
    sizes = truth_boxes[..., 2:] - truth_boxes[..., :2]
    if any((sizes[place] < 0).any() for place in wanted):
        raise UsageError("labels.boxes holds a box whose second corner lies before its first; save x1, y1, x2, y2")
    found = [(sample, place) for sample, place in np.argwhere((classes >= 0) & (scores > 0))]
    if not found:
        return 0.0
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ModuleNotFoundError as error:
        raise _missing("pycocotools", name) from error
    truth = COCO()
    numbers = {int(truth_classes[place]) for place in wanted} | {int(classes[place]) for place in found}
    truth.dataset = {
        "info": {},
        "images": [{"id": sample} for sample in range(len(boxes))],
        "categories": [{"id": number} for number in sorted(numbers)],
        "annotations": [
            {
                # From 1: pycocotools takes 0 for "not matched".
                "id": index,
                "image_id": int(place[0]),
                "category_id": int(truth_classes[place]),
                "bbox": _corner_and_size(truth_boxes[place]),
                "area": float(np.prod(sizes[place], dtype=np.float64)),
                "iscrowd": 0,
            }
            for index, place in enumerate(wanted, 1)
        ],
    }
    answers = [
        {
            "image_id": int(place[0]),
            "category_id": int(classes[place]),
            "bbox": _corner_and_size(boxes[place]),
            "score": float(scores[place]),
        }
        for place in found
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        truth.createIndex()
        judged = COCOeval(truth, truth.loadRes(answers), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return float(judged.stats[0 if name == "map" else 1])


def _demand_boxes(whose: str, boxes: Array, *others: Array) -> None:
    if boxes.ndim != 3 or boxes.shape[2] != 4 or any(other.shape != boxes.shape[:2] for other in others):
        shapes = ", ".join(str(array.shape) for array in (boxes, *others))
        raise UsageError(
            f"{whose} for average precision have the shapes {shapes}; boxes are (samples, most, 4), classes and "
            f"scores (samples, most)"
        )


def _corner_and_size(corners: Array) -> list[float]:
    x1, y1, x2, y2 = (float(value) for value in corners)
    return [x1, y1, x2 - x1, y2 - y1]


def _of_function(
    metric: MetricChoice, function: Function, outputs: Mapping[str, Array], labels: Mapping[str, Array]
) -> Scored:
    import numpy as np

    first = next(iter(outputs.values()))
    given: Any = first if len(outputs) == 1 else dict(outputs)
    own = labels.get(next(iter(outputs))) if len(outputs) == 1 else None
    truth: Any = own if own is not None else labels[ONLY] if set(labels) == {ONLY} else dict(labels)
    try:
        answer = np.asarray(function(given, truth))
        values = answer.astype(np.float64)
    except Exception as error:  # the person's function may fail in any way
        raise UsageError(f"the metric {metric.name} failed: {type(error).__name__}: {error}") from error
    if values.shape not in ((), (len(first),)):
        raise UsageError(
            f"the metric {metric.name} returned an array of shape {values.shape}; return one number, or one for each "
            f"of the {len(first)} samples"
        )
    if not np.isfinite(values).all():
        raise UsageError(f"the metric {metric.name} returned NaN or infinity; return finite numbers")
    return Scored(float(values)) if values.ndim == 0 else _mean_of(tuple(float(value) for value in values))


def _sklearn() -> Any:
    try:
        import sklearn.metrics
    except ModuleNotFoundError as error:
        raise _missing("scikit-learn", "f1, auc and eer") from error
    return sklearn.metrics


def _missing(package: str, what: str) -> BackendMissing:
    return BackendMissing(f"{package} is not installed here, and {what} needs it; pip install 'edgedeploy[metrics]'")
