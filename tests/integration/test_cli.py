"""The callbacks and their schedules in a LightningCLI YAML file."""

import lightning as L
import pytest
from helpers import Net, batches, loader
from lightning.pytorch.cli import LightningCLI

from lightning_noisy.nn import NSwish
from lightning_noisy.schedules import Linear, Warmup

pytest.importorskip("jsonargparse")

YAML = """
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  log_every_n_steps: 1
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_noisy.GradientNoise
      init_args:
        seed: 3
        schedule:
          class_path: lightning_noisy.schedules.Warmup
          init_args:
            steps: 2
            schedule:
              class_path: lightning_noisy.schedules.Linear
              init_args:
                start: 1.0
    - class_path: lightning_noisy.ActivationMonitor
    - class_path: lightning_noisy.ActivationReplacement
      init_args:
        to: nsw
"""


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return loader(batches(3))


class Model(Net):
    def __init__(self) -> None:
        super().__init__()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning calls what jsonargparse deprecates
def test_callbacks_are_made_and_run_from_yaml(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train"])
    (tmp_path / "config.yaml").write_text(YAML)
    arguments = ["fit", "--config", str(tmp_path / "config.yaml")]
    cli = LightningCLI(Model, Data, args=arguments, save_config_callback=None, seed_everything_default=False)
    noise = cli.trainer.callbacks[0]
    assert noise.schedule == Warmup(Linear(1.0), steps=2)
    assert noise.state_dict() == {"optimizers": [{"seed": 3, "stream": "0.0", "step": 3}]}
    assert type(cli.model.net[1]) is NSwish
    assert "rho/net.1" in cli.trainer.callback_metrics
