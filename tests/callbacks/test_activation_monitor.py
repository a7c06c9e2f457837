import copy
import pickle

import lightning as L
import numpy as np
import pytest
import torch
from helpers import Net, all_equal, batches, loader, parameters_of, quiet_trainer, scalars
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from lightning_noisy import ActivationMonitor, replace_activations

STATISTICS = ("rho", "rho_prime", "saturation", "sparsity")


class First(Net):
    """A net that begins with an activation: the batch is the pre-activation."""

    def __init__(self, activation, features=8):
        super().__init__(nn.Sequential(activation, nn.Linear(features, 3)))


def normal_batches(count, size, features, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, features, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def watch(model, data, folder, **options):
    monitor = options.pop("monitor", None) or ActivationMonitor()
    trainer = quiet_trainer(callbacks=[monitor], logger=TensorBoardLogger(folder, "", ""), **options)
    trainer.fit(model, loader(data))
    return trainer, scalars(folder)


def test_monitor_logs_one_half_for_relu_on_normal_input(tmp_path):
    data = normal_batches(4, 500, 500)
    _, logged = watch(First(nn.ReLU(), 500), data, tmp_path, log_every_n_steps=2)
    for statistic in STATISTICS:
        assert [step for step, _ in logged[f"{statistic}/net.0"]] == [1, 3]
        for _, value in logged[f"{statistic}/net.0"]:
            assert value == pytest.approx(0.5, abs=0.005), statistic
    assert [value for _, value in logged["anact_score"]] == pytest.approx([np.log(2)] * 2, abs=0.01)


def test_monitor_logs_gains_of_harmonic_mean_one_for_a_normalized_activation(tmp_path):
    model = replace_activations(First(nn.ReLU(), 500), "nrelu")
    _, logged = watch(model, normal_batches(1, 500, 500), tmp_path)
    ((_, rho),), ((_, rho_prime),) = logged["rho/net.0"], logged["rho_prime/net.0"]
    assert 2 / (1 / rho + 1 / rho_prime) == pytest.approx(1, rel=1e-4)
    assert rho == pytest.approx(0.84, abs=0.01)  # (1 + rho/rho') / 2 of ReLU's 0.3408 and 0.5


def test_monitor_logs_the_documented_tags_and_no_others(tmp_path):
    _, logged = watch(Net(), batches(2), tmp_path)
    assert set(logged) == {f"{statistic}/net.1" for statistic in STATISTICS} | {"anact_score", "epoch"} - {"epoch"}
    documented = ActivationMonitor.__doc__
    assert all(f"``{name}/<site>``" in documented for name in STATISTICS)


def test_monitor_pools_the_window_over_unequal_batches(tmp_path):
    data = [*normal_batches(2, 32, 8), *normal_batches(1, 1, 8, seed=1)]
    data[2][0].add_(5)
    _, logged = watch(First(nn.Tanh()), data, tmp_path, log_every_n_steps=3)
    h = np.concatenate([x.double().numpy().ravel() for x, _ in data])
    slope = 1 - np.tanh(h) ** 2
    expected = {
        "rho": (np.tanh(h) ** 2).mean() / h.var(),
        "rho_prime": (slope**2).mean(),
        "saturation": (slope < 0.05).mean(),
        "sparsity": (h <= 0).mean(),
    }
    for statistic, value in expected.items():
        ((step, logged_value),) = logged[f"{statistic}/net.0"]
        assert step == 2
        assert logged_value == pytest.approx(value, rel=1e-5)


def test_monitor_windows_start_anew(tmp_path):
    data = normal_batches(2, 100, 8)
    data[1][0].mul_(4)
    _, logged = watch(First(nn.Tanh()), data, tmp_path)
    for (_, value), (x, _) in zip(logged["rho/net.0"], data, strict=True):
        h = x.double().numpy()
        assert value == pytest.approx((np.tanh(h) ** 2).mean() / h.var(), rel=1e-5)


def test_monitor_looks_at_every_nth_batch(tmp_path):
    data = normal_batches(4, 100, 8)
    for factor, (x, _) in enumerate(data, start=1):
        x.mul_(factor)
    _, logged = watch(
        First(nn.Tanh()), data, tmp_path, monitor=ActivationMonitor(every_n_batches=2), log_every_n_steps=4
    )
    h = np.concatenate([data[i][0].double().numpy().ravel() for i in (0, 2)])
    assert logged["rho/net.0"][0][1] == pytest.approx((np.tanh(h) ** 2).mean() / h.var(), rel=1e-5)


def test_monitor_ignores_sanity_check_and_validation(tmp_path):
    data = normal_batches(2, 50, 8)
    trainer = quiet_trainer(
        callbacks=[ActivationMonitor()],
        logger=TensorBoardLogger(tmp_path, "", ""),
        val_check_interval=1,
        num_sanity_val_steps=1,
        log_every_n_steps=2,
    )
    trainer.fit(First(nn.Tanh()), loader(data), loader([(x * 100, y) for x, y in data]))
    h = np.concatenate([x.double().numpy().ravel() for x, _ in data])
    assert scalars(tmp_path)["rho/net.0"] == [(1, pytest.approx((np.tanh(h) ** 2).mean() / h.var(), rel=1e-5))]


@pytest.mark.parametrize("automatic", [True, False])
def test_monitor_logs_at_the_steps_of_lightnings_own_logging(tmp_path, automatic):
    class Logs(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            if not automatic:
                self.manual_backward(loss)
                for optimizer in self.optimizers():
                    optimizer.step()
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)

    class Automatic(Logs):
        def configure_optimizers(self):
            return super().configure_optimizers()[0]

    model = (Automatic if automatic else Logs)()
    model.automatic_optimization = automatic
    options = {"accumulate_grad_batches": 2} if automatic else {}
    _, logged = watch(model, batches(12), tmp_path, log_every_n_steps=3, **options)
    steps = [step for step, _ in logged["loss"]]
    assert [step for step, _ in logged["rho/net.1"]] == steps
    assert len(steps) == len(set(steps)) == (2 if automatic else 4)


@pytest.mark.parametrize("to", [None, "nsw"])
def test_monitored_training_is_bit_for_bit_the_same(to):
    def run(callbacks):
        L.seed_everything(0, verbose=False)
        layers = [
            nn.Linear(8, 8),
            nn.RReLU(),
            nn.Dropout(),
            nn.Linear(8, 8),
            nn.ELU(inplace=True),
            nn.Linear(8, 3),
        ]
        model = Net(nn.Sequential(*layers))
        if to:
            replace_activations(model, to)
        quiet_trainer(callbacks=callbacks, max_epochs=2).fit(model, loader(batches(4)))
        return [*parameters_of(model), *model.buffers(), torch.get_rng_state()]

    assert all_equal(run([]), run([ActivationMonitor()]))


def test_monitor_feeds_every_logger_and_callback_metrics(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, "tb", ""), CSVLogger(tmp_path, "csv", "")]
    trainer = quiet_trainer(callbacks=[ActivationMonitor()], logger=loggers)
    trainer.fit(Net(), loader(batches(2)))
    assert "rho/net.1" in (tmp_path / "csv" / "metrics.csv").read_text()
    assert "rho/net.1" in scalars(tmp_path / "tb")
    assert 0 < trainer.callback_metrics["rho_prime/net.1"].item() < 1


def test_monitor_without_a_logger_still_fills_callback_metrics():
    trainer = quiet_trainer(callbacks=[ActivationMonitor()])
    trainer.fit(Net(), loader(batches(2)))
    assert "anact_score" in trainer.callback_metrics


def test_monitor_logs_undefined_statistics_as_nan_and_lets_training_be(tmp_path):
    model = Net()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    _, logged = watch(model, batches(2), tmp_path)
    assert np.isnan([value for _, value in logged["rho/net.1"]]).all()
    assert [value for _, value in logged["saturation/net.1"]] == [1, 1]


def test_monitor_leaves_nothing_on_the_model():
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 1:
                raise RuntimeError("in the middle")
            return loss

    def hooks(model):
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    monitor = ActivationMonitor()
    model = Net()
    for _ in range(2):
        quiet_trainer(callbacks=[monitor]).fit(model, loader(batches(2)))
        assert hooks(model) == 0
    failing = Fails()
    with pytest.raises(RuntimeError, match="in the middle"):
        quiet_trainer(callbacks=[monitor]).fit(failing, loader(batches(3)))
    assert hooks(failing) == 0


def test_monitor_is_off_after_a_batch_that_was_skipped():
    class Skips(Net):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 1 else None

        def on_train_epoch_end(self):
            self.left = sum(len(module._forward_hooks) for module in self.modules())

    model = Skips()
    quiet_trainer(callbacks=[ActivationMonitor()]).fit(model, loader(batches(3)))
    assert model.left == 0


def test_monitor_logs_an_activation_that_is_never_called_as_nan(tmp_path):
    model = Net(nn.Linear(8, 3))
    model.unused = nn.ReLU()
    _, logged = watch(model, batches(2), tmp_path)
    assert np.isnan([value for tag in ("rho/unused", "anact_score") for _, value in logged[tag]]).all()


def test_monitor_copies_and_pickles_in_the_middle_of_a_fit():
    monitor = ActivationMonitor(every_n_batches=3)
    twins = []

    class Copy(L.Callback):
        def on_train_batch_start(self, *_):
            twins.extend([copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))])

    quiet_trainer(callbacks=[monitor, Copy()]).fit(Net(), loader(batches(1)))
    assert [twin.every_n_batches for twin in twins] == [3, 3]


def test_monitor_warns_if_there_is_nothing_to_watch():
    with pytest.warns(UserWarning, match=r"found no activation modules in Net.*make them modules"):
        quiet_trainer(callbacks=[ActivationMonitor()]).fit(Net(nn.Linear(8, 3)), loader(batches(2)))


@pytest.mark.parametrize(
    "options",
    [
        {"every_n_batches": 0},
        {"every_n_batches": 1.5},
        {"every_n_batches": True},
        {"saturation_threshold": 0},
        {"saturation_threshold": 1},
        {"saturation_threshold": float("nan")},
    ],
)
def test_monitor_refuses_options_out_of_range(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        ActivationMonitor(**options)
