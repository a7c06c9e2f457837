"""What ActivationMonitor writes to TensorBoard beside scalars."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_noisy.monitoring.classes import ClassWatch
from lightning_noisy.monitoring.diagnosis import Findings, History
from lightning_noisy.monitoring.figures import class_figure, saturation_figure, scales_figure
from lightning_noisy.monitoring.statistics import tag_of
from lightning_noisy.monitoring.tensorboard import EDGES, add_histogram, custom_scalars

__all__ = ["write_classes", "write_figures", "write_findings", "write_histograms", "write_layout"]


def _writers(trainer: pl.Trainer) -> Iterator[Any]:
    """The SummaryWriters of TensorBoard, on the first process alone."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                yield logger.experiment


def write_layout(trainer: pl.Trainer, tags: Iterable[str]) -> None:
    """Arrange the charts of the tab Custom Scalars; once per writer."""
    layout = custom_scalars(tags)
    for writer in _writers(trainer):
        if layout:
            writer.add_custom_scalars(layout)


def write_histograms(trainer: pl.Trainer, counts: Tensor, names: Sequence[str], step: int) -> None:
    """Write the pre-activations of each site; ``counts`` has the shape (sites, bins)."""
    for writer in _writers(trainer):
        for name, row in zip(names, counts, strict=True):
            add_histogram(writer, tag_of("pre_activation", name), row, EDGES, step)


def write_findings(trainer: pl.Trainer, findings: Findings, step: int) -> None:
    """Write the findings as a text."""
    for writer in _writers(trainer):
        writer.add_text("findings", findings.as_markdown(), step)


def write_classes(trainer: pl.Trainer, classes: ClassWatch, names: Sequence[str], step: int) -> None:
    """Draw the medians and deviations of each unit by class, of each site."""
    for site, table in classes.tables():
        for writer in _writers(trainer):
            figure = class_figure(table["median"].tolist(), table["std"].tolist(), names[site] or "(root)")
            writer.add_figure(tag_of("class_activations", names[site]), figure, step)


def write_figures(trainer: pl.Trainer, history: History, names: Sequence[str]) -> None:
    """Draw the saturation over depth and time, and the scales of signal and gradient at the last step."""
    if not history or not names:
        return
    step, last = history[-1]

    def of(statistic: str, values: Mapping[str, float]) -> list[float]:
        return [values.get(tag_of(statistic, name), float("nan")) for name in names]

    shown = [name or "(root)" for name in names]
    for writer in _writers(trainer):
        saturation = [of("saturation", values) for _, values in history]
        writer.add_figure("saturation_by_depth", saturation_figure([s for s, _ in history], shown, saturation), step)
        writer.add_figure("scales", scales_figure(shown, of("input_std", last), of("grad_rms", last)), step)
