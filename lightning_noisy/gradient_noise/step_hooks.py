"""Hooks on the steps of any optimizer: called once per step, when the gradients have their final values."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_noisy._torch_internals import has_step_hooks, step_pre_hooks

__all__ = ["StepHooks", "stepping_optimizer"]


def stepping_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer that updates the parameters: the one inside, if ``optimizer`` is a wrapper around another.

    A wrapper may step under other names (the ``first_step`` and ``second_step`` of SAM), at some calls only
    (accelerate's ``AcceleratedOptimizer``), without hooks (timm's ``Lookahead`` calls no ``super().__init__``), or be
    no torch optimizer. An optimizer that it holds is the inner one if it is the only one, with the same parameters.

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
    # By their inner optimizers: LightningOptimizer also has the attributes of the one that it wraps.
    found = {_inside(each, seen) for each in held if all(each is not other for other in seen)}
    if len(found) == 1 and _parameters(*found) == _parameters(optimizer):
        return found.pop()
    return optimizer


def _parameters(optimizer: Any) -> set[int]:
    return {id(parameter) for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]}


class StepHooks:
    """Calls functions with the optimizer when it takes a step, or a wrapper around it does.

    Args:
        wrapper: any optimizer.
        optimizer: the one inside it, from :func:`stepping_optimizer`; may be the same.
        begin: called when a step begins.
        gradients: called when its gradients are final: at once, or after each evaluation of the closure that ran a
            backward pass; with True in a nested step, of its base class or of the inner optimizer.
        end: called when the step has ended, but not if it raised.

    Raises:
        TypeError: if the optimizer's class runs no hooks, and can't be made to.
    """

    def __init__(
        self,
        wrapper: Any,
        optimizer: Optimizer,
        *,
        begin: Callable[[Optimizer], None],
        gradients: Callable[[Optimizer, bool], None],
        end: Callable[[Optimizer], None],
    ) -> None:
        self._begin, self._gradients, self._end = begin, gradients, end
        self._optimizer = weakref.ref(optimizer)
        _run_hooks(optimizer)
        self._handles: list[Any] = []
        self._hook(optimizer)
        # A wrapper may also update the parameters by itself.
        if wrapper is optimizer or not isinstance(wrapper, Optimizer) or not has_step_hooks(wrapper):
            return
        if _is_wrapped(type(wrapper).step) and self._before_step not in step_pre_hooks(wrapper):
            count = len(step_pre_hooks(optimizer))
            self._hook(wrapper)
            if len(step_pre_hooks(optimizer)) > count:  # it hands them over to the one inside, which has them already
                for handle in self._handles[-2:]:
                    handle.remove()

    def _hook(self, optimizer: Optimizer) -> None:
        self._handles += [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Remove the hooks; calling it again has no effect."""
        for handle in self._handles:
            handle.remove()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        main = self._optimizer()
        assert main is not None
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if self._is_inside():
            if not callable(closure):
                self._gradients(main, True)
            return None
        self._begin(main)
        if not callable(closure):
            self._gradients(main, False)
            return None
        evaluations = 0

        # The backward pass and clipping run in the closure, which LBFGS and line searches evaluate several times.
        def closure_and_hook(*args: Any, **kwargs: Any) -> Any:
            nonlocal evaluations
            backward = _Backward(main) if evaluations else None
            evaluations += 1
            result = closure(*args, **kwargs)
            if backward is None or backward.came():
                self._gradients(main, False)
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_and_hook}
        return (args[0], closure_and_hook, *args[2:]), kwargs

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        main = self._optimizer()
        if main is not None and not self._is_inside():
            self._end(main)

    def _is_inside(self) -> bool:
        """Whether torch's call that fired a hook is nested in another one for the same step.

        A subclass whose step() calls super().step() fires the hooks twice, since torch wraps both methods; so does a
        wrapper that calls the inner optimizer. (A flag would stay set after an exception, and a stored frame would keep
        its callers' variables alive.)
        """
        frame: Any = inspect.currentframe()
        frame = frame.f_back.f_back  # the hook's caller
        outer = frame.f_back
        while outer is not None:
            if outer.f_code is frame.f_code and self in map(_owner, step_pre_hooks(outer.f_locals.get("self"))):
                return True
            outer = outer.f_back
        return False


class _Backward:
    """Detects a backward pass after its construction, by a sample of an optimizer's parameters."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __init__(self, optimizer: Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        sample = parameters[:: 1 + len(parameters) // 16]
        # Sharding assigns gradients itself, without these hooks.
        self._gradients = [(p, None if p.grad is None else weakref.ref(p.grad)) for p in sample]
        self._came = False
        self._handles = [p.register_post_accumulate_grad_hook(self._note) for p in sample]

    def _note(self, _: Any) -> None:
        self._came = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def came(self) -> bool:
        """Whether there was one; removes the hooks."""
        for handle in self._handles:
            handle.remove()
        return self._came or any(p.grad is not (then and then()) for p, then in self._gradients)


def _owner(hook: Any) -> Any:
    return getattr(hook, "__self__", None)


def _run_hooks(optimizer: Optimizer) -> None:
    """Ensure that the optimizer's ``step`` runs the optimizer's hooks.

    torch wraps the method of the class in ``Optimizer.__init__``, or, if that isn't called, at the first
    ``zero_grad``; it skips a method that has copied the mark of a wrapped one, such as by ``functools.wraps``.
    """
    cls = type(optimizer)
    if not has_step_hooks(optimizer):
        raise TypeError(
            f"{cls.__name__} has no hooks for its steps, since its __init__ doesn't call Optimizer.__init__. Call it"
            " there, or add the noise to the optimizer that it wraps."
        )
    if not _is_wrapped(cls.step):
        cls.step = Optimizer.profile_hook_step(cls.step)  # type: ignore[assignment, method-assign]
        cls.step.hooked = True  # type: ignore[attr-defined]  # torch's own mark
    # A learning-rate scheduler has wrapped the method as it was before.
    own = vars(optimizer).get("step")
    if own is not None and getattr(own, "__wrapped__", None) is cls.step.__wrapped__:  # type: ignore[attr-defined]
        hooked = Optimizer.profile_hook_step(lambda _, *args, **kwargs: own(*args, **kwargs))
        optimizer.step = functools.update_wrapper(functools.partial(hooked, optimizer), own)  # type: ignore[method-assign]


def _is_wrapped(step: Any) -> bool:
    """Whether torch wrapped a function to run hooks: all of its wrappers share one code object."""
    return getattr(step, "__code__", None) is Optimizer.profile_hook_step(Optimizer.step).__code__
