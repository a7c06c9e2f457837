"""The callback that swaps a model's activations."""

from __future__ import annotations

import weakref
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_noisy.engine.replace import Replacement, check_replacement, replace_activations
from lightning_noisy.engine.statistics import synchronize_statistics, synchronized_activations

__all__ = ["ActivationReplacement"]


class ActivationReplacement(pl.Callback):
    """Replace the activations of the model when a Trainer sets it up, before its optimizers are made.

    The callback form of :func:`lightning_noisy.replace_activations`, for models that you configure and don't
    write. A model that has been swapped keeps its modules: ``fit``, ``test`` and ``fit`` again swap once.

    A checkpoint of such a model has the new modules' values. To resume, or to test, pass ``ckpt_path`` to a
    Trainer with this callback. For ``load_from_checkpoint``, call ``replace_activations(self, ...)`` in the
    model's ``__init__`` instead of using the callback.

    Args:
        to: what to replace them with; see :func:`lightning_noisy.replace_activations`.

    Raises:
        TypeError: if ``to`` is nothing to replace activations with.
        ValueError: if a name is unknown; suggests the closest ones.

    >>> trainer = pl.Trainer(callbacks=[ActivationReplacement("nsw")], logger=False, enable_checkpointing=False)
    """

    def __init__(self, to: Replacement) -> None:
        check_replacement(to)
        self.to = to
        self._replaced: weakref.ref[pl.LightningModule] | None = None
        self._steps = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Swap, unless this model is swapped already."""
        if self._replaced is not None and self._replaced() is pl_module:
            return
        if is_overridden("configure_model", pl_module):
            raise MisconfigurationException(
                f"{type(pl_module).__name__} builds layers in configure_model, after callbacks are set up, so"
                " ActivationReplacement would miss them. Call replace_activations(self, ...) in configure_model,"
                " before the layers are sharded."
            )
        replace_activations(pl_module, self.to)
        self._replaced = weakref.ref(pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Note the optimizer steps taken."""
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Pool the statistics of activations with ``synchronized=True`` after an optimizer step."""
        if trainer.global_step > self._steps and synchronized_activations(pl_module):
            synchronize_statistics(pl_module)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_replaced": None}
