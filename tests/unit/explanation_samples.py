"""Profiles with known causes, for the tests of explanations."""

import random

from edgedeploy.records.explanation import Profile, ProfiledLayer
from edgedeploy.records.run import ArtifactReference

REFERENCE = ArtifactReference(
    name="net",
    sha256="a" * 64,
    size_bytes=1000,
    key="b" * 64,
    model="net",
    target="host",
    backend="onnxruntime",
    precision="int8",
    options={},
)
NOISE = 0.01


def layer(name, level_s, *, nodes=None, kind="Conv", role="compute", precision="int8", seed=0, passes=8, tensors=()):
    """A layer that takes about `level_s` in every pass."""
    random_ = random.Random(f"{name} {level_s} {seed}")
    return ProfiledLayer(
        name=name,
        kind=kind,
        role=role,
        precision=precision,
        nodes=(name,) if nodes is None else nodes,
        tensors=tensors,
        passes_s=tuple(level_s * (1 + random_.gauss(0, NOISE)) for _ in range(passes)),
    )


def profile(cell, layers, *, overhead_s=0.0, not_available=""):
    """A side whose whole inferences take what its layers take, less what watching them costs."""
    total_s = sum(one.passes_s[0] for one in layers) - overhead_s
    return Profile(
        cell=cell,
        artifact=REFERENCE,
        runtime="onnxruntime 1.23",
        layers=tuple(layers),
        not_available=not_available,
        whole_s=(total_s,) * 8,
    )


def whole_differences_s(baseline, candidate):
    """One difference a block, with a little noise."""
    return [
        (after - before) * (1 + 0.01 * (number % 3 - 1))
        for number, (before, after) in enumerate(zip(baseline.whole_s, candidate.whole_s, strict=True))
    ]
