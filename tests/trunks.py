"""Networks as people write them, and beside each the role of its activations, written down by hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributions import Normal
from torch.nn import functional as F

GENERATOR = torch.Generator().manual_seed(0)
IMAGE = torch.randn(4, 3, 16, 16, generator=GENERATOR)
ROWS = torch.randn(8, 6, generator=GENERATOR)
SERIES = torch.randn(4, 6, 20, generator=GENERATOR)


class SqueezeExcite(nn.Module):
    """MobileNetV3's: the trunk's activation is the other factor."""

    def __init__(self, channels=8):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.act, self.gate = nn.ReLU(), nn.Sigmoid()

    def forward(self, x):
        scale = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.expand(self.act(self.reduce(scale))))


class DepthwiseSE(nn.Module):
    """EfficientNet's block: squeeze and excitation after the depthwise convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.act1, self.act2, self.se = nn.SiLU(inplace=True), nn.SiLU(inplace=True), SqueezeExcite()
        self.project, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

    def forward(self, x):
        x = self.act1(self.stem(x))
        x = x + self.project(self.se(self.act2(self.norm(self.depthwise(x)))))
        return self.head(x.mean((2, 3)))


class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2's."""

    def __init__(self, channels=8):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        norm = x.norm(p=2, dim=1, keepdim=True)
        norm = norm / (norm.mean(-1, keepdim=True) + 1e-6)
        return x + self.gamma * (x * norm) + self.beta


class ResponseNormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.norm, self.last = nn.Linear(6, 8), nn.GELU(), GlobalResponseNorm(), nn.Linear(8, 6)
        self.scale, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(x + self.scale * self.last(self.norm(self.act(self.first(x)))))


class GLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down, self.both = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 12)

    def forward(self, x):
        x = self.down(F.silu(self.gate(x)) * self.up(x))
        a, b = self.both(x).chunk(2, -1)
        return self.gate(F.gelu(a) * b)


class GatedConv(nn.Module):
    """PixelCNN's and WaveNet's: tanh and sigmoid of two maps."""

    def __init__(self, channels=6):
        super().__init__()
        self.filter, self.gate = nn.Conv1d(channels, 6, 1), nn.Conv1d(channels, 6, 1)

    def forward(self, x):
        return torch.tanh(self.filter(x)) * torch.sigmoid(self.gate(x))


class WaveNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([GatedConv(), GatedConv()])
        self.skips = nn.ModuleList([nn.Conv1d(6, 6, 1), nn.Conv1d(6, 6, 1)])
        self.out = nn.Sequential(nn.ReLU(), nn.Conv1d(6, 6, 1), nn.ReLU(), nn.Conv1d(6, 4, 1))

    def forward(self, x):
        total = 0
        for layer, skip in zip(self.layers, self.skips, strict=True):
            y = layer(x)
            total = total + skip(y)
            x = x + y
        return self.out(total)


class FiLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.gamma, self.beta, self.head = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x, y):
        return self.head(F.relu(self.body(x)) * self.gamma(y) + self.beta(y))


class Highway(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.gate, self.head = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        t = torch.sigmoid(self.gate(x))
        return self.head(t * F.relu(self.body(x)) + (1 - t) * x)


class Mixes(nn.Module):
    """Gates by other operations than a product."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.head = (nn.Linear(6, 6) for _ in range(6))

    def forward(self, x):
        x = torch.lerp(x, self.a(x), torch.sigmoid(self.b(x)))
        x = torch.addcmul(x, self.c(x), F.hardsigmoid(self.d(x)))
        x = torch.einsum("ij,ij->ij", self.a(x), torch.sigmoid(self.e(x)))
        g = torch.sigmoid(self.c(x))
        x = g / g.sum(-1, keepdim=True) * self.b(x)
        return self.head(x / (1 + F.softplus(self.d(x))))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.middle, self.up = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(16, 8, 1),
        )
        self.act, self.last = nn.ReLU(inplace=True), nn.Conv2d(8, 1, 1)

    def forward(self, x):
        skip = self.act(self.down(x))
        y = self.act(self.middle(F.max_pool2d(skip, 2)))
        y = torch.cat([F.interpolate(y, scale_factor=2), skip], 1)
        return torch.sigmoid(self.last(self.act(self.up(y))))


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm1d(6 + 4 * i), nn.ReLU(), nn.Linear(6 + 4 * i, 4)) for i in range(2)
        )
        self.head = nn.Linear(14, 2)

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(F.relu(torch.cat(features, 1)))


class PreActivation(nn.Module):
    """ResNet v2: the activation follows a norm, which follows the addition."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.norm1, self.norm2, self.fc1, self.fc2 = nn.LayerNorm(6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.act = nn.ReLU()

    def forward(self, x):
        x = self.stem(x)
        x = x + self.fc1(self.act(self.norm1(x)))
        x = x + self.fc2(self.act(self.norm2(x)))
        return self.head(F.relu(x))


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), nn.Linear(6, 1)

    def encode(self, x):
        return F.tanh(self.encoder(x))

    def forward(self, a, b):
        return torch.sigmoid(self.head(self.encode(a) - self.encode(b)))


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.mean, self.std = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 2)
        self.dec, self.out = nn.Linear(2, 8), nn.Linear(8, 6)

    def forward(self, x):
        h = F.relu(self.enc(x))
        mean, std = self.mean(h), F.softplus(self.std(h))
        z = mean + std * torch.randn_like(std)
        return torch.sigmoid(self.out(F.relu(self.dec(z)))), mean, std


class GAN(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh())
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1), nn.Sigmoid())

    def forward(self, z):
        return self.critic(self.generator(z))


class Experts(nn.Module):
    """A mixture of experts."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)) for _ in range(3))
        self.router, self.head = nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x):
        weights = self.router(x).softmax(-1)
        x = sum(weights[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        return self.head(x)


class Masked(nn.Module):
    """Factors that gate nothing: a mask, itself, a parameter, dropout by hand."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = (nn.Linear(6, 6) for _ in range(4))
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x, mask):
        x = F.relu(self.a(x)) * mask
        h = F.relu(self.b(x))
        x = h * h
        x = F.relu(self.c(x)) * self.scale
        return self.head(x * (torch.rand_like(x) > 0.5).float())


@dataclass
class Prediction:
    mean: torch.Tensor
    extra: dict


class Heads(nn.Module):
    """Outputs on their way out."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(6))

    def forward(self, x):
        h = F.relu(self.body(x))
        a, b, c, d, e, f = (head(h) for head in self.heads)
        boxes = torch.cat([torch.sigmoid(a), b], 1)
        counts = torch.stack([F.softplus(c), F.relu(d)])
        limited = torch.sigmoid(e).clamp(1e-4, 1 - 1e-4)
        return Prediction(boxes, {"counts": counts, "limited": limited[:, :1], "law": Normal(f, F.softplus(f))})


class Formulas(nn.Module):
    """Activations by formula: GELU, swish and mish."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        x = self.a(x)
        x = 0.5 * x * (1 + torch.tanh(0.797885 * (x + 0.044715 * x**3)))
        x = self.b(x)
        x = x * torch.sigmoid(x)
        x = self.c(x)
        x = x * torch.tanh(F.softplus(x))
        return 30 * torch.tanh(self.head(x) / 30)  # a soft cap


class OwnFunctions(nn.Module):
    """PReLU, leaky ReLU, log-sigmoid and a shifted leaky ReLU by hand, linear attention; and what is no formula."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.q, self.k, self.v, self.d, self.head = (nn.Linear(6, 6) for _ in range(8))
        self.slope = nn.Parameter(torch.tensor(0.25))

    def forward(self, x):
        x = self.a(x)
        x = F.relu(x) - self.slope * F.relu(-x)
        x = self.b(x)
        x = torch.maximum(F.relu(x), 0.01 * x)
        x = self.c(x)
        x = self.d(x.clamp(max=0) - F.softplus(-x.abs()))
        x = self.c(F.leaky_relu(x, 0.1) - 0.4)
        q, k = F.elu(self.q(x)) + 1, F.elu(self.k(x)) + 1
        x = torch.einsum("nd,me,mf->nf", q, k, self.v(x)) / len(x)
        x = self.d(x) + sum(F.relu(layer(x)) for layer in (self.a, self.b))  # a sum from 0 on
        return self.head(torch.tanh(self.c(x)) + self.b(x))


class PositionBias(nn.Module):
    """Swin V2's: a network of the positions makes a bias; its activations are part of a weight."""

    def __init__(self):
        super().__init__()
        self.first, self.net = nn.Linear(6, 6), nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        self.register_buffer("positions", torch.arange(16.0).view(8, 2))
        self.last = nn.Linear(6, 2)

    def forward(self, x):
        bias = 16 * torch.sigmoid(self.net(self.positions))
        return self.last(F.gelu(self.first(x)) + bias)


class FromNoise(nn.Module):
    """A generator that draws its input, and scales noise by a parameter, as StyleGAN's does."""

    def __init__(self):
        super().__init__()
        self.net, self.w = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Parameter(torch.ones(6, 8))
        self.mid, self.last, self.strength = nn.Linear(8, 8), nn.Linear(8, 6), nn.Parameter(torch.zeros(8))

    def forward(self, x):
        h = self.net(torch.randn(len(x), 6)) + F.gelu(torch.randn(len(x), 6) @ self.w)
        return torch.tanh(self.last(F.leaky_relu(self.mid(h) + self.strength * torch.randn_like(h))))


class HyperNetwork(nn.Module):
    """Computes the weight of a layer."""

    def __init__(self):
        super().__init__()
        self.first, self.hyper = nn.Linear(6, 8), nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16))

    def forward(self, x):
        weight = self.hyper(x.mean(0)).view(2, 8)
        return F.softplus(F.linear(torch.tanh(self.first(x)), weight))


class Filtered(nn.Module):
    """Blurs an output by a fixed kernel, as SSIM does, and features on their way to a layer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("kernel", torch.full((3, 1, 3, 3), 1 / 9))

    def forward(self, x):
        x = F.conv2d(F.relu(self.first(x)), self.kernel, padding=1, groups=3)
        return F.conv2d(torch.sigmoid(self.last(x)), self.kernel, groups=3)


class RecurrentCell(nn.Module):
    """An LSTM by hand."""

    def __init__(self):
        super().__init__()
        self.x, self.h, self.head = nn.Linear(6, 24), nn.Linear(6, 24), nn.Linear(6, 2)

    def forward(self, series):
        h = c = torch.zeros(len(series), 6)
        for x in series.unbind(-1):
            i, f, g, o = (self.x(x) + self.h(h)).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.head(h)


class Positive(nn.Module):
    """What would break if it were no longer positive, bounded, or a weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.head = (nn.Linear(6, 6) for _ in range(5))
        self.weights = nn.Parameter(torch.ones(2))

    def forward(self, x):
        weights = F.relu(self.weights)
        weights = weights / (weights.sum() + 1e-4)
        x = weights[0] * self.a(x) + weights[1] * self.b(x)
        x = self.c(torch.sqrt(F.softplus(x)))
        x = self.d(50 * torch.tanh(x / 50))
        x = self.a(Normal(x, F.softplus(self.b(x)) + 1e-4).rsample())
        std = torch.exp(0.5 * torch.tanh(self.c(x)))
        return self.head(x + std * torch.randn_like(std))


# Model, inputs, and the role of each site; where a pass of symbols can't see it, the inputs alone.
TRUNKS = {
    "squeeze and excitation": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), SqueezeExcite(), nn.Conv2d(8, 2, 1)), (IMAGE,),
        {"1": "hidden", "2.act": "hidden", "2.gate": "gate"},
    ),
    "depthwise": (DepthwiseSE, (IMAGE,), {"act1": "hidden", "act2": "hidden", "se.act": "hidden", "se.gate": "gate"}),
    "response norm": (ResponseNormed, (ROWS,), {"act": "hidden"}),
    "glu": (GLU, (ROWS,), {":silu#0": "gate", ":gelu#0": "gate"}),
    "wavenet": (WaveNet, (SERIES,), {
        "layers.0:tanh#0": "hidden", "layers.0:sigmoid#0": "gate", "layers.1:tanh#0": "hidden",
        "layers.1:sigmoid#0": "gate", "out.0": "residual", "out.2": "hidden",
    }),
    "film": (FiLM, (ROWS, ROWS + 1), {":relu#0": "hidden"}),
    "highway": (Highway, (ROWS,), {":sigmoid#0": "gate", ":relu#0": "hidden"}),
    "mixes": (Mixes, (ROWS,), {
        ":sigmoid#0": "gate", ":hardsigmoid#0": "gate", ":sigmoid#1": "gate", ":sigmoid#2": "gate",
        ":softplus#0": "gate",
    }),
    "u-net": (UNet, (IMAGE,), {"act": "hidden", "act#2": "hidden", "act#3": "hidden", ":sigmoid#0": "output"}),
    "densenet": (DenseNet, (ROWS,), {"layers.0.1": "hidden", "layers.1.1": "hidden", ":relu#0": "hidden"}),
    "pre-activation": (PreActivation, (ROWS,), {"act": "hidden", "act#2": "hidden", ":relu#0": "residual"}),
    "siamese": (Siamese, (ROWS, ROWS + 1), {"encoder.1": "hidden", ":tanh#0": "hidden", ":sigmoid#0": "output"}),
    "vae": (VAE, (ROWS,), {
        ":relu#0": "hidden", ":softplus#0": "formula", ":relu#1": "hidden", ":sigmoid#0": "output",
    }),
    "gan": (GAN, (ROWS,), {
        "generator.1": "hidden", "generator.3": "hidden", "critic.1": "hidden", "critic.3": "output",
    }),
    "experts": (Experts, (ROWS,), {f"experts.{i}.1": "hidden" for i in range(3)}),
    "masked": (Masked, (ROWS, torch.ones(8, 6)), {":relu#0": "hidden", ":relu#1": "hidden", ":relu#2": "hidden"}),
    "heads": (Heads, (ROWS,), {
        ":relu#0": "hidden", ":sigmoid#0": "output", ":softplus#0": "output", ":relu#1": "output",
        ":sigmoid#1": "output", ":softplus#1": "output",
    }),
    "positive": (Positive, (ROWS,), {
        ":relu#0": "formula", ":softplus#0": "formula", ":tanh#0": "formula", ":softplus#1": "formula",
        ":tanh#1": "formula",
    }),
    "formulas": (Formulas, (ROWS,), {
        ":tanh#0": "formula", ":sigmoid#0": "formula", ":softplus#0": "formula", ":tanh#1": "formula",
        ":tanh#2": "formula",
    }),
    "own functions": (OwnFunctions, (ROWS,), {
        ":relu#0": "formula", ":relu#1": "formula", ":relu#2": "formula", ":softplus#0": "formula",
        ":leaky_relu#0": "formula", ":elu#0": "formula", ":elu#1": "formula", ":relu#3": "hidden",
        ":relu#3@2": "hidden", ":tanh#0": "hidden",
    }),
    "filtered": (Filtered, (IMAGE,), {":relu#0": "hidden", ":sigmoid#0": "output"}),
    "from noise": (FromNoise, (ROWS,), {
        "net.1": "hidden", ":gelu#0": "hidden", ":leaky_relu#0": "hidden", ":tanh#0": "output",
    }),
    "hypernetwork": (HyperNetwork, (ROWS,), {"hyper.1": "hidden", ":tanh#0": "hidden", ":softplus#0": "output"}),
    "position bias": (PositionBias, (ROWS,), {"net.1": "formula", ":sigmoid#0": "formula", ":gelu#0": "hidden"}),
    "recurrent": (RecurrentCell, (SERIES,), {
        ":sigmoid#0": "gate", ":sigmoid#1": "gate", ":tanh#0": "hidden", ":sigmoid#2": "gate", ":tanh#1": "residual",
    }),
}  # fmt: skip
