"""What happens where the kernel can't be compiled, or isn't what it should be."""

import logging

import pytest
import torch

from lightning_noisy.functional import gaussian, kernel


@pytest.fixture
def fresh(monkeypatch):
    gaussian.kernel.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    gaussian.kernel.cache_clear()


@pytest.mark.parametrize("compiler", ["false", "/nowhere/cc -O1", "true"])
def test_without_a_compiler_torch_draws_the_noise_and_the_log_says_why(fresh, caplog, compiler):
    expected = gaussian.draw_(torch.empty(1000), (1, 2))
    gaussian.kernel.cache_clear()
    fresh.setenv("CC", compiler)  # `true` succeeds, and writes nothing
    with caplog.at_level(logging.INFO):
        assert gaussian.kernel() is None
    assert "gaussian.c was not compiled" in caplog.text
    assert torch.equal(gaussian.draw_(torch.empty(1000), (1, 2)), expected)


def test_a_kernel_with_other_numbers_is_not_used(fresh, caplog, tmp_path):
    source = tmp_path / "gaussian.c"
    text = (kernel.Path(gaussian.__file__).with_name("gaussian.c")).read_text()
    assert text.count("-1.23370051f") == 1
    source.write_text(text.replace("-1.23370051f", "-1.2337006f"))
    fresh.setattr(gaussian, "compiled", lambda _: kernel.compiled(source))
    with caplog.at_level(logging.INFO):
        assert gaussian.kernel() is None
    assert "gives other numbers" in caplog.text


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2", "AVX512"])
def test_every_instruction_set_gives_the_same_numbers(fresh, capability):
    order = ["DEFAULT", "AVX2", "AVX512"]
    own = torch.backends.cpu.get_cpu_capability()
    if own not in order or order.index(capability) > order.index(own):
        pytest.skip(f"this CPU has {own}")
    fresh.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert gaussian.kernel() is not None  # which compares it with torch's operations
    whole = gaussian.draw_(torch.empty(2**20 + 3), (1, 2), start=1)
    assert torch.equal(whole, gaussian.gaussian((1, 2), 1, 2**20 + 4))
