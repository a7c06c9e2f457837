"""Cost of each part in a training step, as ratios of times that are measured in turn in one run.

    python benchmarks/step_cost.py

Two networks on the CPU, plain torch loops (no Trainer), so the ratios show the parts alone; the monitor has its own
benchmark. The baselines are the usual one-line gradient noise, and batch normalization without affine parameters before
the activation.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_noisy import add_gradient_noise, replace_activations
from lightning_noisy.schedules import InverseDecay


def perceptron(norm: bool = False) -> nn.Module:
    """Six hidden layers of 512 units."""
    layers: list[nn.Module] = []
    for fan_in in [784] + [512] * 5:
        layers += [nn.Linear(fan_in, 512)] + [nn.BatchNorm1d(512, affine=False)] * norm + [nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 10))


def convolutional(norm: bool = False) -> nn.Module:
    """Four convolutions of 32 channels on images of 28 x 28."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 28, 28))]
    for channels in (1, 32, 32, 32):
        layers += [nn.Conv2d(channels, 32, 3, padding=1)] + [nn.BatchNorm2d(32, affine=False)] * norm + [nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10))


def step_of(model: nn.Module, before_step: Callable[[nn.Module], None] = lambda model: None) -> Callable[[], None]:
    """A training step with SGD; `before_step` runs between backward pass and update."""
    x = torch.rand(64, 784, generator=torch.Generator().manual_seed(0))
    y = torch.randint(10, (64,), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    model.optimizer = optimizer  # for `variants`

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        before_step(model)
        optimizer.step()

    return step


def one_line_noise(model: nn.Module) -> None:
    """The usual loop."""
    for parameter in model.parameters():
        gradient: Tensor = parameter.grad
        gradient.add_(torch.randn_like(gradient) * 0.01)


def variants(make: Callable[..., nn.Module]) -> dict[str, Callable[[], None]]:
    """The steps to compare, by name; times are divided by those of the first."""
    noisy = make()
    noisy_step = step_of(noisy)
    add_gradient_noise(noisy.optimizer, InverseDecay(), model=noisy)
    return {
        "plain": step_of(make()),
        "one-line noise: grad.add_(randn_like(grad) * std)": step_of(make(), one_line_noise),
        "GradientNoise": noisy_step,
        "BatchNorm(affine=False) before each activation": step_of(make(norm=True)),
        'replace_activations(model, "nrelu")': step_of(replace_activations(make(), "nrelu")),
        'replace_activations(model, "nsw")': step_of(replace_activations(make(), "nsw")),
        'replace_activations(model, "nah")': step_of(replace_activations(make(), "nah")),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="number of rounds (default: 20)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(2)
    table: dict[str, list[float]] = {}
    for make in (perceptron, convolutional):
        steps = variants(make)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(rounds + 1):  # the first one warms up
            for name, step in steps.items():
                start = time.perf_counter()
                for _ in range(10):
                    step()
                if turn:
                    times[name].append((time.perf_counter() - start) / 10)
        for name in steps:
            ratios = [a / b for a, b in zip(times[name], times["plain"], strict=True)]
            table.setdefault(name, []).append(statistics.median(ratios))
        print(f"{make.__name__}: {make.__doc__} Plain step: {statistics.median(times['plain']) * 1e3:.1f} ms.")
    print(f"\n{'time of a step / plain step':<52}{'perceptron':>12}{'convolutional':>15}")
    for name, (first, second) in table.items():
        print(f"{name:<52}{first:>12.2f}{second:>15.2f}")


if __name__ == "__main__":
    main()
