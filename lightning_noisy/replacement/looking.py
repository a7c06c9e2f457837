"""What becomes of the activations of a model, seen on copies of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_noisy._torch_internals import BatchNorm, tree_leaves
from lightning_noisy.replacement.call_finder import Call
from lightning_noisy.replacement.call_redirect import redirect_calls
from lightning_noisy.replacement.candidates import Candidate, walk
from lightning_noisy.replacement.copies import follow_originals
from lightning_noisy.replacement.dataflow import Probe, has_lost_hooks, observe, private_copy, random_states_kept
from lightning_noisy.replacement.decision import Fate, fates
from lightning_noisy.replacement.graph import Graph, Node
from lightning_noisy.replacement.source import ENTRIES, UnreadError
from lightning_noisy.replacement.tracing import trace

__all__ = ["Seen", "look"]

_LINEAR = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


@dataclass
class Seen:
    """What was seen of the calls of one place that follow the same layers.

    Attributes:
        is_hidden: whether their outputs reach a layer before they leave the model; None where unknown.
        is_gate: whether they are gates; None where unknown.
        is_formula: whether they are part of a formula.
        after_residual: whether their inputs are sums of two branches; None where unknown.
        order: number in the order of the first calls.
        batch_norm: path of the batch norm whose output they get.
        layer: path of the layer that ran last before them; None for the start of the pass.
        repeats: whether several calls followed one call of a layer.
        feeders: paths of the linear layers and convolutions whose outputs go straight into them.
        nodes: the calls, while the model is looked at.
    """

    is_hidden: bool | None = None
    is_gate: bool | None = None
    is_formula: bool = False
    after_residual: bool | None = None
    order: int | None = None
    batch_norm: str | None = None
    layer: str | None = None
    repeats: bool = False
    feeders: list[str] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list, repr=False)

    def take(self, other: Seen) -> None:
        """Take over what decides about replacing."""
        self.is_hidden, self.is_gate, self.is_formula = other.is_hidden, other.is_gate, other.is_formula
        self.after_residual = other.after_residual

    def add(self, fate: Fate) -> None:
        """Take in one call: hidden if all are, a gate or part of a formula if one is."""
        first = self.order is None
        self.is_hidden = (
            fate.is_hidden
            if first or self.is_hidden == fate.is_hidden
            else min((self.is_hidden, fate.is_hidden), key=lambda each: 2 if each else 1 if each is None else 0)
        )
        self.is_gate = True if fate.is_gate or self.is_gate else fate.is_gate if first else self.is_gate
        self.is_formula = self.is_formula or fate.is_formula
        self.after_residual = True if fate.after_residual or self.after_residual else fate.after_residual


class _Twin:
    """A copy of a model with probes in the places of its activations."""

    def __init__(
        self,
        model: nn.Module,
        candidates: Iterable[Candidate],
        also: Mapping[type[nn.Module], str],
        only: str | None = None,
    ) -> None:
        self.model = private_copy(model)
        self.names = {module: name for name, module in self.model.named_modules()}
        self.probes: dict[str, Probe] = {}
        self.unread: dict[str, str] = {}  # by the paths of owners, why their code can't be rewritten
        wanted = {each.name for each in candidates if each.kind != "recurrent"}
        calls: dict[nn.Module, tuple[str, list[tuple[Call, nn.Module]]]] = {}
        for each in walk(self.model, also):
            if each.name not in wanted or each.module is None or only not in (None, each.path):
                continue
            probe = self.probes[each.name] = Probe(each.module, each.function)
            if each.kind == "attribute" or (each.kind == "module" and each.key in each.owner._modules):
                each.owner.__dict__.pop(each.key, None)
                each.owner._modules[each.key] = probe
            else:
                assert each.call is not None
                calls.setdefault(each.owner, (each.path, []))[1].append((each.call, probe))
        for owner, (path, theirs) in calls.items():
            try:
                redirect_calls(owner, theirs)
            except UnreadError as reason:
                self.unread[path] = str(reason)


def look(
    model: nn.Module, candidates: list[Candidate], example_inputs: Any, also: Mapping[type[nn.Module], str]
) -> tuple[dict[str, list[Seen]], list[str]]:
    """See what becomes of the activations of a model, which is not touched.

    Args:
        model: the model.
        candidates: its places; those that turn out not to be replaceable are taken out.
        example_inputs: of the model, or None.
        also: see :func:`walk`.

    Returns:
        By the names of the places what was seen of them, for calls after different layers apart, and nothing of those
        that are not called; and what could not be looked into.
    """
    asked = example_inputs is not None
    if not asked:
        # Layers that are spread over ranks wait for the others when they run.
        is_spread = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        example_inputs = None if is_spread else getattr(model, "example_input_array", None)
    with random_states_kept(model):
        try:
            twin = _Twin(model, candidates, also)
        except Exception as error:
            reason = f"{type(model).__name__}: it can't be copied to be looked into ({type(error).__name__}: {error})"
            return {each.name: [Seen()] for each in candidates}, [reason]
        unresolved = []
        for path, why in twin.unread.items():
            unresolved.append(f"{path or '(root)'}: its forward can't be rewritten: {why}")
            candidates[:] = [
                each for each in candidates
                if each.path != path or each.call is None or each.key in each.owner._modules
            ]  # fmt: skip
        seen: dict[str, list[Seen]] = {}
        if example_inputs is not None:
            try:
                unresolved += _observe(model, twin, candidates, example_inputs, also, seen)
            except Exception as error:
                lost = has_lost_hooks(model, twin.model)
                if asked and not lost:
                    raise
                why = (
                    "it can't run without its hooks, which may write anywhere"
                    if lost
                    else ("its example_input_array doesn't suit it")
                )
                unresolved.append(f"{type(model).__name__}: {why} ({type(error).__name__}: {error})")
                example_inputs, twin = None, _Twin(model, candidates, also)
        unresolved += _trace(twin, candidates, seen, observed=example_inputs is not None)
    follow_originals(model, [each.name for each in candidates], seen)
    for each in (one for several in seen.values() for one in several):
        each.nodes.clear()
    return seen, unresolved


def _observe(
    model: nn.Module, twin: _Twin, candidates: list[Candidate], inputs: Any, also: Mapping[type[nn.Module], str],
    seen: dict[str, list[Seen]],
) -> list[str]:  # fmt: skip
    """Run it in evaluation mode, and in training mode where that works."""
    unresolved = []
    expected = _plain(model, inputs)
    try:
        observed = observe(twin.model.eval(), inputs, list(twin.probes.values()), twin.names)
        is_same = _equal(observed.output, expected)
    except Exception:
        is_same = False
    if not is_same:
        wrong = [
            path
            for path in {each.path for each in candidates}
            if not _is_faithful(model, candidates, inputs, also, path)
        ]
        unresolved += [
            f"{path or '(root)'}: with its calls replaced by themselves the output is another one" for path in wrong
        ]
        candidates[:] = [each for each in candidates if each.path not in wrong]
        twin = _Twin(model, candidates, also)
        observed = observe(twin.model.eval(), inputs, list(twin.probes.values()), twin.names)
    for name in [name for name, probe in twin.probes.items() if probe.read]:
        unresolved.append(f"{name}: code reads its {twin.probes[name].read}, which a replacement may not have")
        candidates[:] = [each for each in candidates if each.name != name]
        del twin.probes[name]
    _take_in(observed.graph, twin, seen)
    missed = {(each.owner, each.function): each for each in observed.unseen}
    other = _Twin(model, candidates, also)
    try:
        observed = observe(other.model.train(), inputs, list(other.probes.values()), other.names)
    except Exception:
        pass  # such as a batch norm of one row
    else:
        _take_in(observed.graph, other, seen)
        missed |= {(each.owner, each.function): each for each in observed.unseen}
    for each in missed.values():
        calls = f"{each.count} calls of {each.function}" if each.count > 1 else f"a {each.function}"
        unresolved.append(
            f"{each.owner or '(root)'}: {calls} that the source of its class doesn't show, such as in another"
            " function; make it a module"
        )
    return unresolved


def _trace(twin: _Twin, candidates: list[Candidate], seen: dict[str, list[Seen]], *, observed: bool) -> list[str]:
    """See what symbolic passes show; with example inputs only of the methods that they don't run."""
    own = [name for name in ENTRIES if getattr(type(twin.model), name, None) is not None]
    entries = tuple(name for name in own if not (observed and name == "forward"))
    for name in ("log", "log_dict"):
        if hasattr(twin.model, name):
            setattr(twin.model, name, lambda *_, **__: None)
    for probe in twin.probes.values():
        probe.passes.clear()
    found = trace(twin.model.eval(), entries)
    before = set(seen)
    fresh: dict[str, list[Seen]] = {}
    _take_in(found.graph, twin, fresh)
    seen.update({name: what for name, what in fresh.items() if name not in before})
    # It may be called from a plain container, or not at all.
    candidates[:] = [each for each in candidates if each.name in seen or not each.is_held]
    if observed:
        return []
    doubled = [each for each in candidates if each.is_doubled]
    candidates[:] = [each for each in candidates if not each.is_doubled]
    opaque = {twin.names.get(module, "") for module in found.opaque}
    reasons = [
        f"{each.name}: its owner has the same module twice, which code that goes through children calls once; pass"
        " example_inputs, or make it two modules"
        for each in doubled
    ]
    for each in candidates:
        hidden_from = each.path in opaque or any(path == "" or each.path.startswith(f"{path}.") for path in opaque)
        if each.name not in seen and hidden_from:
            seen[each.name] = [Seen()]
            if each.call is not None and each.call.in_loop:
                reasons.append(
                    f"{each.name}: it is in a loop that can't be traced, and has one module for all passes; pass"
                    " example_inputs to have one for each layer"
                )
    return reasons


def _take_in(graph: Graph, twin: _Twin, seen: dict[str, list[Seen]]) -> None:
    """Note what a graph shows of the places that were not called before."""
    known = fates(graph)
    order = {node: number for number, node in enumerate(graph.sites)}
    for name, probe in twin.probes.items():
        if name in seen:
            continue
        passes = [each for each in probe.passes if each.node in order]
        groups: dict[str | None, Seen] = {}
        for each in passes:
            layer = None if each.layer is None else twin.names.get(each.layer)
            group = groups.setdefault(layer if len(passes) > 1 else None, Seen())
            group.add(known[each.node])
            group.nodes.append(each.node)
            if group.order is None:
                group.order, group.layer = order[each.node], layer
                before = each.node.inputs[0].module if each.node.inputs else None
                group.batch_norm = twin.names.get(before) if isinstance(before, BatchNorm) else None
            group.feeders += [twin.names[layer] for layer in _feeders(each.node) if layer in twin.names]
        clocks = [each.clock for each in passes]
        for group in groups.values():
            group.repeats = len(set(clocks)) < len(clocks)
        if groups:
            seen[name] = list(groups.values())


def _feeders(node: Node) -> list[nn.Module]:
    """The linear layers and convolutions that lead straight to an activation."""
    near = [each for before in node.inputs for each in before.back(lambda each: each.kind in ("move", "scale"))]
    return [each.module for each in near if each.kind == "layer" and isinstance(each.module, _LINEAR)]


def _plain(model: nn.Module, inputs: Any) -> Any:
    """The output of the model in evaluation."""
    return observe(private_copy(model).eval(), inputs, [], {}).output


def _is_faithful(
    model: nn.Module, candidates: list[Candidate], inputs: Any, also: Mapping[type[nn.Module], str], path: str
) -> bool:
    """Whether a module computes the same with its calls replaced by themselves."""
    twin = _Twin(model, candidates, also, path)
    try:
        return _equal(observe(twin.model.eval(), inputs, [], {}).output, _plain(model, inputs))
    except Exception:
        return False


def _equal(first: Any, second: Any) -> bool:
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=False)
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in tensors)
