"""The page that `edgedeploy history --html` writes, as a browser shows it."""

import math
import random

import pytest

import edgedeploy.cli
from tests.store.history_samples import make_run, save, save_verdict


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """Two devices: the model changed on one, the board of the other."""
    folder = tmp_path_factory.mktemp("history")
    results = folder / "bench_results"
    for device, sentinel in (("pi4", 1.0), ("pi5", 1.1)):
        draws = random.Random(device)
        for number in range(40):
            is_new = number >= 24
            run = make_run(
                number,
                0.004 * math.exp(draws.gauss(0, 0.02)) * (1.1 if is_new else 1),
                sentinel_s=0.001 * math.exp(draws.gauss(0, 0.01)) * (sentinel if is_new else 1),
                device=device,
                sha256=("b2" if is_new and device == "pi4" else "a1") * 32,
            )
            path = save(results, run)
        save_verdict(results, path, number=40 if device == "pi4" else 41, decision="FAIL", name=f"demo on {device}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEDEPLOY_CACHE_DIR", str(folder / "cache"))
        arguments = ["history", "--results", str(results), "--html", str(folder / "history.html"), "-q"]
        assert edgedeploy.cli.run(arguments) == 0
    return folder / "history.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_is_whole_at_any_width_and_complains_of_nothing(browser, page_file, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert page.locator("h1").inner_text() == "latency p50"
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator("svg.trend:not(.sentinel) circle").count() == 80
    assert page.locator("svg .change.worse").count() == 2
    assert page.locator("nav .FAIL").count() == 2
    assert "the board" in page.locator("nav").inner_text()
    page.locator("nav a").first.click()
    assert page.url.endswith("#cell-1")
    context.close()
