"""Micro-nets: one trap for converters each, small enough that every back end can be asked about all of them.

`tests.backends.micro_nets:<name>` is a model reference of each. Sizes of neighbouring axes differ wherever the trap allows it, so that
a layout that was mixed up changes a shape; affine parameters and statistics of normalisations are random, so that one
that was left out changes a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

IMAGE = {"image": (1, 3, 12, 10)}
MAPS = {"maps": (1, 8, 12, 10)}
FEATURES = {"features": (1, 12)}
SEQUENCE = {"sequence": (1, 6, 12)}


@dataclass(frozen=True)
class Net:
    """One trap.

    Attributes:
        trap: what converters and runtimes get wrong about it, in a few words.
        make: returns the module, in evaluation mode, always with the same weights.
        inputs: name → shape of one sample with its batch axis of 1.
        dtypes: of inputs that are not float32.
        ranges: name → (low, high) of uniform samples; float inputs without one are standard normal. Integers exclude `high`.
        dynamic_batch: whether the batch axis stays open, so that batches of 1 and of 3 must work.
        output_names: as the exporter names them.
    """

    trap: str
    make: Callable[[], nn.Module]
    inputs: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    dynamic_batch: bool = False
    output_names: tuple[str, ...] = ("output",)


class Calls(nn.Module):
    """Layers and the function of them and one input."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.function(self, x)


class CallsTwo(Calls):
    """The same with two inputs."""

    def forward(self, a, b):
        return self.function(self, a, b)


class Constants(nn.Module):
    """A tensor that is no weight of a layer, for arithmetic with constants."""

    def __init__(self, *shape: int, scale: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(shape) * scale + offset)

    def forward(self):
        return self.value


_AFFINE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d)


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    module = make()
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, _AFFINE) and part.weight is not None:
                part.weight.uniform_(0.5, 1.5)
                part.bias.uniform_(-0.5, 0.5)
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.running_mean.uniform_(-0.5, 0.5)
                part.running_var.uniform_(0.5, 2)
    return module.eval()


def _net(trap: str, make: Callable[[], nn.Module], inputs: Mapping[str, tuple[int, ...]], **more: Any) -> Net:
    return Net(trap, lambda: _seeded(make), inputs, **more)


def _conv(inside: int, outside: int, kernel: Any = 3, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, kernel, **more)


def _between(*layers: nn.Module, inside: int = 8) -> nn.Sequential:
    """Return layers behind a convolution and its ReLU and before another convolution, so that they stand in an integer chain."""
    return nn.Sequential(_conv(3, 8, padding=1), nn.ReLU(), *layers, _conv(inside, 5, 1))


def _on_maps(function: Callable[..., Any], channels: int = 8, padding: int = 1, **layers: nn.Module) -> Calls:
    """Return a function of the maps that a convolution makes, which may read them several times."""
    return Calls(lambda net, x: function(net, net.stem(x)), stem=_conv(3, channels, padding=padding), **layers)


def _after(activation: nn.Module) -> nn.Sequential:
    """Return an activation between two convolutions, on values of both signs."""
    return nn.Sequential(_conv(3, 8, padding=1), activation, _conv(8, 5, 1))


# ---------------------------------------------------------------- blocks with a shape of their own


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = _conv(3, 8), _conv(8, 5, 1)
        self.down, self.up = _conv(8, 2, 1), _conv(2, 8, 1)

    def forward(self, image):
        maps = functional.hardswish(self.stem(image))
        scale = functional.adaptive_avg_pool2d(maps, 1)
        scale = functional.hardsigmoid(self.up(functional.relu(self.down(scale))))
        return self.head(maps * scale)


class Residual(nn.Module):
    """A stem, an inverted bottleneck with a sum around it, a pool and a linear head, as in a MobileNet."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 8, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.block = nn.Sequential(
            _conv(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
            _conv(16, 16, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
            _conv(16, 8, 1, bias=False), nn.BatchNorm2d(8),
        )  # fmt: skip
        self.head = nn.Linear(8, 5)

    def forward(self, image):
        maps = self.stem(image)
        maps = maps + self.block(maps)
        return self.head(functional.adaptive_avg_pool2d(maps, 1).flatten(1))


class ResidualRelu(nn.Module):
    """A basic block of a ResNet: the activation follows the sum, and the shortcut has a convolution of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(_conv(3, 8, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(_conv(8, 8, padding=1, bias=False), nn.BatchNorm2d(8))
        self.shortcut = nn.Sequential(_conv(3, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8))

    def forward(self, image):
        return functional.relu(self.second(self.first(image)) + self.shortcut(image))


class Attention(nn.Module):
    def __init__(self, *, masked: bool = False):
        super().__init__()
        self.project, self.out, self.masked = nn.Linear(12, 36), nn.Linear(12, 12), masked

    def forward(self, sequence):
        batch, length, width = sequence.shape
        queries, keys, values = self.project(sequence).reshape(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=self.masked)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class MultiHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(12, 3, batch_first=True), nn.LayerNorm(12)
        self.hidden, self.out = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, sequence):
        mixed, _ = self.attention(sequence, sequence, sequence, need_weights=False)
        sequence = self.norm(sequence + mixed)
        return sequence + self.out(functional.gelu(self.hidden(sequence)))


class Recurrent(nn.Module):
    def __init__(self, kind: type, **more: Any):
        super().__init__()
        self.cells = kind(12, 10, batch_first=True, **more)
        self.head = nn.Linear(20 if more.get("bidirectional") else 10, 5)

    def forward(self, sequence):
        states, _ = self.cells(sequence)
        return self.head(states)


class LastState(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.LSTM(12, 10, batch_first=True), nn.Linear(10, 5)

    def forward(self, sequence):
        _, (hidden, _) = self.cells(sequence)
        return self.head(hidden[-1])


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(30, 12), nn.Linear(12, 5)

    def forward(self, tokens):
        return self.head(self.words(tokens).mean(1))


class Shared(nn.Module):
    """One convolution that is used twice, on tensors of different ranges."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared = _conv(3, 8, padding=1), _conv(8, 8, padding=1)

    def forward(self, image):
        maps = functional.relu(self.stem(image))
        return self.shared(functional.relu(self.shared(maps)))


class MultiInput(nn.Module):
    """An image of rank 4 and a vector of rank 2: only the image may change its layout."""

    def __init__(self):
        super().__init__()
        self.conv, self.vector, self.head = _conv(3, 8, stride=2), nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, image, features):
        maps = functional.relu(self.conv(image)).mean((2, 3))
        return self.head(maps + functional.relu(self.vector(features)))


class Outputs(nn.Module):
    """A tensor that is an output and is read further, beside the result of that."""

    def __init__(self, form: str):
        super().__init__()
        self.form, self.conv, self.head = form, _conv(3, 8), nn.Linear(8, 5)

    def forward(self, image):
        maps = functional.relu(self.conv(image))
        scores = self.head(maps.mean((2, 3)))
        return {"maps": maps, "scores": scores} if self.form == "dict" else (maps, scores)


class ConcatAxes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = _conv(3, 4, padding=1), _conv(3, 4, 1), _conv(8, 5, 1)

    def forward(self, image):
        a, b = functional.relu(self.a(image)), functional.relu(self.b(image))
        both = torch.cat([a, b], 1)
        return self.head(torch.cat([torch.cat([both, both[:, :, :3]], 2), torch.cat([both, both[:, :, :3]], 2)], 3))


class Split(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = _conv(3, 9, padding=1), _conv(4, 5, 1)

    def forward(self, image):
        first, second, third = functional.relu(self.stem(image)).split([2, 4, 3], 1)
        upper, lower = second.chunk(2, 2)
        return self.head(upper + lower) + first.mean() - third.mean((1, 2, 3), keepdim=True)


def _shuffled_channels(net, x):
    maps = functional.relu(net.stem(x))
    batch, channels, height, width = maps.shape
    shuffled = maps.reshape(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(maps.shape)
    return net.head(shuffled)


def _reduced(net, x):
    maps = net.stem(x)
    rows = maps.amax(3).mean(1) + maps.sum(3).amin(1)
    return rows, maps.mean((1, 2), keepdim=True)


def _elementary(net, x):
    positive = functional.softplus(net.stem(x)) + 0.1
    return torch.exp(-positive) + torch.log(positive) * torch.sqrt(positive) + positive.pow(1.7) + positive.pow(2)


# ---------------------------------------------------------------- the nets

NETS: dict[str, Net] = {
    # convolutions
    "conv_stride": _net(
        "strides on odd sizes, another one on each axis",
        lambda: nn.Sequential(_conv(3, 8, stride=2, padding=1), nn.ReLU(), _conv(8, 5, stride=(1, 2), padding=1)),
        {"image": (1, 3, 13, 11)},
    ),
    "conv_asymmetric_pad": _net(
        "zeros on one side only, before a stride",
        lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 2, 0)), _conv(3, 8, stride=2), nn.ReLU(), _conv(8, 5, 1)),
        IMAGE,
    ),
    "conv_pad_same": _net(
        "padding 'same' of an even kernel, which is uneven",
        lambda: nn.Sequential(_conv(3, 8, 4, padding="same"), nn.ReLU(), _conv(8, 5, 1)),
        IMAGE,
    ),
    "conv_reflect_pad": _net(
        "padding that mirrors the border",
        lambda: nn.Sequential(_conv(3, 8, padding=2, padding_mode="reflect"), nn.ReLU(), _conv(8, 5, 1)),
        IMAGE,
    ),
    "conv_replicate_pad": _net(
        "padding that repeats the border",
        lambda: nn.Sequential(_conv(3, 8, padding=1, padding_mode="replicate"), nn.ReLU(), _conv(8, 5, 1)),
        IMAGE,
    ),
    "pad_value": _net(
        "padding with a number that is not zero",
        lambda: _between(nn.ConstantPad2d((1, 0, 2, 1), 0.75)),
        IMAGE,
    ),
    "conv_dilation": _net(
        "dilations, another one on each axis",
        lambda: nn.Sequential(
            _conv(3, 8, dilation=2, padding=2), nn.ReLU(), _conv(8, 5, dilation=(1, 3), padding=(1, 3))
        ),
        IMAGE,
    ),
    "conv_groups": _net(
        "a grouped convolution with other counts of channels in and out",
        lambda: nn.Sequential(_conv(3, 8, 1), nn.ReLU(), _conv(8, 12, padding=1, groups=4), nn.ReLU(), _conv(12, 5, 1)),
        IMAGE,
    ),
    "conv_depthwise": _net(
        "a depthwise convolution with a stride",
        lambda: _between(_conv(8, 8, stride=2, padding=1, groups=8), nn.ReLU6()),
        IMAGE,
    ),
    "conv_depth_multiplier": _net(
        "a depthwise convolution that makes three channels of each",
        lambda: _between(_conv(8, 24, padding=1, groups=8), nn.ReLU(), inside=24),
        IMAGE,
    ),
    "conv_non_square": _net(
        "kernel, stride and image that are not square",
        lambda: nn.Sequential(_conv(3, 8, (5, 3), stride=(1, 2), padding=(2, 1)), nn.ReLU(), _conv(8, 5, (1, 4))),
        {"image": (1, 3, 9, 21)},
    ),
    "conv1d": _net(
        "a convolution over one axis, dilated and padded",
        lambda: nn.Sequential(nn.Conv1d(12, 8, 3, dilation=2, padding=2), nn.ReLU(), nn.Conv1d(8, 5, 2, stride=2)),
        {"sequence": (1, 12, 17)},
    ),
    "conv1d_depthwise": _net(
        "a depthwise convolution over one axis with a causal pad",
        lambda: nn.Sequential(
            nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(12, 12, 3, groups=12), nn.ReLU(), nn.Conv1d(12, 5, 1)
        ),
        {"sequence": (1, 12, 17)},
    ),
    "conv3d": _net(
        "a convolution over three axes",
        lambda: nn.Sequential(nn.Conv3d(2, 6, 3, padding=(1, 1, 0)), nn.ReLU(), nn.Conv3d(6, 4, 1)),
        {"volume": (1, 2, 5, 7, 6)},
    ),
    "transpose_conv": _net(
        "a transposed convolution with stride and output padding",
        lambda: _between(nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1), nn.ReLU(), inside=6),
        IMAGE,
    ),
    "transpose_conv_groups": _net(
        "a transposed convolution in groups",
        lambda: _between(nn.ConvTranspose2d(8, 8, 2, stride=2, groups=4), nn.ReLU()),
        IMAGE,
    ),
    "odd_channels": _net(
        "5, 7 and 13 channels, as pruning leaves them",
        lambda: nn.Sequential(
            _conv(3, 5, padding=1),
            nn.ReLU(),
            _conv(5, 7, padding=1),
            nn.ReLU(),
            _conv(7, 7, padding=1, groups=7),
            nn.ReLU(),
            _conv(7, 13, 1),
            nn.ReLU(),
            _conv(13, 5, 1),
        ),
        IMAGE,
    ),
    "low_rank_pair": _net(
        "a convolution as two thin ones, the first without activation",
        lambda: nn.Sequential(
            _conv(3, 8, padding=1),
            nn.ReLU(),
            _conv(8, 3, (3, 1), padding=(1, 0), bias=False),
            _conv(3, 12, (1, 3), padding=(0, 1)),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12 * 120, 4, bias=False),
            nn.Linear(4, 5),
        ),
        IMAGE,
    ),
    "shared_weights": _net("one convolution used twice, on other ranges", Shared, IMAGE),
    # pools
    "max_pool_padded": _net(
        "a padded maximum over negative values: zeros would win",
        lambda: nn.Sequential(_conv(3, 8, padding=1), nn.MaxPool2d(3, 2, 1), _conv(8, 5, 1)),
        IMAGE,
    ),
    "max_pool_stem": _net(
        "a padded maximum after a ReLU, as in a ResNet's stem",
        lambda: _between(nn.MaxPool2d(3, 2, 1)),
        {"image": (1, 3, 13, 11)},
    ),
    "max_pool_ceil": _net(
        "a maximum whose last window hangs over the border",
        lambda: nn.Sequential(_conv(3, 8, padding=1), nn.MaxPool2d(3, 2, ceil_mode=True), _conv(8, 5, 1)),
        IMAGE,
    ),
    "max_pool_dilated": _net(
        "a maximum over every second value", lambda: _between(nn.MaxPool2d(2, 2, dilation=2)), IMAGE
    ),
    "avg_pool_include_pad": _net(
        "a padded mean that counts the padding", lambda: _between(nn.AvgPool2d(3, 2, 1, count_include_pad=True)), IMAGE
    ),
    "avg_pool_exclude_pad": _net(
        "a padded mean that leaves the padding out",
        lambda: _between(nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
        IMAGE,
    ),
    "avg_pool_ceil": _net(
        "a mean whose last window hangs over the border",
        lambda: _between(nn.AvgPool2d(3, 2, ceil_mode=True)),
        IMAGE,
    ),
    "max_and_avg_pool": _net(
        "maximum and mean of one tensor, side by side",
        lambda: _on_maps(
            lambda net, maps: net.head(torch.cat([functional.max_pool2d(maps, 2), functional.avg_pool2d(maps, 2)], 1)),
            head=_conv(16, 5, 1),
        ),
        IMAGE,
    ),
    "global_pools": _net(
        "global mean and global maximum",
        lambda: _on_maps(
            lambda net, maps: net.head(
                torch.cat([maps.mean((2, 3)), functional.adaptive_max_pool2d(maps, 1).flatten(1)], 1)
            ),
            head=nn.Linear(16, 5),
        ),
        IMAGE,
    ),
    "adaptive_pool": _net(
        "a mean over a fixed number of windows, then a linear layer on their order",
        lambda: nn.Sequential(
            _conv(3, 8, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d((3, 5)), nn.Flatten(), nn.Linear(120, 5)
        ),
        IMAGE,
    ),
    "pool_1d": _net(
        "pools over one axis",
        lambda: nn.Sequential(
            nn.Conv1d(12, 8, 3), nn.ReLU(), nn.MaxPool1d(3, 2, 1), nn.AvgPool1d(2), nn.Conv1d(8, 5, 1)
        ),
        {"sequence": (1, 12, 17)},
    ),
    # resizing and moving data
    "resize_nearest": _net(
        "nearest neighbour, twice the size", lambda: _between(nn.Upsample(scale_factor=2, mode="nearest")), IMAGE
    ),
    "resize_nearest_uneven": _net(
        "nearest neighbour to a size that is no multiple",
        lambda: _between(nn.Upsample(size=(17, 13), mode="nearest")),
        IMAGE,
    ),
    "resize_bilinear": _net(
        "bilinear, centres of pixels aligned",
        lambda: _between(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)),
        IMAGE,
    ),
    "resize_bilinear_corners": _net(
        "bilinear, corners aligned",
        lambda: _between(nn.Upsample(size=(23, 15), mode="bilinear", align_corners=True)),
        IMAGE,
    ),
    "resize_bilinear_smaller": _net(
        "bilinear to a smaller size",
        lambda: _between(nn.Upsample(size=(7, 6), mode="bilinear", align_corners=False)),
        IMAGE,
    ),
    "resize_bicubic": _net(
        "bicubic", lambda: _between(nn.Upsample(scale_factor=2, mode="bicubic", align_corners=False)), IMAGE
    ),
    "pixel_shuffle": _net("channels become pixels", lambda: _between(nn.PixelShuffle(2), inside=2), IMAGE),
    "pixel_unshuffle": _net("pixels become channels", lambda: _between(nn.PixelUnshuffle(2), inside=32), IMAGE),
    "channel_shuffle": _net(
        "channels change places by way of rank 5",
        lambda: Calls(_shuffled_channels, stem=_conv(3, 8, padding=1), head=_conv(8, 5, padding=1, groups=1)),
        IMAGE,
    ),
    "flatten_linear": _net(
        "a linear layer on flattened maps, whose order is the layout's",
        lambda: nn.Sequential(_conv(3, 4, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 5 * 4, 5)),
        IMAGE,
    ),
    "permuted_axes": _net(
        "an explicit change of axes in the middle of convolutions",
        lambda: Calls(
            lambda net, x: net.head(functional.relu(net.stem(x)).permute(0, 3, 1, 2)),
            stem=_conv(3, 8, padding=1),
            head=_conv(10, 5, padding=1),
        ),
        IMAGE,
    ),
    "reversed_slice": _net(
        "slices with a step of -1 and of 2",
        lambda: Calls(
            lambda net, x: net.head(torch.flip(functional.relu(net.stem(x)), [2])[:, :, ::2, 1:-1]),
            stem=_conv(3, 8, padding=1),
            head=_conv(8, 5, 1),
        ),
        IMAGE,
    ),
    "concat_axes": _net("concatenation on each axis", ConcatAxes, IMAGE),
    "split_chunk": _net("parts of uneven size, on two axes", Split, IMAGE),
    "gathered_channels": _net(
        "channels picked by constant indices, one of them twice",
        lambda: Calls(
            lambda net, x: net.head(functional.relu(net.stem(x))[:, [6, 0, 3, 3, 5]]),
            stem=_conv(3, 8, padding=1),
            head=_conv(5, 5, 1),
        ),
        IMAGE,
    ),
    "tiled": _net(
        "a vector spread over a map and joined to it",
        lambda: CallsTwo(
            lambda net, a, b: net.head(torch.cat([a, b[:, :, None, None].expand(-1, -1, 12, 10)], 1)),
            head=_conv(7, 5, 1),
        ),
        {"a": (1, 3, 12, 10), "b": (1, 4)},
    ),
    # activations
    "se_block": _net("channels scaled by a squeeze-and-excitation block", SqueezeExcite, IMAGE),
    "hardswish": _net("hard-swish", lambda: _after(nn.Hardswish()), IMAGE),
    "hardsigmoid": _net("hard-sigmoid", lambda: _after(nn.Hardsigmoid()), IMAGE),
    "gelu": _net("GELU by the error function", lambda: _after(nn.GELU()), IMAGE),
    "gelu_tanh": _net("GELU by its tanh approximation", lambda: _after(nn.GELU(approximate="tanh")), IMAGE),
    "silu": _net("SiLU", lambda: _after(nn.SiLU()), IMAGE),
    "mish": _net("Mish", lambda: _after(nn.Mish()), IMAGE),
    "leaky_relu": _net("leaky ReLU", lambda: _after(nn.LeakyReLU(0.1)), IMAGE),
    "prelu": _net("a slope for each channel", lambda: _after(nn.PReLU(8, init=0.2)), IMAGE),
    "elu": _net("ELU", lambda: _after(nn.ELU()), IMAGE),
    "clamp": _net("a clamp that is neither ReLU nor ReLU6", lambda: _after(nn.Hardtanh(-0.3, 0.7)), IMAGE),
    "sigmoid_tanh": _net(
        "a gate of sigmoid and tanh",
        lambda: Calls(
            lambda net, x: net.head(torch.sigmoid(net.a(x)) * torch.tanh(net.b(x))),
            a=_conv(3, 8),
            b=_conv(3, 8),
            head=_conv(8, 5, 1),
        ),
        IMAGE,
    ),
    "softmax_head": _net(
        "softmax of a linear head",
        lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 7), nn.Softmax(1)),
        FEATURES,
    ),
    "softmax_axes": _net(
        "softmax over each axis of a map, which layouts place elsewhere",
        lambda: _on_maps(lambda net, maps: (maps.softmax(1), maps.softmax(2), maps.softmax(3)), 5),
        IMAGE,
        output_names=("output_0", "output_1", "output_2"),
    ),
    "log_softmax": _net(
        "the logarithm of a softmax",
        lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 7), nn.LogSoftmax(-1)),
        FEATURES,
    ),
    # normalisations
    "layer_norm": _net(
        "a layer norm between linear layers",
        lambda: nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 5)),
        SEQUENCE,
    ),
    "layer_norm_maps": _net(
        "a layer norm over channels and pixels together",
        lambda: _between(nn.LayerNorm([8, 12, 10])),
        IMAGE,
    ),
    "instance_norm": _net(
        "a norm over the pixels of each channel", lambda: _between(nn.InstanceNorm2d(8, affine=True)), IMAGE
    ),
    "group_norm": _net("a norm over groups of channels", lambda: _between(nn.GroupNorm(2, 8)), IMAGE),
    "batch_norm_after_conv": _net(
        "a batch norm that folds into the convolution before it",
        lambda: nn.Sequential(_conv(3, 8, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), _conv(8, 5, 1)),
        IMAGE,
    ),
    "batch_norm_alone": _net(
        "a batch norm that nothing folds into",
        lambda: nn.Sequential(_conv(3, 8, padding=1), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU(), _conv(8, 5, 1)),
        IMAGE,
    ),
    "batch_norm_before_padding": _net(
        "a batch norm before a padded convolution, whose zeros it does not shift",
        lambda: nn.Sequential(nn.BatchNorm2d(3), _conv(3, 8, padding=1), nn.ReLU(), _conv(8, 5, 1)),
        IMAGE,
    ),
    "batch_norm_1d": _net(
        "a batch norm after a linear layer",
        lambda: nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5)),
        FEATURES,
        dynamic_batch=True,
    ),
    "l2_normalize": _net(
        "a vector divided by its length",
        lambda: Calls(lambda net, x: functional.normalize(net.head(x), dim=1), head=nn.Linear(12, 7)),
        FEATURES,
    ),
    # attention, linear layers, recurrence
    "attention": _net("scaled dot-product attention", Attention, SEQUENCE),
    "causal_attention": _net("attention with a mask of minus infinity", lambda: Attention(masked=True), SEQUENCE),
    "multi_head_attention": _net("multi-head attention in an encoder layer", MultiHead, SEQUENCE),
    "linear_rank_3": _net(
        "linear layers on rank 3", lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)), SEQUENCE
    ),
    "linear_rank_4": _net(
        "linear layers on rank 4, which is no image",
        lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)),
        {"stack": (1, 4, 6, 12)},
    ),
    "matmul_activations": _net(
        "a product of two activations",
        lambda: CallsTwo(
            lambda net, a, b: net.left(a) @ net.right(b).transpose(1, 2), left=nn.Linear(12, 8), right=nn.Linear(10, 8)
        ),
        {"a": (1, 6, 12), "b": (1, 5, 10)},
    ),
    "einsum": _net(
        "a contraction over two axes by einsum",
        lambda: Calls(
            lambda net, x: torch.einsum("bchw,cwk->bhk", functional.relu(net.stem(x)), net.weights()),
            stem=_conv(3, 8, padding=1),
            weights=Constants(8, 10, 5, scale=0.2),
        ),
        IMAGE,
    ),
    "lstm": _net("an LSTM, all of its states", lambda: Recurrent(nn.LSTM), SEQUENCE),
    "lstm_last_state": _net("an LSTM, its last state only", LastState, SEQUENCE),
    "lstm_bidirectional": _net("an LSTM in both directions", lambda: Recurrent(nn.LSTM, bidirectional=True), SEQUENCE),
    "gru": _net("a GRU", lambda: Recurrent(nn.GRU), SEQUENCE),
    # inputs and outputs
    "embedding": _net(
        "int64 tokens that pick rows of a table",
        Embedding,
        {"tokens": (1, 7)},
        dtypes={"tokens": "int64"},
        ranges={"tokens": (0, 30)},
    ),
    "uint8_image": _net(
        "an image of bytes that the net itself scales",
        lambda: Calls(
            lambda net, x: net.head(functional.relu(net.stem(x.float() / 255))), stem=_conv(3, 8), head=_conv(8, 5, 1)
        ),
        IMAGE,
        dtypes={"image": "uint8"},
        ranges={"image": (0, 256)},
    ),
    "multi_input": _net("an image and a vector", MultiInput, {**IMAGE, **FEATURES}),
    "two_rank_4_inputs": _net(
        "two inputs of rank 4, of which only one is an image",
        lambda: CallsTwo(
            lambda net, a, b: (net.conv(a), net.linear(b)), conv=_conv(3, 8, padding=1), linear=nn.Linear(6, 5)
        ),
        {"a": (1, 3, 12, 10), "b": (1, 2, 4, 6)},
        output_names=("output_0", "output_1"),
    ),
    "multi_output": _net(
        "an output that is also read further", lambda: Outputs("tuple"), IMAGE, output_names=("output_0", "output_1")
    ),
    "dict_output": _net("a dictionary of outputs", lambda: Outputs("dict"), IMAGE, output_names=("maps", "scores")),
    "scalar_output": _net(
        "an output of rank 0", lambda: Calls(lambda net, x: net.stem(x).square().mean(), stem=_conv(3, 8)), IMAGE
    ),
    "rank_5_output": _net(
        "an output of rank 5",
        lambda: Calls(lambda net, x: net.stem(x).reshape(1, 2, 4, 10, 8), stem=_conv(3, 8)),
        IMAGE,
    ),
    "argmax_output": _net(
        "int64 indices of the best channel",
        lambda: Calls(lambda net, x: net.stem(x).argmax(1), stem=_conv(3, 8)),
        IMAGE,
    ),
    "topk": _net(
        "the three best values and where they stand",
        lambda: Calls(lambda net, x: tuple(torch.topk(net.head(x), 3)), head=nn.Linear(12, 9)),
        FEATURES,
        output_names=("output_0", "output_1"),
    ),
    "dynamic_batch": _net("a batch axis that stays open", Residual, IMAGE, dynamic_batch=True),
    "dynamic_batch_reshape": _net(
        "an open batch axis through a reshape",
        lambda: Calls(
            lambda net, x: net.head(functional.relu(net.stem(x)).reshape(x.shape[0], 2, -1)),
            stem=_conv(3, 8),
            head=nn.Linear(320, 5),
        ),
        IMAGE,
        dynamic_batch=True,
    ),
    # arithmetic
    "residual_relu6": _net("an inverted bottleneck with ReLU6 and a sum", Residual, IMAGE),
    "residual_relu": _net("a ResNet block whose ReLU follows the sum", ResidualRelu, IMAGE),
    "residual_relu_chain": _net(
        "the same, then a convolution, for which the clamped sum stays on integers",
        lambda: nn.Sequential(ResidualRelu(), _conv(8, 5, padding=1)),
        IMAGE,
    ),
    "larger_and_smaller": _net(
        "the larger and the smaller of two maps, then convolutions",
        lambda: Calls(
            lambda net, x: net.high(torch.maximum(net.a(x), net.b(x))) + net.low(torch.minimum(net.a(x), net.b(x))),
            a=_conv(3, 8, padding=1),
            b=_conv(3, 8, padding=1),
            high=_conv(8, 5, 1),
            low=_conv(8, 5, 1),
        ),
        IMAGE,
    ),
    "broadcast_multiply": _net(
        "products that spread over other axes",
        lambda: _on_maps(
            lambda net, maps: maps * net.planes() + maps.mean(3, keepdim=True) * net.rows(),
            planes=Constants(8, 1, 1),
            rows=Constants(12, 1),
        ),
        IMAGE,
    ),
    "constant_left": _net(
        "a constant as the left side of a difference and a quotient",
        lambda: _on_maps(lambda net, maps: 2.0 - maps + 1.0 / (1.5 + maps.square())),
        IMAGE,
    ),
    "reductions": _net(
        "maximum, minimum, sum and mean over several axes, kept and dropped",
        lambda: Calls(_reduced, stem=_conv(3, 8)),
        IMAGE,
        output_names=("output_0", "output_1"),
    ),
    "elementary": _net("pow, sqrt, exp, log and softplus", lambda: Calls(_elementary, stem=_conv(3, 8)), IMAGE),
    "where_mask": _net(
        "a choice by a mask that is computed",
        lambda: _on_maps(
            lambda net, maps: torch.where(maps > 0.1, maps, net.other() * maps.mean(1, keepdim=True)),
            other=Constants(8, 1, 1),
        ),
        IMAGE,
    ),
    "cumulative_sum": _net(
        "a running sum over time",
        lambda: Calls(
            lambda net, x: net.head(torch.cumsum(net.stem(x), 1)), stem=nn.Linear(12, 8), head=nn.Linear(8, 5)
        ),
        SEQUENCE,
    ),
    "grid_sample": _net(
        "an image read at given places; the grid has rank 4 and is no image",
        lambda: CallsTwo(
            lambda net, a, b: net.head(functional.grid_sample(a, b, align_corners=False)), head=_conv(3, 5, 1)
        ),
        {"a": (1, 3, 12, 10), "b": (1, 6, 7, 2)},
        ranges={"b": (-1.1, 1.1)},
    ),
    "large_magnitudes": _net(
        "weights and values in the hundreds, which float16 holds",
        lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)),
        FEATURES,
        ranges={"features": (-500.0, 500.0)},
    ),
    "small_magnitudes": _net(
        "inputs of a thousandth",
        lambda: nn.Sequential(nn.Linear(12, 16, bias=False), nn.ReLU(), nn.Linear(16, 5, bias=False)),
        FEATURES,
        ranges={"features": (-1e-3, 1e-3)},
    ),
}


def samples_of(name: str, count: int = 16, seed: int = 1) -> dict[str, np.ndarray]:
    """Return inputs of a net, first axis = sample; the same arguments give the same samples."""
    net = NETS[name]
    rng = np.random.default_rng(seed)
    made = {}
    for key, shape in net.inputs.items():
        dtype, full = np.dtype(net.dtypes.get(key, "float32")), (count, *shape[1:])
        low, high = net.ranges.get(key, (0, 2))
        if np.issubdtype(dtype, np.floating):
            values = rng.uniform(low, high, full) if key in net.ranges else rng.standard_normal(full)
        else:
            values = rng.integers(int(low), int(high), full)
        made[key] = values.astype(dtype)
    return made


def input_texts(name: str) -> list[str]:
    """Return a net's inputs as `--input` takes them."""
    net = NETS[name]
    texts = []
    for key, shape in net.inputs.items():
        axes = ("batch", *shape[1:]) if net.dynamic_batch else shape
        texts.append(f"{key}={','.join(map(str, axes))}:{net.dtypes.get(key, 'float32')}")
    return texts


def __getattr__(name: str) -> Callable[[], nn.Module]:
    if name in NETS:
        return NETS[name].make
    raise AttributeError(name)
