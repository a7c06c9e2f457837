"""GradientNoise and the optimizers of a Trainer: new ones, none, several, and ones whose steps nobody sees."""

import re

import lightning as L
import pytest
import torch
from helpers import Flat, Manual, Net, SpySGD, all_equal, batches, fit, loader, parameters_of, quiet_trainer, unit_sgd
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_noisy import GradientNoise
from lightning_noisy.callbacks._noise_watch import LOW_RATIO, LOW_STEPS, LOW_UNTIL
from lightning_noisy.schedules import Constant


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


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"optimizers": None},
        {"optimizers": [{"seed": 0, "stream": "0.0", "step": 3}, {"seed": 0, "stream": "0.0", "step": -1}]},
        {"optimizers": [{"seed": 0, "stream": "0.0"}]},
        {"optimizers": [{"seed": "0", "stream": "0.0", "step": 1}]},
        {"optimizers": [{"seed": 0, "stream": None, "step": 1}]},
        {"optimizers": [{"seed": 0, "stream": "0.0", "step": "1"}]},
        {"optimizers": ["0"]},
        "0",
    ],
)
def test_a_state_that_is_none_is_refused_and_changes_nothing(state):
    callback = GradientNoise(eta=1.0, seed=0)
    messages = []

    class Loads(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            with pytest.raises(ValueError, match=r"has a state of \{") as caught:
                callback.load_state_dict(state)
            messages.append(str(caught.value))

    with pytest.raises(ValueError, match="has a state of"):
        callback.load_state_dict(state)
    fit(model := Flat(100), [callback, Loads()])
    fit(plain := Flat(100), [GradientNoise(eta=1.0, seed=0)])
    assert torch.equal(model.w, plain.w)
    assert len(messages) == 4
    assert all("\n" not in message for message in messages)


def test_the_state_of_another_callback_is_not_taken(tmp_path):
    class GradientNoiseScale(L.Callback):
        def state_dict(self):
            return {"scale": 1.0}

    fit(Flat(10), [GradientNoiseScale()]).save_checkpoint(tmp_path / "other.ckpt")
    trainer = quiet_trainer(callbacks=[GradientNoise(seed=0), GradientNoiseScale()], max_epochs=2)
    with pytest.warns(UserWarning, match="was written without GradientNoise: its noise starts at t = 0"):
        trainer.fit(Flat(10), loader(batches(4)), ckpt_path=tmp_path / "other.ckpt")


@pytest.mark.parametrize(("writes", "reads"), [(0, 1), (1, 0), (1, 1)])
def test_a_subclass_and_its_base_find_each_others_state(tmp_path, writes, reads):
    class Mine(GradientNoise):
        pass

    classes = [GradientNoise, Mine]
    fit(Flat(10), [classes[writes](seed=0)]).save_checkpoint(tmp_path / "base.ckpt")
    callback = classes[reads](seed=0)
    trainer = quiet_trainer(callbacks=[callback], max_epochs=2)
    trainer.fit(Flat(10), loader(batches(4)), ckpt_path=tmp_path / "base.ckpt")  # warnings are errors
    assert callback.state_dict()["optimizers"][0]["step"] == 8


@pytest.mark.parametrize("names", [("", "0"), ("noise0", "", ""), ("", "noise0", ""), ("#0", "", "0")])
def test_instances_never_share_a_stream_or_a_tag(names):
    callbacks = [GradientNoise(eta=0.1 * (i + 1), seed=0, name=name) for i, name in enumerate(names)]
    trainer = fit(Flat(10), callbacks)
    streams = [callback.state_dict()["optimizers"][0]["stream"] for callback in callbacks]
    assert len(set(streams)) == len(names)
    tags = [tag for tag in trainer.callback_metrics if tag.startswith("gradient_noise/std")]
    assert len(tags) == len(names)
    for callback, name in zip(callbacks, names, strict=True):
        assert not name or f"gradient_noise/std/{name}" in tags
        assert callback.name == name
