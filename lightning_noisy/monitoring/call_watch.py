"""See the calls of activation functions while a model runs, and tell which place in its code makes each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_noisy.replacement.call_finder import Call
from lightning_noisy.replacement.recognition import FUNCTIONS, METHODS
from lightning_noisy.replacement.source import method_of, nested_codes

__all__ = ["CallPlaces", "FunctionCalls", "Handler", "RunEagerly", "is_in_place"]

# Called before a function, with it, its arguments and its caller; returns what to call with the output, or None.
Handler = Callable[
    [Callable[..., Any], tuple[Any, ...], dict[str, Any], FrameType | None], Callable[[Any], None] | None
]
_METHODS = {getattr(torch.Tensor, name): in_place for name, (_, in_place) in METHODS.items()}
_WATCHED = {*FUNCTIONS, *_METHODS}


def is_in_place(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of an activation function overwrites its input."""
    known = FUNCTIONS[function][1] if function in FUNCTIONS else _METHODS[function]
    return known or bool(kwargs.get("inplace")) or any(each is True for each in args[1:])


class FunctionCalls(TorchFunctionMode):
    """Tells handlers of the calls of activation functions and methods, such as ``F.relu(x)`` and ``x.relu()``.

    All handlers share one mode: torch ends the mode that started last, and recorders end in any order.
    """

    _active: FunctionCalls | None = None

    def __init__(self) -> None:
        super().__init__()
        self.handlers: list[Handler] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function."""
        kwargs = kwargs or {}
        try:
            is_watched = func in _WATCHED
        except TypeError:  # some of torch's have no hash
            is_watched = False
        if not is_watched:
            return func(*args, **kwargs)
        caller = inspect.currentframe()
        waiting = [handler(func, args, kwargs, caller) for handler in self.handlers]
        output = func(*args, **kwargs)
        for finish in filter(None, waiting):
            finish(output)
        return output

    @classmethod
    def start(cls, handler: Handler) -> None:
        """Tell a handler from now on."""
        if cls._active is None:
            cls._active = cls()
            cls._active.__enter__()
        cls._active.handlers.append(handler)

    @classmethod
    def stop(cls, handler: Handler) -> None:
        """Tell it no more; no effect if it wasn't told."""
        mode = cls._active
        if mode is not None and handler in mode.handlers:
            mode.handlers.remove(handler)
            if not mode.handlers:
                cls._active = None
                mode.__exit__(None, None, None)


class RunEagerly:
    """Lets what is compiled run eagerly, from the first :meth:`start` to the last :meth:`stop`."""

    _users = 0
    _stance: Any = None

    @classmethod
    def start(cls) -> None:
        """Compiled code would call neither hooks nor handlers."""
        if cls._users == 0:
            cls._stance = torch.compiler.set_stance("force_eager")
        cls._users += 1

    @classmethod
    def stop(cls) -> None:
        """What is compiled runs as it did, without being compiled again."""
        cls._users -= 1
        if cls._users == 0:
            cls._stance.__exit__(None, None, None)


class CallPlaces:
    """Finds the place of a call from the frame that makes it.

    The frame has the position of the call in the source, which is compared with those of the known calls. Python 3.10
    knows only its line: there, several calls of the same function on one line are not told apart.
    """

    def __init__(self) -> None:
        self._methods: dict[int, tuple[CodeType, CodeType, str]] = {}  # by code: itself, its method's code and name
        # By owner, method, and where the call ends; before Python 3.11 each of its lines, and what is called.
        self._places: dict[tuple[int, str, tuple[Any, ...]], str | None] = {}
        self._owners: list[nn.Module] = []  # so that no id is used twice

    def add(self, owner: nn.Module, call: Call, *, is_module: bool) -> None:
        """Add a call of a module, or of a function, in the code of a module's class."""
        function = method_of(type(owner), call.method)
        if function is None:
            return
        self._owners.append(owner)
        code = function.__code__
        for each in (code, *nested_codes(code)):
            self._methods[id(each)] = each, code, call.method
        first, _, last, end = call.position
        what = call.function, is_module
        spots = [(last, end)] if _HAS_POSITIONS else [(line, *what) for line in range(first, last + 1)]
        for spot in spots:
            where = id(owner), call.method, spot
            self._places[where] = call.key if self._places.get(where, call.key) == call.key else None

    def find(self, frame: FrameType | None, function: str, *, is_module: bool) -> tuple[int, str] | None:
        """The id of the owner and the key of the call that a frame, or the nearest known one below it, makes.

        Args:
            frame: of what is called, or below it.
            function: plain name of the function.
            is_module: whether a module is called.
        """
        spot: tuple[Any, ...] | None = None
        while frame is not None:
            code, method, name = self._methods.get(id(frame.f_code), (None, None, ""))
            if code is not None and method is not None:
                spot = spot or _spot(frame, method.co_firstlineno, function, is_module)
                if code is method:
                    owner = id(frame.f_locals.get(code.co_varnames[0]))
                    key = self._places.get((owner, name, spot))
                    return None if key is None else (owner, key)
            frame = frame.f_back
        return None


# From Python 3.11 on, unless it is told to do without.
_HAS_POSITIONS = hasattr(CodeType, "co_positions") and None not in next(iter(CallPlaces.find.__code__.co_positions()))


def _spot(frame: FrameType, first: int, *what: Any) -> tuple[Any, ...]:
    """Where the call of a frame ends, line and column; before Python 3.11 its line. Lines count from ``first``."""
    if not _HAS_POSITIONS:
        return frame.f_lineno - first, *what
    _, line, _, column = list(frame.f_code.co_positions())[frame.f_lasti // 2]
    return (line or 0) - first, column or 0
