"""A real PostgreSQL for the tests of the history's store, on a socket of its own; and one door to both databases."""

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from edgedeploy.history.store import open_store

_PASSWORD = "a-word-that-nobody-says"
_OWNER = "lab"


def _programs() -> Path | None:
    """Return the folder of initdb and pg_ctl; Debian keeps them out of PATH."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    kept = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parent.parent.name))
    return kept[-1].parent if kept else None


def _as_nobody_important() -> list[str]:
    """Return what a command begins with so that PostgreSQL, which refuses to be root, is not."""
    if os.getuid() != 0:
        return []
    names = {user.pw_name for user in pwd.getpwall()}
    user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--"]


class Server:
    """A running PostgreSQL.

    Attributes:
        socket: the folder of its socket.
    """

    def __init__(self, folder: Path, programs: Path) -> None:
        self._programs, self._data, self.socket = programs, folder / "data", folder
        self._prefix = _as_nobody_important()
        secret = folder / "secret"
        secret.write_text(_PASSWORD)
        if self._prefix:
            uid, gid = (int(part.partition("=")[2]) for part in self._prefix[1:3])
            for path in (folder, secret):
                os.chown(path, uid, gid)
        self._run("initdb", "-D", str(self._data), "-U", _OWNER, "-A", "scram-sha-256", "--pwfile", str(secret),
                  "-E", "UTF8", "--locale=C", "--no-sync")  # fmt: skip
        with (self._data / "postgresql.conf").open("a") as settings:
            settings.write(
                f"listen_addresses = ''\nunix_socket_directories = '{folder}'\nfsync = off\n"
                f"synchronous_commit = off\nfull_page_writes = off\nshared_buffers = 16MB\n"
            )
        self._run("pg_ctl", "-D", str(self._data), "-l", str(folder / "log"), "-w", "-t", "60", "start")

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._prefix, str(self._programs / program), *arguments]
        # pg_ctl leaves its output open in the server, which would be waited for.
        with tempfile.TemporaryFile() as said:
            done = subprocess.run(command, stdout=said, stderr=said, check=False, cwd="/")
            said.seek(0)
            assert done.returncode == 0, said.read().decode(errors="replace")

    def url(self, database: str, *, user: str = _OWNER, password: str = _PASSWORD) -> str:
        return f"postgresql://{user}:{password}@/{database}?host={self.socket}"

    def say(self, statement: str, database: str = "postgres") -> None:
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True) as connection:
            connection.execute(statement)

    def new_database(self) -> str:
        name = f"lab_{secrets.token_hex(6)}"
        self.say(f"CREATE DATABASE {name}")
        return name

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self._data), "-m", "immediate", "-w", "stop")


@pytest.fixture(scope="session")
def postgres():
    pytest.importorskip("psycopg", reason="needs psycopg: pip install 'edgedeploy[postgres]'")
    programs = _programs()
    if programs is None:
        pytest.skip("needs PostgreSQL's server: apt-get install postgresql")
    if os.getuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("PostgreSQL refuses to be root, and setpriv is not here: apt-get install util-linux")
    folder = Path(tempfile.mkdtemp(prefix="edgedeploy-pg-"))
    server = None
    try:
        server = Server(folder, programs)
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


class Door:
    """Opens the same results as a folder's index, or as a store that they are pushed to.

    Attributes:
        url: "" for the index.
    """

    def __init__(self, results: Path, url: str) -> None:
        self.results, self.url = results, url

    @property
    def is_shared(self) -> bool:
        return bool(self.url)

    def open(self, **options):
        return open_store(self.results, self.url, **({"lab": "bench"} if self.url else {}), **options)

    def taken_in(self):
        """Open it, and take in what is new: (store, what that brought)."""
        store = self.open()
        return store, (store.push() if self.is_shared else store.refresh())


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """An empty results folder, whose index is in a cache of its own."""
    monkeypatch.setenv("EDGEDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("EDGEDEPLOY_STORE", "EDGEDEPLOY_LAB_NAME", "PGPASSWORD", "PGHOST", "PGUSER"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "bench_results"
    folder.mkdir()
    return folder


@pytest.fixture(params=["sqlite", "postgresql"])
def door(request, results) -> Door:
    """Both databases, one after the other: what is true of one is true of the other."""
    if request.param == "sqlite":
        return Door(results, "")
    server = request.getfixturevalue("postgres")
    return Door(results, server.url(server.new_database()))
