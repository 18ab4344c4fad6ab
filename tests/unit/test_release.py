"""The release file: what a model is declared to be."""

import pytest

from edgedeploy.errors import DocumentError
from edgedeploy.records.release import Declared, load_release

from .test_documents import GOOD


def _release(folder, declared):
    path = folder / "edgedeploy.toml"
    path.write_text(GOOD.replace("[[cells]]", f"[models.pruned.declared]\n{declared}\n\n[[cells]]", 1))
    return path


def test_a_declaration_is_read(tmp_path):
    text = """\
sparsity = 0.5
pattern = "2:4"
qat = true
weight_bits = 8
activation_bits = 8
rank = 16
max_parameters = 1000000
max_macs = 2000000
except_layers = ["head"]
"""
    models = load_release(_release(tmp_path, text)).models
    assert models["pruned"].declared == Declared(
        sparsity=0.5,
        pattern="2:4",
        qat=True,
        weight_bits=8,
        activation_bits=8,
        rank=16,
        max_parameters=1_000_000,
        max_macs=2_000_000,
        except_layers=("head",),
    )
    assert models["dense"].declared == Declared()


@pytest.mark.parametrize(
    ("declared", "complaint"),
    [
        ("sparsty = 0.5", r'unknown key "sparsty" in .*, line 14; did you mean "sparsity"'),
        ("qat = true\nsparsity = 50", r"line 15: sparsity = 50 must be between 0 and 1"),
        ("weight_bits = 0", r"line 14: weight_bits = 0 must be between 1 and 32"),
        ("activation_bits = 64", r"line 14: activation_bits = 64 must be between 1 and 32"),
        ("rank = 0", r"line 14: rank = 0 must be at least 1"),
        ("max_macs = -1", r"line 14: max_macs = -1 must be at least 1"),
        ('pattern = "4:2"', r"models.pruned.declared.pattern in .*, line 14: '4:2' is not known.*2:4"),
        ('qat = "yes"', r"models.pruned.declared.qat in .*, line 14: expected"),
    ],
)
def test_a_declaration_that_cannot_be_meant_is_named_with_its_line(tmp_path, declared, complaint):
    with pytest.raises(DocumentError, match=complaint):
        load_release(_release(tmp_path, declared))
