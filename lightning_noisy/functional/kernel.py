"""Compiling a file of C at its first use, where there is a compiler."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch

__all__ = ["CompileError", "compiled"]


class CompileError(Exception):
    """There is no compiler, or what it makes can't be loaded."""


# The values don't depend on the flags: products and sums are rounded one by one, and nothing is reordered. The math
# functions set no errno and floating-point exceptions aren't looked at, which allows vectors. (The first flag undoes
# what $CC may say, and would undo those if it came later.)
_FLAGS = ["-fno-fast-math", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
_LIBRARY = ["-shared", "-fPIC", "-pthread"]
_VECTORS = {  # by what torch itself uses on this machine
    "AVX2": ["-mavx2"],
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"],
}


def compiled(source: Path) -> ctypes.CDLL:
    """Compile a file of C and load it.

    It takes about 0.2 s, in a directory of its own that is gone afterwards. The compiler is ``$CC``, or ``cc``.

    Args:
        source: the file.

    Returns:
        The library.

    Raises:
        CompileError: if that fails.
    """
    vectors = _VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])
    try:
        compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            library = Path(folder, source.stem + ".so")
            command = [*compiler, *_FLAGS, *vectors, *_LIBRARY, str(source), "-o", str(library), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=120)
            return ctypes.CDLL(str(library))
    except (OSError, ValueError, subprocess.SubprocessError) as error:  # no compiler, no folder, no such flag, ...
        raise CompileError(f"{error} {getattr(error, 'stderr', None) or ''}".strip()) from error
