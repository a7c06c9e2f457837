"""Recognize modules and functions that are activations, and which function they compute."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_noisy.nn import registry
from lightning_noisy.replacement.source import UnreadError, is_foreign, is_set, nested_codes

__all__ = [
    "FUNCTIONS",
    "LIBRARIES",
    "METHODS",
    "MODULES",
    "NAMES",
    "RECURRENT",
    "Also",
    "InPlace",
    "check_also",
    "function_of",
    "held_activations",
    "held_function",
    "held_in",
    "innermost",
    "is_function",
    "mentions",
    "plain_module",
    "recurrent_function",
]

RECURRENT = (nn.RNNBase, nn.RNNCellBase)
# The functional forms of torch's activation modules, with their names and whether they work in place.
FUNCTIONS: dict[object, tuple[str, bool]] = {
    getattr(space, name + suffix): (name, bool(suffix))
    for name in registry.PLAIN
    if name != "prelu"  # takes its weight as an argument
    for space in (F, torch)
    for suffix in ("", "_")
    if hasattr(space, name + suffix)
}
METHODS = {
    name + suffix: (name, bool(suffix))
    for name in ("relu", "sigmoid", "tanh", "hardshrink")
    for suffix in ("", "_")
    if hasattr(Tensor, name + suffix)
}
MODULES = {cls: name for name, cls in registry.PLAIN.items() if name != "prelu"}
NAMES = {name + suffix for name in registry.PLAIN for suffix in ("", "_")} | {cls.__name__ for cls in MODULES}


class InPlace(nn.Module):
    """Writes the output of an activation into its input, for classes without an ``inplace`` option."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function, self.inplace = function, True

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation."""
        return input.copy_(self.function(input.clone())) if self.inplace else cast(Tensor, self.function(input))


def plain_module(name: str, *arguments: Any, inplace: bool = False, **options: Any) -> nn.Module:
    """The torch module that is equivalent to a function with these arguments."""
    plain = registry.PLAIN[name](
        *arguments, **options, **({"inplace": True} if inplace and _can_be_in_place(name) else {})
    )
    return InPlace(plain) if inplace and not _can_be_in_place(name) else plain


def _can_be_in_place(name: str) -> bool:
    return "inplace" in inspect.signature(registry.PLAIN[name]).parameters


def innermost(function: Any) -> Any:
    """What a partial function calls."""
    return innermost(function.func) if isinstance(function, functools.partial) else function


def is_function(value: object) -> bool:
    """Whether something is an activation function, as ``F.relu``."""
    return getattr(type(value), "__hash__", None) is not None and value in FUNCTIONS


def mentions(function: Any, seen: frozenset[Any] = frozenset()) -> list[str]:
    """The activations that a function, or what it wraps or calls, mentions; empty for one of a library."""
    function = inspect.unwrap(innermost(function)) if callable(function) else function
    function = getattr(function, "__func__", function)
    if not isinstance(function, FunctionType) or is_foreign(function) or function in seen:
        return []
    seen |= {function}
    codes = [function.__code__, *nested_codes(function.__code__)]
    names = {name for code in codes for name in code.co_names}
    known = [function.__globals__[name] for name in names if name in function.__globals__]  # under other names, too
    known += [cell.cell_contents for cell in function.__closure__ or () if is_set(cell)]
    found = {*(names & NAMES), *(FUNCTIONS[each][0] for each in known if is_function(each))}
    if "getattr" in names and any(each is F or each is torch or each is nn for each in known):
        found.add("getattr of torch's functions")
    inner = [each for each in known if isinstance(each, FunctionType) and each is not function]
    return sorted(found.union(*(mentions(each, seen) for each in inner)))


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
    found = [
        name
        for each in held_in(value)
        if (name := registry.function_name(each) if isinstance(each, nn.Module) else (held_function(each) or ("",))[0])
    ]
    return ", ".join(dict.fromkeys(found))


def held_in(value: object, depth: int = 3) -> Iterator[object]:
    """What is in a plain container, and in those in it."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
    if isinstance(items, Iterable) and len(items) <= 1000 and depth:
        for each in items:
            yield each
            yield from held_in(each, depth - 1)


# Activation modules of other libraries, by where they are defined: their names without "Activation", in lower case.
LIBRARIES = ("transformers.activations", "timm.layers.activations", "timm.layers.activations_me")
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
    if cls.__module__ not in LIBRARIES:
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
