"""How fast files go to a device and back, beside scp over the same link: loopback, a narrow link, a long one."""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgedeploy.lab.ssh import SshTransport
from edgedeploy.storage import sha256_file
from tests.testbed.badlink import BadLink
from tests.testbed.plain import Plain

MIB = 1 << 20
# Name, seconds added in each direction, bytes per second (0: as fast as it goes), size of the file.
LINKS = (("loopback", 0.0, 0.0, 200 * MIB), ("100 Mbit/s", 0.0, 12.5e6, 24 * MIB), ("20 ms", 0.01, 0.0, 64 * MIB))


def be_link(port: int, delay_s: float, rate: float) -> None:
    """Be a link in a process of its own, so that it takes no turn from what is measured, until stdin ends."""
    with BadLink(port, delay_s=delay_s, rate=rate) as link:
        print(link.port, flush=True)
        sys.stdin.read()


@contextmanager
def linked(board: Plain, delay_s: float, rate: float) -> Iterator[int]:
    """Give the port at which the board is reached over such a link; its host key is made known there."""
    if not delay_s and not rate:
        yield board.port
        return
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.lab_transfer",
        "--link",
        str(board.port),
        str(delay_s),
        str(rate),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        port = int(process.stdout.readline())
        known = board.known_hosts.read_text()
        board.known_hosts.write_text(known + known.replace(f"]:{board.port} ", f"]:{port} "))
        yield port
        board.known_hosts.write_text(known)
        process.stdin.close()


def carriers(board: Plain, port: int, big: Path, folder: Path) -> dict[str, Callable[[], None]]:
    """Return what is timed, connecting included, in the order of timing."""
    options = ["-q", "-P", str(port), "-i", str(board.key), "-o", f"UserKnownHostsFile={board.known_hosts}"]
    options += ["-o", "StrictHostKeyChecking=yes", "-o", "IdentitiesOnly=yes", "-F", "none"]
    there, back = folder / "there", folder / "back"

    def ours(move: Callable[[SshTransport], None]) -> Callable[[], None]:
        def run() -> None:
            with SshTransport("board", board.device(port=port)) as transport:
                move(transport)

        return run

    def scp(*names: str) -> Callable[[], None]:
        return lambda: subprocess.run(["scp", *options, *names], check=True) and None

    where = f"{board.user}@{board.host}:"
    return {
        "scp_up": scp(str(big), where + str(there)),
        "up": ours(lambda transport: transport.put(big, str(there))),
        "scp_down": scp(where + str(big), str(back)),
        "down": ours(lambda transport: transport.get(str(big), back, most_bytes=big.stat().st_size)),
    }


def measure(board: Plain, folder: Path, rounds: int, delay_s: float, rate: float, size: int) -> dict[str, float]:
    """Return rates in MiB/s, and ours in ratio to scp's: the median of rounds in which each is timed once."""
    big = folder / "big"
    big.write_bytes(os.urandom(MIB) * (size // MIB))
    digest = sha256_file(big)
    taken_s: dict[str, list[float]] = {}
    own_cpu_s: dict[str, list[float]] = {}
    with linked(board, delay_s, rate) as port:
        for _ in range(rounds):
            for name, run in carriers(board, port, big, folder).items():
                started_s, started_cpu_s = time.perf_counter(), time.process_time()
                run()
                taken_s.setdefault(name, []).append(time.perf_counter() - started_s)
                own_cpu_s.setdefault(name, []).append(time.process_time() - started_cpu_s)
                arrived = folder / ("there" if name.endswith("up") else "back")
                assert sha256_file(arrived) == digest
                arrived.unlink()
    mib = size / MIB
    figures = {f"{name}_mib_per_s": mib / statistics.median(seconds) for name, seconds in taken_s.items()}
    for way in ("up", "down"):
        pairs = zip(taken_s[f"scp_{way}"], taken_s[way], strict=True)
        figures[f"{way}_to_scp"] = statistics.median(scp_s / ours_s for scp_s, ours_s in pairs)
        figures[f"{way}_host_cpu_s_per_gib"] = statistics.median(own_cpu_s[way]) * 1024 / mib
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--link", nargs=3)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if given.link:
        be_link(int(given.link[0]), float(given.link[1]), float(given.link[2]))
        sys.exit()
    place = Path(tempfile.mkdtemp(prefix="edgedeploy-"))
    try:
        with Plain(place / "board") as device:
            found = {name: measure(device, place, given.rounds, *link) for name, *link in LINKS}
    finally:
        shutil.rmtree(place)
    print(json.dumps({"rounds": given.rounds, "links": found}))
