"""The modules of `awkward.py`, each the shortest one that shows its way of using a weight."""

from __future__ import annotations

import types
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IN, OUT, WIDE = 11, 6, 8


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


class _One(nn.Module):
    """A linear map and a nonlinearity after it, so that nothing can be commuted past it unseen."""

    def __init__(self, fc: nn.Module | None = None) -> None:
        super().__init__()
        self.fc: Any = fc if fc is not None else nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x))


def plain() -> nn.Module:
    return _One()


class ParentReads(_One):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight, self.fc.bias)


class CalledAndRead(_One):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + 2 * F.linear(x, self.fc.weight).tanh()


class BoundForward(_One):
    def __init__(self) -> None:
        super().__init__()
        self.kept = self.fc.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.kept(x).tanh()


class ForwardDirectly(_One):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc.forward(x).tanh()


class InstanceForward(_One):
    def __init__(self) -> None:
        super().__init__()
        self.fc.forward = types.MethodType(lambda fc, x: F.linear(2 * x, fc.weight, fc.bias), self.fc)


class PlainList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(OUT, 3)
        self.hidden = [nn.Linear(IN, OUT)]

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden[0](x).tanh())


class PlainListToo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(IN, OUT), nn.Linear(OUT, 3)
        self.chain = [self.first, self.second]

    def forward(self, x: Tensor) -> Tensor:
        for fc in self.chain:
            x = fc(x).tanh()
        return x


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(IN, IN)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class SharedParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(IN, WIDE), nn.Linear(WIDE, IN, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).tanh())


class NeverUsed(_One):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(IN, OUT)


class UnderNoGrad(_One):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(IN, IN)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.frozen(x)
        return super().forward(x)


class _Plain(nn.Linear):
    pass


class _Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2 * input + 1)


class _Scaling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * F.linear(input, self.weight) - 1


class PlainSubclass(_One):
    def __init__(self) -> None:
        super().__init__(_Plain(IN, OUT))


class ChangesInput(_One):
    def __init__(self) -> None:
        super().__init__(_Doubling(IN, OUT))


class ScalesOutput(_One):
    def __init__(self) -> None:
        super().__init__(_Scaling(IN, OUT, bias=False))


def _triple(module: nn.Module, args: tuple[Tensor], result: Tensor) -> Tensor:
    return 3 * result + args[0].sum(-1, keepdim=True)


def _shift(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] * 2 - 1,)


def hooked() -> nn.Module:
    module = _One()
    module.fc.register_forward_hook(_triple)
    return module


def pre_hooked() -> nn.Module:
    module = _One()
    module.fc.register_forward_pre_hook(_shift)
    return module


def old_weight_norm() -> nn.Module:
    return _One(nn.utils.weight_norm(nn.Linear(IN, OUT)))


def weight_norm() -> nn.Module:
    return _One(nn.utils.parametrizations.weight_norm(nn.Linear(IN, OUT)))


def spectral_norm() -> nn.Module:
    return _One(nn.utils.parametrizations.spectral_norm(nn.Linear(IN, OUT)))


def lazy() -> nn.Module:
    return _One(nn.LazyLinear(OUT))


def quantized() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(_One(), {nn.Linear}, dtype=torch.qint8)


def scripted() -> nn.Module:
    return _One(torch.jit.script(nn.Linear(IN, OUT)))


class SelfAttention(nn.Module):
    def __init__(self, batch_first: bool = True, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDE, 2, batch_first=batch_first, **options)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        fast, _ = self.attn(x, x, x, key_padding_mask=padding, need_weights=False)
        slow, weights = self.attn(x, x, x, key_padding_mask=padding, average_attn_weights=False)
        return fast + slow.tanh(), weights


class CrossAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDE, 2, batch_first=True, **options)

    def forward(self, q: Tensor, k: Tensor, v: Tensor | None = None) -> Tensor:
        return self.attn(q, k, k if v is None else v)[0]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDE, 2, dim_feedforward=19, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        # padded positions are zeros on the nested path and anything on the other: only the rest is the module's result
        return self.encoder(x, src_key_padding_mask=padding).masked_fill(padding.unsqueeze(-1), 0.0)


class _Raw(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(*(shape or (IN, OUT))) / 3)
        self.b = nn.Parameter(torch.randn(OUT))


class MatMul(_Raw):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w + self.b).tanh()


class Functional(_Raw):
    def __init__(self) -> None:
        super().__init__(OUT, IN)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w, self.b).tanh()


class AddMM(_Raw):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b, x, self.w).tanh()


class TorchMatMul(_Raw):
    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.w).tanh()


class Transposed(_Raw):
    def __init__(self) -> None:
        super().__init__(OUT, IN)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w.T).tanh()


class UsedTwice(_Raw):
    def __init__(self) -> None:
        super().__init__(WIDE, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w).tanh() @ self.w


class Branches(_Raw):
    def forward(self, x: Tensor, shift: Tensor | None = None, gain: float = 2.0) -> Tensor:
        y = x @ self.w
        if shift is not None:
            y = y + shift
        if self.training:
            y = F.dropout(y, 0.25, self.training) * gain
        return y.tanh()


class EinSum(_Raw):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,io->no", x, self.w)


class Batched(_Raw):
    def __init__(self) -> None:
        super().__init__(3, IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.w).tanh()


class Elementwise(_Raw):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w).tanh() + self.w.square().mean()


class DataDependent(_Raw):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w).tanh() if x.sum() > 0 else -(x @ self.w)


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    module = _One(Conv1D(OUT, IN))
    nn.init.normal_(module.fc.weight, std=0.3)
    return module


def embedding(**options: Any) -> nn.Module:
    parts = OrderedDict(embed=nn.Embedding(IN, WIDE, **options), act=nn.Tanh(), out=nn.Linear(WIDE, OUT))
    return nn.Sequential(parts)


def bag() -> nn.Module:
    return nn.Sequential(OrderedDict(bag=nn.EmbeddingBag(IN, WIDE), out=nn.Linear(WIDE, OUT)))


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Bilinear(IN, OUT, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(x, y)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(IN, WIDE, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(IN, OUT), nn.Linear(OUT, 3)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda h: self.second(self.first(h).tanh()).tanh(), x, use_reentrant=False)


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(WIDE, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.cell(x).tanh()
        return x


class Keyword(_One):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(input=x).tanh()


class InPlace(_One):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).mul_(2).tanh_()


class Mapped(_One):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.fc)(x).tanh()
