"""What the programs of this folder share: data and training. What surrounds them is in `harness.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
from harness import Run
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from quickstart import load_digits, load_mnist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

# --- Data ---------------------------------------------------------------------------------------------------


@lru_cache(1)
def load(folder: Path | None, side: int | None = None) -> tuple[TensorDataset, TensorDataset]:
    """Training and test images in [0, 1] as rows, with their labels.

    Args:
        folder: where MNIST's idx files are; None for scikit-learn's digits.
        side: resize images to so many pixels a side, and give them the shape (1, side, side).
    """
    data = load_digits() if folder is None else load_mnist(folder)
    if side is None:
        return data.train, data.test
    parts = []
    for part in (data.train, data.test):
        x, y = part.tensors
        own = round(x.shape[1] ** 0.5)
        images = x.view(-1, 1, own, own)
        parts.append(TensorDataset(images if own == side else F.interpolate(images, (side, side)), y))
    return parts[0], parts[1]


class Batches(Sampler[Tensor]):
    """The indices of batches in an order that depends on seed and epoch alone, so that a run can be continued."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed, self.epoch = count, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        return iter(torch.randperm(self.count, generator=generator).split(self.batch_size))


class Steps(Sampler[int]):
    """The numbers of an epoch's steps, counted from the first epoch on."""

    def __init__(self, steps: int) -> None:
        self.steps, self.epoch = steps, 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch * self.steps, (self.epoch + 1) * self.steps))


class Drawn(Dataset[Any]):
    """Batches that are drawn when they are asked for: `draw(step, generator)`."""

    def __init__(self, draw: Callable[[int, torch.Generator], Any], seed: int) -> None:
        self.draw, self.seed = draw, seed

    def __getitem__(self, step: int) -> Any:
        return self.draw(step, torch.Generator().manual_seed(self.seed * 1_000_003 + step))


def shuffled(data: TensorDataset, batch_size: int, seed: int) -> DataLoader[Any]:
    """Batches of all samples, in another order each epoch."""
    return _loader(data, Batches(len(data), batch_size, seed))


def in_order(data: TensorDataset, batch_size: int = 2500) -> DataLoader[Any]:
    """Batches of all samples."""
    return _loader(data, torch.arange(len(data)).split(batch_size))


def drawn(draw: Callable[[int, torch.Generator], Any], steps: int, seed: int) -> DataLoader[Any]:
    """Batches that are drawn, so many an epoch."""
    return _loader(Drawn(draw, seed), Steps(steps))


def _loader(data: Dataset[Any], sampler: Any) -> DataLoader[Any]:
    # Without a generator of its own it takes a number from the global one, at another time in a continued run.
    return DataLoader(data, sampler=sampler, batch_size=None, generator=torch.Generator())


# --- Training -----------------------------------------------------------------------------------------------


class Classifier(L.LightningModule):
    """A network with cross entropy, and its accuracy on the test data."""

    def __init__(self, net: nn.Module, optimizer: Callable[[Any], torch.optim.Optimizer], decay: float = 1.0) -> None:
        super().__init__()
        self.net, self.optimizer, self.decay = net, optimizer, decay

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, self.decay)]


class LastValues(Logger):
    """The last value that was logged for each name."""

    name, version = "last", 0

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, float] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.values.update(metrics)

    def log_hyperparams(self, *arguments: Any, **more: Any) -> None:
        """They are in the CSV files."""


class EachEpoch(L.Callback):
    """Keeps numbers after each epoch, also in the checkpoint; seeds the random numbers of each epoch by themselves."""

    def __init__(self, seed: int, read: Callable[[Mapping[str, float]], Mapping[str, float]], sampler: Any) -> None:
        self.seed, self.read, self.sampler = seed, read, sampler
        self.kept: dict[str, list[float]] = {}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.manual_seed(self.seed * 100_003 + trainer.current_epoch)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        for name, value in self.read({**trainer.logger.values, **logged}).items():  # type: ignore[union-attr]
            self.kept.setdefault(name, []).append(value)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = state["kept"]
        # Lightning tells the sampler the epoch, but in a continued run only after it has asked for the first batches.
        self.sampler.set_epoch(max(map(len, self.kept.values()), default=0))


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint can be loaded."""
    try:
        torch.load(checkpoint, weights_only=False)
    except Exception:  # of many kinds
        return False
    return True


def accuracy_only(logged: Mapping[str, float]) -> Mapping[str, float]:
    """What is kept after an epoch, if nothing else is asked for."""
    return {"accuracy": logged["accuracy"]}


def fit(
    run: Run,
    model: L.LightningModule,
    train: DataLoader[Any],
    test: Any,
    *,
    callbacks: Sequence[L.Callback] = (),
    clip: float | None = None,
    read: Callable[[Mapping[str, float]], Mapping[str, float]] = accuracy_only,
) -> dict[str, list[float]]:
    """Train, or go on where the run was interrupted; return what `read` makes of the logged values after each epoch."""
    each = EachEpoch(run.seed, read, train.sampler)
    keep = ModelCheckpoint(run.checkpoint, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=run.epochs,
        gradient_clip_val=clip,
        logger=LastValues(),
        callbacks=[*callbacks, each, keep],
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = run.checkpoint / "last.ckpt"
    if last.exists() and not _is_whole(last):
        print(f"{run} begins anew: {last} is damaged.", flush=True)
        last.unlink()
    trainer.fit(model, train, test, ckpt_path=str(last) if last.exists() else None)
    if trainer.interrupted:  # by Ctrl-C, which some versions of Lightning don't pass on
        raise KeyboardInterrupt
    return each.kept


INITIALIZATIONS: dict[str, Callable[[Tensor], Any]] = {
    "xavier": nn.init.xavier_normal_,
    "he": nn.init.kaiming_normal_,
    "orthogonal": nn.init.orthogonal_,
}


def initialize(net: nn.Module, name: str) -> None:
    """Fill the weights of convolutions and linear layers; biases start at zero."""
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            INITIALIZATIONS[name](layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
