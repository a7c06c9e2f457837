"""A new callback in a new Trainer, and several in one."""

import copy
import pickle

import pytest
import torch
from helpers import Net, batches, loader, quiet_trainer, scalars
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_noisy import ActivationReplacement, replace_activations, restore_activations
from lightning_noisy.nn import NAH, NAN, NSwish
from lightning_noisy.schedules import Constant, Linear


class Deep(Net):
    def __init__(self):
        layers = [nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]
        super().__init__(nn.Sequential(*layers))


class Late(Net):
    """Makes its layers when the Trainer says so."""

    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = Deep().net


def fit(model, *callbacks, **options):
    trainer = quiet_trainer(callbacks=list(callbacks), **options)
    trainer.fit(model, loader(batches(3)))
    return trainer


class Momentum:
    def __init__(self, value):
        self.value = value

    def __call__(self, site):
        return NSwish(momentum=self.value)


MAKERS = {
    "name": lambda: "nsw(momentum=0.2)",
    "alias and order": lambda: "nswish( momentum = 0.2 )",
    "class": lambda: NSwish,
    "mapping that feeds itself": lambda: {"tanh": "relu", "relu": "nsw"},
    "lambda": lambda: lambda site: NSwish(momentum=0.2),
    "closure": lambda value=0.2: lambda site: NSwish(momentum=value),
    "wrapping": lambda: lambda site: nn.Sequential(site.module, NSwish()),
    "noisy wrapped": lambda: {"tanh": lambda site: nn.Sequential(NAH(), nn.Dropout(0.1)), "relu": "nah"},
}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS.keys())
@pytest.mark.parametrize("clone", [lambda model: model, copy.deepcopy])
def test_new_callback_in_a_new_trainer_keeps_what_was_learned(maker, clone):
    model = Deep()
    fit(model, ActivationReplacement(maker()))
    model = clone(model)
    modules, state = list(model.modules()), {k: v.clone() for k, v in model.state_dict().items()}
    again = ActivationReplacement(maker())
    trainer = quiet_trainer(callbacks=[again])
    random_state = torch.get_rng_state()
    again.setup(trainer, model, "validate")
    assert torch.equal(torch.get_rng_state(), random_state)
    trainer.validate(model, loader(batches(1)), verbose=False)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_new_callback_keeps_annealed_activations_and_goes_on_annealing():
    model = Deep()
    fit(model, ActivationReplacement("nah", noise=Linear(30.0, end=0.5)))
    p, c = [model.net[i].p.detach().clone() for i in (1, 3, 5)], model.net[1].c.item()
    assert c != 30
    fit(model, ActivationReplacement("nah", noise=Constant(0.0)), limit_train_batches=0)
    assert all(torch.equal(model.net[i].p, before) for i, before in zip((1, 3, 5), p, strict=True))
    fit(model, ActivationReplacement("nah", noise=Constant(0.25)))
    assert model.net[1].c == 0.25


def test_annealed_activations_of_ones_own_are_kept():
    model = Deep()
    model.net[1] = kept = NAH("tanh", c=4.0)
    kept.c.fill_(1.0)
    replace_activations(model, {"tanh": "nah(c=4.0)"})
    assert model.net[1] is kept
    assert kept.c == 1.0
    replace_activations(model, {"tanh": "nah(c=2.0)"})
    assert model.net[1].c == 2.0


def test_pickled_model_keeps_what_was_learned():
    model = replace_activations(Deep().net, {"tanh": "nah", "relu": NSwish})
    model[1].c.fill_(7.0)
    model = pickle.loads(pickle.dumps(model))
    modules = list(model)
    replace_activations(model, {"tanh": "nah", "relu": NSwish})
    assert all(a is b for a, b in zip(modules, model, strict=True))


def test_another_function_or_option_replaces_anew():
    def maker(value):
        return lambda site: NSwish(momentum=value)

    model = Deep().net
    for to in (
        maker(0.1),
        maker(0.2),
        lambda site: NSwish(beta=0.1),
        Momentum(0.1),
        Momentum(0.2),
        "nsw",
        "nsw(beta=1)",
    ):
        before = model[1]
        replace_activations(model, to)
        assert model[1] is not before


def test_module_that_was_put_there_since_is_replaced():
    model = replace_activations(Deep().net, "nsw")
    model[1] = nn.Tanh()
    replace_activations(model, "nsw")
    assert type(model[1]) is NSwish


def test_rules_that_the_new_modules_do_not_match_any_more_keep_them():
    model = Deep()
    for _ in range(2):
        fit(model, ActivationReplacement("nsw", include=nn.Tanh))
        assert [type(model.net[i]) for i in (1, 3)] == [NSwish, nn.ReLU]


def test_options_of_more_places_add_them():
    model = replace_activations(Deep().net, "nsw", keep_last=1)
    first = model[1]
    assert type(model[5]) is nn.ReLU
    replace_activations(model, "nsw", keep_last=1)
    assert type(model[5]) is nn.ReLU
    replace_activations(model, "nsw")
    assert model[1] is first
    assert type(model[5]) is NSwish


@pytest.mark.parametrize("model", [Deep, Late])
def test_several_callbacks_replace_one_after_the_other(model):
    made = model()
    for _ in range(2):
        trainer = fit(made, ActivationReplacement({"relu": "nsw"}), ActivationReplacement({"tanh": "nah"}))
        assert [type(made.net[i]) for i in (1, 3, 5)] == [NAH, NSwish, NSwish]
    assert "configure_model" not in made.__dict__
    assert trainer.callback_metrics == {}


def test_several_callbacks_leave_configure_model_where_it_is_not_called():
    model = Late()
    trainer = quiet_trainer()
    several = [ActivationReplacement({"relu": "nsw"}), ActivationReplacement({"tanh": "nah"})]
    trainer.callbacks = several
    for callback in several:
        callback.setup(trainer, model, "fit")
    assert "configure_model" in model.__dict__
    for callback in several:
        callback.teardown(trainer, model, "fit")
    assert "configure_model" not in model.__dict__


@pytest.mark.parametrize("rules", ["functions", "names"])
def test_several_callbacks_anneal_each_its_own(tmp_path, rules):
    if rules == "functions":
        tos = [{"to": {"relu": "nan"}}, {"to": {"tanh": "nah"}}]
    else:
        tos = [{"to": "nah", "include": ["net.3", "net.5"]}, {"to": "nah", "exclude": ["net.3", "net.5"]}]
    model = Deep()
    model.net.append(NAN("sigmoid"))  # of ones own: nobody's
    for number in range(2):  # the second time the modules are there already
        callbacks = [
            ActivationReplacement(**each, noise=Linear(end, end=0.0, steps=2))
            for each, end in zip(tos, (2.0, 8.0), strict=True)
        ]
        logger = TensorBoardLogger(tmp_path, "", f"v{number}")
        fit(model, *callbacks, logger=logger, log_every_n_steps=1, max_steps=2)
        assert [model.net[i].c.item() for i in (1, 3, 5, 7)] == [4.0, 1.0, 1.0, 0.5]
        logged = scalars(tmp_path / f"v{number}")
        assert [v for _, v in logged["activation_noise/c/noise0"]] == [2.0, 1.0]
        assert [v for _, v in logged["activation_noise/c/noise1"]] == [8.0, 4.0]
        assert "activation_noise/c" not in logged


def test_single_noise_of_several_callbacks_anneals_all_and_keeps_its_tag(tmp_path):
    model = Deep()
    callbacks = [ActivationReplacement({"relu": "nah"}), ActivationReplacement({"tanh": "nah"}, noise=Constant(3.0))]
    fit(model, *callbacks, logger=TensorBoardLogger(tmp_path, "", "v"), log_every_n_steps=1)
    assert [model.net[i].c.item() for i in (1, 3)] == [3.0, 3.0]
    assert scalars(tmp_path / "v").keys() >= {"activation_noise/c"}


def test_one_of_several_callbacks_that_has_nothing_to_anneal_is_refused():
    callbacks = [
        ActivationReplacement({"relu": "nah"}, noise=Constant(1.0)),
        ActivationReplacement("gelu", noise=Linear(1.0)),
    ]
    with pytest.raises(MisconfigurationException, match="none after the replacement by 'gelu'"):
        fit(Deep(), *callbacks)


@pytest.mark.parametrize("model", [Deep, Late])
def test_the_same_callback_replaces_again_what_was_restored(model):
    made, callback = model(), ActivationReplacement("nsw")
    fit(made, callback)
    restore_activations(made)
    assert type(made.net[3]) is nn.ReLU
    trainer = fit(made, callback)
    assert type(made.net[3]) is NSwish
    assert any(made.net[3].alpha is p for group in trainer.optimizers[0].param_groups for p in group["params"])


def test_another_replacement_by_a_new_callback_says_what_it_drops():
    model = Deep()
    fit(model, ActivationReplacement({"relu": "nsw", "tanh": "gelu"}))
    with pytest.warns(
        UserWarning, match=r"net.3, net.5 had been replaced before, .* 'nrelu': what was learned .* dropped"
    ):
        fit(model, ActivationReplacement("nrelu"))


def test_new_callback_of_an_object_of_the_same_content_keeps_what_was_learned():
    model = Deep()
    fit(model, ActivationReplacement(Momentum(0.2)))
    kept = model.net[3]
    fit(model, ActivationReplacement(Momentum(0.2)))
    assert model.net[3] is kept
    with pytest.warns(UserWarning, match="what was learned there is dropped"):
        fit(model, ActivationReplacement(Momentum(0.3)))
    assert model.net[3] is not kept


def test_several_callbacks_pool_statistics_once(monkeypatch):
    from lightning_noisy.callbacks import activation_replacement

    calls = []
    monkeypatch.setattr(activation_replacement, "synchronize_statistics", lambda model: calls.append(model))
    to = "nsw(synchronized=True)"
    fit(Deep(), ActivationReplacement({"relu": to}), ActivationReplacement({"tanh": to}))
    assert len(calls) == 3
