"""The methods of a module's class, and their source, if it is that of the running code; compile one after a change.

The file is compiled again as Python did on import. If that doesn't give the running code, the file has changed.
Nothing here depends on the bytecode of a Python version.
"""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import CellType, CodeType, FunctionType
from typing import Any, cast

from torch import nn

__all__ = [
    "CHILDREN",
    "ENTRIES",
    "UnreadError",
    "is_foreign",
    "is_set",
    "method_of",
    "names_in",
    "nested_codes",
    "own_class",
    "rewritten",
    "source_of",
]
ENTRIES = ("forward", "training_step", "validation_step", "test_step", "predict_step")
# Names by which code asks for the children of a module.
CHILDREN = {"children", "named_children", "modules", "named_modules", "_modules"}
_FOREIGN = ("torch.", "lightning.", "pytorch_lightning.", "lightning_noisy.")
_FUTURE = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
# All that a code object does, without its line numbers, so that the lines above it may change.
_PARTS = (
    *("co_name", "co_flags", "co_code", "co_exceptiontable", "co_consts", "co_names"),  # the table: from Python 3.11 on
    *("co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_varnames", "co_freevars", "co_cellvars"),
)


class UnreadError(Exception):
    """Says why a method's source can't be used."""


def is_foreign(thing: Any) -> bool:
    """Whether a class or function is torch's, Lightning's or this package's."""
    return f"{thing.__module__}.".startswith(_FOREIGN)


def is_set(cell: CellType) -> bool:
    """Whether a variable of an enclosing function has a value."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, before its forward was rewritten."""
    return cast(type[nn.Module], getattr(type(module), "_original_class", type(module)))


def method_of(cls: type, name: str) -> FunctionType | None:
    """A method without its decorators, or None if it is from torch, Lightning or this package."""
    found = inspect.getattr_static(cls, name, None)
    if isinstance(found, (staticmethod, classmethod, property)):
        return None
    found = inspect.unwrap(found) if callable(found) else None
    if not isinstance(found, FunctionType) or is_foreign(found):
        return None
    return found if found.__code__.co_argcount else None


def names_in(cls: type, methods: Iterable[str] = ENTRIES) -> set[str]:
    """The names in the code of methods, and of those that they call."""
    waiting, seen, names = list(methods), set[str](), set[str]()
    while waiting:
        name = waiting.pop()
        method = method_of(cls, name) if hasattr(cls, name) and name not in seen else None
        seen.add(name)
        if method is not None:
            names |= {each for code in (method.__code__, *nested_codes(method.__code__)) for each in code.co_names}
            waiting += names - seen
    return names


@functools.cache
def source_of(function: FunctionType) -> tuple[ast.FunctionDef, int]:
    """The definition of a function, and the number of its first line in the file."""
    text, first, how = _place_of(function)
    return _definition(_parse(text, *how), function.__code__.co_name, first), first


def rewritten(function: FunctionType, change: Callable[[ast.FunctionDef, int], None]) -> CodeType:
    """Compile a function in its original scopes, after a change of its definition.

    Args:
        function: a function with readable source.
        change: changes a definition in place; called with it and the number of its first line.
    """
    name, (text, first, how) = function.__code__.co_name, _place_of(function)
    tree = _parse(text, *how)
    change(_definition(tree, name, first), first)
    codes = nested_codes(_compile(ast.fix_missing_locations(tree), *how))
    return next(code for code in codes if (code.co_name, code.co_firstlineno) == (name, first))


@functools.cache
def _place_of(function: FunctionType) -> tuple[str, int, tuple[str, int]]:
    """The top-level statement of the file that contains a function.

    Returns:
        Its source, padded to its line; the number of the function's first line; the filename and flags to compile it.
    """
    running = function.__code__
    how = running.co_filename, running.co_flags & _FUTURE
    try:
        lines, _ = inspect.findsource(running)
        whole, statements = _read("".join(lines), *how)
    except (OSError, SyntaxError, TypeError, ValueError) as error:
        raise UnreadError(f"there is no source to read ({error})") from None

    def around(line: int) -> str:
        start, end = next((span for span in statements if span[0] <= line <= span[1]), (1, 0))
        return "\n" * (start - 1) + "".join(lines[start - 1 : end])

    wanted = _content(running)
    # Notebooks compile each statement by itself; Python compiles calls differently if it sees their names' import.
    for code in (whole, _compile(around(running.co_firstlineno), *how)):
        same = [each for each in nested_codes(code) if each.co_name == running.co_name and _content(each) == wanted]
        if same:
            first = min((each.co_firstlineno for each in same), key=lambda line: abs(line - running.co_firstlineno))
            return around(first), first, how
    raise UnreadError(
        "its source has changed since it was imported, or its code is not as written (pytest rewrites assert)"
    )


@functools.lru_cache(maxsize=16)
def _read(text: str, filename: str, flags: int) -> tuple[CodeType, list[tuple[int, int]]]:
    """The code of a file, and the first and last lines of its statements."""
    spans = [(_first_line(each), each.end_lineno or each.lineno) for each in _parse(text, filename, flags).body]
    return _compile(text, filename, flags), spans


def _compile(source: str | ast.Module, filename: str, flags: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were given when the file was imported
        return compile(source, filename, "exec", flags | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)


def _parse(text: str, filename: str, flags: int) -> ast.Module:
    return cast(ast.Module, _compile(text, filename, flags | ast.PyCF_ONLY_AST))


def _definition(tree: ast.Module, name: str, first: int) -> ast.FunctionDef:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == name and _first_line(node) == first:
            return node
    raise UnreadError("it is no plain method")


def _first_line(node: ast.stmt) -> int:
    """The number of the first line of a statement, with its decorators."""
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(each.lineno for each in decorators)])


def nested_codes(code: CodeType) -> Iterator[CodeType]:
    """All code objects nested in a code object."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from nested_codes(constant)


def _content(value: object) -> object:
    """A code object or one of its parts in a form to compare; constants with their type and the sign of a zero."""
    if isinstance(value, CodeType):
        return tuple(_content(getattr(value, part, None)) for part in _PARTS)
    if isinstance(value, (tuple, frozenset)):
        return type(value)(map(_content, value))
    return type(value), repr(value)
