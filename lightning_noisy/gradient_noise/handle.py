"""Annealed noise on the gradients of a torch optimizer."""

from __future__ import annotations

import math
import operator
import warnings
import weakref
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_noisy._torch_internals import amp_state
from lightning_noisy.gradient_noise.deepspeed import FlatVectors, base_optimizer
from lightning_noisy.gradient_noise.layout import Layout, OwnParameters, ParameterFilter
from lightning_noisy.gradient_noise.norms import total_norm, wide_norm
from lightning_noisy.gradient_noise.plan import Mark, unchanged
from lightning_noisy.gradient_noise.step_hooks import StepHooks, stepping_optimizer
from lightning_noisy.kernels.gaussian import plain
from lightning_noisy.schedules import BaseSchedule, Schedule, check_schedule

__all__ = ["GradientNoiseHandle", "NoisyStep", "ParameterFilter", "add_gradient_noise", "checked_state", "updating"]

_SHARDS = "relative=True needs the norm of the whole gradient, and DeepSpeed and FSDP1 show only a shard of it."


def add_gradient_noise(
    optimizer: Optimizer | Any,
    schedule: Schedule,
    *,
    seed: int = 0,
    stream: int | str = 0,
    model: nn.Module | None = None,
    params: ParameterFilter | None = None,
    relative: bool = False,
) -> GradientNoiseHandle:
    r"""Add Gaussian noise to the gradients that an optimizer uses, at each of its steps.

    :math:`g_t \leftarrow g_t + \mathcal N(0, \sigma_t^2)` with :math:`\sigma_t` = ``schedule(t)``, where t
    counts this optimizer's steps from 0 (Neelakantan et al., "Adding Gradient Noise Improves Learning for Very
    Deep Networks", 2015). The noise is added when the optimizer takes its step: after clipping, after gradient
    accumulation, and after the backward pass in a closure. Element i of a parameter's noise is a function of
    (``seed``, ``stream``, the parameter's name, t, i) and of nothing else: the same on one process and under any
    sharding, where each rank draws only its share; global random states are neither used nor changed. A parameter
    without a gradient gets no noise, and a step without any gradient doesn't count. The noise stays in
    ``parameter.grad``: another step before ``zero_grad`` adds its own to it. A key ``"noise_scale"`` (float, >= 0) in a
    parameter group multiplies its σ.

    Args:
        optimizer: any torch optimizer. Gradients may be of any float or complex dtype, dense, sharded (DTensor),
            or sparse with one sparse dimension: then only the rows that are present get noise. Or a DeepSpeed optimizer
            (``engine.optimizer``), with any stage of ZeRO or none; it needs ``model=engine.module``. DeepSpeed gives
            zeros to a parameter without a gradient, so it gets noise. In a wrapper around another optimizer with the
            same parameters (Lookahead, SAM, accelerate's), the inner one gets the noise.
        schedule: maps t (int) to the standard deviation σ (float, >= 0). One that follows the learning rate
            (:class:`~lightning_noisy.schedules.FollowLR`, ``Langevin``) gets that of each parameter group.
        seed: seed of the noise, an int.
        stream: distinguishes the noise of optimizers that share a seed, such as the optimizer's index; int or str.
        model: provides the parameters' names. Without it they come from the optimizer (``param_names``), or else from
            their position in it. The model's padding rows (``nn.Embedding(padding_idx=...)``) get no noise as long as
            their gradient is zero.
        params: which parameters get noise, ``params(name, parameter) -> bool``; by default all. It is called again
            when the optimizer's parameter groups change.
        relative: make σ a multiple of the root mean square of the gradient's elements (after clipping, over all
            parameters that get noise), so that with equal scales the signal-to-noise ratio is 1 / ``schedule(t)``. It
            costs a host sync per step; a gradient that is not finite gets no noise. Sharding changes the order in which
            squares are summed, so σ may differ in its last digits.

    Returns:
        A handle to read and restore t, and to remove the noise. It is also a context manager.

    Raises:
        TypeError: if an argument is of the wrong type, or the optimizer's class runs no step hooks.
        ValueError: if the optimizer has noise of the same seed and stream already; if ``relative`` is set where only
            shards of the gradient are visible (DeepSpeed; at a step, torch's first FSDP); at a step, if ``schedule`` or
            a ``"noise_scale"`` gives anything but a finite number >= 0.

    >>> weight = nn.Parameter(torch.zeros(100_000))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> weight.grad = torch.zeros_like(weight)
    >>> with add_gradient_noise(optimizer, lambda t: 2.0) as noise:
    ...     optimizer.step()
    >>> noise.step, round(weight.std().item(), 1)
    (1, 2.0)
    """
    return GradientNoiseHandle(
        optimizer, schedule, seed=seed, stream=stream, model=model, params=params, relative=relative
    )


@dataclass(frozen=True)
class NoisyStep:
    """The noise that was added at a step.

    Attributes:
        t: t of the step.
        std: σ; if it follows the learning rate, that of the first parameter group.
        grad_norm: norm of the gradient, over the parameters that get noise, as a 0-dimensional tensor; after clipping
            and before the noise. None if it wasn't measured.
        noise_norm: root of the expected squared norm of the noise, or None.
    """

    t: int
    std: float
    grad_norm: Tensor | None
    noise_norm: float | None


class GradientNoiseHandle:
    """What :func:`add_gradient_noise` returns.

    Attributes:
        seed: the seed.
        stream: distinguishes the noise from others of the same seed.
        step: t, the number of steps with noise that the optimizer has taken.
        last_step: the noise that was added at the last step; None before the first, and after :meth:`load_state_dict`.
        measuring: whether to measure the norms of gradient and noise at the next steps; False at first. With
            ``relative`` they are measured anyway.
        warns_of_none: whether to warn if no parameter is chosen.
    """

    def __init__(
        self,
        optimizer: Any,
        schedule: Schedule,
        *,
        seed: int,
        stream: int | str,
        model: nn.Module | None,
        params: ParameterFilter | None,
        relative: bool,
    ) -> None:
        wrapper, optimizer = optimizer, updating(optimizer)
        check_schedule("schedule", schedule)
        if params is not None and not callable(params):
            raise TypeError(f"params must be callable: params(name, parameter) -> bool, got {params!r}.")
        if not isinstance(relative, bool):
            raise TypeError(f"relative must be True or False, got {relative!r}.")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {model!r} of type {type(model).__name__}.")
        if isinstance(seed, bool) or not isinstance(seed, SupportsIndex):
            raise TypeError(f"seed must be an int, got {seed!r} of type {type(seed).__name__}.")
        if isinstance(stream, bool) or not isinstance(stream, (str, SupportsIndex)):
            raise TypeError(f"stream must be an int or a str, got {stream!r} of type {type(stream).__name__}.")
        self._layout: Layout = OwnParameters(model, params)
        if base_optimizer(wrapper) is not None:
            if relative:
                raise ValueError(_SHARDS)
            if model is None:
                raise ValueError("DeepSpeed's flat vectors have no parameter names: pass model=engine.module.")
            self._layout = FlatVectors(wrapper, model, params)
        self.seed, self.stream, self.step = checked_state({"seed": seed, "stream": stream, "step": 0})
        if any((other.seed, other.stream) == (self.seed, self.stream) for other in _handles(optimizer)):
            raise ValueError(
                f"The optimizer has noise of seed={seed!r} and stream={stream!r} already, and twice the same would"
                " double it. Remove it first, or pass another seed or stream."
            )
        self.last_step: NoisyStep | None = None
        self.measuring = False
        self.warns_of_none = True
        self._schedule = schedule
        self._relative = relative
        # Norms of the gradients of the current step: if measured, and for relative noise.
        self._norm: Tensor | None = None
        self._wide_norm = 0.0
        # State of the current step, or of one that raised: whether there were gradients, and which ones have the noise.
        self._added = False
        self._marks: list[Mark] = []
        self._hooks = StepHooks(
            wrapper, optimizer, begin=self._begin_step, gradients=self._add_noise, end=self._finish_step
        )
        self._loading = optimizer.register_load_state_dict_pre_hook(_keep_noise_scales)
        self._optimizer = weakref.ref(optimizer)
        _ATTACHED[:] = [each for each in _ATTACHED if each[0]() is not None]
        _ATTACHED.append((self._optimizer, weakref.ref(self)))

    def remove(self) -> None:
        """Remove the noise from the optimizer, and release the model; calling it again has no effect."""
        self._hooks.remove()
        self._loading.remove()
        _ATTACHED[:] = [each for each in _ATTACHED if each[1]() is not self]
        self._layout = OwnParameters()
        self._marks.clear()

    def state_dict(self) -> dict[str, Any]:
        """Seed, stream and t: plain numbers and strings."""
        return {"seed": self.seed, "stream": self.stream, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the seed, the stream and the t of :meth:`state_dict`.

        Raises:
            ValueError: if ``state`` is something else; nothing changes then.
        """
        self.seed, self.stream, self.step = checked_state(state)
        self.last_step = None
        self._layout.restart()

    def __enter__(self) -> GradientNoiseHandle:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    def _begin_step(self, optimizer: Optimizer) -> None:
        self._added = False
        self.step += self._layout.begin(optimizer)

    def _finish_step(self, optimizer: Optimizer) -> None:
        self._marks.clear()
        self.step += self._layout.end(optimizer, self._added)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled step runs it uncompiled
    @torch.no_grad()
    def _add_noise(self, optimizer: Optimizer, again: bool) -> None:
        """Add the noise of the current t to all gradients of the optimizer; with ``again``, only if it had none."""
        if not optimizer.param_groups:  # as in Lightning's placeholder for no optimizer
            return
        if again and self._added:
            return
        # A step that raised after the noise was added, and is retried.
        if unchanged(self._marks):
            self._added = True
            return
        scale, is_skipped = amp_state(optimizer)
        if is_skipped:
            return
        handles = _handles(optimizer)
        if handles[0] is self:  # measure for all handles before any adds its noise
            for handle in handles:
                handle._measure(optimizer, scale)
        plan = self._layout.plan(optimizer)
        if self.warns_of_none and self._layout.count and not self._layout.any_chosen:
            self.warns_of_none = False
            warnings.warn(f"params chooses none of the optimizer's {self._layout.count} parameters.", stacklevel=2)
        stds = self._stds(optimizer.param_groups)
        scales = [_noise_scale(group) for group in optimizer.param_groups]
        if self._relative:
            count, norm = plan.noise_norm([float(group_scale > 0) for group_scale in scales]), self._wide_norm
            rms = norm / count if count and math.isfinite(norm) else 0.0
            stds = [self._checked(std * rms) for std in stds]
        std = stds[0]
        stds = [std * group_scale for std, group_scale in zip(stds, scales, strict=True)]
        noise_norm = None if self._norm is None else plan.noise_norm(stds)
        added = plan.add_noise([std * scale for std in stds], (self.seed, self.stream), self.step)
        # The same on all ranks, some of which may have empty shards.
        self._added = added or (self._layout.any_chosen and not self._layout.has_whole_gradients)
        if self._added and not self._layout.under_way:  # only at the first of DeepSpeed's calls
            self.last_step = NoisyStep(self.step, std, self._norm, noise_norm)
        if handles[-1] is self:
            for handle in handles:
                handle._marks = handle._layout.marks(optimizer)

    def _measure(self, optimizer: Optimizer, scale: float) -> None:
        """Measure the norm of the gradients, which are multiplied by ``scale``, if requested."""
        gradients = self.gradients(optimizer) if self.measuring or self._relative else []
        if self._relative and not self._layout.has_whole_gradients:
            raise ValueError(_SHARDS)
        self._wide_norm = wide_norm(gradients) / scale if self._relative else 0.0
        self._norm = total_norm(gradients) / scale if gradients else None

    def _stds(self, groups: list[dict[str, Any]]) -> list[float]:
        """σ of the current step for each parameter group, without its ``"noise_scale"``."""
        schedule = self._schedule
        if not (isinstance(schedule, BaseSchedule) and schedule.follows_lr):
            return [self._checked(schedule(self.step))] * len(groups)
        if not all("lr" in group for group in groups):
            raise ValueError(f"{schedule} follows the learning rate, and a parameter group has none (key 'lr').")
        lrs = [float(group["lr"]) for group in groups]
        by_lr = {lr: self._checked(schedule.with_lr(lr)(self.step)) for lr in set(lrs)}
        return [by_lr[lr] for lr in lrs]

    def _checked(self, std: float) -> float:
        std = float(std)
        if not 0 <= std <= torch.finfo(torch.float32).max:
            raise ValueError(
                f"The standard deviation must be >= 0 and a finite float32, got {std!r} at step {self.step}."
            )
        return std

    def gradients(self, optimizer: Optimizer) -> list[Tensor]:
        """The current gradients that get noise at the optimizer's step; empty if they are flat shards."""
        return self._layout.gradients(optimizer, [_noise_scale(group) for group in optimizer.param_groups])

    def parameters(self) -> list[Any]:
        """The parameters that get noise, as far as they are known."""
        optimizer = self._optimizer()
        return [] if optimizer is None else self._layout.parameters(optimizer)


def updating(optimizer: Any) -> Optimizer:
    """The torch optimizer that updates the parameters, maybe inside a wrapper; raises a TypeError if there is none."""
    inner = base_optimizer(optimizer)
    return stepping_optimizer(optimizer) if inner is None else inner


def _noise_scale(group: dict[str, Any]) -> float:
    """What a parameter group's σ is multiplied by."""
    scale = float(group.get("noise_scale", 1.0))
    if not 0 <= scale < math.inf:
        raise ValueError(f"noise_scale of a parameter group must be finite and >= 0, got {scale!r}.")
    return scale


# Optimizers and their handles, in the order in which they were added. (An optimizer's hooks keep handles alive.)
_ATTACHED: list[tuple[weakref.ref[Optimizer], weakref.ref[GradientNoiseHandle]]] = []


def _handles(optimizer: Optimizer) -> list[GradientNoiseHandle]:
    return [handle for of, each in _ATTACHED if of() is optimizer and (handle := each()) is not None]


def checked_state(state: Any) -> tuple[int, int | str, int]:
    """Seed, stream and t of a state."""
    try:
        seed, stream, step = state["seed"], state["stream"], state["step"]
        stream = plain(stream)
        if (step := operator.index(step)) >= 0:
            return operator.index(seed), stream, step
    except (KeyError, TypeError, IndexError):
        pass
    raise ValueError(
        f'Gradient noise has a state of {{"seed": int, "stream": int or str, "step": int >= 0}}, got {state!r}.'
    )


def _keep_noise_scales(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Keep the ``"noise_scale"`` of parameter groups when loading a state dict that has none."""
    groups = list(state["param_groups"])
    for i, (present, saved) in enumerate(zip(optimizer.param_groups, groups, strict=False)):  # torch checks lengths
        if "noise_scale" in present:
            groups[i] = {"noise_scale": present["noise_scale"], **saved}
    return {**state, "param_groups": groups}
