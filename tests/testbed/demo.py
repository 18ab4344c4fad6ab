"""python -m tests.testbed.demo hybrid: the quickstart on a bare aarch64 device, from `devices add` to a verdict."""

from __future__ import annotations

import subprocess
import sys
import time
import tomllib
from pathlib import Path

from . import lab
from .cache import TestbedError

RELEASE = Path(__file__).parents[2] / "edgedeploy" / "demo" / "edgedeploy.toml"
# INCONCLUSIVE: a device that is emulated on a busy machine is too noisy to tell; its number is one all the same.
INCONCLUSIVE = 4


def main(arguments: list[str]) -> int:
    """Start a device, add it to a lab of its own, give it its runtime, and run the quickstart there."""
    if len(arguments) != 1 or arguments[0] not in lab.TIERS:
        print(f"usage: python -m tests.testbed.demo {'|'.join(lab.TIERS)}", file=sys.stderr)
        return 2
    try:
        found = tomllib.loads(lab.up(lab.TIERS if lab.is_up() else arguments).read_text())["devices"]
    except TestbedError as error:
        print(f"testbed: {error}", file=sys.stderr)
        return 3
    if arguments[0] not in found:
        print(f"the lab is up without {arguments[0]}; make lab-down, then try again", file=sys.stderr)
        return 3
    return _from_nothing_to_a_verdict(found[arguments[0]])


def _from_nothing_to_a_verdict(board: dict[str, str]) -> int:
    shown = subprocess.run(["ssh-keygen", "-lf", board["known_hosts"]], stdout=subprocess.PIPE, check=True, text=True)
    own = lab.folder() / "demo-lab.toml"
    own.unlink(missing_ok=True)
    (own.parent / "known_hosts").unlink(missing_ok=True)  # the device has a port of its own each time
    here = ["--lab", str(own)]
    add = ["add", "demo", f"{board['user']}@{board['host']}:{board['port']}", "--key", board["key"]]
    steps = [
        ["devices", *add, "--fingerprint", shown.stdout.split()[1], *here],
        ["devices", "provision", "demo", "--runtime", "onnxruntime", *here],
        ["run", str(RELEASE), "--device", "demo", *here],
    ]
    started_s = time.monotonic()
    for words in steps:
        print(f"$ edgedeploy {' '.join(words)}", flush=True)
        status = subprocess.run([sys.executable, "-m", "edgedeploy", *words], check=False).returncode
        print(f"({time.monotonic() - started_s:.0f} s since the beginning)", flush=True)
        if status != 0:
            return 0 if status == INCONCLUSIVE else status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
