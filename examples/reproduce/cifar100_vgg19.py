"""Table 2 of Yuan et al., "ANAct: Adaptive Normalization for Activation Functions": VGG19 with batch norm on CIFAR-100.

    python examples/reproduce/cifar100_vgg19.py --data cifar-100-python --devices 4 --strategy ddp

Written for GPUs, and not run in full. As in the paper, the top three activations stay as they are, and batch norms
before normalized ones have no affine part.
"""

from __future__ import annotations

from cifar100 import CLASSES, main
from torch import nn


def vgg19() -> nn.Sequential:
    """Sixteen convolutions and three linear layers, for images of 32 x 32."""
    layers: list[nn.Module] = []
    inputs = 3
    for width, count in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for _ in range(count):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    for _ in range(2):
        layers += [nn.Dropout(0.5), nn.Linear(512, 512), nn.ReLU()]
    layers.insert(-6, nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(512, CLASSES))


if __name__ == "__main__":
    main(__doc__, vgg19, keep_last=3, batchnorm_affine="strip")
