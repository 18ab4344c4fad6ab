"""Prunes the demo's network: ranks channels, chooses how many stay, cuts the others out.

The six groups of coupled channels always stand in one order: Widths.outer, then Widths.inner.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgedeploy.demo.model import ConvNorm, ResidualBlock, ResidualNet, Widths, count_macs

# No group loses more than 7/8 of its channels, however unimportant they look.
SMALLEST_KEPT_SHARE = 1 / 8


def _blocks(model: ResidualNet) -> list[ResidualBlock]:
    return [stage for stage in model.stages if isinstance(stage, ResidualBlock)]


def _coupled_norms(model: ResidualNet) -> list[list[nn.BatchNorm2d]]:
    """Return each group's normalisations: a channel is gone when all of them give zero there."""
    blocks = _blocks(model)
    outer = [[block.second.norm] for block in blocks]
    outer[0].append(model.stem.norm)
    for norms, block in zip(outer, blocks, strict=True):
        if isinstance(block.shortcut, ConvNorm):
            norms.append(block.shortcut.norm)
    return outer + [[block.first.norm] for block in blocks]


def _gate_gradient(norm: nn.BatchNorm2d) -> Tensor:
    """Return the loss's derivative by a gate, now 1, that scales each output channel."""
    if norm.weight.grad is None or norm.bias.grad is None:
        raise ValueError("a gate's gradient needs a backward pass first")
    return norm.weight * norm.weight.grad + norm.bias * norm.bias.grad


def measure_importance(model: ResidualNet, image: Tensor, label: Tensor, *, batch: int) -> list[Tensor]:
    """Return for each group the channels' mean squared first-order effect on the loss if they were removed.

    Args:
        model: in evaluation mode; its weights stay as they are.
        image: normalised, shape (n, 1, 28, 28).
        label: shape (n,).
        batch: samples per gradient; the squares of the batches' gradients are averaged.

    Source: Molchanov et al. 2019 (arXiv 1906.10771), the gate behind the batch normalisation.
    """
    groups = _coupled_norms(model)
    totals = [torch.zeros(norms[0].num_features) for norms in groups]
    batches = list(zip(torch.split(image, batch), torch.split(label, batch), strict=True))
    for images, labels in batches:
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(functional.cross_entropy(model(images), labels))
        with torch.no_grad():
            for group, norms in enumerate(groups):
                effect = torch.stack([_gate_gradient(norm) for norm in norms]).sum(0)
                totals[group] += effect.square() / len(batches)
    model.zero_grad(set_to_none=True)
    return totals


def _widths(counts: Sequence[int]) -> Widths:
    return Widths(outer=(counts[0], counts[1], counts[2]), inner=(counts[3], counts[4], counts[5]))


def choose_widths(importance: Sequence[Tensor], *, macs: float) -> Widths:
    """Remove one channel of each group, then always the one with the least importance for each MAC it saves.

    Args:
        importance: one tensor for each group, as measure_importance returns it.
        macs: stop when at most this many multiply-accumulates are left.
    """
    ascending = [values.sort().values.tolist() for values in importance]
    counts = [len(values) - 1 for values in ascending]
    while count_macs(_widths(counts)) > macs:
        costs: dict[int, float] = {}
        for group, values in enumerate(ascending):
            if counts[group] - 1 >= SMALLEST_KEPT_SHARE * len(values):
                narrowed = [count - (other == group) for other, count in enumerate(counts)]
                saved = count_macs(_widths(counts)) - count_macs(_widths(narrowed))
                costs[group] = values[len(values) - counts[group]] / saved
        counts[min(costs, key=lambda group: costs[group])] -= 1
    return _widths(counts)


@torch.no_grad()
def _copy(source: ConvNorm, target: ConvNorm, *, inputs: Tensor, outputs: Tensor) -> None:
    target.conv.weight.copy_(source.conv.weight[outputs][:, inputs])
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(target.norm, name).copy_(getattr(source.norm, name)[outputs])


@torch.no_grad()
def cut(model: ResidualNet, importance: Sequence[Tensor], widths: Widths) -> ResidualNet:
    """Return a network of the given widths with the weights of the most important channels, in their old order.

    Args:
        model: the network to take the weights from.
        importance: one tensor for each group, as measure_importance returns it.
        widths: how many channels of each group stay.
    """
    counts = (*widths.outer, *widths.inner)
    kept = [values.topk(count).indices.sort().values for values, count in zip(importance, counts, strict=True)]
    outer, inner = kept[:3], kept[3:]
    narrow = ResidualNet(widths)
    _copy(model.stem, narrow.stem, inputs=torch.tensor([0]), outputs=outer[0])
    entering = [outer[0], outer[0], outer[1]]
    for stage, (source, target) in enumerate(zip(_blocks(model), _blocks(narrow), strict=True)):
        _copy(source.first, target.first, inputs=entering[stage], outputs=inner[stage])
        _copy(source.second, target.second, inputs=inner[stage], outputs=outer[stage])
        if isinstance(source.shortcut, ConvNorm) and isinstance(target.shortcut, ConvNorm):
            _copy(source.shortcut, target.shortcut, inputs=entering[stage], outputs=outer[stage])
    narrow.head.weight.copy_(model.head.weight[:, outer[2]])
    narrow.head.bias.copy_(model.head.bias)
    return narrow.eval()
