"""How an optimizer holds the parameters and their gradients: whole, as shards, or in flat vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_noisy._torch_internals import strip_wrappers
from lightning_noisy.gradient_noise.fsdp1 import flat_shards
from lightning_noisy.gradient_noise.parameter_names import parameter_names, unwrapped
from lightning_noisy.gradient_noise.plan import Mark, NoisePlan

__all__ = ["Layout", "OwnParameters", "ParameterFilter", "padding_rows"]

ParameterFilter = Callable[[str, nn.Parameter], bool]


class Layout(Protocol):
    """What gradient noise needs to know of an optimizer.

    Attributes:
        has_whole_gradients: whether gradients are whole or DTensors, so that norms can be measured.
        count: the number of parameters, once there was a plan.
        any_chosen: whether any of them gets noise, on any rank.
        under_way: whether some, but not all, calls of a step have been made.
    """

    has_whole_gradients: bool
    count: int
    any_chosen: bool

    @property
    def under_way(self) -> bool:
        """Whether some, but not all, calls of a step have been made."""
        ...

    def plan(self, optimizer: Optimizer) -> NoisePlan:
        """How the current parameters of an optimizer get their noise."""
        ...

    def parameters(self, optimizer: Optimizer) -> list[Any]:
        """The parameters that get noise, as far as they are known."""
        ...

    def gradients(self, optimizer: Optimizer, scales: list[float]) -> list[Tensor]:
        """The gradients that get noise, of the groups whose scale is not 0; empty if norms can't be measured."""
        ...

    def marks(self, optimizer: Optimizer) -> list[Mark]:
        """Marks that show whether the gradients have the noise already when a step that raised is retried."""
        ...

    def begin(self, optimizer: Optimizer) -> bool:
        """Note that the optimizer's ``step`` begins; return whether a step before it ended early, and counts."""
        ...

    def end(self, optimizer: Optimizer, added: bool) -> bool:
        """Note that it ends, and whether noise was added; return whether a step has been taken."""
        ...

    def restart(self) -> None:
        """Forget the current step."""
        ...


class OwnParameters:
    """The layout of torch's optimizers, whose parameters are those of the model, or shards of them.

    Args:
        model: provides the parameter names, or None.
        params: chooses parameters, or None for all.
    """

    under_way = False  # each call is a step

    def __init__(self, model: nn.Module | None = None, params: ParameterFilter | None = None) -> None:
        self.has_whole_gradients = True
        self.count = 0
        self.any_chosen = False
        self._model = model
        self._params = params
        self._key: tuple[tuple[int, ...], ...] | None = None
        self._plan: NoisePlan | None = None
        self._known: list[nn.Parameter] = []  # kept with the plan, so that no id is reused

    def plan(self, optimizer: Optimizer) -> NoisePlan:
        """The plan; made again when the parameter groups have changed."""
        key = tuple(tuple(map(id, group["params"])) for group in optimizer.param_groups)
        if self._plan is None or key != self._key:
            known = [p for group in optimizer.param_groups for p in group["params"]]
            plan = self._make_plan(optimizer)
            if any(map(is_lazy, known)):
                return plan  # it is made again once they have elements
            self._key, self._plan, self._known = key, plan, known
        return self._plan

    def parameters(self, optimizer: Optimizer) -> list[Any]:
        """Those of the plan."""
        return self.plan(optimizer).parameters

    def gradients(self, optimizer: Optimizer, scales: list[float]) -> list[Tensor]:
        """Those of the plan; empty if they are flat shards."""
        plan = self.plan(optimizer)
        return plan.gradients(scales) if self.has_whole_gradients else []

    def marks(self, optimizer: Optimizer) -> list[Mark]:
        """Those of the plan."""
        return self.plan(optimizer).marks()

    def begin(self, optimizer: Optimizer) -> bool:
        """Each call is a step."""
        return False

    def end(self, optimizer: Optimizer, added: bool) -> bool:
        """Each call is a step, if there was a gradient."""
        return added

    def restart(self) -> None:
        """No step takes several calls."""

    def _make_plan(self, optimizer: Optimizer) -> NoisePlan:
        model = unwrapped(self._model)
        names = parameter_names(model)
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
                    names[parameter] = name if name not in taken else f"{name}#{len(seen)}"  # by another module
                    taken.add(names[parameter])
                seen.add(parameter)
                # Lazy ones have no elements yet.
                if not is_lazy(parameter) and (self._params is None or self._params(names[parameter], parameter)):
                    chosen[names[parameter]] = parameter
                    groups.append(index)
        shards = {} if model is None else flat_shards(model)
        self.has_whole_gradients = not shards
        self.count, self.any_chosen = len(seen), bool(chosen)
        return NoisePlan(chosen, groups, shards, padding_rows(model))


def padding_rows(model: nn.Module | None) -> dict[nn.Parameter, tuple[int, int]]:
    """The index of the first element of the padding row, and the row's length, by the embedding's weight."""
    found = {}
    for module in [] if model is None else model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None:
            weight = module._parameters.get("weight")  # None if it is parametrized
            if weight is not None:
                found[weight] = module.padding_idx * module.embedding_dim, module.embedding_dim
    return found
