"""Two networks that don't train, and what gets them going.

1. The rescue: ten ReLU layers whose weights all start at zero, trained with SGD, with and without
   `GradientNoise`.
2. The swap: twenty ReLU layers with Xavier's initialization, each of which passes on about half of the signal,
   unchanged and with `replace_activations(model, "nsw")`, both with `ActivationMonitor`.

Run it with `make demo`, or `python examples/quickstart.py --help` for the options.
"""

from __future__ import annotations

import argparse
import gzip
import logging
import math
import shutil
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_noisy import ActivationMonitor, GradientNoise, replace_activations

BATCH_SIZE = 128
RESCUE_STEPS, SWAP_STEPS = 4_000, 600


class Classifier(L.LightningModule):
    """A fully connected ReLU network of `depth` hidden layers; `init` fills the weights, the biases start at zero."""

    def __init__(self, inputs: int, depth: int, init: Callable[[Tensor], Tensor], lr: float, width: int = 50):
        super().__init__()
        self.lr = lr
        layers: list[nn.Module] = []
        for fan_in in [inputs] + [width] * (depth - 1):
            layers += [nn.Linear(fan_in, width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 10))
        for parameter in self.parameters():
            init(parameter) if parameter.dim() > 1 else nn.init.zeros_(parameter)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


# --- Data ---------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """Images as rows of floats in [0, 1], and their labels."""

    name: str
    train: TensorDataset
    test: TensorDataset

    @property
    def inputs(self) -> int:
        return self.train[0][0].numel()


def load_digits() -> Data:
    """The 1,797 handwritten digits of 8 x 8 pixels that ship with scikit-learn; a fifth of them for testing."""
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(x) // 5], order[len(x) // 5 :]
    return Data("scikit-learn's digits", TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test]))


def load_mnist(folder: Path) -> Data:
    """MNIST from its idx files, plain or gzipped."""
    if not folder.is_dir():
        raise SystemExit(f"--data: {folder} is not a directory.")
    parts = []
    for part in ("train", "t10k"):
        images = read_idx(folder, f"{part}-images-idx3-ubyte")
        labels = read_idx(folder, f"{part}-labels-idx1-ubyte")
        if len(images) != len(labels) or images.dim() != 3 or labels.dim() != 1 or not len(labels):
            shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
            raise SystemExit(f"--data: images and labels of {folder}/{part}-* don't fit: shapes {shapes}.")
        if labels.max() > 9:
            raise SystemExit(f"--data: {folder}/{part}-labels-idx1-ubyte has a label {labels.max()}, not a digit.")
        parts.append(TensorDataset(images.flatten(1).float() / 255, labels.long()))
    if parts[0][0][0].shape != parts[1][0][0].shape:
        raise SystemExit(f"--data: the training and test images of {folder} differ in size.")
    return Data(f"MNIST from {folder}", *parts)


def read_idx(folder: Path, name: str) -> Tensor:
    """The uint8 array of an idx file."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise SystemExit(f"--data: neither {name} nor {name}.gz is in {folder}.")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, dimensions = struct.unpack(">HBB", raw[:4])
        shape = struct.unpack(f">{dimensions}I", raw[4 : 4 + 4 * dimensions])
        body = raw[4 + 4 * dimensions :]
        if zero or kind != 8 or not body or len(body) != torch.Size(shape).numel():
            raise ValueError(f"{len(body)} bytes for shape {shape}")
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise SystemExit(f"--data: {path} is damaged, or no idx file of bytes: {error}.") from None
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(shape)


# --- Training -----------------------------------------------------------------------------------------------


class ProgressLine(L.Callback):
    """One line per run, updated in place; if the output is not a terminal, one line per quarter of the run."""

    def __init__(self, name: str):
        self.name = name

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        done = trainer.global_step / trainer.max_steps
        line = f"{self.name:<28}{done:>5.0%}   accuracy {trainer.callback_metrics['accuracy']:6.1%}"
        if sys.stdout.isatty():
            print(f"\r{line}", end="" if done < 1 else "\n", flush=True)
        elif done * 4 % 1 == 0:
            print(line, flush=True)


@dataclass
class Run:
    """A training run, and the curves in its TensorBoard file."""

    name: str
    folder: Path

    @property
    def label(self) -> str:
        """The name without its first word, rescue or swap."""
        return self.name.split(" ", 1)[1]

    @cached_property
    def logged(self) -> EventAccumulator:
        return EventAccumulator(str(self.folder), size_guidance={"scalars": 0}).Reload()

    def curve(self, tag: str) -> tuple[list[int], list[float]]:
        """Steps and values of a scalar."""
        events = self.logged.Scalars(tag)
        return [event.step for event in events], [event.value for event in events]

    def first_by_layer(self, statistic: str) -> list[float]:
        """The first logged value of a statistic in every layer."""
        tags = self.logged.Tags()["scalars"]
        layers = sorted((tag for tag in tags if tag.startswith(f"{statistic}/")), key=lambda t: int(t.split(".")[-1]))
        return [self.curve(tag)[1][0] for tag in layers]


def train(name: str, model: Classifier, data: Data, steps: int, out: Path, callbacks: list[L.Callback]) -> Run:
    """Train for a number of steps with batches drawn at random; test the accuracy twenty times."""
    draws = RandomSampler(data.train, replacement=True, num_samples=steps * BATCH_SIZE)
    batches = BatchSampler(draws, BATCH_SIZE, drop_last=True)  # indexes the tensors a batch at a time
    logger = TensorBoardLogger(out, name=None, version=name.replace(" ", "-"), default_hp_metric=False)
    shutil.rmtree(logger.log_dir, ignore_errors=True)  # curves of an earlier run would mix with these
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=10.0,
        val_check_interval=max(1, steps // 20),
        num_sanity_val_steps=0,
        log_every_n_steps=max(1, min(50, steps // 50)),
        logger=logger,
        callbacks=[*callbacks, ProgressLine(name)],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(
        model,
        DataLoader(data.train, sampler=batches, batch_size=None),
        DataLoader(data.test, batch_size=len(data.test)),
    )
    logger.finalize("success")
    return Run(name, Path(logger.log_dir))


def rescue(data: Data, steps: int, out: Path, seed: int = 0) -> list[Run]:
    """All weights zero, with and without noise on the gradients."""
    runs = []
    for name, callbacks in {
        "rescue without noise": [],
        "rescue with GradientNoise": [GradientNoise(eta=0.01)],
    }.items():
        L.seed_everything(seed, verbose=False)
        model = Classifier(data.inputs, depth=10, init=nn.init.zeros_, lr=0.2)
        runs.append(train(name, model, data, steps, out, callbacks))
    return runs


def swap(data: Data, steps: int, out: Path, seed: int = 0) -> list[Run]:
    """Xavier's initialization, with and without normalized Swish instead of ReLU."""
    runs = []
    for name, activation in {"swap plain relu": None, "swap nsw": "nsw"}.items():
        L.seed_everything(seed, verbose=False)
        model = Classifier(data.inputs, depth=20, init=nn.init.xavier_uniform_, lr=0.03)
        if activation is not None:
            replace_activations(model, activation)
        runs.append(train(name, model, data, steps, out, [ActivationMonitor()]))
    return runs


# --- Results ------------------------------------------------------------------------------------------------


def print_tables(data: Data, rescued: list[Run], swapped: list[Run]) -> None:
    """Print the results."""
    print(f"\nTest accuracy on {data.name}\n")
    for run in [*rescued, *swapped]:
        accuracy = run.curve("accuracy")[1]
        print(f"  {run.name:<28} best {max(accuracy):6.1%}   last {accuracy[-1]:6.1%}")
    print("\nAt the first log of the swap: gain of the signal (rho) and of the gradient (rho_prime), 1 is best\n")
    columns = [run.first_by_layer(statistic) for statistic in ("rho", "rho_prime") for run in swapped]
    layers = list(zip(*columns, strict=True))
    row = "  {:<8}{:>10.3g}{:>10.3g}{:>17.3g}{:>16.3g}"
    print(f"  {'layer':<8}{'rho relu':>10}{'rho nsw':>10}{'rho_prime relu':>17}{'rho_prime nsw':>16}")
    for number in range(5, len(layers) + 1, 5):
        print(row.format(number, *layers[number - 1]))
    print(row.format("product", *map(math.prod, columns)))
    scores = [run.curve("anact_score")[1][0] for run in swapped]
    print(f"\n  ANAct score (0 is best): {scores[0]:.2f} with relu, {scores[1]:.2f} with nsw")


def draw(rescued: list[Run], swapped: list[Run], path: Path) -> None:
    """Plot the results."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ((top_left, top_right), (bottom_left, bottom_right)) = plt.subplots(
        2, 2, figsize=(10, 6.4), layout="constrained"
    )
    for axes, runs, title in (
        (top_left, rescued, "The rescue: all weights start at zero"),
        (bottom_left, swapped, "The swap: twenty layers, Xavier's initialization"),
    ):
        for run, colour in zip(runs, ("0.6", "C0"), strict=True):
            axes.plot(*run.curve("accuracy"), "o-", color=colour, markersize=3, label=run.label)
        axes.set(title=title, xlabel="step", ylabel="test accuracy", ylim=(0, 1))
        axes.legend()
    top_right.plot(*rescued[1].curve("gradient_noise/std"), color="C0")
    top_right.set(title="gradient_noise/std", xlabel="step", ylabel="σ", ylim=(0, None))
    for run, colour in zip(swapped, ("0.6", "C0"), strict=True):
        gains = run.first_by_layer("rho")
        bottom_right.plot(range(1, len(gains) + 1), gains, "o-", color=colour, markersize=3, label=run.label)
    bottom_right.axhline(1, color="0.8", linewidth=1, zorder=0)
    bottom_right.set(title="ρ by layer, at the first log", xlabel="layer", ylabel="ρ = E[φ²] / Var[h]", ylim=(0, None))
    bottom_right.set_xticks([1, *range(5, len(gains) + 1, 5)])
    bottom_right.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="idx files of MNIST, instead of scikit-learn's digits")
    parser.add_argument(
        "--out", type=Path, default=Path("quickstart_logs"), metavar="DIR", help="for the logs and the picture"
    )
    parser.add_argument("--quick", action="store_true", help="a twentieth of the steps, only to check that it runs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights, the batches and the noise")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; more don't help with layers this small")
    options = parser.parse_args()
    if options.out.exists() and not options.out.is_dir():
        raise SystemExit(f"--out: {options.out} is not a directory.")
    if not 0 <= options.seed < 2**32:
        raise SystemExit(f"--seed: {options.seed} is not between 0 and 2**32 - 1.")
    if options.threads < 1:
        raise SystemExit(f"--threads: {options.threads} is less than 1.")
    data = load_digits() if options.data is None else load_mnist(options.data)
    # Lightning's hints about idle hardware and loader workers don't matter here.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(options.threads)
    scale = 20 if options.quick else 1
    rescued = rescue(data, RESCUE_STEPS // scale, options.out, options.seed)
    swapped = swap(data, SWAP_STEPS // scale, options.out, options.seed)
    print_tables(data, rescued, swapped)
    picture = options.out / "quickstart.png"
    draw(rescued, swapped, picture)
    print(f"\nPicture: {picture}\nTo look closer: tensorboard --logdir {options.out}")


if __name__ == "__main__":
    main()
