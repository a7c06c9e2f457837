"""What was replaced with what in a model: kept with it, and with the weights that it saves."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_noisy._torch_internals import metadata_of, set_metadata, versions
from lightning_noisy.nn.noisy import NoisyActivation
from lightning_noisy.replacement.call_finder import NAME
from lightning_noisy.replacement.call_redirect import CallSites, redirect_calls
from lightning_noisy.replacement.dataflow import BATCH_NORMS
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

# Under this key the metadata of a state_dict says what was replaced, as the version of a module is there.
KEY = "lightning_noisy.activations"

# A key among the weights in Lightning's checkpoints, so that the error of loading them into a model without
# replacements shows it, on lines of its own.
MARKER = """

    The activations of the model that wrote this checkpoint were replaced, and those of this model are not.
    Without a Trainer, load with lightning_noisy.load_replaced(Model, path).
    For ckpt_path= of a Trainer, give that the ActivationReplacement callback that it was trained with, or replace the
    activations in the model as they were.

    """

_CHECKPOINT = "on_save_checkpoint"


class _Missing:
    """Stands for nothing, also in a copy."""


class Record:
    """What was in the places before the first replacement; a plain attribute of the model, copied with it.

    Attributes:
        history: the replacements in their order, each what :func:`replace_activations` needs to do it again.
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
        """The model's record, or a new one.

        Raises:
            ValueError: if there is to be one and is none.
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
        """Note what a call of ``replace_activations`` has put where."""
        to = policy.to
        names = isinstance(to, str) or (isinstance(to, Mapping) and all(isinstance(new, str) for new in to.values()))
        plain = (dict(to) if isinstance(to, Mapping) else to) if names else None
        options = {"batchnorm_affine": policy.batchnorm_affine, "buffer_batchnorm": policy.buffer_batchnorm}
        self.history.append({"to": plain, "sites": list(made), "options": options})
        for module in made.values():
            module.register_load_state_dict_pre_hook(_drop_marker)

    def keep(self, model: nn.Module) -> None:
        """Leave the record with the model."""
        if self._attribute not in model.__dict__:
            self.add_hook(model.register_state_dict_post_hook(_save))
            self.add_hook(model.register_load_state_dict_pre_hook(_load))
            # Of a LightningModule, which is called last, and with save_weights_only=True, too.
            if callable(getattr(model, _CHECKPOINT, None)):
                own = model.__dict__.get(_CHECKPOINT)
                self.set_attribute(model, "", _CHECKPOINT, functools.partial(_save_checkpoint, model, own))
        model.__dict__[self._attribute] = self

    def saved(self, model: nn.Module) -> list[dict[str, Any]]:
        """The history as plain data; what was folded since is plain again."""
        folded = {origin.site for _, origin in folded_in(model)}
        history = [{**each, "sites": [name for name in each["sites"] if name not in folded]} for each in self.history]
        return [each for each in history if each["sites"]]

    def set_module(self, model: nn.Module, owner: str, key: str, module: nn.Module) -> None:
        """Register a child, in place of what has its name."""
        within = model.get_submodule(owner)
        self._modules.setdefault((owner, key), within._modules.get(key))
        if key in within.__dict__:
            self._attributes.setdefault((owner, key), within.__dict__.pop(key))
        within._modules[key] = module

    def set_attribute(self, model: nn.Module, owner: str, key: str, value: Any) -> None:
        """Set a plain attribute."""
        within = model.get_submodule(owner)
        self._attributes.setdefault((owner, key), within.__dict__.get(key, _Missing))
        within.__dict__[key] = value

    def add_hook(self, handle: Any) -> None:
        """Remember to remove a hook."""
        self._hooks.append(handle)
        self._new.append(handle)

    def remove_new_hooks(self) -> None:
        """Remove the hooks that were added to this copy of the record."""
        for handle in self._new:
            handle.remove()

    def undo(self, model: nn.Module) -> None:
        """Put everything back, and forget it."""
        sent = [module for module in model.modules() if isinstance(module._modules.get(NAME), CallSites)]
        if changed := [type(module).__name__ for module in sent if "_original_class" not in type(module).__dict__]:
            raise ValueError(
                f"The class of {', '.join(changed)} was extended after its activations were replaced, as by a"
                " parametrization. Take that off first."
            )
        if folded := [path for path, _ in folded_in(model)]:
            raise ValueError(
                f"fold_normalization has put the normalization of {', '.join(folded)} into the weights of the next"
                " layers, which don't suit the activations of before any more. Restore before folding, or a copy."
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
                if (like := next((each for each in values if each.is_floating_point()), None)) is not None:
                    before.to(like.device, like.dtype)
                if isinstance(present, BATCH_NORMS) and isinstance(before, BATCH_NORMS):  # the one without weights
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
    """The modules of a model whose normalization is in the next layers, with their paths."""
    origins = ((path, Origin.of(module)) for path, module in model.named_modules())
    return [(path, origin) for path, origin in origins if origin is not None and origin.folded]


def replaced_in(model: nn.Module) -> dict[str, list[str]]:
    """By the paths of the replacements in a model, whoever made them, as what it was written and what it computes."""
    origins = ((path, module, Origin.of(module)) for path, module in model.named_modules())
    return {
        path: [origin.written, computes(module) + (f" with {origin.options}" if origin.options else "")]
        for path, module, origin in origins
        if origin is not None and not origin.folded
    }


def describe(model: nn.Module, metadata: dict[str, dict[str, Any]], prefix: str = "") -> None:
    """Add what was replaced with what to the metadata of a state_dict.

    Each module has what is below it, so that it can be compared by whichever of them was passed to
    ``replace_activations`` in the model that loads it.
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
    """What the metadata of a state_dict says of the replacements in its model, by the paths of modules."""
    return {path: each[KEY] for path, each in metadata.items() if KEY in each}


def saved_sites(saved: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """All replacements as in :func:`replaced_in`, of what :func:`saved_replacements` has found."""
    return {
        f"{path}.{name}" if path else name: what
        for path, each in saved.items()
        for name, what in each.get("sites", {}).items()
    }


def difference(model: nn.Module, there: Mapping[str, Sequence[str]]) -> str:
    """What is otherwise than in the model that was saved, as an error says it; empty if nothing is.

    Args:
        model: one with replacements.
        there: the replacements of the other.
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
        "The activations were replaced otherwise in the model that was saved:",
        *lines[:10],
        *more,
        "Replace them as they were there. What fits is loaded with strict=False, by a Trainer with"
        " strict_loading = False of the model.",
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
        # An error unless loading isn't strict, and what torch says first.
        missing.insert(0, f"\n\n    {text}\n\n    ")


def _save_checkpoint(model: Any, own: Callable[[Any], None] | None, checkpoint: dict[str, Any]) -> None:
    """Mark the weights in a checkpoint, so that loading them into a model without replacements fails with a hint."""
    (own or functools.partial(type(model).on_save_checkpoint, model))(checkpoint)
    weights = checkpoint.get("state_dict")
    first = next(iter(replaced_in(model)), None)
    if weights is None or first is None:
        return
    # With a replacement's own keys, so that wherever it is loaded, that takes it off. Errors name keys in their order.
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
