"""What a replacement says that it did."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from lightning_noisy.replacement.origin import written
from lightning_noisy.replacement.policy import REMEDIES, Policy
from lightning_noisy.replacement.sites import ActivationSites

__all__ = ["joined", "say", "summary", "warn_unchanged"]
_log = logging.getLogger(__name__)


def summary(policy: Policy, sites: ActivationSites, there: set[str]) -> str:
    """What was replaced, and why the others were not."""
    left = Counter(policy.reason_to_stay(site) or "kept" for site in sites if site.name not in there)
    reasons = ", ".join(f"{count} {reason}" for reason, count in left.most_common())
    named = repr(policy.to) if isinstance(policy.to, Mapping) else written(policy.to).strip("'")
    return (
        f"{named}: {len(there)} of {len(sites)} activations replaced"
        + (f"; {left.total()} left: {reasons}" if left else "")
        + (f"; {len(sites.unresolved)} unresolved ({joined(sites)})" if sites.unresolved else "")
    )


def say(text: str) -> None:
    """Log a line, on the first process alone."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        _log.info(text)


def joined(sites: ActivationSites) -> str:
    """The first five of what is unresolved."""
    return "; ".join(sites.unresolved[:5]) + (
        f"; and {len(sites.unresolved) - 5} more" if len(sites.unresolved) > 5 else ""
    )


def warn_unchanged(model: nn.Module, sites: ActivationSites, policy: Policy) -> None:
    """Warn that nothing was replaced: for each reason, the sites that stay, and what would replace them."""
    staying: dict[str, list[str]] = {}
    for site in sites:
        reason = policy.reason_to_stay(site) or "kept"
        staying.setdefault(reason, []).append(f"{site.name or '(root)'} ({site.function})")
    found = [f"{', '.join(each)}: {reason}, replaced with {REMEDIES[reason]}" for reason, each in staying.items()]
    hint = f"Found {'; '.join(found)}." if sites else "No activation was found in it."
    what = f"replace_activations({type(model).__name__}, {policy.to!r}) replaced nothing."
    if sites.unresolved:
        hint += f" Not looked into: {joined(sites)}."
    warnings.warn(f"{what} {hint}", UserWarning, stacklevel=4)
