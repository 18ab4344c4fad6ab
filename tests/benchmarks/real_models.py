"""Real networks on every runtime that is installed, fp32, fp16 and int8: answers, accuracy, size, compile time, latency.

    python -m tests.benchmarks real_models [-- --labelled SET.npz] [--markdown FILE] [--model NAME] [--backend NAME]

Needs what tests/benchmarks/subjects.py and tests/benchmarks/speech.py name. Each artifact is the whole pipeline's own for
the target, and runs in processes of its own, as on a device: a runtime that crashes loses its cell and nothing else.

Answers are compared with PyTorch's in fp32, and with those of the very ONNX form that the artifact was compiled from,
which is computed twice: as it is written (Q/DQ in float), and by ONNX Runtime's integer kernels. The second comparison
says how well a runtime keeps the form's numbers; what quantization itself costs is in the first. Latency is of one
sample on one thread, set beside the others' inference by inference. Compile time starts from the exported ONNX; the
first int8 back end of a network also pays for watching its activations, which the others take from the cache.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgedeploy import pipeline
from edgedeploy.arguments import parse_inputs
from edgedeploy.backends import load_backends, session_file, session_options
from edgedeploy.build import BuildRequest, Built, canonical_model, this_target
from edgedeploy.errors import DeviceError, EdgedeployError
from edgedeploy.lab import bundle, visits
from edgedeploy.lab.inventory import device, load_lab, open_transport
from edgedeploy.lab.visits import Side
from edgedeploy.prepare.dataset import Samples, load_samples
from edgedeploy.prepare.emission.exact_products import exact_here
from edgedeploy.prepare.graph import Runner, read_graph
from edgedeploy.prepare.load import load
from edgedeploy.prepare.source.reference import source_run
from edgedeploy.storage import cache_dir, sha256_file
from tests.benchmarks.agreement import figures, paired
from tests.benchmarks.subjects import ROOT, SUBJECTS, Prepared

REFERENCE = "onnxruntime fp32"
# What counts as the same answers: of fp32 against PyTorch, of fp16 and int8 against the form they were compiled from.
MOST_RELATIVE_ERROR = {"fp32": 1e-4, "fp16": 5e-3}
LEAST_COSINE = 0.99
WARM_UP = {"window": 10, "tolerance": 0.02, "cap_s": 2.0}
OPEN_TIMEOUT_S, CLOSE_TIMEOUT_S = 300.0, 10.0
# How the pipeline names the forms that it leaves beside an artifact.
FORMS = {"fp16": "short.onnx", "int8": "quantized.onnx"}
BATCH = 16


@dataclass(slots=True)
class Cell:
    """One network on one runtime in one precision; `row` is what is told about it."""

    backend: str
    precision: str
    row: dict
    built: Built | None = None

    @property
    def name(self):
        return f"{self.backend} {self.precision}"

    def side(self, inputs):
        """Return what the runner must have to answer these inputs."""
        artifact = self.built.artifact
        return Side(
            cell=self.name,
            artifact_sha256=artifact.sha256,
            session_sha256=sha256_file(session_file(self.backend)),
            options=session_options(artifact),
            inputs_sha256=sha256_file(inputs),
        )


@dataclass(frozen=True, slots=True)
class Known:
    """What every artifact of a network is judged by.

    Attributes:
        sets: title → samples; the first set says how far answers lie apart.
        expected: title → PyTorch's answers.
        exported_s: seconds to load, export and simplify.
    """

    files: Prepared
    calibration_samples: int
    sets: dict[str, Samples]
    expected: dict[str, np.ndarray]
    exported_s: float

    @property
    def first(self):
        return next(iter(self.sets))


def known(name, target, scratch, labelled=None):
    """Prepare a network, export it and ask PyTorch for the answers."""
    subject = SUBJECTS[name]
    folder = scratch / name.replace(" ", "_").replace(",", "")
    folder.mkdir(exist_ok=True)
    say(f"{name}: preparing")
    files = subject.prepare(folder, labelled)
    request = BuildRequest(
        name=name,
        source=subject.source,
        base=ROOT,
        target=target,
        backend="onnxruntime",
        precision="fp32",
        weights=files.weights,
        inputs=parse_inputs(subject.inputs),
        calibration=files.calibration,
    )
    begin = time.perf_counter()
    model = canonical_model(request, say)
    exported_s = round(time.perf_counter() - begin, 2)
    sets = {title: load_samples(path, model.inputs) for title, path in files.evaluation.items()}
    source = source_run(load(subject.source, files.weights, base=ROOT), model)
    seen = load_samples(files.calibration, model.inputs).count
    return Known(files, seen, sets, {title: answers(source, one) for title, one in sets.items()}, exported_s)


class Table:
    """One run of the command: everything is built for one target, in one cache, and answers on one local device."""

    def __init__(self, target, backends, scratch, *, twice=False):
        self.target, self.backends, self.scratch, self.twice = target, backends, scratch, twice

    def of(self, name, labelled):
        """Return all figures of one network."""
        subject, facts = SUBJECTS[name], known(name, self.target, self.scratch, labelled)
        cells = [self.cell(name, backend, precision, facts.files) for backend, precision in self.pairs(subject)]
        with local_device() as (agent, transport):
            for cell in cells:
                if cell.built is not None:
                    judge(cell, facts, agent, transport)
            timed = [cell for cell in cells if "answers" in cell.row]
            time_interleaved(timed, facts.sets[facts.first], subject.rounds, agent, transport)
        return {
            "origin": subject.origin,
            "has_meaning": subject.has_meaning,
            "parameters": next((cell.built.artifact.compression.parameters for cell in cells if cell.built), None),
            "export_s": facts.exported_s,
            "calibration_samples": facts.calibration_samples,
            "answers_on": facts.first,
            "pytorch_top1": {
                title: float((facts.expected[title].argmax(1) == samples.labels).mean())
                for title, samples in facts.sets.items()
                if samples.labels is not None
            },
            "cells": {cell.name: cell.row for cell in cells},
        }

    def pairs(self, subject):
        """Yield what is built of a network."""
        rules = this_target(self.target).backends
        for backend in self.backends:
            for precision in subject.precisions:
                if precision in rules[backend].precisions:
                    yield backend, precision

    def cell(self, name, backend, precision, files):
        """Compile one cell; what cannot be built says why."""
        subject = SUBJECTS[name]
        recipe = {
            "weights": files.weights,
            "inputs": subject.inputs,
            "target": self.target,
            "backend": backend,
            "precision": precision,
            "calibration": files.calibration,
            "quantization": subject.policy if precision == "int8" else (),
            "name": name,
            "progress": say,
        }
        begin = time.perf_counter()
        try:
            built = pipeline.compile(subject.source, **recipe)
            seconds = time.perf_counter() - begin
            again = pipeline.compile(subject.source, rebuild=True, **recipe) if self.twice else None
        except EdgedeployError as error:
            say(f"{name}, {backend} {precision}: {error}")
            return Cell(backend, precision, {"outcome": "refused", "why": f"{type(error).__name__}: {error}"})
        artifact = built.artifact
        row = {
            "outcome": "built",
            "compile_s": None if built.is_cached else round(seconds, 2),
            "size_bytes": artifact.size_bytes,
            "quantized": len(artifact.layers.quantized),
            "float_islands": len(artifact.layers.float_islands),
            "notes": list(artifact.notes),
        }
        if again is not None:
            row["has_equal_bytes_twice"] = again.artifact.sha256 == artifact.sha256
        return Cell(backend, precision, row, built)


def judge(cell, facts, agent, transport):
    """Ask an artifact for its answers, in a process of its own, and say how good they are."""
    row = cell.row
    try:
        made = {title: device_answers(cell, samples, agent, transport) for title, samples in facts.sets.items()}
    except DeviceError as error:
        row |= {"outcome": "crashed", "why": str(error)}
        return
    if not all(np.isfinite(values).all() for values in made.values()):
        row |= {"outcome": "wrong", "why": "its answers are not all finite"}
        return
    row["answers"] = figures(made[facts.first], facts.expected[facts.first])
    row["accuracy"] = {
        title: paired(made[title], facts.expected[title], samples.labels)
        for title, samples in facts.sets.items()
        if samples.labels is not None
    }
    if cell.precision in FORMS:
        row |= against_form(cell, facts.sets[facts.first], made[facts.first])
    row["outcome"] = "right" if is_right(cell) else "wrong"


def against_form(cell, samples, made):
    """Compare answers with those of the ONNX that the artifact was compiled from."""
    form = cell.built.folder / FORMS[cell.precision]
    written = Runner(exact_here(read_graph(form)) or form, is_optimized=False)
    found = {"form": figures(made, answers(written, samples))}
    if cell.precision == "int8":
        found["form_on_integer_kernels"] = figures(made, answers(Runner(form), samples))
    return found


def is_right(cell):
    """Say whether a cell answers as it should."""
    row = cell.row
    if cell.precision == "int8":
        best = max(row["form"]["cosine_mean"], row["form_on_integer_kernels"]["cosine_mean"])
        return best >= LEAST_COSINE
    judged = row["answers"] if cell.precision == "fp32" else row["form"]
    return judged["max_relative_error"] <= MOST_RELATIVE_ERROR[cell.precision]


def answers(run, samples):
    """Return the only output for all samples."""
    parts = []
    for start in range(0, samples.count, BATCH):
        (made,) = run(samples.batch(start, min(start + BATCH, samples.count))).values()
        parts.append(np.asarray(made))
    return np.concatenate(parts)


# ---------------------------------------------------------------- on the device


@contextlib.contextmanager
def local_device():
    """Yield (agent, transport) of this machine as a device."""
    lab = device(load_lab(Path("no lab file")), "local")
    with open_transport("local", lab) as transport, bundle.connect(transport, lab, device_name="local") as agent:
        yield agent, transport


def device_answers(cell, samples, agent, transport):
    """Return an artifact's only output for all samples, one by one."""
    from safetensors.numpy import load_file

    inputs = inputs_file(samples)
    side = cell.side(inputs)
    ship(cell, side, inputs, agent, transport)
    with tempfile.TemporaryDirectory() as folder:
        fetched = Path(folder) / "outputs.safetensors"
        visits.compute_outputs(agent, transport, side, fetched)
        (made,) = load_file(fetched).values()
    return made


def inputs_file(samples):
    """Write samples as safetensors into the cache, once."""
    from safetensors.numpy import save_file

    path = cache_dir() / "inputs" / f"{samples.sha256}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        save_file(samples.batch(0, samples.count), path)
    return path


def ship(cell, side, inputs, agent, transport):
    files = {
        side.session_sha256: session_file(cell.backend),
        side.artifact_sha256: cell.built.file,
        side.inputs_sha256: inputs,
    }
    bundle.ship(agent, transport, files)


def time_interleaved(cells, samples, rounds, agent, transport):
    """Time cells in turns of two inferences, each in its own process, and write p50 and ratios into their rows.

    The ratio to ONNX Runtime's fp32 is taken round by round, so that this machine's drift hits both alike.
    """
    alive = [cell for cell in cells if is_open(cell, inputs_file(samples), agent, transport)]
    taken_s = {cell.name: [] for cell in alive}
    for number in range(rounds):
        # Every order of neighbours comes up: who runs after whom decides what is left in the caches.
        first = number % max(1, len(alive))
        turn = alive[first:] + alive[:first]
        for cell in turn[:: -1 if number % 2 else 1]:
            try:
                answer = agent.ask("bursts", visits=[cell.name], count=2, lead_in=1, timeout_s=60.0)
            except DeviceError as error:
                cell.row |= {"outcome": "crashed", "why": str(error)}
                alive = [other for other in alive if other is not cell]
            else:
                taken_s[cell.name].append([value / 1e9 for value in answer["samples_ns"][0]])
    for cell in alive:
        agent.ask("close", visit=cell.name, timeout_s=CLOSE_TIMEOUT_S)
        base = taken_s[REFERENCE] if REFERENCE in {other.name for other in alive} else None
        cell.row |= latencies(taken_s[cell.name], base)


def is_open(cell, inputs, agent, transport):
    """Open an artifact in a process of its own and warm it up; False, and a word in its row, where that fails."""
    say(f"{cell.name}: warming up")
    side = cell.side(inputs)
    ship(cell, side, inputs, agent, transport)
    job = {
        "session": side.session_sha256,
        "artifact": side.artifact_sha256,
        "inputs": side.inputs_sha256,
        "options": dict(side.options),
        "batch": 1,
        "warm_up": WARM_UP,
    }
    try:
        agent.ask("open", visit=cell.name, job=job, timeout_s=OPEN_TIMEOUT_S)
    except DeviceError as error:
        cell.row |= {"outcome": "crashed", "why": str(error)}
        return False
    return True


def latencies(own_s, base_s):
    """Return the median latency, and the median and quartiles of its ratio to another's, round by round.

    Args:
        own_s, base_s: the latencies of each round; base_s may be None.
    """
    found = {"p50_s": statistics.median(value for taken in own_s for value in taken)}
    if base_s is not None and len(own_s) > 1:
        ratios = [statistics.median(own) / statistics.median(base) for own, base in zip(own_s, base_s, strict=True)]
        found["times_of_onnxruntime_fp32"] = statistics.median(ratios)
        found["quartiles_of_that"] = statistics.quantiles(ratios, n=4)[::2]
    return found


# ---------------------------------------------------------------- the report


def summary(models):
    """Return the figures that the goals are about."""
    cells = [(name, key, row) for name, model in models.items() for key, row in model["cells"].items()]
    fp32 = {f"{name}, {key}": row["answers"]["max_relative_error"] for name, key, row in cells if _is(row, key, "fp32")}
    lite0 = models.get("EfficientNet-Lite0", {"cells": {}})["cells"]
    outcomes = [row["outcome"] for _, _, row in cells]
    return {
        "outcomes": {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))},
        "fp32_max_relative_error": max(fp32.values(), default=None),
        "fp32_worst": max(fp32, key=lambda key: fp32[key], default=None),
        "int8_cosine_on_the_same_numbers_EfficientNet-Lite0": {
            key: {
                "ONNX Runtime's integer kernels": row["form_on_integer_kernels"]["cosine_mean"],
                "exact arithmetic": row["form"]["cosine_mean"],
            }
            for key, row in lite0.items()
            if _is(row, key, "int8")
        },
    }


def _is(row, key, precision):
    return "answers" in row and key.endswith(precision)


def markdown(report):
    """Return the report as a Markdown table with its refusals below."""
    backends = report["backends"]
    lines = [
        f"| | | {' | '.join(backends)} |",
        f"|---|---|{'---|' * len(backends)}",
    ]
    notes = []
    for name, model in report["models"].items():
        for precision in ("fp32", "fp16", "int8"):
            rows = [model["cells"].get(f"{backend} {precision}") for backend in backends]
            if any(rows):
                shown = [_cell(row, precision, model, notes) for row in rows]
                lines.append(f"| {name} | {precision} | {' | '.join(shown)} |")
    lines += ["", *(f"{number}. {text}" for number, text in enumerate(notes, 1))]
    return "\n".join(lines).rstrip() + "\n"


def _cell(row, precision, model, notes):
    if row is None:
        return "—"
    if "answers" not in row:
        if row["why"] not in notes:
            notes.append(row["why"])
        return f"{row['outcome']} ({notes.index(row['why']) + 1})"
    parts = [] if row["outcome"] == "right" else [f"**{row['outcome']}**"]
    parts += [_told(row, precision, model), f"{row['size_bytes'] / 1e6:.3g} MB"]
    if "p50_s" in row:
        times = row.get("times_of_onnxruntime_fp32")
        parts.append(f"{row['p50_s'] * 1e3:.3g} ms" + (f" ({times:.2f}×)" if times else ""))
    return ", ".join(parts)


def _told(row, precision, model):
    """Say how good the answers are: accuracy where there are labels, else agreement; fp32 by its error."""
    found = row["answers"]
    if precision == "fp32":
        return f"error {found['max_relative_error']:.0e}"
    scored = next(iter(row["accuracy"].values()), None)
    if scored is not None:
        return f"{scored['top1']:.1%} (−{scored['lost']} +{scored['gained']})"
    if not model["has_meaning"]:
        return f"cosine {found['cosine_mean']:.4f}"
    return f"same arg-max {found['argmax_agreement']:.1%}"


def say(text):
    sys.stderr.write(f"{time.process_time():7.1f} s of CPU: {text}\n")
    sys.stderr.flush()


def known_backends(target):
    """Return the back ends that can be compared here, ONNX Runtime first, and why others cannot."""
    found, _ = load_backends()
    rules = this_target(target).backends
    absent = {name: one.missing() for name, one in found.items() if name in rules and name != "fake"}
    here = [name for name, reason in absent.items() if reason is None]
    return sorted(here, key=lambda name: name != "onnxruntime"), {name: why for name, why in absent.items() if why}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="x86-64")
    parser.add_argument("--backend", action="append", help="only these")
    parser.add_argument("--model", action="append", choices=list(SUBJECTS), help="only these")
    parser.add_argument("--rounds", type=int, help="of timing, for every network")
    parser.add_argument(
        "--labelled", type=Path, help="an .npz of labelled photographs, preprocessed as (x - 127) / 128"
    )
    parser.add_argument("--twice", action="store_true", help="compile everything twice and compare the bytes")
    parser.add_argument("--markdown", type=Path, help="a file for the table")
    parser.add_argument("--keep", type=Path, help="a folder for weights, samples and artifacts, used again next time")
    given = parser.parse_args()
    os.chdir(ROOT)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    # The converters' environments are no part of what is measured, and may stay.
    os.environ.setdefault("EDGEDEPLOY_TOOLS_DIR", str(cache_dir() / "tools"))
    backends, absent = known_backends(given.target)
    backends = [name for name in backends if name in (given.backend or backends)]
    if given.rounds:
        for name in SUBJECTS:
            SUBJECTS[name] = dataclasses.replace(SUBJECTS[name], rounds=given.rounds)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(exist_ok=True, parents=True)
        folder = folder.absolute()
        os.environ["EDGEDEPLOY_CACHE_DIR"] = str(folder / "cache")
        for name in backends:
            if (tools := load_backends()[0][name].tools) is not None:
                tools.python(say)
        table = Table(given.target, backends, folder, twice=given.twice)
        begin = time.perf_counter()
        models = {name: table.of(name, given.labelled) for name in given.model or SUBJECTS}
    report = {
        "target": given.target,
        "backends": backends,
        "not_installed": absent,
        "seconds": round(time.perf_counter() - begin),
        "summary": summary(models),
        "models": models,
    }
    if given.markdown:
        given.markdown.write_text(markdown(report), encoding="utf-8")
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
