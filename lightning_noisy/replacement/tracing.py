"""The data flow of a forward pass without inputs: symbolic passes of the modules, each within that of its parent.

As in :mod:`~lightning_noisy.replacement.dataflow`, probes stand for the activations, and the graph is of the same kind.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import fx, nn

from lightning_noisy._torch_internals import tree_leaves
from lightning_noisy.replacement.dataflow import Pass, Probe, Protected
from lightning_noisy.replacement.graph import Graph, Node

__all__ = ["Trace", "trace"]

_PASSIVE = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
)


class _Tracer(fx.Tracer):
    """Traces one module's own code."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            self.path_of_module(m)
        except NameError:  # not registered: traced as part of the owner
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


class _OpaqueError(Exception):
    """A module whose code can't be traced."""


class Trace:
    """The graph of a private copy by symbolic passes of its modules, each within that of its parent where both work.

    Attributes:
        graph: the graph.
        opaque: the modules that can't be traced.
    """

    def __init__(self, twin: nn.Module, entries: tuple[str, ...]) -> None:
        self.graph = Graph()
        self.opaque: list[nn.Module] = []
        self._traced: dict[Any, fx.Graph | None] = {}
        self._layer: nn.Module | None = None
        self._clock = 0
        self._seen: set[nn.Module] = set()
        self._depth = 0
        for entry in entries:
            self._layer = None  # each is a pass of its own
            self._root(twin, entry, leaves=True)

    def _root(self, module: nn.Module, entry: str = "forward", *, leaves: bool = False) -> None:
        """Trace a module by itself; ``leaves``: its output leaves the model."""
        if isinstance(module, Probe) or (module in self._seen and not leaves):
            return
        before = len(self.opaque)
        try:
            signature = inspect.signature(getattr(module, entry)).parameters.values()
            needed = [each for each in signature if each.default is each.empty and each.kind not in (each.VAR_KEYWORD,)]
            kind = "input" if leaves else "unknown"
            output = self._inline(module, [Node(kind) for _ in needed], {}, entry)
            if not leaves:
                Node("unknown", [leaf for leaf in tree_leaves(output) if isinstance(leaf, Node)])
        except (_OpaqueError, TypeError, ValueError, AttributeError):
            if module not in self.opaque:
                self.opaque.append(module)
        for each in [module, *self.opaque[before:]] if module in self.opaque else self.opaque[before:]:
            for child in each.children():
                self._root(child)

    def _inline(self, owner: nn.Module, args: Any, kwargs: Any, entry: str = "forward") -> Any:
        graph = self._graph_of(owner, args, kwargs, entry)
        if graph is None:
            raise _OpaqueError
        self._seen.add(owner)
        given = list(args)
        values: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            read = lambda thing: fx.node.map_arg(thing, values.__getitem__)  # noqa: E731
            if node.op == "placeholder":
                name = str(node.target).lstrip("*")
                values[node] = kwargs[name] if name in kwargs else given.pop(0) if given else Node("constant")
            elif node.op == "get_attr":
                thing: Any = owner
                for part in str(node.target).split("."):
                    thing = getattr(thing, part)
                values[node] = Node("parameter" if isinstance(thing, nn.Parameter) else "constant")
            elif node.op == "output":
                return read(node.args[0])
            elif node.op == "call_module":
                values[node] = self._module(owner.get_submodule(str(node.target)), read(node.args), read(node.kwargs))
            else:
                values[node] = self._operation(node, read(node.args), read(node.kwargs))
        return None

    def _operation(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        if name == "getitem" and isinstance(args[0], (tuple, list, dict)):
            try:
                return args[0][args[1]]
            except (TypeError, KeyError, IndexError):
                return Node("unknown")
        if name == "getattr":
            name = str(args[1])
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Node)]
        return self.graph.apply(name, inputs, arguments=tuple(args))

    def _module(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Node)]
        if isinstance(module, Probe):
            node = self.graph.site(inputs[:1], module)
            module.passes.append(Pass(node, self._layer, self._clock))
            return node
        if _is_torchs(module):
            has_parameters = any(True for _ in module.parameters())
            kind = "layer" if has_parameters else "move" if isinstance(module, _PASSIVE) else "other"
            node = Node(kind if any(each.depends for each in inputs) or not inputs else "parameter", inputs)
            node.module = module
            if has_parameters:
                self._layer = module
                self._clock += 1
            return node
        try:
            self._depth += 1
            if self._depth > 100:
                raise _OpaqueError
            return self._inline(module, list(args), dict(kwargs))
        except _OpaqueError:
            if module not in self.opaque:
                self.opaque.append(module)
            return Node("layer" if any(True for _ in module.parameters()) else "other", inputs)
        finally:
            self._depth -= 1

    def _graph_of(self, owner: nn.Module, args: Any, kwargs: Any, entry: str) -> fx.Graph | None:
        """What a symbolic pass shows of a module's own code; None if there is none."""
        try:
            signature = list(inspect.signature(getattr(owner, entry)).parameters.values())
        except (TypeError, ValueError):
            return None
        given = {each.name for each in signature[: len(args)]} | set(kwargs)
        defaults = {e.name: e.default for e in signature if e.default is not e.empty and e.name not in given}
        key = owner, entry, frozenset(given)
        if key not in self._traced:
            try:
                with warnings.catch_warnings(), torch.no_grad():
                    warnings.simplefilter("ignore")
                    tracer = _Tracer()
                    tracer.traced_func_name = entry
                    self._traced[key] = tracer.trace(owner, concrete_args=defaults or None)
            except Exception:
                self._traced[key] = None
        return self._traced[key]


def _is_torchs(module: nn.Module) -> bool:
    """Whether a module's forward is torch's, and it is no container."""
    return (
        type(module).forward.__module__.startswith("torch.")
        and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        and not any(isinstance(each, Probe) for each in module.modules())
    )


def trace(twin: nn.Module, entries: tuple[str, ...]) -> Trace:
    """The graph of a private copy with probes in place, without running it."""
    with Protected(twin):
        return Trace(twin, entries)
