import math

import numpy as np
import pytest
import torch

from lightning_noisy.kernels.gaussian import (
    AddressRanges,
    add_gaussian_,
    draw_,
    gaussian_at,
    stream_key,
    substream,
)

KEY = stream_key("test")


def gaussian(key, start, stop):
    return gaussian_at(key, torch.arange(start, stop))


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


def test_gaussian_is_box_muller_of_hashed_addresses():
    low, high = words(KEY, 200_000).reshape(-1, 2).T
    u = ((low.view(np.uint32) >> 1).astype(np.float32) * 2.0**-31 + 2.0**-32).astype(np.float32).astype(np.float64)
    radius, angle = np.sqrt(-2 * np.log(u)), np.pi * high / 2.0**31
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)
    off = np.abs(gaussian(KEY, 0, 200_000).numpy() - expected) / radius.repeat(2)
    assert off.max() < 1e-6  # the roundings of t, of the half angle, and of the numbers, in float32


def test_gaussian_has_the_distribution_function_of_the_normal_one():
    z = np.sort(gaussian(KEY, 0, 1_000_000).numpy().astype(np.float64))
    expected = torch.special.ndtr(torch.from_numpy(z)).numpy()
    steps = np.arange(len(z) + 1) / len(z)
    distance = max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max())
    assert distance * len(z) ** 0.5 < 1.63  # Kolmogorov and Smirnov's bound at 1 %
    for bound in (3.0, 4.0):  # the tails, which that hardly sees
        beyond = 2 * len(z) * torch.special.ndtr(torch.tensor(-bound, dtype=torch.float64)).item()
        assert abs((np.abs(z) > bound).sum() - beyond) < 4 * beyond**0.5


def test_gaussian_is_continuous_where_the_word_is_extreme():
    # The logarithm and the circle by themselves, at the ends and in the middle of their ranges.
    from lightning_noisy.kernels.gaussian import _on_circle, _radius

    u = torch.tensor([2.0**-32, 2.0**-31, 0.5 - 2.0**-25, 0.5, 0.70710677, 0.7071068, 1 - 2.0**-24, 1.0])
    expected = [math.sqrt(-2 * math.log(x)) for x in u.tolist()]
    np.testing.assert_allclose(_radius(u).tolist(), expected, rtol=3e-7)
    t = torch.tensor([-1.0, -0.75, -0.5, -(2.0**-31), 0.0, 0.25, 0.5, 1.0])
    for found, function in zip(_on_circle(t), (math.cos, math.sin), strict=True):
        np.testing.assert_allclose(found.tolist(), [function(math.pi * x) for x in t.tolist()], atol=3e-7)


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


@pytest.mark.parametrize("start", [0, 1, 246, 2**40 + 1])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 127, 128, 129, 300_001])
def test_draw_writes_what_the_reference_gives(start, count, every_kernel):
    out = torch.full((count,), math.nan)
    expected = gaussian_at(KEY, torch.arange(start, start + count), 0.3)
    assert torch.equal(draw_(out, KEY, start=start, std=0.3), expected)


@pytest.mark.parametrize(
    ("out", "start"),
    [
        (torch.zeros(4), -1),
        (torch.zeros(4, dtype=torch.float64), 0),
        (torch.zeros(8)[::2], 0),
        (torch.zeros(4, device="meta"), 0),
    ],
)
def test_draw_refuses_what_it_cannot_write_to(out, start):
    with pytest.raises(ValueError, match="needs a contiguous float32 tensor on the CPU and start >= 0"):
        draw_(out, KEY, start=start)


@pytest.mark.parametrize("counts", [[], [0], [5], [6, 2], [3, 0, 1, 70_000, 15]])
@pytest.mark.parametrize("odd", [0, 1])
def test_runs_are_drawn_one_after_the_other(counts, odd, every_kernel):
    keys = [substream(KEY, str(i)) for i in range(len(counts))]
    starts = [10 * i + odd * i for i in range(len(counts))]
    drawn = AddressRanges([first - 2**63 for first, _ in keys], starts, counts).moved(2**63).draw(KEY[1], 2.0)
    parts = [
        gaussian_at(key, torch.arange(start, start + count), 2.0)
        for key, start, count in zip(keys, starts, counts, strict=True)
    ]
    assert torch.equal(drawn, torch.cat([torch.zeros(0), *parts]))


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
    deviates = gaussian_at(KEY, torch.arange(1001)).double()
    torch.testing.assert_close(noisy, start + 0.5 * deviates, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gaussian_rounds_half_precision_once(dtype):
    start = torch.linspace(-1, 1, 1001).to(dtype)
    expected = (start.float() + 0.25 * gaussian_at(KEY, torch.arange(1001))).to(dtype)
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


def test_gaussian_is_independent_of_the_number_of_threads(any_kernel):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = draw_(torch.empty(2**20 + 1), KEY, start=1)
        torch.set_num_threads(3)
        assert torch.equal(draw_(torch.empty(2**20 + 1), KEY, start=1), one)
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
