"""Documents: what people write wrongly is named by file, line and the key they probably meant."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedeploy.documents import Record, _at_line, _key_lines, encode_json, read_json, read_toml, write_json
from edgedeploy.errors import DocumentError
from edgedeploy.records.release import FORMAT, load_release

GOOD = """\
format = "edgedeploy.release/1"
name = "demo"

[inputs.image]
shape = ["batch", 1, 28, 28]   # NCHW

[models.dense]
source = "package.module:dense"

[models.pruned]
source = "package.module:pruned"

[[cells]]
name = "dense-fp32"
model = "dense"
target = "host"
backend = "onnxruntime"
precision = "fp32"

[[cells]]
name = "pruned-int8"
model = "pruned"
target = "host"
backend = "onnxruntime"
precision = "int8"

[gate]
baseline = "dense-fp32"
[gate.margins]
latency_p50 = "+5%"
"""


def _write(folder: Path, text: str) -> Path:
    path = folder / "edgedeploy.toml"
    path.write_text(text)
    return path


def test_good_release_is_read(tmp_path):
    release = load_release(_write(tmp_path, GOOD))
    assert release.cells[1].precision == "int8"
    assert release.inputs["image"].shape == ("batch", 1, 28, 28)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('precision = "int8"', 'precison = "int8"', 'unknown key "precison" in {path}, line 25; did you mean "precision"?'),
        ('precision = "int8"', 'precision = "int9"', "cells.1.precision in {path}, line 25"),
        ('source = "package.module:pruned"', 'sauce = "x"', 'unknown key "sauce" in {path}, line 11; did you mean "source"?'),
        ('name = "demo"', "name = 3", "name in {path}, line 2: expected `str`, got `int`"),
        ('latency_p50 = "+5%"', 'latencyp50 = "+5%"', 'line 30; did you mean "latency_p50"?'),
        ('model = "pruned"', 'model = "prunned"', 'line 22: there is no model "prunned"; did you mean "pruned"?'),
        ('baseline = "dense-fp32"', 'baseline = "dense"', 'line 28: there is no cell "dense"; did you mean "dense-fp32"?'),
        ('name = "pruned-int8"', 'name = "dense-fp32"', 'line 21: the cell name "dense-fp32" is used twice'),
        ("release/1", "release/2", "newer edgedeploy"),
        ("edgedeploy.release/1", "edgedeploy.lab/1", 'line 1 is a "edgedeploy.lab/1" document'),
        ('format = "edgedeploy.release/1"', "", "has no key format"),
        ('name = "demo"', "", 'missing key "name"'),
        ('name = "demo"', "name = ", "is not valid TOML"),
        ('source = "package.module:dense"', 'source = "missing.onnx"', 'line 8: the file or folder "missing.onnx"'),
        ('target = "host"', 'target = "host"\nshape.x = 1', 'unknown key "shape"'),
    ],
)  # fmt: skip
def test_mistake_is_named_with_file_line_and_intended_key(tmp_path, old, new, expected):
    path = _write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(DocumentError) as caught:
        load_release(path)
    assert expected.format(path=path) in str(caught.value)


def test_baseline_on_another_device_is_refused(tmp_path):
    text = GOOD.replace('precision = "int8"', 'precision = "int8"\ndevice = "orin"')
    with pytest.raises(DocumentError, match="measured on one device"):
        load_release(_write(tmp_path, text))


def test_wrong_value_in_one_of_several_tables_names_that_table(tmp_path):
    text = GOOD.replace('source = "package.module:pruned"', 'source = "package.module:pruned"\nweights = 7')
    with pytest.raises(DocumentError, match=r"models\.pruned\.weights in .*, line 12: expected `str`, got `int`"):
        load_release(_write(tmp_path, text))


class _Number(Record, frozen=True, kw_only=True):
    format: str
    value: float


@pytest.mark.parametrize("text", ['{"format": "edgedeploy.n/1", "value": NaN}', '{"format": "edg', "[1]", "\xff\xfe"])
def test_broken_json_is_a_sentence(tmp_path, text):
    path = tmp_path / "n.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DocumentError, match=r"n\.json"):
        read_json(path, _Number, "edgedeploy.n/1")


def test_old_document_is_upgraded_step_by_step(tmp_path):
    path = tmp_path / "n.json"
    path.write_text('{"format": "edgedeploy.n/1", "v": 1}')
    upgrades = {
        1: lambda old: {"format": "edgedeploy.n/2", "valeu": old["v"]},
        2: lambda old: {"format": "edgedeploy.n/3", "value": old["valeu"] + 0.5},
    }
    assert read_json(path, _Number, "edgedeploy.n/3", upgrades).value == 1.5
    with pytest.raises(DocumentError, match="too old"):
        read_json(path, _Number, "edgedeploy.n/4", upgrades)


@given(value=st.floats(allow_nan=False, allow_infinity=False))
@settings(max_examples=50)
def test_json_round_trip_is_exact(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "n.json"
    record = _Number(format="edgedeploy.n/1", value=value)
    write_json(path, record)
    assert read_json(path, _Number, "edgedeploy.n/1") == record
    assert encode_json(record) == path.read_bytes()


_NAMES = st.sampled_from(["a", "b-c", "d_1", "e"])


@given(st.dictionaries(_NAMES, st.lists(st.dictionaries(_NAMES, st.integers(), min_size=1), min_size=1, max_size=3)))
@settings(max_examples=50)
def test_every_key_of_an_array_of_tables_is_found_on_its_line(document):
    lines = []
    expected = {}
    for table, entries in document.items():
        for index, entry in enumerate(entries):
            lines.append(f"[[{table}]]")
            for key, value in entry.items():
                lines.append(f"{key} = {value}")
                expected[table, index, key] = len(lines)
    text = "\n".join(lines)
    assert tomllib.loads(text) == {table: list(entries) for table, entries in document.items()}
    found = dict(_key_lines(text))
    for path, number in expected.items():
        assert found[path] == number
        assert _at_line(text, path) == f", line {number}"


def test_toml_record_reads_what_is_written(tmp_path):
    path = tmp_path / "n.toml"
    path.write_text('format = "edgedeploy.n/1"\nvalue = 2.5\n')
    assert read_toml(path, _Number, "edgedeploy.n/1").value == 2.5


def test_format_constant_is_the_one_in_the_example():
    assert FORMAT in GOOD
