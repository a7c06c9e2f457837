"""The places in a model's tree, and in its modules' source, where activations are applied."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_noisy.replacement.by_layer import ByLayer
from lightning_noisy.replacement.call_finder import NAME, Call, calls_of, is_read
from lightning_noisy.replacement.dataflow import is_layer
from lightning_noisy.replacement.origin import Origin
from lightning_noisy.replacement.recognition import (
    RECURRENT,
    function_of,
    held_activations,
    held_function,
    held_in,
    mentions,
    recurrent_function,
)
from lightning_noisy.replacement.source import CHILDREN, names_in, own_class

__all__ = ["Candidate", "function_name", "walk"]


@dataclass
class Candidate:
    """A place before it is known what becomes of it.

    Attributes:
        function: plain name of the function; empty if it is only here for its reasons.
        number: of the module that it is in, in the order of the model's tree.
        reasons: what could not be looked into.
        is_held: whether a plain container has the module, too, so that it may be called from there.
        is_doubled: whether its owner has the module twice, and code goes through children, which have it once.
    """

    path: str
    owner: nn.Module
    kind: str
    key: str
    function: str
    module: nn.Module | None
    call: Call | None = None
    number: int = 0
    layer_follows: bool = False
    is_held: bool = False
    is_doubled: bool = False
    reasons: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Path of the module, or of the owner with the key of the call."""
        is_child = self.kind in ("module", "attribute", "recurrent")
        return self.key if is_child and not self.path else f"{self.path}{'.' if is_child else ':'}{self.key}"


def walk(model: nn.Module, also: Mapping[type[nn.Module], str]) -> list[Candidate]:
    """All places of a model; nothing of it is run.

    Args:
        model: any module.
        also: classes that are activations, with the names of their functions.
    """
    walker = _Walker(also)
    found = list(walker.places(model, ""))
    compared = _compared_types(model)
    names = set[str]().union(*(names_in(cls) for cls in {own_class(module) for module in model.modules()}))
    goes_through = bool(names & (CHILDREN | {"checkpoint_sequential"}))
    for each in found:
        child = each.key if each.call is None or each.call.child is None else each.call.child
        reason = ""
        if each.call is not None and own_class(each.owner) in compared and each.key not in each.owner._modules:
            reason = f"another module looks at the type {type(each.owner).__name__}, which would change"
        elif code := walker.read.get((id(each.owner), child)):
            reason = f"{code}, which a replacement may not have"
        if reason:
            each.function, each.reasons = "", [*each.reasons, f"{each.name}: {reason}"]
        each.is_held = id(each.module) in walker.held
        siblings = list(each.owner._modules.values())
        each.is_doubled = goes_through and each.module is not None and siblings.count(each.module) > 1
    transformer = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)  # whose linear2 follows
    order = {module: number for number, module in enumerate(model.modules())}
    last = max((number for module, number in order.items() if is_layer(module)), default=-1)
    for each in found:
        end = max(order[module] for module in each.owner.modules()) if each.function else last
        if each.kind == "module" and each.call is None and each.module is not None:
            end = order[each.module]
        in_code = each.call is not None and each.call.layer_follows
        each.layer_follows = end < last or in_code or isinstance(each.owner, transformer)
    return found


def _compared_types(model: nn.Module) -> set[type]:
    """The classes of modules that methods mention beside ``type`` or ``__class__``."""
    found: set[type] = set()
    classes = {own_class(module): type(module).__name__ for module in model.modules()}
    for cls in classes:
        for function in vars(cls).values():
            code = getattr(function, "__code__", None)
            if code is None or f"{cls.__module__}.".startswith("torch."):
                continue
            names = {name for each in (code, *filter(inspect.iscode, code.co_consts)) for name in each.co_names}
            if names & {"type", "__class__"}:
                found |= {each for each in classes if each.__name__ in names}
    return found


def function_name(module: Any, also: Mapping[type[nn.Module], str]) -> str | None:
    """The name of the function that a module applies, or a function that is held; None if it is no activation."""
    if isinstance(module, ByLayer):
        return function_name(module.first, also)
    if isinstance(module, RECURRENT):  # also one that has replaced another
        return None
    origin = Origin.of(module) if isinstance(module, nn.Module) else None
    return function_of(module, also) or (None if origin is None else origin.function)


class _Walker:
    """Goes through a model.

    Attributes:
        read: see :class:`~lightning_noisy.replacement.call_finder.Found`.
        held: the ids of modules in plain containers.
    """

    def __init__(self, also: Mapping[type[nn.Module], str]) -> None:
        self.also = also
        self.seen: dict[nn.Module, int] = {}
        self.read: dict[tuple[int, str], str] = {}
        self.held: set[int] = set()

    def places(self, owner: nn.Module, path: str) -> Iterator[Candidate]:
        """The places in a module, and in those below."""
        number = self.seen.setdefault(owner, len(self.seen))
        where = path or "(root)"
        if isinstance(owner, torch.jit.ScriptModule):
            yield Candidate(path, owner, "", "", "", None, reasons=[f"{where}: it is scripted"])
            return
        found = calls_of(owner, functools.partial(function_name, also=self.also))
        self.read |= found.read
        reasons = [f"{where}: {reason}" for reason in found.reasons]
        uses = {call.key: call for call in found.calls if call.kind == "module"}
        sites = owner._modules.get(NAME)
        for key, value in owner.__dict__.items():
            if key.startswith("_"):
                continue
            self.held |= {id(each) for each in held_in(value) if isinstance(each, nn.Module)}
            if (function := held_function(value)) is not None and not is_read(owner):
                reasons.append(
                    f"{where}: {key}, a {function[0]}: the source that calls it can't be read; make it a module"
                )
            elif function is not None:
                yield Candidate(path, owner, "attribute", key, *function, uses.pop(key, None), number)
            elif not isinstance(value, nn.Module) and callable(value) and (names := mentions(value)):
                reasons.append(f"{where}: {key}, which mentions {', '.join(names)}: make it a module")
            elif held := held_activations(value):
                reasons.append(
                    f"{where}: {held} in the container {key!r}; make it an nn.ModuleList or an nn.ModuleDict"
                )
        if reasons:
            yield Candidate(path, owner, "", "", "", None, reasons=reasons)
        for key, child in owner._modules.items():  # named_children() would pass over the second use of an instance
            if child is None or key == NAME or isinstance(child, ParametrizationList):  # whose functions are of weights
                continue
            name = function_name(child, self.also)
            if name is not None:  # what an activation consists of is no site of its own
                yield Candidate(path, owner, "module", key, name, child, uses.pop(key, None), len(self.seen))
            elif isinstance(child, RECURRENT):
                yield Candidate(path, owner, "recurrent", key, recurrent_function(child), child, number=len(self.seen))
            elif child not in self.seen:
                yield from self.places(child, f"{path}.{key}" if path else key)
        for call in found.calls:
            if call.kind == "module" and call.key not in uses:
                continue
            module = call.plain if sites is None else sites._modules.get(call.key, call.plain)
            if module is None and call.child is not None:
                module = owner._modules.get(call.child)
                if module is None and (function := held_function(owner.__dict__.get(call.child))) is not None:
                    module = function[1]
            # A second use is named like a child, not like a call.
            # A further use of a child may have another activation than its first one after a replacement.
            own = function_name(module, self.also) if call.kind == "module" and module is not None else None
            yield Candidate(path, owner, call.kind, call.key, own or call.function, module, call, number)
