"""The kernels of each backend against formulas in double precision, by dtype, memory format, length and function."""

import math

import pytest
import torch
from helpers import KERNELS, TRITON_DEVICE, forget_kernels
from torch import nn
from torch.nn import functional as F

from lightning_noisy.functional import noisy as formulas
from lightning_noisy.functional.slopes import slope
from lightning_noisy.kernels import noisy, normalized
from lightning_noisy.kernels.gaussian import gaussian_at
from lightning_noisy.kernels.normalized import Rule

FUNCTIONS = [F.relu, nn.ReLU6(), nn.LeakyReLU(0.2), F.silu, F.gelu, nn.GELU(approximate="tanh"), torch.tanh]
FUNCTIONS += [nn.ELU(0.5), F.selu, torch.sigmoid, nn.Hardtanh(-0.5, 2), F.hardsigmoid]
IDS = [getattr(function, "__name__", repr(function)) for function in FUNCTIONS]
RULE = Rule(0.1, 0.2, 5.0, 2, 0.3, 1e-6)
COMPILED, TRITON, _ = KERNELS
# Rounding of the values, and of the sums.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = [pytest.param("auto", torch.float32, id="compiled", marks=COMPILED.marks)]
DTYPES += [pytest.param("triton", dtype, id=f"triton-{dtype}", marks=TRITON.marks) for dtype in TOLERANCE]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def chosen(monkeypatch):
    """Chooses kernels; returns the device on which they are."""

    def choose(name):
        monkeypatch.setenv("LIGHTNING_NOISY_KERNEL", name)
        forget_kernels()
        return TRITON_DEVICE if name == "triton" else "cpu"

    yield choose
    monkeypatch.undo()
    forget_kernels()


def buffers(device, tracked=0, mean=0.0, rho=1.0, rho_prime=1.0, rejected=0):
    values = {"running_mean": mean, "running_rho": rho, "running_rho_prime": rho_prime}
    counts = {"num_batches_tracked": tracked, "num_rejected": rejected}
    return {name: torch.tensor(float(value), device=device) for name, value in values.items()} | {
        name: torch.tensor(value, device=device) for name, value in counts.items()
    }


LAYOUTS = [
    *(pytest.param(shape, "contiguous", id=str(shape)) for shape in ((), (1,), (2,), (7, 3), (1000,), (3, 5, 7, 11))),
    pytest.param((64, 33, 8, 8), "contiguous", id="several parts"),
    pytest.param((4, 6, 5, 5), "channels_last", id="channels_last"),
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=IDS)
@pytest.mark.parametrize(("backend", "dtype"), DTYPES)
def test_value_and_gradients_are_those_of_the_formula(chosen, backend, dtype, function):
    check_normalized(chosen(backend), dtype, function, torch.cat([3 * normal(999), torch.tensor([0.0, 30, -30, 200])]))


# As functions.h and docs/kernels.md say, for |x| < 80, in units of 2^-24: of the value, or for GELU of |x|.
ERRORS = {F.silu: 4, torch.sigmoid: 4, torch.tanh: 4, F.elu: 2, F.selu: 3, F.gelu: 5}
ERRORS[nn.GELU(approximate="tanh")] = 4


@pytest.mark.parametrize("function", ERRORS, ids=lambda function: getattr(function, "__name__", repr(function)))
@pytest.mark.parametrize("backend", [COMPILED])
def test_functions_are_as_exact_as_is_said(chosen, backend, function):
    chosen(backend)
    x = torch.cat(
        [
            (20 * normal(100_000)).clamp(-80, 80),
            2 * normal(100_000),
            torch.logspace(-20, 0, 1000),
            -torch.logspace(-20, 0, 1000),
        ]
    )
    state = list(buffers("cpu").values())  # with which the scale is 1, and the shift 0
    known, kernels = normalized.function_of(function), normalized.kernels_for(x)
    expected = function(x.double())
    if function in (F.elu, F.selu):  # which torch 2.6 computes with less care near 0
        below, above = (1.7580993408473766, 1.0507009873554805) if function is F.selu else (1.0, 1.0)
        expected = torch.where(x > 0, above * x.double(), below * torch.expm1(x.double()))
    error = (kernels.values(known, x, torch.zeros(1), state, 0.3).double() - expected).abs()
    is_gelu = function is F.gelu or isinstance(function, nn.GELU)
    size = x.double().abs() if is_gelu else expected.abs()
    assert (error / size.clamp_min(1e-35)).max() * 2**24 <= ERRORS[function]


@pytest.mark.parametrize(("shape", "layout"), LAYOUTS)
@pytest.mark.parametrize(("backend", "dtype"), DTYPES)
def test_every_shape_and_memory_format_is_taken(chosen, backend, dtype, shape, layout):
    x = normal(*shape) if shape else torch.tensor(0.7)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    check_normalized(chosen(backend), dtype, F.silu, x)


def check_normalized(device, dtype, function, x):
    x, tolerance = x.to(device, dtype), TOLERANCE[dtype]
    alpha, known = torch.full((1,), 0.4, device=device), normalized.function_of(function)
    state = buffers(device, 3, 0.3, 0.5, 0.6)
    assert normalized.takes(x, alpha, state)
    kernels = normalized.kernels_for(x)
    value, kept = kernels.forward(known, x, alpha, list(state.values()), None, RULE, normalized.FROM_BUFFERS)
    gradient = normal(*x.shape, seed=1).to(device, dtype) if x.dim() else torch.ones_like(x)
    gradient = gradient.contiguous(memory_format=torch.channels_last) if not x.is_contiguous() else gradient
    of_x, of_alpha = kernels.backward(known, x, gradient, kept, RULE.beta, alpha)
    assert kernels.backward(known, x, gradient, kept, RULE.beta, None)[1] is None
    assert (value.dtype, value.stride(), of_x.stride()) == (x.dtype, x.stride(), x.stride())

    wide, g = x.double(), gradient.double()
    rho, rho_prime = state["running_rho"].double(), state["running_rho_prime"].double()  # as float32 has them
    scale = ((rho + rho_prime) / (2 * rho * rho_prime)).sqrt() + 0.3 * math.tanh(alpha.item())
    centred = function(wide) - state["running_mean"].double()
    torch.testing.assert_close(value.double(), scale * centred, rtol=tolerance, atol=tolerance)
    expected = g * scale * slope(lambda t: function(t), wide)
    at_kink = (x == 0) | (x.abs() == 3)  # where torch's slopes differ between dtypes
    torch.testing.assert_close(of_x.double()[~at_kink], expected[~at_kink], rtol=tolerance, atol=tolerance)
    by_scale = (g * centred).sum() * 0.3 * (1 - math.tanh(alpha.item()) ** 2)
    spread = 1e-6 * (g * centred).abs().sum().item() + 1e-6
    assert of_alpha.item() == pytest.approx(by_scale.item(), rel=1e-5, abs=spread)


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("shape", [(1, 5), (40, 30), (301, 6, 7, 5), (7, 4096)])
@pytest.mark.parametrize("backend", [COMPILED, TRITON])
def test_first_batch_sets_the_statistics_also_far_from_zero(chosen, backend, shape, mean, stride):
    device = chosen(backend)
    x, state, alpha = (normal(*shape) + mean).to(device), buffers(device), torch.zeros(1, device=device)
    kernels, known = normalized.kernels_for(x), normalized.function_of(F.silu)
    value, _ = kernels.forward(known, x, alpha, list(state.values()), None, RULE, normalized.FOLLOW, stride)
    sample = x[::stride].double().cpu()
    y, d = F.silu(sample), slope(F.silu, sample)
    found = [state[name].item() for name in list(state)[:3]]
    expected = [y.mean().item(), (y.var(correction=0) / sample.var(correction=0)).item(), d.square().mean().item()]
    assert found == pytest.approx(expected, rel=2e-5)
    assert (state["num_batches_tracked"].item(), state["num_rejected"].item()) == (1, 0)
    again, _ = kernels.forward(known, x, alpha, list(state.values()), None, RULE, normalized.FROM_BUFFERS)
    assert torch.equal(value, again)  # a recomputation by checkpointing gives the same bits


@pytest.mark.parametrize("backend", [COMPILED, TRITON])
def test_statistics_follow_as_the_rule_says(chosen, backend):
    device = chosen(backend)
    known, alpha = normalized.function_of(F.relu), torch.zeros(1, device=device)
    state = buffers(device)

    def see(x):
        x = x.to(device)
        normalized.kernels_for(x).forward(known, x, alpha, list(state.values()), None, RULE, normalized.FOLLOW)
        return [value.item() for value in state.values()]

    first = normal(2000)
    wide = first.double()
    rho = (wide.relu().var(correction=0) / wide.var(correction=0)).item()
    prime = (first > 0).double().mean().item()
    assert see(first) == pytest.approx([wide.relu().mean().item(), rho, prime, 1, 0], rel=1e-5)
    second = normal(2000, seed=1) + 0.5
    w = second.double()
    found = [w.relu().mean().item(), (w.relu().var(correction=0) / w.var(correction=0)).item()]
    found.append((second > 0).double().mean().item())
    moved = [0.9 * a + 0.1 * b for a, b in zip([wide.relu().mean().item(), rho, prime], found, strict=True)]
    assert see(second) == pytest.approx([*moved, 2, 0], rel=1e-5)
    for unusable in (
        torch.zeros(50),
        -normal(50).abs(),
        torch.full((50,), float("nan")),
        torch.tensor([1.0, math.inf]),
    ):
        assert see(unusable) == pytest.approx([*moved, 2, 0], rel=1e-5)
    shifted = normal(2000, seed=2) - 2.5  # ρ′ is 0.006, less than a fifth
    for rejected in (1, 2):
        *_, tracked, in_a_row = see(shifted)
        assert (tracked, in_a_row) == (2 + rejected, rejected)
        assert state["running_rho_prime"].item() == pytest.approx(moved[2], rel=1e-5)
    assert see(shifted)[3:] == [5, 0]  # as many as may be rejected: now they are set
    assert state["running_rho_prime"].item() == pytest.approx((shifted > 0).double().mean().item(), rel=1e-5)


@pytest.mark.parametrize("backend", [COMPILED, TRITON])
def test_pooled_statistics_are_added_and_used_until_the_first_update(chosen, backend):
    device = chosen(backend)
    x, state, alpha = normal(5000).to(device), buffers(device), torch.zeros(1, device=device)
    pending = torch.ones(6, dtype=torch.float64, device=device)
    known, kernels = normalized.function_of(torch.tanh), normalized.kernels_for(x)
    value, _ = kernels.forward(known, x, alpha, list(state.values()), pending, RULE, normalized.POOL)
    w = x.double().cpu()
    y, d = w.tanh(), 1 - w.tanh().square()
    sums = [5000, w.sum(), w.square().sum(), y.sum(), y.square().sum(), d.square().sum()]
    assert pending.tolist() == pytest.approx([1 + float(each) for each in sums], rel=1e-5, abs=1e-3)
    again, _ = kernels.forward(known, x, alpha, list(state.values()), pending, RULE, normalized.AS_POOLED)
    assert torch.equal(value, again)
    assert pending.tolist() == pytest.approx([1 + float(each) for each in sums], rel=1e-5, abs=1e-3)
    assert state["num_batches_tracked"].item() == 0
    rho, prime = y.var(correction=0) / w.var(correction=0), d.square().mean()
    scale = ((rho + prime) / (2 * rho * prime)).sqrt()
    torch.testing.assert_close(value.double().cpu(), scale * (y - y.mean()), rtol=1e-5, atol=1e-5)
    before = pending.clone()
    kernels.forward(known, torch.full_like(x, math.inf), alpha, list(state.values()), pending, RULE, normalized.POOL)
    assert torch.equal(pending, before)  # what isn't finite adds nothing


@pytest.mark.parametrize("backend", [COMPILED, TRITON])
@pytest.mark.parametrize("function", FUNCTIONS, ids=IDS)
def test_nan_and_infinity_are_those_of_torch(chosen, backend, function):
    device = chosen(backend)
    x = torch.tensor([math.nan, math.inf, 1e30, -1e30, 0.0, -100.0], device=device)
    state, known = buffers(device), normalized.function_of(function)
    kernels, alpha = normalized.kernels_for(x), torch.zeros(1, device=device)
    value, kept = kernels.forward(known, x, alpha, list(state.values()), None, RULE, normalized.FROM_BUFFERS)
    torch.testing.assert_close(value.double(), function(x.double()), rtol=1e-6, atol=1e-6, equal_nan=True)
    of_x, _ = kernels.backward(known, x, torch.ones_like(x), kept, 0.3, None)
    expected = slope(function, x[1:].double()).nan_to_num(1.0)  # the limit, where torch multiplies infinity by 0
    torch.testing.assert_close(of_x[1:].double(), expected, rtol=1e-6, atol=1e-6)


# Noisy activations.


@pytest.mark.parametrize("shape", [(1,), (2,), (1001,), (3, 5, 7), (40_001,)])
@pytest.mark.parametrize("alpha", [0.9, 1.0, 1.15])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", sorted(formulas.HARD))
@pytest.mark.parametrize("backend", [COMPILED, TRITON])
def test_noisy_value_and_gradients_are_those_of_the_formula(chosen, backend, name, half, alpha, shape):
    device = chosen(backend)
    check_noisy(device, torch.float32, name, half, alpha, 4 * normal(*shape), normal(1, seed=2))


@pytest.mark.parametrize("shape", [(50, 6), (3, 6, 5), (4, 6, 5, 5), (2, 6, 40, 41)])
def test_noisy_has_a_p_for_each_channel(chosen, shape):
    if not noisy.takes_columns(torch.zeros(1)):
        pytest.skip("there is no C compiler")
    check_noisy(chosen("auto"), torch.float32, "tanh", True, 1.15, 4 * normal(*shape), normal(6, seed=2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", [TRITON])
def test_noisy_takes_half_precision(chosen, backend, dtype):
    check_noisy(chosen(backend), dtype, "tanh", False, 1.15, 4 * normal(999), normal(1, seed=2))


def check_noisy(device, dtype, name, half, alpha, x, p):
    x, p, c = x.to(device, dtype), p.to(device), torch.tensor(1.5, device=device)
    state, gradient = torch.tensor([2**62 - 5, 7], device=device), normal(*x.shape, seed=1).to(device, dtype)
    h = formulas.HARD[name]
    assert noisy.takes(x, p, c, state, noisy=True)
    kernels = noisy.kernels_for(x)
    kept = kernels.keep(c)
    key = kernels.next_key(state, advance=True, distance=0x2545F4914F6CDD1D, second=2**63 + 1)
    same = kernels.next_key(state, advance=False, distance=0x2545F4914F6CDD1D, second=2**63 + 1)
    assert (int(key[0]), key[1], state[1].item()) == (int(same[0]), 2**63 + 1, 8)
    line = noisy.Line(h.slope, h.offset, *h.bounds, alpha, 0.0, half)
    value = kernels.forward(x, p, kept, key, line)
    of_x, of_p = kernels.backward(x, p, kept, key, line, gradient, of_p=True)
    assert kernels.backward(x, p, kept, key, line, gradient, of_p=False)[1] is None
    level = kernels.forward(x, p, kept, None, line._replace(level=0.8, half=False))

    first = (2**62 - 5 + 8 * 0x2545F4914F6CDD1D) % 2**64
    noise = gaussian_at((first, 2**63 + 1), torch.arange(x.numel())).view(x.shape).double().to(device)
    leaf, weight = x.double().requires_grad_(), p.double().requires_grad_()
    each = weight if len(p) == 1 else weight.view(-1, *[1] * (x.dim() - 2))
    options = {"function": h, "alpha": alpha}
    expected = formulas.output_noise(leaf, noise.abs() if half else noise, each, 1.5, **options)
    wanted_x, wanted_p = torch.autograd.grad(expected, [leaf, weight], gradient.double())
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(value.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(of_x.double(), wanted_x, rtol=5 * tolerance, atol=tolerance)
    torch.testing.assert_close(of_p.double(), wanted_p, rtol=1e-4, atol=2e-6 * x.numel() ** 0.5 + 1e-5)
    at_level = formulas.output_noise(x.double(), torch.full_like(noise, 0.8), each.detach(), 1.5, **options)
    torch.testing.assert_close(level.double(), at_level, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", [COMPILED, TRITON])
def test_noisy_extremes_stay_finite_and_nan_is_kept(chosen, backend):
    device = chosen(backend)
    x = torch.tensor([1e30, -1e30, 0.0, math.nan], device=device)
    kernels, p = noisy.kernels_for(x), torch.ones(1, device=device)
    value = kernels.forward(
        x, p, kernels.keep(torch.tensor(30.0, device=device)), None, noisy.Line(1, 0, -1, 1, 1.0, 1.0)
    )
    assert value[:3].tolist() == pytest.approx([1 - 30 / 4, -1 + 30 / 4, 0.0])  # towards 0, as α is 1
    assert value[3].isnan()


@pytest.mark.slow
def test_addresses_beyond_2_to_the_31(chosen):
    if not noisy.takes_columns(torch.zeros(1)):
        pytest.skip("there is no C compiler")
    chosen("auto")
    count = 2**31 + 300
    x = torch.full((count,), 3.0)
    line, p = noisy.Line(1.0, 0.0, -1.0, 1.0, 1.0), torch.ones(1)
    value = noisy.kernels_for(x).forward(x, p, 1.0, (1, 2), line)
    tail = torch.arange(count - 500, count)
    noise = gaussian_at((1, 2), tail).double()
    expected = formulas.output_noise(
        x[-500:].double(), noise, p.double(), 1.0, function=formulas.HARD["tanh"], alpha=1.0
    )
    torch.testing.assert_close(value[-500:].double(), expected, rtol=1e-5, atol=1e-5)
    del value
    state, known = buffers("cpu"), normalized.function_of(F.relu)
    x[-1] = -3
    y, kept = normalized.kernels_for(x).forward(
        known, x, torch.zeros(1), list(state.values()), None, RULE, normalized.FOLLOW
    )
    assert state["running_rho_prime"].item() == pytest.approx(1.0)
    assert state["running_rho"].item() == pytest.approx(0.25, rel=1e-4)
    assert (y[-1].item(), y[-2].item()) == pytest.approx((-3 * kept[0], 0), abs=1e-4)
