"""Peak resident memory of each runtime on an aarch64 machine with its own kernel: the demo's pruned network, fp32 and int8.

A process of its own imports the runtime, loads the artifact and runs it a few times; three such visits each. The runtimes
are what `devices provision` packs, but come on a second drive: the emulated network takes minutes for each. qemu-user would
count itself, so that this is measured on the virtual machine.

    python -m tests.benchmarks lab_peak_rss
"""

import json
import tarfile
import tempfile
from pathlib import Path

from edgedeploy.backends import device_runtimes
from edgedeploy.lab import bundle, wheels
from edgedeploy.records.target import Precision
from tests.benchmarks import lab_boards
from tests.testbed.board import Board
from tests.testbed.vm import Vm

TARGET = "raspberry-pi-4"
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
# Starting an interpreter there is silent for seconds, and for more on a busy machine.
PATIENCE = {"timeout_s": 120.0, "connect_timeout_s": 60.0}


def main() -> None:
    """Print the figures, in MiB."""
    figures: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory(prefix="rss-") as place:
        here = Path(place)
        lab_boards.prepare(here)
        with Vm(name="board") as board:
            prefixes = packed(board, here / "payload")
        figures |= measured(here, prefixes)
    print(json.dumps({"machine": "QEMU cortex-a72, 1 core, 1 GiB", "runtimes": figures}))


def packed(board: Board, folder: Path) -> dict[str, str]:
    """Unpack what would be provisioned there into a folder; return back end → name of its runtime."""
    device = board.device(**PATIENCE)
    with board.transport(**PATIENCE) as way, bundle.connect(way, device, device_name=board.name) as agent:
        platform = wheels.platform_of(agent.facts)
    names = {}
    for backend in lab_boards.RUNTIMES:
        prefix, tar = wheels.make_prefix(device_runtimes(backend), platform, progress=lab_boards.tell)
        with tarfile.open(tar) as archive:
            archive.extractall(folder / prefix.name, filter="data")
        names[backend] = prefix.name
    return names


def measured(folder: Path, prefixes: dict[str, str]) -> dict[str, dict[str, object]]:
    """Return each runtime's figures."""
    figures: dict[str, dict[str, object]] = {}
    with Vm(name="board", payload=folder / "payload") as board:
        lab = lab_boards.write_lab(board, folder, target=TARGET, **PATIENCE)
        runtimes = f"{bundle.device_root(board.device())}/runtimes"
        board.ssh("mkdir", "-p", runtimes)
        for backend, name in prefixes.items():
            board.ssh("cp", "-r", f"/opt/edge/{name}", f"{runtimes}/{name}", timeout_s=300.0)
            figures[backend] = {"runtime": name}
            for precision in PRECISIONS:
                built = lab_boards.compiled(backend, precision, TARGET)
                run = lab_boards.looked_at(built, "board", lab, None)
                figures[backend][precision] = {
                    "artifact_bytes": built.artifact.size_bytes,
                    "peak_rss_mib": [visit.peak_rss_bytes / 2**20 for visit in run.memory],
                    "of_it_import_mib": [visit.import_rss_bytes / 2**20 for visit in run.memory],
                }
                lab_boards.tell(f"{backend} {precision}: {json.dumps(figures[backend][precision])}")
    return figures


if __name__ == "__main__":
    main()
