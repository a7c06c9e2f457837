"""Recognize modules and functions that are activations, and which function they compute."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from lightning_noisy.nn import registry
from lightning_noisy.replacement.call_finder import FUNCTIONS, UnreadError, plain_module

__all__ = ["RECURRENT", "Also", "check_also", "function_of", "held_activations", "held_function", "recurrent_function"]

RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def held_function(value: object) -> tuple[str, nn.Module] | None:
    """Name and equivalent module of an activation function held as an attribute, or None."""
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = {}
    if isinstance(value, functools.partial):
        partial: functools.partial[Any] = value
        value, arguments, options = partial.func, partial.args, dict(partial.keywords)
    if not callable(value) or isinstance(value, nn.Module) or value not in FUNCTIONS:
        return None
    name, inplace = FUNCTIONS[value]
    inplace = bool(options.pop("inplace", False)) or inplace
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


# Activation modules of other libraries, by where they are defined: their names without "Activation", in lower case.
_LIBRARIES = ("transformers.activations", "timm.layers.activations", "timm.layers.activations_me")
_THEIR_NAMES = {
    **{"newgelu": "gelu", "fastgelu": "gelu", "pytorchgelutanh": "gelu", "gelutanh": "gelu", "accurategelu": "gelu"},
    **{"swish": "silu", "quickgelu": "quick_gelu", "relusquared": "relu2", "clippedgelu": "clipped_gelu"},
    **{
        name: name
        for name in ("gelu", "silu", "mish", "hardswish", "hardsigmoid", "sigmoid", "tanh", "prelu", "laplace")
    },
    **{"hardmish": "hard_mish"},
}

# Classes of the user's own that are activations: with the plain name of their function, if they have one.
Also = Mapping[type[nn.Module], str] | Collection[type[nn.Module]]


def _library_function(cls: type[nn.Module]) -> str | None:
    if cls.__module__ not in _LIBRARIES:
        return None
    return _THEIR_NAMES.get(cls.__name__.removesuffix("Activation").removesuffix("Me").lower())


def check_also(also: Also) -> Mapping[type[nn.Module], str]:
    """The classes with the names of their functions.

    Raises:
        TypeError: if there is anything else than classes of modules in it.
    """
    names = also if isinstance(also, Mapping) else {cls: getattr(cls, "__name__", "").lower() for cls in also}
    for cls in names:
        if not (inspect.isclass(cls) and issubclass(cls, nn.Module)):
            raise TypeError(f"also must have classes of modules, such as also=(MyGELU,), got {cls!r}.")
    return names


def function_of(module: Any, also: Mapping[type[nn.Module], str]) -> str | None:
    """The name of the function that a module, or a function held as an attribute, applies; None if it has none.

    A module counts by its type, and is never run.
    """
    if not isinstance(module, nn.Module):
        held = held_function(module)
        return held[0] if held else None
    return registry.function_name(module) or _library_function(type(module)) or also.get(type(module))


def recurrent_function(module: nn.Module) -> str:
    """The name of the function in a recurrent layer."""
    return "relu" if "RELU" in str(getattr(module, "mode", getattr(module, "nonlinearity", ""))).upper() else "tanh"
