"""Sums and counts over the elements of tensors, against NumPy in float64."""

import math

import numpy as np
import pytest
import torch
from helpers import HAS_COMPILER, forget_kernels
from torch import nn

from lightning_noisy.kernels import sums
from lightning_noisy.kernels.sums import element_sums, reference_sums

needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C compiler")
BACKENDS = [pytest.param(element_sums, id="kernel", marks=needs_compiler), pytest.param(reference_sums, id="torch")]

# Shapes with the dimension of the units: one element, odd ones, several chunks, rows longer than a chunk.
SHAPES = [((1,), 0), ((31,), 0), ((33, 7), 1), ((7, 33), 0), ((5, 2049), 1), ((3, 5, 11), 1), ((2, 3, 40, 41), 1)]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_zeros(x):
    """The same with a third of the elements 0."""
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 1 / 3] = 0
    return x


@pytest.mark.parametrize(
    ("shape", "unit_dim", "layout"),
    [(*each, layout) for each in SHAPES for layout in ("contiguous", "transposed", "strided")]
    + [((2, 3, 40, 41), 1, "channels_last")],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_equal_those_of_numpy(backend, shape, unit_dim, layout):
    x, side = with_zeros(normal(*shape)), normal(*shape, seed=2)
    if shape[unit_dim] > 1:
        x.select(unit_dim, -1).zero_()
    if layout == "channels_last":
        x, side = (each.to(memory_format=torch.channels_last) for each in (x, side))
    elif layout == "transposed":
        x, side = (each.transpose(0, -1).contiguous().transpose(0, -1) for each in (x, side))
    elif layout == "strided":
        x, side = (each.repeat_interleave(2, -1)[..., ::2] for each in (x, side))
    found = backend(x, unit_dim, small=0.1, side=side, inactive=True)
    h, s = x.double().numpy(), side.numpy()
    assert found.total == pytest.approx(h.sum(), rel=1e-5, abs=1e-5)
    assert found.square == pytest.approx((h**2).sum(), rel=1e-6)
    flat = np.abs(h) < np.float32(0.1)
    counts = (h <= 0).sum(), flat.sum(), (flat & (s < 0)).sum(), (h == 0).sum()
    assert (found.inactive, found.flat, found.left, found.hard) == counts
    others = tuple(dim for dim in range(len(shape)) if dim != unit_dim)
    assert found.alive.tolist() == (h != 0).any(others).tolist()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_summed_as_their_values(dtype):
    x = normal(300, 7, dtype=dtype)
    found = element_sums(x, small=0.1, inactive=True)
    h = x.double().numpy()
    assert (found.total, found.square) == pytest.approx((h.sum(), (h**2).sum()), rel=1e-5)
    assert (found.inactive, found.flat) == ((h <= 0).sum(), (np.abs(h) < 0.1).sum())


@pytest.mark.parametrize(("mean", "deviation"), [(1e4, 1.0), (0.0, 1e-20), (1.0, 1e-3), (0.0, 1e25)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_variance_survives_any_scale(backend, mean, deviation):
    x = mean + deviation * normal(100_003)
    found = backend(x)
    variance = found.square / len(x) - (found.total / len(x)) ** 2
    assert variance == pytest.approx(x.double().numpy().var(), rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_counted_nowhere_and_is_no_sign_of_death(backend):
    x = torch.zeros(50, 3)
    x[7, 1] = math.nan
    found = backend(x, 1, small=0.5, side=x, inactive=True)
    assert math.isnan(found.total)
    assert math.isnan(found.square)
    assert (found.inactive, found.flat, found.left, found.hard) == (149, 149, 0, 149)
    assert found.alive.tolist() == [0, 1, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_smaller_than_0(backend):
    found = backend(torch.zeros(5), small=0.0)
    assert (found.flat, found.hard) == (0, 5)


def test_without_the_kernel_torch_sums(monkeypatch):
    x = with_zeros(normal(40, 9))
    expected = reference_sums(x, 1, small=0.1, side=x, inactive=True)
    with monkeypatch.context() as patch:
        patch.setenv("LIGHTNING_NOISY_KERNEL", "0")
        forget_kernels()
        assert sums._load() is None
        found = element_sums(x, 1, small=0.1, side=x, inactive=True)
    forget_kernels()
    assert found[:-1] == expected[:-1]
    assert torch.equal(found.alive, expected.alive)


@needs_compiler
def test_kernel_is_used(monkeypatch):
    assert sums._load() is not None
    monkeypatch.setattr(sums, "reference_sums", None)
    assert element_sums(nn.functional.relu(normal(8, 8)), 1).total > 0
