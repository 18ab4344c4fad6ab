"""Outputs and labels → one score per sample. Pure: no I/O, no clock, no randomness."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgedeploy.documents import closest
from edgedeploy.errors import ModelError, UsageError

if TYPE_CHECKING:
    import numpy as np

METRICS = ("top1", "top5", "mae")
# What is right or wrong, sample by sample, of a row of class scores.
CLASSIFYING = ("top1", "top5")


def predictions(metric: str, output: np.ndarray[Any, Any]) -> tuple[int, ...] | None:
    """Return the arg-max of each sample; None where the metric knows no classes, or the output has no row of scores.

    >>> import numpy as np
    >>> predictions("top1", np.array([[0.1, 0.9], [0.8, 0.2]]))
    (1, 0)
    """
    import numpy as np

    values = np.asarray(output)
    if metric not in CLASSIFYING or not len(values) or values[0].size != values.shape[-1]:
        return None
    rows = values.reshape(len(values), -1)
    if np.issubdtype(rows.dtype, np.floating) and not np.isfinite(rows).all():
        return None
    return tuple(int(best) for best in rows.argmax(axis=1))  # the first of equals, as in `score`


def class_labels(metric: str, labels: np.ndarray[Any, Any] | None) -> tuple[int, ...] | None:
    """Return the true class of each sample; None where the metric knows no classes."""
    return None if labels is None or metric not in CLASSIFYING else tuple(int(label) for label in labels)


def score(metric: str, output: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> tuple[float, ...]:
    """Return one score per sample.

    Args:
        metric: "top1" or "top5": 1.0 when the label is among the 1 or 5 largest of the last axis, else 0.0; "mae": the
            mean absolute error of the sample, smaller is better.
        output: shape (samples, ...); for top1 and top5 (samples, classes) after dropping axes of length 1.
        labels: shape (samples,) of class numbers, or for mae anything of output's shape.

    Raises:
        UsageError: unknown metric, or labels that do not fit the output.
        ModelError: the output holds NaN: a NaN is never an arg-max.

    >>> import numpy as np
    >>> score("top1", np.array([[0.1, 0.9], [0.8, 0.2]]), np.array([1, 1]))
    (1.0, 0.0)
    """
    import numpy as np

    if metric not in METRICS:
        raise UsageError(f"there is no metric {metric!r}{closest(metric, METRICS)} (known: {', '.join(METRICS)})")
    if len(output) != len(labels):
        raise UsageError(f"{len(output)} outputs cannot be scored against {len(labels)} labels")
    values = np.asarray(output, dtype=np.float64)
    if not np.isfinite(values).all():
        first = int(np.argmax(~np.isfinite(values.reshape(len(values), -1)).all(axis=1)))
        raise ModelError(f"the output for sample {first} is not finite (NaN or infinity); the artifact is broken")
    if metric == "mae":
        expected = np.asarray(labels, np.float64).reshape(len(values), -1)
        answered = values.reshape(len(values), -1)
        if expected.shape != answered.shape:
            raise UsageError(
                f"labels of {expected.shape[1]} numbers a sample do not fit outputs of {answered.shape[1]}"
            )
        errors = np.abs(answered - expected)
        return tuple(float(error) for error in errors.mean(axis=1))
    classes = values.reshape(len(values), -1) if values[0].size == values.shape[-1] else None
    if classes is None or labels.ndim != 1:
        raise UsageError(f"{metric} needs one row of class scores a sample; the output has shape {output.shape}")
    if labels.min() < 0 or labels.max() >= classes.shape[1]:
        raise UsageError(
            f"the labels span {labels.min()} to {labels.max()}, but the output has {classes.shape[1]} classes"
        )
    count = min(1 if metric == "top1" else 5, classes.shape[1])
    # Stable order, so that equal scores are ranked alike on every machine.
    best = np.argsort(-classes, axis=1, kind="stable")[:, :count]
    return tuple(float(hit) for hit in (best == labels[:, None]).any(axis=1))
