"""Every command that the pages in docs/ show exists, with its options; the README's are run by tests/backends/test_readme.py."""

import re
import shlex
from pathlib import Path

import click
import pytest

from tests.command_lines import parse

DOCS = Path(__file__).parents[2] / "docs"


def commands():
    """Return every command line of edgedeploy that a page shows."""
    found = []
    for page in sorted(DOCS.glob("*.md")):
        text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
        found += [
            shlex.split(line[len("$ edgedeploy ") :]) for line in text.splitlines() if line.startswith("$ edgedeploy ")
        ]
    return found


def test_the_pages_show_commands():
    assert {words[0] for words in commands()} >= {"gate", "run", "explain", "report", "history", "serve", "bundle"}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_and_option_exists(words):
    parse(words)


@pytest.mark.parametrize("words", [["devices", "pasport", "local"], ["history", "--matric", "x"]], ids=" ".join)
def test_a_misspelt_one_would_be_found(words):
    with pytest.raises(click.UsageError):
        parse(words)


def test_every_link_leads_to_a_file():
    for page in sorted(DOCS.glob("*.md")):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links {target}"
