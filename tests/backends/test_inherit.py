"""A trained grid meets a target's rules, and a quantized model's own numbers become its table."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedeploy.errors import ModelError
from edgedeploy.prepare.source.inherit import inherited_table, map_grid
from edgedeploy.prepare.source.survival import represents
from edgedeploy.records.quantization import ActivationRange, Grid
from edgedeploy.records.target import QuantizationRules

RULES = {
    (dtype, symmetric): QuantizationRules(activation_dtype=dtype, activation_symmetric=symmetric)
    for dtype in ("int8", "uint8")
    for symmetric in (False, True)
}


@st.composite
def trained_ranges(draw):
    """Grids as PyTorch's observers make them: full and reduced ranges of both types, symmetric or not."""
    low, high = draw(st.sampled_from([(-128, 127), (-127, 127), (0, 255), (0, 127), (-64, 63), (0, 100)]))
    is_symmetric = draw(st.booleans())
    zero = (low + high + 1) // 2 if is_symmetric else draw(st.integers(low, high))
    scale = float(np.float32(draw(st.floats(1e-6, 1e3))))
    grid = Grid(scale=scale, zero_point=zero, low_code=low, high_code=high)
    lowest = 0.0 if draw(st.booleans()) else scale * (low - zero)
    return ActivationRange(low=lowest, high=scale * (high - zero), origin="trained", grid=grid)


def value_of(code, grid):
    return Fraction(grid.scale) * (code - grid.zero_point)


@given(trained_ranges(), st.sampled_from(sorted(RULES)))
@settings(max_examples=400, deadline=None)
def test_every_trained_value_that_can_occur_is_a_value_of_an_exact_grid(values, which):
    rules, trained = RULES[which], values.grid
    grid, is_exact, change = map_grid(values, rules)
    limits = np.iinfo(rules.activation_dtype)
    assert limits.min <= grid.low_code <= grid.zero_point <= grid.high_code <= limits.max
    if rules.activation_symmetric:
        assert grid.zero_point == (0 if rules.activation_dtype == "int8" else 128)
    if not is_exact:
        assert rules.activation_symmetric  # every grid of 8 bits has an asymmetric form
        assert change > 0
        return
    assert change == 0
    for code in range(trained.low_code, trained.high_code + 1):
        real = value_of(code, trained)
        if values.low >= 0 and real < 0:
            continue  # a code that never occurs
        new = real / Fraction(grid.scale) + grid.zero_point
        assert new.denominator == 1
        assert grid.low_code <= new <= grid.high_code
        # The same number in float32, which is what a graph computes with.
        assert np.float32(grid.scale) * np.float32(int(new) - grid.zero_point) == np.float32(
            trained.scale
        ) * np.float32(code - trained.zero_point)


@given(trained_ranges(), st.sampled_from(["int8", "uint8"]))
@settings(max_examples=200, deadline=None)
def test_a_grid_that_is_scaled_anew_still_covers_its_range(values, dtype):
    grid, is_exact, change = map_grid(values, RULES[dtype, True])
    if is_exact:
        assert change == 0
        return
    ends = [float(value_of(code, grid)) for code in (grid.low_code, grid.high_code)]
    assert ends[1] >= values.high * (1 - 1e-6) or values.high == 0
    assert ends[0] <= values.low * (1 - 1e-6) or values.low == 0
    assert change == pytest.approx(abs(grid.scale - values.grid.scale) / values.grid.scale)


def grid_of(scale, zero, low, high):
    return Grid(scale=scale, zero_point=zero, low_code=low, high_code=high)


def test_never_negative_symmetric_grid_becomes_one_of_half_the_scale():
    trained = grid_of(0.5, 0, -128, 127)
    values = ActivationRange(low=0.0, high=63.5, origin="trained", grid=trained)
    assert map_grid(values, RULES["int8", False]) == (grid_of(0.25, -128, -128, 127), True, 0.0)
    assert map_grid(values, RULES["uint8", False]) == (grid_of(0.25, 0, 0, 255), True, 0.0)
    assert map_grid(values, RULES["int8", True]) == (trained, True, 0.0)


def test_symmetric_grid_of_a_signed_tensor_stays():
    trained = grid_of(0.5, 0, -127, 127)
    values = ActivationRange(low=-63.5, high=63.5, origin="trained", grid=trained)
    assert map_grid(values, RULES["int8", False]) == (trained, True, 0.0)
    assert map_grid(values, RULES["uint8", True]) == (grid_of(0.5, 128, 1, 255), True, 0.0)


def test_unsigned_codes_move_by_128():
    values = ActivationRange(low=-1.0, high=24.5, origin="trained", grid=grid_of(0.1, 10, 0, 255))
    assert map_grid(values, RULES["int8", False]) == (grid_of(0.1, -118, -128, 127), True, 0.0)


def test_never_negative_tensor_starts_at_the_lowest_code_so_that_a_relu_is_absorbed():
    values = ActivationRange(low=0.0, high=12.4, origin="trained", grid=grid_of(0.1, 131, 0, 255))
    assert map_grid(values, RULES["uint8", False]) == (grid_of(0.1, 0, 0, 124), True, 0.0)
    assert map_grid(values, RULES["int8", False]) == (grid_of(0.1, -128, -128, -4), True, 0.0)


def test_asymmetric_grid_under_symmetric_rules_is_scaled_anew():
    values = ActivationRange(low=0.0, high=25.5, origin="trained", grid=grid_of(0.1, 0, 0, 255))
    grid, is_exact, change = map_grid(values, RULES["int8", True])
    assert not is_exact
    assert grid.scale == pytest.approx(25.5 / 127)
    assert change == pytest.approx(255 / 127 - 1, rel=1e-5)


def test_sixteen_bit_grid_is_scaled_anew():
    values = ActivationRange(low=-1.0, high=1.0, origin="trained", grid=grid_of(2**-15, 0, -32768, 32767))
    grid, is_exact, change = map_grid(values, RULES["int8", False])
    assert not is_exact
    assert change == pytest.approx(grid.scale * 2**15 - 1)


def test_calibrated_range_follows_the_rules_alone():
    values = ActivationRange(low=0.0, high=2.55, origin="calibrated")
    grid, is_exact, change = map_grid(values, RULES["uint8", False])
    assert (grid.zero_point, grid.low_code, grid.high_code, is_exact, change) == (0, 0, 255, True, 0.0)
    assert grid.scale == pytest.approx(0.01)


@given(trained_ranges(), st.integers(1, 3), st.integers(-3, 3))
@settings(max_examples=100, deadline=None)
def test_a_grid_represents_itself_and_finer_ones_but_not_a_shifted_scale(values, factor, shift):
    trained = values.grid
    codes = (trained.low_code * factor + shift, trained.high_code * factor + shift)
    finer = float(Fraction(trained.scale) / factor)
    is_finer = represents(trained, trained.zero_point * factor + shift, finer, codes)
    assert is_finer == (Fraction(trained.scale) / Fraction(finer) == factor)
    assert not represents(trained, trained.zero_point, trained.scale * 1.01, (trained.low_code, trained.high_code))


# The table of a model that came quantized

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from edgedeploy.prepare.count.compression import compression_report  # noqa: E402
from edgedeploy.prepare.graph import opset_of, specs_of, write_graph  # noqa: E402
from edgedeploy.prepare.source.absorb import absorb  # noqa: E402
from edgedeploy.records.model import Model  # noqa: E402
from edgedeploy.storage import sha256_file  # noqa: E402

from .quantized_sources import Cnn, Mlp, exported, onnxruntime_dynamic, pt2e, rows, seeded  # noqa: E402


def absorbed(source, folder):
    clean, record = absorb(source)
    path = folder / "clean.onnx"
    write_graph(clean, path)
    return Model(
        path=str(path),
        sha256=sha256_file(path),
        source="source",
        opset=opset_of(clean),
        inputs=specs_of(clean.graph.input),
        outputs=specs_of(clean.graph.output),
        compression=compression_report(path),
        quantization=record,
    ), clean


def test_table_holds_the_sources_numbers_and_every_quantized_node(tmp_path):
    model, clean = absorbed(pt2e(seeded(Cnn), (4, 3, 8, 8)), tmp_path)
    table = inherited_table(model, RULES["int8", False])
    assert table.activations == model.quantization.activations
    assert table.weights == model.quantization.weights
    assert {values.origin for values in table.activations.values()} == {"trained"}
    assert (table.model_sha256, table.samples, table.bias_deltas) == (model.sha256, 0, {})
    kinds = [node.op_type for node in clean.graph.node if node.name in table.nodes]
    assert kinds.count("Conv") == 3
    assert kinds.count("Gemm") == kinds.count("Add") == 1
    without = inherited_table(
        model, QuantizationRules(activation_dtype="int8", activation_symmetric=False, excluded_operators=("Add",))
    )
    assert set(table.nodes) - set(without.nodes) == {node.name for node in clean.graph.node if node.op_type == "Add"}


def test_dynamically_quantized_nodes_are_told_by_their_weights(tmp_path):
    source = onnxruntime_dynamic(exported(seeded(Mlp), torch.from_numpy(rows((4, 12)))), tmp_path)
    model, _ = absorbed(source, tmp_path)
    table = inherited_table(model, RULES["uint8", False])
    assert table.nodes == ()
    assert set(table.dynamic) == set(table.weights)
    assert len(table.dynamic) == 2


def test_float_model_has_nothing_to_inherit(tmp_path):
    model, _ = absorbed(exported(seeded(Mlp), torch.from_numpy(rows((4, 12)))), tmp_path)
    with pytest.raises(ModelError, match="carries no quantization of its own"):
        inherited_table(model, RULES["uint8", False])
