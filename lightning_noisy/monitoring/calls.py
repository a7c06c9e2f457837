"""What the recorder needs of single calls: hooks that copies don't have, and the tensors that go in and out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from lightning_noisy._torch_internals import BatchNorm, is_recomputing, is_transforming
from lightning_noisy.functional.units import unit_dim_of
from lightning_noisy.replacement.sites import ActivationSite

__all__ = ["Hook", "clipped", "full_precision", "is_repeated", "local", "unit_dim_at"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CHANNEL_NORMS = (nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class Hook:
    """A hook that copies of the model don't have: a model may be copied or saved in the middle of a batch."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        return self._function(*args)

    def calls(self, owner: object) -> bool:
        """Whether it calls a method of an object."""
        function = self._function
        return getattr(getattr(function, "func", function), "__self__", None) is owner

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (_nothing,)


def _nothing(*_: Any) -> None:
    pass


def is_repeated() -> bool:
    """Whether this is no call of its own: a recomputation, a trace, or a part of a transform."""
    return is_recomputing() or torch.compiler.is_compiling() or is_transforming() or torch.jit.is_tracing()


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast on the device of x."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def local(x: Any) -> Tensor:
    """This rank's part of an activation, detached."""
    if isinstance(x, DTensor):
        if any(isinstance(each, Partial) for each in x.placements):
            raise ValueError("it is a sum that is still spread over ranks")
        x = x.to_local()
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ValueError(f"it isn't a floating-point tensor but {type(x).__name__}")
    x = x.detach()
    return x.view(1) if x.dim() == 0 else x  # type: ignore[no-any-return]


def unit_dim_at(model: nn.Module, site: ActivationSite) -> int | None:
    """The dimension of the units, as the layer before says; None if none does."""
    names = [*site.seen.feeders, site.batch_norm, site.seen.layer]
    for layer in (model.get_submodule(name) for name in names if name is not None):
        if isinstance(layer, (*_CONVOLUTIONS, *_CHANNEL_NORMS, BatchNorm)):
            return 1
        if isinstance(layer, (nn.Linear, nn.LayerNorm, nn.RMSNorm)):
            return -1
    return None


def clipped(unit_dim: int | None, dims: int) -> int:
    """The dimension of the units of a tensor with so many."""
    return unit_dim_of(dims, unit_dim if unit_dim is None or unit_dim < dims else None)
