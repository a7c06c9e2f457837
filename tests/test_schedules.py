import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest

from lightning_noisy.schedules import (
    BaseSchedule,
    Constant,
    Cosine,
    Exponential,
    FollowLR,
    InverseDecay,
    InverseSqrt,
    Langevin,
    Linear,
    Piecewise,
    Schedule,
    Warmup,
)

EVERY = [
    Constant(0.1),
    InverseDecay(0.3, 0.55),
    Linear(1.0, 0.5, steps=7),
    Cosine(1.0, 0.5, steps=7),
    Exponential(1.0, 0.9),
    InverseSqrt(1.0, 50),
    Piecewise((5, 9), (0.5, Linear(1.0), 0.1)),
    Warmup(Cosine(1.0), steps=3),
    FollowLR(0.5, power=-0.5),
    Langevin(0.1),
]

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


@pytest.mark.parametrize("schedule", EVERY, ids=repr)
def test_schedules_are_values(schedule):
    assert isinstance(schedule, Schedule)
    assert pickle.loads(pickle.dumps(schedule)) == copy.deepcopy(schedule) == schedule
    assert eval(repr(schedule)) == schedule
    assert hash(schedule) == hash(copy.deepcopy(schedule))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(schedule, dataclasses.fields(schedule)[0].name, 1.0)


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


@pytest.mark.parametrize("schedule", EVERY, ids=repr)
def test_schedules_are_finite_and_not_negative_for_ever(schedule):
    assert isinstance(schedule, BaseSchedule)
    schedule = schedule.resolved(20).with_lr(0.1)
    assert all(0 <= schedule(step) < math.inf for step in (*range(30), 10**9))


@pytest.mark.parametrize("step", [0, 1, 3, 6, 7, 100])
def test_linear_and_cosine_equal_numpy(step):
    assert Linear(1.0, 0.2, steps=7)(step) == pytest.approx(np.interp(step, [0, 7], [1.0, 0.2]))
    phase = np.pi * min(step, 7) / 7
    assert Cosine(1.0, 0.2, steps=7)(step) == pytest.approx(0.2 + 0.8 * np.cos(phase / 2) ** 2)


def test_exponential_and_inverse_sqrt_have_their_half_lives():
    assert Exponential(3.0, 0.5 ** (1 / 10))(20) == pytest.approx(0.75)
    assert InverseSqrt(3.0, 10)(10) ** 2 == pytest.approx(4.5)
    assert InverseSqrt(0.3**0.5)(57) == pytest.approx(InverseDecay(0.3, 1.0)(57))


def test_piecewise_counts_each_part_from_its_own_start():
    schedule = Piecewise([2, 4], [0.5, lambda t: float(t), Exponential(1.0, 0.5)])
    assert [schedule(t) for t in range(7)] == [0.5, 0.5, 0.0, 1.0, 1.0, 0.5, 0.25]


def test_warmup_leads_in_to_its_schedule():
    schedule = Warmup(Exponential(1.0, 0.5), steps=2)
    assert [schedule(t) for t in range(4)] == [0.0, 0.25, 0.25, 0.125]


def test_an_open_horizon_is_filled_in_where_it_stands():
    schedule = Piecewise((10,), (Warmup(Linear(1.0), 2), Cosine(1.0)))
    assert schedule.is_open
    assert Warmup(Linear(1.0), 2).is_open
    assert not Linear(1.0, steps=3).is_open
    assert schedule.resolved(50) == Piecewise((10,), (Warmup(Linear(1.0, steps=10), 2), Cosine(1.0, steps=40)))
    with pytest.raises(ValueError, match='steps="auto" is open'):
        Linear(1.0)(0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Linear(-1.0), ValueError, "start must be a finite number >= 0"),
        (lambda: Linear(1.0, float("nan")), ValueError, "end must be"),
        (lambda: Linear(1.0, steps=0), ValueError, "steps must be >= 1, got 0"),
        (lambda: Cosine(1.0, steps=2.5), TypeError, 'steps must be an integer or "auto", got 2.5'),
        (lambda: Exponential(1.0, 1.1), ValueError, "rate must be <= 1"),
        (lambda: InverseSqrt(1.0, 0), ValueError, "timescale must be > 0"),
        (lambda: Piecewise((1, 2), (0.1, 0.2)), ValueError, "one part more than boundaries, got 2 and 2"),
        (lambda: Piecewise((5, 5), (0.1, 0.2, 0.3)), ValueError, "boundaries must increase"),
        (lambda: Piecewise((5,), (0.1, -0.2)), ValueError, "a part must be"),
        (lambda: Warmup(0.1, 5), TypeError, "schedule must be callable"),
        (lambda: Warmup(Constant(1.0), "auto"), TypeError, "length of a warm-up must be an integer"),
    ],
)
def test_schedules_refuse_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("schedule", "std"),
    [
        (FollowLR(2.0), 0.5),
        (FollowLR(2.0, power=0.5), 1.0),
        (Langevin(0.5), 2.0),  # sqrt(2 * 0.5 / 0.25)
        (Warmup(FollowLR(2.0), steps=4), 0.375),
        (Piecewise((3,), (0.1, Langevin(0.5))), 2.0),
        (Warmup(Constant(1.0), steps=4), 0.75),
    ],
)
def test_schedules_that_follow_the_learning_rate_take_it_in(schedule, std):
    assert schedule.with_lr(0.25)(3) == pytest.approx(std)


def test_schedules_say_whether_they_follow_the_learning_rate():
    assert FollowLR().follows_lr
    assert Warmup(Piecewise((3,), (0.1, Langevin())), steps=2).follows_lr
    assert not Warmup(Constant(1.0), steps=2).follows_lr
    assert not FollowLR(0.5).with_lr(0.1).follows_lr
    with pytest.raises(ValueError, match=r"FollowLR\(factor=1.0, power=1.0\) needs a learning rate"):
        FollowLR()(0)


def test_schedules_that_follow_the_learning_rate_have_no_noise_at_zero():
    for lr in (0.0, -1e-18):  # which schedulers reach by rounding
        assert FollowLR(1.0, power=-1.0).with_lr(lr)(0) == Langevin().with_lr(lr)(0) == 0.0


def test_schedules_of_ones_own_need_not_be_dataclasses():
    class Own(BaseSchedule):
        def __call__(self, step):
            return 0.5

    assert not Own().is_open
    assert not Own().follows_lr
    assert Warmup(Own(), steps=2).with_lr(0.1)(1) == 0.25


@pytest.mark.parametrize("power", [float("nan"), "1", True])
def test_follow_lr_refuses_powers_that_are_no_numbers(power):
    with pytest.raises(ValueError, match="power must be a finite number, got"):
        FollowLR(1.0, power=power)
