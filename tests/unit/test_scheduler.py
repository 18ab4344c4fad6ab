"""Which schedulers --scheduler takes, and errors that travel between processes."""

import pickle
from pathlib import Path

import pytest

import edgedeploy.cli
from edgedeploy import dask_cluster
from edgedeploy.errors import (
    BackendMissing,
    CompileError,
    DocumentError,
    EdgedeployError,
    ToolchainError,
    UsageError,
    VisitFailed,
)
from edgedeploy.measure import MeasurementInterrupted

SECURITY = Path("security.toml")


@pytest.mark.parametrize(
    ("given", "security", "insecure", "address"),
    [
        ("dask://localhost", None, False, "tcp://localhost:8786"),
        ("dask://127.0.0.1:9000", None, False, "tcp://127.0.0.1:9000"),
        ("tcp://[::1]:9000", None, False, "tcp://[::1]:9000"),
        ("tls://lab.example:9000", SECURITY, False, "tls://lab.example:9000"),
        ("dask://192.0.2.7:9000", None, True, "tcp://192.0.2.7:9000"),
    ],
)
def test_address_is_written_as_dask_writes_it(given: str, security: Path | None, insecure: bool, address: str) -> None:
    assert dask_cluster._address(given, security, insecure) == address


@pytest.mark.parametrize(
    ("given", "security", "words"),
    [
        (
            "dask://192.0.2.7",
            None,
            r"can run code on this machine and on every worker; use tls://192.0.2.7:8786 .*ssh -L",
        ),
        ("tcp://192.0.2.7:1", None, "--scheduler-insecure where the network is yours alone"),
        ("tls://192.0.2.7", None, "needs --scheduler-security FILE"),
        ("dask://localhost", SECURITY, "nothing is encrypted"),
        ("ray://localhost", None, "is neither dask nor an address such as dask://host:8786"),
        ("daks", None, "is neither dask nor an address"),
        ("dask://localhost/path", None, "is neither dask nor an address"),
        ("dask://someone@localhost", None, "is neither dask nor an address"),
        ("dask://localhost:port", None, "--scheduler dask://localhost:port: "),
    ],
)
def test_address_that_cannot_be_meant_or_is_open_to_others_is_refused(
    given: str, security: Path | None, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        dask_cluster._address(given, security, is_insecure=False)


def test_name_that_leads_off_this_machine_for_one_of_its_addresses_is_not_loopback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [(0, 0, 0, "", ("127.0.0.1", 0)), (0, 0, 0, "", ("192.0.2.7", 0))]
    monkeypatch.setattr("socket.getaddrinfo", lambda *given, **more: found)
    with pytest.raises(UsageError, match="--scheduler-insecure"):
        dask_cluster._address("dask://both", None, is_insecure=False)


def test_security_file_is_checked(tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="Dask is not installed: pip install 'edgedeploy[dask]'")
    file = tmp_path / "security.toml"
    file.write_text('format = "edgedeploy.scheduler/1"\nca = "ca.pem"\ncert = "cert.pem"\nkey = "key.pem"\n')
    with pytest.raises(DocumentError, match=r"security\.toml names the ca .*ca\.pem, which is no file"):
        dask_cluster._security("tls://lab.example:1", file)
    file.write_text(file.read_text().replace("key =", "kye ="))
    with pytest.raises(DocumentError, match='did you mean "key"'):
        dask_cluster._security("tls://lab.example:1", file)


def test_flags_about_a_scheduler_need_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "edgedeploy.toml").write_text("")
    assert edgedeploy.cli.run(["run", str(tmp_path / "edgedeploy.toml"), "--scheduler-insecure"]) == 2
    assert "--scheduler-insecure is about the address that --scheduler names" in capsys.readouterr().err


def test_without_dask_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with (
        pytest.raises(ToolchainError, match=r"pip install 'edgedeploy\[dask\]'"),
        dask_cluster.cluster("dask"),
    ):
        pass


@pytest.mark.parametrize(
    "error",
    [
        UsageError("no"),
        CompileError("no kernel", backend="mnn", node="/head", op="Relu", hint="export again"),
        VisitFailed("it died", kind="died"),
        MeasurementInterrupted("lost", ()),
    ],
    ids=lambda error: type(error).__name__,
)
def test_error_of_another_process_is_the_same_error(error: EdgedeployError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_error_keeps_what_it_rests_on_unless_that_is_foreign() -> None:
    class Foreign(Exception):
        def __reduce__(self):
            raise TypeError("not to be pickled")

    error = ToolchainError("could not be built")
    error.__cause__ = BackendMissing("mnn is not installed")
    error.__cause__.__cause__ = Foreign()
    copy = pickle.loads(pickle.dumps(dask_cluster.portable(error)))
    assert str(copy.__cause__) == "mnn is not installed"
    assert isinstance(copy.__cause__, BackendMissing)
    assert copy.__cause__.__cause__ is None


@pytest.mark.parametrize("name", ["../../x", "/etc/x", ".hidden", "a/b", ""])
def test_artifact_of_a_worker_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    from types import SimpleNamespace

    built = SimpleNamespace(artifact=SimpleNamespace(key="0" * 64), is_cached=False)
    with pytest.raises(EdgedeployError, match="sent no artifact"):
        dask_cluster._unpacked(built, {"manifest.json": b"{}", name: b""})
    built.artifact.key = "../../escape"
    with pytest.raises(EdgedeployError, match="sent no artifact"):
        dask_cluster._unpacked(built, {"manifest.json": b"{}"})
