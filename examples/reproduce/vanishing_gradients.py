"""What Kathuria's "Vanishing Gradients and Choosing the Right Activation Function" says, measured for each activation.

    python examples/reproduce/vanishing_gradients.py --data DIR --jobs 2

1. Gradients through 50 layers of 100 units in Xavier's initialization, as `signal_report` measures them, and the
   article's own trial, the product of 50 random numbers from 0 to 1.
2. Activations that aren't centred: how many of the gradients of a unit's incoming weights have the same sign.
3. Dying ReLUs: dead units after SGD with a moderate and a large learning rate, as `ActivationMonitor` logs them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from harness import Program, Record, Result, Run, Table, select, spread
from torch import Tensor, nn
from torch.nn import functional as F
from training import Classifier, fit, in_order, load, shuffled

from lightning_noisy import ActivationMonitor, replace_activations, signal_report

WIDTH, BATCH_SIZE, LEARNING_RATES = 100, 64, (0.05, 0.5)
NAMES = ["sigmoid", "tanh", "relu", "leaky_relu", "prelu", "rrelu", "elu", "nsw"]
ROWS = [{"activation": name, "lr": lr} for name in NAMES for lr in LEARNING_RATES]
DRAWS = 100_000


def network(inputs: int, depth: int, name: str) -> nn.Sequential:
    """Layers in Xavier's initialization."""
    layers: list[nn.Module] = []
    for fan_in in [inputs] + [WIDTH] * (depth - 1):
        layers += [nn.Linear(fan_in, WIDTH), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    for parameter in net.parameters():
        nn.init.xavier_normal_(parameter) if parameter.dim() > 1 else nn.init.zeros_(parameter)
    if name != "relu":
        replace_activations(net, name)
    return net


def same_sign(net: nn.Sequential, x: Tensor, y: Tensor, batch_size: int) -> float:
    """In %, the share of the more frequent sign among the gradients of a unit's weights: its mean over the units."""
    weight, shares = net[4].weight, []  # of the third layer
    for inputs, targets in zip(x.split(batch_size), y.split(batch_size), strict=True):
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(inputs), targets), [weight])
        positive, negative = (gradient > 0).sum(1), (gradient < 0).sum(1)
        some = positive + negative > 0  # the others get no gradient
        shares.append((torch.maximum(positive, negative) / (positive + negative))[some])
    return 100 * torch.cat(shares).mean().item()


def read(logged: Mapping[str, float]) -> Mapping[str, float]:
    """What is kept after an epoch."""
    dead = [value for name, value in logged.items() if name.startswith("dead_units/")]
    return {"accuracy": logged["accuracy"], "dead": sum(dead) / len(dead)}


def train(run: Run) -> Result:
    """The three measurements for one activation."""
    name, data = str(run.settings["activation"]), load(run.data)
    torch.manual_seed(run.seed)
    x, y = (tensor[:256] for tensor in data[1].tensors)
    inputs = x.shape[1]
    sites = signal_report(network(inputs, 50, name), (x, y), F.cross_entropy).sites
    # From the outputs of the last layer to those of the first the gradient passes the slopes of all but the first.
    ratios = sites[0]["grad_rms"] / sites[-1]["grad_rms"], sites[1]["rho_prime_product"] ** 0.5
    values = {name: math.log10(ratio) for name, ratio in zip(("gradient", "expected"), ratios, strict=True)}
    shallow = network(inputs, 5, name)
    values |= {f"same_sign_{size}": same_sign(shallow, x, y, size) for size in (1, 64)}
    net = network(inputs, 8, name)
    monitor = ActivationMonitor(every_n_steps=min(100, len(data[0]) // BATCH_SIZE), statistics="dead_units", window=4)
    model = Classifier(net, partial(torch.optim.SGD, lr=float(run.settings["lr"])))
    loader = shuffled(data[0], BATCH_SIZE, run.seed)
    epochs = fit(run, model, loader, in_order(data[1]), callbacks=[monitor], read=read)
    finite = all(parameter.isfinite().all() for parameter in net.parameters())
    values |= {"dead": 100 * epochs["dead"][-1] if finite else math.nan, "best": 100 * max(epochs["accuracy"])}
    numbers = torch.rand(DRAWS, 50, generator=torch.Generator().manual_seed(run.seed), dtype=torch.float64)
    return Result({**values, "numbers": 100 * (numbers.prod(1) > 1e-18).double().mean().item()}, epochs)


def tables(records: list[Record]) -> list[Table]:
    """What each activation does."""
    forms = {"gradient": "{:.1f}", "expected": "{:.1f}", "same_sign_1": "{:.0f}", "same_sign_64": "{:.0f}"}
    lines = []
    for name in NAMES:
        each = [select(records, activation=name, lr=lr) for lr in LEARNING_RATES]
        cells = [spread([record[key] for record in each[0]], form) for key, form in forms.items()]
        for found in each:
            diverged = sum(math.isnan(record["dead"]) for record in found)
            dead = [record["dead"] for record in found if not math.isnan(record["dead"])]
            parts = [spread(dead)] if dead or not diverged else []
            cells.append(", ".join(parts + [f"diverged: {diverged}"] * (diverged > 0)))
            cells.append(spread([record["best"] for record in found]))
        lines.append([name, *cells, f"{min(map(len, each))}"])
    head = ["activation", "gradient, 10^", "by ρ′, 10^", "same sign, 1 sample: %", "64: %"]
    first = Table(
        "Median (least to greatest). Gradient at the first of 50 layers over that at the last, and what the product of"
        " ρ′ says, as powers of ten; gradients of a unit's weights that have the more frequent sign, for batches of 1"
        " and of 64; 8 layers after training: units that are dead, unless the parameters have become infinite, and the"
        " best accuracy.",
        [*head, *(cell for lr in LEARNING_RATES for cell in (f"rate {lr}: dead, %", "accuracy, %")), "n"],
        lines,
    )
    found = select(records, activation="sigmoid", lr=LEARNING_RATES[0])
    second = Table(
        "Products of 50 uniform numbers that are above 10^-18, in %. The article's author never saw one.",
        ["draws", "here", "n"],
        [[f"{DRAWS}", spread([each["numbers"] for each in found]), f"{len(found)}"]],
    )
    return [first, second]


def draw(records: list[Record], epochs: list[Record], path: Path) -> None:
    """The three measurements as bars, with the runs as points."""
    from matplotlib import pyplot as plt

    figure, all_axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    titles = {
        "gradient": "gradient at layer 1 over 50: power of ten",
        "same_sign_1": "gradients of a unit's weights\nwith the same sign, one sample: %",
        "dead": f"dead units after training at {LEARNING_RATES[1]}: %",
    }
    for axes, (key, title) in zip(all_axes, titles.items(), strict=True):
        for number, name in enumerate(NAMES):
            values = [each[key] for each in select(records, activation=name, lr=LEARNING_RATES[1])]
            axes.plot([number] * len(values), values, "o", markersize=4)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(NAMES)), NAMES, rotation=45, fontsize=8)
        axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


PROGRAM = Program("vanishing_gradients", __doc__, ROWS, train, tables, draw, epochs=2)

if __name__ == "__main__":
    PROGRAM.main()
