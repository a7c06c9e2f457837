"""The callback that swaps a model's activations, and loading what it has swapped."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_noisy.callbacks._logging import log_scalars, logging_step
from lightning_noisy.engine.place import MARKER, replaced_sites
from lightning_noisy.engine.replace import Replacement, check_replacement, replace_activations
from lightning_noisy.engine.sites import ActivationSite
from lightning_noisy.engine.statistics import synchronize_statistics, synchronized_activations
from lightning_noisy.nn.noisy import NoisyActivation
from lightning_noisy.schedules import HorizonSchedule, Schedule

__all__ = ["ActivationReplacement", "load_replaced"]


class ActivationReplacement(pl.Callback):
    """Replace the activations of the model when a Trainer sets it up, before its optimizers are made.

    The callback form of :func:`lightning_noisy.replace_activations`, for models that you configure and don't
    write. Layers that are made in ``configure_model`` are replaced, too. List it before callbacks that copy or freeze
    the model. A model that has been swapped keeps its modules:
    ``fit``, ``test`` and ``fit`` again swap once. Statistics of normalized activations with ``synchronized=True`` are
    pooled over the ranks after each step.

    A checkpoint of such a model has the new modules' values. To resume, or to test, pass ``ckpt_path`` to a
    Trainer with this callback; without a Trainer, :func:`lightning_noisy.load_replaced` loads it.

    Logs ``activation_noise/c``, at the Trainer's logging steps, if there is ``noise``.

    Args:
        to: what to replace them with; see :func:`lightning_noisy.replace_activations`, also for the options that are
            not named here.
        noise: c of all noisy activations as a function of the optimizer's step or the epoch, such as
            ``schedules.Linear(30.0, end=0.5)``; ``steps="auto"`` becomes the length of the training. None: c stays.
        interval: ``"step"`` or ``"epoch"``.
        example_inputs: see :func:`lightning_noisy.replace_activations`; by default the model's ``example_input_array``.

    Raises:
        TypeError: if ``to`` is nothing to replace activations with, or ``noise`` is not callable.
        ValueError: if a name is unknown; suggests the closest ones.

    >>> trainer = pl.Trainer(callbacks=[ActivationReplacement("nsw")], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        to: Replacement,
        *,
        noise: Schedule | None = None,
        interval: Literal["step", "epoch"] = "step",
        example_inputs: Any = None,
        gates: bool = False,
        outputs: bool = False,
        after_residual: bool = False,
        keep_last: int = 0,
        include: str | list[str] | Callable[[ActivationSite], bool] | None = None,
        exclude: str | list[str] | Callable[[ActivationSite], bool] | None = None,
        batchnorm_affine: Literal["keep", "strip"] = "keep",
        buffer_batchnorm: bool | str = False,
    ) -> None:
        check_replacement(to)
        if noise is not None and not callable(noise):
            raise TypeError(f"noise must be a schedule, a function from a step to c, got {noise!r}. Use Constant(c).")
        if interval not in ("step", "epoch"):
            raise ValueError(f'interval must be "step" or "epoch", got {interval!r}.')
        self.to = to
        self.noise = noise
        self.interval = interval
        self.options = {
            "example_inputs": example_inputs,
            "gates": gates,
            "outputs": outputs,
            "after_residual": after_residual,
            "keep_last": keep_last,
            "include": include,
            "exclude": exclude,
            "batchnorm_affine": batchnorm_affine,
            "buffer_batchnorm": buffer_batchnorm,
        }
        self._replaced: weakref.ref[pl.LightningModule] | None = None
        self._schedule: Schedule | None = None
        self._noisy: list[NoisyActivation] = []
        self._c: float | None = None
        self._steps = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Swap, or see to it that ``configure_model`` does, unless this model is swapped already."""
        if self._replaced is not None and self._replaced() is pl_module:
            return
        if getattr(pl_module, "_compiler_ctx", None) is not None:
            raise MisconfigurationException(
                "The model is compiled already. Call replace_activations(model, ...) before torch.compile(model), and"
                " leave out ActivationReplacement."
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
            if callback is self:
                break
            if getattr(callback, "_average_model", None) is not None:
                raise MisconfigurationException(
                    f"{type(callback).__name__} has copied the model before its activations are replaced. Put"
                    " ActivationReplacement before it in the list of callbacks."
                )
        if is_overridden("configure_model", pl_module):
            self._follow_configure_model(pl_module)
        else:
            self._replace(pl_module)

    def _follow_configure_model(self, pl_module: pl.LightningModule) -> None:
        """Swap right after the model's own ``configure_model``, which comes after ``setup``."""

        @functools.wraps(pl_module.configure_model)
        def configure_model() -> None:
            pl_module.__dict__.pop("configure_model", None)
            pl_module.configure_model()
            self._replace(pl_module)

        pl_module.__dict__["configure_model"] = configure_model

    def _replace(self, pl_module: pl.LightningModule) -> None:
        replace_activations(pl_module, self.to, **self.options)
        self._replaced = weakref.ref(pl_module)
        if self.noise is not None and not _noisy(pl_module):
            raise MisconfigurationException(
                f"noise={self.noise!r} anneals c of noisy activations, and the model has none after the replacement by"
                f' {self.to!r}. Take one of "nan", "nah", "nani", "nanil" and "nanis", or leave noise out.'
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out how long the training is."""
        self._schedule, self._noisy = self.noise, _noisy(pl_module)
        if isinstance(self.noise, HorizonSchedule) and self.noise.is_open:
            total = trainer.estimated_stepping_batches if self.interval == "step" else trainer.max_epochs
            if total is None or not 0 < total < float("inf"):
                raise MisconfigurationException(
                    f"{self.noise} needs to know how long the training is. Give it a number of steps, or set max_steps"
                    " or max_epochs of the Trainer."
                )
            self._schedule = self.noise.resolved(int(total))

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Set c for this step."""
        self._steps = trainer.global_step
        if self._schedule is not None:
            c = float(self._schedule(trainer.global_step if self.interval == "step" else trainer.current_epoch))
            if c != self._c or any(module.c.item() != c for module in self._noisy[:1]):
                for module in self._noisy:
                    module.c.fill_(c)
            self._c = c

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Pool the statistics of activations with ``synchronized=True`` after an optimizer step, and log c."""
        if trainer.global_step > self._steps and synchronized_activations(pl_module):
            synchronize_statistics(pl_module)
        step = logging_step(trainer)
        if self._schedule is not None and self._c is not None and step is not None:
            log_scalars(trainer, {"activation_noise/c": self._c}, step)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave ``configure_model`` as it was, if it was never called."""
        pl_module.__dict__.pop("configure_model", None)
        self._noisy = []

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Mark the weights, so that loading them the plain way fails with the name of what loads them."""
        checkpoint["state_dict"][MARKER] = torch.tensor(float("nan") if self._c is None else self._c)

    def state_dict(self) -> dict[str, Any]:
        """What was replaced with what: plain data."""
        model = self._replaced() if self._replaced is not None else None
        options = {key: self.options[key] for key in ("batchnorm_affine", "buffer_batchnorm")}
        sites = [] if model is None else replaced_sites(model)
        return {"to": _plain(self.to), "sites": sites, "options": options, "c": self._c}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_replaced": None, "_noisy": []}


_Model = TypeVar("_Model", bound=pl.LightningModule)


def load_replaced(
    cls: type[_Model],
    checkpoint_path: str | Path,
    *,
    to: Replacement | None = None,
    example_inputs: Any = None,
    map_location: Any = None,
    weights_only: bool = True,
    **arguments: Any,
) -> _Model:
    """Load a checkpoint of a model whose activations :class:`ActivationReplacement` has replaced.

    As ``cls.load_from_checkpoint``, with the replacement in between. c of noisy activations is that of the checkpoint.

    Args:
        cls: class of the model.
        checkpoint_path: what a Trainer has written.
        to: what the activations were replaced with; only needed if that was a class or a function of your own.
        example_inputs: as they were given to the callback, if they were.
        map_location: see ``torch.load``.
        weights_only: see ``torch.load``.
        arguments: of the model, in place of its hyperparameters in the checkpoint.

    Returns:
        The model, in training mode as ``load_from_checkpoint`` has it.

    Raises:
        ValueError: if the checkpoint doesn't say what was replaced, or this model has other activations.
    """
    checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=weights_only)
    states = [
        state
        for key, state in checkpoint.get("callbacks", {}).items()
        if str(key).startswith(ActivationReplacement.__qualname__)
    ]
    if not states:
        raise ValueError(
            f"{checkpoint_path} was written without ActivationReplacement. Use {cls.__name__}.load_from_checkpoint."
        )
    state = states[0]
    to = to if to is not None else state["to"]
    if to is None:
        raise ValueError("The activations were replaced with a class or a function of your own: pass it as to=.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found keys that are")  # those of the activations
        warnings.filterwarnings("ignore", message=".*keys that are not in the model state dict.*")
        model = cls.load_from_checkpoint(
            checkpoint_path, map_location=map_location, strict=False, weights_only=weights_only, **arguments
        )
    names = set(state["sites"])
    everything: dict[str, Any] = {"gates": True, "outputs": True, "after_residual": True}
    options = {**everything, **state["options"], "include": lambda site: site.name in names}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="replace_activations.* replaced nothing")  # an error, below
        replace_activations(model, to, example_inputs=example_inputs, **options)
    if missing := sorted(names - set(replaced_sites(model))):
        raise ValueError(
            f"{cls.__name__} has no activations {', '.join(missing)}, which were replaced. Pass the arguments, and the"
            " example_inputs, that the model and the callback had."
        )
    model.load_state_dict(checkpoint["state_dict"])
    return model


def _noisy(model: torch.nn.Module) -> list[NoisyActivation]:
    return [module for module in model.modules() if isinstance(module, NoisyActivation)]


def _plain(to: Replacement) -> Any:
    """A name, or a mapping of names; None for anything else."""
    if isinstance(to, Mapping):
        return dict(to) if all(isinstance(new, str) for new in to.values()) else None
    return to if isinstance(to, str) else None
