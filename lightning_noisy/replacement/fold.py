"""Fold the normalization of a trained model's activations into the layers that follow."""

from __future__ import annotations

import copy
import warnings
import weakref
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_noisy._torch_internals import HOOKS, tree_leaves
from lightning_noisy.nn import registry
from lightning_noisy.nn.normalized import NormalizedActivation
from lightning_noisy.replacement.dataflow import call
from lightning_noisy.replacement.origin import Origin

__all__ = ["fold_normalization"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What moves numbers about without changing them.
_MOVES = {
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, F.dropout,
    torch.dropout, Tensor.flatten, Tensor.reshape, Tensor.permute, Tensor.transpose, Tensor.view, Tensor.contiguous,
    Tensor.squeeze, Tensor.unsqueeze, Tensor.t, Tensor.expand, Tensor.to, Tensor.float, Tensor.clone,
    Tensor.__getitem__,
}  # fmt: skip
_CALLS = {F.linear, F.conv1d, F.conv2d, F.conv3d}


@torch.no_grad()
def fold_normalization(model: nn.Module, example_inputs: Any) -> nn.Module:
    r"""Make the normalized activations of a trained model plain again, in place, with the same output in evaluation.

    In evaluation, s and μ of :math:`\hat\delta(x) = s (\delta(x) - \mu)` are constant, and a following linear layer or
    convolution W, b can absorb them: :math:`W' = s W`, :math:`b' = b - s \mu W 1`. A layer without a bias gets one. One
    forward pass with the example inputs shows what follows; dropout, reshaping and transposing may come in between. An
    activation stays normalized if folding would not be exact: it or the layer is used several times or elsewhere (a
    branch, the model's output), the layer pads with zeros, or the weight is shared. The result is for inference: folded
    activations can't be restored by :func:`~lightning_noisy.restore_activations`, and the same replacement skips them.

    Args:
        model: the model; its training flags are kept.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments of its forward.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if the output for the example inputs is not finite.
        RuntimeError: if the output would change. After any error the model is as before.

    Warns:
        UserWarning: names the activations that stay normalized, with the reasons.

    >>> from lightning_noisy import replace_activations
    >>> model = replace_activations(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), "nrelu")
    >>> _ = model(torch.randn(100, 4))
    >>> fold_normalization(model, torch.randn(1, 4))
    Sequential(
      (0): Linear(in_features=4, out_features=8, bias=True)
      (1): ReLU()
      (2): Linear(in_features=8, out_features=2, bias=True)
    )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r}.")
    training = {module: module.training for module in model.modules()}
    model.eval()
    undo: list[tuple[nn.Module, str, Any]] = []
    try:
        uses = _Uses(model)
        before = uses.watch(model, example_inputs)
        if not all(bool(leaf.isfinite().all()) for leaf in tree_leaves(before) if isinstance(leaf, Tensor)):
            raise ValueError("With these example inputs the output is not finite. Pass others.")
        plans = {name: uses.plan(name) for name in uses.sites}
        for name, layers in plans.items():
            if not isinstance(layers, str):
                _fold(model, name, layers, training, undo)
        if not _close(before, call(model, example_inputs)):
            raise RuntimeError("Folding would change the output: a forward pass doesn't show all that the model does.")
    except BaseException:
        for module, attribute, value in reversed(undo):
            if isinstance(module, _LAYERS):
                module._parameters[attribute] = value
            else:
                setattr(module, attribute, value)
        raise
    finally:
        for each, flag in training.items():
            each.training = flag
    stay = [f"{name or '(root)'} ({reason})" for name, reason in plans.items() if isinstance(reason, str)]
    if stay:
        message = f"These activations stay normalized: {', '.join(stay)}."
        warnings.warn(message, UserWarning, stacklevel=3)  # skips the frame of no_grad
    return model


def _close(before: Any, after: Any) -> bool:
    pairs = zip(tree_leaves(before), tree_leaves(after), strict=True)
    for a, b in pairs:
        if isinstance(a, Tensor) and a.is_floating_point() and a.numel():
            off = float((a.double() - b.double()).abs().amax() / a.double().abs().amax().clamp_min(1e-30))
            if not off <= max(1e-3, 20 * torch.finfo(a.dtype).eps):
                return False
    return True


class _Uses(TorchFunctionMode):
    """Observes how the outputs of a model's normalized activations are used."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sites = {n: m for n, m in model.named_modules() if isinstance(m, NormalizedActivation)}
        self._layers: dict[str, list[nn.Module]] = {name: [] for name in self.sites}
        self._reasons: dict[str, str] = {}
        self._calls: dict[nn.Module, int] = {}
        self._origin: dict[int, str] = {}
        self._alive: list[Tensor] = []
        self._stack: list[nn.Module] = []
        self._owners: dict[nn.Parameter, int] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self._owners[parameter] = self._owners.get(parameter, 0) + 1
        registrations = [m for _, m in model.named_modules(remove_duplicate=False)]
        for name, site in self.sites.items():
            if registrations.count(site) > 1:
                self._reasons[name] = "it is registered several times"

    def watch(self, model: nn.Module, inputs: Any) -> Any:
        """Run the model once, and return its output."""
        with ExitStack() as stack:
            for name, site in self.sites.items():
                handle = site.register_forward_hook(lambda _, __, output, name=name: self._follow(output, name))
                stack.callback(handle.remove)
            for layer in (m for m in model.modules() if isinstance(m, _LAYERS)):
                stack.callback(layer.register_forward_pre_hook(self._enter).remove)
                stack.callback(layer.register_forward_hook(self._leave).remove)
            with self:
                output = call(model, inputs)
        for leaf in tree_leaves(output):
            if (name := self._origin.get(id(leaf))) is not None:
                self._reasons.setdefault(name, "it is an output of the model")
        of = [(weakref.ref(tensor), self._origin.get(id(tensor))) for tensor in self._alive]
        self._alive.clear()
        for reference, name in of:
            if name is not None and reference() is not None:
                self._reasons.setdefault(name, "its output is stored")
        return output

    def _follow(self, output: Tensor, name: str) -> None:
        site = self.sites[name]
        self._calls[site] = self._calls.get(site, 0) + 1
        self._origin[id(output)] = name
        self._alive.append(output)  # so that its id is not reused

    def _enter(self, layer: nn.Module, _: Any) -> None:
        self._calls[layer] = self._calls.get(layer, 0) + 1
        self._stack.append(layer)

    def _leave(self, *_: Any) -> None:
        self._stack.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        names = {n for leaf in tree_leaves((args, kwargs)) if (n := self._origin.get(id(leaf))) is not None}
        for name in names:
            if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
                continue  # a shape, a dtype
            if func in _MOVES and isinstance(result, Tensor):
                self._origin[id(result)] = name
                self._alive.append(result)
            elif func in _CALLS and self._stack and self._origin.get(id(args[0])) == name:
                self._layers[name].append(self._stack[-1])
            else:
                self._reasons.setdefault(name, f"its output goes into {getattr(func, '__name__', func)}")
        return result

    def plan(self, name: str) -> list[nn.Module] | str:
        """The layers that absorb the site's scale and shift, or the reason why none can."""
        site, layers = self.sites[name], self._layers[name]
        if any(getattr(site, name) for name in HOOKS):
            return "it has hooks"
        if site.instance_dims is not None:
            return "each instance has its own statistics"
        if self._calls.get(site, 0) > 1:
            return "it is called several times"
        if name in self._reasons:
            return self._reasons[name]
        if name == "" or not layers:
            return "no linear layer or convolution follows"
        if _plain(site) is None:
            return f"{site.function!r} is not a module"
        for layer in layers:
            weight = layer._parameters.get("weight")
            if type(layer) not in _LAYERS or weight is None:
                return f"{type(layer).__name__} is not a plain layer"
            if self._calls[layer] > 1 or self._owners[weight] > 1:
                return "the next layer's weight is used elsewhere, too"
            if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and (
                isinstance(layer.padding, str) or any(layer.padding)
            ):
                return "the next convolution pads with zeros"
        return layers


def _plain(site: NormalizedActivation) -> nn.Module | None:
    """The plain activation as a module."""
    if isinstance(site.function, nn.Module):
        module = copy.copy(site.function)
    else:
        name = registry.function_name(site)
        if name not in registry.PLAIN or getattr(F, name, None) is not site.function:
            return None
        module = registry.PLAIN[name]()
    if site.inplace:
        if not hasattr(module, "inplace"):
            return None
        module.inplace = True  # type: ignore[assignment]
    return module


def _fold(
    model: nn.Module,
    name: str,
    layers: list[nn.Module],
    training: dict[nn.Module, bool],
    undo: list[tuple[nn.Module, str, Any]],
) -> None:
    """Fold one site into its layers; append to ``undo`` the value that each change replaces, before it."""
    owner_name, _, attribute = name.rpartition(".")
    owner, site = model.get_submodule(owner_name), model.get_submodule(name)
    assert isinstance(site, NormalizedActivation)
    scale, shift = site.scale.double(), site.shift.double()
    for layer in layers:
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        assert weight is not None
        wide = weight.double() * scale
        moved = -shift * wide.flatten(1).sum(1) + (0 if bias is None else bias.double())
        for key, value, like in (("weight", wide, weight), ("bias", moved, weight if bias is None else bias)):
            undo.append((layer, key, layer._parameters[key]))
            setattr(layer, key, nn.Parameter(value.to(like.dtype), requires_grad=like.requires_grad))
    plain = _plain(site)
    assert plain is not None
    training[plain] = training[site]
    if (origin := Origin.of(site)) is not None:  # the same replacement skips it; restoring it raises
        replace(origin, folded=True).leave(plain)
    undo.append((owner, attribute, site))
    setattr(owner, attribute, plain)
