"""Compiling a file of C at its first use, where there is a compiler."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

__all__ = ["CompileError", "compiled"]


class CompileError(Exception):
    """There is no compiler, or what it makes can't be loaded."""


# The values don't depend on the flags: products and sums are rounded one by one, and nothing is reordered. The math
# functions set no errno and floating-point exceptions aren't looked at, which allows vectors. (The first flags undo
# what $CC may say, and would undo the last ones if they came later.)
_PLAIN_MATH = ["-fno-fast-math", "-fno-unsafe-math-optimizations"]
_FLAGS = [*_PLAIN_MATH, "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
_TIMEOUT = 20.0  # seconds
_LIBRARY = ["-shared", "-fPIC", "-pthread"]
_VECTORS = {  # by what torch itself uses on this machine
    "AVX2": ["-mavx2"],
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"],
}


def compiled(source: Path) -> ctypes.CDLL:
    """Compile a file of C and load it.

    It takes about 0.2 s, in a directory of its own that is gone afterwards. The compiler is ``$CC``, or ``cc``; after
    20 s it is killed.

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
            _run(command)
            return _load(library)
    except (OSError, ValueError, subprocess.SubprocessError) as error:  # no compiler, no folder, no such flag, ...
        raise CompileError(f"{error} {getattr(error, 'stderr', None) or ''}".strip()) from error


def _run(command: list[str]) -> None:
    """Run a compiler; with it end the processes that it has started."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            _, stderr = process.communicate(timeout=_TIMEOUT)
        except BaseException:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=stderr)


def _load(library: Path) -> ctypes.CDLL:
    """Load a library, unless its loading makes the process round denormal numbers to zero, as fast math does."""
    flushed = _flushes_denormals()
    loaded = ctypes.CDLL(str(library))
    if not flushed and _flushes_denormals():
        torch.set_flush_denormal(False)
        raise ValueError("what $CC makes rounds denormal numbers to 0 in the whole process. Drop its fast-math flags")
    return loaded


def _flushes_denormals() -> bool:
    return sys.float_info.min / 2 == 0
