from msgspec.structs import replace

from edgedeploy.render.text import artifact_text, inspection_text, run_text, table, verdict_text

from .render_samples import make_artifact, make_cell, make_run, make_runs, make_verdict

ESCAPE = "\x1b"


def test_a_verdict_shows_every_metric_and_reason_and_ends_with_the_decision():
    cell = make_cell("INCONCLUSIVE")
    text = verdict_text(make_verdict(cell, decision="INCONCLUSIVE"), make_runs(), color=False, width=160)
    for finding in cell.findings:
        assert finding.metric.replace("_", " ") in text
        assert finding.reason in text
    assert "about 9 more blocks, or a quieter device" in text
    assert "stopped at the second look" in text
    assert text.splitlines()[-1].startswith("INCONCLUSIVE: latency p50")


def test_text_without_colour_holds_no_escape_codes(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    verdict = make_verdict(make_cell("FAIL"), decision="FAIL")
    assert ESCAPE not in verdict_text(verdict, make_runs(), color=False, width=80)
    assert ESCAPE not in run_text(make_run("baseline"), color=False, width=None)
    assert ESCAPE not in artifact_text(make_artifact("candidate"), color=False, width=None)


def test_text_with_colour_holds_escape_codes_whatever_the_environment_says(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    assert ESCAPE in verdict_text(make_verdict(), make_runs(), color=True, width=80)


def test_lines_keep_to_the_width():
    verdict = make_verdict(make_cell("FAIL", cell="x" * 300), decision="FAIL")
    for width in (40, 72, 120):
        text = verdict_text(verdict, make_runs(), color=False, width=width)
        assert max(map(len, text.splitlines())) <= width


def test_names_cannot_speak_to_the_terminal_or_to_rich():
    cell = make_cell(cell="a\x1b[2J\x07\rb", baseline_cell="[bold]c[/bold] :smile:", notes=("\x9b31m",))
    text = verdict_text(make_verdict(cell), {}, color=False, width=120)
    assert not {ESCAPE, "\x07", "\r", "\x9b"} & set(text)
    assert "[bold]c[/bold] :smile:" in text


def test_a_verdict_renders_without_its_runs():
    assert "PASS" in verdict_text(
        make_verdict(make_cell(baseline_run="gone", candidate_run="")), {}, color=False, width=80
    )


def test_a_verdict_without_cells_says_so():
    verdict = replace(make_verdict(), cells=(), decision="INCONCLUSIVE")
    assert verdict_text(verdict, {}, color=False, width=80) == "INCONCLUSIVE: No cell was judged."


def test_a_run_shows_its_figures_conditions_and_what_was_dropped():
    run = make_run("baseline", dropped_blocks={3: "throttled during the visit"}, events=("a child died",))
    text = run_text(run, color=False, width=120)
    for expected in ("latency p50", "latency p95", "4 threads", "Cortex-A76", "performance", "top1", "a child died"):
        assert expected in text
    assert "block 3, visit 1 dropped: throttled during the visit" in text


def test_a_run_says_why_it_has_no_p95():
    assert "no visit has the 59 samples" in run_text(make_run("baseline", samples=20), color=False, width=120)


def test_a_run_without_visits_renders():
    text = run_text(make_run("baseline", blocks=0), color=False, width=120)
    assert "0 (0 dropped)" in text
    assert "not available" in text


def test_an_artifact_shows_recipe_fidelity_and_notes():
    artifact = make_artifact("candidate")
    text = artifact_text(artifact, color=False, width=200)
    for expected in (artifact.sha256, artifact.key, "onnxruntime 1.23.0", "fashion-mnist", "33.2 dB", "98.40 %"):
        assert expected in text
    assert "weights limited to 7 bits" in text
    assert inspection_text(artifact, color=False, width=200) == text


def test_a_table_keeps_markup_as_text():
    text = table("Devices", ("name", "host"), [("[red]a", "b")], color=False)
    assert "[red]a" in text
    assert text.startswith("Devices")
