"""What ActivationMonitor writes to loggers beside scalars, and how scalars are named there."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import Net, batches, loader, quiet_trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import STORE_EVERYTHING_SIZE_GUIDANCE, EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import nn

from lightning_noisy import ActivationMonitor, GradientNoise

DEEP = [8, 16, 16]


def deep():
    torch.manual_seed(0)
    layers = [layer for size, width in pairwise(DEEP) for layer in (nn.Linear(size, width), nn.ReLU())]
    return Net(nn.Sequential(*layers, nn.Linear(16, 3)))


def events(folder):
    return EventAccumulator(str(folder), size_guidance=STORE_EVERYTHING_SIZE_GUIDANCE).Reload()


def fitted(folder, *, steps=4, epochs=1, callbacks=(), **options):
    trainer = quiet_trainer(
        callbacks=[ActivationMonitor(**options), *callbacks],
        logger=TensorBoardLogger(folder, "", ""),
        max_epochs=epochs,
    )
    model = deep()
    trainer.fit(model, loader(batches(steps, 16)))
    return model, events(folder)


def test_charts_are_laid_out_with_the_noise_beside_the_activations(tmp_path):
    _, found = fitted(tmp_path, callbacks=[GradientNoise(seed=0)])
    (config,) = found.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(config.tensor_proto.string_val[0])
    charts = {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in layout.category
    }
    assert charts["activations"]["rho"] == [r"rho/net\.1$", r"rho/net\.3$"]
    assert {"rho", "rho_prime", "r_score", "saturation", "sparsity", "dead_units", "anact_score"} <= set(
        charts["activations"]
    )
    assert {"gradient_noise/std", "gradient_noise/snr"} <= set(charts["noise"])


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_layout_is_written_once(tmp_path, steps):
    _, found = fitted(tmp_path, steps=steps, epochs=2)
    assert len(found.Tensors("custom_scalars__config__")) == 1


def test_findings_are_a_text(tmp_path):
    class Zero(Net):
        def configure_optimizers(self):
            for parameter in self.parameters():
                nn.init.zeros_(parameter)
            return super().configure_optimizers()

    trainer = quiet_trainer(callbacks=[ActivationMonitor()], logger=TensorBoardLogger(tmp_path, "", ""))
    trainer.fit(Zero(), loader(batches(3)))
    (text,) = events(tmp_path).Tensors("findings/text_summary")
    assert b"The input of net.1 (relu) doesn't vary since step 0" in text.tensor_proto.string_val[0]


def test_histograms_are_of_the_pre_activations(tmp_path):
    _, found = fitted(tmp_path, steps=1, histograms=True)
    (event,) = found.Histograms("pre_activation/net.1")
    assert sorted(found.Tags()["histograms"]) == ["pre_activation/net.1", "pre_activation/net.3"]
    (x, _), first = batches(1, 16)[0], deep().net[0]
    h = first(x).detach().double().numpy()
    value = event.histogram_value
    assert value.num == h.size
    assert value.sum == pytest.approx(h.sum(), abs=0.05 * np.abs(h).sum())
    below = sum(count for limit, count in zip(value.bucket_limit, value.bucket, strict=True) if limit <= 0)
    assert below == (h < 0).sum()


def test_figures_are_drawn_at_the_end_of_each_epoch(tmp_path):
    _, found = fitted(tmp_path, steps=3, epochs=2, figures=True, classes=3)
    assert {tag: len(found.Images(tag)) for tag in found.Tags()["images"]} == {
        "saturation_by_depth": 2, "scales": 2, "class_activations/net.1": 2, "class_activations/net.3": 2,
    }  # fmt: skip
    assert [event.step for event in found.Images("scales")] == [2, 5]


def test_quiet_by_default(tmp_path):
    _, found = fitted(tmp_path)
    assert found.Tags()["images"] == found.Tags()["histograms"] == []


class MLFlowLogger(DummyLogger):
    """Stands for Lightning's, by its name."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def log_metrics(self, metrics, step=None):
        self.seen.update(metrics)


def test_loggers_that_refuse_characters_get_other_names(tmp_path):
    class Calls(Net):
        def training_step(self, batch, batch_idx):
            x, y = batch
            x = torch.relu(x) - 1
            return nn.functional.cross_entropy(self.net(torch.relu(x)), y)

    logger, table = MLFlowLogger(), CSVLogger(tmp_path, "", "")
    trainer = quiet_trainer(callbacks=[ActivationMonitor(statistics="rho")], logger=[logger, table])
    trainer.fit(Calls(), loader(batches(2)))
    assert set(logger.seen) == {"rho/.relu-0", "rho/.relu-1", "rho/net.1"}
    assert "rho/:relu#1" in (tmp_path / "metrics.csv").read_text()


def test_figures_without_matplotlib_are_refused_at_once(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="figures=True needs matplotlib"):
        ActivationMonitor(figures=True)


def test_long_runs_keep_a_bounded_history(monkeypatch):
    monkeypatch.setattr("lightning_noisy.callbacks.activation_monitor._HISTORY", 8)
    monitor = ActivationMonitor()
    quiet_trainer(callbacks=[monitor]).fit(deep(), loader(batches(50)))
    steps = [step for step, _ in monitor._history]
    assert len(steps) <= 8
    assert (steps[0], steps[-1]) == (0, 49)
    assert steps == sorted(steps)


def test_report_after_the_fit_has_the_sites_in_the_order_of_their_calls():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Tanh(), nn.ReLU()
            self.b, self.a = nn.Linear(8, 3), nn.Linear(8, 8)

        def forward(self, x):
            return self.b(self.last(self.a(self.first(self.a(x)))))

    monitor = ActivationMonitor()
    quiet_trainer(callbacks=[monitor]).fit(Net(Backwards()), loader(batches(2)))
    assert [site["name"] for site in monitor.report.sites] == ["net.first", "net.last"]
    assert "net.first  relu" in str(monitor.report)


def test_two_monitors_do_not_disturb_each_other():
    first, second = ActivationMonitor(sites="net.1"), ActivationMonitor(every_n_steps=2, sites="net.3")
    trainer = quiet_trainer(callbacks=[first, second])
    trainer.fit(deep(), loader(batches(4)))
    assert {"rho/net.1", "rho/net.3"} <= set(trainer.callback_metrics)
    assert [len(each._history) for each in (first, second)] == [4, 2]


def test_findings_are_said_after_an_interrupt_and_after_a_healthy_fit(caplog):
    class Interrupted(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3 and self.current_epoch == 1:
                raise RuntimeError("stopped")
            return super().training_step(batch, batch_idx)

    def net(gain):
        layers = [layer for _ in range(8) for layer in (nn.Linear(8, 8), nn.Tanh())]
        for layer in layers[::2]:
            nn.init.normal_(layer.weight, std=gain * 8**-0.5)
            nn.init.zeros_(layer.bias)
        return nn.Sequential(*layers, nn.Linear(8, 3))

    torch.manual_seed(0)
    with caplog.at_level("INFO", logger="lightning_noisy"):
        quiet_trainer(callbacks=[ActivationMonitor(every_n_steps=1)]).fit(Net(net(1.3)), loader(batches(4, 32)))
        assert "has no findings, in 4 logged steps" in caplog.text
        trainer = quiet_trainer(callbacks=[ActivationMonitor(every_n_steps=1)], max_epochs=2)
        with pytest.raises(RuntimeError, match="stopped"):
            trainer.fit(Interrupted(net(0.1), lambda p: torch.optim.SGD(p, lr=0.0)), loader(batches(4, 32)))
    assert "found, in 7 logged steps:\n1. The signal vanishes since step 0" in caplog.text


def test_report_is_that_of_the_last_fit_that_logged():
    monitor, model = ActivationMonitor(every_n_steps=1, statistics="rho"), deep()
    trainer = quiet_trainer(callbacks=[monitor])
    trainer.fit(model, loader(batches(4)))
    before = monitor.report.sites
    trainer.fit(model, loader(batches(4)))  # which has no epoch left
    assert monitor.report.sites == before
    quiet_trainer(callbacks=[monitor]).fit(model, loader(batches(2)))
    assert [step for step, _ in monitor._history] == [0, 1]


def test_report_without_sites_says_so():
    monitor = ActivationMonitor(every_n_steps=1, sites="typo*")
    with pytest.warns(UserWarning, match="matches no activation"), pytest.warns(UserWarning, match="no activations"):
        quiet_trainer(callbacks=[monitor]).fit(deep(), loader(batches(1)))
    assert str(monitor.report) == "No activation was looked at."
