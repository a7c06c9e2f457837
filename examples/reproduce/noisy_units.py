"""Fig. 1 and 4 of Gulcehre et al., "Noisy Activation Functions", and what noisy gates do for an LSTM.

    python examples/reproduce/noisy_units.py --jobs 2

The derivatives of soft and hard functions and draws of the noisy hard tanh for some α are in the picture. The LSTM
learns how many different symbols a sequence has (`examples/by_feature/noisy_gates.py`), with a curriculum from 3 to 26
symbols: with torch's gates, with hard ones, and with NAN and NAH, whose noise is annealed.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from harness import Program, Record, Result, Run, Table, select, spread
from noisy_gates import BATCH, GATES, LONGEST, Counter, sequences
from torch import Tensor
from torch.utils.data import TensorDataset
from training import drawn, fit, in_order

from lightning_noisy.plots import plot_activation

STEPS = 200  # an epoch


class Counted(Counter):
    """The network of the example, which logs its error on the longest sequences after each epoch."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def on_train_end(self) -> None:
        """Nothing: the validation has looked."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("error", (self(batch[0]).argmax(1) != batch[1]).float().mean())


def train(run: Run) -> Result:
    """One run: its error at the end, and the least after an epoch."""
    torch.manual_seed(run.seed)
    model, replacement = Counted(), copy.deepcopy(GATES[str(run.settings["gates"])])
    growing = STEPS * run.epochs / 2  # for half of the training

    def draw_batch(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return sequences(3 + int((LONGEST - 3) * min(1.0, step / growing)), BATCH, generator)

    epochs = fit(
        run,
        model,
        drawn(draw_batch, STEPS, run.seed),
        in_order(TensorDataset(*model.test)),
        callbacks=[replacement] if replacement else [],
        clip=1.0,
        read=lambda logged: {"error": logged["error"]},
    )
    return Result({"last": 100 * epochs["error"][-1], "best": 100 * min(epochs["error"])}, epochs)


def tables(records: list[Record]) -> list[Table]:
    """Errors by gates."""
    lines = []
    for gates in GATES:
        found = select(records, gates=gates)
        lines.append([gates, *(spread([each[key] for each in found]) for key in ("last", "best")), f"{len(found)}"])
    title = f"Sequences of {LONGEST} symbols that are counted wrongly, in %: at the end, and after the best epoch."
    return [Table(title, ["gates", "at the end", "at best", "n"], lines)]


def draw(records: list[Record], epochs: list[Record], path: Path) -> None:
    """The paper's two figures, and the errors by epoch."""
    from matplotlib import pyplot as plt

    figure, (derivatives, noise, errors) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for name in ("tanh", "sigmoid", "hardtanh"):
        plot_activation(name, derivative=True, axes=derivatives)
    plot_activation("nan(alpha=1, c=0)", function="sigmoid", label="hard sigmoid", derivative=True, axes=derivatives)
    for alpha in (0.9, 1.0, 1.1, 1.2):
        plot_activation(f"nan(alpha={alpha}, c=1)", label=f"α = {alpha}", draws=250, axes=noise)
    plot_activation("hardtanh", axes=noise)
    derivatives.set_title("derivatives")
    noise.set_title("normal noise on the hard tanh, p = c = 1")
    for number, gates in enumerate(GATES):
        for seed in sorted({record["seed"] for record in epochs}):
            curve = [record["error"] for record in select(epochs, gates=gates, seed=seed)]
            label = gates if seed == 0 else None
            errors.plot(range(1, len(curve) + 1), curve, color=f"C{number}", linewidth=1, label=label)
    errors.set(title="errors of the LSTM", xlabel=f"epoch of {STEPS} steps", ylim=(0, 1))
    for axes in (derivatives, noise, errors):
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


ROWS = [{"gates": gates} for gates in GATES]
PROGRAM = Program("noisy_units", __doc__, ROWS, train, tables, draw, epochs=10, on_images=False)

if __name__ == "__main__":
    PROGRAM.main()
