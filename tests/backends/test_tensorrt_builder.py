"""TensorRT's builder against the emulated versions: what it asks of them, and what becomes of everything that fails."""

from __future__ import annotations

import ast
import json
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgedeploy.backends.tensorrt import builder
from edgedeploy.backends.trt_layers import engine_report, layers_from_inspector, not_on_integers
from edgedeploy.errors import VisitFailed
from edgedeploy.lab import builders
from edgedeploy.lab.bundle import connect, ship
from edgedeploy.lab.conversation import Progress
from edgedeploy.lab.transport import LocalTransport
from edgedeploy.records.device import Device
from edgedeploy.storage import sha256_file
from tests.backends.emulated_tensorrt import VERSIONS, build_many, device_python
from tests.backends.trt_kits import INT8_NODES, write_kit
from tests.emulated.stubs import build_stubs

BUILDER = Path(builder.__file__)
WEAK = ("8.5.3", "8.6.0")
EVERY = pytest.mark.parametrize("version", VERSIONS)


# ------------------------------------------------------------------------------------------------ kits and their jobs


def replace_last(operator: str, **attributes: Any) -> Any:
    def change(graph: onnx.GraphProto) -> None:
        graph.node[-1].CopyFrom(
            helper.make_node(operator, graph.node[-1].input, graph.node[-1].output, name="/head/last", **attributes)
        )

    return change


def set_constant(name: str, array: Any) -> Any:
    def change(graph: onnx.GraphProto) -> None:
        (tensor,) = [one for one in graph.initializer if one.name == name]
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(array), name))

    return change


def uint8_pair(graph: onnx.GraphProto) -> None:
    set_constant("x/zero", np.uint8(0))(graph)


def integer_bias(graph: onnx.GraphProto) -> None:
    """Store the last bias as int32 behind a DequantizeLinear, as ONNX Runtime's quantizer does."""
    set_constant("b3", np.zeros(5, np.int32))(graph)
    graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "b3/scale"))
    node = helper.make_node("DequantizeLinear", ["b3", "b3/scale"], ["b3/values"], name="b3/dequantize")
    (fc,) = [one for one in graph.node if one.name == "/fc"]
    fc.input[2] = "b3/values"
    graph.node.insert(0, node)


def mixed_floats(graph: onnx.GraphProto) -> None:
    """Divide by a float32 constant, whatever the graph computes in."""
    graph.initializer.append(numpy_helper.from_array(np.float32(2), "two"))
    (relu,) = [one for one in graph.node if one.name == "/relu1"]
    relu.CopyFrom(helper.make_node("Div", ["c1", "two"], ["r1"], name="/div"))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory) -> Path:
    return build_stubs(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def kits(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kits")
    made = {precision: write_kit(folder / precision, precision) for precision in ("fp32", "fp16", "int8")}
    made["dynamic"] = write_kit(folder / "dynamic", "int8", dynamic=True)
    made["no range"] = write_kit(folder / "no range", "fp16", dynamic=True, profiles={})
    made["bad range"] = write_kit(
        folder / "bad range", "fp16", dynamic=True,
        profiles={"x": {"min": [4, 3, 8, 8], "opt": [2, 3, 8, 8], "max": [1, 3, 8, 8]}},
    )  # fmt: skip
    made["unknown op"] = write_kit(folder / "unknown", "fp32", change=replace_last("QLinearConv"))
    made["zero point"] = write_kit(folder / "zero", "int8", change=set_constant("x/zero", np.int8(3)))
    made["uint8"] = write_kit(folder / "uint8", "int8", change=uint8_pair)
    made["int32 bias"] = write_kit(folder / "bias", "int8", change=integer_bias)
    made["mixed"] = write_kit(folder / "mixed", "fp16", change=mixed_floats)
    made["heavier"] = write_kit(folder / "heavier", "fp16", seed=1)
    made["other scale"] = write_kit(folder / "scale", "int8", change=set_constant("x/scale", np.float32(0.07)))
    made["other graph"] = write_kit(folder / "graph", "fp16", seed=1, change=replace_last("LogSoftmax", axis=-1))
    ranges = {"x": {"min": [1, 3, 8, 8], "opt": [2, 3, 8, 8], "max": [3, 3, 8, 8]}}
    made["other range"] = write_kit(folder / "range", "int8", dynamic=True, profiles=ranges)
    made["lost pin"] = write_kit(folder / "pin", "fp16", float32_nodes={"/gone": "its output reaches 7.1e4"})
    return made


class Many:
    """Jobs that one process does, one after another."""

    def __init__(self, folder: Path, kits: dict[str, Path]) -> None:
        self.folder, self.kits = folder, kits
        self.jobs: dict[str, dict[str, Any]] = {}

    def add(self, name: str, kit: str = "fp16", fault: str = "", files: Any = (), **options: Any) -> Path:
        """Add a job; return the folder where its files will be, for later jobs to name."""
        folder = self.folder / name.replace(" ", "-")
        given = {"kit": str(self.kits[kit]), **{key: str(path) for key, path in dict(files).items()}}
        self.jobs[name] = {"files": given, "options": options, "folder": str(folder), "fault": fault}
        return folder


@pytest.fixture(scope="module", params=VERSIONS)
def done(request, libraries, kits, tmp_path_factory) -> Any:
    """Everything that one version is asked for, done in one process: {"version", "probe", "answers", "printed"}."""
    many = Many(tmp_path_factory.mktemp("many"), kits)
    for kit in ("fp32", "fp16", "int8", "dynamic", "no range", "bad range", "unknown op", "zero point", "uint8",
                "int32 bias", "mixed", "lost pin"):  # fmt: skip
        many.add(kit, kit)
    many.add("no int8", "int8", fault="no-int8")
    for fault in ("oom", "no-workspace", "build-none", "parse"):
        many.add(fault, fault=fault)
    first = many.add("first", "int8")
    many.add("again", "int8", files={"timing_cache": first / "timing.cache"})
    many.folder.joinpath("garbage").write_bytes(b"no cache at all")
    many.add("garbage cache", "int8", files={"timing_cache": many.folder / "garbage"})
    foreign = json.dumps({"version": "9.9.9", "capability": "8.7", "entries": {}}).encode()
    many.folder.joinpath("foreign").write_bytes(b"EMUTC1\n" + foreign)
    many.add("foreign cache", "int8", files={"timing_cache": many.folder / "foreign"})
    many.add("pinned", "int8", builds=3)
    many.add("free", "int8", builds=2, pin_tactics=False, files={"timing_cache": first / "timing.cache"})
    many.add("level", optimization_level=5)
    many.add("portable", version_compatible=True)
    many.add("small", workspace_mib=16)
    many.add("dla", "int8", dla_core=1)
    many.add("dla 2", "int8", dla_core=2)
    many.add("dla fp32", "fp32", dla_core=0)
    for kit in ("fp16", "int8", "dynamic"):
        many.add(f"refit {kit}", kit, refit=True)
    wide = many.folder / "refit-dynamic" / "model.engine"
    many.add("other range", "other range", files={"engine": wide, "engine_kit": kits["dynamic"]}, refit=True)
    old, old8 = many.folder / "refit-fp16" / "model.engine", many.folder / "refit-int8" / "model.engine"
    plain = many.folder / "fp16" / "model.engine"
    many.add("refitted", "heavier", files={"engine": old, "engine_kit": kits["fp16"]}, refit=True)
    many.add("anew", "heavier", refit=True)
    many.add("other scale", "other scale", files={"engine": old8, "engine_kit": kits["int8"]}, refit=True)
    many.add("other graph", "other graph", files={"engine": old, "engine_kit": kits["fp16"]}, refit=True)
    many.add("not refittable", "heavier", files={"engine": plain, "engine_kit": kits["fp16"]}, refit=True)
    many.add("no old kit", "heavier", files={"engine": old}, refit=True)
    many.add("no numpy", "heavier", files={"engine": old, "engine_kit": kits["fp16"]}, refit=True)
    many.jobs["no numpy"]["hidden"] = "numpy"
    result, printed = build_many(BUILDER, request.param, libraries, many.jobs, EMULATED_DLA_CORES="2")
    return {"version": request.param, "printed": printed, **result}


def answer(done: Any, name: str) -> Any:
    found = done["answers"][name]
    assert "error" not in found, f"{done['version']}: {name}: {found}"
    return found


def refusal(done: Any, name: str) -> Any:
    found = done["answers"][name]
    assert "error" in found, f"{done['version']}: {name} was built: {found}"
    return found


def layers(done: Any, name: str) -> Any:
    return layers_from_inspector(Path(answer(done, name)["made"]["layers"]).read_text())


# ------------------------------------------------------------------------------------------------ lowering


def test_typing_and_flags_follow_what_the_module_has(done):
    is_typed = done["version"] not in WEAK
    for name, weak in {
        "fp32": set(),
        "fp16": {"FP16", "OBEY_PRECISION_CONSTRAINTS"},
        "int8": {"FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"},
    }.items():
        report = answer(done, name)["report"]
        assert report["typed"] is is_typed
        batch = {"EXPLICIT_BATCH"} if not done["version"].startswith("11") else set()
        assert set(report["flags"]) == batch | ({"STRONGLY_TYPED"} if is_typed else weak)


def test_all_that_was_quantized_runs_on_integers(done):
    for name in ("int8", "dynamic"):
        found = layers(done, name)
        assert not_on_integers(found, INT8_NODES) == {}
        assert {layer.precision for layer in found if "/conv1" in layer.nodes} == {"int8"}
    assert "int8" not in {layer.precision for layer in layers(done, "fp16")}


def test_layer_that_lost_its_integers_is_named(done):
    assert not_on_integers(layers(done, "no int8"), INT8_NODES) == {"/conv1": "fp16"}


def test_nodes_that_must_stay_float32_do(done):
    for name in ("fp16", "int8"):
        kinds = {node: layer.precision for layer in layers(done, name) for node in layer.nodes}
        assert kinds["/softmax"] == "fp32"
        assert kinds["/pool"] == "fp16"


def test_node_that_cannot_be_pinned_is_told(done):
    notes = answer(done, "lost pin")["report"]["notes"]
    told = any("/gone" in note and "7.1e4" in note for note in notes)
    assert told is (done["version"] in WEAK)


def test_fp32_is_not_tf32_and_says_so(done):
    assert any("TF32 is off" in note for note in answer(done, "fp32")["report"]["notes"])
    plan = Path(answer(done, "fp32")["made"]["engine"]).read_bytes()
    assert json.loads(plan.split(b"\n")[1])["flags"] == []


def test_engine_report_of_a_built_engine_is_accepted(done):
    pairs = {"x": (0.05,), "w1": (0.1,) * 4, "f": (0.05,)}
    report = engine_report(layers(done, "int8"), INT8_NODES, pairs, is_refused=True)
    assert {entry.split()[-1] for entry in report.quantized} == set(INT8_NODES)


def test_inputs_and_outputs_are_told_with_their_open_axes(done):
    (x, y) = answer(done, "dynamic")["report"]["io"]
    assert x == {"name": "x", "mode": "input", "dtype": "float32", "shape": [-1, 3, 8, 8]}
    assert (y["name"], y["mode"], y["dtype"]) == ("y", "output", "float32")


def test_report_says_what_the_engine_was_made_for(done):
    report = answer(done, "int8")["report"]
    assert report["tensorrt"] == done["version"]
    assert (report["gpu"], report["compute_capability"], report["cuda"]) == ("Emulated GPU", "8.7", "12.6")
    (build,) = report["builds"]
    engine = Path(answer(done, "int8")["made"]["engine"])
    assert (build["sha256"], build["size_bytes"]) == (sha256_file(engine), engine.stat().st_size)
    cache = Path(answer(done, "int8")["made"]["timing_cache"])
    assert report["timing_cache_sha256"] == sha256_file(cache)


def test_workspace_is_what_was_asked_or_a_share_of_what_is_free(done):
    assert answer(done, "small")["report"]["workspace_bytes"] == 16 << 20
    free = answer(done, "fp16")["report"]["workspace_bytes"]
    assert 0 < free <= done["probe"]["devices"][0]["memory_bytes"] * builder.INTEGRATED_SHARE


# ------------------------------------------------------------------------------------------------ what cannot be built


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unknown op", ("'/head/last' (QLinearConv)", "No importer registered", "replace the operator")),
        ("zero point", ("'x/quantize' (QuantizeLinear)", "Non-zero zero point is not supported", "symmetric int8")),
        ("uint8", ("'x/quantize' (QuantizeLinear)", "UINT8 zero_point only on DLA", "signed int8")),
        ("int32 bias", ("'b3/dequantize' (DequantizeLinear)", "input has type Int32", "biases must stay float")),
        ("parse", ("'/softmax' (Softmax)", "No importer registered", "another back end")),
    ],
)
def test_parser_refusal_names_node_operator_and_remedy(done, name, words):
    found = refusal(done, name)
    assert found["kind"] == "parse-failed"
    for word in (f"TensorRT {done['version']} cannot parse node", *words):
        assert word in found["error"]


def test_mixed_floats_are_refused_where_the_graph_is_typed(done):
    if done["version"] in WEAK:
        assert answer(done, "mixed")["report"]["builds"]
    else:
        found = refusal(done, "mixed")
        assert "'/div' (Div)" in found["error"]
        assert "must have same input types. But they are of types Half and Float" in found["error"]


def test_open_axis_without_a_range_is_refused_before_the_build(done):
    found = refusal(done, "no range")
    assert found["kind"] == "bad-option"
    assert "input 'x'" in found["error"]
    assert "-O axes=" in found["error"]


def test_range_in_the_wrong_order_is_refused(done):
    found = refusal(done, "bad range")
    assert found["kind"] == "bad-option"
    assert "'x'" in found["error"]


def test_build_without_result_names_the_layer(done):
    found = refusal(done, "build-none")
    assert found["kind"] == "build-failed"
    assert f"stopped at {layers(done, 'fp16')[0].name}" in found["error"]


@pytest.mark.parametrize(("name", "remedy"), [("oom", "end other programs"), ("no-workspace", "workspace_mib=")])
def test_lack_of_memory_is_told_apart(done, name, remedy):
    found = refusal(done, name)
    assert found["kind"] == "out-of-memory"
    assert remedy in found["error"]


def test_log_shows_what_was_at_work(done):
    assert "[V] Parsing node: /conv2 [Conv]" in done["printed"]
    assert "=============== Computing costs for" in done["printed"]


# ------------------------------------------------------------------------------------------------ options


def test_optimization_level_where_the_version_has_one(done):
    if done["version"] == "8.5.3":
        assert "has no optimization level" in refusal(done, "level")["error"]
    else:
        answer(done, "level")


def test_portable_engine_where_the_version_has_one(done):
    if done["version"] == "8.5.3":
        assert "has no VERSION_COMPATIBLE" in refusal(done, "portable")["error"]
    else:
        assert "VERSION_COMPATIBLE" in answer(done, "portable")["report"]["flags"]


def test_dla_says_layer_by_layer_what_it_takes(done):
    report = answer(done, "dla")["report"]
    assert (report["dla"]["/conv1"], report["dla"]["/softmax"]) == ("dla", "gpu")
    assert "GPU_FALLBACK" in report["flags"]
    assert report["typed"] is done["version"].startswith("11")
    assert any("falls back to the GPU" in note for note in report["notes"])


def test_dla_core_that_is_not_there_is_refused(done):
    assert "dla_core is 2 and this device has 2 DLA cores" in refusal(done, "dla 2")["error"]
    assert "DLA computes no float32" in refusal(done, "dla fp32")["error"]


# ------------------------------------------------------------------------------------------------ timing cache, rebuilds


def tactics(done: Any, name: str) -> list[str]:
    return [build["tactics_sha256"] for build in answer(done, name)["report"]["builds"]]


def test_timing_cache_makes_the_second_build_choose_as_the_first(done):
    assert answer(done, "again")["report"]["used_timing_cache"] is True
    assert tactics(done, "again") == tactics(done, "first")


@pytest.mark.parametrize("name", ["garbage cache", "foreign cache"])
def test_timing_cache_of_something_else_is_told_and_replaced(done, name):
    report = answer(done, name)["report"]
    assert report["used_timing_cache"] is False
    assert any("timing cache at hand is damaged, or was made by another TensorRT" in note for note in report["notes"])


def test_pinned_builds_choose_the_same_kernels(done):
    found = answer(done, "pinned")
    assert len(tactics(done, "pinned")) == 3
    assert len(set(tactics(done, "pinned"))) == 1
    assert {"engine", "engine-2", "engine-3", "layers-3"} <= set(found["made"])
    assert "timing_cache-2" not in found["made"]
    can_fail = done["version"] not in WEAK
    assert found["report"]["is_pinned"] is can_fail
    assert any("cannot be told to fail" in note for note in found["report"]["notes"]) is not can_fail


def test_free_builds_differ_and_keep_their_own_caches(done):
    found = answer(done, "free")
    assert found["report"]["used_timing_cache"] is False
    assert len(set(tactics(done, "free"))) == 2
    assert found["report"]["is_pinned"] is False
    caches = {sha256_file(Path(found["made"][name])) for name in ("timing_cache", "timing_cache-2")}
    assert caches == {build["timing_cache_sha256"] for build in found["report"]["builds"]}
    assert len(caches) == 2


# ------------------------------------------------------------------------------------------------ refitting


def model_of(engine: str) -> onnx.ModelProto:
    return onnx.load_from_string(Path(engine).read_bytes().split(b"\n", 2)[2])


def test_new_weights_go_into_the_old_engine(done):
    found = answer(done, "refitted")
    assert found["report"]["refitted"] is True
    assert found["report"]["parse_s"] == 0.0
    anew = model_of(answer(done, "anew")["made"]["engine"])
    inside = {one.name: numpy_helper.to_array(one) for one in model_of(found["made"]["engine"]).graph.initializer}
    old = {
        one.name: numpy_helper.to_array(one)
        for one in model_of(answer(done, "fp16")["made"]["engine"]).graph.initializer
    }
    for one in anew.graph.initializer:
        np.testing.assert_array_equal(inside[one.name], numpy_helper.to_array(one))
    assert (inside["w1"] != old["w1"]).any()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("other scale", "cannot take new values of 'x/scale'"),
        ("other graph", "more than weights has changed"),
        ("other range", "more than weights has changed"),
        ("not refittable", "was not built with -O refit=true"),
        ("no old kit", "without the kit that it was made of"),
    ],
)
def test_engine_that_cannot_be_refitted_is_built_anew(done, name, why):
    report = answer(done, name)["report"]
    assert report["refitted"] is False
    assert any(why in note and "built anew" in note for note in report["notes"])
    assert report["builds"][0]["size_bytes"]


def test_weights_without_numpy_are_put_in_only_where_a_file_is_taken(done):
    report = answer(done, "no numpy")["report"]
    assert report["refitted"] is (done["version"] not in WEAK)
    assert any("has no numpy" in note for note in report["notes"]) is not report["refitted"]


# ------------------------------------------------------------------------------------------------ the time limit


def test_stopped_build_goes_on_from_its_timing_cache(libraries, kits, tmp_path):
    many = Many(tmp_path, kits)
    cut = many.add("cut", "int8", fault="slow", time_limit_s=1)
    many.add("on", "int8", fault="slow", time_limit_s=30, files={"timing_cache": cut / "timing.cache"})
    result, _ = build_many(BUILDER, "10.3.0", libraries, many.jobs, EMULATED_STEP_S="0.35")
    stopped = result["answers"]["cut"]
    assert set(stopped["made"]) == {"timing_cache"}
    assert "time limit of 1 s is over at" in stopped["report"]["stopped"]
    assert any(total and done_ for _, done_, total in stopped["told"]), "the monitor's steps are told"
    on = result["answers"]["on"]
    assert on["report"]["used_timing_cache"] is True
    known = json.loads(Path(stopped["made"]["timing_cache"]).read_bytes().split(b"\n")[1])["entries"]
    after = json.loads(Path(on["made"]["timing_cache"]).read_bytes().split(b"\n")[1])["entries"]
    assert 0 < len(known) < len(after)
    assert known.items() <= after.items()


# ------------------------------------------------------------------------------------------------ in the runner's child


class Bench:
    """A device on this machine for one emulated version and fault."""

    def __init__(self, folder: Path, version: str, libraries: Path | None, **variables: str) -> None:
        python = device_python(folder / "python", version, libraries, **variables)
        self.device = Device(transport="local", root=str(folder / "root"), python=str(python), timeout_s=30.0)
        self.told: list[Progress] = []

    def build(self, kit: Path, *, timeout_s: float = 60.0, **options: Any) -> Any:
        files = {sha256_file(path): path for path in (kit, BUILDER)}
        with LocalTransport("bench") as transport, connect(transport, self.device, device_name="bench") as agent:
            ship(agent, transport, files)
            return builders.build(
                agent,
                sha256_file(BUILDER),
                {"kit": sha256_file(kit)},
                options,
                timeout_s=timeout_s,
                hear=self.told.append,
            )


def test_runner_builds_and_keeps_what_was_made_by_digest(libraries, kits, tmp_path):
    bench = Bench(tmp_path, "10.13.3", libraries)
    report, made = bench.build(kits["int8"])
    assert report["typed"] is True
    assert set(made) == {"engine", "layers", "timing_cache"}
    for one in made.values():
        kept = Path(bench.device.root) / "objects" / one.sha256
        assert (sha256_file(kept), kept.stat().st_size) == (one.sha256, one.size_bytes)
    texts = [told.text for told in bench.told]
    for doing in ("parsing the model", "building the engine", "reading the engine's layers"):
        assert any(text.startswith(doing) for text in texts)
    assert not (Path(bench.device.root) / "building").exists()


@pytest.mark.parametrize(
    ("fault", "options", "timeout_s", "words"),
    [
        ("segv", {}, 60.0, ("was killed by SIGSEGV", "Computing costs for x/quantize")),
        ("segv-parse", {}, 60.0, ("was killed by SIGSEGV", "Parsing node: ")),
        ("killed", {}, 60.0, ("was killed by SIGKILL", "out-of-memory killer", "Computing costs for x/quantize")),
        ("hang", {"time_limit_s": 1}, 60.0, ("time limit of 1 s is over while building the engine at x/quantize",
                                              "-O time_limit_s=")),
        ("hang", {}, 2.0, ("no answer within 2 s", "Computing costs for x/quantize")),
    ],
)  # fmt: skip
def test_death_of_the_build_is_a_sentence_with_the_last_lines(
    libraries, kits, tmp_path, fault, options, timeout_s, words
):
    bench = Bench(tmp_path, "8.5.3", libraries, EMULATED_FAULT=fault)
    with pytest.raises(VisitFailed) as failed:
        bench.build(kits["int8"], timeout_s=timeout_s, **options)
    for word in words:
        assert word in str(failed.value)


def test_without_a_driver_nothing_of_tensorrt_is_made(kits, tmp_path):
    with pytest.raises(VisitFailed, match="there is no NVIDIA driver here") as failed:
        Bench(tmp_path, "8.6.0", None).build(kits["fp32"])
    assert failed.value.kind == "no-driver"


def test_driver_without_a_gpu_is_told(libraries, kits, tmp_path):
    with pytest.raises(VisitFailed, match=r"no-driver|finds no GPU|returned error 100") as failed:
        Bench(tmp_path, "10.3.0", libraries, EMULATED_CUDA_DEVICES="0").build(kits["fp32"])
    assert failed.value.kind == "no-driver"


# ------------------------------------------------------------------------------------------------ what is here


def test_probe_says_what_is_here(done):
    found = done["probe"]
    assert found["driver"] == ""
    assert found["tensorrt"] == done["version"]
    assert found["cuda_driver"] == "12.6"
    assert found["devices"] == [
        {"name": "Emulated GPU", "compute_capability": "8.7", "memory_bytes": 8 << 30, "is_integrated": True}
    ]


def test_probe_of_a_machine_without_anything_is_whole(monkeypatch):
    monkeypatch.setattr(builder.importlib.util, "find_spec", lambda name: None)

    def no_library(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(builder.ctypes, "CDLL", no_library)
    found = builder.probe()
    assert "libcuda.so.1: cannot open" in found["driver"]
    assert found["devices"] == []
    assert "has no module tensorrt" in found["tensorrt_problem"]
    json.dumps(found, allow_nan=False)


# Written after NVIDIA's documentation of Jetson Linux 36.4.3 and JetPack 6.2; not copied from a board.
RELEASE = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n"
STATUS = """Package: libc6
Status: install ok installed
Version: 2.35-0ubuntu3.8

Package: nvidia-jetpack
Status: {status}
Priority: standard
Version: 6.2+b77
Description: NVIDIA Jetpack Meta Package
 Version: 1.0 is not meant here
"""


@pytest.mark.parametrize(
    ("release", "status", "wanted"),
    [
        (RELEASE, "install ok installed", ("6.2+b77", "36.4.3")),
        (RELEASE, "deinstall ok config-files", ("", "36.4.3")),
        ("", "install ok installed", ("6.2+b77", "")),
        ("garbage", None, ("", "")),
    ],
)
def test_jetpack_is_read_from_release_and_packages(tmp_path, release, status, wanted):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text(release)
    if status is not None:
        (tmp_path / "var/lib/dpkg").mkdir(parents=True)
        (tmp_path / "var/lib/dpkg/status").write_text(STATUS.format(status=status))
    assert builder.read_jetpack(str(tmp_path)) == wanted


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  560.35.03  Fri Aug 16 21:39:15 UTC 2024\n", "560.35.03"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build  (buildbrain)\n", "540.4.0"),
        ("", ""),
    ],
)
def test_driver_version_is_read_from_proc(tmp_path, text, version):
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(text)
    assert builder.read_driver_version(str(tmp_path)) == version


# ------------------------------------------------------------------------------------------------ kits that are none


def repack(source: Path, out: Path, changes: dict[str, Any]) -> Path:
    """Copy a kit with other members: name=None leaves one out, name=(new name, bytes) changes one."""
    compression = changes.get("compression", zipfile.ZIP_STORED)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            written = changes.get(name.split(".")[0], (name, old.read(name)))
            if written is not None:
                new.writestr(*written)
        for name, data in changes.get("more", {}).items():
            new.writestr(name, data)
    return out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"more": {"../../root/.profile": b"rm"}}, "'../../root/.profile'"),
        ({"more": {"/etc/passwd": b"x"}}, "'/etc/passwd'"),
        ({"weak": None}, "not made by edgedeploy"),
        ({"compression": zipfile.ZIP_DEFLATED}, "is compressed"),
        ({"kit": ("kit.json", b'{"format": "edgedeploy.kit/9"}')}, "'edgedeploy.kit/9'"),
        ({"kit": ("kit.json", b"[1]")}, "edgedeploy.kit/1"),
        ({"kit": ("kit.json", b"{")}, "not whole"),
        ({"kit": ("kit.json", b'{"format": "edgedeploy.kit/1", "precision": "fp16"}')}, "not whole"),
        ({"kit": ("kit.json", b'{"format": "edgedeploy.kit/1", "precision": 1, "float_type": 2, "has_int8": true, '
                              b'"float32_nodes": [], "profiles": {}}')}, "not whole"),
    ],
)  # fmt: skip
def test_kit_that_is_none_is_refused_and_writes_nothing(kits, tmp_path, changes, words):
    folder = tmp_path / "inside" / "deep"
    folder.mkdir(parents=True)
    with pytest.raises(builder.BuildError) as refused:
        builder.Kit(str(repack(kits["fp16"], tmp_path / "kit", changes)))
    assert refused.value.kind == "bad-kit"
    assert words in str(refused.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "inside", "kit"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_kit_is_refused_or_read_as_it_is(kits, tmp_path, data):
    whole = kits["int8"].read_bytes()
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)), label="length")])
    for _ in range(data.draw(st.integers(0, 3), label="flips") if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    path, out = tmp_path / "kit", tmp_path / "form.onnx"
    path.write_bytes(bytes(damaged))
    try:
        builder.Kit(str(path)).extract("typed.onnx", str(out))
    except builder.BuildError as refused:
        assert refused.kind == "bad-kit"
        return
    with zipfile.ZipFile(kits["int8"]) as original:
        assert out.read_bytes() == original.read("typed.onnx")


def test_option_that_is_none_is_refused():
    for options in ({"builds": 0}, {"time_limit_s": "soon"}, {"workspace_mib": -1}, {"dla_core": True}):
        with pytest.raises(builder.BuildError, match=next(iter(options))) as refused:
            builder.checked_options(options)
        assert refused.value.kind == "bad-option"


# ------------------------------------------------------------------------------------------------ ONNX, as bytes


@st.composite
def models(draw: Any) -> onnx.ModelProto:
    names = draw(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=6, unique=True))
    nodes = [
        helper.make_node(draw(st.sampled_from(["Relu", "Exp", "Conv"])), ["x"], [f"y{index}"], name=name)
        for index, name in enumerate(names)
    ]
    arrays = [
        numpy_helper.from_array(np.full(draw(st.lists(st.integers(0, 3), max_size=3)), number, dtype), f"w{number}")
        for number, dtype in enumerate(
            draw(st.lists(st.sampled_from(["float32", "float16", "int8", "int32"]), max_size=4))
        )
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y0", TensorProto.FLOAT, ["n", 3])], arrays,
    )  # fmt: skip
    return helper.make_model(graph)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(models())
def test_nodes_and_weights_are_read_as_onnx_reads_them(tmp_path, model):
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path))
    for index, node in enumerate(model.graph.node):
        assert builder.node_at(str(path), index) == (node.name, node.op_type)
    assert builder.node_at(str(path), len(model.graph.node)) == ("", "")
    weights, rest = builder.weights_of(str(path))
    assert {name: entry[:2] for name, entry in weights.items()} == {
        one.name: (one.data_type, tuple(one.dims)) for one in model.graph.initializer
    }
    raw = {name: np.frombuffer(data, dtype) for name, dtype, data in builder.raw_weights(str(path), set(weights))}
    for one in model.graph.initializer:
        np.testing.assert_array_equal(raw[one.name], numpy_helper.to_array(one).reshape(-1))
    for one in model.graph.initializer:
        if numpy_helper.to_array(one).size:
            one.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(one) + np.array(1, "int8"), one.name))
            onnx.save(model, str(path))
            changed, other = builder.weights_of(str(path))
            assert (changed[one.name] != weights[one.name], other) == (True, rest)
    model.graph.node[0].op_type = "Neg"
    onnx.save(model, str(path))
    assert builder.weights_of(str(path))[1] != rest


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=60))
def test_bytes_that_are_no_onnx_end_with_an_error_that_we_catch(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    try:
        assert isinstance(builder.node_at(str(path), 0), tuple)
    except ValueError as error:
        assert str(error)


# ------------------------------------------------------------------------------------------------ progress and log


def test_progress_names_the_innermost_phase_and_counts_its_steps():
    said: list[tuple[Any, ...]] = []
    progress = builder.Progress(lambda *words: said.append(words), builder.Log(), 60.0)
    progress.begin("building the engine")
    progress.phase_start("Building Engine", None, 3)
    progress.phase_start("Timing", "Building Engine", 7)
    assert progress.step_complete("Timing", 4) is True
    progress.say()
    assert said[-1][0].startswith("building the engine: Timing, 0 s, ")
    assert said[-1][1:] == (5, 7)
    progress.phase_finish("Timing")
    progress.say()
    assert said[-1][1:] == (0, 3)


def test_without_phases_progress_shows_the_end_of_the_log():
    said: list[tuple[Any, ...]] = []
    log = builder.Log()
    progress = builder.Progress(lambda *words: said.append(words), log, 60.0)
    log.take("I", "Detected 1 inputs and 1 output network tensors.")
    log.take("V", "Tactic 0x1 Time: 0.5")
    log.take("I", "-" * 60)
    progress.begin("building the engine")
    assert said[-1][0].endswith("[I] Detected 1 inputs and 1 output network tensors.")


def test_time_that_is_up_stops_the_next_step():
    progress = builder.Progress(lambda *words: None, builder.Log(), -1.0)
    assert progress.step_complete("Timing", 0) is False


def test_verbose_lines_reach_stderr_only_where_they_name_what_is_at_work(capsys):
    log = builder.Log()
    log.take("V", "Tactic 0x1 Time: 0.5")
    log.take("V", "Parsing node: /a [Conv]")
    log.take("W", "careful")
    assert capsys.readouterr().err == "[V] Parsing node: /a [Conv]\n[W] careful\n"
    assert log.last_node() == "/a (Conv)"
    log.print_tail()
    assert capsys.readouterr().err == "[V] Tactic 0x1 Time: 0.5\n", "what has been printed is not printed again"


# ------------------------------------------------------------------------------------------------ what the file is


def test_builder_runs_on_python_3_8_with_the_standard_library_alone():
    tree = ast.parse(BUILDER.read_text(), feature_version=(3, 8))
    imported = {
        (name.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    # numpy is imported only to refit an engine of TensorRT 8, whose Python needs it itself.
    assert imported <= set(sys.stdlib_module_names) | {"numpy"}
    at_the_top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert "numpy" not in at_the_top


def test_python_3_8_compiles_the_builder(tmp_path):
    python = shutil.which("python3.8")
    if python is None:
        pytest.skip("needs python3.8 on PATH; the syntax is checked without it")
    import subprocess

    done = subprocess.run([python, "-c", "print(1)"], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("python3.8 on PATH does not start")
    code = f"import sys; sys.dont_write_bytecode = True; sys.path.insert(0, {str(BUILDER.parent)!r}); " + (
        "import builder, json; found = builder.probe(); print(json.dumps(found))"
    )
    done = subprocess.run([python, "-S", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) >= {"driver", "cuda_driver", "devices", "tensorrt", "python", "jetpack"}
