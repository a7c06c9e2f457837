"""What the checkpoints of a swapped model say of it, so that nothing loads them as something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_noisy._torch_internals import metadata_of
from lightning_noisy.nn.noisy import NoisyActivation
from lightning_noisy.replacement.record import (
    KEY,
    describe,
    difference,
    replaced_in,
    saved_replacements,
    saved_sites,
)

__all__ = ["add_replacements", "check", "replacements_of", "set_noise"]

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
    found = checkpoint.get(KEY) or saved_replacements(metadata_of(checkpoint.get("state_dict")) or {})
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
