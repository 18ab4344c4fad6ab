"""The dashboard without a browser: what each address says, whom it answers, and what it never gives away."""

import contextlib
import errno
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from msgspec.structs import replace
from starlette.testclient import TestClient

from edgedeploy.dashboard import server
from edgedeploy.dashboard.app import application
from edgedeploy.dashboard.source import Filter, open_source
from edgedeploy.dashboard.sparkline import sparkline
from edgedeploy.errors import UsageError
from edgedeploy.lab import health
from edgedeploy.results import Results

from .dashboard_samples import HOSTILE, make_hostile_verdict, make_results, stored
from .render_samples import make_run

PAGES = ["/", "/trends", "/devices"]
OURS = {"base_url": "http://127.0.0.1:8080"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with results, a lab file and a cache and a state of its own."""
    folder = tmp_path_factory.mktemp("dashboard")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEDEPLOY_CACHE_DIR", str(folder / "cache"))
        patch.setenv("EDGEDEPLOY_STATE_DIR", str(folder / "state"))
        make_hostile_verdict(make_results(folder))
        (folder / "lab.toml").write_text(
            'format = "edgedeploy.lab/1"\n'
            '[devices.pi5-desk]\ntransport = "ssh"\nhost = "10.1.2.3"\nuser = "secret-user"\ntarget = "raspberry-pi-5"\n'
            '[devices.spare]\ntransport = "ssh"\nhost = "10.1.2.4"\ndescription = "in the cupboard"\n'
        )
        health.quarantine("pi5-desk", "the fan is broken")
        yield folder


@pytest.fixture(scope="module")
def source(place):
    with open_source(place / "bench_results", "", place / "lab.toml") as opened:
        yield opened


@pytest.fixture(scope="module")
def client(source):
    return TestClient(application(source), **OURS)


def text_of(client, address):
    answer = client.get(address)
    assert answer.status_code == 200, answer.text
    return answer.text


def tags(page):
    """Return every element of a page with its attributes."""
    found = []
    reader = HTMLParser()
    reader.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    reader.feed(page)
    return found


def ids(client):
    return [row["id"] for row in client.get("/api/verdicts?per_page=500").json()["verdicts"]]


# ---------------------------------------------------------------- what is shown


def test_the_first_page_shows_the_newest_verdicts_first_with_decision_and_cells(client):
    page = text_of(client, "/")
    assert page.index("fashion-mnist 1.29") < page.index("fashion-mnist 1.28") < page.index("fashion-mnist 1.27")
    assert "pruned-int8" in page
    assert "FAIL" in page


def test_verdicts_are_filtered_by_decision_device_model_and_text(client):
    def names(query):
        return [row["name"] for row in client.get(f"/api/verdicts?per_page=500&{query}").json()["verdicts"]]

    assert len(names("")) == 31
    assert names("decision=INCONCLUSIVE") == ["fashion-mnist 1.7"]
    assert len(names("device=pi5-desk")) == 30
    assert names("device=orin-2") == []
    assert len(names("model=edgedeploy.demo.model:pruned")) == 30
    assert names("model=nothing") == []
    assert names("text=MNIST+1.12") == ["fashion-mnist 1.12"]
    assert len(names("decision=FAIL&device=pi5-desk&target=raspberry-pi-5")) == 10


def test_pages_of_verdicts_hold_each_of_them_once(client):
    seen, number = [], 1
    while True:
        page = client.get(f"/api/verdicts?per_page=7&page={number}").json()
        seen += [row["id"] for row in page["verdicts"]]
        if number == page["pages"]:
            break
        number += 1
    assert (len(seen), len(set(seen)), number) == (31, 31, 5)
    assert client.get("/api/verdicts?per_page=7&page=99").json()["page"] == 5


def test_a_verdict_shows_its_findings_and_leads_to_its_report(client):
    (verdict_id,) = [row["id"] for row in client.get("/api/verdicts?decision=INCONCLUSIVE").json()["verdicts"]]
    page = text_of(client, f"/verdict/{verdict_id}")
    assert "about 9 more blocks, or a quieter device" in page
    assert f"/report/{verdict_id}" in page
    report = client.get(f"/report/{verdict_id}")
    assert "a report" in report.text
    assert report.headers["content-security-policy"].startswith("sandbox allow-scripts; default-src 'none'")


def test_a_trend_shows_where_the_level_changed_and_which_release_moved_it(client):
    cells = client.get("/api/cells").json()["cells"]
    slower = next(one for one in cells if one["key"]["device"] == "pi5-desk" and one["key"]["precision"] == "int8")
    trend = client.get(f"/api/trend?cell={slower['id']}&metric=latency_p50").json()
    assert len(trend["points"]) == 30
    assert [change["index"] for change in trend["changes"]] == [20]
    assert trend["changes"][0]["change"] == pytest.approx(0.3, abs=0.05)
    page = text_of(client, f"/trends?cell={slower['id']}")
    assert 'class="change worse"' in page
    assert "fashion-mnist 1.20" in page


def test_devices_are_those_of_the_lab_file_and_of_the_runs_with_their_quarantine(client):
    states = {one["device"]: one for one in client.get("/api/devices").json()["devices"]}
    assert states["pi5-desk"]["state"] == "quarantined"
    assert states["pi5-desk"]["why"] == "the fan is broken"
    assert states["orin-2"]["state"] == "not in the lab file"
    assert states["spare"]["state"] == "ready"
    assert states["spare"]["history"] is None
    assert states["pi5-desk"]["history"]["runs"] == 60
    page = text_of(client, "/devices")
    assert page.index("pi5-desk") < page.index("orin-2"), "what needs attention comes first"
    assert "in the cupboard" in page


def test_how_to_log_in_to_a_device_is_shown_nowhere(client):
    for address in (*PAGES, "/api/devices"):
        answer = text_of(client, address)
        assert "10.1.2.3" not in answer
        assert "secret-user" not in answer


def test_what_is_stored_later_is_seen_without_a_restart(place, tmp_path):
    root = make_results(tmp_path, days=2)
    with open_source(root, "", place / "lab.toml") as fresh:
        assert fresh.verdicts(Filter(), 1, 10).total == 2
        make_hostile_verdict(root)
        hour_s = fresh._clock() + 3600
        fresh._clock = lambda: hour_s
        assert fresh.verdicts(Filter(), 1, 10).total == 3


def test_an_empty_results_folder_says_how_to_begin(tmp_path):
    (tmp_path / "bench_results").mkdir()
    with open_source(tmp_path / "bench_results", "", None) as empty:
        client = TestClient(application(empty), **OURS)
        assert "edgedeploy run edgedeploy.toml" in text_of(client, "/")
        assert "Nothing was measured yet" in text_of(client, "/trends")
        assert "local" in text_of(client, "/devices")


# ---------------------------------------------------------------- what is refused


def test_a_name_that_is_not_ours_is_not_answered(source):
    for host, expected in (
        ("127.0.0.1:8080", 200),
        ("localhost:8080", 200),
        ("[::1]:8080", 200),
        ("lab.example", 200),
        ("evil.example", 400),
        ("127.0.0.1.evil.example", 400),
        ("localhost.evil.example:8080", 400),
        ("127.0.0.1@evil.example", 400),
        ("", 400),
    ):
        client = TestClient(application(source, names=("lab.example",)), base_url="http://127.0.0.1")
        assert client.get("/api/cells", headers={"host": host}).status_code == expected, host


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("address", ["/", "/devices", "/api/verdicts", "/static/dashboard.css"])
def test_nothing_can_be_written(client, method, address):
    assert client.request(method, address).status_code == 405


def test_head_gives_the_same_headers_without_content(client):
    assert client.head("/").status_code == 200


def test_every_answer_tells_the_browser_to_be_strict_and_sets_no_cookie(client):
    for address in (*PAGES, "/api/cells", "/static/dashboard.js", "/nowhere", f"/verdict/{ids(client)[1]}"):
        answer = client.get(address)
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "set-cookie" not in answer.headers
        assert "access-control-allow-origin" not in answer.headers


def test_pages_keep_to_their_own_policy(client):
    """No style or script of a page stands in it, for the policy would not let it work."""
    cells = [one["id"] for one in client.get("/api/cells").json()["cells"]]
    for address in (*PAGES, f"/trends?cell={cells[0]}", f"/verdict/{ids(client)[1]}"):
        for tag, attributes in tags(text_of(client, address)):
            assert tag != "style", address
            assert not [name for name in attributes if name == "style" or name.startswith("on")], (address, tag)
            assert tag != "script" or attributes["src"].startswith("/static/")
            assert not attributes.get("href", "/").startswith("javascript:")


def test_nothing_that_is_stored_becomes_markup(client):
    hostile = next(row["id"] for row in client.get("/api/verdicts").json()["verdicts"] if row["name"] == HOSTILE)
    for address in ("/", "/?text=%3Cimg", f"/verdict/{hostile}"):
        page = text_of(client, address)
        assert "<img" not in page
        assert "49" not in page.split("<main")[1].split("fashion-mnist")[0] or "{{7*7}}" in page
        assert "&lt;/script&gt;&lt;img" in page


def test_a_hostile_cell_stays_text_in_its_trend(tmp_path, place):
    results = Results(tmp_path / "bench_results")
    run = make_run("candidate", name=HOSTILE, blocks=2, questions=1)
    artifact = replace(run.artifact, model=HOSTILE, target=HOSTILE, options={HOSTILE: HOSTILE})
    for day in (1, 2):
        stored(results, replace(run, artifact=artifact), day, 1, device=HOSTILE, runtime=HOSTILE, edgedeploy=HOSTILE)
    with open_source(results.root, "", place / "lab.toml") as opened:
        client = TestClient(application(opened), **OURS)
        (cell,) = client.get("/api/cells").json()["cells"]
        for address in ("/trends", f"/trends?cell={cell['id']}", "/devices"):
            page = text_of(client, address)
            assert "<img" not in page
            assert page.count("</script>") == 1


@pytest.mark.parametrize(
    "address",
    [
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/",
        "/verdict/..%2f..%2fetc%2fpasswd",
        "/report/..%2f..%2fetc%2fpasswd",
        "/report/0000",
        "/nowhere",
        "/trends?cell=0000",
        "/api/trend?cell=0000",
    ],
)
def test_what_is_not_there_is_a_sentence_and_no_path_leads_out(client, address):
    answer = client.get(address)
    assert answer.status_code == 404
    assert "root:" not in answer.text
    assert "there is no" in answer.text


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("/?page=0", "page=0: a whole number from 1"),
        ("/?page=-1", "page=-1"),
        ("/?page=" + "9" * 400, "a whole number from 1"),
        ("/?page=²", "a whole number from 1"),
        ("/api/verdicts?per_page=501", "from 1 to 500"),
        ("CELL&metric=__class__", "is not known"),
        ("CELL&last=2001", "from 1 to 2000"),
    ],
)
def test_an_address_that_cannot_be_meant_is_a_sentence(client, address, said):
    cell = client.get("/api/cells").json()["cells"][0]["id"]
    answer = client.get(address.replace("CELL", f"/trends?cell={cell}"))
    assert answer.status_code == 400
    assert said in answer.text


def test_the_report_of_a_changed_verdict_and_a_link_are_not_given_out(tmp_path, place):
    root = make_results(tmp_path, days=3)
    with open_source(root, "", place / "lab.toml") as opened:
        rows = opened.verdicts(Filter(), 1, 10).verdicts
        assert all(opened.report(row) is not None for row in rows)
        files = sorted((root / "reports").glob("*.json"), reverse=True)
        files[0].write_text(files[0].read_text().replace("FAIL", "PASS").replace("1.2", "1.3"))
        assert opened.report(rows[0]) is None, "the verdict beside it is another one now"
        report = files[1].with_suffix(".html")
        report.unlink()
        report.symlink_to("/etc/passwd")
        assert opened.report(rows[1]) is None
        assert opened.report(replace(rows[2], path="../../../../etc/passwd")) is None


def test_a_store_that_fails_is_a_sentence_and_not_a_traceback(source, monkeypatch):
    from edgedeploy.errors import StoreError

    def fail(*_):
        raise StoreError("the index /x could not be read: the disk is gone")

    monkeypatch.setattr(source._store, "devices", fail)
    monkeypatch.setattr(source, "_devices", None)
    answer = TestClient(application(source), **OURS).get("/devices")
    assert answer.status_code == 503
    assert "the disk is gone" in answer.text


@pytest.mark.parametrize("values", [[0.001] * 5, [0.001, 5.0], [0.0, 0.0], [1e-9, 1e9, -3.0]])
def test_any_series_fits_into_a_line_of_text(values):
    drawn = sparkline(values, HOSTILE)
    numbers = [float(word) for word in re.search(r'points="([^"]*)"', drawn)[1].replace(",", " ").split()]
    assert all(0 <= x <= 96 for x in numbers[::2])
    assert all(0 <= y <= 22 for y in numbers[1::2])
    assert "<img" not in drawn


def test_one_value_is_no_line():
    assert sparkline([1.0], "one") == ""


# ---------------------------------------------------------------- the server


def test_a_port_that_is_taken_is_a_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} of 127.0.0.1 is taken by another program"):
            server.bind("127.0.0.1", port)


def test_two_servers_do_not_share_a_port():
    with contextlib.closing(server.bind("127.0.0.1", 0)) as first, pytest.raises(UsageError, match="is taken"):
        server.bind("127.0.0.1", first.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "said"), [("no.such.host.invalid", "is no address"), ("192.0.2.1", "none of this machine's")]
)
def test_an_address_that_is_not_ours_is_a_sentence(host, said):
    with pytest.raises(UsageError, match=said):
        server.bind(host, 0)


def test_the_url_of_a_socket_that_listens_everywhere_can_be_opened():
    with contextlib.closing(server.bind("0.0.0.0", 0)) as bound:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", server.url_of(bound))
    with contextlib.closing(server.bind("127.0.0.1", 0)) as bound:
        assert server.url_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}/"


@contextlib.contextmanager
def served(place):
    """Run `edgedeploy serve` as a person would; give the process and its URL."""
    command = [
        sys.executable, "-m", "edgedeploy", "serve", "--results", "bench_results", "--lab", "lab.toml", "--port", "0",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield process, re.match(r"(http://\S+)", line)[1]
    finally:
        process.kill()
        process.communicate()


def test_the_command_serves_until_it_is_interrupted_and_leaves_no_traceback(place):
    with served(place) as (process, url):
        host, port = re.fullmatch(r"http://(127\.0\.0\.1):(\d+)/", url).groups()
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        connection.request("GET", "/")
        answer = connection.getresponse()
        page = answer.read().decode()
        assert answer.status == 200
        assert "fashion-mnist 1.29" in page
        assert answer.getheader("server") is None
        # A browser keeps its connection open; that must not keep the server alive.
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        connection.close()
    assert process.returncode == 0
    assert "Traceback" not in out + err
    with pytest.raises(OSError) as refused:
        socket.create_connection((host, int(port)), timeout=5)
    assert refused.value.errno == errno.ECONNREFUSED


def test_an_address_that_others_reach_is_warned_about(place, monkeypatch, capsys):
    from edgedeploy.cli import run

    served_at = []
    monkeypatch.setattr(server, "serve", lambda app, bound: served_at.append(bound.getsockname()[0]))
    options = ["--results", str(place / "bench_results"), "--lab", str(place / "lab.toml"), "--port", "0", "--quiet"]
    assert run(["serve", *options, "--host", "0.0.0.0"]) == 0
    assert "0.0.0.0 can be reached from other machines, and there is no login" in capsys.readouterr().err
    assert run(["serve", *options, "--json"]) == 0
    said = capsys.readouterr()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", json.loads(said.out)["url"])
    assert said.err == ""
    assert served_at == ["0.0.0.0", "127.0.0.1"]


def test_a_results_folder_that_is_not_there_is_a_sentence(tmp_path, capsys):
    from edgedeploy.cli import run

    assert run(["serve", "--results", str(tmp_path / "none"), "--port", "0"]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert Path.cwd() != tmp_path / "none"
