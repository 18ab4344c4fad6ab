"""Opt-in: TensorRT on a real GPU, the device of one's lab.toml that EDGEDEPLOY_TEST_DEVICE names; never run until now.

    EDGEDEPLOY_TEST_DEVICE=orin EDGEDEPLOY_TEST_TARGET=jetson-agx-orin pytest -s tests/device/test_real_gpu.py

Each test builds on the device, compares its answers with the model's and prints what it measured; with
EDGEDEPLOY_TEST_RESULTS=bench_results the runs are kept there. Without EDGEDEPLOY_TEST_TARGET the target is nvidia-dgpu.
"""

import os
import statistics
from pathlib import Path

import numpy as np
import pytest

from edgedeploy import pipeline
from edgedeploy.backends import session_file
from edgedeploy.errors import VisitFailed

DEVICE = os.environ.get("EDGEDEPLOY_TEST_DEVICE", "")
TARGET = os.environ.get("EDGEDEPLOY_TEST_TARGET", "nvidia-dgpu")
RESULTS = os.environ.get("EDGEDEPLOY_TEST_RESULTS", "")
pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not DEVICE, reason="opt in with EDGEDEPLOY_TEST_DEVICE=<name of a device in lab.toml>"),
    # A first build times every layer's kernels; on a small Jetson that takes minutes.
    pytest.mark.timeout(1800),
]
onnx = pytest.importorskip("onnx", reason="compiling needs onnx: pip install 'edgedeploy[tensorrt]'")
RNG = np.random.default_rng(3)
BATCH = {"axes": "batch=1:4:8"}


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("samples") / "images.npz"
    np.savez(path, image=RNG.standard_normal((64, 3, 64, 64)).astype(np.float32))
    return path


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    """A residual network of six convolutions and a product, with a free batch."""
    helper, weights = onnx.helper, {}

    def conv(name: str, x: str, width: int, made: int, size: int = 3, stride: int = 1) -> list[object]:
        fan = width * size * size
        weights[f"{name}.w"] = (RNG.standard_normal((made, width, size, size)) * (2 / fan) ** 0.5).astype(np.float32)
        weights[f"{name}.b"] = (RNG.standard_normal(made) * 0.1).astype(np.float32)
        inputs, pads = [x, f"{name}.w", f"{name}.b"], [size // 2] * 4
        return [helper.make_node("Conv", inputs, [name], name=f"/{name}", pads=pads, strides=[stride, stride])]

    def relu(x: str) -> list[object]:
        return [helper.make_node("Relu", [x], [f"{x}.relu"], name=f"/{x}.relu")]

    nodes = [*conv("stem", "image", 3, 32, stride=2), *relu("stem")]
    before = "stem.relu"
    for number in (1, 2):
        one, two = f"block{number}.1", f"block{number}.2"
        nodes += [*conv(one, before, 32, 32), *relu(one), *conv(two, f"{one}.relu", 32, 32)]
        nodes += [helper.make_node("Add", [two, before], [f"sum{number}"], name=f"/sum{number}"), *relu(f"sum{number}")]
        before = f"sum{number}.relu"
    nodes += [*conv("last", before, 32, 64, stride=2), *relu("last")]
    weights["fc.w"] = (RNG.standard_normal((10, 64)) * 0.2).astype(np.float32)
    nodes += [
        helper.make_node("GlobalAveragePool", ["last.relu"], ["pool"], name="/pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], name="/flatten"),
        helper.make_node("Gemm", ["flat", "fc.w"], ["scores"], name="/fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes, "residual",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 3, 64, 64])],
        [helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["batch", 10])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    path = tmp_path_factory.mktemp("network") / "residual.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def compiled(network: Path, samples: Path, precision: str, **options: object):
    """Compile for the target and build on the device; the pipeline compares its answers with the golden ones there."""
    return pipeline.compile(
        str(network), target=TARGET, backend="tensorrt", precision=precision, device=DEVICE,
        calibration=samples if precision == "int8" else None, options={**BATCH, **options}, progress=print,
    )  # fmt: skip


def measured(built, tmp_path: Path):
    results = Path(RESULTS) if RESULTS else tmp_path
    run, path = pipeline.bench(built.folder, device=DEVICE, visits=3, results=results)
    times = [one for visit in run.visits for burst in visit.bursts for one in burst.samples_s]
    print(
        f"\n{run.runtime}: {built.artifact.name}: p50 {statistics.median(times) * 1e3:.3f} ms; {run.boundary.detail}; {path}"
    )
    return run


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_engine_is_built_answers_rightly_and_is_measured(network, samples, tmp_path, precision):
    built = compiled(network, samples, precision)
    assert built.artifact.engine.fingerprint.tensorrt
    for layer in built.artifact.layers.layers:
        print(f"{layer.precision:>5} -> {layer.output:5} {layer.kind:20} {layer.name[:80]}")
    if precision == "int8":
        on_integers = [layer for layer in built.artifact.layers.layers if layer.precision == "int8"]
        assert len(on_integers) >= 6, "the six convolutions of the network are meant to run on integers"
    run = measured(built, tmp_path)
    assert run.runtime == f"tensorrt {built.artifact.engine.fingerprint.tensorrt}"
    assert run.golden is not None
    assert not run.events


def test_second_build_of_the_same_recipe_builds_nothing(network, samples):
    first, second = compiled(network, samples, "fp16"), compiled(network, samples, "fp16")
    assert second.is_cached
    assert second.artifact.sha256 == first.artifact.sha256


@pytest.mark.parametrize("option", ["cuda_graph", "spin_wait", "no copies", "pycuda"])
def test_ways_to_run_are_measured_and_answer_alike(network, samples, tmp_path, option):
    given = {"no copies": {"copies": False}, "pycuda": {"buffers": "pycuda"}}.get(option, {option: True})
    try:
        run = measured(compiled(network, samples, "fp16", **given), tmp_path)
    except VisitFailed as failed:
        if option != "pycuda" or "No module named 'pycuda'" not in str(failed):
            raise
        pytest.skip("pycuda is not installed on the device")
    assert run.golden is not None
    assert run.boundary.includes_input_copy is (option != "no copies")


def test_session_on_this_machines_own_gpu_says_layers_events_and_memory(network, samples):
    """Only where the device is this machine: what the runner does not ask a session for."""
    from edgedeploy.errors import EdgedeployError
    from edgedeploy.ondevice.runner import Refusal, load_device_half

    try:
        kind = load_device_half(str(session_file("tensorrt"))).Session
    except Refusal as refusal:
        pytest.skip(f"this machine has no GPU of its own: {refusal}")
    try:
        built = compiled(network, samples, "int8")
    except EdgedeployError as error:
        pytest.fail(f"the device {DEVICE} cannot build: {error}")
    image = RNG.standard_normal((4, 3, 64, 64)).astype(np.float32)
    with kind(str(built.file), {"event_times": 50}) as session:
        session.bind({"image": (image.tobytes(), "float32", list(image.shape))})
        for _ in range(60):
            session.infer()
        events, memory, layers = session.event_times_ms(), session.memory(), session.profile()
    assert len(events) == 50
    assert 0 < statistics.median(events) < 1e3
    assert memory["engine_bytes"] >= 0
    assert memory["device_bytes"] > 0
    assert sum(layer_s for _, _, layer_s in layers) > 0
    print(f"\nGPU time p50 {statistics.median(events):.3f} ms; {memory}")
    for name, _, layer_s in layers:
        print(f"{layer_s * 1e6:8.1f} us {name[:100]}")
