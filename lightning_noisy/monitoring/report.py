"""What the activations of a model do to one batch: a table, findings and a picture, before any training."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_noisy._torch_internals import tree_leaves, tree_map
from lightning_noisy.monitoring.diagnosis import Findings, Site, Thresholds, diagnose
from lightning_noisy.monitoring.recorder import ActivationRecorder
from lightning_noisy.monitoring.statistics import tag_of
from lightning_noisy.replacement.dataflow import call, private_copy, random_states_kept
from lightning_noisy.replacement.sites import ActivationSite, activation_sites

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SignalReport", "described", "signal_report", "table_of"]

# What the table is made of, and the findings.
_REPORTED = (
    *("rho", "rho_prime", "r_score", "saturation", "sparsity", "dead_units", "dormant_units"),
    *("mean", "std", "input_std", "lambda", "mu", "rejected"),
)


class SignalReport:
    """What the activations do to signal and gradient; prints as a table with the findings below.

    Attributes:
        sites: one dict for each call site, in the order of the calls: ``name``, ``function``, ``role``; ``rho``,
            ``rho_prime``; ``rho_product``, the product of ρ over the hidden sites from the input on to this one;
            ``rho_prime_product``, that of ρ′ from the output on; ``saturation``, ``sparsity``, ``dead_units``,
            ``dormant_units``; ``input_std``, the standard deviation of the pre-activation; ``grad_rms``, the root mean
            square of the gradient of the activation's output, if there was a backward pass; ``lambda`` and ``mu`` of
            normalized activations.
        weights: one dict for each weight matrix with a gradient: ``name`` and ``grad_variance``.
        findings: what is wrong, where, and what to do, worst first; empty for a healthy network.
    """

    def __init__(self, sites: list[dict[str, Any]], weights: list[dict[str, Any]], findings: Findings) -> None:
        self.sites, self.weights, self.findings = sites, weights, findings

    def __str__(self) -> str:
        """The table, the weights and the findings."""
        if not self.sites:
            return "No activation was looked at."
        columns = [name for name in _COLUMNS if any(name in site for site in self.sites)]
        rows = [["site", "function", "role", *(_COLUMNS[name] for name in columns)]]
        for site in self.sites:
            numbers = [_short(site.get(name, math.nan)) for name in columns]
            rows.append([site["name"] or "(root)", site["function"], site["role"], *numbers])
        text = _aligned(rows)
        if self.weights:
            text += "\n\n" + _aligned(
                [
                    ["weight", "gradient variance"],
                    *([each["name"], _short(each["grad_variance"])] for each in self.weights),
                ]
            )
        return f"{text}\n\n{self.findings}"

    __repr__ = __str__

    def plot(self) -> Figure:
        """A picture of how large signal and gradient are from layer to layer.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        from lightning_noisy.monitoring.figures import scales_figure

        sites = [site for site in self.sites if site["role"] in ("hidden", "residual")] or self.sites
        names = [site["name"] or "(root)" for site in sites]
        forward = [site["input_std"] for site in sites]
        return scales_figure(names, forward, [site.get("grad_rms", math.nan) for site in sites])


_COLUMNS = {
    "rho": "ρ",
    "rho_prime": "ρ′",
    "rho_product": "Πρ",
    "rho_prime_product": "Πρ′",
    "saturation": "saturated",
    "sparsity": "inactive",
    "dead_units": "dead",
    "dormant_units": "dormant",
    "input_std": "input std",
    "grad_rms": "grad rms",
    "lambda": "λ",
    "mu": "μ",
}


def _short(number: float) -> str:
    if math.isnan(number):
        return "-"
    return f"{number:.3f}" if number == 0 or 1e-3 <= abs(number) < 1e4 else f"{number:.1e}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(width) for c, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def table_of(values: Mapping[str, float], sites: Sequence[Site]) -> list[dict[str, Any]]:
    """The rows of :attr:`SignalReport.sites`.

    Args:
        values: statistics by tag.
        sites: in the order of the calls.
    """
    rows: list[dict[str, Any]] = []
    for site in sites:
        row: dict[str, Any] = {"name": site.name, "function": site.function, "role": site.role}
        for name in (*_REPORTED, "grad_rms"):
            if (tag := tag_of(name, site.name)) in values:
                row[name] = values[tag]
        rows.append(row)
    for name, order in (("rho", rows), ("rho_prime", rows[::-1])):
        product = 1.0
        for row in order:
            if row["role"] in ("hidden", "residual"):
                product *= row.get(name, math.nan)
                row[f"{name}_product"] = product
    return rows


def described(sites: Sequence[ActivationSite]) -> list[Site]:
    """What the diagnosis needs to know of sites."""
    return [Site(each.name, each.function, each.role, type(each.module).__name__) for each in sites]


def signal_report(
    model: nn.Module,
    batch: Any,
    loss: Callable[..., Tensor] | None = None,
    *,
    thresholds: Thresholds | None = None,
) -> SignalReport:
    """What the activations of a model do to one batch: one forward and one backward pass of a copy, in training mode.

    The copy has parameters of its own, and the batch is copied, too: nothing is written to the model, the batch or any
    random state. Nothing is logged, and no optimizer steps.

    Args:
        model: any module, on the device where it is to run.
        batch: what the loss needs. Of a LightningModule without ``loss``: what its ``training_step`` gets. With
            ``loss``: a pair of the model's inputs and the target, or only the inputs. Else the inputs: a tensor, a
            tuple of positional arguments, or a dict of keyword arguments.
        loss: called with output and target, such as ``F.cross_entropy``, or with the output alone if there is no
            target. By default that of ``training_step``, or the output's attribute ``loss``; without these the
            gradient of the output is drawn from N(0, 1).
        thresholds: of the findings.

    Returns:
        The report.

    Raises:
        TypeError: if ``batch`` is a DataLoader.
        ValueError: if there is nothing to look at, or no scalar to differentiate: a LightningModule with manual
            optimization needs ``loss``.

    >>> model = nn.Sequential(*[layer for _ in range(10) for layer in (nn.Linear(8, 8), nn.Sigmoid())], nn.Linear(8, 1))
    >>> report = signal_report(model, torch.randn(64, 8))
    >>> report.sites[0]["rho_prime_product"] < 1e-9
    True
    """
    if isinstance(batch, DataLoader):
        raise TypeError("batch must be one batch, got a DataLoader: pass next(iter(loader)).")
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    batch = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, copy.deepcopy(batch))
    with ExitStack() as stack:
        stack.enter_context(random_states_kept(model))
        twin = private_copy(model, share=False).train()
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of the Trainer that a LightningModule doesn't have
        run = _pass(twin, batch, loss)
        recorder = ActivationRecorder(twin, activation_sites(twin), statistics=(*_REPORTED, "grad_rms"))
        stack.enter_context(torch.enable_grad())
        with recorder:
            value = run()
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"The loss must be one number that has a gradient, got {shown}: pass a loss.")
            names = {each: name for name, each in twin.named_parameters() if each.requires_grad}
            gradients = torch.autograd.grad(value, list(names), allow_unused=True) if names else ()
    sites = [recorder.sites[number] for number in recorder.called]
    if not sites:
        raise ValueError(f"No activation of {type(model).__name__} was called with this batch.")
    values = recorder.compute()
    weights: list[dict[str, Any]] = [
        {"name": name, "grad_variance": float(gradient.double().var(correction=0))}
        for (parameter, name), gradient in zip(names.items(), gradients, strict=False)
        if gradient is not None and parameter.dim() > 1
    ]
    values |= {tag_of("grad_variance", each["name"]): each["grad_variance"] for each in weights}
    order = described(sites)
    findings = diagnose([(0, values)], order, thresholds=thresholds)
    return SignalReport(table_of(values, order), weights, findings)


def _pass(twin: nn.Module, batch: Any, loss: Callable[..., Tensor] | None) -> Callable[[], Tensor]:
    """What computes the value to differentiate."""
    step = getattr(twin, "training_step", None)
    for name in ("log", "log_dict"):
        if hasattr(twin, name):
            object.__setattr__(twin, name, lambda *_, **__: None)

    def run() -> Tensor:
        if loss is None and callable(step):
            if not getattr(twin, "automatic_optimization", True):
                raise ValueError(f"{type(twin).__name__} optimizes manually: pass a loss.")
            wanted = len(inspect.signature(step).parameters)  # Lightning allows a step without batch_idx
            result = step(*(batch, 0)[:wanted])
            return cast(Tensor, result["loss"] if isinstance(result, Mapping) else result)
        if loss is not None:
            is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2
            inputs, target = (batch[0], [batch[1]]) if is_pair else (batch, [])
            try:
                output = call(twin, inputs)
            except NotImplementedError as error:  # of a LightningModule that has a training_step alone
                raise ValueError(f"{error}. Leave out loss, if training_step computes it.") from error
            return loss(output, *target)
        try:
            output = call(twin, tuple(batch) if isinstance(batch, list) else batch)
        except TypeError as error:
            raise ValueError(f"{error}. If the batch has targets, pass a loss, such as F.cross_entropy.") from error
        if isinstance(found := getattr(output, "loss", None), Tensor):
            return found
        leaves = [each for each in tree_leaves(output) if isinstance(each, Tensor) and each.requires_grad]
        if not leaves:
            raise ValueError(f"The output of {type(twin).__name__} has no gradient: pass a loss.")
        return torch.stack([(each * torch.randn_like(each)).sum() for each in leaves]).sum()

    return run
