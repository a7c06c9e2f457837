"""A training step of recurrent layers with gates of modules, over that of torch's kernels, measured in turn in one run.

    python benchmarks/recurrent.py

On the CPU, two threads: forward and backward pass of one layer, steps T, batch B, hidden units and inputs H. The
readable loop is that of ``functional.recurrent``, which autograd differentiates. Kept are bytes for the backward pass,
beside the noise.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_noisy.functional.recurrent import lstm
from lightning_noisy.nn import NoisyGRU, NoisyLSTM, recurrent

SHAPES = ((64, 32, 128), (100, 64, 256))
LAYERS: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]] = {
    "LSTM, plain gates": (
        lambda size: NoisyLSTM(size, size, gate="sigmoid", activation="tanh"),
        lambda size: nn.LSTM(size, size),
    ),
    "LSTM, NAH gates": (lambda size: NoisyLSTM(size, size, gate="nah"), lambda size: nn.LSTM(size, size)),
    "GRU, NAH gates": (lambda size: NoisyGRU(size, size, gate="nah"), lambda size: nn.GRU(size, size)),
}


def step_of(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward pass."""

    def step() -> None:
        layer.zero_grad()
        output, _ = layer(x)
        output.sum().backward()

    return step


def times(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in turn."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):  # the first ones warm up
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn > 1:
                found[name].append(time.perf_counter() - start)
    return found


def kept(layer: nn.Module, x: Tensor) -> int:
    """Bytes that are kept for the backward pass, beside parameters and inputs."""
    known = {each.untyped_storage().data_ptr() for each in (*layer.parameters(), x)}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = layer(x)
        total = sum(storages.values())
    del output
    return total


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="number of rounds (default: 15)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(2)
    torch.manual_seed(0)
    print(f"{'T, B, H':<16}{'':<20}{'torch':>10}{'ours':>8}{'loop':>8}{'kept':>10}{'kept by loop':>14}")
    for length, batch, size in SHAPES:
        x = torch.randn(length, batch, size)
        for name, (ours, torchs) in LAYERS.items():
            layer, readable, plain = ours(size), ours(size), torchs(size)
            loop = _without_kernel(step_of(readable, x))
            found = times({"plain": step_of(plain, x), "ours": step_of(layer, x), "loop": loop}, rounds)
            over = {
                each: statistics.median(a / b for a, b in zip(found[each], found["plain"], strict=True))
                for each in ("ours", "loop")
            }
            sizes = kept(layer, x), _without_kernel(lambda layer=readable, x=x: kept(layer, x))()
            print(
                f"{length}, {batch}, {size}".ljust(16)
                + f"{name:<20}{statistics.median(found['plain']) * 1e3:>7.1f} ms"
                + f"{over['ours']:>8.2f}{over['loop']:>8.2f}"
                + "".join(f"{each / 2**20:>{width}.1f} MiB" for each, width in zip(sizes, (6, 10), strict=True))
            )
    print("\nSteps of NoisyLSTM with NAH gates, B 16, H 64:")
    layer = NoisyLSTM(64, 64, gate="nah")
    lengths = (250, 500, 1000, 2000)
    runs = {str(length): step_of(layer, torch.randn(length, 16, 64)) for length in lengths}
    found = times(runs, 5)
    for length in lengths:
        print(f"T {length:>5}: {statistics.median(found[str(length)]) / length * 1e6:.0f} µs a time step")


def _without_kernel(function: Callable[[], Any]) -> Callable[[], Any]:
    """The same with the readable loop in place of the kernel."""

    def loop(
        of_input: Tensor, state: Any, weight_hh: Tensor, weight_hr: Any, sides: Any, sizes: Any, **options: Any
    ) -> Any:
        return lstm(of_input, state, weight_hh, weight_hr, tuple(recurrent._ready(sides)), sizes)

    def run() -> Any:
        kernel = recurrent.lstm_sequence
        recurrent.lstm_sequence = loop
        try:
            return function()
        finally:
            recurrent.lstm_sequence = kernel

    return run


if __name__ == "__main__":
    main()
