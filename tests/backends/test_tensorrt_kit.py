"""What the host reads back from a kit, and what the options of both TensorRT back ends may be."""

import json
import zipfile

import pytest

from edgedeploy.backends.tensorrt import BACKEND, Options
from edgedeploy.backends.trt_options import demand_sense
from edgedeploy.errors import CompileError, DocumentError

CONTENTS = {
    "format": "edgedeploy.kit/1", "precision": "int8", "float_type": "float16", "has_int8": True,
    "operators": {"Conv": 2}, "float32_nodes": {"/a": "Exp", "/b": "Exp"}, "int8_nodes": ["/c"],
    "pairs": {"c.weight": [0.1]}, "profiles": {}, "notes": ["a note"],
}  # fmt: skip


@pytest.fixture
def kit(tmp_path):
    def write(**changed):
        path = tmp_path / "model.engine"
        with zipfile.ZipFile(path, "w") as opened:
            opened.writestr("kit.json", json.dumps(CONTENTS | changed))
        return path

    return write


def test_kit_says_what_it_asks_for(kit):
    report = BACKEND.inspect(kit())
    assert (report.quantized, report.float_islands) == (("/c",), ("/a", "/b"))
    assert report.notes == ("a note", "2 nodes are kept in float32: /a, /b (Exp)")
    assert BACKEND.inspect(kit(has_int8=False, precision="fp16", int8_nodes=[], pairs={})).float_islands == ()


def test_kit_of_a_newer_format_is_named_though_it_has_other_keys(kit):
    with pytest.raises(DocumentError, match=r"is edgedeploy\.kit/2, and this edgedeploy reads edgedeploy\.kit/1"):
        BACKEND.inspect(kit(format="edgedeploy.kit/2", unheard_of=1))


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04and then nothing"])
def test_damaged_kit_is_a_sentence(data, tmp_path):
    path = tmp_path / "model.engine"
    path.write_bytes(data)
    with pytest.raises(DocumentError, match=r"not a whole kit.*compile again"):
        BACKEND.inspect(path)
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("kit.json", data or b"{}")
    with pytest.raises(DocumentError, match=r"not a whole kit.*compile again"):
        BACKEND.inspect(path)


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"Layers": [5]}'])
def test_layers_that_cannot_be_read_are_a_sentence(text, kit, tmp_path):
    layers = tmp_path / "layers.json"
    layers.write_text(text)
    with pytest.raises(DocumentError, match="engine"):
        BACKEND.built_report(kit(), {"layers": layers}, Options())


def test_lost_scale_is_refused_and_product_in_float_is_only_noted(kit, tmp_path):
    layer = {"Name": "/c", "LayerType": "conv", "Inputs": [{"Name": "x", "Format/Datatype": "Half"}], "Outputs": []}
    (tmp_path / "layers.json").write_text(json.dumps({"Layers": [layer], "Bindings": []}))
    made = {"layers": tmp_path / "layers.json"}
    with pytest.raises(CompileError, match=r"this scale is not in the engine: c\.weight"):
        BACKEND.built_report(kit(), made, Options())
    assert any("c.weight" in note for note in BACKEND.built_report(kit(), made, Options(lost_scales="note")).notes)
    notes = BACKEND.built_report(kit(pairs={}), made, Options()).notes
    assert "/c was meant to run on integers and computes in float (fp16)" in notes


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"builds": 0}, "give 1 or more"),
        ({"workspace_mib": -1}, "give 0 or more"),
        ({"optimization_level": 6}, "give -1 to 5"),
        ({"dla_core": -2}, "give -1 or more"),
        ({"threads": 2}, "give 1"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(options, hint):
    (name,) = options
    with pytest.raises(CompileError, match=f"{name} is {options[name]}") as refused:
        demand_sense(Options(**options), "tensorrt")
    assert refused.value.hint == hint
