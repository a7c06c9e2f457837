"""Noise on optimizers as people write them: wrappers, steps by other names, closures, steps that fail."""

import collections
import functools
import gc
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers import zero_gradient_sgd
from torch import nn

from lightning_noisy import add_gradient_noise
from lightning_noisy.gradient_noise.step_hooks import stepping_optimizer
from lightning_noisy.schedules import Constant

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what torch warns of itself there
    from torch.distributed.optim import PostLocalSGDOptimizer


class Averaging(torch.optim.Optimizer):
    """In the manner of timm's Lookahead: around another, with hooks and without super().__init__."""

    def __init__(self, base):
        self._optimizer_step_pre_hooks = collections.OrderedDict()
        self._optimizer_step_post_hooks = collections.OrderedDict()
        self._base_optimizer, self.param_groups, self.defaults = base, base.param_groups, base.defaults
        self.state = collections.defaultdict(dict)

    def step(self, closure=None):
        return self._base_optimizer.step(closure)


class Accelerated(torch.optim.Optimizer):
    """In the manner of accelerate's: without any hooks, and steps at every second call."""

    def __init__(self, optimizer):
        self.optimizer, self.calls = optimizer, 0

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        self.calls += 1
        if self.calls % 2 == 0:
            self.optimizer.step(closure)


class Plain:
    """In the manner of schedule-free's wrapper: no torch optimizer, but used as one."""

    def __init__(self, base):
        self.base = base

    @property
    def param_groups(self):
        return self.base.param_groups

    def step(self, closure=None):
        return self.base.step(closure)


class SharpnessAware(torch.optim.Optimizer):
    """In the manner of SAM: two steps by other names, the second of which is the update."""

    def __init__(self, params, base, **options):
        super().__init__(params, options)
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.clone()
                p.add_(p.grad)

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"])
        self.base_optimizer.step()

    def step(self, closure=None):
        self.first_step()
        torch.enable_grad()(closure)()
        self.second_step()


class Wrapped(torch.optim.SGD):
    """Has an update of its own that looks like SGD's to torch: functools.wraps copies the mark of what has hooks."""

    @functools.wraps(torch.optim.SGD.step)
    def step(self, closure=None):
        loss = None if closure is None else closure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad, alpha=group["lr"])
        return loss


torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)  # from here on torch has wrapped SGD.step


def expected_noise(steps=1, **options):
    """What plain SGD makes of the noise."""
    (w,), optimizer = zero_gradient_sgd(1000)
    add_gradient_noise(optimizer, Constant(1.0), **options)
    for _ in range(steps):
        w.grad.zero_()
        optimizer.step()
    return w.detach()


@pytest.mark.parametrize(
    "wrap",
    [
        Averaging,
        Plain,
        lambda base: PostLocalSGDOptimizer(base, SimpleNamespace(average_parameters=lambda params: None)),
    ],
    ids=["averaging", "plain", "post-local-sgd"],
)
@pytest.mark.parametrize("with_scheduler", [False, True])
def test_noise_reaches_the_first_step_of_a_wrapper_without_super_init(wrap, with_scheduler):
    (w,), base = zero_gradient_sgd(1000)
    optimizer = wrap(base)
    if with_scheduler:  # puts a function of its own in the place of step
        torch.optim.lr_scheduler.StepLR(base, 100)
    handle = add_gradient_noise(optimizer, Constant(1.0))
    optimizer.step()
    assert torch.equal(w, expected_noise())
    assert handle.step == 1


def test_noise_on_a_wrapper_that_seldom_steps_is_added_when_it_does():
    (w,), base = zero_gradient_sgd(1000)
    optimizer = Accelerated(base)
    handle = add_gradient_noise(optimizer, Constant(1.0))
    optimizer.step()
    assert (handle.step, w.count_nonzero()) == (0, 0)
    optimizer.step()
    assert torch.equal(w, expected_noise())
    assert handle.step == 1


@pytest.mark.parametrize("names", ["first and second", "step"])
def test_noise_under_sharpness_aware_minimization_is_added_once_to_the_gradient_of_the_update(names):
    w = nn.Parameter(torch.zeros(1000))
    optimizer = SharpnessAware([w], torch.optim.SGD, lr=1.0)
    handle = add_gradient_noise(optimizer, Constant(1.0))

    def closure():
        optimizer.zero_grad()
        (0 * w).sum().backward()

    for _ in range(2):
        closure()
        if names == "step":
            optimizer.step(closure)
        else:
            optimizer.first_step()
            closure()
            optimizer.second_step()
    assert handle.step == 2
    assert torch.equal(w, expected_noise(2))


@pytest.mark.parametrize("with_scheduler", [False, True])
def test_noise_reaches_a_step_that_looks_wrapped_and_is_not(with_scheduler):
    (w,), optimizer = zero_gradient_sgd(1000, cls=type("Own", (Wrapped,), {}))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100) if with_scheduler else None
    handle = add_gradient_noise(optimizer, Constant(1.0))
    optimizer.step()
    if scheduler is not None:
        scheduler.step()  # which warns if its own function is gone
    assert torch.equal(w, expected_noise())
    assert handle.step == 1
    handle.remove()
    handle = add_gradient_noise(optimizer, Constant(1.0), stream=1)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert handle.step == 1
    assert torch.equal(w.grad, -expected_noise(stream=1))


def test_an_optimizer_without_hooks_or_an_optimizer_inside_is_refused():
    class Bare(torch.optim.Optimizer):
        def __init__(self, params):
            self.param_groups = [{"params": list(params)}]

        def step(self):
            pass

    with pytest.raises(TypeError, match=r"Bare has no hooks .* doesn't call Optimizer.__init__"):
        add_gradient_noise(Bare([nn.Parameter(torch.zeros(1))]), Constant(1.0))


def test_the_stepping_optimizer_is_the_only_inner_one_with_the_same_parameters():
    (v, _), base = zero_gradient_sgd(3, 4)
    assert stepping_optimizer(base) is base
    assert stepping_optimizer(Averaging(Averaging(base))) is base
    two = Averaging(base)
    two.other = torch.optim.Adam(base.param_groups)
    assert stepping_optimizer(two) is two
    part = Averaging(base)
    part._base_optimizer = torch.optim.SGD([v], lr=1.0)  # as ZeRO gives each rank some
    assert stepping_optimizer(part) is part
    circle = Averaging(base)
    base.wrapper = circle
    assert stepping_optimizer(circle) is base


def test_a_closure_that_is_evaluated_for_its_loss_alone_adds_no_second_noise():
    class LineSearch(torch.optim.SGD):
        def step(self, closure):
            loss = closure()
            super().step()
            while closure(backward=False) > loss + 1:
                raise AssertionError
            return loss

    (w,), optimizer = zero_gradient_sgd(1000, cls=LineSearch)
    handles = [add_gradient_noise(optimizer, Constant(1.0), stream=stream) for stream in (0, 1)]

    def closure(backward=True):
        loss = (0 * w).sum()
        if backward:
            optimizer.zero_grad()
            loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert [handle.step for handle in handles] == [2, 2]
    torch.testing.assert_close(w.detach(), expected_noise(2) + expected_noise(2, stream=1))
    assert w.grad.std().item() == pytest.approx(2**0.5, rel=0.1)  # of two noises, once each


def test_a_step_that_raised_and_is_tried_again_adds_its_noise_once():
    class OutOfMemory(torch.optim.SGD):
        fails = 1

        def step(self, closure=None):
            if self.fails:
                self.fails -= 1
                raise RuntimeError("out of memory, say")
            return super().step(closure)

    (w,), optimizer = zero_gradient_sgd(1000, cls=OutOfMemory)
    handle = add_gradient_noise(optimizer, Constant(1.0))
    with pytest.raises(RuntimeError, match="say"):
        optimizer.step()
    optimizer.step()
    assert torch.equal(w, expected_noise())
    assert handle.step == 1
    optimizer.fails = 1
    with pytest.raises(RuntimeError, match="say"):
        optimizer.step()
    w.grad = torch.zeros_like(w)  # computed anew
    optimizer.step()
    assert torch.equal(w, expected_noise(2))


def test_closures_may_have_arguments():
    class Asks(torch.optim.SGD):
        def step(self, closure):
            loss = closure(3, backward=True)
            super().step()
            return loss

    (w,), optimizer = zero_gradient_sgd(10, cls=Asks)
    handle = add_gradient_noise(optimizer, Constant(1.0))
    given = []
    assert optimizer.step(lambda *args, **kwargs: given.append((args, kwargs)) or 7) == 7
    assert given == [((3,), {"backward": True})]
    assert handle.step == 1
    assert w.count_nonzero() == 10


def test_a_removed_handle_keeps_nothing_alive():
    model = nn.Linear(10, 10)
    parameters = weakref.ref(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = add_gradient_noise(optimizer, Constant(1.0), model=model)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    handle.remove()
    del model, optimizer
    gc.collect()
    assert parameters() is None
    assert handle.state_dict()["step"] == 1


def test_an_optimizer_that_is_dropped_takes_its_noise_along():
    (w,), optimizer = zero_gradient_sgd(10)
    handle = weakref.ref(add_gradient_noise(optimizer, Constant(1.0), model=nn.ParameterList([w])))
    optimizer.step()
    del optimizer
    gc.collect()
    assert handle() is None


def test_noise_scales_survive_the_loading_of_an_older_state():
    def make(**options):
        v, w = nn.Parameter(torch.zeros(1000)), nn.Parameter(torch.zeros(1000))
        return (v, w), torch.optim.SGD([{"params": [v], **options}, {"params": [w]}], lr=1.0)

    _, older = make()
    (v, w), optimizer = make(noise_scale=0)
    handle = add_gradient_noise(optimizer, Constant(1.0))
    state = older.state_dict()
    optimizer.load_state_dict(state)
    assert "noise_scale" not in state["param_groups"][0]  # what was given is not changed
    for parameter in (v, w):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert (v.count_nonzero(), w.count_nonzero()) == (0, 1000)
    saved = optimizer.state_dict()
    optimizer.param_groups[0]["noise_scale"] = 5.0
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["noise_scale"] == 0  # as every other option
    handle.remove()
    optimizer.load_state_dict(older.state_dict())
    assert "noise_scale" not in optimizer.param_groups[0]


class Switches(torch.optim.SGD):
    """Updates the parameters by itself, and at every third step by another optimizer of theirs."""

    def __init__(self, params, lr):
        params = list(params)
        super().__init__(params, lr=lr)
        self.other, self.calls = torch.optim.SGD(params, lr=lr), 0

    def step(self, closure=None):
        self.calls += 1
        return super().step(closure) if self.calls % 3 else self.other.step(closure)


@pytest.mark.parametrize("with_closure", [False, True])
def test_noise_is_in_every_step_of_an_optimizer_that_holds_another_one(with_closure):
    (w,), optimizer = zero_gradient_sgd(1000, cls=Switches)
    handle = add_gradient_noise(optimizer, Constant(1.0))
    for _ in range(6):
        w.grad.zero_()
        optimizer.step(lambda: None) if with_closure else optimizer.step()
    assert handle.step == 6
    assert torch.equal(w, expected_noise(6))


def test_a_gradient_that_is_changed_between_evaluations_gets_no_second_noise():
    class Centralized(torch.optim.SGD):
        def step(self, closure):
            closure()
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.grad.mul_(2)
            closure(backward=False)
            return super().step()

    (w,), optimizer = zero_gradient_sgd(1000, cls=Centralized)
    add_gradient_noise(optimizer, Constant(1.0))

    def closure(backward=True):
        if backward:
            optimizer.zero_grad()
            (0 * w).sum().backward()

    optimizer.step(closure)
    assert torch.equal(w, 2 * expected_noise())
    assert not w._post_accumulate_grad_hooks


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_gradient_that_is_computed_anew_gets_the_noise_of_its_step_again(set_to_none):
    class Twice(torch.optim.SGD):
        def step(self, closure):
            closure()
            closure()
            return super().step()

    (w,), optimizer = zero_gradient_sgd(1000, cls=Twice)
    add_gradient_noise(optimizer, Constant(1.0))

    def closure():
        optimizer.zero_grad(set_to_none=set_to_none)
        (0 * w).sum().backward()

    optimizer.step(closure)
    assert torch.equal(w, expected_noise())


def test_noise_is_on_a_gradient_that_the_step_makes_itself():
    class ZerothOrder(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            closure()
            for p in self.param_groups[0]["params"]:
                p.grad = torch.zeros_like(p)
            super().step()
            self.zero_grad()

    w = nn.Parameter(torch.zeros(1000))
    optimizer = ZerothOrder([w], lr=1.0)
    handle = add_gradient_noise(optimizer, Constant(1.0))
    for _ in range(2):
        optimizer.step(lambda: None)
    assert handle.step == 2
    assert torch.equal(w, expected_noise(2))


def test_a_step_that_raised_keeps_nothing_alive():
    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("out of memory, say")

    (_,), optimizer = zero_gradient_sgd(10, cls=Fails)
    add_gradient_noise(optimizer, Constant(1.0))

    def batch():
        activations = nn.Linear(1, 1)
        try:
            optimizer.step()
        except RuntimeError:
            return weakref.ref(activations)

    reference = batch()
    gc.collect()
    assert reference() is None


class Forwarding(torch.optim.Optimizer):
    """A wrapper that hands its hooks over to the optimizer inside."""

    def __init__(self, base):
        super().__init__(base.param_groups, base.defaults)
        self.base = base

    def register_step_pre_hook(self, hook):
        return self.base.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook):
        return self.base.register_step_post_hook(hook)

    def step(self, closure=None):
        return self.base.step(closure)


class Sharing(torch.optim.Optimizer):
    """A wrapper that has the very hooks of the optimizer inside."""

    def __init__(self, base):
        self.__setstate__(base.__dict__)
        self.base = base

    def step(self, closure=None):
        return self.base.step(closure)


@pytest.mark.parametrize("wrap", [Forwarding, Sharing])
@pytest.mark.parametrize("on_base", [True, False])
def test_noise_of_a_wrapper_with_the_hooks_of_what_it_wraps_is_added_once(wrap, on_base):
    weight = nn.Parameter(torch.zeros(4))
    base = torch.optim.SGD([weight], lr=1.0)
    wrapper = wrap(base)
    with add_gradient_noise(base if on_base else wrapper, lambda t: 0.1, seed=3) as noise:
        for step in range(3):
            weight.grad = torch.zeros(4)
            wrapper.step()
            assert noise.step == step + 1
            other = nn.Parameter(torch.zeros(4))
            other.grad = torch.zeros(4)
            alone = torch.optim.SGD([other], lr=1.0)
            with add_gradient_noise(alone, lambda t: 0.1) as expected:
                expected.load_state_dict({"seed": 3, "stream": 0, "step": step})
                alone.step()
            assert torch.equal(weight.grad, other.grad)
    weight.grad = None
    wrapper.step()
    assert noise.step == 3
