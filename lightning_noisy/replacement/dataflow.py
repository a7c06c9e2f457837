"""The data flow of a forward pass with example inputs.

It runs on a copy of the model (:func:`private_copy`) in which probes stand for the activations.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

from lightning_noisy._torch_internals import HOOKS, BatchNorm, tree_leaves
from lightning_noisy.replacement.graph import Graph, Node
from lightning_noisy.replacement.recognition import FUNCTIONS, METHODS

__all__ = ["Observed", "Pass", "Probe", "Protected", "Unseen", "call", "observe", "private_copy", "random_states_kept"]

_OWN_HOOKS = ("torch.", "lightning_noisy.")


@dataclass
class Pass:
    """One call of an activation in a pass.

    Attributes:
        node: the call in the graph.
        layer: the layer that ran last before it.
        clock: how many layers had run.
    """

    node: Node
    layer: nn.Module | None
    clock: int


class Probe(nn.Module):
    """Stands in an activation's place in the copy, does what it does, and notes its calls."""

    def __init__(self, plain: nn.Module, function: str) -> None:
        super().__init__()
        self.plain, self.function = plain, function
        self.passes: list[Pass] = []
        self.read = ""  # an attribute of the activation that was read
        self.watch: _Watch | None = None
        self.training = plain.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the activation."""
        if self.watch is None:
            return self.plain(*args, **kwargs)
        return self.watch.activation(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(super().__getattr__("plain"), name)
            self.__dict__["read"] = name
            return value


@dataclass
class Unseen:
    """Calls of an activation function that belong to no site, in one forward pass."""

    owner: str
    function: str
    count: int = 0


@dataclass
class Observed:
    """What one forward pass showed.

    Attributes:
        model: the copy that ran.
        names: of its modules.
        graph: the graph.
        unseen: calls of activation functions that no probe stands for.
        output: the output.
        nodes: the tensors of the pass with their nodes, by their ids.
    """

    model: nn.Module
    names: Mapping[nn.Module, str]
    graph: Graph
    unseen: list[Unseen]
    output: Any
    nodes: dict[int, tuple[Tensor, Node]] = field(repr=False)

    def nodes_of(self, values: Any) -> list[Node]:
        """The nodes of the tensors in a structure."""
        return [self.nodes[id(leaf)][1] for leaf in tree_leaves(values) if id(leaf) in self.nodes]


def private_copy(model: nn.Module, *, share: bool = True) -> nn.Module:
    """A copy to look into: parameters are shared, unless ``share=False``, all else is its own.

    Of the user's hooks it has the methods of its own modules; others may write anywhere.

    Raises:
        Exception: whatever copying the attributes of a module raises.
    """
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters() if share}
    for leaf in tree_leaves([list(vars(module).values()) for module in model.modules()]):
        if isinstance(leaf, Tensor) and not leaf.is_leaf:  # kept by a forward pass; which torch refuses to copy
            shared[id(leaf)] = leaf.detach().clone()
    with torch.no_grad():
        twin = copy.deepcopy(model, shared)
    inside = set(twin.modules())
    for module in inside:
        for name in HOOKS:
            for key, hook in list(getattr(module, name).items()):
                # Those of torch make weights, as weight_norm's.
                is_torchs = (getattr(hook, "__module__", None) or type(hook).__module__).startswith(_OWN_HOOKS)
                if not is_torchs and getattr(hook, "__self__", None) not in inside:
                    del getattr(module, name)[key]
    return twin


def has_lost_hooks(model: nn.Module, twin: nn.Module) -> bool:
    """Whether a private copy has fewer forward hooks than the model."""
    forward = [name for name in HOOKS if "forward" in name]
    had, has = (sum(len(getattr(m, name)) for m in each.modules() for name in forward) for each in (model, twin))
    return had > has


@contextmanager
def random_states_kept(model: nn.Module) -> Iterator[None]:
    """Leave the random states of torch, NumPy and Python as they are."""
    devices = sorted({tensor.device for tensor in model.parameters() if tensor.is_cuda}, key=str)
    of_python, of_numpy = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(of_python)
        numpy.random.set_state(of_numpy)


def call(model: nn.Module, example_inputs: Any) -> Any:
    """The output of a model for a tensor, a tuple of positional arguments, or a dict of keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    return model(*example_inputs) if isinstance(example_inputs, tuple) else model(example_inputs)


class Protected(TorchFunctionMode):
    """Passes over what would write into the parameters, which a copy shares with the model.

    Args:
        model: the copy.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._protected = {_memory(parameter) for parameter in model.parameters()} - {0}

    def writes(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether a call writes into a parameter."""
        name = getattr(func, "__name__", "")
        in_place = name.startswith("__i") or name in ("__setitem__", "__set__")
        targets = args[:1] if in_place or (name.endswith("_") and not name.endswith("__")) else ()
        written = [leaf for leaf in tree_leaves((targets, kwargs.get("out"))) if isinstance(leaf, Tensor)]
        return any(_memory(leaf) in self._protected for leaf in written)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if self.writes(func, args, kwargs or {}) else func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 if it has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError, ValueError):
        return 0


class _Watch(Protected):
    """Makes the graph of one forward pass."""

    def __init__(self, model: nn.Module, names: Mapping[nn.Module, str]) -> None:
        super().__init__(model)
        self.graph = Graph()
        self.names = names
        self.unseen: dict[tuple[str, str], Unseen] = {}
        self._inside = False
        self._running: list[nn.Module] = []
        self.nodes: dict[int, tuple[Tensor, Node]] = {}  # with the tensors, so that an id is not used again
        self._layer: nn.Module | None = None
        self._clock = 0
        for kind, tensors in (("parameter", model.parameters()), ("constant", model.buffers())):
            for tensor in tensors:
                self.note(tensor, Node(kind))

    def note(self, tensor: Tensor, node: Node) -> None:
        """Say what a tensor is."""
        self.nodes[id(tensor)] = tensor, node

    def node_of(self, tensor: Tensor) -> Node:
        """What a tensor is."""
        if id(tensor) not in self.nodes:
            self.note(tensor, Node("parameter" if isinstance(tensor, nn.Parameter) else "constant"))
        return self.nodes[id(tensor)][1]

    def activation(self, probe: Probe, args: Any, kwargs: Any) -> Any:
        """Call a probe's activation."""
        x = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        node = self.graph.site([] if x is None else [self.node_of(x)], probe)
        probe.passes.append(Pass(node, self._layer, self._clock))
        inside, self._inside = self._inside, True
        try:
            y = probe.plain(*args, **kwargs)
        finally:
            self._inside = inside
        for leaf in tree_leaves(y):
            if isinstance(leaf, Tensor):
                self.note(leaf, node)
        return y

    def before(self, module: nn.Module, _: Any) -> None:
        """Note that a module runs."""
        self._running.append(module)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Note that a module has run."""
        while self._running and self._running.pop() is not module:
            pass  # one that raised
        if self._inside or isinstance(module, Probe):
            return
        results = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        unknown = [leaf for leaf in results if id(leaf) not in self.nodes]
        if unknown:  # of operations that torch shows to nobody, as a custom autograd function's
            inputs = [self.node_of(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            kind = "layer" if any(True for _ in module.parameters()) else "other"
            for leaf in unknown:
                self.note(leaf, Node(kind, inputs, name=type(module).__name__))
        if is_layer(module):
            self._layer = module
            self._clock += 1
        if is_layer(module) or isinstance(module, BatchNorm):
            for leaf in results:
                self.node_of(leaf).module = module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.writes(func, args, kwargs):
            return args[0]
        if self._inside:
            return func(*args, **kwargs)
        inputs = [self.node_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        arguments = tuple(self.node_of(each) if isinstance(each, Tensor) else each for each in args)
        if known := _known(func):
            owner = next((self.names[each] for each in reversed(self._running) if each in self.names), "")
            self.unseen.setdefault((owner, known), Unseen(owner, known)).count += 1
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__setitem__":
            self.note(args[0], Node("move", inputs))
            return result
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not (name == "__get__" and id(leaf) in self.nodes):
                floating = leaf.is_floating_point() or leaf.is_complex()
                name = "t" if name == "__get__" else name  # x.T, x.data
                self.note(leaf, self.graph.apply(name, inputs, arguments=arguments, floating=floating))
        return result


def is_layer(module: nn.Module) -> bool:
    """Whether a module has parameters of its own."""
    return any(parameter is not None for parameter in module._parameters.values())


def _known(func: Any) -> str:
    """The plain name of an activation function or method, or ``""``."""
    try:
        return FUNCTIONS[func][0] if func in FUNCTIONS else METHODS[func.__name__][0] if _is_method(func) else ""
    except TypeError:
        return ""


def _is_method(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name in METHODS and getattr(Tensor, name, None) is func


def observe(twin: nn.Module, inputs: Any, probes: list[Probe], names: Mapping[nn.Module, str]) -> Observed:
    """Run a private copy once in its present mode, with random states that are the same each time.

    Args:
        twin: with the probes in place.
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        probes: all of them; they get their calls.
        names: of the modules.
    """
    try:
        with torch.no_grad():
            return _observe(twin, inputs, probes, names)
    except RuntimeError:  # of a forward that differentiates
        gradients = {parameter: parameter.grad for parameter in twin.parameters()}
        try:
            for parameter in gradients:
                parameter.grad = None
            with torch.enable_grad():
                return _observe(twin, inputs, probes, names)
        finally:
            for parameter, gradient in gradients.items():
                parameter.grad = gradient


def _observe(twin: nn.Module, inputs: Any, probes: list[Probe], names: Mapping[nn.Module, str]) -> Observed:
    watch = _Watch(twin, names)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    inputs = copy.deepcopy(inputs)
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor):
            watch.note(leaf, Node("input" if leaf.is_floating_point() or leaf.is_complex() else "index"))
    with ExitStack() as stack:
        stack.enter_context(random_states_kept(twin))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of reentrant checkpointing, that there is no gradient
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        for probe in probes:
            probe.watch = watch
            probe.passes.clear()
            stack.callback(setattr, probe, "watch", None)
        stack.callback(hooks.register_module_forward_pre_hook(watch.before).remove)
        stack.callback(hooks.register_module_forward_hook(watch.after, always_call=True).remove)
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        with watch:
            output = call(twin, inputs)
    return Observed(twin, names, watch.graph, list(watch.unseen.values()), output, watch.nodes)
