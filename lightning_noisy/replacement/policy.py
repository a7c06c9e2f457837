"""Which activations are replaced with what."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, cast

from torch import nn

from lightning_noisy.nn import registry
from lightning_noisy.nn.recurrent_cells import has_drop_in
from lightning_noisy.replacement.origin import Origin, fingerprint
from lightning_noisy.replacement.recognition import Also, check_also
from lightning_noisy.replacement.sites import ActivationSite, ActivationSites

__all__ = ["REMEDIES", "Choice", "GateSpecs", "New", "Policy", "Replacement", "Rule", "check_replacement"]

# What a site may be replaced with. `replace_activations` also takes a mapping from plain functions' names.
# LightningCLI tries the types in this order: a dict must not be taken for a callable's arguments.
New = type[nn.Module] | str | Callable[[ActivationSite], nn.Module]
Replacement = type[nn.Module] | Mapping[str, New] | str | Callable[[ActivationSite], nn.Module]


class GateSpecs(NamedTuple):
    """What the gates of a recurrent layer and its other activations are replaced with."""

    gate: str | type[nn.Module]
    activation: str | type[nn.Module]


Choice = New | GateSpecs  # what replaces a site

# The reasons of Policy.reason_to_stay, and of keep_last, with what lets such a site be replaced.
REMEDIES = {
    "gate": "gates=True",
    "output": "outputs=True",
    "formula": "outputs=True",
    "unknown": "example_inputs=..., or outputs=True",
    "after a residual addition": "after_residual=True",
    "unused": "example_inputs=... that use them",
    "kept": "a smaller keep_last",
    "excluded": "another include or exclude",
    "other function": "a mapping from their names, or another to",
    "recurrent": "a noisy name, gates=True, or a mapping from sigmoid or tanh; of torch's own layers alone",
}

# Selects sites: a name pattern, a module class, a predicate, or several of them.
Rule = str | type[nn.Module] | Callable[[ActivationSite], bool] | Sequence["Rule"]


def check_replacement(to: Replacement) -> None:
    """Raise a TypeError or a ValueError unless activations can be replaced with ``to``."""
    if isinstance(to, Mapping):
        for old, new in to.items():
            registry.check_name(old, registry.PLAIN, what="the name of a plain activation function")
            if isinstance(new, Mapping):
                raise TypeError(f"A mapping's values must be names, classes or callables, got {new!r} for {old!r}.")
            check_replacement(new)
    elif isinstance(to, str):
        registry.check_spec(to)
    elif isinstance(to, nn.Module):
        raise TypeError(
            f"An instance can't be used at every site, got {to!r}. Pass its class, or a function that makes one:"
            " lambda site: ..."
        )
    elif not callable(to):
        raise TypeError(f"to must be a name, a mapping, an nn.Module class or a callable, got {to!r}.")
    elif getattr(to, "__name__", None) in registry.PLAIN and not inspect.isclass(to):
        raise TypeError(f"to is a function of tensors, {to!r}. Pass its name, {to.__name__!r}, instead.")
    elif inspect.isclass(to) and not issubclass(to, nn.Module):
        raise TypeError(f"to must be a name, a mapping, an nn.Module class or a callable, got the class {to!r}.")


@dataclass(frozen=True)
class Policy:
    """The options of :func:`~lightning_noisy.replace_activations`: what is replaced with what.

    Raises:
        TypeError: if activations can't be replaced with ``to``, or an option is of the wrong type.
        ValueError: if a name or an option is unknown.
    """

    to: Replacement
    gates: bool = False
    outputs: bool = False
    after_residual: bool = False
    keep_last: int = 0
    include: Rule | None = None
    exclude: Rule | None = None
    also: Also = ()
    batchnorm_affine: Literal["keep", "strip"] = "keep"
    buffer_batchnorm: bool | str = False
    initialize: Literal["xavier"] | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        check_replacement(self.to)
        for option in ("gates", "outputs", "after_residual", "strict"):
            if not isinstance(getattr(self, option), bool):
                raise TypeError(f"{option} must be True or False, got {getattr(self, option)!r}.")
        if isinstance(self.keep_last, bool) or not isinstance(self.keep_last, int):
            raise TypeError(f"keep_last must be an integer >= 0, got {self.keep_last!r}.")
        if self.keep_last < 0:
            raise ValueError(f"keep_last must be >= 0, got {self.keep_last!r}.")
        for option in ("include", "exclude"):
            _check_rule(option, getattr(self, option))
        check_also(self.also)
        if not isinstance(self.buffer_batchnorm, (bool, str)):
            raise TypeError(
                f"buffer_batchnorm must be True, False or the name of a layer, got {self.buffer_batchnorm!r}."
            )
        if self.initialize not in (None, "xavier"):
            raise ValueError(f'initialize must be "xavier" or None, got {self.initialize!r}.')
        if self.batchnorm_affine not in ("keep", "strip"):
            raise ValueError(f'batchnorm_affine must be "keep" or "strip", got {self.batchnorm_affine!r}.')

    @functools.cached_property
    def call(self) -> str:
        """Fingerprint of all options."""
        return fingerprint([getattr(self, each.name) for each in fields(self)])

    @functools.cached_property
    def of_to(self) -> str:
        """Fingerprint of ``to``."""
        return fingerprint(self.to)

    def chosen(self, model: nn.Module, sites: ActivationSites, later: Collection[str] = ()) -> dict[str, Choice | None]:
        """The replacements of the chosen sites, by site name; None if an equal policy has replaced the site already.

        Sites replaced by a policy whose ``call`` is in ``later`` are skipped.
        """
        chosen: dict[str, Choice | None] = {}
        for site in sites:
            origin = _origin(model, site)
            if origin is not None and origin.call in later:
                continue
            if origin is not None and origin.call == self.call:
                chosen[site.name] = None
            elif (new := self.choose(site)) is not None:
                chosen[site.name] = new
        of_chosen = [site for site in sites if site.name in chosen]
        if self.keep_last and any(site.order is None for site in of_chosen):
            raise ValueError(
                f"keep_last={self.keep_last} needs the order of the calls, which is not known. Pass example_inputs."
            )
        orders = sorted({site.order or 0 for site in of_chosen})  # of a copy it is the original's
        for site in of_chosen if self.keep_last else ():
            if (site.order or 0) in orders[-self.keep_last :]:
                del chosen[site.name]
        return chosen

    def keeps(self, model: nn.Module, site: ActivationSite, new: Choice | None) -> bool:
        """Whether a site keeps its module, trained as it is, since it comes from ``new`` or the same ``to``."""
        origin = _origin(model, site)
        return new is None or (origin is not None and (origin.to == self.of_to or origin.new == fingerprint(new)))

    def choose(self, site: ActivationSite) -> Choice | None:
        """What the site is replaced with, or None if it stays."""
        return self._named(site) if not self.reason_to_stay(site) else None

    def reason_to_stay(self, site: ActivationSite) -> str:
        """Why a site is not replaced, in one or two words; empty if it is."""
        role = site.role
        if role == "recurrent":
            return "" if self._named(site) is not None and not self._excludes(site) else role
        if role == "unused" or (role in ("unknown", "output", "formula") and not self.outputs):
            return role
        if role == "gate" and not (self.gates or isinstance(self.to, Mapping)):
            return role
        if site.after_residual and role not in ("gate", "formula") and not self.after_residual:
            return "after a residual addition"
        if self._excludes(site):
            return "excluded"
        return "" if self._named(site) is not None else "other function"

    def _excludes(self, site: ActivationSite) -> bool:
        included = self.include is None or _matches(site, self.include)
        return not included or (self.exclude is not None and _matches(site, self.exclude))

    def _named(self, site: ActivationSite) -> Choice | None:
        """What the function is replaced with, wherever it is."""
        if site.kind == "recurrent":
            return self._of_gates(site)
        if isinstance(self.to, Mapping):
            return self.to.get(site.function)
        noisy = isinstance(self.to, str) and registry.parse(self.to)[0] in registry.NOISY
        return None if noisy and site.function not in registry.SATURATING else self.to

    def _of_gates(self, site: ActivationSite) -> Choice | None:
        """What the gates of a recurrent layer are replaced with: noisy activations are made for them."""
        if site.module is None or not has_drop_in(site.module):
            return None
        if isinstance(self.to, Mapping):
            has_gates = not isinstance(site.module, (nn.RNN, nn.RNNCell))
            names = ("sigmoid" if has_gates else site.function), site.function
            specs = [self.to.get(name, name) for name in names]
            usable = all(isinstance(each, str) or inspect.isclass(each) for each in specs)
            return GateSpecs(*specs) if usable and any(name in self.to for name in names) else None  # type: ignore[arg-type]
        if isinstance(self.to, str):
            return self.to if self.gates or registry.parse(self.to)[0] in registry.NOISY else None
        return cast(type[nn.Module], self.to) if self.gates and inspect.isclass(self.to) else None

    def unmatched(self, sites: ActivationSites) -> Iterator[str]:
        """A message for each name pattern that matches no site."""
        for option, rule in (("include", self.include), ("exclude", self.exclude)):
            for pattern in _patterns(rule):
                if not any(_matches(site, pattern) for site in sites):
                    yield f"{option}={pattern!r} matches no activation.{_suggestion(pattern, sites)}"


def _check_rule(option: str, rule: Rule | None) -> None:
    if isinstance(rule, Sequence) and not isinstance(rule, str):
        for each in rule:
            _check_rule(option, each)
    elif not (rule is None or isinstance(rule, str) or callable(rule)):
        raise TypeError(
            f"{option} must be a pattern of names, a class of modules, a function from a site to a bool, or a sequence"
            f" of them, got {rule!r}."
        )


def _origin(model: nn.Module, site: ActivationSite) -> Origin | None:
    """The origin of a site's module, or of the innermost module around it that has one."""
    path = site.owner.split(".") if site.owner else []
    around = (model.get_submodule(".".join(path[:depth])) for depth in range(len(path), -1, -1))
    return next((origin for each in (site.module, *around) if (origin := Origin.of(each)) is not None), None)


def _patterns(rule: Rule | None) -> Iterator[str]:
    if isinstance(rule, str):
        yield rule
    elif isinstance(rule, Sequence):
        for each in rule:
            yield from _patterns(each)


def _suggestion(pattern: str, sites: ActivationSites) -> str:
    names = [site.name for site in sites]
    below = [name for name in names if name.startswith((f"{pattern}.", f"{pattern}:"))]
    if below:
        all_children = all(name.startswith(f"{pattern}.") for name in below)
        return f" Those in {pattern!r} are {pattern + ('.*' if all_children else '[.:]*')!r}."
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _matches(site: ActivationSite, rule: Rule) -> bool:
    if isinstance(rule, str):
        return fnmatch.fnmatchcase(site.name, rule)
    if inspect.isclass(rule):
        return isinstance(site.module, rule)
    if callable(rule):
        return bool(rule(site))
    return any(_matches(site, each) for each in rule)
