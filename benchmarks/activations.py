"""Time of the activations' forward and backward pass, compared with the usual alternatives.

    python benchmarks/activations.py

On a batch of shape (128, 64, 32, 32) with two threads on the CPU; medians of rounds that call the functions
of a line in turn; ratios are those of the medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from timing import medians
from torch import Tensor, nn

from lightning_noisy.nn import NAH, NReLU, NSwish

SHAPE = (128, 64, 32, 32)


def training(function: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Callable[[], None]:
    """A forward and a backward pass."""
    leaf = x.clone().requires_grad_()

    def run() -> None:
        leaf.grad = None
        function(leaf).backward(gradient)

    return run


def batch_norm(activation: nn.Module) -> nn.Module:
    """Batch normalization and an activation, the usual pair."""
    return nn.Sequential(nn.BatchNorm2d(SHAPE[1], affine=False), activation)


def drawing(x: Tensor) -> Tensor:
    """The minimum for noise and a hard tanh: draw the numbers, and clip."""
    torch.randn(x.shape)
    return nn.functional.hardtanh(x)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="number of rounds (default: 15)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(2)
    x, gradient = torch.randn(SHAPE), torch.randn(SHAPE)
    pairs = {
        "NSwish / batch norm and SiLU": (NSwish(), batch_norm(nn.SiLU())),
        "NReLU / batch norm and ReLU": (NReLU(), batch_norm(nn.ReLU())),
        "NSwish / SiLU": (NSwish(), nn.SiLU()),
        "NReLU / ReLU": (NReLU(), nn.ReLU()),
        "NSwish(stride=8) / SiLU": (NSwish(stride=8), nn.SiLU()),
        "NReLU(stride=8) / ReLU": (NReLU(stride=8), nn.ReLU()),
        "NAH / randn and hard tanh": (NAH(), drawing),
        "compiled: NSwish / batch norm and SiLU": (torch.compile(NSwish()), torch.compile(batch_norm(nn.SiLU()))),
        "compiled: NReLU / batch norm and ReLU": (torch.compile(NReLU()), torch.compile(batch_norm(nn.ReLU()))),
        "compiled: NAH / randn and hard tanh": (torch.compile(NAH()), drawing),
    }
    print(f"{'training, ms':<42}{'ours':>8}{'peer':>8}{'ratio':>8}")
    for name, functions in pairs.items():
        ours, peer = (1e3 * t for t in medians(*(training(f, x, gradient) for f in functions), rounds=rounds))
        print(f"{name:<42}{ours:>8.1f}{peer:>8.1f}{ours / peer:>8.2f}", flush=True)
    evaluated = NAH().eval()
    with torch.no_grad():
        times = medians(lambda: evaluated(x), lambda: nn.functional.hardtanh(x), rounds=rounds)
    ours, peer = (1e3 * seconds for seconds in times)
    print(f"{'evaluation: NAH / hard tanh':<42}{ours:>8.1f}{peer:>8.1f}{ours / peer:>8.2f}")


if __name__ == "__main__":
    main()
