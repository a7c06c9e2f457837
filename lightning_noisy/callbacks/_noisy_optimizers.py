"""The noise of a Trainer's optimizers, which may be made anew during a fit."""

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
    """Attaches noise to optimizers, and keeps the state of those that leave.

    Args:
        make_handle: makes the noise of an optimizer, from it and its number.

    Attributes:
        attached: the present optimizers, in their order.
    """

    def __init__(self, make_handle: Callable[[Any, int], GradientNoiseHandle]) -> None:
        self.attached: list[Attached] = []
        self._make_handle = make_handle
        self._left: list[tuple[weakref.ref[Any], int]] = []  # optimizers that were here, and their numbers
        self._states: dict[int, dict[str, Any]] = {}  # of these numbers

    def follow(self, optimizers: Sequence[Any]) -> bool:
        """Attach the noise to the optimizers that there are now; whether they have changed.

        One that was here before goes on as it was. A new one has the number of its place, and goes on at the t of the
        optimizer that had it, unless that is still here.
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
        """The states of all that there are and were, by their numbers."""
        states = {**self._states, **{each.number: each.handle.state_dict() for each in self.attached}}
        return [states[number] for number in sorted(states)]

    def restore(self, states: list[dict[str, Any]], seed: int | None) -> None:
        """Go on with the states of a checkpoint, with this seed if there is one."""
        if not states:
            return  # written before there was a fit, by a tuner for one
        if len(states) != len(self.attached):
            rank_zero_warn(
                f"The checkpoint has gradient noise of {len(states)} optimizers, and there are {len(self.attached)}:"
                " their noise starts anew, at t = 0."
            )
            return
        for (_, _, handle), state in zip(self.attached, states, strict=True):
            if seed is not None and state["seed"] != seed:
                rank_zero_warn(
                    f"GradientNoise(seed={seed}) goes on from a checkpoint with seed {state['seed']}: the noise"
                    " continues at its t with the new seed. Use seed=None for the checkpoint's."
                )
                state = {**state, "seed": seed}
            handle.load_state_dict(state)

    def remove(self) -> None:
        """Take the noise off all optimizers."""
        for each in self.attached:
            self._states[each.number] = each.handle.state_dict()
            each.handle.remove()
        self.attached = []


def _distinct(optimizers: Sequence[Any]) -> list[Any]:
    """Without those that are listed twice, also inside of a wrapper that is listed."""
    found: list[Any] = []
    inside: list[Any] = []
    for optimizer in optimizers:
        target = updating(optimizer)
        if all(target is not other for other in inside):
            found.append(optimizer)
            inside.append(target)
    return found
