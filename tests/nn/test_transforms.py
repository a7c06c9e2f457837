"""Activations under compilers, transforms and tracers together with what else goes on there."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_noisy import fold_normalization, replace_activations
from lightning_noisy.nn import NAH, NAN, NANI, NANIL, NormalizedActivation, NReLU, registry

OLD_TORCH = torch.__version__.startswith("2.6.")


def noisy():
    module = NAN(c=5.0)
    with torch.no_grad():
        module.p.fill_(1)
    return module


def three_steps(make, wrap):
    """Inputs' gradients, the module's state and its gradients after three steps."""
    torch.manual_seed(0)
    module = make()
    run, found = wrap(module), []
    for step in range(3):
        x = (torch.randn(40, generator=torch.Generator().manual_seed(step)) * (1 + step)).requires_grad_()
        y = run(x)
        y.square().sum().backward()
        found += [y.detach(), x.grad]
    return [*found, *(p.grad for p in module.parameters()), *module.buffers()]


@pytest.mark.slow
@pytest.mark.usefixtures("inductor")
@pytest.mark.skipif(OLD_TORCH, reason="torch 2.6 saves what this recomputes")
@pytest.mark.parametrize("make", [noisy, NReLU], ids=["nan", "nrelu"])
@pytest.mark.parametrize("inside", [True, False])
def test_checkpointing_and_compiling_together_change_nothing(make, inside):
    def wrap(module):
        torch._dynamo.reset()
        if inside:
            return torch.compile(lambda x: checkpoint(module, x, use_reentrant=False), fullgraph=True)
        compiled = torch.compile(module)
        return lambda x: checkpoint(compiled, x, use_reentrant=False)

    for mine, expected in zip(three_steps(make, wrap), three_steps(make, lambda module: module), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(OLD_TORCH, reason="torch 2.6 can't trace the derivative of any function")
def test_instances_of_any_function_export_and_vectorize():
    module, x = NormalizedActivation(lambda x: x * torch.sigmoid(2 * x), instance_dims=-1).eval(), torch.randn(2, 3, 5)
    exported = torch.export.export(module, (x,)).module()
    assert type(exported(x)) is torch.Tensor
    torch.testing.assert_close(exported(2 * x), module(2 * x))
    torch.testing.assert_close(vmap(module)(x), module(x))


@pytest.mark.parametrize("cls", [NAN, NANI])
def test_noise_under_vmap_is_that_of_the_whole_batch(cls):
    module, x = cls(c=5.0), torch.full((3, 4), 0.9)
    twin = copy.deepcopy(module)
    torch.testing.assert_close(vmap(module)(x), twin(x))
    twin(x)
    assert torch.equal(module.noise_state, twin.noise_state) is False  # and it goes on
    torch.testing.assert_close(vmap(twin, in_dims=1, out_dims=1)(x.clone()).shape, x.shape)


def test_ensembles_have_noise_of_their_own():
    models = [nn.Sequential(nn.Linear(4, 4), NANI(c=1.0)) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    skeleton, x = copy.deepcopy(models[0]), torch.randn(6, 4)
    expected = torch.stack([copy.deepcopy(model)(x) for model in models])
    found = vmap(lambda p, b: functional_call(skeleton, (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("make", [NAN, lambda: NormalizedActivation(F.mish), NReLU], ids=["nan", "mish", "nrelu"])
def test_functional_gradients_equal_autograd(make):
    model, x = nn.Sequential(nn.Linear(4, 4), make()), torch.randn(3, 4)
    model(x)
    twin = copy.deepcopy(model)
    twin(x).sum().backward()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    found = grad(lambda p, b: functional_call(model, (p, b), (x,)).sum())(dict(model.named_parameters()), buffers)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtype_changes_nothing(dtype):
    x = torch.randn(50)
    results = []
    for default in (torch.float32, dtype):
        module, leaf = noisy(), x.clone().requires_grad_()
        module.noise_state.copy_(torch.tensor([7, 0]))
        torch.set_default_dtype(default)
        try:
            module(leaf).sum().backward()
            results.append([leaf.grad, module.p.grad, module.eval()(x)])
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_of_alpha_is_summed_in_float32():
    x = torch.randn(400, 400)
    gradients = []
    for dtype in (torch.float16, torch.float32):
        module = NormalizedActivation(F.mish)
        y = module(x.to(dtype))
        gradients += torch.autograd.grad(y, module.alpha, 8 * y.detach())
    assert gradients[1] > 2 * torch.finfo(torch.float16).max
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=0)


def test_meta_device_is_left_with_all_values():
    with torch.device("meta"):
        module = NAN(c=0.25)
        assert module(torch.empty(2, 3)).shape == (2, 3)
        assert NReLU()(torch.empty(2, 3)).shape == (2, 3)
        registry.create("tanh-gpn")
    module.to_empty(device="cpu").reset_parameters()
    assert module.c.item() == 0.25


@pytest.mark.parametrize("name", sorted(registry.NOISY))
@pytest.mark.parametrize("way", ["to_empty", "children alone", "half", "assign", "swapped on meta"])
@pytest.mark.parametrize("saved", [7.0, None])
def test_c_of_a_model_made_on_the_meta_device_is_the_saved_or_the_initial_one(name, way, saved):
    spec = f"{name}(c=0.25)"
    expected = nn.Sequential(nn.Linear(3, 3), registry.create(spec))
    expected[1].c.fill_(7.0)
    with torch.device("meta"):
        made = nn.Tanh() if way == "swapped on meta" else registry.create(spec)
        model = nn.Sequential(nn.Linear(3, 3), made)
    if way == "swapped on meta":
        replace_activations(model, {"tanh": spec}, outputs=True)
    if way == "children alone":  # as Lightning's and FSDP's materialization do
        for module in model.modules():
            module.to_empty(device="cpu", recurse=False)
    elif way == "half":
        model.half().to_empty(device="cpu").float()
    elif way != "assign":
        model.to_empty(device="cpu")
    for module in model.modules():  # what to_empty leaves there is anything
        for value in (*module._parameters.values(), *(module._buffers[n] for n in module._buffers if n != "c")):
            if value is not None and not value.is_meta:
                value.data.fill_(-3)
    state = copy.deepcopy(expected.state_dict())
    model.load_state_dict(dict(state) if saved is None else state, assign=way == "assign")
    c = 0.25 if saved is None else saved
    assert (model[1].c.item(), model[1].c.dtype, model[1].c.device.type) == (c, torch.float32, "cpu")
    x = torch.randn(5, 3)
    expected[1].c.fill_(c)
    assert torch.equal(model(x), expected(x))


def test_single_numbers_keep_their_shape():
    for module in (NANIL(), NAH().eval(), NAN().double()):
        assert module(torch.tensor(2.0, dtype=torch.float64)).shape == ()
    assert vmap(NANIL().eval())(torch.randn(4)).shape == (4,)


@pytest.mark.parametrize("function", ["tanh", "sigmoid", "relu"])
def test_noise_on_the_input_vanishes_exactly(function):
    x = torch.cat([3 * torch.randn(1000), torch.tensor([0.0, 1e8, -1e8, torch.inf, -torch.inf])])
    module = NANI(function, c=0.0)
    expected = module.hard_function.hard(x)
    assert torch.equal(module.eval()(x), expected)
    assert torch.equal(module.train()(x), expected)


@pytest.mark.parametrize(
    "function", [nn.ReLU(inplace=True), lambda x: x.relu_(), nn.Sequential(nn.ReLU(True)), torch.relu_]
)
@pytest.mark.parametrize("name", ["normalized", "gpn"])
def test_functions_in_place_are_refused(function, name):
    from lightning_noisy.nn.gpn import GPNActivation

    with pytest.raises(ValueError, match="must not work in place"):
        (NormalizedActivation if name == "normalized" else GPNActivation)(function)


def test_function_without_a_gradient_passes_as_it_is():
    def step(x):
        return (x > 0).to(x.dtype)

    x = torch.randn(9)
    module = NormalizedActivation(step)
    assert torch.equal(module(x), step(x))
    assert module.num_batches_tracked == 0


def test_huge_numbers_in_double_precision_leave_the_running_values():
    for scale in (1e40, 1e200):
        module = NReLU()
        assert module(torch.randn(100, dtype=torch.float64) * scale).isfinite().all()
        assert module.running_mean == 0


def test_prelu_within_a_half_precision_module():
    module = NormalizedActivation(nn.Sequential(nn.PReLU())).bfloat16()
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    assert module(x.bfloat16()).dtype == torch.bfloat16
    assert module.running_rho_prime.item() == pytest.approx((1 + 0.25**2) / 2, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_fold(dtype):
    torch.manual_seed(0)
    layers = [module for _ in range(4) for module in (nn.Linear(16, 16), NReLU())]
    model = nn.Sequential(*layers, nn.Linear(16, 2))
    x = torch.randn(200, 16)
    model(x)
    model.to(dtype).eval()
    expected = model(x.to(dtype)).float().detach()
    fold_normalization(model, x.to(dtype))
    assert not any(isinstance(module, NReLU) for module in model)
    torch.testing.assert_close(model(x.to(dtype)).float(), expected, rtol=0, atol=0.05 * float(expected.abs().max()))
