"""The record of a model's replacements: stored on the model, and in the metadata of its state dict."""

from __future__ import annotations

import copy
import functools
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_noisy._torch_internals import BatchNorm, metadata_of, set_metadata, versions
from lightning_noisy.nn.noisy import NoisyActivation
from lightning_noisy.nn.recurrent import NoisyRecurrent
from lightning_noisy.nn.recurrent_cells import NoisyCell, has_drop_in, take_weights
from lightning_noisy.replacement.call_finder import NAME
from lightning_noisy.replacement.call_redirect import CallSites, redirect_calls
from lightning_noisy.replacement.origin import Origin, computes
from lightning_noisy.replacement.policy import Policy

__all__ = [
    "KEY",
    "MARKER",
    "Record",
    "describe",
    "difference",
    "folded_in",
    "records_of",
    "replaced_in",
    "saved_replacements",
    "saved_sites",
]

# The key of the replacements in the metadata of a state dict, beside the version of each module.
KEY = "lightning_noisy.activations"

# An extra key in the state dict of Lightning's checkpoints: the error of loading it into a model without replacements
# lists the key, on lines of its own.
MARKER = """

    The activations of the model that wrote this checkpoint were replaced, and those of this model are not.
    Without a Trainer, load with lightning_noisy.load_replaced(Model, path).
    For ckpt_path= of a Trainer, give that the ActivationReplacement callback that it was trained with, or replace the
    activations in the model as they were.

    """

_CHECKPOINT = "on_save_checkpoint"


class _Missing:
    """Marks a missing attribute, also in a copy."""


class Record:
    """What was at the sites before the first replacement; a plain attribute of the model, copied with it.

    Attributes:
        history: the replacements in order, each with what :func:`replace_activations` needs to repeat it.
    """

    _attribute = "_activations_before"

    def __init__(self) -> None:
        self._modules: dict[tuple[str, str], nn.Module | None] = {}
        self._attributes: dict[tuple[str, str], Any] = {}
        self._hooks: list[Any] = []
        self._new: list[Any] = []
        self.history: list[dict[str, Any]] = []

    @classmethod
    def of(cls, model: nn.Module, *, existing: bool = False) -> Record:
        """A copy of the model's record, or a new one.

        Raises:
            ValueError: if there is none, and ``existing`` is set.
        """
        if cls._attribute not in model.__dict__:
            if existing:
                raise ValueError(f"No activations of this {type(model).__name__} were replaced.")
            return cls()
        return copy.copy(model.__dict__[cls._attribute])  # type: ignore[no-any-return]

    def __copy__(self) -> Record:
        other = Record()
        other._modules, other._attributes = dict(self._modules), dict(self._attributes)
        other._hooks, other.history = list(self._hooks), list(self.history)
        return other

    def add(self, made: Mapping[str, nn.Module], policy: Policy) -> None:
        """Record what a call of ``replace_activations`` has installed at which sites."""
        to = policy.to
        names = isinstance(to, str) or (isinstance(to, Mapping) and all(isinstance(new, str) for new in to.values()))
        plain = (dict(to) if isinstance(to, Mapping) else to) if names else None
        options = {"batchnorm_affine": policy.batchnorm_affine, "buffer_batchnorm": policy.buffer_batchnorm}
        # The time, since other modules of the model may have records of their own.
        self.history.append({"to": plain, "sites": list(made), "options": options, "time": time.time_ns()})
        for module in made.values():
            module.register_load_state_dict_pre_hook(_drop_marker)

    def keep(self, model: nn.Module) -> None:
        """Store the record on the model."""
        if self._attribute not in model.__dict__:
            self.add_hook(model.register_state_dict_post_hook(_save))
            self.add_hook(model.register_load_state_dict_pre_hook(_load))
            # The hook of a LightningModule is called last, and also with save_weights_only=True.
            if callable(getattr(model, _CHECKPOINT, None)):
                own = model.__dict__.get(_CHECKPOINT)
                self.set_attribute(model, "", _CHECKPOINT, functools.partial(_save_checkpoint, model, own))
        model.__dict__[self._attribute] = self

    def saved(self, model: nn.Module) -> list[dict[str, Any]]:
        """The history as plain data, without the sites that were folded since."""
        folded = {origin.site for _, origin in folded_in(model)}
        history = [{**each, "sites": [name for name in each["sites"] if name not in folded]} for each in self.history]
        return [each for each in history if each["sites"]]

    def set_module(self, model: nn.Module, owner: str, key: str, module: nn.Module) -> None:
        """Register a child, and record what it replaces."""
        within = model.get_submodule(owner)
        self._modules.setdefault((owner, key), within._modules.get(key))
        if key in within.__dict__:
            self._attributes.setdefault((owner, key), within.__dict__.pop(key))
        within._modules[key] = module
        is_attribute = (owner, key) in self._attributes
        if is_attribute and type(within).__setstate__ is not nn.Module.__setstate__:
            # It may set what isn't there, as that of TransformerDecoderLayer does in every copy.
            within.__dict__[key] = module

    def set_attribute(self, model: nn.Module, owner: str, key: str, value: Any) -> None:
        """Set a plain attribute, and record what it replaces."""
        within = model.get_submodule(owner)
        self._attributes.setdefault((owner, key), within.__dict__.get(key, _Missing))
        within.__dict__[key] = value

    def add_hook(self, handle: Any) -> None:
        """Record a hook that is to be removed."""
        self._hooks.append(handle)
        self._new.append(handle)

    def remove_new_hooks(self) -> None:
        """Remove the hooks that were added to this copy of the record."""
        for handle in self._new:
            handle.remove()

    def undo(self, model: nn.Module) -> None:
        """Restore everything, and delete the record."""
        sent = [module for module in model.modules() if isinstance(module._modules.get(NAME), CallSites)]
        if changed := [type(module).__name__ for module in sent if "_original_class" not in type(module).__dict__]:
            raise ValueError(
                f"The class of {', '.join(changed)} was extended after its activations were replaced, such as by a"
                " parametrization. Remove that first."
            )
        if folded := [path for path, _ in folded_in(model)]:
            raise ValueError(
                f"fold_normalization has put the normalization of {', '.join(folded)} into the weights of the next"
                " layers, which no longer fit the earlier activations. Restore before folding, or fold a copy."
            )
        for owner, key in self._modules:
            present = model.get_submodule(owner)._modules.get(key)
            if isinstance(present, (NoisyRecurrent, NoisyCell)) and not has_drop_in(present):
                raise ValueError(
                    f"The weights of {f'{owner}.{key}'.lstrip('.')} are computed since its gates were replaced, such as"
                    " by a parametrization or by pruning. Remove that first."
                )
        for module in sent:
            redirect_calls(module, [])
        for handle in self._hooks:
            handle.remove()
        for (owner, key), before in self._modules.items():
            within = model.get_submodule(owner)
            if isinstance(before, nn.Module):
                present = within._modules[key]
                values = [] if present is None else [*present.parameters(), *present.buffers()]
                if isinstance(present, (NoisyRecurrent, NoisyCell)):
                    take_weights(before, present)
                elif (like := next((each for each in values if each.is_floating_point()), None)) is not None:
                    before.to(like.device, like.dtype)
                if isinstance(present, BatchNorm) and isinstance(before, BatchNorm):  # a stripped one
                    before._buffers.update(present._buffers)
                within._modules[key] = before.train(within.training)
            else:
                within._modules.pop(key, None)
        for (owner, key), value in self._attributes.items():
            attributes = model.get_submodule(owner).__dict__
            if value is _Missing:
                attributes.pop(key, None)
            else:
                attributes[key] = value
        del model.__dict__[self._attribute]


def records_of(model: nn.Module) -> dict[str, Record]:
    """The records in a model, by the paths of the modules that were passed to ``replace_activations``."""
    attribute = Record._attribute
    return {path: module.__dict__[attribute] for path, module in model.named_modules() if attribute in module.__dict__}


def folded_in(model: nn.Module) -> list[tuple[str, Origin]]:
    """The modules of a model whose normalization was folded into the next layers, with their paths."""
    origins = ((path, Origin.of(module)) for path, module in model.named_modules())
    return [(path, origin) for path, origin in origins if origin is not None and origin.folded]


def replaced_in(model: nn.Module) -> dict[str, list[str]]:
    """How each replacement in a model was written, and what it computes, by its path."""
    origins = ((path, module, Origin.of(module)) for path, module in model.named_modules())
    return {
        path: [origin.written, computes(module) + (f" with {origin.options}" if origin.options else "")]
        for path, module, origin in origins
        if origin is not None and not origin.folded
    }


def describe(model: nn.Module, metadata: dict[str, dict[str, Any]], prefix: str = "") -> None:
    """Add the replacements to the metadata of a state dict.

    The entry of each module lists the replacements below it, so that a model that loads it can compare them, whichever
    module was passed to ``replace_activations`` there.
    """
    for path, what in replaced_in(model).items():
        names = path.split(".")
        for depth in range(len(names)):
            around = metadata.setdefault((prefix + ".".join(names[:depth])).rstrip("."), {})
            around.setdefault(KEY, {}).setdefault("sites", {})[".".join(names[depth:])] = what
    for path, record in records_of(model).items():
        metadata.setdefault((prefix + path).rstrip("."), {}).setdefault(KEY, {})["history"] = record.saved(
            model.get_submodule(path)
        )


def saved_replacements(metadata: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The replacements that the metadata of a state dict records, by module path."""
    return {path: each[KEY] for path, each in metadata.items() if KEY in each}


def saved_sites(saved: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """The result of :func:`saved_replacements` in the form of :func:`replaced_in`."""
    return {
        f"{path}.{name}" if path else name: what
        for path, each in saved.items()
        for name, what in each.get("sites", {}).items()
    }


def difference(model: nn.Module, there: Mapping[str, Sequence[str]]) -> str:
    """The error message if the replacements differ from those of the saved model; empty if they don't.

    Args:
        model: a model with replacements.
        there: the replacements of the saved model.
    """
    present = replaced_in(model)
    lines = []
    for path in sorted({*there, *present}):
        what, here = there.get(path), present.get(path)
        if what is None or here is None or what[1] != here[1]:
            name = path.replace(f".{NAME}.", ":").replace(f"{NAME}.", ":")
            lines.append(f"{name}: {_named(what)} in the checkpoint, {_named(here)} in this model")
    more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
    if not lines:
        return ""
    return "\n    ".join([
        "The activations of the saved model were replaced with other ones:",
        *lines[:10],
        *more,
        "Replace them in the same way. To load only what fits, use strict=False, or with a Trainer set"
        " strict_loading = False on the model.",
    ])  # fmt: skip


def _named(what: Sequence[str] | None) -> str:
    return f"{what[0]} ({what[1]})" if what is not None else "not replaced"


def _save(model: nn.Module, state_dict: dict[str, Any], prefix: str, _: dict[str, Any]) -> None:
    if (metadata := metadata_of(state_dict)) is not None:
        describe(model, metadata, prefix)


def _load(
    model: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    _strict: bool,  # is always True
    missing: list[str],
    _unexpected: list[str],
    _errors: list[str],
) -> None:
    # Only the outermost module sees all metadata.
    saved = saved_replacements({"": metadata} if prefix else metadata_of(state_dict) or {})
    if saved and (text := difference(model, saved_sites(saved))):
        # An error if loading is strict, and the first one that torch reports.
        missing.insert(0, f"\n\n    {text}\n\n    ")


def _save_checkpoint(model: Any, own: Callable[[Any], None] | None, checkpoint: dict[str, Any]) -> None:
    """Mark the weights in a checkpoint, so that loading them into a model without replacements fails with a hint."""
    (own or functools.partial(type(model).on_save_checkpoint, model))(checkpoint)
    weights = checkpoint.get("state_dict")
    first = next(iter(replaced_in(model)), None)
    if weights is None or first is None:
        return
    # Under the prefix of a replacement, whose load hook removes it. First, since errors list keys in order.
    marked = OrderedDict({f"{first}.{MARKER}": torch.zeros(()), **weights})
    metadata = metadata_of(weights)
    if metadata is None:  # lost by a callback, such as WeightAveraging, or by a strategy
        metadata = versions(model)
        describe(model, metadata)
        for path, module in model.named_modules():
            if isinstance(module, NoisyActivation):
                metadata[path]["c"] = module.c.item()
    set_metadata(marked, metadata)
    checkpoint["state_dict"] = marked


def _drop_marker(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    state_dict.pop(prefix + MARKER, None)
