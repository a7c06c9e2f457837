"""Redirect the calls in a module's code to modules: the module gets a subclass with a rewritten forward.

The subclass calls ``self.activation_calls["relu#0"](x)`` where the source calls ``F.relu(x)``; everything else stays
the same, including the line numbers of tracebacks. The call stays at its call site: activation checkpointing recomputes
it, compilers trace it, and nothing is intercepted at run time.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any, cast

from torch import nn
from torch.nn.utils import parametrize

from lightning_noisy.replacement.call_finder import NAME, Call, Position, position_of
from lightning_noisy.replacement.source import CHILDREN, ENTRIES, UnreadError, is_set, names_in, own_class, rewritten

__all__ = ["CallSites", "redirect_calls"]


class CallSites(nn.ModuleDict):
    """The modules that a module's own calls go to, by the calls' keys."""


# What to write in the place of a call: method, position, key, whether it is a child's.
_Redirected = tuple[str, Position, str, bool]


def redirect_calls(owner: nn.Module, calls: list[tuple[Call, nn.Module]]) -> None:
    """Let the module's code call modules in the place of functions, and of a child in its further uses.

    Args:
        owner: of the class that the calls were found in.
        calls: each with its module.

    Raises:
        UnreadError: if no subclass can be made.
    """
    modules = {call.key: module for call, module in calls}
    redirected = [(call.method, call.position, call.key, call.child is not None) for call, _ in calls]
    cls = own_class(owner)
    if cls is not type(owner) and "_original_class" not in type(owner).__dict__:
        raise UnreadError("its class was extended after its activations were replaced, such as by a parametrization")
    if redirected:
        if parametrize.is_parametrized(owner):
            raise UnreadError("it is parametrized")
        names = names_in(cls, (*ENTRIES, *(each[0] for each in redirected)))
        if isinstance(owner, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) or names & CHILDREN:
            raise UnreadError("it goes through its children, and would also find the new ones")
    owner.__class__ = _subclass(cls, tuple(redirected)) if redirected else cls
    if modules:
        owner.add_module(NAME, CallSites(modules).train(owner.training))
    else:
        owner._modules.pop(NAME, None)


def _subclass(cls: type[nn.Module], redirected: tuple[_Redirected, ...]) -> type[nn.Module]:
    """A subclass with the calls redirected; reused for the same calls as long as it is alive."""
    for known in cls.__subclasses__():
        if known.__dict__.get("_redirected_calls") == redirected:
            return known
    namespace: dict[str, Any] = {
        "_redirected_calls": redirected,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_original_class": cls,
        "__reduce_ex__": lambda self, protocol: (_new, (cls, redirected), *cls.__reduce_ex__(self, protocol)[2:]),
    }
    for name in {each[0] for each in redirected}:
        outermost = inspect.getattr_static(cls, name)
        function = cast(FunctionType, inspect.unwrap(outermost))
        here = {position: rest for method, position, *rest in redirected if method == name}
        written = _write(function, cls, here)
        namespace[name] = _within(outermost, function, written)
    return cast(type[nn.Module], type(cls)(cls.__name__, (_RewrittenBase, cls), namespace))  # type: ignore[misc]


def _new(cls: type[nn.Module], redirected: tuple[_Redirected, ...]) -> nn.Module:
    """An uninitialized instance of the subclass, for copy and pickle."""
    written = _subclass(cls, redirected)
    return written.__new__(written)


class _RewrittenBase:
    """First base of the subclasses: bypasses ``__init_subclass__`` of the user's class."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            "torch.jit.script reads the source of the class, in which no activation is replaced. Use torch.export, or"
            " torch.jit.trace."
        )


class _Rewriter(ast.NodeTransformer):
    def __init__(self, self_name: str, first: int, here: dict[Position, Any]) -> None:
        self.self_name, self.first, self.here = self_name, first, here
        self.used: set[Position] = set()

    def visit_Call(self, node: ast.Call) -> ast.AST:
        position = position_of(node, self.first)
        node = cast(ast.Call, self.generic_visit(node))
        if position not in self.here:
            return node
        self.used.add(position)
        key, of_child = self.here[position]
        module = ast.Subscript(self._own(NAME), ast.Constant(key), ast.Load())
        is_method = isinstance(node.func, ast.Attribute) and not (node.args or node.keywords)
        named = next((each.value for each in node.keywords if each.arg == "input" or of_child), None)
        x = cast(ast.Attribute, node.func).value if is_method else node.args[0] if node.args else cast(ast.expr, named)
        return ast.copy_location(ast.Call(module, [x], []), node)

    def _own(self, name: str) -> ast.expr:
        return ast.Attribute(ast.Name(self.self_name, ast.Load()), name, ast.Load())


def _write(function: FunctionType, cls: type, here: dict[Position, Any]) -> FunctionType:
    """A method with its calls redirected."""
    self_name = function.__code__.co_varnames[0]

    def change(tree: ast.FunctionDef, first: int) -> None:
        writer = _Rewriter(self_name, first, here)
        writer.visit(tree)
        if writer.used != set(here):
            raise UnreadError("its source is not the one that its calls were found in")

    code = rewritten(function, change)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    closure = tuple(cells[key] for key in code.co_freevars)
    written = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    return cast(FunctionType, functools.update_wrapper(_with_kwdefaults(written, function), function, updated=()))


def _with_kwdefaults(written: FunctionType, function: FunctionType) -> FunctionType:
    written.__kwdefaults__ = function.__kwdefaults__
    return written


def _within(outermost: Any, function: FunctionType, written: FunctionType) -> Any:
    """The decorated method, with the innermost function replaced in the closures of its decorators."""
    if outermost is function:
        del written.__wrapped__  # type: ignore[attr-defined]
        return written
    if not isinstance(outermost, FunctionType):
        raise UnreadError(f"{outermost!r} is not a function")
    cells = []
    found = False
    for cell in outermost.__closure__ or ():
        content = cell.cell_contents if is_set(cell) else None
        if isinstance(content, FunctionType) and _leads_to(content, function):
            cells.append(CellType(_within(content, function, written)))
            found = True
        else:
            cells.append(cell)
    if not found:
        raise UnreadError("its decorator hides the function")
    args = outermost.__code__, outermost.__globals__, outermost.__name__, outermost.__defaults__, tuple(cells)
    result = _with_kwdefaults(FunctionType(*args), outermost)
    result.__dict__.update(outermost.__dict__)
    functools.update_wrapper(result, outermost, updated=())
    result.__wrapped__ = written  # type: ignore[attr-defined]
    return result


def _leads_to(wrapper: Callable[..., Any], function: FunctionType) -> bool:
    while True:
        if wrapper is function:
            return True
        following = getattr(wrapper, "__wrapped__", None)
        if following is None:
            return False
        wrapper = following
