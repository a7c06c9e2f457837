"""Time of the activations, compared with the usual alternatives, at the sizes of layers.

    python benchmarks/activations.py --threads 2

Forward and backward pass: normalized activations against a norm without parameters (batch norm; layer norm for three
dimensions) and the plain activation, noisy ones against drawing normal numbers and the hard tanh. Evaluation: against
the plain activation, and the hard tanh. Ratios of the medians of rounds that call both in turn, on the CPU; a star
marks those above the bar that is given at the head of the column.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from timing import medians
from torch import Tensor, nn

from lightning_noisy.nn import NAH, NAN, NReLU, NSwish

SHAPES = [
    (64, 128),
    (64, 512),
    (256, 512),
    (32, 64, 256),
    (8, 16, 768),
    (64, 32, 16, 16),
    (128, 64, 32, 32),
]
COLUMNS = ["NSwish", "NReLU", "NAH", "NAN"]
BARS = {"training": (1.0, 1.0, 1.3, 1.3), "evaluation": (1.3, 1.3, 2.0, 2.0)}


def norm(shape: tuple[int, ...]) -> nn.Module:
    """A norm without parameters."""
    if len(shape) == 3:
        return nn.LayerNorm(shape[-1], elementwise_affine=False)
    return {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](shape[1], affine=False)


def drawing(x: Tensor) -> Tensor:
    """The minimum for noise and a hard tanh: draw the numbers, and clip."""
    torch.randn(x.shape)
    return nn.functional.hardtanh(x)


def training(function: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor, times: int) -> Callable[[], None]:
    """Forward and backward passes."""
    leaf = x.clone().requires_grad_()

    def run() -> None:
        for _ in range(times):
            leaf.grad = None
            function(leaf).backward(gradient)

    return run


def evaluation(function: Callable[[Tensor], Tensor], x: Tensor, times: int) -> Callable[[], None]:
    """Forward passes without gradients."""

    def run() -> None:
        with torch.no_grad():
            for _ in range(times):
                function(x)

    return run


def ratios(shape: tuple[int, ...], mode: str, rounds: int) -> Iterator[float]:
    """Time over that of the alternative."""
    x, gradient = torch.randn(shape), torch.randn(shape)
    times = max(1, int(3e5 / x.numel()) * 10)
    pairs = [(NSwish(), nn.Sequential(norm(shape), nn.SiLU())), (NReLU(), nn.Sequential(norm(shape), nn.ReLU()))]
    pairs += [(NAH(), drawing), (NAN(), drawing)]
    if mode == "evaluation":
        pairs = [(NSwish(), nn.SiLU()), (NReLU(), nn.ReLU()), (NAH(), nn.Hardtanh()), (NAN(), nn.Hardtanh())]
    for ours, peer in pairs:
        if mode == "training":
            functions = (training(each, x, gradient, times) for each in (ours, peer))
        else:
            ours(x)
            functions = (evaluation(each, x, times) for each in (ours.eval(), peer))
        first, second = medians(*functions, rounds=rounds)
        yield first / second


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="number of rounds (default: 15)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for mode, bars in BARS.items():
        heads = (f"{name} ({bar})" for name, bar in zip(COLUMNS, bars, strict=True))
        print(f"{mode + f', {options.threads} threads':<24}", *(f"{head:>14}" for head in heads))
        for shape in SHAPES:
            found = list(ratios(shape, mode, options.rounds))
            cells = (f"{ratio:.2f}{'*' if ratio > bar else ' '}" for ratio, bar in zip(found, bars, strict=True))
            print(f"{shape!s:<24}", *(f"{cell:>14}" for cell in cells), flush=True)
        print()
    x = torch.randn(SHAPES[-1])
    print("compiled, forward and backward, of the last shape")
    for name, ours, peer in (
        ("NSwish", NSwish(), nn.Sequential(norm(SHAPES[-1]), nn.SiLU())),
        ("NAH", NAH(), drawing),
    ):
        compiled = (training(torch.compile(each), x, torch.randn(x.shape), 1) for each in (ours, peer))
        first, second = medians(*compiled, rounds=options.rounds)
        print(f"{name:<24} {first / second:.2f}")


if __name__ == "__main__":
    main()
