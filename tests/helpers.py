"""What several tests need: a small Lightning model, a quiet Trainer, an optimizer that shows its gradients."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import (
    STORE_EVERYTHING_SIZE_GUIDANCE,
    EventAccumulator,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_noisy
from lightning_noisy.kernels import backend, build, gaussian, lstm, noisy, normalized, sums

# Tests that set $CC name cc; the others take what the package takes.
HAS_COMPILER = all(shutil.which(name) for name in ("cc", shlex.split(os.environ.get("CC", "") or "cc")[0]))


TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU by its interpreter, see conftest.py
# The interpreter of Triton 3.2 can't compare some numbers; its compiler can.
HAS_TRITON = find_spec("triton") is not None and (
    TRITON_DEVICE == "cuda" or tuple(map(int, version("triton").split(".")[:2])) >= (3, 3)
)
NO_TRITON = "there is no Triton, or too old an interpreter"
KERNELS = [
    pytest.param("auto", id="compiled", marks=pytest.mark.skipif(not HAS_COMPILER, reason="there is no C compiler")),
    pytest.param(
        "triton",
        id="triton",
        marks=pytest.mark.skipif(not HAS_TRITON, reason="there is no Triton, or too old an interpreter"),
    ),
    pytest.param("0", id="torch"),
]


def forget_kernels() -> None:
    """Let the kernels be chosen, loaded and compared with their references again."""
    for cached in (
        backend.choice,
        build._found,
        gaussian._load,
        gaussian._is_right,
        lstm._load,
        noisy._compiled,
        noisy._is_right,
        normalized._compiled,
        normalized._is_right,
        sums._load,
    ):
        cached.cache_clear()


class SpySGD(torch.optim.SGD):
    """SGD that keeps a copy of the gradients of every step, as the update sees them."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.seen: list[list[Tensor | None]] = []

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure is not None else None
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        self.seen.append([None if g is None else g.detach().clone() for g in grads])
        super().step()
        return loss


class Net(L.LightningModule):
    """A classifier of rows of 8 floats into 3 classes; `optimizer` makes its optimizer from the parameters."""

    def __init__(self, net: nn.Module | None = None, optimizer: Callable[..., Any] = SpySGD) -> None:
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        self.make_optimizer = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


def batches(count: int, size: int = 4, *, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Reproducible batches for `Net`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 8, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def loader(data: list[Any]) -> DataLoader:
    """A loader of batches that are batches already."""
    return DataLoader(data, batch_size=None)


def quiet_trainer(**options: Any) -> L.Trainer:
    """A CPU Trainer without output, logger or checkpoints, unless `options` says otherwise."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return L.Trainer(**{**defaults, **options})


def scalars(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    """All scalars of a TensorBoard event file: tag -> [(step, value), ...]."""
    events = EventAccumulator(str(folder), size_guidance=STORE_EVERYTHING_SIZE_GUIDANCE).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def run_processes(script: Path, processes: int, *arguments: str, timeout: float = 600) -> None:
    """Run a script of this folder in several processes that form a group; fail with what they said if they fail."""
    paths = Path(__file__).parent, Path(lightning_noisy.__file__).parents[1]  # the package that is tested here
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    environment.pop("PL_GLOBAL_SEED", None)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, str(script), *arguments]
    pipe = subprocess.PIPE
    # A session of its own: the launcher's processes end with it when the time is up.
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as run:
        try:
            _, errors = run.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            output, errors = run.communicate()
            pytest.fail(f"{script.name} took more than {timeout} s and was killed:\n{output[-2000:]}\n{errors[-4000:]}")
    assert run.returncode == 0, errors[-4000:]


def shared_folder(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], None]) -> Path:
    """A folder that several tests read: the first worker that asks for it fills it, and others wait for that."""
    root = factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / f"shared-{name}"
    failed = folder.with_suffix(".failed")
    with FileLock(f"{folder}.lock"):
        if failed.exists():
            pytest.fail(f"{name} failed in another test: see there")
        if not folder.exists():
            own = factory.mktemp(name)
            try:
                fill(own)
            except BaseException:
                failed.touch()
                raise
            own.rename(folder)
    return folder


def parameters_of(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def all_equal(first: list[Tensor], second: list[Tensor]) -> bool:
    """Bit equality of two lists of tensors of the same length."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def unit_sgd(parameters):
    return SpySGD(parameters, lr=1.0)


class Flat(L.LightningModule):
    """A loss without gradient in `size` parameters: with SGD and lr 1 they hold minus the sum of the noise."""

    def __init__(self, size=50_000, optimizer=unit_sgd):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))
        self.make_optimizer = optimizer

    def training_step(self, batch, batch_idx):
        return 0 * self.w.sum()

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())

    @property
    def seen(self):
        """Gradients of every step, as the update saw them."""
        return [grads[0] for grads in self.optimizers().optimizer.seen]


class Manual(Flat):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def fit(model, callbacks, data=None, **options):
    trainer = quiet_trainer(callbacks=callbacks, **options)
    trainer.fit(model, loader(batches(4) if data is None else data))
    return trainer


def zero_gradient_sgd(*shapes, lr=1.0, cls=torch.optim.SGD):
    """Parameters at zero with zero gradients: after a step with lr 1 they hold minus the noise."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return parameters, cls(parameters, lr=lr)
