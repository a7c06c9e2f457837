"""The fast path against the readable one: `add_gaussian_`, a tensor at a time."""

from itertools import pairwise
from math import prod

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_noisy.gradient_noise.gradients import _strides, _windows
from lightning_noisy.gradient_noise.norms import total_norm
from lightning_noisy.gradient_noise.plan import NoisePlan, _Batch, _most_at_once
from lightning_noisy.kernels.gaussian import add_gaussian_, stream_key, substream

pytestmark = pytest.mark.usefixtures("any_kernel")

BATCH = _most_at_once(torch.device("cpu"))
SIZES = {
    "scalar": (),
    "empty": (0, 3),
    "one": (1,),
    "short": (15,),
    "small": (7, 11),
    "odd": (8191,),
    "matrix": (300, 400),
    "batch": (BATCH,),
    "long": (3 * BATCH + 5,),
}


def parameters_of(sizes, dtype=torch.float32):
    parameters = {name: nn.Parameter(torch.zeros(size, dtype=dtype)) for name, size in sizes.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    return parameters


def reference(name, parameter, std, step=0):
    return add_gaussian_(torch.zeros_like(parameter), std, substream(stream_key("s", step), name))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
)
def test_plan_equals_the_reference_for_every_size_and_dtype(dtype):
    parameters = parameters_of(SIZES, dtype)
    plan = NoisePlan(parameters)
    for step in (0, 1):  # the second one uses what the first has prepared
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        assert plan.add_noise([0.5], ("s",), step)
        for name, parameter in parameters.items():
            assert torch.equal(parameter.grad, reference(name, parameter, 0.5, step)), name


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_plan_is_independent_of_the_number_of_threads(threads):
    before = torch.get_num_threads()
    sizes = {f"large{i}": (BATCH + i,) for i in range(6)} | {f"small{i}": (1000 + i,) for i in range(200)}
    parameters = parameters_of(sizes)
    plan = NoisePlan(parameters)
    try:
        torch.set_num_threads(threads)
        plan.add_noise([1.0], ("s",), 0)
    finally:
        torch.set_num_threads(before)
    for name, parameter in parameters.items():
        assert torch.equal(parameter.grad, reference(name, parameter, 1.0)), name


@pytest.mark.parametrize("shape", [(64, 32, 3, 3), (40, 30, 20, 5), (2, 3, 4, 5)])
def test_plan_ignores_the_strides_of_a_gradient(shape):
    parameters = parameters_of({"conv": shape})
    parameters["conv"].grad = torch.zeros(shape).to(memory_format=torch.channels_last)
    gradient = parameters["conv"].grad
    plan = NoisePlan(parameters)
    plan.add_noise([1.0], ("s",), 0)
    assert parameters["conv"].grad is gradient
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(gradient.contiguous(), reference("conv", torch.zeros(shape), 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("width", [1, 23, 24])
@pytest.mark.parametrize("height", [100, 60_000])
def test_sparse_rows_get_the_numbers_of_the_whole(dtype, height, width):
    rows = torch.tensor([0, 1, 17, height // 2, height - 1])
    parameters = parameters_of({"table": (height, width)}, dtype)
    table = parameters["table"]
    table.grad = torch.sparse_coo_tensor(
        rows[None], torch.zeros(5, width, dtype=dtype), (height, width), check_invariants=True
    )
    plan = NoisePlan(parameters)
    plan.add_noise([1.0], ("s",), 0)
    expected = reference("table", torch.zeros(height, width, dtype=dtype), 1.0)
    assert torch.equal(table.grad.values(), expected[rows])


def test_plan_of_a_gradient_with_few_long_rows():
    shape = (2, 1_200_000)
    parameters = parameters_of({"wide": shape})
    parameters["wide"].grad = torch.zeros(shape[::-1]).t()
    plan = NoisePlan(parameters)
    plan.add_noise([1.0], ("s",), 0)
    assert torch.equal(parameters["wide"].grad, reference("wide", torch.zeros(shape), 1.0))


def test_plan_goes_on_when_gradients_come_and_go():
    parameters = parameters_of({"a": (10,), "b": (20,), "c": (40_000,)})
    plan = NoisePlan(parameters)
    for absent in ("a", "b", "c"):
        for name, parameter in parameters.items():
            parameter.grad = None if name == absent else torch.zeros_like(parameter)
        assert plan.add_noise([1.0], ("s",), 0)
        for name, parameter in parameters.items():
            if name == absent:
                assert parameter.grad is None
            else:
                assert torch.equal(parameter.grad, reference(name, parameter, 1.0))
    for parameter in parameters.values():
        parameter.grad = None
    assert not plan.add_noise([1.0], ("s",), 0)


def test_plan_without_noise_touches_nothing_and_counts():
    parameters = parameters_of({"a": (3,)})
    parameters["a"].grad = torch.tensor([-0.0, 1.0, float("nan")])
    plan = NoisePlan(parameters)
    assert plan.add_noise([0.0], ("s",), 0)
    assert parameters["a"].grad.signbit().tolist()[0]


def test_plan_keeps_non_finite_gradients_visible():
    parameters = parameters_of({"small": (4,), "large": (8192,)})
    for parameter in parameters.values():
        parameter.grad[:2] = torch.tensor([float("inf"), float("nan")])
    NoisePlan(parameters).add_noise([1.0], ("s",), 0)
    for parameter in parameters.values():
        assert parameter.grad.isfinite().tolist()[:4] == [False, False, True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_total_norm_of_many_elements(dtype):
    generator = torch.Generator().manual_seed(0)
    gradients = [100 * torch.randn(shape, generator=generator) for shape in ((300_001,), (7,), (50, 60))]
    gradients[2] = gradients[2].t()
    gradients = [gradient.to(dtype) for gradient in gradients]
    expected = sum(gradient.double().square().sum().item() for gradient in gradients) ** 0.5
    assert total_norm(gradients).item() == pytest.approx(expected, rel=1e-5)  # summed in float32


@pytest.mark.parametrize("others", [0, 1, 5000])
def test_noise_does_not_depend_on_the_other_parameters(others):
    parameters = parameters_of({f"other{i}": (i % 100 + 1,) for i in range(others)} | {"a": (100,), "z": (20_000,)})
    NoisePlan(parameters).add_noise([1.0], ("s",), 7)
    for name in ("a", "z"):
        assert torch.equal(parameters[name].grad, reference(name, parameters[name], 1.0, step=7))


@pytest.mark.parametrize("stds", [[2.0, 1.0, 0.0], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
def test_every_group_gets_noise_of_its_own_size(stds):
    sizes = {"a": (100,), "b": (20_000,), "c": (100,), "d": (7,), "e": (20_000,), "f": (40,), "g": (9, 3)}
    groups = [0, 0, 1, 0, 2, 2, 1]
    parameters = parameters_of(sizes)
    parameters["d"].grad = None
    assert NoisePlan(parameters, groups).add_noise(stds, ("s",), 0)
    assert parameters.pop("d").grad is None
    del groups[3]
    for (name, parameter), group in zip(parameters.items(), groups, strict=True):
        assert torch.equal(parameter.grad, reference(name, parameter, stds[group])), name


@pytest.mark.parametrize("first", [1, 6, 100_001])
@pytest.mark.parametrize("size", [5, 20_000, BATCH + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_flat_shards_get_their_part(first, size, dtype):
    parameters = parameters_of({"w": (size,)}, dtype)
    NoisePlan(parameters, shards={parameters["w"]: first}).add_noise([1.0], ("s",), 0)
    whole = reference("w", torch.zeros(first + size, dtype=dtype), 1.0)
    assert torch.equal(parameters["w"].grad, whole[first:])


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
        ((4, 70_000), (1, 11), (3, 68_001)),  # long rows, odd
        ((500, 1024), (0, 512), (500, 512)),  # even halves of rows
        ((6, 1, 8), (2, 0, 4), (4, 1, 4)),
        ((), (), ()),
    ],
)
@pytest.mark.parametrize("start", [0, 101])
def test_windows_are_the_shards_numbers(shape, offset, size, start):
    key, std = stream_key("w"), 0.3
    whole = torch.zeros(shape)
    add_gaussian_(whole, std, key, start=start)
    expected = whole[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
    strides = _strides(shape)
    first = start + sum(o * stride for o, stride in zip(offset, strides, strict=True))
    local = torch.zeros(size)
    batch = _Batch(local.device, std, key[1])
    for part, starts in _windows(local, first, strides):
        batch.add(part, starts, key[0])
    batch.flush()
    assert torch.equal(local, expected)


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 has no distribution without messages")
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize(
    ("mesh", "placements"),
    [
        ((3,), [Shard(0)]),
        ((3,), [Shard(1)]),
        ((3,), [Replicate()]),
        ((2, 2), [Shard(0), Shard(1)]),
        ((2, 2), [Replicate(), Shard(1)]),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_every_rank_adds_its_part_of_the_noise(mesh, placements, dtype, padded):
    whole = reference("w", torch.zeros(50, 41, dtype=dtype), 1.0)
    if padded:
        whole[17] = 0
    for rank in range(prod(mesh)):
        torch.distributed.init_process_group("fake", rank=rank, world_size=prod(mesh), store=FakeStore())
        try:
            device_mesh = init_device_mesh("cpu", mesh)
            # Not by zeros_like: torch keeps the result's description, with the mesh that it saw first.
            value, gradient, expected = (
                distribute_tensor(tensor, device_mesh, placements, src_data_rank=None)
                for tensor in (torch.zeros_like(whole), torch.zeros_like(whole), whole)
            )
            parameter = nn.Parameter(value)
            parameter.grad = gradient
            padding = {parameter: (17 * 41, 41)} if padded else {}
            NoisePlan({"w": parameter}, padding=padding).add_noise([1.0], ("s",), 0)
            assert torch.equal(gradient.to_local(), expected.to_local())
        finally:
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("cuts", [[0, 700, 720, 2050], [0, 697, 738, 2050], [0, 100, 200, 2050]])
def test_a_padding_row_stays_clean_in_flat_shards(cuts):
    whole = reference("w", torch.zeros(50, 41), 1.0)
    whole[17] = 0  # elements 697 to 737
    parts = []
    for start, end in pairwise(cuts):
        shard = nn.Parameter(torch.zeros(end - start))
        shard.grad = torch.zeros_like(shard)
        NoisePlan({"w": shard}, shards={shard: start}, padding={shard: (697, 41)}).add_noise([1.0], ("s",), 0)
        parts.append(shard.grad)
    assert torch.equal(torch.cat(parts), whole.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_autograd_notices_that_a_gradient_has_changed(dtype):
    parameters = parameters_of({"a": (3,), "b": (3,)}, dtype)
    penalties = [(p * p.grad).sum().abs() for p in parameters.values()]  # keep the gradients for their backward
    parameters["a"].grad.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalties[0].backward()
    NoisePlan(parameters).add_noise([1.0], ("s",), 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalties[1].backward()


def test_a_gradient_of_another_size_than_its_parameter_gets_noise_where_it_is():
    p = nn.Parameter(torch.zeros(1000))
    p.grad = torch.zeros(1000)
    plan = NoisePlan({"p": p})
    memory = torch.zeros(1000)
    p.data = torch.zeros(10)
    p.grad = memory[:10]
    plan.add_noise([1.0], ("s",), 0)
    assert torch.equal(p.grad, reference("p", torch.zeros(10), 1.0))
    assert memory[10:].count_nonzero() == 0


def test_a_negated_view_gets_the_noise_and_not_its_opposite():
    parameters = parameters_of({"p": (40,)})
    parameters["p"].grad = torch._neg_view(torch.zeros(40))
    NoisePlan(parameters).add_noise([1.0], ("s",), 0)
    assert torch.equal(parameters["p"].grad.resolve_neg(), reference("p", torch.zeros(40), 1.0))


def test_a_group_without_noise_is_not_touched():
    parameters = parameters_of({"a": (3,), "b": (3,)})
    parameters["a"].grad = torch.tensor([-0.0, 1.0, -0.0])
    version = parameters["a"].grad._version
    NoisePlan(parameters, [0, 1]).add_noise([0.0, 1.0], ("s",), 0)
    assert parameters["a"].grad.signbit().tolist() == [True, False, True]
    assert parameters["a"].grad._version == version
    assert parameters["b"].grad.count_nonzero() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_with_one_gradient_get_one_each(dtype):
    size = 1 << 20  # enough for two threads, which would race
    parameters = parameters_of(dict.fromkeys("abcd", (size,)), dtype)
    shared = torch.ones(size + 5, dtype=dtype)
    for i, parameter in enumerate(parameters.values()):
        parameter.grad = shared[:size]  # views that begin at one place
        if i == 3:
            parameter.grad = shared[:size].as_strided((size,), (0,))  # and one whose elements are one
    NoisePlan(parameters).add_noise([1.0], ("s",), 0)
    for name, parameter in parameters.items():
        assert torch.equal(parameter.grad, 1 + reference(name, parameter, 1.0)), name


@pytest.mark.parametrize(
    ("make", "copied"),
    [
        (lambda: torch.ones(1).expand(4, 3), True),
        (lambda: torch.ones(1, 3).expand(4, 3), True),
        (lambda: torch.ones(20).as_strided((4, 3), (2, 1)), True),  # rows that overlap
        (lambda: torch.ones(20).as_strided((4, 3), (3, 1)), False),
        (lambda: torch.ones(3, 4).t(), False),
        (lambda: torch.ones(40).as_strided((4, 3), (1, 10)), False),
        (lambda: torch.ones(1, 3).expand(1, 3), False),
    ],
)
def test_a_gradient_whose_elements_share_memory_is_copied(make, copied):
    gradient = make()
    p = nn.Parameter(torch.zeros(gradient.shape))
    p.grad = gradient
    assert NoisePlan({"p": p}).add_noise([1.0], ("s",), 0)
    assert torch.equal(p.grad, 1 + reference("p", p, 1.0))
    assert (p.grad is not gradient) == copied


def test_an_empty_gradient_with_strides_of_zero_is_no_shared_memory():
    parameters = parameters_of({"a": (3,), "b": (0, 4)})
    parameters["b"].grad = torch.zeros(0, 1).expand(0, 4)
    assert NoisePlan(parameters).add_noise([1.0], ("s",), 0)
    assert parameters["a"].grad.count_nonzero() == 3


def test_fake_gradients_get_no_noise_and_count():
    with FakeTensorMode():
        parameters = parameters_of({"a": (3,), "b": (4, 5)})
        parameters["b"].grad = torch.zeros(5, 4).t()
    plan = NoisePlan(parameters)
    with FakeTensorMode():
        assert plan.add_noise([1.0], ("s",), 0)


@pytest.mark.parametrize("shape", [(200_000, 1), (70_000, 3), (3, 40_000, 2)])
def test_windows_of_many_short_rows(shape):
    # Column-wise shards with hardly any columns: there are more rows than a block may have.
    width = shape[-1]
    whole = (*shape[:-1], 7)
    key = stream_key("w")
    expected = add_gaussian_(torch.zeros(whole), 1.0, key)[..., 2 : 2 + width]
    local = torch.zeros(shape)
    batch = _Batch(local.device, 1.0, key[1])
    for part, starts in _windows(local, 2, _strides(whole)):
        assert len(starts) <= 1 << 16
        batch.add(part, starts, key[0])
    batch.flush()
    assert torch.equal(local, expected)


def test_a_conjugate_view_gets_the_noise():
    # As autograd makes it for W.conj() @ x.
    parameters = parameters_of({"b": (3,), "w": (4, 5)}, torch.complex64)
    parameters["w"].grad = torch.zeros(4, 5, dtype=torch.complex64).conj()
    NoisePlan(parameters).add_noise([1.0], ("s",), 0)
    assert torch.equal(parameters["w"].grad, reference("w", parameters["w"], 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 400, 400), (5, 4, 3)])
def test_sparse_rows_may_be_strided(dtype, shape):
    parameters = parameters_of({"w": shape}, dtype)
    for values in (torch.zeros(2, *shape[1:]).transpose(1, 2).mT, torch.zeros(1, 1, 1).expand(2, *shape[1:])):
        parameters["w"].grad = torch.sparse_coo_tensor(
            [[1, 4]], values.to(dtype), shape, is_coalesced=True, check_invariants=True
        )
        NoisePlan(parameters).add_noise([1.0], ("s",), 0)
        expected = reference("w", torch.zeros(shape, dtype=dtype), 1.0)
        assert torch.equal(parameters["w"].grad.values(), expected[[1, 4]])


def test_without_noise_an_expanded_gradient_is_let_be():
    parameters = parameters_of({"b": (4,)})
    parameters["b"].grad = torch.zeros(1).expand(4)
    assert NoisePlan(parameters).add_noise([0.0], ("s",), 0)


def test_a_first_gradient_of_another_kind_does_not_slow_the_others_down(any_kernel, monkeypatch):
    parameters = parameters_of({"table": (50, 4)}, torch.bfloat16) | parameters_of({f"p{i}": (20,) for i in range(9)})
    table = parameters["table"]
    table.grad = torch.sparse_coo_tensor([[1, 7]], torch.zeros(2, 4), (50, 4), check_invariants=True).bfloat16()
    added = []
    real = _Batch.add
    monkeypatch.setattr(_Batch, "add", lambda self, tensor, *rest: added.append(tensor) or real(self, tensor, *rest))
    NoisePlan(parameters).add_noise([1.0], ("s",), 0)
    assert len(added) == (1 if any_kernel == "auto" else 10)
    for i in range(9):
        assert torch.equal(parameters[f"p{i}"].grad, reference(f"p{i}", torch.zeros(20), 1.0))
