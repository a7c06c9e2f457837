"""What each process of test_monitor.py does: it is started by `torch.distributed.run`, with a folder and cases."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from helpers import loader, quiet_trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from lightning_noisy import ActivationMonitor
from lightning_noisy.monitoring.recorder import ActivationRecorder
from lightning_noisy.monitoring.statistics import STATISTICS

# case: (data-parallel size, tensor-parallel size)
CASES = {
    **{"alone": (1, 1), "ddp": (2, 1), "fork": (2, 1), "fsdp2": (2, 1), "tensor": (1, 2), "mesh": (2, 2)},
    **{"deepspeed1": (2, 1), "deepspeed2": (2, 1), "deepspeed3": (2, 1)},
}
# DeepSpeed keeps gradients and, in stage 3, weights to itself.
OF_SITES = tuple(name for name in STATISTICS if not name.startswith(("weight", "grad_variance", "update")))


def batches() -> list[list[Tensor]]:
    """Two steps; in each the parts of two ranks, of other sizes, means and spreads."""
    generator = torch.Generator().manual_seed(0)
    return [
        [3 * torch.randn(first, 8, generator=generator), 1 + torch.randn(second, 8, generator=generator)]
        for first, second in ((4, 50), (30, 1))
    ]


class Watched(L.LightningModule):
    """A net that doesn't learn: four of ten hidden units are dead, and one activation runs on the first rank alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 6))
        self.act, self.last, self.extra = nn.ReLU(), nn.Linear(6, 3), nn.Softplus()
        nn.init.constant_(self.net[0].bias[:4], -100.0)
        self.dp_rank, self.dp_size = 0, 1
        self.has_extra = True

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        total = sum(map(len, batch))
        x = torch.cat(batch) if self.dp_size == 1 else batch[self.dp_rank]
        loss = self.last(torch.tanh(self.act(self.net(x)))).square().sum() * self.dp_size / total
        if self.dp_rank == 0 and self.has_extra:
            loss = loss + 0 * self.extra(batch[0]).sum()
        return loss

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is None:
            return
        data, tensor = mesh["data_parallel"], mesh["tensor_parallel"]
        if tensor.size() > 1:  # the ReLU has the columns of this rank
            parallelize_module(self.net, tensor, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if data.size() > 1:
            for layer in (*self.net, self.last):
                if not isinstance(layer, nn.ReLU):
                    fully_shard(layer, mesh=data)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Differs(Watched):
    """Calls other activations on each rank."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = self.net(batch[self.global_rank])
        x = self.act(x) if torch.distributed.get_rank() == 0 else F.elu(x)
        return self.last(x).sum()


def run_differing(out: Path) -> None:
    """Fit with sites that differ between ranks."""
    model = Differs()
    trainer = quiet_trainer(strategy="ddp", devices=2, callbacks=[ActivationMonitor()], use_distributed_sampler=False)
    trainer.fit(model, loader(batches()))
    if trainer.is_global_zero:
        torch.save({tag: float(value) for tag, value in trainer.callback_metrics.items()}, out / "differs.pt")


def run(case: str, out: Path, **options: Any) -> None:
    """Fit with the monitor, and write what it logged."""
    data, tensor = CASES[case]
    strategy: Any = {"alone": "auto", "ddp": "ddp"}.get(case) or (
        deepspeed_on_cpu(int(case[-1])) if "deepspeed" in case else ModelParallelStrategy(data, tensor)
    )
    model = Watched()
    if case != "alone":
        rank = int(os.environ["RANK"])
        model.dp_size, model.dp_rank = data, rank // tensor
        model.has_extra = case != "deepspeed3"  # which wants the same modules on all ranks
        F.softplus(torch.zeros(rank + 1))  # what a rank does by itself changes nothing
    trainer = quiet_trainer(
        strategy=strategy,
        devices=data * tensor,
        callbacks=[ActivationMonitor(statistics=OF_SITES if "deepspeed" in case else "all", **options)],
        logger=CSVLogger(out, case, ""),
        use_distributed_sampler=False,
    )
    reductions: list[bool] = []
    reduce = trainer.strategy.reduce

    def counted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        reductions.append(isinstance(tensor, Tensor) and tensor.dtype == torch.float64)  # others are Lightning's
        return reduce(tensor, *args, **kwargs)

    trainer.strategy.reduce = counted
    trainer.fit(model, loader(batches()))
    if trainer.is_global_zero:
        torch.save({"reductions": sum(reductions)}, out / f"{case}.pt")


def deepspeed_on_cpu(stage: int) -> Any:
    """Lightning's strategy for DeepSpeed, without its insistence on CUDA."""
    from deepspeed_runs import OnCPU

    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # which is compiled; gloo does the same
    config = {
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": 4,
    }
    return OnCPU(config=config)


def run_fsdp1(out: Path) -> None:
    """torch's first FSDP, in a plain loop: Lightning refuses it on the CPU."""
    rank, inner = torch.distributed.get_rank(), Watched()
    layers = nn.Sequential(inner.net, inner.act, inner.last)
    model = FullyShardedDataParallel(layers, device_id=torch.device("cpu"), use_orig_params=True)
    recorder = ActivationRecorder(layers, statistics=OF_SITES)

    def add_up(sums: Tensor) -> Tensor:
        torch.distributed.all_reduce(sums)
        return sums

    with recorder:
        model(batches()[0][rank]).sum().backward()
    values = recorder.compute(recorder.pooled(add_up))
    if rank == 0:
        torch.save(values, out / "fsdp1.pt")


def main(out: Path, cases: list[str]) -> None:
    warnings.simplefilter("ignore")
    for case in cases:
        special = {"fsdp1": run_fsdp1, "differs": run_differing}.get(case)
        run(case, out) if special is None else special(out)
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort a process that takes its interpreter down


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
