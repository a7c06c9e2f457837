"""What the two programs for CIFAR-100 share: data, training, command line.

The settings are those of Table 8 of Yuan et al., "ANAct: Adaptive Normalization for Activation Functions". They are for
GPUs: neither program has been run in full for this repository.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from training import initialize

from lightning_noisy import ActivationMonitor, ActivationReplacement, GradientNoise

CLASSES, MEAN, STD = 100, (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)


class Images(L.LightningDataModule):
    """CIFAR-100 from the files `train` and `test` of its Python version; without a folder, random images.

    These files are pickles, which can run code: take them from the data's own site.
    """

    def __init__(self, folder: Path | None, batch_size: int) -> None:
        super().__init__()
        self.folder, self.batch_size = folder, batch_size
        self.parts: dict[str, TensorDataset] = {}

    def setup(self, stage: str) -> None:
        for part in ("train", "test"):
            if self.folder is None:
                generator = torch.Generator().manual_seed(0)
                images = torch.randint(256, (48, 3, 32, 32), generator=generator, dtype=torch.uint8)
                labels = torch.randint(CLASSES, (48,), generator=generator)
            else:
                content = pickle.loads((self.folder / part).read_bytes(), encoding="bytes")
                images = torch.from_numpy(content[b"data"]).view(-1, 3, 32, 32)
                labels = torch.tensor(content[b"fine_labels"])
            self.parts[part] = TensorDataset(images, labels)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.parts["train"], self._each(), shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.parts["test"], self._each())

    def _each(self) -> int:
        """The batch size of one process."""
        return max(1, self.batch_size // self.trainer.world_size)  # type: ignore[union-attr]

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        """Normalize; while training, shift by up to four pixels, and mirror half of the images."""
        x, y = batch
        mean, std = (torch.tensor(each, device=x.device).view(3, 1, 1) for each in (MEAN, STD))
        x = (x / 255 - mean) / std
        if self.trainer.training:  # type: ignore[union-attr]
            offsets = torch.randint(9, (2, len(x), 1), device=x.device) + torch.arange(32, device=x.device)
            samples, channels = torch.arange(len(x), device=x.device), torch.arange(3, device=x.device)
            padded = F.pad(x, (4, 4, 4, 4))
            x = padded[
                samples[:, None, None, None],
                channels[:, None, None],
                offsets[0][:, None, :, None],
                offsets[1][:, None, None],
            ]
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
        return [x, y]


class Cifar100(L.LightningModule):
    """AdamW with a learning rate that grows in the first epoch; top-1 and top-5 accuracy."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr
        self.metrics = nn.ModuleDict({f"top{k}": MulticlassAccuracy(CLASSES, top_k=k, average="micro") for k in (1, 5)})

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        for name, metric in self.metrics.items():
            metric(logits, batch[1])
            self.log(name, metric, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        steps = self.trainer.estimated_stepping_batches / max(1, self.trainer.max_epochs or 1)
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / steps))
        return [optimizer], [{"scheduler": warmup, "interval": "step"}]


def initialization(activation: str) -> str:
    """The paper's: Xavier for tanh and normalized activations, orthogonal for GPN, else He."""
    if activation == "tanh" or activation.startswith("n"):
        return "xavier"
    return "orthogonal" if activation.endswith("-gpn") else "he"


def main(text: str, make: Callable[[], nn.Module], arguments: list[str] | None = None, **replacement: Any) -> L.Trainer:
    """Train a network, whose activations are ReLUs, as the command line says.

    Args:
        text: what the program does.
        make: makes the network.
        arguments: by default those of the command line.
        replacement: options of ``ActivationReplacement`` for normalized activations.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="cifar-100-python, with the files train and test")
    parser.add_argument("--activation", default="nsw", help="any name of a replacement (default: %(default)s)")
    parser.add_argument(
        "--gradient-noise", type=float, metavar="ETA", help="variance at the first step (default: none)"
    )
    parser.add_argument("--epochs", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=128, help="of all processes together (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--accelerator", default="auto", help="default: %(default)s")
    parser.add_argument("--devices", default="auto", help="number of processes (default: %(default)s)")
    parser.add_argument("--strategy", default="auto", help="such as ddp (default: %(default)s)")
    parser.add_argument("--precision", default="32-true", help="such as bf16-mixed (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("reproduced"), help="default: %(default)s")
    parser.add_argument("--resume", metavar="CKPT", help="a checkpoint to go on from")
    parser.add_argument("--smoke", action="store_true", help="two steps with random images")
    options = parser.parse_args(arguments)
    if options.data is None and not options.smoke:
        raise SystemExit("--data: say where cifar-100-python is, or --smoke to try it with random images.")
    if options.data is not None and not all((options.data / part).is_file() for part in ("train", "test")):
        raise SystemExit(f"--data: {options.data} doesn't have the files train and test.")
    L.seed_everything(options.seed)
    net, callbacks = make(), [L.pytorch.callbacks.LearningRateMonitor()]
    initialize(net, initialization(options.activation))
    if options.activation != "relu":
        normalized = options.activation in ("nsw", "nswish", "nrelu", "nlrelu")
        name = f"{options.activation}(synchronized=True)" if normalized else options.activation
        example = torch.zeros(2, 3, 32, 32)
        own = replacement if normalized else {}
        callbacks.append(ActivationReplacement(name, example_inputs=example, **own))
    if options.gradient_noise:
        callbacks.append(GradientNoise(options.gradient_noise))
    trainer = L.Trainer(
        accelerator=options.accelerator,
        devices=options.devices if options.devices == "auto" else int(options.devices),
        strategy=options.strategy,
        precision=options.precision,
        max_epochs=1 if options.smoke else options.epochs,
        limit_train_batches=2 if options.smoke else None,
        limit_val_batches=1 if options.smoke else None,
        gradient_clip_val=3.0,
        log_every_n_steps=1 if options.smoke else 50,
        callbacks=[*callbacks, ActivationMonitor()],
        default_root_dir=options.out,
    )
    images = Images(None if options.smoke else options.data, 8 if options.smoke else options.batch_size)
    trainer.fit(Cifar100(net, options.lr), images, ckpt_path=options.resume)
    if trainer.is_global_zero:
        numbers = {name: round(float(value), 4) for name, value in trainer.callback_metrics.items()}
        print({name: numbers[name] for name in ("top1", "top5", "anact_score") if name in numbers})
    return trainer
