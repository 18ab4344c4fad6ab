"""Files that a device or a person hands us: tensors, lab.toml, known_hosts: a sentence or a record, nothing else."""

from __future__ import annotations

import base64
import json
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from edgedeploy import golden
from edgedeploy.errors import DocumentError, EdgedeployError, FidelityError, ModelError, UsageError
from edgedeploy.lab import inventory, ssh_login
from edgedeploy.lab.ssh_config import Hop
from edgedeploy.records.artifact import Golden

HEAD = 'format = "edgedeploy.lab/1"\n'


# --- tensors that come from a device

dtypes = st.sampled_from(["F32", "F16", "BF16", "I8", "U8", "BOOL", "I64", "F8_E4M3", "F4", "C64", "X", "", 5, None])
numbers = st.integers(-(2**70), 2**70) | st.integers(0, 16) | st.none() | st.floats() | st.text(max_size=3)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": dtypes,
        "shape": st.lists(numbers, max_size=4) | numbers,
        "data_offsets": st.lists(numbers, max_size=3) | st.tuples(st.integers(0, 8), st.integers(0, 32)) | numbers,
        "more": numbers,
    },
)
headers = st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), entries | numbers, max_size=4)


def tensor_file(header: bytes, length: int | None = None, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


@settings(deadline=None)
@given(
    st.one_of(
        st.binary(max_size=64),
        st.builds(tensor_file, st.binary(max_size=40), st.integers(0, 2**64 - 1)),
        st.builds(
            lambda header, body: tensor_file(json.dumps(header).encode(), body=body), headers, st.binary(max_size=40)
        ),
    )
)
@example(b"")
@example(struct.pack("<Q", 2**63) + b"{}")
@example(tensor_file(b"[" * 100_000))
@example(tensor_file(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'))
@example(tensor_file(b'{"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}', body=b"\0\0"))
@example(tensor_file(b'{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}', body=b"\0"))
@example(tensor_file(b'{"a":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}', body=b"\0" * 8))
def test_tensors_of_any_bytes_are_arrays_or_a_model_error(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answers.safetensors"
        path.write_bytes(data)
        try:
            found = golden.read_tensors(path, golden.FETCHED)
        except ModelError as error:
            assert len(str(error)) < 5000
        else:
            assert sum(values.nbytes for values in found.values()) <= len(data)


arrays = st.builds(
    lambda shape, kind, fill: np.full(shape, fill, kind),
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from(["float32", "float16", "int8", "int64", "bool"]),
    st.sampled_from([0, 1, float("nan"), float("inf")]),
).filter(lambda values: values is not None)


@pytest.mark.filterwarnings("ignore")
@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(["scores", "boxes", "other"]), arrays, max_size=3), st.sampled_from([None, 1e-4])
)
def test_answers_of_any_shape_are_compared_or_refused(found, max_relative):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = {"scores": np.ones((2, 3), np.float32), "boxes": np.ones((2, 1), np.float32)}
        (folder / golden.OUTPUTS).write_bytes(save(expected))
        promised = Golden(
            inputs_sha256="0" * 64,
            outputs_sha256="1" * 64,
            batch=1,
            max_relative=max_relative,
            max_noise=None if max_relative else 0.1,
        )
        same = all(
            key in found and np.array_equal(found[key], values) and found[key].dtype.kind == "f"
            for key, values in expected.items()
        )
        try:
            golden._compared(found, promised, folder, "a board")
        except (FidelityError, ModelError) as error:
            assert not same
            assert len(str(error)) < 2000
        else:
            assert same


# --- lab.toml

toml_values = st.one_of(
    st.integers(-(2**63), 2**63 - 1).map(str),
    st.sampled_from(["true", "inf", "nan", "-1", "[]", "{}", "1979-05-27", "[[1]]", '""', "0.0"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12).map(
        lambda text: json.dumps(text, ensure_ascii=True)
    ),
)
keys = st.sampled_from(
    ["transport", "host", "port", "user", "key", "jump", "known_hosts", "python", "root", "timeout_s", "settings",
     "connect_timeout_s", "lease_dir", "place", "target", "runtimes", "settings.governor", "settings.power_mode", "x"]
)  # fmt: skip
names = st.sampled_from(["pi", "local", '"a b"', '"../x"', '"-x"', '""', "pi.x", "1"])
tables = st.builds(
    lambda name, pairs: f"[devices.{name}]\n" + "".join(f"{key} = {value}\n" for key, value in pairs.items()),
    names,
    st.dictionaries(keys, toml_values, max_size=6),
)


@settings(deadline=None)
@given(st.one_of(st.lists(tables, max_size=3).map("".join), st.text(max_size=60)))
@example('[devices.pi]\ntransport = "ssh"\nhost = "h"\nkey = "~nobody-here/k"\n')
@example('[devices.pi]\ntransport = "ssh"\nhost = "h"\nport = 99999999999999\n')
@example("[devices]\n" * 2)
@example("a = " + "[" * 5000)
def test_lab_of_any_text_is_a_lab_or_a_document_error(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lab.toml"
        path.write_text(HEAD + text, encoding="utf-8")
        try:
            lab = inventory.load_lab(path)
        except DocumentError as error:
            assert str(path) in str(error)
            return
        for name, entry in lab.devices.items():
            try:
                inventory.open_transport(name, entry)  # finds the way, does not go it
            except EdgedeployError as error:
                assert str(error)


def test_device_that_is_written_twice_is_a_sentence_with_its_line(tmp_path):
    path = tmp_path / "lab.toml"
    table = '[devices.pi]\ntransport = "ssh"\nhost = "h"\n'
    path.write_text(HEAD + table + "\n" + table)
    with pytest.raises(DocumentError) as caught:
        inventory.load_lab(path)
    assert str(caught.value).startswith(f"{path} is not valid TOML: ")
    assert "line 6" in str(caught.value)
    assert "devices.pi" in str(caught.value) or "twice" in str(caught.value)


def test_unknown_device_is_a_sentence_with_the_likely_one(tmp_path):
    path = tmp_path / "lab.toml"
    path.write_text(HEAD + '[devices.orin-desk]\ntransport = "ssh"\nhost = "h"\n')
    with pytest.raises(UsageError, match="there is no device 'orin-dsk' in the lab; did you mean \"orin-desk\""):
        inventory.device(inventory.load_lab(path), "orin-dsk")


# --- known_hosts

ED25519 = base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0 " + b"\x01" * 32).decode()
fields = st.one_of(
    st.sampled_from(
        ["board", "[board]:22", "*", "!board", "@revoked", "@cert-authority", "ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256",
         "|1|", "|1|AAAA|BBBB", "|1||", "|1|a", "|1|" + "A" * 28 + "|" + "B" * 28, ED25519, "AAAA", "====", "#", "ssh-dss",
         "board,other", ","]
    ),
    st.text(max_size=10),
)  # fmt: skip
known_lines = st.lists(st.lists(fields, max_size=5).map(" ".join), max_size=5).map("\n".join)


@settings(deadline=None)
@given(st.one_of(known_lines.map(lambda text: text.encode("utf-8", "replace")), st.binary(max_size=60)))
@example(b"|1|a|b ssh-ed25519 AAAA")
@example(b"|1|" + b"A" * 28 + b"|" + b"B" * 28 + b" ssh-ed25519 AAAA")
@example(b"board ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAA")
@example(
    b"board ecdsa-sha2-nistp256 " + base64.b64encode(b"\0\0\0\x13ecdsa-sha2-nistp256\0\0\0\x08nistp999\0\0\0\x01\4")
)
def test_known_hosts_of_any_bytes_are_keys_or_a_document_error(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "known_hosts"
        path.write_bytes(data)
        hop = Hop(host="board", port=22, user="u", host_key_name="board", keys=(), known_hosts=(path,))
        try:
            known = ssh_login.known_keys(hop)
        except DocumentError as error:
            assert str(path) in str(error)
        else:
            assert all(key.get_name() for key in known)


def test_broken_line_of_another_host_does_not_hide_the_key_of_this_one(tmp_path):
    path = tmp_path / "known_hosts"
    path.write_text(f"|1|a|b ssh-ed25519 AAAA\nother ssh-ed25519 A\nboard ssh-ed25519 {ED25519}\n")
    hop = Hop(host="board", port=22, user="u", host_key_name="board", keys=(), known_hosts=(path,))
    assert [key.get_base64() for key in ssh_login.known_keys(hop)] == [ED25519]
