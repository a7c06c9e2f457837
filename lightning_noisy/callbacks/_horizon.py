"""The length of a training run, for schedules with ``steps="auto"``."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_noisy.schedules import BaseSchedule, Schedule

__all__ = ["resolved"]


def resolved(schedule: Schedule, trainer: pl.Trainer, *, of_epochs: bool = False) -> Schedule:
    """The schedule, its open horizon set to the steps per optimizer, or the epochs, that the Trainer expects.

    Raises:
        MisconfigurationException: if that number is unknown.
    """
    if not (isinstance(schedule, BaseSchedule) and schedule.is_open):
        return schedule
    total: float | None = trainer.max_epochs if of_epochs else trainer.estimated_stepping_batches
    if not of_epochs and total == trainer.max_steps:
        total /= len(trainer.optimizers) or 1  # Lightning counts the steps of all optimizers
    if trainer.limit_train_batches == 0:  # Lightning then has no estimate
        total = 0
    if total is None or not 0 <= total < float("inf"):
        raise MisconfigurationException(
            f"{schedule} needs to know how long the training is. Give it a number of steps, or set max_steps or"
            " max_epochs of the Trainer."
        )
    return schedule.resolved(int(total))
