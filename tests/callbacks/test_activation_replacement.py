import lightning as L
import pytest
import torch
from helpers import Net, all_equal, batches, loader, parameters_of, quiet_trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_noisy import ActivationReplacement, replace_activations
from lightning_noisy.nn import NReLU, NSwish


def test_replacement_equals_the_function_and_trains_the_new_parameters():
    def run(*, callback):
        L.seed_everything(0, verbose=False)
        module = Net()
        if not callback:
            replace_activations(module, "nsw")
        callbacks = [ActivationReplacement("nsw")] if callback else []
        quiet_trainer(callbacks=callbacks).fit(module, loader(batches(4)))
        assert type(module.net[1]) is NSwish
        assert module.net[1].alpha != 0
        return parameters_of(module)

    assert all_equal(run(callback=True), run(callback=False))


def test_replacement_synchronizes_once_a_step():
    module, sizes = Net(), []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            sizes.append((pl_module.net[1].pending[0].item(), pl_module.net[1].num_batches_tracked.item()))

    callbacks = [ActivationReplacement("nsw(synchronized=True)"), Watch()]
    quiet_trainer(callbacks=callbacks, accumulate_grad_batches=2).fit(module, loader(batches(4)), loader(batches(1)))
    assert sizes == [(64, 0), (0, 1), (64, 1), (0, 2)]


def test_replacement_swaps_once_over_fit_validate_and_fit():
    module, seen = Net(), []

    class Watch(L.Callback):
        def on_fit_end(self, trainer, pl_module):
            seen.append((pl_module.net[1], pl_module.net[1].num_batches_tracked.item()))

    trainer = quiet_trainer(callbacks=[ActivationReplacement({"relu": "nrelu"}), Watch()])
    trainer.fit(module, loader(batches(4)))
    trainer.validate(module, loader(batches(2)), verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(batches(4)))
    (first, four), (second, eight) = seen
    assert first is second
    assert isinstance(first, NReLU)
    assert (four, eight) == (4, 8)


@pytest.mark.parametrize(
    "to", [{"tanh": "relu", "relu": "nrelu"}, lambda site: nn.Sequential(nn.ReLU(), nn.Dropout(0.1))]
)
def test_replacement_does_not_swap_again_what_it_has_swapped(to):
    module = Net(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)))
    trainer = quiet_trainer(callbacks=[ActivationReplacement(to)])
    trainer.fit(module, loader(batches(2)))
    after_fit = list(module.modules())
    trainer.validate(module, loader(batches(2)), verbose=False)
    assert all(a is b for a, b in zip(after_fit, module.modules(), strict=True))


def test_checkpoint_of_a_swapped_model_resumes_and_tests(tmp_path):
    path = tmp_path / "model.ckpt"
    module = Net()
    trainer = quiet_trainer(callbacks=[ActivationReplacement("nsw")])
    trainer.fit(module, loader(batches(4)))
    trainer.save_checkpoint(path)
    fresh = Net()
    trainer = quiet_trainer(callbacks=[ActivationReplacement("nsw")])
    trainer.validate(fresh, loader(batches(1)), ckpt_path=path, verbose=False)
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), fresh.state_dict().values(), strict=True)
    )


def test_model_swapped_in_init_loads_by_load_from_checkpoint(tmp_path):
    class Swapped(Net):
        def __init__(self):
            super().__init__()
            replace_activations(self, "nsw")

    module = Swapped()
    trainer = quiet_trainer()
    trainer.fit(module, loader(batches(4)))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = Swapped.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert torch.equal(loaded.net[1].running_rho, module.net[1].running_rho)


def test_replacement_refuses_a_model_that_builds_layers_later():
    class Late(Net):
        def configure_model(self):
            self.late = nn.ReLU()

    with pytest.raises(MisconfigurationException, match=r"Call replace_activations\(self, ...\) in configure_model"):
        quiet_trainer(callbacks=[ActivationReplacement("nsw")]).fit(Late(), loader(batches(1)))


def test_replacement_refuses_bad_names_when_it_is_made():
    with pytest.raises(ValueError, match="'nws' is not the name of an activation. Did you mean 'nsw'"):
        ActivationReplacement("nws")
    with pytest.raises(TypeError, match="to must be"):
        ActivationReplacement(None)


def test_replacement_warns_if_it_has_replaced_nothing():
    with pytest.warns(UserWarning, match="replaced nothing"):
        quiet_trainer(callbacks=[ActivationReplacement("nsw")]).fit(Net(nn.Linear(8, 3)), loader(batches(1)))
