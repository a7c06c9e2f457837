"""Load checkpoints of models whose activations were replaced."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import IO, Any, TypeVar
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_noisy.callbacks import _checkpoints
from lightning_noisy.replacement.policy import Policy, Replacement
from lightning_noisy.replacement.record import difference, replaced_in, saved_sites
from lightning_noisy.replacement.replace import swap

__all__ = ["load_replaced"]

_Model = TypeVar("_Model", bound=pl.LightningModule)
_OPTIONS = [each.name for each in fields(Policy) if each.name != "to"]


def load_replaced(
    cls: type[_Model],
    checkpoint_path: str | Path | IO[bytes],
    *,
    to: Replacement | None = None,
    options: Mapping[str, Any] | None = None,
    example_inputs: Any = None,
    map_location: Any = None,
    strict: bool | None = None,
    weights_only: bool = True,
    **arguments: Any,
) -> _Model:
    """Load a checkpoint of a model whose activations were replaced from outside, by the callback or by the function.

    Like ``cls.load_from_checkpoint``, but replaces the activations before the weights are loaded. A model that calls
    :func:`~lightning_noisy.replace_activations` in its ``__init__`` needs only ``load_from_checkpoint``.

    Checkpoints record the replacements in the metadata of their state dict; ``to`` and ``options`` aren't needed then.
    What keeps only the values (``dict(model.state_dict())``, safetensors) loses the metadata, and with it c of noisy
    activations, which is then that of ``to``.

    Args:
        cls: class of the model.
        checkpoint_path: what a Trainer has written, also with ``save_weights_only=True``: path, URL or open file.
        to: what the activations were replaced with; only needed if that was a class or a function of your own, or if
            the checkpoint doesn't record it.
        options: with ``to``, the options that were passed to :func:`~lightning_noisy.replace_activations`, such as
            ``{"gates": True}``; by default the sites are those of the checkpoint.
        example_inputs: as passed to the callback or the function, if they were.
        map_location: see ``torch.load``.
        strict: whether the weights must fit exactly; by default the model's ``strict_loading``.
        weights_only: see ``torch.load``.
        arguments: arguments of the model, which override its hyperparameters in the checkpoint.

    Returns:
        The model, in training mode like that of ``load_from_checkpoint``.

    Raises:
        TypeError: if an argument or an option is unknown.
        ValueError: if the checkpoint doesn't record what was replaced, this model has other activations, or the weights
            don't fit.
    """
    _check_arguments(cls, arguments, options)
    if options is not None and to is None:
        raise ValueError(f"options say how activations were replaced by to=, which is missing; got {dict(options)!r}.")
    checkpoint = _read(checkpoint_path, weights_only)
    saved = _checkpoints.replacements_of(checkpoint)
    if to is None and saved is None:
        raise ValueError(
            f"{checkpoint_path} records no replaced activations. Use {cls.__name__}.load_from_checkpoint; or"
            " pass what its model's activations were replaced with as to=."
        )
    saved = saved or {}
    steps = [("", Policy(to, **(options or {})))] if to and (options or not saved) else _steps(saved, to)

    def prepare(model: pl.LightningModule) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="replace_activations.* replaced nothing")  # an error, below
            if saved:  # it was so when the activations were replaced, with a warning
                warnings.filterwarnings("ignore", message="replace_activations.* left what is unresolved")
            for path, policy in steps:
                swap(model.get_submodule(path), policy, example_inputs, quiet=True)
        there, present = saved_sites(saved), replaced_in(model)
        if absent := sorted({*there} - {*present}):
            raise ValueError(
                f"{cls.__name__} has no activations {', '.join(absent)}, which were replaced. Pass the same"
                " model arguments and example_inputs as when they were replaced."
            )
        is_strict = model.strict_loading if strict is None else strict
        if saved and is_strict and (text := difference(model, there)):
            raise ValueError(text)

    # Lightning 2.5.0 doesn't know weights_only, and would pass it to the model.
    known = inspect.signature(cls.load_from_checkpoint).parameters
    safe: dict[str, Any] = {"weights_only": weights_only} if "weights_only" in known else {}
    try:
        with _before_its_state(cls, prepare):
            model = cls.load_from_checkpoint(
                checkpoint_path, map_location=map_location, strict=strict, **safe, **arguments
            )
    except _UnfitError as unfit:
        raise ValueError(
            f"The weights don't fit {cls.__name__} with its activations replaced by {_said(to, steps)}. Pass to=,"
            f" options=, example_inputs= and the model's arguments as they were when it was trained. {unfit}"
        ) from unfit.__cause__
    _checkpoints.set_noise(model, checkpoint)
    return model


class _UnfitError(Exception):
    """The state dict doesn't fit the model."""


@contextmanager
def _before_its_state(cls: type[pl.LightningModule], prepare: Callable[[Any], None]) -> Iterator[None]:
    """Prepare a model of ``cls`` between its construction and its ``load_state_dict``.

    For ``load_from_checkpoint``, which does both. It patches the class, since the instance doesn't exist yet, and may
    be one of a subclass.
    """
    original = cls.load_state_dict
    prepared: list[Any] = []

    @functools.wraps(original)
    def load_state_dict(self: pl.LightningModule, *arguments: Any, **options: Any) -> Any:
        if prepared or _is_within_a_model():
            return original(self, *arguments, **options)
        prepared.append(self)
        prepare(self)
        try:
            return self.load_state_dict(*arguments, **options)
        except RuntimeError as error:
            raise _UnfitError(str(error)) from error

    with patch.object(cls, "load_state_dict", load_state_dict):
        yield


def _is_within_a_model() -> bool:
    """Whether a model's own code is the caller, such as one that loads its teacher while it is made."""
    frame: Any = inspect.currentframe()
    frame = frame.f_back.f_back  # the caller of load_state_dict
    while frame is not None and frame.f_code is not load_replaced.__code__:
        is_models = frame.f_code.co_name in ("__init__", "configure_model", "on_load_checkpoint")
        if is_models and isinstance(next(iter(frame.f_locals.values()), None), torch.nn.Module):
            return True
        frame = frame.f_back
    return False


def _read(path: str | Path | IO[bytes], weights_only: bool) -> dict[str, Any]:
    """A checkpoint without the values of its tensors."""
    if isinstance(path, (str, Path)):
        with get_filesystem(path).open(str(path), "rb") as file:
            return torch.load(file, map_location="meta", weights_only=weights_only)  # type: ignore[no-any-return]
    checkpoint: dict[str, Any] = torch.load(path, map_location="meta", weights_only=weights_only)
    path.seek(0)
    return checkpoint


def _check_arguments(cls: type[pl.LightningModule], arguments: Mapping[str, Any], options: Any) -> None:
    """Raise for unknown names: Lightning ignores what a model doesn't take."""
    for name in options or ():
        if name not in _OPTIONS:
            raise TypeError(f"replace_activations has no option {name!r}; options may have {', '.join(_OPTIONS)}.")
    taken = inspect.signature(cls.__init__).parameters
    if any(each.kind is each.VAR_KEYWORD for each in taken.values()):
        return
    for name in arguments:
        if name not in taken and name != "hparams_file":
            hint = f" Pass it as options={{{name!r}: ...}}." if name in _OPTIONS else ""
            raise TypeError(f"{cls.__name__} takes no argument {name!r}.{hint}")


def _steps(saved: Mapping[str, Any], to: Replacement | None) -> list[tuple[str, Policy]]:
    """The replacements of a checkpoint in order, each with the path of its module."""
    calls = [(path, call) for path, what in saved.items() for call in what.get("history", [])]
    calls.sort(key=lambda each: each[1].get("time", 0))
    unknown = [call for _, call in calls if call["to"] is None]
    wanted = unknown if len(calls) > 1 else [call for _, call in calls]
    if unknown and to is None:
        raise ValueError("The activations were replaced with a class or a function of your own: pass it as to=.")
    if to is not None and len(wanted) != 1:
        raise ValueError(
            f"to={to!r} is one replacement, and the checkpoint has {len(calls)}, {len(unknown)} of them with classes"
            " or functions of your own. Replace the activations in the model's __init__, and use load_from_checkpoint."
        )
    everything: dict[str, Any] = {"gates": True, "outputs": True, "after_residual": True}
    steps = []
    for path, call in calls:
        names = frozenset(call["sites"])
        what = to if to is not None and call is wanted[0] else call["to"]
        include = lambda site, names=names: site.name in names  # noqa: E731
        steps.append((path, Policy(what, **everything, **call["options"], include=include)))
    return steps


def _said(to: Replacement | None, steps: list[tuple[str, Policy]]) -> str:
    return repr(to) if to is not None else ", ".join(repr(policy.to) for _, policy in steps) or "nothing"
