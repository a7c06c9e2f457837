"""The callback that replaces a model's activations."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_noisy.callbacks import _checkpoints
from lightning_noisy.callbacks._horizon import resolved
from lightning_noisy.callbacks._lightning_internals import copies_model, has_copied_model, is_compiled, logging_step
from lightning_noisy.callbacks._logging import log_scalars
from lightning_noisy.nn import registry
from lightning_noisy.nn.noisy import NoisyActivation
from lightning_noisy.nn.normalized import NormalizedActivation
from lightning_noisy.nn.synchronize import synchronize_statistics, synchronized_activations
from lightning_noisy.replacement.blend import blended, set_blend, start_blend
from lightning_noisy.replacement.origin import Origin
from lightning_noisy.replacement.policy import Policy, Replacement
from lightning_noisy.replacement.replace import swap
from lightning_noisy.replacement.sites import ActivationSite
from lightning_noisy.schedules import Schedule

__all__ = ["ActivationReplacement"]


class ActivationReplacement(pl.Callback):
    """Replace the activations of the model when a Trainer sets it up, before its optimizers are made.

    The callback form of :func:`lightning_noisy.replace_activations`, for models that you configure but don't
    write. Layers that are made in ``configure_model`` are replaced, too. List it before callbacks that copy or freeze
    the model. A model whose activations were replaced keeps the new modules, and what they have learned: ``fit``,
    ``test`` and another ``fit`` replace once, also with a new callback in a new Trainer. Statistics of normalized
    activations with ``synchronized=True`` are pooled over the ranks after each optimizer step.

    A checkpoint of such a model has the state of the new modules, and records the replacements. To resume or test, pass
    ``ckpt_path`` to a Trainer with this callback; a ``to`` that differs from the checkpoint's is an error, unless the
    model's ``strict_loading`` is False. Without a Trainer, :func:`lightning_noisy.load_replaced` loads it.

    Several instances in one Trainer replace one after the other. If several have ``noise``, each anneals c of its own
    replacements; a single one anneals all noisy activations of the model.

    Logs ``activation_noise/c`` and ``activation_blend/b`` at the Trainer's logging steps, if there is ``noise`` or
    ``blend``; if several instances have it,
    ``activation_noise/c/noise0``, ``/noise1`` and so on, in the order of the callbacks.

    Args:
        to: what to replace them with; see :func:`lightning_noisy.replace_activations`, also for the options that are
            not described here.
        noise: c of the noisy activations as a function of the optimizer step (in manual optimization, of the batch)
            or the epoch, such as ``schedules.Linear(30.0, end=0.5)``; ``steps="auto"`` becomes the length of the
            training. None leaves c as it is.
        blend: b in [0, 1] as a function of the same, such as ``schedules.Linear(0.0, end=1.0, steps=1000)``: the output
            is (1 - b) times that of the old activation plus b times that of the new one, so that a trained model isn't
            thrown off at once. From b = 1 on the old one is gone.
        interval: ``"step"`` or ``"epoch"``.
        example_inputs: see :func:`lightning_noisy.replace_activations`; by default the model's ``example_input_array``.

    Raises:
        TypeError: if activations can't be replaced with ``to``, or ``noise`` is not callable.
        ValueError: if a name or an option in it is unknown (the message suggests the closest ones), or a name has the
            option ``c`` although ``noise`` sets c.

    >>> trainer = pl.Trainer(callbacks=[ActivationReplacement("nsw")], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        to: Replacement,
        *,
        noise: Schedule | None = None,
        blend: Schedule | None = None,
        interval: Literal["step", "epoch"] = "step",
        example_inputs: Any = None,
        gates: bool = False,
        outputs: bool = False,
        after_residual: bool = False,
        keep_last: int = 0,
        include: str | list[str] | Callable[[ActivationSite], bool] | None = None,
        exclude: str | list[str] | Callable[[ActivationSite], bool] | None = None,
        also: Mapping[type[torch.nn.Module], str] | list[type[torch.nn.Module]] | None = None,
        batchnorm_affine: Literal["keep", "strip"] = "keep",
        buffer_batchnorm: bool | str = False,
        initialize: Literal["xavier"] | None = None,
        strict: bool = False,
    ) -> None:
        if noise is not None and not callable(noise):
            raise TypeError(f"noise must be a schedule, a function from a step to c, got {noise!r}. Use Constant(c).")
        if blend is not None and not callable(blend):
            raise TypeError(f"blend must be a schedule, a function from a step to b, got {blend!r}.")
        if interval not in ("step", "epoch"):
            raise ValueError(f'interval must be "step" or "epoch", got {interval!r}.')
        self.policy = Policy(
            to=to, gates=gates, outputs=outputs, after_residual=after_residual, keep_last=keep_last, include=include,
            exclude=exclude, also=also or (), batchnorm_affine=batchnorm_affine, buffer_batchnorm=buffer_batchnorm,
            initialize=initialize, strict=strict,
        )  # fmt: skip
        for name in to.values() if isinstance(to, Mapping) else (to,):
            if noise is not None and isinstance(name, str) and "c" in registry.parse(name)[1]:
                raise ValueError(f"noise= sets c at every step, and {name!r} has a c of its own. Leave one out.")
        self.to = to
        self.noise = noise
        self.blend = blend
        self.interval = interval
        self.example_inputs = example_inputs
        self._suffix = ""  # of the tag
        self._own: list[weakref.ref[torch.nn.Module]] = []  # what is at the sites of this instance
        self._fresh: list[weakref.ref[torch.nn.Module]] = []  # what it has installed there since the last fit
        self._replaced: weakref.ref[pl.LightningModule] | None = None
        self._schedule: Schedule | None = None
        self._blending: Schedule | None = None
        self._noisy: list[NoisyActivation] = []
        self._c: float | None = None
        self._b: float | None = None
        self._steps = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Replace, now or right after ``configure_model`` or ``setup``, unless this model is done already."""
        present = set(pl_module.modules())
        if self._is_done(pl_module) and all(each() in present for each in self._own):
            return
        if is_compiled(pl_module):
            raise MisconfigurationException(
                "The model is compiled already. Call replace_activations(model, ...) before torch.compile(model), and"
                " leave out ActivationReplacement."
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
            if callback is self:
                break
            if has_copied_model(callback):
                raise MisconfigurationException(
                    f"{type(callback).__name__} has copied the model before its activations are replaced. Put"
                    " ActivationReplacement before it in the list of callbacks."
                )
        if is_overridden("configure_model", pl_module):
            self._follow(trainer, pl_module, "configure_model")
        elif is_overridden("setup", pl_module):  # may make layers, too, after callbacks have copied the model
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="replace_activations.* replaced nothing")
                self._replace(trainer, pl_module)
            self._follow(trainer, pl_module, "setup")
        else:
            self._replace(trainer, pl_module)
            self._check_noise(trainer, pl_module)

    def _follow(self, trainer: pl.Trainer, pl_module: pl.LightningModule, hook: str) -> None:
        """Replace right after a hook of the model that may make layers."""
        inner = pl_module.__dict__.get(hook)  # such as that of another instance

        @functools.wraps(getattr(pl_module, hook))
        def followed(*arguments: Any, **options: Any) -> None:
            self._unfollow(pl_module)
            getattr(pl_module, hook)(*arguments, **options)
            self._replace(trainer, pl_module)
            self._check_noise(trainer, pl_module)

        followed.of_replacement = inner  # type: ignore[attr-defined]
        pl_module.__dict__[hook] = followed

    @staticmethod
    def _unfollow(pl_module: pl.LightningModule) -> bool:
        """Remove the outermost instance's hook from the model; return whether there was one."""
        for hook in ("configure_model", "setup"):
            present: Any = pl_module.__dict__.get(hook)
            if hasattr(present, "of_replacement"):
                if present.of_replacement is None:
                    del pl_module.__dict__[hook]
                else:
                    pl_module.__dict__[hook] = present.of_replacement
                return True
        return False

    def _replace(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        instances = _instances(trainer)
        later = [each.policy.call for each in instances[instances.index(self) + 1 :]] if self in instances else []
        fresh = {each() for callback in instances for each in callback._fresh}  # has learned nothing yet
        before = dict(pl_module.named_modules())
        swapped = swap(pl_module, self.policy, self.example_inputs, later=later)
        own = swapped.modules
        self._own = [weakref.ref(each) for each in own]
        for new, old in swapped.pairs if self.blend is not None else ():
            start_blend(new, old)
        made = set(own) - set(before.values())
        self._fresh += [weakref.ref(each) for each in made]
        self._replaced = weakref.ref(pl_module)
        if made and copies_model(trainer):
            raise MisconfigurationException(
                "The Trainer starts processes that train copies of the model, and replaces activations only there: the"
                " model itself, which gets the trained weights, would keep its plain ones. Call"
                f" replace_activations(model, {self.to!r}) before fit, and leave out ActivationReplacement; or use"
                ' strategy="ddp".'
            )
        present = set(pl_module.modules())
        dropped = [
            path
            for path, each in before.items()
            if each not in present and each not in fresh and Origin.of(each) is not None and each.state_dict()
        ]
        if dropped:
            rank_zero_warn(
                f"{', '.join(dropped)} had been replaced before, with something other than {self.to!r}: what was"
                " learned there is dropped. Pass the same `to` as before to keep it."
            )

    def _check_noise(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.noise is not None and not self._annealed(trainer, pl_module):
            raise MisconfigurationException(
                f"noise={self.noise!r} anneals c of noisy activations, and the model has none after the replacement by"
                f' {self.to!r}. Use one of "nan", "nah", "nani", "nanil" and "nanis", or leave noise out.'
            )

    def _annealed(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[NoisyActivation]:
        """The noisy activations that this instance anneals."""
        alone = sum(callback.noise is not None for callback in _instances(trainer)) == 1
        own = [pl_module] if alone else [module for each in self._own if (module := each()) is not None]
        inside = {each for module in own for each in module.modules()}
        return [each for each in pl_module.modules() if isinstance(each, NoisyActivation) and each in inside]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Resolve the schedule, and warn of running statistics that weight averaging leaves outdated."""
        averaged = any(isinstance(each, StochasticWeightAveraging) for each in trainer.callbacks)  # type: ignore[attr-defined]
        own = {module for each in self._own if (top := each()) is not None for module in top.modules()}
        if averaged and any(isinstance(each, NormalizedActivation) for each in own):
            rank_zero_warn(
                "StochasticWeightAveraging refreshes the running statistics of batch norms alone. For normalized"
                " activations, run forward passes over the training data in training mode after the fit, without steps."
            )
        if self.blend is not None:
            self._blending = resolved(self.blend, trainer, of_epochs=self.interval == "epoch")
        if self.noise is not None:
            self._schedule = resolved(self.noise, trainer, of_epochs=self.interval == "epoch")
            self._noisy = self._annealed(trainer, pl_module)
            annealing = [callback for callback in _instances(trainer) if callback.noise is not None]
            self._suffix = f"/noise{annealing.index(self)}" if len(annealing) > 1 else ""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Set c and b for this step."""
        self._steps = trainer.global_step
        step = trainer.current_epoch
        if self.interval == "step":  # in manual optimization global_step counts the steps of all optimizers
            step = trainer.global_step if pl_module.automatic_optimization else trainer.fit_loop.total_batch_idx
        if self._blending is not None:
            self._b = float(self._blending(step))
            if not 0 <= self._b <= 1:
                raise ValueError(f"b must be in [0, 1], and blend={self.blend!r} gives {self._b} at {step}.")
            own = {each() for each in self._own}
            for module in blended(pl_module).values():
                if module in own:
                    set_blend(module, self._b)
        if self._schedule is not None:
            self._c = float(self._schedule(step))
            if not 0 <= self._c < float("inf"):
                raise ValueError(f"c must be a finite number >= 0, and noise={self.noise!r} gives {self._c} at {step}.")
            self._set_c()

    def _set_c(self) -> None:
        c = self._c
        for module in self._noisy:
            if c is not None and module.c.item() != c:
                module.c.fill_(c)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Set c again: it is a buffer, which weight averaging changes."""
        if batch_idx == 0:
            self._set_c()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set c again: it is a buffer, which weight averaging changes."""
        self._set_c()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Pool the statistics of activations with ``synchronized=True`` after an optimizer step, and log c."""
        is_first = _instances(trainer)[:1] == [self]  # once per step, not per instance
        if is_first and trainer.global_step > self._steps and synchronized_activations(pl_module):
            synchronize_statistics(pl_module)
        step = logging_step(trainer)
        scalars = {"activation_noise/c": self._c, "activation_blend/b": self._b}
        known = {f"{tag}{self._suffix}": value for tag, value in scalars.items() if value is not None}
        if step is not None and known:
            log_scalars(trainer, known, step)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the model's hooks, if they were never called."""
        while self._unfollow(pl_module):
            pass
        self._noisy, self._fresh, self._schedule, self._c = [], [], None, None
        self._blending, self._b = None, None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the model's hooks."""
        self.teardown(trainer, pl_module, "fit")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Record the replacements, and c."""
        _checkpoints.add_replacements(pl_module, checkpoint)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check that the replacements are those of the checkpoint, and restore c."""
        _checkpoints.check(pl_module, checkpoint)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_replaced": None, "_noisy": [], "_own": [], "_fresh": []}

    def _is_done(self, pl_module: pl.LightningModule) -> bool:
        return self._replaced is not None and self._replaced() is pl_module


def _instances(trainer: pl.Trainer) -> list[ActivationReplacement]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return [callback for callback in callbacks if isinstance(callback, ActivationReplacement)]
