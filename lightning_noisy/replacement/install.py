"""Install modules at activation sites."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from lightning_noisy._torch_internals import HOOKS
from lightning_noisy.replacement.call_finder import NAME, Call, UnreadError
from lightning_noisy.replacement.call_redirect import CallSites, redirect_calls
from lightning_noisy.replacement.record import Record
from lightning_noisy.replacement.sites import ActivationSite, ActivationSites

__all__ = ["place"]


def place(model: nn.Module, sites: ActivationSites, made: Mapping[str, nn.Module], record: Record) -> None:
    """Install modules at sites.

    Args:
        model: the model that has the sites.
        sites: all sites of the model.
        made: the new modules, by site name.
        record: stores what was there before.
    """
    by_owner: dict[str, list[ActivationSite]] = {}
    for site in sites:
        by_owner.setdefault(site.owner, []).append(site)
    for owner, theirs in by_owner.items():
        _redirect(model, owner, theirs, made)
        for site in theirs:
            is_child = site.kind == "attribute" or (site.kind == "module" and _is_first(site))
            if site.name in made and is_child:
                record.set_module(model, owner, site.key, made[site.name])
                if isinstance(model.get_submodule(owner), nn.TransformerEncoderLayer):
                    # In evaluation its fused kernel would still compute the ReLU or GELU that it was constructed with.
                    record.set_attribute(model, owner, "activation_relu_or_gelu", 0)
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.TransformerEncoder)
            and module.__dict__.get("use_nested_tensor")
            and not all(getattr(layer, "activation_relu_or_gelu", 1) for layer in module.layers)
        ):
            record.set_attribute(model, name, "use_nested_tensor", False)  # a layout that only this kernel uses


def _is_first(site: ActivationSite) -> bool:
    return site.number == 1 and (site.call is None or site.call.key == site.call.child)


def _redirect(model: nn.Module, path: str, sites: list[ActivationSite], made: Mapping[str, nn.Module]) -> None:
    """Redirect the calls in one module's code to their modules."""
    owner = model.get_submodule(path)
    present = owner._modules.get(NAME)
    sent = set(present) if isinstance(present, CallSites) else set()
    groups: dict[str, list[ActivationSite]] = {}
    for site in sites:
        if site.call is not None:
            groups.setdefault(site.call.key, []).append(site)
    # If one call of a child is replaced, its other calls must keep their module.
    changed = {site.call.child for site in sites if site.call is not None and site.name in made} - {None}
    # If the first call of a child is replaced, the replacement takes its hooks; other calls get copies of them.
    replaced = [owner._modules.get(site.key) for site in sites if site.name in made and _is_first(site)]
    left = {child: _with_own_hooks(child) for child in replaced if child is not None}
    calls: list[tuple[Call, list[nn.Module]]] = []
    for key, passes in groups.items():
        call = passes[0].call
        assert call is not None
        before = any(name == key or name.startswith(f"{key}@") for name in sent)
        if not before and call.child not in changed and not any(site.name in made for site in passes):
            continue
        modules = [made.get(site.name) or _own(site, owner, left) for site in passes if not _is_first(site)]
        calls.append((call, modules))
    if not calls:
        return
    try:
        redirect_calls(owner, calls)
    except UnreadError as reason:
        raise ValueError(
            f"The calls of activations in {type(owner).__name__} can't be replaced: {reason}. Make them modules, or"
            f" exclude {path or type(owner).__name__!r}."
        ) from None


def _own(site: ActivationSite, owner: nn.Module, left: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """The module for a call that is not replaced."""
    assert site.module is not None
    if site.number == 1:
        return left.get(site.module, site.module)
    return _with_own_hooks(site.module).train(owner.training)


def _with_own_hooks(module: nn.Module) -> nn.Module:
    """A shallow copy: it shares the parameters, but has its own hook dictionaries."""
    other = copy.copy(module)
    for name in HOOKS:
        setattr(other, name, copy.copy(getattr(other, name)))
    return other
