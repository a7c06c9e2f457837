"""The names of parameters that key their noise: the same with any wrappers around a model or inside it."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lightning_noisy._torch_internals import strip_wrappers, uncompiled

__all__ = ["parameter_names", "unwrapped"]

_PARALLEL = (DataParallel, DistributedDataParallel)


def unwrapped(model: nn.Module | None) -> nn.Module | None:
    """The model inside its wrappers: torch.compile, data parallelism, DeepSpeed's engine."""
    while True:
        wraps = isinstance(model, _PARALLEL) or type(model).__name__ == "DeepSpeedEngine"
        inner = getattr(model, "module", None) if wraps else uncompiled(model)
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def parameter_names(model: nn.Module | None) -> dict[nn.Parameter, str]:
    """The name of each parameter of an unwrapped model; empty without a model. No two are equal."""
    names: dict[nn.Parameter, str] = {}
    taken: set[str] = set()
    if not isinstance(model, nn.Module):
        return names
    parallel = [name for name, module in model.named_modules() if isinstance(module, _PARALLEL)]
    for name, parameter in model.named_parameters():
        stripped = name
        for prefix in reversed(parallel):  # the inner ones first
            if stripped.startswith(f"{prefix}.module."):
                stripped = prefix + stripped.removeprefix(f"{prefix}.module")
        stripped = strip_wrappers(stripped)
        names[parameter] = stripped if stripped not in taken else f"{stripped}#{len(names)}"
        taken.add(names[parameter])
    return names
