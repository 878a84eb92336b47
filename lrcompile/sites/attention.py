"""`nn.MultiheadAttention`: it hands its weights for q, k and v to a function, so they are in no child module's forward.

The weight of `out_proj` is a `linear` site of its own; the host calls `out_proj` as a module so that its adapters act.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrcompile.errors import AdapterError
from lrcompile.hosting import Host, original_class
from lrcompile.sites.linear import keeps_forward
from lrcompile.sites.live import any_live, live
from lrcompile.sites.site import Slot

NAME = "attention"
PACKED = "in_proj_weight"
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class AdaptedAttention(Host, nn.MultiheadAttention):
    """out_proj(softmax(QKᵀ/√d + mask)·V), each of Q, K, V and out_proj a base map followed by its live adapters.

    Arguments, shapes and returns are those of `nn.MultiheadAttention`. With no live adapter the original runs, fused
    path included; otherwise the operations are those of its unfused path in the same order, so an update of zero
    changes no bit of that.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not (any_live(self) or any_live(self.out_proj)):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )  # fmt: skip
        _check(self, query, key, value, attn_mask, is_causal)
        batched = query.dim() == 3
        if not batched:
            query, key, value = _each(query, key, value, lambda x: x.unsqueeze(1))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif self.batch_first:
            query, key, value = _each(query, key, value, lambda x: x.transpose(1, 0))
        (length, batch, _), source = query.shape, key.shape[0]

        if is_causal and key_padding_mask is None and not need_weights:
            mask = None  # the hint replaces the mask, which the caller promises is the causal one
        else:
            is_causal = is_causal and key_padding_mask is None
            mask = self._mask(attn_mask, key_padding_mask, query.dtype, (batch, length, source))
        q, k, v = self._heads(*self._project(query, key, value))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            y, weights = _explicit(q, k, v, mask, dropout)
            weights = weights.unflatten(0, (batch, self.num_heads))
            weights = weights.mean(dim=1) if average_attn_weights else weights
            y = y.transpose(0, 1).reshape(length * batch, self.embed_dim)
        else:
            if mask is not None:
                mask = mask.unsqueeze(0) if mask.size(0) == 1 else mask.unflatten(0, (batch, self.num_heads))
            q, k, v = (t.unflatten(0, (batch, self.num_heads)) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
            y = y.permute(2, 0, 1, 3).reshape(length * batch, self.embed_dim)
        y = self.out_proj(y).unflatten(0, (length, batch))
        if not batched:
            return y.squeeze(1), None if weights is None else weights.squeeze(0)
        return y.transpose(1, 0) if self.batch_first else y, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Q, K, V `[length, batch, embed_dim]`, in as few products as the inputs being one tensor allows."""
        width = self.embed_dim
        if not self._qkv_same_embed_dim:
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            projected = []
            for slot, x, bias in zip(SEPARATE, (query, key, value), biases, strict=True):
                y = F.linear(x, getattr(self, slot), bias)
                for adapter in live(self, slot):
                    y = adapter(y, x)
                projected.append(y)
            return tuple(projected)
        if query is key and key is value:
            y = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            for adapter in live(self, PACKED):
                y = adapter(y, query)
            return _split(y, 3)
        if key is value:
            return self._rows(query, 0, width), *_split(self._rows(key, width, 3 * width), 2)
        return self._rows(query, 0, width), self._rows(key, width, 2 * width), self._rows(value, 2 * width, 3 * width)

    def _rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        """The outputs start…stop of the packed map."""
        bias = None if self.in_proj_bias is None else self.in_proj_bias[start:stop]
        y = F.linear(x, self.in_proj_weight[start:stop], bias)
        for adapter in live(self, PACKED):
            y = adapter.rows(y, x, start, stop)
        return y

    def _heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[batch · heads, length, head_dim]` each, with the learned and the zero position appended to K and V."""
        batch = q.shape[1]
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.repeat(1, batch, 1)])
            v = torch.cat([v, self.bias_v.repeat(1, batch, 1)])
        q, k, v = (t.reshape(t.shape[0], batch * self.num_heads, self.head_dim).transpose(0, 1) for t in (q, k, v))
        if self.add_zero_attn:
            k, v = (torch.cat([t, t.new_zeros(t.shape[0], 1, t.shape[2])], dim=1) for t in (k, v))
        return q, k, v

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, dtype: torch.dtype, shape: tuple[int, int, int]
    ) -> Tensor | None:
        """Both masks as one addend, `[1 or batch · heads, 1 or length, positions]`; appended positions are seen."""
        batch, length, source = shape
        appended = (self.bias_k is not None) + self.add_zero_attn
        addend = None
        if attn_mask is not None:
            addend = _addend(attn_mask, "attn_mask", dtype)
            addend = addend.unsqueeze(0) if addend.dim() == 2 else addend
            leads = (1,) if attn_mask.dim() == 2 else (batch * self.num_heads,)
            if addend.shape != (*leads, length, source):
                expected = [*leads, length, source][-attn_mask.dim() :]
                raise AdapterError(f"attn_mask is {list(attn_mask.shape)}; expected {expected}")
            addend = F.pad(addend, (0, appended))
        if key_padding_mask is not None:
            if key_padding_mask.shape != (batch, source):
                raise AdapterError(f"key_padding_mask is {list(key_padding_mask.shape)}; expected {[batch, source]}")
            padding = F.pad(_addend(key_padding_mask, "key_padding_mask", dtype), (0, appended))
            padding = padding[:, None, None].expand(-1, self.num_heads, -1, -1).flatten(0, 1)
            addend = padding if addend is None else addend + padding
        return addend


HOST = AdaptedAttention


def slots(module: nn.Module) -> list[Slot] | None:
    if not isinstance(module, nn.MultiheadAttention):
        return None
    width = module.embed_dim
    if module._qkv_same_embed_dim:
        return [Slot(PACKED, width, 3 * width, refusal=_refusal(module, PACKED))]
    ins = (width, module.kdim, module.vdim)
    return [Slot(slot, into, width, refusal=_refusal(module, slot)) for slot, into in zip(SEPARATE, ins, strict=True)]


def _refusal(module: nn.MultiheadAttention, slot: str) -> str | None:
    if not keeps_forward(module, nn.MultiheadAttention):
        return f"{original_class(module).__name__} has a forward of its own, so how it uses this weight is unknown"
    weight = module._parameters.get(slot)
    if weight is None:
        return "it is computed (by a parametrization, pruning or a hook); remove that first"
    if not weight.is_floating_point():
        return f"it is stored as {weight.dtype}"
    return None


def _check(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool
) -> None:
    if not keeps_forward(module, nn.MultiheadAttention):
        raise AdapterError(
            f"{original_class(module).__name__} has a forward of its own, which may read the weight of out_proj past"
            " its adapters; exclude that out_proj from the targets"
        )
    if query.is_nested or key.is_nested or value.is_nested:
        raise AdapterError(
            "nn.MultiheadAttention takes nested tensors only on its fused path, where no adapter can act; pad them"
            " first (torch.nested.to_padded_tensor)"
        )
    if not (query.dim() == key.dim() == value.dim() and query.dim() in (2, 3)):
        raise AdapterError(
            f"query, key, value have {query.dim()}, {key.dim()}, {value.dim()} dimensions; expected 3 each, or 2 each"
            " without a batch"
        )
    if is_causal and attn_mask is None:
        raise AdapterError("is_causal is a hint about attn_mask, so attn_mask must be given with it")


def _each(query: Tensor, key: Tensor, value: Tensor, view: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """`view` of each, the same tensor where they were the same: that decides how many products a projection takes."""
    q = view(query)
    k = q if key is query else view(key)
    return q, k, k if value is key else view(value)


def _split(y: Tensor, parts: int) -> tuple[Tensor, ...]:
    return y.unflatten(-1, (parts, y.shape[-1] // parts)).movedim(-2, 0).contiguous().unbind(0)


def _addend(mask: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True: not seen) as 0 and -∞; a floating one as it is."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    if not mask.is_floating_point():
        raise AdapterError(f"{name} is {mask.dtype}; expected bool or floating point")
    return mask


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """(weights·V, weights), the weights after dropout, as the original returns them."""
    q = q * math.sqrt(1.0 / q.shape[-1])
    scores = torch.bmm(q, k.mT) if mask is None else torch.baddbmm(mask, q, k.mT)
    weights = torch.softmax(scores, dim=-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    return torch.bmm(weights, v), weights
