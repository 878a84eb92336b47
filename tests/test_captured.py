"""What a captured graph does besides computing its outputs is still done after the training passes."""

from __future__ import annotations

import torch
from torch import nn

import lrcompile


class Counting(nn.Module):
    """Writes buffers in every way a forward may: methods, operators, items."""

    seen: torch.Tensor
    calls: torch.Tensor
    marked: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        for name in ("seen", "calls", "marked"):
            self.register_buffer(name, torch.zeros(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.copy_(x.detach().mean(0))
        self.calls += 1
        self.marked[1:3] = 7
        return self.linear(x)


def test_buffers_that_a_forward_writes_are_written_when_the_passes_fire() -> None:
    model = lrcompile.apply(Counting(), lrcompile.spec("lora", rank=2))
    compiled = torch.compile(model, backend="lrcompile", options={"inner": "aot_eager"})
    x = torch.linspace(-1, 1, 20).view(4, 5)
    for _ in range(2):
        compiled(x)
    torch.testing.assert_close(model.seen, x.mean(0))
    torch.testing.assert_close(model.calls, torch.full((5,), 2.0))
    torch.testing.assert_close(model.marked, torch.tensor([0.0, 7, 7, 0, 0]))
