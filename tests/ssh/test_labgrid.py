"""Places of a real labgrid coordinator and exporter: acquired, reached over SSH, given back on every way out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import pytest

from edgedeploy.cli import run
from edgedeploy.errors import DeviceBusy, DeviceError, DeviceUnreachable, DocumentError, UsageError
from edgedeploy.lab import inventory, labgrid, places
from edgedeploy.lab.labgrid import Coordinator
from edgedeploy.lab.transport import Transport
from tests.testbed.board import free_port, wait_until
from tests.testbed.kept import Kept
from tests.testbed.plain import Plain

pytest.importorskip("labgrid", reason="labgrid is not installed: pip install 'edgedeploy[labgrid]'")
pytestmark = pytest.mark.usefixtures("home")
START_S = 30.0
ALICE = "bench/alice"


class Site:
    """A coordinator, an exporter with some resources, and a board behind an SSH server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.board = Plain(folder / "board")
        self.board.start()
        self.coordinator = Coordinator(f"127.0.0.1:{free_port()}")
        self.server = self._started("coordinator", "-l", self.coordinator.address, says="listening on")
        ssh = f"{{address: 127.0.0.1, port: {self.board.port}, username: {self.board.user}}}"
        (folder / "exports.yaml").write_text(
            f"board: {{NetworkService: {ssh}}}\n"
            f"twins: {{one: {{cls: NetworkService, **}}, two: {{cls: NetworkService, **}}}}\n".replace("**", ssh[1:-1])
            + "bare: {NetworkPowerPort: {model: netio, host: power.lab, index: 3}}\n"
        )
        self.exporter = self.export("farm")
        for place, pattern in {
            "pi-1": "farm/board/*",
            "twins": "farm/twins/*",
            "bare": "farm/bare/*",
            "empty": "",
            "away": "attic/board/*",
        }.items():
            self.add(place, pattern)

    def export(self, name: str) -> Kept:
        """Start an exporter and wait until the coordinator has told everybody its resources."""
        where = ("-c", self.coordinator.address, "-n", name, "--hostname", "127.0.0.1", "exports.yaml")
        return self._started("exporter", *where, says="Exporter ready")

    def _started(self, role: str, *arguments: str, says: str) -> Kept:
        # labgrid's programs keep their state in the folder that they are started in.
        argv = ["env", "-C", self.folder, sys.executable, "-u", "-m", f"labgrid.remote.{role}", *arguments]
        process = Kept(argv, self.folder / f"{role}.log")
        wait_until(lambda: says in process.log.read_text(), timeout_s=START_S, what=process.said)
        return process

    def add(self, place: str, pattern: str) -> None:
        import grpc
        from labgrid.remote.generated import labgrid_coordinator_pb2 as messages
        from labgrid.remote.generated.labgrid_coordinator_pb2_grpc import CoordinatorStub

        with grpc.insecure_channel(self.coordinator.address) as channel:
            stub = CoordinatorStub(channel)
            stub.AddPlace(messages.AddPlaceRequest(name=place), timeout=10)
            if pattern:
                stub.AddPlaceMatch(messages.AddPlaceMatchRequest(placename=place, pattern=pattern), timeout=10)

    def lab(self, place: str = "pi-1", **changes: object) -> Path:
        """Return a lab file with one device, "pi"."""
        board = {"key": str(self.board.key), "known_hosts": str(self.board.known_hosts), "root": self.board.root}
        fields = {"place": place, **board, "lease_dir": self.board.lease_dir, "python": sys.executable, **changes}
        lines = [
            f"{name} = {value if isinstance(value, int) else json.dumps(str(value))}" for name, value in fields.items()
        ]
        path = self.folder / "lab.toml"
        path.write_text(
            f'format = "edgedeploy.lab/1"\nlabgrid_coordinator = "{self.coordinator.address}"\n\n'
            '[devices.pi]\ntransport = "labgrid"\n' + "\n".join(lines) + "\n"
        )
        return path

    def transport(
        self, place: str = "pi-1", *, wait_s: float = 0.0, progress=lambda text: None, **changes
    ) -> Transport:
        device = inventory.device(inventory.load_lab(self.lab(place, **changes)), "pi")
        return inventory.open_transport("pi", device, wait_s=wait_s, progress=progress)

    def holder(self, place: str = "pi-1") -> str:
        return self.coordinator.place(place).holder

    def stop(self) -> None:
        self.exporter.stop()
        self.server.stop()
        self.board.stop()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("labgrid"))
    wait_until(
        lambda: not any(site.coordinator.place(name).absent for name in ("pi-1", "twins", "bare")),
        timeout_s=START_S,
        what=lambda: "the exporter's resources did not come",
    )
    yield site
    site.stop()


@pytest.fixture(autouse=True)
def all_places_free(site: Site) -> Iterator[None]:
    yield
    for place in site.coordinator.places().values():
        if place.holder:
            site.coordinator.release(place.name, place.holder)


def test_place_is_acquired_reached_and_given_back(site: Site) -> None:
    with site.transport() as board:
        holder = site.holder()
        assert holder.startswith(f"{labgrid.own_person()}#edgedeploy.{os.getpid()}.")
        assert board.run(["echo", "there"], timeout_s=10).stdout == b"there\n"
        assert board.label == f"device 'pi' (ssh {site.board.user}@127.0.0.1:{site.board.port})"
    assert site.holder() == ""


def test_commands_work_with_a_place_and_take_the_devices_own_lease_too(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = str(site.lab())
    assert run(["devices", "check", "pi", "--lab", lab]) == 0
    assert "reached" in capsys.readouterr().out
    assert site.holder() == ""
    site.coordinator.acquire("pi-1", ALICE)
    assert run(["devices", "check", "pi", "--lab", lab]) == 3
    assert "is in use by alice on bench" in " ".join(capsys.readouterr().out.split())
    assert run(["devices", "places", "--lab", lab]) == 0
    shown = capsys.readouterr().out
    assert "alice on bench" in shown
    assert f"{site.board.user}@127.0.0.1:{site.board.port}" in shown


def test_busy_place_names_its_holder_and_what_to_do(site: Site) -> None:
    site.coordinator.acquire("pi-1", ALICE)
    with (
        pytest.raises(DeviceBusy, match=r"is in use by alice on bench; .*--wait 10m.*devices release pi --force"),
        site.transport(),
    ):
        pass
    assert site.holder() == ALICE


def test_second_session_of_one_process_neither_gets_nor_frees_the_place(site: Site) -> None:
    with site.transport():
        holder = site.holder()
        with pytest.raises(DeviceBusy, match=rf"\(edgedeploy, process {os.getpid()}\)"), site.transport():
            pass
        assert site.holder() == holder


def test_queue_is_told_and_ends_when_the_holder_leaves(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "POLL_S", 0.02)
    site.coordinator.acquire("pi-1", ALICE)
    told: list[str] = []

    def leave(text: str) -> None:
        told.append(text)
        site.coordinator.release("pi-1", ALICE)

    with site.transport(wait_s=60.0, progress=leave):
        assert "alice" not in site.holder()
        bob = site.coordinator.reserve("pi-1", "bench/bob")
        site.coordinator.cancel(bob)
    assert "is in use by alice on bench; waiting, 1 of 1 in the queue" in told[0]
    # Nothing of the queue is left that would keep the place from others.
    assert site.coordinator.acquire("pi-1", "bench/bob")


def test_queue_has_an_end(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "POLL_S", 0.02)
    site.coordinator.acquire("pi-1", ALICE)
    with pytest.raises(DeviceBusy, match=r"is in use by alice on bench, also after 0\.1 s of waiting"):
        site.transport(wait_s=0.1).__enter__()
    site.coordinator.release("pi-1", ALICE)
    assert site.coordinator.acquire("pi-1", "bench/bob"), "what waited in vain still keeps the place"


def test_those_who_queue_get_the_place_in_their_order(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "POLL_S", 0.02)
    site.coordinator.acquire("pi-1", ALICE)
    order: list[str] = []

    def use(name: str, waits: threading.Event) -> None:
        with places.held(site.coordinator, "pi-1", name, wait_s=60.0, progress=lambda text: waits.set()):
            order.append(name)

    with futures.ThreadPoolExecutor() as pool:
        users = []
        for name in ("first", "second", "third"):
            waits = threading.Event()
            users.append(pool.submit(use, name, waits))
            assert waits.wait(30)
        site.coordinator.release("pi-1", ALICE)
        for user in users:
            user.result(60)
    assert order == ["first", "second", "third"]


HOLD = """
import sys, time
from edgedeploy.lab import places
from edgedeploy.lab.labgrid import Coordinator
with places.held(Coordinator(sys.argv[1]), "pi-1", "pi") as place:
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_place_is_free_again_after_the_death_of_its_holder(site: Site, number: signal.Signals) -> None:
    argv = [sys.executable, "-c", HOLD, site.coordinator.address]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert f".{process.pid}." in site.holder()
        process.send_signal(number)
    wait_until(lambda: site.holder() == "", timeout_s=30, what=lambda: f"{site.holder()} still holds the place")


def test_place_of_a_dead_process_on_this_machine_is_taken_over(site: Site) -> None:
    """As after a kill -9 of the process and of its guard."""
    with subprocess.Popen(["true"]) as gone:
        pass
    *_, where, _ = labgrid.new_holder().rsplit(".", 2)
    dead = f"{labgrid.own_person()}#edgedeploy.{gone.pid}.1.{where}.00"
    assert labgrid.is_dead(dead)
    assert not labgrid.is_dead(labgrid.new_holder())
    site.coordinator.acquire("pi-1", dead)
    with site.transport():
        assert site.holder() != dead
    elsewhere = dead.replace(where, "0" * 12)
    site.coordinator.acquire("pi-1", elsewhere)
    with pytest.raises(DeviceBusy, match=f"edgedeploy, process {gone.pid}"), site.transport():
        pass


def test_place_that_the_person_acquired_by_hand_is_used_and_stays_acquired(site: Site) -> None:
    environment = {**os.environ, "LG_COORDINATOR": site.coordinator.address}
    subprocess.run(
        [Path(sys.executable).parent / "labgrid-client", "-p", "pi-1", "acquire"], env=environment, check=True
    )
    told: list[str] = []
    with site.transport(progress=told.append) as board:
        assert board.run(["true"], timeout_s=10).status == 0
    assert site.holder() == labgrid.own_person()
    assert "you acquired the place yourself" in told[0]


def test_place_is_given_back_when_its_device_cannot_be_reached(site: Site, tmp_path: Path) -> None:
    (tmp_path / "nobody").write_text("")
    with pytest.raises(DeviceUnreachable, match="is not a known host"), site.transport(known_hosts=tmp_path / "nobody"):
        pass
    assert site.holder() == ""


def test_release_frees_only_what_that_holder_has(site: Site) -> None:
    site.coordinator.acquire("pi-1", ALICE)
    site.coordinator.release("pi-1", labgrid.new_holder())
    assert site.holder() == ALICE


def test_release_by_force_says_from_whom(site: Site) -> None:
    site.coordinator.acquire("pi-1", ALICE)
    assert site.coordinator.force_release("pi-1") == "alice on bench"
    assert site.holder() == ""
    with pytest.raises(UsageError, match="is held by nobody"):
        site.coordinator.force_release("pi-1")


def test_devices_release_says_what_it_breaks_and_releases_by_force(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = str(site.lab())
    site.coordinator.acquire("pi-1", ALICE)
    assert run(["devices", "release", "pi", "--lab", lab]) == 3
    assert "pi is the place pi-1 of labgrid, which alice on bench has acquired" in capsys.readouterr().err
    assert site.holder() == ALICE
    assert run(["devices", "release", "pi", "--lab", lab, "--force", "--yes"]) == 0
    assert "is released; alice on bench had acquired it" in capsys.readouterr().err
    assert site.holder() == ""
    assert run(["devices", "release", "pi", "--lab", lab]) == 0
    assert "is free" in capsys.readouterr().err


def test_lab_file_wins_over_the_resource_and_the_environment_file_gives_the_key(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = site.coordinator.place("pi-1")
    entry = inventory.device(inventory.load_lab(site.lab(host="elsewhere", port=2200, user="bob")), "pi")
    way = places.reached_by(entry, place, "pi")
    assert (way.transport, way.host, way.port, way.user) == ("ssh", "elsewhere", 2200, "bob")

    environment = tmp_path / "env.yaml"
    environment.write_text(
        "targets:\n  main:\n    resources:\n      RemotePlace: {name: pi-1}\n"
        "    drivers:\n      SSHDriver: {keyfile: keys/pi, username: carol}\n"
    )
    monkeypatch.setenv("LG_ENV", str(environment))
    entry = inventory.device(inventory.load_lab(site.lab(key="")), "pi")
    way = places.reached_by(entry, place, "pi")
    assert (way.host, way.port, way.user) == ("127.0.0.1", site.board.port, "carol")
    assert way.key == str(tmp_path / "keys" / "pi")
    monkeypatch.setenv("LG_ENV", str(tmp_path / "none.yaml"))
    with pytest.raises(DocumentError, match=r"none\.yaml \(named by LG_ENV\) cannot be read"):
        places.reached_by(entry, place, "pi")


@pytest.mark.parametrize(
    ("place", "error", "words"),
    [
        ("pi1", UsageError, r'has no place \'pi1\'; did you mean "pi-1"\? \(it has: away, bare, empty, pi-1, twins\)'),
        ("empty", DeviceError, r"has no resources; add one \(labgrid-client -p empty add-match"),
        ("bare", DeviceError, "has no NetworkService that says where its SSH server is; export one"),
        ("twins", DeviceError, "has 2 NetworkServices .*name host and port of the one that is meant in lab.toml"),
        ("away", DeviceError, r"no connected exporter has attic/board/\*; is labgrid-exporter 'attic' running\?"),
    ],
)
def test_place_that_leads_nowhere_is_a_sentence_and_stays_free(
    site: Site, place: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        site.transport(place).__enter__()
    assert not any(one.holder for one in site.coordinator.places().values())


def test_coordinator_that_is_down_frozen_or_none_is_a_sentence(site: Site) -> None:
    import grpc

    with pytest.raises(DeviceUnreachable, match=r"cannot be reached .*is labgrid-coordinator running there"):
        Coordinator(f"127.0.0.1:{free_port()}").places()
    with pytest.raises(DeviceUnreachable, match=f"the labgrid coordinator 127.0.0.1:{site.board.port} "):
        Coordinator(f"127.0.0.1:{site.board.port}", timeout_s=5.0).places()
    with pytest.raises(DeviceUnreachable, match=r"did not answer within 0\.5 s"):
        site.server.signal(signal.SIGSTOP)
        try:
            Coordinator(site.coordinator.address, timeout_s=0.5).places()
        finally:
            site.server.signal(signal.SIGCONT)
    other = grpc.server(futures.ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    with pytest.raises(DeviceUnreachable, match=r"does not speak the protocol of labgrid .*another version's"):
        Coordinator(f"127.0.0.1:{port}").places()
    other.stop(None)


def test_exporter_that_is_gone_is_named(site: Site) -> None:
    exporter = site.export("attic")
    wait_until(lambda: not site.coordinator.place("away").absent, timeout_s=START_S, what=exporter.said)
    with site.transport("away") as board:
        exporter.stop()
        assert board.run(["true"], timeout_s=10).status == 0, "the way to the device does not lead through the exporter"
    wait_until(lambda: bool(site.coordinator.place("away").absent), timeout_s=START_S, what=lambda: "it is still there")
    with pytest.raises(DeviceError, match="is labgrid-exporter 'attic' running"):
        site.transport("away").__enter__()


@pytest.mark.parametrize(
    ("params", "extra"),
    [
        ({"address": "-oProxyCommand=reboot", "username": "pi"}, {}),
        ({"address": "a b", "username": "pi"}, {}),
        ({"address": "board\n", "username": "pi"}, {}),
        ({"address": "", "username": "pi"}, {}),
        ({"address": "board", "username": "-l"}, {}),
        ({"address": "board", "username": "p\x1b[2J"}, {}),
        ({"address": "board", "username": "pi", "port": 0}, {}),
        ({"address": "board", "username": "pi", "port": 65536}, {}),
        ({"address": "board", "username": "pi", "port": "22"}, {}),
        ({"address": "board", "username": "pi"}, {"proxy_required": True, "proxy": "x;reboot"}),
    ],
)
def test_exporters_words_that_cannot_be_an_address_are_no_service(
    params: dict[str, object], extra: dict[str, object]
) -> None:
    from labgrid.remote.common import set_map_from_dict
    from labgrid.remote.generated.labgrid_coordinator_pb2 import Resource

    def service(params: dict[str, object], extra: dict[str, object]) -> labgrid.Service | None:
        resource = Resource(cls="NetworkService", avail=True)
        set_map_from_dict(resource.params, params)
        set_map_from_dict(resource.extra, extra)
        return labgrid._service("farm/board/NetworkService/ssh", resource)

    assert service(params, extra) is None
    sound = service({"address": "fe80::1%eth0", "username": "pi"}, {"proxy_required": True, "proxy": "farm.lab"})
    assert sound == labgrid.Service("farm/board/NetworkService/ssh", "fe80::1%eth0", 22, "pi", "farm.lab")
