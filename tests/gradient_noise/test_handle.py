import enum
import random

import numpy as np
import pytest
import torch
from helpers import SpySGD, all_equal, zero_gradient_sgd
from torch import nn

from lightning_noisy import add_gradient_noise
from lightning_noisy.schedules import Constant, FollowLR, InverseDecay, Langevin, Warmup


def test_noise_has_the_standard_deviation_of_the_schedule():
    (w,), optimizer = zero_gradient_sgd(200_000, lr=0.0, cls=SpySGD)
    add_gradient_noise(optimizer, InverseDecay(eta=0.3))
    for _ in range(100):
        w.grad.zero_()
        optimizer.step()
    # A standard error is 0.0016 of sigma. With eta as sigma the ratio would be 0.55.
    for t, std in ((0, 0.3**0.5), (1, 0.45266548), (99, 0.15436919)):
        assert optimizer.seen[t][0].std().item() == pytest.approx(std, rel=0.006)


@pytest.mark.parametrize("changed", [{"seed": 1}, {"stream": 1}])
def test_noise_differs_between_seeds_streams_parameters_and_steps(changed):
    def run(**options):
        parameters, optimizer = zero_gradient_sgd(5000, 5000)
        add_gradient_noise(optimizer, Constant(1.0), **options)
        optimizer.step()
        first = [p.detach().clone() for p in parameters]
        for p in parameters:
            p.grad.zero_()
        optimizer.step()
        return first + [p.detach() - f for p, f in zip(parameters, first, strict=True)]

    draws = torch.stack(run() + run(**changed))
    off_diagonal = np.corrcoef(draws.numpy()) - np.eye(8)
    assert np.abs(off_diagonal).max() < 4.5 / 5000**0.5


def test_noise_is_white_between_elements_steps_parameters_streams_and_seeds():
    n, steps = 4096, 24
    draws = []
    for seed, stream in ((0, 0), (1, 0), (0, 1)):
        parameters, optimizer = zero_gradient_sgd(n, n, n // 64, lr=0.0, cls=SpySGD)
        add_gradient_noise(optimizer, Constant(1.0), seed=seed, stream=stream)
        for _ in range(steps):
            for parameter in parameters:
                parameter.grad.zero_()
            optimizer.step()
        draws += [torch.stack([grads[i] for grads in optimizer.seen]).double().numpy() for i in range(3)]
    rows = np.concatenate([draw[:, :n] for draw in draws if draw.shape[1] == n])  # every step of two parameters, 3 runs
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    pairs = len(rows) * (len(rows) - 1) / 2
    assert np.abs(correlation).max() < 5 / n**0.5  # 10296 pairs: a normal exceeds 5 once in 170 times
    assert (correlation**2).sum() / 2 * n == pytest.approx(pairs, rel=5 * (2 / pairs) ** 0.5)
    whole = np.concatenate([draw.ravel() for draw in draws])
    lagged = [abs(np.corrcoef(whole[:-lag], whole[lag:])[0, 1]) for lag in (1, 2, 3, 16, 64, n)]
    assert max(lagged) < 4.5 / len(whole) ** 0.5
    # Standard errors of mean, variance and kurtosis are (1, sqrt 2, sqrt 24) / sqrt n.
    unit = len(whole) ** -0.5
    assert abs(whole.mean()) < 4 * unit
    assert abs(whole.var() - 1) < 4 * 2**0.5 * unit
    assert abs((whole**4).mean() / whole.var() ** 2 - 3) < 4 * 24**0.5 * unit


def test_noise_goes_to_the_chosen_parameters_alone_and_is_what_it_would_be_without_a_choice():
    def run(params):
        model = nn.Sequential(nn.Linear(300, 200), nn.Linear(4, 4))
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
            parameter.grad = torch.zeros_like(parameter)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        add_gradient_noise(optimizer, Constant(1.0), model=model, params=params)
        optimizer.step()
        return dict(model.named_parameters())

    everywhere, weights = run(None), run(lambda name, parameter: parameter.dim() > 1 and name.endswith("weight"))
    for name, parameter in weights.items():
        expected = everywhere[name] if name.endswith("weight") else torch.zeros_like(parameter)
        assert torch.equal(parameter, expected), name


def test_noise_scale_of_a_parameter_group_multiplies_sigma():
    parameters = [nn.Parameter(torch.zeros(size)) for size in (50_000, 20_000, 50_000, 9)]
    scales = [1.0, 0.5, 0.25, 0.0]
    optimizer = torch.optim.SGD([{"params": [p], "noise_scale": s} for p, s in zip(parameters, scales, strict=True)])
    handle = add_gradient_noise(optimizer, Constant(2.0))
    handle.measuring = True

    def noise():
        for p in parameters:
            p.grad = -torch.zeros_like(p)
        optimizer.step()
        return [p.grad for p in parameters]

    grads = noise()
    assert [g.std().item() for g in grads[:3]] == pytest.approx([2.0, 1.0, 0.5], rel=0.02)
    assert grads[3].signbit().all()  # not a bit is changed
    assert handle.last_step.noise_norm == pytest.approx(2.0 * (50_000 + 20_000 / 4 + 50_000 / 16) ** 0.5)
    optimizer.param_groups[1]["noise_scale"] = 4.0
    assert noise()[1].std().item() == pytest.approx(8.0, rel=0.02)
    optimizer.param_groups[1]["noise_scale"] = -1.0
    with pytest.raises(ValueError, match="noise_scale of a parameter group must be finite and >= 0, got -1"):
        optimizer.step()


def test_noise_follows_the_learning_rate_of_each_group_and_its_scheduler():
    groups = [{"params": [nn.Parameter(torch.zeros(50_000))], "lr": lr} for lr in (0.1, 0.4)]
    optimizer = SpySGD(groups)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    handle = add_gradient_noise(optimizer, Warmup(FollowLR(2.0), steps=2))
    expected = [(0.0, 0.0), (0.05, 0.2), (0.05, 0.2)]  # warm-up x 2 x lr
    for t, stds in enumerate(expected):
        for group in groups:
            group["params"][0].grad = torch.zeros(50_000)
        optimizer.step()
        assert handle.last_step.std == pytest.approx(stds[0])
        for noise, std in zip(optimizer.seen[t], stds, strict=True):
            assert noise.std().item() == pytest.approx(std, rel=0.015)
        scheduler.step()


def test_langevin_noise_samples_from_the_gibbs_distribution():
    # SGD on k w^2 / 2 with noise of variance 2 lr T on the weights is an autoregression, whose variance is
    # 2 lr T / (1 - (1 - lr k)^2) = T / (k (1 - lr k / 2)).
    k, lr, temperature = 2.0, 0.1, 0.5
    w = nn.Parameter(torch.zeros(100_000))
    optimizer = torch.optim.SGD([w], lr=lr)
    add_gradient_noise(optimizer, Langevin(temperature))
    for _ in range(60):
        w.grad = k * w.detach()
        optimizer.step()
    # A standard error is 0.0045 of the variance.
    assert w.var().item() == pytest.approx(temperature / (k * (1 - lr * k / 2)), rel=0.02)


def test_noise_that_follows_the_learning_rate_needs_one():
    class Plain(torch.optim.Optimizer):
        def step(self, closure=None):
            pass

    w = nn.Parameter(torch.zeros(3))
    w.grad = torch.zeros(3)
    optimizer = Plain([w], {})
    add_gradient_noise(optimizer, Langevin())
    with pytest.raises(ValueError, match="follows the learning rate, and a parameter group has none"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_noise_does_not_depend_on_the_default_dtype(dtype):
    def run(default):
        parameters, optimizer = zero_gradient_sgd(100, 50_000)
        add_gradient_noise(optimizer, Constant(1.0))
        before = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            optimizer.step()
        finally:
            torch.set_default_dtype(before)
        return [p.grad for p in parameters]

    assert all_equal(run(torch.float32), run(dtype))


def test_noise_notices_that_a_parameter_has_another_shape():
    (a, b), optimizer = zero_gradient_sgd(4, (100, 7))
    add_gradient_noise(optimizer, Constant(1.0))
    optimizer.step()
    a.data = torch.zeros(3, 4)
    a.grad = torch.zeros(3, 4)
    b.grad = torch.zeros_like(b)
    optimizer.step()
    assert a.grad.unique().numel() == 12
    assert b.grad.unique().numel() == 700


def test_noise_reaches_lazy_parameters_once_they_have_elements():
    model = nn.ModuleList([nn.Linear(3, 3), nn.LazyLinear(3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = add_gradient_noise(optimizer, Constant(1.0), model=model)
    for layers in (model[:1], model):
        optimizer.zero_grad()
        sum(0 * layer(torch.ones(2, 3)).sum() for layer in layers).backward()
        optimizer.step()
    assert handle.step == 2
    assert model[1].weight.grad.count_nonzero() == 9


def test_choosing_no_parameter_warns():
    _, optimizer = zero_gradient_sgd(10)
    handle = add_gradient_noise(optimizer, Constant(1.0), params=lambda name, parameter: False)
    with pytest.warns(UserWarning, match="chooses none of the optimizer's 1 parameters"):
        optimizer.step()
    assert handle.step == 0
    with pytest.raises(TypeError, match="params must be callable"):
        add_gradient_noise(optimizer, Constant(1.0), params="weight", stream=1)


def test_noise_creates_no_gradient_and_a_step_without_any_does_not_count():
    (w, frozen), optimizer = zero_gradient_sgd(10, 10)
    frozen.grad = None
    handle = add_gradient_noise(optimizer, Constant(1.0))
    optimizer.step()
    assert (frozen.grad, handle.step) == (None, 1)
    w.grad = None
    optimizer.step()
    assert (w.grad, handle.step) == (None, 1)


def test_noise_is_added_in_place():
    (w,), optimizer = zero_gradient_sgd(10)
    pointer, gradient = w.grad.data_ptr(), w.grad
    add_gradient_noise(optimizer, Constant(1.0))
    optimizer.step()
    assert w.grad is gradient
    assert w.grad.data_ptr() == pointer


def test_noise_leaves_every_global_random_state():
    _, optimizer = zero_gradient_sgd(100)
    add_gradient_noise(optimizer, Constant(1.0))
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_zero_noise_changes_no_bit():
    (w,), optimizer = zero_gradient_sgd(100)
    w.grad = torch.linspace(-1, 1, 100)
    plain = w.detach() - w.grad
    add_gradient_noise(optimizer, InverseDecay(eta=0))
    optimizer.step()
    assert torch.equal(w.detach(), plain)


def test_two_noises_on_one_optimizer_must_differ():
    (w,), optimizer = zero_gradient_sgd(100_000)
    add_gradient_noise(optimizer, Constant(1.0))
    with pytest.raises(ValueError, match="seed=0 and stream=0 already, and twice the same would double it"):
        add_gradient_noise(optimizer, Constant(1.0))
    add_gradient_noise(optimizer, Constant(1.0), stream=1)
    optimizer.step()
    assert w.grad.std().item() == pytest.approx(2**0.5, rel=0.01)


def test_bad_arguments_are_refused_with_the_reason():
    _, optimizer = zero_gradient_sgd(10)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, or hold one, got 1"):
        add_gradient_noise(1, Constant(1.0))
    with pytest.raises(TypeError, match="schedule must be callable"):
        add_gradient_noise(optimizer, 0.1)
    with pytest.raises(TypeError, match="schedule must be a schedule, got the class Constant"):
        add_gradient_noise(optimizer, Constant)
    with pytest.raises(TypeError, match="relative must be True or False, got 'no'"):
        add_gradient_noise(optimizer, Constant(1.0), relative="no")
    with pytest.raises(TypeError, match="model must be an nn.Module, got {} of type dict"):
        add_gradient_noise(optimizer, Constant(1.0), model={})
    for seed in (0.5, "0", None, True):
        with pytest.raises(TypeError, match=f"seed must be an int, got {seed!r}"):
            add_gradient_noise(optimizer, Constant(1.0), seed=seed)
    with pytest.raises(TypeError, match="stream must be an int or a str, got None"):
        add_gradient_noise(optimizer, Constant(1.0), stream=None)
    assert not optimizer._optimizer_step_pre_hooks
    handle = add_gradient_noise(optimizer, lambda t: -1.0)
    with pytest.raises(ValueError, match=r"standard deviation must be >= 0 .* got -1.0 at step 0"):
        optimizer.step()
    assert handle.step == 0


def test_sparse_gradients_get_noise_on_the_rows_that_are_present():
    def run(*, sparse):
        embedding = nn.Embedding(50, 3, sparse=sparse)
        nn.init.zeros_(embedding.weight)
        optimizer = torch.optim.SGD(embedding.parameters(), lr=1.0)
        add_gradient_noise(optimizer, Constant(1.0))
        embedding(torch.tensor([7, 1, 7, 40])).sum().backward()
        optimizer.step()
        return embedding.weight.detach()

    sparse, dense = run(sparse=True), run(sparse=False)
    rows = [1, 7, 40]
    torch.testing.assert_close(sparse[rows], dense[rows], rtol=0, atol=1e-6)
    assert sparse.count_nonzero() == 9
    assert dense.count_nonzero() == 150


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_gradients_of_other_layouts_are_refused_before_any_noise_is_added():
    (dense, w), optimizer = zero_gradient_sgd(5, (2, 2))
    w.grad = None
    optimizer.param_groups[0]["params"][1] = csr = nn.Parameter(torch.eye(2).to_sparse_csr())
    csr.grad = torch.eye(2).to_sparse_csr()
    add_gradient_noise(optimizer, Constant(1.0))
    with pytest.raises(TypeError, match="dense or sparse COO gradient, got one of layout torch.sparse_csr"):
        optimizer.step()
    assert not dense.grad.any()


def test_sparse_gradients_without_any_row_count_as_a_step():
    embedding = nn.Embedding(10, 4, sparse=True, padding_idx=0)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=1.0)
    handle = add_gradient_noise(optimizer, Constant(1.0))
    embedding(torch.zeros(3, dtype=torch.long)).sum().backward()
    before = embedding.weight.detach().clone()
    optimizer.step()
    assert handle.step == 1
    assert torch.equal(embedding.weight, before)


def test_a_step_in_inference_mode_leaves_later_ones_alone():
    (w,), optimizer = zero_gradient_sgd(100)
    add_gradient_noise(optimizer, Constant(1.0))
    with torch.inference_mode():
        optimizer.step()
    optimizer.step()
    assert w.count_nonzero() == 100


@pytest.mark.parametrize("step", [np.int64(5), torch.tensor(5)])
def test_state_of_other_integer_types_means_the_same(step):
    def noise(step):
        (w,), optimizer = zero_gradient_sgd(100)
        handle = add_gradient_noise(optimizer, Constant(1.0))
        handle.load_state_dict({"seed": step, "stream": step, "step": step})
        optimizer.step()
        return w.detach()

    assert torch.equal(noise(step), noise(5))


def test_a_schedule_is_asked_once_per_step():
    steps = []
    groups = [{"params": [nn.Parameter(torch.zeros(3))]} for _ in range(4)]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    add_gradient_noise(optimizer, lambda t: float(steps.append(t) or 1.0))
    groups[0]["params"][0].grad = torch.zeros(3)
    for _ in range(2):
        optimizer.step()
    assert steps == [0, 1]


class Text(str, enum.Enum):
    WORD = "word"


def test_streams_are_told_apart_by_their_values_and_not_by_their_types():
    def run(stream, seed=0):
        (w,), optimizer = zero_gradient_sgd(100)
        handle = add_gradient_noise(optimizer, Constant(1.0), stream=stream, seed=seed)
        optimizer.step()
        assert type(handle.stream) in (int, str)
        return w.detach()

    for same in (Text.WORD, np.str_("word")):
        assert torch.equal(run(same), run("word"))
    assert torch.equal(run(np.int64(3), np.int32(7)), run(3, 7))
    assert not torch.equal(run("3"), run(3))


@pytest.mark.parametrize(
    "state", [{}, {"seed": 0, "stream": 0, "step": -1}, {"seed": 0, "stream": 0, "step": "2"}, None]
)
def test_a_bad_state_is_refused_and_changes_nothing(state):
    _, optimizer = zero_gradient_sgd(10)
    handle = add_gradient_noise(optimizer, Constant(1.0), seed=3, stream="a")
    optimizer.step()
    before = handle.state_dict()
    with pytest.raises(ValueError, match="Gradient noise has a state of"):
        handle.load_state_dict(state)
    assert handle.state_dict() == before
