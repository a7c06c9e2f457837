"""Where a model applies activation functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_noisy.replacement.by_layer import ByLayer
from lightning_noisy.replacement.call_finder import Call
from lightning_noisy.replacement.candidates import Candidate, function_name, walk
from lightning_noisy.replacement.decision import GATE_OR_OUTPUT
from lightning_noisy.replacement.looking import Seen, look
from lightning_noisy.replacement.recognition import RECURRENT, Also, check_also, recurrent_function

__all__ = ["ActivationSite", "ActivationSites", "activation_sites", "registered_activations"]


@dataclass(frozen=True)
class ActivationSite:
    """One place where a model applies an activation function.

    Attributes:
        name: path of the module, as in ``model.named_modules()``, ``""`` if the model is an activation;
            ``"layer1.0.relu#2"`` for the second call site of a module; ``"branch1:relu#0"`` for the first call of a
            ReLU in the code of ``branch1``; ``"@2"`` is appended for its calls after a second layer, as in a loop.
        kind: ``"module"``, ``"function"`` (``F.relu(x)``), ``"method"`` (``x.relu()``), ``"attribute"`` (a function
            held as an attribute), ``"inline"`` (``nn.ReLU()(x)``) or ``"recurrent"``.
        function: plain name of the function, such as ``"relu"``.
        owner: path of the module whose forward makes the call.
        after_residual: whether the input comes straight from the addition of two branches; None where unknown.
        is_gate: whether the output is multiplied with another branch; None where unknown.
        is_hidden: whether the output reaches a layer before it leaves the model; None where unknown. Else it is an
            output, or part of a loss.
        number: 1, or the number behind the ``"@"``.
        is_called: whether it is called in the passes that were looked at.
        layer_follows: whether a layer comes later in the model's code, which matters if that is all that is known.
        seen: what was seen of its calls.
        order: its number in the order in which they are called; None where unknown.
        batch_norm: path of the batch norm whose output it gets; None if there is none, or it isn't known.
        module: the activation module; for a call one that computes the same, with the values that its arguments have
            now, which is not part of the model.
        call: the call in the source, if it is one.
    """

    name: str
    kind: str
    function: str
    owner: str
    after_residual: bool | None
    is_gate: bool | None
    is_hidden: bool | None
    order: int | None
    batch_norm: str | None
    module: nn.Module | None = field(repr=False, compare=False)
    call: Call | None = field(default=None, repr=False, compare=False)
    number: int = field(default=1, repr=False, compare=False)
    is_called: bool = True
    layer_follows: bool = field(default=False, repr=False, compare=False)
    seen: Seen = field(default_factory=Seen, repr=False, compare=False)

    @property
    def is_output(self) -> bool | None:
        """Whether the output leaves the model, or goes into a loss, without reaching a layer; None where unknown."""
        return None if self.is_hidden is None else not self.is_hidden

    @property
    def role(self) -> str:
        """What it is to its model, which decides whether it is replaced.

        ``"hidden"``, ``"gate"``, ``"formula"`` (a part of one), ``"output"`` (or part of a loss), ``"residual"`` (after
        a residual addition), ``"recurrent"``, ``"unused"`` (not called), or ``"unknown"``.
        """
        if self.kind == "recurrent" or not self.is_called:
            return "recurrent" if self.kind == "recurrent" else "unused"
        if self.seen.is_formula or self.is_gate:
            return "formula" if self.seen.is_formula else "gate"
        if self.is_hidden is False:
            return "output"
        if self.after_residual:
            return "residual"
        may_be_either = self.function in GATE_OR_OUTPUT
        if self.is_hidden:
            return "unknown" if self.is_gate is None and may_be_either else "hidden"
        return "hidden" if not self.name or (self.layer_follows and not may_be_either) else "unknown"

    @property
    def key(self) -> str:
        """Its name within its owner."""
        return self.name[len(self.owner) :].lstrip(".:")

    @property
    def place(self) -> str:
        """The same without the number of the pass."""
        return self.key if self.number == 1 else self.key.rpartition("@")[0]


class ActivationSites(list[ActivationSite]):
    """A list of sites that prints as a table.

    Attributes:
        unresolved: what could not be resolved, each with the reason.
    """

    def __init__(self, sites: Iterable[ActivationSite] = (), unresolved: Iterable[str] = ()) -> None:
        super().__init__(sites)
        self.unresolved = list(unresolved)

    def __str__(self) -> str:
        """One line per site below a header; then what could not be looked into."""
        rows: list[tuple[str, ...]] = [("name", "kind", "function", "owner", "role", "module")]
        rows += [
            (each.name or "(root)", each.kind, each.function, each.owner or "(root)", each.role, _class(each.module))
            for each in self
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(width) for c, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines + [f"not looked into: {reason}" for reason in self.unresolved])

    __repr__ = __str__


def _class(module: nn.Module | None) -> str:
    return "" if module is None else type(module).__name__


def activation_sites(model: nn.Module, example_inputs: Any = None, *, also: Also = ()) -> ActivationSites:
    """List every place where a model applies an activation function; changes nothing.

    Modules are found in the model's tree, by their types. Calls of functions and methods are found in the source of the
    modules' classes. What becomes of the outputs is seen on a copy that shares the parameters: in forward passes with
    the example inputs, in evaluation and in training mode, or without these in symbolic passes of the modules, as far
    as their code can be traced.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments of the model; by
            default the ``example_input_array`` of a LightningModule, if it has one.
        also: classes of your own that are activations; as a mapping with the plain names of their functions, such as
            ``{MyGELU: "gelu"}``.

    Returns:
        The sites in the order of the modules and of their source, or with example inputs in call order; prints as a
        table. Its ``unresolved`` lists what could not be resolved.

    Raises:
        TypeError: if ``model`` is not an ``nn.Module``, or ``also`` has anything else than classes of modules.

    >>> print(activation_sites(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1), nn.Sigmoid())))
    name  kind    function  owner   role    module
    1     module  tanh      (root)  hidden  Tanh
    3     module  sigmoid   (root)  output  Sigmoid
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r} of type {type(model).__name__}.")
    names = check_also(also)
    kind = "recurrent" if isinstance(model, RECURRENT) else "module"
    function = recurrent_function(model) if kind == "recurrent" else function_name(model, names)
    if function is not None:
        return ActivationSites([ActivationSite("", kind, function, "", None, None, None, 0, None, model)])
    candidates = walk(model, names)
    unresolved = [reason for each in candidates for reason in each.reasons]
    candidates = [each for each in candidates if each.function]
    for each in [each for each in candidates if each.module is None and each.kind != "recurrent"]:
        unresolved.append(f"{each.name}: an argument of {each.function} is known only when it runs")
        candidates.remove(each)
    seen, reasons = look(model, candidates, example_inputs, names)
    sites = [site for each in candidates for site in _sites(each, seen.get(each.name))]
    if example_inputs is not None or getattr(model, "example_input_array", None) is not None:
        sites.sort(key=lambda site: (site.order is None, site.order or 0))
    return ActivationSites(sites, unresolved + reasons)


def _sites(place: Candidate, seen: list[Seen] | None) -> Iterator[ActivationSite]:
    """The sites at a place: one for the calls after each layer."""
    modules = list(place.module.children()) if isinstance(place.module, ByLayer) else []
    for number, each in enumerate(seen or [Seen()], start=1):
        yield ActivationSite(
            place.name if number == 1 else f"{place.name}@{number}",
            place.kind,
            place.function,
            place.path,
            each.after_residual,
            each.is_gate,
            each.is_hidden,
            each.order,
            each.batch_norm,
            modules[min(number, len(modules)) - 1] if modules else place.module,
            place.call,
            number,
            seen is not None or place.kind == "recurrent",
            place.layer_follows,
            each,
        )


def registered_activations(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the places whose activations are modules of the model; nothing is run or traced."""
    if function_name(model, {}) is not None:
        yield "", model
        return
    there = set(model.modules())
    for each in walk(model, {}):
        modules = each.module.children() if isinstance(each.module, ByLayer) else [each.module]
        for number, module in enumerate(modules, start=1):
            if each.function and module in there and each.kind != "recurrent":
                yield each.name if number == 1 else f"{each.name}@{number}", module
