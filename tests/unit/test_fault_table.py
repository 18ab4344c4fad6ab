"""The table of faults names tests that exist, and says what these tests demand."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
HEADS = ["fault", "stage", "tier", "what the user sees", "exit code", "test"]
TIERS = {"any", "local", "plain", "hybrid", "VM"}
TEST = re.compile(r"(?P<file>tests/[\w/]+\.py)::(?P<function>\w+)(?:\[(?P<case>.+)\])?")


def table() -> list[list[str]]:
    """Return the cells of each line; a vertical bar within a cell is written with a backslash."""
    lines = [line for line in (ROOT / "edgedeploy" / "FAULTS.md").read_text().splitlines() if line.startswith("|")]
    return [
        [cell.strip().strip("`").replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines
    ]


HEAD, _, *ROWS = table()


def texts_of(node: ast.AST) -> list[str]:
    return [one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)]


def test_table_has_its_columns_and_no_fault_twice():
    assert HEAD == HEADS
    assert len(ROWS) > 40
    assert all(len(row) == len(HEADS) and all(row) for row in ROWS)
    assert len({row[0] for row in ROWS}) == len(ROWS)
    assert {tier for row in ROWS for tier in row[2].split(", ")} <= TIERS
    assert {row[4] for row in ROWS} <= {"0", "1", "2", "3", "4", "130"}


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_row_names_a_test_that_demands_what_the_row_says(row):
    _, _, _, seen, code, test = row
    named = TEST.fullmatch(test)
    assert named, f"{test!r} names no test"
    tree = ast.parse((ROOT / named["file"]).read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == named["function"]]
    assert functions, f"{named['file']} has no {named['function']}"
    re.compile(seen)
    if named["case"] is None:
        assert any(seen in text for text in texts_of(functions[0])), "the test demands something else"
        return
    faults = {
        node.args[0].value: node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Fault"
    }
    assert named["case"] in faults, f"{named['file']} arranges no {named['case']!r}"
    fault = faults[named["case"]]
    assert fault.args[2].value == seen, "the test demands something else"
    codes = [keyword.value.value for keyword in fault.keywords if keyword.arg == "code"]
    assert codes == ([] if code == "3" else [int(code)])


def test_every_arranged_fault_stands_in_the_table():
    named = {row[5] for row in ROWS}
    for file in ("tests/ssh/test_faults.py", "tests/lab/test_faults_plain.py"):
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Fault":
                assert f"{file}::test_fault[{node.args[0].value}]" in named
