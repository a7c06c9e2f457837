"""Fig. 2 and 5 to 6 and Table 1 of Pretorius et al., "ReLU and sigmoidal activation functions": MNIST, what nodes do.

    python examples/reproduce/relu_sigmoid_nodes.py --data DIR --jobs 2

Networks of 2, 4, 6 and 8 layers of 200 units (`--rows 800` for 800), ReLU in He's and sigmoid in Xavier's
initialization, with and without batch norm, Adam, a learning rate that decays by 0.99 an epoch. Accuracy; how many
samples a unit is inactive for, before and after the training; and the median of each unit for each class. All of it by
the metrics that `ActivationMonitor` uses. The paper trains for 300 epochs, and chooses learning rates and epochs on
validation data; here they are the same for all.
"""

from __future__ import annotations

import copy
import statistics
from functools import partial
from pathlib import Path

import torch
from harness import Program, Record, Result, Run, Table, select, spread
from torch import Tensor, nn
from training import Classifier, fit, in_order, load, shuffled

from lightning_noisy.metrics import ClassActivations, Sparsity

LEARNING_RATE, BATCH_SIZE = 1e-3, 128
DEPTHS, FUNCTIONS = (2, 4, 6, 8), {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}
# Without and with batch norm: % of inactive samples in four layers of 200 ReLUs, untrained and trained (Table 1).
SPARSITY = {
    "no": ([49.22, 48.85, 48.45, 48.74], [80.40, 79.33, 81.93, 81.90]),
    "yes": ([49.08, 49.70, 49.81, 49.15], [65.76, 56.67, 68.77, 69.12]),
}
ROWS = [
    {"function": function, "depth": depth, "width": width, "batch_norm": norm}
    for width in (200, 800)
    for function in FUNCTIONS
    for depth in DEPTHS
    for norm in ("no", "yes")
]


def network(inputs: int, function: str, depth: int, width: int, norm: bool) -> nn.Sequential:
    """The layers; activations are at the places that :func:`activations` looks at."""
    layers: list[nn.Module] = []
    for fan_in in [inputs] + [width] * (depth - 1):
        linear = nn.Linear(fan_in, width)
        nn.init.kaiming_normal_(linear.weight) if function == "relu" else nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, *([nn.BatchNorm1d(width)] if norm else []), FUNCTIONS[function]()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


@torch.no_grad()
def activations(net: nn.Sequential, x: Tensor) -> list[Tensor]:
    """The output of each hidden layer."""
    found, training = [], net.training
    net.eval()
    for layer in net:
        x = layer(x)
        if isinstance(layer, tuple(FUNCTIONS.values())):
            found.append(x)
    net.train(training)
    return found


@torch.no_grad()
def calibrated(net: nn.Sequential, x: Tensor) -> nn.Sequential:
    """A copy whose batch norms, if any, know the statistics of the training data; else they would do nothing."""
    net = copy.deepcopy(net).train()
    for layer in net:
        if isinstance(layer, nn.BatchNorm1d):
            layer.momentum = None  # the mean over all batches
    for batch in x.split(1000):
        net(batch)
    return net


def look(net: nn.Sequential, x: Tensor, y: Tensor) -> tuple[list[float], list[Tensor]]:
    """Of each hidden layer: inactive samples of a unit in %, and the medians, shape (classes, units)."""
    shares, medians = [], []
    for output in activations(net, x):
        sparsity, by_class = Sparsity(), ClassActivations(10, output.shape[1])
        sparsity.update(output=output)
        by_class.update(output=output, target=y)
        shares.append(100 * sparsity.compute().item())
        medians.append(by_class.compute()["median"])
    return shares, medians


def train(run: Run) -> Result:
    """One run: accuracy, and what the nodes do before and after."""
    row, data = run.settings, load(run.data)
    torch.manual_seed(run.seed)
    x, y = data[1].tensors
    net = network(x.shape[1], str(row["function"]), int(row["depth"]), int(row["width"]), row["batch_norm"] == "yes")
    looks = {"untrained": look(calibrated(net, data[0].tensors[0]), x, y)}
    model = Classifier(net, partial(torch.optim.Adam, lr=LEARNING_RATE), decay=0.99)
    epochs = fit(run, model, shuffled(data[0], BATCH_SIZE, run.seed), in_order(data[1]))
    looks["trained"] = look(net, x, y)
    if run.seed == 0 and row["depth"] == 4 and row["width"] == 200 and row["batch_norm"] == "no":
        draw_medians({when: torch.cat(medians, 1) for when, (_, medians) in looks.items()}, run)
    values = dict.fromkeys(NAMES, float("nan")) | {"best": 100 * max(epochs["accuracy"])}
    for when, (shares, medians) in looks.items():
        values |= {f"{when}_{n}": share for n, share in enumerate(shares, 1)}
        values |= {f"classes_{when}_{n}": each.std(0, correction=0).mean().item() for n, each in enumerate(medians, 1)}
    return Result(values, epochs)


STATES = ("untrained", "trained")
NAMES = [
    "best",
    *(f"{kind}{when}_{n}" for kind in ("", "classes_") for when in STATES for n in range(1, max(DEPTHS) + 1)),
]


def tables(records: list[Record]) -> list[Table]:
    """Accuracies and sparsities."""
    lines = []
    for width in sorted({record["width"] for record in records}):
        for norm in ("no", "yes"):
            for function in FUNCTIONS:
                found = [select(records, function=function, width=width, batch_norm=norm, depth=d) for d in DEPTHS]
                cells = [spread([record["best"] for record in each], "{:.2f}") for each in found]
                lines.append([function, f"{width}", norm, *cells, f"{min(map(len, found))}"])
    first = Table(
        "Best test accuracy in %, as median (least to greatest) of the runs. The paper has a figure (2), no numbers.",
        ["function", "width", "batch norm", *(f"{depth} layers" for depth in DEPTHS), "n"],
        lines,
    )
    lines = []
    for layer in range(4):
        line = [f"{layer + 1}"]
        for norm, paper in SPARSITY.items():
            found = select(records, function="relu", width=200, depth=4, batch_norm=norm)
            for when, theirs in zip(("untrained", "trained"), paper, strict=True):
                line += [f"{theirs[layer]:.2f}", spread([record[f"{when}_{layer + 1}"] for record in found])]
        lines.append([*line, f"{len(select(records, function='relu', width=200, depth=4, batch_norm='no'))}"])
    states = [f"{norm}{when}" for norm in ("", "batch norm, ") for when in STATES]
    head = ["layer", *(cell for state in states for cell in (f"{state}: paper", "here")), "n"]
    second = Table("Inactive samples of a unit in %, mean over the units; four layers of 200 ReLUs.", head, lines)
    lines = []
    for function in FUNCTIONS:
        found = select(records, function=function, width=200, depth=4, batch_norm="no")
        cells = [
            spread([each[f"classes_{when}_{n}"] for each in found], "{:.3f}") for when in STATES for n in range(1, 5)
        ]
        lines.append([function, *cells, f"{len(found)}"])
    third = Table(
        "How far apart the classes are: standard deviation of a unit's ten medians, mean over the units of each of four"
        " layers of 200 (what Fig. 5 and 6 show; the paper has no numbers).",
        ["function", *(f"{when}, layer {n}" for when in STATES for n in range(1, 5)), "n"],
        lines,
    )
    return [first, second, third]


def draw_medians(medians: dict[str, Tensor], run: Run) -> None:
    """The median of each unit, a colour for each class, before and after the training."""
    from matplotlib import pyplot as plt

    figure, all_axes = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
    for axes, (when, values) in zip(all_axes, medians.items(), strict=True):
        for digit, median in enumerate(values):
            axes.plot(range(1, len(median) + 1), median, ".", markersize=2, label=f"{digit}")
        axes.set(title=f"{run.settings['function']}, {when}", xlabel="node, 200 a layer")
    all_axes[0].set_ylabel("median")
    all_axes[1].legend(title="class", fontsize=6, loc="upper left", bbox_to_anchor=(1, 1), markerscale=3)
    figure.savefig(run.out / f"relu_sigmoid_nodes_{run.settings['function']}.png", dpi=110)
    plt.close(figure)


def draw(records: list[Record], epochs: list[Record], path: Path) -> None:
    """Accuracy over depth."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for width in sorted({record["width"] for record in records}):
        for number, function in enumerate(FUNCTIONS):
            for norm, style in (("no", "o-"), ("yes", "*--")):
                found = select(records, function=function, width=width, batch_norm=norm)
                each = {depth: [run["best"] for run in select(found, depth=depth)] for depth in DEPTHS}
                means = {depth: statistics.mean(values) for depth, values in each.items() if values}
                label = f"{function}, {width} units{', batch norm' if norm == 'yes' else ''}"
                axes.plot(
                    list(means), list(means.values()), style, color=f"C{number + 2 * (width == 800)}", label=label
                )
    axes.set(xlabel="hidden layers", ylabel="test accuracy in %", xticks=DEPTHS)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


PROGRAM = Program("relu_sigmoid_nodes", __doc__, ROWS, train, tables, draw, epochs=20, only=("200",))

if __name__ == "__main__":
    PROGRAM.main()
