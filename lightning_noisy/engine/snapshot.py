"""The structure of a model, to be put back."""

from __future__ import annotations

from torch import nn

__all__ = ["Snapshot"]


class Snapshot:
    """Remembers classes, children and attributes of the modules of a model. Tensors are not copied."""

    def __init__(self, model: nn.Module) -> None:
        self._saved = [(each, each.__class__, dict(each.__dict__), dict(each._modules)) for each in model.modules()]

    def restore(self) -> None:
        """Put back what was there."""
        for module, cls, attributes, children in self._saved:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._modules.clear()
            module._modules.update(children)
