"""Private interfaces of torch that have no public equivalent, each behind one name.

Each has a test that fails when torch changes it; another test finds uses elsewhere (tests/test_internals.py).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # the base of all, and of other libraries' own
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "HOOKS",
    "LOAD_HOOKS",
    "WRAPPERS",
    "BatchNorm",
    "StorageWeakRef",
    "add_each",
    "amp_state",
    "first_index",
    "has_hooks",
    "has_step_hooks",
    "has_values",
    "is_recomputing",
    "is_transforming",
    "is_watched",
    "metadata_of",
    "recomputing",
    "set_metadata",
    "step_pre_hooks",
    "storage_of",
    "strip_wrappers",
    "tree_leaves",
    "tree_map",
    "uncompiled",
    "unscales_in_step",
    "version",
    "versions",
    "without_overrides",
]

# The dictionaries with a module's forward and backward hooks; a replacement takes over those of the original.
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

# Parts that torch.compile, Fabric, FSDP and activation checkpointing add to the names of parameters.
WRAPPERS = ("_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

_WRAPPED = re.compile(rf"(?:^|\.)(?:{'|'.join(WRAPPERS)})(?=[.:]|$)")  # a colon begins the name of a call site


def strip_wrappers(name: str) -> str:
    """The name of a parameter or module without the parts that module wrappers add."""
    return _WRAPPED.sub("", name).removeprefix(".")


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks on its calls."""
    return any(getattr(module, name) for name in HOOKS)


def is_transforming() -> bool:
    """Whether a transform of ``torch.func`` is active, whose tensors have no memory, or forward-mode differentiation.

    >>> torch.vmap(lambda x: x + is_transforming())(torch.zeros(2)), is_transforming()
    (tensor([1., 1.]), False)
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_watched() -> bool:
    """Whether a dispatch mode sees operations: fake tensors, a tracer such as ``make_fx``, a counter of operations.

    >>> from torch.utils.flop_counter import FlopCounterMode
    >>> with FlopCounterMode(display=False):
    ...     is_watched()
    True
    """
    return torch._C._len_torch_dispatch_stack() > 0


def is_recomputing() -> bool:
    """Whether a backward pass is running, so that this forward pass is a recomputation by activation checkpointing.

    False while a compiler traces; compiled code uses :func:`recomputing`.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def without_overrides() -> Any:
    """A context in which no ``TorchFunctionMode`` sees the calls, each of which would take longer."""
    return torch._C.DisableTorchFunction()


def storage_of(tensor: Tensor) -> StorageWeakRef | None:
    """A weak reference to a tensor's storage, equal to others of the same one; None if it has none.

    While it exists, no other storage is equal, even after the tensor is gone.
    """
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):  # of wrappers
        return None


@torch.library.custom_op("lightning_noisy::recomputing", mutates_args=())
def recomputing(like: Tensor) -> Tensor:
    """The same as a 0-dimensional bool tensor, evaluated when compiled code runs.

    Args:
        like: gives the device; as an argument, it keeps compilers from constant-folding the result.
    """
    return torch.tensor(torch._C._current_graph_task_id() != -1, device=like.device)


@recomputing.register_fake
def _(like: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.bool, device=like.device)


def metadata_of(state: Any) -> dict[str, dict[str, Any]] | None:
    """The metadata of a state dict, by module path; None if it was lost."""
    return getattr(state, "_metadata", None)


def set_metadata(state: Any, metadata: dict[str, dict[str, Any]]) -> None:
    """Set the metadata of a state dict, an ``OrderedDict``."""
    state._metadata = metadata


def versions(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The default metadata of the model's state dict: the version of each module."""
    return {path: {"version": module._version} for path, module in model.named_modules()}


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has values, unlike those under ``FakeTensorMode``, with only shape and dtype."""
    return not isinstance(tensor, FakeTensor)


def version(tensor: Tensor) -> int:
    """The number of in-place changes of a tensor; ``torch.autograd.graph.increment_version`` is the public setter."""
    return tensor._version


def add_each(tensors: list[Tensor], others: list[Tensor]) -> None:
    """Add ``others`` to ``tensors`` in place, in one call, which takes a tenth of the time for many small tensors."""
    torch._foreach_add_(tensors, others)


def first_index(tensor: DTensor) -> tuple[int, ...]:
    """The index in the full tensor where this rank's shard starts, also if strided (FSDP2 with tensor parallel)."""
    return tuple(compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1])


def uncompiled(model: Any) -> Any:
    """The module that was passed to ``torch.compile``, or ``model`` itself."""
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def has_step_hooks(optimizer: Any) -> bool:
    """Whether hooks on its steps can be registered: not if a wrapper doesn't call ``Optimizer.__init__``."""
    return all(hasattr(optimizer, f"_optimizer_step_{when}_hooks") for when in ("pre", "post"))


def step_pre_hooks(optimizer: Any) -> list[Any]:
    """The hooks that its ``step`` calls first: a wrapper may share them with the optimizer inside it."""
    return list(optimizer._optimizer_step_pre_hooks.values()) if has_step_hooks(optimizer) else []


def amp_state(optimizer: Optimizer) -> tuple[float, bool]:
    """The factor by which gradients are still scaled in a step, and whether the step is skipped.

    A gradient scaler lets fused optimizers unscale and skip, through attributes that it sets during the step.
    """
    scale, overflow = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
    return 1.0 if scale is None else scale.item(), overflow is not None and bool(overflow.item())


def unscales_in_step(optimizer: Optimizer) -> bool:
    """Whether an optimizer, such as a fused one, unscales gradients in its step."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
