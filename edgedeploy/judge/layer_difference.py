"""Two profiles, layer by layer → which parts of the model account for a difference. Pure.

Runtimes fuse, split and rename layers, each precision in its own way. What two artifacts have in common are the nodes
of the model: layers of either side that share a node form a group, and groups that share a layer are one (connected
components). What a runtime adds by itself (a conversion, another layout) and what nothing on the other side
corresponds to are groups of their own. So every layer is in exactly one group, and the groups' differences add up to
the difference of the sums.

The unit of inference is a pair of passes, a fresh process of each side: an interval is Student's t over pairs. With one
test for each group, Holm's step-down (1979, Scandinavian Journal of Statistics 6:65) keeps the chance that any group is
wrongly called different at 5 %.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from edgedeploy.judge.estimate import Estimate, estimate_of_mean
from edgedeploy.judge.family import holm
from edgedeploy.records.artifact import LayerReport
from edgedeploy.records.explanation import (
    Cause,
    CauseKind,
    Change,
    GroupDifference,
    LayerRole,
    Profile,
    ProfiledLayer,
    SpeedExplanation,
)
from edgedeploy.units import format_duration

ERROR_RATE = 0.05
# A reader acts on the first causes; the table has the rest.
MOST_CAUSES = 3
# Counts of multiply-adds are exact; what differs by less is a border of a pooling window.
_LEAST_CHANGE_OF_WORK = 0.01
# From so many groups on that changed alike, they are one cause: each alone would hide that it is all of them.
_LEAST_ALIKE = 4
_NODES_NAMED = 3
# Of a step in which times are told: what binary fractions leave of a decimal one.
_LEAST_FRACTION = 1e-3
# What several groups of layers have in common, in words.
_CHANGES: dict[CauseKind, str] = {
    "precision": "compute on other numbers",
    "work": "have other sizes",
    "fusion": "are fused differently",
    "appeared": "are in one of the artifacts only",
    "kernel": "run on other kernels",
    "slower": "take another time with the same kernels",
}

Macs = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Group:
    """Places of layers, on either side, that belong together."""

    role: LayerRole
    baseline: tuple[int, ...]
    candidate: tuple[int, ...]


def align(baseline: Sequence[ProfiledLayer], candidate: Sequence[ProfiledLayer]) -> list[Group]:
    """Return groups of layers that have a node or tensor of the model in common; every layer is in exactly one.

    Args:
        baseline, candidate: in the order of execution.

    Returns:
        In the order of the first layer of each, the baseline's first.

    >>> a = [ProfiledLayer(name="conv", nodes=("conv", "relu"), passes_s=())]
    >>> b = [ProfiledLayer(name=name, nodes=(name,), passes_s=()) for name in ("conv", "relu")]
    >>> align(a, b)
    [Group(role='compute', baseline=(0,), candidate=(0, 1))]
    """
    roots: dict[object, object] = {}

    def root(key: object) -> object:
        found = key
        while roots.setdefault(found, found) != found:
            found = roots[found]
        while roots[key] != found:  # so that the next look is short
            roots[key], key = found, roots[key]
        return found

    sides = (baseline, candidate)
    for side, layers in enumerate(sides):
        for place, layer in enumerate(layers):
            for key in _keys(layer, side, place):
                roots[root(key)] = root((side, place))
    members: dict[object, tuple[list[int], list[int]]] = {}
    for side, layers in enumerate(sides):
        for place in range(len(layers)):
            members.setdefault(root((side, place)), ([], []))[side].append(place)
    return [
        Group((baseline[before[0]] if before else candidate[after[0]]).role, tuple(before), tuple(after))
        for before, after in members.values()
    ]


def _keys(layer: ProfiledLayer, side: int, place: int) -> list[tuple[object, ...]]:
    """Return what a layer is found by on the other side; what a runtime added by itself never joins what computes."""
    keys: list[tuple[object, ...]] = [(layer.role, "node", node) for node in layer.nodes]
    keys += [(layer.role, "tensor", tensor) for tensor in layer.tensors]
    if not keys and layer.name:
        keys.append((layer.role, "name", layer.kind, layer.name))
    return keys or [(side, place)]


def speed_explanation(
    baseline: Profile,
    candidate: Profile,
    whole_differences_s: Sequence[float],
    *,
    macs: tuple[Macs, Macs] = ({}, {}),
    reports: tuple[LayerReport, LayerReport] | None = None,
    notes: Sequence[str] = (),
) -> SpeedExplanation:
    """Return which groups of layers account for a difference, the largest first, and its causes in words.

    Args:
        baseline, candidate: the passes of their layers are pairs, in order.
        whole_differences_s: candidate less baseline of whole inferences that nobody watched, one for each block.
        macs: node → multiply-accumulates of one sample, of either side; nodes that are not known are left out.
        reports: what is known of the layers where a runtime does not time them.
        notes: what else a reader should know.
    """
    whole = _change(whole_differences_s) if whole_differences_s else None
    told = [*notes]
    if not baseline.layers or not candidate.layers:
        causes = _untimed_causes(baseline, candidate, macs, reports)
        return SpeedExplanation(
            baseline=baseline, candidate=candidate, passes=0, whole=whole, causes=causes, notes=tuple(told)
        )
    passes = min(len(layer.passes_s) for layer in (*baseline.layers, *candidate.layers))
    aligned = align(baseline.layers, candidate.layers)
    series = [_differences_s(group, baseline, candidate, passes) for group in aligned]
    total_s = [sum(pair) for pair in zip(*series, strict=True)]
    resolution_s = _resolution_s((*baseline.layers, *candidate.layers))
    layers = _change(total_s, resolution_s)
    sums_s = [_sum_s(side.layers, range(len(side.layers)), passes) for side in (baseline, candidate)]
    overheads_s = [
        statistics.fmean(watched) - statistics.fmean(side.whole_s) if side.whole_s else None
        for watched, side in zip(sums_s, (baseline, candidate), strict=True)
    ]
    groups = [
        _difference(group, differences, baseline, candidate, macs, layers, resolution_s)
        for group, differences in zip(aligned, series, strict=True)
    ]
    # What could not be tested counts in the family, and is never proven.
    proven = holm([1.0 if group.p is None else group.p for group in groups], ERROR_RATE)
    groups = [
        msgspec.structs.replace(group, is_proven=is_proven) for group, is_proven in zip(groups, proven, strict=True)
    ]
    order = sorted(range(len(groups)), key=lambda place: (-abs(groups[place].difference_s), place))
    groups, series = [groups[place] for place in order], [series[place] for place in order]
    agrees = _agrees(layers, whole)
    if agrees is False and whole is not None:
        told.append(
            f"the layers together differ by {_signed(layers.seconds)} while they are watched, and whole inferences by "
            f"{_signed(whole.seconds)}: watching does not cost both sides the same, so read shares, not seconds"
        )
    causes = _causes(groups, series, layers, whole, resolution_s)
    return SpeedExplanation(
        baseline=baseline,
        candidate=candidate,
        passes=passes,
        groups=tuple(groups),
        layers=layers,
        whole=whole,
        baseline_overhead_s=overheads_s[0],
        candidate_overhead_s=overheads_s[1],
        agrees=agrees,
        causes=causes,
        counteracting=_counteracting(groups, _direction(layers, whole)),
        notes=tuple(told),
    )


# ---------------------------------------------------------------- figures


def _sum_s(layers: Sequence[ProfiledLayer], places: Iterable[int], passes: int) -> list[float]:
    """Return what layers take together, pass by pass."""
    chosen = [layers[place].passes_s for place in places]
    return [math.fsum(one[number] for one in chosen) for number in range(passes)]


def _differences_s(group: Group, baseline: Profile, candidate: Profile, passes: int) -> list[float]:
    before_s = _sum_s(baseline.layers, group.baseline, passes)
    after_s = _sum_s(candidate.layers, group.candidate, passes)
    return [after - before for before, after in zip(before_s, after_s, strict=True)]


def _resolution_s(layers: Iterable[ProfiledLayer]) -> float:
    """Return the steps in which times are told: ONNX Runtime's are whole microseconds, and medians halves of one."""
    steps = [2e6 * taken_s for layer in layers for taken_s in layer.passes_s]
    return 1e-6 if all(abs(step - round(step)) < _LEAST_FRACTION for step in steps) else 0.0


def _estimate(differences_s: Sequence[float], resolution_s: float) -> Estimate | None:
    """Return the mean; rounding, which is the same in every pass, is no evidence that passes agree.

    The error of rounding to steps has a standard deviation of a step by the root of 12 (W. F. Sheppard, Proceedings of
    the London Mathematical Society s1-29, 1897); a difference has two such errors.
    """
    if len(differences_s) < 2:
        return None
    found = estimate_of_mean(differences_s)
    return replace(found, standard_error=math.hypot(found.standard_error, resolution_s / math.sqrt(6)))


def _change(differences_s: Sequence[float], resolution_s: float = 0.0) -> Change:
    estimate = _estimate(differences_s, resolution_s)
    return Change(
        seconds=statistics.fmean(differences_s),
        low_s=estimate.low(ERROR_RATE / 2) if estimate else None,
        high_s=estimate.high(ERROR_RATE / 2) if estimate else None,
    )


def _p_value(differences_s: Sequence[float], resolution_s: float) -> float | None:
    """Return the two-sided p-value against "there is no difference"."""
    estimate = _estimate(differences_s, resolution_s)
    if estimate is None:
        return None
    return 1.0 if not estimate.effect else min(1.0, 2 * min(estimate.p_fail(0.0), estimate.p_pass(0.0)))


def _is_certain(change: Change | None) -> bool:
    """Say whether an interval does not hold zero."""
    return (
        change is not None
        and change.low_s is not None
        and change.high_s is not None
        and (change.low_s > 0 or change.high_s < 0)
    )


def _agrees(layers: Change, whole: Change | None) -> bool | None:
    """Say whether two differences are the same within their intervals; None where one has none."""
    if whole is None or None in (layers.low_s, layers.high_s, whole.low_s, whole.high_s):
        return None
    return abs(layers.seconds - whole.seconds) <= math.hypot(_half_width_s(layers) or 0.0, _half_width_s(whole) or 0.0)


def _half_width_s(change: Change) -> float | None:
    return None if change.low_s is None or change.high_s is None else (change.high_s - change.low_s) / 2


def _difference(
    group: Group,
    differences_s: Sequence[float],
    baseline: Profile,
    candidate: Profile,
    macs: tuple[Macs, Macs],
    layers: Change,
    resolution_s: float,
) -> GroupDifference:
    passes = len(differences_s)
    sides = ([baseline.layers[one] for one in group.baseline], [candidate.layers[one] for one in group.candidate])
    nodes = tuple(dict.fromkeys(node for side in sides for layer in side for node in layer.nodes))
    change = _change(differences_s, resolution_s)
    precisions = [_precision(side) for side in sides]
    counts = [_macs(side, known) for side, known in zip(sides, macs, strict=True)]
    return GroupDifference(
        name=_name(nodes, [layer for side in sides for layer in side]),
        role=group.role,
        nodes=nodes,
        baseline_layers=group.baseline,
        candidate_layers=group.candidate,
        baseline_precision=precisions[0],
        candidate_precision=precisions[1],
        baseline_macs=counts[0],
        candidate_macs=counts[1],
        baseline_s=statistics.fmean(_sum_s(baseline.layers, group.baseline, passes)),
        candidate_s=statistics.fmean(_sum_s(candidate.layers, group.candidate, passes)),
        difference_s=change.seconds,
        low_s=change.low_s,
        high_s=change.high_s,
        p=_p_value(differences_s, resolution_s),
        share=change.seconds / layers.seconds if _is_certain(layers) else None,
        changes=tuple(_changes(sides, precisions, counts)),
    )


def _name(nodes: Sequence[str], layers: Sequence[ProfiledLayer]) -> str:
    names = nodes or list(dict.fromkeys(layer.name or layer.kind for layer in layers))
    more = f" +{len(names) - _NODES_NAMED}" if len(names) > _NODES_NAMED else ""
    return " + ".join(names[:_NODES_NAMED]) + more


def _precision(layers: Sequence[ProfiledLayer]) -> str:
    return " + ".join(dict.fromkeys(layer.precision for layer in layers if layer.precision))


def _macs(layers: Sequence[ProfiledLayer], known: Macs) -> int | None:
    found = [known[node] for node in dict.fromkeys(node for one in layers for node in one.nodes) if node in known]
    return sum(found) if found else None


def _changes(
    sides: tuple[Sequence[ProfiledLayer], Sequence[ProfiledLayer]],
    precisions: Sequence[str],
    macs: Sequence[int | None],
) -> list[str]:
    """Return what is known to be different about a group, in words."""
    before, after = sides
    if not before or not after:
        return [f"only in the {'candidate' if after else 'baseline'}"]
    said = []
    if all(precisions) and precisions[0] != precisions[1]:
        said.append(f"{precisions[0]} → {precisions[1]}")
    if (ratio := _work_ratio(*macs)) is not None:
        said.append(f"{ratio:.3g} times the multiply-adds")
    kinds = [" + ".join(dict.fromkeys(layer.kind for layer in side if layer.kind)) for side in sides]
    if len(before) != len(after):
        said.append(f"{_count(len(before), 'layer')} → {_count(len(after), 'layer')}")
    if kinds[0] != kinds[1] and precisions[0] == precisions[1]:  # another precision has another word
        said.append(f"{kinds[0] or 'unnamed'} → {kinds[1] or 'unnamed'}")
    details = ["; ".join(layer.detail for layer in side if layer.detail) for side in sides]
    if all(details) and details[0] != details[1]:
        said.append(f"{details[0]} → {details[1]}")
    return said


def _work_ratio(before: int | None, after: int | None) -> float | None:
    """Return how many times the multiply-adds a group has; None where they are the same, or not known."""
    if not before or after is None:
        return None
    return after / before if abs(after / before - 1) > _LEAST_CHANGE_OF_WORK else None


# ---------------------------------------------------------------- words


def _direction(layers: Change, whole: Change | None) -> int:
    """Return 1 where the candidate is slower, -1 where it is faster; slower where nobody knows."""
    for change in (whole, layers):
        if change is not None and _is_certain(change):
            return 1 if change.seconds > 0 else -1
    return 1


def _causes(
    groups: Sequence[GroupDifference],
    series: Sequence[Sequence[float]],
    layers: Change,
    whole: Change | None,
    resolution_s: float,
) -> tuple[Cause, ...]:
    """Return what accounts for most of the difference: proven first, then the largest."""
    direction = _direction(layers, whole)
    made: list[Cause] = []
    by_kind: dict[object, list[int]] = {}
    for place, group in enumerate(groups):
        if group.role == "compute":
            by_kind.setdefault((_kind(group), *_alike(group)), []).append(place)
    for places in by_kind.values():
        in_direction = [place for place in places if groups[place].difference_s * direction > 0]
        if len(in_direction) >= _LEAST_ALIKE and _kind(groups[places[0]]) in ("precision", "work"):
            made.append(_cause(in_direction, groups, series, layers, resolution_s))
        else:
            made += [_cause([place], groups, series, layers, resolution_s) for place in in_direction]
    for role in ("convert", "layout"):
        places = [place for place, group in enumerate(groups) if group.role == role]
        if places:
            made.append(_cause(places, groups, series, layers, resolution_s))
    wanted = [one for one in made if one.difference is not None and one.difference.seconds * direction > 0]
    proven = [one for one in wanted if one.is_proven]
    ordered = sorted(proven or wanted, key=lambda one: -abs(one.difference.seconds) if one.difference else 0.0)
    return tuple(ordered[:MOST_CAUSES])


def _kind(group: GroupDifference) -> CauseKind:
    """Return what explains a group's difference best, of what is known to have changed."""
    if group.role == "convert":
        return "conversions"
    if group.role == "layout":
        return "layouts"
    if not group.baseline_layers or not group.candidate_layers:
        return "appeared"
    before, after = group.baseline_precision, group.candidate_precision
    if before and after and before != after:
        return "precision"
    if _work_ratio(group.baseline_macs, group.candidate_macs) is not None:
        return "work"
    if len(group.baseline_layers) != len(group.candidate_layers):
        return "fusion"
    return "kernel" if group.changes else "slower"


def _alike(group: GroupDifference) -> tuple[str, ...]:
    """Return what groups that changed in the same way have in common."""
    return (group.baseline_precision, group.candidate_precision) if _kind(group) == "precision" else ()


def _cause(
    places: Sequence[int],
    groups: Sequence[GroupDifference],
    series: Sequence[Sequence[float]],
    layers: Change,
    resolution_s: float,
) -> Cause:
    """Return one cause: one group, or several that changed alike."""
    chosen = [groups[place] for place in places]
    together_s = [math.fsum(pair) for pair in zip(*(series[place] for place in places), strict=True)]
    change, p = _change(together_s, resolution_s), _p_value(together_s, resolution_s)
    # What several groups do together is in no family: the strictest level of Holm's, whatever else is rejected.
    is_proven = chosen[0].is_proven if len(chosen) == 1 else p is not None and p <= ERROR_RATE / len(groups)
    share = change.seconds / layers.seconds if _is_certain(layers) else None
    text = f"{_subject(chosen)}: {_with_interval(change)} of {_signed(layers.seconds)}"
    return Cause(
        kind=_kind(chosen[0]),
        text=text if is_proven else f"{text} (not proven: the passes differ by as much)",
        groups=tuple(places),
        difference=change,
        share=share,
        is_proven=is_proven,
    )


def _subject(groups: Sequence[GroupDifference]) -> str:
    """Say what changed about groups that changed alike."""
    first, kind = groups[0], _kind(groups[0])
    if kind in ("conversions", "layouts"):
        counts = [sum(len(places) for places in side) for side in (
            [group.baseline_layers for group in groups], [group.candidate_layers for group in groups]
        )]  # fmt: skip
        what = "conversion of numbers" if kind == "conversions" else "copy into another layout"
        plural = "conversions of numbers" if kind == "conversions" else "copies into another layout"
        has = f"the candidate has {_count(counts[1], what, plural)}, the baseline {counts[0] or 'none'}"
        has = has if counts[1] else f"the candidate has no {what}, the baseline {counts[0]}"
        new = [group.name for group in groups if not group.baseline_layers]
        return f"{has} ({_listed(new)} {'is' if len(new) == 1 else 'are'} new)" if new else has
    if len(groups) > 1:
        largest = max(groups, key=lambda group: abs(group.difference_s))
        how = f", {largest.name} most ({_signed(largest.difference_s)})"
        if kind == "precision":
            return f"{len(groups)} groups of layers run in {_both(first)}{how}"
        return f"{len(groups)} groups of layers {_CHANGES[kind]}{how}"
    ratio = _work_ratio(first.baseline_macs, first.candidate_macs)
    work = "" if ratio is None else f"{ratio:.3g} times the multiply-adds of the baseline"
    if kind == "precision":
        return f"{first.name} runs in {_both(first)}" + (f", with {work}" if work else "")
    if kind == "work":
        return f"{first.name} has {work}"
    if kind == "fusion":
        now, before = len(first.candidate_layers), len(first.baseline_layers)
        verb = "is no longer fused" if now > before else "is fused differently"
        return f"{first.name} {verb}: {_count(now, 'layer')} in the candidate, {before} in the baseline"
    if kind == "kernel":
        return f"{first.name} runs on another kernel ({'; '.join(first.changes)})"
    if kind == "appeared":
        return f"{first.name} is only in the {'candidate' if first.candidate_layers else 'baseline'}"
    return f"{first.name} takes another time with the same kernel"


def _both(group: GroupDifference) -> str:
    return f"{group.candidate_precision} in the candidate, in {group.baseline_precision} in the baseline"


def _counteracting(groups: Sequence[GroupDifference], direction: int) -> str:
    """Say what is proven to have changed the other way."""
    others = [group for group in groups if group.is_proven and group.difference_s * direction < 0]
    if not others:
        return ""
    total = math.fsum(group.difference_s for group in others)
    largest = max(others, key=lambda group: abs(group.difference_s))
    more = f" and {_count(len(others) - 1, 'other group')}" if len(others) > 1 else ""
    return f"the other way went {largest.name}{more}: {_signed(total)}"


def _untimed_causes(
    baseline: Profile, candidate: Profile, macs: tuple[Macs, Macs], reports: tuple[LayerReport, LayerReport] | None
) -> tuple[Cause, ...]:
    """Return what is known to differ between two artifacts, where no layer could be timed: the most work first."""
    before, after = macs
    weights: list[tuple[float, Cause]] = []
    if reports is not None:
        sides = [{_plain_name(label) for label in report.quantized} for report in reports]
        floats = [{_plain_name(label) for label in report.float_islands} for report in reports]
        for here, there, first, second in (
            ("float", "on integers", sides[0], floats[1] - sides[1]),
            ("on integers", "float", floats[0] - sides[0], sides[1]),
        ):
            for name in sorted(first & second):
                text = f"{name} computes {'in ' if here == 'float' else ''}{here} in the candidate, "
                text += f"{'in ' if there == 'float' else ''}{there} in the baseline (not timed)"
                weights.append((float(after.get(name, 0)), Cause(kind="precision", text=text)))
    for name in before.keys() & after.keys():
        if (ratio := _work_ratio(before[name], after[name])) is not None:
            text = f"{name} has {ratio:.3g} times the multiply-adds of the baseline (not timed)"
            weights.append((float(abs(after[name] - before[name])), Cause(kind="work", text=text)))
    only = [(name, after[name]) for name in after.keys() - before.keys()]
    weights += [
        (float(count), Cause(kind="appeared", text=f"{name} is only in the candidate (not timed)"))
        for name, count in only
    ]
    weights.sort(key=lambda one: (-one[0], one[1].text))
    return tuple(cause for _, cause in weights[:MOST_CAUSES])


def _plain_name(label: str) -> str:
    """Return the name of a label "operator name"."""
    return label.partition(" ")[2] or label


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NODES_NAMED} more" if len(names) > _NODES_NAMED else ""
    return ", ".join(names[:_NODES_NAMED]) + more


def _count(number: int, singular: str, plural: str = "") -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def _signed(seconds: float) -> str:
    return f"{'-' if seconds < 0 else '+'}{format_duration(abs(seconds))}"


def _with_interval(change: Change) -> str:
    half_s = _half_width_s(change)
    return _signed(change.seconds) if half_s is None else f"{_signed(change.seconds)} ± {format_duration(half_s)}"
