"""Networks small enough to export in a second, one for each shape of graph that room 1 must carry."""

import sys

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune


def _seeded(make):
    torch.manual_seed(0)
    module = make()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-0.5, 0.5)
            part.running_var.uniform_(0.5, 2)
    return module


class Residual(nn.Module):
    """Stem, depthwise separable block with a residual sum, pool, linear head; one of its tensors is also an output."""

    def __init__(self, *, hidden=16, taps=False):
        super().__init__()
        self.taps = taps
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.expand = nn.Conv2d(8, hidden, 1)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.project = nn.Conv2d(hidden, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, image):
        stem = self.stem(image)
        inner = functional.relu6(self.depthwise(functional.relu6(self.expand(stem))))
        added = stem + self.project(inner)
        logits = self.head(functional.adaptive_avg_pool2d(added, 1).flatten(1))
        return {"logits": logits, "stem": stem} if self.taps else logits


class TwoInputs(nn.Module):
    """Two inputs of which one has a dynamic second axis; a tuple of outputs."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Linear(6, 8)
        self.shared = nn.Linear(8, 8)

    def forward(self, tokens, bias):
        mixed = self.shared(functional.relu(self.tokens(tokens))).mean(1)
        return self.shared(mixed + bias), mixed


class Mlp(nn.Module):
    """Linear layers on both sides of the exporter's folding limits (8,192 elements in, 512 * 512 out)."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Linear(12, width)
        self.second = nn.Linear(width, width)

    def forward(self, vector):
        return self.second(functional.relu(self.first(vector)))


def residual():
    return _seeded(Residual)


def residual_with_taps():
    return _seeded(lambda: Residual(taps=True))


def two_inputs():
    return _seeded(TwoInputs)


def small_mlp():
    return _seeded(lambda: Mlp(16))


def large_mlp():
    return _seeded(lambda: Mlp(600))


def masked():
    """Return the large network with half of its weights masked by torch.nn.utils.prune, the masks still in place."""
    module = large_mlp()
    for part in (module.first, module.second):
        prune.l1_unstructured(part, "weight", 0.5)
    return module


class Noisy(nn.Module):
    def forward(self, vector):
        return vector + torch.rand(1)


def noisy():
    return Noisy()


class Chatty(nn.Module):
    def forward(self, vector):
        sys.stdout.write("a print in forward\n")
        return vector * 2


def chatty():
    sys.stdout.write("a print in the factory\n")
    return Chatty()


def broken():
    raise RuntimeError("the factory's own words")


def no_module():
    return {"weights": 1}
