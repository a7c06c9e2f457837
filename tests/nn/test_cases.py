"""What must hold of every activation of this package, as one table of cases."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_noisy.nn import NormalizedActivation, registry

OLD_TORCH = torch.__version__.startswith("2.6.")
NOISY = sorted(registry.NOISY)
NORMALIZED = sorted(registry.NORMALIZED)
EVERY = [*NOISY, *NORMALIZED, "normalized", "gelu-gpn", "relu-gpn"]
X = 3 * torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0))


def make(name, **options):
    torch.manual_seed(0)
    return registry.create(name, **options)


def trained(name):
    """A module whose state isn't that of its construction."""
    module = make(name)
    for scale in (1.0, 1.5):
        module(scale * X)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3)
    return module


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_dtype_is_kept_and_statistics_are_wide(name, dtype, training):
    module = make(name).train(training)
    y = module(X.to(dtype))
    assert y.dtype == dtype
    assert y.isfinite().all()
    floats = [value.dtype for value in module.buffers() if value.is_floating_point()]
    assert set(floats) <= {torch.float32, torch.float64}


@pytest.mark.parametrize("name", EVERY)
def test_autocast_changes_nothing(name):
    plain, mixed = make(name), make(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixed(X)
    assert torch.equal(y, plain(X))
    assert same(state_of(plain), state_of(mixed))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_go_on_alike_and_apart(name, clone):
    module = trained(name)
    twin = clone(module)
    before = state_of(module)
    y = twin(X)
    assert same(before, state_of(module))
    assert torch.equal(module(X), y)


@pytest.mark.parametrize("name", EVERY)
def test_state_dict_says_all(name):
    module = trained(name)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = registry.create(name)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(module(X), other(X))
    assert torch.equal(module.eval()(X), other.eval()(X))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_nothing(name, use_reentrant):
    results = []
    for checkpointed in (False, True):
        module, layer = make(name), nn.Conv2d(4, 4, 3)
        nn.init.constant_(layer.weight, 0.1)
        nn.init.zeros_(layer.bias)
        x = X.clone().requires_grad_()
        for _ in range(2):
            block = nn.Sequential(layer, module, layer)
            y = checkpoint(block, x, use_reentrant=use_reentrant) if checkpointed else block(x)
            y.square().sum().backward()
        gradients = [x.grad, layer.weight.grad, *(parameter.grad for parameter in module.parameters())]
        results.append((y.detach(), gradients, state_of(module)))
    (y, gradients, state), (y_again, gradients_again, state_again) = results
    assert torch.equal(y, y_again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))
    assert same(state, state_again)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_compiles_once_without_a_break(name):
    if name == "normalized" and OLD_TORCH:
        pytest.skip("torch 2.6 can't trace the derivative of any function; those with a closed form it can")
    torch._dynamo.reset()
    module, twin = make(name), make(name)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for step in range(4):
        for each in (module, twin):
            if name in NOISY:
                each.c.fill_(30.0 / (step + 1))
        y = compiled((step + 1) * X)
        torch.testing.assert_close(y, twin((step + 1) * X))
    assert counter.frame_count == 1
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(module.state_dict()[key], value)


@pytest.mark.slow
@pytest.mark.usefixtures("inductor")
@pytest.mark.filterwarnings("ignore:Skipping serialization")  # torch 2.6
@pytest.mark.parametrize("name", ["nah", "nsw", "nrelu"])
def test_compiled_by_inductor_gives_the_same_outputs_and_gradients(name):
    torch._dynamo.reset()
    module, twin = make(name), make(name)
    compiled = torch.compile(module, fullgraph=True)
    for step in range(2):
        x, x_twin = (((step + 1) * X).requires_grad_() for _ in range(2))
        y, y_twin = compiled(x), twin(x_twin)
        torch.testing.assert_close(y, y_twin, rtol=1e-4, atol=1e-4)
        y.square().sum().backward()
        y_twin.square().sum().backward()
        torch.testing.assert_close(x.grad, x_twin.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_exports_in_evaluation(name):
    module = trained(name).eval()
    program = torch.export.export(module, (X,))
    torch.testing.assert_close(program.module()(X), module(X))


@pytest.mark.parametrize("name", EVERY)
def test_functional_call_and_vmap_in_evaluation(name):
    module = trained(name).eval()
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())

    def call(x):
        return torch.func.functional_call(module, (parameters, buffers), (x,))

    assert torch.equal(call(X), module(X))
    torch.testing.assert_close(torch.vmap(call)(X), module(X))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    "x",
    [torch.zeros(0, 4), torch.ones(1), torch.ones(8, 4), torch.tensor([1.0, float("inf")]), torch.full((3,), -1e4)],
    ids=["empty", "one", "constant", "inf", "dead"],
)
def test_odd_batches_leave_finite_values(name, x):
    module = trained(name)
    module(x)
    assert all(value.isfinite().all() for value in module.state_dict().values())
    module.eval()
    assert module(X).isfinite().all()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("training", [True, False])
def test_nan_stays_visible(name, training):
    module = trained(name).train(training)
    y = module(torch.tensor([0.5, float("nan"), 1.0, -1.0]))
    assert y.isnan().tolist()[1]
    assert all(value.isfinite().all() for value in module.state_dict().values())


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("training", [True, False])
def test_memory_format_does_not_matter_and_is_kept(name, training):
    plain, other = make(name).train(training), make(name).train(training)
    x = X.to(memory_format=torch.channels_last)
    y = other(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, plain(X))
    strided = make(name).train(training)(torch.stack([X, X], dim=-1)[..., 0])
    torch.testing.assert_close(strided, make(name).train(training)(X))


@pytest.mark.parametrize("name", EVERY)
def test_in_place_gives_the_same(name):
    x = X.clone()
    inplace = make(name, inplace=True)
    y = inplace(x)
    assert y.data_ptr() == x.data_ptr()
    assert torch.equal(y, make(name)(X))


@pytest.mark.parametrize("name", [*NORMALIZED, "normalized"])
def test_gradients_with_frozen_running_values(name):
    module = trained(name).double().eval()
    assert isinstance(module, NormalizedActivation)
    x = X[0, 0].double().requires_grad_()
    assert torch.autograd.gradcheck(module, (x,))


@pytest.mark.parametrize("name", NOISY)
def test_gradients_with_fixed_noise(name):
    module = make(name).double()
    x = X[0, 0].double().requires_grad_()

    def fixed(x, *parameters):
        module.noise_state[1] = 7
        names = [key for key, _ in module.named_parameters()]
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(fixed, (x, *module.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nah", "nani", "nsw", "normalized", "gelu-gpn"])
def test_onnx_in_evaluation(name, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnx.reference")
    module = trained(name).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (X,), tmp_path / "model.onnx", dynamo=True, verbose=False)
        session = onnxruntime.ReferenceEvaluator(str(tmp_path / "model.onnx"))
    (y,) = session.run(None, {session.input_names[0]: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), module(X).detach(), rtol=1e-4, atol=1e-5)
