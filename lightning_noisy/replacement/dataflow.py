"""The data flow around the activations of a model: residual additions, gates, outputs.

Probes replace the activations and record it: in one forward pass of the model with example inputs, or without these in
a symbolic trace of each module whose forward can be traced with its children as leaves.
"""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

from lightning_noisy._torch_internals import BatchNorm, tree_leaves
from lightning_noisy.replacement.call_finder import FUNCTIONS, METHODS
from lightning_noisy.replacement.snapshot import Contents

__all__ = ["MOVES", "Probe", "Seen", "call", "observe", "trace"]

# Operations that count as moving elements without changing their values.
MOVES = {
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, F.dropout,
    torch.dropout, Tensor.flatten, Tensor.reshape, Tensor.permute, Tensor.transpose, Tensor.view, Tensor.contiguous,
    Tensor.squeeze, Tensor.unsqueeze, Tensor.t, Tensor.expand, Tensor.to, Tensor.float, Tensor.__getitem__,
    operator.getitem, Tensor.clone, Tensor.chunk, torch.chunk, Tensor.split, torch.split, Tensor.unbind, torch.unbind,
}  # fmt: skip
_MOVING_NAMES = {getattr(each, "__name__", "") for each in MOVES} | {"expand_as", "type_as", "view_as", "repeat"}
_MUL = {operator.mul, operator.imul, torch.mul, torch.multiply, Tensor.mul, Tensor.mul_, Tensor.__mul__}
_MUL |= {Tensor.__rmul__, Tensor.__imul__, Tensor.multiply}
_ADD = {operator.add, operator.iadd, torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__}
_ADD |= {Tensor.__radd__}
_SCALE = (
    _MUL | _ADD | {operator.truediv, torch.div, Tensor.div, Tensor.__truediv__, operator.sub, torch.sub, Tensor.sub}
)
_SCALE |= {Tensor.__sub__, Tensor.__rsub__, torch.rsub, operator.neg, torch.neg, Tensor.neg, Tensor.__neg__}
_PASSIVE = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity, nn.Flatten)


@dataclass
class Seen:
    """What was observed of one activation.

    Attributes:
        after_residual: whether its input is the sum of two branches; None if unknown.
        is_gate: whether its output is multiplied by another branch; None if unknown.
        is_output: whether its output is one of the model's; None if unknown.
        passes: how often one forward pass of its owner calls it; None if unknown.
        order: its position in the order of the first calls; None if unknown.
        batch_norm: the batch norm whose output is its input, if known.
    """

    after_residual: bool | None = None
    is_gate: bool | None = None
    is_output: bool | None = None
    passes: int | None = None
    order: int | None = None
    batch_norm: nn.Module | None = None


class Probe(nn.Module):
    """Stands in for an activation, computes the same, and records its data flow."""

    def __init__(self, plain: nn.Module, seen: Seen) -> None:
        super().__init__()
        self.plain, self.seen = plain, seen
        self.count = 0
        self.watch: _Watch | None = None
        self.training = plain.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the activation."""
        if self.watch is None:
            return self.plain(*args, **kwargs)
        with self.watch.of(self, next(iter((*args, *kwargs.values())), None)):
            y = self.plain(*args, **kwargs)
        self.watch.follow(self, y)
        return y

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("plain"), name)


@dataclass
class Unseen:
    """Calls of an activation function that belong to no site, in one forward pass."""

    owner: str
    function: str
    count: int = 0


class _Watch(TorchFunctionMode):
    """Follows tensors through one forward pass."""

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self.names = names
        self.unseen: dict[tuple[str, str], Unseen] = {}
        self.order = 0
        self._depth = 0
        self._running: list[nn.Module] = []
        self._sums: set[int] = set()
        self._origin: dict[int, set[Probe]] = {}
        self._norms: dict[int, nn.Module] = {}
        self._alive: list[Any] = []  # so that no id is reused

    @contextmanager
    def of(self, probe: Probe, x: Any) -> Iterator[None]:
        seen = probe.seen
        if seen.order is None:
            seen.order = self.order
            self.order += 1
        seen.after_residual = bool(seen.after_residual) or id(x) in self._sums
        seen.batch_norm = self._norms.get(id(x), seen.batch_norm)
        probe.count += 1
        seen.passes = max(seen.passes or 0, probe.count)
        seen.is_gate, seen.is_output = bool(seen.is_gate), bool(seen.is_output)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def follow(self, probe: Probe, y: Any) -> None:
        for leaf in tree_leaves(y):
            self._alive.append(leaf)
            self._origin[id(leaf)] = {probe}
            self._sums.discard(id(leaf))

    def finish(self, output: Any) -> None:
        for leaf in tree_leaves(output):
            for probe in self._origin.get(id(leaf), ()):
                probe.seen.is_output = True

    def before(self, module: nn.Module, _: Any) -> None:
        if module in self.names:
            self._running.append(module)

    def after(self, module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, BatchNorm):
            self._norms[id(output)] = module
            self._alive.append(output)
        if self._running and self._running[-1] is module:
            self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outermost = self._depth == 0
        if outermost and _known(func):
            owner = self.names[self._running[-1]] if self._running else ""
            key = owner, _known(func)
            self.unseen.setdefault(key, Unseen(*key)).count += 1
            self._depth += 1
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            if outermost:
                self._depth = 0
        if outermost and not isinstance(result, (bool, int, float, torch.Size, torch.dtype, torch.device)):
            self._learn(func, args, kwargs or {}, result)
        return result

    def _learn(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        branches = [leaf for leaf in tensors if not isinstance(leaf, nn.Parameter) and leaf.dim()]
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._alive += results
        probes = set().union(*(self._origin.get(id(leaf), set()) for leaf in tensors)) if tensors else set()
        moved = func in MOVES or getattr(func, "__name__", "") in _MOVING_NAMES
        moved |= func in _SCALE and len(branches) == 1
        summed = func in _ADD and len(branches) > 1 and branches[0] is not branches[1]
        if func in _MUL and len(branches) > 1:
            for probe in probes:
                probe.seen.is_gate = True
        for leaf in results:
            self._sums.discard(id(leaf))
            self._norms.pop(id(leaf), None)
            self._origin.pop(id(leaf), None)
            if summed or (moved and any(id(each) in self._sums for each in tensors)):
                self._sums.add(id(leaf))
            if moved and probes:
                self._origin[id(leaf)] = probes


def _known(func: Any) -> str:
    """The plain name of an activation function or method, or ``""``."""
    try:
        return FUNCTIONS[func][0] if func in FUNCTIONS else METHODS[func.__name__][0] if _is_method(func) else ""
    except TypeError:
        return ""


def _is_method(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name in METHODS and getattr(Tensor, name, None) is func


def call(model: nn.Module, example_inputs: Any) -> Any:
    """The output of a model for a tensor, a tuple of positional arguments, or a dict of keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    return model(*example_inputs) if isinstance(example_inputs, tuple) else model(example_inputs)


def observe(
    model: nn.Module, inputs: Any, probes: Mapping[Probe, nn.Module], names: Mapping[nn.Module, str]
) -> list[Unseen]:
    """Run the model once in its current mode, and restore what that changes, buffers and random states included.

    Args:
        model: the model, with the probes installed.
        inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        probes: the probes, each with its owner.
        names: the paths of the modules.

    Returns:
        The calls of activation functions that no probe covers.
    """
    watch = _Watch(names)
    owners: dict[nn.Module, list[Probe]] = {}
    for probe, owner in probes.items():
        probe.watch = watch
        owners.setdefault(owner, []).append(probe)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    contents = [Contents(module) for module in model.modules()]
    devices = sorted({tensor.device for tensor in model.parameters() if tensor.is_cuda}, key=str)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # reentrant checkpointing warns that there is no gradient
        for content in contents:
            stack.callback(content.restore)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        for owner, theirs in owners.items():
            handle = owner.register_forward_pre_hook(lambda *_, theirs=theirs: _reset(theirs))
            stack.callback(handle.remove)
        stack.callback(hooks.register_module_forward_pre_hook(watch.before).remove)
        stack.callback(hooks.register_module_forward_hook(watch.after, always_call=True).remove)
        with watch:
            output = call(model, inputs)
        watch.finish(output)
    return list(watch.unseen.values())


def _reset(probes: list[Probe]) -> None:
    for probe in probes:
        probe.count = 0


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


def trace(owner: nn.Module) -> bool:
    """Trace the owner's forward symbolically, and record the data flow of the probes among its children.

    Returns:
        Whether its forward can be traced.
    """
    contents = Contents(owner)
    try:
        signature = inspect.signature(owner.forward).parameters.values()
        defaults = {each.name: each.default for each in signature if each.default is not each.empty}
        with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng([]):
            warnings.simplefilter("ignore")
            graph = _Tracer().trace(owner, concrete_args=defaults or None)
        nodes = [
            (node, probe)
            for node in graph.nodes
            if node.op == "call_module" and isinstance(probe := owner.get_submodule(node.target), Probe)
        ]
    except Exception:
        return False
    finally:
        contents.restore()
    for node, probe in nodes:
        seen = probe.seen
        seen.passes = (seen.passes or 0) + 1
        seen.order = list(graph.nodes).index(node) if seen.order is None else seen.order
        seen.after_residual = _either(seen.after_residual, _is_sum(node.args[0] if node.args else None, owner))
        seen.is_gate = _either(seen.is_gate, _gates(node, owner))
        previous = node.args[0] if node.args else None
        if isinstance(previous, fx.Node) and previous.op == "call_module":
            module = owner.get_submodule(str(previous.target))
            seen.batch_norm = module if isinstance(module, BatchNorm) else None
    return True


def _either(known: bool | None, new: bool | None) -> bool | None:
    return True if known or new else None if new is None else new


def _moves(node: fx.Node, owner: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(owner.get_submodule(str(node.target)), _PASSIVE)
    if node.op == "call_function" and node.target in _SCALE:
        return sum(isinstance(each, fx.Node) for each in node.args) == 1
    return node.target in MOVES or (node.op == "call_method" and node.target in _MOVING_NAMES)


def _binary(node: fx.Node, functions: set[Any], method: str) -> bool:
    named = node.op == "call_method" and node.target in (method, method + "_")
    both = len(node.args) > 1 and all(isinstance(each, fx.Node) for each in node.args[:2])
    return both and (named or (node.op == "call_function" and node.target in functions))


def _is_sum(node: Any, owner: nn.Module) -> bool | None:
    while isinstance(node, fx.Node) and _moves(node, owner) and node.args:
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op == "placeholder":
        return None
    if _binary(node, _ADD, "add"):
        return all(each.op != "get_attr" for each in node.args[:2] if isinstance(each, fx.Node))
    return False


def _gates(node: fx.Node, owner: nn.Module) -> bool | None:
    found: list[bool | None] = []
    for user in node.users:
        if user.op == "output":
            found.append(None)
        elif _binary(user, _MUL, "mul"):
            return True
        elif _moves(user, owner):
            found.append(_gates(user, owner))
        else:
            found.append(False)
    if True in found:
        return True
    return None if None in found or not found else False
