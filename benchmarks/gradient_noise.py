"""The time and the memory of gradient noise, beside the loop that most people write.

    python benchmarks/gradient_noise.py

The peer is `for p in params: p.grad.add_(torch.randn_like(p.grad) * std)`. Times are medians of rounds in which both
have their turn, with two threads on the CPU; ratios are those of the medians.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from lightning_noisy.engine.noise_plan import NoisePlan, SharedAddresses, is_small

CASES = {
    "25 M elements in 60 tensors": [25_000_000 // 60] * 60,
    "1,000 tensors of 4,000": [4_000] * 1_000,
    "40,000 tensors of 100": [100] * 40_000,
    "ResNet-50-like, 161 tensors": [512 * 512 * 9, 1024 * 512, 2048, 2048, 256 * 64, 64, 64] * 23,
}


def parameters_of(sizes: list[int]) -> dict[str, nn.Parameter]:
    """Parameters with gradients of zeros, by name."""
    parameters = {f"layer{i}.weight": nn.Parameter(torch.zeros(size)) for i, size in enumerate(sizes)}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    return parameters


def plan_of(parameters: dict[str, nn.Parameter]) -> NoisePlan:
    """What `add_gradient_noise` makes at the first step."""
    addresses = SharedAddresses()
    addresses.extend({name: p.numel() for name, p in parameters.items() if is_small(p)})
    return NoisePlan(parameters, addresses)


def one_line(parameters: dict[str, nn.Parameter], std: float) -> None:
    """The peer."""
    for parameter in parameters.values():
        parameter.grad.add_(torch.randn_like(parameter.grad) * std)


def medians(*functions: Callable[[], object], rounds: int) -> list[float]:
    """Median times of functions that take turns; the first round warms up."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(rounds + 1):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if turn:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def peak_mib(elements: int) -> float:
    """Peak memory of the process that the noise adds to that of the gradients, in MiB."""
    parameters = parameters_of([elements // 10] * 10)
    plan_of(parameters_of([1000])).add_noise(1.0, (0,), 0)  # what importing and threads take is not the noise's
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan_of(parameters).add_noise(1.0, (0,), 0)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="times that each has its turn (default: 15)")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.peak:
        print(peak_mib(options.peak))
        return
    print(f"{'gradients':<30}{'one line':>12}{'noise plan':>12}{'ratio':>8}   ns per element")
    for name, sizes in CASES.items():
        parameters = parameters_of(sizes)
        plan = plan_of(parameters)
        peer, ours = medians(
            lambda p=parameters: one_line(p, 0.01),
            lambda p=plan: p.add_noise(0.01, (0,), 0),
            rounds=options.rounds,
        )
        print(f"{name:<30}{peer / sum(sizes) * 1e9:>12.2f}{ours / sum(sizes) * 1e9:>12.2f}{ours / peer:>8.2f}")
    half, whole = (plan_of(parameters_of([size] * 10)) for size in (2_500_000, 5_000_000))
    small, large = medians(
        lambda: half.add_noise(0.01, (0,), 0), lambda: whole.add_noise(0.01, (0,), 0), rounds=options.rounds
    )
    print(f"\n50 M elements / 25 M elements: {large / small:.2f} times as long")
    command = [sys.executable, __file__, "--peak", "100000000"]
    peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    print(f"Extra peak memory at 100 M elements: {float(peak):.1f} MiB")


if __name__ == "__main__":
    main()
