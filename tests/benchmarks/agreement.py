"""How far two sets of answers lie apart, sample by sample. Pure: arrays in, figures out."""

import numpy as np


def figures(actual, expected):
    """Return how far answers lie from the expected ones.

    Args:
        actual, expected: the same shape, first axis = sample; float.

    Returns:
        max_relative_error: the largest difference of any element in ratio to the largest expected one.
        sqnr_db: energy of the expected answers over that of the differences; None where nothing differs.
        cosine_mean, cosine_min: of the samples' answers as vectors.
        argmax_agreement: share of samples whose largest element is the same.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"the answers have the shape {actual.shape} and are compared with {expected.shape}")
    got, want = (values.reshape(len(values), -1).astype(np.float64) for values in (actual, expected))
    error = got - want
    cosines = cosine(got, want)
    return {
        "max_relative_error": float(np.abs(error).max() / np.abs(want).max()),
        "sqnr_db": float(10 * np.log10((want**2).sum() / noise)) if (noise := (error**2).sum()) else None,
        "cosine_mean": float(cosines.mean()),
        "cosine_min": float(cosines.min()),
        "argmax_agreement": float((got.argmax(1) == want.argmax(1)).mean()),
    }


def cosine(left, right):
    """Return the cosine of each row of two matrices; 1 where both are 0, 0 where one is, NaN where one is not finite."""
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    both_zero = (np.linalg.norm(left, axis=1) == 0) & (np.linalg.norm(right, axis=1) == 0)
    products = (left * right).sum(1)
    return np.where(both_zero, 1.0, products / np.where(norms == 0, 1.0, norms))


def paired(actual, expected, labels):
    """Return how many samples are classified rightly, and how many of them were lost and gained against `expected`."""
    now, was = (values.argmax(1) == labels for values in (actual, expected))
    return {
        "top1": float(now.mean()),
        "lost": int((was & ~now).sum()),
        "gained": int((now & ~was).sum()),
        "samples": len(labels),
    }
