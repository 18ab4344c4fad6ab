"""The dashboard over a lab's shared store: what others pushed is shown, and no password, path or report of theirs."""

import pytest
from starlette.testclient import TestClient

from edgedeploy.dashboard.app import application
from edgedeploy.dashboard.source import Filter, open_source
from edgedeploy.history.store import open_store
from edgedeploy.lab import health
from tests.unit.dashboard_samples import make_hostile_verdict, make_results


@pytest.fixture
def url(postgres, tmp_path, monkeypatch):
    """A store to which another lab pushed its folder."""
    monkeypatch.setenv("EDGEDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("EDGEDEPLOY_STATE_DIR", str(tmp_path / "state"))
    address = postgres.url(postgres.new_database())
    with open_store(make_results(tmp_path / "theirs", days=8), address, lab="ci@elsewhere") as store:
        store.push()
    return address


def test_what_another_lab_pushed_is_shown_without_its_folder(url, tmp_path):
    health.quarantine("pi5-desk", "ours is broken")
    with open_source(tmp_path / "nothing", url, None) as source:
        client = TestClient(application(source), base_url="http://127.0.0.1")
        page = client.get("/").text
        assert "fashion-mnist 1.7" in page
        assert "ci@elsewhere" in page
        assert "a-word-that-nobody-says" not in page
        (verdict,) = client.get("/api/verdicts?text=1.7").json()["verdicts"]
        assert "Its report is not at hand here" in client.get(f"/verdict/{verdict['id']}").text
        assert client.get(f"/report/{verdict['id']}").status_code == 404
        cells = client.get("/api/cells").json()["cells"]
        assert {cell["key"]["lab"] for cell in cells} == {"ci@elsewhere"}
        assert client.get(f"/trends?cell={cells[0]['id']}").status_code == 200
        theirs = next(one for one in client.get("/api/devices").json()["devices"] if one["device"] == "pi5-desk")
        assert (theirs["lab"], theirs["state"]) == ("ci@elsewhere", "not in the lab file"), "ours is another device"


def test_what_is_pushed_while_it_serves_is_seen_a_little_later(url, tmp_path):
    with open_source(tmp_path / "nothing", url, None) as source:
        assert source.verdicts(Filter(), 1, 50).total == 8
        root = make_results(tmp_path / "more", days=1)
        make_hostile_verdict(root)
        with open_store(root, url, lab="third") as store:
            store.push()
        assert source.verdicts(Filter(), 1, 50).total == 8, "a page that is loaded again right away asks nothing"
        hour_s = source._clock() + 3600
        source._clock = lambda: hour_s
        assert source.verdicts(Filter(), 1, 50).verdicts[0].lab == "third"
        assert source.verdicts(Filter(), 1, 50).total == 10
