from statistics import NormalDist

import numpy as np
import pytest
import torch

from lightning_noisy.functional.gaussian import (
    Sampler,
    add_gaussian_,
    erfinv_at,
    gaussian,
    gaussian_at,
    stream_key,
    substream,
)

KEY = stream_key("test")
CHUNK = 1 << 15


def words(key, n):
    """The random words behind the numbers, by NumPy's unsigned integers."""
    with np.errstate(over="ignore"):
        upper = np.uint64(32)
        factor = np.uint64(0xD6E8FEB86659FD93)

        def shifted(x):  # with the sign, as torch does
            return (x.view(np.int64) >> np.int64(upper)).view(np.uint64)

        x = np.arange(-(-n // 2), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key[0])
        x ^= shifted(x)
        x = (x ^ np.uint64(key[1])) * factor
        x ^= shifted(x)
        x *= factor
        x += shifted(x)
        return x.view(np.int32)[:n]


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


def test_gaussian_is_the_inverse_normal_distribution_function_of_hashed_addresses():
    u = words(KEY, 2001).astype(np.float32).astype(np.float64) * (1 - 2.0**-24) / 2.0**31
    expected = [NormalDist().inv_cdf((1 + x) / 2) for x in u]
    np.testing.assert_allclose(gaussian(KEY, 0, 2001).numpy(), expected, rtol=2e-6, atol=1e-6)


def test_gaussian_words_have_even_bits_that_flip_with_key_and_address():
    n = 1 << 16
    reference = words(KEY, n)
    bits = np.unpackbits(reference.view(np.uint8)).reshape(n, 32)
    assert np.abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / n**0.5
    for bit in range(64):
        key = (KEY[0] ^ 1 << bit, stream_key(bit)[1] if bit % 2 else KEY[1])
        flips = np.unpackbits((words(key, n) ^ reference).view(np.uint8)).reshape(n, 32)
        assert np.abs(flips.mean(0) - 0.5).max() < 5.5 * 0.5 / n**0.5
    same_counters = words((KEY[0], stream_key("another")[1]), n)  # overlapping streams differ by the second half
    for a, b in (
        (same_counters, reference),
        (reference[:-1], reference[1:]),
        (reference[:-2], reference[2:]),
    ):  # neighbours, within pairs and not
        flips = np.unpackbits((a ^ b).view(np.uint8)).reshape(-1, 32)
        assert np.abs(flips.mean(0) - 0.5).max() < 5.5 * 0.5 / n**0.5


def test_gaussian_words_collide_as_often_as_random_ones():
    n = 1 << 17
    distinct = len(np.unique(words(KEY, n)))
    expected = n * (n - 1) / 2 / 2**32  # 2.0 pairs
    assert n - distinct <= expected + 5 * expected**0.5


@pytest.mark.parametrize("start", [0, 1, 15, 1000, CHUNK - 1, CHUNK, CHUNK + 7])
@pytest.mark.parametrize("size", [1, 3, 15, 16, 17, 1000, CHUNK, 2 * CHUNK + 7])
def test_gaussian_number_depends_on_its_address_alone(start, size):
    whole = gaussian(KEY, 0, 5 * CHUNK)
    assert torch.equal(gaussian(KEY, start, start + size), whole[start : start + size])
    assert torch.equal(add_gaussian_(torch.zeros(size), 1.0, KEY, start=start), whole[start : start + size])


def test_gaussian_does_not_repeat_itself():
    assert gaussian(KEY, 0, 5 * CHUNK).unique().numel() > 0.99 * 5 * CHUNK  # float32 has 24 bits: a few coincide


def test_gaussian_at_takes_any_addresses():
    whole = gaussian(KEY, 0, 1000)
    address = torch.randint(1000, (7, 30, 2), generator=torch.Generator().manual_seed(0))
    assert torch.equal(gaussian_at(KEY, address), whole[address])


@pytest.mark.parametrize(("first", "pairs"), [(0, 1), (0, 1000), (123, 40_000), (2**40, 500)])
def test_sampler_draws_what_the_reference_gives(first, pairs):
    sampler = Sampler(torch.device("cpu"))
    key = substream(KEY, "weight")
    sampler.counters_of(first, pairs, key[0], out=sampler.counters[:pairs])
    expected = erfinv_at(key, torch.arange(2 * first, 2 * (first + pairs)))
    assert torch.equal(sampler.draw(pairs, key[1]), expected)
    assert torch.equal(sampler.numbers(1, 2 * pairs - 1), expected[-1:])


def test_sampler_draws_rows():
    sampler = Sampler(torch.device("cpu"))
    first = torch.tensor([[5], [0], [77]])
    sampler.counters_of(first, 4, KEY[0], out=sampler.counters[:12].view(3, 4))
    expected = [gaussian(KEY, 2 * i, 2 * i + 8) for i in first.flatten().tolist()]
    assert torch.allclose(sampler.draw(12, KEY[1]) * 2**0.5, torch.cat(expected), rtol=1e-6)


def test_erfinv_does_not_depend_on_position_or_length():
    # What bit-equal shards rest on: torch's vectorized erf⁻¹ treats the rest of a vector like the whole.
    u = torch.rand(100_003, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = torch.erfinv(u)
    for start in (0, 1, 3, 7, 15, 16, 65_536):
        for size in (1, 2, 7, 9, 17, 100, 4097, 33_000):
            part = u[start : start + size]
            assert torch.equal(torch.erfinv(part), whole[start : start + size])
            assert torch.equal(torch.erfinv(part.clone()), whole[start : start + size])


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
    deviates = erfinv_at(KEY, torch.arange(1001)).double()
    torch.testing.assert_close(noisy, start + 0.5 * 2**0.5 * deviates, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gaussian_rounds_half_precision_once(dtype):
    start = torch.linspace(-1, 1, 1001).to(dtype)
    expected = torch.add(start.float(), erfinv_at(KEY, torch.arange(1001)), alpha=0.25 * 2**0.5).to(dtype)
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


def test_substreams_of_names_differ():
    keys = [substream(KEY, f"layer.{i}.weight") for i in range(1000)]
    assert len(set(keys)) == 1000
    assert {second for _, second in keys} == {KEY[1]}


def test_stream_key_differs_for_different_parts():
    parts = [(0,), (1,), ("0",), ("a", "bc"), ("ab", "c"), ("abc",), (0, "w", 1), (0, "w", 2), (0, 1, "w")]
    assert len({stream_key(*part) for part in parts}) == len(parts)
