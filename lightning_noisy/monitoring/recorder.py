"""Recording what the activations of a model do."""

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
    """Feeds an :class:`ActivationStatistics` with every call of a model's activation modules.

    Between :meth:`attach` and :meth:`detach` the modules carry forward hooks; at other times nothing of it is
    left on the model. Values and gradients of the model, its running values and the global random state are
    as without it. The second forward pass of activation checkpointing is not recorded. An activation that can't be
    measured, such as one that takes more than its input, is left out with a warning.

    The statistics are those of the activation as it stands, a normalized one with its scale and shift. Two of
    them are judged by the plain function below it: an element is saturated when the function's slope is
    flatter than ``saturation_threshold`` times its largest one, and inactive when the function's value is <= 0.

    Args:
        model: any module. An activation module that is registered several times is one site, by its first name.
        saturation_threshold: share of the function's largest slope, in (0, 1).

    Attributes:
        statistics: what was recorded since its last ``reset()``, of this process alone unless it is synced.

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
        self._inputs: dict[str, Tensor] = {}  # copies for modules that overwrite their input, during the call
        self.statistics = ActivationStatistics(list(self._modules), sync_on_compute=False)

    def attach(self) -> None:
        """Start recording; again has no effect."""
        if self._hooks:
            return
        for name, module in self._modules.items():
            if getattr(module, "inplace", False):
                self._hooks.append(module.register_forward_pre_hook(partial(self._save, name), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(partial(self._observe, name), with_kwargs=True))

    def detach(self) -> None:
        """Stop recording and take the hooks off; again has no effect."""
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
        # Backward is under way: activation checkpointing runs this forward pass for the second time.
        if is_recomputing() or name in self._failed:
            return
        try:
            self._measure(name, module, h, output)
        except Exception as error:  # whatever a user's module may raise: watching must not end a training
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
    """The one input of an elementwise module, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()))
