"""Records as text for a terminal; no text ends in a line break."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from edgedeploy.records.artifact import Artifact, Layer, Port
from edgedeploy.records.comparison import Comparison
from edgedeploy.records.compression import CompressionReport
from edgedeploy.records.model import Fidelity, Model, TensorSpec
from edgedeploy.records.quantization import SourceQuantization
from edgedeploy.records.run import Run
from edgedeploy.records.verdict import CellVerdict, Verdict
from edgedeploy.render.compression import (
    TEXT_COLUMNS,
    compression_facts,
    fitting_columns,
    layer_notes,
    layer_rows,
    lost_facts,
    precision_facts,
    remaining_notes,
    shown_layers,
    statement_heading,
    statement_rows,
)
from edgedeploy.render.explained import causes
from edgedeploy.render.figures import (
    NOT_AVAILABLE,
    OUTPUT_COLUMNS,
    P95_MIN_SAMPLES,
    accuracy_metric_of,
    accuracy_text,
    boundary_text,
    cell_notes,
    condition_facts,
    count,
    device_text,
    drop_reason,
    fidelity_cells,
    finding_text,
    one_line,
    printable,
    run_figures,
    verdict_sentence,
)
from edgedeploy.render.kernels import COLUMNS, kernel_facts, kernel_rows, kernels_left_out, receipt_facts
from edgedeploy.render.noise import knowledge_lines
from edgedeploy.render.operator_times import TIME_COLUMNS, time_rows, times_note
from edgedeploy.render.side_by_side import DISPENSABLE, SideBySide, comparison_table, verdict_table
from edgedeploy.units import format_bytes, format_duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_STYLES = {
    "PASS": "bold green", "FAIL": "bold red", "INCONCLUSIVE": "bold yellow",
    "kept": "green", "changed": "yellow", "lost": "red",
}  # fmt: skip
_WORD = 12  # the longest word that a narrow table's column keeps whole: INCONCLUSIVE
_WIDTH = 100  # where nobody says how wide the reader's screen is


def verdict_text(verdict: Verdict, runs: Mapping[str, Run], *, color: bool, width: int | None) -> str:
    """Return a verdict as tables and sentences, the decision last.

    Args:
        verdict: the verdict.
        runs: by run id, as in CellVerdict.baseline_run and candidate_run; a missing run costs only its notes.
        color: with ANSI styles.
        width: columns; None for 100.
    """

    def show(console: Console) -> None:
        for cell in verdict.cells:
            _show_cell(console, cell, runs)
        if (shown := verdict_table(verdict)) is not None:
            _show_side_by_side(console, "Side by side", shown)
            console.print()
        for line in knowledge_lines(verdict):
            console.print(_plain(one_line(line)))
        console.print(_styled(verdict.decision), _plain(f": {verdict_sentence(verdict)}"), sep="")

    return _rendered(show, color=color, width=width)


def run_text(run: Run, *, color: bool, width: int | None) -> str:
    """Return one run's figures, conditions and what was dropped."""
    figures = run_figures(run)
    artifact = run.artifact
    p95 = _or(figures.p95_s, format_duration)
    if figures.p95_s is None and figures.samples:
        p95 = f"not printed: no visit has the {P95_MIN_SAMPLES} samples that it needs"
    facts = [
        ("artifact", f"{artifact.name} ({artifact.backend} {artifact.precision}, {format_bytes(artifact.size_bytes)})"),
        ("model", artifact.model),
        ("device", device_text(run)),
        ("runtime", run.runtime),
        ("timed", boundary_text(run)),
        ("latency p50", _or(figures.p50_s, format_duration)),
        ("latency p95", p95),
        ("fastest", _or(figures.min_s, format_duration)),
        ("first inference", _or(figures.first_inference_s, format_duration)),
        ("load", _or(figures.load_s, format_duration)),
        ("peak memory", _or(figures.peak_rss_bytes, format_bytes)),
        ("accuracy", accuracy_text(run)),
        ("visits", f"{figures.visits} ({figures.dropped} dropped), {count(figures.samples, 'timed inference')}"),
    ]
    if figures.unsteady:
        facts.append(("warm-up", f"{count(figures.unsteady, 'visit')} not steady when the warm-up reached its cap"))
    dropped = [
        f"block {visit.block}, visit {visit.position} dropped: {reason}"
        for visit in run.visits
        if (reason := drop_reason(visit))
    ]

    def show(console: Console) -> None:
        console.print(_plain(f"{run.cell} on {run.device}, {run.started_utc}"), style="bold")
        console.print(_facts(facts))
        console.print(_plain("Conditions before and after the visits"), style="bold")
        console.print(_facts(condition_facts(run)))
        if run.layer_times:
            console.print(_table("Operators, watched one by one", TIME_COLUMNS, time_rows(run.layer_times)))
            console.print(_plain(times_note(run.layer_times)))
        _show_list(console, "Notes", [*run.events, *dropped])

    return _rendered(show, color=color, width=width)


def artifact_text(artifact: Artifact, *, color: bool, width: int | None, layers: bool | None = False) -> str:
    """Return what an artifact is, what made it, what became of its compression, and how faithful it is.

    Args:
        artifact: the manifest.
        color: with ANSI styles.
        width: columns; None for 100.
        layers: all layers, or none; None: the largest.
    """
    recipe = artifact.recipe
    facts = [
        *lost_facts(artifact),
        ("file", f"{artifact.file}, {format_bytes(artifact.size_bytes)}"),
        ("sha256", artifact.sha256),
        ("key", artifact.key),
        ("model", recipe.model),
        ("for", f"{recipe.target}, {recipe.backend}, {recipe.precision}"),
        ("options", ", ".join(f"{key}={value}" for key, value in recipe.options.items()) or "none"),
        ("calibration", recipe.calibration or "none"),
        *_tensor_facts(artifact.inputs, artifact.outputs, artifact.layers.ports),
        *compression_facts(artifact.compression),
        *precision_facts(artifact),
        *kernel_facts(artifact.layers.layers),
        *receipt_facts(artifact.engine),
        ("tools", ", ".join(f"{package} {version}" for package, version in recipe.toolchain.items())),
    ]

    def show(console: Console) -> None:
        console.print(_plain(artifact.name), style="bold")
        console.print(_facts(facts))
        _show_fidelity(console, artifact.fidelity)
        _show_statements(console, artifact.compression)
        _show_layers(console, artifact.compression, layers)
        _show_kernels(console, artifact.layers.layers, layers)
        notes = remaining_notes(artifact)
        if notes:
            console.print()
        _show_list(console, "Notes", notes)

    return _rendered(show, color=color, width=width)


def inspection_text(record: Model | Artifact, *, color: bool, width: int | None, layers: bool | None = None) -> str:
    """Return what a model is, before or after compilation, and what compression it carries.

    Args:
        record: what `pipeline.inspect` returned.
        color: with ANSI styles.
        width: columns; None for 100.
        layers: all layers, or none; None: the largest.
    """
    if isinstance(record, Artifact):
        return artifact_text(record, color=color, width=width, layers=layers)
    facts = [
        ("file", record.path),
        ("sha256", record.sha256),
        ("weights file", record.weights_sha256 or "none"),
        ("opset", str(record.opset)),
        *_tensor_facts(record.inputs, record.outputs),
        *compression_facts(record.compression),
        *_quantization_facts(record.quantization),
    ]

    def show(console: Console) -> None:
        console.print(_plain(record.source), style="bold")
        console.print(_facts(facts))
        _show_fidelity(console, record.fidelity)
        _show_statements(console, record.compression)
        _show_layers(console, record.compression, layers)

    return _rendered(show, color=color, width=width)


def comparison_text(comparison: Comparison, *, color: bool, width: int | None) -> str:
    """Return the precisions of a model as a table and sentences, the fastest that keeps accuracy last."""

    def show(console: Console) -> None:
        where = f"{comparison.name} for {comparison.target} on {comparison.device}"
        _show_side_by_side(console, where, comparison_table(comparison))
        console.print()
        for line in comparison.conclusions:
            console.print(_plain(one_line(line)))

    return _rendered(show, color=color, width=width)


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, color: bool, width: int | None = None
) -> str:
    """Return a table; every row has one text per column."""
    return _rendered(lambda console: console.print(_table(title, columns, rows)), color=color, width=width)


def _show_cell(console: Console, cell: CellVerdict, runs: Mapping[str, Run]) -> None:
    accuracy_metric = accuracy_metric_of(cell, runs)
    texts = [finding_text(finding, accuracy_metric) for finding in cell.findings]
    where = f"{cell.cell} against {cell.baseline_cell} on {cell.device} ({cell.target})"
    rows = [
        (text.metric, text.baseline, text.candidate, text.change_with_interval, text.margin, text.decision)
        for text in texts
    ]
    console.print(_table(where, ("metric", "baseline", "candidate", "change", "margin", "decision"), rows))
    for text in texts:
        console.print(_plain(f"{text.metric}: {text.reason}"))
        if text.needed:
            console.print(_plain(f"  to decide it: {text.needed}"))
    if cell.explanation is not None:
        _show_list(console, "Why", causes(cell.explanation))
    _show_list(console, "Notes", cell_notes(cell, runs))
    took = f" after {format_duration(cell.seconds)}" if cell.seconds is not None else ""
    console.print(_plain(f"{cell.cell}: "), _styled(cell.decision), _plain(took), sep="")
    console.print()


def _show_side_by_side(console: Console, title: str, shown: SideBySide) -> None:
    """Show a table; what a narrow screen has no room for is named below it."""
    dropped: list[str] = []
    for dispensable in (name for name in DISPENSABLE if name in shown.columns):
        if _side_by_side_width(shown, padding=0) <= console.width:
            break
        shown = shown.without([dispensable])
        dropped.append(dispensable)
    made = _table(title, shown.columns, shown.rows)
    made.padding = (0, int(_side_by_side_width(shown, padding=1) <= console.width), 0, 0)
    console.print(made)
    if dropped:
        console.print(_plain(f"no room here for: {', '.join(dropped)}"))
    if shown.note:
        console.print(_plain(shown.note))
    _show_list(console, "Not compared", shown.missing)


def _side_by_side_width(shown: SideBySide, *, padding: int) -> int:
    """Return what a table needs for its figures to stay on one line, with a divider after each column."""
    widths = []
    for place, cells in enumerate(zip(shown.columns, *shown.rows, strict=True)):
        longest = max(map(len, cells))
        widths.append(longest if longest <= _WORD else _least_width(shown.columns, shown.rows, place))
    return sum(width + padding + 1 for width in widths) + 1


def _show_fidelity(console: Console, conversions: Sequence[Fidelity]) -> None:
    """Show one line for each output of each conversion, below the names of the two forms."""
    from rich.table import Table

    if not conversions:
        return
    sources = dict.fromkeys(f"{one.samples:,} samples of {one.sample_source}" for one in conversions)
    console.print()
    console.print(_plain(f"Fidelity on {next(iter(sources))}" if len(sources) == 1 else "Fidelity"), style="bold")
    rows = [fidelity_cells(output) for one in conversions for output in one.outputs]
    widths = [max(map(len, column)) for column in zip(OUTPUT_COLUMNS, *rows, strict=True)]

    def grid() -> Table:
        made = Table.grid(padding=(0, 2))
        for place, width in enumerate(widths):
            # Whatever the names of outputs take, the figures stay on one line.
            made.add_column(
                overflow="fold", justify="right" if place else "left", min_width=width if place else min(width, _WORD)
            )
        return made

    heading = grid()
    heading.add_row(*(_plain(text if place else f"  {text}") for place, text in enumerate(OUTPUT_COLUMNS)))
    widths[0] += 2
    console.print(heading)
    for one in conversions:
        on = "" if len(sources) == 1 else f", {one.samples:,} samples of {one.sample_source}"
        console.print(_plain(f"{one.candidate} with {one.reference}{on}"))
        figures = grid()
        for output in one.outputs:
            figures.add_row(
                *(_plain(text if place else f"  {text}") for place, text in enumerate(fidelity_cells(output)))
            )
        console.print(figures)


def _show_statements(console: Console, report: CompressionReport) -> None:
    from rich.table import Table

    if report.statements:
        console.print()
        console.print(_plain("Compression"), style="bold")
    for one in report.statements:
        console.print(_plain(statement_heading(one)))
        stages = Table.grid(padding=(0, 2))
        for stage, fate, reason in statement_rows(one):
            stages.add_row(_plain(f"  {stage}"), _styled(fate), _plain(reason))
        console.print(stages)


def _show_layers(console: Console, report: CompressionReport, layers: bool | None) -> None:
    """Show a table with one line a layer; what a narrow screen has no room for is named below it."""
    if layers is False or not report.layers:
        return
    shown = shown_layers(report, is_all=bool(layers))
    columns, dropped = fitting_columns(shown, console.width)
    made = _table("Layers", columns, layer_rows(shown, columns))
    made.padding = (0, 1, 0, 0)
    for name, column in zip(columns, made.columns, strict=True):
        column.justify = "left" if name in TEXT_COLUMNS else "right"
        column.no_wrap = name != "layer"
    console.print()
    console.print(made)
    for note in layer_notes(report, shown, dropped):
        console.print(_plain(note))


def _show_kernels(console: Console, kernels: Sequence[Layer], is_all: bool | None) -> None:
    """Show what an engine executes, kernel by kernel; it is what a person builds one to know."""
    if not kernels:
        return
    console.print()
    console.print(_table("Kernels", COLUMNS, kernel_rows(kernels, is_all=bool(is_all))))
    if left_out := kernels_left_out(kernels, is_all=bool(is_all)):
        console.print(_plain(left_out))


def _show_list(console: Console, title: str, items: Sequence[str]) -> None:
    from rich.table import Table

    if items:
        console.print(_plain(title), style="bold")
        listed = Table.grid(padding=(0, 1))
        for item in items:
            listed.add_row(_plain("-"), _plain(item))
        console.print(listed)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich import box
    from rich.table import Table

    made = Table(title=_plain(title) if title else None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for place, column in enumerate(columns):
        # A narrow screen breaks lines between words before it breaks words.
        made.add_column(_plain(column), overflow="fold", min_width=_least_width(columns, rows, place))
    for row in rows:
        made.add_row(*(_styled(text) for text in row))
    return made


def _least_width(columns: Sequence[str], rows: Sequence[Sequence[str]], place: int) -> int:
    words = " ".join([columns[place], *(row[place] for row in rows)]).split()
    return min(_WORD, max(map(len, words), default=1))


def _facts(facts: Sequence[tuple[str, str]]) -> Table:
    from rich.table import Table

    made = Table.grid(padding=(0, 2))
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for label, text in facts:
        made.add_row(_plain(f"  {label}"), _plain(text), style=_STYLES.get(label, ""))
    return made


def _plain(text: str) -> Text:
    """Make text that rich neither parses as markup nor lets speak to the terminal."""
    from rich.text import Text

    return Text(printable(text))


def _styled(text: str) -> Text:
    styled = _plain(text)
    styled.stylize(_STYLES.get(text, ""))
    return styled


def _rendered(show: Callable[[Console], None], *, color: bool, width: int | None) -> str:
    from rich.console import Console

    console = Console(
        file=io.StringIO(),
        force_terminal=color,
        force_jupyter=False,
        force_interactive=False,
        color_system="standard" if color else None,
        no_color=not color,
        width=width or _WIDTH,
        highlight=False,
        emoji=False,
        markup=False,
        legacy_windows=False,
    )
    show(console)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip("\n")


def _tensor_facts(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], ports: Mapping[str, Port] | None = None
) -> list[tuple[str, str]]:
    return [
        (label, "; ".join(_tensor_fact(spec, (ports or {}).get(spec.name)) for spec in specs))
        for label, specs in (("inputs", inputs), ("outputs", outputs))
    ]


def _tensor_fact(spec: TensorSpec, port: Port | None) -> str:
    inside = ""
    if port is not None and port.permutation:
        inside = f"({port.layout or f'axes {list(port.permutation)}'} in the file)"
    return " ".join(part for part in (spec.name, spec.dtype, _shape(spec.shape), spec.layout, inside) if part)


def _quantization_facts(source: SourceQuantization | None) -> list[tuple[str, str]]:
    if source is None:
        return []
    parts = [
        count(len(source.weights), "weight tensor"),
        count(len(source.activations), "activation"),
        count(len(source.dynamic), "dynamic input"),
    ]
    return [("carries", f"its own quantization of {', '.join(parts)}; this file holds the values as float32")]


def _or(number: float | None, text: Callable[[float], str]) -> str:
    return NOT_AVAILABLE if number is None else text(number)


def _shape(shape: Sequence[int | str]) -> str:
    return "×".join(str(axis) for axis in shape) or "scalar"
