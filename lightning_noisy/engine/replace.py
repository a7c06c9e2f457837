"""Swapping the activations of a model."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lightning_noisy.engine.sites import GATE_OR_OUTPUT, ActivationSite, ActivationSites, activation_sites
from lightning_noisy.nn import registry
from lightning_noisy.nn.normalized import NormalizedActivation

__all__ = ["Replacement", "check_replacement", "replace_activations"]

# What a site may be replaced with, and what `replace_activations` takes: also a mapping from a plain function's name.
_New = str | type[nn.Module] | Callable[[ActivationSite], nn.Module]
Replacement = _New | Mapping[str, _New]

# What hooks on a module consist of.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def check_replacement(to: Replacement) -> None:
    """Raise a TypeError or a ValueError unless ``to`` is something that activations can be replaced with."""
    if isinstance(to, Mapping):
        for old, new in to.items():
            registry.check_name(old, registry.PLAIN, what="the name of a plain activation function")
            if isinstance(new, Mapping):
                raise TypeError(f"A mapping's values must be names, classes or callables, got {new!r} for {old!r}.")
            check_replacement(new)
    elif isinstance(to, str):
        registry.check_name(registry.parse(to)[0], registry.names(), what="the name of an activation")
    elif isinstance(to, nn.Module):
        raise TypeError(
            f"An instance can't be used at every site, got {to!r}. Pass its class, or a function that makes one:"
            " lambda site: ..."
        )
    elif not callable(to):
        raise TypeError(f"to must be a name, a mapping, an nn.Module class or a callable, got {to!r}.")
    elif getattr(to, "__name__", None) in registry.PLAIN and not inspect.isclass(to):
        raise TypeError(f"to is a function of tensors, {to!r}. Pass its name, {to.__name__!r}, in its place.")
    elif inspect.isclass(to) and not issubclass(to, nn.Module):
        raise TypeError(f"to must be a name, a mapping, an nn.Module class or a callable, got the class {to!r}.")


def replace_activations(model: nn.Module, to: Replacement) -> nn.Module:
    """Replace the activation modules of a model, each by one of its own, in place.

    Every registration of an activation module counts: an instance that is registered twice becomes two.
    Each replacement takes over the training flag, the device, the hooks and the in-place behaviour; its new
    parameters have the dtype of their neighbours and need gradients if those do. Either all sites are
    replaced or, after an error, none.

    A mapping replaces the functions that it names. Anything else replaces every activation but those
    sigmoids, tanhs and softplus which may be a gate or an output: the ones whose output isn't the input of a
    next layer in an ``nn.Sequential`` stay. Name them in a mapping to replace them, too.

    A module that is called at several places of one forward pass keeps doing so, with one set of running
    values. Calls of functions (``F.relu(x)``) are not replaced.

    Args:
        model: the model, not yet compiled, scripted, sharded or wrapped for data parallelism. Make its
            optimizer afterwards: there are new parameters.
        to: a name of :func:`lightning_noisy.nn.registry.names`, such as ``"nsw"``; a class of modules, made
            without arguments; a function from an :class:`ActivationSite` to a module; or a mapping from plain
            functions' names to any of these, such as ``{"relu": "nrelu", "tanh": "nsw"}``.

    Returns:
        ``model``, or the replacement if the model itself is an activation module.

    Raises:
        TypeError: if ``model`` is not a module, or ``to`` is nothing to replace activations with.
        ValueError: if a name is unknown, or the model can't be changed any more.

    Warns:
        UserWarning: if nothing was replaced.

    >>> replace_activations(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), "nrelu")
    Sequential(
      (0): Linear(in_features=4, out_features=2, bias=True)
      (1): NReLU(relu, momentum=0.1, bounds=(0.2, 5.0), max_rejections=10)
    )
    """
    check_replacement(to)
    _check_replaceable(model)
    sites = activation_sites(model)
    chosen = [(site, new) for site in sites if (new := _choose(site, to)) is not None]
    if not chosen:
        _warn_unchanged(model, sites, to)
        return model
    heirs: dict[nn.Module, nn.Module] = {}
    replacements = [(site, _make(site, new, model, heirs)) for site, new in chosen]
    for site, module in replacements:
        if site.name == "":
            return module
        owner = model.get_submodule(site.owner)
        owner._modules[site.name.rpartition(".")[2]] = module
        if isinstance(owner, nn.TransformerEncoderLayer):
            # In evaluation its fused kernel would go on computing the ReLU or GELU of its construction.
            owner.activation_relu_or_gelu = 0
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and not all(
            getattr(layer, "activation_relu_or_gelu", 1) for layer in module.layers
        ):
            module.use_nested_tensor = False  # a layout for that kernel alone
    return model


def _check_replaceable(model: object) -> None:
    """Raise if the model's kind or state doesn't allow new modules."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("A scripted model can't be changed. Replace the activations before torch.jit.script.")
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        raise ValueError(
            f"{type(model).__name__} doesn't notice new parameters. Replace the activations of the module that it"
            " wraps, before wrapping it."
        )
    if isinstance(model, nn.Module) and any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            "The model is sharded already. Replace the activations before fully_shard or parallelize_module."
        )


def _choose(site: ActivationSite, to: Replacement) -> _New | None:
    """What the site is replaced with, or None if it stays."""
    if isinstance(to, Mapping):
        return to.get(site.function)
    if isinstance(to, str) and registry.parse(to)[0] in registry.NOISY and site.function not in registry.SATURATING:
        return None
    return None if site.function in GATE_OR_OUTPUT and site.is_gate is None and site.name else to


def _make(site: ActivationSite, new: _New, model: nn.Module, heirs: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module that takes the site's place: the present one, if it is the same already.

    ``heirs`` has the first replacement of each instance: it inherits the hooks, the others get copies.
    """
    old = site.module
    # From the owner outwards: the parameters closest to the site.
    path = site.owner.split(".") if site.owner else []
    around = (model.get_submodule(".".join(path[:depth])) for depth in range(len(path), -1, -1))
    neighbours = next((found for module in around if (found := list(module.parameters()))), [])
    module = _instantiate(site, new)
    # Only a name or a class says all about a module; two callables may differ in what no repr shows.
    is_same = isinstance(new, str) or inspect.isclass(new)
    if module is old or (is_same and type(module) is type(old) and repr(module) == repr(old)):
        return old
    if getattr(old, "inplace", False):
        if not hasattr(module, "inplace"):
            raise ValueError(
                f"{site.name!r} works in place ({old!r}), {type(module).__name__} does not, and what else reads its"
                " input would see other values. Build the model with inplace=False."
            )
        module.inplace = True  # type: ignore[assignment]
    if neighbours:
        module.to(neighbours[0].device)
        if neighbours[0].is_floating_point():
            for parameter in module.parameters():
                parameter.data = parameter.data.to(neighbours[0].dtype)
        if not any(parameter.requires_grad for parameter in neighbours):
            module.requires_grad_(False)
    module.train(old.training)
    if all(inner is not old for inner in module.modules()):  # else it is still called, hooks and all
        for name in _HOOKS:
            if getattr(module, name) or old in heirs:
                getattr(module, name).update(getattr(old, name))
            else:  # the very dictionary: handles that users hold go on to remove their hooks
                setattr(module, name, getattr(old, name))
        module._is_full_backward_hook = old._is_full_backward_hook
    heirs.setdefault(old, module)
    return module


def _instantiate(site: ActivationSite, new: _New) -> nn.Module:
    name, options = registry.parse(new) if isinstance(new, str) else ("", {})
    if name == "normalized":
        # The function with the site's own options and parameters. A shallow copy, since it may work in place.
        function = site.module.function if isinstance(site.module, NormalizedActivation) else copy.copy(site.module)
        if isinstance(function, nn.Module):
            if hasattr(function, "inplace"):
                function.inplace = False  # type: ignore[assignment]
            for hooks in _HOOKS:  # they are the new module's
                setattr(function, hooks, type(getattr(function, hooks))())
        return registry.create(name, function=function, **options)
    if isinstance(new, str):
        return registry.create(name, function=site.function, **options)
    if inspect.isclass(new):
        try:
            return cast(nn.Module, new())
        except TypeError as error:
            raise TypeError(
                f"{new.__name__} can't be made without arguments ({error}). Pass a function that gives them:"
                f" lambda site: {new.__name__}(...)"
            ) from error
    made = new(site)
    if not isinstance(made, nn.Module):
        raise TypeError(f"The replacement of {site.name!r} must be an nn.Module, got {made!r}.")
    return made


def _warn_unchanged(model: nn.Module, sites: ActivationSites, to: Replacement) -> None:
    found = ", ".join(f"{site.name or '(root)'} ({site.function})" for site in sites)
    hint = (
        f"Found {found}. Name functions in a mapping to replace them, such as {{{sites[0].function!r}: ...}}."
        if sites
        else "It has no activation modules. Calls of functions such as F.relu(x) can't be replaced: make them modules."
    )
    what = f"replace_activations({type(model).__name__}, {to!r}) replaced nothing."
    warnings.warn(f"{what} {hint}", UserWarning, stacklevel=3)
