"""Every form of a report from the command line, and a stored verdict that is rendered again."""

import csv
import json
import shlex
import shutil
from pathlib import Path

import pytest

import edgedeploy.cli
from edgedeploy import outcomes, pipeline
from edgedeploy.errors import UsageError
from edgedeploy.records.verdict import Verdict

from .conftest import make_model, make_place
from .test_pipeline import RELEASE


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """A folder in which two artifacts were gated once, with every form of the report."""
    folder = tmp_path_factory.mktemp("gated")
    with pytest.MonkeyPatch.context() as patch:
        make_place(folder, patch)
        make_model(folder)
        for name, duration_us in (("slow", 400.0), ("fast", 200.0)):
            pipeline.compile(
                "tiny.onnx", target="fake-board", backend="fake", options={"duration_us": duration_us},
                output=Path("build") / name, name=name,
            )  # fmt: skip
        forms = [f"--{form}=out/{form}.{form}" for form in ("html", "markdown", "junit", "sarif", "csv")]
        judging = ("--margin", "latency_p50=+20%", "--max-blocks", "4", "--report-url", "https://ci.example/7")
        assert _cli("gate", "build/fast", "--baseline", "build/slow", *judging, *forms, "-q") == 0
    return folder


@pytest.fixture
def judged(gated, tmp_path, monkeypatch):
    """A copy of it for one test, which is the working directory; the folder of the reports."""
    shutil.copytree(gated, tmp_path / "copy")
    make_place(tmp_path / "copy", monkeypatch)
    return Path("out")


def _cli(*arguments: str) -> int:
    return edgedeploy.cli.run([*arguments])


def _verdict(path: Path) -> dict:
    return json.loads(path.read_text())


def test_a_gate_writes_every_form(judged):
    assert sorted(path.name for path in judged.iterdir()) == [
        "csv.csv", "html.html", "html.json", "junit.junit", "markdown.markdown", "sarif.sarif",
    ]  # fmt: skip
    assert "[The whole report](https://ci.example/7)" in (judged / "markdown.markdown").read_text()
    assert json.loads((judged / "sarif.sarif").read_text())["runs"][0]["results"] == []
    rows = list(csv.DictReader((judged / "csv.csv").open(newline="")))
    stored = [json.loads(path.read_text()) for path in Path("bench_results/runs").glob("*/*/*.json")]
    timed = sum(len(burst["samples_s"]) for run in stored for visit in run["visits"] for burst in visit["bursts"])
    assert sum(row["phase"] == "timed" for row in rows) == timed > 0


def test_the_verdict_names_the_command_that_made_it_and_that_command_works(judged, capsys):
    command = _verdict(judged / "html.json")["command"]
    words = shlex.split(command)
    assert words[:2] == ["edgedeploy", "gate"]
    assert words[words.index("--margin") + 1] == "latency_p50=+20%"
    assert words[words.index("--max-blocks") + 1] == "4"
    assert _cli(*words[1:], "-q", "--json") == 0
    assert json.loads(capsys.readouterr().out)["decision"] == "PASS"


def test_the_command_of_a_cell_judges_its_stored_runs_again(judged, capsys):
    from edgedeploy.documents import read_json
    from edgedeploy.records.verdict import FORMAT
    from edgedeploy.render.commands import again

    verdict = read_json(judged / "html.json", Verdict, FORMAT)
    command = shlex.split(again(verdict.cells[0], verdict.policy))
    assert _cli(*command[1:], "-q", "--json") == 0
    found = json.loads(capsys.readouterr().out)["cells"][0]
    old = _verdict(judged / "html.json")["cells"][0]
    assert [(one["metric"], one["effect"]) for one in found["findings"]] == [
        (one["metric"], one["effect"]) for one in old["findings"]
    ]


def test_a_run_of_a_release_points_at_its_cells_in_the_file(model, capsys):
    Path("release").mkdir()
    # The size alone fails the gate, before any latency is measured.
    text = RELEASE.replace('source = "tiny.onnx"', 'source = "../tiny.onnx"').replace('"+1MiB"', '"-50%"')
    text = text.replace("max_blocks = 6", "min_blocks = 2\nmax_blocks = 2")
    Path("release/tiny.toml").write_text(text)
    assert _cli("run", "release/tiny.toml", "--sarif", "gate.sarif", "-q") == 1
    results = {one["ruleId"]: one for one in json.loads(Path("gate.sarif").read_text())["runs"][0]["results"]}
    result = results["artifact_size"]
    place = result["locations"][0]["physicalLocation"]
    line = 1 + text.splitlines().index('name = "candidate"')
    assert (place["artifactLocation"]["uri"], place["region"]["startLine"]) == ("release/tiny.toml", line)
    assert result["level"] == "error"


def test_a_gate_that_measured_keeps_its_verdict_among_the_results_and_one_of_stored_runs_does_not(judged):
    kept = Path("bench_results/reports")
    assert sorted(path.suffix for path in kept.iterdir()) == [".html", ".json"]
    (verdict,) = kept.glob("*.json")
    assert verdict.read_bytes() == (judged / "html.json").read_bytes()
    assert verdict.with_suffix(".html").read_bytes() == (judged / "html.html").read_bytes()
    cell = _verdict(verdict)["cells"][0]
    judging = ("--baseline", cell["baseline_run"], "--margin", "latency_p50=+20%", "-q")
    assert _cli("gate", cell["candidate_run"], *judging) == 0
    assert list(kept.glob("*.json")) == [verdict]


def test_a_verdict_is_kept_although_another_form_cannot_be_written(judged):
    outcome = outcomes.stored_outcome("out/html.json")
    with pytest.raises(UsageError, match="one file"):
        outcomes.write_reports(outcome, csv="a.txt", markdown="a.txt", kept_in="kept")
    assert len(list(Path("kept/reports").iterdir())) == 2


def test_a_stored_verdict_is_rendered_again_with_its_runs(judged, capsys):
    assert (
        _cli("report", "out/html.json", "--markdown", "again.md", "--html", "again.html", "--csv", "again.csv", "-q")
        == 0
    )
    assert Path("again.csv").read_bytes() == (judged / "csv.csv").read_bytes()
    assert Path("again.html").read_bytes() == (judged / "html.html").read_bytes()
    assert not Path("again.json").exists()
    assert "Markdown: again.md" in capsys.readouterr().out


def test_a_stored_verdict_is_printed_and_is_json_when_asked(judged, capsys):
    assert _cli("report", "out/html.json", "-q") == 0
    assert "PASS" in capsys.readouterr().out
    assert _cli("report", "out/html.json", "--junit", "again.xml", "--json", "-q") == 0
    assert json.loads(capsys.readouterr().out) == {
        "format": "edgedeploy.report/1",
        "decision": "PASS",
        "files": {"JUnit": "again.xml"},
    }


def test_runs_that_are_not_at_hand_are_named_and_the_report_is_made_without_them(judged, capsys):
    for path in Path("bench_results/runs").glob("*/fast*/*.json"):
        path.unlink()
    for path in Path("bench_results/runs").glob("*/*/*.json"):
        path.unlink()
    assert _cli("report", "out/html.json", "--html", "again.html") == 0
    assert "is not in bench_results: what it says is missing from the report" in capsys.readouterr().err
    assert "not at hand when this page was made" in Path("again.html").read_text()


def test_what_a_verdict_says_decides_no_path(judged, capsys):
    document = _verdict(judged / "html.json")
    document["cells"][0]["candidate_run"] = "../../../../etc/passwd"
    Path("forged.json").write_text(json.dumps(document))
    assert _cli("report", "forged.json", "--html", "again.html") == 0
    assert "the run ../../../../etc/passwd is not in bench_results" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"), [("{", "is not valid JSON"), ('{"format": "edgedeploy.verdict/99"}', "newer")]
)
def test_a_damaged_or_newer_verdict_is_a_sentence(place, capsys, text, said):
    Path("verdict.json").write_text(text)
    assert _cli("report", "verdict.json", "--html", "report.html") == 2
    assert said in capsys.readouterr().err
    assert not Path("report.html").exists()


def test_two_forms_in_one_file_and_an_address_of_no_web_are_refused(judged):
    outcome = outcomes.stored_outcome("out/html.json")
    with pytest.raises(UsageError, match="one file"):
        outcomes.write_reports(outcome, html="a.html", markdown="./a.html")
    with pytest.raises(UsageError, match="one file"):
        outcomes.write_reports(outcome, html="a.html", sarif="a.json")
    with pytest.raises(UsageError, match="https"):
        outcomes.write_reports(outcome, markdown="a.md", report_url="javascript:alert(1)")
    assert not Path("a.html").exists()
