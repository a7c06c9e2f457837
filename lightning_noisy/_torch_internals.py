"""All that is used of torch's private interfaces, since no public one tells it: each behind one name.

A test of each fails when torch changes it, and another when one is used elsewhere (tests/test_internals.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

__all__ = [
    "HOOKS",
    "LOAD_HOOKS",
    "WRAPPERS",
    "add_each",
    "amp_state",
    "first_index",
    "has_values",
    "is_recomputing",
    "is_transforming",
    "metadata_of",
    "recomputing",
    "set_metadata",
    "tree_leaves",
    "uncompiled",
    "unscales_in_step",
    "version",
    "versions",
]

# The dictionaries in which a module has the hooks on its calls; a replacement takes over those of what it replaces.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
LOAD_HOOKS = "_load_state_dict_pre_hooks"

# What torch.compile, Fabric, FSDP and activation checkpointing put into the names of parameters.
WRAPPERS = ("_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def is_transforming() -> bool:
    """Whether a transform of ``torch.func`` runs: its tensors have no memory that can be written to.

    >>> torch.vmap(lambda x: x + is_transforming())(torch.zeros(2)), is_transforming()
    (tensor([1., 1.]), False)
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_recomputing() -> bool:
    """Whether a backward pass is under way, so that this forward pass is activation checkpointing's second one.

    False while a compiler traces; :func:`recomputing` is to be asked in what it compiles.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@torch.library.custom_op("lightning_noisy::recomputing", mutates_args=())
def recomputing(like: Tensor) -> Tensor:
    """The same as a 0-dimensional bool tensor, found out when compiled code runs.

    Args:
        like: on its device; that it is an argument keeps compilers from computing the result in advance.
    """
    return torch.tensor(torch._C._current_graph_task_id() != -1, device=like.device)


@recomputing.register_fake
def _(like: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.bool, device=like.device)


def metadata_of(state: Any) -> dict[str, dict[str, Any]] | None:
    """What a state dict says of the module at each path, beside the values; None if it was lost."""
    return getattr(state, "_metadata", None)


def set_metadata(state: Any, metadata: dict[str, dict[str, Any]]) -> None:
    """Let a state dict, an ``OrderedDict``, say this."""
    state._metadata = metadata


def versions(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What a state dict of the model says before anything else is added: the version of each module's state."""
    return {path: {"version": module._version} for path, module in model.named_modules()}


def has_values(tensor: Tensor) -> bool:
    """Whether it is more than shape and dtype, as all tensors are under ``FakeTensorMode``."""
    return not isinstance(tensor, FakeTensor)


def version(tensor: Tensor) -> int:
    """How often it was changed in place; what raises it is public, ``torch.autograd.graph.increment_version``."""
    return tensor._version


def add_each(tensors: list[Tensor], others: list[Tensor]) -> None:
    """Add to each tensor another one in place; one call for all, which of many small ones takes a tenth of the time."""
    torch._foreach_add_(tensors, others)


def first_index(tensor: DTensor) -> tuple[int, ...]:
    """Where in the whole the shard of this rank begins; strided shards (FSDP2 with tensor parallel), too."""
    return tuple(compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1])


def uncompiled(model: Any) -> Any:
    """The module that ``torch.compile`` was given, or ``model`` itself."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def amp_state(optimizer: Optimizer) -> tuple[float, bool]:
    """By what gradients are multiplied at a step, and whether the step is to leave the parameters as they are.

    A gradient scaler leaves the unscaling, and the skipping, to fused optimizers, by attributes that it sets meanwhile.
    """
    scale, overflow = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
    return 1.0 if scale is None else scale.item(), overflow is not None and bool(overflow.item())


def unscales_in_step(optimizer: Optimizer) -> bool:
    """Whether it is one of those, whose gradients are still scaled before the step."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
