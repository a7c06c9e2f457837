"""What the logged statistics say is wrong, where, since when, and what to do about it.

A finding that is missing costs less than one that is wrong: what healthy networks have by nature is no finding. Weights
make up for gains below 1 (He's initialization has ρ = ρ′ = 1/2 at each ReLU), so that signal and gradient are judged by
how large they are, not by products of gains. One large step is no trend: inputs that aren't scaled end at the first
normalization, and a mean over n positions divides the gradient of each by n.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from lightning_noisy.monitoring.findings import ADVICE, Finding, Findings
from lightning_noisy.nn.registry import NORMALIZED

__all__ = ["Finding", "Findings", "Site", "Thresholds", "diagnose"]

# Functions that are flat on both sides. A ReLU is flat on one, for half of the elements by nature.
SATURATING = ("hardsigmoid", "hardtanh", "sigmoid", "softsign", "tanh")
# Those of them with small slopes everywhere, that only large weights make up for.
_LOGISTIC = ("hardsigmoid", "sigmoid")
_NORMALIZED = {"NormalizedActivation", *(each.__name__ for each in NORMALIZED.values())}
_UNNORMALIZED = 0.7  # deviation of a pre-activation below which it is neither normalized nor from large weights
_LOOKS = 5  # for how many logged steps in a row steps are too large: those of weights that start at zero are, at first
History = Sequence[tuple[int, Mapping[str, float]]]


@dataclass(frozen=True)
class Site:
    """A call site, as far as it matters here.

    Attributes:
        name: its name.
        function: plain name of its function, such as ``"relu"``.
        role: see :attr:`~lightning_noisy.replacement.sites.ActivationSite.role`.
        module: class of its module.
    """

    name: str
    function: str
    role: str
    module: str = ""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """From which value on something is a finding.

    Attributes:
        dead_units: share of the units of a site, in (0, 1], if it has doubled since the first look: in deep networks
            samples look alike at first, so that many units are off for all of them.
        dead_units_at_first: the same whatever it was at the first look.
        dormant_units: share of the units of a site, in (0, 1].
        saturation: share of the elements of a site whose function is flat on both sides, in (0, 1].
        vanishing: ratio of the last pre-activation's standard deviation to the first one's, or to 1 if that is
            smaller; or of the gradients' root mean squares in the other direction, without the largest step; in (0, 1].
        exploding: the same where it is too large (to 1 if the first one is smaller), > 1.
        off_centre: absolute mean of a site's output in standard deviations, > 0; 2.4 is a sigmoid's of N(0, 1).
        rejected: number of batches in a row that a normalized activation rejected, > 0.
        weight_mean: absolute mean of a weight matrix, > 0, if it has grown fivefold since the first look, as those of
            most matrices have; the mean of a small matrix changes by chance.
        update_ratio: size of a step relative to the weights, > 0.
        update_ratio_least: the same from the first look on where it is too small, > 0. Frozen weights don't count.
    """

    dead_units: float = 0.4
    dead_units_at_first: float = 0.7
    dormant_units: float = 0.8
    saturation: float = 0.5
    vanishing: float = 1e-2
    exploding: float = 1e3
    off_centre: float = 3.0
    rejected: float = 50
    weight_mean: float = 0.1
    update_ratio: float = 0.3
    update_ratio_least: float = 1e-7

    def __post_init__(self) -> None:
        shares = ("dead_units", "dead_units_at_first", "dormant_units", "saturation", "vanishing")
        for each in fields(self):
            value, upper = getattr(self, each.name), 1 if each.name in shares else math.inf
            if not 0 < value <= upper:
                raise ValueError(f"{each.name} must be in (0, {upper}], got {value!r}.")
        if not self.exploding > 1:
            raise ValueError(f"exploding must be > 1, got {self.exploding!r}.")


@dataclass(frozen=True)
class _Rule:
    """Something that may be wrong with a site.

    Attributes:
        kind: of the finding; and the name of the threshold, which is 1 if there is none of that name.
        severity: of the finding.
        text: of the finding.
        measure: what to compare with the threshold, from a function that gives the site's statistics by name.
        functions: the functions that it is asked of; all if there are none.
        is_share: whether it is a share, half of which counts for the severity.
    """

    kind: str
    severity: float
    text: str
    measure: Callable[[Callable[[str], float]], float]
    functions: tuple[str, ...] = ()
    is_share: bool = False


_RULES = (
    _Rule("constant_input", 3.5, "The input of {site} doesn't vary{since}.", lambda of: float(of("input_std") == 0)),
    _Rule(
        "dead_units", 2.0, "{value:.0%} of the units of {site} have been dead{since}.", lambda of: of("dead_units"),
        is_share=True,
    ),
    _Rule(
        "saturation", 2.0, "{value:.0%} of the elements of {site} have been on flat parts of the function{since}.",
        lambda of: of("saturation"), SATURATING, True,
    ),
    _Rule(
        "rejected", 1.5, "λ of {site} is frozen: {value:.0f} batches in a row were rejected{since}.",
        lambda of: of("rejected"),
    ),
    _Rule(
        "dormant_units", 1.2, "{value:.0%} of the units of {site} have been dormant{since}.",
        lambda of: of("dormant_units"), is_share=True,
    ),
    _Rule(
        "off_centre", 1.0, "The outputs of {site} aren't centred: their mean is {value:.2g} deviations{since}.",
        lambda of: abs(of("mean")) / max(of("std"), 1e-30),
    ),
)  # fmt: skip


def diagnose(history: History, sites: Sequence[Site], *, thresholds: Thresholds | None = None) -> Findings:
    """Findings in what was logged.

    Args:
        history: of each logged step, in order, the step and the values by tag, such as ``"rho/net.1"``. Used are
            ``input_std``, ``mean``, ``std``, ``saturation``, ``dead_units``, ``dormant_units``, ``rho``, ``rho_prime``,
            ``grad_rms`` and ``rejected`` of sites, ``weight_mean`` and ``update_ratio`` of parameters, as far as they
            are there.
        sites: the call sites in the order of the calls. Hidden ones and those after a residual addition count.
        thresholds: by default ``Thresholds()``.

    Returns:
        The findings that hold at the last step; if there are several steps, also at the one before. That signal or
        gradient vanished or exploded counts also if it has been so from the first step on for a tenth of all. Steps of
        the optimizer count if their size has been so for five logged steps.

    >>> site = Site("net.1", "relu", "hidden")
    >>> history = [(step, {"dead_units/net.1": step / 1000}) for step in range(0, 600, 100)]
    >>> print(diagnose(history, [site])[0].message)
    50 % of the units of net.1 (relu) have been dead since step 400.
    """
    if not history:
        return Findings()
    look = _Look(history, [site for site in sites if site.role in ("hidden", "residual")], thresholds or Thresholds())
    found = [*look.not_finite(), *look.of_sites(), *look.along_the_depth(), *look.of_weights()]
    return Findings(sorted(found, key=lambda each: -each.severity))


class _Look:
    """Finds, in one history."""

    def __init__(self, history: History, sites: Sequence[Site], thresholds: Thresholds) -> None:
        self.history, self.sites, self.limit = history, sites, thresholds
        self.last = history[-1][1]

    def since(self, holds: Callable[[Mapping[str, float]], bool], looks: int | None = None) -> int | None:
        """From which step on something holds; None if it doesn't at the last looks, by default two, or the only one."""
        step, count = None, 0
        for when, values in reversed(self.history):
            if not holds(values):
                break
            step, count = when, count + 1
        return step if count >= (looks or min(2, len(self.history))) else None

    def until(self, holds: Callable[[Mapping[str, float]], bool]) -> int | None:
        """The last step of those from the first look on at which something held; None if they are few."""
        count = 0
        for _, values in self.history:
            if not holds(values):
                break
            count += 1
        return self.history[count - 1][0] if count >= max(2, len(self.history) / 10) else None

    def first(self, tag: str) -> float:
        """The value of the first look at it; NaN if there is none."""
        return next((values[tag] for _, values in self.history if math.isfinite(values.get(tag, math.nan))), math.nan)

    def when(self, step: int) -> str:
        """``" since step 300"``, where there is a history."""
        return f" since step {step}" if len(self.history) > 1 else ""

    def not_finite(self) -> Iterator[Finding]:
        """Infinite or undefined pre-activations; of the first site, as those behind it aren't finite either."""
        for site in self.sites:

            def is_bad(values: Mapping[str, float], site: Site = site) -> bool:
                # Without calls all is undefined.
                return not math.isfinite(_of("input_std", site, values, 0.0)) and not math.isnan(
                    _of("saturation", site, values, 0.0)
                )

            if is_bad(self.last):
                step = self.since(is_bad, looks=1)
                assert step is not None  # as it holds at the last one
                message = f"The input of {_named(site)} isn't finite{self.when(step)}."
                yield self.finding("not_finite", [site.name], step, math.nan, 4.0, message)
                return

    def of_sites(self) -> Iterator[Finding]:
        """What is wrong with single sites; several with the same make one finding."""
        lost: set[str] = set()  # of which all else follows
        for rule in _RULES:
            least = getattr(self.limit, rule.kind, 1.0)
            hits = []
            for site in self.sites:
                if site.name in lost or (rule.functions and site.function not in rule.functions):
                    continue
                if rule.kind == "dead_units":
                    doubled = 2 * self.first(f"dead_units/{_shown(site.name)}")
                    least = min(max(self.limit.dead_units, doubled), self.limit.dead_units_at_first)
                step = self.since(partial(_reaches, rule, site, least))
                if step is not None:
                    hits.append((rule.measure(partial(_of, site=site, values=self.last)), site, step))
                if rule.kind == "constant_input" and _lets_nothing_through(site, self.last):
                    break  # the inputs of those behind it are constant for that reason
            hits.sort(key=lambda hit: -hit[0])
            if hits:
                value, worst, step = hits[0]
                lost |= {site.name for _, site, _ in hits} if rule.kind in ("dead_units", "constant_input") else set()
                named = _and_others([_named(site) for _, site, _ in hits])
                message = rule.text.format(site=named, since=self.when(step), value=value).replace("%", " %")
                advice = ADVICE[rule.kind].replace("<function>", worst.function)
                severity = rule.severity + (value / 2 if rule.is_share else 0)
                yield self.finding(
                    rule.kind, [site.name for _, site, _ in hits], step, value, severity, message, advice
                )

    def along_the_depth(self) -> Iterator[Finding]:
        """Whether signal and gradient get through."""
        limit = self.limit
        for kind, tag, words, scale in (
            ("signal", "input_std", "standard deviation of the pre-activations", _scale_of_signal),
            ("gradient", "grad_rms", "root mean square of the gradient", _without_largest_step),
        ):
            for change, holds in (
                ("vanishing", lambda sizes, of=scale: of(sizes, min) < limit.vanishing),
                ("exploding", lambda sizes, of=scale: of(sizes, max) > limit.exploding),
            ):

                def is_so(values: Mapping[str, float], tag: str = tag, holds: Any = holds) -> bool:
                    return bool(holds([*self.path(tag, values).values()]))

                step, values, severity = self.since(is_so), self.last, 3.0
                if step is not None:
                    when = ("vanishes" if change == "vanishing" else "explodes") + self.when(step)
                elif (last_step := self.until(is_so)) is not None:  # it may have cost most of the training
                    (step, values), severity = self.history[0], 2.5
                    when = ("vanished" if change == "vanishing" else "exploded") + f" until step {last_step}"
                else:
                    continue
                path = self.path(tag, values)
                start, *_, end = path
                value = path[end] / path[start]
                message = (
                    f"The {kind} {when}: from {_named(start)} to {_named(end)} the {words} changes by a factor of"
                    f" {value:.1e}."
                )
                advice = None
                if all(site.module in _NORMALIZED for site in path):  # so what is left is due to the weights
                    advice = ADVICE["normalized"]
                yield self.finding(f"{change}_{kind}", [end.name], step, value, severity, message, advice)
        if self.path("grad_rms", self.last):
            return  # measured
        step = self.since(lambda values: self.estimate(values) < limit.vanishing)
        if step is not None:
            value, first, last = self.estimate(self.last), self.sites[0], self.sites[-1]
            message = (
                f"The gradient vanishes{self.when(step)}: from {_named(last)} to {_named(first)} its root mean square"
                f" changes by a factor of about {value:.1e}, by the slopes and the weights."
            )
            yield self.finding("vanishing_gradient", [first.name], step, value, 3.0, message)

    def path(self, tag: str, values: Mapping[str, float]) -> dict[Site, float]:
        """How large something is at the sites, in its direction, without zeros: branches may begin with them."""
        found = {site: _of(tag, site, values) for site in self.sites}
        found = {site: value for site, value in found.items() if 0 < value < math.inf}
        return dict(reversed(found.items())) if tag == "grad_rms" else found

    def estimate(self, values: Mapping[str, float]) -> float:
        """What becomes of the gradient's root mean square, from ρ and ρ′; NaN where that isn't clear.

        Var[W] fan_in = Var[h of the next] / E[φ(h)²], and the gradient's variance grows by ρ′ times that in a site
        (ANAct, Eq. 3 and 7), which multiplies to Π(ρ′ / ρ) Var[last h] / Var[first h]. That is wrong if there are
        skip connections, or a normalization, which removes the mean of φ(h). So only perceptrons of sigmoids count
        whose pre-activations show that they aren't normalized.
        """
        sizes = [_of("input_std", site, values) for site in self.sites]
        is_plain = all(site.function in _LOGISTIC and site.role == "hidden" for site in self.sites)
        if len(sizes) < 2 or not is_plain or not statistics.median(sizes[1:]) < _UNNORMALIZED:
            return math.nan
        gains = [_of("rho_prime", site, values) / (_of("rho", site, values) or math.nan) for site in self.sites[:-1]]
        return math.sqrt(math.prod(gains)) * sizes[-1] / sizes[0] if sizes[0] > 0 else math.nan

    def of_weights(self) -> Iterator[Finding]:
        """What is wrong with weight matrices."""
        limit = self.limit
        for kind, statistic, severity, text in (
            ("update_ratio", "update_ratio", 1.1, "Steps move {0} by {2:.2g} of its size{1}."),
            ("update_ratio_least", "update_ratio", 1.1, "Steps move {0} by only {2:.2g} of its size{1}."),
            ("weight_mean", "weight_mean", 0.8, "The weights of {0} have drifted to a mean of {2:.2g}{1}."),
        ):
            tags = [tag for tag in self.last if tag.startswith(f"{statistic}/")]
            is_small = kind == "update_ratio_least"
            hits = []
            for tag in tags:
                least = (
                    0.0 if is_small else max(getattr(limit, kind), 5 * self.first(tag) if kind == "weight_mean" else 0)
                )
                upper = limit.update_ratio_least if is_small else math.inf
                looks = None if kind == "weight_mean" else _LOOKS
                step = self.since(partial(_is_between, tag, least, upper), looks)
                if step is not None and not (is_small and step != self.history[0][0]):
                    hits.append((self.last[tag], tag.partition("/")[2], step))
            if hits and (kind != "weight_mean" or 1 < len(tags) < 2 * len(hits)):
                hits.sort(reverse=not is_small)
                value, _, step = hits[0]
                names = [name for _, name, _ in hits]
                message = text.format(_and_others(names), self.when(step), value)
                yield self.finding(kind, names, step, value, severity, message)

    def finding(
        self,
        kind: str,
        where: Iterable[str],
        step: int,
        value: float,
        severity: float,
        text: str,
        advice: str | None = None,
    ) -> Finding:
        """A finding with its advice."""
        since = step if len(self.history) > 1 else None
        text = text.replace("have been", "are") if since is None else text
        return Finding(kind, tuple(where), since, value, severity, text, advice or ADVICE[kind])


def _of(statistic: str, site: Site, values: Mapping[str, float], otherwise: float = math.nan) -> float:
    return values.get(f"{statistic}/{_shown(site.name)}", otherwise)


def _scale_of_signal(sizes: Sequence[float], extreme: Callable[..., float]) -> float:
    """The last size to the first one, or to 1, a good one for pre-activations: the inputs may have any scale."""
    return sizes[-1] / extreme(sizes[0], 1.0) if sizes else math.nan


def _without_largest_step(sizes: Sequence[float], extreme: Callable[..., float]) -> float:
    """The last size to the first one without the largest step in that direction, such as that of a pooling."""
    steps = [after / before for before, after in itertools.pairwise(sizes)]
    if not steps:
        return math.nan
    steps.remove(extreme(steps))
    return math.prod(steps)


def _lets_nothing_through(site: Site, values: Mapping[str, float]) -> bool:
    """Whether all units are off, though the input varies."""
    return _of("dead_units", site, values) >= 1 and _of("input_std", site, values) > 0


def _reaches(rule: _Rule, site: Site, least: float, values: Mapping[str, float]) -> bool:
    return rule.measure(partial(_of, site=site, values=values)) >= least


def _is_between(tag: str, least: float, upper: float, values: Mapping[str, float]) -> bool:
    value = values.get(tag, math.nan)
    return max(least, 5e-324) <= value <= upper


def _shown(name: str) -> str:
    return name or "root"


def _named(site: Site) -> str:
    return f"{_shown(site.name)} ({site.function})"


def _and_others(names: Sequence[str]) -> str:
    """The worst of several."""
    more = (
        f" and {len(names) - 1} more ({', '.join(names[1:3])}{', ...' if len(names) > 3 else ''})" if names[1:] else ""
    )
    return names[0] + more
