"""The host's end of the runner's protocol, line by line."""

from __future__ import annotations

import json
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedeploy.errors import DeviceBusy, DeviceError, DeviceUnreachable, LeaseLost, TransferError, VisitFailed
from edgedeploy.lab.conversation import Agent, Answer, Conversation, Heartbeat, Hello, Refusal

FACTS = {
    "hostname": "pi", "machine": "aarch64", "system": "Linux", "kernel": "6.6", "os_name": "", "libc": "",
    "python": "3.8.10", "cpu_model": "Cortex-A72", "isa": ["asimd"], "cores": 4, "memory_bytes": None, "boot_id": "",
}  # fmt: skip
LEASE = {"token": 3, "seconds": 60.0}
HELLO = {"event": "hello", "protocol": 2, "runner_sha256": "a" * 64, "python": "/usr/bin/python3", "facts": FACTS,
         "lease": LEASE}  # fmt: skip


def line(**event) -> bytes:
    return json.dumps(event).encode()


def greeted() -> Conversation:
    conversation = Conversation()
    assert isinstance(conversation.feed(line(**HELLO)), Hello)
    return conversation


class ScriptedChannel:
    """A channel whose other end has its lines ready."""

    def __init__(self, *lines: bytes, ending: str = "") -> None:
        self.lines, self.ending, self.sent = list(lines), ending, []

    def send_line(self, line: bytes) -> None:
        self.sent.append(json.loads(line))

    def receive_line(self, timeout_s: float) -> bytes | None:
        if self.lines:
            return self.lines.pop(0)
        if self.ending:
            raise DeviceUnreachable(self.ending)
        return None

    def stderr_tail(self) -> str:
        return "Killed"

    def close(self) -> None:
        self.ending = "closed"


def agent(*lines: bytes, ending: str = "") -> Agent:
    return Agent(ScriptedChannel(*lines, ending=ending), label="device 'pi'", root="r", silence_s=0.01)


def test_hello_is_parsed_into_facts():
    event = Conversation().feed(line(**HELLO))
    assert isinstance(event, Hello)
    assert event.facts.cores == 4
    assert event.facts.memory_bytes is None


def test_answer_to_the_command_that_was_asked_is_accepted():
    conversation = greeted()
    asked = json.loads(conversation.command("have", digests=[]))
    assert asked == {"id": 1, "do": "have", "digests": []}
    assert conversation.feed(line(id=1, event="answer", missing=[])) == Answer({"missing": []})


def test_heartbeat_leaves_the_command_open():
    conversation = greeted()
    conversation.command("burst")
    assert conversation.feed(line(event="heartbeat")) == Heartbeat()
    assert conversation.feed(line(id=1, event="error", kind="died", message="x")) == Refusal("died", "x", "")


def test_answer_to_another_command_is_an_error():
    conversation = greeted()
    conversation.command("have")
    with pytest.raises(DeviceError, match="answered command 7, but 1 was asked"):
        conversation.feed(line(id=7, event="answer"))


def test_answer_that_nobody_asked_for_is_an_error():
    with pytest.raises(DeviceError, match="answered command 1, but None was asked"):
        greeted().feed(line(id=1, event="answer"))


def test_second_command_before_the_answer_is_refused():
    conversation = greeted()
    conversation.command("have")
    with pytest.raises(DeviceError, match="still owes an answer"):
        conversation.command("burst")


def test_other_protocol_is_refused_with_both_numbers():
    with pytest.raises(DeviceError, match="speaks protocol 3, this edgedeploy speaks 2"):
        Conversation().feed(line(**{**HELLO, "protocol": 3}))


def test_greeting_of_a_login_shell_is_skipped_but_noise_after_hello_is_an_error():
    conversation = Conversation()
    assert conversation.feed(b"Welcome to the board!") is None
    conversation.feed(line(**HELLO))
    with pytest.raises(DeviceError, match=r"said '\[W\] tensor', which is not a line"):
        conversation.feed(b"[W] tensor")


def test_endless_greeting_is_an_error():
    conversation = Conversation()
    with pytest.raises(DeviceError, match="not a line of its protocol"):
        for _ in range(1000):
            conversation.feed(b"yes")


@pytest.mark.parametrize("broken", [{**HELLO, "facts": {}}, {**HELLO, "facts": None}, {"event": "hello"}])
def test_incomplete_hello_is_an_error(broken):
    with pytest.raises(DeviceError, match="incomplete 'hello'"):
        Conversation().feed(line(**broken))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["event", "id", "facts", "protocol", "holder", "kind", "message"]), inner, max_size=5
        )
    ),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.binary(max_size=40)
        | json_values.map(lambda value: json.dumps(value).encode())
        | st.sampled_from([line(**HELLO), line(event="heartbeat"), line(id=1, event="answer"), b"[1", b"null"]),
        max_size=6,
    )
)
def test_no_line_escapes_as_anything_but_an_event_or_a_device_error(lines):
    conversation = Conversation()
    for text in lines:
        try:
            event = conversation.feed(text)
        except DeviceError as error:
            assert str(error)
            return
        assert event is None or type(event).__module__ == "edgedeploy.lab.conversation"


def test_agent_returns_the_fields_of_the_answer():
    host = agent(
        line(**HELLO), line(event="heartbeat"), line(id=1, event="answer", missing=["b"], parts=[], free_bytes=1)
    )
    assert host.greet().python == "/usr/bin/python3"
    assert host.facts.hostname == "pi"
    assert host.missing(["a", "b"]) == ("b",)


def test_busy_device_names_its_holder():
    with pytest.raises(DeviceBusy, match=r"device 'pi' is in use by ada@desk .* ends in 42 s .*--wait 10m.*release"):
        agent(line(event="busy", holder="ada@desk (process 1)", expires_s=41.7)).greet()


def test_queue_that_is_full_is_a_busy_device():
    with pytest.raises(DeviceBusy, match="device 'pi' is in use: 12 others wait"):
        agent(line(event="error", id=None, kind="busy", message="12 others wait for the device already")).greet()


def test_place_in_the_queue_is_told_and_waiting_is_no_silence():
    said = []
    waiting = {"event": "waiting", "holder": "ada@desk\x1b[31m", "expires_s": 40, "position": 2, "of": 3}
    host = Agent(
        ScriptedChannel(line(**waiting), line(**HELLO)),
        label="p",
        root="r",
        silence_s=0.01,
        name="pi",
        progress=said.append,
    )
    assert host.greet().lease.token == 3
    assert said == ["pi: waiting for ada@desk\\x1b[31m (2nd of 3 in the queue)"]


def test_lost_lease_is_an_error_of_its_own_whatever_was_asked():
    lost = {"event": "error", "kind": "lease-lost", "message": "the device was taken away", "stderr_tail": ""}
    host = agent(line(**HELLO), line(id=1, **lost), line(id=2, **lost))
    host.greet()
    for question in ({"do": "commit"}, {"do": "open", "visit": "v"}):
        with pytest.raises(LeaseLost, match=r"device 'pi'.*was taken away"):
            host.ask(**question)


def test_lease_is_renewed_from_another_thread_until_the_agent_is_closed():
    sent = threading.Event()

    class Hearing(ScriptedChannel):
        def send_line(self, line: bytes) -> None:
            if json.loads(line) == {"do": "renew"}:
                sent.set()

    host = Agent(Hearing(line(**{**HELLO, "lease": {"token": 1, "seconds": 0.04}})), label="p", root="r", silence_s=1)
    before = threading.active_count()
    host.greet()
    assert sent.wait(10)
    host.close()
    deadline_s = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline_s:
        time.sleep(0.001)
    assert threading.active_count() == before


def test_refused_visit_keeps_kind_visit_and_last_lines():
    host = agent(
        line(**HELLO), line(id=1, event="error", kind="died", message="the process was killed", stderr_tail="boom")
    )
    host.greet()
    with pytest.raises(VisitFailed) as caught:
        host.ask("burst", visit="dense 3")
    assert caught.value.kind == "died"
    for part in ("device 'pi'", "burst in visit 'dense 3'", "the process was killed", "boom"):
        assert part in str(caught.value)


def test_upload_that_did_not_arrive_is_a_transfer_error():
    host = agent(line(**HELLO), line(id=1, event="error", kind="corrupt-upload", message="no"))
    host.greet()
    with pytest.raises(TransferError, match="device 'pi': commit failed: no"):
        host.commit("part", "a" * 64)


def test_refusal_outside_a_visit_is_a_device_error():
    host = agent(line(**HELLO), line(id=1, event="error", kind="device-io", message="no"))
    host.greet()
    with pytest.raises(DeviceError, match="device 'pi': have failed: no") as caught:
        host.missing([])
    assert type(caught.value) is DeviceError


def test_silence_is_an_error_that_says_how_long():
    host = agent(line(**HELLO))
    host.greet()
    with pytest.raises(DeviceUnreachable, match=r"fell silent during burst in visit 'v'.*0\.01 s"):
        host.ask("burst", visit="v")


def test_lost_connection_says_what_was_going_on_and_what_was_printed_last():
    host = agent(line(**HELLO), ending="device 'pi': the runner was killed by SIGKILL")
    host.greet()
    with pytest.raises(DeviceUnreachable) as caught:
        host.ask("open", visit="v")
    assert "killed by SIGKILL, during open in visit 'v'" in str(caught.value)
    assert str(caught.value).endswith("Killed")


def test_greeting_is_shown_when_no_runner_follows():
    with pytest.raises(DeviceUnreachable, match="This account is currently not available"):
        agent(b"This account is currently not available.", ending="gone").greet()
