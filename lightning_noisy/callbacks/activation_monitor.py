"""The callback that logs what the activations do."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_noisy.callbacks._lightning_internals import logging_step
from lightning_noisy.callbacks._logging import log_scalars
from lightning_noisy.monitoring.recorder import ActivationRecorder

__all__ = ["ActivationMonitor"]


class ActivationMonitor(pl.Callback):
    r"""Log how each activation treats signal and gradient: the ANAct scores, saturation and sparsity.

    For every activation module, plain or replaced, over the training batches since the last logging step:

    ===================== ====================================================================================
    ``rho/<site>``        :math:`E[\varphi(h)^2] / \mathrm{Var}[h]` (Eq. 5 of Yuan et al., "ANAct", 2022)
    ``rho_prime/<site>``  :math:`E[\varphi'(h)^2]` (Eq. 6)
    ``saturation/<site>`` share of elements with a slope flatter than ``saturation_threshold`` times the
                          function's largest (Gulcehre et al., "Noisy Activation Functions", 2016, Def. 2.2)
    ``sparsity/<site>``   share of elements that are inactive: φ(h) <= 0, for a normalized activation before
                          its shift (Pretorius et al., "ReLU and sigmoidal activation functions", 2019, Table 1)
    ``anact_score``       :math:`\sum (|\ln\rho| + |\ln\rho'|) / 2` over the sites (Eq. 22), 0 at best
    ===================== ====================================================================================

    ``<site>`` is the module's name. Moments are pooled by count over the batches of the window and over all
    ranks, with one reduction and one host sync per logging step. Training is bitwise the same as without the monitor.
    Values go to every logger at the Trainer's ``log_every_n_steps``, and to ``trainer.callback_metrics``. A
    statistic that is undefined, such as ρ of a layer whose input doesn't vary, is logged as NaN.

    Args:
        every_n_batches: record every n-th training batch, >= 1. 1 records all; a larger n is cheaper.
        saturation_threshold: share of the largest slope, in (0, 1).

    Raises:
        ValueError: if an argument is outside its range.

    Warns:
        UserWarning: at the start of a fit, if the model has no activation modules.

    >>> trainer = pl.Trainer(callbacks=[ActivationMonitor()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, *, every_n_batches: int = 1, saturation_threshold: float = 0.05) -> None:
        if isinstance(every_n_batches, bool) or not isinstance(every_n_batches, int) or every_n_batches < 1:
            raise ValueError(f"every_n_batches must be an integer >= 1, got {every_n_batches!r}.")
        if not (0 < saturation_threshold < 1):
            raise ValueError(f"saturation_threshold must be in (0, 1), got {saturation_threshold!r}.")
        self.every_n_batches = every_n_batches
        self.saturation_threshold = saturation_threshold
        self._recorder: ActivationRecorder | None = None
        self._batches = 0  # of the fit
        self._recorded = 0  # of the window

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the activations."""
        self._batches = self._recorded = 0
        recorder = ActivationRecorder(pl_module, saturation_threshold=self.saturation_threshold)
        self._recorder = recorder if recorder.statistics.sites else None
        if self._recorder is None:
            rank_zero_warn(
                f"ActivationMonitor found no activation modules in {type(pl_module).__name__}, so it logs nothing."
                " Calls of functions such as F.relu(x) are not seen: make them modules.",
                category=UserWarning,
            )
            return
        if pl_module.device.type != "mps":  # which has no float64
            recorder.statistics.to(pl_module.device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record this batch, if it is due."""
        if self._recorder is not None and self._batches % self.every_n_batches == 0:
            self._recorder.attach()
            self._recorded += 1
        self._batches += 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the window, if it is due."""
        if self._recorder is None:
            return
        self._recorder.detach()
        step = logging_step(trainer)
        if step is None or not self._recorded:
            return
        statistics = self._recorder.statistics

        def sum_over_ranks(sums: Tensor, group: Any = None) -> list[Tensor]:
            return [trainer.strategy.reduce(sums.clone(), reduce_op="sum")]  # one reduction, not a gather

        # torchmetrics warns if no site was called on this rank: the logged NaN shows that already.
        with warnings.catch_warnings(), statistics.sync_context(dist_sync_fn=sum_over_ranks):
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            values = statistics.compute()
        numbers = torch.stack(list(values.values())).tolist()  # the one host sync
        log_scalars(trainer, dict(zip(values, numbers, strict=True)), step)
        statistics.reset()
        self._recorded = 0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop recording after a skipped batch, which has no ``on_train_batch_end``."""
        if self._recorder is not None:
            self._recorder.detach()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop recording after a skipped batch, which has no ``on_train_batch_end``."""
        if self._recorder is not None:
            self._recorder.detach()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove all hooks from the model."""
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove all hooks from the model."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove all hooks from the model."""
        self._release()

    def _release(self) -> None:
        if self._recorder is not None:
            self._recorder.detach()
        self._recorder = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recorder": None}
