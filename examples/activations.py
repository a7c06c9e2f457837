"""Reproduces the papers' figures of activations: derivatives, noise, and R-scores.

python examples/activations.py [--out activations.png]
"""

import argparse

from matplotlib import pyplot

from lightning_noisy.plots import plot_activation, plot_r_scores


def main() -> None:
    """Draw the three figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="activations.png", help="file for the picture (default: %(default)s)")
    out = parser.parse_args().out
    figure, (derivatives, noise, scores) = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for name in ("tanh", "sigmoid", "hardtanh", "relu"):
        plot_activation(name, derivative=True, axes=derivatives)
    hard_sigmoid = {"function": "sigmoid", "label": "hard sigmoid of slope 1/4"}  # torch's has slope 1/6
    plot_activation("nan(alpha=1, c=0)", derivative=True, axes=derivatives, **hard_sigmoid)
    derivatives.set_title("Derivatives")
    derivatives.legend(fontsize="small", loc="upper left")
    for alpha in (0.9, 1.0, 1.1, 1.2):
        plot_activation(f"nah(alpha={alpha}, c=1)", draws=250, axes=noise)
    plot_activation("hardtanh", axes=noise)
    noise.set_title("Half-normal noise on the hard tanh: draws and expectation")
    noise.legend(fontsize="small", loc="lower right")
    plot_r_scores(["relu", "leaky_relu", "elu", "selu", "gelu", "silu", "tanh"], axes=scores)
    scores.set_title("R-score at N(0, σ²)")
    figure.savefig(out, dpi=80)


if __name__ == "__main__":
    main()
