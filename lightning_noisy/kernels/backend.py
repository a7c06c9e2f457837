"""Which kernels there are for a tensor; what none takes goes to the reference.

On the CPU these are the C functions, on CUDA those in Triton. ``LIGHTNING_NOISY_KERNEL=0`` does without any;
``LIGHTNING_NOISY_KERNEL=triton`` takes Triton's on the CPU, too, for which ``TRITON_INTERPRET=1`` is needed.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_noisy._torch_internals import is_transforming, is_watched

__all__ = ["HALF_TOO", "checked", "choice", "in_memory_order", "is_dense", "is_plain", "triton_kernels"]

HALF_TOO = (torch.float32, torch.bfloat16, torch.float16)  # what Triton's kernels read and write


@cache
def choice() -> str:
    """What LIGHTNING_NOISY_KERNEL says; "auto" by default.

    Raises:
        ValueError: if that is none of "0", "auto" and "triton", or Triton's kernels can't run.
    """
    chosen = os.environ.get("LIGHTNING_NOISY_KERNEL") or "auto"
    if chosen not in ("0", "auto", "triton"):
        raise ValueError(f"LIGHTNING_NOISY_KERNEL must be 0 (no kernels), auto or triton, got {chosen!r}.")
    if chosen == "triton" and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("LIGHTNING_NOISY_KERNEL=triton needs a GPU, or TRITON_INTERPRET=1, which is slow.")
    return chosen


def triton_kernels(name: str, x: Tensor) -> ModuleType | None:
    """The module of that name in ``kernels.triton``, if its functions run where a tensor is."""
    if (x.is_cuda and choice() != "0") or (choice() == "triton" and x.is_cpu):
        return _triton(name)
    return None


def checked(is_right: Callable[[Any, torch.device], bool]) -> Callable[[Any, torch.device], bool]:
    """A cached comparison of kernels with their reference, which is False, with a warning, if they don't run."""

    @cache
    def check(kernels: Any, device: torch.device) -> bool:
        try:
            return is_right(kernels, device)
        except Exception as error:  # of Triton's compiler, which raises many kinds
            warnings.warn(
                f"{getattr(kernels, '__name__', kernels)} doesn't run on {device}, so torch's operations are used:"
                f" {type(error).__name__}: {error} LIGHTNING_NOISY_KERNEL=0 does without the kernels and this warning.",
                stacklevel=2,
            )
            return False

    return check


@cache
def _triton(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"lightning_noisy.kernels.triton.{name}")
    except ImportError:  # Triton isn't there
        return None


def is_plain(x: Tensor) -> bool:
    """Whether a tensor is nothing but numbers in memory, and nobody traces or transforms what is done with it."""
    cls = type(x)
    return (
        not torch.compiler.is_compiling()
        and (cls is Tensor or cls is nn.Parameter)
        and x.layout is torch.strided
        and not x.is_neg()
        and not is_transforming()
        and not is_watched()
        and not torch.jit.is_tracing()
        and _has_memory(x)
    )


def _has_memory(x: Tensor) -> bool:
    """Whether a tensor has memory: not one that stands for a batch of gradients."""
    try:
        x.data_ptr()
    except RuntimeError:
        return False
    return True


def is_dense(x: Tensor) -> bool:
    """Whether a plain tensor has elements, without gaps, samples (dimension 0) one after the other."""
    return x.numel() > 0 and (
        x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    )


def in_memory_order(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the dtype and memory order of another plain tensor of its shape; copied if need be."""
    if like.is_contiguous():
        if x.dtype is like.dtype and x.is_contiguous() and not x.is_neg():
            return x
        return x.to(like.dtype).contiguous().resolve_neg()
    return x.to(like.dtype).contiguous(memory_format=torch.channels_last).resolve_neg()
