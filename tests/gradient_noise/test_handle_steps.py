"""Noise and the ways in which optimizers take their steps."""

import copy
import pickle

import pytest
import torch
from helpers import SpySGD, zero_gradient_sgd
from torch import nn

from lightning_noisy import add_gradient_noise
from lightning_noisy.kernels.gaussian import add_gaussian_, stream_key, substream
from lightning_noisy.schedules import Constant, InverseDecay


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace", "ignore:Graph break due to unsupported builtin")
def test_noise_reaches_a_compiled_step():
    (w,), optimizer = zero_gradient_sgd(100_000)
    handle = add_gradient_noise(optimizer, Constant(1.0))
    step = torch.compile(optimizer.step, backend="eager")
    for t in (1, 2):
        w.grad = torch.zeros_like(w)
        step()
        assert handle.step == t
        assert w.grad.std().item() == pytest.approx(1.0, rel=0.01)


class Lookahead(torch.optim.Optimizer):
    """An optimizer around another, with its parameter groups."""

    def __init__(self, base):
        self.base = base
        super().__init__(base.param_groups, base.defaults)

    def step(self, closure=None):
        return self.base.step(closure)


def test_noise_of_a_wrapping_optimizer_is_added_once():
    (w,), base = zero_gradient_sgd(100_000)
    optimizer = Lookahead(base)
    handle = add_gradient_noise(optimizer, Constant(1.0))
    optimizer.step()
    assert w.grad.std().item() == pytest.approx(1.0, rel=0.01)
    assert handle.step == 1


def test_noise_with_a_closure_comes_after_the_backward_pass_in_it():
    w = nn.Parameter(torch.zeros(100_000))
    optimizer = torch.optim.SGD([w], lr=1.0)
    add_gradient_noise(optimizer, Constant(0.5))

    def closure():
        optimizer.zero_grad()
        loss = (3 * w).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 0
    assert w.mean().item() == pytest.approx(-3, abs=0.01)
    assert w.std().item() == pytest.approx(0.5, rel=0.01)


def test_noise_is_the_same_in_every_evaluation_of_an_lbfgs_step():
    w = nn.Parameter(torch.ones(50))
    optimizer = torch.optim.LBFGS([w], lr=0.1, max_iter=4, tolerance_change=0)
    handle = add_gradient_noise(optimizer, Constant(0.3))
    plain, noisy = [], []

    def closure():
        if w.grad is not None:
            noisy.append(w.grad.clone())  # of the evaluation before
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        plain.append(w.grad.clone())
        return loss

    optimizer.step(closure)
    noisy.append(w.grad.clone())
    noises = [b - a for a, b in zip(plain, noisy, strict=True)]
    assert len(noises) >= 3
    assert handle.step == 1
    for noise in noises:
        torch.testing.assert_close(noise, noises[0], rtol=0, atol=1e-6)
    assert noises[0].std() > 0.2


class Nested(torch.optim.SGD):
    """torch wraps this step and SGD's, so the hooks of one call fire twice."""

    def step(self, closure=None):
        return super().step(closure)


class Twice(torch.optim.SGD):
    """Two updates in one step."""

    def step(self, closure=None):
        super().step()
        return super().step(closure)


@pytest.mark.parametrize("cls", [Nested, SpySGD, Twice])
@pytest.mark.parametrize("with_closure", [False, True])
def test_noise_is_added_once_although_a_subclass_calls_its_base(cls, with_closure):
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)  # from here on torch wraps SGD.step, too
    (w,), optimizer = zero_gradient_sgd(100_000, cls=cls)
    handle = add_gradient_noise(optimizer, Constant(1.0))
    optimizer.step(lambda: torch.zeros(())) if with_closure else optimizer.step()
    assert w.grad.std().item() == pytest.approx(1.0, rel=0.01)
    assert handle.step == 1


def test_noise_goes_on_after_an_exception_in_a_step():
    (w,), optimizer = zero_gradient_sgd(1000, cls=Nested)
    handle = add_gradient_noise(optimizer, Constant(1.0))

    def closure():
        raise RuntimeError("out of memory, say")

    with pytest.raises(RuntimeError, match="say"):
        optimizer.step(closure)
    assert handle.step == 0
    optimizer.step()
    assert handle.step == 1
    assert w.grad.std() > 0.9


def test_noise_of_one_optimizer_may_step_inside_the_step_of_another():
    (outer,), outer_optimizer = zero_gradient_sgd(1000)
    (inner,), inner_optimizer = zero_gradient_sgd(1000)
    handles = [add_gradient_noise(o, Constant(1.0), stream=i) for i, o in enumerate((outer_optimizer, inner_optimizer))]
    outer_optimizer.step(lambda: inner_optimizer.step())
    assert [handle.step for handle in handles] == [1, 1]
    assert outer.grad.std() > 0.9
    assert inner.grad.std() > 0.9


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, foreach=True),
        lambda p: torch.optim.Adam(p, fused=True),
        lambda p: torch.optim.SGD(p, momentum=0.9, nesterov=True),
        lambda p: torch.optim.RMSprop(p),
        lambda p: torch.optim.AdamW(p, maximize=True),
    ],
)
def test_noise_reaches_every_kind_of_optimizer(make):
    w = nn.Parameter(torch.zeros(1000))
    optimizer = make([w])
    add_gradient_noise(optimizer, Constant(1.0))
    w.grad = torch.zeros_like(w)
    optimizer.step()
    assert w.count_nonzero() == 1000


def test_noise_on_gradients_equals_noise_on_weights_with_plain_sgd_and_not_with_momentum():
    # Neelakantan et al., Section 1. (The learning rate is a power of 2, which scales float32 exactly.)
    def run(momentum, noise_on):
        w = nn.Parameter(torch.linspace(-1, 1, 50, dtype=torch.float64))
        optimizer = torch.optim.SGD([w], lr=0.125, momentum=momentum)
        if noise_on == "gradients":
            add_gradient_noise(optimizer, Constant(1.0))
        for t in range(5):
            optimizer.zero_grad()
            (w**2).sum().backward()
            optimizer.step()
            if noise_on == "weights":
                with torch.no_grad():
                    add_gaussian_(w, -0.125, substream(stream_key(0, 0, t), "#0"))
        return w.detach()

    torch.testing.assert_close(run(0.0, "gradients"), run(0.0, "weights"), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(run(0.9, "gradients"), run(0.9, "weights"), atol=0.01)


def test_resumed_noise_equals_uninterrupted_noise():
    def run(stops):
        (w,), optimizer = zero_gradient_sgd(100)
        handle = add_gradient_noise(optimizer, InverseDecay(1.0), seed=5)
        for t in range(6):
            w.grad.zero_()
            optimizer.step()
            if t in stops:
                state = pickle.loads(pickle.dumps(handle.state_dict()))
                handle.remove()
                handle = add_gradient_noise(optimizer, InverseDecay(1.0))
                handle.load_state_dict(state)
        return w.detach()

    assert torch.equal(run(stops=()), run(stops=(1, 3)))


def test_removed_noise_is_gone_and_removing_again_is_harmless():
    (w,), optimizer = zero_gradient_sgd(10)
    with add_gradient_noise(optimizer, Constant(1.0)) as handle:
        pass
    handle.remove()
    optimizer.step()
    assert not w.any()


def test_copies_of_an_optimizer_have_no_noise():
    _, optimizer = zero_gradient_sgd(10)
    add_gradient_noise(optimizer, Constant(1.0))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (w,) = twin.param_groups[0]["params"]
        w.grad = torch.zeros_like(w)
        twin.step()
        assert not w.any()


@pytest.mark.parametrize("init_scale", [1024.0, 65536.0])
def test_noise_under_a_fused_optimizer_that_unscales_itself(init_scale):
    w = nn.Parameter(torch.zeros(50_000))
    optimizer = torch.optim.SGD([w], lr=1.0, fused=True)
    handle = add_gradient_noise(optimizer, Constant(0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    for slope in (2.0, float("inf"), 2.0):  # the second one overflows, and is no step
        optimizer.zero_grad()
        scaler.scale((slope * w).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert handle.step == 2
    assert w.mean().item() == pytest.approx(-4, abs=0.02)
    assert w.std().item() == pytest.approx(0.5 * 2**0.5, rel=0.02)
