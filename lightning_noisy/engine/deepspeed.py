"""Where DeepSpeed's optimizers have the elements of the parameters.

They give an optimizer of torch flat vectors, one for each parameter group, or several, of which a rank may have a part,
and with ZeRO call its ``step`` for one vector after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Fragment", "base_optimizer", "fragments", "parameters", "whole_shape"]


class Fragment:
    """Consecutive elements of a parameter that lie in a flat vector; to a plan it is a parameter.

    Args:
        flat: the vector, whose gradient has its gradient.
        offset: its first element there.
        count: how many there are.
        start: its first element in the parameter.
    """

    def __init__(self, flat: Tensor, offset: int, count: int, start: int) -> None:
        self.start = start
        self._flat = flat
        self._part = slice(offset, offset + count)

    def numel(self) -> int:
        """How many elements there are."""
        return self._part.stop - self._part.start

    @property
    def grad(self) -> Tensor | None:
        """Their gradient, a view of that of the vector."""
        gradient = self._flat.grad
        if gradient is None or gradient.numel() == self.numel():
            return gradient
        return gradient.view(-1)[self._part]


def base_optimizer(optimizer: Any) -> Optimizer | None:
    """The optimizer of torch to which one of DeepSpeed's gives flat vectors.

    By then gradients are summed over micro-batches and ranks, unscaled, clipped, and known to be finite.

    Args:
        optimizer: any.

    Returns:
        None if it is none of DeepSpeed's.

    Raises:
        TypeError: if it is one where the elements can't be found, or are updated by something else as well.
    """
    if isinstance(optimizer, Optimizer) or not type(optimizer).__module__.startswith("deepspeed."):
        return None
    inner = getattr(optimizer, "optimizer", None)
    if _layout(optimizer) is None or not isinstance(inner, Optimizer):
        raise TypeError(
            f"Gradient noise can't find the parameters in DeepSpeed's {type(optimizer).__name__}. Use ZeRO."
        )
    beside = ("zenflow", "backup_optimizer", "superoffload_cpu_optimizer", "fused_adam_legacy", "fused_lamb_legacy")
    if any(getattr(optimizer, name, False) for name in beside):
        raise TypeError(
            "Gradient noise doesn't reach what DeepSpeed updates beside the optimizer. Configure it without ZenFlow,"
            ' SuperOffload and "legacy_fusion", and with an offload_optimizer of "ratio": 1.0.'
        )
    return inner


def fragments(optimizer: Any) -> dict[Tensor, list[tuple[nn.Parameter, Fragment]]]:
    """The flat vectors of this rank, and what they have of which parameters.

    Args:
        optimizer: one of DeepSpeed's, for which :func:`base_optimizer` has found the inner one.

    Returns:
        By vector, in their order. Padding belongs to no parameter.
    """
    layout = _layout(optimizer)
    assert layout is not None
    vectors, groups, of_group = layout
    found = {}
    for vector, group in zip(getattr(optimizer, vectors), getattr(optimizer, groups), strict=True):
        if isinstance(vector, Tensor):
            found[vector] = of_group(vector, group)
        else:  # each parameter has its own
            found.update({each: of_group(each, [p]) for each, p in zip(vector, group, strict=True)})
    return found


def parameters(optimizer: Any) -> list[nn.Parameter]:
    """The parameters of all ranks, of one of DeepSpeed's optimizers as in :func:`fragments`."""
    layout = _layout(optimizer)
    assert layout is not None
    return [parameter for group in getattr(optimizer, layout[1]) for parameter in group]


@contextmanager
def whole_shape(parameter: Any) -> Iterator[nn.Parameter]:
    """The parameter, with its whole shape also where ZeRO 3 has partitioned it; its values are not there then."""
    shape = getattr(parameter, "ds_shape", None)
    values = parameter.data
    if shape is not None and values.shape != shape:
        parameter.data = values.new_empty(()).expand(shape)
    try:
        yield parameter
    finally:
        parameter.data = values


def _of_partitions(flat: Tensor, group: list[Any]) -> list[tuple[nn.Parameter, Fragment]]:
    """ZeRO 3: each parameter is flattened, padded, and cut in equal parts, one for each rank."""
    found, offset = [], 0
    for parameter in group:
        size = parameter.partition_numel()
        start = size * torch.distributed.get_rank(parameter.ds_process_group)
        if start < parameter.ds_numel:
            found.append((parameter, Fragment(flat, offset, min(size, parameter.ds_numel - start), start)))
        offset += size
    return found


def _of_mapping(flat: Tensor, group: list[Any]) -> list[tuple[nn.Parameter, Fragment]]:
    """ZeRO 1 and 2: the parameters of a group are flattened into one vector, which is cut in equal parts."""
    found = []
    for parameter in group:
        mapping = parameter._hp_mapping  # None if this rank has nothing of it
        if mapping is not None:
            inside, outside = mapping.hp_fragment_address, mapping.lp_fragment_address
            found.append((parameter, Fragment(flat, inside.start, inside.numel, outside.start)))
    return found


def _in_sequence(flat: Tensor, group: list[Any]) -> list[tuple[nn.Parameter, Fragment]]:
    """Half precision without ZeRO: one after the other, on each rank."""
    found, offset = [], 0
    for parameter in group:
        found.append((parameter, Fragment(flat, offset, parameter.numel(), 0)))
        offset += parameter.numel()
    return found


def _layout(optimizer: Any) -> tuple[str, str, Callable[..., list[tuple[nn.Parameter, Fragment]]]] | None:
    """The attributes that have the vectors and the parameters of each, and how these lie in it."""
    layouts = (
        ("fp32_partitioned_groups_flat", "fp16_groups", _of_partitions),
        ("single_partition_of_fp32_groups", "bit16_groups", _of_mapping),
        ("fp32_groups_flat_partition", "bf16_groups", _of_mapping),
        ("fp32_groups_flat", "fp16_groups", _in_sequence),
        ("fp32_groups", "fp16_groups", _in_sequence),
    )
    return next((layout for layout in layouts if hasattr(optimizer, layout[0])), None)
