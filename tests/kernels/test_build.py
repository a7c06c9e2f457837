"""What happens where the kernel can't be compiled, or isn't what it should be."""

import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from helpers import HAS_COMPILER, forget_kernels

from lightning_noisy.kernels import backend, build, compiler, gaussian, lstm, noisy, normalized, sums

needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C compiler")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing is compiled yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "BUILT", tmp_path / "built")
    forget_kernels()
    yield monkeypatch
    monkeypatch.undo()
    forget_kernels()


def changed_sources(patch, folder, name, right, wrong):
    """Let the library be compiled from other sources."""
    for path in compiler.sources():
        (folder / path.name).write_text(path.read_text())
    text = (folder / name).read_text()
    assert text.count(right) == 1
    (folder / name).write_text(text.replace(right, wrong))
    patch.setattr(compiler, "FOLDER", folder)
    forget_kernels()


@pytest.mark.parametrize(
    "command",
    [
        "false",
        "true",  # succeeds, and writes nothing
        "/nowhere/cc -O1",
        '"',  # no closing quotation
        "cc -fvisibility=hidden",  # without the symbol
        "printf \\xff\\n",  # no text
    ],
)
def test_without_a_compiler_torch_draws_the_noise_and_a_warning_says_why(fresh, command):
    expected = gaussian.draw_(torch.empty(1000), (1, 2))
    forget_kernels()
    fresh.setenv("CC", command)
    with pytest.warns(UserWarning, match=r"drawn by torch's operations.* LIGHTNING_NOISY_KERNEL=0 does without"):
        assert gaussian.compiled_kernel() is None
    assert torch.equal(gaussian.draw_(torch.empty(1000), (1, 2)), expected)


def test_without_a_place_for_temporary_files_torch_draws_the_noise(fresh):
    def gettempdir():
        raise FileNotFoundError("No usable temporary directory found")

    fresh.setattr(tempfile, "gettempdir", gettempdir)
    fresh.setenv("XDG_CACHE_HOME", os.devnull)
    with pytest.warns(UserWarning, match="No usable temporary directory"):
        assert gaussian.compiled_kernel() is None


@needs_compiler
def test_a_kernel_with_other_numbers_is_not_used(fresh, tmp_path):
    changed_sources(fresh, tmp_path, "gaussian.h", "-1.23370051f", "-1.2337006f")
    with pytest.warns(UserWarning, match="gives other numbers"):
        assert gaussian.compiled_kernel() is None


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(fresh, dtype):
    expected = gaussian.draw_(torch.empty(1000), (1, 2))
    forget_kernels()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        assert gaussian.compiled_kernel() is not None
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
    assert gaussian.compiled_kernel() is not None  # which compares it with torch's operations
    whole = gaussian.draw_(torch.empty(2**20 + 3), (1, 2), start=1)
    assert torch.equal(whole, gaussian.gaussian_at((1, 2), torch.arange(1, 2**20 + 4)))


@needs_compiler
@pytest.mark.parametrize("flags", ["-funsafe-math-optimizations", "-ffast-math", "-Ofast", "-O2 -fno-signed-zeros"])
def test_flags_of_the_compiler_change_neither_the_numbers_nor_the_process(fresh, flags):
    fresh.setenv("CC", f"cc {flags}")
    assert gaussian.compiled_kernel() is not None
    assert sys.float_info.min / 2 > 0  # denormal numbers are still there


def test_a_library_that_flushes_denormal_numbers_is_not_used(fresh):
    if not torch.set_flush_denormal(False):
        pytest.skip("this CPU can't flush denormal numbers")
    load = build.ctypes.CDLL

    def flushing(name):
        torch.set_flush_denormal(True)
        return load(None)

    fresh.setattr(compiler, "_run", lambda command: None)
    fresh.setattr(build.ctypes, "CDLL", flushing)
    with pytest.warns(UserWarning, match="rounds denormal numbers to 0 .* Drop its fast-math flags"):
        assert gaussian.compiled_kernel() is None
    assert sys.float_info.min / 2 > 0


def test_a_compiler_that_hangs_is_ended_with_its_children(fresh, tmp_path):
    pid = tmp_path / "pid"
    command = tmp_path / "cc"
    command.write_text(f"#!/bin/sh\nsleep 60 & echo $! > {pid}\nwait\n")
    command.chmod(0o755)
    fresh.setenv("CC", str(command))
    assert compiler._TIMEOUT <= 60
    fresh.setattr(compiler, "_TIMEOUT", 0.5)
    with pytest.warns(UserWarning, match="timed out after 0.5 seconds"):
        assert gaussian.compiled_kernel() is None
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


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("name", "right", "wrong", "kernels"),
    [
        ("noisy.c", "sigma = (of_all ? first_c : c[j]) * (sigma * sigma);", "sigma = sigma * sigma * sigma;", noisy),
        ("noisy.c", "by_noise * own_p", "by_noise", noisy),
        ("functions.h", "*slope = s * FMA(clamped(x, -100.0f, 100.0f), other, 1.0f);", "*slope = s;", normalized),
        ("functions.h", "0.0857630962f", "0.0867630962f", normalized),
        ("functions.h", "*slope = x > 0.0f ? o.b : o.a * FMA(scale, rest, scale);", "*slope = 1.0f;", normalized),
        ("normalized.c", "gradient[j] * (y[j] - shift)", "gradient[j] * y[j]", normalized),
        ("normalized.c", "{mean_y, varies", "{mean_x, varies", normalized),
        ("lstm.c", "sum * by_g[j]", "sum * by_o[j]", lstm),
        ("sums.c", "sums.square[lane]", "sums.total[lane]", sums),
    ],
)
def test_kernels_with_other_numbers_are_not_used(fresh, tmp_path, name, right, wrong, kernels):
    changed_sources(fresh, tmp_path, name, right, wrong)
    assert build.library() is not None
    for each, load in (
        *((each, each._compiled) for each in (noisy, normalized)),
        *((each, each._load) for each in (lstm, sums)),
    ):
        assert (load() is None) == (each is kernels), each


@needs_compiler
def test_a_library_is_compiled_once_and_kept_where_nobody_else_can_write(fresh, tmp_path):
    compiled = []
    fresh.setattr(build, "compile_library", lambda *a: compiled.append(a) or compiler.compile_library(*a))
    for _ in range(2):
        assert build.library() is not None
        forget_kernels()
    assert len(compiled) == 1
    (kept,) = (tmp_path / "cache" / "lightning_noisy").iterdir()
    assert (kept.stat().st_mode & 0o777, kept.parent.stat().st_mode & 0o777) == (0o755, 0o700)
    kept.parent.chmod(0o777)  # others could have put it there
    assert build.library() is not None
    assert len(compiled) == 2


@needs_compiler
def test_a_damaged_library_is_compiled_again(fresh, tmp_path):
    assert build.library() is not None
    (kept,) = (tmp_path / "cache" / "lightning_noisy").iterdir()
    forget_kernels()
    kept.unlink()  # it may still be loaded
    kept.write_bytes(b"\x7fELF, but cut off")
    assert build.library() is not None
    assert kept.stat().st_size > 10_000


@needs_compiler
def test_a_folder_that_cannot_be_written_to_costs_only_time(fresh, tmp_path):
    (tmp_path / "file").touch()
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build.library() is not None


@needs_compiler
def test_the_library_of_the_wheel_is_taken_first(fresh):
    capability = torch.backends.cpu.get_cpu_capability()
    build.BUILT.mkdir()
    compiler.compile_library(build.BUILT / compiler.library_name(capability), capability)
    fresh.setenv("CC", "false")
    assert build.library() is not None


def test_another_choice_is_refused(fresh):
    fresh.setenv("LIGHTNING_NOISY_KERNEL", "cuda")
    with pytest.raises(ValueError, match="must be 0 \\(no kernels\\), auto or triton, got 'cuda'"):
        backend.choice()
    fresh.setenv("LIGHTNING_NOISY_KERNEL", "triton")
    fresh.delenv("TRITON_INTERPRET")
    fresh.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="triton needs a GPU, or TRITON_INTERPRET=1"):
        backend.choice()


@needs_compiler
def test_a_forked_process_does_not_wait_for_threads_that_it_does_not_have(fresh):
    x, y = torch.zeros(1 << 20), torch.zeros(1 << 20)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    add = gaussian.compiled_kernel()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def in_the_child():  # in which torch's own operations would wait
        gaussian._add_run(add, y, (1, 2), 0, 1.0)
        queue.put(bool((x.numpy() == y.numpy()).all()))

    try:
        gaussian._add_run(add, x, (1, 2), 0, 1.0)
        child = context.Process(target=in_the_child)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process with threads
            child.start()
        child.join(60)
        assert child.exitcode == 0
        assert queue.get()
    finally:
        torch.set_num_threads(before)
