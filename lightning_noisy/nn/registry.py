"""Activations by name: the names that ``replace_activations`` accepts, and the plain functions' names."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_noisy.nn.gpn import GPNActivation
from lightning_noisy.nn.noisy import NAH, NAN, NANI, NANIL, NANIS, NoisyActivation
from lightning_noisy.nn.normalized import NLeakyReLU, NormalizedActivation, NReLU, NSwish

__all__ = [
    "check_name",
    "check_spec",
    "create",
    "describe",
    "function_name",
    "names",
    "parse",
    "register",
    "unregister",
]

# The elementwise activations of torch.nn, keyed by the name of the function in torch.nn.functional.
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
}


NOISY: dict[str, type[NoisyActivation]] = {"nah": NAH, "nan": NAN, "nani": NANI, "nanil": NANIL, "nanis": NANIS}

# The functions with a hard version for the noisy activations, and the name of that version.
SATURATING = {"hardsigmoid": "sigmoid", "hardtanh": "tanh", "relu": "relu", "sigmoid": "sigmoid", "tanh": "tanh"}

_GPN = {f"{name}-gpn": name for name in ("relu", "leaky_relu", "elu", "selu", "tanh", "gelu")}

_ALIASES = {"leakyrelu": "leaky_relu", "nleaky_relu": "nlrelu", "nswish": "nsw", "swish": "silu"}

# Activations registered by users, by name.
REGISTERED: dict[str, Callable[..., nn.Module]] = {}


def names() -> list[str]:
    """Every name that :func:`create` accepts, without aliases.

    >>> "nsw" in names()
    True
    """
    return sorted([*PLAIN, *NORMALIZED, "normalized", *NOISY, *_GPN, *REGISTERED])


def describe() -> str:
    """A table of the names, with one line for each.

    >>> print(describe().splitlines()[0])
    celu                 torch.nn.CELU
    """
    lines = {name: f"torch.nn.{cls.__name__}" for name, cls in PLAIN.items()}
    lines |= {name: _first_line(cls) for name, cls in (NORMALIZED | NOISY | REGISTERED).items()}
    lines["normalized"] = "The site's own function, normalized."
    lines |= {
        name: f"{PLAIN[function].__name__}, scaled and shifted for N(0, 1) (GPN)." for name, function in _GPN.items()
    }
    lines |= {alias: f"The same as {name}." for alias, name in _ALIASES.items()}
    return "\n".join(f"{name:<20} {lines[name]}" for name in sorted(lines))


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]


_Factory = TypeVar("_Factory", bound=Callable[..., nn.Module])


def register(name: str) -> Callable[[_Factory], _Factory]:
    """A decorator that registers a module class, or a function that returns a module, under a name.

    Args:
        name: letters, digits, ``_`` and ``-``; not a name that exists already.

    Raises:
        ValueError: if the name is invalid or taken.

    >>> @register("double_relu")
    ... class DoubleReLU(nn.ReLU):
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    >>> create("double_relu")
    DoubleReLU()
    >>> unregister("double_relu")
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"A name consists of letters, digits, _ and -, got {name!r}.")
    if name in names() or name in _ALIASES:
        raise ValueError(f"{name!r} is already the name of an activation.")

    def add(factory: _Factory) -> _Factory:
        REGISTERED[name] = factory
        return factory

    return add


def unregister(name: str) -> None:
    """Remove a name that :func:`register` added."""
    del REGISTERED[name]


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Split a name from its options. Options are literals; no code is evaluated.

    Raises:
        ValueError: if it isn't written as ``name`` or ``name(option=literal, ...)``.

    >>> parse("nah(alpha=1.15, c=0.5)")
    ('nah', {'alpha': 1.15, 'c': 0.5})
    """
    name, bracket, rest = spec.strip().partition("(")
    name = _ALIASES.get(name.strip(), name.strip())
    if not bracket:
        return name, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("it is not a single call")
        if call.args or not all(keyword.arg for keyword in call.keywords):
            raise ValueError("every argument needs a name")
        options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        if len(options) < len(call.keywords):
            raise ValueError("an option is given twice")
        return name, options
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(
            f"{spec!r} must be a name, or a name with literals as options, such as 'nah(alpha=1.15)': {error}."
        ) from None


def check_name(name: str, known: Iterable[str], *, what: str) -> None:
    """Raise a ValueError that suggests the closest names, unless ``name`` is one of ``known``."""
    known = sorted(known)
    if name in known:
        return
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Known are: {', '.join(known)}."
    raise ValueError(f"{name!r} is not {what}. {hint}")


def check_spec(spec: str) -> None:
    """Raise a ValueError unless :func:`create` can make ``spec``, a name with or without options.

    >>> check_spec("nah(alpha=1.15)")
    >>> check_spec("nah(alhpa=1.15)")
    Traceback (most recent call last):
    ValueError: 'nah' has no option 'alhpa'. Did you mean 'alpha'? It has: alpha, c, inplace, noise, num_parameters.
    """
    name, options = parse(spec)
    check_name(name, names(), what="the name of an activation")
    known = _options(name)
    for option in options:
        if known is not None and option not in known:
            close = difflib.get_close_matches(option, known, n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{name!r} has no option {option!r}.{hint} It has: {', '.join(sorted(known)) or 'none'}.")
    if options and name not in REGISTERED:  # creating one may have side effects
        try:
            with torch.random.fork_rng([]):
                create(spec)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{spec!r} can't be made: {error}") from error


def options_of(spec: object) -> str:
    """The options of a registered name in canonical form; empty for other names, whose modules show their options."""
    name, options = parse(spec) if isinstance(spec, str) else ("", {})
    return ", ".join(f"{key}={options[key]!r}" for key in sorted(options)) if name in REGISTERED else ""


def _options(name: str) -> list[str] | None:
    """The options that a name accepts, or None if they aren't known."""
    if name in REGISTERED:
        factory, own = REGISTERED[name], set[str]()
    else:
        own = {"function", "device", "dtype"}  # given by the site
        factory = GPNActivation if name in _GPN else (PLAIN | NORMALIZED | NOISY).get(name, NormalizedActivation)
    found: list[str] = []
    for cls in factory.__mro__[:-1] if inspect.isclass(factory) else (factory,):
        if inspect.isclass(cls) and cls.__init__ is nn.Module.__init__:
            return found
        try:
            parameters = inspect.signature(cls.__init__ if inspect.isclass(cls) else cls).parameters.values()
        except (TypeError, ValueError):
            return None
        named = [each.name for each in parameters if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)]
        found += [each for each in named if each != "self" and each not in {*own, *found}]
        if all(each.kind is not each.VAR_KEYWORD for each in parameters):
            return found
        if name in REGISTERED:
            return None
    return None


def create(name: str, *, function: str | Callable[..., Any] = "tanh", **options: Any) -> nn.Module:
    """Create an activation by name.

    Args:
        name: one of :func:`names` or an alias: a plain function (``"gelu"``), a normalized one (``"nsw"``,
            ``"nrelu"``, ``"nlrelu"``), ``"normalized"`` for the normalized version of ``function``, a noisy one
            (``"nah"``, ...) for the hard version of ``function``, a GPN one (``"relu-gpn"``). It may have options,
            ``"nah(alpha=1.15, c=0.5)"``: literals, see :func:`parse`.
        function: what ``"normalized"`` normalizes: a plain function's name, or an elementwise callable or
            module; for the noisy names one of ``SATURATING``, or a pair (h, u). Other names ignore it.
        options: keyword arguments of the module's class; they override those in the name.

    Returns:
        A new module.

    Raises:
        ValueError: if a name is unknown; suggests the closest ones.
        TypeError: if the class doesn't accept an option.

    >>> create("leaky_relu", negative_slope=0.2)
    LeakyReLU(negative_slope=0.2)
    >>> create("nah(c=30)", function="sigmoid")
    NAH('sigmoid', c=30, noise='half-normal', alpha=1.15)
    """
    name, written = parse(name)
    options = {**written, **options}
    function = _ALIASES.get(function, function) if isinstance(function, str) else function
    check_name(name, names(), what="the name of an activation")
    if name in NOISY:
        hard = SATURATING.get(function, function) if isinstance(function, str) else function
        return NOISY[name](hard, **options)  # type: ignore[arg-type]
    if name in _GPN:
        return GPNActivation(PLAIN[_GPN[name]](), **options)
    for group in (PLAIN, NORMALIZED, REGISTERED):
        if name in group:
            return group[name](**options)
    if isinstance(function, str):
        check_name(function, PLAIN, what="the name of a plain activation function")
        function = PLAIN[function]()
    return NormalizedActivation(function, **options)


def function_name(module: nn.Module) -> str | None:
    """The plain name of the function that an activation module applies, or None for any other module.

    Subclasses of an activation count as that activation; a normalized or noisy one has the name of its
    underlying function.

    >>> function_name(NSwish()), function_name(nn.ReLU6()), function_name(nn.Linear(1, 1))
    ('silu', 'relu6', None)
    """
    if isinstance(module, NoisyActivation):
        return module.function_name
    if isinstance(module, (NormalizedActivation, GPNActivation)):
        if isinstance(module.function, nn.Module):
            return function_name(module.function) or type(module.function).__name__
        return str(getattr(module.function, "__name__", "function"))
    for base in type(module).__mro__:  # the closest base: ReLU6 is a Hardtanh, too
        for name, plain in PLAIN.items():
            if base is plain:
                return name
    return None
