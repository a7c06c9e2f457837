"""GradientNoise warns of steps that it doesn't see, and of noise beside which there is hardly a gradient."""

import re

import pytest
import torch
from helpers import Flat, Manual, batches, fit, loader, quiet_trainer, unit_sgd
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_noisy import GradientNoise
from lightning_noisy.callbacks._noise_watch import LOW_RATIO, LOW_STEPS, LOW_UNTIL
from lightning_noisy.schedules import Constant


class Hidden(torch.optim.SGD):
    """An update that is no `step` of a torch optimizer."""

    def update(self):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad)


class Updates(Manual):
    """A manual optimization that goes by every hook."""

    def training_step(self, batch, batch_idx):
        self.manual_backward(Flat.training_step(self, batch, batch_idx))
        self.optimizers().update()


def hidden_sgd(parameters):
    return Hidden(parameters, lr=1.0)


def test_gradient_noise_warns_once_of_steps_that_it_does_not_see():
    with pytest.warns(UserWarning, match=r"Parameters of optimizer 0 \(Hidden\) have changed, .* saw no step") as seen:
        fit(Updates(10, hidden_sgd), [GradientNoise(seed=0)], batches(24), log_every_n_steps=6)
    assert sum("saw no step" in str(each.message) for each in seen) == 1


def test_gradient_noise_warns_of_unseen_steps_of_a_short_fit_at_its_end():
    with pytest.warns(UserWarning, match="saw no step"):
        fit(Updates(10, hidden_sgd), [GradientNoise(seed=0)], batches(3))


def test_gradient_noise_does_not_warn_of_an_optimizer_that_waits():
    class Alternates(Manual):
        def __init__(self):
            super().__init__(10)
            self.v = nn.Parameter(torch.zeros(10))

        def configure_optimizers(self):
            return [unit_sgd([self.w]), unit_sgd([self.v])]

        def training_step(self, batch, batch_idx):
            self.manual_backward(0 * self.w.sum())
            self.optimizers()[0].step()

    fit(Alternates(), [GradientNoise(seed=0)], batches(30))  # warnings are errors


def test_gradient_noise_does_not_warn_of_gradients_that_are_accumulated_or_overflow():
    class Accumulates(Manual):
        def training_step(self, batch, batch_idx):
            self.manual_backward(0 * self.w.sum())
            if batch_idx == 25:
                self.optimizers().step()

    callback = GradientNoise(seed=0)
    fit(Accumulates(10), [callback], batches(30))  # warnings are errors
    assert callback.state_dict()["optimizers"][0]["step"] == 1
    precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**20))

    class Overflows(Flat):
        def training_step(self, batch, batch_idx):
            return (self.w * 3e37).sum()

    fit(Overflows(10), [GradientNoise(seed=0)], batches(4), plugins=[precision])


def test_gradient_noise_does_not_warn_of_optimizers_without_a_chosen_parameter():
    class Two(Manual):
        def __init__(self):
            super().__init__(10)
            self.v = nn.Parameter(torch.zeros(10))

        def configure_optimizers(self):
            return [unit_sgd([self.w]), unit_sgd([self.v])]

        def training_step(self, batch, batch_idx):
            self.manual_backward(self.w.sum() + self.v.sum())
            for optimizer in self.optimizers():
                optimizer.step()

    fit(Two(), [GradientNoise(seed=0, params=lambda name, parameter: name == "w")], batches(12))
    with pytest.warns(UserWarning, match="chooses none of the optimizers' parameters: there is no noise"):
        fit(Two(), [GradientNoise(seed=0, params=lambda name, parameter: False)], batches(2))


def test_gradient_noise_of_a_loss_without_gradient_is_not_called_too_much():
    fit(Flat(100), [GradientNoise(eta=1e-8, seed=0)], batches(30))  # warnings are errors


class Confident(Flat):
    """A gradient whose norm is `ratio` times that of noise of standard deviation 1."""

    ratio = 0.005

    def training_step(self, batch, batch_idx):
        return self.ratio * self.w.sum()


@pytest.mark.parametrize(
    ("ratio", "count", "every", "warned"),
    [(0.005, 205, 1, 1), (0.005, 400, 50, 1), (0.005, 195, 1, 0), (0.005, 240, 60, 0), (0.05, 205, 1, 0)],
)
def test_gradient_noise_warns_once_when_there_is_next_to_nothing_but_noise(recwarn, ratio, count, every, warned):
    assert (LOW_RATIO, LOW_STEPS, LOW_UNTIL) == (0.02, 5, 200)
    documented = "below 0.02 at all logged steps from the start to the fifth, and to t = 200"
    assert documented in " ".join(GradientNoise.__doc__.split())
    model = Confident(1000)
    model.ratio = ratio
    fit(model, [GradientNoise(eta=1.0, gamma=0, seed=0)], batches(count), log_every_n_steps=every)
    messages = [str(each.message) for each in recwarn if "gradient_noise/snr" in str(each.message)]
    assert len(messages) == warned
    for message in messages:
        found = re.search(r"now ([\d.]+): .* take eta=0.01 in place of 1, or relative=True, eta=1.0", message)
        assert float(found.group(1)) == pytest.approx(0.005, rel=0.1)


def test_gradient_noise_of_a_model_that_has_learned_is_no_matter():
    class Learns(Confident):
        def training_step(self, batch, batch_idx):
            return (1.0 if batch_idx == 10 else 0.001) * self.w.sum()

    fit(Learns(1000), [GradientNoise(schedule=Constant(1.0), seed=0)], batches(300))  # warnings are errors


def test_gradient_noise_of_a_resumed_run_is_not_called_too_much(tmp_path):
    fit(Flat(1000), [GradientNoise(eta=1.0, gamma=0, seed=0)], batches(250)).save_checkpoint(tmp_path / "late.ckpt")
    trainer = quiet_trainer(callbacks=[GradientNoise(eta=1.0, gamma=0, seed=0)], max_epochs=2)
    trainer.fit(Confident(1000), loader(batches(250)), ckpt_path=tmp_path / "late.ckpt")  # warnings are errors
