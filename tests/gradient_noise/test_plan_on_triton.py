"""Noise on gradients by Triton's kernel: on a GPU, or on the CPU by the interpreter."""

import os

import pytest
import torch
from helpers import HAS_TRITON, TRITON_DEVICE, forget_kernels
from torch import nn

from lightning_noisy.gradient_noise.plan import NoisePlan
from lightning_noisy.kernels import backend
from lightning_noisy.kernels.gaussian import add_gaussian_, adds_to, stream_key, substream

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="there is no Triton, or too old an interpreter")
SIZES = {"scalar": (), "empty": (0, 3), "one": (1,), "odd": (8191,), "matrix": (300, 41), "long": (20_001,)}
# Elements of 0, so that sums round as the numbers do; the interpreter cuts bits of bfloat16 off where devices round.
CUT = {torch.bfloat16: 2**-7} if os.environ["TRITON_INTERPRET"] == "1" else {}


@pytest.fixture
def launches(monkeypatch):
    """Triton's kernels are used; a list of the launches that add noise."""
    monkeypatch.setenv("LIGHTNING_NOISY_KERNEL", "triton")
    forget_kernels()
    seen = []
    kernels = backend.triton_kernels("gaussian", torch.empty(0, device=TRITON_DEVICE))
    real = kernels.add_ranges
    monkeypatch.setattr(kernels, "add_ranges", lambda *arguments: seen.append(arguments) or real(*arguments))
    yield seen
    monkeypatch.undo()
    forget_kernels()


def parameters_of(sizes, dtype=torch.float32):
    parameters = {
        name: nn.Parameter(torch.zeros(size, dtype=dtype, device=TRITON_DEVICE)) for name, size in sizes.items()
    }
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    return parameters


def assert_noise(gradient, name, std, step=0):
    expected = add_gaussian_(torch.zeros(gradient.shape), std, substream(stream_key("s", step), name))
    found = gradient.float().cpu()
    if gradient.dtype in CUT:
        torch.testing.assert_close(found, expected, rtol=CUT[gradient.dtype], atol=0)
    else:
        rounded = expected.to(gradient.dtype).float()
        assert torch.equal(found, rounded), (name, gradient.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_size_gets_the_numbers_of_the_cpu_in_one_launch(launches, dtype):
    parameters = parameters_of(SIZES, dtype)
    plan = NoisePlan(parameters)
    for step in (0, 1):
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        assert plan.add_noise([0.5], ("s",), step)
        assert len(launches) == step + 1
        for name, parameter in parameters.items():
            assert_noise(parameter.grad, name, 0.5, step)


def test_dtypes_and_memory_formats_are_mixed(launches):
    parameters = parameters_of({"a": (50,), "c": (4, 6, 5, 5), "e": (40,)})
    parameters |= parameters_of({"half": (70,), "half2": (3,)}, torch.float16)
    parameters |= parameters_of({"double": (30,)}, torch.float64)
    parameters["c"].grad = parameters["c"].grad.to(memory_format=torch.channels_last)
    parameters["e"].grad = None
    NoisePlan(parameters).add_noise([0.5], ("s",), 0)
    for name, parameter in parameters.items():
        if name == "double":
            noise = add_gaussian_(torch.zeros(30, dtype=torch.float64), 0.5, substream(stream_key("s", 0), name))
            assert torch.equal(parameter.grad.cpu(), noise)
        elif name != "e":
            assert_noise(parameter.grad.contiguous(), name, 0.5)
    assert [each[-1].dtype for each in launches].count(torch.float16) == 1


def test_shards_get_their_part(launches):
    parameters = parameters_of({"a": (1001,), "b": (64,)})
    plan = NoisePlan(parameters, shards={parameters["a"]: 2**40 + 3})
    plan.add_noise([0.5], ("s",), 0)
    expected = torch.zeros(1001)
    add_gaussian_(expected, 0.5, substream(stream_key("s", 0), "a"), start=2**40 + 3)
    assert torch.equal(parameters["a"].grad.cpu(), expected)
    assert len(launches) == 1


def test_groups_have_their_own_std_and_autograd_notices(launches):
    parameters = parameters_of({"a": (10,), "b": (20,), "c": (30,)})
    versions = [p.grad._version for p in parameters.values()]
    NoisePlan(parameters, groups=[0, 1, 2]).add_noise([0.5, 0.0, 2.0], ("s",), 0)
    assert_noise(parameters["a"].grad, "a", 0.5)
    assert_noise(parameters["c"].grad, "c", 2.0)
    assert parameters["b"].grad.count_nonzero() == 0
    changed = [p.grad._version > before for p, before in zip(parameters.values(), versions, strict=True)]
    assert changed == [True, False, True]


def test_a_kernel_with_other_numbers_is_not_used(launches, monkeypatch):
    x = torch.zeros(10, device=TRITON_DEVICE)
    assert adds_to(x)
    kernels = backend.triton_kernels("gaussian", x)
    real = kernels.draw_
    forget_kernels()
    monkeypatch.setattr(kernels, "draw_", lambda out, first, second: real(out, first, second + 1))
    assert not adds_to(x)
