"""Normalized activations of Yuan et al., "ANAct: Adaptive Normalization for Activation Functions" (2022)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_noisy.functional import fused
from lightning_noisy.functional.normalized import normalization_factor, normalize_output, update_running
from lightning_noisy.functional.scores import rho_prime
from lightning_noisy.functional.slopes import slope
from lightning_noisy.nn.recomputing import is_recomputing

__all__ = ["NLeakyReLU", "NReLU", "NSwish", "NormalizedActivation"]

# A batch whose gains are not above this says nothing usable (a dead layer, a constant input): its λ
# would be beyond 1000 and would stay in the running values for many steps.
_SMALLEST_GAIN = 1e-6


class NormalizedActivation(nn.Module):
    r"""An activation scaled and shifted so that signal and gradient keep their variance.

    :math:`\hat\delta(x) = (\lambda + \beta \tanh \alpha)\,(\delta(x) - \mu)` with
    :math:`\lambda = \sqrt{(\rho + \rho') / (2 \rho \rho')}` (Eq. 13 and 15), where
    :math:`\rho = \mathrm{Var}[\delta(x)] / \mathrm{Var}[x]` (Eq. 31), :math:`\rho' = E[\delta'(x)^2]`
    (Eq. 6) and :math:`\mu = E[\delta(x)]` are running values over the training batches (Eq. 16-18).

    In training mode each batch first updates the running values (the first batch sets them), and the
    updated values are used; in evaluation mode they are used as they are. They are constants for the
    backward pass. α is learned. A batch whose ρ or ρ′ is out of ``bounds`` leaves that value where it is;
    after ``max_rejections`` such batches in a row the running values are set to the batch's, so that a
    real shift is not refused for ever. μ is not filtered (Eq. 16). A batch that has no usable gains (empty,
    constant or non-finite input, all units inactive) changes nothing.

    Activation checkpointing gives the gradients of the plain run as long as a checkpointed module is called once
    per backward pass: the second forward pass uses the running values of the last call.

    Statistics are computed in float32 (float64 for double precision) over all elements. Under data
    parallelism each process uses its own batch, and DDP copies rank 0's running values to all ranks
    before each forward pass, as it does for batch normalization.

    Args:
        function: elementwise callable or module δ. Its derivative needs no closed form.
        momentum: m, the weight of a batch in the running values, in (0, 1]. The paper gives no value.
        bounds: (L, U) with 0 <= L < 1 < U. The paper gives no values.
        max_rejections: batches in a row that may be rejected, >= 0.
        beta: β, how far α can move the factor, >= 0; the paper takes 0.3.
        learn_alpha: whether α is learned; else it stays at 0, and needs no gradient.
        stride: take the statistics from every ``stride``-th sample of a batch (dimension 0), >= 1.
        inplace: write the result into the input, as the activation that this one replaces did. It costs
            a copy of the input.
        device: device of the parameter and the buffers.
        dtype: dtype of the parameter ``alpha``. The running values are float32, and stay so in a module that is
            moved to half precision.

    Attributes:
        alpha: the learned α, parameter of shape (1,), 0 at the start.
        running_mean: μ, 0-dimensional, 0 at the start.
        running_rho: ρ, 0-dimensional, 1 at the start.
        running_rho_prime: ρ′, 0-dimensional, 1 at the start.
        num_batches_tracked: batches that had usable gains, 0-dimensional.
        num_rejected: batches rejected in a row by now, 0-dimensional.

    Shape:
        Input and output: any shape, the same.

    Raises:
        TypeError: if ``function`` is not callable.
        ValueError: if an option is outside its range, or ``function`` works in place.

    >>> x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    >>> y = NReLU()(x)
    >>> round(abs(y.mean().item()), 4), round(y.var().item(), 2)  # λ²ρ = (1 + ρ/ρ′) / 2
    (0.0, 0.84)
    """

    alpha: nn.Parameter
    running_mean: Tensor
    running_rho: Tensor
    running_rho_prime: Tensor
    num_batches_tracked: Tensor
    num_rejected: Tensor

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        *,
        momentum: float = 0.1,
        bounds: tuple[float, float] = (0.2, 5.0),
        max_rejections: int = 10,
        beta: float = 0.3,
        learn_alpha: bool = True,
        stride: int = 1,
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not callable(function):
            raise TypeError(f"function must be an elementwise callable, got {function!r}.")
        if getattr(function, "inplace", False) or getattr(function, "__name__", "").endswith("_"):
            raise ValueError(f"function must not work in place, got {function!r}. Use inplace=True here instead.")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], got {momentum!r}.")
        if not 0 <= bounds[0] < 1 < bounds[1]:
            raise ValueError(f"bounds must be (L, U) with 0 <= L < 1 < U, got {bounds!r}.")
        if max_rejections < 0:
            raise ValueError(f"max_rejections must be >= 0, got {max_rejections!r}.")
        if not 0 <= beta < math.inf:
            raise ValueError(f"beta must be a finite number >= 0, got {beta!r}.")
        if not isinstance(stride, int) or stride < 1:
            raise ValueError(f"stride must be an integer >= 1, got {stride!r}.")
        self.function = function
        self.beta = float(beta)
        self.learn_alpha = learn_alpha
        self.stride = stride
        self.momentum = momentum
        self.bounds = (float(bounds[0]), float(bounds[1]))
        self.max_rejections = max_rejections
        self.inplace = inplace
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype), requires_grad=learn_alpha)  # 1-d for FSDP
        for name in ("running_mean", "running_rho", "running_rho_prime"):
            self.register_buffer(name, torch.empty((), dtype=torch.float32, device=device))
        for name in ("num_batches_tracked", "num_rejected"):
            self.register_buffer(name, torch.empty((), dtype=torch.long, device=device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forget what was learned and tracked."""
        for tensor in (self.alpha, self.running_mean, self.num_batches_tracked, self.num_rejected):
            tensor.zero_()
        self.running_rho.fill_(1)
        self.running_rho_prime.fill_(1)

    @property
    def scale(self) -> Tensor:
        """λ + f(α) with f(α) = β tanh α, 0-dimensional."""
        factor = normalization_factor(self.running_rho, self.running_rho_prime)
        return factor + self.beta * torch.tanh(self.alpha.squeeze())

    @property
    def shift(self) -> Tensor:
        """μ, 0-dimensional."""
        return self.running_mean

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the activation of ``input``."""
        x = input.clone() if self.inplace else input
        kernel = fused.kernel_of(self.function) if self.training and not torch.compiler.is_compiling() else None
        if kernel is not None and fused.takes(x):
            with torch.autocast("cpu", enabled=False):
                normalized = cast(Tensor, _Fused.apply(x, self.alpha, self, kernel))
        else:
            y = self.function(x)
            if self.training:
                self._track(x, y)
            normalized = normalize_output(y, self.scale, self.shift)
        return input.copy_(normalized) if self.inplace else normalized

    def _is_tracking(self) -> bool:
        """Whether this forward pass is to update the running values."""
        return not is_recomputing() and (torch.compiler.is_compiling() or not torch.is_inference_mode_enabled())

    @torch.no_grad()
    def _track(self, x: Tensor, y: Tensor) -> None:
        """Update the running values with a batch: input ``x``, output ``y`` of the plain function."""
        if (
            x.numel() == 0
            or is_recomputing()
            or (not torch.compiler.is_compiling() and torch.is_inference_mode_enabled())
        ):
            return
        if self.stride > 1 and x.dim():
            x, y = x[:: self.stride], y[:: self.stride]
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            x, y = x.to(wide), y.to(wide)
            var_y, mean_y = torch.var_mean(y, correction=0)
            gain = var_y / x.var(correction=0)
            gain_prime = rho_prime(slope(self.function, x))
            self._update(*(value.to(self.running_mean.dtype) for value in (mean_y, gain, gain_prime)))

    def _update(self, batch_mean: Tensor, batch_rho: Tensor, batch_rho_prime: Tensor) -> None:
        """Apply Eq. 16-18 to the buffers, without a data-dependent branch (no host sync)."""
        usable = (batch_rho > _SMALLEST_GAIN) & (batch_rho_prime > _SMALLEST_GAIN)
        usable &= (batch_mean + batch_rho + batch_rho_prime).isfinite()
        follow = partial(update_running, momentum=self.momentum, bounds=self.bounds)
        next_rho, rho_accepted = follow(self.running_rho, batch_rho)
        next_rho_prime, rho_prime_accepted = follow(self.running_rho_prime, batch_rho_prime)
        rejected = ~(rho_accepted & rho_prime_accepted)
        restart = (self.num_batches_tracked == 0) | (rejected & (self.num_rejected >= self.max_rejections))
        for running, batch, following in (
            (self.running_mean, batch_mean, self.running_mean.lerp(batch_mean, self.momentum)),
            (self.running_rho, batch_rho, next_rho),
            (self.running_rho_prime, batch_rho_prime, next_rho_prime),
        ):
            running.copy_(torch.where(usable, torch.where(restart, batch, following), running))
        in_a_row = torch.where(rejected & ~restart, self.num_rejected + 1, 0)
        self.num_rejected.copy_(torch.where(usable, in_a_row, self.num_rejected))
        self.num_batches_tracked.add_(usable)

    def _update_on_cpu(self, batch_mean: float, batch_rho: float, batch_rho_prime: float) -> None:
        """The same by Python's numbers, which take a tenth of the time of small tensors."""
        if not (batch_rho > _SMALLEST_GAIN and batch_rho_prime > _SMALLEST_GAIN):
            return
        if not math.isfinite(batch_mean + batch_rho + batch_rho_prime):
            return
        rejected = int(self.num_rejected)
        running = (self.running_mean, self.running_rho, self.running_rho_prime)
        mean, rho, gain_prime = map(float, running)
        lower, upper = self.bounds
        accepted = [lower * old < new < upper * old for old, new in ((rho, batch_rho), (gain_prime, batch_rho_prime))]
        restart = int(self.num_batches_tracked) == 0 or (not all(accepted) and rejected >= self.max_rejections)
        if restart:
            values = (batch_mean, batch_rho, batch_rho_prime)
        else:
            m = self.momentum
            values = (
                mean + m * (batch_mean - mean),
                rho + m * (batch_rho - rho) if accepted[0] else rho,
                gain_prime + m * (batch_rho_prime - gain_prime) if accepted[1] else gain_prime,
            )
        for buffer, value in zip(running, values, strict=True):
            buffer.fill_(value)
        self.num_rejected.fill_(0 if restart or all(accepted) else rejected + 1)
        self.num_batches_tracked.add_(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NormalizedActivation:
        # Half precision would lose small updates of the running values: they follow to a device, not to float16.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = self._buffers[name]
            if now is not None and buffer is not None and now.is_floating_point() and now.itemsize < 4:
                self._buffers[name] = buffer.to(now.device)
        return self

    def extra_repr(self) -> str:
        """Options as keyword arguments."""
        function = [] if isinstance(self.function, nn.Module) else [getattr(self.function, "__name__", "?")]
        options = [
            f"momentum={self.momentum}",
            f"bounds={self.bounds}",
            f"max_rejections={self.max_rejections}",
        ]
        options += [f"beta={self.beta}"] if self.beta != 0.3 else []
        options += ["learn_alpha=False"] if not self.learn_alpha else []
        options += [f"stride={self.stride}"] if self.stride != 1 else []
        return ", ".join(function + options + (["inplace=True"] if self.inplace else []))


class _Fused(torch.autograd.Function):
    """Training forward and backward of a normalized activation on the CPU, by the sweeps of ``functional.fused``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, module: NormalizedActivation, kernel: fused.Kernel) -> Tensor:
        """Compute the output, and update the running values before."""
        if strided := module.stride > 1 and x.dim() > 0:
            output = module.function(x)
            sample = x[:: module.stride].contiguous()
            values = torch.empty_like(sample)
        else:
            output = torch.empty_like(x)
            sample, values = x, output
        if not strided or module._is_tracking():
            var_x, mean, var, gain_prime = fused.moments(kernel, fused.flat(sample), fused.flat(values))
        if module._is_tracking():
            module._update_on_cpu(mean, var / var_x if var_x > 0 else math.nan, gain_prime)
        rho, rho_prime = float(module.running_rho), float(module.running_rho_prime)
        ctx.module, ctx.kernel, ctx.shift = module, kernel, float(module.running_mean)
        ctx.tanh = math.tanh(float(alpha))
        ctx.scale = math.sqrt((rho + rho_prime) / (2 * rho * rho_prime)) + module.beta * ctx.tanh
        ctx.save_for_backward(x, alpha)
        fused.rescale_(fused.flat(output), ctx.scale, ctx.shift)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients of input and α; the running values are constants."""
        x, alpha = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative: what autograd can differentiate once more
            beta = ctx.module.beta
            factor = ctx.scale - beta * ctx.tanh
            y = (factor + beta * torch.tanh(alpha.squeeze()).to(x.dtype)) * (ctx.module.function(x) - ctx.shift)
            inputs = [tensor for tensor, needed in zip((x, alpha), ctx.needs_input_grad[:2], strict=True) if needed]
            found = iter(torch.autograd.grad(y, inputs, gradient, create_graph=True))
            return (*(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), None, None)  # type: ignore[return-value]
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        gradient = gradient.to(x.dtype).contiguous(memory_format=layout)
        result = torch.empty_like(x)
        with torch.autocast("cpu", enabled=False):
            total = fused.gradients(
                ctx.kernel, fused.flat(x), fused.flat(gradient), fused.flat(result), ctx.scale, ctx.shift
            )
        return result, torch.full_like(alpha, total * ctx.module.beta * (1 - ctx.tanh**2)), None, None


class NReLU(NormalizedActivation):
    """Normalized ReLU, Eq. 33-37 of ANAct: ρ′ = P(x > 0). Options: see :class:`NormalizedActivation`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(F.relu, **options)


class NSwish(NormalizedActivation):
    """Normalized Swish (SiLU), Eq. 38-42 of ANAct. Options: see :class:`NormalizedActivation`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(F.silu, **options)


class NLeakyReLU(NormalizedActivation):
    """Normalized LeakyReLU with slope 0.01. Options: see :class:`NormalizedActivation`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(F.leaky_relu, **options)
