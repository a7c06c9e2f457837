"""What happens where the kernel can't be compiled, or isn't what it should be."""

import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from helpers import HAS_COMPILER

from lightning_noisy.kernels import build, gaussian

needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C compiler")


@pytest.fixture
def fresh(monkeypatch):
    gaussian._load.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    gaussian._load.cache_clear()


@pytest.mark.parametrize(
    "compiler",
    [
        "false",
        "true",  # succeeds, and writes nothing
        "/nowhere/cc -O1",
        '"',  # no closing quotation
        "cc -fvisibility=hidden",  # without the symbol
        "printf \\xff\\n",  # no text
    ],
)
def test_without_a_compiler_torch_draws_the_noise_and_a_warning_says_why(fresh, compiler):
    expected = gaussian.draw_(torch.empty(1000), (1, 2))
    gaussian._load.cache_clear()
    fresh.setenv("CC", compiler)
    with pytest.warns(UserWarning, match=r"drawn by torch's operations.* LIGHTNING_NOISY_KERNEL=0 does without"):
        assert gaussian.compiled_library() is None
    assert torch.equal(gaussian.draw_(torch.empty(1000), (1, 2)), expected)


def test_without_a_place_for_temporary_files_torch_draws_the_noise(fresh):
    def gettempdir():
        raise FileNotFoundError("No usable temporary directory found")

    fresh.setattr(tempfile, "gettempdir", gettempdir)
    with pytest.warns(UserWarning, match="No usable temporary directory"):
        assert gaussian.compiled_library() is None


@needs_compiler
def test_a_kernel_with_other_numbers_is_not_used(fresh, tmp_path):
    source = tmp_path / "gaussian.c"
    text = (Path(gaussian.__file__).with_name("gaussian.c")).read_text()
    assert text.count("-1.23370051f") == 1
    source.write_text(text.replace("-1.23370051f", "-1.2337006f"))
    fresh.setattr(gaussian, "compiled", lambda _: build.compiled(source))
    with pytest.warns(UserWarning, match="gives other numbers"):
        assert gaussian.compiled_library() is None


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(fresh, dtype):
    expected = gaussian.draw_(torch.empty(1000), (1, 2))
    gaussian._load.cache_clear()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        assert gaussian.compiled_library() is not None
        assert torch.equal(gaussian.draw_(torch.empty(1000, dtype=torch.float32), (1, 2)), expected)
    finally:
        torch.set_default_dtype(before)


@needs_compiler
@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2", "AVX512"])
def test_every_instruction_set_gives_the_same_numbers(fresh, capability):
    order = ["DEFAULT", "AVX2", "AVX512"]
    own = torch.backends.cpu.get_cpu_capability()
    if own not in order or order.index(capability) > order.index(own):
        pytest.skip(f"this CPU has {own}")
    fresh.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert gaussian.compiled_library() is not None  # which compares it with torch's operations
    whole = gaussian.draw_(torch.empty(2**20 + 3), (1, 2), start=1)
    assert torch.equal(whole, gaussian.gaussian_at((1, 2), torch.arange(1, 2**20 + 4)))


@needs_compiler
@pytest.mark.parametrize("flags", ["-funsafe-math-optimizations", "-ffast-math", "-Ofast", "-O2 -fno-signed-zeros"])
def test_flags_of_the_compiler_change_neither_the_numbers_nor_the_process(fresh, flags):
    fresh.setenv("CC", f"cc {flags}")
    assert gaussian.compiled_library() is not None
    assert sys.float_info.min / 2 > 0  # denormal numbers are still there


def test_a_library_that_flushes_denormal_numbers_is_not_used(fresh):
    if not torch.set_flush_denormal(False):
        pytest.skip("this CPU can't flush denormal numbers")
    load = build.ctypes.CDLL

    def flushing(name):
        torch.set_flush_denormal(True)
        return load(None)

    fresh.setattr(build, "_run", lambda command: None)
    fresh.setattr(build.ctypes, "CDLL", flushing)
    with pytest.warns(UserWarning, match="rounds denormal numbers to 0 .* Drop its fast-math flags"):
        assert gaussian.compiled_library() is None
    assert sys.float_info.min / 2 > 0


def test_a_compiler_that_hangs_is_ended_with_its_children(fresh, tmp_path):
    pid = tmp_path / "pid"
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\nsleep 60 & echo $! > {pid}\nwait\n")
    compiler.chmod(0o755)
    fresh.setenv("CC", str(compiler))
    assert build._TIMEOUT <= 30
    fresh.setattr(build, "_TIMEOUT", 0.5)
    with pytest.warns(UserWarning, match="timed out after 0.5 seconds"):
        assert gaussian.compiled_library() is None
    for _ in range(100):  # until the system has taken note
        try:
            os.kill(int(pid.read_text()), 0)
        except ProcessLookupError:
            return
        state = Path(f"/proc/{pid.read_text().strip()}/stat")
        if state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z":
            return  # ended, and nobody has asked for its end
        time.sleep(0.05)
    pytest.fail("the compiler's child is still there")


def test_with_warnings_as_errors_the_first_step_says_so_and_the_next_ones_work(fresh):
    fresh.setenv("CC", "false")
    expected = gaussian.gaussian_at((1, 2), torch.arange(10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="drawn by torch's operations"):
            gaussian.draw_(torch.empty(10), (1, 2))
        for _ in range(2):
            assert torch.equal(gaussian.draw_(torch.empty(10), (1, 2)), expected)
