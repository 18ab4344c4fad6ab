"""Builds the wheel, installs it without extras into a bare environment, and does there what a CI gate does.

A development environment hides a missing dependency; this one cannot. Run by `make smoke`.
"""

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DEVELOPMENT = Path(sys.executable).with_name("edgedeploy")
FORBIDDEN = ("torch", "onnx", "onnxruntime", "paramiko")


def run(*arguments: str | Path, expect: int = 0, cwd: Path | None = None) -> str:
    """Run a command, demand its exit status, return its stdout."""
    done = subprocess.run([str(one) for one in arguments], capture_output=True, text=True, cwd=cwd, check=False)
    shown = " ".join(str(one) for one in arguments[:6])
    if done.returncode != expect:
        sys.exit(f"{shown}: exit status {done.returncode} instead of {expect}\n{done.stdout}\n{done.stderr}")
    print(f"ok  {shown}")
    return done.stdout + done.stderr


def stored_verdict(folder: Path) -> Path:
    """Gate two artifacts of the fake back end with the development environment; return the file of the verdict."""
    sys.path.insert(0, str(ROOT))
    os.chdir(folder)
    os.environ["EDGEDEPLOY_CACHE_DIR"] = str(folder / "cache")
    targets = folder / "targets"
    targets.mkdir()
    (targets / "fake-board.toml").write_text(
        'format = "edgedeploy.target/1"\nname = "fake-board"\ndescription = "fake"\n'
        '[backends.fake]\nprecisions = ["fp32"]\n[conditions]\nmax_foreign_load = 1000.0\n'
    )
    import onnx

    from edgedeploy import pipeline

    helper = onnx.helper
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in ("image", "scores")]
    graph = helper.make_graph([helper.make_node("Relu", ["image"], ["scores"])], "tiny", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), "tiny.onnx")
    for name, duration_us in (("slow", 400.0), ("fast", 200.0)):
        options = {"duration_us": duration_us}
        pipeline.compile(
            "tiny.onnx", target="fake-board", backend="fake", options=options, output=Path(name), name=name
        )
    run(DEVELOPMENT, "gate", "fast", "--baseline", "slow", "--margin", "latency_p50=+20%")
    (report,) = (folder / "bench_results" / "reports").glob("*.json")
    return report


def check_bundle(edgedeploy: Path, verdict: Path, folder: Path) -> None:
    """Pack a verdict where every extra is, and demand that the bare environment verifies it, and refuses another."""
    key, public, bundle = folder / "release.pem", folder / "release.pub.pem", folder / "fast.edb.tar"
    run(DEVELOPMENT, "bundle", "--new-key", key)
    run(DEVELOPMENT, "bundle", verdict, "--version", "1.0.0", "--sign", key, "-o", bundle, cwd=folder)
    elsewhere = folder / "customer"
    elsewhere.mkdir()
    told = run(edgedeploy, "verify", bundle, "--key", public, cwd=elsewhere)
    if "verified" not in told or "judged again from its raw runs: the same" not in told:
        sys.exit(f"verify says neither that the bundle holds nor that its verdict follows:\n{told}")
    whole = bytearray(bundle.read_bytes())
    whole[len(whole) // 2] ^= 1
    bundle.write_bytes(whole)
    told = run(edgedeploy, "verify", bundle, "--key", public, expect=1, cwd=elsewhere)
    if "is refused" not in told:
        sys.exit(f"verify does not refuse a changed byte in a sentence:\n{told}")


def main() -> None:
    """Run the smoke test."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
        (wheel,) = folder.glob("edgedeploy-*.whl")
        bare = folder / "bare"
        venv.create(bare, with_pip=True)
        python, edgedeploy = bare / "bin" / "python", bare / "bin" / "edgedeploy"
        run(
            python,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--quiet",
            "install",
            "-c",
            ROOT / "constraints.txt",
            wheel,
        )
        installed = {entry["name"] for entry in json.loads(run(python, "-m", "pip", "list", "--format", "json"))}
        hidden = installed.intersection(FORBIDDEN)
        if hidden:
            sys.exit(f"the bare wheel pulls in {', '.join(hidden)}")
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        run(edgedeploy, "--help", cwd=elsewhere)
        told = run(edgedeploy, "doctor", cwd=elsewhere)
        if "edgedeploy[torch]" not in told or "edgedeploy[onnxruntime]" not in told or "edgedeploy[ssh]" not in told:
            sys.exit(f"doctor does not say what to install for the rest:\n{told}")
        for noun in ("targets", "devices", "backends"):
            run(edgedeploy, noun, "list", cwd=elsewhere)
        run(edgedeploy, "init", cwd=elsewhere)
        (elsewhere / "mine.py").write_text("def net():\n    import torch\n")
        told = run(edgedeploy, "compile", "mine:net", "--input", "x=1x1", "-o", "out", expect=3, cwd=elsewhere)
        if "pip install" not in told:
            sys.exit(f"compile does not say what to install:\n{told}")
        verdict = stored_verdict(folder)
        cell = json.loads(verdict.read_text())["cells"][0]
        baseline, candidate = (folder / cell[side] for side in ("baseline_run", "candidate_run"))
        gate = [edgedeploy, "gate", candidate, "--baseline", baseline]
        run(*gate, "--margin", "latency_p50=+20%", "--html", "gate.html", "--junit", "gate.xml", cwd=elsewhere)
        run(
            edgedeploy,
            "gate",
            baseline,
            "--baseline",
            candidate,
            "--margin",
            "latency_p50=+20%",
            expect=1,
            cwd=elsewhere,
        )
        check_bundle(edgedeploy, verdict, folder)
        os.chdir(ROOT)
    print("the bare wheel gates, lists, reports and verifies bundles")


main()
