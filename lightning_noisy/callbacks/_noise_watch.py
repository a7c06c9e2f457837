"""Warnings of gradient noise that is not there, or of nothing else."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.nn.parameter import is_lazy

from lightning_noisy.callbacks._noisy_optimizers import Attached
from lightning_noisy.schedules import InverseDecay, Schedule

__all__ = ["NoiseWatch"]

# The signal-to-noise ratio that is too low, and at how many logged steps in a row.
LOW_RATIO = 0.02
LOW_STEPS = 10


class NoiseWatch:
    """Watches one fit, and warns at most once of each.

    Attributes:
        noisy: the indices of the optimizers whose gradients have got noise.
    """

    def __init__(self) -> None:
        self.noisy: set[int] = set()
        self._versions: dict[int, list[tuple[Any, int]]] = {}  # of some parameters of each optimizer
        self._low_steps = 0
        self._has_warned = False

    def begin(self, index: int, parameters: list[Any]) -> None:
        """Take in the parameters of an optimizer that are to get noise, before it steps."""
        sample = parameters[:: 1 + len(parameters) // 16]
        self._versions[index] = [(p, p._version) for p in sample if not is_lazy(p)]

    def check_steps(self, attached: list[Attached]) -> None:
        """Warn of optimizers that have changed their parameters, and without noise."""
        for optimizer, index, _ in attached:
            if index in self.noisy:
                self._versions.pop(index, None)
            elif any(parameter._version != version for parameter, version in self._versions.get(index, [])):
                del self._versions[index]
                rank_zero_warn(
                    f"Parameters of optimizer {index} ({type(optimizer).__name__}) have changed, and GradientNoise saw"
                    " no step of it: there is no noise. It sees updates by the method `step` of a torch optimizer."
                )

    def check_ratios(self, ratios: list[float], schedule: Schedule) -> None:
        """Warn if the signal-to-noise ratios of a logged step, and those before, are too low."""
        ratios = [ratio for ratio in ratios if ratio > 0]  # without a gradient no noise is small enough
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
