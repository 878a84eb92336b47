"""The base of every adapter form: its tensors, its scale, and what it must say of itself."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lrcompile.guarding import watch
from lrcompile.kernels.nf4_dequant import Nf4
from lrcompile.sites.site import Site
from lrcompile.specs import Spec


@dataclass
class Start:
    """What an initialiser may know of the site it starts."""

    site: Site
    spec: Spec
    weight: Callable[[], Tensor]
    """The base weight `[..., out, in]` in float32 (float64 for a float64 base), dequantized if need be."""
    generator: torch.Generator | None = None
    """None: torch's own."""
    measured: Any = None
    """What the recipe's calibration found at this site."""
    codes: Nf4 | None = None
    """Set by an initialiser that chose the NF4 codes of the base together with the factors."""


class NotSwappable(Exception):
    """Why an adapter cannot be handed to a deployed graph when that runs, in words that go with its site's name."""


class Adapter(nn.Module):
    """y' = f(y, x) at one site, y = xWᵀ + b being what the base computes.

    A form declares its tensors in `shapes`; a stack of `copies` maps (experts, batched weights) carries a leading
    dimension on each. `scale` is a 0-d float32 buffer that no cast touches and no checkpoint holds: `scale_value ·
    weight` is the truth and refills it.
    """

    uses: ClassVar[frozenset[str]] = frozenset({"product"})
    """Of product (a linear layer, which hands over its host), rows (a packed projection), experts (a stack of maps,
    one for each row), lookup (an embedding), graph (a node of a captured or traced graph)."""
    holds_weight: ClassVar[bool] = False
    """The base weight is among the adapter's tensors as long as it is there (see `int8.modules`);
    `held_bytes(spec, site)` says what they take.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        scale: float,
        *,
        dropout: float = 0.0,
        copies: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        lead = () if copies is None else (copies,)
        # past nn.Module.__setattr__, which asks of each number whether it is a tensor: a model has hundreds of adapters
        self.__dict__.update(in_features=in_features, out_features=out_features, rank=rank, dropout=dropout)
        self.__dict__.update(scale_value=scale, weight=1.0)
        for name, shape in self.shapes(in_features, out_features, rank).items():
            empty = torch.empty(*lead, *shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty))
        filled = torch.full((), scale, dtype=torch.float32, device=device)
        self.register_buffer("scale", filled, persistent=False)

    in_features: int
    out_features: int
    rank: int
    dropout: float
    scale_value: float
    weight: float
    """What `activate` gave the adapter."""
    scale: Tensor
    width: int | None = None
    """The rank that compiled graphs pad the factors to (None: none)."""
    ruled_by: str | None = None
    """The method whose step rules its tensors need."""
    folded = False
    """A part of the weight is taken off it, and acts through the factors, while the adapter is active."""
    reads_weight = False
    """What it computes depends on the weight's values, so another adapter must not take its part off them."""

    @classmethod
    def build(cls, spec: Spec, site: Site, shared: Any, *, dtype: torch.dtype, device: torch.device) -> Adapter:
        """The adapter `spec` means for `site`, its tensors not filled yet. `shared`: what `cls.share` returned."""
        adapter = cls.at(spec, site)(
            site.in_features,
            site.out_features,
            spec.rank_of(site.name),
            spec.scale_of(site.name),
            dropout=spec.dropout,
            copies=site.copies,
            dtype=dtype,
            device=device,
        )
        adapter.configure(spec, shared)
        return adapter

    @classmethod
    def share(cls, spec: Spec, sites: Sequence[Site], *, dtype: torch.dtype, device: torch.device) -> Any:
        """What all sites of one adapter have in common (frozen parameters, say); made once."""
        return None

    @classmethod
    def at(cls, spec: Spec, site: Site) -> type[Adapter]:
        """The class that acts at `site`: a form that is different things at different sites names a subclass."""
        return cls

    @classmethod
    def demand(cls, spec: Spec, sites: Sequence[Site]) -> None:
        """Raise `SpecError` where the form's own options do not fit the sites a spec hits."""

    def configure(self, spec: Spec, shared: Any) -> None:
        """Take the form's own options from `spec`."""

    @classmethod
    def shapes(cls, in_features: int, out_features: int, rank: int) -> Mapping[str, tuple[int, ...]]:
        """The form's tensors, without the dimension of a stack."""
        raise NotImplementedError

    @classmethod
    def refusal(cls, site: Site) -> str | None:
        """Why this form cannot act at `site`; None if it can."""
        need = _needs(site)
        return None if need in cls.uses else f"this method acts on linear layers, not on {_WORDS[need]}"

    def begin(self, start: Start) -> None:
        """Fill the tensors as the method starts."""

    def finish(self, start: Start) -> None:
        """Derive what depends on the started factors; runs last."""

    def placed(self, host: nn.Module) -> None:
        """Change what `host` holds, this adapter being one of its own now."""

    def removed(self, host: nn.Module) -> None:
        """Undo `placed`, this adapter being about to go."""

    def forward(self, y: Tensor, x: Tensor, host: nn.Module | None = None) -> Tensor:
        raise NotImplementedError

    def change(self, weight: Tensor, base: Tensor) -> Tensor:
        """W' − W when this adapter is folded into `weight` `[..., out, in]`, in its dtype and with the float32 scale
        that the forward uses; `base` is the weight without any adapter.
        """
        raise NotImplementedError

    def bias_change(self, bias: Tensor, base: Tensor, weight: Tensor) -> Tensor | None:
        """b' − b when folded into `bias` `[out]`; None where it stays. `base` and `weight` are without any adapter."""
        return None

    def swappable(self, host: nn.Module) -> Mapping[str, Tensor]:
        """What a `slot.Slot` computes the same from, by the slot's own names; `host` holds the base's weight.

        Raises `NotSwappable` where nothing smaller than the weight does.
        """
        raise NotSwappable(f"{type(self).__name__} does not say what a graph would have to be given of it")

    def offset(self, dtype: torch.dtype) -> Tensor:
        """What the weight itself gives up while this adapter is active, `[..., out, in]` in `dtype`; of forms that
        are `folded`.
        """
        raise NotImplementedError

    def refresh(self) -> None:
        """Bring Python state in line with the tensors, which a load has just written."""

    def _load_from_state_dict(self, *given: Any) -> None:
        super()._load_from_state_dict(*given)
        self.refresh()

    @property
    def variant(self) -> Hashable:
        """Python state that decides which operations the forward emits: a trace is valid for one value of it."""
        return None

    def refill_scale(self) -> None:
        """Write s·weight into the buffer, on the device the tensors are on."""
        device = next((p.device for p in self._parameters.values() if p is not None), self.scale.device)
        self.scale = torch.full((), self.scale_value * self.weight, dtype=torch.float32, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        super()._apply(fn, recurse)
        self.refill_scale()
        return self

    @property
    def probability(self) -> float:
        """The dropout probability in force now."""
        return self.dropout if self.training else 0.0

    def stepped_by_rules_of(self, method: str) -> None:
        """From now on an optimizer that does not call the method's rules is refused; copies too."""
        self.ruled_by = method
        watch(self.parameters(), method)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.ruled_by is not None:
            watch(self.parameters(), self.ruled_by)

    def extra_repr(self) -> str:
        sizes = f"in={self.in_features}, out={self.out_features}, rank={self.rank}"
        return f"{sizes}, scale={self.scale_value:.6g}, dropout={self.dropout:g}"


_WORDS = {
    "product": "linear layers",
    "rows": "packed attention projections",
    "experts": "stacks of experts",
    "lookup": "embeddings",
    "graph": "raw parameters or nodes of a captured graph",
}


def _needs(site: Site) -> str:
    if site.form == "lookup":
        return "lookup"
    if site.graph is not None or site.kind == "parameter":
        return "graph"
    return {"attention": "rows", "experts": "experts"}.get(site.kind, "product")
