"""What the monitor costs, as ratios of times that are measured in turn in one run.

    python benchmarks/monitor.py

Three networks in training steps on the CPU, batch 64, two threads; scalars go to a TensorBoard writer. The peers record
at the same steps: composer's ActivationMonitor as its documentation describes it (norm, mean, skewness and kurtosis of
the output of each activation, each by `.item()`), and a hook of the usual kind (mean, deviation, share of zeros).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from lightning_noisy import ActivationMonitor
from lightning_noisy.monitoring.recorder import ActivationRecorder
from lightning_noisy.monitoring.tensorboard import add_scalars

ACTIVATIONS = (nn.ReLU, nn.GELU)


class Block(nn.Module):
    """A residual block of two convolutions, as in ResNet-18."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = outputs // inputs
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)])
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()
        self.act, self.last_act = nn.ReLU(inplace=True), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norms[0](self.first(x)))
        return self.last_act(self.norms[1](self.second(y)) + self.skip(x))


def resnet() -> tuple[nn.Module, Tensor]:
    """ResNet-18's layers on images of 32 x 32: 17 ReLUs."""
    widths = [64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [Block(first, second) for first, second in zip([64, *widths], widths, strict=False)]
    stem = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)
    return nn.Sequential(*stem, *blocks, *head), torch.randn(64, 3, 32, 32)


class Encoder(nn.Module):
    """Four pre-norm Transformer layers of width 128 on 64 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(128, 4, 512, 0.0, nn.GELU(), batch_first=True, norm_first=True) for _ in range(4)
        )
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def transformer() -> tuple[nn.Module, Tensor]:
    """Four Transformer layers: 4 GELUs."""
    return Encoder(), torch.randn(64, 64, 128)


def perceptron(depth: int = 6) -> tuple[nn.Module, Tensor]:
    """Six layers of 512 units: 6 ReLUs."""
    layers = [layer for _ in range(depth) for layer in (nn.Linear(512, 512), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(512, 10)), torch.randn(64, 512)


def step_of(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """A training step with SGD."""
    y = torch.randint(10, (64,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


class Logs:
    """Scalars of a step, written as a logger does."""

    def __init__(self, *, at_once: bool = False) -> None:
        self.writer, self.step, self.at_once = SummaryWriter(tempfile.mkdtemp()), 0, at_once

    def write(self, values: dict[str, float]) -> None:
        """One by one, as Lightning's loggers do, or as the monitor does."""
        self.step += 1
        if self.at_once:
            add_scalars(self.writer, values, self.step)
            return
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, self.step)


def ours(model: nn.Module) -> Callable[[Callable[[], None]], None]:
    """The recorder, as the callback uses it in a step that is logged."""
    recorder, logs = ActivationRecorder(model), Logs(at_once=True)

    def run(step: Callable[[], None]) -> None:
        with recorder:
            step()
        values = recorder.compute()
        recorder.reset()
        logs.write(values)

    return run


def with_hooks(
    model: nn.Module, measure: Callable[[str, Tensor], dict[str, float]]
) -> Callable[[Callable[[], None]], None]:
    """Forward hooks on the activations of a step."""
    logs = Logs()
    named = [(name, each) for name, each in model.named_modules() if isinstance(each, ACTIVATIONS)]

    def run(step: Callable[[], None]) -> None:
        values: dict[str, float] = {}

        def hook(name: str) -> Callable[..., None]:
            return lambda module, args, output: values.update(measure(name, output.detach()))

        handles = [module.register_forward_hook(hook(name)) for name, module in named]
        step()
        for handle in handles:
            handle.remove()
        logs.write(values)

    return run


def composer_like(name: str, output: Tensor) -> dict[str, float]:
    """Norm, mean, skewness and kurtosis."""
    mean = output.mean(dim=-1, keepdim=True)
    difference = output - mean
    z = difference / difference.pow(2).mean(dim=-1, keepdim=True).sqrt()
    return {
        f"activations/l2_norm/{name}": torch.linalg.vector_norm(output).item(),
        f"activations/average/{name}": output.mean().item(),
        f"activations/skewness/{name}": z.pow(3).mean().item(),
        f"activations/kurtosis/{name}": z.pow(4).mean().item(),
    }


def plain_hook(name: str, output: Tensor) -> dict[str, float]:
    """Mean, deviation and share of zeros."""
    return {
        f"mean/{name}": output.mean().item(),
        f"std/{name}": output.std().item(),
        f"zeros/{name}": (output == 0).float().mean().item(),
    }


def ratios(make: Callable[[], tuple[nn.Module, Tensor]], rounds: int, repeats: int) -> tuple[float, dict[str, float]]:
    """Milliseconds of the plain step; and the times of logged steps over it, as medians of ratios within rounds."""
    model, x = make()
    step = step_of(model, x)
    runs = {
        "monitor": ours(model),
        "composer": with_hooks(model, composer_like),
        "plain hook": with_hooks(model, plain_hook),
    }
    times: dict[str, list[float]] = {"plain": [], **{name: [] for name in runs}}
    for turn in range(rounds + 1):  # the first one warms up
        for name in times:
            start = time.perf_counter()
            for _ in range(repeats):
                step() if name == "plain" else runs[name](step)
            if turn:
                times[name].append((time.perf_counter() - start) / repeats)
    plain = times.pop("plain")
    found = {name: statistics.median(a / b for a, b in zip(each, plain, strict=True)) for name, each in times.items()}
    return statistics.median(plain) * 1e3, found


class Timed(ActivationMonitor):
    """The callback, with the time that it takes in steps that are not logged, and in those that are."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.spent: dict[bool, list[float]] = {True: [], False: []}
        self._start = 0.0

    @contextmanager
    def _timing(self) -> Any:
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def on_train_batch_start(self, *args: Any) -> None:
        self._start = 0.0
        with self._timing():
            super().on_train_batch_start(*args)

    def on_before_optimizer_step(self, *args: Any) -> None:
        with self._timing():
            super().on_before_optimizer_step(*args)

    def on_train_batch_end(self, *args: Any) -> None:
        is_logged = self._is_logging
        with self._timing():
            super().on_train_batch_end(*args)
        self.spent[is_logged].append(self._start)


class Module(L.LightningModule):
    """A model in a Trainer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def quiet_steps(make: Callable[[], tuple[nn.Module, Tensor]], steps: int = 60) -> float:
    """Seconds that the callback takes in a step that isn't logged."""
    model, x = make()
    data = [(x[:1], torch.zeros(1, dtype=torch.long))] * steps
    monitor = Timed()
    options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, logger=False, callbacks=[monitor], **options)
    trainer.fit(Module(model), DataLoader(data, batch_size=None))
    return statistics.median(monitor.spent[False])


def many_sites(sites: int) -> float:
    """Milliseconds to pool and compute what was recorded."""
    recorder = ActivationRecorder(
        nn.Sequential(*[layer for _ in range(sites) for layer in (nn.Linear(8, 8), nn.ReLU())])
    )
    with recorder:
        recorder._model(torch.randn(4, 8))
    times = []
    for _ in range(30):
        start = time.perf_counter()
        recorder.compute()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="number of rounds (default: 15)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(2)
    torch.manual_seed(0)
    print(
        f"{'':<14}{'plain step':>11}{'monitor':>9}{'composer':>12}{'plain hook':>12}{'not logged':>12}{'every 50':>10}"
    )
    for make, repeats in ((resnet, 1), (transformer, 2), (perceptron, 20)):
        plain, found = ratios(make, rounds, repeats)
        quiet = 1 + quiet_steps(make) * 1e3 / plain
        epoch = (49 * quiet + found["monitor"]) / 50
        print(
            f"{make.__name__:<14}{plain:>8.1f} ms{found['monitor']:>9.3f}{found['composer']:>12.3f}"
            f"{found['plain hook']:>12.3f}{quiet:>12.4f}{epoch:>10.4f}"
        )
    few, many = many_sites(20), many_sites(200)
    print(f"Pooling and computing 20 sites: {few:.2f} ms, 200 sites: {many:.2f} ms, {many / few:.2f} times as long.")


if __name__ == "__main__":
    main()
