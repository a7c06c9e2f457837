"""Annealed noise on the gradients of a torch optimizer."""

from __future__ import annotations

import math
import operator
import warnings
import weakref
from collections.abc import Callable
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_noisy.engine.deepspeed import Fragment, base_optimizer, fragments, parameters, whole_shape
from lightning_noisy.engine.fsdp1 import flat_shards
from lightning_noisy.engine.names import parameter_names, strip_wrappers, unwrapped
from lightning_noisy.engine.noise_plan import Mark, NoisePlan, unchanged
from lightning_noisy.engine.norms import total_norm, wide_norm
from lightning_noisy.engine.step_hooks import StepHooks, stepping_optimizer
from lightning_noisy.functional.gaussian import plain
from lightning_noisy.schedules import HorizonSchedule, Schedule, check_schedule

__all__ = ["GradientNoiseHandle", "ParameterFilter", "add_gradient_noise", "checked_state", "updating"]

ParameterFilter = Callable[[str, nn.Parameter], bool]

_SHARDS = "relative=True needs the norm of the whole gradient, and DeepSpeed and FSDP show a shard of it."


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
    sharding, which draws just its share; global random states are neither used nor changed. A parameter without a
    gradient gets no noise, and a step without any gradient doesn't count. The noise stays in ``parameter.grad``:
    another step before ``zero_grad`` adds its own to it. A parameter group with a key ``"noise_scale"`` (float, >= 0)
    has σ multiplied by it.

    Args:
        optimizer: any torch optimizer. Gradients may be of any float or complex dtype, dense, sharded (DTensor),
            or sparse with one sparse dimension: then the rows that are present get noise. Or one of DeepSpeed's
            optimizers (``engine.optimizer``), with ZeRO of any stage or without; it needs ``model=engine.module``. To
            DeepSpeed a parameter without a gradient has one of zeros, and it gets noise. Of a wrapper around another
            optimizer with the same parameters (Lookahead, SAM, accelerate's) the inner one gets the noise.
        schedule: maps t (int) to the standard deviation σ (float, >= 0). One that follows the learning rate
            (:class:`~lightning_noisy.schedules.FollowLR`, ``Langevin``) gets that of each parameter group.
        seed: seed of the noise, an int.
        stream: tells apart the noises of optimizers that share a seed, such as the optimizer's index; int or str.
        model: where the parameters' names come from. Without it they come from the optimizer (``param_names``), and
            from their position in it if that has none. Its padding rows (``nn.Embedding(padding_idx=...)``) get no
            noise as long as their gradient is zero.
        params: which parameters get noise, ``params(name, parameter) -> bool``; by default all. It is asked anew when
            the optimizer's parameter groups change.
        relative: make σ a multiple of the root mean square of the gradient's elements (after clipping, over all
            parameters that get noise), so that with equal scales the signal-to-noise ratio is 1 / ``schedule(t)``. It
            costs a host sync per step; a gradient that is not finite gets no noise. Shards sum the squares in another
            order than one process does, so that σ may differ in its last digits.

    Returns:
        A handle to read and restore t, and to remove the noise. It is a context manager, too.

    Raises:
        TypeError: if an argument is not of its type, or the optimizer's class runs no hooks at its steps.
        ValueError: if the optimizer has noise of the same seed and stream already; if ``relative`` is asked for where
            only shards of the gradient are seen (DeepSpeed's ZeRO; at a step, torch's first FSDP); at a step, if
            ``schedule`` or a ``"noise_scale"`` gives something that is no finite number >= 0.

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


class GradientNoiseHandle:
    """What :func:`add_gradient_noise` returns.

    Attributes:
        seed: the seed.
        stream: what tells the noise apart from others of the same seed.
        step: t, the steps with noise that the optimizer has taken.
        std: σ of the last step, None before the first; where it follows the learning rate, of the first group.
        measuring: whether to measure the norms of gradient and noise at the coming steps; False at first. With
            ``relative`` they are measured anyway.
        grad_norm: norm of the last measured gradient, over the parameters that get noise, as a 0-dimensional
            tensor; after clipping and before the noise. None before the first.
        noise_norm: root of the expected squared norm of the noise that was added to it, or None.
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
        self._zero = None if base_optimizer(wrapper) is None else wrapper
        check_schedule("schedule", schedule)
        if params is not None and not callable(params):
            raise TypeError(f"params must be callable: params(name, parameter) -> bool, got {params!r}.")
        if not isinstance(relative, bool):
            raise TypeError(f"relative must be True or False, got {relative!r}.")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {model!r} of type {type(model).__name__}.")
        if self._zero is not None and relative:
            raise ValueError(_SHARDS)
        if self._zero is not None and model is None:
            raise ValueError("DeepSpeed's flat vectors have no names of parameters: pass model=engine.module.")
        if isinstance(seed, bool) or not isinstance(seed, SupportsIndex):
            raise TypeError(f"seed must be an int, got {seed!r} of type {type(seed).__name__}.")
        if isinstance(stream, bool) or not isinstance(stream, (str, SupportsIndex)):
            raise TypeError(f"stream must be an int or a str, got {stream!r} of type {type(stream).__name__}.")
        self.seed, self.stream, self.step = checked_state({"seed": seed, "stream": stream, "step": 0})
        if any((other.seed, other.stream) == (self.seed, self.stream) for other in _handles(optimizer)):
            raise ValueError(
                f"The optimizer has noise of seed={seed!r} and stream={stream!r} already, and twice the same would"
                " double it. Remove that first, or pass another seed or stream."
            )
        self.std: float | None = None
        self.measuring = False
        self.warns_of_none = True
        self.grad_norm: Tensor | None = None
        self.noise_norm: float | None = None
        self._schedule = schedule
        self._model = model
        self._params = params
        self._relative = relative
        self._norm = 0.0  # of the gradient, for relative noise
        # By the parameters that the optimizer has, and with them, so that no id is used again.
        self._plans: dict[tuple[tuple[int, ...], ...], tuple[NoisePlan, list[nn.Parameter]]] = {}
        self._sees_all = self._zero is None  # whether gradients are whole, or know their whole
        # DeepSpeed's: the names of the parameters that get noise, how many flat vectors there are, and which of them
        # have had their turn in this step.
        self._names: dict[nn.Parameter, str] | None = None
        self._vectors = 0
        self._done: set[int] = set()
        # Of the step under way, or of one that raised: whether there were gradients, and which ones have the noise.
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
        """Take the noise off the optimizer, and forget the model; again has no effect."""
        self._hooks.remove()
        self._loading.remove()
        _ATTACHED[:] = [each for each in _ATTACHED if each[1]() is not self]
        self._model = self._params = self._names = self._zero = None
        self._plans.clear()
        self._marks.clear()

    def state_dict(self) -> dict[str, Any]:
        """Seed, stream and t: plain numbers and strings."""
        return {"seed": self.seed, "stream": self.stream, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the seed, the stream and the t of :meth:`state_dict`.

        Raises:
            ValueError: if ``state`` is something else; nothing has changed then.
        """
        self.seed, self.stream, self.step = checked_state(state)
        self._done.clear()

    def __enter__(self) -> GradientNoiseHandle:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    def _begin_step(self, optimizer: Optimizer) -> None:
        self._added = False
        if self._zero is not None and not self._done.isdisjoint(_vectors(optimizer)):
            self._end_step()  # one that ended early

    def _finish_step(self, optimizer: Optimizer) -> None:
        self._marks.clear()
        if self._zero is None:
            self.step += self._added
            return
        # DeepSpeed calls the optimizer for one flat vector after the other: all calls together are one step.
        self._done.update(_vectors(optimizer))
        if len(self._done) >= self._vectors:
            self._end_step()

    def _end_step(self) -> None:
        self.step += bool(self._names)
        self._done.clear()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled step runs it as it is
    @torch.no_grad()
    def _add_noise(self, optimizer: Optimizer, again: bool) -> None:
        """Add the noise of the present t to every gradient of the optimizer; again only if there were none before."""
        if not optimizer.param_groups:  # as of what stands for no optimizer in Lightning
            return
        if again and (self._added or self._zero is not None):
            return
        # A step that raised after the noise, and is tried again.
        if unchanged(self._marks):
            self._added = True
            return
        # Set while a gradient scaler leaves the unscaling, and the skipping, to a fused step.
        if (overflow := getattr(optimizer, "found_inf", None)) is not None and overflow.item():
            return
        grad_scale = getattr(optimizer, "grad_scale", None)
        scale = 1.0 if grad_scale is None else grad_scale.item()
        handles = _handles(optimizer)
        if handles[0] is self:  # measure for all before any adds its noise
            for handle in handles:
                handle._measure(optimizer, scale)
        plan = self._current_plan(optimizer)
        stds = self._stds(optimizer.param_groups)
        scales = [_noise_scale(group) for group in optimizer.param_groups]
        if self._relative:
            count = plan.noise_norm([float(group_scale > 0) for group_scale in scales])
            rms = self._norm / count if count and math.isfinite(self._norm) else 0.0
            stds = [self._checked(std * rms) for std in stds]
        std = stds[0]
        stds = [std * group_scale for std, group_scale in zip(stds, scales, strict=True)]
        if self._sees_all and (self.measuring or self._relative):
            self.noise_norm = plan.noise_norm(stds)
        added = plan.add_noise([std * scale for std in stds], (self.seed, self.stream), self.step)
        if self._zero is not None:
            if self._names and not self._done:  # the first group's
                self.std = std
        elif added or not self._sees_all:  # a rank's flat shards may be empty, and ranks are to agree on t
            self._added, self.std = True, std
        if handles[-1] is self and self._zero is None:
            for handle in handles:
                handle._marks = handle._current_plan(optimizer).marks()

    def _measure(self, optimizer: Optimizer, scale: float) -> None:
        """Measure the norm of the gradients, which are multiplied by ``scale``, if it is asked for."""
        gradients = self.gradients(optimizer) if self.measuring or self._relative else []
        if self._relative and not self._sees_all:
            raise ValueError(_SHARDS)
        self._norm = wide_norm(gradients) / scale if self._relative else 0.0
        if gradients:
            self.grad_norm = total_norm(gradients) / scale

    def _stds(self, groups: list[dict[str, Any]]) -> list[float]:
        """σ of the present step for each parameter group, without its ``"noise_scale"``."""
        schedule = self._schedule
        if not (isinstance(schedule, HorizonSchedule) and schedule.follows_lr):
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
        """The gradients that are there now and get noise at the optimizer's step; none if they are flat shards."""
        if self._zero is not None:
            return []
        plan = self._current_plan(optimizer)
        return plan.gradients([_noise_scale(group) for group in optimizer.param_groups]) if self._sees_all else []

    def parameters(self) -> list[Any]:
        """The parameters that get noise, as far as they are known; under DeepSpeed parts of its flat vectors."""
        optimizer = self._optimizer()
        return [] if optimizer is None or self._zero is not None else self._current_plan(optimizer).parameters

    def _current_plan(self, optimizer: Optimizer) -> NoisePlan:
        """The plan for the optimizer's parameters, made anew when its parameter groups have changed."""
        key = tuple(tuple(map(id, group["params"])) for group in optimizer.param_groups)
        if key not in self._plans:
            if self._zero is None:
                self._plans.clear()
            known = [p for group in optimizer.param_groups for p in group["params"]]
            plan = self._make_plan(optimizer)
            if any(map(is_lazy, known)):
                return plan  # it is made anew once they have elements
            self._plans[key] = plan, known
        return self._plans[key][0]

    def _make_plan(self, optimizer: Optimizer) -> NoisePlan:
        model = unwrapped(self._model)
        names = parameter_names(model)
        if self._zero is not None:
            return self._make_flat_plan(optimizer, names)
        chosen, groups = {}, []
        taken = set(names.values())
        seen: set[nn.Parameter] = set()
        for index, group in enumerate(optimizer.param_groups):
            own_names = group.get("param_names") or [None] * len(group["params"])
            for parameter, own_name in zip(group["params"], own_names, strict=True):
                if parameter in seen:
                    continue
                if parameter not in names:
                    name = strip_wrappers(own_name).removeprefix("module.") if own_name else f"#{len(seen)}"
                    names[parameter] = name if name not in taken else f"{name}#{len(seen)}"  # of another module
                    taken.add(names[parameter])
                seen.add(parameter)
                # Lazy ones have no elements yet.
                if not is_lazy(parameter) and (self._params is None or self._params(names[parameter], parameter)):
                    chosen[names[parameter]] = parameter
                    groups.append(index)
        if seen and not chosen and self.warns_of_none:
            warnings.warn(f"params chooses none of the optimizer's {len(seen)} parameters.", stacklevel=2)
        shards = {} if model is None else flat_shards(model)
        self._sees_all = not shards
        return NoisePlan(chosen, groups, shards, _padding(model))

    def _make_flat_plan(self, optimizer: Optimizer, names: dict[nn.Parameter, str]) -> NoisePlan:
        """The plan for the flat vectors that DeepSpeed has given to the optimizer for the present call."""
        vectors = fragments(self._zero)
        self._vectors = len(vectors)
        if self._names is None:
            self._names = self._chosen_names(names)
        chosen: dict[str, Fragment] = {}
        groups, rows, padding = [], _padding(unwrapped(self._model)), {}
        for index, group in enumerate(optimizer.param_groups):
            for parameter, fragment in (item for vector in group["params"] for item in vectors[vector]):
                if parameter in self._names:
                    chosen[self._names[parameter]] = fragment
                    groups.append(index)
                    if parameter in rows:
                        padding[fragment] = rows[parameter]
        return NoisePlan(chosen, groups, {fragment: fragment.start for fragment in chosen.values()}, padding)

    def _chosen_names(self, names: dict[nn.Parameter, str]) -> dict[nn.Parameter, str]:
        """Of all parameters that DeepSpeed trains, on whatever rank, those that get noise."""
        chosen = {}
        trained = parameters(self._zero)
        for parameter in trained:
            if parameter not in names:
                raise ValueError("model has not all of the parameters that DeepSpeed trains: pass engine.module.")
            with whole_shape(parameter):
                if self._params is None or self._params(names[parameter], parameter):
                    chosen[parameter] = names[parameter]
        if trained and not chosen and self.warns_of_none:
            warnings.warn(f"params chooses none of the optimizer's {len(trained)} parameters.", stacklevel=2)
        return chosen


def updating(optimizer: Any) -> Optimizer:
    """The optimizer that updates the parameters, inside of a wrapper or of one of DeepSpeed's; raises a TypeError."""
    inner = base_optimizer(optimizer)
    return stepping_optimizer(optimizer) if inner is None else inner


def _padding(model: nn.Module | None) -> dict[nn.Parameter, tuple[int, int]]:
    """By the weight of an embedding the first element of its padding row, and the row's length."""
    found = {}
    for module in [] if model is None else model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None:
            weight = module._parameters.get("weight")  # a parametrized one is computed, and has none
            if weight is not None:
                found[weight] = module.padding_idx * module.embedding_dim, module.embedding_dim
    return found


def _vectors(optimizer: Optimizer) -> list[int]:
    """The identities of what an optimizer has."""
    return [id(vector) for group in optimizer.param_groups for vector in group["params"]]


def _noise_scale(group: dict[str, Any]) -> float:
    """What a parameter group's σ is multiplied by."""
    scale = float(group.get("noise_scale", 1.0))
    if not 0 <= scale < math.inf:
        raise ValueError(f"noise_scale of a parameter group must be finite and >= 0, got {scale!r}.")
    return scale


# Optimizers and their noises, in the order in which they are added. (An optimizer's hooks keep them alive.)
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
    """Let parameter groups have their ``"noise_scale"`` also after loading a state from before they had one."""
    groups = list(state["param_groups"])
    for i, (present, saved) in enumerate(zip(optimizer.param_groups, groups, strict=False)):  # torch compares lengths
        if "noise_scale" in present:
            groups[i] = {"noise_scale": present["noise_scale"], **saved}
    return {**state, "param_groups": groups}
