"""Find the calls of activation functions in the source of a module's methods.

The source is parsed, never executed, and is used only if it compiles to the running code.
"""

from __future__ import annotations

import ast
import builtins
import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from lightning_noisy.replacement.recognition import (
    FUNCTIONS,
    METHODS,
    MODULES,
    NAMES,
    innermost,
    is_function,
    mentions,
    plain_module,
)
from lightning_noisy.replacement.source import ENTRIES, UnreadError, is_foreign, is_set, method_of, own_class, source_of

__all__ = ["Call", "Found", "calls_of", "position_of"]
NAME = "activation_calls"  # the child that holds the modules of redirected calls
_OF_MODULES = set(dir(nn.Module()))
Position = tuple[int, int, int, int]


@dataclass(frozen=True)
class Call:
    """One call in the source of a module's class.

    Attributes:
        method: name of the method that contains the call.
        position: first line and column, last line and column; lines are counted from the method's first.
        key: ``"relu#0"`` for the first call of a ReLU; for calls of a child, its name, such as ``"relu"``, and
            ``"relu#2"`` for the second call.
        kind: ``"function"``, ``"method"``, ``"inline"`` or ``"module"``.
        function: plain name of the function.
        in_loop: whether it is in a loop.
        child: name of the child that is called, for the kind ``"module"``.
        layer_follows: whether a layer of the same module is called later in the same method.
        plain: what the call computes, as a module; None for a child, or where that can't be read.
    """

    method: str
    position: Position
    key: str
    kind: str
    function: str
    in_loop: bool
    child: str | None = None
    layer_follows: bool = field(default=False, compare=False)
    plain: nn.Module | None = field(default=None, compare=False)


@dataclass
class Found:
    """What the code of a module's class shows.

    Attributes:
        calls: in source order, from ``forward`` and Lightning's steps on through the methods that these call.
        reasons: what could not be resolved.
        read: the activations of which attributes are read, by the ids of their owners and their keys, with the code.
    """

    calls: list[Call] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    read: dict[tuple[int, str], str] = field(default_factory=dict)


def calls_of(owner: nn.Module, name_of: Callable[[Any], str | None]) -> Found:
    """The calls of activation functions, and of children that are activations, in the code of a module's class.

    Args:
        owner: any module; its code is not run.
        name_of: maps a module, or a function held as an attribute, to the plain name of its activation, or None.
    """
    cls, found = own_class(owner), Found()
    if "forward" in owner.__dict__ or isinstance(owner, fx.GraphModule):
        if not is_foreign(cls) or isinstance(owner, fx.GraphModule):
            found.reasons.append("its forward is made when it runs, and is not that of its class")
        return found
    counts: dict[str, int] = {}
    waiting, seen = [name for name in ENTRIES if hasattr(cls, name)], set[str]()
    while waiting:
        name = waiting.pop(0)
        function = method_of(cls, name)
        if name in seen or function is None:
            continue
        seen.add(name)
        try:
            reader = _Reader(owner, function, name, counts, name_of)
        except UnreadError as reason:
            if mentioned := mentions(function):
                found.reasons.append(f"{name}, which mentions {', '.join(mentioned)}: {reason}")
            continue
        last = max(reader.layer_ends, default=(-1, -1))
        found.calls += [replace(call, layer_follows=call.in_loop or call.position[2:] < last) for call in reader.calls]
        found.reasons += reader.reasons
        found.read |= reader.read
        waiting += [each for each in reader.methods if each not in seen]
    return found


def is_read(owner: nn.Module) -> bool:
    """Whether the source of a module's forward is at hand, or it is of a library."""
    try:
        method = method_of(own_class(owner), "forward")
        return method is None or bool(source_of(method))
    except UnreadError:
        return False


class _Reader(ast.NodeVisitor):
    """Collects the calls in one method."""

    def __init__(
        self,
        owner: nn.Module,
        function: FunctionType,
        name: str,
        counts: dict[str, int],
        name_of: Callable[[Any], str | None],
        level: int | None = None,
    ) -> None:
        self.name_of = name_of
        self.owner, self.function, self.name, self.counts = owner, function, name, counts
        # Where the method is among the class and its bases.
        levels = (i for i, cls in enumerate(own_class(owner).__mro__) if name in cls.__dict__)
        self.level = next(levels, 0) if level is None else level
        self.self_name = function.__code__.co_varnames[0]
        # Includes nested functions: a name that is a variable anywhere is not resolved as a global.
        tree, self.first = source_of(function)
        nodes = list(ast.walk(tree))
        self.local = {node.arg for node in nodes if isinstance(node, ast.arg)}
        self.local |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        self.local |= {(node.asname or node.name).partition(".")[0] for node in nodes if isinstance(node, ast.alias)}
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        self.free = {key: cell.cell_contents for key, cell in cells if is_set(cell)}
        self.calls: list[Call] = []
        self.methods: list[str] = []
        self.reasons: list[str] = []
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        self.reasons += [
            f"{name} has {FUNCTIONS[each][0]} as a default argument; make it a module"
            for each in defaults
            if is_function(each)
        ]
        self.mentioned: dict[ast.expr, str] = {}
        self.taken: set[ast.expr] = set()
        self.loops = 0
        self.layer_ends: list[tuple[int, int]] = []  # of calls of children with parameters
        self.read: dict[tuple[int, str], str] = {}
        self.visit(tree)
        if left := sorted({named for node, named in self.mentioned.items() if node not in self.taken}):
            self.reasons.append(f"{name} has {', '.join(left)} other than in a call that can be replaced")

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self._in_loop(node)

    def visit_While(self, node: ast.While) -> None:
        self._in_loop(node)

    def visit(self, node: ast.AST) -> None:
        """Visit a node; a comprehension or a lambda counts as a loop."""
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda)):
            self._in_loop(node)
        else:
            super().visit(node)

    def _in_loop(self, node: ast.AST) -> None:
        self.loops += 1
        for name, value in ast.iter_fields(node):
            if not (isinstance(node, ast.For) and name == "iter"):
                for each in value if isinstance(value, list) else [value]:
                    if isinstance(each, ast.AST):
                        self.visit(each)
        self.loops -= 1

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        nested = node.name != self.function.__name__
        self.loops += nested
        for statement in node.body:
            self.visit(statement)
        self.loops -= nested

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Follow methods that are called, or passed on to be called; note what is read of activations."""
        self.generic_visit(node)
        holder, key, value = self._child(node.value)
        if holder is not None and node.attr not in _OF_MODULES and self.name_of(value):
            self.read[id(holder), key] = f"{self.name} reads {ast.unparse(node)}"
        own = _attribute_of(node, self.self_name)
        if own is not None:
            if own.startswith("__") and not own.endswith("__"):  # private: Python mangles the name
                own = f"_{self.function.__qualname__.split('.')[-2].lstrip('_')}{own}"
            found = inspect.getattr_static(own_class(self.owner), own, None)
            if isinstance(found, (staticmethod, classmethod)):
                self._name_helper(own, found.__func__)
            elif isinstance(found, property):
                self._name_helper(own, found.fget)
            elif callable(found):
                self.methods.append(own)
        elif node.attr in NAMES:
            self._mention(node, node.attr)

    def visit_Name(self, node: ast.Name) -> None:
        """Record an activation that is mentioned by its name."""
        if node.id in NAMES and isinstance(node.ctx, ast.Load) and node.id not in self.local:
            self._mention(node, node.id)

    def _mention(self, node: ast.expr, name: str) -> None:
        known = self._resolve(node)
        if is_function(known) or (inspect.isclass(known) and known in MODULES):
            self.mentioned[node] = name

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        if any(isinstance(argument, ast.Starred) for argument in node.args):
            return
        called = {_attribute_of(each, self.self_name) for each in ast.walk(node.func) if isinstance(each, ast.expr)}
        layers = (self.owner._modules.get(each) for each in called if each is not None)
        if any(
            layer is not None and not self.name_of(layer) and any(True for _ in layer.parameters()) for layer in layers
        ):
            self.layer_ends.append(position_of(node, self.first)[2:])
        own = _attribute_of(node.func, self.self_name)
        if own is not None:
            child = self.owner._modules.get(own, self.owner.__dict__.get(own))
            if child is not None:
                function = self.name_of(child)
                if function and isinstance(child, nn.Module) is False and len(node.args) + len(node.keywords) > 1:
                    self._add_function(node, "function", *FUNCTIONS[innermost(child)], node.args[1:])
                elif function and len(node.args) + len(node.keywords) == 1:
                    count = self.counts[own] = self.counts.get(own, 0) + 1
                    self._add(node, own if count == 1 else f"{own}#{count}", "module", function, child=own)
            return
        if isinstance(node.func, ast.Attribute) and _is_super(node.func.value):
            self._inherited(node.func.attr)
            return
        known = self._resolve(node.func)
        if known is getattr and node.args and any(self._resolve(node.args[0]) is each for each in (F, torch, nn)):
            self.reasons.append(f"{ast.unparse(node)} in {self.name}: hold the function as an attribute")
        elif isinstance(node.func, ast.Attribute) and _is_autograd(self._resolve(node.func.value)):
            self._name_helper(ast.unparse(node.func), self._resolve(node.func.value).forward)
        elif is_function(known):
            name, inplace = FUNCTIONS[known]
            self._add_function(node, "function", name, inplace, node.args[1:])
        elif isinstance(node.func, ast.Call) and len(node.args) == 1:
            cls, inner = self._resolve(node.func.func), node.func
            if inspect.isclass(cls) and cls in MODULES:
                self._add_function(node, "inline", MODULES[cls], False, inner.args, inner.keywords)
        elif isinstance(known, nn.Module) and len(node.args) == 1 and not node.keywords:  # outside the module tree
            if function := self.name_of(known):
                count = self.counts[function] = self.counts.get(function, -1) + 1
                self._add(node, f"{function}#{count}", "inline", function, plain=copy.copy(known))
        elif isinstance(known, FunctionType):
            self._name_helper(known.__name__, known)
        elif (
            isinstance(node.func, ast.Attribute)
            and known is _UNKNOWN
            and node.func.attr in METHODS
            and not (node.args or node.keywords)
        ):
            name, inplace = METHODS[node.func.attr]
            self._add_function(node, "method", name, inplace, [])

    def _name_helper(self, name: str, function: Any) -> None:
        """Report a function that is not a method of the module and mentions activations."""
        if mentioned := mentions(function):
            self.reasons.append(f"{name}, which mentions {', '.join(mentioned)}: make it a method, or a module")

    def _inherited(self, name: str) -> None:
        """Report activations in a base class's method that is called through ``super()``; follow what it calls."""
        mro = own_class(self.owner).__mro__
        level = next((i for i in range(self.level + 1, len(mro)) if name in mro[i].__dict__), len(mro) - 1)
        function = method_of(mro[level], name)
        if function is None:
            return
        try:
            reader = _Reader(self.owner, function, name, {}, self.name_of, level)
        except UnreadError:
            functions = mentions(function)
        else:
            functions = sorted({call.function for call in reader.calls if call.kind != "module"})
            self.methods += reader.methods
            self.reasons += reader.reasons
            self.read |= reader.read
        if functions:
            self.reasons.append(f"super().{name}, which mentions {', '.join(functions)}")

    def _add_function(
        self,
        node: ast.Call,
        kind: str,
        name: str,
        inplace: bool,
        arguments: list[ast.expr],
        keywords: list[ast.keyword] | None = None,
    ) -> None:
        if kind == "function" and not node.args and not any(each.arg == "input" for each in node.keywords):
            return
        count = self.counts[name] = self.counts.get(name, -1) + 1
        try:
            options = {
                str(each.arg): self._value(each.value)
                for each in (node.keywords if keywords is None else keywords)
                if each.arg != "input"
            }
            if name == "rrelu" and kind == "function":
                raise UnreadError("whether it draws is an argument, not the state of a module")
            inplace = bool(options.pop("inplace", False)) or inplace
            plain = plain_module(name, *map(self._value, arguments), inplace=inplace, **options)
        except (UnreadError, TypeError, ValueError):
            plain = None
        self._add(node, f"{name}#{count}", kind, name, plain=plain)

    def _add(self, node: ast.Call, key: str, kind: str, function: str, **more: Any) -> None:
        self.taken |= {node.func, node.func.func} if isinstance(node.func, ast.Call) else {node.func}
        self.calls.append(Call(self.name, position_of(node, self.first), key, kind, function, self.loops > 0, **more))

    def _resolve(self, node: ast.expr) -> Any:
        """The object that names and attributes resolve to, unless they start from a local variable."""
        if isinstance(node, ast.Name):
            if node.id in self.local:
                return _UNKNOWN
            if node.id in self.free:
                return self.free[node.id]
            return self.function.__globals__.get(node.id, getattr(builtins, node.id, _UNKNOWN))
        if isinstance(node, ast.Attribute):
            base = self._resolve(node.value)
            return _UNKNOWN if base is _UNKNOWN else getattr(base, node.attr, _UNKNOWN_ATTRIBUTE)
        return _UNKNOWN

    def _child(self, node: ast.expr) -> tuple[nn.Module | None, str, Any]:
        """What an expression such as ``self.net[1].act`` is, with the module that holds it and its key there."""
        holder: Any = None
        if isinstance(node, ast.Attribute):
            is_own = isinstance(node.value, ast.Name) and node.value.id == self.self_name
            holder, key = self.owner if is_own else self._child(node.value)[2], node.attr
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            holder, key = self._child(node.value)[2], str(node.slice.value)
        if not isinstance(holder, nn.Module):
            return None, "", None
        return holder, key, holder._modules.get(key, holder.__dict__.get(key))

    def _value(self, node: ast.expr) -> Any:
        """The value of a literal, or the current value of an attribute of the module or of a nonlocal variable."""
        attribute = _attribute_of(node, self.self_name)
        value = self._resolve(node) if attribute is None else getattr(self.owner, attribute, None)
        if isinstance(value, (bool, int, float, str)):
            return value
        try:
            return ast.literal_eval(node)
        except ValueError:
            raise UnreadError("an argument is known only when it runs") from None


_UNKNOWN, _UNKNOWN_ATTRIBUTE = object(), object()


def _is_autograd(thing: Any) -> bool:
    return inspect.isclass(thing) and issubclass(thing, torch.autograd.Function)


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _attribute_of(node: ast.expr, name: str) -> str | None:
    """``"a"`` for ``self.a``."""
    is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name
    return cast(ast.Attribute, node).attr if is_own else None


def position_of(node: ast.Call, first: int) -> Position:
    """The position of a call in a method that starts at line ``first``."""
    last = cast(int, node.end_lineno), cast(int, node.end_col_offset)
    return node.lineno - first, node.col_offset, last[0] - first, last[1]
