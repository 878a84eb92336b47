"""What a site is: pure data, so that it can be stored, compared, printed and sent to another process."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """One weight of a host as a kind of site sees it; `name` is local to the host."""

    name: str
    in_features: int = 0
    out_features: int = 0
    copies: int | None = None
    transposed: bool = False
    """Stored as `[in, out]`."""
    refusal: str | None = None
    """Why no adapter can act here."""
    kind: str | None = None
    """The kind of site where it is not that of the host."""
    form: str = "product"
    """`product` with an input, or `lookup` of rows by index."""


@dataclass(frozen=True)
class Site:
    """One use of a weight as a linear map, by name: the weight's qualified name without a trailing `.weight`."""

    name: str
    kind: str
    host: str
    """Qualified name of the module that owns the weight."""
    slot: str
    """The weight's name in its host."""
    in_features: int
    out_features: int
    copies: int | None = None
    transposed: bool = False
    refusal: str | None = None
    aliases: tuple[str, ...] = ()
    form: str = "product"
    graph: str | None = None
    """Qualified name of the `fx.GraphModule` whose nodes use the weight, if one does."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @property
    def parameter(self) -> str:
        return f"{self.host}.{self.slot}" if self.host else self.slot

    @property
    def watchable(self) -> bool:
        """Is the weight the one of a linear layer that is called as a module, so that hooks see what comes in?"""
        return self.graph is None and self.kind in ("linear", "conv1d")
