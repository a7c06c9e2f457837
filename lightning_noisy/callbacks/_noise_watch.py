"""Warnings of gradient noise that is not there, or of nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_noisy.schedules import InverseDecay, Schedule

__all__ = ["NoiseWatch"]

# The steps are checked at the first logged step after so many batches.
_BATCHES = 10

# The signal-to-noise ratio that is too low, and at how many logged steps in a row.
LOW_RATIO = 0.02
LOW_STEPS = 10


class NoiseWatch:
    """Watches one fit, and warns at most once of each.

    Attributes:
        stepped: the optimizers that Lightning has let step.
        noisy: the optimizers whose gradients have got noise.
    """

    def __init__(self) -> None:
        self.stepped: set[Any] = set()
        self.noisy: set[Any] = set()
        self._batches = 0
        self._is_checked = False
        self._low_steps = 0
        self._has_warned = False

    def end_batch(self, model: pl.LightningModule, optimizers: Iterable[Any], *, is_logged: bool) -> None:
        """Count a batch, and check the steps when it is time."""
        self._batches += 1
        if is_logged and self._batches >= _BATCHES:
            self.check_steps(model, optimizers)

    def check_steps(self, model: pl.LightningModule, optimizers: Iterable[Any]) -> None:
        """Warn of optimizers that have stepped without noise."""
        if self._is_checked or not self._batches:
            return
        self._is_checked = True
        # In manual optimization, if no step was seen at all, Lightning may not see them either.
        unseen = not (self.stepped or self.noisy or model.automatic_optimization)
        for index, optimizer in enumerate(optimizers):
            if optimizer not in self.noisy and (unseen or optimizer in self.stepped) and optimizer.param_groups:
                rank_zero_warn(
                    f"GradientNoise saw no gradient in the steps of optimizer {index} ({type(optimizer).__name__}) in"
                    f" {self._batches} batches, and added no noise: either there was none, or what updates the"
                    " parameters is no method `step` of a torch optimizer."
                )

    def check_ratios(self, ratios: list[float], schedule: Schedule) -> None:
        """Warn if the signal-to-noise ratios of a logged step, and those before, are too low."""
        if not ratios:
            return
        self._low_steps = self._low_steps + 1 if min(ratios) < LOW_RATIO else 0
        if self._low_steps == LOW_STEPS and not self._has_warned:
            self._has_warned = True
            smaller = f"eta={schedule.eta / 100:g}" if isinstance(schedule, InverseDecay) else "a smaller one"
            rank_zero_warn(
                f"gradient_noise/snr was below {LOW_RATIO} at {LOW_STEPS} logged steps in a row, now"
                f" {min(ratios):.1g}: the steps are nearly all noise. If the loss doesn't fall, replace"
                f" {schedule!r} by {smaller}, or use relative=True."
            )
