"""What is found in networks, from tags that NumPy computes."""

import pytest
import torch
from networks import normal, perceptron, sites_of, tags_of, trained
from torch import nn
from torch.nn import functional as F

from lightning_noisy.monitoring.diagnosis import diagnose

# Without options a monitor records these.
DEFAULT = ("rho", "rho_prime", "saturation", "dead_units", "mean", "std", "input_std", "rejected")
HE, LECUN, TANH = normal(2), normal(1), normal((5 / 3) ** 2)


class Mean(nn.Module):
    def __init__(self, *dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return x.mean(self.dims)


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()
        self.act2.role = "residual"

    def forward(self, x):
        return self.act2(x + self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x))))))


class Block(nn.Module):
    """Of a Transformer, with the normalization first."""

    def __init__(self, width, act):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up, self.act, self.down = nn.Linear(width, 2 * width), act, nn.Linear(2 * width, width)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(self.act(self.up(self.norm2(x))))


def convolutional():
    stem = (nn.Unflatten(1, (1, 8, 8)), nn.Upsample(scale_factor=2), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8))
    blocks = [Residual(8) for _ in range(3)]
    return nn.Sequential(*stem, nn.ReLU(), *blocks, Mean(2, 3), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 10))


def transformer(act=nn.GELU):
    blocks = [Block(16, act()) for _ in range(4)]
    head = (nn.LayerNorm(16), Mean(1), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 10))
    return nn.Sequential(
        nn.Upsample(128), nn.Unflatten(2, (128, 1)), nn.Flatten(1, 2), nn.Linear(1, 16), *blocks, *head
    )


def tokens(model):
    return nn.Sequential(nn.Unflatten(1, (1, 64)), model)


def autoencoder():
    output = nn.Sigmoid()
    output.role = "output"
    layers = (nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4), nn.Linear(4, 32), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(32, 64), output)


def layer_norm_after():
    layers = (nn.Linear(64, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.LayerNorm(64))
    return nn.Sequential(*layers, nn.Linear(64, 10))


def data(count, rows=64, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(64, 10, generator=generator)
    xs = [torch.randn(rows, 64, generator=generator) for _ in range(count)]
    return [(x * scale + shift, (x @ truth).argmax(1)) for x in xs]


HEALTHY = {
    "he 5": lambda: perceptron(5, nn.ReLU, HE),
    "he 30": lambda: perceptron(30, nn.ReLU, HE),
    "xavier tanh 30": lambda: perceptron(30, nn.Tanh, LECUN),
    "tanh with torch's gain 20": lambda: perceptron(20, nn.Tanh, TANH),
    "batch norm relu 20": lambda: perceptron(20, nn.ReLU, LECUN, norm=nn.BatchNorm1d),
    "batch norm tanh 20": lambda: perceptron(20, nn.Tanh, LECUN, norm=nn.BatchNorm1d),
    "batch norm sigmoid 10": lambda: perceptron(10, nn.Sigmoid, LECUN, norm=nn.BatchNorm1d),
    "lecun selu 20": lambda: perceptron(20, nn.SELU, LECUN),
    "he gelu 8": lambda: perceptron(8, nn.GELU, HE),
    "residual with pooling and head": convolutional,
    "transformer with pooling and head": lambda: tokens(transformer()),
    "transformer of tanh": lambda: tokens(transformer(nn.Tanh)),
    "autoencoder": autoencoder,
    "small output": lambda: nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1)),
    "inputs of 10,000": layer_norm_after,
    "inputs of 1/10,000": layer_norm_after,
    "bytes": layer_norm_after,
}
SCALES = {"inputs of 10,000": (1e4, 0.0), "inputs of 1/10,000": (1e-4, 0.0), "bytes": (64.0, 128.0)}


def loss_of(name):
    if name == "autoencoder":
        return lambda output, target: F.binary_cross_entropy(output, (output.detach() > 0.5).float())
    if name == "small output":
        return lambda output, target: F.mse_loss(output[:, 0], target.float())
    return F.cross_entropy


@pytest.mark.parametrize("momentum", [None, 0.9], ids=["Adam", "SGD"])
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_network_has_no_findings(name, momentum):
    torch.manual_seed(0)
    model = HEALTHY[name]()
    batches = data(51, 8 if name.startswith("transformer") else 64, *SCALES.get(name, ()))
    history = trained(model, batches, loss_of(name), lr=1e-3, momentum=momentum)
    sites = sites_of(model)
    assert len(history) == 6
    assert all(f"rho/{site.name}" in history[0][1] for site in sites)
    for some in (history[:1], history[:2], history):
        assert diagnose(some, sites) == []
        assert diagnose([(step, default(tags)) for step, tags in some], sites) == []


def default(tags):
    return {tag: value for tag, value in tags.items() if tag.partition("/")[0] in DEFAULT}


def with_bias(model, bias):
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.constant_(layer.bias, bias)
    return model


SICK = {
    "weights of a tenth 20": (lambda: perceptron(20, nn.ReLU, normal(0.02)), "vanishing_signal"),
    "xavier relu 20": (lambda: perceptron(20, nn.ReLU, LECUN), "vanishing_signal"),
    "small tanh 10": (lambda: perceptron(10, nn.Tanh, normal(0.09)), "vanishing_signal"),
    "large relu 10": (lambda: perceptron(10, nn.ReLU, normal(64)), "exploding_signal"),
    "sigmoid 10": (lambda: perceptron(10, nn.Sigmoid, LECUN), "vanishing_gradient"),
    "tanh of tenfold weights": (lambda: perceptron(6, nn.Tanh, normal(100)), "saturation"),
    "dead": (lambda: with_bias(perceptron(5, nn.ReLU, HE), -100), "dead_units"),
    "zeros": (lambda: perceptron(5, nn.ReLU, nn.init.zeros_), "constant_input"),
}


@pytest.mark.parametrize("name", SICK)
def test_sick_network_has_its_finding_at_the_top(name):
    torch.manual_seed(0)
    make, kind = SICK[name]
    model = make()
    tags = tags_of(model, data(1)[0], F.cross_entropy)
    assert diagnose([(0, tags)], sites_of(model))[0].kind == kind
    assert diagnose([(0, default(tags))], sites_of(model))[0].kind == kind


@pytest.mark.parametrize("gain", [0.5, 1.0, 1.5])
def test_gradient_that_is_estimated_through_sigmoids_is_near_the_measured_one(gain):
    torch.manual_seed(0)
    model = perceptron(8, nn.Sigmoid, normal(gain), width=256)
    generator = torch.Generator().manual_seed(2)
    batch = (torch.randn(64, 256, generator=generator), torch.randint(10, (64,), generator=generator))
    tags, sites = tags_of(model, batch, F.cross_entropy), sites_of(model)
    (found,) = (each for each in diagnose([(0, default(tags))], sites) if each.kind == "vanishing_gradient")
    measured = tags[f"grad_rms/{sites[0].name}"] / tags[f"grad_rms/{sites[-1].name}"]
    assert measured < 1e-2
    assert 1 / 3 < found.value / measured < 3
