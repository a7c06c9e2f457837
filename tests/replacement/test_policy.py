"""What may be asked for, and what is said of what can't be."""

import copy
import functools
import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn

from lightning_noisy import ActivationReplacement, replace_activations
from lightning_noisy.nn import NAH, NReLU, NSwish, registry
from lightning_noisy.replacement.origin import fingerprint
from lightning_noisy.replacement.policy import REMEDIES
from lightning_noisy.replacement.sites import ActivationSite
from lightning_noisy.schedules import Constant


class Coder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x):
        return self.decoder(self.encoder(x))


class Calling(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.act(self.first(x)).relu())


@pytest.mark.parametrize("use", [ActivationReplacement, functools.partial(replace_activations, Coder())])
@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("nah(alhpa=1)", "'nah' has no option 'alhpa'. Did you mean 'alpha'. It has: alpha, c, inplace, noise, num_p"),
        ({"relu": "nah(alhpa=1)"}, "'nah' has no option 'alhpa'"),
        ({"tanh": "nsw(momentun=1)"}, "'nsw' has no option 'momentun'. Did you mean 'momentum'. It has: beta, bounds"),
        ("normalized(function='tanh')", "'normalized' has no option 'function'"),
        ("leaky_relu(slope=1)", "'leaky_relu' has no option 'slope'.* It has: inplace, negative_slope"),
        ("tanh(x=1)", "'tanh' has no option 'x'. It has: none"),
        ("relu-gpn(x=1)", "'relu-gpn' has no option 'x'. It has: inplace"),
        ("nah(c=-1)", r"'nah\(c=-1\)' can't be made: c must be a finite number >= 0, got -1"),
        ("nani(noise='half-normal')", "can't be made: Noise on the input must be"),
        ("nsw(momentum='a')", "can't be made: "),
        ("nsw(bounds=(2, 3))", "can't be made: bounds must be"),
    ],
)
def test_wrong_options_in_a_name_are_noticed_at_once(use, to, message):
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        use(to)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "spec", ["nah(alpha=1.1, c=0.5)", "nan(num_parameters=4)", "normalized(beta=0.1)", "tanh-gpn", "rrelu(lower=0.1)"]
)
def test_right_options_are_taken_without_a_draw(spec):
    state = torch.get_rng_state()
    ActivationReplacement(spec)
    assert torch.equal(torch.get_rng_state(), state)


def test_options_of_registered_names_are_checked_where_they_are_known():
    made = []

    @registry.register("one")
    def one(*, width=1):
        made.append(1)
        return nn.ReLU()

    @registry.register("any")
    class Any(nn.ReLU):
        def __init__(self, **options):
            super().__init__()

    try:
        with pytest.raises(ValueError, match="'one' has no option 'wdith'. Did you mean 'width'"):
            ActivationReplacement("one(wdith=2)")
        ActivationReplacement("one(width=2)")
        ActivationReplacement("any(x=2)")
        assert made == []
    finally:
        registry.unregister("one")
        registry.unregister("any")


def test_wrong_policy_is_noticed_by_the_callback_too():
    with pytest.raises(ValueError, match="keep_last must be >= 0"):
        ActivationReplacement("nsw", keep_last=-1)
    with pytest.raises(ValueError, match='batchnorm_affine must be "keep" or "strip"'):
        ActivationReplacement("nsw", batchnorm_affine="drop")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gates": "no"}, "gates must be True or False, got 'no'"),
        ({"outputs": 1}, "outputs must be True or False, got 1"),
        ({"after_residual": None}, "after_residual must be"),
        ({"keep_last": "3"}, "keep_last must be an integer >= 0, got '3'"),
        ({"keep_last": True}, "keep_last must be an integer"),
        ({"include": 3}, "include must be a pattern .* got 3"),
        ({"exclude": ["encoder.*", 3]}, "exclude must be a pattern .* got 3"),
        ({"buffer_batchnorm": 1.0}, "buffer_batchnorm must be True, False or the name of a layer, got 1.0"),
    ],
)
def test_options_of_another_type_are_refused_before_anything_is_changed(options, message):
    model = Coder()
    with pytest.raises(TypeError, match=message):
        replace_activations(model, "nsw", **options)
    with pytest.raises(TypeError, match=message):
        ActivationReplacement("nsw", **options)
    assert type(model.encoder[1]) is nn.ReLU


@pytest.mark.parametrize("to", ["nah(c=5)", {"relu": "nah(alpha=1.1, c=5)"}])
def test_c_in_a_name_beside_noise_is_refused(to):
    with pytest.raises(ValueError, match=r"noise= sets c at every step, and 'nah\(.*c=5\)' has a c of its own"):
        ActivationReplacement(to, noise=Constant(1.0))
    ActivationReplacement(to)


@pytest.mark.parametrize(
    ("model", "rules", "message"),
    [
        (
            Coder(),
            {"exclude": "decoder"},
            "exclude='decoder' matches no activation. Those in 'decoder' are 'decoder.*'",
        ),
        (Coder(), {"exclude": ["encoder.*", "decoder"]}, "exclude='decoder' matches no activation"),
        (Coder(), {"exclude": "decoder.11"}, "exclude='decoder.11' matches no activation. Did you mean 'decoder.1'"),
        (Coder(), {"include": ["encoder.*", "x"]}, "include='x' matches no activation."),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Calling()), {"exclude": "2"}, r"'2\[.:\]\*'"),
    ],
)
def test_pattern_that_matches_nothing_warns_with_what_would(model, rules, message):
    with pytest.warns(UserWarning, match=message) as record:
        replace_activations(model, "nsw", after_residual=True, **rules)
    assert len(record) == 1


def test_pattern_that_is_suggested_matches():
    model = replace_activations(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Calling()), "nsw", exclude="2[.:]*")
    assert type(model[1]) is NSwish
    assert type(model[2].act) is nn.ReLU
    assert "activation_calls" not in model[2]._modules


class Holder:
    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __call__(self, site):
        return NSwish()


def reads_global(value):
    namespace = {"NSwish": NSwish, "value": value, "other": object()}
    exec("def make(site): return NSwish(beta=value), other", namespace)
    return namespace["make"]


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("nsw", "nsw", True),
        ("nsw", "nrelu", False),
        ({"relu": "nsw", "tanh": NSwish}, {"tanh": NSwish, "relu": "nsw"}, True),
        (NSwish, NReLU, False),
        (lambda site: NSwish(), lambda other: NSwish(), True),
        (lambda site: NSwish(beta=0.1), lambda site: NSwish(beta=0.2), False),
        (lambda site: NSwish(), lambda site: NAH(), False),
        (lambda site, beta=1: NSwish(beta=beta), lambda site, beta=2: NSwish(beta=beta), False),
        (lambda site, *, beta=1: NSwish(beta=beta), lambda site, *, beta=2: NSwish(beta=beta), False),
        (lambda s: [f(s) for f in (lambda x: x + 1,)], lambda s: [f(s) for f in (lambda x: x + 1,)], True),
        (lambda s: [f(s) for f in (lambda x: x + 1,)], lambda s: [f(s) for f in (lambda x: x + 2,)], False),
        (functools.partial(NSwish, beta=0.1), functools.partial(NSwish, beta=0.1), True),
        (functools.partial(NSwish, beta=0.1), functools.partial(NSwish, beta=0.2), False),
        (nn.LeakyReLU(0.1).forward, nn.LeakyReLU(0.1).forward, True),
        (nn.LeakyReLU(0.1).forward, nn.LeakyReLU(0.2).forward, False),
        (Holder(beta=0.1), Holder(beta=0.1), True),
        (Holder(beta=0.1), Holder(beta=0.2), False),
        (Holder(inner=Holder(x=1)), Holder(inner=Holder(x=2)), False),
        (Holder(lock=threading.Lock()), Holder(lock=threading.Lock()), True),
        (Holder(x=torch.arange(9000)), Holder(x=torch.arange(9000)), True),
        (Holder(x=torch.arange(9000)), Holder(x=torch.cat([torch.arange(8999), torch.tensor([0])])), False),
        (Holder(x=np.arange(9000)), Holder(x=np.arange(9000)[::-1]), False),
        (Holder(x=torch.zeros(2)), Holder(x=torch.zeros(2).bfloat16()), False),
        (Holder(x={1, 2}), Holder(x={2, 1}), True),
        (nn.Sequential(nn.ELU(0.5)).forward, nn.Sequential(nn.ELU(0.6)).forward, False),
        (reads_global(0.1), reads_global(0.1), True),
        (reads_global(0.1), reads_global(0.2), False),
        (reads_global(lambda: 1), reads_global(lambda: 2), False),
    ],
)
def test_fingerprint_tells_what_means_another_thing(first, second, same):
    assert (fingerprint(first) == fingerprint(second)) == same


def test_fingerprint_looks_into_closures_and_ends_in_recursive_ones():
    def made(value):
        def recursive(n):
            return recursive(n - 1) + value if n else value

        return recursive

    assert fingerprint(made(1)) == fingerprint(made(1))
    assert fingerprint(made(1)) != fingerprint(made(2))
    assert fingerprint(made(nn.ELU(0.5))) == fingerprint(made(nn.ELU(0.5)))
    assert fingerprint(made(nn.ELU(0.5))) != fingerprint(made(nn.ELU(0.6)))


def test_fingerprint_is_that_of_another_process():
    code = (
        "import functools; from torch import nn; from lightning_noisy.replacement.origin import fingerprint\n"
        "class Own(nn.Module):\n    def forward(self, x): return x\n"
        "print(fingerprint([lambda site: Own(), functools.partial(nn.ELU, 0.5), {'a', 'b', 'c'}, Own()]))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]

    def run(seed):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert len(run("1").strip()) == 64
    assert run("1") == run("2")


def test_fingerprint_of_what_holds_the_model_itself_stays_when_it_is_swapped():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.beta = Coder(), 0.3

        def maker(self):
            return lambda site: NSwish(beta=self.beta)

    model = Model()
    before = fingerprint(model.maker())
    replace_activations(model, model.maker())
    assert fingerprint(model.maker()) == before
    model.beta = 0.4
    assert fingerprint(model.maker()) != before


def test_fingerprint_is_quick_where_objects_are_shared():
    shared = Holder(x=0)
    for _ in range(60):
        shared = Holder(first=shared, second=shared)
    assert fingerprint(shared) == fingerprint(copy.deepcopy(shared))


def test_every_reason_to_stay_has_a_remedy():
    roles = set(re.findall(r'``"(\w+)"``', ActivationSite.role.__doc__)) - {"hidden", "residual"}
    assert len(roles) == 6
    others = {"after a residual addition", "excluded", "other function", "kept"}
    assert roles | others == set(REMEDIES)
