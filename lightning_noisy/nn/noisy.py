"""Noisy activations of Gulcehre et al., "Noisy Activation Functions" (2016)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_noisy._torch_internals import is_recomputing, is_transforming, metadata_of, recomputing
from lightning_noisy.functional import noisy
from lightning_noisy.functional.noisy import HARD, HardFunction
from lightning_noisy.kernels import noisy as kernel
from lightning_noisy.kernels.backend import in_memory_order, is_dense, is_plain
from lightning_noisy.kernels.gaussian import draw_, gaussian_like, signed

__all__ = ["NAH", "NAN", "NANI", "NANIL", "NANIS", "NoisyActivation"]

Elementwise = Callable[[Tensor], Tensor]
Function = str | HardFunction | tuple[Elementwise, Elementwise]

_NEXT_DRAW = 0x2545F4914F6CDD1D  # odd; distance between the keys of two forward passes
_NEXT_RANK = 0xDA942042E4DD58B5


class NoisyActivation(nn.Module):
    r"""Base class of the noisy activations: a hard-saturating function h, its linearization u, and a stream of noise.

    In training mode, each forward pass draws new noise for each element; evaluation uses the expectation. Each module
    has its own random stream, which differs between ranks (they see different samples) and continues after a resume
    (a ``deepcopy`` repeats its original's noise until ``reset_parameters``). Forward passes neither use nor change the
    global random states; with ``c = 0`` a run is bit for bit the one without noise. Activation checkpointing repeats
    the noise, as long as a checkpointed module is called once per backward pass.

    Computed in float32 (float64 for double precision); the output has the input's dtype.

    Args:
        function: ``"tanh"``, ``"sigmoid"`` or ``"relu"``, for their hard versions; or a pair (h, u) of elementwise
            callables that are equal where h doesn't saturate.
        c: scale of the noise, >= 0. To anneal it: ``module.c.fill_(0.5)``.
        noise: ``"normal"`` or ``"half-normal"``, the distribution of ε or ξ.
        num_parameters: 1, or the number of channels (dimension 1 of the input) for one p per channel.
        inplace: overwrite the input with the result, as an in-place activation does. Costs a copy of the input.
        device: device of the parameter and the buffers.
        dtype: dtype of the parameter.

    Attributes:
        p: the learned p, parameter of shape (num_parameters,), initially uniform in [-1, 1]; or None.
        c: scale of the noise, 0-dimensional float32 buffer; saved in the metadata of a ``state_dict``.
        noise_state: seed of the stream and number of forward passes that used it, int64 buffer of shape (2,).

    Shape:
        Input and output: any shape, equal.

    Raises:
        ValueError: if an option is out of range, or a name is unknown.
        TypeError: if ``function`` is neither a name nor a pair of callables.
    """

    c: Tensor
    noise_state: Tensor
    p: nn.Parameter | None
    learns_scale = True

    def __init__(
        self,
        function: Function = "tanh",
        *,
        c: float = 0.5,
        noise: Literal["normal", "half-normal"] = "normal",
        num_parameters: int = 1,
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hard_function, self.function_name = _hard_function(function)
        if not 0 <= c < float("inf"):
            raise ValueError(f"c must be a finite number >= 0, got {c!r}. Use c=0 to switch the noise off.")
        if noise not in ("normal", "half-normal"):
            raise ValueError(f'noise must be "normal" or "half-normal", got {noise!r}.')
        if num_parameters < 1:
            raise ValueError(f"num_parameters must be >= 1, got {num_parameters!r}.")
        self.noise = noise
        self.inplace = inplace
        self.p = nn.Parameter(torch.empty(num_parameters, device=device, dtype=dtype)) if self.learns_scale else None
        self._first_c = float(c)
        self.register_buffer("c", torch.empty((), dtype=torch.float32, device=device), persistent=False)
        self.register_buffer("noise_state", torch.zeros(2, dtype=torch.long, device=device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw p and the seed of the noise from torch's global generator; reset c to its initial value."""
        self.c.fill_(self._first_c)
        if self.p is not None:
            self.p.uniform_(-1, 1)
        self.noise_state.copy_(torch.stack([torch.randint(2**62, ()), torch.tensor(0)]))

    def forward(self, input: Tensor) -> Tensor:
        """Apply the noisy activation; in evaluation mode, its expectation."""
        x = input.clone() if self.inplace else input
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            output = self._train(x) if self.training else self._expected(x)
        output = output.to(input.dtype)
        return input.copy_(output) if self.inplace else output

    def _train(self, x: Tensor) -> Tensor:
        """The output with noise."""
        return self.noisy(x, self._draw(x, *self._next_key()), self._p(x), self.c)

    def draw_into(self, out: Tensor) -> None:
        """Write a ξ for each element of a contiguous tensor, whose size ε is; the next pass has others."""
        first, second = self._next_key()
        if out.device.type == "cpu" and out.dtype == torch.float32 and not is_transforming():
            draw_(out.view(-1), (int(first), second))
        else:
            out.copy_(gaussian_like(out, first, second))

    def noisy(self, x: Tensor, epsilon: Tensor, p: Tensor | None, c: Tensor) -> Tensor:
        """The output for noise ``epsilon``, with p (None if it isn't learned) and c that are broadcastable to x."""
        raise NotImplementedError

    def expected(self, x: Tensor, p: Tensor | None, c: Tensor) -> Tensor:
        """The expectation of the output; arguments as in :meth:`noisy`."""
        raise NotImplementedError

    def _expected(self, x: Tensor) -> Tensor:
        return self.expected(x, self._p(x), self.c)

    def _p(self, x: Tensor) -> Tensor | None:
        """The parameter p, in the dtype of ``x`` and broadcastable to it."""
        if self.p is None:
            return None
        p = self.p.to(x.dtype)
        if p.numel() == 1:
            return p.squeeze()
        return p if x.dim() < 2 else p.view(-1, *[1] * (x.dim() - 2))

    def _next_key(self) -> tuple[Tensor, int]:
        """The key of this forward pass's noise; in a recomputation by checkpointing, the last one again."""
        if torch.compiler.is_dynamo_compiling():
            self.noise_state[1] += 1 - recomputing(self.noise_state).long()
        elif not is_recomputing():
            self.noise_state[1] += 1
        return self.noise_state[0] + self.noise_state[1] * _NEXT_DRAW, _key_of_rank()

    def _draw(self, x: Tensor, first: Tensor, second: int) -> Tensor:
        """ε or ξ for each element of ``x``."""
        epsilon = gaussian_like(x, first, second).to(x.dtype)
        return epsilon.abs() if self.noise == "half-normal" else epsilon

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoisyActivation:
        c = self.c
        super()._apply(fn, recurse)
        if c.is_meta and not self.c.is_meta:  # a state_dict has it only in its metadata
            self.c = self._initial_c(self.c.device)
        elif self.c.dtype != torch.float32:  # half precision would round an annealed c
            self.c = c.to(self.c.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # In the metadata, like a module's version: weights that were saved without c must load. While a model is
        # traced, its tensors have no values.
        metadata = (metadata_of(destination) or {}).get(prefix[:-1])
        if metadata is not None and type(self.c) is Tensor and not self.c.is_meta:
            metadata["c"] = self.c.item()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *arguments: Any
    ) -> None:
        key = f"{prefix}noise_state"
        if self.p is None and key not in state_dict:  # of a plain activation: the noise begins anew
            state_dict = {**state_dict, key: self.noise_state}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)
        if self.c.is_meta and not self.noise_state.is_meta:  # load_state_dict(assign=True)
            self.c = self._initial_c(self.noise_state.device)
        if "c" in local_metadata and not self.c.is_meta:
            self.c.fill_(local_metadata["c"])

    def _initial_c(self, device: torch.device) -> Tensor:
        return torch.full((), self._first_c, dtype=torch.float32, device=device)

    def extra_repr(self) -> str:
        """Options as keyword arguments."""
        options = [repr(self.function_name), f"c={self.c.item():g}" if self.c.device.type != "meta" else "c=?"]
        options += [f"noise={self.noise!r}"] + (["inplace=True"] if self.inplace else [])
        return ", ".join(options)


class _OutputNoise(NoisyActivation):
    """Noise on the output: NAN and NAH."""

    def __init__(self, function: Function = "tanh", *, alpha: float = 1.15, **options: Any) -> None:
        super().__init__(function, **options)
        if not math.isfinite(alpha):
            raise ValueError(f"alpha must be a finite number, got {alpha!r}.")
        self.alpha = float(alpha)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the noisy activation; in evaluation mode, its expectation."""
        p, buffers, noisy = self._parameters.get("p"), self._buffers, self.training
        taken = kernel.takes(input, p, buffers.get("c"), buffers.get("noise_state"), noisy=noisy)
        line = self.kernel_line() if taken and not self._is_overridden() else None
        if line is None:
            return super().forward(input)
        kernels, key = cast(kernel.Kernels, kernel.kernels_for(input)), None
        if noisy:
            state, again = cast(Tensor, buffers["noise_state"]), is_recomputing()
            key = kernels.next_key(state, advance=not again, distance=_NEXT_DRAW, second=_key_of_rank())
        c = kernels.keep(cast(Tensor, buffers["c"]))
        if torch.is_grad_enabled() and (input.requires_grad or cast(Tensor, p).requires_grad):
            x = input.clone() if self.inplace else input
            output = cast(Tensor, _ByKernel.apply(x, p, self, c, key, line))
        else:
            output = kernels.forward(input, cast(Tensor, p), c, key, line)
        return input.copy_(output) if self.inplace else output

    def kernel_line(self) -> kernel.Line | None:
        """What the kernel needs of the options; None if h doesn't clip a rising line."""
        h = self.hard_function
        if h.slope is None or h.slope <= 0:
            return None
        return _line(h.slope, h.offset, h.bounds, self.alpha, self.noise == "half-normal", self.training)

    def _is_overridden(self) -> bool:
        """Whether a subclass has formulas of its own."""
        cls = type(self)
        return (cls.noisy, cls.expected, cls._draw) != (_OutputNoise.noisy, _OutputNoise.expected, _OutputNoise._draw)

    def noisy(self, x: Tensor, epsilon: Tensor, p: Tensor | None, c: Tensor) -> Tensor:
        """The output for noise ``epsilon``."""
        return noisy.output_noise(x, epsilon, cast(Tensor, p), c, function=self.hard_function, alpha=self.alpha)

    def expected(self, x: Tensor, p: Tensor | None, c: Tensor) -> Tensor:
        """The expectation of the output."""
        half_normal, line = self.noise == "half-normal", self.hard_function
        return noisy.expected_output_noise(
            x, cast(Tensor, p), c, function=line, alpha=self.alpha, half_normal=half_normal
        )

    def extra_repr(self) -> str:
        """Options as keyword arguments."""
        return f"{super().extra_repr()}, alpha={self.alpha:g}"


class _ByKernel(torch.autograd.Function):
    """Forward and backward pass of NAN and NAH by the kernel; the backward pass draws the noise again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor, module: _OutputNoise, *pass_of_kernel: Any) -> Tensor:
        """The output."""
        ctx.module, ctx.pass_of_kernel = module, pass_of_kernel
        ctx.save_for_backward(x, p)
        return cast(kernel.Kernels, kernel.kernels_for(x)).forward(x, p, *pass_of_kernel)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input and p."""
        x, p = ctx.saved_tensors
        module, (c, key, line), needed = ctx.module, ctx.pass_of_kernel, ctx.needs_input_grad[:2]
        dense = is_plain(x) and (x.is_contiguous() or (key is None and is_dense(x)))  # hooks may have changed that
        if dense and is_plain(gradient) and not torch.is_grad_enabled():
            kernels, gradient = cast(kernel.Kernels, kernel.kernels_for(x)), in_memory_order(gradient, x)
            return *kernels.backward(x, p, c, key, line, gradient, of_p=needed[1]), None, None, None, None
        # For a second derivative, and for what the kernel doesn't take: operations that autograd can differentiate.
        again = torch.is_grad_enabled()
        if not again:
            x, p = x.detach().requires_grad_(), p.detach().requires_grad_()
        with torch.enable_grad():
            y = _ByKernel._output(module, x, p, c, key)
        inputs = [tensor for tensor, wanted in zip((x, p), needed, strict=True) if wanted]
        found = iter(torch.autograd.grad(y, inputs, gradient, create_graph=again, allow_unused=True))
        return (*(next(found) if wanted else None for wanted in needed), None, None, None, None)

    @staticmethod
    def _output(module: _OutputNoise, x: Tensor, p: Tensor, c: Any, key: Any) -> Tensor:
        """The output by operations."""
        wide, scale = x.float(), torch.as_tensor(c, device=x.device)
        each = p.squeeze() if p.numel() == 1 or x.dim() < 2 else p.view(-1, *[1] * (x.dim() - 2))
        if key is None:
            return module.expected(wide, each, scale).to(x.dtype)
        first = torch.as_tensor(signed(key[0]) if isinstance(key[0], int) else key[0], device=x.device)
        return module.noisy(wide, module._draw(wide, first, key[1]), each, scale).to(x.dtype)


@lru_cache(1024)
def _line(
    slope: float, offset: float, bounds: tuple[float, float], alpha: float, half: bool, training: bool
) -> kernel.Line:
    if alpha > 1:
        alpha = max(alpha, 1 + 2**-23)  # which is more than 1 in float32, too
    # In evaluation the mean of |ξ|; that of ξ is 0.
    level = 0.0 if training or not half else math.sqrt(2 / math.pi)
    return kernel.Line(slope, offset, *bounds, alpha, level, half and training)


class NAN(_OutputNoise):
    r"""Normal noise on the output where h saturates (Eq. 12).

    :math:`\phi = \alpha h + (1 - \alpha) u + d \sigma \xi` with :math:`\sigma = c (\mathrm{sigmoid}(p (h - u)) -
    1/2)^2` and :math:`d = -\mathrm{sgn}(x) \mathrm{sgn}(1 - \alpha)`.

    Args:
        function: see :class:`NoisyActivation`.
        alpha: α; above 1, the output is shifted away from u, which the noise compensates for. The authors use 1.15
            for tanh, 1.1 to 1.15 for the sigmoid.
        options: options of :class:`NoisyActivation`. The authors anneal ``c`` from 30 to 0.5.

    >>> NAN(c=0.0)(torch.tensor([0.5, 2.0])).detach()  # 1.15 h - 0.15 u
    tensor([0.5000, 0.8500])
    """


class NAH(_OutputNoise):
    """Half-normal noise on the output where h saturates (Eq. 12 with ε = |ξ|). Arguments: see :class:`NAN`."""

    def __init__(self, function: Function = "tanh", *, alpha: float = 1.15, **options: Any) -> None:
        super().__init__(function, alpha=alpha, **{"noise": "half-normal", **options})


class NANI(NoisyActivation):
    r"""Normal noise on the input: :math:`\phi = h(x + \sigma \xi)` with σ = ``c`` (Eq. 14).

    Args:
        function: see :class:`NoisyActivation`.
        c: σ. The authors use 0.05.
        options: options of :class:`NoisyActivation`.
    """

    learns_scale = False

    def __init__(self, function: Function = "tanh", *, c: float = 0.05, **options: Any) -> None:
        super().__init__(function, c=c, **options)
        if self.noise != "normal":
            raise ValueError(f'Noise on the input must be "normal", got {self.noise!r}.')

    def _sigma(self, x: Tensor, p: Tensor | None, c: Tensor) -> Tensor:
        return c.to(x.dtype)

    def noisy(self, x: Tensor, epsilon: Tensor, p: Tensor | None, c: Tensor) -> Tensor:
        """The output for noise ``epsilon``."""
        return noisy.input_noise(x, epsilon, self._sigma(x, p, c), function=self.hard_function)

    def expected(self, x: Tensor, p: Tensor | None, c: Tensor) -> Tensor:
        """The expectation of the output."""
        return noisy.expected_input_noise(x, self._sigma(x, p, c), function=self.hard_function)


class NANIL(NANI):
    r"""Normal noise on the input, with learned σ: :math:`\phi = h(x + \sigma(x) \xi)` (Eq. 14 with Eq. 9).

    Args:
        function: see :class:`NoisyActivation`.
        c: see :class:`NAN`.
        options: options of :class:`NoisyActivation`.
    """

    learns_scale = True

    def __init__(self, function: Function = "tanh", *, c: float = 0.5, **options: Any) -> None:
        super().__init__(function, c=c, **options)

    def _sigma(self, x: Tensor, p: Tensor | None, c: Tensor) -> Tensor:
        delta = self.hard_function.hard(x) - self.hard_function.linear(x)
        return noisy.noise_scale(delta, cast(Tensor, p), c)


class NANIS(NANI):
    r"""Normal noise on the input where h saturates: :math:`\phi = h(x + 1_{|x| \ge |x_t|} \sigma \xi)` (Eq. 15).

    A ReLU saturates where x <= 0; a custom pair (h, u), where h and u differ.

    Args:
        function: see :class:`NoisyActivation`.
        c: σ. The authors use 0.25.
        options: options of :class:`NoisyActivation`.
    """

    def __init__(self, function: Function = "tanh", *, c: float = 0.25, **options: Any) -> None:
        super().__init__(function, c=c, **options)

    def _sigma(self, x: Tensor, p: Tensor | None, c: Tensor) -> Tensor:
        line = self.hard_function.linear(x)
        if self.hard_function.slope is None:
            saturated = self.hard_function.hard(x) != line
        else:
            lower, upper = self.hard_function.bounds
            saturated = (line <= lower) | (line >= upper)
        return torch.where(saturated, c.to(x.dtype), 0.0)


def _key_of_rank() -> int:
    """The second half of the noise's key: ranks see different samples, and draw different noise."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return (rank + 1) * _NEXT_RANK % 2**64


def _hard_function(function: Function) -> tuple[HardFunction, str]:
    """The pair of h and u, and its name."""
    if isinstance(function, HardFunction):
        return function, "custom"
    if isinstance(function, str):
        if function not in HARD:
            raise ValueError(
                f"There is no hard version of {function!r}. Known are: {', '.join(map(repr, HARD))}; for another"
                " function pass a pair (h, u) of callables."
            )
        return HARD[function], function
    if isinstance(function, tuple) and len(function) == 2 and all(map(callable, function)):
        return HardFunction(*function), "custom"
    raise TypeError(f"function must be a name or a pair (h, u) of callables, got {function!r}.")
