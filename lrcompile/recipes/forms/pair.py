"""Low-rank forms: whatever their tensors are, what they compute is one pair of factors and one dialect op."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrcompile import dialect as dialect  # registers torch.ops.lrcompile
from lrcompile.dialect import experts as experts
from lrcompile.recipes.forms.adapter import Adapter, NotSwappable, Start
from lrcompile.recipes.initialisers.random import fill
from lrcompile.tracing import exporting


class LowRank(Adapter):
    """y + s·(drop(x)A'ᵀ)B'ᵀ, so Δ = s·B'·A'; A' `[rank', in]` and B' `[out, rank']` are functions of its tensors.

    They cost a few rows of the base weight at most, once a call, so a form says only what they are: the op, its
    gradients, merging, export and conversion to LoRA are the same for all.
    """

    uses = frozenset({"product", "rows", "experts", "lookup", "graph"})

    def factors(self) -> tuple[Tensor, Tensor]:
        """A' and B', differentiable in the tensors that train."""
        raise NotImplementedError

    def beside_base(self) -> tuple[Tensor, Tensor] | None:
        """The factors with which plain LoRA computes the same beside the weight as it was before `apply`; None for a
        form that folds otherwise than as their product.
        """
        return self.factors() if type(self).change is LowRank.change else None

    def operands(self) -> tuple[Tensor, Tensor]:
        """The factors as the op takes them."""
        return self.padded(*self.factors())

    def padded(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A and B, in a compiled graph with zeros up to `width` ranks."""
        if self.width is None or not torch.compiler.is_dynamo_compiling() or exporting():
            return A, B
        return F.pad(A, (0, 0, 0, self.width - A.shape[-2])), F.pad(B, (0, self.width - B.shape[-1]))

    def forward(self, y: Tensor, x: Tensor, host: nn.Module | None = None) -> Tensor:
        A, B = self.operands()
        return torch.ops.lrcompile.lora.default(y, x, A, B, self.scale, self.probability)

    def rows(self, y: Tensor, x: Tensor, start: int, stop: int) -> Tensor:
        """The part of the map that produces output rows start…stop, where one weight stacks several maps (q, k, v)."""
        A, B = self.operands()
        return torch.ops.lrcompile.lora.default(y, x, A, B[start:stop], self.scale, self.probability)

    def experts(self, y: Tensor, x: Tensor, index: Tensor | int) -> Tensor:
        """The map of the stack that each row is routed to: `index` is one expert for all rows, or one for each."""
        A, B = self.operands()
        if isinstance(index, int):
            return torch.ops.lrcompile.lora.default(y, x, A[index], B[index], self.scale, self.probability)
        return torch.ops.lrcompile.lora_experts.default(y, x, A, B, self.scale, index, self.probability)

    def lookup(self, y: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
        """The map applied to one-hot rows given by index, as an embedding does."""
        A, B = self.operands()
        pad = -1 if padding_idx is None else padding_idx
        return torch.ops.lrcompile.lora_embedding.default(y, ids, A, B, self.scale, pad)

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """s·weight·B'·A' in `dtype`, `[..., out, in]`; with the float32 scale that the forward uses."""
        with torch.no_grad():
            A, B = self.factors()
            return (B.to(dtype) @ A.to(dtype)) * self.scale.to(dtype)

    def change(self, weight: Tensor, base: Tensor) -> Tensor:
        return self.delta(weight.dtype).to(weight.device)

    def swappable(self, host: nn.Module) -> Mapping[str, Tensor]:
        pair = self.beside_base()
        if pair is None:
            raise NotSwappable("its update is no product of two factors")
        return self.turned(*pair)

    def turned(self, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        """A'ᵀ `[in, rank']` and (s·weight·B')ᵀ `[rank', out]`, without the ranks that add nothing (but never none)."""
        alive = A.ne(0).any(-1) & B.ne(0).any(-2)
        kept = alive.reshape(-1, alive.shape[-1]).any(0).nonzero().flatten()
        kept = kept if kept.numel() else kept.new_zeros(1)
        A, B = A.detach().index_select(-2, kept), B.detach().index_select(-1, kept)
        wide = torch.promote_types(B.dtype, torch.float64)  # one rounding, to what the graph takes
        return {"A": A.mT, "B": (B.to(wide) * self.scale.to(wide)).mT}


class LoraAdapter(LowRank):
    """Δ = s·B·A  (arXiv 2106.09685): A `[rank, in]`, B `[out, rank]`."""

    A: Tensor
    B: Tensor

    @classmethod
    def shapes(cls, in_features: int, out_features: int, rank: int) -> Mapping[str, tuple[int, ...]]:
        return {"A": (rank, in_features), "B": (out_features, rank)}

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B

    def begin(self, start: Start) -> None:
        fill("lookup" if start.site.form == "lookup" else start.spec.init, self.A, self.B, start.generator)
