"""The changes to batch norms around normalized activations from ANAct's experiments with VGG and ResNet."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_noisy._torch_internals import BatchNorm
from lightning_noisy.replacement.record import Record
from lightning_noisy.replacement.sites import ActivationSite

__all__ = ["buffer", "strip"]


def strip(model: nn.Module, sites: Iterable[ActivationSite], record: Record) -> None:
    """Remove weight and bias from the batch norms directly before the sites.

    Warns:
        UserWarning: if they were trained, since their effect is lost.
    """
    lost = []
    for name in dict.fromkeys(site.batch_norm for site in sites if site.batch_norm is not None):
        norm = model.get_submodule(name)
        assert isinstance(norm, BatchNorm)
        if not norm.affine:
            continue
        if bool((norm.weight != 1).any()) or bool(norm.bias.any()):
            lost.append(name)
        plain = type(norm)(
            norm.num_features,
            norm.eps,
            norm.momentum,
            affine=False,
            track_running_stats=norm.track_running_stats,
            device=norm.weight.device,
        )
        plain._buffers.update(norm._buffers)
        owner, _, key = name.rpartition(".")
        record.set_module(model, owner, key, plain.train(norm.training))
    if lost:
        warnings.warn(
            f"Weight and bias of {', '.join(lost)} were trained, and are gone: the output changes.",
            UserWarning,
            stacklevel=5,
        )


class _Buffer:
    """Applies a layer's batch norm to its input; a class, so that it can be copied and pickled."""

    def __call__(self, layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = arguments[0]
        normalized = layer._modules["buffer"](x.reshape(-1, x.shape[-1]))  # type: ignore[misc]
        return (normalized.view(x.shape), *arguments[1:])


def buffer(model: nn.Module, which: bool | str, record: Record) -> None:
    """Insert a batch norm without weight and bias before the last linear layer, or before the named one.

    Raises:
        ValueError: if there is no such layer.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    name = which if isinstance(which, str) else next(reversed(linear), "")
    if name not in linear:
        known = f"The linear layers are {', '.join(linear)}." if linear else "It has no linear layer."
        raise ValueError(f"buffer_batchnorm must come before a linear layer, got {which!r}. {known}")
    layer = linear[name]
    if "buffer" in layer._modules:
        return
    like = next(layer.parameters())
    norm = nn.BatchNorm1d(layer.in_features, affine=False, device=like.device).train(layer.training)
    if like.dtype in (torch.float32, torch.float64):
        norm.to(like.dtype)
    record.set_module(model, name, "buffer", norm)
    record.add_hook(layer.register_forward_pre_hook(_Buffer()))
