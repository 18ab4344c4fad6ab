"""Every kind of compressed model, made by the real torch and torchao calls: for the tests and for the table of kinds.

A kind is a function that returns a module; `INPUTS` says what it takes. Layers come in two sizes, because what an exporter
folds depends on size: 12 to 32 features, and 640, which lies above 8,192 elements and above 512 x 512 outputs.
"""

import copy
import warnings

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize, prune

SMALL, LARGE = 32, 640
IMAGE = {"image": ("batch", 3, 16, 16)}
FEATURES = {"features": ("batch", 12)}
SEQUENCE = {"sequence": ("batch", 6, 12)}


class Cnn(nn.Module):
    """Stem with batch normalisation, depthwise separable block with a residual sum, pool, two linear layers."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.depthwise = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.project = nn.Conv2d(width, width, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.hidden = nn.Linear(width, 24)
        self.head = nn.Linear(24, 5)
        self.sum = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, image):
        stem = self.stem(image)
        added = self.sum.add(stem, self.project(self.depthwise(stem)))
        return self.head(functional.relu(self.hidden(torch.flatten(self.pool(added), 1))))


class Mlp(nn.Module):
    """Three linear layers, of which the middle one is square."""

    def __init__(self, width=SMALL):
        super().__init__()
        self.first = nn.Linear(12, width)
        self.middle = nn.Linear(width, width)
        self.last = nn.Linear(width, 5)

    def forward(self, features):
        return self.last(functional.relu(self.middle(functional.relu(self.first(features)))))


class Tagger(nn.Module):
    """An LSTM and a linear layer on its last step."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(12, 20, batch_first=True)
        self.head = nn.Linear(20, 5)

    def forward(self, sequence):
        states, _ = self.lstm(sequence)
        return self.head(states[:, -1])


def seeded(make, *arguments, **options):
    """Return a module with weights and batch statistics that are random and always the same."""
    torch.manual_seed(0)
    module = make(*arguments, **options)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-0.5, 0.5)
            part.running_var.uniform_(0.5, 2)
    return module.eval()


def images(count=16):
    torch.manual_seed(1)
    return torch.randn(count, 3, 16, 16)


def features(count=16):
    torch.manual_seed(1)
    return torch.randn(count, 12)


# ---------------------------------------------------------------- pruning


def masks(width=SMALL):
    module = seeded(Mlp, width)
    for layer in (module.first, module.middle, module.last):
        prune.l1_unstructured(layer, "weight", 0.5)
    return module


def masks_in_a_cnn():
    module = seeded(Cnn)
    prune.global_unstructured(
        [(module.stem[0], "weight"), (module.project, "weight")], prune.L1Unstructured, amount=0.6
    )
    return module


def structured_masks():
    module = seeded(Cnn)
    prune.ln_structured(module.project, "weight", 0.5, n=2, dim=0)
    return module


def ao_pruning(width=SMALL):
    from torch.ao.pruning import WeightNormSparsifier

    module = seeded(Mlp, width)
    sparsifier = WeightNormSparsifier(sparsity_level=0.8, sparse_block_shape=(1, 4))
    sparsifier.prepare(module, [{"tensor_fqn": "middle.weight"}])
    sparsifier.step()
    return module


def weight_norm(width=SMALL):
    module = seeded(Mlp, width)
    nn.utils.parametrizations.weight_norm(module.middle)
    return module


class _Halved(nn.Module):
    def forward(self, weight):
        return weight * 0.5


def any_parametrization(width=SMALL):
    module = seeded(Mlp, width)
    parametrize.register_parametrization(module.middle, "weight", _Halved())
    return module


def baked_sparsity(width=SMALL):
    module = masks(width)
    for layer in (module.first, module.middle, module.last):
        prune.remove(layer, "weight")
    return module


def two_of_four(width=SMALL):
    from torch.ao.pruning import WeightNormSparsifier

    module = seeded(Mlp, width)
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(module, [{"tensor_fqn": "middle.weight"}])
    sparsifier.step()
    sparsifier.squash_mask()
    return module


def odd_channels():
    return seeded(Cnn, 13)


# ---------------------------------------------------------------- low rank, sharing


class _Product(nn.Module):
    def __init__(self, rows, columns, rank):
        super().__init__()
        self.right = nn.Parameter(torch.randn(rank, columns) / rank)
        self.left = nn.Parameter(torch.randn(rows, rank) / rank)

    def forward(self, weight):
        return self.left @ self.right


def low_rank_parametrization(width=SMALL):
    module = seeded(Mlp, width)
    parametrize.register_parametrization(module.middle, "weight", _Product(width, width, width // 8))
    return module


class _Factors(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.left = nn.Parameter(torch.randn(width, width // 8) / 4)
        self.right = nn.Parameter(torch.randn(width // 8, width) / 4)
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, features):
        return functional.linear(features, self.left @ self.right, self.bias)


def low_rank_in_forward(width=SMALL):
    module = seeded(Mlp, width)
    module.middle = _Factors(width)
    return module


def low_rank_layers(width=SMALL):
    module = seeded(Mlp, width)
    module.middle = nn.Sequential(nn.Linear(width, width // 8, bias=False), nn.Linear(width // 8, width))
    return module


def shared_weights(width=SMALL):
    module = seeded(Mlp, width)
    module.first = nn.Sequential(module.first, nn.ReLU(), module.middle)
    return module


# ---------------------------------------------------------------- torch.ao.quantization


def dynamic_linear(width=SMALL):
    return torch.ao.quantization.quantize_dynamic(seeded(Mlp, width), {nn.Linear}, dtype=torch.qint8)


def dynamic_lstm():
    return torch.ao.quantization.quantize_dynamic(seeded(Tagger), {nn.LSTM, nn.Linear}, dtype=torch.qint8)


def dynamic_float16(width=SMALL):
    return torch.ao.quantization.quantize_dynamic(seeded(Mlp, width), {nn.Linear}, dtype=torch.float16)


def _engine():
    return "qnnpack" if "qnnpack" in torch.backends.quantized.supported_engines else "x86"


def _fused(module, *, is_qat):
    fuse = torch.ao.quantization.fuse_modules_qat if is_qat else torch.ao.quantization.fuse_modules
    return fuse(module, [["stem.0", "stem.1", "stem.2"], ["depthwise.0", "depthwise.1", "depthwise.2"]])


def _wrapped(module):
    return torch.ao.quantization.QuantWrapper(module)


def eager_static():
    torch.backends.quantized.engine = _engine()
    module = _wrapped(_fused(seeded(_CnnWithModules), is_qat=False))
    module.qconfig = torch.ao.quantization.get_default_qconfig(_engine())
    prepared = torch.ao.quantization.prepare(module)
    prepared(images())
    return torch.ao.quantization.convert(prepared)


class _CnnWithModules(Cnn):
    """Eager mode quantizes modules only, so the activation of the head is one."""

    def __init__(self):
        super().__init__()
        self.activation = nn.ReLU()

    def forward(self, image):
        stem = self.stem(image)
        added = self.sum.add(stem, self.project(self.depthwise(stem)))
        return self.head(self.activation(self.hidden(torch.flatten(self.pool(added), 1))))


def eager_qat_prepared():
    torch.backends.quantized.engine = _engine()
    module = _wrapped(_fused(seeded(_CnnWithModules).train(), is_qat=True))
    module.qconfig = torch.ao.quantization.get_default_qat_qconfig(_engine())
    prepared = torch.ao.quantization.prepare_qat(module)
    _train(prepared)
    return prepared.eval()


def eager_qat():
    return torch.ao.quantization.convert(eager_qat_prepared())


def _train(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        module(images(8)).square().mean().backward()
        optimizer.step()


def fx_static():
    from torch.ao.quantization.quantize_fx import convert_fx

    return convert_fx(_fx_prepared())


def _fx_prepared():
    torch.backends.quantized.engine = _engine()
    from torch.ao.quantization.quantize_fx import prepare_fx

    mapping = torch.ao.quantization.get_default_qconfig_mapping(_engine())
    prepared = prepare_fx(seeded(Cnn), mapping, (images(2),))
    prepared(images())
    return prepared


def fx_qat_prepared():
    torch.backends.quantized.engine = _engine()
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    mapping = torch.ao.quantization.get_default_qat_qconfig_mapping(_engine())
    prepared = prepare_qat_fx(seeded(Cnn).train(), mapping, (images(2),))
    _train(prepared)
    return prepared.eval()


def fx_qat():
    from torch.ao.quantization.quantize_fx import convert_fx

    return convert_fx(fx_qat_prepared())


# ---------------------------------------------------------------- PT2E and torchao


def _captured(module, example):
    batch = torch.export.Dim("batch")
    return torch.export.export(module, (example,), dynamic_shapes=({0: batch},)).module()


def _pt2e(quantizer, *, is_qat=False):
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

    captured = _captured(seeded(Cnn), images(2))
    prepared = prepare_qat_pt2e(captured, quantizer) if is_qat else prepare_pt2e(captured, quantizer)
    if is_qat:
        _train(prepared)
        move_exported_model_to_eval(prepared)
    else:
        prepared(images())
    return convert_pt2e(prepared)


def _xnnpack(*, is_qat=False):
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_qat=is_qat))


def pt2e_xnnpack():
    return _pt2e(_xnnpack())


def pt2e_xnnpack_qat():
    return _pt2e(_xnnpack(is_qat=True), is_qat=True)


def pt2e_x86():
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    return _pt2e(x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config()))


def pt2e_arm():
    from torchao.quantization.pt2e.quantizer import arm_inductor_quantizer as arm

    return _pt2e(arm.ArmInductorQuantizer().set_global(arm.get_default_arm_inductor_quantization_config()))


def _torchao(width, config, layer=""):
    from torchao.quantization import quantize_

    module = seeded(Mlp, width)
    quantize_(module, config, filter_fn=lambda part, name: isinstance(part, nn.Linear) and layer in name)
    return module


def weight_only_int8(width=SMALL):
    from torchao.quantization import Int8WeightOnlyConfig

    return _torchao(width, Int8WeightOnlyConfig())


def weight_only_int4(width=SMALL):
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return _torchao(width, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)), "middle")


def int8_dynamic_activations(width=SMALL):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return _torchao(width, Int8DynamicActivationInt8WeightConfig())


def int8_activations_int4_weights(width=SMALL):
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig
    from torchao.quantization.granularity import PerGroup

    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    return _torchao(width, config, "middle")


def float8_weights(width=SMALL):
    from torchao.quantization import Float8WeightOnlyConfig

    return _torchao(width, Float8WeightOnlyConfig())


# ---------------------------------------------------------------- short floats, many inputs and outputs


def half():
    return seeded(Cnn).half()


def brain_float():
    return seeded(Cnn).bfloat16()


class _Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Cnn()

    def forward(self, image):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(image)


def autocast():
    return seeded(_Autocast)


class _ManyTasks(nn.Module):
    """A shared trunk, a second input, and a dictionary of outputs."""

    def __init__(self):
        super().__init__()
        self.trunk = Mlp()
        self.classes = nn.Linear(5 + 12, 3)
        self.angle = nn.Linear(5, 1)

    def forward(self, features, context):
        shared = self.trunk(features)
        return {"classes": self.classes(torch.cat([shared, context], 1)), "angle": self.angle(shared)}


def many_tasks():
    return seeded(_ManyTasks)


def distilled():
    """A student that was trained on a teacher's outputs: a smaller network, and nothing that needs lowering."""
    teacher, student = seeded(Mlp, 64), seeded(Mlp, 16)
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        functional.mse_loss(student(features()), teacher(features()).detach()).backward()
        optimizer.step()
    return student.eval()


CONTEXT = {**FEATURES, "context": ("batch", 12)}
# Name in the table → (maker, inputs).
KINDS = {
    "pruning masks": (masks, FEATURES),
    "pruning masks, large": (lambda: masks(LARGE), FEATURES),
    "pruning masks in a CNN": (masks_in_a_cnn, IMAGE),
    "structured masks": (structured_masks, IMAGE),
    "torch.ao.pruning": (ao_pruning, FEATURES),
    "torch.ao.pruning, large": (lambda: ao_pruning(LARGE), FEATURES),
    "weight_norm": (weight_norm, FEATURES),
    "weight_norm, large": (lambda: weight_norm(LARGE), FEATURES),
    "any parametrization, large": (lambda: any_parametrization(LARGE), FEATURES),
    "baked sparsity": (baked_sparsity, FEATURES),
    "2:4 sparsity": (two_of_four, FEATURES),
    "2:4 sparsity, large": (lambda: two_of_four(LARGE), FEATURES),
    "channels removed": (odd_channels, IMAGE),
    "low rank, parametrization": (low_rank_parametrization, FEATURES),
    "low rank, parametrization, large": (lambda: low_rank_parametrization(LARGE), FEATURES),
    "low rank in forward": (low_rank_in_forward, FEATURES),
    "low rank in forward, large": (lambda: low_rank_in_forward(LARGE), FEATURES),
    "low rank, two layers": (low_rank_layers, FEATURES),
    "shared weights": (shared_weights, FEATURES),
    "shared weights, large": (lambda: shared_weights(LARGE), FEATURES),
    "dynamic int8, Linear": (dynamic_linear, FEATURES),
    "dynamic int8, Linear, large": (lambda: dynamic_linear(LARGE), FEATURES),
    "dynamic int8, LSTM": (dynamic_lstm, SEQUENCE),
    "dynamic float16, Linear": (dynamic_float16, FEATURES),
    "eager PTQ, converted": (eager_static, IMAGE),
    "eager QAT, prepared": (eager_qat_prepared, IMAGE),
    "eager QAT, converted": (eager_qat, IMAGE),
    "FX PTQ, converted": (fx_static, IMAGE),
    "FX QAT, prepared": (fx_qat_prepared, IMAGE),
    "FX QAT, converted": (fx_qat, IMAGE),
    "PT2E PTQ, XNNPACK": (pt2e_xnnpack, IMAGE),
    "PT2E QAT, XNNPACK": (pt2e_xnnpack_qat, IMAGE),
    "PT2E PTQ, X86": (pt2e_x86, IMAGE),
    "PT2E PTQ, Arm": (pt2e_arm, IMAGE),
    "torchao int8 weight-only": (weight_only_int8, FEATURES),
    "torchao int8 weight-only, large": (lambda: weight_only_int8(LARGE), FEATURES),
    "torchao int4 weight-only": (weight_only_int4, FEATURES),
    "torchao int4 weight-only, large": (lambda: weight_only_int4(LARGE), FEATURES),
    "torchao int8 dynamic activations": (int8_dynamic_activations, FEATURES),
    "torchao int8 dynamic activations, large": (lambda: int8_dynamic_activations(LARGE), FEATURES),
    "torchao 8da4w": (int8_activations_int4_weights, FEATURES),
    "torchao 8da4w, large": (lambda: int8_activations_int4_weights(LARGE), FEATURES),
    "torchao float8 weight-only": (float8_weights, FEATURES),
    "float16": (half, IMAGE),
    "bfloat16": (brain_float, IMAGE),
    "bfloat16 autocast": (autocast, IMAGE),
    "distilled student": (distilled, FEATURES),
    "multi-task, two inputs, dictionary": (many_tasks, CONTEXT),
}


def make(name):
    """Return a new module of a kind; what torch warns about its own future is not repeated."""
    # Whoever quantized before may have left another engine, and not every engine has every packed form.
    if "x86" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "x86"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return copy.copy(KINDS[name][0]())


def slug(name):
    """Return a kind's name as an identifier: `tests.kinds:<slug>` is its model reference."""
    return "".join(letter if letter.isalnum() else "_" for letter in name).lower()


def __getattr__(name):
    for kind in KINDS:
        if slug(kind) == name:
            return lambda: make(kind)
    raise AttributeError(name)
