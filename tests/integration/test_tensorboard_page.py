"""What TensorBoard draws of the layout, the histograms and the figures, in a browser."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import coordinates, open_board, pixels_of

from lightning_noisy.monitoring.figures import saturation_figure
from lightning_noisy.monitoring.tensorboard import EDGES, add_histogram, custom_scalars, histogram

pytestmark = [pytest.mark.browser, pytest.mark.slow]

SITES = ["net.1", "net.10", "block:relu#0", ":relu#0@2"]
STEPS = range(20)
LINES = {name: [f"{name}/{site}" for site in SITES] for name in ("rho", "saturation")}
# As if λ of net.10 came from elsewhere: the layout has a line for net.1 alone.
LINES |= {"lambda": ["lambda/net.1"], "gradient_noise/std": ["gradient_noise/std"]}
SIDES = [f"saturation_{side}/net.1" for side in ("left", "right")]
LINES |= {tag.split("/")[0]: [tag] for tag in SIDES}
LOGGED = [tag for tags in LINES.values() for tag in tags]
SVG = "forceSVG=true"  # curves as elements of the page, not as a picture of the graphics card


def value_of(tag, step):
    """Different curves, between 0 and 1."""
    return 0.5 + 0.05 * (1 + LOGGED.index(tag)) * math.sin(step / 3 + LOGGED.index(tag))


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    from torch.utils.tensorboard import SummaryWriter

    folder = tmp_path_factory.mktemp("events")
    with SummaryWriter(folder) as writer:
        for step in STEPS:
            for tag in LOGGED:
                writer.add_scalar(tag, value_of(tag, step), step)
            writer.add_scalar("lambda/net.10", 1, step)
        writer.add_custom_scalars(custom_scalars([*LOGGED, "loss"]))
        for step in range(3):
            draws = torch.randn(1000, generator=torch.Generator().manual_seed(step))
            add_histogram(writer, "activation/net.1", histogram(draws, EDGES), EDGES, step)
        writer.add_figure("saturation over depth", saturation_figure([1, 2], ["net.1", "net.3"], [[0, 1], [1, 1]]), 2)
    with open_board(folder) as (page, address):
        yield SimpleNamespace(page=page, address=address)


def cards(board):
    """The charts of the custom scalars by title, once all have loaded their lines."""
    from playwright.sync_api import expect

    board.page.goto(f"{board.address}/?{SVG}#custom_scalars")
    found = board.page.locator("tf-custom-scalar-multi-line-chart-card")
    expect(found).to_have_count(len(LINES))
    by_title = {card.evaluate("card => card.title"): card for card in found.all()}
    for title, tags in LINES.items():
        expect(by_title[title].locator("path.line[d^=M]")).to_have_count(2 * len(tags))  # smoothed and not
    return by_title


def test_time_series_draw_the_logged_curve_of_each_site(board):
    from playwright.sync_api import expect

    board.page.goto(f"{board.address}/?{SVG}&tagFilter=rho#timeseries")
    found = board.page.locator("scalar-card:has(path[style*=stroke])")
    expect(found).to_have_count(len(SITES))
    for card in found.all():
        tag = card.locator("[title^=rho]").first.get_attribute("title")
        raw, smooth = card.locator("path[style*=stroke]").all()
        heights = coordinates(raw.get_attribute("d"))[:, 1]
        values = [value_of(tag, step) for step in STEPS]
        assert np.corrcoef(heights, values)[0, 1] == pytest.approx(-1, abs=1e-6)  # y goes down
        colour = smooth.evaluate("path => getComputedStyle(path).stroke")
        chart = card.locator("svg:has(path[style*=stroke])")
        assert pixels_of(chart.screenshot(), colour) > 100
        card.locator("path[style*=stroke]").evaluate_all("paths => paths.forEach(path => path.style.opacity = 0)")
        assert pixels_of(chart.screenshot(), colour) == 0


def test_custom_scalars_draw_a_line_for_each_site_and_no_other(board):
    by_title = cards(board)
    assert set(by_title) == set(LINES)
    for title, tags in LINES.items():
        card = by_title[title]
        entries = card.locator(".match-list-entry").evaluate_all("all => all.map(each => each.textContent)")
        assert {entry.split()[1] for entry in entries} == set(tags), title
        assert len(entries) == len(tags)
        lines = card.locator("path.line[d^=M]")
        colour = lines.first.evaluate("path => getComputedStyle(path).stroke")
        assert pixels_of(card.screenshot(), colour) > 100 * len(tags), title


def test_margin_chart_fills_what_is_right_of_zero(board):
    cards(board)
    card = board.page.locator("tf-custom-scalar-margin-chart-card")
    assert card.count() == 1
    area = card.locator("path.area[d^=M]")
    area.wait_for(state="attached")
    points = coordinates(area.get_attribute("d").rstrip("Z"))
    upper, lower = points[: len(STEPS), 1], points[len(STEPS) :, 1][::-1]
    part = [value_of("saturation/net.1", step) - value_of("saturation_left/net.1", step) for step in STEPS]
    assert np.abs(np.corrcoef(lower - upper, part)[0, 1]) == pytest.approx(1, abs=1e-6)


def test_histograms_and_images_are_drawn(board):
    from playwright.sync_api import expect

    page = board.page
    page.goto(f"{board.address}/#histograms")
    slices = page.locator("tf-histogram-loader .histogram path")
    expect(slices).to_have_count(3)
    page.goto(f"{board.address}/#images")
    image = page.locator("tf-image-loader img").first
    image.wait_for()
    page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=image.element_handle())
    assert pixels_of(image.screenshot(), "rgb(253, 231, 37)") > 1000  # the colour of 1
