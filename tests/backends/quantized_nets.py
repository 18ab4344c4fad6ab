"""Networks quantized by real torch.ao calls, eager and FX, and what tests count in them."""

import copy
import warnings

import torch
from torch import nn
from torch.ao.quantization import (
    DeQuantStub,
    HistogramObserver,
    QConfig,
    QConfigMapping,
    QuantStub,
    convert,
    fuse_modules,
    fuse_modules_qat,
    get_default_qat_qconfig,
    get_default_qat_qconfig_mapping,
    get_default_qconfig,
    get_default_qconfig_mapping,
    prepare,
    prepare_qat,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx
from torch.nn import functional

from edgedeploy.prepare.markers import translations

IMAGE = (3, 8, 8)


class Eager(nn.Module):
    """Fused convolutions, a depthwise one, sum, product, concatenation, pools, activations, a head of chosen width."""

    def __init__(self, width=16):
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.swish, self.leaky, self.gate = nn.Hardswish(), nn.LeakyReLU(0.1), nn.Sigmoid()
        self.sum, self.product, self.both = (torch.ao.nn.quantized.FloatFunctional() for _ in range(3))
        self.pool, self.flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.first, self.relu = nn.Linear(16, width), nn.ReLU()
        self.head = nn.Linear(width, width)

    def forward(self, image):
        stem = functional.max_pool2d(self.stem(self.quant(image)), 2)
        inner = self.swish(self.depthwise(stem))
        added = self.sum.add_relu(stem, inner)
        gated = self.product.mul(added, self.gate(inner))
        joined = self.both.cat([functional.avg_pool2d(gated, 2), functional.avg_pool2d(self.leaky(added), 2)], dim=1)
        features = self.flat(self.pool(joined))
        logits = self.dequant(self.head(self.relu(self.first(features))))
        return {"logits": logits, "chances": functional.softmax(logits, -1)}

    def fused(self, is_qat=False):
        groups = [["stem.0", "stem.1", "stem.2"], ["first", "relu"]]
        return (fuse_modules_qat if is_qat else fuse_modules)(self, groups, inplace=True)


class Norms(nn.Module):
    """The quantized layers that are rarer: norms alone, ELU, ReLU6, PReLU, a transposed convolution, numbers added."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.up = nn.ConvTranspose2d(3, 4, 2, stride=2)
        self.batch = nn.BatchNorm2d(4)
        self.batch_relu = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
        self.group, self.instance = nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)
        self.elu, self.six, self.prelu = nn.ELU(0.5), nn.ReLU6(), nn.PReLU()
        self.layer = nn.LayerNorm(16)
        self.line, self.line_relu = nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding_mode="reflect", padding=1)
        self.numbers, self.matmul = torch.ao.nn.quantized.FloatFunctional(), torch.ao.nn.quantized.FloatFunctional()

    def forward(self, image):
        x = self.batch_relu(self.batch(self.up(self.quant(image))))
        x = self.instance(self.group(x))
        x = self.six(self.elu(x))
        x = self.numbers.mul_scalar(self.numbers.add_scalar(x, 0.7), -1.5)
        x = self.prelu(functional.interpolate(x, scale_factor=0.5, mode="bilinear"))
        x = self.layer(functional.adaptive_avg_pool2d(x, 4).flatten(2))
        x = self.line_relu(self.line(x))
        return self.dequant(self.matmul.matmul(x, x.transpose(1, 2)))


class Functions(nn.Module):
    """For FX: functions in place of modules, a module that is used twice, numbers, a tensor that is also an output."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.swish, self.leaky, self.elu, self.gate = nn.Hardswish(), nn.LeakyReLU(), nn.ELU(), nn.Sigmoid()
        self.kernel, self.bias = nn.Parameter(torch.randn(8, 8, 1, 1) / 3), nn.Parameter(torch.randn(8))
        self.norm = nn.LayerNorm(8)
        self.first, self.table = nn.Linear(8, width), nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, image):
        stem = self.stem(image)
        x = self.twice(self.twice(stem))
        x = functional.relu(functional.conv2d(self.swish(x), self.kernel, self.bias, (1, 1), (0, 0), (1, 1), 1))
        x = torch.cat([functional.relu(stem + x * 0.5), self.leaky(x)], 1)[:, :8]
        x = self.elu(x * self.gate(x))
        x = functional.max_pool2d(functional.interpolate(x, scale_factor=2), 16).flatten(1)
        logits = functional.relu(functional.linear(self.first(self.norm(x)), self.table))
        return {"logits": logits + torch.tanh(logits), "stem": stem}


def images(count=16, seed=1):
    return torch.randn(count, *IMAGE, generator=torch.Generator().manual_seed(seed))


def seeded(make, *args):
    torch.manual_seed(0)
    module = make(*args)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-0.5, 0.5)
            part.running_var.uniform_(0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 1.5)
    return module.eval()


def reduced_range(is_per_channel=True):
    """Return observers that keep one bit free: no kernel saturates, also on x86 without VNNI."""
    channels = get_default_qconfig("fbgemm").weight
    return QConfig(
        activation=HistogramObserver.with_args(reduce_range=True),
        weight=channels if is_per_channel else get_default_qconfig("qnnpack").weight,
    )


def eager_ptq(module, engine, qconfig=None):
    """Return the prepared, calibrated and the converted module."""
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.qconfig = qconfig or get_default_qconfig(engine)
        prepared = prepare(module)
        prepared(images())
        return prepared, convert(copy.deepcopy(prepared))


def eager_qat(module, engine, steps=3):
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.train().qconfig = get_default_qat_qconfig(engine)
        prepared = prepare_qat(module)
        train(prepared, steps)
        return prepared, convert(copy.deepcopy(prepared))


def fx_ptq(module, engine, mapping=None):
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(module, mapping or get_default_qconfig_mapping(engine), (images(),))
        prepared(images())
        return prepared, convert_fx(copy.deepcopy(prepared))


def fx_qat(module, engine, steps=3):
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_qat_fx(module.train(), get_default_qat_qconfig_mapping(engine), (images(),))
        train(prepared, steps)
        return prepared, convert_fx(copy.deepcopy(prepared))


def everywhere(qconfig):
    return QConfigMapping().set_global(qconfig)


def train(module, steps):
    """Take optimizer steps, so that weights, statistics and grids are what training leaves and not what init set."""
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    for step in range(steps):
        answer = module(images(seed=step))
        answer = answer["logits"] if isinstance(answer, dict) else answer
        loss = answer.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module.eval()


def onnx_with_markers(module, *example):
    """Export with a dynamic batch, as edgedeploy does, and return the ONNX model."""
    batch = torch.export.Dim("batch")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, example, dynamic_shapes=tuple({0: batch} for _ in example))
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=18,
            custom_translation_table=translations(),
            external_data=False,
            verbose=False,
        )
    return exported.model_proto


def markers(graph, kind):
    """Return nodes of domain edgedeploy with their constant inputs as arrays, in the order of the graph."""
    from onnx import numpy_helper

    constants = {each.name: numpy_helper.to_array(each) for each in graph.graph.initializer}
    return [
        [constants.get(name) for name in node.input]
        for node in graph.graph.node
        if node.domain == "edgedeploy" and node.op_type == kind
    ]
