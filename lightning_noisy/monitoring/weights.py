"""Sums over weight matrices, their gradients and their updates, at the steps that are logged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_noisy.monitoring.statistics import tag_of
from lightning_noisy.monitoring.sums import Pooled

__all__ = ["WEIGHT_STATISTICS", "WeightSums"]

WEIGHT_STATISTICS = ("weight_mean", "weight_mean_sum", "grad_variance", "update_ratio")


class WeightSums:
    """Measures the weight matrices of a model in one step: of all ranks if each has a part of them, or all of them.

    Args:
        names: the parameters with their names; those with fewer than two dimensions are no weight matrices.
        statistics: what to measure, of :data:`WEIGHT_STATISTICS`. ``"update_ratio"`` keeps a copy of the weights during
            the steps that are measured.
        device: where the sums are.
    """

    def __init__(self, names: Mapping[nn.Parameter, str], statistics: Sequence[str], *, device: torch.device) -> None:
        self._statistics = [name for name in statistics if name in WEIGHT_STATISTICS]
        matrices = {each: name for each, name in names.items() if each.dim() > 1 and each.is_floating_point()}
        self._rows = {parameter: row for row, parameter in enumerate(matrices)} if self._statistics else {}
        self._names = list(matrices.values())
        dtype = torch.float32 if device.type == "mps" else torch.float64
        # Rows: number, Σg, Σg² of the gradient; number, Σw of the weight; ΣΔw², Σw² of the update.
        self._sums = torch.zeros(7, len(self._rows), dtype=dtype, device=device)
        self._before: dict[nn.Parameter, Tensor] = {}

    def before_step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Measure the gradients, after unscaling and before clipping, and keep the weights."""
        for parameter in parameters:
            row = self._rows.get(parameter)
            if row is None:
                continue
            if "grad_variance" in self._statistics and parameter.grad is not None:
                gradient = self._local(parameter.grad)
                self._sums[0, row] = gradient.numel()
                self._sums[1, row] = gradient.sum()
                self._sums[2, row] = gradient.square().sum()
            if "update_ratio" in self._statistics:
                self._before[parameter] = _part(parameter).clone()

    def after_step(self) -> None:
        """Measure the weights and how far they moved."""
        for parameter, row in self._rows.items():
            if "weight_mean" in self._statistics or "weight_mean_sum" in self._statistics:
                weight = self._local(parameter)
                self._sums[3, row], self._sums[4, row] = weight.numel(), weight.sum()
            before = self._before.pop(parameter, None)
            if before is not None:
                old = before.to(self._sums.dtype)
                self._sums[5, row] = (self._local(parameter) - old).square().sum()
                self._sums[6, row] = old.square().sum()

    def extra(self) -> dict[str, Tensor]:
        """What to add up over the ranks; the next step starts anew."""
        sums = self._sums.clone()
        self._sums.zero_()
        self._before.clear()
        return {"weights": sums} if len(self._rows) else {}

    def values(self, pooled: Pooled) -> dict[str, float]:
        """The statistics by tag, of the parameters that were measured."""
        if not self._rows:
            return {}
        size, first, second, number, total, moved, old = pooled.extra["weights"]
        mean = first / size
        means = (total / number).abs()
        columns = {
            "weight_mean": means,
            "grad_variance": (second / size - mean * mean).clamp_min(0),
            "update_ratio": (moved / old).sqrt(),
        }
        measured = {"weight_mean": number, "grad_variance": size, "update_ratio": old}
        values = {
            tag_of(statistic, name): value
            for statistic, column in columns.items()
            if statistic in self._statistics
            for name, value, count in zip(self._names, column.tolist(), measured[statistic].tolist(), strict=True)
            if count > 0
        }
        if "weight_mean_sum" in self._statistics:
            values["weight_mean_sum"] = float(means.sum())
        return values

    @torch.no_grad()
    def _local(self, tensor: Tensor) -> Tensor:
        """This rank's part, in the dtype of the sums: squares of vanishing gradients would underflow in float32."""
        return _part(tensor).to(self._sums.dtype)


def _part(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
