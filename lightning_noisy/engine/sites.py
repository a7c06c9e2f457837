"""Where a model applies activation functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_noisy.nn.registry import function_name

__all__ = ["ActivationSite", "ActivationSites", "activation_sites"]

# Functions that gates and output layers are made of.
GATE_OR_OUTPUT = frozenset({"hardsigmoid", "hardtanh", "logsigmoid", "sigmoid", "softplus", "softsign", "tanh"})


@dataclass(frozen=True)
class ActivationSite:
    """One place where a model applies an activation function.

    Attributes:
        name: path of the module, as in ``model.named_modules()``; ``""`` if the model is an activation.
        kind: ``"module"``.
        function: plain name of the function, such as ``"relu"``.
        owner: path of the module that holds it.
        after_residual: whether the input comes straight from a residual addition; None where unknown.
        is_gate: whether the output gates something; None where unknown.
        module: the activation module itself.
    """

    name: str
    kind: str
    function: str
    owner: str
    after_residual: bool | None
    is_gate: bool | None
    module: nn.Module = field(repr=False, compare=False)


class ActivationSites(list[ActivationSite]):
    """A list of sites that prints as a table."""

    def __str__(self) -> str:
        """One line per site below a header."""
        columns = ("name", "kind", "function", "owner", "after_residual", "is_gate")
        rows: list[tuple[str, ...]] = [columns]
        rows += [tuple(str(getattr(site, column)) or "(root)" for column in columns) for site in self]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def activation_sites(model: nn.Module) -> ActivationSites:
    """List every place where a module of ``model`` is an activation; changes nothing.

    Sites are found in ``model``'s tree of modules: an instance that is registered twice has two. Calls of
    functions (``F.relu(x)``) and methods (``x.relu()``) are not found. ``is_gate`` is False for an activation
    whose output is the next layer's input in an ``nn.Sequential``, and None elsewhere.

    Args:
        model: any module.

    Returns:
        The sites in the order of ``model.named_modules()``; prints as a table.

    Raises:
        TypeError: if ``model`` is not an ``nn.Module``.

    >>> print(activation_sites(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1), nn.Sigmoid())))
    name  kind    function  owner   after_residual  is_gate
    1     module  tanh      (root)  None            False
    3     module  sigmoid   (root)  None            None
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r} of type {type(model).__name__}.")
    if (function := function_name(model)) is not None:
        return ActivationSites([ActivationSite("", "module", function, "", None, None, model)])
    return ActivationSites(_walk(model, "", False, set()))


def _walk(owner: nn.Module, path: str, feeds_on: bool, seen: set[nn.Module]) -> Iterator[ActivationSite]:
    """Sites below ``owner``; ``feeds_on``: owner's output is the input of a next layer."""
    seen.add(owner)
    chained = type(owner).forward is nn.Sequential.forward
    children = list(owner._modules.items())  # named_children() would pass over the second use of an instance
    for index, (key, child) in enumerate(children):
        if child is None or isinstance(child, ParametrizationList):  # whose functions are of weights
            continue
        name = f"{path}.{key}" if path else key
        # What follows must be a layer: an output may still be reshaped.
        layer_follows = any(_has_parameters(later) for _, later in children[index + 1 :])
        child_feeds_on = chained and (layer_follows or feeds_on)
        function = function_name(child)
        if function is not None:  # what an activation consists of is no site of its own
            yield ActivationSite(name, "module", function, path, None, False if child_feeds_on else None, child)
        elif child not in seen:
            yield from _walk(child, name, child_feeds_on, seen)


def _has_parameters(module: nn.Module | None) -> bool:
    return module is not None and any(True for _ in module.parameters())
