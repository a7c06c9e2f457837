"""Fixtures. Triton's interpreter has to be asked for before anything imports Triton."""

import os

import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import sysconfig
from pathlib import Path

import pytest
from helpers import KERNELS, forget_kernels

from lightning_noisy.monitoring.call_watch import FunctionCalls, RunEagerly


def pytest_configure(config):
    # Lightning's hints about speed (loader workers, an idle GPU) are for users' machines, not for tests. Not in
    # pyproject.toml, where naming it imports Lightning, and that Triton.
    config.addinivalue_line("filterwarnings", "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


def with_kernels(request, monkeypatch):
    monkeypatch.setenv("LIGHTNING_NOISY_KERNEL", request.param)
    forget_kernels()
    yield request.param
    monkeypatch.undo()
    forget_kernels()


@pytest.fixture(params=KERNELS)
def every_kernel(request, monkeypatch):
    """The test runs with the compiled kernels, with Triton's, and with torch's operations in their place."""
    yield from with_kernels(request, monkeypatch)


@pytest.fixture(params=[each for each in KERNELS if each.id != "triton"])
def any_kernel(request, monkeypatch):
    """The same without Triton's, whose interpreter is slow."""
    yield from with_kernels(request, monkeypatch)


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
