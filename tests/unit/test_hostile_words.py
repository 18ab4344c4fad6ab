"""Names with quotes, line breaks, $(…) and leading dashes reach a program as they are, in both directions."""

from __future__ import annotations

import shlex
import subprocess

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgedeploy.errors import DocumentError, UsageError
from edgedeploy.lab import inventory, ssh
from edgedeploy.lab.answers import clipped, told, visible
from edgedeploy.lab.ssh import SshTransport
from edgedeploy.lab.transport import LocalTransport
from edgedeploy.records.device import Device
from edgedeploy.render.figures import printable

HEAD = 'format = "edgedeploy.lab/1"\n'
NASTY = "$(touch pwned) `id` 'x' \"y\" ; & | > < * ? ~ # \\ \n\r\t {a,b} !! -rf -- %s \x1b[31m é ☃ \U0001f4a9"
words = st.one_of(
    st.text(alphabet=st.sampled_from(list("$(){}'\"`\\;&|<>*?~#!%=-\n\r\t a\x1b\x7f☃")), max_size=12),
    st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20),
    st.sampled_from(["", "-", "--", "-c", "-n", "'", "\\", "\n", "$HOME", NASTY]),
)


def as_sshd_would(argv: list[str]) -> list[bytes]:
    """Give the text that we hand to sshd to a login shell, as it does, and return the words that arrive."""
    done = subprocess.run(
        ["sh", "-c", ssh._START + shlex.join(argv)], capture_output=True, check=True, stdin=subprocess.DEVNULL
    )
    return done.stdout.split(b"\0")[:-1]


@settings(deadline=None, max_examples=40)
@given(st.lists(words, min_size=1, max_size=30))
@example([NASTY])
def test_words_arrive_over_a_login_shell_as_they_are(names):
    argv = ["printf", "%s\\0", *names]
    assert as_sshd_would(argv) == [name.encode("utf-8", "surrogateescape") for name in names]


@settings(deadline=None, max_examples=25)
@given(st.lists(words, min_size=1, max_size=20))
def test_words_arrive_on_this_machine_as_they_are(names):
    done = LocalTransport("local").run(["printf", "%s\\0", *names], timeout_s=20)
    assert done.stdout.split(b"\0")[:-1] == [name.encode("utf-8", "surrogateescape") for name in names]


@pytest.mark.parametrize("act", ["run", "open_channel"])
def test_nul_in_a_word_is_refused_before_anything_is_started(act, tmp_path):
    device = Device(transport="ssh", host="127.0.0.1", known_hosts=str(tmp_path / "none"))
    for way in (LocalTransport("board"), SshTransport("board", device)):
        with pytest.raises(UsageError, match=r"'a\\x00b' has a NUL in it"):
            if act == "run":
                way.run(["echo", "a\0b"], timeout_s=1)
            else:
                way.open_channel(["echo", "a\0b"])


@pytest.mark.parametrize("key", ["host", "user", "root", "python", "lease_dir", "known_hosts", "key", "jump"])
@pytest.mark.parametrize("value", ["a\\u0000b", "a\\nProxyCommand id", "-oProxyCommand=id", "\\u001b[31m"])
def test_word_of_the_lab_that_is_no_word_is_refused_with_its_line(key, value, tmp_path):
    path = tmp_path / "lab.toml"
    host = "" if key == "host" else 'host = "h"\n'
    path.write_text(f'{HEAD}[devices.pi]\ntransport = "ssh"\n{host}{key} = "{value}"\n')
    line = 4 if key == "host" else 5
    with pytest.raises(DocumentError, match=rf"device 'pi' in .*line {line}: {key} ") as caught:
        inventory.load_lab(path)
    assert "\x1b" not in str(caught.value)


@given(st.text(max_size=400))
@example(NASTY)
@example("\ud800\x9b31m")
def test_what_a_device_says_never_commands_a_terminal(text):
    for shown in (visible(text), told(text), clipped(text), printable(text)):
        assert not any(letter < " " and letter not in "\n\t" for letter in shown)
        assert not any("\x7f" <= letter <= "\x9f" for letter in shown)
        shown.encode("utf-8")
