"""Save and restore the structure and the state of modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["Contents", "Snapshot"]


class Snapshot:
    """Saves classes, children and attributes of the modules of a model. Tensors are not copied."""

    def __init__(self, model: nn.Module) -> None:
        self._saved = [(each, each.__class__, dict(each.__dict__), dict(each._modules)) for each in model.modules()]

    def restore(self) -> None:
        """Restore the saved structure."""
        for module, cls, attributes, children in self._saved:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._modules.clear()
            module._modules.update(children)


class Contents:
    """Saves what a forward pass may change: attributes, buffers, and the contents of lists, dicts and sets."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._attributes = module, dict(module.__dict__)
        self._buffers = [(buffer, buffer.clone()) for buffer in module._buffers.values() if buffer is not None]
        values = [value for key, value in module.__dict__.items() if key not in _OF_TORCH]
        self._containers: list[tuple[Any, Any]] = [
            (value, value.copy()) for value in values if type(value) in (dict, list, set)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the saved state."""
        self._module.__dict__.clear()
        self._module.__dict__.update(self._attributes)
        for buffer, before in self._buffers:
            buffer.copy_(before)
        for container, was in self._containers:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(was)


_OF_TORCH = set(nn.Module().__dict__)
