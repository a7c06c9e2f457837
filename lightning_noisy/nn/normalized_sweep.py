"""The fast path of normalized activations on the CPU; plain torch operations are its reference."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_noisy.functional.moments import Moments
from lightning_noisy.functional.normalized import normalization_factor
from lightning_noisy.kernels import fused

if TYPE_CHECKING:
    from lightning_noisy.nn.normalized import NormalizedActivation

__all__ = ["NormalizedSweep"]


class NormalizedSweep(torch.autograd.Function):
    """Forward and backward pass of a normalized activation in training on the CPU, with ``kernels.fused``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, module: NormalizedActivation, fast: fused.FusedFunction) -> Tensor:
        """Update the statistics, and compute the output."""
        output = torch.empty_like(x)
        strided = module.stride > 1 and x.dim() > 0
        if looking := module._looks_at_batch():
            if strided:
                found = fused.moments(fast, x, stride=module.stride)
            else:
                found = fused.moments(fast, fused.flat(x), fused.flat(output))
            if module.synchronized:
                on_cpu = Moments(*(torch.tensor(value, dtype=torch.float64) for value in found))
                mean, rho, rho_prime = map(
                    float, module._use(on_cpu, x[:: module.stride].numel() if strided else x.numel())
                )
            else:
                module._update_on_cpu(found)
        if not (looking and module.synchronized):
            running = module.running_mean, module.running_rho, module.running_rho_prime
            mean, rho, rho_prime = map(float, running)
        ctx.module, ctx.fast, ctx.shift = module, fast, mean
        ctx.tanh = math.tanh(float(alpha))
        ctx.scale = normalization_factor(rho, rho_prime) + module.beta * ctx.tanh
        ctx.save_for_backward(x, alpha)
        if looking and not strided:
            fused.rescale_(fused.flat(output), ctx.scale, ctx.shift)
        else:
            fused.normalize(fast, fused.flat(x), fused.flat(output), ctx.scale, ctx.shift)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients of input and α; the running statistics are constants."""
        x, alpha = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative: operations that autograd can differentiate
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
                ctx.fast,
                fused.flat(x),
                fused.flat(gradient),
                fused.flat(result),
                ctx.scale,
                ctx.shift,
                of_scale=ctx.needs_input_grad[1],
            )
        return result, torch.full_like(alpha, total * ctx.module.beta * (1 - ctx.tanh**2)), None, None
