import numpy as np
import pytest
import torch

from lightning_noisy.functional.gaussian import add_gaussian_, chunk_size, gaussian, stream_key

KEY = stream_key("test")
CHUNK = chunk_size(torch.device("cpu"))


def noise(shape, *, key=KEY, std=1.0, dtype=torch.float32):
    return add_gaussian_(torch.zeros(shape, dtype=dtype), std, key)


def test_gaussian_has_the_moments_of_a_normal_distribution():
    z = noise(400_000).double().numpy()
    # Standard errors at n = 4e5: mean 0.0016, variance 0.0022, skewness 0.0039, kurtosis 0.0077; bounds at 4 of them.
    assert abs(z.mean()) < 0.0064
    assert abs(z.var() - 1) < 0.009
    assert abs((z**3).mean()) < 0.016
    assert abs((z**4).mean() / z.var() ** 2 - 3) < 0.031


def test_gaussian_is_uncorrelated_between_neighbours_chunks_and_keys():
    z, other = noise(4 * CHUNK), noise(4 * CHUNK, key=stream_key("other"))
    pairs = [(z[:-1], z[1:]), (z[:CHUNK], z[CHUNK : 2 * CHUNK]), (z, other)]
    for a, b in pairs:
        r = np.corrcoef(a.numpy(), b.numpy())[0, 1]
        assert abs(r) < 4 / len(a) ** 0.5


@pytest.mark.parametrize("start", [0, 1, 15, 1000, CHUNK - 1, CHUNK, CHUNK + 7])
@pytest.mark.parametrize("size", [1, 3, 15, 16, 17, 1000, CHUNK, 2 * CHUNK + 7])
def test_gaussian_number_depends_on_its_address_alone(start, size):
    whole = gaussian(KEY, 0, 5 * CHUNK)
    assert torch.equal(gaussian(KEY, start, start + size), whole[start : start + size])
    assert torch.equal(add_gaussian_(torch.zeros(size), 1.0, KEY, start=start), whole[start : start + size])


def test_gaussian_does_not_repeat_itself():
    assert (
        gaussian(KEY, 0, 5 * CHUNK).unique().numel() > 0.99 * 5 * CHUNK
    )  # torch's uniforms have 24 bits: a few coincide


@pytest.mark.parametrize("shape", [(3, 5), (1, 15), (300, 400)])
def test_gaussian_ignores_strides(shape):
    # torch's own normal_ draws other numbers for a transposed tensor, and for fewer than 16 elements.
    transposed = torch.zeros(shape[::-1]).t()
    strided = torch.zeros(shape[0], 2 * shape[1])[:, ::2]
    assert not strided.is_contiguous()
    for tensor in (transposed, strided):
        pointer = tensor.data_ptr()
        assert torch.equal(add_gaussian_(tensor, 1.0, KEY), noise(shape))
        assert tensor.data_ptr() == pointer


def test_gaussian_adds_to_what_is_there_scaled_by_std():
    start = torch.linspace(-1, 1, 1001, dtype=torch.float64)
    noisy = add_gaussian_(start.clone(), 0.5, KEY)
    assert torch.equal(noisy, start + 0.5 * noise(1001).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gaussian_rounds_half_precision_once(dtype):
    start = torch.linspace(-1, 1, 1001).to(dtype)
    expected = (start.float() + 0.25 * noise(1001)).to(dtype)
    noisy = add_gaussian_(start.clone(), 0.25, KEY)
    assert noisy.dtype == dtype
    assert torch.equal(noisy, expected)


def test_gaussian_of_a_complex_tensor_has_expected_squared_modulus_of_the_variance():
    z = noise(200_000, std=2.0, dtype=torch.complex64)
    assert z.abs().square().mean().item() == pytest.approx(4.0, rel=0.01)
    assert z.real.var().item() == pytest.approx(z.imag.var().item(), rel=0.02)


def test_gaussian_keeps_non_finite_elements_visible():
    tensor = torch.tensor([1.0, float("inf"), float("nan")])
    assert add_gaussian_(tensor, 1.0, KEY).isfinite().tolist() == [True, False, False]


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,)])
def test_gaussian_takes_any_shape(shape):
    assert noise(shape).shape == shape


def test_gaussian_with_zero_std_touches_nothing():
    tensor = torch.tensor([-0.0, 1.0])
    assert add_gaussian_(tensor, 0.0, KEY).signbit().tolist() == [True, False]


def test_gaussian_is_independent_of_the_number_of_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = noise(3 * CHUNK)
        torch.set_num_threads(2)
        assert torch.equal(noise(3 * CHUNK), one)
    finally:
        torch.set_num_threads(threads)


def test_gaussian_leaves_the_global_random_state():
    before = torch.get_rng_state()
    noise(1000)
    assert torch.equal(torch.get_rng_state(), before)


def test_stream_key_differs_for_different_parts():
    parts = [(0,), (1,), ("0",), ("a", "bc"), ("ab", "c"), ("abc",), (0, "w", 1), (0, "w", 2), (0, 1, "w")]
    assert len({stream_key(*part) for part in parts}) == len(parts)
