"""Writes the tables of docs/results.md anew, from the CSV files in docs/results.

python examples/reproduce/page.py
"""

from __future__ import annotations

import re
from pathlib import Path

import anact_lenet5
import gradient_noise_mnist
import memory_network
import neural_gpu
import noisy_units
import r_scores
import relu_sigmoid_nodes
import vanishing_gradients
from harness import read_csv

DOCS = Path(__file__).resolve().parents[2] / "docs"
PROGRAMS = {
    module.PROGRAM.name: module.PROGRAM
    for module in (
        gradient_noise_mnist,
        memory_network,
        neural_gpu,
        anact_lenet5,
        r_scores,
        relu_sigmoid_nodes,
        vanishing_gradients,
        noisy_units,
    )
}
PLACE = re.compile(r"<!-- table (\d+) of (\w+)\.csv -->\n.*?<!-- end -->", re.DOTALL)


def filled(page: str, results: Path) -> str:
    """The page with its tables made of the files."""

    def table(found: re.Match[str]) -> str:
        number, name = int(found[1]), found[2]
        program = PROGRAMS[name]
        records = [each for each in read_csv(results / f"{name}.csv") if each["epochs"] == program.epochs]
        return f"<!-- table {number} of {name}.csv -->\n{program.tables(records)[number - 1]}\n<!-- end -->"

    return PLACE.sub(table, page)


if __name__ == "__main__":
    path = DOCS / "results.md"
    path.write_text(filled(path.read_text(), DOCS / "results"))
    print(f"Written: {path}")
