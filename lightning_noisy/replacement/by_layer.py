"""One place that is passed after different layers: a module for each of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_noisy._torch_internals import is_recomputing

__all__ = ["ByLayer"]


class ByLayer(nn.Module):
    """Calls the module of the layer that ran last.

    A pass that nobody foresaw, such as one more of a loop, has the module of the layer before it, or the last one; the
    first such pass warns.

    Args:
        modules: one for each layer, in the order in which they were met.
        name: of the place.
        may_repeat: whether several passes may follow one call of a layer.
    """

    def __init__(self, modules: Sequence[nn.Module], name: str, *, may_repeat: bool = False) -> None:
        super().__init__()
        for number, module in enumerate(modules, start=1):
            self.add_module("first" if number == 1 else f"pass{number}", module)
        self.name, self.may_repeat = name, may_repeat
        self.current, self.is_fresh, self.is_again = 0, True, False

    def follow(self, layers: Sequence[nn.Module | None], root: nn.Module) -> list[Any]:
        """Note from now on which layer runs; returns the handles of the hooks.

        Args:
            layers: for each module the layer that it follows; None for the start of a pass.
            root: where a pass starts.
        """
        handles = []
        for number, layer in enumerate(layers):
            register = root.register_forward_pre_hook if layer is None else layer.register_forward_hook
            handles.append(register(_Note(self, number)))
        return handles

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation of this pass."""
        if is_recomputing() and not self.is_again:
            raise RuntimeError(
                f"The activation {self.name!r}, which has a module for each layer before it, is repeated by"
                " checkpointing without that layer, and which one it was can't be known. Checkpoint the layer, too."
            )
        if not self.is_fresh and not self.may_repeat:
            self.may_repeat = True
            warnings.warn(
                f"The activation {self.name!r} is passed more often than it was when the activations were replaced. The"
                " further passes share the module of the layer before them.",
                stacklevel=2,
            )
        self.is_fresh = False
        module: nn.Module = list(self._modules.values())[self.current]  # type: ignore[assignment]
        result: Tensor = module(input)
        return result


class _Note:
    """A hook; a class, so that it is copied and pickled with the model."""

    def __init__(self, place: ByLayer, number: int) -> None:
        self.place, self.number = place, number

    def __call__(self, *_: Any) -> None:
        self.place.current, self.place.is_fresh, self.place.is_again = self.number, True, is_recomputing()
