"""What a browser makes of the report: nothing leaves the page, nothing is cut off, and it is complete without scripts."""

import contextlib

import pytest
from msgspec.structs import replace

from edgedeploy.render.html import report_html

from ..unit.render_samples import make_artifacts, make_cell, make_run, make_runs, make_verdict
from ..unit.report_samples import rich_runs, rich_verdict
from ..unit.test_render_html import pixels_of
from ..unit.test_side_by_side import two_cells

HOSTILE = "</script><img src=x onerror=\"document.title='taken'\">{{ 7 * 7 }}&amp;"


def many_contenders():
    """A verdict whose cells stand side by side, with long names."""
    verdict = two_cells()
    rows = tuple(
        replace(
            one,
            cell=f"{one.cell}-of-the-second-board",
            backend="tensorrt_rtx",
            decision="INCONCLUSIVE" if one.decision else None,
        )
        for one in verdict.contenders
    )
    return replace(verdict, contenders=rows)


PAGES = {
    "rich": lambda: report_html(rich_verdict(), rich_runs(dropped_blocks={3: "too hot"}), make_artifacts(), sample_of=pixels_of),
    "side-by-side": lambda: report_html(two_cells(), make_runs(), make_artifacts()),
    "long-names": lambda: report_html(many_contenders(), make_runs(), make_artifacts()),
    "no-runs": lambda: report_html(make_verdict(make_cell("INCONCLUSIVE"), decision="INCONCLUSIVE"), {}, {}),
    "many-visits": lambda: report_html(make_verdict(), make_runs(blocks=150, samples=16), {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    for name, made in PAGES.items():
        (folder / f"{name}.html").write_text(made(), encoding="utf-8")
    return folder


@contextlib.contextmanager
def opened(browser, path, *, width=1280, scheme="light", scripts=True):
    """Open a page from disk; afterwards nothing may have been complained of, and nothing fetched."""
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme=scheme,
        java_script_enabled=scripts,
        has_touch=width < 500,
    )
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))

    def only_the_page(route):
        asked.append(route.request.url)
        if route.request.url == path.as_uri() or route.request.url.startswith("data:"):
            route.continue_()
        else:
            route.abort()

    context.route("**/*", only_the_page)
    page.goto(path.as_uri())
    yield page
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {path.as_uri()}
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 800, 1280])
@pytest.mark.parametrize("name", sorted(PAGES))
def test_nothing_is_cut_off_at_any_width(browser, pages, name, width, scheme):
    with opened(browser, pages / f"{name}.html", width=width, scheme=scheme) as page:
        assert page.locator("h1").inner_text().strip() in ("PASS", "FAIL", "INCONCLUSIVE")
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        cut = page.evaluate(
            """() => [...document.querySelectorAll("nav, nav :is(th, td, table), .banner, .findings :is(th, td), .compared td")]
                .filter((one) => one.scrollWidth > one.clientWidth + 1 && one.clientWidth > 1).map((one) => one.textContent)"""
        )
        assert cut == []
        # A sign and a word; the sign alone once took the whole column, and pushed the word out of sight.
        badges = page.evaluate(
            "[...document.querySelectorAll('.badge')].map((one) => one.getBoundingClientRect().width)"
        )
        assert badges
        assert all(50 < badge < 160 for badge in badges)


def test_verdicts_side_by_side_are_seen_without_scrolling_sideways(browser, pages):
    for width in (390, 800, 1280):
        with opened(browser, pages / "long-names.html", width=width) as page:
            edges = page.evaluate(
                """() => [...document.querySelectorAll(".side-by-side :is(td, .badge)")].filter((one) => one.offsetParent)
                    .map((one) => one.getBoundingClientRect().right)"""
            )
            assert max(edges) <= page.evaluate("document.querySelector('nav').getBoundingClientRect().right")


def test_a_pointer_over_a_visit_shows_what_is_known_of_it(browser, pages):
    with opened(browser, pages / "rich.html") as page:
        tip = page.locator(".tip")
        assert tip.is_hidden()
        dropped = page.locator("#cell-1 svg.visits g.visit.dropped").first
        dropped.locator(".hit").hover()
        words = tip.inner_text().splitlines()
        assert "block 3" in words[0]
        assert words[1] == "dropped: too hot"
        assert any("°C" in line for line in words)
        page.locator("h1").hover()
        assert tip.is_hidden()


def test_a_finger_on_a_visit_shows_it_too_and_inside_the_screen(browser, pages):
    with opened(browser, pages / "rich.html", width=390) as page:
        visits = page.locator("#cell-1 svg.visits g.visit")
        for place in (0, visits.count() - 1):
            hit = visits.nth(place).locator(".hit")
            hit.scroll_into_view_if_needed()
            hit.tap()
            box = page.locator(".tip").bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 390
            assert "block" in page.locator(".tip").inner_text()


def test_the_arrow_keys_go_from_visit_to_visit(browser, pages):
    with opened(browser, pages / "rich.html") as page:
        drawing = page.locator("#cell-1 svg.visits")
        drawing.focus()
        page.keyboard.press("ArrowRight")
        first = page.locator(".tip").inner_text()
        page.keyboard.press("ArrowRight")
        second = page.locator(".tip").inner_text()
        assert first != second
        assert "block 0" in first
        page.keyboard.press("ArrowLeft")
        assert page.locator(".tip").inner_text() == first
        page.keyboard.press("Escape")
        assert page.locator(".tip").is_hidden()


def test_charts_come_alive_and_say_the_values_under_the_pointer(browser, pages):
    with opened(browser, pages / "rich.html") as page:
        chart = page.locator("#cell-1 [data-chart=distribution]")
        chart.locator("canvas").wait_for()
        assert chart.locator("svg").is_hidden()
        chart.locator(".u-over").hover()
        legend = chart.locator(".u-legend").inner_text()
        assert "ms" in legend
        assert "%" in legend
        live, panels = page.locator("[data-chart=panel] canvas"), page.locator("[data-chart=panel]")
        assert live.count() == panels.count() > 3


def test_charts_take_the_colours_of_the_page_when_it_turns_dark(browser, pages):
    def colours(page):
        return page.evaluate(
            """() => { const canvas = document.querySelector("#cell-1 [data-chart=distribution] canvas");
            return canvas.toDataURL(); }"""
        )

    with opened(browser, pages / "rich.html") as page:
        page.locator("#cell-1 [data-chart=distribution] canvas").wait_for()
        before = colours(page)
        page.emulate_media(color_scheme="dark")
        page.wait_for_function(
            """(before) => document.querySelector("#cell-1 [data-chart=distribution] canvas").toDataURL() !== before""",
            arg=before,
        )
        assert page.locator("#cell-1 [data-chart=distribution] canvas").count() == 1


def test_charts_fit_a_phone_that_is_turned(browser, pages):
    with opened(browser, pages / "rich.html", width=800) as page:
        page.locator("#cell-1 [data-chart=distribution] canvas").wait_for()
        page.set_viewport_size({"width": 390, "height": 800})
        page.wait_for_function(
            """() => [...document.querySelectorAll("[data-chart] canvas")].every((one) => one.getBoundingClientRect().width <= 390)"""
        )
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


@pytest.mark.parametrize("name", sorted(PAGES))
def test_where_scripts_are_blocked_the_page_says_everything(browser, pages, name):
    with opened(browser, pages / f"{name}.html", scripts=False) as page:
        assert page.locator("h1").inner_text().strip() in ("PASS", "FAIL", "INCONCLUSIVE")
        assert page.locator("canvas").count() == 0
        for kind in ("distribution", "panel"):
            drawings = page.locator(f"[data-chart={kind}] svg")
            assert all(drawings.nth(place).is_visible() for place in range(drawings.count()))


def test_where_the_server_forbids_scripts_the_page_says_everything(browser, pages):
    """As the viewers of build artifacts do: with a policy of their own in the response's header."""
    body = (pages / "rich.html").read_text(encoding="utf-8")
    context = browser.new_context()
    page = context.new_page()
    headers = {"Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'self'; sandbox"}
    context.route(
        "**/*", lambda route: route.fulfill(body=body, content_type="text/html; charset=utf-8", headers=headers)
    )
    page.goto("http://artifacts.example/report.html")
    assert page.locator("h1").inner_text().strip() == "FAIL"
    assert page.locator("canvas").count() == 0
    assert page.locator("#cell-1 svg.visits g.visit").count() == 16
    context.close()


def test_print_shows_the_drawings(browser, pages):
    with opened(browser, pages / "rich.html") as page:
        page.locator("#cell-1 [data-chart=distribution] canvas").wait_for()
        page.emulate_media(media="print")
        assert page.locator("#cell-1 [data-chart=distribution] svg").is_visible()
        assert page.locator("#cell-1 [data-chart=distribution] .live").is_hidden()


def test_pictures_of_flipped_samples_are_decoded(browser, pages):
    with opened(browser, pages / "rich.html") as page:
        sizes = page.evaluate("[...document.images].map((one) => [one.complete, one.naturalWidth, one.naturalHeight])")
        assert len(sizes) == 72
        assert {tuple(size) for size in sizes} == {(True, 28, 28)}


def test_no_name_is_obeyed_by_the_browser(browser, tmp_path):
    runs = {
        "run-b": make_run("baseline", name=HOSTILE, events=(HOSTILE,), dropped_blocks={1: HOSTILE}),
        "run-c": make_run("candidate", name=HOSTILE),
    }
    cell = make_cell(cell=HOSTILE, baseline_cell=HOSTILE, device=HOSTILE, target=HOSTILE, notes=(HOSTILE,))
    path = tmp_path / "hostile.html"
    path.write_text(report_html(make_verdict(cell, name=HOSTILE), runs, make_artifacts()), encoding="utf-8")
    with opened(browser, path) as page:
        page.locator("svg.visits g.visit.dropped .hit").first.hover()
        assert HOSTILE in page.locator(".tip").inner_text()
        assert page.title() == f"PASS: {HOSTILE}"
        assert page.locator("img").count() == 0


def test_a_page_weighs_little(pages):
    assert (pages / "rich.html").stat().st_size < 1_500_000
