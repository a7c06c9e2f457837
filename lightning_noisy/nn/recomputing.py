"""Whether activation checkpointing is running a forward pass for the second time."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_recomputing", "recomputing"]


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
