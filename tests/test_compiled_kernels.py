"""What Inductor has to compile for adapters beside the frozen model; its files are most of the time that takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.async_compile import AsyncCompile
from transformers import LlamaConfig, LlamaModel

import lrcompile

LAYERS = 2


class FromEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=8, hidden_size=64, intermediate_size=112, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, use_cache=False,
        )  # fmt: skip
        self.model = LlamaModel(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.model(inputs_embeds=x).last_hidden_state
        return y


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The C++ sources that are compiled."""
    found = set[str]()
    compile_one = AsyncCompile.cpp_pybinding

    def recorded(self: AsyncCompile, argtypes: list[str], source_code: str) -> Any:
        found.add(source_code)
        return compile_one(self, argtypes, source_code)

    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", recorded)
    return found


def compiled(dtype: torch.dtype, method: str | None, files: set[str]) -> int:
    """How many files a forward and a backward pass take."""
    torch._dynamo.reset()
    files.clear()
    model = FromEmbeddings().to(dtype).requires_grad_(False).eval()
    if method is None:
        run: Any = torch.compile(model, dynamic=False)
    else:
        run = lrcompile.compile(lrcompile.apply(model, lrcompile.spec(method, rank=4)), dynamic=False)
    x = torch.randn(1, 48, 64, dtype=dtype, requires_grad=True)
    with torch._inductor.config.patch(force_disable_caches=True):
        y = run(x)
        (y * torch.randn_like(y)).sum().backward()
    return len(files)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_add_at_most_a_fifth_to_what_inductor_compiles(dtype, files):
    frozen = compiled(dtype, None, files)
    assert frozen > 0
    for method in ("lora", "dora", "vera"):
        assert compiled(dtype, method, files) <= 1.2 * frozen, method
