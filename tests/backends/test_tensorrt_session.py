"""The device half of TensorRT, on emulated TensorRTs and an emulated GPU: nothing here has seen a real one."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from edgedeploy.backends import session_file
from edgedeploy.errors import VisitFailed
from edgedeploy.lab.bundle import connect, ship
from edgedeploy.lab.transport import LocalTransport
from edgedeploy.lab.visits import Schedule, Side, compute_outputs, measure_block, measure_memory
from edgedeploy.records.device import Device as LabDevice
from edgedeploy.storage import sha256_file
from tests.backends.emulated_tensorrt import EMULATED, build_many, device_python, environment
from tests.emulated.remote import Device
from tests.emulated.stubs import build_stubs

onnx = pytest.importorskip("onnx", reason="needs onnx; pip install 'edgedeploy[onnxruntime]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime; pip install 'edgedeploy[onnxruntime]'")
helper = onnx.helper

SESSION = session_file("tensorrt")
RUNNER = Path(__file__).parents[2] / "edgedeploy" / "ondevice"
VERSIONS = ("8.5.3", "10.3.0", "11.4.0")
RNG = np.random.default_rng(11)
WEIGHT = RNG.standard_normal((4, 3), np.float32)
TYPES = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64", "int32": "INT32", "bool": "BOOL", "int8": "INT8"}
Shape = list[int | str]


def plan(
    path: Path,
    version: str,
    nodes: list[Any],
    inputs: dict[str, tuple[str, Shape]],
    outputs: dict[str, tuple[str, Shape]],
    *,
    constants: Mapping[str, np.ndarray] | None = None,
    ranges: tuple[tuple[int, int, int], ...] = ((1, 2, 4),),
    **header: Any,
) -> Path:
    """Write the engine that the emulated builder would make of a graph, and the graph beside it.

    Args:
        ranges: least, usual and largest size of the axes that have names, one for each optimization profile.
        header: what else the plan says of itself.
    """

    def value(name: str, dtype: str, shape: Shape) -> Any:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)

    graph = helper.make_graph(
        nodes, "net",
        [value(name, *one) for name, one in inputs.items()], [value(name, *one) for name, one in outputs.items()],
        [onnx.numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    data = model.SerializeToString()

    def port(name: str, dtype: str, shape: Shape) -> dict[str, Any]:
        kind = "INT32" if dtype == "int64" and version.startswith("8.") else TYPES[dtype]
        axes = [-1 if isinstance(axis, str) else axis for axis in shape]
        profiles = [
            {
                key: [size if axis == -1 else axis for axis in axes]
                for key, size in zip(("min", "opt", "max"), one, strict=True)
            }
            for one in ranges
        ]
        return {"name": name, "dtype": kind, "shape": axes, "profiles": profiles if -1 in axes else []}

    described = {
        "version": version, "compute_capability": "8.7", "layers": [{"Name": node.name} for node in nodes],
        "inputs": [port(name, *one) for name, one in inputs.items()],
        "outputs": [port(name, *one) for name, one in outputs.items()],
        "onnx_sha256": hashlib.sha256(data).hexdigest(), **header,
    }  # fmt: skip
    path.write_bytes(b"EMUTRT1\n" + json.dumps(described).encode() + b"\n" + data)
    path.with_suffix(".onnx").write_bytes(data)
    return path


def product(path: Path, version: str, **header: Any) -> Path:
    """Write y = relu(x @ W) with a batch of 1 to 4."""
    return plan(
        path, version,
        [helper.make_node("MatMul", ["x", "w"], ["m"], name="mm"), helper.make_node("Relu", ["m"], ["y"], name="relu")],
        {"x": ("float32", ["batch", 4])}, {"y": ("float32", ["batch", 3])}, constants={"w": WEIGHT}, **header,
    )  # fmt: skip


def typed_net(path: Path, version: str) -> Path:
    """Write a net with every type that a model may have at its border, and a scalar."""
    return plan(
        path, version,
        [
            helper.make_node("Gather", ["table", "ids"], ["rows"], name="gather"),
            helper.make_node("Add", ["ids", "ids"], ["twice"], name="add"),
            helper.make_node("Not", ["flag"], ["other"], name="not"),
            helper.make_node("Mul", ["half", "half"], ["square"], name="mul"),
            helper.make_node("ReduceSum", ["half"], ["total"], name="sum", keepdims=0),
        ],
        {"ids": ("int64", ["batch"]), "flag": ("bool", ["batch"]), "half": ("float16", ["batch", 2])},
        {
            "rows": ("float32", ["batch", 2]), "twice": ("int64", ["batch"]), "other": ("bool", ["batch"]),
            "square": ("float16", ["batch", 2]), "total": ("float16", []),
        },
        constants={"table": RNG.standard_normal((9, 2), np.float32)},
    )  # fmt: skip


def nonzero(path: Path, version: str, **header: Any) -> Path:
    """Write a net that answers with where its input is not zero: only the data decide how much that is."""
    return plan(
        path, version, [helper.make_node("NonZero", ["x"], ["where"], name="nonzero")],
        {"x": ("float32", ["batch", 4])}, {"where": ("int64", [2, "found"])}, **header,
    )  # fmt: skip


@pytest.fixture(scope="module")
def stubs(tmp_path_factory) -> Path:
    return build_stubs(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def devices(stubs) -> Iterator[dict[str, Device]]:
    """One process of each emulated version; they start beside each other."""
    started = {version: Device(SESSION, environment(version, stubs)) for version in VERSIONS}
    yield started
    for device in started.values():
        device.close()


@pytest.fixture(params=VERSIONS)
def version(request) -> str:
    return str(request.param)


@pytest.fixture
def device(devices, version) -> Device:
    return devices[version]


@pytest.fixture
def orin(devices) -> Device:
    """The version of JetPack 6, for what all versions share."""
    return devices["10.3.0"]


def packed(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[bytes, str, list[int]]]:
    return {name: (array.tobytes(), array.dtype.name, list(array.shape)) for name, array in arrays.items()}


def fetched(session: Any) -> dict[str, np.ndarray]:
    return {name: np.frombuffer(data, dtype).reshape(shape) for name, (data, dtype, shape) in session.outputs().items()}


def answers(session: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    session.bind(packed(arrays))
    session.infer()
    return fetched(session)


def expected(model: Path | bytes, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    data = model if isinstance(model, bytes) else model.with_suffix(".onnx").read_bytes()
    session = onnxruntime.InferenceSession(data, settings, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(arrays)), strict=True))


def rows(count: int) -> dict[str, np.ndarray]:
    return {"x": RNG.standard_normal((count, 4), np.float32)}


# ---------------------------------------------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def built(stubs, tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Engines by the builder of ours, for each version in each precision."""
    from tests.backends.trt_kits import write_kit

    folder = tmp_path_factory.mktemp("engines")
    kits = {precision: write_kit(folder / precision, precision, dynamic=True) for precision in ("fp32", "fp16", "int8")}
    found = {}
    for version in VERSIONS:
        jobs = {
            name: {"files": {"kit": str(kit)}, "options": {}, "folder": str(folder / f"{version}-{name}")}
            for name, kit in kits.items()
        }
        made, printed = build_many(SESSION.parent / "tensorrt" / "builder.py", version, stubs, jobs)
        for name, answer in made["answers"].items():
            assert "made" in answer, (answer, printed)
            found[version, name] = Path(answer["made"]["engine"])
    return found


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_built_engine_answers_as_its_onnx_does_at_every_batch(device, version, built, precision):
    engine = built[version, precision]
    model = engine.read_bytes().split(b"\n", 2)[2]
    with device.load(engine) as session:
        for count in (1, 4, 2, 2):
            x = {"x": RNG.standard_normal((count, 3, 8, 8), np.float32)}
            np.testing.assert_array_equal(answers(session, x)["y"], expected(model, x)["y"])


@pytest.mark.parametrize(
    "options", [{"copies": False}, {"cuda_graph": True}, {"spin_wait": True}, {"event_times": 2}], ids=str
)
def test_how_it_runs_does_not_change_the_answers(orin, tmp_path, options):
    engine = product(tmp_path / "e", "10.3.0")
    with orin.load(engine, **options) as session:
        for count in (2, 2, 4, 1):
            x = rows(count)
            for _ in range(2):
                np.testing.assert_array_equal(answers(session, x)["y"], expected(engine, x)["y"])


def test_every_type_at_the_border_is_handed_over(device, version, tmp_path):
    engine = typed_net(tmp_path / "e", version)
    given_types = {"ports": {"twice": {"dtype": "int64"}, "other": {"dtype": "bool"}}}
    arrays = {
        "ids": np.array([0, 8, 3]),
        "flag": np.array([True, False, True]),
        "half": RNG.standard_normal((3, 2)).astype(np.float16),
    }
    with device.load(engine, **given_types) as session:
        found = answers(session, arrays)
    for name, array in expected(engine, arrays).items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(found[name], array)


def test_int64_is_narrowed_where_the_version_has_none_and_only_if_it_fits(devices, tmp_path):
    arrays = {"ids": np.array([2**31]), "flag": np.array([True]), "half": np.zeros((1, 2), np.float16)}
    session = devices["8.5.3"].load(typed_net(tmp_path / "old", "8.5.3"))
    with session, pytest.raises(ValueError, match="input 'ids' holds values beyond int32, which the engine has"):
        session.bind(packed(arrays))
    with devices["10.3.0"].load(typed_net(tmp_path / "new", "10.3.0")) as session:
        session.bind(packed(arrays))


def test_model_may_call_its_tensors_otherwise(orin, tmp_path):
    ports = {"image": {"tensor": "x"}, "scores": {"tensor": "y", "dtype": "float64"}}
    engine, x = product(tmp_path / "e", "10.3.0"), rows(2)
    with orin.load(engine, ports=ports) as session:
        found = answers(session, {"image": x["x"]})
    assert found["scores"].dtype == np.float64
    np.testing.assert_array_equal(found["scores"], expected(engine, x)["y"].astype(np.float64))
    with pytest.raises(ValueError, match=r"has no tensor 'z' \(it has x, y\); build it again"):
        orin.load(engine, ports={"scores": {"tensor": "z"}})


def test_output_that_only_the_data_size_is_allocated_when_it_is_known(device, version, tmp_path):
    engine = nonzero(tmp_path / "e", version)
    for options in ({}, {"copies": False}):
        with device.load(engine, ports={"where": {"dtype": "int64"}}, **options) as session:
            for x in (np.eye(4, dtype=np.float32)[:2], np.ones((4, 4), np.float32), np.zeros((4, 4), np.float32)):
                np.testing.assert_array_equal(answers(session, {"x": x})["where"], np.array(np.nonzero(x)))


def test_input_that_sizes_are_computed_from_stays_on_the_host(orin, tmp_path):
    engine = plan(
        tmp_path / "e", "10.3.0", [helper.make_node("Expand", ["x", "size"], ["y"], name="expand")],
        {"x": ("float32", [1]), "size": ("int64", [1])}, {"y": ("float32", ["n"])},
    )  # fmt: skip
    head, line, model = engine.read_bytes().split(b"\n", 2)
    header = json.loads(line)
    header["inputs"][1]["location"] = "HOST"
    engine.write_bytes(b"\n".join([head, json.dumps(header).encode(), model]))
    with orin.load(engine) as session:
        for count in (3, 5):
            found = answers(session, {"x": np.ones(1, np.float32), "size": np.array([count])})
            np.testing.assert_array_equal(found["y"], np.ones(count, np.float32))


def test_profile_that_has_room_for_the_shapes_is_chosen(device, version, tmp_path):
    engine = plan(
        tmp_path / "e", version, [helper.make_node("Relu", ["x"], ["y"], name="relu")],
        {"x": ("float32", ["batch", 4])}, {"y": ("float32", ["batch", 4])}, ranges=((1, 1, 2), (8, 8, 16)),
    )  # fmt: skip
    with device.load(engine) as session:
        for count, profile in ((2, 0), (9, 1), (1, 0)):
            x = rows(count)
            np.testing.assert_array_equal(answers(session, x)["y"], np.maximum(x["x"], 0))
            assert f"optimization profile {profile}," in session.boundary()["detail"]
        assert [name for name, _, _ in session.profile(1)] == ["relu"]
        with pytest.raises(ValueError, match=r"\[1 to 2, 4\] or \[8 to 16, 4\], not \[5, 4\]; the range was decided"):
            session.bind(packed(rows(5)))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([("int32", "int64"), ("int64", "int32"), ("float16", "float32"), ("float32", "float16"),
                     ("float32", "float64"), ("bool", "int32"), ("int32", "bool"), ("int8", "float32")]),
    st.lists(st.integers(-100, 100)),
)  # fmt: skip
def test_bytes_are_recoded_as_numpy_would(devices, kinds, values):
    array = np.array(values, np.float64).astype(kinds[0]) / (1 if kinds[0].startswith(("int", "bool")) else 3)
    array = array.astype(kinds[0])
    found = devices["10.3.0"].ask("function", "recoded", array.tobytes(), *kinds)
    assert bytes(found) == array.astype(kinds[1]).tobytes()


def test_float_too_large_for_half_becomes_infinite(orin):
    array = np.array([70000.0, -1e30, np.inf, 65504.0], np.float32)
    found = orin.ask("function", "recoded", array.tobytes(), "float32", "float16")
    np.testing.assert_array_equal(np.frombuffer(found, np.float16), [np.inf, -np.inf, np.inf, 65504.0])


# ---------------------------------------------------------------------------------------------------- what it says


def test_boundary_says_what_is_inside(orin, tmp_path):
    engine = product(tmp_path / "e", "10.3.0", device_memory_bytes=3 << 20)
    with orin.load(engine) as session:
        boundary = session.boundary()
        assert (boundary["includes_input_copy"], boundary["includes_output_copy"], boundary["threads"]) == (
            True,
            True,
            1,
        )
        assert "copies inside, no CUDA graph, waiting asleep, buffers by libcudart.so.12" in boundary["detail"]
        assert "the engine needs 3.0 MiB of GPU memory" in boundary["detail"]
    with orin.load(engine, copies=False, cuda_graph=True, spin_wait=True) as session:
        boundary = session.boundary()
        assert (boundary["includes_input_copy"], boundary["includes_output_copy"]) == (False, False)
        assert "copies outside, a CUDA graph of the kernels, busy waiting" in boundary["detail"]


def test_defaults_are_the_same_on_every_version(devices, tmp_path):
    said = set()
    for version, device in devices.items():
        with device.load(product(tmp_path / version, version)) as session:
            said.add(json.dumps(session.boundary()))
    assert len(said) == 1


def test_memory_is_what_the_gpu_lost_beside_what_the_engine_says(device, version, tmp_path):
    before = device.ask("free_bytes")
    with device.load(product(tmp_path / "e", version, device_memory_bytes=5 << 20)) as session:
        answers(session, rows(4))
        memory = session.memory()
        assert memory["engine_bytes"] == 5 << 20
        assert memory["device_bytes"] == (5 << 20) + 4 * 4 * 4 + 4 * 3 * 4
    assert device.ask("free_bytes") == before


@pytest.mark.parametrize("options", [{}, {"cuda_graph": True, "event_times": 3}, {"copies": False}], ids=str)
def test_everything_is_given_back(orin, tmp_path, options):
    before = orin.ask("free_bytes")
    for engine in (product(tmp_path / "p", "10.3.0"), nonzero(tmp_path / "n", "10.3.0")):
        if engine.name == "n" and options.get("cuda_graph"):
            continue
        with orin.load(engine, **options) as session:
            for count in (1, 4):
                answers(session, {"x": np.ones((count, 4), np.float32)})
            session.profile(2)
    assert orin.ask("free_bytes") == before


def test_sessions_do_not_disturb_each_other_nor_an_inference_its_inputs(device, version, tmp_path):
    engine, one, other = product(tmp_path / "e", version), rows(1), rows(3)
    with device.load(engine) as first, device.load(engine, copies=False) as second:
        first.bind(packed(one))
        second.bind(packed(other))
        for _ in range(3):
            first.infer()
            second.infer()
        np.testing.assert_array_equal(fetched(first)["y"], expected(engine, one)["y"])
        np.testing.assert_array_equal(fetched(second)["y"], expected(engine, other)["y"])


def test_events_time_the_last_inferences(orin, tmp_path):
    with orin.load(product(tmp_path / "e", "10.3.0"), event_times=3) as session:
        session.bind(packed(rows(1)))
        assert session.event_times_ms() == []
        for count in range(1, 6):
            session.infer()
            times = session.event_times_ms()
            assert len(times) == min(count, 3)
            assert all(0 < one < 1e4 for one in times)


def test_profile_is_a_pass_of_its_own(device, version, tmp_path):
    engine, x = product(tmp_path / "e", version), rows(3)
    with device.load(engine, cuda_graph=True) as session:
        answers(session, x)
        times = session.profile(3)
        assert [(name, kind) for name, kind, _ in times] == [("mm", ""), ("relu", "")]
        assert all(0 < one_s < 10 for _, _, one_s in times)
        with pytest.raises(RuntimeError, match="no answers yet; infer first"):
            session.outputs()
        session.infer()
        np.testing.assert_array_equal(fetched(session)["y"], expected(engine, x)["y"])


# ---------------------------------------------------------------------------------------------------- refusals


def test_wrong_order_of_calls_is_said(orin, tmp_path):
    with orin.load(product(tmp_path / "e", "10.3.0")) as session:
        for name in ("infer", "profile"):
            with pytest.raises(RuntimeError, match="no inputs yet; bind them first"):
                getattr(session, name)()
        session.bind(packed(rows(1)))
        with pytest.raises(RuntimeError, match="no answers yet; infer first"):
            session.outputs()
    with pytest.raises(RuntimeError, match="no inputs yet"):
        session.infer()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"y": np.zeros((1, 4), np.float32)}, r"takes the inputs \['x'\], not \['x', 'y'\]"),
        ({"x": np.zeros((1, 4), np.int32)}, "input 'x' takes float32, not int32"),
        ({"x": np.zeros((1, 5), np.float32)}, r"input 'x' takes the shape \[1 to 4, 4\], not \[1, 5\]"),
        ({"x": np.zeros(4, np.float32)}, r"input 'x' takes the shape \[1 to 4, 4\], not \[4\]"),
        ({"x": np.zeros((5, 4), np.float32)}, r"\[1 to 4, 4\], not \[5, 4\]; the range was decided .*axes="),
        ({"x": np.zeros((0, 4), np.float32)}, r"\[1 to 4, 4\], not \[0, 4\]"),
    ],
    ids=["name", "dtype", "width", "rank", "range", "empty"],
)
def test_inputs_that_do_not_fit_are_refused_by_name(orin, tmp_path, change, sentence):
    engine, x = product(tmp_path / "e", "10.3.0"), rows(2)
    with orin.load(engine) as session:
        session.bind(packed(x))
        with pytest.raises(ValueError, match=sentence):
            session.bind(packed({**x, **change}))
        np.testing.assert_array_equal(answers(session, x)["y"], expected(engine, x)["y"])


def test_bytes_that_are_not_the_shape_are_refused(orin, tmp_path):
    session = orin.load(product(tmp_path / "e", "10.3.0"))
    with (
        session,
        pytest.raises(ValueError, match=r"input 'x' holds 12 bytes, which is not the shape \[1, 4\] of float32"),
    ):
        session.bind({"x": (bytes(12), "float32", [1, 4])})


def test_shapes_that_fit_the_ranges_and_not_each_other_are_refused(device, version, tmp_path):
    engine = plan(
        tmp_path / "e", version, [helper.make_node("MatMul", ["a", "b"], ["y"], name="mm")],
        {"a": ("float32", [2, "k"]), "b": ("float32", ["k2", 2])}, {"y": ("float32", [2, 2])},
    )  # fmt: skip
    arrays = {"a": np.ones((2, 3), np.float32), "b": np.ones((4, 2), np.float32)}
    with device.load(engine) as session:
        with pytest.raises(ValueError, match="cannot take inputs of these shapes"):
            session.bind(packed(arrays))
        found = answers(session, {**arrays, "a": np.ones((2, 4), np.float32)})
        np.testing.assert_array_equal(found["y"], np.full((2, 2), 4, np.float32))


def test_engine_of_another_place_is_refused_and_both_are_named(device, version, tmp_path):
    engine = product(tmp_path / "e", version)
    here = {"tensorrt": version, "compute_capability": "8.7"}
    with device.load(engine, fingerprint=here):
        pass
    for change in ({"tensorrt": "9.9.9"}, {"compute_capability": "7.2"}):
        there = {**here, **change}
        with pytest.raises(ValueError, match="build it on this device") as told:
            device.load(engine, fingerprint=there)
        assert f"built by TensorRT {there['tensorrt']} for compute capability {there['compute_capability']}" in str(
            told.value
        )
        assert f"here is TensorRT {version} on compute capability 8.7" in str(told.value)
    with device.load(engine, fingerprint={**here, "tensorrt": "8.0.1"}, version_compatible=True):
        pass


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-20], "truncated"),
        (lambda data: data[:4], "magic"),
        (lambda data: b"", "magic"),
        (lambda data: data.replace(b'"10.3.0"', b'"8.6.1"'), "Serialized Engine Version: 8.6.1"),
        (lambda data: data.replace(b'"8.7"', b'"7.2"'), "got compute 7.2"),
    ],
    ids=["truncated", "start", "empty", "version", "gpu"],
)
def test_engine_that_does_not_load_is_said_in_our_words_and_tensorrts(orin, tmp_path, damage, words):
    engine = product(tmp_path / "e", "10.3.0")
    engine.write_bytes(damage(engine.read_bytes()))
    before = orin.ask("free_bytes")
    with pytest.raises(
        RuntimeError, match=r"TensorRT 10\.3\.0 on compute capability 8\.7 does not load the engine"
    ) as told:
        orin.load(engine)
    assert words in str(told.value)
    assert orin.ask("free_bytes") == before


def test_gpu_without_room_is_said_with_figures(orin, tmp_path):
    engine = product(tmp_path / "e", "10.3.0", device_memory_bytes=1 << 20)
    free = orin.ask("free_bytes")
    orin.ask("set", "EMULATED_MEMORY", str((8 << 30) - free + (1 << 20) + 100))
    try:
        with orin.load(engine) as session:
            answers(session, rows(1))
            with pytest.raises(MemoryError, match=r"no room for 48 more bytes \(36 of .* bind a smaller batch"):
                session.bind(packed(rows(4)))
            answers(session, rows(1))
        big = product(tmp_path / "big", "10.3.0", device_memory_bytes=2 << 20)
        with pytest.raises(MemoryError, match=r"which needs 2097152 bytes .*OutOfMemory"):
            orin.load(big)
        with orin.load(nonzero(tmp_path / "n", "10.3.0")) as session:
            session.bind(packed({"x": np.ones((2, 4), np.float32)}))
            with pytest.raises(MemoryError, match="no room for 128 more bytes"):
                session.infer()
    finally:
        orin.ask("set", "EMULATED_MEMORY", "")


def test_graph_that_cannot_be_captured_is_said(orin, tmp_path):
    engine, x = product(tmp_path / "e", "10.3.0"), rows(1)
    orin.ask("set", "EMULATED_FAULT", "capture")
    try:
        with orin.load(engine, cuda_graph=True) as session:
            session.bind(packed(x))
            with pytest.raises(RuntimeError, match=r"cannot be captured as a CUDA graph .*900.*leave cuda_graph out"):
                session.infer()
        with orin.load(engine) as session:
            answers(session, x)
    finally:
        orin.ask("set", "EMULATED_FAULT", "")
    session = orin.load(nonzero(tmp_path / "n", "10.3.0"), cuda_graph=True)
    with session, pytest.raises(ValueError, match="size of the output 'where' depends on the data"):
        session.bind(packed({"x": np.ones((1, 4), np.float32)}))


def test_failed_inference_is_said_with_tensorrts_words(device, version, tmp_path):
    engine, x = product(tmp_path / "e", version), rows(1)
    with device.load(engine) as session:
        session.bind(packed(x))
        device.ask("set", "EMULATED_FAULT", "enqueue")
        try:
            with pytest.raises(RuntimeError, match=r"could not compute the model \(TensorRT says: .*an emulated fault"):
                session.infer()
        finally:
            device.ask("set", "EMULATED_FAULT", "")
        with pytest.raises(RuntimeError, match="no answers yet"):
            session.outputs()
        np.testing.assert_array_equal(answers(session, x)["y"], expected(engine, x)["y"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"buffers": "torch"}, "buffers is 'torch'; give cudart or pycuda"),
        ({"buffers": "pycuda"}, "buffers is pycuda, which .* cannot load .*pip install pycuda"),
        ({"module": "tensorflow"}, "module is 'tensorflow'; give tensorrt or tensorrt_rtx"),
        ({"threads": 4}, "threads is 4, and one thread feeds the GPU"),
        ({"event_times": -1}, "event_times is -1; give 0 or more"),
        ({"cuda_graph": True, "buffers": "pycuda"}, "pycuda cannot capture CUDA graphs"),
    ],
    ids=["buffers", "pycuda", "module", "threads", "events", "pycuda-graph"],
)
def test_options_that_cannot_be_meant_are_refused(orin, tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        orin.load(product(tmp_path / "e", "10.3.0"), **options)


# ---------------------------------------------------------------------------------------------------- other devices


def folders(*names: str) -> str:
    return os.pathsep.join(str(EMULATED / name) for name in names)


def alone(variables: Mapping[str, str], engine: Path, code: str) -> str:
    """Run code on a device of its own, with `Session` and `engine`; return what it printed."""
    start = (
        f"import sys; sys.path.insert(0, {str(RUNNER)!r})\n"
        "import runner, numpy as np\n"
        f"Session = runner.load_device_half({str(SESSION)!r}).Session\n"
        f"engine, x = {str(engine)!r}, np.arange(8, dtype='float32').reshape(2, 4)\n"
        "def answer(session):\n"
        "    session.bind({'x': (x.tobytes(), 'float32', [2, 4])}); session.infer(); session.infer()\n"
        "    return np.frombuffer(session.outputs()['y'][0], 'float32').tolist()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_pycuda_is_the_same_behind_the_same_interface(stubs, tmp_path):
    engine = product(tmp_path / "e", "10.3.0")
    variables = environment("10.3.0", stubs, PYTHONPATH=folders("", "with_pycuda"))
    code = """
for options in ({}, {"buffers": "pycuda"}, {"buffers": "pycuda", "copies": False, "event_times": 1}):
    with Session(engine, options) as session:
        print(answer(session), len(session.event_times_ms()), len(session.profile(1)))
        print(session.boundary()["detail"].split("buffers by ")[1].split(",")[0], session.memory()["engine_bytes"])
import os
os.environ["EMULATED_MEMORY"] = str((1 << 20) + 20)
with Session(engine, {"buffers": "pycuda"}) as session:
    try:
        answer(session)
    except MemoryError as error:
        print(error)
"""
    lines = alone(variables, engine, code).splitlines()
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    wanted = expected(engine, {"x": x})["y"].ravel().tolist()
    assert lines[0::2][:3] == [f"{wanted} 0 2", f"{wanted} 0 2", f"{wanted} 1 2"]
    assert lines[1::2][:3] == ["libcudart.so.12 1048576", "pycuda 1048576", "pycuda 1048576"]
    assert "no room for 32 more bytes" in lines[6]


def test_without_cuda_runtime_pycuda_is_named_where_it_is_installed(tmp_path):
    bare = build_stubs(tmp_path / "bare", with_runtime=False)
    code = """
try:
    Session(engine, {})
except RuntimeError as error:
    print(error)
"""
    variables = environment("10.3.0", bare, PYTHONPATH=folders("", "with_pycuda"))
    said = alone(variables, product(tmp_path / "e", "10.3.0"), code)
    assert "or give -O buffers=pycuda, which is installed" in said


def test_cuda_11_captures_graphs_and_waits_in_one_way_for_all_sessions(tmp_path):
    variables = environment("8.5.3", build_stubs(tmp_path / "cuda", cuda="11"))
    engine = product(tmp_path / "e", "8.5.3")
    code = """
with Session(engine, {"cuda_graph": True}) as session:
    print(answer(session), "libcudart.so.11.0" in session.boundary()["detail"])
Session(engine, {}).__exit__()
try:
    Session(engine, {"spin_wait": True})
except RuntimeError as error:
    print(error)
"""
    first, second = alone(variables, engine, code).splitlines()
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    assert first == f"{expected(engine, {'x': x})['y'].ravel().tolist()} True"
    assert "spin_wait cannot be changed once a process uses the GPU" in second


def test_rtx_engine_runs_on_its_own_module_where_both_are_installed(stubs, tmp_path):
    engine = product(tmp_path / "e", "11.4.0")
    variables = environment("11.4.0", stubs, PYTHONPATH=folders("with_rtx", ""), EMULATED_FAULT="capture")
    code = """
with Session(engine, {"module": "tensorrt_rtx", "cuda_graph": True}) as session:
    print(answer(session), session.runtime, "CUDA graphs by the runtime" in session.boundary()["detail"])
with Session(engine, {}) as session:
    print(session.runtime, Session.runtime)
"""
    first, second = alone(variables, engine, code).splitlines()
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    assert first == f"{expected(engine, {'x': x})['y'].ravel().tolist()} tensorrt_rtx 1.7.1 True"
    assert second == "tensorrt 11.4.0 tensorrt 11.4.0"


def refusal(variables: Mapping[str, str], *flags: str) -> str:
    """Return why the session's module cannot be imported on a device, in the runner's words."""
    code = (
        f"import sys; sys.path.insert(0, {str(RUNNER)!r})\n"
        "import runner\n"
        "try:\n"
        f"    runner.load_device_half({str(SESSION)!r})\n"
        "except runner.Refusal as refusal:\n"
        "    print(refusal.kind, refusal)\n"
    )
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    kind, _, message = done.stdout.strip().partition(" ")
    assert kind == "missing-runtime"
    return message


def test_machine_without_driver_is_told_before_tensorrt_is_touched():
    said = refusal({**environment("10.3.0", None), "LD_LIBRARY_PATH": ""})
    assert "there is no NVIDIA driver here (libcuda.so.1: cannot open shared object file" in said
    assert "--gpus all" in said


def test_driver_without_gpu_is_told(stubs):
    assert "cuInit says 'no CUDA-capable device is detected' (CUDA error 100)" in refusal(
        environment("10.3.0", stubs, EMULATED_CUDA_DEVICES="0")
    )


def test_device_without_tensorrt_is_told_what_to_install(stubs):
    said = refusal(
        {**environment("10.3.0", stubs), "PYTHONPATH": ""}, "-S"
    )  # -S: without what this Python has installed
    assert "has no module 'tensorrt'" in said
    assert "apt install python3-libnvinfer" in said


def test_engine_for_a_module_that_is_not_here_is_refused(stubs, tmp_path):
    (tmp_path / "tensorrt.py").write_text("__version__ = '10.3.0'\n")
    code = (
        f"import sys; sys.path.insert(0, {str(RUNNER)!r})\n"
        "import runner\n"
        f"runner.load_device_half({str(SESSION)!r}).Session('engine', {{'module': 'tensorrt_rtx'}})\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, **environment("10.3.0", stubs), "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "has no module 'tensorrt_rtx'" in last
    assert "pip install tensorrt-rtx" in last


def test_real_tensorrt_rtx_without_a_real_gpu_refuses_in_a_sentence(stubs, tmp_path):
    """The emulated driver gets us to NVIDIA's own library, which then finds no GPU; nothing crashes."""
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX; pip install 'edgedeploy[tensorrt_rtx]'")
    engine = product(tmp_path / "e", "10.3.0")
    code = """
try:
    Session(engine, {})
except RuntimeError as error:
    print(Session.runtime, error)
half = sys.modules["edgedeploy_device_half"]
times = []
half.layer_times(half.TENSORRT, times).report_layer_time("conv", 0.5)
tensor = half.Tensor("y", "y", "float32", "float32", [-1], False)
half.output_allocator(half.TENSORRT, None, tensor, []).notify_shape("y", half.TENSORRT.Dims((2, 3)))
print(times, tensor.now, tensor.size)
"""
    said, heard = alone({**environment("10.3.0", stubs), "PYTHONPATH": ""}, engine, code).splitlines()
    assert heard == "[('conv', 0.5)] [2, 3] 24"
    assert said.startswith("tensorrt_rtx 1.")
    assert "does not load the engine" in said
    assert "magicTag" in said


def test_tensorrt_whose_libraries_are_missing_is_told(stubs, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')\n")
    said = refusal({**environment("10.3.0", stubs), "PYTHONPATH": str(tmp_path)})
    assert "the module 'tensorrt' is here and cannot be loaded: libnvinfer.so.10: cannot open" in said


def test_device_without_cuda_runtime_is_told_what_to_install(tmp_path):
    toolkit = list(Path("/usr/local/cuda/lib64").glob("libcudart.so.*"))
    said = refusal(environment("10.3.0", build_stubs(tmp_path / "bare", with_runtime=False)))
    # A toolkit of the machine that runs the tests is found, and refuses to work with a driver that is none.
    wanted = "no CUDA runtime that was found works with it" if toolkit else "pip install nvidia-cuda-runtime-cu12"
    assert wanted in said


def test_driver_too_old_for_the_runtime_is_told(stubs):
    said = refusal(environment("10.3.0", stubs, EMULATED_CUDA_DRIVER="10020"))
    assert "the driver serves CUDA up to 10.2" in said
    assert "libcudart.so.12 says 'CUDA driver version is insufficient for CUDA runtime version'" in said


# ---------------------------------------------------------------------------------------------------- the runner


def test_runner_measures_an_engine_and_fetches_its_answers(stubs, tmp_path):
    engine = product(tmp_path / "e", "10.3.0", device_memory_bytes=1 << 20)
    inputs = {"x": RNG.standard_normal((5, 4), np.float32)}
    save_file(inputs, tmp_path / "inputs")
    paths = [engine, SESSION, tmp_path / "inputs"]
    artifact, session, data = map(sha256_file, paths)
    python = device_python(tmp_path / "python", "10.3.0", stubs)
    transport = LocalTransport("orin")
    schedule = Schedule(bursts_per_visit=2, samples_per_burst=3, warm_up_cap_s=0.2)
    options = {"fingerprint": {"tensorrt": "10.3.0", "compute_capability": "8.7"}, "module": "tensorrt"}
    record = LabDevice(transport="local", root=str(tmp_path / "r"), python=str(python))
    with connect(transport, record, device_name="orin") as agent:
        ship(agent, transport, {sha256_file(path): path for path in paths})
        side = Side("tensorrt", artifact, session, options, data, batch=2)
        (measured,) = measure_block(agent, [side], schedule, block=0, seed=0)
        memory = measure_memory(agent, side, schedule)
        outputs = compute_outputs(agent, transport, side, tmp_path / "outputs", schedule)
        assert [len(burst.samples_s) for burst in measured.visit.bursts] == [3, 3]
        assert measured.runtime == outputs.runtime == "tensorrt 10.3.0"
        assert memory.peak_rss_bytes > memory.import_rss_bytes
        fetched_outputs = load_file(tmp_path / "outputs")
        np.testing.assert_array_equal(fetched_outputs["y"], expected(engine, inputs)["y"])

        elsewhere = {"fingerprint": {"tensorrt": "8.5.2.2", "compute_capability": "7.2"}}
        with pytest.raises(VisitFailed, match=r"TensorRT 8\.5\.2\.2 for compute capability 7\.2") as told:
            compute_outputs(
                agent, transport, Side("t", artifact, session, elsewhere, data, batch=2), tmp_path / "o", schedule
            )
        assert told.value.kind == "bad-artifact"
        with pytest.raises(VisitFailed, match=r"\[1 to 4, 4\], not \[5, 4\]") as told:
            compute_outputs(agent, transport, Side("t", artifact, session, {}, data, batch=5), tmp_path / "o", schedule)
        assert told.value.kind == "bad-input"


def test_runner_says_that_the_runtime_is_missing(stubs, tmp_path):
    engine = product(tmp_path / "e", "10.3.0")
    save_file(rows(2), tmp_path / "inputs")
    paths = [engine, SESSION, tmp_path / "inputs"]
    artifact, session, data = map(sha256_file, paths)
    python = device_python(tmp_path / "python", "10.3.0", stubs, EMULATED_CUDA_DEVICES="0")
    transport = LocalTransport("orin")
    record = LabDevice(transport="local", root=str(tmp_path / "r"), python=str(python))
    with connect(transport, record, device_name="orin") as agent:
        ship(agent, transport, {sha256_file(path): path for path in paths})
        with pytest.raises(VisitFailed, match="no CUDA-capable device is detected") as told:
            compute_outputs(
                agent, transport, Side("t", artifact, session, {}, data, batch=1), tmp_path / "o", Schedule()
            )
    assert told.value.kind == "missing-runtime"
