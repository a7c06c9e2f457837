"""What the checkpoints of a swapped model say of it, so that nothing loads them as something else."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_noisy.nn.noisy import NoisyActivation
from lightning_noisy.replacement.record import KEY, MARKER, records_of

__all__ = ["NOISE_KEY", "check", "describe", "mark", "set_noise"]

# Where a checkpoint has c of the noisy activations, by their paths.
NOISE_KEY = "lightning_noisy.activation_noise"


def describe(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Add what was replaced with what, and c: not every strategy keeps what a state_dict has besides its values."""
    checkpoint[KEY] = {path: each.saved(model.get_submodule(path)) for path, each in records_of(model).items()}
    noisy = ((path, each) for path, each in model.named_modules() if isinstance(each, NoisyActivation))
    checkpoint[NOISE_KEY] = {path: each.c.item() for path, each in noisy}


def check(model: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Set c, and raise if the same wasn't replaced with the same."""
    records = records_of(model)
    for path, saved in checkpoint.get(KEY, {}).items():
        difference = records[path].difference(model.get_submodule(path), saved) if path in records else ""
        if difference and model.strict_loading:
            raise MisconfigurationException(difference)
    set_noise(model, checkpoint)


def set_noise(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Set c of noisy activations to what a checkpoint has."""
    modules = dict(model.named_modules())
    for path, value in checkpoint.get(NOISE_KEY, {}).items():
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
    weights = checkpoint["state_dict"]
    if MARKER in weights or not records_of(model)[""].saved(model)["sites"]:
        return
    if isinstance(weights, OrderedDict):  # with what it says besides its values
        weights[MARKER] = torch.zeros(())
        weights.move_to_end(MARKER, last=False)  # errors name the keys in their order
    else:
        checkpoint["state_dict"] = {MARKER: torch.zeros(()), **weights}
