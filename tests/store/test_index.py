"""The index of a folder: derived, and made anew whenever it cannot be used."""

import json
import sqlite3

import pytest

import edgedeploy.cli
from edgedeploy.errors import UsageError
from edgedeploy.history import schema
from edgedeploy.history.store import index_path, open_store
from tests.store.history_samples import make_run, save, save_series, save_verdict


def _closed(results, **options):
    with open_store(results, **options) as store:
        brought = store.refresh()
        return brought, [row.runs for row in store.cells()]


def test_index_lies_in_the_cache_and_leaves_nothing_with_the_results(results, tmp_path):
    save(results, make_run(0))
    before = sorted(results.rglob("*"))
    brought, _ = _closed(results)
    assert brought.rebuilt == "there was none"
    assert sorted(results.rglob("*")) == before
    assert index_path(results).is_relative_to(tmp_path / "cache")


@pytest.mark.parametrize("spoil", ["nonsense", "cut off", "middle", "other version", "deleted"])
def test_index_that_cannot_be_used_is_made_anew(results, spoil):
    save_series(results, [0.004] * 50)
    _closed(results)
    path = index_path(results)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    data = path.read_bytes()
    if spoil == "nonsense":
        path.write_bytes(b"this is no database" * 1000)
    elif spoil == "cut off":
        path.write_bytes(data[: len(data) // 2])
    elif spoil == "middle":
        path.write_bytes(data[:8192] + b"\xff" * (len(data) - 8192))
    elif spoil == "other version":
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA user_version = 7")
        connection.close()
    else:
        path.unlink()
    brought, runs = _closed(results)
    expected = {"other version": "another version", "deleted": "there was none"}.get(spoil, "damaged")
    assert expected in brought.rebuilt
    assert (brought.runs, runs) == (50, [50])
    assert _closed(results)[0].rebuilt == ""


def test_index_is_made_anew_when_asked(results):
    save_series(results, [0.004] * 3)
    _closed(results)
    brought, _ = _closed(results, rebuild=True)
    assert brought.runs == 3
    assert "asked" in brought.rebuilt


def test_tables_are_those_that_the_migrations_make(results):
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    from edgedeploy.history.database import _script

    _, script = _script()
    assert script.get_current_head() == schema.HEAD
    save(results, make_run(0))
    with open_store(results) as store, store._database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": schema.VERSION_TABLE})
        assert compare_metadata(context, schema.metadata) == []


def test_folder_that_is_not_there_is_a_sentence(results):
    with pytest.raises(UsageError, match="no folder"):
        open_store(results / "nowhere")


# ---------------------------------------------------------------- the command


def _said(capsys, *arguments: str) -> tuple[int, str, str]:
    code = edgedeploy.cli.run(["history", *arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_command_lists_cells_and_shows_one(results, capsys, tmp_path):
    paths = [save(results, make_run(number, 0.004 + 0.00001 * (number % 4))) for number in range(10)]
    paths += [
        save(results, make_run(number, 0.005 + 0.00001 * (number % 4), sha256="cd" * 32)) for number in range(10, 16)
    ]
    save_verdict(results, paths[-1], number=16)
    code, out, err = _said(capsys, "--results", str(results))
    assert code == 0
    assert "there was none" in err
    assert "demo-int8" in out and "+25" in out and "artifact" in out and "PASS" in out
    page = tmp_path / "history.html"
    code, out, _ = _said(capsys, "demo-int8", "--results", str(results), "--html", str(page), "-q")
    assert code == 0
    assert "▲" in out and "Changes of level" in out and "cdcdcdcd" in out
    assert page.read_text().count("<circle") == 16
    code, out, _ = _said(capsys, "demo-int8", "--results", str(results), "--json", "-q")
    document = json.loads(out)
    assert document["format"] == "edgedeploy.trend/1"
    assert [change["index"] for change in document["changes"]] == [10]
    code, out, _ = _said(capsys, "--results", str(results), "--json", "-q", "--metric", "artifact_size")
    assert json.loads(out)["cells"][0]["metric"] == "artifact_size"


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["nothing-of-this-name"], 2, "no cell is called"),
        (["--device", "pi9"], 2, "pi9"),
        (["--metric", "p50"], 2, "p50"),
        (["--push"], 2, "no shared store"),
        (["--store", "mysql://u:secret@h/d"], 2, "PostgreSQL"),
        (["--store", "not a url with secret"], 2, "not a URL"),
        (["--store", "postgresql://u:secret@127.0.0.1:1/d"], 3, "could not be read"),
        (["--store", "postgresql://u@h/d", "--rebuild"], 2, "--rebuild"),
    ],
)
def test_what_cannot_be_done_is_a_sentence_without_a_secret(results, capsys, arguments, code, sentence):
    save(results, make_run(0))
    found, out, err = _said(capsys, "--results", str(results), *arguments)
    assert found == code
    assert sentence in err
    assert "secret" not in out + err
    assert "Traceback" not in err


def test_empty_folder_is_no_error(results, capsys):
    code, out, _ = _said(capsys, "--results", str(results))
    assert (code, out) == (0, "no runs yet\n")
