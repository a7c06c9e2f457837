"""Where and when the callbacks' scalars go: to every logger, at the steps of Lightning's own logging."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

__all__ = ["is_logging_due", "log_hyperparameters", "log_scalars", "logging_step"]


def is_logging_due(trainer: pl.Trainer) -> bool:
    """Whether Lightning logs the step that this batch belongs to; from ``on_train_batch_start`` on."""
    # fast_dev_run is set by one of the Trainer's connectors.
    return bool(trainer._logger_connector.should_update_logs or trainer.fast_dev_run)  # type: ignore[attr-defined]


def logging_step(trainer: pl.Trainer) -> int | None:
    """In ``on_train_batch_end``: the step at which ``self.log`` values of this batch are written, or None.

    None with ``log_every_n_steps`` and gradient accumulation, for batches whose values Lightning doesn't write
    either. ``trainer.global_step`` is another count: it has moved on, and by two with two optimizers.
    """
    loop = trainer.fit_loop
    accumulating = loop._should_accumulate() and trainer.lightning_module.automatic_optimization
    return loop.epoch_loop._batches_that_stepped if is_logging_due(trainer) and not accumulating else None


def log_scalars(trainer: pl.Trainer, scalars: dict[str, float], step: int) -> None:
    """Send scalars to all loggers, and to ``trainer.callback_metrics`` for callbacks that monitor them.

    Not through ``self.log``, which keeps a torchmetrics object per name and syncs with the host for each.
    """
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=step)
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})


def log_hyperparameters(trainer: pl.Trainer, hyperparameters: dict[str, int]) -> None:
    """Send hyperparameters to all loggers; in ``on_fit_start``, before Lightning logs and saves the model's own."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(hyperparameters, metrics={})  # else it would write a scalar `hp_metric`
        else:
            logger.log_hyperparams(hyperparameters)
