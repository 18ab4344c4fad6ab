"""TensorRT from a model to an engine on an emulated device: progress, cache, pull-back, layer table, every failure."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edgedeploy import engines, measure, pipeline
from edgedeploy.build import LAYERS, TIMING_CACHE, BuildRequest, build
from edgedeploy.cli.building import compile_command
from edgedeploy.errors import CompileError, DeviceError, UsageError
from edgedeploy.lab.builders import Made
from edgedeploy.lab.conversation import Progress
from edgedeploy.lab.visits import Schedule
from tests.backends.emulated_tensorrt import device_python
from tests.emulated.stubs import build_stubs

pytest.importorskip("onnx", reason="the host half needs onnx: pip install 'edgedeploy[onnxruntime]'")
import onnx
from onnx import TensorProto, helper, numpy_helper


@pytest.fixture(autouse=True)
def short_visits(monkeypatch):
    """Latencies of the emulation say nothing, so nobody waits until they are steady."""
    quick = Schedule(bursts_per_visit=2, samples_per_burst=4, lead_in=0, warm_up_window=2, warm_up_tolerance=1e9)
    monkeypatch.setattr(engines, "Schedule", lambda: quick)
    monkeypatch.setattr(measure, "_usual_schedule", lambda sides: quick)
    monkeypatch.setattr(measure, "MEMORY_VISITS", 1)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    return build_stubs(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two convolutions and a product, and samples for them."""
    folder = tmp_path_factory.mktemp("model")
    random = np.random.default_rng(0)

    def weights(name, *shape):
        return numpy_helper.from_array(random.standard_normal(shape).astype(np.float32) / 3, name)

    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["c1"], name="/first/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="/first/Relu"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="/second/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c2"], ["r2"], name="/second/Relu"),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"], name="/pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="/flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["scores"], name="/head/Gemm", transB=1),
    ]
    constants = [
        weights("w1", 8, 3, 3, 3), weights("b1", 8), weights("w2", 8, 8, 3, 3), weights("b2", 8),
        weights("w3", 5, 8), weights("b3", 5),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 5])],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "net.onnx")
    np.savez(folder / "samples.npz", image=random.standard_normal((32, 3, 8, 8)).astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def forms(model, tmp_path_factory):
    """A cache with the forms of the model: what comes before a device plays a part is made once."""
    cache = tmp_path_factory.mktemp("forms")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEDEPLOY_CACHE_DIR", str(cache))
        patch.chdir(model)
        for precision in ("fp32", "int8"):
            build(
                BuildRequest(
                    name="net",
                    source="net.onnx",
                    base=model,
                    target="jetson-agx-orin",
                    backend="tensorrt",
                    precision=precision,
                    calibration=Path("samples.npz"),
                    options={"axes": "batch=1:4:8"},
                ),
                lambda text: None,
            )
    return cache


@pytest.fixture(scope="module")
def built_cache(model, forms, libraries, tmp_path_factory):
    """A cache with the engines that the forms became on TensorRT 10.3.0."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(forms, folder / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEDEPLOY_CACHE_DIR", str(folder / "cache"))
        patch.chdir(model)
        site = Site(folder, libraries)
        for precision in ("fp32", "int8"):
            site.compile(site.lab("10.3.0"), precision=precision)
    return folder / "cache"


@pytest.fixture
def site(tmp_path, monkeypatch, model, forms, libraries):
    """A lab file with an emulated device, and a cache that nothing was built for it in."""
    return standing_on(forms, tmp_path, monkeypatch, model, libraries)


@pytest.fixture
def built_site(tmp_path, monkeypatch, model, built_cache, libraries):
    """The same with a cache that has the engines for TensorRT 10.3.0."""
    return standing_on(built_cache, tmp_path, monkeypatch, model, libraries)


def standing_on(cache, folder, monkeypatch, model, libraries):
    shutil.copytree(cache, folder / "cache")
    monkeypatch.setenv("EDGEDEPLOY_CACHE_DIR", str(folder / "cache"))
    monkeypatch.chdir(model)
    return Site(folder, libraries)


class Site:
    def __init__(self, folder, libraries):
        self.folder, self.libraries = folder, libraries
        self.said = []

    def lab(self, version, has_driver=True, **more):
        """Write a lab with the device `orin`."""
        python = device_python(self.folder / "python", version, self.libraries if has_driver else None, **more)
        path = self.folder / "lab.toml"
        path.write_text(
            f'format = "edgedeploy.lab/1"\n[devices.orin]\ntransport = "local"\npython = "{python}"\n'
            f'root = "{self.folder / "device"}"\n'
        )
        return path

    def compile(self, lab, precision="int8", options=None, **more):
        given = {"axes": "batch=1:4:8", **(options or {})}
        return pipeline.compile(
            "net.onnx",
            target="jetson-agx-orin",
            backend="tensorrt",
            precision=precision,
            calibration="samples.npz",
            device="orin",
            lab=lab,
            options=given,
            progress=self.said.append,
            **more,
        )

    def heard(self, words):
        """Say whether any line of progress has these words."""
        return any(words in line for line in self.said)


# ------------------------------------------------------------------------------------------------ what is built


@pytest.mark.parametrize("version", ["8.5.3", "10.3.0", "11.4.0"])
def test_an_engine_is_built_there_comes_back_and_answers_as_the_model(site, version):
    built = site.compile(site.lab(version), output=site.folder / "out")
    artifact = built.artifact
    assert built.file.name == "model.engine"
    assert (built.folder / LAYERS).is_file()
    assert (built.folder / TIMING_CACHE).is_file()
    assert artifact.engine.fingerprint.tensorrt == version
    assert artifact.engine.fingerprint.compute_capability == "8.7"
    assert artifact.engine.is_typed == (not version.startswith("8."))
    assert artifact.fidelity[-1].reference == "golden answers"
    assert artifact.fidelity[-1].outputs[0].cosine > 0.99
    on_integers = {node for layer in artifact.layers.layers if layer.precision == "int8" for node in layer.nodes}
    assert {"/first/Conv", "/second/Conv"} <= on_integers
    assert site.heard("parsing")


def test_a_second_device_of_the_same_kind_builds_nothing(built_site):
    again = built_site.compile(built_site.lab("10.3.0"))
    assert again.is_cached
    assert not built_site.heard("building")
    other = built_site.compile(built_site.lab("10.13.3"))
    assert not other.is_cached
    assert built_site.heard("building")
    assert other.artifact.key != again.artifact.key


def test_options_of_a_session_make_another_artifact_of_the_same_engine(built_site):
    lab = built_site.lab("10.3.0")
    plain = built_site.compile(lab, precision="fp32")
    asleep = built_site.compile(lab, precision="fp32", options={"cuda_graph": True, "copies": False})
    assert not built_site.heard("building")
    assert asleep.artifact.sha256 == plain.artifact.sha256
    assert asleep.artifact.key != plain.artifact.key
    assert asleep.artifact.recipe.options["cuda_graph"] is True
    assert asleep.artifact.engine.kit_key != plain.artifact.engine.kit_key
    assert asleep.artifact.fidelity[-1].reference == "golden answers"
    built_site.compile(lab, precision="fp32", options={"workspace_mib": 64})
    assert built_site.heard("building")


def test_a_damaged_engine_in_the_cache_is_built_again(built_site):
    for engine in (built_site.folder / "cache").glob("*/*/model.engine"):
        engine.write_bytes(engine.read_bytes()[:-9])
    assert not built_site.compile(built_site.lab("10.3.0"), precision="fp32").is_cached
    assert built_site.heard("building")


def test_bench_measures_the_engine_and_refuses_it_on_another_version(built_site):
    site = built_site
    built = site.compile(site.lab("10.3.0"), precision="fp32", output=site.folder / "out")
    run, _ = pipeline.bench(
        built.folder, device="orin", lab=site.lab("10.3.0"), visits=1, profile=True, results=site.folder / "results"
    )
    assert run.runtime == "tensorrt 10.3.0"
    assert run.golden is not None
    assert len(run.layer_times) == len(built.artifact.layers.layers)
    with pytest.raises(DeviceError, match=r"(?s)10\.3\.0.*10\.13\.3|10\.13\.3.*10\.3\.0"):
        pipeline.bench(built.folder, device="orin", lab=site.lab("10.13.3"), visits=1, results=site.folder / "results")


def test_of_several_builds_one_is_chosen_and_none_that_answers_nan(site, monkeypatch):
    answers_there, asked = engines.golden.answers_there, []

    def spoilt(agent, transport, side):
        answers = answers_there(agent, transport, side)
        asked.append(side.artifact_sha256)
        return {name: values * np.float32("nan") for name, values in answers.items()} if len(asked) == 1 else answers

    monkeypatch.setattr(engines.golden, "answers_there", spoilt)
    artifact = site.compile(site.lab("10.3.0"), precision="fp32", options={"builds": 3}).artifact
    first, *others = artifact.engine.builds
    assert (first.is_chosen, first.largest_difference) == (False, None)
    assert "engine 1 answers NaN or infinity and was not taken" in artifact.notes
    (chosen,) = (one for one in others if one.is_chosen)
    assert chosen.sha256 == artifact.sha256
    assert [one.largest_difference for one in others] == [0, 0]
    assert all(one.p50_s > 0 for one in artifact.engine.builds)
    assert artifact.engine.timing_cache_sha256


def test_new_weights_are_put_into_the_old_engine_where_that_is_asked_for(site, model, tmp_path, monkeypatch):
    lab = site.lab("10.3.0")
    work = tmp_path / "work"
    work.mkdir()
    (work / "samples.npz").write_bytes((model / "samples.npz").read_bytes())
    monkeypatch.chdir(work)
    digests = set()
    for factor in (1.0, 0.5, 0.25):  # the third is put into what was itself refitted
        changed = onnx.load(model / "net.onnx")
        weights = next(one for one in changed.graph.initializer if one.name == "w3")
        weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights) * np.float32(factor), "w3"))
        onnx.save(changed, work / "net.onnx")
        site.said.clear()
        made = site.compile(lab, precision="fp32", options={"refit": True})
        digests.add(made.artifact.sha256)
        assert made.artifact.fidelity[-1].outputs[0].max_relative < 1e-4
        assert (site.heard("refitting"), site.heard("building")) == ((False, True) if factor == 1.0 else (True, False))
    assert len(digests) == 3


# ------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(("fault", "says"), [("segv", "SIGSEGV"), ("parse", "node")])
def test_whatever_happens_to_the_builder_is_a_sentence_and_leaves_no_artifact(site, fault, says):
    with pytest.raises(CompileError, match=rf"(?s)tensorrt could not compile the model.*{says}"):
        site.compile(site.lab("10.3.0", EMULATED_FAULT=fault), precision="fp32")
    assert not list((site.folder / "cache").glob("*/*/model.engine"))
    assert not (site.folder / "device" / "building").exists()


def test_a_build_whose_time_is_up_goes_on_where_it_was(site):
    lab = site.lab("10.3.0", EMULATED_FAULT="slow", EMULATED_STEP_S="0.4")
    with pytest.raises(CompileError, match=r"time limit of 1 s is over at .*; what was timed until then is kept"):
        site.compile(lab, precision="fp32", options={"time_limit_s": 1})
    (timing,) = (site.folder / "cache" / "timing").iterdir()
    half = timing.read_bytes()
    built = site.compile(site.lab("10.3.0"), precision="fp32")
    assert set(entries(half).items()) < set(entries(timing.read_bytes()).items())
    assert built.file.is_file()


def entries(timing_cache):
    return json.loads(timing_cache.split(b"\n")[1])["entries"]


def test_a_lost_scale_is_refused_and_noted_where_that_is_wanted_without_another_build(built_site):
    for told in (built_site.folder / "cache" / "engines").glob("*/layers.json"):
        told.write_text(told.read_text().replace("r1/quantize", "gone").replace("r1/dequantize", "gone"))
    lab = built_site.lab("10.3.0")
    with pytest.raises(CompileError, match="r1"):
        built_site.compile(lab, options={"spin_wait": True})
    noted = built_site.compile(lab, options={"lost_scales": "note"}).artifact
    assert any("r1" in note for note in noted.notes)
    assert not built_site.heard("building")


def test_a_device_without_a_driver_is_told_what_it_lacks(site):
    with pytest.raises(DeviceError, match=r"has no GPU that can be used: .*libcuda\.so\.1"):
        site.compile(site.lab("10.3.0", has_driver=False), precision="fp32")


def test_a_device_without_tensorrt_is_told_what_it_lacks(site, monkeypatch):
    problem = "/usr/bin/python3 (Python 3.10.12) has no module tensorrt; on a Jetson it is python3-libnvinfer"
    found = {"driver": "", "devices": [{"name": "Orin"}], "tensorrt": "", "tensorrt_problem": problem}
    monkeypatch.setattr(engines.builders, "probe", lambda agent, builder: found)
    with pytest.raises(DeviceError, match=r"cannot build engines: .*python3-libnvinfer; .* in lab\.toml"):
        site.compile(site.lab("10.3.0"), precision="fp32")


@pytest.mark.parametrize(
    ("report", "made"),
    [
        ({"parse_s": "soon"}, ["engine", "layers"]),
        ({"builds": [3]}, ["engine", "layers"]),
        ({"notes": "all is well"}, ["engine", "layers"]),
        ({}, ["engine"]),
    ],
)
def test_a_builder_that_reports_nonsense_is_refused(site, monkeypatch, report, made):
    files = dict.fromkeys(made, Made(sha256="0" * 64, size_bytes=1))
    monkeypatch.setattr(engines.builders, "build", lambda *given, **more: (report, files))
    with pytest.raises(DeviceError, match="the builder"):
        site.compile(site.lab("10.3.0"), precision="fp32")


def test_what_a_device_says_is_kept_short_and_cannot_command_a_terminal(site, monkeypatch):
    build = engines.builders.build

    def talkative(*given, **more):
        report, made = build(*given, **more)
        return {**report, "notes": ["\x1b[2Jcleared\r\nmuch" + "!" * 9999, *(f"note {n}" for n in range(999))]}, made

    monkeypatch.setattr(engines.builders, "build", talkative)
    notes = site.compile(site.lab("10.3.0"), precision="fp32").artifact.notes
    assert any(note.startswith("[2Jcleared much!!") for note in notes)
    assert any(note.startswith("and 980 more") for note in notes)
    assert len(notes) < 40
    assert all(len(note) <= 500 and note.isprintable() for note in notes)


def test_progress_is_passed_on_when_it_turns_to_something_else():
    said = []
    hear = engines._teller("orin", said.append)
    hear(Progress("parsing the model, 0 s", None, None))
    for step in range(10_000):
        hear(Progress(f"building the engine: Timing, {step} s, 47 MiB", step + 1, 10_000))
    hear(Progress("reading the engine's layers\x1b[2J, 9 s", None, None))
    assert said == [
        "orin: parsing the model, 0 s",
        "orin: building the engine: Timing, 0 s, 47 MiB (1 of 10000)",
        "orin: reading the engine's layers[2J, 9 s",
    ]


def test_device_and_back_end_must_fit(site, model):
    with pytest.raises(UsageError, match="name it with --device"):
        pipeline.compile("net.onnx", target="jetson-agx-orin", backend="tensorrt", precision="fp32")
    with pytest.raises(UsageError, match="leave --device orin out"):
        pipeline.compile("net.onnx", backend="onnxruntime", device="orin", lab=site.lab("10.3.0"))


def test_a_dynamic_axis_without_a_range_is_refused_with_what_to_type_before_anything_is_calibrated(site):
    with pytest.raises(CompileError, match=r"-O axes=batch="):
        site.compile(site.lab("10.3.0"), options={"axes": ""})
    assert not any("calibrating" in line for line in site.said)


def test_the_command_shows_where_the_engine_is_from_and_its_layers(built_site):
    site = built_site
    lab = site.lab("10.3.0")
    said = CliRunner().invoke(
        compile_command,
        [
            "net.onnx", "--target", "jetson-agx-orin", "--backend", "tensorrt", "--precision", "int8",
            "--calibration", "samples.npz", "--device", "orin", "--lab", str(lab), "-O", "axes=batch=1:4:8",
            "-o", str(site.folder / "out"),
        ],
    )  # fmt: skip
    assert said.exit_code == 0, said.output
    assert "Kernels" in said.stdout
    assert "int8" in said.stdout
    assert "TensorRT 10.3.0" in said.stdout
    manifest = json.loads((site.folder / "out" / "manifest.json").read_text())
    assert manifest["engine"]["fingerprint"]["tensorrt"] == "10.3.0"


def test_a_release_file_builds_for_the_device_that_it_measures_on(built_site, model):
    site = built_site
    release = site.folder / "edgedeploy.toml"
    release.write_text(
        f"""
format = "edgedeploy.release/1"
name = "engines"
[models.net]
source = "{model / "net.onnx"}"
[calibration]
set = "{model / "samples.npz"}"
[gate]
baseline = "fp32"
max_blocks = 2
min_blocks = 2
[gate.margins]
accuracy = ""
latency_p50 = "+50%"
[[cells]]
name = "fp32"
model = "net"
target = "jetson-agx-orin"
backend = "tensorrt"
precision = "fp32"
device = "orin"
options = {{ axes = "batch=1:4:8" }}
[[cells]]
name = "int8"
model = "net"
target = "jetson-agx-orin"
backend = "tensorrt"
precision = "int8"
device = "orin"
options = {{ axes = "batch=1:4:8" }}
"""
    )
    outcome = pipeline.run(release, lab=site.lab("10.3.0"), results=site.folder / "results")
    assert {run.runtime for run in outcome.runs.values()} == {"tensorrt 10.3.0"}
    assert all(artifact.engine is not None for artifact in outcome.artifacts.values())
