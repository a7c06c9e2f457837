"""Records statistics of the activations of a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_noisy._torch_internals import is_recomputing
from lightning_noisy.functional.slopes import largest_slope, side_effect_free, slope
from lightning_noisy.metrics.activation import ActivationStatistics
from lightning_noisy.nn.normalized import NormalizedActivation
from lightning_noisy.replacement.sites import registered_activations

__all__ = ["ActivationRecorder"]


class ActivationRecorder:
    """Updates an :class:`ActivationStatistics` at every call of a model's activation modules.

    Between :meth:`attach` and :meth:`detach` the modules have forward hooks; at other times the model is
    unchanged. Recording changes no values, gradients or running statistics of the model, nor the global random
    state, unless the function of a normalized activation draws numbers. The recomputation by activation checkpointing
    is not recorded. An activation that can't be measured, such as one that needs more than one input, is left out with
    a warning.

    The statistics are those of the whole activation, including the scale and shift of a normalized one. Two of
    them refer to the plain function of a normalized one: an element is saturated if the function's absolute slope is
    below ``saturation_threshold`` times its largest one, and inactive if the function's value is <= 0.

    Args:
        model: any module. An activation module that is registered several times is one site, with its first name.
        saturation_threshold: fraction of the function's largest slope, in (0, 1).

    Attributes:
        statistics: the statistics since the last ``reset()``, of this process only unless synced.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    >>> recorder = ActivationRecorder(model)
    >>> with recorder:
    ...     _ = model(torch.randn(8, 3))
    >>> sorted(recorder.statistics.compute())
    ['anact_score', 'rho/1', 'rho_prime/1', 'saturation/1', 'sparsity/1']
    """

    def __init__(self, model: nn.Module, *, saturation_threshold: float = 0.05) -> None:
        modules: dict[nn.Module, str] = {}
        for name, module in registered_activations(model):
            modules.setdefault(module, name)
        self._modules = {name: module for module, name in modules.items()}
        self._threshold = saturation_threshold
        self._hooks: list[RemovableHandle] = []
        self._failed: set[str] = set()
        self._inputs: dict[str, Tensor] = {}  # copies, during the call, of inputs that are overwritten
        self.statistics = ActivationStatistics(list(self._modules), sync_on_compute=False)

    def attach(self) -> None:
        """Start recording; no effect if already attached."""
        if self._hooks:
            return
        for name, module in self._modules.items():
            if getattr(module, "inplace", False):
                self._hooks.append(module.register_forward_pre_hook(partial(self._save, name), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(partial(self._observe, name), with_kwargs=True))

    def detach(self) -> None:
        """Stop recording and remove the hooks; no effect if not attached."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._inputs.clear()

    def __enter__(self) -> ActivationRecorder:
        self.attach()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.detach()

    def _save(self, name: str, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        self._inputs[name] = _argument(args, kwargs).detach().clone()

    @torch.no_grad()
    def _observe(
        self,
        name: str,
        module: nn.Module,
        args: tuple[Tensor, ...],
        kwargs: dict[str, Tensor],
        output: Tensor,
    ) -> None:
        h = self._inputs.pop(name, None)
        h = _argument(args, kwargs).detach() if h is None else h
        # A backward pass is running: this forward pass is a recomputation by activation checkpointing.
        if is_recomputing() or name in self._failed:
            return
        try:
            self._measure(name, module, h, output)
        except Exception as error:  # a user's module may raise anything; recording must not end the training
            self._failed.add(name)
            warnings.warn(f"The activation {name!r} can't be measured, and is left out: {error}", stacklevel=2)

    def _measure(self, name: str, module: nn.Module, h: Tensor, output: Tensor) -> None:
        """Add one call to the statistics."""
        with torch.autocast(h.device.type, enabled=False):
            function: Callable[[Tensor], Tensor] = module
            scale = torch.ones((), device=h.device)
            inactive = output <= 0
            if isinstance(module, NormalizedActivation):
                function, scale = module.function, module.scale
                with side_effect_free(function, h) as evaluate:
                    inactive = evaluate(h) <= 0
            plain_slope = slope(function, h)
            self.statistics.update(
                name,
                input=h,
                output=output,
                slope=plain_slope * scale,
                inactive=inactive,
                saturation_threshold=self._threshold * largest_slope(function, device=h.device) * scale.abs(),
            )


def _argument(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
    """The input of an elementwise module, positional or keyword."""
    return args[0] if args else next(iter(kwargs.values()))
