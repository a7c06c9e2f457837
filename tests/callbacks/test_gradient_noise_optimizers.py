"""GradientNoise and the optimizers of a Trainer: new ones, none, several, and ones whose steps nobody sees."""

import lightning as L
import pytest
import torch
from helpers import Flat, Manual, Net, SpySGD, all_equal, batches, fit, loader, parameters_of, quiet_trainer, unit_sgd
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_noisy import GradientNoise


def hooks(optimizer):
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def renew_by_strategy(trainer):
    trainer.strategy.setup_optimizers(trainer)


def renew_by_assignment(trainer):
    trainer.optimizers = [unit_sgd(trainer.lightning_module.parameters())]


class RenewsAtStart(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            self.renew(trainer)


class RenewsAtEpoch(L.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.renew(trainer)


class RenewsAtEnd(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            self.renew(trainer)


@pytest.mark.parametrize("make", [RenewsAtStart, RenewsAtEpoch, RenewsAtEnd])
@pytest.mark.parametrize("renew", [renew_by_strategy, renew_by_assignment])
@pytest.mark.parametrize("model", [Flat, Manual])
def test_gradient_noise_follows_optimizers_that_are_made_anew(make, renew, model):
    callback = GradientNoise(eta=1.0, seed=0)
    before, after = make(), make()
    before.renew, after.renew = (lambda trainer: None), renew
    plain, renewed = model(100), model(100)
    fit(plain, [GradientNoise(eta=1.0, seed=0), before], max_epochs=2)
    first = []
    watch = L.Callback()
    watch.on_train_start = lambda trainer, pl_module: first.append(trainer.optimizers[0])
    trainer = fit(renewed, [callback, after, watch], max_epochs=2)
    assert torch.equal(plain.w, renewed.w)
    assert trainer.optimizers[0] is not first[0]
    assert callback.state_dict()["optimizers"] == [{"seed": 0, "stream": "0.0", "step": 8}]
    assert hooks(first[0]) == hooks(trainer.optimizers[0]) == 0


def test_gradient_noise_without_an_optimizer_does_nothing():
    class Nothing(Flat):
        def configure_optimizers(self):
            return None

    callback = GradientNoise(seed=0)
    with pytest.warns(UserWarning, match="this fit will run with no optimizer"):
        fit(module := Nothing(10), [callback])
    assert module.w.count_nonzero() == 0


def test_gradient_noise_of_an_optimizer_that_is_listed_twice_is_added_once():
    class Two(Manual):
        def configure_optimizers(self):
            optimizer = unit_sgd(self.parameters())
            return [optimizer, optimizer]

        def optimizers(self, use_pl_optimizer=True):
            return super().optimizers()[0]

    once, twice = Manual(100), Two(100)
    for model in (once, twice):
        callback = GradientNoise(eta=1.0, seed=0)
        fit(model, [callback])
        assert len(callback.state_dict()["optimizers"]) == 1
    assert torch.equal(once.w, twice.w)


def test_gradient_noise_that_one_optimizer_refuses_is_on_none():
    class Bare(torch.optim.Optimizer):
        def __init__(self, params):
            self.param_groups, self.state, self.defaults = [{"params": list(params)}], {}, {}

        def step(self, closure=None):
            return closure and closure()

    class Both(Manual):
        refused = True

        def configure_optimizers(self):
            self.first = unit_sgd(self.parameters())
            return [self.first, Bare(self.parameters())] if self.refused else self.first

    callback = GradientNoise(eta=1.0, seed=0)
    model = Both(10)
    with pytest.raises(TypeError, match="Bare has no hooks"):
        fit(model, [callback])
    assert hooks(model.first) == 0
    model.refused = False
    fit(model, [])
    assert model.w.count_nonzero() == 0


def test_gradient_noise_of_a_later_fit_of_the_trainer_starts_at_t_zero_and_is_another_one():
    callback = GradientNoise(eta=1.0, seed=0)
    trainer = quiet_trainer(callbacks=[callback], max_epochs=1)
    noises = []
    for epochs in (1, 2, 3):
        module = Flat(1000)
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module, loader(batches(2)))
        assert callback.state_dict()["optimizers"][0]["step"] == 2
        noises += module.seen
    assert [noise.std().item() for noise in noises[::2]] == pytest.approx([1.0] * 3, rel=0.1)
    correlations = torch.corrcoef(torch.stack(noises)) - torch.eye(6)
    assert correlations.abs().max() < 5 / 1000**0.5
    fresh = Flat(1000)  # a new Trainer begins as the first one did
    fit(fresh, [callback], batches(2))
    assert all_equal(fresh.seen, noises[:2])


def test_gradient_noise_of_a_later_fit_resumes_as_that_fit_went_on(tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "third.ckpt")

    trainer = quiet_trainer(callbacks=[GradientNoise(eta=1.0, seed=0), Save()], max_epochs=1)
    trainer.fit(Flat(100), loader(batches(2)))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module := Flat(100), loader(batches(2)))
    resumed = quiet_trainer(callbacks=[GradientNoise(eta=1.0, seed=0), Save()], max_epochs=2)
    resumed.fit(again := Flat(100), loader(batches(2)), ckpt_path=tmp_path / "third.ckpt")
    assert all_equal(again.seen, module.seen[1:])


class Around(torch.optim.Optimizer):
    """A wrapper without super().__init__."""

    def __init__(self, base):
        self.base, self.param_groups, self.defaults, self.state = base, base.param_groups, {}, base.state

    def step(self, closure=None):
        return self.base.step(closure)

    def zero_grad(self, set_to_none=True):
        self.base.zero_grad(set_to_none)


def test_gradient_noise_of_a_wrapper_and_what_is_inside_of_it_is_added_once():
    class Both(Manual):
        def configure_optimizers(self):
            base = unit_sgd(self.parameters())
            return [Around(base), base]

        def optimizers(self, use_pl_optimizer=True):
            return super().optimizers()[0]

    once, both = Manual(100), Both(100)
    for model in (once, both):
        fit(model, [GradientNoise(eta=1.0, seed=0)])
    assert torch.equal(once.w, both.w)


def test_gradient_noise_of_an_optimizer_that_leaves_and_comes_back_goes_on():
    class Two(Manual):
        def __init__(self):
            super().__init__(10)
            self.v = nn.Parameter(torch.zeros(10))

        def configure_optimizers(self):
            return [unit_sgd([self.w]), unit_sgd([self.v])]

        def training_step(self, batch, batch_idx):
            self.manual_backward(0 * (self.w.sum() + self.v.sum()))
            optimizers = self.optimizers()
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                optimizer.step()

    class Alternates(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            self.both = list(trainer.optimizers)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            trainer.strategy.optimizers = self.both[1:] if batch_idx % 2 else list(self.both)

    callback = GradientNoise(eta=1.0, seed=0)
    fit(Two(), [callback, alternates := Alternates()], batches(6))
    first, second = (optimizer.seen for optimizer in alternates.both)
    fit(steady := Two(), [GradientNoise(eta=1.0, seed=0)], batches(6))
    assert all_equal([grads[0] for grads in second], [grads[0] for grads in steady.optimizers()[1].optimizer.seen])
    assert all_equal([g[0] for g in first], [g[0] for g in steady.optimizers()[0].optimizer.seen[:3]])
    states = callback.state_dict()["optimizers"]
    assert [(state["stream"], state["step"]) for state in states] == [("0.0", 3), ("0.1", 6)]


def test_gradient_noise_is_not_restored_by_another_trainer_in_the_middle_of_a_fit(tmp_path):
    callback = GradientNoise(eta=1.0, seed=0)

    class Validates(Flat):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                inner = quiet_trainer(callbacks=[callback])
                inner.validate(Net(), loader(batches(1)), ckpt_path=tmp_path / "other.ckpt", verbose=False)
            return super().training_step(batch, batch_idx)

    fit(Net(), [GradientNoise(eta=1.0, seed=5)]).save_checkpoint(tmp_path / "other.ckpt")
    fit(Validates(10), [callback])
    assert callback.state_dict()["optimizers"] == [{"seed": 0, "stream": "0.0", "step": 4}]


@pytest.mark.skipif(L.__version__ < "2.6", reason="Lightning 2.5.0 itself trains 5 of 10 batches after the finder's 5")
@pytest.mark.filterwarnings("ignore:The .* does not have many workers", "ignore:.*treespec", "ignore:.*is not empty")
def test_gradient_noise_after_a_learning_rate_finder_in_a_later_fit_starts_anew(tmp_path):
    class Tunable(Net):
        lr = 0.1

        def configure_optimizers(self):
            return SpySGD(self.parameters(), lr=self.lr)

    callback = GradientNoise(seed=0)
    finder = LearningRateFinder(num_training_steps=5, update_attr=False)
    options = {"default_root_dir": tmp_path, "enable_checkpointing": True}
    trainer = quiet_trainer(callbacks=[finder, callback], max_epochs=1, **options)
    for epochs in (1, 2):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(Tunable(), loader(batches(10)))
        later = f"@{trainer.global_step - 10}" if epochs == 2 else ""
        assert callback.state_dict()["optimizers"] == [{"seed": 0, "stream": f"0.0{later}", "step": 10}]


def test_gradient_noise_on_an_optimizer_without_a_hash():
    class Equal(SpySGD):
        __hash__ = None

        def __eq__(self, other):
            return isinstance(other, Equal)

    fit(model := Flat(10, lambda parameters: Equal(parameters, lr=1.0)), [GradientNoise(eta=1.0, seed=0)])
    assert model.w.count_nonzero() == 10


def test_gradient_noise_of_a_fit_that_nobody_ended_reaches_no_other_optimizer():
    class Raises(L.Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("in the middle")

        def on_exception(self, *_):
            raise ValueError("on the way out")  # so that the hook of ours is not called

    trainer = quiet_trainer(callbacks=[Raises(), callback := GradientNoise(eta=1.0, seed=0)])
    with pytest.raises(ValueError, match="on the way out"):
        trainer.fit(Flat(10), loader(batches(2)))
    trainer.optimizers = [unit_sgd(Flat(10).parameters())]
    fit(plain := Flat(10), [])
    assert plain.w.count_nonzero() == 0
    assert callback.state_dict()["optimizers"] == [{"seed": 0, "stream": "0.0", "step": 1}]
    fit(model := Flat(10), [callback])
    assert hooks(model.optimizers().optimizer) == 0


@pytest.mark.parametrize("of", ["spectral norm", "dropout", "low rank"])
def test_gradient_noise_runs_no_parametrization_of_an_embedding(of):
    class LowRank(nn.Embedding):
        def __init__(self):
            super().__init__(5, 4, padding_idx=0)
            del self.weight
            self.a, self.b = nn.Parameter(torch.ones(5, 1)), nn.Parameter(torch.ones(1, 4))

        def forward(self, x):
            return nn.functional.embedding(x, self.a @ self.b)

    def make():
        torch.manual_seed(0)
        model = Padded()
        if of == "low rank":
            model.embedding = LowRank()
        elif of == "dropout":
            nn.utils.parametrize.register_parametrization(model.embedding, "weight", nn.Dropout())
        else:
            model.embedding = nn.utils.parametrizations.spectral_norm(model.embedding)
        return model

    plain, zero = make(), make()
    for model, callbacks in ((plain, []), (zero, [GradientNoise(eta=0, seed=0)])):
        torch.manual_seed(1)
        fit(model, callbacks, batches(3))
    assert all_equal(list(plain.state_dict().values()), list(zero.state_dict().values()))
    fit(make(), [GradientNoise(eta=1.0, seed=0)], batches(3))


def test_gradient_noise_reaches_a_wrapper_whose_first_step_comes_before_any_zero_grad():
    plain, wrapped = Flat(100), Flat(100, lambda parameters: Around(unit_sgd(parameters)))
    for model in (plain, wrapped):
        callback = GradientNoise(eta=1.0, seed=0)
        fit(model, [callback])
        assert callback.state_dict()["optimizers"][0]["step"] == 4
    assert torch.equal(plain.w, wrapped.w)


def test_gradient_noise_at_work_refuses_another_trainer_and_goes_on():
    callback = GradientNoise(eta=1.0, seed=0)

    class Nests(Flat):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                with pytest.raises(MisconfigurationException, match="Give each Trainer its own"):
                    quiet_trainer(callbacks=[callback]).fit(Flat(10), loader(batches(1)))
                quiet_trainer(callbacks=[callback]).validate(Net(), loader(batches(1)), verbose=False)
            return super().training_step(batch, batch_idx)

    plain, nests = Flat(100), Nests(100)
    fit(nests, [callback])
    fit(plain, [GradientNoise(eta=1.0, seed=0)])
    assert torch.equal(plain.w, nests.w)


class Padded(L.LightningModule):
    def __init__(self, sparse=False, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(5, 4, padding_idx=2, sparse=sparse)
        self.head = nn.Linear(4, 5, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.bag = nn.EmbeddingBag(3, 4, padding_idx=-1)

    def training_step(self, batch, batch_idx):
        x = torch.tensor([[0, 1, 2]])
        return self.head(self.embedding(x)).sum() + self.bag(x).sum()

    def configure_optimizers(self):
        return SpySGD(self.parameters())


@pytest.mark.parametrize("sparse", [False, True])
def test_gradient_noise_leaves_padding_rows_as_they_are(sparse):
    model = Padded(sparse)
    before = parameters_of(model)
    fit(model, [GradientNoise(eta=1.0, seed=0)], batches(3))
    (embedding, _, bag), after = before, parameters_of(model)
    assert torch.equal(after[0][2], embedding[2])
    assert torch.equal(after[2][2], bag[2])
    assert (after[0][[0, 1]] != embedding[[0, 1]]).all()
    assert (after[0][[3, 4]] != embedding[[3, 4]]).all() or sparse  # sparse gradients have no rows there
    assert (after[2][:2] != bag[:2]).all()


def test_gradient_noise_is_on_padding_rows_that_are_trained():
    model = Padded(tied=True)
    with torch.no_grad():  # by hand: each of the five outputs is a product with the three rows, and their sum is summed
        clean = model.embedding.weight[:3].sum(0)
    fit(model, [GradientNoise(eta=1.0, seed=0)], batches(1))
    noise = model.optimizers().optimizer.seen[0][0][2] - clean
    assert (noise.abs() > 0.01).all()
