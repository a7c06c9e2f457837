"""The noise of a Trainer's optimizers, which may be replaced during a fit."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_noisy.gradient_noise.handle import GradientNoiseHandle, updating

__all__ = ["Attached", "NoisyOptimizers"]


class Attached(NamedTuple):
    """An optimizer of the Trainer, its number among those of the fit, and its noise."""

    optimizer: Any
    number: int
    handle: GradientNoiseHandle


class NoisyOptimizers:
    """Attaches noise to optimizers, and keeps the state of those that are removed.

    Args:
        make_handle: attaches noise to an optimizer, given it and its number.

    Attributes:
        attached: the current optimizers, in order.
    """

    def __init__(self, make_handle: Callable[[Any, int], GradientNoiseHandle]) -> None:
        self.attached: list[Attached] = []
        self._make_handle = make_handle
        self._left: list[tuple[weakref.ref[Any], int]] = []  # removed optimizers, and their numbers
        self._states: dict[int, dict[str, Any]] = {}  # by number

    def follow(self, optimizers: Sequence[Any]) -> bool:
        """Attach the noise to the current optimizers; return whether they have changed.

        One that was attached before keeps its state. A new one gets the number of its position, and continues at the t
        of the optimizer that had this number, unless that is still attached.
        """
        optimizers = _distinct(optimizers)
        present = [each.optimizer for each in self.attached]
        if len(optimizers) == len(present) and all(map(operator.is_, optimizers, present)):
            return False
        numbers = [self._number_of(optimizer) for optimizer in optimizers]
        self._left += [(weakref.ref(each.optimizer), each.number) for each in self.attached]
        self.remove()
        for place, optimizer in enumerate(optimizers):
            number = numbers[place]
            if number is None:
                candidates = (place, *range(len(optimizers) + len(self._left)))
                number = numbers[place] = next(i for i in candidates if i not in numbers)
            handle = self._make_handle(optimizer, number)
            if number in self._states:
                handle.load_state_dict(self._states[number])
            self.attached.append(Attached(optimizer, number, handle))
        self._left = [(of, number) for of, number in self._left if of() is not None and number not in numbers]
        return True

    def _number_of(self, optimizer: Any) -> int | None:
        known = [(each.optimizer, each.number) for each in self.attached]
        known += [(of(), number) for of, number in self._left]
        return next((number for other, number in known if other is optimizer), None)

    def states(self) -> list[dict[str, Any]]:
        """The states of all current and removed optimizers, ordered by number."""
        states = {**self._states, **{each.number: each.handle.state_dict() for each in self.attached}}
        return [states[number] for number in sorted(states)]

    def restore(self, states: list[dict[str, Any]], seed: int | None) -> None:
        """Continue from the states of a checkpoint, with this seed if it is not None."""
        if not states:
            return  # written before a fit, such as by a Tuner
        if len(states) != len(self.attached):
            rank_zero_warn(
                f"The checkpoint has gradient noise of {len(states)} optimizers, and there are {len(self.attached)}:"
                " their noise restarts at t = 0."
            )
            return
        for (_, _, handle), state in zip(self.attached, states, strict=True):
            if seed is not None and state["seed"] != seed:
                rank_zero_warn(
                    f"GradientNoise(seed={seed}) resumes from a checkpoint with seed {state['seed']}: the noise"
                    " continues at its t with the new seed. Use seed=None for the checkpoint's."
                )
                state = {**state, "seed": seed}
            handle.load_state_dict(state)

    def remove(self) -> None:
        """Remove the noise from all optimizers."""
        for each in self.attached:
            self._states[each.number] = each.handle.state_dict()
            each.handle.remove()
        self.attached = []


def _distinct(optimizers: Sequence[Any]) -> list[Any]:
    """The optimizers without duplicates; a wrapper and the optimizer inside it count as one."""
    found: list[Any] = []
    inside: list[Any] = []
    for optimizer in optimizers:
        target = updating(optimizer)
        if all(target is not other for other in inside):
            found.append(optimizer)
            inside.append(target)
    return found
