"""Plain modules that use a weight in a way which defeats a naive adapter, and what must come of each.

Every case either *holds* (the adapter acts where the weight acts: train, eval, merged, exported alike) or is *refused*
by an error that names the site and the reason, matched here word for word as a regex.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo import modules as m
from zoo.modules import IN, OUT, WIDE, draw


@dataclass(frozen=True)
class Case:
    """One module, the arguments of its forward, the targets to ask for, and the refusal if one is due."""

    name: str
    module: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    targets: str | tuple[str, ...] = "all-linear"
    refused: str = ""
    exports: bool = True  # False: torch.export cannot capture the plain module either

    def build(self) -> tuple[nn.Module, tuple[Any, ...]]:
        torch.manual_seed(0)
        return self.module().eval(), self.inputs()


def _rows(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (draw(*(shape or (5,)), IN),)


def _sequence(length: int = 6, width: int = WIDE) -> Tensor:
    return draw(3, length, width)


def _padding(length: int = 6) -> Tensor:
    mask = torch.zeros(3, length, dtype=torch.bool)
    mask[1, -2:] = mask[2, -1:] = True
    return mask


def _ids() -> tuple[Tensor]:
    return (torch.tensor([[0, 3, 7], [6, 6, 1]]),)


def _encoder(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDE, 2, dim_feedforward=19, batch_first=True, **options)


CASES: tuple[Case, ...] = (
    # the weight is not multiplied where its module stands
    Case("weight read by the parent", m.ParentReads, _rows(), refused="no gradient reaches.*fc"),
    Case("called, and read by the parent too", m.CalledAndRead, _rows(), refused="fc"),
    Case("forward bound before apply", m.BoundForward, _rows(), refused="fc"),
    Case("forward called without hooks", m.ForwardDirectly, _rows()),
    Case("forward replaced on the instance", m.InstanceForward, _rows(), refused="fc.*forward"),
    Case("linear in a plain list only", m.PlainList, _rows(), ("hidden",), refused="hidden"),
    Case("registered and in a plain list", m.PlainListToo, _rows()),
    Case("under two names", m.TwoNames, _rows()),
    Case("one parameter in two linears", m.SharedParameter, lambda: (draw(5, WIDE),)),
    Case("one parameter in two linears, one targeted", m.SharedParameter, lambda: (draw(5, WIDE),), ("first",)),
    Case("tied embedding and head, embedding targeted", m.TiedHead, _ids, ("embed",)),
    Case("tied embedding and head, head targeted", m.TiedHead, _ids, ("head",)),
    Case("never used", m.NeverUsed, _rows(), refused="spare"),
    Case("under no_grad", m.UnderNoGrad, _rows(), refused="frozen"),
    # something stands between the module and its weight
    Case("subclass without a forward", m.PlainSubclass, _rows()),
    Case("subclass that changes its input", m.ChangesInput, _rows()),
    Case("subclass that scales its output", m.ScalesOutput, _rows()),
    Case("forward hook", m.hooked, _rows()),
    Case("forward pre-hook", m.pre_hooked, _rows()),
    Case("old-style weight_norm", m.old_weight_norm, _rows(), refused="fc.*(computed|weight_norm)"),
    Case("parametrized weight_norm", m.weight_norm, _rows(), refused="fc.*parametri"),
    Case("parametrized spectral_norm", m.spectral_norm, _rows(), refused="fc.*parametri"),
    Case("lazy", m.lazy, _rows(), refused="fc.*initiali"),
    Case("dynamically quantized", m.quantized, _rows(), ("fc",), refused="fc.*no weight that is one linear map"),
    Case("scripted", m.scripted, _rows(), refused="fc.*torch.jit"),
    # attention and its fused paths
    Case("attention alone", m.SelfAttention, lambda: (_sequence(),)),
    Case("attention, padding mask", m.SelfAttention, lambda: (_sequence(), _padding())),
    Case("attention, no bias", lambda: m.SelfAttention(bias=False), lambda: (_sequence(),)),
    Case("attention, bias_kv and zero_attn",
         lambda: m.SelfAttention(add_bias_kv=True, add_zero_attn=True), lambda: (_sequence(),)),
    Case("attention, sequence first", lambda: m.SelfAttention(batch_first=False), lambda: (_sequence(),)),
    Case("attention, cross", m.CrossAttention, lambda: (_sequence(4), _sequence(6))),
    Case("attention, kdim and vdim", lambda: m.CrossAttention(kdim=9, vdim=7),
         lambda: (_sequence(4), _sequence(6, 9), _sequence(6, 7))),
    Case("encoder layer, fused in eval", _encoder, lambda: (_sequence(),)),
    Case("encoder layer, norm first", lambda: _encoder(norm_first=True, activation="gelu"), lambda: (_sequence(),)),
    Case("encoder, nested tensors in eval", m.Encoder, lambda: (_sequence(), _padding())),
    Case("decoder layer", lambda: nn.TransformerDecoderLayer(WIDE, 2, dim_feedforward=19, batch_first=True),
         lambda: (_sequence(4), _sequence(6))),
    # raw parameters
    Case("x @ w", m.MatMul, _rows(2, 3), ("w",)),
    Case("F.linear(x, w)", m.Functional, _rows(), ("w",)),
    Case("addmm", m.AddMM, _rows(), ("w",)),
    Case("torch.matmul", m.TorchMatMul, _rows(), ("w",)),
    Case("x @ w.T", m.Transposed, _rows(), ("w",)),
    Case("parameter used twice", m.UsedTwice, lambda: (draw(5, WIDE),), ("w",)),
    Case("optional arguments, training branch", m.Branches, _rows(), ("w",)),
    Case("einsum", m.EinSum, _rows(), ("w",), refused="w.*einsum"),
    Case("batched parameter", m.Batched, lambda: (draw(3, 5, IN),), ("w",)),
    Case("elementwise as well", m.Elementwise, _rows(), ("w",), refused="w"),
    Case("data-dependent control flow", m.DataDependent, _rows(), ("w",), refused="w", exports=False),
    # other modules
    Case("Conv1D", m.conv1d, _rows(2, 3)),
    Case("embedding, padding_idx", lambda: m.embedding(padding_idx=0), _ids, ("embed",)),
    Case("embedding, max_norm", lambda: m.embedding(max_norm=1.0), _ids, ("embed",), refused="embed.*max_norm"),
    Case("embedding bag", m.bag, _ids, ("bag",), refused="bag"),
    Case("bilinear", m.Bilinear, lambda: (draw(5, IN), draw(5, OUT)), ("fc",), refused="fc"),
    Case("LSTM", m.Recurrent, lambda: (draw(3, 4, IN),), ("rnn.weight_ih_l0",), refused="rnn"),
    # how it is called
    Case("gradient checkpointing", m.Checkpointed, _rows()),
    Case("several times in one forward", m.Repeated, lambda: (draw(5, WIDE),)),
    Case("keyword argument", m.Keyword, _rows()),
    Case("vector", m.plain, lambda: (draw(IN),)),
    Case("four dimensions", m.plain, _rows(2, 3, 4)),
    Case("not contiguous", m.plain, lambda: (draw(IN, 5).T,)),
    Case("result changed in place", m.InPlace, _rows()),
    Case("under vmap", m.Mapped, _rows(3, 2)),
    Case("double precision", lambda: m.plain().double(), lambda: (draw(5, IN).double(),)),
    Case("bfloat16", lambda: m.plain().bfloat16(), lambda: (draw(5, IN).bfloat16(),)),
)  # fmt: skip
