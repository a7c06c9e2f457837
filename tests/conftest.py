import sysconfig
from pathlib import Path

import pytest
from helpers import HAS_COMPILER

from lightning_noisy.functional.gaussian import _kernel, kernel


@pytest.fixture(params=["compiled", "torch"])
def any_kernel(request, monkeypatch):
    """The test runs with the compiled kernel, and with torch's operations in its place."""
    if request.param == "torch":
        monkeypatch.setenv("LIGHTNING_NOISY_KERNEL", "0")
        _kernel.cache_clear()
    elif not HAS_COMPILER:
        pytest.skip("there is no C compiler")
    assert (kernel() is None) == (request.param == "torch")
    yield
    monkeypatch.undo()
    _kernel.cache_clear()
