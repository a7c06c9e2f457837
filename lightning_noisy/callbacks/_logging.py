"""Send the callbacks' scalars to every logger."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lightning_noisy.monitoring.tensorboard import add_scalars

__all__ = ["log_hyperparameters", "log_scalars"]


def log_scalars(trainer: pl.Trainer, scalars: dict[str, float], step: int) -> None:
    """Send scalars to all loggers, and to ``trainer.callback_metrics`` for callbacks that monitor them.

    Not through ``self.log``, which keeps a torchmetrics object per name and syncs with the host for each.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            if trainer.is_global_zero:
                add_scalars(logger.experiment, scalars, step)
        else:
            logger.log_metrics(_named(logger, scalars), step=step)
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})


def _named(logger: Logger, scalars: dict[str, float]) -> dict[str, float]:
    """The scalars with names that the logger takes: MLflow and W&B refuse or drop ``:``, ``#`` and ``@``."""
    if type(logger).__name__ not in ("MLFlowLogger", "WandbLogger"):
        return scalars
    return {tag.translate(_TAKEN): value for tag, value in scalars.items()}


_TAKEN = str.maketrans({":": ".", "#": "-", "@": "_", "(": "", ")": ""})


def log_hyperparameters(trainer: pl.Trainer, hyperparameters: dict[str, int]) -> None:
    """Send hyperparameters to all loggers; in ``on_fit_start``, before Lightning logs and saves the model's own."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(hyperparameters, metrics={})  # else it would write a scalar `hp_metric`
        else:
            logger.log_hyperparams(hyperparameters)
