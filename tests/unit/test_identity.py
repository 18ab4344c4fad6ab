"""A model's identity changes with its code, and is found without running that code."""

import pytest

from edgedeploy.errors import ModelError, UsageError
from edgedeploy.prepare.identity import source_identity


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "mine_for_identity"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('this must not run')\n")
    (folder / "net.py").write_text("from .blocks import block\nimport json\ndef make(): return block()\n")
    (folder / "blocks.py").write_text("def block(): return 1\n")
    (tmp_path / "unrelated.py").write_text("x = 1\n")
    return tmp_path


def test_identity_follows_the_modules_that_are_imported_and_no_others(package):
    first = source_identity("mine_for_identity.net:make", package)
    (package / "unrelated.py").write_text("x = 2\n")
    assert source_identity("mine_for_identity.net:make", package) == first
    (package / "mine_for_identity" / "blocks.py").write_text("def block(): return 2\n")
    assert source_identity("mine_for_identity.net:make", package) != first


def test_identity_depends_on_the_factory(package):
    assert source_identity("mine_for_identity.net:make", package) != source_identity(
        "mine_for_identity.net:other", package
    )


def test_module_in_a_folder_without_init_counts(package):
    (package / "mine_for_identity" / "plain" / "deeper").mkdir(parents=True)
    (package / "mine_for_identity" / "plain" / "deeper" / "part.py").write_text("x = 1\n")
    (package / "mine_for_identity" / "net.py").write_text("from .plain.deeper import part\n")
    first = source_identity("mine_for_identity.net:make", package)
    (package / "mine_for_identity" / "plain" / "deeper" / "part.py").write_text("x = 2\n")
    assert source_identity("mine_for_identity.net:make", package) != first


def test_missing_module_and_file_are_sentences(package):
    with pytest.raises(ModelError, match=r"there is no Python module 'mine_for_identity\.nett'"):
        source_identity("mine_for_identity.nett:make", package)
    with pytest.raises(UsageError, match="does not exist"):
        source_identity("net.onnx", package)


def test_broken_module_is_a_sentence(package):
    (package / "mine_for_identity" / "blocks.py").write_text("def block(:\n")
    with pytest.raises(ModelError, match="not valid Python"):
        source_identity("mine_for_identity.net:make", package)


def test_external_data_of_an_onnx_file_counts(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"graph")
    (tmp_path / "net.onnx.data").write_bytes(b"weights")
    first = source_identity("net.onnx", tmp_path)
    (tmp_path / "net.onnx.data").write_bytes(b"weightz")
    assert source_identity("net.onnx", tmp_path) != first
