import copy
import gc
import math
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

from lightning_noisy import replace_activations
from lightning_noisy.monitoring.recorder import ActivationRecorder
from lightning_noisy.nn import NormalizedActivation, NReLU


def record(model, *inputs, threshold=0.05):
    recorder = ActivationRecorder(model, saturation_threshold=threshold)
    with recorder:
        for x in inputs:
            model(x)
    result: dict[str, list[float]] = {}
    for name, value in recorder.compute().items():
        result.setdefault(name.split("/")[0], []).append(value)
    return result


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_recorder_sees_the_closed_forms_of_relu_on_normal_input():
    result = record(nn.ReLU(), normal(1000, 1000))
    for name in ("rho", "rho_prime", "saturation", "sparsity"):
        assert result[name] == pytest.approx([0.5], abs=0.005), name


def test_recorder_takes_the_saturation_of_tanh_on_both_sides():
    # |tanh'| < 0.05 where |x| > artanh(sqrt(0.95)) = 2.1783
    x = torch.tensor([-5.0, -2.2, -2.1, 0.0, 2.1, 2.2, 5.0, 5.0])
    assert record(nn.Tanh(), x)["saturation"] == [5 / 8]
    assert record(nn.Sigmoid(), 2 * x)["saturation"] == [5 / 8]  # its largest slope is 1/4


def test_recorder_measures_a_normalized_activation_as_it_stands():
    x = normal(500, 100)
    result = record(NReLU(), x)
    (rho,), (rho_prime,) = result["rho"], result["rho_prime"]
    assert 2 / (1 / rho + 1 / rho_prime) == pytest.approx(1, rel=1e-4)
    # Inactive and saturated are judged before scale and shift.
    share = (x <= 0).double().mean().item()
    assert result["sparsity"] == result["saturation"] == pytest.approx([share], abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_recorder_finds_the_inactive_elements_of_a_normalized_activation_at_any_scale(dtype):
    # Undoing scale and shift in floating point would put zeros on either side of 0.
    for seed in range(50):
        module = NReLU()
        x = torch.randn(40, 40, generator=torch.Generator().manual_seed(seed)).to(dtype)
        assert record(module, x)["sparsity"] == pytest.approx([(x <= 0).double().mean().item()], abs=1e-6)


def test_recorder_of_a_swapped_model_equals_one_of_a_model_built_that_way():
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)]
    built = nn.Sequential(layers[0], NormalizedActivation(nn.Tanh()), layers[2])
    expected = record(built, normal(500, 8))
    assert record(replace_activations(nn.Sequential(*layers), "normalized"), normal(500, 8)) == expected


def test_recorder_tells_the_replacements_of_an_alias_apart():
    act = nn.ReLU()
    model = replace_activations(nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act), "nrelu")
    recorder = ActivationRecorder(model)
    with recorder:
        model(normal(50, 4))
    assert recorder.sums.table[:, 0].tolist() == [200, 200]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 16])
def test_recorder_measures_prelu(dtype, channels):
    x = normal(200, 16, 3).to(dtype)
    result = record(nn.PReLU(channels).to(dtype), x)
    share = (x > 0).double().mean().item()
    assert result["rho_prime"] == pytest.approx([share + (1 - share) * 0.25**2], rel=1e-5)
    normalized = replace_activations(nn.Sequential(nn.PReLU(channels).to(dtype)), "normalized", outputs=True)
    assert record(normalized, x)["saturation"] == [0]


def test_recorder_works_in_inference_mode():
    with torch.inference_mode():
        teacher = record(nn.Sequential(nn.GELU(), replace_activations(nn.Tanh(), "normalized")), normal(50, 8))
    assert teacher["rho"] == pytest.approx(record(nn.Sequential(nn.GELU(), nn.Tanh()), normal(50, 8))["rho"], rel=1e-5)


def test_recorder_leaves_out_what_it_cannot_measure_and_says_so_once():
    class Gated(nn.Sigmoid):
        def forward(self, x, gate):
            return torch.sigmoid(x) * gate

    model = nn.ModuleList([Gated(), nn.Tanh()])
    recorder = ActivationRecorder(model)
    recorder.attach()
    with pytest.warns(UserWarning, match="'0' can't be measured, and is left out"):
        model[1](model[0](normal(5, 5), normal(5, 5)))
    model[1](model[0](normal(5, 5), normal(5, 5)))  # a second warning would be an error
    recorder.detach()
    assert recorder.sums.table[:, 0].tolist() == [0, 50]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ELU, nn.SiLU])
def test_recorder_sees_the_input_of_an_in_place_activation(activation):
    x = normal(100, 10)
    plain = record(activation(), x.clone())
    inplace = record(activation(inplace=True), x.clone())
    assert {name: pytest.approx(value, rel=1e-6) for name, value in plain.items()} == inplace
    h = normal(100, 10)
    assert record(replace_activations(activation(inplace=True), "nrelu"), h)["rho"] != [1.0]


def test_recorder_counts_a_checkpointed_block_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    recorder = ActivationRecorder(model)
    for use_reentrant in (False, True):
        with recorder:
            x = normal(8, 4).requires_grad_()
            checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    assert recorder.sums.table[0, 0] == 2 * 32


@pytest.mark.parametrize("to", [None, "nsw", "normalized"])
def test_recorder_changes_neither_values_nor_gradients_nor_random_states(to):
    def run(*, recorded):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 6), nn.RReLU(), nn.Dropout(), nn.Linear(6, 6), nn.ELU(inplace=True), nn.Linear(6, 6)
        )
        if to:
            replace_activations(model, to)
        recorder = ActivationRecorder(model)
        if recorded:
            recorder.attach()
        for seed in range(3):
            torch.manual_seed(seed)
            y = model(torch.randn(5, 6))
            y.square().sum().backward()
        recorder.detach()
        return [y, torch.get_rng_state(), *model.buffers(), *(p.grad for p in model.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(run(recorded=False), run(recorded=True), strict=True))


def test_recorder_leaves_no_hooks_behind():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Tanh())

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    recorder = ActivationRecorder(model)
    for _ in range(2):
        recorder.attach()
        recorder.attach()
        assert hooks() == 2 + 1  # before and after what overwrites its input
        recorder.detach()
        recorder.detach()
        assert hooks() == 0
    model[1].forward = None
    with pytest.raises(TypeError), recorder:
        model(torch.zeros(2, 2))
    assert hooks() == 0


def test_recorder_tells_the_places_of_a_shared_module_apart():
    act = nn.Tanh()
    model = nn.Sequential(nn.Linear(2, 2), act, nn.Linear(2, 2), act)
    nn.init.zeros_(model[2].weight)
    nn.init.constant_(model[2].bias, 3.0)
    recorder = ActivationRecorder(model)
    for _ in range(2):
        with recorder:
            model(normal(10, 2))
    assert [site.name for site in recorder.sites] == ["1", "3"]
    assert recorder.sums.table[:, 0].tolist() == [40, 40]
    assert recorder.sums.table[1, 1] == pytest.approx(3 * 40)


@pytest.mark.parametrize("batch", [2, 64])
def test_recorder_number_of_statistics_does_not_depend_on_the_batch(batch):
    result = record(nn.Sequential(nn.ReLU(), nn.Tanh()), normal(batch, 3))
    sizes = {name: len(value) for name, value in result.items()}
    assert sizes == dict.fromkeys(("rho", "rho_prime", "r_score", "saturation", "sparsity", "dead_units"), 2)


def test_recorder_records_under_autocast_and_keyword_arguments():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.act = nn.Linear(8, 8), nn.SiLU()

        def forward(self, x):
            return self.act(input=self.linear(x))

    model = Keyword()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = record(copy.deepcopy(model), normal(64, 8))
    assert result["rho"] == pytest.approx(record(model, normal(64, 8))["rho"], rel=0.02)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_model_that_is_copied_while_it_is_recorded_works_and_is_not_recorded(twin_of):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    recorder = ActivationRecorder(model)
    x = normal(8, 4)
    with recorder:
        twin = twin_of(model)
        assert torch.equal(twin(x), model(x))
    assert recorder.sums.table[0, 0] == 32
    with recorder:
        twin(x)
    assert recorder.sums.table[0, 0] == 32


def test_recorder_keeps_no_activation_alive():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2), nn.ReLU(inplace=True))
    alive = []
    for module in model:
        module.register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))
    recorder = ActivationRecorder(model)
    with recorder:
        model(normal(8, 4)).sum().backward()
        gc.collect()
        assert [each() for each in alive] == [None] * 4


class LargestMemory(TorchDispatchMode):
    """The most bytes that tensors made in this context have at a time."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self._known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_iter(output):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known | self._known:
                storage = x.untyped_storage()
                self._known.add(storage.data_ptr())
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, storage.data_ptr(), storage.nbytes())
                self.most = max(self.most, self.now)
        return output

    def _forget(self, address, size):
        self._known.discard(address)
        self.now -= size


@pytest.mark.parametrize("act", [nn.ReLU(True), nn.GELU(), nn.Tanh(), nn.Sigmoid(), nn.Softplus(), NReLU()], ids=repr)
def test_recording_allocates_less_than_an_activation(act):
    """Sums take some samples at a time: what they need stays in the cache."""
    h = normal(64, 32, 32, 32)
    model = nn.Sequential(nn.Identity(), act)
    recorder = ActivationRecorder(model)
    with recorder, torch.no_grad():
        y = act.forward(h.clone())
        with LargestMemory() as memory:
            finish = recorder._start(0, [h], lambda: (act, act))
            finish(y)
    assert recorder.sums.table[0, 0] == h.numel()
    assert 0 < memory.most < h.nbytes


def test_undefined_numbers_are_recorded_as_such_and_leave_the_pass_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU())
    x = normal(8, 4)
    x[0, 0] = float("nan")
    expected = model(x)
    recorder = ActivationRecorder(model)
    with recorder:
        assert torch.equal(model(x).nan_to_num(-7), expected.nan_to_num(-7))
    values = recorder.compute()
    assert all(math.isnan(values[f"rho/{name}"]) for name in ("1", "3"))


def test_sparsity_of_an_untrained_relu_network_on_digits_is_one_half():
    """Table 1 of Pretorius et al. (2019): 49 to 51 % for 4 x 200 units with Glorot's initialization."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    images = torch.tensor(datasets.load_digits().images, dtype=torch.float32)[:, None] / 16
    x = nn.functional.interpolate(images, size=(28, 28), mode="bilinear").flatten(1)
    shares = []
    for seed in range(5):
        torch.manual_seed(seed)
        layers = [layer for size in (784, 200, 200, 200) for layer in (nn.Linear(size, 200), nn.ReLU())]
        model = nn.Sequential(*layers, nn.Linear(200, 10))
        for layer in model[::2]:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        shares.append(record(model, x)["sparsity"])
    assert np.mean(shares) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("called_as", [lambda x: x.tanh(), torch.tanh, nn.functional.tanh, nn.Tanh()])
def test_recorder_sees_calls_in_any_place_of_the_code(called_as):
    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.hold = nn.functional.silu

        def forward(self, x):
            for layer in self.layers:
                x = torch.relu(layer(x))
            x = self.hold(self.inner(x))
            parts = [nn.functional.gelu(each) for each in x.split(2, 1)]
            leaky = checkpoint(
                lambda x: nn.functional.leaky_relu(x, negative_slope=0.2), torch.cat(parts, 1), use_reentrant=False
            )
            return leaky + called_as(x)

        def inner(self, x):
            return x.sigmoid() * nn.functional.softplus(x, 2.0)

    model, x = Places(), normal(6, 4)
    recorder = ActivationRecorder(model)
    with recorder:
        model(x).sum().backward()
    counts = dict(zip([site.name for site in recorder.sites], recorder.sums.table[:, 0].tolist(), strict=True))
    names = ("hold", ":gelu#0", ":leaky_relu#0", ":sigmoid#0", ":softplus#0")
    assert {name: counts[name] for name in names} == dict.fromkeys(names, 24)
    assert counts[":relu#0"] == 72  # the loop can't be traced


def test_recorder_tells_the_passes_of_a_loop_apart():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.act = nn.Tanh()

        def forward(self, x):
            for layer in self.layers:
                x = self.act(torch.relu(layer(x)))
            return self.layers[0](x)

    model, x, seen = Loop(), normal(6, 4), []
    recorder = ActivationRecorder(model)
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output.sum().item()))
    with recorder:
        model(x)
        model(-x)
    sums = dict(zip([site.name for site in recorder.sites], recorder.sums.table[:, 1].tolist(), strict=True))
    for number, name in enumerate((":relu#0", ":relu#0@2", ":relu#0@3")):
        assert sums[name] == pytest.approx(seen[number] + seen[4 + number], rel=1e-4)
    assert recorder.sums.table[:, 0].tolist() == [48] * 6


def test_module_shared_by_containers_is_told_apart_by_who_calls_it():
    act = nn.ReLU()

    class Coder(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Sequential(nn.Linear(4, 8), act, nn.Linear(8, 8))
            self.encoder = nn.Sequential(nn.Linear(8, 8), act, nn.Linear(8, 4))
            self.act = act

        def forward(self, x):
            return self.act(self.decoder(self.encoder(x) * 10) - 5)

    torch.manual_seed(0)
    model, x, sums = Coder(), normal(32, 8), {}
    for name, layer in (("decoder.1", model.decoder[0]), ("encoder.1", model.encoder[0])):
        layer.register_forward_hook(lambda module, args, output, name=name: sums.update({name: output.sum().item()}))
    recorder = ActivationRecorder(model)
    with recorder:
        y = model.decoder(model.encoder(x) * 10) - 5
        recorder.reset()
        model(x)
    found = dict(zip([site.name for site in recorder.sites], recorder.sums.table[:, 1].tolist(), strict=True))
    expected = {**sums, "act": y.sum().item()}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ((nn.Conv1d(3, 6, 3, padding=1), nn.GroupNorm(2, 6)), (5, 3, 7)),
        ((nn.Conv1d(3, 6, 3, padding=1), nn.InstanceNorm1d(6)), (5, 3, 7)),
        ((nn.Conv1d(3, 6, 3, padding=1),), (5, 3, 7)),
        ((nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)), (5, 3, 7, 7)),
        ((nn.Linear(3, 6),), (5, 7, 3)),
        ((nn.Linear(3, 6), nn.LayerNorm(6)), (5, 7, 7, 3)),
    ],
)
def test_units_are_in_the_dimension_of_the_layer_before(layers, shape):
    class Shift(nn.Module):
        def forward(self, x):
            dim = 1 if isinstance(layers[0], (nn.Conv1d, nn.Conv2d)) else -1
            return x - torch.tensor([0.0, 50, 50, 0, 50, 0]).view(-1, *[1] * (x.dim() - 2 if dim == 1 else 0))

    with torch.no_grad():
        if len(layers) == 1 or isinstance(layers[-1], nn.BatchNorm2d):
            target = layers[-1]
        else:
            target = layers[-1] if getattr(layers[-1], "bias", None) is not None else None
        if target is None:
            model = nn.Sequential(*layers, Shift(), nn.ReLU())
        else:
            target.bias.copy_(torch.tensor([1.0, -50, -50, 1, -50, 1]))  # whatever the random weights are
            model = nn.Sequential(*layers, nn.ReLU())
    assert record(model, normal(*shape))["dead_units"] == [0.5]


def test_undefined_elements_are_no_sign_of_death():
    x = normal(16, 4)
    x[3, 2] = float("nan")
    assert record(nn.ReLU(), x)["dead_units"] == [0]
    assert record(nn.Sigmoid(), x)["dead_units"] == [0]


def test_gain_of_a_constant_input_is_undefined():
    assert all(math.isnan(value) for value in record(nn.ReLU(), torch.ones(5, 5))["rho"])
