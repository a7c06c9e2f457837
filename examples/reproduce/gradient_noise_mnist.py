"""Table 1 of Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks": 20 layers, MNIST.

    python examples/reproduce/gradient_noise_mnist.py --data DIR --jobs 2

Twenty hidden layers of 50 ReLUs, SGD without momentum, learning rates 0.1 and 0.01, with and without noise of variance
0.01 / (1 + t)^0.55 on the gradients, from three initializations: the paper's experiments but 2, another clipping, and
4, another good initialization. It says neither the batch size (here 50) nor the number of epochs (25); its 40 runs a
line are half with each learning rate. Then, from zero, what it says of other networks: noise that isn't annealed, noise
before the clipping, and noise on the weights, times the learning rate, with Adam.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from harness import Program, Record, Result, Run, Settings, Table, select, spread
from torch import Tensor, nn
from training import Classifier, fit, in_order, load, shuffled

from lightning_noisy import GradientNoise
from lightning_noisy.schedules import Constant, InverseDecay

WIDTH, DEPTH, BATCH_SIZE = 50, 20, 50
SCHEDULE = InverseDecay(0.01, 0.55)

# Best and average test accuracy in % in the paper's Table 1.
EXPERIMENTS: dict[tuple[str, str], dict[str, tuple[float, float]]] = {
    ("simple", ""): {"no": (89.9, 43.1), "annealed": (96.7, 52.7), "no, dropout": (11.3, 10.8)},
    ("simple", "10"): {"no": (95.7, 51.6), "annealed": (97.0, 53.6)},
    ("good", "10"): {"no": (97.4, 91.7), "annealed": (97.2, 91.7)},
    ("zero", "10"): {"no": (11.4, 10.1), "annealed": (94.5, 49.7)},
}
NAMES = {
    ("simple", ""): "1: N(0, 0.1²), not clipped",
    ("simple", "10"): "3: N(0, 0.1²), clipped to 10",
    ("good", "10"): "5: He's, clipped to 10",
    ("zero", "10"): "6: zero, clipped to 10",
}
CLAIMS = {
    ("sgd", "no"): "SGD, no noise",
    ("sgd", "annealed"): "SGD, noise after the clipping, annealed",
    ("sgd", "before clipping"): "SGD, noise before the clipping, annealed",
    ("sgd", "fixed 0.01"): "SGD, fixed variance 0.01",
    ("sgd", "fixed 0.0001"): "SGD, fixed variance 0.0001",
    ("adam", "no"): "Adam, no noise",
    ("adam", "annealed"): "Adam, noise on the gradients, annealed",
    ("adam", "on weights"): "Adam, noise on the weights, annealed",
}


def _row(init: str, clip: str, noise: str, optimizer: str, lr: float) -> Settings:
    return {"init": init, "clip": clip, "noise": noise, "optimizer": optimizer, "lr": lr}


ROWS = [
    _row(*experiment, noise, "sgd", lr)
    for experiment, settings in EXPERIMENTS.items()
    for noise in settings
    for lr in (0.1, 0.01)
] + [
    _row("zero", "10", noise, optimizer, {"sgd": 0.1, "adam": 0.001}[optimizer])
    for optimizer, noise in CLAIMS
    if (optimizer, noise) not in {("sgd", "no"), ("sgd", "annealed")}
]


class BeforeClipping(L.Callback):
    """The same noise, but on the gradients as they leave the backward pass."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for parameter in pl_module.parameters():
            noise = torch.randn(parameter.shape, generator=self.generator)
            parameter.grad.add_(noise, alpha=SCHEDULE(trainer.global_step))  # type: ignore[union-attr]

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])


class OnWeights(BeforeClipping):
    """The same noise, times the learning rate, on the weights: that on the gradients for SGD, not for Adam."""

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing; the noise comes after the step."""

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        for parameter in pl_module.parameters():
            noise = torch.randn(parameter.shape, generator=self.generator)
            parameter.add_(noise, alpha=lr * SCHEDULE(trainer.global_step - 1))


def network(inputs: int, init: str, dropout: bool) -> nn.Sequential:
    """The layers, with all biases at zero."""
    fill: Callable[[Tensor], Any] = {
        "simple": lambda weight: nn.init.normal_(weight, std=0.1),
        "good": nn.init.kaiming_normal_,
        "zero": nn.init.zeros_,
    }[init]
    layers: list[nn.Module] = []
    for fan_in in [inputs] + [WIDTH] * (DEPTH - 1):
        layers += [nn.Linear(fan_in, WIDTH), nn.ReLU(), *([nn.Dropout(0.5)] if dropout else [])]
    net = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    for parameter in net.parameters():
        fill(parameter) if parameter.dim() > 1 else nn.init.zeros_(parameter)
    return net


def train(run: Run) -> Result:
    """One run; its best and its last accuracy."""
    row, data = run.settings, load(run.data)
    torch.manual_seed(run.seed)
    net = network(data[0][0][0].numel(), str(row["init"]), "dropout" in str(row["noise"]))
    lr, kind = float(row["lr"]), {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[str(row["optimizer"])]
    noise = {
        "annealed": lambda: GradientNoise(schedule=SCHEDULE, seed=run.seed),
        "fixed 0.01": lambda: GradientNoise(schedule=Constant(0.1), seed=run.seed),
        "fixed 0.0001": lambda: GradientNoise(schedule=Constant(0.01), seed=run.seed),
        "before clipping": lambda: BeforeClipping(run.seed),
        "on weights": lambda: OnWeights(run.seed),
    }.get(str(row["noise"]))
    model = Classifier(net, lambda parameters: kind(parameters, lr=lr))
    clip = float(row["clip"]) if row["clip"] else None
    epochs = fit(
        run,
        model,
        shuffled(data[0], BATCH_SIZE, run.seed),
        in_order(data[1]),
        callbacks=[noise()] if noise else [],
        clip=clip,
    )
    accuracy = epochs["accuracy"]
    return Result({"best": 100 * max(accuracy), "last": 100 * accuracy[-1]}, epochs)


def tables(records: list[Record]) -> list[Table]:
    """The paper's table, and other kinds of noise."""
    lines = []
    for experiment, settings in EXPERIMENTS.items():
        for noise, (best, average) in settings.items():
            init, clip = experiment
            found = select(records, init=init, clip=int(clip) if clip else "", noise=noise, optimizer="sgd")
            each = [select(found, lr=lr) for lr in (0.1, 0.01)]
            lines.append(
                [
                    NAMES[experiment],
                    {"no": "no", "annealed": "yes", "no, dropout": "no, but dropout"}[noise],
                    f"{best}",
                    f"{max(record['best'] for record in found):.1f}" if found else "-",
                    f"{average}",
                    f"{statistics.mean(statistics.mean(run['last'] for run in runs) for runs in each):.1f}"
                    if all(each)
                    else "-",
                    *(spread([run["last"] for run in runs]) for runs in each),
                    " + ".join(str(len(runs)) for runs in each),
                ]
            )
    head = ["experiment", "noise", "best: paper", "here", "average: paper", "here"]
    first = Table(
        "Test accuracy in %: the best of all runs and epochs, the average at the end of both learning rates' runs, and"
        " the median (least to greatest) at the end for each learning rate.",
        [*head, "learning rate 0.1", "0.01", "n"],
        lines,
    )
    lines = []
    for (optimizer, noise), name in CLAIMS.items():
        found = select(records, init="zero", clip=10, noise=noise, optimizer=optimizer)
        found = [record for record in found if record["lr"] != 0.01]
        learned = sum(record["best"] > 50 for record in found)
        lines.append([name, spread([record["last"] for record in found]), f"{learned} of {len(found)}"])
    second = Table(
        "From zero, clipped to 10, learning rate 0.1 (SGD) and 0.001 (Adam): test accuracy in % at the end, and runs"
        " that got beyond 50 %.",
        ["noise", "here", "learned"],
        lines,
    )
    return [first, second]


def draw(records: list[Record], epochs: list[Record], path: Path) -> None:
    """Accuracy by epoch, a line for each run."""
    from matplotlib import pyplot as plt

    figure, all_axes = plt.subplots(1, 4, figsize=(11, 3), sharey=True, layout="constrained")
    colours = {"no": "0.5", "annealed": "C0", "no, dropout": "C1"}
    for axes, (init, clip) in zip(all_axes, EXPERIMENTS, strict=True):
        found = select(epochs, init=init, clip=int(clip) if clip else "", optimizer="sgd")
        for noise in EXPERIMENTS[init, clip]:
            for lr, style in ((0.1, "-"), (0.01, ":")):
                each = select(found, noise=noise, lr=lr)
                for number, seed in enumerate(sorted({record["seed"] for record in each})):
                    curve = [record["accuracy"] for record in select(each, seed=seed)]
                    names = {"no": "no noise", "annealed": "noise", "no, dropout": "no noise, dropout"}
                    label = f"{names[noise]}, rate {lr}" if number == 0 else None
                    axes.plot(range(1, len(curve) + 1), curve, style, color=colours[noise], linewidth=1, label=label)
        axes.set(title=NAMES[init, clip], xlabel="epoch", ylim=(0, 1))
        axes.title.set_fontsize(10)
    all_axes[0].set_ylabel("test accuracy")
    handles, labels = all_axes[0].get_legend_handles_labels()
    all_axes[-1].legend(handles, labels, fontsize=7, loc="upper left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


PROGRAM = Program("gradient_noise_mnist", __doc__, ROWS, train, tables, draw, epochs=25)

if __name__ == "__main__":
    PROGRAM.main()
