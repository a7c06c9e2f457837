"""Copies of a part of the model, such as an EMA teacher or a target network: their activations go with the original's.

Otherwise averaging the parameters in pairs, or loading the one's state dict into the other, would fail after a swap.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_noisy.replacement.graph import Node
from lightning_noisy.replacement.source import own_class

if TYPE_CHECKING:
    from lightning_noisy.replacement.looking import Seen

__all__ = ["follow_originals"]


def follow_originals(model: nn.Module, names: Collection[str], seen: dict[str, list[Seen]]) -> None:
    """Let the places in a copy be what they are in the original.

    A part is a copy of another one of the same class and shapes if it has the same values, or if the two are the only
    ones, and it is frozen while the other is trained, unless one leads to the other. If it isn't called in the passes
    that were looked at, or is frozen, its places are what those of the other are; else they have the same order.

    Args:
        model: the model.
        names: of all places.
        seen: by the names of the places what was seen of them; changed.
    """
    for pair in _alike(model):
        inside = {part: [name for name in names if name.startswith((f"{part}.", f"{part}:"))] for part in pair}
        called = {part: any(name in seen for name in inside[part]) for part in pair}
        frozen = {part: not any(each.requires_grad for each in model.get_submodule(part).parameters()) for part in pair}
        first, second = pair
        if (called[second] and not called[first]) or (frozen[first] and not frozen[second]):
            first, second = second, first
        for name in inside[second]:
            known, own = seen.get(first + name[len(second) :]), seen.get(name)
            if known is None or (own and _is_chain(known[0].nodes, own[0].nodes)):
                continue
            if not called[second]:
                seen[name] = [_within(second, first, each) for each in known]
            for each in own or ():
                each.order = known[0].order
                if frozen[second] and not frozen[first]:
                    each.take(known[0])


def _is_chain(first: list[Node], second: list[Node]) -> bool:
    return any(a.descends_from(b) or b.descends_from(a) for a in first for b in second)


def _within(copied: str, original: str, seen: Seen) -> Seen:
    """The same with the paths of the copy."""
    move = lambda path: copied + path[len(original) :] if f"{path}.".startswith(f"{original}.") else path  # noqa: E731
    return replace(
        seen,
        layer=None if seen.layer is None else move(seen.layer),
        batch_norm=None if seen.batch_norm is None else move(seen.batch_norm),
        feeders=[move(path) for path in seen.feeders],
    )


def _alike(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Pairs of parts, the largest only, with the same parameters, or one frozen and one trained."""
    groups: dict[object, list[tuple[str, nn.Module]]] = defaultdict(list)
    for path, module in model.named_modules():
        try:
            parameters = [(name, parameter.shape) for name, parameter in module.named_parameters()]
        except RuntimeError:  # of lazy modules
            continue
        if path and parameters:
            groups[own_class(module), tuple(parameters)].append((path, module))
    found: list[str] = []
    for group in groups.values():
        for number, (path, module) in enumerate(group):
            for other, second in group[:number]:
                is_in_found = any(path.startswith(f"{each}.") or other.startswith(f"{each}.") for each in found)
                if not is_in_found and _are_copies(module, second, alone=len(group) == 2):
                    found += [path, other]
                    yield other, path


def _are_copies(first: nn.Module, second: nn.Module, *, alone: bool) -> bool:
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    if any(a is b or a.is_meta or a.device != b.device for a, b in pairs):
        return False
    if alone and all(a.requires_grad != b.requires_grad for a, b in pairs):
        return True
    if any(not torch.equal(a.flatten()[:9], b.flatten()[:9]) for a, b in pairs):  # fast
        return False
    is_random = any(bool((a != a.flatten()[0]).any()) for a, _ in pairs if a.numel())
    return is_random and all(torch.equal(a, b) for a, b in pairs)
