"""From the old activation to the new one by degrees, so that a trained model isn't thrown off at once."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_noisy._torch_internals import HOOKS

__all__ = ["blended", "set_blend", "start_blend"]


class _Blend:
    """Hooks of a module that make its output (1 - b) old(x) + b new(x); its state dict stays as it is."""

    def __init__(self, old: nn.Module) -> None:
        self.old = old
        self._input: Tensor | None = None

    def keep(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Keep the input of a module that works in place."""
        self._input = arguments[0].clone()

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        x, self._input = arguments[0] if self._input is None else self._input, None
        self.old.train(module.training)
        result = torch.lerp(self.old(x), output, module.get_buffer("blend").to(output.dtype))
        return output.copy_(result) if getattr(module, "inplace", False) else result


def start_blend(module: nn.Module, old: nn.Module) -> None:
    """Let a module give what another one gave, until :func:`set_blend` says otherwise.

    Args:
        module: the new activation.
        old: the one that it replaces, of which a copy is used. Its parameters, if any, are not trained.
    """
    old = copy.deepcopy(old).requires_grad_(False)
    for each in old.modules():
        for name in HOOKS:
            getattr(each, name).clear()
        if hasattr(each, "inplace"):
            each.inplace = False  # type: ignore[assignment]
    like = next(iter((*module.parameters(), *module.buffers())), torch.zeros(()))
    module.register_buffer("blend", torch.zeros((), device=like.device), persistent=False)
    hook = _Blend(old)
    handles = [module.register_forward_hook(hook, prepend=True)]
    if getattr(module, "inplace", False):
        handles.append(module.register_forward_pre_hook(hook.keep))
    module.__dict__["_blending"] = handles


def blended(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that are blended with old ones, by path."""
    return {path: module for path, module in model.named_modules() if "_blending" in module.__dict__}


def set_blend(module: nn.Module, value: float) -> None:
    """Set b. At 1 the old activation is gone, and so is its cost.

    Raises:
        ValueError: if it isn't in [0, 1].
    """
    if not 0 <= value <= 1:
        raise ValueError(f"blend must be in [0, 1], got {value}.")
    if value < 1:
        module.get_buffer("blend").fill_(value)
        return
    for handle in module.__dict__.pop("_blending"):
        handle.remove()
    del module.blend
