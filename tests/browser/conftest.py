"""One browser for each file of tests: the system's Chromium, driven by Playwright, which brings none of its own."""

import shutil

import pytest

_NAMES = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; every test opens contexts of its own in it."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium is installed here; on Debian: apt-get install chromium-headless-shell")
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed here; pip install playwright")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield running
        running.close()
