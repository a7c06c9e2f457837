"""What was replaced with what in a model: kept with it, and with the weights that it saves."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_noisy.nn import registry
from lightning_noisy.replacement.call_finder import NAME
from lightning_noisy.replacement.call_redirect import CallSites, send_calls
from lightning_noisy.replacement.origin import Origin, computes, written
from lightning_noisy.replacement.policy import New, Policy

__all__ = ["KEY", "MARKER", "Record", "records_of", "saved_replacements"]

# Under this key the metadata of a state_dict says what was replaced, as the version of a module is there.
KEY = "lightning_noisy.activations"

# A key among the weights of a model that a callback has swapped, so that the error of loading them the plain way shows
# it, on lines of its own.
MARKER = """

    The activations of the model that wrote this checkpoint were replaced, and those of this model are not.
    Without a Trainer, load with lightning_noisy.load_replaced(Model, path).
    For ckpt_path= of a Trainer, give that the ActivationReplacement callback that it was trained with.

    """


class _Missing:
    """Stands for nothing, also in a copy."""


class Record:
    """What was in the places before the first replacement; a plain attribute of the model, copied with it.

    Attributes:
        sites: by the name of a place what it was replaced with, and what that computes.
        history: the replacements in their order, each what :func:`replace_activations` needs to do it again.
    """

    _attribute = "_activations_before"

    def __init__(self) -> None:
        self._modules: dict[tuple[str, str], nn.Module | None] = {}
        self._attributes: dict[tuple[str, str], Any] = {}
        self._hooks: list[Any] = []
        self._new: list[Any] = []
        self.sites: dict[str, tuple[str, str]] = {}
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
        other._hooks, other.sites, other.history = list(self._hooks), dict(self.sites), list(self.history)
        return other

    def add(self, made: Mapping[str, nn.Module], policy: Policy, news: Mapping[str, New | None]) -> None:
        """Note what a call of ``replace_activations`` has put where."""
        to = policy.to
        names = isinstance(to, str) or (isinstance(to, Mapping) and all(isinstance(new, str) for new in to.values()))
        plain = (dict(to) if isinstance(to, Mapping) else to) if names else None
        options = {"batchnorm_affine": policy.batchnorm_affine, "buffer_batchnorm": policy.buffer_batchnorm}
        self.history.append({"to": plain, "sites": list(made), "options": options})
        self.sites.update({name: (written(news[name]), _computes(module, news[name])) for name, module in made.items()})

    def keep(self, model: nn.Module) -> None:
        """Leave the record with the model."""
        if self._attribute not in model.__dict__:
            self.add_hook(model.register_state_dict_post_hook(_save))
            self.add_hook(model.register_load_state_dict_pre_hook(_load))
        model.__dict__[self._attribute] = self

    def saved(self, model: nn.Module) -> dict[str, Any]:
        """What was replaced with what, as plain data; what was folded since is plain again."""
        folded = Origin.folded_in(model).values()
        history = [{**each, "sites": [name for name in each["sites"] if name not in folded]} for each in self.history]
        sites = {name: list(what) for name, what in self.sites.items() if name not in folded}
        return {"history": [each for each in history if each["sites"]], "sites": sites}

    def difference(self, model: nn.Module, saved: Mapping[str, Any]) -> str:
        """What is otherwise than in the model that was saved, as an error says it; empty if nothing is."""
        there: Mapping[str, Sequence[str]] = saved["sites"]
        present: Mapping[str, Sequence[str]] = self.saved(model)["sites"]
        lines = []
        for name in sorted({*there, *present}):
            what, here = there.get(name), present.get(name)
            if what is None or here is None or what[1] != here[1]:
                lines.append(f"{name or '(root)'}: {_named(what)} in the checkpoint, {_named(here)} in this model")
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
        if changed := [type(module).__name__ for module in sent if "_written_class" not in type(module).__dict__]:
            raise ValueError(
                f"The class of {', '.join(changed)} was extended after its activations were replaced, as by a"
                " parametrization. Take that off first."
            )
        if folded := Origin.folded_in(model):
            raise ValueError(
                f"fold_normalization has put the normalization of {', '.join(folded)} into the weights of the next"
                " layers, which don't suit the activations of before any more. Restore before folding, or a copy."
            )
        for module in sent:
            send_calls(module, [])
        for handle in self._hooks:
            handle.remove()
        for (owner, key), before in self._modules.items():
            within = model.get_submodule(owner)
            if isinstance(before, nn.Module):
                present = within._modules[key]
                like = next((each for each in present.parameters()), None) if present is not None else None
                if like is not None:
                    before.to(like.device, like.dtype if like.is_floating_point() else None)
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


def saved_replacements(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """What a state_dict says of the replacements in its model, by the paths of their records."""
    metadata: Mapping[str, Any] = getattr(state_dict, "_metadata", {})
    return {path: each[KEY] for path, each in metadata.items() if KEY in each}


def _named(what: Sequence[str] | None) -> str:
    return f"{what[0]} ({what[1]})" if what is not None else "not replaced"


def _computes(module: nn.Module, new: New | None) -> str:
    """What a new module computes; of registered names the options, too, which their classes may not show."""
    name, options = registry.parse(new) if isinstance(new, str) else (None, {})
    if name not in registry.REGISTERED:
        return computes(module)
    return f"{computes(module)}: {name}({', '.join(f'{key}={options[key]!r}' for key in sorted(options))})"


def _save(model: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    metadata[KEY] = model.__dict__[Record._attribute].saved(model)


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
    state_dict.pop(prefix + MARKER, None)
    saved = metadata.get(KEY)
    if saved is not None and (difference := model.__dict__[Record._attribute].difference(model, saved)):
        # An error unless loading isn't strict, and what torch says first.
        missing.insert(0, f"\n\n    {difference}\n\n    ")
