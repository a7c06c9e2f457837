"""The examples run, in a short form."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_counted_symbols_are_those_of_sets():
    sys.path.insert(0, str(EXAMPLES / "by_feature"))
    try:
        import noisy_gates
    finally:
        sys.path.pop(0)
    x, y = noisy_gates.sequences(26, 500, torch.Generator().manual_seed(0))
    assert y.tolist() == [len(set(each)) - 1 for each in x.tolist()]
    assert set(y.tolist()) == set(range(10))


@pytest.mark.slow
def test_noisy_gates_prints_a_table_and_draws(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    picture = tmp_path / "gates.png"
    script = [
        sys.executable,
        EXAMPLES / "by_feature" / "noisy_gates.py",
        "--steps",
        "3",
        "--seeds",
        "1",
        "--out",
        picture,
    ]
    printed = subprocess.run(list(map(str, script)), capture_output=True, text=True, timeout=300, check=True).stdout
    assert printed.count("minutes left") == 4
    for gates in ("sigmoid, tanh", "hard, without noise", "NAN, annealed", "NAH, annealed"):
        assert f"\n{gates}" in printed
    assert picture.stat().st_size > 5000
