"""The slower faults on a device behind a real SSH server: what freezes, and what only repeats another one's way."""

from __future__ import annotations

import signal

import pytest

from tests.ssh import faults
from tests.ssh.faults import (
    Fault,
    Place,
    entry,
    killed,
    lost_for_good,
    nothing,
    python_of_another_time,
    slow,
    suffer,
    when_outputs_come,
)

place, workshop = faults.place, faults.workshop

FAULTS = [
    Fault("slow all the time", slow, "block 3 of at most 3", code=0),
    Fault(
        "frozen while uploading",
        lambda place: place.at("upload", place.link.stall),
        "went silent for 3 s|fell silent|sent no SSH greeting|is not connected",
    ),
    Fault(
        "half-open while uploading",
        lambda place: place.at("upload", place.link.half_open),
        "the connection was lost while files were moved; connecting again",
        code=0,
    ),
    Fault(
        "frozen during a visit",
        lambda place: place.during_visit(place.link.stall),
        "not even a heartbeat for 3 s.*what was measured until then is kept in",
        keeps=True,
    ),
    Fault(
        "half-open during a visit",
        lambda place: place.during_visit(place.link.half_open),
        "not even a heartbeat for 3 s.*reaching it again",
        code=0,
    ),
    Fault(
        "frozen server that still acknowledges",
        lambda place: place.during_visit(place.board.freeze),
        "not even a heartbeat for 3 s.*what was measured until then is kept in",
        keeps=True,
    ),
    Fault(
        "lost for good while downloading",
        when_outputs_come(lost_for_good),
        "the connection was lost while files were moved; connecting again.*refused the connection|is not connected",
    ),
    Fault(
        "frozen while downloading",
        when_outputs_come(lambda place: place.link.stall()),
        "the connection was lost while files were moved; connecting again|went silent for 3 s",
    ),
    Fault("runner hangs", killed("agent", signal.SIGSTOP), "not even a heartbeat for 3 s.*reaching it again", code=0),
    Fault("runner crashed", killed("agent", signal.SIGSEGV), "killed by .*reaching it again", code=0),
    Fault("runner aborted", killed("agent", signal.SIGABRT), "killed by .*reaching it again", code=0),
    Fault(
        "session aborts",
        nothing,
        "was killed by SIGABRT",
        options={"crash_after": 1, "crash_signal": "SIGABRT"},
    ),
    Fault("session hangs", nothing, "no answer within 6 s", options={"hang_after": 1}),
    Fault("stdout noise", nothing, "block 3 of at most 3", code=0, options={"print_noise": True}),
    Fault("stdout flood", nothing, "block 3 of at most 3", code=0, options={"flood_bytes": 1 << 20}),
    Fault(
        "wrong clock", entry(lambda place: {"python": python_of_another_time(place)}), "block 3 of at most 3", code=0
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_fault(fault: Fault, place: Place) -> None:
    suffer(fault, place)
