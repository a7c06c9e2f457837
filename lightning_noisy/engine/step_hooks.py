"""Hooks on the steps of optimizers of any make: once a step, after the gradients have got their final values."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch.optim import Optimizer

__all__ = ["StepHooks", "stepping_optimizer"]


def stepping_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer that updates the parameters: the one inside, if ``optimizer`` is a wrapper around another.

    A wrapper may step under other names (the ``first_step`` and ``second_step`` of SAM), at some calls only
    (accelerate's ``AcceleratedOptimizer``), without hooks (timm's ``Lookahead`` calls no ``super().__init__``), or be
    no torch optimizer. What it holds is the optimizer inside if it is the only one, and has the same parameters.

    Raises:
        TypeError: if ``optimizer`` neither is nor holds a torch optimizer.
    """
    found = _inside(optimizer, [])
    if not isinstance(found, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, or hold one, got {optimizer!r}.")
    return found


def _inside(optimizer: Any, seen: list[Any]) -> Any:
    seen = [*seen, optimizer]
    held = [each for each in getattr(optimizer, "__dict__", {}).values() if isinstance(each, Optimizer)]
    # By what is inside of them: LightningOptimizer also has the attributes of what it wraps.
    found = {_inside(each, seen) for each in held if all(each is not other for other in seen)}
    if len(found) == 1 and _parameters(*found) == _parameters(optimizer):
        return found.pop()
    return optimizer


def _parameters(optimizer: Any) -> set[int]:
    return {id(parameter) for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]}


class StepHooks:
    """Calls functions with the optimizer when it takes a step.

    Args:
        optimizer: any torch optimizer.
        begin: called when a step begins.
        gradients: called when its gradients are final: at once, or after each evaluation of the closure.
        end: called when the step has ended, but not if it raised.

    Raises:
        TypeError: if the optimizer's class runs no hooks, and can't be made to.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        begin: Callable[[Optimizer], None],
        gradients: Callable[[Optimizer], None],
        end: Callable[[Optimizer], None],
    ) -> None:
        self._begin, self._gradients, self._end = begin, gradients, end
        self._frame: FrameType | None = None  # what runs the step under way
        _run_hooks(optimizer)
        self._handles = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    def remove(self) -> None:
        """Remove the hooks; again has no effect."""
        for handle in self._handles:
            handle.remove()
        self._frame = None

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # A subclass whose step() calls super().step() fires the hooks again, inside: torch wraps both methods.
        # The first call's frame tells: it is still running. (A flag would stay up after an exception.)
        caller = sys._getframe(1)
        if self._frame is not None and _is_running(self._frame, caller):
            return None
        self._frame = caller
        self._begin(optimizer)
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._gradients(optimizer)
            return None

        # Backward and clipping happen in the closure, which LBFGS and line searches evaluate several times.
        def closure_and_hook(*args: Any, **kwargs: Any) -> Any:
            result = closure(*args, **kwargs)
            self._gradients(optimizer)
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_and_hook}
        return (args[0], closure_and_hook, *args[2:]), kwargs

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._frame is sys._getframe(1):
            self._frame = None
            self._end(optimizer)


def _run_hooks(optimizer: Optimizer) -> None:
    """See to it that the optimizer's ``step`` runs the optimizer's hooks.

    torch wraps the method of the class in ``Optimizer.__init__``, or, where that isn't called, at the first
    ``zero_grad``; and it leaves out a method that has taken over the mark of a wrapped one, as by ``functools.wraps``.
    """
    cls = type(optimizer)
    if not all(hasattr(optimizer, f"_optimizer_step_{when}_hooks") for when in ("pre", "post")):
        raise TypeError(
            f"{cls.__name__} has no hooks for its steps, since its __init__ doesn't call Optimizer.__init__. Call that"
            " there, or add the noise to the optimizer that it wraps."
        )
    if not _is_wrapped(cls.step):
        cls.step = Optimizer.profile_hook_step(cls.step)  # type: ignore[assignment, method-assign]
        cls.step.hooked = True  # type: ignore[attr-defined]  # torch's own mark
    # A learning-rate scheduler has put a function of its own around the method as it was before.
    own = vars(optimizer).get("step")
    if own is not None and getattr(own, "__wrapped__", None) is cls.step.__wrapped__:  # type: ignore[attr-defined]
        hooked = Optimizer.profile_hook_step(lambda _, *args, **kwargs: own(*args, **kwargs))
        optimizer.step = functools.update_wrapper(functools.partial(hooked, optimizer), own)  # type: ignore[method-assign]


def _is_wrapped(step: Any) -> bool:
    """Whether a function is one that torch has made to run hooks: all of these have the same code."""
    return getattr(step, "__code__", None) is Optimizer.profile_hook_step(Optimizer.step).__code__


def _is_running(frame: FrameType, inner: FrameType | None) -> bool:
    """Whether ``frame`` is ``inner`` or one of its callers."""
    while inner is not None and inner is not frame:
        inner = inner.f_back
    return inner is not None
