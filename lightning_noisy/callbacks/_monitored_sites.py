"""Which call sites ActivationMonitor looks at."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_noisy._torch_internals import strip_wrappers
from lightning_noisy.replacement.sites import ActivationSite

__all__ = ["agreed_sites"]


def agreed_sites(
    trainer: pl.Trainer, found: Sequence[ActivationSite], patterns: Sequence[str] | None
) -> list[ActivationSite]:
    """The sites that are called and match a pattern, the same on all processes.

    They are those of the first process: others may find other ones, if what a model calls depends on rank or chance.
    """
    own = {site.name: site for site in found}
    chosen = _matching([site for site in found if site.role != "unused"], patterns)
    names = trainer.strategy.broadcast([(site.name, site.function) for site in chosen])
    return [own.get(name) or _not_here(name, function) for name, function in names]


def _not_here(name: str, function: str) -> ActivationSite:
    """Stands for a site that this process doesn't have."""
    return ActivationSite(name, "module", function, "", None, None, None, None, None, None)


def _matching(sites: list[ActivationSite], patterns: Sequence[str] | None) -> list[ActivationSite]:
    """Those that match a pattern; one that matches none warns."""
    names = [strip_wrappers(site.name) or "root" for site in sites]
    for pattern in patterns or ():
        if not fnmatch.filter(names, pattern):
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0) or ["none"]
            rank_zero_warn(
                f"sites={pattern!r} matches no activation of the model. The closest names are: {', '.join(close)}."
            )
    matches = [any(fnmatch.fnmatchcase(name, each) for each in patterns or ("*",)) for name in names]
    return [site for site, is_chosen in zip(sites, matches, strict=True) if is_chosen]
