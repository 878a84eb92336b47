"""What a group of maps computes: its members, the codes they read, and the gradients a backward pass has to give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import torch

from lrcompile.lowered.bases import Base, Dense
from lrcompile.lowered.contractions import Order
from lrcompile.lowered.operands import Operands

Role = Literal["pair", "right", "left"]
"""pair: B·A acts beside W. right, left: nothing acts; the factor that trains receives the gradient of W projected by
the other one, which is A (right, B trains) or B (left, A trains)."""


@dataclass(frozen=True)
class Member:
    """One map of a group."""

    base: Base
    code: int
    """Which of the group's A it reads: maps may share one."""
    role: Role = "pair"
    order: Order = Order()  # noqa: RUF009  (frozen)

    def __post_init__(self) -> None:
        if self.order != Order() and not (self.role == "pair" and isinstance(self.base, Dense)):
            raise ValueError(f"the order of a dense map with a pair can be chosen, this is {self.role} at {self.base}")


@dataclass(frozen=True)
class Group:
    """What is computed, without the tensors. ValueError if members and codes do not fit.

    The members of one code have one role; one whose order is chosen has its code to itself, without dropout.
    """

    members: tuple[Member, ...]
    drops: tuple[float, ...]
    """Of each code, the probability in force; above 0 it has a seed."""

    def __post_init__(self) -> None:
        readers = [[each for each in self.members if each.code == code] for code in range(self.codes)]
        if any(not 0 <= each.code < self.codes for each in self.members) or not all(readers):
            raise ValueError(f"the members of a group read codes 0…{self.codes - 1} and each of these, not {readers}")
        for each, p in zip(readers, self.drops, strict=True):
            if len({one.role for one in each}) > 1 or (p and each[0].role != "pair"):
                raise ValueError(f"readers of one code have one role, and that is pair under dropout: {each}, {p}")
            if any(one.order != Order() for one in each) and (len(each) > 1 or p):
                raise ValueError(f"an order is chosen only where one map reads a code without dropout: {each}, {p}")

    @property
    def codes(self) -> int:
        return len(self.drops)

    def split(self, flat: Sequence[Any]) -> Operands:
        return Operands.split(flat, [each.base.size for each in self.members], self.codes)

    def readers(self, code: int) -> list[int]:
        """The members that read a code."""
        return [index for index, each in enumerate(self.members) if each.code == code]

    def acts(self, code: int) -> bool:
        """Is it added to an output, through the factors?"""
        return any(self.members[i].role == "pair" and not self.members[i].order.merged for i in self.readers(code))


@dataclass
class Wanted:
    """Which gradients a backward pass has to give, and what it needs for that."""

    group: Group
    x: bool
    each: Operands
    dtypes: Operands

    def A(self, code: int) -> bool:
        return self._factor(code)

    def B(self, member: int) -> bool:
        return self._factor(self.group.codes + member)

    def _factor(self, index: int) -> bool:
        """Is the gradient of a factor with its diagonals wanted, by itself or by one of them?"""
        return any(each[index] for each in (self.each.factors, self.each.rows, self.each.columns))

    def dtype(self, code: int) -> torch.dtype:
        """Of A as it acts."""
        given = (each[code] for each in (self.dtypes.As, self.dtypes.rows, self.dtypes.columns))
        return reduce(torch.promote_types, (each for each in given if each is not None))

    def S(self, code: int) -> bool:
        """Is a product with S to come?"""
        readers = self.group.readers(code)
        return any(self.B(i) and not self.group.members[i].order.by_weight for i in readers)

    def dS(self, code: int) -> bool:
        return (self.x and self.group.acts(code)) or self.dA_by_codes(code)

    def dA_by_codes(self, code: int) -> bool:
        return self.A(code) and not self.group.members[self.group.readers(code)[0]].order.by_weight

    def G(self, member: int) -> bool:
        of = self.group.members[member]
        return of.order.by_weight and (self.B(member) or self.A(of.code))

    def kept(self, given: Operands) -> Operands:
        """The operands that the backward pass reads."""
        members, codes = range(len(self.group.members)), range(self.group.codes)
        plain = [self.x and not each.order.merged for each in self.group.members]
        B = [self.dS(each.code) or self.G(i) for i, each in enumerate(self.group.members)]
        A = [
            (self.x and self.group.acts(code)) or any(self.G(i) and self.B(i) for i in self.group.readers(code))
            for code in codes
        ]
        reads = [*A, *B]
        for index, (rows, columns) in enumerate(zip(given.rows, given.columns, strict=True)):
            reads[index] |= self._factor(index) and not rows is columns is None
        A, B = reads[: self.group.codes], reads[self.group.codes :]
        return Operands(
            [given.held[i] if plain[i] else [None] * len(given.held[i]) for i in members],
            [None] * len(members),
            [given.Bs[i] if B[i] else None for i in members],
            given.scales,
            [given.As[code] if A[code] else None for code in codes],
            given.seeds,
            [each if read else None for each, read in zip(given.rows, reads, strict=True)],
            [each if read else None for each, read in zip(given.columns, reads, strict=True)],
        )
