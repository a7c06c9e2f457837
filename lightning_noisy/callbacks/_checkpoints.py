"""The record of replacements in checkpoints, so that no model with other activations loads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_noisy._torch_internals import metadata_of
from lightning_noisy.nn.noisy import NoisyActivation
from lightning_noisy.replacement.blend import blended, set_blend
from lightning_noisy.replacement.record import (
    KEY,
    describe,
    difference,
    replaced_in,
    saved_replacements,
    saved_sites,
)

__all__ = ["add_replacements", "check", "replacements_of", "set_noise"]

# The key in a checkpoint of c of the noisy activations, by path.
_NOISE_KEY = "lightning_noisy.activation_noise"
_BLEND_KEY = "lightning_noisy.activation_blend"  # and b of those that are blended with old ones


def add_replacements(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Add the replacements and c to a checkpoint: not every strategy keeps the metadata of a state dict."""
    metadata: dict[str, Any] = {}
    describe(model, metadata)
    checkpoint[KEY] = saved_replacements(metadata)
    noisy = ((path, each) for path, each in model.named_modules() if isinstance(each, NoisyActivation))
    checkpoint[_NOISE_KEY] = {path: each.c.item() for path, each in noisy}
    checkpoint[_BLEND_KEY] = {path: each.blend.item() for path, each in blended(model).items()}  # type: ignore[operator]


def replacements_of(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """The replacements that a checkpoint records, by path; None if it has no record."""
    found = checkpoint.get(KEY) or saved_replacements(metadata_of(checkpoint.get("state_dict")) or {})
    return found if found or KEY in checkpoint else None


def check(model: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Set c, and raise if the checkpoint records different replacements."""
    saved = replacements_of(checkpoint)
    if saved is None:
        if replaced_in(model):
            rank_zero_warn(
                "The checkpoint was written without ActivationReplacement: its model had other activations, unless"
                " something else replaced them."
            )
    elif model.strict_loading and (text := difference(model, saved_sites(saved))):
        raise MisconfigurationException(text)
    set_noise(model, checkpoint)


def set_noise(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Set c of the noisy activations to the values in a checkpoint."""
    modules = dict(model.named_modules())
    for path, value in checkpoint.get(_NOISE_KEY, {}).items():
        if isinstance(module := modules.get(path), NoisyActivation):
            module.c.fill_(value)
    for path, module in blended(model).items():
        set_blend(module, checkpoint.get(_BLEND_KEY, {}).get(path, 1.0))
    if lost := [path for path in checkpoint.get(_BLEND_KEY, {}) if path not in blended(model)]:
        rank_zero_warn(
            f"In the checkpoint {', '.join(lost)} were still blended with the old activations, and here they are not:"
            " the output is another one. Load it with ActivationReplacement(..., blend=...) in a Trainer."
        )
