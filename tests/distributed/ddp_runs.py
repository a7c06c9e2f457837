"""What each of the two processes of test_ddp.py does: it is started by `torch.distributed.run`, with a folder."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch
from helpers import Net, SpySGD, loader, quiet_trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lightning_noisy import ActivationMonitor, ActivationReplacement, GradientNoise, replace_activations


def batches_of(rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ranks see batches of other sizes, means and spreads."""
    generator = torch.Generator().manual_seed(rank)
    sizes = (4, 30) if rank == 0 else (50, 1)
    return [
        (
            torch.randn(size, 8, generator=generator) * (1 + rank) + rank,
            torch.randint(3, (size,), generator=generator),
        )
        for size in sizes
    ]


class Disturb(L.Callback):
    """Moves the global random state of rank 1 alone."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_rank == 1:
            torch.rand(1)


def zero_model() -> Net:
    """A loss without gradient and a learning rate of 1: the parameters are minus the sum of the noise."""
    model = Net(nn.Linear(8, 3), lambda parameters: SpySGD(parameters, lr=1.0))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    model.training_step = lambda batch, batch_idx: 0 * model.net(batch[0]).sum()
    return model


def still(parameters: Iterator[nn.Parameter]) -> SpySGD:
    return SpySGD(parameters, lr=0.0)


def run(model: Net, callbacks: list[L.Callback], out: Path, name: str, **options: object) -> None:
    trainer = quiet_trainer(strategy="ddp", devices=2, callbacks=callbacks, use_distributed_sampler=False, **options)
    trainer.fit(model, loader(batches_of(trainer.global_rank)))
    torch.save(model.state_dict(), out / f"{name}-{trainer.global_rank}.pt")
    if name == "unseeded":
        torch.save(callbacks[0].drawn, out / f"drawn-{trainer.global_rank}.pt")


class Branches(nn.Module):
    """Has an activation that is never called, and branches that are not taken; DDP waits for all parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.unused, self.act, self.other = nn.ReLU(), nn.ReLU(), nn.Tanh()
        self.is_special = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.first(x))
        if self.is_special:
            x = self.other(x) + nn.functional.gelu(x)
        return self.last(x)


class Unseeded(GradientNoise):
    """Keeps the seed that was drawn."""

    def on_train_batch_end(self, *args: object) -> None:
        super().on_train_batch_end(*args)
        self.drawn = self.state_dict()["optimizers"][0]["seed"]


def main(out: Path) -> None:
    warnings.simplefilter("ignore")
    run(zero_model(), [GradientNoise(eta=1.0, seed=0), Disturb()], out, "zero")
    run(zero_model(), [Unseeded(eta=1.0), Disturb()], out, "unseeded")
    L.seed_everything(10 + int(os.environ["LOCAL_RANK"]), verbose=False)  # as for augmentation that differs by rank
    run(zero_model(), [GradientNoise(eta=1.0)], out, "ranked")
    torch.manual_seed(0)
    model = replace_activations(Net(), "nsw")
    run(model, [GradientNoise(seed=0), ActivationMonitor(), Disturb()], out, "swap")
    torch.manual_seed(0)
    run(Net(optimizer=still), [ActivationReplacement("nsw(synchronized=True)"), Disturb()], out, "pooled")
    for name, inputs in (("branches", None), ("seen branches", torch.randn(4, 8))):
        torch.manual_seed(0)
        run(Net(replace_activations(Branches(), "nsw", example_inputs=inputs)), [], out, name)
    model = Net(nn.Sequential(nn.Tanh(), nn.Linear(8, 3)))
    run(
        model,
        [ActivationMonitor(window=2)],
        out,
        "watch",
        logger=TensorBoardLogger(out, "events", ""),
        log_every_n_steps=2,
    )

    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort a process that takes its interpreter down


if __name__ == "__main__":
    main(Path(sys.argv[1]))
