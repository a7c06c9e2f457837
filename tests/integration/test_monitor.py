"""ActivationMonitor among Lightning's other callbacks, and under strategies that start processes."""

import csv

import lightning as L
import pytest
import torch
from helpers import Net, all_equal, batches, loader, parameters_of, quiet_trainer
from lightning.pytorch import callbacks
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_noisy import ActivationMonitor

OTHERS = {
    "finder": lambda: [callbacks.LearningRateFinder(num_training_steps=5, update_attr=False)],
    "batch size": lambda: [callbacks.BatchSizeFinder(max_trials=2)],
    "swa": lambda: [callbacks.StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)],
    "ema": lambda: [callbacks.EMAWeightAveraging(decay=0.9)],
    "early stopping": lambda: [callbacks.EarlyStopping("anact_score", patience=50)],
}


class Sized(Net):
    """Has what the finders change."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01))
        self.batch_size, self.lr = 4, 0.01

    def train_dataloader(self):
        x, y = batches(1, 64)[0]
        return DataLoader(list(zip(x, y, strict=True)), batch_size=self.batch_size)

    val_dataloader = train_dataloader


@pytest.mark.parametrize("name", OTHERS)
def test_monitor_changes_nothing_beside_other_callbacks(tmp_path, name):
    if name == "ema" and not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("came with lightning 2.6")

    def run(*own):
        L.seed_everything(0, verbose=False)
        model = Sized()
        trainer = quiet_trainer(
            callbacks=[*own, *(OTHERS[name]() if own or name != "early stopping" else [])],
            max_epochs=3,
            default_root_dir=tmp_path,
            enable_model_summary=False,
        )
        trainer.fit(model)
        return parameters_of(model), trainer.callback_metrics

    expected, _ = run()
    found, metrics = run(ActivationMonitor(statistics="all"))
    assert all_equal(found, expected)
    assert 0 < metrics["rho/net.1"] < 1
    assert metrics["update_ratio/net.0.weight"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_processes_that_train_copies_log_what_one_does(tmp_path, strategy):
    data = batches(4, 32)

    def run(name, **options):
        L.seed_everything(0, verbose=False)
        trainer = quiet_trainer(
            callbacks=[ActivationMonitor(statistics=("rho", "dead_units"))],
            logger=CSVLogger(tmp_path, name, ""),
            use_distributed_sampler=False,
            max_steps=1,
            **options,
        )
        trainer.fit(Net(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))), loader(data))
        with (tmp_path / name / "metrics.csv").open() as file:
            (row,) = csv.DictReader(file)
        return row["rho/net.1"], row["dead_units/net.1"]

    assert run(strategy, strategy=strategy, devices=2) == run("alone")  # both processes have the same data
