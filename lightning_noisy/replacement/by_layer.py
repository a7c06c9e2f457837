"""One place that is passed after different layers: a module for each of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_noisy._torch_internals import StorageWeakRef, is_recomputing, storage_of

__all__ = ["ByLayer"]


class ByLayer(nn.Module):
    """Calls the module of the layer that ran last.

    A pass that nobody foresaw, such as one more of a loop, has the module of the layer before it, or the last one; the
    first such pass warns. One that activation checkpointing repeats without its layer is known by its input, which
    checkpointing has kept; if that was made anew, too, the passes are taken to be repeated from the last one on.

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
        self._passes: list[tuple[StorageWeakRef, int]] = []  # of the inputs, with the numbers of the modules
        self._is_repeating = False

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
        number = self.current
        if is_recomputing():
            number = self._repeated(input)
        elif not torch.compiler.is_compiling():
            self._note(input)
        if not self.is_fresh and not self.may_repeat:
            self.may_repeat = True
            warnings.warn(
                f"The activation {self.name!r} is passed more often than it was when the activations were replaced. The"
                " further passes share the module of the layer before them.",
                stacklevel=2,
            )
        self.is_fresh = False
        module: nn.Module = list(self._modules.values())[number]  # type: ignore[assignment]
        result: Tensor = module(input)
        return result

    def _note(self, input: Tensor) -> None:
        """Note which pass an input has."""
        if self._is_repeating or len(self._passes) > 10_000:
            self._passes = [each for each in self._passes if not each[0].expired()]
        self._is_repeating = False
        if (storage := storage_of(input)) is not None:
            self._passes.append((storage, self.current))

    def _repeated(self, input: Tensor) -> int:
        """The module of a pass that is repeated."""
        self._is_repeating = True
        storage = storage_of(input)
        for known, number in reversed(self._passes):
            if storage is not None and known == storage:
                self.is_fresh = True
                return number
        gone = [each for each in reversed(self._passes) if each[0].expired()]
        if self.is_again and (self.is_fresh or self.may_repeat):  # with its layer
            gone = [each for each in gone if each[1] == self.current]
        self.is_fresh = True
        if not gone:
            return self.current
        self._passes.remove(gone[0])
        return gone[0][1]

    def __len__(self) -> int:
        return len(self._modules)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_passes": []}


class _Note:
    """A hook; a class, so that it is copied and pickled with the model."""

    def __init__(self, place: ByLayer, number: int) -> None:
        self.place, self.number = place, number

    def __call__(self, *_: Any) -> None:
        self.place.current, self.place.is_fresh, self.place.is_again = self.number, True, is_recomputing()
