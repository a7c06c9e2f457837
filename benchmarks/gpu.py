"""Time of noise and activations on a GPU, as ratios to the usual alternatives in the same run.

    python benchmarks/gpu.py

Noise on gradients against the one-line loop, against `torch.randn` into one buffer of all elements, and as a share of
the bandwidth that a copy of as many bytes reaches; NSwish against batch norm and SiLU; NAH against drawing normal
numbers and the hard tanh; eager and compiled. Medians of rounds that call both in turn, timed by CUDA's events.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_noisy.gradient_noise.plan import NoisePlan
from lightning_noisy.nn import NAH, NSwish

CASES = {
    "25 M elements in 60 tensors": [25_000_000 // 60] * 60,
    "1,000 tensors of 4,000": [4_000] * 1_000,
    "40,000 tensors of 100": [100] * 40_000,
    "1 B elements in 100 tensors": [10_000_000] * 100,
}
SHAPES = [(64, 512), (32, 64, 256), (128, 64, 32, 32), (64, 1024, 1024)]


def milliseconds(*functions: Callable[[], object], rounds: int) -> list[float]:
    """Median times; the first rounds warm up."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(rounds + 3):
        for function, taken in zip(functions, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            if turn >= 3:
                taken.append(start.elapsed_time(end))
    return [statistics.median(taken) for taken in times]


def noise(sizes: list[int], dtype: torch.dtype, rounds: int) -> list[float]:
    """Our time over that of the loop, over that of drawing, and the share of the bandwidth."""
    parameters = {f"p{i}": nn.Parameter(torch.zeros(size, dtype=dtype, device="cuda")) for i, size in enumerate(sizes)}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    plan, step = NoisePlan(parameters), iter(range(10**9))
    buffer = torch.empty(sum(sizes), dtype=dtype, device="cuda")
    other = torch.empty_like(buffer)

    def loop() -> None:
        for parameter in parameters.values():
            parameter.grad.add_(torch.randn_like(parameter.grad) * 0.01)

    ours, peer, draw, copy = milliseconds(
        lambda: plan.add_noise([0.01], ("s",), next(step)),
        loop,
        buffer.normal_,
        lambda: other.copy_(buffer),  # reads and writes as many bytes
        rounds=rounds,
    )
    return [ours / peer, ours / draw, copy / ours]


def training(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """A forward and a backward pass."""
    leaf, gradient = x.clone().requires_grad_(), torch.randn_like(x)

    def run() -> None:
        leaf.grad = None
        function(leaf).backward(gradient)

    return run


def norm(shape: tuple[int, ...]) -> nn.Module:
    """Batch norm without parameters; for three dimensions layer norm."""
    if len(shape) == 3:
        return nn.LayerNorm(shape[-1], elementwise_affine=False)
    return {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](shape[1], affine=False)


def drawing(x: Tensor) -> Tensor:
    """The minimum for noise and a hard tanh."""
    torch.randn_like(x)
    return nn.functional.hardtanh(x)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="number of rounds (default: 15)")
    rounds = parser.parse_args().rounds
    if not torch.cuda.is_available():
        raise SystemExit("There is no GPU.")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print(f"{'gradient noise':<40}{'/ loop':>10}{'/ randn':>10}{'bandwidth':>12}")
    for dtype in (torch.float32, torch.bfloat16):
        for name, sizes in CASES.items():
            loop, draw, share = noise(sizes, dtype, rounds)
            print(f"{name + ', ' + str(dtype)[6:]:<40}{loop:>10.2f}{draw:>10.2f}{share:>12.0%}", flush=True)
    for kind, wrap in (("eager", lambda module: module), ("compiled", torch.compile)):
        print(f"\n{kind + ', forward and backward':<30}{'NSwish / norm and SiLU':>26}{'NAH / randn and hard tanh':>28}")
        for shape in SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.randn(shape, device="cuda", dtype=dtype)
                first, second, third, fourth = (
                    training(wrap(each), x)
                    for each in (NSwish().cuda(), nn.Sequential(norm(shape), nn.SiLU()).cuda(), NAH().cuda(), drawing)
                )
                a, b, c, d = milliseconds(first, second, third, fourth, rounds=rounds)
                print(f"{str(shape) + ' ' + str(dtype)[6:]:<30}{a / b:>26.2f}{c / d:>28.2f}", flush=True)


if __name__ == "__main__":
    main()
