"""The demo's network: a residual CNN for Fashion-MNIST, dense and with channels removed.

Loaded only by reference (``edgedeploy.demo.model:dense``), so torch is imported at the top.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

CLASS_COUNT = 10


@dataclass(frozen=True, slots=True)
class Widths:
    """The channel counts that make one network; channels that a residual sum couples share a number.

    Attributes:
        outer: channels leaving each stage. The stem's equal outer[0], because stage 0 adds its input unchanged.
        inner: channels between the two convolutions of each stage's block.
    """

    outer: tuple[int, int, int]
    inner: tuple[int, int, int]


DENSE_WIDTHS = Widths(outer=(24, 48, 96), inner=(24, 48, 96))

# Chosen by edgedeploy.demo.train: least Taylor importance for each MAC saved, until half of the dense MACs are gone.
PRUNED_WIDTHS = Widths(outer=(23, 47, 49), inner=(16, 28, 38))


class ConvNorm(nn.Module):
    """A bias-free convolution, padded to keep its size at stride 1, and its batch normalisation."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int = 1) -> None:
        """Build the pair.

        Args:
            inputs: input channels.
            outputs: output channels.
            kernel: odd side of the square kernel.
            stride: step in both directions.
        """
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, features: Tensor) -> Tensor:
        """Convolve and normalise features of shape (N, inputs, H, W)."""
        convolved: Tensor = self.conv(features)
        normed: Tensor = self.norm(convolved)
        return normed


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: the input itself, or a strided 1x1 projection of it."""

    def __init__(self, inputs: int, inner: int, outputs: int, *, stride: int) -> None:
        """Build the block.

        Args:
            inputs: input channels; equal to outputs when stride is 1.
            inner: channels between the two convolutions.
            outputs: output channels.
            stride: of the first convolution and of the shortcut; 1 makes the shortcut the identity.
        """
        super().__init__()
        self.first = ConvNorm(inputs, inner, kernel=3, stride=stride)
        self.second = ConvNorm(inner, outputs, kernel=3)
        self.shortcut = nn.Identity() if stride == 1 else ConvNorm(inputs, outputs, kernel=1, stride=stride)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, ceil(H / stride), ceil(W / stride))."""
        branch: Tensor = self.second(functional.relu(self.first(features)))
        kept: Tensor = self.shortcut(features)
        return functional.relu(branch + kept)


class ResidualNet(nn.Module):
    """A ResNet-8: a stem of stride 2, three stages of one residual block, global average pool, linear head."""

    def __init__(self, widths: Widths) -> None:
        """Build the network with torch's default initialisation.

        Args:
            widths: the channel counts.
        """
        super().__init__()
        first, second, third = widths.outer
        self.widths = widths
        self.stem = ConvNorm(1, first, kernel=3, stride=2)
        self.stages = nn.ModuleList(
            [
                ResidualBlock(first, widths.inner[0], first, stride=1),
                ResidualBlock(first, widths.inner[1], second, stride=2),
                ResidualBlock(second, widths.inner[2], third, stride=2),
            ]
        )
        self.head = nn.Linear(third, CLASS_COUNT)

    def forward(self, image: Tensor) -> Tensor:
        """Return the class scores before softmax.

        Args:
            image: float32, shape (N, 1, 28, 28), normalised before it comes here:
                (pixel / 255 - 0.2860) / 0.3530 for pixels 0..255.

        Returns:
            logits, shape (N, 10), in Fashion-MNIST's label order.
        """
        features: Tensor = functional.relu(self.stem(image))
        for stage in self.stages:
            features = stage(features)
        pooled = functional.adaptive_avg_pool2d(features, 1).flatten(1)
        logits: Tensor = self.head(pooled)
        return logits


def count_macs(widths: Widths) -> int:
    """Return the multiply-accumulates of one image through the convolutions and the head.

    Batch normalisation is left out: a deployed network has it folded into the convolutions.
    """
    first, second, third = widths.outer
    inner_first, inner_second, inner_third = widths.inner
    # 28x28 images: the stem and stage 0 work on 14x14, stage 1 on 7x7, stage 2 on 4x4.
    stem = 14 * 14 * 9 * first
    stage_0 = 14 * 14 * 9 * 2 * first * inner_first
    stage_1 = 7 * 7 * (9 * inner_second * (first + second) + first * second)
    stage_2 = 4 * 4 * (9 * inner_third * (second + third) + second * third)
    return stem + stage_0 + stage_1 + stage_2 + third * CLASS_COUNT


def dense() -> nn.Module:
    """Return the unpruned network with untrained weights; ``dense.safetensors`` fits it."""
    return ResidualNet(DENSE_WIDTHS)


def pruned() -> nn.Module:
    """Return the network without the pruned channels, with untrained weights; ``pruned.safetensors`` fits it."""
    return ResidualNet(PRUNED_WIDTHS)
