"""Install modules at activation sites."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from lightning_noisy._torch_internals import HOOKS
from lightning_noisy.replacement.by_layer import ByLayer
from lightning_noisy.replacement.call_finder import NAME, Call
from lightning_noisy.replacement.call_redirect import CallSites, redirect_calls
from lightning_noisy.replacement.record import Record
from lightning_noisy.replacement.sites import ActivationSite, ActivationSites
from lightning_noisy.replacement.source import UnreadError

__all__ = ["place"]


def place(model: nn.Module, sites: ActivationSites, made: Mapping[str, nn.Module], record: Record) -> None:
    """Install modules at sites.

    Args:
        model: the model that has the sites.
        sites: all sites of the model.
        made: the new modules, by site name.
        record: stores what was there before.
    """
    places: dict[tuple[str, str], list[ActivationSite]] = {}
    for site in sites:
        places.setdefault((site.owner, site.place), []).append(site)
    for owner in dict.fromkeys(site.owner for site in sites):
        theirs = [each for (path, _), each in places.items() if path == owner]
        _redirect(model, owner, theirs, made, record)
        for passes in theirs:
            site = passes[0]
            is_child = site.kind in ("attribute", "recurrent") or (site.kind == "module" and _is_first(site))
            if is_child and any(each.name in made for each in passes):
                record.set_module(model, owner, site.place, _module(model, passes, made, record))
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


def _module(model: nn.Module, passes: list[ActivationSite], made: Mapping[str, nn.Module], record: Record) -> nn.Module:
    """What stands at a place: one module, or one for each layer that it is called after."""
    if len(passes) == 1:
        return made[passes[0].name]
    modules = []
    for site in passes:
        assert site.module is not None
        modules.append(made.get(site.name) or _with_own_hooks(site.module))
    by_layer = ByLayer(modules, passes[0].name, may_repeat=any(site.seen.repeats for site in passes))
    paths = [site.seen.layer for site in passes]
    layers = [None if path is None else model.get_submodule(path) for path in paths]
    for handle in by_layer.follow(layers, model):
        record.add_hook(handle)
    return by_layer.train(model.get_submodule(passes[0].owner).training)


def _is_first(site: ActivationSite) -> bool:
    return site.call is None or site.call.key == site.call.child


def _redirect(
    model: nn.Module, path: str, places: list[list[ActivationSite]], made: Mapping[str, nn.Module], record: Record
) -> None:
    """Let the calls of one module's code go to their modules."""
    owner = model.get_submodule(path)
    present = owner._modules.get(NAME)
    there = set(present) if isinstance(present, CallSites) else set()
    # Where one use of a child changes, the others must not follow.
    changed = {
        passes[0].call.child for passes in places if passes[0].call and any(site.name in made for site in passes)
    } - {None}
    # A child whose first use is replaced hands its hooks to the replacement, and its other uses get copies of them.
    replaced = [
        owner._modules.get(passes[0].place)
        for passes in places
        if _is_first(passes[0]) and any(site.name in made for site in passes)
    ]
    left = {child: _with_own_hooks(child) for child in replaced if child is not None}
    calls: list[tuple[Call, nn.Module]] = []
    for passes in places:
        site, call = passes[0], passes[0].call
        if call is None or _is_first(site):
            continue
        if any(each.name in made for each in passes):
            calls.append((call, _module(model, passes, made, record)))
        elif call.key in there:
            assert isinstance(present, CallSites)
            calls.append((call, present[call.key]))
        elif call.child in changed:
            assert site.module is not None
            calls.append((call, left.get(site.module, site.module)))
    if not calls:
        return
    try:
        redirect_calls(owner, calls)
    except UnreadError as reason:
        raise ValueError(
            f"The calls of activations in {type(owner).__name__} can't be replaced: {reason}. Make them modules, or"
            f" exclude {path or type(owner).__name__!r}."
        ) from None


def _with_own_hooks(module: nn.Module) -> nn.Module:
    """A shallow copy: it shares the parameters, but has its own hook dictionaries."""
    other = copy.copy(module)
    for name in HOOKS:
        setattr(other, name, copy.copy(getattr(other, name)))
    return other
