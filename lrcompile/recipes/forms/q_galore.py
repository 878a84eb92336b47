"""Q-GaLore's site: GaLore's, with the weight itself in INT8, the projection in INT4, and renewals that become rare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.dialect import q_galore as q_galore  # registers the ops
from lrcompile.int8.groups import Groups, dequantize_groups, empty_groups, quantize_groups
from lrcompile.int8.modules import hand_back, hand_over, is_int8
from lrcompile.recipes.forms.adapter import Adapter, Start
from lrcompile.recipes.forms.galore import ProjectedGradient
from lrcompile.sites.site import Site
from lrcompile.specs import Spec
from lrcompile.written import FLAG

REMEMBERED = 5
"""Similarities of successive projections that are looked at together."""
_UNKNOWN = -1.0
_W = ("W_codes", "W_scale", "W_offset")
_P = ("P_codes", "P_scale", "P_offset")


class QuantizedProjectedGradient(ProjectedGradient):
    """W' = dq(W) + lift(Z) with Z = 0, dq(P) in the place of P  (arXiv 2407.08296): W in groups of 8 bits, which this
    adapter holds as long as it is there, P in groups of 4.

    Rows of dq(P) are orthonormal to about 1/15 of their largest number only. Each time P is found, the cosine between
    its first direction and the one before is noted, without its sign, which a singular vector does not have (the
    official code keeps the sign); when the mean of the last five reaches `similarity`, the gap T between renewals of
    this site doubles. Groups, gap and cosines are buffers, so that a resumed run goes on with them; every process of a
    data-parallel run computes the same, so give DistributedDataParallel broadcast_buffers=False.
    """

    holds_weight = True
    gap: Tensor
    cosines: Tensor
    direction: Tensor
    weight_shape: tuple[int, ...]
    weight_dtype: torch.dtype

    @classmethod
    def shapes(cls, in_features: int, out_features: int, rank: int) -> Mapping[str, tuple[int, ...]]:
        return {"Z": super().shapes(in_features, out_features, rank)["Z"]}

    @classmethod
    def build(
        cls, spec: Spec, site: Site, shared: Any, *, dtype: torch.dtype, device: torch.device
    ) -> QuantizedProjectedGradient:
        adapter = super().build(spec, site, shared, dtype=dtype, device=device)
        assert isinstance(adapter, cls)
        shape = (site.out_features, site.in_features)
        adapter.weight_shape, adapter.weight_dtype = shape[::-1] if site.transposed else shape, dtype
        return adapter

    @classmethod
    def held_bytes(cls, spec: Spec, site: Site) -> int:
        """Of the weight and the projection at `site`."""
        sizes = (
            (site.in_features * site.out_features, 8),
            (min(site.in_features, site.out_features) * spec.rank_of(site.name), 4),
        )
        return sum(t.nbytes for n, bits in sizes for t in empty_groups(n, bits, spec.group_size, torch.device("meta")))

    def configure(self, spec: Spec, shared: object) -> None:
        self.group, self.similarity, self.first_gap = spec.group_size, spec.similarity, spec.update_proj_gap
        self.gap_now = self.first_gap
        """Mirrors `gap`."""
        device, short = self.Z.device, min(self.in_features, self.out_features)
        self._register(_W, empty_groups(self.in_features * self.out_features, 8, self.group, device))
        self._register(_P, empty_groups(short * self.rank, 4, self.group, device))
        self.register_buffer("gap", torch.full((), self.first_gap, dtype=torch.int64, device=device))
        self.register_buffer("cosines", torch.full((REMEMBERED,), _UNKNOWN, device=device))
        self.register_buffer("direction", torch.zeros(short, device=device))

    def _register(self, names: tuple[str, ...], held: Groups) -> None:
        for name, tensor in zip(names, held, strict=True):
            self.register_buffer(name, tensor)

    def begin(self, start: Start) -> None:
        self.Z.zero_()
        shape = self._basis_shape
        self._put(_P, quantize_groups(torch.eye(*shape, device=self.Z.device), 4, self.group))

    def placed(self, host: nn.Module) -> None:
        weight = hand_over(host)
        self.weight_dtype = weight.dtype
        self.hold(weight)
        self.get_buffer(FLAG).fill_(True)  # rounded, it is the base's no more

    def removed(self, host: nn.Module) -> None:
        if is_int8(host):
            weight = dequantize_groups(self.held(), self.weight_shape, 8, self.weight_dtype)
            hand_back(host, nn.Parameter(weight, requires_grad=False))

    def hold(self, weight: Tensor, generator: torch.Generator | None = None) -> None:
        """Take `weight`, as it is stored, for W; rounded stochastically with a `generator`."""
        if weight.is_meta:  # has no values, and to say so op by op takes milliseconds a site
            return
        self._put(_W, quantize_groups(weight, 8, self.group, generator))

    def held(self) -> Groups:
        return Groups(*(self.get_buffer(name) for name in _W))

    def basis(self, dtype: torch.dtype) -> Tensor:
        return dequantize_groups(self._projection(), self._basis_shape, 4, dtype)

    def store(self, directions: Tensor) -> None:
        if self.anew:
            self.gap.fill_(self.first_gap)
            self.cosines.fill_(_UNKNOWN)
        else:
            cosine = (directions[0].float() @ self.direction).abs()
            self.cosines.copy_(torch.cat((self.cosines[1:], cosine.reshape(1))))
            if bool((self.cosines != _UNKNOWN).all() & (self.cosines.mean() >= self.similarity)):
                self.gap.mul_(2)
        self.gap_now = int(self.gap)
        self.direction.copy_(directions[0])
        self._put(_P, quantize_groups(directions if self.right else directions.t(), 4, self.group))

    def refresh(self) -> None:
        super().refresh()
        if not self.gap.is_meta:
            self.gap_now = int(self.gap)

    def emit(self, y: Tensor, x: Tensor) -> Tensor:
        return torch.ops.lrcompile.project_gradient_int4.default(y, x, self.Z, *self._projection(), self.right)

    @property
    def _basis_shape(self) -> tuple[int, int]:
        return (self.rank, self.in_features) if self.right else (self.out_features, self.rank)

    def _projection(self) -> Groups:
        return Groups(*(self.get_buffer(name) for name in _P))

    def _put(self, names: tuple[str, ...], held: Groups) -> None:
        for name, tensor in zip(names, held, strict=True):
            self.get_buffer(name).copy_(tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        """Groups and cosines only ever move between devices: a cast would change what they stand for."""
        kept = {name: self._buffers.pop(name) for name in (*_W, *_P, "cosines", "direction")}
        try:
            super()._apply(fn, recurse)
            for name, tensor in kept.items():
                assert tensor is not None
                moved = fn(tensor)
                kept[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        finally:
            self._buffers.update(kept)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=self.Z.device)).dtype
        return self
