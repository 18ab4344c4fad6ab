"""The soak's books: what was lost, done twice or badly told is found in the files of runs; sound ones have no problem."""

import copy
import hashlib
import json
from pathlib import Path

import pytest

from tests.soak.ledger import check_files, is_over, planned_release, read_book

SESSION = "5e55"


def visit(block: int, side: int) -> dict[str, object]:
    return {"block": block, "bursts": [[1e-3 + block + side / 10]]}


def block(number: int) -> dict[str, object]:
    taken = [{"side": side, "visit": visit(number, side)} for side in (0, 1)]
    return {"step": "block", "block": number, "taken": taken, "failure": ""}


def step(did: dict[str, object], session: str = SESSION) -> dict[str, object]:
    return {"record": "step", "cell": "one", "session": session, "did": did}


def begun(session: str = SESSION) -> dict[str, object]:
    return step({"step": "begun", "session": session}, session)


def ledger(**states: str) -> dict[str, object]:
    entries = [{"cell": cell, "state": state, "reason": "its fan is broken"} for cell, state in states.items()]
    return {"record": "finished", "ledger": entries}


class Books:
    """A journal and the run files of its one measured cell."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = [self.run_file(side) for side in (0, 1)]
        self.lines = [
            {"record": "planned", "release": "/r.toml", "cells": [{"candidate": "one"}, {"candidate": "two"}]},
            begun(),
            step({"step": "memory", "side": 0}),
            step(block(0)),
            step(block(1)),
            {"record": "stored", "cell": "one", "session": SESSION, "files": [str(path) for path in self.files]},
            {"record": "failed", "cell": "two", "reason": "no kernel"},
            ledger(one="judged", two="failed"),
        ]

    def run_file(self, side: int, session: str = SESSION, blocks: tuple[int, ...] = (0, 1)) -> Path:
        role = ("baseline", "candidate")[side]
        run = {"session": session, "side": role, "visits": [visit(number, side) for number in blocks]}
        data = json.dumps(run).encode()
        path = self.folder / f"time-{hashlib.sha256(data).hexdigest()[:8]}.json"
        path.write_bytes(data)
        return path

    def problems(self) -> str:
        path = self.folder / "journal.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        book = read_book(path)
        return "; ".join([*book.problems, *check_files([book], sorted(self.folder.glob("*.json")))])


@pytest.fixture
def books(tmp_path) -> Books:
    return Books(tmp_path)


def test_sound_books_have_no_problem_and_a_torn_last_line_is_none(books):
    assert books.problems() == ""
    path = books.folder / "journal.jsonl"
    assert is_over(path)
    assert planned_release(path) == "/r.toml"
    with path.open("ab") as stream:
        stream.write(b'{"record":"st')
    assert read_book(path).problems == []


def test_run_that_stopped_in_the_middle_has_pending_cells(books):
    del books.lines[4:]
    for path in books.files:
        path.unlink()
    assert books.problems() == ""
    book = read_book(books.folder / "journal.jsonl")
    assert (book.done, list(book.pending)) == ([], ["one", "two"])
    assert not is_over(books.folder / "journal.jsonl")


CHANGES = {
    "block measured twice": (lambda lines: lines.insert(4, copy.deepcopy(lines[3])), "has the blocks"),
    "block left out": (lambda lines: lines.pop(3), "has the blocks"),
    "cell ended twice": (lambda lines: lines.insert(6, copy.deepcopy(lines[5])), "cell one ended 2 times"),
    "cell stored and failed": (
        lambda lines: lines.insert(6, {"record": "failed", "cell": "one", "reason": "why"}),
        "cell one ended 2 times",
    ),
    "cell went on": (lambda lines: lines.insert(6, step(block(2))), "went on after its end"),
    "cell that nobody asked for": (
        lambda lines: lines.insert(6, {"record": "failed", "cell": "three", "reason": "why"}),
        "nobody asked for the cell three",
    ),
    "cell forgotten at the end": (lambda lines: lines[-1]["ledger"].pop(), "says what became of"),
    "cell told wrongly": (lambda lines: lines.__setitem__(-1, ledger(one="pending", two="failed")), "the run says"),
    "failure without a reason": (lambda lines: lines[6].update(reason=""), "without a reason"),
    "session that never began": (lambda lines: lines.pop(1), "began 0 times"),
    "session that began twice": (lambda lines: lines.insert(3, begun()), "began 2 times"),
    "memory measured too often": (
        lambda lines: lines.__setitem__(slice(2, 3), [step({"step": "memory", "side": 0})] * 4),
        "did memory of side 0 4 times",
    ),
    "side left out of a block": (lambda lines: lines[3]["did"]["taken"].pop(), "visits of the sides [0]"),
    "planned twice": (lambda lines: lines.insert(1, copy.deepcopy(lines[0])), "planned twice"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_journal_that_is_wrong_is_found(books, name):
    change, says = CHANGES[name]
    change(books.lines)
    assert says in books.problems()


def test_run_file_that_is_gone_is_found(books):
    books.files[0].unlink()
    assert "is gone" in books.problems()


def test_run_file_that_is_torn_or_edited_is_found(books):
    data = books.files[0].read_bytes()
    books.files[0].write_bytes(data[:-5])
    assert "cannot be read" in books.problems()
    books.files[0].write_bytes(data + b"\n")
    assert "is not what its name says" in books.problems()


def test_visit_that_is_in_two_runs_or_in_none_is_found(books):
    short = books.run_file(0, blocks=(0,))
    assert "one visit is in two runs" in books.problems()
    books.lines[5]["files"][0] = str(short)
    books.files[0].unlink()
    assert "holds 1 visits that are not those of its journal" in books.problems()


def test_run_of_a_session_that_no_journal_knows_is_found(books):
    books.run_file(0, session="0the5", blocks=(7,))
    assert "which no journal knows" in books.problems()
