"""The gates of a recurrent layer, side by side: one operation for several of them, over all time steps of a call.

What a call needs is made once: the noise of all steps, the factors of normalized gates. The statistics of these follow
after the last step, pooled over the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_noisy._torch_internals import has_hooks, is_recomputing
from lightning_noisy.functional.normalized import normalize_output
from lightning_noisy.kernels import noisy as kernel
from lightning_noisy.kernels.lstm import Gates, Linearized, linearized
from lightning_noisy.nn.noisy import NAH, NAN, NoisyActivation
from lightning_noisy.nn.normalized import NormalizedActivation
from lightning_noisy.nn.registry import PLAIN

__all__ = ["Side", "Watched", "side_by_side"]

_QUICK: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {nn.Sigmoid: torch.sigmoid, nn.Tanh: torch.tanh}


class Side(Gates):
    """Gates side by side, each with ``hidden`` columns.

    Attributes:
        tensors: the parameters.
        is_pure: whether the values follow from the arguments of :meth:`value` alone, and those of all steps at once are
            those of each.
    """

    tensors: tuple[Tensor, ...] = ()
    is_pure = True

    def prepare(self, *tensors: Tensor) -> Any:
        """What :meth:`value` needs, from the parameters or others in their place."""

    def value(self, x: Tensor, rows: slice, prepared: Any) -> Tensor:
        """The values at x, shape (rows, gates * hidden), of those rows of all steps."""
        raise NotImplementedError

    def linearized(self, x: Tensor, tensors: Sequence[Tensor]) -> Linearized:
        """The values at all steps, the slopes, and what makes the gradients of the parameters."""
        return linearized(self, x, tensors)

    def finish(self, x: Tensor) -> None:
        """Follow the pre-activations of all steps; asked for if :attr:`follows`."""

    follows = False


class _Plain(Side):
    """A function without parameters."""

    def __init__(self, module: nn.Module) -> None:
        self._function = _QUICK.get(type(module)) or _not_in_place(module)
        self.is_pure = type(module) in PLAIN.values() and not isinstance(module, nn.RReLU)

    def value(self, x: Tensor, rows: slice, prepared: Any) -> Tensor:
        return self._function(x)


def _not_in_place(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A module as a function that leaves its input, which the backward pass needs."""
    return (lambda x: module(x.clone())) if getattr(module, "inplace", False) else module


class _Noisy(Side):
    """Noisy gates with the same options, but parameters p, scales c and streams of noise of their own."""

    def __init__(
        self, modules: Sequence[NoisyActivation], hidden: int, sizes: Sequence[int], like: Tensor, order: Tensor | None
    ) -> None:
        self._first, self._hidden = modules[0], hidden
        self._wide = torch.promote_types(like.dtype, torch.float32)
        self.tensors = tuple(each.p for each in modules if each.p is not None)
        self._c = torch.cat([each.c.to(like.device).expand(hidden) for each in modules])
        self._noise: Tensor | None = None  # shape (gates, rows, hidden)
        if self._first.training:
            shape = len(modules), len(sizes), sizes[0], hidden
            noise = torch.empty(shape, dtype=self._wide, device=like.device)
            for of_gate, module in zip(noise, modules, strict=True):
                module.draw_into(of_gate)
            if order is not None:
                noise = noise[:, :, order]
            if sizes[-1] == sizes[0]:
                self._noise = noise.flatten(1, 2)
            else:  # a number belongs to a sequence and a time, however long the others are
                self._noise = torch.cat([noise[:, time, :size] for time, size in enumerate(sizes)], 1)
        self._line = (
            self._first.kernel_line() if isinstance(self._first, (NAH, NAN)) and kernel.takes_columns(like) else None
        )

    def prepare(self, *tensors: Tensor) -> Tensor | None:
        return torch.cat([each.to(self._wide).expand(self._hidden) for each in tensors]) if tensors else None

    def value(self, x: Tensor, rows: slice, prepared: Tensor | None) -> Tensor:
        if self._line is not None and prepared is not None:
            noise = None if self._noise is None else self._noise[:, rows]
            if torch.is_grad_enabled():
                return cast(Tensor, _OutputNoise.apply(x, prepared, noise, self._c, self._line))
            return kernel.output_noise(x, noise, prepared, self._c, self._line)
        wide = x.to(self._wide)
        if self._noise is None:
            return self._first.expected(wide, prepared, self._c).to(x.dtype)
        epsilon = self._noise[:, rows].transpose(0, 1).reshape(x.shape)
        if self._first.noise == "half-normal":
            epsilon = epsilon.abs()
        return self._first.noisy(wide, epsilon, prepared, self._c).to(x.dtype)

    def linearized(self, x: Tensor, tensors: Sequence[Tensor]) -> Linearized:
        line, noise = self._line, self._noise
        if line is None:
            return super().linearized(x, tensors)
        p = self.prepare(*(each.detach() for each in tensors))
        assert p is not None
        slope = torch.empty(x.shape, dtype=x.dtype)
        value = kernel.output_noise(x, noise, p, self._c, line, slope=slope)

        def of_tensors(gradient: Tensor) -> Sequence[Tensor | None]:
            sums = kernel.derivative_by_p(x, noise, p, self._c, line, gradient.contiguous()).split(self._hidden)
            return [each.sum_to_size(tensor.shape).to(tensor.dtype) for each, tensor in zip(sums, tensors, strict=True)]

        return value, slope, of_tensors


class _OutputNoise(torch.autograd.Function):
    """One step of NAN or NAH by the kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor, noise: Tensor | None, c: Tensor, line: kernel.Line) -> Tensor:
        slope = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        value = kernel.output_noise(x, noise, p, c, line, slope=slope)
        ctx.save_for_backward(x, p, noise, c, slope)
        ctx.line = line
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, p, noise, c, slope = ctx.saved_tensors
        of_p = None
        if ctx.needs_input_grad[1]:
            of_p = kernel.derivative_by_p(x, noise, p, c, ctx.line, gradient.contiguous())
        return gradient * slope, of_p, None, None, None


class _Normalized(Side):
    """Normalized gates with the same function, but statistics and α of their own."""

    def __init__(self, modules: Sequence[NormalizedActivation], hidden: int) -> None:
        self._modules, self._hidden = modules, hidden
        self._function = modules[0].function
        # A recomputation by activation checkpointing comes after the statistics have followed.
        again = is_recomputing() and modules[0].training
        used = [(again and each.__dict__.get(_USED)) or _statistics(each) for each in modules]
        self._shift = torch.cat([shift.expand(hidden) for shift, *_ in used])
        self._gains = [(rho, rho_prime) for _, rho, rho_prime in used]
        for module, each in zip(modules, used, strict=True):
            if module.training:
                module.__dict__[_USED] = each
        self.is_pure = not isinstance(self._function, nn.Module) or not any(True for _ in self._function.parameters())
        self.tensors = tuple(each.alpha for each in modules)
        self.follows = modules[0].training

    def prepare(self, *tensors: Tensor) -> Tensor:
        scales = [
            each.scale_of(*gains, alpha) for each, gains, alpha in zip(self._modules, self._gains, tensors, strict=True)
        ]
        return torch.cat([each.expand(self._hidden) for each in scales])

    def value(self, x: Tensor, rows: slice, prepared: Tensor) -> Tensor:
        return normalize_output(self._function(x), prepared, self._shift)

    def finish(self, x: Tensor) -> None:
        for module, part in zip(self._modules, x.split(self._hidden, 1), strict=True):
            module.observe(part)


_USED = "_used_by_the_last_call"


def _statistics(module: NormalizedActivation) -> tuple[Tensor, Tensor, Tensor]:
    return module.shift.clone(), module.running_rho.clone(), module.running_rho_prime.clone()


class _Single(Side):
    """A module of which nothing is known, called at each step."""

    is_pure = False

    def __init__(self, module: nn.Module) -> None:
        self._function = _not_in_place(module)

    def value(self, x: Tensor, rows: slice, prepared: Any) -> Tensor:
        return self._function(x)


class _Several(Side):
    """Different gates."""

    def __init__(self, parts: Sequence[Side], hidden: int) -> None:
        self._parts, self._hidden = parts, hidden
        self.tensors = tuple(tensor for each in parts for tensor in each.tensors)
        self.is_pure = all(each.is_pure for each in parts)
        self.follows = any(each.follows for each in parts)

    def prepare(self, *tensors: Tensor) -> list[Any]:
        rest, prepared = list(tensors), []
        for each in self._parts:
            prepared.append(each.prepare(*rest[: len(each.tensors)]))
            del rest[: len(each.tensors)]
        return prepared

    def value(self, x: Tensor, rows: slice, prepared: list[Any]) -> Tensor:
        columns = x.split(self._hidden, 1)
        return torch.cat(
            [part.value(each, rows, own) for part, each, own in zip(self._parts, columns, prepared, strict=True)], 1
        )

    def linearized(self, x: Tensor, tensors: Sequence[Tensor]) -> Linearized:
        rest, found = list(tensors), []
        for part, each in zip(self._parts, x.split(self._hidden, 1), strict=True):
            found.append(part.linearized(each, rest[: len(part.tensors)]))
            del rest[: len(part.tensors)]
        values, slopes, makers = zip(*found, strict=True)

        def of_tensors(gradient: Tensor) -> Sequence[Tensor | None]:
            parts = gradient.split(self._hidden, 1)
            return [tensor for make, each in zip(makers, parts, strict=True) for tensor in make(each)]

        return torch.cat(values, 1), torch.cat(slopes, 1), of_tensors

    def finish(self, x: Tensor) -> None:
        for part, each in zip(self._parts, x.split(self._hidden, 1), strict=True):
            if part.follows:
                part.finish(each)


class Watched(Side):
    """Gates whose pre-activations and values are kept until the call is over."""

    def __init__(self, side: Side) -> None:
        self._side, self.tensors, self.is_pure = side, side.tensors, side.is_pure
        self._seen: list[tuple[Tensor, Tensor]] | None = []

    def prepare(self, *tensors: Tensor) -> Any:
        """Those of the gates."""
        return self._side.prepare(*tensors)

    def linearized(self, x: Tensor, tensors: Sequence[Tensor]) -> Linearized:
        """That of the gates, of which nothing is kept."""
        return self._side.linearized(x, tensors)

    def value(self, x: Tensor, rows: slice, prepared: Any) -> Tensor:
        """Those of the gates, which are kept."""
        y = self._side.value(x, rows, prepared)
        if self._seen is not None:
            self._seen.append((x.detach(), y.detach()))
        return y

    def take(self) -> tuple[Tensor, Tensor]:
        """What was seen; nothing is kept from now on, such as in the backward pass."""
        assert self._seen is not None
        x, y = (torch.cat(each) for each in zip(*self._seen, strict=True))
        self._seen = None
        if self._side.follows:
            self._side.finish(x)
        return x, y


def side_by_side(
    modules: Sequence[nn.Module], hidden: int, sizes: Sequence[int], like: Tensor, order: Tensor | None = None
) -> Side:
    """The gates of some modules, for one call.

    Args:
        modules: of each gate.
        hidden: columns of each.
        sizes: number of sequences that have each step.
        like: has the dtype and the device of the pre-activations.
        order: the numbers of the sequences, if they were sorted.
    """
    if len(modules) > 1 and not _are_alike(modules):
        return _Several([side_by_side([each], hidden, sizes, like, order) for each in modules], hidden)
    first = modules[0]
    if has_hooks(first):
        return _Single(first)
    if isinstance(first, NoisyActivation):
        return _Noisy(cast(Any, modules), hidden, sizes, like, order)
    if isinstance(first, NormalizedActivation):
        return _Normalized(cast(Any, modules), hidden)
    if type(first) in PLAIN.values() and not any(True for _ in first.parameters()):
        return _Plain(first)
    return _Single(first)


def _are_alike(modules: Sequence[nn.Module]) -> bool:
    """Whether the modules differ in nothing but tensors."""
    first = modules[0]
    if any(has_hooks(each) or type(each) is not type(first) or each.training != first.training for each in modules):
        return False
    if isinstance(first, NoisyActivation):
        options = [(each.hard_function, each.noise, getattr(each, "alpha", None)) for each in cast(Any, modules)]
        return all(each == options[0] for each in options)
    if isinstance(first, NormalizedActivation):
        functions = [each.function for each in cast(Any, modules)]
        return all(
            each is functions[0] or (type(each) in _QUICK and type(each) is type(functions[0])) for each in functions
        )
    has_parameters = any(True for _ in first.parameters())
    return type(first) in PLAIN.values() and not has_parameters and len({repr(each) for each in modules}) == 1
