"""Warn of an optimizer that was made before the activations were replaced, and misses the new parameters."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_noisy._torch_internals import has_step_hooks

__all__ = ["watch"]


def watch(model: nn.Module, before: set[nn.Parameter]) -> None:
    """Warn at the first step of an optimizer that was made before the replacement, and misses the new parameters.

    An optimizer that is made later is not checked: it has the parameters that its user chose.

    Args:
        model: after the replacement.
        before: its parameters before.
    """
    new = set(model.parameters()) - before
    if not new:
        return
    look = _Look(model, new)
    for optimizer in _optimizers():
        # A wrapper without hooks is passed over: the optimizer inside has them.
        if has_step_hooks(optimizer) and not _trained([optimizer]).isdisjoint(before):
            optimizer.register_step_post_hook(look)


class _Look:
    """Checks each new parameter once: after the first optimizer step at which it has a gradient."""

    def __init__(self, model: nn.Module, new: Iterable[nn.Parameter]) -> None:
        self.model = weakref.ref(model)
        self.new = [weakref.ref(each) for each in new]  # no WeakSet, which compares tensors by their elements

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        model = self.model()
        if torch.compiler.is_compiling() or model is None:
            return
        used = {each for ref in self.new if (each := ref()) is not None and each.grad is not None}
        if not used:
            return
        untrained = used - _trained(_optimizers())
        self.new = [ref for ref in self.new if ref() is not None and ref() not in used]
        names = [name for name, each in model.named_parameters() if each in untrained]
        if not names or (torch.distributed.is_initialized() and torch.distributed.get_rank() > 0):
            return
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        warnings.warn(
            f"{type(optimizer).__name__} trains {type(model).__name__}, but not {', '.join(names[:5])}{more}: it was"
            " made before the activations were replaced. Replace them first, or add the new parameters by"
            " optimizer.add_param_group.",
            UserWarning,
            stacklevel=3,
        )


def _optimizers() -> list[Optimizer]:
    """All optimizers that are alive. Tested by type(): isinstance may run code of proxy objects."""
    return [each for each in gc.get_objects() if issubclass(type(each), Optimizer) and hasattr(each, "param_groups")]


def _trained(optimizers: Iterable[Optimizer]) -> set[nn.Parameter]:
    return {each for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]}
