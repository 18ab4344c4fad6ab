"""What a person can get wrong at the command line ends in one sentence, the right exit code, and nothing half-written."""

import dataclasses
import errno
import json
import os
import re
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from onnx import numpy_helper  # noqa: E402
from torch import nn  # noqa: E402

import edgedeploy  # noqa: E402
from edgedeploy import build, cli  # noqa: E402
from edgedeploy.arguments import read_release  # noqa: E402
from edgedeploy.errors import ModelError  # noqa: E402
from edgedeploy.prepare.export import _in_forward_order  # noqa: E402
from edgedeploy.records.model import TensorSpec  # noqa: E402
from edgedeploy.records.release import Declared  # noqa: E402

FEATURES = ("--input", "features=batchx12")


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, features):
        return self.second(torch.relu(self.first(features)))


class Branching(Layer):
    def forward(self, features):
        answer = super().forward(features)
        return answer if features.sum() > 0 else -answer


class FixedBatch(Layer):
    def forward(self, features):
        return super().forward(features.reshape(2, 12))


class NeverANumber(Layer):
    def forward(self, features):
        return torch.log(-super().forward(features).abs() - 1)


class Complex(Layer):
    def forward(self, features):
        return torch.fft.fft(super().forward(features))


class Quitting(Layer):
    def forward(self, features):
        sys.exit(3)


class TwoInputs(Layer):
    def forward(self, features, context):
        return super().forward(features) + context


def layer():
    return Layer()


def branching():
    return Branching()


def fixed_batch():
    return FixedBatch()


def never_a_number():
    return NeverANumber()


def complex_answer():
    return Complex()


def quitting():
    return Quitting()


def two_inputs():
    return TwoInputs()


def needs_a_missing_library():
    import not_installed_anywhere  # noqa: F401


def converted():
    """A model with trained scales: eager static quantization, converted."""
    engine = "qnnpack" if "qnnpack" in torch.backends.quantized.supported_engines else "x86"
    torch.backends.quantized.engine = engine
    wrapped = torch.ao.quantization.QuantWrapper(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)).eval())
    wrapped.qconfig = torch.ao.quantization.get_default_qconfig(engine)
    prepared = torch.ao.quantization.prepare(wrapped)
    torch.manual_seed(1)
    prepared(torch.randn(64, 12))
    return torch.ao.quantization.convert(prepared)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An ONNX file, calibration samples, a state_dict, and a cache of this module's own."""
    made = tmp_path_factory.mktemp("bad")
    program = torch.export.export(
        Layer().eval(), (torch.randn(2, 12),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    exported = torch.onnx.export(
        program, dynamo=True, input_names=["features"], output_names=["scores"], verbose=False, external_data=False
    )
    exported.save(str(made / "good.onnx"))
    np.savez(made / "good.npz", features=np.random.default_rng(0).standard_normal((32, 12)).astype(np.float32))
    torch.save(Layer().state_dict(), made / "good.pt")
    return made


@pytest.fixture
def command(folder, monkeypatch, capfd):
    """Run one command; return (exit code, stdout, last line of stderr)."""
    monkeypatch.setenv("EDGEDEPLOY_CACHE_DIR", str(folder / "cache"))
    monkeypatch.chdir(folder)

    def run(*arguments):
        capfd.readouterr()
        code = cli.run([str(one) for one in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        talk = [line for line in err.splitlines() if not line.startswith("· ")]
        if code:
            assert [line for line in talk if line.startswith("edgedeploy: ")], err
        return code, out, " ".join(talk)

    return run


def compile_(command, source, *more):
    return command("compile", source, *more, "-o", "out")


@pytest.mark.parametrize(
    ("factory", "complaint"),
    [
        ("branching", "decides by the values in a tensor"),
        ("fixed_batch", "fixes the axis 'batch' to 2; give that axis the number 2"),
        ("complex_answer", "complex numbers"),
        ("quitting", "ended the program"),
        ("needs_a_missing_library", "it needs the module 'not_installed_anywhere'; install it"),
    ],
)
def test_a_module_that_is_no_graph_is_refused_with_what_to_change(command, factory, complaint):
    code, out, talk = compile_(command, f"{__name__}:{factory}", *FEATURES)
    assert code == 3, talk
    assert complaint in talk
    assert not out


def test_answers_that_are_never_a_number_are_refused(command):
    code, _, talk = compile_(command, f"{__name__}:never_a_number", *FEATURES)
    assert code == 3, talk
    assert "nothing but NaN or infinity" in talk


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        (("featurs=batchx12",), "no argument 'featurs'; did you mean \"features\"?"),
        (("features=batchx12", "contxt=batchx5"), "no argument 'contxt'; did you mean \"context\"?"),
        (("features=batchx12", "other=batchx5"), "no argument 'other' (it has: features, context)"),
        (("features=batchx12", "features=batchx12"), "given 2 times"),
        (("features=batchx12:float99",), "'float99' is not known"),
    ],
)
def test_inputs_that_forward_does_not_have_are_refused(command, inputs, complaint):
    given = [text for one in inputs for text in ("--input", one)]
    code, _, talk = compile_(command, f"{__name__}:two_inputs", *given)
    assert code == 2
    assert complaint in talk


def test_names_that_stand_for_forwards_arguments_in_order_are_taken():
    given = [TensorSpec(name=name, dtype="float32", shape=("batch", 12)) for name in ("pixels", "mask")]
    assert _in_forward_order(two_inputs(), given) == (tuple(given), False)


def _with_nan(folder):
    model = onnx.load(folder / "good.onnx")
    weights = next(item for item in model.graph.initializer if len(item.dims) == 2)
    values = numpy_helper.to_array(weights).copy()
    values[0, 0] = np.nan
    weights.CopyFrom(numpy_helper.from_array(values, weights.name))
    onnx.save(model, folder / "nan.onnx")
    return folder / "nan.onnx", weights.name


def test_nan_among_the_weights_of_an_onnx_file_is_named(command, folder):
    path, name = _with_nan(folder)
    code, _, talk = compile_(command, path)
    assert code == 3, talk
    assert f"holds NaN in '{name}' (1 of " in talk


def test_nan_in_a_weights_file_names_the_file(command, folder):
    state = Layer().state_dict()
    state["first.weight"][3, 4] = float("nan")
    torch.save(state, folder / "nan.pt")
    code, _, talk = compile_(command, f"{__name__}:layer", *FEATURES, "--weights", folder / "nan.pt")
    assert code == 3, talk
    assert "nan.pt holds NaN in 'first.weight' (1 of 192 values)" in talk


@pytest.mark.parametrize(
    ("name", "code", "complaint"),
    [
        ("garbage.onnx", 3, "cannot be read as ONNX"),
        ("garbage.pt2", 3, "cannot be read as .pt2"),
        ("half.onnx", 3, "cannot be read as ONNX"),
        ("missing.onnx", 2, "does not exist"),
        ("folder.onnx", 2, "is a folder"),
        ("good.npz", 2, "is no model that edgedeploy knows"),
    ],
)
def test_a_file_that_is_no_model_is_refused(command, folder, name, code, complaint):
    whole = (folder / "good.onnx").read_bytes()
    (folder / "garbage.onnx").write_bytes(bytes(range(255, 0, -1)) * 9)
    (folder / "garbage.pt2").write_bytes(bytes(range(255, 0, -1)) * 9)
    (folder / "half.onnx").write_bytes(whole[: len(whole) // 2])
    (folder / "folder.onnx").mkdir(exist_ok=True)
    found, out, talk = compile_(command, name)
    assert found == code
    assert complaint in talk
    assert not out


def test_an_error_is_also_json_where_json_was_asked_for(command, folder):
    (folder / "garbage.onnx").write_bytes(b"no model" * 99)
    code, out, _ = compile_(command, "garbage.onnx", "--json")
    error = json.loads(out)
    assert (error["format"], error["exit_code"]) == ("edgedeploy.error/1", code) == ("edgedeploy.error/1", 3)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\x93garbage" * 50, "cannot be read as weights (truncated or damaged?)"),
        (None, "holds more than tensors (tests.backends.test_bad_input.Layer)"),
    ],
)
def test_weights_that_are_no_tensors_are_refused_without_torchs_advice_to_run_them(command, folder, content, complaint):
    path = folder / "odd.pt"
    if content is None:
        torch.save(Layer(), path)
    else:
        path.write_bytes(content)
    code, _, talk = compile_(command, f"{__name__}:layer", *FEATURES, "--weights", path)
    assert code == 3, talk
    assert complaint in talk.replace(f"({__name__}.Layer)", "(tests.backends.test_bad_input.Layer)")
    assert "Re-running" not in talk


@pytest.mark.parametrize(
    ("pairs", "complaint"),
    [
        (("range=mse",), 'unknown setting -Q range=mse; did you mean "ranges"?'),
        (("ranges=mze",), "'mze' is not known; did you mean \"mse\"? (known: mse, min-max, percentile, entropy)"),
        (("bias_correction=perhaps",), "expected `bool`, got `str`"),
        (("budget_db=nan",), "must lie between 0 and 150 dB"),
        (("float_layers=nothing_like_it",), "which the model does not have"),
    ],
)
def test_a_quantization_setting_that_cannot_be_meant_is_named(command, pairs, complaint):
    given = [text for one in pairs for text in ("-Q", one)]
    code, _, talk = compile_(command, "good.onnx", "--precision", "int8", "--calibration", "good.npz", *given)
    assert code == 2
    assert complaint in talk


def test_a_quantization_setting_without_int8_is_refused(command):
    code, _, talk = compile_(command, "good.onnx", "-Q", "ranges=mse")
    assert code == 2
    assert "add --precision int8, or leave it out" in talk


@pytest.mark.parametrize(
    ("name", "arrays", "complaint"),
    [
        ("garbage.npz", None, "cannot be read as .npz (truncated or damaged?)"),
        ("objects.npz", {"features": np.array([{"a": 1}] * 4, dtype=object)}, "holds Python objects"),
        ("nan.npz", {"features": np.full((9, 12), np.nan, np.float32)}, "holds nan at sample 0"),
        ("same.npz", {"features": np.ones((9, 12), np.float32)}, "are the same"),
        ("none.npz", {"features": np.ones((0, 12), np.float32)}, "holds no samples"),
        ("doubles.npz", {"features": np.ones((9, 12))}, "is float64"),
        ("folder", None, "has no manifest.toml"),
    ],
)
def test_calibration_data_that_cannot_be_right_is_named(command, folder, name, arrays, complaint):
    if arrays is not None:
        np.savez(folder / name, **arrays)
    elif name == "folder":
        (folder / name).mkdir(exist_ok=True)
    else:
        (folder / name).write_bytes(b"\x00\xff" * 300)
    code, _, talk = compile_(command, "good.onnx", "--precision", "int8", "--calibration", name)
    assert code == 2
    assert complaint in talk


def test_what_looks_wrong_about_samples_stays_with_the_artifact(command, folder):
    np.savez(folder / "few.npz", features=np.random.default_rng(0).standard_normal((3, 12)).astype(np.float32))
    asked = ("good.onnx", "--precision", "int8", "--calibration", "few.npz")
    code, out, _ = compile_(command, *asked)
    assert code == 0
    assert "has only 3 samples" in out
    code, out, _ = compile_(command, *asked)
    assert "from the cache" in out
    assert "has only 3 samples" in out
    assert any("has only 3 samples" in note for note in json.loads((folder / "out/manifest.json").read_text())["notes"])


def test_a_float_build_of_a_quantized_source_is_refused_and_with_the_option_says_what_is_lost(command, folder):
    source = (f"{__name__}:converted", *FEATURES)
    code, out, talk = compile_(command, *source, "--precision", "fp32")
    assert (code, out) == (3, "")
    assert "build it as int8, or accept the loss with --allow-loss" in talk
    code, out, _ = compile_(command, *source, "--precision", "fp32", "--allow-loss")
    assert code == 0
    assert out.splitlines()[1].split() == ["lost", "static", "int8", "(accepted", "with", "--allow-loss)"]
    manifest = json.loads((folder / "out/manifest.json").read_text())
    assert [one["artifact"] for one in manifest["compression"]["statements"]] == ["lost"]
    assert any(note.startswith("lost: ") for note in manifest["notes"])


def test_settings_that_trained_numbers_override_are_said_to_be_unused(command):
    source = (f"{__name__}:converted", *FEATURES, "--precision", "int8")
    code, out, _ = compile_(command, *source, "-Q", "ranges=entropy")
    assert code == 0
    words = " ".join(out.split())
    assert "the model carries its own quantization, whose numbers win" in words
    assert re.search(r"scales \d+ kept.* that the source came with", words)


def test_a_declaration_is_checked_for_an_artifact_from_the_cache_too(folder, monkeypatch):
    request = build.BuildRequest(
        name="good", source="good.onnx", base=folder, target="host", backend="onnxruntime", precision="fp32"
    )
    monkeypatch.setenv("EDGEDEPLOY_CACHE_DIR", str(folder / "cache"))
    build.build(request, lambda text: None)
    labelled = dataclasses.replace(request, declared=Declared(sparsity=0.9))
    with pytest.raises(ModelError, match=r"sparsity = 0\.9 is declared"):
        build.build(labelled, lambda text: None)
    true = dataclasses.replace(request, declared=Declared(sparsity=0.0))
    assert build.build(true, lambda text: None).is_cached


@pytest.mark.parametrize(("number", "advice"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "may write to")])
def test_a_disk_that_takes_nothing_keeps_what_was_there(command, folder, monkeypatch, number, advice):
    assert compile_(command, "good.onnx")[0] == 0
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}

    def refuse(source, target, **options):
        raise OSError(number, os.strerror(number), str(source), None, str(target))

    monkeypatch.setattr(shutil, "copyfile", refuse)
    code, _, talk = compile_(command, "good.onnx")
    assert code == 3, talk
    assert advice in talk
    assert str(folder / "cache") not in talk
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == before


def test_an_interrupted_build_leaves_nothing_half_written(command, folder, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "canonical_model", interrupt)
    before = sorted(path for path in (folder / "cache").rglob("*"))
    code, out, talk = compile_(command, "good.onnx", "--rebuild")
    assert (code, out) == (130, "")
    assert "interrupted; nothing half-written is left" in talk
    assert sorted(path for path in (folder / "cache").rglob("*")) == before


def test_a_builder_that_comes_second_replaces_what_the_first_one_wrote(tmp_path):
    final = tmp_path / "entry"
    with build.staging(final) as slow:
        (slow / "manifest.json").write_text("second")
        with build.staging(final) as fast:
            (fast / "manifest.json").write_text("first")
        assert (final / "manifest.json").read_text() == "first"
    assert (final / "manifest.json").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


def test_who_reads_an_entry_while_others_replace_it_always_finds_one_whole(tmp_path):
    final, is_over, missing = tmp_path / "entry", threading.Event(), []

    def read() -> None:
        while not is_over.is_set():
            try:
                assert (final / "manifest.json").read_text() == "whole"
            except FileNotFoundError as error:
                missing.append(error)

    def write() -> None:
        with build.staging(final) as work:
            (work / "manifest.json").write_text("whole")

    write()
    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(500):
        write()
    is_over.set()
    reader.join()
    assert not missing
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


def test_where_folders_cannot_be_exchanged_they_are_replaced_in_two_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "exchange", lambda one, other: False)
    test_a_builder_that_comes_second_replaces_what_the_first_one_wrote(tmp_path)


def test_what_a_killed_builder_left_is_swept_once_it_is_old(tmp_path):
    old, young = tmp_path / ".0123abcd-killed", tmp_path / ".0123abcd-at-work"
    for left in (old, young):
        left.mkdir()
        (left / "half.onnx").write_bytes(b"half")
    os.utime(old, (0, 0))
    with build.staging(tmp_path / "entry") as work:
        (work / "manifest.json").write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, "entry"]


def test_a_package_that_is_missing_is_no_bug_of_ours(command, folder, monkeypatch):
    (folder / "good.safetensors").write_bytes(b"never read")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    code, _, talk = compile_(command, f"{__name__}:layer", *FEATURES, "--weights", folder / "good.safetensors")
    assert code == 3, talk
    assert "the package safetensors is not installed here; pip install" in talk


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ('[quantization]\nrange = "mse"', 'unknown key "range" in .*; did you mean "ranges"'),
        ('[quantization]\nranges = "mze"', "'mze' is not known; did you mean \"mse\""),
        ("[quantization]\npercentile = 3", "percentile=3 must lie above 50"),
        ('[quantization]\nbias_correction = "yes"', "expected `bool`, got `str`"),
        ('[models.m.declared]\npattern = "2:5"', "'2:5' is not known"),
    ],
)
def test_a_release_file_with_a_wrong_key_or_value_is_named(command, folder, table, complaint):
    release = f"""\
format = "edgedeploy.release/1"
name = "r"
{table if "models" not in table else ""}
[models.m]
source = "good.onnx"
{table if "models" in table else ""}
[[cells]]
name = "shipped"
model = "m"
target = "host"
backend = "onnxruntime"
precision = "fp32"
[[cells]]
name = "candidate"
model = "m"
target = "host"
backend = "onnxruntime"
precision = "fp32"
[gate]
baseline = "shipped"
"""
    (folder / "r.toml").write_text(release)
    code, _, talk = command("run", "r.toml", "--dry-run")
    assert code == 2
    assert re.search(complaint, talk), talk
    assert "r.toml" in talk


def test_every_commented_key_of_the_template_is_one_that_is_read(command, folder):
    text = (Path(edgedeploy.__file__).parent / "release_template.toml").read_text(encoding="utf-8")
    # Comments that are keys or tables become such; sentences stay comments. The files that they name are put there.
    bare = re.sub(r"^# ?((?:\[|[a-z_]+ = ).*)$", r"\1", text, flags=re.MULTILINE)
    shutil.copy(folder / "good.onnx", folder / "model.onnx")
    for name in ("model.safetensors", "calibration.npz", "evaluation.npz"):
        (folder / name).touch()
    (folder / "template.toml").write_text(bare)
    release, _ = read_release(folder / "template.toml")
    assert release.models["my-model"].declared.except_layers == ("head",)
    assert release.quantization.float_layers == ("head",)
    assert release.cells[1].allow_loss
