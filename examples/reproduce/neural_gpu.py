"""Table 5 of Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks", in small.

    python examples/reproduce/neural_gpu.py --jobs 2

A Neural GPU, a convolution with gates that is repeated as often as the input is long, learns to add binary numbers with
Adam: many short runs with two learning rates, without noise, with noise of variance 1 / (1 + t)^0.55 on the clipped
gradients, as in the paper, and with a hundredth of it. How many of them make less than 1 % errors on numbers that are
three times as long as those of the training, in their bits; the paper doesn't say what of. There it is multiplication,
from 20 digits to 200, in 7290 runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from harness import Program, Record, Result, Run, Table, draw_sorted, select, spread
from torch import Tensor, nn
from torch.nn import functional as F
from training import drawn, fit

from lightning_noisy import GradientNoise

MAPS, WIDTH, BATCH_SIZE, STEPS = 16, 4, 32, 100  # steps an epoch
LONGEST, TESTED = 8, 24  # bits
LEARNING_RATES = (0.003, 0.01)
BOUNDS = (1, 2, 3, 5)
# Of 7290 runs in the paper's Table 5, those with errors under 1, 2, 3 and 5 %.
PAPER = {0: (28, 90, 172, 387), 1: (58, 159, 282, 570)}
ETAS = (0, 1, 0.01)
ROWS = [{"eta": eta, "lr": lr} for eta in ETAS for lr in LEARNING_RATES]


def sums(bits: int, generator: torch.Generator, count: int = BATCH_SIZE) -> tuple[Tensor, Tensor]:
    """Pairs of bits, the lowest first, as symbols 1 to 4, and the bits of the sum, shape (count, bits + 1)."""
    numbers = torch.randint(2, (2, count, bits), generator=generator)
    carry, result = torch.zeros(count, dtype=torch.long), []
    for pair in numbers.sum(0).unbind(1):
        total = pair + carry
        result.append(total % 2)
        carry = total // 2
    symbols = F.pad(1 + numbers[0] + 2 * numbers[1], (0, 1))
    return symbols, torch.stack([*result, carry], dim=1)


class Gated(nn.Module):
    """Kaiser and Sutskever's convolutional GRU: u s + (1 - u) tanh(U (r s) + B) with gates u, r of s."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Conv2d(MAPS, 2 * MAPS, 3, padding=1)
        self.candidate = nn.Conv2d(MAPS, MAPS, 3, padding=1)
        nn.init.ones_(self.gates.bias)  # remember, at first

    def forward(self, state: Tensor) -> Tensor:
        update, reset = self.gates(state).sigmoid().chunk(2, dim=1)
        return update * state + (1 - update) * self.candidate(reset * state).tanh()


class NeuralGPU(L.LightningModule):
    """Two gated convolutions, as many times as there are symbols; the first column is input and output."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.embedding, self.head = nn.Embedding(5, MAPS), nn.Linear(MAPS, 2)
        self.layers = nn.Sequential(Gated(), Gated())

    def forward(self, symbols: Tensor) -> Tensor:
        first = self.embedding(symbols).tanh().transpose(1, 2)[..., None]
        state = F.pad(first, (0, WIDTH - 1))  # (batch, maps, length, width)
        for _ in range(symbols.shape[1]):
            state = self.layers(state)
        return self.head(state[..., 0].transpose(1, 2))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int) -> None:
        name = ("error", "longer")[dataloader_idx]
        self.log(name, (self(batch[0]).argmax(2) != batch[1]).float().mean(), add_dataloader_idx=False)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def train(run: Run) -> Result:
    """One run: its errors on numbers as long as those of the training, and longer ones."""
    torch.manual_seed(run.seed)
    model, growing = NeuralGPU(float(run.settings["lr"])), STEPS * run.epochs / 2  # longer numbers in the first half

    def draw_batch(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        longest = 2 + int((LONGEST - 2) * min(1.0, step / growing))
        return sums(1 + int(torch.randint(longest, (), generator=generator)), generator)

    tests = [
        drawn(lambda step, generator, bits=bits: sums(bits, generator, 200), 1, 10**6) for bits in (LONGEST, TESTED)
    ]
    epochs = fit(
        run,
        model,
        drawn(draw_batch, STEPS, run.seed),
        tests,
        callbacks=[GradientNoise(float(run.settings["eta"]), 0.55, seed=run.seed)],
        clip=1.0,
        read=lambda logged: {name: logged[name] for name in ("error", "longer")},
    )
    return Result({name: 100 * values[-1] for name, values in epochs.items()}, epochs)


def tables(records: list[Record]) -> list[Table]:
    """How many runs are below some errors."""
    lines = []
    for eta in ETAS:
        for lr in LEARNING_RATES:
            first = eta in PAPER and lr == LEARNING_RATES[0]
            paper = [f"{number} of 7290; " for number in PAPER[int(eta)]] if first else [""] * len(BOUNDS)
            found = select(records, eta=eta, lr=lr)
            counts = [sum(each["longer"] < bound for each in found) for bound in BOUNDS]
            cells = [f"{theirs}{here} of {len(found)}" for theirs, here in zip(paper, counts, strict=True)]
            errors = [spread([each[name] for each in found]) for name in ("error", "longer")]
            lines.append([f"{eta}", f"{lr}", *cells, *errors])
    title = (
        f"Runs by their share of wrong bits in sums of {TESTED}-bit numbers, after training with up to {LONGEST} bits,"
        f" and the wrong bits for {LONGEST} and {TESTED} bits in %. The paper's: multiplication, all settings together."
    )
    head = ["η", "learning rate", *(f"under {bound} %: paper; here" for bound in BOUNDS)]
    return [Table(title, [*head, f"{LONGEST} bits", f"{TESTED} bits"], lines)]


def draw(records: list[Record], epochs: list[Record], path: Path) -> None:
    """Errors of all runs, sorted."""
    runs = {
        f"η = {eta}, learning rate {lr}": (
            f"{form}C{number}",
            [each["longer"] for each in select(records, eta=eta, lr=lr)],
        )
        for eta, form in zip(ETAS, ("o:", "o-", "o--"), strict=True)
        for number, lr in enumerate(LEARNING_RATES)
    }
    draw_sorted(path, runs, f"wrong bits, {TESTED}-bit numbers, in %")


PROGRAM = Program("neural_gpu", __doc__, ROWS, train, tables, draw, epochs=15, seeds=12, on_images=False)

if __name__ == "__main__":
    PROGRAM.main()
