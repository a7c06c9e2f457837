"""Warnings of missing gradient noise, and of steps that are nearly all noise."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.nn.parameter import is_lazy

from lightning_noisy._torch_internals import version
from lightning_noisy.callbacks._noisy_optimizers import Attached
from lightning_noisy.schedules import InverseDecay, Schedule

__all__ = ["NoiseWatch"]

# The signal-to-noise ratio is too low if it is below LOW_RATIO at all logged steps, up to the fifth and to t = 200.
# (Later it doesn't matter: a model that has converged has small gradients.)
LOW_RATIO = 0.02
LOW_STEPS = 5
LOW_UNTIL = 200


class NoiseWatch:
    """Watches one fit, and gives each warning at most once.

    Attributes:
        noisy: the indices of the optimizers whose gradients have received noise.
    """

    def __init__(self) -> None:
        self.noisy: set[int] = set()
        self._versions: dict[int, list[tuple[Any, int]]] = {}  # of some parameters of each optimizer
        self._low_steps: int | None = 0  # None once decided

    def begin(self, index: int, parameters: list[Any]) -> None:
        """Register the parameters of an optimizer that are to get noise, before it steps."""
        sample = parameters[:: 1 + len(parameters) // 16]
        self._versions[index] = [(p, version(p)) for p in sample if not is_lazy(p)]

    def check_steps(self, attached: list[Attached]) -> None:
        """Warn of optimizers that have changed their parameters without noise."""
        for optimizer, index, _ in attached:
            if index in self.noisy:
                self._versions.pop(index, None)
            elif any(version(parameter) != count for parameter, count in self._versions.get(index, [])):
                del self._versions[index]
                rank_zero_warn(
                    f"Parameters of optimizer {index} ({type(optimizer).__name__}) have changed, and GradientNoise saw"
                    " no step of it: there is no noise. It sees only updates by the `step` method of a torch optimizer."
                )

    def check_ratios(self, ratios: list[float], step: int, schedule: Schedule) -> None:
        """Warn if the signal-to-noise ratios are too low from the first logged step on; ``step`` is the current t."""
        ratios = [ratio for ratio in ratios if ratio > 0]  # 0 means that there is no gradient
        if not ratios or self._low_steps is None:
            return
        self._low_steps += 1
        is_resumed = self._low_steps == 1 and step > LOW_UNTIL
        if not min(ratios) < LOW_RATIO or is_resumed:
            self._low_steps = None
        elif self._low_steps >= LOW_STEPS and step >= LOW_UNTIL:
            smaller = f"less than {schedule!r}"
            if isinstance(schedule, InverseDecay):
                smaller = f"eta={schedule.eta / 100:g} in place of {schedule.eta:g}"
            rank_zero_warn(
                f"gradient_noise/snr has been below {LOW_RATIO} at all {self._low_steps} logged steps so far, now"
                f" {min(ratios):.3g}: the steps are nearly all noise. If the loss doesn't fall, take {smaller}, or"
                " relative=True, eta=1.0, which starts at a ratio of 1."
            )
            self._low_steps = None
