"""Time and memory of gradient noise, compared with the usual loop.

    python benchmarks/gradient_noise.py

The peer is `for p in params: p.grad.add_(torch.randn_like(p.grad) * std)`. Times are medians of rounds that call
both in turn, with two threads on the CPU; ratios are those of the medians.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from timing import medians
from torch import nn

from lightning_noisy import add_gradient_noise
from lightning_noisy.gradient_noise.plan import NoisePlan
from lightning_noisy.schedules import Constant

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


class Nothing(torch.optim.Optimizer):
    """An optimizer that does nothing, so that its step takes the time of the noise."""

    def __init__(self, params: Iterable[tuple[str, nn.Parameter]]) -> None:
        super().__init__(params, {})

    def step(self, closure: None = None) -> None:
        """Do nothing."""


def one_line(parameters: dict[str, nn.Parameter], std: float) -> None:
    """The usual loop."""
    for parameter in parameters.values():
        parameter.grad.add_(torch.randn_like(parameter.grad) * std)


def peak_mib() -> float:
    """Peak memory of this process so far, in MiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def measure(case: str, rounds: int) -> dict[str, float]:
    """Measure one case, in a process of its own: the speed of torch's allocator depends on earlier allocations."""
    torch.set_num_threads(2)
    if case in CASES:
        parameters = parameters_of(CASES[case])
        optimizer = Nothing(parameters.items())
        add_gradient_noise(optimizer, Constant(0.01))
        functions = (lambda: one_line(parameters, 0.01), optimizer.step)
        peer, ours = medians(*functions, rounds=rounds)
        return {"peer": peer, "ours": ours}
    if case == "linear":
        half, whole = (NoisePlan(parameters_of([size] * 10)) for size in (2_500_000, 5_000_000))
        functions = (lambda: half.add_noise([0.01], (0,), 0), lambda: whole.add_noise([0.01], (0,), 0))
        small, large = medians(*functions, rounds=rounds)
        return {"ratio": large / small}
    if case == "shards":
        # The share of one of n processes in 25 M elements in 60 tensors: a shard that starts in the middle.
        plans = []
        for n in (1, 2, 4):
            size = 25_000_000 // 60 // n
            parameters = parameters_of([size] * 60)
            plans.append(NoisePlan(parameters, shards=dict.fromkeys(parameters.values(), n // 2 * size)))
        whole, *parts = medians(*(partial(plan.add_noise, [0.01], (0,), 0) for plan in plans), rounds=rounds)
        return {str(n): n * part / whole for n, part in zip((2, 4), parts, strict=True)}
    parameters = parameters_of([10_000_000] * 10)
    for parameter in parameters.values():
        parameter.grad.fill_(0.0)
    NoisePlan(parameters_of([1 << 20])).add_noise([1.0], (0,), 0)  # excludes the memory of torch's threads
    before = peak_mib()
    NoisePlan(parameters).add_noise([1.0], (0,), 0)
    return {"MiB": peak_mib() - before}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="number of rounds (default: 15)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.rounds)))
        return

    def apart(case: str) -> dict[str, float]:
        command = [sys.executable, __file__, "--case", case, "--rounds", str(options.rounds)]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    print(f"{'ns per element':<30}{'one line':>12}{'ours':>12}{'ratio':>8}")
    for name, sizes in CASES.items():
        taken = {who: seconds / sum(sizes) * 1e9 for who, seconds in apart(name).items()}
        print(f"{name:<30}{taken['peer']:>12.2f}{taken['ours']:>12.2f}{taken['ours'] / taken['peer']:>8.2f}")
    print(f"\n50 M elements take {apart('linear')['ratio']:.2f} times as long as 25 M.")
    print("n times the time of one of n shards, over the time of the whole:", apart("shards"))
    print(f"Extra peak memory at 100 M elements: {apart('memory')['MiB']:.1f} MiB")


if __name__ == "__main__":
    main()
