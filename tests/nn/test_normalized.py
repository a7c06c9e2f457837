import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_noisy.nn import NLeakyReLU, NormalizedActivation, NReLU, NSwish


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# name: (module, δ, δ′) with the functions in float64 NumPy, written down independently.
CASES = {
    "nrelu": (NReLU, lambda x: np.maximum(x, 0), lambda x: (x > 0) * 1.0),
    "nlrelu": (NLeakyReLU, lambda x: np.where(x > 0, x, 0.01 * x), lambda x: np.where(x > 0, 1, 0.01)),
    "nsw": (NSwish, lambda x: x * sigmoid(x), lambda x: sigmoid(x) + x * sigmoid(x) * (1 - sigmoid(x))),
    "tanh": (lambda: NormalizedActivation(torch.tanh), np.tanh, lambda x: 1 - np.tanh(x) ** 2),
    "module": (
        lambda: NormalizedActivation(nn.ELU()),
        lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
        lambda x: np.where(x > 0, 1, np.exp(np.minimum(x, 0))),
    ),
}
cases = pytest.mark.parametrize(("make", "f", "df"), CASES.values(), ids=CASES)


def factors(f, df, x):
    """μ, ρ, ρ′ and λ of a batch: Eq. 31, 6 and 13 in NumPy."""
    x = x.double().numpy()
    mu, rho, rho_prime = f(x).mean(), f(x).var() / x.var(), (df(x) ** 2).mean()
    return mu, rho, rho_prime, math.sqrt((rho + rho_prime) / (2 * rho * rho_prime))


@cases
def test_normalized_first_batch_sets_the_running_values_and_uses_them(make, f, df):
    x = normal(64, 50) * 1.3 + 0.2
    module = make()
    y = module(x)
    mu, rho, rho_prime, lam = factors(f, df, x)
    assert module.running_mean.item() == pytest.approx(mu, rel=1e-5)
    assert module.running_rho.item() == pytest.approx(rho, rel=1e-5)
    assert module.running_rho_prime.item() == pytest.approx(rho_prime, rel=1e-5)
    assert (module.scale.item(), module.shift.item()) == pytest.approx((lam, mu), rel=1e-5)
    np.testing.assert_allclose(y.detach().numpy(), lam * (f(x.numpy()) - mu), rtol=1e-4, atol=1e-5)


@cases
def test_normalized_running_values_follow_by_momentum(make, f, df):
    module = make()
    module.momentum = 0.25
    batches = [normal(40, 50, seed=seed) * scale for seed, scale in enumerate((1.0, 1.1, 0.9))]
    expected = np.array(factors(f, df, batches[0])[:3])
    for index, batch in enumerate(batches):
        module(batch)
        expected = expected if index == 0 else 0.25 * np.array(factors(f, df, batch)[:3]) + 0.75 * expected
    running = (module.running_mean, module.running_rho, module.running_rho_prime)
    assert [value.item() for value in running] == pytest.approx(expected, rel=1e-5)
    assert module.num_batches_tracked.item() == 3


@cases
def test_normalized_gains_have_a_harmonic_mean_of_one(make, f, df):
    x = normal(100, 100)
    module = make()
    y = module(x)
    rho = y.var().item() / x.var().item()
    rho_prime = (module.scale.item() * df(x.double().numpy())) ** 2
    assert 2 / (1 / rho + 1 / rho_prime.mean()) == pytest.approx(1, rel=1e-4)


def test_nrelu_at_standard_normal_input_has_the_closed_form():
    module = NReLU()
    module(normal(2_000_000))
    assert module.running_rho.item() == pytest.approx(0.5 - 0.5 / math.pi, abs=1e-3)  # 0.3408
    assert module.scale.item() == pytest.approx(1.5707, abs=2e-3)
    assert module.shift.item() == pytest.approx(1 / math.sqrt(2 * math.pi), abs=1e-3)


@cases
def test_normalized_gradients_treat_the_running_values_as_constants(make, f, df):
    module = make().double()
    module(normal(30, 20, dtype=torch.float64))
    module.eval()
    with torch.no_grad():
        module.alpha.fill_(0.4)
    x = normal(7, 5, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(module, x)
    g = normal(7, 5, seed=2, dtype=torch.float64)
    module(x).backward(g)
    scale = module.scale.item()
    xs = x.detach().numpy()
    np.testing.assert_allclose(x.grad.numpy(), g.numpy() * scale * df(xs), rtol=1e-9)
    alpha_grad = (g.numpy() * (f(xs) - module.shift.item())).sum() * 0.3 * (1 - np.tanh(0.4) ** 2)
    assert module.alpha.grad.item() == pytest.approx(alpha_grad, rel=1e-9)


def test_normalized_training_gradient_is_that_of_the_constants_too():
    x = normal(50, 20).requires_grad_()
    module = NReLU()
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.scale.detach() * (x > 0))


@cases
def test_normalized_evaluation_uses_the_running_values_and_keeps_them(make, f, df):
    module = make()
    module(normal(40, 50))
    module.eval()
    before = copy.deepcopy(module.state_dict())
    x = normal(40, 50, seed=1) * 5
    y = module(x)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    expected = module.scale.item() * (f(x.double().numpy()) - module.shift.item())
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_normalized_before_any_batch_is_the_plain_function_in_evaluation():
    x = normal(5, 5)
    assert torch.equal(NReLU().eval()(x), x.relu())


def test_normalized_rejects_values_out_of_bounds_but_not_for_ever():
    module = NReLU(bounds=(0.5, 2.0), max_rejections=3)
    module(normal(1000, 10))
    rho = module.running_rho.item()
    shifted = normal(1000, 10, seed=1) + 3  # nearly linear there: ρ of about 1
    for count in (1, 2, 3):
        module(shifted)
        assert module.running_rho.item() == rho
        assert module.num_rejected.item() == count
    module(shifted)
    assert module.running_rho.item() == pytest.approx(1, abs=0.02)
    assert module.num_rejected.item() == 0


def test_normalized_rejection_counts_only_in_a_row():
    module = NReLU(bounds=(0.5, 2.0), max_rejections=1)
    batch, outlier = normal(1000, 10), normal(1000, 10) + 3
    for x in (batch, outlier, batch, outlier, batch):
        module(x)
    assert module.running_rho.item() == pytest.approx(0.34, abs=0.02)
    assert module.num_batches_tracked.item() == 5


@pytest.mark.parametrize(
    "unusable",
    [
        torch.zeros(0, 4),
        torch.zeros(3, 4),
        torch.full((3, 4), 7.0),
        -torch.ones(3, 4) - torch.arange(4),
        torch.ones(1),
        torch.tensor([1.0, 2.0, float("nan")]),
        torch.tensor([1.0, -2.0, float("inf")]),
    ],
    ids=["empty", "zeros", "constant", "all inactive", "one element", "nan", "inf"],
)
def test_normalized_learns_nothing_from_a_batch_without_usable_gains(unusable):
    module = NReLU()
    for _ in range(2):  # as the first batch, and later
        before = copy.deepcopy(module.state_dict())
        y = module(unusable)
        assert y.shape == unusable.shape
        assert torch.equal(y.isfinite(), unusable.isfinite())
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        module(normal(10, 10))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_normalized_under_checkpointing_equals_the_plain_run(use_reentrant):
    def run(call):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(6, 6), NSwish(), nn.Linear(6, 6), NormalizedActivation(torch.tanh))
        x = normal(9, 6).requires_grad_()
        call(block, x).square().sum().backward()
        return [x.grad, *(p.grad for p in block.parameters()), *block.buffers()]

    plain = run(lambda block, x: block(x))
    again = run(lambda block, x: checkpoint(block, x, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_normalized_keeps_the_dtype_and_computes_statistics_in_float32(dtype):
    x = (normal(300, 300) * 30).to(dtype)  # the sum of squares is beyond float16
    module = NReLU()
    y = module(x)
    assert y.dtype == dtype
    assert module.running_mean.dtype == torch.float32
    assert module.running_rho.item() == pytest.approx(0.3408, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_normalized_running_values_stay_in_float32_in_a_half_precision_model(dtype):
    module = NReLU()
    module(normal(50, 50))
    rho = module.running_rho.item()
    module.to(dtype)
    assert module.alpha.dtype == dtype
    assert (module.running_rho.dtype, module.running_rho.item()) == (torch.float32, rho)
    assert module(normal(5, 5).to(dtype)).dtype == dtype
    assert module.double().running_rho.dtype == torch.float64


def test_normalized_can_be_made_on_the_meta_device_first():
    with torch.device("meta"):
        module = NReLU()
    module.to_empty(device="cpu").reset_parameters()
    assert {name: value.item() for name, value in module.state_dict().items()} == {
        "alpha": 0,
        "running_mean": 0,
        "running_rho": 1,
        "running_rho_prime": 1,
        "num_batches_tracked": 0,
        "num_rejected": 0,
    }


def test_normalized_tracks_nothing_in_inference_mode():
    module = NormalizedActivation(torch.tanh)
    with torch.inference_mode():
        module(normal(5, 5))
    assert module.num_batches_tracked == 0


def test_normalized_statistics_are_the_same_under_autocast():
    x = normal(64, 64)
    plain, cast = NSwish(), NSwish()
    plain(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast(x)
    assert plain.running_rho_prime.item() == cast.running_rho_prime.item()


def test_normalized_in_place_writes_into_its_input():
    x = normal(4, 4)
    weight = torch.ones(4, 4, requires_grad=True)
    plain, inplace = NSwish(), NSwish(inplace=True)
    expected = plain(x * weight)
    h = x * weight
    result = inplace(h)
    assert result.data_ptr() == h.data_ptr()
    assert torch.equal(h, expected)
    (grad,) = torch.autograd.grad(h.sum(), weight)
    (expected_grad,) = torch.autograd.grad(expected.sum(), weight)
    assert torch.equal(grad, expected_grad)


@cases
def test_normalized_copies_pickles_and_loads_its_state(make, f, df):
    module = make()
    module(normal(20, 20))
    x = normal(3, 3, seed=1)
    twins = [copy.deepcopy(module), make(), pickle.loads(pickle.dumps(module))]
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    twins[1].load_state_dict(torch.load(file, weights_only=True))
    for twin in twins:
        assert torch.equal(twin.eval()(x), module.eval()(x))


def test_normalized_works_without_a_batch_dimension_and_on_strided_input():
    module = NReLU()
    x = normal(6, 8)
    # Another order of the sums: equal but for rounding.
    torch.testing.assert_close(copy.deepcopy(module)(x.t()), copy.deepcopy(module)(x).t())
    module(x)
    assert module(torch.tensor(2.0)).shape == ()
    channels_last = normal(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert module(channels_last).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 0}, r"momentum must be in \(0, 1\], got 0"),
        ({"momentum": 1.5}, "momentum"),
        ({"momentum": float("nan")}, "momentum"),
        ({"bounds": (1.2, 2.0)}, "bounds must be"),
        ({"bounds": (0.5, 0.9)}, "bounds must be"),
        ({"max_rejections": -1}, "max_rejections must be >= 0"),
    ],
)
def test_normalized_refuses_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        NReLU(**options)


def test_normalized_refuses_what_it_cannot_normalize():
    with pytest.raises(TypeError, match="function must be an elementwise callable, got 'relu'"):
        NormalizedActivation("relu")
    with pytest.raises(ValueError, match="must not work in place"):
        NormalizedActivation(nn.ReLU(inplace=True))
    with pytest.raises(ValueError, match="must not work in place"):
        NormalizedActivation(torch.relu_)
    with pytest.raises(TypeError, match="momentun"):
        NReLU(momentun=0.1)
