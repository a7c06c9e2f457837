import copy
import pickle
import re

import lightning as L
import numpy as np
import pytest
import torch
from helpers import Net, all_equal, batches, loader, parameters_of, quiet_trainer, scalars
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from lightning_noisy import ActivationMonitor, GradientNoise, replace_activations
from lightning_noisy.nn import NAH, NSwish

STATISTICS_OF_ALL = (
    *("rho", "rho_prime", "r_score", "saturation", "sparsity", "dead_units", "lambda", "mu", "anact_score"),
    *("anact_score_mean", "saturation_left", "saturation_right", "saturation_hard", "saturation_magnitude"),
    *("dormant_units", "mean", "std", "input_mean", "input_std", "grad_rms", "rejected"),
    *("weight_mean", "weight_mean_sum", "grad_variance", "update_ratio"),
)
STATISTICS = ("rho", "rho_prime", "r_score", "saturation", "sparsity", "dead_units")


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
    expected = dict.fromkeys(STATISTICS, 0.5) | {"r_score": np.log(0.5 * (1 - 1 / np.pi) / 0.5), "dead_units": 0.0}
    for statistic, value in expected.items():
        assert [step for step, _ in logged[f"{statistic}/net.0"]] == [1, 3]
        for _, logged_value in logged[f"{statistic}/net.0"]:
            assert logged_value == pytest.approx(value, abs=0.01), statistic
    assert [value for _, value in logged["anact_score"]] == pytest.approx([np.log(2)] * 2, abs=0.01)


def test_a_logger_of_an_earlier_fit_is_logged_to_again(tmp_path):
    """Lightning closes TensorBoard's writer at the end of a fit."""
    logger, model, monitor = TensorBoardLogger(tmp_path, "", ""), First(nn.ReLU(), 20), ActivationMonitor()
    for _ in range(2):
        trainer = quiet_trainer(callbacks=[monitor, GradientNoise(seed=0)], logger=logger, log_every_n_steps=2)
        trainer.fit(model, loader(normal_batches(4, 8, 20)))
    logged = scalars(tmp_path)
    for tag in ("rho/net.0", "anact_score", "gradient_noise/std"):
        assert [step for step, _ in logged[tag]] == [1, 3, 1, 3], tag


def test_monitor_logs_gains_of_harmonic_mean_one_for_a_normalized_activation(tmp_path):
    model = replace_activations(First(nn.ReLU(), 500), "nrelu")
    _, logged = watch(model, normal_batches(1, 500, 500), tmp_path)
    ((_, rho),), ((_, rho_prime),) = logged["rho/net.0"], logged["rho_prime/net.0"]
    assert 2 / (1 / rho + 1 / rho_prime) == pytest.approx(1, rel=1e-4)
    assert rho == pytest.approx(0.84, abs=0.01)  # (1 + rho/rho') / 2 of ReLU's 0.3408 and 0.5


def test_monitor_logs_the_documented_tags_and_no_others(tmp_path):
    model = Net(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), NAH("tanh"), nn.Linear(16, 8), NSwish(), nn.Linear(8, 3)))
    _, logged = watch(model, batches(2), tmp_path, monitor=ActivationMonitor(statistics="all"))
    emitted = {tag.partition("/")[0] for tag in logged}
    assert emitted == set(STATISTICS_OF_ALL)
    table, _, rest = ActivationMonitor.__doc__.partition("On request by ``statistics``:")
    by_default = re.findall(r"^    ``(\w+)(?:/<site>)?``", table, re.MULTILINE)
    on_request = re.findall(r"``(\w+)(?:/<parameter>)?``", rest.partition("Only the batches")[0])
    assert set(by_default) | set(on_request) == emitted
    _, logged = watch(model, batches(2), tmp_path / "default")
    assert {tag.partition("/")[0] for tag in logged} == set(by_default)
    assert {tag for tag in logged if tag.startswith("rho/")} == {"rho/net.1", "rho/net.2", "rho/net.4"}
    assert {tag for tag in logged if tag.startswith("lambda/")} == {"lambda/net.4"}


def test_monitor_pools_the_window_over_unequal_batches(tmp_path):
    data = [*normal_batches(2, 32, 8), *normal_batches(1, 1, 8, seed=1)]
    data[2][0].add_(5)
    monitor = ActivationMonitor(window=3)
    _, logged = watch(First(nn.Tanh()), data, tmp_path, log_every_n_steps=3, monitor=monitor)
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


@pytest.mark.parametrize(
    ("window", "pooled"), [(1, [[3], [7]]), (2, [[2, 3], [6, 7]]), (9, [[0, 1, 2, 3], [4, 5, 6, 7]])]
)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_monitor_pools_the_last_batches_of_a_step(tmp_path, window, pooled, accumulated):
    data = normal_batches(8, 100, 8)
    for factor, (x, _) in enumerate(data, start=1):
        x.mul_(factor)
    _, logged = watch(
        First(nn.Tanh()),
        data,
        tmp_path,
        monitor=ActivationMonitor(window=window, every_n_steps=4 // accumulated),
        accumulate_grad_batches=accumulated,
    )
    assert len(logged["rho/net.0"]) == 2
    for (_, value), numbers in zip(logged["rho/net.0"], pooled, strict=True):
        h = np.concatenate([data[i][0].double().numpy().ravel() for i in numbers])
        assert value == pytest.approx((np.tanh(h) ** 2).mean() / h.var(), rel=1e-5)


def test_monitor_does_not_touch_batches_between_its_windows():
    seen = []

    class Look(L.Callback):
        def on_before_backward(self, trainer, model, loss):
            seen.append(sum(len(module._forward_hooks) for module in model.modules()))

    quiet_trainer(callbacks=[ActivationMonitor(every_n_steps=3), Look()]).fit(Net(), loader(batches(6)))
    assert seen == [0, 0, 1, 0, 0, 1]


def test_monitor_ignores_sanity_check_and_validation(tmp_path):
    data = normal_batches(2, 50, 8)
    trainer = quiet_trainer(
        callbacks=[ActivationMonitor(window=2)],
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


def test_monitor_shows_an_activation_from_its_first_call_on(tmp_path):
    class Late(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss + self.late(loss) if batch_idx == 1 else loss

    model = Late()
    model.late = nn.ReLU()
    _, logged = watch(model, batches(3), tmp_path)
    assert [(step, np.isnan(value)) for step, value in logged["rho_prime/late"]] == [(1, False), (2, True)]
    assert len(logged["rho/net.1"]) == 3


def test_monitor_copies_and_pickles_in_the_middle_of_a_fit():
    monitor = ActivationMonitor(every_n_steps=3, sites="net.*")
    twins = []

    class Copy(L.Callback):
        def on_train_batch_start(self, *_):
            twins.extend([copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))])

    quiet_trainer(callbacks=[monitor, Copy()]).fit(Net(), loader(batches(1)))
    assert [(twin.every_n_steps, twin.sites) for twin in twins] == [(3, ("net.*",))] * 2


def test_monitor_warns_if_there_is_nothing_to_watch():
    with pytest.warns(UserWarning, match=r"found no activations in Net"):
        quiet_trainer(callbacks=[ActivationMonitor()]).fit(Net(nn.Linear(8, 3)), loader(batches(2)))


@pytest.mark.parametrize(
    "options",
    [
        {"every_n_steps": 0},
        {"every_n_steps": 1.5},
        {"every_n_steps": True},
        {"window": 0},
        {"stages": "test"},
        {"saturation_threshold": 0},
        {"saturation_threshold": 1},
        {"saturation_threshold": float("nan")},
    ],
)
def test_monitor_refuses_options_out_of_range(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        ActivationMonitor(**options)


def test_monitor_refuses_unknown_statistics_and_names_the_closest():
    with pytest.raises(ValueError, match=r"'dead_unit' is not the name of a statistic. Did you mean 'dead_units'"):
        ActivationMonitor(statistics=("default", "dead_unit"))


def test_monitor_looks_at_the_sites_of_a_pattern_and_names_the_closest_of_one_that_matches_none(tmp_path):
    layers = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)]
    _, logged = watch(
        Net(nn.Sequential(*layers)), batches(1), tmp_path, monitor=ActivationMonitor(sites="*.3", statistics="rho")
    )
    assert set(logged) == {"rho/net.3"}
    with pytest.warns(UserWarning, match=r"sites='nets.1' matches no activation of the model.*: net.1, net.3"):
        quiet_trainer(callbacks=[ActivationMonitor(sites=("nets.1", "*.3"))]).fit(
            Net(nn.Sequential(*layers)), loader(batches(1))
        )


def test_score_sums_over_hidden_activations_alone(tmp_path):
    class Scores(Net):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3), nn.Sigmoid()))

    _, logged = watch(Scores(), batches(1, 500), tmp_path)
    ((_, rho),), ((_, rho_prime),) = logged["rho/net.1"], logged["rho_prime/net.1"]
    ((_, score),), ((_, mean),) = logged["anact_score"], logged["anact_score_mean"]
    assert score == mean == pytest.approx((abs(np.log(rho)) + abs(np.log(rho_prime))) / 2)
    assert abs(np.log(logged["rho_prime/net.3"][0][1])) > 2


def test_monitor_says_once_what_it_looks_at_and_what_it_does_not_see(caplog):
    class Recurrent(Net):
        def __init__(self):
            super().__init__()
            self.stack = nn.GRU(8, 8, 2, dropout=0.5)

    with caplog.at_level("INFO", "lightning_noisy"):
        quiet_trainer(callbacks=[ActivationMonitor()]).fit(Recurrent(), loader(batches(3)))
    said = [record.message for record in caplog.records if "ActivationMonitor looks at" in record.message]
    assert len(said) == 1
    assert "looks at 4 activations; anact_score sums over 1 hidden ones. Not seen: stack: of its layers " in said[0]


def test_monitor_sees_functions_methods_and_each_use_of_a_module(tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)
            self.act = nn.ReLU()

        def forward(self, x):
            x = self.act(self.first(x))
            x = torch.tanh(self.first(x)) + self.first(x).sigmoid()
            return self.second(self.act(nn.functional.leaky_relu_(self.first(x), 0.3)))

    model = Net(Mixed())
    _, logged = watch(model, batches(1, 64), tmp_path)
    names = {tag.partition("/")[2] for tag in logged if tag.startswith("rho/")}
    assert names == {"net.act", "net:tanh#0", "net:sigmoid#0", "net:leaky_relu#0", "net.act#2"}
    ((_, share),) = logged["sparsity/net:leaky_relu#0"]
    ((_, gain),) = logged["rho_prime/net:leaky_relu#0"]
    assert gain == pytest.approx((1 - share) + share * 0.09, rel=1e-5)


def test_validation_is_pooled_on_request(tmp_path):
    data = normal_batches(3, 40, 8)
    trainer = quiet_trainer(
        callbacks=[ActivationMonitor(stages=("train", "validate"))],
        logger=TensorBoardLogger(tmp_path, "", ""),
        max_epochs=2,
    )
    trainer.fit(First(nn.Tanh()), loader(normal_batches(2, 40, 8)), loader([(3 * x, y) for x, y in data]))
    logged = scalars(tmp_path)
    h = 3 * np.concatenate([x.double().numpy().ravel() for x, _ in data])
    gain = pytest.approx((np.tanh(h) ** 2).mean() / h.var(), rel=1e-5)
    assert [value for _, value in logged["val_rho/net.0"]] == [gain, gain]
    assert len(logged["rho/net.0"]) == 4


def test_progress_bar_shows_what_is_asked_for():
    monitor = ActivationMonitor(prog_bar="anact_score")
    trainer = quiet_trainer(callbacks=[monitor])
    trainer.fit(Net(), loader(batches(2)))
    assert trainer.progress_bar_metrics["anact_score"] == pytest.approx(trainer.callback_metrics["anact_score"].item())


def test_weights_gradients_and_updates_are_those_of_the_step(tmp_path):
    class Keeps(Net):
        def on_before_optimizer_step(self, optimizer):
            self.old = [each.detach().double().numpy() for each in parameters_of(self)]
            self.gradients = [each.grad.double().numpy().copy() for each in self.parameters()]

        def on_train_batch_end(self, *_):
            self.new = [each.double().numpy() for each in parameters_of(self)]

    model = Keeps()
    statistics = ("weight_mean", "weight_mean_sum", "grad_variance", "update_ratio")
    _, logged = watch(
        model,
        batches(1, 64),
        tmp_path,
        monitor=ActivationMonitor(statistics=statistics),
        gradient_clip_val=1e-3,  # what is measured is not clipped
    )
    names = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    assert {tag.partition("/")[2] for tag in logged} == {*names, ""}
    total = 0.0
    for (name, _), old, new, gradient in zip(
        model.named_parameters(), model.old, model.new, model.gradients, strict=True
    ):
        if name in names:
            assert logged[f"grad_variance/{name}"][0][1] == pytest.approx(gradient.var(), rel=1e-5)
            ratio = np.linalg.norm(new - old) / np.linalg.norm(old)
            assert logged[f"update_ratio/{name}"][0][1] == pytest.approx(ratio, rel=1e-5)
            assert logged[f"weight_mean/{name}"][0][1] == pytest.approx(abs(new.mean()), rel=1e-5)
            total += abs(new.mean())
    assert logged["weight_mean_sum"][0][1] == pytest.approx(total, rel=1e-5)


def test_validation_in_the_middle_of_a_window_has_sums_of_its_own(tmp_path):
    data = normal_batches(4, 50, 8)
    trainer = quiet_trainer(
        callbacks=[ActivationMonitor(stages=("train", "validate"), window=4, every_n_steps=4)],
        logger=TensorBoardLogger(tmp_path, "", ""),
        val_check_interval=2,
    )
    trainer.fit(First(nn.Tanh()), loader(data), loader([(5 * x, y) for x, y in data]))
    h = np.concatenate([x.double().numpy().ravel() for x, _ in data])
    logged = scalars(tmp_path)
    assert logged["rho/net.0"] == [(3, pytest.approx((np.tanh(h) ** 2).mean() / h.var(), rel=1e-5))]
    of_validation = pytest.approx((np.tanh(5 * h) ** 2).mean() / (5 * h).var(), rel=1e-5)
    assert [value for _, value in logged["val_rho/net.0"]] == [of_validation] * 2


@pytest.mark.parametrize(
    "options",
    [{"sites": ()}, {"statistics": ()}, {"stages": ()}, {"classes": 3}, {"thresholds": {"saturation": 0.1}}],
)
def test_monitor_refuses_arguments_that_would_do_nothing(options):
    with pytest.raises((ValueError, TypeError)):
        ActivationMonitor(**options)
