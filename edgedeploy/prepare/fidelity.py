"""How far a converted model lies from its reference: streamed over batches, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.errors import FidelityError
from edgedeploy.records.model import Fidelity, OutputFidelity

Tensors = Mapping[str, NDArray[Any]]
Run = Callable[[Tensors], Tensors]

# Answers of a reference that are kept for the next comparison, in bytes; beyond, they are computed again.
_MOST_ANSWERS = 64 * 2**20


def compare(
    reference: Run, candidate: Run, batches: Iterable[Tensors], *, names: tuple[str, str], sample_source: str
) -> Fidelity:
    """Run both models on the same batches and compare every output.

    Args:
        reference: inputs → outputs of the model that is right by definition.
        candidate: inputs → outputs of the converted model.
        batches: inputs; only one batch is held at a time.
        names: what to call reference and candidate in the record.
        sample_source: name of the data set.

    Raises:
        FidelityError: the outputs differ in name or shape, or the candidate answers NaN or infinity where the reference
            does not.
    """
    sums: dict[str, _Sums] = {}
    samples = 0
    for batch in batches:
        expected, actual = reference(batch), candidate(batch)
        if set(expected) != set(actual):
            raise FidelityError(
                f"{names[1]} has the outputs {', '.join(actual)} and {names[0]} has {', '.join(expected)}"
            )
        for output, values in expected.items():
            sums.setdefault(output, _Sums(output, names)).add(values, actual[output])
        samples += len(next(iter(batch.values())))
    if not samples:
        raise FidelityError(f"{names[1]} cannot be compared with {names[0]}: there are no samples")
    for total in sums.values():
        total.demand_numbers(sample_source)
    return Fidelity(
        reference=names[0],
        candidate=names[1],
        samples=samples,
        sample_source=sample_source,
        outputs=tuple(total.result() for total in sums.values()),
    )


class Remembering:
    """Answers of a reference, which every comparison of the same samples needs again.

    Args:
        run: inputs → outputs of the reference.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._answers: list[Tensors] = []
        self._bytes = 0

    def over(self) -> Run:
        """Return what answers the same batches from the first on."""
        places = count()

        def answer(batch: Tensors) -> Tensors:
            place = next(places)
            if place < len(self._answers):
                return self._answers[place]
            made = self._run(batch)
            self._bytes += sum(value.nbytes for value in made.values())
            # Places would shift if one were left out, so that the first that does not fit is the last that is tried.
            if place == len(self._answers) and self._bytes <= _MOST_ANSWERS:
                self._answers.append(made)
            return made

        return answer


@dataclass(slots=True)
class _Sums:
    """What one output needs: enough sums to finish all figures, so that no sample is kept."""

    output: str
    names: tuple[str, str]
    max_abs: float = 0.0
    max_reference: float = 0.0
    products: float = 0.0
    reference_squares: float = 0.0
    candidate_squares: float = 0.0
    error_squares: float = 0.0
    is_empty: bool = True
    numbers: int = 0
    rows: int = 0
    equal_rows: int = 0

    def demand_numbers(self, sample_source: str) -> None:
        """Refuse an output that is NaN or infinite throughout: any two such outputs would agree."""
        if not self.numbers and not self.is_empty:
            raise FidelityError(
                f"output {self.output!r} of {self.names[0]} is nothing but NaN or infinity on the samples of "
                f"{sample_source}, so nothing can be compared; look for a division by zero or a logarithm of what is "
                f"not positive, or give --calibration with real samples"
            )

    def add(self, reference: NDArray[Any], candidate: NDArray[Any]) -> None:
        if reference.shape != candidate.shape:
            raise FidelityError(
                f"output {self.output!r} of {self.names[1]} has shape {candidate.shape} and of {self.names[0]} "
                f"{reference.shape}"
            )
        if reference.size == 0:
            return
        self.is_empty = False
        if reference.ndim >= 2 and reference.shape[-1] > 1:
            self.rows += math.prod(reference.shape[:-1])
            self.equal_rows += int(np.count_nonzero(reference.argmax(-1) == candidate.argmax(-1)))
        expected, actual = reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()
        # A masked score of -inf that stays -inf is right, and no number can be made of it.
        usable = np.isfinite(expected)
        same = (expected == actual) | (np.isnan(expected) & np.isnan(actual))
        if not (usable | same).all() or not np.isfinite(actual[usable]).all():
            raise FidelityError(
                f"output {self.output!r} of {self.names[1]} is NaN or infinite where that of {self.names[0]} is not, "
                f"or the other way round; the conversion broke the model"
            )
        expected, actual = expected[usable], actual[usable]
        self.numbers += expected.size
        if expected.size == 0:
            return
        error = actual - expected
        self.max_abs = max(self.max_abs, float(np.abs(error).max()))
        self.max_reference = max(self.max_reference, float(np.abs(expected).max()))
        self.products += float(expected @ actual)
        self.reference_squares += float(expected @ expected)
        self.candidate_squares += float(actual @ actual)
        self.error_squares += float(error @ error)

    def result(self) -> OutputFidelity:
        norms = math.sqrt(self.reference_squares) * math.sqrt(self.candidate_squares)
        # Two outputs of nothing but zeros agree; one of zeros and one of other values do not.
        cosine = min(1.0, self.products / norms) if norms else float(self.error_squares == 0)
        # The smallest normal float32 stands for a reference of zeros: the ratio stays a number that JSON can hold.
        floor = float(np.finfo(np.float32).tiny)
        return OutputFidelity(
            output=self.output,
            max_abs=self.max_abs,
            max_relative=self.max_abs / max(self.max_reference, floor),
            cosine=cosine,
            sqnr_db=sqnr_db(self.reference_squares, self.error_squares),
            argmax_agreement=self.equal_rows / self.rows if self.rows else None,
        )


def sqnr_db(reference_squares: float, error_squares: float) -> float | None:
    """Return the ratio of signal to quantization noise from both sums of squares; None without any error."""
    if error_squares == 0:
        return None
    floor = float(np.finfo(np.float32).tiny)
    return 10 * math.log10(max(reference_squares, floor) / error_squares)
