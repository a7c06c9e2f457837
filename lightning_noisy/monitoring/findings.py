"""Findings as text, dicts and Markdown, and the advice on each kind."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["ADVICE", "Finding", "Findings"]

# By kind; and "normalized", of vanishing and exploding ones between normalized activations. The sources are Yuan et
# al., "ANAct" (2022); Gulcehre et al., "Noisy Activation Functions" (2016); Neelakantan et al., "Adding Gradient Noise"
# (2015); Kathuria, "Vanishing Gradients and Choosing the Right Activation Function" (2018).
ADVICE = {
    "not_finite": "Lower the learning rate or clip gradients, and look for a division or a logarithm before that site.",
    # Neelakantan, section 4.1: noise gets a network out of weights that are all zero.
    "constant_input": "The weights before it are zero or equal: initialize them, or add noise by GradientNoise.",
    # ANAct, Eq. 9 and 13: ρ ≈ ρ′ ≈ 1.
    "vanishing_signal": 'Initialize for the function (He for ReLU), normalize, or replace_activations(model, "nsw").',
    "exploding_signal": 'Initialize smaller weights, normalize, or replace_activations(model, "nsw").',
    # Kathuria, "ReLU to the rescue"; ANAct, Eq. 8.
    "vanishing_gradient": "Initialize for the function (He for ReLU), use functions with larger slopes (a ReLU or tanh"
    ' for a sigmoid), residual connections, or replace_activations(model, "normalized", initialize="xavier").',
    # ANAct, section 3.1: normalized activations keep the variance if the weights do.
    "normalized": "The activations are normalized already, the weights change its size: initialize them by Xavier's"
    ' rule, as replace_activations(model, ..., initialize="xavier") does.',
    "exploding_gradient": "Clip gradients, initialize smaller weights, or normalize.",
    # Kathuria, "The dying ReLU problem" and "How to choose an activation function"; ANAct's NReLU is centred.
    "dead_units": 'Use a leaky or exponential unit, or replace_activations(model, "nrelu"); lower the learning rate.',
    # Gulcehre, section 4: noise that grows with the saturation.
    "saturation": "Initialize smaller weights or normalize before it; noise lets gradients through:"
    ' replace_activations(model, {"<function>": "nah"}).',
    # ANAct, Eq. 17 and 18.
    "rejected": "Its λ stays as it is. The input has shifted: raise its bounds, or lower max_rejections.",
    "dormant_units": "A narrower layer would do as much. Whether that hurts is disputed.",
    # Kathuria, "Zero-centered activations"; ANAct, Eq. 14.
    "off_centre": "Gradients of the weights that follow all have one sign: use tanh for a sigmoid, or a normalized"
    " activation, which is centred.",
    "update_ratio": "Lower the learning rate, or warm it up.",
    "update_ratio_least": "They don't learn: their gradients vanish, or the learning rate is too small.",
    # ANAct, Fig. 4.
    "weight_mean": "Normalized activations keep weights centred; so does weight decay.",
}


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        kind: which kind, such as ``"dead_units"``.
        where: the sites or parameters, worst first.
        since: the first logged step from which on it has been so; None for a single look.
        value: what was measured at the worst of them.
        severity: findings are sorted by it, worst first: 4 and more if the training can't go on, 3 and more if nothing
            reaches some layers, 2 and more if part of the network is lost, below that what slows it down.
        message: what is wrong, in a sentence.
        advice: what to do.
    """

    kind: str
    where: tuple[str, ...]
    since: int | None
    value: float
    severity: float
    message: str
    advice: str

    def as_dict(self) -> dict[str, Any]:
        """The attributes by name."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.message} {self.advice}"


class Findings(list[Finding]):
    """Findings, worst first; prints as a list of sentences."""

    def __str__(self) -> str:
        """One paragraph for each, or that there is none."""
        return "\n".join(f"{number}. {each}" for number, each in enumerate(self, start=1)) or "No findings."

    __repr__ = __str__

    def as_dicts(self) -> list[dict[str, Any]]:
        """Each as a dict of plain values."""
        return [each.as_dict() for each in self]

    def as_markdown(self) -> str:
        """For a text panel."""
        rows = (f"{number}. **{each.message}** {each.advice}" for number, each in enumerate(self, start=1))
        return "\n".join(rows) or "No findings."
