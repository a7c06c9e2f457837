"""README and docs work as they are written."""

import re
from pathlib import Path

import lightning as L
import pytest
from helpers import Net, batches, loader

import lightning_noisy

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
PYTHON = [
    pytest.param(code, id=f"{name}-{number}")
    for name, text in PAGES.items()
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
]
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
def test_python_of_pages_runs(code, monkeypatch, tmp_path):
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


def test_pages_name_only_make_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", "\n".join(PAGES.values()), re.MULTILINE))
    assert {"demo", "test", "check", "compat"} <= named <= targets


def test_readme_fits_on_few_screens():
    assert len(README.splitlines()) <= 100


def headings(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    home = ROOT if name == "README.md" else ROOT / "docs"
    links = re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", PAGES[name])
    wrong = []
    for link in (a or b for a, b in links):
        path, _, anchor = link.partition("#")
        if not link.startswith("http") and (
            not (home / path).exists() or (anchor and anchor not in headings((home / path).read_text()))
        ):
            wrong.append(link)
    assert wrong == []
    assert name != "README.md" or links


def test_architecture_names_what_there_is():
    package = ROOT / "lightning_noisy"
    rooms = {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
    named = re.findall(rf"\b((?:{'|'.join(rooms)})/\w+\.py)", PAGES["architecture.md"])
    assert len(named) > 20
    assert [path for path in named if not (package / path).exists()] == []
    assert rooms == set(re.findall(r"(\w+)/ +[a-zT]", PAGES["architecture.md"]))


def test_changelog_knows_the_version():
    assert f"## [{lightning_noisy.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
