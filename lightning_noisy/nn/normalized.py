"""Normalized activations of Yuan et al., "ANAct: Adaptive Normalization for Activation Functions" (2022)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_noisy._torch_internals import is_recomputing, recomputing
from lightning_noisy.functional.moments import Moments, moments, pooled, sums
from lightning_noisy.functional.normalized import normalization_factor, normalize_output, update_running
from lightning_noisy.functional.slopes import slope, value_and_slope, works_in_place
from lightning_noisy.kernels import normalized as kernel
from lightning_noisy.kernels.backend import in_memory_order, is_dense, is_plain

__all__ = ["NLeakyReLU", "NReLU", "NSwish", "NormalizedActivation"]

# A batch with gains up to this is unusable (a dead layer, a constant input): its λ would be about 1000
# or more, and would affect the running statistics for many steps.
_SMALLEST_GAIN = 1e-6


class NormalizedActivation(nn.Module):
    r"""An activation scaled and shifted so that signal and gradient keep their variance.

    :math:`\hat\delta(x) = (\lambda + \beta \tanh \alpha)\,(\delta(x) - \mu)` with
    :math:`\lambda = \sqrt{(\rho + \rho') / (2 \rho \rho')}` (Eq. 13 and 15), where
    :math:`\rho = \mathrm{Var}[\delta(x)] / \mathrm{Var}[x]` (Eq. 31), :math:`\rho' = E[\delta'(x)^2]`
    (Eq. 6) and :math:`\mu = E[\delta(x)]` are running statistics of the training batches (Eq. 16-18).

    In training mode each batch first updates the running statistics (the first batch sets them), and the
    updated ones are used; evaluation mode uses them without an update. The backward pass treats them as
    constants. α is learned. A batch whose ρ or ρ′ is out of ``bounds`` doesn't update that statistic; after
    ``max_rejections`` such batches in a row, the next one sets the running statistics, so that a real
    shift is eventually accepted. μ is not filtered (Eq. 16). A batch without usable gains (empty,
    constant or non-finite input, all units inactive) changes nothing.

    With activation checkpointing, gradients are those of the plain run as long as a checkpointed module is called
    once per backward pass: the recomputation uses the running statistics of the last call.

    Statistics are computed in float32 (float64 for double precision) over all elements. Under data
    parallelism each process uses its own batch, and DDP copies rank 0's running statistics to all ranks
    before each forward pass, as it does for batch normalization. With ``synchronized=True`` batches only add to
    ``pending``; call :func:`~lightning_noisy.nn.synchronize.synchronize_statistics` after each step
    (``ActivationReplacement`` does) to update the running statistics from all ranks, in one reduction for all
    layers. Forward passes use the running statistics of the last step; before the first, their own batch's.

    With ``instance_dims`` each instance is normalized by its own statistics, in training and in evaluation, as in
    the paper's Transformer. An instance without usable gains uses λ = 1 and μ = 0. The running statistics track the
    means over the instances, only for inspection.

    Args:
        function: elementwise callable or module δ. Its derivative needs no closed form.
        momentum: m, the weight of a batch in the running statistics, in (0, 1]. The paper gives no value.
        bounds: (L, U), multiples of the running statistic, 0 <= L < 1 < U. The paper gives no values.
        max_rejections: number of batches in a row that may be rejected, >= 0.
        beta: β, how far α can move the factor, >= 0; the paper uses 0.3.
        learn_alpha: whether α is learned; else it stays 0 without a gradient.
        stride: compute the statistics from every ``stride``-th sample of a batch (dimension 0), >= 1.
        instance_dims: dimensions that make up an instance, such as (1, 2) for an input of shape (batch, tokens,
            features); None for statistics of whole batches.
        synchronized: pool the statistics of all ranks, and of all batches of a step; see above.
        inplace: overwrite the input with the result, as an in-place activation does. Costs a copy of the input.
        device: device of the parameter and the buffers.
        dtype: dtype of the parameter ``alpha``. The running statistics are float32, and stay so in a module
            that is moved to half precision.

    Attributes:
        alpha: the learned α, parameter of shape (1,), initially 0.
        running_mean: μ, 0-dimensional, initially 0.
        running_rho: ρ, 0-dimensional, initially 1.
        running_rho_prime: ρ′, 0-dimensional, initially 1.
        num_batches_tracked: number of updates with usable gains, 0-dimensional.
        num_rejected: number of batches rejected in a row so far, 0-dimensional.
        pending: with ``synchronized``, the number of elements and the sums of x, x², δ, δ² and δ′² since the last
            synchronization, float64 tensor (float32 on MPS), shape (6,), not in the ``state_dict``; else None.

    Shape:
        Input and output: any shape, equal.

    Raises:
        TypeError: if ``function`` is not callable.
        ValueError: if an option is out of range, or ``function`` works in place.

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
    pending: Tensor | None

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
        instance_dims: int | Sequence[int] | None = None,
        synchronized: bool = False,
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not callable(function):
            raise TypeError(f"function must be an elementwise callable, got {function!r}.")
        if works_in_place(function):
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
        if instance_dims is not None:
            instance_dims = (instance_dims,) if isinstance(instance_dims, int) else tuple(instance_dims)
            if not instance_dims or not all(isinstance(dim, int) for dim in instance_dims):
                raise ValueError(f"instance_dims must be one dimension or several, got {instance_dims!r}.")
            if stride != 1 or synchronized:
                raise ValueError("instance_dims can't be combined with stride or synchronized.")
        self.function = function
        self.beta = float(beta)
        self.learn_alpha = learn_alpha
        self.stride = stride
        self.instance_dims = instance_dims
        self.synchronized = synchronized
        self.pending = None
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
        """Reset α and the statistics."""
        self._reset_pending()
        for tensor in (self.alpha, self.running_mean, self.num_batches_tracked, self.num_rejected):
            tensor.zero_()
        self.running_rho.fill_(1)
        self.running_rho_prime.fill_(1)

    def _reset_pending(self) -> None:
        if self.synchronized:
            device = self.running_mean.device
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self.pending = torch.zeros(6, dtype=dtype, device=device)

    def train(self, mode: bool = True) -> NormalizedActivation:
        """Set the training flag."""
        forgotten = self.pending is not None and not self.pending.is_meta and self.training and not mode
        if forgotten and cast(Tensor, self.pending)[0] > 0 and self.num_batches_tracked == 0:
            warnings.warn(
                f"{type(self).__name__}(synchronized=True) has no running statistics yet, and evaluates like the"
                " plain function: call synchronize_statistics(model) after each step.",
                stacklevel=2,
            )
        return super().train(mode)

    @property
    def scale(self) -> Tensor:
        """λ + f(α) with f(α) = β tanh α, 0-dimensional."""
        return self._scale(self.running_rho, self.running_rho_prime)

    @property
    def shift(self) -> Tensor:
        """μ, 0-dimensional."""
        return self.running_mean

    def _scale(self, rho: Tensor, rho_prime: Tensor) -> Tensor:
        return self.scale_of(rho, rho_prime, self.alpha)

    def scale_of(self, rho: Tensor, rho_prime: Tensor, alpha: Tensor) -> Tensor:
        """λ + f(α) of other gains, and of another tensor in place of :attr:`alpha`."""
        return normalization_factor(rho, rho_prime) + self.beta * torch.tanh(alpha.squeeze())

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the activation of ``input``."""
        fast, alpha = None, self.alpha
        own = type(self).scale_of is not NormalizedActivation.scale_of  # a subclass has a formula of its own
        if self.instance_dims is None and not own and kernel.takes(input, alpha, self._buffers):
            fast = kernel.function_of(self.function)
        x = input.clone() if self.inplace else input
        if fast is not None:
            if torch.is_grad_enabled() and (x.requires_grad or alpha.requires_grad):
                normalized = cast(Tensor, _ByKernel.apply(x, alpha, self, fast))
            elif not self.training:
                buffers, kernels = self._buffers, cast(kernel.Kernels, kernel.kernels_for(x))
                running = [buffers[name] for name in kernel.BUFFERS]
                normalized = kernels.values(fast, x, alpha, cast(list[Tensor], running), self.beta)
            else:
                normalized = self._by_kernel(x, alpha, fast)[0]
        elif x.numel() and (self.instance_dims is not None or self._looks_at_batch()):
            normalized = self._follow(x)
        else:
            normalized = normalize_output(self.function(x), self.scale, self.shift)
        return input.copy_(normalized) if self.inplace else normalized

    def _by_kernel(self, x: Tensor, alpha: Tensor, fast: kernel.Function) -> tuple[Tensor, kernel.Kept]:
        """The output, and what the backward pass needs of the statistics, which follow."""
        mode, buffers = kernel.FROM_BUFFERS, self._buffers
        statistics = [buffers[name] for name in kernel.BUFFERS]
        if self.training and (tracking := self._is_tracking()) | self.synchronized:
            mode = kernel.FOLLOW if not self.synchronized else kernel.POOL if tracking else kernel.AS_POOLED
        rule = kernel.Rule(self.momentum, *self.bounds, self.max_rejections, self.beta, _SMALLEST_GAIN)
        kernels = cast(kernel.Kernels, kernel.kernels_for(x))
        found = kernels.forward(fast, x, alpha, cast(list[Tensor], statistics), self.pending, rule, mode, self.stride)
        if mode == kernel.FOLLOW:
            torch.autograd.graph.increment_version(cast(list[Tensor], statistics))
        return found

    def _is_tracking(self) -> bool:
        """Whether this forward pass updates statistics."""
        outside = torch.compiler.is_compiling() or not torch.is_inference_mode_enabled()
        return self.training and outside and not is_recomputing()

    def _looks_at_batch(self) -> bool:
        """Whether this forward pass needs the batch's statistics."""
        return self._is_tracking() or (self.training and self.synchronized)

    def _follow(self, x: Tensor) -> Tensor:
        """Update the statistics with ``x``, and normalize its activation."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if torch.compiler.is_compiling() and x.dtype == wide:
            y, derivative = value_and_slope(self.function, x)
        else:
            y, derivative = self.function(x), None
        with torch.no_grad(), torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            every = slice(None, None, self.stride) if x.dim() else ()
            sample, values = x.detach()[every].to(wide), y.detach()[every].to(wide)
            if derivative is None:
                own = next(self.function.parameters(), x) if isinstance(self.function, nn.Module) else sample
                derivative = slope(self.function, sample.to(own.dtype)).to(wide)
            else:
                derivative = derivative[every]
            found = moments(sample, values, derivative, self._dims(x))
            mean, rho, rho_prime = self._use(found, sample.numel())
        return normalize_output(y, self._scale(rho, rho_prime), mean)

    def _use(self, found: Moments, count: int) -> tuple[Tensor, ...]:
        """Update the statistics with the moments of ``count`` elements; return μ, ρ and ρ′ for the normalization."""
        batch = tuple(value.to(self.running_mean.dtype) for value in _gains(found))
        usable = _usable(*batch)
        if self.instance_dims is not None:
            if self._is_tracking():
                share = usable / usable.sum()
                self._update(*(torch.where(usable, value * share, 0).sum() for value in batch))
            return tuple(torch.where(usable, own, plain) for own, plain in zip(batch, (0.0, 1.0, 1.0), strict=True))
        running = self.running_mean, self.running_rho, self.running_rho_prime
        if not self.synchronized:
            self._update(*batch)
            return running
        assert self.pending is not None
        if self._is_tracking():
            added = sums(count, found, dtype=self.pending.dtype)
            self.pending.add_(torch.where(added.isfinite().all(), added, torch.zeros_like(added)))
        first = usable & (self.num_batches_tracked == 0)
        return tuple(torch.where(first, own, known) for own, known in zip(batch, running, strict=True))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Update the statistics with pre-activations, of any shape, as a forward pass would."""
        if x.numel() and self._looks_at_batch():
            self._follow(x.detach())

    def _dims(self, x: Tensor) -> tuple[int, ...] | None:
        """Return ``instance_dims``; raise if ``x`` doesn't have them."""
        dims = self.instance_dims
        if dims and len({dim % x.dim() for dim in dims if -x.dim() <= dim < x.dim()}) < len(dims):
            raise ValueError(f"instance_dims={dims} are not dimensions of an input of shape {tuple(x.shape)}.")
        return dims

    @torch.no_grad()
    def follow(self, added: Tensor) -> None:
        """Update the running statistics with ``pending``, of this rank or summed over several, and reset it.

        Args:
            added: as ``pending``. Without elements it changes no running statistics.
        """
        self._update(*(value.to(self.running_mean.dtype) for value in _gains(pooled(added))))
        self._reset_pending()

    def _update(self, batch_mean: Tensor, batch_rho: Tensor, batch_rho_prime: Tensor) -> None:
        """Apply Eq. 16-18 to the buffers, without a data-dependent branch (no host sync)."""
        usable = _usable(batch_mean, batch_rho, batch_rho_prime)
        if torch.compiler.is_dynamo_compiling():
            usable = usable & ~recomputing(self.running_mean)
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NormalizedActivation:
        # Half precision would lose small updates of the running statistics: move them to a device, not to float16.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = self._buffers[name]
            if now is not None and buffer is not None and now.is_floating_point() and now.itemsize < 4:
                self._buffers[name] = buffer.to(now.device)
        if self.pending is not None and self.pending.device != self.running_mean.device:
            if self.pending.is_meta:
                self._reset_pending()
            else:
                self.pending = self.pending.to(self.running_mean.device)
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
        options += [f"instance_dims={self.instance_dims}"] if self.instance_dims is not None else []
        options += ["synchronized=True"] if self.synchronized else []
        return ", ".join(function + options + (["inplace=True"] if self.inplace else []))


class _ByKernel(torch.autograd.Function):
    """Forward and backward pass of a normalized activation by the kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, module: NormalizedActivation, fast: kernel.Function) -> Tensor:
        """Update the statistics, and compute the output."""
        output, ctx.kept = module._by_kernel(x, alpha, fast)
        ctx.function, ctx.fast, ctx.beta = module.function, fast, module.beta
        ctx.save_for_backward(x, alpha)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients of input and α; the running statistics are constants."""
        x, alpha = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        dense = is_plain(x) and is_dense(x)  # hooks on saved tensors may have changed that
        if dense and is_plain(gradient) and not torch.is_grad_enabled():
            kernels, gradient = cast(kernel.Kernels, kernel.kernels_for(x)), in_memory_order(gradient, x)
            of_x, of_alpha = kernels.backward(ctx.fast, x, gradient, ctx.kept, ctx.beta, alpha if needed[1] else None)
            return of_x, of_alpha, None, None
        # For a second derivative, and for what the kernel doesn't take: operations that autograd can differentiate.
        again = torch.is_grad_enabled()
        if not again:
            x, alpha = x.detach().requires_grad_(), alpha.detach().requires_grad_()
        scale, shift, curve = torch.as_tensor(list(ctx.kept), dtype=alpha.dtype, device=x.device)
        with torch.enable_grad():
            moved = scale - ctx.beta * curve + ctx.beta * torch.tanh(alpha.squeeze())
            y = normalize_output(ctx.function(x), moved, shift)
        inputs = [tensor for tensor, wanted in zip((x, alpha), needed, strict=True) if wanted]
        found = iter(torch.autograd.grad(y, inputs, gradient, create_graph=again, allow_unused=True))
        return (*(next(found) if wanted else None for wanted in needed), None, None)  # type: ignore[return-value]


def _gains(found: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """μ, ρ and ρ′; ρ is NaN if the variance of x is rounding: of a constant, or of numbers too small to be squared."""
    varies = (found.var_x > 1e-11 * found.mean_x.square()) & (found.var_x > 1e-36)
    return found.mean_y, torch.where(varies, found.var_y / found.var_x, math.nan), found.rho_prime


def _usable(mean: Tensor, rho: Tensor, rho_prime: Tensor) -> Tensor:
    """Whether the gains are usable."""
    return (rho > _SMALLEST_GAIN) & (rho_prime > _SMALLEST_GAIN) & (mean + rho + rho_prime).isfinite()


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
