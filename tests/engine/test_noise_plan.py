"""The fast path against the readable one: `add_gaussian_`, a tensor at a time."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_noisy.engine.noise_plan import NoisePlan, SharedAddresses, _windows, is_small
from lightning_noisy.functional import add_gaussian_, stream_key
from lightning_noisy.functional.gaussian import chunk_size, gaussian

CHUNK = chunk_size(torch.device("cpu"))
SIZES = {
    "scalar": (),
    "empty": (0, 3),
    "one": (1,),
    "short": (15,),
    "small": (7, 11),
    "almost": (CHUNK - 1,),
    "chunk": (CHUNK,),
    "matrix": (300, 400),
    "long": (3 * CHUNK + 5,),
}


def parameters_of(sizes, dtype=torch.float32):
    parameters = {name: nn.Parameter(torch.zeros(size, dtype=dtype)) for name, size in sizes.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    return parameters


def plan_of(parameters):
    addresses = SharedAddresses()
    addresses.extend({name: p.numel() for name, p in parameters.items() if is_small(p)})
    return NoisePlan(parameters, addresses), addresses


def reference(name, parameter, addresses, std, step=0):
    small = is_small(parameter)
    key = stream_key("s", "" if small else name, step)
    return add_gaussian_(torch.zeros_like(parameter), std, key, start=addresses[name] if small else 0)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
)
def test_plan_equals_the_reference_for_every_size_and_dtype(dtype):
    parameters = parameters_of(SIZES, dtype)
    plan, addresses = plan_of(parameters)
    for step in (0, 1):  # the second one uses what the first has prepared
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        assert plan.add_noise(0.5, ("s",), step)
        for name, parameter in parameters.items():
            assert torch.equal(parameter.grad, reference(name, parameter, addresses, 0.5, step)), name


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_plan_is_independent_of_the_number_of_threads(threads, monkeypatch):
    monkeypatch.setattr("lightning_noisy.engine.noise_plan._WORTH_THREADS", 0)
    before = torch.get_num_threads()
    sizes = {f"large{i}": (2 * CHUNK + i,) for i in range(6)} | {f"small{i}": (1000 + i,) for i in range(200)}
    parameters = parameters_of(sizes)
    plan, addresses = plan_of(parameters)
    try:
        torch.set_num_threads(threads)
        plan.add_noise(1.0, ("s",), 0)
    finally:
        torch.set_num_threads(before)
    for name, parameter in parameters.items():
        assert torch.equal(parameter.grad, reference(name, parameter, addresses, 1.0)), name


@pytest.mark.parametrize("shape", [(64, 32, 3, 3), (40, 30, 20, 5), (2, 3, 4, 5)])
def test_plan_ignores_the_strides_of_a_gradient(shape):
    parameters = parameters_of({"conv": shape})
    parameters["conv"].grad = torch.zeros(shape).to(memory_format=torch.channels_last)
    gradient = parameters["conv"].grad
    plan, addresses = plan_of(parameters)
    plan.add_noise(1.0, ("s",), 0)
    assert parameters["conv"].grad is gradient
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(gradient.contiguous(), reference("conv", torch.zeros(shape), addresses, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("height", [100, 60_000])
def test_sparse_rows_get_the_numbers_of_the_whole(dtype, height):
    rows = torch.tensor([0, 1, 17, height // 2, height - 1])
    parameters = parameters_of({"table": (height, 24)}, dtype)
    table = parameters["table"]
    table.grad = torch.sparse_coo_tensor(
        rows[None], torch.zeros(5, 24, dtype=dtype), (height, 24), check_invariants=True
    )
    plan, addresses = plan_of(parameters)
    plan.add_noise(1.0, ("s",), 0)
    expected = reference("table", torch.zeros(height, 24, dtype=dtype), addresses, 1.0)
    assert torch.equal(table.grad.values(), expected[rows])


def test_plan_of_a_gradient_with_few_long_rows():
    shape = (2, 1_200_000)
    parameters = parameters_of({"wide": shape})
    parameters["wide"].grad = torch.zeros(shape[::-1]).t()
    plan, addresses = plan_of(parameters)
    plan.add_noise(1.0, ("s",), 0)
    assert torch.equal(parameters["wide"].grad, reference("wide", torch.zeros(shape), addresses, 1.0))


def test_plan_goes_on_when_gradients_come_and_go():
    parameters = parameters_of({"a": (10,), "b": (20,), "c": (40_000,)})
    plan, addresses = plan_of(parameters)
    for absent in ("a", "b", "c"):
        for name, parameter in parameters.items():
            parameter.grad = None if name == absent else torch.zeros_like(parameter)
        assert plan.add_noise(1.0, ("s",), 0)
        for name, parameter in parameters.items():
            if name == absent:
                assert parameter.grad is None
            else:
                assert torch.equal(parameter.grad, reference(name, parameter, addresses, 1.0))
    for parameter in parameters.values():
        parameter.grad = None
    assert not plan.add_noise(1.0, ("s",), 0)


def test_plan_without_noise_touches_nothing_and_counts():
    parameters = parameters_of({"a": (3,)})
    parameters["a"].grad = torch.tensor([-0.0, 1.0, float("nan")])
    plan, _ = plan_of(parameters)
    assert plan.add_noise(0.0, ("s",), 0)
    assert parameters["a"].grad.signbit().tolist()[0]


def test_plan_keeps_non_finite_gradients_visible():
    parameters = parameters_of({"small": (4,), "large": (CHUNK,)})
    for parameter in parameters.values():
        parameter.grad[:2] = torch.tensor([float("inf"), float("nan")])
    plan_of(parameters)[0].add_noise(1.0, ("s",), 0)
    for parameter in parameters.values():
        assert parameter.grad.isfinite().tolist()[:4] == [False, False, True, True]


def test_many_small_parameters_beyond_the_buffers_get_their_noise():
    parameters = parameters_of({f"w{i:03}": (CHUNK - 1,) for i in range(140)})
    plan, addresses = plan_of(parameters)
    plan.add_noise(1.0, ("s",), 0)
    for name in ("w000", "w127", "w128", "w139"):
        assert torch.equal(parameters[name].grad, reference(name, parameters[name], addresses, 1.0))


def test_addresses_do_not_move_or_overlap_or_cross_the_end_of_a_chunk():
    addresses = SharedAddresses()
    addresses.extend({"b": 20_000, "a": 100})
    before = addresses["a"], addresses["b"]
    addresses.extend({"0": 5, "b": 20_000, "a": 100, "c": 20_000, "d": 3})
    assert (addresses["a"], addresses["b"]) == before == (0, 100)
    places = sorted(
        (addresses[name], size) for name, size in {"a": 100, "b": 20_000, "0": 5, "c": 20_000, "d": 3}.items()
    )
    for (start, size), (following, _) in pairwise(places):
        assert start + size <= following
        assert start // CHUNK == (start + size - 1) // CHUNK


@pytest.mark.parametrize(
    ("shape", "offset", "size"),
    [
        ((7, 5), (0, 0), (7, 5)),
        ((7, 5), (3, 0), (2, 5)),  # rows
        ((7, 5), (0, 1), (7, 3)),  # columns
        ((7, 5), (2, 1), (4, 3)),  # both
        ((6, 4, 3, 3), (1, 2, 0, 0), (4, 2, 3, 3)),
        ((3, 2000, 1000), (1, 500, 10), (2, 700, 20)),  # rows too long to be drawn at once
        ((9,), (4,), (5,)),
        ((), (), ()),
    ],
)
def test_windows_are_the_shards_numbers(shape, offset, size):
    key, whole = stream_key("w"), torch.zeros(shape)
    whole = gaussian(key, 100, 100 + whole.numel()).view(shape)
    expected = whole[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
    local = torch.zeros(size)
    for block in _windows(local, 100, shape, offset, size):
        noise = gaussian(key, block.start, block.start + torch.Size(block.shape).numel()).view(block.shape)
        block.tensor.add_(noise if block.window is None else noise[block.window])
    assert torch.equal(local, expected)
