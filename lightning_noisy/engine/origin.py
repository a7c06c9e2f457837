"""Where a replacement comes from, what it computes, and whether another one would be the same."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_noisy.nn.noisy import NoisyActivation
from lightning_noisy.nn.normalized import NormalizedActivation

__all__ = ["Origin", "computes", "fingerprint", "written"]

# What says how statistics are followed, or changes during training; not what is computed.
_OF_TRAINING = {
    NoisyActivation: ("c",),
    NormalizedActivation: ("momentum", "bounds", "max_rejections", "learn_alpha", "stride", "synchronized"),
}


@dataclass(frozen=True)
class Origin:
    """What put a module into an activation's place; a plain attribute of the module, copied with it.

    Attributes:
        call: fingerprint of ``to`` and of what chose the places.
        to: fingerprint of ``to``.
        new: fingerprint of what ``to`` says for the place.
        folded: whether its normalization is in the next layer's weights.
    """

    call: str
    to: str
    new: str
    folded: bool = False

    _attribute = "_activation_origin"

    @classmethod
    def of(cls, module: nn.Module | None) -> Origin | None:
        """The origin of a module, or None if it is none of a replacement's."""
        return None if module is None else module.__dict__.get(cls._attribute)

    def leave(self, module: nn.Module) -> None:
        """Note it on a module."""
        module.__dict__[self._attribute] = self


def fingerprint(thing: Any) -> str:
    """Equal for what means the same.

    Names, numbers, and lists and mappings of them count by value, classes by identity, functions by code, defaults and
    closure: so a function that was defined anew by the same source counts as the same. Other objects count by repr.
    """
    return hashlib.sha256(repr(_parts(thing, ())).encode()).hexdigest()


def _parts(thing: Any, around: tuple[int, ...]) -> Any:
    if id(thing) in around:  # a recursive function
        return "..."
    around = (*around, id(thing))
    if isinstance(thing, Mapping):
        return "mapping", sorted((str(key), _parts(value, around)) for key, value in thing.items())
    if isinstance(thing, (list, tuple)):
        return "sequence", [_parts(each, around) for each in thing]
    if isinstance(thing, frozenset):  # of a code's constants
        return "set", sorted(map(repr, thing))
    if isinstance(thing, functools.partial):
        return "partial", _parts([thing.func, thing.args, thing.keywords], around)
    if isinstance(thing, types.MethodType):
        return "method", _parts(thing.__func__, around), id(thing.__self__)
    if isinstance(thing, types.CodeType):
        return thing.co_code, thing.co_names, thing.co_freevars, _parts(thing.co_consts, around)
    if isinstance(thing, types.FunctionType):
        cells = [_cell(cell) for cell in thing.__closure__ or ()]
        return "function", [_parts(each, around) for each in (thing.__code__, thing.__defaults__, cells)] + [
            _parts(thing.__kwdefaults__, around)
        ]
    if inspect.isclass(thing) or isinstance(thing, (nn.Module, torch.Tensor)):
        return type(thing).__qualname__, id(thing)
    return repr(thing)


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return None


def computes(module: nn.Module) -> str:
    """What a module computes: its class and the options that matter to the output, those of its children included.

    Only torch's classes and this package's have their options in it: what others print may be anything.
    """
    options = ""
    if type(module).__module__.startswith(("torch.", "lightning_noisy.")):
        options = module.extra_repr()
        for cls, names in _OF_TRAINING.items():
            if isinstance(module, cls):
                options = re.sub(rf"\b({'|'.join(names)}|inplace)=(\([^)]*\)|[^,]*)(, )?", "", options).rstrip(", ")
    inside = [options] if options else []
    inside += [computes(child) for child in module.children()]
    return f"{type(module).__name__}({', '.join(inside)})"


def written(new: Any) -> str:
    """A replacement as a user would name it."""
    name = getattr(new, "__qualname__", type(new).__qualname__)
    return repr(new) if isinstance(new, str) else name if inspect.isclass(new) else f"the function {name}"
