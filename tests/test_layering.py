"""Imports go down only, and only the callbacks know Lightning."""

import ast
from pathlib import Path

import pytest

import lightning_noisy

ROOT = Path(lightning_noisy.__file__).parent
LEVELS = {
    **{"kernels": 0, "_torch_internals": 0, "schedules": 0, "functional": 1, "nn": 2, "plots": 3, "metrics": 3},
    **{"gradient_noise": 4, "replacement": 4, "monitoring": 5, "callbacks": 6, "": 7},
}
FILES = sorted(ROOT.rglob("*.py"))


def room_of(module: str) -> str:
    """`lightning_noisy.nn.registry` -> `nn`; `lightning_noisy` -> ``."""
    return [*module.split("."), ""][1]


def imports(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the layer"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "lightning_noisy" else {node.module}
    return found


def violations(room: str, source: str) -> list[str]:
    wrong = []
    for module in imports(source):
        package = module.split(".")[0]
        if package == "lightning_noisy" and LEVELS[room_of(module)] > LEVELS[room]:
            wrong.append(f"{room or 'top'} imports {module}")
        if package in {"lightning", "pytorch_lightning"} and LEVELS[room] < LEVELS["callbacks"]:
            wrong.append(f"{room} imports {module}")
        if package == "torchmetrics" and LEVELS[room] < LEVELS["metrics"]:
            wrong.append(f"{room} imports {module}")
        if package == "torch" and room == "schedules":
            wrong.append(f"{room} imports {module}")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    room = "" if parts == ("__init__",) else parts[0]
    assert violations(room, path.read_text()) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("functional", "from lightning_noisy.nn import registry"),
        ("gradient_noise", "import lightning.pytorch as pl"),
        ("nn", "from torchmetrics import Metric"),
        ("schedules", "import torch"),
        ("metrics", "from lightning_noisy import replacement"),
    ],
)
def test_layering_check_sees_a_violation(room, source):
    assert violations(room, source)


def test_public_names_exist_and_are_sorted():
    assert lightning_noisy.__all__ == sorted(lightning_noisy.__all__)
    assert all(hasattr(lightning_noisy, name) for name in lightning_noisy.__all__)
