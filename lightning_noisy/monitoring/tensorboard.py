"""What TensorBoard shows beside plain scalars: charts that compare sites, and histograms counted on the device."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor

from lightning_noisy.monitoring.statistics import STATISTICS
from lightning_noisy.monitoring.weights import WEIGHT_STATISTICS

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["EDGES", "add_histogram", "add_scalars", "custom_scalars", "histogram"]

_POSITIVE = torch.tensor([1e-6 * 1.1**power for power in range(291)], dtype=torch.float32)  # up to 1.01e6
EDGES = torch.cat([-_POSITIVE.flip(0), torch.zeros(1), _POSITIVE])
"""Edges of 582 bins, symmetric, each 1.1 times as far from 0 as the last, as TensorBoard's default ones; float32."""

_LINES = 50  # of a chart: more can't be told apart, and the address that a chart loads from may have 65,536 characters
_SCORES = ("anact_score", "anact_score_mean")
_TOGETHER = ("dead_units", "dormant_units")  # in one chart
_SIDES = ("saturation", "saturation_left", "saturation_right")
_NOISE = ("gradient_noise", "activation_noise", "activation_blend")
_OF_ACTIVATIONS = tuple(
    _TOGETHER if name == "dead_units" else (name,)
    for name in dict.fromkeys((*_SCORES, *STATISTICS))
    if name not in (*WEIGHT_STATISTICS, "dormant_units")
)


def add_scalars(writer: SummaryWriter, scalars: Mapping[str, float], step: int) -> None:
    """Write scalars as one event, in a tenth of the time that ``writer.add_scalar`` takes for each of them.

    Args:
        writer: of TensorBoard, also a closed one, as a logger's is after a fit.
        scalars: values by tag.
        step: of the training.
    """
    rest = [*scalars.items()]
    if not rest:
        return
    if writer.file_writer is None:  # a closed writer, which this opens again
        writer.add_scalar(*rest.pop(0), step)
    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in rest]
    writer.file_writer.add_summary(Summary(value=values), step)  # type: ignore[attr-defined]


def custom_scalars(tags: Iterable[str]) -> dict[str, dict[str, list[str | list[str]]]]:
    r"""A layout for ``SummaryWriter.add_custom_scalars``: one chart for each statistic, with a line for each site.

    Charts of more than 50 lines are divided. The categories, as far as there are tags for them:

    - ``"activations"``: the ANAct scores and the statistics of sites; dead and dormant units share a chart;
    - ``"noise"``: of the gradients and of the activations;
    - ``"weights"``: the statistics of weight matrices;
    - ``"validation"``: as ``"activations"``, of the tags that begin with ``val_``;
    - ``"saturation by side"``: one chart for each site whose saturation is logged by the side of h. Its line is the
      saturation; the band below reaches from the part at h < 0 up to it, so its height is the part at h >= 0.

    Args:
        tags: of the scalars that are logged, in the order that charts show. Unknown ones are left out, and those with a
            parenthesis: TensorBoard takes the tag from it on for the name of the run, and fails to draw the chart.

    Returns:
        The layout: categories of charts by title. A chart is ``["Multiline", patterns]``, where each pattern matches
        one tag, or ``["Margin", [value, lower, upper]]`` with tags.

    >>> layout = custom_scalars(["rho/net.1", "rho/net.10", "loss"])
    >>> layout == {"activations": {"rho": ["Multiline", ["rho/net\\.1$", "rho/net\\.10$"]]}}
    True
    """
    found: dict[str, list[str]] = {}
    for tag in dict.fromkeys(tag for tag in tags if "(" not in tag):
        statistic, *rest = tag.split("/")
        found.setdefault("/".join([statistic, *rest[:1]]) if statistic in _NOISE else statistic, []).append(tag)
    noise = tuple((chart,) for chart in found if chart.split("/")[0] in _NOISE)
    validation = tuple(tuple(f"val_{name}" for name in names) for names in _OF_ACTIVATIONS)
    layout = {
        "activations": _charts(found, _OF_ACTIVATIONS),
        "noise": _charts(found, noise),
        "weights": _charts(found, tuple((name,) for name in WEIGHT_STATISTICS)),
        "validation": _charts(found, validation),
        "saturation by side": _margins(found),
    }
    return {category: charts for category, charts in layout.items() if charts}


def _charts(found: dict[str, list[str]], wanted: Iterable[tuple[str, ...]]) -> dict[str, list[str | list[str]]]:
    """Charts of lines, each of some statistics."""
    charts: dict[str, list[str | list[str]]] = {}
    for statistics in wanted:
        present = [name for name in statistics if name in found]
        longest = max((len(found[name]) for name in present), default=0)
        size = _LINES // max(1, len(present))
        for start in range(0, longest, size):
            part = f" {start + 1}-{min(start + size, longest)}" if longest > size else ""
            lines = [tag for name in present for tag in found[name][start : start + size]]
            # TensorBoard matches the beginning of a tag: without its end, net.1 would match net.10, too.
            charts[", ".join(present) + part] = ["Multiline", [re.escape(tag) + "$" for tag in lines]]
    return charts


def _margins(found: dict[str, list[str]]) -> dict[str, list[str | list[str]]]:
    """Charts of the saturation of one site each, by the side of h."""
    logged = {tag for name in _SIDES for tag in found.get(name, ())}
    charts: dict[str, list[str | list[str]]] = {}
    for value in found.get("saturation", ()):
        name = value.partition("/")[2]
        left, right = (f"{side}/{name}" for side in _SIDES[1:])
        if {left, right} <= logged:
            charts[f"{name}: left below the band, right in it"] = ["Margin", [value, left, value]]
    return charts


@torch.no_grad()
def histogram(x: Tensor, edges: Tensor) -> Tensor:
    """Count the elements of bins, on the device and without waiting for it; counts of ranks and batches add up.

    A bin has its lower edge and not its upper one. The outermost bins have what is beyond them, too; NaN is in none.

    Args:
        x: any shape, floating point.
        edges: in ascending order on x's device, shape (bins + 1,); :data:`EDGES` for activations. Those of a dtype that
            is less exact than float32 are taken as float32.

    Returns:
        The counts, int64, shape (bins,).

    >>> histogram(torch.tensor([-5.0, 0.0, 0.5, 1.0, 7.0]), torch.tensor([-1.0, 0.0, 1.0, 2.0])).tolist()
    [1, 2, 2]
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    flat, edges = x.detach().reshape(-1).to(dtype), edges.to(dtype)
    bins = len(edges) - 1
    index = torch.bucketize(flat, edges[1:-1], right=True)
    index = index.masked_fill_(flat.isnan(), bins)
    # Not torch.bincount, which waits for the device.
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=x.device)
    return counts.index_add_(0, index, torch.ones_like(index))[:-1]


def add_histogram(writer: SummaryWriter, tag: str, counts: Tensor, edges: Tensor, step: int) -> None:
    """Write a histogram that is counted already.

    Its minimum, maximum, sum and sum of squares follow from the bins: the edges of those that have elements, and the
    bins' middles. Nothing is written if all counts are 0.

    Args:
        writer: of TensorBoard.
        tag: name of the histogram.
        counts: shape (bins,).
        edges: of the bins, shape (bins + 1,).
        step: of the training.

    Raises:
        ValueError: if there isn't one edge more than counts.
    """
    if len(edges) != len(counts) + 1:
        raise ValueError(f"{len(counts)} counts need {len(counts) + 1} edges, got {len(edges)}.")
    used = [number for number, count in enumerate(counts.tolist()) if count > 0]
    if not used:
        return
    first, last = used[0], used[-1]
    limits = edges[first : last + 2].cpu().double()
    inside = counts[first : last + 1].cpu().double()
    middles = (limits[1:] + limits[:-1]) / 2
    writer.add_histogram_raw(
        tag,
        min=limits[0].item(),
        max=limits[-1].item(),
        num=int(inside.sum()),
        sum=(inside * middles).sum().item(),
        sum_squares=(inside * middles**2).sum().item(),
        bucket_limits=limits[1:].tolist(),
        bucket_counts=inside.tolist(),
        global_step=step,
    )
