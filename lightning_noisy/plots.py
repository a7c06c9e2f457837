"""Plots of activations by name; needs matplotlib (``pip install lightning_noisy[examples]``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from lightning_noisy.functional.scores import gains
from lightning_noisy.functional.slopes import slope
from lightning_noisy.nn import registry
from lightning_noisy.nn.noisy import NoisyActivation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_activation", "plot_r_scores"]


def _axes(axes: Axes | None) -> Axes:
    if axes is not None:
        return axes
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install matplotlib.") from error
    return pyplot.subplots()[1]


def plot_activation(
    name: str,
    *,
    function: str = "tanh",
    label: str | None = None,
    derivative: bool = False,
    reach: float = 4.0,
    draws: int = 500,
    axes: Axes | None = None,
) -> Axes:
    """Draw an activation, as in Fig. 1 (derivatives) and 4 (noise) of Gulcehre et al. (2016).

    Args:
        name: a name of :func:`lightning_noisy.nn.registry.names`, optionally with options: ``"nah(alpha=1.15, c=2)"``.
        function: the function whose hard version a noisy name uses, or that ``"normalized"`` normalizes.
        label: label in the legend; by default the name.
        derivative: draw the derivative instead.
        reach: the input goes from ``-reach`` to ``reach``, > 0.
        draws: number of noisy points to add for a noisy activation, whose p is 1; >= 0.
        axes: where to draw; by default in a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the name is unknown.
    """
    axes = _axes(axes)
    x = torch.linspace(-reach, reach, 801)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = registry.create(name, function=function)
        if isinstance(module, NoisyActivation) and module.p is not None:
            module.p.fill_(1)
        points = (2 * torch.rand(draws) - 1) * reach
        noisy = module(points) if isinstance(module, NoisyActivation) and draws and not derivative else None
        module.eval()
        (line,) = axes.plot(x, slope(module, x) if derivative else module(x), label=label or name)
        if noisy is not None:
            axes.plot(points, noisy, ".", markersize=2, alpha=0.5, color=line.get_color(), label="_draws")
    axes.set_xlabel("input")
    axes.set_ylabel("derivative" if derivative else "output")
    axes.legend()
    return axes


def plot_r_scores(names: Iterable[str], *, sigmas: Sequence[float] | None = None, axes: Axes | None = None) -> Axes:
    """Draw the R-scores over the input's standard deviation, as in Fig. 2 of Yuan et al. (2022).

    Args:
        names: names of :func:`lightning_noisy.nn.registry.names`; noisy ones have p = 1.
        sigmas: standard deviations, > 0; by default 40 from 0.1 to 10.
        axes: where to draw; by default in a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if a name is unknown, or a standard deviation not > 0.
    """
    axes = _axes(axes)
    sigmas = torch.logspace(-1, 1, 40).tolist() if sigmas is None else list(sigmas)
    for name in names:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            module = registry.create(name)
            if isinstance(module, NoisyActivation) and module.p is not None:
                module.p.fill_(1)
        axes.plot(sigmas, [gains(module, sigma).r_score for sigma in sigmas], label=name)
    axes.set_xscale("log")
    axes.set_xlabel("standard deviation of the input")
    axes.set_ylabel("R-score")
    axes.legend()
    return axes
