"""The dashboard in a real browser: it opens, filters and draws, keeps to itself, and fits on a phone."""

import shutil
import threading
import time
from urllib.parse import urlsplit

import pytest
from playwright import sync_api

from edgedeploy.dashboard import server
from edgedeploy.dashboard.app import application
from edgedeploy.dashboard.source import open_source
from edgedeploy.lab import health
from tests.unit.dashboard_samples import HOSTILE, make_hostile_verdict, make_results

CHROMIUM = shutil.which("chromium-headless-shell") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium is installed: apt install chromium-headless-shell"
)

WIDTHS = (390, 1280)
# What sticks out to the right of the window; what scrolls by itself may.
STICKING_OUT = """() => {
  const edge = document.documentElement.clientWidth + 1;
  return [...document.querySelectorAll("body *")]
    .filter((one) => !one.closest(".scroll") && !one.closest(".skip") && one.getBoundingClientRect().right > edge)
    .map((one) => one.outerHTML.slice(0, 120));
}"""


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Serve a folder of runs as the command does, from a thread of this process."""
    import uvicorn

    folder = tmp_path_factory.mktemp("dashboard")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEDEPLOY_CACHE_DIR", str(folder / "cache"))
        patch.setenv("EDGEDEPLOY_STATE_DIR", str(folder / "state"))
        make_hostile_verdict(make_results(folder, days=64, slower_from=40, sentinel=True))
        (folder / "lab.toml").write_text(
            'format = "edgedeploy.lab/1"\n[devices.pi5-desk]\ntransport = "ssh"\nhost = "h"\ntarget = "raspberry-pi-5"\n'
            'description = "on the desk by the window"\n'
        )
        health.quarantine("pi5-desk", "throttled in four runs of five, under its fan too")
        with open_source(folder / "bench_results", "", folder / "lab.toml") as source:
            bound = server.bind("127.0.0.1", 0)
            ours = uvicorn.Server(server.configuration(application(source)))
            thread = threading.Thread(target=ours.run, kwargs={"sockets": [bound]})
            thread.start()
            deadline_s = time.monotonic() + 30
            while not ours.started and thread.is_alive() and time.monotonic() < deadline_s:
                thread.join(0.02)
            assert ours.started
            yield server.url_of(bound)
            ours.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser, url):
    """Open an address at a width; at the end nothing may have been complained of, nor asked of anybody else."""
    complaints, foreign, contexts = [], [], []

    def opened(address="/", *, width=1280, scheme="light", scripts=True):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=scripts
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda one: complaints.append(f"{one.url}: {one.failure}"))
        page.on("request", lambda one: None if one.url.startswith((url, "data:")) else foreign.append(one.url))
        page.goto(f"{url.rstrip('/')}{address}")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
    assert foreign == []


def trend_address(open_page, device="pi5-desk"):
    page = open_page("/trends?q=pruned")
    row = page.locator("table.cells tbody tr", has_text=device)
    return row.locator("th a").get_attribute("href")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_page_opens_without_a_complaint_and_fits(open_page, url, width, scheme):
    trend = trend_address(open_page)
    page = open_page("/?text=mnist", width=width, scheme=scheme)
    verdict = page.locator("table.verdicts th a").first.get_attribute("href")
    for address in ("/", "/?decision=FAIL&page=2", verdict, "/trends", trend, f"{trend}&metric=accuracy", "/devices"):
        page.goto(url.rstrip("/") + address)
        assert page.locator("h1").first.inner_text(), address
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0, (
            address
        )
        assert page.evaluate(STICKING_OUT) == [], address


def test_the_filter_shows_what_it_is_set_to_and_can_be_cleared(open_page):
    page = open_page("/")
    assert "65 verdicts" in page.locator("#count").inner_text()
    page.get_by_label("decision").select_option("INCONCLUSIVE")
    page.get_by_role("button", name="Filter").click()
    assert page.locator("#count").inner_text() == "1 verdict of 65, newest first"
    assert page.locator("table.verdicts tbody tr").count() == 1
    assert page.get_by_label("decision").input_value() == "INCONCLUSIVE"
    page.get_by_role("link", name="clear").click()
    assert "65 verdicts" in page.locator("#count").inner_text()
    page.get_by_label("text").fill("no such thing")
    page.get_by_role("button", name="Filter").click()
    assert "None of 65 verdicts fits" in page.locator("main").inner_text()


def test_one_pages_through_verdicts(open_page):
    page = open_page("/")
    first = page.locator("table.verdicts th a").first.inner_text()
    page.get_by_role("link", name="older →").click()
    assert page.locator("table.verdicts tbody tr").count() == 15
    assert page.locator("table.verdicts th a").first.inner_text() != first
    page.get_by_role("link", name="← newer").click()
    assert page.locator("table.verdicts th a").first.inner_text() == first


def test_from_a_verdict_one_comes_to_its_report_and_to_its_trend(open_page):
    page = open_page("/?text=1.63")
    page.get_by_role("link", name="fashion-mnist 1.63").click()
    assert page.locator(".banner h1").inner_text().strip() == "FAIL"
    page.get_by_role("link", name="its trend").click()
    assert page.locator("svg.trend").first.is_visible()
    page.go_back()
    page.get_by_role("link", name="The whole report").click()
    assert page.locator("h1").inner_text() == "a report"


def test_the_plot_says_what_a_dot_is_by_pointer_and_by_keys(open_page):
    page = open_page(trend_address(open_page))
    dots, tip = page.locator("svg.trend circle.run"), page.locator(".tip")
    assert dots.count() == 64
    assert page.locator("svg.trend g.change.worse").count() == 1
    assert tip.is_hidden()
    box = dots.nth(50).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] - 15)
    tip.wait_for(state="visible")
    assert "fashion-mnist 1.50: FAIL" in tip.inner_text()
    page.mouse.move(5, 5)
    tip.wait_for(state="hidden")
    page.locator("figure.plot").focus()
    page.keyboard.press("End")
    assert "fashion-mnist 1.63" in tip.inner_text()
    page.keyboard.press("ArrowLeft")
    assert "fashion-mnist 1.62" in tip.inner_text()
    frame, shown = page.locator("figure.plot").bounding_box(), tip.bounding_box()
    assert shown["x"] + shown["width"] <= frame["x"] + frame["width"] + 1
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_another_cell_and_metric_are_picked_from_lists(open_page):
    page = open_page(trend_address(open_page))
    page.get_by_label("metric").select_option("artifact_size")
    page.get_by_role("button", name="Show").click()
    assert "metric=artifact_size" in page.url
    assert "241 KiB" in page.locator("table.points").inner_text()
    cells = page.locator("select[name=cell]")
    cells.select_option(next(one for one in cells.locator("option").all_text_contents() if "orin-2" in one))
    page.get_by_role("button", name="Show").click()
    assert "on orin-2" in page.locator("main").inner_text()


def test_without_scripts_everything_is_still_said(open_page):
    page = open_page(trend_address(open_page), scripts=False)
    assert page.locator("svg.trend circle.run title").count() == 64
    assert page.locator("table.points tbody tr").count() == 64
    assert page.locator(".tip").is_hidden()


def test_what_a_device_said_is_shown_and_not_obeyed(open_page):
    page = open_page("/")
    page.locator("table.verdicts th a", has_text="</script>").click()
    assert "owned" not in page.title().replace(HOSTILE, "")
    assert HOSTILE in page.locator("main").inner_text()
    assert page.locator("img").count() == 0


def test_a_report_cannot_read_the_other_pages(open_page, url):
    """It runs as if it came from nowhere, whatever a script in it would like to ask."""
    page = open_page("/?text=1.63")
    verdict_id = urlsplit(page.locator("table.verdicts th a").first.get_attribute("href")).path.rpartition("/")[2]
    page.goto(f"{url}report/{verdict_id}")
    assert page.evaluate("window.origin") == "null"


def test_devices_show_what_needs_attention_first(open_page):
    page = open_page("/devices")
    first = page.locator("section.device").first
    assert first.locator("h2").inner_text() == "pi5-desk"
    assert "throttled in four runs" in first.inner_text()
    assert first.locator("svg.spark").is_visible(), "the sentinel's course"
