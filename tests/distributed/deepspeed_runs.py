"""What each process of test_deepspeed.py does: it is started by `torch.distributed.run`, with a folder and cases."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import lightning as L
import torch
from helpers import loader, quiet_trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn

from lightning_noisy import GradientNoise

DATA = [torch.ones(4, 40)] * 8
# DeepSpeed's stage, and what else a case has.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "stage0": (0, {}),
    "stage1": (1, {}),
    "stage2": (2, {}),
    "stage3": (3, {}),
    "stage2-accumulated": (2, {"accumulate_grad_batches": 2}),
    "stage3-accumulated": (3, {"accumulate_grad_batches": 2}),
    "stage3-subgroups": (3, {"sub_group_size": 30_000}),
    "stage2-offloaded": (2, {"offload_optimizer": {"device": "cpu"}}),
    "stage1-bf16": (1, {"precision": "bf16-true"}),
    "stage0-bf16": (0, {"precision": "bf16-true"}),
    # The first two steps overflow: the loss is scaled by 65,536, which float16 doesn't have.
    "stage2-fp16": (2, {"precision": "16-true", "overflows": 2}),
    "stage2-resumed": (2, {"resume": True}),
    "stage3-resumed": (3, {"resume": True}),
}


class OnCPU(DeepSpeedStrategy):
    """Lightning's strategy, without its insistence on CUDA."""

    root_device = property(lambda self: torch.device("cpu", 0))

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class Flat(L.LightningModule):
    """A loss without gradient and a learning rate of 1: the parameters are minus the sum of the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(40, 1001), nn.ReLU(), nn.Linear(1001, 60), nn.Linear(60, 1))
        self.scale = nn.Parameter(torch.zeros(1, 1))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self.net[3].weight.is_quiet = True

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return 0 * (self.net(batch.to(self.scale.dtype)) * self.scale).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        first, *others = self.parameters()
        groups = [{"params": others, "noise_scale": 0.5}, {"params": [first]}]
        return torch.optim.SGD(groups, lr=1.0)


def noise(model: Flat) -> GradientNoise:
    """Without noise on biases, nor on parameters that are left out by attribute and by identity."""

    def params(name: str, parameter: nn.Parameter) -> bool:
        is_quiet = parameter is model.net[2].weight or getattr(parameter, "is_quiet", False)
        return parameter.dim() != 1 and not is_quiet

    return GradientNoise(eta=1.0, seed=0, params=params)


def run(out: Path, case: str) -> None:
    stage, options = CASES[case]
    options = dict(options)
    zero = {"stage": stage} | {k: options.pop(k) for k in ("sub_group_size", "offload_optimizer") if k in options}
    config = {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": 4,
    }
    resume, overflows = options.pop("resume", False), options.pop("overflows", 0)
    ckpt_path = out / f"{case}.ckpt" if resume else None
    for epochs in (2, 3) if resume else (3 + overflows,):
        model = Flat()
        callback = noise(model)
        trainer = quiet_trainer(
            strategy=OnCPU(config=dict(config)),
            accelerator="cpu",
            devices=2,
            callbacks=[callback],
            use_distributed_sampler=False,
            gradient_clip_val=0.05,  # of which the noise is to see nothing
            limit_train_batches=options.get("accumulate_grad_batches", 1),
            max_epochs=epochs,
            **options,
        )
        trainer.fit(model, loader(DATA), ckpt_path=ckpt_path if epochs == 3 else None)
        if epochs == 2:
            trainer.save_checkpoint(ckpt_path)
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if trainer.is_global_zero:
        torch.save({"state": state, "steps": [saved["step"] for saved in callback._final]}, out / f"{case}.pt")


def main(out: Path, cases: list[str]) -> None:
    warnings.simplefilter("ignore")
    # DeepSpeed compiles an operation for this at the first use, and waits without end for a lock that a killed
    # compiler left behind. Without it, gloo does the same.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    for case in cases:
        run(out, case)
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort a process that takes its interpreter down


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
