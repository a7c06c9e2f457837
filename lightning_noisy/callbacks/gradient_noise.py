"""The callback that adds annealed noise to the gradients."""

from __future__ import annotations

import os
import secrets
from dataclasses import is_dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_noisy.callbacks._logging import is_logging_due, log_hyperparameters, log_scalars, logging_step
from lightning_noisy.engine.gradient_noise import GradientNoiseHandle, ParameterFilter, add_gradient_noise
from lightning_noisy.engine.noise_plan import total_norm
from lightning_noisy.schedules import HorizonSchedule, InverseDecay, Schedule

__all__ = ["GradientNoise"]


class GradientNoise(pl.Callback):
    r"""Add annealed Gaussian noise to the gradients, after clipping.

    :math:`g_t \leftarrow g_t + \mathcal N(0, \sigma_t^2)` with :math:`\sigma_t^2 = \eta / (1 + t)^\gamma`, Eq. 1 of
    Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks" (2015). t counts the
    steps that each optimizer has taken, from 0: batches that only accumulate gradients don't count.

    It works in automatic and manual optimization. The noise has a random stream of its own: it is a function of
    the seed, the optimizer's index, the parameter's name and t, so all ranks of data-parallel training add the
    same, a resumed run goes on as if it had not stopped, and the global random states are not touched.

    A resumed run may have another schedule: it goes on at the checkpoint's t. Several instances in one Trainer
    have independent noises, and state; those with the same schedule need a ``name`` each.

    Logs to every logger, at the Trainer's logging steps, with ``/<name>`` at the end if it has one (``/noise0``,
    ``/noise1``, ... where several have none), and ``/<index>`` of the optimizer if there are several:

    ============================= ======================================================================
    ``gradient_noise/std``        σ of the step
    ``gradient_noise/snr``        norm of the clipped gradient over the expected norm of the noise, σ√n
    ``grad_norm/before_clipping`` norm of the gradient; like the next, over the parameters that get noise;
                                  in automatic optimization, where Lightning clips
    ``grad_norm/after_clipping``  what clipping leaves of it
    ============================= ======================================================================

    The norms are computed at logging steps alone, with one host sync for all; not where only shards of the gradient
    are seen, under DeepSpeed's ZeRO.

    Args:
        eta: variance at the first step, >= 0.
        gamma: exponent of the decay, >= 0.
        schedule: a function from t to σ, in the place of ``eta`` and ``gamma``, such as those of
            :mod:`lightning_noisy.schedules`. ``steps="auto"`` becomes the Trainer's estimated number of steps.
        params: which parameters get noise, ``params(name, parameter) -> bool``; by default all. A parameter group
            of the optimizer with a key ``"noise_scale"`` has σ multiplied by it.
        relative: make σ a multiple of the root mean square of the clipped gradient's elements; see
            :func:`lightning_noisy.add_gradient_noise`.
        name: tells several instances in one Trainer apart, in logs and checkpoints.
        prog_bar: show σ on the progress bar.
        seed: seed of the noise. By default the one of ``seed_everything``, else one that is drawn when the fit
            starts; in both cases a checkpoint that is resumed from brings its own. It is logged as the hyperparameter
            ``gradient_noise_seed`` (TensorBoard: in hparams.yaml).

    Raises:
        TypeError: if an argument is not of its type.
        ValueError: if ``eta`` or ``gamma`` is negative or not finite.
        MisconfigurationException: at the start of a fit, if the schedule's horizon is open and the training endless.

    >>> trainer = pl.Trainer(callbacks=[GradientNoise(eta=0.01)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        eta: float = 0.01,
        gamma: float = 0.55,
        *,
        schedule: Schedule | None = None,
        params: ParameterFilter | None = None,
        relative: bool = False,
        seed: int | None = None,
        name: str = "",
        prog_bar: bool = False,
    ) -> None:
        if schedule is not None and not callable(schedule):
            raise TypeError(f"schedule must be callable: schedule(t) -> standard deviation, got {schedule!r}.")
        if params is not None and not callable(params):
            raise TypeError(f"params must be callable: params(name, parameter) -> bool, got {params!r}.")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise TypeError(f"seed must be an int or None, got {seed!r} of type {type(seed).__name__}.")
        decay = InverseDecay(eta, gamma)
        self.schedule: Schedule = decay if schedule is None else schedule
        self.params = params
        self.relative = relative
        self.seed = seed
        self.name = name
        self.prog_bar = prog_bar
        self._instance = 0
        self._suffix = ""  # of tags
        self._logged_seed: int | None = None
        self._norms_before: dict[int, Tensor] = {}  # of the batch
        self._restored: dict[str, Any] | None = None  # from a checkpoint, for optimizers that are yet to come
        self._final: list[dict[str, Any]] = []  # states of the last fit, for checkpoints that are written after it
        self._handles: list[GradientNoiseHandle] = []

    @property
    def state_key(self) -> str:
        """Name of the state in checkpoints: by the instance's name, if it has one, else by its schedule."""
        if self.name:
            return self._generate_state_key(name=self.name)
        schedule = repr(self.schedule) if is_dataclass(self.schedule) else type(self.schedule).__qualname__
        return self._generate_state_key(schedule=schedule)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find out which of the Trainer's instances this is: each has a stream of its own."""
        instances = _instances(trainer)
        self._instance = next((i for i, callback in enumerate(instances) if callback is self), 0)
        nameless = sum(not callback.name for callback in instances)
        name = self.name or (f"noise{self._instance}" if nameless > 1 else "")
        self._suffix = f"/{name}" if name else ""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach the noise to the optimizers."""
        self._detach()
        self._final = []
        seed = self.seed
        if seed is None:
            seed = int(os.environ.get("PL_GLOBAL_SEED") or secrets.randbits(32))
        seed = trainer.strategy.broadcast(seed)  # ranks may have been seeded differently, for their data
        schedule = self.schedule
        if isinstance(schedule, HorizonSchedule) and schedule.is_open:
            total = trainer.estimated_stepping_batches
            if total == trainer.max_steps:
                total /= len(trainer.optimizers) or 1  # Lightning counts the steps of all
            if total == float("inf"):
                raise MisconfigurationException(
                    f"{schedule} needs to know how long the training is. Give it a number of steps, or set max_steps or"
                    " max_epochs of the Trainer."
                )
            schedule = schedule.resolved(int(total))
        self._handles = [
            add_gradient_noise(
                optimizer,
                schedule,
                seed=seed,
                stream=f"{self.name or self._instance}.{index}",
                model=pl_module,
                params=self.params,
                relative=self.relative,
            )
            for index, optimizer in enumerate(trainer.optimizers)
        ]
        if self._restored is not None:
            self._restore(self._restored)
        self._log_seed(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See that what checkpoints brought differs between instances."""
        handles = [handle for callback in _instances(trainer) for handle in callback._handles]
        if len({(handle.seed, handle.stream) for handle in handles}) < len(handles):
            raise MisconfigurationException(
                "Two GradientNoise callbacks would add the same noise: the checkpoint has the stream of one for both."
                " Give each a name, with which it finds its own state."
            )
        if self._handles and self._handles[0].seed != self._logged_seed:  # restored late, as sharded strategies do
            self._log_seed(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure norms if this batch's values will be logged."""
        for handle in self._handles:
            handle.measuring = is_logging_due(trainer)
            handle.std = handle.grad_norm = None
        self._norms_before = {}

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure the norm before clipping."""
        if not pl_module.automatic_optimization:
            return  # users clip before they step, and this comes with the step
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            return  # the gradients are still scaled, and Lightning doesn't clip them
        for index, handle in enumerate(self._handles):
            measured = handle.measuring and trainer.optimizers[index] is optimizer
            if measured and (gradients := handle.gradients(optimizer)):
                self._norms_before[index] = total_norm(gradients)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log σ and the norms."""
        scalars: dict[str, float] = {}
        norms: dict[str, Tensor] = {}
        for index, handle in enumerate(self._handles):
            suffix = self._suffix + (f"/{index}" if len(self._handles) > 1 else "")
            if handle.std is not None:
                scalars[f"gradient_noise/std{suffix}"] = handle.std
            if index in self._norms_before:
                norms[f"grad_norm/before_clipping{suffix}"] = self._norms_before[index]
            if handle.grad_norm is not None:
                norms[f"grad_norm/after_clipping{suffix}"] = handle.grad_norm
                if handle.noise_norm:
                    norms[f"gradient_noise/snr{suffix}"] = handle.grad_norm / handle.noise_norm
        if self.prog_bar:
            pl_module.log_dict(dict(scalars), prog_bar=True, logger=False)
        step = logging_step(trainer)
        if step is None or not scalars:
            return
        if norms:
            device = next(iter(norms.values())).device
            numbers = torch.stack([norm.to(device) for norm in norms.values()]).tolist()  # the one host sync
            scalars.update(zip(norms, numbers, strict=True))
        log_scalars(trainer, scalars, step)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the noise off the optimizers."""
        self._detach()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the noise off the optimizers."""
        self._detach()
        self._restored = None  # a validation's checkpoint is not the next fit's

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take the noise off the optimizers."""
        self._detach()
        self._restored = None

    def state_dict(self) -> dict[str, Any]:
        """Seed and t of each optimizer's noise: plain numbers."""
        return {"optimizers": [handle.state_dict() for handle in self._handles] or self._final}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was written; the optimizers may come later."""
        if self._handles:  # with strategies that restore checkpoints late
            self._restore(state_dict)
        else:
            self._restored = state_dict

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the state of the only noise in a checkpoint also if its schedule was another one."""
        states = {k: v for k, v in checkpoint["callbacks"].items() if str(k).startswith(type(self).__qualname__)}
        if self.state_key in states:
            return
        if len(states) == len(_instances(trainer)) == 1:
            self.load_state_dict(*states.values())
        elif trainer.state.fn == TrainerFn.FITTING:
            without = f"has no state of {self.state_key}" if states else "was written without GradientNoise"
            rank_zero_warn(f"The checkpoint {without}: its noise starts at t = 0.")

    def _log_seed(self, trainer: pl.Trainer) -> None:
        if self._handles:
            self._logged_seed = self._handles[0].seed
            log_hyperparameters(trainer, {f"gradient_noise_seed{self._suffix}": self._logged_seed})

    def _restore(self, state: dict[str, Any]) -> None:
        self._restored = None
        if not state["optimizers"]:
            return  # written before there was a fit, by a tuner for one
        if len(state["optimizers"]) != len(self._handles):
            rank_zero_warn(
                f"The checkpoint has gradient noise of {len(state['optimizers'])} optimizers, and there are"
                f" {len(self._handles)}: their noise starts anew, at t = 0."
            )
            return
        for handle, saved in zip(self._handles, state["optimizers"], strict=True):
            if self.seed is not None and saved["seed"] != self.seed:
                rank_zero_warn(
                    f"GradientNoise(seed={self.seed}) goes on from a checkpoint with seed {saved['seed']}: the noise"
                    " continues at its t with the new seed. Use seed=None for the checkpoint's."
                )
                saved = {**saved, "seed": self.seed}
            handle.load_state_dict(saved)

    def _detach(self) -> None:
        if self._handles:
            self._final = [handle.state_dict() for handle in self._handles]
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __getstate__(self) -> dict[str, Any]:
        # Hooks don't outlive a copy of their optimizer: a copy of the callback starts without.
        return {**self.__dict__, "_handles": [], "_norms_before": {}}


def _instances(trainer: pl.Trainer) -> list[GradientNoise]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return [callback for callback in callbacks if isinstance(callback, GradientNoise)]
