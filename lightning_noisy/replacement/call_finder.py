"""Find the calls of activation functions in the source of a module's methods.

The source is parsed, never executed, and is used only if it compiles to the running code.
"""

from __future__ import annotations

import ast
import builtins
import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import CellType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lightning_noisy.nn import registry
from lightning_noisy.replacement.source import UnreadError, source_of

__all__ = ["Call", "InPlace", "calls_of", "mentions", "own_class", "plain_module"]
NAME = "activation_calls"  # the child that holds the modules of redirected calls
ENTRIES = ("forward", "training_step", "validation_step", "test_step", "predict_step")
_FOREIGN = ("torch.", "lightning.", "pytorch_lightning.", "lightning_noisy.")
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
_MODULES = {cls: name for name, cls in registry.PLAIN.items() if name != "prelu"}
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


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, before its forward was rewritten."""
    return cast(type[nn.Module], getattr(type(module), "_original_class", type(module)))


def method_of(cls: type, name: str) -> FunctionType | None:
    """A method without its decorators, or None if it is from torch, Lightning or this package."""
    found = inspect.getattr_static(cls, name, None)
    if isinstance(found, (staticmethod, classmethod, property)):
        return None
    found = inspect.unwrap(found) if callable(found) else None
    if not isinstance(found, FunctionType) or f"{found.__module__}.".startswith(_FOREIGN):
        return None
    return found if found.__code__.co_argcount else None


def calls_of(owner: nn.Module, name_of: Callable[[Any], str | None]) -> tuple[list[Call], list[str]]:
    """The calls of activation functions, and of children that are activations, in the code of a module's class.

    Args:
        owner: any module; its code is not run.
        name_of: maps a module, or a function held as an attribute, to the plain name of its activation, or None.

    Returns:
        The calls in source order, from ``forward`` and Lightning's steps on through the methods that these call; and
        the reasons for what could not be resolved.
    """
    cls, found, reasons = own_class(owner), list[Call](), list[str]()
    if "forward" in owner.__dict__ or isinstance(owner, fx.GraphModule):
        if not f"{cls.__module__}.".startswith(_FOREIGN) or isinstance(owner, fx.GraphModule):
            reasons.append("its forward is made when it runs, and is not that of its class")
        return found, reasons
    counts: dict[str, int] = {}
    waiting, seen = [name for name in ENTRIES if hasattr(cls, name)], set[str]()
    while waiting:
        name = waiting.pop(0)
        function = method_of(cls, name)
        if name in seen or function is None:
            continue
        seen.add(name)
        try:
            tree, _ = source_of(function)
        except UnreadError as reason:
            mentioned = sorted(set(function.__code__.co_names) & _NAMES)
            if mentioned:
                reasons.append(f"{name}, which mentions {', '.join(mentioned)}: {reason}")
            continue
        reader = _Reader(owner, function, name, counts, name_of)
        reader.visit(tree)
        last = max(reader.layer_ends, default=(-1, -1))
        found += [replace(call, layer_follows=call.in_loop or call.position[2:] < last) for call in reader.calls]
        reasons += reader.reasons
        if left := sorted({named for node, named in reader.mentioned.items() if node not in reader.taken}):
            reasons.append(f"{name} has {', '.join(left)} other than in a call that can be replaced")
        waiting += [each for each in reader.methods if each not in seen]
    return found, reasons


def is_read(owner: nn.Module) -> bool:
    """Whether the source of a module's forward is at hand, or it is of a library."""
    try:
        method = method_of(own_class(owner), "forward")
        return method is None or bool(source_of(method))
    except UnreadError:
        return False


_NAMES = {name + suffix for name in registry.PLAIN for suffix in ("", "_")} | {cls.__name__ for cls in _MODULES}


class _Reader(ast.NodeVisitor):
    """Collects the calls in one method."""

    def __init__(
        self,
        owner: nn.Module,
        function: FunctionType,
        name: str,
        counts: dict[str, int],
        name_of: Callable[[Any], str | None],
    ) -> None:
        self.name_of = name_of
        self.owner, self.function, self.name, self.counts = owner, function, name, counts
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
            if _hashable(each) and each in FUNCTIONS
        ]
        self.mentioned: dict[ast.expr, str] = {}
        self.taken: set[ast.expr] = set()
        self.loops = 0
        self.layer_ends: list[tuple[int, int]] = []  # of calls of children with parameters

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
        """Follow methods that are called, or passed on to be called."""
        self.generic_visit(node)
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
        elif node.attr in _NAMES:
            self._mention(node, node.attr)

    def visit_Name(self, node: ast.Name) -> None:
        """Record an activation that is mentioned by its name."""
        if node.id in _NAMES and isinstance(node.ctx, ast.Load) and node.id not in self.local:
            self._mention(node, node.id)

    def _mention(self, node: ast.expr, name: str) -> None:
        known = self._resolve(node)
        if (_hashable(known) and known in FUNCTIONS) or (inspect.isclass(known) and known in _MODULES):
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
                    self._add_function(node, "function", *FUNCTIONS[_innermost(child)], node.args[1:])
                elif function and len(node.args) + len(node.keywords) == 1:
                    count = self.counts[own] = self.counts.get(own, 0) + 1
                    self._add(node, own if count == 1 else f"{own}#{count}", "module", function, child=own)
            return
        if isinstance(node.func, ast.Attribute) and _is_super(node.func.value):
            self._inherited(node.func.attr)
            return
        known = self._resolve(node.func)
        if _hashable(known) and known in FUNCTIONS:
            name, inplace = FUNCTIONS[known]
            self._add_function(node, "function", name, inplace, node.args[1:])
        elif isinstance(node.func, ast.Call) and len(node.args) == 1:
            cls, inner = self._resolve(node.func.func), node.func
            if inspect.isclass(cls) and cls in _MODULES:
                self._add_function(node, "inline", _MODULES[cls], False, inner.args, inner.keywords)
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
        function = inspect.unwrap(function)
        if isinstance(function, FunctionType) and not f"{function.__module__}.".startswith(_FOREIGN):
            mentioned = sorted(set(function.__code__.co_names) & _NAMES)
            if mentioned:
                self.reasons.append(f"{name}, which mentions {', '.join(mentioned)}: make it a method, or a module")

    def _inherited(self, name: str) -> None:
        """Report activations in a base class's method that is called through ``super()``."""
        mro = own_class(self.owner).__mro__
        defining = next((i for i, cls in enumerate(mro) if cls.__dict__.get(self.name) is not None), 0)
        above = next((cls for cls in mro[defining + 1 :] if name in cls.__dict__), None)
        function = method_of(above, name) if above else None
        if function is not None and (mentioned := sorted(set(function.__code__.co_names) & _NAMES)):
            self.reasons.append(f"super().{name}, which mentions {', '.join(mentioned)}")

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


def is_set(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _innermost(function: Any) -> Any:
    return _innermost(function.func) if isinstance(function, functools.partial) else function


def mentions(function: Any) -> list[str]:
    """The activations that a function, or what it wraps, mentions; empty for one of a library."""
    function = getattr(_innermost(function), "__func__", _innermost(function))
    if not isinstance(function, FunctionType) or f"{function.__module__}.".startswith(_FOREIGN):
        return []
    cells = [cell.cell_contents for cell in function.__closure__ or () if is_set(cell)]
    held = [FUNCTIONS[each][0] for each in cells if _hashable(each) and each in FUNCTIONS]
    inner = [
        name for each in cells if isinstance(each, FunctionType) and each is not function for name in mentions(each)
    ]
    return sorted({*(set(function.__code__.co_names) & _NAMES), *held, *inner})


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _hashable(value: object) -> bool:
    return getattr(type(value), "__hash__", None) is not None


def _attribute_of(node: ast.expr, name: str) -> str | None:
    """``"a"`` for ``self.a``."""
    is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name
    return cast(ast.Attribute, node).attr if is_own else None


def position_of(node: ast.Call, first: int) -> Position:
    """The position of a call in a method that starts at line ``first``."""
    last = cast(int, node.end_lineno), cast(int, node.end_col_offset)
    return node.lineno - first, node.col_offset, last[0] - first, last[1]
