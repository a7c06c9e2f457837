"""The derivative of an elementwise function at each element."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_noisy._torch_internals import is_transforming

__all__ = ["largest_slope", "slope", "value_and_slope", "works_in_place"]

Elementwise = Callable[[Tensor], Tensor]


def _relu_slope(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _leaky_relu_slope(x: Tensor, negative_slope: float = 0.01) -> Tensor:
    return torch.where(x > 0, 1.0, negative_slope).to(x.dtype)


def _prelu_slope(x: Tensor, weight: Tensor) -> Tensor:
    if weight.numel() > 1:  # one per channel, dimension 1
        weight = weight.view(-1, *[1] * (x.dim() - 2))
    return torch.where(x > 0, 1.0, weight.to(x.dtype)).to(x.dtype)


def _silu_slope(x: Tensor) -> Tensor:
    # s + y(1 - s) = y + s(1 - y) with s = sigmoid(x), y = x s; ANAct's Eq. 40 and 42 misprint it.
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _gelu_slope(x: Tensor, approximate: str = "none") -> Tensor:
    derivative: Tensor = torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate=approximate)
    return derivative


def _sigmoid_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s)


def _tanh_slope(x: Tensor) -> Tensor:
    return 1 - torch.tanh(x).square()


# With default options: by module class, and by function.
_CLOSED: list[tuple[type[nn.Module], tuple[Elementwise, ...], Elementwise]] = [
    (nn.ReLU, (F.relu, torch.relu), _relu_slope),
    (nn.SiLU, (F.silu,), _silu_slope),
    (nn.Sigmoid, (F.sigmoid, torch.sigmoid), _sigmoid_slope),
    (nn.Tanh, (F.tanh, torch.tanh), _tanh_slope),
]


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _autograd_slope(function: Elementwise, x: Tensor) -> Tensor:
    # Compilers, transforms and tracers don't support a backward pass within a forward pass.
    if torch.compiler.is_dynamo_compiling():
        derivative: Tensor = torch.func.grad(lambda leaf: function(leaf).sum())(x)
        return derivative
    inside = torch.compiler.is_compiling() or is_transforming()
    if inside or type(x) not in (Tensor, nn.Parameter):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch calls torch.jit.script on the first use
            derivative = torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]
        return derivative
    # Keeps tensors that are saved here from the hooks of an outer context, such as activation checkpointing.
    hooks = torch.autograd.graph.saved_tensors_hooks(_identity, _identity)
    with torch.inference_mode(False), torch.enable_grad(), hooks:
        leaf = x.clone().detach().requires_grad_()
        # Functions that work in place need another copy: autograd allows no in-place operation on a leaf.
        y = function(leaf.clone())
        return torch.autograd.grad(y.sum(), leaf)[0] if y.requires_grad else torch.zeros_like(x)  # of a step function


@torch.no_grad()
def works_in_place(function: Elementwise) -> bool:
    """Whether a function overwrites its argument, tested on three numbers."""
    x = torch.tensor([-1.0, 0.5, 2.0], device="cpu", dtype=torch.float32)
    before = x.clone()
    try:
        with torch.random.fork_rng([]):
            (function.forward if isinstance(function, nn.Module) else function)(x)
    except Exception:
        return False
    return not torch.equal(x, before)


@contextmanager
def side_effect_free(function: Elementwise, x: Tensor) -> Iterator[Elementwise]:
    """Context for evaluating ``function`` on ``x`` again, without its hooks; RReLU doesn't change the random state."""
    evaluate = function.forward if isinstance(function, nn.Module) else function
    if isinstance(function, nn.RReLU) and function.training:
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            yield evaluate
    else:
        yield evaluate


@torch.no_grad()
def slope(function: Elementwise, x: Tensor) -> Tensor:
    r"""Derivative :math:`\varphi'(x)` of an elementwise function at every element.

    Closed forms for ReLU, LeakyReLU, PReLU, GELU, Swish (SiLU), sigmoid and tanh; autograd for all others. An RReLU
    module doesn't change the state of the global random generators.

    Args:
        function: elementwise callable or module.
        x: float tensor, any shape; not modified.

    Returns:
        Tensor of the shape and dtype of ``x``, without gradient.

    >>> slope(torch.tanh, torch.tensor([0.0]))
    tensor([1.])
    >>> slope(nn.ReLU(), torch.tensor([-1.0, 2.0]))
    tensor([0., 1.])
    """
    for cls, functions, closed in _CLOSED:
        if type(function) is cls or function in functions:
            return closed(x)
    if type(function) is nn.LeakyReLU:
        return _leaky_relu_slope(x, function.negative_slope)
    if function is F.leaky_relu:
        return _leaky_relu_slope(x)
    if type(function) is nn.GELU:
        return _gelu_slope(x, function.approximate)
    if function is F.gelu:
        return _gelu_slope(x)
    if type(function) is nn.PReLU:
        return _prelu_slope(x, function.weight)
    with side_effect_free(function, x) as evaluate:
        return _autograd_slope(evaluate, x)


def value_and_slope(function: Elementwise, x: Tensor) -> tuple[Tensor, Tensor]:
    """The function's value, differentiable, and its derivative, detached, in few operations.

    Args:
        function: elementwise callable or module.
        x: float tensor, any shape; not modified.

    Returns:
        Two tensors of the shape of ``x``.
    """
    if type(function) is nn.SiLU or function is F.silu:  # compilers don't share the sigmoid of both
        s = torch.sigmoid(x)
        y = x * s
        return y, (s + y * (1 - s)).detach()
    y = function(x)
    return y, slope(function, x.detach())


def largest_slope(function: Elementwise, *, device: torch.device | None = None) -> Tensor:
    r"""Largest :math:`|\varphi'|` of an elementwise function, found on a grid over [-10, 10] in steps of 0.01.

    Saturation is relative to it: a slope of 0.01 is flat for tanh (largest: 1), less so for the sigmoid (0.25).

    Args:
        function: elementwise callable or module.
        device: where the function's parameters are, if it has any.

    Returns:
        A 0-dimensional float32 tensor on ``device``.

    >>> largest_slope(torch.sigmoid)
    tensor(0.2500)
    """
    grid = torch.linspace(-10, 10, 2001, device=device)[:, None]  # (2001, 1): per-channel functions broadcast
    return slope(function, grid).abs().amax()
