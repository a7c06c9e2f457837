"""The base class of the metrics: sums that one reduction merges exactly over batches and processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["PooledMetric", "checked_units", "same_shape", "sum_dtype", "wide"]


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums: float64, in which sums of squares are safe; float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide(x: Tensor) -> Tensor:
    """Without gradient, in float32 or better."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


class PooledMetric(Metric):
    """A metric whose states are sums. They keep their dtype whatever the dtype of the model that holds the metric."""

    full_state_update = False
    is_differentiable = False

    def add_sums(self, name: str, *shape: int) -> None:
        """Add a state of floats."""
        dtype = sum_dtype(torch.get_default_device())
        self.add_state(name, default=torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def add_counts(self, name: str, *shape: int) -> None:
        """Add a state of integers."""
        self.add_state(name, default=torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        # The hook of torch's and torchmetrics' for moves and casts. `module.to(torch.bfloat16)`, as Lightning's
        # "bf16-true" does it, would round the sums to three digits; a move to MPS would fail.
        def keep(tensor: Tensor) -> Tensor:
            if tensor.is_meta or not tensor.is_floating_point():
                return fn(tensor)
            device = fn(torch.empty(0, device=tensor.device)).device
            return tensor.to(device, sum_dtype(device))

        return super()._apply(keep, *args, **kwargs)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw a value, or several as steps.

        Args:
            val: what ``compute`` or ``forward`` returned, or a list of these; by default the value now.
            ax: matplotlib's axes; by default in a new figure.

        Returns:
            The figure (None if ``ax`` is given) and the axes.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        return self._plot(val, ax)


def same_shape(**tensors: Tensor) -> bool:
    """Whether there is something to add; the shapes must be equal.

    Raises:
        ValueError: if they aren't.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{' and '.join(shapes)} must have the same shape, got {shapes}.")
    return all(tensor.numel() for tensor in tensors.values())


def checked_units(num_units: int) -> int:
    """The number of units, if it is one.

    Raises:
        ValueError: if it isn't.
    """
    if not isinstance(num_units, int) or num_units < 1:
        raise ValueError(f"num_units must be an integer >= 1, got {num_units!r}.")
    return num_units
