"""Every back end × precision on micro-nets: right on the device session, or refused by name as the table says.

A few nets here; all of them with EDGEDEPLOY_CONFORMANCE=all, or by `python -m tests.conformance_table`, which also makes
the table.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch", reason="micro-nets are PyTorch modules: pip install 'edgedeploy[torch]'")
pytest.importorskip("onnxruntime", reason="forms are computed by ONNX Runtime: pip install 'edgedeploy[onnxruntime]'")

import torch

from edgedeploy.errors import CompileError, ModelError
from tests import conformance
from tests.backends.micro_nets import NETS, input_texts, samples_of
from tests.conformance import FAILURES, NOT_RUN, TARGETS, Outcome, Worker, absent, agrees, columns, difference, refusal
from tests.conformance_table import FILE, read_table, table

COLUMNS = columns()
# A padded maximum, an open batch axis with a sum and a linear head, two layouts side by side, and rank 3 with norms.
FEW = ("max_pool_padded", "dynamic_batch", "two_rank_4_inputs", "multi_head_attention")
IS_WHOLE = os.environ.get("EDGEDEPLOY_CONFORMANCE") == "all"
# Converters take seconds for each cell: of the few nets, each column has every third one; what is built here and run nowhere
# has two cells in all.
ONLY_BUILT = {("two_rank_4_inputs", "tensorrt_rtx", "int8"), ("multi_head_attention", "tensorrt_rtx", "fp16")}
RUN_COLUMNS = [column for column in COLUMNS if column[0] not in TARGETS]
CELLS = (
    [(net, *column) for net in NETS for column in COLUMNS]
    if IS_WHOLE
    else [
        *(
            (net, *column)
            for row, net in enumerate(FEW)
            for place, column in enumerate(RUN_COLUMNS)
            if (row + place) % 3 == 0
        ),
        *sorted(ONLY_BUILT),
    ]
)


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    with Worker(tmp_path_factory.mktemp("conformance")) as made:
        yield made


@pytest.fixture(scope="module")
def documented():
    return read_table(FILE.read_text(encoding="utf-8"))[0]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("net", "backend", "precision"), CELLS, ids=[" ".join(cell) for cell in CELLS])
def test_cell_is_right_or_refused_by_name_as_the_table_says(net, backend, precision, worker, documented):
    if reason := absent(backend):
        pytest.skip(reason)
    found = worker.judge(net, backend, precision)
    if found.word == "missing":
        pytest.skip(found.why)
    assert found.word not in FAILURES, found.why
    known = documented.get((net, f"{backend} {precision}"))
    assert known is not None, f"{FILE.name} does not have this cell; make it again"
    assert agrees(found, known), (
        f"{FILE.name} says {known.word}: {known.why}; now {found.word}: {found.why}; make it again"
    )


def test_table_has_every_net_and_column_and_no_failure(documented):
    rows = list(dict.fromkeys(net for net, _ in documented))
    heads = {head for _, head in documented}
    assert rows == list(NETS)
    assert heads == {f"{backend} {precision}" for backend, precision in COLUMNS}
    assert not {cell: found for cell, found in documented.items() if found.word in FAILURES}
    assert all(found.why for found in documented.values() if found.word == "refused")


# ---------------------------------------------------------------- the nets


def test_nets_are_many_and_tell_their_traps_apart():
    assert len(NETS) >= 45
    assert len({net.trap for net in NETS.values()}) == len(NETS)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", NETS)
def test_net_has_the_same_weights_each_time_and_the_outputs_that_it_names(name):
    first, second = NETS[name].make(), NETS[name].make()
    feeds = [torch.from_numpy(value) for value in samples_of(name, 1).values()]
    with torch.no_grad():
        answers = [module(*feeds) for module in (first, second)]
    one, other = ([*a.values()] if isinstance(a, dict) else [*a] if isinstance(a, tuple) else [a] for a in answers)
    assert len(one) == len(NETS[name].output_names)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(bool(torch.isfinite(value.float()).all()) and float(value.float().abs().max()) > 0 for value in one)


def test_samples_depend_on_their_seed_alone():
    assert all(
        np.array_equal(a, b) for a, b in zip(samples_of("tiled").values(), samples_of("tiled").values(), strict=True)
    )
    assert not np.array_equal(samples_of("tiled", seed=1)["a"], samples_of("tiled", seed=2)["a"])
    assert input_texts("embedding") == ["tokens=1,7:int64"]
    assert input_texts("dynamic_batch") == ["image=batch,3,12,10:float32"]


# ---------------------------------------------------------------- the judge


def test_what_kills_or_outlasts_a_worker_is_told_and_the_next_cell_is_judged(worker, monkeypatch):
    assert worker.judge("softmax_head", "fake", "fp32").word == "right"
    worker._process.kill()
    dead = worker.judge("softmax_head", "fake", "fp32")
    assert (dead.word, "-9" in dead.why) == ("crashed", True), dead.why
    assert worker.judge("softmax_head", "fake", "fp32").word == "right"
    monkeypatch.setattr(worker, "_limit_s", 0.0)
    late = worker.judge("softmax_head", "fake", "int8")
    assert (late.word, "within 0 s" in late.why) == ("crashed", True), late.why


def test_an_error_that_is_no_sentence_is_a_crash(tmp_path, monkeypatch):
    bench = object.__new__(conformance.Bench)
    monkeypatch.setattr(bench, "_compile", lambda *cell: {}["no such key"], raising=False)
    found = bench.judge("softmax_head", "fake", "fp32")
    assert (found.word, "KeyError instead of a sentence" in found.why) == ("crashed", True)


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (CompileError("no kernel", backend="b", node="/x", op="GridSample", hint="use fp32"), "refused"),
        (CompileError("no kernel", backend="b", node="/x", hint="use fp32"), "vague"),
        (CompileError("no kernel", backend="b", op="GridSample"), "vague"),
        (ModelError("GridSample has no form; replace it"), "refused"),
        (ModelError("GridSamples have no form; replace them"), "vague"),
        (ModelError("GridSample has no form"), "vague"),
    ],
)
def test_refusal_must_name_the_operator_and_say_what_to_do(error, word):
    found = refusal(error, lambda: {"Conv", "GridSample"})
    assert found.word == word
    assert "/x" not in found.why or word == "vague"


def test_cell_that_no_device_here_can_run_is_built_and_not_right(tmp_path, monkeypatch):
    from edgedeploy.errors import VisitFailed

    def judged(kind):
        bench = object.__new__(conformance.Bench)
        built = _Built(tmp_path, {"conv": 1}, ())
        monkeypatch.setattr(bench, "_compile", lambda *cell: built, raising=False)

        def fail(*cell):
            raise VisitFailed("there is no GPU", kind=kind)

        monkeypatch.setattr(bench, "_compared", fail, raising=False)
        return bench.judge("softmax_head", "fake", "fp32")

    assert judged("missing-runtime") == Outcome("built", NOT_RUN)
    assert judged("bad-artifact").word == "crashed"
    assert "built" not in FAILURES


@pytest.mark.parametrize(
    ("found", "known", "is_same"),
    [
        ("right", "right", True), ("built", "built", True), ("right", "built", True), ("built", "right", True),
        ("refused", "built", False), ("built", "refused", False), ("right", "refused", False),
    ],
)  # fmt: skip
def test_only_a_cell_that_was_built_may_be_right_elsewhere(found, known, is_same):
    assert agrees(Outcome(found), Outcome(known)) is is_same


class _Built:
    """As much of an artifact as its promise is read from."""

    def __init__(self, folder, operators, quantized, notes=()):
        from edgedeploy.records.artifact import LayerReport

        self.folder, self.artifact, self.recipe, self.toolchain = folder, self, self, {}
        self.layers = LayerReport(operators=operators, quantized=quantized, float_islands=())
        self.notes = notes


def _quantization_table(folder, nodes):
    from edgedeploy.documents import write_json
    from edgedeploy.records.quantization import QuantizationTable

    write_json(
        folder / "quantization.json",
        QuantizationTable(
            model_sha256="0" * 64, calibration="", calibration_sha256="", samples=0, method="", nodes=nodes, activations={}, weights={},
        ),
    )  # fmt: skip


def test_float_where_integers_were_promised_is_silent_unless_it_is_told(tmp_path):
    _quantization_table(tmp_path, ("conv",))
    found = conformance._broken_promise(_Built(tmp_path, {"CONV_2D": 1}, ()))
    assert (found.word, "conv" in found.why) == ("silent", True)
    assert conformance._broken_promise(_Built(tmp_path, {"CONV_2D": 1}, ("CONV_2D conv",))) is None
    assert conformance._broken_promise(_Built(tmp_path, {"CONV_2D": 1}, (), ("conv stays float",))) is None
    _quantization_table(tmp_path, ())
    assert conformance._broken_promise(_Built(tmp_path, {"CONV_2D": 1}, ())) is None


@pytest.mark.parametrize("name", ["CUSTOM", "ONNX_DET", "Extra"])
def test_operator_that_no_runtime_knows_is_silent(tmp_path, name):
    found = conformance._broken_promise(_Built(tmp_path, {"CONV_2D": 1, name: 1}, ()))
    assert (found.word, name in found.why) == ("silent", True)


finite = st.floats(-1e3, 1e3, width=32).filter(lambda value: value == 0 or abs(value) > 1e-3)


@given(
    values=st.lists(finite, min_size=1, max_size=20).filter(any), precision=st.sampled_from(["fp32", "fp16", "int8"])
)
def test_equal_outputs_have_no_difference(values, precision):
    array = np.array(values, np.float32)
    complaint, error = difference(array[:, None], array.reshape(-1, 1, 1), precision)
    assert (complaint, error) == ("", 0)


@given(values=st.lists(finite, min_size=2, max_size=20).filter(any), scale=st.sampled_from([-1.0, 0.5, 0.8, 1.25]))
def test_output_of_another_scale_is_wrong_in_every_precision(values, scale):
    array = np.array(values, np.float32)
    for precision in ("fp32", "fp16", "int8"):
        assert difference(array, array * np.float32(scale), precision)[0]


@pytest.mark.parametrize(
    "found",
    [
        np.array([[1, 2, 3]], np.float32).T,
        np.array([1, 2, 3], np.int64),
        np.array([1, 2, np.nan], np.float32),
        np.zeros(3, np.float32),
        np.array([3, 2, 1], np.float32),
    ],
    ids=["shape", "type", "NaN", "zeros", "order"],
)
def test_output_that_is_another_is_wrong(found):
    expected = np.array([[1, 2, 3], [1, 2, 3]], np.float32)[:1] if found.ndim == 2 else np.array([1, 2, 3], np.float32)
    wide = np.repeat(found, 2, axis=0) if found.ndim == 2 else found
    for precision in ("fp32", "fp16", "int8"):
        assert difference(expected, wide, precision)[0]


def test_indices_may_differ_where_values_are_rounded_and_nowhere_else():
    expected = np.arange(100)
    found = np.where(expected < 10, expected + 1, expected)
    assert difference(expected, found, "fp32")[0]
    assert difference(expected, found, "fp16")[0]
    assert not difference(expected, found, "int8")[0]
    assert difference(expected, expected + 1, "int8")[0]


words = st.sampled_from(["right", "built", "refused", "wrong", "crashed", "silent", "vague"])
sentences = (
    st.text(st.characters(categories=("L", "N", "P", "Zs"), exclude_characters="|"), min_size=1)
    .map(lambda text: " ".join(text.split()))
    .filter(bool)
)


@given(
    st.dictionaries(
        st.tuples(st.sampled_from(["a_net", "another"]), st.sampled_from(["x fp32", "y int8"])),
        st.tuples(words, sentences, st.booleans()),
    )
)
def test_table_says_what_was_found(found):
    cells = {
        cell: Outcome(word, "" if word == "right" else why, is_mixed=mixed and word in ("right", "built"))
        for cell, (word, why, mixed) in found.items()
    }
    text = table({"a_net": "a trap", "another": "another"}, ["x fp32", "y int8"], cells, {"x": "x 1.0, numpy 2"})
    assert read_table(text) == (cells, {"x": "x 1.0, numpy 2"})
    missing = {("a_net", "x fp32"): replace(Outcome("missing"), why="not installed")}
    assert read_table(table({"a_net": "a trap"}, ["x fp32"], missing, {}))[0] == {}
