"""Noticing that an optimizer was made before the activations were replaced, and misses the new parameters."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["watch"]


def watch(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Warn at the first step of an optimizer of a model that was made before its new modules, and misses them.

    An optimizer that is made afterwards has the parameters that its user chose.
    """
    new = {parameter for module in modules for parameter in module.parameters()}
    if not new:
        return
    before = set(model.parameters()) - new
    looks = [id(None)]  # Lightning wraps optimizers by a class of theirs that shares their hooks
    for optimizer in _optimizers():
        hooks = getattr(optimizer, "_optimizer_step_post_hooks", None)  # None of wrappers: what they wrap has them
        if id(hooks) not in looks and not _trained([optimizer]).isdisjoint(before):
            looks.append(id(hooks))
            _Look(optimizer, model, new)


class _Look:
    """One look at an optimizer, after its first step at which the new parameters have gradients."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, new: Iterable[nn.Parameter]) -> None:
        self.model = weakref.ref(model)
        self.new = weakref.WeakSet(new)
        optimizer.register_step_post_hook(self)  # which a hook can't remove while they are called

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        model = self.model()
        if torch.compiler.is_compiling() or model is None or all(each.grad is None for each in self.new):
            return
        untrained = set(self.new) - _trained(_optimizers())
        self.new.clear()
        names = [name for name, each in model.named_parameters() if each in untrained and each.grad is not None]
        if not names or (torch.distributed.is_initialized() and torch.distributed.get_rank() > 0):
            return
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        warnings.warn(
            f"{type(optimizer).__name__} trains {type(model).__name__}, but not {', '.join(names[:5])}{more}: it was"
            " made before the activations were replaced. Replace first, or add what is new by"
            " optimizer.add_param_group.",
            UserWarning,
            stacklevel=3,
        )


def _optimizers() -> list[Optimizer]:
    """All that there are. By their types: objects that pose as others run code of theirs when isinstance asks."""
    return [each for each in gc.get_objects() if issubclass(type(each), Optimizer) and hasattr(each, "param_groups")]


def _trained(optimizers: Iterable[Optimizer]) -> set[nn.Parameter]:
    return {each for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]}
