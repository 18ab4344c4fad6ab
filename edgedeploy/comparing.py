"""A model in every precision of some back ends, side by side: built, measured beside fp32, and played off.

Every precision is measured interleaved with the fp32 of its own back end; the best of each back end then play off
against each other, likewise interleaved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from edgedeploy.arguments import allowed_precisions, margins_from_texts
from edgedeploy.backends import Backend
from edgedeploy.build import BuildRequest, Built, Progress, build
from edgedeploy.engines import engine
from edgedeploy.errors import DeviceError, EdgedeployError, ModelError, ToolchainError, UsageError
from edgedeploy.measure import MeasureRequest
from edgedeploy.outcomes import Outcome, Pair, judge_pairs, measure_and_store
from edgedeploy.records.comparison import Comparison
from edgedeploy.records.run import Run
from edgedeploy.records.target import Precision, Target
from edgedeploy.records.verdict import CellVerdict, Contender, Policy
from edgedeploy.results import Results
from edgedeploy.storage import cache_dir


@dataclass(slots=True)
class Comparing:
    """A model in every precision of some back ends, on the way from a request to a table.

    Attributes:
        request, session: what is asked for, less what differs from one artifact to the next.
        built: back end → precision → artifact.
        pairs: fp32 and another precision of one back end, measured.
        play_offs: the best of two back ends, measured.
    """

    request: BuildRequest
    target: Target
    policy: Policy
    session: MeasureRequest
    store: Results
    progress: Progress
    built: dict[str, dict[Precision, Built]] = field(default_factory=dict)
    absent: list[Contender] = field(default_factory=list)
    errors: list[EdgedeployError] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    play_offs: list[Pair] = field(default_factory=list)

    @property
    def output(self) -> str:
        """The output that the metric judges; "" for the only one."""
        return self.session.evaluation.output if self.session.evaluation else ""

    def build(self, backend: str, state: Backend | str) -> None:
        """Build every precision that a back end may have, or note why not."""
        if isinstance(state, str):
            for precision in self.target.backends[backend].precisions:
                self._leave_out(backend, precision, state)
            return
        for precision in allowed_precisions(self.target, state):
            try:
                built = build(dataclasses.replace(self.request, backend=backend, precision=precision), self.progress)
                session = self.session
                built = engine(built, session.device_name, session.device, self.progress, wait_s=session.wait_s)
            except (ModelError, ToolchainError, DeviceError) as error:
                self._fail(backend, precision, error)
            except UsageError as error:
                # What is missing for int8 alone, a calibration set, need not keep the others from being compared.
                if precision != "int8" or self.request.calibration is not None:
                    raise
                self._fail(backend, precision, error)
            else:
                self.built.setdefault(backend, {})[precision] = built

    def measure(self) -> None:
        """Measure every precision beside the fp32 of its back end."""
        work: list[tuple[Built, Built]] = []
        for backend, precisions in self.built.items():
            fp32 = precisions.get("fp32")
            for precision, built in precisions.items():
                if fp32 is None:
                    self._leave_out(backend, precision, "there is no fp32 of this back end to compare it with")
                elif built is not fp32:
                    work.append((fp32, built))
        for fp32, built in work:
            if (pair := self._measured(fp32, built, self.session, len(work))) is not None:
                self.pairs.append(pair)
        if not self.pairs and self.errors:
            raise self.errors[0]
        if not self.pairs:
            said = "; ".join(dict.fromkeys(row.absent for row in self.absent)) or "only one precision is allowed"
            raise UsageError(f"nothing can be compared for target {self.target.name!r}: {said}")

    def result(self, accuracy_margin: str) -> Comparison:
        """Judge what was measured, let the best of each back end play off, and say what all of it shows."""
        from edgedeploy.judge import advice, contenders

        outcome = judge_pairs(self.request.name, self.pairs, self.policy, {})
        cells = outcome.verdict.cells
        if not any(stored.run.outputs and stored.run.outputs.scores for pair in self.pairs for stored in pair):
            accuracy_margin = ""
        champion, finals = "", Outcome(judge_pairs(self.request.name, [], self.policy, {}).verdict, {})
        if advice.has_latency(cells):
            champion, finals = self._play_off(cells, is_accuracy_judged=bool(accuracy_margin))
        rows = contenders.with_agreement(outcome.verdict.contenders, _agreements(self.pairs, self.output))
        rows = (*rows, *contenders.only_in(finals.verdict.contenders, rows))
        known = {name: rules.int8_slower for name, rules in self.target.backends.items()}
        by_cell = {row.cell: row for row in rows}
        said = advice.conclusions(cells, by_cell, known, is_accuracy_judged=bool(accuracy_margin))
        last = advice.conclusion(
            by_cell.get(champion), accuracy_margin=accuracy_margin, is_evaluated=self.session.evaluation is not None
        )
        return Comparison(
            name=self.request.name,
            target=self.target.name,
            device=self.session.device_name,
            contenders=(*rows, *self.absent),
            cells=cells,
            play_offs=finals.verdict.cells,
            accuracy_margin=accuracy_margin,
            conclusions=(*said, *advice.play_off_conclusions(finals.verdict.cells, by_cell), last),
            fastest=champion,
            runs=(*outcome.runs, *finals.runs),
        )

    def _play_off(self, cells: Sequence[CellVerdict], *, is_accuracy_judged: bool) -> tuple[str, Outcome]:
        """Return the cell of the fastest of all back ends, and what it was decided by."""
        from edgedeploy.judge.advice import faster_by, fastest_of

        policy = Policy(
            margins=margins_from_texts(("latency_p50=+0%",)),
            max_blocks=self.policy.max_blocks,
            min_blocks=self.policy.min_blocks,
        )
        champion: Built | None = None
        for precisions in self.built.values():
            fp32 = precisions.get("fp32")
            if fp32 is None:
                continue
            own = [cell for cell in cells if cell.baseline_cell == fp32.artifact.name]
            name = fastest_of(own, fp32.artifact.name, is_accuracy_judged=is_accuracy_judged)
            best = next(built for built in precisions.values() if built.artifact.name == name)
            if champion is None:
                champion = best
                continue
            session = dataclasses.replace(self.session, evaluation=None)
            pair = self._measured(champion, best, session, 1)
            if pair is None:
                continue
            self.play_offs.append(pair)
            (cell,) = judge_pairs(self.request.name, [pair], policy, {}).verdict.cells
            champion = best if faster_by(cell) is not None else champion
        assert champion is not None, "a pair was measured, and it had an fp32"
        return champion.artifact.name, judge_pairs(self.request.name, self.play_offs, policy, {})

    def _measured(self, baseline: Built, candidate: Built, session: MeasureRequest, cells: int) -> Pair | None:
        """Measure two artifacts until it is known which is faster; None, with a row that says why, where it failed."""
        from edgedeploy.judge.advice import is_timed

        sides = tuple((built.artifact.name, built) for built in (baseline, candidate))
        recipe = candidate.artifact.recipe
        try:
            first, second = measure_and_store(
                dataclasses.replace(session, sides=sides),
                lambda runs: is_timed(runs[0], runs[1], self.policy, cells=cells),
                self.store,
                self.progress,
            )
        except (ModelError, ToolchainError, DeviceError) as error:
            self._fail(recipe.backend, recipe.precision, error)
            return None
        return first, second

    def _fail(self, backend: str, precision: Precision, error: EdgedeployError) -> None:
        self.progress(f"{self.request.name}: {backend} {precision}: {error}")
        self.errors.append(error)
        self._leave_out(backend, precision, str(error))

    def _leave_out(self, backend: str, precision: Precision, reason: str) -> None:
        row = Contender(
            cell=f"{self.request.name}-{self.target.name}-{backend}-{precision}",
            backend=backend,
            precision=precision,
            target=self.target.name,
            device=self.session.device_name,
            model=self.request.name,
            absent=reason,
        )
        self.absent.append(row)


def _agreements(pairs: Sequence[Pair], output: str) -> dict[str, float]:
    """Return the share of evaluation samples to which a candidate gives its baseline's arg-max, by cell."""
    found = {new.run.cell: _agreement(old.run, new.run, output) for old, new in pairs}
    return {cell: share for cell, share in found.items() if share is not None}


def _agreement(baseline: Run, candidate: Run, output: str) -> float | None:
    from safetensors.numpy import load_file

    from edgedeploy.prepare.fidelity import compare

    if baseline.outputs is None or candidate.outputs is None:
        return None
    files = [cache_dir() / "outputs" / f"{one.sha256}.safetensors" for one in (baseline.outputs, candidate.outputs)]
    expected, actual = (
        {name: values for name, values in load_file(file).items() if output in ("", name)} for file in files
    )
    names, source = (baseline.cell, candidate.cell), baseline.outputs.dataset
    compared = compare(lambda _: expected, lambda _: actual, [expected], names=names, sample_source=source)
    return next((one.argmax_agreement for one in compared.outputs if one.argmax_agreement is not None), None)
