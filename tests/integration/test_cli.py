"""The callbacks and their schedules in a LightningCLI YAML file."""

import re
from pathlib import Path

import lightning as L
import pytest
from helpers import Net, batches, loader
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_noisy.nn import NAH, NLeakyReLU, NReLU, NSwish
from lightning_noisy.schedules import InverseDecay, Linear, Warmup

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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_yaml_of_the_docs_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train"])
    page = (Path(__file__).parents[2] / "docs/gradient_noise.md").read_text()
    (text,) = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "config.yaml").write_text(text)
    quiet = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False}
    arguments = ["fit", "--config", str(tmp_path / "config.yaml")]
    cli = LightningCLI(
        Deep, Data, args=arguments, trainer_defaults=quiet, save_config_callback=None, seed_everything_default=False
    )
    assert [type(layer) for layer in cli.model.net[1::2]] == [NReLU, nn.LeakyReLU, NAH]
    assert cli.trainer.callbacks[1].schedule == InverseDecay(1e-4)


def replacement(tmp_path, monkeypatch, options):
    """The callback that LightningCLI makes of lines of YAML, and its model after a fit."""
    monkeypatch.setattr("sys.argv", ["train"])
    text = YAML.replace("        to: nsw\n", "".join(f"        {line}\n" for line in options.splitlines()))
    (tmp_path / "config.yaml").write_text(text)
    arguments = ["fit", "--config", str(tmp_path / "config.yaml")]
    cli = LightningCLI(Deep, Data, args=arguments, save_config_callback=None, seed_everything_default=False)
    return cli.trainer.callbacks[2], [type(layer) for layer in cli.model.net[1::2]]


class Deep(Net):
    def __init__(self) -> None:
        layers = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.LeakyReLU(), nn.Linear(8, 8), nn.Tanh()]
        super().__init__(nn.Sequential(*layers, nn.Linear(8, 3)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning calls what jsonargparse deprecates
@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ("to: nsw(beta=0.1)\ninclude: net.1", [NSwish, nn.LeakyReLU, nn.Tanh]),
        ("to: {relu: nrelu, leaky_relu: nlrelu}", [NReLU, NLeakyReLU, nn.Tanh]),
        ("to:\n  relu: nrelu\n  tanh: torch.nn.SiLU", [NReLU, nn.LeakyReLU, nn.SiLU]),
        ("to: torch.nn.SiLU\nexclude: [net.1, 'net.5']", [nn.ReLU, nn.SiLU, nn.Tanh]),
        ("to: {relu: 'elu(alpha=0.3)', leaky_relu: elu}", [nn.ELU, nn.ELU, nn.Tanh]),
        ("to: {relu: nah, tanh: nah}\ninclude:\n  - net.1\n  - net.3", [NAH, nn.LeakyReLU, nn.Tanh]),
    ],
)
def test_every_way_of_naming_replacements_works_in_yaml(tmp_path, monkeypatch, options, kinds):
    assert replacement(tmp_path, monkeypatch, options)[1] == kinds


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_noise_of_a_mapping_is_annealed_in_yaml(tmp_path, monkeypatch):
    options = "to: {relu: nah}\nnoise:\n  class_path: lightning_noisy.schedules.Linear\n  init_args: {start: 9.0}"
    callback, kinds = replacement(tmp_path, monkeypatch, options)
    assert kinds == [NAH, nn.LeakyReLU, nn.Tanh]
    assert callback.noise == Linear(9.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_misspelt_option_is_named_in_yaml(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'nah' has no option 'alhpa'. Did you mean 'alpha'?"):
        replacement(tmp_path, monkeypatch, "to: {relu: 'nah(alhpa=1)'}")
