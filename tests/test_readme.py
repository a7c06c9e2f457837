"""The README's first screen works as it is written."""

import re
from pathlib import Path

import lightning as L
import pytest
from helpers import Net, batches, loader

import lightning_noisy

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
DIFFS = re.findall(r"^```diff\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def run(code: str, monkeypatch, tmp_path) -> dict[str, object]:
    """Run a snippet with a `MyLightningModule` and a `loader` of the reader's own."""
    monkeypatch.chdir(tmp_path)
    plain_trainer = L.Trainer

    def short_trainer(*args, **kwargs):
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
        return plain_trainer(*args, **{"accelerator": "cpu", "max_epochs": 1, **quiet, **kwargs})

    monkeypatch.setattr(L, "Trainer", short_trainer)
    namespace: dict[str, object] = {"MyLightningModule": Net, "loader": loader(batches(3))}
    exec(compile(code, "README.md", "exec"), namespace)
    return namespace


@pytest.mark.parametrize("code", PYTHON)
@pytest.mark.filterwarnings("ignore:.*TensorBoard:UserWarning")
def test_readme_python_runs(code, monkeypatch, tmp_path):
    run(code, monkeypatch, tmp_path)


def test_readme_has_the_diff_of_three_lines_and_both_sides_of_it_run(monkeypatch, tmp_path):
    (diff,) = DIFFS
    lines = diff.splitlines()
    assert sum(line.startswith("+") for line in lines) == 3
    after = "\n".join(line[2:] for line in lines if not line.startswith("-"))
    before = "\n".join(line[2:] for line in lines if not line.startswith("+"))
    assert len(run(before, monkeypatch, tmp_path / "..")["trainer"].loggers) == 1
    trainer = run(after, monkeypatch, tmp_path)["trainer"]
    names = set(trainer.callback_metrics)
    assert {"gradient_noise/std", "rho/net.1", "rho_prime/net.1", "anact_score"} <= names
    assert (tmp_path / "lightning_logs").is_dir()


def test_readme_names_only_make_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test", "check"} <= named <= targets


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README)
    local = [a or b for a, b in links if not (a or b).startswith("http")]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_changelog_knows_the_version():
    assert f"## [{lightning_noisy.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
