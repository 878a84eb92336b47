"""A low-rank factor as Dynamo captured it: a tensor, or a matrix between two diagonals, diag(r)·F·diag(c)."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, fx

from lrcompile.passes.captured import Places, operator_of, value


@dataclass(frozen=True)
class Factor:
    """diag(rows)·matrix·diag(columns), None for ones."""

    matrix: fx.Node
    rows: fx.Node | None = None
    columns: fx.Node | None = None

    def nodes(self) -> tuple[fx.Node | None, ...]:
        return self.matrix, self.rows, self.columns


def factor_at(node: fx.Node, reader: fx.Node, places: Places) -> Factor:
    """The factor that `reader` is given as `node`.

    Taken apart where it is the product of a matrix and one vector along its rows, its columns or each, of known sizes
    and on a CPU, and nothing is written between its first product and `reader`. On other devices a compiler fuses such
    products into one kernel by itself.
    """
    products = list(_products(node))
    whole = value(node)
    parts = [each for product in products for each in product.args if each not in products]
    static = all(isinstance(size, int) for size in whole.shape) and whole.dim() == 2 and whole.device.type == "cpu"
    if not products or len(parts) > 3 or not static or any(places.written(each, reader) for each in products):
        return Factor(node)
    return next(_arranged(parts, tuple(whole.shape)), Factor(node))


_PRODUCTS = (operator.mul, torch.mul, torch.multiply, torch.ops.aten.mul.Tensor, "mul", "multiply")


def _products(node: Any) -> Iterator[fx.Node]:
    """The element-wise products of tensors that make `node`, itself first."""
    if not isinstance(node, fx.Node) or operator_of(node) not in _PRODUCTS or node.kwargs:
        return
    if all(isinstance(value(each), Tensor) and value(each).is_floating_point() for each in node.args):
        yield node
        for each in node.args:
            yield from _products(each)


def _arranged(parts: list[Any], shape: tuple[int, ...]) -> Iterator[Factor]:
    """The ways to read a product of two or three tensors as a matrix and its diagonals."""
    n, m = shape
    sizes = {part: tuple(value(part).shape) for part in parts}
    for matrix, *vectors in permutations(parts):
        for rows, columns in [vectors] if len(vectors) == 2 else [(vectors[0], None), (None, vectors[0])]:
            along_rows = rows is None or sizes[rows] == (n, 1)
            along_columns = columns is None or sizes[columns] in ((m,), (1, m))
            if sizes[matrix] == shape and along_rows and along_columns:
                yield Factor(matrix, rows, columns)
