"""What an activation is to its model, by the data flow: hidden, a gate, part of a formula, or an output.

==============================================  ==========================================================
what becomes of the activation's output         what it is
==============================================  ==========================================================
it reaches a layer (an operation with a         hidden
parameter) before it leaves the model
it reaches none                                 an output, or part of a loss
a product with another branch, and it is        a gate, unless the other branch descends from it (then it
sigmoid-like                                    is the trunk), is a mask, a parameter, a constant or itself
a product with another branch, and it is        a gate, unless the other branch is, or descends from it
tanh-like
a product with another learned map of the       a gate (of a gated linear unit)
tensor that its input is a learned map of
an elementwise operation with what is made      part of a formula, as x tanh(softplus(x)) or
elementwise of the tensor it is made of         relu(x) - a relu(-x)
a sum with a number, and it is no gate          part of a formula, as elu(x) + 1
a product with random numbers, and it is        part of a formula: a standard deviation
sigmoid-like or tanh-like
a logarithm or a root                           part of a formula
it is tanh-like, between two scales             part of a formula: a soft cap
its input is made of parameters alone           part of a formula: of a weight
it becomes a gate, or part of a formula,        the same
through other activations, with no layer in
between
==============================================  ==========================================================
"""

from __future__ import annotations

from collections.abc import Iterator

from lightning_noisy.replacement.graph import Graph, Node

__all__ = ["Fate", "fates"]

SIGMOID_LIKE = frozenset({"sigmoid", "hardsigmoid", "logsigmoid", "softplus"})
TANH_LIKE = frozenset({"tanh", "hardtanh", "softsign"})
# What gates and output layers are made of: such a function stays where its fate is not known.
GATE_OR_OUTPUT = SIGMOID_LIKE | TANH_LIKE
# What these take in must not be negative.
_POSITIVE = {"log", "log2", "log10", "log1p", "logit", "sqrt", "rsqrt"}
_ELEMENTWISE = _POSITIVE | {
    "abs", "absolute", "exp", "expm1", "sign", "sin", "cos", "maximum", "minimum", "fmax", "fmin", "where",
    "clamp", "clip", "clamp_min", "clamp_max", "masked_fill", "nan_to_num", "logaddexp", "sigmoid", "tanh", "erf",
}  # fmt: skip


class Fate:
    """What one call of an activation is; None where that is not known.

    Attributes:
        is_hidden: whether its output reaches a layer.
        is_gate: whether it is a factor that gates another branch.
        is_formula: whether it is part of a formula.
        after_residual: whether its input is the sum of two branches.
    """

    def __init__(self, node: Node) -> None:
        self.is_hidden = _reaches_layer(node)
        self.is_gate: bool | None = False
        self.is_formula = _is_formula(node)
        self.after_residual = _is_residual(node.inputs[0]) if node.inputs else None


def fates(graph: Graph) -> dict[Node, Fate]:
    """The fate of each call of a site in a pass."""
    found = {node: Fate(node) for node in graph.sites}
    for factors in graph.products:
        for factor, other in (factors, factors[::-1]):
            for site, is_gate in _gates(factor, other):
                found[site].is_gate = _either(found[site].is_gate, is_gate)
    for node, fate in found.items():
        if not fate.is_gate and any(each.name == "shift" for each in node.users):  # a gate may be 1 - t
            fate.is_formula = True
    # What a gate or a formula consists of is part of it.
    for node in graph.sites:
        if found[node].is_gate or found[node].is_formula:
            for part in _parts(node):
                found[part].is_gate = found[part].is_gate or found[node].is_gate
                found[part].is_formula = found[part].is_formula or found[node].is_formula
    return found


def _either(known: bool | None, new: bool | None) -> bool | None:
    return True if known or new else None if None in (known, new) else False


def _function(node: Node) -> str:
    return str(node.site.function)


def _elementwise(node: Node) -> bool:
    return node.kind not in ("site", "layer", "input", "unknown", "mask")


def _linear(node: Node) -> bool:
    """Whether a learned map may have this among its operations."""
    return node.kind in ("layer", "scale", "move", "other")


def _sites_in(factor: Node) -> list[Node]:
    """The activations that a factor consists of."""
    return [node for node in factor.back(_elementwise) if node.kind == "site"]


def _gates(factor: Node, other: Node) -> Iterator[tuple[Node, bool | None]]:
    """The sites in a factor of a product, and whether each is a gate of the other factor."""
    inside, beside = _sites_in(factor), _sites_in(other)
    sigmoid_beside = any(_function(each) in SIGMOID_LIKE for each in beside if each not in inside)
    for site in inside:
        if other.descends_from(site):  # it is the trunk
            continue
        if _function(site) in SIGMOID_LIKE or (_function(site) in TANH_LIKE and not sigmoid_beside):
            source = _source(other)
            if source == "unknown" and not factor.descends_from(other):
                yield site, None
            elif source != "input" or any(factor.descends_from(each) for each in _ends(other)):
                yield site, True
        elif not beside and _is_map_of_same(site, other) and _is_near(factor, site):
            yield site, True


def _ends(node: Node) -> list[Node]:
    return [each for each in node.back(lambda each: each.kind in ("move", "scale")) if each.is_data]


def _source(node: Node) -> str:
    """The kind of what a factor is made of by moving and scaling alone."""
    kinds = {each.kind for each in _ends(node)} - {"move", "scale"}
    return kinds.pop() if len(kinds) == 1 else ""


def _is_near(factor: Node, site: Node) -> bool:
    """Whether a factor is the activation, moved or scaled."""
    return any(each is site for each in factor.back(lambda each: each.kind in ("move", "scale")))


def _is_map_of_same(site: Node, other: Node) -> bool:
    """Whether an activation's input and another factor are learned maps of one tensor."""
    first = set(site.inputs[0].back(_linear)) if site.inputs else set()
    second = set(other.back(_linear))
    if not all(any(node.kind == "layer" for node in nodes) for nodes in (first, second)):
        return False
    return any(node.is_data for node in first & second)


def _is_formula(site: Node) -> bool:
    """Whether an activation makes a standard deviation, a positive number, a soft cap, a weight or another function."""
    if site.inputs and not site.inputs[0].depends:
        return True
    near = list(site.ahead(lambda node: node.kind in ("move", "scale")))
    if any(node.name in _POSITIVE for node in near):
        return True
    if _meets_itself(site):
        return True
    is_tanh = _function(site) in TANH_LIKE
    if is_tanh and site.inputs and site.inputs[0].kind == "scale" and any(node.kind == "scale" for node in site.users):
        return True
    if not (is_tanh or _function(site) in SIGMOID_LIKE):
        return False
    far = site.ahead(lambda node: node.kind in ("move", "scale", "other"))  # such as exp(0.5 x)
    return any(node.kind == "scale" and any(each.kind == "random" for each in node.inputs) for node in far)


def _meets_itself(site: Node) -> bool:
    """Whether an activation is combined, element by element, with what is made so of the tensor it is made of."""
    if not site.inputs:
        return False
    made_of = {
        node
        for node in site.inputs[0].back(lambda each: _is_pointwise(each) and sum(n.is_data for n in each.inputs) == 1)
        if node.is_data
    }
    inside = set(site.ahead(_is_pointwise))
    for node in inside:
        if node is site or not _is_pointwise(node):
            continue
        for other in node.inputs:
            if other not in inside and made_of & set(other.back(lambda each: each is not site and _is_pointwise(each))):
                return True
    return False


def _is_pointwise(node: Node) -> bool:
    if node.name in ("max", "min"):  # else of the whole tensor
        return len(node.inputs) > 1
    return (node.kind in ("scale", "sum", "product", "site") and node.name != "einsum") or node.name in _ELEMENTWISE


def _parts(whole: Node) -> Iterator[Node]:
    """The activations in the formula of a gate: what leads to it with no layer in between, and is in no other use."""
    for before in whole.inputs:
        for node in before.back(lambda node: _elementwise(node) or node.kind == "site"):
            if node.kind == "site" and all(_only_into(each, whole) for each in node.users):
                yield node


def _only_into(node: Node, gate: Node) -> bool:
    return node is gate or (_elementwise(node) and bool(node.users) and all(_only_into(e, gate) for e in node.users))


def _reaches_layer(node: Node) -> bool | None:
    """Whether a value reaches a layer; None if it leaves what was looked at."""
    ahead = list(node.ahead(lambda each: each.kind not in ("layer", "mask")))
    if any(each.kind == "layer" for each in ahead):
        return True
    return None if any(each.kind == "unknown" for each in ahead) else False


def _is_residual(node: Node) -> bool | None:
    """Whether a value is the sum of two branches, moved or scaled perhaps."""
    for each in node.back(lambda each: each.kind in ("move", "scale")):
        if each.kind == "sum":
            terms = [term for term in dict.fromkeys(each.inputs) if term.is_data]
            return len(terms) > 1 and not _are_separate_maps(terms)
        if each.kind == "unknown":
            return None
    return False


def _are_separate_maps(terms: list[Node]) -> bool:
    """Whether two terms are learned maps of different inputs, neither of which leads to the other."""
    first, second = (_map_inputs(term) for term in terms[:2])
    if not first or not second:
        return False
    return not any(a.descends_from(b) or b.descends_from(a) for a in first for b in second)


def _map_inputs(node: Node) -> list[Node]:
    """What goes into the first of the layers that lead straight to a value; nothing if none does."""
    inputs: list[Node] = []
    waiting = [node]
    while waiting:
        near = (each for start in waiting for each in start.back(lambda each: each.kind in ("move", "scale")))
        layer = next((each for each in near if each.kind == "layer"), None)
        if layer is None:
            break
        inputs = waiting = [each for each in layer.inputs if each.is_data]
    return inputs
