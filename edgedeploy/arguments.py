"""What a person typed or wrote becomes records: inputs, margins, precisions, the release file with its policy."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import msgspec

from edgedeploy.backends import Backend, load_backends
from edgedeploy.documents import closest, complaint, line_of, to_builtins
from edgedeploy.errors import DocumentError, UsageError
from edgedeploy.judge.margin import margin_from_text
from edgedeploy.records.model import DType, TensorSpec
from edgedeploy.records.quantization import QuantizationPolicy
from edgedeploy.records.release import CellEntry, Release, load_release
from edgedeploy.records.target import Precision, Target
from edgedeploy.records.verdict import Contender, Margin, Metric, Policy

ALL = "all"
DEFAULT_MARGINS = ("accuracy=-1pt", "latency_p50=+5%", "peak_memory=+10%", "artifact_size=+10%")


def read_release(path: Path) -> tuple[Release, Policy]:
    """Read a release file and its gate's policy."""
    release = load_release(path)
    for own in (release.quantization, *(cell.quantization for cell in release.cells)):
        if own is not None:
            checked_policy(own, f"{path}: quantization.")
    margins: dict[Metric, Margin] = {}
    for metric, text in to_builtins(release.gate.margins).items():
        if text:
            try:
                margins[metric] = margin_from_text(metric, text)
            except ValueError as error:
                raise DocumentError(f"{line_of(path, 'gate', 'margins', metric)}: {error}") from error
    gate = release.gate
    return release, Policy(
        margins=margins,
        error_rate=gate.error_rate,
        min_blocks=gate.min_blocks,
        max_blocks=gate.max_blocks,
        allow_stored_pass=gate.allow_stored_pass,
    )


def parse_input(text: str) -> TensorSpec:
    """Parse NAME=1x3x224x224[:float32]; a word instead of a number names a dynamic axis.

    >>> parse_input("image=batchx3x8x8").shape, parse_input("ids=batch,length:int64").shape
    (('batch', 3, 8, 8), ('batch', 'length'))
    """
    name, equals, rest = text.partition("=")
    shape, _, dtype = rest.partition(":")
    if not equals or not name or not shape:
        raise UsageError(f"--input {text} is not of the form NAME=1x3x224x224[:float32]")
    # An x that does not touch a digit may belong to a name, as in "max": commas leave no doubt.
    parts = shape.split(",") if "," in shape else re.split(r"(?<=\d)x|x(?=\d)", shape)
    axes = tuple(int(axis) if axis.isdigit() else axis for axis in parts)
    if any(axis == 0 or (isinstance(axis, str) and not axis.isidentifier()) for axis in axes):
        raise UsageError(
            f"--input {text}: every axis is a positive number or a name, joined by x or commas, as in batchx3x224x224"
        )
    if "," not in shape and any(isinstance(axis, str) and "x" in axis for axis in axes):
        raise UsageError(f"--input {text}: where two names meet, or a name has an x, join the axes by commas")
    try:
        return msgspec.convert({"name": name, "dtype": dtype or "float32", "shape": axes}, TensorSpec)
    except msgspec.ValidationError as error:
        raise UsageError(f"--input {text}: the type {complaint(error, DType)}") from error


def parse_inputs(texts: Sequence[str | TensorSpec]) -> tuple[TensorSpec, ...]:
    """Parse repeated --input; raises UsageError where one name is given twice."""
    specs = tuple(one if isinstance(one, TensorSpec) else parse_input(one) for one in texts)
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--input {name} is given {names.count(name)} times; name each input once")
    return specs


def precision_from_text(text: str) -> Precision:
    """Return the precision of that name; raises UsageError."""
    known: tuple[Precision, ...] = typing.get_args(Precision)
    for precision in known:
        if text == precision:
            return precision
    raise UsageError(f"there is no precision {text!r} (known: {', '.join(known)})")


def policy_from_pairs(pairs: Sequence[str], base: QuantizationPolicy | None = None) -> QuantizationPolicy:
    """Parse repeated -Q key=value; several layers are joined by commas. Raises UsageError.

    >>> policy_from_pairs(("ranges=percentile", "budget_db=20", "float_layers=conv_1,conv_2")).float_layers
    ('conv_1', 'conv_2')
    """
    base = base or QuantizationPolicy()
    values: dict[str, object] = to_builtins(base)
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"-Q {pair} is not of the form key=value")
        if key not in values:
            raise UsageError(f"unknown setting -Q {pair}{closest(key, values)} (known: {', '.join(values)})")
        values[key] = [name for name in text.split(",") if name] if key == "float_layers" else text
        try:
            base = msgspec.convert(values, QuantizationPolicy, strict=False)
        except msgspec.ValidationError as error:
            kind = next(field.type for field in msgspec.structs.fields(QuantizationPolicy) if field.encode_name == key)
            raise UsageError(f"-Q {pair} is not valid: {complaint(error, kind)}") from error
    return checked_policy(base)


def checked_policy(policy: QuantizationPolicy, where: str = "-Q ") -> QuantizationPolicy:
    """Return a policy whose numbers make sense.

    Args:
        policy: as it was read.
        where: what the error's sentence begins with.
    """
    if not 50 < policy.percentile <= 100:
        raise UsageError(f"{where}percentile={policy.percentile:g} must lie above 50 and be at most 100")
    if policy.max_float_layers < 0:
        raise UsageError(f"{where}max_float_layers={policy.max_float_layers} is negative")
    if policy.budget_db is not None and not 0 < policy.budget_db < 150:
        raise UsageError(f"{where}budget_db={policy.budget_db:g} must lie between 0 and 150 dB (20 dB is common)")
    return policy


def model_name(source: str) -> str:
    """Return what to call a model: the factory or the file's stem.

    >>> model_name("package.module:dense"), model_name("dir/net.onnx")
    ('dense', 'net')
    """
    return source.partition(":")[2] or Path(source).stem


def margins_from_texts(texts: Sequence[str]) -> dict[Metric, Margin]:
    """Parse "metric=amount" texts; several of one metric are parts of one margin: a change and a limit.

    Raises:
        UsageError: naming the likely intended metric, or what is wrong with the amount.

    >>> margins_from_texts(["latency_p50=+3%", "latency_p50<=5ms"])["latency_p50"].text
    '+3%, <=5ms'
    """
    amounts: dict[Metric, list[str]] = {}
    known: tuple[Metric, ...] = typing.get_args(Metric)
    for text in texts:
        match = re.fullmatch(r"\s*(\w+)\s*(<=|>=|≤|≥|=|<|>|)\s*(.*)", text, re.DOTALL)
        name, sign, amount = match.groups() if match else (text, "", "")
        metric = next((one for one in known if one == name), None)
        if metric is None or not sign:
            raise UsageError(
                f"--margin {text} is not metric=amount{closest(name, known)} (metrics: {', '.join(known)})"
            )
        amounts.setdefault(metric, []).append(amount if sign == "=" else f"{sign}{amount}")
    margins: dict[Metric, Margin] = {}
    for metric, parts in amounts.items():
        try:
            margins[metric] = margin_from_text(metric, ", ".join(parts))
        except ValueError as error:
            raise UsageError(f"--margin {metric}={', '.join(parts)}: {error}") from error
    return margins


def names_from_text(text: str) -> tuple[str, ...]:
    """Parse NAME[,NAME]; "all", alone or among others, is all.

    >>> names_from_text("host, raspberry-pi-5"), names_from_text("tflite,all"), names_from_text("")
    (('host', 'raspberry-pi-5'), ('all',), ())
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    return (ALL,) if ALL in names else names


def backends_of(target: Target, wanted: Collection[str]) -> dict[str, Backend | str]:
    """Return the back ends that a target has rules for, each with what compiles for it, or why nothing does here.

    Args:
        target: resolved.
        wanted: names, or "all".

    Raises:
        UsageError: a name that no back end of the target has.
    """
    found, broken = load_backends()
    for name in wanted:
        if name != ALL and name not in target.backends:
            known = ", ".join(target.backends) or "none"
            raise UsageError(
                f"target {target.name!r} has no rules for back end {name!r}{closest(name, target.backends)} "
                f"(it has: {known})"
            )
    states: dict[str, Backend | str] = {}
    for name in target.backends:
        if ALL not in wanted and name not in wanted:
            continue
        runtime = found.get(name)
        if runtime is not None:
            states[name] = runtime.missing() or runtime
        elif name in broken:
            states[name] = f"the plugin for back end {name!r} is installed but broken: {broken[name]}"
        else:
            states[name] = f"no back end {name!r} is installed here; install the package that brings it"
    return states


def allowed_precisions(target: Target, runtime: Backend) -> tuple[Precision, ...]:
    """Return what a back end may build for a target, the widest first."""
    known: tuple[Precision, ...] = typing.get_args(Precision)
    allowed = runtime.precisions.intersection(target.backends[runtime.name].precisions)
    if runtime.name not in target.quantization:
        allowed -= {"int8"}
    return tuple(precision for precision in known if precision in allowed)


def on_other_runtimes(
    cell: CellEntry, target: Target, listed: Sequence[CellEntry], wanted: Collection[str]
) -> tuple[list[CellEntry], list[Contender]]:
    """Return a candidate cell for each other runtime of its target, and those that cannot be built here, with why.

    What the release file lists itself is not made a second time. Options that the other runtime knows too are kept.

    Args:
        cell: the candidate.
        target: its target, resolved.
        listed: every cell of the release file.
        wanted: names of back ends, or "all".
    """
    made: list[CellEntry] = []
    absent: list[Contender] = []
    for name, state in backends_of(target, wanted).items():
        other = msgspec.structs.replace(cell, name=f"{cell.name}@{name}", backend=name)
        if name == cell.backend or any(_is_same_work(other, one) for one in listed):
            continue
        if isinstance(state, str):
            absent.append(_absent(other, target, state))
        elif cell.precision not in allowed_precisions(target, state):
            does = ", ".join(allowed_precisions(target, state)) or "nothing"
            reason = f"{name} for target {target.name!r} does not do {cell.precision} (it does: {does})"
            absent.append(_absent(other, target, reason))
        else:
            known = {field.name for field in dataclasses.fields(state.options)}
            options = {key: value for key, value in cell.options.items() if key in known}
            made.append(msgspec.structs.replace(other, options=options))
    taken = {one.name for one in listed}.intersection(one.name for one in made)
    if taken:
        raise UsageError(
            f"the release file has another cell of the name {min(taken)!r}, which this run needs for {cell.name!r} on "
            f"another runtime; rename that cell"
        )
    return made, absent


def _is_same_work(one: CellEntry, other: CellEntry) -> bool:
    keys = ("model", "target", "backend", "precision", "device", "baseline", "quantization")
    return all(getattr(one, key) == getattr(other, key) for key in keys)


def _absent(cell: CellEntry, target: Target, reason: str) -> Contender:
    return Contender(
        cell=cell.name,
        backend=cell.backend,
        precision=cell.precision,
        target=target.name,
        device=cell.device,
        model=cell.model,
        baseline_cell=cell.baseline,
        absent=reason,
    )


def dropped_options(cell: CellEntry, made: CellEntry) -> Mapping[str, object]:
    """Return the options of a cell that its twin on another runtime does without."""
    return {key: value for key, value in cell.options.items() if key not in made.options}


def web_address(text: str) -> str:
    """Return where a report will be found, if it is a place that a link may lead to; "" for none.

    Raises:
        UsageError: it is not.
    """
    if text and not text.startswith(("https://", "http://")):
        raise UsageError(f"--report-url {text}: an address that begins with https:// is meant")
    return text
