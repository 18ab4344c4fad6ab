"""The demo's dense network as an artifact for this machine."""

from pathlib import Path

from edgedeploy import pipeline
from edgedeploy.build import Built
from tests.benchmarks.__main__ import ROOT

EVALUATION = ROOT / "edgedeploy" / "demo" / "evaluation"


def demo_artifact(folder: Path) -> Built:
    """Compile it, or take it from the cache."""
    return pipeline.compile(
        "edgedeploy.demo.model:dense",
        weights=ROOT / "edgedeploy" / "demo" / "dense.safetensors",
        inputs=("image=batchx1x28x28",),
        output=folder / "dense",
    )
