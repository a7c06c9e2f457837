"""Table 4 of Yuan et al., "ANAct: Adaptive Normalization for Activation Functions": ResNet50 on CIFAR-100.

    python examples/reproduce/cifar100_resnet50.py --data cifar-100-python --devices 4 --strategy ddp

Written for GPUs, and not run in full. The activations after an addition stay as they are, as the paper says, and batch
norms before normalized ones have no affine part. The first convolution is the usual one for small images: 3 x 3,
without a stride or a pooling after it.
"""

from __future__ import annotations

from cifar100 import CLASSES, main
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """He et al.'s block of three convolutions and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.layers = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.last = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers(x) + self.shortcut(x))


def resnet50() -> nn.Sequential:
    """For images of 32 x 32."""
    blocks, inputs = [], 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for number in range(count):
            blocks.append(Bottleneck(inputs, width, stride if number == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *blocks,
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(inputs, CLASSES)),
    )


if __name__ == "__main__":
    main(__doc__, resnet50, batchnorm_affine="strip")
