"""The library of the C files: from the wheel, from the user's cache, or compiled on first use.

One that a compiler made at installation lies in the folder ``built``. Else the first process that needs it compiles it,
in some seconds, and keeps it in ``$XDG_CACHE_HOME/lightning_noisy`` (``~/.cache/lightning_noisy``); where that can't be
written to, each process compiles its own. Names of files change with the sources, the flags and the compiler.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lightning_noisy.kernels.backend import choice
from lightning_noisy.kernels.compiler import FOLDER, CompileError, compile_library, compiler, library_name

__all__ = ["compiled_function", "library", "threads_for", "why_not"]

BUILT = FOLDER / "built"
_NEW_THREAD = 1 << 18  # elements for which starting a thread, which takes up to 0.1 ms, pays
_AWAKE_THREAD = 1 << 15  # the same for torch's own, as in torch


def library() -> ctypes.CDLL | None:
    """The library; None without a compiler, or if LIGHTNING_NOISY_KERNEL asks for another."""
    return _found()[0]


def why_not() -> str:
    """Why there is no library, though it may be used; else empty."""
    return _found()[1]


def compiled_function(name: str, argtypes: Sequence[Any]) -> Any:
    """A function of the library, which returns nothing; None if there is no library.

    Args:
        name: of the function.
        argtypes: types of its arguments, of ctypes.
    """
    function = getattr(library(), name, None)
    if function is not None:
        function.argtypes, function.restype = [*argtypes], None
    return function


def threads_for(count: int) -> int:
    """The number of threads to use for so many elements."""
    return min(torch.get_num_threads(), 1 + count // _grain)


_grain = _NEW_THREAD


@cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    if choice() != "auto":
        return None, ""
    try:
        loaded = _any_library(torch.backends.cpu.get_cpu_capability())
        _share_threads(loaded.use_threads_of)
    except (CompileError, AttributeError) as error:  # AttributeError: a library without its functions
        return None, str(error)
    return loaded, ""


def _any_library(capability: str) -> ctypes.CDLL:
    """Load what is there, or else compile it.

    Raises:
        CompileError: if neither works.
    """
    for path in (BUILT / library_name(capability), *_cached(capability)):
        if path.exists():
            try:
                return _load(path)
            except OSError:  # of another system, or damaged
                continue
    reason = ""
    for kept in (*_cached(capability), None):
        try:
            with _temporary_folder(kept and kept.parent) as folder:
                made = folder / library_name(capability)
                compile_library(made, capability)
                loaded = _load(made)
                if kept is not None:
                    os.replace(made, kept)
                return loaded
        except OSError as error:  # nothing can be written there, or nothing there may be run
            reason = str(error)
        except ValueError as error:
            raise CompileError(str(error)) from error
    raise CompileError(reason)


def _cached(capability: str) -> Iterator[Path]:
    """Where the user's library is kept, if there is a folder that nobody else can write to."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home, "lightning_noisy")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
            yield folder / library_name(capability, *compiler(), sys.platform, os.uname().machine)
    except (OSError, RuntimeError, ValueError, AttributeError):  # no home, a command that can't be read, no such system
        return


@contextmanager
def _temporary_folder(where: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=where, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _load(path: Path) -> ctypes.CDLL:
    """Load a library, unless this makes the process flush denormal numbers to zero, as fast math does."""
    flushed = _flushes_denormals()
    loaded = ctypes.CDLL(str(path))
    if not flushed and _flushes_denormals():
        torch.set_flush_denormal(False)
        raise ValueError("$CC's output rounds denormal numbers to 0 in the whole process. Drop its fast-math flags")
    return loaded


def _flushes_denormals() -> bool:
    return sys.float_info.min / 2 == 0


def _share_threads(use: Any) -> None:
    """Let the library use the threads of torch's OpenMP, if torch was built with one that is found."""
    global _grain
    if _forked:  # the parent's threads, which aren't there, may be known already
        return
    try:
        torch_library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        pool = ctypes.cast(torch_library.GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError):
        return
    use.argtypes, use.restype = [ctypes.c_void_p], None
    use(pool)
    _sharing.append(use)
    _grain = _AWAKE_THREAD


_sharing: list[Any] = []  # what tells a library which threads to use
_forked = False


def _after_fork() -> None:
    """The child has none of the parent's threads: libraries start threads of their own."""
    global _grain, _forked
    for use in _sharing:
        use(None)
    _grain, _forked = _NEW_THREAD, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
