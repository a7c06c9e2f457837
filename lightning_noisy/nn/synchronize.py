"""Statistics of normalized activations, pooled over the ranks."""

from __future__ import annotations

import torch
from torch import nn

from lightning_noisy.nn.normalized import NormalizedActivation

__all__ = ["synchronize_statistics", "synchronized_activations"]


def synchronized_activations(model: nn.Module) -> list[NormalizedActivation]:
    """The normalized activations of a model that were made with ``synchronized=True``."""
    return [module for module in model.modules() if isinstance(module, NormalizedActivation) and module.synchronized]


def synchronize_statistics(model: nn.Module, *, group: torch.distributed.ProcessGroup | None = None) -> None:
    """Update the running statistics of all synchronized activations with all ranks' batches since the last call.

    Call it on every rank after each optimizer step: one reduction for all layers, of six numbers per layer. The
    running statistics are then those of a single process that saw all batches. Without distributed training, it does
    the same for this process.

    Args:
        model: has normalized activations with ``synchronized=True``, such as after
            ``replace_activations(model, "nsw(synchronized=True)")``.
        group: the ranks that see different data; by default all.

    Raises:
        ValueError: if the model has none.

    >>> model = nn.Sequential(nn.Linear(2, 2), NormalizedActivation(torch.tanh, synchronized=True))
    >>> _ = model(torch.randn(8, 2))
    >>> synchronize_statistics(model)
    >>> model[1].num_batches_tracked
    tensor(1)
    """
    modules = synchronized_activations(model)
    if not modules:
        raise ValueError(
            "The model has no activation that pools its statistics. Make them with synchronized=True, such as by"
            ' replace_activations(model, "nsw(synchronized=True)").'
        )
    device = modules[0].running_mean.device
    added = torch.stack([module.pending.to(device) for module in modules if module.pending is not None])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(added, group=group)
    for module, row in zip(modules, added.unbind(), strict=True):
        module.follow(row.to(module.running_mean.device))
