"""Where a replacement comes from, what it computes, and whether another one would be the same."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_noisy.nn.noisy import NoisyActivation
from lightning_noisy.nn.normalized import NormalizedActivation

__all__ = ["Origin", "computes", "fingerprint", "written"]

# Options that control how statistics are updated, or that change during training, but not what is computed.
_OF_TRAINING = {
    NoisyActivation: ("c",),  # its current value
    NormalizedActivation: ("momentum", "bounds", "max_rejections", "learn_alpha", "stride", "synchronized"),
}


@dataclass(frozen=True)
class Origin:
    """The replacement that a module comes from; a plain attribute of the module, copied with it.

    Attributes:
        call: fingerprint of ``to`` and of all other options.
        to: fingerprint of ``to``.
        new: fingerprint of what ``to`` says for the place.
        site: name of the place.
        written: what ``to`` says for the place, as a user would write it.
        options: of a registered name, which its class may not show.
        function: plain name of the function whose place it has.
        folded: whether its normalization is in the next layer's weights.
    """

    call: str
    to: str
    new: str
    site: str
    written: str
    options: str = ""
    function: str = ""
    folded: bool = False

    _attribute = "_activation_origin"

    @classmethod
    def of(cls, module: nn.Module | None) -> Origin | None:
        """The origin of a module, or None if it doesn't come from a replacement."""
        return None if module is None else module.__dict__.get(cls._attribute)

    def leave(self, module: nn.Module) -> None:
        """Store it on a module."""
        module.__dict__[self._attribute] = self


def fingerprint(thing: Any, _known: dict[int, tuple[Any, str]] | None = None) -> str:
    """A string that is equal for equal content, also across processes and if the same source defines it again.

    Functions are compared by code, defaults, closure and the plain globals that they read; classes by name and methods;
    modules by class, options and children, but without children for the user's own classes, where these may be what is
    replaced; tensors by value; other objects by class and attributes.
    """
    if isinstance(thing, (str, int, float, complex, type(None), torch.dtype, torch.device)):
        return repr(thing)
    if isinstance(thing, bytes):
        return _digest(thing)
    known = {} if _known is None else _known
    if id(thing) not in known:
        known[id(thing)] = thing, "..."  # if it contains itself, as a recursive function does
        parts = _parts(thing, functools.partial(fingerprint, _known=known))
        known[id(thing)] = thing, _digest(repr(parts).encode())
    return known[id(thing)][1]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _parts(thing: Any, inside: Callable[[Any], str]) -> Any:
    if isinstance(thing, Mapping):
        return "mapping", sorted((str(key), inside(value)) for key, value in thing.items())
    if isinstance(thing, (list, tuple)):
        return "sequence", [inside(each) for each in thing]
    if isinstance(thing, (set, frozenset)):
        return "set", sorted(inside(each) for each in thing)
    if isinstance(thing, functools.partial):
        return "partial", inside(thing.func), inside(thing.args), inside(thing.keywords)
    if isinstance(thing, types.MethodType):
        return "method", inside(thing.__func__), inside(thing.__self__)
    if isinstance(thing, types.CodeType):
        return thing.co_code, thing.co_names, thing.co_freevars, inside(thing.co_consts)
    if isinstance(thing, types.FunctionType):
        if _is_library(thing.__module__):
            return thing.__module__, thing.__qualname__
        cells = [inside(_cell(cell)) for cell in thing.__closure__ or ()]
        read = _globals(thing.__code__, thing.__globals__)
        plain = [(name, inside(value)) for name, value in read if _is_plain(value)]
        return inside(thing.__code__), inside(thing.__defaults__), inside(thing.__kwdefaults__), cells, plain
    if inspect.isclass(thing):
        own = {} if _is_library(thing.__module__) else vars(thing)
        methods = {name: each for name, each in own.items() if isinstance(each, types.FunctionType)}
        return "class", thing.__module__, thing.__qualname__, inside(methods)
    if isinstance(thing, torch.Tensor):
        flat = thing.detach().reshape(-1).view(torch.uint8)
        values = b"" if thing.is_meta else flat.cpu().numpy().tobytes()
        return "tensor", str(thing.dtype), tuple(thing.shape), inside(values)
    if isinstance(thing, nn.Module):
        options = {name: each for name, each in vars(thing).items() if name[:1] != "_" and name != "training"}
        children = thing._modules if _is_library(type(thing).__module__) else {}
        return inside(type(thing)), inside(options), inside(children)
    if hasattr(thing, "tobytes") and hasattr(thing, "shape"):
        return "array", str(thing.dtype), thing.shape, inside(thing.tobytes())
    if isinstance(thing, (types.BuiltinFunctionType, types.ModuleType)) or not hasattr(thing, "__dict__"):
        return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(thing))
    return inside(type(thing)), inside(vars(thing))


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return None


def _globals(code: types.CodeType, names: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The globals that a code object may read, those of nested code objects included."""
    yield from ((name, names[name]) for name in code.co_names if name in names)
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            yield from _globals(each, names)


def _is_plain(value: Any, depth: int = 4) -> bool:
    """Whether a global is data, a function or a class; other objects may change while they are used."""
    if isinstance(value, (str, bytes, int, float, complex, type(None), type, types.FunctionType, functools.partial)):
        return True
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = list(value)
    elif isinstance(value, Mapping):
        parts = list(value.values())
    else:  # such as a namespace of options
        parts = list(getattr(value, "__dict__", {}).values()) or [object]
        depth = 0 if isinstance(value, (nn.Module, types.ModuleType)) or not hasattr(value, "__dict__") else depth
    return depth > 0 and all(_is_plain(part, depth - 1) for part in parts)


def _is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in (
        "builtins",
        "torch",
        "lightning",
        "lightning_noisy",
        "pytorch_lightning",
    )


def computes(module: nn.Module) -> str:
    """What a module computes: its class and the options that affect the output, those of its children included.

    Only classes of torch and of this package include their options: the repr of others may contain anything.
    """
    options = ""
    if type(module).__module__.startswith(("torch.", "lightning_noisy.")):
        options = module.extra_repr()
        for cls, names in _OF_TRAINING.items():
            if isinstance(module, cls):
                options = re.sub(rf"\b({'|'.join(names)}|inplace)=(\([^)]*\)|[^,]*)(, )?", "", options).rstrip(", ")
        if isinstance(module, NoisyActivation):
            options += f", c={module._first_c:g} at the start"
    inside = [options] if options else []
    inside += [computes(child) for child in module.children()]
    return f"{type(module).__name__}({', '.join(inside)})"


def written(new: Any) -> str:
    """A replacement as a user would name it."""
    if isinstance(new, tuple):  # of gates, and of other activations
        return " and ".join(dict.fromkeys(written(each) for each in new))
    name = getattr(new, "__qualname__", type(new).__qualname__)
    return repr(new) if isinstance(new, str) else name if inspect.isclass(new) else f"the function {name}"
