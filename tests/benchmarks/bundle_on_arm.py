"""Seconds that an aarch64 board takes to check a bundle by itself, to check and replay it, and to install it.

The demo's pruned network in int8 for ONNX Runtime, on an emulated board that was provisioned before; once more with 64 MiB
beside it in the bundle, which the board has to hash. Connecting and sending are part of what is timed, as a person waits.

    python -m tests.benchmarks bundle_on_arm [-- --vm]
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from edgedeploy import installing
from edgedeploy.evidence.seal import new_key
from edgedeploy.installing import InstallRequest
from edgedeploy.lab.inventory import load_lab
from tests.benchmarks import lab_boards
from tests.bundles import bundle_of
from tests.testbed.board import Board
from tests.testbed.hybrid import Hybrid
from tests.testbed.vm import Vm

MIB = 1 << 20


def seconds(act: Callable[[], object]) -> float:
    """Return how long something takes."""
    started_s = time.monotonic()
    act()
    return time.monotonic() - started_s


def measured(bundles: list[Path], public: Path, lab: Path, device: str) -> dict[str, float]:
    """Return medians over bundles that differ in their sequence alone."""
    entry = load_lab(lab).devices[device]
    found: dict[str, list[float]] = {"check": [], "verify_and_replay": [], "install": []}
    for bundle in bundles:
        started_s = time.monotonic()
        said = installing.verify_on_device(bundle, public, device, lab, 60.0, lab_boards.tell)
        found["verify_and_replay"].append(time.monotonic() - started_s)
        found["check"].append(said.seconds)
        assert all(cell.golden is not None for cell in said.cells), said.cells
        request = InstallRequest(bundle=bundle, key=public, device_name=device, device=entry, wait_s=60.0)
        found["install"].append(seconds(lambda request=request: installing.install(request, lab_boards.tell)))
    return {f"{what}_s": round(statistics.median(values), 2) for what, values in found.items()}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--vm", action="store_true", help="on a virtual machine, which emulates the kernel too")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bundle-") as place:
        here = Path(place)
        lab_boards.prepare(here)
        built = lab_boards.compiled("onnxruntime", "int8", "raspberry-pi-4")
        key, public = new_key(here / "signer.pem")
        sizes: dict[str, dict[str, bytes]] = {
            "demo": {},
            "demo and 64 MiB": {"evidence/ballast": os.urandom(64 * MIB)},
        }
        board: AbstractContextManager[Board] = Vm(name="board") if given.vm else Hybrid("pi4", name="board")
        figures: dict[str, object] = {}
        with board as started:
            lab = lab_boards.write_lab(started, here, timeout_s=120.0)
            runtime = lab_boards.provided(started, lab, "onnxruntime")
            sequence = 0
            for size, extra in sizes.items():
                bundles = []
                for _ in range(given.rounds):
                    sequence += 1
                    bundles.append(
                        bundle_of(
                            {"demo": built.folder}, key, here / f"{sequence}.edb.tar", sequence=sequence,
                            machine="aarch64", extra=extra,
                        )
                    )  # fmt: skip
                bytes_ = bundles[0].stat().st_size
                figures[size] = {"bundle_bytes": bytes_, **measured(bundles, public, lab, "board")}
        kind = "virtual machine" if given.vm else "user-mode emulation"
        print(
            json.dumps(
                {"board": kind, "runtime": runtime, "rounds": given.rounds, "load_1min": os.getloadavg()[0], **figures}
            )
        )


if __name__ == "__main__":
    main()
