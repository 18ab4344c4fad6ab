"""Runtimes and precisions side by side on the fake back end, a twin of it, and one that is not installed."""

import importlib
import importlib.metadata
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

import edgedeploy.cli
from edgedeploy import pipeline
from edgedeploy.backends import fake
from edgedeploy.errors import BackendMissing, UsageError
from edgedeploy.records.comparison import Comparison
from edgedeploy.render.text import comparison_text

TARGET = """\
format = "edgedeploy.target/1"
name = "fake-board"
description = "a board that exists only in tests"

[backends.fake]
precisions = ["fp32", "int8"]

[backends.twin]
precisions = ["fp32", "int8"]
int8_slower = "its int8 kernels are slow on purpose."

[backends.away]
precisions = ["fp32", "int8"]

[quantization.fake]
activation_dtype = "int8"
activation_symmetric = false

[quantization.twin]
activation_dtype = "int8"
activation_symmetric = false

[conditions]
max_foreign_load = 1000.0
"""

RELEASE = """\
format = "edgedeploy.release/1"
name = "tiny"

[models.tiny]
source = "tiny.onnx"

[[cells]]
name = "shipped"
model = "tiny"
target = "fake-board"
backend = "fake"
precision = "fp32"
options = { duration_us = 400.0 }

[[cells]]
name = "candidate"
model = "tiny"
target = "fake-board"
backend = "fake"
precision = "PRECISION"
options = { threads = 1 }

[gate]
baseline = "shipped"
min_blocks = 2
max_blocks = 10
[gate.margins]
latency_p50 = "+20%"
artifact_size = "+1MiB"
"""


def _runtime(name, duration_us, **more):
    """A back end whose device half is the fake one's; int8 takes twice the time, or half of it where it is `fake`."""

    def compile_(self, model, target, options, out):
        is_int8 = "QuantizeLinear" in model.compression.operators
        slow = fake.dataclasses.replace(options, duration_us=duration_us * (2 if is_int8 else 1))
        fake.FakeBackend.compile(self, model, target, slow, out)

    body = {"name": name, "__module__": fake.__name__, "compile": compile_, **more}
    return type(name.title(), (fake.FakeBackend,), body)()


@pytest.fixture
def model(place) -> Path:
    """A matrix product, which can be quantized."""
    onnx = pytest.importorskip("onnx", reason="the host half needs onnx: pip install 'edgedeploy[onnxruntime]'")
    helper = onnx.helper
    weights = np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["image", "weights"], ["scores"], name="product")],
        "tiny",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["batch", 4])],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    path = place / "tiny.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def _with_floats() -> None:
    """Add a runtime that has no int8."""
    path = Path("targets/fake-board.toml")
    path.write_text(path.read_text() + '[backends.floats]\nprecisions = ["fp32"]\n')


@pytest.fixture
def board(model, monkeypatch) -> Path:
    """The place of the tiny model, on a board with four runtimes of which one is not installed."""
    Path("targets/fake-board.toml").write_text(TARGET)
    extra = [
        _runtime("twin", 300.0),
        _runtime("floats", 300.0, precisions=frozenset({"fp32"})),
        _runtime("away", 300.0, missing=lambda self: "away is not installed here; pip install 'edgedeploy[away]'"),
    ]
    points = [SimpleNamespace(name=one.name, load=lambda one=one: one) for one in extra]
    real = importlib.metadata.entry_points

    def entry_points(**given):
        return points if given.get("group") == "edgedeploy.backends" else real(**given)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    rng = np.random.default_rng(0)
    samples, labels = rng.standard_normal((64, 4)).astype(np.float32), rng.integers(0, 4, 64)
    np.savez("calibration.npz", image=samples)
    np.savez("evaluation.npz", image=samples[::-1], labels=labels)
    return model.parent


def _release(precision="fp32") -> Path:
    path = Path("edgedeploy.toml")
    path.write_text(RELEASE.replace("PRECISION", precision))
    return path


def _cli(*arguments: str) -> int:
    return edgedeploy.cli.run([*arguments])


def test_targets_all_puts_every_runtime_side_by_side_in_every_report(board, capsys):
    _release()
    reports = ["--junit", "junit.xml", "--markdown", "comment.md", "--html", "report.html"]
    assert _cli("run", "--targets", "all", "-q", *reports) == 0, capsys.readouterr().err
    told, talk = capsys.readouterr()
    assert "--targets" not in talk
    verdict = json.loads(Path("report.json").read_text())
    rows = {row["cell"]: row for row in verdict["contenders"]}
    assert list(rows) == ["shipped", "candidate", "candidate@twin", "candidate@away"]
    assert [rows[name]["decision"] for name in ("candidate", "candidate@twin")] == ["PASS", "PASS"]
    assert rows["candidate@twin"]["backend"] == "twin"
    assert 0.6 < 1 + rows["candidate@twin"]["change"] < 0.9
    assert rows["candidate@away"]["decision"] is None
    assert verdict["decision"] == "PASS"
    for text in (told, Path("comment.md").read_text(), Path("report.html").read_text(), Path("junit.xml").read_text()):
        words = " ".join(text.split())
        assert "candidate@twin" in words
        assert "pip install" in words
    suites = {suite.get("name"): suite for suite in ET.parse("junit.xml").getroot()}
    properties = {one.get("name"): one.get("value") for one in suites["candidate@twin"].iter("property")}
    assert properties["backend"] == "twin"
    assert "edgedeploy[away]" in suites["candidate@away"].find("testcase/skipped").get("message")


def test_a_runtime_that_cannot_do_the_precision_is_listed_with_what_it_does(board, capsys):
    _with_floats()
    _release("int8")
    Path("edgedeploy.toml").write_text(
        Path("edgedeploy.toml").read_text().replace("[[cells]]", '[calibration]\nset = "calibration.npz"\n[[cells]]', 1)
    )
    assert _cli("run", "--targets", "all", "--dry-run") == 0
    told = capsys.readouterr().out
    assert "build candidate@twin: tiny for fake-board with twin int8" in told
    assert "leave out candidate@floats: floats for target 'fake-board' does not do int8 (it does: fp32)" in told
    assert "leave out candidate@away: away is not installed here; pip install" in told


def test_backends_adds_only_the_runtimes_that_are_named(board, capsys):
    _release()
    assert _cli("run", "--backends", "twin", "--dry-run", "--json") == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [step for step in steps if step.startswith("measure")] == [
        "measure shipped and candidate interleaved on local, at most 10 blocks",
        "measure shipped and candidate@twin interleaved on local, at most 10 blocks",
    ]
    with pytest.raises(UsageError, match=r"did you mean .twin."):
        pipeline.plan(Path("edgedeploy.toml"), backends=("twinn",))


def test_targets_selects_among_the_cells(board):
    path = _release()
    text = path.read_text()
    other = text.split("[[cells]]")[2].replace('"candidate"', '"elsewhere"').replace("fake-board", "other-board")
    path.write_text(text.replace("[gate]\n", f"[[cells]]{other.split('[gate]')[0]}[gate]\n"))
    Path("targets/other-board.toml").write_text(TARGET.replace("fake-board", "other-board"))
    assert len([step for step in pipeline.plan(path) if step.startswith("judge")]) == 2
    (judged,) = [step for step in pipeline.plan(path, targets=("other-board",)) if step.startswith("judge")]
    assert judged.startswith("judge elsewhere against shipped")
    with pytest.raises(UsageError, match=r"no candidate cell for target 'othr-board'.*other-board"):
        pipeline.plan(path, targets=("othr-board",))


def test_a_cell_that_the_file_lists_itself_is_not_made_again(board):
    _with_floats()
    path = _release()
    text = path.read_text()
    listed = text.split("[[cells]]")[2].replace('"candidate"', '"mine"').replace('"fake"', '"twin"')
    path.write_text(text.replace("[gate]\n", f"[[cells]]{listed.split('[gate]')[0]}[gate]\n"))
    judged = [step.split()[1] for step in pipeline.plan(path, targets=("all",)) if step.startswith("judge")]
    assert judged == ["candidate", "candidate@floats", "mine", "mine@floats"]


def test_a_name_that_is_needed_for_another_runtime_is_refused(board):
    path = _release()
    path.write_text(path.read_text().replace('"candidate"', '"shipped@twin"', 1))
    text = path.read_text()
    listed = text.split("[[cells]]")[2].replace('"shipped@twin"', '"shipped@twin@twin"')
    path.write_text(text.replace("[gate]\n", f"[[cells]]{listed.split('[gate]')[0]}[gate]\n"))
    with pytest.raises(UsageError, match="rename that cell"):
        pipeline.plan(path, targets=("all",))


def test_a_run_hints_at_the_other_runtimes(board, capsys):
    _release()
    assert _cli("run") == 0
    assert "edgedeploy run edgedeploy.toml --targets all" in capsys.readouterr().err


def test_int8_that_is_known_to_be_slower_is_said_in_one_line_and_in_the_manifest(board, capsys):
    arguments = ["compile", "tiny.onnx", "--target", "fake-board", "--calibration", "calibration.npz", "-o", "out"]
    for _ in range(2):  # the second time from the cache
        assert _cli(*arguments, "--backend", "twin", "--precision", "int8") == 0
        told = capsys.readouterr()
        (line,) = [line for line in told.err.splitlines() if "slower" in line]
        assert "its int8 kernels are slow on purpose; use int8 with fake or fp32 with twin instead" in line
        notes = json.loads(Path("out/manifest.json").read_text())["notes"]
        assert [note for note in notes if "slower than fp32 with twin" in note]
        assert "slower than fp32" in told.out
    for quiet_case in (["--backend", "fake", "--precision", "int8"], ["--backend", "twin", "--precision", "fp32"]):
        assert _cli(*arguments, *quiet_case) == 0
        assert "slower" not in capsys.readouterr().err


def test_precisions_are_compared_with_fp32_and_the_fastest_is_named(board, capsys):
    arguments = ["bench", "tiny.onnx", "--compare-precisions", "--target", "fake-board", "--backend", "all"]
    more = ["--calibration", "calibration.npz", "--evaluation", "evaluation.npz", "--visits", "3"]
    assert _cli(*arguments, *more, "--margin", "accuracy=-50pt", "-q", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    rows = {(row["backend"], row["precision"]): row for row in found["contenders"]}
    assert {key for key, row in rows.items() if row["absent"]} == {("away", "fp32"), ("away", "int8")}
    assert rows["twin", "int8"]["change"] == pytest.approx(1.0, abs=0.2)
    assert rows["twin", "int8"]["agreement"] is not None
    assert rows["twin", "int8"]["low"] > 0.5
    slower = [text for text in found["conclusions"] if text.startswith("twin int8 is slower than twin fp32 here")]
    assert "slow on purpose" in slower[0]
    assert found["conclusions"][-1].startswith("fastest that keeps accuracy within -50pt: fake ")
    assert found["fastest"].startswith("tiny-fake-board-fake-")
    told = comparison_text(msgspec.convert(found, Comparison), color=False, width=120)
    assert "× fp32" in told
    assert told.splitlines()[-1] == found["conclusions"][-1]
    assert "- away fp32, away int8: away is not installed here; pip install" in told


def test_without_calibration_there_is_no_int8_and_the_error_says_what_to_give(board):
    _with_floats()
    for backends in (("fake",), ("fake", "floats")):
        with pytest.raises(UsageError, match="--calibration"):
            pipeline.compare_precisions("tiny.onnx", target="fake-board", backends=backends, max_blocks=4)


def test_wrong_uses_of_compare_precisions_are_sentences(board, compiled, capsys):
    with pytest.raises(BackendMissing, match="pip install"):
        pipeline.compare_precisions("tiny.onnx", target="fake-board", backends=("away",))
    folder = str(compiled("a"))
    assert _cli("bench", folder, "--compare-precisions", "--target", "fake-board") == 2
    assert "is an artifact" in capsys.readouterr().err
    assert _cli("bench", folder, "--calibration", "calibration.npz") == 2
    assert "--compare-precisions" in capsys.readouterr().err
    assert _cli("bench", "tiny.onnx", "--compare-precisions", "--visits", "1") == 2
    assert "needs 2 at least" in capsys.readouterr().err
    margin = ["--evaluation", "evaluation.npz", "--margin", "latency_p50=+5%"]
    assert (
        _cli("bench", "tiny.onnx", "--compare-precisions", "--target", "fake-board", "--backend", "fake", *margin) == 2
    )
    assert "what decides here is accuracy" in capsys.readouterr().err


def test_a_runtime_that_only_the_device_lacks_is_listed_and_does_not_spoil_the_verdict(board, monkeypatch):
    folder = Path("packages/on_no_device")
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(
        "from edgedeploy.backends.fake import FakeBackend\n\n\nclass Runtime(FakeBackend):\n    name = 'lacking'\n"
    )
    (folder / "session.py").write_text("import a_runtime_that_nobody_has\n")
    monkeypatch.syspath_prepend(str(folder.parent.resolve()))
    point = SimpleNamespace(name="lacking", load=lambda: importlib.import_module("on_no_device").Runtime())
    real = importlib.metadata.entry_points
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **given: [point] if given else real())
    path = Path("targets/fake-board.toml")
    path.write_text(f'{path.read_text().split("[backends.twin]")[0]}[backends.lacking]\nprecisions = ["fp32"]\n')
    release = _release()
    release.write_text(release.read_text().replace("[[cells]]", '[evaluation]\nset = "evaluation.npz"\n[[cells]]', 1))
    outcome = pipeline.run(release, targets=("all",))
    assert not outcome.problems
    assert [cell.cell for cell in outcome.verdict.cells] == ["candidate"]
    (absent,) = [row for row in outcome.verdict.contenders if row.absent]
    assert absent.cell == "candidate@lacking"
    assert "a_runtime_that_nobody_has" in absent.absent


def test_a_comparison_in_which_no_latency_counts_is_inconclusive(board, monkeypatch, capsys):
    path = Path("targets/fake-board.toml")
    path.write_text(path.read_text().replace("max_foreign_load = 1000.0", "max_foreign_load = -1.0"))
    arguments = ["tiny.onnx", "--compare-precisions", "--target", "fake-board", "--backend", "fake", "--visits", "2"]
    assert _cli("bench", *arguments, "--calibration", "calibration.npz", "-q") == 4
    told = capsys.readouterr().out
    assert "fake int8 was not timed: all 2 A/B blocks were dropped" in told
    assert told.splitlines()[-1].endswith("no latency counts; measure again on a quieter device")
