"""Whether nothing was lost and nothing done twice, from the files that runs left: what programs said is not asked.

Pure but for reading: journals are lines of JSON and runs are files of JSON here, without a word of edgedeploy's own readers.
"""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS_ONCE_A_SIDE = ("golden", "outputs", "operators")
MOST_MEMORY_VISITS = 3


@dataclass
class Book:
    """What became of the cells of one journal, and what is wrong with it.

    Attributes:
        sessions: every session that began.
        visits: (session, side) → digests of its visits as they were written down, in their order.
        files: run file → the session whose it is.
    """

    name: str
    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    pending: dict[str, str] = field(default_factory=dict)
    sessions: set[str] = field(default_factory=set)
    visits: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def complain(self, text: str) -> None:
        """Note what is wrong."""
        self.problems.append(f"journal {self.name}: {text}")


def whole_lines(path: Path) -> list[Any]:
    """Return the records of a journal; the last line may be torn, for whoever wrote it was killed.

    Raises:
        ValueError: another line is no JSON.
    """
    data = path.read_bytes()
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def planned_release(path: Path) -> str:
    """Return the release file that a journal is of; "" where not even its first line is whole."""
    with path.open("rb") as stream:
        first = stream.readline()
    return str(json.loads(first)["release"]) if first.endswith(b"\n") else ""


def is_over(path: Path) -> bool:
    """Say whether a journal's last line ends the run with nothing pending."""
    lines = whole_lines(path)
    if not lines or lines[-1]["record"] != "finished":
        return False
    return all(entry["state"] != "pending" for entry in lines[-1]["ledger"])


def read_book(path: Path) -> Book:
    """Read one journal and see that each of its cells is done once, failed with a reason, or pending with one."""
    book = Book(path.stem)
    try:
        lines = whole_lines(path)
    except ValueError as error:
        book.complain(f"a line is no JSON: {error}")
        return book
    if not lines:
        return book
    if lines[0].get("record") != "planned":
        book.complain("the first line does not say what was planned")
        return book
    asked = [cell["candidate"] for cell in lines[0]["cells"]]
    ended = {kind: collections.defaultdict(list) for kind in ("stored", "failed")}
    steps: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    cell_of: dict[str, str] = {}
    for line in lines[1:]:
        record, cell = line["record"], line.get("cell", "")
        if record == "planned":
            book.complain("it was planned twice")
        if cell and record != "built" and cell not in asked:
            book.complain(f"nobody asked for the cell {cell}")
        if record in ended:
            ended[record][cell].append(line)
        if record == "step":
            if cell_of.setdefault(line["session"], cell) != cell:
                book.complain(f"session {line['session']} is of two cells")
            if ended["stored"][cell] or ended["failed"][cell]:
                book.complain(f"cell {cell} went on after its end")
            steps[line["session"]].append(line["did"])
        if record in ("stored", "abandoned"):
            book.files.update(dict.fromkeys(line["files"], line["session"]))
    for session, did in steps.items():
        _check_session(book, session, did)
    _check_cells(book, asked, ended, lines[-1])
    for line in (one for lines_of in ended["stored"].values() for one in lines_of):
        if line["session"] not in book.sessions:
            book.complain(f"the stored session {line['session']} never began")
    return book


def _check_cells(book: Book, asked: list[str], ended: Mapping[str, Mapping[str, list[Any]]], last: Any) -> None:
    said = {entry["cell"]: entry for entry in last["ledger"]} if last["record"] == "finished" else {}
    for cell in asked:
        stored, failed = ended["stored"][cell], ended["failed"][cell]
        if len(stored) + len(failed) > 1:
            book.complain(f"cell {cell} ended {len(stored) + len(failed)} times")
        if stored:
            state = "judged"
            book.done.append(cell)
        elif failed:
            state = "failed"
            book.failed[cell] = failed[0]["reason"]
        else:
            state = "pending"
            book.pending[cell] = said[cell]["reason"] if cell in said else "the run stopped in the middle"
        if not {**book.failed, **book.pending}.get(cell, "a reason"):
            book.complain(f"cell {cell} is {state} without a reason")
        if said and (cell not in said or said[cell]["state"] != state):
            book.complain(f"cell {cell} is {state}, and the run says {said.get(cell, {}).get('state', 'nothing')}")
    if said and list(said) != asked:
        book.complain(f"{asked} were asked for, and the run says what became of {list(said)}")


def _check_session(book: Book, session: str, did: list[dict[str, Any]]) -> None:
    """See that a session did each thing once, block after block."""
    begun = [step for step in did if step["step"] == "begun"]
    if len(begun) != 1 or did[0] is not begun[0] or begun[0]["session"] != session:
        book.complain(f"session {session} began {len(begun)} times, or not at its beginning")
        return
    book.sessions.add(session)
    blocks = [step["block"] for step in did if step["step"] == "block"]
    if blocks != list(range(len(blocks))):
        book.complain(f"session {session} has the blocks {blocks}")
    for kind in (*STEPS_ONCE_A_SIDE, "memory"):
        most = MOST_MEMORY_VISITS if kind == "memory" else 1
        counts = collections.Counter(step["side"] for step in did if step["step"] == kind)
        for side, count in counts.items():
            if count > most:
                book.complain(f"session {session} did {kind} of side {side} {count} times")
    for step in (one for one in did if one["step"] == "block"):
        sides = [taken["side"] for taken in step["taken"]]
        if len(set(sides)) != len(sides) or (not step["failure"] and sorted(sides) != [0, 1]):
            book.complain(f"session {session} has in block {step['block']} visits of the sides {sides}")
        for taken in step["taken"]:
            book.visits.setdefault((session, taken["side"]), []).append(digest(taken["visit"]))


def digest(record: object) -> str:
    """Return what a record says as one word."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def check_files(books: Iterable[Book], files: Iterable[Path]) -> list[str]:
    """See that stored runs are whole, are what journals say, and hold no visit that another one holds too.

    Args:
        books: of all journals that write to the folder.
        files: every run file in it.

    Returns:
        What is wrong.
    """
    problems: list[str] = []
    books = list(books)
    sessions = {session: book for book in books for session in book.sessions}
    named = {str(Path(file).absolute()): (book, session) for book in books for file, session in book.files.items()}
    holder: dict[str, Path] = {}
    seen = set()
    for path in files:
        data = path.read_bytes()
        seen.add(str(path.absolute()))
        try:
            run = json.loads(data)
        except ValueError as error:
            problems.append(f"{path} cannot be read: {error}")
            continue
        if not path.stem.endswith("-" + hashlib.sha256(data).hexdigest()[:8]):
            problems.append(f"{path} is not what its name says")
        book = sessions.get(run["session"])
        if book is None:
            problems.append(f"{path} is of session {run['session']}, which no journal knows")
            continue
        visits = [digest(visit) for visit in run["visits"]]
        side = {"baseline": 0, "candidate": 1}[run["side"]]
        if str(path.absolute()) in named and visits != book.visits.get((run["session"], side), []):
            problems.append(f"{path} holds {len(visits)} visits that are not those of its journal {book.name}")
        for visit in visits:
            if (other := holder.setdefault(visit, path)) != path:
                problems.append(f"one visit is in two runs: {other} and {path}")
    problems += [f"journal {book.name}: {path} is gone" for path, (book, _) in named.items() if path not in seen]
    return problems
