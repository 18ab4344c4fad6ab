"""A journal is read as far as it is whole, and says which run is to be gone on with."""

import os
import threading
from pathlib import Path

import pytest

from edgedeploy import journal
from edgedeploy.errors import DocumentError, UsageError
from edgedeploy.journal import CellBuilt, CellFailed, Finished, Planned, Resumed
from edgedeploy.records.verdict import LedgerEntry


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EDGEDEPLOY_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def planned(release: Path) -> Planned:
    return Planned(
        started_utc="2026-01-01T00:00:00Z",
        release=str(release),
        release_sha256="0" * 64,
        lab="",
        results="results",
        cells=(),
        edgedeploy="1",
        code={},
    )


def built(cell: str) -> CellBuilt:
    return CellBuilt(cell=cell, folder="/f", sha256="1" * 64)


def finished(*states: str) -> Finished:
    return Finished(
        utc="x",
        decision="INCONCLUSIVE",
        ledger=tuple(LedgerEntry(cell=f"c{n}", state=state) for n, state in enumerate(states)),
    )


def begun(release: Path) -> journal.Journal:
    one = journal.start()
    one.append(planned(release))
    return one


def test_every_prefix_of_a_journal_reads_as_its_whole_lines(tmp_path):
    one = begun(tmp_path / "r.toml")
    one.append(built("a"))
    one.append(built("ä long name"))
    text = one.path.read_bytes()
    lines = one.lines()
    for length in range(len(text) + 1):
        one.path.write_bytes(text[:length])
        assert one.lines() == lines[: text[:length].count(b"\n")]


def test_line_after_a_torn_one_is_whole(tmp_path):
    one = begun(tmp_path / "r.toml")
    with one.path.open("ab") as stream:
        stream.write(b'{"record":"built","cell":"to')
    one.append(built("b"))
    assert [line.cell for line in one.lines()[1:]] == ["b"]


def test_torn_line_of_megabytes_is_cut_off(tmp_path):
    one = begun(tmp_path / "r.toml")
    with one.path.open("ab") as stream:
        stream.write(b"x" * 300_000)
    one.append(built("b"))
    assert len(one.lines()) == 2


def test_damage_in_the_middle_is_a_sentence(tmp_path):
    one = begun(tmp_path / "r.toml")
    one.append(built("a"))
    one.append(built("b"))
    lines = one.path.read_bytes().splitlines(keepends=True)
    one.path.write_bytes(lines[0] + b"{}\n" + lines[2])
    with pytest.raises(DocumentError, match="line 2 of the journal"):
        journal.history(one)


def test_lines_of_many_threads_do_not_mix(tmp_path):
    one = begun(tmp_path / "r.toml")
    threads = [
        threading.Thread(target=lambda name=name: [one.append(built(f"{name}-{n}")) for n in range(10)])
        for name in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cells = [line.cell for line in one.lines()[1:]]
    assert sorted(cells) == sorted(f"{name}-{n}" for name in "abcd" for n in range(10))
    assert [cell for cell in cells if cell[0] == "a"] == [f"a-{n}" for n in range(10)]


def test_only_runs_of_this_file_that_stopped_in_the_middle_are_unfinished(tmp_path):
    mine, other = tmp_path / "mine.toml", tmp_path / "other.toml"
    stopped, pending, complete, elsewhere, going = (begun(path) for path in (mine, mine, mine, other, mine))
    pending.append(finished("judged", "pending"))
    complete.append(finished("judged", "failed"))
    with going.owned():
        found = {one.name for one in journal.unfinished(mine)}
    assert found == {stopped.name, pending.name}
    assert going.name in {one.name for one in journal.unfinished(mine)}
    assert elsewhere.name not in {one.name for one in journal.unfinished(mine)}


def test_run_that_goes_on_is_unfinished_again_until_it_ends(tmp_path):
    one = begun(tmp_path / "r.toml")
    one.append(finished("pending"))
    one.append(Resumed(utc="y"))
    assert journal.history(one).finished is None
    one.append(finished("failed"))
    assert journal.history(one).is_over


def test_run_is_taken_by_one_process_at_a_time(tmp_path):
    one = begun(tmp_path / "r.toml")
    with one.owned(), pytest.raises(UsageError, match="going on in another process"), one.owned():
        raise AssertionError("it was taken twice")
    assert not one.is_owned()


def test_unknown_name_tells_the_known_ones(tmp_path):
    one = begun(tmp_path / "r.toml")
    with pytest.raises(UsageError, match=one.name):
        journal.named("20200101T000000Z-000000")
    with pytest.raises(UsageError, match="there is no run"):
        journal.named("../../etc/passwd")


def test_old_journals_are_deleted_and_those_that_matter_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "KEPT_FINISHED", 2)
    release = tmp_path / "r.toml"
    done = [begun(release) for _ in range(4)]
    for number, one in enumerate(done):
        one.append(finished("judged"))
        name = one.path.with_name(f"20260101T00000{number}Z-00000{number}.jsonl")
        one.path.rename(name)
    forgotten, young = begun(release), begun(release)
    os.utime(forgotten.path, (1.0, 1.0))
    journal.prune()
    left = {one.name for one in journal.journals()}
    assert left == {"20260101T000002Z-000002", "20260101T000003Z-000003", young.name}


def test_last_word_on_a_cell_counts(tmp_path):
    one = begun(tmp_path / "r.toml")
    one.append(built("a"))
    one.append(CellFailed(cell="a", kind="ModelError", reason="no"))
    said = journal.history(one)
    assert said.failed["a"].reason == "no"
    assert said.built["a", ""].sha256 == "1" * 64
