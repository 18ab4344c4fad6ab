"""Networks whose structure was compressed (zeros, factors, short floats, sharing), and what follows them to ONNX."""

import numpy as np
import onnx
import onnxruntime
import onnxslim
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize, prune

from edgedeploy.prepare.lower import (
    constant_parameters,
    half_floats,
    low_rank,
    parametrizations,
    pruning_masks,
    shared_weights,
    sparse_tensors,
)
from tests.kinds import seeded

# On either side of the exporter's folding limits: 8,192 elements of an input, 512 * 512 of an output.
SMALL, LARGE = 16, 600


def lowered(module, *inputs, is_decomposed=False):
    """Return the lowered program and what was found, as `prepare/lower` asks the structural parts in turn."""
    found = []
    with torch.no_grad():
        for part in (pruning_masks, sparse_tensors, parametrizations, half_floats, shared_weights):
            module, more = part.lower_module(module.eval())
            found += more
        program = torch.export.export(
            module, inputs, dynamic_shapes=tuple({0: torch.export.Dim("batch")} for _ in inputs)
        )
        program = program.run_decompositions() if is_decomposed else program
        for part in (half_floats, low_rank, constant_parameters, shared_weights):
            program, more = part.lower_program(program)
            found += more
        program.validate()
    return program, {item.kind: item for item in found}


def to_onnx(program, *, is_slim=True):
    """Return the program's ONNX graph, by default simplified as edgedeploy does it."""
    with torch.no_grad():
        exported = torch.onnx.export(program, dynamo=True, opset_version=18, external_data=False, verbose=False)
    return onnxslim.slim(exported.model_proto) if is_slim else exported.model_proto


def stored_elements(graph):
    """Return how many numbers an ONNX graph's float constants hold."""
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    return sum(int(np.prod(item.dims)) for item in graph.graph.initializer if item.data_type in floats)


def runtime_graph(graph, folder):
    """Return the graph that ONNX Runtime makes of another: all that fold and fuse; only layouts, which pad, are left."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimised.onnx")


def run(graph, *inputs):
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {spec.name: item.numpy() for spec, item in zip(session.get_inputs(), inputs, strict=True)})


def relative(answer, reference):
    """Return the largest difference, relative to the largest value."""
    reference = reference.detach().double().numpy()
    return float(np.abs(np.asarray(answer, np.float64) - reference).max() / np.abs(reference).max())


class ConvNet(nn.Module):
    """Convolution, normalisation and two linear layers of a chosen width."""

    def __init__(self, width=SMALL):
        super().__init__()
        self.conv = nn.Conv2d(4, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv_2 = nn.Conv2d(width, 8, 3, padding=1)
        self.norm_2 = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8, width)
        self.head = nn.Linear(width, width)

    def forward(self, image):
        inner = functional.relu(self.norm(self.conv(image)))
        inner = functional.relu(self.norm_2(self.conv_2(inner))).mean((2, 3))
        return self.head(functional.relu(self.hidden(inner)))


def images(count=5):
    return torch.randn(count, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def masked_everywhere(width):
    """Return a network with one mask after another, on biases too, and a structured one."""
    module = seeded(ConvNet, width)
    prune.l1_unstructured(module.conv, "weight", 0.3)
    prune.random_unstructured(module.conv, "weight", 0.3)
    prune.l1_unstructured(module.head, "bias", 0.5)
    prune.global_unstructured([(module.hidden, "weight"), (module.head, "weight")], prune.L1Unstructured, amount=0.5)
    prune.ln_structured(module.conv_2, "weight", 0.25, n=2, dim=0)
    return module


class Svd(nn.Module):
    """Parametrization of a weight as U diag(S) V, truncated."""

    def __init__(self, rank, shape):
        super().__init__()
        self.rank, self.shape = rank, shape

    def forward(self, u, s, v):
        return (u @ torch.diag(s) @ v).view(self.shape)

    def right_inverse(self, weight):
        u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        return u[:, : self.rank].contiguous(), s[: self.rank].contiguous(), v[: self.rank].contiguous()


def with_svd(width, rank):
    """Return a network whose large layers are parametrized by truncated singular value decompositions."""
    module = seeded(ConvNet, width)
    for part in (module.conv, module.conv_2, module.head):
        shape = tuple(part.weight.shape)
        parametrize.register_parametrization(part, "weight", Svd(rank, shape), unsafe=True)
    return module


class HandMade(nn.Module):
    """Factors and masks that forward multiplies by hand, in the ways that people write it."""

    def __init__(self, width, rank=2):
        super().__init__()
        self.first = nn.Linear(4, width)
        self.u, self.v = nn.Parameter(torch.randn(width, rank)), nn.Parameter(torch.randn(rank, width))
        self.bias = nn.Parameter(torch.randn(width))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.masked = nn.Linear(width, width)
        self.register_buffer("mask", (torch.rand(width, width) > 0.5).float())

    def forward(self, image):
        inner = self.first(image.mean((2, 3)))
        inner = torch.addmm(self.bias, inner, (self.v.t() @ self.u.t()) / 2)
        inner = torch.tanh(inner @ (self.scale * (self.u @ self.v)))
        return functional.linear(inner, self.masked.weight * self.mask, self.masked.bias)


class ChannelsCut(nn.Module):
    """What a pruner leaves: 13 and 37 channels, a residual sum and a concatenation that tie them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 13, 3, padding=1, bias=False), nn.BatchNorm2d(13), nn.ReLU())
        self.wide = nn.Sequential(nn.Conv2d(13, 37, 3, padding=1), nn.BatchNorm2d(37), nn.ReLU())
        self.back = nn.Conv2d(37, 13, 1)
        self.side = nn.Conv2d(13, 7, 3, padding=1)
        self.merge = nn.Conv2d(20, 9, 1)
        self.head = nn.Linear(9, 5)

    def forward(self, image):
        stem = self.stem(image)
        added = functional.relu(stem + self.back(self.wide(stem)))
        merged = self.merge(torch.cat([added, self.side(added)], 1))
        return self.head(functional.adaptive_avg_pool2d(merged, 1).flatten(1))


class Student(nn.Module):
    """A small network that in training returns its features too, for the teacher's loss."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, vector):
        features = functional.relu(self.body(vector))
        return (self.head(features), features) if self.training else self.head(features)


class SeveralTasks(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.boxes, self.kind, self.age = nn.Linear(8, 4), nn.Linear(8, 5), nn.Linear(8, 1)

    def forward(self, image):
        trunk = self.trunk(image)
        pooled = trunk.mean((2, 3))
        return {
            "boxes": self.boxes(pooled),
            "heads": {"age": self.age(pooled), "kind": self.kind(pooled)},
            "map": trunk,
        }


class ImageAndTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.table, self.head = nn.Conv2d(3, 8, 3), nn.Embedding(10, 8), nn.Linear(8, 4)

    def forward(self, image, tokens):
        words = self.table(tokens % 10)
        return self.head(self.conv(image).mean((2, 3)) + words.mean(1)), words


def channels_cut():
    return seeded(ChannelsCut)


def student():
    return seeded(Student)


def several_tasks():
    return seeded(SeveralTasks)


def image_and_tokens():
    return seeded(ImageAndTokens)
