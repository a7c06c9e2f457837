"""Save and restore the structure and the state of modules."""

from __future__ import annotations

from torch import nn

__all__ = ["Snapshot"]


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
