"""The tensors of a group of maps, which graphs and autograd hold as one flat list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Operands:
    """Of each member: held, biases, Bs, scales. Of each code: As, seeds. An entry of something else, such as a
    gradient, a dtype or whether one is wanted, stands where its tensor would.
    """

    held: list[list[Any]]
    biases: list[Any]
    Bs: list[Any]
    scales: list[Any]
    As: list[Any]
    seeds: list[Any]

    def flat(self) -> list[Any]:
        held = [each for tensors in self.held for each in tensors]
        return [*held, *self.biases, *self.Bs, *self.scales, *self.As, *self.seeds]

    @classmethod
    def split(cls, flat: Sequence[Any], sizes: Sequence[int], codes: int) -> Operands:
        """Inverse of `flat`; `sizes` are the numbers of tensors that the members' bases hold."""
        left = list(flat)

        def take(count: int) -> list[Any]:
            taken, left[:count] = left[:count], []
            return taken

        held = [take(size) for size in sizes]
        members = len(sizes)
        return cls(held, take(members), take(members), take(members), take(codes), take(codes))
