"""The ways in which models apply activation functions: one small model for each."""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import relu as relu_function
from torch.utils.checkpoint import checkpoint

from lightning_noisy.nn import NSwish
from lightning_noisy.replacement.recognition import FUNCTIONS, METHODS

GLOBAL_ACT = nn.ReLU()


class CallCounter(torch.overrides.TorchFunctionMode):
    """Counts calls of activation functions and methods, those that others make within left out."""

    def __init__(self):
        super().__init__()
        self.count, self.inside = 0, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        known = func in FUNCTIONS or (name in METHODS and getattr(torch.Tensor, name, None) is func)
        if not known or self.inside:
            return func(*args, **(kwargs or {}))
        self.count += 1
        self.inside = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.inside = False


class BasicBlock(nn.Module):
    """Of a ResNet: one ReLU, used twice, the second time after the residual addition."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """As a ResNet-18, with fewer channels: 17 calls of 9 instances, 8 of them after a residual addition."""

    def __init__(self, width=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        inputs = width
        for stage in range(4):
            outputs = width * 2**stage
            blocks = BasicBlock(inputs, outputs, 1 + (stage > 0)), BasicBlock(outputs, outputs, 1)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            inputs = outputs
        self.fc = nn.Linear(inputs, 5)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class BasicConv(nn.Module):
    """Of an Inception: convolution, batch norm and a call of a function, in place."""

    def __init__(self, inputs, outputs, **options):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, bias=False, **options)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Four branches, seven calls."""

    def __init__(self, channels, width=4):
        super().__init__()
        self.branch1x1 = BasicConv(channels, width, kernel_size=1)
        self.branch5x5_1, self.branch5x5_2 = (
            BasicConv(channels, width, kernel_size=1),
            BasicConv(width, width, kernel_size=5, padding=2),
        )
        self.branch3x3_1 = BasicConv(channels, width, kernel_size=1)
        self.branch3x3_2 = BasicConv(width, width, kernel_size=3, padding=1)
        self.branch3x3_3 = BasicConv(width, width, kernel_size=3, padding=1)
        self.branch_pool = BasicConv(channels, width, kernel_size=1)

    def forward(self, x):
        pooled = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch5x5_2(self.branch5x5_1(x)),
                self.branch3x3_3(self.branch3x3_2(self.branch3x3_1(x))),
                self.branch_pool(pooled),
            ],
            1,
        )


class Inception(nn.Module):
    """94 calls of functions."""

    def __init__(self, width=4, blocks=13):
        super().__init__()
        stem = [BasicConv(3 if i == 0 else width, width, kernel_size=3, padding=1) for i in range(3)]
        mixed = [Mixed(width if i == 0 else 4 * width, width) for i in range(blocks)]
        self.features = nn.Sequential(*stem, *mixed)
        self.fc = nn.Linear(4 * width, 5)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


class GatedFeedForward(nn.Module):
    """Of a language model: the activation of one branch gates the other."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down(self.act_fn(self.gate(x)) * self.up(x))


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.reduce, self.expand = nn.Linear(6, 3), nn.Linear(3, 6)

    def forward(self, x):
        scale = F.relu(self.reduce(x))
        return x * torch.sigmoid(self.expand(scale))


class QuickGELU(nn.Module):
    """Another library's activation: no class of torch.nn."""

    def forward(self, input):
        return input * torch.sigmoid(1.702 * input)


class NewGELU(nn.Module):
    def forward(self, input):
        return F.gelu(input, approximate="tanh")


class FeedForward(nn.Module):
    """Holds whatever is callable, as Hugging Face's models do."""

    def __init__(self, act):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(6, 8), nn.Linear(8, 6), act

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Shared(nn.Module):
    """One layer, run three times."""

    def __init__(self):
        super().__init__()
        self.layer = FeedForward(nn.Tanh())

    def forward(self, x):
        for _ in range(3):
            x = self.layer(x)
        return x


class Loop(nn.Module):
    """One call in a loop."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.last = nn.Linear(6, 2)

    def forward(self, x):
        for layer in self.layers:
            x = relu_function(layer(x))
        return self.last(x)


class LoopOfOne(Loop):
    """One module in a loop."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        for layer in self.layers:
            x = self.act(layer(x))
        return self.last(x)


def logged(function):
    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        return function(self, *args, **kwargs)

    return wrapper


class Everything(nn.Module):
    """Methods, modules made in forward, one outside of the tree, options, a decorator, a helper, in place."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(8)])
        self.slope = 0.3

    @logged
    def forward(self, x, *, scale=1.0):
        x = self.layers[0](x).relu()
        x = nn.ELU(0.5)(self.layers[1](x))
        x = GLOBAL_ACT(self.layers[2](x))
        x = F.leaky_relu(self.layers[3](x), self.slope)
        x = self.__helper(x)
        y = self.layers[5](x)
        F.relu_(y)
        y = torch.tanh(input=self.layers[6](y))
        return scale * self.layers[7](F.gelu(y, approximate="tanh"))

    def __helper(self, x):
        return self.layers[4](F.softplus(x, beta=2))


class Checkpointed(nn.Module):
    """A block that is checkpointed from outside, and a function that is from inside."""

    def __init__(self, *, use_reentrant, active=True):
        super().__init__()
        self.block, self.inner, self.last = FeedForward(nn.ReLU()), nn.Linear(6, 6), nn.Linear(6, 2)
        self.use_reentrant, self.active = use_reentrant, active

    def _inside(self, x):
        return F.relu(self.inner(x))

    def _run(self, function, x):
        return checkpoint(function, x, use_reentrant=self.use_reentrant) if self.active else function(x)

    def forward(self, x):
        return self.last(self._run(self._inside, self._run(self.block, x)))


class Held(nn.Module):
    """Activations in plain lists, and through a name that only running it resolves."""

    def __init__(self):
        super().__init__()
        self.layer, self.acts = nn.Linear(6, 6), [nn.ReLU(), torch.tanh]

    def forward(self, x):
        for act in self.acts:
            x = act(self.layer(x))
        return getattr(torch, "sig" + "moid")(x)


def swish(x):
    return x * torch.sigmoid(x)


class Helped(nn.Module):
    """Leaves it to functions that are no methods of its own."""

    @staticmethod
    def squash(x):
        return torch.tanh(x)

    def forward(self, x):
        return self.squash(swish(x))


class Renamed(nn.Module):
    """Calls a function by another name, and passes one on."""

    def forward(self, x):
        act = nn.ReLU()
        return self.run(F.elu, act(x))

    def run(self, function, x):
        return function(x)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return F.relu(self.layer(x))


class Derived(Base):
    def forward(self, x):
        return F.elu(super().forward(x))


class Swapped(nn.Module):
    """What a careless reader of its source would take for something else."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.act = torch.tanh

    def forward(self, x):
        y = self.layer(x)
        y.tanh_()
        z = (lambda h, relu_function: relu_function(h))(y, torch.abs)
        z = F.rrelu(self.layer(self.act(z)), 0.1, 0.3)
        return self.act(input=self.layer(F.elu(z, 1.0, True) + z))


class LoopInside(Loop):
    """A loop whose method is checkpointed, or called, from outside of forward."""

    def body(self, x, count):
        for layer in self.layers[:count]:
            x = F.relu(layer(x))
        return x

    def forward(self, x, count=3):
        return self.last(checkpoint(self.body, x, count, use_reentrant=False))


class Remembering(nn.Module):
    """Changes in its forward what is its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.cache, self.log = {}, []

    def forward(self, x):
        self.steps += 1
        self.cache.setdefault("ones", torch.ones_like(x))
        self.log.append(x.mean())
        return F.relu(x) * 2


REGISTRY = {}


class Registered(nn.Module):
    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        REGISTRY[cls.__name__] = cls


class OneOfThem(Registered):
    def forward(self, x):
        return F.relu(x)


class GoesThroughChildren(nn.Sequential):
    def forward(self, x):
        return F.relu(x + super().forward(x))


class Gates(nn.Module):
    """Gates that are scaled, split and indexed on their way."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 12), nn.Linear(6, 6), nn.Linear(6, 6)
        self.limit = 2.0

    def forward(self, x):
        first, second = torch.sigmoid(self.one(x)).chunk(2, -1)
        scaled = 2 * torch.sigmoid(self.two(x))
        indexed = torch.sigmoid(self.three(x))[:, :1]
        return self.limit * torch.tanh(first * x + second + scaled * x + indexed * x)


IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))

MODELS = {
    "resnet": (ResNet, IMAGE),
    "inception": (lambda: Inception(blocks=1), IMAGE),
    "gated": (GatedFeedForward, ROWS),
    "squeeze": (SqueezeExcite, ROWS),
    "shared": (Shared, ROWS),
    "loop": (Loop, ROWS),
    "loop of one": (LoopOfOne, ROWS),
    "everything": (Everything, ROWS),
    "checkpointed": (lambda: Checkpointed(use_reentrant=False), ROWS),
    "reentrant": (lambda: Checkpointed(use_reentrant=True), ROWS),
    "function": (lambda: FeedForward(torch.tanh), ROWS),
    "foreign": (lambda: FeedForward(NewGELU()), ROWS),
    "own": (lambda: FeedForward(QuickGELU()), ROWS),
    "transformer": (lambda: nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), ROWS[None]),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, activation="gelu"), 2),
        ROWS[None],
    ),
}


def made(name):
    """A model of the table, the same at each call, and its input."""
    torch.manual_seed(0)
    make, x = MODELS[name]
    return make(), x.clone().requires_grad_()


def itself(site):
    """A replacement that changes nothing."""
    return copy.deepcopy(site.module)


def replaced(model, cls):
    """The modules of a class in a model."""
    return [module for module in model.modules() if isinstance(module, cls)]


def roles(sites):
    """The role of each site, by name."""
    return {site.name: site.role for site in sites}


def swished(model):
    """The names of the normalized Swish modules in a model."""
    return [name for name, module in model.named_modules() if isinstance(module, NSwish)]
