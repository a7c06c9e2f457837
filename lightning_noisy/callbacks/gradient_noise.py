"""The callback that adds annealed noise to the gradients."""

from __future__ import annotations

import os
import re
import secrets
import weakref
from dataclasses import is_dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_noisy._torch_internals import unscales_in_step
from lightning_noisy.callbacks._horizon import resolved
from lightning_noisy.callbacks._lightning_internals import is_logging_due, logging_step
from lightning_noisy.callbacks._logging import log_hyperparameters, log_scalars
from lightning_noisy.callbacks._noise_watch import NoiseWatch
from lightning_noisy.callbacks._noisy_optimizers import Attached, NoisyOptimizers
from lightning_noisy.gradient_noise.handle import (
    GradientNoiseHandle,
    ParameterFilter,
    add_gradient_noise,
    checked_state,
)
from lightning_noisy.gradient_noise.norms import total_norm
from lightning_noisy.kernels.gaussian import plain
from lightning_noisy.schedules import InverseDecay, Schedule, check_schedule

__all__ = ["GradientNoise"]

_ETA, _GAMMA = 0.01, 0.55


class GradientNoise(pl.Callback):
    r"""Add annealed Gaussian noise to the gradients, after clipping.

    :math:`g_t \leftarrow g_t + \mathcal N(0, \sigma_t^2)` with :math:`\sigma_t^2 = \eta / (1 + t)^\gamma`, Eq. 1 of
    Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks" (2015). t counts the
    steps that each optimizer has taken, from 0: batches that only accumulate gradients don't count.

    **Choosing η.** What matters is the size of the noise relative to the gradient: see ``gradient_noise/snr``. Around
    1 the noise disturbs the training a little, at 0.1 a lot; far below 0.1 the steps are nearly all noise, which helps
    only a model that doesn't learn otherwise, such as one whose weights start at zero. If the loss doesn't fall there,
    use an η a hundred times smaller, which makes the ratio ten times larger; or ``relative=True, eta=1.0``, which
    starts at a ratio of 1. A warning says so if the ratio is below 0.02 at all logged steps from the start to the
    fifth, and to t = 200. (It falls again when a model has converged, since its gradients are small.)

    It works in automatic and manual optimization, also with optimizers that are replaced during a fit. The noise has
    its own random stream: it is a function of the seed, the optimizer's index, the parameter's name and t, so all ranks
    of data-parallel training add the same noise, a resumed run continues as if it had not stopped, and the global
    random states don't change. A second ``fit`` of a Trainer has new optimizers: t starts at 0 again, and the noise is
    different.

    A resumed run may have another schedule: it continues at the checkpoint's t. Several instances in one Trainer have
    independent noise and state; if they have the same schedule, each needs a ``name``.

    The padding row of an embedding (``padding_idx``) gets no noise as long as its gradient is zero, unless its weight
    is parametrized. Use ``params`` for other elements that are never trained, such as slices that a hook freezes.

    Logs to every logger at the Trainer's logging steps. Tags end with ``/<name>`` if the instance has one
    (``/noise0``, ``/noise1``, ... if several have none), and ``/<index>`` of the optimizer if there are several:

    ============================= ======================================================================
    ``gradient_noise/std``        σ of the step
    ``gradient_noise/snr``        norm of the clipped gradient over the expected norm of the noise, σ√n
    ``grad_norm/before_clipping`` norm of the gradient over the parameters that get noise; only in
                                  automatic optimization, where Lightning clips
    ``grad_norm/after_clipping``  the same norm after clipping
    ============================= ======================================================================

    The norms are computed only at logging steps, with one host sync for all; and not where only shards of the gradient
    are visible, such as under DeepSpeed's ZeRO.

    Args:
        eta: variance at the first step, >= 0.
        gamma: exponent of the decay, >= 0.
        schedule: a function from t to σ, instead of ``eta`` and ``gamma``, such as those of
            :mod:`lightning_noisy.schedules`: a standard deviation, while ``eta`` is a variance. ``steps="auto"``
            becomes the Trainer's estimated number of steps.
        params: which parameters get noise, ``params(name, parameter) -> bool``; by default all. A key
            ``"noise_scale"`` in a parameter group of the optimizer multiplies its σ.
        relative: make σ a multiple of the root mean square of the clipped gradient's elements; see
            :func:`lightning_noisy.add_gradient_noise`.
        name: tells several instances in one Trainer apart, in logs and checkpoints.
        prog_bar: show σ on the progress bar.
        seed: seed of the noise. By default that of ``seed_everything``, or else one that is drawn when the fit
            starts; in both cases a resumed run uses the checkpoint's. It is logged as the hyperparameter
            ``gradient_noise_seed`` (TensorBoard: in hparams.yaml).

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if ``eta`` or ``gamma`` is negative or not finite, or given together with ``schedule``.
        MisconfigurationException: at the start of a fit, if the schedule's horizon is open and the training endless, or
            the callback is in use by the fit of another Trainer.

    >>> trainer = pl.Trainer(callbacks=[GradientNoise(eta=0.01)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        eta: float = _ETA,
        gamma: float = _GAMMA,
        *,
        schedule: Schedule | None = None,
        params: ParameterFilter | None = None,
        relative: bool = False,
        seed: int | None = None,
        name: str = "",
        prog_bar: bool = False,
    ) -> None:
        decay = InverseDecay(eta, gamma)
        if schedule is not None:
            check_schedule("schedule", schedule)
            if (eta, gamma) != (_ETA, _GAMMA):
                raise ValueError(
                    f"schedule takes the place of eta and gamma, got eta={eta!r}, gamma={gamma!r} and"
                    f" schedule={schedule!r}. Leave out one or the other."
                )
        if params is not None and not callable(params):
            raise TypeError(f"params must be callable: params(name, parameter) -> bool, got {params!r}.")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise TypeError(f"seed must be an int or None, got {seed!r} of type {type(seed).__name__}.")
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, got {name!r} of type {type(name).__name__}.")
        for option, value in (("relative", relative), ("prog_bar", prog_bar)):
            if not isinstance(value, bool):
                raise TypeError(f"{option} must be True or False, got {value!r}.")
        self.schedule: Schedule = decay if schedule is None else schedule
        self.params = params
        self.relative = relative
        self.seed = seed
        self.name = str(plain(name))
        self.prog_bar = prog_bar
        self._instance = 0
        self._suffix = ""  # of tags
        self._restored: dict[str, Any] | None = None  # from a checkpoint, until the optimizers exist
        self._final: list[dict[str, Any]] = []  # states of the last fit, for checkpoints that are written after it
        self._forget_fit()

    def _forget_fit(self) -> None:
        """Reset what belongs to a fit."""
        self._trainer: weakref.ref[pl.Trainer] | None = None
        self._has_guest = False  # whether another Trainer runs inside the fit, such as to validate
        self._noisy: NoisyOptimizers | None = None
        self._following: RemovableHandle | None = None  # of the hook that notices new optimizers
        self._logged_seed: int | None = None
        self._norms_before: dict[int, Tensor] = {}  # of the batch, by index
        self._steps_before: dict[GradientNoiseHandle, int] = {}  # t when the batch began
        self._watch = NoiseWatch()

    @property
    def state_key(self) -> str:
        """Name of the state in checkpoints: by the instance's name, if it has one, else by its schedule."""
        if self.name:
            return _state_key(name=self.name)
        schedule = repr(self.schedule) if is_dataclass(self.schedule) else type(self.schedule).__qualname__
        return _state_key(schedule=schedule)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Determine which of the Trainer's instances this is: each has its own stream and tags."""
        if self._is_busy_elsewhere(trainer):
            if stage != "fit":
                self._has_guest = True
                return
            raise MisconfigurationException(
                "This GradientNoise is in use by the fit of another Trainer. Give each Trainer its own."
            )
        if stage == "fit":
            self._final = []
        instances = _instances(trainer)
        self._instance = next((i for i, callback in enumerate(instances) if callback is self), 0)
        names = {callback.name for callback in instances}
        nameless = [callback for callback in instances if not callback.name]
        free = (name for i in range(2 * len(instances)) if (name := f"noise{i}") not in names)
        own = dict(zip(map(id, nameless), free, strict=False))
        name = self.name or (own[id(self)] if len(nameless) > 1 else "")
        self._suffix = f"/{name}" if name else ""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach the noise to the optimizers."""
        self._detach()
        self._trainer = weakref.ref(trainer)
        seed = self.seed
        if seed is None:
            seed = int(os.environ.get("PL_GLOBAL_SEED") or secrets.randbits(32))
        seed = trainer.strategy.broadcast(seed)  # ranks may have been seeded differently, for their data
        schedule = resolved(self.schedule, trainer)
        # A name is quoted, so that it equals no index. A later fit of the Trainer has different noise.
        stream = repr(self.name) if self.name else str(self._instance)
        later = f"@{trainer.global_step}" if trainer.global_step else ""

        def make_handle(optimizer: Any, index: int) -> GradientNoiseHandle:
            handle = add_gradient_noise(
                optimizer,
                schedule,
                seed=seed,
                stream=f"{stream}.{index}{later}",
                model=pl_module,
                params=self.params,
                relative=self.relative,
            )
            handle.warns_of_none = False  # params may choose parameters of another optimizer
            return handle

        this = weakref.ref(self)

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def follow(*_: Any) -> None:
            callback = this()
            if callback is not None and callback._trainer is not None:
                running = callback._trainer()
                if running is not None and running.state.status == TrainerStatus.RUNNING:
                    callback._follow(running)

        self._noisy = NoisyOptimizers(make_handle)
        try:
            self._follow(trainer)
            self._following = register_optimizer_step_pre_hook(follow)
            self._restore(self._restored)
        except BaseException:
            self._detach()
            raise
        if self.params is not None and not any(each.handle.parameters() for each in self._handles) and self._handles:
            rank_zero_warn(f"params={self.params!r} chooses none of the optimizers' parameters: there is no noise.")
        self._log_seed(trainer)

    def _follow(self, trainer: pl.Trainer) -> None:
        """Attach the noise to the Trainer's current optimizers."""
        if self._noisy is not None and self._noisy.follow(trainer.optimizers):
            for each in self._noisy.attached:
                self._watch.begin(each.number, each.handle.parameters())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the streams from a checkpoint differ between instances."""
        handles = [each.handle for callback in _instances(trainer) for each in callback._handles]
        if len({(handle.seed, handle.stream) for handle in handles}) < len(handles):
            raise MisconfigurationException(
                "Two GradientNoise callbacks would add the same noise: the checkpoint has one stream for both."
                " Give each a name, by which it finds its own state."
            )
        if any(each.handle.seed != self._logged_seed for each in self._handles):
            self._log_seed(trainer)  # restored late, as by sharded strategies

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure norms if this batch's values will be logged."""
        self._follow(trainer)
        for each in self._handles:
            each.handle.measuring = is_logging_due(trainer)
        self._norms_before = {}
        self._steps_before = {each.handle: each.handle.step for each in self._handles}

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure the norm before clipping."""
        if not pl_module.automatic_optimization:
            return  # users clip before the step, and this hook runs in the step
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and unscales_in_step(optimizer):
            return  # the gradients are still scaled, and Lightning doesn't clip them
        for each in self._handles:
            measured = each.optimizer is optimizer and each.handle.measuring
            if measured and (gradients := each.handle.gradients(optimizer)):
                self._norms_before[each.number] = total_norm(gradients)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log σ and the norms; warn of steps without noise, and of a signal-to-noise ratio that is too low."""
        scalars: dict[str, float] = {}
        norms: dict[str, Tensor] = {}
        for _, index, handle in self._handles:
            suffix = self._suffix + (f"/{index}" if len(self._handles) > 1 else "")
            if index in self._norms_before:
                norms[f"grad_norm/before_clipping{suffix}"] = self._norms_before[index]
            last = handle.last_step
            if last is None or last.t < self._steps_before.get(handle, 0):
                continue  # a batch without a step
            self._watch.noisy.add(index)
            scalars[f"gradient_noise/std{suffix}"] = last.std
            if last.grad_norm is not None:
                norms[f"grad_norm/after_clipping{suffix}"] = last.grad_norm
                if last.noise_norm:
                    norms[f"gradient_noise/snr{suffix}"] = last.grad_norm / last.noise_norm
        if self.prog_bar:
            pl_module.log_dict(dict(scalars), prog_bar=True, logger=False)
        step = logging_step(trainer)
        if step is None:
            return
        self._watch.check_steps(self._handles)
        if not scalars:
            return
        if norms:
            device = next(iter(norms.values())).device
            numbers = torch.stack([norm.to(device) for norm in norms.values()]).tolist()  # the one host sync
            scalars.update(zip(norms, numbers, strict=True))
        log_scalars(trainer, scalars, step)
        ratios = [value for tag, value in scalars.items() if tag.startswith("gradient_noise/snr")]
        self._watch.check_ratios(ratios, max(each.handle.step for each in self._handles), self.schedule)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the noise from the optimizers."""
        self._watch.check_steps(self._handles)
        self._detach()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the noise from the optimizers."""
        if self._is_busy_elsewhere(trainer):
            self._has_guest = False
            return
        self._detach()
        self._restored = None  # a checkpoint loaded to validate is not the next fit's

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the noise from the optimizers."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """Seed, stream and t of each optimizer's noise: plain numbers and strings."""
        return {"optimizers": (self._noisy and self._noisy.states()) or self._final}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was written; the optimizers may be created later.

        Raises:
            ValueError: if it is not the state of a GradientNoise; nothing changes then.
        """
        if self._has_guest:
            return
        states = state_dict.get("optimizers") if isinstance(state_dict, dict) else None
        if not isinstance(states, list):
            raise ValueError(f'GradientNoise has a state of {{"optimizers": [...]}}, got {state_dict!r}.')
        for state in states:
            checked_state(state)
        if self._handles:  # with strategies that restore checkpoints late
            self._restore(state_dict)
        else:
            self._restored = state_dict

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Load the state of the only noise in a checkpoint even if its schedule was different."""
        if self._has_guest:
            return
        states = {key: state for key, state in checkpoint["callbacks"].items() if _is_state_key(key)}
        if self.state_key in states:
            return
        if len(states) == len(_instances(trainer)) == 1:
            self.load_state_dict(*states.values())
        elif trainer.state.fn == TrainerFn.FITTING:
            without = f"has no state of {self.state_key}" if states else "was written without GradientNoise"
            rank_zero_warn(f"The checkpoint {without}: its noise starts at t = 0.")

    def _log_seed(self, trainer: pl.Trainer) -> None:
        if self._handles:
            self._logged_seed = self._handles[0].handle.seed
            log_hyperparameters(trainer, {f"gradient_noise_seed{self._suffix}": self._logged_seed})

    def _restore(self, state: dict[str, Any] | None) -> None:
        self._restored = None
        if state is not None and self._noisy is not None:
            self._noisy.restore(state["optimizers"], self.seed)

    @property
    def _handles(self) -> list[Attached]:
        return [] if self._noisy is None else self._noisy.attached

    def _detach(self) -> None:
        if self._noisy is not None:
            self._final = self._noisy.states() or self._final
            self._noisy.remove()
        if self._following is not None:
            self._following.remove()
        self._forget_fit()

    def _is_busy_elsewhere(self, trainer: pl.Trainer) -> bool:
        """Whether it is in use by the fit of another Trainer, inside which this one runs."""
        other = None if self._trainer is None else self._trainer()
        return other is not None and other is not trainer and other.state.status == TrainerStatus.RUNNING

    def __getstate__(self) -> dict[str, Any]:
        # A copied optimizer loses its hooks: a copy of the callback starts without a fit.
        fresh = GradientNoise.__new__(GradientNoise)
        fresh._forget_fit()
        return {**self.__dict__, **fresh.__dict__}


def _instances(trainer: pl.Trainer) -> list[GradientNoise]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return [callback for callback in callbacks if isinstance(callback, GradientNoise)]


def _state_key(**by: str) -> str:
    """The key in checkpoints: the same for subclasses, and for no other callback."""
    return f"{GradientNoise.__name__}{by!r}"


def _is_state_key(key: object) -> bool:
    return (
        isinstance(key, str) and re.fullmatch(rf"{GradientNoise.__name__}\{{'(name|schedule)': .*\}}", key) is not None
    )
