"""What happens where the kernel can't be compiled, or isn't what it should be."""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from lightning_noisy.functional import gaussian, kernel

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@pytest.fixture
def fresh(monkeypatch):
    gaussian._kernel.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    gaussian._kernel.cache_clear()


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
    gaussian._kernel.cache_clear()
    fresh.setenv("CC", compiler)
    with pytest.warns(UserWarning, match=r"drawn by torch's operations.* LIGHTNING_NOISY_KERNEL=0 does without"):
        assert gaussian.kernel() is None
    assert torch.equal(gaussian.draw_(torch.empty(1000), (1, 2)), expected)


def test_without_a_place_for_temporary_files_torch_draws_the_noise(fresh):
    def gettempdir():
        raise FileNotFoundError("No usable temporary directory found")

    fresh.setattr(tempfile, "gettempdir", gettempdir)
    with pytest.warns(UserWarning, match="No usable temporary directory"):
        assert gaussian.kernel() is None


@needs_compiler
def test_a_kernel_with_other_numbers_is_not_used(fresh, tmp_path):
    source = tmp_path / "gaussian.c"
    text = (Path(gaussian.__file__).with_name("gaussian.c")).read_text()
    assert text.count("-1.23370051f") == 1
    source.write_text(text.replace("-1.23370051f", "-1.2337006f"))
    fresh.setattr(gaussian, "compiled", lambda _: kernel.compiled(source))
    with pytest.warns(UserWarning, match="gives other numbers"):
        assert gaussian.kernel() is None


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(fresh, dtype):
    expected = gaussian.draw_(torch.empty(1000), (1, 2))
    gaussian._kernel.cache_clear()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        assert gaussian.kernel() is not None
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
    assert gaussian.kernel() is not None  # which compares it with torch's operations
    whole = gaussian.draw_(torch.empty(2**20 + 3), (1, 2), start=1)
    assert torch.equal(whole, gaussian.gaussian_at((1, 2), torch.arange(1, 2**20 + 4)))
