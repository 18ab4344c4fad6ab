"""`bench --profile`: what single operators take, from a pass of its own, or a sentence where a runtime does not say."""

import numpy as np
import pytest
from click.testing import CliRunner

from edgedeploy import pipeline
from edgedeploy.cli.measuring import bench_command
from edgedeploy.records.run import LayerTime
from edgedeploy.render.operator_times import time_rows, times_note

onnx = pytest.importorskip("onnx", reason="the host half needs onnx: pip install 'edgedeploy[onnxruntime]'")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model of two operators, compiled for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("place")
    helper = onnx.helper
    weights = onnx.numpy_helper.from_array(np.ones((8, 3, 3, 3), np.float32), "w")
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "w"], ["c"], name="/conv"),
            helper.make_node("GlobalAveragePool", ["c"], ["scores"], name="/pool"),
        ],
        "net",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["batch", 8, 1, 1])],
        [weights],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "net.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEDEPLOY_CACHE_DIR", str(folder / "cache"))
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        patch.chdir(folder)
        yield folder


def test_operators_are_timed_beside_the_visits_and_printed(place):
    pipeline.compile("net.onnx", target="host", output="onnxruntime")
    done = CliRunner().invoke(bench_command, ["onnxruntime", "--profile", "--visits", "1", "-q"])
    assert done.exit_code == 0, done.output
    assert "Operators, watched one by one" in done.output
    assert "GlobalAveragePool" in done.output
    assert "watching costs time" in done.output


@pytest.mark.parametrize(("backend", "says"), [("tflite", "benchmark_model"), ("fake", "does not say")])
def test_a_runtime_that_does_not_say_is_noted_and_the_rest_is_measured(place, backend, says, monkeypatch):
    if backend == "tflite":
        pytest.importorskip("ai_edge_litert", reason="needs LiteRT: pip install 'edgedeploy[tflite]'")
        target = "host"
    else:
        target = "fake-board"
        (place / "targets").mkdir(exist_ok=True)
        (place / "targets" / "fake-board.toml").write_text(
            'format = "edgedeploy.target/1"\nname = "fake-board"\ndescription = "of tests"\n'
            '[backends.fake]\nprecisions = ["fp32"]\n'
        )
    built = pipeline.compile("net.onnx", target=target, backend=backend, output=backend)
    run, _ = pipeline.bench(built.folder, visits=1, profile=True)
    assert run.layer_times == ()
    assert any(says in event for event in run.events)
    assert run.visits


def test_a_profile_and_a_comparison_exclude_each_other(place):
    done = CliRunner().invoke(bench_command, ["net.onnx", "--profile", "--compare-precisions"])
    assert done.exit_code != 0
    assert "leave --compare-precisions out" in str(done.exception)


def test_the_slowest_come_first_with_their_share_and_the_rest_is_summed():
    times = [LayerTime(name=f"op{number}", kind="Conv", p50_s=1e-3 * (number + 1)) for number in range(24)]
    rows = time_rows(times)
    assert rows[0][:2] == ("op23", "Conv")
    assert rows[0][3] == "8.00 %"
    assert len(rows) == 20
    assert times_note(times).startswith("4 more operators, 10")
