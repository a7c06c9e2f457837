import re
from collections import Counter

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import STORE_EVERYTHING_SIZE_GUIDANCE, EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from lightning_noisy.monitoring.statistics import STATISTICS, tag_of
from lightning_noisy.monitoring.tensorboard import EDGES, add_histogram, add_scalars, custom_scalars, histogram
from lightning_noisy.monitoring.weights import WEIGHT_STATISTICS

SITES = ["net.1", "net.10", "block:relu#0", ":relu#0@2", "a-b c+d[0]"]
SCORES = ["anact_score", "anact_score_mean"]
NOISE = ["gradient_noise/std", "gradient_noise/snr", "activation_noise/c"]


def tags_of(sites):
    of_weights = [name for name in WEIGHT_STATISTICS if name != "weight_mean_sum"]
    of_sites = [name for name in STATISTICS if name not in (*SCORES, *WEIGHT_STATISTICS)]
    weights = [tag_of(name, f"{site}.weight") for name in of_weights for site in ("net.0", "net.9")]
    return [*SCORES, *NOISE, *(tag_of(name, site) for name in of_sites for site in sites), *weights, "weight_mean_sum"]


def matches(layout, tags):
    """What TensorBoard draws: of each chart of lines, its tags."""
    return {
        (category, title): [tag for tag in tags if any(re.match(pattern, tag) for pattern in patterns)]
        for category, charts in layout.items()
        for title, (kind, patterns) in charts.items()
        if kind == "Multiline"
    }


def read(folder):
    return EventAccumulator(str(folder), size_guidance=STORE_EVERYTHING_SIZE_GUIDANCE).Reload()


def test_layout_shows_each_tag_in_one_chart_of_lines():
    tags = tags_of(SITES)
    shown = matches(custom_scalars(tags), tags)
    assert Counter(tag for lines in shown.values() for tag in lines) == dict.fromkeys(tags, 1)
    assert shown["activations", "rho"] == [f"rho/{site}" for site in SITES]
    assert shown["activations", "dead_units, dormant_units"] == [
        f"{name}/{site}" for name in ("dead_units", "dormant_units") for site in SITES
    ]
    assert shown["noise", "gradient_noise/snr"] == ["gradient_noise/snr"]
    assert shown["weights", "grad_variance"] == ["grad_variance/net.0.weight", "grad_variance/net.9.weight"]


def test_layout_matches_neither_longer_names_nor_other_statistics():
    (patterns,) = (chart[1] for chart in custom_scalars(["rho/net.1"])["activations"].values())
    others = ["rho/net.10", "rho/net.1.2", "rho/net01", "rho_prime/net.1", "val_rho/net.1"]
    assert [bool(re.match(*patterns, tag)) for tag in ["rho/net.1", *others]] == [True] + [False] * 5


def test_layout_has_only_charts_of_tags_that_are_there():
    assert custom_scalars(["loss", "lr-Adam", "rho2/net.1", "gradient_noisy/std"]) == {}
    assert custom_scalars(["loss", "dormant_units/net.1"]) == {
        "activations": {"dormant_units": ["Multiline", [r"dormant_units/net\.1$"]]}
    }
    assert list(custom_scalars(NOISE)) == ["noise"]


def test_layout_of_noise_has_a_line_for_each_optimizer():
    tags = ["gradient_noise/std/0", "gradient_noise/std/1", "gradient_noise/snr/0"]
    shown = matches(custom_scalars(tags), tags)
    assert shown == {("noise", "gradient_noise/std"): tags[:2], ("noise", "gradient_noise/snr"): tags[2:]}


def test_layout_of_validation_is_apart():
    tags = ["rho/net.1", "val_rho/net.1", "val_anact_score"]
    shown = matches(custom_scalars(tags), tags)
    assert shown["activations", "rho"] == ["rho/net.1"]
    assert shown["validation", "val_rho"] == ["val_rho/net.1"]
    assert shown["validation", "val_anact_score"] == ["val_anact_score"]


@pytest.mark.parametrize(("sites", "sizes"), [(50, [50]), (51, [50, 1]), (120, [50, 50, 20])])
def test_layout_divides_charts_of_many_lines(sites, sizes):
    tags = [f"rho/net.{number}" for number in range(sites)]
    shown = matches(custom_scalars(tags), tags)
    assert [len(lines) for lines in shown.values()] == sizes
    assert [tag for lines in shown.values() for tag in lines] == tags
    together = [f"{name}/net.{number}" for name in ("dead_units", "dormant_units") for number in range(sites)]
    for lines in matches(custom_scalars(together), together).values():
        names = [tag.split("/")[1] for tag in lines]
        assert len(names) <= 50
        assert set(Counter(names).values()) == {2}  # both of the same site


def test_layout_has_margins_of_sites_whose_sides_are_logged():
    tags = [f"{name}/net.1" for name in ("saturation_left", "saturation_right", "saturation")]
    layout = custom_scalars([*tags, "saturation/net.2", "saturation_left/net.3"])
    ((title, (kind, margin)),) = layout["saturation by side"].items()
    assert title.startswith("net.1")
    assert (kind, margin) == ("Margin", ["saturation/net.1", "saturation_left/net.1", "saturation/net.1"])


def test_layout_leaves_out_what_tensorboard_fails_to_draw():
    assert custom_scalars(["rho/(root)", "rho/a"]) == {"activations": {"rho": ["Multiline", ["rho/a$"]]}}


def test_layout_is_what_tensorboard_reads(tmp_path):
    tags = tags_of(SITES)
    with SummaryWriter(tmp_path) as writer:
        writer.add_custom_scalars(custom_scalars(tags))
    (event,) = read(tmp_path).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [each.title for each in layout.category] == ["activations", "noise", "weights", "saturation by side"]
    charts = {chart.title: chart for category in layout.category for chart in category.chart}
    assert [pattern.endswith("$") for pattern in charts["rho"].multiline.tag] == [True] * len(SITES)
    assert len([chart for chart in charts.values() if chart.margin.series]) == len(SITES)


def test_edges_are_symmetric_and_grow_by_a_tenth():
    edges = EDGES.double().numpy()
    np.testing.assert_array_equal(edges, -edges[::-1])
    positive = edges[edges > 0]
    np.testing.assert_allclose(positive[1:] / positive[:-1], 1.1, rtol=1e-6)
    assert positive[0] == pytest.approx(1e-6)
    assert positive[-1] > 1e6
    assert (edges == 0).sum() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_histogram_counts_like_numpy(dtype):
    x = (torch.randn(40, 250, generator=torch.Generator().manual_seed(0)) * 3).to(dtype).relu_()
    x[0] = -x[1]
    expected, _ = np.histogram(x.double().numpy(), bins=EDGES.double().numpy())
    counts = histogram(x, EDGES)
    assert counts.dtype == torch.int64
    np.testing.assert_array_equal(counts.numpy(), expected)
    assert counts.sum() == x.numel()


def test_histogram_puts_edges_into_the_bin_above_and_what_is_beyond_into_the_last():
    x = torch.tensor([-torch.inf, -9, -1, -0.5, -0.0, 0, 1, 2, 9, torch.inf, torch.nan, torch.nan])
    assert histogram(x, torch.tensor([-1.0, 0.0, 1.0, 2.0])).tolist() == [4, 2, 4]


def test_histograms_of_batches_add_up():
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(histogram(x[:33], EDGES) + histogram(x[33:], EDGES), histogram(x, EDGES))
    assert histogram(x[:0], EDGES).sum() == 0


def test_histogram_leaves_its_input_and_needs_no_gradient():
    x = torch.tensor([1.0, torch.nan], requires_grad=True)
    before = x.detach().clone()
    assert not histogram(x, EDGES).requires_grad
    assert torch.equal(x.nan_to_num(7), before.nan_to_num(7))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_histogram_does_not_wait_for_the_device():
    x, edges = torch.randn(1000, device="cuda"), EDGES.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        counts = histogram(x, edges)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(counts.cpu(), histogram(x.cpu(), EDGES))


def test_histogram_is_read_back(tmp_path):
    x = 2 + torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    counts = histogram(x, EDGES)
    with SummaryWriter(tmp_path) as writer:
        for step in (5, 9):
            add_histogram(writer, "activation/net.1", counts.double() * step, EDGES, step)  # as pooled over ranks
        add_histogram(writer, "activation/empty", counts * 0, EDGES, 5)
    events = read(tmp_path)
    assert events.Tags()["histograms"] == ["activation/net.1"]
    first, second = events.Histograms("activation/net.1")
    assert (first.step, second.step) == (5, 9)
    found = first.histogram_value
    assert found.num == 50_000
    assert found.sum / found.num == pytest.approx(x.mean().item(), rel=0.01)
    assert found.sum_squares / found.num == pytest.approx(x.square().mean().item(), rel=0.01)
    # The outermost bins that have elements are those of the smallest and the largest one.
    edges = EDGES.double().numpy()
    smallest, largest = x.min().item(), x.max().item()
    assert found.min == edges[edges <= smallest][-1]
    assert found.max == edges[edges > largest][0]
    assert found.bucket_limit[-1] == found.max
    expected, _ = np.histogram(x.double().numpy(), bins=np.array([found.min, *found.bucket_limit]))
    np.testing.assert_array_equal(np.array(found.bucket), 5 * expected)


def test_histogram_needs_one_edge_more_than_counts(tmp_path):
    with SummaryWriter(tmp_path) as writer, pytest.raises(ValueError, match="3 counts need 4 edges, got 3"):
        add_histogram(writer, "x", torch.ones(3), torch.arange(3.0), 0)


def test_scalars_are_one_event_and_a_closed_writer_opens_again(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        add_scalars(writer, {"a/b": 1.5, "c": float("nan")}, 3)
        add_scalars(writer, {}, 4)
    add_scalars(writer, {"a/b": 2.5, "c": -1.0}, 5)
    add_scalars(writer, {"a/b": 3.5}, 6)
    writer.close()
    add_scalars(writer, {}, 7)
    found = read(tmp_path)
    assert [(event.step, event.value) for event in found.Scalars("a/b")] == [(3, 1.5), (5, 2.5), (6, 3.5)]
    assert [event.step for event in found.Scalars("c")] == [3, 5]
    assert found.Scalars("c")[1].value == -1
