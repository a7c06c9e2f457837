"""Noisy gates in an LSTM: how many different symbols a sequence has, learned with a curriculum.

    python examples/by_feature/noisy_gates.py [--steps 2000] [--seeds 3] [--out noisy_gates.png]

A decision for each symbol, whether it is new, must be kept to the end. The sequences grow from 3 to 26 of 10 symbols
while the network learns. Four kinds of gates: torch's, hard ones without noise, and NAN and NAH of Gulcehre et al.,
"Noisy Activation Functions" (2016), whose noise is annealed from c = 30 to 0.5.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_noisy import ActivationReplacement
from lightning_noisy.schedules import Linear

SYMBOLS, LONGEST, BATCH = 10, 26, 64
NOISE = Linear(30.0, 0.5, steps="auto")
GATES: dict[str, ActivationReplacement | None] = {
    "sigmoid, tanh": None,
    "hard, without noise": ActivationReplacement("nah(alpha=1, c=0)"),
    "NAN, annealed": ActivationReplacement("nan", noise=NOISE),
    "NAH, annealed": ActivationReplacement("nah", noise=NOISE),
}


def sequences(length: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Symbols, shape (count, length), and how many different ones each sequence has, less one."""
    kinds = torch.randint(1, SYMBOLS + 1, (count, 1), generator=generator)  # so that all numbers are as likely
    order = torch.rand(count, SYMBOLS, generator=generator).argsort(1)
    x = order.gather(1, (torch.rand(count, length, generator=generator) * kinds).long())
    different = (x[..., None] == torch.arange(SYMBOLS)).any(1).sum(1)
    return x, different - 1


class Curriculum(IterableDataset[Any]):
    """Batches of ever longer sequences."""

    def __init__(self, steps: int, seed: int) -> None:
        self.steps, self.seed = steps, seed

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        for step in range(self.steps):
            yield sequences(3 + (LONGEST - 3) * min(2 * step, self.steps) // self.steps, BATCH, generator)


class Counter(L.LightningModule):
    """An LSTM of 60 units, and a linear layer on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(SYMBOLS, 30), nn.LSTM(30, 60, batch_first=True)
        self.head = nn.Linear(60, SYMBOLS)
        self.test = sequences(LONGEST, 1000, torch.Generator().manual_seed(10**6))
        self.errors: list[tuple[int, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(x))
        return self.head(states[:, -1])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if batch_idx % 100 == 0:
            self.look(batch_idx)
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_train_end(self) -> None:
        self.look(self.trainer.global_step)

    @torch.no_grad()
    def look(self, step: int) -> None:
        """Keep the share of the longest sequences that are counted wrongly."""
        self.eval()
        x, y = self.test
        self.errors.append((step, (self(x).argmax(1) != y).float().mean().item()))
        self.train()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def run(gates: str, seed: int, steps: int) -> list[tuple[int, float]]:
    """The error at some steps."""
    L.seed_everything(seed, verbose=False)
    replacement = GATES[gates]
    callbacks = [] if replacement is None else [ActivationReplacement(replacement.to, noise=replacement.noise)]
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=callbacks,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Counter()
    trainer.fit(model, DataLoader(Curriculum(steps, seed), batch_size=None))
    return model.errors


def draw(found: dict[str, list[list[tuple[int, float]]]], out: str) -> None:
    """A curve for each seed."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for number, (gates, runs) in enumerate(found.items()):
        for errors in runs:
            axes.plot(*zip(*errors, strict=True), color=f"C{number}", label=gates if errors is runs[0] else None)
    axes.set(xlabel="step", ylabel=f"error on sequences of {LONGEST}", ylim=(0, 1))
    axes.legend()
    figure.savefig(out, dpi=100)


def main() -> None:
    """Train all, print a table and draw a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each kind (default: %(default)s)")
    parser.add_argument("--out", default="noisy_gates.png", help="file for the picture (default: %(default)s)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning_noisy"):
        logging.getLogger(name).setLevel(logging.ERROR)
    found: dict[str, list[list[tuple[int, float]]]] = {gates: [] for gates in GATES}
    start, total = time.monotonic(), options.seeds * len(GATES)
    for seed in range(options.seeds):
        for gates, runs in found.items():
            runs.append(run(gates, seed, options.steps))
            done = sum(map(len, found.values()))
            left = (time.monotonic() - start) / done * (total - done)
            print(f"{gates}, seed {seed}: error {runs[-1][-1][1]:.1%}; {left / 60:.1f} minutes left", flush=True)
    print(f"\n{'gates':<22}{'error at the end':>18}{'of each seed':>30}")
    for gates, runs in found.items():
        last = [errors[-1][1] for errors in runs]
        print(f"{gates:<22}{statistics.mean(last):>17.1%} {', '.join(f'{each:.1%}' for each in last):>30}")
    draw(found, options.out)
    print(f"\nThe error on the way: {options.out}")


if __name__ == "__main__":
    main()
