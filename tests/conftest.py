import sysconfig
from pathlib import Path

import pytest
from helpers import HAS_COMPILER

from lightning_noisy.kernels.gaussian import _load, compiled_library
from lightning_noisy.monitoring.call_watch import FunctionCalls, RunEagerly


@pytest.fixture(params=["compiled", "torch"])
def any_kernel(request, monkeypatch):
    """The test runs with the compiled kernel, and with torch's operations in its place."""
    if request.param == "torch":
        monkeypatch.setenv("LIGHTNING_NOISY_KERNEL", "0")
        _load.cache_clear()
    elif not HAS_COMPILER:
        pytest.skip("there is no C compiler")
    assert (compiled_library() is None) == (request.param == "torch")
    yield
    monkeypatch.undo()
    _load.cache_clear()


@pytest.fixture
def inductor():
    """The test is skipped where torch.compile lacks what its default backend needs on the CPU."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        pytest.skip("torch.compile finds no C++ compiler")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("torch.compile needs Python's C headers")


@pytest.fixture(autouse=True)
def _nothing_is_left_attached():
    """A recorder that stayed attached would let what later tests compile run eagerly."""
    yield
    assert (RunEagerly._users, FunctionCalls._active) == (0, None)
