"""Quantized ONNX as PyTorch and ONNX Runtime write it, for tests; and the plainest Q/DQ form of what `absorb` reads."""

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn


class Cnn(nn.Module):
    """Convolutions with ReLU6 and ReLU, a residual sum, pooling, a linear head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.project = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8 * 4 * 4, 5)

    def forward(self, x):
        stem = torch.relu(self.stem(x))
        added = stem + self.project(nn.functional.relu6(self.inner(stem)))
        return self.head(nn.functional.max_pool2d(added, 2).flatten(1))


class Mlp(nn.Module):
    """Linear layers whose weights lie on both sides of the exporter's folding limits."""

    def __init__(self, width=600):
        super().__init__()
        self.first = nn.Linear(12, width)
        self.second = nn.Linear(width, width)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def seeded(make):
    torch.manual_seed(0)
    return make().eval()


def rows(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def exported(module, example, **more):
    """Return a module as the dynamo exporter writes it, with a dynamic batch."""
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(module, (example,), dynamo=True, dynamic_shapes=dynamic, verbose=False, **more)
    model = program.model_proto
    del model.graph.value_info[:]  # stale after the exporter transposed weights, and ONNX Runtime's tools believe it
    return model


def pt2e(module, shape):
    """Return a module quantized by torchao's PT2E flow with the XNNPACK quantizer."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

    example = torch.from_numpy(rows(shape))
    dynamic = ({0: torch.export.Dim("batch")},)
    captured = torch.export.export(module, (example,), dynamic_shapes=dynamic).module()
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(captured, quantizer)
    for seed in range(3):
        prepared(torch.from_numpy(rows(shape, seed)))
    return exported(convert_pt2e(prepared), example)


def onnxruntime_static(model, shape, folder, **settings):
    """Return a float model quantized by onnxruntime.quantization.quantize_static."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    name = model.graph.input[0].name

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.rows = iter([{name: rows(shape, seed)} for seed in range(4)])

        def get_next(self):
            return next(self.rows, None)

    onnx.save(model, folder / "float.onnx")
    quantize_static(folder / "float.onnx", folder / "static.onnx", Reader(), **settings)
    return onnx.load(folder / "static.onnx")


def onnxruntime_dynamic(model, folder, **settings):
    """Return a float model quantized by onnxruntime.quantization.quantize_dynamic."""
    from onnxruntime.quantization import quantize_dynamic

    onnx.save(model, folder / "float.onnx")
    quantize_dynamic(folder / "float.onnx", folder / "dynamic.onnx", **settings)
    return onnx.load(folder / "dynamic.onnx")


def plain_form(model, source):
    """Return a canonical graph with a QuantizeLinear and DequantizeLinear on each activation of its record."""
    form = onnx.ModelProto()
    form.CopyFrom(model)
    graph, nodes, renamed = form.graph, [], {}

    def pair(tensor, read, made):
        grid = source.activations[tensor].grid
        kind = {-128: np.int8, -127: np.int8, 0: np.uint8, -32768: np.int16}[grid.low_code]
        for part, value in (("scale", np.float32(grid.scale)), ("zero_point", np.asarray(grid.zero_point, kind))):
            graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"{tensor}/{part}"))
        numbers = [f"{tensor}/scale", f"{tensor}/zero_point"]
        nodes.append(helper.make_node("QuantizeLinear", [read, *numbers], [f"{tensor}/stored"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{tensor}/stored", *numbers], [made]))

    for value in graph.input:
        if value.name in source.activations:
            renamed[value.name] = f"{value.name}/dequantized"
            pair(value.name, value.name, renamed[value.name])
    for node in list(graph.node):
        node.input[:] = [renamed.get(name, name) for name in node.input]
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name in source.activations:
                node.output[index] = f"{name}/float"
                pair(name, f"{name}/float", name)
    del graph.node[:]
    graph.node.extend(nodes)
    return form
