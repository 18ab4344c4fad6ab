"""The forms of one model side by side: its source, its canonical ONNX and an artifact, on the same samples, here."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

import edgedeploy
from edgedeploy.backends import backend
from edgedeploy.build import MANIFEST, BuildRequest, Built, Progress, canonical_model, load_artifact
from edgedeploy.documents import closest
from edgedeploy.errors import ModelError, UsageError
from edgedeploy.golden import answers_here
from edgedeploy.judge import metrics as judge
from edgedeploy.judge.metrics import MetricChoice, Scored, metric_from_text
from edgedeploy.prepare.dataset import Samples, inference_batch, load_samples, random_samples
from edgedeploy.prepare.fidelity import compare
from edgedeploy.prepare.identity import source_identity
from edgedeploy.records.model import Fidelity, Model, TensorSpec
from edgedeploy.records.verification import Form, LayerComparison, MetricValues, PairedScores, Verification
from edgedeploy.storage import sha256_file
from edgedeploy.units import parse_quantity

# Made-up samples where there is no evaluation set: they show a wrong axis or a lost branch, not accuracy.
_RANDOM_SAMPLES = 16
# What the canonical form is made for, and what its artifacts share their tensors' names with.
_HOST_RUNTIME = "onnxruntime"
FP32, QUANTIZED, ARTIFACT = "fp32 ONNX", "quantized ONNX", "artifact"

Tensors = Mapping[str, Any]
Run = Callable[[Tensors], Tensors]


@dataclass(frozen=True, slots=True)
class Limit:
    """How much worse than the reference a metric may be.

    Attributes:
        amount: not negative; of what, says `kind`: points and absolute in the metric's own unit, relative as a share of
            the reference's value.
        text: as written.
    """

    metric: MetricChoice
    amount: float
    kind: Literal["points", "relative", "absolute"]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyRequest:
    """What to compare, on what.

    Attributes:
        subject: a model reference, or the folder of an artifact.
        model: the source of an artifact; "" for a model reference.
        base: folder that modules are looked up in.
        inputs: of a Python source; empty: the artifact's own, or what the file says.
        evaluation: None: random samples.
        output: the output that metrics judge which name none; "": the only one.
        samples: look at no more than so many; None: all of the set.
        layers: compare the inner tensors too.
        min_sqnr_db: limit for each output of the last form, against the first.
    """

    subject: str
    model: str = ""
    weights: Path | None = None
    inputs: tuple[TensorSpec, ...] = ()
    base: Path = field(default_factory=Path.cwd)
    evaluation: Path | None = None
    metrics: tuple[MetricChoice, ...] = ()
    output: str = ""
    samples: int | None = None
    layers: bool = False
    min_sqnr_db: float | None = None
    limits: tuple[Limit, ...] = ()
    trust_pickle: bool = False


@dataclass(frozen=True, slots=True)
class _Form:
    """A form and how to compute it; `graph` where it is ONNX whose inner tensors can be asked for."""

    name: str
    detail: str
    run: Run
    graph: Any = None


@dataclass(frozen=True, slots=True)
class _Answers:
    """What every form answers, kept per batch: a form is run once, however many forms it is compared with.

    Attributes:
        outputs: form → one dictionary of outputs for each batch.
        batches: the number of samples in each.
    """

    outputs: Mapping[str, Sequence[Tensors]]
    batches: Sequence[int]

    @property
    def count(self) -> int:
        return sum(self.batches)

    def joined(self, form: str, output: str) -> Any:
        """Return one output of one form for all samples."""
        parts = [answer[output] for answer in self.outputs[form]]
        if any(part.ndim == 0 or len(part) != rows for part, rows in zip(parts, self.batches, strict=True)):
            raise UsageError(
                f"the first axis of output {output!r} is not the sample (shape {parts[0].shape} for {self.batches[0]} "
                f"samples), so it cannot be scored"
            )
        if len({part.shape[1:] for part in parts}) != 1:
            raise UsageError(
                f"output {output!r} has another shape in each batch, so it cannot be scored; pad it to one length"
            )
        return np.concatenate(parts)


def limit_from_text(text: str) -> Limit:
    """Parse METRIC=AMOUNT: "top1=1pt", "mae=5%" of the reference's value, "mse=0.01"; raises UsageError.

    >>> limit_from_text("top1=1pt").amount
    0.01
    """
    name, equals, amount = text.rpartition("=")
    if not equals:
        raise UsageError(f"--max-loss {text} is not of the form METRIC=AMOUNT, such as top1=1pt")
    metric = metric_from_text(name)
    try:
        value, dimension = parse_quantity(amount)
    except ValueError as error:
        raise UsageError(f"--max-loss {text}: {error}") from error
    kinds: dict[str, Literal["points", "relative", "absolute"]] = {
        "points": "points", "fraction": "relative", "": "absolute",
    }  # fmt: skip
    if dimension not in kinds:
        raise UsageError(f"--max-loss {text}: a loss is written in points (1pt), as a share (5%) or as a bare number")
    if dimension == "points" and not metric.is_function and metric.name not in judge.RATES:
        raise UsageError(f"--max-loss {text}: {metric.name} is no share of samples; write {name}=5% or {name}=0.01")
    if value < 0:
        raise UsageError(f"--max-loss {text} is negative; write the loss that is allowed, such as {name}=1pt")
    return Limit(metric, value, kinds[dimension], amount.strip())


def verify(request: VerifyRequest, progress: Progress) -> Verification:
    """Compare all forms of a model with its source, output by output, metric by metric, and layer by layer.

    Every answer is kept until the end: as much memory as the outputs of all samples take, for each form.

    Raises:
        UsageError: names, samples, labels or limits that do not fit.
        ModelError: a form cannot be made or run.
        FidelityError: a form answers NaN where the source does not, or in another shape.
    """
    built = load_artifact(Path(request.subject)) if _is_artifact(request.subject) else None
    model, forms, notes = _forms(request, built, progress)
    samples = _samples(request, model, notes)
    if built is not None:
        forms.append(_artifact_form(request, built, samples))
    chosen = _chosen_metrics(request, model, samples, notes)
    functions = {metric.name: _function(metric, request.base) for metric, _ in chosen if metric.is_function}
    if request.layers and not _comparable(forms):
        raise UsageError(
            f"--layers compares tensors that two ONNX graphs share by name, which those of PyTorch and of other "
            f"runtimes are not; {request.subject} carries no quantization, so give an ONNX Runtime artifact of it"
        )
    answers = _answers(forms, samples, model, request.samples, progress)
    if answers.count < min(samples.count, request.samples or samples.count):
        notes.append(f"the model's fixed batch leaves out the last {samples.count - answers.count} samples")
    fidelity = tuple(_compared(answers, pair, samples) for pair in _pairs(forms))
    values = tuple(_values(one, outputs, answers, samples, functions.get(one.name)) for one, outputs in chosen)
    layers = _layers(request, forms, samples, model, built, notes, progress) if request.layers else None
    return Verification(
        subject=request.subject,
        samples=answers.count,
        sample_source=samples.name,
        is_synthetic=samples.is_synthetic,
        forms=tuple(Form(name=form.name, detail=form.detail) for form in forms),
        fidelity=fidelity,
        metrics=values,
        layers=layers,
        unmet=_unmet(request, forms, fidelity, values),
        notes=tuple(notes),
        edgedeploy=edgedeploy.__version__,
    )


def _is_artifact(subject: str) -> bool:
    path = Path(subject)
    return path.is_dir() or path.name == MANIFEST


def _forms(request: VerifyRequest, built: Built | None, progress: Progress) -> tuple[Model, list[_Form], list[str]]:
    """Return the canonical model, its forms on the host, the source first, and what a reader should know about them."""
    notes: list[str] = []
    if built is None and ":" not in request.subject and not Path(request.subject).is_file():
        raise UsageError(
            f"{request.subject} does not exist; give an artifact's folder, a .onnx, a .pt2 or package.module:factory"
        )
    if built is None and request.model:
        raise UsageError(f"--model names the source of an artifact, and {request.subject} is a model itself; drop it")
    if built is not None:
        _demand_runnable(request, built)
        notes += _doubts(request, built)
    source = request.model or request.subject
    model = canonical_model(
        BuildRequest(
            name=Path(source).name,
            source=source,
            base=request.base,
            target="host",
            backend=_HOST_RUNTIME,
            precision="fp32",
            weights=request.weights,
            inputs=request.inputs or _own_inputs(source, built),
            trust_pickle=request.trust_pickle,
        ),
        progress,
    )
    forms = [_source_form(request, source, model, progress), *_canonical_forms(model)]
    if built is not None:
        _demand_same_interface(built, model)
    return model, forms, notes


def _own_inputs(source: str, built: Built | None) -> tuple[TensorSpec, ...]:
    return built.artifact.recipe.inputs if built is not None and ":" in source else ()


def _demand_runnable(request: VerifyRequest, built: Built) -> None:
    recipe = built.artifact.recipe
    runtime = backend(recipe.backend)
    if runtime.builds_on == "device" or not runtime.computes:
        raise UsageError(
            f"{request.subject} was compiled for {recipe.backend}, which verify does not run; measure its accuracy on "
            f"a device: edgedeploy bench {request.subject} --device NAME --evaluation SET"
        )
    if not request.model:
        raise UsageError(
            f"{request.subject} was compiled from {recipe.model!r}, and its manifest holds no path to it; name the "
            f"source to compare with: --model package.module:factory --weights FILE, or --model FILE.onnx"
        )


def _doubts(request: VerifyRequest, built: Built) -> list[str]:
    """Say so when the artifact was not compiled from the source that was named."""
    recipe = built.artifact.recipe
    weights = sha256_file(request.weights) if request.weights and request.weights.is_file() else ""
    differing = [
        what
        for what, is_same in (
            ("code or file", source_identity(request.model, request.base) == recipe.model_sha256),
            ("weights", weights == recipe.weights_sha256),
        )
        if not is_same
    ]
    if not differing:
        return []
    return [
        f"{request.subject} was not compiled from this source (its {' and '.join(differing)} had another digest): the "
        f"figures compare two models, not two forms of one"
    ]


def _demand_same_interface(built: Built, model: Model) -> None:
    for what, own, others in (
        ("inputs", built.artifact.inputs, model.inputs),
        ("outputs", built.artifact.outputs, model.outputs),
    ):
        names, wanted = [spec.name for spec in own], [spec.name for spec in others]
        if set(names) != set(wanted):
            raise UsageError(
                f"the artifact has the {what} {', '.join(names)} and the source {', '.join(wanted)}; name the source "
                f"that it was compiled from, with the same --input"
            )


def _source_form(request: VerifyRequest, source: str, model: Model, progress: Progress) -> _Form:
    from edgedeploy.prepare.load import load
    from edgedeploy.prepare.source.reference import source_run

    progress(f"loading {source}")
    loaded = load(source, request.weights, base=request.base, trust_pickle=request.trust_pickle)
    run = source_run(loaded, model)
    if loaded.kind == "onnx":
        return _Form("given ONNX", f"{source}, on this machine's ONNX Runtime", run)
    return _Form("PyTorch", f"{source}, as it was given, in eager mode", run)


def _canonical_forms(model: Model) -> list[_Form]:
    from edgedeploy.prepare.graph import Runner, read_graph
    from edgedeploy.prepare.source.replay import replay

    path = Path(model.path)
    graph = read_graph(path)
    if model.quantization is None:
        return [_Form(FP32, "the canonical form, in float32", Runner(path), graph)]
    quantized = replay(graph, model.quantization)
    return [
        _Form(FP32, "the canonical form, activations not quantized", Runner(path), graph),
        _Form(
            QUANTIZED,
            "the canonical form with the source's own quantization, simulated in float",
            Runner(quantized.SerializeToString(), is_optimized=False),
            quantized,
        ),
    ]


def _artifact_form(request: VerifyRequest, built: Built, samples: Samples) -> _Form:
    from edgedeploy.prepare.graph import Runner, read_graph

    recipe = built.artifact.recipe
    described = f"{built.artifact.name}, {recipe.precision}, on this machine's"
    if recipe.backend == _HOST_RUNTIME:
        detail = f"{described} ONNX Runtime with exact 8-bit kernels"
        return _Form(ARTIFACT, detail, Runner(built.file), read_graph(built.file))
    return _Form(ARTIFACT, f"{described} {recipe.backend}", _in_a_process(request, built, samples))


def _in_a_process(request: VerifyRequest, built: Built, samples: Samples) -> Run:
    """Return what answers the samples, batch after batch from the first on, from one run of the device half here."""
    from safetensors.numpy import save_file

    made: dict[str, Any] = {}
    done = 0

    def answer(batch: Tensors) -> Tensors:
        nonlocal done
        rows = len(next(iter(batch.values())))
        if not made:
            size = inference_batch(built.artifact.inputs)
            count = min(samples.count, request.samples or samples.count) // size * size
            with tempfile.TemporaryDirectory(prefix="edgedeploy-") as folder:
                inputs = Path(folder) / "inputs.safetensors"
                save_file(samples.batch(0, count), inputs)
                made.update(answers_here(built.artifact, built.file, inputs, batch=size))
        done += rows
        return {name: values[done - rows : done] for name, values in made.items()}

    return answer


def _comparable(forms: Sequence[_Form]) -> bool:
    return len([form for form in forms if form.graph is not None]) > 1


def _samples(request: VerifyRequest, model: Model, notes: list[str]) -> Samples:
    if request.evaluation is not None:
        return load_samples(request.evaluation, model.inputs)
    fixed = [spec.shape[0] for spec in model.inputs if spec.shape and isinstance(spec.shape[0], int)]
    notes.append(
        "RANDOM SAMPLES: no evaluation set was given, so these figures show that the forms compute the same on noise, "
        "and nothing about accuracy or about real inputs; give --evaluation"
    )
    return random_samples(model.inputs, max(request.samples or _RANDOM_SAMPLES, *fixed, 1), seed=0)


def _chosen_metrics(
    request: VerifyRequest, model: Model, samples: Samples, notes: list[str]
) -> list[tuple[MetricChoice, tuple[str, ...]]]:
    """Return each metric with the outputs that it reads; those that have a limit are among them."""
    names = [spec.name for spec in model.outputs]
    if request.output and request.output not in names:
        raise UsageError(
            f"the model has no output {request.output!r}{closest(request.output, names)} (it has: {', '.join(names)})"
        )
    wanted = list(dict.fromkeys([*request.metrics, *(limit.metric for limit in request.limits)]))
    has_labels = samples.labels is not None or bool(samples.named_labels)
    if wanted and not has_labels:
        raise UsageError(
            f"{samples.name} has no labels, which {wanted[0].text} needs; give an evaluation set with an array "
            f"`labels`, or drop the metric to compare outputs only"
        )
    if not wanted and request.evaluation is not None:
        notes.append(
            "outputs only: no metric was asked for, though the set has labels; give --metric, such as top1"
            if has_labels
            else f"outputs only: {samples.name} has no labels, so nothing is said about accuracy"
        )
    return [(metric, judge.outputs_of(metric, names, request.output)) for metric in wanted]


def _answers(forms: Sequence[_Form], samples: Samples, model: Model, limit: int | None, progress: Progress) -> _Answers:
    outputs: dict[str, list[Tensors]] = {form.name: [] for form in forms}
    batches: list[int] = []
    count = min(samples.count, limit or samples.count)
    for batch in samples.batches(model.inputs, limit):
        for form in forms:
            outputs[form.name].append(form.run(batch))
        batches.append(len(next(iter(batch.values()))))
        progress(f"computing {len(forms)} forms: {sum(batches)} of {count} samples")
    return _Answers(outputs, batches)


def _pairs(forms: Sequence[_Form]) -> list[tuple[str, str]]:
    """Return every form against the first, and the artifact also against the form that it was made from."""
    names = [form.name for form in forms]
    last = [(names[-2], names[-1])] if names[-1] == ARTIFACT else []
    return [*((names[0], name) for name in names[1:]), *last]


def _compared(answers: _Answers, pair: tuple[str, str], samples: Samples) -> Fidelity:
    reference, candidate = (answers.outputs[name] for name in pair)
    # `compare` hands each batch to both models; here a batch stands for answers that exist already.
    places = iter(range(len(answers.batches)))
    batches = ({"place": np.full(rows, next(places))} for rows in answers.batches)
    return compare(
        lambda batch: reference[int(batch["place"][0])],
        lambda batch: candidate[int(batch["place"][0])],
        batches,
        names=pair,
        sample_source=samples.name,
    )


def _values(
    metric: MetricChoice,
    outputs: tuple[str, ...],
    answers: _Answers,
    samples: Samples,
    function: judge.Function | None,
) -> MetricValues:
    labels = {name: array[: answers.count] for name, array in samples.named_labels.items()}
    if samples.labels is not None:
        labels[judge.ONLY] = samples.labels[: answers.count]
    scored: dict[str, Scored] = {}
    for form in answers.outputs:
        read = {name: answers.joined(form, name) for name in outputs}
        try:
            scored[form] = judge.evaluate(metric, read, labels, function)
        except ModelError as error:
            raise ModelError(f"{form}: {error}") from error
    is_larger_better = judge.is_larger_better(metric, function)
    first, *others = scored
    return MetricValues(
        metric=metric.text,
        outputs=outputs,
        larger_is_better=is_larger_better,
        values={form: one.value for form, one in scored.items()},
        pairs=tuple(
            pair
            for form in others
            if (pair := _paired(first, form, scored[first].scores, scored[form].scores, is_larger_better))
        ),
    )


def _paired(
    reference: str,
    candidate: str,
    before: tuple[float, ...] | None,
    after: tuple[float, ...] | None,
    is_larger_better: bool,
) -> PairedScores | None:
    if before is None or after is None:
        return None
    sign = 1 if is_larger_better else -1
    changes = [sign * (new - old) for old, new in zip(before, after, strict=True)]
    return PairedScores(
        reference=reference,
        candidate=candidate,
        lost=sum(change < 0 for change in changes),
        gained=sum(change > 0 for change in changes),
    )


def _function(metric: MetricChoice, base: Path) -> judge.Function:
    """Import the person's own metric."""
    module_name, _, attribute = metric.name.partition(":")
    folder = str(base.resolve())
    sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # the person's module may fail in any way while it is imported
        raise UsageError(
            f"the metric {metric.name} cannot be imported: {type(error).__name__}: {error}; run from the folder that "
            f"holds {module_name}, or give it as --base"
        ) from error
    finally:
        sys.path.remove(folder)
    for step in attribute.split("."):
        if not hasattr(found, step):
            public = [name for name in vars(found) if not name.startswith("_")]
            raise UsageError(f"{module_name} has no {attribute!r}{closest(step, public)}")
        found = getattr(found, step)
    if not callable(found):
        raise UsageError(f"{metric.name} is a {type(found).__name__}; a metric is a function of (outputs, labels)")
    function: judge.Function = found
    return function


def _layers(
    request: VerifyRequest,
    forms: Sequence[_Form],
    samples: Samples,
    model: Model,
    built: Built | None,
    notes: list[str],
    progress: Progress,
) -> LayerComparison:
    from edgedeploy.prepare.layerwise import SAMPLES, compare_layers

    *_, reference, candidate = (form for form in forms if form.graph is not None)
    if built is not None and built.artifact.recipe.quantization and built.artifact.recipe.quantization.equalize:
        notes.append(
            "the artifact's channels were equalized, which rescales inner tensors on purpose: its figures per layer "
            "compare unlike scales; build without -Q equalize=true to read them"
        )
    progress(f"comparing the layers of {reference.name} and {candidate.name}")
    limit = min(SAMPLES, request.samples or SAMPLES)
    return compare_layers(
        reference.graph, candidate.graph, samples, model.inputs, names=(reference.name, candidate.name), limit=limit
    )


def _unmet(
    request: VerifyRequest, forms: Sequence[_Form], fidelity: Sequence[Fidelity], values: Sequence[MetricValues]
) -> tuple[str, ...]:
    first, last = forms[0].name, forms[-1].name
    sentences = []
    least = request.min_sqnr_db
    for pair in fidelity:
        if least is not None and (pair.reference, pair.candidate) == (first, last):
            sentences += [
                f"output {one.output!r} of the {last} has {one.sqnr_db:.1f} dB against {first}; {least:g} dB are "
                f"demanded"
                for one in pair.outputs
                if one.sqnr_db is not None and one.sqnr_db < least
            ]
    by_text = {one.metric: one for one in values}
    for limit in request.limits:
        one = by_text[limit.metric.text]
        before, after = one.values[first], one.values[last]
        loss = before - after if one.larger_is_better else after - before
        allowed = limit.amount * abs(before) if limit.kind == "relative" else limit.amount
        # Rates are ratios of counts: a loss of exactly what is allowed may come out a rounding error larger.
        if loss > allowed + 1e-12:
            sentences.append(
                f"{one.metric} is {after:.6g} in the {last} and {before:.6g} in {first}; a loss of {limit.text} is "
                f"allowed"
            )
    return tuple(sentences)
