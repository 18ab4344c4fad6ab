"""Faults on a device behind a real SSH server: each ends in the right sentence, nothing lost, and the device restored."""

from __future__ import annotations

import re
import signal

import pytest

import edgedeploy.cli
from edgedeploy.lab import bundle
from tests.ssh import faults
from tests.ssh.faults import (
    Fault,
    Place,
    another_root,
    empty_file,
    entry,
    killed,
    lost_for_good,
    nothing,
    program,
    restarted,
    root_on,
    suffer,
    when_outputs_come,
)

place, workshop = faults.place, faults.workshop

LINK = [
    Fault("refused", lambda place: place.link.refuse(), "refused the connection: nothing listens on port"),
    Fault(
        "dropped at connect",
        lambda place: place.board.stop(),
        "without an SSH greeting|dropped the connection|cannot be reached: .*reset by peer",
        device={"connect_timeout_s": 30.0},  # a busy machine must not take the drop for silence
        mends=lambda place: place.board.start(),
    ),
    Fault(
        "frozen at connect",
        lambda place: place.link.stall(),
        "accepted the connection but sent no SSH greeting within 2 s",
    ),
    Fault(
        "reset while uploading",
        lambda place: place.at("upload", lambda: place.link.cut_after(300_000)),
        "the connection was lost while files were moved; connecting again",
        code=0,
    ),
    Fault(
        "lost for good while uploading",
        lambda place: place.at("upload", lambda: lost_for_good(place)),
        "refused the connection|is not connected: the connection was lost",
    ),
    Fault(
        "reset during a visit",
        lambda place: place.during_visit(lambda: place.link.cut("rst")),
        "the connection was lost.*reaching it again",
        code=0,
    ),
    Fault(
        "lost for good during a visit",
        lambda place: place.during_visit(lambda: lost_for_good(place)),
        "it did not come back within 3 s.*what was measured until then is kept in",
        keeps=True,
    ),
    Fault(
        "reset while downloading",
        when_outputs_come(lambda place: place.link.cut("rst")),
        "the connection was lost while files were moved; connecting again",
        code=0,
    ),
]

SERVER = [
    Fault(
        "host key unknown",
        entry(lambda place: {"known_hosts": empty_file(place)}),
        "is not a known host: it shows the .* key SHA256:",
    ),
    Fault(
        "host key changed",
        restarted(host_key="otherhost"),
        "THE HOST KEY OF .* HAS CHANGED: .* nothing was sent to it",
        mends=restarted(),
    ),
    Fault(
        "key refused",
        entry(lambda place: {"key": str(place.board.new_key("stranger"))}),
        "does not let the user '.*' in: tried",
    ),
    Fault("no SFTP", restarted(options=""), "block 3 of at most 3", code=0, mends=restarted()),
    Fault(
        "ForceCommand",
        restarted(options="ForceCommand echo locked\n"),
        "does not run what it is asked to run .* it says: locked",
        mends=restarted(),
    ),
    Fault(
        "MaxSessions 1",
        restarted(options="MaxSessions 1\n"),
        "raise MaxSessions in its sshd_config",
        mends=restarted(),
    ),
    Fault(
        "jump host lost",
        entry(lambda place: {"jump": f"{place.board.user}@127.0.0.1:1"}),
        "the jump host .* refused the connection",
    ),
]

RUNNER = [
    Fault("runner killed", killed("agent", signal.SIGKILL), "killed by .*reaching it again", code=0),
    Fault("visit killed", killed("visit", signal.SIGKILL), "block 3 of at most 3", code=0),
    Fault("session crashes", nothing, "was killed by SIGSEGV", options={"crash_after": 1}),
]

DEVICE = [
    Fault("disk full", root_on("size=600k"), "the disk is (too )?full", mends=another_root),
    Fault(
        "disk read-only",
        root_on("ro"),
        "read-only file system; .* set another root in lab.toml",
        mends=another_root,
    ),
    Fault(
        "Python missing",
        nothing,
        "has no /nowhere/python; install Python 3.8 or newer there",
        device={"python": "/nowhere/python"},
    ),
    Fault(
        "Python too old",
        entry(lambda place: {"python": program(place, "echo 3 7")}),
        "is Python 3.7, too old for the runner",
    ),
    Fault(
        "Python broken",
        entry(lambda place: {"python": program(place, "echo broken >&2; exit 1")}),
        "does not work there .broken",
    ),
]

FAULTS = [*LINK, *SERVER, *RUNNER, *DEVICE]


# A session that is taken up again while files are fetched starts another runner, which is told no list of what it may run.
@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.name) for fault in FAULTS])
def test_fault(fault: Fault, place: Place) -> None:
    suffer(fault, place)


def test_of_two_hosts_one_measures_and_the_other_is_told_by_whom(place: Place) -> None:
    place.write_lab()
    changes = place.link.settings(place.board) | {"python": place.changes["python"]}
    device = place.board.device(**changes)
    with place.board.transport(**changes) as transport, bundle.connect(transport, device, device_name="board"):
        ended = place.bench()
    assert ended.code == 3
    assert "is in use by" in ended.said
    assert "queue for it with --wait" in ended.said
    assert not place.results.exists()


@pytest.mark.parametrize(
    ("entries", "device", "says"),
    [
        ("[devices.board]\n[devices.board]\n", "board", "Cannot declare .*board.* twice .at line 3"),
        (
            "[devices.board]\ntransport = 'local'\n",
            "bord",
            "there is no device 'bord' in the lab; did you mean .board.",
        ),
    ],
    ids=["duplicate", "unknown"],
)
def test_lab_file_that_is_wrong_is_told_before_anything_is_sent(
    entries: str,
    device: str,
    says: str,
    place: Place,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lab = place.folder / "lab.toml"
    lab.write_text(f'format = "edgedeploy.lab/1"\n{entries}')
    assert edgedeploy.cli.run(["bench", str(place.artifact), "--device", device, "--lab", str(lab)]) == 2
    told = capsys.readouterr().err
    assert re.search(says, told), told
    assert "Traceback" not in told
