"""GaLore's site: a factor that is always zero, so that its gradient is the projection of the weight's."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from lrcompile.dialect.galore import project
from lrcompile.dialect.renewal import enrol
from lrcompile.recipes.forms.adapter import Adapter, NotSwappable, Start
from lrcompile.recipes.range_finder import leading_directions
from lrcompile.sites.site import Site
from lrcompile.specs import Spec
from lrcompile.tracing import exporting


class ProjectedGradient(Adapter):
    """W' = W + lift(Z) with Z = 0, so ∂Z is G = ∂W projected  (arXiv 2403.03507); G `[out, in]` is never formed.

    out ≥ in: P `[rank, in]` on the right, Z `[out, rank]`, ∂Z = G·Pᵀ, lift(Z) = Z·P. out < in: P `[out, rank]` on the
    left, Z `[rank, in]`, ∂Z = Pᵀ·G, lift(Z) = P·Z. P is orthonormal, the leading singular directions of a gradient;
    where it is due, the next backward pass through the site finds it anew before it projects. Of a site that is called
    several times in one forward, the call that is differentiated first decides. Forward and the gradient of x cost
    nothing, W needs no gradient, and nothing is emitted where no gradient is recorded or a graph is exported.
    """

    uses: ClassVar[frozenset[str]] = frozenset({"product"})
    Z: Tensor
    P: Tensor
    found: Tensor
    """The step P was due at when it was found, -1 before; part of the state, as `P` is."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, **kw: Any):
        super().__init__(in_features, out_features, rank, scale, **kw)
        self.right = out_features >= in_features
        self.seed: tuple[object, ...] = ()
        self.due, self.anew = -1, False
        """The step by which P was to be found (-1: no optimizer drives this), `anew`: in this very run."""
        self.renewing, self.renewed = False, False
        """Whether this step finds P anew, and has by now. The first decides what forwards record, so it holds for a
        whole step: a checkpointed forward and its repetition have to record the same."""
        self.register_buffer("found", torch.full((), -1, dtype=torch.int64, device=self.Z.device))
        self.found_at = -1
        """Mirrors `found`, which cannot be read without waiting for the device."""
        self.number = enrol(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.number = enrol(self)  # a copy renews its own projection

    @classmethod
    def shapes(cls, in_features: int, out_features: int, rank: int) -> Mapping[str, tuple[int, ...]]:
        if out_features >= in_features:
            return {"Z": (out_features, rank), "P": (rank, in_features)}
        return {"Z": (rank, in_features), "P": (out_features, rank)}

    @classmethod
    def build(
        cls, spec: Spec, site: Site, shared: Any, *, dtype: torch.dtype, device: torch.device
    ) -> ProjectedGradient:
        adapter = super().build(spec, site, shared, dtype=dtype, device=device)
        assert isinstance(adapter, cls)
        adapter.seed = (spec.seed or 0, site.name)
        return adapter

    def begin(self, start: Start) -> None:
        """Z = 0 and P the first coordinates: orthonormal, in case a first gradient has no directions to offer."""
        self.Z.zero_()
        nn.init.eye_(self.P)

    def forward(self, y: Tensor, x: Tensor, host: nn.Module | None = None) -> Tensor:
        if not (torch.is_grad_enabled() and self.Z.requires_grad) or exporting():
            return y
        if self.renewing:
            return torch.ops.lrcompile.renew_projection.default(y, x, self.Z, self.number)
        return self.emit(y, x)

    def emit(self, y: Tensor, x: Tensor) -> Tensor:
        return torch.ops.lrcompile.project_gradient.default(y, x, self.Z, self.P, self.right)

    def change(self, weight: Tensor, base: Tensor) -> Tensor:
        """Zero: the weight holds every step already."""
        return torch.zeros_like(weight)

    def swappable(self, host: nn.Module) -> NoReturn:
        raise NotSwappable("it has no tensors beside the weight: the weight itself is what trains")

    def lift(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The two factors of lift(Z) `[out, in]`, in order."""
        Z, P = self.Z.detach().to(dtype), self.basis(dtype)
        return (Z, P) if self.right else (P, Z)

    def basis(self, dtype: torch.dtype) -> Tensor:
        return self.P.detach().to(dtype)

    def schedule(self, due: int, *, anew: bool | None = None) -> None:
        """A step begins, by which P was to be found at step `due`; `anew`: whatever P there is, it is another run's
        (None: as long as this run has not found one).
        """
        self.anew = self.anew and not self.renewed if anew is None else anew
        self.due, self.renewed = due, False
        self._decide()

    def refresh(self) -> None:
        if not self.found.is_meta:
            self.found_at = int(self.found)
            self._decide()

    def _decide(self) -> None:
        self.renewing = self.due >= 0 and (self.anew or self.found_at < self.due)

    @property
    def variant(self) -> Hashable:
        return self.renewing

    def renew(self, dy: Tensor, x: Tensor) -> None:
        """P from G = ∂yᵀx, once a step; a G that is zero or not finite leaves it as it is, and due."""
        if self.renewed or self.due < 0:
            return
        a, b = (dy, x) if self.right else (x, dy)
        directions = leading_directions(a, b, self.rank, seed=self.seed_at(self.due))
        if directions is not None:
            self.store(directions)
            self.found.fill_(self.due)
            self.found_at, self.renewed = self.due, True

    def gradient_anew(self, dy: Tensor, x: Tensor) -> Tensor:
        """∂Z of a step that P is due in."""
        self.renew(dy, x)
        return project(dy, x, self.basis(dy.dtype), self.right)

    def seed_at(self, step: int) -> int:
        """32 bits, all that the generator of a CPU looks at, for the random numbers of this site and step."""
        return zlib.crc32(repr((*self.seed, step)).encode())

    def store(self, directions: Tensor) -> None:
        """Take rows `[rank, min(in, out)]` as the basis."""
        self.P.copy_(directions if self.right else directions.t())
