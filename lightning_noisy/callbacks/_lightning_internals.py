"""The private interfaces of Lightning that are used because no public ones exist: each behind one function.

Tests fail when Lightning changes one of them, or when one is used elsewhere (tests/test_internals.py).
"""

from __future__ import annotations

import lightning.pytorch as pl

__all__ = ["copies_model", "has_copied_model", "is_compiled", "is_logging_due", "logging_step"]


def is_logging_due(trainer: pl.Trainer) -> bool:
    """Whether Lightning logs the step that this batch belongs to; from ``on_train_batch_start`` on."""
    # fast_dev_run is set by one of the Trainer's connectors.
    return bool(trainer._logger_connector.should_update_logs or trainer.fast_dev_run)  # type: ignore[attr-defined]


def logging_step(trainer: pl.Trainer) -> int | None:
    """In ``on_train_batch_end``: the step at which ``self.log`` values of this batch are written, or None.

    None for batches whose values Lightning doesn't write either, because of ``log_every_n_steps`` or gradient
    accumulation. ``trainer.global_step`` differs: it has advanced already, and by two with two optimizers.
    """
    loop = trainer.fit_loop
    accumulating = loop._should_accumulate() and trainer.lightning_module.automatic_optimization
    return loop.epoch_loop._batches_that_stepped if is_logging_due(trainer) and not accumulating else None


def is_compiled(model: pl.LightningModule) -> bool:
    """Whether ``torch.compile`` was called on it: the Trainer unwraps it, and runs the compiled old ``forward``."""
    return model._compiler_ctx is not None


def has_copied_model(callback: pl.Callback) -> bool:
    """Whether it averages weights in a copy of the model, as made by ``StochasticWeightAveraging`` in its ``setup``."""
    return getattr(callback, "_average_model", None) is not None


def copies_model(trainer: pl.Trainer) -> bool:
    """Whether the strategy trains a copy of the model in a process of its own (``ddp_spawn``, ``ddp_notebook``)."""
    return getattr(trainer.strategy.launcher, "_start_method", None) is not None
