"""What a browser makes of the report's page: nothing is cut off, and verdicts are seen without scrolling sideways."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest
from msgspec.structs import replace

from edgedeploy.render.html import report_html

from .render_samples import make_artifacts, make_runs
from .test_side_by_side import two_cells

# Written into the page for the test only: the report itself runs no script.
MEASURE = """<script>
const wide = (element) => element.scrollWidth > element.clientWidth + 1;
const table = document.querySelector(".side-by-side");
const edges = [...table.querySelectorAll("td, .badge")].filter((one) => one.offsetParent).map((one) => one.getBoundingClientRect());
const found = {
  window: window.innerWidth,
  page: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  cut: [...document.querySelectorAll("nav, nav th, nav td, nav table")].filter(wide).map((one) => one.textContent),
  right: Math.max(...edges.map((edge) => edge.right)) - document.querySelector("nav").getBoundingClientRect().right,
  badges: [...table.querySelectorAll(".badge")].map((one) => one.getBoundingClientRect().width),
};
document.title = JSON.stringify(found);
</script></body>"""


def contenders_with_long_names():
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


@pytest.mark.parametrize("verdict", [two_cells, contenders_with_long_names])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_of_the_side_by_side_table_is_cut_off_or_out_of_sight(tmp_path, verdict, width):
    browser = shutil.which("chromium-headless-shell") or shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium is installed to lay the page out")
    page = tmp_path / "report.html"
    html = report_html(verdict(), make_runs(), make_artifacts())
    page.write_text(html.replace("</body>", MEASURE), encoding="utf-8")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr
    found = json.loads(unescape(title[1]))
    assert found["window"] == width
    assert (found["page"], found["cut"]) == (0, [])
    assert found["right"] <= 0
    # A sign and a word; the sign alone once took the whole column, and pushed the word out of sight.
    assert len(found["badges"]) == 2
    assert all(50 < badge_width < 140 for badge_width in found["badges"])
