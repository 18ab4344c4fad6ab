"""The kernels of an engine and how it was built, as a reader sees them."""

from edgedeploy.records.artifact import EngineBuild, EngineReceipt, Fingerprint, Layer
from edgedeploy.render.kernels import COLUMNS, kernel_facts, kernel_rows, kernels_left_out, receipt_facts

LAYERS = (
    Layer(
        name="conv + relu",
        kind="CaskConvolution",
        precision="int8",
        output="int8",
        tactic="sm87_xmma_" + "x" * 60,
        nodes=("image/dequantize", "w/dequantize", "conv", "relu", "relu/quantize"),
    ),
    Layer(name="Reformatting CopyNode", kind="Reformat", precision="fp32", output="int8"),
    Layer(name="odd\x1b[31m"),
)


def make_receipt(*builds, **fields):
    tied = Fingerprint(gpu="Orin", compute_capability="8.7", tensorrt="10.3.0", driver="12.6", jetpack="6.1")
    digests = dict.fromkeys(("kit_sha256", "kit_key", "builder_sha256"), "0" * 64)
    return EngineReceipt(fingerprint=tied, device="orin-1", builds=builds, **digests, **fields)


def test_a_kernel_is_named_by_what_it_computes_and_by_its_own_name_where_that_is_not_known():
    rows = kernel_rows(LAYERS, is_all=True)
    assert [row[0] for row in rows] == ["conv + relu", "Reformatting CopyNode", "odd[31m"]
    assert all(len(row) == len(COLUMNS) for row in rows)
    assert rows[0][-1].endswith("…")


def test_kernels_are_counted_by_what_they_compute_on():
    assert kernel_facts(LAYERS) == [("kernels", "3: 1 int8, 1 fp32, 1 not available")]
    assert kernel_facts(()) == []


def test_a_long_table_says_what_it_leaves_out():
    many = LAYERS * 10
    assert len(kernel_rows(many, is_all=False)) == 20
    assert "10 more kernels" in kernels_left_out(many, is_all=False)
    assert kernels_left_out(many, is_all=True) == ""
    assert kernels_left_out(LAYERS, is_all=False) == ""


def test_a_receipt_says_what_an_engine_is_tied_to_and_which_of_several_was_chosen():
    first = EngineBuild(sha256="a" * 64, size_bytes=2048, seconds=60.0, p50_s=0.002, largest_difference=0.01)
    second = EngineBuild(
        sha256="b" * 64, size_bytes=2048, seconds=61.0, p50_s=0.001, largest_difference=0.0, is_chosen=True
    )
    facts = dict(receipt_facts(make_receipt(first, second, is_typed=True, timing_cache_sha256="c" * 64)))
    assert facts["tied to"] == "Orin, compute capability 8.7, TensorRT 10.3.0, driver for CUDA 12.6, JetPack 6.1"
    assert "precisions from the graph" in facts["built"]
    assert "0.01 from the chosen one's" in facts["engine 1"]
    assert facts["engine 2"].endswith("chosen")
    assert facts["timing cache"] == "c" * 64
    assert receipt_facts(None) == []


def test_an_engine_built_by_flags_names_them():
    facts = dict(receipt_facts(make_receipt(flags=("FP16", "INT8"))))
    assert "precisions by flags (FP16, INT8)" in facts["built"]
