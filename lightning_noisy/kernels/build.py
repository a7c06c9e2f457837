"""Compiles a C file on first use, if there is a compiler."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["CompileError", "compiled", "compiled_function"]


class CompileError(Exception):
    """There is no compiler, it fails, or its output can't be loaded."""


# The flags don't change the values: each product and sum is rounded separately, and nothing is reordered. Ignoring
# errno and floating-point exceptions allows vectorization. (The first flags undo fast math from $CC; placed later, they
# would undo the last ones.)
_PLAIN_MATH = ["-fno-fast-math", "-fno-unsafe-math-optimizations"]
_FLAGS = [*_PLAIN_MATH, "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
_TIMEOUT = 20.0  # seconds
_LIBRARY = ["-shared", "-fPIC", "-pthread"]
_VECTORS = {  # by the CPU capability that torch reports
    "AVX2": ["-mavx2"],
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"],
}


def compiled(source: Path) -> ctypes.CDLL:
    """Compile a C file and load it.

    This takes about 0.2 s, in a temporary directory. The compiler is ``$CC``, or ``cc``; it is killed after 20 s.

    Args:
        source: path of the C file.

    Returns:
        The loaded library.

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


def compiled_function(source: str, name: str, argtypes: Sequence[Any]) -> Callable[..., None] | None:
    """A function of a C file of this folder; None without a compiler, or if LIGHTNING_NOISY_KERNEL is 0.

    Args:
        source: name of the file.
        name: of the function, which returns nothing.
        argtypes: types of its arguments, of ctypes.
    """
    if os.environ.get("LIGHTNING_NOISY_KERNEL") == "0":
        return None
    try:
        function = getattr(compiled(Path(__file__).with_name(source)), name)
    except (CompileError, AttributeError):
        return None
    function.argtypes, function.restype = [*argtypes], None
    return function  # type: ignore[no-any-return]


def _run(command: list[str]) -> None:
    """Run a compiler; on a timeout or interrupt, kill it and its child processes."""
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
    """Load a library, unless this makes the process flush denormal numbers to zero, as fast math does."""
    flushed = _flushes_denormals()
    loaded = ctypes.CDLL(str(library))
    if not flushed and _flushes_denormals():
        torch.set_flush_denormal(False)
        raise ValueError("$CC's output rounds denormal numbers to 0 in the whole process. Drop its fast-math flags")
    return loaded


def _flushes_denormals() -> bool:
    return sys.float_info.min / 2 == 0
