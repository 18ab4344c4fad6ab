"""What a person reads of an artifact: precision by count, trained scales, what is lost, notes; in text and in reports."""

import re

import pytest
from msgspec.structs import replace

from edgedeploy.arguments import parse_inputs
from edgedeploy.errors import UsageError
from edgedeploy.outcomes import lost_compression
from edgedeploy.records.artifact import LayerReport, Port
from edgedeploy.records.compression import KindStatement
from edgedeploy.records.survival import SurvivalEntry, SurvivalReport
from edgedeploy.render.compression import precision_facts, remaining_notes, survival_text
from edgedeploy.render.html import report_html
from edgedeploy.render.markdown import verdict_markdown
from edgedeploy.render.text import artifact_text

from .render_samples import make_artifact, make_artifacts, make_cell, make_runs, make_verdict

LOST = KindStatement(
    kind="static int8",
    layers=5,
    detail="FX graph mode, converted",
    onnx="kept",
    onnx_reason="integer weights in 5 of 5 layers",
    artifact="lost",
    artifact_reason="integer weights in 0 of 5 layers",
    notes=("nobody said whether it was trained",),
)


def an_artifact(**changes):
    made = make_artifact("candidate")
    statements = changes.pop("statements", ())
    return replace(made, compression=replace(made.compression, statements=statements), **changes)


def entry(tensor, *fates, change=0.0):
    stages = dict(zip(("canonical", "emitted", "artifact"), fates, strict=False))
    return SurvivalEntry(tensor=tensor, role="activation", scales=(0.5,), stages=stages, relative_change=change)


def test_what_runs_on_integers_and_in_float_is_counted_by_operator():
    layers = LayerReport(
        operators={},
        quantized=("QLinearConv a", "QLinearConv b", "QGemm c"),
        float_islands=tuple(f"Add {index}" for index in range(6)),
        expanded=("w",),
    )
    facts = dict(precision_facts(an_artifact(layers=layers)))
    assert facts["on integers"] == "3 nodes: 2 QLinearConv, 1 QGemm"
    assert facts["in float"] == "6 nodes: Add 0, Add 1, Add 2, Add 3 and 2 more"
    assert facts["widened"] == "1 weight tensor by the runtime to float32"


@pytest.mark.parametrize(("quantized", "floats"), [((), "everything"), (("QGemm a",), "nothing")])
def test_a_form_without_a_mixture_says_so(quantized, floats):
    facts = dict(precision_facts(an_artifact(layers=LayerReport(operators={}, quantized=quantized, float_islands=()))))
    assert facts["in float"] == floats
    assert "widened" not in facts


def test_each_scale_counts_once_by_the_worst_that_happened_to_it():
    report = SurvivalReport(
        entries=(
            entry("a", "kept", "kept", "kept"),
            entry("b", "kept", "re-scaled", "kept", change=0.25),
            entry("c", "kept", "kept", "folded"),
            entry("d", "re-scaled", "dropped", change=0.1),
        ),
        largest_relative_change=0.25,
    )
    assert survival_text(report) == (
        "1 kept, 1 folded, 1 re-scaled, 1 dropped (by 0.25 at most), of 4 that the source came with"
    )


def test_a_lost_compression_stands_first_and_reads_at_80_columns():
    artifact = an_artifact(statements=(LOST,), notes=("a note that is long enough to need more than one line " * 3,))
    text = artifact_text(artifact, color=False, width=80)
    lines = text.splitlines()
    assert lines[1].split() == ["lost", "static", "int8", "(accepted", "with", "--allow-loss)"]
    assert max(map(len, lines)) <= 80
    note = next(index for index, line in enumerate(lines) if line.startswith("- a note"))
    assert lines[note + 1].startswith("  ")
    assert "\x1b[31m  lost" in artifact_text(artifact, color=True, width=80)
    assert "lost" not in artifact_text(an_artifact(), color=False, width=80)


def test_fidelity_keeps_each_figure_on_the_line_of_its_output():
    text = artifact_text(make_artifact("candidate"), color=False, width=80)
    _, _, fidelity = text.partition("Fidelity on 64 samples of fashion-mnist")
    assert re.search(
        r"^int8 artifact with pytorch\n  scores +0\.41 +\S+ +0\.999981 +33\.2 dB +98\.40 %$", fidelity, re.M
    )


def test_notes_that_differ_in_a_name_are_one_note_and_statements_keep_theirs():
    notes = (
        "nobody said whether it was trained",
        *(f"the weights '{name}' are stored as bytes" for name in "abcdef"),
        "no name here",
    )
    assert remaining_notes(an_artifact(statements=(LOST,), notes=notes)) == [
        "the weights 'a', 'b', 'c', 'd' and 2 more are stored as bytes",
        "no name here",
    ]


def test_reports_show_what_became_of_the_compression_and_escape_it():
    hostile = replace(LOST, detail="<script>x</script> | y")
    artifacts = make_artifacts()
    name, artifact = next((name, one) for name, one in artifacts.items() if one.recipe.precision == "int8")
    artifacts[name] = replace(artifact, compression=replace(artifact.compression, statements=(hostile,)))
    page = report_html(make_verdict(), make_runs(), artifacts)
    assert "What became of the compression" in page
    assert '<span class="fate lost">lost</span>' in page
    assert "integer weights in 0 of 5 layers" in page
    markdown = verdict_markdown(make_verdict(), make_runs(), artifacts)
    assert "| candidate: static int8 in 5 layers | artifact | lost | integer weights in 0 of 5 layers |" in markdown
    assert "<script>x" not in page
    assert "<script>" not in markdown
    assert "What became of the compression" not in verdict_markdown(make_verdict(), make_runs(), {})


def test_a_verdict_says_which_side_has_lost_its_compression():
    cell = make_cell()
    artifacts = {cell.cell: an_artifact(statements=(LOST,)), cell.baseline_cell: an_artifact()}
    assert lost_compression(cell, artifacts) == [
        f"{cell.cell} has lost its compression (static int8): integer weights in 0 of 5 layers"
    ]
    assert lost_compression(cell, {}) == []


def test_an_input_that_is_given_twice_is_refused():
    assert [spec.name for spec in parse_inputs(("a=1x2", "b=1x2"))] == ["a", "b"]
    with pytest.raises(UsageError, match="--input a is given 2 times"):
        parse_inputs(("a=1x2", "b=1x2", "a=1x2"))


def test_inputs_in_another_order_of_axes_are_said_to_be():
    made = make_artifact("candidate")
    name = made.inputs[0].name
    ports = {name: Port(tensor=name, layout="NHWC", permutation=(0, 2, 3, 1))}
    changed = replace(made, layers=replace(made.layers, ports=ports))
    shown = " ".join(artifact_text(changed, color=False, width=200).split())
    assert "(NHWC in the file)" in shown
    assert "in the file" not in artifact_text(made, color=False, width=200)
