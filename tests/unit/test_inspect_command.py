"""`edgedeploy inspect`: what is asked for reaches the pipeline, and what comes back is printed."""

import json

import pytest
from click.testing import CliRunner

from edgedeploy import pipeline
from edgedeploy.cli.building import inspect_command

from .test_render_compression import PRUNED, make_layer, make_model, make_report


@pytest.fixture
def asked(monkeypatch):
    """Let the pipeline return a model with 30 layers; return what it was called with."""
    calls = {}
    report = make_report([make_layer(f"block.{index}", (8, 8)) for index in range(30)], statements=PRUNED.statements)

    def inspect(model, **options):
        calls.update(options, model=model)
        return make_model(report)

    monkeypatch.setattr(pipeline, "inspect", inspect)
    return calls


def test_the_dense_reference_reaches_the_pipeline(asked):
    done = CliRunner().invoke(inspect_command, ["pruned.onnx", "--reference", "dense.onnx", "-q"])
    assert done.exit_code == 0, done.output
    assert (asked["model"], asked["reference"]) == ("pruned.onnx", "dense.onnx")
    CliRunner().invoke(inspect_command, ["pruned.onnx", "-q"])
    assert asked["reference"] is None


@pytest.mark.parametrize(("options", "rows"), [([], 20), (["--layers"], 30), (["--no-layers"], 0)])
def test_layers_are_the_largest_all_or_none(asked, options, rows):
    done = CliRunner().invoke(inspect_command, ["model.onnx", "-q", *options])
    assert sum(line.startswith(" block.") for line in done.output.splitlines()) == rows
    assert ("--layers shows all" in done.output) == (rows == 20)
    assert "pruning masks in 2 layers" in done.output


def test_json_has_every_layer_and_statement(asked):
    document = json.loads(CliRunner().invoke(inspect_command, ["model.onnx", "-q", "--json"]).output)
    compression = document["compression"]
    assert len(compression["layers"]) == 30
    assert compression["layers"][0]["weights"] == {
        "storage": "float32",
        "bits": 32,
        "is_symmetric": None,
        "scales": "",
        "is_dynamic": False,
    }
    assert [one["onnx"] for one in compression["statements"]] == ["kept", "kept"]
