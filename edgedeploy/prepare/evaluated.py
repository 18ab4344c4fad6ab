"""Single samples of an evaluation set that was measured with, read back from the cache where its inputs are kept."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What a digest may look like: it comes out of a run's file, and becomes the name of one of ours.
_DIGEST = re.compile(r"[0-9a-f]{64}")
# Of one input of one sample; a picture of more is not worth the memory.
_MOST_VALUES = 2**24


class EvaluatedSamples:
    """Gives samples of evaluation sets, one at a time: a set may be larger than the memory.

    Args:
        folder: where the inputs of evaluation sets are kept, named by their digests.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, Any] = {}

    def __call__(self, digest: str, index: int) -> Mapping[str, Any] | None:
        """Return input → values of one sample, first axis 1; None where the set is not at hand, or not that long."""
        from safetensors import SafetensorError

        held = self._held(digest)
        if held is None:
            return None
        found: dict[str, Any] = {}
        try:
            for name in held.keys():  # noqa: SIM118 - no dictionary: it has no __iter__
                values = held.get_slice(name)
                shape = values.get_shape()
                size = 1
                for length in shape[1:]:
                    size *= length
                if not shape or not 0 <= index < shape[0] or size > _MOST_VALUES:
                    return None
                found[name] = values[index : index + 1]
        except (SafetensorError, OSError, TypeError, AttributeError, KeyError):
            # Numpy knows no bfloat16 and no eight-bit floats, and says so in several ways; a picture is no must.
            return None
        return found or None

    def _held(self, digest: str) -> Any:
        """Return an open file, or None."""
        from safetensors import SafetensorError, safe_open

        if _DIGEST.fullmatch(digest) is None:
            return None
        if digest not in self._open:
            path = self._folder / f"{digest}.safetensors"
            try:
                self._open[digest] = safe_open(path, framework="numpy") if path.is_file() else None
            except (SafetensorError, OSError):
                self._open[digest] = None
        return self._open[digest]
