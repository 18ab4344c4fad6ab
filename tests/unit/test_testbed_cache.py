"""What keeps devices for tests apart and whole: names by content, whole files, folders of the dead, processes of the dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.testbed.board import wait_until
from tests.testbed.cache import RunFolder, TestbedError, cache, digest, made_whole
from tests.testbed.kept import Kept, name_of, state_of

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEDEPLOY_TESTBED_DIR", str(tmp_path / "testbed"))


def test_name_tells_parts_apart_that_join_to_the_same_text():
    assert digest("ab", "c") != digest("a", "bc")
    assert digest("ab", b"c") == digest("ab", "c")


def test_what_was_not_made_whole_does_not_get_its_name():
    path = cache() / "made"
    with pytest.raises(KeyError), made_whole(path) as part:
        part.write_text("half")
        raise KeyError
    assert not path.exists()
    with made_whole(path) as part:
        assert not part.exists()
        part.write_text("whole")
    assert path.read_text() == "whole"


def test_folder_of_a_killed_process_is_swept_and_that_of_a_living_one_stays():
    code = "import os; from tests.testbed.cache import RunFolder; print(RunFolder('dead').path, flush=True); os.abort()"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False).stdout
    dead = Path(said.strip())
    assert dead.is_dir()
    living = RunFolder("living")
    assert not dead.exists()
    other = RunFolder("other")
    assert living.path.is_dir()
    for folder in (living, other, other):
        folder.close()
    assert not living.path.exists()


def test_program_is_killed_when_it_is_stopped(tmp_path):
    kept = Kept(["sleep", "600"], tmp_path / "log")
    assert kept.is_alive()
    kept.stop()
    assert not kept.is_alive()
    kept.stop()


@pytest.mark.parametrize("whom", ["owner", "keeper"])
def test_program_is_killed_with_its_owner_and_with_its_keeper(tmp_path, whom):
    code = (
        "import sys, time; from pathlib import Path; from tests.testbed.kept import Kept\n"
        "kept = Kept(['sleep', '600'], Path(sys.argv[1]))\n"
        "print(kept.pid, kept._keeper.pid, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as owner:
        assert owner.stdout is not None
        program, keeper = map(int, owner.stdout.readline().split())
        try:
            wait_until(lambda: name_of(program) == "sleep", timeout_s=20, what=lambda: "it does not run")
            os.kill(owner.pid if whom == "owner" else keeper, signal.SIGKILL)
            wait_until(lambda: state_of(program) in {"", "Z"}, timeout_s=20, what=lambda: "it lives")
        finally:
            owner.kill()


def test_program_that_ends_by_itself_is_seen_with_what_it_said(tmp_path):
    kept = Kept(["sh", "-c", "echo oh no; exit 3"], tmp_path / "log")
    wait_until(lambda: not kept.is_alive(), timeout_s=20, what=lambda: "it lives")
    assert kept.said() == "oh no"
    kept.stop()


def test_wait_that_is_in_vain_says_for_what():
    with pytest.raises(TestbedError, match=r"the sky is up, not within 0.02 s"):
        wait_until(lambda: False, timeout_s=0.02, what=lambda: "the sky is up")
