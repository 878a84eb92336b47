"""What an eager step keeps for its backward pass where three maps read one input, to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import lrcompile

ROWS, IN, RANK = 512, 192, 5
OUT = {"q": 192, "k": 64, "v": 48}
FACTORS = RANK * sum(IN + out for out in OUT.values())


class Attention(nn.Module):
    """q, k and v of one input."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        for name, out in OUT.items():
            self.add_module(name, nn.Linear(IN, out, bias=bias))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.get_submodule(name)(x) for name in OUT)


def adapted(method: str, *, master: torch.dtype = torch.bfloat16, bias: bool = False, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    fields = {"rank": RANK, "alpha": 8, "dtype": str(master).removeprefix("torch.")} | fields
    model = lrcompile.apply(Attention(bias).bfloat16(), lrcompile.spec(method, **fields))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".B"):
                p.normal_(0, 0.1)
    return model.train()


def saved(model: nn.Module) -> tuple[int, int]:
    """Bytes of what has a row for each token, and of the rest; each storage once, without the model's own tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # or its address might be given again
        return tensor

    x = torch.randn(4, ROWS // 4, IN, dtype=torch.bfloat16, requires_grad=True)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    rows = [size for size in kept.values() if size % (2 * ROWS) == 0]
    return sum(rows), sum(kept.values()) - sum(rows)


CODES = 2 * ROWS * RANK * len(OUT)
SCALES = 2 * len(OUT)
"""Each site's scale, a number cast to bfloat16."""


@pytest.mark.parametrize("bias", [False, True])
def test_lora_keeps_the_input_once_and_the_codes(bias):
    assert saved(adapted("lora", bias=bias)) == (2 * ROWS * IN + CODES, SCALES)


def test_masters_in_float32_add_their_casts_and_no_activation():
    assert saved(adapted("lora", master=torch.float32)) == (2 * ROWS * IN + CODES, SCALES + 2 * FACTORS)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_lora_fa_keeps_the_codes_alone_with_dropout_too(dropout):
    assert saved(adapted("lora-fa", dropout=dropout)) == (CODES, SCALES)


@pytest.mark.parametrize("bias", [False, True])
def test_dora_keeps_beside_that_the_outputs_that_it_scales(bias):
    rows, rest = saved(adapted("dora", bias=bias))
    assert rows == 2 * ROWS * (IN + sum(OUT.values())) + CODES
    vectors = [4 * sum(OUT.values())] * 4  # in float32: g, what it is divided by, the normalization's mean and variance
    assert rest == SCALES + sum(vectors)
