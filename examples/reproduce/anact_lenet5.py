"""Table 1 and Fig. 3 and 4 of Yuan et al., "ANAct: Adaptive Normalization for Activation Functions": LeNet5 on MNIST.

    python examples/reproduce/anact_lenet5.py --data DIR --jobs 2

Nine activations in the paper's initializations (Xavier for tanh and normalized ones, orthogonal for ReLU-GPN, else He),
the same SGD for all. Accuracy, runs under 98 % after 5, 10 and 15 epochs, the score of Eq. 22 and the means of the
weight matrices, both as `ActivationMonitor` logs them. Then normalized ReLU with other momenta and bounds, for which
the paper gives no values. Nor does it give the learning rate and the batch size: here 0.03 and 128, with which tanh
takes as long as in the paper. It trains for 50 epochs, here 15.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from harness import Program, Record, Result, Run, Table, select, spread
from torch import nn
from training import Classifier, fit, in_order, initialize, load, shuffled

from lightning_noisy import ActivationMonitor, replace_activations

BATCH_SIZE, LEARNING_RATE = 128, 0.03

# Of 25 runs in the paper's Table 1: median accuracy in %, and the number under 98 % after 5, 10 and 15 epochs.
METHODS: dict[str, tuple[str, str, tuple[float, int, int, int]]] = {
    "tanh": ("Tanh", "xavier", (98.83, 25, 9, 0)),
    "leaky_relu": ("LReLU", "he", (98.87, 25, 4, 0)),
    "elu": ("ELU", "he", (98.90, 23, 0, 0)),
    "selu": ("SELU", "he", (98.91, 9, 0, 0)),
    "relu": ("ReLU", "he", (98.92, 19, 15, 14)),
    "relu-gpn": ("ReLU-GPN", "orthogonal", (98.91, 14, 7, 6)),
    "nrelu": ("NReLU", "xavier", (98.96, 0, 0, 0)),
    "silu": ("Swish", "he", (98.85, 25, 16, 0)),
    "nsw": ("NSwish", "xavier", (98.90, 1, 0, 0)),
}
OPTIONS = [
    "nrelu(momentum=0.01)",
    "nrelu(momentum=0.5)",
    "nrelu(momentum=1.0)",
    "nrelu(bounds=(0.5, 2.0))",
    "nrelu(bounds=(0.0, 1e9))",
]
ROWS = [{"activation": name} for name in [*METHODS, *OPTIONS]]


def lenet5() -> nn.Sequential:
    """LeCun's network for images of 28 x 28, with ReLU and max pooling."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()),
        nn.Linear(84, 10),
    )


def read(logged: Mapping[str, float]) -> Mapping[str, float]:
    """What is kept after an epoch."""
    return {name: logged[name] for name in ("accuracy", "anact_score", "weight_mean_sum")}


def train(run: Run) -> Result:
    """One run: its best accuracy, and the epochs until it is above 98 %."""
    name, data = str(run.settings["activation"]), load(run.data, 28)
    torch.manual_seed(run.seed)
    net = lenet5()
    if name != "relu":
        replace_activations(net, name)
    initialize(net, METHODS[name.split("(")[0]][1])
    every = min(100, len(data[0]) // BATCH_SIZE)
    monitor = ActivationMonitor(every_n_steps=every, statistics=["anact_score", "weight_mean_sum"])
    model = Classifier(net, partial(torch.optim.SGD, lr=LEARNING_RATE))
    epochs = fit(run, model, shuffled(data[0], BATCH_SIZE, run.seed), in_order(data[1]), callbacks=[monitor], read=read)
    curve = epochs["accuracy"]
    below = {f"below_98_after_{n}": float(max(curve[:n]) < 0.98) if n <= len(curve) else math.nan for n in (5, 10, 15)}
    accuracy = {"best": 100 * max(curve), "first": 100 * curve[0]}
    means = {name: statistics.mean(epochs[name]) for name in ("anact_score", "weight_mean_sum")}
    return Result({**accuracy, **below, **means}, epochs)


def tables(records: list[Record]) -> list[Table]:
    """The paper's table with what its Fig. 3 and 4 show, and the options of the normalized ReLU."""
    lines = []
    for name, (title, _, (median, *below)) in METHODS.items():
        found = select(records, activation=name)
        lines.append(
            [
                title,
                f"{median}",
                spread([record["best"] for record in found], "{:.2f}"),
                *(f"{of_25} of 25; {_below(found, n)}" for n, of_25 in zip((5, 10, 15), below, strict=True)),
                spread([record["first"] for record in found]),
                spread([record["anact_score"] for record in found], "{:.2f}"),
                spread([record["weight_mean_sum"] for record in found], "{:.3f}"),
                f"{len(found)}",
            ]
        )
    head = ["activation", "median: paper", "here", *(f"under 98 % after {n}: paper; here" for n in (5, 10, 15))]
    first = Table(
        "Best test accuracy in % (the paper's of 50 epochs, here 15), median (least to greatest) of the runs; runs"
        " under 98 % after some epochs; accuracy in % after the first; mean over the epochs of the score, Eq. 22, and"
        " of the sum of |E[W]|.",
        [*head, "after 1 epoch", "score", "weight means", "n"],
        lines,
    )
    lines = []
    for name in ("nrelu", *OPTIONS):
        found = select(records, activation=name)
        accuracies = (spread([record[key] for record in found], "{:.2f}") for key in ("best", "first"))
        score = spread([record["anact_score"] for record in found], "{:.2f}")
        title = "the defaults: momentum=0.1, bounds=(0.2, 5.0)" if name == "nrelu" else name[len("nrelu(") : -1]
        lines.append([title, *accuracies, score, f"{len(found)}"])
    second = Table(
        "Options of the normalized ReLU.", ["options", "best accuracy", "after 1 epoch", "score", "n"], lines
    )
    return [first, second]


def _below(records: list[Record], epochs: int) -> str:
    known = [record for record in records if not math.isnan(record[f"below_98_after_{epochs}"])]
    return f"{sum(record[f'below_98_after_{epochs}'] for record in known):.0f} of {len(known)}"


def draw(records: list[Record], epochs: list[Record], path: Path) -> None:
    """Medians by epoch: accuracy, score, and means of weights."""
    from matplotlib import pyplot as plt

    figure, all_axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for name, (title, *_) in METHODS.items():
        found = select(epochs, activation=name)
        numbers = sorted({record["epoch"] for record in found})
        for axes, key in zip(all_axes, ("accuracy", "anact_score", "weight_mean_sum"), strict=True):
            medians = [statistics.median(record[key] for record in select(found, epoch=n)) for n in numbers]
            style = {"nrelu": "-", "nsw": "-"}.get(name, "--" if name in ("relu", "silu", "relu-gpn") else ":")
            axes.plot(numbers, medians, style, label=title)
    all_axes[0].set(title="test accuracy", ylim=(0.95, 0.995), xlabel="epoch")
    all_axes[1].set(title="score, Eq. 22", xlabel="epoch", ylim=(0, None))
    all_axes[2].set(title="sum of |E[W]|", xlabel="epoch", ylim=(0, None))
    for axes in all_axes:
        axes.xaxis.get_major_locator().set_params(integer=True)
    all_axes[0].legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


PROGRAM = Program("anact_lenet5", __doc__, ROWS, train, tables, draw, epochs=15)

if __name__ == "__main__":
    PROGRAM.main()
