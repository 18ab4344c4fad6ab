"""How long a compile of unchanged input takes, and whether it touches a converter."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "edgedeploy" / "demo"
CONVERTERS = ("torch", "onnx", "onnxscript", "onnxslim", "onnxruntime")
CODE = """
import sys
import edgedeploy.cli
status = edgedeploy.cli.run(sys.argv[1:])
loaded = [name for name in {converters!r} if name in sys.modules]
print("LOADED", *loaded, file=sys.stderr)
sys.exit(status)
"""


def compile_once(folder: str) -> tuple[float, list[str], bool]:
    """Compile the demo's pruned model to int8; return (seconds, converters imported, from the cache)."""
    arguments = [
        *("compile", "edgedeploy.demo.model:pruned", "--weights", str(DEMO / "pruned.safetensors")),
        *("--input", "image=batchx1x28x28", "--precision", "int8"),
        *("--calibration", str(ROOT / "calibration" / "fashion-mnist"), "-o", f"{folder}/out", "--json"),
    ]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(converters=CONVERTERS), *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "EDGEDEPLOY_CACHE_DIR": f"{folder}/cache", "HOME": folder},
        capture_output=True,
        text=True,
        check=True,
    )
    elapsed_s = time.perf_counter() - started
    return elapsed_s, done.stderr.splitlines()[-1].split()[1:], json.loads(done.stdout)["cached"]


with tempfile.TemporaryDirectory() as folder:
    first_s, first_loaded, first_cached = compile_once(folder)
    again = [compile_once(folder) for _ in range(5)]
print(
    json.dumps(
        {
            "first_compile_s": first_s,
            "first_from_cache": first_cached,
            "first_converters_imported": first_loaded,
            "second_compile_median_s": sorted(elapsed for elapsed, _, _ in again)[2],
            "second_from_cache": all(cached for _, _, cached in again),
            "second_converters_imported": sorted({name for _, loaded, _ in again for name in loaded}),
            "ratio": sorted(elapsed for elapsed, _, _ in again)[2] / first_s,
        }
    )
)
