"""Noticing that an optimizer was made before the activations were replaced, and misses the new parameters."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["watch"]

_MOST_STEPS = 100


class _Watch:
    """Looks at the first steps of the optimizers that train a model, until they train all of its new modules."""

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)
        self.new: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.is_done = False
        self._trained: set[nn.Parameter] = set()  # by optimizers that have stepped
        self._stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._others: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._steps = 0

    def look(self, optimizer: Optimizer) -> list[str]:
        """Take in a step of an optimizer; names of the parameters that are missed."""
        model = self.model()
        self.is_done = model is None
        if model is None or type(optimizer).__hash__ is None or optimizer in self._others:
            return []
        named = {name: each for name, each in model.named_parameters() if each.requires_grad}
        theirs = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        if theirs.isdisjoint(named.values()):
            self._others.add(optimizer)
            return []
        inside = {parameter for module in self.new for parameter in module.parameters()}
        self._trained |= theirs
        self._steps += 1
        left = {name: each for name, each in named.items() if each not in self._trained}
        new = [name for name, each in left.items() if each in inside]
        self.is_done = not new or self._steps == _MOST_STEPS
        # Only where all else that has a gradient is trained: it may be a choice, or another optimizer's turn. Some
        # optimizers are for matrices alone, and leave what has one dimension to another one.
        missed = [name for name, each in left.items() if each.grad is not None]
        takes_any = any(parameter.dim() < 2 for parameter in self._trained) or optimizer in self._stepped
        self._stepped.add(optimizer)
        if not missed or not takes_any or not set(missed) <= set(new):
            return []
        self.is_done = True
        return missed


_watches: list[_Watch] = []
_hooks: list[Any] = []


def watch(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Warn at the first steps of an optimizer that trains everything in a model but its new modules."""
    mine = next((each for each in _watches if each.model() is model), None) or _Watch(model)
    mine.new.update(modules)
    _watches[:] = [*(each for each in _watches if each is not mine and each.model() is not None), mine]
    if not _hooks:  # of all optimizers: which of them will train the model isn't known
        _hooks.append(register_optimizer_step_post_hook(_look))


def _look(optimizer: Optimizer, *_: Any) -> None:
    if not _watches or torch.compiler.is_compiling():
        return
    found = [(each.model(), names) for each in _watches if (names := each.look(optimizer))]
    _watches[:] = [each for each in _watches if not each.is_done]
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return
    for model, names in found:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        warnings.warn(
            f"{type(optimizer).__name__} trains {type(model).__name__}, but not {', '.join(names[:5])}{more}: it was"
            " made before the activations were replaced, or without them. Replace first, or add what is new by"
            " optimizer.add_param_group.",
            UserWarning,
            stacklevel=3,
        )
