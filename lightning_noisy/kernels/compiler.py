"""How the C files become a library: without torch, so that building a wheel can use it, too."""

from __future__ import annotations

import hashlib
import os
import shlex
import signal
import subprocess
from pathlib import Path

__all__ = ["CompileError", "compile_library", "library_name"]

FOLDER = Path(__file__).parent
# The flags don't change the values: each product and sum is rounded separately, and nothing is reordered. Ignoring
# errno and floating-point exceptions allows vectorization. (The first flags undo fast math from $CC; placed later, they
# would undo the last ones.)
_PLAIN_MATH = ["-fno-fast-math", "-fno-unsafe-math-optimizations"]
_FLAGS = [*_PLAIN_MATH, "-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
_LIBRARY = ["-shared", "-fPIC", "-pthread"]
VECTORS = {  # by the CPU capability that torch reports
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mfma", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"],
}
_TIMEOUT = 60.0  # seconds


class CompileError(Exception):
    """There is no compiler, it fails, or its output can't be loaded."""


def compiler() -> list[str]:
    """The compiler's command: ``$CC``, or ``cc``."""
    return shlex.split(os.environ.get("CC", "")) or ["cc"]


def library_name(capability: str, *also: str) -> str:
    """A file name that differs for other sources, flags, instruction sets and what else is given."""
    digest = hashlib.sha256(repr((_FLAGS, _LIBRARY, VECTORS.get(capability), also)).encode())
    for path in sources():
        digest.update(path.name.encode() + path.read_bytes())
    return f"{capability.lower()}-{digest.hexdigest()[:16]}.so"


def sources() -> list[Path]:
    """The C files and their headers."""
    return sorted(FOLDER.glob("*.[ch]"))


def compile_library(output: Path, capability: str) -> None:
    """Compile the C files of this folder, which takes 3 s; after a minute the compiler is killed.

    Args:
        output: path of the library.
        capability: key of VECTORS; others have no instruction sets of their own.

    Raises:
        CompileError: if that fails.
    """
    files = [str(path) for path in sources() if path.suffix == ".c"]
    try:
        command = [*compiler(), *_FLAGS, *VECTORS.get(capability, []), *_LIBRARY, *files, "-o", str(output), "-lm"]
        _run(command)
    except (OSError, ValueError, subprocess.SubprocessError) as error:  # no compiler, no such flag, ...
        raise CompileError(f"{error} {getattr(error, 'stderr', None) or ''}".strip()) from error


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
