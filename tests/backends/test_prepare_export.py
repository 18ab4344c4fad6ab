"""Export and simplification: the ONNX computes what PyTorch computes, with the names and axes that were asked for."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from onnx import TensorProto, helper  # noqa: E402

from edgedeploy.errors import FidelityError, ModelError, UsageError  # noqa: E402
from edgedeploy.prepare.dataset import random_samples  # noqa: E402
from edgedeploy.prepare.export import declared_inputs, export  # noqa: E402
from edgedeploy.prepare.graph import Runner, read_graph  # noqa: E402
from edgedeploy.prepare.load import Loaded, load  # noqa: E402
from edgedeploy.prepare.simplify import simplify  # noqa: E402
from edgedeploy.records.model import TensorSpec  # noqa: E402

HERE = Path(__file__).parent
IMAGE = TensorSpec(name="image", dtype="float32", shape=("batch", 3, 8, 8), layout="NCHW")
VECTOR = TensorSpec(name="vector", dtype="float32", shape=("batch", 12))


def exported(name, specs, out, *, count=6):
    loaded = load(f"tiny_nets:{name}", None, base=HERE)
    return export(loaded, specs, random_samples(specs, count, 0), out / "m.onnx")


@pytest.fixture(scope="module")
def residual(tmp_path_factory):
    return exported("residual", [IMAGE], tmp_path_factory.mktemp("residual"))


def test_names_layouts_and_dynamic_batch_are_kept(residual):
    model = residual
    assert model.inputs == (IMAGE,)
    assert [(spec.name, spec.shape) for spec in model.outputs] == [("output", ("batch", 5))]
    assert model.opset == 18
    assert Runner(Path(model.path))({"image": np.zeros((1, 3, 8, 8), np.float32)})["output"].shape == (1, 5)
    assert Runner(Path(model.path))({"image": np.zeros((9, 3, 8, 8), np.float32)})["output"].shape == (9, 5)


def test_fidelity_against_pytorch_is_recorded(residual):
    record = residual.fidelity[0]
    assert (record.reference, record.candidate, record.samples) == ("PyTorch", "fp32 ONNX", 6)
    assert "random" in record.sample_source
    assert record.outputs[0].max_relative < 1e-5
    assert record.outputs[0].argmax_agreement == 1.0


def test_dictionary_outputs_keep_their_keys(tmp_path):
    model = exported("residual_with_taps", [IMAGE], tmp_path)
    assert [spec.name for spec in model.outputs] == ["logits", "stem"]
    assert model.outputs[1].shape == ("batch", 8, 8, 8)


@pytest.mark.parametrize("order", [("tokens", "bias"), ("bias", "tokens")])
def test_several_inputs_are_matched_by_name_whatever_their_order(tmp_path, order):
    specs = {
        "tokens": TensorSpec(name="tokens", dtype="float32", shape=("batch", "length", 6)),
        "bias": TensorSpec(name="bias", dtype="float32", shape=("batch", 8)),
    }
    model = exported("two_inputs", [specs[name] for name in order], tmp_path)
    assert {spec.name: spec.shape for spec in model.inputs} == {name: spec.shape for name, spec in specs.items()}
    assert [spec.name for spec in model.outputs] == ["output_0", "output_1"]
    batch = {"tokens": np.ones((3, 4, 6), np.float32), "bias": np.ones((3, 8), np.float32)}
    assert Runner(Path(model.path))(batch)["output_0"].shape == (3, 8)


def test_inputs_with_names_of_their_own_are_matched_by_position(tmp_path):
    specs = [
        TensorSpec(name="sequence", dtype="float32", shape=("n", "length", 6)),
        TensorSpec(name="offset", dtype="float32", shape=("n", 8)),
    ]
    model = exported("two_inputs", specs, tmp_path)
    assert [(spec.name, spec.shape) for spec in model.inputs] == [
        ("sequence", ("n", "length", 6)),
        ("offset", ("n", 8)),
    ]


def test_fixed_batch_stays_fixed(tmp_path):
    fixed = TensorSpec(name="image", dtype="float32", shape=(1, 3, 8, 8))
    assert exported("residual", [fixed], tmp_path).inputs[0].shape == (1, 3, 8, 8)


def test_one_sample_is_enough_for_a_dynamic_batch(tmp_path):
    assert exported("residual", [IMAGE], tmp_path, count=1).inputs[0].shape[0] == "batch"


def test_the_same_model_gives_the_same_bytes_without_paths_of_this_machine(tmp_path, residual):
    first, second = residual, exported("residual", [IMAGE], tmp_path)
    assert first.sha256 == second.sha256
    assert str(HERE).encode() not in Path(first.path).read_bytes()
    assert b"tiny_nets.py" not in Path(first.path).read_bytes()


@pytest.mark.parametrize("name", ["small_mlp", "large_mlp", "masked"])
def test_layers_on_both_sides_of_the_folding_limits_keep_their_meaning(tmp_path, name):
    model = exported(name, [VECTOR], tmp_path)
    operators = model.compression.operators
    assert operators == {"Gemm": 2, "Relu": 1}, "a mask or a transposition is left in the graph"


def test_pruned_weights_are_counted_as_zeros(tmp_path):
    dense, masked = (exported(name, [VECTOR], tmp_path).compression for name in ("large_mlp", "masked"))
    assert dense.parameters == masked.parameters == 12 * 600 + 600 + 600 * 600 + 600
    assert masked.nonzero_parameters == pytest.approx(dense.parameters - (12 * 600 + 600 * 600) / 2, rel=0.01)
    assert dense.macs == masked.macs == 12 * 600 + 600 * 600


def test_macs_of_convolutions_are_those_of_one_sample(residual):
    assert residual.compression.macs == 64 * (8 * 27 + 16 * 8 + 16 * 9 + 8 * 16) + 8 * 5


def test_nothing_is_printed(tmp_path, capfd):
    exported("chatty", [VECTOR], tmp_path)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_model_that_answers_differently_each_time_is_refused(tmp_path):
    with pytest.raises(FidelityError, match=r"differs from it in output 'output'.*randomness"):
        exported("noisy", [VECTOR], tmp_path)


def test_python_model_without_inputs_is_refused(tmp_path):
    loaded = load("tiny_nets:residual", None, base=HERE)
    with pytest.raises(UsageError, match="--input"):
        export(loaded, None, random_samples([IMAGE], 2, 0), tmp_path / "m.onnx")


def test_wrong_shape_is_the_models_own_sentence(tmp_path):
    wrong = TensorSpec(name="image", dtype="float32", shape=("batch", 4, 8, 8))
    with pytest.raises(ModelError, match=r"cannot run on image 2×4×8×8.*expected input.* to have 3 channels"):
        exported("residual", [wrong], tmp_path)


def test_axis_that_the_model_fixes_is_named(tmp_path):
    wrong = TensorSpec(name="vector", dtype="float32", shape=("batch", "width"))
    loaded = load("tiny_nets:small_mlp", None, base=HERE)
    samples = random_samples([VECTOR], 4, 0)
    with pytest.raises(
        ModelError, match=r"cannot be exported.*fixes the axis 'width' to 12; give that axis the number 12"
    ):
        export(loaded, [wrong], samples, tmp_path / "m.onnx")


def test_exported_program_brings_its_own_inputs(tmp_path):
    module = load("tiny_nets:residual", None, base=HERE).program
    program = torch.export.export(module, (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("n")},))
    loaded = Loaded("exported", "m.pt2", program)
    specs = declared_inputs(loaded)
    assert specs == (TensorSpec(name="image", dtype="float32", shape=("batch", 3, 8, 8)),)
    model = export(loaded, None, random_samples(specs, 4, 0), tmp_path / "m.onnx")
    assert model.inputs == specs
    assert model.fidelity[0].outputs[0].max_relative < 1e-5
    fixed = TensorSpec(name="image", dtype="float32", shape=("batch", 3, 9, 9))
    with pytest.raises(UsageError, match="which is fixed in the file"):
        export(loaded, [fixed], random_samples([fixed], 2, 0), tmp_path / "n.onnx")


def onnx_source(opset=18):
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 3], np.arange(12, dtype=np.float32).tobytes(), raw=True)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Relu", ["m"], ["y"])],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4]),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [weight],
    )
    return Loaded("onnx", "m.onnx", helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]))


@pytest.mark.parametrize("opset", [13, 17, 18])
def test_onnx_source_is_brought_to_a_recent_opset_with_its_inputs(tmp_path, opset):
    loaded = onnx_source(opset)
    specs = declared_inputs(loaded)
    assert specs == (TensorSpec(name="x", dtype="float32", shape=("N", 4)),)
    model = export(loaded, None, random_samples(specs, 4, 0), tmp_path / "m.onnx")
    assert model.opset >= 17
    assert model.inputs == specs
    assert model.compression.parameters == 12
    assert model.fidelity[0].outputs[0].max_abs == 0


def test_onnx_input_may_be_fixed_or_renamed_but_not_misspelt(tmp_path):
    loaded = onnx_source()
    fixed = TensorSpec(name="x", dtype="float32", shape=(2, 4))
    assert export(loaded, [fixed], random_samples([fixed], 4, 0), tmp_path / "m.onnx").inputs == (fixed,)
    for wrong, sentence in [
        (TensorSpec(name="x", dtype="float32", shape=("N", 5)), "fixed in the file"),
        (TensorSpec(name="x", dtype="int64", shape=("N", 4)), "is float32, and int64 was given"),
        (TensorSpec(name="y", dtype="float32", shape=("N", 4)), "has the inputs x, and y were given"),
    ]:
        with pytest.raises(UsageError, match=sentence):
            export(loaded, [wrong], random_samples([wrong], 2, 0), tmp_path / "n.onnx")


def test_simplified_model_is_canonical_and_faithful(tmp_path, residual):
    simple = simplify(residual, random_samples([IMAGE], 6, 0), tmp_path / "s.onnx")
    graph = read_graph(Path(simple.path)).graph
    assert "GlobalAveragePool" in simple.compression.operators
    assert "BatchNormalization" not in simple.compression.operators
    biases = [node.input[2] for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(biases) == len(set(biases)) == 5
    assert (simple.inputs, simple.outputs) == (residual.inputs, residual.outputs)
    assert len(simple.fidelity) == 2
    assert simple.fidelity[1].outputs[0].max_relative < 1e-5


def test_pass_that_changes_values_is_left_out_and_logged(tmp_path, residual, monkeypatch, caplog):
    import onnxslim

    def wrong(graph):
        for item in graph.graph.initializer:
            if item.data_type == TensorProto.FLOAT and len(item.dims) == 4:
                item.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(item) * 2, item.name))
        return graph

    monkeypatch.setattr(onnxslim, "slim", wrong)
    simple = simplify(residual, random_samples([IMAGE], 6, 0), tmp_path / "s.onnx")
    assert "simplification slim is wrong for this model and is left out" in caplog.text
    assert simple.fidelity[1].outputs[0].max_relative < 1e-5
