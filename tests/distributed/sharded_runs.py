"""What each process of test_sharded.py does: it is started by `torch.distributed.run`, with a folder and cases."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from helpers import loader, quiet_trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_noisy import GradientNoise, add_gradient_noise
from lightning_noisy.schedules import InverseDecay

# case: (hidden width, data-parallel size, tensor-parallel size)
CASES = {"even": (1000, 2, 1), "uneven": (1001, 2, 1), "tensor": (1000, 1, 2), "mesh": (1000, 2, 2)}
DATA = [torch.ones(4, 40)] * 4


class Sharded(L.LightningModule):
    """A loss without gradient and a learning rate of 1: the parameters are minus the sum of the noise.

    Some parameters are small, some are not; the last layer has fewer
    rows than there are processes.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = nn.Linear(40, width), nn.ReLU(), nn.Linear(width, 60), nn.Linear(60, 1)
        self.net = nn.Sequential(*layers)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return 0 * self.net(batch).sum()

    def configure_model(self) -> None:
        if self.trainer.world_size == 1 or isinstance(self.net[0].weight, DTensor):
            return
        data, tensor = self.device_mesh["data_parallel"], self.device_mesh["tensor_parallel"]
        if tensor.size() > 1:  # row-wise and column-wise shards
            parallelize_module(self.net, tensor, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if data.size() > 1:
            for layer in self.net:
                if not isinstance(layer, nn.ReLU):
                    fully_shard(layer, mesh=data)
            fully_shard(self.net, mesh=data)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class SaveSecond(L.Callback):
    """Writes a checkpoint of full tensors after the second step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


def full(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


def run_fsdp1(out: Path) -> None:
    """torch's first FSDP, in a plain loop: Lightning refuses it on the CPU."""
    torch.distributed.init_process_group("gloo")
    layers = Sharded(1001).net
    model = FullyShardedDataParallel(layers, device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = add_gradient_noise(optimizer, InverseDecay(eta=1.0), seed=0, stream="0.0", model=model)
    handle.measuring = True
    for batch in DATA[:3]:
        optimizer.zero_grad()
        (0 * model(batch).sum()).backward()
        optimizer.step()
    assert handle.last_step.grad_norm is None
    with FullyShardedDataParallel.summon_full_params(model):
        state = {f"net.{name}": value.detach().clone() for name, value in layers.named_parameters()}
    if torch.distributed.get_rank() == 0:
        torch.save({"state": state}, out / "fsdp1.pt")


def run_lightning(out: Path, case: str) -> None:
    """Under Lightning's ModelParallelStrategy."""
    width, data, tensor = CASES[case]
    strategy = ModelParallelStrategy(
        data_parallel_size=data, tensor_parallel_size=tensor, save_distributed_checkpoint=False
    )
    model = Sharded(width)
    trainer = quiet_trainer(
        strategy=strategy,
        devices=data * tensor,
        callbacks=[GradientNoise(eta=1.0, seed=0), SaveSecond(out / f"{case}.ckpt")],
        use_distributed_sampler=False,
        max_steps=3,
    )
    trainer.fit(model, loader(DATA))
    kinds = {name: type(parameter).__name__ for name, parameter in model.named_parameters()}
    state = {name: full(parameter) for name, parameter in model.named_parameters()}
    if trainer.is_global_zero:
        torch.save({"kinds": kinds, "state": state}, out / f"{case}.pt")


def main(out: Path, cases: list[str]) -> None:
    warnings.simplefilter("ignore")
    for case in cases:
        if case == "fsdp1":
            run_fsdp1(out)
        else:
            run_lightning(out, case)
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort a process that takes its interpreter down


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
