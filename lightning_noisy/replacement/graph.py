"""The data flow of a forward pass as a graph: which operation takes in what, by what matters to activations.

An observed pass and a traced one both call :meth:`Graph.apply` for each operation, so that the same rules hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

__all__ = ["Graph", "Node"]

# What moves numbers about without changing them, in evaluation.
MOVES = {
    "flatten", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "dropout", "dropout1d", "dropout2d",
    "dropout3d", "feature_dropout", "alpha_dropout", "view", "contiguous", "t", "T", "mT", "swapaxes", "movedim",
    "expand", "expand_as", "to", "float", "half", "double", "bfloat16", "type", "type_as", "view_as", "reshape_as",
    "getitem", "clone", "chunk", "split", "tensor_split", "unbind", "detach", "narrow", "select", "unflatten", "repeat",
    "flip", "roll", "gather", "index_select", "cpu", "cuda", "pixel_shuffle", "broadcast_tensors", "broadcast_to",
}  # fmt: skip
# The same with others beside them, or with limits.
_ALMOST_MOVES = {
    "pad", "cat", "concat", "concatenate", "stack", "hstack", "vstack", "masked_fill", "where", "clamp", "clip",
    "clamp_min", "clamp_max", "setitem", "nan_to_num",
}  # fmt: skip
_PRODUCTS = {"mul", "rmul", "imul", "multiply"}
_QUOTIENTS = {"div", "truediv", "itruediv", "true_divide", "divide"}
_SUMS = {"add", "radd", "iadd", "sub", "rsub", "isub", "subtract"}
_SCALES = {"neg", "negative", "rtruediv", "reciprocal", "square", "pow", "rpow"}
_RANDOM = {
    "randn", "rand", "randn_like", "rand_like", "randint", "randint_like", "bernoulli", "bernoulli_", "normal_",
    "uniform_", "exponential_",
}  # fmt: skip
_LAYERS = {
    "linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
}  # fmt: skip
_MATRIX_PRODUCTS = {"matmul", "rmatmul", "mm", "addmm", "einsum"}
_MASKS = {
    "gt", "ge", "lt", "le", "eq", "ne", "isnan", "isfinite", "isinf", "logical_and", "logical_or", "logical_not",
    "bool", "int", "long", "argmax", "argmin", "argsort", "size", "dim", "numel", "shape", "device", "dtype",
}  # fmt: skip


class Node:
    """A value in a pass.

    Attributes:
        kind: ``"input"`` of the model, ``"index"`` if it is of integers; ``"unknown"``; ``"constant"``,
            ``"parameter"`` and ``"random"`` where nothing else goes in; ``"mask"`` of what is not floating point;
            ``"site"`` of an activation; ``"layer"`` where a parameter meets data; ``"product"`` and ``"sum"`` of
            several branches; ``"scale"`` by a constant or a parameter; ``"move"``; or ``"other"``.
        inputs: what goes in.
        is_data: whether it is of floating point and depends on the model's inputs.
        depends: whether it depends on them, or on random numbers, at all.
        users: what it goes into.
        site: the site, of its kind.
        name: of the operation; ``"shift"`` if it adds a number.
        module: the layer whose output it is.
    """

    __slots__ = ("depends", "inputs", "is_data", "kind", "module", "name", "site", "users")

    def __init__(self, kind: str, inputs: Iterable[Node] = (), *, name: str = "", site: Any = None) -> None:
        self.kind, self.name = kind, name
        self.inputs = tuple(inputs)
        self.users: list[Node] = []
        self.site = site
        self.module: nn.Module | None = None
        source = kind in ("input", "unknown", "layer") or (kind == "site" and not self.inputs)
        self.is_data: bool = kind not in ("mask", "index") and (source or any(n.is_data for n in self.inputs))
        self.depends: bool = kind in ("index", "random") or source or any(n.depends for n in self.inputs)
        for node in self.inputs:
            node.users.append(self)

    def back(self, through: Callable[[Node], bool]) -> Iterator[Node]:
        """This node, and those that lead here, as far as they may be passed."""
        yield from _walk(self, lambda node: node.inputs, through)

    def ahead(self, through: Callable[[Node], bool]) -> Iterator[Node]:
        """This node, and those that it leads to, as far as they may be passed, this one in any case."""
        yield from _walk(self, lambda node: node.users, lambda node: node is self or through(node))

    def descends_from(self, other: Node) -> bool:
        """Whether the other one leads here."""
        return any(node is other for node in self.back(lambda _: True))


def _walk(start: Node, following: Callable[[Node], Iterable[Node]], through: Callable[[Node], bool]) -> Iterator[Node]:
    seen, waiting = {id(start)}, [start]
    while waiting:
        node = waiting.pop()
        yield node
        if through(node):
            for each in following(node):
                if id(each) not in seen:
                    seen.add(id(each))
                    waiting.append(each)


class Graph:
    """Makes nodes of operations."""

    def __init__(self) -> None:
        self.sites: list[Node] = []
        self.products: list[tuple[Node, Node]] = []  # of two branches

    def site(self, inputs: Iterable[Node], site: Any) -> Node:
        """The call of an activation."""
        node = Node("site", inputs, site=site)
        self.sites.append(node)
        return node

    def apply(self, name: str, inputs: list[Node], *, arguments: tuple[Any, ...] = (), floating: bool = True) -> Node:
        """An operation.

        Args:
            name: of the function or the method.
            inputs: the tensors among its arguments, in their order.
            arguments: its positional arguments, with nodes in the place of tensors.
            floating: whether the result is of floating point.
        """
        if name in _RANDOM or (name == "normal" and not any(node.is_data for node in inputs)):
            return Node("random")
        name = name.strip("_")
        if not floating or name in _MASKS:
            return Node("mask", inputs, name=name)
        data = list(dict.fromkeys(node for node in inputs if node.is_data))
        learned = any(node.kind == "parameter" for node in inputs)
        # The weight may be computed, as a hypernetwork's; with a constant one it is a filter, such as a blur.
        if name in _LAYERS and inputs[0].depends and any(n.is_data or n.kind == "parameter" for n in inputs[1:]):
            return Node("layer", inputs, name=name)
        if name in _MATRIX_PRODUCTS and learned and any(node.kind == "random" for node in inputs):
            return Node("layer", inputs, name=name)
        if not data:
            if learned and any(node.depends and node.kind not in ("parameter", "random") for node in inputs):
                return Node("layer", inputs, name=name)  # an embedding
            return Node("parameter" if learned else "constant", inputs)
        if name in _PRODUCTS:
            return self._product(name, data, inputs)
        if name in _QUOTIENTS:
            return self._quotient(name, data, inputs)
        if name in _SUMS:
            is_shift = len(inputs) == 1 and any(isinstance(each, (int, float)) and each != 0 for each in arguments)
            return Node("sum" if len(data) > 1 else "scale", inputs, name="shift" if is_shift else name)
        if name == "lerp":
            start, end, *weight = [each for each in arguments if isinstance(each, Node)]
            mixed = Node("sum", [start, end], name=name)
            return self._product(name, [mixed, *weight], [mixed, *weight]) if weight and weight[0].is_data else mixed
        if name in ("addcmul", "addcdiv"):
            first, *factors = inputs
            kept = [node for node in dict.fromkeys(factors) if node.is_data]
            make = self._product if name == "addcmul" else self._quotient
            return Node("sum", [first, make(name, kept, factors) if kept else Node("constant", factors)], name=name)
        if learned:
            return Node("layer", inputs, name=name)
        if name == "einsum":
            return self._product(name, data, inputs)
        kind = "move" if name in MOVES | _ALMOST_MOVES else "scale" if name in _SCALES else "other"
        return Node(kind, inputs, name=name)

    def _product(self, name: str, data: list[Node], inputs: list[Node]) -> Node:
        if len(data) < 2:  # by a constant, a parameter or itself
            return Node("scale", inputs, name=name)
        product = Node("product", inputs, name=name)
        self.products.append((data[0], data[1]))
        return product

    def _quotient(self, name: str, data: list[Node], inputs: list[Node]) -> Node:
        # A norm of the first, perhaps.
        if len(data) < 2 or data[0] in data[1].back(lambda node: node.kind not in ("layer", "site")):
            return Node("scale", inputs, name=name)
        return self._product(name, data, inputs)
