"""A lab's store in PostgreSQL: who is let in, what is told, and tables of other versions."""

import logging

import pytest

import edgedeploy.cli
from edgedeploy.errors import StoreError
from edgedeploy.history import schema
from edgedeploy.history.store import open_store
from tests.store.history_samples import make_run, save, save_series, save_verdict


@pytest.fixture
def database(postgres) -> str:
    return postgres.new_database()


def test_runs_of_several_labs_stay_apart_and_a_run_of_both_counts_once(postgres, database, results, tmp_path):
    shared = save(results, make_run(0))
    other = tmp_path / "other"
    other.mkdir()
    save(other, make_run(0))
    save(other, make_run(1, 0.005))
    with open_store(results, postgres.url(database), lab="bench") as store:
        assert store.push().runs == 1
    with open_store(other, postgres.url(database), lab="desk") as store:
        store.push()
        assert [(row.key.lab, row.runs) for row in store.cells()] == [("bench", 1), ("desk", 1)]
        assert [(row.lab, row.device) for row in store.devices()] == [("bench", "pi5-desk"), ("desk", "pi5-desk")]
    assert shared.exists()


def test_store_is_asked_without_a_folder(postgres, database, results):
    save_series(results, [0.004] * 3)
    with open_store(results, postgres.url(database)) as store:
        store.push()
    with open_store(results / "nowhere", postgres.url(database)) as store:
        assert store.refresh().known == 0
        assert store.cells()[0].runs == 3


def test_password_comes_from_the_environment_or_a_file(postgres, database, results, monkeypatch, tmp_path):
    whole = postgres.url(database)
    secret = whole.split(":")[2].split("@")[0]
    bare = whole.replace(f":{secret}@", "@")
    monkeypatch.setenv("PGPASSWORD", secret)
    open_store(results, bare).close()
    monkeypatch.delenv("PGPASSWORD")
    kept = tmp_path / "pgpass"
    kept.write_text(f"*:*:*:*:{secret}\n")
    kept.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(kept))
    open_store(results, bare).close()


def test_password_is_never_told(postgres, database, results, capsys, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    save(results, make_run(0))
    url = postgres.url(database)
    secret = url.split(":")[2].split("@")[0]
    in_query = postgres.url(database).replace(f":{secret}@", "@") + f"&password={secret}"
    said = ""
    for one in (url, in_query, url.replace(secret, f"{secret}-wrong"), url.replace(database, "no_such_database")):
        for arguments in (["--push"], []):
            edgedeploy.cli.run(["history", "--store", one, "--results", str(results), *arguments])
            told = capsys.readouterr()
            said += told.out + told.err
    assert "sent 1 run" in said
    assert "password authentication failed" in said
    assert "no_such_database" in said
    assert secret not in said
    assert secret not in caplog.text


def test_address_may_come_from_the_environment(postgres, database, results, capsys, monkeypatch):
    save(results, make_run(0))
    monkeypatch.setenv("EDGEDEPLOY_STORE", postgres.url(database))
    monkeypatch.setenv("EDGEDEPLOY_LAB_NAME", "bench")
    assert edgedeploy.cli.run(["history", "--push", "--results", str(results)]) == 0
    assert "as bench" in capsys.readouterr().out
    assert edgedeploy.cli.run(["history", "--results", str(results)]) == 0
    assert "pi5-desk@bench" in capsys.readouterr().out


def test_tables_of_a_newer_edgedeploy_are_refused(postgres, database, results):
    open_store(results, postgres.url(database)).close()
    postgres.say(f"UPDATE {schema.VERSION_TABLE} SET version_num = '9999'", database)
    with pytest.raises(StoreError, match=r"newer edgedeploy.*9999.*upgrade"):
        open_store(results, postgres.url(database))


def test_tables_are_those_that_the_migrations_make(postgres, database, results):
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    postgres.say("CREATE TABLE runs (theirs int)", database)
    with open_store(results, postgres.url(database)) as store, store._database.reading() as connection:
        options = {
            "version_table": schema.VERSION_TABLE,
            "include_name": lambda name, kind, parents: kind != "table" or name.startswith("edgedeploy_"),
        }
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, schema.metadata) == []


def test_reader_without_rights_to_write_may_ask(postgres, database, results):
    save_series(results, [0.004] * 3)
    save_verdict(results, results / "none.json")
    with open_store(results, postgres.url(database)) as store:
        store.push()
    postgres.say(f"CREATE ROLE reader_{database} LOGIN PASSWORD 'only-looking'")
    postgres.say(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader_{database}", database)
    url = postgres.url(database, user=f"reader_{database}", password="only-looking")
    with open_store(results, url) as store:
        assert store.cells()[0].runs == 3
        assert len(store.verdicts()) == 1
        save(results, make_run(7))
        with pytest.raises(StoreError, match="permission denied"):
            store.push()


def test_what_others_wrote_into_the_store_is_not_trusted(postgres, database, results):
    save_verdict(results, results / "none.json")
    with open_store(results, postgres.url(database)) as store:
        store.push()
        (row,) = store.verdicts()
        for document in (b"no zlib", b"", b"\x78\x9c" + b"\x00" * 10):
            postgres.say(f"UPDATE edgedeploy_verdicts SET document = '\\x{document.hex()}'", database)
            with pytest.raises(StoreError, match=r"cannot be read|cut off"):
                store.verdict(row.id)


def test_document_that_unpacks_to_too_much_is_refused(postgres, database, results):
    import zlib

    save_verdict(results, results / "none.json")
    with open_store(results, postgres.url(database)) as store:
        store.push()
        (row,) = store.verdicts()
        packing = zlib.compressobj(9)
        bomb = b"".join(packing.compress(b"\x00" * (1 << 20)) for _ in range(65)) + packing.flush()
        postgres.say(f"UPDATE edgedeploy_verdicts SET document = '\\x{bomb.hex()}'", database)
        with pytest.raises(StoreError, match="larger than any verdict"):
            store.verdict(row.id)
