"""Writes are whole or not at all, and user directories follow the environment."""

import os
from pathlib import Path

import pytest

from edgedeploy import storage


def test_failed_write_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")
    with pytest.raises(OSError, match="disk"), storage.atomic_path(path) as part:
        part.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        storage.write_atomic(tmp_path / "x" / "y", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "x" / "y").read_bytes() == b"new"
    assert (tmp_path / "x" / "y").stat().st_mode & 0o777 == 0o640


def test_cache_directory_precedence(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("EDGEDEPLOY_CACHE_DIR", raising=False)
    assert storage.cache_dir() == tmp_path / "edgedeploy"
    monkeypatch.setenv("EDGEDEPLOY_CACHE_DIR", "/somewhere")
    assert storage.cache_dir() == Path("/somewhere")
    monkeypatch.delenv("EDGEDEPLOY_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the XDG specification says to ignore it
    assert storage.cache_dir() == Path.home() / ".cache" / "edgedeploy"
