import copy
import dataclasses
import pickle

import pytest

from lightning_noisy.schedules import Constant, InverseDecay, Schedule

# optax.add_noise(eta=0.3, gamma=0.55) after n steps; its n is our t + 1.
OPTAX = {
    1: 0.54772256,
    2: 0.45266548,
    3: 0.40490420,
    10: 0.29077739,
    100: 0.15436919,
    1000: 0.08195220,
    10**6: 0.01226198,
}


@pytest.mark.parametrize(("n", "std"), OPTAX.items())
def test_inverse_decay_equals_the_published_table(n, std):
    assert InverseDecay(eta=0.3, gamma=0.55)(n - 1) == pytest.approx(std, abs=5e-9)


def test_inverse_decay_starts_at_the_root_of_eta_which_is_a_variance():
    assert InverseDecay(eta=0.3)(0) == 0.3**0.5


def test_inverse_decay_defaults_are_the_papers():
    assert InverseDecay() == InverseDecay(eta=0.01, gamma=0.55)


def test_inverse_decay_without_gamma_stays_constant():
    assert InverseDecay(eta=0.25, gamma=0)(12345) == Constant(0.5)(12345) == 0.5


@pytest.mark.parametrize("schedule", [InverseDecay(0.3, 0.55), Constant(0.1)])
def test_schedules_are_values(schedule):
    assert isinstance(schedule, Schedule)
    assert pickle.loads(pickle.dumps(schedule)) == copy.deepcopy(schedule) == schedule
    assert eval(repr(schedule)) == schedule
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.eta = 1.0


@pytest.mark.parametrize("value", [-1, -0.001, float("nan"), float("inf")])
def test_schedules_refuse_values_that_are_no_scale(value):
    with pytest.raises(ValueError, match=f"eta must be a finite number >= 0, got {value}"):
        InverseDecay(eta=value)
    with pytest.raises(ValueError, match="gamma must be a finite number >= 0"):
        InverseDecay(gamma=value)
    with pytest.raises(ValueError, match="std must be a finite number >= 0"):
        Constant(value)


@pytest.mark.parametrize("value", ["0.1", None, True, 1j])
def test_schedules_refuse_what_is_no_number(value):
    with pytest.raises(TypeError, match="eta must be a number"):
        InverseDecay(eta=value)
