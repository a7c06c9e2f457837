import math
import sys
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lightning_noisy.monitoring.figures import class_figure, saturation_figure, scales_figure

VIRIDIS = {0: (68, 1, 84), 1: (253, 231, 37)}  # as its authors give it
GREY = (191, 191, 191)


def sites_of(count):
    return [f"net.{2 * number + 1}" for number in range(count)]


def drawn(figure):
    figure.canvas.draw()
    return figure


def pixel(figure, axes, x, y):
    """The colour that is drawn at a point, in the data's coordinates."""
    picture = np.asarray(drawn(figure).canvas.buffer_rgba())
    across, up = axes.transData.transform((x, y))
    return tuple(int(each) for each in picture[len(picture) - 1 - round(up), round(across), :3])


def overlapping(labels):
    """Pairs of neighbouring texts that are drawn over each other."""
    boxes = [label.get_window_extent() for label in labels if label.get_visible() and label.get_text()]
    return [(a, b) for a, b in pairwise(boxes) if a.overlaps(b)]


def test_saturation_is_drawn_over_depth_and_time():
    values = [[0.0, 1.0, 1.0], [1.0, 0.0, math.nan]]
    figure = saturation_figure([100, 200], ["a", "b", "c"], values)
    axes = figure.axes[0]
    for column, step in enumerate((100, 200)):
        for row in range(3):
            value = values[column][row]
            assert pixel(figure, axes, step, row) == (GREY if math.isnan(value) else VIRIDIS[value]), (step, row)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]  # from below
    assert "grey" in figure.axes[1].get_ylabel()


def test_saturation_of_uneven_steps_stays_at_its_step():
    figure = saturation_figure([0, 10, 100], ["a"], [[0.0], [1.0], [0.0]])
    axes = figure.axes[0]
    assert [pixel(figure, axes, x, 0) for x in (2, 10, 52, 58)] == [VIRIDIS[0], VIRIDIS[1], VIRIDIS[1], VIRIDIS[0]]


def test_saturation_of_one_step_is_drawn():
    figure = saturation_figure([50], [""], [[1.0]])
    assert pixel(figure, figure.axes[0], 50, 0) == VIRIDIS[1]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["(root)"]


@pytest.mark.parametrize("count", [3, 20, 100, 1000])
def test_names_of_sites_do_not_overlap(count):
    sites = [f"model.encoder.layers.{number}.mlp.activation:gelu#0" for number in range(count)]
    saturation = drawn(saturation_figure([1, 2], sites, [[0.5] * count] * 2))
    scales = drawn(scales_figure(sites, [1.0] * count, [1e-30] * count))
    for labels in (saturation.axes[0].get_yticklabels(), scales.axes[0].get_xticklabels()):
        assert len(labels) >= min(count, 30)
        assert not overlapping(labels)
        assert labels[0].get_text().endswith("layers.0.mlp.activation:gelu#0")
    limits = sorted(scales.axes[0].texts, key=lambda text: text.xy[1])
    assert len(limits) == 4
    assert not overlapping(limits)
    for figure in (saturation, scales):
        width, height = figure.get_size_inches()
        assert width <= 14
        assert height <= 9


def test_check_of_overlaps_sees_one():
    figure = drawn(saturation_figure([1], ["a", "b"], [[0.0, 0.0]]))
    figure.axes[0].set_yticks([0, 0.01], ["a", "b"])
    assert overlapping(drawn(figure).axes[0].get_yticklabels())


def test_scales_are_drawn_as_given_with_the_limits_of_number_formats():
    figure = scales_figure(sites_of(4), [1.0, 0.5, 0.0, math.nan], [1e-6, 1e-5, 1e-4, 1e-3])
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    signal, gradient, *limits = axes.get_lines()
    np.testing.assert_array_equal(signal.get_ydata(), [1.0, 0.5, math.nan, math.nan])
    np.testing.assert_array_equal(gradient.get_ydata(), [1e-6, 1e-5, 1e-4, 1e-3])
    by_style = {
        style: sorted(each.get_ydata()[0] for each in limits if each.get_linestyle() == style) for style in ("--", ":")
    }
    # IEEE 754 binary16; E4M3 and E5M2 as in Table 1 of Micikevicius et al., "FP8 Formats for Deep Learning", 2022.
    assert by_style == {"--": [448.0, 57344.0, 65504.0], ":": [2.0**-14, 2.0**-14, 2.0**-6]}


def test_scales_show_limits_and_all_points():
    figure = drawn(scales_figure(sites_of(3), [1e6, 1.0, 1.0], [1.0, 1.0, 1e-9]))
    low, high = figure.axes[0].get_ylim()
    assert low < 1e-9
    assert high > 1e6
    low, high = drawn(scales_figure(sites_of(1), [1.0], [math.nan])).axes[0].get_ylim()
    assert low < 2.0**-14
    assert high > 65504


@pytest.mark.parametrize("classes", [1, 3, 10, 40])
def test_medians_and_deviations_are_drawn_at_their_units(classes):
    generator = np.random.default_rng(0)
    medians, deviations = generator.random((classes, 7)), generator.random((classes, 7))
    medians[0, 2] = math.nan
    figure = drawn(class_figure(medians.tolist(), deviations.tolist(), "net.1"))
    for axes, table in zip(figure.axes, (medians, deviations), strict=False):
        lines = axes.get_lines()
        np.testing.assert_allclose([line.get_ydata() for line in lines], table)
        assert all(list(line.get_xdata()) == list(range(7)) for line in lines)
        assert len({line.get_color() for line in lines}) == classes
    assert figure.axes[0].get_title().startswith("net.1")
    legend = figure.axes[0].get_legend()
    assert (legend is None) == (classes > 10)
    assert len(figure.axes) == (3 if classes > 10 else 2)  # a colour bar in place of the legend
    if legend is not None:
        assert [text.get_text() for text in legend.get_texts()] == [str(number) for number in range(classes)]


FIGURES = [
    lambda: saturation_figure([1], ["a"], [[0.5]]),
    lambda: scales_figure(["a"], [1.0], [1.0]),
    lambda: class_figure([[0.5]], [[0.1]], "a"),
]


@pytest.mark.parametrize("draw", FIGURES)
def test_figures_are_unknown_to_pyplot(draw):
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    assert isinstance(draw().canvas, FigureCanvasAgg)
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize("draw", FIGURES)
def test_figures_say_that_they_need_matplotlib(draw, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw()


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: saturation_figure([1, 2], ["a"], [[0.5]]), r"2 steps of 1 sites each.* got shape \(1, 1\)"),
        (lambda: saturation_figure([], ["a"], []), "0 steps of 1 sites"),
        (lambda: scales_figure(["a"], [1.0], []), "got 1 and 0 for 1"),
        (lambda: scales_figure([], [], []), "got 0 and 0 for 0"),
        (lambda: class_figure([[0.5]], [[0.1, 0.2]], "a"), r"\(1, 1\) and \(1, 2\)"),
        (lambda: class_figure([], [], "a"), "classes, units"),
    ],
)
def test_figures_refuse_sizes_that_do_not_fit(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
