"""Locate the shards of parameters in torch's first FSDP (`FullyShardedDataParallel`)."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

__all__ = ["flat_shards"]


def flat_shards(model: nn.Module) -> dict[nn.Parameter, int]:
    """For each parameter that is a flat shard, the index of its first element in the full parameter.

    FSDP flattens the parameters of a module into one vector and gives each rank a contiguous part of it; with
    ``use_orig_params=True`` a parameter is then the flattened piece of itself in that part.

    Args:
        model: any module.

    Returns:
        The indices by parameter; empty for a model without FSDP.

    Raises:
        TypeError: if a module was wrapped with ``use_orig_params=False``, where parameters have no names.
    """
    shards: dict[nn.Parameter, int] = {}
    for module in model.modules():
        handle = getattr(module, "_handle", None)
        if not isinstance(module, FullyShardedDataParallel) or handle is None or not handle.uses_sharded_strategy:
            continue
        flat = handle.flat_param
        if flat._params is None:
            raise TypeError("Gradient noise needs the names of parameters: wrap with FSDP(use_orig_params=True).")
        for parameter, info in zip(flat._params, flat._shard_param_infos, strict=True):
            shards[parameter] = info.intra_param_start_idx or 0
    return shards
