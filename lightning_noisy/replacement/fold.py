"""Fold the normalization of a trained model's activations into the layers that follow."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_noisy._torch_internals import HOOKS, tree_leaves
from lightning_noisy.nn import registry
from lightning_noisy.nn.normalized import NormalizedActivation
from lightning_noisy.replacement.dataflow import Observed, Probe, has_lost_hooks, observe, private_copy
from lightning_noisy.replacement.graph import MOVES, Node
from lightning_noisy.replacement.origin import Origin

__all__ = ["fold_normalization"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def fold_normalization(model: nn.Module, example_inputs: Any) -> nn.Module:
    r"""Make the normalized activations of a trained model plain again, in place, with the same output in evaluation.

    In evaluation, s and μ of :math:`\hat\delta(x) = s (\delta(x) - \mu)` are constant, and a following linear layer or
    convolution W, b can absorb them: :math:`W' = s W`, :math:`b' = b - s \mu W 1`. A layer without a bias gets one. One
    forward pass of a copy with the example inputs shows what follows; dropout, reshaping and transposing may come in
    between. An activation stays normalized if folding would not be exact: it or the layer is used several times or
    elsewhere (a branch, the model's output), the layer pads with zeros, or the weight is shared. The result is for
    inference: folded activations can't be restored by :func:`~lightning_noisy.restore_activations`, and the same
    replacement skips them.

    Args:
        model: the model; its training flags are kept.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments of its forward.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if the output for the example inputs is not finite.
        RuntimeError: if the output would change, or a copy can't run without the model's hooks. After any error the
            model is as before.

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
    observed, probes = _observe(model, example_inputs)
    if not all(bool(leaf.isfinite().all()) for leaf in tree_leaves(observed.output) if isinstance(leaf, Tensor)):
        raise ValueError("With these example inputs the output is not finite. Pass others.")
    plans = {name: _plan(model, name, observed, probe) for name, probe in probes.items()}
    undo: list[tuple[nn.Module, str, Any]] = []
    try:
        for name, layers in plans.items():
            if not isinstance(layers, str):
                _fold(model, name, layers, undo)
        if not _close(observed.output, observe(private_copy(model).eval(), example_inputs, [], {}).output):
            raise RuntimeError("Folding would change the output: a forward pass doesn't show all that the model does.")
    except BaseException:
        for module, attribute, value in reversed(undo):
            if isinstance(module, _LAYERS):
                module._parameters[attribute] = value
            else:
                setattr(module, attribute, value)
        raise
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


def _observe(model: nn.Module, inputs: Any) -> tuple[Observed, dict[str, Probe]]:
    """See what a copy of the model does in evaluation, with probes of its normalized activations."""
    twin = private_copy(model).eval()
    names = {module: name for name, module in twin.named_modules()}
    probes = {name: Probe(module, name) for module, name in names.items() if isinstance(module, NormalizedActivation)}
    for module in names:
        for key, child in module._modules.items():
            if isinstance(child, NormalizedActivation):
                module._modules[key] = probes[names[child]]
    if "" in probes:
        twin = probes[""]
    try:
        return observe(twin, inputs, list(probes.values()), names), probes
    except Exception as error:
        if has_lost_hooks(model, twin):
            raise RuntimeError(
                f"{type(model).__name__} can't be folded: a copy of it is run, without hooks that are no methods of its"
                " modules, and needs these."
            ) from error
        raise


def _plan(model: nn.Module, name: str, observed: Observed, probe: Probe) -> list[nn.Module] | str:
    """The layers that absorb a site's scale and shift, or the reason why none can."""
    site = model.get_submodule(name)
    assert isinstance(site, NormalizedActivation)
    if "_blending" in site.__dict__:
        return "it is blended with the earlier one: fold it at b = 1"
    if any(getattr(site, name) for name in HOOKS):
        return "it has hooks"
    if site.instance_dims is not None:
        return "each instance has its own statistics"
    if [each for _, each in model.named_modules(remove_duplicate=False)].count(site) > 1:
        return "it is registered several times"
    if len(probe.passes) > 1:
        return "it is called several times"
    if not probe.passes:
        return "it is not called with these example inputs: fold the part that has it"
    if name == "":
        return "no linear layer or convolution follows"
    if _plain(site) is None:
        return f"{site.function!r} is not a module"
    start = probe.passes[0].node
    moved = [node for node in start.ahead(_is_move) if node is start or _is_move(node)]
    if any(node in moved for node in observed.nodes_of(observed.output)):
        return "it is an output of the model"
    if any(
        node in moved for node in observed.nodes_of([list(vars(each).values()) for each in observed.model.modules()])
    ):
        return "its output is stored"
    uses = [(node, user) for node in moved for user in node.users if user not in moved]
    for node, user in uses:
        if user.kind != "layer" or user.module is None or user.inputs[0] is not node:
            return f"its output goes into {user.name}"
    layers = [model.get_submodule(observed.names[user.module]) for _, user in uses if user.module is not None]
    reasons = [
        reason for layer, (_, user) in zip(layers, uses, strict=True) if (reason := _reason_against(model, layer, user))
    ]
    return reasons[0] if reasons else layers or "no linear layer or convolution follows"


def _is_move(node: Node) -> bool:
    return node.kind == "move" and node.name in MOVES and len(node.inputs) == 1


def _reason_against(model: nn.Module, layer: nn.Module, call: Node) -> str:
    """Why a layer can't absorb scale and shift of its input; empty if it can."""
    weight = layer._parameters.get("weight")
    if type(layer) not in _LAYERS or weight is None:
        return f"{type(layer).__name__} is not a plain layer"
    owners = sum(each is weight for module in model.modules() for each in module._parameters.values())
    if owners > 1 or any(len(node.users) > 1 for node in call.inputs if node.kind == "parameter"):
        return "the next layer's weight is used elsewhere, too"
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and (isinstance(layer.padding, str) or any(layer.padding)):
        return "the next convolution pads with zeros"
    return "the next layer has hooks" if any(getattr(layer, name) for name in HOOKS) else ""


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
    plain.train(site.training)
    if (origin := Origin.of(site)) is not None:  # the same replacement skips it; restoring it raises
        replace(origin, folded=True).leave(plain)
    undo.append((owner, attribute, site))
    setattr(owner, attribute, plain)
