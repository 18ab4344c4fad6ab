"""Gives a place of labgrid back when the process that acquired it is gone: labgrid's locks never expire.

A process of its own (python -m edgedeploy.lab.labgrid_guard COORDINATOR PLACE HOLDER) that waits for its stdin to end;
the word "released" before that says that nothing is left to do. It imports nothing heavy unless it is needed.
"""

from __future__ import annotations

import sys
import time

# A coordinator that restarts has forgotten who held what, so there is no need to try for longer than a network is down.
TRIES_FOR_S = 600.0
_LONGEST_PAUSE_S = 30.0
RELEASED = b"released\n"


def main(arguments: list[str]) -> int:
    """Wait, and release the place if nobody has."""
    address, place, holder = arguments
    if sys.stdin.buffer.read() == RELEASED:
        return 0
    from edgedeploy.errors import EdgedeployError
    from edgedeploy.lab.labgrid import Coordinator

    deadline_s, pause_s = time.monotonic() + TRIES_FOR_S, 0.5
    while True:
        try:
            Coordinator(address).release(place, holder)
        except EdgedeployError:
            if time.monotonic() > deadline_s:
                return 3
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        else:
            return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
