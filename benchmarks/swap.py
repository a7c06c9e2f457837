"""Overhead of a swapped call site: a training step with each activation replaced by itself.

    python benchmarks/swap.py

On two threads of the CPU. Each model and a copy whose activations went through `replace_activations` are timed in
turn; ratios are medians over the pairs.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

from lightning_noisy import activation_sites, replace_activations

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from patterns import Inception, ResNet


def step(model: nn.Module, x: Tensor) -> float:
    """Seconds of a forward and a backward pass."""
    start = perf_counter()
    model(x).square().mean().backward()
    return perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41, help="number of rounds (default: 41)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(2)
    images = torch.randn(16, 3, 32, 32)
    layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
    models = {
        "ResNet-18-like, one ReLU a block": (ResNet(16), images),
        "Inception-like, 94 calls of functions": (Inception(16), images),
        "Transformer, 4 layers": (nn.TransformerEncoder(layer, 4), torch.randn(16, 64, 64)),
    }
    print(f"{'step, ms':<40}{'sites':>6}{'original':>10}{'swapped':>9}{'ratio':>7}")
    for name, (model, x) in models.items():
        sites = len(activation_sites(model, x))
        swapped = copy.deepcopy(model)
        everything = {"gates": True, "outputs": True, "after_residual": True}
        replace_activations(swapped, lambda site: copy.deepcopy(site.module), example_inputs=x, **everything)
        pairs = []
        for index in range(rounds + 3):
            order = (model, swapped) if index % 2 else (swapped, model)
            seconds = {id(each): step(each, x) for each in order}
            pairs.append((seconds[id(model)], seconds[id(swapped)]))
        pairs = pairs[3:]
        before, after = (1e3 * median(column) for column in zip(*pairs, strict=True))
        ratio = median(b / a for a, b in pairs)
        print(f"{name:<40}{sites:>6}{before:>10.1f}{after:>9.1f}{ratio:>7.3f}", flush=True)


if __name__ == "__main__":
    main()
