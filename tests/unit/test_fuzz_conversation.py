"""Whatever bytes a device sends, the host answers with a DeviceError or a record, in bounded memory and time."""

from __future__ import annotations

import json
import threading
import time
import tracemalloc

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgedeploy.errors import DeviceError, DeviceUnreachable
from edgedeploy.lab import answers, conversation, visits
from edgedeploy.lab.conversation import Agent, Conversation
from edgedeploy.lab.lines import Lines
from edgedeploy.lab.transport import LocalTransport
from edgedeploy.records.device import DeviceFacts
from edgedeploy.records.run import Conditions, LayerTime

FACTS = {
    "hostname": "pi", "machine": "aarch64", "system": "Linux", "kernel": "6.1", "os_name": "Debian", "libc": "glibc 2.36",
    "python": "3.11.2", "cpu_model": "A72", "isa": ["fp"], "cores": 4, "memory_bytes": 4 << 30, "boot_id": "x",
}  # fmt: skip
HELLO = {
    "event": "hello", "protocol": conversation.PROTOCOL, "runner_sha256": "5" * 64, "python": "/usr/bin/python3",
    "facts": FACTS, "lease": {"token": 1, "seconds": 60.0},
}  # fmt: skip
CONDITIONS = {"monotonic_s": 1.0, "governors": ["performance"], "temperatures_celsius": {"soc": 50.0}}
OPENED = {
    "runtime": "r 1", "load_s": 0.1, "first_inference_ns": 5, "warm_up_ns": [4, 3], "is_steady": True,
    "boundary": {"threads": 1, "includes_input_copy": False, "includes_output_copy": False, "batch": 1},
}  # fmt: skip
ANSWERS = {
    "open": OPENED,
    "bursts": {"samples_ns": [[7] * 10] * 10},
    "memory": {"peak_rss_bytes": 5, "import_rss_bytes": 4},
    "profile": {"layers": [{"name": "conv", "kind": "Conv", "p50_s": 0.1}]},
    "conditions": {"conditions": CONDITIONS, "own_core_s": {"a block 0.0": 0.1}},
    "have": {"missing": ["1" * 64], "parts": [], "free_bytes": 1 << 30},
}
SIDE = visits.Side("a", "1" * 64, "2" * 64, {}, "3" * 64)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=12,
)
EVENTS = ("hello", "busy", "waiting", "heartbeat", "progress", "answer", "error", "surprise")
events = st.builds(
    lambda name, fields: {"event": name, **fields},
    st.sampled_from(EVENTS),
    st.dictionaries(
        st.sampled_from(
            ("id", "kind", "message", "text", "done", "total", "holder", "expires_s", "position", "of", "protocol",
             "facts", "lease", "runner_sha256", "python", "missing", "stderr_tail", "event")
        ),
        json_values,
        max_size=6,
    ),
)  # fmt: skip
lines_of_any_kind = st.one_of(
    st.binary(max_size=200),
    json_values.map(lambda value: json.dumps(value).encode()),
    events.map(lambda value: json.dumps(value).encode()),
    st.sampled_from([json.dumps(HELLO).encode(), b'{"event":"heartbeat"}', b'{"event":"answer","id":1}', b""]),
)


class Script:
    """A channel that says given lines, then is silent or at its end."""

    def __init__(self, lines: list[bytes]) -> None:
        self.lines = list(lines)
        self.sent: list[bytes] = []

    def send_line(self, line: bytes) -> None:
        self.sent.append(line)

    def receive_line(self, timeout_s: float) -> bytes | None:
        if not self.lines:
            raise DeviceUnreachable("device 'pi': the process ended with status 1")
        return self.lines.pop(0)

    def stderr_tail(self) -> str:
        return ""

    def close(self) -> None:
        pass


def line(**event: object) -> bytes:
    return json.dumps(event).encode()


def greeted(*lines: bytes) -> Agent:
    agent = Agent(Script([line(**HELLO), *lines]), label="device 'pi'", root="r", silence_s=60.0)
    agent.greet()
    return agent


@given(st.lists(lines_of_any_kind, max_size=12))
@example([b"[" * 100_000])
@example([b'{"event":' + b"[" * 100_000])
@example([b'{"event":"progress","text":' + b"9" * 5000 + b"}"])
@example([b'{"event":"hello","protocol":NaN}'])
@example([b'{"event":"heartbeat","event":"busy","holder":"x"}'])
@example([b'{"event":"busy","holder":"' + b"x" * 1_000_000 + b'"}'])
@example([b'{"event":["hello"]}', b'{"event":{"a":1},"id":null}'])
@example([b"\xff\xfe\x00"])
def test_lines_of_any_bytes_are_events_or_device_errors_of_bounded_length(lines):
    talk = Conversation()
    for said in lines:
        try:
            event = talk.feed(said)
        except DeviceError as error:
            assert len(str(error)) < 20_000
        else:
            assert event is None or type(event).__module__ == "edgedeploy.lab.conversation"
            assert len(repr(event)) < 4 * answers.LONGEST_TEXT * 12 + 20_000
    assert len(talk.greeting) <= conversation.GREETING_LINES


@given(st.lists(lines_of_any_kind, max_size=8))
def test_agent_raises_only_device_errors_whatever_the_order_of_events(lines):
    agent = Agent(Script(lines), label="device 'pi'", root="r", silence_s=60.0)
    try:
        agent.greet()
        agent.missing(["1" * 64])
    except DeviceError as error:
        assert "device 'pi'" in str(error)


def mutated(value):
    """Give a strategy for a JSON value with one part replaced by anything, or left out."""

    @st.composite
    def change(draw):
        copy = json.loads(json.dumps(value))
        place = copy
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                return copy
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], (dict, list)) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            if isinstance(place, dict) and draw(st.booleans()):
                del place[key]
            else:
                place[key] = draw(json_values.filter(_is_json))
            return copy

    return change()


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


@settings(deadline=None)
@given(st.data())
def test_answers_with_a_part_replaced_or_missing_are_device_errors_or_finite_records(data):
    verb = data.draw(st.sampled_from(sorted(ANSWERS.keys() - {"bursts"})))  # which stand in a block, below
    answer = data.draw(mutated(ANSWERS[verb]))
    agent = greeted(line(id=1, event="answer", **answer) if isinstance(answer, dict) else b"0")
    ask = {
        "open": lambda: visits.measure_block(agent, [SIDE], visits.Schedule(), block=0, seed=0),
        "memory": lambda: visits.measure_memory(agent, SIDE),
        "profile": lambda: visits.profile(agent, SIDE),
        "conditions": lambda: agent.conditions(["a block 0.0"]),
        "have": lambda: agent.missing(["1" * 64]),
    }
    try:
        found = ask[verb]()
    except DeviceError as error:
        assert len(str(error)) < 2000
    else:
        msgspec.json.encode(found)  # what was let in can be written down


@given(st.data())
def test_a_whole_block_of_hostile_answers_ends_in_a_device_error_or_a_record(data):
    """The conversation of a visit in its order, each answer possibly changed in one place."""
    order = ["conditions", "open", "bursts", "bursts", "conditions", "close"]
    plain = {**ANSWERS, "close": {"how": "ended"}}
    spoilt = data.draw(st.integers(0, len(order)))  # the last: none is
    said = [data.draw(mutated(plain[verb])) if at == spoilt else plain[verb] for at, verb in enumerate(order)]
    agent = greeted(*(line(id=at + 1, event="answer", **one) for at, one in enumerate(said) if isinstance(one, dict)))
    schedule = visits.Schedule(bursts_per_visit=20)
    try:
        (measured,) = visits.measure_block(agent, [SIDE], schedule, block=0, seed=0)
    except DeviceError:
        assert spoilt < len(order)
        return
    assert msgspec.json.decode(msgspec.json.encode(measured.visit), type=type(measured.visit)) == measured.visit


@pytest.mark.parametrize(
    ("record", "fields"),
    [
        (DeviceFacts, {**FACTS, "hostname": "x" * 100_000}),
        (DeviceFacts, {**FACTS, "isa": ["x"] * 200_000}),
        (DeviceFacts, {**FACTS, "cores": 10**30}),
        (DeviceFacts, {**FACTS, "gpus": [{"name": "g", "memory_bytes": -(2**64)}]}),
        (Conditions, {**CONDITIONS, "governors": ["g" * 9000]}),
        (Conditions, {**CONDITIONS, "temperatures_celsius": {f"zone{n}": 1.0 for n in range(200_000)}}),
        (Conditions, {**CONDITIONS, "free_memory_bytes": 2**63}),
        (tuple[LayerTime, ...], [{"name": "n" * 10_000, "kind": "", "p50_s": 0.1}]),
        (answers.Opened, {**OPENED, "load_s": -1.0}),
        (answers.Opened, {**OPENED, "warm_up_ns": [2**62]}),
        (answers.Memory, {"peak_rss_bytes": -1, "import_rss_bytes": 0}),
        (answers.Written, {"sha256": "../../etc/passwd"}),
    ],
)
def test_record_of_absurd_size_is_refused_in_a_short_sentence(record, fields):
    with pytest.raises(DeviceError, match="not what its protocol allows") as caught:
        answers.read(fields, record, "device 'pi'", "something")
    assert len(str(caught.value)) < 500


def test_hello_of_absurd_size_is_refused():
    facts = {**FACTS, "cpu_model": "x" * 1_000_000}
    with pytest.raises(DeviceError, match="incomplete 'hello' event"):
        Conversation().feed(line(**{**HELLO, "facts": facts}))


def test_endless_heartbeats_do_not_hold_the_host_beyond_the_commands_own_time(monkeypatch):
    class Lively(Script):
        def receive_line(self, timeout_s: float) -> bytes:
            now[0] += 2.0
            return b'{"event":"heartbeat"}'

    now = [0.0]
    agent = greeted()
    agent._channel = Lively([])
    monkeypatch.setattr(conversation.time, "monotonic", lambda: now[0])
    with pytest.raises(DeviceUnreachable, match="shows signs of life but never answers"):
        agent.ask("open", visit="a", timeout_s=300.0)
    assert 300 < now[0] < 400


@given(st.lists(st.binary(max_size=40), max_size=30), st.integers(1, 60))
def test_lines_come_out_as_they_went_in_however_the_stream_was_cut(parts, longest):
    lines = Lines(longest=longest, waiting=1 << 20)
    for part in parts:
        lines.feed(part)
    lines.end()
    whole = b"".join(parts).split(b"\n")
    expected = []
    for said in whole[:-1]:
        if len(said) > longest:
            break
        expected.append(said)
    found = []
    with pytest.raises(EOFError):
        while (said := lines.get(0.0)) is not None:
            found.append(said)
    assert found == expected
    assert bool(lines.problem) == any(len(said) > longest for said in whole)


def test_reader_that_lags_holds_the_sender_back_and_the_end_lets_it_go():
    lines = Lines(waiting=10_000)
    fed = []

    def flood() -> None:
        for _ in range(1000):
            lines.feed(b"x" * 1000 + b"\n")
            fed.append(1)

    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    deadline_s = time.monotonic() + 10
    while lines._waiting_bytes <= 10_000 and time.monotonic() < deadline_s:
        thread.join(0.001)
    assert thread.is_alive()
    assert len(fed) < 12
    assert lines.get(1.0) == b"x" * 1000
    lines.end()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    "flood", ["yes x | tr -d '\\n'", "yes", "yes >&2 & yes | tr -d '\\n' >&2"], ids=["no newline", "lines", "stderr"]
)
def test_process_that_floods_us_takes_bounded_memory(flood, tmp_path):
    tracemalloc.start()
    channel = LocalTransport("flood").open_channel(["sh", "-c", f"{flood} & sleep 0.4; kill $(jobs -p)"])
    agent = Agent(channel, label="device 'flood'", root=str(tmp_path), silence_s=30.0)
    try:
        with pytest.raises(DeviceError) as caught:
            agent.greet()
        assert len(str(caught.value)) < 200_000
        assert tracemalloc.get_traced_memory()[1] < 160 << 20
    finally:
        tracemalloc.stop()
        channel.close()
