"""What the checkpoints of a swapped model say of it, so that nothing loads them as something else."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_noisy.nn.noisy import NoisyActivation
from lightning_noisy.replacement.record import (
    KEY,
    MARKER,
    describe,
    difference,
    records_of,
    replaced_in,
    saved_replacements,
    saved_sites,
)

__all__ = ["add_replacements", "check", "mark", "replacements_of", "set_noise"]

# Where a checkpoint has c of the noisy activations, by their paths.
_NOISE_KEY = "lightning_noisy.activation_noise"


def add_replacements(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Add what was replaced with what, and c: not every strategy keeps what a state_dict has besides its values."""
    metadata: dict[str, Any] = {}
    describe(model, metadata)
    checkpoint[KEY] = saved_replacements(metadata)
    noisy = ((path, each) for path, each in model.named_modules() if isinstance(each, NoisyActivation))
    checkpoint[_NOISE_KEY] = {path: each.c.item() for path, each in noisy}


def replacements_of(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint says of the replacements in its model, by path; None if it says nothing."""
    found = checkpoint.get(KEY) or saved_replacements(getattr(checkpoint.get("state_dict"), "_metadata", {}))
    return found if found or KEY in checkpoint else None


def check(model: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Set c, and raise if the same wasn't replaced with the same."""
    saved = replacements_of(checkpoint)
    if saved is None:
        if replaced_in(model):
            rank_zero_warn(
                "The checkpoint was written without ActivationReplacement: its model had other activations, if nothing"
                " else replaced them."
            )
    elif model.strict_loading and (text := difference(model, saved_sites(saved))):
        raise MisconfigurationException(text)
    set_noise(model, checkpoint)


def set_noise(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Set c of noisy activations to what a checkpoint has."""
    modules = dict(model.named_modules())
    for path, value in checkpoint.get(_NOISE_KEY, {}).items():
        if isinstance(module := modules.get(path), NoisyActivation):
            module.c.fill_(value)


def mark(model: pl.LightningModule) -> None:
    """Have the weights in all checkpoints of a swapped model marked: loading them the plain way fails with a hint.

    By the model's ``on_save_checkpoint``, which Lightning calls last, and with ``save_weights_only=True``, too.
    """
    present = model.__dict__.get(_HOOK)
    record = records_of(model).get("")
    if record is not None and getattr(present, "func", None) is not _save_marked:
        record.set_attribute(model, "", _HOOK, functools.partial(_save_marked, model, present))


_HOOK = "on_save_checkpoint"


def _save_marked(model: pl.LightningModule, own: Callable[[Any], None] | None, checkpoint: dict[str, Any]) -> None:
    (own or functools.partial(type(model).on_save_checkpoint, model))(checkpoint)
    weights = checkpoint.get("state_dict")
    first = next(iter(replaced_in(model)), None)
    if weights is None or first is None:
        return
    # With a replacement's own keys, so that wherever it is loaded, that takes it off. Errors name keys in their order.
    marked = OrderedDict({f"{first}.{MARKER}": torch.zeros(()), **weights})
    metadata = getattr(weights, "_metadata", None)
    if metadata is None:  # lost by a callback, such as WeightAveraging, or by a strategy
        metadata = {path: {"version": getattr(module, "_version", 1)} for path, module in model.named_modules()}
        describe(model, metadata)
        for path, module in model.named_modules():
            if isinstance(module, NoisyActivation):
                metadata[path]["c"] = module.c.item()
    marked._metadata = metadata  # type: ignore[attr-defined]
    checkpoint["state_dict"] = marked
