"""Recognize modules and functions that are activations, and which function they compute."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_noisy.nn import registry
from lightning_noisy.replacement.call_finder import FUNCTIONS, UnreadError, plain_module

__all__ = ["RECURRENT", "function_of", "held_activations", "held_function", "recurrent_function"]

RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def held_function(value: object) -> tuple[str, nn.Module] | None:
    """Name and equivalent module of an activation function held as an attribute, or None."""
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = {}
    if isinstance(value, functools.partial):
        partial: functools.partial[Any] = value
        value, arguments, options = partial.func, partial.args, partial.keywords
    if not callable(value) or isinstance(value, nn.Module) or value not in FUNCTIONS:
        return None
    name, inplace = FUNCTIONS[value]
    try:
        return name, plain_module(name, *arguments, inplace=inplace, **options)
    except (UnreadError, TypeError):
        return None


def held_activations(value: object) -> str:
    """The names of the activations in a plain container."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    if not isinstance(items, Iterable) or len(items) > 1000:
        return ""
    found = [
        name
        for each in items
        if (name := registry.function_name(each) if isinstance(each, nn.Module) else (held_function(each) or ("",))[0])
    ]
    return ", ".join(dict.fromkeys(found))


_GRID = torch.linspace(-4, 4, 64)


def _foreign_function(module: nn.Module) -> str | None:
    """The name of the function of an activation module from outside torch; None if it isn't one.

    It is one if it has no children, parameters or buffers, and its forward takes one tensor and computes an elementwise
    function that is not affine.
    """
    space = f"{type(module).__module__}."
    if space.startswith(("torch.", "lightning_noisy.")) or module._modules or module._parameters or module._buffers:
        return None
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
        needed = [each for each in parameters if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
        if len(needed) != 1 or parameters[0] is not needed[0]:
            return None
        twin = copy.copy(module)
        with torch.no_grad(), torch.random.fork_rng([]):
            y = twin.forward(_GRID.clone())
            if not isinstance(y, Tensor) or y.shape != _GRID.shape or not y.is_floating_point():
                return None
            if not torch.equal(twin.forward(_GRID.flip(0).view(8, 8)).view(-1).flip(0), y):
                return None
        bends = (y[2:] - 2 * y[1:-1] + y[:-2]).abs().amax()
        if not bends > 1e-4:
            return None
        for name, cls in registry.PLAIN.items():
            if name not in ("prelu", "rrelu") and torch.allclose(cls()(_GRID), y, atol=2e-3):
                return name
    except Exception:
        return None
    return type(module).__name__.lower()


def function_of(module: Any) -> str | None:
    """The plain name of a module, or of a function held as an attribute, if it is an activation; else None."""
    if not isinstance(module, nn.Module):
        held = held_function(module)
        return held[0] if held else None
    return registry.function_name(module) or _foreign_function(module)


def recurrent_function(module: nn.Module) -> str:
    """The name of the function in a recurrent layer."""
    return "relu" if "RELU" in str(getattr(module, "mode", getattr(module, "nonlinearity", ""))).upper() else "tanh"
