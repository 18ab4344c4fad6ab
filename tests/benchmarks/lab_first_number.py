"""Seconds from `devices add` to the first number on a bare aarch64 board, step by step, as a person types them.

The board has Debian's Python and nothing else. Once with nothing in the cache (wheels are fetched, unpacked, trimmed and
packed), and once more on a second bare board with what the first one has left there.

    python -m tests.benchmarks lab_first_number
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks import lab_boards
from tests.testbed.hybrid import Hybrid


def main() -> None:
    """Print the figures."""
    with tempfile.TemporaryDirectory(prefix="first-") as place:
        here = Path(place)
        for name in ("HOME", "EDGEDEPLOY_CACHE_DIR", "EDGEDEPLOY_STATE_DIR"):
            (here / name).mkdir()
        # What builds devices is kept where it was.
        os.environ.setdefault("EDGEDEPLOY_TESTBED_DIR", str(Path.home() / ".cache" / "edgedeploy-testbed"))
        environment = {
            **os.environ,
            **{name: str(here / name) for name in ("EDGEDEPLOY_CACHE_DIR", "EDGEDEPLOY_STATE_DIR")},
            "XDG_CONFIG_HOME": str(here / "HOME"),
            "PYTHONPATH": str(lab_boards.ROOT),
        }
        environment.pop("SSH_AUTH_SOCK", None)
        figures = {}
        for number, what in enumerate(("nothing in the cache", "wheels in the cache")):
            (here / str(number)).mkdir()
            figures[what] = from_nothing(here / str(number), environment)
        print(json.dumps({"load_1min": os.getloadavg()[0], "seconds": figures}))


def from_nothing(folder: Path, environment: dict[str, str]) -> dict[str, object]:
    """Return the seconds of each step, and whether the number at their end counts."""
    demo, steps = lab_boards.DEMO, dict[str, float]()
    with Hybrid("pi4") as board:
        shown = subprocess.run(
            ["ssh-keygen", "-lf", board.known_hosts], stdout=subprocess.PIPE, text=True, check=True
        ).stdout.split()[1]
        lab = ["--lab", str(folder / "lab.toml")]
        login = [f"{board.user}@{board.host}:{board.port}", "--key", str(board.key)]
        source = ["edgedeploy.demo.model:pruned", "--weights", str(demo / "pruned.safetensors")]
        inputs = [
            "--input",
            "image=batchx1x28x28",
            "--calibration",
            str(lab_boards.ROOT / "calibration/fashion-mnist"),
        ]
        words = {
            "devices add": ["devices", "add", "bare", *login, "--fingerprint", shown, *lab],
            "devices provision": ["devices", "provision", "bare", "--runtime", "onnxruntime", *lab],
            "compile": [
                "compile",
                *source,
                *inputs,
                "--precision",
                "int8",
                "--target",
                "raspberry-pi-4",
                "-o",
                "built",
            ],
            "bench, one visit": ["bench", "built", "--device", "bare", "--visits", "1", "--json", *lab],
        }
        for step, said in words.items():
            started_s = time.monotonic()
            command = [sys.executable, "-m", "edgedeploy", *said]
            done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            steps[step] = time.monotonic() - started_s
            lab_boards.tell(f"{step}: {steps[step]:.1f} s")
    # A visit during which this machine did something else does not count, and yet says a number.
    (visit,) = json.loads(done.stdout)["visits"]
    timed = [sample_s for burst in visit["bursts"] for sample_s in burst["samples_s"]]
    return {**steps, "all": sum(steps.values()), "samples": len(timed), "dropped": visit["dropped"]}


if __name__ == "__main__":
    main()
