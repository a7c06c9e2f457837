"""Putting modules into the places of activations, and taking them out again."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_noisy.engine.calls import NAME, Call, UnreadError
from lightning_noisy.engine.sending import CallSites, send_calls
from lightning_noisy.engine.sites import ActivationSite, ActivationSites
from lightning_noisy.nn.noisy import NoisyActivation

__all__ = ["MARKER", "Record", "place", "replaced_sites"]

# A key in checkpoints of models that a callback has swapped: the error of loading it the plain way has it. Its value is
# c of the noisy activations, which is in no state_dict.
MARKER = "activations were replaced: load with lightning_noisy.load_replaced"


class _Missing:
    """Stands for nothing, also in a copy."""


class Record:
    """What was in the places before the first replacement; a plain attribute of the model, copied with it."""

    _attribute = "_activations_before"

    def __init__(self) -> None:
        self._modules: dict[tuple[str, str], nn.Module | None] = {}
        self._attributes: dict[tuple[str, str], Any] = {}
        self._hooks: list[Any] = []
        self._new: list[Any] = []
        self.sites: set[str] = set()

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
        other._hooks, other.sites = list(self._hooks), set(self.sites)
        return other

    def keep(self, model: nn.Module) -> None:
        """Leave the record with the model."""
        if self._attribute not in model.__dict__:
            self.add_hook(model.register_load_state_dict_pre_hook(_take_marker))
        model.__dict__[self._attribute] = self

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


def _take_marker(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    c = state_dict.pop(prefix + MARKER, None)
    if c is not None and math.isfinite(c):
        for module in model.modules():
            if isinstance(module, NoisyActivation):
                module.c.fill_(float(c))


def place(model: nn.Module, sites: ActivationSites, made: Mapping[str, nn.Module], record: Record) -> None:
    """Put modules into the places of sites.

    Args:
        model: whose sites they are.
        sites: all of them.
        made: by the site's name the module for it.
        record: of what was there before.
    """
    by_owner: dict[str, list[ActivationSite]] = {}
    for site in sites:
        by_owner.setdefault(site.owner, []).append(site)
    for owner, theirs in by_owner.items():
        _send(model, owner, theirs, made)
        for site in theirs:
            is_child = site.kind == "attribute" or (site.kind == "module" and _is_first(site))
            if site.name in made and is_child:
                record.set_module(model, owner, site.key, made[site.name])
                if isinstance(model.get_submodule(owner), nn.TransformerEncoderLayer):
                    # In evaluation its fused kernel would go on computing the ReLU or GELU of its construction.
                    record.set_attribute(model, owner, "activation_relu_or_gelu", 0)
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.TransformerEncoder)
            and module.__dict__.get("use_nested_tensor")
            and not all(getattr(layer, "activation_relu_or_gelu", 1) for layer in module.layers)
        ):
            record.set_attribute(model, name, "use_nested_tensor", False)  # a layout for that kernel alone
    record.sites |= set(made)
    record.keep(model)


def replaced_sites(model: nn.Module) -> list[str]:
    """Names of the sites of a model that have been replaced."""
    return sorted(Record.of(model).sites)


def _is_first(site: ActivationSite) -> bool:
    return site.number == 1 and (site.call is None or site.call.key == site.call.child)


def _send(model: nn.Module, path: str, sites: list[ActivationSite], made: Mapping[str, nn.Module]) -> None:
    """Let the calls of one module's code go to their modules."""
    owner = model.get_submodule(path)
    present = owner._modules.get(NAME)
    sent = set(present) if isinstance(present, CallSites) else set()
    groups: dict[str, list[ActivationSite]] = {}
    for site in sites:
        if site.call is not None:
            groups.setdefault(site.call.key, []).append(site)
    # Where one use of a child changes, the others must not follow.
    changed = {site.call.child for site in sites if site.call is not None and site.name in made} - {None}
    calls: list[tuple[Call, list[nn.Module]]] = []
    for key, passes in groups.items():
        call = passes[0].call
        assert call is not None
        before = any(name == key or name.startswith(f"{key}@") for name in sent)
        if not before and call.child not in changed and not any(site.name in made for site in passes):
            continue
        modules = [made.get(site.name, _own(site, owner)) for site in passes if not _is_first(site)]
        calls.append((call, modules))
    if not calls:
        return
    try:
        send_calls(owner, calls)
    except UnreadError as reason:
        raise ValueError(
            f"The calls of activations in {type(owner).__name__} can't be replaced: {reason}. Make them modules, or"
            f" exclude {path or type(owner).__name__!r}."
        ) from None


def _own(site: ActivationSite, owner: nn.Module) -> nn.Module:
    """A module for a call that stays as it is."""
    assert site.module is not None
    return site.module if site.number == 1 else copy.copy(site.module).train(owner.training)
