"""From Python, every verb takes a file or a folder as text too, and a model or an artifact as a Path."""

import inspect
from pathlib import Path

import numpy as np
import pytest

import edgedeploy
from edgedeploy import outcomes, pipeline
from edgedeploy.errors import UsageError

from .test_pipeline import RELEASE

VERBS = {*edgedeploy.__all__} - {"__version__"} | {"compare_precisions", "plan", "sensitivity", "write_reports"}


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_no_verb_asks_for_a_path_alone(verb):
    function = next(found for place in (pipeline, outcomes, edgedeploy) if (found := getattr(place, verb, None)))
    for parameter in inspect.signature(function).parameters.values():
        assert "Path" not in parameter.annotation.replace("AnyPath", ""), (verb, parameter)


def test_a_model_is_compiled_measured_and_judged_by_paths_in_text(model):
    np.savez("samples.npz", image=np.ones((4, 4), np.float32))
    common = {"target": "fake-board", "backend": "fake", "calibration": "samples.npz"}
    slow = pipeline.compile("tiny.onnx", options={"duration_us": 400.0}, output="build/slow", name="slow", **common)
    fast = pipeline.compile(Path("tiny.onnx"), options={"duration_us": 200.0}, output="build/fast", **common)
    assert (slow.folder, fast.artifact.name) == (Path("build/slow"), "tiny-fake-board-fake-fp32")
    assert pipeline.inspect("build/slow") == pipeline.inspect(Path("build/slow")) == slow.artifact
    _, stored = pipeline.bench("build/slow", visits=1, results="kept")
    assert stored.is_relative_to("kept")
    outcome = pipeline.gate(
        fast.folder, baseline=slow.folder, margins=["latency_p50=+20%"], max_blocks=6, results="kept"
    )
    assert outcome.verdict.decision == "PASS"
    outcomes.write_reports(outcome, junit="out/a.xml", markdown="out/a.md", html="out/a.html")
    assert sorted(path.name for path in Path("out").iterdir()) == ["a.html", "a.json", "a.md", "a.xml"]


def test_a_release_file_is_named_by_text(model):
    Path("tiny.toml").write_text(RELEASE)
    assert len(pipeline.plan("tiny.toml")) == len(pipeline.plan(Path("tiny.toml"))) == 4
    outcome = pipeline.run("tiny.toml", results="kept")
    assert outcome.verdict.decision == "PASS"
    assert all(Path(name).is_relative_to("kept") for name in outcome.runs)
    assert pipeline.init("new.toml") == Path("new.toml")
    with pytest.raises(UsageError, match="exists"):
        pipeline.init("new.toml")


def test_a_text_that_is_no_file_is_refused_like_a_path(model):
    for wrong in ("nowhere.npz", Path("nowhere.npz")):
        with pytest.raises(UsageError, match=r"nowhere\.npz does not exist"):
            pipeline.compile("tiny.onnx", target="fake-board", backend="fake", calibration=wrong)
