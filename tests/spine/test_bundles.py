"""Bundles of real artifacts: what is packed, that it is always the same, that it verifies and answers, and refusals."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tarfile
from pathlib import Path

import msgspec
import pytest

import edgedeploy.cli
from edgedeploy import pipeline
from edgedeploy.documents import read_json, write_json
from edgedeploy.errors import BundleRefused, DocumentError, UsageError
from edgedeploy.evidence import check, opening, seal
from edgedeploy.evidence.gather import SBOM, PackRequest
from edgedeploy.evidence.pack import pack, write_archive
from edgedeploy.judge.gate import judge_gate
from edgedeploy.records.bundle import FORMAT, Bundle, BundledFile
from edgedeploy.records.run import ArtifactReference
from edgedeploy.records.verdict import Policy, Verdict
from edgedeploy.results import Results
from edgedeploy.storage import sha256_bytes

from ..unit.render_samples import MARGINS, make_run

RELEASE = """\
format = "edgedeploy.release/1"
name = "tiny"

[models.tiny]
source = "tiny.onnx"

[[cells]]
name = "shipped"
model = "tiny"
target = "host"
backend = "onnxruntime"
precision = "fp32"

[[cells]]
name = "candidate"
model = "tiny"
target = "host"
backend = "onnxruntime"
precision = "fp32"

[gate]
baseline = "shipped"
[gate.margins]
latency_p50 = "+5%"
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A release whose two artifacts are really built, with runs that were made up so that nothing need be timed."""
    onnx = pytest.importorskip("onnx", reason="the host half needs onnx: pip install 'edgedeploy[onnxruntime]'")
    pytest.importorskip("onnxruntime", reason="golden answers need a runtime: pip install 'edgedeploy[onnxruntime]'")
    pytest.importorskip("cyclonedx", reason="pip install 'edgedeploy[evidence]'")
    folder = tmp_path_factory.mktemp("site")
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("Mul", ["image", "image"], ["scores"], name="square")],
        "tiny",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["batch", 4])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "tiny.onnx")
    (folder / "edgedeploy.toml").write_text(RELEASE)
    (folder / "MODEL_CARD.md").write_text("# Squares\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEDEPLOY_CACHE_DIR", str(folder / "cache"))
        patch.chdir(folder)
        built = {
            side: pipeline.compile("tiny.onnx", options={"threads": threads}, name="tiny")
            for side, threads in (("baseline", 1), ("candidate", 2))
        }
        store, runs = Results(Path("bench_results")), {}
        for side, one in built.items():
            artifact = one.artifact
            run = make_run(side, name={"baseline": "shipped", "candidate": "candidate"}[side])
            # A candidate as good as its baseline, and faster.
            run = make_run(side, name=run.cell, p50_s=0.0042 if side == "baseline" else 0.003)
            facts = msgspec.structs.replace(run.facts, machine=platform.machine())
            reference = ArtifactReference(
                name=artifact.name,
                sha256=artifact.sha256,
                size_bytes=artifact.size_bytes,
                key=artifact.key,
                model="tiny",
                target=artifact.recipe.target,
                backend="onnxruntime",
                precision="fp32",
                options=artifact.recipe.options,
            )
            runs[side] = msgspec.structs.replace(run, artifact=reference, facts=facts, runtime="onnxruntime 1.23.2")
        files = {side: store.save_run(run) for side, run in runs.items()}
        policy = Policy(margins={"latency_p50": MARGINS["latency_p50"]})
        verdict = judge_gate("tiny", [(runs["baseline"], runs["candidate"])], policy, judged_utc="2026-11-22T09:20:00Z")
        assert verdict.decision == "PASS"
        cells = tuple(
            msgspec.structs.replace(cell, baseline_run=str(files["baseline"]), candidate_run=str(files["candidate"]))
            for cell in verdict.cells
        )
        write_json(Path("bench_results/reports/verdict.json"), msgspec.structs.replace(verdict, cells=cells))
        seal.new_key(Path("key.pem"))
        yield folder


@pytest.fixture
def here(site, monkeypatch) -> Path:
    monkeypatch.setenv("EDGEDEPLOY_CACHE_DIR", str(site / "cache"))
    monkeypatch.chdir(site)
    return site


@pytest.fixture(scope="module")
def packed(site) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEDEPLOY_CACHE_DIR", str(site / "cache"))
        patch.chdir(site)
        out = Path("tiny.edb.tar")
        pack(
            PackRequest(subject=Path("edgedeploy.toml"), version="1.4.0", sequence=7),
            out,
            seal.load_key(Path("key.pem")),
        )
    return site / out


def _cli(*arguments: str | Path) -> int:
    return edgedeploy.cli.run([str(one) for one in arguments])


def _members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path, "r:") as archive:
        return {one.name: archive.extractfile(one).read() for one in archive.getmembers()}


def _signed(members: dict[str, bytes], folder: Path, **changes) -> Path:
    """Write changed members as a bundle that is in itself right, and signed by the right key."""
    document = json.loads(members.pop(check.MANIFEST))
    members.pop(check.SIGNATURE, None)
    document["files"] = {
        name: {"sha256": sha256_bytes(data), "size_bytes": len(data)} for name, data in sorted(members.items())
    }
    document.update(changes)
    manifest = json.dumps(document).encode()
    digests = {name: sha256_bytes(data) for name, data in {**members, check.MANIFEST: manifest}.items()}
    signature = seal.signature(document["name"], digests, seal.load_key(Path("key.pem")))
    path = folder / "changed.edb.tar"
    write_archive(path, {check.SIGNATURE: signature, check.MANIFEST: manifest, **dict(sorted(members.items()))}, {})
    return path


# ---------------------------------------------------------------- what is packed


def test_a_bundle_holds_what_its_verdict_rests_on(here, packed):
    members = _members(packed)
    bundle = msgspec.json.decode(members[check.MANIFEST], type=Bundle)
    (cell,) = bundle.cells
    assert (bundle.name, bundle.version, bundle.sequence, bundle.decision) == ("tiny", "1.4.0", 7, "PASS")
    assert bundle.created == "2026-11-22T09:20:00Z"
    assert (cell.cell, cell.decision, cell.requires.machine) == ("candidate", "PASS", platform.machine())
    assert cell.requires.runtime.versions == ">=1.23.2,<2"
    assert sha256_bytes(members[cell.artifact]) == cell.sha256
    assert "latency p50 -" in cell.summary
    assert list(members) == [check.SIGNATURE, check.MANIFEST, *sorted(bundle.files)]
    assert {
        name: BundledFile(sha256=sha256_bytes(data), size_bytes=len(data)) for name, data in members.items()
    }.items() >= (bundle.files.items())
    assert len([name for name in members if name.startswith("evidence/runs/")]) == 2
    assert members["evidence/verdict.json"] == Path("bench_results/reports/verdict.json").read_bytes()
    assert members["evidence/release.toml"] == RELEASE.encode()
    assert members["card/MODEL_CARD.md"] == b"# Squares\n"
    lock = json.loads(members["evidence/lock.json"])
    assert set(lock["artifacts"][0]["toolchain"]) >= {"edgedeploy", "onnx", "onnxruntime", "onnxslim"}
    said = " ".join(bundle.absent)
    assert "no licence" in said
    assert "model card" not in said
    assert "baseline shipped" in said


def test_a_verdict_can_be_named_and_its_papers_too(here, tmp_path):
    licence = tmp_path / "terms.txt"
    licence.write_text("SPDX-License-Identifier: Apache-2.0\n")
    out = tmp_path / "out.edb.tar"
    words = ["bundle", "bench_results/reports/verdict.json", "--version", "2", "-o", out, "--license", licence, "-q"]
    assert _cli(*words, "--with-baselines") == 0
    members = _members(out)
    assert check.SIGNATURE not in members
    bundle = msgspec.json.decode(members[check.MANIFEST], type=Bundle)
    assert [(cell.cell, cell.role, cell.decision) for cell in bundle.cells] == [
        ("candidate", "candidate", "PASS"),
        ("shipped", "baseline", None),
    ]
    # One file with two manifests: both sides differ by their sessions' options alone.
    assert len({cell.manifest for cell in bundle.cells}) == 2
    assert members["card/LICENSE"] == licence.read_bytes()
    assert any("no release file" in one for one in bundle.absent)
    models = [one for one in json.loads(members[SBOM])["components"] if one["type"] == "machine-learning-model"]
    assert [one["licenses"][0]["license"]["id"] for one in models] == ["Apache-2.0"] * 2


def test_the_bill_of_materials_has_intervals_hashes_and_tools(here, packed):
    document = json.loads(_members(packed)[SBOM])
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    assert document["metadata"]["timestamp"] == "2026-11-22T09:20:00+00:00"
    (model,) = [one for one in document["components"] if one["type"] == "machine-learning-model"]
    assert model["hashes"][0]["alg"] == "SHA-256"
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    change = next(one for one in metrics if one["type"] == "latency_p50 worsening (relative)")
    interval = change["confidenceInterval"]
    assert float(interval["lowerBound"]) <= float(change["value"]) <= float(interval["upperBound"]) < 0
    made_with = {one["name"] for one in document["formulation"][0]["components"]}
    assert made_with >= {"edgedeploy", "onnx"}


def test_the_bill_of_materials_keeps_to_its_schema(here, packed):
    pytest.importorskip("jsonschema", reason="pip install jsonschema reads schemas")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = _members(packed)[SBOM].decode()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    broken = text.replace('"confidenceInterval"', '"confidence"', 1)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(broken) is not None


def test_two_processes_that_differ_in_everything_else_write_the_same_bytes(here, tmp_path):
    digests = set()
    for number, (zone, locale, seed, mask) in enumerate(
        [("UTC", "C", "1", 0o022), ("Asia/Kolkata", "tr_TR.UTF-8", "4711", 0o077)]
    ):
        out = tmp_path / f"{number}.edb.tar"
        words = ["bundle", "edgedeploy.toml", "--version", "1.4.0", "--sequence", "7", "--sign", "key.pem", "-o", out]
        done = subprocess.run(
            [sys.executable, "-m", "edgedeploy", *words, "-q"],
            env={**os.environ, "TZ": zone, "LC_ALL": locale, "PYTHONHASHSEED": seed},
            umask=mask,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        digests.add(sha256_bytes(out.read_bytes()))
    assert len(digests) == 1


def test_other_words_make_another_bundle(here, packed, tmp_path):
    out = tmp_path / "other.edb.tar"
    request = PackRequest(subject=Path("edgedeploy.toml"), version="1.4.1", sequence=7)
    pack(request, out, seal.load_key(Path("key.pem")))
    first, second = (json.loads(_members(path)[SBOM]) for path in (packed, out))
    assert first["serialNumber"] != second["serialNumber"]


# ---------------------------------------------------------------- what is not packed


@pytest.mark.parametrize("decision", ["FAIL", "INCONCLUSIVE"])
def test_what_did_not_pass_is_packed_only_when_it_is_called_by_name(decision, here, tmp_path):
    file = tmp_path / "reports" / "verdict.json"
    verdict = read_json(Path("bench_results/reports/verdict.json"), Verdict, "edgedeploy.verdict/1")
    write_json(file, msgspec.structs.replace(verdict, decision=decision))
    out = tmp_path / "out.edb.tar"
    with pytest.raises(UsageError, match=f"--allow-decision {decision}"):
        pack(PackRequest(subject=file, version="1"), out)
    assert not out.exists()
    pack(PackRequest(subject=file, version="1", allowed=(decision,)), out)
    assert msgspec.json.decode(_members(out)[check.MANIFEST], type=Bundle).decision == decision


def test_an_artifact_that_is_gone_and_a_run_that_was_edited_are_named(here, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEDEPLOY_CACHE_DIR", str(tmp_path / "empty"))
    request = PackRequest(subject=Path("edgedeploy.toml"), version="1")
    with pytest.raises(UsageError, match=r"candidate was measured with .* is not in the cache"):
        pack(request, tmp_path / "out.edb.tar")
    monkeypatch.setenv("EDGEDEPLOY_CACHE_DIR", str(here / "cache"))
    results = tmp_path / "bench_results"
    subprocess.run(["cp", "-r", "bench_results", results], check=True)
    monkeypatch.chdir(tmp_path)
    run = next(results.glob("runs/*/*/*.json"))
    run.write_text(run.read_text().replace("pi5-desk", "pi5-next"))
    with pytest.raises(DocumentError, match=r"changed|edited"):
        pack(PackRequest(subject=results / "reports/verdict.json", version="1"), tmp_path / "out.edb.tar")
    run.unlink()
    with pytest.raises(DocumentError, match="which is not there"):
        pack(PackRequest(subject=results / "reports/verdict.json", version="1"), tmp_path / "out.edb.tar")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nothing.json", "--version", "1"], "is not there"),
        (["edgedeploy.toml"], "call it"),
        (["edgedeploy.toml", "--version", "a\nb"], "must be a word"),
        (["edgedeploy.toml", "--version", "1", "--card", "nothing.md"], "the model card nothing.md is not there"),
        (["edgedeploy.toml", "--version", "1", "--results", "elsewhere"], "there is no verdict of 'tiny'"),
        (["edgedeploy.toml", "--version", "1", "--sign", "key.pub.pem"], "is a public key"),
        (["edgedeploy.toml", "--version", "1", "--sign", "edgedeploy.toml"], "no private key in PEM form"),
        (["edgedeploy.toml", "--version", "1", "--sign", "key.pem", "--passphrase", "env:HOME"], "is not encrypted"),
        (["edgedeploy.toml", "--version", "1", "--passphrase", "env:HOME"], "--sign"),
        (["edgedeploy.toml", "--version", "1", "--sign", "key.pem", "--passphrase", "pass:x"], "env:NAME, file:PATH"),
        (["--new-key", "key.pem"], "a key is never overwritten"),
        (["edgedeploy.toml", "--new-key", "other.pem"], "makes a key and stops"),
    ],
)
def test_mistakes_of_a_maker_are_sentences(words, says, here, capsys):
    assert _cli("bundle", *words, "-o", "mistake.edb.tar") == 2
    assert says in capsys.readouterr().err
    assert not Path("mistake.edb.tar").exists()


# ---------------------------------------------------------------- keys


def test_keys_are_private_never_overwritten_and_may_be_encrypted(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SECRET", "open sesame")
    key = tmp_path / "release.pem"
    assert _cli("bundle", "--new-key", key, "--passphrase", "env:SECRET") == 0
    assert key.stat().st_mode & 0o777 == 0o600
    public = tmp_path / "release.pub.pem"
    assert check.public_key(str(public))
    with pytest.raises(UsageError, match="is encrypted"):
        seal.load_key(key)
    with pytest.raises(UsageError, match="passphrase is wrong"):
        seal.load_key(key, "close sesame")
    (tmp_path / "word").write_text("open sesame\nmore\n")
    assert seal.key_sha256(seal.load_key(key, "open sesame")) == sha256_bytes(check.public_key(str(public)))
    done = subprocess.run(
        ["openssl", "pkey", "-in", key, "-passin", f"file:{tmp_path}/word", "-pubout"], capture_output=True, check=True
    )
    assert done.stdout == public.read_bytes()
    assert _cli("bundle", "--new-key", key) == 2
    assert "never overwritten" in capsys.readouterr().err


def test_a_key_that_openssl_made_signs_too(here, tmp_path):
    key, public, out = tmp_path / "key.pem", tmp_path / "pub.pem", tmp_path / "out.edb.tar"
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key], check=True)
    subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True)
    pack(PackRequest(subject=Path("edgedeploy.toml"), version="1"), out, seal.load_key(key))
    assert check.verify(str(out), str(public)).manifest["version"] == "1"


# ---------------------------------------------------------------- verifying


def test_verify_says_who_signed_what_was_decided_and_that_it_answers(here, packed, capsys):
    assert _cli("verify", packed, "--key", "key.pub.pem", "--machine", platform.machine(), "-q") == 0
    text = capsys.readouterr().out
    assert "verified" in text
    assert "tiny 1.4.0, sequence 7: PASS" in text
    assert "judged again from its raw runs: the same" in text
    assert "golden answers replayed with onnxruntime on this machine: the same" in text
    assert _cli("verify", packed, "--key", "key.pub.pem", "--no-replay", "--json", "-q") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["bundle"]["format"], told["replays"]) == (FORMAT, [])


def test_verify_needs_nothing_but_bundle_and_key(packed, site, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    found = opening.verify(packed, site / "key.pub.pem")
    assert found.replays[0].fidelity is not None


def test_answers_that_are_not_the_golden_ones_are_refused_although_they_are_signed(here, packed, tmp_path, capsys):
    import numpy as np
    from safetensors.numpy import load, save

    members = _members(packed)
    name = next(name for name in members if name.endswith("golden-outputs.safetensors"))
    members[name] = save({key: np.ascontiguousarray(values + 1) for key, values in load(members[name]).items()})
    manifest = next(one for one in members if one.startswith("artifacts/") and one.endswith("/manifest.json"))
    artifact = json.loads(members[manifest])
    artifact["golden"]["outputs_sha256"] = sha256_bytes(members[name])
    members[manifest] = json.dumps(artifact).encode()
    path = _signed(members, tmp_path)
    assert _cli("verify", path, "--key", "key.pub.pem", "-q") == 1
    assert "is not what the model answers" in capsys.readouterr().err
    assert _cli("verify", path, "--key", "key.pub.pem", "--no-replay", "-q") == 0


def test_a_verdict_that_does_not_follow_from_its_runs_is_refused_although_it_is_signed(here, packed, tmp_path):
    verdict = next(name for name in _members(packed) if name.endswith("verdict.json"))
    members = _members(packed)
    members[verdict] = members[verdict].replace(b'"PASS"', b'"FAIL"')
    with pytest.raises(BundleRefused, match="does not follow from the runs"):
        opening.verify(_signed(members, tmp_path), Path("key.pub.pem"), replays=False)
    members = _members(packed)
    with pytest.raises(BundleRefused, match="the verdict of its cells is another one"):
        opening.verify(_signed(members, tmp_path, decision="FAIL"), Path("key.pub.pem"), replays=False)
    members = _members(packed)
    del members[next(name for name in members if name.startswith("evidence/runs/"))]
    with pytest.raises(BundleRefused, match=r"evidence in .* cannot be read"):
        opening.verify(_signed(members, tmp_path), Path("key.pub.pem"), replays=False)
    found = opening.verify(_signed(_members(packed), tmp_path, edgedeploy="0.0.1"), Path("key.pub.pem"), replays=False)
    assert not found.is_rejudged
    assert "judged by edgedeploy 0.0.1" in found.not_rejudged


def test_an_artifact_that_is_not_the_one_of_its_cell_is_refused(here, packed, tmp_path):
    members = _members(packed)
    document = json.loads(members[check.MANIFEST])
    document["cells"][0]["sha256"] = "0" * 64
    path = _signed(members, tmp_path, cells=document["cells"])
    with pytest.raises(BundleRefused, match="not the one that its manifest says"):
        opening.verify(path, Path("key.pub.pem"))


def test_an_artifact_that_names_a_file_elsewhere_is_refused(here, packed, tmp_path):
    members = _members(packed)
    name = next(one for one in members if one.startswith("artifacts/") and one.endswith("/manifest.json"))
    members[name] = members[name].replace(b'"file": "model.onnx"', b'"file": "../../../../../../etc/hostname"')
    with pytest.raises(BundleRefused, match="no file beside it"):
        opening.verify(_signed(members, tmp_path), Path("key.pub.pem"))


def test_a_signed_manifest_with_unknown_keys_is_refused(here, packed, tmp_path):
    with pytest.raises(BundleRefused, match="not what edgedeploy writes"):
        opening.verify(_signed(_members(packed), tmp_path, surprise=1), Path("key.pub.pem"))


def test_a_bundle_for_another_machine_is_not_replayed_unless_demanded(here, packed, tmp_path):
    members = _members(packed)
    document = json.loads(members[check.MANIFEST])
    document["cells"][0]["requires"]["machine"] = "riscv64"
    path = _signed(members, tmp_path, cells=document["cells"])
    (replay,) = opening.verify(path, Path("key.pub.pem")).replays
    assert replay.fidelity is None
    assert "it is for riscv64" in replay.reason
    (replay,) = opening.verify(path, Path("key.pub.pem"), replays=True).replays
    assert replay.fidelity is not None


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--machine", "riscv64"], 1, "nothing for this device"),
        (["--min-sequence", "8"], 1, "older than allowed"),
        (["--key", "key.pem"], 2, "is a private key"),
        (["--key", "nothing.pem"], 2, "cannot be read"),
        (["--layers"], 2, "is about models"),
    ],
)
def test_refusals_have_codes_and_sentences(words, code, says, here, packed, capsys):
    assert _cli("verify", packed, "--key", "key.pub.pem", "-q", *words) == code
    assert says in capsys.readouterr().err


def test_verify_of_a_bundle_asks_for_the_key_and_of_a_model_for_none(here, packed, capsys):
    assert _cli("verify", packed) == 2
    assert "add --key" in capsys.readouterr().err
    assert _cli("verify", "tiny.onnx", "--machine", "aarch64") == 2
    assert "is about a bundle" in capsys.readouterr().err


def test_without_openssl_nothing_is_claimed(here, packed, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert _cli("verify", packed, "--key", "key.pub.pem", "-q") == 3
    assert "install OpenSSL" in capsys.readouterr().err
