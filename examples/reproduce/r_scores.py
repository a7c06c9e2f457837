"""Fig. 2 of Yuan et al., "ANAct: Adaptive Normalization for Activation Functions": R-scores, and the constants of GPN.

    python examples/reproduce/r_scores.py

R = ln(Var[δ(x)] / (Var[x] E[δ'(x)²])) for x from N(0, σ²), Eq. 19, by quadrature: 0 if signal and gradient gain alike.
Beside it the factor a and the shift b of Gaussian-Poincaré normalization, a δ + b.
"""

from __future__ import annotations

from pathlib import Path

from harness import Program, Record, Result, Run, Table

from lightning_noisy.functional.scores import gains, gpn_constants
from lightning_noisy.nn import registry
from lightning_noisy.plots import plot_r_scores

# The paper's numbers: R, the same for every σ, and a.
PAPER = {"relu": ("-0.383", "1.4142"), "leaky_relu": ("-0.383", "1.4141")}
NAMES = ["relu", "leaky_relu", "elu", "selu", "gelu", "silu", "tanh"]
SIGMAS = (0.1, 0.5, 1, 2, 10)


def train(run: Run) -> Result:
    """The numbers of one function; nothing is trained."""
    function = registry.create(str(run.settings["activation"]))
    a, b = gpn_constants(function)
    return Result({**{f"r_{sigma}": gains(function, sigma).r_score for sigma in SIGMAS}, "a": a, "b": b})


def tables(records: list[Record]) -> list[Table]:
    """Scores and constants."""
    lines = []
    for record in records:
        name = record["activation"]
        paper_r, paper_a = PAPER.get(name, ("-", "-"))
        scores = (f"{record[f'r_{sigma}']:.3f}" for sigma in SIGMAS)
        lines.append([name, paper_r, *scores, paper_a, f"{record['a']:.4f}", f"{record['b']:.4f}"])
    head = ["activation", "R: paper", *(f"here, σ = {sigma}" for sigma in SIGMAS), "a: paper", "here", "b: here"]
    return [Table("R-scores at N(0, σ²), and the constants of GPN.", head, lines)]


def draw(records: list[Record], epochs: list[Record], path: Path) -> None:
    """The scores over σ."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    plot_r_scores(NAMES, axes=axes)
    axes.set(xlabel="σ", ylabel="R")
    figure.savefig(path, dpi=110)
    plt.close(figure)


PROGRAM = Program(
    "r_scores",
    __doc__,
    [{"activation": name} for name in NAMES],
    train,
    tables,
    draw,
    epochs=0,
    seeds=1,
    on_images=False,
)

if __name__ == "__main__":
    PROGRAM.main()
