"""Replace the activations of a model."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lightning_noisy._torch_internals import HOOKS, LOAD_HOOKS, uncompiled
from lightning_noisy.nn import registry
from lightning_noisy.nn.noisy import NoisyActivation
from lightning_noisy.nn.normalized import NormalizedActivation
from lightning_noisy.nn.recurrent_cells import with_gates
from lightning_noisy.replacement.batch_norm import buffer, strip
from lightning_noisy.replacement.install import place
from lightning_noisy.replacement.late_swap import watch
from lightning_noisy.replacement.origin import Origin, fingerprint, written
from lightning_noisy.replacement.policy import Choice, GateSpecs, Policy, Replacement, Rule
from lightning_noisy.replacement.recognition import Also
from lightning_noisy.replacement.record import Record
from lightning_noisy.replacement.report import joined, say, summary, warn_unchanged
from lightning_noisy.replacement.sites import ActivationSite, ActivationSites, activation_sites
from lightning_noisy.replacement.snapshot import Snapshot

__all__ = ["replace_activations", "restore_activations", "swap"]


def replace_activations(
    model: nn.Module,
    to: Replacement,
    *,
    example_inputs: Any = None,
    gates: bool = False,
    outputs: bool = False,
    after_residual: bool = False,
    keep_last: int = 0,
    include: Rule | None = None,
    exclude: Rule | None = None,
    also: Also = (),
    batchnorm_affine: Literal["keep", "strip"] = "keep",
    buffer_batchnorm: bool | str = False,
    initialize: Literal["xavier"] | None = None,
    strict: bool = False,
) -> nn.Module:
    """Replace each activation of a model with a module of its own, in place.

    All call sites of :func:`~lightning_noisy.activation_sites` count: modules, further calls of the same module,
    functions, methods, functions held as attributes, modules made in forward. The replacement of a module or an
    attribute is registered under its name. Calls in code go to a child ``activation_calls`` of the module that contains
    the code, which gets a subclass with a rewritten forward. Each replacement takes over the training flag, device,
    hooks and in-place behavior; its new parameters have the dtype of neighboring parameters, and require gradients if
    those do. Either all sites are changed or, after an error, none. :func:`restore_activations` undoes it. Repeating
    the same replacement changes nothing; functions and objects are compared by content.

    Best called at the end of the model's ``__init__``: its optimizer then has the new parameters, and its checkpoints
    load as usual. Those of a model that was changed from outside load with :func:`lightning_noisy.load_replaced`. The
    metadata of a ``state_dict`` records the replacements; loading it into a model with different ones is an error,
    unless ``strict=False``.

    Which sites are replaced is decided by their :attr:`ActivationSite.role`: hidden activations are; gates only with
    ``gates=True`` or if a mapping names their function; outputs, parts of a loss or of a formula, and those of unknown
    role only with ``outputs=True``. Unused ones are skipped. Noisy names skip functions that don't saturate. A
    recurrent layer of torch becomes a :class:`~lightning_noisy.nn.NoisyLSTM` or its like, with the same parameters, by
    a noisy name (those are made for gates), by a mapping that names the sigmoid or tanh, or with ``gates=True``. One
    line, by ``logging``, says how many were replaced, and why the others were not.

    Args:
        model: the model, not yet scripted, sharded or wrapped for data parallelism. If it is compiled, the module
            inside is changed, and recompiled. Make its optimizer afterwards: there are new parameters.
        to: a name of :func:`lightning_noisy.nn.registry.names`, such as ``"nsw"``; a module class, called without
            arguments; a function from an :class:`ActivationSite` to a module; or a mapping from plain functions' names
            to any of these, such as ``{"relu": "nrelu", "tanh": "nsw"}``.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments: forward passes of a
            copy then show the data flow. Without them, symbolic tracing shows it where it can.
        gates: replace gates, too.
        outputs: replace outputs, parts of formulas, and those whose role is unknown, too.
        after_residual: replace those directly after the addition of two branches, too. (ANAct's authors skip them.)
        keep_last: how many of the chosen sites to skip, those called last; >= 0. (3 in the authors' VGG-19.)
        include: only these: a name pattern such as ``"layer1.*"``, a class of the modules to be replaced, a function
            from a site to a bool, or a sequence of them, of which one must match.
        exclude: not these.
        also: classes of your own that are activations, such as ``(MyGELU,)``; or a mapping to the plain names of their
            functions, such as ``{MyGELU: "gelu"}``.
        batchnorm_affine: ``"strip"`` takes weight and bias from each batch norm right before a replaced site.
            Untrained ones, 1 and 0, change nothing; otherwise a warning names what is lost.
        buffer_batchnorm: put a batch norm without weights before the last linear layer, or the one of that name: a
            child ``buffer`` of it, applied to its input.
        initialize: ``"xavier"`` draws the weights anew of the linear layers and convolutions whose outputs go straight
            into the replaced activations, by Xavier's normal initialization, and sets their biases to 0, as ANAct's
            authors do (section 3.1): with He's, each normalized layer doubles the variance. For untrained models.
        strict: raise an error if something is unresolved, in place of the warning.

    Returns:
        ``model``, or the replacement if the model itself is an activation module.

    Raises:
        TypeError: if ``model`` is not a module, activations can't be replaced with ``to``, or an option is of the wrong
            type.
        ValueError: if a name or an option is unknown, the model can no longer be changed, ``keep_last`` is given but
            the order of the calls is unknown, or ``strict=True`` and something is unresolved.

    Warns:
        UserWarning: if nothing was replaced, something could not be resolved, or a pattern matches no activation;
            at an optimizer's first step, if it was made before the replacement and misses the new parameters.

    >>> replace_activations(nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1)), "nrelu")
    Sequential(
      (0): Linear(in_features=4, out_features=2, bias=True)
      (1): NReLU(relu, momentum=0.1, bounds=(0.2, 5.0), max_rejections=10)
      (2): Linear(in_features=2, out_features=1, bias=True)
    )
    """
    policy = Policy(
        to=to, gates=gates, outputs=outputs, after_residual=after_residual, keep_last=keep_last, include=include,
        exclude=exclude, also=also, batchnorm_affine=batchnorm_affine, buffer_batchnorm=buffer_batchnorm,
        initialize=initialize, strict=strict,
    )  # fmt: skip
    return swap(model, policy, example_inputs).model


@dataclass(frozen=True)
class Swapped:
    """What a replacement has done.

    Attributes:
        model: the model, or what has its place if it is an activation itself.
        modules: the modules that are now at the chosen sites.
        pairs: of each new one, with the activation that it has replaced.
    """

    model: nn.Module
    modules: list[nn.Module]
    pairs: list[tuple[nn.Module, nn.Module]]


def swap(
    model: nn.Module,
    policy: Policy,
    example_inputs: Any = None,
    *,
    later: Collection[str] = (),
    quiet: bool = False,
) -> Swapped:
    """Implement :func:`replace_activations`; ``quiet``: without the line that says what was done.

    ``later`` has the ``Policy.call`` of replacements that come afterwards: what they have installed stays.
    """
    _check_replaceable(model)
    news = policy.call, policy.of_to  # before `to` is called, which may change it
    inside = uncompiled(model)
    sites = activation_sites(inside, example_inputs, also=policy.also)
    for reason in policy.unmatched(sites):
        warnings.warn(f"replace_activations({type(inside).__name__}, {policy.to!r}): {reason}", stacklevel=3)
    unresolved = [*sites.unresolved, *(f"{site.name}: its role is unknown" for site in sites if site.role == "unknown")]
    if policy.strict and unresolved:
        raise ValueError(f"strict=True needs all activations to be resolved. These are not: {'; '.join(unresolved)}.")
    chosen = policy.chosen(inside, sites, later)
    prints = {name: fingerprint(new) for name, new in chosen.items() if new is not None}
    if not chosen:
        warn_unchanged(inside, sites, policy)
        return Swapped(model, [], [])
    # A module that stays at another site keeps its hooks.
    staying = (site.module for site in sites if site.name not in chosen)
    first_replacements = {module: module for module in staying if module is not None}
    there: dict[str, nn.Module] = {}
    for site in sites:
        if site.name in chosen:
            assert site.module is not None
            new = chosen[site.name]
            there[site.name] = (
                site.module
                if new is None or policy.keeps(inside, site, new)
                else _make(site, new, inside, first_replacements)
            )
    if "" in there:
        return Swapped(there[""], [there[""]], [])
    registered = set(inside.modules())  # a call that is replaced by itself becomes a module
    made = {
        site.name: there[site.name]
        for site in sites
        if site.name in there and (there[site.name] is not site.module or site.module not in registered)
    }
    if made:
        before = set(inside.parameters())
        _put(inside, sites, made, policy)
        watch(inside, before)
        if policy.initialize:
            _initialize(inside, [site for site in sites if site.name in made])
    for site in sites:
        if (new := chosen.get(site.name)) is not None and (site.name in made or Origin.of(site.module) is not None):
            folded = (origin := Origin.of(site.module)) is not None and origin.folded
            options = registry.options_of(new)
            origin = Origin(*news, prints[site.name], site.name, written(new), options, site.function, folded)
            origin.leave(there[site.name])
    if made and sites.unresolved:
        warnings.warn(
            f"replace_activations({type(inside).__name__}, {policy.to!r}) left what is unresolved: {joined(sites)}.",
            UserWarning,
            stacklevel=3,
        )
    if made and not quiet:
        say(summary(policy, sites, set(there)))
    pairs = [(made[site.name], site.module) for site in sites if site.name in made and site.module is not None]
    return Swapped(model, list(there.values()), [(new, old) for new, old in pairs if new is not old])


@torch.no_grad()
def _initialize(model: nn.Module, sites: list[ActivationSite]) -> None:
    """Draw the weights of the layers before these sites by Xavier's initialization."""
    names = list(dict.fromkeys(name for site in sites for name in site.seen.feeders))
    for name in names:
        layer = model.get_submodule(name)
        nn.init.xavier_normal_(layer.weight)  # type: ignore[arg-type]
        if isinstance(layer.bias, nn.Parameter):
            nn.init.zeros_(layer.bias)
    say(f'initialize="xavier": {", ".join(names) or "no layer goes straight into a replaced activation"}')


def _put(model: nn.Module, sites: ActivationSites, made: dict[str, nn.Module], policy: Policy) -> None:
    """Install the modules, all or none."""
    snapshot = Snapshot(model)
    record = Record.of(model)
    try:
        place(model, sites, made, record)
        if policy.batchnorm_affine == "strip":
            strip(model, [site for site in sites if site.name in made], record)
        if policy.buffer_batchnorm:
            buffer(model, policy.buffer_batchnorm, record)
        record.add(made, policy)
        record.keep(model)
    except BaseException:
        record.remove_new_hooks()
        snapshot.restore()
        raise


def restore_activations(model: nn.Module) -> nn.Module:
    """Undo :func:`replace_activations`: the model gets back the activations from before the first replacement.

    Args:
        model: the model, changed in place. What other layers have learned stays. Batch norms that were stripped get
            back the weights that they had.

    Returns:
        ``model``.

    Raises:
        ValueError: if nothing was replaced in it, its normalization was folded, or its class was extended since.

    >>> model = replace_activations(nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1)), "nrelu")
    >>> restore_activations(model)[1]
    ReLU()
    """
    inside = uncompiled(model)
    Record.of(inside, existing=True).undo(inside)
    return model


def _check_replaceable(model: object) -> None:
    """Raise if the model's kind or state doesn't allow new modules."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("A scripted model can't be changed. Replace the activations before torch.jit.script.")
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        raise ValueError(
            f"{type(model).__name__} doesn't notice new parameters. Replace the activations of the module that it"
            " wraps, before wrapping it."
        )
    if isinstance(model, nn.Module) and any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            "The model is sharded already. Replace the activations before fully_shard or parallelize_module."
        )


def _make(
    site: ActivationSite, new: Choice, model: nn.Module, first_replacements: dict[nn.Module, nn.Module]
) -> nn.Module:
    """The new module for a site, or the present one if it is the same already.

    ``first_replacements`` has the first replacement of each instance: it takes over the hooks, the others get copies.
    """
    assert site.module is not None
    old = site.module
    # From the owner outward: the parameters closest to the site.
    path = site.owner.split(".") if site.owner else []
    around = (model.get_submodule(".".join(path[:depth])) for depth in range(len(path), -1, -1))
    neighbours = next((found for module in around if (found := list(module.parameters()))), [])
    module = _instantiate(site, new)
    if site.kind == "recurrent":  # whose parameters it shares
        neighbours = []
    inplace = bool(getattr(old, "inplace", False))
    if inplace and not hasattr(module, "inplace"):
        raise ValueError(
            f"{site.name!r} works in place ({old!r}), {type(module).__name__} does not, and other readers of its"
            " input would see different values. Build the model with inplace=False."
        )
    if module is not old and hasattr(module, "inplace"):
        module.inplace = inplace  # type: ignore[assignment]
    # Only a name or a class determines a module; two callables may differ in what no repr shows.
    named = isinstance(new, (str, GateSpecs)) or inspect.isclass(new)
    if module is old or (named and _is_alike(module, old)):
        return old
    if neighbours:
        module.to(neighbours[0].device)
        if neighbours[0].is_floating_point():
            for parameter in module.parameters():
                parameter.data = parameter.data.to(neighbours[0].dtype)
        if not any(parameter.requires_grad for parameter in neighbours):
            module.requires_grad_(False)
    module.train(model.get_submodule(site.owner).training if site.call is not None else old.training)
    if all(inner is not old for inner in module.modules()):  # else it is still called, with its hooks
        for name in HOOKS:
            if getattr(module, name) or old in first_replacements:
                getattr(module, name).update(getattr(old, name))
            else:  # the same dictionary: handles that users hold can still remove their hooks
                setattr(module, name, getattr(old, name))
        module._is_full_backward_hook = old._is_full_backward_hook
    first_replacements.setdefault(old, module)
    return module


def _is_alike(module: nn.Module, old: nn.Module) -> bool:
    """Whether two modules have the same class and options; for noisy ones the initial c counts."""
    if isinstance(module, NoisyActivation) and isinstance(old, NoisyActivation):
        if module._first_c != old._first_c:
            return False
        old = copy.copy(old)
        old.__dict__["_buffers"] = {**old._buffers, "c": module.c}
    return type(module) is type(old) and repr(module) == repr(old)


def _instantiate(site: ActivationSite, new: Choice) -> nn.Module:
    assert site.module is not None
    if site.kind == "recurrent":
        gate, activation = new if isinstance(new, GateSpecs) else (new, new)
        return with_gates(site.module, cast(Any, gate), cast(Any, activation))
    name, options = registry.parse(new) if isinstance(new, str) else ("", {})
    if name == "normalized":
        # The function with the site's own options and parameters. A shallow copy: its ``inplace`` is reset below.
        function = site.module.function if isinstance(site.module, NormalizedActivation) else copy.copy(site.module)
        if isinstance(function, nn.Module):
            if hasattr(function, "inplace"):
                function.inplace = False  # type: ignore[assignment]
            for hooks in (*HOOKS, LOAD_HOOKS):  # they belong to the new module
                setattr(function, hooks, type(getattr(function, hooks))())
        return registry.create(name, function=function, **options)
    if isinstance(new, str):
        of: Any = site.function
        limits = (site.module.min_val, site.module.max_val) if type(site.module) is nn.Hardtanh else (-1, 1)
        if name in registry.NOISY and limits != (-1, 1):  # which are those of the name
            of = nn.Hardtanh(*limits), nn.Identity()
        return registry.create(name, function=of, **options)
    if inspect.isclass(new):
        try:
            return cast(nn.Module, new())
        except TypeError as error:
            raise TypeError(
                f"{new.__name__} can't be made without arguments ({error}). Pass a function that gives them:"
                f" lambda site: {new.__name__}(...)"
            ) from error
    hint = f"It is called with the site: write lambda site: ... instead of {new!r}."
    try:
        made = cast(Any, new)(site)
    except TypeError as error:
        raise TypeError(f"The replacement of {site.name!r} could not be made: {error}. {hint}") from error
    if not isinstance(made, nn.Module):
        raise TypeError(f"The replacement of {site.name!r} must be an nn.Module, got {made!r}.")
    if taken := [name for name, value in vars(made).items() if value is site]:
        raise TypeError(f"{type(made).__name__} has taken the site for its argument {taken[0]!r}. {hint}")
    return made
