"""Where a model applies activation functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_noisy.nn import registry
from lightning_noisy.replacement.call_finder import NAME, Call, UnreadError, calls_of
from lightning_noisy.replacement.call_redirect import CallSites, redirect_calls
from lightning_noisy.replacement.dataflow import Probe, Seen, observe, trace
from lightning_noisy.replacement.recognition import (
    RECURRENT,
    function_of,
    held_activations,
    held_function,
    recurrent_function,
)
from lightning_noisy.replacement.snapshot import Snapshot

__all__ = ["ActivationSite", "ActivationSites", "activation_sites", "registered_activations"]

# Functions that are used as gates and output layers.
GATE_OR_OUTPUT = frozenset({"hardsigmoid", "hardtanh", "logsigmoid", "sigmoid", "softplus", "softsign", "tanh"})


@dataclass(frozen=True)
class ActivationSite:
    """One place where a model applies an activation function.

    Attributes:
        name: path of the module, as in ``model.named_modules()``, ``""`` if the model is an activation;
            ``"layer1.0.relu#2"`` for the second call site of a module; ``"branch1:relu#0"`` for the first call of a
            ReLU in the code of ``branch1``; ``"@2"`` is appended for the second execution of a call in a loop.
        kind: ``"module"``, ``"function"`` (``F.relu(x)``), ``"method"`` (``x.relu()``), ``"attribute"`` (a function
            held as an attribute), ``"inline"`` (``nn.ReLU()(x)``) or ``"recurrent"``.
        function: plain name of the function, such as ``"relu"``.
        owner: path of the module whose forward makes the call.
        after_residual: whether the input comes directly from the addition of two branches; None if unknown.
        is_gate: whether the output is multiplied by another branch; None if unknown.
        is_output: whether the output is one of the model's; None if unknown.
        order: its position in the call order, as far as that is known.
        batch_norm: path of the batch norm whose output is its input; None if there is none, or it is unknown.
        module: the activation module; for a call, an equivalent module with the current values of its arguments, which
            is not part of the model.
    """

    name: str
    kind: str
    function: str
    owner: str
    after_residual: bool | None
    is_gate: bool | None
    is_output: bool | None
    order: int
    batch_norm: str | None
    module: nn.Module | None = field(repr=False, compare=False)
    call: Call | None = field(default=None, repr=False, compare=False)
    number: int = field(default=1, repr=False, compare=False)

    @property
    def key(self) -> str:
        """Its name within its owner."""
        return self.name[len(self.owner) :].lstrip(".:")


class ActivationSites(list[ActivationSite]):
    """A list of sites that prints as a table.

    Attributes:
        unresolved: what could not be resolved, each with the reason.
    """

    def __init__(self, sites: Iterable[ActivationSite] = (), unresolved: Iterable[str] = ()) -> None:
        super().__init__(sites)
        self.unresolved = list(unresolved)

    def __str__(self) -> str:
        """One line per site below a header; then what is unresolved."""
        columns = ("name", "kind", "function", "owner", "after_residual", "is_gate")
        rows: list[tuple[str, ...]] = [columns]
        rows += [tuple(str(getattr(site, column)) or "(root)" for column in columns) for site in self]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(width) for c, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines + [f"not looked into: {reason}" for reason in self.unresolved])


def activation_sites(model: nn.Module, example_inputs: Any = None) -> ActivationSites:
    """List every place where a model applies an activation function; changes nothing.

    Modules are found in the module tree; an instance that is registered twice is two sites. Calls of functions and
    methods are found in the source of the modules' classes. With example inputs, one forward pass shows the data flow
    around each site, and how often it is called; buffers and random states are restored afterwards. Without them, each
    module's forward is traced symbolically on its own, if possible.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments of the model; by
            default a LightningModule's ``example_input_array``, if it has one.

    Returns:
        The sites in the order of the modules and of their source, or with example inputs in call order; prints as a
        table. Its ``unresolved`` lists what could not be resolved.

    Raises:
        TypeError: if ``model`` is not an ``nn.Module``.

    >>> print(activation_sites(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1), nn.Sigmoid())))
    name  kind    function  owner   after_residual  is_gate
    1     module  tanh      (root)  False           False
    3     module  sigmoid   (root)  False           None
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r} of type {type(model).__name__}.")
    if (function := registry.function_name(model)) is not None:
        return ActivationSites([ActivationSite("", "module", function, "", None, None, None, 0, None, model)])
    asked = example_inputs is not None
    if not asked:
        example_inputs = getattr(model, "example_input_array", None)
    if isinstance(model, RECURRENT):
        function = recurrent_function(model)
        return ActivationSites([ActivationSite("", "recurrent", function, "", None, None, None, 0, None, model)])
    snapshot = Snapshot(model)
    names = {module: name for name, module in model.named_modules()}
    candidates = list(_walk(model, "", False, set()))
    unresolved = [reason for each in candidates for reason in each.reasons]
    try:
        probes = _put_probes(candidates, unresolved)
        if example_inputs is None:
            traced = {owner: trace(owner) for owner in dict.fromkeys(probes.values()) if _has_forward(owner)}
            unresolved += [
                f"{each.name}: it is in a loop that can't be traced, and would have one module for all iterations;"
                " pass example_inputs to have one for each"
                for each in candidates
                if each.call and each.call.in_loop and each.seen.passes is None and not traced.get(each.owner)
            ]
        else:
            for unseen in observe(model, example_inputs, probes, names):
                calls = f"{unseen.count} calls of {unseen.function}" if unseen.count > 1 else f"a {unseen.function}"
                unresolved.append(
                    f"{unseen.owner or '(root)'}: {calls} that the source of its class doesn't show, such as in another"
                    " function; make it a module"
                )
            idle = [
                each for each in candidates if each.function and each.kind != "recurrent" and each.seen.order is None
            ]
            if asked:
                unresolved += [f"{each.name}: not called with these example inputs" for each in idle]
                candidates = [each for each in candidates if each not in idle]
    finally:
        snapshot.restore()
    unresolved += [
        f"{each.name}: called {each.seen.passes} times in a forward pass of its owner, at call sites that its source"
        " doesn't show; it would have one module for all"
        for each in candidates
        if each.function and (each.seen.passes or 0) > 1 and not (each.call and each.call.in_loop)
        if _has_forward(each.owner)
    ]
    sites = [site for candidate in candidates for site in candidate.sites(names)]
    if example_inputs is not None:
        sites.sort(key=lambda site: site.order)
    return ActivationSites(sites, unresolved)


def registered_activations(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the sites whose activations are modules of the model; nothing is run or traced."""
    if registry.function_name(model) is not None:
        yield "", model
        return
    there = set(model.modules())
    for candidate in _walk(model, "", False, set()):
        for site in candidate.sites({}):
            if site.module in there and site.kind != "recurrent":
                assert site.module is not None
                yield site.name, site.module


@dataclass
class _SiteCandidate:
    """A site before it is known how often it is called."""

    path: str
    owner: nn.Module
    kind: str
    key: str
    function: str
    module: nn.Module | None
    call: Call | None = None
    feeds_layer: bool = False
    number: int = 0
    seen: Seen = field(default_factory=Seen)
    reasons: list[str] = field(default_factory=list)
    others: dict[int, nn.Module] = field(default_factory=dict)

    @property
    def name(self) -> str:
        is_child = self.kind in ("module", "attribute", "recurrent")
        return self.key if is_child and not self.path else f"{self.path}{'.' if is_child else ':'}{self.key}"

    def sites(self, names: dict[nn.Module, str]) -> Iterator[ActivationSite]:
        if not self.function:
            return
        seen = self.seen
        is_gate = False if seen.is_gate is None and self.feeds_layer else seen.is_gate
        in_loop = self.call is not None and self.call.in_loop
        passes = max(seen.passes or 1, len(self.others) + 1) if in_loop else 1
        order = self.number if seen.order is None else seen.order
        for number in range(1, passes + 1):
            name = self.name if number == 1 else f"{self.name}@{number}"
            module = self.others.get(number, self.module)
            yield ActivationSite(
                name,
                self.kind,
                self.function,
                self.path,
                seen.after_residual,
                is_gate,
                seen.is_output,
                order,
                names.get(seen.batch_norm) if seen.batch_norm is not None else None,
                module,
                self.call,
                number,
            )


def _walk(owner: nn.Module, path: str, feeds_layer: bool, seen: set[nn.Module]) -> Iterator[_SiteCandidate]:
    """Candidates at and below ``owner``; ``feeds_layer``: whether its output is the input of another layer."""
    seen.add(owner)
    if isinstance(owner, torch.jit.ScriptModule):
        yield _SiteCandidate(path, owner, "", "", "", None, reasons=[f"{path or '(root)'}: it is scripted"])
        return
    numbers = len(seen)
    chained = type(owner).forward is nn.Sequential.forward
    calls, reasons = calls_of(owner, function_of)
    uses = {call.key: call for call in calls if call.kind == "module"}
    if reasons:
        yield _SiteCandidate(
            path, owner, "", "", "", None, reasons=[f"{path or '(root)'}: {reason}" for reason in reasons]
        )
    there = owner._modules.get(NAME)
    sent: dict[str, nn.Module] = dict(there.items()) if isinstance(there, CallSites) else {}
    for key, value in owner.__dict__.items():
        if key.startswith("_"):
            continue
        function = held_function(value)
        if function is not None:
            use = uses.pop(key, None)
            yield _SiteCandidate(
                path, owner, "attribute", key, *function, use, number=numbers, others=_others(sent, key)
            )
        elif held := held_activations(value):
            reason = (
                f"{path or '(root)'}: {held} in the container {key!r}; make it an nn.ModuleList or an nn.ModuleDict"
            )
            yield _SiteCandidate(path, owner, "", "", "", None, reasons=[reason])
    children = list(owner._modules.items())  # named_children() would skip an instance's second name
    for index, (key, child) in enumerate(children):
        if child is None or isinstance(child, (ParametrizationList, CallSites)):  # parametrizations compute weights
            continue
        name = f"{path}.{key}" if path else key
        # A layer must follow: an output may still be reshaped.
        layer_follows = any(_has_parameters(later) for _, later in children[index + 1 :])
        child_feeds_on = chained and (layer_follows or feeds_layer)
        function_name = function_of(child)
        if function_name is not None:  # the parts of an activation are not sites
            use = uses.pop(key, None)
            others = _others(sent, key)
            yield _SiteCandidate(
                path, owner, "module", key, function_name, child, use, child_feeds_on, len(seen), others=others
            )
        elif isinstance(child, RECURRENT):
            yield _SiteCandidate(path, owner, "recurrent", key, recurrent_function(child), child, number=len(seen))
        elif child not in seen:
            yield from _walk(child, name, child_feeds_on, seen)
    for call in calls:
        if call.kind == "module" and call.key not in uses:
            continue
        module = sent.get(call.key, call.plain)
        if module is None and call.child is not None:
            module = owner._modules.get(call.child)
            if module is None and (function := held_function(owner.__dict__.get(call.child))) is not None:
                module = function[1]
        # A second call of a child is named like a child, not like a call.
        yield _SiteCandidate(
            path,
            owner,
            call.kind,
            call.key,
            call.function,
            module,
            call,
            number=numbers,
            others=_others(sent, call.key),
        )


def _others(sent: dict[str, nn.Module], key: str) -> dict[int, nn.Module]:
    """The modules of a call's second and later executions, by number."""
    return {int(name.rpartition("@")[2]): module for name, module in sent.items() if name.startswith(f"{key}@")}


def _put_probes(candidates: list[_SiteCandidate], unresolved: list[str]) -> dict[Probe, nn.Module]:
    """Install a probe at each candidate; return the probes, each with its owner."""
    probes: dict[Probe, nn.Module] = {}
    calls: dict[nn.Module, list[tuple[Call, list[nn.Module]]]] = {}
    for candidate in candidates:
        if candidate.kind in ("", "recurrent"):
            continue
        if candidate.module is None:
            unresolved.append(f"{candidate.name}: an argument of {candidate.function} is known only when it runs")
            candidate.function = ""
            continue
        probe = Probe(candidate.module, candidate.seen)
        probes[probe] = candidate.owner
        if candidate.kind == "attribute":
            candidate.owner.__dict__[candidate.key] = probe
        elif candidate.kind == "module" and candidate.key in candidate.owner._modules:
            candidate.owner._modules[candidate.key] = probe
        else:
            assert candidate.call is not None
            calls.setdefault(candidate.owner, []).append((candidate.call, [probe]))
    for owner, theirs in calls.items():
        try:
            redirect_calls(owner, theirs)
        except UnreadError as reason:
            unresolved.append(f"{type(owner).__name__}: its forward can't be rewritten: {reason}")
            for candidate in candidates:
                if candidate.owner is owner and candidate.call is not None and candidate.key not in owner._modules:
                    candidate.function = ""
    return probes


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward and not isinstance(
        module, (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    )


def _has_parameters(module: nn.Module | None) -> bool:
    return module is not None and any(True for _ in module.parameters())
