"""What the callbacks cost at sizes that don't fit here: rates and collectives that are measured, and what follows.

    python benchmarks/scale.py

Rates are those of this machine's CPU, with two threads. Collectives are counted in a Lightning run of two processes
with DDP (gloo), as the calls of torch.distributed beyond those of the run without the callback. What follows for larger
models is multiplication, not a measurement. Takes five minutes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.plugins.environments import LightningEnvironment
from timing import medians
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_noisy import ActivationMonitor, ActivationReplacement, GradientNoise, add_gradient_noise
from lightning_noisy.nn import NSwish
from lightning_noisy.schedules import Constant

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "all_gather_object", "reduce")
STEPS, LOG_EVERY = 12, 4
CALLBACKS: dict[str, Callable[[], list[L.Callback]]] = {
    "none": list,
    "GradientNoise": lambda: [GradientNoise(0.01)],
    'ActivationReplacement("nsw")': lambda: [ActivationReplacement("nsw")],
    'ActivationReplacement("nsw(synchronized=True)")': lambda: [ActivationReplacement("nsw(synchronized=True)")],
    "ActivationMonitor": lambda: [ActivationMonitor()],
}


class Network(L.LightningModule):
    """So many hidden layers."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        hidden = [layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.SiLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(width, 1))
        self.width, self.calls, self.by_step = width, [], []
        self.calls: list[int]  # bytes of each collective
        self.by_step: list[tuple[int, int]]  # how many, and bytes, of each step

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.by_step.append((len(self.calls), sum(self.calls)))

    def on_train_end(self) -> None:
        self.by_step.append((len(self.calls), sum(self.calls)))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.randn(STEPS * 2 * 4, self.width), batch_size=4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def size_of(arguments: tuple[Any, ...]) -> int:
    """Bytes of the largest tensor among the arguments of a collective."""
    flat = [each for argument in arguments for each in (argument if isinstance(argument, list) else [argument])]
    return max((each.numel() * each.element_size() for each in flat if isinstance(each, Tensor)), default=0)


def count(rank: int, name: str, layers: int, width: int, port: int, folder: str) -> None:
    """Train in one of two processes, and save how many collectives each step took."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_noisy").setLevel(logging.ERROR)
    torch.set_num_threads(1)

    class Environment(LightningEnvironment):
        """Processes that are there already."""

        creates_processes_externally = True

    environment = Environment()
    environment._main_port, environment._global_rank = port, rank
    environment.local_rank = lambda: rank  # type: ignore[method-assign]
    model = Network(layers, width)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            model.calls.append(size_of((*arguments, *options.values())))
            return function(*arguments, **options)

        return call

    for each in COLLECTIVES:
        setattr(dist, each, counted(getattr(dist, each)))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        plugins=[environment],
        max_epochs=1,
        log_every_n_steps=LOG_EVERY,
        callbacks=CALLBACKS[name](),
        logger=L.pytorch.loggers.TensorBoardLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model)
    if rank == 0:
        torch.save(model.by_step, Path(folder) / "counts")


def collectives(name: str, layers: int, width: int, port: int) -> list[tuple[int, int]]:
    """How many collectives, and bytes, of each step."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(count, (name, layers, width, port, folder), nprocs=2)  # type: ignore[no-untyped-call]
        totals = torch.load(Path(folder) / "counts")
    return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(totals)]


def rates(rounds: int) -> dict[str, float]:
    """Nanoseconds per element."""
    count = 25_000_000
    parameters = [nn.Parameter(torch.zeros(count // 60)) for _ in range(60)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    plain = torch.optim.SGD(parameters, lr=0.0)
    add_gradient_noise(optimizer, Constant(0.01))
    noisy, without = medians(optimizer.step, plain.step, rounds=rounds)
    x = torch.randn(128, 64, 32, 32, requires_grad=True)
    gradient = torch.randn_like(x)
    ours, silu = (
        lambda: NSwish()(x).backward(gradient),
        lambda: nn.functional.silu(x).backward(gradient),
    )
    normalized, activation = medians(ours, silu, rounds=rounds)
    return {
        "gradient noise, a parameter": (noisy - without) / count * 1e9,
        "NSwish beyond SiLU, an activation": (normalized - activation) / x.numel() * 1e9,
    }


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="of the times (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(2)
    print("Rates, ns per element:")
    measured = rates(options.rounds)
    for name, value in measured.items():
        print(f"  {name:<40}{value:>8.2f}")
    print("\nCollectives beyond those of the run without the callback, two processes:")
    print(f"  {'':<50}{'layers x units':>16}{'a step':>10}{'bytes':>10}{'a logged step':>16}{'bytes':>10}")
    port = 29_600
    for layers, width in ((4, 64), (64, 64), (4, 1024)):
        plain: list[tuple[int, int]] = []
        for name in CALLBACKS:
            port += 1
            found = collectives(name, layers, width, port)
            if name == "none":
                plain = found
                continue
            more = [(a[0] - b[0], a[1] - b[1]) for a, b in zip(found, plain, strict=True)]
            # The second log: the first one may take another collective, once.
            logged, others = more[2 * LOG_EVERY - 1], more[LOG_EVERY : 2 * LOG_EVERY - 1]
            usual = [round(statistics.mean(column)) for column in zip(*others, strict=True)]
            cells = f"{usual[0]:>10}{usual[1]:>10}{logged[0]:>16}{logged[1]:>10}"
            print(f"  {name:<50}{f'{layers} x {width}':>16}{cells}", flush=True)
    noise = measured["gradient noise, a parameter"]
    print("\nGradient noise at this rate, seconds a step (by multiplication):")
    for size in (10**9, 10**11):
        for processes in (1, 1000):
            each = size / processes * noise / 1e9
            print(f"  {size:.0e} parameters, sharded over {processes:>5} processes: {each:>12.4g}")


if __name__ == "__main__":
    main()
