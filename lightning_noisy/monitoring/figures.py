"""Pictures of what the activations do; need matplotlib (``pip install lightning_noisy[examples]``).

They are plain figures that pyplot doesn't know: nothing has to be closed, and no window opens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = ["class_figure", "saturation_figure", "scales_figure"]

_NAME = 32  # characters of a site's name
# Of a number format: its smallest normal and its largest number are limits of what it can represent well.
_FORMATS = {"FP16": torch.float16, "FP8 E5M2": torch.float8_e5m2, "FP8 E4M3": torch.float8_e4m3fn}


def _figure(width: float, height: float) -> Figure:
    """A figure without pyplot; inches, at 100 dots an inch."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install matplotlib.") from error
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _shown(name: str) -> str:
    """The end of a long name tells it from others."""
    name = name or "(root)"
    return name if len(name) <= _NAME else "…" + name[1 - _NAME :].lstrip(".")


def _name_ticks(axis: Axis, sites: Sequence[str], most: int, *, rotation: float = 0) -> None:
    """Write the names at an axis: all, or every n-th so that there are at most ``most``."""
    stride = -(-len(sites) // most)
    places = range(0, len(sites), stride)
    axis.set_ticks(list(places), [_shown(sites[place]) for place in places], fontsize=8, rotation=rotation)


def saturation_figure(steps: Sequence[int], sites: Sequence[str], values: Sequence[Sequence[float]]) -> Figure:
    """Draw the saturation over depth and time: what saturates first, and whether it recovers.

    Each site is a row, the one next to the input at the bottom; each logged step is a column, as wide as it is until
    the middle between its neighbours. NaN is grey.

    Args:
        steps: logged steps, ascending, at least one.
        sites: names, in the order of the calls, at least one.
        values: shares in [0, 1]: of each step, one for each site.

    Returns:
        The figure.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the sizes don't fit.

    >>> figure = saturation_figure([50, 100], ["net.1", "net.3"], [[0.0, 0.1], [0.2, float("nan")]])
    >>> figure.axes[0].get_xlabel()
    'step'
    """
    table = torch.tensor(values, dtype=torch.float64)
    if table.shape != (len(steps), len(sites)) or not table.numel():
        raise ValueError(
            f"values must be {len(steps)} steps of {len(sites)} sites each, at least one of one, "
            f"got shape {tuple(table.shape)}."
        )
    figure = _figure(8, min(9.0, 1.4 + 0.2 * max(4, len(sites))))
    from matplotlib import colormaps

    axes = figure.subplots()
    image = axes.pcolormesh(
        _borders([float(step) for step in steps]),
        [row - 0.5 for row in range(len(sites) + 1)],
        table.T.numpy(),
        vmin=0,
        vmax=1,
        cmap=colormaps["viridis"].with_extremes(bad="0.75"),
    )
    bar = figure.colorbar(image, ax=axes, aspect=30)
    bar.set_label("saturation" + (" (grey: undefined)" if table.isnan().any() else ""))
    axes.set_xlabel("step")
    axes.locator_params("x", integer=True)
    _name_ticks(axes.yaxis, sites, 38)
    return figure


def _borders(places: Sequence[float]) -> list[float]:
    """Borders of columns around these places, half-way between neighbours."""
    if len(places) == 1:
        return [places[0] - 0.5, places[0] + 0.5]
    middles = [(a + b) / 2 for a, b in pairwise(places)]
    return [2 * places[0] - middles[0], *middles, 2 * places[-1] - middles[-1]]


def scales_figure(sites: Sequence[str], forward: Sequence[float], backward: Sequence[float]) -> Figure:
    """Draw how large signal and gradient are at each site, with the limits of number formats.

    The numbers are drawn as they are, over a logarithmic axis. Sites are from left to right in the order of the calls:
    the signal goes to the right, the gradient to the left. Dashed lines are the largest numbers of FP16 and of the FP8
    formats E5M2 and E4M3, dotted ones their smallest normal numbers, below which they lose digits. As scales are the
    typical size of elements, the largest elements reach a limit before the line does.

    Args:
        sites: names, in the order of the calls, at least one.
        forward: of each site, the scale of its signal, such as the standard deviation or the root mean square of the
            pre-activation or of the activation; what is not > 0 or NaN is left out.
        backward: of each site, the scale of its gradient, such as its root mean square.

    Returns:
        The figure.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the numbers of sites and scales differ.

    >>> figure = scales_figure(["net.1", "net.3"], [1.0, 0.5], [1e-3, 2e-3])
    >>> [line.get_label() for line in figure.axes[0].get_lines()[:2]]
    ['signal (forward)', 'gradient (backward)']
    """
    if not len(sites) == len(forward) == len(backward) or not sites:
        raise ValueError(
            f"Each site needs a forward and a backward scale, got {len(forward)} and {len(backward)} for {len(sites)}."
        )
    longest = max(len(_shown(site)) for site in sites)
    figure = _figure(min(14.0, 6 + 0.16 * len(sites)), 5 + 0.07 * longest)  # names are written upwards
    axes = figure.subplots()
    places = range(len(sites))
    for scales, label, mark in ((forward, "signal (forward)", "o-"), (backward, "gradient (backward)", "s-")):
        positive = [scale if scale > 0 else float("nan") for scale in scales]
        axes.plot(places, positive, mark, markersize=4, label=label)
    _draw_limits(axes)
    axes.set_yscale("log")
    axes.set_ylabel("scale")
    axes.set_xlim(-0.5, len(sites) - 0.5)
    _name_ticks(axes.xaxis, sites, 60, rotation=90)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    return figure


def _draw_limits(axes: Axes) -> None:
    """Lines at the formats' limits, with their names at the right; limits less than 1.5 times apart share a text."""
    for style, sign in (("--", "largest"), (":", "min. normal")):
        limits: dict[float, list[str]] = {}
        for name, dtype in _FORMATS.items():
            info = torch.finfo(dtype)
            limit = info.max if style == "--" else info.smallest_normal
            axes.axhline(limit, linestyle=style, linewidth=1.5, color="0.6")
            near = next((known for known in limits if 1 / 1.5 < limit / known < 1.5), limit)
            limits.setdefault(near, []).append(name)
        for limit, names in limits.items():
            axes.annotate(
                f"{sign}: {', '.join(names)}",
                (1, limit),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize=7,
                va="center",
            )


def class_figure(medians: Sequence[Sequence[float]], deviations: Sequence[Sequence[float]], site: str) -> Figure:
    """Draw where the activations of each class are at each unit, as in Fig. 5-7 of Pretorius et al. (2019).

    Above, the median over the samples of a class, below their standard deviation: one point for each class and unit. If
    the points of a unit are apart, and further apart than the deviations, the unit separates classes; if they lie on
    each other, it doesn't.

    Args:
        medians: of each class, one number for each unit; NaN for a class without samples.
        deviations: of each class, one number for each unit, >= 0.
        site: name of the site.

    Returns:
        The figure.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the sizes don't fit.

    >>> figure = class_figure([[0.1, 0.9], [0.5, 0.5]], [[0.05, 0.1], [0.2, 0.1]], "net.1")
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['median', 'standard deviation']
    """
    tables = [torch.tensor(each, dtype=torch.float64) for each in (medians, deviations)]
    if tables[0].dim() != 2 or tables[0].shape != tables[1].shape or not tables[0].numel():
        shapes = " and ".join(str(tuple(each.shape)) for each in tables)
        raise ValueError(f"medians and deviations must both be of shape (classes, units), got {shapes}.")
    classes, units = tables[0].shape
    figure = _figure(9, 5.5)
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    few = classes <= 10
    colours = [colormaps["tab10"](n) if few else colormaps["viridis"](n / (classes - 1)) for n in range(classes)]
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for axes, table, label in ((above, tables[0], "median"), (below, tables[1], "standard deviation")):
        for number, row in enumerate(table.tolist()):
            axes.plot(
                range(units), row, ".", markersize=8 if units <= 50 else 4, color=colours[number], label=str(number)
            )
        axes.set_ylabel(label)
    above.set_title(f"{_shown(site)}: activations by class")
    below.set_xlabel("unit")
    below.locator_params("x", integer=True)
    if few:
        above.legend(title="class", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    else:
        scale = ScalarMappable(Normalize(0, classes - 1), colormaps["viridis"])
        figure.colorbar(scale, ax=[above, below], label="class")
    return figure
