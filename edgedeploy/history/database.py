"""The database behind the history: SQLite for one folder, or a lab's PostgreSQL."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedeploy.errors import BackendMissing, StoreError, UsageError
from edgedeploy.render.figures import one_line

if TYPE_CHECKING:
    import sqlalchemy as sa
    from alembic.runtime.migration import MigrationContext

# A writer of a batch is done in a fraction of a second; one that waits longer waits for something that hangs.
_LONGEST_WAIT_S = 60
_CONNECT_TIMEOUT_S = 10
# Any number will do, if only all of us take the same: "edgedepl" in ASCII.
_MIGRATION_LOCK = 0x6564676564657070
_TOLD_CHARACTERS = 400


class Database:
    """An open database; connections are made when they are needed, also from several threads.

    Attributes:
        where: its place in words, without a password.
        is_shared: whether others write in it too, from other machines.
    """

    def __init__(self, engine: sa.Engine, where: str, *, is_shared: bool, secret: str = "") -> None:
        self.where, self.is_shared = where, is_shared
        self._engine, self._secret = engine, secret

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """Give a connection whose questions all see one state.

        Raises:
            StoreError: the database failed.
        """
        # One moment for several questions; SQLite's readers have that anyway.
        options: dict[str, Any] = {"isolation_level": "REPEATABLE READ"} if self.is_shared else {}
        with (
            self._sentences("read"),
            self._engine.connect().execution_options(**options) as connection,
            connection.begin(),
        ):
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """Give a connection whose changes come about all together when the block ends, or none of them.

        Raises:
            StoreError: the database failed.
        """
        with (
            self._sentences("written"),
            self._engine.connect().execution_options(edgedeploy_writes=True) as connection,
            connection.begin(),
        ):
            yield connection

    def add(self, connection: sa.Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
        """Insert rows; one whose primary key is there already stays as it is."""
        if rows:
            connection.execute(self._insert(table).on_conflict_do_nothing(), list(rows))

    def put(self, connection: sa.Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
        """Insert rows; one whose primary key is there already takes the new values."""
        if rows:
            insert = self._insert(table)
            keys = [column.name for column in table.primary_key]
            values = {column.name: insert.excluded[column.name] for column in table.columns if column.name not in keys}
            connection.execute(insert.on_conflict_do_update(index_elements=keys, set_=values), list(rows))

    def _insert(self, table: sa.Table) -> Any:
        if self._engine.dialect.name == "postgresql":
            from sqlalchemy.dialects import postgresql

            return postgresql.insert(table)
        from sqlalchemy.dialects import sqlite

        return sqlite.insert(table)

    @contextlib.contextmanager
    def _sentences(self, done: str) -> Iterator[None]:
        import sqlalchemy as sa

        try:
            yield
        except sa.exc.SQLAlchemyError as error:
            raise StoreError(f"{self.where} could not be {done}: {self.said(error)}") from None

    def said(self, error: BaseException) -> str:
        """Return what a database complained of, in one line, without the password."""
        text = one_line(str(getattr(error, "orig", None) or error))
        if len(self._secret) >= 3:
            text = text.replace(self._secret, "***")
        then = "" if self.is_shared else "; make it anew with: edgedeploy history --rebuild"
        return text[:_TOLD_CHARACTERS] + then

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()


def demand_libraries(*, is_shared: bool) -> None:
    """Refuse by a sentence what is not installed here.

    Raises:
        BackendMissing: naming the extra.
    """
    extra = "postgres" if is_shared else "history"
    for package in ("sqlalchemy", "alembic", "ruptures", *(["psycopg"] if is_shared else [])):
        if importlib.util.find_spec(package) is None:
            raise BackendMissing(
                f"the history needs {package}, which is not installed here; pip install 'edgedeploy[{extra}]'"
            )


# ---------------------------------------------------------------- SQLite


def open_index(path: Path, *, rebuild: bool = False) -> tuple[Database, str]:
    """Open the index of one folder; one that cannot be used is made anew, for the files that it was made of are there.

    Returns:
        (database, why it is new): "" where what was there is used.

    Raises:
        StoreError: the place cannot be used at all.
    """
    import sqlalchemy as sa

    path.parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(
        sa.URL.create("sqlite+pysqlite", database=str(path)),
        hide_parameters=True,
        connect_args={"timeout": _LONGEST_WAIT_S},
    )
    sa.event.listen(engine, "connect", _set_up_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    database = Database(engine, f"the index {path}", is_shared=False)
    # Two processes that find it unusable must not both make it anew, each under the other's feet.
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        why = _unusable(path) or ("you asked for it" if rebuild else "")
        if why:
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            with database.writing() as connection:
                _migrate(connection)
                connection.exec_driver_sql(f"PRAGMA user_version = {_stamp()}")
    return database, why


def _stamp() -> int:
    """Return what an index must be marked with: its tables and what was read into them are of our making."""
    from edgedeploy.history.schema import HEAD, READER

    return READER * 10_000 + int(HEAD)


def _unusable(path: Path) -> str:
    """Return why an index must be made anew, "" where it need not."""
    if not path.exists():
        return "there was none"
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=_LONGEST_WAIT_S)) as connection:
            (stamp,) = connection.execute("PRAGMA user_version").fetchone()
            if stamp != _stamp():
                return "it was made by another version of edgedeploy"
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            return "" if found == "ok" else "it was damaged"
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return "it was damaged"
        raise StoreError(
            f"the index {path} cannot be opened: {error}; give another place for it with EDGEDEPLOY_CACHE_DIR"
        ) from error


def _set_up_sqlite(connection: Any, record: object) -> None:
    # Python's own handling of transactions begins none before DDL, and knows one kind only.
    connection.isolation_level = None
    # Readers do not wait for a writer; what a power failure costs is read again from the files.
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")


def _begin_sqlite(connection: sa.Connection) -> None:
    # A transaction that reads first and writes then could not wait for another writer any more.
    writes = connection.get_execution_options().get("edgedeploy_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


# ---------------------------------------------------------------- PostgreSQL


def open_shared(url: str) -> Database:
    """Open a lab's store, making or upgrading its tables where that is needed.

    Args:
        url: "postgresql://user@host/database"; a password may stand in it, in PGPASSWORD or in ~/.pgpass.

    Raises:
        UsageError: no such URL.
        StoreError: it cannot be reached, does not let us in, or was made by a newer edgedeploy.
    """
    import sqlalchemy as sa

    try:
        given = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):  # the text may hold a password: it is not repeated
        raise UsageError(
            "the store's address is not a URL such as postgresql://user@host/database (--store, EDGEDEPLOY_STORE)"
        ) from None
    if given.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise UsageError(
            f"a shared store is kept in PostgreSQL, and its address begins with {one_line(given.drivername)[:40]}://; "
            f"give postgresql://user@host/database"
        )
    secret = str(given.password or given.query.get("password") or "")
    if "password" in given.query:
        given = given.difference_update_query(["password"]).set(password=secret)
    given = given.set(drivername="postgresql+psycopg")
    engine = sa.create_engine(given, hide_parameters=True, pool_pre_ping=True, connect_args=_terms(given.query))
    database = Database(engine, _place(given), is_shared=True, secret=secret)
    try:
        _bring_up_to_date(database)
    except BaseException:
        database.close()
        raise
    return database


def _terms(query: Mapping[str, object]) -> dict[str, Any]:
    """Return how a connection is made, where its URL does not say."""
    terms: dict[str, Any] = {
        "connect_timeout": _CONNECT_TIMEOUT_S,
        "application_name": "edgedeploy",
        "options": f"-c lock_timeout={_LONGEST_WAIT_S}s",
    }
    return {name: value for name, value in terms.items() if name not in query}


def _place(url: sa.URL) -> str:
    """Return a store's address without what could be a secret: its password and its query."""
    user = f"{one_line(url.username)}@" if url.username else ""
    port = f":{url.port}" if url.port else ""
    return f"the store postgresql://{user}{one_line(url.host or '')}{port}/{one_line(url.database or '')}"


def _bring_up_to_date(database: Database) -> None:
    from edgedeploy.history.schema import HEAD

    with database.reading() as connection:
        found = _revision(connection)
    if found == HEAD:
        return
    if found and found not in _known_revisions():
        raise StoreError(
            f"{database.where} was made by a newer edgedeploy (its tables are at {one_line(found)[:40]}, ours at "
            f"{HEAD}); upgrade edgedeploy here"
        )
    with database.writing() as connection:
        _migrate(connection)


def _revision(connection: sa.Connection) -> str:
    """Return how far a database's tables are; "" where it has none of ours."""
    import sqlalchemy as sa

    from edgedeploy.history.schema import VERSION_TABLE

    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return ""
    return str(connection.scalar(sa.text(f"SELECT version_num FROM {VERSION_TABLE}")) or "")  # noqa: S608 - ours


def _known_revisions() -> set[str]:
    return {step.revision for step in _script()[1].walk_revisions()}


def _script() -> tuple[Any, Any]:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    # Its own interpolation would take a % in a path for the begin of a name.
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config, ScriptDirectory.from_config(config)


def _migrate(connection: sa.Connection) -> None:
    """Run the steps that a database lacks; who else wants to do so waits, and then finds nothing to do."""
    import sqlalchemy as sa
    from alembic.runtime.environment import EnvironmentContext

    from edgedeploy.history.schema import VERSION_TABLE

    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
    config, script = _script()

    def steps(revision: Any, context: MigrationContext) -> Any:
        return script._upgrade_revs("head", revision)

    with EnvironmentContext(config, script, fn=steps) as environment:
        environment.configure(connection=connection, version_table=VERSION_TABLE)
        environment.run_migrations()
