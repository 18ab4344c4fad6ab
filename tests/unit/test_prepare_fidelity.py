"""Fidelity figures: equal to their definitions, whatever the batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedeploy.errors import FidelityError
from edgedeploy.prepare.fidelity import compare

NAMES = ("reference", "candidate")


def compare_arrays(reference, candidate, size=3):
    parts = [{"x": np.arange(start, min(start + size, len(reference)))} for start in range(0, len(reference), size)]
    return compare(
        lambda batch: {"y": reference[batch["x"]]},
        lambda batch: {"y": candidate[batch["x"]]},
        parts,
        names=NAMES,
        sample_source="made",
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 12), noise=st.sampled_from([1e-6, 1e-2, 1.0]))
def test_figures_equal_their_definitions(seed, count, noise):
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal((count, 4)).astype(np.float32)
    candidate = (reference + noise * rng.standard_normal((count, 4))).astype(np.float32)
    fidelity = compare_arrays(reference, candidate)
    error = candidate.astype(np.float64) - reference.astype(np.float64)
    got = fidelity.outputs[0]
    assert fidelity.samples == count
    assert got.max_abs == pytest.approx(np.abs(error).max())
    assert got.max_relative == pytest.approx(np.abs(error).max() / np.abs(reference).max())
    a, b = reference.ravel().astype(np.float64), candidate.ravel().astype(np.float64)
    assert got.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert got.argmax_agreement == pytest.approx(np.mean(reference.argmax(1) == candidate.argmax(1)))
    if (error**2).sum() > 0:
        assert got.sqnr_db == pytest.approx(10 * np.log10((a**2).sum() / (error**2).sum()))


def test_equal_outputs_have_no_finite_ratio_and_full_agreement():
    values = np.ones((4, 3), np.float32)
    got = compare_arrays(values, values.copy()).outputs[0]
    assert (got.max_abs, got.sqnr_db, got.cosine, got.argmax_agreement) == (0.0, None, pytest.approx(1.0), 1.0)


def test_single_values_have_no_argmax():
    assert compare_arrays(np.ones((4, 1)), np.ones((4, 1))).outputs[0].argmax_agreement is None
    assert compare_arrays(np.ones(4), np.ones(4)).outputs[0].argmax_agreement is None


def test_a_reference_of_zeros_gives_finite_figures():
    got = compare_arrays(np.zeros((2, 3)), np.full((2, 3), 1e-3)).outputs[0]
    assert np.isfinite([got.max_relative, got.cosine, got.sqnr_db]).all()
    assert got.cosine == 0.0
    assert compare_arrays(np.zeros((2, 3)), np.zeros((2, 3))).outputs[0].cosine == 1.0


def test_masked_scores_that_stay_masked_are_right():
    reference = np.array([[1.0, -np.inf], [2.0, -np.inf]])
    assert compare_arrays(reference, reference.copy()).outputs[0].max_abs == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_a_number_in_the_candidate_alone_is_an_error(bad):
    reference = np.ones((2, 3))
    candidate = reference.copy()
    candidate[1, 2] = bad
    with pytest.raises(FidelityError, match="NaN or infinite"):
        compare_arrays(reference, candidate)
    with pytest.raises(FidelityError, match="NaN or infinite"):
        compare_arrays(candidate, reference)


def test_other_shapes_and_names_are_errors():
    with pytest.raises(FidelityError, match=r"shape \(3, 2\)"):
        compare_arrays(np.ones((3, 3)), np.ones((3, 2)))
    with pytest.raises(FidelityError, match="has the outputs b and reference has a"):
        compare(lambda _: {"a": np.ones(1)}, lambda _: {"b": np.ones(1)}, [{}], names=NAMES, sample_source="")
    with pytest.raises(FidelityError, match="no samples"):
        compare(lambda _: {}, lambda _: {}, [], names=NAMES, sample_source="")
