"""Gaussian-Poincaré normalized activations, the baseline of Yuan et al., "ANAct" (2022), Sec. 2."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lightning_noisy.functional.scores import gpn_constants
from lightning_noisy.functional.slopes import works_in_place

__all__ = ["GPNActivation"]


class GPNActivation(nn.Module):
    r""":math:`a f(x) + b` with constants that make :math:`E[g^2] = E[g'^2] = 1` at N(0, 1).

    Lu, Gould and Ajanthan, "Bidirectionally Self-Normalizing Neural Networks" (2020).

    Args:
        function: elementwise callable or module f; a and b are computed by quadrature.
        inplace: overwrite the input with the result, as an in-place activation does. Costs a copy of the input.

    Attributes:
        scale: a, a float.
        shift: b, a float.

    Shape:
        Input and output: any shape, equal.

    Raises:
        TypeError: if ``function`` is not callable.
        ValueError: if it has no such constants, or works in place.

    >>> GPNActivation(nn.Tanh())
    GPNActivation(
      scale=1.4674, shift=0.3885
      (function): Tanh()
    )
    """

    def __init__(self, function: Callable[[Tensor], Tensor], *, inplace: bool = False) -> None:
        super().__init__()
        if not callable(function):
            raise TypeError(f"function must be an elementwise callable, got {function!r}.")
        if works_in_place(function):
            raise ValueError(f"function must not work in place, got {function!r}. Use inplace=True here instead.")
        self.function = function
        self.inplace = inplace
        self.scale, self.shift = gpn_constants(function)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the scaled and shifted function."""
        output = self.scale * self.function(input.clone() if self.inplace else input) + self.shift
        return input.copy_(output) if self.inplace else output

    def extra_repr(self) -> str:
        """The constants."""
        return f"scale={self.scale:.4f}, shift={self.shift:.4f}"
