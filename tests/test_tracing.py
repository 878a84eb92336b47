"""What a forward is told of the capture it runs under."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrcompile.tracing import exporting


class Says(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if exporting() else x + 2


def test_only_an_export_is_one():
    x = torch.zeros(3)
    assert torch.equal(Says()(x), x + 2)
    assert torch.equal(torch.compile(Says(), backend="eager")(x), x + 2)
    assert torch.equal(torch.export.export(Says(), (x,), strict=False).module()(x), x + 1)
