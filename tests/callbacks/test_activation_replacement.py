import lightning as L
import pytest
import torch
from helpers import Net, SpySGD, all_equal, batches, loader, parameters_of, quiet_trainer, scalars
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_noisy import ActivationReplacement, load_replaced, replace_activations
from lightning_noisy.nn import NReLU, NSwish
from lightning_noisy.schedules import Linear


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


class Late(Net):
    """Makes its layers when the Trainer says so."""

    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def test_layers_of_configure_model_are_replaced_once_and_trained(tmp_path):
    module = Late()
    trainer = quiet_trainer(callbacks=[ActivationReplacement("nsw")])
    trainer.fit(module, loader(batches(4)))
    first = module.net[1]
    assert type(first) is NSwish
    assert first.alpha != 0
    trainer.validate(module, loader(batches(2)), verbose=False)
    assert module.net[1] is first
    assert "configure_model" not in module.__dict__
    trainer.save_checkpoint(tmp_path / "late.ckpt")
    loaded = load_replaced(Late, tmp_path / "late.ckpt")
    assert torch.equal(loaded.net[1].running_rho, first.running_rho)


class Calls(Net):
    """Calls functions, uses a module twice, and has a gate."""

    def __init__(self):
        super().__init__(nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 8)]))
        self.act = nn.Tanh()

    @property
    def first(self):
        return self.activation_calls["tanh#0"]

    def forward(self, x):
        x = torch.tanh(self.net[0](x))
        x = self.act(self.net[1](x)) * torch.sigmoid(self.net[3](x))
        return self.net[2](self.act(x))

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def test_noise_is_annealed_logged_and_goes_on_after_a_resume(tmp_path):
    seen = {}

    class Watch(L.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            seen.setdefault(trainer.global_step, []).append(pl_module.first.c.item())

    def trainer(epochs):
        noise = ActivationReplacement("nah", noise=Linear(30.0, end=0.5, steps=7))
        return quiet_trainer(
            callbacks=[noise, Watch()],
            max_epochs=epochs,
            accumulate_grad_batches=2,
            logger=TensorBoardLogger(tmp_path, "events", str(epochs)),
            log_every_n_steps=1,
        )

    run = trainer(1)
    run.fit(Calls(), loader(batches(8)))
    run.save_checkpoint(tmp_path / "half.ckpt")
    trainer(2).fit(Calls(), loader(batches(8)), ckpt_path=tmp_path / "half.ckpt")
    expected = [30 + (0.5 - 30) * t / 7 for t in range(8)]
    assert [seen[t][0] for t in range(8)] == [pytest.approx(c, rel=1e-6) for c in expected]
    logged = scalars(tmp_path / "events" / "1")["activation_noise/c"]
    assert [value for _, value in logged] == [pytest.approx(c) for c in expected[:4]]


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_noise_has_the_length_of_the_training_by_default(interval):
    module = Calls()
    callback = ActivationReplacement("nan", noise=Linear(4.0, end=0.0), interval=interval)
    values = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            values.append(pl_module.first.c.item())

    quiet_trainer(callbacks=[callback, Watch()], max_epochs=2).fit(module, loader(batches(2)))
    assert values == ([4.0, 3.0, 2.0, 1.0] if interval == "step" else [4.0, 4.0, 2.0, 2.0])


def test_noise_without_noisy_activations_is_refused():
    callback = ActivationReplacement("nsw", noise=Linear(30.0))
    with pytest.raises(MisconfigurationException, match=r"the model has none after the replacement by 'nsw'"):
        quiet_trainer(callbacks=[callback]).fit(Net(), loader(batches(1)))
    with pytest.raises(TypeError, match=r"noise must be a schedule.*Use Constant\(c\)"):
        ActivationReplacement("nah", noise=0.5)


@pytest.mark.parametrize("to", ["nsw", {"tanh": "nah(alpha=1.1)"}, {"tanh": NSwish}])
def test_load_replaced_gives_the_model_that_was_saved(tmp_path, to):
    module, path = Calls(), tmp_path / "model.ckpt"
    noise = Linear(9.0, end=1.0) if to == {"tanh": "nah(alpha=1.1)"} else None
    trainer = quiet_trainer(callbacks=[ActivationReplacement(to, noise=noise, outputs=True)])
    trainer.fit(module, loader(batches(4)))
    trainer.save_checkpoint(path)
    own = isinstance(to, dict) and to["tanh"] is NSwish
    if own:
        with pytest.raises(ValueError, match="pass it as to="):
            load_replaced(Calls, path)
    loaded = load_replaced(Calls, path, to=to if own else None).eval()
    x = torch.randn(5, 8)
    assert torch.equal(loaded(x), module.eval()(x))
    assert repr(loaded) == repr(module)
    if noise:
        assert loaded.first.c == module.first.c == 3.0
    with pytest.raises(RuntimeError, match=r"load with lightning_noisy\.load_replaced"):
        Calls.load_from_checkpoint(path)


def test_load_replaced_says_what_is_missing(tmp_path):
    trainer = quiet_trainer()
    trainer.fit(Net(), loader(batches(1)))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match=r"records no replaced activations. Use Net.load_from_checkpoint"):
        load_replaced(Net, tmp_path / "plain.ckpt")
    trainer = quiet_trainer(callbacks=[ActivationReplacement("nsw")])
    trainer.fit(Net(), loader(batches(1)))
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    with pytest.raises(ValueError, match=r"Net has no activations net\.1, which were replaced"):
        load_replaced(Net, tmp_path / "net.ckpt", net=nn.Linear(8, 3))


def test_test_of_a_checkpoint_has_its_annealed_noise(tmp_path):
    callback = ActivationReplacement("nah", noise=Linear(9.0, end=1.0))
    trainer = quiet_trainer(callbacks=[callback])
    trainer.fit(Calls(), loader(batches(4)))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    fresh = Calls()
    again = quiet_trainer(callbacks=[ActivationReplacement("nah")])
    again.validate(fresh, loader(batches(1)), ckpt_path=tmp_path / "model.ckpt", verbose=False)
    assert fresh.first.c == 3.0


@pytest.mark.skipif(not hasattr(callbacks, "WeightAveraging"), reason="came with lightning 2.6")
def test_replacement_after_a_copy_for_averaging_is_refused():
    averaging = callbacks.WeightAveraging()
    with pytest.raises(MisconfigurationException, match="Put ActivationReplacement before it"):
        quiet_trainer(callbacks=[averaging, ActivationReplacement("nsw")]).fit(Net(), loader(batches(1)))
    module = Net()
    quiet_trainer(callbacks=[ActivationReplacement("nsw"), callbacks.WeightAveraging()]).fit(module, loader(batches(4)))
    assert type(module.net[1]) is NSwish


def test_compiled_model_is_refused_with_the_remedy():
    with pytest.raises(MisconfigurationException, match=r"before torch\.compile\(model\)"):
        quiet_trainer(callbacks=[ActivationReplacement("nsw")]).fit(
            torch.compile(Net(), backend="eager"), loader(batches(1))
        )


class Finetuning(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[:2])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[:2], optimizer)


def test_frozen_activations_are_trained_when_they_thaw():
    module = Net(optimizer=lambda parameters: SpySGD([p for p in parameters if p.requires_grad]))
    trainer = quiet_trainer(callbacks=[ActivationReplacement("nsw"), Finetuning()], max_epochs=1)
    trainer.fit(module, loader(batches(3)))
    assert module.net[1].alpha == 0
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(batches(3)))
    assert module.net[1].alpha != 0


def test_replacement_refuses_bad_names_when_it_is_made():
    with pytest.raises(ValueError, match="'nws' is not the name of an activation. Did you mean 'nsw'"):
        ActivationReplacement("nws")
    with pytest.raises(TypeError, match="to must be"):
        ActivationReplacement(None)


def test_replacement_warns_if_it_has_replaced_nothing():
    with pytest.warns(UserWarning, match="replaced nothing"):
        quiet_trainer(callbacks=[ActivationReplacement("nsw")]).fit(Net(nn.Linear(8, 3)), loader(batches(1)))
