"""The private interfaces of Lightning that are used because no public ones exist: each behind one function.

Tests fail when Lightning changes one of them, or when one is used elsewhere (tests/test_internals.py).
"""

from __future__ import annotations

import lightning.pytorch as pl

__all__ = [
    "batches_until",
    "copies_model",
    "has_copied_model",
    "is_compiled",
    "is_logging_due",
    "logging_step",
    "step_to_log",
]


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


def batches_until(trainer: pl.Trainer, every_n_steps: int | None) -> int | None:
    """In ``on_train_batch_start``: how many batches after this one is the next that completes a logged step.

    An epoch that ends within the step comes earlier.

    Args:
        trainer: the Trainer.
        every_n_steps: counted as ``log_every_n_steps``, which it is by default.

    Returns:
        0 for the batch itself; None if Lightning never logs.
    """
    loop = trainer.fit_loop.epoch_loop
    every = trainer.log_every_n_steps if every_n_steps is None else every_n_steps  # type: ignore[attr-defined]
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        every = 1
    if every == 0:
        return None
    accumulated = trainer.accumulate_grad_batches if trainer.lightning_module.automatic_optimization else 1
    steps = every - 1 - loop._batches_that_stepped % every
    if steps == 0 and not (trainer.lightning_module.automatic_optimization and loop._should_accumulate()):
        return 0
    return steps * accumulated + accumulated - 1 - (loop.batch_progress.current.ready - 1) % accumulated


def step_to_log(trainer: pl.Trainer) -> int:
    """In ``on_train_batch_end``: the step at which ``self.log`` values of this batch would be written."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def is_compiled(model: pl.LightningModule) -> bool:
    """Whether ``torch.compile`` was called on it: the Trainer unwraps it, and runs the compiled old ``forward``."""
    return model._compiler_ctx is not None


def has_copied_model(callback: pl.Callback) -> bool:
    """Whether it averages weights in a copy of the model, as made by ``StochasticWeightAveraging`` in its ``setup``."""
    return getattr(callback, "_average_model", None) is not None


def copies_model(trainer: pl.Trainer) -> bool:
    """Whether the strategy trains a copy of the model in a process of its own (``ddp_spawn``, ``ddp_notebook``)."""
    return getattr(trainer.strategy.launcher, "_start_method", None) is not None
