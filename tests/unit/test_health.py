"""Who is fit to be measured on, who is kept out and why, and how work on many devices is told."""

import json
import threading
from pathlib import Path

import pytest

import edgedeploy.cli
from edgedeploy.cli import console
from edgedeploy.documents import encode_json
from edgedeploy.errors import DocumentError
from edgedeploy.lab import health
from edgedeploy.lab.transport import Completed
from edgedeploy.records.device import Device
from edgedeploy.records.run import Conditions
from edgedeploy.records.target import ConditionLimits

BOARD = Device(transport="ssh", host="board", root="files")


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EDGEDEPLOY_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("EDGEDEPLOY_LAB", raising=False)
    monkeypatch.setattr(health, "_LOAD_SPAN_S", 0.0)
    return tmp_path / "state"


class Agent:
    """A runner that answers with prepared conditions."""

    label = "device 'board'"

    def __init__(self, *readings: Conditions) -> None:
        self.readings = list(readings)

    def conditions(self) -> dict[str, Conditions]:
        return {"": self.readings.pop(0)}


class Transport:
    """A way to a device whose Python prints what it is told to."""

    def __init__(self, said: bytes, status: int = 0) -> None:
        self.said, self.status = said, status

    def run(self, argv, *, timeout_s, stdin=b""):
        assert argv[0] == "python3"
        assert argv[-1] == "files"
        return Completed(self.status, self.said, b"python3: broken\n" if self.status else b"")


def examined(*, said: bytes | None = None, status: int = 0, after: dict | None = None) -> health.Health:
    import time

    said = said if said is not None else f"[{time.time()}, {1 << 30}]\n".encode()
    before = Conditions(monotonic_s=10.0, busy_core_s=100.0)
    now = Conditions(**{"monotonic_s": 11.0, "busy_core_s": 100.1, **(after or {})})
    limits = ConditionLimits(max_foreign_load=0.5, max_temperature_celsius=80.0)
    return health.examine(Agent(before, now), Transport(said, status), BOARD, limits)


def test_well_device_has_no_findings():
    assert examined() == health.Health()


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ({"throttled": True}, "it is throttled"),
        ({"throttle_reasons": ("cpu-throttle-alert",)}, "it is throttled \\(cpu-throttle-alert\\)"),
        ({"temperatures_celsius": {"cpu": 91.0, "gpu": 50.0}}, "cpu has 91 °C, and 80 °C is the limit"),
        ({"busy_core_s": 101.5}, "other processes use 1.5 cores, and 0.5 is the limit"),
    ],
)
def test_states_that_pass_are_told_apart_from_faults(after, words):
    import re

    found = examined(after=after)
    assert found.lasting == ()
    assert re.fullmatch(words, found.passing[0])


def test_what_a_device_does_not_say_is_no_fault():
    before = Conditions(monotonic_s=1.0)
    found = health.examine(Agent(before, before), Transport(b"[0.0, 1000000000]"), BOARD, ConditionLimits())
    assert (found.lasting, found.passing) == ((), ())


def test_full_disk_is_a_fault_and_a_wrong_clock_is_a_note():
    found = examined(said=b"[86400.0, 1048576]")
    assert "only 1 MiB are free" in found.lasting[0]
    assert "(files)" in found.lasting[0]
    assert "behind ours" in found.notes[0]


@pytest.mark.parametrize("said", [b"", b"hello", b"[1]", b"[1e999, 3]", b'{"a": 1}', b"[1.0, 5]" * 100 + b"x"])
def test_python_that_says_nonsense_is_a_fault(said):
    assert "does not say how much disk is free" in examined(said=said, status=1).lasting[0]


def test_quarantine_is_kept_with_its_reason_until_lifted():
    health.quarantine("pi", "no fan")
    assert health.quarantined()["pi"].why == "no fan"
    assert health.quarantine("pi", "found unreachable", "run").why == "no fan", "a person's word stays"
    assert health.lift("pi")
    assert not health.lift("pi")
    assert health.quarantined() == {}


def test_quarantine_of_many_threads_loses_none():
    threads = [threading.Thread(target=health.quarantine, args=(f"pi-{n}", "x", "run")) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(health.quarantined()) == sorted(f"pi-{n}" for n in range(12))


def test_damaged_quarantine_file_is_a_sentence(state):
    state.mkdir()
    (state / "quarantine.json").write_text('{"format": "edgedeploy.quarantine/1", "devices": {"a": 3}}')
    with pytest.raises(DocumentError, match="devices"):
        health.quarantined()
    assert encode_json(health._Quarantine()).startswith(b'{\n "format": "edgedeploy.quarantine/1"')


def test_quarantine_command_needs_a_reason_and_a_known_device(capsys):
    assert edgedeploy.cli.run(["devices", "quarantine", "local"]) == 2
    assert "--why TEXT" in capsys.readouterr().err
    assert edgedeploy.cli.run(["devices", "quarantine", "locla", "--why", "x"]) == 2
    assert "local" in capsys.readouterr().err
    assert edgedeploy.cli.run(["devices", "quarantine", "local", "--why", "too loud", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"]["local"]["why"] == "too loud"
    assert edgedeploy.cli.run(["devices", "quarantine", "local", "--lift"]) == 0
    assert "may be used again" in capsys.readouterr().out
    assert edgedeploy.cli.run(["devices", "quarantine", "local", "--lift"]) == 2


def test_lines_of_many_devices_are_whole_and_name_their_device_where_there_is_no_terminal(capsys):
    with console.board(quiet=False) as board:
        tellers = [board.device(f"pi-{n}") for n in range(6)]
        threads = [
            threading.Thread(target=lambda tell=tell, n=n: [tell(f"pi-{n}: step {k} of it") for k in range(20)])
            for n, tell in enumerate(tellers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        board("builds go on")
    lines = capsys.readouterr().err.splitlines()
    expected = [f"· pi-{n}: step {k} of it" for n in range(6) for k in range(20)]
    assert sorted(lines) == sorted([*expected, "· builds go on"])


def test_terminal_shows_one_line_a_device_and_what_scrolls_by_above(monkeypatch):
    import io

    import rich.console

    shown = io.StringIO()
    terminal = rich.console.Console(file=shown, force_terminal=True, width=60, _environ={"TERM": "xterm"})
    monkeypatch.setattr(rich.console, "Console", lambda **options: terminal)
    board = console.Board(lambda text: None, is_live=True)
    for step in range(3):
        board.device("pi")(f"pi: block {step}\nwith a second line")
        board.device("orin")(f"[bold]step {step}\x1b[31m")
    board("built")
    board.close()
    last = shown.getvalue().rpartition("built")[2]
    assert last.count("block 2") == last.count("pi") == 1
    assert "second line" not in shown.getvalue()
    assert "[bold]step 2" in last, "what a device says is no markup"
    assert "\x1b[31m" not in shown.getvalue(), "nor does it colour the terminal"
    board.device("pi")("after the end")
