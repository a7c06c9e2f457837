"""The derivative of an elementwise function at each element."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["largest_slope", "slope"]

Elementwise = Callable[[Tensor], Tensor]


def _relu_slope(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _leaky_relu_slope(x: Tensor, negative_slope: float = 0.01) -> Tensor:
    return torch.where(x > 0, 1.0, negative_slope).to(x.dtype)


def _silu_slope(x: Tensor) -> Tensor:
    # s + y(1 - s) = y + s(1 - y) with s = sigmoid(x), y = x s; ANAct's Eq. 40 and 42 misprint it.
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _autograd_slope(function: Elementwise, x: Tensor) -> Tensor:
    # Hooks of an outer context, such as activation checkpointing, are not to count what is saved here.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_identity, _identity):
        leaf = x.detach().requires_grad_()
        # The copy lets functions that work in place do so: autograd refuses that on a leaf.
        (gradient,) = torch.autograd.grad(function(leaf.clone()).sum(), leaf)
    return gradient


@torch.no_grad()
def slope(function: Elementwise, x: Tensor) -> Tensor:
    r"""Derivative :math:`\varphi'(x)` of an elementwise function at every element.

    Closed forms for ReLU, LeakyReLU and Swish (SiLU); autograd for everything else. The state of the
    global random generators is as before afterwards, also for a function that draws (RReLU).

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
    if type(function) is nn.ReLU or function in (F.relu, torch.relu):
        return _relu_slope(x)
    if type(function) is nn.LeakyReLU:
        return _leaky_relu_slope(x, function.negative_slope)
    if function is F.leaky_relu:
        return _leaky_relu_slope(x)
    if type(function) is nn.SiLU or function is F.silu:
        return _silu_slope(x)
    if isinstance(function, nn.RReLU) and function.training:
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            return _autograd_slope(function.forward, x)
    # A module's forward, not its call: its hooks are not meant to see this evaluation.
    return _autograd_slope(function.forward if isinstance(function, nn.Module) else function, x)


def largest_slope(function: Elementwise, *, device: torch.device | None = None) -> Tensor:
    r"""Largest :math:`|\varphi'|` of an elementwise function, found on a grid over [-10, 10] in steps of 0.01.

    Saturation is judged against it: 0.01 is flat for tanh (1), less so for the sigmoid (0.25).

    Args:
        function: elementwise callable or module.
        device: where the function's parameters are, if it has any.

    Returns:
        A 0-dimensional float32 tensor on ``device``.

    >>> largest_slope(torch.sigmoid)
    tensor(0.2500)
    """
    grid = torch.linspace(-10, 10, 2001, device=device)
    return slope(function, grid).abs().amax()
