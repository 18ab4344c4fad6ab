"""What the device half of every back end promises, asked of each one that is installed."""

from __future__ import annotations

import ast
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgedeploy.backends import load_backends, session_file
from edgedeploy.documents import to_builtins
from edgedeploy.errors import ToolchainError
from edgedeploy.lab.bundle import connect, ship
from edgedeploy.lab.transport import LocalTransport
from edgedeploy.lab.visits import Schedule, Side, compute_outputs, measure_block, measure_memory
from edgedeploy.ondevice.runner import Refusal, load_device_half
from edgedeploy.records.compression import CompressionReport
from edgedeploy.records.device import Device
from edgedeploy.records.model import Model, TensorSpec
from edgedeploy.records.run import Boundary
from edgedeploy.records.target import Target
from edgedeploy.storage import sha256_file

BACKENDS, _ = load_backends()
SAMPLES = 5
RNG = np.random.default_rng(0)
INPUTS = {"x": RNG.random((SAMPLES, 4), dtype=np.float32), "m": RNG.random((SAMPLES, 4), dtype=np.float32)}
WEIGHT = RNG.random((4, 3), dtype=np.float32)


def spec(name: str, width: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=("batch", width))


def write_onnx(path: Path) -> None:
    """Write y = (x + m) @ W, z = relu(x): two inputs, two outputs, dynamic batch."""
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper

    def value(name, width):
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", width])

    graph = helper.make_graph(
        [
            helper.make_node("Add", ["x", "m"], ["sum"], name="add"),
            helper.make_node("MatMul", ["sum", "w"], ["y"], name="matmul"),
            helper.make_node("Relu", ["x"], ["z"], name="relu"),
        ],
        "tiny",
        [value("x", 4), value("m", 4)],
        [value("y", 3), value("z", 4)],
        [onnx.numpy_helper.from_array(WEIGHT, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@dataclass(frozen=True)
class Compiled:
    """A tiny model compiled for one back end."""

    name: str
    artifact: Path
    session: Path
    options: dict[str, Any]

    def load(self) -> Any:
        return load_device_half(str(self.session)).Session(str(self.artifact), self.options)


@pytest.fixture(scope="module", params=sorted(BACKENDS))
def compiled(request, tmp_path_factory) -> Compiled:
    backend = BACKENDS[request.param]
    if reason := backend.missing():
        pytest.skip(reason)
    if backend.builds_on == "device":
        pytest.skip(f"{backend.name} compiles on the device")
    if backend.tools is not None:
        try:
            backend.tools.python()
        except ToolchainError as error:
            pytest.skip(str(error))
    if hasattr(backend, "device_half"):  # of those that need a GPU; any other one must load
        try:
            load_device_half(str(session_file(backend.name)))
        except Refusal as error:
            pytest.skip(f"{backend.name} runs nothing here: {error}")
    folder = tmp_path_factory.mktemp(backend.name)
    path = folder / "tiny.onnx"
    if backend.name != "fake":
        write_onnx(path)
    model = Model(
        path=str(path), sha256="0" * 64, source="tiny", opset=17,
        inputs=(spec("x", 4), spec("m", 4)), outputs=(spec("y", 3), spec("z", 4)),
        compression=CompressionReport(
            parameters=12, nonzero_parameters=12, macs=None, initializer_bytes=48, operators={"MatMul": 1}
        ),
    )  # fmt: skip
    target = Target(format="edgedeploy.target/1", name="test", description="")
    has_ranges = any(field.name == "axes" for field in dataclasses.fields(backend.options))
    options = backend.options(**({"axes": f"batch=1:2:{SAMPLES}"} if has_ranges else {}))
    artifact = folder / f"tiny{backend.suffix}"
    backend.compile(model, target, options, artifact)
    ports = {name: to_builtins(port) for name, port in backend.inspect(artifact).ports.items()}
    given = {**dataclasses.asdict(options), **({"ports": ports} if ports else {})}
    return Compiled(backend.name, artifact, session_file(backend.name), given)


def batch(first: int, count: int) -> dict[str, tuple[bytes, str, list[int]]]:
    rows = {name: values[first : first + count] for name, values in INPUTS.items()}
    return {name: (values.tobytes(), values.dtype.name, list(values.shape)) for name, values in rows.items()}


def answers(session: Any, first: int, count: int) -> dict[str, np.ndarray]:
    session.bind(batch(first, count))
    session.infer()
    outputs = session.outputs()
    return {name: np.frombuffer(data, dtype).reshape(shape) for name, (data, dtype, shape) in outputs.items()}


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_session_imports_nothing_of_ours(name):
    for node in ast.walk(ast.parse(session_file(name).read_text(), feature_version=(3, 8))):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        assert not [module for module in modules if module.startswith(("edgedeploy", "."))]


def test_session_names_its_runtime_and_version(compiled):
    runtime = load_device_half(str(compiled.session)).Session.runtime
    assert runtime.split()[0] == compiled.name
    assert len(runtime.split()) == 2


def test_boundary_fills_the_record(compiled):
    with compiled.load() as session:
        boundary = msgspec.convert({**session.boundary(), "batch": 2}, Boundary)
    assert boundary.threads == 1


def test_outputs_have_the_models_names_and_shapes(compiled):
    with compiled.load() as session:
        outputs = answers(session, 0, 2)
    assert {name: array.shape for name, array in outputs.items()} == {"y": (2, 3), "z": (2, 4)}


def test_same_inputs_give_the_same_bytes(compiled):
    with compiled.load() as session:
        session.bind(batch(0, 3))
        session.infer()
        first = session.outputs()
        session.infer()
        assert session.outputs() == first


def test_inference_leaves_the_inputs_as_they_are(compiled):
    """A runtime may compute in the memory of its inputs; what is timed many times must be the same inference."""
    with compiled.load() as session:
        session.bind(batch(0, 2))
        session.infer()
        first = session.outputs()
        for _ in range(5):
            session.infer()
        assert session.outputs() == first


def test_inputs_belong_to_the_session_once_they_are_bound(compiled):
    """The caller may use its memory for something else."""
    values = {name: np.array(array[:1]) for name, array in INPUTS.items()}
    with compiled.load() as session:
        session.bind({name: (memoryview(array).cast("B"), "float32", [1, 4]) for name, array in values.items()})
        for array in values.values():
            array[...] = 1e9
        session.infer()
        found = session.outputs()
        assert found == _packed_answers(session, 0, 1)


def test_refused_inputs_do_not_change_the_answers(compiled):
    with compiled.load() as session:
        before = answers(session, 0, 2)
        with pytest.raises(ValueError, match="x"):
            session.bind({**batch(0, 1), "x": (bytes(16), "int32", [1, 4])})
        after = answers(session, 0, 2)
    assert {name: array.tobytes() for name, array in before.items()} == {n: a.tobytes() for n, a in after.items()}


def test_two_sessions_of_one_artifact_do_not_disturb_each_other(compiled):
    with compiled.load() as one, compiled.load() as other:
        one.bind(batch(0, 1))
        other.bind(batch(1, 2))
        one.infer()
        other.infer()
        first, second = one.outputs(), other.outputs()
    with compiled.load() as alone:
        assert first == _packed_answers(alone, 0, 1)
        assert second == _packed_answers(alone, 1, 2)


def _packed_answers(session: Any, first: int, count: int) -> dict[str, tuple[bytes, str, list[int]]]:
    session.bind(batch(first, count))
    session.infer()
    return session.outputs()


def test_binding_again_changes_the_inputs(compiled):
    with compiled.load() as session:
        first, second = answers(session, 0, 1), answers(session, 1, 1)
    assert not np.array_equal(first["y"], second["y"])


def test_sample_gets_the_same_answer_in_any_batch(compiled):
    with compiled.load() as session:
        together = answers(session, 0, SAMPLES)
        alone = answers(session, 3, 1)
    for name, array in alone.items():
        np.testing.assert_allclose(together[name][3:4], array, rtol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"x": (bytes(20), "float32", [1, 5])},
        {"x": (bytes(16), "float32", [4])},
        {"x": (bytes(16), "int32", [1, 4])},
        {"extra": (bytes(16), "float32", [1, 4])},
    ],
    ids=["width", "rank", "dtype", "name"],
)
def test_inputs_that_do_not_fit_are_refused_by_name(compiled, change):
    with compiled.load() as session, pytest.raises(ValueError, match=next(iter(change))):
        session.bind({**batch(0, 1), **change})


def test_missing_input_is_refused(compiled):
    with compiled.load() as session, pytest.raises(ValueError, match="x"):
        session.bind({"x": batch(0, 1)["x"]})


def test_corrupt_artifact_does_not_load(compiled, tmp_path):
    whole = compiled.artifact.read_bytes()
    cut = tmp_path / "cut"
    cut.write_bytes(whole[: len(whole) // 2])
    with (
        pytest.raises(Exception, match=r"."),
        load_device_half(str(compiled.session)).Session(str(cut), compiled.options),
    ):
        pass


def test_runner_measures_it_and_computes_its_outputs(compiled, tmp_path):
    save_file(INPUTS, tmp_path / "inputs")
    paths = [compiled.artifact, compiled.session, tmp_path / "inputs"]
    artifact, session, inputs = map(sha256_file, paths)
    side = Side(compiled.name, artifact, session, compiled.options, inputs, batch=2)
    transport = LocalTransport("here")
    schedule = Schedule(bursts_per_visit=2, samples_per_burst=3, warm_up_cap_s=0.2)
    with connect(transport, Device(transport="local", root=str(tmp_path / "r")), device_name="here") as agent:
        ship(agent, transport, {sha256_file(path): path for path in paths})
        (measured,) = measure_block(agent, [side], schedule, block=0, seed=0)
        memory = measure_memory(agent, side, schedule)
        outputs = compute_outputs(agent, transport, side, tmp_path / "outputs", schedule)
    assert [len(burst.samples_s) for burst in measured.visit.bursts] == [3, 3]
    assert measured.runtime == outputs.runtime
    assert memory.peak_rss_bytes >= memory.import_rss_bytes > 0
    fetched = load_file(tmp_path / "outputs")
    with compiled.load() as local:
        expected = answers(local, 0, SAMPLES)
    assert set(fetched) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(fetched[name], array, rtol=1e-6)


def test_session_computes_what_the_model_says(compiled):
    if not BACKENDS[compiled.name].computes:
        pytest.skip(f"{compiled.name} does not compute the model")
    with compiled.load() as session:
        outputs = answers(session, 0, SAMPLES)
    np.testing.assert_allclose(outputs["y"], (INPUTS["x"] + INPUTS["m"]) @ WEIGHT, rtol=1e-5)
    np.testing.assert_array_equal(outputs["z"], INPUTS["x"])
