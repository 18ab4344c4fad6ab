"""Seconds and MB/s of packing and verifying a bundle: the demo's, and one of 200 MB, beside hashing alone.

Run: python -m tests.benchmarks.bundle_verify [VERDICT.json]     (without one, the demo is run first)
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from edgedeploy import outcomes, pipeline
from edgedeploy.evidence import check, seal
from edgedeploy.evidence.gather import PackRequest
from edgedeploy.evidence.pack import pack, write_archive
from edgedeploy.records.bundle import BundledFile
from edgedeploy.storage import sha256_file
from tests.unit import bundle_forge

ROUNDS = 5
LARGE_BYTES = 200_000_000


def seconds(work: Callable[[], object]) -> float:
    """Return the median wall time of some rounds."""
    taken = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def figures(path: Path, public: Path, pack_s: float) -> dict[str, float]:
    """Return what a bundle costs to pack, to verify here, and to verify with the program alone."""
    megabytes = path.stat().st_size / 1e6
    verify_s = seconds(lambda: check.verify(str(path), str(public)))
    command = [sys.executable, "-I", "-S", check.__file__, str(path), "--key", str(public)]
    alone_s = seconds(lambda: subprocess.run(command, check=True, capture_output=True))
    hash_s = seconds(lambda: sha256_file(path))
    return {
        "megabytes": megabytes,
        "pack_s": pack_s,
        "pack_mb_per_s": megabytes / pack_s,
        "verify_s": verify_s,
        "verify_mb_per_s": megabytes / verify_s,
        "check_py_s": alone_s,
        "sha256_alone_s": hash_s,
        "verify_to_sha256_ratio": verify_s / hash_s,
    }


def demo(folder: Path, public: Path, verdict: Path | None) -> dict[str, float]:
    """Pack and verify the demo's release, golden answers and raw runs included."""
    if verdict is None:
        release = Path("edgedeploy/demo/edgedeploy.toml")
        outcome = pipeline.run(release, results=folder / "results", wait_s=600.0)
        outcomes.write_reports(outcome, html=folder / "results/reports/demo.html")
        verdict = folder / "results/reports/demo.json"
    key = seal.load_key(folder / "key.pem")
    out = folder / "demo.edb.tar"
    request = PackRequest(subject=verdict, version="1.4.0", allowed=("FAIL", "INCONCLUSIVE"))
    found = figures(out, public, seconds(lambda: pack(request, out, key)))
    command = [sys.executable, "-m", "edgedeploy", "verify", str(out), "--key", str(public), "-q"]
    found["verify_and_replay_command_s"] = seconds(lambda: subprocess.run(command, check=True, capture_output=True))
    return found


def large(folder: Path, public: Path) -> dict[str, float]:
    """Write and verify an archive whose artifact has 200 MB; packing is hashing it once, then copying it."""
    key = seal.load_key(folder / "key.pem")
    model = folder / "model.onnx"
    with model.open("wb") as stream:
        for _ in range(LARGE_BYTES // 1_000_000):
            stream.write(os.urandom(1_000_000))
    name, out = f"{bundle_forge.FOLDER}/model.onnx", folder / "large.edb.tar"

    def write() -> None:
        document = bundle_forge.manifest(bundle_forge.FILES)
        document["files"][name] = {"sha256": sha256_file(model), "size_bytes": model.stat().st_size}
        manifest = json.dumps(document).encode()
        digests = {path: one["sha256"] for path, one in document["files"].items()}
        digests[check.MANIFEST] = hashlib.sha256(manifest).hexdigest()
        members = {path: data for path, data in bundle_forge.FILES.items() if path != name} | {name: model}
        expected = {name: BundledFile(**document["files"][name])}
        signature = seal.signature("demo", digests, key)
        head = {check.SIGNATURE: signature, check.MANIFEST: manifest}
        write_archive(out, {**head, **dict(sorted(members.items()))}, expected)

    found = figures(out, public, seconds(write))
    command = [sys.executable, "-I", "-S", check.__file__, str(out), "--key", str(public)]
    found["check_py_peak_rss_mb"] = peak_rss_mb(command)
    return found


def peak_rss_mb(command: list[str]) -> float:
    """Return the peak resident memory of one process."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True)
    return int(done.stdout) * 1024 / 1e6  # Linux counts in KiB


def main() -> None:
    """Print all figures as JSON."""
    verdict = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory(prefix="edgedeploy-bench-") as name:
        folder = Path(name)
        _, public = seal.new_key(folder / "key.pem")
        print(json.dumps({"demo": demo(folder, public, verdict), "large": large(folder, public)}, indent=1))


if __name__ == "__main__":
    main()
