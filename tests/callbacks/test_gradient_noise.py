import random

import lightning as L
import numpy as np
import pytest
import torch
from helpers import Flat, Manual, Net, SpySGD, all_equal, batches, fit, loader, parameters_of, quiet_trainer, scalars
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_noisy import GradientNoise
from lightning_noisy.schedules import Constant, FollowLR, InverseDecay, Linear

try:
    from lightning.pytorch.callbacks import WeightAveraging
except ImportError:
    WeightAveraging = None


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


@pytest.mark.skipif(WeightAveraging is None, reason="came with Lightning 2.6")
def test_gradient_noise_works_beside_weight_averaging():
    def run(callbacks):
        module = Flat(100)
        fit(module, [GradientNoise(eta=1.0, seed=0), *callbacks])
        return module

    averaged, plain = run([WeightAveraging()]), run([])
    assert all_equal(averaged.seen, plain.seen)


def test_gradient_noise_works_beside_stochastic_weight_averaging():
    # It copies the module and, at its start, gives the optimizer another learning rate and scheduler.
    module = Flat(20_000)
    swa = StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=1)
    fit(module, [GradientNoise(eta=0.3, seed=0), swa], batches(3), max_epochs=3)
    stds = [grads.std().item() for grads in module.seen]
    assert stds == pytest.approx([InverseDecay(0.3)(t) for t in range(9)], rel=0.02)


def test_gradient_noise_follows_the_learning_rate():
    class Scheduled(Flat):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    module = Scheduled()
    fit(module, [GradientNoise(schedule=FollowLR(0.3), seed=0)])
    assert [grads.std().item() for grads in module.seen] == pytest.approx([0.3, 0.15, 0.075, 0.0375], rel=0.02)


def test_relative_noise_by_the_callback():
    class Steep(Flat):
        def training_step(self, batch, batch_idx):
            return 3 * self.w.sum()

    module = Steep()
    fit(module, [GradientNoise(schedule=Constant(0.1), relative=True, seed=0)])
    assert [grads.std().item() for grads in module.seen] == pytest.approx([0.3] * 4, rel=0.02)


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
        ({"schedule": InverseDecay}, TypeError, r"got the class InverseDecay. Use InverseDecay\(...\)"),
        ({"eta": 1.0, "schedule": Constant(0.1)}, ValueError, "takes the place of eta and gamma, got eta=1.0"),
        ({"gamma": 1, "schedule": Constant(0.1)}, ValueError, "Leave out one or the other"),
        ({"seed": 1.5}, TypeError, "seed must be an int or None, got 1.5"),
        ({"seed": True}, TypeError, "seed must be an int or None, got True"),
        ({"name": 3}, TypeError, "name must be a str, got 3 of type int"),
        ({"relative": "no"}, TypeError, "relative must be True or False, got 'no'"),
        ({"prog_bar": 1}, TypeError, "prog_bar must be True or False, got 1"),
        ({"params": "weight"}, TypeError, "params must be callable"),
    ],
)
def test_gradient_noise_refuses_bad_arguments_at_once(options, error, message):
    with pytest.raises(error, match=message):
        GradientNoise(**options)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_processes_that_train_copies_add_the_noise_of_one(strategy):
    alone, copies = Flat(1000), Flat(1000)
    fit(alone, [GradientNoise(eta=1.0, seed=3)])
    # Each of the two has all the batches.
    fit(copies, [GradientNoise(eta=1.0, seed=3)], strategy=strategy, devices=2, use_distributed_sampler=False)
    assert alone.w.abs().min() > 0
    assert torch.equal(copies.w, alone.w)
