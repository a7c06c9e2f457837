"""Whether activation checkpointing is running a forward pass for the second time."""

from __future__ import annotations

import torch

__all__ = ["is_recomputing"]


def is_recomputing() -> bool:
    """Whether a backward pass is under way, so that this forward pass is activation checkpointing's second one.

    A compiled module's own graph has no second pass: what is recomputed there, the compiler knows about.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
