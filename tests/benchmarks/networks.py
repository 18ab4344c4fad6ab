"""Architectures as torchvision defines them, with its names in the state dict, so that its published weights load."""

import torch
from torch import nn
from torch.nn import functional


def _convolution(inputs, outputs, kernel, stride=1, groups=1):
    padding = (kernel - 1) // 2
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    )


class InvertedResidual(nn.Module):
    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        hidden = inputs * expansion
        self.has_sum = stride == 1 and inputs == outputs
        expand = [_convolution(inputs, hidden, 1)] if expansion != 1 else []
        self.conv = nn.Sequential(
            *expand,
            _convolution(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x):
        return x + self.conv(x) if self.has_sum else self.conv(x)


class MobileNetV2(nn.Module):
    """Sandler et al. 2018, table 2."""

    def __init__(self, classes=1000):
        super().__init__()
        layers, channels = [_convolution(3, 32, 3, 2)], 32
        for expansion, outputs, count, stride in (
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
        ):  # fmt: skip
            for index in range(count):
                layers.append(InvertedResidual(channels, outputs, stride if index == 0 else 1, expansion))
                channels = outputs
        self.features = nn.Sequential(*layers, _convolution(channels, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def _projection(inputs, outputs, stride):
    """Return what a residual sum needs where the shape changes."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.downsample = _projection(inputs, width, stride)

    def forward(self, x):
        inner = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        skip = x if self.downsample is None else self.downsample(x)
        return self.relu(inner + skip)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs, width, stride):
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.downsample = _projection(inputs, outputs, stride)

    def forward(self, x):
        inner = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        skip = x if self.downsample is None else self.downsample(x)
        return self.relu(self.bn3(self.conv3(inner)) + skip)


class ResidualNetwork(nn.Module):
    """He et al. 2016, table 1, or a share of its channels; the stride is in the 3x3 convolution, as in torchvision."""

    def __init__(self, block, counts, *, classes=1000, share=1.0):
        super().__init__()
        stem, *widths = (round(share * width) for width in (64, 64, 128, 256, 512))
        self.conv1, self.bn1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False), nn.BatchNorm2d(stem)
        self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        channels = stem
        for number, (width, count) in enumerate(zip(widths, counts, strict=True), 1):
            blocks = []
            for index in range(count):
                blocks.append(block(channels, width, 2 if index == 0 and number > 1 else 1))
                channels = block.expansion * width
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def resnet50(share=1.0):
    """Return ResNet-50 with random weights, a share of its channels, and batch norms that fold into something that is not trivial."""
    torch.manual_seed(0)
    return _with_random_statistics(ResidualNetwork(Bottleneck, (3, 4, 6, 3), share=share))


def resnet18():
    """Return ResNet-18, made likewise."""
    torch.manual_seed(0)
    return _with_random_statistics(ResidualNetwork(BasicBlock, (2, 2, 2, 2)))


def _with_random_statistics(module):
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-0.2, 0.2)
            part.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(part.weight, 0.3, 0.7)
    return module.eval()


class KeywordSpotter(nn.Module):
    """DS-CNN for keyword spotting, as in MLPerf Tiny: Zhang et al. 2017, "Hello Edge", small; 49 frames of 10 cepstra."""

    def __init__(self, classes=12, channels=64, blocks=4):
        super().__init__()
        layers = [
            nn.Conv2d(1, channels, (10, 4), 2, (5, 1), bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Dropout(0.2),
        ]
        for _ in range(blocks):
            layers += [
                nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            ]
        self.features, self.classifier = nn.Sequential(*layers, nn.Dropout(0.4)), nn.Linear(channels, classes)

    def forward(self, cepstra):
        return self.classifier(self.features(cepstra).mean((2, 3)))


class SpeakerLSTM(nn.Module):
    """One LSTM over 29 frames of 12 cepstra; its mean state says which of nine people spoke."""

    def __init__(self, classes=9, inputs=12, width=64):
        super().__init__()
        self.lstm, self.classifier = nn.LSTM(inputs, width, batch_first=True), nn.Linear(width, classes)

    def forward(self, frames):
        states, _ = self.lstm(frames)
        return self.classifier(states.mean(1))


class EncoderLayer(nn.Module):
    """A pre-norm layer of a transformer encoder (Vaswani et al. 2017; norms first as in Xiong et al. 2020)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.joined = nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def _by_head(self, x):
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x):
        inner = self.norm1(x)
        parts = (self._by_head(part(inner)) for part in (self.query, self.key, self.value))
        attended = functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        x = x + self.joined(attended)
        return x + self.narrow(functional.gelu(self.wide(self.norm2(x))))


class SpeakerEncoder(nn.Module):
    """A transformer encoder over 29 frames of 12 cepstra: 4 layers of width 64; says which of nine people spoke."""

    def __init__(self, classes=9, inputs=12, frames=29, width=64, layers=4, heads=4):
        super().__init__()
        self.embedding = nn.Linear(inputs, width)
        self.position = nn.Parameter(0.02 * torch.randn(frames, width))
        self.layers = nn.Sequential(*(EncoderLayer(width, heads) for _ in range(layers)))
        self.norm, self.classifier = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, frames):
        return self.classifier(self.norm(self.layers(self.embedding(frames) + self.position)).mean(1))


def keyword_spotter():
    """Return an untrained DS-CNN."""
    return KeywordSpotter()


def speaker_lstm():
    """Return an untrained LSTM."""
    return SpeakerLSTM()


def speaker_encoder():
    """Return an untrained transformer encoder."""
    return SpeakerEncoder()
