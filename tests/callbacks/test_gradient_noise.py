import copy
import pickle
import random

import lightning as L
import numpy as np
import pytest
import torch
from helpers import Net, SpySGD, all_equal, batches, loader, parameters_of, quiet_trainer, scalars
from lightning.pytorch.callbacks import BaseFinetuning, OnExceptionCheckpoint, Timer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_noisy import GradientNoise
from lightning_noisy.schedules import Constant, InverseDecay, Linear

try:
    from lightning.pytorch.callbacks import WeightAveraging
except ImportError:
    WeightAveraging = None


def unit_sgd(parameters):
    return SpySGD(parameters, lr=1.0)


class Flat(L.LightningModule):
    """A loss without gradient in `size` parameters: with SGD and lr 1 they hold minus the sum of the noise."""

    def __init__(self, size=50_000, optimizer=unit_sgd):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))
        self.make_optimizer = optimizer

    def training_step(self, batch, batch_idx):
        return 0 * self.w.sum()

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())

    @property
    def seen(self):
        """Gradients of every step, as the update saw them."""
        return [grads[0] for grads in self.optimizers().optimizer.seen]


class Manual(Flat):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def hooks(optimizer):
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def fit(model, callbacks, data=None, **options):
    trainer = quiet_trainer(callbacks=callbacks, **options)
    trainer.fit(model, loader(batches(4) if data is None else data))
    return trainer


@pytest.mark.parametrize("model", [Flat, Manual])
def test_gradient_noise_has_the_std_of_the_optimizers_own_t(model):
    module = model()
    fit(module, [GradientNoise(eta=0.3, seed=0)])
    table = [0.54772256, 0.45266548, 0.40490420]
    assert [noise.std().item() for noise in module.seen[:3]] == pytest.approx(table, rel=0.012)
    assert len(module.seen) == 4


def test_gradient_noise_comes_after_clipping():
    module = Flat(1000, lambda p: SpySGD(p, lr=0.0))
    fit(module, [GradientNoise(eta=1.0, seed=0)], gradient_clip_val=0.05)
    assert module.seen[0].norm().item() == pytest.approx(1000**0.5, rel=0.1)


def test_gradient_noise_adds_to_what_clipping_leaves_of_the_gradient():
    class Steep(Flat):
        def training_step(self, batch, batch_idx):
            return 100 * self.w.sum()

    module = Steep(10_000)
    fit(module, [GradientNoise(eta=0.01, seed=0)], gradient_clip_val=0.05)
    assert module.seen[0].mean().item() == pytest.approx(0.05 / 10_000**0.5, abs=0.004)
    assert module.seen[0].std().item() == pytest.approx(0.1, rel=0.03)


def test_gradient_noise_of_the_first_step_reaches_the_parameters():
    module = Flat(100)
    fit(module, [GradientNoise(eta=1.0, seed=0)], max_steps=1)
    assert module.w.std() > 0.8


@pytest.mark.parametrize("model", [Flat, Manual])
def test_gradient_noise_is_added_once_per_accumulated_step(model):
    class ManualAccumulation(Manual):
        def training_step(self, batch, batch_idx):
            self.manual_backward(0 * self.w.sum())
            if batch_idx % 4 == 3:
                self.optimizers().step()
                self.optimizers().zero_grad()

    module = Flat() if model is Flat else ManualAccumulation()
    options = {"accumulate_grad_batches": 4} if model is Flat else {}
    fit(module, [GradientNoise(eta=0.3, seed=0)], batches(8), **options)
    assert [noise.std().item() for noise in module.seen] == pytest.approx([0.54772256, 0.45266548], rel=0.012)


def test_gradient_noise_leaves_the_global_random_states():
    def run(callbacks):
        L.seed_everything(3, verbose=False)
        fit(Net(), callbacks)
        return torch.get_rng_state().tolist(), np.random.random(), random.random()

    assert run([]) == run([GradientNoise(seed=1)])


def test_gradient_noise_at_zero_is_bit_for_bit_the_run_without():
    def run(callbacks):
        L.seed_everything(3, verbose=False)
        module = Net()
        fit(module, callbacks, gradient_clip_val=0.5)
        return parameters_of(module)

    plain = run([])
    assert all_equal(plain, run([GradientNoise(eta=0.0)]))
    assert not all_equal(plain, run([GradientNoise(eta=0.01)]))


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"plugins": MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))},
    ],
    ids=["bf16-mixed", "16-mixed with a scaler"],
)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler:UserWarning")
def test_gradient_noise_under_mixed_precision(options):
    module = Flat()
    fit(module, [GradientNoise(eta=0.3, seed=0)], **options)
    assert [noise.std().item() for noise in module.seen[:2]] == pytest.approx([0.54772256, 0.45266548], rel=0.012)


def test_gradient_noise_does_not_count_a_step_that_overflowed():
    class Overflows(Flat):
        def training_step(self, batch, batch_idx):
            return (float("inf") if batch_idx == 1 else 0.0) * self.w.sum()

    def run(model, count):
        module = model(100)
        plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
        fit(module, [GradientNoise(eta=1.0, seed=0)], batches(count), plugins=plugin)
        return module.seen

    overflowed, smooth = run(Overflows, 4), run(Flat, 3)
    assert len(overflowed) == 3
    assert all_equal(overflowed, smooth)


def test_gradient_noise_of_two_optimizers_has_a_t_and_a_stream_each(tmp_path):
    class Two(L.LightningModule):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(20_000)), nn.Parameter(torch.zeros(20_000))

        def training_step(self, batch, batch_idx):
            for index, optimizer in enumerate(self.optimizers()):
                if batch_idx % (index + 1) == 0:  # the second one steps every other batch
                    optimizer.zero_grad()
                    self.manual_backward(0 * (self.a.sum() + self.b.sum()))
                    optimizer.step()

        def configure_optimizers(self):
            return SpySGD([self.a], lr=1.0), SpySGD([self.b], lr=1.0)

    module = Two()
    fit(module, [GradientNoise(eta=1.0, seed=0)], logger=TensorBoardLogger(tmp_path, "", ""))
    first, second = (optimizer.optimizer.seen for optimizer in module.optimizers())
    expected = [InverseDecay(1.0)(t) for t in range(4)]
    assert [grads[0].std().item() for grads in first] == pytest.approx(expected, rel=0.02)
    assert [grads[0].std().item() for grads in second] == pytest.approx(expected[:2], rel=0.02)
    correlation = torch.corrcoef(torch.stack([first[0][0], second[0][0]]))[0, 1]
    assert abs(correlation) < 4 / 20_000**0.5
    logged = scalars(tmp_path)
    assert [value for _, value in logged["gradient_noise/std/0"]] == pytest.approx(expected)
    assert logged["gradient_noise/std/1"] == [(0, pytest.approx(expected[0])), (2, pytest.approx(expected[1]))]


def test_gradient_noise_ignores_a_batch_that_training_step_skips():
    class Skips(Flat):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    module = Skips()
    with pytest.warns(UserWarning, match="returned `None`"):
        fit(module, [GradientNoise(eta=1.0, seed=0)])
    stds = [grads.std().item() for grads in module.seen if grads is not None]
    assert stds == pytest.approx([InverseDecay(1.0)(t) for t in range(3)], rel=0.012)


def test_gradient_noise_under_lbfgs_is_finite_and_counts_steps():
    module = Net(optimizer=lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3))
    callback = GradientNoise(eta=0.01, seed=0)
    steps = []

    class Watch(L.Callback):
        def on_train_batch_end(self, *_):
            steps.append(callback.state_dict()["optimizers"][0]["step"])

    fit(module, [callback, Watch()])
    assert steps == [1, 2, 3, 4]
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_gradient_noise_is_logged_at_the_steps_of_lightnings_own_logging(tmp_path):
    class Logs(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    trainer = fit(
        Logs(),
        [GradientNoise(eta=0.3, seed=0)],
        batches(24),
        accumulate_grad_batches=2,
        log_every_n_steps=3,
        logger=TensorBoardLogger(tmp_path, "", ""),
    )
    logged = scalars(tmp_path)
    assert [step for step, _ in logged["gradient_noise/std"]] == [step for step, _ in logged["loss"]] == [2, 5, 8, 11]
    for step, value in logged["gradient_noise/std"]:
        assert value == pytest.approx(InverseDecay(0.3)(step), rel=1e-6)
    assert trainer.callback_metrics["gradient_noise/std"].item() == pytest.approx(InverseDecay(0.3)(11))


def test_gradient_noise_logs_norms_and_the_signal_to_noise_ratio(tmp_path):
    class Steep(Flat):
        def training_step(self, batch, batch_idx):
            return 3 * self.w.sum()

    fit(
        Steep(10_000),
        [GradientNoise(eta=0.04, seed=0)],
        gradient_clip_val=50.0,
        logger=TensorBoardLogger(tmp_path, "", ""),
        log_every_n_steps=2,
    )
    logged = scalars(tmp_path)
    assert [step for step, _ in logged["gradient_noise/snr"]] == [1, 3]
    for step, value in logged["grad_norm/before_clipping"]:
        assert value == pytest.approx(300)
        assert dict(logged["grad_norm/after_clipping"])[step] == pytest.approx(50, rel=1e-5)
        expected = 50 / (InverseDecay(0.04)(step) * 10_000**0.5)
        assert dict(logged["gradient_noise/snr"])[step] == pytest.approx(expected, rel=1e-5)
    assert set(logged) == {
        "gradient_noise/std", "gradient_noise/snr", "grad_norm/before_clipping", "grad_norm/after_clipping"
    }  # fmt: skip
    assert all(f"``{tag}``" in GradientNoise.__doc__ for tag in logged)


@pytest.mark.parametrize("options", [{"max_steps": 4}, {"max_epochs": 2, "accumulate_grad_batches": 2}])
def test_an_open_horizon_is_the_trainers_number_of_steps(options):
    module = Flat()
    fit(module, [GradientNoise(schedule=Linear(1.0, 0.2), seed=0)], **options)
    expected = [1.0, 0.8, 0.6, 0.4]
    assert [noise.std().item() for noise in module.seen] == pytest.approx(expected, rel=0.012)


@pytest.mark.filterwarnings("ignore:.*max_epochs")
def test_an_open_horizon_of_an_endless_training_is_refused():
    with pytest.raises(MisconfigurationException, match="needs to know how long the training is"):
        fit(Flat(10), [GradientNoise(schedule=Linear(1.0))], max_epochs=-1)


def test_gradient_noise_goes_to_the_chosen_parameters():
    module = Net(optimizer=lambda parameters: SpySGD(parameters, lr=0.0))
    module.training_step = lambda batch, batch_idx: 0 * module.net(batch[0]).sum()
    fit(module, [GradientNoise(eta=1.0, seed=0, params=lambda name, parameter: name == "net.2.weight")], batches(1))
    (grads,) = module.optimizers().optimizer.seen
    assert [bool(grad.any()) for grad in grads] == [False, False, True, False]


def test_gradient_noise_shows_sigma_on_the_progress_bar_if_asked_for():
    shown = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            shown.append(trainer.progress_bar_metrics.get("gradient_noise/std"))

    for prog_bar in (False, True):
        fit(Net(), [GradientNoise(eta=1.0, gamma=0, seed=0, prog_bar=prog_bar), Watch()], batches(1))
    assert shown == [None, 1.0]


def test_unfreezing_in_the_middle_leaves_the_others_their_noise():
    class Unfreeze(BaseFinetuning):
        def __init__(self, epoch):
            super().__init__()
            self.epoch = epoch

        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == self.epoch:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=1.0)

    def trainable(parameters):
        return torch.optim.SGD([p for p in parameters if p.requires_grad], lr=1.0)

    def run(epoch):
        module = Net(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)), trainable)
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
        module.training_step = lambda batch, batch_idx: 0 * module.net(batch[0]).sum()
        fit(module, [GradientNoise(eta=1.0, seed=0), Unfreeze(epoch)], batches(2), max_epochs=2)
        return module

    never, later = run(9), run(1)
    assert torch.equal(never.net[1].weight, later.net[1].weight)
    assert not never.net[0].weight.any()
    assert later.net[0].weight.count_nonzero() == 48


def test_gradient_noise_takes_a_schedule():
    module = Flat()
    fit(module, [GradientNoise(schedule=Constant(2.0), seed=0)])
    assert [noise.std().item() for noise in module.seen] == pytest.approx([2.0] * 4, rel=0.012)


def test_gradient_noise_takes_the_seed_of_seed_everything(monkeypatch):
    def run(*, seed=None, everything=None):
        monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
        if everything is not None:
            L.seed_everything(everything, verbose=False)
        module = Flat(100)
        fit(module, [GradientNoise(eta=1.0, seed=seed)])
        return module.w.detach()

    assert torch.equal(run(everything=7), run(seed=7))
    assert not torch.equal(run(everything=7), run(everything=8))
    assert not torch.equal(run(), run())  # drawn anew


@pytest.mark.parametrize("seed", [None, 5])
def test_resumed_gradient_noise_equals_an_uninterrupted_run(tmp_path, monkeypatch, seed):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    data = batches(10)
    path = tmp_path / "half.ckpt"

    class SaveHalf(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                trainer.save_checkpoint(path)

    torch.manual_seed(0)
    whole = Net()
    fit(whole, [GradientNoise(eta=0.1, seed=seed), SaveHalf()], data)
    resumed = Net()
    trainer = quiet_trainer(callbacks=[GradientNoise(eta=0.1, seed=seed)])
    trainer.fit(resumed, loader(data[5:]), ckpt_path=path)
    assert trainer.global_step == 10
    assert all_equal(parameters_of(whole), parameters_of(resumed))
    (state,) = torch.load(path, weights_only=True)["callbacks"].values()
    assert state["optimizers"][0]["step"] == 5


def test_resuming_with_another_seed_warns_and_uses_it(tmp_path):
    path = tmp_path / "last.ckpt"

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(path)

    fit(Net(), [GradientNoise(seed=1), Save()])
    trainer = quiet_trainer(callbacks=[GradientNoise(seed=2)], max_epochs=2)
    with pytest.warns(UserWarning, match="checkpoint with seed 1"):
        trainer.fit(Net(), loader(batches(4)), ckpt_path=path)


def test_a_checkpoint_without_the_callback_starts_the_noise_with_a_message(tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "plain.ckpt")

    fit(Flat(), [Save(), Timer()])
    module = Flat()
    trainer = quiet_trainer(callbacks=[GradientNoise(eta=0.3, seed=0), Timer()], max_epochs=2)
    with pytest.warns(UserWarning, match="written without GradientNoise: its noise starts at t = 0"):
        trainer.fit(module, loader(batches(4)), ckpt_path=tmp_path / "plain.ckpt")
    assert module.seen[0].std().item() == pytest.approx(0.3**0.5, rel=0.012)


@pytest.mark.skipif(WeightAveraging is None, reason="came with Lightning 2.6")
def test_gradient_noise_works_beside_weight_averaging():
    def run(callbacks):
        module = Flat(100)
        fit(module, [GradientNoise(eta=1.0, seed=0), *callbacks])
        return module

    averaged, plain = run([WeightAveraging()]), run([])
    assert all_equal(averaged.seen, plain.seen)


def test_relative_noise_by_the_callback():
    class Steep(Flat):
        def training_step(self, batch, batch_idx):
            return 3 * self.w.sum()

    module = Steep()
    fit(module, [GradientNoise(schedule=Constant(0.1), relative=True, seed=0)])
    assert [grads.std().item() for grads in module.seen] == pytest.approx([0.3] * 4, rel=0.02)


def test_two_instances_have_a_state_and_a_stream_each(tmp_path):
    callbacks = [GradientNoise(eta=1.0, gamma=0, seed=0), GradientNoise(schedule=Constant(1.0), seed=0)]
    module = Flat()
    trainer = fit(module, callbacks)
    assert module.seen[0].std().item() == pytest.approx(2**0.5, rel=0.012)  # independent: variances add
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    assert len(torch.load(tmp_path / "both.ckpt", weights_only=True)["callbacks"]) == 2


def test_resumed_gradient_noise_may_have_another_schedule(tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    fit(Flat(), [GradientNoise(eta=1.0, seed=1), Save()])
    module = Flat()
    trainer = quiet_trainer(callbacks=[GradientNoise(eta=0.3)], max_epochs=2)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint need to be provided"):
        trainer.fit(module, loader(batches(4)), ckpt_path=tmp_path / "last.ckpt")
    assert module.seen[0].std().item() == pytest.approx(InverseDecay(0.3)(4), rel=0.012)


# With OnExceptionCheckpoint Lightning looks for a checkpoint to go on from, and misses it.
@pytest.mark.filterwarnings("ignore:.*called without a model", "ignore:.*there is no last checkpoint available")
def test_checkpoints_written_after_the_fit_or_on_an_exception_have_the_state(tmp_path):
    class Fails(Flat):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("in the middle")
            return super().training_step(batch, batch_idx)

    def steps(path):
        (state,) = [v for k, v in torch.load(path, weights_only=True)["callbacks"].items() if "GradientNoise" in k]
        return [(noise["seed"], noise["step"]) for noise in state["optimizers"]]

    fit(Flat(10), [GradientNoise(seed=5)]).save_checkpoint(tmp_path / "after.ckpt")
    assert steps(tmp_path / "after.ckpt") == [(5, 4)]
    on_exception = OnExceptionCheckpoint(tmp_path, "crash")
    with pytest.raises(RuntimeError, match="in the middle"):
        fit(Fails(10), [GradientNoise(seed=5), on_exception], enable_checkpointing=True, default_root_dir=tmp_path)
    assert steps(tmp_path / "crash.ckpt") == [(5, 3)]


def test_a_checkpoint_that_was_validated_does_not_reach_the_next_fit(tmp_path):
    fit(Net(), [GradientNoise(seed=5)]).save_checkpoint(tmp_path / "old.ckpt")
    callback = GradientNoise(seed=6)
    trainer = quiet_trainer(callbacks=[callback])
    model = Net()
    trainer.validate(model, loader(batches(1)), ckpt_path=tmp_path / "old.ckpt", verbose=False)
    trainer.fit(model, loader(batches(3)))
    assert callback.state_dict() == {"optimizers": [{"seed": 6, "stream": "0.0", "step": 3}]}


def test_a_fit_that_failed_to_resume_does_not_reach_the_next_one(tmp_path):
    class Fails(Net):
        def configure_optimizers(self):
            raise RuntimeError("before the optimizers are there")

    fit(Net(), [GradientNoise(seed=5)]).save_checkpoint(tmp_path / "old.ckpt")
    callback = GradientNoise(seed=5)
    trainer = quiet_trainer(callbacks=[callback])
    with pytest.raises(RuntimeError, match="before the optimizers"):
        trainer.fit(Fails(), loader(batches(1)), ckpt_path=tmp_path / "old.ckpt")
    fit(Net(), [callback], batches(2))
    assert callback.state_dict() == {"optimizers": [{"seed": 5, "stream": "0.0", "step": 2}]}


@pytest.mark.filterwarnings("ignore:The .* does not have many workers", "ignore:.*treespec")
def test_learning_rate_finder_leaves_the_noise_at_its_start(tmp_path):
    class Tunable(Net):
        lr = 0.1

        def configure_optimizers(self):
            return SpySGD(self.parameters(), lr=self.lr)

    callback = GradientNoise(seed=0)
    trainer = quiet_trainer(callbacks=[callback], default_root_dir=tmp_path, enable_checkpointing=True)
    model = Tunable()
    Tuner(trainer).lr_find(model, loader(batches(30)), num_training=20, update_attr=False)
    trainer.fit(model, loader(batches(3)))
    assert callback.state_dict() == {"optimizers": [{"seed": 0, "stream": "0.0", "step": 3}]}


def test_gradient_noise_leaves_no_hook_behind_after_fits_and_exceptions():
    class Fails(Flat):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("in the middle")
            return super().training_step(batch, batch_idx)

    callback = GradientNoise(eta=1.0, seed=0)
    trainer = quiet_trainer(callbacks=[callback])
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(hooks(trainer.optimizers[0]))

    trainer.callbacks.append(Watch())
    for model in (Flat(10), Flat(10)):
        trainer.fit_loop.epoch_progress.reset()
        trainer.fit(model, loader(batches(4)))
        assert hooks(trainer.optimizers[0]) == 0
    with pytest.raises(RuntimeError, match="in the middle"):
        quiet_trainer(callbacks=[callback]).fit(failing := Fails(10), loader(batches(4)))
    assert hooks(failing.optimizers().optimizer) == 0
    assert seen == [2] * len(seen)
    assert len(seen) == 8


def test_gradient_noise_of_a_second_fit_starts_at_t_zero():
    callback = GradientNoise(eta=0.3, seed=0)
    for _ in range(2):
        module = Flat()
        fit(module, [callback])
        assert module.seen[0].std().item() == pytest.approx(0.3**0.5, rel=0.012)


def test_copies_of_the_callback_work_on_their_own():
    original = GradientNoise(eta=1.0, seed=0)
    results = []

    class Copy(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            self.twins = [copy.deepcopy(original), pickle.loads(pickle.dumps(original))]

    copier = Copy()
    module = Flat(100)
    fit(module, [original, copier])
    for callback in copier.twins:
        twin = Flat(100)
        fit(twin, [callback])
        results.append(torch.equal(twin.w, module.w))
    assert results == [True, True]


def test_gradient_noise_does_nothing_outside_fit():
    module = Net()
    trainer = quiet_trainer(callbacks=[GradientNoise()])
    trainer.validate(module, loader(batches(1)), verbose=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"eta": -1},
            ValueError,
            "eta must be a finite number >= 0, got -1. Use eta=0 to switch the noise off",
        ),
        ({"eta": float("nan")}, ValueError, "eta"),
        ({"gamma": float("nan")}, ValueError, "gamma must be a finite number >= 0, got nan"),
        ({"eta": "0.1"}, TypeError, "eta must be a number, got '0.1' of type str"),
        ({"schedule": 0.1}, TypeError, "schedule must be callable"),
        ({"seed": 1.5}, TypeError, "seed must be an int or None, got 1.5"),
    ],
)
def test_gradient_noise_refuses_bad_arguments_at_once(options, error, message):
    with pytest.raises(error, match=message):
        GradientNoise(**options)
