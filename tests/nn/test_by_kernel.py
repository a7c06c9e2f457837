"""Normalized and noisy modules: with kernels and without they are the same."""

import copy
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from helpers import HAS_COMPILER
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from lightning_noisy.functional.slopes import slope
from lightning_noisy.kernels import noisy, normalized
from lightning_noisy.nn import NAH, NAN, NANI, NANIL, NANIS, NormalizedActivation

FUNCTIONS = [F.relu, nn.ReLU(), F.silu, nn.SiLU(), nn.LeakyReLU(0.2), F.leaky_relu, nn.GELU()]
FUNCTIONS += [nn.GELU(approximate="tanh"), torch.tanh, nn.ELU(), nn.ELU(0.5)]
IDS = [getattr(function, "__name__", repr(function)) for function in FUNCTIONS]


needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C compiler")


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def reference(monkeypatch):
    """Runs a function without kernels."""

    def run(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(normalized, "takes", lambda *arguments: False)
            patch.setattr(noisy, "takes", lambda *arguments, **options: False)
            return function(*arguments)

    return run


@pytest.fixture(params=[True, False], ids=["kernel", "reference"])
def either(request, reference):
    """Runs a function with or without kernels."""
    return (lambda run: run()) if request.param else reference


def steps(function, dtype, shape=(16, 6, 5, 5), inplace=False):
    """Outputs, gradients and state of three training steps, with a shift in the middle that is rejected at first."""
    torch.manual_seed(0)
    module = NormalizedActivation(copy.deepcopy(function), max_rejections=1, inplace=inplace).to(dtype)
    with torch.no_grad():
        module.alpha.fill_(0.4)
    found = []
    for seed, scale, offset in ((0, 1.0, 0.0), (1, 0.9, 0.3), (2, 1.0, -9.0), (3, 1.0, -9.0), (4, 1.1, 0.0)):
        x = (normal(*shape, dtype=dtype, seed=seed) * scale + offset).requires_grad_()
        y = module(x * 1.0)
        module.alpha.grad = None
        y.backward(normal(*shape, dtype=dtype, seed=seed + 10))
        found += [y.detach(), x.grad, module.alpha.grad, *(buffer.clone() for buffer in module.buffers())]
    return found


@pytest.mark.parametrize("function", FUNCTIONS, ids=IDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-6)])
def test_training_is_that_of_the_reference(function, dtype, tolerance, reference):
    for mine, expected in zip(steps(function, dtype), reference(steps, function, dtype), strict=True):
        torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(20, 6, 3, 3), (2, 40), (40,)])
def test_strided_statistics_are_those_of_every_nth_sample(shape, either):
    def run():
        strided, plain = NormalizedActivation(F.silu, stride=4), NormalizedActivation(F.silu)
        x = normal(*shape).requires_grad_()
        plain(x[::4])
        y = strided(x)
        y.sum().backward()
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(strided.get_buffer(name), buffer)
        torch.testing.assert_close(y, plain.eval()(x))
        torch.testing.assert_close(x.grad, plain.scale.detach() * slope(F.silu, x.detach()))

    either(run)


def test_beta_bounds_what_alpha_does_and_alpha_need_not_learn(either):
    def run():
        module, x = NormalizedActivation(F.relu, beta=0.5), normal(30)
        module(x)
        factor = module.scale.item()
        with torch.no_grad():
            module.alpha.fill_(50.0)
        assert module.scale.item() == pytest.approx(factor + 0.5)
        module.momentum = 1e-9
        module(x).sum().backward()
        assert module.alpha.grad.item() == pytest.approx(0.0, abs=1e-6)  # tanh is flat there
        with torch.no_grad():
            module.alpha.fill_(0.0)
        module.alpha.grad = None
        y = module(x)
        y.sum().backward()
        expected = 0.5 * (F.relu(x) - module.shift).sum().item()
        assert module.alpha.grad.item() == pytest.approx(expected, abs=1e-4)
        assert not NormalizedActivation(F.relu, learn_alpha=False).alpha.requires_grad

    either(run)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"beta": -1}, "beta must be a finite number >= 0, got -1"), ({"stride": 0}, "stride must be an integer >= 1")],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NormalizedActivation(F.relu, **options)


def test_channels_last_is_that_of_the_reference(reference):
    def run():
        module = NormalizedActivation(F.silu)
        x = normal(8, 6, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
        y = module(x)
        y.backward(normal(8, 6, 5, 5, seed=1))  # another memory format than the output's
        assert y.is_contiguous(memory_format=torch.channels_last)
        return y.detach(), x.grad, module.alpha.grad

    for mine, expected in zip(run(), reference(run), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", [F.silu, torch.tanh, nn.GELU()])
def test_second_derivatives(function):
    module = NormalizedActivation(function).double()
    module(normal(50, dtype=torch.float64))
    module.momentum = 1e-12  # the running values stay: they are constants for the derivatives
    x = normal(6, dtype=torch.float64, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(module, (x,), atol=1e-4)
    assert torch.autograd.gradgradcheck(module, (x,), atol=1e-4)


def test_alpha_alone_or_input_alone_may_need_a_gradient():
    module, x = NormalizedActivation(F.relu), normal(40)
    module(x).sum().backward()
    assert module.alpha.grad is not None
    module.requires_grad_(False)
    x.requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None


@needs_compiler
def test_no_more_is_saved_for_backward_than_the_input():
    saved = []
    module, x = NormalizedActivation(F.silu), normal(100_000).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        module(x)
    assert sum(saved) <= 100_000 + 1


def test_functions_without_a_kernel_go_the_general_way():
    assert normalized.function_of(torch.sin) is None
    assert normalized.function_of(nn.Mish()) is None

    class Own(nn.ReLU):
        pass

    assert normalized.function_of(Own()) is None


def noisy_steps(cls, function, alpha, p, size):
    """Outputs and gradients of two training steps, and the evaluation output after them."""
    torch.manual_seed(0)
    module = cls(function, alpha=alpha, c=2.0)
    with torch.no_grad():
        module.p.fill_(p)
    found = []
    for seed in (0, 1):
        x = (3 * normal(size, seed=seed)).requires_grad_()
        module.p.grad = None
        y = module(x * 1.0)
        y.backward(normal(size, seed=seed + 10))
        found += [y.detach(), x.grad, module.p.grad / size**0.5]
    with torch.no_grad():
        return [*found, module.eval()(3 * normal(size))]


@pytest.mark.parametrize("function", ["tanh", "sigmoid", "relu"])
@pytest.mark.parametrize("cls", [NAN, NAH])
@pytest.mark.parametrize(("alpha", "p"), [(1.15, 0.8), (0.9, 0.8), (1.0, -0.6), (1.15, -0.6), (1.15, 0.0)])
@pytest.mark.parametrize("size", [1001, 2**17 + 3])
def test_noisy_training_is_that_of_the_reference(cls, function, alpha, p, size, reference):
    arguments = cls, function, alpha, p, size
    for mine, expected in zip(noisy_steps(*arguments), reference(noisy_steps, *arguments), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_noisy_second_derivatives_are_those_of_the_reference(reference):
    def run():
        torch.manual_seed(0)
        module = NAH(c=2.0)
        x = (3 * normal(50)).requires_grad_()
        (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, module.p])

    for mine, expected in zip(run(), reference(run), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@needs_compiler
def test_noisy_saves_no_more_for_backward_than_the_input():
    saved = []
    module, x = NAH(), normal(100_000).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        module(x)
    assert sum(saved) <= 100_000 + 1


def test_noise_does_not_touch_the_global_random_state():
    module, before = NAH(), torch.get_rng_state()
    module(normal(1000))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("cls", [NAN, NAH, NANI, NANIL, NANIS])
def test_evaluation_is_the_mean_of_a_million_draws(cls):
    torch.manual_seed(1)
    module = cls(c=1.0)
    points = torch.tensor([-3.0, -1.2, -1.0, -0.4, 0.0, 0.7, 1.1, 2.5])
    with torch.no_grad():
        draws = module(points.repeat(1_000_000, 1)).double()
        expected = module.eval()(points).double()
    error = draws.std(0) / 1000
    assert ((draws.mean(0) - expected).abs() <= 4.5 * error + 1e-6).all()


def test_noise_is_new_in_each_pass_and_for_each_module_and_element():
    module, x = NANI(c=0.1), torch.zeros(50_000)
    with torch.no_grad():
        draws = torch.stack([module(x), module(x), NANI(c=0.1)(x)]).double().numpy()
    assert np.abs(np.corrcoef(draws) - np.eye(3)).max() < 4.5 / 50_000**0.5
    assert abs(np.corrcoef(draws[0, :-1], draws[0, 1:])[0, 1]) < 4.5 / 50_000**0.5
    np.testing.assert_allclose(draws.std(1), 0.1, rtol=0.015)


def test_without_noise_a_run_with_dropout_is_the_noiseless_one():
    def run(activation):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), activation, nn.Dropout(), nn.Linear(8, 2))
        torch.manual_seed(1)
        return model(normal(16, 8)).detach()

    silent = NAN(c=0.0, alpha=1.0)
    assert torch.equal(run(silent), run(nn.Hardtanh()))
    assert torch.equal(silent.eval()(normal(50)), nn.functional.hardtanh(normal(50)))


def test_ranks_draw_different_noise(monkeypatch):
    def draw(rank):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        torch.manual_seed(0)
        return NANI(c=0.1)(torch.zeros(20_000)).detach().numpy()

    assert abs(np.corrcoef(draw(0), draw(1))[0, 1]) < 4.5 / 20_000**0.5
    np.testing.assert_array_equal(draw(1), draw(1))


@pytest.mark.parametrize("make", [lambda: NormalizedActivation(F.silu), NAH])
@pytest.mark.parametrize("training", [True, False])
def test_tracers_counters_and_forward_mode_see_operations(make, training):
    x = normal(40)
    module = make().train(training)
    module(x)
    graph = make_fx(module)(x).graph
    assert len([node for node in graph.nodes if node.op == "call_function"]) > 3
    with forward_ad.dual_level():
        _, tangent = forward_ad.unpack_dual(module(forward_ad.make_dual(x, torch.ones_like(x))))
        assert tangent is not None
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert module(x).shape == x.shape
    assert module(x).isfinite().all()


@pytest.mark.parametrize("make", [lambda: NormalizedActivation(F.silu), NAH])
def test_double_precision_modules_and_buffers_of_others_are_let_be(make):
    module = make().double()
    assert module(normal(40).double()).dtype == torch.float64
    module = make()
    module.register_buffer("of_others", torch.zeros(3))
    assert module(normal(40)).isfinite().all()
    assert torch.equal(module.of_others, torch.zeros(3))


# What goes another way than usual, against the reference. Each of these once gave other numbers, or an error.


class Lower:
    """Clips from below; has no hash."""

    __hash__ = None

    def __eq__(self, other):
        return self is other

    def __call__(self, x):
        return x.clamp_min(-1.0)


class OwnFormula(NAN):
    def noisy(self, x, epsilon, p, c):
        return x * 3


class OwnScale(NormalizedActivation):
    def scale_of(self, rho, rho_prime, alpha):
        return torch.tensor(7.0)


def with_parameter(module, name):
    value = module.get_buffer(name).clone() + 0.25
    delattr(module, name)
    module.register_parameter(name, nn.Parameter(value))
    return module


def with_hook(module):
    module.function.register_forward_hook(lambda inner, arguments, output: 2 * output)
    return module


def with_state(module, change):
    module.load_state_dict({name: change(value) for name, value in module.state_dict().items()}, assign=True)
    return module


UNUSUAL = {
    "constant": (lambda: NormalizedActivation(F.silu), lambda: torch.full((4097,), 0.1)),
    "constant far from 0": (lambda: NormalizedActivation(F.relu), lambda: torch.full((1000,), 3.3)),
    "tiny": (lambda: NormalizedActivation(F.silu), lambda: 1e-25 * normal(1000)),
    "huge and negative": (lambda: NormalizedActivation(F.silu).eval(), lambda: torch.tensor([-3e38, -1e5, 1.0])),
    "huge and negative, GELU": (lambda: NormalizedActivation(nn.GELU()).eval(), lambda: torch.tensor([-3e38, 1.0])),
    "inner hook": (lambda: with_hook(NormalizedActivation(nn.ReLU())), lambda: normal(1000)),
    "own scale": (lambda: OwnScale(F.relu), lambda: normal(1000)),
    "own formula": (lambda: OwnFormula(), lambda: normal(1000)),
    "c is a parameter": (lambda: with_parameter(NAN(), "c"), lambda: 2 * normal(1000)),
    "rho is a parameter": (
        lambda: with_parameter(NormalizedActivation(F.relu), "running_rho").eval(), lambda: normal(9)
    ),
    "alpha barely above 1": (lambda: NAH(alpha=1 + 1e-9, c=4.0), lambda: 3 * normal(1000)),
    "no hash": (lambda: NAN((Lower(), lambda x: x)), lambda: 3 * normal(1000)),
    "many rows": (lambda: NAH(num_parameters=2, c=4.0), lambda: 3 * normal(100_003, 2)),
    "float counters": (
        lambda: with_state(NormalizedActivation(F.silu), lambda value: value.float()), lambda: normal(1000)
    ),
    "strided state": (
        lambda: with_state(NAN(), lambda v: v if v.dtype != torch.int64 else torch.stack([v, v], 1)[:, 0]),
        lambda: 3 * normal(1000),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSUAL)
def test_what_is_unusual_is_that_of_the_reference(case, reference):
    make, inputs = UNUSUAL[case]

    def run():
        torch.manual_seed(0)
        module, found = make(), []
        for _ in range(2):
            x = inputs().requires_grad_()
            y = module(x)
            y.sum().backward()
            found += [y.detach(), x.grad, *(p.grad / len(x) ** 0.5 for p in module.parameters() if p.grad is not None)]
        return [*found, *(buffer.double() for buffer in module.buffers())]

    for mine, expected in zip(run(), reference(run), strict=True):
        torch.testing.assert_close(mine, expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: NormalizedActivation(F.silu), NAN, NAH, lambda: NAH(num_parameters=5)])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_gradients_and_batches_of_gradients(make, training, reference):
    def run():
        torch.manual_seed(0)
        module, x = make(), 2 * normal(4, 5)
        module(x)
        module.train(training)
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(module(leaf).square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), leaf)
        jacobian = torch.autograd.functional.jacobian(module.eval(), x, vectorize=True)
        return first.detach(), second, jacobian

    for mine, expected in zip(run(), reference(run), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: NormalizedActivation(F.silu), NAH])
def test_hooks_on_saved_tensors_may_change_their_layout(make, reference):
    def run():
        torch.manual_seed(0)
        x, g = 2 * normal(6, 5).requires_grad_(), normal(6, 5, seed=1)
        leaf = x.detach().requires_grad_()
        hooks = lambda t: t.t().contiguous() if t.dim() == 2 else t, lambda t: t.t() if t.dim() == 2 else t
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            y = make()(leaf)
        y.backward(g)
        return y.detach(), leaf.grad

    for mine, expected in zip(run(), reference(run), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: NormalizedActivation(F.silu), NAH, lambda: NAH(num_parameters=4)])
def test_another_alpha_and_other_parameters_by_functional_call(make, reference):
    def run():
        torch.manual_seed(0)
        module, x = make(), 2 * normal(6, 4)
        module(x)
        module.eval()
        name, value = next(iter(module.named_parameters()))
        given = torch.tensor([1j * 0.7] * value.numel()).conj().imag.detach().requires_grad_()
        y = torch.func.functional_call(module, {name: given}, (x,))
        y.square().sum().backward()
        return y.detach(), given.grad

    for mine, expected in zip(run(), reference(run), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


PROCESSES = {
    "fewer threads than asked for": """
        import os
        os.environ["OMP_THREAD_LIMIT"] = "1"
        import torch
        from lightning_noisy.nn import NAH
        torch.manual_seed(0)
        m, x = NAH(num_parameters=64, c=4.0), torch.randn(4000, 64)
        with torch.no_grad():
            torch.set_num_threads(1); a = m(x)
            m.noise_state[1] = 0
            torch.set_num_threads(4); b = m(x)
        assert torch.equal(a, b)
    """,
    "another default dtype": """
        import torch
        torch.set_default_dtype(torch.float64)
        from lightning_noisy.nn import NAH, NormalizedActivation
        for m in (NAH(dtype=torch.float32), NAH(num_parameters=4, dtype=torch.float32),
                  NormalizedActivation(torch.tanh, dtype=torch.float32)):
            x = torch.randn(3, 4, dtype=torch.float32)
            assert m(x).dtype == torch.float32
            with torch.device("meta"):
                assert m(x).isfinite().all()
        from lightning_noisy.kernels import noisy
        assert noisy._compiled() is not None
    """,
    "a fork that is the first to load the library": """
        import os, signal, torch
        torch.set_num_threads(2)
        (torch.randn(1_000_000) * 2).exp()
        from lightning_noisy.nn import NSwish
        x = torch.randn(1 << 20)  # torch's own operations on it would wait for its threads
        pid = os.fork()
        if pid == 0:
            signal.alarm(30)
            NSwish()(x)
            from lightning_noisy.kernels import build
            os._exit(build.library() is None)
        assert os.waitpid(pid, 0)[1] == 0
    """,
}


@needs_compiler
@pytest.mark.parametrize("case", PROCESSES)
def test_processes_of_other_kinds(case):
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(PROCESSES[case])]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr[-2000:]
