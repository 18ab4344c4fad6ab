"""Loading: what is accepted, what is refused, and that nothing a file carries is run."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
from onnx import TensorProto, helper  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from edgedeploy.errors import ModelError, UntrustedPickle, UsageError, WeightsMismatch  # noqa: E402
from edgedeploy.prepare.load import load  # noqa: E402

HERE = Path(__file__).parent
MLP = "tiny_nets:small_mlp"


class Bomb:
    """Unpickling this creates a file, whose absence shows that nothing was unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.fixture
def state():
    return load(MLP, None, base=HERE).program.state_dict()


def test_factory_is_called_and_put_into_evaluation_mode(capfd):
    loaded = load("tiny_nets:chatty", None, base=HERE)
    assert loaded.kind == "module"
    assert not loaded.program.training
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("source", "error", "sentence"),
    [
        ("tiny_nets:residul", ModelError, "has no 'residul'; did you mean \"residual\""),
        ("tiny_nests:residual", ModelError, "no Python module 'tiny_nests'"),
        ("tiny_nets:broken", ModelError, "RuntimeError: the factory's own words"),
        ("tiny_nets:no_module", ModelError, "returned a value of type dict; it must return a torch.nn.Module"),
        ("tiny_nets:HERE", ModelError, "has no 'HERE'"),
        ("tiny_nets:", UsageError, "not package.module:factory"),
        ("nonsense", UsageError, "no model that edgedeploy knows"),
        ("none.onnx", UsageError, "does not exist"),
    ],
)
def test_reference_that_leads_nowhere_is_a_sentence(source, error, sentence):
    with pytest.raises(error, match=sentence):
        load(source, None, base=HERE)


def test_module_that_needs_another_names_the_other(tmp_path):
    (tmp_path / "needs_other.py").write_text("import not_installed_anywhere")
    with pytest.raises(ModelError, match=r"it needs the module 'not_installed_anywhere'"):
        load("needs_other:x", None, base=tmp_path)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_weights_fill_the_model(tmp_path, state, wrapper):
    path = tmp_path / "weights.pt"
    changed = {key: value + 1 for key, value in state.items()}
    torch.save({wrapper: changed, "epoch": 3} if wrapper else changed, path)
    loaded = load(MLP, path, base=HERE)
    for key, value in loaded.program.state_dict().items():
        assert torch.equal(value, changed[key])
    assert len(loaded.weights_sha256) == 64


def test_safetensors_fill_the_model(tmp_path, state):
    save_file({key: value + 1 for key, value in state.items()}, tmp_path / "w.safetensors")
    loaded = load(MLP, tmp_path / "w.safetensors", base=HERE)
    assert torch.equal(loaded.program.state_dict()["first.bias"], state["first.bias"] + 1)


def test_mismatch_lists_missing_unexpected_and_differently_shaped_keys(tmp_path, state):
    state = dict(state)
    state["frist.weight"] = state.pop("first.weight")
    state["second.bias"] = torch.zeros(3)
    state |= {f"extra.{index}": torch.zeros(1) for index in range(12)}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsMismatch) as caught:
        load(MLP, tmp_path / "w.safetensors", base=HERE)
    text = str(caught.value)
    assert "1 missing from the file: first.weight" in text
    assert "13 unknown to the model" in text
    assert "and 3 more" in text
    assert "second.bias (model 16, file 3)" in text


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("kept", [0, 7, 200])
def test_truncated_weights_are_a_sentence(tmp_path, state, name, kept):
    path = tmp_path / name
    if name.endswith(".pt"):
        torch.save(dict(state), path)
    else:
        save_file(dict(state), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match="cannot be read"):
        load(MLP, path, base=HERE)


def test_weights_that_need_unpickling_are_refused_unrun(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"state_dict": {}, "args": Bomb(tmp_path / "exploded")}, path)
    with pytest.raises(UntrustedPickle, match="unpickling runs whatever code"):
        load(MLP, path, base=HERE)
    assert not (tmp_path / "exploded").exists()


def test_trusted_pickle_is_read(tmp_path, state):
    path = tmp_path / "w.pt"
    torch.save({"state_dict": dict(state), "args": Path("a path is no tensor")}, path)
    with pytest.raises(UntrustedPickle):
        load(MLP, path, base=HERE)
    assert load(MLP, path, base=HERE, trust_pickle=True).kind == "module"


def test_pickled_model_is_refused_and_says_why(tmp_path):
    torch.save(Bomb(tmp_path / "exploded"), tmp_path / "model.pt")
    with pytest.raises(UntrustedPickle, match="unpickling runs whatever code the file carries"):
        load("model.pt", None, base=tmp_path)
    assert not (tmp_path / "exploded").exists()


# ---- .pt2


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    module = load(MLP, None, base=HERE).program
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(module, (torch.zeros(2, 12),), dynamic_shapes=({0: batch},)), path)
    return path


def rewritten(archive, out, change):
    """Copy an archive with some entries changed, removed (None) or added."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(out, "w") as new:
        entries = {name.split("/", 1)[1]: old.read(name) for name in old.namelist()}
        entries |= change(entries)
        for name, data in entries.items():
            new.writestr(f"model/{name}", data)
    return out


def program_with(edit):
    def change(entries):
        program = json.loads(entries["models/model.json"])
        edit(program)
        return {"models/model.json": json.dumps(program).encode()}

    return change


def test_exported_program_loads_and_computes(archive):
    loaded = load(archive.name, None, base=archive.parent)
    assert loaded.kind == "exported"
    original = load(MLP, None, base=HERE).program
    vector = torch.randn(5, 12)
    assert torch.allclose(loaded.program.module()(vector), original(vector), atol=1e-6)


def pickled_sample_inputs(bomb):
    buffer = io.BytesIO()
    torch.save((bomb,), buffer)
    return lambda _: {"data/sample_inputs/model.pt": buffer.getvalue()}


def pickled_weights(bomb):
    def change(entries):
        config = json.loads(entries["data/weights/model_weights_config.json"])
        next(iter(config["config"].values()))["use_pickle"] = True
        return {
            "data/weights/model_weights_config.json": json.dumps(config).encode(),
            "data/weights/weight_0": pickle.dumps(bomb),
        }

    return change


def evaluated_size(bomb):
    code = f"__import__('os').mkdir({str(bomb.path)!r})"

    def edit(program):
        values = program["graph_module"]["graph"]["tensor_values"]
        next(iter(values.values()))["sizes"][0] = {"as_expr": {"expr_str": code, "hint": {"as_int": 2}}}

    return program_with(edit)


def foreign_operator(bomb):
    def edit(program):
        node = program["graph_module"]["graph"]["nodes"][0]
        node["target"] = "torch.os.mkdir"
        node["inputs"] = [{"name": "path", "arg": {"as_string": str(bomb.path)}, "kind": 1}]

    return program_with(edit)


def code_as_name(bomb):
    def edit(program):
        program["graph_module"]["graph"]["nodes"][0]["name"] = f"x = __import__('os').mkdir({str(bomb.path)!r})"

    return program_with(edit)


def imported_enum(bomb):
    def edit(program):
        context = json.dumps({"__enum__": True, "fqn": "this:X", "name": "y"})
        spec = json.dumps([1, {"type": "builtins.dict", "context": context, "children_spec": []}])
        program["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = spec

    return program_with(edit)


def compiled_library(bomb):
    return lambda _: {"data/aotinductor/model/x.so": b"\x7fELF"}


@pytest.mark.parametrize(
    "attack",
    [
        pickled_sample_inputs, pickled_weights, evaluated_size, foreign_operator, code_as_name, imported_enum,
        compiled_library,
    ],
)  # fmt: skip
def test_archive_that_could_run_code_is_refused_unrun(tmp_path, archive, attack):
    rewritten(archive, tmp_path / "bad.pt2", attack(Bomb(tmp_path / "exploded")))
    with pytest.raises(UntrustedPickle, match="only be loaded by running code"):
        load("bad.pt2", None, base=tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_guards_are_never_run(tmp_path, archive):
    def edit(program):
        program["guards_code"] = [f"__import__('os').mkdir({str(tmp_path / 'exploded')!r})"]

    rewritten(archive, tmp_path / "guarded.pt2", program_with(edit))
    loaded = load("guarded.pt2", None, base=tmp_path)
    loaded.program.module()(torch.zeros(3, 12))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kept", [0, 50, 2000])
def test_truncated_archive_is_a_sentence(tmp_path, archive, kept):
    (tmp_path / "cut.pt2").write_bytes(archive.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"cut.pt2"):
        load("cut.pt2", None, base=tmp_path)


def test_weights_beside_a_model_that_carries_its_own_are_refused(archive):
    with pytest.raises(UsageError, match="carries its own weights"):
        load(archive.name, HERE / "x.pt", base=archive.parent)


# ---- .onnx


def onnx_model(location=None):
    weight = np.arange(16, dtype=np.float32)
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [16], weight.tobytes(), raw=True)
    if location is not None:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 16])],
        [tensor],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]).SerializeToString()


def test_external_data_beside_the_file_is_taken_in(tmp_path):
    (tmp_path / "m.onnx").write_bytes(onnx_model("m.data"))
    (tmp_path / "m.data").write_bytes(np.arange(16, dtype=np.float32).tobytes())
    model = load("m.onnx", None, base=tmp_path).program
    assert onnx.numpy_helper.to_array(model.graph.initializer[0]).tolist() == list(range(16))


@pytest.mark.parametrize("how", ["parent", "absolute", "link"])
def test_external_data_outside_the_folder_is_refused(tmp_path, how):
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(64))
    folder = tmp_path / "models"
    folder.mkdir()
    location = {"parent": "../secret", "absolute": str(secret), "link": "inside"}[how]
    if how == "link":
        (folder / "inside").symlink_to(secret)
    (folder / "m.onnx").write_bytes(onnx_model(location))
    with pytest.raises(ModelError, match="outside its folder; refused"):
        load("m.onnx", None, base=folder)


def test_missing_external_data_is_named(tmp_path):
    (tmp_path / "m.onnx").write_bytes(onnx_model("m.data"))
    with pytest.raises(ModelError, match=r"from 'm.data', which is not there"):
        load("m.onnx", None, base=tmp_path)


@pytest.mark.parametrize("data", [b"", b"no protobuf at all", onnx_model()[:60]])
def test_damaged_onnx_is_a_sentence(tmp_path, data):
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(ModelError, match=r"m.onnx"):
        load("m.onnx", None, base=tmp_path)
