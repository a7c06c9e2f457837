"""Find the elements of the parameters in DeepSpeed's optimizers.

They give a torch optimizer flat vectors, one or several for each parameter group, of which a rank may hold a partition,
and with ZeRO call its ``step`` for one vector after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_noisy.gradient_noise.gradients import Fragment
from lightning_noisy.gradient_noise.layout import ParameterFilter, padding_rows
from lightning_noisy.gradient_noise.parameter_names import parameter_names, unwrapped
from lightning_noisy.gradient_noise.plan import Mark, NoisePlan

__all__ = ["FlatVectors", "base_optimizer", "fragments"]


class FlatVectors:
    """The layout of DeepSpeed's optimizers, whose calls for all flat vectors together are one step.

    Args:
        optimizer: a DeepSpeed optimizer for which :func:`base_optimizer` has found the inner one.
        model: provides the parameter names.
        params: chooses parameters, or None for all.
    """

    has_whole_gradients = False

    def __init__(self, optimizer: Any, model: nn.Module, params: ParameterFilter | None) -> None:
        self.count = 0
        self.any_chosen = False
        self._optimizer = optimizer
        self._model = unwrapped(model)
        self._params = params
        self._names: dict[nn.Parameter, str] | None = None  # of those that get noise
        # By the ids of a call's vectors, stored with these, so that no id is reused.
        self._plans: dict[tuple[int, ...], tuple[NoisePlan, list[Tensor]]] = {}
        self._vectors = 0  # their number
        self._done: set[int] = set()  # ids of those that this step has updated

    @property
    def under_way(self) -> bool:
        """Whether the current step has updated some vectors."""
        return bool(self._done)

    def plan(self, optimizer: Optimizer) -> NoisePlan:
        """The plan for the vectors of the current call."""
        key = tuple(_vectors(optimizer))
        if key not in self._plans:
            known = [vector for group in optimizer.param_groups for vector in group["params"]]
            self._plans[key] = self._make_plan(optimizer), known
        return self._plans[key][0]

    def parameters(self, optimizer: Optimizer) -> list[Any]:
        """Empty: they are known only during a step."""
        return []

    def gradients(self, optimizer: Optimizer, scales: list[float]) -> list[Tensor]:
        """Empty: they are known only during a step."""
        return []

    def marks(self, optimizer: Optimizer) -> list[Mark]:
        """Empty: DeepSpeed doesn't retry a step."""
        return []

    def begin(self, optimizer: Optimizer) -> bool:
        """A vector that was updated already begins another step."""
        if self._done.isdisjoint(_vectors(optimizer)):
            return False
        self._done.clear()
        return self.any_chosen

    def end(self, optimizer: Optimizer, added: bool) -> bool:
        """The last vector ends the step."""
        self._done.update(_vectors(optimizer))
        if len(self._done) < self._vectors:
            return False
        self._done.clear()
        return self.any_chosen

    def restart(self) -> None:
        """Forget which vectors were updated."""
        self._done.clear()

    def _make_plan(self, optimizer: Optimizer) -> NoisePlan:
        vectors = fragments(self._optimizer)
        self._vectors = len(vectors)
        if self._names is None:
            self._names = self._chosen_names()
        chosen: dict[str, Fragment] = {}
        groups, rows, padding = [], padding_rows(self._model), {}
        for index, group in enumerate(optimizer.param_groups):
            for parameter, fragment in (item for vector in group["params"] for item in vectors[vector]):
                if parameter in self._names:
                    chosen[self._names[parameter]] = fragment
                    groups.append(index)
                    if parameter in rows:
                        padding[fragment] = rows[parameter]
        return NoisePlan(chosen, groups, {fragment: fragment.start for fragment in chosen.values()}, padding)

    def _chosen_names(self) -> dict[nn.Parameter, str]:
        """The parameters that get noise, of all that DeepSpeed trains on any rank."""
        chosen, names = {}, parameter_names(self._model)
        layout = _layout(self._optimizer)
        assert layout is not None
        trained = [parameter for group in getattr(self._optimizer, layout[1]) for parameter in group]
        for parameter in trained:
            if parameter not in names:
                raise ValueError("model has not all of the parameters that DeepSpeed trains: pass engine.module.")
            with _whole_shape(parameter):
                if self._params is None or self._params(names[parameter], parameter):
                    chosen[parameter] = names[parameter]
        self.count, self.any_chosen = len(trained), bool(chosen)
        return chosen


def base_optimizer(optimizer: Any) -> Optimizer | None:
    """The torch optimizer to which a DeepSpeed optimizer gives flat vectors.

    At its step, gradients are summed over micro-batches and ranks, unscaled, clipped, and known to be finite.

    Args:
        optimizer: any optimizer.

    Returns:
        The inner optimizer; None if ``optimizer`` is not DeepSpeed's.

    Raises:
        TypeError: if it is a DeepSpeed optimizer whose elements can't be found, or are also updated elsewhere.
    """
    if isinstance(optimizer, Optimizer) or not type(optimizer).__module__.startswith("deepspeed."):
        return None
    inner = getattr(optimizer, "optimizer", None)
    if _layout(optimizer) is None or not isinstance(inner, Optimizer):
        raise TypeError(
            f"Gradient noise can't find the parameters in DeepSpeed's {type(optimizer).__name__}. Use ZeRO."
        )
    beside = ("zenflow", "backup_optimizer", "superoffload_cpu_optimizer", "fused_adam_legacy", "fused_lamb_legacy")
    if any(getattr(optimizer, name, False) for name in beside):
        raise TypeError(
            "Gradient noise doesn't reach what DeepSpeed updates outside the optimizer. Configure it without ZenFlow,"
            ' SuperOffload and "legacy_fusion", and with an offload_optimizer of "ratio": 1.0.'
        )
    return inner


def fragments(optimizer: Any) -> dict[Tensor, list[tuple[nn.Parameter, Fragment]]]:
    """The flat vectors of this rank, and the fragments of parameters in them.

    Args:
        optimizer: a DeepSpeed optimizer for which :func:`base_optimizer` has found the inner one.

    Returns:
        The fragments by vector, in order. Padding belongs to no parameter.
    """
    layout = _layout(optimizer)
    assert layout is not None
    vectors, groups, of_group = layout
    found = {}
    for vector, group in zip(getattr(optimizer, vectors), getattr(optimizer, groups), strict=True):
        if isinstance(vector, Tensor):
            found[vector] = of_group(vector, group)
        else:  # one for each parameter
            found.update({each: of_group(each, [p]) for each, p in zip(vector, group, strict=True)})
    return found


@contextmanager
def _whole_shape(parameter: Any) -> Iterator[nn.Parameter]:
    """The parameter with its full shape, even if ZeRO 3 has partitioned it; its values are undefined then."""
    shape = getattr(parameter, "ds_shape", None)
    values = parameter.data
    if shape is not None and values.shape != shape:
        parameter.data = values.new_empty(()).expand(shape)
    try:
        yield parameter
    finally:
        parameter.data = values


def _of_partitions(flat: Tensor, group: list[Any]) -> list[tuple[nn.Parameter, Fragment]]:
    """ZeRO 3: each parameter is flattened, padded, and split into equal parts, one per rank."""
    found, offset = [], 0
    for parameter in group:
        size = parameter.partition_numel()
        start = size * torch.distributed.get_rank(parameter.ds_process_group)
        if start < parameter.ds_numel:
            found.append((parameter, Fragment(flat, offset, min(size, parameter.ds_numel - start), start)))
        offset += size
    return found


def _of_mapping(flat: Tensor, group: list[Any]) -> list[tuple[nn.Parameter, Fragment]]:
    """ZeRO 1 and 2: the parameters of a group are flattened into one vector, which is split into equal parts."""
    found = []
    for parameter in group:
        mapping = parameter._hp_mapping  # None if this rank holds nothing of it
        if mapping is not None:
            inside, outside = mapping.hp_fragment_address, mapping.lp_fragment_address
            found.append((parameter, Fragment(flat, inside.start, inside.numel, outside.start)))
    return found


def _in_sequence(flat: Tensor, group: list[Any]) -> list[tuple[nn.Parameter, Fragment]]:
    """Half precision without ZeRO: each rank has all parameters, one after the other."""
    found, offset = [], 0
    for parameter in group:
        found.append((parameter, Fragment(flat, offset, parameter.numel(), 0)))
        offset += parameter.numel()
    return found


def _layout(optimizer: Any) -> tuple[str, str, Callable[..., list[tuple[nn.Parameter, Fragment]]]] | None:
    """The attributes that hold the vectors and their parameters, and the function that locates these."""
    layouts = (
        ("fp32_partitioned_groups_flat", "fp16_groups", _of_partitions),
        ("single_partition_of_fp32_groups", "bit16_groups", _of_mapping),
        ("fp32_groups_flat_partition", "bf16_groups", _of_mapping),
        ("fp32_groups_flat", "fp16_groups", _in_sequence),
        ("fp32_groups", "fp16_groups", _in_sequence),
    )
    return next((layout for layout in layouts if hasattr(optimizer, layout[0])), None)


def _vectors(optimizer: Optimizer) -> list[int]:
    """The ids of an optimizer's vectors."""
    return [id(vector) for group in optimizer.param_groups for vector in group["params"]]
