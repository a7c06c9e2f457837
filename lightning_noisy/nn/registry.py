"""Activations by name: the names that ``replace_activations`` takes, and the plain functions' names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from lightning_noisy.nn.normalized import NLeakyReLU, NormalizedActivation, NReLU, NSwish

__all__ = ["check_name", "create", "function_name", "names"]

# The elementwise activations of torch.nn, each by the name of its function in torch.nn.functional.
PLAIN: dict[str, type[nn.Module]] = {
    "celu": nn.CELU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "hardshrink": nn.Hardshrink,
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "hardtanh": nn.Hardtanh,
    "leaky_relu": nn.LeakyReLU,
    "logsigmoid": nn.LogSigmoid,
    "mish": nn.Mish,
    "prelu": nn.PReLU,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "rrelu": nn.RReLU,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "softshrink": nn.Softshrink,
    "softsign": nn.Softsign,
    "tanh": nn.Tanh,
    "tanhshrink": nn.Tanhshrink,
}

NORMALIZED: dict[str, type[NormalizedActivation]] = {
    "nlrelu": NLeakyReLU,
    "nrelu": NReLU,
    "nsw": NSwish,
    "nswish": NSwish,
}


def names() -> list[str]:
    """Every name that :func:`create` takes.

    >>> "nsw" in names()
    True
    """
    return sorted([*PLAIN, *NORMALIZED, "normalized"])


def check_name(name: str, known: Iterable[str], *, what: str) -> None:
    """Raise a ValueError that suggests the closest names, unless ``name`` is one of ``known``."""
    known = sorted(known)
    if name in known:
        return
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Known are: {', '.join(known)}."
    raise ValueError(f"{name!r} is not {what}. {hint}")


def create(name: str, *, function: str | Callable[..., Any] = "tanh", **options: Any) -> nn.Module:
    """Make an activation by its name.

    Args:
        name: one of :func:`names`: a plain function (``"gelu"``), a normalized one (``"nsw"``, ``"nrelu"``,
            ``"nlrelu"``), or ``"normalized"`` for the normalized version of ``function``.
        function: what ``"normalized"`` normalizes: a plain function's name, or an elementwise callable or
            module. The other names have their own function.
        options: keyword arguments of the module's class.

    Returns:
        A new module.

    Raises:
        ValueError: if a name is unknown; suggests the closest ones.
        TypeError: if the class doesn't take an option.

    >>> create("leaky_relu", negative_slope=0.2)
    LeakyReLU(negative_slope=0.2)
    """
    check_name(name, names(), what="the name of an activation")
    if name in PLAIN:
        return PLAIN[name](**options)
    if name in NORMALIZED:
        return NORMALIZED[name](**options)
    if isinstance(function, str):
        check_name(function, PLAIN, what="the name of a plain activation function")
        function = PLAIN[function]()
    return NormalizedActivation(function, **options)


def function_name(module: nn.Module) -> str | None:
    """The plain name of the function that an activation module applies, or None for any other module.

    Subclasses of an activation count as that activation; a normalized one has the name of what it
    normalizes.

    >>> function_name(NSwish()), function_name(nn.ReLU6()), function_name(nn.Linear(1, 1))
    ('silu', 'relu6', None)
    """
    if isinstance(module, NormalizedActivation):
        if isinstance(module.function, nn.Module):
            return function_name(module.function) or type(module.function).__name__
        return str(getattr(module.function, "__name__", "function"))
    for base in type(module).__mro__:  # the closest base: ReLU6 is a Hardtanh, too
        for name, plain in PLAIN.items():
            if base is plain:
                return name
    return None
