"""The verifier of bundles: what is sound is taken, and every way to forge one is refused with a sentence."""

from __future__ import annotations

import ast
import base64
import bz2
import gzip
import io
import json
import lzma
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgedeploy.evidence import check, seal

from . import bundle_forge as forge
from .bundle_forge import FILES, FOLDER, Forge, member, retyped, sha256

PROGRAM = Path(check.__file__)
MODEL = f"{FOLDER}/model.onnx"


@pytest.fixture(scope="module")
def key():
    return forge.new_key()


@pytest.fixture(scope="module")
def public(key, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("key") / "key.pub.pem"
    path.write_bytes(check.pem_of(_der(key)))
    return path


@pytest.fixture(scope="module")
def once():
    """Ask openssl once for each question: most forgeries leave the signed words alone."""
    asked = {}
    really = check._holds

    def holds(*question):
        if question not in asked:
            asked[question] = really(*question)
        return asked[question]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "_holds", holds)
        yield


def _der(key) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _refusal(path: Path, public: Path, **asked) -> str:
    with pytest.raises(check.Refused) as caught:
        check.verify(str(path), str(public), **asked)
    text = str(caught.value)
    assert text.isprintable(), "what a stranger wrote is shown so that no terminal obeys it"
    assert len(text) < 2000
    return text


def _bad_type(kind: bytes, **fields):
    """Put a member of another type in the place of the model."""

    def changed(parts: list[bytes]) -> list[bytes]:
        place = 2 + sorted(FILES).index(MODEL)
        block = retyped(check.header(MODEL, 0), type=kind, **fields)
        return [*parts[:place], block, *parts[place + 1 :]]

    return changed


def _before_model(data: bytes):
    def changed(parts: list[bytes]) -> list[bytes]:
        place = 2 + sorted(FILES).index(MODEL)
        return [*parts[:place], data, *parts[place:]]

    return changed


def _instead_of_model(data: bytes):
    def changed(parts: list[bytes]) -> list[bytes]:
        place = 2 + sorted(FILES).index(MODEL)
        return [*parts[:place], data, *parts[place + 1 :]]

    return changed


# ---------------------------------------------------------------- what is sound


def test_a_sound_bundle_is_taken_and_every_member_found(key, public, tmp_path):
    path = Forge(key).write(tmp_path)
    found = check.verify(str(path), str(public), machine="aarch64", min_sequence=7, isa=["asimd", "asimddp", "fp"])
    assert found.manifest["version"] == "1.4.0"
    assert found.key_sha256 == sha256(_der(key))
    assert set(found.places) == {*FILES, check.MANIFEST}
    data = path.read_bytes()
    for name, (offset, size_bytes, _) in found.places.items():
        if name in FILES:
            assert data[offset : offset + size_bytes] == FILES[name]


def test_other_programs_read_the_archive_as_the_plain_tar_that_it_is(key, tmp_path):
    path = Forge(key).write(tmp_path)
    with tarfile.open(path, "r:") as archive:
        members = archive.getmembers()
        assert [one.name for one in members] == [check.SIGNATURE, check.MANIFEST, *sorted(FILES)]
        assert {(one.type, one.mode, one.uid, one.gid, one.mtime) for one in members} == {(b"0", 0o644, 0, 0, 0)}
        assert archive.extractfile(MODEL).read() == FILES[MODEL]
    listed = subprocess.run(["tar", "-tf", path], capture_output=True, text=True, check=True)
    assert listed.stderr == ""
    assert listed.stdout.split() == [one.name for one in members]


def test_the_program_stands_alone_in_a_bare_python_and_says_all_by_its_exit_code(key, public, tmp_path):
    path = Forge(key).write(tmp_path)
    other = tmp_path / "other.pub.pem"
    other.write_bytes(check.pem_of(_der(forge.new_key())))

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-I", "-S", PROGRAM, *words], capture_output=True, text=True, check=False, cwd="/"
        )

    done = run(path, "--key", public, "--machine", "aarch64", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["verified"], told["version"], told["cells"][0]["sha256"]) == (True, "1.4.0", sha256(FILES[MODEL]))
    assert "latency p50 -31.20 %" in run(path, "--key", public).stdout
    done = run(path, "--key", other, "--json")
    assert (done.returncode, json.loads(done.stdout)["outcome"]) == (1, "refused")
    assert run(path, "--key", tmp_path / "nothing.pem").returncode == 2
    assert run(path).returncode == 2
    done = run(path, "--key", public, "--openssl", "no-such-program")
    assert done.returncode == 3
    assert "install OpenSSL" in done.stderr


def test_the_program_parses_as_python_3_8_and_imports_the_standard_library_only():
    tree = ast.parse(PROGRAM.read_text(), feature_version=(3, 8))
    imported = {
        (node.module or "" if isinstance(node, ast.ImportFrom) else alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported <= set(sys.stdlib_module_names)


# ---------------------------------------------------------------- changed bytes, too few, too many


def test_no_byte_of_a_bundle_can_be_changed(key, public, tmp_path, once):
    sound = Forge(key).bytes()
    path = tmp_path / "changed.edb.tar"
    start, payload = sound.index(b'"payload":"'), len(sound.split(b'"payload":"')[1].split(b'"')[0])
    # Each change of what was signed asks openssl anew: there, one byte in so many is changed.
    inside = range(start, start + payload)
    for place in [at for at in range(0, len(sound), 11) if at not in inside] + list(inside[::421]):
        for bit in (0x01, 0x20):
            data = bytearray(sound)
            data[place] ^= bit
            path.write_bytes(data)
            with pytest.raises(check.Complaint):
                check.verify(str(path), str(public))


def test_a_bundle_that_ends_early_anywhere_is_refused(key, public, tmp_path, once):
    sound = Forge(key).bytes()
    path = tmp_path / "short.edb.tar"
    for end in sorted({end + more for end in range(0, len(sound), 512) for more in (0, 1, 511)} - {len(sound)}):
        if end < len(sound):
            path.write_bytes(sound[:end])
            text = _refusal(path, public)
            assert "truncated" in text or "missing" in text, (end, text)


@pytest.mark.parametrize(
    "tail", [b"\0", bytes(512), b"x" * 512, gzip.compress(b"more")], ids=["byte", "block", "words", "gzip"]
)
def test_nothing_may_follow_the_end(tail, key, public, tmp_path, once):
    path = Forge(key, changed=lambda parts: [*parts, tail]).write(tmp_path)
    assert "follows the end" in _refusal(path, public)


def test_a_second_archive_behind_the_first_is_refused(key, public, tmp_path, once):
    path = Forge(key, changed=lambda parts: [*parts, *parts[1:]]).write(tmp_path)
    assert "follows the end" in _refusal(path, public)


def test_words_in_the_padding_are_refused(key, public, tmp_path, once):
    def changed(parts: list[bytes]) -> list[bytes]:
        place = 2 + sorted(FILES).index("card/LICENSE")
        return [*parts[:place], parts[place][:-4] + b"hide", *parts[place + 1 :]]

    assert "padding behind card/LICENSE" in _refusal(Forge(key, changed=changed).write(tmp_path), public)


# ---------------------------------------------------------------- members


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (lambda parts: [*parts[:3], *parts[4:]], "is missing, or not in its place"),
        (lambda parts: [*parts[:-2], parts[-1]], "sessions/onnxruntime.py is missing"),
        (lambda parts: [*parts[:4], parts[3], *parts[4:]], "is there twice"),
        (lambda parts: [*parts[:3], parts[4], parts[3], *parts[5:]], "not in its place"),
        (_before_model(member("more.txt", b"more")), "not what the manifest lists"),
        (lambda parts: [*parts[:-1], member("zzz.txt", b"more"), parts[-1]], "goes on behind its last member"),
        (_instead_of_model(member(MODEL, b"another model")), "and its manifest says 1280"),
        (_instead_of_model(member(MODEL, bytes(1280))), "its digest is not the one that was signed"),
        (lambda parts: parts[1:], "is not signed"),
        (lambda parts: [parts[1], parts[0], *parts[2:]], "is not signed"),
        (lambda parts: [parts[0], *parts[2:]], "manifest.json is missing|not what the manifest lists"),
        (lambda parts: [parts[0], parts[-1]], "manifest.json is missing"),
        (lambda parts: [bytes(512), *parts], "signature.json is missing"),
        (lambda parts: [b"".join(parts)[::-1]], "signature.json"),
    ],
)
def test_missing_extra_double_swapped_and_replaced_members_are_refused(changed, says, key, public, tmp_path, once):
    import re

    text = _refusal(Forge(key, changed=changed).write(tmp_path), public)
    assert re.search(says, text), text


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (b"1", "hard link"),
        (b"2", "symbolic link"),
        (b"3", "character device"),
        (b"4", "block device"),
        (b"5", "directory"),
        (b"6", "FIFO"),
        (b"7", "contiguous"),
        (b"S", "sparse"),
        (b"L", "long name"),
        (b"K", "long link"),
        (b"x", "extended header"),
        (b"g", "extended header"),
        (b"V", "unknown kind"),
        (b"\0", "before POSIX"),
    ],
)
def test_only_plain_files_are_taken(kind, says, key, public, tmp_path, once):
    path = Forge(key, changed=_bad_type(kind, link=b"/etc/passwd")).write(tmp_path)
    assert says in _refusal(path, public)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_in_the_way_of_other_programs_are_refused(form, key, public, tmp_path, once):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        archive.addfile(tarfile.TarInfo("artifacts/" + "x" * 300))
    path = Forge(key, changed=_before_model(buffer.getvalue()[:-10240] or buffer.getvalue())).write(tmp_path)
    text = _refusal(path, public)
    assert "extended header" in text or "long name" in text


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": b"/etc/cron.d/x"}, "is absolute"),
        ({"name": b"../../x"}, 'with ".."'),
        ({"name": b"a/../../x"}, 'with ".."'),
        ({"name": b"x", "prefix": b"../.."}, 'with ".."'),
        ({"name": b"./" + MODEL.encode()}, "characters or empty parts"),
        ({"name": b"artifacts//x"}, "characters or empty parts"),
        ({"name": b".ssh/authorized_keys"}, "characters or empty parts"),
        ({"name": b"a\nb"}, "characters or empty parts"),
        ({"name": b"a\x1b[2Jb"}, "characters or empty parts"),
        ({"name": "mod\u00e8le".encode()}, "characters or empty parts"),
        ({"name": "mode\u0300le".encode()}, "characters or empty parts"),
        ({"name": b"-rf"}, "characters or empty parts"),
        ({"name": b"C:\\x"}, "characters or empty parts"),
        ({"name": MODEL.encode() + b"\0../../x"}, "hidden behind the name"),
        ({"name": MODEL.upper().encode()}, "not what the manifest lists"),
        ({"name": b"x", "prefix": b"y" * 155}, "longer than 100"),
        ({"mode": b"0004755\0"}, "owner, mode or time"),
        ({"uid": b"0001750\0"}, "owner, mode or time"),
        ({"uname": b"root"}, "owner, mode or time"),
        ({"mtime": b"14707776240\0"}, "owner, mode or time"),
        ({"link": b"/etc/passwd"}, "owner, mode or time"),
        ({"size": b"77777777777\0"}, "more than the file goes on for"),
        ({"size": b"\x80" + bytes(10) + b"\x05"}, "its manifest says"),
        ({"size": b"-0000000001\0"}, "its manifest says"),
        ({"size": b"00000002401\0"}, "its manifest says"),
    ],
)
def test_headers_that_say_something_else_are_refused(fields, says, key, public, tmp_path, once):
    block = retyped(check.header(MODEL, len(FILES[MODEL])), **fields)
    path = Forge(key, changed=_instead_of_model(member(MODEL, FILES[MODEL], block))).write(tmp_path)
    assert says in _refusal(path, public)


def test_a_header_with_a_wrong_checksum_is_refused(key, public, tmp_path, once):
    block = bytearray(check.header(MODEL, len(FILES[MODEL])))
    block[148] ^= 1
    path = Forge(key, changed=_instead_of_model(member(MODEL, FILES[MODEL], bytes(block)))).write(tmp_path)
    assert "is damaged" in _refusal(path, public)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"card/license": b"x"}, "same on some file systems"),
        ({"MANIFEST.json": b"x"}, "same on some file systems"),
        ({"card": b"x"}, "a folder that is a file"),
        ({f"many/{number:04d}": b"" for number in range(check.MOST_MEMBERS)}, "are the most"),
    ],
    ids=["case", "manifest", "folder", "many"],
)
def test_even_a_signed_bundle_may_not_hold_what_no_file_system_can(files, says, key, public, tmp_path):
    assert says in _refusal(Forge(key, files={**FILES, **files}).write(tmp_path), public)


@pytest.mark.parametrize(
    ("size", "says"),
    [(check.MOST_MEMBER_BYTES + 1, "are the most"), (-1, "are the most"), (True, "no proper size"), ("9", "no proper")],
)
def test_even_a_signed_manifest_may_not_say_impossible_sizes(size, says, key, public, tmp_path):
    files = forge.manifest(FILES)["files"]
    files[MODEL]["size_bytes"] = size
    assert says in _refusal(Forge(key, manifest={"files": files}).write(tmp_path), public)


def test_a_bundle_that_would_fill_any_disk_is_refused_before_it_is_read(key, public, tmp_path):
    files = {
        f"zeros/{number}": {"sha256": "0" * 64, "size_bytes": check.MOST_MEMBER_BYTES} for number in range(9)
    } | forge.manifest(FILES)["files"]
    assert "unpacks to" in _refusal(Forge(key, manifest={"files": files}).write(tmp_path), public)


@pytest.mark.parametrize("squeezed", [gzip.compress, bz2.compress, lzma.compress], ids=["gzip", "bzip2", "xz"])
def test_compressed_bundles_are_refused(squeezed, key, public, tmp_path):
    path = tmp_path / "squeezed.edb.tar"
    path.write_bytes(squeezed(Forge(key).bytes()).ljust(512, b"\0"))
    assert "is compressed" in _refusal(path, public)


# ---------------------------------------------------------------- signature and statement


def test_another_signer_is_refused_even_with_the_right_hint(key, public, tmp_path):
    other = forge.new_key()
    assert "signed with another key" in _refusal(Forge(other).write(tmp_path), public)
    hints = [sha256(check.pem_of(_der(one))).encode() for one in (other, key)]
    forged = Forge(other, signature=lambda data: data.replace(*hints))
    assert "not that of this key" in _refusal(forged.write(tmp_path), public)


def _document(change):
    def changed(data: bytes) -> bytes:
        document = json.loads(data)
        change(document)
        return json.dumps(document, separators=(",", ":")).encode()

    return changed


def _resigned(key, change):
    """Return a signature over a changed statement, made with the right key."""

    def changed(data: bytes) -> bytes:
        from cryptography.hazmat.primitives import hashes

        document = json.loads(data)
        statement = json.loads(base64.b64decode(document["dsseEnvelope"]["payload"]))
        payload = change(statement)
        payload = payload if isinstance(payload, bytes) else json.dumps(statement).encode()
        document["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
        signed = key.sign(check.pae(payload), ec.ECDSA(hashes.SHA256()))
        document["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(signed).decode()
        return json.dumps(document, separators=(",", ":")).encode()

    return changed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["dsseEnvelope"].update(payloadType="text/plain"), "not one signature"),
        (lambda d: d["dsseEnvelope"].update(signatures=[]), "not one signature"),
        (lambda d: d["dsseEnvelope"]["signatures"].append(d["dsseEnvelope"]["signatures"][0]), "not one signature"),
        (lambda d: d["dsseEnvelope"]["signatures"][0].update(sig=""), "none that a key on P-256"),
        (lambda d: d["dsseEnvelope"]["signatures"][0].update(sig="MAYCAQACAQA="), "none that a key on P-256"),
        (lambda d: d["dsseEnvelope"]["signatures"][0].update(sig="MAYCAQECAQE="), "not that of this key"),
        (lambda d: d["dsseEnvelope"]["signatures"][0].update(sig="%"), "does not decode"),
        (lambda d: d["dsseEnvelope"]["signatures"][0].update(keyid="other"), "a key that nobody asked for"),
        (lambda d: d["dsseEnvelope"]["signatures"][0].update(more=1), "parts"),
        (lambda d: d["dsseEnvelope"].update(payload=d["dsseEnvelope"]["payload"][:-8]), "not that of this key"),
        (lambda d: d["dsseEnvelope"].update(payload=7), "does not decode"),
        (lambda d: d["verificationMaterial"].update(publicKey={}), "parts"),
        (lambda d: d.update(verificationMaterial=[]), "parts"),
        (lambda d: d.update(more=1), "parts"),
        (lambda d: d.clear(), "parts"),
    ],
)
def test_a_signature_that_is_not_what_it_should_be_is_refused(change, says, key, public, tmp_path):
    assert says in _refusal(Forge(key, signature=_document(change)).write(tmp_path), public)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(mediaType="application/vnd.dev.sigstore.bundle.v0.4+json"),
        lambda d: d["verificationMaterial"].update(tlogEntries=[{}]),
        lambda d: d["verificationMaterial"].update(certificate={"rawBytes": ""}),
    ],
)
def test_signatures_that_need_more_than_a_key_are_not_checked(change, key, public, tmp_path):
    with pytest.raises(check.NotChecked):
        check.verify(str(Forge(key, signature=_document(change)).write(tmp_path)), str(public))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.update(predicateType="https://slsa.dev/provenance/v1"), "something else than files"),
        (lambda s: s.update(_type="x"), "something else than files"),
        (lambda s: s.update(subject=[]), "not one about files"),
        (lambda s: s["subject"][0].update(name="other"), "disagree about the name"),
        (lambda s: s["subject"][0]["digest"].update(sha256="0" * 64), "contradicts itself"),
        (lambda s: s["predicate"]["serialization"].update(method="shards"), "in another way"),
        (lambda s: s["predicate"]["serialization"].update(allow_symlinks=True), "in another way"),
        (lambda s: s["predicate"]["resources"].append(s["predicate"]["resources"][0]), "twice"),
        (lambda s: s["predicate"]["resources"][0].update(name="../x"), "names a file in a way"),
        (lambda s: s["predicate"]["resources"][0].update(algorithm="md5"), "names a file in a way"),
        (lambda s: s.update(predicate=None), "not one about files"),
        (lambda s: b"[" * 100_000, "cannot be read"),
        (lambda s: b'{"a":1,"a":2}', "twice"),
        (lambda s: b"\xff", "cannot be read"),
    ],
)
def test_what_the_right_key_signed_for_another_purpose_is_refused(change, says, key, public, tmp_path):
    assert says in _refusal(Forge(key, signature=_resigned(key, change)).write(tmp_path), public)


def test_manifest_and_signature_that_disagree_are_refused(key, public, tmp_path):
    cases = {
        MODEL: Forge(key, digests={MODEL: "0" * 64}),
        "card/LICENSE": Forge(key, digests={"card/LICENSE": None}),
        "zzz": Forge(key, digests={"zzz": "0" * 64}),
    }
    for name, forged in cases.items():
        assert f"disagree about {name}" in _refusal(forged.write(tmp_path), public)
    assert "is not the one that was signed" in _refusal(
        Forge(key, digests={check.MANIFEST: "0" * 64}).write(tmp_path), public
    )
    assert "it is no bundle" in _refusal(Forge(key, digests={check.MANIFEST: None}).write(tmp_path), public)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b'{"a":' * 1000 + b"1" + b"}" * 1000,
        b"1" * 100_000,
        b"1." + b"1" * 1000,
        b'{"mediaType":1,"mediaType":2}',
        b"NaN",
        b"\xef\xbb\xbf{}",
        b"\xff\xfe",
        b"",
        b"[" + b"[]," * 1000 + b"[]]",
        b'"' + b'\\"' * 1_000_000,
        b" " * (check.MOST_JSON_BYTES + 1),
    ],
    ids=[
        "deep",
        "deep objects",
        "digits",
        "fraction",
        "twins",
        "NaN",
        "BOM",
        "not UTF-8",
        "empty",
        "wide",
        "escapes",
        "large",
    ],
)
def test_documents_that_were_written_to_hurt_are_refused_before_anything_is_believed(data, key, public, tmp_path):
    import time

    path = Forge(key, signature=lambda _: data).write(tmp_path)
    started_s = time.process_time()
    _refusal(path, public)
    # A regular expression or a parser that goes wrong here takes minutes.
    assert time.process_time() - started_s < 10


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": "edgedeploy.release/1"}, "another kind"),
        ({"format": 1}, "names no format"),
        ({"sequence": "7"}, "no proper sequence"),
        ({"sequence": True}, "no proper sequence"),
        ({"files": []}, "no proper files"),
        ({"cells": []}, "lists no cells"),
        ({"cells": [7]}, "says not what it needs"),
        ({"cells": [forge.cell(requires={"machine": 7})]}, "nothing proper"),
        ({"cells": [forge.cell(requires={"isa": "asimd"})]}, "nothing proper"),
        ({"cells": [forge.cell(artifact="../x")]}, "not in the bundle"),
        ({"cells": [forge.cell(session="")]}, "not in the bundle"),
        ({"cells": [forge.cell(golden_inputs=7)]}, "not in the bundle"),
    ],
)
def test_even_a_signed_manifest_must_make_sense(changes, says, key, public, tmp_path):
    manifest = {**forge.manifest(FILES), **changes}
    forged = Forge(key, raw_manifest=json.dumps(manifest).encode())
    assert says in _refusal(forged.write(tmp_path), public)


# ---------------------------------------------------------------- not for this device, not this key, not here


def test_other_machines_features_cells_and_older_releases_are_refused(key, public, tmp_path, once):
    path = Forge(key).write(tmp_path)
    assert "is for aarch64, not for x86_64" in _refusal(path, public, machine="x86_64")
    assert "needs a processor with asimddp" in _refusal(path, public, machine="aarch64", isa=["asimd"])
    assert "older than allowed" in _refusal(path, public, min_sequence=8)
    with pytest.raises(check.Misused, match="no cell"):
        check.verify(str(path), str(public), cell="other")


def test_cells_for_more_features_come_first(key, public, tmp_path):
    cells = [
        forge.cell("plain", requires={"machine": "aarch64"}),
        forge.cell("i8mm", requires={"machine": "aarch64", "isa": ["asimd", "i8mm"]}),
        forge.cell("any", requires={"machine": "aarch64", "isa": ["asimd"], "any_isa": ["asimddp", "sve"]}),
    ]
    found = check.verify(str(Forge(key, manifest={"cells": cells}).write(tmp_path)), str(public))

    def names(*isa: str) -> list[str]:
        return [one["cell"] for one in check.fitting(found.manifest, machine="aarch64", isa=isa)]

    assert names("asimd", "i8mm", "sve") == ["i8mm", "any", "plain"]
    assert names("asimd") == ["plain"]


def test_a_newer_format_is_not_checked(key, public, tmp_path):
    path = Forge(key, manifest={"format": "edgedeploy.bundle/2"}).write(tmp_path)
    with pytest.raises(check.NotChecked, match="written by a newer edgedeploy"):
        check.verify(str(path), str(public))


def _pem(key) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _compressed(key) -> bytes:
    point = key.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)
    return check.pem_of(bytes.fromhex("3039301306072a8648ce3d020106082a8648ce3d030107032200") + point)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (lambda key: _pem(rsa.generate_private_key(65537, 2048)), "an RSA key"),
        (lambda key: _pem(ec.generate_private_key(ec.SECP384R1())), "another curve"),
        (lambda key: _pem(ed25519.Ed25519PrivateKey.generate()), "an Ed25519 key"),
        (_compressed, "compressed point"),
        (
            lambda key: key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
            "a private key",
        ),
        (lambda key: b"-----BEGIN CERTIFICATE-----\n", "a certificate"),
        (lambda key: b"ssh-ed25519 AAAA", "no public key in PEM form"),
        (lambda key: _pem(key).replace(b"M", b"!"), "no public key in PEM form"),
        (lambda key: _pem(key)[:100] + b"\n-----END PUBLIC KEY-----", "damaged|unknown kind|another curve|compressed"),
        (lambda key: bytes(100_000), "too large"),
        (lambda key: b"", "no public key in PEM form"),
    ],
    ids=["rsa", "p384", "ed25519", "compressed", "private", "certificate", "ssh", "letters", "short", "large", "empty"],
)
def test_keys_of_another_kind_are_named(data, says, key, tmp_path):
    path = tmp_path / "key.pem"
    path.write_bytes(data(key))
    with pytest.raises(check.Misused, match=says):
        check.verify(str(tmp_path / "nothing"), str(path))


def test_a_key_with_words_around_it_is_taken_as_openssl_does(key, tmp_path):
    path = tmp_path / "key.pem"
    path.write_bytes(b"of the release team\n" + _pem(key).replace(b"\n", b"\r\n"))
    assert check.public_key(str(path)) == _der(key)


@pytest.mark.parametrize("subject", ["nothing", ".", "/dev/zero"])
def test_what_is_no_file_is_a_mistake_and_no_evidence(subject, public, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(check.Misused):
        check.verify(subject, str(public))


@pytest.mark.parametrize("script", ["echo broken; exit 1", "exit 0", "echo Verified OK; exit 1", "kill -9 $$"])
def test_an_openssl_that_does_not_answer_as_it_should_proves_nothing(script, key, public, tmp_path):
    program = tmp_path / "openssl"
    program.write_text(f"#!/bin/sh\ncat >/dev/null\n{script}\n")
    program.chmod(0o755)
    with pytest.raises(check.NotChecked, match="could not check the signature"):
        check.verify(str(Forge(key).write(tmp_path)), str(public), openssl=str(program))


@pytest.mark.parametrize(("said", "is_taken"), [("Verified OK", True), ("Verification Failure", False)])
def test_both_versions_of_openssl_are_understood(said, is_taken, key, public, tmp_path):
    """1.1.1 writes "Failure", 3 writes "failure"."""
    program = tmp_path / "openssl"
    program.write_text(f"#!/bin/sh\ncat >/dev/null\necho '{said}'\n{'exit 0' if is_taken else 'exit 1'}\n")
    program.chmod(0o755)
    path = Forge(key).write(tmp_path)
    if is_taken:
        check.verify(str(path), str(public), openssl=str(program))
    else:
        with pytest.raises(check.Refused, match="not that of this key"):
            check.verify(str(path), str(public), openssl=str(program))


# ---------------------------------------------------------------- unpacking


def test_a_cell_is_unpacked_whole_and_nothing_else(key, public, tmp_path, capsys):
    path, folder = Forge(key).write(tmp_path), tmp_path / "out"
    words = [str(path), "--key", str(public), "--cell", "int8", "--extract", str(folder)]
    assert check.main(words) == 0
    found = {str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file()}
    assert found == {
        check.MANIFEST,
        "sessions/onnxruntime.py",
        *(f"{FOLDER}/{name}" for name in ("golden-inputs.safetensors", "golden-outputs.safetensors", "manifest.json")),
        MODEL,
    }
    assert (folder / MODEL).read_bytes() == FILES[MODEL]
    assert check.main(words) == 2, "a folder that exists is not written into"
    assert "exists" in capsys.readouterr().err


def test_all_members_are_unpacked_without_a_cell(key, public, tmp_path):
    path, folder = Forge(key).write(tmp_path), tmp_path / "out"
    assert check.main([str(path), "--key", str(public), "--extract", str(folder), "--json"]) == 0
    assert {str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file()} == {*FILES, check.MANIFEST}


def test_a_file_that_changes_after_it_was_verified_leaves_nothing_behind(key, public, tmp_path):
    path = Forge(key).write(tmp_path)
    found = check.verify(str(path), str(public))
    data = bytearray(path.read_bytes())
    data[found.places[MODEL][0]] ^= 1
    path.write_bytes(data)
    with pytest.raises(check.Refused, match="changed while it was unpacked"):
        check.extract(found, [MODEL], str(tmp_path / "out"))
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    path.write_bytes(data[:2000])
    with pytest.raises(check.Refused):
        check.extract(found, [MODEL], str(tmp_path / "out"))
    with pytest.raises(check.Refused):
        check.member(found, "card/LICENSE")


# ---------------------------------------------------------------- anything at all


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    edits=st.lists(
        st.tuples(
            st.sampled_from(["flip", "cut", "copy", "zero", "number"]), st.integers(0, 2**20), st.integers(0, 600)
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_any_bytes_are_a_sound_bundle_or_a_complaint(seed, edits, key, public, tmp_path, once):
    sound = Forge(key).bytes()
    data, chance = bytearray(sound), random.Random(seed)
    for kind, place, length in edits:
        at = place % max(1, len(data))
        if kind == "flip" and data:
            data[at] = chance.randrange(256)
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "copy":
            data[at:at] = data[place % (at + 1) : place % (at + 1) + length]
        elif kind == "zero":
            data[at : at + length] = bytes(len(data[at : at + length]))
        else:
            data[at : at + 11] = b"%011o" % chance.randrange(2**33)
    path = tmp_path / "any.edb.tar"
    path.write_bytes(data)
    try:
        check.verify(str(path), str(public))
    except check.Complaint:
        assert data != sound
    else:
        assert data == sound


# ---------------------------------------------------------------- OpenSSF's model-signing


def test_model_signing_takes_our_signature_and_we_take_its(key, public, tmp_path):
    verifying = pytest.importorskip("model_signing.verifying", reason="pip install model-signing shows it")
    from model_signing import signing

    folder, private = tmp_path / "demo", tmp_path / "key.pem"
    path = Forge(key).write(tmp_path)
    with tarfile.open(path, "r:") as archive:
        archive.extractall(folder, filter="data")
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=public)
    verifier.verify(folder, folder / check.SIGNATURE)
    (folder / MODEL).write_bytes(b"another")
    with pytest.raises(ValueError, match=r"model\.onnx"):
        verifying.Config().use_elliptic_key_verifier(public_key=public).verify(folder, folder / check.SIGNATURE)
    (folder / MODEL).write_bytes(FILES[MODEL])
    (folder / check.SIGNATURE).unlink()
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    signing.Config().use_elliptic_key_signer(private_key=private).sign(folder, tmp_path / "theirs.json")
    theirs = (tmp_path / "theirs.json").read_bytes()
    check.verify(str(Forge(key, signature=lambda _: theirs).write(tmp_path)), str(public))


def test_signing_twice_gives_the_same_signature(key):
    digests = {"a/b": "0" * 64, "a-b": "1" * 64}
    assert seal.signature("demo", digests, key) == seal.signature("demo", dict(reversed(digests.items())), key)
