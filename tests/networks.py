"""Networks to diagnose, healthy and not, and their tags in NumPy: float64, without anything of the package's."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from lightning_noisy.monitoring.diagnosis import Site

History = list[tuple[int, dict[str, float]]]


def _normal_cdf(h: np.ndarray) -> np.ndarray:
    return (1 + torch.erf(torch.from_numpy(h / math.sqrt(2))).numpy()) / 2


def _sigmoid(h: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -h))


SLOPES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {  # φ′ and its largest value
    "relu": (lambda h: (h > 0).astype(float), 1.0),
    "tanh": (lambda h: 1 / np.cosh(np.clip(h, -300, 300)) ** 2, 1.0),
    "sigmoid": (lambda h: _sigmoid(h) * _sigmoid(-h), 0.25),
    "gelu": (lambda h: _normal_cdf(h) + h * np.exp(-h * h / 2) / math.sqrt(2 * math.pi), 1.129),
    "selu": (lambda h: 1.0507009873554805 * np.where(h > 0, 1.0, 1.6732632423543772 * np.exp(np.minimum(h, 0))), 1.758),
}


def tags_of(
    model: nn.Module, batch: tuple[Tensor, Tensor], loss: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, float]:
    """The tags of one forward and backward pass; the model's gradients are those of the pass afterwards."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if type(module).__name__.lower() in SLOPES:

            def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                output.retain_grad()
                seen[name] = [inputs[0].detach(), output]

            handles.append(module.register_forward_hook(keep))
    model.zero_grad()
    loss(model(batch[0]), batch[1]).backward()
    for handle in handles:
        handle.remove()
    tags: dict[str, float] = {}
    for name, (before, after) in seen.items():
        h, y = (each.detach().double().numpy() for each in (before, after))
        slope, largest = SLOPES[type(model.get_submodule(name)).__name__.lower()]
        d = np.abs(slope(h))
        unit = 1 if h.ndim == 4 else h.ndim - 1
        over = tuple(each for each in range(h.ndim) if each != unit)
        var = float(h.var())
        tags |= {
            f"rho/{name}": float((y * y).mean()) / var if var else math.nan,
            f"rho_prime/{name}": float((d * d).mean()),
            f"saturation/{name}": float((d < 0.05 * largest).mean()),
            f"dead_units/{name}": float((d.max(over) == 0).mean()),
            f"dormant_units/{name}": float((np.abs(y).mean(over) <= 0.025 * np.abs(y).mean()).mean()),
            f"mean/{name}": float(y.mean()),
            f"std/{name}": float(y.std()),
            f"input_std/{name}": math.sqrt(var),
        }
        if after.grad is not None:
            tags[f"grad_rms/{name}"] = math.sqrt(float((after.grad.double().numpy() ** 2).mean()))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and parameter.grad is not None:
            tags[f"weight_mean/{name}"] = abs(float(parameter.detach().double().numpy().mean()))
            tags[f"grad_variance/{name}"] = float(parameter.grad.double().numpy().var())
    return tags


def sites_of(model: nn.Module) -> list[Site]:
    """The activation modules in the order of their names, which is that of the calls; an output's is known as such."""
    return [
        Site(name, type(module).__name__.lower(), getattr(module, "role", "hidden"))
        for name, module in model.named_modules()
        if type(module).__name__.lower() in SLOPES
    ]


def trained(
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    every: int = 10,
    lr: float = 1e-3,
    momentum: float | None = None,
) -> History:
    """The tags before each 10th step of Adam, or of SGD where there is a momentum."""
    parameters = list(model.parameters())
    optimizer = (
        torch.optim.Adam(parameters, lr=lr) if momentum is None else torch.optim.SGD(parameters, lr, momentum=momentum)
    )
    history: History = []
    for step, batch in enumerate(batches):
        tags = tags_of(model, batch, loss)
        before = {n: p.detach().double().clone() for n, p in model.named_parameters() if p.dim() > 1}
        optimizer.step()
        for name, parameter in model.named_parameters():
            if name in before and float(before[name].norm()):
                moved = (parameter.detach().double() - before[name]).norm() / before[name].norm()
                tags[f"update_ratio/{name}"] = float(moved)
        if step % every == 0:
            history.append((step, tags))
    return history


def perceptron(
    depth: int,
    activation: Callable[[], nn.Module],
    initialize: Callable[[Tensor], object],
    *,
    width: int = 64,
    norm: Callable[[int], nn.Module] | None = None,
    outputs: int = 10,
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(width, width)
        initialize(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, *([norm(width)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def normal(gain: float) -> Callable[[Tensor], object]:
    """Weights of variance gain / fan_in."""
    return lambda weight: nn.init.normal_(weight, std=math.sqrt(gain / weight.shape[1]))
